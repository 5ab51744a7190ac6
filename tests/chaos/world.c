/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * world.c - the machines' lives, and time
 *
 * What the program around the engine does (open the channel, open it again
 * when it is lost, 0.1 s to 5 s apart, accept on it) is done here as
 * qemu-vp.c does it.
 */
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>

#include "sim.h"

#define RETRY_MIN (100 * MS)
#define RETRY_MAX (5 * SECOND)
/* Steps between looks at the engines' invariants. */
#define CHECK_STEPS 16

/* ---- machines ----------------------------------------------------------- */

/* machine_reopen_later() - the wait grows from attempt to attempt */
static void machine_reopen_later(Machine *m)
{
    m->reopen_at = machine_now(m) + m->reopen_wait;
    m->reopen_wait = 2 * m->reopen_wait < RETRY_MAX ? 2 * m->reopen_wait
                                                    : RETRY_MAX;
}

static void channel_lost(void *opaque, const char *reason, bool was_up)
{
    Machine *m = opaque;

    (void)reason;
    m->channel = -1;
    m->down_since = machine_now(m);
    m->reopen_at = NEVER;
    if (was_up) {
        m->reopen_wait = RETRY_MIN;
    }
    if (world.kind[m->index] != VP_CHN_SOCKET || m->index == 0) {
        machine_reopen_later(m);
    }
}

static void machine_attach(Machine *m, int fd)
{
    VPChannelKind kind = world.kind[m->index];

    int wfd = world.fifo && m->index == 1 ? wire_pair(m, fd) : fd;

    m->channel = fd;
    m->down_before += machine_now(m) - m->down_since;
    m->reopen_at = NEVER;
    SIM_ASSERT(vp_attach(m->drv, fd, wfd, kind, kind == VP_CHN_SOCKET
                         ? VP_CONNECTED : VP_OPENED) == 0);
}

/* machine_reopen() - open the channel, if it is time */
static bool machine_reopen(Machine *m)
{
    int fd;

    if (m->channel >= 0 || m->reopen_at > machine_now(m)) {
        return false;
    }
    fd = wire_open(m);
    if (fd >= 0) {
        machine_attach(m, fd);
    } else {
        machine_reopen_later(m);
    }
    return true;
}

/* machine_accept() - somebody has connected to the listening channel */
static bool machine_accept(Machine *m)
{
    int fd = wire_accept(m);

    if (fd < 0) {
        return false;
    }
    vp_offer(m->drv, fd, VP_ACCEPTED);
    if (m->channel < 0) {
        m->channel = fd;
        m->down_before += machine_now(m) - m->down_since;
    }
    return true;
}

static VPAddr service_addr(Service service)
{
    VPAddr addr = { .len = sizeof(struct sockaddr_in) };
    struct sockaddr_in *in = (void *)&addr.ss;

    in->sin_family = AF_INET;
    in->sin_port = htons((uint16_t)service);
    return addr;
}

static void machine_start(int index)
{
    Machine *m = machine[index];
    char name[16];

    m->alive = true;
    m->poked = true;
    m->channel = -1;
    m->rng = rng() ^ mix(world.life);
    m->draws = world.draws[index] = 0;
    m->pid = (int)rnd(30000);
    m->reopen_wait = RETRY_MIN;
    m->down_since = machine_now(m);
    m->down_before = 0;
    sim_on = m;
    m->loop = engine_loop_new();
    m->drv = vp_new(m->loop, 0, &world.config, channel_lost, m);
    SIM_ASSERT(m->drv != NULL);
    for (int i = 0; i < SIM_SERVICES; i++) {
        VPAddr addr[2] = { service_addr((Service)i) };
        size_t n = 1;

        snprintf(name, sizeof(name), "service%d", i);
        vp_set_oforward(m->drv, machine_open(m, FILE_LISTEN, i), name);
        if (i == SVC_SECOND) {
            addr[0] = service_addr(SVC_REFUSED);
            addr[n++] = service_addr(SVC_SECOND);
        }
        if (i != SVC_UNKNOWN) {
            vp_set_iforward(m->drv, name, addr, n);
        }
    }
    m->reopen_at = NEVER;
    if (world.kind[index] != VP_CHN_SOCKET || index == 0) {
        m->reopen_at = machine_now(m);
    }
    sim_on = NULL;
}

/*
 * machine_end() - the daemon is gone: first its descriptors, then its memory
 * @killed:  else it has time to say goodbye
 */
