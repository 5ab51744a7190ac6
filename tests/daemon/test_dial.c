/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_dial.c - a service of the other side by its name, through -o '*'
 *
 * "host" has the socket that clients dial at, "guest" the services: "s" and
 * "22", which the test serves, and "dead", where nobody listens.
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "talk.h"

typedef struct Scene {
    Pair pair;
    int listener;           /* of services "s" and "22" */
    char socket[PATH_LEN];  /* where to dial */
} Scene;

static void scene_start(Scene *s, const char *more)
{
    char target[TEXT_LEN], host[2 * PATH_LEN], guest[2 * TEXT_LEN];

    s->listener = listen_any(target);
    file_path(s->socket, "dial");
    text_format(host, sizeof(host), "-o *:%s:- %s", s->socket, more);
    text_format(guest, sizeof(guest), "-i s:%s -i 22:%s -i dead:127.0.0.1:%d",
                target, target, free_port());
    pair_start(&s->pair, CHANNEL_UNIX, host, guest);
    daemon_listens(s->pair.host, "\\*");
}

/* expect_ok() - the line that says so, and not a byte more */
static void expect_ok(int fd)
{
    char line[16];
    size_t len = 0;
    regex_t ok;

    do {
        ck_assert(len < sizeof(line) - 1);
        recv_all(fd, line + len, 1);
    } while (line[len++] != '\n');
    line[len - 1] = '\0';
    ck_assert(regcomp(&ok, "^OK [0-9]{1,5}$", REG_EXTENDED) == 0);
    ck_assert_msg(regexec(&ok, line, 0, NULL, 0) == 0, "'%s'", line);
    regfree(&ok);
}

/* expect_closed() - without a byte */
static void expect_closed(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, 0);

    ck_assert_msg(n == 0 || (n < 0 && errno == ECONNRESET),
                  n > 0 ? "there is a byte" : "still open");
    close(fd);
}

/* dialled() - a connection to "s": [0] is the client's end */
static void dialled(const Scene *s, int fds[2])
{
    fds[0] = dial(s->socket, true);
    send_all(fds[0], "CONNECT s\n", 10);
    fds[1] = accept_one(s->listener);
    expect_ok(fds[0]);
}

/* The line in one piece, in bytes, and with what follows at once. */
START_TEST(pieces)
{
    static const char line[] = "CONNECT s\nearly";
    size_t step = _i == 0 ? sizeof(line) - 1 : _i == 1 ? 1 : 10;
    int client, server;
    Scene s;

    scene_start(&s, "");
    client = dial(s.socket, true);
    for (size_t at = 0; at < sizeof(line) - 1; at += step) {
        size_t left = sizeof(line) - 1 - at;

        send_all(client, line + at, left < step ? left : step);
        sleep_ms(5);
    }
    server = accept_one(s.listener);
    expect_bytes(server, "early");
    expect_ok(client);
    send_all(server, "OK 1\nlate", 9); /* is the connection's */
    expect_bytes(client, "OK 1\nlate");
    shutdown(client, SHUT_WR);
    expect_eof(server);
    send_all(server, "more", 4);
    close(server);
    expect_bytes(client, "more");
    expect_eof(client);
    close(client);
}
END_TEST

/* Two guests of one daemon: the same name is each one's own service. */
START_TEST(two_guests)
{
    char path[2][PATH_LEN], target[TEXT_LEN], name[] = "guest0";
    int listener[2], fds[2];
    Daemon *host;

    file_path(path[0], "dial0");
    file_path(path[1], "dial1");
    host = daemon_start("host", "-c unix-listen:%s/ch0:- "
                        "-c unix-listen:%s/ch1:-:1 -o *:%s:- -o *:%s:-:1",
                        vp_dir, vp_dir, path[0], path[1]);
    for (int i = 0; i < 2; i++) {
        listener[i] = listen_any(target);
        name[5] = (char)('0' + i);
        daemon_start(name, "-c unix-connect:%s/ch%d:- -i s:%s", vp_dir, i,
                     target);
        daemon_wait(host, i == 0 ? "ch0: channel up" : "ch1: channel up");
    }
    for (int i = 0; i < 2; i++) {
        fds[0] = dial(path[i], true);
        send_all(fds[0], "CONNECT s\n", 10);
        fds[1] = accept_one(listener[i]);
        expect_ok(fds[0]);
        talk(fds);
        close(fds[0]);
        close(fds[1]);
        close(listener[i]);
    }
}
END_TEST

static const char *const bad_lines[] = {
    "GET / HTTP/1.1\r\n", "CONNECT \n", "CONNECT\n", "\n", "connect s\n",
    "CONNECT s \n", "CONNECT s\r\n", " CONNECT s\n", "CONNECT a:b\n",
    "CONNECT 0123456789012345678901234567890123456789\n",
    "a line that is longer than one that opens a connection can be",
    "CONNECT s",
};

