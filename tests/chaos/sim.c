/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sim.c - a simulated machine: memory, descriptors, sockets, select(), log
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "calls.h"
#include "sim.h"

/* Passes without a byte moved that mean a loop spins. */
#define VAIN_MAX 20000
/* Passes until the others have a turn, too. */
#define TURN_MAX 8
#define CONNECT_US (50 * MS)
/* No machine's descriptors are as low as this: it would be a mistake. */
#define FD_FIRST 4

World world;
Machine *machine[2];
Machine *sim_on;

/* ---- chance ------------------------------------------------------------- */

uint64_t mix(uint64_t x)
{
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ull;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ull;
    return x ^ x >> 32;
}

uint64_t rng(void)
{
    world.rng += 0x9e3779b97f4a7c15ull;
    return mix(world.rng);
}

uint32_t rnd(uint32_t n)
{
    return n == 0 ? 0 : (uint32_t)(rng() % n);
}

uint32_t rnd_log(uint32_t lo, uint32_t hi)
{
    uint32_t top = lo, bits = 0;

    while (top < hi && top < UINT32_MAX / 2) {
        top *= 2;
        bits++;
    }
    top = lo << rnd(bits + 1);
    top += rnd(top);
    return top < hi ? top : hi;
}

bool chance(unsigned per_mille)
{
    return per_mille > 0 && rnd(1000) < per_mille;
}

/* ---- buffers ------------------------------------------------------------ */

uint32_t buf_room(const Buf *b)
{
    return b->cap - b->len;
}

void buf_put(Buf *b, const void *data, uint32_t len)
{
    uint32_t at = (b->off + b->len) % b->cap;
    uint32_t part = len < b->cap - at ? len : b->cap - at;

    SIM_ASSERT(len <= buf_room(b));
    memcpy(b->data + at, data, part);
    memcpy(b->data, (const uint8_t *)data + part, len - part);
    b->len += len;
}

uint32_t buf_get(Buf *b, void *data, uint32_t len)
{
    uint32_t part;

    len = len < b->len ? len : b->len;
    part = len < b->cap - b->off ? len : b->cap - b->off;
    if (len == 0) {
        return 0;
    }
    if (data != NULL) {
        memcpy(data, b->data + b->off, part);
        memcpy((uint8_t *)data + part, b->data, len - part);
    }
    b->len -= len;
    b->off = b->len > 0 ? (b->off + len) % b->cap : 0;
    return len;
}

/* ---- log ---------------------------------------------------------------- */

/* log_check() - what the engine says tells the oracle, too */
static void log_check(VPLogLevel level, const char *line, Machine *m)
{
    if (level == VP_LOG_ERROR || strstr(line, "breaks the protocol") ||
        strstr(line, "out of memory") ||
        (strstr(line, "set back in time") && !world.throws) ||
        (strstr(line, "too many connections") &&
         world.config.max_conns >= SIM_SOCKS)) {
        sim_fail("the engine says: %s", line);
    }
    if (strstr(line, "no channel for") ||
        strstr(line, "no session, and --grace")) {
        if (world.kind[m->index] == VP_CHN_SOCKET &&
            strstr(line, "session ended") &&
            (m->channel >= 0 || m->down_before + machine_now(m) -
             m->down_since < world.config.grace * SECOND)) {
            sim_fail("grace ended too early: %s", line);
        }
        world_break();
    }
    if (strstr(line, "set back in time")) {
        /* what began after that, before it was noticed, ends, too */
        world_break();
    }
    world.timed_out |= strstr(line, "timed out") != NULL;
    if (strstr(line, "channel up: ")) {
        m->down_before = 0;
    }
    if (strstr(line, "channel up: new session")) {
        world.unsettled[m->index] = false;
    }
}

