/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rig.h - an engine in the box, and a peer that the test scripts
 *
 * A Rig is a driver with one channel.  The other end is the Rig's Peer, with
 * which the test sends any HELLO and any packet, good or bad.
 */
#ifndef RIG_H
#define RIG_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "boxed.h"
#include "bytes.h"
#include "log.h"
#include "peer.h"
#include "sock.h"
#include "suite.h"

/*
 * box_pause() - count a try; after 50 tries also sleep 1 ms, because the kernel
 * may need real time to move bytes; the 5000th try fails the test
 */
static inline void box_pause(int *tries)
{
    ck_assert_msg(++*tries < 5000, "waited in vain; in the log:\n%s",
                  log_text());
    poll(NULL, 0, *tries > 50);
}

/* box_wait() - run the loop until @cond is true */
#define box_wait(loop, cond)                                                \
    do {                                                                    \
        int tries_ = 0;                                                     \
                                                                            \
        box_settle(loop);                                                   \
        while (!(cond)) {                                                   \
            box_pause(&tries_);                                             \
            box_settle(loop);                                               \
        }                                                                   \
    } while (0)

/* ---- sockets and bytes ------------------------------------------------ */

/* fd_wait() - run the loop until fd_state() is @state */
#define fd_wait(loop, fd, state) \
    box_wait(loop, fd_state(fd) == (state))

/* bytes_check() - fail the test unless @len bytes are @stream's from @pos on */
static inline void bytes_check(const uint8_t *p, size_t len, unsigned stream,
                               uint64_t pos)
{
    size_t right = bytes_right(p, len, stream, pos);

    check_that(right == len, "stream %u: wrong byte at %llu", stream,
               (unsigned long long)(pos + right));
}

/*
 * fd_drain() - read all that @fd has; fail the test if it isn't @stream's
 * @pos:  position in @stream of the next byte; grows by the bytes read
 *
 * Returns what comes after these bytes: FD_OPEN, FD_EOF or an errno value.  The
 * kernel tells an error once.
 */
static inline int fd_drain(int fd, unsigned stream, uint64_t *pos)
{
    uint8_t buf[65536];
    ssize_t n;

    while ((n = recv(fd, buf, sizeof(buf), 0)) > 0) {
        bytes_check(buf, (size_t)n, stream, *pos);
        *pos += (uint64_t)n;
    }
    return n == 0 ? FD_EOF : errno == EAGAIN || errno == EWOULDBLOCK ? FD_OPEN
                                                                     : errno;
}

/* rnd() - returns a number from 0 to @below - 1; each run has the same ones */
static inline uint32_t rnd(uint32_t below)
{
    static uint64_t state = 1;

    state += 0x9e3779b97f4a7c15;
    return (uint32_t)(mix64(state) >> 32) % below;
}

/* ---- a driver, and a peer that the test scripts ----------------------- */

typedef struct Rig {
    VPLoop *loop;
    VPDriver *drv;
    bool tcp;         /* clients and targets are TCP, so they can be reset */
    int lost;         /* channels that the engine has given up */
    bool was_up;      /* the channel given up last had a session */
    char reason[100]; /* why the engine gave up that channel; "": none yet */
    Peer peer;        /* the channel's other end */
} Rig;

/* The link's parts, for the suites of store and flow */
#define rig_store(r) (&(r)->drv->link.store)
#define rig_flow(r) (&(r)->drv->link.flow)

static const VPConfig rig_config = {
    .grace = 30, .max_conns = 100, .max_half_open = 100, .max_opens = 1000000,
};

static inline void rig_lost(void *opaque, const char *reason, bool was_up)
{
    Rig *r = opaque;

    r->lost++;
    r->was_up = was_up;
    snprintf(r->reason, sizeof(r->reason), "%s", reason);
}

/* rig_plug() - give the driver a new channel, and close the peer's old end */
static inline void rig_plug(Rig *r, VPChannelKind kind, VPChannelRole role)
{
    int fd[2];

    fd_pair(fd);
    if (r->peer.fd >= 0) {
        close(r->peer.fd);
    }
    r->peer.fd = fd[1];
    r->peer.len = 0;
    r->peer.heard = (VPHello){0};
    ck_assert_int_eq(vp_attach(r->drv, fd[0], fd[0], kind, role), 0);
}

static inline void rig_new(Rig *r, const VPConfig *config)
{
    signal(SIGPIPE, SIG_IGN); /* as the program does */
    memset(r, 0, offsetof(Rig, peer));
    peer_setup(&r->peer);
    r->loop = engine_loop_new();
    ck_assert_ptr_nonnull(r->loop);
    r->drv = vp_new(r->loop, 7, config, rig_lost, r);
    ck_assert_ptr_nonnull(r->drv);
    rig_plug(r, VP_CHN_SOCKET, VP_ACCEPTED);
}

