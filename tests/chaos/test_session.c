/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_session.c - what begins a session, what ends it, and what must not
 *
 * Old bytes on the channel, daemons that are killed, machines that are thrown
 * back in time, numbers that wrap around: at every byte of the same exchange
 * where that makes sense.  Times are the simulation's own, so bounds on them
 * hold on a slow machine, too.
 */
#include <stdlib.h>
#include <string.h>

#include "exchange.h"
#include "tests/lib/suite.h"

/* What is promised after a restart, and for a first session. */
#define SOON SECOND

/* ---- old bytes before the first HELLO ------------------------------------ */

/* run_soon() - it ends well, and soon */
static void run_soon(const Exchange *x)
{
    uint64_t start = world.now;

    world_start();
    world_run();
    if (world.now - start > SOON) {
        sim_fail("it took %.3f s", (double)(world.now - start) / SECOND);
    }
    (void)x;
    exchange_end();
}

/* old_bytes() - @damage before the first byte of a direction, or of both */
static void old_bytes(Exchange *x, Damage damage, uint32_t arg)
{
    for (int dir = 0; dir < 3; dir++) {
        x->nplan = dir < 2 ? 1 : 2;
        for (int i = 0; i < 2; i++) {
            x->plan[i] = (Plan){
                .dir = dir < 2 ? dir : i,
                .damage = damage,
                .arg = arg,
            };
        }
        exchange_begin(x);
        world.life = 1; /* else the same random numbers come again */
        for (int d = 0; d < 2; d++) {
            world.old[d] = (Buf){
                .data = x->bytes[d],
                .cap = (uint32_t)x->length[d],
                .len = (uint32_t)x->length[d],
            };
        }
        run_soon(x);
    }
}

/* longest() - of both directions */
static uint32_t longest(const Exchange *x)
{
    return (uint32_t)(x->length[0] > x->length[1] ? x->length[0]
                                                  : x->length[1]);
}

/* noise, and whatever part of an earlier session */
START_TEST(old)
{
    Exchange x;

    exchange_record(&x, (Channel)_i);
    for (uint32_t len = 1; len <= 4096; len += (uint32_t)stride()) {
        old_bytes(&x, NOISE, len);
    }
    for (uint32_t len = 1; len <= longest(&x); len += (uint32_t)stride()) {
        old_bytes(&x, OLD, len);                /* its beginning */
        old_bytes(&x, OLD, len << 16 | 0xffff); /* its end */
    }
    exchange_free(&x);
}
END_TEST

/* what an earlier session received: HELLOs of our own, echoed */
START_TEST(old_echoes)
{
    Exchange x;
    uint64_t length;
    uint8_t *bytes;

    exchange_record(&x, (Channel)_i);
    bytes = x.bytes[0];
    x.bytes[0] = x.bytes[1];
    x.bytes[1] = bytes;
    length = x.length[0];
    x.length[0] = x.length[1];
    x.length[1] = length;
    for (uint32_t len = 1; len <= longest(&x); len += (uint32_t)stride()) {
        old_bytes(&x, OLD, len);
    }
    exchange_free(&x);
}
END_TEST

/* ---- restarts ----------------------------------------------------------- */

/*
 * killed_at() - soon after, both have a new session, and connections work
 *
 * That all old ones are reset, the oracle sees to.
 */
static void killed_at(const Exchange *x)
{
    uint64_t killed;
    int before;

    exchange_begin(x);
    world.restart_max = 1;
    world_start();
    while (world.breaks == 0) {
        world_step();
    }
    killed = world.now;
    while (world.unsettled[0] || world.unsettled[1]) {
        world_step();
    }
    before = world.nsides;
    app_client(machine[0], SVC_QUICK);
    app_client(machine[1], SVC_QUICK);
    while (!sides[before + 1].gone || !sides[before + 2].gone) {
        world_step();
    }
    if (world.now - killed > SOON) {
        sim_fail("new connections took %.3f s",
                 (double)(world.now - killed) / SECOND);
    }
    if (!sides[before + 1].complete || !sides[before + 2].complete) {
        sim_fail("a connection after the restart failed");
    }
    world_run();
    world_free();
}

