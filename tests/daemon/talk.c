/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * talk.c - see talk.h
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "talk.h"

void through(const char *where, int listener, int fds[2])
{
    fds[0] = dial(where, true);
    fds[1] = accept_one(listener);
}

void talk(const int fds[2])
{
    send_all(fds[0], "question", 8);
    expect_bytes(fds[1], "question");
    send_all(fds[1], "answer", 6);
    expect_bytes(fds[0], "answer");
}

void check_works(const char *where, int listener)
{
    int fds[2];

    through(where, listener, fds);
    talk(fds);
    close(fds[0]);
    expect_eof(fds[1]);
    close(fds[1]);
}

void check_refused(const char *where)
{
    int fd = dial(where, false), error = 0;
    struct pollfd pfd = { .fd = fd, .events = POLLOUT };
    socklen_t len = sizeof(error);

    ck_assert(poll(&pfd, 1, WAIT_MS) == 1);
    ck_assert(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
    ck_assert_msg(error == ECONNREFUSED, "connecting to %s: %s", where,
                  strerror(error));
    close(fd);
}

void expect_broken(int fd)
{
    int64_t end = now_ms() + WAIT_MS;

    while (send(fd, "x", 1, MSG_NOSIGNAL) == 1) {
        ck_assert_msg(now_ms() < end, "no reset");
        sleep_ms(5);
    }
    ck_assert_msg(errno == EPIPE || errno == ECONNRESET, "send: %s",
                  strerror(errno));
}
