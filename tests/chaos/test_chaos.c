/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_chaos.c - one random run per seed, and everything in it at once
 *
 * A seed decides what channel there is and how fast, what damage is done to
 * it and how often, whether daemons are killed, paused or thrown back in time,
 * how badly the kernel behaves, and what the programs do.  Each kind of
 * trouble is left out of many runs, so that some are in trouble of one kind
 * only.  At last the damage ends, and then all must end well.
 *
 * So that this is a test of something, the batch fails if not half of its runs
 * moved a fair number of bytes and suffered at least once.
 *
 * SEEDS: how many (2500); SEED: this one alone; FIRST: begin with this one
 * VERBOSE: all that the engines say
 */
#include <stdlib.h>
#include <sys/mman.h>

#include "sim.h"
#include "tests/lib/suite.h"

#define SEEDS 2500
/* What all programs of a run send together, about. */
#define BYTES_MAX (3u << 20)
/* Longest stall, pause or outage. */
#define STALL_MAX (100 * SECOND)

/* A run that tells something: bytes moved, and at least one damage. */
#define EFFECTIVE 20000
/* Of fewer seeds nothing can be said. */
#define BATCH_MIN 200

/* What the runs, each in a process of its own, came to. */
static struct {
    unsigned runs;
    unsigned effective;
    unsigned long long damages;
    unsigned long long bytes;
} *total;

static uint64_t first_seed = 1;
static Channel choice;
/* bytes that a direction of the channel is likely to carry */
static uint32_t expected;

/* the channel: what it is made of */
static void choose_line(void)
{
    static const Channel channel[] = {
        SIM_SOCKET, SIM_SOCKET, SIM_VIRTSERIAL, SIM_VIRTSERIAL, SIM_TTY,
        SIM_FIFO,
    };

    choice = channel[rnd(6)];
    world_channel(choice);
    world_rate(rnd_log(10000, 1000000000));
    world_latency(rnd_log(1, chance(500) ? 100 : 100000));
    world.chunk = rnd_log(64, 65536);
    world.out_cap = rnd_log(65536, 1 << 20);
    world.in_cap = rnd_log(65536, 1 << 20);
    world.pass_us = rnd_log(1, 50);
    world.nasty = chance(300) ? rnd(200) : 0;
    world.dumb = chance(100) ? rnd(500) : 0;
    world.one_byte = chance(20);
}

/* the programs */
static void choose_programs(void)
{
    uint32_t each;

    world.to_open = rnd_log(1, chance(200) ? 150 : 30);
    world.open_gap = rnd_log(100, 1000000);
    each = (chance(200) ? BYTES_MAX : BYTES_MAX / 8) / world.to_open;
    if (each > 20ull * world.rate[0] / world.to_open) {
        each = 20 * world.rate[0] / world.to_open;
    }
    if (world.one_byte) {
        each /= 100;
    }
    each /= 2; /* a direction */
    world.mix.total_max = rnd_log(1, each);
    if (chance(850)) {
        world.mix.total_min = each / 4 + rnd(each / 2);
    }
    expected = world.to_open * (world.mix.total_min +
                                world.mix.total_max / 8 + 100);
    world.mix.chunk_max = rnd_log(1, 65536);
    world.mix.pause_max = rnd_log(1, 2000000);
    world.mix.rude = chance(300) ? rnd(500) : 0;
    world.mix.bad = chance(300) ? rnd(300) : 0;
    world.mix.empty = rnd(200);
    world.config.program = "0.0 of the simulation";
    world.config.grace = chance(700) ? 30 : rnd(10);
    world.config.max_conns = chance(100) ? 1 + rnd(8) : 1000;
    if (chance(200)) {
        world.config.key = (VPKey){ .bytes = "secret", .len = 6 };
    }
}

