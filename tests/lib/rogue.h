/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * rogue.h - a peer that speaks the wire and keeps no promise
 *
 * It connects to a daemon's channel, shakes hands as a new peer and then sends
 * whatever it is told to, numbered and checked as packets must be.  It uses
 * the engine's own functions for that, so the engine is included here.
 */
#ifndef ROGUE_H
#define ROGUE_H

#include "virtproxy.c"
#include "harness.h"

#define ROGUE_OUT 65536

/* Packets that it remembers to have sent */
#define ROGUE_SENT 65536u

/* What it heard of one connection of its own */
typedef struct RogueConn {
    uint32_t id;
    bool ack, close, reset, refused;
    uint64_t credit;        /* of the last WINDOW or CONNECT_ACK */
    unsigned long windows;  /* WINDOWs so far */
} RogueConn;

typedef struct Rogue {
    const char *where;      /* the channel's address */
    int fd;                 /* -1: not connected */
    bool unread;            /* it never reads */
    bool up;
    VPKey key;              /* len 0: none */
    uint16_t flags;         /* of its HELLOs */
    uint64_t token;
    VPHello heard;          /* the daemon's last HELLO */
    unsigned long hellos;   /* that it has heard */
    VPHello said;           /* limits are taken from here */
    uint64_t tx_key, rx_key;
    uint32_t next, expect, ack;
    uint64_t digest;        /* of what it received, before "expect" */
    uint64_t sent[ROGUE_SENT]; /* of what it sent, before each number */
    unsigned long refused;  /* CONNECT_REFUSED that came */
    unsigned long acked;    /* CONNECT_ACK */
    RogueConn conn;         /* set .id, clear the rest */
    unsigned long sessions; /* that it has begun */
    uint8_t out[ROGUE_OUT];
    size_t out_len;
    uint8_t in[4 * VP_PKT_LEN_MAX];
    size_t in_len;
    VPPacket pkt;           /* the last sequenced packet that came */
    uint8_t data[64];       /* the beginning of its payload */
    /* called for each control message, whose beginning is in data; or NULL */
    void (*heard_msg)(struct Rogue *r);
} Rogue;

/* rogue_new() - not connected yet */
static inline void rogue_new(Rogue *r, const char *where)
{
    memset(r, 0, sizeof(*r));
    r->where = where;
    r->fd = -1;
    r->said.window = VP_WINDOW_INIT;
    r->said.max_conns = 100000;
}

static inline void rogue_hang_up(Rogue *r)
{
    if (r->fd >= 0) {
        close(r->fd);
    }
    r->fd = -1;
    r->up = false;
    r->in_len = r->out_len = 0;
    r->heard.token = 0;
}

/* rogue_hear() - a control message, about a connection of its own or not */
static inline void rogue_hear(Rogue *r)
{
    bool about = !(r->pkt.flags & VP_FLAG_CLIENT) && r->pkt.conn == r->conn.id;
    int msg = r->data[0];

    r->refused += msg == VP_MSG_CONNECT_REFUSED;
    r->acked += msg == VP_MSG_CONNECT_ACK;
    if (about) {
        r->conn.ack |= msg == VP_MSG_CONNECT_ACK;
        r->conn.refused |= msg == VP_MSG_CONNECT_REFUSED;
        r->conn.close |= msg == VP_MSG_CLOSE;
        r->conn.reset |= msg == VP_MSG_RESET;
        r->conn.windows += msg == VP_MSG_WINDOW;
        if (msg == VP_MSG_WINDOW || msg == VP_MSG_CONNECT_ACK) {
            r->conn.credit = get64(r->data + 1);
        }
    }
    if (r->heard_msg != NULL) {
        r->heard_msg(r);
    }
}

