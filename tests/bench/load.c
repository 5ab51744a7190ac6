/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * load - load generator of the benchmark
 *
 * `load serve` is the far end of every measured path: one TCP port, on which
 * the first 64 bytes of a connection, its opening, say what it is for.
 * `load run` and `load conn` are the near end: they connect to the path's
 * entry (-t) and, past the path, to the server itself (-s), which they ask
 * for its counts.  Each prints one line of key=value words.
 *
 *   ROLE_ECHO    sends each 64-byte message back, with the server's clock in
 *                it; both ends run on one machine, so that tells how long
 *                each direction took
 *   ROLE_SINK    reads and counts
 *   ROLE_SOURCE  writes and counts
 *   ROLE_QUERY   answers each message with the clock and the sinks' counts
 *
 * Bytes count where they arrive, over a window that starts after a warm-up:
 * buffers on the way, which hold minutes of data on a slow line, do not
 * matter.  Bulk streams run in a thread of their own on either side, so a
 * round trip never waits for the generator's own bulk work, only for a CPU.
 * Contents are not checked, that is the daemon suites' business: here no byte
 * may cost more than its copy.  Linux only (epoll, /proc), unlike the daemon.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MSG_LEN     64              /* an opening, and an echoed message */
#define MAX_STREAMS 16384           /* bulk streams of one run */
#define MAX_GROUPS  8               /* -b options */
#define MAX_PIDS    16              /* -p: roots of process trees */
#define MAX_SAMPLES (1 << 22)       /* round trips kept */
#define TURN_LEN    (256 << 10)     /* bytes a stream moves in its turn */
#define TURN_CALLS  64              /* and calls it makes, at most */
#define MAX_WRITE   (1 << 20)       /* largest write() of a source */
#define BATCH       64              /* connections opened at the same time */
#define STALL_S     60              /* a blocking call takes no longer */
#define SECOND      1000000000ull   /* in the clock's nanoseconds */

enum { ROLE_ECHO = 1, ROLE_SINK, ROLE_SOURCE, ROLE_QUERY };

typedef union Msg {
    struct {
        uint32_t role;              /* what the server is to do */
        uint32_t id;                /* bulk: its number; query: how many */
        uint64_t bytes;             /* ROLE_SOURCE: how many, 0: endless */
        uint64_t sent;              /* the client's clock, or a number */
        uint64_t echoed;            /* the server's clock */
        uint32_t size;              /* ROLE_SOURCE: bytes of one write() */
    };
    char raw[MSG_LEN];
} Msg;

typedef struct Conn {
    int fd;
    int ep;                         /* the epoll set it is in */
    uint32_t role;                  /* 0: the opening isn't complete */
    uint32_t size;                  /* ROLE_SOURCE: bytes of one write() */
    uint64_t left;                  /* ROLE_SOURCE: bytes to go, 0: endless */
    _Atomic uint64_t *count;        /* bytes of this stream */
    size_t have;                    /* bytes of msg that are here */
    Msg msg;
} Conn;

typedef struct Group {
    bool up;                        /* client to server */
    uint32_t n;                     /* streams */
    uint32_t size;                  /* bytes of one write() */
} Group;

typedef struct Usage {
    double cpu;                     /* seconds */
    uint64_t rss, peak;             /* KiB */
} Usage;

/* One look at the counts of all streams. */
typedef struct Snap {
    uint64_t up_ns, down_ns;        /* when either direction was counted */
    uint64_t *bytes;                /* by stream */
} Snap;

static _Atomic uint64_t counts[MAX_STREAMS];    /* by stream id */
static _Atomic uint32_t running;                /* bulk streams not ended */
static int bulk_ep;                             /* the bulk thread's set */
static int main_ep;

static in_port_t target, server;                /* -t, -s */
static Group groups[MAX_GROUPS];
static uint32_t n_groups, n_streams;
static bool stream_up[MAX_STREAMS];
static pid_t pids[MAX_PIDS];
static int n_pids;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what,
            errno ? strerror(errno) : "unexpected");
    exit(1);
}

static uint64_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

static void sleep_until(uint64_t t)
{
    struct timespec ts = {
        .tv_sec = (time_t)(t / SECOND), .tv_nsec = (long)(t % SECOND)
    };

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL)) {
        /* interrupted */
    }
}

static void *new_memory(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);

    if (!p) {
        die("memory");
    }
    return p;
}

