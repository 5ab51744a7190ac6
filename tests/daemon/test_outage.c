/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_outage.c - a TCP channel whose relay fails in every way that it can
 *
 * A relay is what users put between daemons that can't reach each other: an
 * ssh -L, a socat, a NAT.  Here it is a process of ours on a fixed port, which
 * is killed, stopped or mistreats its connections, while real programs or
 * checked bytes are on their way through it.
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/lib/harness.h"
#include "names.h"
#include "programs.h"
#include "traffic.h"

#define MIB (UINT64_C(1) << 20)

/* --- the relay ---------------------------------------------------------- */

/* A relay from one port of loopback to another */
typedef struct Line {
    int port;
    int target;
    pid_t pid;
} Line;

/* What it does with those that connect */
typedef enum LineMode {
    LINE_PASS,                  /* one at a time */
    LINE_SLAM,                  /* closes at once */
} LineMode;

/* One direction */
typedef struct Way {
    char buf[65536];
    size_t start, end;
} Way;

static volatile sig_atomic_t freeze;

static void on_signal(int sig)
{
    (void)sig;
    freeze = 1;
}

static int line_connect(int port)
{
    struct sockaddr_in in = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&in, sizeof(in)) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* line_move() - returns false when one of the ends is lost */
static bool line_move(int from, int to, Way *w)
{
    ssize_t n;

    if (w->end == 0) {
        n = read(from, w->buf, sizeof(w->buf));
        if (n > 0) {
            w->end = (size_t)n;
        } else if (n == 0 || errno != EAGAIN) {
            return false;
        }
    }
    if (w->end > 0) {
        n = send(to, w->buf + w->start, w->end - w->start, MSG_NOSIGNAL);
        if (n < 0) {
            return errno == EAGAIN;
        }
        w->start += (size_t)n;
        if (w->start == w->end) {
            w->start = w->end = 0;
        }
    }
    return true;
}

/*
 * line_run() - the relay's life
 *
 * Told to freeze, it closes the end that has connected and keeps the other as
 * it is, unread: a daemon that listens there can't know that its peer is gone.
 */
static void line_run(int listener, int target, LineMode mode)
{
    static Way way[2];
    int fd[2] = { -1, -1 };

    for (;;) {
        struct pollfd p[3] = { { .fd = -1, .events = POLLIN } };

        if (fd[0] < 0) {
            p[0].fd = listener;
        }
        for (int i = 0; i < 2; i++) {
            p[1 + i].fd = fd[i];
            p[1 + i].events = (short)((way[i].end == 0 ? POLLIN : 0) |
                                      (way[1 - i].end > 0 ? POLLOUT : 0));
        }
        poll(p, 3, 100);
        if (freeze && fd[0] >= 0) {
            close(fd[0]);
            fd[0] = fd[1] = -1;
            freeze = 0;
        } else if (fd[0] >= 0) {
            if (!line_move(fd[0], fd[1], &way[0]) ||
                !line_move(fd[1], fd[0], &way[1])) {
                close(fd[0]);
                close(fd[1]);
                fd[0] = fd[1] = -1;
            }
        } else if (p[0].revents) {
            fd[0] = accept(listener, NULL, NULL);
            fd[1] = mode == LINE_PASS ? line_connect(target) : -1;
            if (fd[0] < 0 || fd[1] < 0) {
                close(fd[0]);
                fd[0] = -1;
                continue;
            }
            set_nonblocking(fd[0]);
            set_nonblocking(fd[1]);
            memset(way, 0, sizeof(way));
        }
    }
}

static void line_start(Line *l, LineMode mode)
{
    char where[TEXT_LEN];
    int listener;

    text_format(where, sizeof(where), "127.0.0.1:%d", l->port);
    listener = listen_on(where, 5);
    l->pid = fork();
    ck_assert(l->pid >= 0);
    if (l->pid == 0) {
        struct sigaction sa = { .sa_handler = on_signal };

        child_fds(&listener, 1);
        sigaction(SIGUSR1, &sa, NULL);
        line_run(listener, l->target, mode);
    }
    child_add(l->pid);
    close(listener);
}

