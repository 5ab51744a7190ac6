/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * channel.c - see channel.h
 *
 * The relay opens an end as soon as it can, and again after it was lost.  It
 * reads from an end only while the other is open and has taken all bytes read
 * before, so bytes wait in the sender's socket or device, as they do with QEMU.
 * When an end is lost, the bytes that the relay holds are dropped.  When a lost
 * end was a socket, the other end is closed too, as sockets on a cut cable are,
 * and as QEMU hangs up a virtio port whose host has gone; but a pty stays open.
 * A guest that closes its FIFOs or pty is not noticed, as QEMU doesn't.
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "channel.h"

#define RETRY_MS 10             /* between tries to open an end, ms */
#define RELAY_DRAINED 1         /* asks if end 0 is drained; + 1: end 1 */

/* An end, in the relay's process */
typedef struct End {
    RelayEnd set;               /* what relay_start() was given */
    int listener;               /* listening socket; -1: not RELAY_LISTEN */
    int in;                     /* descriptor to read; -1: not open */
    int out;                    /* descriptor to write, equals in but for FIFOs;
                                   -1: not open */
    char buf[65536];            /* bytes read from this end, for the other */
    size_t start;               /* index in buf of the first byte to write */
    size_t end;                 /* index in buf after the last one; 0: none */
    bool stalled;               /* a command has stalled this end */
    bool away;                  /* RELAY_AWAY keeps this end closed */
    int64_t quiet;              /* the end is not read before this time, ms */
} End;

/* ------------------------------------------------------------------------ */
/* The child                                                                */
/* ------------------------------------------------------------------------ */

static bool is_socket(const End *e)
{
    return e->set.kind == RELAY_LISTEN || e->set.kind == RELAY_CONNECT;
}

static void end_close(End *e, End *other)
{
    if (e->in >= 0) {
        close(e->in);
    }
    if (e->out >= 0 && e->out != e->in) {
        close(e->out);
    }
    e->in = e->out = -1;
    e->start = e->end = 0;
    other->start = other->end = 0;
    if (is_socket(e) && other->in >= 0 && other->set.kind != RELAY_PTY) {
        end_close(other, e);
    }
}

static int fifo_open(const End *e, const char *suffix, int flags)
{
    char path[PATH_LEN + 8];

    snprintf(path, sizeof(path), "%s%s", e->set.path, suffix);
    return open(path, flags | O_NONBLOCK);
}

/*
 * end_open() - try to open an end; in and out stay -1 if it can't be opened
 *
 * The relay reads PATH.out, because the daemon writes it, and writes PATH.in.
 */
static void end_open(End *e)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };

    switch (e->set.kind) {
    case RELAY_LISTEN:
        e->in = e->out = accept(e->listener, NULL, NULL);
        break;
    case RELAY_CONNECT:
        memcpy(un.sun_path, e->set.path, sizeof(un.sun_path));
        e->in = e->out = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(e->in, (struct sockaddr *)&un, sizeof(un)) < 0) {
            close(e->in);
            e->in = e->out = -1;
        }
        break;
    case RELAY_FIFO:
        if (e->in < 0) {
            e->in = fifo_open(e, ".out", O_RDONLY);
        }
        if (e->out < 0) {
            e->out = fifo_open(e, ".in", O_WRONLY);
        }
        break;
    case RELAY_PTY:
        e->in = e->out = dup(e->set.master);
        break;
    }
    if (e->in >= 0) {
        set_nonblocking(e->in);
    }
}

static bool end_is_open(const End *e)
{
    return e->in >= 0 && e->out >= 0;
}

/* end_read() - read into e->buf; returns false when the end is lost */
static bool end_read(End *e, int64_t now)
{
    ssize_t n = read(e->in, e->buf, sizeof(e->buf));

    if (n > 0) {
        e->end = (size_t)n;
    } else if (n == 0 || errno != EAGAIN) {
        if (is_socket(e)) {
            return false;
        }
        e->quiet = now + RETRY_MS;      /* because no daemon has it open */
    }
    return true;
}

/* end_write() - write what src->buf holds; returns false when e is lost */
static bool end_write(End *e, End *src)
{
    ssize_t n = write(e->out, src->buf + src->start, src->end - src->start);

    if (n >= 0) {
        src->start += (size_t)n;
        if (src->start == src->end) {
            src->start = src->end = 0;
        }
    } else if (errno != EAGAIN) {
        if (e->set.kind == RELAY_PTY) { /* bytes to a closed line are lost */
            src->start = src->end = 0;
            return true;
        }
        return false;
    }
    return true;
}

/* end_drained() - whether neither relay nor kernel has bytes for e's daemon */
static bool end_drained(const End *e, const End *other)
{
    int queued = 0, rc;

    if (!end_is_open(e) || other->end != 0) {
        return false;
    }
    rc = is_socket(e) ? ioctl(e->out, TIOCOUTQ, &queued)
                      : ioctl(e->out, FIONREAD, &queued);
    return rc == 0 && queued == 0;
}

