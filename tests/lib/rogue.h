/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rogue.h - a peer that speaks the wire and keeps no promise
 *
 * It connects to a daemon's channel, does the handshake of a new session, and
 * then sends what the test has queued.  @ms bounds a function's time, in ms.
 */
#ifndef ROGUE_H
#define ROGUE_H

#include "harness.h"
#include "peer.h"

#define ROGUE_OUT 65536 /* bytes that can be queued */

/* What the daemon has said of one connection that the rogue opened */
typedef struct RogueConn {
    uint32_t id;            /* the connection's number */
    bool ack, close, reset, refused; /* did that message come? */
    uint64_t credit;        /* bytes, by the last WINDOW or CONNECT_ACK */
    unsigned long windows;  /* WINDOWs that came */
} RogueConn;

typedef struct Rogue {
    Peer peer;
    const char *where;      /* the channel's address */
    bool unread;            /* the rogue doesn't read the channel */
    bool up;                /* there is a session */
    VPKey key;              /* secret of the HELLOs; .len 0: none */
    unsigned flags;         /* VP_HELLO_... of the rogue's HELLOs */
    uint64_t token;         /* token of the rogue's HELLOs */
    unsigned long refused;  /* CONNECT_REFUSEDs that came, of any connection */
    unsigned long acked;    /* CONNECT_ACKs that came, of any connection */
    unsigned long asked;    /* CONNECT_INITs that came */
    uint32_t asked_id;      /* the connection that the last of these opens */
    RogueConn conn;         /* what came for connection conn.id */
    unsigned long sessions; /* sessions begun so far */
    uint8_t out[ROGUE_OUT]; /* the queue of bytes to send */
    size_t out_len;         /* bytes in the queue */
    VPPacket pkt;           /* last sequenced packet that came */
    /* called when a control message has come to peer.data; NULL: nothing is */
    void (*heard_msg)(struct Rogue *r);
} Rogue;

/* rogue_new() - set up a rogue, not connected; @where is kept */
static inline void rogue_new(Rogue *r, const char *where)
{
    memset(r, 0, sizeof(*r));
    peer_setup(&r->peer);
    r->peer.hello.max_conns = 100000;
    r->where = where;
}

static inline void rogue_hang_up(Rogue *r)
{
    if (r->peer.fd >= 0) {
        close(r->peer.fd);
    }
    r->peer.fd = -1;
    r->up = false;
    r->peer.len = r->out_len = 0;
    r->peer.heard.token = 0;
}

/* rogue_hear() - note the control message in peer.data, and call heard_msg */
static inline void rogue_hear(Rogue *r)
{
    bool about = !(r->pkt.flags & VP_FLAG_CLIENT) && r->pkt.conn == r->conn.id;
    int msg = r->peer.data[0];

    r->refused += msg == VP_MSG_CONNECT_REFUSED;
    r->acked += msg == VP_MSG_CONNECT_ACK;
    if (msg == VP_MSG_CONNECT_INIT) {
        r->asked++;
        r->asked_id = r->pkt.conn;
    }
    if (about) {
        r->conn.ack |= msg == VP_MSG_CONNECT_ACK;
        r->conn.refused |= msg == VP_MSG_CONNECT_REFUSED;
        r->conn.close |= msg == VP_MSG_CLOSE;
        r->conn.reset |= msg == VP_MSG_RESET;
        r->conn.windows += msg == VP_MSG_WINDOW;
        if (msg == VP_MSG_WINDOW || msg == VP_MSG_CONNECT_ACK) {
            r->conn.credit = get64(r->peer.data + 1);
        }
    }
    if (r->heard_msg != NULL) {
        r->heard_msg(r);
    }
}

/*
 * rogue_take() - take the packet or HELLO at @at
 *
 * Returns its length, 0 if more bytes are needed, 1 if there is none, because
 * then one byte is to be skipped.
 */
