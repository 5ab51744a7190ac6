/*
 * qemu-vp - forward sockets between host and guest over one channel
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The program around the engine of virtproxy.c.  It reads the command line
 * and the init file, binds the listeners, keeps each channel open, and serves
 * the monitor.
 *
 * Rooms, each built on the ones before:
 *
 *   text       errors in words, texts that grow, words and numbers
 *   log        where lines go
 *   specs      the text of a -c, -o or -i, checked and cut into its fields;
 *              before "options", because a list of specs is among their values
 *   options    one table of them, and the values of one reading
 *   init file  the command line, the init file it names, and the key: read,
 *              checked as a whole, and printed by --dump-config
 *   addresses  of hosts and paths; a child waits for the name server
 *   listeners  sockets to listen on, our own and inherited ones, and the files
 *              of unix sockets
 *   channels   what can't be opened now, or is lost later, is tried again for
 *              ever
 *   forwards   oforwards and iforwards
 *   running    what runs: add to it, remove from it, reload it, end it
 *   monitor    "info", commands, events, clients; the client that -x is
 *   dial       the client that -W is
 *   daemon     pid file, user, readiness, signals, start and end
 *
 * Whatever is wrong with the command line or the init file is found before
 * anything is opened: exit status 2.  What is wrong for good at start, such as
 * a port in use, ends the program with status 1, because a user who asked for
 * it must know.  What can heal by itself, such as an address that isn't there
 * yet or a name server that doesn't answer, is logged and tried again.  Once
 * the program runs, errors are an answer of the monitor or a line in the log,
 * and end nothing else that runs.
 */
#include "virtproxy.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#ifdef HAVE_VSOCK
#include <linux/vm_sockets.h>
#endif
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <syslog.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define VERSION "0.1"

#define MS 1000ull
#define SECOND 1000000ull

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ======================================================================
 * text
 *
 * How all rooms say what is wrong, build answers, and cut up what they read.
 * ====================================================================== */

/*
 * Longest value of an option.  A path can be 4095 bytes long, and the suffix
 * of a FIFO's name is appended to it.
 */
#define VALUE_MAX 4000

/* Longest path of a unix socket. */
#define SOCKET_PATH_MAX (sizeof(((struct sockaddr_un *)0)->sun_path) - 1)

/* What went wrong, in words for the user: one printable line. */
typedef struct Error {
    char text[512];
} Error;

/* A text that grows; all zeros is an empty one. */
typedef struct Text {
    char *data;  /* ends with a NUL; NULL: nothing was added yet */
    size_t len;  /* bytes without the NUL */
    size_t size; /* bytes allocated */
    bool failed; /* memory ran out, and the rest is missing */
} Text;

/* make_printable() - replace control characters by '?' */
static void make_printable(char *text)
{
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < ' ' || *text == '\177') {
            *text = '?';
        }
    }
}

/* format_line() - vsnprintf() to one printable line, whatever it quotes */
static void format_line(char *line, size_t size, const char *fmt, va_list ap)
{
    vsnprintf(line, size, fmt, ap);
    make_printable(line);
}

/* error_set() - always false, so that a caller can return it */
__attribute__((format(printf, 2, 3)))
static bool error_set(Error *err, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    format_line(err->text, sizeof(err->text), fmt, ap);
    va_end(ap);
    return false;
}

static bool error_memory(Error *err)
{
    return error_set(err, "out of memory");
}

/* text_add() - append; where memory runs out @t has failed from then on */
__attribute__((format(printf, 2, 3)))
static void text_add(Text *t, const char *fmt, ...)
{
    va_list ap, measured;
    size_t need;

    va_start(ap, fmt);
    va_copy(measured, ap);
    need = t->len + (size_t)vsnprintf(NULL, 0, fmt, measured) + 1;
    va_end(measured);
    if (need > t->size) {
        char *data = realloc(t->data, 2 * need);

        if (data == NULL) {
            t->failed = true;
        } else {
            t->data = data;
            t->size = 2 * need;
        }
    }
    if (!t->failed) {
        vsnprintf(t->data + t->len, t->size - t->len, fmt, ap);
        t->len = need - 1;
    }
    va_end(ap);
}

static void text_free(Text *t)
{
    free(t->data);
    *t = (Text){ .data = NULL };
}

/*
 * stdout_status() - flush stdout; returns the exit status
 *
 * The status is 1, and stderr says why, if not all that was printed got out.
 */
static int stdout_status(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout)) {
        return 0;
    }
    fprintf(stderr, "qemu-vp: cannot write: %s\n", strerror(errno));
    return 1;
}

/* text_print() - write @t to stdout and free it; returns the exit status */
static int text_print(Text *t)
{
    if (t->failed) {
        text_free(t);
        fputs("qemu-vp: out of memory\n", stderr);
        return 1;
    }
    fputs(t->data != NULL ? t->data : "", stdout);
    text_free(t);
    return stdout_status();
}

/* parse_number() - is all of @text a number from @min to @max? */
static bool parse_number(const char *text, unsigned long min,
                         unsigned long max, unsigned long *value)
{
    char *end;

    if (text[0] < '0' || text[0] > '9') {
        return false;
    }
    errno = 0;
    *value = strtoul(text, &end, 10);
    return errno == 0 && *end == '\0' && *value >= min && *value <= max;
}

/*
 * cut_word() - cut the first word off @line
 * @around:  what goes from both ends of @line
 * @rest:    becomes what follows the word, without the blanks between
 */
static char *cut_word(char *line, const char *around, char **rest)
{
    char *word = line + strspn(line, around), *end = word + strlen(word);

    while (end > word && strchr(around, end[-1]) != NULL) {
        *--end = '\0';
    }
    end = word + strcspn(word, " \t");
    *rest = end + strspn(end, " \t");
    *end = '\0';
    return word;
}

/* string_same() - are both the same, or both NULL? */
static bool string_same(const char *a, const char *b)
{
    return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0);
}

/* value_wrong() - why an init file can't hold this value, or NULL */
static const char *value_wrong(const char *value)
{
    size_t len = strlen(value);

    for (const char *p = value; *p != '\0'; p++) {
        if ((unsigned char)*p < ' ' || *p == '\177') {
            return "it has a control character";
        }
    }
    if (len > 0 && (value[0] == ' ' || value[len - 1] == ' ')) {
        return "it begins or ends with a blank";
    }
    return len > VALUE_MAX ? "it is too long" : NULL;
}

/* ======================================================================
 * log
 *
 * Each event is one line, of the engine and of the program alike.  A line is
 * lost rather than waited for, because a full pipe, a full disk or a syslogd
 * that has stopped must not stop the daemon.
 * ====================================================================== */

/* Where syslogd listens, if <syslog.h> doesn't say. */
#ifndef _PATH_LOG
#define _PATH_LOG "/dev/log"
#endif

/* Bytes of a text: RFC 3164 has 1024 for a line, with date, name and so on. */
#define LOG_TEXT_MAX 768

static const char *const level_name[] = {
    "error", "warn", "info", "verbose", "debug",
};
static VPLogLevel log_level = VP_LOG_INFO; /* lines beyond it are left out */
static int log_fd = STDERR_FILENO;         /* -1: syslog */
static bool log_journal;                   /* log_fd is a journal's stream */
static bool log_torn;                      /* the last line lacks its end */
static int syslog_fd = -1;                 /* connected to syslogd, or -1 */
static int syslog_type = SOCK_DGRAM;       /* what its socket is, or is tried */

/* syslog_connect() - be connected to syslogd; false: see errno */
static bool syslog_connect(void)
{
    struct sockaddr_un sun = { .sun_family = AF_UNIX, .sun_path = _PATH_LOG };

    for (int try = 0; syslog_fd < 0 && try < 2; try++) {
        int fd = socket(AF_UNIX, syslog_type, 0), err;

        if (fd >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0 &&
            connect(fd, (struct sockaddr *)&sun, sizeof(sun)) == 0) {
            syslog_fd = fd;
            break;
        }
        err = errno;
        if (fd >= 0) {
            close(fd);
        }
        errno = err;
        if (err != EPROTOTYPE) {
            break;
        }
        syslog_type = syslog_type == SOCK_DGRAM ? SOCK_STREAM : SOCK_DGRAM;
    }
    return syslog_fd >= 0;
}

/*
 * syslog_send() - send @line, made as RFC 3164 has it, to syslog
 *
 * syslog(3) is of no use here, because it blocks for ever on a syslogd that
 * lives but doesn't read.  A syslogd that was started anew has a new socket,
 * so a second try connects again.
 */
static void syslog_send(const char *line, size_t len)
{
    for (int try = 0; try < 2 && syslog_connect(); try++) {
        size_t size = syslog_type == SOCK_STREAM ? len + 1 : len; /* a NUL */
        ssize_t n = send(syslog_fd, line, size, 0);

        if (n == (ssize_t)size || (n < 0 && errno == EAGAIN)) {
            return;
        }
        /* after half a line only a new stream can begin another one */
        close(syslog_fd);
        syslog_fd = -1;
    }
}

/* log_date() - now, as it stands in a line of the log that is in use */
static void log_date(char *date, size_t size)
{
    struct timespec ts;
    struct tm tm;
    size_t len;

    if (clock_gettime(CLOCK_REALTIME, &ts) < 0 ||
        localtime_r(&ts.tv_sec, &tm) == NULL) {
        /* where time_t has 32 bits time ends in 2038 */
        snprintf(date, size, "(no date)");
    } else if (log_fd < 0) {
        strftime(date, size, "%b %e %H:%M:%S", &tm);
    } else {
        len = strftime(date, size, "%Y-%m-%d %H:%M:%S", &tm);
        snprintf(date + len, size - len, ".%03d",
                 (int)(ts.tv_nsec / 1000000));
    }
}

/*
 * log_line() - write a line, whatever its level is
 * @channel:  id of the channel it concerns, or VP_NO_CHANNEL
 * @text:     printable, without a newline
 */
static void log_line(VPLogLevel level, int channel, const char *text)
{
    static const int priority[] = {
        LOG_ERR, LOG_WARNING, LOG_INFO, LOG_INFO, LOG_DEBUG,
    };
    struct pollfd pfd = { .fd = log_fd, .events = POLLOUT };
    char line[1024], where[16] = "", date[32];
    int len;

    if (channel != VP_NO_CHANNEL) {
        snprintf(where, sizeof(where), "ch%d: ", channel);
    }
    log_date(date, sizeof(date));
    if (log_fd < 0) {
        len = snprintf(line, sizeof(line), "<%d>%s qemu-vp[%ld]: %s%.*s",
                       LOG_DAEMON | priority[level], date, (long)getpid(),
                       where, LOG_TEXT_MAX, text);
        syslog_send(line, (size_t)len);
        return;
    }
    if (log_journal) {
        len = snprintf(line, sizeof(line), "<%d>%s%.*s\n", priority[level],
                       where, LOG_TEXT_MAX, text);
    } else {
        len = snprintf(line, sizeof(line), "%s%s %s %s%.*s\n",
                       log_torn ? "\n" : "", date, level_name[level], where,
                       LOG_TEXT_MAX, text);
    }
    if (poll(&pfd, 1, 0) > 0) {
        ssize_t n = write(log_fd, line, (size_t)len);

        /* there is nowhere to say that the disk is full, but for once it has
           room again the next line is not to go on where this one was torn */
        log_torn = n < 0 ? log_torn : n < len;
    }
}

/* log_at() - write a line if its level is wanted; @channel as in log_line() */
__attribute__((format(printf, 3, 4)))
static void log_at(VPLogLevel level, int channel, const char *fmt, ...)
{
    char text[LOG_TEXT_MAX + 1];
    va_list ap;

    if (level <= log_level) {
        va_start(ap, fmt);
        format_line(text, sizeof(text), fmt, ap);
        va_end(ap);
        log_line(level, channel, text);
    }
}

/* log_engine() - VPLogFunc: a line of the engine's */
static void log_engine(VPLogLevel level, int channel, const char *text)
{
    int saved = errno;

    log_at(level, channel, "%s", text);
    errno = saved;
}

/*
 * stderr_is_journal() - is stderr a stream of systemd's journal?
 *
 * JOURNAL_STREAM has its device and inode (systemd.exec(5)).  The journal notes
 * the time itself, and a line's priority if that stands before it as <N>
 * (sd-daemon(3)).
 */
static bool stderr_is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long dev, ino;
    struct stat st;

    return stream != NULL && sscanf(stream, "%llu:%llu", &dev, &ino) == 2 &&
           fstat(STDERR_FILENO, &st) == 0 && st.st_dev == dev &&
           st.st_ino == ino;
}

/* log_open() - log to @path, "syslog", or NULL: stderr, from now on */
static bool log_open(const char *path, Error *err)
{
    int fd = STDERR_FILENO;

    if (path != NULL && strcmp(path, "syslog") == 0) {
        fd = -1;
    } else if (path != NULL) {
        /* with O_NONBLOCK, else open() waits for the reader of a FIFO */
        fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NOCTTY | O_NONBLOCK,
                  0644);
        if (fd < 0) {
            return error_set(err, "cannot open the log file %s: %s", path,
                             strerror(errno));
        }
    }
    if (log_fd > STDERR_FILENO) {
        close(log_fd);
    }
    log_fd = fd;
    log_torn = log_torn && lseek(fd, 0, SEEK_END) > 0; /* not if it is new */
    log_journal = fd == STDERR_FILENO && stderr_is_journal();
    return true;
}

/* log_check() - say so, while somebody may be at stderr, if there's no log */
static void log_check(void)
{
    if (log_fd < 0 && !syslog_connect()) {
        fprintf(stderr, "qemu-vp: no syslog at %s: %s: what would be logged is "
                "lost until there is one; -l FILE logs to a file\n", _PATH_LOG,
                strerror(errno));
    }
}

/* fail() - end with a message on stderr, and in the log if that is another */
static void fail(int status, const Error *err)
{
    fprintf(stderr, "qemu-vp: %s\n", err->text);
    if (log_fd != STDERR_FILENO) {
        log_line(VP_LOG_ERROR, VP_NO_CHANNEL, err->text);
    }
    exit(status);
}

/* ======================================================================
 * specs
 *
 * The value of -c, -o and -i is METHOD or SERVICE_ID, ADDR, PORT and
 * CHANNEL_ID with colons between, and properties behind that, ",NAME=VALUE"
 * each; -m has them behind its PATH.  A new property is a row of the table in
 * prop_take() and a member of Props, which props_same() compares.  A spec has
 * been checked as far as it can be without opening anything and without asking
 * a name server.
 * ====================================================================== */

typedef enum Method {
    UNIX_CONNECT,
    UNIX_LISTEN,
    TCP_CONNECT,
    TCP_LISTEN,
    VSOCK_CONNECT,
    VSOCK_LISTEN,
    VIRTSERIAL_OPEN,
    ISASERIAL_OPEN,
    INHERITED_FD,
} Method;

static const char *const method_name[] = {
    [UNIX_CONNECT] = "unix-connect",
    [UNIX_LISTEN] = "unix-listen",
    [TCP_CONNECT] = "tcp-connect",
    [TCP_LISTEN] = "tcp-listen",
    [VSOCK_CONNECT] = "vsock-connect",
    [VSOCK_LISTEN] = "vsock-listen",
    [VIRTSERIAL_OPEN] = "virtserial-open",
    [ISASERIAL_OPEN] = "isaserial-open",
    [INHERITED_FD] = "fd",
};

/* Of a serial line where PORT is '-'. */
#define DEFAULT_BAUD 115200

/* POSIX has those up to 38400. */
static const struct {
    unsigned baud;
    speed_t speed;
} speeds[] = {
    { 50, B50 }, { 75, B75 }, { 110, B110 }, { 134, B134 }, { 150, B150 },
    { 200, B200 }, { 300, B300 }, { 600, B600 }, { 1200, B1200 },
    { 1800, B1800 }, { 2400, B2400 }, { 4800, B4800 }, { 9600, B9600 },
    { 19200, B19200 }, { 38400, B38400 },
#ifdef B57600
    { 57600, B57600 },
#endif
#ifdef B115200
    { 115200, B115200 },
#endif
#ifdef B230400
    { 230400, B230400 },
#endif
#ifdef B460800
    { 460800, B460800 },
#endif
#ifdef B500000
    { 500000, B500000 },
#endif
#ifdef B576000
    { 576000, B576000 },
#endif
#ifdef B921600
    { 921600, B921600 },
#endif
#ifdef B1000000
    { 1000000, B1000000 },
#endif
#ifdef B1152000
    { 1152000, B1152000 },
#endif
#ifdef B1500000
    { 1500000, B1500000 },
#endif
#ifdef B2000000
    { 2000000, B2000000 },
#endif
#ifdef B2500000
    { 2500000, B2500000 },
#endif
#ifdef B3000000
    { 3000000, B3000000 },
#endif
#ifdef B3500000
    { 3500000, B3500000 },
#endif
#ifdef B4000000
    { 4000000, B4000000 },
#endif
};

/*
 * Linux takes any other rate as well, by ioctl()s that no libc declares.  They
 * are these, with this layout, on the processors that are named here.
 */
#if defined(__linux__) && defined(_IOR) && \
    (defined(__x86_64__) || defined(__i386__) || defined(__aarch64__) || \
     defined(__arm__) || defined(__riscv) || defined(__s390x__))
#define LINUX_RATES

typedef struct LinuxTermios {
    uint32_t iflag, oflag, cflag, lflag;
    uint8_t line, cc[19];
    uint32_t ispeed, ospeed; /* baud */
} LinuxTermios;

#ifdef __GLIBC__
typedef unsigned long LinuxRequest; /* what ioctl() takes */
#else
typedef int LinuxRequest;
#endif

#define LINUX_TCGETS2 ((LinuxRequest)_IOR('T', 0x2a, LinuxTermios))
#define LINUX_TCSETS2 ((LinuxRequest)_IOW('T', 0x2b, LinuxTermios))
#define LINUX_CBAUD 0x100fu
#define LINUX_BOTHER 0x1000u /* the rate is in "ospeed" */
#endif

/* Rates that have no name. */
#define BAUD_MIN 50
#define BAUD_MAX 4000000

/* The properties. */
typedef struct Props {
    long mode;  /* of the file of a unix socket that is listened on; -1: none */
    const char *group; /* of that file, as it was given; NULL: none */
    long gid;          /* its number; -1: not known, or there is none */
    bool proxy; /* the target gets headers of the PROXY protocol */
    VPLimits limits;
    unsigned given; /* a bit for each that was given */
} Props;

/* One -c, -o or -i. */
typedef struct Spec {
    char *text;              /* the value as it was given */
    char *fields;            /* a copy of it, cut into the strings below */
    char option;             /* letter: 'c', 'o' or 'i' */
    Method method;           /* of a 'c' only */
    const char *service_id;  /* of an 'o' or 'i' only */
    const char *addr;
    const char *port;        /* NULL: '-' was given */
    bool inherited;          /* ADDR is the number or name of a descriptor */
    unsigned channel_id;
    Props props;
    const char *props_text;  /* properties as they were given, ",..."; or "" */
    unsigned line;           /* line of the init file; 0: the command line */
    bool both;               /* [::] serves IPv4 as well */
    int naddrs;              /* how many of its addresses are known */
    VPAddr *addrs;           /* the known ones; or NULL */
    struct Spec *next;       /* in its chain of a SpecIndex */
    uint32_t hash;           /* of what puts it there */
    void *owner;             /* the Channel or Forward that it is of, or NULL */
} Spec;