/* ---- sockets ----------------------------------------------------------- */

static int tcp_socket(int flags)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), one = 1;

    if (fd < 0) {
        die("socket");
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return fd;
}

static struct sockaddr_in loopback(in_port_t port)
{
    return (struct sockaddr_in) {
        .sin_family = AF_INET,
        .sin_port = htons(port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
}

static void send_all(int fd, const void *buf, size_t len)
{
    errno = 0;
    if (send(fd, buf, len, MSG_NOSIGNAL) != (ssize_t)len) {
        die("send");
    }
}

static void recv_all(int fd, void *buf, size_t len)
{
    errno = 0;
    if (recv(fd, buf, len, MSG_WAITALL) != (ssize_t)len) {
        die("receive");
    }
}

static int connect_to(in_port_t port)
{
    struct sockaddr_in sin = loopback(port);
    struct timeval tv = { .tv_sec = STALL_S };
    int fd = tcp_socket(0);

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
    if (connect(fd, (struct sockaddr *)&sin, sizeof(sin)) < 0) {
        die("connect");
    }
    return fd;
}

static void watch(Conn *c, int op)
{
    struct epoll_event ev = {
        .events = c->role == ROLE_SOURCE ? EPOLLOUT : EPOLLIN,
        .data.ptr = c,
    };

    if (epoll_ctl(c->ep, op, c->fd, &ev) < 0) {
        die("epoll_ctl");
    }
}

/* ---- what connections do, on either side ------------------------------- */

static void end_conn(Conn *c)
{
    if (c->ep == bulk_ep) {
        running--;
    }
    close(c->fd);
    free(c);
}

static bool would_block(ssize_t r)
{
    return r < 0 && (errno == EAGAIN || errno == EINTR);
}

static void run_sink(Conn *c)
{
    static char buf[TURN_LEN];      /* only the bulk thread comes here */
    ssize_t r = recv(c->fd, buf, sizeof(buf), 0);

    if (r > 0) {
        *c->count += (uint64_t)r;
    } else if (!would_block(r)) {
        end_conn(c);
    }
}

static void run_source(Conn *c)
{
    static const char zeros[MAX_WRITE];

    size_t moved = 0;

    for (int i = 0; i < TURN_CALLS && moved < TURN_LEN; i++) {
        size_t n = c->left && c->left < c->size ? c->left : c->size;
        ssize_t r = send(c->fd, zeros, n, MSG_NOSIGNAL);

        if (would_block(r)) {
            return;
        }
        if (r < 0) {
            end_conn(c);
            return;
        }
        *c->count += (uint64_t)r;
        moved += (size_t)r;
        if (c->left) {
            c->left -= (uint64_t)r;
            if (!c->left) {         /* all sent: the other end closes */
                shutdown(c->fd, SHUT_WR);
                c->role = ROLE_SINK;
                watch(c, EPOLL_CTL_MOD);
                return;
            }
        }
        if ((size_t)r < n) {
            return;
        }
    }
}

static void start_bulk(Conn *c, const Msg *m)
{
    if (m->id >= MAX_STREAMS || !m->size || m->size > MAX_WRITE) {
        end_conn(c);
        return;
    }
    c->role = m->role;
    c->size = m->size;
    c->left = m->bytes;
    c->ep = bulk_ep;
    c->count = &counts[m->id];
    running++;
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    watch(c, EPOLL_CTL_ADD);
}

static void answer_query(Conn *c)
{
    static uint64_t reply[1 + MAX_STREAMS];
    size_t n = c->msg.id < MAX_STREAMS ? c->msg.id : MAX_STREAMS;

    reply[0] = now();
    for (size_t i = 0; i < n; i++) {
        reply[i + 1] = counts[i];
    }
    send_all(c->fd, reply, (n + 1) * sizeof(reply[0]));
}

static void run_messages(Conn *c)
{
    ssize_t r = recv(c->fd, c->msg.raw + c->have, MSG_LEN - c->have,
                     MSG_DONTWAIT);

    if (r <= 0) {
        if (!would_block(r)) {
            end_conn(c);
        }
        return;
    }
    c->have += (size_t)r;
    if (c->have < MSG_LEN) {
        return;
    }
    c->have = 0;
    switch (c->msg.role) {
    case ROLE_ECHO:
        c->msg.echoed = now();
        if (send(c->fd, &c->msg, MSG_LEN, MSG_NOSIGNAL) != MSG_LEN) {
            end_conn(c);
        }
        break;
    case ROLE_SINK:
    case ROLE_SOURCE:
        epoll_ctl(c->ep, EPOLL_CTL_DEL, c->fd, NULL);
        counts[c->msg.id % MAX_STREAMS] = 0;
        start_bulk(c, &c->msg);
        break;
    case ROLE_QUERY:
        answer_query(c);
        break;
    default:
        end_conn(c);
    }
}

static void accept_conns(int listener)
{
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), one = 1;
        Conn *c;

        if (fd < 0) {
            return;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        c = new_memory(1, sizeof(*c));
        c->fd = fd;
        c->ep = main_ep;
        watch(c, EPOLL_CTL_ADD);
    }
}

static void *loop(void *epoll_fd)
{
    struct epoll_event ev[64];
    int ep = *(int *)epoll_fd;

    for (;;) {
        int n = epoll_wait(ep, ev, 64, -1);

        for (int i = 0; i < n; i++) {
            Conn *c = ev[i].data.ptr;

            if (!c->ep) {
                accept_conns(c->fd);
            } else if (c->role == ROLE_SINK) {
                run_sink(c);
            } else if (c->role == ROLE_SOURCE) {
                run_source(c);
            } else {
                run_messages(c);
            }
        }
    }
    return NULL;
}

static void start_bulk_thread(void)
{
    pthread_t thread;

    bulk_ep = epoll_create1(EPOLL_CLOEXEC);
    if (bulk_ep < 0 || pthread_create(&thread, NULL, loop, &bulk_ep)) {
        die("bulk thread");
    }
}

static void serve(in_port_t port)
{
    struct sockaddr_in sin = loopback(port);
    socklen_t len = sizeof(sin);
    Conn listener = { .fd = tcp_socket(SOCK_NONBLOCK) };
    struct epoll_event ev = { .events = EPOLLIN, .data.ptr = &listener };
    int one = 1;

    setsockopt(listener.fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(listener.fd, (struct sockaddr *)&sin, sizeof(sin)) < 0 ||
        listen(listener.fd, 4096) < 0 ||
        getsockname(listener.fd, (struct sockaddr *)&sin, &len) < 0) {
        die("listen");
    }
    printf("listening on 127.0.0.1:%u\n", ntohs(sin.sin_port));
    fflush(stdout);
    main_ep = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(main_ep, EPOLL_CTL_ADD, listener.fd, &ev);
    start_bulk_thread();
    loop(&main_ep);
}

/* ---- processes --------------------------------------------------------- */

/*
 * usage() - what the process trees of -p use; relays that fork for each
 * connection have theirs spread over many.  Peaks restart from here if asked.
 */
static Usage usage(bool reset_peaks)
{
    struct { pid_t pid, parent; double cpu; bool ours; } *p;
    size_t n = 0, room = 1024;
    Usage sum = { 0 };
    char path[300], line[1024];
    struct dirent *e;
    DIR *proc = opendir("/proc");
    bool more = n_pids;

    if (!proc) {
        die("/proc");
    }
    p = new_memory(room, sizeof(*p));
    while (n_pids && (e = readdir(proc))) {
        unsigned long user, sys;
        char *s;
        FILE *f;

        snprintf(path, sizeof(path), "/proc/%s/stat", e->d_name);
        if (e->d_name[0] < '1' || e->d_name[0] > '9' ||
            !(f = fopen(path, "r"))) {
            continue;
        }
        if (n == room) {
            room *= 2;
            p = realloc(p, room * sizeof(*p));
            if (!p) {
                die("memory");
            }
        }
        /* the name may hold anything, so count from its closing bracket */
        if (fgets(line, sizeof(line), f) && (s = strrchr(line, ')')) &&
            sscanf(s + 1, " %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
                   &p[n].parent, &user, &sys) == 3) {
            p[n].pid = (pid_t)atoi(e->d_name);
            p[n].cpu = (double)(user + sys) / (double)sysconf(_SC_CLK_TCK);
            p[n].ours = false;
            for (int i = 0; i < n_pids; i++) {
                p[n].ours |= p[n].pid == pids[i];
            }
            n++;
        }
        fclose(f);
    }
    closedir(proc);
    while (more) {
        more = false;
        for (size_t i = 0; i < n; i++) {
            for (size_t j = 0; j < n && !p[i].ours; j++) {
                if (p[j].ours && p[j].pid == p[i].parent) {
                    p[i].ours = more = true;
                }
            }
        }
    }
    for (size_t i = 0; i < n; i++) {
        FILE *f;
        unsigned long kib;

        if (!p[i].ours) {
            continue;
        }
        sum.cpu += p[i].cpu;
        snprintf(path, sizeof(path), "/proc/%d/status", p[i].pid);
        f = fopen(path, "r");
        while (f && fgets(line, sizeof(line), f)) {
            if (sscanf(line, "VmRSS: %lu", &kib) == 1) {
                sum.rss += kib;
            } else if (sscanf(line, "VmHWM: %lu", &kib) == 1) {
                sum.peak += kib;
            }
        }
        if (f) {
            fclose(f);
        }
        if (reset_peaks) {
            snprintf(path, sizeof(path), "/proc/%d/clear_refs", p[i].pid);
            f = fopen(path, "w");
            if (f) {
                fputs("5", f);
                fclose(f);
            }
        }
    }
    free(p);
    return sum;
}

/* ---- client ------------------------------------------------------------ */

static int open_stream(const Msg *opening)
{
    int fd = connect_to(target);

    send_all(fd, opening, MSG_LEN);
    return fd;
}

static void start_stream(const Group *g, uint64_t bytes)
{
    Msg m = {
        .role = g->up ? ROLE_SINK : ROLE_SOURCE,
        .id = n_streams,
        .bytes = bytes,
        .size = g->size,
    };
    Conn *c = new_memory(1, sizeof(*c));
    struct linger abort = { 1, 0 };

    if (n_streams == MAX_STREAMS) {
        errno = 0;
        die("too many streams");
    }
    stream_up[n_streams++] = g->up;
    c->fd = open_stream(&m);
    if (!bytes) {                   /* what is under way must end with us */
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &abort, sizeof(abort));
    }
    m.role = g->up ? ROLE_SOURCE : ROLE_SINK;
    start_bulk(c, &m);
}

