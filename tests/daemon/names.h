/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * names.h - for daemons, a name server that knows one name, and a network
 */
#ifndef NAMES_H
#define NAMES_H

#include "tests/lib/harness.h"

/* What gives a daemon that server, in vp_dir, for StartOptions.setup */
#define NAMES_SETUP "mount -n --bind resolv /etc/resolv.conf"

/*
 * names_server() - a name server's socket, which nobody reads; -1: nobody lets
 * us have one, or daemons mounts of their own
 *
 * vp_dir becomes the working directory; the file resolv there names the server.
 */
int names_server(void);
#define MAY_SERVE_NAMES "/etc/resolv.conf, " MAY_MOUNT \
    ", and port 53, which root may have"

/*
 * names_answer() - fork a process that answers until names_hang()
 *
 * later.test is 127.0.0.1, and there is no other name.
 */
pid_t names_answer(int server);

/*
 * own_network() - have a network of our own, with nothing but the loopback
 *
 * The daemons share it.  False if nobody lets us.
 */
bool own_network(void);
#define OWN_NETWORK "a network of its own (CAP_SYS_ADMIN or user namespaces)"

/* own_network_set() - does anything get through it, from now on? */
void own_network_set(bool up);

/* names_hang() - what is asked from here on gets no answer */
void names_hang(pid_t pid);

#endif
