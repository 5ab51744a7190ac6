/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_session.c - what survives a channel, and what must not
 *
 * A session goes on over any number of channels, as long as both sides are
 * what they were.  If one isn't, every connection of it is reset, and none of
 * its bytes is delivered.
 */
#include "tests/lib/pair.h"
#include "tests/lib/rig.h"

/* ---- a connection through them ---------------------------------------- */

typedef struct Stream {
    int fd[2];        /* client, target; -1: not there yet */
    uint64_t sent[2];
    uint64_t got[2];
} Stream;

static void stream_new(Stream *s, Pair *p)
{
    int fd[2];

    if (p->tcp) {
        tcp_pair(fd);
    } else {
        fd_pair(fd);
    }
    engine_accept(p->drv[0], "s", fd[0]);
    *s = (Stream){ .fd = { fd[1], -1 } };
}

/* stream_accept() - take the target's end once the engine makes it */
static void stream_accept(Stream *s, Pair *p)
{
    if (s->fd[1] < 0) {
        s->fd[1] = accept(p->listener, NULL, NULL);
        if (s->fd[1] >= 0) {
            fd_nonblock(s->fd[1]);
        }
    }
}

static void stream_send(Stream *s, int side, size_t len)
{
    uint8_t data[4096];

    ck_assert_uint_le(len, sizeof(data));
    bytes_fill(data, len, (unsigned)side, s->sent[side]);
    fd_write(s->fd[side], data, len);
    s->sent[side] += len;
}

static void stream_read(Stream *s, Pair *p)
{
    stream_accept(s, p);
    for (int i = 0; i < 2; i++) {
        if (s->fd[i] >= 0) {
            fd_drain(s->fd[i], (unsigned)(1 - i), &s->got[i]);
        }
    }
}

/* stream_wait() - until all that was sent has come */
static void stream_wait(Stream *s, Pair *p)
{
    uint64_t end = box.now + 20 * SECOND;
    int tries = 0;

    for (;;) {
        box_settle(p->loop);
        stream_read(s, p);
        if (s->got[0] == s->sent[1] && s->got[1] == s->sent[0] &&
            s->fd[1] >= 0) {
            break;
        }
        ck_assert_msg(box.now < end, "%llu of %llu there, %llu of %llu back; "
                      "in the log:\n%s", (unsigned long long)s->got[1],
                      (unsigned long long)s->sent[0],
                      (unsigned long long)s->got[0],
                      (unsigned long long)s->sent[1], log_text());
        if (pair_up(p) && engine_unacked(p->drv[0]) +
            engine_unacked(p->drv[1]) == 0) {
            box_pause(&tries); /* it is in the kernel's hands */
        }
        box_run(p->loop, 10 * MS);
    }
}

/* stream_end() - both sides shut down, and both see the end */
static void stream_end(Stream *s, Pair *p)
{
    int tries = 0;

    for (int i = 0; i < 2; i++) {
        shutdown(s->fd[i], SHUT_WR);
    }
    box_run(p->loop, 5 * MS);
    while (fd_state(s->fd[0]) != FD_EOF || fd_state(s->fd[1]) != FD_EOF) {
        box_pause(&tries);
        box_run(p->loop, 50 * MS);
    }
    close(s->fd[0]);
    close(s->fd[1]);
}

/* stream_reset() - after what came, its client and its target see a reset */
static void stream_reset(Stream *s, Pair *p)
{
    int tries = 0;

    for (int i = 0; i < 2; i++) {
        int state;

        while ((state = fd_drain(s->fd[i], (unsigned)(1 - i),
                                 &s->got[i])) == FD_OPEN) {
            box_pause(&tries);
            box_settle(p->loop);
        }
        ck_assert_int_eq(state, ECONNRESET);
        close(s->fd[i]);
    }
}

START_TEST(pair_works)
{
    static Pair p;
    Stream s;

    pair_new(&p, &rig_config, true);
    pair_wait(&p);
    pair_check(&p);
    log_expect("channel up: new session", 2);
    stream_new(&s, &p);
    stream_send(&s, 0, 1000);
    stream_wait(&s, &p);
    stream_send(&s, 1, 4000);
    stream_wait(&s, &p);
    stream_end(&s, &p);
    box_run(p.loop, SECOND);
    ck_assert_uint_eq(engine_conns(p.drv[0]) + engine_conns(p.drv[1]), 0);
    log_quiet("warn");
    log_quiet("error");
    pair_free(&p);
}
END_TEST

/* An hour of nothing: the session is there, and the loop slept. */
START_TEST(pair_idle)
{
    static Pair p;
    unsigned long passes;
    Stream s;

    pair_new(&p, &rig_config, false);
    stream_new(&s, &p);
    stream_send(&s, 0, 10);
    stream_wait(&s, &p);
    box_run(p.loop, 20 * SECOND);
    passes = box.passes;
    for (int i = 0; i < 720; i++) {
        box_run(p.loop, 5 * SECOND);
        box_settle(p.loop);
    }
    /* both sides PING and ACK; two passes for each of these, and ours */
    ck_assert_uint_le(box.passes - passes, 720 * 16);
    ck_assert(pair_up(&p));
    log_quiet("warn");
    stream_send(&s, 1, 10);
    stream_wait(&s, &p);
    stream_end(&s, &p);
    pair_free(&p);
}
END_TEST

/* ---- handshakes ------------------------------------------------------- */

/* What the line does, for line_mask() and line_damage() */
static struct {
    unsigned mask;      /* pieces that it loses: a set */
    int from;           /* the direction that it damages */
    int how;            /* as below */
    uint64_t at;        /* byte of that direction */
} harm;

/* line_mask() - lose the pieces whose bits are set, in order of arrival */
static void line_mask(Pair *p, int from, uint8_t *data, size_t *len)
{
    (void)from;
    (void)data;
    if (p->pieces < 10 && (harm.mask >> p->pieces & 1)) {
        *len = 0;
    }
}

/*
 * Any of the first ten things said on the line is lost, and then, in half of
 * the tests, the line is cut.  As neither side was restarted, no connection
 * may notice; not even where only one side saw a handshake completed.
 */
START_TEST(handshake_losses)
{
    for (unsigned mask = 0; mask < 1024; mask++) {
        static Pair p;
        Stream old, young;

        log_clear();
        pair_new(&p, &rig_config, false);
        if (_i & 1) {
            stream_new(&old, &p);
            stream_send(&old, 0, 100);
            stream_wait(&old, &p);
            pair_cut(&p);
            stream_send(&old, 0, 100);
            stream_send(&old, 1, 50);
            pair_plug(&p);
        }
        stream_new(&young, &p);
        stream_send(&young, 0, 77);
        p.pieces = 0;
        harm.mask = mask;
        p.line = line_mask;
        for (int i = 0; i < 50 && p.pieces < 10; i++) {
            box_run(p.loop, 100 * MS);
        }
        if (_i & 2) {
            pair_cut(&p);
            pair_plug(&p);
        }
        p.line = NULL;
        pair_wait(&p);
        pair_check(&p);
        ck_assert_msg(log_count("session ended") == 0, "%s", log_text());
        stream_wait(&young, &p);
        stream_end(&young, &p);
        if (_i & 1) {
            stream_wait(&old, &p);
            stream_end(&old, &p);
        }
        pair_free(&p);
    }
}
END_TEST

/* Both lose track at the same moment. */
START_TEST(both_resync)
{
    static Pair p;
    Stream s;

    pair_new(&p, &rig_config, false);
    stream_new(&s, &p);
    stream_send(&s, 0, 500);
    stream_wait(&s, &p);
    for (int i = 0; i < 50; i++) {
        uint8_t noise[40];

        memset(noise, i, sizeof(noise));
        stream_send(&s, 0, 100);
        stream_send(&s, 1, 100);
        fd_write(p.end[0].fd, noise, sizeof(noise));
        fd_write(p.end[1].fd, noise, sizeof(noise));
        stream_wait(&s, &p);
        pair_check(&p);
    }
    ck_assert_uint_ge(engine_link(p.drv[0]).resyncs, 50);
    stream_end(&s, &p);
    pair_free(&p);
}
END_TEST

