/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_names.c - names and addresses that come later, change, or never come
 */
#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "monitor.h"
#include "names.h"
#include "talk.h"

/* What puts vp_dir's file "hosts" over /etc/hosts for a daemon alone */
#define HOSTS_SETUP "mount -n --bind hosts /etc/hosts"

/* hosts() - what it says from now on; the file stays the same one */
static void hosts(const char *text)
{
    file_write("hosts", text, strlen(text));
}

/* address_add() - give the loopback a further address */
static void address_add(const char *address)
{
    struct ifreq lo = { .ifr_name = "lo:1" };
    struct sockaddr_in *in = (void *)&lo.ifr_addr;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    in->sin_family = AF_INET;
    ck_assert(inet_pton(AF_INET, address, &in->sin_addr) == 1);
    ck_assert_msg(ioctl(fd, SIOCSIFADDR, &lo) == 0, "%s", strerror(errno));
    close(fd);
}

/* reaches() - have connections to where arrived at listener, before long */
static void reaches(const char *where, int listener)
{
    struct pollfd pfd = { .fd = listener, .events = POLLIN };
    int64_t end = now_ms() + WAIT_MS;
    int fd;

    do {
        ck_assert_msg(now_ms() < end, "nobody comes");
        fd = dial(where, true);
        poll(&pfd, 1, 100);
        close(fd);
    } while (!(pfd.revents & POLLIN));
    close(accept_one(listener));
}

/*
 * A name that moves is followed at SIGHUP, and when it is used and none of its
 * addresses will do; who connects meanwhile is refused, not held up.
 */
START_TEST(name_moves)
{
    StartOptions o = { .setup = HOSTS_SETUP };
    char path[PATH_LEN], where[TEXT_LEN];
    int port = free_port(), listener[2];
    const char *service;
    Daemon *host, *guest;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    ck_assert(chdir(vp_dir) == 0);
    for (int i = 0; i < 2; i++) {
        text_format(where, sizeof(where), "127.0.0.%d:%d", 2 + i, port);
        listener[i] = listen_on(where, 5);
    }
    hosts("127.0.0.1 localhost\n127.0.0.2 db.test\n");
    file_path(path, "channel");
    host = daemon_start("host", "-c unix-listen:%s:- -o s:127.0.0.1:0", path);
    guest = daemon_start_with(&o, "guest", "-c unix-connect:%s:- "
                              "-i s:db.test:%d", path, port);
    daemon_up(guest);
    service = daemon_listens(host, "s");
    check_works(service, listener[0]);

    hosts("127.0.0.1 localhost\n127.0.0.3 db.test\n");
    check_works(service, listener[0]); /* what is known still serves */
    kill(guest->pid, SIGHUP);
    daemon_wait(guest, "info reloaded");
    reaches(service, listener[1]);

    close(listener[0]);
    close(listener[1]);
    hosts("127.0.0.1 localhost\n127.0.0.4 db.test\n");
    text_format(where, sizeof(where), "127.0.0.4:%d", port);
    listener[0] = listen_on(where, 5);
    reaches(service, listener[0]);
    close(listener[0]);
}
END_TEST

/*
 * A name that is listened on has another address: so have the listeners of
 * channels and services, and connections that are there go on.
 */
