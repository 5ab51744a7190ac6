/*
 * virtproxy - many socket streams over one channel between host and guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The contract between the engine (virtproxy.c) and the program around it
 * (qemu-vp.c).  The program parses options, opens channels and listeners,
 * and logs; the engine owns the loop and everything that happens on a
 * descriptor once it has been handed over.
 *
 * Units: times are microseconds unless a name says otherwise, sizes are
 * bytes.  Errors: functions that return int give 0, or a negative errno
 * value.  Nothing here exits, blocks or prints by itself.
 */
#ifndef VIRTPROXY_H
#define VIRTPROXY_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* Versions of the protocol that this engine speaks. */
#define VP_VERSION 3
#define VP_VERSION_OLDEST 3

/*
 * vp_versions() - versions from @oldest to @newest as text
 * @buf:  VP_VERSIONS_LEN bytes, for two numbers of 16 bits; returned
 */
#define VP_VERSIONS_LEN 16
const char *vp_versions(unsigned oldest, unsigned newest, char *buf);

/* Longest service id; ids are printable ASCII without ':' and blanks. */
#define VP_SERVICE_ID_LEN 32

/* ---- log -------------------------------------------------------------- */

typedef enum VPLogLevel {
    VP_LOG_ERROR,
    VP_LOG_WARN,
    VP_LOG_INFO,
    VP_LOG_VERBOSE, /* each connection's begin and end */
    VP_LOG_DEBUG,
} VPLogLevel;

#define VP_NO_CHANNEL (-1)

/*
 * The program's log: one event, one line
 * @channel:  id of the channel it concerns, or VP_NO_CHANNEL
 * @text:     without newline; what it quotes may hold control characters
 *
 * It must leave errno as it was.
 */
typedef void VPLogFunc(VPLogLevel level, int channel, const char *text);

/* What is said once: zeroed memory has said nothing yet. */
typedef struct VPOnce {
    bool said;
    uintptr_t what; /* what was said last: a number, or a constant's address */
    uint64_t at;    /* when it was said, us */
} VPOnce;

/*
 * vp_once() - is @what news at @now?
 * @again:  us after which the same is news again; 0: never
 *
 * True if something else, or nothing, was said before; it counts as said then.
 */
bool vp_once(VPOnce *once, uintptr_t what, uint64_t now, uint64_t again);

/* ---- loop: descriptors and timers ------------------------------------- */

typedef struct VPLoop VPLoop;

/* A member of a doubly linked ring, embedded in its owner. */
typedef struct VPNode {
    struct VPNode *prev;
    struct VPNode *next;
} VPNode;

enum {
    VP_READ = 1,
    VP_WRITE = 2,
};

/* Called when @fd is ready; @events is VP_READ, VP_WRITE or both. */
typedef void VPFdHandler(void *opaque, int fd, int events);

/* A one-shot timer, embedded in its owner; zeroed memory is a stopped one. */
typedef struct VPTimer {
    struct VPTimer *next;
    struct VPTimer **link; /* what points at us; NULL: not running */
    uint64_t deadline;
    void (*handler)(void *opaque);
    void *opaque;
} VPTimer;

/*
 * vp_loop_new() - NULL, with errno, without memory or random numbers
 *
 * ENOSYS: select() takes its descriptors in an order that isn't known here.
 * @log:    gets the engine's lines
 * @level:  of those that are wanted; it may be changed while the loop lives
 */
VPLoop *vp_loop_new(VPLogFunc *log, const VPLogLevel *level);

/* vp_loop_free() - all drivers must be freed, all descriptors forgotten */
void vp_loop_free(VPLoop *loop);

/*
 * vp_loop_run() - serve until vp_loop_stop()
 *
 * Returns 0, or -errno if select() fails in a way that can't be mended.
 */
int vp_loop_run(VPLoop *loop);
void vp_loop_stop(VPLoop *loop);

/* vp_loop_now() - monotonic time of the current pass, us */
uint64_t vp_loop_now(const VPLoop *loop);

/* vp_clock() - monotonic time, read anew, us */
uint64_t vp_clock(void);

/*
 * vp_watch() - have @handler called for @fd, initially for no event
 *
 * Returns -ENOMEM, or -EMFILE where select() can't take so high an fd.
 */
