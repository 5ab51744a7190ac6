/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_link.c - what the link makes of the bytes on a channel
 *
 * Whatever comes, a packet is delivered once, whole and in order, or not at
 * all; and after any damage a handshake puts both sides in step again.
 */
#include <sys/stat.h>

#include "tests/lib/rig.h"

/* What a whole exchange is made of, for tests that damage it */
typedef struct Tape {
    uint8_t data[8192];
    size_t len;
    size_t at[32];  /* where each packet begins, and the end */
    int n;
} Tape;

/* tape_add() - a packet of the peer */
static void tape_add(Tape *t, Rig *r, int type, int flags, uint32_t conn,
                     const void *data, size_t len)
{
    ck_assert(t->len + VP_PKT_HDR_LEN + len <= sizeof(t->data));
    t->at[t->n++] = t->len;
    t->len += peer_put(&r->peer, t->data + t->len, type, flags, conn, data,
                       len);
    t->at[t->n] = t->len;
}

/* tape_exchange() - a connection that brings 300 bytes, in all sorts */
static void tape_exchange(Tape *t, Rig *r, uint32_t conn)
{
    uint8_t msg[32], data[300];

    *t = (Tape){ .n = 0 };
    msg[0] = VP_MSG_CONNECT_INIT;
    put64(msg + 1, 1u << 20);
    msg[9] = 4;
    memcpy(msg + 10, "echo", 4);
    bytes_fill(data, sizeof(data), 1, 0);
    tape_add(t, r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg, 14);
    tape_add(t, r, VP_PKT_CLIENT, 0, conn, data, 1);
    tape_add(t, r, VP_PKT_PING, 0, 0, NULL, 0);
    tape_add(t, r, VP_PKT_CLIENT, VP_FLAG_ACK_NOW, conn, data + 1, 219);
    tape_add(t, r, VP_PKT_ACK, 0, 0, NULL, 0);
    tape_add(t, r, VP_PKT_CLIENT, 0, conn, data + 220, 80);
    msg[0] = VP_MSG_CLOSE;
    tape_add(t, r, VP_PKT_CONTROL, VP_FLAG_CLIENT, conn, msg, 1);
}

/* tape_replay() - the sequenced packets from number @seq on, sent again */
static void tape_replay(const Tape *t, Rig *r, uint32_t seq)
{
    uint32_t number = VP_SEQ_FIRST;

    for (int i = 0; i < t->n; i++) {
        const uint8_t *p = t->data + t->at[i];
        VPPacket pkt = { .type = p[16] };

        if (pkt.type >= VP_PKT_HELLO || seq_diff(number++, seq) < 0) {
            continue;
        }
        pkt.flags = p[17];
        r->peer.next = number - 1;
        peer_send(r, pkt.type, pkt.flags, get32(p + 20), p + VP_PKT_HDR_LEN,
                  get16(p + 18));
    }
}

/* A session, a target behind the service "echo", and the tape to play */
typedef struct Scene {
    Rig r;
    Tape t;
    int listener;
    int target;
} Scene;

static void scene_new(Scene *s)
{
    rig_new(&s->r, &rig_config);
    s->listener = rig_target(&s->r, "echo");
    s->target = -1;
    peer_session(&s->r);
    tape_exchange(&s->t, &s->r, 5);
    log_clear();
}

/* scene_check() - all 300 bytes have come, once, and the end of data */
static void scene_check(Scene *s)
{
    uint64_t got = 0;
    int tries = 0;

    if (s->target < 0) {
        s->target = rig_accept(&s->r, s->listener);
    }
    box_settle(s->r.loop);
    while (fd_drain(s->target, 1, &got) != FD_EOF) {
        box_pause(&tries);
        box_settle(s->r.loop);
    }
    ck_assert_uint_eq(got, 300);
    log_quiet("error");
}

static void scene_free(Scene *s)
{
    close(s->listener);
    close(s->target);
    rig_free(&s->r);
}

/*
 * scene_resume() - the engine asks for a handshake; play what it misses
 *
 * Its session must go on.
 */
static void scene_resume(Scene *s)
{
    Peer *p = &s->r.peer;

    peer_drain(&s->r);
    peer_claim(&s->r.peer);
    p->hello.base = VP_SEQ_FIRST;
    p->hello.next = VP_SEQ_FIRST + 5;
    if (engine_up(s->r.drv)) {
        return; /* the damage was in what doesn't matter */
    }
    ck_assert_msg(peer_shake(&s->r), "no handshake; in the log:\n%s",
                  log_text());
    ck_assert_msg(log_count("session ended") == 0, "%s", log_text());
    peer_drain(&s->r);
    ck_assert_uint_eq(p->heard.my_epoch, p->hello.peer_epoch);
    tape_replay(&s->t, &s->r, p->heard.expect);
}

/* ---- the descriptor ---------------------------------------------------- */

/* send_room() - how much a send buffer of socket @fd holds */
static int send_room(int fd)
{
    int room = 0;
    socklen_t len = sizeof(room);

    ck_assert(getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, &len) == 0);
    return room;
}

/* A system that refuses a large send buffer gives a smaller one. */
START_TEST(send_buffer)
{
    const int most = BOX_BSD_BUFFER;
    static Rig r;
    int fd[2];

    fd_pair(fd);
    ck_assert(setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &most,
                         sizeof(most)) == 0);
    box.bsd = true;
    rig_new(&r, &rig_config);
    ck_assert_int_eq(send_room(engine_link(r.drv).wfd), send_room(fd[0]));
    close(fd[0]);
    close(fd[1]);
    rig_free(&r);
}
END_TEST

#ifdef SO_SNDBUFFORCE
/*
 * A tcp channel to another machine has a send buffer for all that memory lets
 * be in flight, from the first one on; one within the machine what TCP gives.
 * The last row sets no memory: that is enough for the shortest store.
 */
START_TEST(send_buffer_far)
{
    const uint32_t len = VP_STORE_LEN << _i % 3;
    VPConfig config = rig_config;
    static Rig r;
    int fd[2];

    config.memory = _i < 3 ? memory_reach(&config, len) : 0;
    rig_new(&r, &config);
    vp_free(r.drv);
    for (int far = 0; far < 2; far++) {
        box.far = far;
        r.drv = vp_new(r.loop, 7, &config, rig_lost, &r);
        tcp_pair(fd);
        ck_assert_int_eq(vp_attach(r.drv, fd[0], fd[0], VP_CHN_SOCKET,
                                   VP_CONNECTED), 0);
        ck_assert_uint_eq((unsigned)box.forced,
                          far ? VP_LIMIT_MAX(len) : 0);
        vp_free(r.drv);
        close(fd[1]);
    }
    r.drv = vp_new(r.loop, 7, &config, rig_lost, &r);
    rig_free(&r);
}
END_TEST
#endif

/* ---- the handshake ---------------------------------------------------- */

START_TEST(first_hello)
{
    static Rig r;
    VPHello h;

    rig_new(&r, &rig_config);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    h = r.peer.heard;
    ck_assert_int_eq(h.version, VP_VERSION);
    ck_assert_int_eq(h.oldest, VP_VERSION_OLDEST);
    ck_assert_uint_ne(h.instance, 0);
    ck_assert_int_eq(h.flags, VP_HELLO_LISTENER);
    ck_assert_uint_eq(h.window, VP_WINDOW_INIT);
    ck_assert_uint_ne(h.token, 0);
    ck_assert_uint_eq(h.echo, 0);
    ck_assert_uint_eq(h.my_epoch | h.peer_epoch, 0);
    ck_assert_uint_eq(h.base, VP_SEQ_FIRST);
    ck_assert_uint_eq(h.next, VP_SEQ_FIRST);
    ck_assert_uint_eq(h.max_conns, rig_config.max_conns);
    /* unanswered: 0.1 s, then slower, 1 s at last; the token stays */
    box_run(r.loop, 50 * MS);
    ck_assert_int_eq(peer_next(&r), 0);
    box_run(r.loop, 60 * MS);
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    box_run(r.loop, 20 * SECOND);
    peer_drain(&r);
    ck_assert_int_ge(r.peer.hellos, 20);
    ck_assert_int_le(r.peer.hellos, 26);
    ck_assert_uint_eq(r.peer.heard.token, h.token);
    /* what the peer said is echoed at once, but only an echo makes us up */
    r.peer.hello.token = 0xabcdef;
    r.peer.heard.token = 0;
    peer_say(&r, 0xabcdef, 0);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    ck_assert_uint_eq(r.peer.heard.echo, 0xabcdef);
    ck_assert_int_eq(r.peer.heard.flags & VP_HELLO_UP, 0);
    peer_say(&r, 0xabcdef, 0);
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    ck_assert(r.peer.heard.flags & VP_HELLO_UP);
    log_expect("channel up: new session", 1);
    rig_free(&r);
}
END_TEST

/*
 * Once up, only a peer that isn't is told so again.  But if it was, it was
 * thrown back, and what it holds must be asked for.
 */
