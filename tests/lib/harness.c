/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * harness.c - see harness.h
 *
 * Two processes matter.  main() runs in the first: it makes a directory for the
 * suite, hands over to libcheck, and afterwards prints the logs of the tests
 * that failed.  Each test runs in a child that libcheck forks; test_begin() and
 * test_end() run there, before and after the test.  A test that fails exits
 * without test_end(): libcheck then kills the child's process group, to which
 * everything belongs that the test started, but for daemons in the background
 * (see guard()).
 */
#define _XOPEN_SOURCE 700

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <regex.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"
#include "manual.h"

#define MAX_DAEMONS 256        /* in one test, each restart counted */
#define MAX_CHILDREN 64
#define MAX_ARGS 64
#define NOBODY 65534
#define LOG_LINES 25            /* printed of a failed test's log */
#define IDLE_WALL_MS 2000
#define IDLE_CPU_MS 150

char vp_dir[PATH_LEN];
char vp_program[1024];

static char root_dir[PATH_LEN]; /* path; has each test's vp_dir */
static Daemon daemons[MAX_DAEMONS];
static size_t n_daemons;
static pid_t children[MAX_CHILDREN];
static size_t n_children;

/* ------------------------------------------------------------------------ */
/* Time, text, files                                                        */
/* ------------------------------------------------------------------------ */

int64_t now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    struct timespec ts = { ms / 1000, (long)(ms % 1000) * 1000000 };

    while (nanosleep(&ts, &ts) < 0 && errno == EINTR) {
    }
}

static void text_vformat(char *buf, size_t len, const char *fmt, va_list ap)
    __attribute__((format(printf, 3, 0)));

static void text_vformat(char *buf, size_t len, const char *fmt, va_list ap)
{
    int n = vsnprintf(buf, len, fmt, ap);

    if (n < 0 || (size_t)n >= len) {
        ck_abort_msg("text does not fit: %s", buf);
    }
}

void text_format(char *buf, size_t len, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    text_vformat(buf, len, fmt, ap);
    va_end(ap);
}

void file_path(char *path, const char *name)
{
    text_format(path, PATH_LEN, "%s/%s", vp_dir, name);
}

void file_write(const char *path, const void *data, size_t len)
{
    FILE *f = fopen(path, "w");

    ck_assert_msg(f && fwrite(data, 1, len, f) == len && fclose(f) == 0,
                  "%s: %s", path, strerror(errno));
}

/* file_text() - returns a file's text from an offset on; the caller frees it */
static char *file_text(const char *path, off_t from)
{
    FILE *f = fopen(path, "r");
    struct stat st;
    char *text;
    size_t len = 0;

    if (!f || fstat(fileno(f), &st) < 0 || fseeko(f, from, SEEK_SET) < 0) {
        ck_abort_msg("%s: %s", path, strerror(errno));
    }
    text = malloc((size_t)st.st_size + 1);
    ck_assert_ptr_nonnull(text);
    if (st.st_size > from) {
        len = fread(text, 1, (size_t)(st.st_size - from), f);
    }
    text[len] = '\0';
    fclose(f);
    return text;
}

void file_wait(const char *name, const char *text)
{
    int64_t end = now_ms() + WAIT_MS;
    char path[PATH_LEN];
    bool found = false;

    file_path(path, name);
    while (!found) {
        ck_assert_msg(now_ms() < end, "%s: no \"%s\"", path, text);
        if (access(path, R_OK) == 0) {
            char *all = file_text(path, 0);

            found = strstr(all, text) != NULL;
            free(all);
        }
        sleep_ms(10);
    }
}

pid_t pid_in(const char *name)
{
    char path[PATH_LEN], *text, *end;
    long pid;

    file_path(path, name);
    text = file_text(path, 0);
    pid = strtol(text, &end, 10);
    ck_assert_msg(pid > 1 && strcmp(end, "\n") == 0, "%s: '%s'", path, text);
    free(text);
    return (pid_t)pid;
}

/* ------------------------------------------------------------------------ */
/* Processes                                                                */
/* ------------------------------------------------------------------------ */

