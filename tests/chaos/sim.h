/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sim.h - two machines, each with an engine, in a world of our own
 *
 * The engine is compiled here with its system calls replaced (engine.c), so a
 * whole run - both daemons, the channel between them, the programs that talk
 * through them, and time - takes place in one thread of one process.  A run
 * follows from its seed alone and can be replayed byte by byte; time stands
 * still while nothing happens, so hours of silence cost nothing; any system
 * call can be made to fail; and one side can be thrown back in time by
 * copying its memory.  What real sockets would add is covered by the runs
 * with real processes (tests/daemon/test_life.c, test_outage.c).
 *
 *   sim.c     a machine: memory, descriptors, sockets, select(), the log
 *   wire.c    the channel: buffers, speed, delay, and all that goes wrong
 *   apps.c    the programs at the connections' ends, and the oracle that
 *             knows which byte, end or reset each of them may see
 *   world.c   starts, kills and throws back machines; makes time pass
 *   engine.c  the engine, with these machines' system calls
 *
 * Local sockets behave as TCP does on Linux where the engine could tell: data
 * before an error, an error only once, an error taken by write() no longer
 * seen by read(), a reset for data that comes after close().
 */
#ifndef SIM_H
#define SIM_H

#include "tests/lib/engine.h"
#include "tests/lib/log.h"

#include <check.h>
#include <stdio.h>
#include <sys/types.h>

#define MS 1000ull
#define SECOND 1000000ull
#define NEVER UINT64_MAX

#define SIM_FDS 256
#define SIM_SOCKS 200
#define SIM_SIDES 2048
#define SIM_SERVICES 7
#define SIM_BRANCHES 12
#define SIM_SEGMENTS 12

/* ---- chance: all of a run follows from world.rng ------------------------ */

uint64_t mix(uint64_t x);
uint64_t rng(void);
uint32_t rnd(uint32_t n);           /* 0 .. n - 1 */
uint32_t rnd_log(uint32_t lo, uint32_t hi); /* each magnitude as likely */
bool chance(unsigned per_mille);

/* ---- bytes on their way ------------------------------------------------- */

typedef struct Buf {
    uint8_t *data;
    uint32_t cap;
    uint32_t off;
    uint32_t len;
} Buf;

uint32_t buf_room(const Buf *b);
void buf_put(Buf *b, const void *data, uint32_t len);
uint32_t buf_get(Buf *b, void *data, uint32_t len); /* data NULL: skip */

/* ---- a machine ---------------------------------------------------------- */

/* How a program behaves at its end of a connection. */
typedef enum AppEnd {
    FIN_AFTER_SEND,
    FIN_AFTER_EOF,   /* a server that answers until its client is done */
    CLOSE_EARLY,     /* at end_at, whatever the other one still sends */
    ABORT,           /* at end_at, with a reset */
} AppEnd;

typedef struct App {
    int number;          /* of its Side; 0: none */
    uint64_t total;      /* to send */
    uint64_t sent;
    uint64_t got;
    uint32_t wchunk, rchunk;
    uint64_t wpause, rpause;
    uint64_t write_at, read_at; /* not before; the machine's time */
    AppEnd end;
    uint64_t end_at;     /* bytes sent and received */
    bool fin;            /* sent */
    bool eof;            /* seen */
    uint8_t head[8];     /* first bytes from the other side: who it is */
    int peer;            /* number of the other side; 0: not known yet */
    uint32_t branches;   /* of the other side's, that fit what came: a set */
    int known;           /* how many of them were looked at */
} App;

typedef enum SockState {
    SOCK_FREE,
    SOCK_NEW,
    SOCK_CONNECTING,
    SOCK_OPEN,
} SockState;

