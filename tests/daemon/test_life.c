/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_life.c - daemons that start, wait, die, come back and meet strangers
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "tests/lib/engine.h"
#include "traffic.h"

#define MIB (UINT64_C(1) << 20)

/* Lines a daemon may spend on a state that lasts */
#define FEW_LINES 6

static void finish(Traffic *t)
{
    t->hold = false;
    ck_assert_msg(traffic_run(t, traffic_done, 3 * WAIT_MS),
                  "flows hang after %llu bytes",
                  (unsigned long long)traffic_moved(t));
}

/* check_works() - a new connection carries data both ways, to its end */
static void check_works(Traffic *t, const char *where)
{
    traffic_add(t, where, 0, 100000, 100000);
    finish(t);
}

/* reach() - run until so many bytes have been received in all */
static void reach(Traffic *t, uint64_t bytes)
{
    int64_t end = now_ms() + WAIT_MS;

    while (traffic_moved(t) < bytes) {
        ck_assert_msg(now_ms() < end, "nothing moves");
        traffic_run(t, traffic_never, 10);
    }
}

static void move(Traffic *t, uint64_t more)
{
    reach(t, traffic_moved(t) + more);
}

/* --- kill -9 ------------------------------------------------------------ */

/* Daemons that are started again with the same options, port included */
typedef struct Restart {
    Channel channel;
    Daemon *daemon[2];          /* host, guest */
    char options[2][TEXT_LEN];
    char where[TEXT_LEN];
} Restart;

static void restart_one(Restart *r, int which)
{
    r->daemon[which] = daemon_start(which ? "guest" : "host", "-c %s %s",
                                    r->channel.option[which],
                                    r->options[which]);
}

/* every_end_is_reset() - of the flows from first on; then they are done with */
static void every_end_is_reset(Traffic *t, size_t first)
{
    ck_assert_msg(traffic_run(t, traffic_ended, 2 * WAIT_MS),
                  "not all connections of a dead session were reset");
    for (size_t i = first; i < t->n_flows; i++) {
        Flow *f = &t->flows[i];

        for (int s = 0; s < 2; s++) {
            ck_assert_msg(f->side[s].error == ECONNRESET,
                          "flow %zu, side %d: %s where a reset was due", i, s,
                          f->side[s].error ? strerror(f->side[s].error) :
                          "end of data");
        }
        f->waived = true;
    }
}

/* Who is killed: HOST, GUEST, or one right after the other */
enum { HOST = 1, GUEST = 2, BOTH = HOST | GUEST };

static const int victims[] = { HOST, GUEST, BOTH };

static void restart_init(Restart *r, ChannelKind kind, Traffic *t)
{
    traffic_init(t);
    channel_make(&r->channel, kind, "channel");
    text_format(r->where, sizeof(r->where), "127.0.0.1:%d", free_port());
    text_format(r->options[0], TEXT_LEN, "-o s:%s", r->where);
    text_format(r->options[1], TEXT_LEN, "-i s:%s", traffic_listen(t));
    restart_one(r, 0);
    restart_one(r, 1);
    daemon_up(r->daemon[0]);
    daemon_up(r->daemon[1]);
}

/*
 * restart_round() - kill in the middle of transfers of all shapes
 *
 * Every client and server gets a reset, also those of the one that was killed,
 * never an end of data that makes a part look like the whole.  Returns after
 * how many ms new connections had worked.
 */
static int64_t restart_round(Restart *r, Traffic *t, int who, uint64_t bytes)
{
    size_t first = t->n_flows;
    int64_t start;

    t->hold = true;
    for (int i = 0; i < 8; i++) {
        traffic_add(t, r->where, 0, i & 1 ? FOREVER : 100,
                    i & 2 ? FOREVER : 100);
    }
    ck_assert(traffic_run(t, traffic_paired, WAIT_MS));
    move(t, bytes);
    for (int i = 0; i < 2; i++) {
        if (who >> i & 1) {
            daemon_kill(r->daemon[i]);
        }
    }
    start = undelayed_ms((Daemon *[]) { who & HOST ? NULL : r->daemon[0],
                                        who & GUEST ? NULL : r->daemon[1] },
                         2);
    for (int i = 0; i < 2; i++) {
        if (who >> i & 1) {
            restart_one(r, i);
        }
    }
    daemon_listens(r->daemon[0], "s");
    every_end_is_reset(t, first);
    check_works(t, r->where);
    start = undelayed_ms(r->daemon, 2) - start;
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(daemon_count(r->daemon[i], "session resumed"), 0);
    }
    return start;
}

static const ChannelKind killed_kinds[] = {
    CHANNEL_UNIX, CHANNEL_TCP, CHANNEL_VIRTSERIAL, CHANNEL_QEMU_VIRTSERIAL,
    CHANNEL_QEMU_ISASERIAL,
};

/*
 * Either daemon or both are killed, on every kind of channel.  New connections
 * work within a second of the restart, in the best of some rounds.
 */
START_TEST(killed)
{
    int64_t best = INT64_MAX, ms;
    Restart r;
    Traffic t;

    restart_init(&r, killed_kinds[_i / COUNT_OF(victims)], &t);
    for (int round = 0; round < 2 || (round < 6 && best > 1000); round++) {
        ms = restart_round(&r, &t, victims[_i % COUNT_OF(victims)], MIB);
        best = ms < best ? ms : best;
    }
    ck_assert_msg(best <= 1000, "works again only after %d ms", (int)best);
    traffic_free(&t);
    ck_assert_int_lt(daemon_fds(r.daemon[0]), 40);
    ck_assert_int_lt(daemon_fds(r.daemon[1]), 40);
}
END_TEST

