/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.h - the engine, and what the tests know of its insides
 *
 * Most of what a test looks at is in the contract (virtproxy.h).  The rest goes
 * through the functions here, so that a static that moves or gets another name
 * changes engine.c and no suite.
 *
 * engine.c includes virtproxy.c.  A program of tests has it once: from the
 * archive of tests/lib, with the system calls as they are, or included by the
 * source that replaces some of them (rig.h, tests/chaos/engine.c).  A suite
 * that tests a static function includes it, too, and may name what it tests.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include "virtproxy.h"

/* engine_log_level - of the lines that are wanted: VP_LOG_INFO at first */
extern VPLogLevel engine_log_level;

/* engine_loop_new() - a loop whose log is log_line() of log.h */
VPLoop *engine_loop_new(void);

/* ---- the link ----------------------------------------------------------- */

typedef struct EngineLink {
    const char *state;    /* "down", "hello", "up" or "silent" */
    bool away;            /* a port whose other side is not connected */
    bool heard;           /* a HELLO came through the present descriptor */
    bool confirmed;       /* the peer is known to hold the session, too */
    int rfd, wfd;         /* -1: none */
    uint64_t token[2];    /* own, the peer's: of the last handshake */
    uint64_t epoch[2];    /* own, the peer's; 0: there is no session */
    const struct VPHeaderKey *rx_key;   /* of the checks of what comes */
    const struct VPPayloadKey *rx_payload_key;
    uint64_t asked_at;    /* time of a PING without answer; 0: none */
    uint64_t penalty_until; /* time up to which the peer is not listened to */
    uint32_t base;        /* number of the oldest packet that is not acked */
    uint32_t unsent;      /* number of the first packet not sent */
    uint32_t unsent_off;  /* bytes of that packet that were sent */
    uint32_t next;        /* number that the next packet gets */
    uint32_t expect;      /* number of the packet that should come next */
    uint64_t rx_digest;   /* of all packets before that one */
    bool stores;          /* the send store has memory */
    size_t rx_cap;        /* room in the receive buffer, bytes */
    size_t ctl_len;       /* bytes of packets without number, to be sent */
    uint64_t resyncs;     /* times the link was out of step */
} EngineLink;

EngineLink engine_link(const VPDriver *drv);

/* engine_set_instance() - as if it were in a process of its own */
void engine_set_instance(VPDriver *drv, uint64_t instance);

/* engine_keys_fit() - has each the other's keys of the checks? */
bool engine_keys_fit(const VPDriver *a, const VPDriver *b);

bool engine_up(const VPDriver *drv);
bool engine_has_session(const VPDriver *drv);

/* engine_work() - other than bulk, that is counted so far in this pass, ns */
unsigned engine_work(const VPDriver *drv);

/* engine_unacked() - bytes in the send store */
uint32_t engine_unacked(const VPDriver *drv);

/* engine_digest() - of all packets sent before number @seq, which is held */
uint64_t engine_digest(VPDriver *drv, uint32_t seq);

/*
 * engine_greet() - as if a handshake had taken place
 * @theirs:  the peer's token; 0: it has said nothing yet, only we have
 */
void engine_greet(VPDriver *drv, uint64_t ours, uint64_t theirs);

/* engine_take() - as if the channel had these bytes; false: there is no room */
bool engine_take(VPDriver *drv, const uint8_t *data, size_t len);

/* engine_forget() - the session is over */
void engine_forget(VPDriver *drv);

/* engine_unblock() - try to write, whatever the last write came to */
void engine_unblock(VPDriver *drv);

/* engine_set_limit() - bytes in flight and bytes of a packet, at most */
void engine_set_limit(VPDriver *drv, uint32_t limit, uint32_t pkt_len);

/* engine_hold() - nothing may be in flight, up to engine_reset_flow() */
void engine_hold(VPDriver *drv);

/* engine_reset_flow() - as if nothing were known of the channel's speed */
void engine_reset_flow(VPDriver *drv);

