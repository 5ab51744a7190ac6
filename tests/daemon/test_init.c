/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_init.c - what init does with daemons: start, signal, reload and end
 *
 * A daemon that goes to the background is nobody's child; here the test takes
 * the place of init, so that its exit status is seen and none is left.
 */
#define _XOPEN_SOURCE 700

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "monitor.h"
#include "talk.h"
#include "traffic.h"

#define KIB UINT64_C(1024)
#define NOBODY 65534

/* --- files -------------------------------------------------------------- */

/* file_text() - all of vp_dir/name; each result is good until the next call */
static const char *file_text(const char *name)
{
    static char text[65536];
    char path[PATH_LEN];
    FILE *f;

    file_path(path, name);
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s: %s", path, strerror(errno));
    text[fread(text, 1, sizeof(text) - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* write_file() - a text into vp_dir/name */
static void write_file(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void write_file(const char *name, const char *fmt, ...)
{
    char path[PATH_LEN], text[8 * TEXT_LEN];
    va_list ap;
    int n;

    file_path(path, name);
    va_start(ap, fmt);
    n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    ck_assert(n >= 0 && (size_t)n < sizeof(text));
    file_write(path, text, (size_t)n);
}

static bool is_log(const char *name)
{
    const char *dot = strrchr(name, '.');

    return dot && strcmp(dot, ".log") == 0;
}

/* files() - names of all but the logs in vp_dir, to be compared and freed */
static char *files(void)
{
    struct dirent **list;
    char *text = calloc(1, 4096);
    int n = scandir(vp_dir, &list, NULL, alphasort);

    ck_assert(n >= 0 && text != NULL);
    for (int i = 0; i < n; i++) {
        if (!is_log(list[i]->d_name)) {
            size_t len = strlen(text);

            text_format(text + len, 4096 - len, "%s\n", list[i]->d_name);
        }
        free(list[i]);
    }
    free(list);
    return text;
}

/* check_files() - they are the same as before, which is freed */
static void check_files(char *before)
{
    char *now = files();

    ck_assert_msg(strcmp(before, now) == 0, "there were\n%s\nnow there are\n%s",
                  before, now);
    free(before);
    free(now);
}

/* --- starting ----------------------------------------------------------- */

/*
 * background() - start a daemon with -d and these options too
 *
 * Its pid file is NAME.pid, it logs to NAME.log.
 */
static Daemon *background(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static Daemon *background(const char *name, const char *fmt, ...)
{
    char options[4 * TEXT_LEN], path[PATH_LEN], pid[40];
    Daemon *launcher;
    va_list ap;
    int n;

    va_start(ap, fmt);
    n = vsnprintf(options, sizeof(options), fmt, ap);
    va_end(ap);
    ck_assert(n >= 0 && (size_t)n < sizeof(options));
    daemons_adopt();
    text_format(pid, sizeof(pid), "%s.pid", name);
    launcher = daemon_start(name, "-d -f %s/%s -l %s/%s.log %s", vp_dir, pid,
                            vp_dir, name, options);
    ck_assert_int_eq(daemon_exit(launcher), 0);
    text_format(path, sizeof(path), "%s/%s.log", vp_dir, name);
    return daemon_adopted(name, pid_in(pid), path);
}

/* no_process() - nothing that was started, by whomever, lives on */
static void no_process(void)
{
    int64_t end = now_ms() + WAIT_MS;
    int status;

    while (waitpid(-1, &status, WNOHANG) >= 0) {
        ck_assert_msg(now_ms() < end, "a process is left");
        sleep_ms(5);
    }
}

/* Two daemons with a service s between them, as most tests here need them */
typedef struct Couple {
    Daemon *daemon[2];          /* host, guest */
    char monitor[2][PATH_LEN];
    char channel[PATH_LEN];     /* unix socket: the guest listens */
    char target[TEXT_LEN];      /* what the guest connects s to */
    int listener;
    char where[TEXT_LEN];       /* oforward s */
} Couple;

/* couple_paths() - choose the files and open the target */
static void couple_paths(Couple *c)
{
    file_path(c->channel, "channel");
    file_path(c->monitor[0], "host.monitor");
    file_path(c->monitor[1], "guest.monitor");
    c->listener = listen_any(c->target);
}

/* couple_guest() - start that end, and wait until the channel is up */
static void couple_guest(Couple *c)
{
    c->daemon[1] = daemon_start("guest", "-c unix-listen:%s:- -m %s -i s:%s",
                                c->channel, c->monitor[1], c->target);
    daemon_up(c->daemon[1]);
}

/* couple_start() - both, the host with further options */
static void couple_start(Couple *c, const char *more)
{
    couple_paths(c);
    c->daemon[0] = daemon_start("host", "-c unix-connect:%s:- -m %s "
                                "-o s:127.0.0.1:0 %s", c->channel,
                                c->monitor[0], more);
    couple_guest(c);
    text_format(c->where, TEXT_LEN, "%s", daemon_listens(c->daemon[0], "s"));
}

/* The command returns when all is there, and lets go of what it was given. */
START_TEST(daemonize)
{
    char path[PATH_LEN], link[64], to[64], *before;
    Daemon *host, *guest;
    int early;
    Couple c;
    ssize_t n;

    couple_paths(&c);
    daemons_adopt();
    file_path(path, "service");
    before = files();
    command_wait(command_start("start", "cd %s && said=$(%s -d -f host.pid "
        "-l host.log -m %s -c unix-connect:%s:- -o s:%s:- -o s:127.0.0.1:0 "
        "2>&1) && test -z \"$said\"", vp_dir, vp_program, c.monitor[0],
        c.channel, path));
    close(dial(path, true));
    close(dial(c.monitor[0], true));
    file_path(path, "host.log");
    host = daemon_adopted("host", pid_in("host.pid"), path);
    ck_assert_int_eq(getsid(host->pid), host->pid);
    for (int fd = 0; fd <= 2; fd++) {
        text_format(link, sizeof(link), "/proc/%d/fd/%d", (int)host->pid, fd);
        n = readlink(link, to, sizeof(to) - 1);
        ck_assert(n > 0);
        to[n] = '\0';
        ck_assert_str_eq(to, "/dev/null");
    }
    guest = background("guest", "-c unix-listen:%s:- -i s:%s", c.channel,
                       c.target);
    early = accept_one(c.listener);
    expect_eof(early);
    close(early);
    check_works(daemon_listens(host, "s"), c.listener);
    file_path(path, "service");
    check_works(path, c.listener);
    daemon_stop(host);
    daemon_stop(guest);
    check_files(before);
}
END_TEST

/* --- what can't be started ---------------------------------------------- */

#define HOLDER "(who holds it)"  /* stands for the words with the process id */

/* Options that must make the start fail with status 1 */
typedef struct BadStart {
    const char *options;        /* %s: vp_dir */
    const char *says[2];
} BadStart;

static const BadStart bad_starts[] = {
    { "-o s:%s/taken:-", { "-o", "in use" } },
    { "-o s:%s/no/dir:-", { "-o", "No such file" } },
    { "-o s:%s/file:-", { "-o", "not a socket" } },
    { "-c unix-listen:%s/no/dir:-:1", { "-c", "No such file" } },
    { "-c fd:999:-:1", { "-c", "999" } },
    { "-m %s/no/dir", { "-m", "No such file" } },
    { "-m %s/file", { "-m", "not a socket" } },
    { "-m %s/taken", { "-m", "in use" } },
    { "-f %s", { "--pidfile", "Is a directory" } },
    { "-f %s/no/dir", { "--pidfile", "No such file" } },
    { "-f /dev/full", { "--pidfile", "/dev/full" } },
    { "-f %s/held.pid", { "held.pid", HOLDER } },
    { "-l %s", { "log file", "Is a directory" } },
    { "-l %s/no/dir", { "log file", "No such file" } },
    { "-u no-such-user", { "'no-such-user'", "the name of a user, or a n" } },
    { "-u 4294967295", { "'4294967295'", "the name of a user, or a n" } },
    { "-u 1x", { "'1x'", "the name of a user, or a n" } },
    { "-o s:127.0.0.1:0 -o r:%s/r:- -i q:%s/q:- -u no-such-user",
      { "--user", "'no-such-user'" } },
};

/* says() - the daemon's stderr has that text */
static bool says(const Daemon *d, const char *text)
{
    char *all = daemon_all(d);
    bool found = strstr(all, text) != NULL;

    free(all);
    return found;
}

/* says_holder() - it says which process holds the pid file */
static bool says_holder(const Daemon *d, pid_t holder)
{
    char text[TEXT_LEN];

    text_format(text, sizeof(text), "process %d holds it", (int)holder);
    return says(d, text);
}

/* expand() - each %s in a text becomes vp_dir */
static void expand(char *to, size_t room, const char *text)
{
    size_t n = 0;

    for (const char *p = text; *p; p++) {
        if (strncmp(p, "%s", 2) == 0) {
            text_format(to + n, room - n, "%s", vp_dir);
            n += strlen(to + n);
            p++;
        } else {
            ck_assert(n + 1 < room);
            to[n++] = *p;
        }
    }
    to[n] = '\0';
}

/* In the fore- and the background: said on stderr, status 1, nothing left. */
START_TEST(bad_start)
{
    const bool behind = _i % 2;
    const BadStart *bad = &bad_starts[_i / 2];
    char options[4 * TEXT_LEN], taken[PATH_LEN], *before;
    Daemon *d, *holder;
    int listener;

    file_path(taken, "taken");
    listener = listen_on(taken, 5);
    write_file("file", "a file");
    file_path(taken, "channel");
    holder = daemon_start("holder", "-f %s/held.pid -c unix-listen:%s:- "
                          "-o s:127.0.0.1:0", vp_dir, taken);
    daemon_listens(holder, "s");
    daemons_adopt();
    expand(options, sizeof(options), bad->options);
    before = files();
    d = daemon_start("bad", "-c unix-connect:/nonexistent:- %s %s", options,
                     behind ? "-d" : "");
    ck_assert_int_eq(daemon_exit(d), 1);
    for (int i = 0; i < 2; i++) {
        ck_assert_msg(strcmp(bad->says[i], HOLDER) == 0
                      ? says_holder(d, holder->pid) : says(d, bad->says[i]),
                      "no '%s' in the message", bad->says[i]);
    }
    check_files(before);
    ck_assert_int_eq(pid_in("held.pid"), holder->pid);
    daemon_stop(holder);
    no_process();
    close(listener);
}
END_TEST

/* A serial line is as it was before, too. */
START_TEST(bad_start_tty)
{
    char options[2 * TEXT_LEN];
    struct termios before, after;
    RelayEnd end;
    Daemon *d;
    int line;

    relay_pty(&end);
    line = open(end.path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    ck_assert(line >= 0 && tcgetattr(line, &before) == 0);
    before.c_lflag |= ECHO | ICANON;
    cfsetispeed(&before, B9600);
    cfsetospeed(&before, B9600);
    ck_assert(tcsetattr(line, TCSANOW, &before) == 0);
    ck_assert(tcgetattr(line, &before) == 0);
    text_format(options, sizeof(options), "-c %s:%s:- %s",
                _i ? "fd" : "isaserial-open", _i ? "0" : end.path,
                "-o s:/nonexistent/s:-");
    if (_i) {
        command_start("bad", "%s %s <>%s; echo status $?", vp_program, options,
                      end.path);
        file_wait("bad.log", "status 1\n");
    } else {
        d = daemon_start("bad", "%s", options);
        ck_assert_int_eq(daemon_exit(d), 1);
    }
    ck_assert(tcgetattr(line, &after) == 0);
    ck_assert_uint_eq(after.c_lflag, before.c_lflag);
    ck_assert_uint_eq(cfgetospeed(&after), B9600);
    close(line);
    line = open(end.path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    ck_assert_msg(line >= 0, "still exclusive: %s", strerror(errno));
    close(line);
    close(end.master);
}
END_TEST

static const char *const usages[] = {
    "-c nonsense", "-c unix-listen:%s/x:- -o s:127.0.0.1:99999",
    "-c unix-listen:%s/x:- -o r:%s/r:- -C %s/missing",
    "-c unix-listen:%s/x:- -C %s", "-c unix-listen:%s/x:- --nonsense",
    "-c unix-listen:%s/x:- -x", "-x status", "",
};

/* What is wrong with the options is said before anything is done. */
START_TEST(bad_usage)
{
    char text[4 * TEXT_LEN], *before;
    Daemon *d;

    daemons_adopt();
    before = files();
    expand(text, sizeof(text), usages[_i]);
    d = daemon_start("bad", "-d -f %s/pid %s", vp_dir, text);
    ck_assert_int_eq(daemon_exit(d), 2);
    check_files(before);
    no_process();
}
END_TEST

/* --- pid file ----------------------------------------------------------- */

/* Locked, not just there: what a dead daemon left is no obstacle. */
START_TEST(pid_file)
{
    char path[PATH_LEN], *before;
    Daemon *first, *second;

    file_path(path, "channel");
    before = files();
    write_file("pid", "1\n");           /* init's, and longer ones */
    write_file("pid", "123456789012345678901234567890\n");
    first = daemon_start("first", "-f %s/pid -c unix-listen:%s:-", vp_dir,
                         path);
    daemon_wait(first, "listening");
    ck_assert_int_eq(pid_in("pid"), first->pid);
    for (int i = 0; i < 2; i++) {
        second = daemon_start("second", "%s -f %s/pid -m %s/mon",
                              i ? "-d" : "", vp_dir, vp_dir);
        ck_assert_int_eq(daemon_exit(second), 1);
        ck_assert(says_holder(second, first->pid));
        ck_assert_int_eq(pid_in("pid"), first->pid);
    }
    ck_assert_int_eq(pid_in("pid"), first->pid);
    daemon_kill(first);
    second = daemon_start("third", "-f %s/pid -c unix-listen:%s:-", vp_dir,
                          path);
    daemon_wait(second, "listening");
    ck_assert_int_eq(pid_in("pid"), second->pid);
    daemon_stop(second);
    check_files(before);
}
END_TEST

/* Who can't see the process that holds it has no number to say. */
START_TEST(pid_file_unseen)
{
    const char *unshare = geteuid() == 0 ? "unshare -pf --kill-child"
                                         : "unshare -rpf --kill-child";
    char path[PATH_LEN];
    Daemon *d;

    if (child_wait(command_start("may", "%s true", unshare)) != 0) {
        PASS_OVER("pid namespaces of its own (CAP_SYS_ADMIN or user "
                  "namespaces)");
    }
    file_path(path, "channel");
    d = daemon_start("host", "-f %s/pid -c unix-listen:%s:-", vp_dir, path);
    daemon_wait(d, "listening");
    command_wait(command_start("other", "%s %s -f %s/pid -m %s/monitor 2>&1 | "
        "grep -q \"/pid': a process of another pid namespace\"", unshare,
        vp_program, vp_dir, vp_dir));
    ck_assert_int_eq(pid_in("pid"), d->pid);
}
END_TEST

/* One that was removed by others may be another daemon's by now. */
START_TEST(pid_file_replaced)
{
    char path[PATH_LEN];
    Daemon *d[2];

    file_path(path, "pid");
    for (int i = 0; i < 2; i++) {
        d[i] = daemon_start("host", "-f %s -c unix-listen:%s/%d:-", path,
                            vp_dir, i);
        daemon_wait(d[i], "listening");
        if (i == 0) {
            ck_assert(unlink(path) == 0);
        }
    }
    daemon_stop(d[0]);
    ck_assert_int_eq(pid_in("pid"), d[1]->pid);
    daemon_stop(d[1]);
    ck_assert(access(path, F_OK) < 0);
}
END_TEST

/* --- bare surroundings -------------------------------------------------- */

static const char *const closed_fds[] = {
    "<&- >&- 2>&-", "<&-", ">&-", "2>&-",
};

/* Where there is no /dev/null, no line of the log goes to a client either. */
START_TEST(no_dev_null)
{
    StartOptions o = { .setup = "mount -n -t tmpfs dev /dev && "
                                "exec <&- >&- 2>&-" };
    Couple c;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    couple_paths(&c);
    file_path(c.where, "service");
    c.daemon[0] = daemon_start_with(&o, "host", "-v -v -c unix-connect:%s:- "
                                    "-o s:%s:- -m %s", c.channel, c.where,
                                    c.monitor[0]);
    close(monitor_batch(c.monitor[0]));
    couple_guest(&c);
    for (int i = 0; i < 10; i++) {
        check_works(c.where, c.listener);
    }
}
END_TEST

/*
 * Who waits until all that he gave the daemon is closed doesn't wait for ever:
 * the reader of a pipe, or who wants a lock.
 */
START_TEST(starters_descriptors)
{
    char path[PATH_LEN], lock[PATH_LEN], log[PATH_LEN];

    daemons_adopt();
    file_path(path, "m");
    file_path(lock, "lock");
    file_path(log, "log");
    command_wait(command_start("start", "exec 9>%s; flock 9; x=$(%s -d -f %s/p "
                               "-l %s -m %s 7>&1 8>&1); exec 9>&-; "
                               "timeout %d flock %s true", lock, vp_program,
                               vp_dir, log, path, WAIT_MS / 1000, lock));
    ck_assert_int_eq(execute(path, "channel_add fd:0:-"), 1);
    ck_assert(strstr(executed(2), "it was not open at the start, or is taken"));
    daemon_stop(daemon_adopted("host", pid_in("p"), log));
}
END_TEST

/* The same where the starter's descriptor is beyond those that fd: can name. */
START_TEST(starters_high_descriptor)
{
    enum { HIGH = 1500 };
    char lock[PATH_LEN], log[PATH_LEN];
    struct rlimit lim;
    int fd;

    ck_assert(getrlimit(RLIMIT_NOFILE, &lim) == 0);
    lim.rlim_cur = lim.rlim_max;
    if (lim.rlim_max <= HIGH || setrlimit(RLIMIT_NOFILE, &lim) < 0) {
        PASS_OVER("a limit of more than 1500 descriptors");
    }
    daemons_adopt();
    file_path(lock, "lock");
    file_path(log, "log");
    fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ck_assert(flock(fd, LOCK_EX) == 0 && dup2(fd, HIGH) == HIGH);
    close(fd);
    command_wait(command_start("start", "%s -d -f %s/p -l %s "
                               "-c unix-listen:%s/c:-", vp_program, vp_dir,
                               log, vp_dir));
    close(HIGH);
    fd = open(lock, O_RDWR | O_CLOEXEC);
    ck_assert_msg(flock(fd, LOCK_EX | LOCK_NB) == 0, "the lock is held");
    daemon_stop(daemon_adopted("host", pid_in("p"), log));
}
END_TEST

/* As process 1 of a container it is init as well: orphans don't stay. */
START_TEST(process_one)
{
    char path[PATH_LEN];
    int status;
    pid_t pid;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    file_path(path, "m");
    pid = command_start("one", "unshare %s -pf --kill-child sh -c '(sleep 0.1; "
                        "touch %s/gone)& exec %s -m %s'; echo ended $?",
                        geteuid() == 0 ? "" : "-r", vp_dir, vp_program, path);
    close(monitor_batch(path));
    file_path(path, "gone");
    for (int64_t end = now_ms() + WAIT_MS; access(path, F_OK) < 0;) {
        ck_assert(now_ms() < end);
        sleep_ms(10);
    }
    file_path(path, "m");
    for (int64_t end = now_ms() + WAIT_MS;;) {
        status = child_wait(command_start("ps", "ps -eo stat=,ppid= | "
            "while read s p; do case $s in Z*) ! grep -qa %s /proc/$p/cmdline "
            "|| exit 1; esac; done", path));
        if (status == 0) {
            break;
        }
        ck_assert_msg(now_ms() < end, "an orphan stays");
        sleep_ms(50);
    }
    ck_assert_int_eq(execute(path, "quit"), 0);
    status = child_wait(pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    file_wait("one.log", "ended 0");
}
END_TEST

/* Some inits start their daemons without stdin, stdout and stderr. */
START_TEST(closed_stdio)
{
    char path[PATH_LEN];
    Daemon *host;
    Couple c;
    pid_t pid = 0;

    couple_paths(&c);
    daemons_adopt();
    file_path(path, "service");
    if (_i % 2) {
        command_wait(command_start("start", "%s -d -f %s/host.pid -l "
            "%s/host.log -c unix-connect:%s:- -o s:%s:- -m %s %s", vp_program,
            vp_dir, vp_dir, c.channel, path, c.monitor[0], closed_fds[_i / 2]));
        file_path(c.where, "host.log");
        host = daemon_adopted("host", pid_in("host.pid"), c.where);
    } else {
        pid = command_start("start", "exec %s -f %s/host.pid -c "
            "unix-connect:%s:- -o s:%s:- -m %s %s", vp_program, vp_dir,
            c.channel, path, c.monitor[0], closed_fds[_i / 2]);
        host = NULL;
    }
    close(monitor_batch(c.monitor[0]));
    couple_guest(&c);
    for (int i = 0; i < 10; i++) {
        check_works(path, c.listener);
    }
    ck_assert_int_eq(execute(c.monitor[0], "info status"), 0);
    if (host) {
        ck_assert_int_eq(daemon_count(host, "oforward s: listening"), 1);
        daemon_stop(host);
    } else {
        kill(pid, SIGTERM);
        command_wait(pid);
    }
}
END_TEST

/* A channel that is one of them survives the way to the background. */
START_TEST(inherited_stdio)
{
    char target[TEXT_LEN], path[PATH_LEN];
    int listener = listen_any(target), pair[2];
    Daemon *host;

    daemons_adopt();
    ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    fcntl(pair[1], F_SETFD, FD_CLOEXEC);
    file_path(path, "service");
    command_wait(command_start("start", "%s -d -f %s/host.pid -l %s/host.log "
        "-c fd:%d:- -o s:%s:- %d<&%d", vp_program, vp_dir, vp_dir, _i, path,
        _i, pair[0]));
    close(pair[0]);
    fcntl(pair[1], F_SETFD, 0);
    command_start("guest", "exec %s -c fd:0:- -i s:%s <&%d", vp_program,
                  target, pair[1]);
    close(pair[1]);
    check_works(path, listener);
    file_path(path, "host.log");
    host = daemon_adopted("host", pid_in("host.pid"), path);
    host->inherited = true;             /* ends by itself when the guest does */
    close(listener);
}
END_TEST

/* Where both ends are told to end, that the other one went is no error. */
START_TEST(inherited_end)
{
    char target[TEXT_LEN], where[TEXT_LEN];
    int listener = listen_any(target), fds[3][2];

    text_format(where, sizeof(where), "%s/service", vp_dir);
    for (int round = 0; round < 5; round++) {
        StartOptions start = { 0 };
        Daemon *d[2];
        int pair[2];

        ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        for (int i = 0; i < 2; i++) {
            fcntl(pair[i], F_SETFD, FD_CLOEXEC);
        }
        for (int i = 0; i < 2; i++) {
            start.keep_fd = pair[i];
            d[i] = daemon_start_with(&start, i ? "guest" : "host", i
                                     ? "-c fd:%d:- -i s:%s"
                                     : "-c fd:%d:- -o s:%s:-", pair[i],
                                     i ? target : where);
        }
        close(pair[0]);
        close(pair[1]);
        daemon_up(d[0]);
        for (int i = 0; i < COUNT_OF(fds); i++) {
            through(where, listener, fds[i]);
        }
        for (int i = 0; i < 2; i++) {
            kill(d[i]->pid, SIGSTOP);
            kill(d[i]->pid, SIGTERM);
        }
        for (int i = 0; i < 2; i++) {
            kill(d[i]->pid, SIGCONT);
        }
        for (int i = 0; i < 2; i++) {
            ck_assert_int_eq(daemon_exit(d[i]), 0);
            ck_assert_int_eq(daemon_count(d[i], " error "), 0);
        }
        for (int i = 0; i < COUNT_OF(fds); i++) {
            close(fds[i][0]);
            close(fds[i][1]);
        }
    }
    close(listener);
}
END_TEST

/* Without a key a port that others can reach is warned of, however it came. */
START_TEST(open_to_others)
{
    struct sockaddr_in in = { .sin_family = AF_INET };
    StartOptions start = { .keep_fd = socket(AF_INET, SOCK_STREAM, 0) };
    Daemon *d;

    ck_assert(bind(start.keep_fd, (void *)&in, sizeof(in)) == 0 &&
              listen(start.keep_fd, 5) == 0);
    fcntl(start.keep_fd, F_SETFD, FD_CLOEXEC);
    d = _i ? daemon_start_with(&start, "host", "-c fd:%d:-", start.keep_fd)
           : daemon_start("host", "-c tcp-listen:0.0.0.0:0");
    daemon_wait(d, " warn ch0: whoever reaches 0.0.0.0:[1-9][0-9]* is the "
                "other end");
    close(start.keep_fd);
}
END_TEST

/* Both are told to end: what a client sent before it went arrives even so. */
START_TEST(inherited_flush)
{
    static unsigned char data[300000];
    char where[PATH_LEN], target[PATH_LEN];
    StartOptions start = { 0 };
    int pair[2], listener, client, server;
    size_t got = 0;
    Daemon *d[2];
    ssize_t n;

    file_path(where, "service");
    file_path(target, "target");
    listener = listen_on(target, 5);
    ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    for (int i = 0; i < 2; i++) {
        fcntl(pair[i], F_SETFD, FD_CLOEXEC);
    }
    for (int i = 0; i < 2; i++) {
        start.keep_fd = pair[i];
        d[i] = daemon_start_with(&start, i ? "guest" : "host",
                                 "-c fd:%d:- -%c s:%s:-", pair[i],
                                 i ? 'i' : 'o', i ? target : where);
    }
    close(pair[0]);
    close(pair[1]);
    daemon_up(d[0]);
    client = dial(where, true);
    server = accept_one(listener);
    bytes_fill(data, sizeof(data), 1, 0);
    send_all(client, data, sizeof(data));
    close(client);
    sleep_ms(300);                      /* all goes as far as it can */
    for (int i = 1; i >= 0; i--) {
        kill(d[i]->pid, SIGTERM);
        daemon_wait(d[i], "ending on signal");
    }
    while ((n = recv(server, data, sizeof(data), 0)) > 0) {
        ck_assert(bytes_right(data, (size_t)n, 1, got) == (size_t)n);
        got += (size_t)n;
    }
    ck_assert_uint_eq(got, sizeof(data));
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(daemon_exit(d[i]), 0);
    }
    close(server);
    close(listener);
}
END_TEST

/* --- log ---------------------------------------------------------------- */

/* To a file, which may be moved away; SIGHUP makes another. */
START_TEST(log_file)
{
    char log[PATH_LEN], aside[PATH_LEN], more[TEXT_LEN];
    int fds[2];
    Daemon *d;
    Couple c;

    couple_paths(&c);
    file_path(log, "a.log");
    file_path(aside, "b.log");
    text_format(more, sizeof(more), "-c unix-connect:%s:- -m %s -l %s "
                "-o s:%s/service:-", c.channel, c.monitor[0], log, vp_dir);
    d = daemon_start("host", "%s", more);
    couple_guest(&c);
    file_wait("a.log", " info ch0: channel up: new session\n");
    ck_assert_int_eq(daemon_count(d, "."), 0);  /* on stderr */
    file_path(c.where, "service");
    through(c.where, c.listener, fds);
    ck_assert(rename(log, aside) == 0);
    kill(d->pid, SIGHUP);
    file_wait("a.log", " info reloaded\n");
    ck_assert(strstr(file_text("b.log"), "reloaded") == NULL);
    talk(fds);

    /* One that can't be opened again: the old one goes on */
    ck_assert(rename(log, aside) == 0 && mkdir(log, 0755) == 0);
    for (int i = 0; i < 3; i++) {
        kill(d->pid, SIGHUP);
        file_wait("b.log", "a.log: Is a directory: ");
    }
    talk(fds);
    ck_assert(rmdir(log) == 0);
    kill(d->pid, SIGHUP);
    file_wait("a.log", "reloaded\n");
    talk(fds);
    close(fds[0]);
    close(fds[1]);
    daemon_stop(d);
}
END_TEST

/* Another file in the init file is taken at SIGHUP. */
START_TEST(log_moves)
{
    char path[PATH_LEN];
    Daemon *d;

    file_path(path, "channel");
    write_file("conf", "channel unix-listen:%s:-\nlogfile %s/a.log\n", path,
               vp_dir);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    file_wait("a.log", "listening on");
    write_file("conf", "channel unix-listen:%s:-\nlogfile %s/b.log\n", path,
               vp_dir);
    kill(d->pid, SIGHUP);
    file_wait("b.log", "reloaded");
    kill(d->pid, SIGUSR1);
    file_wait("b.log", "status version=");
    ck_assert(strstr(file_text("a.log"), "status version=") == NULL);
    daemon_stop(d);
}
END_TEST

/* A FIFO that nobody reads is an error, one that somebody reads is a log. */
START_TEST(log_fifo)
{
    char path[PATH_LEN], text[4096];
    int fifo, fds[2];
    ssize_t n = 0;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    file_path(path, "fifo");
    ck_assert(mkfifo(path, 0600) == 0);
    d = daemon_start("alone", "-c unix-connect:%s:- -l %s", c.channel, path);
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(says(d, "cannot open the log file") && says(d, "/fifo: "));
    fifo = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    d = daemon_start("host", "-c unix-connect:%s:- -l %s -o s:%s/service:- "
                     "-m %s", c.channel, path, vp_dir, c.monitor[0]);
    close(monitor_batch(c.monitor[0]));
    n = read(fifo, text, sizeof(text) - 1);
    ck_assert(n > 0);
    text[n] = '\0';
    ck_assert_msg(strstr(text, "s: listening on") != NULL, "%s", text);
    couple_guest(&c);
    file_path(c.where, "service");
    through(c.where, c.listener, fds);
    close(fifo);
    for (int i = 0; i < 3; i++) {
        kill(d->pid, SIGHUP);           /* it can't be opened again */
        talk(fds);
        ck_assert_int_eq(execute(c.monitor[0], "info status"), 0);
    }
    close(fds[0]);
    close(fds[1]);
}
END_TEST

static const char *const no_logs[] = {
    "-l /dev/full", "2>/dev/full", "2>&1 | head -c 1",
};

/* Full disks, and a stderr whose reader has gone: no line stops anything. */
START_TEST(log_nowhere)
{
    char path[PATH_LEN];
    pid_t pid;
    int fds[2];
    Couple c;

    couple_paths(&c);
    file_path(path, "service");
    pid = command_start("host", "echo $$ >%s/pid; exec %s -v -c unix-connect:"
                        "%s:- -o s:%s:- -m %s %s", vp_dir, vp_program,
                        c.channel, path, c.monitor[0], no_logs[_i]);
    close(monitor_batch(c.monitor[0]));
    couple_guest(&c);
    through(path, c.listener, fds);
    for (int i = 0; i < 20; i++) {
        ck_assert_int_eq(execute(c.monitor[0], "oforward_add r:127.0.0.1:0"),
                         0);
        ck_assert_int_eq(execute(c.monitor[0], "oforward_del r:127.0.0.1:0"),
                         0);
        talk(fds);
    }
    close(fds[0]);
    close(fds[1]);
    check_works(path, c.listener);
    ck_assert_int_eq(execute(c.monitor[0], "quit"), 0);
    command_wait(pid);
}
END_TEST

/* A limit on the size of files costs lines of the log, and nothing else. */
START_TEST(log_limit)
{
    char path[PATH_LEN], log[PATH_LEN];
    struct stat st;
    int fds[2], mon;
    pid_t pid;
    Couple c;

    couple_paths(&c);
    file_path(path, "service");
    file_path(log, _i ? "host.log" : "limited.log");
    pid = command_start("host", "ulimit -f 1; exec %s -c unix-connect:%s:- "
                        "-o s:%s:- -m %s %s%s", vp_program, c.channel, path,
                        c.monitor[0], _i ? "" : "-l ", _i ? "" : log);
    mon = monitor_batch(c.monitor[0]);
    couple_guest(&c);
    through(path, c.listener, fds);
    for (int i = 0; i < 20; i++) {
        monitor_ask(mon, "oforward_add r:127.0.0.1:0");
        monitor_ask(mon, "oforward_del r:127.0.0.1:0");
        talk(fds);
    }
    /* a block of ulimit's is 512 bytes, or 1024 in some shells */
    ck_assert(stat(log, &st) == 0);
    ck_assert_msg(st.st_size == 512 || st.st_size == 1024,
                  "the log has %ld bytes", (long)st.st_size);
    close(fds[0]);
    close(fds[1]);
    monitor_ask(mon, "quit");
    close(mon);
    command_wait(pid);
}
END_TEST

/* Where there was no room for a whole line the next one begins a new line. */
START_TEST(log_torn)
{
    char path[PATH_LEN];
    const char *end;
    pid_t pid;
    int mon;

    file_path(path, "m");
    pid = command_start("host", "ulimit -S -f 1; exec %s -m %s -l %s/log",
                        vp_program, path, vp_dir);
    mon = monitor_batch(path);
    for (int i = 0; i < 20; i++) {
        monitor_ask(mon, "channel_add unix-connect:/none:-:%d", i);
    }
    command_wait(command_start("prlimit", "prlimit --pid %d --fsize=unlimited:",
                               (int)pid));
    monitor_ask(mon, "quit");
    close(mon);
    command_wait(pid);
    end = strstr(file_text("log"), " info ending: the monitor says so\n");
    ck_assert_ptr_nonnull(end);
    ck_assert_int_eq(end[-(ptrdiff_t)sizeof("2026-11-28 09:30:00.125")], '\n');
}
END_TEST

/* A pid file that can't be written is an error that is said. */
START_TEST(pid_file_limit)
{
    command_wait(command_start("pid", "ulimit -f 0; %s -m %s/monitor -f "
                               "%s/pid %s 2>&1 | grep -qF 'File too large'",
                               vp_program, vp_dir, vp_dir, _i ? "-d" : ""));
}
END_TEST

/* syslog_open() - be the one who serves /dev/log, which is vp_dir/syslog */
static int syslog_open(int type)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    struct timeval tv = { WAIT_MS / 1000, 0 };
    int fd = socket(AF_UNIX, type, 0);

    ck_assert(fd >= 0);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    file_path(un.sun_path, "syslog");
    ck_assert(bind(fd, (struct sockaddr *)&un, sizeof(un)) == 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
    return fd;
}

/* syslog_wait() - for a message with that text; the message */
static const char *syslog_wait(int fd, const char *text)
{
    static char message[2048];

    do {
        ssize_t n = recv(fd, message, sizeof(message) - 1, 0);

        ck_assert_msg(n > 0, "syslog is never told: %s", text);
        message[n] = '\0';
    } while (strstr(message, text) == NULL);
    return message;
}

/* syslog_accept() - who comes to a syslog that has streams */
static int syslog_accept(int log)
{
    int fd = accept(log, NULL, NULL); /* SO_RCVTIMEO holds for this, too */

    ck_assert_msg(fd >= 0, "nobody comes: %s", strerror(errno));
    return fd;
}

/* syslog_read() - for a message with that text, of a stream; the message */
static const char *syslog_read(int fd, const char *text)
{
    static char message[2048];
    size_t n;

    do {
        n = 0;
        do {
            ck_assert(n < sizeof(message));
            ck_assert_msg(recv(fd, message + n, 1, 0) == 1,
                          "syslog is never told: %s", text);
        } while (message[n++] != '\0');
        ck_assert_msg(message[0] == '<', "no message: %s", message);
    } while (strstr(message, text) == NULL);
    return message;
}

/* dev_with_log() - shell commands that give a process its own /dev */
static const char *dev_with_log(void)
{
    static char setup[4 * TEXT_LEN];
    char path[PATH_LEN];

    file_path(path, "dev");
    ck_assert(mkdir(path, 0755) == 0);
    text_format(setup, sizeof(setup), "mount -n -t tmpfs -o mode=755 dev %s && "
                "for n in null zero full random urandom; do touch %s/$n && "
                "mount -n --bind /dev/$n %s/$n || exit 1; done && "
                "ln -s %s/syslog %s/log && mount -n --move %s /dev", path, path,
                path, vp_dir, path, path);
    return setup;
}

/* To systemd's journal, and to a stderr that it isn't. */
START_TEST(log_journal)
{
    StartOptions o = {
        .setup = _i ? "export JOURNAL_STREAM=1:2"
                    : "export JOURNAL_STREAM=$(stat -L -c %d:%i /dev/fd/2)",
    };
    Daemon *d;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    d = daemon_start_with(&o, "host", "-c unix-connect:%s/none:-", vp_dir);
    daemon_wait(d, _i ? "^20[^ ]* [^ ]* info ch0: channel unix-connect: "
                      : "^<6>ch0: channel unix-connect: ");
    kill(d->pid, SIGHUP);
    daemon_wait(d, _i ? "^20[^ ]* [^ ]* info reloaded$" : "^<6>reloaded$");
}
END_TEST

/* To syslog, which goes and comes back; with -d without being told to. */
START_TEST(log_syslog)
{
    StartOptions o = { .setup = dev_with_log() };
    char path[PATH_LEN], expected[TEXT_LEN];
    int log = syslog_open(SOCK_DGRAM), fds[2], mon;
    Couple c;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    couple_paths(&c);
    daemons_adopt();
    file_path(path, "service");
    c.daemon[0] = daemon_start_with(&o, "host", "%s -f %s/pid -c "
        "unix-connect:%s:- -o s:%s:- -m %s", _i ? "-d" : "-l syslog", vp_dir,
        c.channel, path, c.monitor[0]);
    if (_i) {
        ck_assert_int_eq(daemon_exit(c.daemon[0]), 0);
        c.daemon[0] = daemon_adopted("host", pid_in("pid"),
                                     c.daemon[0]->log);
    }
    mon = monitor_batch(c.monitor[0]);
    couple_guest(&c);
    text_format(expected, sizeof(expected), "qemu-vp[%d]: ch0: channel up",
                (int)c.daemon[0]->pid);
    /* facility daemon, level info */
    ck_assert(strncmp(syslog_wait(log, expected), "<30>", 4) == 0);
    ck_assert_int_eq(daemon_count(c.daemon[0], "."), 0);
    through(path, c.listener, fds);

    close(log);                         /* gone */
    for (int i = 0; i < 20; i++) {
        monitor_ask(mon, "oforward_add r:127.0.0.1:0");
        monitor_ask(mon, "oforward_del r:127.0.0.1:0");
        talk(fds);
    }
    file_path(expected, "syslog");
    ck_assert(unlink(expected) == 0);
    log = syslog_open(SOCK_DGRAM);                /* back */
    kill(c.daemon[0]->pid, SIGUSR1);
    syslog_wait(log, "status version=");
    talk(fds);
    close(log);
    close(fds[0]);
    close(fds[1]);
    close(mon);
}
END_TEST

/* Where there is none, who starts it in the background is told. */
START_TEST(log_no_syslog)
{
    StartOptions o = { .setup = dev_with_log() };
    char path[PATH_LEN];
    Daemon *d;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    daemons_adopt();
    file_path(path, "m");
    d = daemon_start_with(&o, "host", "-d -f %s/pid -m %s", vp_dir, path);
    ck_assert_int_eq(daemon_exit(d), 0);
    ck_assert(says(d, "no syslog at /dev/log: No such file or directory: "));
    close(monitor_batch(path));
    daemon_stop(daemon_adopted("host", pid_in("pid"), d->log));
}
END_TEST

/* One that lives, but doesn't read its socket, doesn't stop the daemon. */
START_TEST(log_syslog_hangs)
{
    StartOptions o = { .setup = dev_with_log() };
    char path[PATH_LEN];
    int log = syslog_open(SOCK_DGRAM), fds[2], mon;
    Couple c;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    couple_paths(&c);
    file_path(path, "service");
    c.daemon[0] = daemon_start_with(&o, "host", "-l syslog -c "
        "unix-connect:%s:- -o s:%s:- -m %s", c.channel, path, c.monitor[0]);
    mon = monitor_batch(c.monitor[0]);
    couple_guest(&c);
    through(path, c.listener, fds);
    for (int i = 0; i < 300; i++) {
        monitor_ask(mon, "oforward_add r:127.0.0.1:0");
        monitor_ask(mon, "oforward_del r:127.0.0.1:0");
    }
    talk(fds);
    syslog_wait(log, "channel up");
    close(log);
    close(fds[0]);
    close(fds[1]);
    close(mon);
}
END_TEST

/* One whose /dev/log takes streams, where a NUL ends each message. */
START_TEST(log_syslog_stream)
{
    StartOptions o = { .setup = dev_with_log() };
    char path[PATH_LEN];
    int log = syslog_open(SOCK_STREAM), fd, mon;
    Couple c;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    ck_assert(listen(log, 4) == 0);
    couple_paths(&c);
    c.daemon[0] = daemon_start_with(&o, "host", "-l syslog -c "
        "unix-connect:%s:- -m %s", c.channel, c.monitor[0]);
    mon = monitor_batch(c.monitor[0]);
    fd = syslog_accept(log);
    kill(c.daemon[0]->pid, SIGUSR1);
    ck_assert(strncmp(syslog_read(fd, "status version="), "<30>", 4) == 0);
    close(fd);
    kill(c.daemon[0]->pid, SIGUSR1);
    fd = syslog_accept(log);
    syslog_read(fd, "status ");
    close(fd);

    close(log);
    file_path(path, "syslog");
    ck_assert(unlink(path) == 0);
    log = syslog_open(SOCK_DGRAM);      /* another syslogd */
    kill(c.daemon[0]->pid, SIGUSR1);
    syslog_wait(log, "status version=");
    close(log);
    close(mon);
}
END_TEST

/* --- user --------------------------------------------------------------- */

/* proc_ids() - a line of /proc/PID/status, without blanks at its end */
static const char *proc_ids(pid_t pid, const char *name)
{
    static char line[TEXT_LEN];
    char path[64];
    FILE *f;

    text_format(path, sizeof(path), "/proc/%d/status", (int)pid);
    f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    do {
        ck_assert_ptr_nonnull(fgets(line, sizeof(line), f));
    } while (strncmp(line, name, strlen(name)) != 0);
    fclose(f);
    line[strcspn(line, "\n")] = '\0';
    for (size_t n = strlen(line); n > 0 && line[n - 1] == ' '; n--) {
        line[n - 1] = '\0';
    }
    return line;
}

/* Who a daemon may become */
typedef struct NewUser {
    const char *user;           /* of -u; the last one has no name */
    const char *ids;
    const char *groups;
} NewUser;

static const NewUser new_users[] = {
    { "nobody", "65534\t65534\t65534\t65534", "65534" },
    { "65534", "65534\t65534\t65534\t65534", "65534" },
    { "54321", "54321\t54321\t54321\t54321", "" },
};

/* What only root may open is open before root's rights are dropped. */
START_TEST(drop_user)
{
    const NewUser *new_user = &new_users[_i];
    char path[PATH_LEN], log[PATH_LEN], uid[80], gid[80], groups[80];
    int fds[2];
    Daemon *d;
    Couple c;

    couple_paths(&c);
    file_path(path, "private");
    ck_assert(mkdir(path, 0700) == 0);
    if (geteuid() != 0) {               /* only root can become another */
        d = daemon_start("host", "-u root -m %s", c.monitor[0]);
        ck_assert_int_eq(daemon_exit(d), 1);
        ck_assert(says(d, "--user 'root': "));
        PASS_OVER("root, who can become another user");
    }
    text_format(log, sizeof(log), "%s/private/log", vp_dir);
    text_format(path, sizeof(path), "%s/private/service", vp_dir);
    text_format(c.monitor[0], PATH_LEN, "%s/private/monitor", vp_dir);
    text_format(uid, sizeof(uid), "Uid:\t%s", new_user->ids);
    text_format(gid, sizeof(gid), "Gid:\t%s", new_user->ids);
    text_format(groups, sizeof(groups), "Groups:\t%s", new_user->groups);
    d = daemon_start("host", "-u %s -f %s/private/pid -l %s -m %s "
                     "-c unix-connect:%s:- -o s:%s:-", new_user->user,
                     vp_dir, log, c.monitor[0], c.channel, path);
    close(monitor_batch(c.monitor[0]));
    for (int64_t end = now_ms() + WAIT_MS;
         strcmp(proc_ids(d->pid, "Uid:"), uid) != 0;) {
        ck_assert_msg(now_ms() < end, "the user stays %s",
                      proc_ids(d->pid, "Uid:"));
        sleep_ms(5);
    }
    ck_assert_str_eq(proc_ids(d->pid, "Gid:"), gid);
    ck_assert_str_eq(proc_ids(d->pid, "Groups:"), groups);
    ck_assert_int_eq(pid_in("private/pid"), d->pid);

    /* The channel's socket is opened later, so as that user */
    c.daemon[1] = daemon_start("guest", "-c unix-listen:%s:- -i s:%s",
                               c.channel, c.target);
    for (int64_t end = now_ms() + WAIT_MS; chmod(c.channel, 0777) < 0;) {
        ck_assert_msg(now_ms() < end, "chmod: %s", strerror(errno));
        sleep_ms(5);
    }
    through(path, c.listener, fds);
    talk(fds);
    kill(d->pid, SIGHUP);
    file_wait("private/log", "private/log: Permission denied");
    file_wait("private/log", "reloaded");
    talk(fds);
    close(fds[0]);
    close(fds[1]);
    daemon_stop(d);
    ck_assert_str_eq(file_text("private/pid"), "");     /* it can't remove it */
}
END_TEST

/* The socket files in a directory that the user owns are removed. */
START_TEST(user_cleans_up)
{
    char path[PATH_LEN], *before;
    Daemon *d;

    if (geteuid() != 0) {
        PASS_OVER("root, who can become another user");
    }
    before = files();
    file_path(path, "own");
    ck_assert(mkdir(path, 0700) == 0 && chown(path, NOBODY, NOBODY) == 0);
    d = daemon_start("host", "-u nobody -f %s/pid -m %s/monitor -c "
                     "unix-listen:%s/channel:- -o s:%s/s:-", path, path, path,
                     path);
    text_format(path, sizeof(path), "%s/own/monitor", vp_dir);
    close(monitor_batch(path));
    daemon_stop(d);
    file_path(path, "own");
    ck_assert_msg(rmdir(path) == 0, "%s: %s", path, strerror(errno));
    check_files(before);
}
END_TEST

/* --- systemd's protocol ------------------------------------------------- */

/* notify_open() - the socket that NOTIFY_SOCKET names */
static int notify_open(bool abstract)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    struct timeval tv = { WAIT_MS / 1000, 0 };
    socklen_t len = sizeof(un);
    char name[PATH_LEN];
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);

    ck_assert(fd >= 0);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    file_path(name, "notify");
    if (abstract) {
        name[0] = '@';
    }
    memcpy(un.sun_path, name, sizeof(un.sun_path));
    if (abstract) {
        un.sun_path[0] = '\0';
        len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
                          strlen(name));
    }
    ck_assert(bind(fd, (struct sockaddr *)&un, len) == 0);
    ck_assert(setenv("NOTIFY_SOCKET", name, 1) == 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
    return fd;
}

static void expect_notice(int fd, const char *text)
{
    char got[TEXT_LEN];
    ssize_t n = recv(fd, got, sizeof(got) - 1, 0);

    ck_assert_msg(n > 0, "no notice of %s", text);
    got[n] = '\0';
    got[strcspn(got, "\n")] = '\0';
    ck_assert_str_eq(got, text);
}

/* Readiness is told when all is open, the end when it begins. */
START_TEST(notices)
{
    int fd = notify_open(_i & 1);
    char path[PATH_LEN], channel[PATH_LEN];
    Daemon *d;

    file_path(path, "service");
    file_path(channel, "channel");
    if (_i & 2) {
        d = background("host", "-c unix-listen:%s:- -o s:%s:-", channel,
                       path);
    } else {
        d = daemon_start("host", "-c unix-listen:%s:- -o s:%s:- -f "
                         "%s/host.pid", channel, path, vp_dir);
    }
    expect_notice(fd, "READY=1");
    ck_assert_int_eq(pid_in("host.pid"), d->pid);
    close(dial(path, true));
    close(dial(channel, true));
    kill(d->pid, SIGTERM);
    expect_notice(fd, "STOPPING=1");
    ck_assert_int_eq(daemon_exit(d), 0);
    close(fd);
}
END_TEST

/* No notice of what can't start; and nobody there to tell is no harm. */
START_TEST(no_notices)
{
    static const char *const nobody[] = {
        "", "@", "/nonexistent", "relative", "@no-one-listens-here",
        "/dev/null", "/", NULL
    };
    int fd = notify_open(false);
    char path[PATH_LEN], name[300];
    Daemon *d;

    file_path(path, "channel");
    d = daemon_start("bad", "-c unix-listen:%s:- -o s:/nonexistent/x:-",
                     path);
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(recv(fd, name, 1, MSG_DONTWAIT) < 0);
    close(fd);
    for (int i = 0; i < COUNT_OF(nobody); i++) {
        memset(name, 'x', sizeof(name) - 1);
        name[0] = '/';
        name[sizeof(name) - 1] = '\0';
        ck_assert(setenv("NOTIFY_SOCKET", nobody[i] ? nobody[i] : name, 1) ==
                  0);
        d = daemon_start("alone", "-c unix-listen:%s:- -o s:127.0.0.1:0",
                         path);
        close(dial(daemon_listens(d, "s"), true));
        daemon_stop(d);
    }
}
END_TEST

/* A manager that doesn't read its socket holds up nobody. */
START_TEST(notices_unread)
{
    int fd = notify_open(false), full = socket(AF_UNIX, SOCK_DGRAM, 0);
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    char path[PATH_LEN];
    Daemon *d;

    file_path(un.sun_path, "notify");
    set_nonblocking(full);
    fcntl(full, F_SETFD, FD_CLOEXEC);
    ck_assert(connect(full, (struct sockaddr *)&un, sizeof(un)) == 0);
    while (send(full, "X=1", 3, 0) > 0) {
    }
    ck_assert(errno == EAGAIN);
    file_path(path, "channel");
    d = daemon_start("host", "-c unix-listen:%s:- -o s:127.0.0.1:0", path);
    daemon_wait(d, "warn systemd at ");
    close(dial(daemon_listens(d, "s"), true));
    daemon_stop(d);
    close(full);
    close(fd);
}
END_TEST

/* --- signals ------------------------------------------------------------ */

/* What our starter has blocked or ignored is as it should be. */
START_TEST(inherited_signals)
{
    static const int blocked[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1 };
    unsigned long long ignored;
    sigset_t set, before;
    char path[PATH_LEN];
    Daemon *d;

    file_path(path, "channel");
    sigemptyset(&set);
    for (int i = 0; i < COUNT_OF(blocked); i++) {
        sigaddset(&set, blocked[i]);
    }
    ck_assert(sigprocmask(SIG_BLOCK, &set, &before) == 0);
    signal(SIGCHLD, SIG_IGN);
    d = daemon_start("host", "-c unix-listen:%s:-", path);
    signal(SIGCHLD, SIG_DFL);
    ck_assert(sigprocmask(SIG_SETMASK, &before, NULL) == 0);
    daemon_wait(d, "listening");
    ck_assert_str_eq(proc_ids(d->pid, "SigBlk:"), "SigBlk:\t0000000000000000");
    ck_assert_int_eq(sscanf(proc_ids(d->pid, "SigIgn:"), "SigIgn:%llx",
                            &ignored), 1);
    ck_assert(!(ignored >> (SIGCHLD - 1) & 1));
    kill(d->pid, SIGHUP);
    daemon_wait(d, "reloaded");
    kill(d->pid, SIGUSR1);
    daemon_wait(d, "status version=");
    kill(d->pid, _i ? SIGINT : SIGTERM);
    ck_assert_int_eq(daemon_exit(d), 0);
}
END_TEST

/* A job in the background isn't stopped by the terminal that it logs to. */
START_TEST(background_job)
{
    char path[PATH_LEN];
    RelayEnd terminal;
    pid_t pid;
    int mon;

    relay_pty(&terminal);
    file_path(path, "monitor");
    pid = command_start("job", "exec setsid sh -c 'exec <>%s >&0 2>&0; "
                        "stty tostop; set -m; %s -m %s & wait $!'",
                        terminal.path, vp_program, path);
    mon = monitor_batch(path);
    monitor_ask(mon, "channel_add unix-connect:/nonexistent/channel:-");
    monitor_ask(mon, "quit");
    close(mon);
    command_wait(pid);
    close(terminal.master);
}
END_TEST

static const char *const quiet_options[] = { "", "-q", "-q -q" };

/* SIGUSR1: what there is to know goes into the log, again and again. */
START_TEST(status_signal)
{
    Daemon *d;
    Couple c;

    couple_paths(&c);
    text_format(c.where, TEXT_LEN, "%s/service", vp_dir);
    d = c.daemon[0] = daemon_start("host", "-c unix-connect:%s:- -m %s "
                                   "-o s:%s:- %s", c.channel, c.monitor[0],
                                   c.where, quiet_options[_i]);
    couple_guest(&c);
    check_works(c.where, c.listener);
    for (int i = 0; i < 3; i++) {
        daemon_mark(d);
        kill(d->pid, SIGUSR1);
        daemon_wait(d, " info status version=[^ ]+ pid=%d .* up=1 ",
                    (int)d->pid);
        daemon_wait(d, " info channel id=0 state=up ");
        daemon_wait(d, " info stats channel=0 conns=");
        check_works(c.where, c.listener);
    }
}
END_TEST

/*
 * deaf_target() - a connection whose target doesn't read, filled up
 *
 * The result is how much a daemon has taken from the client.
 */
static uint64_t deaf_target(const Couple *c, int fds[2])
{
    static unsigned char data[64 * 1024];
    int64_t end = now_ms() + WAIT_MS;
    uint64_t pos = 0, taken = 0, before;
    int mon = monitor_batch(c->monitor[0]), queued;

    through(c->where, c->listener, fds);
    set_nonblocking(fds[0]);
    do {
        ssize_t n;

        do {
            bytes_fill(data, sizeof(data), 1, pos);
            n = send(fds[0], data, sizeof(data), MSG_NOSIGNAL);
            pos += n > 0 ? (uint64_t)n : 0;
        } while (n > 0);
        sleep_ms(200);
        before = taken;
        taken = number(monitor_ask(mon, "info conns -k"), "sent_bytes");
        ck_assert(ioctl(fds[0], TIOCOUTQ, &queued) == 0);
        ck_assert_msg(now_ms() < end, "it takes and takes");
    } while (taken != before || taken == 0);
    close(mon);
    return taken;
}

/* read_all() - the pattern up to a reset: how much there was */
static uint64_t read_all(int fd)
{
    static unsigned char data[64 * 1024];
    uint64_t pos = 0;
    ssize_t n;

    while ((n = recv(fd, data, sizeof(data), 0)) > 0) {
        ck_assert(bytes_right(data, (size_t)n, 1, pos) == (size_t)n);
        pos += (uint64_t)n;
    }
    ck_assert_msg(n < 0 && errno == ECONNRESET, "%s where a reset was due",
                  n == 0 ? "end of data" : strerror(errno));
    return pos;
}

/*
 * The end while much is queued, for a target that begins to read then: it gets
 * all that was taken from the client, and then a reset, not an end of data.
 */
START_TEST(flush)
{
    uint64_t taken;
    int fds[2];
    Couple c;

    couple_start(&c, "");
    taken = deaf_target(&c, fds);
    kill(c.daemon[_i]->pid, SIGTERM);
    daemon_wait(c.daemon[_i], "ending on signal");
    ck_assert_uint_ge(read_all(fds[1]), taken);
    expect_reset(fds[0]);
    ck_assert_int_eq(daemon_exit(c.daemon[_i]), 0);
}
END_TEST

/*
 * The end while much is queued for somebody who never reads: the listeners
 * close, changes are refused, after 2 s all are reset; or at once, when it is
 * told a second time.
 */
START_TEST(flush_in_vain)
{
    const bool twice = _i;
    int64_t best = INT64_MAX;

    for (int round = 0; round < 3 && best > (twice ? 1000 : 2500); round++) {
        const char *listens;
        char where[TEXT_LEN], answer[TEXT_LEN] = "", path[PATH_LEN];
        int fds[2], mon;
        int64_t start, undelayed;
        ssize_t n;
        Couple c;

        couple_start(&c, "");
        deaf_target(&c, fds);
        mon = monitor_batch(c.monitor[1]);
        file_path(path, "further");
        monitor_ask(mon, "oforward_add r:127.0.0.1:0");
        monitor_ask(mon, "oforward_add u:%s:-", path);
        listens = daemon_listens(c.daemon[1], "r");
        text_format(where, sizeof(where), "%s", listens);
        start = now_ms();
        undelayed = undelayed_ms(c.daemon, 1);
        kill(c.daemon[1]->pid, SIGTERM);
        daemon_wait(c.daemon[1], "ending on signal");
        check_refused(where);
        if (twice) {
            kill(c.daemon[1]->pid, SIGINT);
        } else {
            send_all(mon, "oforward_add v:127.0.0.1:0\n", 27);
            n = recv(mon, answer, sizeof(answer) - 1, 0);
            ck_assert_msg(n <= 0 || strncmp(answer, "error: ", 7) == 0,
                          "a listener is opened at the end: %s", answer);
        }
        ck_assert_int_eq(daemon_exit(c.daemon[1]), 0);
        undelayed = undelayed_ms(c.daemon, 1) - undelayed;
        best = undelayed < best ? undelayed : best;
        if (!twice) {
            ck_assert_msg(now_ms() - start >= 1900, "ended after %d ms",
                          (int)(now_ms() - start));
        }
        ck_assert_msg(access(path, F_OK) < 0, "%s is left", path);
        expect_reset(fds[1]);
        daemon_kill(c.daemon[0]);
        expect_reset(fds[0]);
        close(mon);
        close(fds[0]);
        close(fds[1]);
        close(c.listener);
        ck_assert(unlink(c.monitor[0]) == 0);
    }
    ck_assert_msg(best <= (twice ? 1900 : 4000), "ended only after %d ms",
                  (int)best);
}
END_TEST

/* While it ends, the other side's new connections are refused, too. */
START_TEST(refused_at_end)
{
    bool refused = false;

    for (int round = 0; round < 3 && !refused; round++) {
        int fds[2], late;
        Couple c;

        couple_start(&c, "");
        deaf_target(&c, fds);
        kill(c.daemon[1]->pid, SIGTERM);
        daemon_wait(c.daemon[1], "ending on signal");
        late = dial(c.where, true);
        ck_assert_int_eq(daemon_exit(c.daemon[1]), 0);
        refused = daemon_saw(c.daemon[0], "s: connection from .* refused: the "
                             "other side's daemon ends");
        ck_assert_msg(poll(&(struct pollfd){ .fd = c.listener,
                                             .events = POLLIN }, 1, 0) == 0,
                      "the target gets a connection at the end");
        daemon_kill(c.daemon[0]);
        close(late);
        close(fds[0]);
        close(fds[1]);
        close(c.listener);
        ck_assert(unlink(c.monitor[0]) == 0);
    }
    ck_assert_msg(refused, "it is never refused");
}
END_TEST

/* --- init file ---------------------------------------------------------- */

/* A line that must be refused */
typedef struct BadLine {
    const char *line;
    const char *names;          /* must be in the message */
} BadLine;

static const BadLine bad_lines[] = {
    { "nonsense", "'nonsense'" },
    { "nonsense with value", "'nonsense'" },
    { "-c unix-listen:/x:-:1", "'-c'" },
    { "--grace 5", "'--grace'" },
    { "c unix-listen:/x:-:1", "'c'" },
    { "grace=5", "'grace=5'" },
    { "channel", "'channel'" },
    { "channel   ", "'channel'" },
    { "channel nonsense", "nonsense" },
    { "channel unix-connect:/x:-", "already" },
    { "channel unix-connect:/x:-:x", "'x'" },
    { "channel unix-connect:/x:- :1", "'- '" },
    { "oforward", "'oforward'" },
    { "oforward s", "'s'" },
    { "oforward r:127.0.0.1:99999", "99999" },
    { "oforward r:127.0.0.1:0:7", "7" },
    { "iforward r:127.0.0.1:80 # comment", "comment" },
    { "iforward r:127.0.0.1:80 r:127.0.0.1:81", "127.0.0.1:81" },
    { "iforward r:127.0.0.1:80\niforward r:127.0.0.1:81", "already" },
    { "grace", "'grace'" },
    { "grace -1", "'-1'" },
    { "grace soon", "'soon'" },
    { "grace 99999999999999999999", "'99999999999999999999'" },
    { "max-conns 0", "'0'" },
    { "verbose 2", "'2'" },
    { "daemonize yes", "'yes'" },
    { "quiet no", "'no'" },
    { "config other", "'config'" },
    { "execute quit", "'execute'" },
    { "help", "'help'" },
    { "version", "'version'" },
    { "dump-config", "'dump-config'" },
    { "monitor", "'monitor'" },
    { "grace 5\ngrace 5", "--grace '5'" },
    { "user nobody\nuser root", "--user 'root'" },
    { "logfile /x/a\nlogfile /x/b", "--logfile '/x/b'" },
    { "grace 5\r7", "'5?7'" },
    { "channel unix-listen:/x:-:1\r\r", "control character" },
    { "\xef\xbb\xbfgrace 5", "expected the long name of an option" },
    { "oforward r:/x\t/y:-", "control character" },
    { "\x1b[31mchannel", "[31mchannel" },
};

/* conf() - an init file: a channel, a service, the line on line 5, more */
static void conf(const Couple *c, const char *line)
{
    write_file("conf", "# comment\n\n\tchannel\tunix-connect:%s:- \n"
               "oforward s:%s/service:-\n%s\noforward last:%s/last:-\n",
               c->channel, vp_dir, line, vp_dir);
}

/* A wrong line is named, in time: nothing has been opened then. */
START_TEST(bad_config)
{
    char expected[TEXT_LEN], *before;
    Couple c;
    Daemon *d;

    couple_paths(&c);
    conf(&c, bad_lines[_i].line);
    before = files();
    d = daemon_start("bad", "-C %s/conf", vp_dir);
    ck_assert_int_eq(daemon_exit(d), 2);
    text_format(expected, sizeof(expected), "%s/conf:%d: ", vp_dir,
                strchr(bad_lines[_i].line, '\n') ? 6 : 5);
    ck_assert_msg(says(d, expected), "no '%s' in the message", expected);
    ck_assert_msg(says(d, bad_lines[_i].names), "no '%s' in the message",
                  bad_lines[_i].names);
    check_files(before);
}
END_TEST

/* What a NUL byte would hide is no comment; nor may a line be endless. */
START_TEST(odd_config)
{
    static char text[8000];
    char path[PATH_LEN];
    Daemon *d;

    file_path(path, "conf");
    memset(text, _i ? 'x' : '\0', sizeof(text));
    memcpy(text, "#\nmonitor /x/m", 14);
    file_write(path, text, _i ? sizeof(text) : 24);
    d = daemon_start("bad", "-C %s", path);
    ck_assert_int_eq(daemon_exit(d), 2);
    ck_assert(says(d, _i ? "/conf:2: the line is too long" :
                   "/conf:2: the line has a NUL byte"));
}
END_TEST

/* A line that must make the start fail */
typedef struct BadSetting {
    const char *line;           /* %s: vp_dir */
    int status;
    const char *says;
} BadSetting;

static const BadSetting bad_settings[] = {
    { "key %s/missing", 2, "--key" },
    { "key %s/conf", 2, "--key" },
    { "user no-such-user", 1, "--user 'no-such-user'" },
    { "oforward r:%s/taken:-", 1, "in use" },
    { "channel unix-listen:%s/no/dir:-:1", 1, "No such file" },
    { "channel fd:999:-:1", 1, "999" },
    { "monitor %s/no/dir", 1, "No such file" },
    { "pidfile %s/no/dir", 1, "No such file" },
    { "logfile %s/no/dir", 1, "No such file" },
};

/* What is wrong in a value that can be read names its line, in the log too */
START_TEST(bad_setting)
{
    const BadSetting *bad = &bad_settings[_i];
    char line[TEXT_LEN], expected[TEXT_LEN], *before;
    bool logged = strncmp(bad->line, "logfile", 7) != 0 && bad->status == 1;
    int listener;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    file_path(line, "taken");
    listener = listen_on(line, 5);
    expand(line, sizeof(line), bad->line);
    conf(&c, line);
    before = files();
    d = daemon_start("bad", "-C %s/conf %s%s%s", vp_dir, logged ? "-l " : "",
                     logged ? vp_dir : "", logged ? "/x.log" : "");
    ck_assert_int_eq(daemon_exit(d), bad->status);
    text_format(expected, sizeof(expected), "qemu-vp: %s/conf:5: ", vp_dir);
    ck_assert_msg(says(d, expected) && says(d, bad->says), "no '%s', '%s'",
                  expected, bad->says);
    if (logged) {
        text_format(expected, sizeof(expected), " error %s/conf:5: ", vp_dir);
        ck_assert_msg(strstr(file_text("x.log"), expected) != NULL,
                      "not in the log: %s", expected);
    }
    check_files(before);
    close(listener);
}
END_TEST

/* The same at SIGHUP: nothing changes, whatever else is in the file. */
START_TEST(bad_reload)
{
    char expected[TEXT_LEN], *before, *after;
    int fds[2], mon;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    conf(&c, "");
    d = daemon_start("host", "-C %s/conf -m %s", vp_dir, c.monitor[0]);
    couple_guest(&c);
    mon = monitor_batch(c.monitor[0]);
    text_format(c.where, TEXT_LEN, "%s/service", vp_dir);
    through(c.where, c.listener, fds);
    daemon_up(d);
    before = monitor_state(mon);
    for (int i = 0; i < COUNT_OF(bad_lines); i++) {
        conf(&c, bad_lines[i].line);
        if (i % 2) {            /* beside a change that would be fine */
            write_file("conf", "channel unix-listen:%s/other:-:1\n\n\n\n%s\n"
                       "%s", vp_dir, bad_lines[i].line,
                       strstr(bad_lines[i].names, "already") ?
                       "channel unix-listen:/x:-:1\n" : "");
        }
        daemon_mark(d);
        kill(d->pid, SIGHUP);
        daemon_wait(d, " error nothing reloaded: ");
        text_format(expected, sizeof(expected), "%s/conf:[567]: ", vp_dir);
        ck_assert_msg(daemon_saw(d, expected), "'%s': no file and line",
                      bad_lines[i].line);
        after = monitor_state(mon);
        ck_assert_msg(strcmp(before, after) == 0,
                      "'%s' changed this\n%s\nto this\n%s",
                      bad_lines[i].line, before, after);
        free(after);
        talk(fds);
    }
    file_path(expected, "conf");
    ck_assert(unlink(expected) == 0);
    daemon_mark(d);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "nothing reloaded: .*/conf.*No such file");
    talk(fds);
    conf(&c, "oforward more:127.0.0.1:0");
    kill(d->pid, SIGHUP);
    daemon_listens(d, "more");
    talk(fds);
    check_works(c.where, c.listener);
    close(fds[0]);
    close(fds[1]);
    close(mon);
    free(before);
}
END_TEST

/* reload() - replace the init file and have it read */
static void reload(Daemon *d, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void reload(Daemon *d, const char *fmt, ...)
{
    char text[4 * TEXT_LEN];
    va_list ap;
    int n;

    va_start(ap, fmt);
    n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    ck_assert(n >= 0 && (size_t)n < sizeof(text));
    write_file("conf", "%s", text);
    daemon_mark(d);
    kill(d->pid, SIGHUP);
    daemon_wait(d, " (info|error) (reloaded|nothing reloaded)");
}

/* rights() - is the socket NAME of vp_dir a user's, a group's, of that mode? */
static void rights(const char *name, uid_t uid, gid_t gid, mode_t mode)
{
    char path[PATH_LEN];
    struct stat st;

    file_path(path, name);
    ck_assert_msg(stat(path, &st) == 0, "%s: %s", path, strerror(errno));
    ck_assert_msg(st.st_uid == uid && st.st_gid == gid &&
                  (st.st_mode & 07777) == mode, "%s: %ld:%ld %o", path,
                  (long)st.st_uid, (long)st.st_gid, (unsigned)st.st_mode);
}

/* What listens on a unix socket has the mode and the group that were asked. */
START_TEST(socket_rights)
{
    uid_t uid = geteuid();
    gid_t gid = uid == 0 ? 4242 : getegid();
    char conf[4 * TEXT_LEN], path[PATH_LEN];
    Daemon *d;
    int mon;

    umask(0022);
    text_format(conf, sizeof(conf), "channel unix-listen:%s/c:-,mode=0660\n"
                "oforward s:%s/s:-,group=%ld,mode=0620\noforward t:%s/t:-\n"
                "monitor %s/m,group=%ld\n", vp_dir, vp_dir, (long)gid, vp_dir,
                vp_dir, (long)gid);
    write_file("conf", "%s", conf);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    file_path(path, "m");
    mon = monitor_batch(path);
    rights("c", uid, getegid(), 0660);
    rights("s", uid, gid, 0620);
    rights("t", uid, getegid(), 0755);
    rights("m", uid, gid, 0600);
    ck_assert(strstr(monitor_ask(mon, "info config"), ":-,mode=0660\n"));
    monitor_ask(mon, "oforward_add u:%s/u:-,mode=0600", vp_dir);
    rights("u", uid, getegid(), 0600);
    monitor_ask(mon, "oforward_del u:%s/u:-,mode=0600", vp_dir);
    reload(d, "%s#\n", conf);
    ck_assert_int_eq(daemon_count(d, "listening on"), 0);
    *strstr(conf, "0620") = '\0';
    reload(d, "%s0666\nmonitor %s/m,group=%ld\n", conf, vp_dir, (long)gid);
    rights("s", uid, gid, 0666);
    close(mon);
}
END_TEST

/*
 * introduced() - does a target learn the address of its client, by a header of
 * the PROXY protocol? The client, on 127.0.0.1, comes through @where.
 */
static void introduced(const char *where, int listener)
{
    unsigned char want[] = "\r\n\r\n\0\r\nQUIT\n"
                           "\41\21\0\14\177\0\0\1\177\0\0\1";
    unsigned char got[sizeof(want) - 1 + 4];
    int client = dial(where, true), fd = accept_one(listener);
    struct sockaddr_in ours, theirs;
    socklen_t len = sizeof(ours);

    ck_assert_int_eq(getsockname(client, (struct sockaddr *)&ours, &len), 0);
    ck_assert_int_eq(getpeername(client, (struct sockaddr *)&theirs, &len), 0);
    recv_all(fd, got, sizeof(got));
    ck_assert_mem_eq(got, want, sizeof(want) - 1);
    ck_assert_mem_eq(got + sizeof(want) - 1, &ours.sin_port, 2);
    ck_assert_mem_eq(got + sizeof(want) + 1, &theirs.sin_port, 2);
    talk((int[]){ client, fd });
    close(client);
    close(fd);
}

/* Init file, reload and monitor: with proxy=v2 the target gets a header. */
START_TEST(proxy)
{
    char conf[TEXT_LEN], target[TEXT_LEN], path[PATH_LEN];
    const char *said, *where, *other;
    Daemon *guest, *host;
    int listener, mon;

    listener = listen_any(target);
    text_format(conf, sizeof(conf), "channel unix-listen:%s/c:-\nmonitor %s/m\n"
                "iforward s:%s", vp_dir, vp_dir, target);
    write_file("conf", "%s", conf);
    guest = daemon_start("guest", "-v -C %s/conf", vp_dir);
    host = daemon_start("host", "-c unix-connect:%s/c:- -o s:127.0.0.1:0 "
                        "-o t:127.0.0.1:0", vp_dir);
    where = daemon_listens(host, "s");
    other = daemon_listens(host, "t");
    check_works(where, listener);
    reload(guest, "%s,proxy=v2\n", conf);
    daemon_wait(guest, "reload: removed -i s:%s$", target);
    daemon_wait(guest, "reload: added -i s:%s,proxy=v2$", target);
    introduced(where, listener);
    daemon_wait(guest, "s: connection .* to %s for 127\\.0\\.0\\.1:[0-9]+$",
                target);
    reload(guest, "%s,proxy=v2\n#\n", conf);
    ck_assert(!daemon_saw(guest, "(added|removed)"));
    introduced(where, listener);
    file_path(path, "m");
    mon = monitor_batch(path);
    monitor_ask(mon, "iforward_add t:%s:0,proxy=v2", target);
    introduced(other, listener);
    said = monitor_ask(mon, "info iforwards -k");
    text_format(conf, sizeof(conf), "t:%s:0,proxy=v2", target);
    ck_assert_str_eq(value(line_find(said, "iforward", 1), "spec"), conf);
    ck_assert(strstr(monitor_ask(mon, "info iforwards"), ",proxy=v2\n"));
    ck_assert(strstr(monitor_ask(mon, "info config"), conf));
    monitor_ask(mon, "iforward_del %s", conf);
    monitor_ask(mon, "iforward_add t:%s", target);
    check_works(other, listener);
    close(mon);
}
END_TEST

/* Who cleans /tmp takes the sockets' files away; SIGHUP makes them again. */
START_TEST(sockets_removed)
{
    static const char *const names[] = { "m", "c", "s" };
    char conf[TEXT_LEN], path[3][PATH_LEN];
    int fds[2], mon;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    for (int i = 0; i < 3; i++) {
        file_path(path[i], names[i]);
    }
    text_format(conf, sizeof(conf), "channel unix-listen:%s:-\noforward "
                "s:%s:-\nmonitor %s\n", path[1], path[2], path[0]);
    write_file("conf", "%s", conf);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    mon = monitor_batch(path[0]);
    daemon_start("guest", "-c unix-connect:%s:- -i s:%s", path[1], c.target);
    daemon_up(d);
    through(path[2], c.listener, fds);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 3; i++) {
            ck_assert(unlink(path[i]) == 0);
        }
        if (round == 1) {
            file_write(path[2], "another's", 9);
        }
        reload(d, "%s", conf);
        daemon_wait(d, "monitor: listening on %s", path[0]);
        close(monitor_batch(path[0]));
        close(dial(path[1], true));
        if (round == 0) {
            check_works(path[2], c.listener);
        } else {
            daemon_wait(d, "error .*%s: the file is not a socket", path[2]);
            ck_assert(unlink(path[2]) == 0);
            daemon_wait(d, "oforward s: listening on %s", path[2]);
            check_works(path[2], c.listener);
        }
        talk(fds);
        monitor_ask(mon, "info status");
        ck_assert_int_eq(daemon_count(d, "channel (up|down)"), 0);
    }
    close(mon);
    close(fds[0]);
    close(fds[1]);
    daemon_stop(d);
    for (int i = 0; i < 3; i++) {
        ck_assert_msg(access(path[i], F_OK) < 0, "%s is left", path[i]);
    }
}
END_TEST

/* A log that can't be opened at a reload: what is in force is what is shown. */
START_TEST(log_stays)
{
    char path[PATH_LEN], expected[TEXT_LEN];
    Daemon *d;

    file_path(path, "m");
    write_file("conf", "monitor %s\nlogfile %s/a.log\n", path, vp_dir);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    close(monitor_batch(path));
    write_file("conf", "monitor %s\nlogfile %s/no/b.log\n", path, vp_dir);
    kill(d->pid, SIGHUP);
    file_wait("a.log", "no/b.log: No such file or directory: the old one "
              "stays in force");
    file_wait("a.log", "reloaded");
    text_format(expected, sizeof(expected), "\nlogfile %s/a.log\n", vp_dir);
    ck_assert_int_eq(execute(path, "info config"), 0);
    ck_assert_ptr_nonnull(strstr(executed(1), expected));
}
END_TEST

/* A pid file that is a link to one keeps no stale number. */
START_TEST(pid_file_link)
{
    char path[2][PATH_LEN];
    Daemon *d;

    file_path(path[0], "link");
    file_path(path[1], "pid");
    ck_assert(symlink(path[1], path[0]) == 0);
    d = daemon_start("host", "-f %s -c unix-listen:%s/c:-", path[0], vp_dir);
    daemon_wait(d, "listening");
    ck_assert_int_eq(pid_in("pid"), d->pid);
    daemon_stop(d);
    ck_assert_str_eq(file_text("pid"), "");
}
END_TEST

/*
 * A group's number is looked up once, and for what is new after a reload again;
 * what is a number already is not, whatever group has it for its name.
 */
START_TEST(group_known)
{
    StartOptions o = { .setup = "mount -n --bind group /etc/group" };
    char path[PATH_LEN];
    long gid = geteuid() == 0 ? (long)getegid() : 0;
    int64_t give_up = now_ms() + WAIT_MS;
    int mon;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    umask(0022);
    ck_assert(chdir(vp_dir) == 0);
    /* in a namespace of an ordinary user the only group is 0, which is his */
    write_file("group", "root:x:0:\nvpgroup:x:%ld:\n%ld:x:4242:\n", gid, gid);
    write_file("conf", "channel unix-listen:%s/c:-,group=vpgroup\n"
               "oforward k:%s/k:-,group=vpgroup\n", vp_dir, vp_dir);
    file_path(path, "m");
    daemon_start_with(&o, "host", "-C conf -m %s", path);
    mon = monitor_batch(path);
    monitor_ask(mon, "oforward_add n:%s/n:-,group=%ld", vp_dir, gid);
    rights("n", geteuid(), getegid(), 0755);
    write_file("group", "root:x:0:\n");
    monitor_ask(mon, "oforward_add s:%s/s:-,group=vpgroup", vp_dir);
    rights("s", geteuid(), getegid(), 0755);
    /* what is as it was keeps it, though its channel is made anew */
    write_file("conf", "channel unix-listen:%s/c:-,mode=0700\n"
               "oforward k:%s/k:-,group=vpgroup\n", vp_dir, vp_dir);
    monitor_ask(mon, "reload");
    rights("k", geteuid(), getegid(), 0755);
    monitor_refuses(mon, "oforward_add t:/t:-,group=vpgroup",
                    "cannot look up 'vpgroup': there is no such group");
    monitor_refuses(mon, "oforward_add t:/t:-,group=4294967295",
                    "'4294967295' is not");
    write_file("conf", "channel unix-listen:%s/c:-,mode=0700\n"
               "oforward k:%s/k:-,group=vpgroups\n", vp_dir, vp_dir);
    for (bool said = false; !said;) { /* if the child has answered in time */
        char *answer;

        dprintf(mon, "reload\n");
        answer = monitor_answer(mon);
        said = strstr(answer, "not all of it") != NULL;
        ck_assert_msg(said || now_ms() < give_up, "%s", answer);
        free(answer);
    }
    close(mon);
}
END_TEST

/* More groups than are kept: each socket has its own, the monitor's as well. */
START_TEST(group_many)
{
    enum { GROUPS = 12 };
    StartOptions o = { .setup = "mount -n --bind group /etc/group" };
    bool root = geteuid() == 0;
    char conf[4096] = "", group[1024] = "", path[PATH_LEN];
    Daemon *d;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    umask(0022);
    ck_assert(chdir(vp_dir) == 0);
    for (int i = 0; i < GROUPS; i++) {
        size_t len = strlen(conf), n = strlen(group);

        text_format(conf + len, sizeof(conf) - len,
                    "oforward s:%s/s%d:-,group=g%d\n", vp_dir, i, i);
        text_format(group + n, sizeof(group) - n, "g%d:x:%d:\n", i,
                    root ? 4242 + i : 0);
    }
    /* in a namespace of an ordinary user the only group is 0, which is his */
    write_file("group", "%sgm:x:%d:\n", group, root ? 4242 : 0);
    write_file("conf", "%s", conf);
    d = daemon_start_with(&o, "host", "-c unix-listen:%s/c:- -C conf "
                          "-m %s/m,group=gm", vp_dir, vp_dir);
    for (int i = 0; i < GROUPS; i++) {
        char name[16], said[32];

        snprintf(said, sizeof(said), "listening on .*/s%d$", i);
        daemon_wait(d, said);
        snprintf(name, sizeof(name), "s%d", i);
        rights(name, geteuid(), root ? 4242 + (gid_t)i : getegid(), 0755);
    }
    file_path(path, "m");
    close(monitor_batch(path));
    rights("m", geteuid(), root ? 4242 : getegid(), 0600);
}
END_TEST

/*
 * Who is asked for a group's number, and doesn't answer, holds up what needs it
 * and nothing else: forwards of a reload, and a command of the monitor.  Here
 * it is a FIFO in place of /etc/group.
 */
START_TEST(group_unanswered)
{
    StartOptions o = { .setup = "mount -n --bind etc /etc" };
    struct pollfd answer = { .events = POLLIN };
    char path[PATH_LEN];
    int mon[2];
    Daemon *d;

    if (!may_mount()) {
        PASS_OVER(MAY_MOUNT);
    }
    umask(0022);
    ck_assert(chdir(vp_dir) == 0);
    ck_assert(mkdir("etc", 0755) == 0 && mkfifo("etc/group", 0644) == 0);
    write_file("conf", "channel unix-listen:%s/c:-\n", vp_dir);
    file_path(path, "m");
    d = daemon_start_with(&o, "host", "-C conf -m %s", path);
    mon[0] = monitor_batch(path);
    mon[1] = monitor_batch(path);
    write_file("conf", "channel unix-listen:%s/c:-\n"
               "oforward a:%s/a:-,group=vpgroup\n", vp_dir, vp_dir);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "info reloaded");
    dprintf(mon[0], "oforward_add b:/b:-,group=vpother\n");
    monitor_ask(mon[1], "info status");
    ck_assert_int_eq(daemon_count(d, "oforward a: listening"), 0);

    answer.fd = mon[0];
    ck_assert(rename("etc/group", "fifo") == 0);
    write_file("etc/group", "root:x:0:\nvpgroup:x:%ld:\n",
               geteuid() == 0 ? (long)getegid() : 0);
    for (int64_t give_up = now_ms() + WAIT_MS;
         poll(&answer, 1, 10) == 0 ||
         daemon_count(d, "oforward a: listening") == 0;) {
        ck_assert(now_ms() < give_up);
        close(open("fifo", O_WRONLY | O_NONBLOCK)); /* who reads it: no more */
    }
    monitor_refuses(mon[0], "", "cannot look up 'vpother'");
    rights("a", geteuid(), getegid(), 0755);
    close(mon[0]);
    close(mon[1]);
}
END_TEST

/* With -u they are USER's from the start on. */
START_TEST(socket_owner)
{
    char path[PATH_LEN];

    if (geteuid() != 0) {
        PASS_OVER("root, who can become another user");
    }
    umask(0022);
    daemon_start("host", "-u nobody -m %s/m,mode=0660 -c unix-listen:%s/c:- "
                 "-o s:%s/s:-,group=4242", vp_dir, vp_dir, vp_dir);
    file_path(path, "m");
    close(monitor_batch(path));
    rights("c", NOBODY, NOBODY, 0755);
    rights("s", NOBODY, 4242, 0755);
    rights("m", NOBODY, NOBODY, 0660);
}
END_TEST

/* What didn't change isn't touched, under traffic. */
START_TEST(reload_changes)
{
    char head[4 * TEXT_LEN], taken[TEXT_LEN], old[PATH_LEN];
    int fds[2][2], holder, mon, open_before;
    const char *line;
    Traffic t;
    Daemon *d;
    Couple c;

    traffic_init(&t);
    couple_paths(&c);
    daemon_start("guest", "-c unix-listen:%s:- -i s:%s -i changing:%s -i "
                 "flow:%s", c.channel, c.target, c.target, traffic_listen(&t));
    text_format(head, sizeof(head), "# generation\nchannel unix-connect:%s:-\n"
                "oforward s:127.0.0.1:0\noforward flow:127.0.0.1:0\n",
                c.channel);
    write_file("conf", "%soforward changing:%s/a:-\n", head, vp_dir);
    d = daemon_start("host", "-C %s/conf -m %s", vp_dir, c.monitor[0]);
    daemon_up(d);
    mon = monitor_batch(c.monitor[0]);
    text_format(c.where, TEXT_LEN, "%s", daemon_listens(d, "s"));
    file_path(old, "a");
    through(c.where, c.listener, fds[0]);
    through(old, c.listener, fds[1]);
    t.hold = true;
    for (int i = 0; i < 3; i++) {
        traffic_add(&t, daemon_listens(d, "flow"), 0, FOREVER, FOREVER);
    }
    ck_assert(traffic_run(&t, traffic_paired, WAIT_MS));
    traffic_run(&t, traffic_never, 100);

    /* Changed: the new one works, the old one has gone, what it made lives */
    reload(d, "%soforward changing:%s/b:-\n", head, vp_dir);
    ck_assert_int_eq(daemon_count(d, "listening on"), 1);
    ck_assert_msg(access(old, F_OK) < 0, "%s is left", old);
    file_path(old, "b");
    check_works(old, c.listener);
    talk(fds[0]);
    talk(fds[1]);
    traffic_run(&t, traffic_never, 100);

    /* What the monitor added stays */
    monitor_ask(mon, "oforward_add s:%s/monitors:-", vp_dir);
    reload(d, "%s", head);
    ck_assert_msg(access(old, F_OK) < 0, "%s is left", old);
    file_path(old, "monitors");
    check_works(old, c.listener);
    talk(fds[1]);

    /* An address that is taken: the rest is done, later that one too */
    holder = listen_any(taken);
    reload(d, "%soforward changing:%s\noforward s:%s/c:-\n", head, taken,
           vp_dir);
    ck_assert(daemon_saw(d, "error reloaded, but not all"));
    ck_assert(daemon_saw(d, "error reload: .*/conf:5: .*in use"));
    file_path(old, "c");
    check_works(old, c.listener);
    close(holder);
    reload(d, "%soforward changing:%s\n", head, taken);
    check_works(taken, c.listener);

    /* Order and comments mean nothing, numbers take effect */
    open_before = daemon_fds(d);
    for (int i = 0; i < 20; i++) {
        reload(d, "oforward changing:%s\nmax-conns %d\n%s%s\n", taken,
               1000 + i, i % 2 ? "#" : "", head);
        if (i % 2) {
            ck_assert(daemon_saw(d, "info reloaded"));
        }
        ck_assert_int_eq(daemon_count(d, "listening on"), 0);
        traffic_run(&t, traffic_never, 10);
    }
    line = monitor_ask(mon, "info stats -k");
    ck_assert_uint_eq(number(line, "max_conns"), 1019);
    ck_assert_int_le(daemon_fds(d), open_before);
    line = monitor_ask(mon, "info channels -k");
    ck_assert_uint_eq(number(line, "reconnects"), 0);
    ck_assert_str_eq(value(line, "state"), "up");
    for (int i = 0; i < 2; i++) {
        talk(fds[i]);
        close(fds[i][0]);
        close(fds[i][1]);
    }
    ck_assert_str_eq(c.where, daemon_listens(d, "s"));
    check_works(c.where, c.listener);
    for (size_t i = 0; i < t.n_flows; i++) {
        t.flows[i].side[0].to_send = t.flows[i].side[0].sent;
        t.flows[i].side[1].to_send = t.flows[i].side[1].sent;
    }
    t.hold = false;
    ck_assert(traffic_run(&t, traffic_done, WAIT_MS));
    traffic_free(&t);
    close(mon);
}
END_TEST

/* key_write() - a key in vp_dir/name, which belongs to owner */
static void key_write(const char *name, const char *key, uid_t owner)
{
    char path[PATH_LEN];

    file_path(path, name);
    unlink(path);
    write_file(name, "%s", key);
    ck_assert(chmod(path, 0600) == 0);
    ck_assert(owner == geteuid() || chown(path, owner, owner) == 0);
}

/* An init file may be a pipe at start; a reload waits for nobody to write. */
START_TEST(reload_pipe)
{
    char path[PATH_LEN], monitor[PATH_LEN];
    int fd, mon;
    Daemon *d;

    file_path(path, "conf");
    file_path(monitor, "monitor");
    ck_assert(mkfifo(path, 0600) == 0);
    d = daemon_start("host", "-C %s -m %s", path, monitor);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    dprintf(fd, "channel unix-listen:%s/channel:-\noforward a:127.0.0.1:0\n",
            vp_dir);
    close(fd);
    daemon_listens(d, "a");
    mon = monitor_batch(monitor);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "nothing reloaded: --config '.*': not a file");
    monitor_ask(mon, "info status");
    close(mon);
}
END_TEST

/* Each change is logged, and each error with the line it comes from. */
START_TEST(reload_says)
{
    char taken[2][TEXT_LEN], line[TEXT_LEN];
    int holder[2], mon;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    holder[0] = listen_any(taken[0]);
    holder[1] = listen_any(taken[1]);
    write_file("conf", "channel unix-listen:%s:-\noforward a:127.0.0.1:0\n"
               "oforward b:127.0.0.1:0\niforward c:127.0.0.1:1\n", c.channel);
    d = daemon_start("host", "-C %s/conf -m %s", vp_dir, c.monitor[0]);
    mon = monitor_batch(c.monitor[0]);
    monitor_ask(mon, "oforward_add m:127.0.0.1:0");
    ck_assert_int_eq(daemon_count(d, "added -"), 1);

    reload(d, "channel unix-listen:%s:-\noforward a:%s\noforward b:%s\n"
           "iforward c:127.0.0.1:2\n", c.channel, taken[0], taken[1]);
    for (int i = 0; i < 2; i++) {
        text_format(line, sizeof(line), "error reload: .*/conf:%d: -o '%c:%s': "
                    ".*in use", i + 2, "ab"[i], taken[i]);
        ck_assert_msg(daemon_saw(d, line), "never: %s", line);
        text_format(line, sizeof(line), "info reload: removed -o %c:127.0.0.1:0"
                    "$", "ab"[i]);
        ck_assert_msg(daemon_saw(d, line), "never: %s", line);
    }
    ck_assert(daemon_saw(d, "info reload: removed -i c:127.0.0.1:1$"));
    ck_assert(daemon_saw(d, "info reload: added -i c:127.0.0.1:2$"));
    ck_assert_int_eq(daemon_count(d, " reload: "), 6);
    ck_assert(daemon_saw(d, "error reloaded, but not all"));
    close(holder[0]);
    close(holder[1]);

    /* A channel's forwards go with it, whoever added them */
    reload(d, "channel unix-listen:%s/other:-\niforward c:127.0.0.1:2\n",
           vp_dir);
    ck_assert(daemon_saw(d, "reload: removed -c unix-listen:.*/channel:-$"));
    ck_assert(daemon_saw(d, "reload: removed with its channel -o m:127"));
    ck_assert(daemon_saw(d, "reload: added -c unix-listen:.*/other:-$"));
    ck_assert(daemon_saw(d, "reload: added -i c:127.0.0.1:2$"));
    ck_assert_str_eq(monitor_ask(mon, "info oforwards -k"), "");
    close(mon);
}
END_TEST

/* What takes a restart is as it was, and that is said. */
START_TEST(reload_restart)
{
    const char *const names[] = { "monitor", "pidfile", "user", "daemonize" };
    char line[TEXT_LEN], *before;
    int mon;
    Daemon *d;
    Couple c;

    couple_paths(&c);
    write_file("conf", "channel unix-listen:%s:-\nmonitor %s\npidfile %s/pid\n",
               c.channel, c.monitor[0], vp_dir);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    mon = monitor_batch(c.monitor[0]);
    before = strdup(monitor_ask(mon, "info config"));
    for (int round = 0; round < 2; round++) {
        reload(d, "channel unix-listen:%s:-\nmonitor %s/m\nuser nobody\n"
               "daemonize\n", c.channel, vp_dir);
        for (int i = 0; i < COUNT_OF(names); i++) {
            text_format(line, sizeof(line), "warn reload: .*'%s' takes a "
                        "restart", names[i]);
            ck_assert_int_eq(daemon_count(d, line), 1);
        }
        ck_assert_str_eq(monitor_ask(mon, "info config"), before);
    }
    reload(d, "channel unix-listen:%s:-\nmonitor %s\npidfile %s/pid\n",
           c.channel, c.monitor[0], vp_dir);
    ck_assert_int_eq(daemon_count(d, "restart"), 0);
    free(before);
    close(mon);
}
END_TEST

/* A channel that comes with its key has it from the start. */
START_TEST(reload_adds_key)
{
    Daemon *d;
    Couple c;

    couple_paths(&c);
    key_write("key", "the key of both of them", geteuid());
    write_file("conf", "channel unix-listen:%s/first:-\n", vp_dir);
    c.daemon[0] = d = daemon_start("host", "-C %s/conf", vp_dir);
    daemon_wait(d, "listening");
    text_format(c.where, TEXT_LEN, "%s/service", vp_dir);
    reload(d, "channel unix-listen:%s/first:-\noforward s:%s:-:1\n"
           "channel tcp-listen:0.0.0.0:0:1\nkey %s/key\nmax-conns 7\n", vp_dir,
           c.where, vp_dir);
    ck_assert(daemon_saw(d, "ch1: channel tcp-listen: listening"));
    ck_assert(!daemon_saw(d, "keeps others out"));
    reload(d, "channel unix-listen:%s/first:-\noforward s:%s:-:1\n"
           "channel tcp-listen:0.0.0.0:0:1\n", vp_dir, c.where);
    ck_assert(daemon_saw(d, "warn ch1: whoever reaches 0.0.0.0:[1-9][0-9]* is "
                         "the other end"));
    reload(d, "channel unix-connect:%s:-:1\noforward s:%s:-:1\nkey %s/key\n",
           c.channel, c.where, vp_dir);
    c.daemon[1] = daemon_start("guest", "-c unix-listen:%s:- -i s:%s -k %s/key",
                               c.channel, c.target, vp_dir);
    check_works(c.where, c.listener);
}
END_TEST

/* Channels come and go by the init file too, and the level of the log. */
START_TEST(reload_channels)
{
    char head[TEXT_LEN], where[2][TEXT_LEN];
    int fds[2][2];
    Daemon *d;
    Couple c;

    couple_paths(&c);
    text_format(head, sizeof(head), "channel unix-connect:%s:-\n"
                "oforward s:127.0.0.1:0\n", c.channel);
    write_file("conf", "%s", head);
    d = daemon_start("host", "-C %s/conf -m %s", vp_dir, c.monitor[0]);
    couple_guest(&c);
    text_format(where[0], TEXT_LEN, "%s", daemon_listens(d, "s"));
    through(where[0], c.listener, fds[0]);
    reload(d, "%schannel unix-listen:%s/second:-:2\noforward t:127.0.0.1:0:2\n"
           "verbose\n", head, vp_dir);
    daemon_start("third", "-c unix-connect:%s/second:- -i t:%s --grace 1000",
                 vp_dir, c.target);
    daemon_wait(d, "ch2: channel up");
    ck_assert_int_eq(execute(c.monitor[0], "info status -k"), 0);
    ck_assert_str_eq(value(executed(1), "log"), "verbose");
    text_format(where[1], TEXT_LEN, "%s", daemon_listens(d, "t"));
    through(where[1], c.listener, fds[1]);
    talk(fds[0]);
    talk(fds[1]);
    reload(d, "%s", head);
    expect_reset(fds[1][0]);
    expect_reset(fds[1][1]);
    check_refused(where[1]);
    talk(fds[0]);
    check_works(where[0], c.listener);
    reload(d, "channel unix-connect:%s:-:1\n", c.channel);
    ck_assert_int_eq(execute(c.monitor[0], "info status -k"), 0);
    ck_assert_str_eq(value(executed(1), "log"), "info");
    expect_reset(fds[0][0]);
    for (int i = 0; i < 2; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    daemon_wait(d, "ch1: channel up");
}
END_TEST

/* Without an init file, SIGHUP changes nothing but the log. */
START_TEST(reload_nothing)
{
    char *before, *after;
    int fds[2], mon;
    Couple c;

    couple_start(&c, "-o r:127.0.0.1:0");
    mon = monitor_batch(c.monitor[0]);
    through(c.where, c.listener, fds);
    monitor_ask(mon, "oforward_add q:127.0.0.1:0");
    before = monitor_state(mon);
    for (int i = 0; i < 5; i++) {
        daemon_mark(c.daemon[0]);
        kill(c.daemon[0]->pid, SIGHUP);
        daemon_wait(c.daemon[0], " info reloaded");
        talk(fds);
    }
    after = monitor_state(mon);
    ck_assert_str_eq(before, after);
    free(before);
    free(after);
    close(mon);
    close(fds[0]);
    close(fds[1]);
}
END_TEST

/* thousands_write() - so many iforwards of a channel, and what else there is */
static void thousands_write(int n, const char *more)
{
    char path[PATH_LEN];
    FILE *f;

    file_path(path, "conf");
    f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fprintf(f, "channel unix-listen:%s/ch:-\niforward e:%s/echo:-\n", vp_dir,
            vp_dir);
    for (int i = 0; i < n; i++) {
        fprintf(f, "iforward t%d:/nowhere:-\n", i);
    }
    fputs(more, f);
    ck_assert_int_eq(fclose(f), 0);
}

/*
 * 10,000 forwards cost next to nothing at the start and at a reload that leaves
 * them there; one that removes them all doesn't hold up who is connected.
 */
START_TEST(reload_thousands)
{
    char path[PATH_LEN], more[TEXT_LEN];
    int listener, fds[2], talks = 0;
    Daemon *d, *other;
    int64_t cpu;

    thousands_write(10000, "");
    file_path(path, "echo");
    listener = listen_on(path, 5);
    d = daemon_start("many", "-C %s/conf", vp_dir);
    daemon_wait(d, "listening on");
    other = daemon_start("other", "-c unix-connect:%s/ch:- -o e:127.0.0.1:0",
                         vp_dir);
    daemon_up(other);
    through(daemon_listens(other, "e"), listener, fds);
    talk(fds);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "info reloaded");
    cpu = daemon_cpu_ms(d);
    ck_assert_msg(cpu < 2000, "%lld ms", (long long)cpu);

    text_format(more, sizeof(more), "oforward last:%s/last:-\n", vp_dir);
    thousands_write(0, more);
    file_path(path, "last");
    kill(d->pid, SIGHUP);
    while (access(path, F_OK) < 0) {
        talk(fds);
        talks++;
    }
    /* in one piece it would take them all between two answers */
    ck_assert_msg(talks > 2, "%d answers while 10,000 forwards went", talks);
    close(fds[0]);
    close(fds[1]);
    close(listener);
}
END_TEST

/* key_guest() - start the guest with that key; the channel is up or isn't */
static void key_guest(Couple *c, const char *options, bool fits)
{
    daemon_mark(c->daemon[0]);
    c->daemon[1] = daemon_start("guest", "-c unix-connect:%s:- -i s:%s %s",
                                c->channel, c->target, options);
    if (fits) {
        daemon_up(c->daemon[0]);
        check_works(c->where, c->listener);
    } else {
        daemon_wait(c->daemon[0], "key");
        ck_assert(!daemon_saw(c->daemon[0], "channel up"));
    }
    daemon_stop(c->daemon[1]);
}

/* Another key, no key, a key that is none: the next guest is asked for it. */
START_TEST(reload_key)
{
    char head[4 * TEXT_LEN], key[2][TEXT_LEN];
    Daemon *d;
    Couple c;

    couple_paths(&c);
    for (int i = 0; i < 2; i++) {
        text_format(key[i], TEXT_LEN, "-k %s/%s", vp_dir, i ? "b" : "a");
        key_write(i ? "b" : "a", i ? "the second of the keys" :
                  "the first of the keys", geteuid());
    }
    text_format(head, sizeof(head), "channel unix-listen:%s:-\n"
                "oforward s:127.0.0.1:0\n", c.channel);
    key_write("key", "the first of the keys", geteuid());
    write_file("conf", "%skey %s/key\n", head, vp_dir);
    d = c.daemon[0] = daemon_start("host", "-C %s/conf", vp_dir);
    text_format(c.where, TEXT_LEN, "%s", daemon_listens(d, "s"));
    key_guest(&c, key[0], true);
    key_write("key", "the second of the keys", geteuid());
    reload(d, "%skey %s/key\n", head, vp_dir);
    key_guest(&c, key[0], false);
    key_guest(&c, key[1], true);
    key_write("key", "too short", geteuid());
    reload(d, "%skey %s/key\n", head, vp_dir);
    ck_assert(daemon_saw(d, "nothing reloaded: .*/key': expected at least"));
    key_guest(&c, key[1], true);
    reload(d, "%skey %s/gone\n", head, vp_dir);
    ck_assert(daemon_saw(d, "nothing reloaded: .*/gone': No such file"));
    key_guest(&c, key[1], true);
    reload(d, "%s", head);
    key_guest(&c, "", true);
}
END_TEST

/* A session keeps the key that it was made with; the next one has the new. */
START_TEST(reload_key_in_session)
{
    static const char old[] = "the first of the keys";
    static const char new[] = "the second of the keys";
    char path[2][PATH_LEN], mon[2][PATH_LEN], target[TEXT_LEN], where[TEXT_LEN];
    int listener = listen_any(target), fds[2];
    Daemon *d[2];
    Channel ch;

    channel_make(&ch, CHANNEL_CABLE, "channel");
    for (int i = 0; i < 2; i++) {
        key_write(i ? "kb" : "ka", old, geteuid());
        file_path(path[i], i ? "kb" : "ka");
        file_path(mon[i], i ? "mb" : "ma");
        d[i] = daemon_start(i ? "guest" : "host", "-c %s -k %s -m %s -%c s:%s",
                            ch.option[i], path[i], mon[i], i ? 'i' : 'o',
                            i ? target : "127.0.0.1:0");
    }
    daemon_up(d[0]);
    daemon_up(d[1]);
    text_format(where, TEXT_LEN, "%s", daemon_listens(d[0], "s"));
    through(where, listener, fds);

    /* Changed at one end: the session goes on, over another channel as well */
    daemon_mark(d[0]);
    key_write("ka", new, geteuid());
    kill(d[0]->pid, SIGHUP);
    daemon_wait(d[0], "info reloaded");
    talk(fds);
    relay_tell(&ch.relay, RELAY_CUT);
    daemon_wait(d[0], "channel up: session resumed");
    talk(fds);

    /* The next one takes the new key at both ends; nobody waits for --grace */
    daemon_mark(d[1]);
    text_format(target, sizeof(target), "channel_del %s", ch.option[0]);
    ck_assert_int_eq(execute(mon[0], target), 0);
    daemon_wait(d[1], "the other end ends the session");
    text_format(target, sizeof(target), "channel_add %s", ch.option[0]);
    ck_assert_int_eq(execute(mon[0], target), 0);
    daemon_wait(d[1], "the other end has a different key");
    key_write("kb", new, geteuid());
    kill(d[1]->pid, SIGHUP);
    daemon_up(d[1]);
    close(fds[0]);
    close(fds[1]);
    close(listener);
}
END_TEST

/* With -u, root's key is kept at SIGHUP and USER's own is read again. */
START_TEST(reload_key_as_user)
{
    char head[4 * TEXT_LEN], key[2][TEXT_LEN];
    const bool own = _i;
    Daemon *d;
    Couple c;

    if (geteuid() != 0) {
        PASS_OVER("root, who can become another user");
    }
    couple_paths(&c);
    for (int i = 0; i < 2; i++) {
        text_format(key[i], TEXT_LEN, "-k %s/%s", vp_dir, i ? "b" : "a");
        key_write(i ? "b" : "a", i ? "the second of the keys" :
                  "the first of the keys", 0);
    }
    text_format(head, sizeof(head), "channel unix-listen:%s:-\nuser %s\n"
                "oforward s:127.0.0.1:0\nkey %s/key\n", c.channel,
                own ? "65534" : "nobody", vp_dir);
    key_write("key", "the first of the keys", own ? NOBODY : 0);
    write_file("conf", "%s", head);
    d = c.daemon[0] = daemon_start("host", "-C %s/conf", vp_dir);
    text_format(c.where, TEXT_LEN, "%s", daemon_listens(d, "s"));
    key_guest(&c, key[0], true);
    key_write("key", "the second of the keys", own ? NOBODY : 0);
    reload(d, "%soforward more:127.0.0.1:0\n", head);
    daemon_listens(d, "more");
    ck_assert_int_eq(daemon_count(d, "warn .*/key': Permission denied: the old "
                                  "one stays"), !own);
    key_guest(&c, key[own], true);
    key_guest(&c, key[!own], false);
    head[strlen(head) - 1] = 's';       /* a key it never had isn't forgiven */
    key_write("keys", "the second of the keys", 0);
    reload(d, "%s\n", head);
    ck_assert(daemon_saw(d, "nothing reloaded: .*/keys': Permission denied"));
    key_guest(&c, key[own], true);
}
END_TEST

/* The pid file is the one of the start, whatever the init file says later. */
START_TEST(reload_pid_file)
{
    char *before;
    Daemon *d;

    write_file("conf", "channel unix-listen:%s/channel:-\npidfile %s/pid\n",
               vp_dir, vp_dir);
    before = files();
    d = daemon_start("host", "-C %s/conf", vp_dir);
    daemon_wait(d, "listening");
    reload(d, "channel unix-listen:%s/channel:-\n%s", vp_dir,
           _i ? "pidfile /nonexistent/pid\n" : "");
    ck_assert_int_eq(pid_in("pid"), d->pid);
    daemon_stop(d);
    check_files(before);
}
END_TEST

/* --- what is in force --------------------------------------------------- */

/* dump() - what --dump-config prints into vp_dir/name */
static void dump(const char *name, const char *options)
{
    command_wait(command_start("dump", "%s %s --dump-config >%s/%s",
                               vp_program, options, vp_dir, name));
}

/* --dump-config makes an init file of it all, which means the same. */
START_TEST(dump_config)
{
    static const char *const lines[] = {
        "channel unix-listen:%s/channel:-:7\n", "channel fd:0:-\n",
        "oforward s:%s/with blanks in it:-:7\n", "oforward http:[::1]:0\n",
        "iforward qga:%s/qga:-\n", "grace 5\n", "max-conns 77\n",
        "monitor %s/monitor\n", "logfile %s/x.log\n", "pidfile %s/pid\n",
        "user nobody\n", "daemonize\n", "verbose\n",
    };
    char options[4 * TEXT_LEN], line[TEXT_LEN], *first, *before;

    write_file("conf", "channel unix-listen:%s/channel:-:7\ngrace 6\n"
               "  oforward s:%s/with blanks in it:-:7  \n\t\n#x\n"
               "max-conns 77\nmonitor /elsewhere\nuser nobody\ndaemonize\n"
               "verbose\niforward qga:%s/qga:-", vp_dir, vp_dir, vp_dir);
    text_format(options, sizeof(options), "-C %s/conf -c fd:0:- --grace 5 -m "
                "%s/monitor --logfile %s/x.log -f %s/pid -o http:[::1]:0",
                vp_dir, vp_dir, vp_dir, vp_dir);
    before = files();
    dump("dumped", options);
    first = strdup(file_text("dumped"));
    for (int i = 0; i < COUNT_OF(lines); i++) {
        expand(line, sizeof(line), lines[i]);
        ck_assert_msg(strstr(first, line) != NULL, "no %s in:\n%s", line,
                      first);
    }
    text_format(options, sizeof(options), "-C %s/dumped", vp_dir);
    dump("again", options);
    ck_assert_str_eq(file_text("again"), first);
    free(first);
    file_path(line, "dumped");
    ck_assert(unlink(line) == 0);
    file_path(line, "again");
    ck_assert(unlink(line) == 0);
    check_files(before);                /* nothing else was made */
}
END_TEST

/* A file from Windows means what it would mean here. */
START_TEST(windows_config)
{
    static const char text[] = "\xef\xbb\xbf" "channel unix-listen:/x:-\r\n"
        "\r\n# comment\r\n\tgrace 5 \r\nverbose\r\nmonitor /x/m\r";
    char path[PATH_LEN], options[TEXT_LEN];

    file_path(path, "conf");
    file_write(path, text, strlen(text));
    text_format(options, sizeof(options), "-C %s", path);
    dump("first", options);
    dump("second", "-c unix-listen:/x:- --grace 5 -v -m /x/m");
    text_format(options, sizeof(options), "%s", file_text("second"));
    ck_assert_str_eq(file_text("first"), options);
}
END_TEST

static const char *const long_kinds[] = { "virtserial-open", "isaserial-open" };

/* However long a value is, it is shown and read back whole, or refused. */
START_TEST(long_values)
{
    static char name[4100], options[5000], expected[5000], *first;
    const char *const args[] = { "-C", "conf", NULL };
    const size_t fits = 4000 - strlen(long_kinds[_i]) - strlen("::-:65535");
    const StartOptions none = { 0 };
    char monitor[PATH_LEN];
    int mon;
    Daemon *d;

    ck_assert(chdir(vp_dir) == 0);
    memset(name, '%', fits);
    name[0] = '/';
    command_wait(command_start("long", "test \"$(%s -c '%s:/'$(head -c %zu "
        "/dev/zero | tr '\\0' %%)':-:65535' 2>&1 | grep -o 'too long')\" = "
        "'too long'", vp_program, long_kinds[_i], fits));
    file_path(monitor, "monitor");
    snprintf(expected, sizeof(expected), "channel %s:%s:-:65535\n",
             long_kinds[_i], name);
    file_write("conf", expected, strlen(expected));
    command_wait(command_start("dump", "%s -C conf -m %s -l $(head -c 4000 "
        "/dev/zero | tr '\\0' l) --dump-config >dumped", vp_program, monitor));
    first = strdup(file_text("dumped"));
    ck_assert_ptr_nonnull(strstr(first, expected));
    command_wait(command_start("again", "%s -C dumped --dump-config >again",
                               vp_program));
    ck_assert_str_eq(file_text("again"), first);

    snprintf(options, sizeof(options), "monitor %s\n%s", monitor, expected);
    file_write("conf", options, strlen(options));
    d = daemon_start_args(&none, "host", args);
    mon = monitor_batch(monitor);
    ck_assert_ptr_nonnull(strstr(monitor_ask(mon, "info config"), expected));
    ck_assert_ptr_nonnull(strstr(monitor_ask(mon, "info channels"), name));
    /* each '%' is %25 there */
    ck_assert_uint_ge(strlen(monitor_ask(mon, "info channels -k")), 3 * fits);
    daemon_stop(d);
    close(mon);
    free(first);
}
END_TEST

static const char *const stdout_options[] = {
    "-c fd:0:- --dump-config", "-V", "-h", "-m %s -x help",
};

/* What can't be printed is no success. */
START_TEST(full_stdout)
{
    char text[TEXT_LEN];
    Couple c;

    couple_start(&c, "");
    text_format(text, sizeof(text), "%s", stdout_options[_i]);
    if (strstr(text, "%s") != NULL) {
        text_format(text, sizeof(text), "-m %s -x help", c.monitor[0]);
    }
    command_wait(command_start("full", "%s %s >/dev/full; test $? = 1",
                               vp_program, text));
    ck_assert_ptr_nonnull(strstr(file_text("full.log"),
                                 "cannot write: No space"));
}
END_TEST

/* A daemon that runs from what another's monitor shows is the same. */
START_TEST(info_config)
{
    char *first;
    int mon;
    Daemon *d;
    Couple c;

    couple_start(&c, "-o r:127.0.0.1:0 --grace 7 -v");
    mon = monitor_batch(c.monitor[0]);
    monitor_ask(mon, "oforward_add added:%s/added:-", vp_dir);
    monitor_ask(mon, "oforward_del r:127.0.0.1:0");
    first = strdup(monitor_ask(mon, "info config"));
    close(mon);
    daemon_stop(c.daemon[0]);
    write_file("conf", "%s", first);
    d = daemon_start("host", "-C %s/conf", vp_dir);
    check_works(daemon_listens(d, "s"), c.listener);
    mon = monitor_batch(c.monitor[0]);
    ck_assert_str_eq(monitor_ask(mon, "info config"), first);
    close(mon);
    free(first);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("init");

    SUITE_ADD(s, daemonize);
    SUITE_LOOP(s, bad_start, 2 * COUNT_OF(bad_starts));
    SUITE_LOOP(s, bad_start_tty, 2);
    SUITE_ROWS(s, bad_usage, usages);
    SUITE_ADD(s, pid_file);
    SUITE_ADD(s, pid_file_unseen);
    SUITE_ADD(s, pid_file_replaced);
    SUITE_ADD(s, no_dev_null);
    SUITE_ADD(s, starters_descriptors);
    SUITE_ADD(s, starters_high_descriptor);
    SUITE_ADD(s, process_one);
    SUITE_LOOP(s, closed_stdio, 2 * COUNT_OF(closed_fds));
    SUITE_LOOP(s, inherited_stdio, 3);
    SUITE_ADD(s, inherited_end);
    SUITE_ADD(s, inherited_flush);
    SUITE_LOOP(s, open_to_others, 2);
    SUITE_ADD(s, socket_rights);
    SUITE_ADD(s, group_known);
    SUITE_ADD(s, group_many);
    SUITE_ADD(s, group_unanswered);
    SUITE_ADD(s, socket_owner);
    SUITE_ADD(s, proxy);
    SUITE_ADD(s, sockets_removed);
    SUITE_ADD(s, log_stays);
    SUITE_ADD(s, pid_file_link);
    SUITE_ADD(s, log_file);
    SUITE_ADD(s, log_moves);
    SUITE_ADD(s, log_fifo);
    SUITE_ROWS(s, log_nowhere, no_logs);
    SUITE_LOOP(s, log_limit, 2);
    SUITE_ADD(s, log_torn);
    SUITE_LOOP(s, pid_file_limit, 2);
    SUITE_LOOP(s, log_journal, 2);
    SUITE_LOOP(s, log_syslog, 2);
    SUITE_ADD(s, log_no_syslog);
    SUITE_ADD(s, log_syslog_hangs);
    SUITE_ADD(s, log_syslog_stream);
    SUITE_ROWS(s, drop_user, new_users);
    SUITE_ADD(s, user_cleans_up);
    SUITE_LOOP(s, notices, 4);
    SUITE_ADD(s, no_notices);
    SUITE_ADD(s, notices_unread);
    SUITE_LOOP(s, inherited_signals, 2);
    SUITE_ADD(s, background_job);
    SUITE_ROWS(s, status_signal, quiet_options);
    SUITE_LOOP(s, flush, 2);
    SUITE_LOOP(s, flush_in_vain, 2);
    SUITE_ADD(s, refused_at_end);
    SUITE_ROWS(s, bad_config, bad_lines);
    SUITE_LOOP(s, odd_config, 2);
    SUITE_ROWS(s, bad_setting, bad_settings);
    SUITE_ADD(s, bad_reload);
    SUITE_ADD(s, reload_changes);
    SUITE_ADD(s, reload_pipe);
    SUITE_ADD(s, reload_says);
    SUITE_ADD(s, reload_restart);
    SUITE_ADD(s, reload_adds_key);
    SUITE_ADD(s, reload_channels);
    SUITE_ADD(s, reload_nothing);
    SUITE_ADD(s, reload_thousands);
    SUITE_ADD(s, reload_key);
    SUITE_ADD(s, reload_key_in_session);
    SUITE_LOOP(s, reload_key_as_user, 2);
    SUITE_LOOP(s, reload_pid_file, 2);
    SUITE_ADD(s, dump_config);
    SUITE_ADD(s, windows_config);
    SUITE_ROWS(s, long_values, long_kinds);
    SUITE_ROWS(s, full_stdout, stdout_options);
    SUITE_ADD(s, info_config);
    return harness_run(s);
}