/* spec_error() - say what is wrong with @spec; returns false */
__attribute__((format(printf, 3, 4)))
static bool spec_error(const Spec *spec, Error *err, const char *fmt, ...)
{
    char why[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(why, sizeof(why), fmt, ap);
    va_end(ap);
    return error_set(err, "-%c '%.128s': %s (expected %s)", spec->option,
                     spec->text, why,
                     spec->option == 'c' ? "METHOD:ADDR:PORT[:CHANNEL_ID]"
                     : spec->option == 'm' ? "PATH"
                     : spec->option == 'W' ? "SERVICE_ID:PATH:-"
                     : "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]");
}

/* prop_mode() - take @value over if it is octal, as chmod(1) has it */
static bool prop_mode(Props *props, const char *value)
{
    char *end;

    props->mode = strtol(value, &end, 8);
    return value[0] >= '0' && value[0] <= '7' && *end == '\0' &&
           props->mode <= 0777;
}

/*
 * Groups' numbers that were looked up.  Thousands of specs may name the same
 * group, and to look it up may take a server's answer.
 */
static struct {
    char *name; /* NULL: none */
    long number;
} known_groups[8];

/* groups_forget() - have the numbers looked up anew */
static void groups_forget(void)
{
    for (size_t i = 0; i < COUNT(known_groups); i++) {
        free(known_groups[i].name);
        known_groups[i].name = NULL;
    }
}

/* group_keep() - @number is that of the group @name */
static void group_keep(const char *name, long number)
{
    static size_t next; /* of known_groups, whose place is taken next */

    free(known_groups[next].name);
    known_groups[next].name = strdup(name); /* NULL: it is looked up again */
    known_groups[next].number = number;
    next = (next + 1) % COUNT(known_groups);
}

/* group_known() - the number of the group @name; -1: it isn't known here */
static long group_known(const char *name)
{
    unsigned long number;

    if (parse_number(name, 0, UINT_MAX - 1ul, &number)) {
        return (long)number;
    }
    for (size_t i = 0; i < COUNT(known_groups); i++) {
        if (known_groups[i].name != NULL &&
            strcmp(known_groups[i].name, name) == 0) {
            return known_groups[i].number;
        }
    }
    return -1;
}

/* group_lookup() - the same, from who knows; -1: there is none of that name */
static long group_lookup(const char *name)
{
    const struct group *gr = getgrnam(name);

    return gr != NULL ? (long)gr->gr_gid : -1;
}

static VPLoop *loop; /* the program's only one; NULL: nothing waits yet */

/* prop_group() - at start it is looked up; later a child does, see Lookup */
static bool prop_group(Props *props, const char *value)
{
    props->group = value;
    props->gid = group_known(value);
    if (props->gid < 0 && loop == NULL) {
        props->gid = group_lookup(value);
        if (props->gid >= 0) {
            group_keep(value, props->gid);
        }
    }
    return props->gid >= 0 ||
           (loop != NULL && value[strspn(value, "0123456789")] != '\0');
}

static bool prop_proxy(Props *props, const char *value)
{
    props->proxy = strcmp(value, "v2") == 0;
    return props->proxy;
}

/* prop_count() - take @value over if it is a number from 1 to 1000000 */
static bool prop_count(unsigned *count, const char *value)
{
    unsigned long number;

    if (!parse_number(value, 1, 1000000, &number)) {
        return false;
    }
    *count = (unsigned)number;
    return true;
}

static bool prop_max(Props *props, const char *value)
{
    return prop_count(&props->limits.max_conns, value);
}

static bool prop_idle(Props *props, const char *value)
{
    return prop_count(&props->limits.idle, value);
}

/* prop_take() - take over "NAME=VALUE" */
static bool prop_take(Spec *spec, const char *text, Error *why)
{
    static const struct {
        const char *name;
        const char *options; /* letters of those that it can stand behind */
        bool (*take)(Props *props, const char *value);
        const char *expected;
    } known[] = {
        { "mode", "com", prop_mode, "a mode from 0 to 0777" },
        { "group", "com", prop_group, "the name or the number of a group" },
        { "proxy", "i", prop_proxy, "'v2'" },
        { "max", "oi", prop_max, "a number from 1 to 1000000" },
        { "idle", "oi", prop_idle, "a number of seconds from 1 to 1000000" },
    };
    const char *value = strchr(text, '=');
    size_t len = value != NULL ? (size_t)(value++ - text) : 0, i = 0;

    while (i < COUNT(known) && (strlen(known[i].name) != len ||
                                memcmp(known[i].name, text, len) != 0)) {
        i++;
    }
    if (i == COUNT(known)) {
        return error_set(why, "',%.64s' is no property: there are mode=, "
                         "group=, proxy=, max= and idle=", text);
    }
    if (strchr(known[i].options, spec->option) == NULL) {
        return error_set(why, "%s is no property of -%c", known[i].name,
                         spec->option);
    }
    if (spec->props.given & 1u << i) {
        return error_set(why, "%s was given before", known[i].name);
    }
    spec->props.given |= 1u << i;
    return known[i].take(&spec->props, value) ||
           error_set(why, "%s '%.64s' is not %s", known[i].name, value,
                     known[i].expected);
}

/*
 * props_cut() - take over what stands behind the first comma of @text
 * @text:  in spec->fields; it is cut
 */
static bool props_cut(Spec *spec, char *text, Error *why)
{
    size_t len = strcspn(text, ",");
    char *comma;

    spec->props = (Props){ .mode = -1, .gid = -1 };
    spec->props_text = spec->text + (text - spec->fields) + len;
    while ((comma = strrchr(text, ',')) != NULL) {
        *comma = '\0';
        if (!prop_take(spec, comma + 1, why)) {
            return false;
        }
    }
    return true;
}

static bool props_same(const Props *a, const Props *b)
{
    return a->mode == b->mode && string_same(a->group, b->group) &&
           a->proxy == b->proxy &&
           a->limits.max_conns == b->limits.max_conns &&
           a->limits.idle == b->limits.idle;
}

/*
 * split_fields() - cut spec->fields at its colons
 * @field:  the 4 parts; a missing one becomes NULL
 *
 * ADDR may have colons in it if it stands in brackets.
 */
static bool split_fields(const Spec *spec, char *field[4], Error *err)
{
    char *at = spec->fields;

    for (int i = 0; i < 4; i++) {
        char *end;

        field[i] = at;
        if (at == NULL) {
            continue;
        }
        end = at + strcspn(at, ":");
        if (i == 1 && at[0] == '[') {
            end = strrchr(at, ']');
            if (end == NULL) {
                return spec_error(spec, err, "'[' without ']'");
            }
            if (end[1] != ':' && end[1] != '\0') {
                return spec_error(spec, err, "'%s' after ']', ':' was "
                                  "expected", end + 1);
            }
            *end++ = '\0';
            field[i]++;
        }
        at = *end == ':' ? end + 1 : NULL;
        *end = '\0';
    }
    return at == NULL ||
           spec_error(spec, err, "'%s' after the CHANNEL_ID; an ADDR with "
                      "colons stands in brackets, [ADDR]", at);
}

/* check_host() - a bare number is an address only to inet_aton() */
static bool check_host(const Spec *spec, Error *err)
{
    struct in6_addr in6;

    if (strcmp(spec->addr, "*") == 0) {
        return spec_error(spec, err, "ADDR '*' is neither a name nor an "
                          "address; [::] or 0.0.0.0 stands for all");
    }
    if (inet_pton(AF_INET6, spec->addr, &in6) == 1 &&
        IN6_IS_ADDR_LINKLOCAL(&in6)) {
        return spec_error(spec, err, "ADDR '%s' is one of each interface, [%s"
                          "%%eth0] for one is eth0's", spec->addr, spec->addr);
    }
    return spec->addr[strspn(spec->addr, "0123456789")] != '\0' ||
           spec_error(spec, err, "ADDR '%s' is neither a name nor an address, "
                      "such as 127.0.0.1 or [::1]", spec->addr);
}

static bool check_port(const Spec *spec, Error *err)
{
    bool listening = spec->option == 'o' ||
                     (spec->option == 'c' && spec->method == TCP_LISTEN);
    unsigned long least = listening ? 0 : 1, port;

    if (spec->port[strspn(spec->port, "0123456789")] != '\0') {
        const struct servent *service = getservbyname(spec->port, "tcp");

        if (service != NULL && service->s_port == 0 && !listening) {
            return spec_error(spec, err, "PORT '%s' is the service with port "
                              "0", spec->port);
        }
        return service != NULL ||
               spec_error(spec, err, "PORT '%s' is neither a number nor a "
                          "known service", spec->port);
    }
    return parse_number(spec->port, least, 65535, &port) ||
           spec_error(spec, err, "PORT '%s' is not a number from %lu to "
                      "65535", spec->port, least);
}

/* check_order() - ssh -L has the port to listen on first, and ours last */
static bool check_order(const Spec *spec, Error *err)
{
    unsigned long first, last;

    return spec->option != 'o' ||
           !parse_number(spec->service_id, IPPORT_RESERVED, 65535, &first) ||
           !parse_number(spec->port, 1, IPPORT_RESERVED - 1, &last) ||
           spec_error(spec, err, "this would listen on port %lu, for a service "
                      "named '%lu'", last, first);
}

/* check_path() - what looks like an address lacks its PORT rather than a '/' */
static bool check_path(const Spec *spec, Error *err)
{
    struct in6_addr addr;

    if (spec->option != 'm' &&
        (inet_pton(AF_INET, spec->addr, &addr) == 1 ||
         inet_pton(AF_INET6, spec->addr, &addr) == 1)) {
        return spec_error(spec, err, "PORT '-' makes ADDR '%s' the path of a "
                          "unix socket; ./%s is one", spec->addr, spec->addr);
    }
    return strlen(spec->addr) <= SOCKET_PATH_MAX ||
           spec_error(spec, err, "the path has %zu bytes, a unix socket's at "
                      "most %zu", strlen(spec->addr), SOCKET_PATH_MAX);
}

/* baud_speed() - the system's name of a rate; B0: it has none */
static speed_t baud_speed(unsigned baud)
{
    for (size_t i = 0; i < COUNT(speeds); i++) {
        if (speeds[i].baud == baud) {
            return speeds[i].speed;
        }
    }
    return B0;
}

/* port_baud() - the rate of a serial line with @port; 0: it isn't known here */
static unsigned port_baud(const char *port)
{
    unsigned long baud = DEFAULT_BAUD;
#ifdef LINUX_RATES
    bool any = true;
#else
    bool any = false;
#endif

    if (port != NULL && !parse_number(port, BAUD_MIN, BAUD_MAX, &baud)) {
        return 0;
    }
    return any || baud_speed((unsigned)baud) != B0 ? (unsigned)baud : 0;
}

/* speed_baud() - the rate that @speed stands for; 0: it is not known here */
static unsigned speed_baud(speed_t speed)
{
    for (size_t i = 0; i < COUNT(speeds); i++) {
        if (speeds[i].speed == speed) {
            return speeds[i].baud;
        }
    }
    return 0;
}

/* check_inherited() - ADDR is the number or the name of a descriptor */
static bool check_inherited(Spec *spec, Error *err)
{
    bool digits = spec->addr[strspn(spec->addr, "0123456789")] == '\0';
    unsigned long number;

    spec->inherited = true;
    return (digits ? parse_number(spec->addr, 0, INT_MAX, &number)
                   : spec->addr[0] != '-') ||
           spec_error(spec, err, "'%s' is neither the number nor the name of "
                      "a descriptor", spec->addr);
}

/* spec_is_vsock() - are ADDR and PORT the numbers of a vsock? */
static bool spec_is_vsock(const Spec *spec)
{
    return spec->option == 'c' && (spec->method == VSOCK_CONNECT ||
                                   spec->method == VSOCK_LISTEN);
}

/* check_vsock() - ADDR is a CID, which has 32 bits, as PORT has */
static bool check_vsock(const Spec *spec, Error *err)
{
#ifdef HAVE_VSOCK
    bool any = spec->method == VSOCK_LISTEN && strcmp(spec->addr, "any") == 0;
    unsigned long number;

    if (!any && !parse_number(spec->addr, 0, VMADDR_CID_ANY - 1, &number)) {
        return spec_error(spec, err, "CID '%s' is not a number from 0 to %u%s",
                          spec->addr, VMADDR_CID_ANY - 1,
                          spec->method == VSOCK_LISTEN ? ", nor 'any'" : "");
    }
    return parse_number(spec->port, 1, VMADDR_PORT_ANY - 1, &number) ||
           spec_error(spec, err, "PORT '%s' is not a number from 1 to %u",
                      spec->port, VMADDR_PORT_ANY - 1);
#else
    return spec_error(spec, err, "this qemu-vp was built without vsock");
#endif
}

static bool check_channel(Spec *spec, const char *method, Error *err)
{
    size_t m = 0;

    while (m < COUNT(method_name) && strcmp(method, method_name[m]) != 0) {
        m++;
    }
    if (m == COUNT(method_name)) {
        return spec_error(spec, err, "unknown METHOD '%s', there are "
                          "unix-connect, unix-listen, tcp-connect, "
                          "tcp-listen, vsock-connect, vsock-listen, "
                          "virtserial-open, isaserial-open and fd", method);
    }
    spec->method = (Method)m;
    switch (spec->method) {
    case TCP_CONNECT:
    case TCP_LISTEN:
    case VSOCK_CONNECT:
    case VSOCK_LISTEN:
        if (spec->port == NULL) {
            return spec_error(spec, err, "%s needs a PORT", method);
        }
        return spec_is_vsock(spec)
               ? check_vsock(spec, err)
               : check_host(spec, err) && check_port(spec, err);
    case ISASERIAL_OPEN:
        return port_baud(spec->port) != 0 ||
               spec_error(spec, err, "'%s' is not a baud rate that is known "
                          "here", spec->port);
    default:
        break;
    }
    if (spec->port != NULL) {
        return spec_error(spec, err, "PORT '%s' where %s takes '-'",
                          spec->port, method);
    }
    if (spec->method == INHERITED_FD) {
        return check_inherited(spec, err);
    }
    return spec->method == VIRTSERIAL_OPEN || check_path(spec, err);
}

static void spec_free(Spec *spec)
{
    free(spec->text);
    free(spec->fields);
    free(spec->addrs);
    *spec = (Spec){ .text = NULL };
}

/*
 * check_monitor() - PATH, in brackets if it has a comma, and its properties
 *
 * Without brackets it may be "fd:" and a descriptor.
 */
static bool check_monitor(Spec *spec, Error *err)
{
    char *rest = spec->fields, *end = strrchr(rest, ']');
    Error why;

    spec->addr = rest;
    if (rest[0] == '[') {
        if (end == NULL) {
            return spec_error(spec, err, "'[' without ']'");
        }
        spec->addr = rest + 1;
        *end = '\0';
        rest = end + 1;
    }
    if (!props_cut(spec, rest, &why)) {
        return spec_error(spec, err, "%s", why.text);
    }
    if (rest > spec->addr && rest[0] != '\0') {
        return spec_error(spec, err, "'%s' after ']'", rest);
    }
    if (rest == spec->addr && strncmp(rest, "fd:", 3) == 0) {
        spec->addr += 3;
        return check_inherited(spec, err);
    }
    if (spec->addr[0] == '\0') {
        return spec_error(spec, err, "PATH is empty");
    }
    return check_path(spec, err);
}

/*
 * spec_cut() - take over ADDR, PORT and CHANNEL_ID, and the properties
 * @first:  becomes what stands before ADDR
 */
static bool spec_cut(Spec *spec, const char **first, Error *err)
{
    unsigned long number = 0;
    char *field[4];
    Error why;

    if (!split_fields(spec, field, err)) {
        return false;
    }
    *first = field[0];
    spec->addr = field[1];
    spec->port = field[2];
    if (spec->port != NULL &&
        !props_cut(spec, field[3] != NULL ? field[3] : field[2], &why)) {
        return spec_error(spec, err, "%s", why.text);
    }
    if (spec->port == NULL) {
        return spec_error(spec, err, "%s is missing",
                          spec->addr == NULL ? "ADDR" : "PORT");
    }
    if (spec->addr[0] == '\0' || spec->port[0] == '\0') {
        return spec_error(spec, err, "%s is empty",
                          spec->addr[0] == '\0' ? "ADDR" : "PORT");
    }
    if (field[3] != NULL && !parse_number(field[3], 0, 65535, &number)) {
        return spec_error(spec, err, "CHANNEL_ID '%s' is not a number from 0 "
                          "to 65535", field[3]);
    }
    spec->channel_id = (unsigned)number;
    if (strcmp(spec->port, "-") == 0) {
        spec->port = NULL;
    }
    return true;
}

/* check_forward() - of an 'o' or 'i', or of a 'W' */
static bool check_forward(Spec *spec, const char *service_id, Error *err)
{
    spec->service_id = service_id;
    if (!vp_service_id_ok(service_id, strlen(service_id))) {
        return spec_error(spec, err, "a SERVICE_ID is 1 to %d printable "
                          "ASCII characters without blanks",
                          VP_SERVICE_ID_LEN);
    }
    if (spec->option == 'o' && spec->port != NULL &&
        strcmp(spec->addr, "fd") == 0) {
        spec->addr = spec->port;
        spec->port = NULL;
        return check_inherited(spec, err);
    }
    if (spec->option == 'W' && spec->port != NULL) {
        return spec_error(spec, err, "PORT '%s' where -W takes '-'",
                          spec->port);
    }
    if (strcmp(service_id, VP_ANY_SERVICE) == 0 &&
        (spec->option != 'o' || spec->port != NULL)) {
        return spec_error(spec, err, "SERVICE_ID '*' is for -o and a unix "
                          "socket, whose clients say which service they want");
    }
    if (spec->port == NULL) {
        return check_path(spec, err);
    }
    return check_host(spec, err) && check_port(spec, err) &&
           check_order(spec, err);
}

static bool spec_check(Spec *spec, Error *err)
{
    const char *wrong = value_wrong(spec->text), *first;

    if (wrong != NULL) {
        return spec_error(spec, err, "%s", wrong);
    }
    if (spec->option == 'm') {
        return check_monitor(spec, err);
    }
    return spec_cut(spec, &first, err) &&
           (spec->option == 'c' ? check_channel(spec, first, err)
                                : check_forward(spec, first, err));
}

/* path_is_abstract() - is it the name of a unix socket that has no file? */
static bool path_is_abstract(const char *path)
{
#ifdef __linux__
    return path[0] == '@';
#else
    (void)path;
    return false;
#endif
}

/* check_props() - have they a file to apply to? */
static bool check_props(const Spec *spec, Error *err)
{
    bool listens = spec->option == 'o' || spec->option == 'm' ||
                   (spec->option == 'c' && spec->method == UNIX_LISTEN);

    return (spec->props.mode < 0 && spec->props.group == NULL) ||
           (listens && spec->port == NULL && !spec->inherited &&
            !path_is_abstract(spec->addr)) ||
           spec_error(spec, err, "mode and group are for the file of a unix "
                      "socket to listen on");
}

/* spec_parse() - @spec has to be freed with spec_free() if this succeeds */
static bool spec_parse(Spec *spec, char option, const char *text, Error *err)
{
    *spec = (Spec){ .option = option };
    spec->text = strdup(text);
    spec->fields = strdup(text);
    if (spec->text == NULL || spec->fields == NULL) {
        spec_free(spec);
        return error_memory(err);
    }
    if (!spec_check(spec, err) || !check_props(spec, err)) {
        spec_free(spec);
        return false;
    }
    return true;
}

/* spec_name() - the long name of its option */
static const char *spec_name(const Spec *spec)
{
    return spec->option == 'c' ? "channel"
           : spec->option == 'o' ? "oforward" : "iforward";
}

/* spec_what() - the SERVICE_ID of a forward, the METHOD of a channel */
static const char *spec_what(const Spec *spec)
{
    return spec->option == 'c' ? method_name[spec->method] : spec->service_id;
}

/* spec_where() - ADDR:PORT, or ADDR, and properties; cut to fit @buf */
static const char *spec_where(const Spec *spec, char *buf, size_t size)
{
    snprintf(buf, size, spec->inherited ? "fd:%s%.0s%s"
             : spec->port == NULL ? "%s%.0s%s"
             : strchr(spec->addr, ':') != NULL ? "[%s]:%s%s" : "%s:%s%s",
             spec->addr, spec->port != NULL ? spec->port : "",
             spec->props_text);
    return buf;
}

/* spec_same() - do both ask for the same thing? */
static bool spec_same(const Spec *a, const Spec *b)
{
    return a->option == b->option && a->channel_id == b->channel_id &&
           strcmp(a->addr, b->addr) == 0 && a->inherited == b->inherited &&
           props_same(&a->props, &b->props) &&
           string_same(a->port, b->port) &&
           (a->option == 'c' ? a->method == b->method
                             : strcmp(a->service_id, b->service_id) == 0);
}

/* spec_clash() - why @a can't run beside @b, or NULL */
static const char *spec_clash(const Spec *a, const Spec *b)
{
    if (a->option == 'c' && b->option == 'c' && a->method == b->method &&
        (a->method == VIRTSERIAL_OPEN || a->method == ISASERIAL_OPEN) &&
        strcmp(a->addr, b->addr) == 0) {
        return "there is a channel with this device already";
    }
    if (a->option != b->option || a->channel_id != b->channel_id) {
        return NULL;
    }
    if (a->option == 'c') {
        return "there is a channel with this CHANNEL_ID already";
    }
    if (a->option == 'i' && strcmp(a->service_id, b->service_id) == 0) {
        return "there is an iforward with this SERVICE_ID already";
    }
    return spec_same(a, b) ? "it is there already" : NULL;
}

/*
 * Specs by what they are, because there may be thousands: those that are the
 * same or clash are in the same chain.  The first chain has the channels.
 */
#define SPEC_CHAINS 4096

typedef struct SpecIndex {
    Spec *chain[SPEC_CHAINS];
} SpecIndex;

/* hash_text() - FNV-1a; @hash is that of what stands before @text */
static uint32_t hash_text(uint32_t hash, const char *text)
{
    while (*text != '\0') {
        hash = (hash ^ (unsigned char)*text++) * 16777619u;
    }
    return hash;
}

/* spec_hash() - the same for specs that are the same, or clash */
static uint32_t spec_hash(const Spec *spec)
{
    uint32_t hash = 2166136261u + spec->channel_id;

    if (spec->option == 'c') {
        return 0;
    }
    hash = hash_text(hash, spec->service_id);
    if (spec->option == 'o') {
        hash = hash_text(hash_text(hash, spec->addr),
                         spec->port != NULL ? spec->port : "-");
    }
    return hash;
}

/* index_chain() - where a spec with this hash is, if it is there */
static Spec **index_chain(SpecIndex *index, uint32_t hash)
{
    return &index->chain[hash == 0 ? 0 : 1 + hash % (SPEC_CHAINS - 1)];
}

static void index_add(SpecIndex *index, Spec *spec)
{
    Spec **chain;

    spec->hash = spec_hash(spec);
    chain = index_chain(index, spec->hash);
    spec->next = *chain;
    *chain = spec;
}

static void index_del(SpecIndex *index, const Spec *spec)
{
    Spec **at = index_chain(index, spec->hash);

    while (*at != spec) {
        at = &(*at)->next;
    }
    *at = spec->next;
}

/* index_same() - what asks for the same thing, or NULL */
static Spec *index_same(SpecIndex *index, const Spec *spec)
{
    uint32_t hash = spec_hash(spec);
    Spec *other = *index_chain(index, hash);

    while (other != NULL && (other->hash != hash || !spec_same(other, spec))) {
        other = other->next;
    }
    return other;
}

/* index_clash() - why @spec can't be added, or NULL */
static const char *index_clash(SpecIndex *index, const Spec *spec)
{
    uint32_t hash = spec_hash(spec);
    const char *clash = NULL;

    for (const Spec *other = *index_chain(index, hash);
         other != NULL && clash == NULL; other = other->next) {
        clash = other->hash == hash ? spec_clash(spec, other) : NULL;
    }
    return clash;
}

/* index_has_channel() - is there a channel with this CHANNEL_ID? */
static bool index_has_channel(const SpecIndex *index, unsigned id)
{
    const Spec *channel = index->chain[0];

    while (channel != NULL && channel->channel_id != id) {
        channel = channel->next;
    }
    return channel != NULL;
}

/* ======================================================================
 * options
 *
 * A new option is a row of the table and a member of Settings, where its value
 * lives.  From the table come what getopt_long() accepts, --help, the lines of
 * an init file, --dump-config, the checks of a value, and what a reload leaves
 * as it was.
 *
 *   kind     value                           in Settings
 *   SPEC     METHOD... or SERVICE_ID...      one more of "specs"
 *   STRING   what an init file can hold      char *, NULL: not given
 *   NUMBER   from "min" to "max"             unsigned, "standard" if not given
 *   FLAG     none                            bool, true if given
 *   STEP     none                            int, "step" is added each time
 *
 * The command line is read before the init file, and its value counts.
 * ====================================================================== */

typedef enum OptionKind { SPEC, STRING, NUMBER, FLAG, STEP } OptionKind;

/* Rules of an option. */
enum {
    NOT_IN_FILE = 1,   /* it makes sense on a command line only */
    NEEDS_RESTART = 2, /* a reload leaves it as it was */
    SOCKET_PATH = 4,   /* its value is a spec, with nothing but a PATH */
};

typedef struct Option {
    const char *name;
    char letter;           /* 0: it has none */
    OptionKind kind;
    size_t where;          /* offset of its value in Settings */
    unsigned rules;
    const char *value;     /* what --help calls the value; NULL: takes none */
    unsigned min;
    unsigned max;
    unsigned standard;
    int step;
    const char *help;
} Option;

/* Room for the rows of the table; a static assertion below it checks this. */
#define OPTIONS_MAX 32

/* All that one reading of command line and init file came to. */
typedef struct Settings {
    Spec *specs;
    size_t nspecs;
    SpecIndex index;       /* of specs that have been checked */
    unsigned grace;        /* seconds */
    unsigned max_conns;
    unsigned max_half_open;
    unsigned max_opens;
    unsigned max_memory;   /* MiB */
    char *key_path;
    char *config_path;
    char *pidfile;
    char *logfile;
    char *user;
    char *monitor;
    char *execute;
    char *dial;
    bool pass;
    int level;             /* a VPLogLevel; in between it may be beyond them */
    bool daemonize;
    bool dump_config;
    bool version;
    bool help;
    VPConfig config;       /* what these values mean to a channel */
    bool key_kept;         /* the key can't be read again: the old one stays */
    bool on_line[OPTIONS_MAX];     /* is a row's on the command line? */
    unsigned in_file[OPTIONS_MAX]; /* a row's line in the init file, or 0 */
} Settings;

static Settings settings; /* in force */

#define AT(member) .where = offsetof(Settings, member)

static const Option options[] = {
    { "channel", 'c', SPEC, .value = "METHOD:ADDR:PORT[:CHANNEL_ID]",
      .help = "the channel to the other qemu-vp; again for further ones\n"
      "          unix-connect:PATH:-       unix-listen:PATH:-\n"
      "          tcp-connect:HOST:PORT     tcp-listen:HOST:PORT\n"
      "          vsock-connect:CID:PORT    vsock-listen:CID:PORT (CID 'any')\n"
      "          virtserial-open:PORT:-  isaserial-open:DEVICE:BAUD ('-': "
      "115200)\n"
      "          fd:NUMBER:-               an inherited descriptor; or one\n"
      "                                    that LISTEN_FDNAMES names so" },
    { "oforward", 'o', SPEC, .value = "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]",
      .help = "listen at ADDR:PORT, forward to the other side's SERVICE_ID" },
    { "iforward", 'i', SPEC, .value = "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]",
      .help = "connect the other side's SERVICE_ID to ADDR:PORT\n"
      "        PORT '-': ADDR is the path of a unix socket; [::1] for IPv6;\n"
      "        -o with PORT 0 picks a free port, the log names it\n"
      "        ...,mode=MODE,group=GROUP: of a unix socket's file, of -o\n"
      "        ...,proxy=v2: tell -i's target who the client is\n"
      "        ...,max=N,idle=SECONDS: limit a forward's connections\n"
      "        -o SERVICE_ID:fd:NAME: an inherited socket that listens" },
    { "grace", 0, NUMBER, AT(grace), .value = "SECONDS", .min = 0,
      .max = 1000000, .standard = 30,
      .help = "connections wait so long without a channel" },
    { "key", 'k', STRING, AT(key_path), .value = "FILE",
      .help = "the other side must have the same key" },
    { "max-conns", 0, NUMBER, AT(max_conns), .value = "N", .min = 1,
      .max = 1000000, .standard = 16384,
      .help = "connections per channel at once" },
    { "max-half-open", 0, NUMBER, AT(max_half_open), .value = "N", .min = 1,
      .max = 1000000, .standard = 4096,
      .help = "of these, to targets that don't answer" },
    { "max-opens", 0, NUMBER, AT(max_opens), .value = "N", .min = 1,
      .max = 1000000, .standard = 20000,
      .help = "the other side's connections per second" },
    { "max-memory", 0, NUMBER, AT(max_memory), .value = "MIB", .min = 16,
      .max = 1000000, .standard = 1024,
      .help = "memory per channel; lowers --max-conns" },
    { "config", 'C', STRING, AT(config_path), NOT_IN_FILE, .value = "FILE",
      .help = "init file: a long option and its value on each line" },
    { "daemonize", 'd', FLAG, AT(daemonize), NEEDS_RESTART,
      .help = "go to the background once all is open" },
    { "pidfile", 'f', STRING, AT(pidfile), NEEDS_RESTART, .value = "FILE",
      .help = "write the process id to FILE, and lock it" },
    { "logfile", 'l', STRING, AT(logfile), .value = "FILE",
      .help = "log to FILE, or to 'syslog' [stderr; -d: syslog]" },
    { "user", 'u', STRING, AT(user), NEEDS_RESTART, .value = "USER",
      .help = "drop privileges once all is open" },
    { "monitor", 'm', STRING, AT(monitor),
      NEEDS_RESTART | SOCKET_PATH, .value = "PATH[,mode=MODE][,group=GROUP]",
      .help = "serve the monitor on a unix socket [mode=0600]" },
    { "execute", 'x', STRING, AT(execute), NOT_IN_FILE, .value = "COMMAND",
      .help = "send COMMAND to the monitor at -m PATH" },
    { "dial", 'W', STRING, AT(dial), NOT_IN_FILE, .value = "SERVICE_ID:PATH:-",
      .help = "join stdin and stdout to a service, by an -o '*:PATH:-'" },
    { "pass", 'F', FLAG, AT(pass), NOT_IN_FILE,
      .help = "with -W: pass the connection to stdout, and end" },
    { "dump-config", 0, FLAG, AT(dump_config), NOT_IN_FILE,
      .help = "print what is in force as an init file, and end" },
    { "verbose", 'v', STEP, AT(level), .step = 1,
      .help = "log connections; twice: all that becomes of them" },
    { "quiet", 'q', STEP, AT(level), .step = -1,
      .help = "log warnings and errors only; twice: errors only" },
    { "version", 'V', FLAG, AT(version), NOT_IN_FILE,
      .help = "print the versions of program and protocol" },
    { "help", 'h', FLAG, AT(help), NOT_IN_FILE, .help = "print this" },
};

#define OPTIONS COUNT(options)

_Static_assert(OPTIONS <= OPTIONS_MAX, "OPTIONS_MAX is too small");

/* option_at() - where in @s the value of @o is, of the type of its kind */
static void *option_at(const Settings *s, const Option *o)
{
    return (char *)s + o->where;
}

static void settings_free(Settings *s)
{
    for (size_t i = 0; i < s->nspecs; i++) {
        spec_free(&s->specs[i]);
    }
    free(s->specs);
    for (const Option *o = options; o < options + OPTIONS; o++) {
        if (o->kind == STRING) {
            free(*(char **)option_at(s, o));
        }
    }
    memset(s, 0, sizeof(*s));
}

static const Option *option_find(int letter)
{
    const Option *o = options;

    while (o->letter != letter) {
        o++;
    }
    return o;
}

/* line_error() - begin @err with @line if it is of the init file; false */
static bool line_error(const Settings *s, unsigned line, Error *err)
{
    const Error why = *err;

    return line > 0 && error_set(err, "%.200s:%u: %.300s", s->config_path,
                                 line, why.text);
}

/* option_error() - line_error() for the value that option @letter has */
static bool option_error(const Settings *s, int letter, Error *err)
{
    ptrdiff_t i = option_find(letter) - options;

    return line_error(s, s->on_line[i] ? 0 : s->in_file[i], err);
}

/* settings_add() - one more of "specs" */
static bool settings_add(Settings *s, char option, const char *value,
                         unsigned line, Error *err)
{
    /* twice as many each time */
    Spec *specs = (s->nspecs & (s->nspecs - 1)) != 0 ? s->specs
                  : realloc(s->specs, (s->nspecs > 0 ? 2 * s->nspecs : 1) *
                                      sizeof(*specs));

    if (specs == NULL) {
        return error_memory(err);
    }
    s->specs = specs;
    if (!spec_parse(&specs[s->nspecs], option, value, err)) {
        return false;
    }
    specs[s->nspecs++].line = line;
    return true;
}

/* string_check() - can @value be that of @o? */
static bool string_check(const Option *o, const char *value, Error *err)
{
    const char *wrong = value[0] == '\0' ? "expected a value"
                        : o->rules & NOT_IN_FILE ? NULL : value_wrong(value);
    Spec spec;

    if (wrong != NULL) {
        return error_set(err, "--%s '%.128s': %s", o->name, value, wrong);
    }
    if (o->rules & SOCKET_PATH) {
        if (!spec_parse(&spec, o->letter, value, err)) {
            return false;
        }
        spec_free(&spec);
    }
    return true;
}

/*
 * option_take() - check one option, and take it over
 * @value:  NULL if it takes none
 * @line:   of the init file; 0: the command line, whose value counts
 */
static bool option_take(Settings *s, const Option *o, const char *value,
                        unsigned line, Error *err)
{
    ptrdiff_t i = o - options;
    bool again = line > 0 ? s->in_file[i] > 0 : s->on_line[i];
    bool counts = line == 0 || !s->on_line[i];
    void *at = option_at(s, o);
    unsigned long number;

    if (again && (o->kind == STRING || o->kind == NUMBER)) {
        return error_set(err, "--%s '%.64s': it was given before, and takes "
                         "one value", o->name, value);
    }
    if (line > 0) {
        s->in_file[i] = line;
    } else {
        s->on_line[i] = true;
    }
    switch (o->kind) {
    case SPEC:
        return settings_add(s, o->letter, value, line, err);
    case STRING:
        if (!string_check(o, value, err)) {
            return false;
        }
        if (counts) {
            *(char **)at = strdup(value);
        }
        return *(char **)at != NULL || error_memory(err);
    case NUMBER:
        if (!parse_number(value, o->min, o->max, &number)) {
            return error_set(err, "--%s '%.64s': expected a number from %u to "
                             "%u", o->name, value, o->min, o->max);
        }
        if (counts) {
            *(unsigned *)at = (unsigned)number;
        }
        return true;
    case FLAG:
        *(bool *)at = true;
        return true;
    case STEP:
        *(int *)at += o->step;
        return true;
    }
    return true;
}

/* options_print() - as lines of an init file, but for the specs */
static void options_print(Text *out, const Settings *s)
{
    for (const Option *o = options; o < options + OPTIONS; o++) {
        const void *value = option_at(s, o);

        if (o->rules & NOT_IN_FILE) {
            continue;
        }
        if (o->kind == NUMBER) {
            text_add(out, "%s %u\n", o->name, *(const unsigned *)value);
        } else if (o->kind == STRING && *(char *const *)value != NULL) {
            text_add(out, "%s %s\n", o->name, *(char *const *)value);
        } else if (o->kind == FLAG && *(const bool *)value) {
            text_add(out, "%s\n", o->name);
        } else if (o->kind == STEP) {
            for (int n = (*(const int *)value - VP_LOG_INFO) * o->step;
                 n > 0; n--) {
                text_add(out, "%s\n", o->name);
            }
        }
    }
}

/* options_help() - what --help prints */
static int options_help(void)
{
    Text out = { .data = NULL };
    char head[80];

    text_add(&out, "Usage: qemu-vp -c CHANNEL [-o FORWARD]... [-i FORWARD]... "
             "[OPTION]...\n"
             "       qemu-vp -m PATH -x COMMAND\n"
             "       qemu-vp [-F] -W SERVICE_ID:PATH:-\n"
             "Forward sockets between host and guest over one channel.\n\n");
    for (const Option *o = options; o < options + OPTIONS; o++) {
        const char letter[] = { '-', o->letter, ',', '\0' };

        snprintf(head, sizeof(head), "  %3s --%s%s%s",
                 o->letter != 0 ? letter : "", o->name,
                 o->value != NULL ? " " : "", o->value != NULL ? o->value : "");
        text_add(&out, strlen(head) > 23 ? "%s\n        %s" : "%-23s %s",
                 head, o->help);
        if (o->kind == NUMBER) {
            text_add(&out, " [%u]", o->standard);
        }
        text_add(&out, "\n");
    }
    return text_print(&out);
}

/* settings_log() - where to log; with nobody at stderr, to syslog */
static const char *settings_log(const Settings *s)
{
    return s->logfile == NULL && settings.daemonize ? "syslog" : s->logfile;
}

/* ======================================================================
 * init file
 *
 * A line has the long name of an option and its value.  The same names stand
 * for the same things as on the command line.
 * ====================================================================== */

/* Bytes of a key.  Fewer than 16 could be guessed. */
#define KEY_LEN_MIN 16
#define KEY_LEN_MAX (sizeof(((VPKey *)0)->bytes) - 1)

/* Some editors put it, in UTF-8, before the first line. */
#define BYTE_ORDER_MARK "\xef\xbb\xbf"

/*
 * file_line() - the next line of @f, without its newline or CR LF
 * @wrong:  becomes what is wrong with it, or NULL
 *
 * Returns false if there is none.
 */
static bool file_line(FILE *f, char *line, size_t size, const char **wrong)
{
    size_t n = 0;
    int c;

    *wrong = NULL;
    while ((c = getc(f)) != EOF && c != '\n') {
        if (c == '\0') {
            *wrong = "the line has a NUL byte";
        }
        if (n == size - 1) {
            *wrong = "the line is too long";
        } else {
            line[n++] = (char)c;
        }
    }
    if (n > 0 && line[n - 1] == '\r') {
        line[n - 1] = '\0';
    }
    line[n] = '\0';
    return c != EOF || n > 0;
}

/* settings_line() - take line @number of the init file, without its newline */
static bool settings_line(Settings *s, char *line, unsigned number, Error *err)
{
    const Option *o = options;
    char *value, *name = cut_word(line, " \t", &value);

    if (name[0] == '\0' || name[0] == '#') {
        return true;
    }
    while (o < options + OPTIONS && strcmp(o->name, name) != 0) {
        o++;
    }
    if (o == options + OPTIONS || (o->rules & NOT_IN_FILE)) {
        return error_set(err, "'%.64s': expected the long name of an option",
                         name);
    }
    if (o->value != NULL && value[0] == '\0') {
        return error_set(err, "'%s': expected a value after it", name);
    }
    if (o->value == NULL && value[0] != '\0') {
        return error_set(err, "'%s': expected no value, not '%.64s'", name,
                         value);
    }
    return option_take(s, o, value, number, err);
}

/*
 * config_open() - open the init file, or return NULL: see @err
 * @wait:  it may be a pipe that somebody writes
 */
static FILE *config_open(const char *path, bool wait, Error *err)
{
    FILE *f = NULL;
    struct stat st;
    int fd;

    if (wait) {
        f = fopen(path, "r");
    } else if ((fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY)) >= 0) {
        if (fstat(fd, &st) == 0 && !S_ISREG(st.st_mode)) {
            error_set(err, "--config '%s': not a file", path);
            close(fd);
            return NULL;
        }
        f = fdopen(fd, "r");
    }
    if (f == NULL) {
        error_set(err, "--config '%s': %s", path, strerror(errno));
    }
    return f;
}

static bool settings_file(Settings *s, const char *path, Error *err)
{
    /* once there are channels nothing may block */
    FILE *f = config_open(path, s == &settings, err);
    char line[VALUE_MAX + 100]; /* a name, blanks, and a value */
    const char *wrong;
    bool ok = true;

    if (f == NULL) {
        return false;
    }
    for (unsigned n = 1; ok && file_line(f, line, sizeof(line), &wrong); n++) {
        size_t mark = n == 1 && strncmp(line, BYTE_ORDER_MARK,
                                        strlen(BYTE_ORDER_MARK)) == 0
                      ? strlen(BYTE_ORDER_MARK) : 0;

        ok = wrong != NULL ? error_set(err, "%s", wrong)
                           : settings_line(s, line + mark, n, err);
        ok = ok || line_error(s, n, err);
    }
    if (ok && ferror(f)) {
        ok = error_set(err, "--config '%s': %s", path, strerror(errno));
    }
    fclose(f);
    return ok;
}

/* ---- command line ----------------------------------------------------- */

/*
 * arguments_wrong() - say why getopt_long() gave @opt for @word
 *
 * For a long option with a value that it doesn't take some libraries give ':'.
 */
static bool arguments_wrong(int opt, const char *word, Error *err)
{
    char letter[3] = { '-', (char)optopt, '\0' };
    bool is_long = strncmp(word, "--", 2) == 0;

    if (is_long && optopt != 0 && strchr(word, '=') != NULL) {
        return error_set(err, "'%.64s': expected no value", word);
    }
    if (opt == ':') {
        return error_set(err, "'%.64s': expected a value after it",
                         is_long ? word : letter);
    }
    return error_set(err, "'%.64s': there is no such option, see -h",
                     is_long ? word : letter);
}

/* settings_arguments() - take the command line; ends with -h and -V */
static bool settings_arguments(Settings *s, int argc, char **argv, Error *err)
{
    struct option names[OPTIONS + 1] = { { .name = NULL } };
    /* '+': end at what is no option; else the order of words would change */
    char letters[2 * OPTIONS + 3] = "+:", *l = letters + 2;
    const char *word;
    char versions[VP_VERSIONS_LEN];
    int opt;

    for (size_t i = 0; i < OPTIONS; i++) {
        names[i].name = options[i].name;
        names[i].has_arg = options[i].value != NULL;
        names[i].val = UCHAR_MAX + 1 + (int)i; /* a letter is itself */
        if (options[i].letter != 0) {
            *l++ = options[i].letter;
            if (options[i].value != NULL) {
                *l++ = ':';
            }
        }
    }
    *l = '\0';
    optind = 1;
    opterr = 0; /* because its messages don't say what is expected */
    for (;;) {
        word = argv[optind]; /* afterwards optind may be beyond it, or not */
        opt = getopt_long(argc, argv, letters, names, NULL);
        if (opt == -1) {
            break;
        }
        if (opt == ':' || opt == '?') {
            return arguments_wrong(opt, word, err);
        }
        if (!option_take(s, opt > UCHAR_MAX ? &options[opt - UCHAR_MAX - 1]
                                            : option_find(opt),
                         optarg, 0, err)) {
            return false;
        }
        if (s->version) {
            printf("qemu-vp %s, protocol %s\n", VERSION,
                   vp_versions(VP_VERSION_OLDEST, VP_VERSION, versions));
            exit(stdout_status());
        }
        if (s->help) {
            exit(options_help());
        }
    }
    return optind == argc ||
           error_set(err, "'%.64s': expected an option, see -h", argv[optind]);
}

/* ---- key -------------------------------------------------------------- */

/* Who -u names. */
typedef struct User {
    const char *name; /* NULL: it has none; valid until the next look */
    uid_t uid;
    gid_t gid;
} User;