int vp_watch(VPLoop *loop, int fd, VPFdHandler *handler, void *opaque);
/* vp_watch_set() - @events replaces what was wanted of @fd before */
void vp_watch_set(VPLoop *loop, int fd, int events);
/* vp_loop_nfds() - the highest watched descriptor, plus one */
int vp_loop_nfds(const VPLoop *loop);
/* vp_unwatch() - forget @fd; must come before it is closed */
void vp_unwatch(VPLoop *loop, int fd);

/*
 * vp_loop_descriptors() - share out what descriptors there are
 * @max:   that the process may have
 * @kept:  of these for the program; each channel has some of its own
 *
 * What is left is for connections, which are refused beyond.  If this isn't
 * called they are refused when the system has none for them.
 */
void vp_loop_descriptors(VPLoop *loop, size_t max, size_t kept);

/* vp_fd_is_kept() - are all descriptors taken that a connection may have? */
bool vp_fd_is_kept(const VPLoop *loop, int fd);

typedef struct VPDescriptors {
    size_t used;  /* descriptors that are watched */
    size_t conns; /* descriptors of connections */
    size_t kept;  /* descriptors that are never a connection's */
    size_t max;   /* descriptors that the process may have; 0: not known */
} VPDescriptors;

VPDescriptors vp_descriptors(const VPLoop *loop);

void vp_timer_start(VPLoop *loop, VPTimer *timer, uint64_t delay,
                    void (*handler)(void *opaque), void *opaque);
void vp_timer_stop(VPTimer *timer);

/* ---- sockets: listening and connecting -------------------------------- */

typedef struct VPAddr {
    socklen_t len;
    struct sockaddr_storage ss;
} VPAddr;

/* vp_addr_is_local() - is @addr of the loopback, or of no network at all? */
bool vp_addr_is_local(const VPAddr *addr);

/* vp_addr_str() - @addr as ADDR:PORT, vsock:CID:PORT or a path; cut to fit */
const char *vp_addr_str(const VPAddr *addr, char *buf, size_t size);

/*
 * A listener, embedded in its owner, who sets the first six fields; a zeroed
 * one is stopped.
 */
typedef struct VPListener {
    int channel;       /* for the log: its id, or VP_NO_CHANNEL */
    const char *name;  /* for the log; kept */
    bool keeps_spare;  /* keep a descriptor for when none is left to accept */
    uint64_t rest;     /* us for which it looks away after each one that comes;
                          0: several may come in a row */
    /*
     * @fd is non-blocking, and the owner's; @peer may be unnamed.  The
     * call may stop the listener, but not free it.
     */
    void (*accepted)(void *opaque, int fd, const VPAddr *peer);
    void *opaque;

    VPLoop *loop;
    int fd;            /* -1: stopped */
    int spare;         /* -1: given up, or none is kept */
    VPTimer pause;     /* runs while it looks away, because there was no
                          descriptor to accept with, or for "rest" */
    VPOnce said;       /* that there is no descriptor */
} VPListener;

/*
 * vp_listener_start() - accept what comes to @fd
 * @fd:  listening, non-blocking; owned by the listener, also on failure
 */
int vp_listener_start(VPListener *l, VPLoop *loop, int fd);

/* vp_listener_stop() - close the socket; accepted connections go on */
void vp_listener_stop(VPListener *l);

/* vp_listener_spare() - take the spare descriptor back, as one was closed */
void vp_listener_spare(VPListener *l);

/* Addresses of a target; freed by the last that uses them. */
typedef struct VPAddrs {
    unsigned users;    /* the target, and each dialler that tries them */
    size_t first;      /* index of the one to try first: it worked last */
    size_t n;
    VPAddr addr[];
} VPAddrs;

/* Where to connect to; a zeroed one has no address. */
typedef struct VPTarget {
    VPAddrs *addrs;    /* NULL: none is known */
    uint64_t full_at;  /* us, when a unix socket's queue was seen full last */
} VPTarget;

/*
 * vp_target_set() - the addresses of @target are the @n at @addrs, from now on
 * @n:  0: they can't be known now; those it has stay
 *
 * Diallers that wait for addresses go on.  Returns 0 or -ENOMEM.
 */
