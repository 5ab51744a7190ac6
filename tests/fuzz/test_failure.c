/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_failure.c - the n-th call fails
 *
 * Two engines with a channel between them, in one loop and in the box (see
 * engine.c), carry connections both of whose ends are here: clients say
 * something, the target says it back.  In each run one call of a kind fails:
 * the n-th, for all n up to where none is left to fail.  Whatever that does
 * to a connection, it must be seen: one that ends in order has got all its
 * bytes, and no byte is a wrong one.  Afterwards all works as if nothing had
 * been, and no memory is lost.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/lib/bytes.h"
#include "tests/lib/log.h"
#include "tests/lib/pair.h"
#include "tests/lib/sock.h"
#include "tests/lib/suite.h"
#include "fuzz.h"

#define STEP_US 3000
#define STEPS 3000              /* against hanging: 9 s of the box's time */
#define CLIENTS_MAX 70          /* more than a hash table has room for */

typedef struct Client {
    int fd;                     /* -1: ended */
    size_t len;                 /* to send, and to get back */
    size_t sent;
    size_t got;
    bool whole;                 /* got it all, and its end */
    bool shut;
} Client;

/* The target's side of a connection: a small echo. */
typedef struct Echo {
    int fd;                     /* -1: none */
    unsigned char buf[8192];
    size_t off, len;
    bool eof;
} Echo;

typedef struct Scene {
    Pair pair;
    VPAddr oforward;            /* what clients connect to */
    Client clients[CLIENTS_MAX];
    int n;
    Echo echoes[2 * CLIENTS_MAX];
} Scene;

static void scene_new(Scene *s)
{
    static const VPConfig config = {
        .grace = 30, .max_conns = 100, .max_half_open = 100,
        .max_opens = 1000000,
    };

    box_reset(true);
    log_clear();
    pair_new_direct(&s->pair, &config);
    ck_assert_int_eq(vp_set_oforward(s->pair.drv[0],
                                     tcp_listen(&s->oforward, 100), "s"), 0);
    for (int i = 0; i < 2 * CLIENTS_MAX; i++) {
        s->echoes[i].fd = -1;
    }
}

static void scene_free(Scene *s)
{
    box.calls = 0;
    pair_free(&s->pair);
    for (int i = 0; i < 2 * CLIENTS_MAX; i++) {
        if (s->echoes[i].fd >= 0) {
            close(s->echoes[i].fd);
        }
    }
}

static void client_add(Scene *s, size_t len)
{
    Client *c = &s->clients[s->n];

    ck_assert_int_lt(s->n, CLIENTS_MAX);
    *c = (Client){ .fd = socket(AF_INET, SOCK_STREAM, 0), .len = len };
    ck_assert(connect(c->fd, (struct sockaddr *)&s->oforward.ss,
                      s->oforward.len) == 0);
    fd_nonblock(c->fd);
    s->n++;
}

static void client_run(Client *c, int number)
{
    unsigned char buf[8192];
    ssize_t n = 1;

    while (c->sent < c->len && n > 0) { /* an error is told only once */
        size_t len = c->len - c->sent < sizeof(buf) ? c->len - c->sent
                                                    : sizeof(buf);

        bytes_fill(buf, len, (uint64_t)number, c->sent);
        n = send(c->fd, buf, len, MSG_NOSIGNAL);
        c->sent += n > 0 ? (size_t)n : 0;
    }
    if (n < 0 && errno != EAGAIN) {
        close(c->fd);
        c->fd = -1;
        return;
    }
    if (c->sent == c->len && !c->shut) {
        shutdown(c->fd, SHUT_WR);
        c->shut = true;
    }
    while ((n = recv(c->fd, buf, sizeof(buf), 0)) > 0) {
        size_t right = bytes_right(buf, (size_t)n, (uint64_t)number, c->got);

        check_that(right == (size_t)n, "client %d: wrong byte at %zu", number,
                   c->got + right);
        c->got += (size_t)n;
    }
    if (n == 0) {
        ck_assert_msg(c->got == c->len, "client %d: a clean end after %zu "
                      "bytes of %zu", number, c->got, c->len);
        c->whole = true;
    }
    if (n == 0 || errno != EAGAIN) {
        close(c->fd);
        c->fd = -1;
    }
}

