/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_loop.c - descriptors and timers
 */
#include <sys/resource.h>
#include <sys/wait.h>

#include "tests/lib/rig.h"

/* What a handler was called for */
typedef struct Calls {
    VPLoop *loop;
    int n;
    int fd;
    int events;
    void (*then)(struct Calls *c);
    int arg[2];
} Calls;

static void called(void *opaque, int fd, int events)
{
    Calls *c = opaque;

    c->n++;
    c->fd = fd;
    c->events = events;
    if (c->then != NULL) {
        c->then(c);
    }
}

static VPLoop *loop_new(void)
{
    VPLoop *loop = engine_loop_new();

    ck_assert_ptr_nonnull(loop);
    return loop;
}

/* loop_ordered() - where fd_sets are of @order */
static VPLoop *loop_ordered(int order)
{
    box.fd_order = (FdOrder)order;
    return loop_new();
}

static void loop_end(VPLoop *loop)
{
    vp_loop_free(loop);
    ck_assert_uint_eq(box.allocated, 0);
}

/* watch() - for reading */
static void watch(VPLoop *loop, int fd, Calls *c)
{
    c->loop = loop;
    ck_assert_int_eq(vp_watch(loop, fd, called, c), 0);
    vp_watch_set(loop, fd, VP_READ);
}

/* ---- timers ----------------------------------------------------------- */

enum { TIMERS = 50 };

typedef struct Clock {
    VPLoop *loop;
    Calls calls;
    int fd[2];              /* nothing comes here; a loop has descriptors */
    VPTimer timer[TIMERS];
    int order[4 * TIMERS];  /* in which they fired */
    int n;
    int stops;              /* what a handler does: stop this one, -1: none */
    int restarts;           /* restart this one */
    uint64_t at[4 * TIMERS];
} Clock;

static void clock_fire(Clock *k, int i)
{
    k->order[k->n] = i;
    k->at[k->n++] = vp_loop_now(k->loop);
}

static void fired(void *opaque);

/* The timer that fired is the one whose opaque this is */
typedef struct Shot {
    Clock *clock;
    int i;
} Shot;

static Shot shot[TIMERS];

static void clock_start(Clock *k, int i, uint64_t delay)
{
    shot[i] = (Shot){ k, i };
    vp_timer_start(k->loop, &k->timer[i], delay, fired, &shot[i]);
}

static void fired(void *opaque)
{
    Shot *s = opaque;
    Clock *k = s->clock;

    ck_assert(!timer_running(&k->timer[s->i]));
    clock_fire(k, s->i);
    if (k->stops >= 0) {
        vp_timer_stop(&k->timer[k->stops]);
    }
    if (k->restarts >= 0 && k->n < 3 * TIMERS) {
        clock_start(k, k->restarts, SECOND);
        k->restarts = -1;
    }
}

static void clock_new(Clock *k)
{
    memset(k, 0, sizeof(*k));
    k->loop = loop_new();
    k->stops = k->restarts = -1;
    fd_pair(k->fd);
    watch(k->loop, k->fd[0], &k->calls);
    box_settle(k->loop);
}

static void clock_end(Clock *k)
{
    vp_unwatch(k->loop, k->fd[0]);
    loop_end(k->loop);
}

START_TEST(timer_order)
{
    static Clock k;
    uint64_t start;

    clock_new(&k);
    start = vp_loop_now(k.loop);
    for (int i = 0; i < TIMERS; i++) {
        clock_start(&k, i, (unsigned)(i * 37 % TIMERS) * SECOND);
    }
    box_run(k.loop, 100 * SECOND);
    ck_assert_int_eq(k.n, TIMERS);
    for (int i = 0; i < TIMERS; i++) {
        uint64_t due = start + (unsigned)i * SECOND;

        ck_assert_int_eq(k.order[i] * 37 % TIMERS, i);
        ck_assert_uint_ge(k.at[i], due);
        ck_assert_uint_le(k.at[i], due + 5 * MS);
    }
    clock_end(&k);
}
END_TEST

/* Of the same time: in the order in which they were started */
START_TEST(timer_same_time)
{
    static Clock k;

    clock_new(&k);
    for (int i = TIMERS - 1; i >= 0; i--) {
        clock_start(&k, i, SECOND);
    }
    box_run(k.loop, 2 * SECOND);
    ck_assert_int_eq(k.n, TIMERS);
    for (int i = 0; i < TIMERS; i++) {
        ck_assert_int_eq(k.order[i], TIMERS - 1 - i);
    }
    clock_end(&k);
}
END_TEST