/* Message and answer on each of n connections, a batch at a time. */
static void exchange_all(int *fds, uint32_t n, bool open)
{
    Msg m = { .role = ROLE_ECHO }, answer;

    for (uint32_t at = 0; at < n; at += BATCH) {
        uint32_t end = at + BATCH < n ? at + BATCH : n;

        for (uint32_t i = at; i < end; i++) {
            if (open) {
                fds[i] = connect_to(target);
            }
            m.sent = i;
            send_all(fds[i], &m, MSG_LEN);
        }
        for (uint32_t i = at; i < end; i++) {
            recv_all(fds[i], &answer, MSG_LEN);
            if (answer.sent != i) {
                errno = 0;
                die("another connection's answer");
            }
        }
    }
}

static void snap(Snap *s, int query_fd)
{
    static uint64_t reply[1 + MAX_STREAMS];
    Msg m = { .role = ROLE_QUERY, .id = n_streams };

    if (!s->bytes) {
        s->bytes = new_memory(MAX_STREAMS, sizeof(*s->bytes));
    }
    send_all(query_fd, &m, MSG_LEN);
    recv_all(query_fd, reply, (n_streams + 1) * sizeof(reply[0]));
    s->up_ns = reply[0];
    s->down_ns = now();
    for (uint32_t i = 0; i < n_streams; i++) {
        s->bytes[i] = stream_up[i] ? reply[i + 1] : counts[i];
    }
}