static void echo_end(Echo *e, bool reset)
{
    struct linger linger = { 1, 0 };

    if (reset) {
        setsockopt(e->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
    }
    close(e->fd);
    e->fd = -1;
}

static void echo_run(Echo *e)
{
    for (;;) {
        ssize_t n;

        if (e->len > 0) {
            n = send(e->fd, e->buf + e->off, e->len, MSG_NOSIGNAL);
            if (n > 0) {
                e->off += (size_t)n;
                e->len -= (size_t)n;
                continue;
            }
        } else if (e->eof) {
            echo_end(e, false);
            return;
        } else {
            e->off = 0;
            n = recv(e->fd, e->buf, sizeof(e->buf), 0);
            e->len = n > 0 ? (size_t)n : 0;
            e->eof = n == 0;
            if (n >= 0) {
                continue;
            }
        }
        if (errno != EAGAIN) {
            echo_end(e, true);
        }
        return;
    }
}

static void echo_accept(Scene *s)
{
    int fd = 0;

    for (int i = 0; i < 2 * CLIENTS_MAX && fd >= 0; i++) {
        Echo *e = &s->echoes[i];

        if (e->fd < 0) {
            fd = accept(s->pair.listener, NULL, NULL);
        }
        if (e->fd < 0 && fd >= 0) {
            *e = (Echo){ .fd = fd };
            fd_nonblock(fd);
        }
    }
}

/* scene_run() - until every client has ended */
static void scene_run(Scene *s)
{
    int open = 1;

    for (int i = 0; open > 0; i++) {
        ck_assert_msg(i < STEPS, "%d clients hang", open);
        open = 0;
        pair_plug(&s->pair);
        box_run(s->pair.loop, STEP_US);
        /* nobody reads at first, so that all buffers fill */
        if (i > 5) {
            echo_accept(s);
            for (int k = 0; k < 2 * CLIENTS_MAX; k++) {
                if (s->echoes[k].fd >= 0) {
                    echo_run(&s->echoes[k]);
                }
            }
        }
        for (int k = 0; k < s->n; k++) {
            if (s->clients[k].fd >= 0 && (i > 8 || i == 0)) {
                client_run(&s->clients[k], k);
            }
            open += s->clients[k].fd >= 0;
        }
    }
}

/* serve() - so many clients at once; true if a call has failed meanwhile */
static bool serve(Scene *s, int clients)
{
    s->n = 0;
    for (int i = 0; i < clients; i++) {
        client_add(s, i % 3 == 0 ? 40000 : i % 3 == 1 ? 700 : 0);
    }
    scene_run(s);
    return box.fails == 0;
}

/* all_works() - as if nothing had been */
static void all_works(Scene *s)
{
    box.calls = 0;
    s->n = 0;
    client_add(s, 5000);
    scene_run(s);
    ck_assert_msg(s->clients[0].whole, "after a failure nothing works");
}

/* run() - engines whose n-th call of a kind fails; false: there is none */
static bool run(unsigned call, int err, unsigned n, int clients)
{
    static Scene s;
    bool failed;

    scene_new(&s);
    box_fail(call, err, n, 1);
    failed = serve(&s, clients);
    all_works(&s);
    scene_free(&s);
    return failed;
}

/* every_nth() - fails if there were fewer than @least of them */
static void every_nth(unsigned call, int err, int clients, unsigned least)
{
    unsigned n = 0;

    while (run(call, err, n, clients)) {
        n++;
    }
    ck_assert_uint_ge(n, least);
}

/* Of engines that have just started */
START_TEST(memory)
{
    every_nth(CALL_ALLOC, ENOMEM, CLIENTS_MAX, 140);
}
END_TEST

/*
 * Of engines that have served many: each of the first LATER.  One pair has
 * every GAP-th of them fail, so that it lives on for long after a failure, and
 * GAP pairs have them all.
 */
#define LATER 2500
#define GAP 40

START_TEST(memory_later)
{
    static Scene s;

    scene_new(&s);
    for (int n = _i; n < LATER; n += GAP) {
        bool failed = false;

        box_fail(CALL_ALLOC, ENOMEM, n == _i ? (unsigned)_i : GAP - 1, 1);
        for (int i = 0; i < GAP && !failed; i++) {
            failed = serve(&s, 5);
        }
        ck_assert(failed);
        all_works(&s);
    }
    scene_free(&s);
}
END_TEST

static const struct {
    unsigned call;
    int err;
    unsigned least;
} calls[] = {
    { CALL_SOCKET, EMFILE, 6 }, { CALL_SOCKET, ENOBUFS, 6 },
    { CALL_ACCEPT, EMFILE, 6 }, { CALL_ACCEPT, ECONNABORTED, 6 },
    { CALL_ACCEPT, ENOMEM, 6 }, { CALL_ACCEPT, EINTR, 6 },
    { CALL_CONNECT, ECONNREFUSED, 6 }, { CALL_CONNECT, EAGAIN, 6 },
    { CALL_CONNECT, ENETUNREACH, 6 }, { CALL_CONNECT, ENOMEM, 6 },
    { CALL_FCNTL, ENOMEM, 12 },
    { CALL_READ, EINTR, 30 }, { CALL_READ, EAGAIN, 30 },
    { CALL_READ, ECONNRESET, 30 }, { CALL_READ, EIO, 30 },
    { CALL_READ, ENOMEM, 30 }, { CALL_READ, 0, 30 },
    { CALL_WRITE, EINTR, 30 }, { CALL_WRITE, EAGAIN, 30 },
    { CALL_WRITE, EIO, 30 }, { CALL_WRITE, ENOMEM, 30 },
    { CALL_WRITE, 0, 30 },
};

START_TEST(call)
{
    every_nth(calls[_i].call, calls[_i].err, 6, calls[_i].least);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("failure");

    suite_set(300, NULL, NULL);
    SUITE_ADD(s, memory);
    SUITE_LOOP(s, memory_later, GAP);
    SUITE_ROWS(s, call, calls);
    return suite_run(s);
}
