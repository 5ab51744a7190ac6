/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * box.h - the engine in a box
 *
 * What the engine asks of the system passes through the box where boxed.h
 * includes it:
 *
 *  - Time is box.now.  It moves by box.pass_us for each pass of the loop that
 *    found something to do, and by the whole timeout where the loop would
 *    sleep.  So minutes of timers take no time, and always the same.
 *  - Calls fail when they are told to (box_fail()), and those that read and
 *    write can be made short, or to fail with EINTR or EAGAIN now and then.
 *  - Memory comes filled with rubbish, and is counted.
 *
 * Sockets are real.  (Where they must not be, see tests/chaos/sim.h.)
 */
#ifndef BOX_H
#define BOX_H

#include <poll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "virtproxy.h"

/* Calls that can be made to fail; those that can't are CALL_... of none. */
enum {
    CALL_ALLOC = 1,
    CALL_SOCKET = 2,
    CALL_ACCEPT = 4,
    CALL_CONNECT = 8,
    CALL_FCNTL = 16,
    CALL_READ = 32,
    CALL_WRITE = 64,
    CALL_SELECT = 128,
};

typedef struct Box {
    uint64_t now;          /* CLOCK_MONOTONIC, us */
    uint64_t pass_us;      /* time a pass takes in which something happens */
    bool repeats;          /* nothing is by chance, so that fuzzers can repeat
                              it: all clocks are box.now, there are no random
                              numbers, and large blocks of memory are kept */
    bool settle;           /* the loop stops where it would sleep */
    unsigned long stop_at; /* the loop stops after so many passes; 0: no */
    unsigned spin_max;     /* passes without sleep that fail; 0: any number */
    unsigned spins;        /* passes since the loop slept or began */
    VPLoop *loop;          /* the one that is running */
    unsigned long passes;  /* calls of select() */
    unsigned long bits;    /* bits set in the maps of all these calls */
    int select_max;        /* descriptors select() takes; 0: any number */

    unsigned calls;        /* set of CALL_...: these fail, */
    unsigned after;        /* once so many of them went well, */
    unsigned fails;        /* so many of them, */
    int err;               /* with this; 0: they move BOX_SHORT bytes at most */

    size_t io_max;         /* bytes a read or write moves; 0: no limit */
    unsigned io_fail;      /* every so many reads and writes fail; 0: none */
    unsigned io_calls;     /* reads and writes so far */
    int write_fd;          /* takes but write_left more bytes; 0: none does */
    size_t write_left;
    int read_errno;        /* what EAGAIN of a read is replaced by; 0: not */
    bool small;            /* sockets take as little as the kernel allows */
    unsigned long connects; /* calls of connect() */
    unsigned long polls;   /* calls of poll() */
    bool refuses;          /* connect() is refused, wherever to */

    size_t allocated;      /* bytes of memory held */
    size_t allocated_max;  /* the most there ever were */
    size_t blocks;         /* blocks of memory held */
} Box;

#define BOX_SHORT 7u

extern Box box;

/* box_reset() - as in the beginning; @repeats: see above */
void box_reset(bool repeats);

/* box_fail() - of @calls the next @after go well, then @fails fail with @err */
void box_fail(unsigned calls, int err, unsigned after, unsigned fails);

#define BOX_ALL (~0u)

/* box_fails() - is this call, one of CALL_..., to fail? sets errno */
bool box_fails(unsigned call);

/* ---- running the loop ------------------------------------------------- */

/* box_loop() - until something stops it */
void box_loop(VPLoop *loop);

/* box_settle() - until it would sleep */
void box_settle(VPLoop *loop);

/* box_step() - for so many passes */
void box_step(VPLoop *loop, unsigned n);

/* box_run() - for so long, us */
void box_run(VPLoop *loop, uint64_t us);

/* box_stop() - stop a loop: for timers */
void box_stop(void *loop);

/* ---- what the calls are replaced by ----------------------------------- */

int box_clock_gettime(clockid_t clock, struct timespec *ts);
int box_select(int nfds, fd_set *r, fd_set *w, fd_set *x, struct timeval *tv);
int box_open(const char *path, int flags);
ssize_t box_read(int fd, void *buf, size_t len);
ssize_t box_readv(int fd, const struct iovec *iov, int n);
ssize_t box_writev(int fd, const struct iovec *iov, int n);
int box_socket(int family, int type, int protocol);
int box_accept(int fd, struct sockaddr *addr, socklen_t *len);
int box_connect(int fd, const struct sockaddr *addr, socklen_t len);
int box_poll(struct pollfd *fds, nfds_t n, int timeout);
void *box_malloc(size_t size);
void *box_calloc(size_t n, size_t size);
void *box_realloc(void *old, size_t size);
void box_free(void *p);

/* box_failed() - ends the test, or the fuzzer, as @what is not so */
void box_failed(const char *file, int line, const char *what)
    __attribute__((noreturn));

#define box_require(cond)                                                   \
    do {                                                                    \
        if (!(cond)) {                                                      \
            box_failed(__FILE__, __LINE__, #cond);                          \
        }                                                                   \
    } while (0)

#endif
