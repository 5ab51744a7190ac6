/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_line.c - a slow line, and who waits for whom on it
 *
 * Transfers that never end, and one connection that sends a message each time
 * the last one has arrived, as somebody does who types; or connections that
 * come one after the other, with little to send.  Time is the simulation's own,
 * so bounds on it hold on a slow machine, too.
 */
#include "transfers.h"
#include "tests/lib/suite.h"

#define MESSAGE 64

#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* A line, and for how long to watch it */
typedef struct Line {
    uint32_t rate, latency;
    uint64_t warm, time;
} Line;

/* line_start() - both are up; what follows begins at some moment */
static void line_start(const Line *line, uint64_t seed)
{
    world_init(seed);
    snprintf(world.what, sizeof(world.what), "%u B/s, %u us, seed %llu",
             line->rate, line->latency, (unsigned long long)seed);
    transfers_line();
    world_rate(line->rate);
    world_latency(line->latency);
    transfers_start();
}

/* line_watch() - the part of the line that payload uses, each way */
static void line_watch(const Line *line, double part[2])
{
    uint64_t start, before[2];

    wait_until(world.now + line->warm);
    start = world.now;
    for (int i = 0; i < 2; i++) {
        before[i] = all_arrived(!i);
    }
    wait_until(start + line->time);
    for (int i = 0; i < 2; i++) {
        part[i] = (double)(all_arrived(!i) - before[i]) * SECOND /
                  (double)(world.now - start) / line->rate;
    }
}

static const Line far_lines[] = {
    { 40000, 50000, 5 * SECOND, 40 * SECOND },
    { 1000000, 20000, 2 * SECOND, 20 * SECOND },
    { 1000000, 50000, 2 * SECOND, 20 * SECOND },
    { 10000000, 20000, 2 * SECOND, 2 * SECOND },
};

/* Where round trips take long, too, the bound in flight doesn't decay. */
START_TEST(far_away)
{
    double part[2];

    line_start(&far_lines[_i], 1);
    transfers(0, 1);
    line_watch(&far_lines[_i], part);
    fprintf(stderr, "%s: %.2f of the line\n", world.what, part[0]);
    if (part[0] < 0.85) {
        sim_fail("a transfer takes too little of the line");
    }
    transfers_end();
}
END_TEST

static const struct {
    Line line;
    unsigned at; /* ms after the transfer's begin */
} held_lines[] = {
    { { 1000000, 30000, 10 * SECOND, 10 * SECOND }, 50 },
    { { 1000000, 50000, 10 * SECOND, 10 * SECOND }, 140 },
};

/* Nor does it stay where it was when the peer was held up for a moment. */
START_TEST(held_up)
{
    double part[2];

    line_start(&held_lines[_i].line, 5);
    transfer(0);
    wait_until(world.now + held_lines[_i].at * MS);
    world_damage(PAUSE, 1 + 2 * 400);
    line_watch(&held_lines[_i].line, part);
    fprintf(stderr, "%s, held up: %.2f of the line\n", world.what, part[0]);
    if (part[0] < 0.85) {
        sim_fail("a transfer takes too little of the line");
    }
    transfers_end();
}
END_TEST

static const Line busy_lines[] = {
    { 11520, 300, 3 * SECOND, 20 * SECOND },
    { 40000, 1000, 2 * SECOND, 20 * SECOND },
    { 1000000, 100, SECOND, 3 * SECOND },
    { 10000000, 300, SECOND, SECOND },
    { 100000000, 50, SECOND / 2, SECOND / 4 },
};

/* Transfers in both directions don't slow each other's acks. */
START_TEST(both_ways)
{
    const Line *line = &busy_lines[_i / 2];
    int down = _i % 2 ? 16 : 1;

    for (uint64_t seed = 1; seed <= 4; seed++) {
        double part[2];

        line_start(line, seed);
        transfers(0, 1);
        transfers(1, down);
        line_watch(line, part);
        fprintf(stderr, "%s: 1 and %d transfers: %.2f, %.2f of the line\n",
                world.what, down, part[0], part[1]);
        if (part[0] < 0.8 || part[1] < 0.8) {
            sim_fail("less than four fifths");
        }
        transfers_end();
    }
}
END_TEST

/* ---- messages beside transfers ------------------------------------------ */

/* messages() - one each @pause at most: how long the slowest takes; us */
static uint64_t messages(const Line *line, uint64_t pause, int ntransfers,
                         uint64_t seed)
{
    uint64_t end, slowest = 0;
    App *a;

    line_start(line, seed);
    a = transfer(0);
    a->wchunk = MESSAGE;
    a->wpause = NEVER / 2; /* until the last one has arrived */
    transfers(0, ntransfers);
    wait_until(world.now + line->warm);
    end = world.now + line->time;
    a->write_at = world.now;
    for (uint64_t sent_at = world.now; sent_at < end; ) {
        SIM_ASSERT(world_step());
        if (a->write_at >= end && arrived(a) == a->sent) {
            slowest = MAX(slowest, world.now - sent_at);
            sent_at = a->write_at = MAX(world.now, sent_at + pause);
        }
    }
    transfers_end();
    return slowest;
}