static void line_kill(Line *l)
{
    kill(l->pid, SIGKILL);
    child_wait(l->pid);
}

/* line_pair() - two daemons with a relay in between; the channel is up then */
static void line_pair(Line *l, Daemon *d[2], const char *name,
                      const char *host_options, const char *guest_options)
{
    char names[2][40];

    text_format(names[0], sizeof(names[0]), "host-%s", name);
    text_format(names[1], sizeof(names[1]), "guest-%s", name);
    l->port = free_port();
    l->target = free_port();
    line_start(l, LINE_PASS);
    d[0] = daemon_start(names[0], "-c tcp-listen:127.0.0.1:%d %s", l->target,
                        host_options);
    d[1] = daemon_start(names[1], "-c tcp-connect:127.0.0.1:%d %s", l->port,
                        guest_options);
    daemon_up(d[0]);
    daemon_up(d[1]);
}

/* --- gone for 20 s, with ssh and rsync running through it ---------------- */

#define GONE_MS 20000
#define FILE_SIZE 6000000       /* of what rsync moves, at RSYNC_RATE */
#define RSYNC_RATE 1000         /* KiB/s */
#define TICKS 240               /* lines that ssh carries, 0.1 s apart */

typedef enum Outage {
    KILLED,                     /* connections end, new ones are refused */
    SILENT,                     /* nothing ends, nothing moves */
    SLAMMED,                    /* new ones are closed at once */
    OUTAGES
} Outage;

static const char *const outage_name[OUTAGES] = {
    "killed", "silent", "slammed",
};

static void outage_begin(Line *l, Outage outage)
{
    if (outage == SILENT) {
        kill(l->pid, SIGSTOP);
    } else {
        line_kill(l);
    }
    if (outage == SLAMMED) {
        line_start(l, LINE_SLAM);
    }
}

static void outage_end(Line *l, Outage outage)
{
    if (outage == SILENT) {
        kill(l->pid, SIGCONT);
        return;
    }
    if (outage == SLAMMED) {
        line_kill(l);
    }
    line_start(l, LINE_PASS);
}

static off_t file_size(const char *name)
{
    char path[PATH_LEN];
    struct stat st;

    file_path(path, name);
    return stat(path, &st) == 0 ? st.st_size : 0;
}

/* file_reaches() - wait until it has grown to that size */
static void file_reaches(const char *name, off_t size)
{
    int64_t end = now_ms() + WAIT_MS;

    while (file_size(name) < size) {
        ck_assert_msg(now_ms() < end, "%s does not grow", name);
        sleep_ms(20);
    }
}

static void files_equal(const char *a, const char *b)
{
    command_wait(command_start("cmp", "cd %s && cmp %s %s", vp_dir, a, b));
}

/*
 * use() - rsync to the far side and from it, and lines there and back by ssh
 *
 * All three log in, and then wait for started(): a busy machine takes seconds
 * for that, and the first would have ended before the last has begun.
 */
static void use(const char *name, int port, pid_t pids[3])
{
    static const char go[] = "until [ -e go ]; do sleep 0.1; done";
    char label[TEXT_LEN];

    text_format(label, sizeof(label), "%s-up", name);
    pids[0] = command_start(label,
        "cd %s && rsync --inplace --bwlimit=%d -e 'ssh -F %s/ssh_config -p %d'"
        " --rsync-path='cd %s; echo in > %s.in; %s; rsync'"
        " file localhost:%s/%s.up", vp_dir, RSYNC_RATE, vp_dir, port, vp_dir,
        label, go, vp_dir, name);
    text_format(label, sizeof(label), "%s-down", name);
    pids[1] = command_start(label,
        "cd %s && rsync --inplace --bwlimit=%d -e 'ssh -F %s/ssh_config -p %d'"
        " --rsync-path='cd %s; echo in > %s.in; %s; rsync'"
        " localhost:%s/file %s.down", vp_dir, RSYNC_RATE, vp_dir, port,
        vp_dir, label, go, vp_dir, name);
    text_format(label, sizeof(label), "%s-ssh", name);
    pids[2] = command_start(label,
        "cd %s && (%s; for i in $(seq %d); do echo $i; sleep 0.1; done) | "
        "ssh -F ssh_config localhost -p %d 'echo in > %s/%s.in; cat'"
        " > %s.ticks", vp_dir, go, TICKS, port, vp_dir, label, name);
}

