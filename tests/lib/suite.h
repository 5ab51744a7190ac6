/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * suite.h - making and running a suite
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

/* UNIT_ADD() - add a test, to be run @loops times with _i counting up */
#define UNIT_ADD(suite, test, loops)                                        \
    tcase_add_loop_test(unit_tcase((suite), #test), (test), 0, (loops))

/* unit_tcase() - a case of its own for each test, with room for sanitizers */
TCase *unit_tcase(Suite *suite, const char *name);

/* suite_surroundings() - a usual umask, and as many descriptors as may be */
void suite_surroundings(void);

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

/* unit_run() - run the suite; what main() returns */
int unit_run(Suite *suite);

#endif