/* What is no such line is closed, said, and holds nobody up. */
START_TEST(bad_line)
{
    int fds[2], client;
    Scene s;

    scene_start(&s, "");
    client = dial(s.socket, true);
    send_all(client, bad_lines[_i], strlen(bad_lines[_i]));
    if (!strcmp(bad_lines[_i], "CONNECT s")) {
        shutdown(client, SHUT_WR);
    }
    expect_closed(client);
    daemon_wait(s.pair.host, "ch0: [*]: connection refused: (not a line|its "
                "first line|it ends before)");
    kill(s.pair.host->pid, SIGUSR1);
    daemon_wait(s.pair.host, "stats channel=0 .* refused_target=0 .* "
                "refused_client=1 ");
    dialled(&s, fds);
    talk(fds);
}
END_TEST

/* What the other side doesn't offer, or whose target doesn't accept. */
START_TEST(refused)
{
    static const char *const lines[] = {
        "CONNECT nosuch\n", "CONNECT dead\n", "CONNECT *\n",
    };
    int client;
    Scene s;

    scene_start(&s, "");
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        client = dial(s.socket, true);
        send_all(client, lines[i], strlen(lines[i]));
        expect_closed(client);
    }
}
END_TEST

/* Clients that say nothing don't keep others out for ever. */
START_TEST(silent)
{
    int client[5], fds[2], late;
    Scene s;

    scene_start(&s, "--max-conns 6");
    dialled(&s, fds);
    for (int i = 0; i < 5; i++) {
        client[i] = dial(s.socket, true);
        send_all(client[i], "CONN", 4);
    }
    late = dial(s.socket, true);
    expect_closed(late);            /* beyond --max-conns */
    daemon_wait(s.pair.host, "too many connections");
    daemons_idle(&s.pair.host, 1);
    for (int i = 0; i < 5; i++) {
        expect_closed(client[i]);
    }
    daemon_wait(s.pair.host, "within 10 s");
    talk(fds);
    dialled(&s, fds);
    talk(fds);
}
END_TEST

/* The daemon's end, and that of the oforward, close those who have not said. */
START_TEST(ended)
{
    int client;
    Scene s;

    scene_start(&s, "");
    client = dial(s.socket, true);
    sleep_ms(50);
    daemon_stop(s.pair.host);
    expect_closed(client);
}
END_TEST

/* -W is a pipe to the service, and says how it went. */
START_TEST(pipe_to)
{
    int server, status;
    pid_t pid;
    Scene s;

    scene_start(&s, "");
    pid = command_start("client", "(printf question; sleep 0.2) | %s -W "
                        "s:%s:- >%s/answer", vp_program, s.socket, vp_dir);
    server = accept_one(s.listener);
    expect_bytes(server, "question");
    expect_eof(server);
    send_all(server, "answer", 6);
    close(server);
    command_wait(pid);
    file_wait("answer", "answer");

    /* its end doesn't wait for that of stdin */
    pid = command_start("open", "sleep 1000 | exec %s -W s:%s:-", vp_program,
                        s.socket);
    server = accept_one(s.listener);
    close(server);
    sleep_ms(1);
    pid = command_start("refused", "exec %s -W nosuch:%s:- </dev/null",
                        vp_program, s.socket);
    status = child_wait(pid);
    ck_assert_int_eq(WEXITSTATUS(status), 1);
    file_wait("refused.log", "-W 'nosuch:");
    file_wait("refused.log", "refused");
    pid = command_start("nobody", "exec %s -W s:%s/none:- </dev/null",
                        vp_program, vp_dir);
    status = child_wait(pid);
    ck_assert_int_eq(WEXITSTATUS(status), 1);
    file_wait("nobody.log", "No such file or directory");
}
END_TEST

/*
 * passed_by() - the connection that a program passes to its stdout, or -1
 * @args:  the program's path, and so on
 * @status: becomes its wait status
 */
static int passed_by(const char *const args[], int *status)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    char byte;
    struct iovec iov = { &byte, 1 };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1,
                          .msg_control = &control,
                          .msg_controllen = sizeof(control) };
    int pair[2], fd = -1;
    pid_t pid;

    ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    pid = fork();
    ck_assert(pid >= 0);
    if (pid == 0) {
        close(pair[0]);
        dup2(pair[1], STDOUT_FILENO);
        execv(args[0], (char *const *)args);
        _exit(127);
    }
    child_add(pid);
    close(pair[1]);
    if (recvmsg(pair[0], &msg, 0) > 0) {
        ck_assert_ptr_nonnull(CMSG_FIRSTHDR(&msg));
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
    }
    *status = child_wait(pid);
    close(pair[0]);
    return fd;
}

