/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * entry.c - where libFuzzer and AFL++ come in
 *
 * FUZZ_TARGET in the environment names the target.
 */
#include <stdio.h>
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static const struct {
    const char *name;
    FuzzTarget *run;
} targets[] = {
    { "packet", fuzz_packet },
    { "engine", fuzz_engine },
    { "text", fuzz_text },
};

FuzzTarget *fuzz_target(const char *name)
{
    for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++) {
        if (strcmp(targets[i].name, name) == 0) {
            return targets[i].run;
        }
    }
    return NULL;
}

void box_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static FuzzTarget *target;

    if (target == NULL) {
        const char *name = getenv("FUZZ_TARGET");

        target = name != NULL ? fuzz_target(name) : NULL;
        if (target == NULL) {
            fputs("FUZZ_TARGET is packet, engine or text\n", stderr);
            exit(2);
        }
    }
    target(data, len);
    return 0;
}
