/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * monitor.c - see monitor.h
 */
#define _XOPEN_SOURCE 700

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "monitor.h"

static char *answered;          /* by monitor_ask() */

int monitor_dial(const char *path)
{
    int64_t end = now_ms() + WAIT_MS;
    int fd, err;

    while ((err = dial_errno(path, true, &fd)) != 0) {
        ck_assert_msg(now_ms() < end, "monitor %s: %s", path, strerror(err));
        close(fd);
        sleep_ms(10);
    }
    return fd;
}

int monitor_batch(const char *path)
{
    int fd = monitor_dial(path);

    expect_bytes(fd, "(qemu-vp) ");
    send_all(fd, "batch\n", 6);
    return fd;
}

/* last_line() - where the last of the whole lines of a text begins */
static const char *last_line(const char *text, size_t len)
{
    const char *p = text + len - 1;

    while (p > text && p[-1] != '\n') {
        p--;
    }
    return p;
}

/* is_status() - does the answer end here? */
static bool is_status(const char *line)
{
    return strncmp(line, "ok\n", 3) == 0 || strncmp(line, "error: ", 7) == 0;
}

/* Takes no byte of the answer that may follow. */
char *monitor_answer(int fd)
{
    size_t len = 0, line = 0, room = 4096;
    char *text = malloc(room), *newline;
    bool ended = false;

    while (!ended) {
        size_t take;
        ssize_t n;

        if (len == room - 1) {
            room *= 2;
            text = realloc(text, room);
        }
        ck_assert_ptr_nonnull(text);
        n = recv(fd, text + len, room - len - 1, MSG_PEEK);
        ck_assert_msg(n > 0, "the monitor's answer ends too soon: %s",
                      n == 0 ? "end of data" : strerror(errno));
        take = (size_t)n;
        text[len + take] = '\0';
        while (!ended && (newline = strchr(text + line, '\n')) != NULL) {
            ended = is_status(text + line);
            line = (size_t)(newline + 1 - text);
        }
        if (ended) {
            take = line - len;
        }
        recv_all(fd, text + len, take);
        len += take;
        text[len] = '\0';
    }
    return text;
}

const char *monitor_ask(int fd, const char *fmt, ...)
{
    char command[4 * TEXT_LEN];
    va_list ap;
    size_t len;
    char *last;
    int n;

    va_start(ap, fmt);
    n = vsnprintf(command, sizeof(command) - 1, fmt, ap);
    va_end(ap);
    ck_assert(n > 0 && (size_t)n < sizeof(command) - 1);
    free(answered);
    strcat(command, "\n");
    send_all(fd, command, (size_t)n + 1);
    answered = monitor_answer(fd);
    len = strlen(answered);
    last = answered + (last_line(answered, len) - answered);
    ck_assert_msg(strcmp(last, "ok\n") == 0, "%s: %s", command, last);
    *last = '\0';
    return answered;
}

void monitor_refuses(int fd, const char *command, const char *names)
{
    char *answer;

    send_all(fd, command, strlen(command));
    send_all(fd, "\n", 1);
    answer = monitor_answer(fd);
    ck_assert_msg(strncmp(answer, "error: ", 7) == 0, "'%s' was answered: %s",
                  command, answer);
    ck_assert_msg(strstr(answer, names) != NULL,
                  "'%s': no '%s' in the answer: %s", command, names, answer);
    free(answer);
}

/* append() - add words of a line to a text; all of it where keys is NULL */
static void append(char *text, size_t room, const char *line,
                   const char *const *keys)
{
    size_t len = strlen(text);

    if (!keys) {
        text_format(text + len, room - len, "%.*s\n",
                    (int)strcspn(line, "\n"), line);
        return;
    }
    for (; *keys; keys++) {
        len = strlen(text);
        text_format(text + len, room - len, " %s=%s", *keys,
                    value(line, *keys));
    }
    len = strlen(text);
    text_format(text + len, room - len, "\n");
}

