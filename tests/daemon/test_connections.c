/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_connections.c - what a connection does must survive the trip
 *
 * Two daemons over a unix channel, in between where a test needs it a relay
 * that stalls.  "host" has the clients, "guest" the servers, and the service
 * is called "s".
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#ifdef HAVE_VSOCK
#include <linux/vm_sockets.h>
#endif
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "monitor.h"
#include "traffic.h"

#define MIB (UINT64_C(1) << 20)

/* Daemons and one server for tests that speak through single sockets */
typedef struct Wire {
    Pair pair;
    int listener;
    char target[TEXT_LEN];
    const char *where;          /* the oforward */
} Wire;

static void wire_start(Wire *w)
{
    char option[2 * TEXT_LEN];

    w->listener = listen_any(w->target);
    text_format(option, sizeof(option), "-i s:%s", w->target);
    pair_start(&w->pair, CHANNEL_UNIX, "-o s:127.0.0.1:0", option);
    w->where = daemon_listens(w->pair.host, "s");
}

/* traffic_start() - daemons with one server in t; the oforward's address */
static const char *traffic_start(Traffic *t, Pair *pair, ChannelKind kind)
{
    char option[2 * TEXT_LEN];

    traffic_init(t);
    text_format(option, sizeof(option), "-i s:%s", traffic_listen(t));
    pair_start(pair, kind, "-o s:127.0.0.1:0", option);
    return daemon_listens(pair->host, "s");
}

/* finish() - all flows must come to their regular end */
static void finish(Traffic *t)
{
    t->hold = false;
    ck_assert_msg(traffic_run(t, traffic_done, 3 * WAIT_MS),
                  "flows hang after %llu bytes",
                  (unsigned long long)traffic_moved(t));
}

/* check_works() - a fresh connection through a wire does */
static void check_works(Wire *w)
{
    int client = dial(w->where, true);
    int server;

    send_all(client, "ping", 4);
    server = accept_one(w->listener);
    expect_bytes(server, "ping");
    send_all(server, "pong", 4);
    expect_bytes(client, "pong");
    shutdown(client, SHUT_WR);
    expect_eof(server);
    shutdown(server, SHUT_WR);
    expect_eof(client);
    close(client);
    close(server);
}

/* --- what -v -v tells --------------------------------------------------- */

/* debug_life() - the states of connection @n in the log must be @expected */
static void debug_life(Daemon *d, unsigned n, const char *const *expected)
{
    for (int i = 0; expected[i] != NULL; i++) {
        daemon_wait(d, " debug ch0: connection %u of s (from|to) .*: %s", n,
                    expected[i]);
    }
}

/* The life of a connection can be read in the log of either side. */
START_TEST(debug_log)
{
    static const char *const orderly[] = {
        "life none -> NEW: a client came$",
        "life NEW -> OPEN: the other side is asked for it$",
        "in OPEN -> EOF: end of data from the local socket$",
        "in EOF -> CLOSED: the other side is told$",
        "out OPEN -> DRAIN: the other side has sent all$",
        "out DRAIN -> CLOSED: the local socket took all of it$",
        "life OPEN -> FREE: both directions have ended$",
        NULL,
    };
    static const char *const served[] = {
        "life none -> OPEN: the other side asks for it$",
        "in WAIT -> OPEN: the target has accepted$",
        "out WAIT -> OPEN: the target has accepted$",
        "out OPEN -> DRAIN: the other side has sent all$",
        "in OPEN -> EOF: end of data from the local socket$",
        "life OPEN -> FREE: both directions have ended$",
        NULL,
    };
    static const char *const reset[] = {
        "life NEW -> OPEN: ",
        "life OPEN -> CLOSING: Connection reset by peer$",
        "in OPEN -> CLOSED: Connection reset by peer$",
        "life CLOSING -> FREE: the other side is told$",
        NULL,
    };
    static const char *const told[] = {
        "life OPEN -> FREE: reset by the other side$",
        NULL,
    };
    const unsigned first = 0u - 100u; /* of a session: ids wrap around soon */
    char option[2 * TEXT_LEN];
    int client, server;
    Pair pair;
    Wire w;

    w.listener = listen_any(w.target);
    text_format(option, sizeof(option), "-v -v -i s:%s", w.target);
    pair_start(&pair, CHANNEL_UNIX, "-v -v -o s:127.0.0.1:0", option);
    w.where = daemon_listens(pair.host, "s");
    daemon_wait(pair.host, " debug ch0: link DOWN -> HELLO: ");
    daemon_wait(pair.host, " debug ch0: link HELLO -> UP: new session$");
    check_works(&w);
    debug_life(pair.host, first, orderly);
    debug_life(pair.guest, first, served);
    client = dial(w.where, true);
    server = accept_one(w.listener);
    close_reset(client);
    expect_reset(server);
    debug_life(pair.host, first + 1, reset);
    debug_life(pair.guest, first + 1, told);
}
END_TEST

/* --- what -v tells ------------------------------------------------------ */