START_TEST(hello_when_up)
{
    static Rig r;
    Peer *p = &r.peer;
    uint64_t token;

    engine_log_level = VP_LOG_DEBUG;
    rig_new(&r, &rig_config);
    peer_drain(&r);
    token = p->heard.token;
    for (int i = 0; i < 3; i++) {
        bool other = i == 1; /* it is up with a token we no longer have */

        p->heard.token -= other;
        peer_say(&r, 500, other ? VP_HELLO_UP : 0);
        ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
        ck_assert_uint_eq(p->heard.token, token);
        ck_assert(p->heard.flags & VP_HELLO_UP);
        ck_assert(!engine_link(r.drv).confirmed);
        ck_assert_str_eq(engine_link(r.drv).state, "up");
    }
    if (_i == 0) {
        peer_say(&r, 500, VP_HELLO_UP);
    } else {
        peer_keys(p);
        peer_begin(p);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    ck_assert_int_eq(peer_next(&r), 0);
    peer_say(&r, 500, 0);
    log_expect("the other end says hello again", 1);
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    ck_assert_uint_ne(p->heard.token, token);
    ck_assert_uint_eq(p->heard.echo, 500);
    p->hello.my_epoch = 500;
    p->hello.peer_epoch = token;
    ck_assert(peer_shake(&r));
    log_expect("channel up: session resumed", 1);
    rig_free(&r);
}
END_TEST

/* Nobody answers: one who made the connection makes it again. */
START_TEST(no_answer)
{
    static Rig r;

    rig_new(&r, &rig_config);
    box_run(r.loop, 60 * SECOND);
    ck_assert_int_eq(r.lost, 0);
    log_expect("the other end is silent", 1);
    rig_unplug(&r);
    ck_assert_int_eq(r.lost, 1);
    rig_plug(&r, VP_CHN_SOCKET, VP_CONNECTED);
    box_run(r.loop, 9 * SECOND);
    ck_assert_int_eq(r.lost, 1);
    box_run(r.loop, 3 * SECOND);
    ck_assert_int_eq(r.lost, 2);
    ck_assert_str_eq(r.reason, "no answer");
    ck_assert_int_eq(fd_state(r.peer.fd) == FD_OPEN, true); /* its HELLOs */
    rig_free(&r);
}
END_TEST

START_TEST(other_version)
{
    VPChannelInfo info;
    static Rig r;

    rig_new(&r, &rig_config);
    box_run(r.loop, (uint64_t)_i * 5 * SECOND); /* of which silence is said */
    log_expect("the other end is silent", _i);
    peer_drain(&r);
    r.peer.hello.version = VP_VERSION + 2;
    r.peer.hello.oldest = VP_VERSION + 1;
    for (int i = 0; i < 20; i++) {
        peer_say(&r, 1000 + (unsigned)i, 0);
        box_run(r.loop, SECOND);
    }
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    log_expect("no common version of the protocol: the other end speaks 4 to "
               "5, this one 3; upgrade this one", 1);
    rig_unplug(&r);
    vp_channel_info(r.drv, &info);
    ck_assert_ptr_nonnull(strstr(info.last_error, "upgrade this one"));
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_drain(&r);
    peer_say(&r, 1, 0);
    log_expect("version", 0); /* that is known */
    r.peer.hello.version = VP_VERSION + 7; /* as well */
    r.peer.hello.oldest = VP_VERSION_OLDEST - 1;
    peer_session(&r);
    log_expect("channel up: new session", 1);
    rig_unplug(&r);
    vp_channel_info(r.drv, &info);
    ck_assert_ptr_null(strstr(info.last_error, "version"));
    rig_free(&r);
}
END_TEST

/* A peer that comes back as one of another version isn't up any more. */
START_TEST(other_version_later)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    r.peer.hello.version = VP_VERSION_OLDEST - 1;
    r.peer.hello.oldest = VP_VERSION_OLDEST - 1;
    peer_say(&r, 4711, 0);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    log_expect("speaks 2, this one 3; upgrade the other end", 1);
    rig_free(&r);
}
END_TEST

/* What this process said itself comes back, by whatever way. */
START_TEST(own_instance)
{
    static Rig r;

    rig_new(&r, &rig_config);
    ck_assert_int_eq(peer_next(&r), VP_PKT_HELLO);
    r.peer.hello.instance = r.peer.heard.instance;
    for (int i = 0; i < 3; i++) {
        peer_say(&r, 1 + (unsigned)i, 0);
        ck_assert_str_eq(engine_link(r.drv).state, "hello");
    }
    log_expect("the channel leads back to this daemon", 1);
    r.peer.hello.instance++;
    peer_session(&r);
    rig_free(&r);
}
END_TEST

/* A tty that is not raw sends back what it got. */
START_TEST(echoing_line)
{
    static uint8_t own[HELLO_TOTAL];
    static Rig r;

    rig_new(&r, &rig_config);
    box_run(r.loop, (uint64_t)_i * 5 * SECOND);
    while (recv(r.peer.fd, own, sizeof(own), 0) > 0) {
    }
    for (int i = 0; i < 5; i++) {
        box_run(r.loop, 2 * SECOND);
        ck_assert_int_eq(recv(r.peer.fd, own, sizeof(own), 0), sizeof(own));
        peer_write(&r, own, sizeof(own));
        ck_assert_str_eq(engine_link(r.drv).state, "hello");
    }
    log_expect("it echoes what is sent", 1);
    peer_session(&r); /* it was a passing trouble */
    rig_free(&r);
}
END_TEST

/* Up already, and every packet of ours comes back: none is taken. */
START_TEST(echo_when_up)
{
    static uint8_t own[4096];
    static Rig r;
    ssize_t n;

    rig_new(&r, &rig_config);
    peer_session(&r);
    rig_client(&r, "s");
    box_run(r.loop, 20 * MS);
    n = recv(r.peer.fd, own, sizeof(own), 0);
    ck_assert_int_gt(n, VP_PKT_HDR_LEN);
    peer_write(&r, own, (size_t)n);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    ck_assert_uint_eq(engine_link(r.drv).expect, VP_SEQ_FIRST);
    ck_assert(!engine_has_conn(r.drv, VP_CONN_FIRST, false));
    rig_free(&r);
}
END_TEST

/* ---- garbage ---------------------------------------------------------- */

/* hello_put() - one that says nothing but a token */
static void hello_put(uint8_t *p, uint64_t token)
{
    VPHello hello = {
        .version = VP_VERSION, .oldest = VP_VERSION_OLDEST, .token = token,
    };

    wire_put_hello(p, &hello, NULL);
}

/* stranger() - things that come before the first HELLO; 0: no more */
static size_t stranger(int i, uint8_t *p)
{
    static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    size_t len = (size_t)i % 200;

    switch (i / 200) {
    case 0:
        memset(p, 0, len);
        return len;
    case 1:
        memset(p, VP_PKT_HELLO, len);
        return len;
    case 2:
        for (size_t k = 0; k < len; k++) {
            p[k] = (uint8_t)rnd(256);
        }
        return len;
    case 3:
        /* a HELLO that breaks off anywhere, up to the whole */
        hello_put(p, 99);
        return MIN(len, HELLO_TOTAL);
    case 4:
        /* yesterday's HELLO, damaged in one byte */
        hello_put(p, 98);
        p[len % HELLO_TOTAL] ^= (uint8_t)(1 + rnd(255));
        return HELLO_TOTAL;
    default:
        memcpy(p, http, sizeof(http));
        return sizeof(http);
    }
}

START_TEST(garbage_before)
{
    uint8_t p[512];

    for (int i = _i * 200; i < _i * 200 + 200; i++) {
        static Rig r;

        rig_new(&r, &rig_config);
        peer_drain(&r);
        peer_write(&r, p, stranger(i, p));
        ck_assert_str_ne(engine_link(r.drv).state, "up");
        peer_session(&r);
        peer_init(&r, 1, "nobody", 0);
        peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
        rig_free(&r);
    }
}
END_TEST

/* A peer that is none of ours is named, with what it sent, and once. */
START_TEST(stranger_named)
{
    static Rig r;
    char noise[1000];

    memset(noise, 'x', sizeof(noise));
    rig_new(&r, &rig_config);
    box_run(r.loop, (uint64_t)_i * 5 * SECOND);
    log_expect("the other end is silent", _i);
    if (_i == 0) {
        peer_write(&r, noise, sizeof(noise));
        box_run(r.loop, SECOND);
    }
    log_expect("qemu-vp", 0);
    for (int i = 0; i < 10; i++) {
        box_run(r.loop, SECOND);
        peer_write(&r, noise, sizeof(noise));
    }
    log_expect("the other end is not qemu-vp", 1);
    /* one that hangs up is named at once, but it is the same one */
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_write(&r, "SSH-2.0\r\n", 9);
    rig_unplug(&r);
    log_expect("the other end is not qemu-vp", 0);
    rig_free(&r);
}
END_TEST

/* It may have read our HELLO or not: then the end is an error. */
START_TEST(stranger_hangs_up)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_write(&r, "SSH-2.0\r\n", 9);
    if (_i == 0) {
        peer_drain(&r);
    }
    rig_unplug(&r);
    log_expect("not qemu-vp: 9 bytes", 1);
    ck_assert_int_eq(r.lost, 1);
    rig_free(&r);
}
END_TEST

