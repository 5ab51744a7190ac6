/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_transcript.c - what goes over the wire, byte for byte
 *
 * Two engines talk in the box, where time and random numbers are always the
 * same, through this test, which writes down each packet.  That must be what
 * plain.txt and keyed.txt beside this file have: so each side, given what the
 * other one said, says what it said when these were recorded, and no change of
 * the wire goes unnoticed.  A line of theirs is
 *
 *     TIME SIDE WHAT HEX      time in us; WHAT is for people; "lost" if it
 *                             was on the channel when that was cut
 *
 * A change that is meant is recorded, and shows in the diff:
 *
 *     VP_RECORD=1 tests/check.sh build/tests/wire/test_transcript
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/lib/boxed.h"
#include "tests/lib/log.h"
#include "tests/lib/sock.h"
#include "tests/lib/suite.h"

static const char *const side_name[] = { "host", "guest" };

/* An engine, and what it has said that is not passed on yet */
typedef struct Side {
    VPLoop *loop;
    VPDriver *drv;
    int fd;          /* the test's end of its channel */
    uint8_t buf[1 << 17];
    size_t len;
} Side;

typedef struct Script {
    Side side[2];    /* the clients', the targets' */
    int listener;    /* the target of the service "echo" */
    bool cut;        /* nothing arrives any more */
    uint64_t start;
    FILE *out;       /* the transcript */
} Script;

static void side_lost(void *opaque, const char *reason, bool was_up)
{
    (void)opaque;
    (void)reason;
    (void)was_up;
}

/* what_is() - a packet's name */
static const char *what_is(const uint8_t *p)
{
    static const char *const type[] = {
        [VP_PKT_CLIENT] = "CLIENT", [VP_PKT_SERVER] = "SERVER",
        [VP_PKT_HELLO] = "HELLO", [VP_PKT_ACK] = "ACK", [VP_PKT_PING] = "PING",
    };
    static const char *const message[] = {
        [VP_MSG_CONNECT_INIT] = "CONNECT_INIT",
        [VP_MSG_CONNECT_ACK] = "CONNECT_ACK",
        [VP_MSG_CONNECT_REFUSED] = "CONNECT_REFUSED",
        [VP_MSG_WINDOW] = "WINDOW", [VP_MSG_CLOSE] = "CLOSE",
        [VP_MSG_RESET] = "RESET", [VP_MSG_SERVICES] = "SERVICES",
        [VP_MSG_PROGRAM] = "PROGRAM",
    };

    return p[VP_PKT_TYPE_AT] == VP_PKT_CONTROL ? message[p[VP_PKT_HDR_LEN]]
                                               : type[p[VP_PKT_TYPE_AT]];
}

/* say() - one packet of @from's goes over the wire */
static void say(Script *s, int from, const uint8_t *p, size_t len)
{
    bool lost = s->cut || s->side[!from].drv == NULL;

    fprintf(s->out, "%8llu %-5s %s%s ",
            (unsigned long long)(box.now - s->start), side_name[from],
            lost ? "lost " : "", what_is(p));
    for (size_t i = 0; i < len; i++) {
        fprintf(s->out, "%02x", p[i]);
    }
    fputc('\n', s->out);
    if (!lost) {
        fd_write(s->side[!from].fd, p, len);
    }
}

/* pass_on() - what @from has said; true if there was something */
static bool pass_on(Script *s, int from)
{
    Side *side = &s->side[from];
    size_t done = 0;
    ssize_t n;

    box_settle(side->loop);
    while ((n = recv(side->fd, side->buf + side->len,
                     sizeof(side->buf) - side->len, 0)) > 0) {
        side->len += (size_t)n;
    }
    while (side->len - done >= VP_PKT_HDR_LEN) {
        const uint8_t *p = side->buf + done;
        size_t len = VP_PKT_HDR_LEN + (size_t)get16(p + 18);

        if (side->len - done < len) {
            break;
        }
        say(s, from, p, len);
        done += len;
    }
    side->len -= done;
    memmove(side->buf, side->buf + done, side->len);
    return done > 0;
}

/* talk() - until nobody has anything to say, then for @ms more */
static void talk(Script *s, int ms)
{
    for (int i = 0; i <= ms; i++) {
        bool more = true;

        while (more) {
            more = pass_on(s, 0);
            more |= pass_on(s, 1);
        }
        box.now += i < ms ? MS : 0;
    }
}

/* plug() - both get a new channel */
static void plug(Script *s)
{
    for (int i = 0; i < 2; i++) {
        Side *side = &s->side[i];
        int fd[2];

        if (side->fd >= 0) {
            close(side->fd);
            box_settle(side->loop);
        }
        fd_pair(fd);
        side->fd = fd[1];
        side->len = 0;
        ck_assert_int_eq(vp_attach(side->drv, fd[0], fd[0], VP_CHN_SOCKET,
                                   i == 0 ? VP_ACCEPTED : VP_CONNECTED), 0);
    }
    s->cut = false;
    talk(s, 0);
}

/* client() - one comes to the host's side of @service */
static int client(Script *s, const char *service)
{
    int fd[2];

    fd_pair(fd);
    engine_accept(s->side[0].drv, service, fd[0]);
    talk(s, 0);
    return fd[1];
}

static void expect_text(int fd, const char *text)
{
    char buf[100] = "";

    ck_assert_int_eq(recv(fd, buf, sizeof(buf), 0), (ssize_t)strlen(text));
    ck_assert_str_eq(buf, text);
}

