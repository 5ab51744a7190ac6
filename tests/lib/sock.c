/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sock.c - see sock.h
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "box.h"
#include "sock.h"

void fd_nonblock(int fd)
{
    box_require(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
}

void fd_pair(int fd[2])
{
    box_require(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    fd_nonblock(fd[0]);
    fd_nonblock(fd[1]);
}

void tcp_pair(int fd[2])
{
    VPAddr addr;
    int listener = tcp_listen(&addr, 1);

    fd[0] = socket(AF_INET, SOCK_STREAM, 0);
    box_require(connect(fd[0], (struct sockaddr *)&addr.ss, addr.len) == 0);
    /* the kernel may be busy: connect() doesn't wait for the other side */
    box_require(poll(&(struct pollfd){ listener, POLLIN, 0 }, 1, 60000) == 1);
    fd[1] = accept(listener, NULL, NULL);
    box_require(fd[1] >= 0);
    close(listener);
    fd_nonblock(fd[0]);
    fd_nonblock(fd[1]);
}

/* listen_at() - @len bytes of @addr are set; the kernel picks the rest */
static int listen_at(VPAddr *addr, socklen_t len, int backlog)
{
    struct sockaddr *sa = (struct sockaddr *)&addr->ss;
    int fd = socket(sa->sa_family, SOCK_STREAM, 0);

    box_require(fd >= 0 && bind(fd, sa, len) == 0 &&
                listen(fd, backlog) == 0);
    addr->len = sizeof(addr->ss);
    box_require(getsockname(fd, sa, &addr->len) == 0);
    fd_nonblock(fd);
    return fd;
}

int tcp_listen(VPAddr *addr, int backlog)
{
    struct sockaddr_in *sin = (struct sockaddr_in *)&addr->ss;

    memset(addr, 0, sizeof(*addr));
    sin->sin_family = AF_INET;
    sin->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return listen_at(addr, sizeof(*sin), backlog);
}

int unix_listen(VPAddr *addr, int backlog)
{
    memset(addr, 0, sizeof(*addr));
    addr->ss.ss_family = AF_UNIX;
    return listen_at(addr, sizeof(addr->ss.ss_family), backlog);
}

void fd_write(int fd, const void *data, size_t len)
{
    box_require(send(fd, data, len, MSG_NOSIGNAL) == (ssize_t)len);
}

int fd_state(int fd)
{
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_PEEK);

    if (n >= 0) {
        return n > 0 ? FD_OPEN : FD_EOF;
    }
    return errno == EAGAIN || errno == EWOULDBLOCK ? FD_OPEN : errno;
}