static void machine_end(Machine *m, bool killed)
{
    sim_on = m;
    if (!killed) {
        vp_free(m->drv);
    }
    for (int fd = 0; fd < SIM_FDS; fd++) {
        File *f = &m->files[fd];
        Sock *s = &m->socks[f->index];

        if (f->kind == FILE_SOCK) {
            sock_close(m, s, 0, s->linger[0]);
        } else if (f->kind == FILE_WIRE) {
            wire_close(f, killed);
        }
        f->kind = FILE_FREE;
    }
    for (int i = 0; i < m->top; i++) {
        if (m->socks[i].waiting) {
            m->socks[i].waiting = false;
            m->waiting[m->socks[i].service]--;
            sock_close(m, &m->socks[i], 0, true);
        }
    }
    m->ghost = true;
    if (killed) {
        vp_free(m->drv);
    }
    vp_loop_free(m->loop);
    m->ghost = m->alive = false;
    m->channel = -1;
    sim_on = NULL;
}

uint64_t duty_next(int index, uint64_t at)
{
    uint64_t on = world.duty_on[index], all = on + world.duty_off[index];

    return at == NEVER || all == on || at % all < on ? at
           : at - at % all + all;
}

/* machine_due() - when it has to run next; world time */
static uint64_t machine_due(Machine *m)
{
    uint64_t at = m->wake;

    if (!m->alive) {
        return world.restart_at[m->index];
    }
    at = m->channel < 0 && m->reopen_at < at ? m->reopen_at : at;
    at = at == NEVER ? NEVER : at + m->skew;
    at = m->poked || m->unfinished ? world.now : at;
    at = at > m->paused_until ? at : m->paused_until;
    return duty_next(m->index, at);
}

static bool machine_run(Machine *m)
{
    const char *wrong = NULL;

    if (machine_due(m) > world.now) {
        return false;
    }
    if (!m->alive) {
        machine_start(m->index);
        return true;
    }
    sim_on = m;
    m->wake = NEVER;
    if (!machine_reopen(m)) {
        while (machine_accept(m)) {
        }
    }
    SIM_ASSERT(vp_loop_run(m->loop) == 0);
    if (world.steps++ % CHECK_STEPS == 0 && engine_up(m->drv)) {
        wrong = engine_check(m->drv);
    }
    sim_on = NULL;
    if (wrong != NULL) {
        sim_fail("machine %c: %s", 'A' + m->index, wrong);
    }
    return true;
}

/* ---- what befalls them -------------------------------------------------- */

void world_break(void)
{
    world.breaks++;
    world.unsettled[0] = world.unsettled[1] = true;
}

void world_kill(int index, bool gently)
{
    Machine *m = machine[index];

    if (!m->alive) {
        return;
    }
    sim_note("machine %c's daemon is %s", 'A' + index,
             gently ? "ended" : "killed");
    world_break();
    machine_end(m, !gently);
    world.restart_at[index] = world.now + rnd((uint32_t)world.restart_max);
}

void world_snapshot(int index)
{
    Machine *m = machine[index];

    if (m->alive && world.throws) {
        free(world.snapshot[index]);
        world.snapshot[index] = malloc(m->used);
        SIM_ASSERT(world.snapshot[index] != NULL);
        memcpy(world.snapshot[index], m, m->used);
        world.snapshot_at[index] = world.now;
        sim_note("snapshot of machine %c", 'A' + index);
    }
}

void world_throw_back(int index)
{
    world.throw_due[index] = world.snapshot_at[index] != 0 &&
                             world.thrown[index] < SIM_BRANCHES - 1;
}

static void throw_back(int index)
{
    Machine *m = machine[index];
    File before[SIM_FDS];

    world.throw_due[index] = false;
    world.thrown[index]++;
    sim_note("machine %c goes back to %.6f s", 'A' + index,
             (double)world.snapshot_at[index] / SECOND);
    world_break();
    memcpy(before, m->files, sizeof(before));
    memcpy(m, world.snapshot[index],
           ((Machine *)world.snapshot[index])->used);
    if (m->stopped_at != 0 && m->paused_until > world.snapshot_at[index]) {
        m->paused_until += world.now - world.snapshot_at[index];
    }
    m->skew += world.now - world.snapshot_at[index];
    m->poked = true;
    for (int fd = 0; fd < SIM_FDS; fd++) {
        if (m->files[fd].kind == FILE_WIRE) {
            wire_rebind(m, &m->files[fd]);
        }
    }
    for (int fd = 0; fd < SIM_FDS; fd++) {
        bool kept = false;

        for (int i = 0; i < SIM_FDS; i++) {
            kept |= m->files[i].kind == FILE_WIRE &&
                    m->files[i].serial == before[fd].serial;
        }
        if (before[fd].kind == FILE_WIRE && !kept) {
            wire_close(&before[fd], true);
        }
    }
    apps_thrown_back(m);
    /* a snapshot serves again: the same time may be lived many times */
    world.snapshot_at[index] = world.now - m->skew +
                               ((Machine *)world.snapshot[index])->skew;
}

