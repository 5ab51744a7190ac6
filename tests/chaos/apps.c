/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * apps.c - the programs at the ends of the connections, and the oracle
 *
 * Each end of a connection is a Side with a number of its own.  The first
 * bytes it sends name it, all others follow from its number and their
 * position, so whoever receives a byte knows whether it is the right one.
 *
 * A side on a machine that is thrown back in time forgets what it sent and
 * sends something else instead: it begins a new Branch.  A receiver keeps
 * the set of branches that all it got agrees with; when none is left, it was
 * given bytes of two times.  An end of data is right only at the end of such
 * a branch, and only if that was ended in order.  A reset is right only if
 * there was a reason: the other side left early, the service refuses, or a
 * session had to end (world.breaks).
 */
#include <errno.h>
#include <string.h>

#include "sim.h"
#include "tests/lib/bytes.h"

#define HEAD_LEN 8u
/* Bounds for what one program does, in actions and in time. */
#define ACTIONS_MAX 600
#define BUSY_MAX (10 * SECOND)

Side sides[SIM_SIDES];

/* ---- bytes -------------------------------------------------------------- */

/* branch_fill() - the head, and then as each segment of the branch has it */
static void branch_fill(int number, const Branch *b, uint64_t pos,
                        uint8_t *data, size_t len)
{
    uint64_t end = pos + len, stream = 0;
    int segment = -1;

    while (pos < end) {
        uint64_t to = pos < HEAD_LEN ? HEAD_LEN : end;

        while (segment + 1 < b->nsegments &&
               b->segment[segment + 1].from <= pos) {
            segment++;
            stream = mix((uint64_t)number << 32 | b->segment[segment].salt);
        }
        if (pos >= HEAD_LEN && segment + 1 < b->nsegments &&
            b->segment[segment + 1].from < to) {
            to = b->segment[segment + 1].from;
        }
        to = to < end ? to : end;
        if (pos < HEAD_LEN) {
            uint64_t head = mix((uint64_t)number) << 32 | (unsigned)number;

            for (uint64_t i = pos; i < to; i++) {
                data[i - pos] = (uint8_t)(head >> 8 * i);
            }
        } else {
            bytes_fill(data, (size_t)(to - pos), stream, pos);
        }
        data += to - pos;
        pos = to;
    }
}

/* head_number() - whose first bytes are these? 0: nobody's */
static int head_number(const uint8_t *head)
{
    uint8_t want[HEAD_LEN];
    Branch b = { .nsegments = 0 };
    int number = head[0] | head[1] << 8;

    branch_fill(number, &b, 0, want, HEAD_LEN);
    return memcmp(head, want, HEAD_LEN) == 0 ? number : 0;
}

/* ---- sides -------------------------------------------------------------- */

static Side *side_of(const App *a)
{
    return &sides[a->number];
}

static Branch *branch_of(const App *a)
{
    Side *s = side_of(a);

    return &s->branch[s->current];
}

/* What programs do besides, in chance's hands. */
static void app_plan(Machine *m, App *a, bool client)
{
    Mix *mix_ = &world.mix;
    uint32_t most = mix_->total_min + mix_->total_max;
    uint64_t now = machine_now(m);

    a->total = chance(mix_->empty) ? 0
               : HEAD_LEN + mix_->total_min + rnd_log(1, mix_->total_max);
    a->wchunk = mix_->chunk_min + rnd_log(1, mix_->chunk_max) +
                (uint32_t)a->total / ACTIONS_MAX;
    a->rchunk = mix_->chunk_min + rnd_log(1, mix_->chunk_max) +
                most / ACTIONS_MAX;
    if (chance(500)) {
        a->wpause = rnd(mix_->pause_max);
        if (a->wpause > BUSY_MAX / (1 + a->total / a->wchunk)) {
            a->wpause = BUSY_MAX / (1 + a->total / a->wchunk);
        }
    }
    if (chance(300)) {
        a->rpause = rnd(mix_->pause_max);
        if (a->rpause > BUSY_MAX / (1 + most / a->rchunk)) {
            a->rpause = BUSY_MAX / (1 + most / a->rchunk);
        }
    }
    a->write_at = now + (chance(200) ? rnd(mix_->pause_max) : 0);
    a->read_at = now + (chance(200) ? rnd(mix_->pause_max) : 0);
    if (chance(mix_->rude)) {
        a->end = chance(500) ? ABORT : CLOSE_EARLY;
        a->end_at = rnd(2 * (uint32_t)a->total + 1);
    } else if (!client && chance(300)) {
        a->end = FIN_AFTER_EOF;
    }
}

