/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * box.c - see box.h
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "box.h"

#define START_US 1000000000
#define PASS_US 20
#define SECOND_US 1000000u
/* What a fuzzer's input asks for takes fewer passes before the loop sleeps. */
#define SPIN_MAX 3000

/* Memory is filled with rubbish up to here, for the sake of speed */
#define FILL_MAX (128u << 10)

/* Vectors that the engine passes have no more parts than that. */
#define PARTS_MAX 32
/* Time for the kernel to answer connect(), in vain only once in a test. */
#define CONNECT_MS 200

Box box = { .now = START_US, .pass_us = PASS_US };

void box_reset(bool repeats)
{
    box = (Box){
        .now = START_US,
        .pass_us = PASS_US,
        .repeats = repeats,
        .late = getenv("LATE") != NULL,
        .spin_max = repeats ? SPIN_MAX : 0,
    };
}

void box_fail(unsigned calls, int err, unsigned after, unsigned fails)
{
    box.calls = calls;
    box.err = err;
    box.after = after;
    box.fails = fails;
}

bool box_fails(unsigned call)
{
    if (!(box.calls & call)) {
        return false;
    }
    if (box.after > 0) {
        box.after--;
        return false;
    }
    if (box.fails == 0) {
        return false;
    }
    box.fails -= box.fails != BOX_ALL;
    errno = box.err;
    return true;
}

/* ---- time ------------------------------------------------------------- */

int box_clock_gettime(clockid_t clock, struct timespec *ts)
{
    if (clock != CLOCK_MONOTONIC && !box.repeats) {
        return clock_gettime(clock, ts);
    }
    ts->tv_sec = (time_t)(box.now / SECOND_US);
    ts->tv_nsec = (long)(box.now % SECOND_US) * 1000;
    return 0;
}

#define WORD_BITS (sizeof(unsigned long) * CHAR_BIT)

/* The engine's maps are no fd_sets, and longer. */
static unsigned long *map_word(fd_set *set, int fd)
{
    return (unsigned long *)set + (size_t)fd / WORD_BITS;
}

static bool map_has(fd_set *set, int fd)
{
    return *map_word(set, fd) >> (size_t)fd % WORD_BITS & 1;
}

/* map_bits() - bits set in the first @nfds of a map, which may be NULL */
static unsigned long map_bits(fd_set *set, int nfds)
{
    unsigned long n = 0;

    for (int fd = 0; set != NULL && fd < nfds; fd++) {
        n += map_has(set, fd);
    }
    return n;
}

static void map_clear(fd_set *set, int fd)
{
    *map_word(set, fd) &= ~(1ul << (size_t)fd % WORD_BITS);
}

/* comes_late() - is what socket @fd has to be read not to be seen yet? */
static bool comes_late(int fd)
{
    static unsigned asked;
    struct sockaddr_storage ss;
    socklen_t len = sizeof(ss);

    return box.late && getsockname(fd, (struct sockaddr *)&ss, &len) == 0 &&
           ss.ss_family != AF_UNIX && ++asked % 3 != 0;
}

/*
 * real_select() - which descriptors are ready now, but for write_fd if full,
 * and for what comes late: *late
 */
static int real_select(int nfds, fd_set *r, fd_set *w, fd_set *x, bool *late)
{
    struct timeval zero = { 0, 0 };
    int n;

    do { /* fuzzers use signals */
        n = select(nfds, r, w, x, &zero);
    } while (n < 0 && errno == EINTR);
    if (n > 0 && box.write_fd > 0 && box.write_fd < nfds &&
        box.write_left == 0 && w != NULL && map_has(w, box.write_fd)) {
        map_clear(w, box.write_fd);
        n--;
    }
    for (int fd = 0; n > 0 && r != NULL && fd < nfds; fd++) {
        if (map_has(r, fd) && comes_late(fd)) {
            map_clear(r, fd);
            n--;
            *late = true;
        }
    }
    return n;
}

