/*
 * qemu-vp - forward sockets between host and guest over one channel
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The program around the engine of virtproxy.c.  It reads the command line,
 * binds the listeners, and keeps each channel open: what can't be opened now,
 * or is lost later, is tried again for ever, 0.1 s to 5 s apart.  Opening
 * never blocks the loop: connect() is non-blocking, and names are looked up
 * by a child process.  A channel's descriptor belongs to the engine from
 * vp_attach() until its channel_lost() call.
 *
 * Whatever is wrong with the command line is found before anything is
 * opened: exit status 2.  What can't be bound or looked up at start ends the
 * program with status 1, for a user who asked for it must know.
 */
#include "virtproxy.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define VERSION "0.1"

#define MS 1000ull
#define SECOND 1000000ull

#define RETRY_MIN (100 * MS)
#define RETRY_MAX (5 * SECOND)
#define CONNECT_TIMEOUT (10 * SECOND)
#define ACCEPT_PAUSE (200 * MS)
/* Time for what is queued when the daemon is told to end; for resets. */
#define FLUSH_TIME (2 * SECOND)
#define RESET_TIME (500 * MS)
#define QUIT_STEP (10 * MS)
#define DEFAULT_BAUD 115200
#define MAX_ADDRS 16

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- log -------------------------------------------------------------- */

static VPLogLevel log_level = VP_LOG_INFO;

void vp_log(VPLogLevel level, int channel, const char *fmt, ...)
{
    static const char *const name[] = { "error", "warn", "info", "debug" };
    int err = errno;
    char line[1024];
    size_t len;
    struct timespec ts;
    struct tm tm;
    va_list ap;

    if (level > log_level) {
        return;
    }
    clock_gettime(CLOCK_REALTIME, &ts);
    localtime_r(&ts.tv_sec, &tm);
    len = strftime(line, sizeof(line), "%Y-%m-%d %H:%M:%S", &tm);
    len += (size_t)snprintf(line + len, sizeof(line) - len, ".%03d %s ",
                            (int)(ts.tv_nsec / 1000000), name[level]);
    if (channel != VP_NO_CHANNEL) {
        len += (size_t)snprintf(line + len, sizeof(line) - len, "ch%d: ",
                                channel);
    }
    va_start(ap, fmt);
    vsnprintf(line + len, sizeof(line) - len - 1, fmt, ap);
    va_end(ap);
    len = strlen(line);
    line[len++] = '\n';
    if (write(STDERR_FILENO, line, len) < 0) {
        /* a full disk or a closed pipe must not stop anything */
    }
    errno = err;
}

/* fail() - end with a message on stderr */
static void fail(int status, const char *fmt, ...)
    __attribute__((format(printf, 2, 3), noreturn));

