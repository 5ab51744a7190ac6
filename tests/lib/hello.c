/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * hello.c - see hello.h
 *
 * The engine itself makes the packet: its check covers the version, so a
 * recorded one can't be changed.
 */
#include "virtproxy.c"
#include "hello.h"

size_t hello_make(unsigned char *buf, unsigned newer)
{
    VPHello hello = {
        .version = (uint16_t)(VP_VERSION + newer),
        .window = 65536,
        .token = 0x1122334455667788,
        .next = VP_SEQ_FIRST,
        .base = VP_SEQ_FIRST,
        .expect = VP_SEQ_FIRST,
    };

    return wire_put_hello(buf, &hello, NULL);
}