/* started() - all programs are logged in, and begin */
static void started(void)
{
    static const char *const uses[] = { "up", "down", "ssh" };
    char file[TEXT_LEN], path[PATH_LEN];

    for (int i = 0; i < OUTAGES; i++) {
        for (int k = 0; k < COUNT_OF(uses); k++) {
            text_format(file, sizeof(file), "%s-%s.in", outage_name[i],
                        uses[k]);
            file_wait(file, "in\n");
        }
    }
    file_path(path, "go");
    file_write(path, "", 0);
}

/*
 * The relay is away for 20 s, in three ways, each with a pair of daemons of
 * its own, and comes back: ssh and rsync go on as if nothing had been.
 */
START_TEST(gone)
{
    static unsigned char data[FILE_SIZE];
    char ssh[TEXT_LEN], option[2 * TEXT_LEN], path[PATH_LEN], file[TEXT_LEN];
    pid_t pids[OUTAGES][3];
    Daemon *d[OUTAGES][2];
    Line line[OUTAGES];
    int status;

    if (!has_ssh()) {
        PASS_OVER(HAS_SSH);
    }
    sshd_start(ssh);
    file_path(path, "file");
    bytes_fill(data, sizeof(data), 1, 0);
    file_write(path, data, sizeof(data));
    command_wait(command_start("seq", "seq %d > %s/ticks", TICKS, vp_dir));
    text_format(option, sizeof(option), "-i ssh:%s", ssh);
    for (int i = 0; i < OUTAGES; i++) {
        line_pair(&line[i], d[i], outage_name[i], option,
                  "-o ssh:127.0.0.1:0");
        use(outage_name[i], port_of(daemon_listens(d[i][1], "ssh")), pids[i]);
    }
    started();
    for (int i = 0; i < OUTAGES; i++) {
        text_format(file, sizeof(file), "%s.up", outage_name[i]);
        file_reaches(file, FILE_SIZE / 6);
        text_format(file, sizeof(file), "%s.down", outage_name[i]);
        file_reaches(file, FILE_SIZE / 6);
        text_format(file, sizeof(file), "%s.ticks", outage_name[i]);
        file_reaches(file, 10);
    }
    for (Outage i = 0; i < OUTAGES; i++) {
        outage_begin(&line[i], i);
    }
    sleep_ms(GONE_MS);
    for (Outage i = 0; i < OUTAGES; i++) {
        for (int k = 0; k < 3; k++) {
            ck_assert_msg(waitpid(pids[i][k], &status, WNOHANG) == 0,
                          "%s: program %d has ended, status %#x",
                          outage_name[i], k, (unsigned)status);
        }
        outage_end(&line[i], i);
    }
    for (int i = 0; i < OUTAGES; i++) {
        for (int k = 0; k < 3; k++) {
            command_wait(pids[i][k]);
        }
        text_format(file, sizeof(file), "%s.up", outage_name[i]);
        files_equal("file", file);
        text_format(file, sizeof(file), "%s.down", outage_name[i]);
        files_equal("file", file);
        text_format(file, sizeof(file), "%s.ticks", outage_name[i]);
        files_equal("ticks", file);
        for (int k = 0; k < 2; k++) {
            ck_assert_int_eq(daemon_count(d[i][k], "new session"), 1);
            ck_assert_msg(i == SILENT ||
                          daemon_saw(d[i][k], "session resumed"),
                          "%s: the channel was never lost", d[i][k]->name);
        }
    }
}
END_TEST

/* --- half dead ---------------------------------------------------------- */

