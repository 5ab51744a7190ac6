/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c - see engine.h
 */
#ifndef ENGINE_C
#define ENGINE_C

#include <stdio.h>

#include "virtproxy.c"
#include "tests/lib/engine.h"
#include "tests/lib/log.h"

VPLogLevel engine_log_level = VP_LOG_INFO;

VPLoop *engine_loop_new(void)
{
    return vp_loop_new(log_line, &engine_log_level);
}

/* ---- the link ----------------------------------------------------------- */

EngineLink engine_link(const VPDriver *drv)
{
    const VPLink *l = &drv->link;
    VPChannelInfo info;

    vp_channel_info(drv, &info);
    return (EngineLink){
        .state = info.state,
        .away = l->state == LINK_AWAY,
        .heard = l->heard,
        .confirmed = l->peer != PEER_UNSURE,
        .rfd = l->rfd,
        .wfd = l->wfd,
        .token = { l->hello.token, l->peer_token },
        .epoch = { l->epoch[0], l->epoch[1] },
        .rx_key = &l->rx_key,
        .rx_payload_key = &l->rx_payload_key,
        .asked_at = l->asked_at,
        .penalty_until = l->penalty_until,
        .base = l->store.base,
        .unsent = l->store.unsent,
        .unsent_off = l->store.unsent_off,
        .next = l->store.next,
        .expect = l->rx_expect,
        .rx_digest = l->rx_digest,
        .stores = l->store.ring != NULL,
        .rx_cap = l->rx_cap,
        .ctl_len = l->ctl_len,
        .resyncs = info.resyncs,
    };
}

void engine_set_instance(VPDriver *drv, uint64_t instance)
{
    drv->link.instance = instance;
}

bool engine_keys_fit(const VPDriver *a, const VPDriver *b)
{
    const VPLink *l = &a->link, *m = &b->link;

    return memcmp(&l->tx_key, &m->rx_key, sizeof(l->tx_key)) == 0 &&
           memcmp(&l->rx_key, &m->tx_key, sizeof(l->rx_key)) == 0 &&
           memcmp(&l->tx_payload_key, &m->rx_payload_key,
                  sizeof(l->tx_payload_key)) == 0 &&
           memcmp(&l->rx_payload_key, &m->tx_payload_key,
                  sizeof(l->rx_payload_key)) == 0;
}

bool engine_up(const VPDriver *drv)
{
    return drv->link.state == LINK_UP;
}

bool engine_has_session(const VPDriver *drv)
{
    return link_has_session(&drv->link);
}

unsigned engine_work(const VPDriver *drv)
{
    return drv->link.task->work;
}

uint32_t engine_unacked(const VPDriver *drv)
{
    return drv->link.store.bytes;
}

uint64_t engine_digest(VPDriver *drv, uint32_t seq)
{
    return store_digest(&drv->link.store, seq);
}

void engine_greet(VPDriver *drv, uint64_t ours, uint64_t theirs)
{
    static const VPHello hello = { .flags = VP_HELLO_UP };
    VPLink *l = &drv->link;

    l->hello.token = ours;
    if (theirs != 0) {
        l->peer_token = theirs;
        link_begin(l, ours, theirs);
        link_up(l, &hello, false);
    }
}

bool engine_take(VPDriver *drv, const uint8_t *data, size_t len)
{
    VPLink *l = &drv->link;

    if (l->rx == NULL && !link_rx_grow(l)) {
        return false;
    }
    if (l->rx_cap - l->rx_len < len) {
        return false;
    }
    memcpy(l->rx + l->rx_len, data, len);
    l->rx_len += len;
    do { /* as many passes as it takes: each does only so much work */
        l->task->work = l->rx_work = 0;
        link_process(l);
    } while (l->rx_more);
    return true;
}

void engine_forget(VPDriver *drv)
{
    link_forget(&drv->link);
}

void engine_unblock(VPDriver *drv)
{
    drv->link.blocked = false;
}

