/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * bytes.h - bytes that tell where they belong
 *
 * They depend on the stream they are of and on their position in it, so that
 * one that is lost, doubled, moved or somebody else's is noticed.
 */
#ifndef BYTES_H
#define BYTES_H

#include <stddef.h>
#include <stdint.h>

/* bytes_fill() - what @stream has from @pos on */
void bytes_fill(uint8_t *buf, size_t len, uint64_t stream, uint64_t pos);

/* bytes_right() - how many are right before the first wrong one; @len: all */
size_t bytes_right(const uint8_t *buf, size_t len, uint64_t stream,
                   uint64_t pos);

#endif
