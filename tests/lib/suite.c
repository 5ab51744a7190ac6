/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * suite.c - see suite.h
 */
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "suite.h"

/* More than any test opens, and few enough to try all of them. */
#define MAX_FDS 16384

/* Seconds until libcheck ends a test: against hanging only */
#define UNIT_TIMEOUT 120

TCase *unit_tcase(Suite *suite, const char *name)
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, UNIT_TIMEOUT);
    suite_add_tcase(suite, tcase);
    return tcase;
}

void suite_surroundings(void)
{
    struct rlimit limit;

    umask(022);
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max < MAX_FDS ? limit.rlim_max : MAX_FDS;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

void suite_pass_over(const char *function, const char *what)
{
    size_t len = strlen(function);

    if (len > 3 && strcmp(function + len - 3, "_fn") == 0) {
        len -= 3;
    }
    fprintf(stderr, "passed over: %.*s: needs %s\n", (int)len, function, what);
}

int unit_run(Suite *suite)
{
    SRunner *runner = srunner_create(suite);
    int failed;

    suite_surroundings();
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