static void app_new(Machine *m, Sock *s, bool client)
{
    Side *side = &sides[++world.nsides];

    SIM_ASSERT(world.nsides < SIM_SIDES);
    *side = (Side){
        .machine = m->index,
        .service = s->service,
        .client = client,
        .breaks = world.breaks - world.unsettled[0] - world.unsettled[1],
        .nbranches = 1,
    };
    side->branch[0].nsegments = 1;
    s->app = (App){ .number = world.nsides };
    app_plan(m, &s->app, client);
}

Sock *app_client(Machine *m, Service service)
{
    Sock *s = &m->socks[sock_new(m, service)];

    sock_connected(m, s);
    s->waiting = true;
    m->waiting[service]++;
    app_new(m, s, true);
    m->poked = true;
    return s;
}

void app_server(Machine *m, Sock *s)
{
    app_new(m, s, false);
}

/* ---- the oracle --------------------------------------------------------- */

static char side_name(const Side *s)
{
    return (char)('A' + s->machine);
}

/* reset_due() - was there a reason to reset this side? */
static bool reset_due(int number)
{
    Side *s = &sides[number];

    if (s->breaks < world.breaks || s->service == SVC_REFUSED ||
        s->service == SVC_REFUSED_LATE || s->service == SVC_UNKNOWN ||
        (s->peer != 0 && sides[s->peer].left)) {
        return true;
    }
    if (s->peer == 0 &&
        (world.timed_out || world.config.max_conns < SIM_SOCKS)) {
        return true;
    }
    for (int i = 1; i <= world.nsides && s->peer == 0; i++) {
        Side *other = &sides[i];

        if (other->machine != s->machine && other->peer == 0 &&
            other->left && other->service == s->service) {
            return true;
        }
    }
    return false;
}

/* branches_update() - other side was thrown back: which branches fit? */
static void branches_update(App *a)
{
    Side *peer = &sides[a->peer];

    for (; a->known < peer->nbranches; a->known++) {
        Branch *b = &peer->branch[a->known];
        /* the first bytes are the same in all of them */
        uint64_t fork_at = b->fork_at < HEAD_LEN ? HEAD_LEN : b->fork_at;

        if (a->known == 0 ||
            ((a->branches >> b->parent & 1) && a->got <= fork_at)) {
            a->branches |= 1u << a->known;
        }
    }
}

/* app_meets() - the first bytes say who the other side is */
static void app_meets(App *a)
{
    Side *me = side_of(a), *peer;
    int number = head_number(a->head);

    if (number == 0 || number > world.nsides) {
        sim_fail("side %d (%c) got first bytes that nobody sent", a->number,
                 side_name(me));
    }
    peer = &sides[number];
    if (peer->machine == me->machine || peer->client == me->client ||
        peer->service != me->service) {
        sim_fail("side %d (%c) was connected to side %d (%c) of another "
                 "service or kind", a->number, side_name(me), number,
                 side_name(peer));
    }
    if (world.breaks == 0 &&
        ((peer->peer != 0 && peer->peer != a->number) ||
         (me->peer != 0 && me->peer != number))) {
        sim_fail("side %d (%c) got bytes of side %d, which is connected to "
                 "side %d", a->number, side_name(me), number, peer->peer);
    }
    a->peer = me->peer = number;
    if (peer->peer == 0) {
        peer->peer = a->number;
    }
}

/* app_got() - the oracle looks at what came */
static void app_got(App *a, const uint8_t *data, size_t len)
{
    static uint8_t want[65536];
    size_t skip = 0;

    while (a->got + skip < HEAD_LEN && skip < len) {
        a->head[a->got + skip] = data[skip];
        skip++;
    }
    if (a->peer == 0 && a->got + skip >= HEAD_LEN) {
        app_meets(a);
    }
    if (a->peer != 0) {
        branches_update(a);
        for (int i = 0; i < sides[a->peer].nbranches; i++) {
            Branch *b = &sides[a->peer].branch[i];
            uint64_t first = a->got;

            if (!(a->branches >> i & 1)) {
                continue;
            }
            branch_fill(a->peer, b, first, want, len);
            if (first + len > b->sent || memcmp(data, want, len) != 0) {
                a->branches &= ~(1u << i);
            }
        }
        if (a->branches == 0) {
            Branch *b = &sides[a->peer].branch[0];
            size_t i = 0;

            branch_fill(a->peer, b, a->got, want, len);
            while (i < len && data[i] == want[i]) {
                i++;
            }
            sim_fail("side %d (%c) got a wrong byte from side %d: at %llu of "
                     "%llu sent", a->number, side_name(side_of(a)), a->peer,
                     (unsigned long long)(a->got + i),
                     (unsigned long long)b->sent);
        }
    }
    a->got += len;
    side_of(a)->got = a->got;
    world.bytes += len;
}

