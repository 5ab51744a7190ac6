/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sock.h - sockets for an engine in the same process
 *
 * All sockets made here are non-blocking.  A call that fails fails the test.
 */
#ifndef SOCK_H
#define SOCK_H

#include "virtproxy.h"

void fd_nonblock(int fd);

/* fd_pair() - make two connected unix sockets */
void fd_pair(int fd[2]);

/* tcp_pair() - make two connected TCP sockets, for tests that need resets */
void tcp_pair(int fd[2]);

/* tcp_listen() - listen on a free port of 127.0.0.1; fills in @addr */
int tcp_listen(VPAddr *addr, int backlog);

/* unix_listen() - listen on a free abstract address; fills in @addr */
int unix_listen(VPAddr *addr, int backlog);

/* fd_write() - write all @len bytes in one call */
void fd_write(int fd, const void *data, size_t len);

/* What fd_state() returns for a socket without an error */
enum { FD_OPEN = -1, FD_EOF = 0 };

/*
 * fd_state() - look at a socket, without reading from it
 *
 * Returns FD_OPEN if bytes may come, FD_EOF at their end, else an errno value,
 * which the kernel tells once.
 */
int fd_state(int fd);

#endif