/* Print rate and fairness of one direction; returns MB/s. */
static double print_direction(bool up, const Snap *a, const Snap *b)
{
    double s = (double)(up ? b->up_ns - a->up_ns : b->down_ns - a->down_ns) /
               (double)SECOND;
    uint64_t low = UINT64_MAX, high = 0, sum = 0;

    for (uint32_t i = 0; i < n_streams; i++) {
        uint64_t n = b->bytes[i] - a->bytes[i];

        if (stream_up[i] == up) {
            low = n < low ? n : low;
            high = n > high ? n : high;
            sum += n;
        }
    }
    if (low == UINT64_MAX) {
        return 0;
    }
    printf("%s=%.5g %s_fair=%.3f ", up ? "up" : "down",
           (double)sum / s / 1e6, up ? "up" : "down",
           high ? (double)low / (double)high : 0);
    return (double)sum / s / 1e6;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* Print median, 99th percentile and maximum of ns samples, in us. */
static void print_samples(const char *name, uint32_t *sample, size_t n)
{
    if (!n) {
        return;
    }
    qsort(sample, n, sizeof(*sample), compare);
    printf("%sp50=%.1f %sp99=%.1f %smax=%.1f ", name, sample[n / 2] / 1e3,
           name, sample[n - 1 - n / 100] / 1e3, name, sample[n - 1] / 1e3);
}

/*
 * round_trips() - one message under way at a time, until `end` or `limit` of
 * them; prints what they took if asked.
 */
static uint64_t round_trips(int fd, uint64_t end, uint64_t limit, bool print)
{
    static uint32_t rtt[MAX_SAMPLES], up[MAX_SAMPLES], down[MAX_SAMPLES];
    Msg m = { .role = ROLE_ECHO }, answer;
    uint64_t t = now(), n = 0;

    while (limit ? n < limit : t < end) {
        m.sent = t;
        send_all(fd, &m, MSG_LEN);
        recv_all(fd, &answer, MSG_LEN);
        if (answer.sent != m.sent) {
            errno = 0;
            die("another message's answer");
        }
        t = now();
        if (n < MAX_SAMPLES) {
            rtt[n] = (uint32_t)(t - m.sent);
            up[n] = (uint32_t)(answer.echoed - m.sent);
            down[n] = (uint32_t)(t - answer.echoed);
        }
        n++;
    }
    if (print) {
        size_t kept = n < MAX_SAMPLES ? n : MAX_SAMPLES;

        printf("trips=%llu ", (unsigned long long)n);
        print_samples("", rtt, kept);
        print_samples("up_", up, kept);
        print_samples("down_", down, kept);
    }
    return n;
}

/*
 * join() - one more stream of the first group; prints how long it took until
 * the newcomer moved 80 % of its fair share of what that direction moved.
 */
static void join(int query_fd, double slice_s, double limit_s)
{
    uint64_t start = now(), t = start, slice = (uint64_t)(slice_s * SECOND);
    uint32_t newcomer = n_streams;
    bool up = groups[0].up;
    Snap a = { 0 }, b = { 0 };
    double joined = -1;

    start_stream(&groups[0], 0);
    snap(&a, query_fd);
    while (joined < 0 && t < start + (uint64_t)(limit_s * SECOND)) {
        uint64_t sum = 0, peers = 0;
        Snap swap;

        t += slice;
        sleep_until(t);
        snap(&b, query_fd);
        for (uint32_t i = 0; i < n_streams; i++) {
            if (stream_up[i] == up) {
                sum += b.bytes[i] - a.bytes[i];
                peers++;
            }
        }
        if ((double)(b.bytes[newcomer] - a.bytes[newcomer]) * (double)peers >=
            0.8 * (double)sum && sum) {
            joined = (double)(b.down_ns - start) / SECOND;
        }
        swap = a;
        a = b;
        b = swap;
    }
    printf("joined=%.2f ", joined < 0 ? limit_s : joined);
}

static void print_usage(const Usage *a, const Usage *b, double gb)
{
    if (!n_pids) {
        return;
    }
    printf("cpu=%.2f rss=%llu peak=%llu ", b->cpu - a->cpu,
           (unsigned long long)b->rss, (unsigned long long)b->peak);
    if (gb > 0) {
        printf("cpu_per_gb=%.3f ", (b->cpu - a->cpu) / gb);
    }
}

static void run(double seconds, double warm_s, uint32_t idle, uint32_t stuck,
                bool trips, uint64_t limit, uint64_t bytes, double join_slice)
{
    int *idle_fds = new_memory(idle, sizeof(int));
    int query_fd = connect_to(server), echo_fd = -1;
    Msg m = { .role = ROLE_SOURCE, .id = MAX_STREAMS - 1, .size = 64 << 10 };
    Snap a = { 0 }, b = { 0 };
    Usage before, after;
    uint64_t t;
    double up, down;

    start_bulk_thread();
    exchange_all(idle_fds, idle, true);
    for (uint32_t i = 0; i < stuck; i++) {
        open_stream(&m);
    }
    if (trips) {
        echo_fd = connect_to(target);
        round_trips(echo_fd, 0, 1, false);
    }
    before = usage(true);
    t = now();
    snap(&a, query_fd);
    for (uint32_t i = 0; i < n_groups; i++) {
        for (uint32_t j = 0; j < groups[i].n; j++) {
            start_stream(&groups[i], bytes);
        }
    }
    if (!limit && !bytes) {
        if (trips) {
            round_trips(echo_fd, t + (uint64_t)(warm_s * SECOND), 0, false);
        } else {
            sleep_until(t + (uint64_t)(warm_s * SECOND));
        }
        before = usage(true);
        t = now();
        snap(&a, query_fd);
    }
    if (join_slice > 0) {
        join(query_fd, join_slice, seconds);
    } else if (trips) {
        t = now();
        round_trips(echo_fd, t + (uint64_t)(seconds * SECOND), limit, true);
    } else if (bytes) {
        while (running) {
            sleep_until(now() + SECOND / 1000);
        }
    } else {
        sleep_until(t + (uint64_t)(seconds * SECOND));
    }
    snap(&b, query_fd);
    after = usage(false);
    up = print_direction(true, &a, &b);
    down = print_direction(false, &a, &b);
    printf("total=%.5g ", up + down);
    print_usage(&before, &after,
                (up + down) * (double)(b.down_ns - a.down_ns) / SECOND / 1e3);
    exchange_all(idle_fds, idle, false);
    printf("idle=%u\n", idle);
}

/*
 * bind_nth() - spread connections over source addresses: closed ones keep
 * their port for a minute and one address has 28,000 of them.
 */
static void bind_nth(int fd, uint64_t n)
{
    struct sockaddr_in sin = loopback(0);
    int one = 1;

    sin.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)(n >> 13) % 128);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
    if (bind(fd, (struct sockaddr *)&sin, sizeof(sin)) < 0) {
        die("bind");
    }
}

