/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * traffic.c - see traffic.h
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "traffic.h"

#define CHUNK 65536
#define CHUNKS 4                /* a side sends or gets that many per turn */

static const unsigned char magic[4] = { 'f', 'l', 'o', 'w' };

void traffic_init(Traffic *t)
{
    memset(t, 0, sizeof(*t));
}

void traffic_free(Traffic *t)
{
    for (size_t i = 0; i < t->n_flows; i++) {
        for (int s = 0; s < 2; s++) {
            if (t->flows[i].side[s].fd >= 0) {
                close(t->flows[i].side[s].fd);
            }
        }
    }
    for (size_t i = 0; i < t->n_orphans; i++) {
        close(t->orphans[i].fd);
    }
    for (size_t i = 0; i < t->n_listeners; i++) {
        close(t->listeners[i]);
    }
    free(t->flows);
    free(t->orphans);
    free(t->pfds);
    traffic_init(t);
}

const char *traffic_listen(Traffic *t)
{
    size_t i = t->n_listeners++;

    ck_assert(i < sizeof(t->listeners) / sizeof(t->listeners[0]));
    t->listeners[i] = listen_any(t->where[i]);
    set_nonblocking(t->listeners[i]);
    return t->where[i];
}

/* grow() - room for one more element; arrays double */
static void *grow(void *array, size_t n, size_t size)
{
    if ((n & (n - 1)) == 0) {
        array = realloc(array, (n ? 2 * n : 1) * size);
        ck_assert_ptr_nonnull(array);
    }
    return array;
}

Flow *traffic_add(Traffic *t, const char *where, size_t listener, uint64_t up,
                  uint64_t down)
{
    Flow *f;

    t->flows = grow(t->flows, t->n_flows, sizeof(*t->flows));
    f = &t->flows[t->n_flows];
    memset(f, 0, sizeof(*f));
    f->listener = listener;
    for (int s = 0; s < 2; s++) {
        f->side[s].fd = -1;
        f->side[s].stream = t->n_flows * 2 + (size_t)s;
        f->side[s].to_send = s ? down : up;
    }
    f->side[0].fd = dial(where, false);
    t->n_flows++;
    return f;
}

static void side_error(Side *s, int error)
{
    s->error = error;
    close(s->fd);
    s->fd = -1;
}

static void side_close_if_over(Side *s)
{
    if (s->fd >= 0 && s->shut && s->eof) {
        close(s->fd);
        s->fd = -1;
    }
}

/* head_send() - the client says which flow it is */
static void head_send(Flow *f, size_t index)
{
    unsigned char head[HEAD_LEN];
    Side *s = &f->side[0];
    ssize_t n;

    memcpy(head, magic, 4);
    for (int i = 0; i < 4; i++) {
        head[4 + i] = (unsigned char)(index >> (24 - 8 * i));
    }
    n = send(s->fd, head + f->head_sent, HEAD_LEN - f->head_sent,
             MSG_NOSIGNAL);
    if (n > 0) {
        f->head_sent += (size_t)n;
    } else if (errno != EAGAIN) {
        side_error(s, errno);
    }
}

static void side_send(const Traffic *t, Side *s)
{
    static unsigned char buf[CHUNK];

    for (int i = 0; i < CHUNKS && s->fd >= 0 && s->sent < s->to_send; i++) {
        uint64_t left = s->to_send - s->sent;
        size_t len = left < CHUNK ? (size_t)left : CHUNK;
        ssize_t n;

        bytes_fill(buf, len, s->stream, s->sent);
        n = send(s->fd, buf, len, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) {
                side_error(s, errno);
            }
            return;
        }
        s->sent += (size_t)n;
    }
    if (s->fd >= 0 && s->sent == s->to_send && !s->shut && !t->hold) {
        s->shut = true;
        if (shutdown(s->fd, SHUT_WR) < 0) {
            side_error(s, errno);
        }
        side_close_if_over(s);
    }
}