static bool log_before(char *prefix, size_t size)
{
    if (sim_on != NULL && !sim_on->ghost) {
        snprintf(prefix, size, "%10.6f %c ", (double)world.now / SECOND,
                 'A' + sim_on->index);
    }
    return sim_on == NULL || !sim_on->ghost;
}

static void log_after(VPLogLevel level, const char *line)
{
    static int verbose = -1;

    if (verbose < 0) {
        verbose = getenv("VERBOSE") != NULL;
    }
    if (verbose || (sim_on == NULL && level <= VP_LOG_INFO)) {
        fprintf(stderr, "%s\n", line);
    }
    if (sim_on != NULL) {
        log_check(level, line, sim_on);
    }
}

void sim_log(void)
{
    log_hooks(log_before, log_after);
    log_clear();
}

void sim_note(const char *fmt, ...)
{
    char text[200];
    int n = snprintf(text, sizeof(text), "%10.6f ***  ",
                     (double)world.now / SECOND);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text + n, sizeof(text) - (size_t)n, fmt, ap);
    va_end(ap);
    log_line(VP_LOG_DEBUG, VP_NO_CHANNEL, text);
}

void sim_fail(const char *fmt, ...)
{
    char why[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(why, sizeof(why), fmt, ap);
    va_end(ap);
    sim_on = NULL;
    fprintf(stderr, "%s: at %.6f s: %s\n", world.what,
            (double)world.now / SECOND, why);
    log_tail(60);
    for (int i = 0; i < 2 && machine[i] != NULL; i++) {
        fprintf(stderr, "machine %c, paused until %.6f s\n", 'A' + i,
                (double)machine[i]->paused_until / SECOND);
        if (machine[i]->alive) {
            engine_dump(machine[i]->drv);
        }
    }
    ck_abort_msg("%s: at %.6f s: %s", world.what,
                 (double)world.now / SECOND, why);
    abort(); /* libcheck doesn't say that it never returns */
}

/* ---- memory ------------------------------------------------------------- */

/* Before each block: its size as an index of free_list. */
#define HEADER 16

uint64_t machine_now(const Machine *m)
{
    return machine_stopped(m) ? m->stopped_at : world.now - m->skew;
}

bool machine_stopped(const Machine *m)
{
    return m->stopped_at != 0 && world.now < m->paused_until;
}

void machine_stop(Machine *m, uint64_t time)
{
    if (!machine_stopped(m)) {
        m->stopped_at = machine_now(m);
        m->paused_until = world.now;
    }
    m->paused_until += time;
    m->skew += time;
}

static unsigned size_class(size_t size)
{
    unsigned class = 5;

    while (((size_t)1 << class) < size + HEADER) {
        class++;
    }
    return class;
}

void *machine_alloc(Machine *m, size_t size)
{
    unsigned class = size_class(size);
    uint8_t *p;

    if (!m->own_memory) {
        return malloc(size);
    }
    p = m->free_list[class];
    if (p != NULL) {
        memcpy(&m->free_list[class], p + HEADER, sizeof(void *));
    } else {
        p = (uint8_t *)m + m->used;
        m->used += (size_t)1 << class;
        SIM_ASSERT(m->used <= SIM_MEMORY);
    }
    *p = (uint8_t)class;
    return p + HEADER;
}

void machine_free(Machine *m, void *p)
{
    uint8_t *block = p;

    if (!m->own_memory) {
        free(p);
    } else if (p != NULL) {
        block -= HEADER;
        memcpy(p, &m->free_list[*block], sizeof(void *));
        m->free_list[*block] = block;
    }
}

void *sim_malloc(size_t size)
{
    return sim_on != NULL ? machine_alloc(sim_on, size) : malloc(size);
}

void *sim_calloc(size_t n, size_t size)
{
    void *p = sim_malloc(n * size);

    if (p != NULL) {
        memset(p, 0, n * size);
    }
    return p;
}

void *sim_realloc(void *p, size_t size)
{
    unsigned class;
    void *q;

    if (sim_on == NULL || !sim_on->own_memory) {
        return realloc(p, size);
    }
    if (p == NULL) {
        return machine_alloc(sim_on, size);
    }
    class = *((uint8_t *)p - HEADER);
    if (size + HEADER <= (size_t)1 << class) {
        return p;
    }
    q = machine_alloc(sim_on, size);
    memcpy(q, p, ((size_t)1 << class) - HEADER);
    machine_free(sim_on, p);
    return q;
}

void sim_free(void *p)
{
    if (sim_on != NULL) {
        machine_free(sim_on, p);
    } else {
        free(p);
    }
}

/* ---- misbehaviour ------------------------------------------------------- */

enum { SHORT = -1 };

/* misbehave() - is this call to go wrong? 0, SHORT, EAGAIN or EINTR */
static int misbehave(void)
{
    if (++world.calls == world.fault_call) {
        return world.fault != 0 ? world.fault : SHORT;
    }
    if (!chance(world.nasty)) {
        return 0;
    }
    switch (rnd(3)) {
    case 0:
        return EAGAIN;
    case 1:
        return EINTR;
    default:
        return SHORT;
    }
}

static size_t shorten(size_t len, int how)
{
    if (how != SHORT || len == 0) {
        return len;
    }
    return world.nasty > 0 ? 1 + rnd((uint32_t)len) : 1;
}

static int fail_with(int err)
{
    errno = err;
    return -1;
}

/* ---- descriptors -------------------------------------------------------- */

int machine_open(Machine *m, FileKind kind, int index)
{
    for (int fd = FD_FIRST; fd < SIM_FDS; fd++) {
        if (m->files[fd].kind == FILE_FREE) {
            m->files[fd] = (File){ .kind = kind, .index = index };
            return fd;
        }
    }
    sim_fail("the simulated machine has no descriptor left");
}

static File *file_of(int fd)
{
    if (fd < FD_FIRST || fd >= SIM_FDS ||
        sim_on->files[fd].kind == FILE_FREE) {
        sim_fail("a call with descriptor %d, which is not open", fd);
    }
    return &sim_on->files[fd];
}

ssize_t sim_getrandom(void *buf, size_t len, unsigned flags)
{
    uint64_t r;

    if (sim_on == NULL) {
        return getrandom(buf, len, flags);
    }
    r = mix(sim_on->rng++);
    sim_draws(sim_on->draws++);
    if (sim_on->draws <= world.draws[sim_on->index]) {
        world.redraws++;
    } else {
        world.draws[sim_on->index] = sim_on->draws;
    }
    SIM_ASSERT(len == sizeof(r));
    memcpy(buf, &r, sizeof(r));
    return (ssize_t)len;
}

pid_t sim_getpid(void)
{
    return sim_on != NULL ? sim_on->pid : getpid();
}

int sim_clock_gettime(clockid_t clock, struct timespec *ts)
{
    uint64_t now;

    if (sim_on == NULL) {
        return clock_gettime(clock, ts);
    }
    now = machine_now(sim_on);
    if (clock == CLOCK_REALTIME) {
        now = world.same_date ? 1u << 30 : now + (1u << 30);
    }
    ts->tv_sec = (time_t)(now / SECOND);
    ts->tv_nsec = (long)(now % SECOND * 1000);
    return 0;
}

int sim_fcntl(int fd, int cmd, ...)
{
    va_list ap;
    int arg;

    va_start(ap, cmd);
    arg = cmd == F_SETFL ? va_arg(ap, int) : 0;
    va_end(ap);
    return sim_on == NULL ? fcntl(fd, cmd, arg) : 0;
}

/* ---- local sockets ------------------------------------------------------ */

static Sock *sock_of(int fd)
{
    return &sim_on->socks[file_of(fd)->index];
}

int sock_new(Machine *m, int service)
{
    int i = 0;

    while (m->socks[i].state != SOCK_FREE) {
        i++;
        SIM_ASSERT(i < SIM_SOCKS);
    }
    m->top = i >= m->top ? i + 1 : m->top;
    m->socks[i] = (Sock){ .state = SOCK_NEW, .service = service };
    return i;
}

void sock_connected(Machine *m, Sock *s)
{
    s->state = SOCK_OPEN;
    for (int i = 0; i < 2; i++) {
        s->rx[i].cap = world.sock_cap > 0 ? world.sock_cap
                                          : rnd_log(512, 65536);
        s->rx[i].data = machine_alloc(m, s->rx[i].cap);
    }
}

/* sock_update() - has a connect() come to its end? */
static void sock_update(Machine *m, Sock *s)
{
    if (s->state != SOCK_CONNECTING || machine_now(m) < s->connect_at) {
        return;
    }
    m->poked = true;
    if (s->connect_err != 0) {
        s->state = SOCK_NEW;
        s->dead[0] = true;
        s->err[0] = s->connect_err;
        return;
    }
    sock_connected(m, s);
    app_server(m, s);
}

uint64_t socks_next(Machine *m)
{
    uint64_t next = NEVER;

    for (int i = 0; i < m->top; i++) {
        Sock *s = &m->socks[i];

        sock_update(m, s);
        if (s->state == SOCK_CONNECTING && s->connect_at + m->skew < next) {
            next = s->connect_at + m->skew;
        }
    }
    return next;
}

ssize_t sock_read(Sock *s, int end, void *data, size_t len)
{
    int err = s->err[end];

    if (s->rx[end].len > 0) {
        return (ssize_t)buf_get(&s->rx[end], data, (uint32_t)len);
    }
    if (s->fin[end]) {
        return 0; /* even if a reset came after it */
    }
    s->err[end] = 0;
    return err != 0 ? -err : s->dead[end] ? 0 : -EAGAIN;
}

ssize_t sock_write(Sock *s, int end, const void *data, size_t len)
{
    int err = s->err[end];
    uint32_t room;

    s->err[end] = 0;
    if (err != 0) {
        return -err;
    }
    if (s->dead[end] || s->shut[end]) {
        return -EPIPE;
    }
    if (s->closed[!end]) {
        /* taken by the kernel, and answered with a reset */
        s->dead[end] = true;
        s->err[end] = s->fin[end] ? EPIPE : ECONNRESET;
        return (ssize_t)len;
    }
    room = buf_room(&s->rx[!end]);
    if (room == 0) {
        return -EAGAIN;
    }
    len = len < room ? len : room;
    buf_put(&s->rx[!end], data, (uint32_t)len);
    return (ssize_t)len;
}

void sock_shutdown(Sock *s, int end)
{
    if (!s->dead[end]) {
        s->shut[end] = true;
        s->fin[!end] = true;
    }
}

void sock_close(Machine *m, Sock *s, int end, bool reset)
{
    if (s->state != SOCK_OPEN) {
        s->state = SOCK_FREE;
        return;
    }
    s->closed[end] = true;
    if (!s->dead[end] && !s->closed[!end]) {
        if (reset || s->rx[end].len > 0) {
            s->dead[!end] = true;
            s->err[!end] = s->fin[!end] ? EPIPE : ECONNRESET;
        } else {
            s->fin[!end] = true;
        }
    }
    machine_free(m, s->rx[end].data);
    s->rx[end] = (Buf){ .cap = 1 };
    if (s->closed[!end]) {
        s->state = SOCK_FREE;
    }
}

bool sock_readable(const Sock *s, int end)
{
    return s->rx[end].len > 0 || s->fin[end] || s->dead[end];
}

bool sock_writable(const Sock *s, int end)
{
    if (s->dead[end] || s->shut[end] || s->closed[!end]) {
        return true;
    }
    return s->state == SOCK_OPEN &&
           buf_room(&s->rx[!end]) >= (s->rx[!end].cap + 2) / 3;
}

int sim_socket(int family, int type, int protocol)
{
    if (sim_on == NULL) {
        return socket(family, type, protocol);
    }
    return machine_open(sim_on, FILE_SOCK, sock_new(sim_on, -1));
}

int sim_connect(int fd, const struct sockaddr *addr, socklen_t len)
{
    const struct sockaddr_in *in = (const void *)addr;
    Sock *s;
    int how;

    if (sim_on == NULL) {
        return connect(fd, addr, len);
    }
    s = sock_of(fd);
    sim_on->vain = 0;
    if (s->state != SOCK_NEW) {
        return fail_with(s->state == SOCK_OPEN ? EISCONN : EALREADY);
    }
    s->service = ntohs(in->sin_port);
    s->connect_at = machine_now(sim_on) + rnd((uint32_t)CONNECT_US);
    how = misbehave();
    if (how == EINTR && s->service != SVC_REFUSED) {
        s->state = SOCK_CONNECTING; /* it goes on all the same */
        return fail_with(EINTR);
    }
    switch (s->service) {
    case SVC_REFUSED:
        return fail_with(ECONNREFUSED);
    case SVC_REFUSED_LATE:
        s->connect_err = ECONNREFUSED;
        /* fall through */
    case SVC_SLOW:
    case SVC_SECOND:
        s->state = SOCK_CONNECTING;
        return fail_with(EINPROGRESS);
    case SVC_BUSY:
        if (++s->tries < 3) {
            return fail_with(EAGAIN);
        }
        break;
    }
    sock_connected(sim_on, s);
    app_server(sim_on, s);
    return 0;
}

int sim_accept(int fd, struct sockaddr *addr, socklen_t *len)
{
    File *f;
    int how;

    if (sim_on == NULL) {
        return accept(fd, addr, len);
    }
    f = file_of(fd);
    how = misbehave();
    if (how != 0) {
        return fail_with(how != SHORT ? how
                         : rnd(2) ? ECONNABORTED : EMFILE);
    }
    for (int i = 0; i < sim_on->top; i++) {
        Sock *s = &sim_on->socks[i];

        if (s->waiting && s->service == f->index) {
            s->waiting = false;
            sim_on->waiting[f->index]--;
            sim_on->vain = 0;
            addr->sa_family = AF_INET;
            *len = sizeof(struct sockaddr_in);
            return machine_open(sim_on, FILE_SOCK, i);
        }
    }
    return fail_with(EAGAIN);
}

int sim_setsockopt(int fd, int level, int name, const void *value,
                   socklen_t len)
{
    File *f;

    if (sim_on == NULL) {
        return setsockopt(fd, level, name, value, len);
    }
    f = file_of(fd);
    if (f->kind == FILE_SOCK && level == SOL_SOCKET && name == SO_LINGER) {
        const struct linger *l = value;

        sim_on->socks[f->index].linger[0] = l->l_onoff != 0;
    }
    return 0;
}

int sim_getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
    Sock *s;

    if (sim_on == NULL) {
        return getsockopt(fd, level, name, value, len);
    }
    if (level != SOL_SOCKET) {
        return fail_with(ENOPROTOOPT);
    }
    SIM_ASSERT(name == SO_ERROR);
    s = sock_of(fd);
    sock_update(sim_on, s);
    memcpy(value, &s->err[0], sizeof(s->err[0]));
    s->err[0] = 0;
    return 0;
}

