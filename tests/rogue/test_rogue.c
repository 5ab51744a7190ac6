/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_rogue.c - a daemon with one good channel and one whose peer is a rogue
 *
 * While the rogue does what it does as fast as it can, an innocent connection
 * on the other channel must go on, the daemon's memory and descriptors stay
 * within what the limits allow, and its log short.
 *
 * The innocent is sent whatever it takes.  What counts is how much it gets for
 * the CPU time that the daemon uses, on itself and on the rogue, and not how
 * long that took: who else has the CPU makes no difference then.
 */
#include "tests/lib/rogue.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define ROUND_MS 20     /* of the daemon's CPU time */
/*
 * On a busy machine those who serve the innocent may get no CPU for some rounds,
 * so a few good ones are enough; what takes more than its share has none.
 */
#define GOOD_ROUNDS 2
#define BAD_ROUNDS  50
#define LOG_LINES 260   /* that provocation may add, and in each ms more: */
#define LOG_RATE (110 / 10000.0)
#define MILLION 1000000
#define SANE_FDS 16     /* beyond a connection's: channels, listeners */

/*
 * So many times less than alone the innocent may get: 1.2 is usual, and more
 * where those who serve it wait for a processor.
 */
#define LEAST_SHARE 6
/* ... beside a flood of what is no packet: 0.9 times less is usual */
#define LEAST_FLOODED 1.6
#define BLOCK 65536

/* The rogue's accomplices: services on the daemon's side */
enum {
    SOURCE,                 /* sends whatever is taken */
    SINK,                   /* reads whatever comes */
    MUTE,                   /* does neither */
    HALF,                   /* the same, and shuts down its direction */
    TARGETS,
};

static const char *const targets[TARGETS] = {
    "source", "sink", "mute", "half",
};

/* The limits of the daemon, which are the options' or the default ones */
typedef struct Limits {
    const char *options;
    unsigned max_conns;
} Limits;

static const Limits low = {
    "--max-conns 400 --max-half-open 60 --max-memory 26", 400,
};
static const Limits usual = { "", 16384 };

typedef struct Scene {
    const Limits *limits;
    Daemon *host;           /* channel 0 has the rogue, 1 the innocent */
    Daemon *guest;
    char rogue_at[PATH_LEN];
    int innocent;           /* socket of its client */
    pid_t rogue;
    int64_t start;          /* ms */
    int fds;                /* of the host's daemon at the start */
    long rss;               /* the same in KiB */
} Scene;

/* What a rogue of its own process tells of itself */
typedef struct Tally {
    volatile unsigned long sent, refused, sessions;
    volatile bool done;
} Tally;

static Tally *tally;

/* ---- what is measured ------------------------------------------------- */

/* status_kib() - a line of /proc/PID/status */
static long status_kib(const Daemon *d, const char *what)
{
    char path[64], line[128];
    long kib = -1;
    FILE *f;

    snprintf(path, sizeof(path), "/proc/%d/status", (int)d->pid);
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s is gone", d->name);
    while (fgets(line, sizeof(line), f) != NULL) {
        if (strncmp(line, what, strlen(what)) == 0) {
            kib = atol(line + strlen(what) + 1);
        }
    }
    fclose(f);
    ck_assert_int_ge(kib, 0);
    return kib;
}

/* memory_check() - the peak, where no sanitizer needs memory of its own */
static void memory_check(const Scene *s)
{
#if !defined(__SANITIZE_ADDRESS__)
    long formula = (long)((VP_MEMORY_FIXED +
                           s->limits->max_conns * VP_MEMORY_CONN) / 1024);
    long peak = status_kib(s->host, "VmHWM:");

    ck_assert_msg(peak <= s->rss + formula + 1024, "%ld KiB after %ld, the "
                  "formula allows %ld", peak, s->rss, formula);
#else
    (void)s;
#endif
}

static void log_check(const Scene *s)
{
    int64_t time = now_ms() - s->start;
    int n = daemon_count(s->host, ".");

    ck_assert_msg(n <= LOG_LINES + LOG_RATE * (double)time,
                  "%d lines were logged in %lld ms", n, (long long)time);
}

/* fds_check() - as many connections as may be, and as many that are over */
static void fds_check(const Scene *s)
{
    int n = daemon_fds(s->host);

    ck_assert_msg(n <= s->fds + 2 * (int)s->limits->max_conns + SANE_FDS,
                  "%d descriptors after %d", n, s->fds);
}

/* alive_check() - the same daemon as before, and within its bounds */
static void alive_check(Scene *s)
{
    ck_assert_int_eq(kill(s->host->pid, 0), 0);
    memory_check(s);
    fds_check(s);
    log_check(s);
}

/* ---- the scene -------------------------------------------------------- */

/* source_run() - a server that sends to the innocent whatever is taken */
static void source_run(int listener)
{
    static char block[BLOCK];
    int fd = accept(listener, NULL, NULL);

    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (send(fd, block, sizeof(block), 0) > 0) {
        continue;
    }
}

/* target_run() - @fd of a target is ready; false when it is over */
static bool target_run(int target, struct pollfd *pfd)
{
    static char block[BLOCK];
    ssize_t n = 1;

    if (pfd->revents & (POLLERR | POLLHUP | POLLNVAL)) {
        return false;
    }
    if (target == SOURCE) {
        n = send(pfd->fd, block, sizeof(block), MSG_NOSIGNAL);
    } else if (target == SINK) {
        n = recv(pfd->fd, block, sizeof(block), 0);
    }
    return n > 0 || (n < 0 && errno == EAGAIN);
}

/* targets_run() - all of them, as far as there is room */
static void targets_run(const int listeners[TARGETS])
{
    static const short events[TARGETS] = { POLLOUT, POLLIN, 0, 0 };
    static struct pollfd fds[TARGETS + 1000];
    static int target[TARGETS + 1000];
    nfds_t n = TARGETS;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 0; i < TARGETS; i++) {
        fds[i] = (struct pollfd){ .fd = listeners[i], .events = POLLIN };
        set_nonblocking(listeners[i]);
    }
    for (;;) {
        poll(fds, n, -1);
        for (nfds_t i = n - 1; i >= TARGETS; i--) {
            if (fds[i].revents != 0 && !target_run(target[i], &fds[i])) {
                close(fds[i].fd);
                n--;
                fds[i] = fds[n];
                target[i] = target[n];
            }
        }
        for (int i = 0; i < TARGETS; i++) {
            bool room = n < sizeof(fds) / sizeof(fds[0]);
            int fd = room ? accept(listeners[i], NULL, NULL) : -1;

            fds[i].events = room ? POLLIN : 0;
            if (fd >= 0) {
                set_nonblocking(fd);
                if (i == HALF) {
                    shutdown(fd, SHUT_WR);
                }
                fds[n] = (struct pollfd){ .fd = fd, .events = events[i] };
                target[n++] = i;
            }
        }
    }
}

