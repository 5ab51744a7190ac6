/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * manual.h - does the manual explain what a daemon logs?
 *
 * README's section DIAGNOSTICS has the texts of the log, each on a line of its
 * own with an indentation of 4; a word of capitals stands for what is inserted.
 */
#ifndef TESTS_LIB_MANUAL_H
#define TESTS_LIB_MANUAL_H

/*
 * manual_check() - fail the test if the log @path has a line, of level info
 * or above, that DIAGNOSTICS doesn't have
 */
void manual_check(const char *path);

#endif
