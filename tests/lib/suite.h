/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * suite.h - making and running a suite
 *
 * A suite's main() makes it, adds its tests, and returns what suite_run()
 * returns.  Each test is a case of its own, so that CK_RUN_CASE=NAME chooses
 * it, and libcheck runs it in a process of its own.  Suites of whole daemons
 * begin with harness_suite() instead of suite_create() (see harness.h).
 */
#ifndef SUITE_H
#define SUITE_H

#include <check.h>

#define COUNT_OF(table) ((int)(sizeof(table) / sizeof((table)[0])))

/*
 * check_that() - ck_assert_msg() for places that are passed a million times
 *
 * libcheck notes each of its own checks in a file.
 */
#define check_that(cond, ...)                                               \
    do {                                                                    \
        if (!(cond)) {                                                      \
            ck_abort_msg(__VA_ARGS__);                                      \
        }                                                                   \
    } while (0)

/* SUITE_ADD() - add a test */
#define SUITE_ADD(suite, test) SUITE_LOOP(suite, test, 1)

/* SUITE_ROWS() - add a test, to be run for each row of a table: @table[_i] */
#define SUITE_ROWS(suite, test, table)                                      \
    SUITE_LOOP(suite, test, COUNT_OF(table))

/*
 * SUITE_LOOP() - add a test, to be run @times with _i counting up
 *
 * For what is no table; a number of rows that is typed here loses the row that
 * somebody adds.
 */
#define SUITE_LOOP(suite, test, times)                                      \
    suite_add((suite), #test, (test), (times))

void suite_add(Suite *suite, const char *name, const TTest *test, int times);

/*
 * suite_set() - for the tests added from here on
 * @timeout:     seconds until libcheck ends one: against hanging only
 * @begin, @end: run before and after each, in its process; or NULL
 */
void suite_set(int timeout, SFun begin, SFun end);

/* suite_planned() - how many runs of tests were added so far */
int suite_planned(void);

/*
 * PASS_OVER() - end a test that can't be done here, and say so
 *
 * check.sh counts and names what was passed over.
 * @what:  it needs, in a few words
 */
#define PASS_OVER(what)                                                     \
    do {                                                                    \
        suite_pass_over(__func__, (what));                                  \
        return;                                                             \
    } while (0)

void suite_pass_over(const char *function, const char *what);

/*
 * suite_run() - run the suite; what main() returns
 *
 * The tests have a usual umask, and as many descriptors as may be.
 * It has failed, too, if fewer tests ran than were added, unless some were
 * chosen.  @failed, if not NULL, gets the failures, at @n of them.
 */
int suite_run(Suite *suite);
int suite_run_with(Suite *suite, void (*failed)(TestResult **results, int n));

#endif