/* turn() - exchange halves of words, where box.fd_order wants it */
static void turn(int nfds, fd_set *set)
{
    enum { HALF = sizeof(unsigned long) * CHAR_BIT / 2 };
    unsigned long *word = (void *)set;

    if (box.fd_order != FD_ORDER_HALVES || set == NULL) {
        return;
    }
    for (int i = 0; i < nfds; i += 2 * HALF) {
        *word = *word >> HALF | *word << HALF;
        word++;
    }
}

void box_fd_set(int fd, fd_set *set)
{
    /* some libraries' FD_SET() would convert the sign of an int */
    FD_SET((uint16_t)(box.fd_order == FD_ORDER_ODD ? fd ^ 1 : fd), set);
    turn(fd + 1, set);
}

static int box_asked(int nfds, fd_set *r, fd_set *w, fd_set *x,
                     struct timeval *tv)
{
    bool last = ++box.passes == box.stop_at, late = false;
    int n;

    if (last) {
        vp_loop_stop(box.loop);
        box.stop_at = 0;
    }
    box.bits += map_bits(r, nfds) + map_bits(w, nfds);
    box.calls_row = 0;
    if (box_fails(CALL_SELECT)) {
        return -1;
    }
    if (box.select_max > 0 && nfds > box.select_max) {
        errno = EINVAL;
        return -1;
    }
    n = real_select(nfds, r, w, x, &late);
    box.now += box.pass_us;
    box.spins++;
    if (n != 0 || last || (tv != NULL && tv->tv_sec == 0 && tv->tv_usec == 0)) {
        box_require(box.spin_max == 0 || box.spins < box.spin_max);
        return n;
    }
    if (box.settle) {
        vp_loop_stop(box.loop);
    } else if (late) {
        return 0;
    } else {
        box_require(tv != NULL); /* else the loop would sleep for ever */
        box.now += (uint64_t)tv->tv_sec * SECOND_US + (uint64_t)tv->tv_usec;
    }
    box.spins = 0;
    return 0;
}

int box_select(int nfds, fd_set *r, fd_set *w, fd_set *x, struct timeval *tv)
{
    int n, err;

    turn(nfds, r);
    turn(nfds, w);
    n = box_asked(nfds, r, w, x, tv);
    err = errno;
    turn(nfds, r);
    turn(nfds, w);
    errno = err;
    return n;
}

void box_loop(VPLoop *loop)
{
    box.loop = loop;
    box.spins = 0;
    box_require(vp_loop_run(loop) == 0);
    box.loop = NULL;
}

void box_settle(VPLoop *loop)
{
    box.settle = true;
    box_loop(loop);
    box.settle = false;
}

void box_step(VPLoop *loop, unsigned n)
{
    box.stop_at = box.passes + n;
    box_loop(loop);
}

void box_stop(void *loop)
{
    vp_loop_stop(loop);
}

void box_run(VPLoop *loop, uint64_t us)
{
    VPTimer timer = { 0 };

    vp_timer_start(loop, &timer, box.now + us - vp_loop_now(loop), box_stop,
                   loop);
    box_loop(loop);
    vp_timer_stop(&timer);
}

/* ---- descriptors ------------------------------------------------------ */

ssize_t box_getrandom(void *buf, size_t len, unsigned flags)
{
    if (box_fails(CALL_RANDOM)) {
        return -1;
    }
    if (box.repeats) {
        memset(buf, 0, len);
        return (ssize_t)len;
    }
    return getrandom(buf, len, flags);
}

int box_open(const char *path, int flags)
{
    return box_fails(CALL_RANDOM) ? -1 : open(path, flags);
}

void box_called(void)
{
    if (++box.calls_row > box.calls_row_max) {
        box.calls_row_max = box.calls_row;
    }
}

/* io_fails() - is this read or write to fail? sets errno */
static bool io_fails(unsigned call, size_t *room)
{
    box_called();
    *room = box.io_max > 0 ? box.io_max : SIZE_MAX;
    if (box_fails(call)) {
        *room = box.err == 0 && *room > BOX_SHORT ? BOX_SHORT : *room;
        return box.err != 0;
    }
    box.io_calls++;
    if (box.io_fail == 0 || box.io_calls % box.io_fail != 0) {
        return false;
    }
    errno = box.io_calls / box.io_fail % 2 ? EINTR : EAGAIN;
    return true;
}