/* Packets of an earlier session are none in this one. */
START_TEST(old_session_packets)
{
    static Scene s;
    Peer *p = &s.r.peer;

    scene_new(&s);
    rig_unplug(&s.r);
    rig_plug(&s.r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_drain(&s.r);
    peer_write(&s.r, s.t.data, s.t.len);
    ck_assert_str_eq(engine_link(s.r.drv).state, "hello");
    ck_assert(!engine_has_conn(s.r.drv, 5, false));
    peer_rewind(p);
    scene_resume(&s);
    scene_check(&s);
    ck_assert_int_eq(fd_state(s.listener) == FD_OPEN, false);
    scene_free(&s);
}
END_TEST

/* The same, after the handshake: they lead to another one. */
START_TEST(old_session_packets_late)
{
    static Scene s;

    scene_new(&s);
    rig_unplug(&s.r);
    rig_plug(&s.r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_session(&s.r);
    log_clear();
    peer_write(&s.r, s.t.data, s.t.len);
    log_expect("out of step (no packet where one should begin)", 1);
    ck_assert(!engine_has_conn(s.r.drv, 5, false));
    scene_resume(&s);
    scene_check(&s);
    scene_free(&s);
}
END_TEST

/* ---- in pieces -------------------------------------------------------- */

/* peer_feed() - @len bytes in pieces of @piece, or of any size if 0 */
static void peer_feed(Rig *r, const uint8_t *p, size_t len, size_t piece)
{
    while (len > 0) {
        size_t n = piece > 0 ? piece : 1 + rnd(60);

        n = MIN(n, len);
        peer_write(r, p, n);
        p += n;
        len -= n;
    }
}

START_TEST(byte_by_byte)
{
    static Scene s;
    uint8_t hello[HELLO_TOTAL];
    uint32_t seq = VP_SEQ_FIRST;

    rig_new(&s.r, &rig_config);
    s.listener = rig_target(&s.r, "echo");
    s.target = -1;
    peer_drain(&s.r);
    s.r.peer.hello.token = 4711;
    s.r.peer.hello.echo = s.r.peer.heard.token;
    peer_begin(&s.r.peer);
    peer_keys(&s.r.peer);
    wire_put_hello(hello, &s.r.peer.hello, NULL);
    peer_feed(&s.r, hello, sizeof(hello) - 1, 1);
    ck_assert_str_eq(engine_link(s.r.drv).state, "hello");
    peer_feed(&s.r, hello + sizeof(hello) - 1, 1, 1);
    ck_assert_str_eq(engine_link(s.r.drv).state, "up");
    tape_exchange(&s.t, &s.r, 5);
    for (int i = 0; i < s.t.n; i++) {
        const uint8_t *p = s.t.data + s.t.at[i];
        size_t len = s.t.at[i + 1] - s.t.at[i];

        ck_assert_uint_eq(engine_link(s.r.drv).expect, seq);
        peer_feed(&s.r, p, len - 1, 1);
        ck_assert_uint_eq(engine_link(s.r.drv).expect, seq);
        peer_feed(&s.r, p + len - 1, 1, 1);
        seq += p[16] < VP_PKT_HELLO;
    }
    ck_assert_uint_eq(engine_link(s.r.drv).expect, seq);
    ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
    scene_check(&s);
    scene_free(&s);
}
END_TEST

START_TEST(any_pieces)
{
    for (int i = 0; i < 100; i++) {
        static Scene s;

        scene_new(&s);
        peer_feed(&s.r, s.t.data, s.t.len, 0);
        ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
        scene_check(&s);
        scene_free(&s);
    }
}
END_TEST

/* Reads and writes of a few bytes, and EINTR and EAGAIN at any call */
START_TEST(poor_io)
{
    for (unsigned i = 0; i < 40; i++) {
        static Scene s;

        box.io_max = 1 + i / 4;
        box.io_fail = 2 + i % 7;
        scene_new(&s);
        peer_feed(&s.r, s.t.data, s.t.len, 0);
        scene_check(&s);
        ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
        ck_assert_int_eq(s.r.lost, 0);
        scene_free(&s);
    }
}
END_TEST

/* ---- damage ----------------------------------------------------------- */

/*
 * scene_recover() - after damage: what a real peer does
 *
 * It hears a HELLO, or after a while it asks where its packets are.
 */
static void scene_recover(Scene *s)
{
    for (int i = 0; i < 5 && engine_up(s->r.drv) &&
         engine_link(s->r.drv).expect != VP_SEQ_FIRST + 5; i++) {
        box_run(s->r.loop, 400 * MS);
        peer_send(&s->r, VP_PKT_PING, 0, 0, NULL, 0);
    }
    scene_resume(s);
    scene_check(s);
    ck_assert_int_eq(s->r.lost, 0);
}

/* Each bit of the exchange is wrong once. */
START_TEST(flipped_bit)
{
    static Scene s;
    size_t len = 0;

    for (size_t at = 0; at == 0 || at < len; at++) {
        scene_new(&s);
        len = s.t.len;
        s.t.data[at] ^= (uint8_t)(1 << _i);
        peer_write(&s.r, s.t.data, len);
        ck_assert_msg(engine_link(s.r.drv).resyncs == 1, "byte %zu", at);
        s.t.data[at] ^= (uint8_t)(1 << _i);
        scene_recover(&s);
        scene_free(&s);
    }
}
END_TEST

enum { DROPPED, DOUBLED, NOISE, CUT, DAMAGES };

/* A byte is lost or comes twice, noise comes, or all the rest is lost. */
START_TEST(bytes_lost_or_added)
{
    static uint8_t noise[4096];
    static Scene s;
    size_t len = 0;

    for (size_t at = 0; at == 0 || at < len; at++) {
        scene_new(&s);
        len = s.t.len;
        peer_write(&s.r, s.t.data, at + (_i == DOUBLED));
        if (_i == NOISE) {
            for (size_t i = 0; i < sizeof(noise); i++) {
                noise[i] = (uint8_t)rnd(256);
            }
            peer_write(&s.r, noise, 1 + rnd(sizeof(noise)));
        }
        if (_i != CUT) {
            size_t from = at + (_i == DROPPED);

            peer_write(&s.r, s.t.data + from, len - from);
        }
        scene_recover(&s);
        scene_free(&s);
    }
}
END_TEST

/* The peer breaks off anywhere, and says hello again. */
START_TEST(hello_in_packet)
{
    static Scene s;
    Peer *p = &s.r.peer;
    size_t len = 0;

    for (size_t at = 0; at == 0 || at < len; at++) {
        scene_new(&s);
        len = s.t.len;
        peer_write(&s.r, s.t.data, at);
        peer_drain(&s.r);
        peer_claim(&s.r.peer);
        p->hello.base = VP_SEQ_FIRST;
        p->hello.next = VP_SEQ_FIRST + 5;
        for (int i = 0; i < 10 && (!engine_up(s.r.drv) ||
             engine_link(s.r.drv).token[1] != 31337); i++) {
            peer_say(&s.r, 31337, 0);
            box_run(s.r.loop, i == 0 ? 100 * MS : 300 * MS);
            peer_keys(p); /* for what the engine may say once it is up */
            peer_drain(&s.r);
        }
        peer_keys(p);
        ck_assert_str_eq(engine_link(s.r.drv).state, "up");
        tape_replay(&s.t, &s.r, p->heard.expect);
        scene_check(&s);
        scene_free(&s);
    }
}
END_TEST

/* Half a packet, a very long pause, the other half: nothing is wrong. */
START_TEST(paused_in_packet)
{
    static Scene s;
    size_t len = 0;

    for (size_t at = 0; at == 0 || at < len; at++) {
        scene_new(&s);
        len = s.t.len;
        peer_write(&s.r, s.t.data, at);
        box_run(s.r.loop, 100 * SECOND);
        peer_write(&s.r, s.t.data + at, len - at);
        ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
        scene_check(&s);
        scene_free(&s);
    }
}
END_TEST

/* A stranger who says less than a packet's header is one all the same. */
START_TEST(stranger_brief)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_write(&r, "GET / HTTP/1.0\r\n\r\n", 18);
    box_run(r.loop, 5 * SECOND);
    log_expect("the other end is not qemu-vp: 18 bytes", 1);
    rig_free(&r);
}
END_TEST

/*
 * To look for a HELLO at each byte of garbage is work: beside another channel
 * only so much of it is done in a pass.
 */
START_TEST(garbage_is_work)
{
    static Rig r;
    static uint8_t rubbish[100000];
    VPDriver *other;
    uint64_t most = 0, before = 0, began;

    rig_new(&r, &rig_config);
    began = r.loop->now;
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    memset(rubbish, VP_PKT_HELLO, sizeof(rubbish));
    box_settle(r.loop);
    ck_assert_int_gt(write(r.peer.fd, rubbish, sizeof(rubbish)), 90000);
    for (int i = 0; i < 1000 && r.drv->link.garbage < 90000; i++) {
        box_run(r.loop, 1000);
        most = MAX(most, r.drv->link.garbage - before);
        before = r.drv->link.garbage;
    }
    ck_assert_uint_ge(before, 90000);
    ck_assert_uint_le(most, VP_WORK_SHARED / VP_WORK_LOOK * VP_WORK_LOOKS);
    /* of each of these bytes a whole HELLO might begin: that much work each */
    ck_assert_uint_ge(r.loop->now - began,
                      before * (VP_REST_PARTS - 1) * VP_WORK_LOOK / 1000 -
                      SECOND / 100);
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* HELLOs that won't do: each is as much work as one that does. */
static const char *const vain[] = {
    "of another version", "during a penalty", "that echo nothing",
};

START_TEST(hello_is_work)
{
    enum { HELLOS = 200 };
    static Rig r;
    static uint8_t buf[HELLOS * ENGINE_HELLO_ROOM];
    uint64_t began;
    size_t len = 0;

    rig_new(&r, &rig_config);
    box_settle(r.loop);
    for (int i = 0; i < HELLOS; i++) {
        len += engine_hello(buf + len, _i == 0 ? 1 : 0);
    }
    r.drv->link.penalty_until = _i == 1 ? UINT64_MAX : 0;
    began = r.loop->now;
    ck_assert_int_eq(write(r.peer.fd, buf, len), (ssize_t)len);
    for (int i = 0; i < 3 || r.drv->link.rx_more ||
         timer_running(&r.drv->link.rest_timer); i++) {
        box_step(r.loop, 1);
    }
    ck_assert_msg(r.loop->now - began >= HELLOS * (VP_WORK_HELLO / 1000) *
                  (VP_REST_PARTS - 1) / 2, "%s: %d us", vain[_i],
                  (int)(r.loop->now - began));
    rig_free(&r);
}
END_TEST

#define FLOOD 1000

/* flood_for() - packets that the engine takes in @us from a flood of them */
static uint64_t flood_for(Rig *r, VPDriver *other, double share, bool ping,
                          uint64_t us)
{
    static uint8_t buf[FLOOD * (VP_PKT_HDR_LEN + 1000)], data[1000];
    static uint8_t in[1 << 18];
    uint64_t until = r->loop->now + us, before = r->loop->now;
    size_t at = 0, len = 0, taken = 0;

    while (r->loop->now < until) {
        ssize_t n;

        if (at == len) {
            at = len = 0;
            for (int i = 0; i < FLOOD; i++) {
                len += peer_put(&r->peer, buf + len,
                                ping ? VP_PKT_PING : VP_PKT_CLIENT, 0, 99,
                                data, ping ? 0 : sizeof(data));
            }
        }
        n = send(r->peer.fd, buf + at, len - at, MSG_NOSIGNAL);
        n = MAX(n, 0);
        at += (size_t)n;
        taken += (size_t)n;
        while (recv(r->peer.fd, in, sizeof(in), 0) > 0) {
            continue;
        }
        box_step(r->loop, 1);
        other->task.spent +=
            (uint64_t)(share * 1000 * (double)(r->loop->now - before));
        before = r->loop->now;
    }
    taken -= r->drv->link.rx_len - r->drv->link.rx_done;
    ck_assert_uint_eq(r->drv->link.resyncs, 0);
    return taken / (VP_PKT_HDR_LEN + (ping ? 0 : sizeof(data)));
}

/*
 * What isn't bulk has the time that others leave twice, and a fifth at least;
 * all of it where nobody else does anything.
 */
static const struct {
    double others, least, most; /* shares of the loop's time */
} beside[] = {
    /* simulated passes take less time than there is work in them */
    { 0, 0.9, 3 }, { 0.01, 0.9, 1.5 }, { 0.3, 0.3, 0.55 },
    { 0.5, 0.15, 0.25 }, { 0.9, 0.15, 0.25 },
};

#define BESIDE (COUNT_OF(beside))

START_TEST(work_beside_others)
{
    bool ping = _i % 2;
    double cost = VP_WORK_PACKET + (ping ? 0 : 1000.0 / VP_WORK_BYTES), share;
    static Rig r;
    VPDriver *other;

    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    share = (double)flood_for(&r, other, beside[_i / 2].others, ping,
                              400 * MS) * cost / (400 * MS * 1000);
    ck_assert_double_ge(share, beside[_i / 2].least);
    ck_assert_double_le(share, beside[_i / 2].most);
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* What others had counts for a while; after a second of silence it's gone. */
START_TEST(share_fades)
{
    static Rig r;
    VPDriver *other;

    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    for (int i = 0; i < 10; i++) {
        other->task.spent = 900 * VP_SHARE_US;
        box_run(r.loop, VP_SHARE_US);
    }
    ck_assert_double_ge(r.loop->shares, 0.4);
    box_run(r.loop, SECOND);
    ck_assert_uint_ge(flood_for(&r, other, 0, true, 20 * MS) * VP_WORK_PACKET,
                      20 * MS * 1000 * 9 / 10);
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* A handler that has done more for the driver than it may do in a pass */
static void does_much(void *opaque, int fd, int events)
{
    VPDriver *drv = opaque;

    (void)fd;
    (void)events;
    drv->task.work += 2 * VP_WORK_SHARED;
}

/* What was done for local sockets in a pass doesn't keep it from being read. */
START_TEST(read_beside_work)
{
    static Rig r;
    VPDriver *other;
    int fd[2];

    fd_pair(fd); /* below the channel's number: it comes first */
    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    ck_assert_int_eq(vp_watch(r.loop, fd[0], does_much, r.drv), 0);
    vp_watch_set(r.loop, fd[0], VP_WRITE);
    for (int i = 0; i < 10; i++) {
        uint8_t ping[VP_PKT_HDR_LEN], left;

        peer_put(&r.peer, ping, VP_PKT_PING, 0, 0, NULL, 0);
        ck_assert(write(r.peer.fd, ping, sizeof(ping)) == sizeof(ping));
        box_step(r.loop, 1);
        ck_assert(recv(r.drv->link.rfd, &left, 1, MSG_PEEK | MSG_DONTWAIT) < 0);
        ck_assert_uint_eq(r.drv->link.rx_len, 0);
    }
    vp_unwatch(r.loop, fd[0]);
    close(fd[0]);
    close(fd[1]);
    vp_free(other);
    rig_free(&r);
}
END_TEST

static bool followed(const VPEvent *event)
{
    (void)event;
    return true;
}

/*
 * Clients that come without end, and whose connections are followed: what the
 * peer says of them is taken as fast as they come, and before there is a
 * session the channel doesn't rest for them.
 */
START_TEST(clients_flood)
{
    static const bool conns = true;
    static Rig r;
    VPConfig config = rig_config;
    VPAddr addr;
    VPDriver *other;
    uint32_t refused = VP_CONN_FIRST;
    int listener = unix_listen(&addr, 100);

    config.max_conns = 1000;
    rig_new(&r, &config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    vp_set_events(r.loop, followed, &conns);
    if (_i == 0) {
        peer_session(&r);
    } else {
        box_settle(r.loop);
    }
    ck_assert_int_eq(vp_set_oforward(r.drv, listener, "svc"), 0);
    for (int i = 0; i < 20; i++) {
        uint8_t msg[2], buf[VP_ACCEPT_BATCH * (VP_PKT_HDR_LEN + sizeof(msg))];
        size_t len = 0;

        for (int j = 0; j < VP_ACCEPT_BATCH; j++) {
            int fd = socket(AF_UNIX, SOCK_STREAM, 0);

            ck_assert(connect(fd, (struct sockaddr *)&addr.ss, addr.len) == 0);
            close(fd);
        }
        peer_expects(&r, engine_link(r.drv).unsent);
        while (_i == 0 && refused < engine_counts(r.drv).next_id) {
            msg_end(msg, VP_MSG_CONNECT_REFUSED, VP_REASON_REFUSED);
            len += peer_put(&r.peer, buf + len, VP_PKT_CONTROL, 0, refused++,
                            msg, sizeof(msg));
        }
        ck_assert(write(r.peer.fd, buf, len) == (ssize_t)len);
        box_step(r.loop, 1);
        ck_assert(!r.drv->link.rx_more);
        ck_assert(!timer_running(&r.drv->link.rest_timer));
    }
    ck_assert_uint_ge(engine_counts(r.drv).next_id, 10 * VP_ACCEPT_BATCH);
    ck_assert_uint_eq(r.drv->link.resyncs, 0);
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* Small reads of many clients make it rest; it's read between two rests. */
START_TEST(read_between_rests)
{
    enum { CLIENTS = 50 };
    static Rig r;
    VPDriver *other;
    bool was_read = true;
    int client[CLIENTS], rests = 0;

    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        client[i] = rig_client(&r, "svc");
        peer_drain(&r);
        peer_credit(&r, 0, VP_CONN_FIRST + i, VP_MSG_CONNECT_ACK, 1 << 20);
    }
    for (int i = 0; i < 1000; i++) {
        uint64_t before = r.loop->now, read_at = r.drv->link.rx_last_at;
        bool rested = timer_running(&r.drv->link.rest_timer);
        uint8_t buf[4096];

        for (int j = 0; j < CLIENTS; j++) {
            ck_assert_int_eq(write(client[j], "x", 1), 1);
        }
        while (recv(r.peer.fd, buf, sizeof(buf), 0) > 0) {
            continue;
        }
        peer_expects(&r, engine_link(r.drv).unsent);
        peer_put(&r.peer, buf, VP_PKT_PING, 0, 0, NULL, 0);
        ck_assert(write(r.peer.fd, buf, VP_PKT_HDR_LEN) == VP_PKT_HDR_LEN);
        box_step(r.loop, 1);
        if (i < 500) { /* then its share counts, but the portion is whole */
            other->task.spent += 500 * (r.loop->now - before);
        }
        if (!rested && timer_running(&r.drv->link.rest_timer)) {
            ck_assert_msg(was_read, "not read after rest %d", rests);
            was_read = false;
            rests++;
        }
        was_read |= r.drv->link.rx_last_at != read_at;
    }
    ck_assert_int_ge(rests, 10);
    for (int i = 0; i < CLIENTS; i++) {
        close(client[i]);
    }
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* Whoever comes and goes all the time doesn't fill the disk with that. */
START_TEST(log_of_visitors)
{
    static Rig r;
    int lines;

    rig_new(&r, &rig_config);
    for (int i = 0; i < 300; i++) {
        peer_session(&r);
        rig_unplug(&r);
        rig_plug(&r, VP_CHN_SOCKET, VP_OPENED);
        peer_write(&r, "rubbish", 7);
        rig_unplug(&r);
        rig_plug(&r, VP_CHN_SOCKET, VP_OPENED);
    }
    lines = log_count("\n");
    ck_assert_int_ge(lines, 40);
    ck_assert_int_le(lines, VP_LOG_LINES + 5);
    rig_free(&r);
}
END_TEST

/* The front of a long HELLO doesn't hide the whole ones that follow it. */
START_TEST(hello_breaks_off)
{
    static Rig r;
    uint8_t buf[VP_PKT_HDR_LEN];
    VPPacket pkt = { .type = VP_PKT_HELLO, .bytes = VP_HELLO_LEN_MAX };

    rig_new(&r, &rig_config);
    wire_put(buf, &pkt, &hello_key, 0);
    peer_write(&r, buf, sizeof(buf));
    peer_drain(&r);
    peer_say(&r, 77, 0);
    ck_assert_uint_eq(engine_link(r.drv).token[1], 77);
    peer_session(&r);
    rig_free(&r);
}
END_TEST

/*
 * A payload may contain a HELLO (a tunnel in the tunnel), and may come slowly:
 * it is delivered.  If its packet stops arriving just there, that costs a
 * handshake, no more.
 */
START_TEST(hello_in_payload)
{
    static Scene s;
    uint8_t packet[1024], inner[HELLO_TOTAL + 8] = { 0 };
    size_t len;

    scene_new(&s);
    s.t.len = s.t.at[1];
    peer_write(&s.r, s.t.data, s.t.len);
    s.target = rig_accept(&s.r, s.listener);
    hello_put(inner, 5);
    s.r.peer.next = VP_SEQ_FIRST + 1;
    len = peer_put(&s.r.peer, packet, VP_PKT_CLIENT, 0, 5, inner,
                   sizeof(inner));
    for (int pause = 0; pause < 2; pause++) {
        peer_write(&s.r, packet, len - 1);
        if (pause) {
            box_run(s.r.loop, 400 * MS);
        }
        peer_write(&s.r, packet + len - 1, 1);
        ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
        box_wait(s.r.loop, fd_state(s.target) == FD_OPEN &&
                 recv(s.target, inner, sizeof(inner), 0) == sizeof(inner));
        len = peer_put(&s.r.peer, packet, VP_PKT_CLIENT, 0, 5, inner,
                        sizeof(inner));
    }
    for (size_t i = 0; i < len; i++) { /* 100 bytes/s */
        peer_write(&s.r, packet + i, 1);
        box_run(s.r.loop, 10 * MS);
    }
    log_quiet("warn");
    ck_assert_int_eq(recv(s.target, inner, sizeof(inner), 0), sizeof(inner));
    len = peer_put(&s.r.peer, packet, VP_PKT_CLIENT, 0, 5, inner,
                   sizeof(inner));
    peer_write(&s.r, packet, VP_PKT_HDR_LEN);
    box_run(s.r.loop, 400 * MS);
    peer_write(&s.r, packet + VP_PKT_HDR_LEN, len - VP_PKT_HDR_LEN - 1);
    log_expect("a packet breaks off", 1);
    peer_drain(&s.r);
    peer_claim(&s.r.peer);
    s.r.peer.hello.base = s.r.peer.next - 1;
    s.r.peer.hello.next = s.r.peer.next;
    ck_assert(peer_shake(&s.r));
    s.r.peer.next--;
    peer_send(&s.r, VP_PKT_CLIENT, 0, 5, inner, sizeof(inner));
    box_wait(s.r.loop, recv(s.target, inner, sizeof(inner), 0) ==
             sizeof(inner));
    log_expect("session ended", 0);
    scene_free(&s);
}
END_TEST

/* ---- numbers that don't fit ------------------------------------------- */

START_TEST(gap)
{
    static Scene s;

    scene_new(&s);
    peer_write(&s.r, s.t.data, s.t.at[1]);
    peer_write(&s.r, s.t.data + s.t.at[3], s.t.at[4] - s.t.at[3]);
    log_expect("out of step (packets are missing)", 1);
    ck_assert_uint_eq(engine_link(s.r.drv).expect, VP_SEQ_FIRST + 1);
    scene_recover(&s);
    scene_free(&s);
}
END_TEST

START_TEST(duplicate)
{
    static Scene s;

    scene_new(&s);
    peer_write(&s.r, s.t.data, s.t.at[2]);
    peer_write(&s.r, s.t.data + s.t.at[1], s.t.at[2] - s.t.at[1]);
    ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 1);
    ck_assert_uint_eq(engine_link(s.r.drv).expect, VP_SEQ_FIRST + 2);
    scene_recover(&s);
    scene_free(&s);
}
END_TEST

/* A number is said by packets of every type, and must be right in all. */
START_TEST(number_of_unsequenced)
{
    static const int types[] = { VP_PKT_PING, VP_PKT_ACK };

    for (int i = 0; i < COUNT_OF(types); i++) {
        for (int off = -1; off <= 1; off++) {
            static Rig r;

            rig_new(&r, &rig_config);
            peer_session(&r);
            r.peer.next += (uint32_t)off;
            peer_send(&r, types[i], 0, 0, NULL, 0);
            ck_assert_uint_eq(engine_link(r.drv).resyncs, off != 0);
            rig_free(&r);
        }
    }
}
END_TEST

/* An ack of what was never sent, of less than was acked before, of others */
START_TEST(ack_makes_no_sense)
{
    static const struct {
        int off;
        bool good;
        bool other; /* packets than those that were sent */
    } acks[] = {
        { -1, false, false }, { 0, true, false }, { 1, true, false },
        { 2, true, false }, { 3, false, false }, { INT_MAX, false, false },
        { INT_MIN, false, false }, { 0, false, true }, { 1, false, true },
        { 2, false, true },
    };

    for (int i = 0; i < COUNT_OF(acks); i++) {
        const uint32_t len = VP_PKT_HDR_LEN + 12;
        static Rig r;
        int client[3];

        rig_new(&r, &rig_config);
        peer_session(&r);
        client[0] = rig_client(&r, "a");
        peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        ck_assert_uint_eq(engine_unacked(r.drv), 0);
        client[1] = rig_client(&r, "b");
        client[2] = rig_client(&r, "c");
        peer_drain(&r);
        ck_assert_uint_eq(engine_unacked(r.drv), 2 * len);
        peer_expects(&r, VP_SEQ_FIRST + 1 + (uint32_t)acks[i].off);
        r.peer.digest += acks[i].other;
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        ck_assert_str_eq(engine_link(r.drv).state,
                         acks[i].good ? "up" : "hello");
        if (acks[i].good) {
            ck_assert_uint_eq(engine_unacked(r.drv),
                              (uint32_t)(2 - acks[i].off) * len);
        } else {
            log_expect("no packet where one should begin", 1);
            ck_assert_uint_eq(engine_unacked(r.drv), 2 * len);
        }
        for (int k = 0; k < 3; k++) {
            close(client[k]);
        }
        rig_free(&r);
    }
}
END_TEST

/* ---- what we send ----------------------------------------------------- */

/* A client that sends 200 bytes into a channel that is full */
typedef struct Sender {
    Rig r;
    int client;
} Sender;

/* The packet they make */
#define SENDER_LEN (VP_PKT_HDR_LEN + 200u)

/* sender_new() - the channel takes @room bytes of the packet */
static void sender_new(Sender *s, size_t room)
{
    uint8_t data[200];

    rig_new(&s->r, &rig_config);
    peer_session(&s->r);
    s->client = rig_client(&s->r, "sink");
    peer_expect(&s->r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    peer_send(&s->r, VP_PKT_ACK, 0, 0, NULL, 0);
    box.write_fd = engine_link(s->r.drv).wfd;
    box.write_left = room;
    bytes_fill(data, sizeof(data), 2, 0);
    fd_write(s->client, data, sizeof(data));
    box_wait(s->r.loop, engine_unacked(s->r.drv) == SENDER_LEN);
}

static void sender_free(Sender *s)
{
    box.write_fd = 0;
    close(s->client);
    rig_free(&s->r);
}

/* sender_check() - what came of the 200 bytes, from @got on */
static size_t sender_check(Sender *s, size_t got)
{
    Peer *p = &s->r.peer;
    int type;

    while ((type = peer_next(&s->r)) != 0) {
        if (type == VP_PKT_CLIENT) {
            bytes_check(p->data, p->pkt.bytes, 2, got);
            got += p->pkt.bytes;
        }
    }
    return got;
}

/*
 * The channel is full anywhere in a packet, and the peer begins a handshake:
 * first the packet is finished, then comes our HELLO; and what was not
 * received is sent again.
 */
START_TEST(hello_while_blocked)
{
    for (size_t room = 0; room <= SENDER_LEN; room++) {
        static Sender s;
        Peer *p = &s.r.peer;
        size_t got;

        sender_new(&s, room);
        got = sender_check(&s, 0);
        peer_claim(&s.r.peer);
        peer_say(&s.r, 1000 + room, 0);
        ck_assert_str_eq(engine_link(s.r.drv).state, "hello");
        box.write_fd = 0;
        engine_unblock(s.r.drv);
        got = sender_check(&s, got);
        ck_assert_uint_eq(p->heard.echo, 1000 + room);
        peer_claim(&s.r.peer);
        peer_say(&s.r, 1000 + room, 0);
        peer_keys(p);
        got = sender_check(&s, got);
        ck_assert_uint_eq(got, 200);
        log_expect("info ch7: channel up: session resumed", 0); /* no news */
        sender_free(&s);
    }
}
END_TEST

/* The descriptor is lost anywhere in a packet. */
START_TEST(cut_while_blocked)
{
    for (size_t room = 0; room <= SENDER_LEN; room++) {
        static Sender s;
        size_t got;

        sender_new(&s, room);
        got = sender_check(&s, 0);
        box.write_fd = 0;
        rig_unplug(&s.r);
        rig_plug(&s.r, VP_CHN_SOCKET, VP_ACCEPTED);
        peer_claim(&s.r.peer);
        ck_assert(peer_shake(&s.r));
        log_expect("channel up: session resumed", 1);
        got = sender_check(&s, got);
        ck_assert_uint_eq(got, 200);
        sender_free(&s);
    }
}
END_TEST

/* What is not handed over whole can't be acked. */
START_TEST(ack_of_half_a_packet)
{
    static Sender s;

    sender_new(&s, 100);
    ck_assert_uint_eq(engine_link(s.r.drv).unsent_off, 100);
    peer_send(&s.r, VP_PKT_ACK, 0, 0, NULL, 0);
    ck_assert_uint_eq(engine_link(s.r.drv).resyncs, 0);
    peer_expects(&s.r, s.r.peer.expect + 1);
    peer_send(&s.r, VP_PKT_ACK, 0, 0, NULL, 0);
    log_expect("no packet where one should begin", 1);
    sender_free(&s);
}
END_TEST

/* close_to() - is @a, a time in us, @b or a little more? */
static bool close_to(uint32_t a, uint64_t b)
{
    return a - (uint32_t)b < MS;
}

/* A header tells when it was sent, and how long what came before it took. */
START_TEST(times)
{
    static const uint32_t aheads[] = { 0, 1000000000, INT32_MAX, UINT32_MAX };
    static Rig r;
    int client[1 + COUNT_OF(aheads)];

    rig_new(&r, &rig_config);
    peer_session(&r);
    client[0] = rig_client(&r, "a");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    ck_assert(close_to((uint32_t)box.now, r.peer.pkt.time));
    ck_assert_uint_eq(r.peer.pkt.delay, 0); /* nothing came but HELLOs */
    for (int i = 0; i < COUNT_OF(aheads); i++) { /* the peer's clock is */
        uint64_t delay = 20 * MS - aheads[i];

        r.peer.time = (uint32_t)(box.now - 30 * MS + aheads[i]);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        r.peer.time += 10 * MS; /* the newest counts */
        peer_send(&r, VP_PKT_PING, 0, 0, NULL, 0);
        ck_assert_int_eq(peer_next(&r), VP_PKT_ACK);
        ck_assert(close_to((uint32_t)box.now, r.peer.pkt.time));
        ck_assert(close_to(r.peer.pkt.delay, delay));
        box_run(r.loop, 3 * MS);
        client[i + 1] = rig_client(&r, "b"); /* and when it came */
        ck_assert_int_eq(peer_next(&r), VP_PKT_CONTROL);
        ck_assert(close_to((uint32_t)box.now, r.peer.pkt.time));
        ck_assert(close_to(r.peer.pkt.delay, delay));
    }
    for (int i = 0; i < COUNT_OF(client); i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* What is sent again has the time of that. */
START_TEST(times_sent_again)
{
    static Rig r;
    int client;
    uint32_t first;

    rig_new(&r, &rig_config);
    peer_session(&r);
    client = rig_client(&r, "a");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    first = r.peer.pkt.time;
    rig_unplug(&r);
    box_run(r.loop, SECOND);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    r.peer.expect = VP_SEQ_FIRST;
    r.peer.digest = 0;
    peer_claim(&r.peer);
    ck_assert(peer_shake(&r));
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    ck_assert_uint_ge(r.peer.pkt.time - first, SECOND);
    ck_assert_uint_eq(r.peer.pkt.delay, 0);
    close(client);
    rig_free(&r);
}
END_TEST

/*
 * A virtio-serial port takes 32 KiB at a time, and a reboot of the guest
 * drops what lies there: no packet spans two writes.
 */
START_TEST(virtio_writes)
{
    static uint8_t data[300000], buf[65536];
    static Rig r;
    int fd[2], client, writes = 0;
    ssize_t n;

    rig_new(&r, &rig_config);
    rig_unplug(&r);
    /* this kind of socket shows where each write begins and ends */
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fd), 0);
    fd_nonblock(fd[0]);
    fd_nonblock(fd[1]);
    r.peer.fd = fd[1];
    ck_assert_int_eq(vp_attach(r.drv, fd[0], fd[0], VP_CHN_VIRTSERIAL,
                               VP_OPENED), 0);
    peer_session(&r);
    client = rig_client(&r, "s");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    peer_credit(&r, 0, VP_CONN_FIRST, VP_MSG_CONNECT_ACK, UINT64_MAX);
    engine_set_limit(r.drv, VP_LIMIT_MAX(VP_STORE_LEN), VP_PKT_LEN_MAX);
    for (int i = 0; i < 20; i++) {
        send(client, data, sizeof(data), MSG_NOSIGNAL);
        box_run(r.loop, MS);
        while ((n = recv(r.peer.fd, buf, sizeof(buf), 0)) > 0) {
            size_t at = 0;

            writes++;
            ck_assert_int_le(n, VP_VIRTIO_WRITE_MAX);
            while (at < (size_t)n) {
                VPPacket pkt;

                ck_assert(peer_get(&r.peer, buf + at, &pkt));
                at += VP_PKT_HDR_LEN + pkt.bytes;
            }
            ck_assert_uint_eq(at, (size_t)n);
        }
    }
    ck_assert_int_gt(writes, 20);
    close(client);
    rig_free(&r);
}
END_TEST

/* ---- acks and pings --------------------------------------------------- */

/* peer_service() - a connection to a target that reads; its socket */
static int peer_service(Rig *r, uint32_t conn)
{
    int listener = rig_target(r, "svc"), fd;

    peer_init(r, conn, "svc", 1 << 20);
    fd = rig_accept(r, listener);
    close(listener);
    peer_expect(r, conn, VP_MSG_CONNECT_ACK);
    box_run(r->loop, 50 * MS);
    peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
    peer_drain(r);
    ck_assert_uint_eq(engine_unacked(r->drv), 0);
    return fd;
}

START_TEST(ack_in_time)
{
    static Rig r;
    int target;

    rig_new(&r, &rig_config);
    peer_session(&r);
    target = peer_service(&r, 1);
    /* at leisure, one for all that came */
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "a", 1);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "b", 1);
    ck_assert_int_eq(peer_next(&r), 0);
    box_run(r.loop, VP_ACK_DELAY + MS);
    ck_assert_int_eq(peer_next(&r), VP_PKT_ACK);
    ck_assert_uint_eq(r.peer.ack, r.peer.next);
    ck_assert_int_eq(peer_next(&r), 0);
    /* at once, where it was asked for */
    peer_send(&r, VP_PKT_CLIENT, VP_FLAG_ACK_NOW, 1, "c", 1);
    ck_assert_int_eq(peer_next(&r), VP_PKT_ACK);
    ck_assert_uint_eq(r.peer.ack, r.peer.next);
    peer_send(&r, VP_PKT_PING, 0, 0, NULL, 0);
    ck_assert_int_eq(peer_next(&r), VP_PKT_ACK);
    box_run(r.loop, 100 * MS);
    ck_assert_int_eq(peer_next(&r), 0);
    /* with a packet that goes out anyway */
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "d", 1);
    fd_write(target, "e", 1);
    box_wait(r.loop, engine_unacked(r.drv) > 0);
    ck_assert_int_eq(peer_next(&r), VP_PKT_SERVER);
    ck_assert_uint_eq(r.peer.ack, r.peer.next);
    box_run(r.loop, 100 * MS);
    ck_assert_int_eq(peer_next(&r), 0);
    close(target);
    rig_free(&r);
}
END_TEST

/* A header's ack counts before the rest of the packet has come. */
START_TEST(ack_ahead)
{
    static uint8_t buf[VP_PKT_HDR_LEN + 500];
    static Rig r;
    int target;
    size_t len;

    rig_new(&r, &rig_config);
    peer_session(&r);
    target = peer_service(&r, 1);
    fd_write(target, "x", 1);
    box_wait(r.loop, engine_unacked(r.drv) > 0);
    ck_assert_int_eq(peer_next(&r), VP_PKT_SERVER);
    len = peer_put(&r.peer, buf, VP_PKT_CLIENT, 0, 1, buf + VP_PKT_HDR_LEN,
                   500);
    peer_write(&r, buf, VP_PKT_HDR_LEN - 1);
    ck_assert_uint_gt(engine_unacked(r.drv), 0);
    peer_write(&r, buf + VP_PKT_HDR_LEN - 1, 1);
    ck_assert_uint_eq(engine_unacked(r.drv), 0);
    ck_assert_uint_eq(engine_link(r.drv).expect, r.peer.next - 1);
    peer_write(&r, buf + VP_PKT_HDR_LEN, len - VP_PKT_HDR_LEN);
    ck_assert_uint_eq(engine_link(r.drv).expect, r.peer.next);
    ck_assert_uint_eq(engine_link(r.drv).resyncs, 0);
    close(target);
    rig_free(&r);
}
END_TEST

/* Much data is acked on the way, asked for or not. */
START_TEST(ack_much)
{
    static uint8_t data[16000];
    static Rig r;
    uint32_t last = VP_SEQ_FIRST;
    int acks = 0;

    rig_new(&r, &rig_config);
    peer_session(&r);
    box.pass_us = 1; /* no time for a timer */
    for (int i = 0; i < 200; i++) {
        /* of a connection that is gone: it takes no credit */
        peer_send(&r, VP_PKT_CLIENT, 0, 99, data, sizeof(data));
        while (peer_next(&r) == VP_PKT_ACK) {
            acks++;
            last = r.peer.ack;
        }
        ck_assert_uint_lt((r.peer.next - last) * sizeof(data),
                          VP_ACK_BYTES + sizeof(data));
    }
    ck_assert_int_gt(acks, 10);
    ck_assert_int_lt(acks, 14);
    rig_free(&r);
}
END_TEST

static const struct {
    uint64_t srtt, wait;
} ping_waits[] = {
    { 0, VP_PING_WAIT_MAX }, { 100, VP_PING_WAIT_MIN },
    { 30 * MS, 120 * MS }, { 100 * MS, VP_PING_WAIT_MAX },
};

/*
 * While packets wait for an ack, PING asks: after a few round trips, or 0.2 s
 * if it isn't known how long these take, and then more rarely.
 */
START_TEST(ping_for_ack)
{
    uint64_t at[14] = { 0 }, start, wait = ping_waits[_i].wait;
    static Rig r;
    int n = 0, client;

    rig_new(&r, &rig_config);
    peer_session(&r);
    box_run(r.loop, SECOND);
    peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    peer_drain(&r);
    engine_set_rtt(r.drv, ping_waits[_i].srtt);
    client = rig_client(&r, "s");
    box_settle(r.loop);
    start = box.now;
    while (n < COUNT_OF(at)) {
        box_run(r.loop, 10 * MS);
        while (peer_next(&r) != 0) {
            if (r.peer.pkt.type == VP_PKT_PING) {
                ck_assert_uint_eq(r.peer.pkt.seq, VP_SEQ_FIRST + 1);
                at[n++] = box.now - start;
            }
        }
        ck_assert_uint_lt(box.now - start, 100 * SECOND);
    }
    ck_assert_uint_ge(at[0], wait);
    ck_assert_uint_le(at[0], wait + 30 * MS);
    for (int i = 2; i < n; i++) {
        ck_assert_uint_ge(at[i] - at[i - 1] + 30 * MS,
                          at[i - 1] - at[i - 2]);
        ck_assert_uint_le(at[i] - at[i - 1], VP_PING_IDLE + 30 * MS);
    }
    ck_assert_uint_ge(at[n - 1] - at[n - 2], VP_PING_IDLE - 30 * MS);
    ck_assert_str_eq(engine_link(r.drv).state, "silent"); /* not given up */
    ck_assert_uint_ne(engine_link(r.drv).asked_at, 0);
    peer_expects(&r, VP_SEQ_FIRST + 1);
    peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    ck_assert_uint_eq(engine_link(r.drv).asked_at, 0);
    close(client);
    rig_free(&r);
}
END_TEST

/* The last bytes of what was sent are lost: the first PING tells. */
START_TEST(lost_tail)
{
    static uint8_t buf[VP_PKT_HDR_LEN + 500];
    static Rig r;
    int target;
    size_t len;

    rig_new(&r, &rig_config);
    peer_session(&r);
    target = peer_service(&r, 1);
    len = peer_put(&r.peer, buf, VP_PKT_CLIENT, 0, 1, buf + VP_PKT_HDR_LEN,
                   500);
    peer_write(&r, buf, len - 100);
    box_run(r.loop, VP_PING_WAIT_MIN);
    ck_assert_uint_eq(engine_link(r.drv).resyncs, 0);
    peer_send(&r, VP_PKT_PING, 0, 0, NULL, 0);
    ck_assert_uint_eq(engine_link(r.drv).resyncs, 1);
    close(target);
    rig_free(&r);
}
END_TEST

/* An idle link says every 5 s that it lives, and gives its memory back. */
START_TEST(ping_idle)
{
    static Rig r;
    int pings = 0, target;
    size_t idle;

    rig_new(&r, &rig_config);
    peer_session(&r);
    idle = box.allocated + sizeof(VPConn) + 4096;
    target = peer_service(&r, 1);
    for (int i = 0; i < 600; i++) {
        box_run(r.loop, 100 * MS);
        while (peer_next(&r) == VP_PKT_PING) {
            pings++;
            peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        }
    }
    ck_assert_int_ge(pings, 11);
    ck_assert_int_le(pings, 13);
    ck_assert(!engine_link(r.drv).stores);
    ck_assert_uint_lt(box.allocated, idle);
    /* and it still works */
    fd_write(target, "x", 1);
    box_wait(r.loop, engine_unacked(r.drv) > 0);
    ck_assert_int_eq(peer_next(&r), VP_PKT_SERVER);
    close(target);
    rig_free(&r);
}
END_TEST

/* However much the peer asks, there is one answer at a time. */
START_TEST(ping_flood)
{
    static uint8_t buf[VP_PKT_HDR_LEN * 1000];
    static Rig r;
    size_t len = 0;

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 1000; i++) {
        len += peer_put(&r.peer, buf + len, VP_PKT_PING, 0, 0, NULL, 0);
    }
    box.write_fd = engine_link(r.drv).wfd; /* and the channel is full */
    for (int i = 0; i < 20; i++) {
        peer_write(&r, buf, len);
    }
    ck_assert_uint_le(engine_link(r.drv).ctl_len, 128);
    box.write_fd = 0;
    engine_unblock(r.drv);
    ck_assert_int_eq(peer_next(&r), VP_PKT_ACK);
    peer_drain(&r);
    ck_assert_uint_lt(box.passes, 1000);
    rig_free(&r);
}
END_TEST

/* ---- a peer that breaks the protocol ---------------------------------- */

START_TEST(unknown_types)
{
    static const int types[] = { 0, VP_PKT_PING + 1, 100, 255 };

    for (int i = 0; i < COUNT_OF(types); i++) {
        static Rig r;

        rig_new(&r, &rig_config);
        peer_session(&r);
        peer_send(&r, types[i], 0, 0, NULL, 0);
        log_expect("breaks the protocol (unknown type of packet)", 1);
        ck_assert_str_eq(engine_link(r.drv).state, "hello");
        ck_assert_uint_eq(engine_link(r.drv).epoch[0], 0);
        rig_free(&r);
    }
}
END_TEST

/* HELLO has a key of its own; with the session's it is no packet. */
START_TEST(hello_with_session_key)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    peer_send(&r, VP_PKT_HELLO, 0, 0, NULL, 0);
    ck_assert_str_eq(engine_link(r.drv).state, "hello");
    log_quiet("error");
    rig_free(&r);
}
END_TEST

/* For a second we don't listen to it, then it gets another chance. */
START_TEST(penalty)
{
    static Rig r;
    uint64_t from, waited;

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 5; i++) {
        peer_send(&r, 200, 0, 0, NULL, 0);
        log_expect("breaks the protocol", 1);
        peer_drain(&r);
        from = box.now;
        r.peer.hellos = 0;
        while (r.peer.hellos == 0) {
            ck_assert_uint_lt(box.now - from, 3 * SECOND);
            peer_say(&r, 1000000 + (unsigned)i, 0);
            box_run(r.loop, 10 * MS);
            peer_drain(&r);
        }
        waited = box.now - from;
        ck_assert_uint_ge(waited, VP_PENALTY_US - 20 * MS);
        ck_assert_uint_le(waited, VP_PENALTY_US + 50 * MS);
        peer_session(&r);
        log_clear();
    }
    rig_free(&r);
}
END_TEST