START_TEST(timer_stop_and_restart)
{
    static Clock k;

    clock_new(&k);
    for (int i = 0; i < 5; i++) {
        clock_start(&k, i, (unsigned)(i + 1) * SECOND);
    }
    vp_timer_stop(&k.timer[_i]);
    vp_timer_stop(&k.timer[_i]); /* a stopped one may be stopped */
    ck_assert(!timer_running(&k.timer[_i]));
    box_run(k.loop, 10 * SECOND);
    ck_assert_int_eq(k.n, 4);
    for (int i = 0; i < 4; i++) {
        ck_assert_int_eq(k.order[i], i + (i >= _i));
    }
    /* restarted, it is as if the first start had not been */
    k.n = 0;
    for (int i = 0; i < 5; i++) {
        clock_start(&k, i, SECOND);
    }
    clock_start(&k, _i, 3 * SECOND);
    clock_start(&k, _i, 2 * SECOND);
    box_run(k.loop, 10 * SECOND);
    ck_assert_int_eq(k.n, 5);
    ck_assert_int_eq(k.order[4], _i);
    clock_end(&k);
}
END_TEST

/* A handler stops another timer that is due too, or starts itself again. */
START_TEST(timer_in_handler)
{
    static Clock k;

    clock_new(&k);
    for (int i = 0; i < 4; i++) {
        clock_start(&k, i, SECOND);
    }
    k.stops = 1 + _i;
    box_run(k.loop, 2 * SECOND);
    ck_assert_int_eq(k.n, 3);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(k.order[i], i + (i >= 1 + _i));
    }
    k.n = 0;
    k.stops = -1;
    k.restarts = _i;
    clock_start(&k, 0, SECOND);
    box_run(k.loop, 5 * SECOND);
    ck_assert_int_eq(k.n, 2);
    ck_assert_int_eq(k.order[1], _i);
    ck_assert_uint_ge(k.at[1] - k.at[0], SECOND);
    clock_end(&k);
}
END_TEST

/* The loop sleeps as long as it can: a pass for each timer. */
START_TEST(timer_sleep)
{
    static Clock k;
    unsigned long passes;

    clock_new(&k);
    for (int i = 0; i < 10; i++) {
        clock_start(&k, i, (unsigned)(i + 1) * 3000 * SECOND);
    }
    passes = box.passes;
    box_run(k.loop, 40000 * SECOND);
    ck_assert_int_eq(k.n, 10);
    ck_assert_uint_le(box.passes - passes, 10 + 12 + 3);
    clock_end(&k);
}
END_TEST

/* ---- descriptors ------------------------------------------------------ */

START_TEST(wanted_events)
{
    VPLoop *loop = loop_ordered(_i);
    Calls c = { 0 };
    int fd[2];

    fd_pair(fd);
    ck_assert_int_eq(vp_watch(loop, fd[0], called, &c), 0);
    fd_write(fd[1], "x", 1);
    box_settle(loop);
    ck_assert_int_eq(c.n, 0); /* for nothing yet */
    for (int events = 0; events <= (VP_READ | VP_WRITE); events++) {
        vp_watch_set(loop, fd[0], events);
        c.n = 0;
        box.settle = events == 0;
        box_step(loop, 1);
        ck_assert_int_eq(c.n, events != 0);
        ck_assert(c.n == 0 || (c.events == events && c.fd == fd[0]));
    }
    ck_assert_int_eq(vp_loop_nfds(loop), fd[0] + 1);
    box.settle = false;
    vp_unwatch(loop, fd[0]);
    ck_assert_int_eq(vp_loop_nfds(loop), 0);
    ck_assert_uint_eq(loop->nwatched, 0);
    c.n = 0;
    box_settle(loop);
    ck_assert_int_eq(c.n, 0);
    close(fd[0]);
    close(fd[1]);
    loop_end(loop);
}
END_TEST

/* Numbers beyond FD_SETSIZE, and beyond what the maps had room for */
/*
 * takes_high() - does select() take descriptors beyond FD_SETSIZE?
 *
 * qemu-user dies of it, so a child asks.
 */