/* -F passes the connection to who started it. */
START_TEST(passed)
{
    char option[2 * PATH_LEN];
    const char *const args[] = { vp_program, "-F", "-W", option, NULL };
    int fds[2], status;
    Scene s;

    scene_start(&s, "");
    text_format(option, sizeof(option), "s:%s:-", s.socket);
    fds[0] = passed_by(args, &status);
    ck_assert_int_eq(status, 0);
    fds[1] = accept_one(s.listener);
    talk(fds);
}
END_TEST

#define CLIENT_SAYS "SSH-2.0-OpenSSH_9.9\r\n"
#define SERVER_SAYS "SSH-2.0-OpenSSH_10.0\r\n"

/*
 * ssh_reads() - what ssh reads at first: the server's line
 *
 * It skips those that begin otherwise; returns how many these were.
 */
static int ssh_reads(int client)
{
    char line[64];
    size_t len;
    int skipped = -1;

    do {
        len = 0;
        do {
            ck_assert(len < sizeof(line) - 1);
            recv_all(client, line + len, 1);
        } while (line[len++] != '\n');
        line[len] = '\0';
        skipped++;
    } while (strncmp(line, "SSH-", 4) != 0);
    ck_assert_str_eq(line, SERVER_SAYS);
    return skipped;
}

/*
 * "ssh vsock-mux/PATH" as systemd 256 has it: its proxy says which port, and
 * leaves all that comes to ssh.
 */
START_TEST(ssh_proxy_256)
{
    int client, server;
    Scene s;

    scene_start(&s, "");
    client = dial(s.socket, true);
    send_all(client, "CONNECT 22\n", 11);
    send_all(client, CLIENT_SAYS, strlen(CLIENT_SAYS));
    server = accept_one(s.listener);
    send_all(server, SERVER_SAYS, strlen(SERVER_SAYS));
    expect_bytes(server, CLIENT_SAYS);
    ck_assert_int_eq(ssh_reads(client), 1);
    client = dial(s.socket, true);
    send_all(client, "CONNECT 23\n", 11);
    expect_closed(client);
}
END_TEST

/*
 * As newer ones have it: the proxy looks at no more than 9 bytes, the longest
 * answer, which it expects first, takes that answer and leaves the rest to ssh.
 */
START_TEST(ssh_proxy)
{
    int client, server;
    char seen[9];
    const char *end;
    ssize_t n = 0;
    Scene s;

    scene_start(&s, "");
    client = dial(s.socket, true);
    send_all(client, "CONNECT 22\n", 11);
    server = accept_one(s.listener);
    send_all(server, SERVER_SAYS, strlen(SERVER_SAYS));
    for (int64_t until = now_ms() + WAIT_MS;
         n < (ssize_t)sizeof(seen) && now_ms() < until; sleep_ms(1)) {
        n = recv(client, seen, sizeof(seen), MSG_PEEK);
        ck_assert(n > 0);
    }
    end = memchr(seen, '\n', (size_t)n);
    ck_assert_msg(end != NULL && memcmp(seen, "OK ", 3) == 0, "%.*s", (int)n,
                  seen);
    recv_all(client, seen, (size_t)(end + 1 - seen));
    send_all(client, CLIENT_SAYS, strlen(CLIENT_SAYS));
    expect_bytes(server, CLIENT_SAYS);
    ck_assert_int_eq(ssh_reads(client), 0);
    client = dial(s.socket, true);
    send_all(client, "CONNECT 23\n", 11);
    expect_closed(client);
}
END_TEST

/* The program itself, of systemd 256 or newer. */
START_TEST(ssh_proxy_real)
{
    static const char program[] = "/usr/lib/systemd/systemd-ssh-proxy";
    char host[2 * PATH_LEN];
    const char *const args[] = { program, host, "22", NULL };
    int client, server, status;
    Scene s;

    if (access(program, X_OK) != 0) {
        PASS_OVER("systemd-ssh-proxy, of systemd 256 or newer");
    }
    scene_start(&s, "");
    text_format(host, sizeof(host), "vsock-mux%s", s.socket);
    client = passed_by(args, &status);
    ck_assert_int_eq(status, 0);
    server = accept_one(s.listener);
    send_all(server, SERVER_SAYS, strlen(SERVER_SAYS));
    send_all(client, CLIENT_SAYS, strlen(CLIENT_SAYS));
    expect_bytes(server, CLIENT_SAYS);
    ck_assert_int_le(ssh_reads(client), 1);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("dial");

    SUITE_LOOP(s, pieces, 3);
    SUITE_ADD(s, two_guests);
    SUITE_ROWS(s, bad_line, bad_lines);
    SUITE_ADD(s, refused);
    SUITE_ADD(s, silent);
    SUITE_ADD(s, ended);
    SUITE_ADD(s, pipe_to);
    SUITE_ADD(s, passed);
    SUITE_ADD(s, ssh_proxy_256);
    SUITE_ADD(s, ssh_proxy);
    SUITE_ADD(s, ssh_proxy_real);
    return harness_run(s);
}