static void side_recv(Side *s, const Side *from, size_t index)
{
    static unsigned char buf[CHUNK];

    for (int i = 0; i < CHUNKS && s->fd >= 0 && !s->eof; i++) {
        ssize_t n = recv(s->fd, buf, sizeof(buf), 0);
        size_t right;

        if (n < 0) {
            if (errno != EAGAIN) {
                side_error(s, errno);
            }
            return;
        }
        if (n == 0) {
            s->eof = true;
            ck_assert_msg(from->shut && s->got == from->to_send,
                          "flow %zu, side %d: end of data after %llu bytes of "
                          "%llu", index, s < from ? 0 : 1,
                          (unsigned long long)s->got,
                          (unsigned long long)from->to_send);
            side_close_if_over(s);
            return;
        }
        right = bytes_right(buf, (size_t)n, from->stream, s->got);
        ck_assert_msg(right == (size_t)n,
                      "flow %zu, side %d: wrong byte at %llu", index,
                      s < from ? 0 : 1,
                      (unsigned long long)(s->got + right));
        s->got += (size_t)n;
        ck_assert_msg(s->got <= from->sent, "flow %zu: more than was sent",
                      index);
    }
}

static void orphan_drop(Traffic *t, size_t i)
{
    t->orphans[i] = t->orphans[--t->n_orphans];
}

static void listener_accept(Traffic *t, size_t listener)
{
    int fd;

    while ((fd = accept(t->listeners[listener], NULL, NULL)) >= 0) {
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        set_nonblocking(fd);
        t->orphans = grow(t->orphans, t->n_orphans, sizeof(*t->orphans));
        t->orphans[t->n_orphans++] = (Orphan) { .fd = fd,
                                                .listener = listener };
    }
    ck_assert_msg(errno == EAGAIN || errno == ECONNABORTED, "accept: %s",
                  strerror(errno));
}

static void orphan_recv(Traffic *t, size_t i)
{
    Orphan *o = &t->orphans[i];
    ssize_t n = recv(o->fd, o->head + o->got, HEAD_LEN - o->got, 0);
    size_t index = 0;
    Flow *f;

    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) {
            close(o->fd);
            orphan_drop(t, i);
        }
        return;
    }
    o->got += (size_t)n;
    if (o->got < HEAD_LEN) {
        return;
    }
    for (int k = 4; k < HEAD_LEN; k++) {
        index = index << 8 | o->head[k];
    }
    ck_assert_msg(memcmp(o->head, magic, 4) == 0 && index < t->n_flows,
                  "a connection's first bytes are wrong");
    f = &t->flows[index];
    ck_assert_msg(!f->paired, "flow %zu arrived twice", index);
    ck_assert_msg(f->listener == o->listener, "flow %zu: wrong server", index);
    f->side[1].fd = o->fd;
    f->paired = true;
    orphan_drop(t, i);
}

static short side_interest(const Traffic *t, const Flow *f, const Side *s)
{
    short events = 0;

    if (!s->eof && !s->deaf) {
        events = POLLIN;
    }
    if (s->sent < s->to_send || (!s->shut && !t->hold) ||
        (s == &f->side[0] && f->head_sent < HEAD_LEN)) {
        events |= POLLOUT;
    }
    return events;
}

static void pfd_add(Traffic *t, int fd, short events)
{
    t->pfds = grow(t->pfds, t->n_pfds, sizeof(*t->pfds));
    t->pfds[t->n_pfds++] = (struct pollfd) { .fd = events ? fd : -1,
                                             .events = events };
}