static void fail(int status, const char *fmt, ...)
{
    va_list ap;

    fputs("qemu-vp: ", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(status);
}

static void *xcalloc(size_t n, size_t size)
{
    void *p = calloc(n, size);

    if (p == NULL) {
        fail(1, "out of memory");
    }
    return p;
}

/* ---- command line ----------------------------------------------------- */

typedef enum Method {
    UNIX_CONNECT,
    UNIX_LISTEN,
    TCP_CONNECT,
    TCP_LISTEN,
    VIRTSERIAL_OPEN,
    ISASERIAL_OPEN,
    INHERITED_FD,
} Method;

static const char *const method_name[] = {
    "unix-connect", "unix-listen", "tcp-connect", "tcp-listen",
    "virtserial-open", "isaserial-open", "fd",
};

static const struct {
    unsigned baud;
    speed_t speed;
} speeds[] = {
    { 1200, B1200 }, { 2400, B2400 }, { 4800, B4800 }, { 9600, B9600 },
    { 19200, B19200 }, { 38400, B38400 }, { 57600, B57600 },
    { 115200, B115200 }, { 230400, B230400 },
#ifdef B460800
    { 460800, B460800 },
#endif
#ifdef B921600
    { 921600, B921600 },
#endif
#ifdef B1000000
    { 1000000, B1000000 },
#endif
#ifdef B4000000
    { 4000000, B4000000 },
#endif
};

/* One -c, -o or -i; the strings are parts of a copy of its text. */
typedef struct Spec {
    const char *text;
    char option;
    Method method;     /* -c */
    char *service_id;  /* -o, -i */
    char *addr;
    char *port;        /* NULL: '-' was given */
    unsigned channel_id;
} Spec;

static const char usage_text[] =
"Usage: qemu-vp -c CHANNEL [-o FORWARD]... [-i FORWARD]... [OPTION]...\n"
"Forward sockets between host and guest over one channel.\n"
"\n"
"  -c, --channel METHOD:ADDR:PORT[:CHANNEL_ID]\n"
"        the channel to the other qemu-vp; again for further ones\n"
"          unix-connect:PATH:-       unix-listen:PATH:-\n"
"          tcp-connect:HOST:PORT     tcp-listen:HOST:PORT\n"
"          virtserial-open:DEVICE:-  isaserial-open:DEVICE:BAUD ('-': 115200)\n"
"          fd:NUMBER:-               an inherited descriptor\n"
"  -o, --oforward SERVICE_ID:ADDR:PORT[:CHANNEL_ID]\n"
"        listen at ADDR:PORT, forward to the other side's SERVICE_ID\n"
"  -i, --iforward SERVICE_ID:ADDR:PORT[:CHANNEL_ID]\n"
"        connect the other side's SERVICE_ID to ADDR:PORT\n"
"        PORT '-': ADDR is the path of a unix socket; [::1] for IPv6;\n"
"        -o with PORT 0 picks a free port, the log names it\n"
"      --grace SECONDS  connections wait so long without a channel [30]\n"
"  -v, --verbose        log more; twice: as much as there is\n"
"  -q, --quiet          log warnings and errors only; twice: errors only\n"
"  -V, --version        print the version\n"
"  -h, --help           print this\n";

static void bad(const Spec *spec, const char *fmt, ...)
    __attribute__((format(printf, 2, 3), noreturn));

/* bad() - wrong usage: name the option, its text, and what was expected */
static void bad(const Spec *spec, const char *fmt, ...)
{
    char why[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(why, sizeof(why), fmt, ap);
    va_end(ap);
    fail(2, "-%c '%s': %s (expected %s:ADDR:PORT[:CHANNEL_ID])", spec->option,
         spec->text, why, spec->option == 'c' ? "METHOD" : "SERVICE_ID");
}

/* parse_number() - all of @text as a number up to @max */
static bool parse_number(const char *text, unsigned long max,
                         unsigned long *value)
{
    char *end;

    if (text[0] < '0' || text[0] > '9') {
        return false;
    }
    errno = 0;
    *value = strtoul(text, &end, 10);
    return errno == 0 && *end == '\0' && *value <= max;
}

/*
 * next_field() - cut the next field off *@rest
 *
 * NULL if there is none.  A field in brackets may contain colons.
 */
static char *next_field(const Spec *spec, char **rest)
{
    char *field = *rest, *end;

    if (field == NULL) {
        return NULL;
    }
    if (field[0] == '[') {
        end = strchr(field, ']');
        if (end == NULL) {
            bad(spec, "'[' without ']'");
        }
        if (end[1] != ':' && end[1] != '\0') {
            bad(spec, "'%s' after ']', ':' was expected", end + 1);
        }
        *end++ = '\0';
        field++;
    } else {
        end = field + strcspn(field, ":");
    }
    *rest = *end == ':' ? end + 1 : NULL;
    *end = '\0';
    return field;
}

static void check_port(const Spec *spec)
{
    unsigned long port, least = spec->option == 'o' ? 0 : 1;
    bool listening = spec->option == 'o' ||
                     (spec->option == 'c' && spec->method == TCP_LISTEN);

    if (listening) {
        least = 0;
    }
    if (spec->port[0] < '0' || spec->port[0] > '9') {
        if (getservbyname(spec->port, "tcp") == NULL) {
            bad(spec, "PORT '%s' is neither a number nor a known service",
                spec->port);
        }
        return;
    }
    if (!parse_number(spec->port, 65535, &port) || port < least) {
        bad(spec, "PORT '%s' is not a number from %lu to 65535", spec->port,
            least);
    }
}

static void check_path(const Spec *spec)
{
    struct sockaddr_un sun;

    if (strlen(spec->addr) >= sizeof(sun.sun_path)) {
        bad(spec, "the path has %zu bytes, a unix socket's at most %zu",
            strlen(spec->addr), sizeof(sun.sun_path) - 1);
    }
}

static speed_t find_speed(const char *port)
{
    unsigned long baud = DEFAULT_BAUD;

    if (port == NULL || parse_number(port, UINT_MAX, &baud)) {
        for (size_t i = 0; i < COUNT(speeds); i++) {
            if (speeds[i].baud == baud) {
                return speeds[i].speed;
            }
        }
    }
    return B0;
}

static void check_channel(Spec *spec, const char *method)
{
    unsigned long number;
    size_t m = 0;

    while (m < COUNT(method_name) && strcmp(method, method_name[m]) != 0) {
        m++;
    }
    if (m == COUNT(method_name)) {
        bad(spec, "unknown METHOD '%s'; there are unix-connect, unix-listen, "
            "tcp-connect, tcp-listen, virtserial-open, isaserial-open, fd",
            method);
    }
    spec->method = (Method)m;
    switch (spec->method) {
    case TCP_CONNECT:
    case TCP_LISTEN:
        if (spec->port == NULL) {
            bad(spec, "%s needs a PORT", method);
        }
        check_port(spec);
        break;
    case ISASERIAL_OPEN:
        if (find_speed(spec->port) == B0) {
            bad(spec, "'%s' is not a baud rate that is known here",
                spec->port);
        }
        break;
    case INHERITED_FD:
        if (!parse_number(spec->addr, INT_MAX, &number)) {
            bad(spec, "'%s' is not the number of a descriptor", spec->addr);
        }
        /* fall through */
    default:
        if (spec->port != NULL) {
            bad(spec, "PORT '%s' where %s takes '-'", spec->port, method);
        }
        if (spec->method == UNIX_CONNECT || spec->method == UNIX_LISTEN) {
            check_path(spec);
        }
        break;
    }
}

static void parse_spec(Spec *spec, char option, const char *text)
{
    char *rest = strdup(text), *first, *id;
    unsigned long number = 0;

    if (rest == NULL) {
        fail(1, "out of memory");
    }
    spec->text = text;
    spec->option = option;
    first = next_field(spec, &rest);
    spec->addr = next_field(spec, &rest);
    spec->port = next_field(spec, &rest);
    id = next_field(spec, &rest);
    if (spec->port == NULL) {
        bad(spec, "%s is missing", spec->addr == NULL ? "ADDR" : "PORT");
    }
    if (rest != NULL) {
        bad(spec, "'%s' after the CHANNEL_ID", rest);
    }
    if (spec->addr[0] == '\0' || spec->port[0] == '\0') {
        bad(spec, "%s is empty", spec->addr[0] == '\0' ? "ADDR" : "PORT");
    }
    if (id != NULL && !parse_number(id, 65535, &number)) {
        bad(spec, "CHANNEL_ID '%s' is not a number from 0 to 65535", id);
    }
    spec->channel_id = (unsigned)number;
    if (strcmp(spec->port, "-") == 0) {
        spec->port = NULL;
    }
    if (option == 'c') {
        check_channel(spec, first);
        return;
    }
    spec->service_id = first;
    if (!vp_service_id_ok(first, strlen(first))) {
        bad(spec, "a SERVICE_ID is 1 to %d printable ASCII characters without "
            "blanks", VP_SERVICE_ID_LEN);
    }
    if (spec->port == NULL) {
        check_path(spec);
    } else {
        check_port(spec);
    }
}

/* ---- addresses -------------------------------------------------------- */

static void addr_unix(const char *path, VPAddr *addr)
{
    struct sockaddr_un *sun = (void *)&addr->ss;

    memset(addr, 0, sizeof(*addr));
    sun->sun_family = AF_UNIX;
    memcpy(sun->sun_path, path, strlen(path) + 1);
    addr->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
                            strlen(path) + 1);
}

/*
 * addr_lookup() - at most MAX_ADDRS addresses of a host and port
 * @flags:  AI_PASSIVE, AI_NUMERICHOST
 *
 * Returns their number, or a negative EAI_ value (they are negative on
 * every system that matters; 0 addresses never happen).
 */
static int addr_lookup(const char *host, const char *port, int flags,
                       VPAddr *addrs)
{
    struct addrinfo hints = {
        .ai_family = AF_UNSPEC,
        .ai_socktype = SOCK_STREAM,
        .ai_flags = flags,
    };
    struct addrinfo *list;
    int n = 0, rc = getaddrinfo(host, port, &hints, &list);

    if (rc != 0) {
        return rc < 0 ? rc : -rc;
    }
    for (struct addrinfo *ai = list; ai != NULL && n < MAX_ADDRS;
         ai = ai->ai_next) {
        addrs[n].len = ai->ai_addrlen;
        memcpy(&addrs[n++].ss, ai->ai_addr, ai->ai_addrlen);
    }
    freeaddrinfo(list);
    return n;
}

/* spec_lookup() - at start, where waiting for a name server is all right */
static int spec_lookup(const Spec *spec, int flags, VPAddr *addrs)
{
    int n;

    if (spec->port == NULL) {
        addr_unix(spec->addr, &addrs[0]);
        return 1;
    }
    n = addr_lookup(spec->addr, spec->port, flags, addrs);
    if (n <= 0) {
        fail(1, "-%c '%s': cannot look up '%s': %s", spec->option, spec->text,
             spec->addr, gai_strerror(n));
    }
    return n;
}

static const char *addr_name(const VPAddr *addr)
{
    static char buf[160];

    return vp_addr_str(addr, buf, sizeof(buf));
}

/* ---- listeners -------------------------------------------------------- */

/* A unix socket's file, to be removed at the end if it is still ours. */
typedef struct SocketFile {
    struct SocketFile *next;
    const char *path;
    dev_t dev;
    ino_t ino;
} SocketFile;

static SocketFile *socket_files;

static void socket_file_keep(const char *path)
{
    SocketFile *f = xcalloc(1, sizeof(*f));
    struct stat st;

    if (lstat(path, &st) == 0) {
        f->path = path;
        f->dev = st.st_dev;
        f->ino = st.st_ino;
        f->next = socket_files;
        socket_files = f;
    } else {
        free(f);
    }
}

static void socket_files_remove(void)
{
    while (socket_files != NULL) {
        SocketFile *f = socket_files;
        struct stat st;

        if (lstat(f->path, &st) == 0 && st.st_dev == f->dev &&
            st.st_ino == f->ino) {
            unlink(f->path);
        }
        socket_files = f->next;
        free(f);
    }
}

/*
 * clear_stale() - make way for a unix listener
 *
 * Removes a socket nobody answers on.  Returns 0, or why @addr is taken.
 */
static int clear_stale(const VPAddr *addr, const char *path)
{
    struct stat st;
    int fd, rc;

    if (lstat(path, &st) < 0) {
        return 0; /* bind() will say what else is wrong */
    }
    if (!S_ISSOCK(st.st_mode)) {
        return EEXIST;
    }
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        rc = errno;
    } else if (connect(fd, (const struct sockaddr *)&addr->ss,
                       addr->len) == 0 || errno != ECONNREFUSED) {
        rc = EADDRINUSE;
    } else {
        rc = unlink(path) < 0 ? errno : 0;
    }
    if (fd >= 0) {
        close(fd);
    }
    return rc;
}