START_TEST(name_to_listen_on_moves)
{
    StartOptions o = { .setup = HOSTS_SETUP };
    int listener, port = free_port(), served = free_port(), client, server, fd;
    char target[TEXT_LEN], where[2][TEXT_LEN], path[PATH_LEN];
    const char *line;
    int mon;
    Daemon *host, *guest;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    ck_assert(chdir(vp_dir) == 0);
    for (int i = 0; i < 2; i++) {
        text_format(where[i], TEXT_LEN, "127.0.0.%d:%d", 2 + i, served);
    }
    listener = listen_any(target);
    hosts("127.0.0.1 localhost\n127.0.0.2 here.test\n");
    file_path(path, "monitor");
    host = daemon_start_with(&o, "host", "-c tcp-listen:here.test:%d "
                             "-o s:here.test:%d -m %s", port, served, path);
    guest = daemon_start("guest", "-c tcp-connect:127.0.0.2:%d -i s:%s", port,
                         target);
    daemon_up(guest);
    client = dial(where[0], true);
    send_all(client, "a", 1);
    server = accept_one(listener);
    expect_bytes(server, "a");

    hosts("127.0.0.1 localhost\n127.0.0.3 here.test\n");
    daemon_mark(host);
    kill(host->pid, SIGHUP);
    daemon_wait(host, "oforward s: no longer listening on %s$", where[0]);
    daemon_wait(host, "oforward s: listening on %s$", where[1]);
    daemon_wait(host, "channel tcp-listen: no longer listening on "
                "127.0.0.2:%d$", port);
    daemon_wait(host, "channel tcp-listen: listening on 127.0.0.3:%d$", port);
    daemon_wait(host, "info reloaded");
    ck_assert_int_eq(dial_errno(where[0], true, &fd), ECONNREFUSED);
    close(fd);
    check_works(where[1], listener);
    send_all(client, "b", 1);
    expect_bytes(server, "b");

    daemon_kill(guest);
    guest = daemon_start("new", "-c tcp-connect:127.0.0.3:%d -i s:%s", port,
                         target);
    daemon_up(guest);
    check_works(where[1], listener);
    daemon_mark(host);
    kill(host->pid, SIGHUP);
    daemon_wait(host, "info reloaded");
    ck_assert(!daemon_saw(host, "listening on"));

    /* one of two addresses goes: it isn't shown any more */
    hosts("127.0.0.1 localhost\n127.0.0.3 here.test\n127.0.0.4 here.test\n");
    kill(host->pid, SIGHUP);
    daemon_wait(host, "channel tcp-listen: listening on 127.0.0.4:%d$", port);
    hosts("127.0.0.1 localhost\n127.0.0.4 here.test\n");
    kill(host->pid, SIGHUP);
    daemon_wait(host, "channel tcp-listen: no longer listening on "
                "127.0.0.3:%d$", port);
    mon = monitor_batch(path);
    text_format(target, sizeof(target), "127.0.0.4:%d", port);
    line = line_find(monitor_ask(mon, "info channels -k"), "channel", 0);
    ck_assert_str_eq(value(line, "listening"), target);
    line = strstr(monitor_ask(mon, "info channels"), "listening on ");
    ck_assert_ptr_nonnull(line);
    ck_assert_msg(strncmp(line + 13, target, strlen(target)) == 0, "%s", line);
    close(mon);
}
END_TEST

/*
 * One of the addresses that a name has moved to is in use: the other one serves
 * from then on, and that one once it is free.
 */
START_TEST(name_moves_to_port_in_use)
{
    StartOptions o = { .setup = HOSTS_SETUP };
    int listener, served = free_port(), taken;
    char target[TEXT_LEN], where[2][TEXT_LEN], path[PATH_LEN];
    Daemon *host;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    ck_assert(chdir(vp_dir) == 0);
    for (int i = 0; i < 2; i++) {
        text_format(where[i], TEXT_LEN, "127.0.0.%d:%d", 3 + i, served);
    }
    file_path(path, "channel");
    listener = listen_any(target);
    hosts("127.0.0.1 localhost\n127.0.0.2 here.test\n");
    host = daemon_start_with(&o, "host", "-c unix-listen:%s:- "
                             "-o s:here.test:%d", path, served);
    daemon_up(daemon_start("guest", "-c unix-connect:%s:- -i s:%s", path,
                           target));
    taken = listen_on(where[1], 1);
    hosts("127.0.0.1 localhost\n127.0.0.3 here.test\n127.0.0.4 here.test\n");
    kill(host->pid, SIGHUP);
    daemon_wait(host, "oforward s:.*: cannot listen on %s: " IN_USE
                ": trying again", where[1]);
    daemon_wait(host, "oforward s: listening on %s$", where[0]);
    daemon_wait(host, "info reloaded");
    check_works(where[0], listener);
    close(taken);
    daemon_wait(host, "oforward s: listening on %s$", where[1]);
    check_works(where[1], listener);
    close(listener);
}
END_TEST

/*
 * The name server comes up after the daemons: what needs no name works from the
 * start, what does is there in the end, and who came for it has waited.
 */
