/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * traffic.h - many connections through the daemons, every byte checked
 *
 * A Flow is one connection as a user sees it: side 0 is the client's socket,
 * side 1 the server's, both in this process and driven by one poll() loop.
 * The client says first which flow it is (HEAD_LEN bytes), so that the server
 * side knows whom it has; then both sides send their own pattern and check the
 * other's.  A side that has sent all shuts down its direction, and a side
 * that has seen the end of data before all of it fails the test.
 */
#ifndef TRAFFIC_H
#define TRAFFIC_H

#include "tests/lib/harness.h"

#define FOREVER UINT64_MAX      /* bytes: never stops sending */
#define HEAD_LEN 8

typedef struct Side {
    int fd;                     /* -1: not there yet, or no longer */
    uint64_t stream;            /* pattern that it sends */
    uint64_t to_send;           /* bytes */
    uint64_t sent;
    uint64_t got;
    bool deaf;                  /* does not read for now */
    bool shut;                  /* has sent its end of data */
    bool eof;                   /* has seen the other's end of data */
    int error;                  /* errno that ended it, or 0 */
} Side;

typedef struct Flow {
    Side side[2];
    size_t listener;            /* index of the one it must arrive at */
    size_t head_sent;
    bool paired;                /* the server side has it */
    bool waived;                /* traffic_done() does not ask for it */
} Flow;

/* A server's connection that has not said yet which flow it is */
typedef struct Orphan {
    int fd;
    size_t listener;
    unsigned char head[HEAD_LEN];
    size_t got;
} Orphan;

typedef struct Traffic {
    Flow *flows;
    size_t n_flows;
    Orphan *orphans;
    size_t n_orphans;
    int listeners[8];
    char where[8][TEXT_LEN];    /* their addresses */
    size_t n_listeners;
    bool hold;                  /* no end of data while this is set */
    struct pollfd *pfds;
    size_t n_pfds;
} Traffic;

void traffic_init(Traffic *t);
void traffic_free(Traffic *t);

/* traffic_listen() - one more server, on a free port; its address */
const char *traffic_listen(Traffic *t);

/*
 * traffic_add() - open a connection
 *
 * @where: the oforward's address
 * @listener: index of the server that must get it
 * @up: bytes from client to server, @down: from server to client
 *
 * The result is good until the next call.
 */
Flow *traffic_add(Traffic *t, const char *where, size_t listener, uint64_t up,
                  uint64_t down);

/* traffic_run() - move bytes until until(t); false if ms pass before that */
bool traffic_run(Traffic *t, bool (*until)(const Traffic *t), int ms);

/* Conditions for traffic_run() */
bool traffic_paired(const Traffic *t);  /* each has its server */
bool traffic_done(const Traffic *t);    /* each got all and its regular end */
bool traffic_ended(const Traffic *t);   /* each has ended, one way or other */
bool traffic_never(const Traffic *t);   /* false: runs for the whole time */

/* traffic_leave() - the client of flow i goes away with a reset */
void traffic_leave(Traffic *t, size_t i);

/* Bytes so far, both directions of all flows */
uint64_t traffic_sent(const Traffic *t);
uint64_t traffic_moved(const Traffic *t);       /* received */

/* traffic_settle() - run until nothing can be sent any more */
void traffic_settle(Traffic *t);

#endif
