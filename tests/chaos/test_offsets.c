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
#include "tests/lib/suite.h"

/*
 * each_offset_but() - @damage at every byte of both directions
 * @arg:     what it is at an offset; NULL: @value, at each
 * @every:  only so manieth byte
 */
static void each_offset_but(Channel channel, Damage damage,
                            uint32_t (*arg)(uint64_t offset), uint32_t value,
                            uint64_t every)
{
    Exchange x;

    exchange_record(&x, channel);
    x.plan[0].damage = damage;
    for (int d = 0; d < 2; d++) {
        x.plan[0].dir = d;
        for (uint64_t at = 0; at <= x.length[d]; at += every) {
            x.plan[0].offset = at;
            x.plan[0].arg = arg != NULL ? arg(at) : value;
            exchange_run(&x);
            /* behind the last byte there may be none to come */
            if (at < x.length[d] && world.ndamages[damage] != 1) {
                sim_fail("damage was done %u times", world.ndamages[damage]);
            }
        }
    }
    exchange_free(&x);
}

static void each_offset(Channel channel, Damage damage,
                        uint32_t (*arg)(uint64_t offset), uint32_t value)
{
    each_offset_but(channel, damage, arg, value, stride());
}

static uint32_t any_bit(uint64_t offset)
{
    return (uint32_t)(mix(offset) % 8);
}

static uint32_t up_to_4096(uint64_t offset)
{
    return (uint32_t)(1 + mix(offset) % 4096);
}

/* each kind of cut; on a device some come to the same */
START_TEST(cut)
{
    int kinds = _i == SIM_SOCKET ? CUT_KINDS : CUT_HALF_DEAD_0;

    for (int kind = 0; kind < kinds; kind++) {
        each_offset((Channel)_i, CUT, NULL, (uint32_t)kind);
    }
}
END_TEST

START_TEST(bit_flipped)
{
    each_offset((Channel)_i, FLIP, any_bit, 0);
}
END_TEST

START_TEST(byte_dropped)
{
    each_offset((Channel)_i, DROP, NULL, 1);
}
END_TEST

START_TEST(byte_doubled)
{
    each_offset((Channel)_i, DOUBLE, NULL, 0);
}
END_TEST

START_TEST(noise)
{
    each_offset((Channel)_i, NOISE, up_to_4096, 0);
}
END_TEST

START_TEST(bytes_lost)
{
    each_offset((Channel)_i, DROP, NULL, 4096);
}
END_TEST

START_TEST(repeated)
{
    each_offset((Channel)_i, REPEAT, up_to_4096, 0);
}
END_TEST

START_TEST(echoed)
{
    each_offset((Channel)_i, ECHO, up_to_4096, 0);
}
END_TEST

/* longer than every timer there is: PING 5 s, HELLO unanswered 10 s */
#define LONG_MS 120000

/* one direction */
START_TEST(stalled)
{
    each_offset((Channel)_i, STALL, NULL, LONG_MS);
}
END_TEST

/* both, and whoever connects anew finds it so */
START_TEST(standstill)
{
    each_offset((Channel)_i, STANDSTILL, NULL, LONG_MS);
}
END_TEST

/* a machine, as a VM that is paused: its clock doesn't go on */
START_TEST(stopped)
{
    each_offset((Channel)_i, STOP, NULL, 0 + 2 * LONG_MS);
    each_offset((Channel)_i, STOP, NULL, 1 + 2 * LONG_MS);
}
END_TEST

/*
 * A process that is stopped: the clock goes on, so a connect() that is under
 * way times out after 10 s, and rightly: a pause is a little shorter.
 */
#define PAUSE_MS 9000

START_TEST(paused)
{
    for (uint32_t which = 0; which < 2; which++) {
        each_offset_but((Channel)_i, PAUSE, NULL, which + 2 * PAUSE_MS,
                        5 * stride());
    }
}
END_TEST

/* each system call, on either side, fails in one way, once */
START_TEST(failing_call)
{
    static const int fault[] = { EAGAIN, EINTR, 0 };
    Exchange x;

    exchange_record(&x, (Channel)_i);
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
    Exchange x = { .channel = (Channel)_i };

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
    Exchange x = { .channel = (Channel)_i };

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
    Exchange x = { .channel = (Channel)_i };

    exchange_begin(&x);
    world_rate(100);
    world.chunk = 1;
    world.end_by = 3600 * SECOND;
    world_start();
    world_run();
    exchange_end();
}
END_TEST

/* On FIFOs the engine does as on a port: some kinds of damage will do there. */
#define BUT_FIFO SIM_FIFO

int main(void)
{
    Suite *s = suite_create("offsets");

    suite_set(600, NULL, NULL);
    SUITE_LOOP(s, cut, SIM_CHANNELS);
    SUITE_LOOP(s, bit_flipped, SIM_CHANNELS);
    SUITE_LOOP(s, byte_dropped, SIM_CHANNELS);
    SUITE_LOOP(s, byte_doubled, BUT_FIFO);
    SUITE_LOOP(s, noise, BUT_FIFO);
    SUITE_LOOP(s, bytes_lost, BUT_FIFO);
    SUITE_LOOP(s, repeated, BUT_FIFO);
    SUITE_LOOP(s, echoed, BUT_FIFO);
    SUITE_LOOP(s, stalled, BUT_FIFO);
    SUITE_LOOP(s, standstill, BUT_FIFO);
    SUITE_LOOP(s, stopped, BUT_FIFO);
    SUITE_LOOP(s, paused, BUT_FIFO);
    SUITE_LOOP(s, failing_call, SIM_CHANNELS);
    SUITE_LOOP(s, failing_calls, SIM_CHANNELS);
    SUITE_LOOP(s, one_byte_at_a_time, SIM_CHANNELS);
    SUITE_LOOP(s, slow, SIM_CHANNELS);
    return suite_run(s);
}