/* sim_name() - an end of a socket; they are all TCP, which can be reset */
static int sim_name(int fd, int port, struct sockaddr *addr, socklen_t *len)
{
    struct sockaddr_in in = { .sin_family = AF_INET };

    file_of(fd);
    in.sin_port = htons((uint16_t)port);
    memcpy(addr, &in, sizeof(in));
    *len = sizeof(in);
    return 0;
}

int sim_getsockname(int fd, struct sockaddr *addr, socklen_t *len)
{
    return sim_on == NULL ? getsockname(fd, addr, len)
                          : sim_name(fd, 1, addr, len);
}

int sim_getpeername(int fd, struct sockaddr *addr, socklen_t *len)
{
    return sim_on == NULL ? getpeername(fd, addr, len)
                          : sim_name(fd, 2, addr, len);
}

int sim_shutdown(int fd, int how)
{
    File *f;

    if (sim_on == NULL) {
        return shutdown(fd, how);
    }
    if (sim_on->ghost) {
        return 0;
    }
    f = file_of(fd);
    SIM_ASSERT(how == SHUT_WR);
    if (f->kind == FILE_SOCK) {
        sock_shutdown(&sim_on->socks[f->index], 0);
    } else {
        wire_shutdown(f);
    }
    return 0;
}

int sim_close(int fd)
{
    File *f;

    if (sim_on == NULL) {
        return close(fd);
    }
    if (sim_on->ghost) {
        return 0;
    }
    f = file_of(fd);
    if (f->kind == FILE_SOCK) {
        Sock *s = &sim_on->socks[f->index];

        sock_close(sim_on, s, 0, s->linger[0]);
    } else if (f->kind == FILE_WIRE) {
        wire_close(f, false);
    }
    f->kind = FILE_FREE;
    return 0;
}

