/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * wire.c - the channel between the machines, and what goes wrong with it
 *
 * End 0 is always a socket that connects.  End 1 is one that listens, or a
 * device of a virtual machine: a virtio-serial port or a serial line, with the
 * habits that QEMU and its guests were seen to have; or a pair of FIFOs, which
 * the engine takes for a port, though their habits are others.
 *
 * A byte goes through three buffers: "out", taken from the sender; "air", on
 * the way; "in", for the receiver to read.  Damage is done on the way from
 * the first to the second, counted in bytes that went that direction since
 * the world began, on however many connections.
 */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#define VIRTIO_READ_MAX 4096u
#define VIRTIO_WRITE_MAX 32768u
#define VIRTIO_ENTRIES 128u
#define TTY_READ_MAX 64u
#define HISTORY_LEN 65536u

Wire wires[SIM_WIRES];

static bool is_device(int end)
{
    return world.kind[end] != VP_CHN_SOCKET;
}

const char *channel_name(Channel channel)
{
    static const char *const name[] = { "socket", "virtserial", "tty", "FIFO" };

    return name[channel];
}

void world_channel(Channel channel)
{
    static const VPChannelKind kind[] = {
        VP_CHN_SOCKET, VP_CHN_VIRTSERIAL, VP_CHN_TTY, VP_CHN_VIRTSERIAL,
    };

    world.kind[1] = kind[channel];
    world.fifo = channel == SIM_FIFO;
}

/* is_port() - is an end a virtio-serial port, and no pair of FIFOs? */
static bool is_port(int end)
{
    return world.kind[end] == VP_CHN_VIRTSERIAL && !world.fifo;
}

/* ---- making and ending wires -------------------------------------------- */

static void buf_alloc(Buf *b, uint32_t cap)
{
    *b = (Buf){ .data = malloc(cap), .cap = cap };
    SIM_ASSERT(b->data != NULL);
}

static void buf_clear(Buf *b)
{
    b->off = b->len = 0;
}

/* buf_cut() - drop the last bytes */
static void buf_cut(Buf *b, uint32_t len)
{
    b->len = len < b->len ? len : b->len;
}

static void wire_make(Wire *w)
{
    memset(w, 0, offsetof(Wire, lane));
    for (int d = 0; d < 2; d++) {
        Lane *l = &w->lane[d];

        memset(l, 0, offsetof(Lane, chunk));
        buf_alloc(&l->out, world.kind[d] == VP_CHN_TTY ? 4095 : world.out_cap);
        buf_alloc(&l->air, world.out_cap + world.in_cap);
        buf_alloc(&l->in, world.in_cap);
    }
}

static void wire_free(Wire *w)
{
    for (int d = 0; d < 2; d++) {
        free(w->lane[d].out.data);
        free(w->lane[d].air.data);
        free(w->lane[d].in.data);
        w->lane[d].out.data = w->lane[d].air.data = w->lane[d].in.data = NULL;
    }
}

static bool wire_used(const Wire *w)
{
    return w->lane[0].out.data != NULL;
}

void wires_init(void)
{
    for (int d = 0; d < 2; d++) {
        buf_alloc(&world.history[d], HISTORY_LEN);
    }
    if (is_device(1)) {
        wire_make(&wires[0]);
    }
}

void wires_free(void)
{
    for (int i = 0; i < SIM_WIRES; i++) {
        wire_free(&wires[i]);
    }
    for (int d = 0; d < 2; d++) {
        free(world.history[d].data);
    }
}

static void lane_clear(Lane *l)
{
    buf_clear(&l->out);
    buf_clear(&l->air);
    l->count = l->rec_count = 0;
}

/* lane_lose() - of what is on its way, only a part arrives */
static void lane_lose(Lane *l)
{
    uint32_t keep = rnd(l->out.len + l->air.len + 1);

    buf_cut(&l->out, keep > l->air.len ? keep - l->air.len : 0);
    l->rec_count = l->out.len > 0 ? l->rec_count : 0;
    if (keep < l->air.len) {
        uint32_t len = keep;
        unsigned n = 0;

        buf_cut(&l->air, keep);
        while (len > 0) {
            unsigned i = (l->first + n++) % SIM_CHUNKS;

            l->chunk[i].len = l->chunk[i].len < len ? l->chunk[i].len : len;
            len -= l->chunk[i].len;
        }
        l->count = n;
    }
}

