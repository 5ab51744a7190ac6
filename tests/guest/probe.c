/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * probe - what the guest test needs on both sides and no program has
 *
 * One static binary, run on the host and in the guest. Its core is one small
 * protocol that makes every byte checkable: a client opens with a Header and
 * sends `up` pattern bytes, the server sends `down` pattern bytes and, when it
 * has seen all of the client's and the end of them, an eight byte trailer.
 * The pattern depends on a token that each connection draws for itself, on
 * the direction and on the position, so that a byte lost, doubled, changed or
 * belonging to somebody else is noticed where it happens, and a connection
 * that ended too early is told from one that was reset.
 *
 *   serve      the server's end, for any number of connections or one device
 *   tell       what became of the connections of such a server so far
 *   load       the client's end, many connections at once
 *   type       single bytes, each echoed before the next one is sent
 *   relay      a device and a connection joined by plain 32 KiB reads and
 *              writes: what qemu-vp is compared with
 *   agent ctl  run commands in the guest over a port of their own
 *   hmp        one command for QEMU's human monitor
 *   line       one line to a socket, one line back
 *   cpu        processor time a process uses within some seconds
 *   pair       run a command with the ends of a socketpair as 8 and 9
 *
 * Addresses are IP:PORT, the path of a unix socket or that of a device.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK = 32768,              /* the most a virtio port takes in one write */
    TRAILER = 8,
    MAX_XFERS = 4096,
    MARK = 0xff,                /* the byte MODE_MARK answers */
};

/* What the client asks the server to do. */
enum {
    MODE_CHECK,                 /* patterns and half-close, all verified */
    MODE_RAW,                   /* bytes are only counted, for speed */
    MODE_ECHO,                  /* every byte comes back */
    MODE_MARK,                  /* only bytes of the value MARK come back */
    MODE_TELL,                  /* a line about the other connections */
};

typedef struct Header {
    char magic[8];
    uint64_t token;
    uint64_t up;                /* bytes from client to server */
    uint64_t down;              /* bytes from server to client */
    uint64_t mode;
} Header;

static const char magic[] = "probe-1\n";

typedef enum Outcome {
    RUNNING, OK, RESET, END, BAD, REFUSED, TIMEOUT, OUTCOMES
} Outcome;

static const char *const outcome_name[OUTCOMES] = {
    "running", "ok", "reset", "eof", "bad", "refused", "timeout"
};

/* One end of a connection that follows the protocol above. */
typedef struct Xfer {
    int fd;
    bool server;
    bool device;                /* a port: no end of data, no half-close */
    bool out_ended;             /* we have shut down our direction */
    bool in_ended;              /* the peer has shut down its own */
    Outcome outcome;
    Header head;
    uint64_t sent;              /* position in what we send */
    uint64_t rcvd;              /* position in what the peer sends */
    size_t echo_len;            /* MODE_ECHO: bytes to give back */
    unsigned char echo[4096];
} Xfer;

