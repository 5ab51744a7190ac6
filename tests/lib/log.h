/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * log.h - what the engine logs, in memory
 *
 * Each line is "LEVEL chN: text".
 */
#ifndef LOG_H
#define LOG_H

#include "virtproxy.h"

/* log_line() - VPLogFunc, for vp_loop_new() */
void log_line(VPLogLevel level, int channel, const char *what);

/* log_text() - all that was logged since log_clear() */
const char *log_text(void);

/* log_count() - lines, or parts of lines, that are @text */
int log_count(const char *text);

void log_clear(void);

/* log_tail() - the last lines, to stderr */
void log_tail(int lines);

/* log_expect() - @text was logged @n times; forget the log */
#define log_expect(text, n)                                                 \
    do {                                                                    \
        ck_assert_msg(log_count(text) == (n), "'%s' %d times in:\n%s",      \
                      (text), log_count(text), log_text());                 \
        log_clear();                                                        \
    } while (0)

/* log_quiet() - nothing at @level ("error", "warn") was logged */
#define log_quiet(level)                                                    \
    ck_assert_msg(log_count(level " ch") == 0, "in the log:\n%s", log_text())

/*
 * log_hooks() - for who has more to say, or to know
 * @before:  writes what comes before a line; false: there is no such line
 * @after:   gets each line
 *
 * The oldest lines are forgotten then; else too many of them fail the test.
 */
void log_hooks(bool (*before)(char *prefix, size_t size),
               void (*after)(VPLogLevel level, const char *line));

#endif
