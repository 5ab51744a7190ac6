/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_store.c - what the link holds to send again, and how much of it may
 * be on its way
 */
#include <sys/un.h>

#include "tests/lib/rig.h"

/* What the bounds are where the store doesn't grow. */
#define PKTS (VP_STORE_LEN / VP_STORE_PKT)
#define LIMIT VP_LIMIT_MAX(VP_STORE_LEN)
/* Packets in one that has grown as far as it may. */
#define MOST (VP_STORE_LEN_MAX / VP_STORE_PKT)

/* ---- the ring --------------------------------------------------------- */

/* What the ring should hold, packet by packet */
typedef struct Model {
    VPStore s;
    VPPacket pkt[MOST];  /* by number modulo MOST */
    uint64_t digest[MOST];
    uint64_t last_digest;
    uint64_t bytes;
} Model;

static uint8_t *model_payload(Model *m, uint32_t seq)
{
    return m->s.ring + store_sent(&m->s, seq)->off + VP_PKT_HDR_LEN;
}

/* model_add() - a packet of @len, in a room that is filled with rubbish */
static bool model_add(Model *m, size_t len, uint32_t limit)
{
    uint32_t total = (uint32_t)(VP_PKT_HDR_LEN + len);
    uint32_t room = store_room(&m->s, total, limit);
    uint32_t i = m->s.next % MOST, seq = m->s.next;

    if (m->s.next - m->s.base == store_pkts(&m->s)) {
        check_that(room == 0, "room for more packets than there may be");
    }
    if (room < total) {
        return false;
    }
    check_that(m->s.head + room <= m->s.len, "room beyond the end");
    memset(m->s.ring + m->s.head, 0xee, rnd(100) == 0 ? room : total);
    bytes_fill(m->s.ring + m->s.head + VP_PKT_HDR_LEN, len, seq & 0xffff, 0);
    m->pkt[i] = (VPPacket){
        .type = VP_PKT_CLIENT, .bytes = (uint16_t)len, .conn = seq,
        .data_check = seq * 77,
    };
    m->last_digest = digest_add(m->last_digest, &m->pkt[i]);
    m->digest[i] = m->last_digest;
    m->bytes += total;
    store_add(&m->s, &m->pkt[i]);
    return true;
}

static void model_release(Model *m, uint32_t n)
{
    for (; n > 0; n--) {
        const VPPacket *pkt = &m->pkt[m->s.base % MOST];
        const VPPacket *held = &store_sent(&m->s, m->s.base)->pkt;

        check_that(held->conn == pkt->conn && held->bytes == pkt->bytes,
                   "packet %u is another one now", m->s.base);
        bytes_check(model_payload(m, m->s.base), pkt->bytes,
                    m->s.base & 0xffff, 0);
        m->bytes -= VP_PKT_HDR_LEN + pkt->bytes;
        store_release(&m->s, m->s.base + 1);
    }
    check_that(m->s.bytes == m->bytes, "%u bytes instead of %llu", m->s.bytes,
               (unsigned long long)m->bytes);
}

static void model_free(Model *m)
{
    store_trim(&m->s);
    ck_assert_uint_eq(box.allocated, 0);
}

static const size_t ring_sizes[][2] = {
    { 1, 100 }, { 1, 3000 }, { 60000, VP_PKT_DATA_LEN },
    { 1, VP_PKT_DATA_LEN }, { 32728, 32728 }, { 65496, 65496 },
};

static const uint32_t ring_limits[] = { 1024, 300000, LIMIT };

/*
 * Packets of all sizes come and go: none is ever overwritten, split by the
 * ring's end or counted wrongly, whatever the limit in flight is.
 */
START_TEST(ring)
{
    const size_t *sizes = ring_sizes[_i / COUNT_OF(ring_limits)];
    size_t least = sizes[0], span = sizes[1] - least + 1;
    uint32_t limit = ring_limits[_i % COUNT_OF(ring_limits)];
    unsigned long added = 0;
    static Model m;

    store_reset(&m.s);
    for (int round = 0; round < 80; round++) {
        unsigned n = 1 + rnd(200);

        while (n-- > 0 &&
               model_add(&m, least + rnd((uint32_t)span), limit)) {
            added++;
        }
        model_release(&m, rnd(m.s.next - m.s.base + 1));
    }
    ck_assert_uint_gt(added, 1000); /* the numbers have wrapped around */
    model_release(&m, m.s.next - m.s.base);
    ck_assert_uint_eq(m.s.bytes, 0);
    model_free(&m);
}
END_TEST

