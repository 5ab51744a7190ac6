/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * pair.h - two engines in the box, and the line between them
 *
 * Both run in one loop.  What the one says goes to the other through the test,
 * which may lose and change bytes, or (pair_new_direct()) straight.  The second
 * one serves "s", whose target's listener is the test's.
 */
#ifndef PAIR_H
#define PAIR_H

#include "virtproxy.h"

typedef struct Pair Pair;

/* An end of the line, where one of the engines is */
typedef struct End {
    Pair *pair;
    int fd;                 /* -1: cut */
    uint8_t buf[65536 + 1]; /* for the engine at this end */
    size_t len;             /* bytes in buf */
    uint64_t moved;         /* bytes that came from it */
} End;

struct Pair {
    VPLoop *loop;
    VPDriver *drv[2];       /* the clients' side, the targets' side */
    const VPConfig *config;
    bool lost[2];           /* this side has no channel */
    bool direct;            /* no line, and no ends of it */
    End end[2];
    int listener;           /* the target behind the service "s" */
    VPAddr addr;            /* of the listener */
    bool tcp;               /* clients and targets: they can be reset then */
    /* what the line does to @len bytes at @data from @from; there is room */
    void (*line)(Pair *p, int from, uint8_t *data, size_t *len);
    int pieces;             /* that the line carried so far */
    bool cut;               /* the line is about to be cut: all is lost */
};

/* pair_new() - both are there, and plugged; @config is used on and on */
void pair_new(Pair *p, const VPConfig *config, bool tcp);

/* pair_new_direct() - both are there, for pair_plug() */
void pair_new_direct(Pair *p, const VPConfig *config);

/* pair_free() - nothing is left of them */
void pair_free(Pair *p);

/* pair_boot() - a new engine at side @which, instead of one that was freed */
void pair_boot(Pair *p, int which);

/* pair_plug() - a new channel; if direct once both have lost the old one */
void pair_plug(Pair *p);

/* pair_cut() - what is on the line is lost */
void pair_cut(Pair *p);

/* pair_up() - are both? */
bool pair_up(const Pair *p);

/* pair_wait() - until both are up; as long as a handshake may take at most */
void pair_wait(Pair *p);

/* pair_check() - both are up, in the same session */
void pair_check(const Pair *p);

#endif