static bool takes_high(void)
{
    static unsigned long none[10000 / CHAR_BIT / sizeof(unsigned long) + 1];
    struct timeval zero = { 0, 0 };
    int status = 0;
    pid_t pid = fork();

    ck_assert(pid >= 0);
    if (pid == 0) {
        _exit(select(10000, (fd_set *)none, NULL, NULL, &zero) != 0);
    }
    ck_assert(waitpid(pid, &status, 0) == pid);
    return status == 0;
}

#define TAKES_HIGH "select() beyond FD_SETSIZE"

START_TEST(high_numbers)
{
    static const int high[] = { 1023, 1024, 1025, 1500, 4095, 4096, 9000 };
    VPLoop *loop = loop_ordered(_i);
    Calls c[COUNT_OF(high) + 1] = { { 0 } };
    struct rlimit lim;
    int fd[2], n = 0;

    if (!takes_high()) {
        PASS_OVER(TAKES_HIGH);
    }
    getrlimit(RLIMIT_NOFILE, &lim);
    lim.rlim_cur = lim.rlim_max;
    setrlimit(RLIMIT_NOFILE, &lim);
    fd_pair(fd);
    watch(loop, fd[0], &c[COUNT_OF(high)]);
    while (n < COUNT_OF(high) && (rlim_t)high[n] < lim.rlim_cur) {
        ck_assert_int_eq(dup2(fd[0], high[n]), high[n]);
        watch(loop, high[n], &c[n]);
        n++;
    }
    ck_assert_msg(n > 2, "no more than %d descriptors", high[n - 1]);
    fd_write(fd[1], "x", 1);
    box_step(loop, 1);
    for (int i = 0; i < n; i++) {
        ck_assert_int_eq(c[i].n, 1);
        ck_assert_int_eq(c[i].fd, high[i]);
    }
    ck_assert_int_eq(c[COUNT_OF(high)].n, 1); /* the low one is still there */
    for (int i = n - 1; i >= 0; i--) {
        vp_unwatch(loop, high[i]);
        close(high[i]);
        ck_assert_int_eq(vp_loop_nfds(loop), (i > 0 ? high[i - 1] : fd[0]) + 1);
    }
    box_step(loop, 1);
    ck_assert_int_eq(c[COUNT_OF(high)].n, 2);
    vp_unwatch(loop, fd[0]);
    loop_end(loop);
}
END_TEST

/* No order of bits is guessed. */
START_TEST(unknown_order)
{
    VPLogLevel level = VP_LOG_INFO;

    box.fd_order = FD_ORDER_ODD;
    ck_assert_ptr_null(vp_loop_new(NULL, &level));
    ck_assert_int_eq(errno, ENOSYS);
}
END_TEST

/* A system whose select() takes no more says so, and nothing is changed. */
START_TEST(too_high)
{
    VPLoop *loop = loop_new();
    Calls c = { 0 };
    int fd[2];

    fd_pair(fd);
    watch(loop, fd[0], &c);
    box.select_max = FD_SETSIZE;
    ck_assert_int_eq(vp_watch(loop, FD_SETSIZE, called, &c), -EMFILE);
    ck_assert_int_eq(vp_loop_nfds(loop), fd[0] + 1);
    ck_assert_uint_eq(loop->nwatched, 1);
    box.select_max = 0;
    for (int left = 0; left < 2; left++) {
        box_fail(CALL_ALLOC, ENOMEM, (unsigned)left, BOX_ALL);
        ck_assert_int_eq(vp_watch(loop, 70000, called, &c), -ENOMEM);
    }
    box.calls = 0;
    fd_write(fd[1], "x", 1);
    box_step(loop, 1);
    ck_assert_int_eq(c.n, 1);
    vp_unwatch(loop, fd[0]);
    loop_end(loop);
}
END_TEST

/* Without random numbers nothing begins; one source of them is enough. */
START_TEST(no_random_numbers)
{
    VPLoop *loop;

    box_fail(CALL_RANDOM, ENOENT, 0, BOX_ALL);
    errno = 0;
    ck_assert_ptr_null(engine_loop_new());
    ck_assert_int_eq(errno, ENOENT);
    box_fail(CALL_RANDOM, ENOSYS, 0, 1); /* no getrandom() */
    loop = engine_loop_new();
    ck_assert_ptr_nonnull(loop);
    ck_assert_uint_ne(loop->instance, 0);
    loop_end(loop);
}
END_TEST

