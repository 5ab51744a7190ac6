/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * harness.h - what the whole-daemon suites share
 *
 * The suites look at qemu-vp from outside only: its arguments, its log on
 * stderr, its exit status, its sockets, and what /proc tells about it.
 *
 * libcheck runs each test in a process of its own.  A test has a directory,
 * vp_dir; each daemon's log goes there, and when the test fails the last lines
 * of every log in it are printed.  When a test is over, whatever it started is
 * ended, and a daemon that died, did not end cleanly at SIGTERM or was found
 * out by a sanitizer fails the test even if nothing else did.
 *
 * What is waited for here may take up to WAIT_MS, which only keeps a test that
 * has failed from hanging.  A suite asserts milliseconds only where they are
 * promised to users.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "bytes.h"
#include "suite.h"

#define WAIT_MS 30000           /* longest wait for anything at all */
#define TEST_TIMEOUT 150        /* seconds until libcheck ends a test */
#define PATH_LEN 108            /* room for a unix socket path */
#define TEXT_LEN 512            /* room for a line or an option */

extern char vp_dir[PATH_LEN];   /* this test's directory */
extern char vp_program[1024];   /* the daemon's binary */

/* --- the suite ---------------------------------------------------------- */

/* harness_suite() - a suite whose tests have a directory, and clean up */
Suite *harness_suite(const char *name);

/* harness_run() - run it; what main() returns */
int harness_run(Suite *suite);

/* --- time, text, files -------------------------------------------------- */

int64_t now_ms(void);
void sleep_ms(int ms);

/* text_format() - printf into a buffer of size len; overflow fails the test */
void text_format(char *buf, size_t len, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* file_path() - vp_dir/name into path, which has PATH_LEN bytes */
void file_path(char *path, const char *name);

void file_write(const char *path, const void *data, size_t len);

/* file_wait() - wait until the file vp_dir/name has that text in it */
void file_wait(const char *name, const char *text);

/* --- processes ---------------------------------------------------------- */

/* What is special about one start of a daemon */
typedef struct StartOptions {
    int keep_fd;                /* descriptor to inherit, 0: none */
    int nofile;                 /* limit of descriptors, 0: as we have */
    bool nobody;                /* as a user who may not do everything */
    const char *setup;          /* shell commands to run before, in a mount
                                   namespace of its own, or NULL */
} StartOptions;

typedef struct Daemon {
    pid_t pid;                  /* 0: not running */
    int status;                 /* as waitpid() gave it, once pid is 0 */
    bool inherited;             /* ends by itself once its channel is gone */
    char name[40];
    char log[PATH_LEN];         /* file with its stderr */
    off_t mark;                 /* daemon_wait() looks from here on */
} Daemon;

/*
 * daemon_start() - start the daemon with the options in fmt, split at spaces
 *
 * @name: what it is called in messages and in its log's file name
 */
Daemon *daemon_start(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
Daemon *daemon_start_with(const StartOptions *options, const char *name,
                          const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* daemon_start_args() - the same with a list that NULL ends */
Daemon *daemon_start_args(const StartOptions *options, const char *name,
                          const char *const args[]);

/*
 * daemons_adopt() - have those that go to the background become our children
 *
 * daemon_adopted() then makes a Daemon of one, which logs to the file log.
 */
void daemons_adopt(void);
Daemon *daemon_adopted(const char *name, pid_t pid, const char *log);

/* daemon_wait() - wait until a log line matches a POSIX extended regex */
void daemon_wait(Daemon *d, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* daemon_saw() - whether a line matched so far */
bool daemon_saw(const Daemon *d, const char *regex);

/* daemon_count() - how many lines, from the mark on, match */
int daemon_count(const Daemon *d, const char *regex);

/* daemon_all() - all it has logged, for the caller to free */
char *daemon_all(const Daemon *d);

/* daemon_mark() - have the three above look at later lines only */
void daemon_mark(Daemon *d);

/* daemon_listens() - wait for an oforward's listener, give its address */
const char *daemon_listens(Daemon *d, const char *service);

/* daemon_up() - wait for "channel up" */
void daemon_up(Daemon *d);

void daemon_kill(Daemon *d);            /* SIGKILL */
void daemon_stop(Daemon *d);            /* SIGTERM; must exit 0, cleanly */
int daemon_exit(Daemon *d);             /* wait for it to end: exit status */
int64_t daemon_cpu_us(const Daemon *d); /* CPU time used so far */
int64_t daemon_cpu_ms(const Daemon *d); /* CPU time used so far */
int daemon_fds(const Daemon *d);        /* descriptors it has open */

/*
 * undelayed_ms() - now_ms(), less what we and n daemons waited for a processor
 *
 * A difference of two tells how long something took but for who else used the
 * machine.  A NULL daemon counts as one that has yet to start.
 */
int64_t undelayed_ms(Daemon *const d[], size_t n);

/*
 * daemons_idle() - measure that daemons use next to no CPU for 2 seconds
 *
 * A loop that spins takes all it can get, hundreds of times the bound, and the
 * bound is many times what a few timers take, so neither load nor a sanitizer
 * matters.
 */
void daemons_idle(Daemon *const d[], size_t n);

/*
 * may_mount() - can StartOptions.setup give a daemon mounts of its own?
 *
 * A container may keep us from it. MAY_MOUNT says what it takes.
 */
bool may_mount(void);
#define MAY_MOUNT "mounts of its own (CAP_SYS_ADMIN or user namespaces)"

/* has_localhost() - is there this name? A bare root directory has no hosts. */
bool has_localhost(void);
#define HAS_LOCALHOST "the name localhost, in /etc/hosts"

/* has_ipv6() - is there ::1? Many a container has none. */
bool has_ipv6(void);
#define HAS_IPV6 "IPv6, with ::1"

/* command_start() - run a shell command, its output to vp_dir/name.log */
pid_t command_start(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* command_wait() - fail the test unless the command ends with status 0 */
void command_wait(pid_t pid);

/* child_wait() - wait for a child's end; its status as of waitpid() */
int child_wait(pid_t pid);

/* child_add() - have a forked child ended when the test is over */
void child_add(pid_t pid);

/* child_fds() - in a forked child: close all but n descriptors, and 0 to 2 */
void child_fds(const int *keep, size_t n);

/* --- sockets ------------------------------------------------------------ */

/*
 * An address is "/path" for a unix socket, else "HOST:PORT" with a numeric
 * HOST, in brackets for IPv6.  All sockets are close-on-exec.
 */
int listen_on(const char *where, int backlog);  /* port 0: a free one */
int listen_any(char *where);    /* on 127.0.0.1; where has TEXT_LEN bytes */
int port_of(const char *where);
int free_port(void);            /* a port nobody uses on loopback */

/* dial() - connect; block says whether calls on the socket may block */
int dial(const char *where, bool block);
int accept_one(int listener);   /* blocking socket; bounded wait */

void send_all(int fd, const void *data, size_t len);
void recv_all(int fd, void *data, size_t len);
void expect_bytes(int fd, const char *text);
void expect_eof(int fd);
void expect_reset(int fd);      /* whatever data comes first, then RST */
void close_reset(int fd);       /* close with RST */
void set_nonblocking(int fd);

#endif