/* A hundred times in a row, the one, the other and both in turn. */
START_TEST(killed_often)
{
    Restart r;
    Traffic t;

    restart_init(&r, CHANNEL_UNIX, &t);
    for (int round = 0; round < 100; round++) {
        restart_round(&r, &t, victims[round % COUNT_OF(victims)],
                      (uint64_t)(50000 + 7919 * round));
    }
    traffic_free(&t);
    ck_assert_int_lt(daemon_fds(r.daemon[0]), 40);
    ck_assert_int_lt(daemon_fds(r.daemon[1]), 40);
}
END_TEST

/* Both daemons live, the channel is cut in mid-transfer: nobody notices. */
START_TEST(cut)
{
    char option[TEXT_LEN];
    Traffic t;
    Pair p;

    traffic_init(&t);
    text_format(option, sizeof(option), "-i s:%s", traffic_listen(&t));
    pair_start(&p, CHANNEL_CABLE, "-o s:127.0.0.1:0", option);
    for (int i = 0; i < 4; i++) {
        traffic_add(&t, daemon_listens(p.host, "s"), 0, 48 * MIB, 48 * MIB);
    }
    for (int i = 0; i < 3; i++) {
        move(&t, 8 * MIB);
        relay_tell(&p.channel.relay, RELAY_CUT);
        move(&t, 8 * MIB);
    }
    ck_assert_int_eq(daemon_count(p.host, "channel up: new session"), 1);
    ck_assert_int_ge(daemon_count(p.host, "channel up: session resumed"), 1);
    ck_assert_int_ge(daemon_count(p.guest, "channel down: "), 1);
    finish(&t);
    traffic_free(&t);
}
END_TEST

/* No channel for longer than --grace: connections are reset, new ones too. */
START_TEST(grace)
{
    char path[PATH_LEN];
    Traffic t;
    Daemon *host, *guest;
    const char *where;

    traffic_init(&t);
    file_path(path, "channel");
    host = daemon_start("host", "-c unix-connect:%s:- -o s:127.0.0.1:0 "
                        "--grace %d", path, _i);
    where = daemon_listens(host, "s");
    dial_reset(where);
    guest = daemon_start("guest", "-c unix-listen:%s:- -i s:%s --grace %d",
                         path, traffic_listen(&t), _i);
    daemon_up(host);
    t.hold = true;
    for (int i = 0; i < 4; i++) {
        traffic_add(&t, where, 0, 100, 100);
    }
    ck_assert(traffic_run(&t, traffic_paired, WAIT_MS));
    reach(&t, 4 * 200);
    daemon_kill(guest);
    every_end_is_reset(&t, 0);
    daemon_start("guest", "-c unix-listen:%s:- -i s:%s", path, t.where[0]);
    daemon_mark(host);
    daemon_up(host);
    check_works(&t, where);
    traffic_free(&t);
}
END_TEST

/* --- one end without the other ------------------------------------------ */

/*
 * On every kind of channel one end is alone for some time (minutes in life),
 * which costs no CPU time and no flood of lines; when the other comes,
 * connections work, those included that were made before.
 */
START_TEST(alone)
{
    static const ChannelKind kinds[] = {
        CHANNEL_UNIX, CHANNEL_TCP, CHANNEL_VIRTSERIAL,
        CHANNEL_QEMU_VIRTSERIAL, CHANNEL_QEMU_ISASERIAL, CHANNEL_ISASERIAL,
        CHANNEL_FD,
    };
    const int first = _i;               /* 0: the host, which has the client */
    Channel channels[COUNT_OF(kinds)];
    Daemon *daemons[2][COUNT_OF(kinds)];
    const char *target;
    Traffic t;

    traffic_init(&t);
    target = traffic_listen(&t);
    for (int i = 0; i < COUNT_OF(kinds); i++) {
        channel_make(&channels[i], kinds[i], channel_kind_name(kinds[i]));
    }
    for (int turn = 0; turn < 2; turn++) {
        int which = turn ? !first : first;

        for (int i = 0; i < COUNT_OF(kinds); i++) {
            char name[40];

            text_format(name, sizeof(name), "%s-%s", which ? "guest" : "host",
                        channel_kind_name(kinds[i]));
            daemons[which][i] = daemon_start_with(
                &channels[i].start[which], name, "-c %s %s%s",
                channels[i].option[which], which ? "-i s:" : "-o s:127.0.0.1:",
                which ? target : "0");
        }
        if (which == 0) {
            for (int i = 0; i < COUNT_OF(kinds); i++) {
                traffic_add(&t, daemon_listens(daemons[0][i], "s"), 0, 300000,
                            300000);
            }
        }
        if (turn == 0) {
            for (int i = 0; i < COUNT_OF(kinds); i++) {
                daemon_wait(daemons[which][i], "ch0: ");
            }
            traffic_run(&t, traffic_never, 500);
            daemons_idle(daemons[which], COUNT_OF(kinds));
            for (int i = 0; i < COUNT_OF(kinds); i++) {
                ck_assert_msg(daemon_count(daemons[which][i], ".") <=
                              FEW_LINES, "%s: too many lines about a channel "
                              "that isn't there", daemons[which][i]->name);
            }
        }
    }
    finish(&t);
    for (int i = 0; i < COUNT_OF(kinds); i++) {
        check_works(&t, daemon_listens(daemons[0][i], "s"));
    }
    traffic_free(&t);
}
END_TEST

