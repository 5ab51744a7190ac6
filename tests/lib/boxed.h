/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * boxed.h - includes the engine, its system calls replaced by the box's
 */
#ifndef BOXED_H
#define BOXED_H

#include <fcntl.h>
#ifdef HAVE_MALLOC_TRIM
#include <malloc.h> /* its names are taken below */
#endif
#include <stdio.h>
#include <stdlib.h>
#include <poll.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "box.h"

#define clock_gettime(clock, ts) box_clock_gettime(clock, ts)
#define select(n, r, w, x, tv) box_select(n, r, w, x, tv)
#undef FD_SET
#define FD_SET(fd, set) box_fd_set(fd, set)
#define epoll_create1(flags) (box.no_epoll ? -1 : epoll_create1(flags))
#define getpid() (box.repeats ? 1 : getpid())
#define getrandom(buf, len, flags) box_getrandom(buf, len, flags)
#define open(path, flags) box_open(path, flags)
#define malloc(size) box_malloc(size)
#define calloc(n, size) box_calloc(n, size)
#define realloc(old, size) box_realloc(old, size)
#define free(p) box_free(p)
#define read(fd, buf, len) box_read(fd, buf, len)
#define readv(fd, iov, n) box_readv(fd, iov, n)
#define writev(fd, iov, n) box_writev(fd, iov, n)
#define socket(family, type, protocol) box_socket(family, type, protocol)
#define accept(fd, addr, len) box_accept(fd, addr, len)
#define connect(fd, addr, len) box_connect(fd, addr, len)
#define poll(fds, n, timeout) box_poll(fds, n, timeout)
#define ioctl(fd, request, n) (box_called(), ioctl(fd, request, n))
#define close(fd) box_close(fd)
#define getsockopt(fd, level, name, value, len) \
    box_getsockopt(fd, level, name, value, len)
#define setsockopt(...) box_setsockopt(__VA_ARGS__)
#define getsockname(fd, addr, len) box_getsockname(fd, addr, len)
#define fcntl(...) (box_fails(CALL_FCNTL) ? -1 : fcntl(__VA_ARGS__))

#include "engine.c"

#undef clock_gettime
#undef select
#undef epoll_create1
#undef getpid
#undef getrandom
#undef open
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef read
#undef readv
#undef writev
#undef socket
#undef accept
#undef connect
#undef poll
#undef ioctl
#undef close
#undef getsockopt
#undef setsockopt
#undef getsockname
#undef fcntl

#endif
