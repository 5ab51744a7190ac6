/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * pair.c - see pair.h
 */
#include <check.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "box.h"
#include "engine.h"
#include "log.h"
#include "pair.h"
#include "sock.h"

#define SECOND_US 1000000u

static void pair_lost(void *opaque, const char *reason, bool was_up)
{
    (void)reason;
    (void)was_up;
    *(bool *)opaque = true;
}

/* line_interest() - an end is read when the other one has room */
static void line_interest(Pair *p)
{
    for (int i = 0; i < 2; i++) {
        vp_watch_set(p->loop, p->end[i].fd,
                     (p->end[1 - i].len == 0 ? VP_READ : 0) |
                     (p->end[i].len > 0 ? VP_WRITE : 0));
    }
}

static void line_ready(void *opaque, int fd, int events)
{
    End *from = opaque;
    Pair *p = from->pair;
    End *to = &p->end[from == &p->end[0]];
    ssize_t n;

    if (events & VP_READ) {
        n = recv(fd, to->buf, sizeof(to->buf) - 1, 0);
        if (n <= 0) {
            vp_watch_set(p->loop, fd, 0); /* pair_cut() will follow */
            return;
        }
        to->len = p->cut ? 0 : (size_t)n;
        if (p->line != NULL) {
            p->line(p, from == &p->end[1], to->buf, &to->len);
        }
        from->moved += (uint64_t)n;
        p->pieces++;
    }
    for (int i = 0; i < 2; i++) {
        End *e = &p->end[i];

        n = e->len > 0 ? send(e->fd, e->buf, e->len, MSG_NOSIGNAL) : 0;
        if (n > 0) {
            e->len -= (size_t)n;
            memmove(e->buf, e->buf + n, e->len);
        }
    }
    line_interest(p);
}

static void plug_direct(Pair *p)
{
    int fd[2];

    if (!p->lost[0] || !p->lost[1]) {
        return;
    }
    fd_pair(fd);
    for (int i = 0; i < 2; i++) {
        p->lost[i] = vp_attach(p->drv[i], fd[i], fd[i], VP_CHN_SOCKET,
                               VP_OPENED) < 0;
    }
}

void pair_plug(Pair *p)
{
    p->cut = false;
    if (p->direct) {
        plug_direct(p);
        return;
    }
    for (int i = 0; i < 2; i++) {
        End *e = &p->end[i];
        int fd[2];

        fd_pair(fd);
        e->pair = p;
        e->fd = fd[1];
        e->len = 0;
        p->lost[i] = false;
        ck_assert_int_eq(vp_watch(p->loop, e->fd, line_ready, e), 0);
        ck_assert_int_eq(vp_attach(p->drv[i], fd[0], fd[0], VP_CHN_SOCKET,
                                   i == 0 ? VP_CONNECTED : VP_ACCEPTED), 0);
    }
    line_interest(p);
}

void pair_cut(Pair *p)
{
    for (int i = 0; i < 2; i++) {
        vp_unwatch(p->loop, p->end[i].fd);
        close(p->end[i].fd);
        p->end[i].fd = -1;
    }
    box_settle(p->loop);
}

void pair_boot(Pair *p, int which)
{
    p->lost[which] = true;
    p->drv[which] = vp_new(p->loop, which, p->config, pair_lost,
                           &p->lost[which]);
    ck_assert_ptr_nonnull(p->drv[which]);
    engine_set_instance(p->drv[which], 1 + (unsigned)which);
    if (which == 1) {
        ck_assert_int_eq(vp_set_iforward(p->drv[1], "s", &p->addr, 1), 0);
    }
}

static void pair_make(Pair *p, const VPConfig *config, bool tcp)
{
    signal(SIGPIPE, SIG_IGN);
    memset(p, 0, sizeof(*p));
    p->config = config;
    p->loop = engine_loop_new();
    p->tcp = tcp;
    p->listener = tcp ? tcp_listen(&p->addr, 100)
                      : unix_listen(&p->addr, 100);
    pair_boot(p, 0);
    pair_boot(p, 1);
}

void pair_new(Pair *p, const VPConfig *config, bool tcp)
{
    pair_make(p, config, tcp);
    pair_plug(p);
}

void pair_new_direct(Pair *p, const VPConfig *config)
{
    pair_make(p, config, true);
    p->direct = true;
}

void pair_free(Pair *p)
{
    for (int i = 0; i < 2; i++) {
        vp_free(p->drv[i]);
        if (!p->direct) {
            vp_unwatch(p->loop, p->end[i].fd);
            close(p->end[i].fd);
        }
    }
    vp_loop_free(p->loop);
    ck_assert_uint_eq(box.blocks, 0);
    ck_assert_uint_eq(box.allocated, 0);
    close(p->listener);
}

bool pair_up(const Pair *p)
{
    return engine_up(p->drv[0]) && engine_up(p->drv[1]);
}

void pair_wait(Pair *p)
{
    uint64_t end = box.now + 8 * SECOND_US;

    box_settle(p->loop);
    while (!pair_up(p)) {
        ck_assert_msg(box.now < end, "no handshake; in the log:\n%s",
                      log_text());
        box_run(p->loop, 20000);
    }
}

void pair_check(const Pair *p)
{
    EngineLink a = engine_link(p->drv[0]), b = engine_link(p->drv[1]);

    ck_assert(pair_up(p));
    ck_assert_uint_ne(a.epoch[0], 0);
    ck_assert_uint_eq(a.epoch[0], b.epoch[1]);
    ck_assert_uint_eq(a.epoch[1], b.epoch[0]);
    ck_assert(engine_keys_fit(p->drv[0], p->drv[1]));
}