/*
 * QEMU's client leaves a virtio port in mid-transfer and comes back: to the
 * guest that is a state, not an end; nothing is lost, nothing spins.
 */
START_TEST(host_away)
{
    char options[TEXT_LEN];
    const char *where;
    Traffic t;
    Pair p;

    traffic_init(&t);
    text_format(options, sizeof(options), "-i s:%s", traffic_listen(&t));
    pair_start(&p, CHANNEL_QEMU_VIRTSERIAL, "-o s:127.0.0.1:0", options);
    where = daemon_listens(p.host, "s");
    for (int i = 0; i < 4; i++) {
        traffic_add(&t, where, 0, 24 * MIB, 24 * MIB);
    }
    move(&t, 4 * MIB);
    relay_tell(&p.channel.relay, RELAY_AWAY);
    daemon_wait(p.host, "channel down");
    traffic_settle(&t);
    daemons_idle((Daemon *[]) { p.host, p.guest }, 2);
    traffic_add(&t, where, 0, 1000, 1000);
    relay_tell(&p.channel.relay, RELAY_GO);
    finish(&t);
    ck_assert_int_eq(daemon_count(p.host, "new session"), 1);
    traffic_free(&t);
}
END_TEST

/* What is named by -c comes into being only later. */
START_TEST(device_appears)
{
    char path[PATH_LEN];
    Traffic t;
    Channel c;
    Daemon *host;

    traffic_init(&t);
    file_path(path, "channel");
    host = daemon_start("host", "-c virtserial-open:%s:- -o s:127.0.0.1:0",
                        path);
    daemon_wait(host, "ch0: .*%s.*No such file", path);
    sleep_ms(500);
    ck_assert_int_le(daemon_count(host, "No such file"), 1);
    channel_make(&c, CHANNEL_VIRTSERIAL, "channel");
    daemon_start("guest", "-c %s -i s:%s", c.option[1], traffic_listen(&t));
    daemon_up(host);
    check_works(&t, daemon_listens(host, "s"));
    traffic_free(&t);
}
END_TEST

/* What can't be a channel is named, with the reason, once, and waited for. */
START_TEST(wrong_thing)
{
    static const struct {
        const char *option;     /* %s: the path */
        char kind;              /* of thing: a directory, file, null device */
        const char *reason;     /* in the log */
    } wrong[] = {
        { "unix-connect:%s:-", 'd', "Connection refused" },
        { "unix-connect:%s:-", 'f', "Connection refused" },
        { "virtserial-open:%s:-", 'd', "Is a directory" },
        { "virtserial-open:%s:-", 'f', "Inappropriate ioctl" },
        { "isaserial-open:%s:-", 'd', "Is a directory" },
        { "isaserial-open:%s:-", 'f', "Inappropriate ioctl" },
        { "isaserial-open:%s:-", 'n', "Inappropriate ioctl" },
    };
    char path[PATH_LEN], option[TEXT_LEN];
    Daemon *daemons[COUNT_OF(wrong)];

    for (int i = 0; i < COUNT_OF(wrong); i++) {
        text_format(option, sizeof(option), "wrong%d", i);
        file_path(path, option);
        if (wrong[i].kind == 'd') {
            ck_assert(mkdir(path, 0755) == 0);
        } else if (wrong[i].kind == 'f') {
            file_write(path, "text\n", 5);
        } else {
            ck_assert(symlink("/dev/null", path) == 0);
        }
        text_format(option, sizeof(option), wrong[i].option, path);
        daemons[i] = daemon_start("wrong", "-c %s", option);
    }
    for (int i = 0; i < COUNT_OF(wrong); i++) {
        daemon_wait(daemons[i], "ch0: .*/wrong%d: %s", i, wrong[i].reason);
    }
    daemons_idle(daemons, COUNT_OF(wrong));
    for (int i = 0; i < COUNT_OF(wrong); i++) {
        ck_assert_int_eq(daemon_count(daemons[i], "/wrong"), 1);
    }
}
END_TEST

/* A device that may not be opened, until it may. */
START_TEST(unreadable)
{
    StartOptions o = { .nobody = true };
    char path[PATH_LEN], fifo[PATH_LEN + 8];
    Traffic t;
    Channel c;
    Daemon *host;

    traffic_init(&t);
    channel_make(&c, CHANNEL_VIRTSERIAL, "channel");
    file_path(path, "channel");
    for (int i = 0; i < 2; i++) {
        text_format(fifo, sizeof(fifo), "%s.%s", path, i ? "in" : "out");
        ck_assert(chmod(fifo, 0) == 0);
    }
    host = daemon_start_with(&o, "host", "-c %s -o s:127.0.0.1:0",
                             c.option[0]);
    daemon_wait(host, "ch0: .*/channel.*Permission denied");
    sleep_ms(500);
    ck_assert_int_eq(daemon_count(host, "Permission denied"), 1);
    for (int i = 0; i < 2; i++) {
        text_format(fifo, sizeof(fifo), "%s.%s", path, i ? "in" : "out");
        ck_assert(chmod(fifo, 0666) == 0);
    }
    daemon_start("guest", "-c %s -i s:%s", c.option[1], traffic_listen(&t));
    check_works(&t, daemon_listens(host, "s"));
    traffic_free(&t);
}
END_TEST