/*
 * conns() - at any time `at_once` connections live through connect, 64 bytes
 * there, 64 bytes back, close; until the time is up or `limit` were made.
 */
static void conns(double seconds, uint32_t at_once, uint64_t limit)
{
    struct sockaddr_in sin = loopback(target);
    int ep = epoll_create1(EPOLL_CLOEXEC);
    Msg m = { .role = ROLE_ECHO }, answer;
    uint64_t start = now(), begun = 0, done = 0;
    Usage before = usage(true), after;
    struct epoll_event ev[64];
    uint32_t open = 0;
    double s;

    for (;;) {
        bool more = limit ? begun < limit :
                    (double)(now() - start) < seconds * SECOND;
        int n;

        while (more && open < at_once && (!limit || begun < limit)) {
            struct epoll_event want = {
                .events = EPOLLIN, .data.fd = tcp_socket(SOCK_NONBLOCK)
            };
            int fd = want.data.fd;

            bind_nth(fd, begun);
            if (connect(fd, (struct sockaddr *)&sin, sizeof(sin)) < 0 &&
                errno != EINPROGRESS) {
                die("connect");
            }
            /* on loopback it is connected already, as a rule */
            if (send(fd, &m, MSG_LEN, MSG_NOSIGNAL) != MSG_LEN) {
                want.events = EPOLLOUT;
            }
            epoll_ctl(ep, EPOLL_CTL_ADD, fd, &want);
            open++;
            begun++;
        }
        if (!open) {
            break;
        }
        n = epoll_wait(ep, ev, 64, STALL_S * 1000);
        errno = n ? errno : ETIMEDOUT;
        if (n <= 0) {
            die("wait for answers");
        }
        for (int i = 0; i < n; i++) {
            int fd = ev[i].data.fd;

            if (ev[i].events & EPOLLOUT) {
                send_all(fd, &m, MSG_LEN);
                ev[i].events = EPOLLIN;
                epoll_ctl(ep, EPOLL_CTL_MOD, fd, &ev[i]);
            } else {
                recv_all(fd, &answer, MSG_LEN);
                close(fd);
                open--;
                done++;
            }
        }
    }
    s = (double)(now() - start) / SECOND;
    after = usage(false);
    printf("conns=%llu rate=%.5g ", (unsigned long long)done,
           (double)done / s);
    print_usage(&before, &after, 0);
    printf("\n");
}

