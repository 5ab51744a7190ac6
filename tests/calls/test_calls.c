/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_calls.c - the n-th call of the program's that may fail fails
 *
 * The program is included here with some of its system calls replaced, and
 * this suite's own binary is the daemon: run with VP_FAILS in its environment
 * it is qemu-vp.  The engine's calls fail in tests/fuzz/test_failure.c.
 *
 * Where a call fails at start the daemon may end, if it says why.  Where it
 * fails later, something may have to be tried again, but by the daemon or by
 * who wants something of it, and afterwards all works as if nothing had been.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "virtproxy.h" /* one of its names is taken below */

static const char *fails_call = ""; /* which one */
static int fails_errno;
static int fails_after;             /* so many go well before */

/* fails() - is this call to fail? sets errno, and says so on stderr */
static int fails(const char *call)
{
    static const char said[] = "(a call fails here)\n";

    if (strcmp(call, fails_call) != 0 || fails_after-- != 0) {
        return 0;
    }
    if (write(STDERR_FILENO, said, sizeof(said) - 1) < 0) {
        abort(); /* the test wouldn't know */
    }
    errno = fails_errno;
    return 1;
}

/* read_part() - once "part" has failed each gives a byte, as a pipe may */
static ssize_t read_part(int fd, void *buf, size_t len)
{
    static int part;

    part |= fails("part");
    return read(fd, buf, part ? 1 : len);
}

#define main program_main
#define socket(...) (fails("socket") ? -1 : socket(__VA_ARGS__))
#define bind(...) (fails("bind") ? -1 : bind(__VA_ARGS__))
#define listen(...) (fails("listen") ? -1 : listen(__VA_ARGS__))
#define fcntl(...) (fails("fcntl") ? -1 : fcntl(__VA_ARGS__))
#define pipe(fds) (fails("pipe") ? -1 : pipe(fds))
#define fork() (fails("fork") ? -1 : fork())
#define read(...) (fails("read") ? -1 : read_part(__VA_ARGS__))
#define write(...) (fails("write") ? -1 : write(__VA_ARGS__))
#define malloc(size) (fails("memory") ? NULL : malloc(size))
#define calloc(n, size) (fails("memory") ? NULL : calloc(n, size))
#define realloc(p, size) (fails("memory") ? NULL : realloc(p, size))
#define strdup(text) (fails("memory") ? NULL : strdup(text))
#define vp_loop_new(...) (fails("random") ? NULL : vp_loop_new(__VA_ARGS__))

#include "qemu-vp.c"

#undef main
#undef socket
#undef bind
#undef listen
#undef fcntl
#undef pipe
#undef fork
#undef read
#undef write
#undef malloc
#undef calloc
#undef realloc
#undef strdup
#undef vp_loop_new

#include "tests/lib/harness.h"

#include <signal.h>

static char self[1024];     /* this binary */
static char real[1024];     /* qemu-vp */

/*
 * Which call, how it fails, and how many of them there are at least: a test
 * for each.  There may be more, in another C library or with more to do.
 */
static const struct {
    const char *call;
    int err;
    int times;
} calls[] = {
    { "socket", EMFILE, 4 }, { "bind", EADDRINUSE, 3 },
    { "listen", EADDRINUSE, 3 }, { "fcntl", ENOMEM, 10 },
    { "pipe", EMFILE, 2 }, { "fork", EAGAIN, 1 }, { "read", EINTR, 3 },
    { "read", EIO, 3 }, { "part", 0, 1 },
    { "write", EAGAIN, 3 }, { "write", EPIPE, 3 },
    { "memory", ENOMEM, 14 }, { "random", ENOENT, 1 },
};

#define KINDS (COUNT_OF(calls))

static int tests_of_calls(void)
{
    int n = 0;

    for (int i = 0; i < KINDS; i++) {
        n += calls[i].times;
    }
    return n;
}

/* What a test has */
typedef struct Scene {
    char dir[PATH_LEN];     /* where the sockets are */
    int target;             /* the port of a server that echoes */
} Scene;

/* reach() - connect to the socket @name; -1: nobody listens */
static int reach(const Scene *s, const char *name)
{
    struct sockaddr_un sun = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    text_format(sun.sun_path, sizeof(sun.sun_path), "%s/%s", s->dir, name);
    ck_assert_int_ge(fd, 0);
    if (connect(fd, (struct sockaddr *)&sun, sizeof(sun)) < 0) {
        close(fd);
        return -1;
    }
    set_nonblocking(fd);
    return fd;
}

/* echoes() - whoever is behind the socket @name */
static bool echoes(const Scene *s, const char *name)
{
    int64_t end = now_ms() + 500;
    int fd = reach(s, name);
    char text[64] = "";
    ssize_t n;

    if (fd < 0) {
        return false;
    }
    n = send(fd, "hello", 5, MSG_NOSIGNAL);
    while (n >= 0 && now_ms() < end) {
        n = recv(fd, text, sizeof(text), 0);
        if (n >= 0 || errno != EAGAIN) {
            break;
        }
        n = 0;
        sleep_ms(2);
    }
    close(fd);
    return n == 5 && memcmp(text, "hello", 5) == 0;
}