/* Without grace a client is told at once, and the log why. */
START_TEST(no_grace)
{
    Daemon *d = daemon_start("host", "-c unix-connect:%s/none:- --grace 0 "
                             "-o s:127.0.0.1:0", vp_dir);
    int fd = dial(daemon_listens(d, "s"), true);

    expect_reset(fd);
    daemon_wait(d, "s: connection reset: no session, and --grace 0$");
    close(fd);
}
END_TEST

/* --- serial lines ------------------------------------------------------- */

static int open_line(const RelayEnd *end)
{
    int fd = open(end->path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);

    ck_assert_msg(fd >= 0, "%s: %s", end->path, strerror(errno));
    return fd;
}

/*
 * Raw while in use, as it was when the daemon has gone; so is a virtio-serial
 * port that is a tty, which has no rate.
 */
START_TEST(line_settings)
{
    const char *option = _i ? "virtserial-open:%s:-" : "isaserial-open:%s:9600";
    struct termios before, during, after;
    Daemon *d, *other;
    char channel[TEXT_LEN];
    RelayEnd end;
    int line;

    relay_pty(&end);
    line = open_line(&end);
    text_format(channel, sizeof(channel), option, end.path);
    ck_assert(tcgetattr(line, &before) == 0);
    ck_assert(before.c_lflag & ICANON && before.c_lflag & ECHO);
    before.c_iflag |= IXON | IXOFF | IXANY | INPCK | ISTRIP;
    before.c_cflag |= CSTOPB;
    ck_assert(tcsetattr(line, TCSANOW, &before) == 0);
    ck_assert(tcgetattr(line, &before) == 0);
    ck_assert(write(end.master, "stale words", 11) == 11);
    d = daemon_start("line", "-c %s", channel);
    for (int64_t give_up = now_ms() + WAIT_MS;;) {
        ck_assert(tcgetattr(line, &during) == 0);
        if (!(during.c_lflag & ICANON)) {
            break;
        }
        ck_assert_msg(now_ms() < give_up, "the line is never made raw");
        sleep_ms(10);
    }
    ck_assert(!(during.c_lflag & (ECHO | ISIG | IEXTEN)));
    ck_assert(!(during.c_iflag & (IXON | IXOFF | IXANY | INPCK | ICRNL |
                                  INLCR | ISTRIP)));
    ck_assert(!(during.c_cflag & (CSTOPB | PARENB)));
    ck_assert(!(during.c_oflag & OPOST));
    ck_assert(during.c_cflag & CLOCAL && during.c_cflag & CREAD);
    ck_assert((during.c_cflag & CSIZE) == CS8);
    ck_assert(cfgetospeed(&during) == (_i ? cfgetospeed(&before) : B9600));
    ck_assert(cfgetispeed(&during) == (_i ? cfgetispeed(&before) : B9600));
    daemon_wait(d, "silent: waiting"); /* not even the stale words came */
    ck_assert_int_eq(daemon_count(d, "not qemu-vp"), 0);
    other = daemon_start("other", "-c %s", channel);
    daemon_wait(other, "busy: trying again");
    daemon_stop(other);
    daemon_stop(d);
    ck_assert(tcgetattr(line, &after) == 0);
    ck_assert_msg(before.c_lflag == after.c_lflag &&
                  before.c_iflag == after.c_iflag &&
                  before.c_oflag == after.c_oflag &&
                  before.c_cflag == after.c_cflag &&
                  memcmp(before.c_cc, after.c_cc, sizeof(before.c_cc)) == 0,
                  "the line's settings were not restored");
}
END_TEST

/* Who changes a line that is in use is noticed, and it is set again. */
START_TEST(line_changed)
{
    struct termios settings;
    Channel c;
    Traffic t;
    Daemon *host, *guest;
    const char *path;
    int line;

    channel_make(&c, CHANNEL_ISASERIAL, "channel");
    traffic_init(&t);
    host = daemon_start("host", "-c %s -o s:127.0.0.1:0", c.option[0]);
    guest = daemon_start("guest", "-c %s -i s:%s", c.option[1],
                         traffic_listen(&t));
    daemon_up(host);
    daemon_up(guest);
    path = strchr(c.option[1], ':') + 1;
    c.option[1][strcspn(path, ":") + (size_t)(path - c.option[1])] = '\0';
    line = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    ck_assert(line >= 0 && tcgetattr(line, &settings) == 0);
    settings.c_iflag |= IXON | IXOFF | ICRNL;
    settings.c_lflag |= ICANON | ECHO | ISIG;
    settings.c_oflag |= OPOST;
    ck_assert(tcsetattr(line, TCSANOW, &settings) == 0);
    close(line);
    daemon_wait(guest, " warn ch0: .*changed the line's settings: set again");
    check_works(&t, daemon_listens(host, "s"));
    traffic_free(&t);
}
END_TEST

/*
 * A line has one channel, under whatever name.  A second one doesn't take away
 * the lock that keeps other daemons out, neither while it tries nor when it is
 * removed.
 */
