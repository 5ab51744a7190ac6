/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_flow.c - whether a line is used, and what waits on it
 *
 * Lines of all kinds: as different as may be in the two directions, with
 * delays that vary, with daemons that get the CPU now and then, and lines that
 * become others.  A plain stream through the same simulated line is what a
 * transfer is compared with.  Time is the simulation's own.
 */
#include "tests/lib/suite.h"
#include "transfers.h"

#define MESSAGE 64
/* The part of a plain stream's bytes that a transfer should have. */
#define PART 0.8

#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* A line; [0] is the direction from machine 0 to machine 1. */
typedef struct Line {
    uint32_t rate[2];    /* bytes per second */
    uint32_t latency[2]; /* us */
    uint32_t jitter;     /* us, of both directions */
    uint32_t duty;       /* us of 5 times as many that daemons run; 0: always */
} Line;

/* How much goes the two ways. */
typedef enum Traffic {
    DOWN,
    UP,
    BOTH,
    TRAFFICS,
} Traffic;

static const char *const traffic_name[] = { "down", "up", "both" };

static void line_set(const Line *line)
{
    for (int i = 0; i < 2; i++) {
        world.rate[i] = line->rate[i];
        world.latency[i] = line->latency[i];
        world.jitter[i] = line->jitter;
        world.duty_on[i] = line->duty;
        world.duty_off[i] = 4 * line->duty;
    }
}

static void line_name(const Line *line)
{
    char kind[40] = "";

    if (line->duty > 0) {
        snprintf(kind, sizeof(kind), ", %u of %u us of CPU", line->duty,
                 5 * line->duty);
    } else if (line->jitter > 0) {
        snprintf(kind, sizeof(kind), "+0-%u", line->jitter);
    }
    snprintf(world.what, sizeof(world.what), "%u:%u B/s, %u:%u%s us",
             line->rate[0], line->rate[1], line->latency[0], line->latency[1],
             kind);
}

static void line_init(const Line *line, uint64_t seed)
{
    world_init(seed);
    transfers_line();
    world.config.memory = 1u << 30; /* as the program has it */
    world.sock_cap = MAX(line->rate[0], line->rate[1]) > 500000000 ? 1 << 20
                                                                  : 65536;
    line_set(line);
    line_name(line);
}

/* line_trip() - a round trip, and what it takes at most, without queues; us */
static uint64_t line_trip(const Line *line)
{
    return line->latency[0] + line->latency[1] + 2ull * line->jitter +
           10ull * line->duty;
}

/* line_packets() - time that two packets take on direction @d; us */
static uint64_t line_packets(const Line *line, int d)
{
    return MAX(2 * 4 * MS, 2 * 680 * SECOND / line->rate[d]);
}

/* line_time() - to watch it for, such that not too many bytes go by; us */
static uint64_t line_time(const Line *line)
{
    uint64_t rate = MAX(line->rate[0], line->rate[1]);
    uint64_t time = 50000000ull * SECOND / rate;

    time = MAX(time, 4 * line_trip(line));
    return MIN(MAX(time, SECOND / 8), 6 * SECOND);
}

/* line_plain() - bytes per second of a plain stream, each way */
static void line_plain(const Line *line, double plain[2])
{
    uint64_t time = MIN(line_time(line), SECOND);

    for (int d = 0; d < 2; d++) {
        line_init(line, 1);
        world_start();
        plain[d] = (double)wire_plain(d, 2 * line_trip(line), time) *
                   SECOND / (double)time;
        world_free();
    }
}

/* line_watch() - the part of @plain that payload has each way in @time */
static void line_watch(const double plain[2], uint64_t time, double part[2])
{
    uint64_t start = world.now, before[2];

    for (int d = 0; d < 2; d++) {
        before[d] = all_arrived(!d);
    }
    wait_until(start + time);
    for (int d = 0; d < 2; d++) {
        part[d] = (double)(all_arrived(!d) - before[d]) * SECOND /
                  (double)(world.now - start) / plain[d];
    }
}

/* line_used() - say how much of it was; false: less than @least */
static bool line_used(const char *when, Traffic traffic, const double part[2],
                      double least)
{
    bool good = true;

    fprintf(stderr, "%s, %s%s:", world.what, traffic_name[traffic], when);
    for (int d = 0; d < 2; d++) {
        if (traffic == BOTH || (int)traffic == d) {
            fprintf(stderr, " %.2f", part[d]);
            good &= part[d] >= least;
        }
    }
    fprintf(stderr, "%s\n", good ? "" : "  TOO LITTLE");
    return good;
}

