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

typedef void FuzzTarget(const uint8_t *data, size_t len);

FuzzTarget fuzz_packet;
FuzzTarget fuzz_engine;
FuzzTarget fuzz_text;

/* fuzz_target() - by name; NULL: there is none */
FuzzTarget *fuzz_target(const char *name);

/* fuzz_require() - end with a message unless @cond holds */
#define fuzz_require(cond)                                                  \
    do {                                                                    \
        if (!(cond)) {                                                      \
            fuzz_failed(__FILE__, __LINE__, #cond);                         \
        }                                                                   \
    } while (0)

void fuzz_failed(const char *file, int line, const char *cond)
    __attribute__((noreturn));

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

static inline uint16_t in16(Input *in)
{
    uint16_t high = in8(in);

    return (uint16_t)(high << 8 | in8(in));
}

/* ---- the box ----------------------------------------------------------
 *
 * Calls that can be made to fail: the next box.after go well, then
 * box.fails of those in the set box.calls fail with box.err.
 */
enum {
    CALL_ALLOC = 1,
    CALL_SOCKET = 2,
    CALL_ACCEPT = 4,
    CALL_CONNECT = 8,
    CALL_FCNTL = 16,
    CALL_READ = 32,
    CALL_WRITE = 64,
};

typedef struct Box {
    uint64_t now;       /* CLOCK_MONOTONIC, in us */
    uint64_t until;     /* leave the loop when time would pass this */
    unsigned passes;    /* of the loop since box_run() */
    unsigned calls;
    unsigned after;
    unsigned fails;
    int err;
    bool small;         /* sockets take as little as the kernel allows */
    size_t allocated;   /* bytes, of the engine */
    size_t blocks;
} Box;

extern Box box;

/* box_reset() - before each input */
void box_reset(void);

/* box_fails() - is this call, one of CALL_*, to fail? sets errno */
bool box_fails(unsigned call);

/* What malloc() and its like are replaced by; box.blocks are not freed yet */
void *box_malloc(size_t size);
void *box_calloc(size_t n, size_t size);
void *box_realloc(void *old, size_t size);
void box_free(void *p);

struct VPLoop;

/* box_run() - run the loop for @us, or with 0 until it would sleep */
void box_run(struct VPLoop *loop, uint64_t us);

#endif