/* A local connection; of its two ends [0] is the engine's, [1] the app's. */
typedef struct Sock {
    SockState state;
    int service;
    bool waiting;        /* for the engine to accept it */
    int tries;           /* connect() calls so far */
    uint64_t connect_at; /* SOCK_CONNECTING: done by then */
    int connect_err;     /* SOCK_CONNECTING: done with this errno value */
    Buf rx[2];           /* bytes for that end to read */
    bool fin[2];         /* no more will come for that end */
    bool shut[2];        /* that end has shut down its sending */
    bool dead[2];        /* reset by the other end */
    bool closed[2];
    bool linger[2];      /* close() is to send a reset */
    int err[2];          /* for that end to be told, once */
    App app;
} Sock;

typedef enum FileKind {
    FILE_FREE,
    FILE_LISTEN,
    FILE_SOCK,
    FILE_WIRE,
} FileKind;

typedef struct File {
    FileKind kind;
    int index;           /* of service, sock or wire */
    int end;             /* of the wire */
    unsigned serial;     /* of the wire */
    int only;            /* VP_READ or VP_WRITE: half of a pair; else 0 */
    uint64_t accept_at;  /* FILE_LISTEN: not before, out of descriptors */
} File;

typedef struct Machine {
    int index;
    bool alive;
    bool ghost;          /* being freed after its death: calls do nothing */
    bool poked;          /* something happened that its select() waits for */
    bool unfinished;     /* left the loop with descriptors ready */
    unsigned turn;       /* passes since the others had one */
    uint64_t skew;       /* its clock is behind by so much: set back */
    uint64_t paused_until; /* not run before; world time */
    uint64_t stopped_at; /* its clock stands still there until then */
    uint64_t wake;       /* its select() times out; its own time */
    uint64_t rng;        /* its random numbers */
    uint64_t draws;      /* the engine's counter of random numbers */
    int pid;
    unsigned passes;     /* through select() */
    unsigned vain;       /* passes since a byte moved */

    VPLoop *loop;
    VPDriver *drv;
    int channel;         /* descriptor; -1: none */
    uint64_t reopen_at;  /* its own time */
    uint64_t reopen_wait;
    uint64_t down_since;
    uint64_t down_before; /* without channel since it was up, but for that */

    File files[SIM_FDS];
    Sock socks[SIM_SOCKS];
    int top;             /* those from here on were never used */
    int waiting[SIM_SERVICES]; /* connections to be accepted */

    /* its memory, right behind this structure, in one piece: to be copied */
    bool own_memory;     /* else malloc() is used, for the sanitizers */
    size_t used;
    void *free_list[32]; /* by size, a power of two */
} Machine;

#define SIM_MEMORY (64u << 20)

extern Machine *machine[2];
extern Machine *sim_on; /* whose engine runs; NULL: calls are real ones */

uint64_t machine_now(const Machine *m);
/* machine_stop() - its clock stands still, and nothing in it runs */
void machine_stop(Machine *m, uint64_t time);
bool machine_stopped(const Machine *m);
void *machine_alloc(Machine *m, size_t size);
void machine_free(Machine *m, void *p);
int machine_open(Machine *m, FileKind kind, int index);

int sock_new(Machine *m, int service);
ssize_t sock_read(Sock *s, int end, void *data, size_t len); /* or -errno */
ssize_t sock_write(Sock *s, int end, const void *data, size_t len);
void sock_shutdown(Sock *s, int end);
void sock_close(Machine *m, Sock *s, int end, bool reset);
bool sock_readable(const Sock *s, int end);
bool sock_writable(const Sock *s, int end);
void sock_connected(Machine *m, Sock *s);
/* sock_next() - when a connect() of the engine's is done; world time */
uint64_t socks_next(Machine *m);

/* ---- the channel -------------------------------------------------------- */

typedef enum Damage {
    FLIP,        /* a bit; arg: which */
    DROP,        /* arg bytes */
    DOUBLE,      /* one byte */
    REPEAT,      /* the last arg bytes once more */
    NOISE,       /* arg bytes of it */
    ECHO,        /* arg bytes of those that went the other way */
    OLD,         /* of an earlier session: arg & 0xffff bytes from arg >> 16 */
    STALL,       /* this direction, for arg ms */
    STANDSTILL,  /* both, for arg ms, whoever connects anew */
    CUT,         /* arg: a CutKind */
    KILL,        /* a daemon; arg: bit 0 which, 1 both, 2 and 3 gently */
    PAUSE,       /* a machine; arg: which + 2 * ms */
    STOP,        /* as PAUSE, and the machine's clock stands still */
    SNAPSHOT,    /* of a machine; arg: which */
    THROW_BACK,  /* arg: which; to its snapshot, or makes one */
    OUTAGE,      /* a cut, and none can connect for arg ms */
    DAMAGES,
} Damage;