void engine_set_limit(VPDriver *drv, uint32_t limit, uint32_t pkt_len)
{
    drv->link.flow.limit = limit;
    drv->link.flow.pkt_len = pkt_len;
}

void engine_hold(VPDriver *drv)
{
    drv->link.flow.limit = 0;
}

void engine_reset_flow(VPDriver *drv)
{
    flow_reset(&drv->link.flow, vp_loop_now(drv->loop));
}

void engine_set_rtt(VPDriver *drv, uint64_t rtt)
{
    drv->link.flow.srtt = rtt;
}

void engine_set_trip(VPDriver *drv, uint64_t trip)
{
    drv->link.flow.min_rtt = trip;
    drv->link.flow.min_rtt_at = vp_loop_now(drv->loop);
}

/* ---- connections -------------------------------------------------------- */

/* conns_next() - the next one after @node, which is the ring or in it */
static VPConn *conns_next(const VPConns *cs, const VPNode *node)
{
    return node->next == &cs->all ? NULL
                                  : container_of(node->next, VPConn, all);
}

#define for_each_conn(c, drv)                                               \
    for (VPConn *c = conns_next(&(drv)->conns, &(drv)->conns.all);          \
         c != NULL; c = conns_next(&(drv)->conns, &c->all))

EngineConn engine_conn(VPDriver *drv, uint32_t id, bool client)
{
    const VPConn *c = conn_find(&drv->conns, id, client);

    if (c == NULL) {
        return (EngineConn){ .in = "", .out = "" };
    }
    return (EngineConn){
        .there = true,
        .which = c,
        .in = in_name[c->in],
        .out = out_name[c->out],
        .announced = conn_known(c),
        .fd = c->fd,
        .window = c->window,
        .buf_len = c->buf_len,
        .buf_cap = c->buf_cap,
        .tx_count = c->tx_count,
        .tx_limit = c->tx_limit,
        .rx_count = c->rx_count,
        .rx_taken = c->rx_taken,
        .rx_limit = c->rx_limit,
    };
}

bool engine_has_conn(VPDriver *drv, uint32_t id, bool client)
{
    return conn_find(&drv->conns, id, client) != NULL;
}

static void conn_shift(VPConn *c, uint64_t rx, uint64_t tx)
{
    c->rx_count += rx;
    c->rx_taken += rx;
    c->rx_limit += rx;
    c->tx_count += tx;
    c->tx_limit += tx;
}

void engine_shift_conn(VPDriver *drv, uint32_t id, bool client, uint64_t rx,
                       uint64_t tx)
{
    conn_shift(conn_find(&drv->conns, id, client), rx, tx);
}

void engine_accept(VPDriver *drv, const char *service, int fd)
{
    VPOForward f = { .fwds = &drv->forwards, .account = &drv->conns.rest };
    VPAddr addr = { .len = sizeof(addr.ss) };

    snprintf(f.service_id, sizeof(f.service_id), "%s", service);
    getpeername(fd, (struct sockaddr *)&addr.ss, &addr.len);
    oforward_accepted(&f, fd, &addr);
}

/* ---- a driver as a whole ------------------------------------------------ */

/* candidates() - how many there are; @newest: the one that came last */
static size_t candidates(const VPDriver *drv, const VPCandidate **newest)
{
    size_t n = 0;

    *newest = &drv->candidates[0];
    for (int i = 0; i < VP_CANDIDATES; i++) {
        const VPCandidate *k = &drv->candidates[i];

        n += k->fd >= 0;
        *newest = k->number > (*newest)->number ? k : *newest;
    }
    return n;
}