/* The room of numbers nobody watched holds nothing. */
START_TEST(never_watched)
{
    VPLoop *loop = loop_new();
    Calls c = { 0 };
    int fd[2], high = 900;

    fd_pair(fd);
    watch(loop, fd[0], &c);
    ck_assert_int_eq(dup2(fd[0], high), high);
    watch(loop, high, &c);
    box_fail(CALL_SELECT, EBADF, 0, 1); /* it looks, and finds none */
    box_step(loop, 1);
    log_quiet("error");
    vp_unwatch(loop, high);
    ck_assert_int_eq(vp_loop_nfds(loop), fd[0] + 1);
    vp_unwatch(loop, fd[0]);
    ck_assert_int_eq(vp_loop_nfds(loop), 0);
    close(high);
    loop_end(loop);
}
END_TEST

/* ---- changes while events are handed out ------------------------------ */

/* drop_others() - and close them; one number is used anew at once */
static void drop_others(Calls *c)
{
    int fd[2];

    for (int i = 0; i < 2; i++) {
        if (c->arg[i] >= 0) {
            vp_unwatch(c->loop, c->arg[i]);
            close(c->arg[i]);
        }
    }
    fd_pair(fd); /* takes the numbers that just became free */
    fd_write(fd[1], "new", 3);
    watch(c->loop, fd[0], &c[1]);
    c->arg[0] = fd[0];
    c->arg[1] = -1;
    c->then = NULL;
}

/*
 * The first handler closes the others, and a new descriptor gets one of their
 * numbers: what was ready was so for the old one.
 */
START_TEST(number_used_again)
{
    VPLoop *loop = loop_new();
    Calls c[2] = { { .then = drop_others }, { 0 } }, old = { 0 };
    int a[2], b[2], d[2];

    fd_pair(a);
    fd_pair(b);
    fd_pair(d);
    watch(loop, a[0], &c[0]);
    watch(loop, b[0], &old);
    watch(loop, d[0], &old);
    c[0].arg[0] = b[0];
    c[0].arg[1] = d[0];
    fd_write(a[1], "x", 1);
    fd_write(b[1], "x", 1);
    fd_write(d[1], "x", 1);
    box_step(loop, 1);
    ck_assert_int_eq(c[0].n, 1);
    ck_assert_int_eq(old.n, 0);
    ck_assert_int_eq(c[1].n, 0); /* not for the bits of the old one */
    ck_assert(c[0].arg[0] == b[0] || c[0].arg[0] == d[0]);
    box_step(loop, 1);
    ck_assert_int_eq(c[1].n, 1);
    vp_unwatch(loop, a[0]);
    vp_unwatch(loop, c[0].arg[0]);
    loop_end(loop);
}
END_TEST

static void watch_high(Calls *c)
{
    ck_assert_int_eq(dup2(c->fd, c->arg[0]), c->arg[0]);
    watch(c->loop, c->arg[0], &c[1]);
    c->then = NULL;
}

static const int high_fds[] = { 1000, 1030, 1100 };

/* A handler makes the maps grow, and others are still to be called. */
START_TEST(maps_grow_in_handler)
{
    VPLoop *loop = loop_new();
    Calls c[2] = { { .then = watch_high }, { 0 } }, last = { 0 };
    int a[2], b[2];

    if (high_fds[_i] >= FD_SETSIZE && !takes_high()) {
        PASS_OVER(TAKES_HIGH);
    }
    c[0].arg[0] = high_fds[_i];
    fd_pair(a);
    fd_pair(b);
    watch(loop, a[0], &c[0]);
    watch(loop, b[0], &last);
    fd_write(a[1], "x", 1);
    fd_write(b[1], "x", 1);
    box_step(loop, 3); /* the system is asked whether it takes the number */
    ck_assert_int_ge(c[0].n, 2);
    ck_assert_int_ge(last.n, 1);
    ck_assert_int_ge(c[1].n, 1);
    vp_unwatch(loop, a[0]);
    vp_unwatch(loop, b[0]);
    vp_unwatch(loop, high_fds[_i]);
    loop_end(loop);
}
END_TEST

static void stop_loop(Calls *c)
{
    vp_loop_stop(c->loop);
}