int vp_target_set(VPTarget *target, VPLoop *loop, const VPAddr *addrs,
                  size_t n);

/* vp_target_clear() - forget the addresses; no dialler may wait for any */
void vp_target_clear(VPTarget *target);

/* So many addresses are tried at once. */
#define VP_DIAL_ATTEMPTS 4

/* An attempt to connect to one address. */
typedef struct VPAttempt {
    struct VPDialer *dialer;
    size_t at;         /* index of the address */
    int fd;            /* -1: there is no attempt */
    bool full;         /* the target's queue is: connect() comes again */
    uint64_t deadline; /* us */
} VPAttempt;

/*
 * A dialler, embedded in its owner, who sets the first four fields; a zeroed
 * one is stopped.
 */
typedef struct VPDialer {
    /*
     * A socket was made for @addr; false: there is no descriptor for it.  NULL:
     * nothing needs to be done to it.
     */
    bool (*made)(void *opaque, int fd, const VPAddr *addr);
    /*
     * @addr won't do, errno @err; NULL: there is no descriptor for any.  The
     * call may not stop the dialler.
     */
    void (*failed)(void *opaque, const VPAddr *addr, int err);
    /*
     * It is over: @fd is connected, non-blocking, the owner's; or -1, and
     * errno is @err.
     * The call may free the dialler.
     */
    void (*done)(void *opaque, int fd, int err);
    void *opaque;

    VPLoop *loop;
    VPTarget *target;
    VPAddrs *addrs;      /* NULL: it waits for the target to get some */
    VPNode node;
    size_t first;        /* index of the address that was tried first */
    size_t tried;        /* addresses so far */
    int err;             /* errno value of the failure that came last */
    VPAttempt attempts[VP_DIAL_ATTEMPTS];
    uint64_t next_at;    /* us, when the next address is tried as well */
    uint64_t give_up_at; /* us, for all of them */
} VPDialer;

/*
 * vp_dialer_start() - connect to the first address of @target that accepts
 * @target:  kept until "done" was called, which may be before this returns; one
 *           without addresses will have some soon, and is waited for
 *
 * It takes 10 s at most.
 */
void vp_dialer_start(VPDialer *d, VPLoop *loop, VPTarget *target);

/* vp_dialer_stop() - forget it; "done" is not called */
void vp_dialer_stop(VPDialer *d);

/* ---- events ----------------------------------------------------------- */

typedef enum VPEventType {
    VP_EVENT_UP,       /* the channel is up, in a session new or old */
    VP_EVENT_SILENT,   /* the other side has answered nothing for long */
    VP_EVENT_ANSWERS,  /* the other side answers again: the channel is up */
    VP_EVENT_DOWN,     /* the channel is lost */
    VP_EVENT_OVER,     /* the session is over, and no other one has begun */
    VP_EVENT_SERVICES, /* the other side has told what it offers */
    VP_EVENT_REFUSED,  /* a connection is refused */
    VP_EVENT_OPENED,   /* a client has come, or a target was reached */
    VP_EVENT_ENDED,    /* a connection that was OPENED has ended */
} VPEventType;

/* What happened; all that is pointed at is there until the call returns. */
typedef struct VPEvent {
    VPEventType type;
    int channel;                   /* its id */
    bool resumed;                  /* UP: the session is the old one */
    bool mended;                   /* UP: it was up, and only out of step */
    size_t services;               /* SERVICES: how many */
    bool client;                   /* REFUSED: the client is on this side */
    const char *service_id;        /* REFUSED */
    const char *from;              /* REFUSED: the client; "": not known */
    const struct VPConnInfo *conn; /* OPENED, ENDED */
    const char *reason;            /* DOWN, OVER, REFUSED, ENDED: why */
} VPEvent;

/* Called for an event; false: nobody wanted to know of it. */
typedef bool VPEventFunc(const VPEvent *event);

/*
 * vp_set_events() - call @event for all that happens
 * @conns:  are OPENED and ENDED wanted now?  Kept, it may change at any time
 */
void vp_set_events(VPLoop *loop, VPEventFunc *event, const bool *conns);

/* ---- driver: one channel and what is forwarded over it ---------------- */

typedef struct VPDriver VPDriver;