/* fds_of() - descriptors of the channel, listeners and connections */
static size_t fds_of(const VPDriver *drv)
{
    const VPCandidate *newest;
    const VPLink *l = &drv->link;
    size_t n = (size_t)(l->rfd >= 0) + (l->wfd != l->rfd) +
               candidates(drv, &newest);
    const VPNode *ring = &drv->forwards.oforwards;

    for (VPNode *node = ring->next; node != ring; node = node->next) {
        n++;
    }
    for (VPNode *node = drv->forwards.dials.next;
         node != &drv->forwards.dials; node = node->next) {
        const VPDial *d = container_of(node, VPDial, node);

        for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
            n += d->dialer.attempts[i].fd >= 0;
        }
    }
    for_each_conn (c, drv) {
        n += c->fd >= 0;
    }
    return n;
}

EngineCounts engine_counts(const VPDriver *drv)
{
    const VPConns *cs = &drv->conns;
    const VPCandidate *newest;
    size_t waiting = candidates(drv, &newest);

    return (EngineCounts){
        .conns = conns_held(cs),
        .clients = conns_count(cs, true, LIFE_NEW, LIFE_FREE),
        .open = conns_count(cs, false, LIFE_OPEN, LIFE_ENDING),
        .announced = conns_count(cs, true, LIFE_OPEN, LIFE_CLOSING),
        .connecting = drv->forwards.ndials,
        .turns = cs->sched.nturns,
        .listed = node_linked(&cs->sched.fresh) ||
                  node_linked(&cs->sched.turns) || node_linked(&cs->due) ||
                  node_linked(&cs->dead) || node_linked(&cs->ending) ||
                  node_linked(&drv->forwards.dials),
        .listens = node_linked(&drv->forwards.oforwards),
        .candidate = waiting > 0,
        .candidate_token = newest->token,
        .fds = fds_of(drv),
        .grown = cs->window_grown,
        .next_id = cs->next_id,
    };
}

void engine_set_next_id(VPDriver *drv, uint32_t id)
{
    drv->conns.next_id = id;
}

size_t engine_conns(const VPDriver *drv)
{
    return conns_held(&drv->conns);
}

static const char *store_check(VPStore *s)
{
    uint32_t bytes = 0, out = 0, seq;

    if (s->next - s->base > store_pkts(s)) {
        return "the send store holds too many packets";
    }
    if (seq_diff(s->unsent, s->base) < 0 || seq_diff(s->next, s->unsent) < 0) {
        return "the send store's sequence numbers are out of order";
    }
    for (seq = s->base; seq != s->next; seq++) {
        VPSent *sent = store_sent(s, seq);

        if (sent->off + sent->len > s->len ||
            sent->len != VP_PKT_HDR_LEN + (uint32_t)sent->pkt.bytes) {
            return "a packet lies outside of the send store";
        }
        bytes += sent->len;
        out += seq_diff(s->unsent, seq) > 0 ? sent->len : 0;
        if (seq == s->unsent && s->unsent_off > 0) {
            out += sent->len;
        }
    }
    if (bytes != s->bytes || bytes > s->len) {
        return "the send store's bytes are miscounted";
    }
    return out == s->bytes_out ? NULL : "the bytes in flight are miscounted";
}

const char *engine_check(VPDriver *drv)
{
    const VPConns *cs = &drv->conns;
    size_t count[2][LIVES] = { 0 }, dials = 0;
    uint32_t grown = 0;

    for_each_conn (c, drv) {
        count[c->client][c->life]++;
        dials += c->dial != NULL;
        grown += c->window - VP_WINDOW_INIT;
        if (c->buf_len > c->window || c->buf_len > c->buf_cap) {
            return "a connection's buffer is larger than its window";
        }
        if (c->rx_taken + c->buf_len > c->rx_count) {
            return "a connection's bytes are miscounted";
        }
        if (c->rx_count > c->rx_limit || c->tx_count > c->tx_limit) {
            return "more bytes than credit";
        }
        if (conn_over(c) && (c->buf != NULL || c->dial != NULL)) {
            return "a connection that is over holds what it needed";
        }
        if (c->life == LIFE_CLOSING && c->fd >= 0) {
            return "a connection that was closed holds a descriptor";
        }
        if (c->buf_cap > c->window ||
            (c->rx_count - c->rx_taken > c->window && !conn_over(c))) {
            return "a connection holds more than its window";
        }
    }
    if (memcmp(count, cs->count, sizeof(count)) != 0 ||
        dials != drv->forwards.ndials) {
        return "connections are miscounted";
    }
    if (grown != cs->window_grown || grown > cs->window_budget) {
        return "the windows' budget is miscounted";
    }
    if (drv->forwards.offer.n > drv->forwards.offer.cap ||
        drv->forwards.offer.cap > VP_OFFER_MAX) {
        return "more of the peer's services than may be kept";
    }
    if (drv->link.rx_cap > VP_RX_LEN_MAX) {
        return "the receive buffer is too large";
    }
    return store_check(&drv->link.store);
}