START_TEST(line_twice)
{
    char link[PATH_LEN];
    Daemon *d, *other;
    RelayEnd end;

    relay_pty(&end);
    file_path(link, "link");
    ck_assert(symlink(end.path, link) == 0);
    d = daemon_start("line", "-c isaserial-open:%s:- -c %s-open:%s:-:1",
                     end.path, _i ? "virtserial" : "isaserial", link);
    daemon_wait(d, "ch0: .*silent: waiting");
    daemon_wait(d, "ch1: .*busy: trying again");
    other = daemon_start("other", "-c isaserial-open:%s:-", end.path);
    daemon_wait(other, "busy: trying again");
    daemon_stop(other);
    daemon_stop(d);
}
END_TEST

/*
 * QEMU keeps its end of a pty when the daemon is killed: a user who is nobody
 * special can open the line again.
 */
START_TEST(line_after_kill)
{
    StartOptions o = { .nobody = true };
    Daemon *d;
    RelayEnd end;

    relay_pty(&end);
    ck_assert(geteuid() != 0 || chmod(end.path, 0666) == 0);
    for (int i = 0; i < 2; i++) {
        d = daemon_start_with(&o, "line", "-c isaserial-open:%s:-", end.path);
        daemon_wait(d, "silent: waiting");
        daemon_kill(d);
    }
}
END_TEST

/* A line whose far end echoes all it gets is named, once, and not believed. */
START_TEST(line_echoes)
{
    RelayEnd end;
    Daemon *d;
    pid_t pid;

    relay_pty(&end);
    close(open_line(&end));
    pid = fork();
    ck_assert(pid >= 0);
    if (pid == 0) {
        char buf[4096];

        child_fds(&end.master, 1);
        for (;;) {
            ssize_t n = read(end.master, buf, sizeof(buf));

            if (n > 0) {
                n = write(end.master, buf, (size_t)n);
            } else {
                sleep_ms(10);           /* nobody has the line open */
            }
        }
    }
    child_add(pid);
    d = daemon_start("line", "-c isaserial-open:%s:-", end.path);
    daemon_wait(d, " warn ch0: .*echo");
    daemons_idle((Daemon *[]) { d }, 1);
    ck_assert_int_eq(daemon_count(d, "echo"), 1);
    ck_assert_int_eq(daemon_count(d, "channel up"), 0);
}
END_TEST

/* --- strangers ---------------------------------------------------------- */

typedef enum Stranger {
    RANDOM_BYTES,
    HTTP_CLIENT,
    SILENT,
    OTHER_VERSION,
    STRANGERS
} Stranger;

static const char *const named_as[STRANGERS] = {
    "warn ch0: .*not qemu-vp", "warn ch0: .*not qemu-vp", "ch0: .*silent",
    "warn ch0: .*version",
};

static void stranger_speaks(Stranger s, int fd)
{
    static const char get[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    unsigned char buf[100000];

    switch (s) {
    case RANDOM_BYTES:
        bytes_fill(buf, sizeof(buf), 4711, 0);
        send_all(fd, buf, sizeof(buf));
        break;
    case HTTP_CLIENT:
        send_all(fd, get, sizeof(get) - 1);
        break;
    case OTHER_VERSION:
        send_all(fd, buf, engine_hello(buf, 1));
        break;
    case SILENT:
    case STRANGERS:
        break;
    }
}

/*
 * The other end of a channel is somebody else.  Daemons that listen and one
 * that connects name him in the log once, stay quiet, and work with the real
 * peer when he has gone.
 */
START_TEST(stranger)
{
    const Stranger who = (Stranger)_i;
    char path[2][PATH_LEN], tcp[TEXT_LEN], option[3][TEXT_LEN];
    Daemon *d[3];
    int listener, fds[3];
    Traffic t;

    traffic_init(&t);
    for (int i = 0; i < 2; i++) {
        file_path(path[i], i ? "their" : "our");
    }
    text_format(tcp, sizeof(tcp), "127.0.0.1:%d", free_port());
    listener = listen_on(path[1], 5);
    d[0] = daemon_start("unix", "-c unix-listen:%s:- -o s:127.0.0.1:0",
                        path[0]);
    d[1] = daemon_start("tcp", "-c tcp-listen:%s -o s:127.0.0.1:0", tcp);
    d[2] = daemon_start("connect", "-c unix-connect:%s:- -o s:127.0.0.1:0",
                        path[1]);
    text_format(option[0], TEXT_LEN, "unix-connect:%s:-", path[0]);
    text_format(option[1], TEXT_LEN, "tcp-connect:%s", tcp);
    text_format(option[2], TEXT_LEN, "unix-listen:%s:-", path[1]);
    for (int i = 0; i < 3; i++) {
        daemon_listens(d[i], "s");
    }
    fds[0] = dial(path[0], true);
    fds[1] = dial(tcp, true);
    fds[2] = accept_one(listener);
    for (int i = 0; i < 3; i++) {
        stranger_speaks(who, fds[i]);
    }
    for (int i = 0; i < 3; i++) {
        daemon_wait(d[i], "%s", named_as[who]);
        stranger_speaks(who, fds[i]);   /* and on he goes */
    }
    daemons_idle(d, 3);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(daemon_count(d[i], named_as[who]), 1);
        ck_assert_int_le(daemon_count(d[i], "."), FEW_LINES);
        ck_assert_int_eq(daemon_count(d[i], "channel up"), 0);
        close(fds[i]);
    }
    close(listener);
    unlink(path[1]);
    traffic_listen(&t);
    for (int i = 0; i < 3; i++) {
        daemon_start("real", "-c %s -i s:%s", option[i], t.where[0]);
    }
    for (int i = 0; i < 3; i++) {
        daemon_up(d[i]);
        check_works(&t, daemon_listens(d[i], "s"));
    }
    traffic_free(&t);
}
END_TEST

