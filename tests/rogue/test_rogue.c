/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_rogue.c - a daemon with one good channel and one whose peer is a rogue
 *
 * While the rogue does what it does as fast as it can, an innocent connection
 * on the other channel must go on, the daemon's memory stay within what the
 * formula allows, and its log short.  To tell the rogue's effect from the
 * machine's noise, the innocent's throughput is taken in turns, with the rogue
 * stopped and with the rogue running.
 */
#include "rogue.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define MAX_CONNS 400
#define HALF_OPEN 60
#define ROUNDS 12
#define GOOD_ROUNDS 2
#define ROUND_MS 120
#define LOG_LINES 260   /* that a few seconds of provocation may add */

/* What the innocent is sent, far below what is possible. */
#define PACE 8000               /* bytes per ms */
#define BLOCK 65536

typedef struct Scene {
    Daemon *host;           /* channel 0 has the rogue, 1 the innocent */
    Daemon *guest;
    char rogue_at[PATH_LEN];
    int innocent;           /* socket of its client */
    int deaf;               /* a target that never accepts */
    pid_t source;
    pid_t rogue;
    long rss;               /* of the host's daemon at the start, in KiB */
} Scene;

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
    long formula = (long)((VP_MEMORY_FIXED + MAX_CONNS * VP_MEMORY_CONN) /
                          1024);
    long peak = status_kib(s->host, "VmHWM:");

    ck_assert_msg(peak <= s->rss + formula + 1024, "%ld KiB after %ld, the "
                  "formula allows %ld", peak, s->rss, formula);
#else
    (void)s;
#endif
}

static void log_check(Daemon *d, int lines)
{
    int n = daemon_count(d, ".");

    ck_assert_msg(n <= lines, "%s logged %d lines", d->name, n);
}

/* alive_check() - the same daemon as before, and it answers */
static void alive_check(Scene *s)
{
    ck_assert_int_eq(kill(s->host->pid, 0), 0);
    memory_check(s);
    log_check(s->host, LOG_LINES);
}

/* ---- the scene -------------------------------------------------------- */

/* Somebody connected to the source, and what he was sent */
typedef struct Drain {
    int fd;
    int64_t since;
    int64_t sent;
} Drain;

/*
 * source_run() - a server that sends to whoever comes, at a steady pace
 *
 * Who has come short for a while is sent more then.
 */