/* ---- damage on the line ----------------------------------------------- */

enum { FLIP, DROP, DOUBLE, RECONNECT };

/* line_damage() - once, at byte harm.at of one direction */
static void line_damage(Pair *p, int from, uint8_t *data, size_t *len)
{
    uint64_t before = p->end[from].moved;
    size_t at = (size_t)(harm.at - before);

    if (from != harm.from || harm.at < before || harm.at - before >= *len) {
        return;
    }
    switch (harm.how) {
    case FLIP:
        data[at] ^= (uint8_t)(1u << at % 8);
        break;
    case DROP:
        memmove(data + at, data + at + 1, *len - at - 1);
        --*len;
        break;
    case DOUBLE:
        memmove(data + at + 1, data + at, *len - at);
        ++*len;
        break;
    case RECONNECT:
        *len = at; /* the rest is lost, and so is what follows */
        p->cut = true;
        break;
    }
}

/*
 * One exchange, with the handshake before it, is damaged at each byte that
 * one side says.  All bytes arrive, once, and no connection is reset.
 */
START_TEST(damage)
{
    uint64_t total = 0;

    /* the first time nothing is damaged */
    for (uint64_t at = 0; at <= total; at++) {
        static Pair p;
        Stream s;

        log_clear();
        pair_new(&p, &rig_config, false);
        p.line = line_damage;
        harm.from = _i % 2;
        harm.how = _i / 2;
        harm.at = at - 1;
        stream_new(&s, &p);
        stream_send(&s, 0, 150);
        for (int i = 0; i < 4; i++) {
            box_run(p.loop, 15 * MS);
            if (p.cut) {
                pair_cut(&p);
                pair_plug(&p);
            }
            stream_accept(&s, &p);
            if (s.fd[1] >= 0 && s.sent[1] == 0) {
                stream_send(&s, 1, 100);
            }
        }
        p.line = NULL;
        total = at == 0 ? p.end[_i % 2].moved : total;
        stream_wait(&s, &p);
        stream_end(&s, &p);
        ck_assert_msg(log_count("session ended") == 0, "%s", log_text());
        pair_free(&p);
    }
    ck_assert_uint_gt(total, 400);
}
END_TEST

/* A channel that is made anew all the time under load, at any byte */
START_TEST(cut_under_load)
{
    static Pair p;
    Stream s[5];

    pair_new(&p, &rig_config, false);
    for (int i = 0; i < 5; i++) {
        stream_new(&s[i], &p);
        stream_send(&s[i], 0, 1);
        stream_wait(&s[i], &p);
    }
    for (int round = 0; round < 300; round++) {
        for (int i = 0; i < 5; i++) {
            if (s[i].sent[0] - s[i].got[1] < 100000) {
                stream_send(&s[i], 0, 1 + rnd(4096));
            }
            if (s[i].sent[1] - s[i].got[0] < 100000) {
                stream_send(&s[i], 1, 1 + rnd(4096));
            }
        }
        box.io_max = 1 + rnd(5000);
        box_step(p.loop, 1 + rnd(20));
        for (int i = 0; i < 5; i++) {
            stream_read(&s[i], &p);
        }
        if (rnd(2) == 0) {
            pair_cut(&p);
            box_run(p.loop, rnd(SECOND));
            pair_plug(&p);
        }
    }
    box.io_max = 0;
    for (int i = 0; i < 5; i++) {
        stream_wait(&s[i], &p);
        stream_end(&s[i], &p);
    }
    log_expect("session ended", 0);
    pair_free(&p);
}
END_TEST

/* Numbers of packets and of connections pass 0 without being noticed. */
START_TEST(wrap_around)
{
    static Pair p;
    Stream s, one;
    uint32_t packets[2] = { 0, 0 };

    pair_new(&p, &rig_config, false);
    stream_new(&s, &p);
    ck_assert_uint_eq(engine_counts(p.drv[0]).next_id, VP_CONN_FIRST + 1);
    stream_send(&s, 0, 1);
    stream_wait(&s, &p);
    for (int i = 0; i < 250; i++) {
        stream_new(&one, &p);
        stream_send(&one, 0, 5);
        stream_wait(&one, &p);
        stream_send(&one, 1, 6);
        stream_wait(&one, &p);
        stream_send(&s, 0, 7);
        stream_send(&s, 1, 8);
        stream_wait(&s, &p);
        if (i % 50 == 0) {
            pair_cut(&p);
            pair_plug(&p);
        }
        stream_end(&one, &p);
    }
    for (int i = 0; i < 2; i++) {
        packets[i] = engine_link(p.drv[i]).next - VP_SEQ_FIRST;
        ck_assert_uint_gt(packets[i], 1000);
    }
    ck_assert_uint_eq(engine_counts(p.drv[0]).next_id, VP_CONN_FIRST + 251);
    ck_assert_uint_lt(engine_counts(p.drv[0]).next_id, 1000);
    log_expect("session ended", 0);
    stream_end(&s, &p);
    pair_free(&p);
}
END_TEST

/* An id that is in use after all others were is left out. */
START_TEST(ids_in_use)
{
    static Pair p;
    Stream s[4];

    pair_new(&p, &rig_config, false);
    for (int i = 0; i < 4; i++) {
        stream_new(&s[i], &p);
        stream_send(&s[i], 0, 1);
        stream_wait(&s[i], &p);
        if (i == 2) {
            engine_set_next_id(p.drv[0], VP_CONN_FIRST); /* once around */
        }
    }
    ck_assert_uint_eq(engine_counts(p.drv[0]).next_id, VP_CONN_FIRST + 4);
    log_quiet("warn");
    for (int i = 0; i < 4; i++) {
        stream_end(&s[i], &p);
    }
    pair_free(&p);
}
END_TEST

/*
 * One side is restarted, again and again, under load: resets, no lies.  It may
 * have said so or not: killed, it can't.
 */
START_TEST(restarts)
{
    static Pair p;

    pair_new(&p, &rig_config, true);
    for (int round = 0; round < 100; round++) {
        int which = _i == 2 ? round % 2 : _i;
        Stream s;

        stream_new(&s, &p);
        stream_send(&s, 0, 1 + rnd(1000));
        stream_wait(&s, &p);
        stream_send(&s, 1, 1 + rnd(4000));
        stream_send(&s, 0, 1 + rnd(4000));
        box_step(p.loop, 1 + rnd(10));
        if (round / 2 % 2 == 0) {
            vp_free(p.drv[which]);
            pair_cut(&p);
        } else {
            pair_cut(&p);
            vp_free(p.drv[which]);
        }
        pair_boot(&p, which);
        pair_plug(&p);
        pair_wait(&p);
        pair_check(&p);
        stream_reset(&s, &p);
    }
    log_expect("set back in time", 0);
    pair_free(&p);
}
END_TEST

/* ---- resume or not ---------------------------------------------------- */

/*
 * A session in which both sides sent something: the engine 5 packets, of
 * which 2 are acked, the peer 4.
 */
typedef struct Held {
    Rig r;
    int client[5];
    int listener;
    int target[4];
} Held;

static void held_new(Held *h, const VPConfig *config)
{
    Rig *r = &h->r;

    rig_new(r, config);
    r->tcp = true;
    h->listener = rig_target(r, "svc");
    peer_session(r);
    for (int i = 0; i < 2; i++) {
        h->client[i] = rig_client(r, "c");
        peer_expect(r, VP_CONN_FIRST + (uint32_t)i, VP_MSG_CONNECT_INIT);
    }
    peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
    for (int i = 2; i < 5; i++) {
        h->client[i] = rig_client(r, "c");
        peer_expect(r, VP_CONN_FIRST + (uint32_t)i, VP_MSG_CONNECT_INIT);
    }
    peer_expects(r, VP_SEQ_FIRST + 2); /* as acked; "expect" is really + 5 */
    for (int i = 0; i < 4; i++) {
        /* no answer yet: to a service that is connecting it would come */
        peer_send(r, VP_PKT_CLIENT, 0, 1000, "late", 4);
    }
    peer_expects(r, VP_SEQ_FIRST + 5);
    ck_assert_uint_eq(engine_link(r->drv).base, VP_SEQ_FIRST + 2);
    ck_assert_uint_eq(engine_link(r->drv).next, VP_SEQ_FIRST + 5);
    ck_assert_uint_eq(engine_link(r->drv).expect, VP_SEQ_FIRST + 4);
    log_clear();
}

