/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * suite.c - see suite.h
 */
#include "suite.h"

/* Seconds until libcheck ends a test: against hanging only */
#define UNIT_TIMEOUT 120

TCase *unit_tcase(Suite *suite, const char *name)
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, UNIT_TIMEOUT);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int unit_run(Suite *suite)
{
    SRunner *runner = srunner_create(suite);
    int failed;

    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