/* Each connection has two lines on either side, and the guest its target's. */
START_TEST(verbose_log)
{
    char option[2 * TEXT_LEN], from[TEXT_LEN];
    struct sockaddr_in sin;
    socklen_t len = sizeof(sin);
    int client, server;
    Pair pair;
    Wire w;

    w.listener = listen_any(w.target);
    text_format(option, sizeof(option), "-v -i s:%s", w.target);
    pair_start(&pair, CHANNEL_UNIX, "-v -o s:127.0.0.1:0", option);
    daemon_wait(pair.guest, " info ch0: iforward s: to %s$", w.target);
    w.where = daemon_listens(pair.host, "s");
    client = dial(w.where, true);
    server = accept_one(w.listener);
    ck_assert(getsockname(client, (struct sockaddr *)&sin, &len) == 0);
    text_format(from, sizeof(from), "127.0.0.1:%d", ntohs(sin.sin_port));
    send_all(client, "ping", 4);
    expect_bytes(server, "ping");
    send_all(server, "answer", 6);
    expect_bytes(client, "answer");
    daemon_wait(pair.host, " verbose ch0: s: connection [0-9]+ from %s$", from);
    daemon_wait(pair.guest, " verbose ch0: s: connection [0-9]+ to %s for "
                "%s$", w.target, from);
    if (_i) {
        close_reset(client);
        expect_reset(server);
    } else {
        shutdown(client, SHUT_WR);
        expect_eof(server);
        close(server);
        expect_eof(client);
        close(client);
    }
    daemon_wait(pair.host, " verbose ch0: s: connection [0-9]+ ended after "
                "[0-9.]+ s, 4 bytes from its client, 6 to it: %s$", _i ?
                strerror(ECONNRESET) : "both directions have ended");
    daemon_wait(pair.guest, " verbose ch0: s: connection [0-9]+ ended after "
                "[0-9.]+ s, 6 bytes from its target, 4 to it: %s$", _i ?
                "reset by the other side" : "both directions have ended");
    ck_assert_int_eq(daemon_count(pair.host, " verbose | debug "), 2);
    ck_assert_int_eq(daemon_count(pair.guest, " verbose | debug "), 2);
}
END_TEST

/* --- urgent data -------------------------------------------------------- */

/* The urgent byte comes in its place among the others, as an ordinary one. */
START_TEST(urgent_byte)
{
    int fds[2];
    Wire w;

    wire_start(&w);
    for (int from = 0; from < 2; from++) {
        fds[0] = dial(w.where, true);
        fds[1] = accept_one(w.listener);
        for (int k = 0; k < 100; k++) {
            send_all(fds[from], "ab", 2);
            ck_assert_int_eq(send(fds[from], "!", 1, MSG_OOB), 1);
            if (k == 50) {
                sleep_ms(50);           /* and it is read by itself */
            }
            send_all(fds[from], "cd", 2);
        }
        for (int k = 0; k < 100; k++) {
            expect_bytes(fds[!from], "ab!cd");
        }
        close(fds[0]);
        close(fds[1]);
    }
    close(w.listener);
}
END_TEST

/* --- ends and resets ---------------------------------------------------- */

/* The one that ends its direction first gets an answer half a second later. */
static void half_close(const char *where, int listener, bool server_first)
{
    int fds[2];
    int first, last;

    fds[0] = dial(where, true);
    fds[1] = accept_one(listener);
    first = fds[server_first];
    last = fds[!server_first];
    send_all(first, "question", 8);
    shutdown(first, SHUT_WR);
    expect_bytes(last, "question");
    expect_eof(last);
    sleep_ms(500);
    send_all(last, "answer", 6);
    expect_bytes(first, "answer");
    sleep_ms(100);
    send_all(last, "more", 4);
    shutdown(last, SHUT_WR);
    expect_bytes(first, "more");
    expect_eof(first);
    close(fds[0]);
    close(fds[1]);
}

START_TEST(half_close_tcp)
{
    Wire w;

    wire_start(&w);
    half_close(w.where, w.listener, _i);
}
END_TEST

/* unix_start() - have a service s of unix sockets; the target's listener */
static int unix_start(Pair *pair)
{
    char in[PATH_LEN], out[PATH_LEN], options[2][2 * TEXT_LEN];
    int listener;

    file_path(in, "in");
    file_path(out, "out");
    listener = listen_on(in, 5);
    text_format(options[0], sizeof(options[0]), "-v -o s:%s:-", out);
    text_format(options[1], sizeof(options[1]), "-v -i s:%s:-", in);
    pair_start(pair, CHANNEL_UNIX, options[0], options[1]);
    return listener;
}

/* The same with unix sockets for client and server. */
START_TEST(half_close_unix)
{
    Pair pair;
    int listener = unix_start(&pair);

    half_close(daemon_listens(pair.host, "s"), listener, _i);
}
END_TEST

/* A half-closed connection that waits costs nothing. */
START_TEST(half_close_idle)
{
    Wire w;
    int client[2], server[2];

    wire_start(&w);
    for (int i = 0; i < 2; i++) {
        client[i] = dial(w.where, true);
        server[i] = accept_one(w.listener);
    }
    shutdown(client[0], SHUT_WR);
    expect_eof(server[0]);
    shutdown(server[1], SHUT_WR);
    expect_eof(client[1]);
    daemons_idle((Daemon *[]) { w.pair.host, w.pair.guest }, 2);
    send_all(server[0], "late", 4);
    expect_bytes(client[0], "late");
    send_all(client[1], "late", 4);
    expect_bytes(server[1], "late");
}
END_TEST