/* A silent stranger does not keep the real peer out of a listening channel. */
START_TEST(silent_squatter)
{
    char path[PATH_LEN];
    Daemon *host;
    Traffic t;
    int fd;

    traffic_init(&t);
    file_path(path, "channel");
    host = daemon_start("host", "-c unix-listen:%s:- -o s:127.0.0.1:0", path);
    daemon_listens(host, "s");
    fd = dial(path, true);
    daemon_start("guest", "-c unix-connect:%s:- -i s:%s", path,
                 traffic_listen(&t));
    daemon_up(host);
    check_works(&t, daemon_listens(host, "s"));
    close(fd);
    traffic_free(&t);
}
END_TEST

/*
 * Somebody who takes the channel's connections and closes them at once is
 * tried again and again, but not too often, and without a line each time.
 */
START_TEST(slammed_door)
{
    char path[PATH_LEN];
    int64_t end, cpu;
    int listener, tries = 0;
    Daemon *d;

    file_path(path, "channel");
    listener = listen_on(path, 5);
    d = daemon_start("host", "-c unix-connect:%s:-", path);
    close(accept_one(listener));
    cpu = daemon_cpu_ms(d);
    end = now_ms() + 3000;
    while (now_ms() < end) {
        struct pollfd pfd = { .fd = listener, .events = POLLIN };

        if (poll(&pfd, 1, 100) == 1) {
            close(accept_one(listener));
            tries++;
        }
    }
    ck_assert_msg(tries >= 2, "tried again %d times in 3 s", tries);
    ck_assert_msg(tries <= 15, "tried again %d times in 3 s", tries);
    ck_assert_int_le(daemon_count(d, "."), FEW_LINES);
    ck_assert_int_lt(daemon_cpu_ms(d) - cpu, 300);
}
END_TEST

/* A further peer on a channel in use is turned away; the first is not hurt. */
START_TEST(second_peer)
{
    char where[TEXT_LEN], option[TEXT_LEN];
    Daemon *host, *guest, *other;
    Traffic t;

    traffic_init(&t);
    traffic_listen(&t);
    if (_i) {
        text_format(where, sizeof(where), "127.0.0.1:%d", free_port());
        text_format(option, sizeof(option), "tcp-connect:%s", where);
        host = daemon_start("host", "-c tcp-listen:%s -o s:127.0.0.1:0",
                            where);
    } else {
        text_format(where, sizeof(where), "%s/channel", vp_dir);
        text_format(option, sizeof(option), "unix-connect:%s:-", where);
        host = daemon_start("host", "-c unix-listen:%s:- -o s:127.0.0.1:0",
                            where);
    }
    daemon_listens(host, "s");
    guest = daemon_start("guest", "-c %s -i s:%s", option, t.where[0]);
    daemon_up(host);
    traffic_add(&t, daemon_listens(host, "s"), 0, 24 * MIB, 24 * MIB);
    move(&t, MIB);
    for (Stranger s = 0; s < STRANGERS; s++) {
        char buf[4096];
        ssize_t n;
        int fd;

        if (s == (_i ? SILENT : HTTP_CLIENT)) {
            continue;                   /* each of the two takes seconds */
        }
        fd = dial(where, true);
        stranger_speaks(s, fd);
        move(&t, MIB / 2);
        while ((n = recv(fd, buf, sizeof(buf), 0)) > 0) {
        }
        ck_assert_msg(n == 0 || errno == ECONNRESET, "stranger %d stays", s);
        close(fd);
    }
    other = daemon_start("other", "-c %s -i s:%s", option, t.where[0]);
    daemon_wait(host, " warn ch0: .*turned away: the channel is in use");
    finish(&t);
    sleep_ms(1500);                     /* it tries again, some times */
    ck_assert_int_eq(daemon_count(host, "the channel is in use"), 1);
    ck_assert_int_eq(daemon_count(host, "channel up"), 1);
    ck_assert_int_eq(daemon_count(host, "channel down"), 0);
    ck_assert_int_eq(daemon_count(other, "channel (up|down)"), 0);
    ck_assert_int_eq(daemon_count(other, "no channel yet: turned away: the "
                                  "other end's log says why"), 1);
    ck_assert_int_eq(daemon_count(other, "no channel yet"), 1);
    ck_assert_int_le(daemon_count(host, "."), 2 * FEW_LINES);

    /* Its turn comes when the first has gone. */
    daemon_kill(guest);
    daemon_up(other);
    check_works(&t, daemon_listens(host, "s"));
    traffic_free(&t);
}
END_TEST

/* --- sockets in the file system, signals, descriptors ------------------- */

