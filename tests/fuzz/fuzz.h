/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * fuzz.h - what can be fuzzed, and the box it runs in
 *
 * A target takes bytes, does with them whatever they say, and leaves nothing
 * behind: the same bytes always do the same.  It ends the process with abort()
 * where something is wrong that no sanitizer sees.
 *
 *   packet   the parser: bytes of a channel, in pieces of any size
 *   engine   a driver with the handshake done, real sockets behind it, and a
 *            peer, clients, targets, time and the system doing what they like
 *   text     command lines, init files, monitor commands
 *
 * The same code is linked with libFuzzer, with AFL++ (entry.c) and, with
 * neither, into the suite that replays what was found (test_replay.c).
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "tests/lib/box.h"

typedef void FuzzTarget(const uint8_t *data, size_t len);

FuzzTarget fuzz_packet;
FuzzTarget fuzz_engine;
FuzzTarget fuzz_text;

/* fuzz_target() - by name; NULL: there is none */
FuzzTarget *fuzz_target(const char *name);

/* ---- bytes that say what to do ---------------------------------------- */

/* What is left of an input; when it is used up there are only zeros. */
typedef struct Input {
    const uint8_t *at;
    size_t left;
} Input;

static inline uint8_t in8(Input *in)
{
    if (in->left == 0) {
        return 0;
    }
    in->left--;
    return *in->at++;
}

#endif