void world_damage(Damage damage, uint32_t arg)
{
    Machine *m = machine[arg & 1];

    switch (damage) {
    case OUTAGE:
        world.outage_until = world.now + arg * MS;
        sim_note("no channel for %u ms", arg);
        wires_cut((CutKind)(arg % CUT_KINDS));
        break;
    case CUT:
        sim_note("the channel is cut, kind %u", arg);
        wires_cut((CutKind)arg);
        break;
    case KILL:
        world_kill(arg & 1, (arg & 4) != 0);
        if (arg & 2) {
            world_kill(!(arg & 1), (arg & 8) != 0);
        }
        break;
    case PAUSE:
        if (machine_stopped(m)) {
            break;
        }
        m->stopped_at = 0;
        m->paused_until = world.now + (arg >> 1) * MS;
        sim_note("machine %c pauses for %u ms", 'A' + m->index, arg >> 1);
        break;
    case STOP:
        machine_stop(m, (arg >> 1) * MS);
        sim_note("machine %c stands still for %u ms", 'A' + m->index,
                 arg >> 1);
        break;
    case THROW_BACK:
        if (world.snapshot_at[arg & 1] != 0) {
            world_throw_back(arg & 1);
            break;
        }
        /* fall through */
    default:
        world_snapshot(arg & 1);
        break;
    }
}

/* ---- time --------------------------------------------------------------- */

void world_rate(uint32_t rate)
{
    world.rate[0] = world.rate[1] = rate;
}

void world_latency(uint32_t latency)
{
    world.latency[0] = world.latency[1] = latency;
}

void world_init(uint64_t seed)
{
    memset(&world, 0, sizeof(world));
    world.seed = seed;
    world.rng = mix(seed);
    world.now = SECOND;
    world.pass_us = 5;
    world_rate(1000000000);
    world_latency(20);
    world.chunk = 65536;
    world.out_cap = world.in_cap = 1 << 18;
    world.config = (VPConfig){
        .grace = 30,
        .max_conns = 1000,
        .max_half_open = 1000,
        .max_opens = 100000,
    };
    world.damage_max = 4096;
    world.restart_max = SECOND;
    world.restart_at[0] = world.restart_at[1] = world.now;
    world.mix = (Mix){ .total_max = 10000, .chunk_max = 4096 };
    world.end_by = NEVER;
    sim_log();
}

void world_start(void)
{
#ifdef __GLIBC__
    /* runs are many and short: what one gave back serves the next */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
    for (int i = 0; i < 2; i++) {
        if (machine[i] == NULL) {
            machine[i] = mmap(NULL, SIM_MEMORY, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                              -1, 0);
            SIM_ASSERT(machine[i] != MAP_FAILED);
        }
        memset(machine[i], 0, sizeof(*machine[i]));
        machine[i]->index = i;
        machine[i]->own_memory = world.throws;
        machine[i]->used = (sizeof(*machine[i]) + 63) / 64 * 64;
        machine[i]->channel = -1;
    }
    wires_init();
}

/* world_open() - a program connects */
static bool world_open(void)
{
    Machine *m = machine[rnd(2)];
    Service service = chance(world.mix.bad)
                      ? (Service)(SVC_REFUSED + rnd(3)) : (Service)rnd(4);
    int used = 0;

    if (world.to_open == 0 || world.now < world.open_at) {
        return false;
    }
    world.open_at = world.now + rnd(world.open_gap);
    for (int i = 0; i < m->top; i++) {
        used += m->socks[i].state != SOCK_FREE;
    }
    if (!m->alive || used > SIM_SOCKS / 2) {
        return true; /* nobody listens: that is known without us */
    }
    world.to_open--;
    app_client(m, service);
    return true;
}

/* world_events() - what is due by the clock */
static bool world_events(void)
{
    for (int i = 0; i < world.nevents; i++) {
        Event *e = &world.event[i];

        if (e->at <= world.now) {
            e->at = NEVER;
            world.ndamages[e->damage]++;
            world_damage(e->damage, e->arg);
            return true;
        }
    }
    return false;
}

