/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * line - a slow line between two unix sockets
 *
 * `line RATE LISTEN CONNECT` accepts a connection at LISTEN, connects to
 * CONNECT, and passes bytes both ways at RATE bytes per second each, as a
 * serial line does: every byte takes 1/RATE seconds, the line holds at most
 * HELD bytes of a direction, and it takes no more until some have left.
 * When either end goes, so does the other, and it starts over.
 *
 * A direction owns a credit that grows with time while bytes are waiting.  It
 * may lag behind (timers are late), so the rate is kept on the average,
 * but an idle line saves none up.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define HELD   4096                 /* bytes on the line, each way */
#define TICK_S 0.0005               /* no byte leaves before its time, but it */
#define NAP_S  0.00005              /* may be late by TICK_S or NAP_S */

typedef struct Way {
    int in, out;
    char buf[HELD];
    size_t n;                       /* bytes held */
    double credit;                  /* bytes that may leave now */
} Way;

static void die(const char *what)
{
    fprintf(stderr, "line: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static struct sockaddr_un address(const char *path)
{
    struct sockaddr_un sun = { .sun_family = AF_UNIX };

    if (strlen(path) >= sizeof(sun.sun_path)) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(sun.sun_path, path);
    return sun;
}

static int unix_socket(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        die("socket");
    }
    return fd;
}

/* move() - pass on what is due and take what fits; false: an end is gone. */
static bool move(Way *w, double rate, double elapsed)
{
    bool more = true;
    ssize_t r;

    w->credit += w->n ? elapsed * rate : 0;
    while (more) {
        size_t due = w->credit < (double)w->n ? (size_t)w->credit : w->n;

        more = false;
        if (due) {
            r = send(w->out, w->buf, due, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (r < 0 && errno != EAGAIN) {
                return false;
            }
            if (r > 0) {
                w->n -= (size_t)r;
                w->credit -= (double)r;
                memmove(w->buf, w->buf + r, w->n);
            } else {
                w->credit = 0;      /* the reader is late, not the line */
            }
        }
        if (w->n < HELD) {
            r = recv(w->in, w->buf + w->n, HELD - w->n, MSG_DONTWAIT);
            if (!r || (r < 0 && errno != EAGAIN)) {
                return false;
            }
            if (r > 0) {
                w->n += (size_t)r;
                more = w->credit >= 1;
            }
        }
    }
    if (!w->n) {
        w->credit = 0;
    }
    return true;
}

static void pass(int a, int b, double rate)
{
    Way way[2] = { { .in = a, .out = b }, { .in = b, .out = a } };
    double last = now();

    for (;;) {
        struct timespec ts = { 0 };
        struct pollfd p[2];
        double t, tick = TICK_S;

        for (int i = 0; i < 2; i++) {
            double all_out = (double)way[i].n / rate;

            p[i].fd = way[i].in;
            /* a line in use takes more when it has passed something on */
            p[i].events = way[i].n ? 0 : POLLIN;
            tick = way[i].n && all_out < tick ? all_out : tick;
        }
        ts.tv_nsec = (long)((tick > NAP_S ? tick : NAP_S) * 1e9);
        ppoll(p, 2, way[0].n || way[1].n ? &ts : NULL, NULL);
        t = now();
        for (int i = 0; i < 2; i++) {
            if (!move(&way[i], rate, t - last)) {
                return;
            }
        }
        last = t;
    }
}

int main(int argc, char **argv)
{
    double rate = argc == 4 ? atof(argv[1]) : 0;
    int listener = unix_socket();
    struct sockaddr_un sun;

    if (rate <= 0) {
        fprintf(stderr, "usage: line BYTES_PER_SECOND LISTEN CONNECT\n");
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1000);
    sun = address(argv[2]);
    if (bind(listener, (struct sockaddr *)&sun, sizeof(sun)) < 0 ||
        listen(listener, 1) < 0) {
        die(argv[2]);
    }
    sun = address(argv[3]);
    for (;;) {
        int a = accept(listener, NULL, NULL), b = unix_socket();

        if (a >= 0 && !connect(b, (struct sockaddr *)&sun, sizeof(sun))) {
            pass(a, b, rate);
        }
        close(a);
        close(b);
    }
}