/* addr_port() - where the port of an inet address is; network order */
static in_port_t *addr_port(VPAddr *addr)
{
    return addr->ss.ss_family == AF_INET6
           ? &((struct sockaddr_in6 *)&addr->ss)->sin6_port
           : &((struct sockaddr_in *)&addr->ss)->sin_port;
}

/*
 * listen_at() - a listening socket
 * @alone:  it is the only address of its spec
 *
 * Updates @addr with the port picked.  Returns the socket or -errno.
 */
static int listen_at(VPAddr *addr, bool alone)
{
    const char *path = ((struct sockaddr_un *)&addr->ss)->sun_path;
    int family = addr->ss.ss_family, one = 1, rc = 0;
    int fd = socket(family, SOCK_STREAM, 0);

    if (fd < 0) {
        return -errno;
    }
    if (family == AF_UNIX) {
        rc = clear_stale(addr, path);
    } else {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    }
    if (family == AF_INET6 && !alone) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof(one));
    }
    if (rc == 0 &&
        (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ||
         bind(fd, (struct sockaddr *)&addr->ss, addr->len) < 0 ||
         listen(fd, SOMAXCONN) < 0)) {
        rc = errno;
    }
    if (rc != 0) {
        close(fd);
        return -rc;
    }
    if (family != AF_UNIX) {
        addr->len = sizeof(addr->ss);
        getsockname(fd, (struct sockaddr *)&addr->ss, &addr->len);
    }
    return fd;
}