static void traffic_start(Traffic traffic)
{
    for (int d = 0; d < 2; d++) {
        if (traffic == BOTH || (int)traffic == d) {
            transfers(d, 1);
        }
    }
}

/* ---- steady lines ------------------------------------------------------- */

#define K 1000u
#define M 1000000u

/*
 * Lines, and what part of a plain stream's bytes a transfer has at least:
 * PART, or a tenth where it is seen to have less than that now and then.
 */
static const struct {
    Line line;
    double alone; /* without a transfer the other way */
    double both;
} steady_lines[] = {
    { { { 11520, 11520 }, { 300, 300 }, 0, 0 }, PART, PART },
    /* an isa-serial port's */
    { { { 200 * K, 40 * K }, { 300, 300 }, 0, 0 }, PART, 0.4 },
    { { { M, M }, { 100, 100 }, 0, 0 }, PART, PART },
    { { { 10 * M, 100 * K }, { 50, 50 }, 0, 0 }, PART, 0.6 },
    { { { 10 * M, M }, { 10 * K, 10 * K }, 0, 0 }, PART, 0.4 },
    { { { 100 * M, 100 * K }, { 300, 300 }, 0, 0 }, PART, 0.5 },
    { { { 100 * M, 100 * M }, { 50, 50 }, 0, 0 }, PART, PART },
    { { { 40 * K, 40 * K }, { 50 * K, 50 * K }, 0, 0 }, PART, 0.1 },
    { { { M, M }, { 50 * K, 50 * K }, 0, 0 }, PART, 0.1 },
    { { { 10 * M, 10 * M }, { 50 * K, 50 * K }, 0, 0 }, 0.1, 0.1 },
    { { { 20 * M, 20 * M }, { 20 * K, 80 * K }, 0, 0 }, 0.05, 0.05 },
    { { { M, M }, { 50, 50 }, 5 * K, 0 }, PART, 0.1 },
    { { { M, M }, { 50, 50 }, 20 * K, 0 }, PART, 0.1 },
    { { { 50 * M, 50 * M }, { 50, 50 }, 5 * K, 0 }, 0.1, 0.1 },
    { { { M, M }, { 50 * K, 50 * K }, 5 * K, 0 }, PART, 0.1 },
    { { { 10 * M, 10 * M }, { 50 * K, 50 * K }, 20 * K, 0 }, 0.1, 0.1 },
    { { { M, M }, { 50 * K, 50 * K }, 100 * K, 0 }, PART, 0.1 },
    { { { M, M }, { 50, 50 }, 0, 10 * K }, 0.1, 0.05 },
    { { { 20 * M, 20 * M }, { 50, 50 }, 0, 10 * K }, 0.05, 0.05 },
    { { { 10 * M, 100 * K }, { 50, 50 }, 0, 10 * K }, 0.1, 0.1 },
};

/* Each direction is used, alone or beside the other. */
START_TEST(steady)
{
    const Line *line = &steady_lines[_i / TRAFFICS].line;
    Traffic traffic = (Traffic)(_i % TRAFFICS);
    double part[2], plain[2];

    line_plain(line, plain);
    line_init(line, 1);
    transfers_start();
    traffic_start(traffic);
    wait_until(world.now + 2 * SECOND + 20 * line_trip(line));
    line_watch(plain, line_time(line), part);
    if (!line_used("", traffic, part, traffic == BOTH
                   ? steady_lines[_i / TRAFFICS].both
                   : steady_lines[_i / TRAFFICS].alone)) {
        sim_fail("a transfer has too little of the line");
    }
    transfers_end();
}
END_TEST

/* ---- both directions at once -------------------------------------------- */

/* Unlike lines, and what part of a plain stream each direction has at least. */
static const struct {
    Line line;
    double fast, slow;
} unlike_lines[] = {
    { { { 200 * K, 40 * K }, { 300, 300 }, 0, 0 }, 0.6, PART },
    { { { 10 * M, 100 * K }, { 50, 50 }, 0, 0 }, PART, 0.4 },
    { { { 10 * M, M }, { 10 * K, 10 * K }, 0, 0 }, 0.4, 0.6 },
    { { { 100 * M, 100 * K }, { 300, 300 }, 0, 0 }, 0.5, 0.6 },
};

/*
 * Each direction is used, whoever begins: both at the same time, or the slower
 * one.  They are as fast as each other then for a while.
 */
