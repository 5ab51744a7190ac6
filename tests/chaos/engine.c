/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c - the engine, with the simulated machine's system calls
 *
 * While no simulated machine runs, the replacements make the real calls, so
 * the same object also serves in processes of its own.
 */
#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <netdb.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"

#define clock_gettime(clock, ts) sim_clock_gettime(clock, ts)
#define getpid() sim_getpid()
#define malloc(size) sim_malloc(size)
#define calloc(n, size) sim_calloc(n, size)
#define realloc(p, size) sim_realloc(p, size)
#define free(p) sim_free(p)
#define malloc_trim(pad) ((void)(pad)) /* slow, and nothing to look at */
/* only random64() opens anything: its counter belongs to a machine, too */
static unsigned long long *draws;
#define open(path, flags) \
    (draws = (void *)&counter, sim_open(path, flags))
#define close(fd) sim_close(fd)
#define read(fd, buf, len) sim_read(fd, buf, len)
#define readv(fd, iov, n) sim_readv(fd, iov, n)
#define write(fd, buf, len) sim_write(fd, buf, len)
#define writev(fd, iov, n) sim_writev(fd, iov, n)
#define shutdown(fd, how) sim_shutdown(fd, how)
#define fcntl(...) sim_fcntl(__VA_ARGS__)
#define socket(family, type, protocol) sim_socket(family, type, protocol)
#define accept(fd, addr, len) sim_accept(fd, addr, len)
#define connect(fd, addr, len) sim_connect(fd, addr, len)
#define setsockopt(fd, level, name, value, len) \
    sim_setsockopt(fd, level, name, value, len)
#define getsockopt(fd, level, name, value, len) \
    sim_getsockopt(fd, level, name, value, len)
#define getsockname(fd, addr, len) sim_getsockname(fd, addr, len)
#define getpeername(fd, addr, len) sim_getsockname(fd, addr, len)
#define poll(fds, n, timeout) sim_poll(fds, n, timeout)
#define select(n, r, w, e, timeout) sim_select(n, r, w, e, timeout)

#include "virtproxy.c"

#include "sim.h"

size_t engine_conns(const VPDriver *drv)
{
    return drv->nconns;
}

bool engine_up(const VPDriver *drv)
{
    return drv->link.state == LINK_UP;
}

bool engine_has_session(const VPDriver *drv)
{
    return drv->link.epoch[0] != 0;
}

uint32_t engine_unacked(const VPDriver *drv)
{
    return drv->link.store.bytes;
}

static const char *store_check(VPStore *s)
{
    uint32_t bytes = 0, out = 0, seq;

    if (s->next - s->base > VP_STORE_PKTS) {
        return "the send store holds too many packets";
    }
    if (seq_diff(s->unsent, s->base) < 0 || seq_diff(s->next, s->unsent) < 0) {
        return "the send store's sequence numbers are out of order";
    }
    for (seq = s->base; seq != s->next; seq++) {
        VPSent *sent = store_sent(s, seq);

        if (sent->off + sent->len > VP_STORE_LEN ||
            sent->len != VP_PKT_HDR_LEN + (uint32_t)sent->pkt.bytes) {
            return "a packet lies outside of the send store";
        }
        bytes += sent->len;
        out += seq_diff(s->unsent, seq) > 0 ? sent->len : 0;
        if (seq == s->unsent && s->unsent_off > 0) {
            out += sent->len;
        }
    }
    if (bytes != s->bytes || bytes > VP_STORE_LEN) {
        return "the send store's bytes are miscounted";
    }
    return out == s->bytes_out ? NULL : "the bytes in flight are miscounted";
}

const char *engine_check(VPDriver *drv)
{
    size_t announced = 0, open = 0, n = 0;
    uint32_t grown = 0;

    for (VPNode *node = drv->conns.next; node != &drv->conns;
         node = node->next) {
        VPConn *c = container_of(node, VPConn, all);

        n++;
        announced += c->client && c->announced;
        open += !c->client && !c->gone;
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
        if (c->gone && c->fd >= 0) {
            return "a connection that is gone holds a descriptor";
        }
    }
    if (n != drv->nconns || announced != drv->nannounced ||
        open != drv->nopen) {
        return "connections are miscounted";
    }
    if (grown != drv->window_grown || grown > VP_WINDOW_BUDGET) {
        return "the windows' budget is miscounted";
    }
    if (drv->link.rx_cap > VP_RX_LEN_MAX) {
        return "the receive buffer is too large";
    }
    return store_check(&drv->link.store);
}

void engine_draws(uint64_t n)
{
    _Static_assert(sizeof(*draws) == sizeof(n), "what counter is");
    *draws = n;
}

bool engine_quiet(const VPDriver *drv)
{
    const VPLink *l = &drv->link;

    for (VPNode *n = drv->conns.next; n != &drv->conns; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);

        if (c->due != 0 || c->dead) {
            return false;
        }
    }
    return l->state == LINK_UP && l->store.bytes == 0 && l->rx_len == 0 &&
           l->ctl_len == 0 && !l->need_hello && !l->need_ping && !l->ack_now;
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
        drv->next_id = container_of(drv->conns.next, VPConn, all)->id;
        for (VPNode *n = drv->conns.next; n != &drv->conns; n = n->next) {
            VPConn *c = container_of(n, VPConn, all);

            c->tx_count += bytes;
            c->tx_limit += bytes;
            c->rx_count += bytes;
            c->rx_taken += bytes;
            c->rx_limit += bytes;
        }
    }
}

void engine_dump(const VPDriver *drv)
{
    static const char *const state[] = { "down", "hello", "up" };
    const VPLink *l = &drv->link;

    fprintf(stderr, "  link %s, fd %d%s%s, store %u..%u..%u (%u bytes, %u "
            "out, limit %u), expects %u, %zu bytes unread\n",
            state[l->state], l->rfd, l->away ? ", away" : "",
            l->blocked ? ", blocked" : "", l->store.base, l->store.unsent,
            l->store.next, l->store.bytes, l->store.bytes_out, l->flow.limit,
            l->rx_expect, l->rx_len);
    for (VPNode *n = drv->conns.next; n != &drv->conns; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);

        fprintf(stderr, "  connection %u %s of %s: in %s, out %s, due %#x, "
                "fd %d%s%s%s, sent %llu of %llu, got %llu, taken %llu of "
                "%llu\n", c->id, c->client ? "client" : "server",
                c->service_id, in_name[c->in], out_name[c->out], c->due, c->fd,
                c->announced ? ", announced" : "", c->gone ? ", gone" : "",
                c->blocked ? ", blocked" : "",
                (unsigned long long)c->tx_count,
                (unsigned long long)c->tx_limit,
                (unsigned long long)c->rx_count,
                (unsigned long long)c->rx_taken,
                (unsigned long long)c->rx_limit);
    }
}