/*
 * listen_spec() - listen at every address of a spec
 * @fds:  room for MAX_ADDRS
 *
 * A family this machine doesn't have is left out, unless it is the only one.
 * Returns the number of sockets; ends the program if none could be bound.
 */
static int listen_spec(const Spec *spec, int *fds)
{
    VPAddr addrs[MAX_ADDRS];
    int naddrs = spec_lookup(spec, AI_PASSIVE, addrs), n = 0, err = 0;
    in_port_t port = 0;

    for (int i = 0; i < naddrs; i++) {
        int fd;

        if (spec->port != NULL && *addr_port(&addrs[i]) == 0) {
            *addr_port(&addrs[i]) = port; /* one free port for all */
        }
        fd = listen_at(&addrs[i], naddrs == 1);
        if (fd == -EAFNOSUPPORT || fd == -EADDRNOTAVAIL) {
            err = -fd;
            continue;
        }
        if (fd < 0) {
            fail(1, "-%c '%s': cannot listen on %s: %s", spec->option,
                 spec->text, addr_name(&addrs[i]),
                 fd == -EEXIST ? "the file is not a socket" : strerror(-fd));
        }
        if (spec->port == NULL) {
            socket_file_keep(spec->addr);
        } else {
            port = *addr_port(&addrs[i]);
        }
        vp_log(VP_LOG_INFO, (int)spec->channel_id, "%s%s: listening on %s",
               spec->option == 'o' ? "oforward " : "channel ",
               spec->option == 'o' ? spec->service_id
                                   : method_name[spec->method],
               addr_name(&addrs[i]));
        fds[n++] = fd;
    }
    if (n == 0) {
        fail(1, "-%c '%s': cannot listen on %s: %s", spec->option, spec->text,
             addr_name(&addrs[0]), strerror(err));
    }
    return n;
}

/* ---- channels --------------------------------------------------------- */

typedef struct Channel {
    struct Channel *next;
    const Spec *spec;
    VPDriver *drv;
    VPTimer timer;      /* to try again, or to give up a connect() */
    uint64_t wait;
    int said;           /* errno of the failure that was logged last */
    bool ended;         /* an inherited descriptor that was closed */

    int fd;             /* connecting, or the FIFO that was opened first */
    VPAddr addrs[MAX_ADDRS];
    int naddrs;
    int next_addr;

    pid_t lookup;       /* child that looks up the name */
    int lookup_fd;
    size_t lookup_len;

    int tty;            /* our own descriptor of it, to put back: */
    struct termios tty_was;

    int listeners[MAX_ADDRS];
    int nlisteners;
    VPTimer accept_timer;
    bool starved;
} Channel;

static VPLoop *loop;
static Spec *specs; /* what the command line asks for */
static Channel *channels;
static int exit_status;

static void channel_open(void *opaque);

/* channel_retry() - it can't be opened now; log that once, try later */
static void channel_retry(Channel *ch, const char *what, int err)
{
    if (err != ch->said) {
        ch->said = err;
        vp_log(VP_LOG_INFO, (int)ch->spec->channel_id, "channel %s: %s: %s: "
               "trying again", method_name[ch->spec->method], what,
               strerror(err));
    }
    vp_timer_start(loop, &ch->timer, ch->wait, channel_open, ch);
    ch->wait = ch->wait * 2 < RETRY_MAX ? ch->wait * 2 : RETRY_MAX;
}

static void channel_attach(Channel *ch, int rfd, int wfd, VPChannelKind kind)
{
    int rc;

    vp_timer_stop(&ch->timer);
    rc = vp_attach(ch->drv, rfd, wfd, kind,
                   ch->spec->method == UNIX_CONNECT ||
                   ch->spec->method == TCP_CONNECT);
    if (rc < 0) {
        channel_retry(ch, "attaching", -rc);
        return;
    }
    vp_log(VP_LOG_DEBUG, (int)ch->spec->channel_id, "channel %s: open",
           method_name[ch->spec->method]);
    ch->said = 0;
}

/* ---- serial lines ----------------------------------------------------- */