static pid_t fork_child(void)
{
    pid_t pid = fork();

    ck_assert_int_ge(pid, 0);
    if (pid > 0) {
        child_add(pid);
    }
    return pid;
}

/* targets_new() - start them; their options into @options */
static void targets_new(char *options, size_t size)
{
    char full[PATH_LEN], deaf[TEXT_LEN];
    int listeners[TARGETS];
    size_t len;

    listen_any(deaf);   /* nobody accepts, but the kernel does */
    file_path(full, "full");
    listen_on(full, 0);
    dial(full, false);  /* and now its queue is full */
    text_format(options, size, "-i deaf:%s -i full:%s:-", deaf, full);
    for (int i = 0; i < TARGETS; i++) {
        char path[PATH_LEN];

        file_path(path, targets[i]);
        listeners[i] = listen_on(path, 4096);
        len = strlen(options);
        text_format(options + len, size - len, " -i %s:%s:-", targets[i],
                    path);
    }
    if (fork_child() == 0) {
        targets_run(listeners);
    }
    for (int i = 0; i < TARGETS; i++) {
        close(listeners[i]);
    }
}

/* watcher_start() - a client of the monitor that reads all events */
static void watcher_start(void)
{
    char path[PATH_LEN];
    static char buf[65536];
    int fd;

    file_path(path, "monitor");
    fd = dial(path, true);
    send_all(fd, "batch\nwatch conns\n", 18);
    expect_bytes(fd, "(qemu-vp) 20");
    if (fork_child() == 0) {
        while (read(fd, buf, sizeof(buf)) != 0) {
        }
        _exit(0);
    }
    close(fd);
}

static void scene_new(Scene *s, const Limits *limits)
{
    char link[PATH_LEN], source[TEXT_LEN], options[4 * TEXT_LEN];
    int fd = listen_any(source);

    s->limits = limits;
    if (fork_child() == 0) {
        source_run(fd);
        _exit(0);
    }
    close(fd);
    targets_new(options, sizeof(options));
    file_path(s->rogue_at, "rogue");
    file_path(link, "good");
    s->host = daemon_start("host", "-v -v -c unix-listen:%s:- "
                           "-c unix-listen:%s:-:1 -o out:127.0.0.1:0 "
                           "-m %s/monitor -i source:%s:1 %s %s", s->rogue_at,
                           link, vp_dir, source, options, limits->options);
    s->host->hurried = true;
    daemon_wait(s->host, "ch0: oforward out: listening");
    s->guest = daemon_start("guest", "-c unix-connect:%s:- "
                            "-o source:127.0.0.1:0", link);
    daemon_wait(s->host, "ch1: channel up");
    s->innocent = dial(daemon_listens(s->guest, "source"), true);
    set_nonblocking(s->innocent);
    watcher_start();
    s->start = now_ms();
    s->rss = status_kib(s->host, "VmRSS:");
    s->fds = daemon_fds(s->host);
    daemon_mark(s->host);
}

/*
 * innocent_gets() - bytes while the daemon uses @ms of CPU time, for each ms
 *
 * What the machine does besides makes it take longer, and changes little else.
 */
static double innocent_gets(Scene *s, int ms)
{
    static char buf[1 << 20];
    int64_t start = daemon_cpu_us(s->host), end = now_ms() + WAIT_MS, used;
    double bytes = 0;

    do {
        struct pollfd pfd = { .fd = s->innocent, .events = POLLIN };
        ssize_t n;

        poll(&pfd, 1, 10);
        n = recv(s->innocent, buf, sizeof(buf), 0);
        ck_assert_msg(n > 0 || (n < 0 && errno == EAGAIN),
                      "the innocent connection was lost");
        bytes += n > 0 ? (double)n : 0;
        used = daemon_cpu_us(s->host) - start;
        ck_assert_msg(now_ms() < end, "%.0f bytes while the daemon used %d us "
                      "of CPU time", bytes, (int)used);
    } while (used < ms * 1000);
    return bytes * 1000 / (double)used;
}

/*
 * innocent_fares() - as well beside the rogue as it must?
 * @name:   of what the rogue does
 * @least:  so many times less than alone it may get
 */
static void innocent_fares(Scene *s, const char *name, double least)
{
    double with = 0, without;
    int good = 0, bad = 0;

    without = innocent_gets(s, ROUND_MS);
    kill(s->rogue, SIGCONT);
    innocent_gets(s, ROUND_MS);
    while (good < GOOD_ROUNDS && bad < BAD_ROUNDS) {
        with = innocent_gets(s, ROUND_MS);
        if (with * least >= without) {
            good++;
        } else {
            bad++;
        }
    }
    printf("%s: %d of %d: 1/%.1f, %.1f KB in a ms of the daemon's, else %.1f, "
           "%ld KiB, %d descriptors, %d lines\n", name, good, good + bad,
           without / with, with / 1e3, without / 1e3,
           status_kib(s->host, "VmHWM:") - s->rss,
           daemon_fds(s->host) - s->fds, daemon_count(s->host, "."));
    ck_assert_msg(good == GOOD_ROUNDS, "%s: the innocent gets %.1f KB in a ms "
                  "of the daemon's CPU time instead of %.1f", name, with / 1e3,
                  without / 1e3);
}

/* ---- attacks: each is called again and again -------------------------- */

static uint32_t id;

static void opens(Rogue *r)
{
    for (int i = 0; i < 500; i++) {
        rogue_init(r, id++, "mute", 1 << 20);
    }
}

static void opens_half(Rogue *r)
{
    for (int i = 0; i < 500; i++) {
        rogue_init(r, id++, "full", 1 << 20);
    }
}