/* Everything sent, then closed at once: all of it arrives, then the end. */
START_TEST(send_and_close)
{
    static unsigned char data[100000], got[100000];
    Wire w;

    wire_start(&w);
    for (int round = 0; round < 20; round++) {
        int fds[2];
        int from = round % 2;

        fds[0] = dial(w.where, true);
        fds[1] = accept_one(w.listener);
        bytes_fill(data, sizeof(data), (uint64_t)round, 0);
        send_all(fds[from], data, sizeof(data));
        close(fds[from]);
        recv_all(fds[!from], got, sizeof(got));
        ck_assert_msg(memcmp(data, got, sizeof(data)) == 0, "wrong bytes");
        expect_eof(fds[!from]);
        close(fds[!from]);
    }
    check_works(&w);
}
END_TEST

/* reset_one() - a connection that the server or the client resets */
static void reset_one(const char *where, int listener, bool by_server,
                      bool busy)
{
    char buf[1000] = "";
    int fds[2];

    fds[0] = dial(where, true);
    fds[1] = accept_one(listener);
    send_all(fds[0], "a", 1);
    expect_bytes(fds[1], "a");
    send_all(fds[1], "b", 1);
    expect_bytes(fds[0], "b");
    if (busy) {
        send_all(fds[!by_server], buf, sizeof(buf));
        send_all(fds[by_server], buf, sizeof(buf));
    }
    close_reset(fds[by_server]);
    expect_reset(fds[!by_server]);
    close(fds[!by_server]);
}

/* A reset by one side is a reset for the other, idle or with data behind. */
START_TEST(reset)
{
    Wire w;

    wire_start(&w);
    for (int round = 0; round < 5; round++) {
        reset_one(w.where, w.listener, _i & 1, _i & 2);
    }
    check_works(&w);
}
END_TEST

/*
 * One that has ended its direction is told of a reset all the same, and so is
 * the other one of its own, though nobody reads it any more.
 */
START_TEST(reset_after_half_close)
{
    bool by_server = _i & 1, by_ended = _i & 2;
    int fds[2], ended;
    Wire w;

    wire_start(&w);
    fds[0] = dial(w.where, true);
    fds[1] = accept_one(w.listener);
    ended = by_server == by_ended;
    shutdown(fds[ended], SHUT_WR);
    expect_eof(fds[!ended]);
    close_reset(fds[by_server]);
    if (by_ended) {
        struct pollfd other = { .fd = fds[!by_server] };

        /* the end of data has come before, so read() doesn't tell */
        ck_assert_int_eq(poll(&other, 1, WAIT_MS), 1);
        ck_assert_int_eq(other.revents, POLLERR | POLLHUP);
    } else {
        expect_reset(fds[!by_server]);
    }
    close(fds[!by_server]);
    check_works(&w);
}
END_TEST

/*
 * The owner of a unix socket ends his data and dies: the other one gets all of
 * it, at his leisure, and is told that nobody is there any more.
 */
START_TEST(gone_after_half_close)
{
    static unsigned char data[600000], got[sizeof(data)];
    struct pollfd other;
    int listener, fds[2];
    Pair pair;
    pid_t pid;

    listener = unix_start(&pair);
    fds[0] = dial(daemon_listens(pair.host, "s"), true);
    fds[1] = accept_one(listener);
    other = (struct pollfd){ .fd = fds[!_i] };
    bytes_fill(data, sizeof(data), 1, 0);
    pid = fork();
    if (pid == 0) { /* it blocks until the other one reads */
        close(other.fd);
        send_all(fds[_i], data, sizeof(data));
        shutdown(fds[_i], SHUT_WR);
        _exit(0);
    }
    child_add(pid);
    close(fds[_i]);
    ck_assert_int_eq(poll(&other, 1, 500), 0);
    recv_all(other.fd, got, sizeof(got));
    ck_assert_msg(memcmp(data, got, sizeof(data)) == 0, "wrong bytes");
    expect_eof(other.fd);
    ck_assert_int_eq(poll(&other, 1, WAIT_MS), 1);
    ck_assert_int_eq(other.revents, POLLHUP);
    daemon_wait(pair.host, "connection [0-9]+ ended after");
    daemon_wait(pair.guest, "connection [0-9]+ ended after");
}
END_TEST

/* --- connecting --------------------------------------------------------- */

START_TEST(refused_target)
{
    char option[TEXT_LEN];
    int port = free_port();
    Pair pair;
    int client;

    text_format(option, sizeof(option), "-i s:127.0.0.1:%d", port);
    pair_start(&pair, CHANNEL_UNIX, "-o s:127.0.0.1:0", option);
    dial_reset(daemon_listens(pair.host, "s"));
    daemon_wait(pair.host, "ch0: s: connection from 127.0.0.1:[0-9]+ "
                "refused: .*[Rr]efused");
    daemon_wait(pair.guest, "ch0: s: cannot connect to 127.0.0.1:%d: "
                "Connection refused", port);

    /* And once the target is there, the next connection works. */
    text_format(option, sizeof(option), "127.0.0.1:%d", port);
    int listener = listen_on(option, 5);
    client = dial(daemon_listens(pair.host, "s"), true);
    send_all(client, "x", 1);
    expect_bytes(accept_one(listener), "x");
}
END_TEST