/* A stale socket file is replaced; ours is removed at the end. */
START_TEST(socket_files)
{
    char paths[2][PATH_LEN];
    Daemon *d;
    int fd;

    file_path(paths[0], "channel");
    file_path(paths[1], "service");
    for (int i = 0; i < 2; i++) {
        close(listen_on(paths[i], 5));  /* nobody answers there any more */
    }
    for (int round = 0; round < 2; round++) {
        d = daemon_start("host", "-c unix-listen:%s:- -o s:%s:-", paths[0],
                         paths[1]);
        ck_assert_str_eq(daemon_listens(d, "s"), paths[1]);
        for (int i = 0; i < 2; i++) {
            close(dial(paths[i], true));
        }
        if (round == 0) {
            daemon_kill(d);             /* and leaves stale ones again */
        }
    }
    daemon_stop(d);
    for (int i = 0; i < 2; i++) {
        ck_assert_msg(access(paths[i], F_OK) < 0, "%s is left", paths[i]);
    }

    /* Not ours any more: somebody has put his own in its place. */
    d = daemon_start("host", "-c unix-listen:%s:- -o s:%s:-", paths[0],
                     paths[1]);
    daemon_listens(d, "s");
    ck_assert(unlink(paths[0]) == 0 && unlink(paths[1]) == 0);
    fd = listen_on(paths[0], 5);
    file_write(paths[1], "a file", 6);
    daemon_stop(d);
    close(dial(paths[0], true));
    ck_assert(access(paths[1], F_OK) == 0);
    close(fd);
}
END_TEST

/* SIGTERM and SIGINT, idle, alone, with connections open and data flowing. */
START_TEST(clean_end)
{
    char options[TEXT_LEN], path[PATH_LEN];
    const int sig = _i & 1 ? SIGINT : SIGTERM;
    Traffic t;
    Pair p;

    traffic_init(&t);
    file_path(path, "service");
    text_format(options, sizeof(options), "-i s:%s", traffic_listen(&t));
    pair_start(&p, CHANNEL_UNIX, "-o s:127.0.0.1:0", options);
    if (_i & 2) {
        t.hold = true;
        for (int i = 0; i < 4; i++) {
            traffic_add(&t, daemon_listens(p.host, "s"), 0, FOREVER, FOREVER);
        }
        move(&t, MIB);
    }
    kill(p.host->pid, sig);
    ck_assert_int_eq(daemon_exit(p.host), 0);
    daemon_wait(p.guest, "channel down");
    kill(p.guest->pid, sig);
    ck_assert_int_eq(daemon_exit(p.guest), 0);
    if (_i & 2) {
        every_end_is_reset(&t, 0);
    }
    file_path(path, "channel");
    ck_assert_msg(access(path, F_OK) < 0, "%s is left", path);
    traffic_free(&t);
}
END_TEST

/* settled() - run until each client is served or refused; how many are */
static size_t settled(Traffic *t)
{
    size_t served = 0, refused = 0;

    for (int64_t end = now_ms() + WAIT_MS; served + refused < t->n_flows;) {
        ck_assert_msg(now_ms() < end, "%zu served, %zu refused of %zu", served,
                      refused, t->n_flows);
        traffic_run(t, traffic_never, 20);
        served = refused = 0;
        for (size_t i = 0; i < t->n_flows; i++) {
            bool reset = t->flows[i].side[0].error == ECONNRESET;

            served += t->flows[i].paired;
            refused += reset;
            t->flows[i].waived = reset;
        }
    }
    return served;
}

/* crowd() - so many clients come to stay */
static void crowd(Traffic *t, const char *where, size_t clients)
{
    t->hold = true;
    for (size_t i = 0; i < clients; i++) {
        traffic_add(t, where, 0, 1000, 1000);
    }
}

/* scarce_start() - a pair of daemons; returns the host, of 40 descriptors */
static Daemon *scarce_start(Traffic *t, Channel *c, ChannelKind kind)
{
    StartOptions o = { .nofile = 40 };
    Daemon *host;

    traffic_init(t);
    channel_make(c, kind, "channel");
    daemon_start("guest", "-c %s -i s:%s", c->option[1], traffic_listen(t));
    host = daemon_start_with(&o, "host", "-c %s -o s:127.0.0.1:0",
                             c->option[0]);
    daemon_up(host);
    return host;
}

/*
 * All descriptors that connections may have are taken: who comes then is
 * refused at once, those that are there are served, and others come in when
 * there is room again.
 */
START_TEST(accept_exhausted)
{
    const char *where;
    size_t served;
    Daemon *host;
    Traffic t;
    Channel c;

    host = scarce_start(&t, &c, CHANNEL_UNIX);
    daemon_wait(host, "limit of 40 descriptors leaves .* for connections, "
                "fewer than --max-conns");
    where = daemon_listens(host, "s");
    crowd(&t, where, 80);
    served = settled(&t);
    ck_assert_msg(served > 10 && served < 32, "%zu are served", served);
    daemon_wait(host, "s: connection refused: .*descriptors");
    daemons_idle((Daemon *[]) { host }, 1);
    finish(&t);
    check_works(&t, where);
    traffic_free(&t);
}
END_TEST

/* A limit that leaves no descriptor for a connection ends the start. */
START_TEST(descriptors_too_few)
{
    StartOptions o = { .nofile = 17 };
    Daemon *d = daemon_start_with(&o, "host", "-c unix-listen:%s/channel:- "
                                  "-o s:127.0.0.1:0", vp_dir);

    ck_assert_int_eq(daemon_exit(d), 1);
    daemon_wait(d, "limit of 17 descriptors leaves none for connections");
}
END_TEST