/* killed_each() - in these ways, at every so manieth byte */
static void killed_each(Channel channel, const uint32_t *how, size_t n,
                        uint64_t every)
{
    Exchange x;

    exchange_record(&x, channel);
    x.plan[0].damage = KILL;
    for (int d = 0; d < 2; d++) {
        x.plan[0].dir = d;
        for (uint64_t at = 0; at < x.length[d]; at += every) {
            x.plan[0].offset = at;
            for (size_t i = 0; i < n; i++) {
                x.plan[0].arg = how[i];
                killed_at(&x);
            }
        }
    }
    exchange_free(&x);
}

/* either, and both */
START_TEST(killed)
{
    static const uint32_t how[] = { 0, 1, 2 };

    killed_each((Channel)_i, how, 3, stride());
}
END_TEST

/* told to end: either, both, both and only one of them told */
START_TEST(ended)
{
    static const uint32_t how[] = { 0 + 4, 1 + 4, 2 + 4 + 8, 2 + 4, 2 + 8 };

    killed_each((Channel)_i, how, 5, 7 * stride());
}
END_TEST

#define RESTARTS 100

/* 100 restarts in a row under load, each in the middle of a new session */
START_TEST(killed_often)
{
    for (uint64_t seed = 1; seed <= 10; seed++) {
        world_init(seed);
        snprintf(world.what, sizeof(world.what), "%s, %llu",
                 channel_name((Channel)_i), (unsigned long long)seed);
        world_channel((Channel)_i);
        world_rate(10000000);
        world_latency(500);
        world.restart_max = 100 * MS;
        world.open_gap = 30000;
        world.mix = (Mix){ .total_max = 1 << 18, .chunk_max = 30000 };
        world.end_by = 600 * SECOND;
        world_start();
        for (int i = 0; i < RESTARTS; i++) {
            bool gently = chance(200);
            int victim = (int)rnd(2);
            uint64_t bytes;

            world.to_open = 1000;
            while (!machine[0]->alive || !engine_up(machine[0]->drv) ||
                   !machine[1]->alive || !engine_up(machine[1]->drv)) {
                SIM_ASSERT(world_step());
            }
            bytes = world.bytes + 1 + rnd(20000);
            while (world.bytes < bytes) {
                SIM_ASSERT(world_step());
            }
            SIM_ASSERT(machine[victim]->alive);
            world_kill(victim, gently);
            if (chance(300)) {
                world_kill(!victim, gently);
            }
        }
        world.to_open = 10;
        world_run();
        SIM_ASSERT(world.breaks >= RESTARTS);
        world_free();
    }
}
END_TEST

/* ---- thrown back -------------------------------------------------------- */

/* From how many moments of its life a machine is thrown back, and how often. */
#define FROM_STRIDE (97 * stride())
#define TO_STRIDE (389 * stride())

/* thrown_back_at() - then connections work again as they did before */
static void thrown_back_at(const Exchange *x)
{
    int m = (int)x->plan[0].arg;

    exchange_begin(x);
    world.throws = world.same_date = true;
    world_start();
    world_run();
    /* what comes after the snapshot need not be as long as it was */
    if (world.thrown[m] != 1 &&
        world.offset[x->plan[1].dir] > x->plan[1].offset) {
        sim_fail("thrown back %d times", world.thrown[m]);
    }
    world.to_open = 2;
    world_run();
    world_free();
}

/*
 * thrown_back() - machine @m, to moments from earlier ones
 *
 * In half of the runs the channel is cut right after the snapshot, so that
 * there was a handshake for which the machine draws its numbers once more.
 */
static void thrown_back(Channel channel, int m)
{
    unsigned back = 0, runs = 0, redraws = 0;
    Exchange x;

    exchange_record(&x, channel);
    x.plan[0].damage = SNAPSHOT;
    x.plan[1].damage = THROW_BACK;
    x.plan[2].damage = CUT;
    x.plan[0].arg = x.plan[1].arg = (uint32_t)m;
    for (int d = 0; d < 4; d++) {
        x.plan[0].dir = x.plan[2].dir = d & 1;
        x.plan[1].dir = d >> 1;
        for (uint64_t at = 0; at < x.length[d & 1]; at += FROM_STRIDE) {
            /* so that each moment's later ones are others */
            for (uint64_t to = mix(at) % TO_STRIDE; to < x.length[d >> 1];
                 to += TO_STRIDE) {
                unsigned from_turn = x.taken[d & 1][at];
                unsigned to_turn = x.taken[d >> 1][to];

                if (from_turn < to_turn ||
                    (x.plan[0].dir == x.plan[1].dir && at <= to)) {
                    x.plan[0].offset = x.plan[2].offset = at;
                    x.plan[1].offset = to;
                    x.plan[2].arg = (uint32_t)(mix(to) % CUT_KINDS);
                    x.nplan = 2 + runs++ % 2;
                    thrown_back_at(&x);
                    back += (unsigned)world.thrown[m];
                    redraws += world.redraws;
                }
            }
        }
    }
    /* nearly all of them were */
    ck_assert_uint_gt(runs, 0);
    ck_assert_uint_ge(back * 100, runs * 98);
    /* a few runs may miss what is rare */
    ck_assert_msg(redraws > 0 || runs < 200, "no number was drawn twice in %u "
                  "runs", runs);
    exchange_free(&x);
}