/* user_find() - is @text the name of a user, or any user's number? */
static bool user_find(const char *text, User *user)
{
    const struct passwd *pw = getpwnam(text);
    unsigned long number;

    if (pw == NULL) {
        if (!parse_number(text, 0, UINT_MAX - 1ul, &number)) {
            return false;
        }
        *user = (User){ .uid = (uid_t)number, .gid = (gid_t)number };
        pw = getpwuid(user->uid);
    }
    if (pw != NULL) {
        *user = (User){ pw->pw_name, pw->pw_uid, pw->pw_gid };
    }
    return true;
}

/* key_owner_ok() - is @owner us, root, or @user, who we will be? */
static bool key_owner_ok(uid_t owner, const char *user)
{
    User u;

    return owner == 0 || owner == geteuid() ||
           (user != NULL && user_find(user, &u) && owner == u.uid);
}

/*
 * key_read() - the key in @path, without the newline at its end
 * @user:  of -u, or NULL
 *
 * A key that others can read is refused.
 */
static bool key_read(VPKey *key, const char *path, const char *user,
                     Error *err)
{
    int fd = open(path, O_RDONLY | O_NOCTTY | O_NONBLOCK);
    const char *wrong = NULL;
    struct stat st;
    char text[KEY_LEN_MAX + 3]; /* a longest key, "\r\n", and a byte too many */
    ssize_t n = 0;

    if (fd < 0 || fstat(fd, &st) < 0) {
        wrong = strerror(errno);
    } else if (!S_ISREG(st.st_mode)) {
        wrong = "not a file";
    } else if (!key_owner_ok(st.st_uid, user)) {
        wrong = "it belongs to another user";
    } else if (st.st_mode & (S_IRWXG | S_IRWXO)) {
        wrong = "others can read or write it; chmod 600 it and, if it was "
                "read, make a new one";
    } else {
        n = read(fd, text, sizeof(text));
        wrong = n < 0 ? strerror(errno) : NULL;
    }
    if (fd >= 0) {
        close(fd);
    }
    key->len = n > 0 ? (size_t)n : 0;
    while (key->len > 0 && (text[key->len - 1] == '\n' ||
                            text[key->len - 1] == '\r')) {
        key->len--;
    }
    if (wrong == NULL && key->len < KEY_LEN_MIN) {
        wrong = "expected at least 16 bytes";
    } else if (wrong == NULL &&
               (key->len > KEY_LEN_MAX || (size_t)n == sizeof(text))) {
        wrong = "expected at most 1023 bytes";
    }
    if (wrong != NULL) {
        key->len = 0;
        return error_set(err, "--key '%s': %s", path, wrong);
    }
    memcpy(key->bytes, text, key->len);
    return true;
}

/* settings_key() - read the key, or keep it if USER can't read it again */
static bool settings_key(Settings *s, Error *err)
{
    if (s->key_path == NULL) {
        return true;
    }
    if (settings.config.key.len > 0 && access(s->key_path, R_OK) < 0 &&
        errno == EACCES && strcmp(s->key_path, settings.key_path) == 0) {
        s->config.key = settings.config.key;
        s->key_kept = true;
        return true;
    }
    return key_read(&s->config.key, s->key_path, s->user, err) ||
           option_error(s, 'k', err);
}

/* ---- the whole -------------------------------------------------------- */

/* settings_config() - what the settings mean to a channel */
static bool settings_config(Settings *s, Error *err)
{
    uint64_t memory = (uint64_t)s->max_memory << 20;
    size_t conns = vp_max_conns(memory);

    s->config.grace = s->grace;
    s->config.max_conns = conns < s->max_conns ? (unsigned)conns
                                               : s->max_conns;
    s->config.max_half_open = s->max_half_open;
    s->config.max_opens = s->max_opens;
    s->config.memory = memory;
    s->config.program = VERSION;
    return settings_key(s, err);
}

/* settings_check() - what only shows once all of it is known */
static bool settings_check(Settings *s, Error *err)
{
    const char *clash = NULL;
    size_t clashes = 0;

    for (size_t i = 0; i < s->nspecs; i++) {
        if (clash == NULL) {
            clash = index_clash(&s->index, &s->specs[i]);
            clashes = i;
        }
        index_add(&s->index, &s->specs[i]);
    }
    if (s->index.chain[0] == NULL && s->monitor == NULL) {
        return error_set(err, "no channel: -c METHOD:ADDR:PORT[:CHANNEL_ID] is "
                         "needed");
    }
    for (size_t i = 0; i < s->nspecs; i++) {
        const Spec *spec = &s->specs[i];

        if (clash != NULL && i == clashes) {
            spec_error(spec, err, "%s", clash);
        } else if (!index_has_channel(&s->index, spec->channel_id)) {
            spec_error(spec, err, "there is no channel %u", spec->channel_id);
        } else {
            continue;
        }
        return line_error(s, spec->line, err);
    }
    return true;
}

/* settings_read() - the command line, then the init file it names */
static bool settings_read(Settings *s, int argc, char **argv, Error *err)
{
    memset(s, 0, sizeof(*s));
    s->level = VP_LOG_INFO;
    for (const Option *o = options; o < options + OPTIONS; o++) {
        if (o->kind == NUMBER) {
            *(unsigned *)option_at(s, o) = o->standard;
        }
    }
    if (!settings_arguments(s, argc, argv, err) ||
        (s->config_path != NULL && !settings_file(s, s->config_path, err))) {
        return false;
    }
    s->level = s->level < VP_LOG_ERROR ? VP_LOG_ERROR
               : s->level > VP_LOG_DEBUG ? VP_LOG_DEBUG : s->level;
    if (s->execute != NULL && strpbrk(s->execute, "\r\n") != NULL) {
        return error_set(err, "-x '%.128s': expected one command, on one line",
                         s->execute);
    }
    if (s->execute != NULL) {
        return s->monitor != NULL ||
               error_set(err, "-x '%.128s': expected -m PATH beside it",
                         s->execute);
    }
    if (s->pass && s->dial == NULL) {
        return error_set(err, "-F: expected -W SERVICE_ID:PATH:- beside it");
    }
    return s->dial != NULL ||
           (settings_config(s, err) && settings_check(s, err));
}

static void settings_print(Text *out, const Settings *s)
{
    for (size_t i = 0; i < s->nspecs; i++) {
        text_add(out, "%s %s\n", spec_name(&s->specs[i]), s->specs[i].text);
    }
    options_print(out, s);
}

/* ======================================================================
 * addresses
 *
 * A name server may take its time, and nothing may block the loop.  So a child
 * waits for its answer, whoever wants to know: LOOKUPS_MAX of them at a time,
 * the other lookups wait for their turn.  It finds the number of the spec's
 * group, too, which is done in place at start, while nothing waits.  Numeric
 * addresses and paths need no name server; an address with a scope is treated
 * as a name, because its interface may come later, or be made anew.
 *
 * Answers are kept with the spec.  One that is older than a minute, or all of
 * whose addresses have failed, serves until there is a new one.  That is asked
 * for when an address to connect to is needed; of one to listen at, again and
 * again.
 * ====================================================================== */

/* Addresses of a host that are tried; a round-robin name has fewer. */
#define MAX_ADDRS 16

/* Room for an address in words; the longest is that of a unix socket. */
#define ADDR_NAME_SIZE 160

static void addr_unix(const char *path, VPAddr *addr)
{
    struct sockaddr_un *sun = (void *)&addr->ss;
    size_t len = strlen(path) + 1;

    memset(addr, 0, sizeof(*addr));
    sun->sun_family = AF_UNIX;
    memcpy(sun->sun_path, path, len);
    if (path_is_abstract(path)) {
        sun->sun_path[0] = '\0';
        len--; /* a NUL at its end would be part of the name */
    }
    addr->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
}

/* addr_vsock() - @cid and @port have been checked */
static void addr_vsock(const char *cid, const char *port, VPAddr *addr)
{
    *addr = (VPAddr){ .len = 0 };
#ifdef HAVE_VSOCK
    {
        struct sockaddr_vm *vm = (void *)&addr->ss;

        addr->len = sizeof(*vm);
        vm->svm_family = AF_VSOCK;
        vm->svm_cid = strcmp(cid, "any") == 0
                      ? VMADDR_CID_ANY : (unsigned)strtoul(cid, NULL, 10);
        vm->svm_port = (unsigned)strtoul(port, NULL, 10);
    }
#else
    (void)cid;
    (void)port;
#endif
}

/*
 * addr_lookup() - at most MAX_ADDRS addresses of a host and port
 * @port:   NULL: @host is the path of a unix socket
 * @flags:  AI_NUMERICHOST: don't ask a name server, which may take its time
 *
 * Returns their number, never 0, or an EAI_ value made negative.
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
    int n = 0, rc;

    if (port == NULL) {
        addr_unix(host, &addrs[0]);
        return 1;
    }
    rc = getaddrinfo(host, port, &hints, &list);
    if (rc != 0) {
        return -abs(rc);
    }
    for (struct addrinfo *ai = list; ai != NULL && n < MAX_ADDRS;
         ai = ai->ai_next) {
        bool twice = false; /* in /etc/hosts; can't be listened on twice */

        for (int i = 0; i < n; i++) {
            twice |= addrs[i].len == ai->ai_addrlen &&
                     memcmp(&addrs[i].ss, ai->ai_addr, addrs[i].len) == 0;
        }
        if (!twice) {
            addrs[n].len = ai->ai_addrlen;
            memcpy(&addrs[n++].ss, ai->ai_addr, ai->ai_addrlen);
        }
    }
    freeaddrinfo(list);
    return n;
}

/* lookup_error() - the negative value of addr_lookup() in words */
static const char *lookup_error(int rc)
{
    return gai_strerror(EAI_NONAME < 0 ? rc : -rc);
}

/* addr_bound() - the local address of @fd; becomes empty if it has none */
static void addr_bound(int fd, VPAddr *addr)
{
    *addr = (VPAddr){ .len = sizeof(addr->ss) };
    if (getsockname(fd, (struct sockaddr *)&addr->ss, &addr->len) < 0) {
        addr->len = 0;
    }
}

/* addr_name() - valid until the next call */
static const char *addr_name(const VPAddr *addr)
{
    static char buf[ADDR_NAME_SIZE];

    return vp_addr_str(addr, buf, sizeof(buf));
}

/* spec_keep() - @n addresses of @spec, of which it has a copy from now on */
static bool spec_keep(Spec *spec, const VPAddr *addrs, int n)
{
    size_t size = (size_t)n * sizeof(*addrs);
    VPAddr *copy = malloc(size);

    if (copy == NULL) {
        return false;
    }
    memcpy(copy, addrs, size);
    free(spec->addrs);
    spec->addrs = copy;
    spec->naddrs = n;
    return true;
}

/* spec_has_scope() - is the address that of an interface? */
static bool spec_has_scope(const Spec *spec)
{
    return spec->port != NULL && strchr(spec->addr, '%') != NULL;
}

/* spec_is_name() - does it take a name server to know the addresses? */
static bool spec_is_name(const Spec *spec)
{
    VPAddr addrs[MAX_ADDRS];

    return spec->port != NULL && !spec_is_vsock(spec) &&
           (spec_has_scope(spec) ||
            addr_lookup(spec->addr, spec->port, AI_NUMERICHOST, addrs) < 0);
}

/* spec_lacks_group() - is the number of its group not known yet? */
static bool spec_lacks_group(const Spec *spec)
{
    return spec->props.group != NULL && spec->props.gid < 0;
}

/*
 * spec_adds_name() - does it take a look-up to add it?
 *
 * A channel that connects does that by itself.
 */
static bool spec_adds_name(const Spec *spec)
{
    return spec_lacks_group(spec) ||
           ((spec->option != 'c' || spec->method == TCP_LISTEN) &&
            spec_is_name(spec));
}

/* spec_known() - are the addresses known, now, without a name server? */
static bool spec_known(Spec *spec)
{
    VPAddr addrs[MAX_ADDRS];
    int n;

    if (spec_lacks_group(spec)) {
        spec->props.gid = group_known(spec->props.group);
    }
    if (spec_lacks_group(spec)) {
        return false;
    }
    if (spec->naddrs > 0) {
        return true;
    }
    if (spec_is_name(spec)) {
        return false;
    }
    if (spec_is_vsock(spec)) {
        addr_vsock(spec->addr, spec->port, &addrs[0]);
        n = 1;
    } else {
        n = addr_lookup(spec->addr, spec->port, AI_NUMERICHOST, addrs);
    }
    return n > 0 && spec_keep(spec, addrs, n);
}

/* ---- lookups ---------------------------------------------------------- */

/* What the child has found out. */
typedef struct Answer {
    int naddrs; /* what addr_lookup() returned */
    VPAddr addrs[MAX_ADDRS];
    long gid;   /* of the spec's group; -1: it has none, or there is none */
} Answer;

/* Children at a time; each costs the loop the time of a fork(). */
#define LOOKUPS_MAX 16

/* Names are asked again once what is known of them is so old, us. */
#define NAME_OLD (60 * SECOND)
/* Names are asked again after this, us, if none of their addresses would do. */
#define NAME_FAILED (1 * SECOND)

/* The wish to know a spec's addresses. */
typedef struct Lookup {
    struct Lookup *next; /* the next one that waits for its turn */
    bool waits;          /* it waits for its turn */
    pid_t pid;           /* of the child; 0: there is none */
    int fd;              /* the child writes its Answer to the other end */
    Answer *answer;      /* as much of it as came; NULL: there is no child */
    size_t got;          /* bytes of that */
    uint64_t at;         /* when it was begun, us */
    Spec *spec;          /* keeps the addresses */
    bool changed;        /* the last answer was another than the one before */
    /* the spec has new addresses; or not, then @err is an EAI_ value < 0 */
    void (*done)(void *opaque, int err);
    void *opaque;
} Lookup;

static Lookup *lookups;                   /* that wait for their turn */
static Lookup **lookups_end = &lookups;   /* where the next one goes */
static int lookups_out;                   /* children */
static VPTimer lookups_timer;             /* to begin those that may */
static VPOnce lookups_said;               /* why there was no child */

/* lookup_child() - the child: write what the name server says, and end */
static void lookup_child(const Spec *spec, int fd)
{
    Answer answer;

    /* else it would tell the parent of a signal that both got */
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    signal(SIGHUP, SIG_IGN);
    signal(SIGUSR1, SIG_IGN);
    /* else a connection that the parent closes would stay open here */
    for (int i = STDERR_FILENO + 1; i < vp_loop_nfds(loop); i++) {
        if (i != fd) {
            close(i);
        }
    }
    memset(&answer, 0, sizeof(answer));
    answer.naddrs = addr_lookup(spec->addr, spec->port, 0, answer.addrs);
    answer.gid = spec->props.group != NULL ? group_lookup(spec->props.group)
                                           : -1;
    _exit(write(fd, &answer, sizeof(answer)) < 0);
}

static void lookups_begin(void *opaque);

/* lookup_busy() - will there be an answer? */
static bool lookup_busy(const Lookup *l)
{
    return l->waits || l->pid > 0;
}

static void lookup_cancel(Lookup *l)
{
    if (l->pid > 0) {
        vp_unwatch(loop, l->fd);
        close(l->fd);
        kill(l->pid, SIGKILL);
        waitpid(l->pid, NULL, 0);
        l->pid = 0;
        free(l->answer);
        l->answer = NULL;
        lookups_out--;
        vp_timer_start(loop, &lookups_timer, 0, lookups_begin, NULL);
    }
    if (l->waits) {
        Lookup **at = &lookups;

        while (*at != l) {
            at = &(*at)->next;
        }
        *at = l->next;
        lookups_end = l->next == NULL ? at : lookups_end;
        l->waits = false;
    }
}

/* lookup_keep() - what the child found out; returns what "done" gets */
static int lookup_keep(Lookup *l, const Answer *answer)
{
    Spec *spec = l->spec;

    if (answer->naddrs < 0) {
        return answer->naddrs;
    }
    if (spec_lacks_group(spec)) {
        if (answer->gid < 0) {
            return -abs(EAI_NONAME);
        }
        spec->props.gid = answer->gid;
        group_keep(spec->props.group, answer->gid);
    }
    l->changed = spec->naddrs != answer->naddrs;
    for (int i = 0; i < answer->naddrs && !l->changed; i++) {
        l->changed = memcmp(&spec->addrs[i], &answer->addrs[i],
                            sizeof(answer->addrs[i])) != 0;
    }
    return spec_keep(spec, answer->addrs, answer->naddrs) ? 0
                                                          : -abs(EAI_MEMORY);
}

static void lookup_ready(void *opaque, int fd, int events)
{
    Lookup *l = opaque;
    Answer answer;
    ssize_t n = read(fd, (char *)l->answer + l->got, sizeof(answer) - l->got);

    (void)events;
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        return;
    }
    if (n > 0) {
        l->got += (size_t)n;
        if (l->got < sizeof(answer)) {
            return; /* because a pipe may pass less at once */
        }
        answer = *l->answer;
    } else {
        answer.naddrs = -abs(EAI_FAIL);
    }
    lookup_cancel(l);
    l->done(l->opaque, lookup_keep(l, &answer));
}

/* lookup_fork() - returns 0, or the errno value of why there is no child */
static int lookup_fork(Lookup *l)
{
    int fds[2], err;

    if (pipe(fds) < 0) {
        return errno;
    }
    l->got = 0;
    l->answer = malloc(sizeof(*l->answer));
    err = l->answer == NULL ? ENOMEM
          : fcntl(fds[0], F_SETFL, O_NONBLOCK) < 0 ? errno
          : -vp_watch(loop, fds[0], lookup_ready, l);
    if (err == 0) {
        l->pid = fork();
        if (l->pid == 0) {
            lookup_child(l->spec, fds[1]);
        }
        if (l->pid < 0) {
            err = errno;
            l->pid = 0;
            vp_unwatch(loop, fds[0]);
        }
    }
    close(fds[1]);
    if (err != 0) {
        free(l->answer);
        l->answer = NULL;
        close(fds[0]);
        return err;
    }
    l->fd = fds[0];
    vp_watch_set(loop, l->fd, VP_READ);
    return 0;
}

/* lookups_begin() - as many of those that wait as may */
static void lookups_begin(void *opaque)
{
    (void)opaque;
    while (lookups != NULL && lookups_out < LOOKUPS_MAX) {
        Lookup *l = lookups;
        /* another one may have found out the same group */
        bool known = spec_lacks_group(l->spec) && spec_known(l->spec);
        int err = known ? 0 : lookup_fork(l);

        if (err != 0 && lookups_out > 0) {
            return; /* the end of one makes room */
        }
        lookups = l->next;
        lookups_end = lookups == NULL ? &lookups : lookups_end;
        l->waits = false;
        if (known) {
            /* the others in later passes, because there may be thousands */
            vp_timer_start(loop, &lookups_timer, 1, lookups_begin, NULL);
            l->done(l->opaque, 0);
            return;
        }
        if (err == 0) {
            lookups_said = (VPOnce){ .said = false };
            lookups_out++;
            continue;
        }
        if (vp_once(&lookups_said, (uintptr_t)err, vp_loop_now(loop), 0)) {
            log_at(VP_LOG_WARN, VP_NO_CHANNEL, "cannot look up names: %s",
                   strerror(err));
        }
        l->done(l->opaque, -abs(EAI_AGAIN));
    }
}

/* lookups_under_way() - will there be any answer? */
static bool lookups_under_way(void)
{
    return lookups != NULL || lookups_out > 0;
}

/*
 * lookup_start() - have a child look up l->spec
 *
 * l->done() is called from the loop.  Under way already, it goes on.
 */
static void lookup_start(Lookup *l)
{
    if (lookup_busy(l)) {
        return;
    }
    l->at = vp_loop_now(loop);
    l->waits = true;
    l->next = NULL;
    *lookups_end = l;
    lookups_end = &l->next;
    vp_timer_start(loop, &lookups_timer, 0, lookups_begin, NULL);
}

/*
 * lookup_again() - an address is needed: is what is known of them too old?
 * @failed:  all of them have failed just now
 */
static void lookup_again(Lookup *l, bool failed)
{
    if (vp_loop_now(loop) - l->at >= (failed ? NAME_FAILED : NAME_OLD)) {
        lookup_start(l);
    }
}

/* ---- trying again ----------------------------------------------------- */

/* Between tries; the first one hurries, as a VM may just be starting. */
#define RETRY_MIN (100 * MS)
#define RETRY_MAX (5 * SECOND)

/* What is tried until it succeeds; a zeroed one was never tried. */
typedef struct Retry {
    VPTimer timer;
    uint64_t wait; /* from a failure to the next try, us; 0: the least */
    VPOnce said;   /* the failure that was logged last */
} Retry;

/* retry_later() - longer each time, until retry_over() */
static void retry_later(Retry *r, void (*try)(void *opaque), void *opaque)
{
    r->wait = r->wait == 0 ? RETRY_MIN
              : r->wait * 2 < RETRY_MAX ? r->wait * 2 : RETRY_MAX;
    vp_timer_start(loop, &r->timer, r->wait, try, opaque);
}

/* retry_is_news() - is @err another failure than the one that was logged? */
static bool retry_is_news(Retry *r, int err)
{
    return vp_once(&r->said, (uintptr_t)err, vp_loop_now(loop), 0);
}

/* retry_over() - it has succeeded */
static void retry_over(Retry *r)
{
    r->wait = 0;
    r->said = (VPOnce){ .said = false };
}

/* name_error() - that @spec could not be looked up */
static void name_error(const Spec *spec, int rc, Error *err)
{
    bool group = spec_lacks_group(spec);

    error_set(err, "-%c '%.128s': cannot look up '%.128s': %s", spec->option,
              spec->text, group ? spec->props.group : spec->addr,
              group && rc == -abs(EAI_NONAME) ? "there is no such group"
                                              : lookup_error(rc));
}

/*
 * name_failed() - log why @spec could not be looked up, if that is news
 * @serves:  an address that it had before is in use
 */
static void name_failed(Retry *r, const Spec *spec, int rc, bool serves)
{
    Error err;

    if (retry_is_news(r, rc)) {
        name_error(spec, rc, &err);
        log_at(VP_LOG_WARN, (int)spec->channel_id, "%s: %s", err.text,
               serves ? "the address it had serves" : "trying again");
    }
}

/* ======================================================================
 * listeners
 *
 * A Listening is what a spec listens on: a socket for each of its addresses.
 * Its owner, a channel or an oforward, gets each socket once it is bound.
 *
 *   state        waits for                  and then
 *   looking up   the child                  listening, or missing
 *   missing      its timer, 0.1 s to 5 s    looking up if a name, or listening
 *   listening    its timer, 0.1 s to 5 s,   looking up if a name, or listening
 *                while some are missing
 *                its timer, a minute or     looking up
 *                more, if it is a name
 *
 * What is wrong for good is an error for whoever asked, if he still waits: the
 * start, a reload, a client of the monitor.  Later it counts as missing.
 * ====================================================================== */

/* Connections that may wait to be accepted; where less is allowed, less do. */
#define LISTEN_QUEUE 4096

/*
 * The folder of a stale socket is tried to be locked so often, so far apart, at
 * start; and once when channels would have to wait for that.
 */
#define LOCK_TRIES 50
#define LOCK_STEP (20 * MS)
static int lock_tries = LOCK_TRIES;

/* The file of a unix socket, to be removed at the end if it is still ours. */
typedef struct SocketFile {
    struct SocketFile *next;
    struct SocketFile **link; /* what points at us */
    char path[SOCKET_PATH_MAX + 1];
    dev_t dev;
    ino_t ino;
} SocketFile;

static SocketFile *socket_files;

/*
 * socket_file_keep() - what socket_file_remove() needs for the file at @path
 *
 * NULL if there is none, or no memory: then it will stay.
 */
static SocketFile *socket_file_keep(const char *path)
{
    SocketFile *f = calloc(1, sizeof(*f));
    struct stat st;

    if (f == NULL || path_is_abstract(path) || lstat(path, &st) < 0) {
        free(f);
        return NULL;
    }
    snprintf(f->path, sizeof(f->path), "%s", path);
    f->dev = st.st_dev;
    f->ino = st.st_ino;
    f->next = socket_files;
    f->link = &socket_files;
    if (f->next != NULL) {
        f->next->link = &f->next;
    }
    socket_files = f;
    return f;
}

/* socket_file_gone() - is there another file, or none, where @f was? */
static bool socket_file_gone(const SocketFile *f)
{
    struct stat st;

    return f != NULL && (lstat(f->path, &st) < 0 || st.st_dev != f->dev ||
                         st.st_ino != f->ino);
}

/* socket_file_remove() - @f is freed, and may be NULL */
static void socket_file_remove(SocketFile *f)
{
    if (f == NULL) {
        return;
    }
    if (!socket_file_gone(f)) {
        unlink(f->path);
    }
    *f->link = f->next;
    if (f->next != NULL) {
        f->next->link = f->link;
    }
    free(f);
}

/* socket_files_remove() - all of them */
static void socket_files_remove(void)
{
    while (socket_files != NULL) {
        socket_file_remove(socket_files);
    }
}

/*
 * folder_lock() - keep other qemu-vps from removing sockets beside @path
 *
 * Returns a descriptor to be closed, or -1: whoever else locks folders for long
 * isn't waited for.
 */
static int folder_lock(const char *path)
{
#ifdef LOCK_EX
    char folder[SOCKET_PATH_MAX + 1];
    const char *slash = strrchr(path, '/');
    int fd;

    snprintf(folder, sizeof(folder), "%.*s",
             slash != NULL ? (int)(slash - path) + 1 : 1,
             slash != NULL ? path : ".");
    fd = open(folder, O_RDONLY | O_DIRECTORY);
    for (int i = 1; fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) < 0 &&
         i < lock_tries; i++) {
        poll(NULL, 0, LOCK_STEP / MS);
    }
    return fd;
#else
    (void)path;
    return -1;
#endif
}

/* socket_is_stale() - is @addr that of a file without a socket? */
static bool socket_is_stale(const VPAddr *addr)
{
    /* a datagram socket can't connect to one of ours, but tells if it is there,
       and who owns that notices nothing */
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    bool stale = fd >= 0 && connect(fd, (const struct sockaddr *)&addr->ss,
                                    addr->len) < 0 && errno == ECONNREFUSED;

    if (fd >= 0) {
        close(fd);
    }
    return stale;
}

/*
 * clear_stale() - remove the file at @path of a socket that is gone
 *
 * Who else wants @path may have looked at it before we removed the file, and
 * would then remove ours: so one looks and removes at a time.
 *
 * Returns 0, or the errno value of why @path can't be bound.
 */
static int clear_stale(const VPAddr *addr, const char *path)
{
    struct stat st;
    int lock, rc;

    if (lstat(path, &st) < 0) {
        return 0; /* because bind() will say what is wrong, if anything */
    }
    if (!S_ISSOCK(st.st_mode)) {
        return EEXIST;
    }
    lock = folder_lock(path);
    rc = !socket_is_stale(addr) ? EADDRINUSE : unlink(path) < 0 ? errno : 0;
    if (lock >= 0) {
        close(lock);
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

/* v6_only() - is it to listen for IPv6 alone? systems differ if not told */
static void v6_only(int fd, int only)
{
#ifdef IPV6_V6ONLY
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof(only));
#else
    (void)fd;
    (void)only;
#endif
}

/* Who is to own the files: USER of -u, from the start on.  -1: who we are. */
static uid_t files_uid = (uid_t)-1;
static gid_t files_gid = (gid_t)-1;

/*
 * file_rights() - give the socket at @path its owner, group and mode
 *
 * The mode comes first, because to change it once the file is USER's takes
 * a capability more.
 */
static int file_rights(const char *path, const Props *props)
{
    gid_t gid = props->gid >= 0 ? (gid_t)props->gid : files_gid;

    if (props->mode >= 0 && chmod(path, (mode_t)props->mode) < 0) {
        return -1;
    }
    return files_uid != (uid_t)-1 || gid != (gid_t)-1
           ? lchown(path, files_uid, gid) : 0;
}

/*
 * listen_at() - a listening socket
 * @addr:  becomes the address bound, with the port that was picked
 * @both:  if it is IPv6's [::], IPv4 is served as well
 * @props: of a unix socket's file
 *
 * Returns the socket, or a negative errno value.
 */
static int listen_at(VPAddr *addr, bool both, const Props *props)
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
    if (family == AF_INET6) {
        v6_only(fd, !both);
    }
    if (rc == 0 &&
        (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ||
         bind(fd, (struct sockaddr *)&addr->ss, addr->len) < 0)) {
        rc = errno;
    } else if (rc == 0 &&
               /* before it listens nobody can connect */
               ((family == AF_UNIX && path[0] != '\0' &&
                 file_rights(path, props) < 0) ||
                listen(fd, LISTEN_QUEUE) < 0)) {
        rc = errno;
        if (family == AF_UNIX) {
            unlink(path);
        }
    }
    if (rc != 0) {
        close(fd);
        return -rc;
    }
    if (family != AF_UNIX) {
        addr_bound(fd, addr);
    }
    return fd;
}

/* listen_error() - in words why listen_at() returned @rc */
static const char *listen_error(int rc)
{
    return rc == -EEXIST ? "the file is not a socket" : strerror(-rc);
}

/* ---- inherited descriptors -------------------------------------------- */

/*
 * Descriptors that were open when we began, of the 1024 that a process may have
 * where nobody has raised that.  Later a number tells nothing, because our own
 * have taken the free ones.
 *
 * One that listens stays here, and who listens has a copy: when a reload adds
 * the same spec again, because its channel's line has changed, clients that
 * have come meanwhile are in its queue.
 */
static struct {
    int fd;           /* -1: there was none, or it is a channel's now */
    const Spec *user; /* that listens on it, or NULL */
} inherited[1024];

/* The first descriptor of systemd's protocol, see sd_listen_fds(3). */
#define LISTEN_FDS_START 3

static int listen_fds;              /* how many of them there are */
static const char *listen_fd_names; /* with colons between, or NULL */

/* inherited_find() - before anything is opened, and before any fork() */
static void inherited_find(void)
{
    const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");
    unsigned long number;

    for (int fd = 0; fd < (int)COUNT(inherited); fd++) {
        inherited[fd].fd = fcntl(fd, F_GETFD) >= 0 ? fd : -1;
    }
    if (pid != NULL && n != NULL &&
        parse_number(pid, 1, INT_MAX, &number) && (pid_t)number == getpid() &&
        parse_number(n, 1, COUNT(inherited) - LISTEN_FDS_START, &number)) {
        listen_fds = (int)number;
        listen_fd_names = getenv("LISTEN_FDNAMES");
    }
    for (int i = 0; i < listen_fds; i++) {
        fcntl(LISTEN_FDS_START + i, F_SETFD, FD_CLOEXEC);
    }
}

/*
 * inherited_high_close() - close those beyond "inherited", which nothing names
 *
 * To be called before the daemon has opened any that it keeps.
 */
