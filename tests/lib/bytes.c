/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * bytes.c - see bytes.h
 */
#include "bytes.h"

/* word_at() - the eight bytes from @pos on, which is a multiple of 8 */
static uint64_t word_at(uint64_t stream, uint64_t pos)
{
    uint64_t x = (stream + 1) * UINT64_C(0x9e3779b97f4a7c15) + pos / 8;

    x ^= x >> 31;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 29;
}

void bytes_fill(uint8_t *buf, size_t len, uint64_t stream, uint64_t pos)
{
    uint64_t word = word_at(stream, pos) >> pos % 8 * 8;

    for (size_t i = 0; i < len; i++) {
        buf[i] = (uint8_t)word;
        pos++;
        word = pos % 8 == 0 ? word_at(stream, pos) : word >> 8;
    }
}

size_t bytes_right(const uint8_t *buf, size_t len, uint64_t stream,
                   uint64_t pos)
{
    uint64_t word = word_at(stream, pos) >> pos % 8 * 8;

    for (size_t i = 0; i < len; i++) {
        if (buf[i] != (uint8_t)word) {
            return i;
        }
        pos++;
        word = pos % 8 == 0 ? word_at(stream, pos) : word >> 8;
    }
    return len;
}