START_TEST(thrown_back_0)
{
    thrown_back((Channel)_i, 0);
}
END_TEST

START_TEST(thrown_back_1)
{
    thrown_back((Channel)_i, 1);
}
END_TEST

/*
 * thrown_back_early() - into the first handshake, soon after it
 *
 * The way is so long that HELLOs are said again before one is answered.  So an
 * echo is still under way when the machine is thrown back, and leads into the
 * session that the abandoned time was in; and both times open a few connections
 * before the other side notices.  Returns whether one did.
 */
static bool thrown_back_early(Channel channel, uint64_t seed)
{
    uint32_t again = 100 * MS; /* the second HELLO */
    uint32_t way, m;
    bool noticed;

    world_init(seed);
    snprintf(world.what, sizeof(world.what), "%s, %llu",
             channel_name(channel), (unsigned long long)seed);
    world_channel(channel);
    m = rnd(2);
    way = again / 2 + rnd(again / 2);
    world_latency(way);
    world.to_open = 10;
    world.open_gap = 100 * MS;
    world.mix = (Mix){ .total_max = 200, .chunk_max = 200 };
    world.throws = true;
    world.nevents = 2;
    world.event[0] = (Event){
        .at = world.now + way + rnd(way),
        .damage = SNAPSHOT,
        .arg = m,
    };
    /* the first echo has come, and not yet the second one */
    world.event[1] = (Event){
        .at = world.now + 3ull * way + rnd(again - way),
        .damage = THROW_BACK,
        .arg = m,
    };
    world.end_by = 600 * SECOND;
    world_start();
    world_run();
    noticed = log_count("set back in time") > 0;
    world_free();
    return noticed;
}

START_TEST(thrown_back_in_handshake)
{
    unsigned noticed = 0;

    for (uint64_t seed = 1; seed <= 500; seed++) {
        noticed += thrown_back_early((Channel)_i, seed);
    }
    ck_assert_uint_ge(noticed, 100);
}
END_TEST

/* ---- numbers that wrap around ------------------------------------------- */

/* quiet() - is nothing on its way? */
static bool quiet(void)
{
    return engine_quiet(machine[0]->drv) && engine_quiet(machine[1]->drv) &&
           wires_next() == NEVER;
}

/*
 * wraps() - open connections go on when all numbers are just before @packets,
 * @bytes, and the next ids are those of connections that are open
 */
static void wraps(Channel channel, uint64_t seed, uint32_t packets,
                  uint64_t bytes)
{
    world_init(seed);
    snprintf(world.what, sizeof(world.what), "%s, %llu, at packet %#x, byte "
             "%#llx", channel_name(channel), (unsigned long long)seed, packets,
             (unsigned long long)bytes);
    world_channel(channel);
    world.to_open = 40;
    world.open_gap = 100000;
    world.mix = (Mix){
        .total_min = 50000,
        .total_max = 20000,
        .chunk_min = 500,
        .chunk_max = 500,
        .pause_max = 50000,
    };
    world.end_by = 300 * SECOND;
    world_start();
    while (world.to_open > 30) {
        world_step();
    }
    while (!quiet()) {
        SIM_ASSERT(world_step());
    }
    SIM_ASSERT(engine_conns(machine[0]->drv) > 2);
    engine_shift(machine[0]->drv, machine[1]->drv, packets - 100,
                 bytes - 20000);
    world_run();
    exchange_end();
}