/* What a channel's descriptor is; decides how its quirks are met. */
typedef enum VPChannelKind {
    VP_CHN_SOCKET,     /* unix or tcp stream socket */
    VP_CHN_VIRTSERIAL, /* virtio-serial port in a guest, or a FIFO pair */
    VP_CHN_TTY,        /* serial line */
} VPChannelKind;

/* Who made the connection: if nobody answers, making it anew may help. */
typedef enum VPChannelRole {
    VP_OPENED,    /* a device, or somebody else did */
    VP_ACCEPTED,
    VP_CONNECTED,
} VPChannelRole;

/* A secret that both sides know; see "key" in virtproxy.c. */
typedef struct VPKey {
    uint8_t bytes[1024];
    size_t len; /* 0: none */
} VPKey;

typedef struct VPConfig {
    /* How long connections wait while there is no channel, in seconds. */
    unsigned grace;
    /* Connections at once; the peer's opens beyond are refused. */
    unsigned max_conns;
    /* Connections of the peer's whose target has not answered yet. */
    unsigned max_half_open;
    /* Connections that the peer may open in a second. */
    unsigned max_opens;
    /*
     * Bytes that the channel may use.  What max_conns leaves of them is for
     * long ways; max_conns itself isn't bounded by them, see vp_max_conns().
     */
    uint64_t memory;
    VPKey key;
    /*
     * Version of the program, printable ASCII, kept; the peer is told that and
     * the services.  NULL: it is told neither.
     */
    const char *program;
} VPConfig;

/*
 * The channel's descriptor is of no use any more and has been closed; the
 * program then opens another and calls vp_attach().
 * @reason:  for the log
 * @was_up:  a session came up on it; else there's no hurry to try again
 */
typedef void VPLostHandler(void *opaque, const char *reason, bool was_up);

/*
 * vp_new() - a driver without a channel; NULL when out of memory
 * @lost:  called from the loop
 */
VPDriver *vp_new(VPLoop *loop, int channel_id, const VPConfig *config,
                 VPLostHandler *lost, void *opaque);

/* vp_set_config() - takes effect from now on; HELLO tells the peer later */
void vp_set_config(VPDriver *drv, const VPConfig *config);

/*
 * vp_free() - reset every connection, close everything handed over
 *
 * The peer is told that the session is over, if it can be told at once.
 */
void vp_free(VPDriver *drv);

/*
 * vp_attach() - give the driver its channel
 * @rfd, @wfd:  may be the same; non-blocking; owned by the driver from here
 *              on, also when the call fails
 *
 * Only for a driver whose channel is down.
 */
int vp_attach(VPDriver *drv, int rfd, int wfd, VPChannelKind kind,
              VPChannelRole role);

/* Whose listener accepts for vp_offer() has this as its VPListener.rest. */
#define VP_OFFER_REST 100u

/*
 * vp_offer() - a further peer has come to a listening channel in use
 *
 * It is greeted, and once it has echoed that, with the key's proof if there is
 * a key, it replaces the present one if it names the present session, or if
 * that one, when asked, is found dead; else it is turned away.
 * @fd is the driver's.  Without a channel this is vp_attach().
 *
 * With @role VP_CONNECTED it is a further connection to the same peer, made
 * because the present one is stale.  It takes its place once the peer says
 * hello through it, unless the present one has answered by then.
 */
void vp_offer(VPDriver *drv, int fd, VPChannelRole role);

/*
 * Nothing has come through the channel's descriptor for 10 s or more, though
 * the peer was asked.  It may be paused; or another connection would get
 * through.
 */
typedef void VPStaleHandler(void *opaque);

/* vp_set_stale() - call @stale, from the loop, with the @opaque of vp_new() */
void vp_set_stale(VPDriver *drv, VPStaleHandler *stale);

/*
 * vp_set_oforward() - forward what connects to @fd to the peer's service
 * @fd:  listening, non-blocking socket; owned by the driver
 *
 * Clients of VP_ANY_SERVICE begin with a line "CONNECT SERVICE_ID", and get a
 * line "OK NUMBER" once its target has accepted.
 */
#define VP_ANY_SERVICE "*"
int vp_set_oforward(VPDriver *drv, int fd, const char *service_id);