/* ---- command line ------------------------------------------------------ */

static _Noreturn void wrong_usage(void)
{
    fprintf(stderr,
"usage: load serve [PORT]      tells its port, runs until it is killed\n"
"       load run -t PORT -s PORT [OPTION]...\n"
"       load conn -t PORT [-c AT_ONCE] [OPTION]...\n"
"  -t PORT  the path's entry, on 127.0.0.1     -s PORT  the server itself\n"
"  -b up|down:N[:SIZE]  N bulk streams in writes of SIZE bytes (256 KiB)\n"
"  -B BYTES each bulk stream ends after so many\n"
"  -r       measure round trips of 64 bytes    -n N     stop after so many\n"
"  -i N     hold N idle connections meanwhile  -k N     and N stuck readers\n"
"  -j S     one more stream joins: seconds until it has its share, by slices\n"
"           of S seconds\n"
"  -T S     seconds measured (2)               -W S     warm-up before (0.5)\n"
"  -p PID[,PID]...  also CPU seconds and KiB of these and their children\n");
    exit(2);
}

static double number(const char *s, double low, double high)
{
    char *end;
    double v = strtod(s, &end);

    if (end == s || *end || !(v >= low && v <= high)) {
        wrong_usage();
    }
    return v;
}

static void add_group(char *s)
{
    char *dir = strtok(s, ":"), *n = strtok(NULL, ":");
    char *size = strtok(NULL, "");
    Group *g = &groups[n_groups++];

    if (n_groups > MAX_GROUPS || !n || (strcmp(dir, "up") &&
                                        strcmp(dir, "down"))) {
        wrong_usage();
    }
    g->up = dir[0] == 'u';
    g->n = (uint32_t)number(n, 1, MAX_STREAMS);
    g->size = size ? (uint32_t)number(size, 1, MAX_WRITE) : 256 << 10;
}