/* tty_raw() - returns 0, or the errno why @fd is no line we can use */
static int tty_raw(Channel *ch, int fd)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct termios t;
    speed_t speed = find_speed(ch->spec->method == ISASERIAL_OPEN
                               ? ch->spec->port : NULL);

    if (tcgetattr(fd, &t) < 0) {
        return errno;
    }
    /* TIOCEXCL doesn't keep root out, the lock keeps other qemu-vps out */
    if (fcntl(fd, F_SETLK, &lock) < 0) {
        return EBUSY;
    }
    ioctl(fd, TIOCEXCL);
    ch->tty_was = t;
    ch->tty = dup(fd);
    cfmakeraw(&t);
    t.c_cflag |= CLOCAL | CREAD;
    t.c_cflag &= ~(tcflag_t)CSTOPB;
#ifdef CRTSCTS
    t.c_cflag &= ~(tcflag_t)CRTSCTS;
#endif
    cfsetispeed(&t, speed);
    cfsetospeed(&t, speed);
    if (tcsetattr(fd, TCSANOW, &t) < 0) {
        return errno;
    }
    tcflush(fd, TCIOFLUSH);
    return 0;
}

/* tty_restore() - as it was; and don't wait 30 s for a line nobody reads */
static void tty_restore(Channel *ch)
{
    if (ch->tty >= 0) {
        tcflush(ch->tty, TCIOFLUSH);
        tcsetattr(ch->tty, TCSANOW, &ch->tty_was);
        ioctl(ch->tty, TIOCNXCL);
        close(ch->tty);
        ch->tty = -1;
    }
}

static void open_serial(Channel *ch)
{
    const char *path = ch->spec->addr;
    int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK), err;

    if (fd < 0) {
        channel_retry(ch, path, errno);
        return;
    }
    err = tty_raw(ch, fd);
    if (err != 0) {
        tty_restore(ch);
        close(fd);
        channel_retry(ch, path, err);
        return;
    }
    channel_attach(ch, fd, fd, VP_CHN_TTY);
}

/* ---- virtio-serial ---------------------------------------------------- */

/*
 * open_fifos() - PATH.in and PATH.out in place of a port
 *
 * The one to read is opened first and stays open: the other can only be
 * opened once the other side reads.
 */
static void open_fifos(Channel *ch)
{
    char path[PATH_MAX];
    int wfd;

    if (ch->fd < 0) {
        snprintf(path, sizeof(path), "%s.in", ch->spec->addr);
        ch->fd = open(path, O_RDONLY | O_NONBLOCK);
        if (ch->fd < 0) {
            channel_retry(ch, ch->spec->addr, errno);
            return;
        }
    }
    snprintf(path, sizeof(path), "%s.out", ch->spec->addr);
    wfd = open(path, O_WRONLY | O_NONBLOCK);
    if (wfd < 0) {
        channel_retry(ch, path, errno);
        return;
    }
    channel_attach(ch, ch->fd, wfd, VP_CHN_VIRTSERIAL);
    ch->fd = -1;
}

static void open_port(Channel *ch)
{
    const char *path = ch->spec->addr;
    int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK), err = errno;
    struct stat st;

    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISCHR(st.st_mode)) {
        channel_attach(ch, fd, fd, VP_CHN_VIRTSERIAL);
        return;
    }
    if (fd >= 0) {
        close(fd);
        err = ENOTTY;
    }
    if (err == ENOENT) {
        open_fifos(ch);
    } else {
        channel_retry(ch, path, err);
    }
}

/* ---- connecting ------------------------------------------------------- */

static void connect_next(Channel *ch, int err);

static void connect_done(void *opaque, int fd, int events)
{
    Channel *ch = opaque;
    int err = 0;
    socklen_t len = sizeof(err);

    (void)events;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len);
    vp_unwatch(loop, fd);
    ch->fd = -1;
    if (err == 0) {
        channel_attach(ch, fd, fd, VP_CHN_SOCKET);
        return;
    }
    close(fd);
    connect_next(ch, err);
}

static void connect_timeout(void *opaque)
{
    Channel *ch = opaque;

    vp_unwatch(loop, ch->fd);
    close(ch->fd);
    ch->fd = -1;
    connect_next(ch, ETIMEDOUT);
}

/* connect_next() - try the next address; @err is what the last one said */
static void connect_next(Channel *ch, int err)
{
    while (ch->next_addr < ch->naddrs) {
        VPAddr *addr = &ch->addrs[ch->next_addr++];
        int fd = socket(addr->ss.ss_family, SOCK_STREAM, 0);

        if (fd < 0) {
            err = errno;
            continue;
        }
        if (fcntl(fd, F_SETFL, O_NONBLOCK) == 0 &&
            connect(fd, (struct sockaddr *)&addr->ss, addr->len) == 0) {
            channel_attach(ch, fd, fd, VP_CHN_SOCKET);
            return;
        }
        err = errno;
        if (err == EINPROGRESS || err == EINTR) {
            int rc = vp_watch(loop, fd, connect_done, ch);

            if (rc == 0) {
                ch->fd = fd;
                vp_watch_set(loop, fd, VP_WRITE);
                vp_timer_start(loop, &ch->timer, CONNECT_TIMEOUT,
                               connect_timeout, ch);
                return;
            }
            err = -rc;
        }
        close(fd);
    }
    channel_retry(ch, ch->spec->addr, err);
}