int wire_open(Machine *m)
{
    int end = m->index, i = 0, fd;
    Wire *w = wires;

    if (is_device(end)) {
        w->serial[end] = ++world.serial;
    } else {
        if (world.now < world.outage_until || end != 0) {
            return -1;
        }
        if (!is_device(1)) {
            if (!machine[1]->alive) {
                return -1;
            }
            while (i < SIM_WIRES && wire_used(&wires[i])) {
                i++;
            }
            if (i == SIM_WIRES) {
                return -1; /* a full queue */
            }
            w = &wires[i];
            wire_make(w);
            w->offered = true;
            machine[1]->poked = true;
        } else {
            /* what the port had queued for the last one is thrown away */
            lane_clear(&w->lane[1]);
            buf_clear(&w->lane[1].in);
            machine[1]->poked = true;
        }
        w->serial[0] = ++world.serial;
        w->there = true;
        w->eof[0] = false;
        w->err[0] = 0;
        w->lane[0].fin = w->lane[1].fin = false;
        w->dumb = chance(world.dumb);
    }
    fd = machine_open(m, FILE_WIRE, i);
    m->files[fd].end = end;
    m->files[fd].serial = w->serial[end];
    return fd;
}

int wire_pair(Machine *m, int fd)
{
    File *f = &m->files[fd];
    int wfd = machine_open(m, FILE_WIRE, f->index);

    m->files[wfd] = *f;
    m->files[wfd].only = VP_WRITE;
    f->only = VP_READ;
    return wfd;
}

int wire_accept(Machine *m)
{
    for (int i = 0; i < SIM_WIRES && m->index == 1; i++) {
        Wire *w = &wires[i];

        if (wire_used(w) && w->offered) {
            int fd = machine_open(m, FILE_WIRE, i);

            w->offered = false;
            w->serial[1] = ++world.serial;
            m->files[fd].end = 1;
            m->files[fd].serial = w->serial[1];
            return fd;
        }
    }
    return -1;
}

/* wire_of() - NULL: the descriptor is from another time */
static Wire *wire_of(const File *f)
{
    Wire *w = &wires[f->index];

    return wire_used(w) && f->serial != 0 && w->serial[f->end] == f->serial
           ? w : NULL;
}

void wire_rebind(Machine *m, File *f)
{
    Wire *w = wires;

    if (is_device(f->end) || chance(500)) {
        /* its end is held by something that was not thrown back */
        for (int i = 0; i < SIM_WIRES; i++, w++) {
            if (wire_used(w) && w->serial[f->end] != 0 &&
                (is_device(f->end) || !w->dumb)) {
                f->index = i;
                f->serial = w->serial[f->end];
                return;
            }
        }
        if (is_device(f->end)) {
            wires[0].serial[f->end] = f->serial;
            return;
        }
    }
    m->poked = true;
    f->serial = 0;
}

void wire_close(const File *f, bool lossy)
{
    Wire *w = wire_of(f);
    int e = f->end;

    if (w == NULL) {
        return;
    }
    w->serial[e] = 0;
    machine[!e]->poked = true;
    if (is_device(e)) {
        /* what the guest's kernel had taken for it is thrown away */
        buf_cut(&w->lane[!e].in, rnd(2) ? 0 : w->lane[!e].in.len);
        if (lossy && world.kind[e] == VP_CHN_TTY) {
            lane_lose(&w->lane[e]);
        }
        return;
    }
    w->lane[e].fin = true;
    if (lossy || w->lane[!e].in.len > 0 || is_device(!e)) {
        lane_lose(&w->lane[e]);
    }
    lane_clear(&w->lane[!e]);
    buf_clear(&w->lane[!e].in);
    w->there = false;
    if (w->serial[!e] == 0 && !w->offered && !is_device(1)) {
        wire_free(w);
    }
}

void wire_shutdown(const File *f)
{
    Wire *w = wire_of(f);

    if (w != NULL && !is_device(f->end)) {
        w->lane[f->end].fin = true;
    }
}