static void opens_unknown(Rogue *r)
{
    for (int i = 0; i < 500; i++) {
        rogue_init(r, id++, "nothing", 1 << 20);
    }
}

static void open_reset(Rogue *r)
{
    for (int i = 0; i < 300; i++) {
        rogue_init(r, id, "source", 1 << 20);
        rogue_msg(r, id++, VP_MSG_RESET);
    }
}

/* RESETs of connections that are there, and again of those that are not */
static void reset_storm(Rogue *r)
{
    uint32_t first = id;

    for (int i = 0; i < 50; i++) {
        r->conn = (RogueConn){ .id = id };
        rogue_init(r, id++, "sink", 1 << 20);
    }
    rogue_until(r, &r->conn.ack, &r->conn.refused); /* the last one */
    for (int i = 0; i < 150; i++) {
        rogue_msg(r, first + (uint32_t)i % 50, VP_MSG_RESET);
    }
}

/* What an honest peer's daemon says of all its connections when it ends */
static void ending(Rogue *r)
{
    for (int i = 0; i < 300; i++) {
        rogue_init(r, id, i % 2 ? "source" : "sink", 1 << 20);
        rogue_reset(r, id++, VP_REASON_ENDING);
    }
}

/* The same, and what was sent before can't be delivered */
static void ending_late(Rogue *r)
{
    static const uint8_t data[VP_WINDOW_INIT];

    for (int i = 0; i < 500; i++) {
        rogue_init(r, id, "mute", 1 << 20);
        rogue_put(r, VP_PKT_CLIENT, 0, id, data, 100);
        rogue_reset(r, id++, VP_REASON_ENDING);
    }
}

/*
 * An id is used again while what was sent with it waits: the target has shut
 * down its direction, so that it is over on the wire, and doesn't read.
 */
static void drained(Rogue *r)
{
    for (int i = 0; i < 4 && r->up; i++) {
        rogue_fill(r, 1, "half");
        rogue_until(r, &r->conn.close, &r->conn.refused);
        rogue_msg(r, 1, VP_MSG_CLOSE);
    }
}

/* One byte at a time, to another connection each time */
static void tiny(Rogue *r)
{
    for (uint32_t i = 0; i < 50; i++) {
        rogue_init(r, id + i, "sink", 1 << 20);
    }
    for (uint32_t i = 0; i < 2000; i++) {
        rogue_put(r, VP_PKT_CLIENT, 0, id + i % 50, "x", 1);
    }
    for (uint32_t i = 0; i < 50; i++) {
        rogue_msg(r, id++, VP_MSG_RESET);
    }
}

static void hellos(Rogue *r)
{
    for (int i = 0; i < 100; i++) {
        r->token = random64();
        rogue_hello(r);
    }
    r->up = false;
}

/* The daemon's token, a new session each time */
static void sessions(Rogue *r)
{
    r->up = false;
}

static void reconnects(Rogue *r)
{
    rogue_hello(r);
    rogue_flush(r, 100);
    rogue_hang_up(r);
}

static void pings(Rogue *r)
{
    for (int i = 0; i < 1000; i++) {
        rogue_put(r, VP_PKT_PING, VP_FLAG_ACK_NOW, 0, NULL, 0);
    }
}

static void acks(Rogue *r)
{
    r->peer.expect += 1000;
    rogue_put(r, VP_PKT_ACK, 0, 0, NULL, 0);
    rogue_flush(r, 100);
    r->up = false;
}

static void overrun(Rogue *r)
{
    static uint8_t data[20000];

    rogue_init(r, id, "deaf", 0);
    rogue_put(r, VP_PKT_CLIENT, 0, id++, data, sizeof(data));
    rogue_flush(r, 100);
}

/* All that may be said about an id that isn't there */
static void dead_ids(Rogue *r)
{
    for (int i = 0; i < 200; i++) {
        rogue_msg(r, id, VP_MSG_RESET);
        rogue_msg(r, id, VP_MSG_CLOSE);
        rogue_credit(r, id, VP_MSG_WINDOW, UINT64_MAX);
        rogue_put(r, VP_PKT_CLIENT, 0, id, "x", 1);
        rogue_put(r, VP_PKT_SERVER, 0, id++, "x", 1);
    }
}

static void wild_credit(Rogue *r)
{
    rogue_init(r, id, "source", UINT64_MAX);
    for (int i = 0; i < 300; i++) {
        rogue_credit(r, id, VP_MSG_WINDOW, (uint64_t)i << 56);
    }
    rogue_msg(r, id++, VP_MSG_RESET);
}

static void reuse(Rogue *r)
{
    rogue_init(r, id, "deaf", 0);
    rogue_init(r, id++, "deaf", 0);
    rogue_flush(r, 100);
}

static void close_twice(Rogue *r)
{
    rogue_init(r, id, "deaf", 0);
    rogue_msg(r, id, VP_MSG_CLOSE);
    rogue_msg(r, id++, VP_MSG_CLOSE);
    rogue_flush(r, 100);
}

static void after_close(Rogue *r)
{
    rogue_init(r, id, "deaf", 0);
    rogue_msg(r, id, VP_MSG_CLOSE);
    rogue_put(r, VP_PKT_CLIENT, 0, id++, "x", 1);
    rogue_flush(r, 100);
}

static void no_data(Rogue *r)
{
    rogue_init(r, id, "deaf", 0);
    rogue_put(r, VP_PKT_CLIENT, 0, id++, NULL, 0);
    rogue_flush(r, 100);
}

/* in_drain() - a connection to which bytes and a CLOSE have yet to go */
static void in_drain(Rogue *r)
{
    rogue_fill(r, ++id, "mute");
    rogue_msg(r, id, VP_MSG_CLOSE);
}

static void close_drain(Rogue *r)
{
    in_drain(r);
    rogue_msg(r, id, VP_MSG_CLOSE);
    rogue_flush(r, 100);
}

static void after_drain(Rogue *r)
{
    in_drain(r);
    rogue_put(r, VP_PKT_CLIENT, 0, id, "x", 1);
    rogue_flush(r, 100);
}

/* The largest packet there may be, for nobody */
static void large(Rogue *r)
{
    static uint8_t big[VP_PKT_DATA_LEN];

    rogue_put(r, VP_PKT_CLIENT, 0, id, big, sizeof(big));
    rogue_flush(r, 500);
}