/* ---- reading and writing ------------------------------------------------ */

ssize_t sim_read(int fd, void *buf, size_t len)
{
    File *f;
    ssize_t n;
    int how;

    if (sim_on == NULL) {
        return read(fd, buf, len);
    }
    f = file_of(fd);
    how = misbehave();
    if (how > 0) {
        return fail_with(how);
    }
    len = shorten(len, how);
    if (f->kind == FILE_SOCK) {
        n = sock_read(&sim_on->socks[f->index], 0, buf, len);
    } else {
        n = wire_read(f, buf, len);
    }
    if (n > 0) {
        sim_on->vain = 0;
    }
    return n < 0 ? fail_with((int)-n) : n;
}

ssize_t sim_readv(int fd, const struct iovec *iov, int n)
{
    static uint8_t flat[1 << 20];
    size_t len = 0, part;
    ssize_t done;

    if (sim_on == NULL) {
        return readv(fd, iov, n);
    }
    for (int i = 0; i < n; i++) {
        len += iov[i].iov_len;
    }
    SIM_ASSERT(len <= sizeof(flat));
    /* one read: a second one would take the error that follows the data */
    done = sim_read(fd, flat, len);
    len = 0;
    for (int i = 0; i < n && done > 0 && len < (size_t)done; i++) {
        part = (size_t)done - len;
        part = part < iov[i].iov_len ? part : iov[i].iov_len;
        memcpy(iov[i].iov_base, flat + len, part);
        len += part;
    }
    return done;
}