ssize_t box_read(int fd, void *buf, size_t len)
{
    size_t room;
    ssize_t n;

    if (io_fails(CALL_READ, &room)) {
        return -1;
    }
    n = read(fd, buf, len < room ? len : room);
    if (n < 0 && errno == EAGAIN && box.read_errno != 0) {
        errno = box.read_errno;
    }
    return n;
}

/* cut() - the first @room bytes of @iov, to @to; returns how many parts */
static int cut(struct iovec *to, const struct iovec *iov, int n, size_t room)
{
    int i;

    box_require(n <= PARTS_MAX);
    for (i = 0; i < n && room > 0; i++) {
        to[i] = iov[i];
        to[i].iov_len = room < iov[i].iov_len ? room : iov[i].iov_len;
        room -= to[i].iov_len;
    }
    return i;
}

ssize_t box_readv(int fd, const struct iovec *iov, int n)
{
    struct iovec part[PARTS_MAX];
    size_t room;

    if (io_fails(CALL_READ, &room)) {
        return -1;
    }
    return readv(fd, part, cut(part, iov, n, room));
}

ssize_t box_writev(int fd, const struct iovec *iov, int n)
{
    bool bounded = fd == box.write_fd && fd > 0;
    struct iovec part[PARTS_MAX];
    size_t room;
    ssize_t done;

    if (io_fails(CALL_WRITE, &room)) {
        return -1;
    }
    room = bounded && box.write_left < room ? box.write_left : room;
    if (room == 0) {
        errno = EAGAIN;
        return -1;
    }
    done = writev(fd, part, cut(part, iov, n, room));
    box.write_left -= bounded && done > 0 ? (size_t)done : 0;
    return done;
}

/* smaller() - so that socket @fd takes little if that is wanted; returns it */
static int smaller(int fd)
{
    int least = 1;

    if (fd >= 0 && box.small) {
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof(least));
    }
    return fd;
}

int box_socket(int family, int type, int protocol)
{
    return box_fails(CALL_SOCKET) ? -1
                                  : smaller(socket(family, type, protocol));
}

int box_accept(int fd, struct sockaddr *addr, socklen_t *len)
{
    box_called();
    return box_fails(CALL_ACCEPT) ? -1 : smaller(accept(fd, addr, len));
}

int box_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    int ready = poll(fds, n, timeout);

    box_called();
    box.polls++;
    for (nfds_t i = 0; box.bsd && ready > 0 && i < n; i++) {
        fds[i].revents &= (short)~POLLERR;
    }
    return ready;
}

int box_close(int fd)
{
    box_called();
    return close(fd);
}

int box_setsockopt(int fd, int level, int name, const void *value,
                   socklen_t len)
{
    box.setsockopts++;
    if (box.bsd && level == SOL_SOCKET && name == SO_SNDBUF &&
        *(const int *)value > BOX_BSD_BUFFER) {
        errno = ENOBUFS;
        return -1;
    }
#ifdef SO_SNDBUFFORCE
    if (level == SOL_SOCKET && name == SO_SNDBUFFORCE) {
        box.forced = *(const int *)value; /* only root may */
        return 0;
    }
#endif
    return setsockopt(fd, level, name, value, len);
}

int box_getsockname(int fd, struct sockaddr *addr, socklen_t *len)
{
    struct sockaddr_in *in = (void *)addr;

    if (getsockname(fd, addr, len) < 0) {
        return -1;
    }
    if (box.far && addr->sa_family == AF_INET) {
        in->sin_addr.s_addr = htonl(0xc0000201);
    }
    return 0;
}

int box_getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
#ifdef __linux__
    if (box.unheard_ms != 0 && level == IPPROTO_TCP && name == TCP_INFO) {
        /* bytes of struct tcp_info, which musl doesn't declare for all */
        enum { UNACKED = 24, LAST_ACK_RECV = 56 };
        const uint32_t one = 1;

        memset(value, 0, *len);
        memcpy((char *)value + UNACKED, &one, sizeof(one));
        memcpy((char *)value + LAST_ACK_RECV, &box.unheard_ms,
               sizeof(box.unheard_ms));
        return 0;
    }