/* wire_reset() - end @e gets an error instead of what was on its way to it */
static void wire_reset(Wire *w, int e)
{
    lane_clear(&w->lane[!e]);
    lane_clear(&w->lane[e]);
    buf_clear(&w->lane[!e].in);
    w->err[e] = ECONNRESET;
    w->eof[e] = true;
    machine[e]->poked = true;
}

static void wire_cut(Wire *w, CutKind kind)
{
    int half_dead = kind == CUT_HALF_DEAD_0 ? 0
                    : kind == CUT_HALF_DEAD_1 ? 1 : -1;

    for (int e = 0; e < 2; e++) {
        if (is_device(e)) {
            lane_lose(&w->lane[!e]);
            machine[e]->poked = true;
        } else if (e == half_dead && !is_device(1)) {
            lane_clear(&w->lane[!e]);
            lane_clear(&w->lane[e]);
            w->hole_until[e] = world.now + 1 + rnd(20 * SECOND);
        } else if (kind == CUT_RESET || half_dead == e) {
            wire_reset(w, e);
        } else {
            if (kind != CUT_CLEAN) {
                lane_lose(&w->lane[!e]);
            }
            w->lane[!e].fin = true;
        }
    }
    /* a fast reconnect is not seen by the guest */
    w->there = is_device(1) && chance(300);
}

void wires_cut(CutKind kind)
{
    for (int i = 0; i < SIM_WIRES; i++) {
        if (wire_used(&wires[i]) && wires[i].serial[0] != 0) {
            wire_cut(&wires[i], kind);
        }
    }
}

/* ---- the ends ----------------------------------------------------------- */

ssize_t wire_read(const File *f, void *data, size_t len)
{
    Wire *w = wire_of(f);
    Lane *l;
    int err;

    SIM_ASSERT(f->only != VP_WRITE);
    if (w == NULL) {
        return -ECONNRESET;
    }
    l = &w->lane[!f->end];
    if (l->in.len > 0) {
        if (is_port(f->end)) {
            len = len < VIRTIO_READ_MAX ? len : VIRTIO_READ_MAX;
        } else if (world.kind[f->end] == VP_CHN_TTY) {
            uint32_t most = 1 + rnd(TTY_READ_MAX);

            len = len < most ? len : most;
        }
        return (ssize_t)buf_get(&l->in, data,
                                world.one_byte ? 1 : (uint32_t)len);
    }
    err = w->err[f->end];
    w->err[f->end] = 0;
    if (err != 0) {
        return -err;
    }
    if (world.kind[f->end] == VP_CHN_VIRTSERIAL) {
        return w->there ? -EAGAIN : 0;
    }
    return w->eof[f->end] ? 0 : -EAGAIN;
}

static ssize_t virtserial_write(Wire *w, Lane *l, const void *data, size_t len)
{
    uint32_t n = len < VIRTIO_WRITE_MAX ? (uint32_t)len : VIRTIO_WRITE_MAX;

    if (!w->there || l->rec_count == VIRTIO_ENTRIES ||
        buf_room(&l->out) < n) {
        return -EAGAIN;
    }
    l->record[(l->rec_first + l->rec_count++) % VIRTIO_ENTRIES] = n;
    buf_put(&l->out, data, n);
    return (ssize_t)n;
}

ssize_t wire_write(const File *f, const void *data, size_t len)
{
    Wire *w = wire_of(f);
    Lane *l;
    int err;

    SIM_ASSERT(f->only != VP_READ);
    if (w == NULL) {
        return -EPIPE;
    }
    l = &w->lane[f->end];
    if (is_port(f->end)) {
        return virtserial_write(w, l, data, len);
    }
    if (world.kind[f->end] == VP_CHN_VIRTSERIAL && !w->there) {
        return -EPIPE;
    }
    err = w->err[f->end];
    w->err[f->end] = 0;
    if (err != 0) {
        return -err;
    }
    if (w->eof[f->end]) {
        return -EPIPE;
    }
    if (w->hole_until[f->end] != 0 || (is_device(f->end) && !w->there)) {
        return (ssize_t)len;
    }
    if (buf_room(&l->out) == 0) {
        return -EAGAIN;
    }
    len = world.one_byte ? 1 : len;
    len = len < buf_room(&l->out) ? len : buf_room(&l->out);
    buf_put(&l->out, data, (uint32_t)len);
    return (ssize_t)len;
}