/* Full means full: by bytes or by number, and empty is as good as new. */
START_TEST(ring_full)
{
    static Model m;
    uint32_t held;

    store_reset(&m.s);
    while (model_add(&m, 1, LIMIT)) {
    }
    ck_assert_uint_eq(m.s.next - m.s.base, PKTS);
    model_release(&m, 1);
    ck_assert(model_add(&m, 1, LIMIT));
    ck_assert(!model_add(&m, 1, LIMIT));
    model_release(&m, PKTS);
    while (model_add(&m, VP_PKT_DATA_LEN, LIMIT)) {
    }
    held = m.s.next - m.s.base;
    ck_assert_uint_ge(held, VP_STORE_LEN / VP_PKT_LEN_MAX - 1);
    ck_assert_uint_le(m.s.bytes, VP_STORE_LEN);
    model_release(&m, held);
    ck_assert_uint_eq(store_room(&m.s, 1000, 1000), VP_STORE_LEN);
    ck_assert_uint_eq(m.s.head, 0);
    model_free(&m);
}
END_TEST

/*
 * The ring becomes as long as the limit asks for, if it may, with all that it
 * holds, wherever in it that lies; and is as it was if there is no memory.
 */
START_TEST(ring_grows)
{
    static Model m;
    uint32_t most = VP_STORE_LEN << 2 * _i, limit;

    memset(&m, 0, sizeof(m));
    store_reset(&m.s);
    m.s.len_max = most;
    for (limit = LIMIT / 4; limit <= most; limit += 1 + rnd(most / 8)) {
        uint32_t len = m.s.len, before = m.s.next;

        if (len > 0 && rnd(2) == 0) {
            box_fail(CALL_ALLOC, ENOMEM, rnd(2), BOX_ALL);
        }
        while (m.bytes < limit &&
               model_add(&m, 1 + rnd(rnd(4) == 0 ? 2 : 60000), limit)) {
        }
        box.calls = 0;
        ck_assert(m.s.len == len || m.s.next != before);
        ck_assert_uint_le(m.s.len, MAX(most, VP_STORE_LEN));
        ck_assert_uint_le(m.s.bytes, m.s.len);
        model_release(&m, rnd(m.s.next - m.s.base));
    }
    for (int i = 0; i < 5; i++) {
        model_add(&m, 1, most);
    }
    ck_assert_uint_eq(m.s.len, most);
    model_release(&m, m.s.next - m.s.base);
    model_free(&m);
    ck_assert_uint_eq(m.s.len, 0);
}
END_TEST

/* A slow channel's ring stays at its beginning. */
START_TEST(ring_small)
{
    static Model m;
    uint32_t top = 0;

    store_reset(&m.s);
    for (int i = 0; i < 20000; i++) {
        ck_assert(model_add(&m, 500, 8192));
        top = MAX(top, m.s.head);
        if (m.bytes > 7000) {
            model_release(&m, 1);
        }
    }
    ck_assert_uint_lt(top, 4 * 8192);
    model_free(&m);
}
END_TEST

START_TEST(ring_digest)
{
    static Model m;

    store_reset(&m.s);
    for (int i = 0; i < 1500; i++) {
        ck_assert(model_add(&m, (size_t)i, LIMIT));
    }
    ck_assert_uint_eq(store_digest(&m.s, m.s.base), 0);
    for (int round = 0; round < 4; round++) {
        for (uint32_t seq = m.s.base; seq != m.s.next; seq++) {
            ck_assert_uint_eq(store_digest(&m.s, seq + 1),
                              m.digest[seq % MOST]);
        }
        model_release(&m, 400);
        ck_assert_uint_eq(store_digest(&m.s, m.s.base),
                          m.digest[(m.s.base - 1) % MOST]);
        for (int i = 0; i < 100; i++) {
            ck_assert(model_add(&m, (size_t)i, LIMIT));
        }
    }
    model_free(&m);
}
END_TEST

/* What is sent again: all from there on, and each wants an ack. */
START_TEST(ring_rewind)
{
    static Model m;
    VPStore *s = &m.s;
    uint32_t second = 0;

    store_reset(s);
    for (int i = 0; i < 10; i++) {
        ck_assert(model_add(&m, 100, LIMIT));
    }
    for (uint32_t seq = s->base; seq != s->base + 7; seq++) {
        s->bytes_out += store_sent(s, seq)->len;
        s->unsent++;
    }
    s->unsent_off = 40;
    second = s->base + 2;
    store_rewind(s, second);
    ck_assert_uint_eq(s->base, second);
    ck_assert_uint_eq(s->unsent, second);
    ck_assert_uint_eq(s->unsent_off, 0);
    ck_assert_uint_eq(s->bytes_out, 0);
    ck_assert_uint_eq(s->bytes, 8 * (VP_PKT_HDR_LEN + 100));
    for (uint32_t seq = s->base; seq != s->next; seq++) {
        ck_assert_uint_eq(store_sent(s, seq)->pkt.flags, VP_FLAG_ACK_NOW);
    }
    model_free(&m);
}
END_TEST