START_TEST(unlike)
{
    const Line *line = &unlike_lines[_i / 2].line;
    double part[2], plain[2];
    bool good;

    line_plain(line, plain);
    line_init(line, 1);
    transfers_start();
    transfer(1);
    if (_i % 2 == 1) {
        wait_until(world.now + 2 * SECOND);
    }
    transfer(0);
    wait_until(world.now + 2 * SECOND + 20 * line_trip(line));
    line_watch(plain, line_time(line), part);
    good = line_used(_i % 2 == 1 ? ", the slower one first" : ", at once", BOTH,
                     part, 0);
    good = good && part[0] >= unlike_lines[_i / 2].fast &&
           part[1] >= unlike_lines[_i / 2].slow;
    if (!good) {
        sim_fail("a transfer has too little of the line");
    }
    transfers_end();
}
END_TEST

/* ---- long fat lines ------------------------------------------------------ */

/* 1 Gbit/s over a round trip of so many ms, for so many transfers */
static const struct {
    uint32_t trip;
    int n;
} fat_lines[] = {
    { 1, 16 }, { 10, 4 }, { 50, 1 }, { 50, 16 }, { 100, 4 }, { 250, 1 },
    { 250, 16 },
};

/* One line takes what memory there is to be used, for one or for many. */
START_TEST(fat)
{
    const uint32_t rate = 125 * M, latency = fat_lines[_i].trip * 500;
    const Line line = { { rate, rate }, { latency, latency }, 0, 0 };
    double part[2], plain[2];

    line_plain(&line, plain);
    line_init(&line, 1);
    transfers_start();
    transfers(0, fat_lines[_i].n);
    wait_until(world.now + 2 * SECOND + 20 * line_trip(&line));
    line_watch(plain, line_time(&line), part);
    fprintf(stderr, "%d: ", fat_lines[_i].n);
    if (!line_used("", DOWN, part, PART)) {
        sim_fail("transfers have too little of the line");
    }
    transfers_end();
}
END_TEST

/* ---- lines that become others ------------------------------------------- */

typedef struct Step {
    Line before, after;
} Step;

#define BECOMES(rate, latency, rate0, rate1, latency0, latency1) \
    { { { rate, rate }, { latency, latency }, 0, 0 }, \
      { { rate0, rate1 }, { latency0, latency1 }, 0, 0 } }

static const struct {
    Step step;
    double alone, both; /* as in steady_lines */
} steps[] = {
    { BECOMES(M, 1 * K, 10 * M, 10 * M, 1 * K, 1 * K), PART, 0.6 },
    { BECOMES(M, 1 * K, 100 * M, 100 * M, 1 * K, 1 * K), PART, 0.6 },
    { BECOMES(M, 1 * K, 100 * K, 100 * K, 1 * K, 1 * K), PART, 0.6 },
    { BECOMES(M, 1 * K, 11520, 11520, 1 * K, 1 * K), PART, 0.1 },
    { BECOMES(10 * M, 1 * K, 100 * K, 100 * K, 1 * K, 1 * K), PART, 0.1 },
    { BECOMES(100 * M, 1 * K, M, M, 1 * K, 1 * K), PART, 0.6 },
    { BECOMES(10 * M, 100 * K, 10 * M, 10 * M, 1 * K, 1 * K), PART, 0.1 },
    { BECOMES(10 * M, 100 * K, 10 * M, 10 * M, 10 * K, 10 * K), PART, 0.6 },
    { BECOMES(100 * K, 50 * K, 10 * M, 10 * M, 50 * K, 50 * K), 0.1, 0.1 },
    { BECOMES(10 * M, 50 * K, 100 * K, 100 * K, 50 * K, 50 * K), PART, 0.1 },
};

/* A line that has become another is used again soon. */
START_TEST(stepped)
{
    const Step *step = &steps[_i / TRAFFICS].step;
    Traffic traffic = (Traffic)(_i % TRAFFICS);
    double part[2], plain[2];

    line_plain(&step->after, plain);
    line_init(&step->before, 1);
    transfers_start();
    traffic_start(traffic);
    wait_until(world.now + SECOND + 20 * line_trip(&step->before));
    line_set(&step->after);
    line_name(&step->after);
    wait_until(world.now + 2 * SECOND + 20 * line_trip(&step->after));
    line_watch(plain, line_time(&step->after), part);
    if (!line_used(" after a step", traffic, part, traffic == BOTH
                   ? steps[_i / TRAFFICS].both : steps[_i / TRAFFICS].alone)) {
        sim_fail("a transfer has too little of the line");
    }
    transfers_end();
}
END_TEST

/* ---- messages beside transfers ------------------------------------------ */

/*
 * messages() - from both sides, one each @pause at most: the slowest's time
 * @slowest:  us, of those that began within @time, each way
 */