bool wire_readable(const File *f)
{
    Wire *w = wire_of(f);

    if (w == NULL || w->lane[!f->end].in.len > 0) {
        return true;
    }
    switch (world.kind[f->end]) {
    case VP_CHN_VIRTSERIAL:
        return !w->there;
    case VP_CHN_TTY:
        return false;
    default:
        return w->eof[f->end] || w->err[f->end] != 0;
    }
}

bool wire_writable(const File *f)
{
    Wire *w = wire_of(f);
    Lane *l;

    if (w == NULL) {
        return true;
    }
    l = &w->lane[f->end];
    switch (world.kind[f->end]) {
    case VP_CHN_VIRTSERIAL:
        if (world.fifo) {
            return !w->there || buf_room(&l->out) > 0;
        }
        return w->there && l->rec_count < VIRTIO_ENTRIES &&
               buf_room(&l->out) >= VIRTIO_WRITE_MAX;
    case VP_CHN_TTY:
        return buf_room(&l->out) > 0;
    default:
        return w->eof[f->end] || w->err[f->end] != 0 ||
               w->hole_until[f->end] != 0 || l->out.len <= l->out.cap / 2;
    }
}

/* ---- the way ------------------------------------------------------------ */

static void history_add(Buf *h, const void *data, uint32_t len)
{
    if (buf_room(h) < len) {
        buf_get(h, NULL, len);
    }
    buf_put(h, data, len);
}

/* lane_send() - bytes take to the air; @len fits */
static void lane_send(Lane *l, int d, const void *data, uint32_t len)
{
    unsigned i = (l->first + l->count) % SIM_CHUNKS;
    uint64_t start = world.now > l->busy_until ? world.now : l->busy_until;
    uint64_t due;

    if (len == 0 || l->count == SIM_CHUNKS || buf_room(&l->air) < len) {
        return; /* noise for which there is no room */
    }
    l->busy_until = start + len * SECOND / world.rate[d];
    due = l->busy_until + world.latency[d] + rnd(world.jitter[d]);
    l->last_due = due > l->last_due ? due : l->last_due;
    l->chunk[i].len = len;
    l->chunk[i].due = l->last_due;
    l->count++;
    buf_put(&l->air, data, len);
}

/* lane_take() - up to @len bytes out of the sender's buffer */
static uint32_t lane_take(Lane *l, int d, uint8_t *data, uint32_t len)
{
    uint32_t left;

    len = buf_get(&l->out, data, len);
    for (uint32_t i = 0; world.taken[d] != NULL && i < len; i++) {
        SIM_ASSERT(world.offset[d] + i < SIM_TAKEN);
        world.taken[d][world.offset[d] + i] = world.turns;
    }
    world.turns++;
    world.offset[d] += len;
    history_add(&world.history[d], data, len);
    for (left = len; l->rec_count > 0; ) {
        uint32_t *record = &l->record[l->rec_first];

        if (left < *record) {
            *record -= left;
            break;
        }
        left -= *record;
        l->rec_first = (l->rec_first + 1) % VIRTIO_ENTRIES;
        l->rec_count--;
    }
    machine[d]->poked = true;
    return len;
}

/* buf_send() - @len bytes of an old stream, from @at on */
static void buf_send(Lane *l, int d, const Buf *b, uint32_t at, uint32_t len)
{
    uint8_t data[8192];
    Buf copy = *b;

    len = len < sizeof(data) ? len : sizeof(data);
    buf_get(&copy, NULL, at);
    lane_send(l, d, data, buf_get(&copy, data, len));
}

/* damage_len() - bytes of a damage without plan */
static uint32_t damage_len(void)
{
    return rnd_log(1, world.damage_max);
}