static void source_run(int listener)
{
    static char block[BLOCK];
    bool paced = getenv("ROGUE_UNPACED") == NULL;
    Drain drains[64];
    int n = 0;

    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    set_nonblocking(listener);
    for (;;) {
        int fd = n < 64 ? accept(listener, NULL, NULL) : -1;
        bool moved = false;

        if (fd >= 0) {
            set_nonblocking(fd);
            drains[n++] = (Drain){ .fd = fd, .since = now_ms() };
        }
        for (int i = 0; i < n; i++) {
            Drain *d = &drains[i];
            ssize_t len = 0;

            if (!paced || d->sent < (now_ms() - d->since) * PACE) {
                len = send(d->fd, block, sizeof(block), 0);
            }
            d->sent += len > 0 ? len : 0;
            moved |= len > 0;
            if (len < 0 && errno != EAGAIN) {
                close(d->fd);
                drains[i--] = drains[--n];
            }
        }
        if (!moved) {
            sleep_ms(1);
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

static void scene_new(Scene *s)
{
    char link[PATH_LEN], full[PATH_LEN], source[TEXT_LEN], deaf[TEXT_LEN];
    int fd = listen_any(source);

    s->source = fork_child();
    if (s->source == 0) {
        source_run(fd);
    }
    close(fd);
    s->deaf = listen_any(deaf);
    file_path(s->rogue_at, "rogue");
    file_path(link, "good");
    file_path(full, "full");
    fd = listen_on(full, 0);
    dial(full, false); /* and now its queue is full */
    s->host = daemon_start("host", "-c unix-listen:%s:- -c unix-listen:%s:-:1 "
                           "-i deaf:%s -i full:%s:- -i source:%s "
                           "-o out:127.0.0.1:0 -i source:%s:1 --max-conns %d "
                           "--max-half-open %d", s->rogue_at, link, deaf, full,
                           source, source, MAX_CONNS, HALF_OPEN);
    daemon_wait(s->host, "ch0: oforward out: listening");
    s->guest = daemon_start("guest", "-c unix-connect:%s:- "
                            "-o source:127.0.0.1:0", link);
    daemon_wait(s->host, "ch1: channel up");
    s->innocent = dial(daemon_listens(s->guest, "source"), true);
    set_nonblocking(s->innocent);
    s->rss = status_kib(s->host, "VmRSS:");
    daemon_mark(s->host);
}

/* innocent_gets() - bytes in @ms, per second */
static double innocent_gets(Scene *s, int ms)
{
    static char buf[1 << 20];
    int64_t start = now_ms(), end = start + ms;
    double bytes = 0;

    while (now_ms() < end) {
        struct pollfd pfd = { .fd = s->innocent, .events = POLLIN };
        ssize_t n;

        poll(&pfd, 1, 10);
        n = recv(s->innocent, buf, sizeof(buf), 0);
        ck_assert_msg(n > 0 || (n < 0 && errno == EAGAIN),
                      "the innocent connection was lost");
        bytes += n > 0 ? (double)n : 0;
    }
    return bytes * 1000 / (double)(now_ms() - start);
}

/* ---- attacks: each is called again and again -------------------------- */

static uint32_t id;

static void opens(Rogue *r)
{
    for (int i = 0; i < 500; i++) {
        rogue_init(r, id++, "deaf", 1 << 20);
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

static void hellos(Rogue *r)
{
    for (int i = 0; i < 100; i++) {
        r->token = random64();
        rogue_hello(r, r->said);
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
    rogue_hello(r, r->said);
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
    r->expect += 1000;
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

/* A packet of the largest size that its header can name */
static void oversized(Rogue *r)
{
    static uint8_t big[UINT16_MAX - VP_PKT_HDR_LEN];

    rogue_put(r, VP_PKT_CLIENT, 0, id, big, sizeof(big));
    rogue_flush(r, 500);
}

static void types(Rogue *r)
{
    id++;
    rogue_put(r, 7 + (int)(id % 249), 0xff, id, "x", 1);
    rogue_flush(r, 100);
}

static void drops(Rogue *r)
{
    static const char byte[] = "q";

    if (send(r->fd, byte, 1, MSG_NOSIGNAL) < 0) {
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
    static const char *const service[] = { "source", "deaf", "full", "x" };

    for (int i = 0; i < 40; i++) {
        rogue_init(r, id++, service[i % 4], UINT64_MAX);
    }
    rogue_flush(r, 100);
    sleep_ms(20);
}

/* More who say hello on the same channel */
static void others(Rogue *r)
{
    Rogue other;

    rogue_new(&other, r->where);
    other.fd = dial(r->where, false);
    other.token = random64();
    rogue_hello(&other, other.said);
    rogue_flush(&other, 100);
    rogue_hang_up(&other);
}

static const struct {
    const char *name;
    void (*run)(Rogue *r);
    bool unread;
} attacks[] = {
    { "opens", opens, false },
    { "opens to a target that is full", opens_half, false },
    { "opens of an unknown service", opens_unknown, false },
    { "open and reset", open_reset, false },
    { "HELLO flood", hellos, false },
    { "one session after the other", sessions, false },
    { "one connection after the other", reconnects, false },
    { "PING flood, nothing read", pings, true },
    { "PING flood", pings, false },
    { "bogus acks", acks, false },
    { "credit overrun", overrun, false },
    { "dead ids", dead_ids, false },
    { "wild credit", wild_credit, false },
    { "ids used again", reuse, false },
    { "CLOSE twice", close_twice, false },
    { "data after CLOSE", after_close, false },
    { "data without data", no_data, false },
    { "oversized", oversized, false },
    { "unknown types", types, false },
    { "byte by byte", drops, false },
    { "rubbish", rubbish, false },
    { "no credit", no_credit, false },
    { "reads nothing", reads_nothing, true },
    { "others on the same channel", others, false },
};

/* rogue_run() - attack until we are killed */
static void rogue_run(Scene *s, int attack)
{
    static Rogue r;

    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    /* it must not take from the others what the daemon doesn't give it */
    setpriority(PRIO_PROCESS, 0, 19);
    rogue_new(&r, s->rogue_at);
    for (;;) {
        if (!r.up && !rogue_shake(&r, 5000)) {
            continue;
        }
        r.unread = attacks[attack].unread;
        attacks[attack].run(&r);
        rogue_flush(&r, 100);
        if (r.fd >= 0 && !r.unread) {
            rogue_wait(&r, 0, NULL);
        }
    }
}

/*
 * attack - whatever the rogue does, the innocent has its throughput
 *
 * A machine that is busy with something else spoils a round now and then, a
 * daemon that lets the innocent starve spoils them all.
 */
START_TEST(attack)
{
    Scene s;
    double with = 0, without = 0;
    int good = 0;

    scene_new(&s);
    s.rogue = fork_child();
    if (s.rogue == 0) {
        rogue_run(&s, _i);
    }
    innocent_gets(&s, 100);
    for (int i = 0; good < GOOD_ROUNDS && i < ROUNDS; i++) {
        kill(s.rogue, SIGSTOP);
        innocent_gets(&s, 40);
        without = innocent_gets(&s, ROUND_MS);
        kill(s.rogue, SIGCONT);
        innocent_gets(&s, 20);
        with = innocent_gets(&s, ROUND_MS);
        good += with >= 0.8 * without;
    }
    printf("%s: %.1f MB/s, else %.1f, %ld KiB, %d lines\n",
           attacks[_i].name, with / 1e6, without / 1e6,
           status_kib(s.host, "VmHWM:") - s.rss, daemon_count(s.host, "."));
    ck_assert_msg(good == GOOD_ROUNDS, "%s: the innocent gets %.1f MB/s "
                  "instead of %.1f", attacks[_i].name, with / 1e6,
                  without / 1e6);
    alive_check(&s);
    kill(s.rogue, SIGKILL);
}
END_TEST

/*
 * million - a million connections are asked for, as fast as can be
 *
 * So many are half open as may be, others are refused, and a peer that doesn't
 * care for answers loses its session.  Then it behaves, and is served.
 */
START_TEST(million)
{
    static Rogue r;
    bool served = false;
    Scene s;
    int fds;

    scene_new(&s);
    fds = daemon_fds(s.host);
    rogue_new(&r, s.rogue_at);
    ck_assert(rogue_shake(&r, WAIT_MS));
    for (int i = 0; i < 1000000; i++) {
        rogue_init(&r, id++, "full", 1 << 20);
        if (i % 10000 == 0) {
            ck_assert_int_le(daemon_fds(s.host), fds + HALF_OPEN + 2);
            r.up = r.up || rogue_shake(&r, 100);
        }
    }
    rogue_flush(&r, WAIT_MS);
    ck_assert_double_gt(innocent_gets(&s, 100), 0);
    ck_assert(rogue_shake(&r, WAIT_MS));
    r.pkt.type = 0;
    rogue_init(&r, id, "source", 1 << 20);
    for (int i = 0; i < 100 && !served; i++) {
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
    Suite *suite = suite_create("rogue");

    HARNESS_ADD(suite, attack, (int)(sizeof(attacks) / sizeof(attacks[0])));
    HARNESS_ADD(suite, million, 1);
    return harness_run(suite);
}