static void inherited_high_close(void)
{
#ifdef HAVE_CLOSEFROM
    closefrom((int)COUNT(inherited));
#else
    DIR *dir = opendir("/dev/fd");
    const struct dirent *entry;
    unsigned long fd;

    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (parse_number(entry->d_name, COUNT(inherited), INT_MAX, &fd) &&
            (int)fd != dirfd(dir)) {
            close((int)fd);
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
#endif
}

/* inherited_name() - of descriptor @fd; returns its length, 0: it has none */
static int inherited_name(int fd, const char **name)
{
    const char *at = listen_fd_names;

    if (fd < LISTEN_FDS_START || fd >= LISTEN_FDS_START + listen_fds) {
        return 0;
    }
    for (; at != NULL && fd > LISTEN_FDS_START; fd--) {
        at = strchr(at, ':');
        at = at != NULL ? at + 1 : NULL;
    }
    *name = at;
    return at != NULL ? (int)strcspn(at, ":") : 0;
}

/* inherited_next() - the first descriptor after @fd that @spec names, or -1 */
static int inherited_next(const Spec *spec, int fd)
{
    const char *name;
    unsigned long number;

    if (parse_number(spec->addr, 0, INT_MAX, &number)) {
        return fd < (int)number ? (int)number : -1;
    }
    while (++fd < LISTEN_FDS_START + listen_fds) {
        int len = inherited_name(fd, &name);

        if (len > 0 && strlen(spec->addr) == (size_t)len &&
            strncmp(spec->addr, name, (size_t)len) == 0) {
            return fd;
        }
    }
    return -1;
}

/* socket_listens() - is it a stream socket that listens? */
static bool socket_listens(int fd)
{
    int type = 0, listens = 0;
    socklen_t len = sizeof(int);

    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 &&
           type == SOCK_STREAM &&
           getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) == 0 &&
           listens != 0;
}

/* null_open() - what takes a descriptor's number, and no byte of anybody's */
static int null_open(void)
{
    int fd = open("/dev/null", O_RDWR);

    return fd >= 0 ? fd : open("/", O_RDONLY);
}

/* null_at() - make the descriptors from @fd to @last ones of null_open() */
static void null_at(int fd, int last)
{
    int null = null_open();

    for (; null >= 0 && fd <= last; fd++) {
        dup2(null, fd);
    }
    if (null > STDERR_FILENO) {
        close(null);
    }
}

/*
 * standard_move() - move @fd if it is stdin, stdout or stderr
 *
 * Else it would be logged to, or be replaced when we go to the background.
 * Returns its new number, or -1: see errno.
 */
static int standard_move(int fd)
{
    int copy;

    if (fd > STDERR_FILENO) {
        return fd;
    }
    copy = fcntl(fd, F_DUPFD, STDERR_FILENO + 1);
    if (copy >= 0) {
        null_at(fd, fd);
    }
    return copy;
}

/* inherited_has_v4() - does one of them listen on IPv4's @port? */
static bool inherited_has_v4(int port)
{
    for (size_t i = 0; i < COUNT(inherited); i++) {
        int fd = inherited[i].fd;
        VPAddr addr;

        if (fd < 0 || !socket_listens(fd)) {
            continue;
        }
        addr_bound(fd, &addr);
        if (addr.ss.ss_family == AF_INET && ntohs(*addr_port(&addr)) == port) {
            return true;
        }
    }
    return false;
}

/* inherited_listens() - is the first descriptor of @spec one to listen on? */
static bool inherited_listens(const Spec *spec)
{
    int given = inherited_next(spec, -1);

    return given >= 0 && given < (int)COUNT(inherited) &&
           inherited[given].fd >= 0 && socket_listens(inherited[given].fd);
}

/* inherited_unnamed() - say that @spec names no descriptor; false */
static bool inherited_unnamed(const Spec *spec, Error *err)
{
    return error_set(err, "-%c '%.128s': there is no descriptor of this name: "
                     "%s%.128s", spec->option, spec->text,
                     listen_fds == 0 ? "LISTEN_FDS has none for this process"
                     : listen_fd_names == NULL ? "LISTEN_FDNAMES is not set"
                     : "LISTEN_FDNAMES is ",
                     listen_fd_names != NULL ? listen_fd_names : "");
}

/* inherited_error() - say what is wrong with descriptor @given; false */
static bool inherited_error(const Spec *spec, int given, const char *why,
                            Error *err)
{
    return error_set(err, "-%c '%.128s': descriptor %d: %s", spec->option,
                     spec->text, given, why);
}

/* inherited_wrong() - why nobody can have descriptor @given, or NULL */
static const char *inherited_wrong(int given)
{
    if (given >= (int)COUNT(inherited)) {
        return "only those below 1024 can be inherited";
    }
    return inherited[given].fd < 0 || inherited[given].user != NULL
           ? "it was not open at the start, or is taken" : NULL;
}

/*
 * inherited_copy() - have @spec listen on descriptor @given
 * @copy:  becomes its own, non-blocking, or -1
 *
 * Returns NULL, or why it can't.
 */
static const char *inherited_copy(const Spec *spec, int given, int *copy)
{
    const char *wrong = inherited_wrong(given);
    VPAddr addr;
    int fd;

    *copy = -1;
    if (wrong != NULL) {
        return wrong;
    }
    fd = inherited[given].fd;
    if (!socket_listens(fd)) {
        return "it is not a stream socket that listens";
    }
    addr_bound(fd, &addr);
    if (addr.ss.ss_family != AF_UNIX &&
        (spec->option == 'm' || (spec->option == 'o' &&
         strcmp(spec->service_id, VP_ANY_SERVICE) == 0))) {
        return "it is not a unix socket";
    }
    fd = standard_move(fd);
    inherited[given].fd = fd;
    if (fd < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ||
        (*copy = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0) {
        return strerror(errno);
    }
    inherited[given].user = spec;
    return NULL;
}

/* inherited_release() - @spec listens no more */
static void inherited_release(const Spec *spec)
{
    for (size_t i = 0; i < COUNT(inherited); i++) {
        if (inherited[i].user == spec) {
            inherited[i].user = NULL;
        }
    }
}

/*
 * inherited_listen() - listen on the descriptors that @spec names
 * @fds:  become copies of them, as many as @spec has addresses then, at most
 *        @most
 *
 * Nobody else can listen there until inherited_release().
 */
static bool inherited_listen(Spec *spec, int *fds, int most, Error *err)
{
    VPAddr addrs[MAX_ADDRS];
    const char *wrong = NULL;
    int given = inherited_next(spec, -1), n = 0;

    if (given < 0) {
        return inherited_unnamed(spec, err);
    }
    while (given >= 0 && wrong == NULL) {
        wrong = n == most ? "too many have this name"
                          : inherited_copy(spec, given, &fds[n]);
        if (wrong == NULL) {
            addr_bound(fds[n], &addrs[n]);
            n++;
            given = inherited_next(spec, given);
        }
    }
    if (wrong == NULL && spec_keep(spec, addrs, n)) {
        return true;
    }
    while (n > 0) {
        close(fds[--n]);
    }
    inherited_release(spec);
    return wrong == NULL ? error_memory(err)
                         : inherited_error(spec, given, wrong, err);
}

/* inherited_close() - what nobody uses: others may wait until it is closed */
static void inherited_close(void)
{
    for (size_t i = 0; i < COUNT(inherited); i++) {
        if (inherited[i].user == NULL) {
            if (inherited[i].fd > STDERR_FILENO) {
                close(inherited[i].fd);
            }
            inherited[i].fd = -1;
        }
    }
}

/* inherited_check() - say so if a starter's socket is one that nobody serves */
static void inherited_check(void)
{
    Text unused = { .data = NULL };
    const char *name = "";

    for (int i = 0; i < listen_fds; i++) {
        int fd = LISTEN_FDS_START + i, len = inherited_name(fd, &name);

        if (inherited[fd].fd >= 0 && inherited[fd].user == NULL) {
            text_add(&unused, len > 0 ? " %d (%.*s)" : " %d", fd, len, name);
        }
    }
    if (unused.len > 0) {
        log_at(VP_LOG_WARN, VP_NO_CHANNEL, "no -o, -m or -c uses these "
               "descriptors of LISTEN_FDS:%s", unused.data);
    }
    text_free(&unused);
}

/* ---- addresses and their sockets -------------------------------------- */

/* Tries to find a port that is free in both families. */
#define PORT_TRIES 100

/* Where a spec listens: a socket for each of its addresses. */
typedef struct Listening {
    Spec *spec;
    /*
     * @fd listens at one of the addresses; it is the owner's, also on failure.
     * Returns 0 or a negative errno value.
     */
    int (*take)(void *opaque, int fd);
    void (*drop)(void *opaque, int fd); /* @fd is to be closed */
    void *opaque;
    int fds[MAX_ADDRS]; /* by address; -1: it can't be listened on yet */
    SocketFile *file;   /* of a unix socket */
    bool starting;      /* the start waits for the first answer */
    bool follows;       /* its name is asked for again and again */
    Lookup lookup;
    Retry retry;
} Listening;

/*
 * Each of them asks once in NAME_OLD, but where there are many only so often
 * that all of them together ask once in this time, us.
 */
#define FOLLOW_STEP (100 * MS)

static unsigned followers; /* that follow their names */

/* The start, as far as it waits for names to listen on. */
static struct {
    bool waits;
    int names;   /* that have not been looked up for the first time */
    bool failed; /* "err" says why it can't be */
    Error err;
} starting = { .waits = true };

/* starting_less() - the start waits for this name no more */
static void starting_less(Listening *l)
{
    if (!l->starting) {
        return;
    }
    l->starting = false;
    starting.names--;
    if (starting.waits && (starting.names == 0 || starting.failed)) {
        vp_loop_stop(loop);
    }
}

/* listen_later() - is @rc of listen_at() over once the address is there? */
static bool listen_later(const Spec *spec, int rc)
{
    /* vsock's module may be loaded later */
    return rc == -EADDRNOTAVAIL || rc == -ENODEV ||
           (rc == -EAFNOSUPPORT && spec_is_vsock(spec));
}

/*
 * listening_try() - bind what isn't bound
 * @fds:    gets, by address, a socket or a negative errno value
 * @first:  number of the address that chooses the port if any will do
 *
 * Returns the index of an address that is wrong for good, or -1.
 */
static int listening_try(const Listening *l, int *fds, int first)
{
    const Spec *spec = l->spec;
    in_port_t port = 0;
    int wrong = -1;
    VPAddr at;

    for (int i = 0; i < spec->naddrs && spec->port != NULL; i++) {
        if (l->fds[i] >= 0) {
            addr_bound(l->fds[i], &at);
            port = *addr_port(&at);
        }
    }
    for (int n = 0; n < spec->naddrs; n++) {
        int i = (first + n) % spec->naddrs;

        at = spec->addrs[i];
        fds[i] = l->fds[i];
        if (fds[i] >= 0) {
            addr_bound(fds[i], &at);
        } else {
            if (spec->port != NULL && *addr_port(&at) == 0) {
                *addr_port(&at) = port; /* one free port for all */
            }
            fds[i] = listen_at(&at, spec->both, &spec->props);
        }
        if (fds[i] >= 0) {
            port = spec->port != NULL ? *addr_port(&at) : 0;
        } else if (wrong < 0 && !listen_later(spec, fds[i]) &&
                   (fds[i] != -EAFNOSUPPORT || spec->naddrs == 1)) {
            wrong = i;
        }
    }
    return wrong;
}

/* listening_drop() - close what listening_try() has bound */
static void listening_drop(const Listening *l, const int *fds)
{
    for (int i = 0; i < l->spec->naddrs; i++) {
        if (fds[i] >= 0 && l->fds[i] < 0) {
            close(fds[i]);
        }
    }
}

/* listening_take() - give the owner what listening_try() has bound */
static int listening_take(Listening *l, const int *fds, Error *err)
{
    const Spec *spec = l->spec;
    int rc = 0;

    for (int i = 0; i < spec->naddrs; i++) {
        VPAddr at;

        if (fds[i] < 0 || l->fds[i] >= 0) {
            continue;
        }
        if (rc < 0) {
            close(fds[i]);
            continue;
        }
        addr_bound(fds[i], &at);
        if (spec->port == NULL && !spec->inherited) {
            l->file = socket_file_keep(spec->addr);
        }
        rc = l->take(l->opaque, fds[i]);
        if (rc < 0) {
            error_set(err, "-%c '%.128s': %s", spec->option, spec->text,
                      strerror(-rc));
            continue;
        }
        l->fds[i] = fds[i];
        log_at(VP_LOG_INFO, (int)spec->channel_id, "%s %s: listening on %s%s",
               spec_name(spec), spec_what(spec), addr_name(&at),
               spec->both ? ", for IPv4 as well" : "");
    }
    return rc;
}

static void listening_retry(void *opaque);

/* listening_age() - us after which its name is asked for again */
static uint64_t listening_age(void)
{
    return followers * FOLLOW_STEP > NAME_OLD ? followers * FOLLOW_STEP
                                              : NAME_OLD;
}

/* listening_rest() - until it is time to ask again */
static void listening_rest(Listening *l)
{
    vp_timer_start(loop, &l->retry.timer, listening_age(), listening_retry, l);
}

/*
 * listening_bind() - listen at every address that isn't listened on
 * @patient:  be content with none of them, as yet
 * @partly:   be content with some of them, whatever is wrong with the others
 *
 * An address that isn't there yet is logged, and tried again.  One of a family
 * that this machine doesn't have is only logged, if there are others.
 * Returns 0, or a negative errno value: see @err.
 */
static int listening_bind(Listening *l, bool patient, bool partly, Error *err)
{
    const Spec *spec = l->spec;
    bool free_port = spec->port != NULL && !spec_is_vsock(spec) &&
                     *addr_port(&spec->addrs[0]) == 0;
    int fds[MAX_ADDRS], wrong = listening_try(l, fds, 0), n = 0, missing = -1;
    bool later = false;

    /* each in turn chooses, because the kernel may have a taste for some */
    for (int i = 1; i < PORT_TRIES && wrong >= 0 && free_port &&
         fds[wrong] == -EADDRINUSE; i++) {
        listening_drop(l, fds);
        wrong = listening_try(l, fds, i);
    }
    for (int i = 0; i < spec->naddrs; i++) {
        n += fds[i] >= 0;
        missing = fds[i] < 0 ? i : missing;
        later |= listen_later(spec, fds[i]);
    }
    missing = wrong >= 0 ? wrong : missing;
    if (wrong >= 0 ? n == 0 || !partly : n == 0 && !(patient && later)) {
        error_set(err, "-%c '%.128s': cannot listen on %.160s: %s",
                  spec->option, spec->text, addr_name(&spec->addrs[missing]),
                  listen_error(fds[missing]));
        listening_drop(l, fds);
        return fds[missing];
    }
    later |= wrong >= 0;
    if (missing < 0) {
        retry_over(&l->retry);
    } else if (retry_is_news(&l->retry, fds[missing])) {
        log_at(VP_LOG_WARN, (int)spec->channel_id, "%s %.128s: cannot listen "
               "on %.160s: %s%s", spec_name(spec), spec->text,
               addr_name(&spec->addrs[missing]), strerror(-fds[missing]),
               later ? ": trying again" : "");
    }
    if (later) {
        retry_later(&l->retry, listening_retry, l);
    } else if (spec_has_scope(spec)) {
        vp_timer_start(loop, &l->retry.timer, RETRY_MAX, listening_retry, l);
    } else if (l->follows) {
        listening_rest(l);
    }
    return listening_take(l, fds, err);
}

/* listening_go_on() - nobody waits for this but, perhaps, the start */
static void listening_go_on(Listening *l)
{
    bool awaited = l->starting && starting.waits;
    Error err;
    int rc = listening_bind(l, true, !awaited, &err);

    if (rc == 0) {
        return;
    }
    if (awaited) {
        starting.failed = true;
        starting.err = err;
        return;
    }
    if (retry_is_news(&l->retry, rc)) {
        log_at(VP_LOG_ERROR, (int)l->spec->channel_id, "%s: trying again",
               err.text);
    }
    retry_later(&l->retry, listening_retry, l);
}

/*
 * listening_follow() - has the interface of an address been made anew?
 *
 * Then the socket is one of the interface that is gone, and hears of nobody.
 */
static void listening_follow(Listening *l)
{
    Spec *spec = l->spec;
    VPAddr addrs[MAX_ADDRS];
    int n = addr_lookup(spec->addr, spec->port, AI_NUMERICHOST, addrs);

    if (n == 1 && memcmp(&addrs[0].ss, &spec->addrs[0].ss, addrs[0].len) != 0 &&
        spec_keep(spec, addrs, n)) {
        l->drop(l->opaque, l->fds[0]);
        l->fds[0] = -1;
    }
}

static void listening_retry(void *opaque)
{
    Listening *l = opaque;
    bool any = false;

    for (int i = 0; i < MAX_ADDRS; i++) {
        any |= l->fds[i] >= 0;
    }
    if (any && spec_has_scope(l->spec)) {
        listening_follow(l);
        listening_go_on(l);
        return;
    }
    if (!spec_known(l->spec) || (!any && spec_is_name(l->spec)) ||
        (l->follows &&
         vp_loop_now(loop) - l->lookup.at >= listening_age())) {
        lookup_start(&l->lookup);
    } else {
        listening_go_on(l);
    }
}

/* listening_again() - the owner has closed a unix socket: make another */
static void listening_again(Listening *l)
{
    l->fds[0] = -1;
    socket_file_remove(l->file);
    l->file = NULL;
    listening_go_on(l);
}

/* listening_place() - which of the spec's addresses is @at?  -1: none */
static int listening_place(const Spec *spec, VPAddr *at)
{
    for (int i = 0; i < spec->naddrs; i++) {
        VPAddr addr = spec->addrs[i];

        *addr_port(&addr) = *addr_port(at); /* it may be any free one */
        if (addr.len == at->len && memcmp(&addr.ss, &at->ss, at->len) == 0) {
            return i;
        }
    }
    return -1;
}

/*
 * listening_move() - the name has other addresses: leave those it had
 *
 * Returns whether it is listened on at any.
 */
static bool listening_move(Listening *l)
{
    const Spec *spec = l->spec;
    int fds[MAX_ADDRS], n = 0;

    memcpy(fds, l->fds, sizeof(fds));
    for (int i = 0; i < MAX_ADDRS; i++) {
        l->fds[i] = -1;
    }
    for (int i = 0; i < MAX_ADDRS; i++) {
        VPAddr at;
        int to;

        if (fds[i] < 0) {
            continue;
        }
        addr_bound(fds[i], &at);
        to = listening_place(spec, &at);
        if (to >= 0) {
            l->fds[to] = fds[i];
            n++;
            continue;
        }
        log_at(VP_LOG_INFO, (int)spec->channel_id, "%s %s: no longer "
               "listening on %s", spec_name(spec), spec_what(spec),
               addr_name(&at));
        l->drop(l->opaque, fds[i]);
    }
    return n > 0;
}

/* listening_looked_up() - Lookup.done() */
static void listening_looked_up(void *opaque, int rc)
{
    Listening *l = opaque;
    bool serves = l->spec->naddrs > 0 && listening_move(l);

    if (rc == 0) {
        listening_go_on(l);
    } else {
        name_failed(&l->retry, l->spec, rc, serves);
        if (serves) {
            listening_rest(l);
        } else {
            retry_later(&l->retry, listening_retry, l);
        }
    }
    starting_less(l);
}

/* listening_ask() - a reload asks for all names */
static void listening_ask(Listening *l)
{
    if (l->follows) {
        lookup_start(&l->lookup);
    }
}

/*
 * listening_start() - listen for the owner of @l, who has set "spec" and "take"
 * @patient:  see listening_bind()
 *
 * A name is looked up first.
 */
static bool listening_start(Listening *l, bool patient, Error *err)
{
    for (int i = 0; i < MAX_ADDRS; i++) {
        l->fds[i] = -1;
    }
    l->lookup.spec = l->spec;
    l->lookup.done = listening_looked_up;
    l->lookup.opaque = l;
    /* localhost is always the loopback (RFC 6761) */
    l->follows = spec_is_name(l->spec) && !spec_has_scope(l->spec) &&
                 strcmp(l->spec->addr, "localhost") != 0;
    followers += l->follows;
    if (l->spec->inherited) {
        int fds[MAX_ADDRS];

        return inherited_listen(l->spec, fds, MAX_ADDRS, err) &&
               listening_take(l, fds, err) == 0;
    }
    if (spec_known(l->spec)) {
        return listening_bind(l, patient, false, err) == 0;
    }
    l->starting = starting.waits;
    starting.names += l->starting;
    lookup_start(&l->lookup);
    return true;
}

/* listening_stop() - try no more; the sockets are the owner's to close */
static void listening_stop(Listening *l)
{
    lookup_cancel(&l->lookup);
    vp_timer_stop(&l->retry.timer);
    followers -= l->follows;
    l->follows = false;
    starting_less(l);
    socket_file_remove(l->file);
    l->file = NULL;
    inherited_release(l->spec);
}

/* ======================================================================
 * channels
 *
 * A channel is opened in the way of its METHOD, and the engine gets the
 * descriptor.  That is the engine's from vp_attach() until its channel_lost()
 * call.  Opening never blocks the loop: connect() is non-blocking, names are
 * looked up by a child.
 *
 *   state        waits for                    and then
 *   waiting      its timer, 0.1 s to 5 s      channel_try()
 *   looking up   the child                    connecting, or waiting
 *   connecting   the dialler                  attached, or waiting
 *   attached     channel_lost()               waiting, or ended
 *   listening    somebody to come             the engine gets each who comes
 *   ended        nothing: an inherited descriptor can't be opened again
 *
 * A failure is logged once, until the channel has been open or fails in another
 * way.
 * ====================================================================== */

/* ---- serial lines ----------------------------------------------------- */

/*
 * A line may have to send the engine's goodbye before it is closed.  That takes
 * so long at most: 9600 baud are enough for 288 bytes, and who ends the daemon
 * doesn't notice.  Nothing tells when it has been sent, so there are steps.
 */
#define GOODBYE_TIME (300 * MS)
#define GOODBYE_STEP (20 * MS)

/* A serial line in use. */
typedef struct Tty {
    struct Tty *next;
    int fd;             /* our own, a copy of what the engine has */
    dev_t device;
    struct termios was; /* to be put back */
    unsigned was_baud;
    struct termios set; /* what the driver made of our settings */
    unsigned set_baud;
} Tty;

static Tty *ttys_leaving; /* closed once they have sent the goodbye */
static VPTimer ttys_timer;
static uint64_t ttys_until; /* when they are closed even so, us */

/* tty_unsent() - may there be bytes that were written and not sent? */
static bool tty_unsent(int fd)
{
#ifdef TIOCOUTQ
    int n = 0;

    return ioctl(fd, TIOCOUTQ, &n) == 0 && n > 0;
#else
    (void)fd;
    return true;
#endif
}

/* tty_exclude() - keep others out, or let them in again; root is never kept */
static void tty_exclude(int fd, bool others)
{
#if defined(TIOCEXCL) && defined(TIOCNXCL)
    ioctl(fd, others ? TIOCEXCL : TIOCNXCL);
#else
    (void)fd;
    (void)others;
#endif
}

/* tty_baud() - the rate that the line @fd has; 0: it is not known here */
static unsigned tty_baud(int fd)
{
    struct termios now;
    unsigned baud = tcgetattr(fd, &now) == 0
                    ? speed_baud(cfgetospeed(&now)) : 0;

#ifdef LINUX_RATES
    LinuxTermios any;

    if (baud == 0 && ioctl(fd, LINUX_TCGETS2, &any) == 0 &&
        (any.cflag & LINUX_CBAUD) == LINUX_BOTHER) {
        baud = any.ospeed;
    }
#endif
    return baud;
}

/* tty_set() - as tcsetattr(), with @baud if that is a rate without a name */
static int tty_set(int fd, const struct termios *set, unsigned baud)
{
    if (tcsetattr(fd, TCSANOW, set) < 0) {
        return -1;
    }
#ifdef LINUX_RATES
    if (baud != 0 && baud_speed(baud) == B0) {
        LinuxTermios any;

        if (ioctl(fd, LINUX_TCGETS2, &any) < 0) {
            return -1;
        }
        any.cflag = (any.cflag & ~LINUX_CBAUD) | LINUX_BOTHER;
        any.ispeed = any.ospeed = baud;
        return ioctl(fd, LINUX_TCSETS2, &any);
    }
#else
    (void)baud;
#endif
    return 0;
}

/* tty_close() - put the line back as it was, free @tty, which may be NULL */
static void tty_close(Tty *tty)
{
    if (tty == NULL) {
        return;
    }
    tcflush(tty->fd, TCIFLUSH);
    if (tty_unsent(tty->fd)) {
        tcflush(tty->fd, TCOFLUSH); /* else close() waits 30 s for it */
    }
    tty_set(tty->fd, &tty->was, tty->was_baud);
    tty_exclude(tty->fd, false);
    close(tty->fd);
    free(tty);
}

static bool ttys_unsent(void)
{
    const Tty *tty = ttys_leaving;

    while (tty != NULL && !tty_unsent(tty->fd)) {
        tty = tty->next;
    }
    return tty != NULL;
}

/* ttys_close() - close those that leave: all, or only @device if it isn't 0 */
static void ttys_close(dev_t device)
{
    Tty **at = &ttys_leaving;

    while (*at != NULL) {
        Tty *tty = *at;

        if (device != 0 && tty->device != device) {
            at = &tty->next;
        } else {
            *at = tty->next;
            tty_close(tty);
        }
    }
}

static void ttys_step(void *opaque)
{
    (void)opaque;
    if (ttys_unsent() && vp_loop_now(loop) < ttys_until) {
        vp_timer_start(loop, &ttys_timer, GOODBYE_STEP, ttys_step, NULL);
    } else {
        ttys_close(0);
    }
}

/* tty_leave() - tty_close(), once what the engine wrote last has gone out */
static void tty_leave(Tty *tty)
{
    if (tty != NULL) {
        tty->next = ttys_leaving;
        ttys_leaving = tty;
        ttys_until = vp_loop_now(loop) + GOODBYE_TIME;
        vp_timer_start(loop, &ttys_timer, GOODBYE_STEP, ttys_step, NULL);
    }
}

/*
 * tty_is_pty() - is @fd one end of a pair, whose other end stays with somebody?
 *
 * A line is exclusive until all have closed it.  If we are killed that is at
 * once, but behind a pty QEMU keeps the pair, and only CAP_SYS_ADMIN would let
 * us in again.  What has no name is taken for a pty.
 */
static bool tty_is_pty(int fd)
{
    static const char dir[] = "/dev/pts/";
    char name[64];

    return ttyname_r(fd, name, sizeof(name)) != 0 ||
           strncmp(name, dir, strlen(dir)) == 0;
}

/* tty_lock() - false if another has it; some systems lock no devices */
static bool tty_lock(int fd)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

    return fcntl(fd, F_SETLK, &lock) == 0 ||
           fcntl(fd, F_GETLK, &lock) < 0 || lock.l_type == F_UNLCK;
}

/*
 * tty_take() - make @fd a line for bytes, at @baud; 0: it has no rate
 * @taken:  becomes what tty_close() or tty_leave() needs
 *
 * Returns 0, or the errno value of why it is no line we can use.
 */
static int tty_take(int fd, unsigned baud, Tty **taken)
{
    Tty *tty = calloc(1, sizeof(*tty));
    speed_t speed = baud_speed(baud);
    struct termios raw;
    struct stat st;
    int err = 0;

    if (tty == NULL) {
        return ENOMEM;
    }
    tty->fd = dup(fd);
    if (fstat(fd, &st) == 0) {
        ttys_close(st.st_rdev); /* else its end would take our lock away */
        tty->device = st.st_rdev;
    }
    if (tty->fd < 0 || tcgetattr(fd, &tty->was) < 0) {
        err = errno;
    } else if (!tty_lock(fd)) {
        err = EBUSY;
    }
    if (err != 0) {
        if (tty->fd >= 0) {
            close(tty->fd);
        }
        free(tty);
        return err;
    }
    /* the lock keeps other qemu-vps out, and this the rest but for root */
    if (!tty_is_pty(fd)) {
        tty_exclude(fd, true);
    }
    tty->was_baud = tty_baud(fd);
    raw = tty->was;
    raw.c_iflag = IGNBRK; /* and no XON, which would be among our bytes */
    raw.c_oflag = 0;
    raw.c_lflag = 0;
    raw.c_cflag &= ~(tcflag_t)(CSIZE | PARENB | CSTOPB);
#ifdef CRTSCTS
    raw.c_cflag &= ~(tcflag_t)CRTSCTS;
#endif
    raw.c_cflag |= CS8 | CLOCAL | CREAD;
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    if (speed != B0) {
        cfsetispeed(&raw, speed);
        cfsetospeed(&raw, speed);
    }
    if (tty_set(fd, &raw, baud) < 0 || tcgetattr(fd, &tty->set) < 0) {
        err = errno;
        tty_close(tty);
        return err;
    }
    tty->set_baud = tty_baud(fd);
    tcflush(fd, TCIOFLUSH);
    *taken = tty;
    return 0;
}

/* tty_restore() - set it again as we did; false if nobody has changed it */
static bool tty_restore(const Tty *tty)
{
    const struct termios *set = &tty->set;
    struct termios now;

    return tcgetattr(tty->fd, &now) == 0 &&
           (now.c_iflag != set->c_iflag || now.c_oflag != set->c_oflag ||
            now.c_lflag != set->c_lflag || now.c_cflag != set->c_cflag ||
            now.c_cc[VMIN] != set->c_cc[VMIN] ||
            now.c_cc[VTIME] != set->c_cc[VTIME] ||
            tty_baud(tty->fd) != tty->set_baud ||
            cfgetispeed(&now) != cfgetispeed(set)) &&
           tty_set(tty->fd, set, tty->set_baud) == 0;
}

/* ---- opening ---------------------------------------------------------- */

typedef struct Channel {
    struct Channel *next;
    Spec spec;
    VPDriver *drv;
    void (*opener)(struct Channel *ch); /* NULL: opened once, or listening */
    Retry retry;        /* to open it */
    bool ended;         /* an inherited descriptor that was closed */
    Lookup lookup;      /* of the host to connect to */
    bool looking_up;    /* no address is known, so it waits for that */
    bool connecting;    /* it waits for the dialler */
    bool refused;       /* the dialler has found no address that would do */
    VPDialer dialer;
    VPDialer beside;    /* for a connection beside one that is stale */
    VPTarget target;    /* what it connects to */
    VPOnce rate_said;   /* the driver's rate, if it isn't the one asked for */
    VPTimer line_timer; /* runs while "tty" is in use, to look at it */
    VPOnce line_said;   /* that somebody has changed it */
    dev_t device;       /* open now; 0: none */
    int fifo;           /* PATH.in, while PATH.out can't be opened; or -1 */
    Tty *tty;           /* NULL: it is no serial line, or not open */
    Listening listening;
    bool keyless;       /* whoever comes is the other end */
    char name[32];      /* what the listeners are called in the log */
    VPListener listeners[MAX_ADDRS];
    int nlisteners;
} Channel;

static Channel *channels;
static SpecIndex running; /* of all channels and forwards */
static bool quitting;   /* the daemon was told to end, and flushes */
static bool stopped;    /* the daemon ends now */
static int exit_status; /* of the daemon */

static void stop(void)
{
    stopped = true;
    vp_loop_stop(loop);
}

static Channel *channel_find(unsigned id)
{
    Channel *ch = channels;

    while (ch != NULL && ch->spec.channel_id != id) {
        ch = ch->next;
    }
    return ch;
}

static void channel_try(void *opaque)
{
    Channel *ch = opaque;

    ch->opener(ch);
}

/* channel_wait() - try later; longer each time, until a session came up */
static void channel_wait(Channel *ch)
{
    retry_later(&ch->retry, channel_try, ch);
}

/*
 * channel_retry() - it can't be opened now; log that once, try later
 * @err:  an errno value, or what addr_lookup() returned
 */
static void channel_retry(Channel *ch, const char *what, int err)
{
    const char *why = err < 0 ? lookup_error(err) : strerror(err);
    char text[128];

    snprintf(text, sizeof(text), "%.90s: %s", what, why);
    vp_note_error(ch->drv, text);
    if (retry_is_news(&ch->retry, err)) {
        log_at(VP_LOG_INFO, (int)ch->spec.channel_id, "channel %s: %s: %s: "
               "trying again", method_name[ch->spec.method], what, why);
    }
    channel_wait(ch);
}

