/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * peer.h - a peer that speaks the wire
 *
 * It makes packets, numbered and checked as they must be, and takes those that
 * come; what it says, and how bytes get to the engine or the daemon, is up to
 * who plays it: rig.h in one process with the engine, rogue.h with a daemon.
 * Both use the engine's own functions for the wire, which test_wire.c tests.
 */
#ifndef PEER_H
#define PEER_H

#include "tests/lib/engine.c"

#define HELLO_TOTAL ((size_t)VP_PKT_HDR_LEN + VP_HELLO_LEN)

/* Packets that it remembers to have sent */
#define PEER_SENT 65536u

typedef struct Peer {
    int fd;             /* its end of the channel; -1: none */
    VPHello hello;      /* what it says; peer_put_hello() fills in the rest */
    const VPKey *key;   /* the secret it has; NULL: none */
    VPHello heard;      /* last HELLO that came */
    int hellos;         /* HELLOs that came */
    uint64_t tx_key;    /* seeds the checks of what it sends */
    uint64_t rx_key;    /* seeds the checks of what comes */
    uint32_t next;      /* number of the next packet it sends */
    uint32_t expect;    /* number of the next packet that should come */
    uint32_t ack;       /* acked by the last packet that came */
    uint64_t digest;    /* of all packets that came before "expect" */
    uint64_t sent[PEER_SENT]; /* digest of those sent before each number */
    uint8_t in[4 * VP_PKT_LEN_MAX]; /* what came and is no whole packet yet */
    size_t len;         /* bytes in "in" */
    VPPacket pkt;       /* last packet that came */
    uint8_t data[VP_PKT_LEN_MAX]; /* its payload */
} Peer;

/* peer_setup() - without a channel, and nothing said */
static inline void peer_setup(Peer *p)
{
    memset(p, 0, sizeof(*p));
    p->fd = -1;
    p->hello = (VPHello){
        .version = VP_VERSION,
        .window = VP_WINDOW_INIT,
        .expect = VP_SEQ_FIRST,
        .base = VP_SEQ_FIRST,
        .next = VP_SEQ_FIRST,
        .max_conns = 100,
    };
}

/* peer_keys() - as the tokens of a handshake make them */
static inline void peer_keys(Peer *p)
{
    p->tx_key = wire_key(p->hello.token, p->heard.token, p->key);
    p->rx_key = wire_key(p->heard.token, p->hello.token, p->key);
}

/* peer_begin() - nothing was sent in this session, either way */
static inline void peer_begin(Peer *p)
{
    p->next = p->expect = p->ack = VP_SEQ_FIRST;
    p->digest = p->sent[VP_SEQ_FIRST % PEER_SENT] = 0;
}

/* peer_claim() - the truth, for the next handshake */
static inline void peer_claim(Peer *p)
{
    p->hello.expect = p->expect;
    p->hello.base = p->hello.next = p->next;
    p->hello.digest = p->digest;
}

/* ---- what it says ----------------------------------------------------- */

/* peer_put_hello() - as in p->hello, to @buf; returns its length */
static inline size_t peer_put_hello(Peer *p, uint8_t *buf, uint64_t token,
                                    unsigned flags)
{
    p->hello.token = token;
    p->hello.echo = p->heard.token;
    p->hello.flags = (uint16_t)(flags |
                                (p->key != NULL ? VP_HELLO_KEYED : 0u));
    return wire_put_hello(buf, &p->hello, p->key);
}

/* peer_put() - a packet, with the next number, to @buf; returns its length */
static inline size_t peer_put(Peer *p, uint8_t *buf, int type, int flags,
                              uint32_t conn, const void *data, size_t len)
{
    VPPacket pkt = {
        .type = (uint8_t)type,
        .flags = (uint8_t)flags,
        .bytes = (uint16_t)len,
        .conn = conn,
        .seq = p->next,
        .ack = p->expect,
        .data_check = wire_sum(data, len),
    };

    if (len > 0) {
        memcpy(buf + VP_PKT_HDR_LEN, data, len);
    }
    wire_put(buf, &pkt, p->tx_key + p->digest);
    if (type < VP_PKT_HELLO) {
        uint64_t before = p->sent[p->next % PEER_SENT];

        p->sent[++p->next % PEER_SENT] = digest_add(before, &pkt);
    }
    return VP_PKT_HDR_LEN + len;
}

/* msg_init() - CONNECT_INIT, to @msg; returns its length, as the others do */
static inline size_t msg_init(uint8_t msg[VP_CONTROL_LEN_MAX],
                              const char *service, uint64_t credit)
{
    msg[0] = VP_MSG_CONNECT_INIT;
    put64(msg + 1, credit);
    msg[9] = (uint8_t)strlen(service);
    memcpy(msg + 10, service, msg[9]);
    return 10u + msg[9];
}

/* msg_end() - CLOSE, or RESET or CONNECT_REFUSED with a reason */
static inline size_t msg_end(uint8_t msg[2], int type, int reason)
{
    msg[0] = (uint8_t)type;
    msg[1] = (uint8_t)reason;
    return type == VP_MSG_CLOSE ? 1 : 2;
}

/* msg_credit() - WINDOW or CONNECT_ACK */
static inline size_t msg_credit(uint8_t msg[9], int type, uint64_t count)
{
    msg[0] = (uint8_t)type;
    put64(msg + 1, count);
    return 9;
}

/* ---- what it hears ---------------------------------------------------- */

/* peer_get() - read a header that came; false if it is none */
static inline bool peer_get(const Peer *p, const uint8_t *at, VPPacket *pkt)
{
    uint32_t ack = get32(at + VP_PKT_ACK_AT);

    return wire_get(at, pkt, p->rx_key + p->sent[ack % PEER_SENT]);
}

/*
 * peer_take() - the packet or HELLO that begins at @at goes to pkt and data
 *
 * Returns its length, 0 if more bytes are needed, -1 if there is none.
 */
static inline int peer_take(Peer *p, const uint8_t *at, size_t len)
{
    VPHello hello;
    VPPacket pkt;
    int n = wire_get_hello(at, len, &hello);

    if (n > 0) {
        p->heard = hello;
        p->hellos++;
        p->pkt = (VPPacket){ .type = VP_PKT_HELLO };
        return n;
    }
    if (n == 0 || len < VP_PKT_HDR_LEN) {
        return 0;
    }
    if (!peer_get(p, at, &pkt)) {
        return -1;
    }
    if (len < (size_t)VP_PKT_HDR_LEN + pkt.bytes) {
        return 0;
    }
    p->pkt = pkt;
    p->ack = pkt.ack;
    memcpy(p->data, at + VP_PKT_HDR_LEN, pkt.bytes);
    if (pkt.type < VP_PKT_HELLO && pkt.seq == p->expect) {
        p->expect++;
        p->digest = digest_add(p->digest, &pkt);
    }
    return VP_PKT_HDR_LEN + pkt.bytes;
}

/* peer_recv() - what came on its descriptor, to "in"; as recv() returns */
static inline ssize_t peer_recv(Peer *p)
{
    ssize_t n = recv(p->fd, p->in + p->len, sizeof(p->in) - p->len, 0);

    p->len += n > 0 ? (size_t)n : 0;
    return n;
}

/* peer_drop() - the first @n bytes of "in" are done with */
static inline void peer_drop(Peer *p, size_t n)
{
    p->len -= n;
    memmove(p->in, p->in + n, p->len);
}

#endif