/* Whatever the peer does, in 10 s it gets no more than so much logged. */
START_TEST(log_flood)
{
    static Rig r;
    uint64_t from;

    rig_new(&r, &rig_config);
    peer_session(&r);
    log_clear();
    from = box.now;
    for (int i = 0; i < 3000; i++) {
        switch (_i) {
        case 0: /* services that don't exist */
            peer_init(&r, (uint32_t)i, "none", 0);
            break;
        case 1: /* one session after the other */
            peer_say(&r, 50000 + (unsigned)i, 0);
            peer_drain(&r);
            peer_session(&r);
            break;
        case 2: /* out of step all the time */
            peer_write(&r, "12345678901234567890123456789012", 32);
            peer_drain(&r);
            peer_claim(&r.peer);
            peer_shake(&r);
            break;
        case 3: /* claims that can't be true */
            r.peer.hello.expect = VP_SEQ_FIRST + 1000;
            peer_shake(&r);
            peer_drain(&r);
            peer_session(&r);
            break;
        }
        peer_drain(&r);
        if (box.now - from > 9 * SECOND) {
            break;
        }
    }
    ck_assert_msg(log_count("\n") - log_count("debug ch") <=
                  3 * VP_LOG_LINES, "%d lines", log_count("\n"));
    rig_free(&r);
}
END_TEST