char *monitor_state(int fd)
{
    static const struct {
        const char *info;
        const char *words;      /* that its lines begin with */
        const char *keys[8];    /* those that don't change by themselves */
    } parts[] = {
        { "status", "status", { "pid", "channels", "up", "log" } },
        { "channels", "channel", { "id", "state", "spec", "resyncs",
                                   "reconnects", "last_error" } },
        { "oforwards", "oforward", { NULL } },
        { "iforwards", "iforward", { NULL } },
        { "conns", "conn", { "id", "service", "from", "to" } },
    };
    const size_t room = 65536;
    char *text = calloc(1, room);
    const char *line;

    ck_assert_ptr_nonnull(text);
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        const char *answer = monitor_ask(fd, "info %s -k", parts[i].info);

        for (size_t n = 0; (line = line_find(answer, parts[i].words, n)); n++) {
            append(text, room, line, parts[i].keys[0] ? parts[i].keys : NULL);
        }
    }
    append(text, room, "config:", NULL);
    strncat(text, monitor_ask(fd, "info config"), room - strlen(text) - 1);
    return text;
}

/* --- qemu-vp -x --------------------------------------------------------- */

static const char *const stream_name[] = { NULL, "execute.out", "execute.err" };

int execute(const char *path, const char *command)
{
    char files[3][PATH_LEN];
    int status;
    pid_t pid;

    for (int i = 1; i <= 2; i++) {
        file_path(files[i], stream_name[i]);
    }
    pid = fork();
    ck_assert(pid >= 0);
    if (pid == 0) {
        for (int i = 1; i <= 2; i++) {
            dup2(open(files[i], O_WRONLY | O_CREAT | O_TRUNC, 0644), i);
        }
        signal(SIGPIPE, SIG_DFL);
        execl(vp_program, "qemu-vp", "-m", path, "-x", command, (char *)NULL);
        _exit(127);
    }
    child_add(pid);
    status = child_wait(pid);
    ck_assert_msg(WIFEXITED(status), "-x '%s' died, status %#x", command,
                  (unsigned)status);
    return WEXITSTATUS(status);
}

const char *executed(int stream)
{
    static char text[65536];
    char path[PATH_LEN];
    FILE *f;

    file_path(path, stream_name[stream]);
    f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof(text) - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* --- "info ... -k" ------------------------------------------------------ */

/* line_next() - the first line from p on that begins with words, or NULL */
static const char *line_next(const char *p, const char *words)
{
    size_t len = strlen(words);

    for (; *p; p++) {
        if (strncmp(p, words, len) == 0 && (p[len] == ' ' || p[len] == '\n')) {
            return p;
        }
        p = strchr(p, '\n');
        ck_assert_msg(p != NULL, "no newline at the end");
    }
    return NULL;
}

const char *line_find(const char *answer, const char *words, size_t nth)
{
    const char *p = line_next(answer, words);

    while (p && nth-- > 0) {
        p = line_next(strchr(p, '\n') + 1, words);
    }
    return p;
}

size_t line_count(const char *answer, const char *words)
{
    size_t n = 0;

    for (const char *p = line_next(answer, words); p;
         p = line_next(strchr(p, '\n') + 1, words)) {
        n++;
    }
    return n;
}

/* hex() - the value of two hexadecimal digits */
static char hex(const char *digits)
{
    char text[3] = { digits[0], digits[1], '\0' };

    ck_assert_msg(isxdigit((unsigned char)text[0]) &&
                  isxdigit((unsigned char)text[1]), "%%%s", text);
    return (char)strtol(text, NULL, 16);
}

const char *value(const char *line, const char *key)
{
    static char results[8][VALUE_LEN];
    static size_t next;
    char *result = results[next++ % 8];
    size_t len = strlen(key), n = 0;
    const char *end = strchr(line, '\n');
    const char *p = line;

    ck_assert_ptr_nonnull(end);
    do {
        p = memchr(p, ' ', (size_t)(end - p));
        ck_assert_msg(p != NULL, "no %s in: %.*s", key, (int)(end - line),
                      line);
        p++;
    } while (strncmp(p, key, len) != 0 || p[len] != '=');
    for (p += len + 1; *p != ' ' && *p != '\n'; p++) {
        ck_assert(n + 1 < VALUE_LEN);
        if (*p == '%') {
            result[n++] = hex(p + 1);
            p += 2;
        } else {
            ck_assert_msg(*p > ' ' && *p <= '~', "raw byte %#x in a value",
                          (unsigned)*p);
            result[n++] = *p;
        }
    }
    result[n] = '\0';
    return result;
}

uint64_t number(const char *line, const char *key)
{
    const char *text = value(line, key);
    char *end;
    uint64_t result = strtoull(text, &end, 10);

    ck_assert_msg(isdigit((unsigned char)*text) && *end == '\0',
                  "%s=%s is no number", key, text);
    return result;
}
