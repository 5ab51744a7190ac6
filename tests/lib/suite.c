/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * suite.c - see suite.h
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "suite.h"

/* More than any test opens, and few enough to try all of them. */
#define MAX_FDS 16384

static int test_timeout = 120; /* room for sanitizers */
static SFun test_begin, test_end;
static int planned;

void suite_set(int timeout, SFun begin, SFun end)
{
    test_timeout = timeout;
    test_begin = begin;
    test_end = end;
}

void suite_add(Suite *suite, const char *name, const TTest *test, int times)
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, test_timeout);
    tcase_add_checked_fixture(tcase, test_begin, test_end);
    tcase_add_loop_test(tcase, test, 0, times);
    suite_add_tcase(suite, tcase);
    planned += times;
}

int suite_planned(void)
{
    return planned;
}

static void surroundings(void)
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

int suite_run_with(Suite *suite, void (*failed)(TestResult **results, int n))
{
    SRunner *runner = srunner_create(suite);
    int failures, ran;

    surroundings();
    srunner_run_all(runner, CK_ENV);
    failures = srunner_ntests_failed(runner);
    ran = srunner_ntests_run(runner);
    if (failed != NULL) {
        TestResult **results = srunner_failures(runner);

        failed(results, failures);
        free(results);
    }
    srunner_free(runner);
    if (ran < planned && getenv("CK_RUN_CASE") == NULL &&
        getenv("CK_RUN_SUITE") == NULL) {
        fprintf(stderr, "only %d of %d tests ran\n", ran, planned);
        failures++;
    }
    return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

int suite_run(Suite *suite)
{
    return suite_run_with(suite, NULL);
}