/* lane_damage() - true: the wires are not what they were */
static bool lane_damage(Lane *l, int d, Damage damage, uint32_t arg)
{
    Buf *h = &world.history[d];
    uint8_t data[8192];
    uint32_t len = arg < sizeof(data) ? arg : sizeof(data);

    world.ndamages[damage]++;
    switch (damage) {
    case FLIP:
        lane_take(l, d, data, 1);
        data[0] ^= (uint8_t)(1u << arg % 8);
        lane_send(l, d, data, 1);
        return false;
    case DROP:
        l->dropping += arg;
        return false;
    case DOUBLE:
        lane_take(l, d, data, 1);
        data[1] = data[0];
        lane_send(l, d, data, 2);
        return false;
    case REPEAT:
        buf_send(l, d, h, h->len - (len < h->len ? len : h->len), len);
        return false;
    case NOISE:
        for (uint32_t i = 0; i < len; i++) {
            data[i] = (uint8_t)rng();
        }
        lane_send(l, d, data, len);
        return false;
    case ECHO:
        h = &world.history[!d];
        buf_send(l, d, h, h->len - (len < h->len ? len : h->len), len);
        return false;
    case OLD:
        buf_send(l, d, &world.old[d], arg >> 16, arg & 0xffff);
        return false;
    case STALL:
        l->stalled_until = world.now + arg * MS;
        return false;
    case STANDSTILL:
        world.standstill_until = world.now + arg * MS;
        return false;
    default:
        world_damage(damage, arg);
        return true;
    }
}

/* random_damage() - which, and how much */
static Damage random_damage(uint32_t *arg)
{
    Damage damage;

    do {
        damage = (Damage)rnd(DAMAGES);
    } while (!(world.damages >> damage & 1));
    switch (damage) {
    case CUT:
        *arg = rnd(CUT_KINDS);
        break;
    case STALL:
    case STANDSTILL:
    case OUTAGE:
        *arg = rnd_log(1, 100000);
        break;
    case KILL:
        *arg = rnd(16);
        break;
    case PAUSE:
    case STOP:
        *arg = rnd(2) + 2 * rnd_log(1, 100000);
        break;
    case SNAPSHOT:
    case THROW_BACK:
        *arg = rnd(2);
        break;
    case OLD:
        *arg = damage_len() | rnd(4096) << 16;
        break;
    case FLIP:
        *arg = rnd(8);
        break;
    default:
        *arg = damage_len();
        break;
    }
    return damage;
}

/*
 * next_damage() - how many bytes until there is some
 * @damage, @arg:  set if it is now (returns 0)
 */
static uint32_t next_damage(int d, Damage *damage, uint32_t *arg)
{
    uint64_t offset = world.offset[d], left = UINT32_MAX;

    for (size_t i = 0; i < world.nplan; i++) {
        const Plan *p = &world.plan[i];

        if (p->dir != d || world.done[i] || p->offset < offset) {
            continue;
        }
        if (p->offset == offset) {
            world.done[i] = true;
            *damage = p->damage;
            *arg = p->arg;
            return 0;
        }
        left = p->offset - offset < left ? p->offset - offset : left;
    }
    if (world.damage_gap > 0 && world.now < world.damage_until) {
        if (offset >= world.damage_at[d]) {
            world.damage_at[d] = offset + 1 + rnd(2 * world.damage_gap);
            *damage = random_damage(arg);
            return 0;
        }
        left = world.damage_at[d] - offset < left
               ? world.damage_at[d] - offset : left;
    }
    return (uint32_t)left;
}

/* lane_can_take() - when? */
static uint64_t lane_can_take(const Lane *l)
{
    uint64_t at = world.now;

    if (l->out.len == 0 || l->count == SIM_CHUNKS ||
        buf_room(&l->air) < 8192) {
        return NEVER;
    }
    at = l->busy_until > at ? l->busy_until : at;
    at = world.standstill_until > at ? world.standstill_until : at;
    return l->stalled_until > at ? l->stalled_until : at;
}

static bool lane_deliver(Lane *l, int receiver)
{
    bool moved = false;

    while (l->count > 0 && l->chunk[l->first].due <= world.now) {
        uint32_t *left = &l->chunk[l->first].len;
        uint32_t len = *left < buf_room(&l->in) ? *left : buf_room(&l->in);
        uint8_t data[4096];

        if (len == 0) {
            if (world.kind[receiver] != VP_CHN_TTY) {
                break;
            }
            len = *left; /* no room in the line's buffer: lost */
            buf_get(&l->air, NULL, len);
        } else {
            len = len < sizeof(data) ? len : sizeof(data);
            buf_get(&l->air, data, len);
            buf_put(&l->in, data, len);
        }
        *left -= len;
        if (*left == 0) {
            l->first = (l->first + 1) % SIM_CHUNKS;
            l->count--;
        }
        machine[receiver]->poked = true;
        moved = true;
    }
    return moved;
}