static void lookup_done(void *opaque, int fd, int events)
{
    Channel *ch = opaque;
    ssize_t n = read(fd, (char *)ch->addrs + ch->lookup_len,
                     sizeof(ch->addrs) - ch->lookup_len);

    (void)events;
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        return;
    }
    if (n > 0) {
        ch->lookup_len += (size_t)n;
        return;
    }
    vp_unwatch(loop, fd);
    close(fd);
    waitpid(ch->lookup, NULL, 0);
    ch->lookup = 0;
    ch->naddrs = (int)(ch->lookup_len / sizeof(ch->addrs[0]));
    ch->next_addr = 0;
    connect_next(ch, EHOSTUNREACH);
}

/* lookup_child() - in the child: write what the name server says */
static void lookup_child(const Spec *spec, int fd)
{
    VPAddr addrs[MAX_ADDRS];
    int top = (int)sysconf(_SC_OPEN_MAX), n;

    /* held open here, a connection would outlive its close in the parent */
    for (int i = STDERR_FILENO + 1; i < top; i++) {
        if (i != fd) {
            close(i);
        }
    }
    memset(addrs, 0, sizeof(addrs));
    n = addr_lookup(spec->addr, spec->port, 0, addrs);
    if (n > 0 && write(fd, addrs, (size_t)n * sizeof(addrs[0])) < 0) {
        _exit(1);
    }
    _exit(0);
}

static void open_tcp(Channel *ch)
{
    int fds[2], err;
    pid_t pid;

    ch->next_addr = 0;
    ch->naddrs = addr_lookup(ch->spec->addr, ch->spec->port, AI_NUMERICHOST,
                             ch->addrs);
    if (ch->naddrs > 0) {
        connect_next(ch, 0);
        return;
    }
    if (pipe(fds) < 0) {
        channel_retry(ch, ch->spec->addr, errno);
        return;
    }
    pid = fork();
    if (pid == 0) {
        lookup_child(ch->spec, fds[1]);
    }
    err = errno;
    close(fds[1]);
    if (pid < 0 || fcntl(fds[0], F_SETFL, O_NONBLOCK) < 0 ||
        vp_watch(loop, fds[0], lookup_done, ch) < 0) {
        close(fds[0]);
        channel_retry(ch, ch->spec->addr, pid < 0 ? err : ENOMEM);
        return;
    }
    ch->lookup = pid;
    ch->lookup_fd = fds[0];
    ch->lookup_len = 0;
    vp_watch_set(loop, fds[0], VP_READ);
}

/* channel_open() - start opening; for listeners there is nothing to do */
static void channel_open(void *opaque)
{
    Channel *ch = opaque;

    switch (ch->spec->method) {
    case UNIX_CONNECT:
        addr_unix(ch->spec->addr, &ch->addrs[0]);
        ch->naddrs = 1;
        ch->next_addr = 0;
        connect_next(ch, 0);
        break;
    case TCP_CONNECT:
        open_tcp(ch);
        break;
    case VIRTSERIAL_OPEN:
        open_port(ch);
        break;
    case ISASERIAL_OPEN:
        open_serial(ch);
        break;
    case UNIX_LISTEN:
    case TCP_LISTEN:
    case INHERITED_FD:
        break;
    }
}

/* channel_lost() - the engine has closed the channel's descriptor */
static void channel_lost(void *opaque, const char *reason)
{
    Channel *ch = opaque;

    vp_log(VP_LOG_DEBUG, (int)ch->spec->channel_id, "channel %s: lost: %s",
           method_name[ch->spec->method], reason);
    tty_restore(ch);
    if (ch->nlisteners > 0) {
        return;
    }
    if (ch->spec->method == INHERITED_FD) {
        vp_log(VP_LOG_ERROR, (int)ch->spec->channel_id,
               "the inherited descriptor is closed for good: %s", reason);
        ch->ended = true;
        for (ch = channels; ch != NULL; ch = ch->next) {
            if (!ch->ended) {
                return;
            }
        }
        exit_status = 1; /* no channel is left to serve */
        vp_loop_stop(loop);
        return;
    }
    ch->wait = RETRY_MIN;
    vp_timer_start(loop, &ch->timer, ch->wait, channel_open, ch);
}

/* ---- listening channels ----------------------------------------------- */

static void channel_listen_again(void *opaque)
{
    Channel *ch = opaque;

    for (int i = 0; i < ch->nlisteners; i++) {
        vp_watch_set(loop, ch->listeners[i], VP_READ);
    }
}

static void channel_accept(void *opaque, int fd, int events)
{
    Channel *ch = opaque;
    int peer = accept(fd, NULL, NULL);

    (void)events;
    if (peer >= 0) {
        ch->starved = false;
        if (fcntl(peer, F_SETFL, O_NONBLOCK) < 0) {
            close(peer);
        } else {
            vp_offer(ch->drv, peer);
        }
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
               errno == ENOMEM) {
        if (!ch->starved) {
            ch->starved = true;
            vp_log(VP_LOG_WARN, (int)ch->spec->channel_id,
                   "channel %s: cannot accept: %s",
                   method_name[ch->spec->method], strerror(errno));
        }
        for (int i = 0; i < ch->nlisteners; i++) {
            vp_watch_set(loop, ch->listeners[i], 0);
        }
        vp_timer_start(loop, &ch->accept_timer, ACCEPT_PAUSE,
                       channel_listen_again, ch);
    }
}