/* A session from its begin to its end */
static void play(Script *s)
{
    uint32_t id = engine_counts(s->side[0].drv).next_id;
    int fd, target;

    plug(s);
    talk(s, 30);
    /* a connection, which its client half-closes */
    fd = client(s, "echo");
    fd_write(fd, "a question", 10);
    talk(s, 15);
    target = accept(s->listener, NULL, NULL);
    fd_nonblock(target);
    expect_text(target, "a question");
    shutdown(fd, SHUT_WR);
    talk(s, 15);
    ck_assert_int_eq(fd_state(target), FD_EOF);
    fd_write(target, "an answer", 9);
    talk(s, 1);
    expect_text(fd, "an answer");
    close(target);
    talk(s, 15);
    ck_assert_int_eq(fd_state(fd), FD_EOF);
    close(fd);
    /* refused */
    fd = client(s, "nobody");
    talk(s, 15);
    ck_assert_int_ne(fd_state(fd), FD_OPEN);
    close(fd);
    /* reset by its client's side */
    fd = client(s, "echo");
    talk(s, 15);
    target = accept(s->listener, NULL, NULL);
    ck_assert_int_eq(vp_conn_reset(s->side[0].drv, id + 2, true), 0);
    talk(s, 15);
    ck_assert_int_ne(fd_state(fd), FD_OPEN);
    close(fd);
    close(target);
    /* the channel is cut while bytes are on their way both ways */
    fd = client(s, "echo");
    talk(s, 15);
    target = accept(s->listener, NULL, NULL);
    fd_nonblock(target);
    s->cut = true;
    fd_write(fd, "to the target", 13);
    fd_write(target, "to the client", 13);
    talk(s, 1);
    plug(s);
    talk(s, 30);
    expect_text(target, "to the target");
    expect_text(fd, "to the client");
    close(target);
    close(fd);
    talk(s, 15);
    /* the host offers more, and the guest a service less */
    ck_assert_int_eq(vp_set_iforward(s->side[0].drv, "late",
                                     &(VPAddr){ .len = 2 }, 1), 0);
    vp_del_iforward(s->side[1].drv, "other");
    talk(s, 15);
    /* nothing goes on: after a while each asks now and then */
    for (int i = 0; i < 2; i++) {
        box.now += 6 * SECOND;
        talk(s, 15);
    }
    vp_free(s->side[0].drv);
    pass_on(s, 0);
    s->side[0].drv = NULL;
    talk(s, 0);
}

/* script_run() - the transcript of it all, for the caller to free */
static char *script_run(const VPKey *key)
{
    VPConfig config = {
        .grace = 30, .max_conns = 100, .max_half_open = 100,
        .max_opens = 1000, .program = "0.0",
    };
    static Script s;
    size_t len;
    VPAddr addr;
    char *text;

    signal(SIGPIPE, SIG_IGN);
    box_reset(true);
    box.pass_us = 0;
    config.key = *key;
    s.start = box.now;
    s.out = open_memstream(&text, &len);
    ck_assert_ptr_nonnull(s.out);
    s.listener = unix_listen(&addr, 10);
    for (int i = 0; i < 2; i++) {
        s.side[i].fd = -1;
        s.side[i].loop = engine_loop_new();
        ck_assert_ptr_nonnull(s.side[i].loop);
        s.side[i].drv = vp_new(s.side[i].loop, i, &config, side_lost, NULL);
        ck_assert_ptr_nonnull(s.side[i].drv);
    }
    ck_assert_int_eq(vp_set_iforward(s.side[1].drv, "echo", &addr, 1), 0);
    ck_assert_int_eq(vp_set_iforward(s.side[1].drv, "other", &addr, 1), 0);
    play(&s);
    vp_free(s.side[1].drv);
    for (int i = 0; i < 2; i++) {
        vp_loop_free(s.side[i].loop);
        close(s.side[i].fd);
    }
    close(s.listener);
    ck_assert_int_eq(fclose(s.out), 0);
    return text;
}

static const struct {
    const char *name;
    VPKey key;
} transcripts[] = {
    { "plain", { .len = 0 } },
    { "keyed", { .bytes = "a key of the transcript", .len = 23 } },
};

/* line_of() - the line of @text that has byte @at */
static int line_of(const char *text, size_t at)
{
    int line = 1;

    for (size_t i = 0; i < at; i++) {
        line += text[i] == '\n';
    }
    return line;
}

START_TEST(transcript)
{
    static char before[1 << 17];
    char path[1100], *now = script_run(&transcripts[_i].key);
    const char *top = getenv("VP_TOP");
    size_t same = 0;
    FILE *f;

    snprintf(path, sizeof(path), "%s/tests/wire/%s.txt",
             top != NULL ? top : ".", transcripts[_i].name);
    if (getenv("VP_RECORD") != NULL) {
        f = fopen(path, "w");
        ck_assert(f != NULL && fputs(now, f) >= 0 && fclose(f) == 0);
    }
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s: %s", path, strerror(errno));
    before[fread(before, 1, sizeof(before) - 1, f)] = '\0';
    fclose(f);
    while (now[same] != '\0' && now[same] == before[same]) {
        same++;
    }
    ck_assert_msg(now[same] == before[same], "the wire has changed: %s, line "
                  "%d; see the head of test_transcript.c", path,
                  line_of(before, same));
    ck_assert_int_ge(line_of(now, strlen(now)), 40);
    free(now);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("transcript");

    suite_set(60, NULL, NULL);
    SUITE_ROWS(s, transcript, transcripts);
    return suite_run(s);
}
