/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * text.c - the program in a box: the target "text"
 *
 * The program is included here with everything replaced by which it could do
 * harm: no path is opened, nothing is bound where the input says, nobody is
 * connected to, and exit() comes back to us.  An input is
 *
 *   how, memory runs out after, text
 *
 * and the text is a command line with an argument on each line, an init file,
 * what a monitor client sends, or two command lines, the second of which is
 * what the running daemon reads at SIGHUP.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netdb.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <syslog.h>
#include <unistd.h>

#include "fuzz.h"

#define TEXT_MAX 4096
#define ARGS_MAX 64

static jmp_buf exited;
static bool ended;                  /* settings_take() came to an exit() */
static int key_fd = -1;             /* stands for every file that is opened */
static const char *file_text = "";  /* what every init file has in it */

static int text_open(const char *path)
{
    errno = ENOENT;
    return strncmp(path, "/key", 4) != 0 || lseek(key_fd, 0, SEEK_SET) < 0
           ? -1 : dup(key_fd);
}

static FILE *text_fopen(const char *path)
{
    errno = ENOENT;
    return path[0] == '/' ? fmemopen((void *)(uintptr_t)file_text,
                                     strlen(file_text), "r") : NULL;
}

static int text_unlink(const char *path)
{
    (void)path;
    return 0;
}

/* text_bind() - to what the kernel picks; not every address is free */
static int text_bind(int fd, const struct sockaddr *addr)
{
    struct sockaddr_storage ss = { .ss_family = addr->sa_family };

    if (addr->sa_data[1] == '!') {
        errno = EADDRINUSE;
        return -1;
    }
    return bind(fd, (struct sockaddr *)&ss, addr->sa_family == AF_UNIX
                ? sizeof(sa_family_t) : addr->sa_family == AF_INET
                ? 16 : 28);
}

static char *text_strdup(const char *text)
{
    char *copy = box_malloc(strlen(text) + 1);

    return copy != NULL ? strcpy(copy, text) : NULL;
}

static int text_getaddrinfo(const char *host, const char *port,
                            const struct addrinfo *hints,
                            struct addrinfo **list)
{
    struct addrinfo numeric = *hints;

    numeric.ai_flags |= AI_NUMERICHOST;
    return getaddrinfo(host, port, &numeric, list);
}

#define refused(err) (errno = (err), -1)

#define main program_main
#define exit(status) longjmp(exited, 1 + (status))
#define puts(text) (void)(text)
#define fputs(text, file) (void)(text)
#define open(path, ...) text_open(path)
#define fopen(path, mode) text_fopen(path)
#define fstat(fd, st) ((fd) > 2 && key_read_fd(fd) ? fstat(fd, st) \
                       : refused(EBADF))
#define lstat(path, st) ((void)(st), refused(ENOENT))
#define unlink(path) text_unlink(path)
#define dup2(from, to) ((void)(from), (void)(to))
#define fork() refused(EAGAIN)
#define bind(fd, addr, len) text_bind(fd, addr)
#define connect(fd, addr, len) ((void)(addr), refused(ECONNREFUSED))
#define getaddrinfo(host, port, hints, list) \
    text_getaddrinfo(host, port, hints, list)
#define openlog(name, options, facility) (void)0
#define syslog(level, ...) (void)(level)
#define write(fd, data, len) ((fd) <= 2 ? (ssize_t)(len) \
                              : write(fd, data, len))
#define malloc(size) box_malloc(size)
#define calloc(n, size) box_calloc(n, size)
#define realloc(old, size) box_realloc(old, size)
#define free(p) box_free(p)
#define strdup(text) text_strdup(text)

static bool key_read_fd(int fd);

#include "qemu-vp.c"

#undef exit
#undef open
#undef fopen
#undef fstat
#undef unlink
#undef write
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef strdup

/* key_read_fd() - only the copies of key_fd are files here */
static bool key_read_fd(int fd)
{
    struct stat st, key;

    return fstat(fd, &st) == 0 && fstat(key_fd, &key) == 0 &&
           st.st_ino == key.st_ino && st.st_dev == key.st_dev;
}

/* getopt_reset() - it remembers where in which argument it left off */
static void getopt_reset(void)
{
    char *args[] = { (char *)(uintptr_t)"qemu-vp", NULL };
    struct option none = { .name = NULL };

    opterr = 0;
    optind = 0;
    getopt_long(1, args, "", &none, NULL);
}

static void world_new(void)
{
    char path[] = "/tmp/vp-fuzz.XXXXXX";

    if (key_fd < 0) {
        key_fd = mkstemp(path);
        box_require(key_fd >= 0 && unlink(path) == 0 &&
                     write(key_fd, "twenty bytes of key\n", 20) == 20);
        signal(SIGPIPE, SIG_IGN);
    }
}

/* args_split() - a line of @text is an argument; their number */
static int args_split(char *text, char *argv[ARGS_MAX + 1])
{
    char *save = NULL;
    int n = 0;

    argv[n++] = (char *)(uintptr_t)"qemu-vp";
    for (char *arg = strtok_r(text, "\n", &save); arg != NULL && n < ARGS_MAX;
         arg = strtok_r(NULL, "\n", &save)) {
        argv[n++] = arg;
    }
    argv[n] = NULL;
    return n;
}

