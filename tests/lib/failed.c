/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * failed.c - box_failed() for suites; fuzzers have their own
 */
#include <check.h>

#include "box.h"

void box_failed(const char *file, int line, const char *what)
{
    ck_abort_msg("%s:%d: not so: %s", file, line, what);
}
