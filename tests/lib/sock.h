/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sock.h - sockets for an engine in the same process
 *
 * All are non-blocking.  What goes wrong here fails the test.
 */
#ifndef SOCK_H
#define SOCK_H

#include "virtproxy.h"

void fd_nonblock(int fd);

/* fd_pair() - two connected unix sockets */
void fd_pair(int fd[2]);

/* tcp_pair() - two connected TCP sockets, which know what a reset is */
void tcp_pair(int fd[2]);

/* tcp_listen() - at a free port of the loopback; @addr says which */
int tcp_listen(VPAddr *addr, int backlog);

/* unix_listen() - at an address without a file; @addr says which */
int unix_listen(VPAddr *addr, int backlog);

/* fd_write() - all of it at once */
void fd_write(int fd, const void *data, size_t len);

/* What a socket's other side did; else it is an errno value */
enum { FD_OPEN = -1, FD_EOF = 0 };

/* fd_state() - as recv() tells it; an error is told once */
int fd_state(int fd);

#endif