START_TEST(stop_in_handler)
{
    VPLoop *loop = loop_new();
    Calls c = { .then = stop_loop };
    int fd[2];

    fd_pair(fd);
    watch(loop, fd[0], &c);
    fd_write(fd[1], "x", 1);
    for (int i = 1; i < 4; i++) {
        ck_assert_int_eq(vp_loop_run(loop), 0);
        ck_assert_int_eq(c.n, i);
    }
    vp_unwatch(loop, fd[0]);
    loop_end(loop);
}
END_TEST

/* ---- trouble with select() -------------------------------------------- */

/* A descriptor was closed behind our back: named once, and left alone. */
START_TEST(closed_behind_our_back)
{
    VPLoop *loop = loop_new();
    Calls bad = { 0 }, good = { 0 };
    int a[2], b[2];
    unsigned long passes;
    char line[100];

    fd_pair(a);
    fd_pair(b);
    watch(loop, a[0], &bad);
    watch(loop, b[0], &good);
    close(a[0]);
    passes = box.passes;
    box_run(loop, 10 * SECOND);
    ck_assert_uint_lt(box.passes - passes, 10);
    snprintf(line, sizeof(line), "descriptor %d is watched but not open",
             a[0]);
    ck_assert_int_eq(log_count("error ch"), 1);
    log_expect(line, 1);
    fd_write(b[1], "x", 1);
    box_step(loop, 1);
    ck_assert_int_eq(good.n, 1);
    ck_assert_int_eq(bad.n, 0);
    vp_unwatch(loop, a[0]);
    vp_unwatch(loop, b[0]);
    loop_end(loop);
}
END_TEST

static const struct {
    int err;
    int result;
} failures[] = { { EINTR, 0 }, { ENOMEM, 0 }, { EINVAL, -EINVAL } };

START_TEST(select_fails)
{
    VPLoop *loop = loop_new();
    VPTimer timer = { 0 };
    Calls c = { 0 };
    int fd[2];

    fd_pair(fd);
    watch(loop, fd[0], &c);
    fd_write(fd[1], "x", 1);
    box_fail(CALL_SELECT, failures[_i].err, 0, 1);
    vp_timer_start(loop, &timer, SECOND, box_stop, loop);
    ck_assert_int_eq(vp_loop_run(loop), failures[_i].result);
    ck_assert_int_eq(c.n > 0, failures[_i].result == 0);
    vp_timer_stop(&timer);
    vp_unwatch(loop, fd[0]);
    loop_end(loop);
}
END_TEST

/* ---- many descriptors ------------------------------------------------- */

enum { MANY = 300 };

typedef struct Crowd {
    VPLoop *loop;
    Calls calls[MANY];
    int fd[MANY][2];
} Crowd;

/* Both ways to learn of the cold ones: for box.no_epoll */
static const bool ways[] = { false, true };

/* crowd_watch() - have all watched; they are hot at first */
static void crowd_watch(Crowd *w, bool no_epoll)
{
    memset(w, 0, sizeof(*w));
    box.no_epoll = no_epoll;
    w->loop = loop_new();
    for (int i = 0; i < MANY; i++) {
        fd_pair(w->fd[i]);
        watch(w->loop, w->fd[i][0], &w->calls[i]);
    }
}

/* crowd_new() - a crowd that has become cold, but for the first, a busy one */
static void crowd_new(Crowd *w, bool no_epoll)
{
    crowd_watch(w, no_epoll);
    fd_write(w->fd[0][1], "x", 1); /* is never read: busy */
    box_run(w->loop, 100 * MS);
}

/* crowd_rest() - nobody is busy any more, and the loop sleeps */
static void crowd_rest(Crowd *w)
{
    recv(w->fd[0][0], &(char){ 0 }, 1, 0);
    box_run(w->loop, 3 * VP_HOT_US);
}

static void crowd_free(Crowd *w)
{
    for (int i = 0; i < MANY; i++) {
        vp_unwatch(w->loop, w->fd[i][0]);
        close(w->fd[i][0]);
        close(w->fd[i][1]);
    }
    loop_end(w->loop);
}

/*
 * While one descriptor is busy, the others cost little, and yet each is seen:
 * at once, or at the next look.
 */