START_TEST(refused_unix_target)
{
    Pair pair;

    pair_start(&pair, CHANNEL_UNIX, "-o s:127.0.0.1:0",
               "-i s:/nonexistent/target:-");
    dial_reset(daemon_listens(pair.host, "s"));
    daemon_wait(pair.host, "ch0: s: connection from .* refused: ");
    daemon_wait(pair.guest, "ch0: s: cannot connect to /nonexistent/target: "
                "No such file");
}
END_TEST

START_TEST(unknown_service)
{
    Pair pair;

    pair_start(&pair, CHANNEL_UNIX, "-o nosuch:127.0.0.1:0",
               "-i s:127.0.0.1:1");
    dial_reset(daemon_listens(pair.host, "nosuch"));
    daemon_wait(pair.host, "ch0: nosuch: connection from 127.0.0.1:[0-9]+ "
                "refused: .*service");
    daemon_wait(pair.guest, "ch0: .*nosuch.*service|ch0: .*service.*nosuch");
}
END_TEST

/* What was sent, even the end of data, before there was a far side at all. */
START_TEST(early_data)
{
    static unsigned char data[50000], got[50000];
    Channel c;
    char target[TEXT_LEN];
    int listener = listen_any(target);
    int clients[3];
    Daemon *host;

    channel_make(&c, CHANNEL_UNIX, "channel");
    host = daemon_start("host", "-c %s -o s:127.0.0.1:0", c.option[0]);
    for (int i = 0; i < 3; i++) {
        clients[i] = dial(daemon_listens(host, "s"), true);
        bytes_fill(data, sizeof(data), 7, 0);
        send_all(clients[i], data, sizeof(data));
        shutdown(clients[i], SHUT_WR);
    }
    sleep_ms(300);
    daemon_start("guest", "-c %s -i s:%s", c.option[1], target);
    for (int i = 0; i < 3; i++) {
        int server = accept_one(listener);

        recv_all(server, got, sizeof(got));
        ck_assert_msg(memcmp(data, got, sizeof(data)) == 0, "wrong bytes");
        expect_eof(server);
        send_all(server, "late", 4);
        close(server);
    }
    for (int i = 0; i < 3; i++) {
        expect_bytes(clients[i], "late");
        expect_eof(clients[i]);
    }
}
END_TEST

/* A client that has gone before the far side knew of it harms nobody. */
START_TEST(early_leave)
{
    Channel c;
    Wire w;

    w.listener = listen_any(w.target);
    channel_make(&c, CHANNEL_UNIX, "channel");
    w.pair.host = daemon_start("host", "-c %s -o s:127.0.0.1:0", c.option[0]);
    w.where = daemon_listens(w.pair.host, "s");
    for (int i = 0; i < 10; i++) {
        close_reset(dial(w.where, true));
    }
    w.pair.guest = daemon_start("guest", "-c %s -i s:%s", c.option[1],
                                w.target);
    for (int i = 0; i < 200; i++) {
        int client = dial(w.where, true);

        send_all(client, "gone", 4);
        close_reset(client);
    }
    /* Those that got through to the server are ended there as well. */
    int client = dial(w.where, true);
    bool seen = false;

    send_all(client, "here", 4);
    while (!seen) {
        int server = accept_one(w.listener);
        char buf[5] = "";
        ssize_t n = recv(server, buf, 4, MSG_WAITALL);

        ck_assert_msg(n != 0, "end of data where a reset was due");
        if (n == 4 && strcmp(buf, "here") == 0) {
            seen = true;
        } else if (n == 4) {
            expect_reset(server);
        }
        close(server);
    }
    expect_eof(client);
    close(client);
    check_works(&w);
}
END_TEST

/* fill_backlog() - let a listener answer nobody any more */
static size_t fill_backlog(const char *where, int fds[], size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct pollfd pfd = { .events = POLLOUT };

        pfd.fd = fds[i] = dial(where, false);
        if (poll(&pfd, 1, 300) == 0) {
            return i + 1;
        }
    }
    ck_abort_msg("a listener that accepts nothing answers for ever");
}

/*
 * A target that doesn't answer is given up after a while, and nobody else
 * waits for it meanwhile, nor does the loop spin.
 */
