/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * channel.h - channels of every kind, and a process that plays QEMU
 *
 * Two daemons are joined directly where that is possible (unix, tcp, a pair of
 * FIFOs, a socket pair).  Where it is not, a relay sits between them, a forked
 * child with two ends, as QEMU is between the host's socket and the guest's
 * device.  The test tells it to stall, to cut or to be away.
 */
#ifndef CHANNEL_H
#define CHANNEL_H

#include "harness.h"

typedef enum RelayKind {
    RELAY_LISTEN,               /* unix socket; the daemon connects */
    RELAY_CONNECT,              /* unix socket; the daemon listens */
    RELAY_FIFO,                 /* the other ends of PATH.in and PATH.out */
    RELAY_PTY,                  /* master of a pty whose slave is the line */
} RelayKind;

typedef struct RelayEnd {
    RelayKind kind;
    char path[PATH_LEN];        /* RELAY_PTY: name of the slave */
    int master;                 /* RELAY_PTY */
} RelayEnd;

typedef enum RelayCommand {
    RELAY_GO = 'g',             /* pass everything on */
    RELAY_STALL = 's',          /* read nothing */
    RELAY_STALL_0 = 'a',        /* read nothing from end 0 */
    RELAY_STALL_1 = 'b',        /* read nothing from end 1 */
    RELAY_CUT = 'c',            /* close both ends, then serve again */
    RELAY_AWAY = 'o',           /* end 0 is closed and stays so until GO */
} RelayCommand;

typedef struct Relay {
    pid_t pid;
    int control;
} Relay;

/* relay_pty() - make a pty and the relay's end of it */
void relay_pty(RelayEnd *end);

/* relay_start() - what an end has to say goes to the other one */
void relay_start(Relay *r, const RelayEnd ends[2]);

/* relay_tell() - give a command; it is in force on return */
void relay_tell(Relay *r, RelayCommand command);

/*
 * relay_drained() - wait until the daemon at an end, a socket or FIFOs, has
 * read all that was for it
 */
void relay_drained(Relay *r, int end);

/* The kinds of channel that two daemons can have between them */
typedef enum ChannelKind {
    CHANNEL_UNIX,
    CHANNEL_TCP,
    CHANNEL_VIRTSERIAL,         /* two pairs of FIFOs that are one */
    CHANNEL_ISASERIAL,          /* pty - relay - pty */
    CHANNEL_FD,
    CHANNEL_QEMU_VIRTSERIAL,    /* unix socket - relay - FIFOs: as in QEMU */
    CHANNEL_QEMU_ISASERIAL,     /* unix socket - relay - pty */
    CHANNEL_KINDS,
    CHANNEL_CABLE = CHANNEL_KINDS,      /* unix - relay - unix: can be cut */
} ChannelKind;

typedef struct Channel {
    char option[2][TEXT_LEN];   /* what follows -c, [0] host, [1] guest */
    StartOptions start[2];      /* for daemon_start_with() */
    Relay relay;                /* where there is one */
} Channel;

/* channel_make() - name makes its files differ from other channels' */
void channel_make(Channel *c, ChannelKind kind, const char *name);

const char *channel_kind_name(ChannelKind kind);

/* Two daemons and the channel between them */
typedef struct Pair {
    Channel channel;
    Daemon *host;
    Daemon *guest;
} Pair;

/* pair_start() - start both with more options each; the channel is up then */
void pair_start(Pair *p, ChannelKind kind, const char *host_options,
                const char *guest_options);

#endif