/* Bytes on their way are counted for what was handed over, no more. */
START_TEST(ring_bytes_out)
{
    static Model m;
    VPStore *s = &m.s;

    store_reset(s);
    for (int i = 0; i < 4; i++) {
        ck_assert(model_add(&m, 100 - VP_PKT_HDR_LEN, LIMIT));
    }
    s->unsent = s->base + 3;
    s->bytes_out = 300;
    ck_assert_uint_eq(store_release(s, s->base + 2), 0);
    ck_assert_uint_eq(s->bytes_out, 100);
    ck_assert_uint_eq(s->bytes, 200);
    model_free(&m);
}
END_TEST

START_TEST(ring_flags)
{
    static Model m;

    store_reset(&m.s);
    for (int i = 0; i < 4; i++) {
        ck_assert(model_add(&m, 1, LIMIT));
    }
    store_sent(&m.s, m.s.base + 1)->pkt.flags = VP_FLAG_ACK_NOW;
    ck_assert_uint_eq(store_release(&m.s, m.s.base + 1), 0);
    ck_assert_uint_eq(store_release(&m.s, m.s.base + 2), VP_FLAG_ACK_NOW);
    ck_assert_uint_eq(store_release(&m.s, m.s.base), 0);
    model_free(&m);
}
END_TEST

START_TEST(ring_no_memory)
{
    static Model m;

    store_reset(&m.s);
    for (int i = 0; i < 2; i++) {
        box_fail(CALL_ALLOC, ENOMEM, (unsigned)i, BOX_ALL);
        ck_assert(!model_add(&m, 100, LIMIT));
        ck_assert_uint_eq(box.allocated, 0);
    }
    box.calls = 0;
    ck_assert(model_add(&m, 100, LIMIT));
    model_free(&m);
}
END_TEST

/* ---- the bounds, under a peer that acks nothing ----------------------- */

static void check_store(Rig *r)
{
    const VPStore *s = rig_store(r);

    check_that(s->next - s->base <= PKTS, "%u packets held",
               s->next - s->base);
    check_that(s->bytes <= VP_STORE_LEN, "%u bytes held", s->bytes);
    check_that(seq_diff(s->unsent, s->base) >= 0 &&
               seq_diff(s->next, s->unsent) >= 0, "numbers out of order");
}

/* rig_clients() - @n of them, with all the credit there is */
static void rig_clients(Rig *r, int *client, int n)
{
    for (int i = 0; i < n; i++) {
        client[i] = rig_client(r, "bulk");
    }
    peer_drain(r);
    for (int i = 0; i < n; i++) {
        peer_credit(r, 0, VP_CONN_FIRST + (uint32_t)i, VP_MSG_CONNECT_ACK,
                    UINT64_MAX);
    }
    box_settle(r->loop);
}

/* Many small packets, then large ones that are read several at a time */
START_TEST(store_packets_bound)
{
    static uint8_t data[100000];
    static Rig r;
    VPStore *s;
    int client;

    rig_new(&r, &rig_config);
    peer_session(&r);
    rig_clients(&r, &client, 1);
    s = rig_store(&r);
    /* what a fast channel makes of them */
    rig_flow(&r)->limit = LIMIT;
    rig_flow(&r)->pkt_len = 4096;
    peer_drain(&r);
    while (s->next - s->base < PKTS - 1 - (uint32_t)_i) {
        fd_write(client, "k", 1);
        box_settle(r.loop);
        check_store(&r);
    }
    fd_write(client, data, sizeof(data));
    box_run(r.loop, 100 * MS);
    check_store(&r);
    ck_assert_uint_eq(s->next - s->base, PKTS);
    close(client);
    rig_free(&r);
}
END_TEST

