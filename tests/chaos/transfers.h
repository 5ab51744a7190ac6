/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * transfers.h - connections that send all the time over the simulated line
 */
#ifndef TRANSFERS_H
#define TRANSFERS_H

#include "sim.h"

#define ENDLESS (1ull << 40)

void wait_until(uint64_t time);

/* transfers_line() - the channel is a socket's; after world_init() */
void transfers_line(void);

/* transfers_start() - both are up; what follows begins at some moment */
void transfers_start(void);
void transfers_end(void);

/* transfer() - a connection that sends from machine @from all the time */
App *transfer(int from);

/* transfers() - @n of them, and up to half a second for them to begin */
void transfers(int from, int n);

/* arrived() - bytes that @a's peer got */
uint64_t arrived(const App *a);

/* all_arrived() - bytes of all connections that came to machine @to */
uint64_t all_arrived(int to);

#endif