static void traffic_turn(Traffic *t)
{
    size_t n_orphans = t->n_orphans;
    const struct pollfd *p;

    t->n_pfds = 0;
    for (size_t i = 0; i < t->n_listeners; i++) {
        pfd_add(t, t->listeners[i], POLLIN);
    }
    for (size_t i = 0; i < n_orphans; i++) {
        pfd_add(t, t->orphans[i].fd, POLLIN);
    }
    for (size_t i = 0; i < t->n_flows; i++) {
        for (int s = 0; s < 2; s++) {
            const Side *side = &t->flows[i].side[s];

            pfd_add(t, side->fd, side_interest(t, &t->flows[i], side));
        }
    }
    ck_assert(poll(t->pfds, t->n_pfds, 20) >= 0);

    /* Backwards: a dropped orphan is replaced by the last one. */
    p = t->pfds + t->n_listeners;
    for (size_t i = n_orphans; i > 0; i--) {
        if (p[i - 1].revents) {
            orphan_recv(t, i - 1);
        }
    }
    p += n_orphans;
    for (size_t i = 0; i < t->n_flows; i++) {
        Flow *f = &t->flows[i];

        for (int s = 0; s < 2; s++, p++) {
            Side *side = &f->side[s];

            if (p->revents & (POLLIN | POLLHUP | POLLERR) && !side->deaf) {
                side_recv(side, &f->side[1 - s], i);
            }
            if (p->revents & (POLLOUT | POLLERR) && side->fd >= 0) {
                if (s == 0 && f->head_sent < HEAD_LEN) {
                    head_send(f, i);
                } else {
                    side_send(t, side);
                }
            }
        }
    }
    for (size_t i = 0; i < t->n_listeners; i++) {
        if (t->pfds[i].revents) {
            listener_accept(t, i);
        }
    }
}

bool traffic_run(Traffic *t, bool (*until)(const Traffic *t), int ms)
{
    int64_t end = now_ms() + ms;

    while (!until(t)) {
        if (now_ms() >= end) {
            return false;
        }
        traffic_turn(t);
    }
    return true;
}

bool traffic_paired(const Traffic *t)
{
    for (size_t i = 0; i < t->n_flows; i++) {
        if (!t->flows[i].paired) {
            return false;
        }
    }
    return true;
}

bool traffic_done(const Traffic *t)
{
    for (size_t i = 0; i < t->n_flows; i++) {
        const Flow *f = &t->flows[i];

        for (int s = 0; s < 2 && !f->waived; s++) {
            ck_assert_msg(f->side[s].error == 0, "flow %zu, side %d: %s", i, s,
                          strerror(f->side[s].error));
            if (!f->side[s].eof || !f->side[s].shut) {
                return false;
            }
        }
    }
    return true;
}

bool traffic_ended(const Traffic *t)
{
    for (size_t i = 0; i < t->n_flows; i++) {
        if (t->flows[i].side[0].fd >= 0 || t->flows[i].side[1].fd >= 0) {
            return false;
        }
    }
    return true;
}

bool traffic_never(const Traffic *t)
{
    (void)t;
    return false;
}

void traffic_leave(Traffic *t, size_t i)
{
    Flow *f = &t->flows[i];

    f->waived = true;
    if (f->side[0].fd >= 0) {
        close_reset(f->side[0].fd);
        f->side[0].fd = -1;
    }
}

uint64_t traffic_sent(const Traffic *t)
{
    uint64_t sent = 0;

    for (size_t i = 0; i < t->n_flows; i++) {
        sent += t->flows[i].side[0].sent + t->flows[i].side[1].sent;
    }
    return sent;
}

uint64_t traffic_moved(const Traffic *t)
{
    uint64_t moved = 0;

    for (size_t i = 0; i < t->n_flows; i++) {
        moved += t->flows[i].side[0].got + t->flows[i].side[1].got;
    }
    return moved;
}

void traffic_settle(Traffic *t)
{
    int64_t end = now_ms() + WAIT_MS;
    uint64_t before;

    do {
        ck_assert_msg(now_ms() < end, "senders without a reader never stop");
        before = traffic_sent(t);
        traffic_run(t, traffic_never, 300);
    } while (traffic_sent(t) != before);
}