/* header() - of a packet whose payload doesn't come */
static void header(Rogue *r, uint16_t bytes)
{
    VPPacket pkt = {
        .type = VP_PKT_CLIENT, .bytes = bytes, .conn = id, .seq = r->peer.next,
    };

    if (rogue_flush(r, 500)) {
        pkt.ack = r->peer.expect;
        wire_put(r->out, &pkt, &r->peer.tx_key, r->peer.digest);
        r->out_len = VP_PKT_HDR_LEN;
        rogue_flush(r, 500);
    }
}

static void larger(Rogue *r)
{
    header(r, VP_PKT_DATA_LEN + 1);
}

static void largest(Rogue *r)
{
    header(r, UINT16_MAX);
}

static void types(Rogue *r)
{
    id++;
    rogue_put(r, 7 + (int)(id % 249), 0xff, id, "x", 1);
    rogue_flush(r, 100);
}

/* A packet that is in order, but takes its time */
static void slow(Rogue *r)
{
    static uint8_t later[3];

    rogue_flush(r, 100);
    rogue_put(r, VP_PKT_CLIENT, VP_FLAG_ACK_NOW, id, "x", 1);
    if (r->out_len < sizeof(later)) {
        return;
    }
    r->out_len -= sizeof(later);
    memcpy(later, r->out + r->out_len, sizeof(later));
    for (size_t i = 0; i < sizeof(later) && rogue_flush(r, 100); i++) {
        rogue_wait(r, 1000, NULL);
        r->out[r->out_len++] = later[i];
    }
}

static void drops(Rogue *r)
{
    static const char byte[] = "q";

    if (send(r->peer.fd, byte, 1, MSG_NOSIGNAL) < 0) {
        rogue_hang_up(r);
    }
    sleep_ms(1);
}

static void rubbish(Rogue *r)
{
    for (size_t i = 0; i < sizeof(r->out); i += 8) {
        put64(r->out + i, random64());
    }
    r->out_len = sizeof(r->out);
    rogue_flush(r, 500);
}

/* Connections whose target sends, and no credit for it, ever */
static void no_credit(Rogue *r)
{
    rogue_init(r, id, "source", 0);
    if (id++ % 40 == 0) {
        sleep_ms(50);
    }
    rogue_flush(r, 100);
}

/* Connections to every service, much credit, and the channel isn't read */
static void reads_nothing(Rogue *r)
{
    static const char *const service[] = { "source", "mute", "full", "x" };

    for (int i = 0; i < 40; i++) {
        rogue_init(r, id++, service[i % 4], UINT64_MAX);
    }
    rogue_flush(r, 100);
    sleep_ms(20);
}

/* services() - queue a list of @n services, whose names are @seed's */
static void services(Rogue *r, int flags, unsigned seed, int n)
{
    uint8_t msg[16384] = { VP_MSG_SERVICES, (uint8_t)flags };
    size_t len = 2;

    for (int i = 0; i < n && len + 33 <= sizeof(msg); i++) {
        msg[len] = (uint8_t)snprintf((char *)msg + len + 1, 33, "ou-%u-%d",
                                     seed, i);
        len += 1u + msg[len];
    }
    rogue_put(r, VP_PKT_CONTROL, 0, 0, msg, len);
}

/* Services without end */
static void endless_offer(Rogue *r)
{
    static unsigned seed;

    services(r, 0, seed++, 1000);
    rogue_flush(r, 100);
}

/* Whole lists, each unlike the one before */
static void flapping_offer(Rogue *r)
{
    static unsigned seed;

    for (int i = 0; i < 50; i++) {
        services(r, VP_SERVICES_BEGIN | VP_SERVICES_END, seed++, i % 40);
    }
    rogue_flush(r, 100);
}

static void bad_offer(Rogue *r)
{
    static const uint8_t msg[] = { VP_MSG_SERVICES, 3, 4, 'a', '\n', 27, 'b' };

    rogue_put(r, VP_PKT_CONTROL, 0, 0, msg, sizeof(msg));
    rogue_flush(r, 100);
}

/* A session ends while it has many connections, all of which are reset */
static void crowd(Rogue *r)
{
    int64_t end = now_ms() + WAIT_MS;
    unsigned long answers = r->acked + r->refused + 200;

    for (int i = 0; i < 200; i++) {
        rogue_init(r, id++, "mute", 0);
        if (i % 50 == 49) {
            rogue_settle(r, WAIT_MS);
        }
    }
    while (r->up && r->acked + r->refused < answers && now_ms() < end) {
        rogue_settle(r, WAIT_MS);
    }
    rogue_put(r, 77, 0, 0, "x", 1);
    rogue_flush(r, 100);
}

/*
 * Nobody is left over here, and the target says much and doesn't read: all that
 * it says is read for nobody.
 */
static void talkers(Rogue *r)
{
    for (int i = 0; i < 4 && r->up; i++) {
        rogue_fill(r, ++id, "source");
        rogue_reset(r, id, VP_REASON_GONE);
    }
}

/* Messages of a later version, as long as can be */
static void later_messages(Rogue *r)
{
    static uint8_t msg[VP_PKT_DATA_LEN];

    for (int i = VP_MSG_PROGRAM + 1; i < 256; i++) {
        msg[0] = (uint8_t)i;
        rogue_put(r, VP_PKT_CONTROL, 0, id++, msg, sizeof(msg));
        rogue_flush(r, 100);
    }
}

/* More who say hello on the same channel */
static void others(Rogue *r)
{
    Rogue other;

    rogue_new(&other, r->where);
    other.peer.fd = dial(r->where, false);
    other.token = random64();
    rogue_hello(&other);
    rogue_flush(&other, 100);
    rogue_hang_up(&other);
}

/* What an attack leads to; README's SECURITY has the same */
typedef enum Reaction {
    GOES_ON,        /* ignored, or served as far as the limits go */
    REFUSED,        /* some connections are, and the rest goes on */
    SHAKES,         /* hands again, since the two are out of step */
    ENDS,           /* the session */
} Reaction;

