/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * calls.h - what stands in for the engine's system calls
 *
 * Each does what its namesake does, on the machine that runs (sim_on), or
 * for real if none does.
 */
#ifndef CALLS_H
#define CALLS_H

#include <poll.h>
#include <stddef.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

int sim_clock_gettime(clockid_t clock, struct timespec *ts);
pid_t sim_getpid(void);
void *sim_malloc(size_t size);
void *sim_calloc(size_t n, size_t size);
void *sim_realloc(void *p, size_t size);
void sim_free(void *p);
ssize_t sim_getrandom(void *buf, size_t len, unsigned flags);
int sim_close(int fd);
ssize_t sim_read(int fd, void *buf, size_t len);
ssize_t sim_readv(int fd, const struct iovec *iov, int n);
ssize_t sim_write(int fd, const void *buf, size_t len);
ssize_t sim_writev(int fd, const struct iovec *iov, int n);
int sim_shutdown(int fd, int how);
int sim_fcntl(int fd, int cmd, ...);
int sim_socket(int family, int type, int protocol);
int sim_accept(int fd, struct sockaddr *addr, socklen_t *len);
int sim_connect(int fd, const struct sockaddr *addr, socklen_t len);
int sim_setsockopt(int fd, int level, int name, const void *value,
                   socklen_t len);
int sim_getsockopt(int fd, int level, int name, void *value, socklen_t *len);
int sim_getsockname(int fd, struct sockaddr *addr, socklen_t *len);
int sim_getpeername(int fd, struct sockaddr *addr, socklen_t *len);
int sim_poll(struct pollfd *fds, nfds_t n, int timeout);
int sim_select(int n, fd_set *r, fd_set *w, fd_set *e,
               struct timeval *timeout);

#endif