/* device_in_use() - by a channel of ours, under whatever name? */
static bool device_in_use(const struct stat *st)
{
    const Channel *ch = channels;

    while (ch != NULL && ch->device != st->st_rdev) {
        ch = ch->next;
    }
    return S_ISCHR(st->st_mode) && ch != NULL;
}

/*
 * device_open() - open the device at @path for @ch, or -1: see errno
 *
 * One that another channel of ours has is not even opened, because closing it
 * again would take that channel's lock away.
 */
static int device_open(Channel *ch, const char *path)
{
    struct stat st;
    int fd;

    if (stat(path, &st) == 0 && device_in_use(&st)) {
        errno = EBUSY;
        return -1;
    }
    fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK);
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISCHR(st.st_mode)) {
        ch->device = st.st_rdev;
    } else if (fd >= 0) {
        close(fd);
        errno = ENOTTY;
        fd = -1;
    }
    return fd;
}

/* device_close() - what device_open() gave can't be used after all */
static void device_close(Channel *ch, int fd)
{
    if (fd >= 0) {
        close(fd);
        ch->device = 0;
    }
}

/* Nothing tells when a getty or stty changes a line, so we look so often. */
#define LINE_LOOK (2 * SECOND)
/* One that changes it for ever is worth a line so often. */
#define LINE_NEWS (3600 * SECOND)
/* A rate is another one if it is off by more than this part of it. */
#define LINE_NEAR 50

static void line_look(void *opaque)
{
    Channel *ch = opaque;

    if (tty_restore(ch->tty) &&
        vp_once(&ch->line_said, 0, vp_loop_now(loop), LINE_NEWS)) {
        log_at(VP_LOG_WARN, (int)ch->spec.channel_id, "channel %s: %s: "
               "somebody has changed the line's settings: set again",
               method_name[ch->spec.method], ch->spec.addr);
    }
    vp_timer_start(loop, &ch->line_timer, LINE_LOOK, line_look, ch);
}

/* channel_unline() - what "tty" was is no channel any more; returns it */
static Tty *channel_unline(Channel *ch)
{
    Tty *tty = ch->tty;

    vp_timer_stop(&ch->line_timer);
    ch->device = 0;
    ch->tty = NULL;
    return tty;
}

/*
 * channel_attach() - give the engine what was opened; @rfd may be @wfd
 *
 * Returns 0, or a negative errno value; both are the engine's in any case.
 */
static int channel_attach(Channel *ch, int rfd, int wfd, VPChannelKind kind)
{
    bool dialled = ch->spec.method == UNIX_CONNECT ||
                   ch->spec.method == TCP_CONNECT ||
                   ch->spec.method == VSOCK_CONNECT;
    int rc = vp_attach(ch->drv, rfd, wfd, kind,
                       dialled ? VP_CONNECTED : VP_OPENED);

    if (rc == 0) {
        log_at(VP_LOG_DEBUG, (int)ch->spec.channel_id, "channel %s: open",
               method_name[ch->spec.method]);
        ch->retry.said = (VPOnce){ .said = false };
        if (ch->tty != NULL) {
            vp_timer_start(loop, &ch->line_timer, LINE_LOOK, line_look, ch);
        }
    }
    return rc;
}

/* channel_opened() - channel_attach(), and try later if that fails */
static void channel_opened(Channel *ch, int rfd, int wfd, VPChannelKind kind)
{
    int rc = channel_attach(ch, rfd, wfd, kind);

    if (rc < 0) {
        tty_close(channel_unline(ch));
        channel_retry(ch, "attaching", -rc);
    }
}

/* line_rate() - say so if the driver of the line @fd runs it at another rate */
static void line_rate(Channel *ch, int fd)
{
    unsigned asked = port_baud(ch->spec.port), baud = tty_baud(fd);
    unsigned off = baud > asked ? baud - asked : asked - baud;
    char rate[32] = "a rate that is not known here";

    if (baud != 0) {
        snprintf(rate, sizeof(rate), "%u baud", baud);
    }
    /* both ends stand a rate that the hardware only comes near to */
    if (off > asked / LINE_NEAR &&
        vp_once(&ch->rate_said, baud, vp_loop_now(loop), 0)) {
        log_at(VP_LOG_WARN, (int)ch->spec.channel_id, "channel %s: %s: the "
               "driver doesn't take %u baud, it runs at %s",
               method_name[ch->spec.method], ch->spec.addr, asked, rate);
    }
}

static void open_serial(Channel *ch)
{
    const char *path = ch->spec.addr;
    int fd = device_open(ch, path);
    int err = fd < 0 ? errno
                     : tty_take(fd, port_baud(ch->spec.port), &ch->tty);

    if (err == 0) {
        line_rate(ch, fd);
        channel_opened(ch, fd, fd, VP_CHN_TTY);
    } else {
        device_close(ch, fd);
        channel_retry(ch, path, err);
    }
}

/*
 * open_fifos() - PATH.in and PATH.out in place of a virtio-serial port
 *
 * The one to read is opened first and stays open, because the other can only
 * be opened once the other side reads.
 */
static void open_fifos(Channel *ch, const char *port)
{
    char path[VALUE_MAX + 5];
    int wfd;

    if (ch->fifo < 0) {
        snprintf(path, sizeof(path), "%s.in", port);
        ch->fifo = open(path, O_RDONLY | O_NONBLOCK);
        if (ch->fifo < 0) {
            channel_retry(ch, port, errno);
            return;
        }
    }
    snprintf(path, sizeof(path), "%s.out", port);
    wfd = open(path, O_WRONLY | O_NONBLOCK);
    if (wfd < 0) {
        channel_retry(ch, path, errno);
        return;
    }
    channel_opened(ch, ch->fifo, wfd, VP_CHN_VIRTSERIAL);
    ch->fifo = -1;
}

/* Where the kernel lists virtio-serial ports. */
#define PORTS "/sys/class/virtio-ports"

/*
 * port_find() - the device of the virtio-serial port that QEMU names @name
 *
 * Only udev makes /dev/virtio-ports; the kernel tells the names without it.
 * Returns 0 or an errno value.
 */
static int port_find(const char *name, char *path, size_t size)
{
    DIR *ports = opendir(PORTS);
    const struct dirent *entry;
    char file[sizeof(PORTS "//name") + NAME_MAX], line[VALUE_MAX + 2];
    bool found = false;

    while (ports != NULL && !found && (entry = readdir(ports)) != NULL) {
        FILE *f;

        snprintf(file, sizeof(file), PORTS "/%s/name", entry->d_name);
        f = fopen(file, "r");
        if (f == NULL) {
            continue;
        }
        if (fgets(line, sizeof(line), f) != NULL) {
            line[strcspn(line, "\n")] = '\0';
            found = strcmp(line, name) == 0;
            snprintf(path, size, "/dev/%s", entry->d_name);
        }
        fclose(f);
    }
    if (ports != NULL) {
        closedir(ports);
    }
    return found ? 0 : ENODEV;
}

/*
 * open_port() - a virtio-serial port, by its path or its name
 *
 * Some are ttys: a virtio console's, and on FreeBSD all of them.
 */
static void open_port(Channel *ch)
{
    const char *path = ch->spec.addr;
    VPChannelKind kind = VP_CHN_VIRTSERIAL;
    char found[sizeof("/dev/") + NAME_MAX];
    int fd, err;

    if (strchr(path, '/') == NULL) {
        err = port_find(path, found, sizeof(found));
        if (err != 0) {
            channel_retry(ch, path, err);
            return;
        }
        path = found;
    }
    fd = device_open(ch, path);
    err = fd < 0 ? errno : 0;
    if (err == 0 && isatty(fd)) {
        kind = VP_CHN_TTY;
        err = tty_take(fd, 0, &ch->tty);
    }
    if (err == 0) {
        channel_opened(ch, fd, fd, kind);
    } else if (fd < 0 && err == ENOENT) {
        open_fifos(ch, path);
    } else {
        device_close(ch, fd);
        channel_retry(ch, path, err);
    }
}

/* ---- connecting ------------------------------------------------------- */

/* connect_failed() - one address of several; channel_retry() logs the last */
static void connect_failed(void *opaque, const VPAddr *addr, int err)
{
    const Channel *ch = opaque;

    log_at(VP_LOG_DEBUG, (int)ch->spec.channel_id, "channel %s: %s: %s",
           method_name[ch->spec.method],
           addr != NULL ? addr_name(addr) : "no socket", strerror(err));
}

static void connect_done(void *opaque, int fd, int err)
{
    Channel *ch = opaque;
    char where[ADDR_NAME_SIZE];

    ch->connecting = false;
    ch->refused = fd < 0;
    if (fd < 0) {
        channel_retry(ch, spec_where(&ch->spec, where, sizeof(where)), err);
    } else {
        channel_opened(ch, fd, fd, VP_CHN_SOCKET);
    }
}

/* connect_start() - connect to the first of the known addresses that accepts */
static void connect_start(Channel *ch)
{
    const Spec *spec = &ch->spec;

    if (vp_target_set(&ch->target, loop, spec->addrs,
                      (size_t)spec->naddrs) < 0) {
        channel_retry(ch, spec->addr, ENOMEM);
        return;
    }
    ch->dialer.failed = connect_failed;
    ch->dialer.done = connect_done;
    ch->dialer.opaque = ch;
    ch->connecting = true;
    vp_dialer_start(&ch->dialer, loop, &ch->target);
}

/* connect_looked_up() - Lookup.done() */
static void connect_looked_up(void *opaque, int rc)
{
    Channel *ch = opaque;
    bool waited = ch->looking_up;

    ch->looking_up = false;
    if (rc != 0 && waited) {
        channel_retry(ch, ch->spec.addr, rc);
    } else if (rc == 0 && (waited || (ch->connecting && ch->lookup.changed))) {
        vp_dialer_stop(&ch->dialer); /* it tries what is out of date */
        connect_start(ch);
    }
}

/* beside_done() - a further connection beside one that is stale */
static void beside_done(void *opaque, int fd, int err)
{
    Channel *ch = opaque;

    (void)err; /* because the present one is still there */
    if (fd >= 0) {
        vp_offer(ch->drv, fd, VP_CONNECTED);
    }
}

/*
 * channel_stale() - VPStaleHandler: connect anew beside what may be dead
 *
 * A router or firewall that has forgotten a connection drops what it carries in
 * silence, for a quarter of an hour, while a new one gets through.
 */
static void channel_stale(void *opaque)
{
    Channel *ch = opaque;

    vp_dialer_stop(&ch->beside); /* the last try has had its time */
    ch->beside = (VPDialer){
        .failed = connect_failed, .done = beside_done, .opaque = ch,
    };
    vp_dialer_start(&ch->beside, loop, &ch->target);
}

static void open_socket(Channel *ch)
{
    Spec *spec = &ch->spec;
    Lookup *l = &ch->lookup;

    l->spec = spec;
    l->done = connect_looked_up;
    l->opaque = ch;
    ch->looking_up = !spec_known(spec);
    if (ch->looking_up) {
        lookup_start(l);
        return;
    }
    if (spec_is_name(spec)) {
        lookup_again(l, ch->refused);
    }
    connect_start(ch);
}

/* ---- listening -------------------------------------------------------- */

static void channel_accepted(void *opaque, int fd, const VPAddr *peer)
{
    Channel *ch = opaque;

    (void)peer;
    vp_offer(ch->drv, fd, VP_ACCEPTED);
}

/* channel_warn_open() - without a key: can others than this machine come? */
static void channel_warn_open(const Channel *ch, int fd)
{
    VPAddr addr;

    addr_bound(fd, &addr);
    if (ch->keyless && addr.len > 0 &&
        (!vp_addr_is_local(&addr) || addr_name(&addr)[0] == '@')) {
        log_at(VP_LOG_WARN, (int)ch->spec.channel_id, "whoever reaches %s is "
               "the other end: -k keeps others out", addr_name(&addr));
    }
}

/* channel_set_key() - has it a key, from now on? */
static void channel_set_key(Channel *ch, const VPConfig *config)
{
    bool keyless = config->key.len == 0, news = keyless && !ch->keyless;

    ch->keyless = keyless;
    for (int i = 0; news && i < ch->nlisteners; i++) {
        channel_warn_open(ch, ch->listeners[i].fd);
    }
}

/* channel_listen() - Listening.take() */
static int channel_listen(void *opaque, int fd)
{
    Channel *ch = opaque;
    VPListener *l = ch->listeners;
    int rc;

    while (l < ch->listeners + ch->nlisteners && l->fd >= 0) {
        l++; /* one whose socket was dropped is used again */
    }
    snprintf(ch->name, sizeof(ch->name), "channel %s",
             method_name[ch->spec.method]);
    l->channel = (int)ch->spec.channel_id;
    l->name = ch->name;
    l->rest = VP_OFFER_REST;
    l->accepted = channel_accepted;
    l->opaque = ch;
    rc = vp_listener_start(l, loop, fd);
    if (rc == 0) {
        ch->nlisteners += l == ch->listeners + ch->nlisteners;
        channel_warn_open(ch, fd);
    }
    return rc;
}

/* channel_unlisten() - Listening.drop() */
static void channel_unlisten(void *opaque, int fd)
{
    Channel *ch = opaque;

    for (int i = 0; i < ch->nlisteners; i++) {
        if (ch->listeners[i].fd == fd) {
            vp_listener_stop(&ch->listeners[i]);
        }
    }
}

/* ---- inherited descriptors that are channels -------------------------- */

/* device_is_null() - is it /dev/null, which init gives its daemons as stdin? */
static bool device_is_null(const struct stat *st)
{
    struct stat null;

    return S_ISCHR(st->st_mode) && stat("/dev/null", &null) == 0 &&
           st->st_rdev == null.st_rdev;
}

/*
 * inherited_kind() - make @fd ready, whatever it is
 *
 * Returns NULL, or why it can be no channel.
 */
static const char *inherited_kind(Channel *ch, int fd, VPChannelKind *kind)
{
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        return strerror(errno);
    }
    if (S_ISCHR(st.st_mode) &&
        (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR) {
        return "it is not open for reading and writing";
    }
    if (device_in_use(&st)) {
        return strerror(EBUSY);
    }
    if (device_is_null(&st)) {
        return "it is /dev/null";
    }
    if (S_ISSOCK(st.st_mode)) {
        *kind = VP_CHN_SOCKET;
    } else if (isatty(fd)) {
        int err = tty_take(fd, port_baud(NULL), &ch->tty);

        *kind = VP_CHN_TTY;
        if (err != 0) {
            return strerror(err);
        }
        ch->device = st.st_rdev;
        line_rate(ch, fd);
    } else if (S_ISCHR(st.st_mode)) {
        ch->device = st.st_rdev;
        *kind = VP_CHN_VIRTSERIAL;
    } else {
        return "neither a socket nor a serial line nor a virtio-serial port";
    }
    return NULL;
}

/* channel_inherit() - use a descriptor that somebody has opened for us */
static bool channel_inherit(Channel *ch, Error *err)
{
    int given = inherited_next(&ch->spec, -1), fd, rc;
    VPChannelKind kind = VP_CHN_SOCKET;
    const char *wrong;

    if (given < 0) {
        return inherited_unnamed(&ch->spec, err);
    }
    wrong = inherited_wrong(given);
    if (wrong == NULL) {
        fd = standard_move(inherited[given].fd);
        wrong = inherited_kind(ch, fd, &kind);
        if (wrong == NULL) {
            inherited[given].fd = -1;
            rc = channel_attach(ch, fd, fd, kind);
            wrong = rc < 0 ? strerror(-rc) : NULL;
        } else if (fd >= 0) {
            inherited[given].fd = fd; /* to try again */
        }
    }
    return wrong == NULL || inherited_error(&ch->spec, given, wrong, err);
}

/* inherited_lost() - it can't be opened again; end if no channel is left */
static void inherited_lost(Channel *lost, const char *reason)
{
    lost->ended = true;
    if (!quitting) { /* else the other end was told to end as well */
        log_at(VP_LOG_ERROR, (int)lost->spec.channel_id,
               "the inherited descriptor is closed for good: %s", reason);
    }
    for (const Channel *ch = channels; ch != NULL; ch = ch->next) {
        if (!ch->ended) {
            return;
        }
    }
    if (!quitting) { /* else what came before is still to be flushed */
        exit_status = 1;
        stop();
    }
}

/* ---- adding and removing ---------------------------------------------- */

/* channel_lost() - VPLostHandler: the engine has closed the descriptor */
static void channel_lost(void *opaque, const char *reason, bool was_up)
{
    Channel *ch = opaque;

    tty_close(channel_unline(ch));
    vp_dialer_stop(&ch->beside);
    if (ch->opener != NULL) {
        ch->retry.wait = was_up ? 0 : ch->retry.wait;
        channel_wait(ch);
    } else if (ch->nlisteners == 0 && ch->spec.method == INHERITED_FD) {
        inherited_lost(ch, reason);
    }
}

static void channel_free(Channel *ch)
{
    vp_free(ch->drv);
    tty_leave(channel_unline(ch));
    vp_timer_stop(&ch->retry.timer);
    vp_dialer_stop(&ch->dialer);
    vp_dialer_stop(&ch->beside);
    vp_target_clear(&ch->target);
    for (int i = 0; i < ch->nlisteners; i++) {
        vp_listener_stop(&ch->listeners[i]);
    }
    if (ch->listening.spec != NULL) {
        listening_stop(&ch->listening);
    }
    if (ch->fifo >= 0) {
        close(ch->fifo);
    }
    lookup_cancel(&ch->lookup);
    spec_free(&ch->spec);
    free(ch);
}

/*
 * channel_add() - start a channel; @spec is taken over on success
 * @patient:  be content if what it listens on isn't there yet
 */
static bool channel_add(Spec *spec, const VPConfig *config, bool patient,
                        Error *err)
{
    static void (*const openers[])(Channel *ch) = {
        [UNIX_CONNECT] = open_socket,
        [UNIX_LISTEN] = NULL,
        [TCP_CONNECT] = open_socket,
        [TCP_LISTEN] = NULL,
        [VSOCK_CONNECT] = open_socket,
        [VSOCK_LISTEN] = NULL,
        [VIRTSERIAL_OPEN] = open_port,
        [ISASERIAL_OPEN] = open_serial,
        [INHERITED_FD] = NULL,
    };
    Channel *ch = calloc(1, sizeof(*ch)), **at = &channels;
    bool ok = true;

    if (ch == NULL) {
        return error_memory(err);
    }
    ch->spec = *spec;
    ch->opener = openers[spec->method];
    ch->fifo = -1;
    ch->drv = vp_new(loop, (int)spec->channel_id, config, channel_lost, ch);
    if (ch->drv == NULL) {
        free(ch);
        return error_memory(err);
    }
    channel_set_key(ch, config);
    if (spec->method == TCP_CONNECT) {
        vp_set_stale(ch->drv, channel_stale);
    }
    if (spec->method == INHERITED_FD && !inherited_listens(spec)) {
        ok = channel_inherit(ch, err);
    } else if (ch->opener == NULL) {
        ch->listening.spec = &ch->spec;
        ch->listening.take = channel_listen;
        ch->listening.drop = channel_unlisten;
        ch->listening.opaque = ch;
        ok = listening_start(&ch->listening, patient, err);
    }
    if (!ok) {
        *spec = (Spec){ .option = 'c' };
        channel_free(ch);
        return false;
    }
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = ch;
    ch->spec.owner = ch;
    index_add(&running, &ch->spec);
    *spec = (Spec){ .text = NULL };
    if (ch->opener != NULL) {
        ch->opener(ch);
    }
    return true;
}

/* ======================================================================
 * forwards
 *
 * A Forward is a -o or -i that runs.  The engine accepts and connects; it is
 * told here where to, and again whenever a name's addresses have changed.
 * ====================================================================== */

typedef struct Forward {
    struct Forward *next;
    struct Forward **link; /* what points at us */
    uint64_t number;     /* it is the forward of this number since the start */
    Spec spec;
    Channel *channel;    /* that it belongs to; outlives it */
    VPAccount *account;  /* of its connections */
    Listening listening; /* of an oforward; the sockets are the engine's */
    Lookup lookup;       /* of an iforward's name */
    Retry retry;         /* while no address of it is known */
} Forward;

static Forward *forwards;
static Forward **last_forward = &forwards; /* where the next one goes */
static uint64_t forwards_so_far;

/* forward_listen() - Listening.take() */
static int forward_listen(void *opaque, int fd)
{
    Forward *f = opaque;
    int rc;

    rc = vp_set_oforward(f->channel->drv, fd, f->spec.service_id);
    if (rc == 0) {
        vp_oforward_account(f->channel->drv, fd, f->account);
    }
    return rc;
}

/* forward_drop() - Listening.drop() */
static void forward_drop(void *opaque, int fd)
{
    Forward *f = opaque;

    vp_del_oforward(f->channel->drv, fd);
}

static void forward_unlisten(Forward *f)
{
    for (int i = 0; i < MAX_ADDRS; i++) {
        if (f->listening.fds[i] >= 0) {
            forward_drop(f, f->listening.fds[i]);
        }
    }
    listening_stop(&f->listening);
}

/* forward_connect() - have the engine connect to what addresses are known */
static bool forward_connect(Forward *f, Error *err)
{
    const Spec *spec = &f->spec;
    int rc = vp_set_iforward(f->channel->drv, spec->service_id, spec->addrs,
                             (size_t)spec->naddrs);

    return rc == 0 || error_set(err, "-i '%.128s': %s", spec->text,
                                strerror(-rc));
}

static void forward_look_up(void *opaque)
{
    Forward *f = opaque;

    lookup_start(&f->lookup);
}

/* forward_looked_up() - Lookup.done() */
static void forward_looked_up(void *opaque, int rc)
{
    Forward *f = opaque;
    Spec *spec = &f->spec;
    bool said = f->retry.said.said;
    Error err;

    if (rc != 0) {
        name_failed(&f->retry, spec, rc, spec->naddrs > 0);
        if (spec->naddrs == 0) {
            retry_later(&f->retry, forward_look_up, f);
        }
    } else {
        retry_over(&f->retry);
        log_at(said ? VP_LOG_INFO : VP_LOG_DEBUG, (int)spec->channel_id,
               "iforward %s: %.128s is %s", spec->service_id, spec->addr,
               addr_name(&spec->addrs[0]));
    }
    if (!forward_connect(f, &err)) {
        log_at(VP_LOG_ERROR, (int)spec->channel_id, "%s", err.text);
    }
}

/* forward_used() - VPUsedHandler, of a name's */
static void forward_used(void *opaque, bool failed)
{
    Forward *f = opaque;

    if (f->spec.naddrs > 0) {
        lookup_again(&f->lookup, failed);
    }
}

/* forward_start() - listen, or connect; names are looked up the while */
static bool forward_start(Forward *f, bool patient, Error *err)
{
    bool known;

    if (f->spec.option == 'o') {
        f->listening.spec = &f->spec;
        f->listening.take = forward_listen;
        f->listening.drop = forward_drop;
        f->listening.opaque = f;
        if (!listening_start(&f->listening, patient, err)) {
            forward_unlisten(f);
            return false;
        }
        return true;
    }
    known = spec_known(&f->spec);
    if (!known && !spec_is_name(&f->spec)) {
        return error_memory(err); /* because nothing need be looked up */
    }
    if (!forward_connect(f, err)) {
        return false;
    }
    vp_iforward_account(f->channel->drv, f->spec.service_id, f->account);
    if (f->spec.props.proxy) {
        vp_iforward_proxy(f->channel->drv, f->spec.service_id);
    }
    if (spec_is_name(&f->spec)) {
        f->lookup.spec = &f->spec;
        f->lookup.done = forward_looked_up;
        f->lookup.opaque = f;
        vp_iforward_used(f->channel->drv, f->spec.service_id, forward_used, f);
    }
    if (!known) {
        lookup_start(&f->lookup);
    }
    return true;
}

/*
 * forward_add() - start a forward; @spec is taken over on success
 * @patient:  be content if what it listens on isn't there yet
 */
static bool forward_add(Spec *spec, bool patient, Error *err)
{
    Channel *ch = channel_find(spec->channel_id);
    Forward *f;
    char where[ADDR_NAME_SIZE];

    if (ch == NULL) {
        return spec_error(spec, err, "there is no such channel");
    }
    f = calloc(1, sizeof(*f));
    if (f == NULL) {
        return error_memory(err);
    }
    f->spec = *spec;
    *spec = (Spec){ .option = spec->option };
    f->channel = ch;
    f->account = vp_account_new(ch->drv, &f->spec.props.limits);
    if (f->account == NULL || !forward_start(f, patient, err)) {
        if (f->account != NULL) {
            vp_account_free(f->account);
        } else {
            error_memory(err);
        }
        spec_free(&f->spec);
        free(f);
        return false;
    }
    if (f->spec.option == 'i') {
        log_at(VP_LOG_INFO, (int)f->spec.channel_id, "iforward %s: to %s",
               f->spec.service_id, spec_where(&f->spec, where, sizeof(where)));
    }
    f->spec.owner = f;
    index_add(&running, &f->spec);
    f->number = ++forwards_so_far;
    f->link = last_forward;
    *f->link = f;
    last_forward = &f->next;
    return true;
}

/* forward_del() - its connections go on */
static void forward_del(Forward *f)
{
    if (f->spec.option == 'i') {
        lookup_cancel(&f->lookup);
        vp_timer_stop(&f->retry.timer);
        vp_del_iforward(f->channel->drv, f->spec.service_id);
    } else {
        forward_unlisten(f);
    }
    *f->link = f->next;
    if (f->next != NULL) {
        f->next->link = f->link;
    } else {
        last_forward = f->link;
    }
    vp_account_free(f->account);
    index_del(&running, &f->spec);
    spec_free(&f->spec);
    free(f);
}

/* channel_del() - with its forwards; its connections are reset */
static void channel_del(Channel *ch)
{
    Channel **at = &channels;

    for (Forward *f = forwards, *next; f != NULL; f = next) {
        next = f->next;
        if (f->channel == ch) {
            forward_del(f);
        }
    }
    while (*at != ch) {
        at = &(*at)->next;
    }
    *at = ch->next;
    index_del(&running, &ch->spec);
    channel_free(ch);
}

/* ======================================================================
 * running
 *
 * What runs is the channels and forwards in their lists.  Command line and
 * init file ask for some of them, and the monitor can add and remove any.  A
 * reload compares what is asked for now with what was asked for before, so what
 * the monitor added stays, but for forwards of a channel that goes.
 * ====================================================================== */

/* The command line, to be read again by a reload. */
static char **saved_argv;
static int saved_argc;

static bool running_has(const Spec *spec)
{
    return index_same(&running, spec) != NULL;
}

/* spec_port() - the number of the port that @spec listens on; -1: of none */
static int spec_port(const Spec *spec)
{
    const struct servent *service;
    unsigned long number;

    if (spec->port == NULL || spec->option == 'i' ||
        (spec->option == 'c' && spec->method != TCP_LISTEN)) {
        return -1;
    }
    if (parse_number(spec->port, 0, 65535, &number)) {
        return (int)number;
    }
    service = getservbyname(spec->port, "tcp");
    return service != NULL ? ntohs((in_port_t)service->s_port) : -1;
}

/* spec_clashes_v4() - may @spec listen on IPv4's @port? */
static bool spec_clashes_v4(const Spec *spec, int port)
{
    return strchr(spec->addr, ':') == NULL && spec_port(spec) == port;
}

/*
 * spec_both() - is @spec a [::] that serves IPv4 as well?
 * @asked:  what will be there beside it, and what runs
 *
 * It does if nothing else has its port there.
 */
static bool spec_both(const Spec *spec, const Settings *asked)
{
    int port = spec_port(spec);
    struct in6_addr in6;
    bool alone;

    if (port < 0 || inet_pton(AF_INET6, spec->addr, &in6) != 1 ||
        !IN6_IS_ADDR_UNSPECIFIED(&in6)) {
        return false;
    }
    if (port == 0) {
        return true; /* any that is free in both */
    }
    alone = !inherited_has_v4(port);
    for (size_t i = 0; i < asked->nspecs && alone; i++) {
        alone = !spec_clashes_v4(&asked->specs[i], port);
    }
    for (Channel *ch = channels; ch != NULL && alone; ch = ch->next) {
        alone = !spec_clashes_v4(&ch->spec, port);
    }
    for (Forward *f = forwards; f != NULL && alone; f = f->next) {
        alone = !spec_clashes_v4(&f->spec, port);
    }
    return alone;
}

/* Told of each change; the monitor sets it. */
static void (*change_told)(const Spec *spec, bool added);

/*
 * log_change() - log that @who, NULL for the start, has changed what runs
 * @how:  follows "added" or "removed"
 */
static void log_change(const char *who, const Spec *spec, bool added,
                       const char *how)
{
    if (who != NULL) {
        log_at(VP_LOG_INFO, VP_NO_CHANNEL, "%s: %s%s -%c %.400s", who,
               added ? "added" : "removed", how, spec->option, spec->text);
    }
    if (change_told != NULL) {
        change_told(spec, added);
    }
}

/*
 * running_add() - add what @spec asks for; @spec is taken over, also on failure
 * @asked:    what command line and init file ask for
 * @who:      for log_change()
 * @patient:  be content if what it listens on isn't there yet
 */
static bool running_add(Spec *spec, const Settings *asked, const char *who,
                        bool patient, Error *err)
{
    const char *clash = quitting ? "the daemon is ending"
                                 : index_clash(&running, spec);
    const Spec added = *spec; /* what it points at is still there then */
    bool ok;

    if (clash != NULL) {
        ok = spec_error(spec, err, "%s", clash);
    } else {
        spec->both = spec_both(spec, asked);
        ok = added.option == 'c'
             ? channel_add(spec, &asked->config, patient, err)
             : forward_add(spec, patient, err);
    }
    if (ok) {
        log_change(who, &added, true, "");
    }
    spec_free(spec);
    return ok;
}

/* running_del() - remove what is the same as @spec; @who for log_change() */
static bool running_del(const Spec *spec, const char *who, Error *err)
{
    const Spec *same = index_same(&running, spec);
    Channel *ch;

    if (same == NULL) {
        return spec_error(spec, err, "it is not there");
    }
    log_change(who, same, false, "");
    if (spec->option != 'c') {
        forward_del(same->owner);
        return true;
    }
    ch = same->owner;
    for (const Forward *f = forwards; f != NULL; f = f->next) {
        if (f->channel == ch) {
            log_change(who, &f->spec, false, " with its channel");
        }
    }
    channel_del(ch);
    return true;
}

/* apply_spec() - add what @spec of @now asks for; @who for log_change() */
static bool apply_spec(const Settings *now, Spec *spec, const char *who,
                       Error *err)
{
    Spec copy;

    if (!spec_parse(&copy, spec->option, spec->text, err)) {
        return false;
    }
    copy.addrs = spec->addrs;
    copy.naddrs = spec->naddrs;
    if (spec->props.gid >= 0) {
        copy.props.gid = spec->props.gid; /* it may not be known any more */
    }
    spec->addrs = NULL;
    spec->naddrs = 0;
    return running_add(&copy, now, who, true, err) ||
           line_error(now, spec->line, err);
}

/*
 * keep_addresses() - what @now asks for keeps its addresses, and its group
 *
 * They go with their channel, whose line has changed, and come with it again.
 */
static void keep_addresses(const Settings *now)
{
    for (size_t i = 0; i < now->nspecs; i++) {
        Spec *spec = &now->specs[i];
        const Spec *same = spec->option == 'c' ? NULL
                                               : index_same(&running, spec);

        if (same != NULL && same->naddrs > 0) {
            spec_keep(spec, same->addrs, same->naddrs);
        }
        if (same != NULL && same->props.gid >= 0) {
            spec->props.gid = same->props.gid;
        }
    }
}