static void held_free(Held *h)
{
    for (int i = 0; i < 5; i++) {
        close(h->client[i]);
    }
    close(h->listener);
    rig_free(&h->r);
}

typedef enum Verdict { RESUMED, SET_BACK, OTHER_SESSION } Verdict;

/* What the peer claims, off from the truth, and what comes of it */
static const struct {
    int my_epoch, peer_epoch, digest, expect, base, next;
    Verdict verdict;
} claims[] = {
    { 0, 0, 0, 0, 0, 0, RESUMED },
    { 0, 0, 0, 0, -2, 0, RESUMED },       /* it can still send those */
    { 0, 0, 0, 0, -4, 0, RESUMED },
    { 0, 0, 0, 0, 0, 3, RESUMED },        /* it has more for us */
    { 0, 0, 0, 0, 0, 1000, RESUMED },
    { 0, 0, 1, 0, 0, 0, SET_BACK },       /* got other packets than ours */
    { 0, 0, 0, -1, 0, 0, SET_BACK },      /* digest of 5, but expects 4 */
    { 0, 0, 0, -4, 0, 0, SET_BACK },      /* expects what was acked */
    { 0, 0, 0, 1, 0, 0, SET_BACK },       /* expects what comes after next */
    { 0, 0, 0, INT_MAX, 0, 0, SET_BACK },
    { 0, 0, 0, INT_MIN, 0, 0, SET_BACK },
    { 0, 0, 0, 0, -4, -1, SET_BACK },     /* never sent what we received */
    { 0, 0, 0, 0, -4, -4, SET_BACK },
    { 0, 0, 0, 0, 0, INT_MIN, SET_BACK },
    { 0, 0, 0, 0, 1, 1, SET_BACK },       /* can't send what we miss */
    { 0, 0, 0, 0, INT_MIN, 0, SET_BACK },
    { 1, 0, 0, 0, 0, 0, OTHER_SESSION },
    { 0, 1, 0, 0, 0, 0, OTHER_SESSION },
    { 1, 1, 0, 0, 0, 0, OTHER_SESSION },
};

START_TEST(resume)
{
    static Held h;
    Peer *p = &h.r.peer;
    bool up;

    engine_log_level = VP_LOG_DEBUG;
    held_new(&h, &rig_config);
    if (_i % 2) {
        rig_unplug(&h.r);
        rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
    }
    peer_claim(&h.r.peer);
    p->hello.my_epoch += (uint64_t)claims[_i / 2].my_epoch;
    p->hello.peer_epoch += (uint64_t)claims[_i / 2].peer_epoch;
    p->hello.digest += (uint64_t)claims[_i / 2].digest;
    p->hello.expect += (uint32_t)claims[_i / 2].expect;
    p->hello.base += (uint32_t)claims[_i / 2].base;
    p->hello.next += (uint32_t)claims[_i / 2].next;
    up = peer_shake(&h.r);
    ck_assert(up);
    switch (claims[_i / 2].verdict) {
    case RESUMED:
        ck_assert_int_eq(log_count("channel up: session resumed"), 1);
        ck_assert_uint_eq(engine_link(h.r.drv).epoch[1], p->hello.my_epoch);
        for (int i = 0; i < 5; i++) {
            ck_assert_int_eq(fd_state(h.client[i]), FD_OPEN);
        }
        break;
    case SET_BACK:
    case OTHER_SESSION:
        ck_assert_int_eq(log_count("session ended"),
                         claims[_i / 2].verdict == SET_BACK);
        log_expect("channel up: new session", 1);
        ck_assert_uint_eq(engine_link(h.r.drv).epoch[1], p->hello.token);
        ck_assert_uint_eq(engine_link(h.r.drv).epoch[0], p->heard.token);
        ck_assert_uint_eq(engine_link(h.r.drv).expect, VP_SEQ_FIRST);
        ck_assert_uint_eq(engine_link(h.r.drv).next, VP_SEQ_FIRST);
        for (int i = 0; i < 5; i++) {
            fd_wait(h.r.loop, h.client[i], ECONNRESET);
        }
        ck_assert_uint_eq(engine_counts(h.r.drv).conns, 0);
        break;
    }
    held_free(&h);
}
END_TEST

/* What was not received is sent again from there on, and nothing else. */
START_TEST(replay)
{
    for (uint32_t from = 2; from <= 5; from++) {
        static Held h;
        Peer *p = &h.r.peer;

        held_new(&h, &rig_config);
        rig_unplug(&h.r);
        rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
        peer_expects(&h.r, VP_SEQ_FIRST + from);
        peer_claim(&h.r.peer);
        ck_assert(peer_shake(&h.r));
        for (uint32_t i = from; i < 5; i++) {
            peer_expect(&h.r, VP_CONN_FIRST + i, VP_MSG_CONNECT_INIT);
            ck_assert(p->pkt.flags & VP_FLAG_ACK_NOW);
        }
        peer_quiet(&h.r);
        log_expect("channel up: session resumed", 1);
        held_free(&h);
    }
}
END_TEST

/*
 * The session was ended here, and the peer, which knows nothing of that, got
 * nothing from us: to it, going on from the first packet looks possible.
 * But what it sends again was delivered once.
 */
START_TEST(forgotten_session)
{
    VPConfig config = rig_config;
    int listener, target;
    char paid[8];
    static Rig r;

    config.grace = 0;
    rig_new(&r, &config);
    listener = rig_target(&r, "s");
    peer_session(&r);
    peer_init(&r, 1, "s", 1000);
    target = rig_accept(&r, listener);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "pay 100", 7);
    box_wait(r.loop, recv(target, paid, sizeof(paid), 0) == 7);
    log_clear();
    if (_i == 0) {
        rig_unplug(&r);
        box_run(r.loop, MS);
        ck_assert_int_eq(log_count("session ended"), 1);
        rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    } else {
        peer_send(&r, 99, 0, 0, NULL, 0); /* an offence */
        ck_assert_int_eq(log_count("session ended"), 1);
        box_run(r.loop, 2 * SECOND);
    }
    log_clear();
    r.peer.hello.next = r.peer.next;
    ck_assert(peer_shake(&r));
    log_expect("channel up: new session", 1);
    ck_assert_uint_eq(engine_link(r.drv).epoch[1], r.peer.hello.token);
    close(target);
    close(listener);
    rig_free(&r);
}
END_TEST

/*
 * A handshake that only we saw completed: nothing is sent before the peer has
 * shown that it saw it, too, so who waits can still begin in another session.
 */
START_TEST(unconfirmed_session)
{
    static Rig r;
    int client;

    rig_new(&r, &rig_config);
    r.tcp = true;
    client = rig_client(&r, "c");
    fd_write(client, "hello", 5);
    for (unsigned i = 0; i < 3; i++) {
        peer_drain(&r);
        peer_say(&r, 500 + i, 0);
        peer_drain(&r);
        peer_say(&r, 500 + i, 0);
        ck_assert_str_eq(engine_link(r.drv).state, "up");
        log_expect("channel up: new session", 1);
        peer_keys(&r.peer);
        box_run(r.loop, SECOND);
        while (peer_next(&r) != 0) {
            ck_assert_int_ge(r.peer.pkt.type, VP_PKT_HELLO);
            peer_begin(&r.peer);
        }
        if (_i == 1) {
            rig_unplug(&r);
            rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
            peer_next(&r);
        }
        ck_assert_int_eq(fd_state(client), FD_OPEN);
        log_clear();
    }
    peer_session(&r);
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    do {
        ck_assert_int_ne(peer_next(&r), 0);
    } while (r.peer.pkt.type != VP_PKT_CLIENT);
    ck_assert_mem_eq(r.peer.data, "hello", 5);
    close(client);
    rig_free(&r);
}
END_TEST

static const struct {
    const char *service; /* that the connection is to now, or NULL */
    bool same;
} late_echoes[] = {
    { "old", true }, { "new", false }, { NULL, false },
};