/* world_next() - when anything but machine @m has something to do */
static uint64_t world_next(const Machine *m)
{
    uint64_t next = wires_next(), at;

    for (int i = 0; i < 2; i++) {
        at = machine[i] != m ? machine_due(machine[i]) : NEVER;
        next = at < next ? at : next;
        at = machine_stopped(machine[i]) ? machine[i]->paused_until
             : apps_next(machine[i]);
        next = at < next ? at : next;
        at = socks_next(machine[i]);
        next = at < next ? at : next;
    }
    for (int i = 0; i < world.nevents; i++) {
        next = world.event[i].at < next ? world.event[i].at : next;
    }
    if (world.to_open > 0 && world.open_at < next) {
        next = world.open_at;
    }
    return next;
}

bool world_step(void)
{
    Machine *first = machine[rnd(2)];
    Machine *second = machine[!first->index];
    Machine *soon = machine_due(first) < machine_due(second) ? first : second;
    uint64_t next;
    bool moved;

    moved = wires_run();
    moved |= world_events();
    moved |= world_open();
    moved |= !machine_stopped(first) && apps_run(first);
    moved |= !machine_stopped(second) && apps_run(second);
    moved |= machine_run(first);
    moved |= machine_run(second);
    for (int i = 0; i < 2; i++) {
        if (world.throw_due[i]) {
            throw_back(i);
            moved = true;
        }
    }
    if (world.now > world.end_by) {
        apps_check_end();
        sim_fail("the run does not come to its end");
    }
    if (moved) {
        return true;
    }
    soon = machine_due(first) < machine_due(second) ? first : second;
    next = world_next(soon);
    if (machine_due(soon) <= next) {
        if (machine_due(soon) == NEVER) {
            return false;
        }
        if (soon->alive && soon->wake + soon->skew == machine_due(soon)) {
            /* it sleeps inside its select(), as it would in earnest */
            world.permit = next;
            soon->poked = true;
            machine_run(soon);
            world.permit = 0;
        } else {
            world.now = machine_due(soon);
        }
    } else if (next > world.now) {
        world.now = next;
    } else {
        world.now++; /* it couldn't be done: try again */
    }
    return true;
}

/* world_settled() - is nothing to come, and nothing left for the engines? */
static bool world_settled(void)
{
    if (world.now < world.damage_until) {
        return false;
    }
    for (int i = 0; i < world.nevents; i++) {
        if (world.event[i].at != NEVER) {
            return false;
        }
    }
    for (int i = 0; i < 2; i++) {
        if (!machine[i]->alive || !engine_up(machine[i]->drv) ||
            engine_conns(machine[i]->drv) > 0 ||
            engine_unacked(machine[i]->drv) > 0) {
            return false;
        }
    }
    return true;
}

void world_run(void)
{
    while (world.to_open > 0 || !apps_done() || !world_settled()) {
        if (!world_step()) {
            apps_check_end();
            sim_fail("nothing will ever happen any more");
        }
    }
    apps_check_end();
    for (int i = 0; i < 2; i++) {
        const char *wrong = engine_check(machine[i]->drv);

        if (wrong != NULL) {
            sim_fail("machine %c at the end: %s", 'A' + i, wrong);
        }
    }
}

void world_idle(uint64_t after, uint64_t time)
{
    uint64_t begin = world.now + after;
    unsigned before, passes;

    world.end_by = NEVER; /* that was for the run */
    while (world.now < begin && world_step()) {
    }
    before = machine[0]->passes + machine[1]->passes;
    while (world.now < begin + time && world_step()) {
    }
    passes = machine[0]->passes + machine[1]->passes - before;
    /* a packet of 40 bytes every 5 s, and its answer, even byte by byte */
    if (passes > 20 + 20 * (world.one_byte ? 10u : 1u) * time / SECOND) {
        sim_fail("%u passes in %llu s of idleness", passes,
                 (unsigned long long)(time / SECOND));
    }
}

void world_free(void)
{
    for (int i = 0; i < 2; i++) {
        Machine *m = machine[i];

        if (m->alive) {
            machine_end(m, false);
        }
        for (int j = 0; j < m->top; j++) {
            machine_free(m, m->socks[j].rx[0].data);
            machine_free(m, m->socks[j].rx[1].data);
            m->socks[j].rx[0].data = m->socks[j].rx[1].data = NULL;
        }
        free(world.snapshot[i]);
    }
    wires_free();
}