/* A change of what runs, spec by spec, because there may be thousands. */
typedef struct Change {
    const Settings *before; /* what was asked for; NULL at start */
    Settings *now;          /* what is asked for */
    size_t round;           /* 0: remove; then add those of each kind */
    size_t at;              /* index of the round's next spec */
    bool failed;            /* something could not be added */
} Change;

/*
 * change_next() - remove what only c->before asks for, add what c->now does
 *
 * Returns false once all of it is done; at start also after the first error.
 * In a reload an error is logged, and the rest is done; @err has the last one.
 */
static bool change_next(Change *c, Error *err)
{
    static const char order[] = { 'c', 'o', 'i' };
    const Settings *from = c->round == 0 ? c->before : c->now;
    const char *who = c->before != NULL ? "reload" : NULL;
    Spec *spec;

    if (from == NULL || c->at == from->nspecs) {
        c->round++;
        c->at = 0;
        return c->round <= sizeof(order);
    }
    spec = &from->specs[c->at++];
    if (c->round == 0) {
        if (index_same(&c->now->index, spec) == NULL && running_has(spec)) {
            if (spec->option == 'c') {
                keep_addresses(c->now);
            }
            running_del(spec, who, err);
        }
        return true;
    }
    if (spec->option != order[c->round - 1] || running_has(spec) ||
        apply_spec(c->now, spec, who, err)) {
        return true;
    }
    c->failed = true;
    if (c->before != NULL) {
        log_at(VP_LOG_ERROR, VP_NO_CHANNEL, "reload: %s", err->text);
    }
    return c->before != NULL;
}

/* apply() - all of a change at once; false: see @err */
static bool apply(const Settings *before, Settings *now, Error *err)
{
    Change c = { .before = before, .now = now };

    while (change_next(&c, err)) {
        continue;
    }
    return !c.failed;
}

/* notify() - tell systemd our @state if it wants to know; see sd_notify(3) */
static void notify(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    VPAddr addr;
    int fd;

    if (path == NULL || strlen(path) > SOCKET_PATH_MAX) {
        return;
    }
    addr_unix(path, &addr);
    fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (fd >= 0) {
        /* non-blocking, because nobody may read it */
        if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ||
            sendto(fd, state, strlen(state), 0, (struct sockaddr *)&addr.ss,
                   addr.len) < 0) {
            log_at(VP_LOG_WARN, VP_NO_CHANNEL, "systemd at %s: %s", path,
                   strerror(errno));
        }
        close(fd);
    }
}

/* ---- end -------------------------------------------------------------- */

/* Time for what is queued to go out, once the daemon was told to end. */
#define FLUSH_TIME (2 * SECOND)
/* Time for the resets that follow to go out. */
#define RESET_TIME (500 * MS)
/* How often it is looked, because nothing tells when all has gone out. */
#define QUIT_STEP (10 * MS)

static VPTimer quit_timer;
static uint64_t quit_at;    /* when flushing, or then resetting, is over, us */
static bool quit_resetting; /* flushing is over */

/* quit_step() - flush, then reset what is left, then end the loop */
static void quit_step(void *opaque)
{
    bool busy = false;

    (void)opaque;
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        busy |= vp_busy(ch->drv);
    }
    if (!busy || vp_loop_now(loop) >= quit_at) {
        if (quit_resetting) {
            stop();
            return;
        }
        for (Channel *ch = channels; ch != NULL; ch = ch->next) {
            vp_reset_all(ch->drv);
        }
        quit_resetting = true;
        quit_at = vp_loop_now(loop) + RESET_TIME;
    }
    vp_timer_start(loop, &quit_timer, QUIT_STEP, quit_step, NULL);
}

/* A reload goes on for so long each time, in between others have their turn. */
#define RELOAD_PORTION (2 * MS)
#define RELOAD_STEP 1 /* us: in the next pass of the loop */
/* How long a reload waits for the names that it has asked for. */
#define RELOAD_NAMES (1 * SECOND)
/* How often it is looked whether they are there, or whether it is over. */
#define RELOAD_LOOK (10 * MS)

static struct {
    Change change;  /* "now" is NULL: there is none */
    Settings now;
    VPTimer timer;
    uint64_t until; /* when names aren't waited for any more, us */
    bool again;     /* there was a further SIGHUP */
    Error wrong;    /* with this one, or the last; "": nothing */
} reloading;

/* Forwards whose sockets' files are looked for, in order of their numbers. */
static struct {
    VPTimer timer;
    uint64_t after; /* those up to this one have been */
    bool under_way;
} refiling;

/* settings_newest() - in force, or about to be */
static const Settings *settings_newest(void)
{
    return reloading.change.now != NULL ? &reloading.now : &settings;
}

/* reload_cancel() - the daemon ends: leave undone what has not been done */
static void reload_cancel(void)
{
    vp_timer_stop(&refiling.timer);
    vp_timer_stop(&reloading.timer);
    if (reloading.change.now != NULL) {
        error_set(&reloading.wrong, "the daemon is ending");
        settings_free(&reloading.now);
        reloading.change.now = NULL;
    }
}

/* quit_start() - end in order; if told twice, at once */
static void quit_start(void)
{
    if (quitting) {
        stop();
        return;
    }
    reload_cancel();
    notify("STOPPING=1");
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        vp_refuse(ch->drv);
    }
    for (Forward *f = forwards, *next; f != NULL; f = next) {
        next = f->next;
        forward_del(f);
    }
    quitting = true;
    quit_at = vp_loop_now(loop) + FLUSH_TIME;
    quit_step(NULL);
}

/* ---- reload ----------------------------------------------------------- */

/* reload_keep() - what takes a restart stays as it was */
static void reload_keep(Settings *now, const Settings *was)
{
    for (const Option *o = options; o < options + OPTIONS; o++) {
        bool changed = false;

        if (!(o->rules & NEEDS_RESTART)) {
            continue;
        }
        if (o->kind == FLAG) {
            bool *asked = option_at(now, o), old = *(bool *)option_at(was, o);

            changed = *asked != old;
            *asked = old;
        } else if (o->kind == STRING) {
            char **asked = option_at(now, o), **old = option_at(was, o);
            char *swap = *asked;

            changed = !string_same(*asked, *old);
            *asked = *old;
            *old = swap; /* to be freed with what was */
        }
        if (changed) {
            log_at(VP_LOG_WARN, VP_NO_CHANNEL, "reload: the change of '%s' "
                   "takes a restart", o->name);
        }
    }
}

static void reload(void);

/* reload_wrong() - log what is wrong; the monitor's "reload" answers it */
__attribute__((format(printf, 2, 3)))
static void reload_wrong(VPLogLevel level, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    format_line(reloading.wrong.text, sizeof(reloading.wrong.text), fmt, ap);
    va_end(ap);
    log_at(level, VP_NO_CHANNEL, "%s", reloading.wrong.text);
}

/* running_lacks_group() - is there a listener whose group isn't there? */
static bool running_lacks_group(void)
{
    bool lacks = false;

    for (const Channel *ch = channels; ch != NULL; ch = ch->next) {
        lacks |= spec_lacks_group(&ch->spec) && ch->listening.retry.said.said;
    }
    for (const Forward *f = forwards; f != NULL; f = f->next) {
        lacks |= spec_lacks_group(&f->spec) && f->listening.retry.said.said;
    }
    return lacks;
}

/* reload_end() - what was read is in force */
static void reload_end(void)
{
    Settings *now = &reloading.now;

    reload_keep(now, &settings);
    if (reloading.change.failed || running_lacks_group()) {
        reload_wrong(VP_LOG_ERROR, "reloaded, but not all of it: what could "
                     "not be added is missing, what was removed has gone");
    } else {
        log_at(VP_LOG_INFO, VP_NO_CHANNEL, "reloaded");
    }
    if (now->level != settings.level) {
        log_level = (VPLogLevel)now->level;
    }
    settings_free(&settings);
    settings = *now;
    reloading.change.now = NULL;
    if (reloading.again) {
        reload();
    }
}

/* reload_names() - who reads "reloaded" gets the names, and finds the files */
static void reload_names(void *opaque)
{
    (void)opaque;
    if ((lookups_under_way() || refiling.under_way) &&
        vp_loop_now(loop) < reloading.until) {
        vp_timer_start(loop, &reloading.timer, RELOAD_LOOK, reload_names,
                       NULL);
    } else {
        reload_end();
    }
}

/*
 * reload_step() - a portion of the change
 *
 * It is timed, because a spec that stays takes a us and a socket that is bound
 * to a file may take 2 ms.
 */
static void reload_step(void *opaque)
{
    uint64_t until = vp_clock() + RELOAD_PORTION;
    Error err;

    (void)opaque;
    while (change_next(&reloading.change, &err)) {
        if (vp_clock() >= until) {
            vp_timer_start(loop, &reloading.timer, RELOAD_STEP, reload_step,
                           NULL);
            return;
        }
    }
    reload_names(NULL);
}

/* reload_start() - change what runs, and what is in force, to what was read */
static void reload_start(void)
{
    Settings *now = &reloading.now;

    if (now->key_kept) {
        reload_wrong(VP_LOG_WARN, "--key '%s': %s: the old one stays in force",
                     now->key_path, strerror(EACCES));
    }
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        vp_set_config(ch->drv, &now->config);
        channel_set_key(ch, &now->config);
        listening_ask(&ch->listening);
    }
    for (Forward *f = forwards; f != NULL; f = f->next) {
        if (f->lookup.spec != NULL) {
            lookup_start(&f->lookup);
        }
        listening_ask(&f->listening);
    }
    reloading.change = (Change){ .before = &settings, .now = now };
    reloading.until = vp_loop_now(loop) + RELOAD_NAMES;
    reload_step(NULL);
}

/* Listens anew if the file of the monitor has gone; the monitor sets it. */
static bool (*monitor_anew)(Error *err);

/* refile_step() - listen anew for forwards without a file, a portion of them */
static void refile_step(void *opaque)
{
    uint64_t until = vp_clock() + RELOAD_PORTION;

    (void)opaque;
    for (Forward *f = forwards; f != NULL; f = f->next) {
        if (f->number <= refiling.after) {
            continue;
        }
        if (vp_clock() >= until) {
            vp_timer_start(loop, &refiling.timer, RELOAD_STEP, refile_step,
                           NULL);
            return;
        }
        refiling.after = f->number;
        if (socket_file_gone(f->listening.file)) {
            vp_del_oforward(f->channel->drv, f->listening.fds[0]);
            listening_again(&f->listening);
        }
    }
    refiling.under_way = false;
}

/*
 * reload_files() - listen anew where a socket's file has gone
 *
 * Who cleans /tmp removes what looks old.  Nobody reaches a socket after that,
 * so it is no loss.
 */
static void reload_files(void)
{
    Error err;

    if (monitor_anew != NULL && !monitor_anew(&err)) {
        reload_wrong(VP_LOG_ERROR, "%s", err.text);
    }
    for (Channel *ch = channels; ch != NULL; ch = ch->next) {
        if (ch->nlisteners > 0 && socket_file_gone(ch->listening.file)) {
            vp_listener_stop(&ch->listeners[--ch->nlisteners]);
            listening_again(&ch->listening);
        }
    }
    refiling.after = 0;
    refiling.under_way = true;
    refile_step(NULL);
}

/* reload() - read it all again; nothing changes if any of it is wrong */
static void reload(void)
{
    Error err, wrong;
    Settings now;
    bool ok;

    reloading.again = reloading.change.now != NULL;
    if (quitting || reloading.again) {
        return;
    }
    reloading.wrong = (Error){ "" };
    groups_forget();
    ok = settings_read(&now, saved_argc, saved_argv, &wrong);
    if (!log_open(settings_log(ok ? &now : &settings), &err)) {
        reload_wrong(VP_LOG_ERROR, "%.400s: the old one stays in force",
                     err.text);
        if (ok) {
            free(now.logfile);
            now.logfile = settings.logfile != NULL ? strdup(settings.logfile)
                                                   : NULL;
        }
    }
    reload_files();
    if (ok) {
        reloading.now = now;
        reload_start();
    } else {
        reload_wrong(VP_LOG_ERROR, "nothing reloaded: %.480s", wrong.text);
        settings_free(&now);
    }
}

/* ======================================================================
 * monitor
 *
 * A client is greeted with a prompt, says a line, and is answered: people with
 * a prompt after each command and, after "batch", programs without, so that
 * each answer ends with a line "ok" or "error: TEXT".  The next command of a
 * client waits until its last answer has been taken.  So what is held for a
 * client is bounded by one answer, and a client that doesn't read holds up
 * nobody but itself.
 *
 * Some answers take longer.  That of "watch" grows by a line for each event,
 * which the engine tells through VPEventFunc and "running" through
 * change_told(); of a client that doesn't read, lines beyond WATCH_ROOM bytes
 * are only counted.  "wait" looks at what it waits for when an event may have
 * brought it, and when its time is over; "reload" waits for the reload's end.
 * ====================================================================== */

/* ---- info -------------------------------------------------------------
 *
 * "info" shows a thing field by field.  One call makes both the column that
 * people see and the key that "-k" prints.  Keys come in the order of the
 * calls, and so do the columns, but for wide ones, which stand at the end of
 * the line, as they need no alignment there.
 */

/* They end a cell and say how to align it; no printable value has them. */
#define LEFT "\v"
#define RIGHT "\t"

/* An "info" under way. */
typedef struct Show {
    Text *out;           /* lines of keys, or a table yet to be aligned */
    const char *word;    /* what a line of keys begins with */
    bool keys;           /* -k was given */
    bool head;           /* the first row of a table: names of the columns */
    const char *between; /* follows the row's last cell if another one comes */
    Text wide;           /* the row's wide columns */
    unsigned channel_id; /* of the connections or services shown */
    size_t rows;         /* shown so far */
} Show;

/* human() - a count of bytes in at most 5 characters */
static const char *human(double bytes, char buf[16])
{
    static const char *const unit[] = { "", "K", "M", "G", "T", "P", "E" };
    size_t u = 0;

    while (bytes >= 10000 && u + 1 < COUNT(unit)) {
        bytes /= 1024;
        u++;
    }
    snprintf(buf, 16, "%.0f%s", bytes, unit[u]);
    return buf;
}

/* seconds() - a time in us as seconds, with what precision it deserves */
static const char *seconds(uint64_t us, char buf[16])
{
    if (us < 10 * MS) {
        snprintf(buf, 16, "%uus", (unsigned)us);
    } else {
        snprintf(buf, 16, us < 10 * SECOND ? "%.3fs" : "%.0fs",
                 (double)us / (double)SECOND);
    }
    return buf;
}

/* add_key() - " key=value"; of the value's blanks, for one, becomes "%20" */
static void add_key(Text *out, const char *key, const char *value)
{
    text_add(out, " %s=", key);
    while (*value != '\0') {
        int plain = 0;

        while (value[plain] > ' ' && value[plain] <= '~' &&
               value[plain] != '%') {
            plain++;
        }
        text_add(out, "%.*s", plain, value);
        value += plain;
        if (*value != '\0') {
            text_add(out, "%%%02X", (unsigned char)*value++);
        }
    }
}

/* add_printable() - @text may be of a client's choice */
static void add_printable(Text *out, const char *text)
{
    size_t from = out->len;

    text_add(out, "%s", text);
    if (!out->failed) {
        make_printable(out->data + from);
    }
}

/*
 * show_text() - a field of a row
 * @key:     NULL: it is only a column
 * @column:  NULL: it is only a key
 * @end:     what stands between it and the next column: LEFT, RIGHT or a text
 */
static void show_text(Show *s, const char *key, const char *column,
                      const char *value, const char *end)
{
    if (s->keys && key != NULL) {
        add_key(s->out, key, value);
    } else if (!s->keys && column != NULL) {
        text_add(s->out, "%s", s->between);
        add_printable(s->out, s->head ? column : value);
        s->between = end;
    }
}

/* show_wide() - a field in a wide column; @join parts it from the one before */
static void show_wide(Show *s, const char *key, const char *column,
                      const char *value, const char *join)
{
    if (s->keys && key != NULL) {
        add_key(s->out, key, value);
    } else if (!s->keys) {
        text_add(&s->wide, "%s", s->wide.len > 0 ? join : "");
        add_printable(&s->wide, s->head ? column : value);
    }
}

/* show_number() - a field; the column has @text, if not NULL, in its place */
static void show_number(Show *s, const char *key, const char *column,
                        uint64_t number, const char *text)
{
    char digits[24];

    snprintf(digits, sizeof(digits), "%llu", (unsigned long long)number);
    show_text(s, key, column, s->keys || text == NULL ? digits : text, RIGHT);
}

static void show_bytes(Show *s, const char *key, const char *column,
                       uint64_t bytes)
{
    char buf[16];

    show_number(s, key, column, bytes, human((double)bytes, buf));
}

/* show_time() - in us; @known: else the column has a "-" */
static void show_time(Show *s, const char *key, const char *column,
                      uint64_t us, bool known)
{
    char buf[16];

    show_number(s, key, column, us, known ? seconds(us, buf) : "-");
}

static void row_begin(Show *s)
{
    text_add(s->out, "%s", s->keys ? s->word : "");
    s->between = "";
}

static void row_end(Show *s)
{
    if (s->wide.len > 0) {
        text_add(s->out, "%s%s", s->between, s->wide.data);
    }
    text_add(s->out, "\n");
    s->out->failed |= s->wide.failed;
    s->head = false;
    s->rows++;
    text_free(&s->wide);
}

/* A table's columns, at most. */
#define COLUMNS 16

/*
 * align_table() - append @rows to @out, with columns as wide as they have to be
 * @width:  of the columns of rows before these; it grows
 *
 * A row's last cell, which a newline follows, is not aligned.
 */
static void align_table(Text *out, const Text *rows, int width[COLUMNS])
{
    for (int pass = 0; pass < 2; pass++) {
        int *column = width;

        for (const char *cell = rows->data; *cell != '\0';) {
            int len = (int)strcspn(cell, LEFT RIGHT "\n");
            char end = cell[len];

            if (pass == 0) {
                *column = end != '\n' && len > *column ? len : *column;
            } else if (end == '\n') {
                text_add(out, "%.*s\n", len, cell);
            } else {
                text_add(out, end == LEFT[0] ? "%-*.*s " : "%*.*s ", *column,
                         len, cell);
            }
            column = end == '\n' ? width : column + 1;
            cell += len + 1;
        }
    }
}

/* ---- what there is to show -------------------------------------------- */

static uint64_t started_at; /* loop's time */

static void show_status(Text *out, bool keys)
{
    uint64_t age = (vp_loop_now(loop) - started_at) / SECOND;
    size_t nchannels = 0, up = 0, nforwards = 0, conns = 0;
    VPDescriptors fds = vp_descriptors(loop);

    for (const Channel *ch = channels; ch != NULL; ch = ch->next) {
        VPChannelInfo info;

        vp_channel_info(ch->drv, &info);
        nchannels++;
        up += strcmp(info.state, "up") == 0;
        conns += info.conns;
    }
    for (const Forward *f = forwards; f != NULL; f = f->next) {
        nforwards++;
    }
    text_add(out, keys ? "status version=%s pid=%ld age=%llu channels=%zu "
                         "up=%zu forwards=%zu conns=%zu log=%s fds=%zu "
                         "conn_fds=%zu kept_fds=%zu max_fds=%zu\n"
                       : "qemu-vp %s, process %ld, running for %llu s\n"
                         "channels: %zu, of these up: %zu\n"
                         "forwards: %zu\nconnections: %zu\nlog level: %s\n"
                         "descriptors: %zu, of these for connections %zu; "
                         "kept for the rest %zu, limit %zu\n",
             VERSION, (long)getpid(), (unsigned long long)age, nchannels, up,
             nforwards, conns, level_name[log_level], fds.used, fds.conns,
             fds.kept, fds.max);
}

/* channel_info() - of @ch; nothing in the row with the columns' names */
static VPChannelInfo channel_info(const Show *s, const Channel *ch)
{
    VPChannelInfo info = { .state = "", .last_error = "" };

    if (!s->head) {
        vp_channel_info(ch->drv, &info);
    }
    return info;
}

/*
 * channel_bound() - where the first listener of @ch from number @n on listens
 *
 * @n becomes its number.  Returns false if there is none.
 */
static bool channel_bound(const Channel *ch, int *n, VPAddr *addr)
{
    while (*n < ch->nlisteners && ch->listeners[*n].fd < 0) {
        ++*n; /* its address has gone from the name */
    }
    if (*n < ch->nlisteners) {
        addr_bound(ch->listeners[*n].fd, addr);
    }
    return *n < ch->nlisteners;
}

static void show_channel(Show *s, const Channel *ch)
{
    const VPChannelInfo i = channel_info(s, ch);
    VPPeerInfo peer = { .program = "" };
    char buf[16];
    VPAddr addr;

    if (!s->head) {
        vp_peer_info(ch->drv, &peer);
    }
    row_begin(s);
    show_number(s, "id", "ID", ch->spec.channel_id, NULL);
    show_text(s, "state", "STATE", i.state, LEFT);
    show_wide(s, "spec", "CHANNEL", ch->spec.text, "");
    show_time(s, "session_us", "SESSION", i.session_age, i.session_age > 0);
    show_bytes(s, "in_bytes", "IN", i.bytes[0]);
    show_bytes(s, "out_bytes", "OUT", i.bytes[1]);
    show_number(s, "in_packets", NULL, i.packets[0], NULL);
    show_number(s, "out_packets", NULL, i.packets[1], NULL);
    show_time(s, "rtt_us", "RTT", i.rtt, i.rtt > 0);
    show_number(s, "rate", "OUT/s", (uint64_t)(i.rate + 0.5),
                i.rate > 0 ? human(i.rate, buf) : "-");
    show_number(s, "in_flight", NULL, i.in_flight, NULL);
    show_number(s, "limit", NULL, i.limit, NULL);
    show_number(s, "resyncs", "RESYNCS", i.resyncs, NULL);
    show_number(s, "reconnects", "REOPENED", i.attaches - (i.attaches > 0),
                NULL);
    show_text(s, "last_error", NULL, i.last_error, LEFT);
    show_time(s, "last_error_us", NULL, i.last_error_age, true);
    show_number(s, "protocol", NULL, peer.version, NULL);
    show_text(s, "peer", NULL, peer.program, LEFT);
    for (int n = 0; !s->head && channel_bound(ch, &n, &addr); n++) {
        show_text(s, "listening", NULL, addr_name(&addr), LEFT);
    }
    row_end(s);
    for (int n = 0; !s->head && !s->keys && channel_bound(ch, &n, &addr);
         n++) {
        text_add(s->out, "     listening on %s\n", addr_name(&addr));
    }
    if (!s->keys && peer.program[0] != '\0') {
        text_add(s->out, "     the other side: qemu-vp %s, protocol %u\n",
                 peer.program, peer.version);
    }
    if (!s->keys && (i.in_flight > 0 || strcmp(i.state, "up") == 0)) {
        text_add(s->out, "     in flight: %u of %u bytes; packets: %llu in, "
                 "%llu out\n", i.in_flight, i.limit,
                 (unsigned long long)i.packets[0],
                 (unsigned long long)i.packets[1]);
    }
    if (!s->keys && i.last_error[0] != '\0') {
        text_add(s->out, "     last error, %s ago: %s\n",
                 seconds(i.last_error_age, buf), i.last_error);
    }
}

/* show_sum() - @n counts by their keys; the column has what they add up to */
static void show_sum(Show *s, const char *column, const uint64_t *counts,
                     const char *const *keys, size_t n)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < n; i++) {
        show_number(s, keys[i], NULL, counts[i], NULL);
        sum += counts[i];
    }
    show_number(s, NULL, column, sum, NULL);
}

/* show_counts() - of connections that were refused or reset */
static void show_counts(Show *s, const VPConnCounts *c)
{
    static const char *const refused[] = {
        [VP_REFUSED_UNKNOWN] = "refused_unknown",
        [VP_REFUSED_TARGET] = "refused_target",
        [VP_REFUSED_LIMIT] = "refused_limit",
        [VP_REFUSED_RESOURCES] = "refused_resources",
        [VP_REFUSED_ENDING] = "refused_ending",
        [VP_REFUSED_CLIENT] = "refused_client",
    };
    static const char *const reset[] = {
        [VP_RESET_OWNER] = "reset_owner",
        [VP_RESET_PEER] = "reset_peer",
        [VP_RESET_DAEMON] = "reset_daemon",
        [VP_RESET_SESSION] = "reset_session",
        [VP_RESET_IDLE] = "reset_idle",
    };

    show_sum(s, "REFUSED", c->refused, refused, VP_REFUSALS);
    show_sum(s, "RESET", c->reset, reset, VP_RESETS);
}

static void show_stats(Show *s, const Channel *ch)
{
    const VPChannelInfo i = channel_info(s, ch);
    const VPConnCounts *c = &i.counts;

    row_begin(s);
    show_number(s, "channel", "ID", ch->spec.channel_id, NULL);
    show_number(s, "conns", "CONNS", i.conns, NULL);
    show_number(s, "max_conns", "MAX_CONNS", i.max_conns, NULL);
    show_bytes(s, "memory", "MEMORY", i.memory);
    show_bytes(s, "max_memory", "AT_MOST", i.memory_max);
    show_bytes(s, "kernel_memory", "KERNEL",
               s->head ? 0 : vp_kernel_memory(ch->drv));
    show_number(s, "opened_here", "OPENED", c->opened[1], NULL);
    show_number(s, "opened_there", "THERE", c->opened[0], NULL);
    show_counts(s, c);
    row_end(s);
}

/* offered() - has the oforward @f somebody to answer it? */
static const char *offered(const Forward *f)
{
    static const char *const text[] = {
        [VP_OFFER_UNKNOWN] = "unknown",
        [VP_OFFERED] = "yes",
        [VP_NOT_OFFERED] = "no",
    };

    return text[vp_offered(f->channel->drv, f->spec.service_id)];
}

static void show_forward(Show *s, const Forward *f)
{
    const Spec *spec = &f->spec;
    char address[VALUE_MAX];
    bool any = false;

    if (!s->head && strcmp(spec_name(spec), s->word) != 0) {
        return;
    }
    row_begin(s);
    show_number(s, "channel", "CHANNEL", spec->channel_id, NULL);
    show_text(s, "service", "SERVICE", spec->service_id, LEFT);
    show_text(s, "spec", NULL, spec->text, LEFT);
    if (strcmp(s->word, "oforward") == 0) {
        show_text(s, "offered", "OFFERED", s->head ? "" : offered(f), LEFT);
    }
    for (int i = 0; i < MAX_ADDRS; i++) {
        VPAddr addr;

        if (s->head ? i == 0
                    : spec->option == 'o' && f->listening.fds[i] >= 0) {
            addr_bound(f->listening.fds[i], &addr);
            show_wide(s, "listening", "ADDRESS", addr_name(&addr), " ");
            any = true;
        }
    }
    if (spec->option == 'o' && !any) {
        show_wide(s, NULL, "ADDRESS", "none yet", "");
    }
    if (spec->option == 'i') {
        show_wide(s, NULL, "ADDRESS",
                  spec_where(spec, address, sizeof(address)), "");
    }
    row_end(s);
}

/* show_account() - what a forward's connections may do, and have done */
static void show_account(Show *s, const Forward *f)
{
    const VPLimits *limits = &f->spec.props.limits;
    VPAccountInfo i = { .conns = 0 };
    char idle[16];

    if (!s->head) {
        vp_account_info(f->account, &i);
    }
    row_begin(s);
    show_number(s, "channel", "CHANNEL", f->spec.channel_id, NULL);
    show_text(s, "kind", "KIND", spec_name(&f->spec), LEFT);
    show_text(s, "service", "SERVICE", f->spec.service_id, LEFT);
    show_text(s, "spec", NULL, f->spec.text, LEFT);
    show_number(s, "conns", "CONNS", i.conns, NULL);
    show_number(s, "max_conns", "MAX", limits->max_conns,
                limits->max_conns > 0 ? NULL : "-");
    show_number(s, "idle", "IDLE", limits->idle, limits->idle > 0
                ? seconds(limits->idle * SECOND, idle) : "-");
    show_number(s, "opened", "OPENED",
                i.counts.opened[f->spec.option == 'o'], NULL);
    show_counts(s, &i.counts);
    show_bytes(s, "sent_bytes", "SENT", i.bytes[1]);
    show_bytes(s, "received_bytes", "RECVD", i.bytes[0]);
    row_end(s);
}

/* show_conn_fields() - of a connection's row */
static void show_conn_fields(Show *s, const VPConnInfo *c)
{
    VPAddr ours = { .len = 0 }, theirs = { .len = sizeof(theirs.ss) };
    char id[32], from[ADDR_NAME_SIZE], to[ADDR_NAME_SIZE];

    addr_bound(c->fd, &ours);
    if (getpeername(c->fd, (struct sockaddr *)&theirs.ss, &theirs.len) < 0) {
        theirs.len = 0;
    }
    if (c->connecting != NULL) {
        theirs = *c->connecting;
    }
    snprintf(id, sizeof(id), "%u%c%u", s->channel_id, c->client ? 'o' : 'i',
             c->id);
    vp_addr_str(c->client ? &theirs : &ours, from, sizeof(from));
    vp_addr_str(c->client ? &ours : &theirs, to, sizeof(to));
    show_text(s, "id", "ID", id, LEFT);
    show_text(s, "service", "SERVICE", c->service_id, LEFT);
    show_wide(s, "from", "FROM", from, "");
    show_wide(s, "to", "TO", to, " > ");
    show_text(s, "in", "IN", c->in, "/");
    show_text(s, "out", "OUT", c->out, LEFT);
    show_time(s, "age_us", "AGE", c->age, true);
    show_time(s, "idle_us", "IDLE", c->idle, true);
    show_bytes(s, "sent_bytes", "SENT", c->bytes[1]);
    show_bytes(s, "received_bytes", "RECVD", c->bytes[0]);
    show_bytes(s, "credit", "CREDIT", c->credit);
    show_bytes(s, "waiting", "WAITING", c->waiting);
}

static void show_conn(const VPConnInfo *c, void *opaque)
{
    row_begin(opaque);
    show_conn_fields(opaque, c);
    row_end(opaque);
}

/* show_service() - that the other side offers, or that it doesn't */
static void show_service(Show *s, const char *service_id, const char *offer)
{
    row_begin(s);
    show_number(s, "channel", "CHANNEL", s->channel_id, NULL);
    show_text(s, "service", "SERVICE", service_id, LEFT);
    show_text(s, "offered", "OFFERED", offer, LEFT);
    row_end(s);
}

static void show_offered(const char *service_id, void *opaque)
{
    show_service(opaque, service_id, "yes");
}

/* show_missing() - an oforward that has nobody to answer it */
static void show_missing(Show *s, const Forward *f)
{
    if (f->spec.option == 'o' &&
        vp_offered(f->channel->drv, f->spec.service_id) != VP_OFFERED) {
        s->channel_id = f->spec.channel_id;
        show_service(s, f->spec.service_id, offered(f));
    }
}

/*
 * Connections, forwards or services of a portion.  There may be thousands, each
 * of which takes some us: the channels have their turn after so many.
 */
#define PORTION 64

typedef struct Info Info;

/* An answer to "info" that is given in portions. */
typedef struct Listing {
    const Info *info;
    bool going_on;       /* there is more to come */
    bool keys;           /* -k was given */
    bool begun;
    bool cut;            /* the channel whose turn it was is gone */
    unsigned channel_id; /* whose connections, or services, come next */
    char service[VP_SERVICE_ID_LEN + 1]; /* for vp_services() */
    bool offers_told;    /* only what is missing is still to be told */
    uint64_t after;      /* for vp_conns(), or number of a told forward */
    uint64_t last;       /* number of the last forward that is told */
    int width[COLUMNS];
} Listing;

