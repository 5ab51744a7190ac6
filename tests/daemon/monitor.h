/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * monitor.h - clients of a daemon's monitor
 *
 * A test talks to the monitor as a program does, on a connection in "batch"
 * mode, and reads what "info ... -k" says word by word.
 */
#ifndef MONITOR_H
#define MONITOR_H

#include "tests/lib/harness.h"

#define VALUE_LEN 400           /* room for one value of "info ... -k" */

/* monitor_dial() - connect to the monitor at path as soon as it is there */
int monitor_dial(const char *path);

/* monitor_batch() - the same, for monitor_ask(): in batch mode */
int monitor_batch(const char *path);

/* monitor_answer() - read an answer up to its "ok" or "error" line; to free */
char *monitor_answer(int fd);

/*
 * monitor_ask() - give a command that must succeed
 *
 * The result, its answer without the "ok", is good until the next call.
 */
const char *monitor_ask(int fd, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* monitor_refuses() - give a command that must fail and name that text */
void monitor_refuses(int fd, const char *command, const char *names);

/*
 * monitor_state() - what a command may change, as text to free: the forwards,
 * the channels and how often they were lost, the connections
 */
char *monitor_state(int fd);

/* execute() - run qemu-vp -m path -x command: its exit status */
int execute(const char *path, const char *command);

/* executed() - what the last one said, on stdout or on stderr */
const char *executed(int stream);

/* --- "info ... -k" ------------------------------------------------------ */

/* line_find() - the nth line that begins with those words, or NULL */
const char *line_find(const char *answer, const char *words, size_t nth);

size_t line_count(const char *answer, const char *words);

/* value() - of a key in a line, decoded; each result is good for 8 calls */
const char *value(const char *line, const char *key);

uint64_t number(const char *line, const char *key);

#endif
