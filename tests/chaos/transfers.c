/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * transfers.c - connections that send all the time over the simulated line
 */
#include "transfers.h"

void wait_until(uint64_t time)
{
    while (world.now < time) {
        SIM_ASSERT(world_step());
    }
}

void transfers_line(void)
{
    world_channel(SIM_SOCKET);
    world.chunk = 0;
    world.out_cap = world.in_cap = 4 << 20;
    world.sock_cap = 65536;
}

void transfers_start(void)
{
    world.mix = (Mix){ .total_max = 1, .chunk_min = 65536, .chunk_max = 1 };
    world_start();
    while (!machine[0]->alive || !machine[1]->alive ||
           !engine_up(machine[0]->drv) || !engine_up(machine[1]->drv)) {
        world_step();
    }
    wait_until(world.now + rnd(SECOND));
}

void transfers_end(void)
{
    world_kill(0, false);
    world_kill(1, false);
    world_free();
}

App *transfer(int from)
{
    App *a = &app_client(machine[from], SVC_QUICK)->app;

    a->total = ENDLESS;
    a->end = FIN_AFTER_SEND;
    a->wpause = 0;
    a->write_at = 0;
    return a;
}

void transfers(int from, int n)
{
    for (int i = 0; i < n; i++) {
        transfer(from);
    }
    wait_until(world.now + rnd(SECOND / 2));
}

uint64_t arrived(const App *a)
{
    return sides[sides[a->number].peer].got;
}

uint64_t all_arrived(int to)
{
    uint64_t sum = 0;

    for (int i = 1; i <= world.nsides; i++) {
        sum += sides[i].machine == to ? sides[i].got : 0;
    }
    return sum;
}