START_TEST(server_later)
{
    StartOptions o = { .setup = NAMES_SETUP };
    int listener[2], server, early, fd, port = free_port();
    char path[PATH_LEN], target[2][TEXT_LEN], where[TEXT_LEN];
    Daemon *host, *guest;

    server = names_server();
    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    listener[0] = listen_any(target[0]);
    listener[1] = listen_any(target[1]);
    file_path(path, "channel");
    host = daemon_start_with(&o, "host", "-c unix-listen:%s:- "
                             "-c tcp-listen:later.test:%d:1 "
                             "-o plain:127.0.0.1:0 -o named:127.0.0.1:0 "
                             "-o at:later.test:0", path, port);
    guest = daemon_start_with(&o, "guest", "-c unix-connect:%s:- "
                              "-c tcp-connect:later.test:%d:1 "
                              "-i plain:%s -i named:later.test:%d -i at:%s",
                              path, port, target[0], port_of(target[1]),
                              target[0]);
    daemon_wait(guest, "ch0: channel up");
    check_works(daemon_listens(host, "plain"), listener[0]);
    early = dial(daemon_listens(host, "named"), true);
    names_answer(server);
    fd = accept_one(listener[1]);
    send_all(early, "early", 5);
    expect_bytes(fd, "early");
    daemon_wait(guest, "ch1: channel up");
    check_works(daemon_listens(host, "at"), listener[0]);

    /* A name that isn't there: said once, and nobody hangs for it */
    text_format(where, sizeof(where), "%s/m", vp_dir);
    guest = daemon_start_with(&o, "none", "-c unix-connect:%s/no:- "
                              "-i x:nowhere.test:80 -o y:nowhere.test:80 -m %s",
                              vp_dir, where);
    daemon_wait(guest, "warn ch0: -i 'x:nowhere.test:80': cannot look up "
                "'nowhere.test': .*: trying again");
    daemon_wait(guest, "warn ch0: -o 'y:nowhere.test:80': cannot look up "
                "'nowhere.test': .*: trying again");
    sleep_ms(1000); /* a few more tries */
    ck_assert_int_eq(daemon_count(guest, "cannot look up"), 2);
    daemon_stop(guest);
    close(early);
    close(fd);
    close(listener[0]);
    close(listener[1]);
    close(server);
}
END_TEST

/* notified() - a socket for what systemd would be told, in the environment */
static int notified(void)
{
    struct sockaddr_un sun = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    text_format(sun.sun_path, sizeof(sun.sun_path), "%s/notify", vp_dir);
    ck_assert(bind(fd, (struct sockaddr *)&sun, sizeof(sun)) == 0);
    ck_assert(setenv("NOTIFY_SOCKET", sun.sun_path, 1) == 0);
    return fd;
}

/* notified_next() - wait for what systemd would be told next */
static const char *notified_next(int notify)
{
    static char said[TEXT_LEN];
    struct pollfd pfd = { .fd = notify, .events = POLLIN };
    ssize_t n;

    ck_assert_msg(poll(&pfd, 1, WAIT_MS) == 1, "systemd is told nothing");
    n = recv(notify, said, sizeof(said) - 1, 0);
    ck_assert(n > 0);
    said[n] = '\0';
    return said;
}

/*
 * A daemon that was told to end doesn't wait for names, at its start either,
 * nor does it say that it is ready.
 */
START_TEST(end_while_starting)
{
    StartOptions o = { .setup = NAMES_SETUP };
    int server, notify;
    Daemon *d[1];
    int64_t start;
    char more;

    server = names_server();
    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    notify = notified();
    d[0] = daemon_start_with(&o, "starts", "-c tcp-listen:later.test:0 "
                             "-c unix-listen:%s/ch:-:1 -i i:later.test:80 "
                             "-o o:later.test:0 -o plain:127.0.0.1:0", vp_dir);
    daemon_listens(d[0], "plain");
    sleep_ms(200); /* the names are asked for by now, most likely */
    start = undelayed_ms(d, 1);
    kill(d[0]->pid, SIGTERM);
    ck_assert_int_eq(daemon_exit(d[0]), 0);
    ck_assert_int_lt(undelayed_ms(d, 0) - start, 4000);
    ck_assert_str_eq(notified_next(notify), "STOPPING=1");
    ck_assert(recv(notify, &more, 1, 0) < 0);
    close(notify);
    close(server);
}
END_TEST

/*
 * A name that is known only once the start waits no more: what can't be
 * listened on then is said, and tried again.
 */
START_TEST(name_late_in_use)
{
    StartOptions o = { .setup = NAMES_SETUP };
    char where[TEXT_LEN];
    int taken = listen_any(where), server = names_server(), notify;
    pid_t names;
    Daemon *d;

    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    notify = notified();
    d = daemon_start_with(&o, "late", "-c unix-listen:%s/ch:- "
                          "-o s:later.test:%d", vp_dir, port_of(where));
    ck_assert_str_eq(notified_next(notify), "READY=1"); /* after 10 s */
    names = names_answer(server);
    daemon_wait(d, "cannot listen on .*: " IN_USE ".*: trying again");
    names_hang(names); /* its copy of the port's socket goes with it */
    close(taken);
    names_answer(server);
    daemon_listens(d, "s");
    close(notify);
    close(server);
}
END_TEST