START_TEST(cold_ones_are_seen)
{
    static Crowd w;
    uint64_t late = box.pass_us + (ways[_i] ? MANY * VP_LOOK_MAX_US : 0);
    unsigned long passes, bits;

    crowd_new(&w, ways[_i]);
    passes = box.passes;
    bits = box.bits;
    box_run(w.loop, 100 * MS);
    passes = box.passes - passes;
    bits = box.bits - bits;
    ck_assert_uint_ge(passes, 100 * MS / box.pass_us / 2);
    ck_assert_uint_lt(bits, passes * 4);
    for (int i = 1; i < MANY; i += 7) {
        uint64_t from = box.now;

        fd_write(w.fd[i][1], "x", 1);
        while (w.calls[i].n == 0) {
            box_step(w.loop, 1);
            ck_assert_uint_le(box.now - from, late + box.pass_us);
        }
        ck_assert_int_eq(w.calls[i].events, VP_READ);
        recv(w.fd[i][0], &(char){ 0 }, 1, 0);
    }
    crowd_free(&w);
}
END_TEST

/* When nothing is going on the loop sleeps, and the first wakes it. */
START_TEST(cold_ones_wake_us)
{
    static Crowd w;
    unsigned long passes;

    crowd_new(&w, ways[_i]);
    crowd_rest(&w);
    for (int round = 0; round < 3; round++) {
        for (int i = 1; i < MANY; i += 50) {
            w.calls[i].n = 0;
            fd_write(w.fd[i][1], "x", 1);
        }
        box_step(w.loop, 1);
        for (int i = 1; i < MANY; i += 50) {
            ck_assert_int_eq(w.calls[i].n, 1);
            recv(w.fd[i][0], &(char){ 0 }, 1, 0);
        }
        box_run(w.loop, 3 * VP_HOT_US);
        passes = box.passes;
        box_run(w.loop, 3000 * SECOND);
        ck_assert_uint_lt(box.passes - passes, 5);
    }
    crowd_free(&w);
}
END_TEST

/* A message now and then doesn't have all looked at each time. */
START_TEST(rare_ones_cost_little)
{
    static Crowd w;
    unsigned long bits;
    uint64_t from;

    crowd_new(&w, ways[_i]);
    crowd_rest(&w);
    bits = box.bits;
    from = box.now;
    for (int i = 0; i < 200; i++) {
        fd_write(w.fd[99][1], "x", 1);
        box_step(w.loop, 1);
        ck_assert_int_eq(w.calls[99].n, i + 1);
        recv(w.fd[99][0], &(char){ 0 }, 1, 0);
        box_run(w.loop, 50 * MS);
    }
    bits = box.bits - bits;
    ck_assert_uint_le(bits, 200 * 10 +
                      (ways[_i] ? (box.now - from) / VP_LOOK_MAX_US * 11 / 10
                                : 0));
    crowd_free(&w);
}
END_TEST

/* What is wanted anew is looked at in the next pass. */
START_TEST(new_interest_is_hot)
{
    static Crowd w;

    crowd_new(&w, ways[_i]);
    for (int i = 1; i < MANY; i += 13) {
        vp_watch_set(w.loop, w.fd[i][0], VP_READ | VP_WRITE);
        w.calls[i].n = 0;
        box_step(w.loop, 1);
        ck_assert_int_eq(w.calls[i].n, 1);
        ck_assert_int_eq(w.calls[i].events, VP_WRITE);
        vp_watch_set(w.loop, w.fd[i][0], VP_READ);
    }
    crowd_free(&w);
}
END_TEST

/* Of what isn't wanted a cold one says nothing. */
START_TEST(cold_and_not_wanted)
{
    static Crowd w;

    crowd_new(&w, ways[_i]);
    vp_watch_set(w.loop, w.fd[99][0], 0);
    box_run(w.loop, 100 * MS);
    fd_write(w.fd[99][1], "x", 1);
    close(w.fd[99][1]);
    box_run(w.loop, 100 * MS);
    ck_assert_int_eq(w.calls[99].n, 0);
    crowd_rest(&w);
    vp_watch_set(w.loop, w.fd[99][0], VP_READ);
    box_step(w.loop, 1);
    ck_assert_int_eq(w.calls[99].n, 1);
    crowd_free(&w);
}
END_TEST

