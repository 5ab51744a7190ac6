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
 * Each wait takes at most WAIT_MS, because else a test that has failed would
 * hang.  A suite asserts milliseconds only where they are promised to users.
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

#define WAIT_MS 30000           /* longest wait, ms */
#define TEST_TIMEOUT 150        /* libcheck ends a test then, s */
#define PATH_LEN 108            /* bytes for a unix socket path */
#define TEXT_LEN 512            /* bytes for a line or an option */

extern char vp_dir[PATH_LEN];   /* path of this test's directory */
extern char vp_program[1024];   /* path of the daemon's binary */

/* --- the suite ---------------------------------------------------------- */

/* harness_suite() - returns a suite whose tests have vp_dir and clean it up */
Suite *harness_suite(const char *name);

/* harness_run() - run and free the suite; returns main()'s exit status */
int harness_run(Suite *suite);

/* --- time, text, files -------------------------------------------------- */

int64_t now_ms(void);
void sleep_ms(int ms);

/* text_format() - printf into buf, of len bytes; overflow fails the test */
void text_format(char *buf, size_t len, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* file_path() - write vp_dir/name to path, which has PATH_LEN bytes */
void file_path(char *path, const char *name);

void file_write(const char *path, const void *data, size_t len);

/* file_wait() - wait until the file vp_dir/name contains text */
void file_wait(const char *name, const char *text);

/* pid_in() - returns the number in the pid file vp_dir/name */
pid_t pid_in(const char *name);

/* --- processes ---------------------------------------------------------- */

/* How one start of a daemon differs from the usual one: all 0 */
typedef struct StartOptions {
    int keep_fd;                /* descriptor the daemon inherits; 0: none */
    int nofile;                 /* limit of open descriptors; 0: the test's */
    bool nobody;                /* run as nobody where the test is root's */
    int listen_fds[8];          /* are passed as systemd does, in LISTEN_FDS */
    int n_listen_fds;           /* how many of them; 0: none */
    const char *listen_names;   /* LISTEN_FDNAMES; NULL: not set */
    bool listen_others;         /* LISTEN_PID is another process's */
    const char *setup;          /* shell commands that run before the daemon,
                                   in its own mount namespace; NULL: none */
} StartOptions;

typedef struct Daemon {
    pid_t pid;                  /* process id; 0: not running */
    int status;                 /* wait status, valid once pid is 0 */
    bool inherited;             /* has keep_fd: may end when that closes */
    bool hurried;               /* its end leaves what is queued unsent */
    char name[40];              /* in messages and the log's file name */
    char log[PATH_LEN];         /* path of the file with its stderr */
    off_t mark;                 /* searches of the log begin here, bytes */
} Daemon;

/*
 * daemon_start() - start a daemon with the options in fmt, split at spaces
 *
 * Returns it; the test's end stops it.  name is copied; it is part of messages
 * and of the log's file name.  The program of one with the name "guest" may be
 * another, as one of another machine: QEMU_VP_GUEST in the environment.
 */
Daemon *daemon_start(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
Daemon *daemon_start_with(const StartOptions *options, const char *name,
                          const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* daemon_start_args() - start a daemon with options; NULL ends args */
Daemon *daemon_start_args(const StartOptions *options, const char *name,
                          const char *const args[]);

/*
 * daemons_adopt() - become the parent of daemons that go to the background
 *
 * daemon_adopted() returns a Daemon for such a process; log is its log's path.
 */
void daemons_adopt(void);
Daemon *daemon_adopted(const char *name, pid_t pid, const char *log);

/* daemon_wait() - wait until a line from d->mark on matches a POSIX ERE */
void daemon_wait(Daemon *d, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* What the C libraries say of EADDRINUSE and of EADDRNOTAVAIL, as EREs */
#define IN_USE "Address (already )?in use"
#define NOT_HERE "(Cannot assign requested address|Address not available)"

/* daemon_saw() - whether a line from d->mark on matches */
bool daemon_saw(const Daemon *d, const char *regex);

/* daemon_count() - returns how many lines from d->mark on match */
int daemon_count(const Daemon *d, const char *regex);

/* daemon_all() - returns the whole log; the caller frees it */
char *daemon_all(const Daemon *d);

/* daemon_mark() - move d->mark to the end of the log */
void daemon_mark(Daemon *d);

/*
 * daemon_listens() - wait for the listener of an oforward
 *
 * Returns its address, which is overwritten eight calls later.
 */
const char *daemon_listens(Daemon *d, const char *service);

/* daemon_up() - wait until the log says "channel up", from d->mark on */
void daemon_up(Daemon *d);

void daemon_kill(Daemon *d);            /* end by SIGKILL */
void daemon_stop(Daemon *d);            /* end by SIGTERM; status must be 0 */
int daemon_exit(Daemon *d);             /* wait; returns its exit status */
int64_t daemon_cpu_us(const Daemon *d); /* CPU time used so far, us */
int64_t daemon_cpu_ms(const Daemon *d); /* CPU time used so far, ms */
int daemon_fds(const Daemon *d);        /* number of open descriptors */

/*
 * undelayed_ms() - now_ms() less the time spent waiting for a processor
 *
 * The waits of the test and of n daemons are subtracted; a NULL daemon has none
 * yet.  The difference of two calls is how long something takes on a machine
 * that nobody else uses, ms.
 */
int64_t undelayed_ms(Daemon *const d[], size_t n);

/*
 * daemons_idle() - fail the test if in 2 s a daemon uses over 150 ms of CPU
 *
 * A few timers use far less, and a loop that spins far more, so neither a busy
 * machine nor a sanitizer makes a difference.
 */
void daemons_idle(Daemon *const d[], size_t n);

/*
 * may_mount() - whether StartOptions.setup can give a daemon its own mounts
 *
 * A container may forbid it.  MAY_MOUNT names what is needed, for PASS_OVER().
 */
bool may_mount(void);
#define MAY_MOUNT "mounts of its own (CAP_SYS_ADMIN or user namespaces)"

/* may_mount_hosts() - and whether there is an /etc/hosts to be mounted over */
bool may_mount_hosts(void);
#define MAY_MOUNT_HOSTS "/etc/hosts, and " MAY_MOUNT

/* has_localhost() - whether localhost is a name; not without /etc/hosts */
bool has_localhost(void);
#define HAS_LOCALHOST "the name localhost, in /etc/hosts"

/* has_ipv6() - whether ::1 can be bound; many containers have no IPv6 */
bool has_ipv6(void);
#define HAS_IPV6 "IPv6, with ::1"

/*
 * command_start() - run a shell command in a child, which the test's end kills
 *
 * Its output goes to vp_dir/name.log.  Returns its process id.
 */
pid_t command_start(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* command_wait() - wait for a command; fail the test unless it exits with 0 */
void command_wait(pid_t pid);

/* child_wait() - wait for a child to end; returns its wait status */
int child_wait(pid_t pid);

/* child_add() - have a forked child killed when the test is over */
void child_add(pid_t pid);

/* child_fds() - close all descriptors but 0 to 2 and the n in keep */
void child_fds(const int *keep, size_t n);

/* --- sockets ------------------------------------------------------------ */

/*
 * An address is "/path" or, on Linux, "@name" for a unix socket, else
 * "HOST:PORT" with a numeric HOST, in brackets for IPv6.  All sockets made here
 * are close-on-exec.
 */
int listen_on(const char *where, int backlog);  /* port 0: any free one */
int listen_any(char *where);    /* on 127.0.0.1; its address goes to where */
int port_of(const char *where);
int free_port(void);            /* a port nobody uses, < 30000 */

/* dial() - connect; returns the socket; calls block WAIT_MS at most if block */
int dial(const char *where, bool block);
void dial_reset(const char *where); /* is reset, perhaps within connect() */
/* dial_errno() - 0 or an errno value; the new socket is at fd in any case */
int dial_errno(const char *where, bool block, int *fd);
int accept_one(int listener);   /* blocks for WAIT_MS at most */

void send_all(int fd, const void *data, size_t len);
void recv_all(int fd, void *data, size_t len);
void expect_bytes(int fd, const char *text);
void expect_eof(int fd);
void expect_reset(int fd);      /* skips data that comes before the RST */
void close_reset(int fd);       /* close, sending a RST */
void set_nonblocking(int fd);

#endif