/* ---- the descriptor --------------------------------------------------- */

START_TEST(reason_of_loss)
{
    static Rig r;
    char line[80];
    int target;

    rig_new(&r, &rig_config);
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_TTY, VP_OPENED);
    peer_session(&r);
    target = peer_service(&r, 1);
    close(target); /* so that work on the data fails in ways of its own */
    log_clear();
    box.read_errno = EIO;
    for (int i = 0; i < 3 && engine_link(r.drv).rfd >= 0; i++) {
        peer_send(&r, VP_PKT_CLIENT, 0, 1, "abc", 3);
    }
    box.read_errno = 0;
    snprintf(line, sizeof(line), "channel down: %s", strerror(EIO));
    log_expect(line, 1);
    ck_assert_str_eq(r.reason, strerror(EIO));
    rig_free(&r);
}
END_TEST

START_TEST(closed_by_peer)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    shutdown(r.peer.fd, SHUT_WR);
    box_settle(r.loop);
    ck_assert_int_eq(r.lost, 1);
    log_expect("channel down: closed by the other end", 1);
    box_run(r.loop, 10 * SECOND);
    ck_assert_int_eq(r.lost, 1);
    rig_free(&r);
}
END_TEST

/* The last packets before the end of the channel are taken. */
START_TEST(data_before_close)
{
    static Scene s;

    scene_new(&s);
    ck_assert_int_eq(send(s.r.peer.fd, s.t.data, s.t.len, 0),
                     (ssize_t)s.t.len);
    shutdown(s.r.peer.fd, SHUT_WR);
    box_settle(s.r.loop);
    ck_assert_int_eq(s.r.lost, 1);
    scene_check(&s);
    scene_free(&s);
}
END_TEST