START_TEST(connect_timeout)
{
    char mute[TEXT_LEN], target[TEXT_LEN], option[4 * TEXT_LEN];
    int full = listen_on("127.0.0.1:0", 0);
    int fds[16];
    struct sockaddr_in in;
    socklen_t len = sizeof(in);
    size_t n_fds;
    Daemon *d[2];
    Wire w;
    int client, leaver;
    int64_t start;

    ck_assert(getsockname(full, (struct sockaddr *)&in, &len) == 0);
    text_format(mute, sizeof(mute), "127.0.0.1:%d", ntohs(in.sin_port));
    n_fds = fill_backlog(mute, fds, 16);

    w.listener = listen_any(target);
    text_format(option, sizeof(option), "-i s:%s -i mute:%s", target, mute);
    pair_start(&w.pair, CHANNEL_UNIX, "-o s:127.0.0.1:0 -o mute:127.0.0.1:0",
               option);
    w.where = daemon_listens(w.pair.host, "s");
    d[0] = w.pair.host;
    d[1] = w.pair.guest;
    start = undelayed_ms(d, 2);
    client = dial(daemon_listens(w.pair.host, "mute"), true);
    leaver = dial(daemon_listens(w.pair.host, "mute"), true);
    send_all(client, "hello", 5);
    send_all(leaver, "hello", 5);
    for (int i = 0; i < 50; i++) {
        check_works(&w);
    }
    ck_assert_msg(undelayed_ms(d, 2) - start < 9000,
                  "the rest had to wait for a mute target");
    close_reset(leaver);
    daemons_idle(d, 2);
    expect_reset(client);
    daemon_wait(w.pair.guest, "ch0: mute: cannot connect to %s: .*timed out",
                mute);
    daemon_wait(w.pair.host, "ch0: mute: connection from .* refused: ");
    while (n_fds > 0) {
        close(fds[--n_fds]);
    }
    close(full);
    check_works(&w);
}
END_TEST

/* --- names -------------------------------------------------------------- */

/*
 * A name with three addresses, in both families.  Its file is put over
 * /etc/hosts for the daemons alone.
 */
static const char *names_file(void)
{
    static char setup[TEXT_LEN];
    char path[PATH_LEN];
    static const char text[] =
        "127.0.0.1 localhost\n::1 three.test\n127.3.3.1 three.test\n"
        "127.3.3.2 three.test\n127.3.3.1 three.test\n"; /* that one twice */

    file_path(path, "hosts");
    file_write(path, text, sizeof(text) - 1);
    text_format(setup, sizeof(setup), "mount -n --bind %s /etc/hosts", path);
    return setup;
}

/* Whichever of the addresses it is that answers, it is found. */
START_TEST(every_address)
{
    static const char *const addresses[] = { "[::1]", "127.3.3.1",
                                             "127.3.3.2" };
    StartOptions o = { .setup = names_file() };
    char where[TEXT_LEN], path[PATH_LEN];
    int port = free_port();
    Wire w;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    file_path(path, "channel");
    w.pair.host = daemon_start("host", "-c unix-listen:%s:- "
                               "-o s:127.0.0.1:0", path);
    w.pair.guest = daemon_start_with(&o, "guest", "-c unix-connect:%s:- "
                                     "-i s:three.test:%d", path, port);
    daemon_up(w.pair.guest);
    w.where = daemon_listens(w.pair.host, "s");
    for (int i = 0; i < 3; i++) {
        text_format(where, sizeof(where), "%s:%d", addresses[i], port);
        w.listener = listen_on(where, 5);
        check_works(&w);
        close(w.listener);
    }
    dial_reset(w.where);
    for (int i = 1; i < 3; i++) {
        daemon_wait(w.pair.guest, "ch0: s: cannot connect to %s:%d: "
                    "Connection refused", addresses[i], port);
    }
}
END_TEST

/* A listener with a name has all its addresses; a channel finds the one. */
START_TEST(named_listener)
{
    static const char *const addresses[] = { "[::1]", "127.3.3.1",
                                             "127.3.3.2" };
    StartOptions o = { .setup = names_file() };
    int port = free_port();
    int channel = free_port();
    char where[TEXT_LEN];
    Wire w;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    w.listener = listen_any(w.target);
    w.pair.host = daemon_start_with(&o, "host", "-c tcp-connect:three.test:%d "
                                    "-o s:three.test:%d", channel, port);
    daemon_wait(w.pair.host, "oforward s: listening");
    w.pair.guest = daemon_start("guest", "-c tcp-listen:127.3.3.2:%d -i s:%s",
                                channel, w.target);
    daemon_up(w.pair.host);
    for (int i = 0; i < 3; i++) {
        text_format(where, sizeof(where), "%s:%d", addresses[i], port);
        w.where = where;
        check_works(&w);
    }
}
END_TEST

/* --- many --------------------------------------------------------------- */

static const struct {
    int n;
    uint64_t bytes;
} loads[] = { { 1, 64 * MIB }, { 100, MIB / 2 }, { 2000, 20000 } };

/* So many at once, both ways, every byte and every end. */
START_TEST(at_once)
{
    int n = loads[_i].n;
    struct rlimit limit;
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, CHANNEL_UNIX);

    ck_assert(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    ck_assert_msg(limit.rlim_cur > (rlim_t)n * 2 + 100,
                  "the limit of descriptors (%d) is too low for this test, see"
                  " ulimit -Hn", (int)limit.rlim_cur);
    t.hold = true;
    for (int i = 0; i < n; i++) {
        /* uneven sizes, some without any data in one direction */
        traffic_add(&t, where, 0,
                    i % 7 == 6 ? 0 : loads[_i].bytes + (uint64_t)i,
                    i % 5 == 4 ? 1 : loads[_i].bytes - (uint64_t)i);
    }
    ck_assert_msg(traffic_run(&t, traffic_paired, 2 * WAIT_MS),
                  "not all connections arrive");
    if (n > 1024) {
        ck_assert_int_gt(daemon_fds(pair.host), n);
        ck_assert_int_gt(daemon_fds(pair.guest), n);
    }
    finish(&t);
    traffic_free(&t);
    ck_assert_int_lt(daemon_fds(pair.host), 50);
    ck_assert_int_lt(daemon_fds(pair.guest), 50);
}
END_TEST