/*
 * Thrown back into the middle of a handshake, we are put by the peer's echo,
 * which was under way, into the session that the abandoned time was in.  What
 * the peer then answers to that time is nothing to a connection that has the
 * same id now, unless all that was sent is the same.
 */
START_TEST(late_echo)
{
    const char *service = late_echoes[_i].service;
    bool same = late_echoes[_i].same;
    static uint8_t data[VP_PKT_LEN_MAX];
    static Rig r;
    VPPacket sent;
    int client;

    rig_new(&r, &rig_config); /* the abandoned time */
    peer_session(&r);
    client = rig_client(&r, "old");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    sent = r.peer.pkt;
    memcpy(data, r.peer.data, sent.bytes);
    close(client);
    rig_free(&r);

    rig_new(&r, &rig_config);
    r.tcp = !same; /* what is sent names the client, too */
    peer_session(&r);
    if (service != NULL) {
        client = rig_client(&r, service);
        peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    }
    log_clear();
    r.peer.expect = VP_SEQ_FIRST + 1;
    /* with the tokens of this session, which are the abandoned time's, too */
    sent.data_check = wire_data_check(&r.peer.rx_payload_key, data, sent.bytes);
    r.peer.digest = digest_add(0, &sent);
    peer_credit(&r, 0, VP_CONN_FIRST, VP_MSG_CONNECT_ACK, 1 << 20);
    if (service != NULL) {
        ck_assert_uint_eq(rig_conn(&r, VP_CONN_FIRST, true).tx_limit,
                          same ? 1 << 20 : VP_WINDOW_INIT);
    }
    if (!same) {
        ck_assert_int_eq(log_count("no packet where one should begin"), 1);
        peer_claim(&r.peer);
        ck_assert(peer_shake(&r));
        ck_assert_int_eq(log_count("one side was set back in time"), 1);
        log_expect("channel up: new session", 1);
    }
    if (service != NULL) {
        ck_assert_int_eq(fd_state(client), same ? FD_OPEN : ECONNRESET);
        close(client);
    }
    rig_free(&r);
}
END_TEST

/* ---- with a key ------------------------------------------------------- */

static const VPKey key = { .bytes = "open sesame", .len = 11 };
static const VPKey other_key = { .bytes = "open barley", .len = 11 };

static void keyed_new(Rig *r, const VPKey *ours, const VPKey *theirs)
{
    VPConfig config = rig_config;

    if (ours != NULL) {
        config.key = *ours;
    }
    rig_new(r, &config);
    r->peer.key = theirs;
}

START_TEST(key_fits)
{
    static Rig r;

    keyed_new(&r, &key, &key);
    peer_session(&r);
    ck_assert(r.peer.heard.flags & VP_HELLO_KEYED);
    peer_init(&r, 1, "none", 0);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    /* the tokens alone, which anybody can read, are no key to the packets */
    header_key(&r.peer.tx_key, wire_seed(r.peer.hello.token,
                                         r.peer.heard.token, NULL));
    peer_init(&r, 2, "none", 0);
    log_expect("out of step", 1);
    r.peer.next--; /* it was not taken */
    peer_claim(&r.peer);
    ck_assert(peer_shake(&r));
    log_expect("session ended", 0);
    rig_free(&r);
}
END_TEST

/* key_reload() - the engine gets another key for its sessions from now on */
static void key_reload(Rig *r, const VPKey *to)
{
    VPConfig config = rig_config;

    config.key = *to;
    vp_set_config(r->drv, &config);
}

/* said_hello() - was the last HELLO that came to @fd made with @by? */
static bool said_hello(int fd, const VPKey *by, VPHello *h)
{
    uint8_t buf[4096];
    ssize_t len = recv(fd, buf, sizeof(buf), 0);
    bool proved = false;

    for (ssize_t at = 0; at < len; at++) {
        if (wire_get_hello(buf + at, (size_t)(len - at), h) > 0) {
            proved = hello_proved(h, buf + at, by);
        }
    }
    return proved;
}

/*
 * A peer that holds another session can't have the key of this one: it is
 * shown the one in force, else both would wait for ever.
 */
START_TEST(key_reloaded_apart)
{
    static Rig r;
    VPHello h;

    keyed_new(&r, &key, &key);
    peer_session(&r);
    peer_drain(&r);
    key_reload(&r, &other_key);
    peer_claim(&r.peer);
    peer_say(&r, 4711, 0);
    ck_assert(said_hello(r.peer.fd, &key, &h)); /* the same session, its key */
    r.peer.key = &other_key;
    r.peer.hello.my_epoch = 5;
    r.peer.hello.peer_epoch = 6;
    peer_say(&r, 4712, 0);
    ck_assert(said_hello(r.peer.fd, &other_key, &h));
    ck_assert_uint_eq(h.echo, 4712);
    ck_assert(peer_shake(&r));
    log_expect("a different key", 0);
    rig_free(&r);
}
END_TEST

/* A further peer is greeted for the session, whose key proves it. */
START_TEST(key_reloaded_greets)
{
    static Rig r;
    VPHello h;
    int fd[2];

    keyed_new(&r, &key, &key);
    peer_session(&r);
    peer_drain(&r);
    key_reload(&r, &other_key);
    fd_pair(fd);
    vp_offer(r.drv, fd[0], VP_CONNECTED);
    box_settle(r.loop);
    ck_assert(said_hello(fd[1], &key, &h));
    ck_assert_uint_eq(h.my_epoch, engine_link(r.drv).epoch[0]);
    ck_assert_uint_eq(h.peer_epoch, engine_link(r.drv).epoch[1]);
    close(fd[1]);
    rig_free(&r);
}
END_TEST

static const struct {
    const VPKey *ours, *theirs;
    const char *why;
} misfits[] = {
    { &key, NULL, "the other end has no key" },
    { &key, &other_key, "the other end has a different key" },
    { NULL, &key, "the other end wants a key" },
};

/* No channel, however often it is tried, and one line says why. */
START_TEST(key_misfits)
{
    static Rig r;

    keyed_new(&r, misfits[_i].ours, misfits[_i].theirs);
    for (int i = 0; i < 5; i++) {
        ck_assert(!peer_shake(&r));
        box_run(r.loop, 5 * SECOND);
        peer_drain(&r);
        rig_unplug(&r);
        rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    }
    ck_assert_int_eq(log_count(misfits[_i].why), 1);
    log_expect("warn ch", 1);
    ck_assert_uint_eq(engine_link(r.drv).epoch[0], 0);
    r.peer.key = misfits[_i].ours;
    peer_session(&r);
    log_expect("channel up: new session", 1);
    rig_free(&r);
}
END_TEST

/* A misfit doesn't end a session either: its HELLO could be anybody's. */
START_TEST(key_misfit_later)
{
    static Rig r;
    int client;

    keyed_new(&r, &key, &key);
    r.tcp = true;
    peer_session(&r);
    client = rig_client(&r, "c");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    r.peer.key = &other_key;
    peer_claim(&r.peer);
    ck_assert(!peer_shake(&r));
    r.peer.hello.my_epoch = 0;
    ck_assert(!peer_shake(&r));
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    r.peer.key = &key;
    r.peer.hello.my_epoch = engine_link(r.drv).epoch[1];
    ck_assert(peer_shake(&r));
    log_expect("session ended", 0);
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    close(client);
    rig_free(&r);
}
END_TEST

/* A proof that was recorded proves nothing: it holds another token. */
START_TEST(key_replayed)
{
    uint8_t hello[HELLO_TOTAL];
    static Rig r;
    VPHello h;

    keyed_new(&r, &key, &key);
    peer_session(&r);
    h = r.peer.hello;
    h.flags |= VP_HELLO_CONNECTOR | VP_HELLO_KEYED;
    h.my_epoch = h.peer_epoch = 0;
    wire_put_hello(hello, &h, &key); /* as it was said */
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_drain(&r);
    for (int i = 0; i < 3; i++) {
        peer_write(&r, hello, sizeof(hello));
        ck_assert_str_eq(engine_link(r.drv).state, "hello");
    }
    rig_free(&r);
}
END_TEST