static const struct {
    const char *name;
    void (*run)(Rogue *r);
    Reaction expect;
    bool unread;
} attacks[] = {
    { "opens", opens, REFUSED, false },
    { "opens to a target that is full", opens_half, REFUSED, false },
    { "opens of an unknown service", opens_unknown, REFUSED, false },
    { "open and reset", open_reset, GOES_ON, false },
    { "RESET storm", reset_storm, GOES_ON, false },
    { "ENDING storm", ending, GOES_ON, false },
    { "ENDING storm with data", ending_late, REFUSED, false },
    { "ids used again while they drain", drained, GOES_ON, false },
    { "tiny packets", tiny, GOES_ON, false },
    { "HELLO flood", hellos, SHAKES, false },
    { "one session after the other", sessions, SHAKES, false },
    { "one connection after the other", reconnects, SHAKES, false },
    { "PING flood, nothing read", pings, GOES_ON, true },
    { "PING flood", pings, GOES_ON, false },
    { "bogus acks", acks, SHAKES, false },
    { "credit overrun", overrun, ENDS, false },
    { "dead ids", dead_ids, GOES_ON, false },
    { "wild credit", wild_credit, GOES_ON, false },
    { "ids used again", reuse, ENDS, false },
    { "CLOSE twice", close_twice, ENDS, false },
    { "data after CLOSE", after_close, ENDS, false },
    { "CLOSE twice while it drains", close_drain, ENDS, false },
    { "data after CLOSE while it drains", after_drain, ENDS, false },
    { "data without data", no_data, ENDS, false },
    { "large", large, GOES_ON, false },
    { "larger than possible", larger, ENDS, false },
    { "as large as can be said", largest, ENDS, false },
    { "unknown types", types, ENDS, false },
    { "byte by byte", drops, SHAKES, false },
    { "a byte a second", slow, GOES_ON, false },
    { "rubbish", rubbish, SHAKES, false },
    { "no credit", no_credit, GOES_ON, false },
    { "reads nothing", reads_nothing, REFUSED, true },
    { "others on the same channel", others, GOES_ON, false },
    { "services without end", endless_offer, GOES_ON, false },
    { "services that come and go", flapping_offer, GOES_ON, false },
    { "a service with a bad name", bad_offer, ENDS, false },
    { "messages of a later version", later_messages, GOES_ON, false },
    { "many connections that end at once", crowd, ENDS, false },
    { "targets that talk to nobody", talkers, GOES_ON, false },
};

#define ATTACKS (COUNT_OF(attacks))

/* rogue_run() - attack until we are killed */
static void rogue_run(Scene *s, int attack)
{
    static Rogue r;

    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    rogue_new(&r, s->rogue_at);
    for (;;) {
        if (!r.up && !rogue_shake(&r, 5000)) {
            continue;
        }
        r.unread = attacks[attack].unread;
        attacks[attack].run(&r);
        rogue_flush(&r, 100);
        if (r.peer.fd >= 0 && !r.unread) {
            rogue_wait(&r, 0, NULL);
        }
    }
}

static void attacked(int attack, const Limits *limits)
{
    Scene s;

    scene_new(&s, limits);
    s.rogue = fork_child();
    if (s.rogue == 0) {
        raise(SIGSTOP);
        rogue_run(&s, attack);
    }
    innocent_fares(&s, attacks[attack].name, LEAST_SHARE);
    alive_check(&s);
    kill(s.rogue, SIGKILL);
}

/* Whatever the rogue does, the innocent has its throughput. */
START_TEST(attack)
{
    attacked(_i, &low);
}
END_TEST

/* The same with the limits that a daemon has by default, and much more */
START_TEST(attack_usual)
{
    attacked(_i, &usual);
}
END_TEST

/* kernel_kib() - held for the sockets of the rogue's channel */
static long kernel_kib(void)
{
    static const char key[] = " kernel_memory=";
    int64_t end = now_ms() + WAIT_MS;
    char path[PATH_LEN], buf[8192];
    const char *at = NULL;
    size_t len = 0;
    int fd;

    file_path(path, "monitor");
    fd = dial(path, true);
    send_all(fd, "batch\ninfo stats -k\n", 20);
    while ((at == NULL || strchr(at, '\n') == NULL) && now_ms() < end) {
        ssize_t n = recv(fd, buf + len, sizeof(buf) - 1 - len, 0);

        ck_assert_int_gt(n, 0);
        len += (size_t)n;
        buf[len] = '\0';
        at = strstr(buf, "stats channel=0 ");
    }
    close(fd);
    ck_assert_ptr_nonnull(at);
    at = strstr(at, key);
    ck_assert_ptr_nonnull(at);
    return atol(at + sizeof(key) - 1) / 1024;
}

/*
 * Targets that read nothing, of TCP (_i = 0) or unix sockets, of a rogue that
 * sends all that it may: the kernel doesn't hold MiBs for each of them, and the
 * innocent goes on.
 */
START_TEST(kernel_memory)
{
    enum { STUCK = 8, MOST_KIB = 300, SLACK_KIB = 92, CHANNEL_KIB = 1024 };
    static Rogue r;
    long kib, most = MOST_KIB;
    int room, fd = socket(AF_UNIX, SOCK_STREAM, 0);
    socklen_t len = sizeof(room);
    Scene s;

    /* a unix socket has what net.core.wmem_default says, 208 KiB mostly */
    ck_assert(getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, &len) == 0);
    close(fd);
    most = _i == 0 ? most : room / 1024 + SLACK_KIB;
    scene_new(&s, &low);
    rogue_new(&r, s.rogue_at);
    ck_assert(rogue_shake(&r, WAIT_MS));
    for (uint32_t i = 1; i <= STUCK; i++) {
        rogue_fill(&r, i, _i == 0 ? "deaf" : "mute");
        ck_assert(r.up && r.conn.ack);
    }
    kib = kernel_kib();
    printf("%ld KiB in the kernel for %d that don't read\n", kib, STUCK);
    ck_assert_int_le(kib, STUCK * most + CHANNEL_KIB);
    ck_assert_double_gt(innocent_gets(&s, ROUND_MS), 0);
    alive_check(&s);
    rogue_hang_up(&r);
}
END_TEST

/* What has no packet in it, and is sent before any HELLO */
enum { ZEROS, NOISE, HELLO_TYPES, BROKEN_HELLOS, FLOODS };