/* A channel that comes while a reload waits for names has the new key. */
START_TEST(key_while_reloading)
{
    static const char *const keys[] = {
        "the key that was before\n", "the key that is to come\n",
    };
    StartOptions o = { .setup = NAMES_SETUP };
    char conf[4 * TEXT_LEN], path[PATH_LEN];
    int server = names_server(), mon;
    Daemon *d;

    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    file_path(path, "m");
    text_format(conf, sizeof(conf), "channel unix-listen:%s/old:-\n"
                "iforward s:later.test:80\nkey key\nmonitor %s\n", vp_dir, path);
    file_write("conf", conf, strlen(conf));
    umask(077);
    file_write("key", keys[0], strlen(keys[0]));
    file_write("new-key", keys[1], strlen(keys[1]));
    d = daemon_start_with(&o, "host", "-C conf");
    mon = monitor_batch(path);
    file_write("key", keys[1], strlen(keys[1]));
    kill(d->pid, SIGHUP);
    sleep_ms(200); /* of the second that it waits for names */
    monitor_ask(mon, "channel_add unix-listen:%s/new:-:1", vp_dir);
    daemon_up(daemon_start("guest", "-k new-key -c unix-connect:%s/new:-",
                           vp_dir));
    close(mon);
    close(server);
}
END_TEST

/* That the daemon is ended while a reload waits for names is no success. */
START_TEST(end_while_reloading)
{
    StartOptions o = { .setup = NAMES_SETUP };
    int server = names_server(), mon[2];
    char path[PATH_LEN], *answer;
    Daemon *d;

    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    file_path(path, "m");
    d = daemon_start_with(&o, "host", "-c unix-listen:%s/ch:- "
                          "-i s:later.test:80 -m %s", vp_dir, path);
    mon[0] = monitor_batch(path);
    mon[1] = monitor_batch(path);
    kill(d->pid, SIGSTOP); /* so that it gets both at once */
    send_all(mon[0], "reload\n", 7);
    send_all(mon[1], "quit\n", 5);
    kill(d->pid, SIGCONT);
    answer = monitor_answer(mon[0]);
    ck_assert_msg(strncmp(answer, "error: the daemon ", 18) == 0, "%s", answer);
    ck_assert_int_eq(daemon_exit(d), 0);
    free(answer);
    close(mon[0]);
    close(mon[1]);
    close(server);
}
END_TEST

/* What is wrong for good still ends the start, name or not. */
START_TEST(name_in_use)
{
    char where[TEXT_LEN];
    int fd = listen_any(where);
    Daemon *d;

    if (!has_localhost()) {
        PASS_OVER(HAS_LOCALHOST);
    }
    d = daemon_start("taken", "-c unix-listen:%s/ch:- -o s:localhost:%d",
                     vp_dir, port_of(where));
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(daemon_saw(d, "cannot listen on .*: " IN_USE));
    close(fd);
}
END_TEST

/* An address that comes later is listened on then; one of two is no secret. */
START_TEST(address_later)
{
    StartOptions o = { .setup = HOSTS_SETUP };
    char target[TEXT_LEN], path[PATH_LEN];
    int port = free_port(), channel = free_port(), listener, mon;
    Daemon *host, *guest;

    if (!own_network()) {
        PASS_OVER(OWN_NETWORK);
    }
    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    ck_assert(chdir(vp_dir) == 0);
    hosts("127.0.0.1 two.test\n10.9.9.1 two.test\n");
    listener = listen_any(target);
    file_path(path, "monitor");
    host = daemon_start_with(&o, "host", "-c tcp-listen:10.9.9.1:%d "
                             "-o s:10.9.9.1:0 -o two:two.test:%d -m %s",
                             channel, port, path);
    daemon_wait(host, "channel tcp-listen:.*: cannot listen on 10.9.9.1:%d: "
                NOT_HERE ": trying again", channel);
    daemon_wait(host, "oforward s:10.9.9.1:0: cannot listen on 10.9.9.1:0: "
                NOT_HERE ": trying again");
    daemon_wait(host, "oforward two:.*: cannot listen on 10.9.9.1:%d: "
                NOT_HERE ": trying again", port);
    daemon_wait(host, "oforward two: listening on 127.0.0.1:%d", port);
    mon = monitor_batch(path);
    ck_assert_ptr_nonnull(strstr(monitor_ask(mon, "info oforwards"),
                                 " none yet\n"));
    close(mon);
    guest = daemon_start("guest", "-c tcp-connect:10.9.9.1:%d -i s:%s",
                         channel, target);
    address_add("10.9.9.1");
    daemon_up(guest);
    check_works(daemon_listens(host, "s"), listener);
    daemon_wait(host, "oforward two: listening on 10.9.9.1:%d", port);
    ck_assert_int_eq(daemon_count(host, "trying again"), 3);
    close(listener);
}
END_TEST