START_TEST(no_memory)
{
    static Rig r;

    rig_new(&r, &rig_config);
    box_fail(CALL_ALLOC, ENOMEM, 0, BOX_ALL);
    peer_say(&r, 1, 0);
    box.calls = 0;
    ck_assert_int_eq(r.lost, 1);
    ck_assert_str_eq(r.reason, "out of memory");
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_session(&r);
    rig_free(&r);
}
END_TEST

/* The receive buffer grows while reads fill it, up to its bound. */
START_TEST(receive_buffer)
{
    static uint8_t buf[VP_PKT_LEN_MAX], data[VP_PKT_DATA_LEN];
    static Rig r;
    size_t len;
    uint32_t packets;

    rig_new(&r, &rig_config);
    peer_session(&r);
    ck_assert_uint_eq(engine_link(r.drv).rx_cap, VP_RX_LEN_MIN);
    packets = r.peer.next;
    for (int i = 0; i < 300; i++) {
        len = peer_put(&r.peer, buf, VP_PKT_CLIENT, 0, 99, data, sizeof(data));
        while (len > 0) {
            ssize_t n = send(r.peer.fd, buf + sizeof(buf) - len, len, 0);

            if (n < 0) {
                box_settle(r.loop);
                n = 0;
            }
            len -= (size_t)n;
        }
    }
    box_settle(r.loop);
    ck_assert_uint_eq(engine_link(r.drv).expect, packets + 300);
    ck_assert_uint_le(engine_link(r.drv).rx_cap, VP_RX_LEN_MAX);
    box_run(r.loop, 20 * SECOND);
    ck_assert_uint_eq(engine_link(r.drv).rx_cap, 0);
    rig_free(&r);
}
END_TEST