static const struct {
    Line line;
    uint64_t pause; /* for less than two of 17 shares */
} typed_lines[] = {
    { { 11520, 300, 8 * SECOND, 60 * SECOND }, 100 * MS },
    { { 40000, 1000, 2 * SECOND, 30 * SECOND }, 30 * MS },
    { { 1000000, 100, SECOND, 3 * SECOND }, MS },
};

/* Who sends less than two shares waits for no round of the others. */
START_TEST(beside_many)
{

    for (uint64_t seed = 1; seed <= 4; seed++) {
        const Line *line = &typed_lines[_i].line;
        uint64_t one = messages(line, typed_lines[_i].pause, 1, seed);
        uint64_t many = messages(line, typed_lines[_i].pause, 16, seed);

        fprintf(stderr, "%u B/s, %u us: a message takes %.1f ms beside 1, %.1f "
                "ms beside 16 transfers, at the most\n", line->rate,
                line->latency, (double)one / MS, (double)many / MS);
        ck_assert_uint_le(many, 2 * one);
    }
}
END_TEST

/* Who seems to send less, as he sends in small portions, gets two shares. */
START_TEST(in_portions)
{
    static const Line line = { 40000, 1000, 2 * SECOND, 30 * SECOND };
    uint64_t end, moved[2] = { 0 };
    App *a, *other;

    for (int i = 1; i <= 16; i *= 2) {
        Sock *s;

        line_start(&line, (uint64_t)i);
        s = app_client(machine[0], SVC_QUICK);
        a = &s->app;
        a->total = ENDLESS;
        a->wchunk = 250;
        a->wpause = NEVER / 2;
        other = transfer(0);
        transfers(0, i - 1);
        end = world.now + line.warm + line.time;
        while (world.now < end) {
            SIM_ASSERT(world_step());
            if (s->rx[0].len == 0) {
                a->write_at = 0; /* when it was taken, the next one */
            }
            if (world.now < end - line.time) {
                moved[0] = arrived(a);
                moved[1] = arrived(other);
            }
        }
        moved[0] = arrived(a) - moved[0];
        moved[1] = arrived(other) - moved[1];
        fprintf(stderr, "small portions: %llu bytes, %llu by each of %d "
                "transfers\n", (unsigned long long)moved[0],
                (unsigned long long)moved[1], i);
        ck_assert_uint_le(moved[0], moved[1] * 2);
        transfers_end();
    }
}
END_TEST

/* Connections that come one after the other leave a transfer its part. */
START_TEST(newcomers)
{
    static const Line line = { 40000, 1000, 2 * SECOND, 20 * SECOND };

    for (int n = 1; n <= 16; n *= 2) {
        Sock *s[16] = { NULL };
        int number[16];
        uint64_t end, before = 0;
        double part, fair = 1.0 / (n + 1);
        App *bulk;

        line_start(&line, (uint64_t)n);
        bulk = transfer(0);
        end = world.now + line.warm + line.time;
        while (world.now < end) {
            for (int i = 0; i < n; i++) {
                if (s[i] == NULL || s[i]->state == SOCK_FREE ||
                    s[i]->app.number != number[i]) {
                    s[i] = app_client(machine[0], SVC_QUICK);
                    number[i] = s[i]->app.number;
                    s[i]->app.total = 2000;
                    s[i]->app.end = FIN_AFTER_SEND;
                    s[i]->app.wpause = 0;
                    s[i]->app.write_at = 0;
                }
            }
            SIM_ASSERT(world_step());
            if (world.now < end - line.time) {
                before = arrived(bulk);
            }
        }
        part = (double)(arrived(bulk) - before) * SECOND / (double)line.time /
               line.rate;
        fprintf(stderr, "beside %d that come one after the other: %.3f of the "
                "line\n", n, part);
        ck_assert_double_ge(part, fair / 4);
        transfers_end();
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("line");

    suite_set(600, NULL, NULL);
    SUITE_ROWS(s, far_away, far_lines);
    SUITE_ROWS(s, held_up, held_lines);
    SUITE_LOOP(s, both_ways, 2 * COUNT_OF(busy_lines));
    SUITE_ROWS(s, beside_many, typed_lines);
    SUITE_ADD(s, in_portions);
    SUITE_ADD(s, newcomers);
    return suite_run(s);
}