/* Nor does one that we made ourselves, on this channel or another. */
START_TEST(key_reflected)
{
    static Rig r;
    VPHello *h = &r.peer.hello;
    uint8_t hello[HELLO_TOTAL];

    keyed_new(&r, &key, NULL);
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    h->token = 4711;
    h->echo = r.peer.heard.token;
    h->flags = VP_HELLO_LISTENER | VP_HELLO_KEYED;
    wire_put_hello(hello, h, &key);
    peer_write(&r, hello, sizeof(hello));
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    log_expect("both ends listen, or both connect", 1);
    h->flags = VP_HELLO_KEYED; /* a device has no sides */
    wire_put_hello(hello, h, &key);
    peer_write(&r, hello, sizeof(hello));
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    rig_free(&r);
}
END_TEST

/* ---- without a channel ------------------------------------------------ */

START_TEST(grace_expires)
{
    static Held h;

    held_new(&h, &rig_config);
    rig_unplug(&h.r);
    box_run(h.r.loop, 29 * SECOND);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    log_expect("session ended", 0);
    box_run(h.r.loop, 2 * SECOND);
    log_expect("no channel for 30 s: session ended", 1);
    for (int i = 0; i < 5; i++) {
        fd_wait(h.r.loop, h.client[i], ECONNRESET);
    }
    ck_assert_uint_eq(engine_counts(h.r.drv).conns, 0);
    ck_assert_uint_eq(engine_link(h.r.drv).epoch[0], 0);
    rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_claim(&h.r.peer);
    ck_assert(peer_shake(&h.r));
    log_expect("channel up: new session", 1);
    held_free(&h);
}
END_TEST

/* The channel comes back in time, several times. */
START_TEST(grace_not_reached)
{
    static Held h;

    held_new(&h, &rig_config);
    for (int i = 0; i < 5; i++) {
        rig_unplug(&h.r);
        box_run(h.r.loop, 25 * SECOND);
        rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
        peer_claim(&h.r.peer);
        ck_assert(peer_shake(&h.r));
        box_run(h.r.loop, 25 * SECOND);
        peer_drain(&h.r);
    }
    log_expect("session ended", 0);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    held_free(&h);
}
END_TEST

START_TEST(grace_zero)
{
    VPConfig config = rig_config;
    static Held h;
    int client;

    config.grace = 0;
    held_new(&h, &config);
    rig_unplug(&h.r);
    box_run(h.r.loop, MS);
    log_expect("session ended", 1);
    for (int i = 0; i < 5; i++) {
        fd_wait(h.r.loop, h.client[i], ECONNRESET);
    }
    /* and who comes now isn't kept waiting */
    client = rig_client(&h.r, "c");
    box_run(h.r.loop, MS);
    fd_wait(h.r.loop, client, ECONNRESET);
    close(client);
    held_free(&h);
}
END_TEST

/* Each client waits for its own time. */
START_TEST(grace_of_each)
{
    static Rig r;
    int client[3];

    rig_new(&r, &rig_config);
    r.tcp = true;
    rig_unplug(&r);
    box_run(r.loop, 1000 * SECOND);
    for (int i = 0; i < 3; i++) {
        client[i] = rig_client(&r, "c");
        box_run(r.loop, 10 * SECOND);
    }
    for (int i = 0; i < 3; i++) {
        box_run(r.loop, SECOND);
        fd_wait(r.loop, client[i], ECONNRESET);
        for (int k = i + 1; k < 3; k++) {
            ck_assert_int_eq(fd_state(client[k]), FD_OPEN);
        }
        box_run(r.loop, 9 * SECOND);
        close(client[i]);
    }
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_session(&r);
    ck_assert_int_eq(peer_next(&r), 0); /* nothing of them is left */
    rig_free(&r);
}
END_TEST