/* rig_free() - free driver, loop and channel; leaked memory fails the test */
static inline void rig_free(Rig *r)
{
    vp_free(r->drv);
    vp_loop_free(r->loop);
    ck_assert_uint_eq(box.allocated, 0);
    close(r->peer.fd);
}

/* rig_unplug() - close the peer's end; the engine's link must go down */
static inline void rig_unplug(Rig *r)
{
    close(r->peer.fd);
    r->peer.fd = -1;
    box_settle(r->loop);
    ck_assert_str_eq(engine_link(r->drv).state, "down");
}

/* peer_write() - write raw bytes to the channel, and run the loop */
static inline void peer_write(Rig *r, const void *data, size_t len)
{
    const uint8_t *p = data;
    int tries = 0;

    while (len > 0) {
        ssize_t n = send(r->peer.fd, p, len, MSG_NOSIGNAL);

        if (n < 0) {
            ck_assert_int_eq(errno, EAGAIN);
            box_pause(&tries);
            n = 0;
        }
        p += n;
        len -= (size_t)n;
        box_settle(r->loop);
    }
}

/*
 * peer_next() - run the loop, and take the engine's next packet to peer.pkt
 *
 * Returns its type, 0 if there is none.  A wrong number or a wrong check of its
 * payload fails the test.
 */
static inline int peer_next(Rig *r)
{
    Peer *p = &r->peer;
    uint32_t expect = p->expect;
    int n;

    box_settle(r->loop);
    peer_recv(p);
    n = peer_take(p, p->in, p->len);
    ck_assert_msg(n >= 0, "the engine sent what is no packet");
    if (n == 0) {
        return 0;
    }
    if (p->pkt.type != VP_PKT_HELLO) {
        ck_assert_uint_eq(p->pkt.seq, expect);
        ck_assert(p->pkt.bytes == 0 ||
                  wire_data_ok(&p->pkt, p->data, &p->rx_payload_key));
    }
    peer_drop(p, (size_t)n);
    return p->pkt.type;
}

/* peer_say() - send a HELLO that echoes the engine's last token */
static inline void peer_say(Rig *r, uint64_t token, unsigned flags)
{
    uint8_t buf[HELLO_TOTAL];

    peer_write(r, buf, peer_put_hello(&r->peer, buf, token,
                                      flags | VP_HELLO_CONNECTOR));
}

/* peer_drain() - take all packets; returns the last one's type, 0 if none */
static inline int peer_drain(Rig *r)
{
    int type, last = 0;

    while ((type = peer_next(r)) != 0) {
        last = type;
    }
    return last;
}

/* peer_quiet() - take all packets; a sequenced one fails the test */
static inline void peer_quiet(Rig *r)
{
    int type;

    while ((type = peer_next(r)) != 0) {
        ck_assert_msg(type >= VP_PKT_HELLO, "type %d, connection %u, message "
                      "%d; in the log:\n%s", type, r->peer.pkt.conn,
                      r->peer.data[0], log_text());
    }
}

/* peer_expects() - have the peer claim to have got the packets before @seq */
static inline void peer_expects(Rig *r, uint32_t seq)
{
    EngineLink l = engine_link(r->drv);

    r->peer.expect = seq;
    if (seq - l.base <= l.next - l.base) {
        r->peer.digest = engine_digest(r->drv, seq);
    }
}

/*
 * peer_shake() - do a handshake in which the peer claims what peer.hello holds
 *
 * Returns whether the engine's link is up then.
 */
static inline bool peer_shake(Rig *r)
{
    static uint64_t token = 0xc0ffee;
    Peer *p = &r->peer;
    int tries = 0, hellos = p->hellos;

    token++;
    while (p->hellos == hellos) {
        if (peer_next(r) == 0) {
            ck_assert_int_lt(tries++, 5);
            peer_say(r, token, 0);
            box_run(r->loop, tries > 1 ? VP_HELLO_WAIT_MAX : 0);
        }
    }
    do {
        uint64_t echo = p->heard.token;

        peer_say(r, token, 0);
        if (!engine_up(r->drv)) {
            box_run(r->loop, 10 * MS); /* it rests, and reads a byte a pass */
        }
        peer_keys(p);
        if (engine_up(r->drv)) {
            peer_say(r, token, VP_HELLO_UP);
            return true;
        }
        peer_drain(r);
        if (p->heard.token == echo) {
            return false;
        }
    } while (tries++ < 5); /* the engine has a new token to be echoed */
    return false;
}