/* Idle ones cost nothing, and the one that isn't idle works among them. */
START_TEST(idle_ones)
{
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, CHANNEL_UNIX);

    t.hold = true;
    for (int i = 0; i < 1200; i++) {
        traffic_add(&t, where, 0, 10, 10);
    }
    ck_assert(traffic_run(&t, traffic_paired, 2 * WAIT_MS));
    while (traffic_moved(&t) < 1200 * 20) {
        traffic_run(&t, traffic_done, 50);
    }
    daemons_idle((Daemon *[]) { pair.host, pair.guest }, 2);
    traffic_add(&t, where, 0, 4 * MIB, 4 * MIB);
    finish(&t);
    traffic_free(&t);
}
END_TEST

/* Ids and descriptors are used again and again, and never for the wrong one. */
START_TEST(churn)
{
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, CHANNEL_UNIX);

    for (int round = 0; round < 60; round++) {
        for (uint64_t i = 0; i < 40; i++) {
            traffic_add(&t, where, 0, i * 97 % 5000, i * 89 % 7000);
        }
        if (round % 3 == 0) {
            traffic_run(&t, traffic_done, 1);
            for (size_t i = t.n_flows - 40; i < t.n_flows; i += 5) {
                traffic_leave(&t, i);   /* in the middle of it */
            }
        }
        finish(&t);
    }
    ck_assert_msg(traffic_run(&t, traffic_ended, WAIT_MS),
                  "a server was not told that its client has left");
    traffic_free(&t);
}
END_TEST

/* --- one does not hinder another --------------------------------------- */

static const ChannelKind bulk_kinds[] = {
    CHANNEL_UNIX, CHANNEL_TCP, CHANNEL_VIRTSERIAL,
};

/* The RFC stopped for good after some 11 MB of this. */
START_TEST(bulk_both_ways)
{
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, bulk_kinds[_i]);

    for (int i = 0; i < 4; i++) {
        traffic_add(&t, where, 0, 24 * MIB, 24 * MIB);
    }
    finish(&t);
    traffic_free(&t);
}
END_TEST

static bool some_moved(const Traffic *t)
{
    return traffic_moved(t) > 4 * MIB;
}

/*
 * What a channel is for, with a key, and with a cut in the middle.  The guest's
 * program may be one of another machine (tests/cross).
 */
START_TEST(interop)
{
    char target[TEXT_LEN], option[2][2 * TEXT_LEN], path[PATH_LEN];
    int listener = listen_any(target);
    Traffic t;
    Pair pair;
    const char *where;

    file_path(path, "key");
    file_write(path, "key that both of them have", 26);
    ck_assert(chmod(path, 0600) == 0);
    traffic_init(&t);
    text_format(option[0], sizeof(option[0]), "-k %s -o s:127.0.0.1:0 "
                "-o t:127.0.0.1:0", path);
    text_format(option[1], sizeof(option[1]), "-k %s -i s:%s -i t:%s", path,
                target, traffic_listen(&t));
    pair_start(&pair, CHANNEL_CABLE, option[0], option[1]);
    where = daemon_listens(pair.host, "t");
    for (uint64_t i = 0; i < 200; i++) {
        traffic_add(&t, where, 0, i * 499, 100000 - i * 499);
    }
    traffic_add(&t, where, 0, 8 * MIB, 8 * MIB);
    ck_assert(traffic_run(&t, some_moved, WAIT_MS));
    relay_tell(&pair.channel.relay, RELAY_CUT);
    finish(&t);
    traffic_free(&t);
    ck_assert(daemon_saw(pair.host, "session resumed"));
    where = daemon_listens(pair.host, "s");
    for (int i = 0; i < 2; i++) {
        half_close(where, listener, i);
        reset_one(where, listener, i, true);
    }
}
END_TEST

/* cost_of_flow() - the CPU time that both daemons use for one, us */
static int64_t cost_of_flow(Traffic *t, const Pair *p, const char *where)
{
    int64_t start = daemon_cpu_us(p->host) + daemon_cpu_us(p->guest);

    traffic_add(t, where, 0, 24 * MIB, 24 * MIB);
    finish(t);
    return daemon_cpu_us(p->host) + daemon_cpu_us(p->guest) - start;
}

/*
 * stuck_flows() - have some whose side deaf never reads, until all is still
 *
 * What they get rid of then is what sockets and windows hold, not all.
 */
static void stuck_flows(Traffic *t, const char *where, int deaf)
{
    const uint64_t bytes = 32 * MIB;
    size_t first = t->n_flows;

    for (int i = 0; i < 8; i++) {
        Flow *f = traffic_add(t, where, 0, deaf ? bytes : 0,
                              deaf ? 0 : bytes);

        f->side[deaf].deaf = true;
        f->waived = true;
    }
    ck_assert(traffic_run(t, traffic_paired, WAIT_MS));
    traffic_settle(t);
    for (size_t i = first; i < t->n_flows; i++) {
        ck_assert_msg(t->flows[i].side[!deaf].sent < bytes,
                      "a flow that nobody reads was taken as a whole");
    }
}