int main(int argc, char **argv)
{
    double seconds = 2, warm_s = 0.5, join_slice = 0;
    uint32_t idle = 0, stuck = 0, at_once = 16;
    uint64_t limit = 0, bytes = 0;
    bool trips = false;
    /* 10,000 connections; root may raise the hard limit, others keep it */
    struct rlimit rl = { 32768, 32768 };
    int opt;

    if (setrlimit(RLIMIT_NOFILE, &rl) < 0 &&
        !getrlimit(RLIMIT_NOFILE, &rl)) {
        rl.rlim_cur = rl.rlim_max;
        setrlimit(RLIMIT_NOFILE, &rl);
    }
    if (argc < 2) {
        wrong_usage();
    }
    if (!strcmp(argv[1], "serve")) {
        serve((in_port_t)(argc > 2 ? number(argv[2], 0, 65535) : 0));
    }
    while ((opt = getopt(argc - 1, argv + 1, "t:s:b:B:rn:i:k:j:T:W:p:c:"))
           != -1) {
        switch (opt) {
        case 't':
            target = (in_port_t)number(optarg, 1, 65535);
            break;
        case 's':
            server = (in_port_t)number(optarg, 1, 65535);
            break;
        case 'b':
            add_group(optarg);
            break;
        case 'B':
            bytes = (uint64_t)number(optarg, 1, 1e15);
            break;
        case 'r':
            trips = true;
            break;
        case 'n':
            limit = (uint64_t)number(optarg, 1, 1e9);
            break;
        case 'i':
            idle = (uint32_t)number(optarg, 0, 30000);
            break;
        case 'k':
            stuck = (uint32_t)number(optarg, 0, 1000);
            break;
        case 'j':
            join_slice = number(optarg, 0.01, 10);
            break;
        case 'T':
            seconds = number(optarg, 0.01, 3600);
            break;
        case 'W':
            warm_s = number(optarg, 0, 3600);
            break;
        case 'p':
            for (char *p = strtok(optarg, ","); p && n_pids < MAX_PIDS;
                 p = strtok(NULL, ",")) {
                pids[n_pids++] = (pid_t)number(p, 1, 1e8);
            }
            break;
        case 'c':
            at_once = (uint32_t)number(optarg, 1, 10000);
            break;
        default:
            wrong_usage();
        }
    }
    if (!strcmp(argv[1], "run") && target && server) {
        run(seconds, warm_s, idle, stuck, trips, limit, bytes, join_slice);
    } else if (!strcmp(argv[1], "conn") && target) {
        conns(seconds, at_once, limit);
    } else {
        wrong_usage();
    }
    return 0;
}