ssize_t sim_writev(int fd, const struct iovec *iov, int n)
{
    static uint8_t flat[1 << 20];
    size_t len = 0;
    ssize_t done;
    File *f;
    int how;

    if (sim_on == NULL) {
        return writev(fd, iov, n);
    }
    f = file_of(fd);
    for (int i = 0; i < n; i++) {
        SIM_ASSERT(len + iov[i].iov_len <= sizeof(flat));
        memcpy(flat + len, iov[i].iov_base, iov[i].iov_len);
        len += iov[i].iov_len;
    }
    how = misbehave();
    if (how > 0) {
        return fail_with(how);
    }
    if (f->kind == FILE_SOCK) {
        len = shorten(len, how);
        done = sock_write(&sim_on->socks[f->index], 0, flat, len);
    } else {
        if (world.kind[f->end] != VP_CHN_VIRTSERIAL || world.fifo) {
            len = shorten(len, how);
        }
        done = wire_write(f, flat, len);
    }
    if (done > 0) {
        sim_on->vain = 0;
    }
    return done < 0 ? fail_with((int)-done) : done;
}

ssize_t sim_write(int fd, const void *buf, size_t len)
{
    struct iovec iov = { .iov_base = (void *)(uintptr_t)buf, .iov_len = len };

    if (sim_on == NULL) {
        return write(fd, buf, len);
    }
    return sim_on->ghost ? fail_with(EPIPE) : sim_writev(fd, &iov, 1);
}

