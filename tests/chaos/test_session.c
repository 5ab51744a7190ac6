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

/* What is promised after a restart, and for a first session. */
#define SOON SECOND

/* Restarts and moments of a machine's life are many: not each has a turn. */
#define SESSION_STRIDE (5 * stride())
#define LIFE_STRIDE (131 * stride())

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

/* noise, and whatever part of an earlier session */
START_TEST(old)
{
    Exchange x;

    exchange_record(&x, (VPChannelKind)_i);
    for (uint32_t len = 1; len <= 4096; len += (uint32_t)stride()) {
        old_bytes(&x, NOISE, len);
    }
    for (uint32_t len = 1; len <= x.length[0]; len += (uint32_t)stride()) {
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
    uint8_t *bytes;
    uint64_t length;

    exchange_record(&x, (VPChannelKind)_i);
    bytes = x.bytes[0];
    x.bytes[0] = x.bytes[1];
    x.bytes[1] = bytes;
    length = x.length[0];
    x.length[0] = x.length[1];
    x.length[1] = length;
    for (uint32_t len = 1; len <= x.length[0]; len += (uint32_t)stride()) {
        old_bytes(&x, OLD, len);
    }
    exchange_free(&x);
}
END_TEST

/* ---- restarts -------------------------------------------------------------- */

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

START_TEST(killed)
{
    Exchange x;

    exchange_record(&x, (VPChannelKind)_i);
    x.plan[0].damage = KILL;
    for (int d = 0; d < 2; d++) {
        x.plan[0].dir = d;
        for (uint64_t at = 0; at < x.length[d]; at += SESSION_STRIDE) {
            x.plan[0].offset = at;
            /* either, both; gently or not */
            for (x.plan[0].arg = 0; x.plan[0].arg < 16; x.plan[0].arg++) {
                killed_at(&x);
            }
        }
    }
    exchange_free(&x);
}
END_TEST

/* 100 restarts in a row under load, at random moments */
START_TEST(killed_often)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        world_init(seed);
        snprintf(world.what, sizeof(world.what), "kind %d, %llu", _i,
                 (unsigned long long)seed);
        world.kind[1] = (VPChannelKind)_i;
        world.rate = 10000000;
        world.latency = 500;
        world.restart_max = 100 * MS;
        world.open_gap = 30000;
        world.mix = (Mix){ .total_max = 1 << 18, .chunk_max = 30000 };
        world.end_by = 600 * SECOND;
        world_start();
        for (int i = 0; i < 100; i++) {
            uint64_t next = world.now + rnd(150000);

            world.to_open = 1000;
            while (world.now < next) {
                world_step();
            }
            world_kill((int)rnd(2), chance(200));
        }
        world.to_open = 10;
        world_run();
        if (world.bytes == 0) {
            sim_fail("nothing was moved between the restarts");
        }
        world_free();
    }
}
END_TEST

/* ---- thrown back ----------------------------------------------------------- */

/* thrown_back() - machine @m, from each moment to each earlier one */
static void thrown_back(VPChannelKind kind, int m)
{
    Exchange x;
    unsigned back = 0;

    exchange_record(&x, kind);
    x.nplan = 2;
    x.plan[0].damage = SNAPSHOT;
    x.plan[1].damage = THROW_BACK;
    x.plan[0].arg = x.plan[1].arg = (uint32_t)m;
    for (int d = 0; d < 4; d++) {
        x.plan[0].dir = d & 1;
        x.plan[1].dir = d >> 1;
        for (uint64_t at = 0; at < x.length[d & 1]; at += LIFE_STRIDE) {
            for (uint64_t to = 0; to < x.length[d >> 1]; to += LIFE_STRIDE) {
                x.plan[0].offset = at;
                x.plan[1].offset = to;
                exchange_begin(&x);
                world.throws = true;
                world_start();
                world_run();
                back += world.ndamages[THROW_BACK];
                /* and all is as it was before */
                world.to_open = 2;
                world_run();
                world_free();
            }
        }
    }
    ck_assert_uint_gt(back, 0);
    exchange_free(&x);
}

START_TEST(thrown_back_0)
{
    thrown_back((VPChannelKind)_i, 0);
}
END_TEST

START_TEST(thrown_back_1)
{
    thrown_back((VPChannelKind)_i, 1);
}
END_TEST

/* ---- numbers that wrap around ---------------------------------------------- */

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
static void wraps(VPChannelKind kind, uint32_t packets, uint64_t bytes)
{
    world_init(7);
    snprintf(world.what, sizeof(world.what), "kind %d, at packet %#x, byte "
             "%#llx", kind, packets, (unsigned long long)bytes);
    world.kind[1] = kind;
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

    for (size_t i = 0; i < 2; i++) {
        for (size_t j = 0; j < 3; j++) {
            wraps((VPChannelKind)_i, packets[i], bytes[j]);
        }
    }
}
END_TEST

/* ---- a garbled line -------------------------------------------------------- */

/* bulk() - how long a transfer takes, with damage each so many bytes; us */
static uint64_t bulk(uint32_t rate, uint32_t latency, uint32_t bytes,
                     uint32_t gap, double *packet)
{
    VPChannelInfo info;
    uint64_t start;

    world_init(3);
    snprintf(world.what, sizeof(world.what), "%u B/s, %u us, damage each %u",
             rate, latency, gap);
    world.kind[1] = VP_CHN_TTY;
    world.rate = rate;
    world.latency = latency;
    world.chunk = 16;
    world.damage_gap = gap;
    world.damages = 1u << FLIP;
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
    *packet = (double)info.bytes[1] / (double)info.packets[1] + 32;
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
        { 10000000, 500, 20000000 },
    };
    double packet, unused;
    uint64_t clean, damaged;
    bool good = true;

    for (size_t i = 0; i < sizeof(line) / sizeof(line[0]); i++) {
        clean = bulk(line[i].rate, line[i].latency, line[i].bytes, 0,
                     &packet);
        damaged = bulk(line[i].rate, line[i].latency, line[i].bytes,
                       (uint32_t)(100 * packet), &unused);
        fprintf(stderr, "%u B/s, %u us: %.2f of the line, packets of %.0f "
                "bytes; one in 100 damaged: %.2f of that\n", line[i].rate,
                line[i].latency, (double)line[i].bytes * SECOND /
                (double)clean / line[i].rate, packet,
                (double)clean / (double)damaged);
        good &= damaged <= 2 * clean;
    }
    ck_assert(good);
}
END_TEST

static void add(Suite *suite, const char *name, const TTest *test, int times)
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, test, 0, times); /* kinds of channels */
    suite_add_tcase(suite, tcase);
}

int main(void)
{
    Suite *suite = suite_create("session");
    SRunner *runner;
    int failed;

    add(suite, "old bytes", old, 3);
    add(suite, "old echoes", old_echoes, 3);
    add(suite, "killed", killed, 3);
    add(suite, "killed often", killed_often, 3);
    add(suite, "A thrown back", thrown_back_0, 3);
    add(suite, "B thrown back", thrown_back_1, 3);
    add(suite, "wrapped", wrapped, 3);
    add(suite, "garbled", garbled, 1);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