/* wait_for() - wait ms at most for a child to end; false if it still runs */
static bool wait_for(pid_t pid, int ms, int *status)
{
    int64_t end = now_ms() + ms;
    pid_t got;

    while ((got = waitpid(pid, status, WNOHANG)) == 0) {
        if (now_ms() >= end) {
            return false;
        }
        sleep_ms(5);
    }
    ck_assert_msg(got == pid, "waitpid %d: %s", (int)pid, strerror(errno));
    return true;
}

static void redirect(const char *log)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    dup2(fd, 0);
    fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    dup2(fd, 1);
    dup2(fd, 2);
}

/* pass_listeners() - what systemd does before it starts a service */
static void pass_listeners(const StartOptions *o)
{
    int copy[COUNT_OF(o->listen_fds)];
    char text[16];

    for (int i = 0; i < o->n_listen_fds; i++) {
        copy[i] = fcntl(o->listen_fds[i], F_DUPFD_CLOEXEC, 100);
    }
    for (int i = 0; i < o->n_listen_fds; i++) {
        dup2(copy[i], 3 + i);
    }
    snprintf(text, sizeof(text), "%d", o->n_listen_fds);
    setenv("LISTEN_FDS", text, 1);
    snprintf(text, sizeof(text), "%d",
             o->listen_others ? (int)getppid() : (int)getpid());
    setenv("LISTEN_PID", text, 1);
    if (o->listen_names) {
        setenv("LISTEN_FDNAMES", o->listen_names, 1);
    }
}

