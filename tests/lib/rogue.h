/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rogue.h - a peer that speaks the wire and keeps no promise
 *
 * It connects to a daemon's channel, shakes hands as a new peer and then sends
 * whatever it is told to.
 */
#ifndef ROGUE_H
#define ROGUE_H

#include "harness.h"
#include "peer.h"

#define ROGUE_OUT 65536

/* What the rogue heard of one connection that it opened */
typedef struct RogueConn {
    uint32_t id;
    bool ack, close, reset, refused; /* these messages came */
    uint64_t credit;        /* in the last WINDOW or CONNECT_ACK, bytes */
    unsigned long windows;  /* WINDOWs that came */
} RogueConn;

typedef struct Rogue {
    Peer peer;
    const char *where;      /* the channel's address */
    bool unread;            /* the rogue never reads */
    bool up;                /* a session is */
    VPKey key;              /* what peer.key points to */
    unsigned flags;         /* in the rogue's HELLOs */
    uint64_t token;         /* in the rogue's HELLOs */
    unsigned long refused;  /* CONNECT_REFUSED that came */
    unsigned long acked;    /* CONNECT_ACK that came */
    RogueConn conn;         /* set .id, clear the rest */
    unsigned long sessions; /* begun so far */
    uint8_t out[ROGUE_OUT]; /* to be sent */
    size_t out_len;
    VPPacket pkt;           /* last sequenced packet that came */
    /* called for each control message, which is in peer.data; or NULL */
    void (*heard_msg)(struct Rogue *r);
} Rogue;

/* rogue_new() - not connected yet */
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

/* rogue_hear() - a control message, about a connection of its own or not */
static inline void rogue_hear(Rogue *r)
{
    bool about = !(r->pkt.flags & VP_FLAG_CLIENT) && r->pkt.conn == r->conn.id;
    int msg = r->peer.data[0];

    r->refused += msg == VP_MSG_CONNECT_REFUSED;
    r->acked += msg == VP_MSG_CONNECT_ACK;
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

/* rogue_take() - one packet or HELLO; how many bytes it had, 0: none yet */
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

/* rogue_read() - what has come; false if the daemon has hung up */
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

/* rogue_flush() - send all; false if that takes longer than @ms */
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

/* rogue_wait() - read for @ms, or until *@flag */
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

/* rogue_hello() - queue one; what it says is in peer.hello */
static inline void rogue_hello(Rogue *r)
{
    Peer *p = &r->peer;

    p->key = r->key.len > 0 ? &r->key : NULL;
    if (r->out_len + HELLO_TOTAL <= sizeof(r->out)) {
        r->out_len += peer_put_hello(p, r->out + r->out_len, r->token,
                                     r->flags);
    }
}

/* rogue_shake() - connect, begin a session; false if none comes in @ms */
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

/* rogue_put() - queue a packet, sending what was queued when there's no room */
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

/* rogue_say() - a control message of a client's */
static inline void rogue_say(Rogue *r, uint32_t conn, const uint8_t *msg,
                             size_t len)
{
    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg, len);
}

/* rogue_init() - CONNECT_INIT */
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

/* rogue_msg() - CLOSE, RESET, CONNECT_REFUSED */
static inline void rogue_msg(Rogue *r, uint32_t conn, int type)
{
    uint8_t msg[2];

    rogue_say(r, conn, msg, msg_end(msg, type, 0));
}

/* rogue_credit() - WINDOW or CONNECT_ACK */
static inline void rogue_credit(Rogue *r, uint32_t conn, int type,
                                uint64_t count)
{
    uint8_t msg[9];

    rogue_say(r, conn, msg, msg_credit(msg, type, count));
}

/*
 * rogue_settle() - until the daemon has taken all that was sent
 *
 * False if it said a new HELLO or hung up instead, or nothing for @ms.
 */
static inline bool rogue_settle(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;

    /* something that is counted, about a connection that never was */
    rogue_credit(r, UINT32_MAX / 2, VP_MSG_WINDOW, 0);
    do {
        rogue_put(r, VP_PKT_PING, 0, 0, NULL, 0);
        rogue_flush(r, ms);
        rogue_wait(r, 2, NULL);
    } while (r->up && r->peer.ack != r->peer.next && now_ms() < end);
    return r->up && r->peer.ack == r->peer.next;
}

/* rogue_until() - until @what, or @else_what, is so of .conn, while it is up */
static inline void rogue_until(Rogue *r, const bool *what,
                               const bool *else_what)
{
    int64_t end = now_ms() + WAIT_MS;

    while (r->up && !*what && !(else_what && *else_what) && now_ms() < end) {
        rogue_settle(r, WAIT_MS);
    }
}

/*
 * rogue_fill() - open @id, whose target doesn't read, and use all its credit
 *
 * Until it grants no more, so that bytes wait in the daemon.
 */
static inline void rogue_fill(Rogue *r, uint32_t conn, const char *service)
{
    static const uint8_t data[VP_WINDOW_INIT / 2];
    uint64_t sent = 0;

    r->conn = (RogueConn){ .id = conn, .credit = r->peer.heard.window };
    rogue_init(r, conn, service, 1 << 20);
    for (int idle = 0, i = 0; r->up && idle < 3 && i < 1000; i++) {
        uint64_t len = MIN(sizeof(data), r->conn.credit - sent);

        idle = len > 0 ? 0 : idle + 1;
        if (len > 0) {
            rogue_put(r, VP_PKT_CLIENT, VP_FLAG_ACK_NOW, conn, data,
                      (size_t)len);
        }
        sent += len;
        rogue_settle(r, 1000);
    }
}

#endif