/* Nor does the kernel hold MiBs for each of those that aren't read. */
START_TEST(stuck_kernel)
{
    char options[2][TEXT_LEN];
    Traffic t;
    Pair pair;

    traffic_init(&t);
    text_format(options[0], TEXT_LEN, "-o s:127.0.0.1:0 -m %s/0", vp_dir);
    text_format(options[1], TEXT_LEN, "-i s:%s -m %s/1", traffic_listen(&t),
                vp_dir);
    pair_start(&pair, CHANNEL_UNIX, options[0], options[1]);
    stuck_flows(&t, daemon_listens(pair.host, "s"), 1);
    for (int i = 0; i < 2; i++) {
        char path[PATH_LEN];
        unsigned long long kib;

        file_path(path, i == 0 ? "0" : "1");
        ck_assert_int_eq(execute(path, "info stats -k"), 0);
        ck_assert_uint_eq(number(executed(1), "conns"), 8);
        kib = number(executed(1), "kernel_memory") / 8 / 1024;
        ck_assert_msg(kib < (i == 0 ? 600 : 300), "%d: %llu KiB each", i, kib);
    }
    traffic_free(&t);
}
END_TEST

/*
 * Clients that never read fill what they may fill; another one runs on at no
 * higher cost, in the best of some rounds, and when all is still, so are the
 * daemons.
 */
START_TEST(stuck_clients)
{
    int64_t alone = INT64_MAX / 4, beside = INT64_MAX / 4;
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, CHANNEL_UNIX);

    for (int i = 0; i < 2; i++) {
        int64_t us = cost_of_flow(&t, &pair, where);

        alone = us < alone ? us : alone;
    }
    stuck_flows(&t, where, 0);
    daemons_idle((Daemon *[]) { pair.host, pair.guest }, 2);
    for (int i = 0; i < 8 && beside * 2 > alone * 3; i++) {
        int64_t us = cost_of_flow(&t, &pair, where);

        beside = us < beside ? us : beside;
    }
    ck_assert_msg(beside <= alone * 3, "%d us beside stuck clients, %d alone",
                  (int)beside, (int)alone);

    /* And when they do read at last, all is there. */
    for (size_t i = 0; i < t.n_flows; i++) {
        t.flows[i].side[0].deaf = false;
        t.flows[i].waived = false;
    }
    finish(&t);
    traffic_free(&t);
}
END_TEST

/* The same for servers that do not read. */
START_TEST(stuck_servers)
{
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, CHANNEL_UNIX);

    stuck_flows(&t, where, 1);
    for (int i = 0; i < 20; i++) {
        traffic_add(&t, where, 0, MIB, MIB);
        finish(&t);
    }
    for (size_t i = 0; i < t.n_flows; i++) {
        t.flows[i].side[1].deaf = false;
        t.flows[i].waived = false;
    }
    finish(&t);
    traffic_free(&t);
}
END_TEST

static const struct {
    ChannelKind kind;
    RelayCommand stall;
    int other;              /* end that must go on reading */
} stalls[] = {
    { CHANNEL_CABLE, RELAY_STALL_0, 0 },
    { CHANNEL_CABLE, RELAY_STALL_1, 1 },
    { CHANNEL_CABLE, RELAY_STALL, -1 },
    { CHANNEL_QEMU_VIRTSERIAL, RELAY_STALL_1, 1 },
};

/*
 * The channel takes nothing from one side for some seconds, while that side
 * is sent to: it must go on reading, stay quiet, take connections, and
 * resume where it was.
 */
START_TEST(stalled_channel)
{
    const uint64_t bytes = 32 * MIB;
    Traffic t;
    Pair pair;
    const char *where = traffic_start(&t, &pair, stalls[_i].kind);

    for (int i = 0; i < 4; i++) {
        traffic_add(&t, where, 0, bytes, bytes);
    }
    ck_assert(traffic_run(&t, traffic_paired, WAIT_MS));
    traffic_run(&t, traffic_never, 50);
    relay_tell(&pair.channel.relay, stalls[_i].stall);
    traffic_run(&t, traffic_never, 500);        /* whatever still may move */
    ck_assert_msg(traffic_moved(&t) < 8 * bytes, "over before the stall");
    if (stalls[_i].other >= 0) {
        relay_drained(&pair.channel.relay, stalls[_i].other);
    }
    traffic_add(&t, where, 0, 1000, 1000);
    traffic_run(&t, traffic_never, 200);
    daemons_idle((Daemon *[]) { pair.host, pair.guest }, 2);
    relay_tell(&pair.channel.relay, RELAY_GO);
    finish(&t);
    ck_assert_int_eq(daemon_count(pair.host, "channel down"), 0);
    ck_assert_int_eq(daemon_count(pair.guest, "channel down"), 0);
    traffic_free(&t);
}
END_TEST