START_TEST(wrapped)
{
    static const uint32_t packets[] = { 0, 0x80000000u };
    static const uint64_t bytes[] = { 1ull << 32, 1ull << 31, 1ull << 63 };

    for (uint64_t seed = 1; seed <= 3; seed++) {
        for (size_t i = 0; i < 2; i++) {
            for (size_t j = 0; j < 3; j++) {
                wraps((Channel)_i, seed, packets[i], bytes[j]);
            }
        }
    }
}
END_TEST

/* ---- a garbled line ----------------------------------------------------- */

/* bulk() - how long a transfer takes, with damage each so many bytes; us */
static uint64_t bulk(uint32_t rate, uint32_t latency, uint32_t bytes,
                     uint32_t gap, Damage damage, double *packet)
{
    VPChannelInfo info;
    uint64_t start;

    world_init(3);
    snprintf(world.what, sizeof(world.what), "%u B/s, %u us, damage %d each "
             "%u", rate, latency, damage, gap);
    world.sock_cap = 65536; /* else what it holds is a packet's length */
    world_channel(SIM_TTY);
    world_rate(rate);
    world_latency(latency);
    world.chunk = 16 + rate / 20000;
    world.damage_gap = gap;
    world.damages = gap > 0 ? 1u << damage : 0;
    world.damage_max = 16; /* as would be one packet's */
    world.damage_at[0] = world.damage_at[1] = gap;
    world.damage_until = NEVER;
    world.mix = (Mix){ .total_max = 1, .chunk_min = 65536, .chunk_max = 1 };
    world.end_by = 3600 * SECOND;
    world_start();
    while (!machine[1]->alive || !engine_up(machine[1]->drv) ||
           !engine_up(machine[0]->drv)) {
        world_step();
    }
    start = world.now;
    app_client(machine[0], SVC_QUICK)->app.total = bytes;
    while (!apps_done()) {
        world_step();
    }
    vp_channel_info(machine[0]->drv, &info);
    *packet = (double)info.bytes[1] / (double)info.packets[1] + 40;
    start = world.now - start;
    exchange_end();
    return start;
}

/* one packet in a hundred is damaged: half of the clean line is left */
START_TEST(garbled)
{
    static const struct {
        uint32_t rate, latency, bytes;
    } line[] = {
        { 11520, 1000, 100000 },
        { 11520, 20000, 100000 },
        { 40000, 1000, 400000 },
        { 200000, 1000, 2000000 },
        { 1000000, 1000, 5000000 },
        { 1000000, 20000, 5000000 },
        { 10000000, 500, 10000000 },
    };
    static const Damage damage[] = { FLIP, DROP, NOISE };
    double packet, unused;
    uint64_t clean, damaged;
    bool good = true;

    for (size_t i = 0; i < sizeof(line) / sizeof(line[0]); i++) {
        clean = bulk(line[i].rate, line[i].latency, line[i].bytes, 0, FLIP,
                     &packet);
        fprintf(stderr, "%u B/s, %u us: %.2f of the line, packets of %.0f "
                "bytes; one in 100 damaged, of that:", line[i].rate,
                line[i].latency, (double)line[i].bytes * SECOND /
                (double)clean / line[i].rate, packet);
        for (size_t j = 0; j < sizeof(damage) / sizeof(damage[0]); j++) {
            damaged = bulk(line[i].rate, line[i].latency, line[i].bytes,
                           (uint32_t)(100 * packet), damage[j], &unused);
            fprintf(stderr, " %.2f", (double)clean / (double)damaged);
            good &= damaged <= 2 * clean;
        }
        fprintf(stderr, "\n");
    }
    ck_assert(good);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("session");

    suite_set(600, NULL, NULL);
    SUITE_LOOP(s, old, SIM_CHANNELS);
    SUITE_LOOP(s, old_echoes, SIM_CHANNELS);
    SUITE_LOOP(s, killed, SIM_CHANNELS);
    SUITE_LOOP(s, ended, SIM_CHANNELS);
    SUITE_LOOP(s, killed_often, SIM_CHANNELS);
    SUITE_LOOP(s, thrown_back_0, SIM_CHANNELS);
    SUITE_LOOP(s, thrown_back_1, SIM_CHANNELS);
    SUITE_LOOP(s, thrown_back_in_handshake, SIM_CHANNELS);
    SUITE_LOOP(s, wrapped, SIM_CHANNELS);
    SUITE_ADD(s, garbled);
    return suite_run(s);
}
