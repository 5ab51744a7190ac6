/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_offsets.c - one exchange, and one mishap at each of its bytes
 *
 * The same short exchange of several connections, both ways, takes place
 * again and again, over each kind of channel; each time one thing goes wrong
 * at one byte of one direction, until every byte has had its turn.  As both
 * engines live, no connection may notice.
 *
 * STRIDE: only every so manieth byte (1; with sanitizers, which are slow, 17)
 */
#include <errno.h>
#include <stdlib.h>

#include "exchange.h"

/* each_offset() - @damage at every byte of both directions */
static void each_offset(VPChannelKind kind, Damage damage,
                        uint32_t (*arg)(uint64_t offset))
{
    Exchange x;

    exchange_record(&x, kind);
    x.plan[0].damage = damage;
    for (int d = 0; d < 2; d++) {
        x.plan[0].dir = d;
        for (uint64_t at = 0; at <= x.length[d]; at += stride()) {
            x.plan[0].offset = at;
            x.plan[0].arg = arg(at);
            exchange_run(&x);
        }
    }
    exchange_free(&x);
}

static uint32_t any_bit(uint64_t offset)
{
    return (uint32_t)(mix(offset) % 8);
}

static uint32_t one(uint64_t offset)
{
    (void)offset;
    return 1;
}

static uint32_t up_to_4096(uint64_t offset)
{
    return (uint32_t)(1 + mix(offset) % 4096);
}

static uint32_t always_4096(uint64_t offset)
{
    (void)offset;
    return 4096;
}

static uint32_t any_cut(uint64_t offset)
{
    return (uint32_t)(mix(offset) % CUT_KINDS);
}

/* longer than every timer there is: PING 5 s, HELLO unanswered 10 s */
static uint32_t stall_ms(uint64_t offset)
{
    (void)offset;
    return 60000;
}

START_TEST(cut)
{
    each_offset((VPChannelKind)_i, CUT, any_cut);
}
END_TEST

START_TEST(bit_flipped)
{
    each_offset((VPChannelKind)_i, FLIP, any_bit);
}
END_TEST

START_TEST(byte_dropped)
{
    each_offset((VPChannelKind)_i, DROP, one);
}
END_TEST

START_TEST(byte_doubled)
{
    each_offset((VPChannelKind)_i, DOUBLE, one);
}
END_TEST

START_TEST(noise)
{
    each_offset((VPChannelKind)_i, NOISE, up_to_4096);
}
END_TEST

START_TEST(bytes_lost)
{
    each_offset((VPChannelKind)_i, DROP, always_4096);
}
END_TEST

START_TEST(repeated)
{
    each_offset((VPChannelKind)_i, REPEAT, up_to_4096);
}
END_TEST

START_TEST(echoed)
{
    each_offset((VPChannelKind)_i, ECHO, up_to_4096);
}
END_TEST

START_TEST(stalled)
{
    each_offset((VPChannelKind)_i, STALL, stall_ms);
}
END_TEST

/*
 * A machine's clock goes on while it is paused, so a connect() that is under
 * way times out after 10 s, and rightly: a pause is a little shorter.
 */
#define PAUSE_MS 9000

static uint32_t pause_a(uint64_t offset)
{
    (void)offset;
    return 0 + 2 * PAUSE_MS;
}

static uint32_t pause_b(uint64_t offset)
{
    (void)offset;
    return 1 + 2 * PAUSE_MS;
}

START_TEST(paused)
{
    each_offset((VPChannelKind)_i, PAUSE, pause_a);
    each_offset((VPChannelKind)_i, PAUSE, pause_b);
}
END_TEST

/* each system call, on either side, fails in one way, once */
START_TEST(failing_call)
{
    static const int fault[] = { EAGAIN, EINTR, 0 };
    Exchange x;

    exchange_record(&x, (VPChannelKind)_i);
    x.nplan = 0;
    for (size_t i = 0; i < sizeof(fault) / sizeof(fault[0]); i++) {
        x.fault = fault[i];
        for (x.fault_call = 1; x.fault_call <= x.calls; x.fault_call++) {
            exchange_run(&x);
        }
    }
    exchange_free(&x);
}
END_TEST

/* calls fail all the time, and move a few bytes otherwise */
START_TEST(failing_calls)
{
    Exchange x = { .kind = (VPChannelKind)_i };

    for (unsigned nasty = 10; nasty <= 900; nasty += 10) {
        exchange_begin(&x);
        world.nasty = nasty;
        world_start();
        world_run();
        exchange_end();
    }
}
END_TEST

START_TEST(one_byte_at_a_time)
{
    Exchange x = { .kind = (VPChannelKind)_i };

    exchange_begin(&x);
    world.one_byte = true;
    world.chunk = 1;
    world_start();
    world_run();
    exchange_end();
}
END_TEST

/* a byte each 10 ms: HELLO alone takes a second */
START_TEST(slow)
{
    Exchange x = { .kind = (VPChannelKind)_i };

    exchange_begin(&x);
    world.rate = 100;
    world.chunk = 1;
    world.end_by = 3600 * SECOND;
    world_start();
    world_run();
    exchange_end();
}
END_TEST

static void add(Suite *suite, const char *name, const TTest *test)
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, test, 0, 3); /* kinds of channels */
    suite_add_tcase(suite, tcase);
}

int main(void)
{
    Suite *suite = suite_create("offsets");
    SRunner *runner;
    int failed;

    add(suite, "cut", cut);
    add(suite, "bit flipped", bit_flipped);
    add(suite, "byte dropped", byte_dropped);
    add(suite, "byte doubled", byte_doubled);
    add(suite, "noise", noise);
    add(suite, "4096 bytes lost", bytes_lost);
    add(suite, "bytes repeated", repeated);
    add(suite, "bytes echoed", echoed);
    add(suite, "stalled", stalled);
    add(suite, "paused", paused);
    add(suite, "a call fails", failing_call);
    add(suite, "calls fail", failing_calls);
    add(suite, "one byte at a time", one_byte_at_a_time);
    add(suite, "a byte each 10 ms", slow);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