static inline size_t rogue_take(Rogue *r, const uint8_t *at, size_t len)
{
    Peer *p = &r->peer;
    uint32_t expect = p->expect;
    uint64_t token = p->heard.token;
    int n = peer_take(p, at, len);

    if (n < 0) {
        return 1;
    }
    r->up = r->up && p->heard.token == token;
    if (p->expect != expect) {
        r->pkt = p->pkt;
        if (p->pkt.type == VP_PKT_CONTROL) {
            rogue_hear(r);
        }
    }
    return (size_t)n;
}

/* rogue_read() - read and take what came; false if the daemon has hung up */
static inline bool rogue_read(Rogue *r)
{
    Peer *p = &r->peer;
    ssize_t n = peer_recv(p);
    size_t pos = 0, used;

    if (n <= 0) {
        if (n < 0 && errno == EAGAIN) {
            return true;
        }
        rogue_hang_up(r);
        return false;
    }
    while ((used = rogue_take(r, p->in + pos, p->len - pos)) > 0) {
        pos += used;
    }
    peer_drop(p, pos);
    return true;
}

/* rogue_flush() - send the queue; false if not all was sent within @ms */
static inline bool rogue_flush(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;
    size_t at = 0;

    while (r->peer.fd >= 0 && at < r->out_len && now_ms() < end) {
        struct pollfd pfd = { .fd = r->peer.fd, .events = POLLOUT };
        ssize_t n;

        pfd.events |= r->unread ? 0 : POLLIN;
        poll(&pfd, 1, 20);
        if ((pfd.revents & POLLIN) && !rogue_read(r)) {
            return false;
        }
        n = send(r->peer.fd, r->out + at, r->out_len - at, MSG_NOSIGNAL);
        at += n > 0 ? (size_t)n : 0;
        if (n < 0 && errno != EAGAIN) {
            rogue_hang_up(r);
            return false;
        }
    }
    r->out_len -= MIN(at, r->out_len);
    memmove(r->out, r->out + at, r->out_len);
    return r->peer.fd >= 0 && r->out_len == 0;
}

/* rogue_wait() - read for @ms, or until *@flag is true if it isn't NULL */
static inline void rogue_wait(Rogue *r, int ms, const bool *flag)
{
    int64_t end = now_ms() + ms, now;

    while (r->peer.fd >= 0 && (now = now_ms()) < end &&
           (flag == NULL || !*flag)) {
        struct pollfd pfd = { .fd = r->peer.fd, .events = POLLIN };

        if (poll(&pfd, 1, (int)(end - now)) > 0) {
            rogue_read(r);
        }
    }
}

/* rogue_wait_hello() - read until a HELLO comes, for @ms at most */
static inline void rogue_wait_hello(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;
    int n = r->peer.hellos;

    while (r->peer.fd >= 0 && r->peer.hellos == n && now_ms() < end) {
        struct pollfd pfd = { .fd = r->peer.fd, .events = POLLIN };

        if (poll(&pfd, 1, 5) > 0) {
            rogue_read(r);
        }
    }
}

/* rogue_hello() - queue a HELLO of peer.hello, if there is room */
static inline void rogue_hello(Rogue *r)
{
    Peer *p = &r->peer;

    p->key = r->key.len > 0 ? &r->key : NULL;
    if (r->out_len + HELLO_TOTAL <= sizeof(r->out)) {
        r->out_len += peer_put_hello(p, r->out + r->out_len, r->token,
                                     r->flags);
    }
}

/* rogue_shake() - connect and begin a session; false if none begins in @ms */
static inline bool rogue_shake(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;
    bool unread = r->unread;

    r->up = false;
    r->unread = false;
    r->token = random64();
    while (now_ms() < end) {
        if (r->peer.fd < 0) {
            rogue_hang_up(r);
            r->peer.fd = dial(r->where, false);
        }
        r->out_len = 0;
        rogue_hello(r);
        rogue_flush(r, ms);
        rogue_wait_hello(r, 50);
        if (r->peer.fd >= 0 && r->peer.heard.echo == r->token &&
            (r->peer.heard.flags & VP_HELLO_UP)) {
            peer_keys(&r->peer);
            peer_begin(&r->peer);
            r->flags |= VP_HELLO_UP;
            r->out_len = 0;
            rogue_hello(r);
            r->flags &= ~(unsigned)VP_HELLO_UP;
            r->up = rogue_flush(r, ms);
            r->sessions++;
            break;
        }
    }
    r->unread = unread;
    return r->up;
}