/* peer_session() - do a handshake that begins a new session */
static inline void peer_session(Rig *r)
{
    Peer *p = &r->peer;

    p->hello.my_epoch = p->hello.peer_epoch = p->hello.digest = 0;
    p->hello.expect = p->hello.base = p->hello.next = VP_SEQ_FIRST;
    ck_assert(peer_shake(r));
    peer_begin(p);
    p->hello.my_epoch = p->hello.token;
    p->hello.peer_epoch = p->heard.token;
    while (!(p->heard.flags & VP_HELLO_UP)) {
        ck_assert_int_eq(peer_next(r), VP_PKT_HELLO);
    }
    ck_assert_uint_eq(p->heard.echo, p->hello.token);
}

/* peer_send() - send a packet, and run the loop until the engine has read it */
static inline void peer_send(Rig *r, int type, int flags, uint32_t conn,
                             const void *data, size_t len)
{
    static uint8_t buf[VP_PKT_HDR_LEN + UINT16_MAX];

    peer_write(r, buf, peer_put(&r->peer, buf, type, flags, conn, data, len));
}

/* peer_init() - send CONNECT_INIT */
static inline void peer_init(Rig *r, uint32_t conn, const char *service,
                             uint64_t credit)
{
    uint8_t msg[VP_CONTROL_LEN_MAX];

    peer_send(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg,
              msg_init(msg, service, credit));
}

/* peer_msg() - send CLOSE, or RESET or CONNECT_REFUSED with reason @arg */
static inline void peer_msg(Rig *r, int flags, uint32_t conn, int msg,
                            int arg)
{
    uint8_t buf[2];

    peer_send(r, VP_PKT_CONTROL, flags, conn, buf, msg_end(buf, msg, arg));
}

/* peer_credit() - send WINDOW or CONNECT_ACK with @count */
static inline void peer_credit(Rig *r, int flags, uint32_t conn, int msg,
                               uint64_t count)
{
    uint8_t buf[9];

    peer_send(r, VP_PKT_CONTROL, flags, conn, buf,
              msg_credit(buf, msg, count));
}

/* peer_expect() - take packets; the next sequenced one must be @msg of @conn */
static inline void peer_expect(Rig *r, uint32_t conn, int msg)
{
    int type;

    do {
        type = peer_next(r);
    } while (type >= VP_PKT_HELLO);
    ck_assert_msg(type == VP_PKT_CONTROL && r->peer.pkt.conn == conn &&
                  r->peer.data[0] == msg, "type %d, connection %u, message "
                  "%d instead of message %d of %u; in the log:\n%s", type,
                  r->peer.pkt.conn, r->peer.data[0], msg, conn, log_text());
}

/* rig_target() - set an iforward to a new listener; returns the listener */
static inline int rig_target(Rig *r, const char *service)
{
    VPAddr addr;
    int fd = r->tcp ? tcp_listen(&addr, 100) : unix_listen(&addr, 100);

    ck_assert_int_eq(vp_set_iforward(r->drv, service, &addr, 1), 0);
    return fd;
}

/*
 * rig_listen() - set an oforward to a new listener, whose address goes to @addr
 *
 * Returns the listener.
 */
static inline int rig_listen(Rig *r, const char *service, VPAddr *addr)
{
    int fd = r->tcp ? tcp_listen(addr, 100) : unix_listen(addr, 100);

    ck_assert_int_eq(vp_set_oforward(r->drv, fd, service), 0);
    return fd;
}

/* rig_accept() - returns the connection that the engine makes to @listener */
static inline int rig_accept(Rig *r, int listener)
{
    int fd = -1;

    box_wait(r->loop, (fd = accept(listener, NULL, NULL)) >= 0);
    fd_nonblock(fd);
    return fd;
}

/* rig_client() - connect a client to an oforward; returns its socket */
static inline int rig_client(Rig *r, const char *service)
{
    int fd[2];

    if (r->tcp) {
        tcp_pair(fd);
    } else {
        fd_pair(fd);
    }
    engine_accept(r->drv, service, fd[0]);
    return fd[1];
}

/* rig_conn() - returns what the engine has of a connection, which must exist */
static inline EngineConn rig_conn(Rig *r, uint32_t id, bool client)
{
    EngineConn c = engine_conn(r->drv, id, client);

    ck_assert_msg(c.there, "no connection %u; in the log:\n%s", id, log_text());
    return c;
}

/* rig_conn_in() - whether @in is the state of a connection's reading half */
static inline bool rig_conn_in(Rig *r, uint32_t id, bool client,
                               const char *in)
{
    return strcmp(rig_conn(r, id, client).in, in) == 0;
}

#endif