/* rogue_parse() - one packet or HELLO; how many bytes it had, 0: none yet */
static inline size_t rogue_parse(Rogue *r, const uint8_t *p, size_t len)
{
    VPHello h;
    VPPacket pkt;
    uint64_t vouched;
    int n = wire_get_hello(p, len, &h);

    if (n > 0) {
        r->up = r->up && h.token == r->heard.token;
        r->heard = h;
        r->hellos++;
        return (size_t)n;
    }
    if (len < VP_PKT_HDR_LEN) {
        return 0;
    }
    vouched = r->sent[get32(p + VP_PKT_ACK_AT) % ROGUE_SENT];
    if (!wire_get(p, &pkt, r->rx_key + vouched)) {
        return n == 0 ? 0 : 1;
    }
    if (len < (size_t)VP_PKT_HDR_LEN + pkt.bytes) {
        return 0;
    }
    r->ack = pkt.ack;
    if (pkt.type < VP_PKT_HELLO && pkt.seq == r->expect) {
        r->expect++;
        r->digest = digest_add(r->digest, &pkt);
        r->pkt = pkt;
        memcpy(r->data, p + VP_PKT_HDR_LEN, MIN(sizeof(r->data), pkt.bytes));
        if (pkt.type == VP_PKT_CONTROL) {
            rogue_hear(r);
        }
    }
    return VP_PKT_HDR_LEN + (size_t)pkt.bytes;
}

/* rogue_read() - what has come; false if the daemon has hung up */
static inline bool rogue_read(Rogue *r)
{
    ssize_t n = recv(r->fd, r->in + r->in_len, sizeof(r->in) - r->in_len, 0);
    size_t pos = 0, used;

    if (n <= 0) {
        if (n < 0 && errno == EAGAIN) {
            return true;
        }
        rogue_hang_up(r);
        return false;
    }
    r->in_len += (size_t)n;
    while ((used = rogue_parse(r, r->in + pos, r->in_len - pos)) > 0) {
        pos += used;
    }
    r->in_len -= pos;
    memmove(r->in, r->in + pos, r->in_len);
    return true;
}

/* rogue_flush() - send all; false if that takes longer than @ms */
static inline bool rogue_flush(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;
    size_t at = 0;

    while (r->fd >= 0 && at < r->out_len && now_ms() < end) {
        struct pollfd pfd = { .fd = r->fd, .events = POLLOUT };
        ssize_t n;

        pfd.events |= r->unread ? 0 : POLLIN;
        poll(&pfd, 1, 20);
        if ((pfd.revents & POLLIN) && !rogue_read(r)) {
            return false;
        }
        n = send(r->fd, r->out + at, r->out_len - at, MSG_NOSIGNAL);
        at += n > 0 ? (size_t)n : 0;
        if (n < 0 && errno != EAGAIN) {
            rogue_hang_up(r);
            return false;
        }
    }
    r->out_len -= MIN(at, r->out_len);
    memmove(r->out, r->out + at, r->out_len);
    return r->fd >= 0 && r->out_len == 0;
}

/* rogue_wait() - read for @ms, or until *@flag */
static inline void rogue_wait(Rogue *r, int ms, const bool *flag)
{
    int64_t end = now_ms() + ms, now;

    while (r->fd >= 0 && (now = now_ms()) < end &&
           (flag == NULL || !*flag)) {
        struct pollfd pfd = { .fd = r->fd, .events = POLLIN };

        if (poll(&pfd, 1, (int)(end - now)) > 0) {
            rogue_read(r);
        }
    }
}

/* rogue_wait_hello() - read until a HELLO comes, for @ms at most */
static inline void rogue_wait_hello(Rogue *r, int ms)
{
    int64_t end = now_ms() + ms;
    unsigned long n = r->hellos;

    while (r->fd >= 0 && r->hellos == n && now_ms() < end) {
        struct pollfd pfd = { .fd = r->fd, .events = POLLIN };

        if (poll(&pfd, 1, 5) > 0) {
            rogue_read(r);
        }
    }
}