/* engine_set_rtt() - smoothed round-trip time, us */
void engine_set_rtt(VPDriver *drv, uint64_t rtt);
/* engine_set_trip() - the shortest round trip so far took @trip us */
void engine_set_trip(VPDriver *drv, uint64_t trip);

/* ---- connections -------------------------------------------------------- */

typedef struct EngineConn {
    bool there;           /* else there is none, and the rest is 0 */
    const void *which;    /* tells it from others that have its id */
    const char *in;       /* states, with the names that VPConnInfo has */
    const char *out;
    bool announced;       /* the peer was told of it */
    int fd;               /* -1: closed */
    uint32_t window;      /* bytes the peer may be ahead */
    uint32_t buf_len;     /* bytes the local socket has not taken */
    uint32_t buf_cap;     /* room for them */
    uint64_t tx_count;    /* bytes sent to the peer */
    uint64_t tx_limit;    /* bytes the peer lets us send */
    uint64_t rx_count;    /* bytes received from the peer */
    uint64_t rx_taken;    /* bytes the local socket has taken */
    uint64_t rx_limit;    /* bytes we let the peer send */
} EngineConn;

/* engine_conn() - connection @id; @client: we accepted it */
EngineConn engine_conn(VPDriver *drv, uint32_t id, bool client);

bool engine_has_conn(VPDriver *drv, uint32_t id, bool client);

/* engine_shift_conn() - as if more bytes had come from the peer, gone to it */
void engine_shift_conn(VPDriver *drv, uint32_t id, bool client, uint64_t rx,
                       uint64_t tx);

/* engine_accept() - as if a client's @fd had come to a forward to @service */
void engine_accept(VPDriver *drv, const char *service, int fd);

/* ---- a driver as a whole ------------------------------------------------ */

typedef struct EngineCounts {
    size_t conns;
    size_t clients;       /* connections accepted here */
    size_t open;          /* the others, not closed here yet */
    size_t announced;     /* clients that the peer knows of */
    size_t connecting;    /* connections to a target that hasn't answered */
    size_t turns;         /* connections that wait for their turn to send */
    bool listed;          /* some list but that of all connections has one */
    bool listens;         /* there is an oforward */
    bool candidate;       /* a further peer waits (vp_offer()) */
    uint64_t candidate_token; /* what the last one of these was greeted with */
    size_t fds;           /* descriptors that the loop should watch */
    uint32_t grown;       /* bytes of all windows beyond what they begin with */
    uint32_t next_id;     /* id of the next client's connection */
} EngineCounts;

EngineCounts engine_counts(const VPDriver *drv);

void engine_set_next_id(VPDriver *drv, uint32_t id);

/* engine_conns() - engine_counts().conns, for places that are passed often */
size_t engine_conns(const VPDriver *drv);

/* engine_check() - NULL, or which bound or invariant does not hold */
const char *engine_check(VPDriver *drv);

/* engine_dump() - what it is up to, to stderr */
void engine_dump(const VPDriver *drv);

/* engine_quiet() - is it up, with nothing to send or to be acked? */
bool engine_quiet(const VPDriver *drv);

/*
 * engine_shift() - as if more packets and bytes had gone between two before
 * @seq:  the next packets' number
 *
 * Only while both are quiet.
 */
void engine_shift(VPDriver *a, VPDriver *b, uint32_t seq, uint64_t bytes);

/* engine_watched() - descriptors that the loop watches */
size_t engine_watched(const VPLoop *loop);

/* engine_loop_empty() - no descriptor is watched and no timer runs */
bool engine_loop_empty(const VPLoop *loop);

/*
 * engine_hello() - a HELLO that checks, as of a peer that is not ours
 * @buf:    ENGINE_HELLO_ROOM bytes
 * @newer:  by how much its version is above ours
 *
 * Returns its length.
 */
#define ENGINE_HELLO_ROOM 256
size_t engine_hello(uint8_t *buf, unsigned newer);

#endif
