/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_old.c - an older qemu-vp at one end of the channel, this at the other
 *
 * QEMU_VP_OLD in the environment is the older one; old.sh builds one of each
 * tag and runs this.  Without it this one is at both ends.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/lib/bytes.h"
#include "tests/lib/channel.h"

enum { PIECE = 32768 };

/* start() - side @i of the channel, which is the old one if @old */
static Daemon *start(const Channel *c, int i, bool old, const char *options)
{
    const char *path = getenv("QEMU_VP_OLD");
    char present[sizeof(vp_program)];
    Daemon *d;

    strcpy(present, vp_program);
    if (old && path != NULL) {
        ck_assert_uint_lt(strlen(path), sizeof(vp_program));
        strcpy(vp_program, path);
    }
    d = daemon_start_with(&c->start[i], i == 0 ? "host" : "guest", "-c %s %s",
                          c->option[i], options);
    strcpy(vp_program, present);
    return d;
}

/* talk() - a piece each way */
static void talk(int fd, int server, uint64_t stream, uint64_t pos)
{
    static uint8_t said[PIECE], heard[PIECE];

    for (int i = 0; i < 2; i++) {
        bytes_fill(said, PIECE, stream + (unsigned)i, pos);
        send_all(i == 0 ? fd : server, said, PIECE);
        recv_all(i == 0 ? server : fd, heard, PIECE);
        ck_assert_mem_eq(heard, said, PIECE);
    }
}

/* connections() - from each side: cut, half-closed, ended, and refused */
static void connections(Channel *c, Daemon *d[2], const int listener[2])
{
    int fd[2], server[2];

    for (int i = 0; i < 2; i++) {
        fd[i] = dial(daemon_listens(d[i], "echo"), true);
        server[i] = accept_one(listener[!i]);
    }
    for (uint64_t pos = 0; pos < 12 * PIECE; pos += PIECE) {
        for (int i = 0; i < 2; i++) {
            talk(fd[i], server[i], 2 * (unsigned)i, pos);
        }
        if (pos % (4 * PIECE) == 0) {
            relay_tell(&c->relay, RELAY_CUT);
        }
    }
    for (int i = 0; i < 2; i++) {
        shutdown(fd[i], SHUT_WR);
        expect_eof(server[i]);
        send_all(server[i], "the end", 7);
        close(server[i]);
        expect_bytes(fd[i], "the end");
        expect_eof(fd[i]);
        close(fd[i]);
        fd[i] = dial(daemon_listens(d[i], "nobody"), true);
        expect_reset(fd[i]);
        close(fd[i]);
    }
}

/* Either side is the old one, with a key and without; then it starts anew. */
START_TEST(old_and_new)
{
    bool old_host = _i & 1, keyed = _i & 2;
    char options[2][4 * TEXT_LEN], target[TEXT_LEN], key[PATH_LEN] = "";
    int listener[2], fd, server;
    Daemon *d[2];
    Channel c;
    FILE *f;

    if (keyed) {
        file_path(key, "key");
        umask(077);
        f = fopen(key, "w");
        ck_assert(f != NULL && fputs("0123456789abcdef", f) >= 0 &&
                  fclose(f) == 0);
    }
    channel_make(&c, CHANNEL_CABLE, "link");
    for (int i = 0; i < 2; i++) {
        listener[i] = listen_any(target);
        text_format(options[i], sizeof(options[i]), "-i echo:%s "
                    "-o echo:127.0.0.1:0 -o nobody:127.0.0.1:0 %s %s", target,
                    keyed ? "-k" : "", key);
    }
    for (int i = 0; i < 2; i++) {
        d[i] = start(&c, i, old_host == (i == 0), options[i]);
    }
    for (int i = 0; i < 2; i++) {
        daemon_up(d[i]);
    }
    connections(&c, d, listener);
    fd = dial(daemon_listens(d[!old_host], "echo"), true);
    server = accept_one(listener[old_host]);
    talk(fd, server, 8, 0);
    daemon_kill(d[!old_host]);
    d[!old_host] = start(&c, !old_host, true, options[!old_host]);
    expect_reset(server);
    close(server);
    close(fd);
    daemon_up(d[!old_host]);
    connections(&c, d, listener);
    for (int i = 0; i < 2; i++) {
        ck_assert(!daemon_saw(d[i], "breaks the protocol|out of step"));
    }
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("old");

    SUITE_LOOP(s, old_and_new, 4);
    return harness_run(s);
}