/* rogue_hello() - queue one; what it says is in @h but for token and echo */
static inline void rogue_hello(Rogue *r, VPHello h)
{
    h.version = VP_VERSION;
    h.token = r->token;
    h.echo = r->heard.token;
    h.flags = r->flags;
    h.expect = h.base = h.next = VP_SEQ_FIRST;
    if (r->out_len + VP_PKT_HDR_LEN + VP_HELLO_LEN <= sizeof(r->out)) {
        r->out_len += wire_put_hello(r->out + r->out_len, &h,
                                     r->key.len > 0 ? &r->key : NULL);
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
        if (r->fd < 0) {
            rogue_hang_up(r);
            r->fd = dial(r->where, false);
        }
        r->out_len = 0;
        rogue_hello(r, r->said);
        rogue_flush(r, ms);
        rogue_wait_hello(r, 50);
        if (r->fd >= 0 && r->heard.echo == r->token &&
            (r->heard.flags & VP_HELLO_UP)) {
            const VPKey *key = r->key.len > 0 ? &r->key : NULL;

            r->tx_key = wire_key(r->token, r->heard.token, key);
            r->rx_key = wire_key(r->heard.token, r->token, key);
            r->next = r->expect = r->ack = VP_SEQ_FIRST;
            r->digest = r->sent[VP_SEQ_FIRST % ROGUE_SENT] = 0;
            r->flags |= VP_HELLO_UP;
            r->out_len = 0;
            rogue_hello(r, r->said);
            r->flags &= (uint16_t)~VP_HELLO_UP;
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
    VPPacket pkt = {
        .type = (uint8_t)type,
        .flags = (uint8_t)flags,
        .bytes = (uint16_t)len,
        .conn = conn,
        .seq = r->next,
        .data_check = wire_sum(data, len),
    };

    if (r->out_len + VP_PKT_HDR_LEN + len > sizeof(r->out) &&
        !rogue_flush(r, 2000)) {
        return;
    }
    if (len > 0) {
        memcpy(r->out + r->out_len + VP_PKT_HDR_LEN, data, len);
    }
    pkt.ack = r->expect;
    wire_put(r->out + r->out_len, &pkt, r->tx_key + r->digest);
    r->out_len += VP_PKT_HDR_LEN + len;
    if (type < VP_PKT_HELLO) {
        uint64_t before = r->sent[r->next % ROGUE_SENT];

        r->sent[++r->next % ROGUE_SENT] = digest_add(before, &pkt);
    }
}

/* rogue_init() - CONNECT_INIT */
static inline void rogue_init(Rogue *r, uint32_t conn, const char *service,
                              uint64_t credit)
{
    uint8_t msg[VP_CONTROL_LEN_MAX] = { VP_MSG_CONNECT_INIT };

    put64(msg + 1, credit);
    msg[9] = (uint8_t)strlen(service);
    memcpy(msg + 10, service, msg[9]);
    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg, 10u + msg[9]);
}

static inline void rogue_reset(Rogue *r, uint32_t conn, int reason)
{
    uint8_t buf[2] = { VP_MSG_RESET, (uint8_t)reason };

    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, buf, sizeof(buf));
}

/* rogue_msg() - CLOSE, RESET, CONNECT_REFUSED */
static inline void rogue_msg(Rogue *r, uint32_t conn, int msg)
{
    uint8_t buf[2] = { (uint8_t)msg, 0 };

    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, buf,
              msg == VP_MSG_CLOSE ? 1 : 2);
}

/* rogue_credit() - WINDOW or CONNECT_ACK */
static inline void rogue_credit(Rogue *r, uint32_t conn, int msg,
                                uint64_t count)
{
    uint8_t buf[9] = { (uint8_t)msg };

    put64(buf + 1, count);
    rogue_put(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, buf, sizeof(buf));
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
    } while (r->up && r->ack != r->next && now_ms() < end);
    return r->up && r->ack == r->next;
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

    r->conn = (RogueConn){ .id = conn, .credit = r->heard.window };
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
