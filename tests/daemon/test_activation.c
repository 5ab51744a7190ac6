/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_activation.c - sockets that somebody else listens on, as systemd does
 *
 * The test itself is the starter (StartOptions.listen_fds), and keeps its copy
 * of each socket; or it is systemd-socket-activate.
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "monitor.h"
#include "talk.h"

#define CLIENTS 40              /* that come while there is no daemon */

/* The sockets of a daemon "host", and the services of a daemon "guest". */
typedef struct Scene {
    StartOptions start;         /* of the host */
    char web[2][TEXT_LEN];      /* addresses of both sockets "web" */
    char u[PATH_LEN];           /* and of the others */
    char mon[PATH_LEN];
    char chan[PATH_LEN];
    int listener;               /* that service "web" leads to */
    int u_listener;             /* and service "u" */
    Daemon *guest;
} Scene;

static void scene_make(Scene *s)
{
    char target[TEXT_LEN], u_target[TEXT_LEN];

    memset(s, 0, sizeof(*s));
    s->listener = listen_any(target);
    s->u_listener = listen_any(u_target);
    file_path(s->u, "u");
    file_path(s->mon, "mon");
    file_path(s->chan, "chan");
    s->start.listen_fds[0] = listen_any(s->web[0]);
    s->start.listen_fds[1] = listen_on(s->u, 100);
    s->start.listen_fds[2] = listen_any(s->web[1]);
    s->start.listen_fds[3] = listen_on(s->mon, 100);
    s->start.listen_fds[4] = listen_on(s->chan, 100);
    s->start.n_listen_fds = 5;
    s->start.listen_names = "web::web:mon:chan";
    s->guest = daemon_start("guest", "-c unix-connect:%s:- -i web:%s -i u:%s",
                            s->chan, target, u_target);
    daemon_wait(s->guest, "iforward u: to");    /* it takes signals by now */
}

static Daemon *scene_host(Scene *s)
{
    return daemon_start_with(&s->start, "host", "-c fd:chan:- -o web:fd:web "
                             "-o u:fd:4 -m fd:mon");
}

/* By name and by number; several of a name; they belong to the starter. */
START_TEST(named)
{
    char where[TEXT_LEN], path[PATH_LEN];
    const char *line;
    Daemon *host;
    FILE *info;
    Scene s;
    int mon;

    scene_make(&s);
    host = scene_host(&s);
    daemon_up(host);
    check_works(s.web[0], s.listener);
    check_works(s.web[1], s.listener);
    check_works(s.u, s.u_listener);
    daemon_wait(host, "channel fd: listening on %s$", s.chan);
    ck_assert_int_eq(daemon_count(host, " (warn|error) "), 0);

    mon = monitor_batch(s.mon);
    line = line_find(monitor_ask(mon, "info oforwards -k"), "oforward", 0);
    text_format(where, sizeof(where), "listening=%s listening=%s", s.web[0],
                s.web[1]);
    ck_assert_msg(strstr(line, where) != NULL, "%s", line);
    line = line_find(monitor_ask(mon, "info channels -k"), "channel", 0);
    ck_assert_str_eq(value(line, "listening"), s.chan);
    ck_assert_str_eq(value(line, "spec"), "fd:chan:-");
    text_format(where, sizeof(where), "listening on %s\n", s.chan);
    ck_assert_ptr_nonnull(strstr(monitor_ask(mon, "info channels"), where));

    /* no program that it may start gets them */
    for (int fd = 3; fd < 8; fd++) {
        char flags[TEXT_LEN] = "";

        text_format(path, sizeof(path), "/proc/%d/fdinfo/%d", (int)host->pid,
                    fd);
        info = fopen(path, "r");
        ck_assert_ptr_nonnull(info);
        while (fgets(flags, sizeof(flags), info) != NULL &&
               strncmp(flags, "flags:", 6) != 0) {
        }
        fclose(info);
        ck_assert_msg(strtol(flags + 6, NULL, 8) & O_CLOEXEC, "%d: %s", fd,
                      flags);
    }

    daemon_stop(host);
    ck_assert(access(s.u, F_OK) == 0 && access(s.mon, F_OK) == 0 &&
              access(s.chan, F_OK) == 0);
    close(dial(s.u, true));
}
END_TEST

/* What is passed and nobody wants is said, in one line. */
START_TEST(unused)
{
    Daemon *host;
    Scene s;

    scene_make(&s);
    host = daemon_start_with(&s.start, "host", "-c unix-listen:%s/c:- "
                             "-o u:fd:4", vp_dir);
    daemon_wait(host, "warn no -o, -m or -c uses these descriptors of "
                "LISTEN_FDS: 3 \\(web\\) 5 \\(web\\) 6 \\(mon\\) 7 "
                "\\(chan\\)$");
    ck_assert_int_eq(daemon_count(host, " warn "), 1);
}
END_TEST

typedef struct Wrong {
    const char *options;
    const char *said;           /* an ERE */
} Wrong;

