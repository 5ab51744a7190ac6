/*
 * virtproxy - many socket streams over one channel between host and guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Theory of operation
 * ===================
 *
 * Two copies of this engine talk over one byte channel.  Each accepts
 * connections for its oforwards and has the other connect them to its
 * iforwards.  The engine parses no options, opens no device, listener or log,
 * and looks up no name: the program does (qemu-vp.c), and hands descriptors
 * and addresses over through virtproxy.h.
 *
 * Rooms.  Each begins with its theory and its structures, and uses only what
 * stands above it: what it has to tell those below goes through a table of
 * functions that they hand up (VPLinkOps, VPConnOps).
 *
 *   tools     ring of nodes, big-endian integers, random numbers, shares,
 *             addresses
 *   loop      select(), descriptors, timers, the log; a listener, a dialler
 *   key       SHA-256, HMAC, the proof of a key
 *   wire      what a packet looks like; the check that covers it
 *   store     packets that are not acked
 *   flow      how much may be on its way
 *   link      an ordered, exactly-once packet stream of an unreliable channel
 *   sched     whose turn it is to fill the channel
 *   conn      local sockets: two half machines and one life each; credit
 *   forwards  listeners (oforward), targets (iforward), limits, what is offered
 *   driver    one channel: run, attach, offer, grace, info, end
 *
 * The way of a byte that a client sends, and of its ack back:
 *
 *   conn_ready()        select() found the client's socket readable
 *   sched_ready()       its connection waits for its turn
 *   driver_run()        the end of the pass
 *   conns_fill()        control messages first, then whose turn it is
 *   conn_read()         readv() into the send store, cut into packets
 *   link_add()          check and sequence number
 *   link_flush()        link_gather() finishes headers, writev() to the channel
 *       - - - the channel, and the peer's engine: - - -
 *   link_read()         read() from the channel
 *   link_parse_up()     header, order, check; link_acked() for what it acks
 *   link_deliver()      VPLinkOps.packet(), which is
 *   conns_packet()      conn_handle_data(): credit, then batch_add()
 *   conn_write()        writev() to the target's socket; the rest is buffered
 *   conn_credit()       a WINDOW is due, as the socket took the bytes
 *   link_ack_due()      ... is true at the end of some pass
 *   link_gather()       puts the ack in a header that goes out anyway, or
 *   link_put_ctl()      sends a bare ACK
 *       - - - back here: - - -
 *   link_acked()        store_release(): it needn't be sent again
 *   flow_acked()        what that says of the channel's speed
 *
 * Timers, and what each is for:
 *
 *   loop      VPListener.pause  listen again: no descriptor, or a rest is over
 *             dial_timer        give up, repeat or add attempts to connect
 *   link      hello_timer       the next HELLO; no answer: connect anew
 *             ack_timer         an ack is due (10 ms)
 *             ping_timer        a tail may be lost (20 ms on); we live (5 s)
 *             away_timer        AWAY: look again; DUMB: give up
 *             rest_timer        go on, after much work for this peer
 *             trim_timer        give memory back (2 s)
 *   conn      sweep_timer       resets of sockets that nobody reads (1 s)
 *             idle_timer        the one that moved no data longest is reset
 *             end_timer         ENDING: all is delivered, or its time is over
 *   forwards  offer_timer       is what oforwards ask for offered? (1 s)
 *             caller_timer      a client hasn't said what it wants (10 s)
 *   driver    grace_timer       connections without a channel are reset
 *             VPCandidate.timer a further peer's hello, the present one's PING
 *
 * Words used here:
 *
 *   session    what two engines share from a handshake on; it survives the
 *              loss of the channel, and names of connections belong to it
 *   token      random number by which a handshake knows its answer
 *   epoch      the token by which a side names the session
 *   claim      what a side says of itself in HELLO: session, numbers, digest
 *   digest     a number made of all packets so far; tells what numbers can't
 *   in flight  handed to the channel, not acked
 *   credit     bytes that a connection's peer may still send
 *   window     bytes of credit given in advance
 *   turn       the right to fill the next packets; quantum: how many bytes
 *   grace      how long connections outlive their channel
 *   account    limits and counts of one forward's connections
 *   work       time that what is done for a channel takes, ns, as reckoned
 *   bulk       bytes that local sockets give and take
 *   candidate  a further connection of a channel that is in use, made by a
 *              peer, or by us because the present one is stale
 *
 * The bound on a driver's memory is in the driver's room.
 */
#include "virtproxy.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#ifdef HAVE_VSOCK
#include <linux/vm_sockets.h>
#endif
#ifdef HAVE_MALLOC_TRIM
#include <malloc.h>
#endif
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif
#include <sys/ioctl.h>
#ifdef HAVE_GETRANDOM
#include <sys/random.h>
#endif
#include <sys/select.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if defined(__GNUC__) && defined(__x86_64__)
#define VP_VECTORS /* gcc's and clang's, for the check */
#include <immintrin.h>
#endif

/* ======================================================================
 * tools
 *
 * What needs no loop: a ring of nodes, big-endian integers, a mixing function,
 * random numbers, who may have a share, what is said once, addresses as text.
 * ====================================================================== */

#define US 1000u /* of work, in ns */
#define MS 1000ull /* of time, in us, as a second is */
#define SECOND 1000000ull

/* Room for vp_addr_str() of any address: a unix socket's path is longest. */
#define VP_ADDR_STR_LEN 128
/* Room for why a channel or a peer is of no use; what is longer is cut. */
#define VP_WHY_LEN 128

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#define container_of(ptr, type, member) \
    ((type *)(void *)((char *)(ptr) - offsetof(type, member)))

static void node_init(VPNode *node)
{
    node->prev = node->next = node;
}

static bool node_linked(const VPNode *node)
{
    return node->next != node;
}

static void node_remove(VPNode *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node_init(node);
}

static void node_append(VPNode *ring, VPNode *node)
{
    node->prev = ring->prev;
    node->next = ring;
    ring->prev->next = node;
    ring->prev = node;
}

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, (uint16_t)(v >> 16));
    put16(p + 2, (uint16_t)v);
}

static void put64(uint8_t *p, uint64_t v)
{
    put32(p, (uint32_t)(v >> 32));
    put32(p + 4, (uint32_t)v);
}

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static uint64_t get64(const uint8_t *p)
{
    return (uint64_t)get32(p) << 32 | get32(p + 4);
}

/* mix64() - a bijection that leaves no bit where it was (Stafford's 13th) */
static uint64_t mix64(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

uint64_t vp_clock(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec / 1000;
}

/* random_draw() - false, and errno, if the system gives no random numbers */
static bool random_draw(uint64_t *r)
{
    static int fd = -1; /* kept: later there may be no descriptor left */

#ifdef HAVE_GETRANDOM
    /* early in a boot it may have to wait, which we never do */
    if (getrandom(r, sizeof(*r), GRND_NONBLOCK) == (ssize_t)sizeof(*r)) {
        return true;
    }
#endif
    if (fd < 0) {
        fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    }
    return fd >= 0 && read(fd, r, sizeof(*r)) == (ssize_t)sizeof(*r);
}

static uint64_t random_draws; /* of random64(), so far */

/* random64() - never 0; vp_loop_new() saw that there are random numbers */
static uint64_t random64(void)
{
    struct timespec ts = { 0 };
    uint64_t r = 0;

    random_draw(&r);
    /* a guest thrown back in time would draw the same numbers again */
    clock_gettime(CLOCK_REALTIME, &ts);
    r ^= mix64((uint64_t)ts.tv_sec << 32 ^ (uint64_t)ts.tv_nsec);
    r += mix64((uint64_t)getpid() << 32 ^ ++random_draws);
    return r != 0 ? r : 1;
}

const char *vp_versions(unsigned oldest, unsigned newest, char *buf)
{
    if (oldest == newest) {
        snprintf(buf, VP_VERSIONS_LEN, "%u", newest);
    } else {
        snprintf(buf, VP_VERSIONS_LEN, "%u to %u", oldest, newest);
    }
    return buf;
}

/* Beyond its share one may have so many times what is still free. */
#define VP_SHARE_EAGER 4

/*
 * share_allows() - may one that has @has have another, of @room for @parts
 * @used:  by all of them
 */
static bool share_allows(size_t has, size_t room, size_t parts, size_t used)
{
    size_t unused = room - MIN(used, room);

    return has < room / MAX(parts, 1) || has < VP_SHARE_EAGER * unused;
}

bool vp_once(VPOnce *once, uintptr_t what, uint64_t now, uint64_t again)
{
    bool news = !once->said || what != once->what ||
                (again != 0 && now - once->at >= again);

    if (news) {
        *once = (VPOnce){ .said = true, .what = what, .at = now };
    }
    return news;
}

bool vp_service_id_ok(const char *id, size_t len)
{
    if (len == 0 || len > VP_SERVICE_ID_LEN) {
        return false;
    }
    for (size_t i = 0; i < len; i++) {
        if (id[i] <= ' ' || id[i] > '~' || id[i] == ':') {
            return false;
        }
    }
    return true;
}

bool vp_addr_is_local(const VPAddr *addr)
{
    const struct sockaddr_in6 *in6 = (const void *)&addr->ss;
    const struct sockaddr_in *in = (const void *)&addr->ss;

    switch (addr->ss.ss_family) {
    case AF_INET:
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    case AF_INET6:
        return IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr) ||
            (IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr) &&
             in6->sin6_addr.s6_addr[12] == 127);
#ifdef HAVE_VSOCK
    case AF_VSOCK:
        return ((const struct sockaddr_vm *)&addr->ss)->svm_cid ==
               VMADDR_CID_LOCAL;
#endif
    default:
        return true;
    }
}

/* addr_unmap() - make an IPv4 client of an IPv6 socket one of IPv4 */
static void addr_unmap(VPAddr *addr)
{
    const struct sockaddr_in6 in6 = *(const struct sockaddr_in6 *)&addr->ss;
    struct sockaddr_in *in = (void *)&addr->ss;

    if (addr->ss.ss_family == AF_INET6 &&
        IN6_IS_ADDR_V4MAPPED(&in6.sin6_addr)) {
        memset(addr, 0, sizeof(*addr));
        addr->len = sizeof(*in);
        in->sin_family = AF_INET;
        in->sin_port = in6.sin6_port;
        memcpy(&in->sin_addr, &in6.sin6_addr.s6_addr[12], 4);
    }
}

const char *vp_addr_str(const VPAddr *addr, char *buf, size_t size)
{
    VPAddr plain = *addr;
    char host[INET6_ADDRSTRLEN + 20], port[8];

    addr_unmap(&plain);
    addr = &plain;
    if (addr->len == 0) {
        snprintf(buf, size, "a closed socket");
    } else if (addr->ss.ss_family == AF_UNIX) {
        const struct sockaddr_un *sun = (const void *)&addr->ss;

        if (addr->len <= offsetof(struct sockaddr_un, sun_path) + 1) {
            snprintf(buf, size, "a unix socket");
        } else if (sun->sun_path[0] == '\0') {
            snprintf(buf, size, "@%.*s",
                     (int)(addr->len - offsetof(struct sockaddr_un, sun_path) -
                           1), sun->sun_path + 1);
        } else {
            snprintf(buf, size, "%.*s",
                     (int)(addr->len - offsetof(struct sockaddr_un, sun_path)),
                     sun->sun_path);
        }
#ifdef HAVE_VSOCK
    } else if (addr->ss.ss_family == AF_VSOCK) {
        const struct sockaddr_vm *vm = (const void *)&addr->ss;

        snprintf(host, sizeof(host), "%u", vm->svm_cid);
        snprintf(buf, size, "vsock:%s:%u",
                 vm->svm_cid == VMADDR_CID_ANY ? "any" : host, vm->svm_port);
#endif
    } else if (getnameinfo((const struct sockaddr *)&addr->ss, addr->len,
                           host, sizeof(host), port, sizeof(port),
                           NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
        snprintf(buf, size, "an unknown address");
    } else if (addr->ss.ss_family == AF_INET6) {
        snprintf(buf, size, "[%s]:%s", host, port);
    } else {
        snprintf(buf, size, "%s:%s", host, port);
    }
    return buf;
}

/* ======================================================================
 * loop
 *
 * One pass: the tasks (what is to be done before the loop may sleep; each
 * driver is one), select(), the handlers of what is ready, the timers that are
 * due.  The clock is read once a pass.
 *
 * What is wanted of each descriptor lives in bit maps that change when a
 * state changes and are copied for each select().  Its cost follows the
 * number of bits set: some 0.1 us each, and three times that if it sleeps.  So
 * where there are many, select() itself watches only the hot ones: those that
 * were active lately, or whose state has changed.  The others are cold, and
 * there are two ways to learn of them:
 *
 *   epoll   They are in an epoll descriptor, which is one bit for select().
 *           What it reports is hot from then on.  A descriptor that epoll
 *           refuses, as that of a file, stays hot.
 *   looks   Without epoll, select() looks at all of them now and then, and
 *           sleeps on the hot ones meanwhile.  Each look that finds nothing
 *           doubles the time to the next, until looks take a few thousandths of
 *           the time.  When none is hot any more the loop sleeps on all.
 *
 * A descriptor becomes cold when it was not active between one round of
 * loop_cool() and the next.  The rounds with epoll are short, since it costs
 * little to be cold; they are no reason to wake up.
 *
 * The maps are our own and grow past FD_SETSIZE, which POSIX allows a system
 * to refuse but Linux and the BSDs take; FD_SET() itself must not be used,
 * for glibc's aborts at 1024 when fortified, whatever the object's size.  Where
 * a big-endian system with words of 64 bits has fd_sets of 32, the halves of
 * each word are exchanged around select(); vp_loop_new() looks at what FD_SET()
 * does, and refuses any other order.
 *
 * Descriptors are a budget, vp_loop_descriptors(), because a channel that is
 * cut has to get one again while clients wait for any that is free.  The kernel
 * gives the lowest free number, so a number among the highest tells that all
 * below are in use: these, as many as the program and the channels keep, are
 * never a connection's.  What is left is shared out: a channel may have its
 * equal share, and beyond that VP_SHARE_EAGER times as many as are still free.
 * So others use what a quiet channel leaves, never all of it, and give it back
 * as their connections end.
 *
 * Time is a budget as well.  What is done for a channel is counted as work,
 * with the time that it takes where nobody is in the way (VP_WORK_...), since
 * the clock would count what others do with the processor.  In a pass each
 * channel has a portion, so that none waits long for its turn.  Bulk, which is
 * bytes that local sockets give and take, is all that a channel may fill the
 * time with while others work: for the rest, which is what a hostile peer can
 * have us do without end, it has the part of the time that the others leave
 * twice, and 1 / VP_SHARE_PARTS at least; then it rests (link_owes()).  So one
 * that works alone has all of it, and one beside a bulk stream hardly slows it.
 * What others had lately counts for a while, as a stream that is held up by its
 * own ends goes on soon.  What local clients make us do neither takes from what
 * is read of the channel in a pass nor keeps it from being read between two
 * rests, else a local flood would have the channel stand still.
 *
 * What one event may ask for thousands of times, as the end of a session does
 * that had as many connections, is done a portion in each pass, among others by
 * conns_reap(), conns_drop(), sweep_timer(), end_timer(), idle_timer() and
 * dial_timer().
 *
 * A listener accepts for its owner and looks away for VP_ACCEPT_PAUSE when
 * there is no descriptor left, because it stays readable and the loop would
 * spin.  That of a channel does so for VP_OFFER_REST after each one that comes,
 * because whoever can reach it may come and go as fast as we accept.
 *
 * A dialler tries the addresses of a target, first the one that worked last;
 * when an address hasn't answered after VP_CONNECT_NEXT the next one is tried
 * beside it, as RFC 8305 has it, and the first to accept wins.  All diallers of
 * a loop share one timer, which looks for those that take too long.
 *
 * Lines that a peer or a client can cause go through log_provoked(), which lets
 * so many of them pass per span of time; else they could fill the disk.  What
 * is an event as well goes through log_event(): who follows events is told all
 * of them, because he has a bound of his own.
 * ====================================================================== */

#define WORD_BITS (sizeof(unsigned long) * CHAR_BIT)

/* Up to so many descriptors none becomes cold. */
#define VP_HOT_ALWAYS 64
/* From one round of loop_cool() to the next: with epoll; */
#define VP_COOL_US (4 * MS)
/* without epoll, unless more than VP_HOT_ALWAYS are hot. */
#define VP_HOT_US (5 * SECOND)
/*
 * Without epoll, from one look at all descriptors to the next, for each of
 * them: after a look that found a cold one ready, or too many hot ones; and at
 * most.
 */
#define VP_LOOK_SOON_US 8
#define VP_LOOK_MAX_US 128
/* Cold descriptors that are taken note of in one pass. */
#define VP_COLD_BATCH 64

/* Accepted in a row: other descriptors have their turn after that. */
#define VP_ACCEPT_BATCH 16
#define VP_ACCEPT_PAUSE (200 * MS)

/* A channel has one; so has its lookup, a further peer, a FIFO, or a line. */
#define VP_FDS_CHANNEL 2

/* For all addresses of a target. */
#define VP_CONNECT_TIMEOUT (10 * SECOND)
/* From an attempt that isn't answered to one at the next address. */
#define VP_CONNECT_NEXT (250 * MS)
/* A unix listener whose queue is full says so at once: try again. */
#define VP_CONNECT_RETRY (20 * MS)
/* How often attempts are looked at, to give up what takes too long. */
#define VP_CONNECT_STEP (VP_CONNECT_TIMEOUT / 40)
/*
 * So many diallers are looked at in a row, and so many of them may end by that:
 * others have their turn after that.
 */
#define VP_DIAL_LOOKS 256
#define VP_DIAL_ENDS 8

/*
 * A tcp peer that vanished without a word is noticed after so many seconds of
 * silence, and then so many probes, so many seconds apart: 2 minutes.
 */
#define VP_KEEPALIVE_IDLE 60
#define VP_KEEPALIVE_PROBES 4
#define VP_KEEPALIVE_INTERVAL 15

/*
 * The kernel takes several MiB for a tcp socket whose other end reads nothing,
 * and nobody's limit counts them.  So it gets no more than this ahead of what
 * the other end's window lets it send; what is under way doesn't count, or a
 * long way would be slow.
 */
#define VP_UNSENT_MAX (128 << 10)
/*
 * Receive buffer of a socket whose other end is within the machine: bytes that
 * were sent, and that we may not take yet, lie there.
 */
#define VP_RCVBUF_NEAR (256 << 10)

/* Work, in ns: reading or writing a socket, a packet, and so on. */
#define VP_WORK_CALL 1000u
#define VP_WORK_PACKET 100u
#define VP_WORK_HELLO (4 * US)
#define VP_WORK_CONNECT (16 * US)
#define VP_WORK_CLOSE (6 * US)
#define VP_WORK_SHUT (3 * US)
#define VP_WORK_EVENT (4 * US) /* a line for who watches */
#define VP_WORK_LOOK 500u /* looking for a header, see VP_WORK_LOOKS */
#define VP_WORK_TOLD 2u /* each byte of a service's name */
#define VP_WORK_SORTED 100u /* each name of a list put in order */
/* So many bytes that are read, checked and written are a ns of work. */
#define VP_WORK_BYTES 4
/* So many bytes of bulk excuse a ns of other work. */
#define VP_WORK_EXCUSED 8
/*
 * Work other than bulk in a pass: for a channel that is the only one; and for
 * all that have worked in the last window, together.
 */
#define VP_WORK_ALONE (2048 * US)
#define VP_WORK_SHARED (48 * US)
/* A window in which shares are measured. */
#define VP_SHARE_US (2 * MS)
/* A share that isn't used any more counts for so long: it fades over it. */
#define VP_SHARE_FADE_US (100 * MS)
/* Of the time, the part that what isn't bulk has in any case. */
#define VP_SHARE_PARTS 5

/* Lines that a peer or a client can provoke: so many per span, then none. */
#define VP_LOG_LINES 50
#define VP_LOG_SPAN (10 * SECOND)
#define VP_LOG_LINE_LEN 512 /* longer ones are cut */

typedef struct VPWatch {
    VPFdHandler *handler;
    void *opaque;
} VPWatch;

/* Called in each pass; true: there is more to do without waiting. */
typedef struct VPTask {
    VPNode node;
    bool (*run)(void *opaque);
    void *opaque;
    unsigned work;   /* in this pass, without bulk: VP_WORK_..., ns */
    uint32_t bulk;   /* bytes of bulk in this pass */
    uint64_t spent;  /* work in this window, with bulk, ns */
    double share;    /* part of the loop's time that it had lately */
} VPTask;

enum { R, W };

struct VPLoop {
    bool stop;
    uint64_t now;
    uint64_t instance; /* random number of this process's own */
    VPTimer *timers; /* soonest first */
    VPNode tasks;
    uint64_t window_at; /* when the window of the shares began */
    double shares;      /* of all tasks, together */
    size_t nbusy;       /* tasks that worked in the last window */
    VPLogFunc *log;
    const VPLogLevel *log_level;
    VPEventFunc *event;      /* NULL: nobody follows events */
    const bool *conn_events; /* are those of connections wanted? */

    size_t words;    /* of each map */
    int nfds;        /* highest watched descriptor + 1 */
    size_t nwatched;
    size_t nchannels;
    size_t nconns;   /* of all channels, that have a descriptor or soon will,
                        but for those that are over */
    size_t fds_max;  /* that the process may have; 0: not known */
    size_t fds_kept; /* descriptors that are the program's */
    VPWatch *watch;  /* by descriptor */
    unsigned long *want[2];
    unsigned long *ready[2];
    bool turned;           /* select() wants the halves of words exchanged */
    unsigned long *hot;    /* select() itself watches for what is wanted */
    unsigned long *active; /* something happened since the last loop_cool() */
    uint64_t cooled_at;    /* when loop_cool() was done last */
    uint64_t looked_at;    /* when that, or a look at all, was due last */
    uint64_t look_us;      /* from one look to the next, for each watched */
    int cold_fd;           /* epoll descriptor that has the others; -1: none */

    VPNode dialers;     /* that wait for an answer */
    VPNode dial_todo;   /* those that dial_timer() has yet to look at */
    uint64_t dial_next; /* when it looks at them again, us from now */
    VPTimer dial_timer;
};

/* A log of one channel, with a limit of its own for what others provoke. */
typedef struct VPLog {
    VPLoop *loop;
    int channel;
    struct {
        uint64_t since;    /* when the span began */
        unsigned lines;    /* provoked since then */
    } span[2];             /* [1]: of lines beyond VP_LOG_INFO */
} VPLog;

/* ---- log -------------------------------------------------------------- */

static void loop_log(const VPLoop *loop, VPLogLevel level, int channel,
                     const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static void log_say(const VPLog *log, VPLogLevel level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void log_provoked(VPLog *log, VPLogLevel level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void log_event(VPLog *log, VPLogLevel level, VPEvent event,
                      const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static void loop_vlog(const VPLoop *loop, VPLogLevel level, int channel,
                      const char *fmt, va_list ap)
{
    char line[VP_LOG_LINE_LEN];

    if (level <= *loop->log_level) {
        vsnprintf(line, sizeof(line), fmt, ap);
        loop->log(level, channel, line);
    }
}

/* loop_log() - log one line about @channel, or VP_NO_CHANNEL */
static void loop_log(const VPLoop *loop, VPLogLevel level, int channel,
                     const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    loop_vlog(loop, level, channel, fmt, ap);
    va_end(ap);
}

/* log_say() - log one line that nobody but ourselves can cause */
static void log_say(const VPLog *log, VPLogLevel level, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    loop_vlog(log->loop, level, log->channel, fmt, ap);
    va_end(ap);
}

/*
 * log_debugs() - is a line at debug level wanted, and allowed?
 *
 * One that is wanted but not allowed is counted as left out.
 */
static inline bool log_debugs(VPLog *log)
{
    bool wanted = *log->loop->log_level >= VP_LOG_DEBUG;
    bool allowed = log->span[1].lines < VP_LOG_LINES ||
                   log->loop->now - log->span[1].since >= VP_LOG_SPAN;

    log->span[1].lines += wanted && !allowed;
    return wanted && allowed;
}

/* log_provoked() - log_say(), but nobody can fill the disk with it */
static void log_provoked(VPLog *log, VPLogLevel level, const char *fmt, ...)
{
    bool more = level > VP_LOG_INFO;
    uint64_t *since = &log->span[more].since;
    unsigned *lines = &log->span[more].lines;
    va_list ap;

    if (log->loop->now - *since >= VP_LOG_SPAN) {
        if (*lines > VP_LOG_LINES) {
            log_say(log, more ? VP_LOG_VERBOSE : VP_LOG_WARN,
                    "%u lines like those were left out",
                    *lines - VP_LOG_LINES);
        }
        *since = log->loop->now;
        *lines = 0;
    }
    if (++*lines <= VP_LOG_LINES) {
        va_start(ap, fmt);
        loop_vlog(log->loop, level, log->channel, fmt, ap);
        va_end(ap);
    }
}

/* event_tell() - is there somebody who was told that it has happened? */
static bool event_tell(const VPLog *log, VPEvent event)
{
    event.channel = log->channel;
    return log->loop->event != NULL && log->loop->event(&event);
}

/*
 * log_event() - log_provoked(), for what is an event as well
 *
 * The line is the reason of an OVER; other events bring their own.
 */
static void log_event(VPLog *log, VPLogLevel level, VPEvent event,
                      const char *fmt, ...)
{
    char line[VP_LOG_LINE_LEN];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    log_provoked(log, level, "%s", line);
    if (event.type == VP_EVENT_OVER) {
        event.reason = line;
    }
    event_tell(log, event);
}

/* ---- descriptors ------------------------------------------------------ */

static void bit_set(unsigned long *map, int fd)
{
    map[(size_t)fd / WORD_BITS] |= 1ul << ((size_t)fd % WORD_BITS);
}

static void bit_clear(unsigned long *map, int fd)
{
    map[(size_t)fd / WORD_BITS] &= ~(1ul << ((size_t)fd % WORD_BITS));
}

static bool bit_test(const unsigned long *map, int fd)
{
    return map[(size_t)fd / WORD_BITS] >> ((size_t)fd % WORD_BITS) & 1;
}

/* map_turn() - exchange the halves of each word */
static void map_turn(unsigned long *map, size_t words)
{
    for (size_t i = 0; i < words; i++) {
        map[i] = map[i] >> WORD_BITS / 2 | map[i] << WORD_BITS / 2;
    }
}

/*
 * maps_are_sets() - is a map what select() takes, as it is or turned?
 * @turned:  becomes whether it has to be
 */
static bool maps_are_sets(bool *turned)
{
    unsigned long map[FD_SETSIZE / WORD_BITS];
    fd_set set;

    for (size_t i = 0; i < 2 * WORD_BITS; i++) {
        /* some libraries' FD_SET() would convert the sign of an int */
        uint8_t fd = (uint8_t)i;

        memset(map, 0, sizeof(map));
        FD_ZERO(&set);
        FD_SET(fd, &set);
        bit_set(map, fd);
        if (fd == 0) {
            *turned = memcmp(map, &set, sizeof(map)) != 0;
        }
        if (*turned) {
            map_turn(map, sizeof(map) / sizeof(map[0]));
        }
        if (memcmp(map, &set, sizeof(map)) != 0) {
            errno = ENOSYS;
            return false;
        }
    }
    return true;
}

VPLoop *vp_loop_new(VPLogFunc *log, const VPLogLevel *level)
{
    uint64_t r;
    bool turned;
    VPLoop *loop = maps_are_sets(&turned) && random_draw(&r)
                   ? calloc(1, sizeof(*loop)) : NULL;

    if (loop != NULL) {
        loop->turned = turned;
        loop->now = vp_clock();
        loop->instance = random64();
        loop->cold_fd = -1;
        loop->look_us = VP_LOOK_SOON_US;
        loop->log = log;
        loop->log_level = level;
        node_init(&loop->tasks);
        node_init(&loop->dialers);
        node_init(&loop->dial_todo);
    }
    return loop;
}

static void cold_close(VPLoop *loop);

void vp_set_events(VPLoop *loop, VPEventFunc *event, const bool *conns)
{
    loop->event = event;
    loop->conn_events = conns;
}

void vp_loop_free(VPLoop *loop)
{
    cold_close(loop);
    free(loop->watch);
    free(loop->want[R]);
    free(loop);
}

void vp_loop_stop(VPLoop *loop)
{
    loop->stop = true;
}

uint64_t vp_loop_now(const VPLoop *loop)
{
    return loop->now;
}

int vp_loop_nfds(const VPLoop *loop)
{
    return loop->nfds;
}

/* loop_grow() - make room for @fd in every map; they share one allocation */
static int loop_grow(VPLoop *loop, int fd)
{
    size_t words = MAX(loop->words, FD_SETSIZE / WORD_BITS);
    unsigned long **map[] = {
        &loop->want[R], &loop->want[W], &loop->ready[R],
        &loop->ready[W], &loop->hot, &loop->active,
    };
    size_t nmaps = sizeof(map) / sizeof(map[0]);
    unsigned long *old = loop->want[R], *bits;
    VPWatch *watch;

    while (words * WORD_BITS <= (size_t)fd) {
        words *= 2;
    }
    if (words == loop->words) {
        return 0;
    }
    watch = realloc(loop->watch, words * WORD_BITS * sizeof(*watch));
    if (watch == NULL) {
        return -ENOMEM;
    }
    loop->watch = watch;
    memset(watch + loop->words * WORD_BITS, 0,
           (words - loop->words) * WORD_BITS * sizeof(*watch));
    bits = calloc(nmaps * words, sizeof(*bits));
    if (bits == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < nmaps; i++) {
        if (old != NULL) {
            memcpy(bits + i * words, *map[i], loop->words * sizeof(*bits));
        }
        *map[i] = bits + i * words;
    }
    free(old);
    loop->words = words;
    return 0;
}

/* fd_selectable() - does select() take a descriptor beyond FD_SETSIZE? */
static bool fd_selectable(VPLoop *loop, int fd)
{
    struct timeval zero = {0, 0};
    int n;

    if (fd < FD_SETSIZE) {
        return true;
    }
    memset(loop->ready[R], 0, loop->words * sizeof(*loop->ready[R]));
    do {
        n = select(fd + 1, (fd_set *)loop->ready[R], NULL, NULL, &zero);
    } while (n < 0 && errno == EINTR);
    return n >= 0;
}

int vp_watch(VPLoop *loop, int fd, VPFdHandler *handler, void *opaque)
{
    int rc = loop_grow(loop, fd);

    if (rc < 0) {
        return rc;
    }
    if (fd >= loop->nfds && !fd_selectable(loop, fd)) {
        return -EMFILE;
    }
    loop->watch[fd] = (VPWatch){ handler, opaque };
    loop->nfds = MAX(loop->nfds, fd + 1);
    loop->nwatched++;
    for (int i = 0; i < 2; i++) {
        bit_clear(loop->want[i], fd);
        bit_clear(loop->ready[i], fd); /* of a former owner of the number */
    }
    return 0;
}

/* watch_wanted() - VP_READ, VP_WRITE or both, or 0 */
static int watch_wanted(const VPLoop *loop, int fd)
{
    return (bit_test(loop->want[R], fd) ? VP_READ : 0) |
           (bit_test(loop->want[W], fd) ? VP_WRITE : 0);
}

/* watch_cold() - is something wanted of it that select() isn't asked for? */
static bool watch_cold(const VPLoop *loop, int fd)
{
    return watch_wanted(loop, fd) != 0 && !bit_test(loop->hot, fd);
}

#ifdef __linux__
/* cold_ctl() - put @fd into the epoll descriptor, or take it out */
static bool cold_ctl(const VPLoop *loop, int fd, bool put)
{
    int wanted = watch_wanted(loop, fd);
    struct epoll_event event = {
        .events = (wanted & VP_READ ? EPOLLIN : 0u) |
                  (wanted & VP_WRITE ? EPOLLOUT : 0u),
        .data.fd = fd,
    };

    return epoll_ctl(loop->cold_fd, put ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, fd,
                     &event) == 0;
}
#else
static bool cold_ctl(const VPLoop *loop, int fd, bool put)
{
    (void)loop, (void)fd, (void)put;
    return false;
}
#endif

/* watch_heat() - have select() itself watch @fd for now */
static void watch_heat(VPLoop *loop, int fd)
{
    if (loop->cold_fd >= 0 && watch_cold(loop, fd)) {
        cold_ctl(loop, fd, false);
    }
    bit_set(loop->hot, fd);
    bit_set(loop->active, fd);
}

/* watch_expect() - @fd's owner was given something: an answer may come soon */
static void watch_expect(VPLoop *loop, int fd)
{
    if (loop->cold_fd < 0) {
        watch_heat(loop, fd); /* else the answer would wait for a look */
    }
}

void vp_watch_set(VPLoop *loop, int fd, int events)
{
    watch_heat(loop, fd);
    if (events & VP_READ) {
        bit_set(loop->want[R], fd);
    } else {
        bit_clear(loop->want[R], fd);
    }
    if (events & VP_WRITE) {
        bit_set(loop->want[W], fd);
    } else {
        bit_clear(loop->want[W], fd);
    }
}

/* loop_fds_kept() - descriptors that are never a connection's */
static size_t loop_fds_kept(const VPLoop *loop)
{
    return loop->fds_kept + VP_FDS_CHANNEL * loop->nchannels;
}

/* loop_fds_room() - descriptors that there are for connections */
static size_t loop_fds_room(const VPLoop *loop)
{
    size_t others = loop_fds_kept(loop) +
                    (loop->nwatched - MIN(loop->nconns, loop->nwatched));

    return loop->fds_max - MIN(others, loop->fds_max);
}

/* loop_fds_shared() - may a channel that has @has connections have another? */
static bool loop_fds_shared(const VPLoop *loop, size_t has)
{
    return loop->fds_max == 0 ||
           share_allows(has, loop_fds_room(loop), loop->nchannels,
                        loop->nconns);
}

bool vp_fd_is_kept(const VPLoop *loop, int fd)
{
    return loop->fds_max > 0 &&
           (size_t)fd + loop_fds_kept(loop) >= loop->fds_max;
}

void vp_loop_descriptors(VPLoop *loop, size_t max, size_t kept)
{
    loop->fds_max = MIN(max, INT_MAX);
    loop->fds_kept = kept;
}

VPDescriptors vp_descriptors(const VPLoop *loop)
{
    return (VPDescriptors){
        .used = loop->nwatched,
        .conns = loop->nconns,
        .kept = loop_fds_kept(loop),
        .max = loop->fds_max,
    };
}

void vp_unwatch(VPLoop *loop, int fd)
{
    vp_watch_set(loop, fd, 0);
    bit_clear(loop->ready[R], fd);
    bit_clear(loop->ready[W], fd);
    loop->watch[fd].handler = NULL;
    loop->nwatched--;
    while (loop->nfds > 0 && loop->watch[loop->nfds - 1].handler == NULL) {
        loop->nfds--;
    }
}

/* ---- timers ----------------------------------------------------------- */

void vp_timer_stop(VPTimer *timer)
{
    if (timer->link != NULL) {
        *timer->link = timer->next;
        if (timer->next != NULL) {
            timer->next->link = timer->link;
        }
        timer->link = NULL;
    }
}

void vp_timer_start(VPLoop *loop, VPTimer *timer, uint64_t delay,
                    void (*handler)(void *opaque), void *opaque)
{
    VPTimer **at = &loop->timers;

    vp_timer_stop(timer);
    timer->deadline = loop->now + delay;
    timer->handler = handler;
    timer->opaque = opaque;
    while (*at != NULL && (*at)->deadline <= timer->deadline) {
        at = &(*at)->next;
    }
    timer->next = *at;
    timer->link = at;
    if (timer->next != NULL) {
        timer->next->link = &timer->next;
    }
    *at = timer;
}

static bool timer_running(const VPTimer *timer)
{
    return timer->link != NULL;
}

static void loop_timers(VPLoop *loop)
{
    while (loop->timers != NULL && loop->timers->deadline <= loop->now) {
        VPTimer *timer = loop->timers;

        vp_timer_stop(timer);
        timer->handler(timer->opaque);
    }
}

/* loop_words() - of each map, how many are in use? */
static size_t loop_words(const VPLoop *loop)
{
    return ((size_t)loop->nfds + WORD_BITS - 1) / WORD_BITS;
}

/* ---- cold descriptors -------------------------------------------------- */

static void loop_heat_all(VPLoop *loop)
{
    memset(loop->hot, 0xff, loop->words * sizeof(*loop->hot));
}

static void cold_close(VPLoop *loop)
{
    if (loop->cold_fd >= 0) {
        loop_heat_all(loop);
        vp_unwatch(loop, loop->cold_fd);
        close(loop->cold_fd);
        loop->cold_fd = -1;
    }
}

#ifdef __linux__
/*
 * cold_ready() - something happened to cold descriptors: they are hot now
 *
 * What select() calls ready for reading and for writing is the same here; the
 * end of both directions, which epoll reports unasked, is ready for reading.
 */
static void cold_ready(void *opaque, int cold_fd, int events)
{
    VPLoop *loop = opaque;
    struct epoll_event event[VP_COLD_BATCH];
    int n = epoll_wait(cold_fd, event, VP_COLD_BATCH, 0);

    for (int i = 0; i < n; i++) {
        int fd = event[i].data.fd;

        if (watch_cold(loop, fd)) {
            events = event[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)
                   ? VP_READ : 0;
            events |= event[i].events & (EPOLLOUT | EPOLLERR) ? VP_WRITE : 0;
            events &= watch_wanted(loop, fd);
            watch_heat(loop, fd);
            if (events != 0) {
                loop->watch[fd].handler(loop->watch[fd].opaque, fd, events);
            }
        } else if (i == 0) {
            /*
             * No handler has changed it just now.  It was closed behind our
             * back and lives on in another process: only so we get rid of it.
             */
            cold_close(loop);
            return;
        }
    }
}

/* cold_open() - have an epoll descriptor, if we can; all are hot then */
static void cold_open(VPLoop *loop)
{
    int fd = epoll_create1(EPOLL_CLOEXEC);

    if (fd < 0) {
        return;
    }
    if (vp_watch(loop, fd, cold_ready, loop) < 0) {
        close(fd);
        return;
    }
    vp_watch_set(loop, fd, VP_READ);
    loop_heat_all(loop);
    loop->cold_fd = fd;
}
#else
static void cold_open(VPLoop *loop)
{
    (void)loop;
}
#endif

/* loop_nhot() - how many are hot, of those of which something is wanted? */
static size_t loop_nhot(const VPLoop *loop)
{
    size_t n = 0;

    for (size_t i = 0; i < loop_words(loop); i++) {
        unsigned long bits = loop->hot[i] &
                             (loop->want[R][i] | loop->want[W][i]);

        for (; bits != 0; bits &= bits - 1) {
            n++;
        }
    }
    return n;
}

/* loop_cool() - what was not active since the last time is cold */
static void loop_cool(VPLoop *loop)
{
    bool crowded = loop_nhot(loop) > VP_HOT_ALWAYS;

    if (loop->cold_fd < 0) {
        cold_open(loop);
    }
    loop->look_us = crowded ? VP_LOOK_SOON_US
                            : MIN(2 * loop->look_us, VP_LOOK_MAX_US);
    if (loop->cold_fd < 0 && !crowded &&
        loop->now - loop->cooled_at < VP_HOT_US) {
        return;
    }
    loop->cooled_at = loop->now;
    for (size_t i = 0; i < loop_words(loop); i++) {
        unsigned long idle = loop->hot[i] & ~loop->active[i];

        for (int fd = (int)(i * WORD_BITS); idle != 0; fd++, idle >>= 1) {
            if (idle & 1 && fd != loop->cold_fd &&
                (loop->cold_fd < 0 || watch_wanted(loop, fd) == 0 ||
                 cold_ctl(loop, fd, true))) {
                bit_clear(loop->hot, fd);
            }
        }
        loop->active[i] = 0;
    }
}

/* ---- a pass ----------------------------------------------------------- */

/* loop_drop_bad() - a descriptor closed behind our back must not end us */
static void loop_drop_bad(VPLoop *loop)
{
    for (int fd = 0; fd < loop->nfds; fd++) {
        if (loop->watch[fd].handler != NULL && fcntl(fd, F_GETFD) < 0) {
            loop_log(loop, VP_LOG_ERROR, VP_NO_CHANNEL,
                     "descriptor %d is watched but not open", fd);
            vp_watch_set(loop, fd, 0);
        }
    }
}

/*
 * loop_ask() - have in "ready" what select() is to look for
 * @all:  of the cold ones, too
 *
 * Returns false if that is nothing.
 */
static bool loop_ask(VPLoop *loop, bool all)
{
    unsigned long any = 0;

    for (size_t i = 0; i < loop_words(loop); i++) {
        unsigned long mask = all ? ~0ul : loop->hot[i];

        loop->ready[R][i] = loop->want[R][i] & mask;
        loop->ready[W][i] = loop->want[W][i] & mask;
        any |= loop->ready[R][i] | loop->ready[W][i];
    }
    return any != 0;
}

/* loop_turn() - make "ready" what select() takes, or back */
static void loop_turn(VPLoop *loop)
{
    if (loop->turned) {
        map_turn(loop->ready[R], loop_words(loop));
        map_turn(loop->ready[W], loop_words(loop));
    }
}

/*
 * loop_select() - wait for at most @timeout, UINT64_MAX: for ever
 *
 * Returns the number of ready bits, or -errno.
 */
static int loop_select(VPLoop *loop, uint64_t timeout)
{
    bool many = loop->nwatched > VP_HOT_ALWAYS;
    uint64_t pause = loop->cold_fd < 0 ? loop->nwatched * loop->look_us
                                       : VP_COOL_US;
    bool due = many && loop->now - loop->looked_at >= pause;
    bool looks, hot;
    struct timeval tv;
    int n;

    if (due) {
        loop_cool(loop);
    }
    looks = loop->cold_fd < 0;
    hot = loop_ask(loop, looks && !many);
    if (looks && many) {
        if (hot) {
            timeout = due ? 0 : MIN(timeout,
                                    loop->looked_at + pause - loop->now);
        }
        if (due || !hot) {
            loop_ask(loop, true);
        }
    }
    tv.tv_sec = (time_t)MIN(timeout / SECOND, 3600);
    tv.tv_usec = (suseconds_t)(timeout % SECOND);
    loop_turn(loop);
    n = select(loop->nfds, (fd_set *)loop->ready[R],
               (fd_set *)loop->ready[W], NULL,
               timeout == UINT64_MAX ? NULL : &tv);
    loop_turn(loop);
    if (n < 0) {
        int err = errno;

        for (size_t i = 0; i < loop_words(loop); i++) {
            loop->ready[R][i] = loop->ready[W][i] = 0;
        }
        if (err == EBADF) {
            loop_drop_bad(loop);
        }
        loop->now = vp_clock();
        return err == EINTR || err == EBADF ? 0 : -err;
    }
    loop->now = vp_clock();
    if (due || !hot) {
        loop->looked_at = loop->now;
    }
    return n;
}

static void loop_dispatch(VPLoop *loop, int n)
{
    for (size_t i = 0; i < loop_words(loop) && n > 0; i++) {
        for (;;) {
            unsigned long bits = loop->ready[R][i] | loop->ready[W][i];
            int fd = (int)(i * WORD_BITS), events = 0;

            if (bits == 0) {
                break;
            }
            while (!(bits & 1)) {
                bits >>= 1;
                fd++;
            }
            /* read anew: an earlier handler may have unwatched it */
            if (bit_test(loop->ready[R], fd)) {
                events |= VP_READ;
                bit_clear(loop->ready[R], fd);
                n--;
            }
            if (bit_test(loop->ready[W], fd)) {
                events |= VP_WRITE;
                bit_clear(loop->ready[W], fd);
                n--;
            }
            if (watch_cold(loop, fd)) {
                loop->look_us = VP_LOOK_SOON_US;
            }
            watch_heat(loop, fd);
            loop->watch[fd].handler(loop->watch[fd].opaque, fd, events);
        }
    }
}

/* loop_portion() - work other than bulk that a task may do in a pass, ns */
static unsigned loop_portion(const VPLoop *loop)
{
    return loop->nchannels <= 1 ? VP_WORK_ALONE
           : VP_WORK_SHARED / (unsigned)MAX(loop->nbusy, 1);
}

/* loop_shares() - at the end of a window, what each task had of its time */
static void loop_shares(VPLoop *loop)
{
    uint64_t us = loop->now - loop->window_at;
    double kept;

    if (us < VP_SHARE_US) {
        return;
    }
    kept = 1 - (double)MIN(us, VP_SHARE_FADE_US) / VP_SHARE_FADE_US;
    loop->window_at = loop->now;
    loop->shares = 0;
    loop->nbusy = 0;
    for (VPNode *t = loop->tasks.next; t != &loop->tasks; t = t->next) {
        VPTask *task = container_of(t, VPTask, node);
        double share = (double)task->spent / (double)us / 1000;

        task->share = MAX(share, kept * task->share);
        loop->shares += task->share;
        loop->nbusy += task->spent > 0;
        task->spent = 0;
    }
}

/* task_rests() - how many times as long as it works does @task rest then? */
static double task_rests(const VPLoop *loop, const VPTask *task)
{
    double others = loop->shares - task->share;

    return 1 / MAX(1 - 2 * others, 1.0 / VP_SHARE_PARTS) - 1;
}

/* task_settle() - end a pass; returns its work, if no bulk excuses it */
static unsigned task_settle(VPTask *task)
{
    unsigned excused = task->bulk / VP_WORK_EXCUSED;
    unsigned work = task->work - MIN(excused, task->work);

    task->spent += task->work + task->bulk / VP_WORK_BYTES;
    task->work = task->bulk = 0;
    return work;
}

static void loop_add_task(VPLoop *loop, VPTask *task,
                          bool (*run)(void *opaque), void *opaque)
{
    task->run = run;
    task->opaque = opaque;
    node_append(&loop->tasks, &task->node);
    loop->nchannels++;
}

static void loop_del_task(VPLoop *loop, VPTask *task)
{
    node_remove(&task->node);
    loop->nchannels--;
}

int vp_loop_run(VPLoop *loop)
{
    loop->now = vp_clock();
    while (!loop->stop) {
        uint64_t timeout = UINT64_MAX;
        VPNode *t;
        int n;

        loop_shares(loop);
        for (t = loop->tasks.next; t != &loop->tasks; t = t->next) {
            VPTask *task = container_of(t, VPTask, node);

            if (task->run(task->opaque)) {
                timeout = 0;
            }
        }
        if (loop->stop) {
            break;
        }
        if (loop->timers != NULL) {
            uint64_t deadline = MAX(loop->timers->deadline, loop->now);

            timeout = MIN(timeout, deadline - loop->now);
        }
        n = loop_select(loop, timeout);
        if (n < 0 && n != -ENOMEM) {
            return n;
        }
        loop_dispatch(loop, n);
        loop_timers(loop);
    }
    loop->stop = false;
    return 0;
}

/* ---- a listener ------------------------------------------------------- */

/* starved() - did a call fail because there is no descriptor, or memory? */
static bool starved(int err)
{
    return err == EMFILE || err == ENFILE || err == ENOBUFS || err == ENOMEM;
}

void vp_listener_spare(VPListener *l)
{
    if (l->keeps_spare && l->spare < 0) {
        l->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
}

/* reset_on_close() - what has not ended in order by close() is reset by it */
static void reset_on_close(int fd)
{
    struct linger reset = { 1, 0 };

    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
}

/*
 * listener_accept() - a non-blocking socket, or -1 with errno
 *
 * For one that comes when no descriptor is left the spare one is given up.
 */
static int listener_accept(VPListener *l, VPAddr *peer)
{
    int fd = accept(l->fd, (struct sockaddr *)&peer->ss, &peer->len);

    if (fd < 0 && starved(errno) && l->keeps_spare && l->spare >= 0) {
        close(l->spare);
        l->spare = -1;
        fd = accept(l->fd, (struct sockaddr *)&peer->ss, &peer->len);
    }
    if (fd >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        int err = errno;

        reset_on_close(fd);
        close(fd);
        errno = err;
        return -1;
    }
    return fd;
}

static void listener_resume(void *opaque)
{
    VPListener *l = opaque;

    vp_watch_set(l->loop, l->fd, VP_READ);
}

/* listener_rest() - look away for @us */
static void listener_rest(VPListener *l, uint64_t us)
{
    vp_watch_set(l->loop, l->fd, 0);
    vp_timer_start(l->loop, &l->pause, us, listener_resume, l);
}

/* listener_pause() - the socket stays readable: look away, or we'd spin */
static void listener_pause(VPListener *l, int err)
{
    if (vp_once(&l->said, 0, l->loop->now, VP_LOG_SPAN)) {
        loop_log(l->loop, VP_LOG_WARN, l->channel, "%s: cannot accept: %s",
                 l->name, strerror(err));
    }
    l->said.at = l->loop->now; /* as long as it lasts it is no news */
    listener_rest(l, VP_ACCEPT_PAUSE);
}

static void listener_ready(void *opaque, int fd, int events)
{
    VPListener *l = opaque;

    (void)events;
    vp_listener_spare(l);
    for (int i = 0; i < VP_ACCEPT_BATCH; i++) {
        VPAddr peer = { .len = sizeof(peer.ss), .ss.ss_family = AF_UNIX };
        int conn = listener_accept(l, &peer);

        if (conn >= 0) {
            l->accepted(l->opaque, conn, &peer);
            if (l->fd != fd) {
                return; /* its owner stopped it */
            }
            if (l->rest > 0) {
                listener_rest(l, l->rest);
                return;
            }
        } else if (starved(errno)) {
            listener_pause(l, errno);
            return;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return;
        } /* else it is that client's trouble, see accept(2) */
    }
}

int vp_listener_start(VPListener *l, VPLoop *loop, int fd)
{
    int rc = vp_watch(loop, fd, listener_ready, l);

    l->loop = loop;
    l->fd = l->spare = -1;
    if (rc < 0) {
        close(fd);
        return rc;
    }
    l->fd = fd;
    vp_listener_spare(l);
    vp_watch_set(loop, fd, VP_READ);
    return 0;
}

void vp_listener_stop(VPListener *l)
{
    if (l->loop == NULL) {
        return; /* it was never started */
    }
    vp_timer_stop(&l->pause);
    if (l->fd >= 0) {
        vp_unwatch(l->loop, l->fd);
        close(l->fd);
        l->fd = -1;
    }
    if (l->keeps_spare && l->spare >= 0) {
        close(l->spare);
        l->spare = -1;
    }
}

/* ---- a target --------------------------------------------------------- */

static void addrs_free(VPAddrs *addrs)
{
    if (addrs != NULL && --addrs->users == 0) {
        free(addrs);
    }
}

static bool addr_same(const VPAddr *a, const VPAddr *b)
{
    return a->len == b->len && memcmp(&a->ss, &b->ss, a->len) == 0;
}

static void dial_go(VPLoop *loop, VPTarget *target, int err);

int vp_target_set(VPTarget *target, VPLoop *loop, const VPAddr *addrs,
                  size_t n)
{
    const VPAddrs *old = target->addrs;
    VPAddrs *set = NULL;

    if (n > 0) {
        set = malloc(sizeof(*set) + n * sizeof(*addrs));
    }
    if (set != NULL) {
        *set = (VPAddrs){ .users = 1, .n = n };
        memcpy(set->addr, addrs, n * sizeof(*addrs));
        for (size_t i = 0; old != NULL && i < n; i++) {
            if (addr_same(&addrs[i], &old->addr[old->first])) {
                set->first = i;
            }
        }
        vp_target_clear(target);
        target->addrs = set;
    }
    dial_go(loop, target, EHOSTUNREACH);
    return n > 0 && set == NULL ? -ENOMEM : 0;
}

void vp_target_clear(VPTarget *target)
{
    addrs_free(target->addrs);
    target->addrs = NULL;
}

/* ---- a dialler -------------------------------------------------------- */

static void dial_timer(void *opaque);

static void attempt_close(VPAttempt *a)
{
    if (a->fd >= 0) {
        vp_unwatch(a->dialer->loop, a->fd);
        close(a->fd);
        a->fd = -1;
    }
}

/* dial_end() - it waits for nothing */
static void dial_end(VPDialer *d)
{
    for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
        attempt_close(&d->attempts[i]);
    }
    addrs_free(d->addrs);
    d->addrs = NULL;
    node_remove(&d->node);
    if (!node_linked(&d->loop->dialers) && !node_linked(&d->loop->dial_todo)) {
        vp_timer_stop(&d->loop->dial_timer);
    }
}

/* dial_won() - hand over the socket of @a */
static void dial_won(VPDialer *d, VPAttempt *a)
{
    int fd = a->fd;

    vp_unwatch(d->loop, fd);
    a->fd = -1;
    d->addrs->first = a->at;
    dial_end(d);
    d->done(d->opaque, fd, 0);
}

static void dial_lost(VPDialer *d, int err)
{
    dial_end(d);
    d->done(d->opaque, -1, err);
}

/* attempt_failed() - its address won't do */
static void attempt_failed(VPAttempt *a, int err)
{
    VPDialer *d = a->dialer;

    d->err = err;
    d->failed(d->opaque, &d->addrs->addr[a->at], err);
    attempt_close(a);
}

/*
 * met_itself() - is @fd connected to itself?
 *
 * Nobody listens where it connected to, but the kernel gave it that very port
 * as its own, and TCP lets two connecting ends meet.
 */
static bool met_itself(int fd)
{
    VPAddr ours = { .len = sizeof(ours.ss) };
    VPAddr theirs = { .len = sizeof(theirs.ss) };

    return getsockname(fd, (struct sockaddr *)&ours.ss, &ours.len) == 0 &&
           (ours.ss.ss_family == AF_INET || ours.ss.ss_family == AF_INET6) &&
           getpeername(fd, (struct sockaddr *)&theirs.ss, &theirs.len) == 0 &&
           addr_same(&ours, &theirs);
}

/* attempt_result() - what connect() says: 0, or an errno value */
static int attempt_result(const VPAttempt *a, int err)
{
    if (err == 0 && met_itself(a->fd)) {
        reset_on_close(a->fd); /* else the port would stay in use */
        return ECONNREFUSED;
    }
    return err;
}

static bool dial_next(VPDialer *d);

static void attempt_ready(void *opaque, int fd, int events)
{
    VPAttempt *a = opaque;
    int err = 0;
    socklen_t len = sizeof(err);

    (void)events;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len);
    err = attempt_result(a, err);
    if (err == 0) {
        dial_won(a->dialer, a);
    } else {
        attempt_failed(a, err);
        dial_next(a->dialer);
    }
}

/* attempt_socket() - for the address at a->at; returns 0 or -errno */
static int attempt_socket(VPAttempt *a)
{
    VPDialer *d = a->dialer;
    const VPAddr *addr = &d->addrs->addr[a->at];
    uint64_t share = VP_CONNECT_TIMEOUT * VP_DIAL_ATTEMPTS / d->addrs->n;
    int fd = socket(addr->ss.ss_family, SOCK_STREAM, 0), rc;

    if (fd < 0) {
        return -errno;
    }
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        rc = -errno;
    } else if (d->made != NULL && !d->made(d->opaque, fd, addr)) {
        rc = -EMFILE;
    } else {
        rc = vp_watch(d->loop, fd, attempt_ready, a);
    }
    if (rc < 0) {
        close(fd);
        return rc;
    }
    a->fd = fd;
    a->deadline = MIN(d->loop->now + share, d->give_up_at);
    return 0;
}

/* attempt_connect() - returns 0, EINPROGRESS, or why it has failed */
static int attempt_connect(VPAttempt *a)
{
    VPDialer *d = a->dialer;
    const VPAddr *addr = &d->addrs->addr[a->at];
    int err = 0;

    if (connect(a->fd, (const struct sockaddr *)&addr->ss, addr->len) < 0) {
        err = errno == EISCONN ? 0 : errno;
    }
    a->full = err == EAGAIN;
    if (a->full) {
        d->target->full_at = d->loop->now;
    }
    if (a->full || err == EINPROGRESS || err == EINTR || err == EALREADY) {
        vp_watch_set(d->loop, a->fd, a->full ? 0 : VP_WRITE);
        return EINPROGRESS;
    }
    return attempt_result(a, err);
}

/* dial_look_within() - have the timer look in @delay at the latest */
static void dial_look_within(VPLoop *loop, uint64_t delay)
{
    VPTimer *timer = &loop->dial_timer;

    loop->dial_next = MIN(loop->dial_next, delay); /* in the midst of a round */
    if (!timer_running(timer) || timer->deadline > loop->now + delay) {
        vp_timer_start(loop, timer, delay, dial_timer, loop);
    }
}

/* dial_address() - index of the next address: d->first, then all others */
static size_t dial_address(const VPDialer *d)
{
    return d->tried == 0 ? d->first
           : d->tried <= d->first ? d->tried - 1 : d->tried;
}

/* dial_attempt() - one that is free, or NULL */
static VPAttempt *dial_attempt(VPDialer *d)
{
    for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
        if (d->attempts[i].fd < 0) {
            return &d->attempts[i];
        }
    }
    return NULL;
}

static bool dial_waits(const VPDialer *d)
{
    for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
        if (d->attempts[i].fd >= 0) {
            return true;
        }
    }
    return false;
}

/*
 * dial_next() - try the next address, and further ones if it fails at once
 *
 * Returns true if it waits for an answer; else it is over, and @d may be gone.
 */
static bool dial_next(VPDialer *d)
{
    VPAttempt *a;

    while (d->tried < d->addrs->n && (a = dial_attempt(d)) != NULL) {
        int rc;

        a->at = dial_address(d);
        rc = attempt_socket(a);
        if (rc < 0) {
            /* another address needs a descriptor, too */
            d->tried = d->addrs->n;
            d->err = -rc;
            d->failed(d->opaque, NULL, -rc);
            break;
        }
        d->tried++;
        rc = attempt_connect(a);
        if (rc == 0) {
            dial_won(d, a);
            return false;
        }
        if (rc == EINPROGRESS) {
            d->next_at = d->loop->now + VP_CONNECT_NEXT;
            dial_look_within(d->loop, a->full ? VP_CONNECT_RETRY
                                              : VP_CONNECT_NEXT);
            return true;
        }
        attempt_failed(a, rc);
    }
    if (!dial_waits(d)) {
        dial_lost(d, d->err);
        return false;
    }
    return true;
}

/* attempt_look() - is it time to try again, or to give up? */
static void attempt_look(VPAttempt *a)
{
    VPDialer *d = a->dialer;
    struct pollfd pfd = { .fd = a->fd, .events = POLLOUT };
    uint64_t now = d->loop->now;
    int rc = EINPROGRESS;

    /* late or not: we may have been paused; but one a pass shows it is full */
    if (a->full && d->target->full_at != now) {
        rc = attempt_connect(a);
        if (rc == 0) {
            vp_watch_set(d->loop, a->fd, VP_WRITE); /* it is at once */
        }
    } else if (!a->full && poll(&pfd, 1, 0) != 0) {
        return; /* its handler will be called */
    }
    if (rc == EINPROGRESS && a->deadline <= now) {
        rc = ETIMEDOUT;
    }
    if (rc != EINPROGRESS && rc != 0) {
        attempt_failed(a, rc);
    }
}

/* dial_begin() - @d has addresses now; or none, then it is over: @err */
static void dial_begin(VPDialer *d, int err)
{
    d->addrs = d->target->addrs;
    if (d->addrs == NULL) {
        d->failed(d->opaque, NULL, err);
        dial_lost(d, err);
        return;
    }
    d->addrs->users++;
    d->first = d->addrs->first; /* which other diallers may change */
    dial_next(d);
}

/* dial_look() - returns whether it goes on */
static bool dial_look(VPDialer *d)
{
    uint64_t now = d->loop->now;

    if (d->addrs == NULL) {
        if (d->give_up_at > now) {
            return true;
        }
        dial_begin(d, ETIMEDOUT);
        return false;
    }
    for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
        VPAttempt *a = &d->attempts[i];

        if (a->fd >= 0 && (a->full || a->deadline <= now)) {
            attempt_look(a);
        }
    }
    return (dial_waits(d) && d->next_at > now) || dial_next(d);
}

/* dial_soon() - when @d has to be looked at again, us from now */
static uint64_t dial_soon(const VPDialer *d)
{
    uint64_t now = d->loop->now, soon = VP_CONNECT_STEP;

    for (int i = 0; d->addrs != NULL && i < VP_DIAL_ATTEMPTS; i++) {
        if (d->attempts[i].fd >= 0 && d->attempts[i].full) {
            return VP_CONNECT_RETRY;
        }
    }
    if (d->addrs != NULL && d->tried < d->addrs->n && d->next_at > now) {
        soon = MIN(soon, d->next_at - now);
    }
    return soon;
}

/* node_move() - put all nodes of @from behind those of @to */
static void node_move(VPNode *to, VPNode *from)
{
    if (node_linked(from)) {
        from->next->prev = to->prev;
        to->prev->next = from->next;
        from->prev->next = to;
        to->prev = from->prev;
        node_init(from);
    }
}

/* dial_take() - move all diallers to @todo, as any may end while one is */
static void dial_take(VPLoop *loop, VPNode *todo)
{
    node_init(todo);
    node_move(todo, &loop->dial_todo);
    node_move(todo, &loop->dialers);
}

/* dial_turn() - the next of @todo, which is the loop's again, or NULL */
static VPDialer *dial_turn(VPLoop *loop, VPNode *todo)
{
    VPDialer *d;

    if (!node_linked(todo)) {
        return NULL;
    }
    d = container_of(todo->next, VPDialer, node);
    node_remove(&d->node);
    node_append(&loop->dialers, &d->node);
    return d;
}

/* dial_timer() - which attempts take too long, or should be made again? */
static void dial_timer(void *opaque)
{
    VPLoop *loop = opaque;
    unsigned looks = 0, ends = 0;
    VPDialer *d;

    if (!node_linked(&loop->dial_todo)) {
        node_move(&loop->dial_todo, &loop->dialers);
        loop->dial_next = VP_CONNECT_STEP;
    }
    while (looks++ < VP_DIAL_LOOKS && ends < VP_DIAL_ENDS &&
           (d = dial_turn(loop, &loop->dial_todo)) != NULL) {
        if (dial_look(d)) {
            loop->dial_next = MIN(loop->dial_next, dial_soon(d));
        } else {
            ends++;
        }
    }
    if (node_linked(&loop->dial_todo)) {
        vp_timer_start(loop, &loop->dial_timer, 1, dial_timer, loop);
    } else if (node_linked(&loop->dialers)) {
        dial_look_within(loop, loop->dial_next);
    }
}

/* dial_go() - have all that wait for addresses of @target go on */
static void dial_go(VPLoop *loop, VPTarget *target, int err)
{
    VPDialer *d;
    VPNode todo;

    dial_take(loop, &todo);
    while ((d = dial_turn(loop, &todo)) != NULL) {
        if (d->target == target && d->addrs == NULL) {
            dial_begin(d, err);
        }
    }
    if (node_linked(&loop->dialers)) {
        dial_look_within(loop, VP_CONNECT_RETRY);
    }
}

void vp_dialer_start(VPDialer *d, VPLoop *loop, VPTarget *target)
{
    d->loop = loop;
    d->target = target;
    d->addrs = NULL;
    d->tried = 0;
    for (int i = 0; i < VP_DIAL_ATTEMPTS; i++) {
        d->attempts[i] = (VPAttempt){ .dialer = d, .fd = -1 };
    }
    d->give_up_at = loop->now + VP_CONNECT_TIMEOUT;
    node_init(&d->node);
    node_append(&loop->dialers, &d->node);
    if (target->addrs != NULL) {
        dial_begin(d, 0);
    } else {
        dial_look_within(loop, VP_CONNECT_STEP);
    }
}

void vp_dialer_stop(VPDialer *d)
{
    if (d->loop != NULL && node_linked(&d->node)) {
        dial_end(d);
    }
}

/* dial_addr() - the address that was tried last; NULL: none yet */
static const VPAddr *dial_addr(const VPDialer *d)
{
    size_t last = 0;

    for (int i = 0; d->addrs != NULL && i < VP_DIAL_ATTEMPTS; i++) {
        last = d->attempts[i].fd >= 0 ? d->attempts[i].at : last;
    }
    return d->addrs != NULL ? &d->addrs->addr[last] : NULL;
}

/* ---- what each socket needs ------------------------------------------- */

/* tcp_alive() - have a peer noticed that vanished without a word */
static void tcp_alive(int fd)
{
    const int one = 1;

    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPCNT) && defined(TCP_KEEPINTVL)
    /* elsewhere the system's own times hold: hours, mostly */
    const int idle = VP_KEEPALIVE_IDLE, probes = VP_KEEPALIVE_PROBES;
    const int interval = VP_KEEPALIVE_INTERVAL;

    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
#endif
}

/* socket_room() - a send buffer of @bytes, or of what the system allows */
static void socket_room(int fd, int bytes)
{
    /* Linux takes any size and gives what it has, the BSDs answer ENOBUFS */
    while (bytes > 0 && setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes,
                                   sizeof(bytes)) < 0 && errno == ENOBUFS) {
        bytes /= 2;
    }
}

/*
 * socket_force() - a send buffer of @bytes, whatever the system allows to all
 *
 * Without root's rights it keeps the one that the system chooses, and enlarges
 * as TCP asks for it: one of a size that anybody may set is smaller, mostly.
 */
static void socket_force(int fd, int bytes)
{
#ifdef SO_SNDBUFFORCE
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
#else
    (void)fd;
    (void)bytes;
#endif
}

/* tcp_setup() - no TCP of ours waits; @addr is either end of @fd's */
static void tcp_setup(int fd, const VPAddr *addr)
{
    const int one = 1;

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (!vp_addr_is_local(addr)) {
        /* else the kernel itself tells, whatever becomes of the peer */
        tcp_alive(fd);
        return;
    }
#ifdef TCP_CONGESTION
    /*
     * Where BBR is the system's choice it would pace us, with a clock
     * interrupt for each 64 KiB; within a machine there is no network to spare.
     */
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", strlen("reno"));
#endif
}

/*
 * tcp_unheard() - how long the kernel at the other end has owed an answer
 *
 * Its program may be stopped, or be a VM's monitor whose guest is paused: then
 * the kernel answers all the same.  Returns us; 0: it answers, or no TCP of
 * which that is known.
 */
static uint64_t tcp_unheard(int fd)
{
#ifdef __linux__
    /* bytes of struct tcp_info, which musl declares with _GNU_SOURCE alone */
    enum { PROBES = 3, UNACKED = 24, LAST_ACK_RECV = 56, FIELDS_LEN = 60 };
    uint8_t info[FIELDS_LEN] = { 0 };
    socklen_t len = sizeof(info);
    uint32_t unacked, silent;

    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &len) == 0) {
        memcpy(&unacked, info + UNACKED, sizeof(unacked));
        memcpy(&silent, info + LAST_ACK_RECV, sizeof(silent));
        /* the first probe of a window that is shut may still be under way */
        return unacked > 0 || info[PROBES] > 1 ? silent * MS : 0;
    }
#endif
    (void)fd;
    return 0;
}

/* socket_held() - bytes that the kernel holds for @fd; 0: not known */
static size_t socket_held(int fd)
{
#ifdef SO_MEMINFO
    /* sk_get_meminfo() in net/core/sock.c has them in this order */
    enum { RECEIVED = 0, SENT = 2, QUEUED = 5, FIELDS = 9 };
    uint32_t mem[FIELDS] = { 0 };
    socklen_t len = sizeof(mem);

    if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, mem, &len) == 0) {
        return (size_t)mem[RECEIVED] + MAX(mem[SENT], mem[QUEUED]);
    }
#endif
    (void)fd;
    return 0;
}

/*
 * socket_setup() - what every proxied socket needs; @peer is its other end
 *
 * Should this daemon be killed, nobody may take what he got until then for all
 * there was.
 */
static void socket_setup(int fd, const VPAddr *peer)
{
    const int unsent = VP_UNSENT_MAX, room = VP_RCVBUF_NEAR, one = 1;

    reset_on_close(fd);
    /* else the urgent byte would be missing among the others */
    setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one));
    if (peer->ss.ss_family == AF_UNIX) {
        return;
    }
    tcp_setup(fd, peer);
#ifdef TCP_NOTSENT_LOWAT
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
#endif
    if (vp_addr_is_local(peer)) {
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
    }
}

/*
 * socket_setup_heirs() - do that once for all that listening @fd accepts
 *
 * Returns false if each needs it itself: Linux alone has them inherit all, of
 * TCP sockets, and clients of other machines need other things.
 */
static bool socket_setup_heirs(int fd)
{
#ifdef __linux__
    VPAddr addr = { .len = sizeof(addr.ss) };

    if (getsockname(fd, (struct sockaddr *)&addr.ss, &addr.len) == 0 &&
        addr.ss.ss_family != AF_UNIX && vp_addr_is_local(&addr)) {
        socket_setup(fd, &addr);
        return true;
    }
#endif
    (void)fd;
    return false;
}

/* ======================================================================
 * key
 *
 * With a key both sides prove in the handshake that they have it: HELLO holds
 * an HMAC over the rest of it, in which is a number the other side has just
 * invented (its token, echoed).  HELLO also says which process sent it, so a
 * proof can't be sent back to its maker, on this channel or another; and
 * whether its sender listened or connected, so neither can two listeners be
 * joined that have the same key.  The key also goes into what seeds the
 * check of all packets.  A session keeps the key it began with: who names it in
 * HELLO proves that one, who doesn't proves the one in force; and so does who
 * has heard that the other side doesn't name it.  This tells the right peer
 * from others who can reach the channel; it hides nothing, and doesn't help
 * against somebody who can change what is under way.
 *
 * SHA-256: FIPS 180-4; HMAC: RFC 2104, RFC 4231 has test vectors.
 * ====================================================================== */

#define SHA256_LEN 32
#define SHA256_BLOCK 64

typedef struct Sha256 {
    uint32_t h[8];
    uint64_t len; /* bytes so far */
    uint8_t block[SHA256_BLOCK];
} Sha256;

static uint32_t rotr(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256_block(uint32_t h[8], const uint8_t *p)
{
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
        0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
        0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
        0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
        0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
        0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
        0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
        0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };
    uint32_t w[64], v[8];

    for (int i = 0; i < 16; i++) {
        w[i] = get32(p + 4 * i);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];

        w[i] = (rotr(a, 7) ^ rotr(a, 18) ^ a >> 3) + w[i - 16] +
               (rotr(b, 17) ^ rotr(b, 19) ^ b >> 10) + w[i - 7];
    }
    memcpy(v, h, sizeof(v));
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[0], e = v[4];
        uint32_t t1 = v[7] + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) +
                      ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) +
                      ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));

        memmove(v + 1, v, 7 * sizeof(v[0]));
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) {
        h[i] += v[i];
    }
}

static void sha256_start(Sha256 *s)
{
    static const uint32_t h[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };

    memcpy(s->h, h, sizeof(h));
    s->len = 0;
}

static void sha256_add(Sha256 *s, const void *data, size_t len)
{
    const uint8_t *p = data;

    for (; len > 0; len--) {
        s->block[s->len++ % SHA256_BLOCK] = *p++;
        if (s->len % SHA256_BLOCK == 0) {
            sha256_block(s->h, s->block);
        }
    }
}

static void sha256_end(Sha256 *s, uint8_t out[SHA256_LEN])
{
    static const uint8_t pad[SHA256_BLOCK] = { 0x80 };
    uint8_t bits[8];

    put64(bits, 8 * s->len);
    /* as many zeros as bring the length, 8 bytes, to a block's end */
    sha256_add(s, pad, 1 + (2 * SHA256_BLOCK - 9 - s->len % SHA256_BLOCK) %
                           SHA256_BLOCK);
    sha256_add(s, bits, sizeof(bits));
    for (int i = 0; i < 8; i++) {
        put32(out + 4 * i, s->h[i]);
    }
}

/* hmac_sha256() - of two pieces of data, one after the other */
static void hmac_sha256(const uint8_t *key, size_t key_len, const char *what,
                        const uint8_t *data, size_t len,
                        uint8_t out[SHA256_LEN])
{
    uint8_t pad[SHA256_BLOCK] = { 0 };
    Sha256 s;

    if (key_len > SHA256_BLOCK) {
        sha256_start(&s);
        sha256_add(&s, key, key_len);
        sha256_end(&s, pad);
    } else {
        memcpy(pad, key, key_len);
    }
    for (size_t i = 0; i < sizeof(pad); i++) {
        pad[i] ^= 0x36;
    }
    sha256_start(&s);
    sha256_add(&s, pad, sizeof(pad));
    sha256_add(&s, what, strlen(what));
    sha256_add(&s, data, len);
    sha256_end(&s, out);
    for (size_t i = 0; i < sizeof(pad); i++) {
        pad[i] ^= 0x36 ^ 0x5c;
    }
    sha256_start(&s);
    sha256_add(&s, pad, sizeof(pad));
    sha256_add(&s, out, SHA256_LEN);
    sha256_end(&s, out);
}

/* key_prove() - @what keeps one use of the key from passing for another */
static void key_prove(const VPKey *key, const char *what, const uint8_t *data,
                      size_t len, uint8_t proof[SHA256_LEN])
{
    hmac_sha256(key->bytes, key->len, what, data, len, proof);
}

/* ======================================================================
 * wire
 *
 * A packet is a header of 40 bytes, big endian, and up to VP_PKT_DATA_LEN
 * bytes of payload:
 *
 *    0  check       64  over the 32 bytes that follow, plus what seeds it
 *    8  data_check  64  over the payload; 0 without one
 *   16  type         8
 *   17  flags        8
 *   18  bytes       16  of payload
 *   20  conn        32  connection id, chosen by the connection's client side
 *   24  seq         32  of this packet, or of the sender's next one
 *   28  ack         32  the packet the sender expects next
 *   32  time        32  the sender's clock when this went to the channel, us
 *   36  delay       32  the sender's clock when the newest packet it received
 *                       came, less that packet's "time"; 0: none came yet
 *
 * "delay" is how long a packet of the other direction took, plus the difference
 * of the two clocks; as that stays the same, changes of "delay" are the other
 * direction's.  Both fields are modulo 2^32, and 0 in HELLO.
 *
 * The check finds damage of any pattern, as it depends on a key that damage
 * doesn't know; it is of the kind of NH (in UMAC, RFC 4418).  A word is 8
 * bytes, little endian; the last one of a payload is padded with zeros.  To
 * each word the key's word for its position is added, and the lower half of
 * that is multiplied by the upper half; "sum" is that of these products.  A
 * payload's key has words for 1 KiB, so it is summed in blocks of that; all is
 * modulo 2^64:
 *
 *   header   key word 4 + the digest of all packets before "ack" + sum of the
 *            4 words that follow the check, with key words 0 to 3
 *   payload  x = length; for each block: x = mix64(x + sum of the block)
 *
 * Why damage passes with a chance of 2^-32, whatever its pattern: of two words
 * that differ, the products differ by a given number with one key word in
 * 2^32, because for each value of one factor there is no more than one of the
 * other for which they do (each has 2^32, and a product is less than 2^64).  A
 * block that differs makes x differ from then on, as mix64() is a bijection,
 * unless a later block makes up for just that; and blocks that changed places
 * differ as well.  One core of an Intel Xeon checks 60 GB/s of what is in its
 * cache with AVX2, 44 with SSE2 and 15 word by word; 25, 25 and 14 from memory.
 *
 * The key's words are mix64() of its seed plus multiples of VP_CHECK_STEP.
 * The key of headers is made in each handshake, so what was sent before never
 * passes.  With a damaged ack the digest is another one, for which the damage
 * can hardly make up.  The key of payloads belongs to the session, because
 * packets are sent again after later handshakes, and the digest is made of
 * their checks.  A HELLO, which comes before both, has VP_MAGIC for a seed in
 * its header; in its payload the token as well, so no damage passes always.
 * ====================================================================== */

#define VP_MAGIC 0x71656d752d767031ull /* "qemu-vp1" */

#define VP_PKT_HDR_LEN 40
#define VP_PKT_TYPE_AT 16
#define VP_PKT_ACK_AT 28
#define VP_PKT_LEN_MAX 65536
#define VP_PKT_DATA_LEN (VP_PKT_LEN_MAX - VP_PKT_HDR_LEN)

enum {
    VP_PKT_CONTROL = 1, /* about a connection, see below */
    VP_PKT_CLIENT,      /* data from the connection's client side */
    VP_PKT_SERVER,      /* data from its server side */
    VP_PKT_HELLO,       /* unsequenced, seeded with VP_MAGIC */
    VP_PKT_ACK,         /* unsequenced: only its header matters */
    VP_PKT_PING,        /* unsequenced, wants an ACK at once */
};

enum {
    VP_FLAG_CLIENT = 1,  /* CONTROL: sent by the connection's client side */
    VP_FLAG_ACK_NOW = 2, /* the sender waits for an ack */
    VP_FLAG_PROBE = 4,   /* it holds back to see the round-trip time */
};

/*
 * Control messages: the first byte of a VP_PKT_CONTROL payload.  Who doesn't
 * know one of them ends the session, but for those from VP_MSG_OPTIONAL on,
 * which are about the session, not a connection: these he ignores.
 */
enum {
    VP_MSG_CONNECT_INIT = 1, /* credit 64, length 8, service id, VPOrigin */
    VP_MSG_CONNECT_ACK,      /* credit 64 */
    VP_MSG_CONNECT_REFUSED,  /* reason 8 */
    VP_MSG_WINDOW,           /* 64: bytes the peer may have sent by now */
    VP_MSG_CLOSE,            /* end of this direction */
    VP_MSG_RESET,            /* reason 8 */
    VP_MSG_OPTIONAL = 128,
    VP_MSG_SERVICES = VP_MSG_OPTIONAL, /* flags 8, then length 8, id; ... */
    VP_MSG_PROGRAM,          /* text: the version of the program */
};

/* Those about a connection. */
static const struct {
    uint8_t len; /* bytes; 0: not always as many */
    const char *malformed;
} conn_msg[] = {
    [VP_MSG_CONNECT_INIT] = { 0, "malformed CONNECT_INIT" },
    [VP_MSG_CONNECT_ACK] = { 1 + 8, "malformed CONNECT_ACK" },
    [VP_MSG_CONNECT_REFUSED] = { 1 + 1, "malformed CONNECT_REFUSED" },
    [VP_MSG_WINDOW] = { 1 + 8, "malformed WINDOW" },
    [VP_MSG_CLOSE] = { 1, "malformed CLOSE" },
    [VP_MSG_RESET] = { 1 + 1, "malformed RESET" },
};

enum {
    VP_SERVICES_BEGIN = 1, /* what was named before doesn't count any more */
    VP_SERVICES_END = 2,   /* there are no others than those named so far */
};

/*
 * Where a client comes from, as CONNECT_INIT says: kind 8 and, of the last two
 * kinds, its address and the one that it connected to, 4 or 16 bytes each, and
 * their ports, 16 each.
 */
typedef enum VPOriginKind {
    VP_ORIGIN_UNKNOWN = 0,
    VP_ORIGIN_UNIX = 1,
    VP_ORIGIN_IPV4 = 4,
    VP_ORIGIN_IPV6 = 6,
} VPOriginKind;

#define VP_ORIGIN_LEN_MAX (1 + 2 * (16 + 2))
#define VP_CONTROL_LEN_MAX (1 + 8 + 1 + VP_SERVICE_ID_LEN + VP_ORIGIN_LEN_MAX)

/* It is kept as it is on the wire. */
typedef struct VPOrigin {
    uint8_t bytes[VP_ORIGIN_LEN_MAX];
} VPOrigin;

typedef enum VPReason {
    VP_REASON_NONE,
    VP_REASON_UNKNOWN_SERVICE,
    VP_REASON_REFUSED,
    VP_REASON_UNREACHABLE,
    VP_REASON_TIMEOUT,
    VP_REASON_LIMIT,
    VP_REASON_RESOURCES,
    VP_REASON_OTHER,
    VP_REASON_ENDING, /* the daemon ends: deliver what it sent before */
    VP_REASON_GONE,   /* nobody is left who reads: deliver what was sent */
} VPReason;

/* A header in the order of the machine; the checks are made on the way. */
typedef struct VPPacket {
    uint8_t type;
    uint8_t flags;
    uint16_t bytes;
    uint32_t conn;
    uint32_t seq;
    uint32_t ack;
    uint32_t time;
    uint32_t delay;
    uint64_t data_check;
} VPPacket;

/* What HELLO carries; of a longer one the rest is a later version's. */
typedef struct VPHello {
    uint16_t version;    /* highest that is spoken */
    uint16_t oldest;     /* lowest that is spoken */
    uint32_t flags;
    uint32_t features;   /* optional ones that are known; none so far */
    uint32_t window;     /* credit that each new connection starts with */
    uint64_t token;
    uint64_t echo;       /* the peer's token, 0: not heard yet */
    uint64_t my_epoch;   /* the session I hold, 0: none */
    uint64_t peer_epoch;
    uint64_t digest;     /* of all sequenced packets received */
    uint32_t expect;     /* sequence number I expect next */
    uint32_t base;       /* oldest one I can still send */
    uint32_t next;       /* the one I will give to the next new packet */
    uint32_t max_conns;  /* that the peer may have open to me */
    uint64_t instance;   /* a random number of the sending process's own */
    uint8_t proof[32];   /* that I have the key; zeros without one */
} VPHello;

#define VP_HELLO_TOKEN_AT 16 /* in every version: it is in the check's key */
#define VP_HELLO_PROOF_AT 80 /* all that is before and behind it is proved */
#define VP_HELLO_LEN (VP_HELLO_PROOF_AT + 32)
#define VP_HELLO_LEN_MAX 1024 /* of any version */

enum {
    VP_HELLO_UP = 1,        /* your token was echoed to me, I am up */
    VP_HELLO_KEYED = 2,     /* I have a key, and you must prove that you do */
    VP_HELLO_LISTENER = 4,  /* I was connected to */
    VP_HELLO_CONNECTOR = 8, /* I made the connection */
    VP_HELLO_BYE = 16,      /* the session I name is over */
};

#define VP_CHECK_WORDS 128 /* in a block */
#define VP_CHECK_BLOCK (8u * VP_CHECK_WORDS)
/* 2^64 by the golden ratio: its multiples are far from each other. */
#define VP_CHECK_STEP 0x9e3779b97f4a7c15ull

/* Key of the checks of headers: for each word covered one, and one to add */
typedef struct VPHeaderKey {
    uint64_t word[5];
} VPHeaderKey;

/* Key of the checks of payloads; aligned, since sum_sse2() is faster then */
typedef struct VPPayloadKey {
    _Alignas(16) uint64_t word[VP_CHECK_WORDS];
} VPPayloadKey;

/* Of HELLOs: what header_key() makes of VP_MAGIC */
static const VPHeaderKey hello_key = { {
    0xe1a9b9543ca4e072, 0xbb96f0cac18a143b, 0xc43c8d67fd4538c7,
    0x98dc65450c3c3203, 0x16fd57aa993c1dbc,
} };

static const char *reason_str(unsigned reason)
{
    static const char *const text[] = {
        [VP_REASON_NONE] = "reset by the other side",
        [VP_REASON_UNKNOWN_SERVICE] = "unknown service",
        [VP_REASON_REFUSED] = "connection refused by the target",
        [VP_REASON_UNREACHABLE] = "target unreachable",
        [VP_REASON_TIMEOUT] = "timed out",
        [VP_REASON_LIMIT] = "too many connections",
        [VP_REASON_RESOURCES] = "out of memory or descriptors",
        [VP_REASON_OTHER] = "failed",
        [VP_REASON_ENDING] = "the other side's daemon ends",
        [VP_REASON_GONE] = "nobody is left at the other side",
    };

    return text[reason <= VP_REASON_GONE ? reason : VP_REASON_OTHER];
}

static VPReason reason_from_errno(int err)
{
    switch (err) {
    case ECONNREFUSED:
    case ENOENT: /* a unix socket that isn't there */
        return VP_REASON_REFUSED;
    case ENETUNREACH:
    case EHOSTUNREACH:
    case ENETDOWN:
    case EADDRNOTAVAIL:
        return VP_REASON_UNREACHABLE;
    case ETIMEDOUT:
        return VP_REASON_TIMEOUT;
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENOBUFS:
        return VP_REASON_RESOURCES;
    default:
        return VP_REASON_OTHER;
    }
}

static void key_words(uint64_t *word, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        word[i] = mix64(seed + (i + 1) * VP_CHECK_STEP);
    }
}

static void header_key(VPHeaderKey *key, uint64_t seed)
{
    key_words(key->word, 5, seed);
}

/* payload_key() - other words than header_key() makes of the same seed */
static void payload_key(VPPayloadKey *key, uint64_t seed)
{
    key_words(key->word, VP_CHECK_WORDS, ~seed);
}

/* get64_little() - compilers make one load of this, but not of a loop */
static uint64_t get64_little(const uint8_t *p)
{
    return p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 |
           (uint64_t)p[3] << 24 | (uint64_t)p[4] << 32 |
           (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

/* halves_product() - lower half times upper half */
static uint64_t halves_product(uint64_t x)
{
    return (x & 0xffffffff) * (x >> 32);
}

/* sum_words() - the sum of a block or a part of one, word by word */
static uint64_t sum_words(const uint64_t *key, const uint8_t *p, size_t len)
{
    uint64_t sum = 0, last = 0;

    for (; len >= 8; len -= 8, p += 8) {
        sum += halves_product(get64_little(p) + *key++);
    }
    if (len > 0) {
        while (len > 0) {
            last = last << 8 | p[--len];
        }
        sum += halves_product(last + *key);
    }
    return sum;
}

#ifdef VP_VECTORS
#define VP_SUM_STEP 64 /* bytes that sum_sse2() and sum_avx2() take at a time */

typedef uint64_t VPWords2 __attribute__((vector_size(16)));
typedef uint64_t VPWords4 __attribute__((vector_size(32)));

/* products_sse2() - of two words (gcc puts arrays of vectors on the stack) */
static VPWords2 products_sse2(const uint64_t *key, const uint8_t *p)
{
    VPWords2 x, k;
    __m128i upper;

    memcpy(&x, p, sizeof(x));
    memcpy(&k, __builtin_assume_aligned(key, sizeof(k)), sizeof(k));
    x += k;
    /* the halves in the order 1, 1, 3, 3: a shift would need a copy first */
    upper = _mm_shuffle_epi32((__m128i)x, 0xf5);
    return (VPWords2)_mm_mul_epu32((__m128i)x, upper);
}

/* sum_sse2() - the sum of @len bytes, a multiple of VP_SUM_STEP, by vectors */
static uint64_t sum_sse2(const uint64_t *key, const uint8_t *p, size_t len)
{
    VPWords2 sum = { 0 };

    for (const uint8_t *end = p + len; p < end; p += VP_SUM_STEP, key += 8) {
        sum += products_sse2(key, p) + products_sse2(key + 2, p + 16);
        sum += products_sse2(key + 4, p + 32) + products_sse2(key + 6, p + 48);
    }
    return sum[0] + sum[1];
}

__attribute__((target("avx2")))
static VPWords4 products_avx2(const uint64_t *key, const uint8_t *p)
{
    VPWords4 x, k;

    memcpy(&x, p, sizeof(x));
    memcpy(&k, key, sizeof(k));
    x += k;
    return (VPWords4)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
}

/* sum_avx2() - the same in half as many instructions */
__attribute__((target("avx2")))
static uint64_t sum_avx2(const uint64_t *key, const uint8_t *p, size_t len)
{
    VPWords4 sum = { 0 };

    for (const uint8_t *end = p + len; p < end; p += VP_SUM_STEP, key += 8) {
        sum += products_avx2(key, p) + products_avx2(key + 4, p + 32);
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}
#endif

/* sum_block() - sum_words(), in the way this processor does fastest */
static uint64_t sum_block(const uint64_t *key, const uint8_t *p, size_t len)
{
    uint64_t sum = 0;

#ifdef VP_VECTORS
    size_t part = len - len % VP_SUM_STEP;

    if (part > 0) {
        sum = __builtin_cpu_supports("avx2") ? sum_avx2(key, p, part)
                                             : sum_sse2(key, p, part);
        key += part / 8;
        p += part;
        len -= part;
    }
#endif
    return sum + sum_words(key, p, len);
}

/* wire_data_check() - of a payload */
static uint64_t wire_data_check(const VPPayloadKey *key, const uint8_t *p,
                                size_t len)
{
    uint64_t check = len;

    while (len > 0) {
        size_t part = MIN(len, VP_CHECK_BLOCK);

        check = mix64(check + sum_block(key->word, p, part));
        p += part;
        len -= part;
    }
    return check;
}

static bool wire_data_ok(const VPPacket *pkt, const uint8_t *payload,
                         const VPPayloadKey *key)
{
    return pkt->data_check == wire_data_check(key, payload, pkt->bytes);
}

/* header_check() - @digest: of all packets before the one it acks */
static uint64_t header_check(const uint8_t *p, const VPHeaderKey *key,
                             uint64_t digest)
{
    return key->word[4] + digest +
           sum_words(key->word, p + 8, VP_PKT_HDR_LEN - 8);
}

/* wire_seed() - differs for the two directions: an echo of ours won't check */
static uint64_t wire_seed(uint64_t sender_token, uint64_t receiver_token,
                          const VPKey *key)
{
    uint8_t tokens[16], proof[SHA256_LEN];

    if (key == NULL) {
        return mix64(mix64(sender_token) + receiver_token);
    }
    put64(tokens, sender_token);
    put64(tokens + 8, receiver_token);
    key_prove(key, "packets", tokens, sizeof(tokens), proof);
    return get64(proof);
}

/* wire_put() - write the header of a packet whose payload is behind it */
static void wire_put(uint8_t *p, const VPPacket *pkt, const VPHeaderKey *key,
                     uint64_t digest)
{
    put64(p + 8, pkt->data_check);
    p[VP_PKT_TYPE_AT] = pkt->type;
    p[17] = pkt->flags;
    put16(p + 18, pkt->bytes);
    put32(p + 20, pkt->conn);
    put32(p + 24, pkt->seq);
    put32(p + VP_PKT_ACK_AT, pkt->ack);
    put32(p + 32, pkt->time);
    put32(p + 36, pkt->delay);
    put64(p, header_check(p, key, digest));
}

/* wire_get() - read a header; false if its check is wrong */
static bool wire_get(const uint8_t *p, VPPacket *pkt, const VPHeaderKey *key,
                     uint64_t digest)
{
    if (get64(p) != header_check(p, key, digest)) {
        return false;
    }
    pkt->data_check = get64(p + 8);
    pkt->type = p[VP_PKT_TYPE_AT];
    pkt->flags = p[17];
    pkt->bytes = get16(p + 18);
    pkt->conn = get32(p + 20);
    pkt->seq = get32(p + 24);
    pkt->ack = get32(p + VP_PKT_ACK_AT);
    pkt->time = get32(p + 32);
    pkt->delay = get32(p + 36);
    return true;
}

/* hello_data_check() - of a HELLO's payload, which holds what seeds the key */
static uint64_t hello_data_check(const uint8_t *d, size_t len)
{
    VPPayloadKey key;

    payload_key(&key, wire_seed(VP_MAGIC, get64(d + VP_HELLO_TOKEN_AT), NULL));
    return wire_data_check(&key, d, len);
}

/*
 * hello_prove() - the proof of a HELLO's contents, @len bytes at @d
 *
 * It covers all but the place where it stands.
 */
static void hello_prove(const VPKey *key, const uint8_t *d, size_t len,
                        uint8_t proof[SHA256_LEN])
{
    uint8_t rest[VP_HELLO_LEN_MAX];
    size_t behind = VP_HELLO_PROOF_AT + SHA256_LEN;

    memcpy(rest, d, VP_HELLO_PROOF_AT);
    memcpy(rest + VP_HELLO_PROOF_AT, d + behind, len - behind);
    key_prove(key, "hello", rest, len - SHA256_LEN, proof);
}

/*
 * wire_put_hello() - a whole HELLO packet; returns its length
 * @key:  NULL, or what to prove it with
 */
static size_t wire_put_hello(uint8_t *p, const VPHello *h, const VPKey *key)
{
    VPPacket pkt = { .type = VP_PKT_HELLO, .bytes = VP_HELLO_LEN };
    uint8_t *d = p + VP_PKT_HDR_LEN;

    put16(d, h->version);
    put16(d + 2, h->oldest);
    put32(d + 4, h->flags);
    put32(d + 8, h->features);
    put32(d + 12, h->window);
    put64(d + 16, h->token);
    put64(d + 24, h->echo);
    put64(d + 32, h->my_epoch);
    put64(d + 40, h->peer_epoch);
    put64(d + 48, h->digest);
    put32(d + 56, h->expect);
    put32(d + 60, h->base);
    put32(d + 64, h->next);
    put32(d + 68, h->max_conns);
    put64(d + 72, h->instance);
    memset(d + VP_HELLO_PROOF_AT, 0, SHA256_LEN);
    if (key != NULL) {
        hello_prove(key, d, VP_HELLO_LEN, d + VP_HELLO_PROOF_AT);
    }
    pkt.data_check = hello_data_check(d, VP_HELLO_LEN);
    wire_put(p, &pkt, &hello_key, 0);
    return VP_PKT_HDR_LEN + VP_HELLO_LEN;
}

/* hello_version() - the version that both sides use, 0: there is none */
static unsigned hello_version(const VPHello *h)
{
    unsigned common = MIN(h->version, VP_VERSION);

    return common >= MAX(h->oldest, VP_VERSION_OLDEST) ? common : 0;
}

/*
 * hello_clash() - why a HELLO without a common version makes no session
 *
 * Returns @buf, cut to @size.
 */
static const char *hello_clash(const VPHello *h, char *buf, size_t size)
{
    char theirs[VP_VERSIONS_LEN], ours[VP_VERSIONS_LEN];

    snprintf(buf, size, "no common version of the protocol: the other end "
             "speaks %s, this one %s; upgrade %s",
             vp_versions(h->oldest, h->version, theirs),
             vp_versions(VP_VERSION_OLDEST, VP_VERSION, ours),
             h->version < VP_VERSION_OLDEST ? "the other end" : "this one");
    return buf;
}

/*
 * wire_get_hello() - is there a HELLO at @p?
 *
 * Returns its length, 0 if more bytes are needed to tell, -1 if not.  Where
 * there is no common version only the versions are set.
 */
static int wire_get_hello(const uint8_t *p, size_t len, VPHello *h)
{
    const uint8_t *d = p + VP_PKT_HDR_LEN;
    VPPacket pkt;

    if (len < VP_PKT_HDR_LEN) {
        return 0;
    }
    if (p[VP_PKT_TYPE_AT] != VP_PKT_HELLO ||
        !wire_get(p, &pkt, &hello_key, 0) ||
        pkt.bytes < VP_HELLO_TOKEN_AT + 8 || pkt.bytes > VP_HELLO_LEN_MAX) {
        return -1;
    }
    if (len < (size_t)VP_PKT_HDR_LEN + pkt.bytes) {
        return 0;
    }
    if (pkt.data_check != hello_data_check(d, pkt.bytes)) {
        return -1;
    }
    memset(h, 0, sizeof(*h));
    h->version = get16(d);
    h->oldest = get16(d + 2);
    if (hello_version(h) != 0) {
        if (pkt.bytes < VP_HELLO_LEN) {
            return -1;
        }
        h->flags = get32(d + 4);
        h->features = get32(d + 8);
        h->window = get32(d + 12);
        h->token = get64(d + 16);
        h->echo = get64(d + 24);
        h->my_epoch = get64(d + 32);
        h->peer_epoch = get64(d + 40);
        h->digest = get64(d + 48);
        h->expect = get32(d + 56);
        h->base = get32(d + 60);
        h->next = get32(d + 64);
        h->max_conns = get32(d + 68);
        h->instance = get64(d + 72);
        memcpy(h->proof, d + VP_HELLO_PROOF_AT, sizeof(h->proof));
    }
    return VP_PKT_HDR_LEN + pkt.bytes;
}

/* hello_proved() - was @h, which is at @p, made with the key? */
static bool hello_proved(const VPHello *h, const uint8_t *p, const VPKey *key)
{
    uint8_t proof[32], diff = 0;

    hello_prove(key, p + VP_PKT_HDR_LEN, get16(p + 18), proof);
    for (size_t i = 0; i < sizeof(proof); i++) {
        diff |= (uint8_t)(proof[i] ^ h->proof[i]); /* in constant time */
    }
    return diff == 0;
}

/* origin_len() - bytes of both ends' addresses and ports; 0: it has none */
static size_t origin_len(VPOriginKind kind)
{
    return kind == VP_ORIGIN_IPV4 ? 2 * (4 + 2)
           : kind == VP_ORIGIN_IPV6 ? 2 * (16 + 2) : 0;
}

/* origin_ip() - a part of an origin of a kind that has addresses; NULL: none */
static const uint8_t *origin_ip(const VPAddr *addr, VPOriginKind *kind,
                                uint16_t *port)
{
    const struct sockaddr_in *in = (const void *)&addr->ss;
    const struct sockaddr_in6 *in6 = (const void *)&addr->ss;

    if (addr->ss.ss_family == AF_INET) {
        *kind = VP_ORIGIN_IPV4;
        *port = ntohs(in->sin_port);
        return (const uint8_t *)&in->sin_addr;
    }
    if (addr->ss.ss_family != AF_INET6) {
        return NULL;
    }
    *port = ntohs(in6->sin6_port);
    if (IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
        *kind = VP_ORIGIN_IPV4; /* a listener for both has it so */
        return in6->sin6_addr.s6_addr + 12;
    }
    *kind = VP_ORIGIN_IPV6;
    return in6->sin6_addr.s6_addr;
}

/* origin_put() - of a client at @from that connected to @to; its length */
static size_t origin_put(uint8_t *p, const VPAddr *from, const VPAddr *to)
{
    VPOriginKind kind[2] = { VP_ORIGIN_UNKNOWN, VP_ORIGIN_UNKNOWN };
    uint16_t port[2];
    const uint8_t *ip[2] = {
        origin_ip(from, &kind[0], &port[0]), origin_ip(to, &kind[1], &port[1]),
    };
    size_t len;

    if (ip[0] == NULL || kind[0] != kind[1]) {
        p[0] = to->ss.ss_family == AF_UNIX ? VP_ORIGIN_UNIX : VP_ORIGIN_UNKNOWN;
        return 1;
    }
    p[0] = (uint8_t)kind[0];
    len = origin_len(kind[0]) / 2 - 2; /* of an address */
    for (size_t i = 0; i < 2; i++) {
        memcpy(p + 1 + i * len, ip[i], len);
        put16(p + 1 + 2 * len + 2 * i, port[i]);
    }
    return 1 + 2 * (len + 2);
}

/* origin_get() - what isn't all there, or of another kind, is not known */
static void origin_get(VPOrigin *o, const uint8_t *p, size_t len)
{
    VPOriginKind kind = len > 0 ? p[0] : VP_ORIGIN_UNKNOWN;
    size_t want = 1 + origin_len(kind);

    *o = (VPOrigin){ { VP_ORIGIN_UNKNOWN } };
    if (want <= len && (want > 1 || kind == VP_ORIGIN_UNIX)) {
        memcpy(o->bytes, p, want);
    }
}

/* origin_str() - the client's address, "" if it is not known */
static const char *origin_str(const VPOrigin *o, char *buf, size_t size)
{
    VPOriginKind kind = o->bytes[0];
    VPAddr addr = { .len = sizeof(sa_family_t), .ss.ss_family = AF_UNIX };
    struct sockaddr_in *in = (void *)&addr.ss;
    struct sockaddr_in6 *in6 = (void *)&addr.ss;

    if (kind == VP_ORIGIN_UNKNOWN) {
        buf[0] = '\0';
        return buf;
    }
    if (kind == VP_ORIGIN_IPV4) {
        addr.len = sizeof(*in);
        in->sin_family = AF_INET;
        memcpy(&in->sin_addr, o->bytes + 1, 4);
        in->sin_port = htons(get16(o->bytes + 9));
    } else if (kind == VP_ORIGIN_IPV6) {
        addr.len = sizeof(*in6);
        in6->sin6_family = AF_INET6;
        memcpy(&in6->sin6_addr, o->bytes + 1, 16);
        in6->sin6_port = htons(get16(o->bytes + 33));
    }
    return vp_addr_str(&addr, buf, size);
}

/* Of the PROXY protocol's header: version 2 of haproxy's proxy-protocol.txt. */
#define VP_PROXY_LEN_MAX (16 + VP_ORIGIN_LEN_MAX - 1)

/*
 * origin_proxy() - a header of the PROXY protocol that names the client
 * @p:  VP_PROXY_LEN_MAX bytes
 *
 * Returns its length.  A client without an address of IP is announced as LOCAL,
 * because that is what every target has to accept.
 */
static size_t origin_proxy(const VPOrigin *o, uint8_t *p)
{
    static const uint8_t signature[12] = "\r\n\r\n\0\r\nQUIT\n";
    VPOriginKind kind = o->bytes[0];
    size_t len = origin_len(kind);

    memcpy(p, signature, sizeof(signature));
    p[12] = len > 0 ? 0x21 : 0x20; /* version 2: PROXY, or LOCAL */
    p[13] = kind == VP_ORIGIN_IPV4 ? 0x11 : kind == VP_ORIGIN_IPV6 ? 0x21 : 0;
    put16(p + 14, (uint16_t)len);
    memcpy(p + 16, o->bytes + 1, len); /* in the order of CONNECT_INIT */
    return 16 + len;
}

/* seq_diff() - how far @a is ahead of @b; numbers wrap (RFC 1982) */
static int32_t seq_diff(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b);
}

static uint64_t digest_add(uint64_t digest, const VPPacket *pkt)
{
    uint64_t side = pkt->flags & VP_FLAG_CLIENT; /* both may use the id */

    return mix64(digest ^ pkt->data_check) +
           (side << 56 ^ (uint64_t)pkt->type << 48 ^
            (uint64_t)pkt->bytes << 32 ^ pkt->conn);
}

/* ======================================================================
 * store
 *
 * Packets that are not acked lie in a ring, as they are on the wire, none
 * across the end, and are sent again from there.  The ring begins anew when it
 * is empty, and as soon as there is room at its beginning for what may be in
 * flight: so it touches no more memory, and no more of the cache, than the
 * channel's speed asks for.  It doubles when twice as much may be in flight as
 * before, as far as the channel's memory lets it.
 * ====================================================================== */

/*
 * Bytes of un-acked packets the link can hold to send again: at first, and at
 * most.  Powers of two.
 */
#define VP_STORE_LEN (4u << 20)
#define VP_STORE_LEN_MAX (64u << 20)
/* There may be a packet in it for so many bytes of its length. */
#define VP_STORE_PKT 2048u

/*
 * First sequence number of a session: it wraps around early in every session's
 * life, not only in the long ones.
 */
#define VP_SEQ_FIRST (0u - 1000u)

/* A packet in the send store; the last four fields are set by flow_sent(). */
typedef struct VPSent {
    VPPacket pkt;
    uint32_t off;          /* offset of its header in VPStore.ring */
    uint32_t len;          /* bytes, with header */
    uint64_t digest;       /* of all packets up to this one */
    uint64_t sent_at;      /* time when it was handed to the channel, us */
    uint64_t delivered;    /* VPFlow.delivered at sent_at */
    uint32_t received;     /* VPFlow.received at sent_at */
    bool app_limited;      /* too little was sent to keep the channel busy */
} VPSent;

typedef struct VPStore {
    uint8_t *ring;        /* len bytes, or NULL */
    VPSent *sent;         /* by sequence number modulo store_pkts() */
    uint32_t len;         /* of ring; a power of two, or 0 */
    uint32_t len_max;     /* that it may have; a power of two */
    uint32_t head;        /* offset in ring for the next packet */
    uint32_t base;        /* sequence number of the oldest packet held */
    uint32_t next;        /* sequence number of the next packet */
    uint32_t unsent;      /* first packet not wholly handed to the channel */
    uint32_t unsent_off;  /* bytes of packet "unsent" that were handed over */
    uint32_t bytes;       /* of all packets held */
    uint32_t bytes_out;   /* of the packets that were begun to be sent */
    uint64_t base_digest; /* of all packets before base */
    uint64_t digest;      /* of all packets before next */
} VPStore;

/* store_pkts() - packets that it can hold */
static uint32_t store_pkts(const VPStore *s)
{
    return s->len / VP_STORE_PKT;
}

static VPSent *store_sent(VPStore *s, uint32_t seq)
{
    return &s->sent[seq & (store_pkts(s) - 1)];
}

static void store_reset(VPStore *s)
{
    s->head = 0;
    s->base = s->next = s->unsent = VP_SEQ_FIRST;
    s->unsent_off = 0;
    s->bytes = s->bytes_out = 0;
    s->base_digest = s->digest = 0;
}

/* store_trim() - give the memory back; the store must hold no packet */
static void store_trim(VPStore *s)
{
    free(s->ring);
    free(s->sent);
    s->ring = NULL;
    s->sent = NULL;
    s->len = 0;
}

/* store_grow() - twice as long, with all that it holds; false: no memory */
static bool store_grow(VPStore *s)
{
    VPStore old = *s;
    uint32_t len = MAX(2 * s->len, VP_STORE_LEN);
    VPSent *sent = malloc(len / VP_STORE_PKT * sizeof(*sent));
    uint8_t *ring = sent != NULL ? realloc(s->ring, len) : NULL;

    if (ring == NULL) {
        free(sent);
        return false;
    }
    s->ring = ring;
    s->sent = sent;
    s->len = len;
    for (uint32_t seq = s->base; seq != s->next; seq++) {
        *store_sent(s, seq) = *store_sent(&old, seq);
    }
    free(old.sent);
    return true;
}

/*
 * store_room() - contiguous bytes for new packets at store.head
 * @want:  if there isn't so much before the end, go on at the beginning
 * @limit:  bytes in flight, at most
 *
 * Returns 0 when full or out of memory.
 */
static uint32_t store_room(VPStore *s, uint32_t want, uint32_t limit)
{
    uint32_t tail;

    if ((s->ring == NULL || (s->len < 2 * limit && s->len < s->len_max)) &&
        !store_grow(s) && s->ring == NULL) {
        return 0;
    }
    if (s->next - s->base >= store_pkts(s)) {
        return 0;
    }
    if (s->base == s->next) {
        s->head = 0;
        return s->len;
    }
    tail = store_sent(s, s->base)->off;
    if (s->head > tail) {
        if (tail <= MAX(want, limit) &&
            (s->len - s->head >= want || tail <= want)) {
            return s->len - s->head;
        }
        s->head = 0;
    }
    return tail - s->head - (tail > s->head);
}

/* store_payload() - where the next packet's payload goes */
static uint8_t *store_payload(const VPStore *s)
{
    return s->ring + s->head + VP_PKT_HDR_LEN;
}

/* store_add() - take in a packet whose bytes are at store.head already */
static void store_add(VPStore *s, const VPPacket *pkt)
{
    VPSent *sent = store_sent(s, s->next);

    s->digest = digest_add(s->digest, pkt);
    *sent = (VPSent){
        .pkt = *pkt,
        .off = s->head,
        .len = VP_PKT_HDR_LEN + pkt->bytes,
        .digest = s->digest,
    };
    s->head += sent->len;
    s->bytes += sent->len;
    s->next++;
}

/* store_release() - drop the packets before @seq; returns all their flags */
static unsigned store_release(VPStore *s, uint32_t seq)
{
    unsigned flags = 0;

    while (s->base != seq) {
        VPSent *sent = store_sent(s, s->base);

        flags |= sent->pkt.flags;
        s->bytes -= sent->len;
        if (seq_diff(s->unsent, s->base) > 0) {
            s->bytes_out -= sent->len;
        }
        s->base_digest = sent->digest;
        s->base++;
    }
    return flags;
}

/*
 * store_rewind() - send again from @seq on, the packet the peer expects
 *
 * An ack is asked for each: the bound in flight may be new, and small.
 */
static void store_rewind(VPStore *s, uint32_t seq)
{
    store_release(s, seq);
    s->unsent = s->base;
    s->unsent_off = 0;
    s->bytes_out = 0;
    for (seq = s->base; seq != s->next; seq++) {
        store_sent(s, seq)->pkt.flags |= VP_FLAG_ACK_NOW;
    }
}

/* store_digest() - of all packets before @seq, which must be held */
static uint64_t store_digest(VPStore *s, uint32_t seq)
{
    return seq == s->base ? s->base_digest : store_sent(s, seq - 1)->digest;
}

/* ======================================================================
 * flow
 *
 * What the kernel, QEMU and the line hold can't be overtaken, so the link
 * keeps no more un-acked bytes there than the channel needs to stay busy:
 * its delivery rate times its shortest round trip and a little more, or two
 * packets where that is more.  The rate is measured from acks (as in BBR,
 * draft-cardwell-iccrg-bbr-congestion-control): the bytes acked in a round
 * trip, or in VP_ROUND_US where that is longer, since a few packets that go
 * through while both ends have the CPU say little; or in the time in which
 * they were sent, since acks that were held up come all at once.  The best of
 * the last second or two counts.  At first the bound doubles each round for
 * which the rate has followed the last doubling; once it no longer does, or a
 * round trip shows a queue, the channel is full and the queue is cut to
 * VP_QUEUE_US.  From time to time the bound is cut further to let the queue
 * drain and see the shortest round trip again; the peer then does the same,
 * or its queue, which acks wait in, would be part of what is seen.
 *
 * While the peer sends as well, acks wait behind its packets.  They count as
 * soon as the header they are in has come.  All the same a round trip takes
 * what both queues take, so it is the larger bound of the two, in time, that
 * fills its direction.  The other side gets as much of the channel as its bound
 * is of that one; its rate is less by that, so would the bound then be, and so
 * on.  So the bound is that for the path: the round trip less the time in this
 * direction's own queue, which has the peer's queue in it.  A header says how
 * long the newest packet that it acks took, except for the difference of the
 * two clocks; by how much longer that is than the shortest since the last probe
 * is the time in the own queue (as in LEDBAT, RFC 6817).  To the path comes the
 * time between two acks, because what these free leaves, and fills the queue,
 * in bunches.
 *
 * If both sides do so, the difference of the two queues evens out, but their
 * sum would stay as long as it once became: each side takes the other's for
 * distance.  So a part of what the path has beyond the shortest round trip
 * doesn't count.  Nor does more than one and a half times the rate of the last
 * round: a channel that has become slow would get a queue as long as the path
 * at the rate it had before, and one that has become long would have a bound
 * that doubles with each round, as half of its length seems to be a queue.
 *
 * On a long path acks come in bunches as long as a round trip, and what they
 * free makes a queue in which the rest of the bound seems to be.  So at least
 * half of what came in during a round trip, which is what the peer has on its
 * way, is added to the bound: for the smaller one that is more.
 *
 * Within one machine a round trip is what the scheduler makes of it, and the
 * bound is one of two: so much that the kernel wakes the other side seldom and
 * the bytes are still in the cache when it reads them; or, while a connection
 * with little to say sends beside busy ones (mixed traffic), a tenth of that,
 * at the price of half the throughput: then no such message waits for more than
 * it takes to carry these.  Packets are short then, and one is sent in a pass,
 * as a message waits for the rest of a pass as well.  Beyond either bound there
 * is room for a message, which hence doesn't wait for an ack.
 *
 * Since acks bound what the channel holds, its socket's send buffer may be
 * as large as the kernel allows: it never fills on a slow channel.
 * ====================================================================== */

/* A packet is no shorter than this: its header is 5 % of it then. */
#define VP_PKT_LEN_MIN 640u
/* Time that a packet takes on the channel, at most, unless it is that short. */
#define VP_PKT_US 4000
/* Bytes in flight before anything is known. */
#define VP_LIMIT_START (4 * VP_PKT_LEN_MIN)
/* Bytes in flight at most, where the store may become @len bytes long. */
#define VP_LIMIT_MAX(len) ((len) / 2)
/* A shorter round trip than this is one within the machine. */
#define VP_NEAR_US 2000
/* A connection is sparse that has so little to send, for so long after. */
#define VP_SPARSE_LEN 4096
#define VP_SPARSE_US (10 * MS)
/* Length of a packet within the machine while a sparse one sends, at most. */
#define VP_PKT_LEN_MIXED (VP_PKT_LEN_MAX / 2)
/*
 * Bytes in flight within the machine, and while a sparse connection sends; with
 * room for a message, since a busy one's packets are too long for the rest.
 */
#define VP_LIMIT_SPARSE (VP_PKT_HDR_LEN + VP_SPARSE_LEN)
#define VP_LIMIT_NEAR (16u * VP_PKT_LEN_MAX + VP_LIMIT_SPARSE)
#define VP_LIMIT_MIXED (3u * VP_PKT_LEN_MIXED + VP_LIMIT_SPARSE)
/* What the two daemons need to be scheduled, beyond the round trip seen. */
#define VP_SLACK_US 300
/* Queue that keeps a full channel busy; of a long round trip such a part. */
#define VP_QUEUE_US 10000
#define VP_QUEUE_PART 6
/* A round takes no less; what comes within less says little of the rate. */
#define VP_ROUND_US 1000
/*
 * The best rate of so many rounds, and of so long, counts; or that of one round
 * which is as long, because the line has become slow then.
 */
#define VP_RATE_ROUNDS 4
#define VP_RATE_US SECOND
/* Rounds without growth of the rate after which the channel is full. */
#define VP_FULL_ROUNDS 3
/* Of what the path is longer than the shortest round trip, so much counts. */
#define VP_PATH_SHARE (15.0 / 16)
/* Time between two acks that is added to the path, at most. */
#define VP_GAP_US 10000
/* How long the shortest round trip seen is believed, as in BBR. */
#define VP_MIN_RTT_US (10 * SECOND)

/* How fast the channel is, and how much may be on its way; see flow_acked(). */
typedef struct VPFlow {
    double rate;          /* delivery rate, bytes per us; 0: not known yet */
    double rate_max[2];   /* best rate of the present span, of the one before */
    unsigned rounds;      /* busy rounds of the present span */
    uint64_t span_at;     /* time when the present span began */
    uint64_t round_at;    /* time when the present round began */
    uint64_t round_start; /* "delivered" when the present round began */
    uint64_t round_sent_at; /* send time of the packet whose ack began it, us */
    double round_rate;    /* rate of the last round, bytes per us */
    uint64_t srtt;        /* smoothed round trip (RFC 6298), us; 0: not known */
    uint64_t min_rtt;     /* shortest round trip, us; UINT64_MAX: not known */
    uint64_t min_rtt_at;  /* time when min_rtt was measured */
    bool filled;          /* the channel was kept busy at least once */
    bool full;            /* the rate stopped to grow: start_limit is over */
    unsigned full_rounds; /* busy rounds without growth beyond full_rate */
    double full_rate;     /* rate at the last growth, bytes per us */
    double start_limit;   /* bound in flight before "full", doubled by growth */
    unsigned probing;     /* rounds left of holding back to see min_rtt */
    uint64_t probe_at;    /* time when the last probe, or round of it, began */
    uint32_t received;    /* bytes of the peer's packets, with headers */
    double came;          /* peer's bytes per round trip (EWMA, 1/8) */
    double path;          /* round trip without the time in this direction's
                             queue (EWMA, 1/16), us; 0: not known */
    uint32_t base;        /* shortest time that a packet took since "path" was
                             not known, plus the difference of the clocks, us
                             modulo 2^32 */
    double gap;           /* time between two acks (EWMA, 1/8), us */
    uint64_t sparse_at;   /* time when a sparse connection sent beside others */
    uint64_t delivered;   /* bytes acked */
    uint64_t acked_at;    /* time of the last ack */
    uint64_t app_limited; /* up to this "delivered" too little was sent */
    uint32_t enough;      /* bytes in flight that keep the channel busy */
    uint32_t limit;       /* bytes in flight, at most */
    uint32_t limit_max;   /* that limit may become; see flow_carried() */
    uint32_t pkt_len;     /* bytes of a packet, at most */
    uint32_t unmarked;    /* bytes sent since the last VP_FLAG_ACK_NOW */
    uint64_t marked_at;   /* time of the last VP_FLAG_ACK_NOW */
} VPFlow;

static void flow_reset(VPFlow *f, uint64_t now)
{
    memset(f, 0, sizeof(*f));
    f->limit_max = VP_LIMIT_MAX(VP_STORE_LEN);
    f->limit = f->enough = VP_LIMIT_START;
    f->pkt_len = VP_LIMIT_START / 4;
    f->min_rtt = UINT64_MAX;
    f->round_at = now;
}

/* flow_rtt() - a round trip took @rtt, or less */
static void flow_rtt(VPFlow *f, uint64_t rtt, uint64_t now)
{
    if (rtt <= f->min_rtt) {
        f->min_rtt = MAX(rtt, 1);
        f->min_rtt_at = now;
    }
}

/* flow_trip() - a round trip without queues, us; 0: not known */
static uint64_t flow_trip(const VPFlow *f)
{
    return f->min_rtt == UINT64_MAX ? 0 : f->min_rtt;
}

/*
 * flow_path() - a round trip took @rtt
 * @delay:  time that the newest packet took there, plus the difference of the
 *          clocks
 */
static void flow_path(VPFlow *f, uint64_t rtt, uint32_t delay)
{
    double queue;

    if (f->path == 0 || seq_diff(delay, f->base) < 0) {
        f->base = delay;
    }
    /* no more than the round trip leaves, because a clock may have jumped */
    queue = (double)MIN(delay - f->base, rtt - f->min_rtt);
    f->path += ((double)rtt - queue - f->path) / (f->path == 0 ? 1 : 16);
}

/* flow_probe() - hold back for two rounds, unless the last time was recent */
static void flow_probe(VPFlow *f, uint64_t now)
{
    if (f->probing == 0 && now - f->probe_at > VP_MIN_RTT_US / 2) {
        f->probing = 2;
        f->probe_at = now;
    }
}

/* flow_mixed() - within the machine: does a sparse connection send? */
static bool flow_mixed(const VPFlow *f, uint64_t now)
{
    return f->min_rtt < VP_NEAR_US && now - f->sparse_at < VP_SPARSE_US;
}

/* flow_update() - set limit, enough and pkt_len by what is known */
static void flow_update(VPFlow *f, uint64_t now)
{
    double pkt = f->rate * VP_PKT_US, rtt = (double)f->min_rtt;
    double limit, acks, queue = MIN(rtt, VP_QUEUE_US), most = f->limit_max;

    pkt = MIN(MAX(pkt, VP_PKT_LEN_MIN), VP_PKT_LEN_MAX);
    queue = f->full ? MAX(queue, rtt / VP_QUEUE_PART) : rtt;
    limit = f->rate * (rtt + queue + VP_SLACK_US);
    /*
     * A small packet saw min_rtt, a long one takes longer; and goes whole: with
     * a short queue there must be room for one more than before, or the rate
     * could never be seen to be higher than it was when the channel was full.
     */
    limit += queue < rtt ? pkt : pkt - VP_PKT_LEN_MIN / 2;
    acks = MIN(f->rate, 1.5 * f->round_rate) *
           (MAX(f->path - rtt, 0) * VP_PATH_SHARE + f->gap);
    limit += MAX(acks, MIN(f->rate * rtt, f->came / 2));
    limit = MAX(limit, 2 * pkt + VP_PKT_LEN_MIN / 4); /* and a small one */
    if (flow_mixed(f, now)) {
        most = VP_LIMIT_MIXED;
        pkt = MIN(pkt, VP_PKT_LEN_MIXED);
    } else if (f->min_rtt < VP_NEAR_US) {
        most = VP_LIMIT_NEAR;
    }
    limit = MIN(limit, most);
    f->enough = (uint32_t)MAX(limit, VP_LIMIT_START);
    if (!f->full) {
        limit = MIN(MAX(limit, f->start_limit), most);
    }
    if (!f->filled) { /* little was sent: that it took its time says nothing */
        pkt = MAX(pkt, VP_LIMIT_START / 4);
        limit = MAX(limit, VP_LIMIT_START);
    }
    if (now - f->min_rtt_at > VP_MIN_RTT_US) {
        flow_probe(f, now);
    }
    if (f->probing > 0) {
        limit = MAX(limit / 8, 2.0 * VP_PKT_LEN_MIN);
        pkt = MIN(pkt, limit / 2);
    }
    f->limit = (uint32_t)limit;
    f->pkt_len = (uint32_t)pkt;
}

/* flow_busy_round() - a round in which the channel was kept busy is over */
static void flow_busy_round(VPFlow *f, uint64_t rtt, uint64_t now)
{
    bool queue = rtt > 2 * f->min_rtt + VP_QUEUE_US;

    if (!queue && f->rate > 1.25 * f->full_rate) {
        f->full_rate = f->rate;
        f->full_rounds = 0;
        f->start_limit = 2.0 * f->limit;
    } else if (queue || ++f->full_rounds >= VP_FULL_ROUNDS) {
        f->full = true;
    }
    if (++f->rounds >= VP_RATE_ROUNDS && now - f->span_at >= VP_RATE_US) {
        f->rounds = 0;
        f->span_at = now;
        f->rate_max[1] = f->rate_max[0];
        f->rate_max[0] = 0;
    }
}

static void flow_begin_round(VPFlow *f, uint64_t sent_at, uint64_t now)
{
    f->round_at = now;
    f->round_sent_at = sent_at;
    f->round_start = f->delivered;
}

/* flow_end_round() - by the ack of @sent */
static void flow_end_round(VPFlow *f, const VPSent *sent, uint64_t now)
{
    uint64_t time = MAX(now - f->round_at, sent->sent_at - f->round_sent_at);
    double rate = (double)(f->delivered - f->round_start) / (double)time;

    f->round_rate = rate;
    if (!sent->app_limited && now - sent->sent_at >= VP_RATE_US) {
        f->rate_max[0] = f->rate_max[1] = 0;
    }
    if (rate > f->rate_max[0] && (!sent->app_limited || rate > f->rate)) {
        f->rate_max[0] = rate;
    }
    f->rate = MAX(f->rate_max[0], f->rate_max[1]);
    f->filled |= !sent->app_limited;
    if (!sent->app_limited) {
        flow_busy_round(f, now - sent->sent_at, now);
    }
    flow_begin_round(f, sent->sent_at, now);
}

/* flow_sent() - a packet leaves; @idle: nothing else is on its way */
static void flow_sent(VPFlow *f, VPSent *sent, bool idle, uint64_t now)
{
    if (idle && now - f->acked_at >= VP_ROUND_US) {
        flow_begin_round(f, now, now); /* the time before was no transfer's */
    }
    sent->sent_at = now;
    sent->delivered = f->delivered;
    sent->received = f->received;
    sent->app_limited = f->app_limited > f->delivered;
}

/*
 * flow_acked() - @sent is the newest packet of @bytes acked
 * @prompt:  an ack was asked for; delayed acks carry no timing
 * @delay:   time that the newest packet there took, plus the difference of the
 *           clocks
 */
static void flow_acked(VPFlow *f, const VPSent *sent, uint32_t bytes,
                       bool prompt, uint32_t delay, uint64_t now)
{
    uint64_t rtt = now - sent->sent_at;

    f->gap += ((double)MIN(now - f->acked_at, VP_GAP_US) - f->gap) / 8;
    f->delivered += bytes;
    f->acked_at = now;
    if (!prompt) {
        return;
    }
    f->srtt = f->srtt == 0 ? rtt : (7 * f->srtt + rtt) / 8;
    f->came += ((double)(f->received - sent->received) - f->came) / 8;
    if (f->probing > 0 && sent->sent_at > f->probe_at) {
        if (f->probing-- == 2) {
            f->min_rtt = UINT64_MAX;
            f->path = 0;
        }
        f->probe_at = now;
    }
    flow_rtt(f, rtt, now);
    flow_path(f, rtt, delay);
    if (sent->delivered >= f->round_start && now - f->round_at >= VP_ROUND_US) {
        flow_end_round(f, sent, now);
    }
    if (f->rate > 0) {
        flow_update(f, now);
    }
}

/*
 * flow_carried() - @sent is acked, and so is what else was since it was sent
 * @most:  bytes in flight, at most
 *
 * No more than twice what the channel has carried in a round trip may be in
 * flight, unless that is little: because one that has become slow seems long,
 * and fast as well, until its new rate is known.
 */
static void flow_carried(VPFlow *f, const VPSent *sent, uint32_t most)
{
    uint64_t bytes = f->delivered - sent->delivered;

    f->limit_max = (uint32_t)MIN(MAX(2 * bytes, f->limit_max), most);
}

/*
 * flow_mark() - an ack is asked for a few times per bound in flight, and once
 * a second where less is sent, to know the round-trip time
 */
static uint8_t flow_mark(VPFlow *f, uint32_t len, uint64_t now)
{
    f->unmarked += len;
    if (f->unmarked < f->limit / 4 && now - f->marked_at < SECOND) {
        return 0;
    }
    f->unmarked = 0;
    f->marked_at = now;
    return VP_FLAG_ACK_NOW | (f->probing > 0 ? VP_FLAG_PROBE : 0);
}

/* ======================================================================
 * link
 *
 * Makes an ordered, exactly-once stream of packets of a channel that may be
 * cut, garbled, stalled or restarted at any byte.
 *
 *   DOWN   no descriptor
 *   AWAY   a virtio port whose other side isn't connected
 *   HELLO  shaking hands
 *   UP     packets flow
 *   DUMB   it takes no more bytes; what the peer sent before is still read
 *
 *   event                      DOWN    AWAY    HELLO   UP      DUMB
 *   ---------------------------------------------------------------
 *   a descriptor comes         HELLO
 *   the port's other side
 *     is gone                                  AWAY    AWAY    AWAY
 *     is back                          HELLO
 *   HELLO that echoes my token
 *     and makes a claim that fits              UP
 *     and makes an impossible one              HELLO
 *   a new HELLO                                        HELLO   DUMB
 *   damage, gap                                        HELLO   DUMB (*)
 *   peer breaks the protocol                           HELLO   DUMB (*)
 *   goodbye of the peer                        HELLO   HELLO   DUMB (*)
 *   write says EPIPE or reset                  DUMB    DUMB
 *   a candidate takes its place                DOWN    DOWN    DOWN
 *   end of data, error, time           DOWN    DOWN    DOWN    DOWN
 *
 * (*) The rest of what the peer sent is skipped, as nothing can be said to it
 * any more.  A breach and a goodbye end the session in every state.
 *
 * Whatever goes wrong is mended by one mechanism, the handshake.  Each side
 * invents a token, sends HELLO until the peer echoes it, and so knows that
 * the peer is alive now and reads this very channel.  The two tokens make the
 * key that seeds the check of all later packets, so bytes from before the
 * handshake, from another session, or from inside somebody's payload never
 * pass for packets.  A session is named by the two tokens of the handshake
 * that began it (its epochs).  HELLO says which session its sender holds,
 * which packet it expects, which it can still send, and a digest of all it
 * received: if all of that fits, both go on where the other stands; else
 * there is a new session and every connection of the old one is reset.  The
 * digest is what notices a side that was thrown back in time (a snapshot)
 * and has since sent other packets under the same numbers.
 *
 * HELLO's first fields, its header and its check are the same in all versions.
 * They say which versions the sender speaks: the newest one that both speak
 * says what the rest means, and what follows the handshake.  A HELLO also has a
 * number that its process alone has, so that a daemon doesn't talk to itself.
 *
 * A side that finds the peer's claim impossible forgets its session, takes a
 * new token and says HELLO again; so both sides come to the same verdict
 * without a further message.  In a new session no packet of a connection is
 * sent before the peer has shown that it is in it, so a handshake that only one
 * side saw completed costs no connection: those that waited still wait.
 *
 * A side may be thrown back into the middle of a handshake, and the peer's echo
 * still be under way: it fits, and leads into the session that the abandoned
 * time was in already, with the same tokens.  So each packet's check is seeded
 * with the digest of what it acknowledges as well.  A packet passes only where
 * just that was sent, and so no answer to the abandoned time for one to the new
 * one; it leads to a handshake like any damage, which ends the session.  For
 * what is sent the numbers tell: the new time goes on from those that it had.
 * And a peer that was up, but says HELLO as one that isn't, begins a handshake
 * as if it had a new token.
 *
 * Silence is not death, as the peer may be a VM that is paused for days.  Once
 * the link was up only a TCP whose other end's kernel is silent as well is
 * lost.  What is above the link is told through VPLinkOps, and the link knows
 * no more of it than that.
 * ====================================================================== */

/*
 * The receive buffer starts small and doubles while reads fill it; with a
 * larger one its bytes reach their connections later, and leave the cache
 * (1 MiB: up to 12 % less throughput).
 */
#define VP_RX_LEN_MIN (2u * VP_PKT_LEN_MAX)
#define VP_RX_LEN_MAX (4u * VP_PKT_LEN_MAX)

/* Credit that a new connection starts with: HELLO tells the peer. */
#define VP_WINDOW_INIT (16u << 10)

/* Handed to the kernel at a time: what wakes the reader, which is dear. */
#define VP_WRITE_MAX (512u << 10)
#define VP_WRITE_IOV 8
/* A virtio-serial port takes so much in one write, and all of it or none. */
#define VP_VIRTIO_WRITE_MAX 32768u

/* From one HELLO to the next: at first, and at most, as it doubles. */
#define VP_HELLO_WAIT_MIN (100 * MS)
#define VP_HELLO_WAIT_MAX SECOND
/*
 * A HELLO unanswered so long: a connecting side had better connect anew, and so
 * had the other one if TCP says that nothing comes from that machine.
 */
#define VP_HELLO_PATIENCE (10 * SECOND)
/* A stranger at the other end is named after so long without a HELLO. */
#define VP_STRANGER_US (2 * SECOND)
/* After a peer broke the protocol; else it could have us log at line rate. */
#define VP_PENALTY_US SECOND
/* A resync is worth a warning if the last one was so long ago. */
#define VP_RESYNC_NEWS (10 * SECOND)

/* An ack is due so long after what it acks, or after so many bytes. */
#define VP_ACK_DELAY (10 * MS)
#define VP_ACK_BYTES (256u << 10)
/* A PING after so long without an ack: 4 round trips, but at least, at most */
#define VP_PING_WAIT_MIN (20 * MS)
#define VP_PING_WAIT_MAX (200 * MS)
#define VP_PING_IDLE (5 * SECOND)
/* A PING that isn't answered for so long: the peer may be dead. */
#define VP_DEAD_US (3 * SECOND)
/*
 * A PING that isn't answered for so long: another connection may get through
 * where this one doesn't; and if TCP says that nothing comes from that machine
 * at all, this one is lost.
 */
#define VP_STALE_US (10 * SECOND)
/*
 * A packet that takes longer to come may be the rest of a damaged one, and a
 * PING may have come behind that.
 */
#define VP_STALL_US (10 * MS)
/* After a silence so long a peer that was started anew may say hello. */
#define VP_SILENCE_US (150 * MS)

/* How often a port is looked at that select() doesn't sleep on. */
#define VP_AWAY_POLL (250 * MS)
/* How long a channel that takes no more is still read. */
#define VP_DUMB_US SECOND
/* What was not used for so long goes back to the system. */
#define VP_TRIM_US (2 * SECOND)

/* So many places where a header was looked for are VP_WORK_LOOK. */
#define VP_WORK_LOOKS 8
/* Skipping so many bytes, with reading them, costs as much as such a look. */
#define VP_LOOK_BYTES 64
/*
 * What looks for a HELLO may be a flood, and nobody waits for what it skips: it
 * has one part in so many of the time.
 */
#define VP_REST_PARTS 16
/* A channel rests when it owes so much work, see link_owes(). */
#define VP_REST_WORK (32 * US)

typedef enum VPLinkState {
    LINK_DOWN,
    LINK_AWAY,
    LINK_HELLO,
    LINK_UP,
    LINK_DUMB,
} VPLinkState;

/* How far the peer is known to be in the session. */
typedef enum VPPeerState {
    PEER_UNSURE, /* it may not have seen the handshake completed */
    PEER_HOLDS,  /* it holds the session */
    PEER_UP,     /* it has shown that it is up, with my token */
} VPPeerState;

/* What is said of a peer that makes no session; the worse ones come later. */
typedef enum VPLinkNews {
    NEWS_NONE,
    NEWS_SILENT, /* it says nothing, or isn't there */
    NEWS_GARBAGE,
    NEWS_WRONG,  /* a HELLO, but one that won't do */
} VPLinkNews;

/* Unsequenced packets due; a set, so a peer can't make us queue answers. */
enum {
    LINK_DUE_HELLO = 1,
    LINK_DUE_PING = 2,
};

/* What the link tells the one above it, whose @up is. */
typedef struct VPLinkOps {
    /*
     * The next sequenced packet: NULL, or what is wrong with it.  @payload
     * stays where it is until flush().
     */
    const char *(*packet)(void *up, const VPPacket *pkt, uint8_t *payload);
    void (*flush)(void *up);
    /* a session has begun, or goes on */
    void (*began)(void *up);
    /* the session is over for all that the peer knew of */
    void (*over)(void *up);
    /* nothing moves: give memory back */
    void (*idle)(void *up);
} VPLinkOps;

typedef struct VPLink {
    VPLoop *loop;
    VPTask *task;        /* counts the work for this channel */
    VPLog *log;
    const VPLinkOps *ops;
    void *up;
    VPLostHandler *lost; /* of the program; @lost_opaque is its own */
    VPStaleHandler *stale; /* of the program; NULL: it wants no call */
    void *lost_opaque;
    const VPKey *key;    /* of new sessions; NULL: none is needed */
    VPKey session_key;   /* of the session, as it was made; no bytes: none */
    uint64_t instance;   /* of this process */
    uint32_t max_conns;  /* that the peer may have open to us, for HELLO */

    /* the descriptor */
    VPLinkState state;
    size_t (*parse)(struct VPLink *l, uint8_t *p, size_t len);
    VPChannelKind kind;
    unsigned role;       /* VP_HELLO_LISTENER, VP_HELLO_CONNECTOR, or 0 */
    int rfd;             /* -1: none */
    int wfd;
    bool blocked;        /* it takes no more bytes for the moment */
    bool away_polled;    /* AWAY, and select() doesn't sleep on it */
    bool heard;          /* a HELLO that is believed came from it */
    bool refused;        /* last_error tells what was wrong with its HELLO */
    bool was_up;         /* a session came up on it */
    uint64_t attached_at;
    uint64_t garbage;    /* bytes skipped since then */
    VPTimer away_timer;  /* AWAY: to look again; DUMB: to give up */

    /* handshake and session */
    VPHello hello;       /* what I claim; frozen for one handshake */
    unsigned due;        /* LINK_DUE_... */
    uint64_t peer_token; /* 0: not heard in this handshake */
    bool apart;          /* its HELLO doesn't name the session held here */
    uint64_t epoch[2];   /* mine, the peer's; 0: no session */
    VPPeerState peer;
    VPHeaderKey tx_key;  /* of this handshake */
    VPHeaderKey rx_key;
    VPPayloadKey tx_payload_key; /* of this session */
    VPPayloadKey rx_payload_key;
    uint64_t hello_at;   /* when the handshake began */
    uint64_t hello_wait; /* until the next HELLO */
    uint64_t penalty_until; /* nothing is said or believed before that */
    VPTimer hello_timer;
    unsigned version;       /* that both use */
    uint32_t peer_window;   /* credit a new connection starts with */
    uint32_t peer_max_conns;

    /* sending */
    VPStore store;
    VPFlow flow;
    /* unsequenced packets on their way out: a HELLO, and an ACK or PING */
    uint8_t ctl[2 * VP_PKT_HDR_LEN + VP_HELLO_LEN];
    size_t ctl_len;
    size_t ctl_off;

    /* receiving */
    uint8_t *rx;
    size_t rx_cap;
    size_t rx_len;
    bool rx_more;        /* packets wait in rx for another pass */
    size_t rx_done;      /* rx_more: bytes at the front that are done with */
    size_t rx_scanned;   /* bytes of a packet that stopped arriving */
    uint64_t rx_at;      /* when the packet at the front began; 0: none */
    uint64_t rx_last_at; /* when bytes came last */
    size_t rx_gap;       /* where in rx they went on after a silence */
    uint32_t rx_expect;  /* sequence number */
    uint64_t rx_digest;  /* of all packets before rx_expect */
    uint32_t rx_delay;   /* the next header's "delay" */
    unsigned looks;      /* for headers, that don't count as work yet */
    unsigned rx_work;    /* what link_process() did of task->work, ns */
    unsigned owed;       /* work for which it has yet to rest, ns */
    bool unread;         /* the channel wasn't looked at since a rest */
    VPTimer rest_timer;  /* while the channel rests: not read nor filled */

    /* acks and life */
    bool ack_asked;      /* the peer waits for one */
    uint32_t rx_unacked; /* bytes */
    uint64_t ack_by;     /* when they are acked at the latest; 0: none */
    VPTimer ack_timer;
    VPTimer ping_timer;
    bool ping_waits;     /* the timer runs since packets wait for an ack */
    uint64_t ping_wait;  /* what it was started with */
    uint32_t ping_base;  /* store.base then */
    uint64_t asked_at;   /* PING not answered since; 0: none */
    bool silent;         /* it was said that asked_at is VP_STALE_US ago */

    bool moved;          /* packets came since the trim timer looked */
    VPTimer trim_timer;  /* while there may be memory to give back */

    VPOnce news;         /* VPLinkNews since a session was up */
    VPOnce resync_news;
    char turned_away[VP_WHY_LEN]; /* why a peer was, since attached_at */

    /* for vp_channel_info() */
    uint64_t session_at;
    uint64_t bytes[2];   /* payload received, sent */
    uint64_t packets[2]; /* sequenced packets received, sent */
    uint64_t resyncs;
    uint64_t attaches;
    char last_error[VP_WHY_LEN];
    uint64_t last_error_at;
} VPLink;

static size_t link_parse_hello(VPLink *l, uint8_t *p, size_t len);
static size_t link_parse_up(VPLink *l, uint8_t *p, size_t len);
static void link_hello_timer(void *opaque);
static void link_ready(void *opaque, int fd, int events);

static bool link_has_fd(const VPLink *l)
{
    return l->rfd >= 0;
}

/* link_has_session() - one that may be resumed */
static bool link_has_session(const VPLink *l)
{
    return l->epoch[0] != 0;
}

/* link_key() - the key that counts now, or NULL: a session keeps its own */
static const VPKey *link_key(const VPLink *l)
{
    return !link_has_session(l) ? l->key
           : l->session_key.len > 0 ? &l->session_key : NULL;
}

/* link_rests() - have others the time now? */
static bool link_rests(const VPLink *l)
{
    return timer_running(&l->rest_timer);
}

/* link_goes_on() - is there more to take of what was read? */
static bool link_goes_on(const VPLink *l)
{
    return l->rx_more && !link_rests(l);
}

/* link_may_send() - may connections' packets go out now? */
static bool link_may_send(const VPLink *l)
{
    return l->state == LINK_UP && l->peer != PEER_UNSURE && !l->blocked &&
           !link_rests(l);
}

/* link_interest() - what is watched, from state alone */
static void link_interest(VPLink *l)
{
    bool away = l->state == LINK_AWAY;
    int r = away || link_rests(l) ? 0 : VP_READ, w = 0;

    if (!link_has_fd(l)) {
        return;
    }
    /*
     * The read set doesn't sleep on a virtio port without a host, the
     * write set does (drivers/char/virtio_console.c, port_fops_poll).
     */
    if (away ? !l->away_polled : l->blocked) {
        w = VP_WRITE;
    }
    if (l->rfd == l->wfd) {
        vp_watch_set(l->loop, l->rfd, r | w);
    } else {
        vp_watch_set(l->loop, l->rfd, r);
        vp_watch_set(l->loop, l->wfd, w);
    }
}

static void link_set_blocked(VPLink *l, bool blocked)
{
    l->blocked = blocked;
    link_interest(l);
}

/*
 * link_set_state() - change the state, if that is legal
 * @why:  the event, for the log
 *
 * What reads the channel and what is watched of it follows.
 */
static void link_set_state(VPLink *l, VPLinkState to, const char *why)
{
    static const char *const name[] = { "DOWN", "AWAY", "HELLO", "UP", "DUMB" };
    static const unsigned legal[] = {
        [LINK_DOWN] = 1u << LINK_HELLO,
        [LINK_AWAY] = 1u << LINK_HELLO | 1u << LINK_DOWN,
        [LINK_HELLO] = 1u << LINK_HELLO | 1u << LINK_UP | 1u << LINK_DUMB |
                       1u << LINK_AWAY | 1u << LINK_DOWN,
        [LINK_UP] = 1u << LINK_HELLO | 1u << LINK_DUMB | 1u << LINK_AWAY |
                    1u << LINK_DOWN,
        [LINK_DUMB] = 1u << LINK_AWAY | 1u << LINK_DOWN,
    };

    if (!(legal[l->state] >> to & 1)) {
        log_say(l->log, VP_LOG_ERROR, "link: %s after %s (%s)", name[to],
                name[l->state], why);
        return;
    }
    log_provoked(l->log, VP_LOG_DEBUG, "link %s -> %s: %s", name[l->state],
                 name[to], why);
    l->state = to;
    if (to == LINK_UP) {
        l->parse = link_parse_up;
    } else if (to != LINK_DUMB) {
        l->parse = link_parse_hello;
    }
    link_interest(l);
}

/* link_news() - is there something worse to log of the peer than before? */
static bool link_news(VPLink *l, VPLinkNews news)
{
    return news > l->news.what && vp_once(&l->news, news, l->loop->now, 0);
}

static void link_note_error(VPLink *l, const char *text)
{
    snprintf(l->last_error, sizeof(l->last_error), "%s", text);
    l->last_error_at = l->loop->now;
}

/* link_forget() - end the session here; the next handshake begins a new one */
static void link_forget(VPLink *l)
{
    l->epoch[0] = l->epoch[1] = 0;
    store_reset(&l->store);
    l->ops->over(l->up);
}

/* ---- memory ----------------------------------------------------------- */

static void link_trim_timer(void *opaque);

static void link_trim_later(VPLink *l)
{
    if (!timer_running(&l->trim_timer)) {
        vp_timer_start(l->loop, &l->trim_timer, VP_TRIM_US, link_trim_timer,
                       l);
    }
}

/* link_trim_timer() - if nothing has moved give memory back */
static void link_trim_timer(void *opaque)
{
    VPLink *l = opaque;

    if (l->moved || l->store.bytes > 0 || l->rx_len > 0) {
        l->moved = false;
        link_trim_later(l);
        return;
    }
    store_trim(&l->store);
    free(l->rx);
    l->rx = NULL;
    l->rx_cap = 0;
    l->ops->idle(l->up);
#ifdef HAVE_MALLOC_TRIM
    /* else it keeps all that lies below the last block in use */
    malloc_trim(0);
#endif
}

/* link_rx_grow() - false if there is no buffer at all */
static bool link_rx_grow(VPLink *l)
{
    size_t cap = l->rx_cap == 0 ? VP_RX_LEN_MIN : 2 * l->rx_cap;
    uint8_t *rx = cap <= VP_RX_LEN_MAX ? realloc(l->rx, cap) : NULL;

    if (rx != NULL) {
        l->rx = rx;
        l->rx_cap = cap;
        link_trim_later(l);
    }
    return l->rx != NULL;
}

/* ---- acks ------------------------------------------------------------- */

/* link_ack_due() - is it time to tell the peer what came? */
static bool link_ack_due(const VPLink *l)
{
    return l->ack_asked || l->rx_unacked >= VP_ACK_BYTES ||
           (l->ack_by != 0 && l->loop->now >= l->ack_by);
}

/* link_ack_timer() - the ack is due now; the end of the pass sends it */
static void link_ack_timer(void *opaque)
{
    (void)opaque;
}

/* link_acks() - an ack is on its way out */
static void link_acks(VPLink *l)
{
    l->ack_asked = false;
    l->rx_unacked = 0;
    l->ack_by = 0;
    vp_timer_stop(&l->ack_timer);
}

/* ---- going down ------------------------------------------------------- */

/* link_close() - let go of the descriptors */
static void link_close(VPLink *l)
{
    vp_unwatch(l->loop, l->rfd);
    if (l->kind == VP_CHN_SOCKET) {
        /* QEMU drops what it has not passed on when we just close() */
        shutdown(l->wfd, SHUT_WR);
    }
    close(l->rfd);
    if (l->wfd != l->rfd) {
        vp_unwatch(l->loop, l->wfd);
        close(l->wfd);
    }
    l->rfd = l->wfd = -1;
}

/* link_down() - no channel from here on; @to is LINK_DOWN or LINK_AWAY */
static void link_down(VPLink *l, VPLinkState to, const char *reason)
{
    if (!l->refused) {
        link_note_error(l, reason);
    }
    if (l->was_up) {
        log_event(l->log, VP_LOG_INFO,
                  (VPEvent){ .type = VP_EVENT_DOWN, .reason = reason },
                  "channel down: %s", reason);
    } else if (link_news(l, NEWS_SILENT)) {
        log_provoked(l->log, VP_LOG_INFO, "no channel yet: %s", reason);
    }
    l->heard = l->refused = l->was_up = l->blocked = l->away_polled = false;
    l->rx_len = l->rx_gap = l->rx_done = 0;
    l->rx_more = false;
    l->ctl_len = l->ctl_off = 0;
    store_rewind(&l->store, l->store.base); /* nothing is on its way */
    l->due = 0;
    l->asked_at = 0;
    l->silent = false;
    link_acks(l);
    vp_timer_stop(&l->hello_timer);
    vp_timer_stop(&l->ping_timer);
    vp_timer_stop(&l->away_timer);
    link_trim_later(l);
    link_set_state(l, to, reason);
}

/* link_detach() - close the descriptor; the program isn't asked for another */
static void link_detach(VPLink *l, const char *reason)
{
    link_close(l);
    link_down(l, LINK_DOWN, reason);
}

/* link_lost() - the descriptor is of no use any more */
static void link_lost(VPLink *l, const char *reason)
{
    bool was_up = l->was_up;

    link_detach(l, reason);
    l->lost(l->lost_opaque, reason, was_up);
}

static void link_dumb_timer(void *opaque)
{
    link_lost(opaque, strerror(EPIPE));
}

/* link_dumb() - the peer left; what it sent before that is still to be read */
static void link_dumb(VPLink *l, int err)
{
    link_set_state(l, LINK_DUMB, strerror(err));
    vp_timer_start(l->loop, &l->away_timer, VP_DUMB_US, link_dumb_timer, l);
}

/* ---- shaking hands ---------------------------------------------------- */

/* link_new_token() - what I hold now is what I claim in this handshake */
static void link_new_token(VPLink *l)
{
    const VPStore *s = &l->store;

    l->hello = (VPHello){
        .version = VP_VERSION,
        .oldest = VP_VERSION_OLDEST,
        .window = VP_WINDOW_INIT,
        .token = random64(),
        .my_epoch = l->epoch[0],
        .peer_epoch = l->epoch[1],
        .digest = l->rx_digest,
        .expect = l->rx_expect,
        .base = s->base,
        .next = s->next,
        .max_conns = l->max_conns,
        .instance = l->instance,
    };
}

/* link_compose() - make the HELLO that claims l->hello; returns its length */
static size_t link_compose(const VPLink *l, uint8_t *p, uint64_t token,
                           uint64_t echo, unsigned flags)
{
    /* who holds another session can't have that one's key */
    const VPKey *key = l->apart ? l->key : link_key(l);
    VPHello h = l->hello;

    h.token = token;
    h.echo = echo;
    h.flags = flags | (key != NULL ? VP_HELLO_KEYED : 0u);
    return wire_put_hello(p, &h, key);
}

/* link_hello() - begin a handshake, the first HELLO after @delay */
static void link_hello(VPLink *l, uint64_t delay, const char *why)
{
    if (l->state == LINK_DUMB) {
        l->parse = link_parse_hello; /* nothing can be said any more */
        return;
    }
    link_set_state(l, LINK_HELLO, why);
    l->hello_at = l->loop->now;
    l->peer_token = 0;
    l->apart = false;
    l->hello_wait = VP_HELLO_WAIT_MIN;
    l->due = delay == 0 ? LINK_DUE_HELLO : 0;
    l->asked_at = 0;
    l->silent = false;
    link_new_token(l);
    link_acks(l); /* HELLO says what I expect */
    vp_timer_stop(&l->ping_timer);
    vp_timer_start(l->loop, &l->hello_timer,
                   delay != 0 ? delay : l->hello_wait, link_hello_timer, l);
}

/* link_resync() - bytes were lost or damaged: shake hands, send again */
static void link_resync(VPLink *l, const char *why)
{
    bool loud = vp_once(&l->resync_news, 0, l->loop->now, VP_RESYNC_NEWS);

    l->resyncs++;
    log_provoked(l->log, loud ? VP_LOG_WARN : VP_LOG_DEBUG,
                 "channel out of step (%s): resynchronising", why);
    link_hello(l, 0, "out of step");
}

/* link_refuse() - the peer breaks the protocol: end the session */
static void link_refuse(VPLink *l, const char *what)
{
    log_event(l->log, VP_LOG_WARN, (VPEvent){ .type = VP_EVENT_OVER },
              "the peer breaks the protocol (%s): session ended", what);
    link_forget(l);
    l->penalty_until = l->loop->now + VP_PENALTY_US;
    link_hello(l, VP_PENALTY_US, "the peer breaks the protocol");
}

/* link_open() - the descriptors are good: say hello */
static void link_open(VPLink *l, const char *why)
{
    uint64_t now = l->loop->now;

    l->attaches++;
    l->attached_at = now;
    l->turned_away[0] = '\0';
    l->garbage = 0;
    l->blocked = false;
    flow_reset(&l->flow, now);
    link_hello(l, l->penalty_until > now ? l->penalty_until - now : 0, why);
}

/* link_attach() - take over the descriptors, which are closed on failure */
static int link_attach(VPLink *l, int rfd, int wfd, VPChannelKind kind,
                       VPChannelRole role)
{
    VPAddr addr = { .len = sizeof(addr.ss) };
    int rc = vp_watch(l->loop, rfd, link_ready, l);

    if (rc == 0 && wfd != rfd) {
        rc = vp_watch(l->loop, wfd, link_ready, l);
        if (rc < 0) {
            vp_unwatch(l->loop, rfd);
        }
    }
    if (rc < 0) {
        close(rfd);
        if (wfd != rfd) {
            close(wfd);
        }
        return rc;
    }
    if (kind == VP_CHN_SOCKET &&
        getsockname(wfd, (struct sockaddr *)&addr.ss, &addr.len) == 0) {
        if (addr.ss.ss_family == AF_UNIX) {
            socket_room(wfd, (int)VP_LIMIT_MAX(VP_STORE_LEN));
        } else {
            tcp_setup(wfd, &addr);
            if (!vp_addr_is_local(&addr)) {
                socket_force(wfd, (int)VP_LIMIT_MAX(l->store.len_max));
            }
        }
    }
    l->rfd = rfd;
    l->wfd = wfd;
    l->kind = kind;
    l->role = role == VP_CONNECTED ? VP_HELLO_CONNECTOR
              : role == VP_ACCEPTED ? VP_HELLO_LISTENER : 0;
    link_open(l, "a descriptor came");
    return 0;
}

/* link_away() - nobody at the other side of the port; the fd stays good */
static void link_away(VPLink *l)
{
    link_down(l, LINK_AWAY, "nobody at the other side of the port");
}

/*
 * link_name_stranger() - once, say why there is no channel yet
 * @left:  it went: more that would explain it won't come
 */
static void link_name_stranger(VPLink *l, bool left)
{
    unsigned long long garbage = l->garbage + l->rx_len - l->rx_done;

    if (l->heard ||
        (!left && l->loop->now - l->attached_at < VP_STRANGER_US)) {
        return;
    }
    if (garbage > 0 && link_news(l, NEWS_GARBAGE)) {
        log_provoked(l->log, VP_LOG_WARN, "the other end is not qemu-vp: "
                     "%llu bytes that make no packet", garbage);
    } else if (!left && link_news(l, NEWS_SILENT)) {
        log_provoked(l->log, VP_LOG_INFO, "the other end is silent: waiting");
    }
}

/* link_is_cut() - does nothing get through a channel that can be had anew? */
static bool link_is_cut(const VPLink *l)
{
    return l->role != 0 && tcp_unheard(l->wfd) >= VP_STALE_US;
}

static void link_hello_timer(void *opaque)
{
    VPLink *l = opaque;

    link_name_stranger(l, false);
    if (l->loop->now - l->hello_at >= VP_HELLO_PATIENCE &&
        (l->role == VP_HELLO_CONNECTOR || link_is_cut(l))) {
        link_lost(l, "no answer");
        return;
    }
    l->due |= LINK_DUE_HELLO;
    l->hello_wait = MIN(2 * l->hello_wait, VP_HELLO_WAIT_MAX);
    vp_timer_start(l->loop, &l->hello_timer, l->hello_wait, link_hello_timer,
                   l);
}

/* ---- life ------------------------------------------------------------- */

static void link_ping_timer(void *opaque);

/* link_ping_wait() - an ack that takes longer may never come */
static uint64_t link_ping_wait(const VPLink *l)
{
    uint64_t srtt = l->flow.srtt;

    return srtt == 0 ? VP_PING_WAIT_MAX
           : MIN(MAX(4 * srtt, VP_PING_WAIT_MIN), VP_PING_WAIT_MAX);
}

static void link_ping_start(VPLink *l, uint64_t wait)
{
    l->ping_wait = wait;
    l->ping_base = l->store.base;
    vp_timer_start(l->loop, &l->ping_timer, wait, link_ping_timer, l);
}

/* link_ask() - have the peer show that it is alive */
static void link_ask(VPLink *l)
{
    l->due |= LINK_DUE_PING;
    if (l->asked_at == 0) {
        l->asked_at = l->loop->now;
    }
}

/* link_is_stale() - it may be that the descriptor gets nothing through */
static bool link_is_stale(const VPLink *l)
{
    return l->state == LINK_UP && l->asked_at != 0 &&
           l->loop->now - l->asked_at >= VP_STALE_US;
}

/* link_silent() - the peer has answered nothing for VP_STALE_US */
static void link_silent(VPLink *l)
{
    if (!l->silent) {
        l->silent = true;
        log_event(l->log, VP_LOG_INFO, (VPEvent){ .type = VP_EVENT_SILENT },
                  "the other end is silent: waiting");
    }
    if (l->stale != NULL) {
        l->stale(l->lost_opaque);
    }
}

/*
 * link_ping_timer() - make a lost tail known, and that we live
 *
 * While packets wait for an ack and none comes, PING says which packet is next
 * (as a tail loss probe does, RFC 8985, 7): after a few round trips, as that is
 * what a lost tail costs, and then more and more rarely, as the peer may be a
 * VM that is paused for days.  A PING that was sent too soon does no harm, for
 * it comes after all that it tells of.
 */
static void link_ping_timer(void *opaque)
{
    VPLink *l = opaque;
    bool waiting = l->store.bytes > 0 || l->peer == PEER_UNSURE;
    uint64_t wait = VP_PING_IDLE;

    if (link_is_stale(l)) {
        if (link_is_cut(l)) {
            link_lost(l, "no answer");
            return;
        }
        link_silent(l);
    }
    l->ping_waits = waiting;
    if (waiting && l->store.base != l->ping_base) {
        wait = link_ping_wait(l);
    } else if (waiting || l->ping_wait == VP_PING_IDLE) {
        link_ask(l);
        wait = waiting ? MIN(2 * l->ping_wait, VP_PING_IDLE) : VP_PING_IDLE;
    }
    link_ping_start(l, wait);
}

/* link_in_use() - by a peer that may be alive? */
static bool link_in_use(const VPLink *l)
{
    if (l->state == LINK_UP) {
        return l->asked_at == 0 || l->loop->now - l->asked_at < VP_DEAD_US;
    }
    /* it may just be getting in step again */
    return l->state == LINK_HELLO && l->heard && link_has_session(l) &&
           l->loop->now - l->hello_at < VP_HELLO_PATIENCE;
}

/* link_promising() - is there, or may there be, a peer behind a descriptor? */
static bool link_promising(const VPLink *l)
{
    return link_has_fd(l) && l->state != LINK_AWAY &&
           (l->heard || l->loop->now - l->attached_at >= VP_HELLO_PATIENCE);
}

/* ---- sending ---------------------------------------------------------- */

/* link_room() - bytes that may still be put on their way */
static uint32_t link_room(const VPLink *l)
{
    return l->flow.limit > l->store.bytes ? l->flow.limit - l->store.bytes : 0;
}

/*
 * link_add() - send a packet of @len bytes, which lie in the store already
 *
 * link_room() and store_room() said that there is room for it.
 */
static void link_add(VPLink *l, uint8_t type, uint8_t flags, uint32_t conn,
                     size_t len)
{
    VPPacket pkt = {
        .type = type,
        .flags = flags | flow_mark(&l->flow, (uint32_t)len + VP_PKT_HDR_LEN,
                                   l->loop->now),
        .bytes = (uint16_t)len,
        .conn = conn,
        .data_check = wire_data_check(&l->tx_payload_key,
                                      store_payload(&l->store), len),
    };

    store_add(&l->store, &pkt);
}

/* link_sendable() - may @bytes_out grow by a packet of @len? */
static bool link_sendable(const VPLink *l, uint32_t bytes_out, uint32_t len)
{
    return bytes_out == 0 || bytes_out + len <= l->flow.limit;
}

/* link_carries_ack() - does a packet go out that can carry an ack? */
static bool link_carries_ack(VPLink *l)
{
    VPStore *s = &l->store;

    return s->unsent != s->next &&
           link_sendable(l, s->bytes_out, store_sent(s, s->unsent)->len);
}

/* link_put() - finish the header of a packet that now goes to the channel */
static void link_put(const VPLink *l, uint8_t *p, VPPacket *pkt)
{
    pkt->ack = l->rx_expect;
    pkt->time = (uint32_t)l->loop->now;
    pkt->delay = l->rx_delay;
    wire_put(p, pkt, &l->tx_key, l->rx_digest);
}

/* link_put_ctl() - unsequenced packets that are due; returns their length */
static size_t link_put_ctl(VPLink *l)
{
    VPPacket pkt = { .seq = l->store.unsent };
    size_t len = 0;

    if (l->due & LINK_DUE_HELLO) {
        l->due &= ~(unsigned)LINK_DUE_HELLO;
        len += link_compose(l, l->ctl, l->hello.token, l->peer_token,
                            l->role |
                            (l->state == LINK_UP ? VP_HELLO_UP : 0u));
    }
    if (l->state != LINK_UP) {
        return len;
    }
    if (l->due & LINK_DUE_PING) {
        pkt.type = VP_PKT_PING;
    } else if (link_ack_due(l) && !link_carries_ack(l)) {
        pkt.type = VP_PKT_ACK;
    }
    if (pkt.type != 0) {
        l->due &= ~(unsigned)LINK_DUE_PING;
        link_acks(l);
        link_put(l, l->ctl + len, &pkt);
        len += VP_PKT_HDR_LEN;
    }
    return len;
}

/*
 * link_gather() - what the next write() hands over
 * @iov:  room for VP_WRITE_IOV
 *
 * Headers are finished here: only now is it known what to ack and vouch for.
 */
static int link_gather(VPLink *l, struct iovec *iov)
{
    VPStore *s = &l->store;
    size_t room = l->kind == VP_CHN_VIRTSERIAL ? VP_VIRTIO_WRITE_MAX
                                               : VP_WRITE_MAX;
    uint32_t bytes_out = s->bytes_out;
    int n = 0;

    if (l->ctl_len == 0 && s->unsent_off == 0 &&
        (l->due != 0 || link_ack_due(l))) {
        l->ctl_len = link_put_ctl(l);
    }
    if (l->ctl_len > 0) {
        iov[n].iov_base = l->ctl + l->ctl_off;
        iov[n].iov_len = l->ctl_len - l->ctl_off;
        room -= iov[n++].iov_len;
    }
    if (l->state != LINK_UP && s->unsent_off == 0) {
        return n;
    }
    for (uint32_t seq = s->unsent; seq != s->next && n < VP_WRITE_IOV; seq++) {
        VPSent *sent = store_sent(s, seq);
        uint8_t *p = s->ring + sent->off;
        size_t len = sent->len;

        if (seq == s->unsent && s->unsent_off > 0) {
            p += s->unsent_off;
            len -= s->unsent_off;
        } else {
            if (len > room || l->state != LINK_UP ||
                !link_sendable(l, bytes_out, sent->len)) {
                break;
            }
            bytes_out += sent->len;
            sent->pkt.seq = seq;
            link_put(l, p, &sent->pkt);
        }
        if (n > 0 && (uint8_t *)iov[n - 1].iov_base + iov[n - 1].iov_len == p) {
            iov[n - 1].iov_len += len;
        } else {
            iov[n].iov_base = p;
            iov[n++].iov_len = len;
        }
        room -= MIN(len, room);
    }
    return n;
}

/* link_written() - the channel took @len of what link_gather() gave */
static void link_written(VPLink *l, size_t len)
{
    VPStore *s = &l->store;

    if (l->ctl_len > 0) {
        size_t part = MIN(len, l->ctl_len - l->ctl_off);

        l->ctl_off += part;
        len -= part;
        if (l->ctl_off == l->ctl_len) {
            l->ctl_len = l->ctl_off = 0;
        }
    }
    while (len > 0) {
        VPSent *sent = store_sent(s, s->unsent);
        uint32_t part = (uint32_t)MIN(len, sent->len - s->unsent_off);

        if (s->unsent_off == 0) {
            flow_sent(&l->flow, sent, s->bytes_out == 0, l->loop->now);
            s->bytes_out += sent->len;
            l->packets[1]++;
            l->bytes[1] += sent->pkt.bytes;
            link_acks(l);
        }
        s->unsent_off += part;
        len -= part;
        if (s->unsent_off == sent->len) {
            s->unsent++;
            s->unsent_off = 0;
        }
    }
}

/* link_flush() - hand to the channel what it takes */
static void link_flush(VPLink *l)
{
    while ((l->state == LINK_HELLO || l->state == LINK_UP) && !l->blocked) {
        struct iovec iov[VP_WRITE_IOV];
        int n = link_gather(l, iov);
        ssize_t len;

        if (n == 0) {
            break;
        }
        if (l->state == LINK_UP) {
            l->task->work += VP_WORK_CALL; /* a HELLO is due by a timer */
        }
        len = writev(l->wfd, iov, n);
        if (len >= 0) {
            link_written(l, (size_t)len);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            link_set_blocked(l, true);
        } else if (errno == EPIPE && l->kind == VP_CHN_VIRTSERIAL) {
            link_away(l); /* a FIFO without reader */
        } else if (errno == EPIPE || errno == ECONNRESET) {
            link_dumb(l, errno);
        } else if (errno != EINTR) {
            link_lost(l, strerror(errno));
        }
    }
    if (l->state == LINK_UP && l->store.bytes > 0 && !l->ping_waits) {
        l->ping_waits = true;
        link_ping_start(l, link_ping_wait(l));
    }
}

/* link_bye() - tell the peer that the session is over, if that goes at once */
static void link_bye(VPLink *l)
{
    uint8_t buf[VP_PKT_HDR_LEN + VP_HELLO_LEN];
    size_t len;

    if (!link_has_fd(l) || l->state == LINK_AWAY || !link_has_session(l) ||
        l->ctl_len > 0 || l->store.unsent_off > 0) {
        return;
    }
    link_new_token(l);
    len = link_compose(l, buf, l->hello.token, l->peer_token,
                       VP_HELLO_BYE | l->role);
    if (write(l->wfd, buf, len) < 0) {
        /* it will find out by itself, some time later */
    }
}

/* ---- receiving: the handshake ----------------------------------------- */

/*
 * link_up() - both tokens were echoed, by @h at last
 *
 * Packets flow from here on.  But in a new session only once the peer is
 * known to be in it: if this HELLO was old, another session will follow, and
 * the connections that wait to begin must not have begun in this one.
 */
static void link_up(VPLink *l, const VPHello *h, bool resumed)
{
    bool quiet = resumed && l->was_up;
    const char *what = resumed ? "session resumed" : "new session";

    link_set_state(l, LINK_UP, what);
    header_key(&l->tx_key, wire_seed(l->hello.token, l->peer_token,
                                     link_key(l)));
    header_key(&l->rx_key, wire_seed(l->peer_token, l->hello.token,
                                     link_key(l)));
    l->rx_delay = 0;
    l->peer = h->flags & VP_HELLO_UP ? PEER_UP
              : resumed ? PEER_HOLDS : PEER_UNSURE;
    l->due |= LINK_DUE_HELLO;
    l->moved = true;
    l->was_up = true;
    l->refused = false;
    l->news = (VPOnce){ 0 };
    flow_rtt(&l->flow, l->loop->now - l->hello_at, l->loop->now);
    vp_timer_stop(&l->hello_timer);
    l->ping_waits = true;
    link_ping_start(l, link_ping_wait(l));
    log_event(l->log, quiet ? VP_LOG_DEBUG : VP_LOG_INFO,
              (VPEvent){ .type = VP_EVENT_UP, .resumed = resumed,
                         .mended = quiet },
              "channel up: %s", what);
    l->ops->began(l->up);
}

/* link_begin() - a new session, named by two tokens */
static void link_begin(VPLink *l, uint64_t mine, uint64_t peers)
{
    link_forget(l);
    l->apart = false;
    l->epoch[0] = mine;
    l->epoch[1] = peers;
    l->session_key.len = 0;
    if (l->key != NULL) {
        l->session_key = *l->key;
    }
    payload_key(&l->tx_payload_key, wire_seed(mine, peers, l->key));
    payload_key(&l->rx_payload_key, wire_seed(peers, mine, l->key));
    l->session_at = l->loop->now;
    l->rx_expect = VP_SEQ_FIRST;
    l->rx_digest = 0;
}

/* link_names_session() - does @h name the session I hold? */
static bool link_names_session(const VPLink *l, const VPHello *h)
{
    return link_has_session(l) && h->my_epoch == l->epoch[1] &&
           h->peer_epoch == l->epoch[0];
}

/* link_can_resume() - is what the peer claims possible? */
static bool link_can_resume(VPLink *l, const VPHello *h)
{
    VPStore *s = &l->store;

    return seq_diff(h->expect, s->base) >= 0 &&
           seq_diff(s->next, h->expect) >= 0 &&
           store_digest(s, h->expect) == h->digest &&
           seq_diff(h->next, l->rx_expect) >= 0 &&
           seq_diff(l->rx_expect, h->base) >= 0;
}

/* link_agree() - the peer echoed my token: go on, or begin anew */
static void link_agree(VPLink *l, const VPHello *h)
{
    l->version = hello_version(h);
    l->peer_window = h->window;
    l->peer_max_conns = h->max_conns;
    if (!link_names_session(l, h)) {
        link_begin(l, l->hello.token, l->peer_token);
        link_up(l, h, false);
    } else if (link_can_resume(l, h)) {
        store_rewind(&l->store, h->expect);
        link_up(l, h, true);
    } else {
        log_event(l->log, VP_LOG_WARN, (VPEvent){ .type = VP_EVENT_OVER },
                  "one side was set back in time: session ended");
        link_forget(l);
        link_new_token(l);
        l->due |= LINK_DUE_HELLO;
    }
}

/* link_wrong() - a HELLO makes no session, and this is why */
static void link_wrong(VPLink *l, const char *why)
{
    link_note_error(l, why);
    l->refused = true;
    if (link_news(l, NEWS_WRONG)) {
        log_provoked(l->log, VP_LOG_WARN, "%s", why);
    }
}

/*
 * link_unfit() - why nothing is to be had of the sender of @h, or NULL
 * @buf:  room for the text
 */
static const char *link_unfit(const VPLink *l, const VPHello *h, char *buf,
                              size_t size)
{
    if (hello_version(h) == 0) {
        return hello_clash(h, buf, size);
    }
    if (h->instance == l->instance) {
        return "the channel leads back to this daemon: it echoes what is sent "
               "(a tty that is not raw?), or joins two of its channels";
    }
    return NULL;
}

/*
 * link_distrust() - why @h, which is at @p, is not believed, or NULL
 * @role:  ours
 */
static const char *link_distrust(const VPLink *l, const VPHello *h,
                                 const uint8_t *p, unsigned role)
{
    /* who names the session has its key; the others begin another one */
    const VPKey *key = link_names_session(l, h) ? link_key(l) : l->key;

    if (key == NULL) {
        return h->flags & VP_HELLO_KEYED
               ? "the other end wants a key (-k), and there is none here"
               : NULL;
    }
    if (!(h->flags & VP_HELLO_KEYED)) {
        return "the other end has no key (-k)";
    }
    if (!hello_proved(h, p, key)) {
        return "the other end has a different key (-k)";
    }
    if (role != 0 &&
        (h->flags & (VP_HELLO_LISTENER | VP_HELLO_CONNECTOR)) == role) {
        return "both ends listen, or both connect: somebody joined them";
    }
    return NULL;
}

/* link_hello_again() - @h came while up; true: it belongs to this handshake */
static bool link_hello_again(VPLink *l, const VPHello *h)
{
    if (h->token == l->peer_token && h->echo == l->hello.token &&
        (h->flags & VP_HELLO_UP)) {
        l->peer = PEER_UP;
        return true;
    }
    if (h->token == l->peer_token && l->peer != PEER_UP) {
        l->due |= LINK_DUE_HELLO; /* it has not heard my echo, or token */
        return true;
    }
    /* it is a new one, or the same thrown back to before it was up */
    return false;
}

/* link_looked() - a header was looked for among @bytes: that is work as well */
static void link_looked(VPLink *l, size_t bytes)
{
    l->looks += 1 + (unsigned)(bytes / VP_LOOK_BYTES);
    l->task->work += l->looks / VP_WORK_LOOKS * VP_WORK_LOOK;
    l->looks %= VP_WORK_LOOKS;
}

/* link_handle_hello() - @h was read from @p */
static void link_handle_hello(VPLink *l, const VPHello *h, const uint8_t *p)
{
    char text[VP_WHY_LEN];
    const char *wrong = link_unfit(l, h, text, sizeof(text));

    l->task->work += VP_WORK_HELLO;
    if (wrong != NULL) {
        link_wrong(l, wrong);
        if (l->state == LINK_UP && hello_version(h) == 0) {
            link_hello(l, 0, "the other end is of another version now");
        }
        return;
    }
    if (l->loop->now < l->penalty_until) {
        return;
    }
    wrong = link_distrust(l, h, p, l->role);
    l->heard |= wrong == NULL;
    if ((h->flags & VP_HELLO_BYE) && h->echo == l->hello.token &&
        wrong == NULL && link_names_session(l, h)) {
        log_event(l->log, VP_LOG_INFO, (VPEvent){ .type = VP_EVENT_OVER },
                  "the other end ends the session");
        link_forget(l);
        link_hello(l, 0, "the other end ends the session");
        return;
    }
    if (l->state == LINK_UP) {
        if (link_hello_again(l, h)) {
            return;
        }
        link_hello(l, 0, "the other end says hello again");
    } else if (l->state == LINK_DUMB) {
        return;
    }
    l->apart = link_has_session(l) && !link_names_session(l, h);
    if (h->token != l->peer_token) {
        l->peer_token = h->token;
        l->due |= LINK_DUE_HELLO;
    }
    if (h->echo != l->hello.token) {
        l->due |= LINK_DUE_HELLO;
        return;
    }
    if (wrong == NULL) {
        link_agree(l, h);
    } else {
        link_wrong(l, wrong);
    }
}

/* ---- receiving: packets ----------------------------------------------- */

/*
 * link_get() - read a header of the peer's; false if there is none at @p
 *
 * What it acks must be on its way, and be what its sender received.
 */
static bool link_get(VPLink *l, const uint8_t *p, VPPacket *pkt)
{
    VPStore *s = &l->store;
    uint32_t ack = get32(p + VP_PKT_ACK_AT);

    return ack - s->base <= s->unsent - s->base &&
           wire_get(p, pkt, &l->rx_key, store_digest(s, ack));
}

/* link_acked() - take the ack of @pkt, a header that link_get() found */
static void link_acked(VPLink *l, const VPPacket *pkt)
{
    VPStore *s = &l->store;
    uint32_t before = s->bytes, seq = pkt->ack;
    unsigned flags;
    VPSent newest;

    if (seq == s->base) {
        return;
    }
    newest = *store_sent(s, seq - 1);
    flags = store_release(s, seq);
    flow_acked(&l->flow, &newest, before - s->bytes,
               (flags & VP_FLAG_ACK_NOW) != 0, pkt->delay, l->loop->now);
    flow_carried(&l->flow, &newest, VP_LIMIT_MAX(l->store.len_max));
}

/*
 * link_stalled() - does a later packet hide in one that stopped arriving?
 *
 * If bytes of it were lost, what follows is taken for its payload until it
 * is complete; a PING among that tells.  So does a HELLO, but anybody's data
 * may contain one, and on a slow line would break off its packet each time it
 * is sent again: so only where it follows a silence, as the HELLOs of a peer
 * that waits for an answer do.
 */
static bool link_stalled(VPLink *l)
{
    VPPacket pkt;

    if (l->rx_gap > 0 && l->rx_gap + VP_PKT_HDR_LEN <= l->rx_len &&
        wire_get(l->rx + l->rx_gap, &pkt, &hello_key, 0)) {
        return true;
    }
    if (l->rx_at == 0 || l->loop->now - l->rx_at < VP_STALL_US) {
        return false;
    }
    for (; l->rx_scanned + VP_PKT_HDR_LEN <= l->rx_len; l->rx_scanned++) {
        link_looked(l, 1);
        if (link_get(l, l->rx + l->rx_scanned, &pkt)) {
            return true;
        }
    }
    return false;
}

/* link_deliver() - a whole packet, in order, that checks */
static void link_deliver(VPLink *l, const VPPacket *pkt, uint8_t *payload)
{
    const char *wrong = NULL;

    l->task->work += VP_WORK_PACKET;
    l->asked_at = 0;
    if (l->silent) {
        l->silent = false;
        log_event(l->log, VP_LOG_INFO, (VPEvent){ .type = VP_EVENT_ANSWERS },
                  "the other end answers again");
    }
    l->peer = PEER_UP;
    l->rx_delay = (uint32_t)l->rx_last_at - pkt->time;
    l->ack_asked |= (pkt->flags & VP_FLAG_ACK_NOW) || pkt->type == VP_PKT_PING;
    if (pkt->flags & VP_FLAG_PROBE) {
        flow_probe(&l->flow, l->loop->now);
    }
    switch (pkt->type) {
    case VP_PKT_PING:
    case VP_PKT_ACK:
        break;
    case VP_PKT_CONTROL:
    case VP_PKT_CLIENT:
    case VP_PKT_SERVER:
        l->rx_expect++;
        l->rx_digest = digest_add(l->rx_digest, pkt);
        l->rx_unacked += VP_PKT_HDR_LEN + pkt->bytes;
        l->flow.received += VP_PKT_HDR_LEN + pkt->bytes;
        l->packets[0]++;
        l->bytes[0] += pkt->bytes;
        l->moved = true;
        wrong = l->ops->packet(l->up, pkt, payload);
        break;
    default:
        wrong = "unknown type of packet";
        break;
    }
    if (wrong != NULL) {
        link_refuse(l, wrong);
    }
}

/*
 * link_parse_up() - take one packet
 *
 * Returns how many bytes are done with, 0 if more must come first.
 */
static size_t link_parse_up(VPLink *l, uint8_t *p, size_t len)
{
    const char *wrong = NULL;
    VPPacket pkt;
    VPHello hello;
    size_t total;

    if (len < VP_PKT_HDR_LEN) {
        return 0;
    }
    if (!link_get(l, p, &pkt)) {
        int n = wire_get_hello(p, len, &hello);

        if (n > 0) {
            link_handle_hello(l, &hello, p);
        } else if (n < 0) {
            link_resync(l, "no packet where one should begin");
            n = 1;
        }
        return (size_t)n;
    }
    total = VP_PKT_HDR_LEN + pkt.bytes;
    if (pkt.bytes > VP_PKT_DATA_LEN) {
        link_refuse(l, "a packet that is too long");
        return 1;
    }
    if (pkt.seq == l->rx_expect) {
        link_acked(l, &pkt); /* on a slow line the rest takes a while */
    }
    if (pkt.seq != l->rx_expect) {
        wrong = "packets are missing";
    } else if (len < total) {
        if (p != l->rx || !link_stalled(l)) {
            return 0;
        }
        wrong = "a packet breaks off";
    } else if (pkt.bytes > 0 && !wire_data_ok(&pkt, p + VP_PKT_HDR_LEN,
                                              &l->rx_payload_key)) {
        wrong = "a payload is damaged";
    }
    if (wrong != NULL) {
        link_resync(l, wrong);
        return 1; /* a HELLO may begin at any byte after */
    }
    link_deliver(l, &pkt, p + VP_PKT_HDR_LEN);
    return total;
}

/* hello_next() - where after @from a HELLO may begin; @len if nowhere */
static size_t hello_next(const uint8_t *p, size_t from, size_t len)
{
    const uint8_t *type = NULL;

    if (from + VP_PKT_TYPE_AT < len) {
        type = memchr(p + from + VP_PKT_TYPE_AT, VP_PKT_HELLO,
                      len - from - VP_PKT_TYPE_AT);
    }
    return type != NULL ? (size_t)(type - p) - VP_PKT_TYPE_AT : len;
}

/* link_parse_hello() - skip to the next HELLO; returns like link_parse_up() */
static size_t link_parse_hello(VPLink *l, uint8_t *p, size_t len)
{
    VPHello hello;
    int n = wire_get_hello(p, len, &hello);
    size_t skip = 1;

    if (n > 0) {
        link_looked(l, 1);
        link_handle_hello(l, &hello, p);
        return (size_t)n;
    }
    if (n == 0) {
        link_looked(l, 1);
        /* if this one breaks off, a whole one may follow */
        while (wire_get_hello(p + skip, len - skip, &hello) <= 0) {
            link_looked(l, 1);
            skip = hello_next(p, skip + 1, len);
            if (skip >= len) {
                return 0;
            }
        }
    } else {
        if (p[VP_PKT_TYPE_AT] == VP_PKT_HELLO) {
            l->task->work += VP_WORK_LOOK; /* the check of a payload */
        }
        skip = MIN(hello_next(p, 1, len), len - VP_PKT_TYPE_AT);
        link_looked(l, skip);
    }
    l->garbage += skip;
    return skip;
}

static void link_rested(void *opaque)
{
    VPLink *l = opaque;

    l->unread = true;
    link_interest(l); /* driver_run() goes on with what is there */
}

/*
 * link_owes() - @work was done in this pass; others have time if it was much
 *
 * Before a handshake only what the peer sends counts.  Work during a rest is
 * what the peer has set going before, such as attempts to connect.  The pass
 * after a rest comes before the channel is looked at, so the next rest can't
 * begin in it.
 */
static void link_owes(VPLink *l, unsigned work)
{
    bool hello = l->state == LINK_HELLO, unread = l->unread;
    double rests;

    work = hello ? l->rx_work : work;
    l->rx_work = 0;
    if (!hello && l->loop->nchannels <= 1) {
        l->owed = 0; /* there is nobody to rest for */
        return;
    }
    if (link_rests(l)) {
        l->owed += work;
        return;
    }
    l->unread = false;
    rests = hello ? VP_REST_PARTS - 1 : task_rests(l->loop, l->task);
    l->owed = rests > 0 ? l->owed + work : 0;
    if (l->owed >= VP_REST_WORK && !unread) {
        vp_timer_start(l->loop, &l->rest_timer,
                       (uint64_t)(l->owed * rests / 1000), link_rested, l);
        l->owed = 0;
        link_interest(l);
    }
}

/*
 * link_process() - take what lies in the receive buffer
 *
 * Where a peer's packets are of the kind that makes much work the rest is left
 * for the next pass: other channels have their turn before that.  It has its
 * portion whatever else was done in the pass.
 */
static void link_process(VPLink *l)
{
    unsigned other = l->task->work - l->rx_work;
    unsigned most = other + loop_portion(l->loop);
    size_t pos = l->rx_done;

    l->rx_more = false;
    while (pos < l->rx_len) {
        size_t used;

        if (l->task->work >= most) {
            l->rx_more = true;
            break;
        }
        used = l->parse(l, l->rx + pos, l->rx_len - pos);
        if (used == 0) {
            break;
        }
        pos += used;
    }
    l->ops->flush(l->up);
    l->rx_work = l->task->work - other;
    l->rx_done = l->rx_more ? pos : 0;
    pos -= l->rx_done; /* moving the rest in each pass would be much work */
    l->rx_len -= pos;
    l->rx_gap -= MIN(pos, l->rx_gap);
    memmove(l->rx, l->rx + pos, l->rx_len);
    if (l->rx_len == 0) {
        l->rx_at = 0;
    } else if (pos > 0 || l->rx_at == 0) {
        l->rx_at = l->loop->now;
        l->rx_scanned = 1;
    }
    if (l->rx_unacked > 0 && l->ack_by == 0 && !link_ack_due(l)) {
        l->ack_by = l->loop->now + VP_ACK_DELAY;
        vp_timer_start(l->loop, &l->ack_timer, VP_ACK_DELAY, link_ack_timer,
                       l);
    }
}

/* link_fill() - read what is there; returns read()'s last answer, or -errno */
static ssize_t link_fill(VPLink *l)
{
    size_t before = l->rx_len;
    ssize_t n;

    /* devices give a few KiB a read: gather before looking at them */
    do {
        n = read(l->rfd, l->rx + l->rx_len, l->rx_cap - l->rx_len);
        n = n < 0 ? -errno : n;
        if (n > 0) {
            l->rx_len += (size_t)n;
        }
    } while (l->rx_len < l->rx_cap &&
             ((n > 0 && l->kind != VP_CHN_SOCKET) || n == -EINTR));
    if (l->rx_len > before) {
        if (before > 0 && l->loop->now - l->rx_last_at >= VP_SILENCE_US) {
            l->rx_gap = before;
        }
        l->rx_last_at = l->loop->now;
    }
    return n;
}

/* link_read() - the channel is readable; it is read whatever else happens */
static void link_read(VPLink *l)
{
    ssize_t n;
    bool full, ended;

    if (l->rx_more) {
        return; /* driver_run() goes on with what is there */
    }
    if (l->rx == NULL && !link_rx_grow(l)) {
        link_lost(l, "out of memory");
        return;
    }
    n = link_fill(l);
    ended = n <= 0 && n != -EAGAIN && n != -EWOULDBLOCK && n != -EINTR;
    full = l->rx_len == l->rx_cap;
    link_process(l);
    if (full) {
        link_rx_grow(l);
    }
    if (!ended || l->rx_more || !link_has_fd(l)) {
        return; /* that it has ended is read again, after what came last */
    }
    if (n == 0 && l->kind == VP_CHN_VIRTSERIAL) {
        link_away(l);
        return;
    }
    link_name_stranger(l, true);
    link_lost(l, n < 0 ? strerror((int)-n)
                 : l->heard && l->state == LINK_HELLO && !l->was_up
                 ? "turned away: the other end's log says why"
                 : "closed by the other end");
}

static void link_away_timer(void *opaque)
{
    VPLink *l = opaque;

    link_ready(l, l->rfd, VP_READ);
}

/* link_back() - is the other side of the port connected again? */
static void link_back(VPLink *l)
{
    ssize_t n;

    if (l->rx == NULL && !link_rx_grow(l)) {
        return;
    }
    n = read(l->rfd, l->rx, l->rx_cap);
    if (n > 0 || (n < 0 && errno == EAGAIN)) {
        vp_timer_stop(&l->away_timer);
        link_open(l, "the port's other side is back");
        if (n > 0) {
            l->rx_len = (size_t)n;
            link_process(l);
        }
    } else if (n == 0 || errno == EINTR) {
        /* a FIFO's write set doesn't sleep: look now and then */
        l->away_polled = true;
        link_interest(l);
        vp_timer_start(l->loop, &l->away_timer, VP_AWAY_POLL,
                       link_away_timer, l);
    } else {
        link_lost(l, strerror(errno));
    }
}

static void link_ready(void *opaque, int fd, int events)
{
    VPLink *l = opaque;

    (void)fd;
    if (l->state == LINK_AWAY) {
        link_back(l);
        return;
    }
    if (events & VP_WRITE) {
        link_set_blocked(l, false);
    }
    if (events & VP_READ) {
        link_read(l);
    }
}

/* link_init() - without a descriptor; all else of @l is zero */
static void link_init(VPLink *l)
{
    l->rfd = l->wfd = -1;
    l->instance = l->loop->instance;
    l->parse = link_parse_hello;
    store_reset(&l->store);
}

/* link_end() - close everything, free everything; nobody above is told */
static void link_end(VPLink *l)
{
    if (link_has_fd(l)) {
        link_close(l);
    }
    vp_timer_stop(&l->hello_timer);
    vp_timer_stop(&l->ping_timer);
    vp_timer_stop(&l->ack_timer);
    vp_timer_stop(&l->away_timer);
    vp_timer_stop(&l->rest_timer);
    vp_timer_stop(&l->trim_timer);
    store_trim(&l->store);
    free(l->rx);
}

/* ======================================================================
 * sched
 *
 * Whose turn it is to fill the channel: deficit round robin (M. Shreedhar and
 * G. Varghese, 1995) over the connections that have something to send and
 * credit for it, with one addition: a connection that comes back with part of
 * its quantum left was quiet, and goes before those that fill the channel
 * (RFC 8290, 4.2).  A quantum is four packets; their headers count, else single
 * bytes would be all but free.
 *
 * On a slow channel a round of the busy connections takes seconds, too long for
 * somebody who types.  So the quantum of a quiet connection isn't given back by
 * a round: while it has nothing to send it earns twice what each of the others
 * sends in that time.  A connection that sends less than that always goes
 * first; one that only seems quiet, because it sends all it can in small
 * portions, gets no more than that.  A connection that has used up its quantum
 * earns what each of the others sends.  So do all newcomers together, because
 * those that come one after the other, as from a web browser, would leave the
 * others nothing.
 *
 * A turn is embedded in the connection that takes it.  This room stands before
 * theirs, so that the code of a connection can say itself that it has something
 * to send, or nothing any more.
 * ====================================================================== */

/* Packets of a quantum, and of one read; of a read one in mixed traffic. */
#define VP_TURN_PKTS 4
/* Packets of one read if nobody else waits for his turn. */
#define VP_READ_PKTS 8
/* What quiet connections earn, in times of what each of the others sends. */
#define VP_EARN 2

typedef struct VPTurn {
    VPNode node;      /* in fresh or turns, while it has something to send; or
                         in VPConns.drops */
    bool in_turns;    /* node is in VPSched.turns */
    bool quiet;       /* it sent less than others, so has all of its quantum */
    int32_t deficit;  /* bytes left of the quantum */
    double idle_at;   /* VPSched.share when it had nothing to send */
} VPTurn;

typedef struct VPSched {
    VPNode fresh;     /* those that were quiet, first come first served */
    VPNode turns;     /* the others, round robin */
    size_t nturns;    /* in turns */
    double share;     /* bytes that each of them has sent so far */
    double newest_at; /* share when the newest turn came */
} VPSched;

static void sched_init(VPSched *s)
{
    node_init(&s->fresh);
    node_init(&s->turns);
}

/* sched_join() - @t is new, and earns what has gone out since the last one */
static void sched_join(VPSched *s, VPTurn *t)
{
    node_init(&t->node);
    t->idle_at = s->newest_at;
    s->newest_at = s->share;
}

/* sched_waits() - does it wait for its turn? */
static bool sched_waits(const VPTurn *t)
{
    return node_linked(&t->node);
}

/* sched_leave() - it isn't its turn, now or later */
static void sched_leave(VPSched *s, VPTurn *t)
{
    node_remove(&t->node);
    s->nturns -= t->in_turns;
    t->in_turns = false;
}

/* sched_idle() - there is nothing to send for now */
static void sched_idle(VPSched *s, VPTurn *t)
{
    sched_leave(s, t);
    t->idle_at = s->share;
}

/* sched_end_turn() - the others first; @pkt_len: of a packet, at most */
static void sched_end_turn(VPSched *s, VPTurn *t, uint32_t pkt_len)
{
    sched_leave(s, t);
    while (t->deficit <= 0) {
        t->deficit += (int32_t)(VP_TURN_PKTS * pkt_len);
    }
    t->in_turns = true;
    t->quiet = false;
    s->nturns++;
    node_append(&s->turns, &t->node);
}

/* sched_ready() - there is something to send; @pkt_len: as above */
static void sched_ready(VPSched *s, VPTurn *t, uint32_t pkt_len)
{
    double earned = (s->share - t->idle_at) * (t->deficit > 0 ? VP_EARN : 1);
    int32_t quantum = (int32_t)(VP_TURN_PKTS * pkt_len);

    t->deficit = (int32_t)MIN(t->deficit + earned, quantum);
    t->quiet = t->deficit == quantum;
    if (t->deficit > 0) {
        node_append(&s->fresh, &t->node);
    } else {
        sched_end_turn(s, t, pkt_len);
    }
}

/* sched_next() - NULL: nobody has anything to send */
static VPTurn *sched_next(VPSched *s)
{
    VPNode *ring = node_linked(&s->fresh) ? &s->fresh : &s->turns;

    return node_linked(ring) ? container_of(ring->next, VPTurn, node) : NULL;
}

/* sched_alone() - does nobody else fill the channel? */
static bool sched_alone(const VPSched *s, const VPTurn *t)
{
    return s->nturns == t->in_turns;
}

/* sched_spend() - @bytes of the quantum, with headers, went out */
static void sched_spend(VPSched *s, VPTurn *t, uint32_t bytes)
{
    t->deficit -= (int32_t)bytes;
    if (t->in_turns) {
        s->share += (double)bytes / (double)s->nturns;
    }
}

/* ======================================================================
 * conn
 *
 * A connection is one local socket, known by the id its client side gave it
 * and by which side that was; ids are not used again while they are in use,
 * and packets for one that is gone are ignored.  It is two half machines,
 *
 *   in    WAIT -> OPEN -> EOF -> CLOSED         local socket to channel
 *          |       |            |
 *          +-------+--> DROP ---+
 *
 *   out   WAIT ----> OPEN ---> DRAIN --> CLOSED channel to local socket
 *          |          |          |
 *          |          +-> BROKEN-+-> BROKEN_END
 *          +-> WAIT_DRAIN -> DRAIN
 *
 * (any of these ends in CLOSED) and one life:
 *
 *   NEW      accepted here; the peer doesn't know of it yet
 *   OPEN     the peer knows of it
 *   ENDING   the peer has forgotten it; what waits for the local socket is
 *            still delivered
 *   CLOSING  closed here; REFUSED or RESET is all that is left to be sent
 *   FREE     nothing is left; conns_reap() closes and frees it
 *
 *   event                         in          out             life
 *   ------------------------------------------------------------------------
 *   a client comes                OPEN        OPEN            NEW
 *   CONNECT_INIT sent                                         NEW -> OPEN
 *   CONNECT_INIT came             WAIT        WAIT            OPEN
 *   the target answers            -> OPEN     -> OPEN, DRAIN
 *                                 (DROP stays)
 *   the target doesn't            -> CLOSED   -> CLOSED       -> CLOSING, FREE
 *   end of data from the socket   -> EOF
 *   CLOSE sent                    -> CLOSED
 *   CLOSE came                                -> DRAIN (WAIT_DRAIN,
 *                                                BROKEN_END)
 *   the socket took all of it                 DRAIN -> CLOSED
 *   the socket takes no more,
 *     and in is OPEN                          -> BROKEN, BROKEN_END
 *     and in is not                           as reset here
 *   both halves CLOSED in order                               -> FREE
 *   end of data when BROKEN       -> CLOSED   -> CLOSED       -> CLOSING
 *   reset here, or by a limit,
 *     or the socket's owner is gone,
 *     or idle for too long        -> CLOSED   -> CLOSED       -> CLOSING, FREE
 *   RESET or REFUSED came,
 *     or the session is over      -> CLOSED   -> CLOSED       -> FREE
 *   RESET as the peer ends,
 *     and bytes wait              -> CLOSED                   -> ENDING
 *   RESET as the owner of the
 *     peer's socket is gone,
 *     in is WAIT or OPEN          -> DROP     as CLOSE        -> ENDING
 *     in is EOF or CLOSED         -> CLOSED   as CLOSE        -> ENDING
 *     out is BROKEN               -> CLOSED   -> CLOSED       -> FREE
 *   end of data in DROP           -> CLOSED
 *   in DROP, takes nothing        -> CLOSED   -> CLOSED       -> FREE
 *   all delivered when ENDING     -> CLOSED   -> CLOSED       -> FREE
 *   CONNECT_INIT came with its id CLOSED      DRAIN           -> ENDING
 *   ENDING's time is over         CLOSED      -> CLOSED       -> FREE
 *   RESET or REFUSED sent                                     CLOSING -> FREE
 *
 * A reset closes the socket so that its owner sees a reset, too: see
 * socket_setup().  It may overtake data, as TCP's does.  Who resets a unix
 * socket is only gone, and all that he sent is read first: so the peer delivers
 * it.  Then it closes its own socket in order if he had ended his data, else
 * resets it, lest a part looks like the whole.  It goes on reading its socket
 * until then, and drops what comes (DROP): who writes before he reads would
 * take nothing else.  Who takes nothing for VP_DROP_US while he writes
 * VP_DROP_MOST is reset; who writes less may take his time.
 *
 * Pull, not push.  Nothing queues in front of the channel: a local socket is
 * read only when the link may send its bytes now, straight into the send
 * store, so a keystroke has to wait only for what the channel itself holds,
 * and the link keeps that small.  In the other direction the channel is
 * always read, whatever the local sockets do: what a socket doesn't take at
 * once waits in its own buffer, and credit bounds that.  So no connection
 * can stop another, and two daemons whose writes are both blocked still read
 * and come free.  The simpler scheme, to stop reading the channel while some
 * output is blocked, is the deadlock that every multiplexer meets once.
 *
 * Credit counts bytes from the connection's start and never falls.  It is
 * given when the local socket took the bytes.  A connection whose socket
 * keeps up gets a larger window, out of a budget for all; see conn_resize().
 *
 * Each connection is in the account of its forward, with others of that forward
 * in the order in which they moved data last, if it limits how long one may be
 * idle: so one timer, for the first of each, is enough, and packets set none.
 * ====================================================================== */

/* What a window may grow to, unless the way is so long that it takes more. */
#define VP_WINDOW_MAX (2u << 20)
/*
 * What all windows may have grown by, where the store may become @len bytes
 * long: enough for one that moves beside eight that grew theirs and then got
 * stuck, and on a long way for what two round trips take.
 */
#define VP_WINDOW_BUDGET(len) (2 * (len))
/*
 * Round trips in which half of a window is used up: in fewer than
 * VP_WINDOW_SHORT it is too small, since the credit for the next half takes one
 * to come; in more than VP_WINDOW_LONG it is too large.
 */
#define VP_WINDOW_SHORT 1.5
#define VP_WINDOW_LONG 8
/*
 * The window grows once the local side has taken window / this times as much:
 * a small one soon, as to be short of credit costs more than it holds; a large
 * one late, as the kernel takes some MiB even if nobody ever reads them.
 */
#define VP_WINDOW_TRIAL (64u << 10)
/* Bytes of the buffer for what the local socket doesn't take, at first. */
#define VP_CONN_BUF_MIN 1024u

/* The first id of a session, which wraps around early as VP_SEQ_FIRST does. */
#define VP_CONN_FIRST (0u - 100u)
#define VP_HASH_MIN 64

/* How often sockets are looked at that nobody reads: see sweep_timer(). */
#define VP_SWEEP_US SECOND
/* So many are looked at in a row: others have their turn after that. */
#define VP_LOOK_BATCH 64
/* ... and so many are closed as they end. */
#define VP_CLOSE_BATCH 8
/* How long what waits is delivered after the peer's daemon has ended. */
#define VP_END_US (2 * SECOND)
#define VP_END_STEP (10 * MS)
/*
 * Whoever takes nothing for VP_DROP_US, and writes VP_DROP_MOST meanwhile, is
 * reset.  That is more than kernels hold unread, so whoever writes less would
 * not have waited for a reader.
 */
#define VP_DROP_US (10 * SECOND)
#define VP_DROP_MOST (16u << 20)
/* How much is read at a time to be dropped. */
#define VP_DROP_LEN (16u << 10)
/* Idle connections are looked for no more often. */
#define VP_IDLE_STEP (250 * MS)
/* So many of them are reset in a row: others have their turn after that. */
#define VP_IDLE_BATCH 8

typedef enum VPIn {
    IN_WAIT,   /* not connected yet */
    IN_OPEN,
    IN_EOF,    /* CLOSE still to be sent */
    IN_DROP,   /* ENDING, so nobody gets what comes: read and dropped */
    IN_CLOSED,
} VPIn;

typedef enum VPOut {
    OUT_WAIT,       /* not connected yet */
    OUT_WAIT_DRAIN, /* the peer sent CLOSE before we were */
    OUT_OPEN,
    OUT_DRAIN,      /* the peer sent CLOSE, bytes wait in the buffer */
    OUT_BROKEN,     /* the socket takes no more: drop, but return credit */
    OUT_BROKEN_END, /* BROKEN, and the peer sent CLOSE */
    OUT_CLOSED,
} VPOut;

typedef enum VPLife {
    LIFE_NEW,
    LIFE_OPEN,
    LIFE_ENDING,
    LIFE_CLOSING,
    LIFE_FREE,
    LIVES,
} VPLife;

static const char *const in_name[] = {
    "WAIT", "OPEN", "EOF", "DROP", "CLOSED",
};

static const char *const out_name[] = {
    "WAIT", "WAIT_DRAIN", "OPEN", "DRAIN", "BROKEN", "BROKEN_END", "CLOSED",
};

static const char *const life_name[] = {
    "NEW", "OPEN", "ENDING", "CLOSING", "FREE",
};

/* Control messages due; a set, so a peer can't make us queue answers. */
enum {
    DUE_INIT = 1,
    DUE_ACK = 2,
    DUE_REFUSED = 4,
    DUE_WINDOW = 8,
    DUE_CLOSE = 16,
    DUE_RESET = 32,
};

struct VPAccount {
    struct VPConns *conns;
    VPNode node;         /* in VPConns.accounts, if it has a limit "idle" */
    VPNode idlers;       /* its connections, by "moved", if it has "idle" */
    size_t users;        /* the forward, and all connections */
    size_t open;         /* connections, and callers, that "max_conns" bounds */
    VPLimits limits;
    VPConnCounts counts;
    uint64_t bytes[2];   /* to and from the local sockets */
};

typedef struct VPConn {
    struct VPConns *conns;
    VPAccount *account;
    struct VPConn *hash_next;
    VPNode idler;      /* in VPAccount.idlers */
    VPNode all;        /* in VPConns.all, oldest first */
    VPNode due_node;   /* in VPConns.due; .ending when ENDING, .dead if FREE */
    VPTurn turn;       /* linked: readable, has credit; in DROP: readable */
    uint32_t id;
    bool client;       /* the client side: we accepted it */
    VPIn in;
    VPOut out;
    VPLife life;
    bool blocked;      /* the local socket takes no more for the moment */
    bool doomed;       /* the sweep saw that it was reset */
    bool greets;       /* its client waits for "OK", see VPCaller */
    bool cut;          /* ENDING: no CLOSE had come, it ends in a reset */
    uint8_t reason;    /* for DUE_REFUSED and DUE_RESET */
    unsigned due;
    int fd;            /* -1: none yet, or closed */
    int watched;       /* what is watched of it, VP_READ | VP_WRITE */
    const char *ended; /* why it has, which conn_free() tells; NULL: nothing */
    void *dial;        /* of the room above, while it connects to the target */
    uint64_t ends_at;  /* ENDING: when it is reset at the latest; 0: never */
    uint64_t dropped_at; /* DROP: time of the first drop since its owner took
                            something; 0: none */
    size_t dropped_left; /* conn_queued() at that time */
    uint64_t dropped;  /* bytes since then */
    uint64_t number;   /* it is the channel's connection of this number */
    uint64_t born;
    uint64_t moved;    /* when data moved last */

    uint64_t tx_count; /* bytes sent to the peer */
    uint64_t tx_limit; /* bytes it lets us send */
    uint64_t rx_count; /* bytes received */
    uint64_t rx_taken; /* bytes received that the local socket took */
    uint64_t rx_limit; /* bytes we let the peer send */
    uint32_t window;   /* bytes that the peer may be ahead of rx_taken */
    uint64_t resized_at; /* rx_taken when the window was last changed */
    uint64_t credited_at; /* time when credit was given last */

    uint8_t *buf;      /* what the local socket has not taken yet */
    uint32_t buf_off;
    uint32_t buf_len;
    uint32_t buf_cap;
    uint32_t lead;     /* bytes at the buffer's begin that aren't the peer's */

    char service_id[VP_SERVICE_ID_LEN + 1];
} VPConn;

/* What the connections ask of the room above, whose @up is. */
typedef struct VPConnOps {
    /* the peer opened @c: connect it, or refuse it */
    void (*wanted)(void *up, VPConn *c, const VPOrigin *origin);
    /* @c is over before its target has answered; it has set c->dial */
    void (*unwanted)(void *up, VPConn *c);
    /* a message about the session came: NULL, or what is wrong with it */
    const char *(*told)(void *up, const uint8_t *msg, size_t len);
    /* the session is over */
    void (*over)(void *up);
} VPConnOps;

/* Packets' payloads for one connection, to be written in one call. */
#define VP_BATCH 16
typedef struct VPBatch {
    VPConn *conn;
    int n;
    struct iovec iov[1 + VP_BATCH]; /* [0] is for the connection's buffer */
} VPBatch;

/* All connections of a channel. */
typedef struct VPConns {
    VPLoop *loop;
    VPLog *log;
    VPLink *link;
    const VPConnOps *ops;
    void *up;

    VPNode all;               /* oldest first */
    size_t count[2][LIVES];   /* [1]: those accepted here */
    VPConn **hash;
    size_t hash_size;         /* a power of two, or 0 */
    uint64_t hash_seed;
    uint32_t next_id;
    VPNode due;               /* have control messages to be sent */
    VPNode dead;              /* are FREE */
    unsigned closed;          /* sockets that were closed in this pass */
    VPNode drops;             /* turns of those in DROP that are readable */
    VPNode ending;            /* are ENDING, and have a time for that */
    VPSched sched;
    uint32_t window_grown;    /* bytes that windows have grown by */
    uint32_t window_budget;   /* bytes that windows may grow by; it may have
                                 been lowered below window_grown */
    VPTimer sweep_timer;
    VPNode *sweep_at;         /* in "all", where a sweep goes on; NULL: none */
    bool sweep_again;         /* this sweep has seen a reason for the next */
    VPTimer end_timer;        /* while there is one in "ending" */
    VPTimer idle_timer;       /* while an account may have an idle one */
    VPNode accounts;
    VPAccount rest;           /* of connections that have no forward */
    VPBatch batch;
    VPConnCounts counts;
} VPConns;

static void conn_ready(void *opaque, int fd, int events);
static void sweep_timer(void *opaque);
static void end_timer(void *opaque);
static void idle_timer(void *opaque);

/* ---- states ----------------------------------------------------------- */

/* conns_count() - of those that live from @from to @to */
static inline size_t conns_count(const VPConns *cs, bool client,
                                 VPLife from, VPLife to)
{
    size_t n = 0;

    for (VPLife life = from; life <= to; life++) {
        n += cs->count[client][life];
    }
    return n;
}

/* conns_held() - all that take memory */
static size_t conns_held(const VPConns *cs)
{
    return conns_count(cs, false, 0, LIFE_FREE) +
           conns_count(cs, true, 0, LIFE_FREE);
}

/* conns_fds() - those that have a descriptor, or are to have one */
static size_t conns_fds(const VPConns *cs)
{
    return conns_count(cs, false, 0, LIFE_ENDING) +
           conns_count(cs, true, 0, LIFE_ENDING);
}

/* conns_known() - of those accepted here, how many does the peer know of? */
static size_t conns_known(const VPConns *cs)
{
    return cs->count[true][LIFE_OPEN] + cs->count[true][LIFE_CLOSING];
}

/* conn_known() - does the peer know of it? */
static bool conn_known(const VPConn *c)
{
    return c->life == LIFE_OPEN || c->life == LIFE_CLOSING;
}

/* conn_over() - is it closed here? */
static bool conn_over(const VPConn *c)
{
    return c->life >= LIFE_CLOSING;
}

/* conn_waits() - hasn't its target answered yet? */
static bool conn_waits(const VPConn *c)
{
    return c->out == OUT_WAIT || c->out == OUT_WAIT_DRAIN;
}

/* conn_interest() - what is watched, from state alone */
static void conn_interest(VPConn *c)
{
    int events = 0;

    if (c->fd < 0 || c->life == LIFE_FREE) {
        return;
    }
    if (!sched_waits(&c->turn) &&
        (c->in == IN_DROP ||
         (c->in == IN_OPEN && c->tx_count < c->tx_limit))) {
        events |= VP_READ;
    }
    if (c->buf_len > 0) {
        events |= VP_WRITE;
    }
    if (events != c->watched) {
        c->watched = events;
        vp_watch_set(c->conns->loop, c->fd, events);
    }
}

/* fd_peer() - the address of the other end of @fd, which may be -1 */
static const char *fd_peer(int fd, char *buf, size_t size)
{
    VPAddr addr = { .len = sizeof(addr.ss) };

    if (getpeername(fd, (struct sockaddr *)&addr.ss, &addr.len) < 0) {
        addr.len = 0;
    }
    return vp_addr_str(&addr, buf, size);
}

/* conn_peer() - the address of the local socket's other end, for the log */
static const char *conn_peer(const VPConn *c, char *buf, size_t size)
{
    return fd_peer(c->fd, buf, size);
}

/* conn_info() - all but "connecting", which the room above knows */
static VPConnInfo conn_info(const VPConn *c)
{
    uint64_t now = c->conns->loop->now;

    return (VPConnInfo){
        .id = c->id,
        .client = c->client,
        .service_id = c->service_id,
        .in = in_name[c->in],
        .out = out_name[c->out],
        .fd = c->fd,
        .age = now - c->born,
        .idle = now - c->moved,
        .bytes = { c->rx_taken, c->tx_count },
        .credit = c->tx_limit - c->tx_count,
        .waiting = (size_t)(c->rx_count - c->rx_taken),
    };
}

/* conns_tell() - tell of what the peer may cause at any rate */
static void conns_tell(VPConns *cs, VPEvent event)
{
    if (event_tell(cs->log, event)) {
        cs->link->task->work += VP_WORK_EVENT;
    }
}

/*
 * conn_tell() - tell who wants to know of connections what becomes of @c
 *
 * That isn't counted where a local client began it: VP_ACCEPT_BATCH of them
 * come in a pass, and if as many ends were more than a portion, what the peer
 * says of them would come in faster than it is taken.
 */
static void conn_tell(const VPConn *c, VPEventType type, const char *reason)
{
    const VPLoop *loop = c->conns->loop;

    if (loop->conn_events != NULL && *loop->conn_events) {
        VPConnInfo info = conn_info(c);
        VPEvent event = { .type = type, .reason = reason, .conn = &info };

        if (c->client) {
            event_tell(c->conns->log, event);
        } else {
            conns_tell(c->conns, event);
        }
    }
}

/* refusal_event() - the event that @service_id is refused to @from */
static VPEvent refusal_event(bool client, const char *service_id,
                             const char *from, const char *reason)
{
    return (VPEvent){
        .type = VP_EVENT_REFUSED,
        .client = client,
        .service_id = service_id,
        .from = from,
        .reason = reason,
    };
}

/* conns_log_refused() - @service_id is refused to the client at @fd */
static void conns_log_refused(VPConns *cs, VPLogLevel level,
                              const char *service_id, int fd, const char *why)
{
    char from[VP_ADDR_STR_LEN];

    fd_peer(fd, from, sizeof(from));
    log_event(cs->log, level, refusal_event(true, service_id, from, why),
              "%s: connection refused: %s", service_id, why);
}

/*
 * conn_log_begin() - who has come, or was reached: the local socket's owner
 * @origin:  whom the target was reached for; NULL where a client has come
 */
static void conn_log_begin(const VPConn *c, const VPOrigin *origin)
{
    char name[VP_ADDR_STR_LEN], client[VP_ADDR_STR_LEN] = "";

    if (*c->conns->loop->log_level >= VP_LOG_VERBOSE) {
        if (origin != NULL) {
            origin_str(origin, client, sizeof(client));
        }
        log_provoked(c->conns->log, VP_LOG_VERBOSE,
                     "%s: connection %u %s %s%s%s", c->service_id, c->id,
                     c->client ? "from" : "to",
                     conn_peer(c, name, sizeof(name)),
                     client[0] != '\0' ? " for " : "", client);
    }
    conn_tell(c, VP_EVENT_OPENED, NULL);
}

/* conn_log_end() - for how long it was there, how much it moved, why it ends */
static void conn_log_end(const VPConn *c, const char *why)
{
    const char *owner = c->client ? "client" : "target";

    if (*c->conns->loop->log_level >= VP_LOG_VERBOSE) {
        log_provoked(c->conns->log, VP_LOG_VERBOSE, "%s: connection %u ended "
                     "after %.3f s, %llu bytes from its %s, %llu to it: %s",
                     c->service_id, c->id,
                     (double)(c->conns->loop->now - c->born) / (double)SECOND,
                     (unsigned long long)c->tx_count, owner,
                     (unsigned long long)c->rx_taken, why);
    }
    conn_tell(c, VP_EVENT_ENDED, why);
}

static void conn_debug_line(const VPConn *c, const char *what,
                            const char *from, const char *to, const char *why)
{
    char name[VP_ADDR_STR_LEN];

    log_provoked(c->conns->log, VP_LOG_DEBUG,
                 "connection %u of %s %s %s: %s %s -> %s: %s", c->id,
                 c->service_id, c->client ? "from" : "to",
                 conn_peer(c, name, sizeof(name)), what, from, to, why);
}

/* conn_debug() - log that @what went @from one state @to another */
static inline void conn_debug(const VPConn *c, const char *what,
                              const char *from, const char *to,
                              const char *why)
{
    if (log_debugs(c->conns->log)) {
        conn_debug_line(c, what, from, to, why);
    }
}

/*
 * conn_set_in() - change the half "in", if that is legal
 * @why:  the event, for the log
 */
static void conn_set_in(VPConn *c, VPIn to, const char *why)
{
    static const unsigned legal[] = {
        [IN_WAIT] = 1u << IN_OPEN | 1u << IN_DROP | 1u << IN_CLOSED,
        [IN_OPEN] = 1u << IN_EOF | 1u << IN_DROP | 1u << IN_CLOSED,
        [IN_EOF] = 1u << IN_CLOSED,
        [IN_DROP] = 1u << IN_CLOSED,
        [IN_CLOSED] = 1u << IN_CLOSED,
    };

    if (!(legal[c->in] >> to & 1)) {
        log_say(c->conns->log, VP_LOG_ERROR, "connection %u: in: %s after %s",
                c->id, in_name[to], in_name[c->in]);
        return;
    }
    if (c->in != to) {
        conn_debug(c, "in", in_name[c->in], in_name[to], why);
        c->in = to;
        conn_interest(c);
    }
}

/* conn_set_out() - change the half "out"; as conn_set_in() */
static void conn_set_out(VPConn *c, VPOut to, const char *why)
{
    static const unsigned legal[] = {
        [OUT_WAIT] = 1u << OUT_WAIT_DRAIN | 1u << OUT_OPEN | 1u << OUT_CLOSED,
        [OUT_WAIT_DRAIN] = 1u << OUT_DRAIN | 1u << OUT_CLOSED,
        [OUT_OPEN] = 1u << OUT_DRAIN | 1u << OUT_BROKEN | 1u << OUT_CLOSED,
        [OUT_DRAIN] = 1u << OUT_BROKEN_END | 1u << OUT_CLOSED,
        [OUT_BROKEN] = 1u << OUT_BROKEN_END | 1u << OUT_CLOSED,
        [OUT_BROKEN_END] = 1u << OUT_CLOSED,
        [OUT_CLOSED] = 1u << OUT_CLOSED,
    };

    if (!(legal[c->out] >> to & 1)) {
        log_say(c->conns->log, VP_LOG_ERROR, "connection %u: out: %s after %s",
                c->id, out_name[to], out_name[c->out]);
        return;
    }
    if (c->out != to) {
        conn_debug(c, "out", out_name[c->out], out_name[to], why);
        c->out = to;
        conn_interest(c);
    }
}

static void conn_drop_buf(VPConn *c)
{
    free(c->buf);
    c->buf = NULL;
    c->buf_off = c->buf_len = c->buf_cap = c->lead = 0;
}

/* conn_let_go() - give up all that only an open connection needs */
static void conn_let_go(VPConn *c)
{
    sched_leave(&c->conns->sched, &c->turn);
    conn_drop_buf(c);
}

/* conn_close() - what a local client began isn't counted, as in conn_tell() */
static void conn_close(VPConn *c)
{
    VPConns *cs = c->conns;

    if (c->dial != NULL) {
        cs->ops->unwanted(cs->up, c);
        cs->closed++;
        cs->link->task->work += VP_WORK_CLOSE;
    }
    if (c->fd >= 0) {
        vp_unwatch(cs->loop, c->fd);
        close(c->fd);
        c->fd = -1;
        cs->closed++;
        cs->link->task->work += c->client ? 0 : VP_WORK_CLOSE;
    }
}

/*
 * conn_set_life() - change the life; as conn_set_in()
 *
 * A connection that is CLOSING or FREE has no buffer and waits for nothing.  It
 * is closed; but where many become FREE in a pass, as all may do at the end of a
 * session, conns_reap() does that.
 */
static void conn_set_life(VPConn *c, VPLife to, const char *why)
{
    static const unsigned legal[] = {
        [LIFE_NEW] = 1u << LIFE_OPEN | 1u << LIFE_FREE,
        [LIFE_OPEN] = 1u << LIFE_ENDING | 1u << LIFE_CLOSING | 1u << LIFE_FREE,
        [LIFE_ENDING] = 1u << LIFE_FREE,
        [LIFE_CLOSING] = 1u << LIFE_FREE,
        [LIFE_FREE] = 0,
    };
    VPConns *cs = c->conns;

    if (!(legal[c->life] >> to & 1)) {
        log_say(cs->log, VP_LOG_ERROR, "connection %u: %s after %s (%s)",
                c->id, life_name[to], life_name[c->life], why);
        return;
    }
    conn_debug(c, "life", life_name[c->life], life_name[to], why);
    if (to >= LIFE_CLOSING && c->life < LIFE_CLOSING && c->fd >= 0 &&
        c->ended == NULL) {
        conn_log_end(c, why);
    }
    cs->count[c->client][c->life]--;
    cs->count[c->client][to]++;
    if (c->life < LIFE_CLOSING && to >= LIFE_CLOSING) {
        cs->loop->nconns--;
        c->account->open--;
    }
    c->life = to;
    if (to >= LIFE_ENDING) {
        c->due = 0;
        sched_leave(&cs->sched, &c->turn);
    }
    if (to >= LIFE_CLOSING) {
        node_remove(&c->idler);
        conn_let_go(c);
    }
    if (to >= LIFE_CLOSING && c->ended == NULL) {
        /* else conn_free() tells what they were */
        conn_set_in(c, IN_CLOSED, why);
        conn_set_out(c, OUT_CLOSED, why);
    }
    if (to == LIFE_CLOSING ||
        (to == LIFE_FREE && cs->closed < VP_CLOSE_BATCH && c->ended == NULL)) {
        conn_close(c);
    }
    if (to == LIFE_FREE) {
        node_remove(&c->due_node);
        /* those still connecting first: they count for the limit of these */
        node_append(c->dial != NULL ? cs->dead.next : &cs->dead,
                    &c->due_node);
    }
}

/* conn_set_due() - have control messages sent when the link has room */
static void conn_set_due(VPConn *c, unsigned due)
{
    c->due |= due;
    if (!node_linked(&c->due_node) && c->life != LIFE_FREE) {
        node_append(&c->conns->due, &c->due_node);
    }
}

/* conns_sweep_later() - have sweep_timer() look, if it isn't about to */
static void conns_sweep_later(VPConns *cs)
{
    cs->sweep_again = true;
    if (!timer_running(&cs->sweep_timer)) {
        vp_timer_start(cs->loop, &cs->sweep_timer, VP_SWEEP_US, sweep_timer,
                       cs);
    }
}

/* ---- accounts --------------------------------------------------------- */

static void account_init(VPAccount *a, VPConns *cs, const VPLimits *limits)
{
    *a = (VPAccount){ .conns = cs, .users = 1, .limits = *limits };
    node_init(&a->node);
    node_init(&a->idlers);
    if (limits->idle > 0) {
        node_append(&cs->accounts, &a->node);
    }
}

/* account_leave() - it has a user less; the last one's end is its own */
static void account_leave(VPAccount *a)
{
    if (--a->users == 0) {
        node_remove(&a->node);
        free(a);
    }
}

/* account_full() - are there as many connections as there may be? */
static bool account_full(const VPAccount *a)
{
    return a->limits.max_conns > 0 && a->open >= a->limits.max_conns;
}

/* conn_enter() - make the connection, which is new, one of @a's */
static void conn_enter(VPConn *c, VPAccount *a)
{
    c->account = a;
    a->users++;
    a->open++;
    a->counts.opened[c->client]++;
}

/* conn_watch_idle() - from now on it may be idle for so long and no longer */
static void conn_watch_idle(VPConn *c)
{
    VPConns *cs = c->conns;
    uint64_t idle = c->account->limits.idle * SECOND;

    if (idle == 0) {
        return;
    }
    c->moved = cs->loop->now;
    node_append(&c->account->idlers, &c->idler);
    if (!timer_running(&cs->idle_timer) ||
        cs->idle_timer.deadline > cs->loop->now + idle) {
        vp_timer_start(cs->loop, &cs->idle_timer, idle, idle_timer, cs);
    }
}

/* conn_moved() - data moves, so it isn't idle */
static inline void conn_moved(VPConn *c)
{
    c->moved = c->conns->loop->now;
    if (node_linked(&c->idler)) {
        node_remove(&c->idler);
        node_append(&c->account->idlers, &c->idler);
    }
}

/* ---- table ------------------------------------------------------------ */

static VPConn **conn_slot(VPConns *cs, uint32_t id, bool client)
{
    /* seeded: the peer chooses ids, and could choose them for one slot */
    size_t h = (size_t)mix64(cs->hash_seed ^ ((uint64_t)id << 1 | client));

    return &cs->hash[h & (cs->hash_size - 1)];
}

/* conn_find() - by id and side, unless its id may be used anew; NULL: none */
static VPConn *conn_find(VPConns *cs, uint32_t id, bool client)
{
    VPConn *c = cs->hash_size > 0 ? *conn_slot(cs, id, client) : NULL;

    while (c != NULL &&
           (c->id != id || c->client != client || c->life == LIFE_ENDING ||
            c->life == LIFE_FREE)) {
        c = c->hash_next;
    }
    return c;
}

static bool conns_hash_grow(VPConns *cs)
{
    size_t size = cs->hash_size > 0 ? 2 * cs->hash_size : VP_HASH_MIN;
    VPConn **hash = calloc(size, sizeof(*hash));

    if (hash == NULL) {
        return cs->hash_size > 0; /* longer chains will do */
    }
    free(cs->hash);
    cs->hash = hash;
    cs->hash_size = size;
    for (VPNode *n = cs->all.next; n != &cs->all; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);
        VPConn **slot = conn_slot(cs, c->id, c->client);

        c->hash_next = *slot;
        *slot = c;
    }
    return true;
}

/*
 * conn_new() - next, it has to enter an account
 * @fd:          its socket, which it owns on success, or -1
 * @service_id:  one that vp_service_id_ok() accepts
 *
 * NULL: there is no memory, or @fd can't be watched.
 */
static VPConn *conn_new(VPConns *cs, uint32_t id, bool client, int fd,
                        const char *service_id)
{
    VPConn *c = NULL, **slot;

    if (conns_held(cs) < cs->hash_size || conns_hash_grow(cs)) {
        c = calloc(1, sizeof(*c));
    }
    if (c == NULL || (fd >= 0 && vp_watch(cs->loop, fd, conn_ready, c) < 0)) {
        free(c);
        return NULL;
    }
    c->conns = cs;
    c->id = id;
    c->client = client;
    c->fd = fd;
    c->born = c->moved = c->credited_at = cs->loop->now;
    c->in = client ? IN_OPEN : IN_WAIT;
    c->out = client ? OUT_OPEN : OUT_WAIT;
    c->life = client ? LIFE_NEW : LIFE_OPEN;
    c->window = VP_WINDOW_INIT;
    c->rx_limit = c->window;
    memcpy(c->service_id, service_id, strlen(service_id) + 1);
    sched_join(&cs->sched, &c->turn);
    node_init(&c->due_node);
    node_init(&c->idler);
    node_append(&cs->all, &c->all);
    slot = conn_slot(cs, id, client);
    c->hash_next = *slot;
    *slot = c;
    cs->count[client][c->life]++;
    cs->loop->nconns++;
    cs->counts.opened[client]++;
    c->number = cs->counts.opened[0] + cs->counts.opened[1];
    conn_debug(c, "life", "none", life_name[c->life],
               client ? "a client came" : "the other side asks for it");
    return c;
}

/* conn_free() - by the reaper only */
static void conn_free(VPConn *c)
{
    VPConns *cs = c->conns;
    VPConn **slot = conn_slot(cs, c->id, c->client);

    if (c->ended != NULL && c->fd >= 0) {
        conn_log_end(c, c->ended);
    }
    conn_close(c);
    if (cs->sweep_at == &c->all) {
        cs->sweep_at = c->all.next;
    }
    while (*slot != c) {
        slot = &(*slot)->hash_next;
    }
    *slot = c->hash_next;
    node_remove(&c->all);
    node_remove(&c->due_node);
    cs->window_grown -= c->window - VP_WINDOW_INIT;
    cs->count[c->client][LIFE_FREE]--;
    account_leave(c->account);
    free(c);
    link_trim_later(cs->link);
}

/*
 * conns_reap() - close and free what is FREE: @work ns of that, or one
 *
 * Returns whether some are left.
 */
static bool conns_reap(VPConns *cs, unsigned work)
{
    unsigned done = 0;

    while (node_linked(&cs->dead)) {
        VPConn *c = container_of(cs->dead.next, VPConn, due_node);

        if (done > 0 && done >= work) {
            return true;
        }
        done += c->fd >= 0 || c->dial != NULL ? VP_WORK_CLOSE
                                               : VP_WORK_PACKET;
        conn_free(c);
    }
    return false;
}

/* conns_reap_id() - reap what had an id before it is used anew */
static void conns_reap_id(VPConns *cs, uint32_t id, bool client)
{
    VPConn *c = cs->hash_size > 0 ? *conn_slot(cs, id, client) : NULL;

    while (c != NULL) {
        VPConn *next = c->hash_next;

        if (c->id == id && c->client == client && c->life == LIFE_FREE) {
            conn_free(c);
        }
        c = next;
    }
}

/* ---- ends ------------------------------------------------------------- */

static void account_count_refused(VPAccount *a, VPRefusal why)
{
    a->counts.refused[why]++;
    a->conns->counts.refused[why]++;
}

/* account_refused() - count one that was refused because of @reason */
static void account_refused(VPAccount *a, unsigned reason)
{
    static const uint8_t refusal[] = {
        [VP_REASON_UNKNOWN_SERVICE] = VP_REFUSED_UNKNOWN,
        [VP_REASON_REFUSED] = VP_REFUSED_TARGET,
        [VP_REASON_UNREACHABLE] = VP_REFUSED_TARGET,
        [VP_REASON_TIMEOUT] = VP_REFUSED_TARGET,
        [VP_REASON_LIMIT] = VP_REFUSED_LIMIT,
        [VP_REASON_RESOURCES] = VP_REFUSED_RESOURCES,
        [VP_REASON_OTHER] = VP_REFUSED_TARGET,
        [VP_REASON_ENDING] = VP_REFUSED_ENDING,
    };

    reason = reason == VP_REASON_NONE || reason > VP_REASON_ENDING
             ? VP_REASON_OTHER : reason;
    account_count_refused(a, refusal[reason]);
}

/* conn_count_reset() - count that it is reset, unless it is over already */
static void conn_count_reset(VPConn *c, VPResetBy by)
{
    if (!conn_over(c)) {
        c->account->counts.reset[by]++;
        c->conns->counts.reset[by]++;
    }
}

/*
 * conn_abort() - close at once: the local side sees a reset, and so will the
 * peer if it knows of the connection
 * @by:      for the count
 * @reason:  for the peer
 * @why:     for the log
 */
static void conn_abort(VPConn *c, VPResetBy by, VPReason reason,
                       const char *why)
{
    if (conn_over(c)) {
        return;
    }
    conn_count_reset(c, by);
    if (conn_known(c)) {
        conn_set_life(c, LIFE_CLOSING, why);
        c->reason = (uint8_t)reason;
        conn_set_due(c, DUE_RESET);
    } else {
        conn_set_life(c, LIFE_FREE, why);
    }
}

/* conn_is_unix() - is its local socket, which there is, a unix socket? */
static bool conn_is_unix(const VPConn *c)
{
    VPAddr addr = { .len = sizeof(addr.ss) };

    return getsockname(c->fd, (struct sockaddr *)&addr.ss, &addr.len) == 0 &&
           addr.ss.ss_family == AF_UNIX;
}

/*
 * conn_lose() - the local socket's owner is gone, all that he sent is read
 *
 * Of a unix socket that isn't counted as a reset, because it doesn't tell a
 * reset from an end.
 */
static void conn_lose(VPConn *c, const char *why)
{
    unsigned close_due = c->in == IN_EOF ? DUE_CLOSE : 0;

    if (conn_known(c) && !conn_over(c) && conn_is_unix(c)) {
        conn_set_life(c, LIFE_CLOSING, why);
        c->reason = VP_REASON_GONE;
        conn_set_due(c, close_due | DUE_RESET);
    } else {
        conn_abort(c, VP_RESET_OWNER, VP_REASON_NONE, why);
    }
}

/* refusal_str() - why one is refused here; reason_str() is the peer's words */
static const char *refusal_str(VPReason reason)
{
    return reason == VP_REASON_ENDING ? "this daemon ends" : reason_str(reason);
}

/* conn_refuse() - there will be no connection to the target */
static void conn_refuse(VPConn *c, VPReason reason)
{
    account_refused(c->account, reason);
    conns_tell(c->conns, refusal_event(false, c->service_id, "",
                                       refusal_str(reason)));
    if (c->life == LIFE_ENDING) {
        conn_set_life(c, LIFE_FREE, reason_str(reason));
        return;
    }
    conn_set_life(c, LIFE_CLOSING, reason_str(reason));
    c->reason = (uint8_t)reason;
    conn_set_due(c, DUE_REFUSED);
}

/* conn_forget() - close at once; the peer isn't told, or knows already */
static void conn_forget(VPConn *c, const char *why)
{
    if (c->life != LIFE_FREE) {
        conn_set_life(c, LIFE_FREE, why);
    }
}

/* conn_reset() - conn_forget() because of a reset; @by: for the count */
static void conn_reset(VPConn *c, VPResetBy by, const char *why)
{
    conn_count_reset(c, by);
    conn_forget(c, why);
}

/* conn_outq() - bytes the kernel holds for the local socket; -1: not known */
static int conn_outq(const VPConn *c)
{
    int n = -1;

#ifdef TIOCOUTQ
    if (c->fd < 0 || ioctl(c->fd, TIOCOUTQ, &n) < 0) {
        n = -1;
    }
#else
    (void)c;
#endif
    return n;
}

/* conn_queued() - bytes the local socket's owner has not got yet */
static size_t conn_queued(const VPConn *c)
{
    int n = conn_outq(c);

    /* what isn't known is left out: then only our own buffer counts */
    return c->buf_len + (n > 0 ? (size_t)n : 0);
}

/* conn_unread() - bytes of the local socket's owner that were not read yet */
static size_t conn_unread(const VPConn *c)
{
    int n = 0;

    return c->fd >= 0 && c->in == IN_OPEN && ioctl(c->fd, FIONREAD, &n) == 0
           ? (size_t)n : 0;
}

/*
 * conn_end() - the peer's daemon ends: what it sent before is delivered,
 * for VP_END_US at most, then comes the reset
 */
static void conn_end(VPConn *c)
{
    const char *why = reason_str(VP_REASON_ENDING);
    VPConns *cs = c->conns;

    cs->link->task->work += VP_WORK_CALL;
    if (c->in == IN_WAIT || conn_queued(c) == 0) {
        conn_reset(c, VP_RESET_PEER, why);
        return;
    }
    conn_set_life(c, LIFE_ENDING, why);
    conn_set_in(c, IN_CLOSED, why);
    c->ends_at = cs->loop->now + VP_END_US;
    node_remove(&c->due_node);
    node_append(&cs->ending, &c->due_node);
    if (!timer_running(&cs->end_timer)) {
        vp_timer_start(cs->loop, &cs->end_timer, VP_END_STEP, end_timer, cs);
    }
}

/* conn_settles() - is its target's kernel all that it waits for? */
static bool conn_settles(const VPConn *c)
{
    return c->life == LIFE_ENDING && c->ends_at == 0 && c->out == OUT_CLOSED;
}

/* conn_check_over() - have both directions ended in order? */
static void conn_check_over(VPConn *c)
{
    struct linger off = { 0, 0 };

    if ((c->in != IN_CLOSED && c->in != IN_DROP) || c->out != OUT_CLOSED ||
        conn_over(c)) {
        return;
    }
    if (conn_settles(c) && conn_queued(c) > 0 && !conn_is_unix(c)) {
        /* what nobody reads would make of close() a reset, and lose it */
        conns_sweep_later(c->conns);
        return;
    }
    if (c->cut) {
        conn_reset(c, VP_RESET_PEER, reason_str(VP_REASON_GONE));
        return;
    }
    if (c->fd >= 0) {
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off));
    }
    conn_set_life(c, LIFE_FREE, "both directions have ended");
}

/* ---- credit ----------------------------------------------------------- */

/* conn_fit_buf() - a window that is halved gives memory back as well */
static void conn_fit_buf(VPConn *c)
{
    uint8_t *buf;

    if (c->buf_cap <= c->window) {
        return;
    }
    memmove(c->buf, c->buf + c->buf_off, c->buf_len);
    c->buf_off = 0;
    buf = realloc(c->buf, c->window);
    if (buf != NULL) {
        c->buf = buf;
        c->buf_cap = c->window;
    }
}

/*
 * conn_trips() - round trips since credit was given last, while half of the
 * window was used up; 0 if the way isn't long, where that says nothing
 */
static double conn_trips(const VPConn *c)
{
    uint64_t trip = flow_trip(&c->conns->link->flow);

    return trip < VP_NEAR_US ? 0 : (double)(c->conns->loop->now -
                                            c->credited_at) / (double)trip;
}

/* conns_window_left() - bytes that windows may still grow by */
static uint32_t conns_window_left(const VPConns *cs)
{
    uint32_t budget = cs->window_budget;

    if (flow_trip(&cs->link->flow) < VP_NEAR_US) {
        /* large windows would be of no use, only memory for who gets stuck */
        budget = MIN(budget, VP_WINDOW_BUDGET(VP_STORE_LEN));
    }
    return budget - MIN(budget, cs->window_grown);
}

/* conn_may_grow() - is a larger window of use, or has it been earned? */
static bool conn_may_grow(const VPConn *c)
{
    double trips = conn_trips(c);

    return (trips > 0 && trips < VP_WINDOW_SHORT) ||
           (c->window < VP_WINDOW_MAX && c->rx_taken - c->resized_at >=
                (uint64_t)c->window * c->window / VP_WINDOW_TRIAL);
}

/*
 * conn_resize() - let the window follow what the way takes, and what is left
 * of the budget
 *
 * A window that is used up in about a round trip is too small; one beyond
 * VP_WINDOW_MAX for which it takes long has become too large.
 *
 * A window grows to what would still be left then, and gives way when less
 * than half of it is: so all that are busy end up with about the same, and
 * there is always some for a newcomer, even if those that have become idle
 * keep theirs (A. Choudhury and E. Hahne, Dynamic Queue Length Thresholds,
 * 1998).  At least half of the window is not outstanding when this is called,
 * so it may be halved, and what waits in the buffer fits.
 */
static void conn_resize(VPConn *c)
{
    VPConns *cs = c->conns;
    uint32_t left = conns_window_left(cs);

    if ((c->window > VP_WINDOW_INIT && c->window / 2 > left) ||
        (c->window > VP_WINDOW_MAX && conn_trips(c) > VP_WINDOW_LONG)) {
        c->window /= 2;
        cs->window_grown -= c->window;
        conn_fit_buf(c);
    } else if (c->buf_len == 0 && 3 * c->window <= left && conn_may_grow(c)) {
        cs->window_grown += c->window;
        c->window *= 2;
    } else {
        return;
    }
    c->resized_at = c->rx_taken;
}

/* conn_credit() - give credit for what was taken, in steps worth a packet */
static void conn_credit(VPConn *c)
{
    if (c->life != LIFE_OPEN ||
        (c->out != OUT_OPEN && c->out != OUT_BROKEN)) {
        return; /* the peer has sent all it will */
    }
    if (c->rx_limit - c->rx_taken > c->window / 2) {
        return;
    }
    conn_resize(c);
    if (c->rx_limit - c->rx_taken > c->window / 2) {
        return;
    }
    c->rx_limit = c->rx_taken + c->window;
    c->credited_at = c->conns->loop->now;
    conn_set_due(c, DUE_WINDOW);
}

/* ---- from the channel to the local socket ----------------------------- */

/* conn_buffer() - keep @len bytes until the socket takes them */
static bool conn_buffer(VPConn *c, const uint8_t *data, size_t len)
{
    size_t need = c->buf_len + len;

    if (c->buf_off + c->buf_len + len > c->buf_cap && c->buf_off > 0) {
        memmove(c->buf, c->buf + c->buf_off, c->buf_len);
        c->buf_off = 0;
    }
    if (need > c->buf_cap) {
        size_t cap = MAX(c->buf_cap, VP_CONN_BUF_MIN);
        uint8_t *buf;

        while (cap < need) {
            cap *= 2;
        }
        /* the peer sends no more than that, and the bound counts on it */
        cap = MAX(need, MIN(cap, c->window + VP_PROXY_LEN_MAX));
        buf = realloc(c->buf, cap);
        if (buf == NULL) {
            return false;
        }
        c->buf = buf;
        c->buf_cap = (uint32_t)cap;
    }
    memcpy(c->buf + c->buf_off + c->buf_len, data, len);
    c->buf_len += (uint32_t)len;
    return true;
}

/*
 * conn_introduce() - the target gets a header of the PROXY protocol before all
 * else; false: there is no memory for it
 */
static bool conn_introduce(VPConn *c, const VPOrigin *origin)
{
    uint8_t header[VP_PROXY_LEN_MAX];

    c->lead = (uint32_t)origin_proxy(origin, header);
    return conn_buffer(c, header, c->lead);
}

/* conn_broken() - was the local socket found to take no more? */
static bool conn_broken(const VPConn *c)
{
    return c->out == OUT_BROKEN || c->out == OUT_BROKEN_END;
}

/*
 * conn_break() - the local socket takes no more
 *
 * What it sent before it went is still to be read; then comes RESET.
 */
static void conn_break(VPConn *c)
{
    static const char why[] = "the local socket takes no more";

    if (c->in != IN_OPEN) {
        conn_lose(c, why);
        return;
    }
    c->rx_taken += c->buf_len - c->lead;
    conn_drop_buf(c);
    conn_set_out(c, c->out == OUT_DRAIN ? OUT_BROKEN_END : OUT_BROKEN, why);
    conn_credit(c);
}

/* conn_shutdown() - the local socket took everything, and no more will come */
static void conn_shutdown(VPConn *c)
{
    c->conns->link->task->work += VP_WORK_SHUT;
    /* a reset loses what the kernel holds, if that can't be waited for */
    c->cut = c->cut && conn_outq(c) >= 0;
    if (!c->cut) {
        shutdown(c->fd, SHUT_WR);
    }
    conn_set_out(c, OUT_CLOSED, "the local socket took all of it");
    conn_check_over(c);
}

/* conn_swallow() - @n payloads are for a socket that takes no more */
static void conn_swallow(VPConn *c, const struct iovec *iov, int n)
{
    for (int i = 1; i <= n; i++) {
        c->rx_taken += iov[i].iov_len;
    }
}

/*
 * conn_push() - one write() for conn_write(), if it makes sense
 *
 * Returns the bytes taken, or -1 if there is nothing more to be done: then the
 * socket was found broken, or the connection is over.
 */
static ssize_t conn_push(VPConn *c, struct iovec *iov, int n)
{
    ssize_t len;

    if (c->blocked || c->buf_len + (unsigned)n == 0 || conn_waits(c)) {
        return 0;
    }
    if (c->buf_len > 0) {
        iov[0].iov_base = c->buf + c->buf_off;
        iov[0].iov_len = c->buf_len;
    }
    c->conns->link->task->work += VP_WORK_CALL;
    do {
        len = c->buf_len > 0 ? writev(c->fd, iov, 1 + n)
                             : writev(c->fd, iov + 1, n);
    } while (len < 0 && errno == EINTR);
    if (len >= 0) {
        watch_expect(c->conns->loop, c->fd);
        return len;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
        return 0;
    }
    if (errno == EPIPE || errno == ECONNRESET) {
        conn_swallow(c, iov, n);
        conn_break(c);
    } else {
        conn_abort(c, VP_RESET_OWNER, reason_from_errno(errno),
                   strerror(errno));
    }
    return -1;
}

/* conn_keep() - buffer what of @n payloads is beyond @len bytes */
static bool conn_keep(VPConn *c, const struct iovec *iov, int n, size_t len)
{
    for (int i = 1; i <= n; i++) {
        size_t part = MIN(len, iov[i].iov_len);

        len -= part;
        if (part < iov[i].iov_len &&
            !conn_buffer(c, (uint8_t *)iov[i].iov_base + part,
                         iov[i].iov_len - part)) {
            return false;
        }
    }
    return true;
}

/*
 * conn_write() - give the local socket what waits and what just came
 * @iov:  iov[0] is free for the buffer, @n payloads follow
 */
static void conn_write(VPConn *c, struct iovec *iov, int n)
{
    uint32_t waited; /* bytes taken that had waited in the buffer */
    uint32_t lead;   /* the header's bytes among "waited" */
    ssize_t len;

    if (conn_broken(c)) {
        conn_swallow(c, iov, n);
        conn_credit(c);
        return;
    }
    len = conn_push(c, iov, n);
    if (len < 0) {
        return;
    }
    waited = (uint32_t)MIN((size_t)len, c->buf_len);
    lead = MIN(waited, c->lead);
    c->lead -= lead;
    c->rx_taken += (uint64_t)len - lead;
    c->account->bytes[0] += (uint64_t)len - lead;
    c->buf_off += waited;
    c->buf_len -= waited;
    if (!conn_keep(c, iov, n, (size_t)len - waited)) {
        log_provoked(c->conns->log, VP_LOG_WARN, "%s: connection reset: out "
                     "of memory", c->service_id);
        conn_abort(c, VP_RESET_DAEMON, VP_REASON_RESOURCES, "out of memory");
        return;
    }
    if (waited > 0) {
        conn_moved(c);
    }
    if (c->buf_len == 0) {
        conn_drop_buf(c);
    } else if (!conn_waits(c)) {
        c->blocked = true;
    }
    conn_credit(c);
    conn_interest(c);
    if (c->buf_len == 0 && c->out == OUT_DRAIN) {
        conn_shutdown(c);
    }
}

/* batch_flush() - write the payloads gathered for one connection */
static void batch_flush(void *up)
{
    VPConns *cs = up;
    VPBatch *b = &cs->batch;

    if (b->n > 0) {
        if (!conn_over(b->conn)) {
            conn_write(b->conn, b->iov, b->n);
        }
        b->n = 0;
    }
}

static void batch_add(VPConn *c, uint8_t *data, size_t len)
{
    VPBatch *b = &c->conns->batch;

    if (b->n > 0 && (b->conn != c || b->n == VP_BATCH)) {
        batch_flush(c->conns);
    }
    b->conn = c;
    b->n++;
    b->iov[b->n].iov_base = data;
    b->iov[b->n].iov_len = len;
}

/* ---- from the local socket to the channel ----------------------------- */

static uint32_t conn_pkt_len(const VPConn *c)
{
    const VPLink *l = c->conns->link;

    return MIN(l->flow.pkt_len, l->kind == VP_CHN_VIRTSERIAL
               ? VP_VIRTIO_WRITE_MAX : VP_PKT_LEN_MAX);
}

/* conn_readable() - the local socket has something to read */
static void conn_readable(VPConn *c)
{
    VPConns *cs = c->conns;

    if (c->in == IN_OPEN && !sched_waits(&c->turn)) {
        sched_ready(&cs->sched, &c->turn, cs->link->flow.pkt_len);
        conns_sweep_later(cs);
        conn_interest(c);
    }
}

/* conn_idle() - nothing more to read for now: select() tells when */
static void conn_idle(VPConn *c)
{
    sched_idle(&c->conns->sched, &c->turn);
    conn_interest(c);
}

/* conn_eof() - the local side has sent all it will */
static void conn_eof(VPConn *c)
{
    static const char why[] = "end of data from the local socket";

    sched_leave(&c->conns->sched, &c->turn);
    conn_set_in(c, IN_EOF, why);
    if (conn_broken(c)) {
        conn_lose(c, why);
        return;
    }
    conn_set_due(c, DUE_CLOSE);
    conns_sweep_later(c->conns);
}

/* conn_fits() - is it quiet, and does all it has to say fit in @room? */
static bool conn_fits(const VPConn *c, uint32_t room)
{
    return c->turn.quiet && room > VP_PKT_HDR_LEN &&
           conn_unread(c) <= room - VP_PKT_HDR_LEN;
}

/*
 * conn_slots() - where the packets of one read go
 * @iov:    room for VP_READ_PKTS
 * @want:   bytes to read
 * @asked:  set to the bytes there is room for
 *
 * The room for each packet's header is left before its part.  Returns how many
 * parts there are; 0: the link has no room.
 */
static int conn_slots(const VPConn *c, struct iovec *iov, uint32_t want,
                      uint32_t *asked)
{
    VPLink *l = c->conns->link;
    VPStore *s = &l->store;
    uint32_t pkt_len = conn_pkt_len(c);
    uint32_t room = MIN(link_room(l), store_room(s, pkt_len, l->flow.limit));
    uint32_t slots = store_pkts(s) - (s->next - s->base), k;

    *asked = 0;
    for (k = 0; k < MIN(slots, VP_READ_PKTS) && *asked < want; k++) {
        uint32_t len = MIN(pkt_len - VP_PKT_HDR_LEN, want - *asked);

        if (room < VP_PKT_HDR_LEN + len) {
            if (k > 0 || !conn_fits(c, room)) {
                break; /* no small packet just because there is room for one */
            }
            len = room - VP_PKT_HDR_LEN;
        }
        iov[k].iov_base = store_payload(s) + k * pkt_len;
        iov[k].iov_len = len;
        *asked += len;
        room -= len + VP_PKT_HDR_LEN;
    }
    return (int)k;
}

/* conn_sent() - @n bytes in the parts of @iov are packets from here on */
static void conn_sent(VPConn *c, const struct iovec *iov, uint32_t n)
{
    VPConns *cs = c->conns;
    uint32_t done = 0, pkts = 0;

    for (; done < n; pkts++) {
        uint32_t len = MIN(n - done, (uint32_t)iov[pkts].iov_len);

        link_add(cs->link, c->client ? VP_PKT_CLIENT : VP_PKT_SERVER, 0,
                 c->id, len);
        done += len;
    }
    c->tx_count += n;
    c->account->bytes[1] += n;
    conn_moved(c);
    cs->link->task->bulk += n;
    sched_spend(&cs->sched, &c->turn, n + pkts * VP_PKT_HDR_LEN);
}

/*
 * conn_read() - read the local socket straight into the send store
 *
 * One readv() fills several packets.  Returns false if the link has no room.
 */
static bool conn_read(VPConn *c)
{
    VPLink *l = c->conns->link;
    VPSched *sched = &c->conns->sched;
    uint32_t part = conn_pkt_len(c) - VP_PKT_HDR_LEN;
    uint64_t credit = c->tx_limit - c->tx_count;
    unsigned most = flow_mixed(&l->flow, c->conns->loop->now) ? 1
                    : sched_alone(sched, &c->turn) ? VP_READ_PKTS
                    : VP_TURN_PKTS;
    struct iovec iov[VP_READ_PKTS];
    uint32_t asked;
    ssize_t n;
    int k;

    if (credit == 0) {
        conn_idle(c);
        return true;
    }
    k = conn_slots(c, iov, (uint32_t)MIN(most * part, credit), &asked);
    if (k == 0) {
        return false;
    }
    l->task->work += VP_WORK_CALL;
    do {
        n = readv(c->fd, iov, k);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        conn_idle(c);
        return true;
    }
    if (n < 0 && (errno == ECONNRESET || errno == EPIPE)) {
        conn_lose(c, strerror(errno));
        return true;
    }
    if (n < 0) {
        conn_abort(c, VP_RESET_OWNER, VP_REASON_NONE, strerror(errno));
        return true;
    }
    if (n == 0) {
        conn_eof(c);
        return true;
    }
    conn_sent(c, iov, (uint32_t)n);
    if (c->turn.quiet && n <= VP_SPARSE_LEN && (uint32_t)n < asked &&
        sched->nturns > 0) {
        l->flow.sparse_at = c->conns->loop->now;
    }
    if ((uint32_t)n < asked || c->tx_count == c->tx_limit) {
        conn_idle(c);
    } else if (c->turn.deficit <= 0) {
        sched_end_turn(sched, &c->turn, l->flow.pkt_len);
    }
    return true;
}

/* conn_check_stuck() - reset it if its owner only writes, now @n bytes */
static void conn_check_stuck(VPConn *c, size_t n)
{
    uint64_t now = c->conns->loop->now;
    size_t left = conn_queued(c);

    if (c->dropped_at == 0 || left != c->dropped_left) {
        c->dropped_at = now;
        c->dropped_left = left;
        c->dropped = 0;
    }
    c->dropped += n;
    if (now - c->dropped_at >= VP_DROP_US && c->dropped >= VP_DROP_MOST) {
        conn_reset(c, VP_RESET_PEER, "its owner writes, and takes nothing");
    }
}

/* conn_drop() - read the local socket, though nobody gets what it says */
static void conn_drop(VPConn *c)
{
    VPTask *task = c->conns->link->task;
    uint8_t data[VP_DROP_LEN];
    ssize_t n;

    task->work += VP_WORK_CALL;
    do {
        n = read(c->fd, data, sizeof(data));
    } while (n < 0 && errno == EINTR);
    if (n > 0) {
        task->work += (unsigned)n / VP_WORK_BYTES;
        conn_check_stuck(c, (size_t)n);
    } else if (n == 0) {
        conn_set_in(c, IN_CLOSED, "end of data from the local socket");
        conn_check_over(c);
    } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
        conn_abort(c, VP_RESET_OWNER, VP_REASON_NONE, strerror(errno));
    }
}

/*
 * conns_drop() - have those in DROP read, up to @most of task->work, or one
 *
 * Returns whether there are more that are readable.
 */
static bool conns_drop(VPConns *cs, unsigned most)
{
    while (node_linked(&cs->drops)) {
        VPConn *c = container_of(cs->drops.next, VPConn, turn.node);

        node_remove(&c->turn.node);
        conn_drop(c);
        conn_interest(c);
        if (cs->link->task->work >= most) {
            return node_linked(&cs->drops);
        }
    }
    return false;
}

/* ---- control messages: sending ---------------------------------------- */

/* conns_send_control() - false if the store is full */
static bool conns_send_control(VPConns *cs, uint8_t flags, uint32_t id,
                               const uint8_t *msg, size_t len)
{
    VPLink *l = cs->link;
    uint32_t total = (uint32_t)(VP_PKT_HDR_LEN + len);

    if (store_room(&l->store, total, l->flow.limit) < total) {
        return false;
    }
    memcpy(store_payload(&l->store), msg, len);
    link_add(l, VP_PKT_CONTROL, flags, id, len);
    return true;
}

/* conn_put_origin() - of the local socket's client; returns its length */
static size_t conn_put_origin(const VPConn *c, uint8_t *p)
{
    VPAddr from = { .len = sizeof(from.ss) }, to = { .len = sizeof(to.ss) };

    /* a client that is gone already has no address any more */
    if (getpeername(c->fd, (struct sockaddr *)&from.ss, &from.len) < 0 ||
        getsockname(c->fd, (struct sockaddr *)&to.ss, &to.len) < 0) {
        from.ss.ss_family = to.ss.ss_family = AF_UNSPEC;
    }
    return origin_put(p, &from, &to);
}

/* conn_send_due() - the first due message; false if the store is full */
static bool conn_send_due(VPConn *c)
{
    uint8_t msg[VP_CONTROL_LEN_MAX];
    size_t len = 0;
    unsigned due = c->due & (0u - c->due); /* in the order of the bits */

    switch (due) {
    case DUE_INIT:
        msg[0] = VP_MSG_CONNECT_INIT;
        put64(msg + 1, c->rx_limit);
        msg[9] = (uint8_t)strlen(c->service_id);
        memcpy(msg + 10, c->service_id, msg[9]);
        len = 10u + msg[9];
        len += conn_put_origin(c, msg + len);
        break;
    case DUE_ACK:
    case DUE_WINDOW:
        msg[0] = due == DUE_ACK ? VP_MSG_CONNECT_ACK : VP_MSG_WINDOW;
        put64(msg + 1, c->rx_limit);
        break;
    case DUE_CLOSE:
        msg[0] = VP_MSG_CLOSE;
        break;
    default: /* DUE_REFUSED or DUE_RESET: something is due */
        msg[0] = due == DUE_RESET ? VP_MSG_RESET : VP_MSG_CONNECT_REFUSED;
        msg[1] = c->reason;
        break;
    }
    len = due == DUE_INIT ? len : conn_msg[msg[0]].len;
    if (!conns_send_control(c->conns, c->client ? VP_FLAG_CLIENT : 0, c->id,
                            msg, len)) {
        return false;
    }
    c->due &= ~due;
    if (due == DUE_INIT) {
        conn_set_life(c, LIFE_OPEN, "the other side is asked for it");
    } else if (due == DUE_CLOSE) {
        conn_set_in(c, IN_CLOSED, "the other side is told");
        conn_check_over(c);
    } else if (due == DUE_RESET || due == DUE_REFUSED) {
        conn_set_life(c, LIFE_FREE, "the other side is told");
    }
    return true;
}

/* conns_send_due() - control goes first; false if there is no room */
static bool conns_send_due(VPConns *cs)
{
    VPLink *l = cs->link;

    while (node_linked(&cs->due)) {
        VPConn *c = container_of(cs->due.next, VPConn, due_node);

        if (link_room(l) == 0) {
            return false;
        }
        if ((c->due & DUE_INIT) &&
            conns_known(cs) >= l->peer_max_conns) {
            conns_log_refused(cs, VP_LOG_WARN, c->service_id, c->fd,
                              reason_str(VP_REASON_LIMIT));
            account_refused(c->account, VP_REASON_LIMIT);
            conn_forget(c, reason_str(VP_REASON_LIMIT));
            continue;
        }
        if (c->due != 0 && !conn_send_due(c)) {
            return false;
        }
        if (c->due == 0 && c->life != LIFE_FREE) {
            node_remove(&c->due_node);
        }
    }
    return true;
}

/*
 * conns_fill() - fill the store for one write
 * @most:  of task->work, in this pass
 *
 * Returns true if there was more to send than could be taken now.
 */
static bool conns_fill(VPConns *cs, unsigned most)
{
    VPStore *s = &cs->link->store;
    VPFlow *flow = &cs->link->flow;
    bool mixed = flow_mixed(flow, cs->loop->now);
    uint32_t end = s->bytes + (mixed ? VP_SPARSE_LEN : VP_WRITE_MAX);
    uint64_t sparse_at = flow->sparse_at;

    while (s->bytes < end && cs->link->task->work < most) {
        VPTurn *turn;

        if (node_linked(&cs->due) && !conns_send_due(cs)) {
            return false;
        }
        turn = sched_next(&cs->sched);
        if (turn == NULL) {
            if (s->bytes < flow->enough) {
                flow->app_limited = flow->delivered + s->bytes;
            }
            return false;
        }
        if (turn->in_turns && flow->sparse_at != sparse_at) {
            return true; /* what is sparse goes out before bulk is read */
        }
        if (!conn_read(container_of(turn, VPConn, turn))) {
            return false;
        }
    }
    return true;
}

/* ---- the local socket ------------------------------------------------- */

/* conn_connected() - the target has accepted; @fd is ours */
static void conn_connected(VPConn *c, int fd, const VPOrigin *origin)
{
    static const char why[] = "the target has accepted";
    struct iovec iov[1];

    if (vp_watch(c->conns->loop, fd, conn_ready, c) < 0) {
        close(fd);
        conn_refuse(c, VP_REASON_RESOURCES);
        return;
    }
    c->fd = fd;
    if (c->life == LIFE_OPEN) {
        conn_set_in(c, IN_OPEN, why);
        conn_set_due(c, DUE_ACK);
    }
    conn_set_out(c, c->out == OUT_WAIT ? OUT_OPEN : OUT_DRAIN, why);
    conn_log_begin(c, origin);
    conn_watch_idle(c);
    conn_write(c, iov, 0);
}

/* conn_greet() - tell the client that its target has accepted */
static void conn_greet(VPConn *c)
{
    char line[16];
    struct iovec iov = {
        .iov_base = line,
        .iov_len = (size_t)snprintf(line, sizeof(line), "OK %u\n",
                                    1 + c->id % 65535),
    };

    c->greets = false;
    /* Firecracker's clients take N for a port; there is room for the line,
       because nothing was written to this socket before */
    if (writev(c->fd, &iov, 1) != (ssize_t)iov.iov_len) {
        conn_abort(c, VP_RESET_OWNER, VP_REASON_NONE,
                   "the client takes no \"OK\"");
    }
}

static void conn_ready(void *opaque, int fd, int events)
{
    VPConn *c = opaque;
    struct iovec iov[1];

    if (c->life == LIFE_FREE) {
        vp_watch_set(c->conns->loop, fd, 0); /* it is closed soon */
        return;
    }
    if (events & VP_WRITE) {
        c->blocked = false;
        conn_write(c, iov, 0);
    }
    if (!(events & VP_READ) || conn_over(c)) {
        return;
    }
    if (c->in == IN_DROP && !sched_waits(&c->turn)) {
        node_append(&c->conns->drops, &c->turn.node);
        conn_interest(c);
    } else {
        conn_readable(c);
    }
}

/* conn_is_lost() - did its socket's owner reset it, as far as poll() tells? */
static bool conn_is_lost(const VPConn *c)
{
    struct pollfd pfd = { .fd = c->fd };

    if (poll(&pfd, 1, 0) <= 0 || !(pfd.revents & (POLLERR | POLLHUP))) {
        return false;
    }
    if (conn_is_unix(c)) {
        /* else what its owner has sent is still to be read */
        return c->in != IN_OPEN;
    }
    /* a write that broke it has taken the error, FreeBSD shows none */
    if ((pfd.revents & POLLERR) || conn_broken(c)) {
        return true;
    }
    /* HUP: both ends of a TCP are shut, and ours was not by us */
    return c->out == OUT_OPEN;
}

/*
 * conn_sweep() - is its owner gone, though nobody reads it?
 *
 * Nobody reads after end of data, and while a connection waits for its turn or
 * for credit; in the second case the bytes that are still to be read get
 * another second.  Those that wait for their target's kernel are looked at as
 * well.
 */
static void conn_sweep(VPConn *c)
{
    bool half = c->out == OUT_OPEN && (c->in == IN_EOF || c->in == IN_CLOSED);
    bool waits = c->in == IN_OPEN &&
                 (sched_waits(&c->turn) || c->tx_count == c->tx_limit);

    if (c->fd < 0 || conn_over(c) ||
        (!half && !waits && !conn_settles(c))) {
        return;
    }
    conns_sweep_later(c->conns);
    if (conn_is_lost(c)) {
        if (!waits || c->doomed) {
            conn_lose(c, "its owner is gone");
        }
        c->doomed = true;
    } else {
        conn_check_over(c);
    }
}

/* sweep_timer() - a part of a sweep; the next one comes in VP_SWEEP_US */
static void sweep_timer(void *opaque)
{
    VPConns *cs = opaque;

    if (cs->sweep_at == NULL) {
        cs->sweep_at = cs->all.next;
        cs->sweep_again = false;
    }
    for (int i = 0; i < VP_LOOK_BATCH && cs->sweep_at != &cs->all; i++) {
        VPConn *c = container_of(cs->sweep_at, VPConn, all);

        cs->sweep_at = cs->sweep_at->next;
        conn_sweep(c);
    }
    vp_timer_stop(&cs->sweep_timer);
    if (cs->sweep_at != &cs->all) {
        vp_timer_start(cs->loop, &cs->sweep_timer, 1, sweep_timer, cs);
        return;
    }
    cs->sweep_at = NULL;
    if (cs->sweep_again) {
        conns_sweep_later(cs);
    }
}

/* end_timer() - reset those ENDING that have nothing left, or no time */
static void end_timer(void *opaque)
{
    VPConns *cs = opaque;
    size_t n = conns_count(cs, false, LIFE_ENDING, LIFE_ENDING) +
               conns_count(cs, true, LIFE_ENDING, LIFE_ENDING);

    /* each look is a system call */
    for (size_t i = 0; i < MIN(n, VP_LOOK_BATCH) && node_linked(&cs->ending);
         i++) {
        VPConn *c = container_of(cs->ending.next, VPConn, due_node);

        if (c->ends_at <= cs->loop->now || conn_queued(c) == 0) {
            conn_reset(c, VP_RESET_PEER, reason_str(VP_REASON_ENDING));
        } else {
            node_remove(&c->due_node);
            node_append(&cs->ending, &c->due_node);
        }
    }
    if (node_linked(&cs->ending)) {
        uint64_t round = VP_END_US / 8; /* at most, to look at all of them */

        vp_timer_start(cs->loop, &cs->end_timer,
                       MIN(VP_END_STEP, round / (1 + n / VP_LOOK_BATCH)),
                       end_timer, cs);
    }
}

/* idle_timer() - reset those that were idle for too long */
static void idle_timer(void *opaque)
{
    VPConns *cs = opaque;
    uint64_t now = cs->loop->now, next = UINT64_MAX;
    unsigned resets = 0;
    char why[40];

    for (VPNode *n = cs->accounts.next; n != &cs->accounts; n = n->next) {
        VPAccount *a = container_of(n, VPAccount, node);
        uint64_t idle = a->limits.idle * SECOND;

        while (node_linked(&a->idlers)) {
            VPConn *c = container_of(a->idlers.next, VPConn, idler);

            if (c->moved + idle > now) {
                next = MIN(next, c->moved + idle - now);
                break;
            }
            if (++resets > VP_IDLE_BATCH) {
                vp_timer_start(cs->loop, &cs->idle_timer, 1, idle_timer, cs);
                return;
            }
            snprintf(why, sizeof(why), "idle for %u s", a->limits.idle);
            conn_abort(c, VP_RESET_IDLE, VP_REASON_TIMEOUT, why);
        }
    }
    if (next != UINT64_MAX) {
        vp_timer_start(cs->loop, &cs->idle_timer, MAX(next, VP_IDLE_STEP),
                       idle_timer, cs);
    }
}

/* ---- packets from the peer -------------------------------------------- */

/* conn_handle_init() - the peer has a connection for a service */
static const char *conn_handle_init(VPConns *cs, const VPPacket *pkt,
                                    const uint8_t *msg)
{
    char service_id[VP_SERVICE_ID_LEN + 1];
    size_t len = pkt->bytes > 10 ? msg[9] : 0;
    size_t most = 2 * (size_t)cs->link->hello.max_conns;
    VPOrigin origin;
    VPConn *c;

    if (!(pkt->flags & VP_FLAG_CLIENT) || pkt->bytes < 10 + len ||
        !vp_service_id_ok((const char *)msg + 10, len)) {
        return conn_msg[VP_MSG_CONNECT_INIT].malformed;
    }
    c = conn_find(cs, pkt->conn, false);
    if (c != NULL && c->in == IN_CLOSED && c->out == OUT_DRAIN) {
        /* over on the wire, and ids wrap around: the peer has forgotten it */
        conn_set_life(c, LIFE_ENDING, "its id is used anew");
    } else if (c != NULL) {
        return "CONNECT_INIT with an id in use";
    }
    conns_reap_id(cs, pkt->conn, false); /* its end is told first */
    conns_reap(cs, 0); /* what there is room for is as much as before */
    while (conns_count(cs, false, LIFE_OPEN, LIFE_FREE) >= most &&
           node_linked(&cs->dead)) {
        conns_reap(cs, 0); /* this side allowed more before */
    }
    if (conns_count(cs, false, LIFE_OPEN, LIFE_FREE) >= most) {
        /* it didn't wait for the refusals */
        return "many more connections than HELLO allowed";
    }
    memcpy(service_id, msg + 10, len);
    service_id[len] = '\0';
    c = conn_new(cs, pkt->conn, false, -1, service_id);
    if (c == NULL) {
        /* no memory even for an answer: only a new session is honest */
        return "out of memory on this side";
    }
    c->tx_limit = get64(msg + 1);
    origin_get(&origin, msg + 10 + len, pkt->bytes - 10 - len);
    cs->ops->wanted(cs->up, c, &origin);
    return NULL;
}

/* conn_handle_close() - no more data will come for the local socket */
static const char *conn_handle_close(VPConn *c)
{
    static const char why[] = "the other side has sent all";

    c->due &= ~(unsigned)DUE_WINDOW; /* it sends no more, and may be over */
    switch (c->out) {
    case OUT_WAIT:
        conn_set_out(c, OUT_WAIT_DRAIN, why);
        break;
    case OUT_OPEN:
        conn_set_out(c, OUT_DRAIN, why);
        if (c->buf_len == 0) {
            conn_shutdown(c);
        }
        break;
    case OUT_BROKEN:
        conn_set_out(c, OUT_BROKEN_END, why);
        break;
    default:
        return "CLOSE twice";
    }
    return NULL;
}

/* conn_handle_gone() - its socket has no owner any more over there */
static void conn_handle_gone(VPConn *c)
{
    const char *why = reason_str(VP_REASON_GONE);

    conn_set_life(c, LIFE_ENDING, why);
    conn_set_in(c, c->in == IN_WAIT || c->in == IN_OPEN ? IN_DROP : IN_CLOSED,
                why);
    if (conn_broken(c)) {
        conn_forget(c, why);
    } else if (c->out == OUT_WAIT || c->out == OUT_OPEN) {
        c->cut = true;
        conn_handle_close(c);
    } else {
        conn_check_over(c);
    }
}

/* conn_named() - the connection that @pkt is about; NULL if it knows of none */
static VPConn *conn_named(VPConns *cs, const VPPacket *pkt, bool client)
{
    VPConn *c = conn_find(cs, pkt->conn, client);

    return c != NULL && conn_known(c) ? c : NULL;
}

/* conn_handle_reset() - RESET or CONNECT_REFUSED came */
static void conn_handle_reset(VPConn *c, const uint8_t *msg)
{
    char name[VP_ADDR_STR_LEN];

    if (msg[0] == VP_MSG_CONNECT_REFUSED && !conn_over(c)) {
        account_refused(c->account, msg[1]);
        conn_peer(c, name, sizeof(name));
        log_event(c->conns->log, VP_LOG_INFO,
                  refusal_event(true, c->service_id, name, reason_str(msg[1])),
                  "%s: connection from %s refused: %s", c->service_id, name,
                  reason_str(msg[1]));
    }
    if (msg[0] == VP_MSG_RESET && msg[1] == VP_REASON_ENDING &&
        !conn_over(c)) {
        conn_end(c);
    } else if (msg[0] == VP_MSG_RESET && msg[1] == VP_REASON_GONE &&
               !conn_over(c)) {
        conn_handle_gone(c);
    } else if (msg[0] == VP_MSG_RESET) {
        conn_reset(c, VP_RESET_PEER, reason_str(msg[1]));
    } else {
        conn_forget(c, reason_str(msg[1]));
    }
}

/* conn_handle_control() - returns what is wrong with it, or NULL */
static const char *conn_handle_control(VPConns *cs, const VPPacket *pkt,
                                       const uint8_t *msg)
{
    unsigned type = pkt->bytes > 0 ? msg[0] : 0;
    VPConn *c;

    if (type >= VP_MSG_OPTIONAL) {
        return cs->ops->told(cs->up, msg, pkt->bytes);
    }
    if (type == VP_MSG_CONNECT_INIT) {
        return conn_handle_init(cs, pkt, msg);
    }
    if (type == 0 || type > VP_MSG_RESET) {
        return "unknown control message";
    }
    if (pkt->bytes != conn_msg[type].len ||
        (type == VP_MSG_CONNECT_REFUSED && (pkt->flags & VP_FLAG_CLIENT))) {
        return conn_msg[type].malformed;
    }
    c = conn_named(cs, pkt, !(pkt->flags & VP_FLAG_CLIENT));
    if (c == NULL) {
        return NULL; /* late, but no offence */
    }
    if (type == VP_MSG_RESET || type == VP_MSG_CONNECT_REFUSED) {
        conn_handle_reset(c, msg);
        return NULL;
    }
    if (conn_over(c)) {
        return NULL;
    }
    if (type == VP_MSG_CLOSE) {
        return conn_handle_close(c);
    }
    if (get64(msg + 1) > c->tx_limit) {
        c->tx_limit = get64(msg + 1);
        conn_interest(c);
    }
    if (c->greets && type == VP_MSG_CONNECT_ACK) {
        conn_greet(c);
    }
    return NULL;
}

/* conn_handle_data() - returns what is wrong with it, or NULL */
static const char *conn_handle_data(VPConns *cs, const VPPacket *pkt,
                                    uint8_t *payload)
{
    VPConn *c = conn_named(cs, pkt, pkt->type == VP_PKT_SERVER);

    if (c == NULL || conn_over(c)) {
        cs->link->task->work += pkt->bytes / VP_WORK_BYTES;
        return NULL;
    }
    cs->link->task->bulk += pkt->bytes;
    if (pkt->bytes == 0) {
        return "data without data";
    }
    if (c->out != OUT_WAIT && c->out != OUT_OPEN && c->out != OUT_BROKEN) {
        return "data after CLOSE";
    }
    c->rx_count += pkt->bytes;
    conn_moved(c);
    if (c->rx_count > c->rx_limit) {
        return "more data than credit";
    }
    batch_add(c, payload, pkt->bytes);
    return NULL;
}

/* ---- what the link tells ---------------------------------------------- */

static const char *conns_packet(void *up, const VPPacket *pkt,
                                uint8_t *payload)
{
    VPConns *cs = up;

    if (pkt->type == VP_PKT_CONTROL) {
        cs->link->task->work += pkt->bytes / VP_WORK_BYTES;
        batch_flush(cs);
        return conn_handle_control(cs, pkt, payload);
    }
    return conn_handle_data(cs, pkt, payload);
}

/*
 * conns_over() - the session is over for all that the peer knew of
 *
 * That may be thousands: what takes long is left to conns_reap().
 */
static void conns_over(void *up)
{
    static const char why[] = "the session is over";
    VPConns *cs = up;

    for (VPNode *n = cs->all.next; n != &cs->all; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);

        if (conn_known(c)) {
            c->ended = why;
            conn_reset(c, VP_RESET_SESSION, why);
        }
    }
    cs->ops->over(cs->up);
}

/* conns_began() - the link is up: connections that waited may begin */
static void conns_began(void *up)
{
    VPConns *cs = up;
    size_t left = cs->count[true][LIFE_NEW];

    /* the newest first, because there may be thousands that are none of them */
    for (VPNode *n = cs->all.prev; left > 0; n = n->prev) {
        VPConn *c = container_of(n, VPConn, all);

        if (c->life == LIFE_NEW) {
            c->tx_limit = cs->link->peer_window;
            conn_interest(c);
            left--;
        }
    }
}

/* conns_idle() - nothing moves: give memory back */
static void conns_idle(void *up)
{
    VPConns *cs = up;

    if (conns_held(cs) == 0) {
        free(cs->hash);
        cs->hash = NULL;
        cs->hash_size = 0;
    }
}

static const VPLinkOps conns_ops = {
    .packet = conns_packet,
    .flush = batch_flush,
    .began = conns_began,
    .over = conns_over,
    .idle = conns_idle,
};

static void conns_init(VPConns *cs)
{
    static const VPLimits no_limits;

    cs->hash_seed = random64();
    cs->next_id = VP_CONN_FIRST;
    node_init(&cs->all);
    node_init(&cs->due);
    node_init(&cs->dead);
    node_init(&cs->drops);
    node_init(&cs->ending);
    node_init(&cs->accounts);
    account_init(&cs->rest, cs, &no_limits);
    sched_init(&cs->sched);
}

/* conns_end() - reset all; the peer isn't told */
static void conns_end(VPConns *cs)
{
    for (VPNode *n = cs->all.next; n != &cs->all; n = n->next) {
        conn_reset(container_of(n, VPConn, all), VP_RESET_DAEMON,
                   "the channel is removed");
    }
    conns_reap(cs, UINT_MAX);
    vp_timer_stop(&cs->sweep_timer);
    vp_timer_stop(&cs->end_timer);
    vp_timer_stop(&cs->idle_timer);
    free(cs->hash);
}

/* ======================================================================
 * forwards
 *
 * Where connections come from and go to: an oforward is a listener whose
 * clients go to a service of the peer's; an iforward is a service of ours, a
 * target that the peer's connections are dialled to.  What the peer opens
 * beyond the limits of VPConfig is refused here.  Of the connections whose
 * target has not answered each service has its share, so that one whose target
 * is dead doesn't keep the others from being opened.
 *
 * The clients of the oforward VP_ANY_SERVICE say themselves which service they
 * want, as those of Firecracker's vsock sockets do: "CONNECT SERVICE_ID", and
 * a newline.  Once the target has accepted they get "OK N", N being of no use
 * here, and then have the connection; where it hasn't, their socket is closed.
 *
 * In each session a side names its services to the other one, and again when
 * they change: in portions, so that nothing waits long behind them.  What the
 * peer names only serves to tell who runs this side: whether an oforward has
 * somebody to answer it is looked at once its list has stood for a second, so
 * a peer whose list goes back and forth costs neither time nor lines.
 * ====================================================================== */

/* Names that are kept of those which the peer says. */
#define VP_OFFER_MAX 4096
#define VP_OFFER_US SECOND
/* Oforwards that are said to be in vain, each time that this is looked at. */
#define VP_OFFER_LINES 4
/* Names that such an oforward's is compared with, to find the nearest. */
#define VP_OFFER_NEAR 512
/* Bytes of a portion in which services are named, at most. */
#define VP_TELL_LEN 1024
/* Bytes of the version of a program, at most. */
#define VP_PROGRAM_LEN 64

/* Why one is refused that is beyond VPLimits.max_conns. */
#define VP_FULL "there are as many connections as max= allows"

#define VP_CALL_WORD "CONNECT "
/* Bytes of a client's line that begins with it, and ends in a newline. */
#define VP_CALL_LEN (sizeof(VP_CALL_WORD) + VP_SERVICE_ID_LEN)
/* Time that a client has for its line. */
#define VP_CALL_US (10 * SECOND)

typedef char VPServiceId[VP_SERVICE_ID_LEN + 1];

/* What the peer says that it offers. */
typedef struct VPOffer {
    VPServiceId *names;
    size_t n;
    size_t cap;
    bool sorted;
    bool ended;     /* it has named all */
    bool cut;       /* some found no room */
    char program[VP_PROGRAM_LEN + 1]; /* "": not told */
} VPOffer;

typedef struct VPOForward {
    VPNode node;
    struct VPForwards *fwds;
    VPAccount *account; /* its forward's, or VPConns.rest */
    VPListener listener;
    bool missed;    /* that the peer doesn't offer it was said */
    bool heirs;     /* what it accepts needs no socket_setup() */
    char service_id[VP_SERVICE_ID_LEN + 1];
} VPOForward;

/* A client of VP_ANY_SERVICE that has not said yet what it wants. */
typedef struct VPCaller {
    VPNode node;
    VPOForward *oforward;
    uint64_t until;         /* us: its line has to be there by then */
    int fd;
    size_t len;             /* bytes of its line so far */
    char line[VP_CALL_LEN];
} VPCaller;

/* There may be thousands of services. */
#define VP_IFORWARD_CHAINS 64

typedef struct VPIForward {
    VPNode node;
    VPNode chained;      /* beside others of its hash */
    VPAccount *account;  /* its forward's, or VPConns.rest */
    VPTarget target;
    size_t ndials;   /* connections whose target has not answered yet */
    bool proxy;      /* the target gets headers of the PROXY protocol */
    VPUsedHandler *used; /* NULL: the addresses stay what they are */
    void *opaque;
    char service_id[VP_SERVICE_ID_LEN + 1];
} VPIForward;

/* A connection whose target has not answered yet. */
typedef struct VPDial {
    VPNode node;
    struct VPForwards *fwds;
    VPIForward *iforward;
    VPConn *conn;
    VPOrigin origin;
    VPDialer dialer;
} VPDial;

/* All forwards of a channel. */
typedef struct VPForwards {
    VPLoop *loop;
    VPLog *log;
    VPConns *conns;
    const VPConfig *config;
    VPNode oforwards;
    VPNode iforwards;
    VPNode chain[VP_IFORWARD_CHAINS]; /* iforwards by hash of their names */
    VPNode dials;
    size_t ndials;
    size_t niforwards;
    VPNode callers;         /* oldest first */
    size_t ncallers;
    VPTimer caller_timer;   /* the oldest of them is late */
    bool ending;       /* the daemon is: all that the peer opens is refused */
    double opens;      /* connections that the peer may open now */
    uint64_t opens_at; /* when that was so */

    VPNode *tell;      /* iforward that the peer is told next, or the end of
                          their ring; NULL: it knows all */
    bool tell_begins;  /* with the first of them */
    bool tell_program; /* its version is still to be told */
    VPOffer offer;
    VPTimer offer_timer; /* the offer is to be looked at */
} VPForwards;

/* ---- targets ---------------------------------------------------------- */

/* iforward_chain() - where that service is, if it is there; FNV-1a */
static VPNode *iforward_chain(VPForwards *fs, const char *service_id)
{
    uint32_t hash = 2166136261u;

    while (*service_id != '\0') {
        hash = (hash ^ (unsigned char)*service_id++) * 16777619u;
    }
    return &fs->chain[hash % VP_IFORWARD_CHAINS];
}

static VPIForward *iforward_find(VPForwards *fs, const char *service_id)
{
    VPNode *chain = iforward_chain(fs, service_id);

    for (VPNode *n = chain->next; n != chain; n = n->next) {
        VPIForward *f = container_of(n, VPIForward, chained);

        if (strcmp(f->service_id, service_id) == 0) {
            return f;
        }
    }
    return NULL;
}

/* dial_free() - also stops it */
static void dial_free(VPDial *d)
{
    vp_dialer_stop(&d->dialer);
    node_remove(&d->node);
    d->fwds->ndials--;
    d->iforward->ndials--;
    d->conn->dial = NULL;
    free(d);
}

/* dial_made() - VPDialer.made() */
static bool dial_made(void *opaque, int fd, const VPAddr *addr)
{
    VPDial *d = opaque;

    socket_setup(fd, addr);
    d->fwds->conns->link->task->work += VP_WORK_CONNECT;
    return !vp_fd_is_kept(d->fwds->loop, fd);
}

/* dial_log() - VPDialer.failed() */
static void dial_log(void *opaque, const VPAddr *addr, int err)
{
    VPDial *d = opaque;
    char name[VP_ADDR_STR_LEN];

    if (d->iforward->target.addrs == NULL) {
        log_provoked(d->fwds->log, VP_LOG_WARN, "%s: cannot connect: no "
                     "address is known", d->conn->service_id);
    } else if (addr != NULL) {
        log_provoked(d->fwds->log, VP_LOG_INFO, "%s: cannot connect to %s: %s",
                     d->conn->service_id,
                     vp_addr_str(addr, name, sizeof(name)), strerror(err));
    } else {
        log_provoked(d->fwds->log, VP_LOG_WARN, "%s: cannot connect: %s",
                     d->conn->service_id, strerror(err));
    }
}

/* dial_over() - VPDialer.done() */
static void dial_over(void *opaque, int fd, int err)
{
    VPDial *d = opaque;
    VPIForward *f = d->iforward;
    VPOrigin origin = d->origin;
    VPConn *c = d->conn;

    dial_free(d);
    if (conn_over(c)) { /* it was about to be reaped */
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    if (fd >= 0) {
        conn_connected(c, fd, &origin);
        return;
    }
    conn_refuse(c, reason_from_errno(err));
    if (f->used != NULL && !starved(err)) {
        f->used(f->opaque, true);
    }
}

/* dial_start() - connect @c to @f, or refuse it */
static void dial_start(VPForwards *fs, VPConn *c, VPIForward *f,
                       const VPOrigin *origin)
{
    VPDial *d = calloc(1, sizeof(*d));

    if (d == NULL || (f->proxy && !conn_introduce(c, origin))) {
        free(d);
        conn_refuse(c, VP_REASON_RESOURCES);
        return;
    }
    d->fwds = fs;
    d->conn = c;
    d->origin = *origin;
    d->iforward = f;
    d->dialer.made = dial_made;
    d->dialer.failed = dial_log;
    d->dialer.done = dial_over;
    d->dialer.opaque = d;
    node_append(&fs->dials, &d->node);
    fs->ndials++;
    f->ndials++;
    c->dial = d;
    if (f->used != NULL) {
        f->used(f->opaque, false);
    }
    vp_dialer_start(&d->dialer, fs->loop, &f->target);
}

/* forwards_too_fast() - a token bucket that holds a second's worth */
static bool forwards_too_fast(VPForwards *fs)
{
    uint64_t now = fs->loop->now;
    double most = fs->config->max_opens;

    fs->opens += (double)(now - fs->opens_at) * most / (double)SECOND;
    fs->opens = MIN(fs->opens, most);
    fs->opens_at = now;
    if (fs->opens < 1) {
        return true;
    }
    fs->opens--;
    return false;
}

/* forwards_half_open() - do too many wait for their targets, or for @f's? */
static bool forwards_half_open(const VPForwards *fs, const VPIForward *f)
{
    size_t most = fs->config->max_half_open;

    return fs->ndials >= most ||
           (f != NULL &&
            !share_allows(f->ndials, most, fs->niforwards, fs->ndials));
}

/* forwards_wanted() - VPConnOps.wanted() */
static void forwards_wanted(void *up, VPConn *c, const VPOrigin *origin)
{
    VPForwards *fs = up;
    VPIForward *f = iforward_find(fs, c->service_id);
    VPAccount *account = f != NULL ? f->account : &fs->conns->rest;
    bool full = !fs->ending && account_full(account);
    /* what HELLO said; a connection that is over there may drain here */
    size_t most = fs->conns->link->hello.max_conns;
    VPReason reason;

    conn_enter(c, account);
    if (fs->ending) {
        reason = VP_REASON_ENDING;
    } else if (forwards_too_fast(fs) || forwards_half_open(fs, f) || full ||
               conns_count(fs->conns, false, LIFE_OPEN, LIFE_ENDING) > most) {
        reason = VP_REASON_LIMIT;
    } else if (f == NULL) {
        reason = VP_REASON_UNKNOWN_SERVICE;
    } else if (!loop_fds_shared(fs->loop, conns_fds(fs->conns) - 1)) {
        reason = VP_REASON_RESOURCES;
    } else {
        dial_start(fs, c, f, origin);
        return;
    }
    log_provoked(fs->log, reason == VP_REASON_UNKNOWN_SERVICE ||
                 reason == VP_REASON_ENDING ? VP_LOG_INFO : VP_LOG_WARN,
                 "%s: connection refused: %s", c->service_id,
                 full ? VP_FULL : refusal_str(reason));
    conn_refuse(c, reason);
}

/* forwards_unwanted() - VPConnOps.unwanted() */
static void forwards_unwanted(void *up, VPConn *c)
{
    (void)up;
    dial_free(c->dial);
}

/* forwards_tell_anew() - the peer doesn't know what is offered here now */
static void forwards_tell_anew(VPForwards *fs)
{
    fs->tell = fs->config->program != NULL ? fs->iforwards.next : NULL;
    fs->tell_begins = true;
}

static int iforward_set(VPForwards *fs, const char *service_id,
                        const VPAddr *addrs, size_t naddrs)
{
    VPIForward *f = iforward_find(fs, service_id);
    int rc;

    if (f != NULL) {
        return vp_target_set(&f->target, fs->loop, addrs, naddrs);
    }
    f = calloc(1, sizeof(*f));
    if (f == NULL) {
        return -ENOMEM;
    }
    rc = vp_target_set(&f->target, fs->loop, addrs, naddrs);
    if (rc < 0) {
        free(f);
        return rc;
    }
    snprintf(f->service_id, sizeof(f->service_id), "%s", service_id);
    f->account = &fs->conns->rest;
    node_append(&fs->iforwards, &f->node);
    node_append(iforward_chain(fs, service_id), &f->chained);
    forwards_tell_anew(fs);
    fs->niforwards++;
    return 0;
}

/* iforward_free() - those that it is dialled for are refused */
static void iforward_free(VPForwards *fs, VPIForward *f)
{
    VPNode *n = fs->dials.next;

    while (n != &fs->dials) {
        VPDial *d = container_of(n, VPDial, node);

        n = n->next;
        if (d->iforward == f && conn_over(d->conn)) {
            dial_free(d);
        } else if (d->iforward == f) {
            conn_refuse(d->conn, fs->ending ? VP_REASON_ENDING
                                            : VP_REASON_UNKNOWN_SERVICE);
        }
    }
    node_remove(&f->node);
    node_remove(&f->chained);
    forwards_tell_anew(fs);
    fs->niforwards--;
    vp_target_clear(&f->target);
    free(f);
}

/* ---- what is offered -------------------------------------------------- */

/* tell_services() - as many as fit into @msg; returns its length */
static size_t tell_services(const VPForwards *fs, uint8_t *msg, size_t room,
                            VPNode **next)
{
    VPNode *n = fs->tell;
    size_t len = 2;

    for (; n != &fs->iforwards; n = n->next) {
        const VPIForward *f = container_of(n, VPIForward, node);
        size_t id_len = strlen(f->service_id);

        if (len + 1 + id_len > room) {
            break;
        }
        msg[len] = (uint8_t)id_len;
        memcpy(msg + len + 1, f->service_id, id_len);
        len += 1 + id_len;
    }
    *next = n == &fs->iforwards ? NULL : n;
    msg[0] = VP_MSG_SERVICES;
    msg[1] = (uint8_t)((fs->tell_begins ? VP_SERVICES_BEGIN : 0) |
                       (*next == NULL ? VP_SERVICES_END : 0));
    return len;
}

/* forwards_untold() - is there something that the peer doesn't know? */
static inline bool forwards_untold(const VPForwards *fs)
{
    return fs->tell_program || fs->tell != NULL;
}

/*
 * forwards_tell() - tell the peer what it doesn't know, one portion
 *
 * Returns true if more could be told now.
 */
static bool forwards_tell(VPForwards *fs)
{
    VPLink *l = fs->conns->link;
    size_t room = MIN(l->flow.pkt_len - VP_PKT_HDR_LEN, VP_TELL_LEN);
    uint8_t msg[VP_TELL_LEN];
    VPNode *next;
    size_t len;

    if (link_room(l) == 0) {
        return false;
    }
    if (fs->tell_program) {
        len = MIN(strlen(fs->config->program), VP_PROGRAM_LEN);
        msg[0] = VP_MSG_PROGRAM;
        memcpy(msg + 1, fs->config->program, len);
        fs->tell_program = !conns_send_control(fs->conns, 0, 0, msg, 1 + len);
        return !fs->tell_program;
    }
    len = tell_services(fs, msg, room, &next);
    if (!conns_send_control(fs->conns, 0, 0, msg, len)) {
        return false;
    }
    fs->tell = next;
    fs->tell_begins = false;
    return next != NULL;
}

static int service_cmp(const void *a, const void *b)
{
    return strcmp(a, b);
}

/* offer_sort() - and leave out what was named twice */
static void offer_sort(VPForwards *fs)
{
    VPOffer *o = &fs->offer;
    size_t n = 0;

    if (o->sorted) {
        return;
    }
    fs->conns->link->task->work += (unsigned)o->n * VP_WORK_SORTED;
    if (o->n > 0) {
        qsort(o->names, o->n, sizeof(*o->names), service_cmp);
    }
    for (size_t i = 0; i < o->n; i++) {
        if (n == 0 || strcmp(o->names[n - 1], o->names[i]) != 0) {
            memmove(o->names[n++], o->names[i], sizeof(*o->names));
        }
    }
    o->n = n;
    o->sorted = true;
}

static VPOffered offer_has(VPForwards *fs, const char *service_id)
{
    const VPOffer *o = &fs->offer;

    if (strcmp(service_id, VP_ANY_SERVICE) == 0) {
        return VP_OFFER_UNKNOWN; /* each client says which one it wants */
    }
    offer_sort(fs);
    if (o->n > 0 && bsearch(service_id, o->names, o->n, sizeof(*o->names),
                            service_cmp) != NULL) {
        return VP_OFFERED;
    }
    return o->ended && !o->cut ? VP_NOT_OFFERED : VP_OFFER_UNKNOWN;
}

/*
 * name_distance() - how many letters were mistaken, if @b was meant with @a
 *
 * One that is wrong, missing or too many, or two that changed places (optimal
 * string alignment).
 */
static size_t name_distance(const char *a, const char *b)
{
    uint8_t rows[3][VP_SERVICE_ID_LEN + 1];
    uint8_t *before = rows[0], *last = rows[1], *row = rows[2], *spare;
    size_t len = strlen(b);

    for (size_t j = 0; j <= len; j++) {
        last[j] = (uint8_t)j;
    }
    for (size_t i = 1; a[i - 1] != '\0'; i++) {
        row[0] = (uint8_t)i;
        for (size_t j = 1; j <= len; j++) {
            unsigned best = last[j - 1] + (a[i - 1] != b[j - 1] ? 1u : 0u);

            best = MIN(best, last[j] + 1u);
            best = MIN(best, row[j - 1] + 1u);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] &&
                a[i - 2] == b[j - 1]) {
                best = MIN(best, before[j - 2] + 1u);
            }
            row[j] = (uint8_t)best;
        }
        spare = before;
        before = last;
        last = row;
        row = spare;
    }
    return last[len];
}

/* offer_nearest() - what may have been meant with @service_id; NULL: none */
static const char *offer_nearest(const VPOffer *o, const char *service_id)
{
    size_t len = strlen(service_id), best = (len + 1) / 3 + 1;
    const char *nearest = NULL;
    unsigned looks = 0;

    for (size_t i = 0; i < o->n && looks < VP_OFFER_NEAR; i++) {
        size_t other = strlen(o->names[i]), d;

        if (MAX(len, other) - MIN(len, other) >= best) {
            continue;
        }
        looks++;
        d = name_distance(service_id, o->names[i]);
        if (d < best) {
            best = d;
            nearest = o->names[i];
        }
    }
    return nearest;
}

/* offer_timer() - have all oforwards somebody to answer them? */
static void offer_timer(void *opaque)
{
    VPForwards *fs = opaque;
    const char *nearest;
    unsigned lines = 0;

    for (VPNode *n = fs->oforwards.next; n != &fs->oforwards; n = n->next) {
        VPOForward *f = container_of(n, VPOForward, node);
        VPOffered offered = offer_has(fs, f->service_id);

        if (offered == VP_OFFER_UNKNOWN ||
            f->missed == (offered == VP_NOT_OFFERED)) {
            continue;
        }
        f->missed = offered == VP_NOT_OFFERED;
        if (++lines > VP_OFFER_LINES) {
            continue;
        }
        if (!f->missed) {
            log_provoked(fs->log, VP_LOG_INFO, "oforward %s: the other side "
                         "offers it now", f->service_id);
            continue;
        }
        nearest = offer_nearest(&fs->offer, f->service_id);
        log_provoked(fs->log, VP_LOG_WARN, "oforward %s: the other side offers "
                     "no such service%s%s%s", f->service_id,
                     nearest != NULL ? "; is '" : "",
                     nearest != NULL ? nearest : "",
                     nearest != NULL ? "' meant?" : "");
    }
    if (lines > VP_OFFER_LINES) {
        log_provoked(fs->log, VP_LOG_WARN, "so it is with %u more oforwards",
                     lines - VP_OFFER_LINES);
    }
}

/* offer_look_later() - there may be something to be said of the oforwards */
static void offer_look_later(VPForwards *fs)
{
    if (fs->offer.ended) {
        vp_timer_start(fs->loop, &fs->offer_timer, VP_OFFER_US, offer_timer,
                       fs);
    }
}

/* offer_add() - a name more, if there is room for it */
static void offer_add(VPOffer *o, const uint8_t *id, size_t len)
{
    if (o->n == o->cap && o->cap < VP_OFFER_MAX) {
        size_t cap = o->cap == 0 ? 16 : 2 * o->cap;
        VPServiceId *names = realloc(o->names, cap * sizeof(*names));

        if (names != NULL) {
            o->names = names;
            o->cap = cap;
        }
    }
    if (o->n == o->cap) {
        o->cut = true;
        return;
    }
    memcpy(o->names[o->n], id, len);
    o->names[o->n++][len] = '\0';
    o->sorted = false;
}

/* offer_forget() - nothing is known of what the peer offers */
static void offer_forget(VPOffer *o)
{
    free(o->names);
    o->names = NULL;
    o->n = o->cap = 0;
    o->sorted = o->ended = o->cut = false;
}

/* told_services() - the peer names services; NULL, or what is wrong with it */
static const char *told_services(VPForwards *fs, const uint8_t *msg, size_t len)
{
    VPOffer *o = &fs->offer;
    size_t at = 2;

    if (len < 2) {
        return "malformed SERVICES";
    }
    if (msg[1] & VP_SERVICES_BEGIN) {
        offer_forget(o);
    }
    for (; at < len; at += 1u + msg[at]) {
        if (msg[at] >= len - at ||
            !vp_service_id_ok((const char *)msg + at + 1, msg[at])) {
            return "malformed SERVICES";
        }
        offer_add(o, msg + at + 1, msg[at]);
    }
    fs->conns->link->task->work += (unsigned)len * VP_WORK_TOLD;
    o->ended = msg[1] & VP_SERVICES_END;
    if (o->ended) {
        conns_tell(fs->conns, (VPEvent){ .type = VP_EVENT_SERVICES,
                                         .services = o->n });
    }
    offer_look_later(fs);
    return NULL;
}

/* forwards_told() - VPConnOps.told() */
static const char *forwards_told(void *up, const uint8_t *msg, size_t len)
{
    VPForwards *fs = up;

    switch (msg[0]) {
    case VP_MSG_SERVICES:
        return told_services(fs, msg, len);
    case VP_MSG_PROGRAM:
        if (len - 1 > VP_PROGRAM_LEN) {
            return "malformed PROGRAM";
        }
        for (size_t i = 1; i < len; i++) {
            if (msg[i] < ' ' || msg[i] > '~') {
                return "malformed PROGRAM";
            }
        }
        memcpy(fs->offer.program, msg + 1, len - 1);
        fs->offer.program[len - 1] = '\0';
        return NULL;
    default:
        return NULL; /* of a later version */
    }
}

/* forwards_over() - VPConnOps.over() */
static void forwards_over(void *up)
{
    VPForwards *fs = up;

    offer_forget(&fs->offer);
    fs->offer.program[0] = '\0';
    vp_timer_stop(&fs->offer_timer);
    fs->tell_program = fs->config->program != NULL;
    forwards_tell_anew(fs);
}

static const VPConnOps forwards_ops = {
    .wanted = forwards_wanted,
    .unwanted = forwards_unwanted,
    .told = forwards_told,
    .over = forwards_over,
};

/* ---- listeners -------------------------------------------------------- */

/* oforward_refuse() - @fd gets no connection; @why: for the log */
static void oforward_refuse(const VPOForward *f, int fd, VPReason reason,
                            const char *why)
{
    conns_log_refused(f->fwds->conns, VP_LOG_WARN, f->service_id, fd, why);
    account_refused(f->account, reason);
    close(fd);
}

/* oforward_starved() - @fd gets no connection, for want of memory or more */
static void oforward_starved(const VPOForward *f, int fd)
{
    oforward_refuse(f, fd, VP_REASON_RESOURCES,
                    reason_str(VP_REASON_RESOURCES));
}

/* oforward_open() - open a connection to @service_id for @fd; NULL: refused */
static VPConn *oforward_open(VPOForward *f, int fd, const char *service_id)
{
    VPConns *cs = f->fwds->conns;
    VPConn *c;

    while (conn_find(cs, cs->next_id, true) != NULL) {
        cs->next_id++;
    }
    c = conn_new(cs, cs->next_id++, true, fd, service_id);
    if (c == NULL) {
        oforward_starved(f, fd);
        return NULL;
    }
    conn_enter(c, f->account);
    conn_watch_idle(c);
    conn_log_begin(c, NULL);
    c->tx_limit = link_has_session(cs->link) ? cs->link->peer_window : 0;
    conn_set_due(c, DUE_INIT);
    conn_interest(c);
    return c;
}

/* caller_free() - returns its socket, which is the caller's from here on */
static int caller_free(VPCaller *k)
{
    VPForwards *fs = k->oforward->fwds;
    int fd = k->fd;

    vp_unwatch(fs->loop, fd);
    node_remove(&k->node);
    k->oforward->account->open--;
    fs->ncallers--;
    free(k);
    return fd;
}

/* caller_hang_up() - @why: what was wrong with its line */
static void caller_hang_up(VPCaller *k, const char *why)
{
    VPConns *cs = k->oforward->fwds->conns;

    conns_log_refused(cs, VP_LOG_INFO, k->oforward->service_id, k->fd, why);
    account_count_refused(k->oforward->account, VP_REFUSED_CLIENT);
    close(caller_free(k));
}

/* caller_late() - hang up on those whose time is over */
static void caller_late(void *opaque)
{
    VPForwards *fs = opaque;

    while (node_linked(&fs->callers)) {
        VPCaller *k = container_of(fs->callers.next, VPCaller, node);

        if (k->until > fs->loop->now) {
            vp_timer_start(fs->loop, &fs->caller_timer,
                           k->until - fs->loop->now, caller_late, fs);
            return;
        }
        caller_hang_up(k, "no line \"CONNECT SERVICE_ID\" within 10 s");
    }
}

/* caller_connect() - the line of @k is there, with its newline */
static void caller_connect(VPCaller *k)
{
    static const size_t word = sizeof(VP_CALL_WORD) - 1;
    VPOForward *f = k->oforward;
    VPServiceId id;
    size_t len = k->len - 1;
    VPConn *c;

    if (len <= word || memcmp(k->line, VP_CALL_WORD, word) != 0 ||
        !vp_service_id_ok(k->line + word, len - word)) {
        caller_hang_up(k, "not a line \"CONNECT SERVICE_ID\"");
        return;
    }
    memcpy(id, k->line + word, len - word);
    id[len - word] = '\0';
    c = oforward_open(f, caller_free(k), id);
    if (c != NULL) {
        c->greets = true;
    }
}

/* caller_ready() - what stands behind the newline is the connection's */
static void caller_ready(void *opaque, int fd, int events)
{
    VPCaller *k = opaque;
    char *at = k->line + k->len, *end;
    ssize_t n = recv(fd, at, sizeof(k->line) - k->len, MSG_PEEK);

    (void)events;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n > 0) {
        end = memchr(at, '\n', (size_t)n);
        n = recv(fd, at, end != NULL ? (size_t)(end + 1 - at) : (size_t)n, 0);
    }
    if (n <= 0) {
        caller_hang_up(k, "it ends before its first newline");
        return;
    }
    k->len += (size_t)n;
    if (k->line[k->len - 1] == '\n') {
        caller_connect(k);
    } else if (k->len == sizeof(k->line)) {
        caller_hang_up(k, "its first line is too long");
    }
}

/* caller_new() - @fd is a client of VP_ANY_SERVICE */
static void caller_new(VPOForward *f, int fd)
{
    VPForwards *fs = f->fwds;
    VPCaller *k = calloc(1, sizeof(*k));

    if (k == NULL || vp_watch(fs->loop, fd, caller_ready, k) < 0) {
        free(k);
        oforward_starved(f, fd);
        return;
    }
    k->oforward = f;
    k->fd = fd;
    node_append(&fs->callers, &k->node);
    f->account->open++;
    fs->ncallers++;
    vp_watch_set(fs->loop, fd, VP_READ);
    k->until = fs->loop->now + VP_CALL_US;
    if (!timer_running(&fs->caller_timer)) {
        vp_timer_start(fs->loop, &fs->caller_timer, VP_CALL_US, caller_late,
                       fs);
    }
}

/* oforward_accepted() - VPListener.accepted() */
static void oforward_accepted(void *opaque, int fd, const VPAddr *client)
{
    VPOForward *f = opaque;
    VPForwards *fs = f->fwds;
    VPConns *cs = fs->conns;

    if (!f->heirs) {
        socket_setup(fd, client);
    }
    conns_reap(cs, 0); /* lest he is refused for want of what is to be freed */
    if (conns_count(cs, true, LIFE_NEW, LIFE_FREE) + fs->ncallers >=
        fs->config->max_conns) {
        oforward_refuse(f, fd, VP_REASON_LIMIT, reason_str(VP_REASON_LIMIT));
    } else if (account_full(f->account)) {
        oforward_refuse(f, fd, VP_REASON_LIMIT, VP_FULL);
    } else if (vp_fd_is_kept(fs->loop, fd) ||
               !loop_fds_shared(fs->loop, conns_fds(cs) + fs->ncallers)) {
        oforward_starved(f, fd);
    } else if (strcmp(f->service_id, VP_ANY_SERVICE) == 0) {
        caller_new(f, fd);
    } else {
        oforward_open(f, fd, f->service_id);
    }
}

static int oforward_add(VPForwards *fs, int channel, int fd,
                        const char *service_id)
{
    VPOForward *f = calloc(1, sizeof(*f));
    int rc;

    if (f == NULL) {
        close(fd);
        return -ENOMEM;
    }
    f->fwds = fs;
    f->account = &fs->conns->rest;
    snprintf(f->service_id, sizeof(f->service_id), "%s", service_id);
    f->listener.channel = channel;
    f->listener.name = f->service_id;
    f->listener.accepted = oforward_accepted;
    f->listener.opaque = f;
    f->heirs = socket_setup_heirs(fd);
    rc = vp_listener_start(&f->listener, fs->loop, fd);
    if (rc < 0) {
        free(f);
        return rc;
    }
    node_append(&fs->oforwards, &f->node);
    offer_look_later(fs);
    return 0;
}

/* oforward_find() - the one that listens on @fd; NULL: none does */
static VPOForward *oforward_find(VPForwards *fs, int fd)
{
    for (VPNode *n = fs->oforwards.next; n != &fs->oforwards; n = n->next) {
        VPOForward *f = container_of(n, VPOForward, node);

        if (f->listener.fd == fd) {
            return f;
        }
    }
    return NULL;
}

static void oforward_free(VPOForward *f)
{
    VPNode *n = f->fwds->callers.next;

    while (n != &f->fwds->callers) {
        VPCaller *k = container_of(n, VPCaller, node);

        n = n->next;
        if (k->oforward == f) {
            close(caller_free(k));
        }
    }
    vp_listener_stop(&f->listener);
    node_remove(&f->node);
    free(f);
}

/* ---- both ------------------------------------------------------------- */

static void forwards_init(VPForwards *fs)
{
    fs->opens_at = fs->loop->now;
    fs->opens = fs->config->max_opens;
    node_init(&fs->oforwards);
    node_init(&fs->iforwards);
    for (int i = 0; i < VP_IFORWARD_CHAINS; i++) {
        node_init(&fs->chain[i]);
    }
    node_init(&fs->dials);
    node_init(&fs->callers);
    fs->tell_program = fs->config->program != NULL;
    forwards_tell_anew(fs);
}

static void forwards_end(VPForwards *fs)
{
    while (node_linked(&fs->oforwards)) {
        oforward_free(container_of(fs->oforwards.next, VPOForward, node));
    }
    while (node_linked(&fs->iforwards)) {
        iforward_free(fs, container_of(fs->iforwards.next, VPIForward, node));
    }
    offer_forget(&fs->offer);
    vp_timer_stop(&fs->offer_timer);
    vp_timer_stop(&fs->caller_timer);
}

/* ======================================================================
 * driver
 *
 * One channel with all that is forwarded over it.  What comes through the
 * channel is written to local sockets as it is read.  What goes the other way
 * waits for the end of the pass: a local socket's handler only puts its
 * connection on a list, and driver_run() reads the socket, hands packets to the
 * channel, and frees the connections that are over.
 *
 * Grace: while there is no channel, connections wait, for config.grace seconds
 * at most; see grace_runs().  Those of a session wait while there is no
 * descriptor.  Their time stands still while there is one, because a VM may be
 * paused behind it, which is silent.  But the descriptor may also be that of a
 * relay whose far end is gone, and which closes again at once, for ever: so the
 * time used up is given back only when the peer is heard or the descriptor has
 * been there for long.  Those that came without a session wait for one, whether
 * there is a descriptor or not.
 *
 * A further peer on a listening channel (a candidate) gets a HELLO of its
 * own, and takes the present one's place only after it has echoed that; see
 * vp_offer().  A connection that we made and that has become stale is replaced
 * in the same way, from the other side: the program makes another one, which is
 * a candidate until the peer says hello through it.
 *
 * Memory of one driver, at most:
 *
 *   len + len / VP_STORE_PKT * sizeof(VPSent)           send store
 *   + VP_RX_LEN_MAX                                     receive buffer
 *   + VP_WINDOW_BUDGET(len)                             grown windows
 *   + VP_OFFER_MAX * sizeof(VPServiceId)                the peer's services
 *   + max_conns * (3 * sizeof(VPConn) + sizeof(VPDial)
 *                  + 8 * sizeof(VPConn *)
 *                  + 2 * VP_WINDOW_INIT
 *                  + VP_PROXY_LEN_MAX)                  connections
 *
 * since max_conns bounds those that come from here and those that the peer
 * opens, each; beyond its own the peer gets refusals, of which as many again
 * may wait to be sent (the third VPConn; the pointers are the hash table,
 * whose size is a power of two).  A client that hasn't said yet what it wants
 * counts as a connection.  See vp_max_conns().  When nothing has moved for a
 * while all but the connections and the peer's services goes back to the
 * system.
 *
 * The store's "len" is VP_STORE_LEN, and as often twice that as the rest of
 * VPConfig.memory is enough for, for the sake of long ways; while it becomes
 * so long half of it is there twice.  See driver_reach().
 * ====================================================================== */

/* Reads and writes in a pass: other channels have their turn after that. */
#define VP_RUN_ROUNDS 4
/* Candidates at a time, while there are descriptors for more than one. */
#define VP_CANDIDATES 4
/* Time for a candidate's hello. */
#define VP_CANDIDATE_US (5 * SECOND)
/* How often the present peer is looked at while it is asked. */
#define VP_CANDIDATE_STEP (50 * MS)

/* Of so many connections is asked what the kernel holds; each is a call. */
#define VP_HELD_ASKED 1024

/* What a driver needs without connections, and for each of them. */
#define VP_MEMORY_STORE(len) ((size_t)(len) + \
                              (len) / VP_STORE_PKT * sizeof(VPSent))
#define VP_MEMORY_FIXED (VP_MEMORY_STORE(VP_STORE_LEN) + VP_RX_LEN_MAX + \
                         VP_WINDOW_BUDGET(VP_STORE_LEN) + \
                         VP_OFFER_MAX * sizeof(VPServiceId))
#define VP_MEMORY_CONN (3 * sizeof(VPConn) + sizeof(VPDial) + \
                        8 * sizeof(VPConn *) + 2 * VP_WINDOW_INIT + \
                        VP_PROXY_LEN_MAX)

/* A further connection of a channel that is in use; see vp_offer(). */
typedef struct VPCandidate {
    VPDriver *drv;
    unsigned role;   /* VP_HELLO_LISTENER, or VP_HELLO_CONNECTOR */
    int fd;          /* -1: none */
    uint64_t number; /* it is the channel's candidate of this number */
    uint64_t token;  /* that it has to echo */
    bool knows;      /* it said a HELLO that one with the key might have said */
    bool proved;     /* it echoed "token", and the present peer is asked */
    size_t len;      /* bytes in buf */
    uint8_t buf[VP_PKT_HDR_LEN + VP_HELLO_LEN_MAX];
    VPTimer timer;
} VPCandidate;

struct VPDriver {
    VPLoop *loop;
    VPTask task;
    VPLog log;       /* of the channel itself */
    VPLog conn_log;  /* of its connections: however many lines these make, the
                        channel's own are not left out */
    VPConfig config;

    VPLink link;
    VPConns conns;
    VPForwards forwards;
    VPCandidate candidates[VP_CANDIDATES];
    uint64_t offers;     /* further peers that have come so far */

    VPTimer grace_timer;  /* runs while grace_runs() */
    uint64_t down_at;     /* time when grace began, less grace_used then */
    uint64_t grace_used;  /* part of --grace used up by earlier outages, us */
};

/* ---- grace ------------------------------------------------------------ */

/* grace_runs() - does the connections' time run, from state alone */
static bool grace_runs(const VPDriver *drv)
{
    const VPLink *l = &drv->link;

    if (l->state == LINK_UP) {
        return false;
    }
    if (link_has_session(l)) {
        return !link_has_fd(l) || l->state == LINK_AWAY;
    }
    return drv->conns.count[true][LIFE_NEW] > 0;
}

/* grace_expired() - connections without a channel have waited long enough */
static void grace_expired(void *opaque)
{
    VPDriver *drv = opaque;
    uint64_t grace = drv->config.grace * SECOND;
    uint64_t now = drv->loop->now;
    char why[64];

    if (!grace_runs(drv)) {
        drv->grace_used = grace; /* but the channel came back just now */
        return;
    }
    snprintf(why, sizeof(why),
             grace > 0 ? "no channel for %u s" : "no session, and --grace %u",
             drv->config.grace);
    if (link_has_session(&drv->link)) {
        log_event(&drv->log, VP_LOG_WARN, (VPEvent){ .type = VP_EVENT_OVER },
                  "%s: session ended", why);
        link_forget(&drv->link);
    }
    for (VPNode *n = drv->conns.all.next; n != &drv->conns.all; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);
        uint64_t end = MAX(c->born, drv->down_at) + grace;

        if (c->life != LIFE_NEW) {
            continue;
        }
        if (end > now) {
            vp_timer_start(drv->loop, &drv->grace_timer, end - now,
                           grace_expired, drv);
            return;
        }
        log_provoked(&drv->conn_log, VP_LOG_INFO, "%s: connection reset: %s",
                     c->service_id, why);
        conn_abort(c, VP_RESET_DAEMON, VP_REASON_TIMEOUT, why);
    }
}

/* driver_grace() - have the timer run while the connections' time does */
static void driver_grace(VPDriver *drv)
{
    uint64_t grace = drv->config.grace * SECOND;
    bool running = grace_runs(drv);

    if (!running && timer_running(&drv->grace_timer)) {
        drv->grace_used = drv->loop->now - drv->down_at;
        vp_timer_stop(&drv->grace_timer);
    }
    if (drv->link.state == LINK_UP || !link_has_session(&drv->link) ||
        link_promising(&drv->link)) {
        drv->grace_used = 0;
    }
    if (running && !timer_running(&drv->grace_timer)) {
        drv->grace_used = MIN(drv->grace_used, grace);
        drv->down_at = drv->loop->now - drv->grace_used;
        vp_timer_start(drv->loop, &drv->grace_timer, grace - drv->grace_used,
                       grace_expired, drv);
    }
}

/* ---- run and attach --------------------------------------------------- */

/*
 * driver_run() - after the handlers of a pass: move what can be moved
 *
 * Returns true if there is more to do without waiting for anything.
 */
static bool driver_run(void *opaque)
{
    VPDriver *drv = opaque;
    VPLink *l = &drv->link;
    unsigned most;
    bool more = false, rest = false; /* left for the next pass */

    if (link_goes_on(l)) {
        link_process(l);
    }
    most = drv->task.work + loop_portion(l->loop);
    for (int i = 0; i < VP_RUN_ROUNDS; i++) {
        more = link_may_send(l) && conns_fill(&drv->conns, most);
        more |= forwards_untold(&drv->forwards) && link_may_send(l) &&
                forwards_tell(&drv->forwards);
        link_flush(l);
        if (!more || drv->task.work >= most ||
            flow_mixed(&l->flow, l->loop->now)) {
            break;
        }
    }
    if (!link_rests(l)) {
        rest = conns_drop(&drv->conns, most);
        rest |= conns_reap(&drv->conns, most - MIN(drv->task.work, most));
    }
    drv->conns.closed = 0;
    driver_grace(drv);
    link_owes(l, task_settle(&drv->task));
    return link_goes_on(l) || (more && link_may_send(l)) ||
           (rest && !link_rests(l));
}

/* memory_reach() - bytes at most, with a store that becomes @len bytes long */
static size_t memory_reach(const VPConfig *config, uint32_t len)
{
    size_t n = VP_MEMORY_FIXED + config->max_conns * VP_MEMORY_CONN;

    if (len > VP_STORE_LEN) {
        n += VP_MEMORY_STORE(len) + VP_MEMORY_STORE(len / 2) -
             VP_MEMORY_STORE(VP_STORE_LEN);
        n += VP_WINDOW_BUDGET(len) - VP_WINDOW_BUDGET(VP_STORE_LEN);
    }
    return n;
}

/* driver_reach() - how long the store may become */
static uint32_t driver_reach(const VPConfig *config)
{
    uint32_t len = VP_STORE_LEN;

    while (len < VP_STORE_LEN_MAX &&
           memory_reach(config, 2 * len) <= config->memory) {
        len *= 2;
    }
    return len;
}

/* driver_configure() - have the parts use what drv->config says */
static void driver_configure(VPDriver *drv)
{
    uint32_t len = driver_reach(&drv->config);

    drv->link.key = drv->config.key.len > 0 ? &drv->config.key : NULL;
    drv->link.max_conns = drv->config.max_conns;
    drv->link.store.len_max = len;
    drv->conns.window_budget = VP_WINDOW_BUDGET(len);
}

VPDriver *vp_new(VPLoop *loop, int channel_id, const VPConfig *config,
                 VPLostHandler *lost, void *opaque)
{
    VPDriver *drv = calloc(1, sizeof(*drv));

    if (drv == NULL) {
        return NULL;
    }
    drv->loop = loop;
    drv->config = *config;
    for (int i = 0; i < VP_CANDIDATES; i++) {
        drv->candidates[i].fd = -1;
        drv->candidates[i].drv = drv;
    }
    drv->log.loop = loop;
    drv->log.channel = channel_id;
    drv->conn_log = drv->log;

    drv->link.loop = drv->conns.loop = drv->forwards.loop = loop;
    drv->link.task = &drv->task;
    drv->link.log = &drv->log;
    drv->conns.log = drv->forwards.log = &drv->conn_log;
    drv->link.ops = &conns_ops;
    drv->link.up = &drv->conns;
    drv->link.lost = lost;
    drv->link.lost_opaque = opaque;
    drv->conns.link = &drv->link;
    drv->conns.ops = &forwards_ops;
    drv->conns.up = &drv->forwards;
    drv->forwards.conns = &drv->conns;
    drv->forwards.config = &drv->config;
    driver_configure(drv);
    link_init(&drv->link);
    conns_init(&drv->conns);
    forwards_init(&drv->forwards);
    loop_add_task(loop, &drv->task, driver_run, drv);
    return drv;
}

void vp_set_stale(VPDriver *drv, VPStaleHandler *stale)
{
    drv->link.stale = stale;
}

void vp_set_config(VPDriver *drv, const VPConfig *config)
{
    drv->config = *config;
    driver_configure(drv);
}

int vp_attach(VPDriver *drv, int rfd, int wfd, VPChannelKind kind,
              VPChannelRole role)
{
    return link_attach(&drv->link, rfd, wfd, kind, role);
}

int vp_set_oforward(VPDriver *drv, int fd, const char *service_id)
{
    return oforward_add(&drv->forwards, drv->log.channel, fd, service_id);
}

int vp_set_iforward(VPDriver *drv, const char *service_id,
                    const VPAddr *addrs, size_t naddrs)
{
    return iforward_set(&drv->forwards, service_id, addrs, naddrs);
}

void vp_iforward_used(VPDriver *drv, const char *service_id,
                      VPUsedHandler *used, void *opaque)
{
    VPIForward *f = iforward_find(&drv->forwards, service_id);

    f->used = used;
    f->opaque = opaque;
}

void vp_iforward_proxy(VPDriver *drv, const char *service_id)
{
    iforward_find(&drv->forwards, service_id)->proxy = true;
}

VPAccount *vp_account_new(VPDriver *drv, const VPLimits *limits)
{
    VPAccount *a = malloc(sizeof(*a));

    if (a != NULL) {
        account_init(a, &drv->conns, limits);
    }
    return a;
}

void vp_account_free(VPAccount *account)
{
    account_leave(account);
}

void vp_iforward_account(VPDriver *drv, const char *service_id,
                         VPAccount *account)
{
    iforward_find(&drv->forwards, service_id)->account = account;
}

void vp_oforward_account(VPDriver *drv, int fd, VPAccount *account)
{
    oforward_find(&drv->forwards, fd)->account = account;
}

void vp_del_oforward(VPDriver *drv, int fd)
{
    VPOForward *f = oforward_find(&drv->forwards, fd);

    if (f != NULL) {
        oforward_free(f);
    }
}

void vp_del_iforward(VPDriver *drv, const char *service_id)
{
    VPIForward *f = iforward_find(&drv->forwards, service_id);

    if (f != NULL) {
        iforward_free(&drv->forwards, f);
    }
}

/* ---- offer ------------------------------------------------------------ */

/* candidate_close() - @why: NULL if nothing is to be said */
static void candidate_close(VPCandidate *k, const char *why)
{
    VPDriver *drv = k->drv;
    VPLink *l = &drv->link;

    /* it will try again, for ever */
    if (why != NULL && k->role == VP_HELLO_LISTENER &&
        strcmp(l->turned_away, why) != 0) {
        snprintf(l->turned_away, sizeof(l->turned_away), "%s", why);
        log_provoked(&drv->log, VP_LOG_WARN,
                     "another peer was turned away: %s", why);
    }
    vp_timer_stop(&k->timer);
    if (k->fd >= 0) {
        vp_unwatch(drv->loop, k->fd);
        close(k->fd);
        k->fd = -1;
    }
    k->proved = k->knows = false;
}

static void candidate_timer(void *opaque)
{
    candidate_close(opaque, "it said no hello");
}

/* candidate_take() - it is the peer from here on, and says hello anew */
static void candidate_take(VPCandidate *k)
{
    VPDriver *drv = k->drv;
    VPLink *l = &drv->link;
    int fd = k->fd;

    vp_timer_stop(&k->timer);
    vp_unwatch(drv->loop, fd);
    k->fd = -1;
    k->proved = k->knows = false;
    for (int i = 0; i < VP_CANDIDATES; i++) {
        if (drv->candidates[i].proved) {
            candidate_close(&drv->candidates[i], "the channel is in use");
        }
    }
    if (link_has_fd(l)) {
        link_detach(l, "replaced by a new connection");
    }
    if (vp_attach(drv, fd, fd, VP_CHN_SOCKET, k->role == VP_HELLO_CONNECTOR
                  ? VP_CONNECTED : VP_ACCEPTED) < 0) {
        l->lost(l->lost_opaque, strerror(ENOMEM), false);
    } else if (k->role == VP_HELLO_CONNECTOR &&
               (l->rx != NULL || link_rx_grow(l))) {
        /* the peer waits for an echo of what it has said, and says no more */
        memcpy(l->rx, k->buf, k->len);
        l->rx_len = k->len;
        link_process(l);
    }
}

/* candidate_connected() - we made it, because the present one seems dead */
static void candidate_connected(VPCandidate *k)
{
    if (link_is_stale(&k->drv->link)) {
        candidate_take(k);
    } else {
        candidate_close(k, NULL);
    }
}

/* candidate_wait() - does the present peer answer, or is it dead? */
static void candidate_wait(void *opaque)
{
    VPCandidate *k = opaque;
    VPLink *l = &k->drv->link;

    if (!link_in_use(l)) {
        candidate_take(k);
    } else if (l->state == LINK_UP && l->asked_at == 0) {
        candidate_close(k, "the channel is in use");
    } else {
        vp_timer_start(l->loop, &k->timer, VP_CANDIDATE_STEP, candidate_wait,
                       k);
    }
}

/* candidate_proved() - it is alive, and has the key if there is one */
static void candidate_proved(VPCandidate *k, const VPHello *h)
{
    VPLink *l = &k->drv->link;

    if (link_names_session(l, h) || !link_in_use(l)) {
        candidate_take(k);
        return;
    }
    if (l->state == LINK_UP && l->asked_at == 0) {
        link_ask(l);
    }
    k->proved = true;
    vp_timer_start(l->loop, &k->timer, VP_CANDIDATE_STEP, candidate_wait, k);
}

/* candidate_hello() - the next one in its buffer; false: more is needed */
static bool candidate_hello(VPCandidate *k)
{
    VPDriver *drv = k->drv;
    const char *wrong;
    char text[VP_WHY_LEN];
    VPHello h;
    int len = wire_get_hello(k->buf, k->len, &h);

    if (len == 0) {
        return false;
    }
    wrong = len < 0 ? "it is not qemu-vp"
                    : link_unfit(&drv->link, &h, text, sizeof(text));
    if (wrong == NULL) {
        wrong = link_distrust(&drv->link, &h, k->buf, k->role);
    }
    if (wrong != NULL) {
        candidate_close(k, wrong);
        return false;
    }
    k->knows = true;
    if (k->role == VP_HELLO_CONNECTOR) {
        candidate_connected(k);
        return false;
    }
    if (h.echo == k->token) {
        candidate_proved(k, &h);
        return false;
    }
    k->len -= (size_t)len;
    memmove(k->buf, k->buf + len, k->len);
    return true;
}

/* candidate_ready() - its words decide whether it takes over */
static void candidate_ready(void *opaque, int fd, int events)
{
    VPCandidate *k = opaque;
    ssize_t n;

    (void)events;
    if (k->proved) {
        k->len = 0; /* it says hello again while it waits */
    }
    n = read(fd, k->buf + k->len, sizeof(k->buf) - k->len);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        candidate_close(k, "it left");
        return;
    }
    k->len += (size_t)n;
    while (!k->proved && k->fd >= 0 && candidate_hello(k)) {
    }
}

/* candidate_greet() - what it says after this is no echo of old times */
static bool candidate_greet(VPCandidate *k)
{
    uint8_t buf[VP_PKT_HDR_LEN + VP_HELLO_LEN];
    VPLink *l = &k->drv->link;
    VPHello claim = l->hello;
    size_t len;

    k->token = random64();
    /* the session's key proves it, so it has to name the session */
    l->hello.my_epoch = l->epoch[0];
    l->hello.peer_epoch = l->epoch[1];
    len = link_compose(l, buf, k->token, 0, k->role);
    l->hello = claim;
    return write(k->fd, buf, len) == (ssize_t)len;
}

/*
 * candidate_place() - a place for one that came with @fd
 *
 * Who says nothing goes first, the oldest of them; and those who have said a
 * right HELLO only for each other.  So nobody without the key, who may come as
 * often as he likes, can keep its owner from being heard.
 */
static VPCandidate *candidate_place(VPDriver *drv, int fd)
{
    bool may_add = !vp_fd_is_kept(drv->loop, fd);
    VPCandidate *unused = NULL, *oldest = NULL;

    for (int i = 0; i < VP_CANDIDATES; i++) {
        VPCandidate *k = &drv->candidates[i];

        if (k->fd >= 0 && !k->knows) {
            candidate_ready(k, k->fd, VP_READ); /* it may just have said so */
        }
        if (k->fd < 0) {
            unused = k;
        } else if (oldest == NULL || k->knows < oldest->knows ||
                   (k->knows == oldest->knows && k->number < oldest->number)) {
            oldest = k;
        }
    }
    if (unused != NULL && (may_add || oldest == NULL)) {
        return unused;
    }
    candidate_close(oldest, "a newer one came");
    return oldest;
}

void vp_offer(VPDriver *drv, int fd, VPChannelRole role)
{
    VPCandidate *k = link_has_fd(&drv->link) ? candidate_place(drv, fd) : NULL;

    if (!link_has_fd(&drv->link)) {
        if (vp_attach(drv, fd, fd, VP_CHN_SOCKET, role) < 0) {
            log_provoked(&drv->log, VP_LOG_WARN,
                         "cannot take the channel: %s", strerror(ENOMEM));
        }
        return;
    }
    if (vp_watch(drv->loop, fd, candidate_ready, k) < 0) {
        close(fd);
        return;
    }
    k->fd = fd;
    k->len = 0;
    k->number = ++drv->offers;
    k->role = role == VP_CONNECTED ? VP_HELLO_CONNECTOR : VP_HELLO_LISTENER;
    if (!candidate_greet(k)) {
        candidate_close(k, "it takes no hello");
        return;
    }
    vp_watch_set(drv->loop, fd, VP_READ);
    vp_timer_start(drv->loop, &k->timer, VP_CANDIDATE_US, candidate_timer, k);
}

/* ---- info ------------------------------------------------------------- */

size_t vp_max_conns(uint64_t memory)
{
    size_t usable = (size_t)MIN(memory, SIZE_MAX);

    return usable > VP_MEMORY_FIXED
           ? (usable - VP_MEMORY_FIXED) / VP_MEMORY_CONN : 0;
}

void vp_note_error(VPDriver *drv, const char *text)
{
    link_note_error(&drv->link, text);
}

/* driver_memory() - bytes that are held */
static size_t driver_memory(const VPDriver *drv)
{
    const VPConns *cs = &drv->conns;
    size_t n = drv->link.rx_cap + VP_MEMORY_STORE(drv->link.store.len) +
               conns_held(cs) * sizeof(VPConn) +
               drv->forwards.ndials * sizeof(VPDial) +
               cs->hash_size * sizeof(*cs->hash) +
               drv->forwards.offer.cap * sizeof(VPServiceId);

    for (VPNode *c = cs->all.next; c != &cs->all; c = c->next) {
        n += container_of(c, VPConn, all)->buf_cap;
    }
    return n;
}

size_t vp_kernel_memory(const VPDriver *drv)
{
    const VPNode *ring = &drv->conns.all;
    size_t each = 1 + conns_held(&drv->conns) / VP_HELD_ASKED, at = 0, n = 0;

    for (VPNode *node = ring->next; node != ring; node = node->next) {
        const VPConn *c = container_of(node, VPConn, all);

        n += at++ % each == 0 && c->fd >= 0 ? socket_held(c->fd) : 0;
    }
    n *= each;
    return n + (link_has_fd(&drv->link) ? socket_held(drv->link.wfd) : 0);
}

void vp_channel_info(const VPDriver *drv, VPChannelInfo *info)
{
    static const char *const state[] = {
        [LINK_DOWN] = "down",
        [LINK_AWAY] = "down",
        [LINK_HELLO] = "hello",
        [LINK_UP] = "up",
        [LINK_DUMB] = "up",
    };
    const VPLink *l = &drv->link;
    uint64_t now = drv->loop->now;

    *info = (VPChannelInfo){
        .state = l->silent ? "silent" : state[l->state],
        .session_age = link_has_session(l) ? now - l->session_at : 0,
        .bytes = { l->bytes[0], l->bytes[1] },
        .packets = { l->packets[0], l->packets[1] },
        .rtt = l->flow.srtt,
        .rate = l->flow.rate * SECOND,
        .in_flight = l->store.bytes_out,
        .limit = l->flow.limit,
        .resyncs = l->resyncs,
        .attaches = l->attaches,
        .last_error = l->last_error,
        .last_error_age = l->last_error[0] != '\0' ? now - l->last_error_at
                                                   : 0,
        .conns = conns_held(&drv->conns),
        .max_conns = drv->config.max_conns,
        .memory = driver_memory(drv),
        .memory_max = memory_reach(&drv->config, driver_reach(&drv->config)),
        .counts = drv->conns.counts,
    };
}

void vp_account_info(const VPAccount *account, VPAccountInfo *info)
{
    *info = (VPAccountInfo){
        .conns = account->open,
        .counts = account->counts,
        .bytes = { account->bytes[0], account->bytes[1] },
    };
}

void vp_peer_info(const VPDriver *drv, VPPeerInfo *info)
{
    const VPOffer *o = &drv->forwards.offer;

    *info = (VPPeerInfo){
        .version = link_has_session(&drv->link) ? drv->link.version : 0,
        .program = o->program,
    };
}

const char *vp_services(VPDriver *drv, const char *after, size_t most,
                        void (*each)(const char *service_id, void *opaque),
                        void *opaque)
{
    const VPOffer *o = &drv->forwards.offer;
    size_t i = 0;

    offer_sort(&drv->forwards);
    while (i < o->n && strcmp(o->names[i], after) <= 0) {
        i++;
    }
    for (; i < o->n && most > 0; i++, most--) {
        each(o->names[i], opaque);
    }
    return i < o->n ? o->names[i - 1] : NULL;
}

VPOffered vp_offered(VPDriver *drv, const char *service_id)
{
    return offer_has(&drv->forwards, service_id);
}

uint64_t vp_conns(const VPDriver *drv, uint64_t after, size_t most,
                  void (*each)(const VPConnInfo *info, void *opaque),
                  void *opaque)
{
    const VPNode *ring = &drv->conns.all;

    for (VPNode *n = ring->next; n != ring; n = n->next) {
        const VPConn *c = container_of(n, VPConn, all);
        const VPDial *dial = c->dial;
        VPConnInfo info;

        if (c->number <= after || conn_over(c)) {
            continue;
        }
        if (most-- == 0) {
            return after;
        }
        info = conn_info(c);
        if (dial != NULL) {
            info.connecting = dial_addr(&dial->dialer);
        }
        each(&info, opaque);
        after = c->number;
    }
    return 0;
}

int vp_conn_reset(VPDriver *drv, uint32_t id, bool client)
{
    const VPNode *ring = &drv->conns.all;

    for (VPNode *n = ring->next; n != ring; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);

        if (c->id == id && c->client == client && !conn_over(c)) {
            conn_abort(c, VP_RESET_DAEMON, VP_REASON_NONE,
                       "the monitor says so");
            return 0;
        }
    }
    return -ENOENT;
}

/* ---- end -------------------------------------------------------------- */

bool vp_busy(const VPDriver *drv)
{
    const VPNode *ring = &drv->conns.all;

    if (drv->link.state == LINK_UP &&
        (drv->link.store.bytes > 0 || node_linked(&drv->conns.due))) {
        return true;
    }
    for (VPNode *n = ring->next; n != ring; n = n->next) {
        const VPConn *c = container_of(n, VPConn, all);

        if (!conn_over(c) &&
            (conn_queued(c) > 0 ||
             (drv->link.state == LINK_UP && conn_unread(c) > 0))) {
            return true;
        }
    }
    return false;
}

void vp_refuse(VPDriver *drv)
{
    drv->forwards.ending = true;
}

void vp_reset_all(VPDriver *drv)
{
    const VPNode *ring = &drv->conns.all;

    for (VPNode *n = ring->next; n != ring; n = n->next) {
        VPConn *c = container_of(n, VPConn, all);

        conn_check_over(c); /* the sweep may not have seen it yet */
        conn_abort(c, VP_RESET_DAEMON, VP_REASON_ENDING, "this daemon ends");
    }
}

void vp_free(VPDriver *drv)
{
    link_bye(&drv->link);
    conns_end(&drv->conns);
    forwards_end(&drv->forwards);
    for (int i = 0; i < VP_CANDIDATES; i++) {
        candidate_close(&drv->candidates[i], NULL);
    }
    link_end(&drv->link);
    vp_timer_stop(&drv->grace_timer);
    loop_del_task(drv->loop, &drv->task);
    free(drv);
}