/*
 * vp_set_iforward() - connect the peer's connections to @service_id
 * @addrs:   copied; called again, it replaces those of before
 * @naddrs:  0: none is known now.  Those of before stay; without any the
 *           connections that wait for one are refused, and those that come from
 *           then on wait, for 10 s at most, until this is called again
 */
int vp_set_iforward(VPDriver *drv, const char *service_id,
                    const VPAddr *addrs, size_t naddrs);

/*
 * A connection came for an iforward, and is to be dialled
 * @failed:  no, one was dialled, and none of the addresses would do
 *
 * It may call vp_set_iforward() for it later, but not before it returns.
 */
typedef void VPUsedHandler(void *opaque, bool failed);

/* vp_iforward_used() - call @used for @service_id, which must be there */
void vp_iforward_used(VPDriver *drv, const char *service_id,
                      VPUsedHandler *used, void *opaque);

/*
 * vp_iforward_proxy() - tell the target who each client is
 * @service_id:  must be there
 *
 * By a header of the PROXY protocol, version 2, before the client's own bytes.
 */
void vp_iforward_proxy(VPDriver *drv, const char *service_id);

/*
 * vp_del_oforward() - stop listening on @fd and close it
 *
 * Connections that came through it go on.
 */
void vp_del_oforward(VPDriver *drv, int fd);

/*
 * vp_del_iforward() - @service_id is unknown from here on
 *
 * Connections to it go on; those not yet connected are refused.
 */
void vp_del_iforward(VPDriver *drv, const char *service_id);

/*
 * vp_busy() - do bytes wait for the peer, or for the owner of a local socket?
 */
bool vp_busy(const VPDriver *drv);

/* vp_refuse() - what the peer opens from here on is refused: the daemon ends */
void vp_refuse(VPDriver *drv);

/*
 * vp_reset_all() - reset every connection, here and at the peer
 *
 * The peer delivers what it got of them before, for 2 s at most.
 */
void vp_reset_all(VPDriver *drv);

/* Limits of a forward. */
typedef struct VPLimits {
    unsigned max_conns; /* connections at once; 0: no limit */
    unsigned idle;      /* s without data, then one is reset; 0: never */
} VPLimits;

/* A forward's limits and counts, which its connections keep after its end. */
typedef struct VPAccount VPAccount;

/* vp_account_new() - NULL when out of memory */
VPAccount *vp_account_new(VPDriver *drv, const VPLimits *limits);

/* vp_account_free() - once no forward has it; before vp_free() */
void vp_account_free(VPAccount *account);

/*
 * vp_oforward_account(), vp_iforward_account() - from now on connections that
 * come through @fd, or for @service_id, are @account's
 *
 * The forward must be there.
 */
void vp_oforward_account(VPDriver *drv, int fd, VPAccount *account);
void vp_iforward_account(VPDriver *drv, const char *service_id,
                         VPAccount *account);

/* vp_max_conns() - how many connections a channel's @memory is enough for */
size_t vp_max_conns(uint64_t memory);

/* Why connections were refused, by either side. */
typedef enum VPRefusal {
    VP_REFUSED_UNKNOWN,   /* there is no such service */
    VP_REFUSED_TARGET,    /* the target can't be connected to */
    VP_REFUSED_LIMIT,     /* one of VPConfig's, or of VPLimits' */
    VP_REFUSED_RESOURCES, /* no memory or no descriptor */
    VP_REFUSED_ENDING,    /* the daemon was about to end */
    VP_REFUSED_CLIENT,    /* it didn't say right what it wanted */
    VP_REFUSALS,
} VPRefusal;

/* Who reset connections. */
typedef enum VPResetBy {
    VP_RESET_OWNER,   /* of the local socket: a client, or a target */
    VP_RESET_PEER,    /* the other side, or its socket's owner */
    VP_RESET_DAEMON,  /* this daemon: --grace, the monitor, memory, its end */
    VP_RESET_SESSION, /* nobody: the session was over */
    VP_RESET_IDLE,    /* this daemon, because no data moved for so long */
    VP_RESETS,
} VPResetBy;

/* Connections so far. */
typedef struct VPConnCounts {
    uint64_t opened[2]; /* by the peer, by clients here */
    uint64_t refused[VP_REFUSALS];
    uint64_t reset[VP_RESETS];
} VPConnCounts;