/* One that answers each time stays hot. */
START_TEST(active_ones_stay_hot)
{
    static Crowd w;

    crowd_new(&w, ways[_i]);
    fd_write(w.fd[99][1], "x", 1);
    box_run(w.loop, 100 * MS);
    for (int round = 0; round < 300; round++) {
        w.calls[99].n = 0;
        box_step(w.loop, 1);
        ck_assert_int_eq(w.calls[99].n, 1);
        ck_assert(!watch_cold(w.loop, w.fd[99][0]));
    }
    crowd_free(&w);
}
END_TEST

/*
 * One that is active some times a second, as when somebody types, needs not
 * wait for a look; and no longer active it becomes cold.
 */
START_TEST(typed_ones_are_seen_at_once)
{
    static Crowd w;

    crowd_new(&w, ways[_i]);
    for (int round = 0; round < 30; round++) {
        w.calls[99].n = 0;
        fd_write(w.fd[99][1], "x", 1);
        box_step(w.loop, 1);
        if (round > 0) {
            ck_assert_int_eq(w.calls[99].n, 1);
        }
        box_run(w.loop, 50 * MS);
        ck_assert_int_ge(w.calls[99].n, 1);
        recv(w.fd[99][0], &(char){ 0 }, 1, 0);
        box_run(w.loop, 200 * MS);
    }
    ck_assert(ways[_i] != watch_cold(w.loop, w.fd[99][0]));
    box_run(w.loop, 2 * VP_HOT_US + 100 * MS);
    ck_assert(watch_cold(w.loop, w.fd[99][0]));
    crowd_free(&w);
}
END_TEST

/* There was no descriptor left for epoll when it was needed first. */
START_TEST(epoll_comes_later)
{
    static Crowd w;

    crowd_new(&w, true);
    ck_assert_int_lt(w.loop->cold_fd, 0);
    box.no_epoll = false;
    crowd_rest(&w);
#ifdef __linux__
    ck_assert_int_ge(w.loop->cold_fd, 0);
    /* a child that is forked closes what is below that; and one that execs */
    ck_assert_int_lt(w.loop->cold_fd, vp_loop_nfds(w.loop));
    ck_assert_int_eq(fcntl(w.loop->cold_fd, F_GETFD), FD_CLOEXEC);
#endif
    for (int i = 1; i < MANY; i += 50) {
        fd_write(w.fd[i][1], "x", 1);
        box_step(w.loop, 1);
        ck_assert_int_eq(w.calls[i].n, 1);
        recv(w.fd[i][0], &(char){ 0 }, 1, 0);
        box_run(w.loop, SECOND);
    }
    crowd_free(&w);
}
END_TEST

/* What epoll can't take, as a file, stays hot: it is called in each pass. */
START_TEST(refused_ones_stay_hot)
{
    static Crowd w;
    Calls c = { 0 };
    char path[] = "/tmp/test_loop.XXXXXX";
    int fd;

    crowd_new(&w, ways[_i]);
    fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    unlink(path);
    watch(w.loop, fd, &c);
    box_run(w.loop, 100 * MS);
    for (int round = 0; round < 300; round++) {
        c.n = 0;
        box_step(w.loop, 1);
        ck_assert_int_eq(c.n, 1);
    }
    vp_unwatch(w.loop, fd);
    close(fd);
    crowd_free(&w);
}
END_TEST

/*
 * The other side has shut down both directions, and ours is full: select()
 * doesn't call that ready for writing, and the loop sleeps.
 */
START_TEST(hangup_does_not_spin)
{
    static Crowd w;
    unsigned long passes;
    int fd;

    crowd_new(&w, ways[_i]);
    fd = w.fd[99][0];
    while (send(fd, w.calls, sizeof(w.calls), MSG_NOSIGNAL) > 0) {
    }
    shutdown(w.fd[99][1], SHUT_RDWR);
    vp_watch_set(w.loop, fd, VP_WRITE);
    crowd_rest(&w);
    for (int round = 0; round < 10; round++) {
        passes = box.passes;
        box_run(w.loop, 1000 * SECOND);
        ck_assert_uint_lt(box.passes - passes, 10);
    }
    ck_assert_int_eq(w.calls[99].n, 0);
    crowd_free(&w);
}
END_TEST

/*
 * A cold one is closed behind our back, and lives on in another process, for
 * which a second descriptor stands here: nothing spins, and the others are
 * still seen.
 */