static void app_eof(App *a)
{
    Side *me = side_of(a), *peer = &sides[a->peer];
    bool right = false;

    a->eof = true;
    if (a->peer == 0) {
        if (a->got > 0) {
            sim_fail("side %d (%c) got an end of data after %llu bytes",
                     a->number, side_name(me), (unsigned long long)a->got);
        }
        me->lone_eof = true;
        return;
    }
    branches_update(a);
    for (int i = 0; i < peer->nbranches; i++) {
        right |= (a->branches >> i & 1) && peer->branch[i].fin &&
                 peer->branch[i].sent == a->got;
    }
    if (!right) {
        sim_fail("side %d (%c) got an end of data after %llu bytes; side %d "
                 "has sent %llu%s", a->number, side_name(me),
                 (unsigned long long)a->got, a->peer,
                 (unsigned long long)peer->branch[peer->current].sent,
                 peer->branch[peer->current].fin ? "" : " and goes on");
    }
}

static void app_reset(App *a)
{
    if (!reset_due(a->number)) {
        sim_fail("side %d (%c, %s of service %d) was reset for no reason "
                 "after %llu bytes from side %d", a->number,
                 side_name(side_of(a)), side_of(a)->client ? "client"
                 : "server", side_of(a)->service,
                 (unsigned long long)a->got, a->peer);
    }
    world.resets++;
}

/* ---- running ------------------------------------------------------------ */

static void app_close(Machine *m, Sock *s, bool reset)
{
    Branch *b = branch_of(&s->app);

    side_of(&s->app)->gone = true;
    /* a kernel sends a reset instead of the end if it holds unread data */
    b->fin |= !reset && s->rx[1].len == 0;
    sock_close(m, s, 1, reset);
    s->app.number = 0;
    m->poked = true;
}

/* app_read() - returns 0: nothing to do, 1: done something, -1: it's over */
static int app_read(Machine *m, Sock *s)
{
    static uint8_t data[65536];
    App *a = &s->app;
    uint64_t now = machine_now(m);
    ssize_t n;

    if (a->eof || now < a->read_at) {
        return 0;
    }
    n = sock_read(s, 1, data, a->rchunk < sizeof(data) ? a->rchunk
                                                        : sizeof(data));
    if (n == -EAGAIN) {
        return 0;
    }
    m->poked = true;
    if (n > 0) {
        app_got(a, data, (size_t)n);
        a->read_at = now + a->rpause;
        return 1;
    }
    if (n == 0) {
        if (s->dead[1] && !s->fin[1]) {
            n = -ECONNRESET; /* the error went to a write */
        } else {
            app_eof(a);
            return 1;
        }
    }
    app_reset(a);
    app_close(m, s, true);
    return -1;
}

static int app_write(Machine *m, Sock *s)
{
    static uint8_t data[65536];
    App *a = &s->app;
    Branch *b = branch_of(a);
    uint64_t now = machine_now(m), left = a->total - a->sent;
    uint32_t room = buf_room(&s->rx[0]);
    ssize_t n;

    if (a->fin || now < a->write_at) {
        return 0;
    }
    if (left == 0) {
        if (a->end == FIN_AFTER_EOF && !a->eof) {
            return 0;
        }
        sock_shutdown(s, 1);
        a->fin = b->fin = true;
        m->poked = true;
        return 1;
    }
    left = left < a->wchunk ? left : a->wchunk;
    left = left < sizeof(data) ? left : sizeof(data);
    if (a->sent < HEAD_LEN) {
        left = HEAD_LEN; /* in one piece, so that it is all or nothing */
    } else if (left > room) {
        left = room > 0 ? room : 1; /* no more than can be taken is made up */
    }
    branch_fill(a->number, b, a->sent, data, (size_t)left);
    n = sock_write(s, 1, data, (size_t)left);
    if (n == -EAGAIN) {
        return 0;
    }
    m->poked = true;
    if (n < 0) {
        /* what came before the reset can still be read */
        if (app_read(m, s) == 0) {
            app_reset(a);
            app_close(m, s, true);
        }
        return -1;
    }
    a->sent += (uint64_t)n;
    b->sent = a->sent;
    a->write_at = now + a->wpause;
    return 1;
}