static const Wrong wrongs[] = {
    { "-o a:fd:web", "-o 'a:fd:web': descriptor 4: it is not a stream socket "
      "that listens" },
    { "-o a:fd:5", "descriptor 5: it is not a stream socket that listens" },
    { "-o a:fd:6", "descriptor 6: it is not a stream socket that listens" },
    { "-o a:fd:9", "descriptor 9: it was not open" },
    { "-o a:fd:5000", "descriptor 5000: only those below 1024" },
    { "-o a:fd:we", "no descriptor of this name: LISTEN_FDNAMES is web:web:" },
    { "-o a:fd:webs", "-o 'a:fd:webs': there is no descriptor of this name" },
    { "-c fd:6:-:1", "-c 'fd:6:-:1': descriptor 6: it is /dev/null" },
    { "-c fd:none:-:1", "-c 'fd:none:-:1': there is no descriptor of this" },
    { "-m fd:none", "-m 'fd:none': there is no descriptor of this name" },
    { "-o a:fd:3 -o b:fd:3", "descriptor 3: it was not open at the start, or "
      "is taken" },
    { "-c fd:3:-:1 -o b:fd:3", "-o 'b:fd:3': descriptor 3: .* is taken" },
    { "-m fd:3", "-m 'fd:3': descriptor 3: it is not a unix socket" },
    { "-o *:fd:3", "descriptor 3: it is not a unix socket" },
    { "-m fd:two", "-m 'fd:two': descriptor 8: too many have this name" },
};

/* What can't be listened on is named, and ends the start. */
START_TEST(wrong)
{
    StartOptions start = { .n_listen_fds = 6,
                           .listen_names = "web:web:dgram:file:two:two" };
    char where[TEXT_LEN], path[PATH_LEN];
    Daemon *d;

    start.listen_fds[0] = listen_any(where);
    start.listen_fds[1] = dial(where, true);
    start.listen_fds[2] = socket(AF_INET, SOCK_DGRAM, 0);
    start.listen_fds[3] = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 2; i++) {
        file_path(path, i ? "two" : "one");
        start.listen_fds[4 + i] = listen_on(path, 1);
    }
    d = daemon_start_with(&start, "host", "-c unix-listen:%s/c:- %s", vp_dir,
                          wrongs[_i].options);
    ck_assert_int_ne(daemon_exit(d), 0);
    ck_assert_msg(daemon_saw(d, wrongs[_i].said), "not said: %s",
                  wrongs[_i].said);
}
END_TEST

/* What was passed to another process has numbers here, but no names. */
START_TEST(of_another)
{
    Daemon *d;
    Scene s;

    scene_make(&s);
    s.start.listen_others = true;
    d = daemon_start_with(&s.start, "host", "-c fd:7:- -o a:fd:web");
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(daemon_saw(d, "no descriptor of this name: LISTEN_FDS has none "
                         "for this process"));
    d = daemon_start_with(&s.start, "host", "-c fd:7:- -o web:fd:3");
    daemon_up(d);
    check_works(s.web[0], s.listener);
    ck_assert_int_eq(daemon_count(d, " warn "), 0);
}
END_TEST