/* ---- a port with nobody at the other side ----------------------------- */

typedef struct Fifos {
    char dir[64];
    char in[80];
    char out[80];
    int rfd;  /* the peer's ends */
    int wfd;
} Fifos;

static void fifos_come(Fifos *f)
{
    f->wfd = open(f->in, O_WRONLY | O_NONBLOCK);
    f->rfd = open(f->out, O_RDONLY | O_NONBLOCK);
    ck_assert_int_ge(f->wfd, 0);
    ck_assert_int_ge(f->rfd, 0);
}

static void fifos_go(Fifos *f)
{
    close(f->wfd);
    close(f->rfd);
}

static void fifos_new(Fifos *f, Rig *r)
{
    int rfd, wfd;

    strcpy(f->dir, "/tmp/vp-unit-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(f->dir));
    snprintf(f->in, sizeof(f->in), "%s/in", f->dir);
    snprintf(f->out, sizeof(f->out), "%s/out", f->dir);
    ck_assert_int_eq(mkfifo(f->in, 0600), 0);
    ck_assert_int_eq(mkfifo(f->out, 0600), 0);
    rfd = open(f->in, O_RDONLY | O_NONBLOCK);
    f->rfd = open(f->out, O_RDONLY | O_NONBLOCK);
    wfd = open(f->out, O_WRONLY | O_NONBLOCK);
    close(f->rfd);
    ck_assert_int_eq(vp_attach(r->drv, rfd, wfd, VP_CHN_VIRTSERIAL, VP_OPENED),
                     0);
}

static void fifos_free(Fifos *f)
{
    unlink(f->in);
    unlink(f->out);
    rmdir(f->dir);
}

/*
 * The peer comes and goes.  While it is away the descriptors stay, nothing
 * spins, and when it is back the session goes on.
 */
START_TEST(port_away)
{
    VPConfig config = rig_config;
    static Rig r;
    unsigned long passes;
    uint8_t hello[HELLO_TOTAL];
    Fifos f;

    config.grace = 100;
    rig_new(&r, &config);
    rig_unplug(&r);
    r.lost = 0;
    fifos_new(&f, &r);
    box_run(r.loop, SECOND);
    ck_assert(engine_link(r.drv).away);
    ck_assert_str_eq(engine_link(r.drv).state, "down");
    for (int i = 0; i < 3; i++) {
        passes = box.passes;
        box_run(r.loop, 60 * SECOND);
        ck_assert_uint_le(box.passes - passes, 60 * 5);
        fifos_come(&f);
        box_run(r.loop, SECOND);
        ck_assert(!engine_link(r.drv).away);
        ck_assert_str_eq(engine_link(r.drv).state, "hello");
        /* old ones may lie there, too */
        while (read(f.rfd, hello, sizeof(hello)) == sizeof(hello)) {
            ck_assert_int_eq(wire_get_hello(hello, sizeof(hello),
                                            &r.peer.heard), sizeof(hello));
        }
        r.peer.hello.token = 100 + (unsigned)i;
        r.peer.hello.echo = r.peer.heard.token;
        wire_put_hello(hello, &r.peer.hello, NULL);
        ck_assert_int_eq(write(f.wfd, hello, sizeof(hello)), sizeof(hello));
        box_settle(r.loop);
        ck_assert_str_eq(engine_link(r.drv).state, "up");
        if (i == 0) {
            log_expect("channel up: new session", 1);
            r.peer.hello.my_epoch = r.peer.hello.token;
            r.peer.hello.peer_epoch = r.peer.heard.token;
        } else {
            log_expect("channel up: session resumed", 1);
        }
        fifos_go(&f);
        box_settle(r.loop);
        ck_assert_str_eq(engine_link(r.drv).state, "down");
        log_expect("channel down: nobody at the other side", 1);
    }
    ck_assert_int_eq(r.lost, 0);
    fifos_free(&f);
    rig_free(&r);
}
END_TEST

/* From each state (a line) to each state: is it legal? */
static const char *const legal_link[] = {
    [LINK_DOWN]  = "--x--",
    [LINK_AWAY]  = "x-x--",
    [LINK_HELLO] = "xxxxx",
    [LINK_UP]    = "xxx-x",
    [LINK_DUMB]  = "xx---",
};

/* What isn't legal is an error in the log, and changes nothing; what is, is
   told at debug level, by name. */
START_TEST(transitions)
{
    static const char *const name[] = { "DOWN", "AWAY", "HELLO", "UP", "DUMB" };
    VPLoop *loop = engine_loop_new();
    VPLog log = { .loop = loop, .channel = 3 };
    VPLink l = { .loop = loop, .log = &log };
    int n = COUNT_OF(legal_link);
    char line[100];

    engine_log_level = VP_LOG_DEBUG;
    link_init(&l);
    for (int i = 0; i < n * n; i++) {
        int from = i / n, to = i % n;
        bool legal = legal_link[from][to] == 'x';

        l.state = (VPLinkState)from;
        link_set_state(&l, (VPLinkState)to, "try");
        ck_assert_int_eq((int)l.state, legal ? to : from);
        snprintf(line, sizeof(line), "error ch3: link: %s after %s (try)\n",
                 name[to], name[from]);
        ck_assert_int_eq(log_count(line), !legal);
        snprintf(line, sizeof(line), "debug ch3: link %s -> %s: try\n",
                 name[from], name[to]);
        ck_assert_int_eq(log_count(line), legal);
        log_clear();
    }
    vp_loop_free(loop);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("link");

    SUITE_ADD(s, transitions);
    SUITE_ADD(s, send_buffer);
#ifdef SO_SNDBUFFORCE
    SUITE_LOOP(s, send_buffer_far, 4);
#endif
    SUITE_ADD(s, first_hello);
    SUITE_LOOP(s, hello_when_up, 2);
    SUITE_ADD(s, no_answer);
    SUITE_LOOP(s, other_version, 2);
    SUITE_ADD(s, other_version_later);
    SUITE_ADD(s, own_instance);
    SUITE_LOOP(s, echoing_line, 2);
    SUITE_ADD(s, echo_when_up);
    SUITE_LOOP(s, garbage_before, 6);
    SUITE_LOOP(s, stranger_named, 2);
    SUITE_LOOP(s, stranger_hangs_up, 2);
    SUITE_ADD(s, old_session_packets);
    SUITE_ADD(s, old_session_packets_late);
    SUITE_ADD(s, byte_by_byte);
    SUITE_ADD(s, any_pieces);
    SUITE_ADD(s, poor_io);
    SUITE_LOOP(s, flipped_bit, 8);
    SUITE_LOOP(s, bytes_lost_or_added, DAMAGES);
    SUITE_ADD(s, hello_in_packet);
    SUITE_ADD(s, paused_in_packet);
    SUITE_ADD(s, stranger_brief);
    SUITE_ADD(s, garbage_is_work);
    SUITE_ROWS(s, hello_is_work, vain);
    SUITE_LOOP(s, work_beside_others, 2 * BESIDE);
    SUITE_ADD(s, share_fades);
    SUITE_ADD(s, read_beside_work);
    SUITE_LOOP(s, clients_flood, 2);
    SUITE_ADD(s, read_between_rests);
    SUITE_ADD(s, log_of_visitors);
    SUITE_ADD(s, hello_breaks_off);
    SUITE_ADD(s, hello_in_payload);
    SUITE_ADD(s, gap);
    SUITE_ADD(s, duplicate);
    SUITE_ADD(s, number_of_unsequenced);
    SUITE_ADD(s, ack_makes_no_sense);
    SUITE_ADD(s, hello_while_blocked);
    SUITE_ADD(s, cut_while_blocked);
    SUITE_ADD(s, ack_of_half_a_packet);
    SUITE_ADD(s, times);
    SUITE_ADD(s, times_sent_again);
    SUITE_ADD(s, virtio_writes);
    SUITE_ADD(s, ack_in_time);
    SUITE_ADD(s, ack_ahead);
    SUITE_ADD(s, ack_much);
    SUITE_ROWS(s, ping_for_ack, ping_waits);
    SUITE_ADD(s, lost_tail);
    SUITE_ADD(s, ping_idle);
    SUITE_ADD(s, ping_flood);
    SUITE_ADD(s, unknown_types);
    SUITE_ADD(s, hello_with_session_key);
    SUITE_ADD(s, penalty);
    SUITE_LOOP(s, log_flood, 4);
    SUITE_ADD(s, reason_of_loss);
    SUITE_ADD(s, closed_by_peer);
    SUITE_ADD(s, data_before_close);
    SUITE_ADD(s, no_memory);
    SUITE_ADD(s, receive_buffer);
    SUITE_ADD(s, port_away);
    return suite_run(s);
}