START_TEST(store_bytes_bound)
{
    static uint8_t data[65536];
    static Rig r;
    int client[20];

    rig_new(&r, &rig_config);
    peer_session(&r);
    rig_clients(&r, client, COUNT_OF(client));
    rig_flow(&r)->limit = LIMIT;
    rig_flow(&r)->pkt_len = VP_PKT_LEN_MAX;
    for (int round = 0; round < 100; round++) {
        for (int i = 0; i < COUNT_OF(client); i++) {
            send(client[i], data, 1 + rnd(sizeof(data)), MSG_NOSIGNAL);
        }
        box_run(r.loop, 10 * MS);
        check_store(&r);
        peer_drain(&r);
    }
    ck_assert_uint_gt(engine_unacked(r.drv), LIMIT / 2);
    ck_assert_uint_le(engine_unacked(r.drv), LIMIT + VP_PKT_LEN_MAX);
    for (int i = 0; i < COUNT_OF(client); i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* A long way has more in flight; once all is acked and quiet it is gone. */
START_TEST(store_long_way)
{
    static uint8_t data[65536];
    VPConfig config = rig_config;
    VPChannelInfo info;
    static Rig r;
    int client[20];

    config.memory = memory_reach(&config, VP_STORE_LEN_MAX);
    rig_new(&r, &config);
    peer_session(&r);
    rig_clients(&r, client, COUNT_OF(client));
    rig_flow(&r)->limit = 4 * LIMIT;
    rig_flow(&r)->pkt_len = VP_PKT_LEN_MAX;
    for (int round = 0; round < 30; round++) {
        for (int i = 0; i < COUNT_OF(client); i++) {
            send(client[i], data, 1 + rnd(sizeof(data)), MSG_NOSIGNAL);
        }
        box_run(r.loop, 10 * MS);
        ck_assert_ptr_null(engine_check(r.drv));
        peer_drain(&r);
    }
    ck_assert_uint_gt(engine_unacked(r.drv), 3 * LIMIT);
    ck_assert_uint_le(engine_unacked(r.drv), 4 * LIMIT + VP_PKT_LEN_MAX);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_ge(info.memory, 4 * VP_STORE_LEN);
    ck_assert_uint_le(info.memory, info.memory_max);
    ck_assert_uint_le(info.memory_max, config.memory);
    for (int i = 0; i < COUNT_OF(client); i++) {
        close(client[i]);
    }
    while (engine_unacked(r.drv) > 0) {
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        box_run(r.loop, 10 * MS);
        peer_drain(&r);
    }
    for (int i = 0; i < 10; i++) {
        box_run(r.loop, SECOND);
        peer_drain(&r);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    vp_channel_info(r.drv, &info);
    ck_assert_uint_le(info.memory, VP_RX_LEN_MAX);
    rig_free(&r);
}
END_TEST

/* ---- how much may be on its way --------------------------------------- */

static void check_flow(const VPFlow *f)
{
    check_that(f->limit <= LIMIT, "limit %u", f->limit);
    check_that(f->limit >= 2 * VP_PKT_LEN_MIN, "limit %u", f->limit);
    check_that(f->pkt_len <= VP_PKT_LEN_MAX, "packets of %u", f->pkt_len);
    check_that(f->pkt_len >= VP_PKT_LEN_MIN, "packets of %u", f->pkt_len);
    check_that(2 * f->pkt_len <= f->limit, "packets of %u, limit %u",
               f->pkt_len, f->limit);
    check_that(f->probing || f->limit >= 2 * f->pkt_len + 100,
               "packets of %u, limit %u, no room for a message", f->pkt_len,
               f->limit);
}

/* Whatever acks come and when, the bounds of the bound hold. */
START_TEST(flow_bounds)
{
    enum { MANY = 64 };
    VPSent sent[MANY];
    unsigned head = 0, tail = 0;
    uint64_t now = 1000000;
    VPFlow f;

    flow_reset(&f, now);
    check_flow(&f);
    for (int i = 0; i < 300000; i++) {
        now += rnd(4) == 0 ? rnd(1u << rnd(24)) : 0;
        if (head - tail < MANY && rnd(2) == 0) {
            flow_sent(&f, &sent[head++ % MANY], rnd(20) == 0, now);
        } else if (head != tail) {
            uint32_t n = 1 + rnd(head - tail);

            tail += n;
            flow_acked(&f, &sent[(tail - 1) % MANY],
                       n * (32 + rnd(1u << rnd(17))), rnd(4) != 0,
                       (uint32_t)rnd(1u << rnd(30)), now);
        }
        f.app_limited = f.delivered + (rnd(10) == 0) * rnd(1u << 20);
        check_flow(&f);
    }
}
END_TEST

/* The bound's bound is twice what was carried in a round trip, or little. */
START_TEST(flow_carries)
{
    VPSent sent = { 0 };
    VPFlow f;

    flow_reset(&f, 1);
    flow_carried(&f, &sent, 8 * LIMIT);
    ck_assert_uint_eq(f.limit_max, LIMIT);
    for (unsigned n = 1; n <= 8; n++) {
        f.delivered += n * LIMIT / 2;
        flow_carried(&f, &sent, 6 * LIMIT);
        ck_assert_uint_eq(f.limit_max, MIN(n, 6) * LIMIT);
        sent.delivered = f.delivered;
    }
    flow_carried(&f, &sent, 8 * LIMIT);
    ck_assert_uint_eq(f.limit_max, 6 * LIMIT);
    flow_carried(&f, &sent, 2 * LIMIT);
    ck_assert_uint_eq(f.limit_max, 2 * LIMIT);
}
END_TEST

static const struct {
    uint32_t rate;     /* bytes per ms */
    uint32_t waiting;  /* bytes that may wait in the channel */
} channels[] = {
    { 11, 3000 },      /* 115200 baud */
    { 200, 8000 },
    { 5000, 150000 },
    { 100000, LIMIT },
};

/*
 * A channel of a given speed, played by the peer: it takes so many bytes in
 * a millisecond, and acks as the engine does.  The channel is kept busy, but
 * little waits in it.
 */
START_TEST(flow_follows_channel)
{
    static uint8_t data[400000];
    uint32_t rate = channels[_i].rate;
    int ms, span = rate < 1000 ? 20000 : 2000, unacked = 0;
    uint32_t out = 0;
    uint64_t taken = 0, room = 0;
    static Rig r;
    VPFlow *f;
    int client[2];

    rig_new(&r, &rig_config);
    peer_session(&r);
    rig_clients(&r, client, 2);
    f = rig_flow(&r);
    for (ms = 0; ms < 2 * span; ms++) {
        VPStore *s = rig_store(&r);
        bool asked = false;

        send(client[0], data, sizeof(data), MSG_NOSIGNAL);
        send(client[1], data, sizeof(data), MSG_NOSIGNAL);
        box_run(r.loop, MS);
        check_flow(f);
        /* it may fall below what is on its way already */
        check_that(s->bytes_out <= MAX(f->limit, VP_PKT_LEN_MAX) ||
                   s->bytes_out <= out, "%u bytes on their way, limit %u",
                   s->bytes_out, f->limit);
        out = s->bytes_out;
        if (ms >= span) {
            check_that(s->bytes_out <= channels[_i].waiting,
                       "%u bytes on their way, after %d ms", s->bytes_out, ms);
        }
        /* what the channel has brought by now */
        room = MIN(room + rate, 4 * VP_PKT_LEN_MAX);
        while (room > VP_PKT_HDR_LEN) {
            uint32_t len;

            if (s->base == s->next || r.peer.expect == s->unsent) {
                break;
            }
            len = store_sent(s, r.peer.expect)->len;
            if (len > room) {
                break;
            }
            room -= len;
            while (peer_next(&r) >= VP_PKT_HELLO) {
            }
            asked |= (r.peer.pkt.flags & VP_FLAG_ACK_NOW) != 0;
            unacked += unacked == 0;
            taken += ms >= span ? len : 0;
        }
        if (asked || (unacked > 0 && unacked++ > 10)) {
            unacked = 0;
            r.peer.time = (uint32_t)box.now;
            r.peer.delay = (uint32_t)box.now - r.peer.pkt.time;
            peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        }
    }
    ck_assert_msg(taken >= (uint64_t)rate * (uint64_t)span * 4 / 5,
                  "%llu bytes in %d ms", (unsigned long long)taken, span);
    close(client[0]);
    close(client[1]);
    rig_free(&r);
}
END_TEST

/*
 * Acks that were held up come all at once: the channel is no faster for that.
 * Here it takes a packet each ms, and acks come after 2 ms, or with the last
 * one's of 20 packets.
 */
START_TEST(flow_held_acks)
{
    enum { LEN = 1000, MANY = 64 };
    VPSent sent[MANY];
    unsigned head = 0, tail = 0;
    uint64_t now = 1000000;
    VPFlow f;

    flow_reset(&f, now);
    flow_rtt(&f, 2 * MS, now);
    while (head < 30000) {
        now += MS;
        flow_sent(&f, &sent[head++ % MANY], false, now);
        while (tail + 2 < head && head % 40 >= 20) {
            flow_acked(&f, &sent[tail++ % MANY], LEN, true, 0, now);
        }
        if (head > 1000) {
            check_that(f.rate > 0.8 && f.rate < 1.25, "rate %f after %u ms",
                       f.rate, head);
        }
    }
}
END_TEST

/* That there is a queue shows before so much was sent that the rate does. */
START_TEST(flow_start)
{
    uint64_t now = 1000000, left = now;
    static VPSent sent[4096];
    unsigned head = 0, tail = 0;
    uint32_t out = 0;
    VPFlow f;

    flow_reset(&f, now);
    flow_rtt(&f, 10 * MS, now); /* a HELLO, at 115200 baud */
    for (int i = 0; i < 100; i++) {
        while (out + VP_PKT_LEN_MIN <= f.limit) {
            flow_sent(&f, &sent[head++], out == 0, now);
            out += VP_PKT_LEN_MIN;
        }
        check_that(out <= VP_LIMIT_START, "%u bytes in flight", out);
        left = MAX(left, sent[tail].sent_at) + 55 * MS + 5 * MS * rnd(2);
        now = MAX(now, left);
        out -= VP_PKT_LEN_MIN;
        flow_acked(&f, &sent[tail], VP_PKT_LEN_MIN, true,
                   (uint32_t)(now - sent[tail].sent_at), now);
        tail++;
    }
    ck_assert(f.full);
    ck_assert_uint_lt(f.limit, 3 * VP_PKT_LEN_MIN);
}
END_TEST

/* What the peer has on its way is part of the bound, if that much is. */
START_TEST(flow_peer_sends)
{
    static const struct {
        uint32_t peer; /* bytes of its packets, for each of ours */
        uint32_t most, least;
    } cases[] = {
        { 0, 4330, 4330 }, { 600, 4430, 4331 }, { 1000, 4830, 4730 },
        { 100000, 4830, 4830 },
    };

    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        VPSent sent[4] = { 0 };
        uint64_t now = 1000000;
        VPFlow f;

        flow_reset(&f, now);
        for (unsigned i = 0; i < 1000; i++) {
            now += MS;
            f.received += cases[c].peer;
            flow_sent(&f, &sent[i % 4], false, now);
            if (i >= 2) {
                flow_acked(&f, &sent[(i - 2) % 4], 500, true, 0, now);
            }
        }
        check_that(f.limit <= cases[c].most && f.limit >= cases[c].least,
                   "limit %u beside %u", f.limit, cases[c].peer);
    }
}
END_TEST

/*
 * What goes out while acks are held up by the peer's packets is added, whatever
 * the difference of the clocks is.  What goes out while packets wait in the own
 * queue isn't; nor is anything once a clock has jumped.
 */
START_TEST(flow_held)
{
    static const struct {
        uint32_t queue, held, jump; /* us */
        double more;                /* us that are added */
    } cases[] = {
        { 0, 0, 0, 0 }, { 0, 20000, 0, 18750 }, { 0, 200000, 0, 187500 },
        { 20000, 0, 0, 0 }, { 20000, 20000, 0, 18750 },
        { 0, 20000, 1000000, 0 },
    };
    enum { MANY = 512 };
    static VPSent sent[MANY];

    for (uint32_t offset = 5; offset != 0; offset *= 0x10000) {
        for (size_t c = 0; c < COUNT_OF(cases); c++) {
            unsigned late = (cases[c].queue + cases[c].held) / MS;
            uint64_t now = 1000000;
            uint32_t before = 0;
            double more;
            VPFlow f;

            flow_reset(&f, now);
            for (unsigned i = 0; i < 4000; i++) {
                unsigned rtt = i < 1000 ? 2 : 2 + late;
                uint32_t delay = i < 1000 ? 0 : cases[c].queue + cases[c].jump;

                now += MS;
                flow_sent(&f, &sent[i % MANY], false, now);
                if (i >= rtt && (i < 1000 || i >= 1000 + late)) {
                    flow_acked(&f, &sent[(i - rtt) % MANY], 500, true,
                               delay - offset, now);
                }
                before = i < 1000 ? f.limit : before;
            }
            more = ((double)f.limit - before) * 2; /* at 0.5 bytes per us */
            check_that(more >= cases[c].more - 20 && more <= cases[c].more + 20,
                       "case %zu: %f us more", c, more);
        }
    }
}
END_TEST

/* Both sides hold back at the same time; nobody has to do it all the time. */
START_TEST(flow_probe_both)
{
    static Rig r;
    VPFlow *f;
    int client, asked = 0;

    rig_new(&r, &rig_config);
    peer_session(&r);
    rig_clients(&r, &client, 1);
    f = rig_flow(&r);
    for (int i = 0; i < 4000; i++) {
        static uint8_t data[3000];
        bool want = i % 100 == 50;
        bool probing = f->probing > 0;

        send(client, data, sizeof(data), MSG_NOSIGNAL);
        box_run(r.loop, 5 * MS);
        while (peer_next(&r) != 0) {
            asked += r.peer.pkt.flags & VP_FLAG_PROBE ? 1 : 0;
            ck_assert(!(r.peer.pkt.flags & VP_FLAG_PROBE) || probing);
        }
        peer_send(&r, VP_PKT_ACK, want ? VP_FLAG_PROBE : 0, 0, NULL, 0);
        /* the peer asks each 0.5 s, and is heard each 5 s */
        if (want) {
            ck_assert(f->probing > 0 || box.now - f->probe_at < 5 * SECOND);
        }
    }
    ck_assert_int_ge(asked, 3);
    ck_assert_int_le(asked, 30);
    close(client);
    rig_free(&r);
}
END_TEST

/* A packet is as long as it may be, if there is that much to send. */
START_TEST(flow_whole_packets)
{
    static uint8_t data[10000];

    for (uint32_t limit = 2 * VP_PKT_LEN_MIN; limit < 4000; limit += 37) {
        static Rig r;
        uint32_t packets = 0;
        int client;

        rig_new(&r, &rig_config);
        peer_session(&r);
        rig_clients(&r, &client, 1);
        peer_drain(&r);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        rig_flow(&r)->limit = limit;
        rig_flow(&r)->pkt_len = VP_PKT_LEN_MIN;
        fd_write(client, data, sizeof(data));
        box_settle(r.loop);
        while (peer_next(&r) != 0) {
            ck_assert_uint_eq(r.peer.pkt.bytes,
                              VP_PKT_LEN_MIN - VP_PKT_HDR_LEN);
            packets++;
        }
        ck_assert_uint_eq(packets, limit / VP_PKT_LEN_MIN);
        close(client);
        rig_free(&r);
    }
}
END_TEST

/* A few acks per bound in flight are asked for, whatever the packets are. */
START_TEST(flow_marks)
{
    VPFlow f;

    flow_reset(&f, 1);
    for (uint32_t len = 33; len <= 2048; len += 31) {
        uint32_t since = 0, most = 0;

        for (int i = 0; i < 1000; i++) {
            since = flow_mark(&f, len, 1) == VP_FLAG_ACK_NOW ? 0 : since + len;
            most = MAX(most, since);
        }
        ck_assert_uint_lt(most, f.limit / 4);
        ck_assert_uint_gt(most + len, f.limit / 4 - 2);
    }
}
END_TEST

#define BULK 5 /* connections that send more than the channel carries */

/* run_fast() - @ms on a channel that carries eight packets in each */
static void run_fast(Rig *r, const int *client, bool sparse, int ms)
{
    static uint8_t data[400000];

    while (ms-- > 0) {
        for (int i = 0; i < BULK; i++) {
            send(client[i], data, sizeof(data), MSG_NOSIGNAL);
        }
        if (sparse) {
            send(client[BULK], data, 64, MSG_NOSIGNAL);
        }
        box_run(r->loop, MS);
        for (int i = 0; i < 8 && peer_next(r) != 0; i++) {
        }
        r->peer.delay = (uint32_t)box.now - r->peer.pkt.time;
        peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
}

/* fast_begin() - BULK busy connections, and one that sends little */
static void fast_begin(Rig *r, int client[BULK + 1])
{
    rig_new(r, &rig_config);
    peer_session(r);
    rig_clients(r, client, BULK + 1);
}

/* fast_mixed() - have them send for 100 ms, and take all that came of it */
static void fast_mixed(Rig *r, int client[BULK + 1], bool sparse)
{
    fast_begin(r, client);
    run_fast(r, client, sparse, 100);
    while (peer_next(r) != 0) {
    }
}

/* fast_pass() - ack all; what a pass fills then stays in the store */
static void fast_pass(Rig *r)
{
    box.write_fd = engine_link(r->drv).wfd;
    box.write_left = 1;
    peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
}

static void fast_end(Rig *r, const int client[BULK + 1])
{
    box.write_fd = 0;
    for (int i = 0; i <= BULK; i++) {
        close(client[i]);
    }
    rig_free(r);
}

/*
 * While a connection sends a little now and then beside busy ones, less is on
 * its way; these alone aren't held back.
 */
START_TEST(flow_mixed_traffic)
{
    static Rig r;
    const VPFlow *f;
    int client[BULK + 1];

    fast_begin(&r, client);
    f = rig_flow(&r);
    for (int round = 0; round < 3; round++) {
        run_fast(&r, client, false, 100);
        ck_assert_uint_gt(f->limit, VP_LIMIT_MIXED);
        ck_assert_uint_le(f->limit, VP_LIMIT_NEAR);
        ck_assert_uint_eq(f->pkt_len, VP_PKT_LEN_MAX);
        run_fast(&r, client, true, 20);
        ck_assert_uint_le(f->limit, VP_LIMIT_MIXED);
        ck_assert_uint_eq(f->pkt_len, VP_PKT_LEN_MIXED);
    }
    fast_end(&r, client);
}
END_TEST

/* A message goes out though busy ones have all on its way that may be. */
START_TEST(flow_message)
{
    static Rig r;
    int client[BULK + 1];

    fast_mixed(&r, client, _i == 1);
    ck_assert_uint_lt(rig_flow(&r)->limit - rig_store(&r)->bytes,
                      VP_PKT_LEN_MAX);
    fd_write(client[BULK], "message", 7);
    ck_assert_int_eq(peer_next(&r), VP_PKT_CLIENT);
    ck_assert_uint_eq(r.peer.pkt.bytes, 7);
    fast_end(&r, client);
}
END_TEST

/* A pass is short meanwhile: one packet of a busy one. */
START_TEST(flow_mixed_pass)
{
    static Rig r;
    int client[BULK + 1];

    fast_mixed(&r, client, true);
    fast_pass(&r);
    ck_assert_uint_eq(rig_store(&r)->bytes, VP_PKT_LEN_MIXED);
    fast_end(&r, client);
}
END_TEST

/* A message goes out before bulk is read, which takes its time. */
START_TEST(flow_message_first)
{
    static Rig r;
    int client[BULK + 1];

    fast_mixed(&r, client, true);
    fd_write(client[BULK], "message", 7);
    fast_pass(&r);
    ck_assert_uint_eq(rig_store(&r)->bytes, VP_PKT_HDR_LEN + 7);
    fast_end(&r, client);
}
END_TEST

/* Who only types knows the round-trip time all the same. */
START_TEST(flow_typing)
{
    static Rig r;
    int client, asked = 0;

    rig_new(&r, &rig_config);
    peer_session(&r);
    client = rig_client(&r, "svc");
    box_settle(r.loop);
    peer_drain(&r);
    box_run(r.loop, 2 * SECOND);
    for (int i = 0; i < 30; i++) {
        fd_write(client, "x", 1);
        box_run(r.loop, 100 * MS);
        ck_assert_int_eq(peer_drain(&r), VP_PKT_CLIENT);
        asked += r.peer.pkt.flags & VP_FLAG_ACK_NOW ? 1 : 0;
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    ck_assert_int_eq(asked, 3); /* once a second */
    ck_assert_uint_gt(rig_flow(&r)->srtt, 0);
    ck_assert(!rig_flow(&r)->filled);
    check_flow(rig_flow(&r));
    close(client);
    rig_free(&r);
}
END_TEST

START_TEST(flow_sendable)
{
    VPLink l = { .flow.limit = 1000 };

    ck_assert(link_sendable(&l, 0, 5000)); /* else nothing would ever go */
    ck_assert(link_sendable(&l, 900, 100));
    ck_assert(!link_sendable(&l, 901, 100));
    ck_assert(!link_sendable(&l, 1, 5000));
    l.store.bytes = 400;
    ck_assert_uint_eq(link_room(&l), 600);
    l.store.bytes = 1001;
    ck_assert_uint_eq(link_room(&l), 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("store");

    SUITE_LOOP(s, ring, COUNT_OF(ring_sizes) * COUNT_OF(ring_limits));
    SUITE_ADD(s, ring_full);
    SUITE_LOOP(s, ring_grows, 3);
    SUITE_ADD(s, ring_small);
    SUITE_ADD(s, ring_digest);
    SUITE_ADD(s, ring_rewind);
    SUITE_ADD(s, ring_bytes_out);
    SUITE_ADD(s, ring_flags);
    SUITE_ADD(s, ring_no_memory);
    SUITE_LOOP(s, store_packets_bound, 3);
    SUITE_ADD(s, store_bytes_bound);
    SUITE_ADD(s, store_long_way);
    SUITE_ADD(s, flow_bounds);
    SUITE_ADD(s, flow_carries);
    SUITE_ROWS(s, flow_follows_channel, channels);
    SUITE_ADD(s, flow_held_acks);
    SUITE_ADD(s, flow_start);
    SUITE_ADD(s, flow_peer_sends);
    SUITE_ADD(s, flow_held);
    SUITE_ADD(s, flow_probe_both);
    SUITE_ADD(s, flow_whole_packets);
    SUITE_ADD(s, flow_marks);
    SUITE_ADD(s, flow_mixed_traffic);
    SUITE_LOOP(s, flow_message, 2);
    SUITE_ADD(s, flow_message_first);
    SUITE_ADD(s, flow_mixed_pass);
    SUITE_ADD(s, flow_typing);
    SUITE_ADD(s, flow_sendable);
    return suite_run(s);
}