/* run_daemon() - become the daemon; runs in the forked child */
static void run_daemon(const StartOptions *o, const char *log, char **argv)
{
    struct rlimit limit;
    char script[4 * TEXT_LEN];
    char *wrapped[MAX_ARGS + 8];
    size_t n = 0;

    signal(SIGPIPE, SIG_DFL);   /* else the test's SIG_IGN is inherited */
    redirect(log);
    if (o->keep_fd > 0) {
        fcntl(o->keep_fd, F_SETFD, 0);
    }
    if (o->n_listen_fds > 0) {
        pass_listeners(o);
    }
    if (o->nofile > 0) {
        limit.rlim_cur = limit.rlim_max = (rlim_t)o->nofile;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (o->nobody && geteuid() == 0 &&
        (setgid(NOBODY) < 0 || setuid(NOBODY) < 0)) {
        dprintf(2, "setuid: %s\n", strerror(errno));
        _exit(127);
    }
    if (!o->setup) {
        execv(argv[0], argv);
    } else {
        /* -r maps the user to root, because only root may mount. */
        text_format(script, sizeof(script), "%s && exec \"$@\"", o->setup);
        wrapped[n++] = "unshare";
        wrapped[n++] = geteuid() == 0 ? "-m" : "-rm";
        wrapped[n++] = "sh";
        wrapped[n++] = "-c";
        wrapped[n++] = script;
        wrapped[n++] = "sh";
        do {
            wrapped[n++] = *argv;
        } while (*argv++);
        execvp(wrapped[0], wrapped);
    }
    dprintf(2, "cannot run %s: %s\n", o->setup ? wrapped[0] : argv[0],
            strerror(errno));
    _exit(127);
}

bool may_mount(void)
{
    int status = child_wait(command_start("may-mount",
        "unshare %s sh -c 'mount -n -t tmpfs none /tmp'",
        geteuid() == 0 ? "-m" : "-rm"));

    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool may_mount_hosts(void)
{
    return may_mount() && access("/etc/hosts", F_OK) == 0;
}

bool has_localhost(void)
{
    struct addrinfo *info;

    if (getaddrinfo("localhost", NULL, NULL, &info) != 0) {
        return false;
    }
    freeaddrinfo(info);
    return true;
}

bool has_ipv6(void)
{
    struct sockaddr_in6 in6 = { .sin6_family = AF_INET6,
                                .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    bool has = fd >= 0 && bind(fd, (struct sockaddr *)&in6, sizeof(in6)) == 0;

    if (fd >= 0) {
        close(fd);
    }
    return has;
}

Daemon *daemon_start_args(const StartOptions *o, const char *name,
                          const char *const args[])
{
    char *argv[MAX_ARGS] = { vp_program };
    char *guests = getenv("QEMU_VP_GUEST");
    char copy[PATH_LEN];
    Daemon *d;

    ck_assert(n_daemons < MAX_DAEMONS);
    d = &daemons[n_daemons++];
    memset(d, 0, sizeof(*d));
    text_format(d->name, sizeof(d->name), "%zu-%s", n_daemons, name);
    text_format(d->log, sizeof(d->log), "%s/%s.log", vp_dir, d->name);
    d->inherited = o->keep_fd > 0;
    for (size_t i = 0; args[i]; i++) {
        ck_assert(i + 2 < MAX_ARGS);
        argv[i + 1] = (char *)args[i];  /* execv() doesn't change it */
    }

    file_write(d->log, "", 0);
    if (guests && strcmp(name, "guest") == 0) {
        argv[0] = guests;
    } else if (o->nobody) {     /* because nobody can't read the tree */
        file_path(copy, "qemu-vp");
        command_wait(command_start("copy", "cp %s %s", vp_program, copy));
        argv[0] = copy;
    }
    d->pid = fork();
    ck_assert(d->pid >= 0);
    if (d->pid == 0) {
        run_daemon(o, d->log, argv);
    }
    return d;
}

static Daemon *daemon_vstart(const StartOptions *o, const char *name,
                             const char *fmt, va_list ap)
    __attribute__((format(printf, 3, 0)));

static Daemon *daemon_vstart(const StartOptions *o, const char *name,
                             const char *fmt, va_list ap)
{
    char text[8 * TEXT_LEN];
    const char *args[MAX_ARGS] = { NULL };
    size_t n = 0;
    char *save = NULL;

    text_vformat(text, sizeof(text), fmt, ap);
    for (char *arg = strtok_r(text, " ", &save); arg;
         arg = strtok_r(NULL, " ", &save)) {
        ck_assert(n + 2 < MAX_ARGS);
        args[n++] = arg;
    }
    return daemon_start_args(o, name, args);
}

Daemon *daemon_start(const char *name, const char *fmt, ...)
{
    const StartOptions none = { 0 };
    Daemon *d;
    va_list ap;

    va_start(ap, fmt);
    d = daemon_vstart(&none, name, fmt, ap);
    va_end(ap);
    return d;
}

Daemon *daemon_start_with(const StartOptions *options, const char *name,
                          const char *fmt, ...)
{
    Daemon *d;
    va_list ap;

    va_start(ap, fmt);
    d = daemon_vstart(options, name, fmt, ap);
    va_end(ap);
    return d;
}

/*
 * guard() - fork a process that kills pid if the test ends without test_end()
 *
 * It is needed because libcheck kills only the test's own process group.
 */
static void guard(pid_t pid)
{
    int fds[2];
    pid_t guardian;
    char c;

    ck_assert(pipe(fds) == 0);
    guardian = fork();
    ck_assert(guardian >= 0);
    if (guardian == 0) {
        setsid();
        child_fds(&fds[0], 1);
        if (read(fds[0], &c, 1) == 0) {
            kill(pid, SIGKILL);
        }
        _exit(0);
    }
    child_add(guardian);
    close(fds[0]);
    fcntl(fds[1], F_SETFD, FD_CLOEXEC);
}

void daemons_adopt(void)
{
    ck_assert(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
}

Daemon *daemon_adopted(const char *name, pid_t pid, const char *log)
{
    Daemon *d;

    ck_assert(n_daemons < MAX_DAEMONS);
    d = &daemons[n_daemons++];
    memset(d, 0, sizeof(*d));
    text_format(d->name, sizeof(d->name), "%zu-%s", n_daemons, name);
    text_format(d->log, sizeof(d->log), "%s", log);
    d->pid = pid;
    guard(pid);
    return d;
}

/* daemon_text() - returns the log's whole lines from d->mark on, to be freed */
static char *daemon_text(const Daemon *d)
{
    char *text = file_text(d->log, d->mark);
    char *last = strrchr(text, '\n');

    if (last) {
        last[1] = '\0';
    } else {
        text[0] = '\0';
    }
    return text;
}

char *daemon_all(const Daemon *d)
{
    return file_text(d->log, 0);
}

static void compile(regex_t *re, const char *regex)
{
    ck_assert_msg(regcomp(re, regex, REG_EXTENDED | REG_NEWLINE) == 0,
                  "bad regex: %s", regex);
}

/* daemon_find() - whether a line matches; copies its group 1 to group */
static bool daemon_find(const Daemon *d, const char *regex, char *group,
                        size_t len)
{
    char *text = daemon_text(d);
    regmatch_t match[2];
    regex_t re;
    bool found;

    compile(&re, regex);
    found = regexec(&re, text, 2, match, 0) == 0;
    if (found && group) {
        text_format(group, len, "%.*s", (int)(match[1].rm_eo - match[1].rm_so),
                    text + match[1].rm_so);
    }
    regfree(&re);
    free(text);
    return found;
}

bool daemon_saw(const Daemon *d, const char *regex)
{
    return daemon_find(d, regex, NULL, 0);
}

int daemon_count(const Daemon *d, const char *regex)
{
    char *text = daemon_text(d);
    char *save = NULL;
    regex_t re;
    int count = 0;

    compile(&re, regex);
    for (char *line = strtok_r(text, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        count += regexec(&re, line, 0, NULL, 0) == 0;
    }
    regfree(&re);
    free(text);
    return count;
}

/* daemon_reap() - wait ms at most for the daemon to end; true if it has */
static bool daemon_reap(Daemon *d, int ms)
{
    if (d->pid && wait_for(d->pid, ms, &d->status)) {
        d->pid = 0;
    }
    return d->pid == 0;
}

static void daemon_wait_group(Daemon *d, const char *regex, char *group,
                              size_t len)
{
    int64_t end = now_ms() + WAIT_MS;
    bool ended;

    do {
        ended = daemon_reap(d, 0);      /* before the log is read, else its last
                                           lines could be missed */
        if (daemon_find(d, regex, group, len)) {
            return;
        }
        if (ended) {
            ck_abort_msg("%s ended (status %#x) before it logged: %s",
                         d->name, (unsigned)d->status, regex);
        }
        sleep_ms(5);
    } while (now_ms() < end);
    ck_abort_msg("%s never logged: %s", d->name, regex);
}

void daemon_wait(Daemon *d, const char *fmt, ...)
{
    char regex[TEXT_LEN];
    va_list ap;

    va_start(ap, fmt);
    text_vformat(regex, sizeof(regex), fmt, ap);
    va_end(ap);
    daemon_wait_group(d, regex, NULL, 0);
}

void daemon_mark(Daemon *d)
{
    struct stat st;

    ck_assert(stat(d->log, &st) == 0);
    d->mark = st.st_size;
}

const char *daemon_listens(Daemon *d, const char *service)
{
    static char where[8][TEXT_LEN];     /* the last 8 results, in turn */
    static size_t next;
    char regex[TEXT_LEN];
    char *result = where[next++ % 8];
    off_t mark = d->mark;

    text_format(regex, sizeof(regex), "oforward %s: listening on (.*)$",
                service);
    d->mark = 0;
    daemon_wait_group(d, regex, result, TEXT_LEN);
    d->mark = mark;
    return result;
}

void daemon_up(Daemon *d)
{
    daemon_wait(d, "channel up");
}

/* daemon_clean() - fail the test if the log has a sanitizer's report */
static void daemon_clean(Daemon *d)
{
    d->mark = 0;
    ck_assert_msg(!daemon_saw(d, "Sanitizer|runtime error:"),
                  "%s: a sanitizer complained", d->name);
}

void daemon_kill(Daemon *d)
{
    ck_assert_msg(!daemon_reap(d, 0), "%s had ended by itself, status %#x",
                  d->name, (unsigned)d->status);
    kill(d->pid, SIGKILL);
    ck_assert_msg(daemon_reap(d, WAIT_MS), "%s outlives SIGKILL", d->name);
    daemon_clean(d);
}

int daemon_exit(Daemon *d)
{
    ck_assert_msg(daemon_reap(d, WAIT_MS), "%s does not end", d->name);
    daemon_clean(d);
    ck_assert_msg(WIFEXITED(d->status), "%s died, status %#x", d->name,
                  (unsigned)d->status);
    return WEXITSTATUS(d->status);
}

void daemon_stop(Daemon *d)
{
    int status;

    ck_assert_msg(!daemon_reap(d, 0), "%s had ended by itself, status %#x",
                  d->name, (unsigned)d->status);
    kill(d->pid, SIGTERM);
    if (d->hurried) {
        daemon_wait(d, "ending on signal"); /* else two signals were one */
        if (!daemon_reap(d, 0)) {
            kill(d->pid, SIGTERM);
        }
    }
    status = daemon_exit(d);
    ck_assert_msg(status == 0, "%s: exit status %d after SIGTERM", d->name,
                  status);
}

int64_t daemon_cpu_us(const Daemon *d)
{
    struct timespec ts;
    clockid_t clock;

    ck_assert_msg(clock_getcpuclockid(d->pid, &clock) == 0 &&
                  clock_gettime(clock, &ts) == 0, "%s is gone", d->name);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

int64_t daemon_cpu_ms(const Daemon *d)
{
    return daemon_cpu_us(d) / 1000;
}

/* delay_us() - time that pid has waited for a processor, us; 0: unknown */
static int64_t delay_us(pid_t pid)
{
    unsigned long long ran, waited = 0;
    char path[64];
    FILE *f;

    text_format(path, sizeof(path), "/proc/%d/schedstat", (int)pid);
    f = fopen(path, "r");
    if (f) {                            /* else the kernel keeps no schedstat */
        if (fscanf(f, "%llu %llu", &ran, &waited) != 2) {
            waited = 0;
        }
        fclose(f);
    }
    return (int64_t)(waited / 1000);
}

int64_t undelayed_ms(Daemon *const d[], size_t n)
{
    int64_t delay = delay_us(getpid());

    for (size_t i = 0; i < n; i++) {
        delay += d[i] ? delay_us(d[i]->pid) : 0;
    }
    return now_ms() - delay / 1000;
}

int daemon_fds(const Daemon *d)
{
    char path[64];
    struct dirent *e;
    DIR *dir;
    int n = 0;

    text_format(path, sizeof(path), "/proc/%d/fd", (int)d->pid);
    dir = opendir(path);
    ck_assert_msg(dir != NULL, "%s is gone", d->name);
    while ((e = readdir(dir))) {
        n += e->d_name[0] != '.';
    }
    closedir(dir);
    return n;
}

void daemons_idle(Daemon *const d[], size_t n)
{
    int64_t used[MAX_DAEMONS];

    ck_assert(n <= MAX_DAEMONS);
    for (size_t i = 0; i < n; i++) {
        used[i] = daemon_cpu_ms(d[i]);
    }
    sleep_ms(IDLE_WALL_MS);
    for (size_t i = 0; i < n; i++) {
        used[i] = daemon_cpu_ms(d[i]) - used[i];
        ck_assert_msg(used[i] <= IDLE_CPU_MS,
                      "%s, with nothing to do, used %d ms of CPU in %d ms",
                      d[i]->name, (int)used[i], IDLE_WALL_MS);
    }
}

void child_add(pid_t pid)
{
    ck_assert(pid > 0 && n_children < MAX_CHILDREN);
    children[n_children++] = pid;
}

void child_fds(const int *keep, size_t n)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *e;
    int fds[1024];
    size_t n_fds = 0;

    while (dir && (e = readdir(dir)) && n_fds < 1024) {
        int fd = atoi(e->d_name);
        bool kept = fd <= 2 || fd == dirfd(dir);

        for (size_t i = 0; i < n; i++) {
            kept = kept || fd == keep[i];
        }
        if (!kept) {
            fds[n_fds++] = fd;
        }
    }
    closedir(dir);
    while (n_fds > 0) {
        close(fds[--n_fds]);
    }
}

pid_t command_start(const char *name, const char *fmt, ...)
{
    char command[4 * TEXT_LEN];
    char log[PATH_LEN];
    va_list ap;
    pid_t pid;

    va_start(ap, fmt);
    text_vformat(command, sizeof(command), fmt, ap);
    va_end(ap);
    text_format(log, sizeof(log), "%s/%s.log", vp_dir, name);
    pid = fork();
    ck_assert(pid >= 0);
    if (pid == 0) {
        signal(SIGPIPE, SIG_DFL);
        redirect(log);
        dprintf(2, "$ %s\n", command);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(126);
    }
    child_add(pid);
    return pid;
}

int child_wait(pid_t pid)
{
    int status;

    if (!wait_for(pid, 2 * WAIT_MS, &status)) {
        ck_abort_msg("a child hangs, see the logs");
    }
    for (size_t i = 0; i < n_children; i++) {
        if (children[i] == pid) {
            children[i] = children[--n_children];
        }
    }
    return status;
}

void command_wait(pid_t pid)
{
    int status = child_wait(pid);

    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0,
                  "a command failed, status %#x, see its log",
                  (unsigned)status);
}

/* ------------------------------------------------------------------------ */
/* The suite                                                                */
/* ------------------------------------------------------------------------ */

/*
 * test_begin() - make vp_dir, the first root_dir/N that there isn't
 *
 * test_end() empties it; print_logs() finds a failed test by its started.log.
 */
static void test_begin(void)
{
    char path[PATH_LEN];
    int nth = 0;

    do {
        text_format(vp_dir, sizeof(vp_dir), "%s/%d", root_dir, nth++);
    } while (mkdir(vp_dir, 0755) < 0 && errno == EEXIST);
    file_path(path, "started.log");
    file_write(path, "", 0);
    n_daemons = 0;
    n_children = 0;
}

static int remove_entry(const char *path, const struct stat *st, int type,
                        struct FTW *ftw)
{
    (void)st;
    (void)type;
    return ftw->level > 0 ? remove(path) : 0;
}

static void empty_directory(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static void test_end(void)
{
    int status;

    for (size_t i = 0; i < n_daemons; i++) {
        Daemon *d = &daemons[i];

        if (d->pid && d->inherited) {
            kill(d->pid, SIGTERM);
            ck_assert_int_le(daemon_exit(d), 1);
        } else if (d->pid) {
            daemon_stop(d);
        }
        manual_check(d->log);
    }
    for (size_t i = 0; i < n_children; i++) {
        kill(children[i], SIGKILL);
        wait_for(children[i], WAIT_MS, &status);
    }
    empty_directory(vp_dir);
}

Suite *harness_suite(const char *name)
{
    suite_set(TEST_TIMEOUT, test_begin, test_end);
    return suite_create(name);
}

/* print_logs() - print the last lines of the logs of tests that failed */
static void print_logs(TestResult **failures, int failed)
{
    char path[PATH_LEN + 32], command[4 * PATH_LEN];
    int i = 0;

    fflush(stdout);
    for (int nth = 0; nth < suite_planned() && i < failed; nth++) {
        snprintf(path, sizeof(path), "%s/%d/started.log", root_dir, nth);
        if (access(path, F_OK) == 0) {
            fprintf(stderr, "=== logs of a test that failed: %s\n",
                    tr_tcname(failures[i++]));
            snprintf(command, sizeof(command), "cd %s/%d && rm started.log && "
                     "tail -v -n %d *.log | cut -c 1-300 >&2", root_dir, nth,
                     LOG_LINES);
            if (system(command) != 0) {
                fprintf(stderr, "there are none\n");
            }
        }
    }
}

/*
 * find_program() - make vp_program a link to the daemon; false if there is none
 *
 * A link, because the source's path may have spaces, which shells split at.
 */
static bool find_program(void)
{
    const char *name = getenv("QEMU_VP");
    const char *top = getenv("VP_TOP");
    char text[1024], real[PATH_MAX];

    if (name) {
        snprintf(text, sizeof(text), "%s", name);
    } else {
        snprintf(text, sizeof(text), "%s/qemu-vp", top ? top : ".");
    }
    snprintf(vp_program, sizeof(vp_program), "%s/qemu-vp", root_dir);
    if (!realpath(text, real) || access(real, X_OK) < 0 ||
        symlink(real, vp_program) < 0) {
        fprintf(stderr, "%s: %s; build it, or name it in QEMU_VP\n", text,
                strerror(errno));
        return false;
    }
    return true;
}

int harness_run(Suite *suite)
{
    int status;

    snprintf(root_dir, sizeof(root_dir), "/tmp/vp-test.XXXXXX");
    if (!mkdtemp(root_dir) || chmod(root_dir, 0755) < 0) {
        perror(root_dir);
        return EXIT_FAILURE;
    }
    if (!find_program()) {
        rmdir(root_dir);
        return EXIT_FAILURE;
    }
    signal(SIGPIPE, SIG_IGN);
    setenv("LC_ALL", "C", 1);
    unsetenv("http_proxy");
    unsetenv("all_proxy");
    status = suite_run_with(suite, print_logs);
    empty_directory(root_dir);
    rmdir(root_dir);
    return status;
}

/* ------------------------------------------------------------------------ */
/* Sockets                                                                  */
/* ------------------------------------------------------------------------ */

typedef struct Address {
    struct sockaddr_storage ss;
    socklen_t len;
} Address;

static void address_parse(Address *a, const char *where)
{
    struct sockaddr_un *un = (struct sockaddr_un *)&a->ss;
    struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV,
                              .ai_socktype = SOCK_STREAM };
    struct addrinfo *info;
    char host[TEXT_LEN];
    char *colon;
    int error;

    memset(a, 0, sizeof(*a));
    if (where[0] == '/') {
        un->sun_family = AF_UNIX;
        text_format(un->sun_path, sizeof(un->sun_path), "%s", where);
        a->len = sizeof(*un);
        return;
    }
    if (where[0] == '@') {
        un->sun_family = AF_UNIX;
        text_format(un->sun_path + 1, sizeof(un->sun_path) - 1, "%s",
                    where + 1);
        a->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
                             strlen(where));
        return;
    }
    text_format(host, sizeof(host), "%s", where);
    colon = strrchr(host, ':');
    ck_assert_msg(colon != NULL, "no port in %s", where);
    *colon = '\0';
    if (host[0] == '[') {
        colon[-1] = '\0';
    }
    error = getaddrinfo(host + (host[0] == '['), colon + 1, &hints, &info);
    ck_assert_msg(error == 0, "%s: %s", where, gai_strerror(error));
    memcpy(&a->ss, info->ai_addr, info->ai_addrlen);
    a->len = info->ai_addrlen;
    freeaddrinfo(info);
}

/* socket_for() - returns a close-on-exec stream socket for an address */
static int socket_for(const Address *a)
{
    int fd = socket(a->ss.ss_family, SOCK_STREAM, 0);

    ck_assert_msg(fd >= 0, "socket: %s", strerror(errno));
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

int listen_on(const char *where, int backlog)
{
    Address a;
    int one = 1;
    int fd;

    address_parse(&a, where);
    fd = socket_for(&a);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    ck_assert_msg(bind(fd, (struct sockaddr *)&a.ss, a.len) == 0 &&
                  listen(fd, backlog) == 0, "%s: %s", where, strerror(errno));
    return fd;
}

int listen_any(char *where)
{
    struct sockaddr_in in;
    socklen_t len = sizeof(in);
    int fd = listen_on("127.0.0.1:0", SOMAXCONN);

    ck_assert(getsockname(fd, (struct sockaddr *)&in, &len) == 0);
    text_format(where, TEXT_LEN, "127.0.0.1:%d", ntohs(in.sin_port));
    return fd;
}

int port_of(const char *where)
{
    return atoi(strrchr(where, ':') + 1);
}

int free_port(void)
{
    static unsigned int seed;
    const struct in6_addr any = IN6ADDR_ANY_INIT;
    int one = 1;

    if (seed == 0) {
        seed = (unsigned int)now_ms() ^ (unsigned int)getpid() << 8;
    }
    /* Below 30000, because the kernel gives out ports from 32768 on itself. */
    for (int tries = 0; tries < 1000; tries++) {
        struct sockaddr_in6 in6 = { .sin6_family = AF_INET6,
                                    .sin6_addr = any };
        int port = 10000 + rand_r(&seed) % 20000;
        int fd = socket(AF_INET6, SOCK_STREAM, 0);
        bool is_free;

        if (fd < 0) {           /* without IPv6 any port will do */
            return port;
        }
        in6.sin6_port = htons((uint16_t)port);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        is_free = bind(fd, (struct sockaddr *)&in6, sizeof(in6)) == 0;
        close(fd);
        if (is_free) {
            return port;
        }
    }
    ck_abort_msg("no free port");
}

void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* set_bounds() - let calls on a blocking socket wait for WAIT_MS at most */
static void set_bounds(int fd)
{
    struct timeval tv = { WAIT_MS / 1000, 0 };

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
}

int dial_errno(const char *where, bool block, int *fd)
{
    Address a;
    int one = 1;

    address_parse(&a, where);
    *fd = socket_for(&a);
    if (a.ss.ss_family != AF_UNIX) {
        setsockopt(*fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    if (block) {
        set_bounds(*fd);
    } else {
        set_nonblocking(*fd);
    }
    if (connect(*fd, (struct sockaddr *)&a.ss, a.len) < 0 &&
        (block || errno != EINPROGRESS)) {
        return errno;
    }
    return 0;
}

int dial(const char *where, bool block)
{
    int fd, err = dial_errno(where, block, &fd);

    ck_assert_msg(err == 0, "connect to %s: %s", where, strerror(err));
    return fd;
}

void dial_reset(const char *where)
{
    int fd, err = dial_errno(where, true, &fd);

    if (err == 0) {
        expect_reset(fd);
    } else {
        ck_assert_msg(err == ECONNRESET, "connect to %s: %s", where,
                      strerror(err));
    }
    close(fd);
}

int accept_one(int listener)
{
    struct pollfd pfd = { .fd = listener, .events = POLLIN };
    int fd;

    ck_assert_msg(poll(&pfd, 1, WAIT_MS) == 1, "nobody connects");
    fd = accept(listener, NULL, NULL);
    ck_assert_msg(fd >= 0, "accept: %s", strerror(errno));
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    set_bounds(fd);
    return fd;
}

void send_all(int fd, const void *data, size_t len)
{
    const char *p = data;

    while (len > 0) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

        ck_assert_msg(n > 0, "send: %s", strerror(errno));
        p += n;
        len -= (size_t)n;
    }
}

void recv_all(int fd, void *data, size_t len)
{
    char *p = data;

    while (len > 0) {
        ssize_t n = recv(fd, p, len, 0);

        ck_assert_msg(n != 0, "end of data, %zu bytes early", len);
        ck_assert_msg(n > 0, "recv, %zu bytes to go: %s", len,
                      strerror(errno));
        p += n;
        len -= (size_t)n;
    }
}

void expect_bytes(int fd, const char *text)
{
    char buf[TEXT_LEN] = "";

    ck_assert(strlen(text) < sizeof(buf));
    recv_all(fd, buf, strlen(text));
    ck_assert_str_eq(buf, text);
}

void expect_eof(int fd)
{
    char c;
    ssize_t n = recv(fd, &c, 1, 0);

    ck_assert_msg(n == 0, "%s where the end of data was due",
                  n > 0 ? "data" : strerror(errno));
}

void expect_reset(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };
    char buf[4096];
    ssize_t n;

    do {
        poll(&pfd, 1, WAIT_MS); /* fd may be non-blocking */
        n = recv(fd, buf, sizeof(buf), 0);
    } while (n > 0);
    ck_assert_msg(n < 0 && errno == ECONNRESET,
                  "%s where a reset was due",
                  n == 0 ? "end of data" : strerror(errno));
}

void close_reset(int fd)
{
    struct linger linger = { 1, 0 };

    setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
    close(fd);
}