/* ---- waiting ------------------------------------------------------------ */

int sim_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    Sock *s;

    if (sim_on == NULL) {
        return poll(fds, n, timeout);
    }
    SIM_ASSERT(n == 1);
    SIM_ASSERT(timeout == 0);
    s = sock_of(fds->fd);
    fds->revents = (short)((s->err[0] != 0 ? POLLERR : 0) |
                           (s->dead[0] ? POLLHUP : 0));
    return fds->revents != 0;
}

static bool file_ready(Machine *m, int fd, bool writing)
{
    File *f = file_of(fd);
    Sock *s = &m->socks[f->index];

    switch (f->kind) {
    case FILE_LISTEN:
        return !writing && m->waiting[f->index] > 0;
    case FILE_SOCK:
        sock_update(m, s);
        return writing ? sock_writable(s, 0) : sock_readable(s, 0);
    case FILE_WIRE:
        return writing ? wire_writable(f) : wire_readable(f);
    default:
        return false;
    }
}

/* ready_bits() - leave in @set the descriptors that are; returns how many */
static int ready_bits(Machine *m, int nfds, fd_set *set, bool writing)
{
    unsigned long *word = (unsigned long *)(void *)set;
    int bits = 8 * (int)sizeof(*word), n = 0;

    for (int first = 0; first < nfds; first += bits, word++) {
        for (unsigned long left = *word; left != 0; left &= left - 1) {
            int bit = __builtin_ctzl(left);

            if (file_ready(m, first + bit, writing)) {
                n++;
            } else {
                *word &= ~(1ul << bit);
            }
        }
    }
    return n;
}