static const char *const floods[FLOODS] = {
    "zeros", "noise", "types of HELLO", "HELLOs with another payload",
};

/* flood_fill() - what is sent again and again */
static void flood_fill(int flood, uint8_t *buf, size_t len)
{
    static Peer peer;
    size_t n = 0;

    peer_setup(&peer);
    memset(buf, flood == HELLO_TYPES ? VP_PKT_HELLO : 0, len);
    if (flood == NOISE) {
        for (; n + 8 <= len; n += 8) {
            put64(buf + n, random64());
        }
    } else if (flood == BROKEN_HELLOS) {
        for (; n + VP_PKT_HDR_LEN <= len; n += VP_PKT_HDR_LEN) {
            uint8_t hello[VP_PKT_HDR_LEN + VP_HELLO_LEN];

            peer_put_hello(&peer, hello, 1, 0);
            memcpy(buf + n, hello, VP_PKT_HDR_LEN);
        }
    }
}

static void flood_run(const char *where, int flood)
{
    static uint8_t buf[256 * 1024];
    int fd = -1;

    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    flood_fill(flood, buf, sizeof(buf));
    for (;;) {
        fd = fd < 0 ? dial(where, true) : fd;
        if (send(fd, buf, sizeof(buf), MSG_NOSIGNAL) < 0) {
            close(fd);
            fd = -1;
        }
    }
}

/* Whatever comes before a handshake, the others hardly notice. */
START_TEST(flooded)
{
    Scene s;

    scene_new(&s, &usual);
    s.rogue = fork_child();
    if (s.rogue == 0) {
        raise(SIGSTOP);
        flood_run(s.rogue_at, _i);
    }
    innocent_fares(&s, floods[_i], LEAST_FLOODED);
    alive_check(&s);
    kill(s.rogue, SIGKILL);
}
END_TEST

/* refused() - was a connection? The peer isn't told if it reset it first. */
static bool refused(const Rogue *r, const Daemon *d)
{
    return r->refused > 0 || daemon_saw(d, ": connection refused: ");
}

/* The daemon does what is written of it, and nothing else. */
START_TEST(reaction)
{
    char options[4 * TEXT_LEN], where[PATH_LEN];
    static Rogue r;
    uint64_t token;
    bool ended;
    Daemon *d;

    targets_new(options, sizeof(options));
    file_path(where, "rogue");
    d = daemon_start("host", "-v -v -c unix-listen:%s:- "
                     "-o out:127.0.0.1:0 %s %s --grace 0", where, options,
                     low.options);
    d->hurried = true;
    daemon_wait(d, "out: listening");
    rogue_new(&r, where);
    ck_assert(rogue_shake(&r, WAIT_MS));
    token = r.peer.heard.token;
    r.unread = attacks[_i].unread;
    attacks[_i].run(&r);
    rogue_flush(&r, WAIT_MS);
    r.unread = false;
    if (attacks[_i].expect == SHAKES) {
        r.up = r.up && rogue_settle(&r, WAIT_MS);
        ck_assert(r.up || rogue_shake(&r, WAIT_MS));
    } else if (attacks[_i].expect == ENDS) {
        daemon_wait(d, "breaks the protocol");
        ck_assert(!rogue_settle(&r, WAIT_MS));
        ck_assert(rogue_shake(&r, WAIT_MS));
    } else {
        ck_assert(rogue_settle(&r, WAIT_MS));
        for (int i = 0; i < 1000 && attacks[_i].expect == REFUSED &&
             !refused(&r, d); i++) {
            rogue_settle(&r, WAIT_MS); /* the answers come behind the acks */
        }
        ck_assert(r.up);
    }
    ended = daemon_saw(d, "breaks the protocol");
    ck_assert_int_eq(ended, attacks[_i].expect == ENDS);
    ck_assert_int_eq(refused(&r, d), attacks[_i].expect == REFUSED);
    ck_assert_int_eq(token != r.peer.heard.token, attacks[_i].expect >= SHAKES);
    rogue_hang_up(&r);
}
END_TEST

/* ---- every packet in every state -------------------------------------- */

/* What a connection is like; those of the daemon's clients come last. */
typedef enum State {
    NONE,
    WAITS,          /* its target has not answered */
    WAITS_CLOSED,   /* nor since we said CLOSE */
    OPENED,
    EOF_CAME,       /* the target has shut down its direction */
    DRAINS,         /* we said CLOSE, the target has yet to read */
    OVER,           /* both have said CLOSE, the target has yet to read */
    ASKED,          /* a client's, not answered by us */
    SERVED,         /* a client's */
    STATES,
} State;

static int state_client(Rogue *r, const char *out)
{
    unsigned long before = r->asked;
    int fd = dial(out, false);

    for (int64_t end = now_ms() + WAIT_MS;
         r->asked == before && now_ms() < end;) {
        rogue_wait(r, 20, NULL);
    }
    ck_assert_uint_gt(r->asked, before);
    return fd;
}

/* state_reach() - have a connection in @state; its id */
static uint32_t state_reach(Rogue *r, State state, const char *out)
{
    uint32_t conn = 7;

    r->conn = (RogueConn){ .id = conn };
    switch (state) {
    case WAITS:
    case WAITS_CLOSED:
        rogue_init(r, conn, "full", 0);
        if (state == WAITS_CLOSED) {
            rogue_msg(r, conn, VP_MSG_CLOSE);
        }
        break;
    case OPENED:
    case EOF_CAME:
        /* without credit the target isn't read, nor its EOF seen */
        rogue_init(r, conn, state == OPENED ? "mute" : "half",
                   state == OPENED ? 0 : 1);
        rogue_until(r, &r->conn.ack, NULL);
        ck_assert(r->conn.ack);
        break;
    case DRAINS:
    case OVER:
        rogue_fill(r, conn, state == DRAINS ? "mute" : "half");
        rogue_msg(r, conn, VP_MSG_CLOSE);
        break;
    case ASKED:
    case SERVED:
        state_client(r, out);
        conn = r->asked_id;
        if (state == SERVED) {
            static const uint8_t ack[9] = { VP_MSG_CONNECT_ACK };

            rogue_put(r, VP_PKT_CONTROL, 0, conn, ack, sizeof(ack));
        }
        break;
    default:
        break;
    }
    if (state == EOF_CAME || state == OVER) {
        rogue_until(r, &r->conn.close, NULL);
        ck_assert(r->conn.close);
    }
    ck_assert(rogue_settle(r, WAIT_MS));
    return conn;
}

