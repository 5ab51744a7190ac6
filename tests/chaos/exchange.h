/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * exchange.h - a short exchange that takes place again and again
 *
 * A few connections from each machine to the other, some 7 KB each way; it is
 * recorded first, undisturbed, and then something happens to it.
 */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "sim.h"

#define EXCHANGE_CONNS 4

typedef struct Exchange {
    Channel channel;
    Plan plan[3];
    size_t nplan;
    uint64_t fault_call;
    int fault;
    uint64_t length[2]; /* bytes on the channel in the clean exchange */
    uint64_t calls;     /* system calls in the clean exchange */
    uint8_t *bytes[2];  /* the bytes on the channel in the clean exchange */
    unsigned *taken[2]; /* in which turn each of those went; see World */
} Exchange;

/* exchange_begin() - world_init(), for the caller to change something */
void exchange_begin(const Exchange *x);

/* exchange_end() - after world_run(): no connection may have been reset */
void exchange_end(void);

void exchange_run(const Exchange *x);

/* exchange_record() - the clean one: @x is filled in, with one plan to come */
void exchange_record(Exchange *x, Channel channel);

void exchange_free(Exchange *x);

/* stride() - from one byte to the next that has its turn: 1 */
uint64_t stride(void);

#endif