/* A channel that is cut while clients take what is free comes back. */
START_TEST(channel_keeps_descriptor)
{
    const char *where;
    size_t served;
    Daemon *host;
    Traffic t;
    Channel c;

    host = scarce_start(&t, &c, CHANNEL_CABLE);
    where = daemon_listens(host, "s");
    crowd(&t, where, 35); /* so few that the log has no gap */
    served = settled(&t);
    daemon_mark(host);
    relay_tell(&c.relay, RELAY_AWAY);
    daemon_wait(host, "channel down");
    crowd(&t, where, 10);               /* for what the channel has left */
    traffic_run(&t, traffic_never, 200);
    relay_tell(&c.relay, RELAY_GO);
    daemon_up(host);
    ck_assert_uint_ge(settled(&t), served);
    finish(&t);
    check_works(&t, where);
    traffic_free(&t);
}
END_TEST

/*
 * Two channels in one daemon: one takes what the other leaves, but some is
 * left, and what it gives back the other gets up to its share.
 */
START_TEST(descriptors_shared)
{
    StartOptions o = { .nofile = 100 };
    char where[2][TEXT_LEN];
    size_t greedy, modest;
    Traffic t[2];
    Channel c[2];
    Daemon *host;

    for (int i = 0; i < 2; i++) {
        traffic_init(&t[i]);
        channel_make(&c[i], CHANNEL_UNIX, i == 0 ? "a" : "b");
    }
    host = daemon_start_with(&o, "host", "-c %s:0 -o s:127.0.0.1:0:0 "
                             "-c %s:1 -o t:127.0.0.1:0:1", c[0].option[0],
                             c[1].option[0]);
    text_format(where[0], TEXT_LEN, "%s", daemon_listens(host, "s"));
    text_format(where[1], TEXT_LEN, "%s", daemon_listens(host, "t"));
    daemon_start("guest", "-c %s -i s:%s", c[0].option[1],
                 traffic_listen(&t[0]));
    daemon_start("other", "-c %s -i t:%s", c[1].option[1],
                 traffic_listen(&t[1]));
    daemon_wait(host, "ch0: channel up");
    daemon_wait(host, "ch1: channel up");
    crowd(&t[0], where[0], 120);
    greedy = settled(&t[0]);
    crowd(&t[1], where[1], 120);
    modest = settled(&t[1]);
    ck_assert_msg(greedy > 45 && modest > 8 && greedy + modest < 88,
                  "%zu and %zu are served", greedy, modest);
    finish(&t[0]);                      /* gives back all it has */
    crowd(&t[1], where[1], 120);
    modest = settled(&t[1]);
    crowd(&t[0], where[0], 20);
    ck_assert_uint_gt(settled(&t[0]), greedy + 8);
    ck_assert_uint_gt(modest, 45);
    for (int i = 0; i < 2; i++) {
        finish(&t[i]);
        traffic_free(&t[i]);
    }
}
END_TEST

/* No descriptor is left to connect to a target: refused, and said. */
START_TEST(connect_exhausted)
{
    StartOptions o = { .nofile = 40 };
    Daemon *host, *guest;
    const char *where;
    size_t served;
    Traffic t;
    Channel c;

    traffic_init(&t);
    channel_make(&c, CHANNEL_UNIX, "channel");
    guest = daemon_start_with(&o, "guest", "-c %s -i s:%s", c.option[1],
                              traffic_listen(&t));
    host = daemon_start("host", "-c %s -o s:127.0.0.1:0", c.option[0]);
    daemon_up(guest);
    where = daemon_listens(host, "s");
    crowd(&t, where, 80);
    daemon_wait(guest, "ch0: s: (cannot connect: Too many open files|"
                "connection refused: .*descriptors)");
    daemon_wait(host, "ch0: s: connection from .* refused: ");
    served = settled(&t);
    ck_assert_msg(served > 10 && served < 32, "%zu are served", served);
    finish(&t);
    check_works(&t, where);
    traffic_free(&t);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("life");

    SUITE_LOOP(s, killed, COUNT_OF(killed_kinds) * COUNT_OF(victims));
    SUITE_ADD(s, killed_often);
    SUITE_ADD(s, cut);
    SUITE_LOOP(s, grace, 2);
    SUITE_LOOP(s, alone, 2);
    SUITE_ADD(s, no_grace);
    SUITE_ADD(s, host_away);
    SUITE_ADD(s, device_appears);
    SUITE_ADD(s, wrong_thing);
    SUITE_ADD(s, unreadable);
    SUITE_ADD(s, line_after_kill);
    SUITE_LOOP(s, line_settings, 2);
    SUITE_ADD(s, line_changed);
    SUITE_LOOP(s, line_twice, 2);
    SUITE_ADD(s, line_echoes);
    SUITE_LOOP(s, stranger, STRANGERS);
    SUITE_ADD(s, silent_squatter);
    SUITE_ADD(s, slammed_door);
    SUITE_LOOP(s, second_peer, 2);
    SUITE_ADD(s, socket_files);
    SUITE_LOOP(s, clean_end, 4);
    SUITE_ADD(s, accept_exhausted);
    SUITE_ADD(s, descriptors_too_few);
    SUITE_ADD(s, channel_keeps_descriptor);
    SUITE_ADD(s, descriptors_shared);
    SUITE_ADD(s, connect_exhausted);
    return harness_run(s);
}