static void messages(App *a[2], uint64_t pause, uint64_t time,
                     uint64_t slowest[2])
{
    uint64_t end = world.now + time, sent_at[2];

    for (int d = 0; d < 2; d++) {
        slowest[d] = 0;
        sent_at[d] = a[d]->write_at = world.now;
    }
    while (sent_at[0] < end || sent_at[1] < end) {
        SIM_ASSERT(world_step());
        for (int d = 0; d < 2; d++) {
            if (a[d]->write_at >= end && arrived(a[d]) == a[d]->sent &&
                sent_at[d] < end) {
                slowest[d] = MAX(slowest[d], world.now - sent_at[d]);
                sent_at[d] = a[d]->write_at = MAX(world.now,
                                                  sent_at[d] + pause);
            }
        }
    }
}

static void messages_start(App *a[2])
{
    for (int d = 0; d < 2; d++) {
        a[d] = transfer(d);
        a[d]->wchunk = MESSAGE;
        a[d]->wpause = NEVER / 2; /* until the last one has arrived */
    }
}

/* messages_fast() - say how long they took; false: longer than they should */
static bool messages_fast(const Line *line, const char *when,
                          const uint64_t slowest[2])
{
    bool good = true;

    fprintf(stderr, "%s, a message%s:", world.what, when);
    for (int d = 0; d < 2; d++) {
        fprintf(stderr, " %.1f ms", (double)slowest[d] / MS);
        good &= slowest[d] <= 50 * MS + line_packets(line, d) +
                              line_trip(line);
    }
    fprintf(stderr, "%s\n", good ? "" : "  TOO LONG");
    return good;
}

static const Line typed_lines[] = {
    { { M, M }, { 100, 100 }, 0, 0 },
    { { 10 * M, 100 * K }, { 50, 50 }, 0, 0 },
    { { 100 * M, 100 * M }, { 50, 50 }, 0, 0 },
    { { 125 * M, 125 * M }, { 25 * K, 25 * K }, 0, 0 },
};

/* A message waits for no more than the line needs to stay busy. */
START_TEST(typed)
{
    const Line *line = &typed_lines[_i];
    uint64_t slowest[2];
    App *a[2];

    line_init(line, 1);
    transfers_start();
    messages_start(a);
    traffic_start(BOTH);
    wait_until(world.now + 2 * SECOND + 20 * line_trip(line));
    messages(a, 50 * MS, 2 * line_time(line), slowest);
    if (!messages_fast(line, "", slowest)) {
        sim_fail("a message waits too long");
    }
    transfers_end();
}
END_TEST

static const Step typed_steps[] = {
    BECOMES(M, 1 * K, 10 * M, 10 * M, 1 * K, 1 * K),
    BECOMES(M, 1 * K, 100 * M, 100 * M, 1 * K, 1 * K),
    BECOMES(M, 1 * K, 100 * K, 100 * K, 1 * K, 1 * K),
    BECOMES(M, 1 * K, 100 * M, M, 1 * K, 1 * K),
    BECOMES(10 * M, 1 * K, 10 * M, 10 * M, 10 * K, 10 * K),
    BECOMES(10 * M, 1 * K, 10 * M, 10 * M, 100 * K, 100 * K),
    BECOMES(10 * M, 1 * K, 10 * M, 10 * M, 1 * K, 100 * K),
    BECOMES(20 * M, 20, 20 * M, 20 * M, 50 * K, 50 * K),
};

/* Nor does it soon after a line has become another. */
START_TEST(typed_stepped)
{
    const Step *step = &typed_steps[_i];
    uint64_t slowest[2];
    App *a[2];

    line_init(&step->before, 1);
    transfers_start();
    messages_start(a);
    traffic_start(BOTH);
    wait_until(world.now + SECOND + 20 * line_trip(&step->before));
    line_set(&step->after);
    line_name(&step->after);
    wait_until(world.now + 3 * SECOND);
    messages(a, 50 * MS, line_time(&step->after), slowest);
    if (!messages_fast(&step->after, " after a step", slowest)) {
        sim_fail("a message waits too long");
    }
    transfers_end();
}
END_TEST

int main(void)
{
    Suite *s = suite_create("flow");

    suite_set(600, NULL, NULL);
    SUITE_LOOP(s, steady, TRAFFICS * COUNT_OF(steady_lines));
    SUITE_LOOP(s, unlike, 2 * COUNT_OF(unlike_lines));
    SUITE_ROWS(s, fat, fat_lines);
    SUITE_LOOP(s, stepped, TRAFFICS * COUNT_OF(steps));
    SUITE_ROWS(s, typed, typed_lines);
    SUITE_ROWS(s, typed_stepped, typed_steps);
    return suite_run(s);
}