/* What "info" can show, by @text, @channel or @list. */
struct Info {
    const char *name; /* what stands after "info" */
    const char *word; /* what a line of keys begins with; NULL: it has none */
    void (*text)(Text *out, bool keys);          /* all of it */
    void (*channel)(Show *s, const Channel *ch); /* the rows of a channel */
    bool (*list)(Listing *l, Show *s); /* the next portion; is there more? */
    void (*forward)(Show *s, const Forward *f);  /* list_forwards(): a row */
};

/* list_conns() - Info.list() */
static bool list_conns(Listing *l, Show *s)
{
    static const VPConnInfo none = { .fd = -1 };
    const Channel *ch = l->begun ? channel_find(l->channel_id) : channels;

    if (s->head) {
        show_conn(&none, s);
    }
    s->rows = 0;
    l->cut = l->begun && ch == NULL;
    while (ch != NULL && s->rows < PORTION) {
        s->channel_id = ch->spec.channel_id;
        l->after = vp_conns(ch->drv, l->after, PORTION - s->rows, show_conn,
                            s);
        ch = l->after == 0 ? ch->next : ch;
    }
    l->channel_id = ch != NULL ? ch->spec.channel_id : 0;
    return ch != NULL;
}

/*
 * list_forwards() - Info.list(): those that were there when it began
 *
 * Some may have been removed meanwhile.  One that is added anew would be told
 * twice, or without its channel.
 */
static bool list_forwards(Listing *l, Show *s)
{
    static const Forward none;
    const Forward *f = forwards;

    if (s->head) {
        l->info->forward(s, &none);
    }
    while (f != NULL && f->number <= l->after) {
        f = f->next;
    }
    for (int n = 0; f != NULL && f->number <= l->last && n < PORTION; n++) {
        l->info->forward(s, f);
        l->after = f->number;
        f = f->next;
    }
    return f != NULL && f->number <= l->last;
}

/*
 * list_services() - Info.list(): what the other sides offer, then what is
 * missing there
 */
static bool list_services(Listing *l, Show *s)
{
    const Channel *ch = l->begun ? channel_find(l->channel_id) : channels;

    if (s->head) {
        show_service(s, "", "");
    }
    s->rows = 0;
    if (l->offers_told) {
        return list_forwards(l, s);
    }
    l->cut = l->begun && ch == NULL;
    while (ch != NULL && s->rows < PORTION) {
        const char *last;

        s->channel_id = ch->spec.channel_id;
        last = vp_services(ch->drv, l->service, PORTION - s->rows,
                           show_offered, s);
        snprintf(l->service, sizeof(l->service), "%s",
                 last != NULL ? last : "");
        ch = last == NULL ? ch->next : ch;
    }
    l->channel_id = ch != NULL ? ch->spec.channel_id : 0;
    l->offers_told = ch == NULL && !l->cut;
    return l->offers_told ? list_forwards(l, s) : ch != NULL;
}

static void show_config(Show *s, const Forward *f)
{
    text_add(s->out, "%s %s\n", spec_name(&f->spec), f->spec.text);
}

/* list_config() - Info.list(): what is in force, as an init file */
static bool list_config(Listing *l, Show *s)
{
    Settings now = settings;

    for (const Channel *ch = channels; ch != NULL && !l->begun;
         ch = ch->next) {
        text_add(s->out, "channel %s\n", ch->spec.text);
    }
    if (list_forwards(l, s)) {
        return true;
    }
    now.level = (int)log_level; /* because "log" may have changed it */
    options_print(s->out, &now);
    return false;
}

/* listing_step() - append the next portion of @l to @out */
static void listing_step(Listing *l, Text *out)
{
    bool table = !l->keys && l->info->word != NULL;
    Text rows = { .data = NULL };
    Show s = {
        .out = table ? &rows : out,
        .word = l->info->word,
        .keys = l->keys,
        .head = table && !l->begun,
    };

    if (!l->begun) {
        l->last = forwards_so_far;
    }
    l->going_on = l->info->list(l, &s);
    l->begun = true;
    if (rows.failed) {
        out->failed = true;
    } else if (rows.len > 0) {
        align_table(out, &rows, l->width);
    }
    text_free(&rows);
}

/* Those that have no keys come last, see info_args(). */
static const Info infos[] = {
    { "status", "status", .text = show_status },
    { "channels", "channel", .channel = show_channel },
    { "oforwards", "oforward", .forward = show_forward,
      .list = list_forwards },
    { "iforwards", "iforward", .forward = show_forward,
      .list = list_forwards },
    { "forwards", "forward", .forward = show_account, .list = list_forwards },
    { "services", "service", .forward = show_missing, .list = list_services },
    { "conns", "conn", .list = list_conns },
    { "stats", "stats", .channel = show_stats },
    { "config", NULL, .forward = show_config, .list = list_config },
};

static const Info *info_find(const char *name)
{
    for (size_t i = 0; i < COUNT(infos); i++) {
        if (strcmp(name, infos[i].name) == 0) {
            return &infos[i];
        }
    }
    return NULL;
}

/* info_args() - what may stand after "info" */
static const char *info_args(void)
{
    static char args[256];
    size_t len = 0;

    for (size_t i = 0; i < COUNT(infos) && len < sizeof(args); i++) {
        len += (size_t)snprintf(args + len, sizeof(args) - len, "%s%s",
                                i == 0 ? ""
                                : infos[i].word != NULL ? "|" : " [-k] | ",
                                infos[i].name);
    }
    return args;
}

/* info_show() - append what @info shows to @out */
static void info_show(const Info *info, Text *out, bool keys)
{
    /* stand where a thing would, in the row with the names of the columns */
    const Channel no_channel = { .next = channels };
    const Channel *ch = keys ? channels : &no_channel;
    int width[COLUMNS] = { 0 };
    Text rows = { .data = NULL };
    Show s = {
        .out = keys ? out : &rows,
        .word = info->word,
        .keys = keys,
        .head = !keys,
    };

    if (info->text != NULL) {
        info->text(out, keys);
        return;
    }
    for (; info->channel != NULL && ch != NULL; ch = ch->next) {
        info->channel(&s, ch);
    }
    if (rows.failed) {
        out->failed = true;
    } else if (!keys) {
        align_table(out, &rows, width);
    }
    text_free(&rows);
}

/*
 * log_status() - what "info -k" would show
 *
 * It is logged whatever the log level, because somebody has asked for it.
 */
static void log_status(void)
{
    static const char *const names[] = { "status", "channels", "stats" };
    Text out = { .data = NULL };

    for (size_t i = 0; i < COUNT(names); i++) {
        info_show(info_find(names[i]), &out, true);
    }
    for (char *line = out.failed ? NULL : strtok(out.data, "\n");
         line != NULL; line = strtok(NULL, "\n")) {
        log_line(VP_LOG_INFO, VP_NO_CHANNEL, line);
    }
    text_free(&out);
}

/* ---- commands --------------------------------------------------------- */

#define MON_PROMPT "(qemu-vp) "

/* Bytes of a command.  Each that takes a value of VALUE_MAX bytes fits. */
#define MON_LINE_MAX 4096

typedef struct Mon Mon;

typedef struct Command {
    const char *name;
    const char *args;  /* what "help" calls them; "": it takes none; NULL:
                          info_args() */
    const char *help;
    bool (*run)(Mon *mon, char *args, Error *err);
    char option;       /* letter of what it adds or removes, or 0 */
} Command;

/* One that waits looks so long after an event that may be what it waits for. */
#define WAIT_LOOK (10 * MS)

/* What a client waits for. */
typedef struct Wait {
    VPTimer timer;       /* runs while it waits */
    bool reload;         /* for a reload's end; the rest doesn't count */
    uint64_t until;      /* us */
    unsigned channel_id; /* of the channel that has to be up */
    char service_id[VP_SERVICE_ID_LEN + 1]; /* that has to be offered; or "" */
} Wait;

/* A client. */
struct Mon {
    Mon *next;
    int fd;
    uint64_t heard_at;      /* when it last took or said something, us */
    bool batch;             /* it is a program */
    bool eof;               /* it will send no more commands */
    bool left;              /* it said "exit": what follows is not executed */
    bool broken;            /* it is gone, or there was no memory */
    char line[MON_LINE_MAX]; /* commands that were not executed yet */
    size_t len;             /* bytes of these */
    Text out;               /* the answer */
    size_t taken;           /* bytes of it that the client has taken */
    const Command *command; /* the last one */
    bool repeated;          /* the one before it was the same */
    bool unanswered;        /* it has no answer, as the first "batch" */
    Lookup lookup;          /* for the answer to an "..._add" */
    Spec adding;            /* what that adds */
    Listing listing;        /* an answer of which there may be more */
    Wait wait;
    bool watches;           /* it is told of events */
    bool watches_conns;     /* of those of connections as well */
    unsigned long missed;   /* lines left out since the last that it was told */
    VPTimer gone_timer;     /* runs while it may go without our seeing it */
};

static Mon *monitors;

/* mon_lasts() - is there an answer that goes on until something happens? */
static bool mon_lasts(const Mon *mon)
{
    return mon->watches || mon->wait.timer.link != NULL;
}

static bool run_info(Mon *mon, char *args, Error *err)
{
    char *more, *name = cut_word(args, "", &more);
    const Info *info = info_find(name);
    bool keys = strcmp(more, "-k") == 0;

    if (*more != '\0' && !keys) {
        return error_set(err, "'%.64s': expected -k", more);
    }
    if (info == NULL) {
        return error_set(err, "'%.64s': expected %s", name, info_args());
    }
    if (keys && info->word == NULL) {
        return error_set(err, "'-k': 'info config' is an init file already");
    }
    if (info->list != NULL) {
        mon->listing = (Listing){ .info = info, .keys = keys };
        listing_step(&mon->listing, &mon->out);
    } else {
        info_show(info, &mon->out, keys);
    }
    return true;
}

static void mon_looked_up(void *opaque, int rc);

/* run_add() - if a name has to be looked up, mon_looked_up() will answer */
static bool run_add(Mon *mon, char *args, Error *err)
{
    Spec *spec = &mon->adding;

    if (!spec_parse(spec, mon->command->option, args, err)) {
        return false;
    }
    if (spec_adds_name(spec)) {
        mon->lookup.spec = spec;
        mon->lookup.done = mon_looked_up;
        mon->lookup.opaque = mon;
        lookup_start(&mon->lookup);
        return true;
    }
    return running_add(spec, settings_newest(), "monitor", false, err);
}

/*
 * running_named() - the one that @name means, a CHANNEL_ID or a SERVICE_ID
 *
 * NULL if that is none, or not the only one: see @err.
 */
static const Spec *running_named(char option, const char *name, Error *err)
{
    const Spec *found = NULL;
    char all[300] = "";
    unsigned long id;
    size_t len = 0;
    int n = 0;

    for (Channel *ch = channels; option == 'c' && ch != NULL; ch = ch->next) {
        if (parse_number(name, 0, 65535, &id) && id == ch->spec.channel_id) {
            return &ch->spec;
        }
    }
    for (Forward *f = forwards; f != NULL; f = f->next) {
        if (f->spec.option == option &&
            strcmp(f->spec.service_id, name) == 0 && len < sizeof(all)) {
            len += (size_t)snprintf(all + len, sizeof(all) - len, " %s",
                                    f->spec.text);
            found = &f->spec;
            n++;
        }
    }
    if (n == 1) {
        return found;
    }
    error_set(err, n > 0 ? "'%.64s': which of these:%s"
                         : "'%.64s': there is none of that name", name, all);
    return NULL;
}

static bool run_del(Mon *mon, char *args, Error *err)
{
    const char option = mon->command->option;
    const Spec *named;
    Spec spec;
    bool ok;

    if (strchr(args, ':') == NULL) {
        named = running_named(option, args, err);
        return named != NULL && running_del(named, "monitor", err);
    }
    if (!spec_parse(&spec, option, args, err)) {
        return false;
    }
    ok = running_del(&spec, "monitor", err);
    spec_free(&spec);
    return ok;
}

static bool run_conn_reset(Mon *mon, char *args, Error *err)
{
    size_t len = strspn(args, "0123456789");
    unsigned long channel_id, id;
    char side = args[len];
    bool client = side == 'o', ok;
    Channel *ch;

    (void)mon;
    args[len] = '\0';
    ok = parse_number(args, 0, 65535, &channel_id);
    args[len] = side;
    if (!ok || (side != 'o' && side != 'i') ||
        !parse_number(args + len + 1, 0, UINT32_MAX, &id)) {
        return error_set(err, "'%.64s': expected the ID that 'info conns' "
                         "shows", args);
    }
    ch = channel_find((unsigned)channel_id);
    return (ch != NULL && vp_conn_reset(ch->drv, (uint32_t)id, client) == 0) ||
           error_set(err, "there is no connection '%.64s'", args);
}

static bool run_log(Mon *mon, char *args, Error *err)
{
    (void)mon;
    for (size_t i = 0; i < COUNT(level_name); i++) {
        if (strcmp(args, level_name[i]) == 0) {
            log_level = (VPLogLevel)i;
            return true;
        }
    }
    return error_set(err, "'%.64s': expected error, warn, info, verbose or "
                     "debug", args);
}

/* run_quit() - people who only want to leave say it, too, so they are asked */
static bool run_quit(Mon *mon, char *args, Error *err)
{
    (void)args;
    (void)err;
    if (!mon->batch && !mon->repeated) {
        text_add(&mon->out, "this ends the daemon, and all connections: say "
                 "it again if it should; 'exit' ends only this client\n");
        return true;
    }
    log_at(VP_LOG_INFO, VP_NO_CHANNEL, "ending: the monitor says so");
    quit_start();
    return true;
}

static void wait_look(void *opaque);

/* run_reload() - as SIGHUP; wait_look() answers, once it is over */
static bool run_reload(Mon *mon, char *args, Error *err)
{
    (void)args;
    if (quitting) {
        return error_set(err, "the daemon is ending");
    }
    reload();
    mon->wait.reload = true;
    vp_timer_start(loop, &mon->wait.timer, RELOAD_STEP, wait_look, mon);
    return true;
}

/* run_exit() - a person, who gets no prompt after it, gets no answer */
static bool run_exit(Mon *mon, char *args, Error *err)
{
    (void)args;
    (void)err;
    mon->eof = true;
    mon->left = true;
    mon->unanswered = !mon->batch;
    return true;
}

/* run_batch() - the first one has no answer, so that -x gets only its own */
static bool run_batch(Mon *mon, char *args, Error *err)
{
    (void)args;
    (void)err;
    mon->unanswered = !mon->batch;
    mon->batch = true;
    return true;
}

/* ---- watching and waiting --------------------------------------------- */

/* Bytes of lines that wait for a client. */
#define WATCH_ROOM (64 << 10)

/* Seconds that a client may wait. */
#define WAIT_MAX 86400

static bool watched;     /* is there a client that watches? */
static bool watch_conns; /* is there one that wants to know of connections? */

/* event_begin() - the words that each event begins with */
static void event_begin(Text *line, const char *channel, const char *event)
{
    char date[32];
    struct timespec ts;
    struct tm tm;

    if (clock_gettime(CLOCK_REALTIME, &ts) == 0 &&
        gmtime_r(&ts.tv_sec, &tm) != NULL) {
        strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &tm);
        text_add(line, "%s.%03dZ %s %s", date, (int)(ts.tv_nsec / 1000000),
                 channel, event);
    } else {
        /* where time_t has 32 bits time ends in 2038 */
        text_add(line, "- %s %s", channel, event);
    }
}

static void event_begin_at(Text *line, unsigned channel_id, const char *event)
{
    char id[16];

    snprintf(id, sizeof(id), "%u", channel_id);
    event_begin(line, id, event);
}

/* watch_missed() - tell how many lines are missing here, if any */
static void watch_missed(Mon *mon)
{
    if (mon->missed > 0) {
        event_begin(&mon->out, "-", "missed");
        text_add(&mon->out, " lines=%lu\n", mon->missed);
        mon->missed = 0;
    }
}

/* watch_tell() - tell @mon of an event, unless its lines have piled up */
static void watch_tell(Mon *mon, const Text *line)
{
    Text *out = &mon->out;

    if (out->len + line->len > WATCH_ROOM && mon->taken > 0) {
        out->len -= mon->taken;
        memmove(out->data, out->data + mon->taken, out->len + 1);
        mon->taken = 0;
    }
    if (mon->missed > 0 || line->failed ||
        out->len + line->len > WATCH_ROOM) {
        mon->missed++; /* until all is taken, so that one gap remains one */
    } else {
        text_add(out, "%s", line->data);
    }
    vp_watch_set(loop, mon->fd, VP_WRITE);
}

/* watch_event() - tell of the event @line, and free it */
static void watch_event(Text *line, bool conns)
{
    for (Mon *mon = monitors; mon != NULL; mon = mon->next) {
        if (conns ? mon->watches_conns : mon->watches) {
            watch_tell(mon, line);
        }
    }
    text_free(line);
}

/* watch_set() - what is @mon told of from now on? */
static void watch_set(Mon *mon, bool watches, bool conns)
{
    mon->watches = watches;
    mon->watches_conns = conns;
    watched = watch_conns = false;
    for (const Mon *m = monitors; m != NULL; m = m->next) {
        watched |= m->watches;
        watch_conns |= m->watches_conns;
    }
}

/* watch_end() - the answer is complete */
static void watch_end(Mon *mon)
{
    watch_missed(mon);
    watch_set(mon, false, false);
    if (mon->batch) {
        text_add(&mon->out, "ok\n");
    }
}

/* run_watch() - what is there already comes first */
static bool run_watch(Mon *mon, char *args, Error *err)
{
    bool conns = strcmp(args, "conns") == 0;

    if (args[0] != '\0' && !conns) {
        return error_set(err, "'%.64s': expected conns", args);
    }
    for (const Channel *ch = channels; ch != NULL; ch = ch->next) {
        Show s = { .out = &mon->out, .word = "", .keys = true };

        event_begin_at(&mon->out, ch->spec.channel_id, "channel");
        show_channel(&s, ch);
    }
    watch_set(mon, true, conns);
    return true;
}

/* wait_parse() - false: see @err */
static bool wait_parse(Wait *w, char *args, Error *err)
{
    char *time, *id, *what = cut_word(args, "", &time);
    unsigned long seconds, channel_id = 0;
    bool up = strcmp(what, "up") == 0;

    time = cut_word(time, "", &id);
    if (!up && (!vp_service_id_ok(what, strlen(what)) ||
                strcmp(what, VP_ANY_SERVICE) == 0)) {
        return error_set(err, "'%.64s': expected up or a SERVICE_ID", what);
    }
    if (!parse_number(time, 0, WAIT_MAX, &seconds)) {
        return error_set(err, "'%.64s': expected a number of seconds, 0 to %d",
                         time, WAIT_MAX);
    }
    if (*id != '\0' && !parse_number(id, 0, 65535, &channel_id)) {
        return error_set(err, "'%.64s': expected a CHANNEL_ID, 0 to 65535",
                         id);
    }
    w->reload = false;
    snprintf(w->service_id, sizeof(w->service_id), "%s", up ? "" : what);
    w->channel_id = (unsigned)channel_id;
    w->until = seconds * SECOND;
    return true;
}

/* wait_met() - is there what @w waits for?  No: @err says what there is */
static bool wait_met(const Wait *w, Error *err)
{
    const Channel *ch = channel_find(w->channel_id);
    bool offered = w->service_id[0] == '\0' ||
                   (ch != NULL &&
                    vp_offered(ch->drv, w->service_id) == VP_OFFERED);
    VPChannelInfo info;

    if (ch == NULL) {
        return error_set(err, "there is no channel %u", w->channel_id);
    }
    vp_channel_info(ch->drv, &info);
    if (strcmp(info.state, "silent") == 0) {
        /* its last error is of an earlier time */
        return error_set(err, "channel %u is silent", w->channel_id);
    }
    if (strcmp(info.state, "up") != 0) {
        return error_set(err, "channel %u is not up: %s", w->channel_id,
                         info.last_error[0] != '\0' ? info.last_error
                                                    : "nobody has answered");
    }
    return offered || error_set(err, "the other side of channel %u offers no "
                                "service '%s'", w->channel_id, w->service_id);
}

/*
 * wait_poke() - clients that wait for @channel_id have to look, soon
 *
 * Not at once, because the peer chooses how often there is something to see.
 */
static void wait_poke(unsigned channel_id)
{
    for (Mon *mon = monitors; mon != NULL; mon = mon->next) {
        const VPTimer *timer = &mon->wait.timer;

        if (timer->link != NULL && mon->wait.channel_id == channel_id &&
            timer->deadline > vp_loop_now(loop) + WAIT_LOOK) {
            vp_timer_start(loop, &mon->wait.timer, WAIT_LOOK, wait_look, mon);
        }
    }
}

static bool run_wait(Mon *mon, char *args, Error *err)
{
    Wait *w = &mon->wait;
    uint64_t time;

    if (!wait_parse(w, args, err)) {
        return false;
    }
    if (wait_met(w, err)) {
        return true;
    }
    time = w->until;
    w->until += vp_loop_now(loop);
    if (time == 0 || channel_find(w->channel_id) == NULL) {
        return false;
    }
    vp_timer_start(loop, &w->timer, time, wait_look, mon);
    return true;
}

/* engine_event() - VPEventFunc */
static bool engine_event(const VPEvent *e)
{
    static const char *const name[] = {
        [VP_EVENT_UP] = "up",
        [VP_EVENT_SILENT] = "silent",
        [VP_EVENT_ANSWERS] = "answers",
        [VP_EVENT_DOWN] = "down",
        [VP_EVENT_OVER] = "over",
        [VP_EVENT_SERVICES] = "services",
        [VP_EVENT_REFUSED] = "refused",
        [VP_EVENT_OPENED] = "opened",
        [VP_EVENT_ENDED] = "ended",
    };
    Text line = { .data = NULL };
    Show s = { .out = &line, .keys = true };

    s.channel_id = (unsigned)e->channel;
    if (e->type == VP_EVENT_UP || e->type == VP_EVENT_ANSWERS ||
        e->type == VP_EVENT_SERVICES) {
        wait_poke(s.channel_id);
    }
    /* that the link was mended is no news */
    if (!watched || e->mended) {
        return false;
    }
    event_begin_at(&line, s.channel_id, name[e->type]);
    if (e->type == VP_EVENT_UP) {
        add_key(&line, "session", e->resumed ? "resumed" : "new");
    } else if (e->type == VP_EVENT_SERVICES) {
        show_number(&s, "count", NULL, e->services, NULL);
    } else if (e->type == VP_EVENT_REFUSED) {
        add_key(&line, "service", e->service_id);
        add_key(&line, "client", e->client ? "here" : "there");
        add_key(&line, "from", e->from);
    } else if (e->conn != NULL) {
        show_conn_fields(&s, e->conn);
    }
    if (e->reason != NULL) {
        add_key(&line, "reason", e->reason);
    }
    text_add(&line, "\n");
    watch_event(&line, e->conn != NULL);
    return true;
}

/* running_event() - change_told() */
static void running_event(const Spec *spec, bool added)
{
    Text line = { .data = NULL };
    char name[32];

    if (spec->option == 'c') {
        wait_poke(spec->channel_id);
    }
    if (!watched) {
        return;
    }
    snprintf(name, sizeof(name), "%s_%s", spec_name(spec),
             added ? "add" : "del");
    event_begin_at(&line, spec->channel_id, name);
    if (spec->option != 'c') {
        add_key(&line, "service", spec->service_id);
    }
    add_key(&line, "spec", spec->text);
    text_add(&line, "\n");
    watch_event(&line, false);
}

/* ---- the table of commands -------------------------------------------- */

static bool run_help(Mon *mon, char *args, Error *err);

static const Command commands[] = {
    { "help", "[COMMAND]", "show the commands, or one of them", run_help, 0 },
    { "info", NULL, "show what is there; -k: as key=value, for programs",
      run_info, 0 },
    { "channel_add", "METHOD:ADDR:PORT[:CHANNEL_ID]", "add a channel, as -c",
      run_add, 'c' },
    { "channel_del", "CHANNEL_ID|METHOD:ADDR:PORT[:CHANNEL_ID]",
      "remove a channel, its forwards and connections", run_del, 'c' },
    { "oforward_add", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]",
      "listen and forward, as -o", run_add, 'o' },
    { "oforward_del", "SERVICE_ID[:ADDR:PORT[:CHANNEL_ID]]",
      "stop listening; connections go on", run_del, 'o' },
    { "iforward_add", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]",
      "offer a service to the other side, as -i", run_add, 'i' },
    { "iforward_del", "SERVICE_ID[:ADDR:PORT[:CHANNEL_ID]]",
      "offer it no longer; connections go on", run_del, 'i' },
    { "watch", "[conns]", "a line for each event, until the next command; "
      "conns: of connections as well", run_watch, 0 },
    { "wait", "up|SERVICE_ID SECONDS [CHANNEL_ID]",
      "until the channel is up, and the other side offers the service",
      run_wait, 0 },
    { "conn_reset", "ID", "reset a connection at both ends", run_conn_reset,
      0 },
    { "reload", "", "read command line and init file again, as SIGHUP does; "
      "says what is wrong", run_reload, 0 },
    { "log", "error|warn|info|verbose|debug", "set what is logged", run_log,
      0 },
    { "batch", "", "no prompt; end each answer with 'ok' or 'error: ...'",
      run_batch, 0 },
    { "exit", "", "end this connection to the monitor", run_exit, 0 },
    { "quit", "", "end the daemon", run_quit, 0 },
};

static const char *command_args(const Command *c)
{
    return c->args != NULL ? c->args : info_args();
}

static bool run_help(Mon *mon, char *args, Error *err)
{
    bool found = false;

    for (size_t i = 0; i < COUNT(commands); i++) {
        const Command *c = &commands[i];

        if (args[0] == '\0' || strcmp(args, c->name) == 0) {
            text_add(&mon->out, "%s%s%s -- %s\n", c->name,
                     command_args(c)[0] != '\0' ? " " : "", command_args(c),
                     c->help);
            found = true;
        }
    }
    return found || error_set(err, "'%.64s': there is no such command", args);
}

/* command_run() - the command @name, if it has the arguments it takes */
static bool command_run(Mon *mon, const char *name, char *args, Error *err)
{
    const Command *c = commands;
    const char *takes;

    while (c < commands + COUNT(commands) && strcmp(c->name, name) != 0) {
        c++;
    }
    if (c == commands + COUNT(commands)) {
        return error_set(err, "'%.64s': there is no such command, try 'help'",
                         name);
    }
    takes = command_args(c);
    if (takes[0] == '\0' && args[0] != '\0') {
        return error_set(err, "'%.64s': %s takes no argument", args, name);
    }
    if (takes[0] != '\0' && takes[0] != '[' && args[0] == '\0') {
        return error_set(err, "%s: expected %s", name, takes);
    }
    mon->repeated = mon->command == c;
    mon->command = c;
    return c->run(mon, args, err);
}

static void mon_answer(Mon *mon, bool ok, const Error *err)
{
    if (!ok) {
        text_add(&mon->out, "error: %s\n", err->text);
    } else if (mon->batch) {
        text_add(&mon->out, "ok\n");
    }
    if (!mon->batch) {
        text_add(&mon->out, MON_PROMPT);
    }
}

/* mon_execute() - run one line, and answer it if it needs no lookup */
static void mon_execute(Mon *mon, char *line)
{
    char *args, *name = cut_word(line, " \t\r", &args);
    Error err;
    bool ok;

    if (mon->watches) {
        watch_end(mon);
    }
    ok = name[0] == '\0' || command_run(mon, name, args, &err);
    if (!lookup_busy(&mon->lookup) && !mon->listing.going_on &&
        !mon->unanswered && !mon_lasts(mon)) {
        mon_answer(mon, ok, &err);
    }
    mon->unanswered = false;
}

/* ---- clients ---------------------------------------------------------- */

/*
 * Clients at a time: an eighth of the 1024 descriptors that are usual, so that
 * scripts which hang leave the rest to connections.  One more, or one for which
 * there is no descriptor but the monitor's own, and the most silent has to go.
 */
#define MON_CLIENTS 128

/*
 * select() doesn't tell who goes after the end of his data, or with more of it
 * than there is room for: time to look.
 */
#define MON_LOOK (1 * SECOND)

static Spec monitor_spec; /* of -m */
static SocketFile *monitor_file;
static VPListener monitor_listener;
static size_t nmonitors;

static void mon_close(Mon *mon)
{
    Mon **at = &monitors;

    while (*at != mon) {
        at = &(*at)->next;
    }
    *at = mon->next;
    nmonitors--;
    watch_set(mon, false, false);
    vp_timer_stop(&mon->wait.timer);
    vp_timer_stop(&mon->gone_timer);
    lookup_cancel(&mon->lookup);
    spec_free(&mon->adding);
    vp_unwatch(loop, mon->fd);
    close(mon->fd);
    vp_listener_spare(&monitor_listener);
    text_free(&mon->out);
    free(mon);
}

/* mon_flush() - has the client taken all of its answer? */
static bool mon_flush(Mon *mon)
{
    if (mon->out.failed) {
        mon->broken = true;
        return false;
    }
    while (mon->taken < mon->out.len) {
        ssize_t n = write(mon->fd, mon->out.data + mon->taken,
                          mon->out.len - mon->taken);

        if (n < 0 && errno != EINTR) {
            mon->broken = errno != EAGAIN;
            return false;
        }
        mon->taken += n > 0 ? (size_t)n : 0;
    }
    text_free(&mon->out);
    mon->taken = 0;
    return true;
}

/* mon_run() - execute lines as long as their answers are taken */
static void mon_run(Mon *mon)
{
    if (mon->listing.going_on && mon->out.len == 0) {
        listing_step(&mon->listing, &mon->out);
        if (!mon->listing.going_on) {
            Error err;

            error_set(&err, "a channel was removed meanwhile: ask again");
            mon_answer(mon, !mon->listing.cut, &err);
        }
    }
    while (mon_flush(mon) && !mon->listing.going_on) {
        char *end = memchr(mon->line, '\n', mon->len);
        size_t used;

        if (mon->missed > 0) {
            watch_missed(mon);
            continue;
        }
        if (mon->wait.timer.link != NULL) {
            /* to see it go; what it says meanwhile is executed later */
            vp_watch_set(loop, mon->fd,
                         mon->eof || mon->len == sizeof(mon->line) ? 0
                                                                   : VP_READ);
            return;
        }
        if (end == NULL && mon->eof && mon->len > 0 &&
            mon->len < sizeof(mon->line)) {
            end = mon->line + mon->len++; /* the last line may have none */
        }
        if (end == NULL) {
            vp_watch_set(loop, mon->fd, mon->eof ? 0 : VP_READ);
            return;
        }
        *end = '\0';
        used = (size_t)(end - mon->line) + 1;
        mon_execute(mon, mon->line);
        mon->len = mon->left ? used : mon->len;
        mon->len -= used;
        memmove(mon->line, mon->line + used, mon->len);
        if (lookup_busy(&mon->lookup)) {
            vp_watch_set(loop, mon->fd, 0);
            return;
        }
    }
    vp_watch_set(loop, mon->fd, VP_WRITE);
}

/* mon_hung_up() - is nobody there to take an answer? */
static bool mon_hung_up(const Mon *mon)
{
    struct pollfd pfd = { .fd = mon->fd };

    return poll(&pfd, 1, 0) > 0 && (pfd.revents & POLLHUP);
}

