/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * log.c - see log.h
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "box.h"
#include "log.h"

#define LOG_MAX (1u << 20)
#define LINE_MAX_LEN 4096

static char text[LOG_MAX];
static size_t len;
static bool (*hook_before)(char *prefix, size_t size);
static void (*hook_after)(VPLogLevel level, const char *line);

void log_hooks(bool (*before)(char *prefix, size_t size),
               void (*after)(VPLogLevel level, const char *line))
{
    hook_before = before;
    hook_after = after;
}

/* forget_half() - the older lines */
static void forget_half(void)
{
    char *from = memchr(text + len / 2, '\n', len - len / 2);

    len -= (size_t)(from + 1 - text);
    memmove(text, from + 1, len + 1);
}

void log_line(VPLogLevel level, int channel, const char *what)
{
    static const char *const name[] = {
        "error", "warn", "info", "verbose", "debug",
    };
    char line[LINE_MAX_LEN];
    int err = errno;
    size_t n;

    line[0] = '\0';
    if (hook_before != NULL && !hook_before(line, sizeof(line))) {
        return;
    }
    n = strlen(line);
    snprintf(line + n, sizeof(line) - n, "%s ch%d: %s", name[level], channel,
             what);
    n = strlen(line);
    if (len + n + 2 > sizeof(text)) {
        box_require(hook_before != NULL); /* else the log is flooded */
        forget_half();
    }
    memcpy(text + len, line, n);
    len += n;
    text[len++] = '\n';
    text[len] = '\0';
    if (hook_after != NULL) {
        hook_after(level, line);
    }
    errno = err;
}

const char *log_text(void)
{
    return text;
}

int log_count(const char *what)
{
    int n = 0;

    for (const char *p = text; (p = strstr(p, what)) != NULL; p++) {
        n++;
    }
    return n;
}

void log_clear(void)
{
    len = 0;
    text[0] = '\0';
}

void log_tail(int lines)
{
    const char *from = text + len;

    while (from > text && lines >= 0) {
        from--;
        lines -= *from == '\n';
    }
    fputs(from == text ? from : from + 1, stderr);
}