static void die(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    fputs("probe: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(2);
}

static double now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

/* run_shell() - become a shell that runs command, with signals as usual */
static void run_shell(const char *command)
{
    signal(SIGPIPE, SIG_DFL);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

/* network64() - a number in network order, and back */
static uint64_t network64(uint64_t n)
{
    uint32_t half[2] = { htonl((uint32_t)(n >> 32)), htonl((uint32_t)n) };

    memcpy(&n, half, sizeof(n));
    return n;
}

/* network_header() - a header as it is sent, and back */
static Header network_header(const Header *h)
{
    Header sent = *h;

    sent.token = network64(h->token);
    sent.up = network64(h->up);
    sent.down = network64(h->down);
    sent.mode = network64(h->mode);
    return sent;
}

static void sleep_ms(long ms)
{
    struct timespec ts = { ms / 1000, ms % 1000 * 1000000 };

    nanosleep(&ts, NULL);
}

/* random64() - a number nobody else draws: time, pid and a counter, mixed */
static uint64_t random64(void)
{
    static uint64_t state;
    struct timespec ts;
    uint64_t x;

    if (!state) {
        clock_gettime(CLOCK_REALTIME, &ts);
        state = (uint64_t)ts.tv_nsec * 0x9e3779b97f4a7c15u
                ^ (uint64_t)ts.tv_sec << 20 ^ (uint64_t)getpid();
    }
    x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t n = strtoull(text, &end, 10);

    if (end == text || *end) {
        die("not a number: %s", text);
    }
    return n;
}

/* ---- addresses ------------------------------------------------------- */

static struct sockaddr *parse_addr(const char *addr, socklen_t *len)
{
    static struct sockaddr_un un;
    static struct sockaddr_in in;
    const char *colon = strrchr(addr, ':');
    char host[64];

    if (strchr(addr, '/')) {
        if (strlen(addr) >= sizeof(un.sun_path)) {
            die("path too long: %s", addr);
        }
        memset(&un, 0, sizeof(un));
        un.sun_family = AF_UNIX;
        strcpy(un.sun_path, addr);
        *len = sizeof(un);
        return (struct sockaddr *)&un;
    }
    if (!colon || (size_t)(colon - addr) >= sizeof(host)) {
        die("not an address: %s", addr);
    }
    memcpy(host, addr, (size_t)(colon - addr));
    host[colon - addr] = '\0';
    memset(&in, 0, sizeof(in));
    in.sin_family = AF_INET;
    in.sin_port = htons((uint16_t)number(colon + 1));
    if (inet_pton(AF_INET, host, &in.sin_addr) != 1) {
        die("not an address: %s", addr);
    }
    *len = sizeof(in);
    return (struct sockaddr *)&in;
}

static bool is_device(const char *addr)
{
    struct stat st;

    return strchr(addr, '/') && stat(addr, &st) == 0 && S_ISCHR(st.st_mode);
}

/* open_addr() - a connected descriptor, or -1 with errno */
static int open_addr(const char *addr)
{
    struct sockaddr *sa;
    struct termios tio;
    socklen_t len;
    int fd, one = 1;

    if (is_device(addr)) {
        fd = open(addr, O_RDWR | O_NOCTTY);
        if (fd >= 0 && tcgetattr(fd, &tio) == 0) {
            tio.c_iflag = 0;
            tio.c_oflag = 0;
            tio.c_lflag = 0;
            tio.c_cflag = CS8 | CREAD | CLOCAL | B115200;
            tcsetattr(fd, TCSANOW, &tio);
        }
        return fd;
    }
    sa = parse_addr(addr, &len);
    fd = socket(sa->sa_family, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, sa, len) < 0) {
        int err = errno;

        close(fd);
        errno = err;
        return -1;
    }
    if (sa->sa_family == AF_INET) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    return fd;
}

/* listen_addr() - bind, listen and say where; port 0 picks a free one */
static int listen_addr(const char *addr)
{
    struct sockaddr_in in;
    struct sockaddr *sa;
    socklen_t len;
    int fd, one = 1;

    sa = parse_addr(addr, &len);
    fd = socket(sa->sa_family, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (sa->sa_family == AF_UNIX) {
        unlink(addr);
    }
    if (fd < 0 || bind(fd, sa, len) < 0 || listen(fd, 1024) < 0) {
        die("%s: %s", addr, strerror(errno));
    }
    if (sa->sa_family == AF_INET) {
        len = sizeof(in);
        getsockname(fd, (struct sockaddr *)&in, &len);
        printf("listening 127.0.0.1:%d\n", ntohs(in.sin_port));
    } else {
        printf("listening %s\n", addr);
    }
    fflush(stdout);
    return fd;
}

static void nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static bool write_all(int fd, const void *data, size_t len)
{
    const char *p = data;
    ssize_t n;

    while (len) {
        n = write(fd, p, len);
        if (n < 0 && errno != EINTR) {
            return false;
        }
        p += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return true;
}

/* ---- the checked exchange -------------------------------------------- */

/* pattern() - bytes pos..pos+len of one direction of one connection */
static void pattern(unsigned char *buf, uint64_t pos, size_t len,
                    uint64_t token, bool to_server)
{
    uint64_t word, i = pos / 8;
    size_t skip = pos % 8, n;

    while (len) {
        word = (token ^ (to_server ? 0x5555555555555555u : 0)) +
               i++ * 0x9e3779b97f4a7c15u;
        word = network64(word ^ word >> 29);
        n = sizeof(word) - skip < len ? sizeof(word) - skip : len;
        memcpy(buf, (unsigned char *)&word + skip, n);
        buf += n;
        len -= n;
        skip = 0;
    }
}

static uint64_t client_total(const Xfer *x)
{
    return sizeof(Header) + x->head.up;
}

static uint64_t server_total(const Xfer *x)
{
    return x->head.down + TRAILER;
}

/* contents() - what one side sends at pos; returns how much of len it is */
static size_t contents(const Xfer *x, bool by_server, uint64_t pos,
                       unsigned char *buf, size_t len)
{
    uint64_t body = by_server ? x->head.down : x->head.up;
    uint64_t before = by_server ? 0 : sizeof(Header);
    uint64_t left, trailer = network64(~x->head.token);
    Header head;

    if (pos < before) {
        left = before - pos;
        len = len < left ? len : (size_t)left;
        head = network_header(&x->head);
        memcpy(buf, (const unsigned char *)&head + pos, len);
    } else if (pos < before + body) {
        left = before + body - pos;
        len = len < left ? len : (size_t)left;
        if (x->head.mode == MODE_CHECK) {
            pattern(buf, pos - before, len, x->head.token, !by_server);
        }
    } else if (by_server && pos < server_total(x)) {
        left = server_total(x) - pos;
        len = len < left ? len : (size_t)left;
        memcpy(buf, (unsigned char *)&trailer + (TRAILER - left), len);
    } else {
        len = 0;
    }
    return len;
}

/* send_header() - at once, and so from a socket or port that waits */
static bool send_header(const Xfer *x)
{
    Header head = network_header(&x->head);

    return write_all(x->fd, &head, sizeof(head));
}

static void finish(Xfer *x, Outcome outcome, const char *why)
{
    struct linger reset = { 1, 0 };

    if (outcome == BAD) {
        printf("BAD: %s; sent %llu, received %llu of token %016llx\n", why,
               (unsigned long long)x->sent, (unsigned long long)x->rcvd,
               (unsigned long long)x->head.token);
        fflush(stdout);
    }
    if (outcome != OK) {
        setsockopt(x->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    }
    x->outcome = outcome;
    if (!x->device) {
        close(x->fd);
    }
}

/* may_send() - is there something this end can send by the protocol now? */
static bool may_send(const Xfer *x)
{
    bool heard_all;

    if (x->server && x->rcvd < sizeof(Header)) {
        return false;
    }
    if (x->head.mode >= MODE_ECHO && x->server) {
        return x->echo_len > 0;
    }
    if (!x->server) {
        return x->sent < client_total(x);
    }
    heard_all = x->rcvd == client_total(x) &&
                (x->head.mode == MODE_RAW || x->in_ended);
    return x->sent < x->head.down ||
           (heard_all && x->sent < server_total(x));
}

/* settle() - close directions and the exchange when their time has come */
static void settle(Xfer *x)
{
    if (x->outcome != RUNNING) {
        return;
    }
    if (x->head.mode >= MODE_ECHO) {
        /* A port never tells that the client has gone: count. */
        if (x->device && x->rcvd == client_total(x) && !x->echo_len) {
            finish(x, OK, NULL);
        }
        return;
    }
    if (x->server) {
        if (x->rcvd >= sizeof(Header) && x->sent == server_total(x)) {
            finish(x, OK, NULL);
        }
        return;
    }
    if (x->sent == client_total(x) && !x->out_ended &&
        x->head.mode == MODE_CHECK) {
        x->out_ended = true;
        shutdown(x->fd, SHUT_WR);
    }
    if (x->rcvd == server_total(x) && x->sent == client_total(x) &&
        (x->in_ended || x->head.mode == MODE_RAW)) {
        finish(x, OK, NULL);
    }
}

static void on_error(Xfer *x)
{
    if (errno != EAGAIN && errno != EINTR) {
        finish(x, RESET, NULL);
    }
}

static void on_end(Xfer *x)
{
    uint64_t total = x->server ? client_total(x) : server_total(x);

    if (x->device) {
        return;
    }
    x->in_ended = true;
    if (x->server && x->rcvd == 0) {
        finish(x, END, NULL);
    } else if (x->rcvd < sizeof(Header) && x->server) {
        finish(x, BAD, "clean end inside the header");
    } else if (x->head.mode >= MODE_ECHO) {
        finish(x, x->server ? OK : END, NULL);
    } else if (x->rcvd < total) {
        finish(x, x->server ? BAD : END, "clean end before the last byte");
    }
}

/* take_header() - the server learns what it is to do */
static void take_header(Xfer *x)
{
    ssize_t n = read(x->fd, (unsigned char *)&x->head + x->rcvd,
                     sizeof(Header) - (size_t)x->rcvd);

    if (n < 0) {
        on_error(x);
    } else if (n == 0) {
        on_end(x);
    } else {
        x->rcvd += (uint64_t)n;
        if (memcmp(x->head.magic, magic,
                   x->rcvd < 8 ? (size_t)x->rcvd : 8) != 0) {
            finish(x, BAD, "bytes that are no header");
        } else if (x->rcvd == sizeof(Header)) {
            x->head = network_header(&x->head);
        }
    }
}

static void take_echo(Xfer *x)
{
    ssize_t n = read(x->fd, x->echo, sizeof(x->echo));
    ssize_t i;

    if (n < 0) {
        on_error(x);
    } else if (n == 0) {
        on_end(x);
    } else {
        x->rcvd += (uint64_t)n;
        for (i = 0; i < n; i++) {
            if (x->head.mode == MODE_ECHO || x->echo[i] == MARK) {
                x->echo[x->echo_len++] = x->echo[i];
            }
        }
    }
}

static void do_read(Xfer *x)
{
    static unsigned char buf[BLOCK], want[BLOCK];
    size_t have = 0;
    ssize_t n;

    if (x->server && x->rcvd < sizeof(Header)) {
        take_header(x);
        return;
    }
    if (x->head.mode >= MODE_ECHO) {
        take_echo(x);
        return;
    }
    n = read(x->fd, buf, sizeof(buf));
    if (n < 0) {
        on_error(x);
        return;
    }
    if (n == 0) {
        on_end(x);
        return;
    }
    while (have < (size_t)n) {
        size_t k = contents(x, !x->server, x->rcvd, want, (size_t)n - have);

        if (k == 0) {
            finish(x, BAD, "more bytes than were sent");
            return;
        }
        if (x->head.mode == MODE_CHECK && memcmp(want, buf + have, k) != 0) {
            finish(x, BAD, "a byte that was not sent");
            return;
        }
        have += k;
        x->rcvd += k;
    }
}

static void do_write(Xfer *x)
{
    static unsigned char buf[BLOCK];
    size_t len;
    ssize_t n;

    if (x->server && x->head.mode >= MODE_ECHO) {
        n = write(x->fd, x->echo, x->echo_len);
        if (n < 0) {
            on_error(x);
            return;
        }
        x->echo_len -= (size_t)n;
        memmove(x->echo, x->echo + n, x->echo_len);
        return;
    }
    len = contents(x, x->server, x->sent, buf, sizeof(buf));
    if (x->server && x->sent < x->head.down &&
        len > x->head.down - x->sent) {
        len = (size_t)(x->head.down - x->sent);
    }
    n = write(x->fd, buf, len);
    if (n < 0) {
        on_error(x);
        return;
    }
    x->sent += (uint64_t)n;
}

static void drive(Xfer *x, short revents)
{
    if (revents & (POLLIN | POLLHUP | POLLERR)) {
        do_read(x);
    }
    if (x->outcome == RUNNING && revents & POLLOUT) {
        do_write(x);
    }
    settle(x);
}

static short interest(const Xfer *x)
{
    bool in = !x->in_ended && x->echo_len == 0;

    return (short)((in ? POLLIN : 0) | (may_send(x) ? POLLOUT : 0));
}

/* serve_device() - exchange after exchange on one port, for comparisons */
static void serve_device(int fd)
{
    Xfer x;
    struct pollfd p = { .fd = fd };

    nonblocking(p.fd);
    for (;;) {
        memset(&x, 0, sizeof(x));
        x.fd = p.fd;
        x.server = true;
        x.device = true;
        while (x.outcome == RUNNING) {
            p.events = interest(&x);
            poll(&p, 1, -1);
            if (p.revents & POLLHUP) {
                sleep_ms(2);    /* no host; poll would return at once */
            }
            drive(&x, p.revents);
        }
    }
}

/* tell() - answer MODE_TELL: how connections ended, and all bytes received */
static void tell(Xfer *x, Xfer *const *others, int count, const unsigned *ended,
                 uint64_t rcvd)
{
    int i, open = 0;

    for (i = 0; i < count; i++) {
        open += others[i]->outcome == RUNNING;
        rcvd += others[i]->rcvd;
    }
    dprintf(x->fd, "open=%d ok=%u reset=%u eof=%u bad=%u rcvd=%llu\n",
            open - 1, ended[OK], ended[RESET], ended[END], ended[BAD],
            (unsigned long long)(rcvd - x->rcvd));
    close(x->fd);
    x->outcome = OK;
}

static void serve_listener(int lfd)
{
    static Xfer *xs[MAX_XFERS];
    static struct pollfd ps[MAX_XFERS + 1];
    unsigned ended[OUTCOMES] = { 0 };
    uint64_t rcvd = 0;
    int count = 0, i, fd;

    ps[0].fd = lfd;
    ps[0].events = POLLIN;
    for (;;) {
        for (i = 0; i < count; i++) {
            ps[i + 1].fd = xs[i]->fd;
            ps[i + 1].events = interest(xs[i]);
        }
        poll(ps, (nfds_t)count + 1, -1);
        for (i = count - 1; i >= 0; i--) {
            if (ps[i + 1].revents) {
                drive(xs[i], ps[i + 1].revents);
            }
            if (xs[i]->head.mode == MODE_TELL &&
                xs[i]->rcvd == sizeof(Header)) {
                tell(xs[i], xs, count, ended, rcvd);
            } else if (xs[i]->outcome != RUNNING) {
                ended[xs[i]->outcome]++;
                rcvd += xs[i]->rcvd;
            }
            if (xs[i]->outcome != RUNNING) {
                free(xs[i]);
                xs[i] = xs[--count];
            }
        }
        if (ps[0].revents && count < MAX_XFERS) {
            fd = accept(lfd, NULL, NULL);
            if (fd >= 0) {
                xs[count] = calloc(1, sizeof(Xfer));
                if (!xs[count]) {
                    die("out of memory");
                }
                xs[count]->fd = fd;
                xs[count++]->server = true;
                nonblocking(fd);
            }
        }
    }
}

/*
 * serve [-b LOG] ADDR
 *
 * With -b it goes on in the background, writing LOG, and prints its process
 * id when it is ready.
 */
static int cmd_serve(int argc, char **argv)
{
    const char *log = NULL;
    int opt, lfd = -1, dev = -1, fd;
    pid_t pid;

    while ((opt = getopt(argc, argv, "b:")) != -1) {
        if (opt != 'b') {
            return 2;
        }
        log = optarg;
    }
    if (optind + 1 != argc) {
        return 2;
    }
    if (!is_device(argv[optind])) {
        lfd = listen_addr(argv[optind]);
    } else {
        dev = open_addr(argv[optind]);
        if (dev < 0) {
            die("%s: %s", argv[optind], strerror(errno));
        }
    }
    if (log) {
        pid = fork();
        if (pid) {
            printf("%ld\n", (long)pid);
            return 0;
        }
        fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
        dup2(fd, 1);
        dup2(fd, 2);
    }
    if (lfd >= 0) {
        serve_listener(lfd);
    } else {
        serve_device(dev);
    }
    return 0;
}

static void open_xfer(Xfer *x, const char *addr, uint64_t up, uint64_t down,
                      uint64_t mode)
{
    memset(x, 0, sizeof(*x));
    memcpy(x->head.magic, magic, sizeof(x->head.magic));
    x->head.token = random64();
    x->head.up = up;
    x->head.down = down;
    x->head.mode = mode;
    x->fd = open_addr(addr);
    if (x->fd < 0) {
        x->outcome = REFUSED;
    } else {
        nonblocking(x->fd);
    }
}

/* mixed() - a size up to max, small ones as likely as large ones */
static uint64_t mixed(uint64_t max)
{
    return random64() % (max + 1) >> random64() % 12;
}

/* Signals: SIGUSR1 ends the waiting of load -h, SIGTERM load and type. */
static volatile sig_atomic_t holding, enough;

static void on_usr1(int sig)
{
    (void)sig;
    holding = 0;
}

static void on_term(int sig)
{
    (void)sig;
    enough = 1;
}

/*
 * load [-n CONNS] [-u UP] [-d DOWN] [-marhw] [-t SECONDS] ADDR
 *
 * -m draws each size between 0 and the given one, -a lets every other
 * connection only download, -r only counts bytes, -h reads nothing before
 * SIGUSR1 comes, -w says when all have received something, -t is the end of
 * patience. SIGTERM ends it early; what is still running is counted as that.
 */
static int cmd_load(int argc, char **argv)
{
    static struct pollfd ps[MAX_XFERS];
    uint64_t n = 1, up = 0, down = 0, limit = 60, sent = 0, rcvd = 0;
    uint64_t mode = MODE_CHECK, i, running, waiting;
    unsigned count[OUTCOMES] = { 0 };
    bool mix = false, alternate = false, tell_way = false;
    double start = now_ms(), ms;
    Xfer *xs;
    int opt, o;

    while ((opt = getopt(argc, argv, "n:u:d:t:hmarw")) != -1) {
        switch (opt) {
        case 'n':
            n = number(optarg);
            break;
        case 'u':
            up = number(optarg);
            break;
        case 'd':
            down = number(optarg);
            break;
        case 'h':
            holding = 1;
            signal(SIGUSR1, on_usr1);
            break;
        case 't':
            limit = number(optarg);
            break;
        case 'm':
            mix = true;
            break;
        case 'a':
            alternate = true;
            break;
        case 'r':
            mode = MODE_RAW;
            break;
        case 'w':
            tell_way = true;
            break;
        default:
            return 2;
        }
    }
    if (optind + 1 != argc || n > MAX_XFERS) {
        return 2;
    }
    xs = calloc(n, sizeof(*xs));
    if (!xs) {
        die("out of memory");
    }
    signal(SIGTERM, on_term);
    for (i = 0; i < n; i++) {
        open_xfer(&xs[i], argv[optind],
                  alternate && i % 2 ? 0 : mix ? mixed(up) : up,
                  mix ? mixed(down) : down, mode);
    }
    do {
        ms = now_ms() - start;
        for (i = running = waiting = 0; i < n; i++) {
            ps[i].fd = xs[i].outcome == RUNNING ? xs[i].fd : -1;
            ps[i].events = interest(&xs[i]);
            if (holding) {
                ps[i].events &= POLLOUT;
            }
            running += xs[i].outcome == RUNNING;
            waiting += xs[i].rcvd == 0;
        }
        if (tell_way && waiting == 0) {
            tell_way = false;
            puts("under way");
            fflush(stdout);
        }
        if (running) {
            poll(ps, (nfds_t)n, 100);
        }
        for (i = 0; i < n; i++) {
            if (ps[i].fd >= 0 && ps[i].revents) {
                drive(&xs[i], ps[i].revents);
            }
        }
    } while (running && !enough && ms < (double)limit * 1e3);
    for (i = 0; i < n; i++) {
        if (xs[i].outcome == RUNNING) {
            finish(&xs[i], enough ? RUNNING : TIMEOUT, NULL);
        }
        count[xs[i].outcome]++;
        sent += xs[i].sent;
        rcvd += xs[i].rcvd;
    }
    for (o = RUNNING; o < OUTCOMES; o++) {
        printf("%s=%u ", outcome_name[o], count[o]);
    }
    printf("sent=%llu rcvd=%llu ms=%.0f kbps=%.0f\n", (unsigned long long)sent,
           (unsigned long long)rcvd, ms,
           (double)(sent + rcvd) / (ms > 1 ? ms : 1));
    free(xs);
    return count[OK] == n ? 0 : 1;
}

/* ---- typing ---------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* open_command() - run a shell command with a socket for in- and output */
static int open_command(const char *command)
{
    int sv[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sv) < 0) {
        die("socketpair: %s", strerror(errno));
    }
    if (fork() == 0) {
        dup2(sv[1], 0);
        dup2(sv[1], 1);
        close(sv[0]);
        close(sv[1]);
        run_shell(command);
    }
    close(sv[1]);
    return sv[0];
}

/*
 * keystroke() - send one byte and wait for it to come back
 *
 * With flood, the connection is kept full of zeros all the time. Returns the
 * milliseconds it took, or -1 with *why set.
 */
static double keystroke(int fd, unsigned char c, bool flood, Outcome *why)
{
    static const unsigned char zeros[4096];
    double start = now_ms();
    struct pollfd p = { .fd = fd };
    unsigned char buf[256];
    bool sent = false;
    ssize_t n;

    for (;;) {
        p.revents = 0;
        p.events = (short)(POLLIN | (!sent || flood ? POLLOUT : 0));
        if (poll(&p, 1, 1000) < 0 && errno != EINTR) {
            die("poll: %s", strerror(errno));
        }
        if (now_ms() - start > 120e3) {
            *why = TIMEOUT;
            return -1;
        }
        if (p.revents & (POLLIN | POLLHUP | POLLERR)) {
            n = read(fd, buf, sizeof(buf));
            if (n == 0 || (n < 0 && errno != EAGAIN)) {
                *why = n == 0 ? END : RESET;
                return -1;
            }
            if (n > 0) {
                if (n == 1 && buf[0] == c && sent) {
                    return now_ms() - start;
                }
                *why = BAD;
                return -1;
            }
        }
        if (p.revents & POLLOUT) {
            n = sent ? write(fd, zeros, sizeof(zeros)) : write(fd, &c, 1);
            if (n < 0 && errno != EAGAIN) {
                *why = RESET;
                return -1;
            }
            sent = sent || n == 1;
        }
    }
}

/*
 * type [-n COUNT] [-g GAP_MS] [-f] ADDR, or type -x COMMAND
 *
 * -f keeps the same connection full of other bytes, for plain ports;
 * -x types into a command (after it has said "ready\n") instead. SIGTERM
 * ends it early, with the figures so far.
 */
static int cmd_type(int argc, char **argv)
{
    const char *command = NULL;
    uint64_t count = 1000, gap = 0, i = 0;
    bool flood = false;
    unsigned char c, hello[6];
    Outcome why = OK;
    double *ms;
    int opt, fd;
    Xfer x;

    while ((opt = getopt(argc, argv, "n:g:x:f")) != -1) {
        switch (opt) {
        case 'n':
            count = number(optarg);
            break;
        case 'g':
            gap = number(optarg);
            break;
        case 'x':
            command = optarg;
            break;
        case 'f':
            flood = true;
            break;
        default:
            return 2;
        }
    }
    if (optind + !command != argc || count == 0) {
        return 2;
    }
    ms = calloc(count, sizeof(*ms));
    if (!ms) {
        die("out of memory");
    }
    if (command) {
        fd = open_command(command);
        while (i < sizeof(hello) && read(fd, hello + i, 1) == 1) {
            i += hello[i] != '\r';
        }
        if (memcmp(hello, "ready\n", sizeof(hello)) != 0) {
            die("the command did not get ready");
        }
        nonblocking(fd);
    } else {
        open_xfer(&x, argv[optind], flood ? UINT64_MAX / 2 : count, 0,
                  flood ? MODE_MARK : MODE_ECHO);
        why = x.outcome == REFUSED ? REFUSED : OK;
        fd = x.fd;
        if (why == OK && !send_header(&x)) {
            why = RESET;
        }
    }
    signal(SIGTERM, on_term);
    for (i = 0; why == OK && i < count && !enough; i++) {
        c = flood ? MARK : (unsigned char)('a' + i % 26);
        ms[i] = keystroke(fd, c, flood, &why);
        if (why != OK) {
            break;
        }
        if (gap) {
            sleep_ms((long)gap);
        }
    }
    printf("outcome=%s count=%llu", outcome_name[why],
           (unsigned long long)i);
    if (i) {
        qsort(ms, i, sizeof(*ms), by_size);
        printf(" p50=%.2f p99=%.2f max=%.2f", ms[i / 2], ms[i * 99 / 100],
               ms[i - 1]);
    }
    putchar('\n');
    free(ms);
    return why == OK ? 0 : 1;
}

/* ---- the plain relay ------------------------------------------------- */

static void pump(int from, bool from_device, int to)
{
    static char buf[BLOCK];
    ssize_t n;

    for (;;) {
        n = read(from, buf, sizeof(buf));
        if (n == 0 && from_device) {
            sleep_ms(2);
        } else if (n <= 0 || !write_all(to, buf, (size_t)n)) {
            tcdrain(to);    /* what a tty holds when we die is lost */
            kill(0, SIGTERM);
        }
    }
}

/*
 * relay DEVICE ADDR - join the two in the background
 *
 * Prints a process id when it is ready, that of a process group of its own,
 * which ends when ADDR closes.
 */
static int cmd_relay(int argc, char **argv)
{
    int dev, fd;
    pid_t pid;

    if (argc != 3) {
        return 2;
    }
    dev = open_addr(argv[1]);
    fd = open_addr(argv[2]);
    if (dev < 0 || fd < 0) {
        die("%s: %s", dev < 0 ? argv[1] : argv[2], strerror(errno));
    }
    pid = fork();
    if (pid) {
        printf("%ld\n", (long)pid);
        return 0;
    }
    setpgid(0, 0);
    if (fork() == 0) {
        pump(dev, true, fd);
    }
    pump(fd, false, dev);
    return 0;
}

/* ---- commands in the guest ------------------------------------------- */

/*
 * Request: "\nCTL TAG SECONDS COMMAND\n". Answer: "CTL TAG STATUS LENGTH\n"
 * and so many bytes of output. Either end may find the remains of an earlier
 * exchange on the port; the tag tells what is whose.
 */
static void agent_run(int fd, const char *tag, unsigned seconds,
                      const char *command)
{
    static char buf[BLOCK];
    char head[128];
    FILE *out = tmpfile();
    struct stat st;
    int status, null;
    ssize_t n;
    pid_t pid;

    if (!out) {
        return;
    }
    pid = fork();
    if (pid == 0) {
        null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(fileno(out), 1);
        dup2(fileno(out), 2);
        alarm(seconds);
        close(fd);
        run_shell(command);
    }
    waitpid(pid, &status, 0);
    fstat(fileno(out), &st);
    snprintf(head, sizeof(head), "CTL %s %d %lld\n", tag,
             WIFEXITED(status) ? WEXITSTATUS(status) : 255,
             (long long)st.st_size);
    write_all(fd, head, strlen(head));
    lseek(fileno(out), 0, SEEK_SET);
    while ((n = read(fileno(out), buf, sizeof(buf))) > 0) {
        write_all(fd, buf, (size_t)n);
    }
    fclose(out);
}

/* agent DEVICE - serve commands for ever */
static int cmd_agent(int argc, char **argv)
{
    static char line[65536];
    size_t len = 0;
    char tag[32];
    unsigned seconds;
    int fd, at;
    fd_set set;
    char c;

    if (argc != 2 || (fd = open(argv[1], O_RDWR)) < 0) {
        die("%s: %s", argv[1], strerror(errno));
    }
    for (;;) {
        if (read(fd, &c, 1) != 1) {
            /* Only the write set sleeps while no host is there. */
            FD_ZERO(&set);
            FD_SET(fd, &set);
            select(fd + 1, NULL, &set, NULL, NULL);
            continue;
        }
        if (c != '\n') {
            line[len] = c;
            len += len < sizeof(line) - 1;
            continue;
        }
        line[len] = '\0';
        len = 0;
        at = 0;
        if (sscanf(line, "CTL %31s %u %n", tag, &seconds, &at) == 2 && at) {
            agent_run(fd, tag, seconds, line + at);
        }
    }
    return 0;
}

/* read_byte() - false if none comes before the deadline */
static bool read_byte(int fd, char *c, double deadline)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    double left = deadline - now_ms();

    return left > 0 && poll(&p, 1, (int)left + 1) > 0 && read(fd, c, 1) == 1;
}

/* read_line() - up to a newline or the deadline; NULL if that comes first */
static char *read_line(int fd, char *buf, size_t size, double deadline)
{
    size_t len = 0;

    while (len < size - 1) {
        if (!read_byte(fd, buf + len, deadline)) {
            return NULL;
        }
        if (buf[len++] == '\n') {
            break;
        }
    }
    buf[len] = '\0';
    return buf;
}

/* ctl SOCKET SECONDS COMMAND - its output, its exit status; 124: no answer */
static int cmd_ctl(int argc, char **argv)
{
    char request[65536], line[65536], want[64];
    double deadline;
    long long len;
    int fd, status;

    if (argc != 4) {
        return 2;
    }
    deadline = now_ms() + (double)number(argv[2]) * 1e3;
    fd = open_addr(argv[1]);
    if (fd < 0) {
        fprintf(stderr, "probe: %s: %s\n", argv[1], strerror(errno));
        return 124;
    }
    snprintf(want, sizeof(want), "CTL %016llx", (unsigned long long)random64());
    snprintf(request, sizeof(request), "\n%s %s %s\n", want, argv[2], argv[3]);
    if (!write_all(fd, request, strlen(request))) {
        return 124;
    }
    do {
        if (!read_line(fd, line, sizeof(line), deadline)) {
            fprintf(stderr, "probe: no answer from the guest: %s\n", argv[3]);
            return 124;
        }
    } while (strncmp(line, want, strlen(want)) != 0 ||
             sscanf(line + strlen(want), "%d %lld", &status, &len) != 2);
    for (; len > 0; len--) {
        if (!read_byte(fd, line, deadline)) {
            return 124; /* the guest is gone in the middle of it */
        }
        putchar(line[0]);
    }
    return status;
}

/* hmp SOCKET COMMAND - what QEMU's monitor says to it */
static int cmd_hmp(int argc, char **argv)
{
    static const char prompt[] = "(qemu) ";
    char buf[65536];
    double deadline = now_ms() + 60e3;
    struct pollfd p = { .events = POLLIN };
    const char *answer;
    size_t len = 0;
    int prompts = 0;

    if (argc != 3) {
        return 2;
    }
    p.fd = open_addr(argv[1]);
    while (p.fd >= 0 && len < sizeof(buf) - 1 && now_ms() < deadline) {
        if (poll(&p, 1, 1000) > 0) {
            if (read(p.fd, buf + len, 1) != 1) {
                break;
            }
            buf[++len] = '\0';
            if (len >= strlen(prompt) &&
                strcmp(buf + len - strlen(prompt), prompt) == 0) {
                if (++prompts == 2) {
                    /* The first line is the command, as typed. */
                    answer = strchr(buf, '\n');
                    buf[len - strlen(prompt)] = '\0';
                    fputs(answer ? answer + 1 : buf, stdout);
                    return 0;
                }
                dprintf(p.fd, "%s\n", argv[2]);
                len = 0;
            }
        }
    }
    fprintf(stderr, "probe: no answer from the monitor: %s\n", argv[2]);
    return strcmp(argv[2], "quit") != 0;
}

/* line ADDR TEXT - send it with a newline, print the line that comes back */
static int cmd_line(int argc, char **argv)
{
    char buf[65536];
    int fd;

    if (argc != 3) {
        return 2;
    }
    fd = open_addr(argv[1]);
    if (fd < 0 || dprintf(fd, "%s\n", argv[2]) < 0 ||
        !read_line(fd, buf, sizeof(buf), now_ms() + 20e3)) {
        fprintf(stderr, "probe: no answer from %s\n", argv[1]);
        return 1;
    }
    fputs(buf, stdout);
    return 0;
}

/* tell ADDR - the line of a server about its connections */
static int cmd_tell(int argc, char **argv)
{
    char buf[256];
    Xfer x;

    if (argc != 2) {
        return 2;
    }
    open_xfer(&x, argv[1], 0, 0, MODE_TELL);
    if (x.outcome != RUNNING || !send_header(&x) ||
        !read_line(x.fd, buf, sizeof(buf), now_ms() + 20e3)) {
        fprintf(stderr, "probe: no answer from %s\n", argv[1]);
        return 1;
    }
    fputs(buf, stdout);
    return 0;
}

/* cpu PID SECONDS - milliseconds of processor time used meanwhile */
static int cmd_cpu(int argc, char **argv)
{
    struct timespec a, b;
    clockid_t clock;

    if (argc != 3 ||
        clock_getcpuclockid((pid_t)number(argv[1]), &clock) != 0 ||
        clock_gettime(clock, &a) < 0) {
        die("no such process");
    }
    sleep_ms((long)number(argv[2]) * 1000);
    if (clock_gettime(clock, &b) < 0) {
        die("the process has gone");
    }
    printf("%.2f\n", (double)(b.tv_sec - a.tv_sec) * 1e3 +
                     (double)(b.tv_nsec - a.tv_nsec) / 1e6);
    return 0;
}

/* pair COMMAND - a socketpair for two programs that COMMAND starts */
static int cmd_pair(int argc, char **argv)
{
    int sv[2];

    if (argc != 2 || socketpair(AF_UNIX, SOCK_STREAM, 0, sv) < 0 ||
        dup2(sv[0], 8) < 0 || dup2(sv[1], 9) < 0) {
        return 2;
    }
    if (sv[0] != 8) {
        close(sv[0]);
    }
    if (sv[1] != 9) {
        close(sv[1]);
    }
    run_shell(argv[1]);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } commands[] = {
        { "serve", cmd_serve }, { "load", cmd_load }, { "type", cmd_type },
        { "relay", cmd_relay }, { "agent", cmd_agent }, { "ctl", cmd_ctl },
        { "hmp", cmd_hmp }, { "line", cmd_line }, { "cpu", cmd_cpu },
        { "pair", cmd_pair }, { "tell", cmd_tell },
    };
    struct rlimit rl;
    size_t i;
    int status;

    signal(SIGPIPE, SIG_IGN);
    if (getrlimit(RLIMIT_NOFILE, &rl) == 0) {
        rl.rlim_cur = rl.rlim_max;
        setrlimit(RLIMIT_NOFILE, &rl);
    }
    for (i = 0; argc > 1 && i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            status = commands[i].run(argc - 1, argv + 1);
            if (status == 2) {
                die("wrong arguments for %s", argv[1]);
            }
            return status;
        }
    }
    die("no such command");
    return 2;
}