/* mon_look_gone() - has a client gone of which nothing is read now? */
static void mon_look_gone(void *opaque)
{
    Mon *mon = opaque;

    if (mon_lasts(mon) && mon_hung_up(mon)) {
        mon_close(mon);
    } else if (mon_lasts(mon)) {
        vp_timer_start(loop, &mon->gone_timer, MON_LOOK, mon_look_gone, mon);
    }
}

/* mon_continue() - go on with a client after whatever happened to it */
static void mon_continue(Mon *mon)
{
    if (!mon->broken) {
        mon_run(mon);
    }
    if (!mon->broken && mon->len == sizeof(mon->line) &&
        mon->wait.timer.link == NULL &&
        memchr(mon->line, '\n', mon->len) == NULL) {
        text_add(&mon->out, "error: the line is longer than %d bytes\n",
                 MON_LINE_MAX - 1);
        mon->len = 0;
        mon->eof = true;
        mon_run(mon);
    }
    if (mon->broken ||
        (mon->eof && mon->out.len == 0 && !mon->listing.going_on &&
         !lookup_busy(&mon->lookup) && !mon_lasts(mon))) {
        mon_close(mon);
    } else if ((mon->eof || mon->len == sizeof(mon->line)) &&
               mon->gone_timer.link == NULL) {
        mon_look_gone(mon);
    }
}

/* wait_look() - is it there, or is the time over? */
static void wait_look(void *opaque)
{
    Mon *mon = opaque;
    Wait *w = &mon->wait;
    uint64_t now = vp_loop_now(loop);
    Error err;
    bool met, there;

    if (w->reload && reloading.change.now != NULL) {
        vp_timer_start(loop, &w->timer, RELOAD_LOOK, wait_look, mon);
        return;
    }
    if (w->reload) {
        mon_answer(mon, reloading.wrong.text[0] == '\0', &reloading.wrong);
        mon_continue(mon);
        return;
    }
    met = wait_met(w, &err);
    there = channel_find(w->channel_id) != NULL;
    if (!met && now < w->until && (there || reloading.change.now != NULL)) {
        /* a reload may be about to add again what it has removed */
        vp_timer_start(loop, &w->timer, there ? w->until - now : RELOAD_LOOK,
                       wait_look, mon);
        return;
    }
    mon_answer(mon, met, &err);
    mon_continue(mon);
}

/* mon_looked_up() - Lookup.done() */
static void mon_looked_up(void *opaque, int rc)
{
    Mon *mon = opaque;
    Error err;
    bool ok = rc == 0;

    if (ok) {
        ok = running_add(&mon->adding, settings_newest(), "monitor", false,
                         &err);
    } else {
        name_error(&mon->adding, rc, &err);
        spec_free(&mon->adding);
    }
    mon_answer(mon, ok, &err);
    mon_continue(mon);
}

static void mon_ready(void *opaque, int fd, int events)
{
    Mon *mon = opaque;

    mon->heard_at = vp_loop_now(loop);
    if (events & VP_READ) {
        ssize_t n = read(fd, mon->line + mon->len,
                         sizeof(mon->line) - mon->len);

        if (n > 0) {
            mon->len += (size_t)n;
        } else if (n == 0) {
            mon->eof = true;
            /* half a line of a client that has died is no command */
            mon->len = mon_hung_up(mon) ? 0 : mon->len;
        } else if (errno != EAGAIN && errno != EINTR) {
            mon->broken = true;
        }
    }
    mon_continue(mon);
}

/*
 * mon_may() - may the client at @fd give orders?
 *
 * The mode of the socket's file says who may; an abstract one has none.
 */
static bool mon_may(int fd)
{
#ifdef SO_PEERCRED
    struct { pid_t pid; uid_t uid; gid_t gid; } who; /* Linux's struct ucred */
    socklen_t len = sizeof(who);
    VPAddr addr;

    addr_bound(fd, &addr);
    if (addr_name(&addr)[0] == '@') {
        return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) == 0 &&
               (who.uid == 0 || who.uid == geteuid());
    }
#else
    (void)fd;
#endif
    return true;
}

static void mon_accepted(void *opaque, int fd, const VPAddr *peer)
{
    Mon *mon = monitors;

    (void)opaque;
    (void)peer;
    if (!mon_may(fd)) {
        close(fd);
        return;
    }
    if (nmonitors == MON_CLIENTS ||
        (nmonitors > 0 && vp_fd_is_kept(loop, fd))) {
        for (Mon *m = monitors; m != NULL; m = m->next) {
            mon = m->heard_at < mon->heard_at ? m : mon;
        }
        mon_close(mon);
    }
    mon = calloc(1, sizeof(*mon));
    if (mon == NULL || vp_watch(loop, fd, mon_ready, mon) < 0) {
        free(mon);
        close(fd);
        return;
    }
    mon->fd = fd;
    mon->heard_at = vp_loop_now(loop);
    mon->next = monitors;
    monitors = mon;
    nmonitors++;
    text_add(&mon->out, MON_PROMPT);
    mon_continue(mon);
}

/* monitor_listen() - in place of what it listens on now, if anything */
static bool monitor_listen(Error *err)
{
    SocketFile *file = NULL;
    VPAddr addr;
    int fd, rc;

    if (monitor_spec.inherited) {
        if (!inherited_listen(&monitor_spec, &fd, 1, err)) {
            return false;
        }
    } else {
        addr_unix(monitor_spec.addr, &addr);
        fd = listen_at(&addr, true, &monitor_spec.props);
        if (fd >= 0) {
            vp_listener_stop(&monitor_listener);
            file = socket_file_keep(monitor_spec.addr);
        }
    }
    monitor_listener.channel = VP_NO_CHANNEL;
    monitor_listener.name = "monitor";
    /* to be asked when the system has none, or the limit was lowered */
    monitor_listener.keeps_spare = true;
    monitor_listener.accepted = mon_accepted;
    rc = fd < 0 ? fd : vp_listener_start(&monitor_listener, loop, fd);
    if (rc < 0) {
        socket_file_remove(file);
        return error_set(err, "-m '%s': cannot listen: %s%s",
                         monitor_spec.text, listen_error(rc),
                         rc == -EADDRINUSE
                         ? "; -x COMMAND talks to who does" : "");
    }
    monitor_file = file;
    return true;
}

/* monitor_again() - monitor_anew() */
static bool monitor_again(Error *err)
{
    SocketFile *gone = monitor_file;

    if (!socket_file_gone(gone)) {
        return true;
    }
    if (!monitor_listen(err)) {
        return false;
    }
    socket_file_remove(gone);
    log_at(VP_LOG_INFO, VP_NO_CHANNEL, "monitor: listening on %s",
           monitor_spec.addr);
    return true;
}

static bool monitor_start(const char *text, Error *err)
{
    if (!spec_parse(&monitor_spec, 'm', text, err)) {
        return false;
    }
    if (monitor_spec.props.mode < 0) {
        monitor_spec.props.mode = S_IRUSR | S_IWUSR;
    }
    if (spec_lacks_group(&monitor_spec)) {
        /* it was found when the options were read, before so many others */
        monitor_spec.props.gid = group_lookup(monitor_spec.props.group);
        if (spec_lacks_group(&monitor_spec)) {
            return error_set(err, "-m '%.128s': the group '%.64s' is not "
                             "there any more", text,
                             monitor_spec.props.group);
        }
    }
    monitor_anew = monitor_again;
    change_told = running_event;
    vp_set_events(loop, engine_event, &watch_conns);
    return monitor_listen(err);
}

/* monitor_end() - the clients are told that the daemon ends */
static void monitor_end(void)
{
    while (monitors != NULL) {
        Mon *mon = monitors;
        Error err;

        if (mon->watches) {
            watch_missed(mon);
            event_begin(&mon->out, "-", "end");
            text_add(&mon->out, "\n");
            watch_end(mon);
        } else if (mon_lasts(mon) || lookup_busy(&mon->lookup)) {
            error_set(&err, "the daemon is ending");
            mon_answer(mon, false, &err);
        }
        mon_flush(mon);
        mon_close(mon);
    }
    vp_listener_stop(&monitor_listener);
}

/* ---- the client that -x is -------------------------------------------- */

/* How long the client waits for each part of an answer, in seconds. */
#define ANSWER_TIME 10

/* client_wrong() - what errno means to the client */
static const char *client_wrong(void)
{
    return errno == EAGAIN || errno == EINPROGRESS
           ? "it doesn't answer" : strerror(errno);
}

/*
 * client_connect() - a socket that is connected to @path, or -1: see errno
 * @wait:  seconds that each call may take on it, or 0: any time
 */
static int client_connect(const char *path, time_t wait)
{
    const struct timeval most = { .tv_sec = wait };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0), err;
    VPAddr addr;

    addr_unix(path, &addr);
    if (fd >= 0 &&
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof(most)) == 0 &&
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most)) == 0 &&
        connect(fd, (struct sockaddr *)&addr.ss, addr.len) == 0) {
        return fd;
    }
    err = errno;
    if (fd >= 0) {
        close(fd);
    }
    errno = err;
    return -1;
}

/*
 * client_lasts() - may the answer to @command take longer than others?
 * @time:  becomes the seconds that the client waits for it; 0: any time
 */
static bool client_lasts(const char *command, time_t *time)
{
    char line[MON_LINE_MAX], *args, *name;
    Wait w;
    Error err;

    snprintf(line, sizeof(line), "%s", command);
    name = cut_word(line, " \t", &args);
    *time = ANSWER_TIME;
    if (strcmp(name, "watch") == 0 || strcmp(name, "reload") == 0) {
        *time = 0;
        return true;
    }
    if (strcmp(name, "wait") == 0 && wait_parse(&w, args, &err)) {
        *time += (time_t)(w.until / SECOND);
        return true;
    }
    return false;
}

/* client_patient() - wait @time for an answer from @fd, once it has greeted */
static bool client_patient(int fd, time_t time)
{
    const struct timeval most = { .tv_sec = time };
    char c;

    return recv(fd, &c, 1, MSG_PEEK) >= 0 &&
           setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most)) == 0;
}

/* is_status() - does @line end an answer? */
static bool is_status(const char *line)
{
    return strcmp(line, "ok\n") == 0 || strncmp(line, "error: ", 7) == 0;
}

/* Room for a line: "error: " and an Error fit. */
#define ANSWER_LINE (sizeof(Error) + 32)

/*
 * client_print() - print the answer that comes through @f, but its last line
 * @lasts:  print it as it comes, up to the first line that ends an answer
 * @last:   ANSWER_LINE bytes; becomes the last line
 */
static void client_print(FILE *f, bool lasts, char *last)
{
    char line[ANSWER_LINE];
    bool begins = true, more = true;

    last[0] = '\0';
    while (more && fgets(line, sizeof(line), f) != NULL) {
        size_t greeting = strlen(MON_PROMPT); /* before the first line */

        fputs(last, stdout);
        greeting = strncmp(line, MON_PROMPT, greeting) == 0 ? greeting : 0;
        snprintf(last, ANSWER_LINE, "%s", line + greeting);
        if (lasts && begins && is_status(last)) {
            more = false;
        } else if (lasts) {
            fputs(last, stdout);
            last[0] = '\0';
            more = fflush(stdout) == 0;
        }
        begins = strchr(line, '\n') != NULL;
    }
}

/*
 * monitor_client() - have @command executed; returns the exit status
 *
 * The last line of the answer says how it went.  It is shown only if that is
 * an error.  The monitor sees when we go while an answer lasts, because our
 * side stays open.
 */
static int monitor_client(const char *path, const char *command)
{
    FILE *f = NULL;
    time_t time;
    bool lasts = client_lasts(command, &time);
    char last[ANSWER_LINE];
    Error err;
    int fd;

    if (!spec_parse(&monitor_spec, 'm', path, &err)) {
        fprintf(stderr, "qemu-vp: %s\n", err.text);
        return 2;
    }
    if (monitor_spec.inherited) {
        fprintf(stderr, "qemu-vp: -m '%s': -x needs the path of the socket\n",
                path);
        return 2;
    }
    fd = client_connect(monitor_spec.addr, ANSWER_TIME);
    if (fd < 0 || (lasts && !client_patient(fd, time)) ||
        (f = fdopen(fd, "r+")) == NULL) {
        fprintf(stderr, "qemu-vp: -m '%s': %s\n", path, client_wrong());
        if (fd >= 0) {
            close(fd);
        }
        return 1;
    }
    fprintf(f, "batch\n%s\n", command);
    fflush(f);
    if (!lasts) {
        shutdown(fd, SHUT_WR);
    }
    client_print(f, lasts, last);
    if (ferror(f)) {
        fflush(stdout);
        fprintf(stderr, "qemu-vp: -m '%s': %s\n", path, client_wrong());
        fclose(f);
        return 1;
    }
    fclose(f);
    if (strcmp(last, "ok\n") == 0 || ferror(stdout)) {
        return stdout_status();
    }
    fflush(stdout);
    fprintf(stderr, "qemu-vp: %s", last[0] != '\0' ? last : "no answer\n");
    return 1;
}

/* ======================================================================
 * dial
 *
 * -W is the client of an oforward '*': it says which service it wants, waits
 * until that has accepted, and is a pipe from then on, of two processes that
 * copy one direction each.
 * ====================================================================== */

/* Bytes that are copied at a time. */
#define COPY_LEN 65536

/* dial_copy() - all that comes from @from goes to @to; false: one has failed */
static bool dial_copy(int from, int to)
{
    static char buf[COPY_LEN];
    ssize_t n;

    while ((n = read(from, buf, sizeof(buf))) > 0) {
        for (ssize_t done = 0; done < n;) {
            ssize_t part = write(to, buf + done, (size_t)(n - done));

            if (part < 0) {
                return false;
            }
            done += part;
        }
    }
    return n == 0;
}

/* dial_join() - join stdin and stdout to @fd; returns the exit status */
static int dial_join(int fd)
{
    pid_t child = fork();
    bool ok;

    if (child == 0) {
        dial_copy(STDIN_FILENO, fd);
        shutdown(fd, SHUT_WR);
        _exit(0);
    }
    if (child < 0) {
        fprintf(stderr, "qemu-vp: -W: fork: %s\n", strerror(errno));
        return 1;
    }
    ok = dial_copy(fd, STDOUT_FILENO);
    if (!ok) {
        fprintf(stderr, "qemu-vp: -W: %s\n", strerror(errno));
    }
    kill(child, SIGTERM); /* because stdin may stay open for ever */
    waitpid(child, NULL, 0);
    return ok ? 0 : 1;
}

/* dial_pass() - give @fd to who has the other end of stdout, a unix socket */
static int dial_pass(int fd)
{
    char byte = 0;
    struct iovec iov = { &byte, 1 };
    union {
        struct cmsghdr header; /* for its alignment */
        char room[CMSG_SPACE(sizeof(fd))];
    } control = { .room = { 0 } };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *header = CMSG_FIRSTHDR(&msg);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(fd));
    memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    if (sendmsg(STDOUT_FILENO, &msg, 0) < 0) {
        fprintf(stderr, "qemu-vp: -F: stdout takes no descriptor: %s\n",
                strerror(errno));
        return 1;
    }
    return 0;
}

/* dial_ask() - is @fd a connection to @service_id now? */
static bool dial_ask(int fd, const char *service_id)
{
    char line[16];
    size_t len = 0;

    if (dprintf(fd, "CONNECT %s\n", service_id) < 0) {
        return false;
    }
    /* byte by byte, because what follows the newline is not ours */
    while (len < sizeof(line) && read(fd, line + len, 1) == 1 &&
           line[len] != '\n') {
        len++;
    }
    return len > 3 && len < sizeof(line) && memcmp(line, "OK ", 3) == 0;
}

static Spec dial_spec; /* of -W */

/* dial() - what -W does; returns the exit status */
static int dial(const char *text, bool pass)
{
    Error err;
    int fd, status = 1;

    if (!spec_parse(&dial_spec, 'W', text, &err)) {
        fprintf(stderr, "qemu-vp: %s\n", err.text);
        return 2;
    }
    fd = client_connect(dial_spec.addr, 0);
    if (fd < 0) {
        fprintf(stderr, "qemu-vp: -W '%s': %s\n", text, strerror(errno));
    } else if (!dial_ask(fd, dial_spec.service_id)) {
        fprintf(stderr, "qemu-vp: -W '%s': refused: there is no channel, no "
                "such service, or its target does not accept\n", text);
    } else {
        status = pass ? dial_pass(fd) : dial_join(fd);
    }
    spec_free(&dial_spec);
    return status;
}

/* ======================================================================
 * daemon
 *
 * What is done once.  start() has its order: what needs privileges comes before
 * USER does, and nobody is told that the daemon is ready before all is open.
 * ====================================================================== */

static int ready_fd = -1; /* the parent waits at its other end */

/*
 * standard_fds() - open stdin, stdout and stderr if they are closed
 *
 * Else sockets would get these numbers, and be logged to.
 */
static void standard_fds(void)
{
    int fd;

    do {
        fd = null_open();
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) {
        close(fd);
    }
}

/* daemonize() - go on as a child; the parent ends when that is ready */
static bool daemonize(Error *err)
{
    int fds[2];
    pid_t pid;
    char ok;

    inherited_high_close();
    if (pipe(fds) < 0) {
        return error_set(err, "cannot make a pipe: %s", strerror(errno));
    }
    pid = fork();
    if (pid < 0) {
        return error_set(err, "cannot fork: %s", strerror(errno));
    }
    if (pid > 0) {
        ssize_t n;

        close(fds[1]);
        do {
            n = read(fds[0], &ok, 1);
        } while (n < 0 && errno == EINTR);
        _exit(n == 1 ? 0 : 1); /* the child has said why */
    }
    close(fds[0]);
    ready_fd = fds[1];
    setsid();
    return true;
}

/* daemon_ready() - all is open: let go of the terminal and of the parent */
static void daemon_ready(void)
{
    ssize_t n;

    null_at(STDIN_FILENO, STDERR_FILENO);
    inherited_close();
    n = write(ready_fd, "", 1);
    (void)n; /* because nothing changes for us if the parent was killed */
    close(ready_fd);
    ready_fd = -1;
}

/* ---- pid file and user ------------------------------------------------ */

/* The owners of a pid file may replace it so often while we try to lock it. */
#define PIDFILE_TRIES 10

static int pidfile_fd = -1; /* kept, because closing it lets go of the lock */

/* pidfile_at() - is what @fd has open still the file at @path? */
static bool pidfile_at(const char *path, int fd)
{
    struct stat at, open_one;

    return stat(path, &at) == 0 && fstat(fd, &open_one) == 0 &&
           at.st_dev == open_one.st_dev && at.st_ino == open_one.st_ino;
}

/*
 * pidfile_lock() - open and lock the file; returns it, or -1: see @err
 *
 * The lock, and not the file, tells whether the file's owner lives.
 */
static int pidfile_lock(const char *path, Error *err)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    int fd = open(path, O_RDWR | O_CREAT, 0644);

    if (fd < 0) {
        error_set(err, "--pidfile '%s': %s", path, strerror(errno));
        return -1;
    }
    if (fcntl(fd, F_SETLK, &lock) == 0) {
        return fd;
    }
    lock.l_type = F_WRLCK;
    if (fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK) {
        if (lock.l_pid > 0) {
            error_set(err, "--pidfile '%s': process %ld holds it", path,
                      (long)lock.l_pid);
        } else {
            error_set(err, "--pidfile '%s': a process of another pid "
                      "namespace, or of another machine, holds it", path);
        }
    } else {
        error_set(err, "--pidfile '%s': cannot be locked", path);
    }
    close(fd);
    return -1;
}

/* pidfile_take() - lock the file and write our process id to it */
static bool pidfile_take(const char *path, Error *err)
{
    char text[24];
    int len = snprintf(text, sizeof(text), "%ld\n", (long)getpid());
    int fd = pidfile_lock(path, err);

    /* its last owner may just have removed what we have opened */
    for (int i = 0; fd >= 0 && !pidfile_at(path, fd); i++) {
        close(fd);
        if (i == PIDFILE_TRIES) {
            return error_set(err, "--pidfile '%s': others replace it", path);
        }
        fd = pidfile_lock(path, err);
    }
    if (fd < 0) {
        return false;
    }
    if (ftruncate(fd, 0) < 0 || write(fd, text, (size_t)len) != len) {
        error_set(err, "--pidfile '%s': %s", path, strerror(errno));
        close(fd);
        return false;
    }
    pidfile_fd = fd;
    return true;
}

/* pidfile_drop() - remove the file, emptied, as it may be a link that goes */
static void pidfile_drop(void)
{
    const char *path = settings.pidfile;
    bool emptied = pidfile_fd >= 0 && ftruncate(pidfile_fd, 0) == 0;

    if (pidfile_fd >= 0 &&
        (!pidfile_at(path, pidfile_fd) || unlink(path) < 0) && !emptied) {
        log_at(VP_LOG_WARN, VP_NO_CHANNEL, "--pidfile '%s' is left: %s", path,
               strerror(errno));
    }
}

/* groups_take() - those that @u is in, and no others; POSIX can't do that */
static int groups_take(const User *u)
{
#ifdef HAVE_INITGROUPS
    return u->name != NULL ? initgroups(u->name, u->gid) : setgroups(0, NULL);
#else
    (void)u;
    errno = ENOSYS;
    return -1;
#endif
}

/* user_prepare() - USER is to own what is made before we are USER */
static bool user_prepare(const char *name, Error *err)
{
    User u;

    if (!user_find(name, &u)) {
        return error_set(err, "--user '%s': expected the name of a user, or "
                         "a number", name);
    }
    if (geteuid() == 0) { /* else we can't give anything away */
        files_uid = u.uid;
        files_gid = u.gid;
    }
    return true;
}

static bool user_become(const char *name, Error *err)
{
    User u;

    if (!user_find(name, &u)) {
        return error_set(err, "--user '%s': there is none of that name any "
                         "more", name);
    }
    if (groups_take(&u) < 0 || setgid(u.gid) < 0 || setuid(u.uid) < 0) {
        return error_set(err, "--user '%s': %s", name, strerror(errno));
    }
    return true;
}

/* ---- signals ---------------------------------------------------------- */

static int signal_pipe[2]; /* a byte is the number of a signal */

static void on_signal(int sig)
{
    int saved = errno;
    char byte = (char)sig;
    ssize_t n = write(signal_pipe[1], &byte, 1);

    (void)n; /* because a full pipe has enough signals to be seen */
    errno = saved;
}

static void signal_ready(void *opaque, int fd, int events)
{
    char sigs[16];
    ssize_t n = read(fd, sigs, sizeof(sigs));

    (void)opaque;
    (void)events;
    for (ssize_t i = 0; i < n; i++) {
        if (sigs[i] == SIGHUP) {
            reload();
        } else if (sigs[i] == SIGUSR1) {
            log_status();
        } else {
            log_at(VP_LOG_INFO, VP_NO_CHANNEL, "ending on signal %d", sigs[i]);
            quit_start();
        }
    }
}

/* signals_settle() - those that we don't catch, whatever our starter left */
static void signals_settle(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* else a log at its limit would end us */
    signal(SIGTTOU, SIG_IGN); /* else our own terminal would stop us */
    signal(SIGCHLD, SIG_DFL); /* else a child's pid could be another's soon */
}

/* signals_start() - catch them, and take those that our starter blocked */
static bool signals_start(Error *err)
{
    static const int caught[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1 };
    /* a wait for a child that was killed goes on, else it stays a zombie */
    struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
    sigset_t none;
    int rc;

    if (pipe(signal_pipe) < 0 ||
        fcntl(signal_pipe[0], F_SETFL, O_NONBLOCK) < 0 ||
        fcntl(signal_pipe[1], F_SETFL, O_NONBLOCK) < 0) {
        return error_set(err, "cannot make a pipe: %s", strerror(errno));
    }
    rc = vp_watch(loop, signal_pipe[0], signal_ready, NULL);
    if (rc < 0) {
        return error_set(err, "cannot watch a pipe: %s", strerror(-rc));
    }
    vp_watch_set(loop, signal_pipe[0], VP_READ);
    for (size_t i = 0; i < COUNT(caught); i++) {
        sigaction(caught[i], &sa, NULL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    return true;
}

/* ---- as init ---------------------------------------------------------- */

static pid_t init_child; /* the daemon, of which this process is the parent */

static void init_signal(int sig)
{
    int saved = errno;

    kill(init_child, sig);
    errno = saved;
}

/*
 * init_split() - as process 1 stay init, and let a child be the daemon
 *
 * Else nobody would wait for the orphans that become ours in a container.
 * Returns in the child only.
 */
static void init_split(void)
{
    static const int passed[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1 };
    struct sigaction sa = { .sa_handler = init_signal };
    sigset_t all, was;
    int status = 0;
    pid_t pid;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &was); /* until there is a child to tell */
    init_child = fork();
    if (init_child <= 0) {
        sigprocmask(SIG_SETMASK, &was, NULL);
        return; /* without a child it is all one */
    }
    for (size_t i = 0; i < COUNT(passed); i++) {
        sigaction(passed[i], &sa, NULL);
    }
    sigemptyset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    do {
        pid = waitpid(-1, &status, 0);
    } while (pid != init_child && (pid >= 0 || errno == EINTR));
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

/* ---- start and end ---------------------------------------------------- */

/*
 * Descriptors that are kept for the program: one for a client of the monitor,
 * two for a lookup's pipe, one for syslog, one for a file that is read or
 * opened anew, and one to spare.
 */
#define PROGRAM_FDS 6

/* descriptors_raise() - raise the limit to the hard one */
static void descriptors_raise(void)
{
    struct rlimit lim;

    if (getrlimit(RLIMIT_NOFILE, &lim) < 0) {
        return;
    }
#ifdef __APPLE__
    /* more is refused, whatever the hard limit is */
    lim.rlim_max = lim.rlim_max < OPEN_MAX ? lim.rlim_max : OPEN_MAX;
#endif
    if (lim.rlim_cur < lim.rlim_max) {
        rlim_t soft = lim.rlim_cur;

        lim.rlim_cur = lim.rlim_max;
        lim.rlim_cur = setrlimit(RLIMIT_NOFILE, &lim) == 0 ? lim.rlim_max
                                                           : soft;
    }
    vp_loop_descriptors(loop, lim.rlim_cur < INT_MAX ? (size_t)lim.rlim_cur
                                                     : INT_MAX, PROGRAM_FDS);
}

/* descriptors_check() - are there enough, now that all is open? */
static bool descriptors_check(Error *err)
{
    VPDescriptors fds = vp_descriptors(loop);
    int lowest = null_open(); /* all below are in use */
    size_t taken = fds.kept + (size_t)lowest, left;

    if (lowest >= 0) {
        close(lowest);
    }
    left = lowest >= 0 && taken < fds.max ? fds.max - taken : 0;
    if (left == 0) {
        return error_set(err, "the limit of %zu descriptors leaves none for "
                         "connections (ulimit -n, LimitNOFILE)", fds.max);
    }
    if (left < settings.config.max_conns) {
        log_at(VP_LOG_WARN, VP_NO_CHANNEL, "the limit of %zu descriptors "
               "leaves %zu for connections, fewer than --max-conns (ulimit "
               "-n, LimitNOFILE)", fds.max, left);
    }
    return true;
}

/* start_option() - do with @take what option @opt asks for, if it was given */
static bool start_option(int opt, const char *value,
                         bool (*take)(const char *, Error *), Error *err)
{
    return value == NULL || take(value, err) ||
           option_error(&settings, opt, err);
}

/* How long the start waits for names to listen on. */
#define START_TIME (10 * SECOND)

static void start_late(void *opaque)
{
    (void)opaque;
    vp_loop_stop(loop);
}

/*
 * start_names() - serve while the names to listen on are looked up
 *
 * That takes START_TIME at most.  So whoever waits for the start hears of a
 * port that is in use, and what needs privileges is done before they go.
 */
static bool start_names(Error *err)
{
    VPTimer timer = { .link = NULL };

    if (starting.names > 0) {
        vp_timer_start(loop, &timer, START_TIME, start_late, NULL);
        vp_loop_run(loop);
        vp_timer_stop(&timer);
    }
    starting.waits = false;
    lock_tries = 1;
    *err = starting.err;
    return !starting.failed;
}

/* start() - open everything; false if anything can't be opened */
static bool start(Error *err)
{
    Settings *s = &settings;

    loop = vp_loop_new(log_engine, &log_level);
    if (loop == NULL) {
        return errno == ENOMEM ? error_memory(err)
               : errno == ENOSYS ? error_set(err, "select() takes descriptors "
                                             "in an order that is not known")
               : error_set(err, "no random numbers: neither getrandom() nor "
                           "/dev/urandom works: %s", strerror(errno));
    }
    descriptors_raise();
    started_at = vp_loop_now(loop);
    if (!log_open(settings_log(s), err)) {
        return option_error(s, 'l', err);
    }
    log_check();
    if (!signals_start(err) ||
        !start_option('f', s->pidfile, pidfile_take, err) ||
        !start_option('u', s->user, user_prepare, err) ||
        !apply(NULL, s, err) ||
        !start_option('m', s->monitor, monitor_start, err) ||
        !start_names(err)) {
        return false;
    }
    if (stopped || quitting) {
        return true; /* somebody has told us to */
    }
    if (!descriptors_check(err) ||
        !start_option('u', s->user, user_become, err)) {
        return false;
    }
    inherited_check();
    if (channels == NULL) {
        log_at(VP_LOG_INFO, VP_NO_CHANNEL, "no channel yet: the monitor can "
               "add one; -m %s -x COMMAND talks to it", s->monitor);
    }
    if (s->daemonize) {
        daemon_ready();
    }
    notify("READY=1");
    return true;
}

/* end_all() - tell the other sides, put serial lines back, close it all */
static void end_all(void)
{
    monitor_end();
    while (channels != NULL) {
        channel_del(channels);
    }
    for (uint64_t t = 0; ttys_unsent() && t < GOODBYE_TIME;
         t += GOODBYE_STEP) {
        poll(NULL, 0, GOODBYE_STEP / MS);
    }
    ttys_close(0);
}

/* clean_up() - the files that are ours; also when start() failed */
static void clean_up(void)
{
    socket_files_remove();
    pidfile_drop();
}

int main(int argc, char **argv)
{
    Text dump = { .data = NULL };
    Error err;
    int rc;

    inherited_find();
    standard_fds();
    signals_settle();
    if (getpid() == 1) {
        init_split();
    }
    saved_argc = argc;
    saved_argv = argv;
    if (!settings_read(&settings, argc, argv, &err)) {
        fail(2, &err);
    }
    if (settings.execute != NULL) {
        return monitor_client(settings.monitor, settings.execute);
    }
    if (settings.dial != NULL) {
        return dial(settings.dial, settings.pass);
    }
    if (settings.dump_config) {
        settings_print(&dump, &settings);
        return text_print(&dump);
    }
    log_level = (VPLogLevel)settings.level;
    if (settings.daemonize && !daemonize(&err)) {
        fail(1, &err);
    }
    atexit(clean_up);
    if (!start(&err)) {
        end_all();
        fail(1, &err);
    }
    rc = stopped ? 0 : vp_loop_run(loop);
    if (rc == 0 && exit_status != 0) {
        quit_start(); /* no channel is left, but what came may be queued */
        rc = vp_loop_run(loop);
    }
    if (rc < 0) {
        log_at(VP_LOG_ERROR, VP_NO_CHANNEL, "select: %s", strerror(-rc));
        exit_status = 1;
    }
    end_all();
    vp_unwatch(loop, signal_pipe[0]);
    vp_loop_free(loop);
    return exit_status;
}