/*
 * The daemon that listens holds a connection that is dead without having
 * ended, as after a NAT forgot it.  The peer connects anew and takes over: the
 * same session goes on, with a key and without, and not a byte is missing.
 */
START_TEST(half_dead)
{
    char option[2][3 * TEXT_LEN], key[PATH_LEN + 16] = "", path[PATH_LEN];
    const char *where;
    Daemon *d[2];
    Line line;
    Traffic t;

    traffic_init(&t);
    if (_i) {
        file_path(path, "key");
        file_write(path, "0123456789abcdef0123", 20);
        ck_assert(chmod(path, 0600) == 0);
        text_format(key, sizeof(key), "-k %s", path);
    }
    text_format(option[0], sizeof(option[0]), "-o s:127.0.0.1:0 %s", key);
    text_format(option[1], sizeof(option[1]), "-i s:%s %s",
                traffic_listen(&t), key);
    line_pair(&line, d, "half", option[0], option[1]);
    where = daemon_listens(d[0], "s");
    for (int i = 0; i < 4; i++) {
        traffic_add(&t, where, 0, i & 1 ? 24 * MIB : 1000,
                    i & 2 ? 24 * MIB : 1000);
    }
    for (int round = 1; round <= 3; round++) {
        uint64_t before = traffic_moved(&t);
        int64_t end = now_ms() + WAIT_MS;

        while (traffic_moved(&t) < before + 4 * MIB) {
            ck_assert_msg(now_ms() < end, "nothing moves");
            traffic_run(&t, traffic_never, 1);
        }
        kill(line.pid, SIGUSR1);
        while (daemon_count(d[0], "replaced by a new connection") < round ||
               daemon_count(d[1], "session resumed") < round) {
            ck_assert_msg(now_ms() < end, "it is never replaced");
            traffic_run(&t, traffic_never, 10);
        }
    }
    ck_assert_msg(traffic_run(&t, traffic_done, 3 * WAIT_MS),
                  "flows hang after %llu bytes",
                  (unsigned long long)traffic_moved(&t));
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(daemon_count(d[i], "channel up: new session"), 1);
        ck_assert_int_eq(daemon_count(d[i], "turned away"), 0);
    }
    traffic_free(&t);
}
END_TEST

/* --- gone without a word ------------------------------------------------ */

/*
 * Nothing gets through any more, and nobody says so: neither side calls that
 * up, and the connections don't outlive --grace, on the side that listens and
 * on the other one.  Once something gets through there is a new session.
 */
START_TEST(gone_without_a_word)
{
    char in[PATH_LEN], out[PATH_LEN];
    int port, listener, client, server;
    Daemon *d[2];

    if (!own_network()) {
        PASS_OVER(OWN_NETWORK);
    }
    port = free_port();
    file_path(in, "in");
    file_path(out, "out");
    listener = listen_on(in, 5);
    d[0] = daemon_start("host", "-c tcp-listen:127.0.0.1:%d -o s:%s:- "
                        "--grace 1", port, out);
    d[1] = daemon_start("guest", "-c tcp-connect:127.0.0.1:%d -i s:%s:- "
                        "--grace 1", port, in);
    daemon_up(d[0]);
    daemon_up(d[1]);
    client = dial(out, true);
    server = accept_one(listener);
    send_all(client, "a", 1);
    expect_bytes(server, "a");
    own_network_set(false);
    for (int i = 0; i < 2; i++) {
        daemon_wait(d[i], "channel down: no answer$");
        daemon_wait(d[i], "no channel for 1 s: session ended$");
        daemon_mark(d[i]);
    }
    expect_eof(client);
    expect_eof(server);
    own_network_set(true);
    for (int i = 0; i < 2; i++) {
        daemon_wait(d[i], "channel up: new session$");
    }
    client = dial(out, true);
    send_all(client, "b", 1);
    expect_bytes(accept_one(listener), "b");
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("outage");

    SUITE_ADD(s, gone);
    SUITE_LOOP(s, half_dead, 2);
    SUITE_ADD(s, gone_without_a_word);
    return harness_run(s);
}