/* says() - to the monitor; did that go well? */
static bool says(const Scene *s, const char *text)
{
    pid_t pid = command_start("monitor", "%s -m %s/monitor -x '%s'", real,
                              s->dir, text);

    return child_wait(pid) == 0;
}

/* soon() - ask until the answer is yes */
static void soon(bool (*yes)(const Scene *s, const char *what),
                 const Scene *s, const char *what)
{
    int64_t end = now_ms() + WAIT_MS;

    while (!yes(s, what)) {
        ck_assert_msg(now_ms() < end, "%s: not any more", what);
        sleep_ms(20);
    }
}

/* echo_run() - a server that says what it is told, to one after the other */
static void echo_run(int listener)
{
    char buf[512];

    for (;;) {
        int fd = accept_one(listener);
        ssize_t n = recv(fd, buf, sizeof(buf), 0);

        if (n > 0 && send(fd, buf, (size_t)n, MSG_NOSIGNAL) < 0) {
            n = 0;
        }
        close(fd);
    }
}

/*
 * started() - does the daemon come up? false: it has ended, and said why
 *
 * What it says first is that a call fails here.
 */
static bool started(Daemon *d, const Scene *s)
{
    int64_t end = now_ms() + WAIT_MS;
    int status, fd;

    while ((fd = reach(s, "monitor")) < 0) {
        ck_assert_msg(now_ms() < end, "it doesn't start");
        if (waitpid(d->pid, &status, WNOHANG) == d->pid) {
            d->pid = 0;
            ck_assert_msg(WIFEXITED(status) && (WEXITSTATUS(status) == 1 ||
                          WEXITSTATUS(status) == 2),
                          "status %#x", (unsigned)status);
            ck_assert(daemon_saw(d, "a call fails here"));
            ck_assert_int_ge(daemon_count(d, "qemu-vp: "), 1);
            return false;
        }
        sleep_ms(5);
    }
    close(fd);
    return true;
}

/* all_works() - channels both ways, forwards, the monitor, a new forward */
static void all_works(const Scene *s)
{
    static const char *const names[] = {
        "from-host", "to-host", "from-host-1", "to-host-1",
    };
    char text[TEXT_LEN];

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        soon(echoes, s, names[i]);
    }
    soon(says, s, "info status -k");
    text_format(text, sizeof(text), "iforward_add late:localhost:%d",
                s->target);
    soon(says, s, text);
    soon(echoes, s, "late");
    text_format(text, sizeof(text), "iforward_del late:localhost:%d",
                s->target);
    soon(says, s, text);
}

START_TEST(one_fails)
{
    int listener, n = _i, kind = 0;
    char target[TEXT_LEN], text[32];
    Daemon *host, *guest;
    Scene s;
    pid_t pid;

    if (!has_localhost()) {
        PASS_OVER(HAS_LOCALHOST);
    }
    strcpy(real, vp_program);
    listener = listen_any(target);
    pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        echo_run(listener);
    }
    child_add(pid);
    close(listener);
    text_format(s.dir, sizeof(s.dir), "%s", vp_dir);
    s.target = port_of(target);
    while (n >= calls[kind].times) {
        n -= calls[kind++].times;
    }
    text_format(text, sizeof(text), "%s %d %d", calls[kind].call,
                calls[kind].err, n);
    printf("%s\n", text);
    strcpy(vp_program, self);
    setenv("VP_FAILS", text, 1);
    host = daemon_start("host", "-c unix-listen:%s/a:- -c unix-connect:%s/b:-:1"
                        " -o echo:%s/from-host:- -o echo:%s/from-host-1:-:1 "
                        "-i echo:localhost:%d -i echo:%s:1 -m %s/monitor",
                        s.dir, s.dir, s.dir, s.dir, s.target, target, s.dir);
    strcpy(vp_program, real);
    if (!started(host, &s)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        guest = daemon_start("guest", "-c unix-connect:%s/a:- "
                             "-c unix-listen:%s/b:-:1 -o echo:%s/to-host:- "
                             "-o echo:%s/to-host-1:-:1 -o late:%s/late:- "
                             "-i echo:%s -i echo:%s:1", s.dir, s.dir, s.dir,
                             s.dir, s.dir, target, target);
        all_works(&s);
        daemon_stop(guest);
    }
    ck_assert_msg(daemon_saw(host, "a call fails here"),
                  "there is no such call");
}
END_TEST

int main(int argc, char **argv)
{
    const char *what = getenv("VP_FAILS");
    static char call[32];
    Suite *suite;
    ssize_t len;

    if (what != NULL &&
        sscanf(what, "%31s %d %d", call, &fails_errno, &fails_after) == 3) {
        unsetenv("VP_FAILS");
        fails_call = call;
        return program_main(argc, argv);
    }
    len = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (len < 0) {
        perror("/proc/self/exe");
        return EXIT_FAILURE;
    }
    suite = harness_suite("calls");
    SUITE_LOOP(suite, one_fails, tests_of_calls());
    return harness_run(suite);
}