static bool app_run(Machine *m, Sock *s)
{
    App *a = &s->app;
    int did;
    bool moved = false;

    if ((a->end == ABORT || a->end == CLOSE_EARLY) &&
        a->sent + a->got >= a->end_at) {
        side_of(a)->left = true;
        app_close(m, s, a->end == ABORT);
        return true;
    }
    did = app_read(m, s);
    if (did < 0) {
        return true;
    }
    moved |= did > 0;
    did = app_write(m, s);
    if (did < 0) {
        return true;
    }
    moved |= did > 0;
    if (a->fin && a->eof) {
        side_of(a)->complete = true;
        app_close(m, s, false);
        return true;
    }
    return moved;
}

bool apps_run(Machine *m)
{
    bool moved = false;

    for (int i = 0; i < m->top; i++) {
        if (m->socks[i].app.number != 0 && m->socks[i].state == SOCK_OPEN) {
            moved |= app_run(m, &m->socks[i]);
        }
    }
    return moved;
}

uint64_t apps_next(Machine *m)
{
    uint64_t next = NEVER;

    for (int i = 0; i < m->top; i++) {
        Sock *s = &m->socks[i];
        App *a = &s->app;

        if (a->number == 0 || s->state != SOCK_OPEN) {
            continue;
        }
        if (!a->eof && sock_readable(s, 1) && a->read_at < next) {
            next = a->read_at;
        }
        if (!a->fin && a->write_at < next &&
            (a->sent < a->total
             ? s->dead[1] || s->closed[0] || buf_room(&s->rx[0]) > 0
             : a->end != FIN_AFTER_EOF || a->eof)) {
            next = a->write_at;
        }
    }
    return next == NEVER ? NEVER : next + m->skew;
}

bool apps_done(void)
{
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < machine[k]->top; i++) {
            if (machine[k]->socks[i].app.number != 0) {
                return false;
            }
        }
    }
    return true;
}

void apps_check_end(void)
{
    for (int i = 1; i <= world.nsides; i++) {
        Side *s = &sides[i], *peer = &sides[s->peer];

        if (!s->gone) {
            sim_fail("side %d (%c) has not ended", i, side_name(s));
        }
        if (s->lone_eof && s->complete && s->peer != 0 &&
            world.breaks == 0 &&
            !(peer->branch[0].fin && peer->branch[0].sent == 0)) {
            sim_fail("side %d (%c) got an end of data at once, but side %d "
                     "sent %llu bytes", i, side_name(s), s->peer,
                     (unsigned long long)peer->branch[0].sent);
        }
    }
}

void apps_thrown_back(Machine *m)
{
    bool there[SIM_SIDES] = { false };

    for (int i = 0; i < m->top; i++) {
        App *a = &m->socks[i].app;
        Side *side = side_of(a);
        Branch *b = branch_of(a);

        if (a->number == 0) {
            continue;
        }
        there[a->number] = true;
        side->gone = side->complete = side->lone_eof = false;
        side->peer = a->peer;
        if (a->sent == b->sent && a->fin == b->fin) {
            continue;
        }
        SIM_ASSERT(side->nbranches < SIM_BRANCHES);
        side->branch[side->nbranches] = *b;
        b = &side->branch[side->nbranches];
        while (b->nsegments > 0 &&
               b->segment[b->nsegments - 1].from >= a->sent) {
            b->nsegments--;
        }
        b->segment[b->nsegments].from = a->sent;
        b->segment[b->nsegments++].salt = (uint64_t)side->nbranches;
        b->parent = side->current;
        b->fork_at = a->sent;
        b->sent = a->sent;
        b->fin = a->fin;
        side->current = side->nbranches++;
    }
    for (int i = 1; i <= world.nsides; i++) {
        if (sides[i].machine == m->index && !there[i]) {
            sides[i].gone = true; /* or never was */
        }
    }
}