/* tap_make() - an interface that lives as long as the descriptor; -1: no */
static int tap_make(void)
{
    /* as struct in6_ifreq, whose header and libc's don't go together */
    struct { struct in6_addr addr; uint32_t prefix; int index; } in6 = {
        .prefix = 64,
    };
    struct ifreq tap = { .ifr_name = "tap", .ifr_flags = IFF_TAP | IFF_NO_PI };
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    int ctl = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ctl < 0 || ioctl(fd, TUNSETIFF, &tap) < 0) {
        close(fd);
        return -1;
    }
    tap.ifr_flags = IFF_UP;
    ck_assert(ioctl(ctl, SIOCSIFFLAGS, &tap) == 0);
    in6.index = (int)if_nametoindex("tap");
    ck_assert(inet_pton(AF_INET6, "fe80::77", &in6.addr) == 1);
    ck_assert(ioctl(ctl, SIOCSIFADDR, &in6) == 0);
    close(ctl);
    return fd;
}

/* An address of an interface that is made anew is listened on anew. */
START_TEST(interface_anew)
{
    struct sockaddr_in6 in6 = { .sin6_family = AF_INET6 };
    int tap, fd, port = free_port();
    Daemon *d;

    if (!own_network()) {
        PASS_OVER(OWN_NETWORK);
    }
    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    tap = tap_make();
    if (tap < 0) {
        PASS_OVER("/dev/net/tun");
    }
    d = daemon_start("scope", "-c unix-listen:%s/ch:- -o s:[fe80::77%%tap]:%d",
                     vp_dir, port);
    daemon_wait(d, "oforward s: listening on .fe80::77%%tap.:%d", port);
    daemon_mark(d);
    close(tap);
    tap = tap_make();
    daemon_wait(d, "oforward s: listening on .fe80::77%%tap.:%d", port);
    inet_pton(AF_INET6, "fe80::77", &in6.sin6_addr);
    in6.sin6_port = htons((uint16_t)port);
    in6.sin6_scope_id = if_nametoindex("tap");
    fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_msg(connect(fd, (struct sockaddr *)&in6, sizeof(in6)) == 0,
                  "%s", strerror(errno));
    sleep_ms(6000); /* nothing has changed any more when it is looked at */
    ck_assert_int_eq(daemon_count(d, "oforward s: listening"), 1);
    close(fd);
    close(tap);
}
END_TEST

/* A name of both families gets a port that is free in both. */
START_TEST(port_of_two)
{
    static const char range[] = "/proc/sys/net/ipv4/ip_local_port_range";
    static const char *const taken[] = {
        "127.0.0.1:40000", "127.0.0.1:40001", "[::1]:40002",
    };
    StartOptions o = { .setup = HOSTS_SETUP };
    Daemon *d;

    if (!own_network()) {
        PASS_OVER(OWN_NETWORK);
    }
    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    if (access(range, W_OK) < 0) {
        PASS_OVER("a /proc/sys that can be written");
    }
    ck_assert(chdir(vp_dir) == 0);
    hosts("127.0.0.1 two.test\n::1 two.test\n");
    file_write(range, "40000 40003", 11);
    for (int i = 0; i < COUNT_OF(taken); i++) {
        listen_on(taken[i], 1);
    }
    d = daemon_start_with(&o, "two", "-c unix-listen:%s/ch:- -o s:two.test:0",
                          vp_dir);
    daemon_wait(d, "oforward s: listening on 127.0.0.1:40003");
    daemon_wait(d, "oforward s: listening on .::1.:40003");
}
END_TEST

/*
 * [::] leaves IPv4 to whoever else asks for that port there, whoever comes
 * first; alone it serves both, and shows a client of IPv4 as one.
 */