typedef enum CutKind {
    CUT_CLEAN,     /* what was on its way arrives first */
    CUT_LOSSY,     /* a part of it does */
    CUT_RESET,     /* none, and the ends get errors */
    CUT_HALF_DEAD_0, /* end 0 doesn't notice for some time */
    CUT_HALF_DEAD_1,
    CUT_KINDS,
} CutKind;

/* What happens at which byte of a direction. */
typedef struct Plan {
    int dir;
    uint64_t offset;
    Damage damage;
    uint32_t arg;
} Plan;

/* What happens at a time. */
typedef struct Event {
    uint64_t at;
    Damage damage;
    uint32_t arg;
} Event;

#define SIM_EVENTS 16
#define SIM_TAKEN 65536
#define SIM_CHUNKS 8192

typedef struct Lane {
    Buf out;             /* taken from the sender */
    Buf air;             /* on the way */
    Buf in;              /* for the receiver to read */
    unsigned first, count; /* chunks of air */
    uint64_t busy_until; /* the line */
    uint64_t last_due;   /* of the chunk sent last */
    uint64_t stalled_until;
    uint32_t dropping;   /* bytes still to be lost */
    bool fin;            /* the sender will send no more */
    uint32_t record[128];/* virtserial: the writes in out; a ring */
    unsigned rec_first, rec_count;
    struct {
        uint32_t len;
        uint64_t due;
    } chunk[SIM_CHUNKS]; /* a ring */
} Lane;

/*
 * A connection of the channel, or (world.kind[1] is a device) the only wire
 * there is, whose end 0 comes and goes.
 */
typedef struct Wire {
    unsigned serial[2];  /* of the descriptors at its ends; 0: none */
    bool there;          /* end 0 is, as far as a device at end 1 knows */
    bool offered;        /* end 1 has to accept it yet */
    bool eof[2];         /* for that end: the other one is gone */
    int err[2];          /* for that end to be told, once */
    uint64_t hole_until[2]; /* its bytes vanish, then it gets an error */
    bool dumb;           /* nothing passes */
    Lane lane[2];        /* [0] from end 0 to end 1 */
} Wire;

#define SIM_WIRES 6

/* What end 1 of the channel is; the kinds that qemu-vp knows, and how. */
typedef enum Channel {
    SIM_SOCKET,
    SIM_VIRTSERIAL,
    SIM_TTY,
    SIM_FIFO,        /* a pair of them in place of a port */
    SIM_CHANNELS,
} Channel;

const char *channel_name(Channel channel);
/* world_channel() - it is of this kind; after world_init() */
void world_channel(Channel channel);

void wires_init(void);
void wires_free(void);
/* wire_open() - machine @m opens its device, or its socket connects; fd, -1 */
int wire_open(Machine *m);
/* wire_pair() - one more descriptor for writing; then @fd is for reading */
int wire_pair(Machine *m, int fd);
/* wire_accept() - a connection waits for machine @m; fd, or -1: none */
int wire_accept(Machine *m);
ssize_t wire_read(const File *f, void *data, size_t len);
ssize_t wire_write(const File *f, const void *data, size_t len);
bool wire_readable(const File *f);
bool wire_writable(const File *f);
/* wire_close() - @lossy: by a process that died */
void wire_close(const File *f, bool lossy);
void wire_shutdown(const File *f);
/* wire_rebind() - machine @m was thrown back; its descriptor lives on */
void wire_rebind(Machine *m, File *f);
/* wires_cut() - every connection of the channel ends */
void wires_cut(CutKind kind);
bool wires_run(void);         /* moves what is due; was there anything? */
uint64_t wires_next(void);
/*
 * wire_plain() - bytes of a plain stream that arrive within @time
 * @d:     the direction, which nobody else uses
 * @warm:  us that it runs before
 *
 * Both ends have the machines' CPU, and no more to do than to read and write.
 */