static void relay_obey(End e[2], int control)
{
    char c;

    if (read(control, &c, 1) <= 0) {
        _exit(0);
    }
    if (c == RELAY_DRAINED || c == RELAY_DRAINED + 1) {
        c = end_drained(&e[c - RELAY_DRAINED], &e[1 - (c - RELAY_DRAINED)]);
        if (write(control, &c, 1) != 1) {
            _exit(0);
        }
        return;
    }
    e[0].stalled = c == RELAY_STALL || c == RELAY_STALL_0;
    e[1].stalled = c == RELAY_STALL || c == RELAY_STALL_1;
    e[0].away = c == RELAY_AWAY;
    if (c == RELAY_CUT || c == RELAY_AWAY) {
        end_close(&e[0], &e[1]);
    }
    if (c == RELAY_CUT) {
        end_close(&e[1], &e[0]);
    }
    if (write(control, &c, 1) != 1) {
        _exit(0);
    }
}

/* relay_turn() - open closed ends, poll(), read and write each end once */
static void relay_turn(End e[2], int control)
{
    struct pollfd p[5] = { { .fd = control, .events = POLLIN } };
    int64_t now = now_ms();
    int timeout = -1;

    for (int i = 0; i < 2; i++) {
        End *other = &e[1 - i];
        struct pollfd *in = &p[1 + i], *out = &p[3 + i];

        in->fd = out->fd = -1;
        if (!end_is_open(&e[i]) && !e[i].away &&
            (e[i].set.kind != RELAY_FIFO || end_is_open(other))) {
            end_open(&e[i]);
        }
        if (!end_is_open(&e[i]) || !end_is_open(other)) {
            timeout = RETRY_MS;
        } else {
            if (!e[i].stalled && e[i].end == 0 && e[i].quiet <= now) {
                in->fd = e[i].in;
                in->events = POLLIN;
            }
            if (other->end > 0 && !other->stalled) {
                out->fd = e[i].out;
                out->events = POLLOUT;
            }
            if (e[i].quiet > now) {
                timeout = RETRY_MS;
            }
        }
    }
    if (poll(p, 5, timeout) < 0) {
        _exit(1);
    }
    now = now_ms();
    for (int i = 0; i < 2; i++) {
        if (p[1 + i].revents && end_is_open(&e[i]) &&
            !end_read(&e[i], now)) {
            end_close(&e[i], &e[1 - i]);
        }
        if (p[3 + i].revents && end_is_open(&e[i]) && e[1 - i].end > 0 &&
            !end_write(&e[i], &e[1 - i])) {
            end_close(&e[i], &e[1 - i]);
        }
    }
    if (p[0].revents) {
        relay_obey(e, control);
    }
}

/* ------------------------------------------------------------------------ */
/* For the test                                                             */
/* ------------------------------------------------------------------------ */

void relay_pty(RelayEnd *end)
{
    const char *name;

    end->kind = RELAY_PTY;
    end->master = posix_openpt(O_RDWR | O_NOCTTY);
    ck_assert_msg(end->master >= 0 && grantpt(end->master) == 0 &&
                  unlockpt(end->master) == 0, "pty: %s", strerror(errno));
    fcntl(end->master, F_SETFD, FD_CLOEXEC);
    name = ptsname(end->master);
    ck_assert_ptr_nonnull(name);
    text_format(end->path, sizeof(end->path), "%s", name);
}

void relay_start(Relay *r, const RelayEnd ends[2])
{
    static End e[2];
    int pair[2];
    int keep[4];
    size_t n_keep = 0;

    ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    fcntl(pair[0], F_SETFD, FD_CLOEXEC);
    fcntl(pair[1], F_SETFD, FD_CLOEXEC);
    keep[n_keep++] = pair[1];
    for (int i = 0; i < 2; i++) {
        memset(&e[i], 0, sizeof(e[i]));
        e[i].set = ends[i];
        e[i].in = e[i].out = e[i].listener = -1;
        if (ends[i].kind == RELAY_LISTEN) {
            e[i].listener = listen_on(ends[i].path, 5);
            set_nonblocking(e[i].listener);
            keep[n_keep++] = e[i].listener;
        } else if (ends[i].kind == RELAY_PTY) {
            keep[n_keep++] = ends[i].master;
        }
    }
    r->pid = fork();
    ck_assert(r->pid >= 0);
    if (r->pid == 0) {
        child_fds(keep, n_keep);
        for (;;) {
            relay_turn(e, pair[1]);
        }
    }
    child_add(r->pid);
    close(pair[1]);
    r->control = pair[0];
    for (int i = 0; i < 2; i++) {
        if (e[i].listener >= 0) {
            close(e[i].listener);
        }
    }
}

/* relay_ask() - send the relay a byte; returns the byte that it answers */
static char relay_ask(Relay *r, int question)
{
    struct pollfd pfd = { .fd = r->control, .events = POLLIN };
    char c = (char)question;

    ck_assert(write(r->control, &c, 1) == 1);
    ck_assert_msg(poll(&pfd, 1, WAIT_MS) == 1 && read(r->control, &c, 1) == 1,
                  "the relay is stuck");
    return c;
}

void relay_tell(Relay *r, RelayCommand command)
{
    relay_ask(r, (int)command);
}

