/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * channel.h - channels of every kind, and a process that plays QEMU
 *
 * Two daemons are joined directly where that is possible (unix, tcp, a pair of
 * FIFOs, a socket pair).  Where it is not, a relay passes bytes on, a forked
 * child with two ends, which does what QEMU does between the host's socket and
 * the guest's device.  The test gives it the commands of RelayCommand.
 */
#ifndef CHANNEL_H
#define CHANNEL_H

#include "harness.h"

typedef enum RelayKind {
    RELAY_LISTEN,               /* unix socket that the daemon connects to */
    RELAY_CONNECT,              /* unix socket that the daemon listens on */
    RELAY_FIFO,                 /* other ends of FIFOs PATH.in, PATH.out */
    RELAY_PTY,                  /* master of a pty; the daemon has the slave */
} RelayKind;

typedef struct RelayEnd {
    RelayKind kind;
    char path[PATH_LEN];        /* of socket, FIFOs or the pty's slave */
    int master;                 /* descriptor of the master, for RELAY_PTY */
} RelayEnd;

/* What a relay does until the next command */
typedef enum RelayCommand {
    RELAY_GO = 'g',             /* pass all bytes on */
    RELAY_STALL = 's',          /* pass nothing on */
    RELAY_STALL_0 = 'a',        /* pass nothing on that end 0 sends */
    RELAY_STALL_1 = 'b',        /* pass nothing on that end 1 sends */
    RELAY_CUT = 'c',            /* close both ends, then pass all on again */
    RELAY_AWAY = 'o',           /* close end 0 and keep it closed */
} RelayCommand;

typedef struct Relay {
    pid_t pid;                  /* the child */
    int control;                /* socket for commands and their answers */
} Relay;

/* relay_pty() - make a pty; fills in the relay's end of it */
void relay_pty(RelayEnd *end);

/* relay_start() - fork a relay between two ends; ends is copied */
void relay_start(Relay *r, const RelayEnd ends[2]);

/* relay_tell() - give a command, and wait until the relay obeys it */
void relay_tell(Relay *r, RelayCommand command);

/*
 * relay_drained() - wait until the daemon at end 0 or 1 has read all bytes that
 * the relay has for it; the end must be a socket or FIFOs
 */
void relay_drained(Relay *r, int end);

/* The kinds of channel that two daemons can have between them */
typedef enum ChannelKind {
    CHANNEL_UNIX,               /* unix socket */
    CHANNEL_TCP,                /* TCP on 127.0.0.1 */
    CHANNEL_VIRTSERIAL,         /* two FIFOs, which each daemon has names for */
    CHANNEL_ISASERIAL,          /* pty - relay - pty */
    CHANNEL_FD,                 /* socket pair, inherited */
    CHANNEL_QEMU_VIRTSERIAL,    /* unix socket - relay - FIFOs */
    CHANNEL_QEMU_ISASERIAL,     /* unix socket - relay - pty */
    CHANNEL_KINDS,              /* number of kinds but for CHANNEL_CABLE */
    CHANNEL_CABLE = CHANNEL_KINDS,      /* unix socket - relay - unix socket */
} ChannelKind;

typedef struct Channel {
    char option[2][TEXT_LEN];   /* argument of -c; [0] host, [1] guest */
    StartOptions start[2];      /* options for daemon_start_with() */
    Relay relay;                /* valid for kinds with a relay */
} Channel;

/* channel_make() - make a channel; its files' names begin with name */
void channel_make(Channel *c, ChannelKind kind, const char *name);

const char *channel_kind_name(ChannelKind kind);

/* Two daemons and the channel between them */
typedef struct Pair {
    Channel channel;
    Daemon *host;
    Daemon *guest;
} Pair;

/* pair_start() - start both daemons, with options, and wait for "channel up" */
void pair_start(Pair *p, ChannelKind kind, const char *host_options,
                const char *guest_options);

#endif