/*
 * sim_select() - where a machine gives way to the rest of the world
 *
 * It can't wait in here.  So when nothing is ready, it pretends that a signal
 * came and ends the loop, and the world calls the loop again when something
 * is.  Only when all others wait as well (world.permit) does it sleep.
 */
int sim_select(int nfds, fd_set *r, fd_set *w, fd_set *e,
               struct timeval *timeout)
{
    Machine *m = sim_on;
    uint64_t wait = NEVER;
    int ready;

    if (m == NULL) {
        return select(nfds, r, w, e, timeout);
    }
    m->passes++;
    if (++m->vain > VAIN_MAX) {
        sim_fail("machine %c spins", 'A' + m->index);
    }
    world.now += 1 + rnd(world.pass_us);
    if (timeout != NULL) {
        wait = (uint64_t)timeout->tv_sec * SECOND +
               (uint64_t)timeout->tv_usec;
    }
    m->wake = wait == NEVER ? NEVER : machine_now(m) + wait;
    if (misbehave() == EINTR) {
        return fail_with(EINTR);
    }
    ready = ready_bits(m, nfds, r, false) + ready_bits(m, nfds, w, true);
    if (ready > 0 || wait == 0) {
        m->unfinished = ++m->turn >= TURN_MAX;
    } else if (wait != NEVER && world.now + wait <= world.permit) {
        world.now += wait;
        m->vain = wait >= MS ? 0 : m->vain;
        m->unfinished = false;
    } else {
        m->unfinished = false;
        m->poked = false;
        m->turn = 0;
        vp_loop_stop(m->loop);
        return fail_with(EINTR);
    }
    world.permit = 0;
    if (m->unfinished) {
        m->turn = 0;
        vp_loop_stop(m->loop);
    }
    return ready;
}
