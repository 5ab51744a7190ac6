/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * exchange.c - a short exchange that takes place again and again
 */
#include <stdlib.h>

#include "exchange.h"

/* Sanitizers are too slow for every byte. */
#ifdef __SANITIZE_ADDRESS__
#define STRIDE 17
#else
#define STRIDE 1
#endif

/* What each direction of a connection carries. */
#define BYTES_MIN 1400
#define BYTES_MAX 200

void exchange_begin(const Exchange *x)
{
    int n;

    world_init(2);
    n = snprintf(world.what, sizeof(world.what), "%s",
                 channel_name(x->channel));
    for (size_t i = 0; i < x->nplan; i++) {
        n += snprintf(world.what + n, sizeof(world.what) - (size_t)n,
                      ", direction %d, byte %llu: damage %d %#x",
                      x->plan[i].dir, (unsigned long long)x->plan[i].offset,
                      x->plan[i].damage, x->plan[i].arg);
    }
    if (x->fault_call != 0) {
        snprintf(world.what + n, sizeof(world.what) - (size_t)n,
                 ", call %llu: %d", (unsigned long long)x->fault_call,
                 x->fault);
    }
    world_channel(x->channel);
    world.out_cap = world.in_cap = 65536;
    world.to_open = EXCHANGE_CONNS;
    world.open_gap = 200;
    world.mix = (Mix){
        .total_min = BYTES_MIN,
        .total_max = BYTES_MAX,
        .chunk_min = 400,
        .chunk_max = 300,
    };
    /* the first HELLO may be held up for longer than users would wait */
    world.config.grace = 200;
    world.plan = x->plan;
    world.nplan = x->nplan;
    world.fault_call = x->fault_call;
    world.fault = x->fault;
    world.end_by = 600 * SECOND;
}

void exchange_end(void)
{
    if (world.resets > 0 || world.breaks > 0) {
        sim_fail("connections were reset");
    }
    world_free();
}

void exchange_run(const Exchange *x)
{
    exchange_begin(x);
    world_start();
    world_run();
    exchange_end();
}

void exchange_record(Exchange *x, Channel channel)
{
    *x = (Exchange){ .channel = channel };
    exchange_begin(x);
    for (int d = 0; d < 2; d++) {
        x->taken[d] = calloc(SIM_TAKEN, sizeof(*x->taken[d]));
        ck_assert_ptr_nonnull(x->taken[d]);
        world.taken[d] = x->taken[d];
    }
    world_start();
    world_run();
    for (int d = 0; d < 2; d++) {
        x->length[d] = world.offset[d];
        ck_assert_uint_gt(x->length[d], 4096 + 1024);
        ck_assert_uint_le(x->length[d], world.history[d].len);
        x->bytes[d] = malloc((size_t)x->length[d]);
        ck_assert_ptr_nonnull(x->bytes[d]);
        buf_get(&world.history[d], x->bytes[d], (uint32_t)x->length[d]);
    }
    x->calls = world.calls;
    exchange_end();
    x->nplan = 1;
}

void exchange_free(Exchange *x)
{
    for (int d = 0; d < 2; d++) {
        free(x->bytes[d]);
        free(x->taken[d]);
    }
}

uint64_t stride(void)
{
    const char *text = getenv("STRIDE");

    return text != NULL ? strtoull(text, NULL, 10) : STRIDE;
}