/* what is to go wrong */
static void choose_damage(void)
{
    static const Damage timed[] = {
        CUT, KILL, PAUSE, SNAPSHOT, THROW_BACK, OUTAGE,
    };
    uint32_t time = rnd_log(1000, 30000) * 1000;

    world.damage_until = world.now + time;
    for (int i = 0; i < DAMAGES; i++) {
        if (chance(i <= CUT ? 500 : 100)) {
            world.damages |= 1u << i;
        }
    }
    if (world.damages != 0 && chance(800)) {
        world.damage_gap = rnd_log(200, expected / 2 + 200);
    }
    world.nevents = chance(500) ? (int)rnd(8) : 0;
    for (int i = 0; i < world.nevents; i++) {
        Event *e = &world.event[i];

        e->at = world.now + rnd(time);
        e->damage = timed[rnd(6)];
        e->arg = e->damage == CUT ? rnd(CUT_KINDS)
                 : rnd_log(1, STALL_MAX / MS);
        world.throws |= e->damage == THROW_BACK;
    }
    world.throws |= (world.damages >> THROW_BACK & 1) != 0;
    world.restart_max = rnd_log(1, 10000000);
    for (int d = 0; d < 2; d++) {
        world.damage_at[d] = rnd(2 * world.damage_gap);
    }
}

/* describe() - what the seed means */
static void describe(void)
{
    fprintf(stderr, "%s: %s, %u B/s, %u us, chunks of %u, buffers %u %u, "
            "passes of %u us, nasty %u, dumb %u, one byte %d\n", world.what,
            channel_name(choice), world.rate[0], world.latency[0], world.chunk,
            world.out_cap, world.in_cap, world.pass_us, world.nasty,
            world.dumb, world.one_byte);
    fprintf(stderr, "  %u connections, up to %u us apart, up to %u bytes in "
            "pieces of %u, pauses up to %u us, %u rude, %u bad, grace %u, "
            "at most %u\n", world.to_open, world.open_gap,
            world.mix.total_max, world.mix.chunk_max, world.mix.pause_max,
            world.mix.rude, world.mix.bad, world.config.grace,
            world.config.max_conns);
    fprintf(stderr, "  damages %#x every %u bytes until %.3f s\n",
            world.damages, world.damage_gap,
            (double)world.damage_until / SECOND);
    for (int i = 0; i < world.nevents; i++) {
        fprintf(stderr, "  at %.3f s: %d %u\n",
                (double)world.event[i].at / SECOND, world.event[i].damage,
                world.event[i].arg);
    }
}

static void count(void)
{
    unsigned damages = 0;

    for (int i = 0; i < DAMAGES; i++) {
        damages += i != SNAPSHOT ? world.ndamages[i] : 0;
    }
    total->runs++;
    total->effective += world.bytes >= EFFECTIVE && damages > 0;
    total->damages += damages;
    total->bytes += world.bytes;
}

START_TEST(chaos)
{
    world_init(first_seed + (uint64_t)_i);
    snprintf(world.what, sizeof(world.what), "SEED=%llu",
             (unsigned long long)world.seed);
    choose_line();
    choose_programs();
    choose_damage();
    /* what comes last may be a stall of each kind, and then the rest */
    world.end_by = world.damage_until + 4 * STALL_MAX +
                   20 * SECOND * world.to_open;
    if (getenv("VERBOSE") != NULL) {
        describe();
    }
    world_start();
    world_run();
    count();
    world_idle(STALL_MAX + 10 * SECOND, 60 * SECOND);
    if (getenv("VERBOSE") != NULL) {
        fprintf(stderr, "%s: %.3f s, %llu bytes, %d sides, %u resets, %d "
                "breaks\n", world.what, (double)world.now / SECOND,
                (unsigned long long)world.bytes, world.nsides, world.resets,
                world.breaks);
    }
    world_free();
}
END_TEST

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);

    return text != NULL ? strtoull(text, NULL, 10) : otherwise;
}

int main(void)
{
    Suite *suite = suite_create("chaos");
    uint64_t seed = number("SEED", 0);
    int status;

    total = mmap(NULL, sizeof(*total), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (total == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    first_seed = seed != 0 ? seed : number("FIRST", 1);
    suite_set(300, NULL, NULL);
    SUITE_LOOP(suite, chaos, seed != 0 ? 1 : (int)number("SEEDS", SEEDS));
    status = suite_run(suite);
    fprintf(stderr, "%u runs ended well; %u of them moved %d bytes or more and "
            "were damaged; %llu bytes and %llu damages in all\n",
            total->runs, total->effective, EFFECTIVE, total->bytes,
            total->damages);
    if (total->runs >= BATCH_MIN && total->effective < total->runs / 2) {
        fprintf(stderr, "too few of them put anything to the test\n");
        return 1;
    }
    return status;
}