/* goes_on() - does the session, once the daemon has taken all? */
static bool goes_on(Rogue *r, Daemon *d)
{
    int64_t end = now_ms() + WAIT_MS;

    /* its next HELLO comes late then, the line in its log doesn't */
    while (r->up && now_ms() < end && !daemon_saw(d, "breaks the protocol")) {
        if (rogue_settle(r, 20)) {
            return true;
        }
    }
    return false;
}

#define IN(state) (1u << (state))
#define ANY (IN(STATES) - 1)
#define CONNECTED (ANY & ~IN(NONE))
#define OURS (IN(WAITS) | IN(WAITS_CLOSED) | IN(OPENED) | IN(EOF_CAME) | \
              IN(DRAINS))
#define CLIENTS (IN(ASKED) | IN(SERVED))
#define CLOSED (IN(WAITS_CLOSED) | IN(DRAINS))

/*
 * What can be said.  In the states of @ends it ends the session; in those of
 * @either it may or not, since nobody could tell.
 */
static const struct {
    const char *name;
    int type;               /* of a packet; 0: DATA from our side */
    size_t len;
    uint8_t data[16];
    unsigned ends, either;
} sayings[] = {
    /* a client's connection is not ours to open */
    { "INIT", VP_PKT_CONTROL, 14, { VP_MSG_CONNECT_INIT, 0, 0, 0, 0, 0, 0, 1,
      0, 4, 'm', 'u', 't', 'e' }, OURS | CLIENTS, 0 },
    { "INIT without a name", VP_PKT_CONTROL, 10, { VP_MSG_CONNECT_INIT },
      ANY, 0 },
    { "ACK", VP_PKT_CONTROL, 9, { VP_MSG_CONNECT_ACK, 0, 0, 0, 0, 0, 1 },
      0, 0 },
    { "short ACK", VP_PKT_CONTROL, 8, { VP_MSG_CONNECT_ACK }, ANY, 0 },
    { "REFUSED", VP_PKT_CONTROL, 2, { VP_MSG_CONNECT_REFUSED },
      ANY & ~CLIENTS, 0 },
    { "WINDOW", VP_PKT_CONTROL, 9, { VP_MSG_WINDOW, 0, 0, 0, 0, 0, 1 }, 0, 0 },
    { "WINDOW that falls", VP_PKT_CONTROL, 9, { VP_MSG_WINDOW }, 0, 0 },
    { "WINDOW that wraps", VP_PKT_CONTROL, 9, { VP_MSG_WINDOW, 0xff, 0xff,
      0xff, 0xff, 0xff, 0xff, 0xff, 0xff }, 0, 0 },
    { "long WINDOW", VP_PKT_CONTROL, 10, { VP_MSG_WINDOW }, ANY, 0 },
    { "CLOSE", VP_PKT_CONTROL, 1, { VP_MSG_CLOSE }, CLOSED, IN(OVER) },
    { "long CLOSE", VP_PKT_CONTROL, 2, { VP_MSG_CLOSE }, ANY, 0 },
    { "RESET", VP_PKT_CONTROL, 2, { VP_MSG_RESET }, 0, 0 },
    { "RESET, since it ends", VP_PKT_CONTROL, 2, { VP_MSG_RESET,
      VP_REASON_ENDING }, 0, 0 },
    { "RESET, since nobody is left", VP_PKT_CONTROL, 2, { VP_MSG_RESET,
      VP_REASON_GONE }, 0, 0 },
    { "RESET for no known reason", VP_PKT_CONTROL, 2, { VP_MSG_RESET, 99 },
      0, 0 },
    { "short RESET", VP_PKT_CONTROL, 1, { VP_MSG_RESET }, ANY, 0 },
    { "unknown message", VP_PKT_CONTROL, 2, { 7 }, ANY, 0 },
    { "message 0", VP_PKT_CONTROL, 2, { 0 }, ANY, 0 },
    { "no message", VP_PKT_CONTROL, 0, { 0 }, ANY, 0 },
    { "data", 0, 1, { 'x' }, CLOSED, IN(OVER) },
    { "no data", 0, 0, { 0 }, OURS | CLIENTS, IN(OVER) },
    { "unknown type", 7, 1, { 'x' }, ANY, 0 },
    { "last type", 255, 0, { 0 }, ANY, 0 },
    { "ACK packet", VP_PKT_ACK, 0, { 0 }, 0, 0 },
    { "ACK packet with data", VP_PKT_ACK, 16, { 'x' }, 0, 0 },
    { "PING packet with data", VP_PKT_PING, 16, { 'x' }, 0, 0 },
};

#define SAYINGS (COUNT_OF(sayings))

START_TEST(packet_in_state)
{
    static const char *const name[STATES] = {
        "none", "waits", "waits, closed", "open", "target's EOF", "drains",
        "over", "asked", "served",
    };
    char options[4 * TEXT_LEN], where[PATH_LEN];
    int what = _i % SAYINGS, type = sayings[what].type;
    State state = (State)(_i / SAYINGS);
    bool client = state == ASKED || state == SERVED;
    static Rogue r;
    uint32_t conn;
    Daemon *d;
    bool good;
    int fds;

    targets_new(options, sizeof(options));
    file_path(where, "rogue");
    d = daemon_start("host", "-c unix-listen:%s:- -o out:127.0.0.1:0 %s "
                     "--grace 0", where, options);
    d->hurried = true;
    rogue_new(&r, daemon_listens(d, "out") != NULL ? where : NULL);
    ck_assert(rogue_shake(&r, WAIT_MS));
    fds = daemon_fds(d);
    conn = state_reach(&r, state, daemon_listens(d, "out"));
    if (type == 0) {
        type = client ? VP_PKT_SERVER : VP_PKT_CLIENT;
    }
    rogue_put(&r, type, client ? 0 : VP_FLAG_CLIENT, conn, sayings[what].data,
              sayings[what].len);
    good = goes_on(&r, d);
    if (!(sayings[what].either & IN(state))) {
        ck_assert_msg(good == !(sayings[what].ends & IN(state)),
                      "%s, in state \"%s\": the session %s",
                      sayings[what].name, name[state],
                      good ? "goes on" : "ended");
    }
    ck_assert_int_eq(daemon_saw(d, "breaks the protocol"), !good);
    /* a connection that is reset takes its descriptor with it */
    if (!good || (sayings[what].type == VP_PKT_CONTROL &&
                  sayings[what].data[0] == VP_MSG_RESET &&
                  sayings[what].data[1] != VP_REASON_GONE)) {
        for (int64_t end = now_ms() + WAIT_MS;
             daemon_fds(d) > fds && now_ms() < end;) {
            sleep_ms(5);
        }
        ck_assert_int_le(daemon_fds(d), fds);
    }
    rogue_hang_up(&r);
}
END_TEST