/*
 * rogue_put() - queue a packet; without room for it, send the queue first
 *
 * The packet is dropped if the queue can't be sent.
 */
static inline void rogue_put(Rogue *r, int type, int flags, uint32_t conn,
                             const void *data, size_t len)
{
    if (r->out_len + VP_PKT_HDR_LEN + len > sizeof(r->out) &&
        !rogue_flush(r, 2000)) {
        return;
    }
    r->out_len += peer_put(&r->peer, r->out + r->out_len, type, flags, conn,
                           data, len);
}

/* rogue_say() - queue a control message for a connection the rogue opened */
static inline void rogue_say(Rogue *r, uint32_t conn, const uint8_t *msg,
                             size_t len)
{
    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg, len);
}

/* rogue_init() - queue CONNECT_INIT */
static inline void rogue_init(Rogue *r, uint32_t conn, const char *service,
                              uint64_t credit)
{
    uint8_t msg[VP_CONTROL_LEN_MAX];

    rogue_say(r, conn, msg, msg_init(msg, service, credit));
}

static inline void rogue_reset(Rogue *r, uint32_t conn, int reason)
{
    uint8_t msg[2];

    rogue_say(r, conn, msg, msg_end(msg, VP_MSG_RESET, reason));
}

/* rogue_msg() - queue CLOSE, or RESET or CONNECT_REFUSED with reason 0 */
static inline void rogue_msg(Rogue *r, uint32_t conn, int type)
{
    uint8_t msg[2];

    rogue_say(r, conn, msg, msg_end(msg, type, 0));
}

/* rogue_credit() - queue WINDOW or CONNECT_ACK with @count */
static inline void rogue_credit(Rogue *r, uint32_t conn, int type,
                                uint64_t count)
{
    uint8_t msg[9];

    rogue_say(r, conn, msg, msg_credit(msg, type, count));
}

/*
 * rogue_settle() - send the queue, and wait until the daemon has acked all
 *
 * Returns false if the session is over or @ms have passed before.
 */
static inline bool rogue_settle(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;

    /* of a connection there isn't, so that there is a packet to ack */
    rogue_credit(r, UINT32_MAX / 2, VP_MSG_WINDOW, 0);
    do {
        rogue_put(r, VP_PKT_PING, 0, 0, NULL, 0);
        rogue_flush(r, ms);
        rogue_wait(r, 2, NULL);
    } while (r->up && r->peer.ack != r->peer.next && now_ms() < end);
    return r->up && r->peer.ack == r->peer.next;
}

/*
 * rogue_until() - settle until *@what or *@else_what, flags of r->conn, is true
 *
 * It returns, too, when the session is over.  @else_what may be NULL.
 */
static inline void rogue_until(Rogue *r, const bool *what,
                               const bool *else_what)
{
    int64_t end = now_ms() + WAIT_MS;

    while (r->up && !*what && !(else_what && *else_what) && now_ms() < end) {
        rogue_settle(r, WAIT_MS);
    }
}

/*
 * rogue_fill() - open @conn, and send on it until the daemon grants no credit
 *
 * The target of @service must not read, so bytes then wait in the daemon.
 */
static inline void rogue_fill(Rogue *r, uint32_t conn, const char *service)
{
    static const uint8_t data[VP_WINDOW_INIT / 2];
    uint64_t sent = 0;

    r->conn = (RogueConn){ .id = conn, .credit = r->peer.heard.window };
    rogue_init(r, conn, service, 1 << 20);
    for (int idle = 0, i = 0; r->up && idle < 3 && i < 1000; i++) {
        uint64_t len = MIN(sizeof(data), r->conn.credit - sent);

        /* a busy kernel takes its time to connect */
        idle = len > 0 || !(r->conn.ack || r->conn.refused) ? 0 : idle + 1;
        if (len > 0) {
            rogue_put(r, VP_PKT_CLIENT, VP_FLAG_ACK_NOW, conn, data,
                      (size_t)len);
        }
        sent += len;
        rogue_settle(r, 1000);
    }
}

#endif
