/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c - the engine, with the simulated machine's system calls
 *
 * While no simulated machine runs, the replacements make the real calls, so
 * the same object also serves in processes of its own.
 */
#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <netdb.h>
#include <poll.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif
#include <sys/random.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"

#define clock_gettime(clock, ts) sim_clock_gettime(clock, ts)
#define getpid() sim_getpid()
#define malloc(size) sim_malloc(size)
#define calloc(n, size) sim_calloc(n, size)
#define realloc(p, size) sim_realloc(p, size)
#define free(p) sim_free(p)
#define malloc_trim(pad) ((void)(pad)) /* slow, and nothing to look at */
#define getrandom(buf, len, flags) sim_getrandom(buf, len, flags)
#define close(fd) sim_close(fd)
#define read(fd, buf, len) sim_read(fd, buf, len)
#define readv(fd, iov, n) sim_readv(fd, iov, n)
#define write(fd, buf, len) sim_write(fd, buf, len)
#define writev(fd, iov, n) sim_writev(fd, iov, n)
#define shutdown(fd, how) sim_shutdown(fd, how)
#define fcntl(...) sim_fcntl(__VA_ARGS__)
#define socket(family, type, protocol) sim_socket(family, type, protocol)
#define accept(fd, addr, len) sim_accept(fd, addr, len)
#define connect(fd, addr, len) sim_connect(fd, addr, len)
#define setsockopt(fd, level, name, value, len) \
    sim_setsockopt(fd, level, name, value, len)
#define getsockopt(fd, level, name, value, len) \
    sim_getsockopt(fd, level, name, value, len)
#define getsockname(fd, addr, len) sim_getsockname(fd, addr, len)
#define getpeername(fd, addr, len) sim_getpeername(fd, addr, len)
#define poll(fds, n, timeout) sim_poll(fds, n, timeout)
#define select(n, r, w, e, timeout) sim_select(n, r, w, e, timeout)
#define epoll_create1(flags) (-1) /* a simulated machine has none */

#include "tests/lib/engine.c"

#include "sim.h"

void sim_draws(uint64_t n)
{
    random_draws = n;
}