#endif
    return getsockopt(fd, level, name, value, len);
}

int box_connect(int fd, const struct sockaddr *addr, socklen_t len)
{
    static int patience = CONNECT_MS;
    struct pollfd pfd = { .fd = fd, .events = POLLOUT };
    int rc;

    box_called();
    box.connects++;
    if (box.refuses) {
        errno = ECONNREFUSED;
        return -1;
    }
    if (box_fails(CALL_CONNECT)) {
        return -1;
    }
    rc = connect(fd, addr, len);
    if (rc < 0 && errno == EINPROGRESS) {
        /* simulated time must not run out while the kernel gets to it */
        patience = poll(&pfd, 1, patience) > 0 ? patience : 0;
        errno = EINPROGRESS;
    }
    return rc;
}

/* ---- memory ----------------------------------------------------------- */

/* Before each block is its size, with room to align the block. */
#define BLOCK_HDR 16u

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define POISONS
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(POISONS)
#include <sanitizer/asan_interface.h>
#define block_guard(block) ASAN_POISON_MEMORY_REGION(block, BLOCK_HDR)
#define block_unguard(block) ASAN_UNPOISON_MEMORY_REGION(block, BLOCK_HDR)
#else
#define block_guard(block) (void)(block)
#define block_unguard(block) (void)(block)
#endif

/*
 * Large blocks are kept from one input of a fuzzer's to the next: to have the
 * kernel give and clear them would take most of the time.
 */
#define LARGE 65536u
#define SPARES 8

static struct {
    unsigned char *block;
    size_t size;
} spares[SPARES];

static unsigned char *block_new(size_t size)
{
    for (int i = 0; size >= LARGE && i < SPARES; i++) {
        if (spares[i].block != NULL && spares[i].size == size) {
            unsigned char *block = spares[i].block;

            spares[i].block = NULL;
            return block;
        }
    }
    return malloc(BLOCK_HDR + size);
}

static void block_free(unsigned char *block, size_t size)
{
    for (int i = 0; box.repeats && size >= LARGE && i < SPARES; i++) {
        if (spares[i].block == NULL) {
            spares[i].block = block;
            spares[i].size = size;
            return;
        }
    }
    free(block);
}

/* block_size() - of the memory at @p, whose block is unguarded from here on */
static size_t block_size(unsigned char *p)
{
    size_t size;

    block_unguard(p - BLOCK_HDR);
    memcpy(&size, p - BLOCK_HDR, sizeof(size));
    return size;
}

static void *block_alloc(size_t size, int fill)
{
    unsigned char *p;

    if (box_fails(CALL_ALLOC)) {
        return NULL;
    }
    p = block_new(size);
    box_require(p != NULL);
    memcpy(p, &size, sizeof(size));
    block_guard(p);
    p += BLOCK_HDR;
    /* of the send store only what will be used matters */
    memset(p, fill, fill != 0 && size > FILL_MAX ? FILL_MAX : size);
    box.blocks++;
    box.allocated += size;
    return p;
}

/* allocated() - after a change */
static void *allocated(void *p)
{
    if (box.allocated > box.allocated_max) {
        box.allocated_max = box.allocated;
    }
    return p;
}

void *box_malloc(size_t size)
{
    return allocated(block_alloc(size, 0xa5));
}

void *box_calloc(size_t n, size_t size)
{
    return allocated(block_alloc(n * size, 0));
}

void *box_realloc(void *old, size_t size)
{
    void *p = block_alloc(size, 0xa5);

    if (p != NULL && old != NULL) {
        size_t was = block_size(old);

        memcpy(p, old, was < size ? was : size);
        box_free(old);
    }
    return allocated(p);
}

void box_free(void *p)
{
    if (p != NULL) {
        size_t size = block_size(p);

        box.blocks--;
        box.allocated -= size;
        block_free((unsigned char *)p - BLOCK_HDR, size);
    }
}