/* settings_take() - settings_read(), or false where the program ends there */
static bool settings_take(Settings *s, int argc, char **argv)
{
    Error err;

    getopt_reset();
    if (setjmp(exited) != 0) {
        ended = true;
        return false;
    }
    ended = false;
    return settings_read(s, argc, argv, &err);
}

/* settings_text() - as --dump-config prints it; to free */
static char *settings_text(const Settings *s)
{
    Text text = { .data = NULL };

    settings_print(&text, s);
    box_require(!text.failed);
    return text.data;
}

/*
 * try_settings() - what --dump-config prints is an init file that says the
 * same (where a value didn't have a newline in it, as no file's can)
 */
static void try_settings(int argc, char **argv, bool again)
{
    Settings first, second;
    char *args[] = { argv[0], (char *)(uintptr_t)"-C/again", NULL };
    char *text, *after;

    if (settings_take(&first, argc, argv) && again && box.calls == 0) {
        text = settings_text(&first);
        file_text = text;
        box_require(settings_take(&second, 2, args));
        after = settings_text(&second);
        box_require(strcmp(text, after) == 0);
        box_free(text);
        box_free(after);
        settings_free(&second);
    }
    settings_free(&first);
}

/* try_monitor() - a client says @text to the running daemon */
static void try_monitor(const char *text)
{
    size_t left = strlen(text);
    char answer[4096];
    int fds[2];

    box_require(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0 &&
                 fcntl(fds[0], F_SETFL, O_NONBLOCK) == 0 &&
                 fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0);
    mon_accepted(NULL, fds[0], NULL);
    while (left > 0) {
        ssize_t n = write(fds[1], text, left < 700 ? left : 700);

        if (n < 0) {
            break; /* it was thrown out */
        }
        text += n;
        left -= (size_t)n;
        box_settle(loop);
        while (read(fds[1], answer, sizeof(answer)) > 0) {
            box_settle(loop);
        }
    }
    shutdown(fds[1], SHUT_WR);
    box_run(loop, 3 * SECOND);
    close(fds[1]);
    box_run(loop, 2 * MON_LOOK);
    box_require(monitors == NULL);
}

/* try_running() - start, be told things, end */
static void try_running(int argc, char **argv, char *monitor, char *again)
{
    static const Settings nothing;
    char *args[ARGS_MAX + 1];
    Settings first;
    Error err;

    if (!settings_take(&settings, argc, argv)) {
        settings_free(&settings);
        return;
    }
    loop = vp_loop_new(log_engine, &log_level);
    if (loop != NULL && vp_watch(loop, key_fd, NULL, NULL) < 0) {
        vp_loop_free(loop); /* nor would the daemon run without any */
        loop = NULL;
    }
    if (loop != NULL && apply(&nothing, &settings, &err)) {
        box_run(loop, SECOND);
        if (monitor != NULL) {
            monitor_spec.addr = "/monitor"; /* where its clients come to */
            try_monitor(monitor);
        }
        if (again != NULL) {
            saved_argc = args_split(again, args);
            saved_argv = args;
            settings_take(&first, saved_argc, saved_argv);
            settings_free(&first);
            getopt_reset();
            if (!ended) { /* with such arguments none would be running */
                reload();
            }
            box_run(loop, SECOND);
        }
        log_status();
    }
    box.calls = 0;
    vp_timer_stop(&quit_timer);
    reload_cancel();
    quitting = false;
    quit_resetting = false;
    while (channels != NULL) {
        channel_del(channels);
    }
    vp_timer_stop(&lookups_timer);
    socket_files_remove();
    if (loop != NULL) {
        vp_unwatch(loop, key_fd);
        vp_loop_free(loop);
    }
    settings_free(&settings);
}

void fuzz_text(const uint8_t *data, size_t len)
{
    static char text[TEXT_MAX + 1];
    char *args[ARGS_MAX + 1];
    char start[] = "-c\nunix-listen:/c:-\n-o\na:127.0.0.1:0\n-i\nb:/x:-\n"
                   "-c\ntcp-connect:127.0.0.1:9:7\n-i\nssh:[::1]:22:7";
    char file[] = "-C/file";
    Input in = { data, len };
    uint8_t how = in8(&in), after = in8(&in);
    char *half;

    world_new();
    box_reset(true);
    box.refuses = true;
    log_level = VP_LOG_INFO;
    log_fd = STDERR_FILENO;
    if (after > 0) {
        box_fail(CALL_ALLOC, ENOMEM, after - 1u, 1);
    }
    len = in.left < TEXT_MAX ? in.left : TEXT_MAX;
    memcpy(text, in.at, len);
    text[len] = '\0';
    file_text = text;
    switch (how % 4) {
    case 0:
        try_settings(args_split(text, args), args, false);
        break;
    case 1:
        try_settings(args_split(file, args), args, true);
        break;
    case 2:
        try_running(args_split(start, args), args, text, NULL);
        break;
    case 3:
        half = strchr(text, '\xff');
        if (half != NULL) {
            *half++ = '\0';
        }
        try_running(args_split(text, args), args, NULL, half);
        break;
    }
    box_require(box.blocks == 0);
}