START_TEST(both_families)
{
    char where[TEXT_LEN], path[PATH_LEN], other[TEXT_LEN];
    int port = free_port(), mon, client;
    Daemon *d;

    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    for (int i = 0; i < 2; i++) {
        d = daemon_start(i ? "six-last" : "six-first",
                         "-c unix-listen:%s/ch:- -o a:%s:%d -o b:%s:%d",
                         vp_dir, i ? "0.0.0.0" : "[::]", port,
                         i ? "[::]" : "0.0.0.0", port);
        daemon_wait(d, "oforward b: listening on");
        ck_assert_int_eq(daemon_count(d, "for IPv4 as well"), 0);
        daemon_stop(d);
    }
    file_path(path, "monitor");
    d = daemon_start("alone", "-c unix-listen:%s/ch:- -o s:[::]:%d -m %s",
                     vp_dir, port, path);
    daemon_wait(d, "oforward s: listening on .*:%d, for IPv4 as well", port);
    text_format(where, sizeof(where), "127.0.0.1:%d", port);
    mon = monitor_batch(path);
    client = dial(where, true);
    for (int64_t end = now_ms() + WAIT_MS; now_ms() < end; sleep_ms(10)) {
        if (line_count(monitor_ask(mon, "info conns -k"), "conn") == 1) {
            break;
        }
    }
    text_format(other, sizeof(other), "%s",
                value(line_find(monitor_ask(mon, "info conns -k"), "conn", 0),
                      "from"));
    ck_assert_msg(strncmp(other, "127.0.0.1:", 10) == 0, "from %s", other);
    close(client);
    close(mon);
}
END_TEST

/*
 * A channel's line changes while no name server answers: its forwards keep the
 * addresses they had, and nobody else waits.
 */
START_TEST(reload_without_server)
{
    StartOptions o = { .setup = HOSTS_SETUP " && " NAMES_SETUP };
    char conf[4 * TEXT_LEN], target[2][TEXT_LEN];
    int listener[2], fds[2], server;
    Daemon *d, *other, *again;

    if (!may_mount_hosts()) {
        PASS_OVER(MAY_MOUNT_HOSTS);
    }
    server = names_server();
    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    listener[0] = listen_any(target[0]);
    listener[1] = listen_any(target[1]);
    hosts("127.0.0.1 localhost\n127.0.0.1 a.test\n127.0.0.1 b.test\n");
    text_format(conf, sizeof(conf), "channel unix-listen:%s/one:-:0\n"
                "iforward a:a.test:%d:0\niforward b:b.test:80:0\n"
                "channel unix-listen:%s/two:-:1\niforward e:%s:1\n", vp_dir,
                port_of(target[0]), vp_dir, target[1]);
    file_write("conf", conf, strlen(conf));
    d = daemon_start_with(&o, "changes", "-C conf");
    other = daemon_start("other", "-c unix-connect:%s/two:- -o e:127.0.0.1:0",
                         vp_dir);
    again = daemon_start("again", "-c unix-connect:%s/one:- -o a:127.0.0.1:0",
                         vp_dir);
    daemon_up(other);
    daemon_up(again);
    through(daemon_listens(other, "e"), listener[1], fds);
    check_works(daemon_listens(again, "a"), listener[0]);

    hosts("127.0.0.1 localhost\n");
    memcpy(strstr(conf, "/one:"), "/new:", 5);
    file_write("conf", conf, strlen(conf));
    daemon_stop(again);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "info reloaded");
    talk(fds);
    again = daemon_start("anew", "-c unix-connect:%s/new:- -o a:127.0.0.1:0",
                         vp_dir);
    daemon_up(again);
    check_works(daemon_listens(again, "a"), listener[0]);
    talk(fds);
    daemon_stop(d);
    for (int i = 0; i < 2; i++) {
        close(fds[i]);
        close(listener[i]);
    }
    close(server);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("names");

    SUITE_ADD(s, name_moves);
    SUITE_ADD(s, name_to_listen_on_moves);
    SUITE_ADD(s, name_moves_to_port_in_use);
    SUITE_ADD(s, server_later);
    SUITE_ADD(s, end_while_starting);
    SUITE_ADD(s, name_late_in_use);
    SUITE_ADD(s, key_while_reloading);
    SUITE_ADD(s, end_while_reloading);
    SUITE_ADD(s, name_in_use);
    SUITE_ADD(s, address_later);
    SUITE_ADD(s, interface_anew);
    SUITE_ADD(s, port_of_two);
    SUITE_ADD(s, both_families);
    SUITE_ADD(s, reload_without_server);
    return harness_run(s);
}