START_TEST(cold_one_closed_behind_our_back)
{
    static Crowd w;
    unsigned long passes;
    int fd, other, pair[2];

    crowd_new(&w, ways[_i]);
    crowd_rest(&w);
    fd = w.fd[99][0];
    other = dup(fd);
    close(fd);
    fd_pair(pair);
    ck_assert_int_eq(pair[0], fd); /* the number is used again */
    fd_write(w.fd[99][1], "x", 1);
    box_run(w.loop, 3 * VP_HOT_US);
    passes = box.passes;
    box_run(w.loop, 3000 * SECOND);
    ck_assert_uint_lt(box.passes - passes, 5);
    fd_write(w.fd[7][1], "x", 1);
    box_step(w.loop, 2);
    ck_assert_int_ge(w.calls[7].n, 1);
    recv(w.fd[7][0], &(char){ 0 }, 1, 0);
    vp_unwatch(w.loop, fd);
    close(w.fd[99][1]);
    w.fd[99][0] = pair[0];
    w.fd[99][1] = pair[1];
    w.calls[99].n = 0;
    watch(w.loop, fd, &w.calls[99]);
    box_run(w.loop, 100 * SECOND);
    ck_assert_int_eq(w.calls[99].n, 0);
    fd_write(pair[1], "x", 1);
    box_step(w.loop, 1);
    ck_assert_int_eq(w.calls[99].n, 1);
    close(other);
    crowd_free(&w);
}
END_TEST

/* As number_used_again, of three cold ones that are ready in one pass */
START_TEST(cold_number_used_again)
{
    static Crowd w;

    crowd_new(&w, ways[_i]);
    crowd_rest(&w);
    w.calls[100].then = drop_others;
    w.calls[100].arg[0] = w.fd[102][0];
    w.calls[100].arg[1] = w.fd[103][0];
    fd_write(w.fd[100][1], "x", 1);
    fd_write(w.fd[102][1], "x", 1);
    fd_write(w.fd[103][1], "x", 1);
    box_step(w.loop, 1);
    ck_assert_int_eq(w.calls[100].n, 1);
    ck_assert_int_eq(w.calls[100].arg[0], w.fd[102][0]); /* the new one */
    for (int i = 101; i < 104; i++) {
        ck_assert_int_eq(w.calls[i].n, 0);
    }
    box_step(w.loop, 1);
    ck_assert_int_eq(w.calls[101].n, 1); /* which drop_others() gave it */
    ck_assert_int_eq(w.calls[102].n, 0);
    watch(w.loop, w.fd[103][0], &w.calls[103]); /* its other end, now */
    crowd_free(&w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loop");

    SUITE_ADD(s, timer_order);
    SUITE_ADD(s, timer_same_time);
    SUITE_LOOP(s, timer_stop_and_restart, 5);
    SUITE_LOOP(s, timer_in_handler, 3);
    SUITE_ADD(s, timer_sleep);
    SUITE_LOOP(s, wanted_events, FD_ORDER_ODD);
    SUITE_LOOP(s, high_numbers, FD_ORDER_ODD);
    SUITE_ADD(s, unknown_order);
    SUITE_ADD(s, too_high);
    SUITE_ADD(s, no_random_numbers);
    SUITE_ADD(s, never_watched);
    SUITE_ADD(s, number_used_again);
    SUITE_ROWS(s, maps_grow_in_handler, high_fds);
    SUITE_ADD(s, stop_in_handler);
    SUITE_ADD(s, closed_behind_our_back);
    SUITE_ROWS(s, select_fails, failures);
    SUITE_ROWS(s, cold_ones_are_seen, ways);
    SUITE_ROWS(s, cold_ones_wake_us, ways);
    SUITE_ROWS(s, rare_ones_cost_little, ways);
    SUITE_ROWS(s, new_interest_is_hot, ways);
    SUITE_ROWS(s, cold_and_not_wanted, ways);
    SUITE_ROWS(s, active_ones_stay_hot, ways);
    SUITE_ROWS(s, typed_ones_are_seen_at_once, ways);
    SUITE_ADD(s, epoll_comes_later);
    SUITE_ROWS(s, refused_ones_stay_hot, ways);
    SUITE_ROWS(s, hangup_does_not_spin, ways);
    SUITE_ROWS(s, cold_one_closed_behind_our_back, ways);
    SUITE_ROWS(s, cold_number_used_again, ways);
    return suite_run(s);
}