/* Clients that came before there was a channel are served in order. */
START_TEST(clients_wait)
{
    static Rig r;
    int client[5];

    rig_new(&r, &rig_config);
    rig_unplug(&r);
    for (int i = 0; i < 5; i++) {
        client[i] = rig_client(&r, "c");
        fd_write(client[i], "early", 5);
    }
    box_run(r.loop, 10 * SECOND);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    r.peer.hello.window = 3; /* the first credit is in the peer's HELLO */
    peer_session(&r);
    for (uint32_t i = 0; i < 5; i++) {
        peer_expect(&r, VP_CONN_FIRST + i, VP_MSG_CONNECT_INIT);
    }
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(peer_next(&r), VP_PKT_CLIENT);
        ck_assert_uint_eq(r.peer.pkt.bytes, 3);
        ck_assert_mem_eq(r.peer.data, "ear", 3);
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* ---- a further peer on a listening channel ---------------------------- */

static uint64_t offered; /* the token that the last one was greeted with */

/* offer_as() - one more peer comes; returns its end of the socket */
static int offer_as(Rig *r, VPChannelRole role)
{
    uint8_t buf[HELLO_TOTAL];
    VPHello h;
    int fd[2];

    fd_pair(fd);
    vp_offer(r->drv, fd[0], role);
    box_settle(r->loop);
    ck_assert_int_eq(recv(fd[1], buf, sizeof(buf), 0), sizeof(buf));
    ck_assert_int_gt(wire_get_hello(buf, sizeof(buf), &h), 0);
    offered = h.token;
    return fd[1];
}

static int offer(Rig *r)
{
    return offer_as(r, VP_ACCEPTED);
}

/* offer_hello() - it says hello, in pieces of @piece, and echoes the token */
static void offer_hello(Rig *r, int fd, uint64_t token, size_t piece)
{
    uint8_t buf[HELLO_TOTAL];
    VPHello h = r->peer.hello;
    size_t len;

    h.token = token;
    h.echo = offered;
    h.flags = VP_HELLO_CONNECTOR |
              (r->peer.key != NULL ? VP_HELLO_KEYED : 0u);
    len = wire_put_hello(buf, &h, r->peer.key);
    for (size_t at = 0; at < len; at += piece) {
        send(fd, buf + at, MIN(piece, len - at), MSG_NOSIGNAL);
        box_settle(r->loop);
    }
}

/* The same session over a new connection: the old one is dead to us. */
START_TEST(offer_same_session)
{
    static Held h;
    int fd;

    held_new(&h, &rig_config);
    peer_claim(&h.r.peer);
    fd = offer(&h.r);
    ck_assert_str_eq(engine_link(h.r.drv).state, "up");
    offer_hello(&h.r, fd, 777, _i == 0 ? HELLO_TOTAL : 7);
    log_expect("channel down: replaced by a new connection", 1);
    ck_assert_int_eq(fd_state(h.r.peer.fd), FD_EOF);
    ck_assert_int_eq(h.r.lost, 0);
    close(h.r.peer.fd);
    h.r.peer.fd = fd;
    h.r.peer.len = 0;
    h.r.peer.heard = (VPHello){ 0 };
    ck_assert_int_eq(peer_next(&h.r), VP_PKT_HELLO);
    ck_assert(peer_shake(&h.r));
    log_expect("channel up: session resumed", 1);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    held_free(&h);
}
END_TEST

/* Even with no patience at all a take-over ends no session. */
START_TEST(offer_without_grace)
{
    VPConfig config = rig_config;
    static Held h;
    int fd;

    config.grace = 0;
    held_new(&h, &config);
    peer_claim(&h.r.peer);
    fd = offer(&h.r);
    offer_hello(&h.r, fd, 777, HELLO_TOTAL);
    box_run(h.r.loop, SECOND);
    log_expect("session ended", 0);
    ck_assert_uint_ne(engine_link(h.r.drv).epoch[0], 0);
    close(fd);
    held_free(&h);
}
END_TEST

static const struct {
    const char *why;
    int how;
} strangers[] = {
    { "the channel is in use", 0 },
    { "it is not qemu-vp", 1 },
    { "it left", 2 },
    { "it said no hello", 3 },
    { "no common version of the protocol: the other end speaks 4, this one 3; "
      "upgrade this one", 4 },
    { "the channel is in use", 5 },
    { "a newer one came", 6 },
    { "it left", 7 },
    { "it left", 8 },
    { "it said no hello", 9 },
};

/* present_answers() - it is asked whether it is alive, and is */
static void present_answers(Rig *r)
{
    ck_assert_int_eq(peer_drain(r), VP_PKT_PING);
    ck_assert_int_eq(log_count("turned away"), 0);
    peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
    box_run(r->loop, VP_CANDIDATE_STEP);
}

/* Others are turned away, and the present peer doesn't notice. */
START_TEST(offer_stranger)
{
    static Held h;
    Peer *p = &h.r.peer;
    VPHello truth;
    char noise[200];
    int fd, other[VP_CANDIDATES];

    held_new(&h, &rig_config);
    memset(noise, 'n', sizeof(noise));
    fd = offer(&h.r);
    truth = p->hello;
    switch (strangers[_i].how) {
    case 0:
        p->hello.my_epoch = p->hello.peer_epoch = 0;
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        present_answers(&h.r);
        break;
    case 1:
        fd_write(fd, noise, sizeof(noise));
        break;
    case 2:
        shutdown(fd, SHUT_WR);
        break;
    case 3:
        box_run(h.r.loop, VP_CANDIDATE_US - MS);
        ck_assert_int_eq(log_count("turned away"), 0);
        box_run(h.r.loop, 2 * MS);
        break;
    case 4:
        p->hello.version = p->hello.oldest = VP_VERSION + 1;
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        break;
    case 5: /* half of the session's name is not enough */
        p->hello.my_epoch++;
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        present_answers(&h.r);
        break;
    case 6:
        for (int i = 0; i < VP_CANDIDATES; i++) {
            ck_assert_int_eq(fd_state(fd), FD_OPEN);
            other[i] = offer(&h.r);
        }
        ck_assert_int_ne(fd_state(fd), FD_OPEN);
        for (int i = 0; i < VP_CANDIDATES; i++) {
            ck_assert_int_eq(fd_state(other[i]), FD_OPEN);
            close(other[i]);
        }
        box_settle(h.r.loop);
        break;
    case 7: /* in the middle of a word */
        fd_write(fd, noise, 20);
        box_settle(h.r.loop);
        shutdown(fd, SHUT_WR);
        break;
    case 8: /* it leaves while the present one is asked */
        p->hello.my_epoch = p->hello.peer_epoch = 0;
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        box_run(h.r.loop, SECOND);
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        shutdown(fd, SHUT_WR);
        break;
    case 9: /* what it says is from before it was greeted */
        offered--;
        offer_hello(&h.r, fd, 777, HELLO_TOTAL);
        box_run(h.r.loop, VP_CANDIDATE_US);
        break;
    }
    box_settle(h.r.loop);
    ck_assert_msg(log_count("another peer was turned away") >= 1 &&
                  log_count(strangers[_i].why) == 1, "%s", log_text());
    ck_assert_int_ne(fd_state(fd), FD_OPEN);
    ck_assert(!engine_counts(h.r.drv).candidate);
    ck_assert_str_eq(engine_link(h.r.drv).state, "up");
    p->hello = truth;
    peer_send(&h.r, VP_PKT_PING, 0, 0, NULL, 0);
    peer_drain(&h.r);
    ck_assert_str_eq(engine_link(h.r.drv).state, "up");
    ck_assert_uint_eq(engine_link(h.r.drv).resyncs, 0);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    close(fd);
    held_free(&h);
}
END_TEST

/* A present peer that answers nothing for long enough may be replaced. */
START_TEST(offer_over_dead)
{
    static Held h;
    int fd;

    held_new(&h, &rig_config);
    h.r.peer.hello.my_epoch = h.r.peer.hello.peer_epoch = 0;
    box_run(h.r.loop, _i == 0 ? 0 : 9 * SECOND);
    fd = offer(&h.r);
    offer_hello(&h.r, fd, 777, HELLO_TOTAL);
    if (_i == 0) { /* else it was asked some seconds ago */
        box_run(h.r.loop, VP_DEAD_US - 100 * MS);
        ck_assert_str_eq(engine_link(h.r.drv).state, "up");
        box_run(h.r.loop, 200 * MS);
    }
    log_expect("channel down: replaced by a new connection", 1);
    ck_assert_str_eq(engine_link(h.r.drv).state, "hello");
    ck_assert(!engine_counts(h.r.drv).candidate);
    close(fd);
    held_free(&h);
}
END_TEST

/* One that is there but never said hello is replaced at once. */
START_TEST(offer_over_silent)
{
    static Rig r;
    int fd;

    rig_new(&r, &rig_config);
    fd = offer(&r);
    ck_assert(engine_counts(r.drv).candidate);
    offer_hello(&r, fd, 779, HELLO_TOTAL);
    ck_assert(!engine_counts(r.drv).candidate);
    peer_drain(&r);
    ck_assert_int_eq(fd_state(r.peer.fd), FD_EOF);
    /* and without any channel the first one who comes is taken */
    close(fd);
    box_settle(r.loop);
    ck_assert_int_eq(r.lost, 1);
    fd = offer(&r);
    ck_assert(!engine_counts(r.drv).candidate);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    close(fd);
    rig_free(&r);
}
END_TEST

/*
 * While the present peer is only being put in step again, a stranger doesn't
 * get the channel, and no connection is lost to it.
 */
START_TEST(offer_during_resync)
{
    static Held h;
    VPHello truth;
    int fd;

    held_new(&h, &rig_config);
    fd = offer(&h.r);
    peer_write(&h.r, "noise noise noise noise noise noise noise", 41);
    ck_assert_str_eq(engine_link(h.r.drv).state, "hello");
    truth = h.r.peer.hello;
    h.r.peer.hello.my_epoch = h.r.peer.hello.peer_epoch = 0;
    offer_hello(&h.r, fd, 777, HELLO_TOTAL);
    box_run(h.r.loop, SECOND);
    ck_assert_str_eq(engine_link(h.r.drv).state, "hello");
    h.r.peer.hello = truth;
    peer_claim(&h.r.peer);
    ck_assert(peer_shake(&h.r));
    log_expect("session ended", 0);
    box_run(h.r.loop, VP_CANDIDATE_STEP);
    log_expect("turned away: the channel is in use", 1);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    close(fd);
    held_free(&h);
}
END_TEST

static const struct {
    const VPKey *key;
    const char *log;
} keyed_offers[] = {
    { NULL, "turned away: the other end has no key" },
    { &other_key, "turned away: the other end has a different key" },
    { &key, "replaced by a new connection" },
};

/*
 * With a key nothing is believed of one that doesn't prove it: it doesn't get
 * the channel, whatever it knows of the session.
 */
START_TEST(offer_with_key)
{
    static Rig r;
    int fd, client;

    keyed_new(&r, &key, &key);
    peer_session(&r);
    client = rig_client(&r, "c");
    peer_drain(&r);
    peer_claim(&r.peer);
    fd = offer(&r);
    r.peer.key = keyed_offers[_i].key;
    offer_hello(&r, fd, 777, HELLO_TOTAL);
    log_expect(keyed_offers[_i].log, 1);
    ck_assert_str_eq(engine_link(r.drv).state, _i == 2 ? "hello" : "up");
    ck_assert_uint_ne(engine_link(r.drv).epoch[0], 0);
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    close(client);
    close(fd);
    rig_free(&r);
}
END_TEST

static int stale;

/* note_stale() - VPStaleHandler */
static void note_stale(void *opaque)
{
    (void)opaque;
    stale++;
}

/*
 * The present connection, which we made, gets nothing through.  Another one
 * beside it takes its place once the peer says hello there, and the session
 * goes on; while the peer says nothing, as a paused one, all stays as it is,
 * and so it does if the present one answers meanwhile.
 */
START_TEST(offer_over_stale)
{
    static Held h;
    uint8_t buf[HELLO_TOTAL];
    VPHello hello;
    size_t len;
    int fd;

    held_new(&h, &rig_config);
    stale = 0;
    vp_set_stale(h.r.drv, note_stale);
    box_run(h.r.loop, 8 * SECOND);
    peer_drain(&h.r);
    ck_assert_int_eq(stale, 0);
    box_run(h.r.loop, 12 * SECOND);
    peer_drain(&h.r);
    ck_assert_int_ge(stale, 1);
    fd = offer_as(&h.r, VP_CONNECTED);
    if (_i == 1) {
        box_run(h.r.loop, 2 * VP_CANDIDATE_US);
        ck_assert_int_ne(fd_state(fd), FD_OPEN);
    } else {
        if (_i == 2) {
            peer_send(&h.r, VP_PKT_ACK, 0, 0, NULL, 0);
        }
        hello = h.r.peer.hello;
        hello.token = 778;
        hello.flags = VP_HELLO_LISTENER;
        len = wire_put_hello(buf, &hello, NULL);
        fd_write(fd, buf, len);
        box_settle(h.r.loop);
    }
    ck_assert_str_eq(engine_link(h.r.drv).state, _i == 0 ? "hello"
                     : _i == 1 ? "silent" : "up");
    if (_i == 0) {
        ck_assert_int_eq(fd_state(fd), FD_OPEN);
        while (recv(fd, buf, sizeof(buf), 0) == sizeof(buf)) {
            ck_assert_int_gt(wire_get_hello(buf, sizeof(buf), &hello), 0);
        }
        ck_assert_uint_eq(hello.echo, 778);
        ck_assert_uint_ne(hello.my_epoch, 0);
    }
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    ck_assert(!engine_counts(h.r.drv).candidate);
    close(fd);
    held_free(&h);
}
END_TEST

/* state() - as the monitor shows it */
static const char *state(const Rig *r)
{
    VPChannelInfo info;

    vp_channel_info(r->drv, &info);
    return info.state;
}

static unsigned events[VP_EVENT_ENDED + 1]; /* that were told, of each type */

static bool note_event(const VPEvent *event)
{
    events[event->type]++;
    return true;
}

/* Who is silent is said to be so, and may be paused for as long as he likes. */
START_TEST(silent_peer)
{
    static const bool none;
    static Held h;

    held_new(&h, &rig_config);
    vp_set_events(h.r.loop, note_event, &none);
    box.unheard_ms = _i == 0 ? 0 : 1;
    box_run(h.r.loop, 8 * SECOND);
    ck_assert_str_eq(state(&h.r), "up");
    for (int i = 0; i < 2; i++) {
        box_run(h.r.loop, 12 * SECOND);
        ck_assert_str_eq(state(&h.r), "silent");
        box_run(h.r.loop, 3600 * SECOND);
        log_expect("the other end is silent: waiting\n", 1);
        peer_send(&h.r, VP_PKT_ACK, 0, 0, NULL, 0);
        ck_assert_str_eq(state(&h.r), "up");
        log_expect("the other end answers again\n", 1);
    }
    ck_assert_uint_eq(events[VP_EVENT_SILENT], 2);
    ck_assert_uint_eq(events[VP_EVENT_ANSWERS], 2);
    ck_assert_int_eq(h.r.lost, 0);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    held_free(&h);
}
END_TEST

static const VPChannelRole roles[] = { VP_ACCEPTED, VP_CONNECTED, VP_OPENED };

/*
 * Where TCP says that the kernel at the other end is silent as well, the
 * channel is lost, and --grace runs; an inherited one could not be had anew.
 */
START_TEST(path_is_cut)
{
    VPChannelRole role = roles[_i];
    static Rig r;
    int client;

    rig_new(&r, &rig_config);
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_SOCKET, role);
    peer_session(&r);
    r.lost = 0;
    client = rig_client(&r, "c");
    peer_drain(&r);
    box.unheard_ms = 10000;
    box_run(r.loop, 8 * SECOND);
    ck_assert_int_eq(r.lost, 0);
    box_run(r.loop, 12 * SECOND);
    ck_assert_int_eq(r.lost, role != VP_OPENED);
    if (role != VP_OPENED) {
        ck_assert_str_eq(r.reason, "no answer");
        ck_assert_str_eq(state(&r), "down");
        ck_assert_int_eq(fd_state(client), FD_OPEN);
    }
    box_run(r.loop, 31 * SECOND);
    ck_assert_int_eq(fd_state(client), role != VP_OPENED ? FD_EOF : FD_OPEN);
    close(client);
    rig_free(&r);
}
END_TEST