uint64_t wire_plain(int d, uint64_t warm, uint64_t time);

/* ---- the programs and the oracle ---------------------------------------- */

/* What a side has sent: it may be thrown back and send something else. */
typedef struct Branch {
    int parent;
    uint64_t fork_at;    /* the bytes before are the parent's */
    int nsegments;
    struct {
        uint64_t from;
        uint64_t salt;
    } segment[SIM_SEGMENTS];
    uint64_t sent;
    bool fin;
} Branch;

typedef struct Side {
    int machine;
    int service;
    bool client;
    int peer;            /* 0: not known yet */
    int breaks;          /* world.breaks when it came */
    bool left;           /* closed early or reset: its peer may see that */
    bool gone;           /* has ended, or was never (thrown back) */
    bool complete;       /* got all and sent all */
    bool lone_eof;       /* got an end of data without any */
    uint64_t got;        /* for messages */
    Branch branch[SIM_BRANCHES];
    int nbranches;
    int current;
} Side;

typedef enum Service {
    SVC_QUICK,   /* connected at once */
    SVC_SLOW,    /* after some time */
    SVC_BUSY,    /* a full queue at first */
    SVC_SECOND,  /* the first address refuses, the second doesn't */
    SVC_REFUSED,
    SVC_REFUSED_LATE,
    SVC_UNKNOWN,
} Service;

/* What kinds of connections a run has. */
typedef struct Mix {
    uint32_t total_min;  /* bytes of one direction */
    uint32_t total_max;  /* bytes beyond total_min, at most */
    uint32_t chunk_min;  /* bytes written at once */
    uint32_t chunk_max;  /* bytes beyond chunk_min, at most */
    uint32_t pause_max;  /* us */
    unsigned rude;       /* per mille that close early or reset */
    unsigned bad;        /* per mille to services that refuse */
    unsigned empty;      /* per mille of directions without a byte */
} Mix;

Sock *app_client(Machine *m, Service service);
void app_server(Machine *m, Sock *s); /* the engine has connected to it */
bool apps_run(Machine *m);
uint64_t apps_next(Machine *m);       /* world time */
bool apps_done(void);
void apps_check_end(void);
void apps_thrown_back(Machine *m);

/* ---- the world ---------------------------------------------------------- */

