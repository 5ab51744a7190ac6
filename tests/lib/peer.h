/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * peer.h - a peer that speaks the wire
 *
 * A Peer makes packets with right numbers and checks, and takes what comes.
 * rig.h passes them to an engine in the same process, rogue.h to a daemon.  The
 * engine's own functions read and write the wire; test_wire.c tests them.
 */
#ifndef PEER_H
#define PEER_H

#include "tests/lib/engine.c"

#define HELLO_TOTAL ((size_t)VP_PKT_HDR_LEN + VP_HELLO_LEN) /* bytes */

/* Digests of sent packets that a Peer keeps */
#define PEER_SENT 65536u

typedef struct Peer {
    int fd;             /* the peer's end of the channel; -1: none */
    VPHello hello;      /* sent; peer_put_hello() sets token, echo, flags */
    const VPKey *key;   /* secret that the HELLOs prove; NULL: none */
    VPHello heard;      /* HELLO that came last; zeros: none */
    int hellos;         /* HELLOs that have come */
    VPHeaderKey tx_key; /* of the checks of headers sent */
    VPHeaderKey rx_key; /* of the checks of headers that come */
    VPPayloadKey tx_payload_key;
    VPPayloadKey rx_payload_key;
    uint32_t next;      /* number of the next packet to send */
    uint32_t expect;    /* number of the next packet to come */
    uint32_t ack;       /* ack field of the packet that came last */
    uint64_t digest;    /* digest of the packets that came before "expect" */
    uint32_t time;      /* "time" of the packets sent */
    uint32_t delay;     /* "delay" of the packets sent */
    uint64_t sent[PEER_SENT]; /* at N % PEER_SENT: of packets sent before N */
    uint8_t in[4 * VP_PKT_LEN_MAX]; /* bytes that came and are not taken yet */
    size_t len;         /* bytes in "in" */
    VPPacket pkt;       /* header of the packet that came last */
    uint8_t data[VP_PKT_LEN_MAX]; /* payload of that packet */
} Peer;

/* peer_setup() - set up a peer that has no channel and has sent nothing */
static inline void peer_setup(Peer *p)
{
    memset(p, 0, sizeof(*p));
    p->fd = -1;
    p->hello = (VPHello){
        .version = VP_VERSION,
        .oldest = VP_VERSION_OLDEST,
        .window = VP_WINDOW_INIT,
        .expect = VP_SEQ_FIRST,
        .base = VP_SEQ_FIRST,
        .next = VP_SEQ_FIRST,
        .max_conns = 100,
    };
}

/* peer_keys() - derive the headers' keys from both tokens and the key */
static inline void peer_keys(Peer *p)
{
    header_key(&p->tx_key, wire_seed(p->hello.token, p->heard.token, p->key));
    header_key(&p->rx_key, wire_seed(p->heard.token, p->hello.token, p->key));
}

/* peer_rewind() - set numbers and digests to those of a session's begin */
static inline void peer_rewind(Peer *p)
{
    p->next = p->expect = p->ack = VP_SEQ_FIRST;
    p->digest = p->sent[VP_SEQ_FIRST % PEER_SENT] = 0;
}

/* peer_begin() - begin a new session, which the handshake's tokens name */
static inline void peer_begin(Peer *p)
{
    payload_key(&p->tx_payload_key,
                wire_seed(p->hello.token, p->heard.token, p->key));
    payload_key(&p->rx_payload_key,
                wire_seed(p->heard.token, p->hello.token, p->key));
    peer_rewind(p);
}

/* peer_claim() - make p->hello tell what the peer has sent and received */
static inline void peer_claim(Peer *p)
{
    p->hello.expect = p->expect;
    p->hello.base = p->hello.next = p->next;
    p->hello.digest = p->digest;
}

/* ---- sending ---------------------------------------------------------- */

/* peer_put_hello() - write a HELLO of p->hello to @buf; returns its length */
static inline size_t peer_put_hello(Peer *p, uint8_t *buf, uint64_t token,
                                    unsigned flags)
{
    p->hello.token = token;
    p->hello.echo = p->heard.token;
    p->hello.flags = flags | (p->key != NULL ? VP_HELLO_KEYED : 0u);
    return wire_put_hello(buf, &p->hello, p->key);
}

/* peer_put() - write the next packet to @buf; returns its length */
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
        .time = p->time,
        .delay = p->delay,
        .data_check = wire_data_check(&p->tx_payload_key, data, len),
    };

    if (len > 0) {
        memcpy(buf + VP_PKT_HDR_LEN, data, len);
    }
    wire_put(buf, &pkt, &p->tx_key, p->digest);
    if (type < VP_PKT_HELLO) {
        uint64_t before = p->sent[p->next % PEER_SENT];

        p->sent[++p->next % PEER_SENT] = digest_add(before, &pkt);
    }
    return VP_PKT_HDR_LEN + len;
}

/* msg_init() - write CONNECT_INIT to @msg; returns its length */
static inline size_t msg_init(uint8_t msg[VP_CONTROL_LEN_MAX],
                              const char *service, uint64_t credit)
{
    msg[0] = VP_MSG_CONNECT_INIT;
    put64(msg + 1, credit);
    msg[9] = (uint8_t)strlen(service);
    memcpy(msg + 10, service, msg[9]);
    return 10u + msg[9];
}

/*
 * msg_end() - write CLOSE, or RESET or CONNECT_REFUSED with @reason, to @msg
 *
 * Returns its length.
 */
static inline size_t msg_end(uint8_t msg[2], int type, int reason)
{
    msg[0] = (uint8_t)type;
    msg[1] = (uint8_t)reason;
    return type == VP_MSG_CLOSE ? 1 : 2;
}

/* msg_credit() - write WINDOW or CONNECT_ACK to @msg; returns its length */
static inline size_t msg_credit(uint8_t msg[9], int type, uint64_t count)
{
    msg[0] = (uint8_t)type;
    put64(msg + 1, count);
    return 9;
}

/* ---- receiving -------------------------------------------------------- */

/* peer_get() - read the header at @at; false if its check is wrong */
static inline bool peer_get(const Peer *p, const uint8_t *at, VPPacket *pkt)
{
    uint32_t ack = get32(at + VP_PKT_ACK_AT);

    return wire_get(at, pkt, &p->rx_key, p->sent[ack % PEER_SENT]);
}

/*
 * peer_take() - take the packet or HELLO that begins at @at
 *
 * A HELLO goes to p->heard, a packet to p->pkt and p->data.  Returns its
 * length, 0 if more bytes are needed, -1 if neither begins there.
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

/* peer_recv() - read from p->fd, appending to "in"; returns what recv() does */
static inline ssize_t peer_recv(Peer *p)
{
    ssize_t n = recv(p->fd, p->in + p->len, sizeof(p->in) - p->len, 0);

    p->len += n > 0 ? (size_t)n : 0;
    return n;
}

/* peer_drop() - remove the first @n bytes of "in" */
static inline void peer_drop(Peer *p, size_t n)
{
    p->len -= n;
    memmove(p->in, p->in + n, p->len);
}

#endif
