/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * box.h - the engine in a box
 *
 * Where boxed.h includes the engine, the engine's system calls go to functions
 * of the box:
 *
 *  - Time is box.now.  Each call of select() adds box.pass_us, and where the
 *    loop would sleep, the whole timeout.  So timers of minutes run at once,
 *    and in the same order each time.
 *  - Calls fail when box_fail() says so; reads and writes can be made short, or
 *    to fail with EINTR and EAGAIN every io_fail calls.
 *  - With LATE in the environment, what TCP sockets have to be read is seen
 *    only after a few calls of select(), as where the kernel is busy.
 *  - Memory is filled with rubbish when it is allocated, and is counted.
 *
 * Sockets are real; in tests/chaos/sim.h they are not.
 */
#ifndef BOX_H
#define BOX_H

#include <poll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "virtproxy.h"

/* Bits for the calls that box_fail() can make fail */
enum {
    CALL_ALLOC = 1,
    CALL_SOCKET = 2,
    CALL_ACCEPT = 4,
    CALL_CONNECT = 8,
    CALL_FCNTL = 16,
    CALL_READ = 32,
    CALL_WRITE = 64,
    CALL_SELECT = 128,
    CALL_RANDOM = 256, /* getrandom() and open() */
};

/* Orders of the bits in an fd_set */
typedef enum FdOrder {
    FD_ORDER_SYSTEM,
    FD_ORDER_HALVES, /* big-endian words half as long as the engine's */
    FD_ORDER_ODD,    /* no system has it */
} FdOrder;

typedef struct Box {
    uint64_t now;          /* CLOCK_MONOTONIC as the engine reads it, us */
    uint64_t pass_us;      /* time that each call of select() takes, us */
    bool repeats;          /* no chance, so that fuzzers can repeat a run: all
                              clocks are box.now, random numbers are 0, large
                              blocks of memory are kept */
    bool settle;           /* the loop stops where it would sleep */
    unsigned long stop_at; /* the loop stops when .passes is this; 0: never */
    unsigned spin_max;     /* .spins that end the test; 0: no limit */
    unsigned spins;        /* calls of select() since the loop last slept */
    VPLoop *loop;          /* the loop that runs; NULL: none */
    unsigned long passes;  /* calls of select() since box_reset() */
    unsigned long bits;    /* descriptors asked for in all calls of select() */
    int select_max;        /* largest nfds that select() takes; 0: no limit */
    bool no_epoll;         /* there is none, as elsewhere than on Linux */

    unsigned calls;        /* CALL_... bits that box_fail() was given */
    unsigned after;        /* so many calls of "calls" succeed first */
    unsigned fails;        /* so many of them fail then, or BOX_ALL */
    int err;               /* errno of the failures; 0: reads and writes don't
                              fail but move BOX_SHORT bytes at most */

    size_t io_max;         /* most bytes a read or write moves; 0: no limit */
    unsigned io_fail;      /* each io_fail'th read or write fails; 0: none */
    unsigned io_calls;     /* reads and writes that box_fail() let be */
    int write_fd;          /* descriptor with a limit of writes; 0: none */
    size_t write_left;     /* bytes that write_fd takes before EAGAIN */
    int read_errno;        /* errno of a read instead of EAGAIN; 0: EAGAIN */
    bool late;             /* TCP sockets have news late */
    bool small;            /* sockets have the smallest send buffer there is */
    unsigned long connects; /* calls of connect() since box_reset() */
    unsigned long polls;   /* calls of poll() since box_reset() */
    unsigned calls_row;    /* reads, writes, and calls of poll(), accept(),
                              connect(), ioctl() and close(), since select() */
    unsigned calls_row_max; /* largest value of .calls_row so far */
    unsigned long setsockopts; /* calls of setsockopt() since box_reset() */
    int forced;            /* bytes of the send buffer that was forced last */
    bool far;              /* TCP sockets have an address of a network */
    uint32_t unheard_ms;   /* for so long no ack has come, as TCP_INFO has it;
                              0: TCP isn't asked */
    FdOrder fd_order;      /* of the bits in an fd_set */
    bool bsd;              /* a send buffer has BOX_BSD_BUFFER bytes at most,
                              and poll() shows no error */
    bool refuses;          /* each connect() fails with ECONNREFUSED */

    size_t allocated;      /* bytes of memory held */
    size_t allocated_max;  /* largest value of .allocated so far, bytes */
    size_t blocks;         /* blocks of memory held */
} Box;

#define BOX_BSD_BUFFER 262144
#define BOX_SHORT 7u /* bytes that a short read or write moves at most */

extern Box box;

/* box_reset() - set all of box to its defaults, and box.repeats to @repeats */
void box_reset(bool repeats);

/* box_fail() - the next @after of @calls succeed, then @fails fail with @err */
void box_fail(unsigned calls, int err, unsigned after, unsigned fails);

#define BOX_ALL (~0u) /* as @calls: each; as @fails: without end */

/* box_fails() - whether @call, one of CALL_..., fails now; sets errno if so */
bool box_fails(unsigned call);

/* ---- running the loop ------------------------------------------------- */

/* box_loop() - run the loop until something stops it */
void box_loop(VPLoop *loop);

/* box_settle() - run the loop until it would sleep */
void box_settle(VPLoop *loop);

/* box_step() - run the loop for @n calls of select() */
void box_step(VPLoop *loop, unsigned n);

/* box_run() - run the loop for @us of box.now */
void box_run(VPLoop *loop, uint64_t us);

/* box_stop() - stop a loop; the callback of a timer */
void box_stop(void *loop);

/* ---- replacements of the system calls --------------------------------- */

int box_clock_gettime(clockid_t clock, struct timespec *ts);
int box_select(int nfds, fd_set *r, fd_set *w, fd_set *x, struct timeval *tv);
ssize_t box_getrandom(void *buf, size_t len, unsigned flags);
void box_fd_set(int fd, fd_set *set);
int box_open(const char *path, int flags);
ssize_t box_read(int fd, void *buf, size_t len);
ssize_t box_readv(int fd, const struct iovec *iov, int n);
ssize_t box_writev(int fd, const struct iovec *iov, int n);
int box_socket(int family, int type, int protocol);
int box_accept(int fd, struct sockaddr *addr, socklen_t *len);
int box_connect(int fd, const struct sockaddr *addr, socklen_t len);
int box_setsockopt(int fd, int level, int name, const void *value,
                   socklen_t len);
int box_getsockopt(int fd, int level, int name, void *value, socklen_t *len);
int box_getsockname(int fd, struct sockaddr *addr, socklen_t *len);
int box_poll(struct pollfd *fds, nfds_t n, int timeout);
int box_close(int fd);
/* box_called() - count a call of the engine */
void box_called(void);
void *box_malloc(size_t size);
void *box_calloc(size_t n, size_t size);
void *box_realloc(void *old, size_t size);
void box_free(void *p);

/* box_failed() - end the test or the fuzzer, because @what is false */
void box_failed(const char *file, int line, const char *what)
    __attribute__((noreturn));

#define box_require(cond)                                                   \
    do {                                                                    \
        if (!(cond)) {                                                      \
            box_failed(__FILE__, __LINE__, #cond);                          \
        }                                                                   \
    } while (0)

#endif