/* The same during a handshake, which a listener else waits for for ever. */
START_TEST(path_is_cut_early)
{
    static Rig r;

    rig_new(&r, &rig_config);
    box_run(r.loop, 3600 * SECOND);
    ck_assert_int_eq(r.lost, 0);
    rig_unplug(&r);
    r.lost = 0;
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    box.unheard_ms = 10000;
    box_run(r.loop, 9 * SECOND);
    ck_assert_int_eq(r.lost, 0);
    box_run(r.loop, 2 * SECOND);
    ck_assert_int_eq(r.lost, 1);
    ck_assert_str_eq(r.reason, "no answer");
    rig_free(&r);
}
END_TEST

/*
 * Whoever has the key is heard, however many come between its first HELLO and
 * its echo that say nothing.
 */
START_TEST(offer_beside_silent)
{
    enum { SILENT = 50 };
    static Rig r;
    int fd, client, silent[SILENT], n = 0;
    uint64_t token;

    keyed_new(&r, &key, &key);
    peer_session(&r);
    client = rig_client(&r, "c");
    peer_drain(&r);
    peer_claim(&r.peer);
    for (; n < SILENT / 2; n++) {
        silent[n] = offer(&r);
    }
    fd = offer(&r);
    token = offered;
    offered = 0; /* it has not heard the daemon's yet */
    offer_hello(&r, fd, 777, HELLO_TOTAL);
    for (; n < SILENT; n++) {
        silent[n] = offer(&r);
    }
    ck_assert_int_eq(fd_state(fd), FD_OPEN);
    offered = token;
    offer_hello(&r, fd, 777, HELLO_TOTAL);
    log_expect("replaced by a new connection", 1);
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    for (n = 0; n < SILENT; n++) {
        close(silent[n]);
    }
    close(client);
    close(fd);
    box_settle(r.loop);
    rig_free(&r);
}
END_TEST

static const struct {
    const VPKey *ours;
    const VPKey *theirs;
    bool stale;
    bool ends;
} byes[] = {
    { NULL, NULL, false, true }, { NULL, NULL, true, false },
    { &key, &key, false, true }, { &key, &key, true, false },
    { &key, &other_key, false, false }, { &key, NULL, false, false },
};

/* A peer that ends says so, but others who know the session may not. */
START_TEST(bye)
{
    static const VPKey none;
    uint8_t buf[HELLO_TOTAL];
    static Rig r;
    int client;
    VPHello h;

    keyed_new(&r, byes[_i].ours != NULL ? byes[_i].ours : &none,
              byes[_i].ours);
    r.tcp = true;
    peer_session(&r);
    client = rig_client(&r, "c");
    peer_drain(&r);
    peer_claim(&r.peer);
    h = r.peer.hello;
    h.token = 777;
    h.echo = r.peer.heard.token + byes[_i].stale;
    h.flags = (uint16_t)(VP_HELLO_BYE | VP_HELLO_CONNECTOR |
                         (byes[_i].theirs != NULL ? VP_HELLO_KEYED : 0u));
    peer_write(&r, buf, wire_put_hello(buf, &h, byes[_i].theirs));
    log_expect("the other end ends the session", byes[_i].ends);
    ck_assert_int_eq(engine_link(r.drv).epoch[0] == 0, byes[_i].ends);
    ck_assert_int_eq(fd_state(client), byes[_i].ends ? ECONNRESET : FD_OPEN);
    close(client);
    rig_free(&r);
}
END_TEST

/* What the engine says when it ends is believed by its like. */
START_TEST(bye_said)
{
    static const VPKey none;
    static Rig r;
    VPHello h;
    int len;

    keyed_new(&r, _i == 0 ? &none : &key, _i == 0 ? NULL : &key);
    peer_session(&r);
    peer_drain(&r);
    vp_free(r.drv);
    r.peer.len += (size_t)recv(r.peer.fd, r.peer.in, sizeof(r.peer.in), 0);
    len = wire_get_hello(r.peer.in, r.peer.len, &h);
    ck_assert_int_gt(len, 0);
    ck_assert(h.flags & VP_HELLO_BYE);
    ck_assert_uint_eq(h.echo, r.peer.hello.token);
    ck_assert_uint_eq(h.my_epoch, r.peer.hello.peer_epoch);
    ck_assert(_i == 0 || hello_proved(&h, r.peer.in, &key));
    vp_loop_free(r.loop);
    close(r.peer.fd);
}
END_TEST