/* lane_run() - returns -1 if the wires changed, else whether anything moved */
static int lane_run(Wire *w, int d)
{
    Lane *l = &w->lane[d];
    bool moved = lane_deliver(l, !d);
    uint8_t data[8192];

    if (w->hole_until[!d] != 0 && world.now >= w->hole_until[!d]) {
        w->hole_until[!d] = 0;
        wire_reset(w, !d);
        moved = true;
    }
    if (world.damage_gap > 0 && world.now >= world.damage_until) {
        l->dropping = 0; /* with a PING each 5 s it takes minutes */
    }
    while (lane_can_take(l) <= world.now) {
        Damage damage;
        uint32_t arg, n;

        moved = true;
        if (w->dumb) {
            lane_take(l, d, data, sizeof(data));
            continue;
        }
        n = next_damage(d, &damage, &arg);
        if (l->dropping > 0) {
            n = l->dropping < sizeof(data) ? l->dropping : sizeof(data);
            l->dropping -= lane_take(l, d, data, n);
        } else if (n == 0) {
            if (lane_damage(l, d, damage, arg)) {
                return -1;
            }
        } else {
            uint32_t chunk = 1 + rnd(world.chunk > 0 ? world.chunk
                                     : 16 + world.rate[d] / 20000);

            n = n < chunk ? n : chunk;
            n = lane_take(l, d, data, n < sizeof(data) ? n : sizeof(data));
            lane_send(l, d, data, n);
        }
    }
    if (l->fin && l->out.len == 0 && l->air.len == 0 && !w->eof[!d] &&
        !is_device(!d)) {
        w->eof[!d] = true;
        machine[!d]->poked = true;
        moved = true;
    }
    return moved;
}

bool wires_run(void)
{
    bool moved = false;

    for (int i = 0; i < SIM_WIRES; i++) {
        for (int d = 0; d < 2 && wire_used(&wires[i]); d++) {
            int rc = lane_run(&wires[i], d);

            if (rc < 0) {
                return true;
            }
            moved |= rc > 0;
        }
    }
    return moved;
}

uint64_t wires_next(void)
{
    uint64_t next = NEVER;

    for (int i = 0; i < SIM_WIRES; i++) {
        Wire *w = &wires[i];

        for (int d = 0; d < 2 && wire_used(w); d++) {
            Lane *l = &w->lane[d];
            uint64_t at = lane_can_take(l);

            next = at < next ? at : next;
            if (l->count > 0 && (buf_room(&l->in) > 0 ||
                                 world.kind[!d] == VP_CHN_TTY) &&
                l->chunk[l->first].due < next) {
                next = l->chunk[l->first].due;
            }
            if (w->hole_until[d] != 0 && w->hole_until[d] < next) {
                next = w->hole_until[d];
            }
        }
    }
    return next;
}

/* ---- a plain stream ----------------------------------------------------- */

uint64_t wire_plain(int d, uint64_t warm, uint64_t time)
{
    uint64_t begin = world.now + warm, end = begin + time, got = 0, next, on;
    Wire *w = &wires[0];
    Lane *l = &w->lane[d];

    wire_make(w);
    memset(l->out.data, 0, l->out.cap);
    while (world.now < end) {
        if (duty_next(d, world.now) == world.now) {
            l->out.len = l->out.cap;
        }
        wires_run();
        if (duty_next(!d, world.now) == world.now) {
            got += world.now >= begin ? l->in.len : 0;
            buf_clear(&l->in);
        }
        next = wires_next();
        for (int i = 0; i < 2; i++) {
            on = duty_next(i, world.now + 1);
            next = world.duty_off[i] > 0 && on < next ? on : next;
        }
        world.now = next > world.now ? next : world.now + 1;
    }
    wire_free(w);
    return got;
}