/* One byte at a time, each answered before the next: none lags behind. */
START_TEST(keystrokes)
{
    Wire w;
    int client, server;

    wire_start(&w);
    client = dial(w.where, true);
    server = accept_one(w.listener);
    for (int i = 0; i < 1000; i++) {
        char c = (char)i, got;

        send_all(client, &c, 1);
        recv_all(server, &got, 1);
        ck_assert_int_eq(got, c);
        send_all(server, &got, 1);
        recv_all(client, &got, 1);
        ck_assert_int_eq(got, c);
    }
}
END_TEST

/*
 * vsock_port() - a free port of vsock at @cid that the program may have, or 0
 *
 * 0: the program or the kernel has no vsock, or not this CID.
 */
static unsigned vsock_port(unsigned cid)
{
#ifdef HAVE_VSOCK
    struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_cid = cid,
                              .svm_port = VMADDR_PORT_ANY };
    socklen_t len = sizeof(vm);
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    bool bound = fd >= 0 && bind(fd, (struct sockaddr *)&vm, len) == 0 &&
                 getsockname(fd, (struct sockaddr *)&vm, &len) == 0;

    close(fd);
    return bound && child_wait(command_start("has-vsock", "%s -c "
                               "vsock-listen:any:1 --dump-config",
                               vp_program)) == 0 ? vm.svm_port : 0;
#else
    (void)cid;
    return 0;
#endif
}

/* A listening channel over vsock, as far as it goes without anybody to come. */
START_TEST(vsock_listens)
{
    unsigned port = vsock_port((unsigned)-1);
    char path[PATH_LEN], where[TEXT_LEN];
    Daemon *d;

    if (port == 0) {
        PASS_OVER("vsock, and a qemu-vp that was built with it");
    }
    file_path(path, "mon");
    text_format(where, sizeof(where), "vsock:any:%u", port);
    d = daemon_start("guest", "-c vsock-listen:any:%u -m %s", port, path);
    daemon_wait(d, "channel vsock-listen: listening on %s$", where);
    daemon_wait(d, "warn ch0: whoever reaches %s is the other end", where);
    ck_assert_str_eq(value(line_find(monitor_ask(monitor_batch(path),
                                                 "info channels -k"),
                                     "channel", 0), "listening"), where);
    d = daemon_start("guest", "-c vsock-listen:%u:%u", port, port);
    daemon_wait(d, "cannot listen on vsock:%u:%u: " NOT_HERE ": trying again",
                port, port);
    d = daemon_start("guest", "-c vsock-listen:any:%u", port);
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(daemon_saw(d, "cannot listen on vsock:any:.*: " IN_USE));
}
END_TEST

/* A channel over it, with a key, while one side and then the other ends. */
START_TEST(vsock)
{
    const unsigned local = 1, port = vsock_port(local);
    Daemon *host = NULL, *guest = NULL;
    char key[PATH_LEN];
    Wire w;

    if (port == 0) {
        PASS_OVER("vsock with the kernel's module vsock_loopback");
    }
    w.listener = listen_any(w.target);
    file_path(key, "key");
    file_write(key, "key that both of them have", 26);
    ck_assert(chmod(key, 0600) == 0);
    for (int i = 0; i < 3; i++) {
        if (i != 1) {
            guest = daemon_start("guest", "-k %s -c vsock-listen:any:%u "
                                 "-i s:%s", key, port, w.target);
        }
        if (i != 2) {
            host = daemon_start("host", "-k %s -c vsock-connect:1:%u "
                                "-o s:127.0.0.1:0", key, port);
        }
        daemon_wait(host, "channel up: new session");
        daemon_mark(host);
        w.where = daemon_listens(host, "s");
        check_works(&w);
        if (i < 2) {
            daemon_kill(i == 0 ? host : guest);
        }
    }
    ck_assert_int_eq(daemon_count(guest, " warn "), 0);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("connections");

    SUITE_ADD(s, debug_log);
    SUITE_ADD(s, urgent_byte);
    SUITE_LOOP(s, verbose_log, 2);
    SUITE_LOOP(s, half_close_tcp, 2);
    SUITE_LOOP(s, half_close_unix, 2);
    SUITE_ADD(s, half_close_idle);
    SUITE_ADD(s, send_and_close);
    SUITE_LOOP(s, reset, 4);
    SUITE_LOOP(s, reset_after_half_close, 4);
    SUITE_LOOP(s, gone_after_half_close, 2);
    SUITE_ADD(s, refused_target);
    SUITE_ADD(s, refused_unix_target);
    SUITE_ADD(s, unknown_service);
    SUITE_ADD(s, early_data);
    SUITE_ADD(s, early_leave);
    SUITE_ADD(s, connect_timeout);
    SUITE_ADD(s, every_address);
    SUITE_ADD(s, named_listener);
    SUITE_ROWS(s, at_once, loads);
    SUITE_ADD(s, idle_ones);
    SUITE_ADD(s, churn);
    SUITE_ROWS(s, bulk_both_ways, bulk_kinds);
    SUITE_ADD(s, stuck_kernel);
    SUITE_ADD(s, interop);
    SUITE_ADD(s, stuck_clients);
    SUITE_ADD(s, stuck_servers);
    SUITE_ROWS(s, stalled_channel, stalls);
    SUITE_ADD(s, keystrokes);
    SUITE_ADD(s, vsock_listens);
    SUITE_ADD(s, vsock);
    return harness_run(s);
}