/*
 * A relay whose far end is gone accepts, and closes again at once: that is no
 * channel, and the time of those who wait runs on.
 */
START_TEST(grace_flapping)
{
    static Held h;
    int s = 0;

    held_new(&h, &rig_config);
    rig_unplug(&h.r);
    for (; s < 60 && fd_state(h.client[0]) == FD_OPEN; s += 5) {
        box_run(h.r.loop, 5 * SECOND);
        rig_plug(&h.r, VP_CHN_SOCKET, _i ? VP_ACCEPTED : VP_CONNECTED);
        box_settle(h.r.loop);
        rig_unplug(&h.r);
    }
    ck_assert_int_ge(s, 30);
    ck_assert_int_le(s, 35);
    log_expect("no channel for 30 s: session ended", 1);
    held_free(&h);
}
END_TEST

/* A descriptor that stays is one: a VM may be paused behind it. */
START_TEST(grace_silent)
{
    static Held h;

    held_new(&h, &rig_config);
    for (int i = 0; i < 10; i++) {
        rig_unplug(&h.r);
        box_run(h.r.loop, 15 * SECOND);
        rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
        box_run(h.r.loop, VP_HELLO_PATIENCE + VP_HELLO_WAIT_MAX);
    }
    box_run(h.r.loop, 3600 * SECOND);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    peer_claim(&h.r.peer);
    ck_assert(peer_shake(&h.r));
    log_expect("session resumed", 1);
    held_free(&h);
}
END_TEST

/* A client that the peer was never told of waits no longer than others. */
START_TEST(grace_of_untold)
{
    static Rig r;
    int client;

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    engine_hold(r.drv); /* so it isn't told */
    client = rig_client(&r, "c");
    box_settle(r.loop);
    peer_send(&r, 200, 0, 0, NULL, 0); /* and the session ends */
    log_expect("breaks the protocol", 1);
    if (_i == 0) {
        rig_unplug(&r);
    } /* else there is a channel, but nobody answers */
    box_run(r.loop, 29 * SECOND);
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    box_run(r.loop, 2 * SECOND);
    ck_assert_int_eq(fd_state(client), ECONNRESET);
    close(client);
    rig_free(&r);
}
END_TEST

/* plug_again() - the program's timer, which finds a channel again */
static void plug_again(void *opaque)
{
    rig_plug(opaque, VP_CHN_SOCKET, VP_ACCEPTED);
}

/*
 * This process was stopped for longer than connections may wait, and the
 * channel is back when it goes on: that counts, and not the time before.
 */
START_TEST(grace_stopped)
{
    VPTimer timer = { 0 };
    static Held h;

    held_new(&h, &rig_config);
    rig_unplug(&h.r);
    vp_timer_start(h.r.loop, &timer, SECOND, plug_again, &h.r);
    box.now += 40 * SECOND;
    box_settle(h.r.loop);
    log_expect("session ended", 0);
    ck_assert_int_eq(fd_state(h.client[0]), FD_OPEN);
    /* but all of the time is used up now, unless the peer is heard */
    if (_i == 0) {
        peer_claim(&h.r.peer);
        ck_assert(peer_shake(&h.r));
        log_expect("session resumed", 1);
    } else {
        rig_unplug(&h.r);
        box_run(h.r.loop, MS);
        log_expect("no channel for 30 s: session ended", 1);
    }
    held_free(&h);
}
END_TEST

/* The same, and the session that clients waited for begins in that moment. */
START_TEST(grace_stopped_hello)
{
    static Rig r;
    uint8_t buf[HELLO_TOTAL];
    size_t len;
    int client;

    rig_new(&r, &rig_config);
    client = rig_client(&r, "c");
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    len = peer_put_hello(&r.peer, buf, 0xc0ffee, VP_HELLO_CONNECTOR);
    fd_write(r.peer.fd, buf, len);
    box.now += 40 * SECOND;
    box_settle(r.loop);
    ck_assert(engine_up(r.drv));
    ck_assert(engine_has_session(r.drv));
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    close(client);
    rig_free(&r);
}
END_TEST

/* A session that ends while there is a channel gives clients new time. */
START_TEST(grace_of_retracted)
{
    static Held h;
    int client;

    held_new(&h, &rig_config);
    rig_unplug(&h.r);
    client = rig_client(&h.r, "c");
    box_run(h.r.loop, 24 * SECOND);
    rig_plug(&h.r, VP_CHN_SOCKET, VP_ACCEPTED);
    ck_assert_int_eq(peer_next(&h.r), VP_PKT_HELLO);
    peer_claim(&h.r.peer);
    h.r.peer.hello.expect += 1000;
    peer_say(&h.r, 0xc0ffee, 0);
    log_expect("set back in time: session ended", 1);
    box_run(h.r.loop, 29 * SECOND);
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    box_run(h.r.loop, 2 * SECOND);
    log_expect("c: connection reset: no channel for 30 s", 1);
    close(client);
    held_free(&h);
}
END_TEST

/* The driver goes while somebody waits. */
START_TEST(offer_and_free)
{
    static Rig r;
    int fd;

    rig_new(&r, &rig_config);
    fd = offer(&r);
    rig_free(&r);
    ck_assert_int_eq(fd_state(fd), FD_EOF);
    close(fd);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("session");

    SUITE_ADD(s, pair_works);
    SUITE_ADD(s, pair_idle);
    SUITE_LOOP(s, handshake_losses, 4);
    SUITE_ADD(s, both_resync);
    SUITE_LOOP(s, damage, 8);
    SUITE_ADD(s, cut_under_load);
    SUITE_ADD(s, wrap_around);
    SUITE_ADD(s, ids_in_use);
    SUITE_LOOP(s, restarts, 3);
    SUITE_LOOP(s, resume, 2 * COUNT_OF(claims));
    SUITE_ADD(s, replay);
    SUITE_LOOP(s, forgotten_session, 2);
    SUITE_LOOP(s, unconfirmed_session, 2);
    SUITE_ROWS(s, late_echo, late_echoes);
    SUITE_ADD(s, key_fits);
    SUITE_ROWS(s, key_misfits, misfits);
    SUITE_ADD(s, key_misfit_later);
    SUITE_ADD(s, key_reloaded_apart);
    SUITE_ADD(s, key_reloaded_greets);
    SUITE_ADD(s, key_replayed);
    SUITE_ADD(s, key_reflected);
    SUITE_ADD(s, grace_expires);
    SUITE_ADD(s, grace_not_reached);
    SUITE_ADD(s, grace_zero);
    SUITE_ADD(s, grace_of_each);
    SUITE_ADD(s, clients_wait);
    SUITE_LOOP(s, offer_same_session, 2);
    SUITE_ADD(s, offer_without_grace);
    SUITE_ROWS(s, offer_stranger, strangers);
    SUITE_LOOP(s, offer_over_dead, 2);
    SUITE_ADD(s, offer_over_silent);
    SUITE_ADD(s, offer_during_resync);
    SUITE_ADD(s, offer_and_free);
    SUITE_ROWS(s, offer_with_key, keyed_offers);
    SUITE_LOOP(s, offer_over_stale, 3);
    SUITE_LOOP(s, silent_peer, 2);
#ifdef __linux__
    SUITE_ROWS(s, path_is_cut, roles);
    SUITE_ADD(s, path_is_cut_early);
#endif
    SUITE_ADD(s, offer_beside_silent);
    SUITE_ROWS(s, bye, byes);
    SUITE_LOOP(s, bye_said, 2);
    SUITE_LOOP(s, grace_flapping, 2);
    SUITE_ADD(s, grace_silent);
    SUITE_LOOP(s, grace_of_untold, 2);
    SUITE_LOOP(s, grace_stopped, 2);
    SUITE_ADD(s, grace_stopped_hello);
    SUITE_ADD(s, grace_of_retracted);
    return suite_run(s);
}
