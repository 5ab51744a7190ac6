/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * talk.h - a few words over single connections
 */
#ifndef TALK_H
#define TALK_H

#include "tests/lib/harness.h"

/* through() - connect to where: [0] is the client's end, [1] the target's */
void through(const char *where, int listener, int fds[2]);

/* talk() - both ways, over what through() made */
void talk(const int fds[2]);

/* check_works() - a new connection to where arrives, and works */
void check_works(const char *where, int listener);

/* check_refused() - nobody listens at where any more */
void check_refused(const char *where);

/* expect_broken() - a reset, where the end of data was seen before */
void expect_broken(int fd);

#endif