static void channel_listen(Channel *ch)
{
    for (int i = 0; i < ch->nlisteners; i++) {
        int rc = vp_watch(loop, ch->listeners[i], channel_accept, ch);

        if (rc < 0) {
            fail(1, "-c '%s': %s", ch->spec->text, strerror(-rc));
        }
    }
    channel_listen_again(ch);
}

/* channel_inherit() - a descriptor somebody opened for us */
static void channel_inherit(Channel *ch)
{
    int fd = atoi(ch->spec->addr), listening = 0, err;
    socklen_t len = sizeof(listening);
    struct stat st;

    if (fstat(fd, &st) < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        fail(1, "-c '%s': descriptor %d: %s", ch->spec->text, fd,
             strerror(errno));
    }
    if (S_ISSOCK(st.st_mode)) {
        getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len);
        if (listening) {
            ch->listeners[ch->nlisteners++] = fd;
            channel_listen(ch);
        } else {
            channel_attach(ch, fd, fd, VP_CHN_SOCKET);
        }
    } else if (isatty(fd)) {
        err = tty_raw(ch, fd);
        if (err != 0) {
            fail(1, "-c '%s': descriptor %d: %s", ch->spec->text, fd,
                 strerror(err));
        }
        channel_attach(ch, fd, fd, VP_CHN_TTY);
    } else if (S_ISCHR(st.st_mode)) {
        channel_attach(ch, fd, fd, VP_CHN_VIRTSERIAL);
    } else {
        fail(1, "-c '%s': descriptor %d is no socket, serial line or "
             "virtio-serial port", ch->spec->text, fd);
    }
}

static Channel *channel_find(unsigned id)
{
    Channel *ch = channels;

    while (ch != NULL && ch->spec->channel_id != id) {
        ch = ch->next;
    }
    return ch;
}

static void channel_start(const Spec *spec, const VPConfig *config)
{
    Channel *ch = xcalloc(1, sizeof(*ch));

    ch->spec = spec;
    ch->wait = RETRY_MIN;
    ch->fd = ch->tty = -1;
    ch->drv = vp_new(loop, (int)spec->channel_id, config, channel_lost, ch);
    if (ch->drv == NULL) {
        fail(1, "out of memory");
    }
    ch->next = channels;
    channels = ch;
    if (spec->method == INHERITED_FD) {
        channel_inherit(ch);
    } else if (spec->method == UNIX_LISTEN || spec->method == TCP_LISTEN) {
        ch->nlisteners = listen_spec(spec, ch->listeners);
        channel_listen(ch);
    }
}

static void channel_end(Channel *ch)
{
    if (ch->tty >= 0) {
        /* the engine is about to close its descriptor of the line */
        tcflush(ch->tty, TCOFLUSH);
    }
    vp_free(ch->drv);
    tty_restore(ch);
    vp_timer_stop(&ch->timer);
    vp_timer_stop(&ch->accept_timer);
    for (int i = 0; i < ch->nlisteners; i++) {
        vp_unwatch(loop, ch->listeners[i]);
        close(ch->listeners[i]);
    }
    if (ch->lookup > 0) {
        kill(ch->lookup, SIGKILL);
        waitpid(ch->lookup, NULL, 0);
    }
    free(ch);
}

/* ---- forwards --------------------------------------------------------- */

static void forward_start(const Spec *spec)
{
    VPDriver *drv = channel_find(spec->channel_id)->drv;
    VPAddr addrs[MAX_ADDRS];
    int fds[MAX_ADDRS], rc = 0, n;

    if (spec->option == 'o') {
        n = listen_spec(spec, fds);
        for (int i = 0; i < n && rc == 0; i++) {
            rc = vp_set_oforward(drv, fds[i], spec->service_id);
        }
    } else {
        n = spec_lookup(spec, 0, addrs);
        rc = vp_set_iforward(drv, spec->service_id, addrs, (size_t)n);
    }
    if (rc < 0) {
        fail(1, "-%c '%s': %s", spec->option, spec->text, strerror(-rc));
    }
}

/* check_specs() - what only shows when all of them are known */
static void check_specs(size_t n)
{
    bool any = false;

    for (size_t i = 0; i < n; i++) {
        bool found = specs[i].option == 'c';

        any |= found;
        for (size_t j = 0; j < n; j++) {
            bool same = specs[j].channel_id == specs[i].channel_id;

            if (j < i && same && specs[i].option == specs[j].option) {
                if (specs[i].option == 'c') {
                    bad(&specs[i], "channel %u is there already",
                        specs[i].channel_id);
                }
                if (specs[i].option == 'i' &&
                    strcmp(specs[i].service_id, specs[j].service_id) == 0) {
                    bad(&specs[i], "service '%s' is there already",
                        specs[i].service_id);
                }
            }
            found |= same && specs[j].option == 'c';
        }
        if (!found && n > 1) {
            bad(&specs[i], "there is no channel %u", specs[i].channel_id);
        }
    }
    if (!any) {
        fail(2, "no channel: -c METHOD:ADDR:PORT[:CHANNEL_ID] is needed");
    }
}

/* ---- signals, start and end ------------------------------------------- */

static int signal_pipe[2];
static uint64_t quit_at; /* when flushing ends, then when resetting ends */
static bool quit_resetting;
static VPTimer quit_timer;