void relay_drained(Relay *r, int end)
{
    int64_t give_up = now_ms() + WAIT_MS;

    while (!relay_ask(r, RELAY_DRAINED + end)) {
        ck_assert_msg(now_ms() < give_up, "a daemon has stopped reading its "
                      "channel");
        sleep_ms(10);
    }
}

const char *channel_kind_name(ChannelKind kind)
{
    static const char *const names[] = {
        "unix", "tcp", "virtserial", "isaserial", "fd", "qemu-virtserial",
        "qemu-isaserial", "cable",
    };

    return names[kind];
}

static void make_fifos(const char *path)
{
    char fifo[PATH_LEN + 8];

    for (int i = 0; i < 2; i++) {
        text_format(fifo, sizeof(fifo), "%s%s", path, i ? ".out" : ".in");
        ck_assert_msg(mkfifo(fifo, 0600) == 0, "%s: %s", fifo,
                      strerror(errno));
    }
}

void channel_make(Channel *c, ChannelKind kind, const char *name)
{
    RelayEnd ends[2];
    char path[PATH_LEN], other[PATH_LEN + 8], target[PATH_LEN + 8];
    int port, pair[2];

    memset(c, 0, sizeof(*c));
    memset(ends, 0, sizeof(ends));
    file_path(path, name);
    switch (kind) {
    case CHANNEL_UNIX:
        text_format(c->option[0], TEXT_LEN, "unix-connect:%s:-", path);
        text_format(c->option[1], TEXT_LEN, "unix-listen:%s:-", path);
        return;
    case CHANNEL_TCP:
        port = free_port();
        text_format(c->option[0], TEXT_LEN, "tcp-connect:127.0.0.1:%d", port);
        text_format(c->option[1], TEXT_LEN, "tcp-listen:127.0.0.1:%d", port);
        return;
    case CHANNEL_VIRTSERIAL:
        make_fifos(path);
        for (int i = 0; i < 2; i++) {
            text_format(target, sizeof(target), "%s.%s", path,
                        i ? "out" : "in");
            text_format(other, sizeof(other), "%s-b.%s", path,
                        i ? "in" : "out");
            ck_assert(symlink(target, other) == 0);
        }
        text_format(c->option[0], TEXT_LEN, "virtserial-open:%s:-", path);
        text_format(c->option[1], TEXT_LEN, "virtserial-open:%s-b:-", path);
        return;
    case CHANNEL_ISASERIAL:
        relay_pty(&ends[0]);
        relay_pty(&ends[1]);
        text_format(c->option[0], TEXT_LEN, "isaserial-open:%s:-",
                    ends[0].path);
        text_format(c->option[1], TEXT_LEN, "isaserial-open:%s:115200",
                    ends[1].path);
        break;
    case CHANNEL_FD:
        ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        for (int i = 0; i < 2; i++) {
            fcntl(pair[i], F_SETFD, FD_CLOEXEC);
            c->start[i].keep_fd = pair[i];
            text_format(c->option[i], TEXT_LEN, "fd:%d:-", pair[i]);
        }
        return;
    case CHANNEL_QEMU_VIRTSERIAL:
    case CHANNEL_QEMU_ISASERIAL:
        ends[0].kind = RELAY_LISTEN;
        text_format(ends[0].path, PATH_LEN, "%s", path);
        text_format(c->option[0], TEXT_LEN, "unix-connect:%s:-", path);
        if (kind == CHANNEL_QEMU_ISASERIAL) {
            relay_pty(&ends[1]);
            text_format(c->option[1], TEXT_LEN, "isaserial-open:%s:115200",
                        ends[1].path);
        } else {
            ends[1].kind = RELAY_FIFO;
            text_format(ends[1].path, PATH_LEN, "%s/%s-port", vp_dir, name);
            make_fifos(ends[1].path);
            text_format(c->option[1], TEXT_LEN, "virtserial-open:%s:-",
                        ends[1].path);
        }
        break;
    case CHANNEL_CABLE:
        ends[0].kind = RELAY_LISTEN;
        ends[1].kind = RELAY_CONNECT;
        text_format(ends[0].path, PATH_LEN, "%s", path);
        text_format(ends[1].path, PATH_LEN, "%s/%s-far", vp_dir, name);
        text_format(c->option[0], TEXT_LEN, "unix-connect:%s:-", path);
        text_format(c->option[1], TEXT_LEN, "unix-listen:%s:-",
                    ends[1].path);
        break;
    }
    relay_start(&c->relay, ends);
}

void pair_start(Pair *p, ChannelKind kind, const char *host_options,
                const char *guest_options)
{
    Channel *c = &p->channel;

    channel_make(c, kind, "channel");
    p->host = daemon_start_with(&c->start[0], "host", "-c %s %s",
                                c->option[0], host_options);
    p->guest = daemon_start_with(&c->start[1], "guest", "-c %s %s",
                                 c->option[1], guest_options);
    for (int i = 0; i < 2; i++) {
        if (c->start[i].keep_fd > 0) {
            close(c->start[i].keep_fd); /* else no daemon sees the other end */
        }
    }
    daemon_up(p->host);
    daemon_up(p->guest);
}