/* [::] leaves IPv4 to a socket that was passed, whichever is asked for first. */
START_TEST(other_family)
{
    char any[TEXT_LEN];
    Daemon *host;
    Scene s;

    if (!has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    scene_make(&s);
    text_format(any, sizeof(any), "[::]:%d", port_of(s.web[0]));
    for (int i = 0; i < 2; i++) {
        host = daemon_start_with(&s.start, i ? "six-last" : "six-first",
                                 "-c fd:chan:- -o a:%s -o b:%s",
                                 i ? "fd:3" : any, i ? any : "fd:3");
        daemon_wait(host, "listening on .::.:%d$", port_of(s.web[0]));
        daemon_wait(host, "listening on %s$", s.web[0]);
        daemon_up(host);
        daemon_stop(host);
    }
}
END_TEST

/* With its spec, or with that of its channel, taken away and given again. */
START_TEST(reloaded)
{
    const char *files[] = {
        "channel fd:chan:-\noforward web:fd:web\noforward u:fd:4\n",
        "channel fd:chan:-\noforward web:fd:web\n",
        "channel fd:7:-\noforward web:fd:web\noforward u:fd:4\n",
    };
    char path[PATH_LEN], options[2 * PATH_LEN];
    int early[2], fds[2], waits = -1;
    Daemon *host;
    Scene s;

    scene_make(&s);
    file_path(path, "conf");
    file_write(path, files[0], strlen(files[0]));
    text_format(options, sizeof(options), "-C %s -m fd:mon", path);
    host = daemon_start_with(&s.start, "host", "%s", options);
    daemon_up(host);
    through(s.web[0], s.listener, early);
    talk(early);

    for (int i = 1; i < 4; i++) {
        const char *file = files[i % 3];

        file_write(path, file, strlen(file));
        daemon_mark(host);
        kill(host->pid, SIGHUP);
        daemon_wait(host, "reloaded$");
        ck_assert_int_eq(daemon_count(host, " (warn|error) "), 0);
        check_works(s.web[0], s.listener);
        check_works(s.web[1], s.listener);
        if (i == 1) {
            talk(early);                /* what didn't change goes on */
            ck_assert_int_eq(daemon_count(host, "web: listening"), 0);
            waits = dial(s.u, true);    /* nobody accepts it as yet */
        } else if (i == 2) {
            fds[0] = waits;
            fds[1] = accept_one(s.u_listener);
            talk(fds);
        } else {
            check_works(s.u, s.u_listener);
        }
    }
    ck_assert_int_eq(execute(s.mon, "oforward_del web:fd:web"), 0);
    ck_assert_int_eq(execute(s.mon, "oforward_add web:fd:web"), 0);
    check_works(s.web[1], s.listener);
    ck_assert_int_eq(execute(s.mon, "oforward_add web:fd:3"), 1);
    ck_assert_ptr_nonnull(strstr(executed(2), "taken"));
}
END_TEST

/* Who connects while there is no daemon is served by the next one. */
START_TEST(restarted)
{
    int clients[CLIENTS], fds[2];
    Daemon *host;
    Scene s;

    scene_make(&s);
    for (int round = 0; round < 3; round++) {
        host = scene_host(&s);
        daemon_up(host);
        for (int i = 0; i < CLIENTS && round > 0; i++) {
            fds[0] = clients[i];
            send_all(fds[0], "hello", 5);
        }
        for (int i = 0; i < CLIENTS && round > 0; i++) {
            fds[1] = accept_one(i % 2 ? s.listener : s.u_listener);
            expect_bytes(fds[1], "hello");
            send_all(fds[1], "world", 5);
            close(fds[1]);
        }
        for (int i = 0; i < CLIENTS && round > 0; i++) {
            expect_bytes(clients[i], "world");
            expect_eof(clients[i]);
            close(clients[i]);
        }
        check_works(s.web[0], s.listener);
        if (round == 0) {
            daemon_stop(host);
        } else {
            daemon_kill(host);
        }
        for (int i = 0; i < CLIENTS && round < 2; i++) {
            clients[i] = dial(i % 2 ? s.web[0] : s.u, true);
        }
    }
}
END_TEST

static const char *const starts[] = {
    "-o u:fd:3 -m fd:4", "-o u:fd:web -m fd:mon",
    "-o u:fd:web -m fd:mon -d -f %s/pid -l %s/host.log",
};

/*
 * systemd's own starter, with and without names; and on the way to the
 * background, where the socket that nobody wants is let go.
 */
START_TEST(systemd)
{
    char more[3 * PATH_LEN], u[PATH_LEN], mon[PATH_LEN], log[PATH_LEN];
    char extra[PATH_LEN], target[TEXT_LEN];
    int listener = listen_any(target), fds[2];
    pid_t pid;

    if (child_wait(command_start("has", "systemd-socket-activate --version"))) {
        PASS_OVER("systemd-socket-activate, of the package systemd");
    }
    daemons_adopt();
    file_path(u, "u");
    file_path(mon, "mon");
    file_path(extra, "extra");
    text_format(more, sizeof(more), starts[_i], vp_dir, vp_dir);
    pid = command_start("activate", "exec systemd-socket-activate -l %s -l %s "
                        "-l %s %s %s -c unix-listen:%s/chan:- %s", u, mon,
                        extra, _i > 0 ? "--fdname=web:mon:extra" : "",
                        vp_program, vp_dir, more);
    file_wait("activate.log", "extra as 5");
    fds[0] = dial(u, true);             /* this one starts it */
    daemon_start("guest", "-c unix-connect:%s/chan:- -i u:%s", vp_dir, target);
    fds[1] = accept_one(listener);
    talk(fds);
    check_works(u, listener);
    ck_assert_int_eq(execute(mon, "info status"), 0);
    if (_i == 2) {
        command_wait(pid);
        file_path(log, "host.log");
        daemon_adopted("host", pid_in("pid"), log);
        file_wait("host.log", "of LISTEN_FDS: 5 (extra)\n");
        ck_assert_int_eq(dial_errno(extra, true, &fds[0]), ECONNREFUSED);
        ck_assert_int_eq(execute(mon, "oforward_del u:fd:web"), 0);
        ck_assert_int_eq(execute(mon, "oforward_add u:fd:web"), 0);
        check_works(u, listener);
    }
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("activation");

    SUITE_ADD(s, named);
    SUITE_ADD(s, unused);
    SUITE_ROWS(s, wrong, wrongs);
    SUITE_ADD(s, of_another);
    SUITE_ADD(s, other_family);
    SUITE_ADD(s, reloaded);
    SUITE_ADD(s, restarted);
    SUITE_ROWS(s, systemd, starts);
    return harness_run(s);
}