bool engine_quiet(const VPDriver *drv)
{
    const VPLink *l = &drv->link;

    for_each_conn (c, drv) {
        if (c->due != 0 || c->life == LIFE_FREE) {
            return false;
        }
    }
    return l->state == LINK_UP && l->store.bytes == 0 && l->rx_len == 0 &&
           l->ctl_len == 0 && l->due == 0 && !l->ack_asked;
}

/* shift_packets() - let the next sequence number be @seq */
static void shift_packets(VPDriver *from, VPDriver *to, uint32_t seq)
{
    VPStore *s = &from->link.store;

    s->base = s->unsent = s->next = seq;
    to->link.rx_expect = seq;
}

void engine_shift(VPDriver *a, VPDriver *b, uint32_t seq, uint64_t bytes)
{
    VPDriver *both[] = { a, b };

    for (int i = 0; i < 2; i++) {
        VPDriver *drv = both[i];

        shift_packets(drv, both[!i], seq);
        /* the oldest connection's id comes next: it's in use */
        drv->conns.next_id = container_of(drv->conns.all.next, VPConn, all)->id;
        for_each_conn (c, drv) {
            conn_shift(c, bytes, bytes);
        }
    }
}

void engine_dump(const VPDriver *drv)
{
    const VPLink *l = &drv->link;

    fprintf(stderr, "  link %s, fd %d%s%s, store %u..%u..%u (%u bytes, %u "
            "out, limit %u), expects %u, %zu bytes unread\n",
            engine_link(drv).state, l->rfd,
            l->state == LINK_AWAY ? ", away" : "",
            l->blocked ? ", blocked" : "", l->store.base, l->store.unsent,
            l->store.next, l->store.bytes, l->store.bytes_out, l->flow.limit,
            l->rx_expect, l->rx_len);
    for_each_conn (c, drv) {
        fprintf(stderr, "  connection %u %s of %s: in %s, out %s, due %#x, "
                "fd %d, %s%s, sent %llu of %llu, got %llu, taken %llu of "
                "%llu\n", c->id, c->client ? "client" : "server",
                c->service_id, in_name[c->in], out_name[c->out], c->due, c->fd,
                life_name[c->life], c->blocked ? ", blocked" : "",
                (unsigned long long)c->tx_count,
                (unsigned long long)c->tx_limit,
                (unsigned long long)c->rx_count,
                (unsigned long long)c->rx_taken,
                (unsigned long long)c->rx_limit);
    }
}

size_t engine_watched(const VPLoop *loop)
{
    return loop->nwatched;
}

bool engine_loop_empty(const VPLoop *loop)
{
    return loop->nfds == 0 && loop->nwatched == 0 && loop->timers == NULL;
}

size_t engine_hello(uint8_t *buf, unsigned newer)
{
    VPHello hello = {
        .version = (uint16_t)(VP_VERSION + newer),
        .oldest = (uint16_t)(VP_VERSION_OLDEST + newer),
        .window = 65536,
        .token = 0x1122334455667788,
        .next = VP_SEQ_FIRST,
        .base = VP_SEQ_FIRST,
        .expect = VP_SEQ_FIRST,
    };

    return wire_put_hello(buf, &hello, NULL);
}

#endif