/* ---- what must not be said -------------------------------------------- */

/*
 * late_window - nothing is said of a connection that the peer has ended
 *
 * It may have given its id to another, which would take the credit for its
 * own.  The target reads only then, so that there is credit to be given.
 */
START_TEST(late_window)
{
    static char buf[1 << 20];
    char where[PATH_LEN], path[PATH_LEN];
    static Rogue r;
    size_t got = 0;
    int listener, fd;
    Daemon *d;

    file_path(where, "rogue");
    file_path(path, "target");
    listener = listen_on(path, 10);
    d = daemon_start("host", "-c unix-listen:%s:- -i target:%s:-", where,
                     path);
    daemon_wait(d, "listening");
    rogue_new(&r, where);
    ck_assert(rogue_shake(&r, WAIT_MS));
    rogue_fill(&r, 1, "target");
    fd = accept_one(listener);
    set_nonblocking(fd);
    if (_i < 2) {
        rogue_reset(&r, 1, _i == 0 ? VP_REASON_ENDING : VP_REASON_GONE);
    } else {
        shutdown(fd, SHUT_WR);
        rogue_until(&r, &r.conn.close, NULL);
        ck_assert(r.conn.close);
        rogue_msg(&r, 1, VP_MSG_CLOSE);
    }
    rogue_init(&r, 1, "target", 1 << 20);
    r.conn = (RogueConn){ .id = 1 };
    ck_assert(rogue_settle(&r, WAIT_MS));
    for (int i = 0; i < 100; i++) {
        ssize_t n = recv(fd, buf, sizeof(buf), 0);

        got += n > 0 ? (size_t)n : 0;
        rogue_settle(&r, WAIT_MS);
    }
    ck_assert_uint_gt(got, VP_WINDOW_INIT);
    ck_assert(r.up && r.conn.ack);
    ck_assert_uint_eq(r.conn.credit, VP_WINDOW_INIT);
    ck_assert_uint_eq(r.conn.windows, 0);
    rogue_hang_up(&r);
}
END_TEST

/* ---- a million -------------------------------------------------------- */

/* million_run() - as fast as the answers come, which it reads */
static void million_run(const char *where)
{
    static Rogue r;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    raise(SIGSTOP);
    rogue_new(&r, where);
    while (tally->refused < MILLION) {
        unsigned long lost = r.refused;

        if (!r.up) {
            rogue_shake(&r, 5000);
            tally->sessions++;
            tally->sent = tally->refused;
            r.refused = lost;
        }
        while (r.up && tally->sent - r.refused < 600) {
            rogue_init(&r, id++, "full", 1 << 20);
            tally->sent++;
        }
        rogue_put(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        rogue_flush(&r, 1000);
        rogue_wait(&r, 0, NULL);
        if (r.up && tally->refused == r.refused) {
            struct pollfd pfd = { .fd = r.peer.fd, .events = POLLIN };

            poll(&pfd, 1, 20);
            rogue_read(&r);
        }
        tally->refused = r.refused;
    }
    tally->done = true;
    for (;;) {
        rogue_put(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        rogue_flush(&r, 1000);
        rogue_wait(&r, 50, NULL);
    }
}

/*
 * million - a million connections are asked for, as fast as can be
 *
 * So many are half open as may be, the others are refused.  Then somebody
 * comes who behaves, and is served.
 */
START_TEST(million)
{
    static Rogue r;
    int64_t end = now_ms() + 2 * WAIT_MS;
    bool served = false;
    Scene s;

    tally = mmap(NULL, sizeof(*tally), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(tally != MAP_FAILED);
    scene_new(&s, &low);
    s.rogue = fork_child();
    if (s.rogue == 0) {
        million_run(s.rogue_at);
    }
    innocent_fares(&s, "a million", LEAST_SHARE);
    while (!tally->done && now_ms() < end) {
        sleep_ms(20); /* else the rogue would have but a fifth of the time */
        fds_check(&s);
    }
    ck_assert_double_gt(innocent_gets(&s, ROUND_MS), 0);
    printf("sent %lu, refused %lu, sessions %lu\n", tally->sent,
           tally->refused, tally->sessions);
    ck_assert_uint_eq(tally->sessions, 1);
    ck_assert(tally->done);
    ck_assert_uint_ge(tally->refused, MILLION);
    kill(s.rogue, SIGKILL);
    rogue_new(&r, s.rogue_at);
    ck_assert(rogue_shake(&r, WAIT_MS));
    r.pkt.type = 0;
    rogue_init(&r, id, "source", 1 << 20);
    end = now_ms() + WAIT_MS;
    while (!served && now_ms() < end) {
        rogue_flush(&r, 100);
        rogue_wait(&r, 50, NULL);
        served = r.pkt.type == VP_PKT_SERVER && r.pkt.conn == id;
        rogue_put(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    ck_assert(served);
    alive_check(&s);
    rogue_hang_up(&r);
}
END_TEST

int main(void)
{
    Suite *suite = harness_suite("rogue");

    SUITE_LOOP(suite, reaction, ATTACKS);
    SUITE_LOOP(suite, packet_in_state, STATES * SAYINGS);
    SUITE_LOOP(suite, late_window, 3);
    SUITE_LOOP(suite, attack, ATTACKS);
    SUITE_LOOP(suite, flooded, FLOODS);
    SUITE_LOOP(suite, kernel_memory, 2);
    SUITE_LOOP(suite, attack_usual, ATTACKS);
    SUITE_ADD(suite, million);
    return harness_run(suite);
}