static void on_signal(int sig)
{
    int err = errno;
    char byte = (char)sig;

    if (write(signal_pipe[1], &byte, 1) < 0) {
        /* full: enough signals are waiting to be seen */
    }
    errno = err;
}

/* quit_step() - has everything gone out that was to go? */
static void quit_step(void *opaque)
{
    bool busy = false;

    (void)opaque;
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        busy |= vp_busy(ch->drv);
    }
    if (busy && vp_loop_now(loop) < quit_at) {
        vp_timer_start(loop, &quit_timer, QUIT_STEP, quit_step, NULL);
    } else if (!quit_resetting) {
        for (Channel *ch = channels; ch != NULL; ch = ch->next) {
            vp_reset_all(ch->drv);
        }
        quit_resetting = true;
        quit_at = vp_loop_now(loop) + RESET_TIME;
        vp_timer_start(loop, &quit_timer, QUIT_STEP, quit_step, NULL);
    } else {
        vp_loop_stop(loop);
    }
}

static void signal_ready(void *opaque, int fd, int events)
{
    char sigs[16];
    ssize_t n = read(fd, sigs, sizeof(sigs));

    (void)opaque;
    (void)events;
    for (ssize_t i = 0; i < n; i++) {
        if (quit_at != 0) {
            vp_loop_stop(loop);
            return;
        }
        vp_log(VP_LOG_INFO, VP_NO_CHANNEL, "ending on signal %d", sigs[i]);
        for (Channel *ch = channels; ch != NULL; ch = ch->next) {
            vp_stop_listening(ch->drv);
        }
        quit_at = vp_loop_now(loop) + FLUSH_TIME;
        quit_step(NULL);
    }
}

static void signals_start(void)
{
    struct sigaction sa = { .sa_handler = SIG_IGN };

    sigaction(SIGPIPE, &sa, NULL);
    if (pipe(signal_pipe) < 0 ||
        fcntl(signal_pipe[0], F_SETFL, O_NONBLOCK) < 0 ||
        fcntl(signal_pipe[1], F_SETFL, O_NONBLOCK) < 0 ||
        vp_watch(loop, signal_pipe[0], signal_ready, NULL) < 0) {
        fail(1, "cannot make a pipe: %s", strerror(errno));
    }
    vp_watch_set(loop, signal_pipe[0], VP_READ);
    sa.sa_handler = on_signal;
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGINT, &sa, NULL);
}

/* descriptors_raise() - as many as we may have */
static void descriptors_raise(void)
{
    struct rlimit lim;

    if (getrlimit(RLIMIT_NOFILE, &lim) == 0 && lim.rlim_cur < lim.rlim_max) {
        lim.rlim_cur = lim.rlim_max;
        setrlimit(RLIMIT_NOFILE, &lim);
    }
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "channel", required_argument, NULL, 'c' },
        { "oforward", required_argument, NULL, 'o' },
        { "iforward", required_argument, NULL, 'i' },
        { "grace", required_argument, NULL, 'g' },
        { "verbose", no_argument, NULL, 'v' },
        { "quiet", no_argument, NULL, 'q' },
        { "version", no_argument, NULL, 'V' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    VPConfig config = { .grace = 30, .max_conns = 16384 };
    int opt, level = VP_LOG_INFO, rc;
    unsigned long number;
    size_t n = 0;

    specs = xcalloc((size_t)argc, sizeof(*specs));
    while ((opt = getopt_long(argc, argv, "c:o:i:vqVh", options,
                              NULL)) != -1) {
        switch (opt) {
        case 'c':
        case 'o':
        case 'i':
            parse_spec(&specs[n++], (char)opt, optarg);
            break;
        case 'g':
            if (!parse_number(optarg, 1000000, &number)) {
                fail(2, "--grace '%s': expected a number of seconds up to "
                     "1000000", optarg);
            }
            config.grace = (unsigned)number;
            break;
        case 'v':
            level++;
            break;
        case 'q':
            level--;
            break;
        case 'V':
            puts("qemu-vp " VERSION);
            return 0;
        case 'h':
            fputs(usage_text, stdout);
            return 0;
        default:
            fputs("Try 'qemu-vp -h'.\n", stderr);
            return 2;
        }
    }
    if (optind < argc) {
        fail(2, "'%s': expected an option", argv[optind]);
    }
    check_specs(n);
    log_level = level < VP_LOG_ERROR ? VP_LOG_ERROR
                : level > VP_LOG_DEBUG ? VP_LOG_DEBUG : (VPLogLevel)level;

    descriptors_raise();
    atexit(socket_files_remove);
    loop = vp_loop_new();
    if (loop == NULL) {
        fail(1, "out of memory");
    }
    signals_start();
    for (size_t i = 0; i < n; i++) {
        if (specs[i].option == 'c') {
            channel_start(&specs[i], &config);
        }
    }
    for (size_t i = 0; i < n; i++) {
        if (specs[i].option != 'c') {
            forward_start(&specs[i]);
        }
    }
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        channel_open(ch);
    }
    rc = vp_loop_run(loop);
    if (rc < 0) {
        vp_log(VP_LOG_ERROR, VP_NO_CHANNEL, "select: %s", strerror(-rc));
        exit_status = 1;
    }
    while (channels != NULL) {
        Channel *ch = channels;

        channels = ch->next;
        channel_end(ch);
    }
    vp_unwatch(loop, signal_pipe[0]);
    vp_loop_free(loop);
    return exit_status;
}