typedef struct World {
    uint64_t seed;
    uint64_t rng;
    uint64_t now;
    uint64_t permit;     /* the machine that runs may sleep until then */
    uint32_t pass_us;    /* what a pass through a loop takes, at most */
    char what[160];      /* this run, for messages */

    /* the kernels */
    unsigned nasty;      /* per mille of calls that misbehave */
    uint64_t calls;
    uint64_t fault_call; /* this one does */
    int fault;           /* EAGAIN, EINTR, or 0: one byte only */
    bool one_byte;       /* reads and writes on the channel move one byte */
    uint32_t sock_cap;   /* bytes a local socket holds; 0: any number */

    /* the channel */
    VPChannelKind kind[2];
    bool fifo;           /* end 1 is a pair of FIFOs in place of a port */
    uint32_t rate[2];    /* bytes per second, of each direction */
    uint32_t latency[2]; /* us */
    uint32_t jitter[2];  /* us that a chunk takes longer, at most; in order */
    uint32_t chunk;      /* bytes that travel together, at most; 0: of 50 us */
    uint32_t out_cap, in_cap;
    uint64_t outage_until; /* nobody can connect */
    uint64_t standstill_until; /* nothing moves */
    unsigned dumb;       /* per mille of connections that are */
    uint64_t offset[2];  /* bytes that went this way so far */
    unsigned *taken[2];  /* by offset: in which turn a byte went; or NULL */
    unsigned turns;
    const Plan *plan;    /* what is to happen, sorted by direction, offset */
    size_t nplan;
    bool done[64];       /* of plan */
    uint32_t damage_gap; /* mean bytes between damages; 0: none */
    uint32_t damages;    /* set of what may happen */
    uint32_t damage_max; /* bytes of one */
    uint64_t damage_at[2];
    uint64_t damage_until; /* time */
    Event event[SIM_EVENTS];
    int nevents;
    Buf history[2];      /* what went that way lately */
    Buf old[2];          /* what went that way in an earlier session */
    unsigned serial;
    unsigned ndamages[DAMAGES];

    /* the machines */
    VPConfig config;
    uint32_t duty_on[2];  /* us that a daemon gets the CPU at a time */
    uint32_t duty_off[2]; /* us in between, without it; 0: it always has it */
    bool throws;         /* machines may be thrown back */
    uint64_t restart_max; /* us a daemon stays dead, at most */
    uint64_t restart_at[2];
    uint64_t life;       /* what its random numbers follow from, besides */
    bool throw_due[2];
    int thrown[2];       /* so many times; a side has a branch for each */
    uint64_t draws[2];   /* random numbers of that machine's daemon so far */
    unsigned redraws;    /* those that it was given twice */
    bool same_date;      /* at each moment, so that they are the same */
    uint64_t snapshot_at[2]; /* when the last one was made; 0: none */
    void *snapshot[2];

    /* the programs */
    Mix mix;
    unsigned to_open;    /* connections still to come */
    uint32_t open_gap;   /* us between them, at most */
    uint64_t open_at;
    int nsides;
    unsigned steps;
    int breaks;          /* sessions that had to end so far */
    bool unsettled[2];   /* that machine has no new one yet */
    uint64_t bytes;      /* that reached a program */
    unsigned resets;
    bool timed_out;      /* a connect() of a paused machine */
    uint64_t end_by;     /* a run that goes on beyond it hangs */
} World;

extern World world;
extern Wire wires[SIM_WIRES];
extern Side sides[SIM_SIDES]; /* by number, from 1 on */

/* world_init() - machines are there, dead; defaults are a fast clean line */
void world_init(uint64_t seed);
void world_start(void);
/* world_step() - false if nothing will ever happen any more */
bool world_step(void);
/* world_run() - until all programs are done; then the engines are looked at */
void world_run(void);
/*
 * world_idle() - nothing is going on for that long: so nothing should run
 * @after:  what is still on the way by then has arrived
 */
void world_idle(uint64_t after, uint64_t time);
void world_free(void);
/* world_rate(), world_latency() - the same for both directions */
void world_rate(uint32_t rate);
void world_latency(uint32_t latency);
/* duty_next() - when machine @index has the CPU, at @at or after */
uint64_t duty_next(int index, uint64_t at);
/* world_kill() - @gently: it is told to end */
void world_kill(int index, bool gently);
void world_snapshot(int index);
/* world_throw_back() - by the next step; nothing without a snapshot */
void world_throw_back(int index);
/* world_break() - the session can't go on */
void world_break(void);
/* world_damage() - what concerns more than one direction of a wire */
void world_damage(Damage damage, uint32_t arg);

/* sim_fail() - the run is a failure; says which one, and how to repeat it */
void sim_fail(const char *fmt, ...)
    __attribute__((format(printf, 1, 2), noreturn));
/* sim_note() - into the log, between what the engines say */
void sim_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* SIM_ASSERT() - about the simulation itself; libcheck's asserts are slow */
#define SIM_ASSERT(that)                                                    \
    do {                                                                    \
        if (!(that)) {                                                      \
            sim_fail("%s:%d: %s", __FILE__, __LINE__, #that);              \
        }                                                                   \
    } while (0)
/* sim_log() - the log begins anew, with times and machines in it */
void sim_log(void);

/* ---- the engine --------------------------------------------------------- */

/* sim_draws() - let its counter of random numbers be that */
void sim_draws(uint64_t draws);

#endif