/* What there is to know of an account; counts are since vp_account_new(). */
typedef struct VPAccountInfo {
    size_t conns;       /* at present */
    VPConnCounts counts;
    uint64_t bytes[2];  /* to and from the local sockets */
} VPAccountInfo;

void vp_account_info(const VPAccount *account, VPAccountInfo *info);

/* What there is to know of a channel; counts are since vp_new(). */
typedef struct VPChannelInfo {
    const char *state;        /* "down", "hello", "up" or "silent" */
    uint64_t session_age;     /* 0: there is no session */
    uint64_t bytes[2];        /* payload received, sent */
    uint64_t packets[2];      /* sequenced packets received, sent */
    uint64_t rtt;             /* smoothed round-trip time; 0: not known yet */
    double rate;              /* measured delivery rate, bytes per second */
    uint32_t in_flight;       /* bytes sent and not acked */
    uint32_t limit;           /* of that */
    uint64_t resyncs;         /* times the link was out of step */
    uint64_t attaches;        /* descriptors it had so far */
    const char *last_error;   /* why it was lost last; "": never */
    uint64_t last_error_age;
    size_t conns;
    size_t max_conns;
    size_t memory;            /* bytes held for buffers and connections */
    size_t memory_max;        /* what they may add up to */
    VPConnCounts counts;
} VPChannelInfo;

void vp_channel_info(const VPDriver *drv, VPChannelInfo *info);

/* vp_note_error() - why there is no channel: it becomes "last_error" */
void vp_note_error(VPDriver *drv, const char *text);

/*
 * vp_kernel_memory() - bytes that the kernel holds for the sockets of channel
 * and connections
 *
 * A system call for each, or for some that stand for all of thousands; 0 where
 * the kernel doesn't tell.
 */
size_t vp_kernel_memory(const VPDriver *drv);

/* What the other side says of itself. */
typedef struct VPPeerInfo {
    unsigned version;    /* of the protocol, that both use; 0: no session */
    const char *program; /* version of the peer's program; "": not told */
} VPPeerInfo;

void vp_peer_info(const VPDriver *drv, VPPeerInfo *info);

/*
 * vp_services() - call @each for services that the other side offers, by name
 * @after:  the name that they follow; "": none
 * @most:   so many of them, at least one
 *
 * Returns the last one's name if there are more; NULL: there are none.
 */
const char *vp_services(VPDriver *drv, const char *after, size_t most,
                        void (*each)(const char *service_id, void *opaque),
                        void *opaque);

typedef enum VPOffered {
    VP_OFFER_UNKNOWN, /* the peer has not told all, or there is no session */
    VP_OFFERED,
    VP_NOT_OFFERED,
} VPOffered;

/* vp_offered() - does the other side offer the service? */
VPOffered vp_offered(VPDriver *drv, const char *service_id);

/* What there is to know of a connection. */
typedef struct VPConnInfo {
    uint32_t id;              /* unique together with "client" */
    bool client;              /* accepted here, not connected from here */
    const char *service_id;
    const char *in;           /* state, from the local socket */
    const char *out;          /* state, to the local socket */
    int fd;                   /* the local socket; -1: closed already */
    const VPAddr *connecting; /* what it is being connected to, or NULL */
    uint64_t age;
    uint64_t idle;            /* since data moved either way */
    uint64_t bytes[2];        /* to and from the local socket */
    uint64_t credit;          /* bytes the peer still lets us send */
    size_t waiting;           /* bytes the local socket has not taken */
} VPConnInfo;

/*
 * vp_conns() - call @each for connections, oldest first
 * @after:  0: from the first one on; else what the last call returned
 * @most:   it is called so many times at most
 *
 * Returns 0 if there are no more, however many have come or gone meanwhile.
 */
uint64_t vp_conns(const VPDriver *drv, uint64_t after, size_t most,
                  void (*each)(const VPConnInfo *info, void *opaque),
                  void *opaque);

/* vp_conn_reset() - reset one connection at both ends; -ENOENT: no such */
int vp_conn_reset(VPDriver *drv, uint32_t id, bool client);

/* vp_service_id_ok() - is @len bytes at @id a service id? */
bool vp_service_id_ok(const char *id, size_t len);

#endif
