/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_conn.c - the life of a connection: states, credit, control messages
 *
 * One engine, whose peer is played by the test; clients and targets are real
 * sockets.
 */
#include <sys/resource.h>

#include "tests/lib/rig.h"

/* ---- the state machines ----------------------------------------------- */

/* From each state (a line) to each state: is it legal? */
static const char *const legal_in[] = {
    [IN_WAIT]   = "-x-xx",
    [IN_OPEN]   = "--xxx",
    [IN_EOF]    = "----x",
    [IN_DROP]   = "----x",
    [IN_CLOSED] = "----x",
};

static const char *const legal_out[] = {
    [OUT_WAIT]       = "-xx---x",
    [OUT_WAIT_DRAIN] = "---x--x",
    [OUT_OPEN]       = "---xx-x",
    [OUT_DRAIN]      = "-----xx",
    [OUT_BROKEN]     = "-----xx",
    [OUT_BROKEN_END] = "------x",
    [OUT_CLOSED]     = "------x",
};

static const char *const legal_life[] = {
    [LIFE_NEW]     = "-x--x",
    [LIFE_OPEN]    = "--xxx",
    [LIFE_ENDING]  = "----x",
    [LIFE_CLOSING] = "----x",
    [LIFE_FREE]    = "-----",
};

/* try_transition() - of machine @what from state @from to state @to */
static bool try_transition(VPConn *c, int what, int from, int to)
{
    switch (what) {
    case 0:
        c->in = (VPIn)from;
        conn_set_in(c, (VPIn)to, "try");
        return (int)c->in == to && log_count("error") == 0;
    case 1:
        c->out = (VPOut)from;
        conn_set_out(c, (VPOut)to, "try");
        return (int)c->out == to && log_count("error") == 0;
    default:
        c->life = (VPLife)from;
        conn_set_life(c, (VPLife)to, "try");
        return (int)c->life == to && log_count("error") == 0;
    }
}

/* What isn't legal is an error in the log, and changes nothing; what is, is
   told at debug level, by name. */
START_TEST(transitions)
{
    static const struct {
        const char *name;
        const char *const *legal;
        const char *const *state;
        int n;
    } machine[] = {
        { "in", legal_in, in_name, COUNT_OF(legal_in) },
        { "out", legal_out, out_name, COUNT_OF(legal_out) },
        { "life", legal_life, life_name, COUNT_OF(legal_life) },
    };
    VPLoop *loop = engine_loop_new();
    VPLog log = { .loop = loop, .channel = 3 };
    VPLink link = { .loop = loop };
    VPConns cs = { .loop = loop, .log = &log, .link = &link };
    VPConn c = { .conns = &cs, .id = 99, .fd = -1, .service_id = "svc" };
    char line[100];

    engine_log_level = VP_LOG_DEBUG;
    conns_init(&cs);
    c.account = &cs.rest;
    node_init(&c.idler);
    node_init(&c.due_node);
    node_init(&c.turn.node);
    for (int what = 0; what < COUNT_OF(machine); what++) {
        const char *const *name = machine[what].state;

        for (int i = 0; i < machine[what].n * machine[what].n; i++) {
            int from = i / machine[what].n, to = i % machine[what].n;
            bool legal = machine[what].legal[from][to] == 'x';

            log.span[1].lines = 0;
            ck_assert_msg(try_transition(&c, what, from, to) == legal,
                          "%s: %s after %s", machine[what].name, name[to],
                          name[from]);
            snprintf(line, sizeof(line), "error ch3: connection 99: %s%s%s "
                     "after %s", what < 2 ? machine[what].name : "",
                     what < 2 ? ": " : "", name[to], name[from]);
            ck_assert_int_eq(log_count(line), !legal);
            snprintf(line, sizeof(line), "debug ch3: connection 99 of svc to "
                     "a closed socket: %s %s -> %s: try\n",
                     machine[what].name, name[from], name[to]);
            ck_assert_int_eq(log_count(line), legal && from != to);
            log_clear();
        }
    }
    vp_loop_free(loop);
}
END_TEST

/* ---- a connection to play with ---------------------------------------- */

/* One that the peer opened to a target, or a client opened to the peer */
typedef struct Play {
    Rig r;
    bool client;     /* the engine is its client side */
    uint32_t id;
    int fd;          /* the test's end of the local socket */
    int mine;        /* flags of the peer's control packets */
    int data;        /* type of the peer's data packets */
} Play;

static EngineConn play_conn(Play *p)
{
    return rig_conn(&p->r, p->id, p->client);
}

static void play_begin(Play *p, bool client, uint64_t credit, bool tcp)
{
    Rig *r = &p->r;
    int listener;

    rig_new(r, &rig_config);
    r->tcp = tcp;
    r->peer.hello.window = (uint32_t)credit;
    peer_session(r);
    p->client = client;
    p->mine = client ? 0 : VP_FLAG_CLIENT;
    p->data = client ? VP_PKT_SERVER : VP_PKT_CLIENT;
    if (client) {
        p->id = VP_CONN_FIRST;
        p->fd = rig_client(r, "svc");
        peer_expect(r, p->id, VP_MSG_CONNECT_INIT);
        ck_assert_uint_eq(get64(r->peer.data + 1), VP_WINDOW_INIT);
        ck_assert_int_eq(r->peer.data[9], 3);
        ck_assert_mem_eq(r->peer.data + 10, "svc", 3);
        ck_assert_int_eq(r->peer.pkt.bytes, 13 + (r->tcp ? 13 : 1));
        peer_credit(r, 0, p->id, VP_MSG_CONNECT_ACK, credit);
    } else {
        p->id = 5;
        listener = rig_target(r, "svc");
        peer_init(r, p->id, "svc", credit);
        p->fd = rig_accept(r, listener);
        close(listener);
        box_wait(r->loop, rig_conn_in(r, p->id, false, "OPEN"));
        peer_expect(r, p->id, VP_MSG_CONNECT_ACK);
        ck_assert_uint_eq(get64(r->peer.data + 1), VP_WINDOW_INIT);
    }
    ck_assert_str_eq(play_conn(p).in, "OPEN");
    ck_assert_str_eq(play_conn(p).out, "OPEN");
    log_clear();
}

static void play_new(Play *p, bool client, uint64_t credit)
{
    play_begin(p, client, credit, true);
}

static void play_send(Play *p, const void *data, size_t len)
{
    peer_send(&p->r, p->data, 0, p->id, data, len);
}

static void play_msg(Play *p, int msg, int arg)
{
    peer_msg(&p->r, p->mine, p->id, msg, arg);
}

/* play_expect() - a control message of this connection */
static void play_expect(Play *p, int msg)
{
    peer_expect(&p->r, p->id, msg);
    ck_assert_int_eq(p->r.peer.pkt.flags & VP_FLAG_CLIENT,
                     p->client ? VP_FLAG_CLIENT : 0);
}

/* play_over() - nothing is left of it; the session goes on */
static void play_over(Play *p)
{
    VPDriver *drv = p->r.drv;

    box_run(p->r.loop, 20 * MS);
    ck_assert(!engine_has_conn(drv, p->id, p->client));
    ck_assert_uint_eq(engine_counts(drv).conns, 0);
    ck_assert_uint_eq(engine_counts(drv).clients, 0);
    ck_assert_uint_eq(engine_counts(drv).announced, 0);
    ck_assert_uint_eq(engine_counts(drv).grown, 0);
    ck_assert_uint_eq(engine_counts(drv).connecting, 0);
    ck_assert_uint_eq(engine_counts(drv).turns, 0);
    ck_assert(!engine_counts(drv).listed);
    ck_assert_str_eq(engine_link(drv).state, "up");
    ck_assert_uint_eq(engine_link(drv).resyncs, 0);
    log_quiet("warn");
    log_quiet("error");
}

static void play_free(Play *p)
{
    close(p->fd);
    rig_free(&p->r);
}

/* ---- the end of data, and resets -------------------------------------- */

/* Either side ends first; the other goes on sending. */
START_TEST(half_close)
{
    static Play p;
    uint64_t got = 0;
    uint8_t data[1000];
    bool local_first = _i / 2;

    play_new(&p, _i % 2, 1 << 20);
    bytes_fill(data, sizeof(data), 1, 0);
    if (local_first) {
        fd_write(p.fd, data, 10);
        shutdown(p.fd, SHUT_WR);
        box_wait(p.r.loop, rig_conn_in(&p.r, p.id, p.client, "CLOSED"));
        ck_assert_int_eq(peer_next(&p.r), p.client ? VP_PKT_CLIENT
                                                   : VP_PKT_SERVER);
        play_expect(&p, VP_MSG_CLOSE); /* never before the data */
        box_run(p.r.loop, 5 * SECOND);
        play_send(&p, data, sizeof(data));
        box_wait(p.r.loop, fd_drain(p.fd, 1, &got) == FD_OPEN && got == 1000);
        play_msg(&p, VP_MSG_CLOSE, 0);
        fd_wait(p.r.loop, p.fd, FD_EOF);
    } else {
        play_send(&p, data, sizeof(data));
        play_msg(&p, VP_MSG_CLOSE, 0);
        box_wait(p.r.loop, fd_drain(p.fd, 1, &got) == FD_EOF);
        ck_assert_uint_eq(got, 1000);
        box_run(p.r.loop, 5 * SECOND);
        ck_assert_str_eq(play_conn(&p).out, "CLOSED");
        ck_assert_str_eq(play_conn(&p).in, "OPEN");
        fd_write(p.fd, data, sizeof(data));
        shutdown(p.fd, SHUT_WR);
        box_run(p.r.loop, MS);
        for (got = 0; got < 1000; ) {
            ck_assert_int_ne(peer_next(&p.r), 0);
            if (p.r.peer.pkt.type < VP_PKT_HELLO) {
                bytes_check(p.r.peer.data, p.r.peer.pkt.bytes, 1, got);
                got += p.r.peer.pkt.bytes;
            }
        }
        play_expect(&p, VP_MSG_CLOSE);
    }
    play_over(&p);
    play_free(&p);
}
END_TEST

START_TEST(reset_by_local)
{
    struct linger reset = { 1, 0 };
    static Play p;

    play_new(&p, _i, 1 << 20);
    setsockopt(p.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    close(p.fd);
    box_wait(p.r.loop, !engine_has_conn(p.r.drv, p.id, p.client));
    play_expect(&p, VP_MSG_RESET);
    p.fd = -1;
    play_over(&p);
    /* whatever was under way to it */
    play_send(&p, "late", 4);
    play_msg(&p, VP_MSG_CLOSE, 0);
    play_msg(&p, VP_MSG_RESET, 0);
    play_over(&p);
    rig_free(&p.r);
}
END_TEST

START_TEST(reset_by_peer)
{
    static Play p;

    play_new(&p, _i % 2, 1 << 20);
    if (_i / 2) {
        play_send(&p, "data first", 10);
    }
    play_msg(&p, VP_MSG_RESET, VP_REASON_NONE);
    if (_i / 2) {
        char data[10];

        box_wait(p.r.loop, recv(p.fd, data, sizeof(data), 0) != -1 ||
                 errno == ECONNRESET);
    } else {
        fd_wait(p.r.loop, p.fd, ECONNRESET);
    }
    peer_quiet(&p.r);
    play_over(&p);
    play_free(&p);
}
END_TEST

/* Reset after having shut down: nobody reads there, so it is looked for. */
START_TEST(reset_after_end)
{
    struct linger reset = { 1, 0 };
    static Play p;
    int tries = 0;

    play_new(&p, _i, 1 << 20);
    shutdown(p.fd, SHUT_WR);
    box_wait(p.r.loop, rig_conn_in(&p.r, p.id, p.client, "CLOSED"));
    play_expect(&p, VP_MSG_CLOSE);
    setsockopt(p.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    close(p.fd);
    p.fd = -1;
    while (engine_has_conn(p.r.drv, p.id, p.client)) {
        box_pause(&tries);
        box_run(p.r.loop, 1500 * MS);
    }
    play_expect(&p, VP_MSG_RESET);
    rig_free(&p.r);
}
END_TEST

/*
 * The owner of a unix socket is gone after his end of data: the peer is told
 * once he had all of it.  Bytes that the owner didn't read make a reset of his
 * end, and those that come later another error.
 */
START_TEST(gone_after_end)
{
    VPChannelInfo info;
    static Play p;

    play_begin(&p, _i & 1, 1 << 20, false);
    fd_write(p.fd, "all", 3);
    if (_i & 2) {
        play_send(&p, "unread", 6);
        box_run(p.r.loop, MS);
    }
    if (_i < 6) {
        shutdown(p.fd, SHUT_WR);
        box_wait(p.r.loop, rig_conn_in(&p.r, p.id, p.client, "CLOSED"));
    }
    box_run(p.r.loop, 5 * SECOND);
    ck_assert_str_eq(play_conn(&p).out, "OPEN");
    close(p.fd);
    p.fd = -1;
    if (_i & 4 && _i < 6) {
        play_send(&p, "late", 4);
    } else {
        box_run(p.r.loop, 1100 * MS);
    }
    ck_assert_int_eq(peer_next(&p.r), p.client ? VP_PKT_CLIENT
                                               : VP_PKT_SERVER);
    ck_assert_mem_eq(p.r.peer.data, "all", 3);
    if (_i < 6) {
        play_expect(&p, VP_MSG_CLOSE);
    }
    play_expect(&p, VP_MSG_RESET);
    ck_assert_int_eq(p.r.peer.data[1], VP_REASON_GONE);
    vp_channel_info(p.r.drv, &info);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_OWNER], 0);
    play_over(&p);
    rig_free(&p.r);
}
END_TEST

/*
 * He dies while more than his credit waits: nothing of that is lost.  That he
 * had read all is an end of his data, although what comes later finds nobody.
 */
START_TEST(gone_without_credit)
{
    bool ended = _i & 2;
    static Play p;
    int type;

    play_begin(&p, _i & 1, 3, false);
    if (!ended) {
        play_send(&p, "unread", 6);
    }
    fd_write(p.fd, "abcdefg", 7);
    close(p.fd);
    p.fd = -1;
    box_run(p.r.loop, 9 * SECOND);
    ck_assert_int_lt(peer_next(&p.r), VP_PKT_HELLO);
    ck_assert_mem_eq(p.r.peer.data, "abc", 3);
    if (ended) {
        play_send(&p, "late", 4);
        ck_assert_str_eq(play_conn(&p).out, "BROKEN");
    }
    peer_credit(&p.r, p.mine, p.id, VP_MSG_WINDOW, 1000);
    do {
        type = peer_next(&p.r);
    } while (type >= VP_PKT_HELLO);
    ck_assert_mem_eq(p.r.peer.data, "defg", 4);
    if (ended) {
        play_expect(&p, VP_MSG_CLOSE);
    }
    play_expect(&p, VP_MSG_RESET);
    ck_assert_int_eq(p.r.peer.data[1], VP_REASON_GONE);
    play_over(&p);
    rig_free(&p.r);
}
END_TEST

/* An error that says nothing of its owner is a reset, of a unix socket, too. */
START_TEST(unreadable)
{
    static Play p;

    play_begin(&p, _i, 1 << 20, false);
    fd_write(p.fd, "never read", 10);
    box_fail(CALL_READ, ENOMEM, 0, 1);
    box_run(p.r.loop, MS);
    play_expect(&p, VP_MSG_RESET);
    ck_assert_int_eq(p.r.peer.data[1], VP_REASON_NONE);
    play_over(&p);
    play_free(&p);
}
END_TEST

/* play_fill() - use up the credit on a local socket whose owner doesn't read */
static uint64_t play_fill(Play *p)
{
    static uint8_t data[VP_WINDOW_INIT];
    int small = 4096;
    uint64_t sent = 0;

    setsockopt(p->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    setsockopt(play_conn(p).fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
    for (int i = 0; i < 50; i++) {
        size_t len = (size_t)MIN(sizeof(data), play_conn(p).rx_limit - sent);

        if (len > 0) {
            bytes_fill(data, len, 1, sent);
            play_send(p, data, len);
            sent += len;
        }
        box_run(p->r.loop, MS);
    }
    ck_assert_uint_gt(play_conn(p).buf_len, 0);
    return sent;
}

/*
 * Nobody is left at the other side: what was sent before is delivered, however
 * long it takes, then the local socket is closed: in order after CLOSE, else
 * by a reset, which a unix socket's owner can't see.  The owner's own bytes,
 * which nobody gets, don't cut that short.
 */
static const struct {
    bool client;
    bool tcp;
    bool closed; /* CLOSE came before */
    bool broken; /* nobody is left here either */
} peer_gone_rows[] = {
    { .client = true }, { .closed = true }, { .broken = true },
    { .tcp = true }, { .client = true, .tcp = true, .closed = true },
    { .client = true, .tcp = true },
};

START_TEST(peer_gone)
{
    bool broken = peer_gone_rows[_i].broken;
    bool cut = peer_gone_rows[_i].tcp && !peer_gone_rows[_i].closed;
    VPChannelInfo info;
    static Play p;
    uint64_t sent, got = 0;
    int tries = 0, end = FD_OPEN;

    play_begin(&p, peer_gone_rows[_i].client, 3, peer_gone_rows[_i].tcp);
    fd_write(p.fd, "unread", 6);
    sent = play_fill(&p);
    if (peer_gone_rows[_i].closed) {
        play_msg(&p, VP_MSG_CLOSE, 0);
    }
    if (broken) {
        close(p.fd);
        p.fd = -1;
    }
    peer_drain(&p.r);
    play_msg(&p, VP_MSG_RESET, VP_REASON_GONE);
    peer_quiet(&p.r);
    if (!broken) {
        box_run(p.r.loop, 100 * SECOND);
        while ((end = fd_drain(p.fd, 1, &got)) == FD_OPEN) {
            box_pause(&tries);
            box_run(p.r.loop, 1500 * MS);
        }
        ck_assert_int_eq(end, cut ? ECONNRESET : FD_EOF);
        ck_assert_uint_eq(got, sent);
    }
    tries = 0;
    while (engine_counts(p.r.drv).conns > 0) {
        box_pause(&tries); /* the kernel's acks take real time */
        box_run(p.r.loop, 1500 * MS);
    }
    vp_channel_info(p.r.drv, &info);
    if (cut) {
        ck_assert_uint_eq(info.counts.reset[VP_RESET_PEER], 1);
    }
    peer_quiet(&p.r);
    peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
    play_over(&p);
    if (!broken) {
        close(p.fd);
    }
    rig_free(&p.r);
}
END_TEST

/* play_talk() - the local socket's owner writes @len bytes */
static void play_talk(Play *p, size_t len)
{
    static const uint8_t data[64 << 10];
    int tries = 0;

    while (len > 0) {
        ssize_t n = send(p->fd, data, MIN(sizeof(data), len), MSG_NOSIGNAL);

        if (n < 0) {
            ck_assert_int_eq(errno, EAGAIN);
            box_pause(&tries);
            n = 0;
        }
        len -= (size_t)n;
        box_run(p->r.loop, MS);
    }
}

/*
 * Nobody is left at the other side, and the owner of the local socket says all
 * that he has to say before he reads: he gets rid of it, and then gets what
 * was sent.  If he never reads that ends some day.
 */
START_TEST(peer_gone_talker)
{
    bool reads = _i & 2;
    static Play p;
    uint64_t sent, got = 0;
    int tries = 0, end;
    size_t size;

    play_begin(&p, _i & 4, 3, _i & 1);
    sent = play_fill(&p);
    play_msg(&p, VP_MSG_RESET, VP_REASON_GONE);
    size = (size_t)(reads ? 8 : 20) << 20; /* more than kernels hold */
    play_talk(&p, size);
    if (reads) {
        box_run(p.r.loop, 100 * SECOND); /* no haste, if little is written */
        play_talk(&p, 1);
        box_run(p.r.loop, SECOND);
        ck_assert_uint_eq(engine_counts(p.r.drv).conns, 1);
        while ((end = fd_drain(p.fd, 1, &got)) == FD_OPEN) {
            box_pause(&tries);
            box_run(p.r.loop, 1500 * MS);
        }
        ck_assert_uint_eq(got, sent);
        ck_assert_int_eq(end, _i & 1 ? ECONNRESET : FD_EOF);
    } else {
        for (int i = 0; i < 9; i++) {
            box_run(p.r.loop, SECOND);
            play_talk(&p, 1);
        }
        ck_assert_uint_eq(engine_counts(p.r.drv).conns, 1);
        box_run(p.r.loop, 2 * SECOND);
        play_talk(&p, 1);
        box_wait(p.r.loop, engine_counts(p.r.drv).conns == 0);
    }
    peer_drain(&p.r);
    peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
    play_over(&p);
    play_free(&p);
}
END_TEST

/*
 * Many of them, who all have something to say: beside another channel so few
 * are read in a pass that it doesn't wait, and none twice before all have been.
 */
START_TEST(peer_gone_talkers)
{
    enum { TALKERS = 50, SAID = 2 * VP_DROP_LEN };
    static const uint8_t data[SAID];
    static Rig r;
    VPDriver *other;
    int client[TALKERS], small = 4096, passes = 0;
    uint64_t before = 0, dropped = 0;

    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    for (uint32_t i = 0; i < TALKERS; i++) {
        uint32_t id = VP_CONN_FIRST + i;

        client[i] = rig_client(&r, "svc");
        peer_drain(&r);
        peer_credit(&r, 0, id, VP_MSG_CONNECT_ACK, 0);
        setsockopt(rig_conn(&r, id, true).fd, SOL_SOCKET, SO_SNDBUF, &small,
                   sizeof(small));
        peer_send(&r, VP_PKT_SERVER, 0, id, data, VP_WINDOW_INIT);
        peer_msg(&r, 0, id, VP_MSG_RESET, VP_REASON_GONE);
        box_settle(r.loop);
    }
    for (int i = 0; i < TALKERS; i++) {
        fd_write(client[i], data, SAID);
    }
    while (dropped < TALKERS * SAID) {
        uint64_t least = SAID, most = 0;

        ck_assert_int_lt(passes++, TALKERS);
        box_step(r.loop, 1);
        dropped = 0;
        for (VPNode *n = r.drv->conns.all.next; n != &r.drv->conns.all;
             n = n->next) {
            const VPConn *c = container_of(n, VPConn, all);

            ck_assert_int_eq(c->in, IN_DROP);
            dropped += c->dropped;
            least = MIN(least, c->dropped);
            most = MAX(most, c->dropped);
        }
        ck_assert_uint_le(dropped - before, VP_WORK_SHARED * VP_WORK_BYTES);
        ck_assert_uint_le(most - least, VP_DROP_LEN);
        before = dropped;
    }
    for (int i = 0; i < TALKERS; i++) {
        close(client[i]);
    }
    vp_free(other);
    rig_free(&r);
}
END_TEST

/*
 * The same where it has no credit: nobody reads there either.  FreeBSD shows no
 * error then.
 */
START_TEST(reset_without_credit)
{
    struct linger reset = { 1, 0 };
    static Play p;
    int tries = 0;

    play_new(&p, _i & 1, 3);
    box.bsd = _i & 4;
    fd_write(p.fd, "12345", 5);
    box_wait(p.r.loop, play_conn(&p).tx_count == 3);
    setsockopt(p.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    close(p.fd);
    p.fd = -1;
    if (_i & 2) { /* and the peer goes on sending */
        peer_send(&p.r, p.client ? VP_PKT_SERVER : VP_PKT_CLIENT, 0, p.id,
                  "more", 4);
        peer_send(&p.r, p.client ? VP_PKT_SERVER : VP_PKT_CLIENT, 0, p.id,
                  "more", 4);
    }
    while (engine_has_conn(p.r.drv, p.id, p.client)) {
        box_pause(&tries);
        box_run(p.r.loop, 3 * SECOND);
    }
    ck_assert_int_eq(peer_next(&p.r), p.client ? VP_PKT_CLIENT
                                               : VP_PKT_SERVER);
    play_expect(&p, VP_MSG_RESET);
    rig_free(&p.r);
}
END_TEST

/*
 * The peer's daemon ends: what waits for one that doesn't read is looked at
 * often, but not so the many others that the sweep is for.
 */
START_TEST(end_beside_many)
{
    static Rig r;
    static uint8_t data[16 << 10];
    int fd[100], stuck, listener;
    unsigned long polls;

    rig_new(&r, &rig_config);
    r.peer.hello.window = 0; /* none has credit */
    peer_session(&r);
    for (int i = 0; i < COUNT_OF(fd); i++) {
        fd[i] = rig_client(&r, "svc");
        fd_write(fd[i], data, sizeof(data));
    }
    listener = rig_target(&r, "target");
    peer_init(&r, 1, "target", 1000);
    stuck = rig_accept(&r, listener);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, data, sizeof(data));
    box_run(r.loop, 2 * SECOND);
    polls = box.polls;
    peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_RESET, VP_REASON_ENDING);
    box_run(r.loop, 3 * SECOND);
    ck_assert(!engine_has_conn(r.drv, 1, false));
    ck_assert_uint_le(box.polls - polls, 4 * COUNT_OF(fd));
    for (int i = 0; i < COUNT_OF(fd); i++) {
        close(fd[i]);
    }
    close(stuck);
    close(listener);
    rig_free(&r);
}
END_TEST

static const char *const refusals[] = {
    "reset by the other side", "unknown service",
    "connection refused by the target", "target unreachable",
    "timed out", "too many connections", "out of memory or descriptors",
    "failed", "failed",
};

/* Refusals and their reasons, as the client's side tells them */
START_TEST(refused)
{
    static Play p;
    char line[200];

    play_new(&p, true, 1000);
    play_msg(&p, VP_MSG_CONNECT_REFUSED,
             _i == COUNT_OF(refusals) - 1 ? 255 : _i);
    fd_wait(p.r.loop, p.fd, ECONNRESET);
    snprintf(line, sizeof(line), "refused: %s\n", refusals[_i]);
    ck_assert_int_eq(log_count("svc: connection from 127.0.0.1:"), 1);
    log_expect(line, 1);
    play_over(&p);
    play_free(&p);
}
END_TEST

/* ---- before the target has answered ----------------------------------- */

/* A target whose queue is full: connect() has to wait. */
typedef struct Busy {
    int listener;
    int filler;
} Busy;

static void busy_target(Busy *b, Rig *r, const char *service)
{
    VPAddr addr;

    b->listener = unix_listen(&addr, 0);
    b->filler = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(b->filler, (struct sockaddr *)&addr.ss,
                             addr.len), 0);
    ck_assert_int_eq(vp_set_iforward(r->drv, service, &addr, 1), 0);
}

static void busy_no_more(Busy *b)
{
    close(accept(b->listener, NULL, NULL));
    close(b->filler);
}

/* What comes before the target is there reaches it, and in order. */
START_TEST(early)
{
    static Rig r;
    uint8_t data[9000];
    uint64_t got = 0;
    Busy b;
    int fd;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    peer_init(&r, 1, "busy", 1000);
    bytes_fill(data, sizeof(data), 1, 0);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, data, 4000);
    box_run(r.loop, SECOND);
    ck_assert_str_eq(rig_conn(&r, 1, false).in, "WAIT");
    ck_assert_str_eq(rig_conn(&r, 1, false).out, "WAIT");
    peer_send(&r, VP_PKT_CLIENT, 0, 1, data + 4000, 5000);
    ck_assert_uint_eq(rig_conn(&r, 1, false).buf_len, 9000);
    ck_assert_uint_eq(rig_conn(&r, 1, false).rx_taken, 0);
    if (_i & 1) {
        peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_CLOSE, 0);
        ck_assert_str_eq(rig_conn(&r, 1, false).out, "WAIT_DRAIN");
    }
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 1);
    busy_no_more(&b);
    box_run(r.loop, 100 * MS);
    fd = accept(b.listener, NULL, NULL);
    ck_assert_int_ge(fd, 0);
    fd_nonblock(fd);
    peer_expect(&r, 1, VP_MSG_CONNECT_ACK);
    if (!(_i & 1)) { /* who has sent CLOSE needs no credit */
        peer_expect(&r, 1, VP_MSG_WINDOW);
    }
    ck_assert_int_eq(fd_drain(fd, 1, &got), _i & 1 ? FD_EOF : FD_OPEN);
    ck_assert_uint_eq(got, 9000);
    ck_assert_str_eq(rig_conn(&r, 1, false).in, "OPEN");
    ck_assert_str_eq(rig_conn(&r, 1, false).out, _i & 1 ? "CLOSED" : "OPEN");
    log_quiet("error");
    close(fd);
    close(b.listener);
    rig_free(&r);
}
END_TEST

#define SIGNATURE "\r\n\r\n\0\r\nQUIT\n"
#define PORTS "\234\100\0\26"
#define FOUR "\300\0\2\7" "\12\0\0\1" PORTS
#define SIX "\40\1\15\270\0\0\0\0\0\0\0\0\0\0\0\1" \
            "\40\1\15\270\0\0\0\0\0\0\0\0\0\0\0\2" PORTS

static const struct {
    size_t origin_len;
    const char *origin; /* in CONNECT_INIT */
    size_t header_len;
    const char *header; /* behind the signature */
} introductions[] = {
    { 13, "\4" FOUR, 28, "\41\21\0\14" FOUR },
    { 37, "\6" SIX, 52, "\41\41\0\44" SIX },
    { 1, "\1", 16, "\40\0\0\0" },
    { 1, "\0", 16, "\40\0\0\0" },
    { 0, "", 16, "\40\0\0\0" },
    { 12, "\4" FOUR, 16, "\40\0\0\0" },
};

/*
 * A header of the PROXY protocol comes before all that the client sent early,
 * once, although the channel is cut meanwhile, however little the target's
 * socket takes at a time, and at no expense of the connection's credit.
 */
START_TEST(introduced)
{
    size_t len = introductions[_i].header_len, n = 0;
    uint8_t msg[100], got[60 + VP_WINDOW_INIT], data[VP_WINDOW_INIT];
    static Rig r;
    ssize_t part;
    Busy b;
    int fd;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    vp_iforward_proxy(r.drv, "busy");
    memcpy(msg + msg_init(msg, "busy", 1000), introductions[_i].origin,
           introductions[_i].origin_len);
    peer_send(&r, VP_PKT_CONTROL, VP_FLAG_CLIENT, 1, msg,
              14 + introductions[_i].origin_len);
    bytes_fill(data, sizeof(data), 1, 0);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, data, sizeof(data));
    ck_assert_uint_eq(rig_conn(&r, 1, false).buf_len, len + sizeof(data));
    rig_unplug(&r);
    peer_claim(&r.peer);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    ck_assert(peer_shake(&r));
    ck_assert_str_eq(rig_conn(&r, 1, false).in, "WAIT");
    busy_no_more(&b);
    box.io_max = 7;
    box_run(r.loop, 100 * MS);
    fd = rig_accept(&r, b.listener);
    while (n < len + sizeof(data)) {
        box_wait(r.loop, (part = recv(fd, got + n, sizeof(got) - n, 0)) > 0);
        n += (size_t)part;
    }
    box.io_max = 0;
    ck_assert_uint_eq(n, len + sizeof(data));
    ck_assert_mem_eq(got, SIGNATURE, 12);
    ck_assert_mem_eq(got + 12, introductions[_i].header, len - 12);
    ck_assert_mem_eq(got + len, data, sizeof(data));
    ck_assert_uint_eq(rig_conn(&r, 1, false).rx_taken, sizeof(data));
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "more", 4);
    ck_assert_int_eq(recv(fd, got, sizeof(got), 0), 4);
    ck_assert_mem_eq(got, "more", 4);
    close(fd);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* The target takes the connection, and not even the header. */
START_TEST(introduced_in_vain)
{
    static Rig r;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    vp_iforward_proxy(r.drv, "busy");
    peer_init(&r, 1, "busy", 1000);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "abc", 3);
    ck_assert_uint_eq(rig_conn(&r, 1, false).buf_len, 16 + 3);
    box_run(r.loop, 100 * MS); /* no ack is due any more */
    busy_no_more(&b);
    box_fail(CALL_WRITE, EPIPE, 0, 1);
    box_run(r.loop, 100 * MS);
    ck_assert_str_eq(rig_conn(&r, 1, false).out, "BROKEN");
    ck_assert_uint_eq(rig_conn(&r, 1, false).rx_taken, 3);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* The peer gives up, or the session ends, before the target is there. */
START_TEST(early_end)
{
    static Rig r;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    peer_init(&r, 1, "busy", 1000);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "abc", 3);
    switch (_i) {
    case 0:
        peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_RESET, 0);
        break;
    case 1:
        engine_forget(r.drv);
        break;
    case 2:
        vp_reset_all(r.drv);
        break;
    case 3:
        vp_del_iforward(r.drv, "busy");
        peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
        ck_assert_int_eq(r.peer.data[1], VP_REASON_UNKNOWN_SERVICE);
        break;
    case 4:
        box_run(r.loop, 9900 * MS);
        ck_assert_uint_eq(engine_counts(r.drv).connecting, 1);
        box_run(r.loop, 500 * MS);
        peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
        ck_assert_int_eq(r.peer.data[1], VP_REASON_TIMEOUT);
        log_expect("busy: cannot connect to", 1);
        break;
    }
    box_run(r.loop, SECOND);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 0);
    busy_no_more(&b);
    box_run(r.loop, SECOND);
    ck_assert_int_eq(accept(b.listener, NULL, NULL), -1);
    log_quiet("error");
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* The client has gone before the target is there, which gets it all the same. */
START_TEST(early_gone)
{
    static Rig r;
    uint64_t got = 0;
    uint8_t data[3];
    int fd = -1;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    peer_init(&r, 1, "busy", 1000);
    bytes_fill(data, sizeof(data), 1, 0);
    peer_send(&r, VP_PKT_CLIENT, 0, 1, data, sizeof(data));
    peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_RESET, VP_REASON_GONE);
    if (_i == 0) {
        busy_no_more(&b);
        box_wait(r.loop, (fd = accept(b.listener, NULL, NULL)) >= 0);
        fd_nonblock(fd);
        box_wait(r.loop, fd_drain(fd, 1, &got) == FD_EOF);
        ck_assert_uint_eq(got, sizeof(data));
        close(fd);
    } else {
        peer_init(&r, 1, "busy", 1000); /* its id may be used anew */
        ck_assert_uint_eq(engine_counts(r.drv).connecting, 2);
        box_run(r.loop, 11 * SECOND);
        peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
        busy_no_more(&b);
    }
    box_run(r.loop, SECOND);
    peer_quiet(&r);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 0);
    log_quiet("error");
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* All the addresses get 10 s, each of them beside the ones before. */
START_TEST(mute_addresses)
{
    static Rig r;
    VPAddr addr[4];
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "other");
    for (int i = 0; i < 4; i++) {
        addr[i].len = sizeof(addr[i].ss);
        getsockname(b.listener, (struct sockaddr *)&addr[i].ss, &addr[i].len);
    }
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", addr, 4), 0);
    peer_init(&r, 1, "svc", 1000);
    box_run(r.loop, 9 * SECOND);
    log_expect("svc: cannot connect to", 0);
    peer_quiet(&r);
    box_run(r.loop, 2 * SECOND);
    log_expect("svc: cannot connect to", 4);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_TIMEOUT);
    busy_no_more(&b);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/*
 * As many as the limits allow wait for a target that takes no more: one of
 * them asks for all, and when it has room they go on in their order.
 */
START_TEST(crowd_waits)
{
    static Rig r;
    unsigned long calls;
    int fd[100];
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    for (uint32_t i = 0; i < 100; i++) {
        peer_init(&r, i, "busy", 1000);
    }
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 100);
    calls = box.connects;
    box_run(r.loop, SECOND);
    ck_assert_uint_le(box.connects - calls, SECOND / VP_CONNECT_RETRY + 1);
    busy_no_more(&b);
    for (int i = 0; i < 100; i++) {
        box_run(r.loop, 2 * VP_CONNECT_RETRY);
        fd[i] = accept(b.listener, NULL, NULL);
        ck_assert_int_ge(fd[i], 0);
    }
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 0);
    peer_drain(&r);
    log_quiet("warn");
    for (int i = 0; i < 100; i++) {
        close(fd[i]);
    }
    close(b.listener);
    rig_free(&r);
}
END_TEST

/*
 * All addresses are tried: the next one as soon as one fails, or beside one
 * that doesn't answer within 250 ms.  The next connection begins with the one
 * that worked.
 */
START_TEST(addresses)
{
    static Rig r;
    VPAddr addr[3];
    int closed, fd, next;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    closed = tcp_listen(&addr[0], 1);
    close(closed); /* nobody answers there */
    busy_target(&b, &r, "other");
    addr[1].len = sizeof(addr[1].ss);
    getsockname(b.listener, (struct sockaddr *)&addr[1].ss, &addr[1].len);
    closed = tcp_listen(&addr[2], 5);
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", addr, 3), 0);
    peer_init(&r, 1, "svc", 1000);
    box_run(r.loop, VP_CONNECT_NEXT - 20 * MS);
    log_expect("svc: cannot connect to 127.0.0.1:", 1);
    ck_assert_int_eq(accept(closed, NULL, NULL), -1);
    peer_init(&r, 3, "svc", 1000); /* it has begun when the first one is over */
    box_run(r.loop, 40 * MS);
    fd = rig_accept(&r, closed);
    peer_expect(&r, 1, VP_MSG_CONNECT_ACK);
    box_run(r.loop, VP_CONNECT_NEXT);
    close(rig_accept(&r, closed));
    peer_expect(&r, 3, VP_MSG_CONNECT_ACK);
    log_expect("svc: cannot connect to 127.0.0.1:", 1);
    peer_drain(&r);
    peer_init(&r, 2, "svc", 1000);
    next = rig_accept(&r, closed);
    peer_expect(&r, 2, VP_MSG_CONNECT_ACK);
    log_expect("svc: cannot connect to", 0);
    close(next);
    close(fd);
    close(closed);
    busy_no_more(&b);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* count_uses() - VPUsedHandler: how often; and, in tens, how often in vain */
static void count_uses(void *opaque, bool failed)
{
    *(int *)opaque += failed ? 10 : 1;
}

/*
 * A service whose name is still looked up has no address: connections wait for
 * it.  Its owner hears of each, and of each that found no address that works.
 */
START_TEST(addresses_later)
{
    static Rig r;
    int listener, fd, uses = 0;
    VPAddr addr;

    rig_new(&r, &rig_config);
    peer_session(&r);
    listener = tcp_listen(&addr, 5);
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", NULL, 0), 0);
    vp_iforward_used(r.drv, "svc", count_uses, &uses);
    peer_init(&r, 1, "svc", 1000);
    box_run(r.loop, 9 * SECOND);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 1);
    ck_assert_int_eq(uses, 1);
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", NULL, 0), 0);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_UNREACHABLE);
    log_expect("svc: cannot connect: no address is known", 1);
    peer_init(&r, 2, "svc", 1000);
    box_run(r.loop, 11 * SECOND);
    peer_expect(&r, 2, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_TIMEOUT);
    peer_init(&r, 3, "svc", 1000);
    box_settle(r.loop);
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", &addr, 1), 0);
    fd = rig_accept(&r, listener);
    peer_expect(&r, 3, VP_MSG_CONNECT_ACK);
    ck_assert_int_eq(uses, 3 + 20);
    close(listener);
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", NULL, 0), 0);
    peer_init(&r, 4, "svc", 1000);
    peer_expect(&r, 4, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_REFUSED);
    ck_assert_int_eq(uses, 4 + 30);
    close(fd);
    rig_free(&r);
}
END_TEST

START_TEST(target_refuses)
{
    static Rig r;
    VPAddr addr[2];

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 2; i++) {
        close(tcp_listen(&addr[i], 1));
    }
    ck_assert_int_eq(vp_set_iforward(r.drv, "svc", addr, 2), 0);
    peer_init(&r, 1, "svc", 1000);
    box_wait(r.loop, !engine_has_conn(r.drv, 1, false));
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_REFUSED);
    log_expect("svc: cannot connect to 127.0.0.1:", 2);
    peer_init(&r, 1, "none", 1000);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_UNKNOWN_SERVICE);
    log_expect("none: connection refused: unknown service", 1);
    rig_free(&r);
}
END_TEST

/* ---- credit ----------------------------------------------------------- */

/* What windows may have grown by where the store doesn't grow. */
#define BUDGET VP_WINDOW_BUDGET(VP_STORE_LEN)

/* The counts are exact, also beyond 32 bits; a fast socket's window grows. */
START_TEST(credit_given)
{
    static Play p;
    static uint8_t data[60000];
    uint64_t sent = 0, got = 0, limit = VP_WINDOW_INIT, base;
    uint32_t window = VP_WINDOW_INIT;

    play_new(&p, _i % 2, 1000);
    base = _i / 2 ? UINT32_MAX - 200000ull : 0;
    engine_shift_conn(p.r.drv, p.id, p.client, base, 0);
    limit += base;
    for (int round = 0; round < 900; round++) {
        size_t len = 1 + rnd(60000);

        len = (size_t)MIN(len, limit - base - sent);
        bytes_fill(data, len, 1, sent);
        play_send(&p, data, len);
        sent += len;
        box_wait(p.r.loop, fd_drain(p.fd, 1, &got) == FD_OPEN && got == sent);
        while (peer_next(&p.r) != 0) {
            if (p.r.peer.pkt.type == VP_PKT_CONTROL) {
                ck_assert_int_eq(p.r.peer.data[0], VP_MSG_WINDOW);
                ck_assert_uint_gt(get64(p.r.peer.data + 1), limit);
                limit = get64(p.r.peer.data + 1);
            }
        }
        peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
        ck_assert_uint_eq(play_conn(&p).rx_taken, base + sent);
        ck_assert_uint_eq(play_conn(&p).rx_limit, limit);
        ck_assert_uint_ge(play_conn(&p).window, window);
        window = play_conn(&p).window;
        ck_assert_uint_le(limit, base + sent + window);
        ck_assert_uint_gt(limit, base + sent + window / 2 - 1);
        ck_assert_uint_eq(engine_counts(p.r.drv).grown,
                          window - VP_WINDOW_INIT);
    }
    ck_assert_uint_eq(window, VP_WINDOW_MAX);
    vp_reset_all(p.r.drv);
    play_expect(&p, VP_MSG_RESET);
    play_over(&p);
    play_free(&p);
}
END_TEST

/* A target that takes nothing costs no more than its window. */
START_TEST(credit_withheld)
{
    static Play p;
    static uint8_t data[VP_WINDOW_INIT];
    int small = 4096;
    uint64_t sent = 0, got = 0;
    int tries = 0;

    play_new(&p, _i, 1000);
    setsockopt(p.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    setsockopt(play_conn(&p).fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
    for (int i = 0; i < 50; i++) {
        size_t len = (size_t)MIN(sizeof(data), play_conn(&p).rx_limit - sent);

        if (len > 0) {
            bytes_fill(data, len, 1, sent);
            play_send(&p, data, len);
            sent += len;
        }
        box_run(p.r.loop, MS);
        ck_assert_uint_le(play_conn(&p).buf_cap, play_conn(&p).window);
        ck_assert_uint_eq(play_conn(&p).buf_len,
                          play_conn(&p).rx_count - play_conn(&p).rx_taken);
    }
    ck_assert_uint_eq(sent, play_conn(&p).rx_limit); /* used up */
    ck_assert_uint_gt(play_conn(&p).buf_len, play_conn(&p).window / 2);
    while (got < sent) {
        box_pause(&tries);
        fd_drain(p.fd, 1, &got);
        box_settle(p.r.loop);
    }
    ck_assert_uint_eq(play_conn(&p).buf_cap, 0);
    ck_assert_uint_gt(play_conn(&p).rx_limit, sent);
    peer_drain(&p.r);
    log_quiet("warn");
    play_free(&p);
}
END_TEST

/* One byte beyond it ends the session; up to it is all right. */
START_TEST(credit_overrun)
{
    static Play p;
    static uint8_t data[VP_WINDOW_INIT + 1];

    play_new(&p, _i % 2, 1000);
    play_send(&p, data, VP_WINDOW_INIT + (size_t)(_i / 2));
    if (_i / 2) {
        log_expect("breaks the protocol (more data than credit)", 1);
        fd_wait(p.r.loop, p.fd, ECONNRESET);
    } else {
        log_expect("breaks the protocol", 0);
    }
    play_free(&p);
}
END_TEST

/* rig_many() - @n connections that the peer opened; returns their listener */
static int rig_many(Rig *r, int *fd, unsigned n)
{
    int listener;

    rig_new(r, &rig_config);
    peer_session(r);
    listener = rig_target(r, "svc");
    for (unsigned i = 0; i < n; i++) {
        peer_init(r, i, "svc", 1000);
        fd[i] = rig_accept(r, listener);
    }
    return listener;
}

/* All windows together stay in their budget, and it comes back. */
START_TEST(credit_budget)
{
    enum { MANY = 30 };
    static uint8_t data[65000];
    static Rig r;
    int listener, fd[MANY];
    uint64_t sent[MANY] = { 0 }, got[MANY] = { 0 };

    listener = rig_many(&r, fd, MANY);
    for (int round = 0; round < 60; round++) {
        for (unsigned i = 0; i < MANY; i++) {
            EngineConn c = rig_conn(&r, i, false);
            size_t len = (size_t)MIN(c.rx_limit - sent[i], sizeof(data));

            bytes_fill(data, len, i, sent[i]);
            peer_send(&r, VP_PKT_CLIENT, 0, i, data, len);
            sent[i] += len;
            fd_drain(fd[i], i, &got[i]);
        }
        peer_drain(&r);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        ck_assert_uint_le(engine_counts(r.drv).grown, BUDGET);
    }
    ck_assert_uint_gt(engine_counts(r.drv).grown, BUDGET / 2);
    log_quiet("warn");
    for (unsigned i = 0; i < MANY; i++) {
        peer_msg(&r, VP_FLAG_CLIENT, i, VP_MSG_RESET, 0);
        close(fd[i]);
    }
    ck_assert_uint_eq(engine_counts(r.drv).grown, 0);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    close(listener);
    rig_free(&r);
}
END_TEST

/* bulk_round() - fill the credit of connection @id, whose target takes all */
static void bulk_round(Rig *r, uint32_t id, int fd, uint64_t *sent,
                       uint64_t *got)
{
    static uint8_t data[65000];

    for (int i = 0; i < 40 && *sent < rig_conn(r, id, false).rx_limit; i++) {
        size_t len = (size_t)MIN(sizeof(data),
                                 rig_conn(r, id, false).rx_limit - *sent);

        bytes_fill(data, len, id, *sent);
        peer_send(r, VP_PKT_CLIENT, 0, id, data, len);
        *sent += len;
        fd_drain(fd, id, got);
    }
    peer_drain(r);
    peer_send(r, VP_PKT_ACK, 0, 0, NULL, 0);
    ck_assert_uint_le(engine_counts(r->drv).grown, BUDGET);
}

/* bulk_grow() - the same until its window is as large as it may be */
static void bulk_grow(Rig *r, uint32_t id, int fd, uint64_t *sent,
                      uint64_t *got)
{
    for (int i = 0; i < 60 && rig_conn(r, id, false).window < VP_WINDOW_MAX;
         i++) {
        bulk_round(r, id, fd, sent, got);
    }
}

/*
 * A connection that comes when others have large windows gets one, too: those
 * that are busy give some of theirs up (_i = 1), but what the idle keep must
 * not be all there is (_i = 0).
 */
START_TEST(credit_shared)
{
    enum { OLD = 6, BUSY = 12 };
    static Rig r;
    int listener, fd[BUSY];
    uint64_t sent[BUSY] = { 0 }, got[BUSY] = { 0 };
    unsigned n = _i == 0 ? OLD + 1 : BUSY;
    uint32_t least = UINT32_MAX, most = 0;

    rig_new(&r, &rig_config);
    peer_session(&r);
    listener = rig_target(&r, "svc");
    for (unsigned i = 0; i < n; i++) {
        peer_init(&r, i, "svc", 1000);
        fd[i] = rig_accept(&r, listener);
        if (i < OLD) {
            bulk_grow(&r, i, fd[i], &sent[i], &got[i]);
        }
    }
    ck_assert_uint_eq(rig_conn(&r, 0, false).window, VP_WINDOW_MAX);
    for (int round = 0; round < 20; round++) {
        for (unsigned i = _i == 0 ? OLD : 0; i < n; i++) {
            bulk_round(&r, i, fd[i], &sent[i], &got[i]);
        }
    }
    for (unsigned i = _i == 0 ? OLD : 0; i < n; i++) {
        least = MIN(least, rig_conn(&r, i, false).window);
        most = MAX(most, rig_conn(&r, i, false).window);
    }
    ck_assert_uint_ge(least, 4 * VP_WINDOW_INIT);
    ck_assert_uint_le(most, 4 * least);
    log_quiet("warn");
    for (unsigned i = 0; i < n; i++) {
        peer_msg(&r, VP_FLAG_CLIENT, i, VP_MSG_RESET, 0);
        close(fd[i]);
    }
    ck_assert_uint_eq(engine_counts(r.drv).grown, 0);
    close(listener);
    rig_free(&r);
}
END_TEST

/*
 * A full window that is halved, as its target takes little while others take
 * much, costs no more than that, and loses nothing.
 */
START_TEST(credit_halved)
{
    enum { MANY = 30 };
    static uint8_t data[65000];
    static Rig r;
    int listener, fd[MANY], few = 65536, tries = 0;
    uint64_t sent[MANY] = { 0 }, got[MANY] = { 0 };

    listener = rig_many(&r, fd, MANY);
    bulk_grow(&r, 0, fd[0], &sent[0], &got[0]);
    setsockopt(fd[0], SOL_SOCKET, SO_RCVBUF, &few, sizeof(few));
    setsockopt(rig_conn(&r, 0, false).fd, SOL_SOCKET, SO_SNDBUF, &few,
               sizeof(few));
    ck_assert_uint_eq(rig_conn(&r, 0, false).window, VP_WINDOW_MAX);
    while (sent[0] < rig_conn(&r, 0, false).rx_limit) {
        size_t len = (size_t)MIN(sizeof(data),
                                 rig_conn(&r, 0, false).rx_limit - sent[0]);

        bytes_fill(data, len, 0, sent[0]);
        peer_send(&r, VP_PKT_CLIENT, 0, 0, data, len);
        sent[0] += len;
    }
    ck_assert_uint_gt(rig_conn(&r, 0, false).buf_cap, VP_WINDOW_MAX / 2);
    for (int round = 0; round < 20; round++) {
        for (unsigned i = 1; i < MANY; i++) {
            bulk_round(&r, i, fd[i], &sent[i], &got[i]);
        }
    }
    while (rig_conn(&r, 0, false).window == VP_WINDOW_MAX) {
        box_pause(&tries);
        ck_assert_int_eq(fd_drain(fd[0], 0, &got[0]), FD_OPEN);
        box_settle(r.loop);
        ck_assert_uint_le(rig_conn(&r, 0, false).buf_cap,
                          rig_conn(&r, 0, false).window);
    }
    ck_assert_uint_gt(rig_conn(&r, 0, false).buf_len, 0);
    while (got[0] < sent[0]) {
        box_pause(&tries);
        box_settle(r.loop);
        ck_assert_int_eq(fd_drain(fd[0], 0, &got[0]), FD_OPEN);
    }
    log_quiet("warn");
    for (unsigned i = 0; i < MANY; i++) {
        close(fd[i]);
    }
    close(listener);
    rig_free(&r);
}
END_TEST

/* A target that only the kernel reads for doesn't get a large window. */
START_TEST(credit_on_trial)
{
    static Play p;
    static uint8_t data[VP_WINDOW_INIT];
    uint64_t sent = 0, got = 0, resized = 0;
    uint32_t window;

    play_new(&p, 1, 1000);
    window = play_conn(&p).window;
    for (int round = 0; round < 100; round++) {
        size_t len = (size_t)MIN(sizeof(data), play_conn(&p).rx_limit - sent);

        bytes_fill(data, len, 1, sent);
        play_send(&p, data, len);
        sent += len;
        box_wait(p.r.loop, fd_drain(p.fd, 1, &got) == FD_OPEN && got == sent);
        peer_drain(&p.r);
        peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
        if (play_conn(&p).window != window) {
            ck_assert_uint_eq(play_conn(&p).window, 2 * window);
            ck_assert_uint_ge((sent - resized) * VP_WINDOW_TRIAL,
                              (uint64_t)window * window);
            window = play_conn(&p).window;
            resized = sent;
        }
    }
    ck_assert_uint_eq(window, 32 * VP_WINDOW_INIT);
    play_free(&p);
}
END_TEST

/* play_long_way() - round trips take @trip, and memory is for stores of @len */
static void play_long_way(Play *p, uint64_t trip, uint32_t len)
{
    VPConfig config = rig_config;

    play_new(p, false, 1000);
    peer_send(&p->r, VP_PKT_ACK, 0, 0, NULL, 0);
    config.memory = memory_reach(&config, len);
    vp_set_config(p->r.drv, &config);
    engine_set_trip(p->r.drv, trip);
}

#define ALL (1ull << 40)

/* way_round() - send @len bytes, if there is credit, and wait for @time */
static void way_round(Play *p, uint64_t len, uint64_t time, uint64_t *sent,
                      uint64_t *got)
{
    static uint8_t data[65000];
    uint64_t end = MIN(*sent + len, play_conn(p).rx_limit);

    while (*sent < end) {
        size_t n = MIN(sizeof(data), play_conn(p).window / 4);

        n = (size_t)MIN(n, end - *sent);
        bytes_fill(data, n, 1, *sent);
        play_send(p, data, n);
        *sent += n;
        box_wait(p->r.loop, fd_drain(p->fd, 1, got) == FD_OPEN &&
                            *got == *sent);
    }
    box_run(p->r.loop, time);
    peer_drain(&p->r);
    peer_send(&p->r, VP_PKT_ACK, 0, 0, NULL, 0);
    ck_assert_uint_eq(engine_counts(p->r.drv).grown,
                      play_conn(p).window - VP_WINDOW_INIT);
}

/*
 * On a long way a window grows with each round trip that uses it up, as far as
 * the channel's memory lets it, and gives that back once less comes.
 */
START_TEST(credit_on_long_way)
{
    const uint32_t len = VP_STORE_LEN << _i, budget = VP_WINDOW_BUDGET(len);
    const uint64_t trip = 50 * MS;
    uint64_t sent = 0, got = 0;
    static Play p;
    uint32_t window;

    play_long_way(&p, trip, len);
    for (int round = 0; round < 20; round++) {
        window = play_conn(&p).window;
        way_round(&p, ALL, trip, &sent, &got);
        ck_assert_uint_ge(play_conn(&p).window, window);
    }
    ck_assert_uint_eq(window, budget / 2);
    for (int round = 0; round < 20; round++) {
        window = play_conn(&p).window;
        way_round(&p, window / 2, 10 * trip, &sent, &got);
        ck_assert_uint_le(play_conn(&p).window, window);
    }
    ck_assert_uint_eq(window, VP_WINDOW_MAX);
    play_free(&p);
}
END_TEST

/* A config that leaves less for windows: those there are stay within theirs. */
START_TEST(credit_config)
{
    const uint64_t trip = 50 * MS;
    uint64_t sent = 0, got = 0;
    static Play p;

    play_long_way(&p, trip, 4 * VP_STORE_LEN);
    while (play_conn(&p).window < VP_WINDOW_BUDGET(VP_STORE_LEN)) {
        way_round(&p, ALL, trip, &sent, &got);
    }
    vp_set_config(p.r.drv, &rig_config);
    for (int round = 0; round < 8; round++) {
        way_round(&p, ALL, trip, &sent, &got);
    }
    ck_assert_uint_le(play_conn(&p).window,
                      VP_WINDOW_BUDGET(VP_STORE_LEN) / 2);
    play_free(&p);
}
END_TEST

/* We keep to the peer's credit, which never falls. */
START_TEST(credit_kept)
{
    static Play p;
    static uint8_t data[30000];
    uint64_t got = 0, base;
    static const uint64_t limits[] = {
        100, 101, 50, 0, 5000, 5000, 4999, 12000, UINT64_MAX, 7,
    };
    uint64_t limit = 100;

    play_new(&p, _i % 2, 100);
    base = _i / 2 ? UINT32_MAX - 5000ull : 0;
    engine_shift_conn(p.r.drv, p.id, p.client, 0, base);
    bytes_fill(data, sizeof(data), 1, 0);
    fd_write(p.fd, data, sizeof(data));
    for (int i = 0; i < COUNT_OF(limits); i++) {
        bool all = limits[i] == UINT64_MAX;

        limit = MAX(limit, all ? UINT64_MAX - base : limits[i]);
        peer_credit(&p.r, p.mine, p.id, i % 3 ? VP_MSG_WINDOW
                                              : VP_MSG_CONNECT_ACK,
                    all ? UINT64_MAX : base + limits[i]);
        for (int k = 0; k < 20; k++) {
            box_run(p.r.loop, 10 * MS);
            while (peer_next(&p.r) != 0) {
                if (p.r.peer.pkt.type != VP_PKT_PING &&
                    p.r.peer.pkt.type != VP_PKT_ACK) {
                    bytes_check(p.r.peer.data, p.r.peer.pkt.bytes, 1, got);
                    got += p.r.peer.pkt.bytes;
                }
            }
            peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
        }
        ck_assert_uint_eq(got, MIN(limit, sizeof(data)));
    }
    play_free(&p);
}
END_TEST

/*
 * The local socket takes no more, but what it sent is still to be read: the
 * peer's data is dropped, its credit returned, and RESET comes at the end.
 */
START_TEST(credit_of_broken)
{
    static Play p;
    static uint8_t data[8000];
    uint64_t sent = 0;
    int type;

    play_new(&p, _i % 2, 0);
    fd_write(p.fd, "last words", 10);
    box_run(p.r.loop, MS);
    close(p.fd);
    p.fd = -1;
    for (int i = 0; i < 100; i++) {
        ck_assert_uint_ge(play_conn(&p).rx_limit, sent + sizeof(data));
        play_send(&p, data, sizeof(data));
        sent += sizeof(data);
        if (i > 10) {
            ck_assert_str_eq(play_conn(&p).out, "BROKEN");
            ck_assert_uint_eq(play_conn(&p).rx_taken, sent);
            ck_assert_uint_eq(play_conn(&p).buf_cap, 0);
        }
    }
    if (_i / 2) {
        play_msg(&p, VP_MSG_CLOSE, 0);
        ck_assert_str_eq(play_conn(&p).out, "BROKEN_END");
    }
    peer_drain(&p.r);
    peer_credit(&p.r, p.mine, p.id, VP_MSG_WINDOW, 1000);
    box_wait(p.r.loop, !engine_has_conn(p.r.drv, p.id, p.client));
    while ((type = peer_next(&p.r)) != 0 && type != VP_PKT_CONTROL) {
        /* what a broken TCP connection still gives varies */
    }
    ck_assert_int_eq(p.r.peer.data[0], VP_MSG_RESET);
    play_over(&p);
    rig_free(&p.r);
}
END_TEST

/* ---- a peer that breaks the rules ------------------------------------- */

#define INIT(service, len) \
    "\1\0\0\0\0\0\0\0\100" len service

static const struct {
    int flags;          /* 0: as the connection's other side */
    size_t len;
    const char *msg;
    const char *why;
} malformed[] = {
    { 0, 0, "", "unknown control message" },
    { 0, 1, "\0", "unknown control message" },
    { 0, 1, "\7", "unknown control message" },
    { 0, 2, "\177\0", "unknown control message" },
    { 0, 1, "\3", "malformed CONNECT_REFUSED" },
    { 0, 3, "\3\1\1", "malformed CONNECT_REFUSED" },
    { VP_FLAG_CLIENT, 2, "\3\1", "malformed CONNECT_REFUSED" },
    { 0, 1, "\2", "malformed CONNECT_ACK" },
    { 0, 8, "\2\0\0\0\0\0\0\1", "malformed CONNECT_ACK" },
    { 0, 10, "\2\0\0\0\0\0\0\1\1\1",
      "malformed CONNECT_ACK" },
    { 0, 1, "\4", "malformed WINDOW" },
    { 0, 8, "\4\0\0\0\0\0\0\1", "malformed WINDOW" },
    { 0, 10, "\4\0\0\0\0\0\0\1\1\1", "malformed WINDOW" },
    { 0, 2, "\5\0", "malformed CLOSE" },
    { 0, 1, "\6", "malformed RESET" },
    { 0, 3, "\6\0\0", "malformed RESET" },
    { VP_FLAG_CLIENT, 1, INIT("", ""), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 9, INIT("", ""), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 10, INIT("", "\0"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 10, INIT("", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("a", "\0"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("a", "\2"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 12, INIT("ab", "\377"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT(" ", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("\0", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("\n", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 13, INIT("a:b", "\3"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("\177", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 11, INIT("\200", "\1"), "malformed CONNECT_INIT" },
    { VP_FLAG_CLIENT, 43, INIT("123456789012345678901234567890123", "\41"),
      "malformed CONNECT_INIT" },
};

/* Each ends the session, whether it names a connection or none. */
START_TEST(malformed_control)
{
    static Play p;
    char line[200];
    int i = _i / 3, flags = malformed[i].flags;
    uint32_t id;

    play_new(&p, flags == 0, 1000);
    id = _i % 3 == 0 ? p.id : 77;
    if (_i % 3 == 2 && flags == 0 && malformed[i].msg[0] != 3) {
        flags = VP_FLAG_CLIENT; /* the other kind of id */
    }
    peer_send(&p.r, VP_PKT_CONTROL, flags, id, malformed[i].msg,
              malformed[i].len);
    snprintf(line, sizeof(line), "breaks the protocol (%s)",
             malformed[i].why);
    log_expect(line, 1);
    ck_assert_str_eq(engine_link(p.r.drv).state, "hello");
    fd_wait(p.r.loop, p.fd, ECONNRESET);
    ck_assert_uint_eq(engine_counts(p.r.drv).conns, 0);
    box_run(p.r.loop, 2 * SECOND);
    p.r.peer.hello.my_epoch = 0;
    peer_session(&p.r);
    play_free(&p);
}
END_TEST

/* An INIT must come from a client side. */
START_TEST(init_from_server)
{
    static Play p;

    play_new(&p, true, 1000);
    peer_send(&p.r, VP_PKT_CONTROL, 0, 8, INIT("a", "\1"), 11);
    log_expect("breaks the protocol (malformed CONNECT_INIT)", 1);
    play_free(&p);
}
END_TEST

/* The longest service id is one of 32 characters, of all that there are. */
START_TEST(service_ids)
{
    char id[VP_SERVICE_ID_LEN + 2];
    static Rig r;

    memset(id, 'x', sizeof(id));
    for (size_t len = 0; len < sizeof(id); len++) {
        ck_assert(vp_service_id_ok(id, len) ==
                  (len > 0 && len <= VP_SERVICE_ID_LEN));
    }
    for (int ch = 0; ch < 256; ch++) {
        id[3] = (char)ch;
        ck_assert(vp_service_id_ok(id, 5) ==
                  (ch > ' ' && ch < 127 && ch != ':'));
        ck_assert(vp_service_id_ok(id, 3));
    }
    rig_new(&r, &rig_config);
    peer_session(&r);
    peer_init(&r, 1, "!\"#$%&'()*+,-./;<=>?@[\\]^_`{|}~", 0);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    peer_init(&r, 1, "abcdefghijklmnopqrstuvwxyz012345", 0);
    peer_expect(&r, 1, VP_MSG_CONNECT_REFUSED);
    log_quiet("warn");
    rig_free(&r);
}
END_TEST

/* For ids that are not there, everything well-formed is late, no offence. */
START_TEST(late_packets)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (uint32_t id = VP_CONN_FIRST - 2; id != VP_CONN_FIRST + 3; id++) {
        for (int flags = 0; flags <= VP_FLAG_CLIENT; flags++) {
            peer_credit(&r, flags, id, VP_MSG_WINDOW, 1000);
            peer_credit(&r, flags, id, VP_MSG_CONNECT_ACK, 1000);
            peer_msg(&r, flags, id, VP_MSG_CLOSE, 0);
            peer_msg(&r, flags, id, VP_MSG_RESET, 0);
            peer_send(&r, flags ? VP_PKT_CLIENT : VP_PKT_SERVER, 0, id,
                      "late", 4);
            peer_send(&r, flags ? VP_PKT_CLIENT : VP_PKT_SERVER, 0, id,
                      NULL, 0);
        }
        peer_msg(&r, 0, id, VP_MSG_CONNECT_REFUSED, 1);
    }
    peer_quiet(&r);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    log_quiet("warn");
    rig_free(&r);
}
END_TEST

/* The same id is two connections, one in each direction. */
START_TEST(both_directions)
{
    static Rig r;
    int listener, target, client;
    char data[8];

    rig_new(&r, &rig_config);
    peer_session(&r);
    listener = rig_target(&r, "svc");
    client = rig_client(&r, "svc");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    peer_init(&r, VP_CONN_FIRST, "svc", 1000);
    target = rig_accept(&r, listener);
    peer_send(&r, VP_PKT_CLIENT, 0, VP_CONN_FIRST, "target", 6);
    peer_send(&r, VP_PKT_SERVER, 0, VP_CONN_FIRST, "client", 6);
    box_wait(r.loop, recv(target, data, sizeof(data), 0) == 6);
    ck_assert_mem_eq(data, "target", 6);
    box_wait(r.loop, recv(client, data, sizeof(data), 0) == 6);
    ck_assert_mem_eq(data, "client", 6);
    peer_msg(&r, VP_FLAG_CLIENT, VP_CONN_FIRST, VP_MSG_RESET, 0);
    ck_assert(!engine_has_conn(r.drv, VP_CONN_FIRST, false));
    ck_assert(engine_has_conn(r.drv, VP_CONN_FIRST, true));
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    close(client);
    close(target);
    close(listener);
    rig_free(&r);
}
END_TEST

static const char *const offence_names[] = {
    "CONNECT_INIT with an id in use", "CLOSE twice", "data after CLOSE",
    "data without data",
};

/* What one must not do to a connection that is there */
START_TEST(offences)
{
    static Play p;
    char line[100];

    play_new(&p, false, 1000);
    switch (_i) {
    case 0:
        peer_init(&p.r, p.id, "svc", 0);
        break;
    case 1:
        play_msg(&p, VP_MSG_CLOSE, 0);
        play_msg(&p, VP_MSG_CLOSE, 0);
        break;
    case 2:
        play_msg(&p, VP_MSG_CLOSE, 0);
        play_send(&p, "x", 1);
        break;
    case 3:
        play_send(&p, NULL, 0);
        break;
    }
    snprintf(line, sizeof(line), "breaks the protocol (%s)", offence_names[_i]);
    log_expect(line, 1);
    ck_assert_uint_eq(engine_counts(p.r.drv).conns, 0);
    play_free(&p);
}
END_TEST

/* The same before the target is there */
START_TEST(early_offences)
{
    static Rig r;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    peer_init(&r, 1, "busy", 0);
    peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_CLOSE, 0);
    log_quiet("warn");
    if (_i == 0) {
        peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_CLOSE, 0);
        log_expect("CLOSE twice", 1);
    } else {
        peer_send(&r, VP_PKT_CLIENT, 0, 1, "x", 1);
        log_expect("data after CLOSE", 1);
    }
    busy_no_more(&b);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* An id is free again as soon as its connection is over, in one breath. */
START_TEST(id_used_again)
{
    static Rig r;
    static uint8_t buf[4096];
    size_t len = 0;
    uint8_t init[14] = { VP_MSG_CONNECT_INIT }, reset[2] = { VP_MSG_RESET };

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    close(rig_target(&r, "gone"));
    init[9] = 4;
    memcpy(init + 10, "gone", 4);
    for (int i = 0; i < 20; i++) {
        len += peer_put(&r.peer, buf + len, VP_PKT_CONTROL, VP_FLAG_CLIENT, 1,
                         init, sizeof(init));
        len += peer_put(&r.peer, buf + len, VP_PKT_CONTROL, VP_FLAG_CLIENT, 1,
                         reset, sizeof(reset));
    }
    peer_write(&r, buf, len);
    log_expect("breaks the protocol", 0);
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    rig_free(&r);
}
END_TEST

/* ---- limits ----------------------------------------------------------- */

static VPConfig few_conns(void)
{
    VPConfig config = rig_config;

    config.max_conns = 3;
    return config;
}

/* The peer's opens beyond its limit are refused; far beyond is a breach. */
START_TEST(limit_of_peer)
{
    VPConfig config = few_conns();
    static Rig r;
    Busy b;

    rig_new(&r, &config);
    peer_session(&r);
    ck_assert_uint_eq(r.peer.heard.max_conns, 3);
    busy_target(&b, &r, "busy");
    for (uint32_t i = 0; i < 3; i++) {
        peer_init(&r, i, "busy", 0);
    }
    ck_assert_uint_eq(engine_counts(r.drv).open, 3);
    peer_init(&r, 3, "busy", 0);
    peer_expect(&r, 3, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_LIMIT);
    log_expect("connection refused: too many connections", 1);
    peer_msg(&r, VP_FLAG_CLIENT, 0, VP_MSG_RESET, 0);
    peer_init(&r, 4, "busy", 0);
    ck_assert_uint_eq(engine_counts(r.drv).open, 3);
    log_quiet("warn");
    /* refusals can't be sent: they don't pile up either */
    box.write_fd = engine_link(r.drv).wfd;
    for (uint32_t i = 10; i < 30 && engine_up(r.drv); i++) {
        peer_init(&r, i, "busy", 0);
        ck_assert_uint_le(engine_counts(r.drv).conns, 2 * 3 + 1);
    }
    box.write_fd = 0;
    busy_no_more(&b);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/*
 * Both CLOSEs have passed, so to the peer the connection is over; here it
 * waits for a target that doesn't read.  The peer may open another one, with
 * the same id, too, once its ids have wrapped around.
 */
START_TEST(open_while_draining)
{
    VPConfig config = few_conns();
    static uint8_t data[VP_WINDOW_INIT];
    static Rig r;
    int listener, target, small = 4096;
    uint64_t sent = 0;
    EngineConn c;

    config.max_conns = 1;
    rig_new(&r, &config);
    r.tcp = true;
    peer_session(&r);
    listener = rig_target(&r, "svc");
    peer_init(&r, 1, "svc", 1000);
    target = rig_accept(&r, listener);
    box_wait(r.loop, rig_conn_in(&r, 1, false, "OPEN"));
    c = rig_conn(&r, 1, false);
    setsockopt(target, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    setsockopt(c.fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
    for (int i = 0; i < 100; i++) {
        size_t len;

        c = rig_conn(&r, 1, false);
        if (sent >= c.rx_limit) {
            break;
        }
        len = (size_t)MIN(c.rx_limit - sent, sizeof(data));

        peer_send(&r, VP_PKT_CLIENT, 0, 1, data, len);
        sent += len;
        box_run(r.loop, MS);
    }
    peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_CLOSE, 0);
    shutdown(target, SHUT_WR);
    box_wait(r.loop, rig_conn_in(&r, 1, false, "CLOSED"));
    c = rig_conn(&r, 1, false);
    ck_assert_str_eq(c.out, "DRAIN");
    peer_drain(&r);
    peer_init(&r, 2 - (uint32_t)_i, "svc", 1000);
    box_run(r.loop, 50 * MS);
    log_expect("breaks the protocol", 0);
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    ck_assert_ptr_ne(engine_conn(r.drv, 2 - (uint32_t)_i, false).which,
                     c.which);
    /* what waits goes to the target it was for */
    while (sent > 0) {
        ssize_t n;

        box_run(r.loop, MS);
        n = recv(target, data, sizeof(data), 0);
        ck_assert(n > 0 || errno == EAGAIN);
        sent -= n > 0 ? (uint64_t)n : 0;
    }
    box_wait(r.loop, recv(target, data, sizeof(data), 0) == 0);
    close(target);
    close(listener);
    rig_free(&r);
}
END_TEST

/*
 * A client has come whose CONNECT_INIT is still to be sent: what the peer says
 * of its id is a guess, and changes nothing.
 */
START_TEST(id_guessed)
{
    static const uint8_t data[] = "guessed";
    const uint32_t id = VP_CONN_FIRST;
    static Rig r;
    int client;

    rig_new(&r, &rig_config);
    peer_session(&r);
    engine_hold(r.drv); /* nothing may be sent for the moment */
    client = rig_client(&r, "svc");
    box_settle(r.loop);
    ck_assert(!rig_conn(&r, id, true).announced);
    switch (_i) {
    case 0:
        peer_credit(&r, 0, id, VP_MSG_WINDOW, UINT64_MAX);
        break;
    case 1:
        peer_credit(&r, 0, id, VP_MSG_CONNECT_ACK, UINT64_MAX);
        break;
    case 2:
        peer_msg(&r, 0, id, VP_MSG_CLOSE, 0);
        break;
    case 3:
        peer_msg(&r, 0, id, VP_MSG_RESET, 0);
        break;
    case 4:
        peer_msg(&r, 0, id, VP_MSG_CONNECT_REFUSED, VP_REASON_REFUSED);
        break;
    default:
        peer_send(&r, VP_PKT_SERVER, 0, id, data, sizeof(data));
        break;
    }
    ck_assert_int_eq(fd_state(client), FD_OPEN);
    ck_assert_uint_eq(rig_conn(&r, id, true).tx_limit, r.peer.hello.window);
    ck_assert_uint_eq(rig_conn(&r, id, true).rx_count, 0);
    ck_assert_str_eq(rig_conn(&r, id, true).out, "OPEN");
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    engine_reset_flow(r.drv);
    box_settle(r.loop);
    peer_expect(&r, id, VP_MSG_CONNECT_INIT);
    close(client);
    rig_free(&r);
}
END_TEST

/* Clients here: as many as we may have, and as the peer allows */
START_TEST(limit_of_clients)
{
    VPConfig config = few_conns();
    static Rig r;
    int client[6];

    rig_new(&r, &config);
    r.tcp = true;
    r.peer.hello.max_conns = _i == 0 ? 100 : 2;
    peer_session(&r);
    for (int i = 0; i < 6; i++) {
        client[i] = rig_client(&r, "svc");
        box_settle(r.loop);
    }
    ck_assert_uint_eq(engine_counts(r.drv).announced, _i == 0 ? 3 : 2);
    log_expect("svc: connection refused: too many connections",
               _i == 0 ? 3 : 4);
    for (int i = _i == 0 ? 3 : 2; i < 6; i++) {
        fd_wait(r.loop, client[i], ECONNRESET);
        close(client[i]);
    }
    peer_drain(&r);
    peer_msg(&r, 0, VP_CONN_FIRST, VP_MSG_RESET, 0);
    client[5] = rig_client(&r, "svc");
    box_settle(r.loop);
    ck_assert_int_eq(fd_state(client[5]), FD_OPEN);
    log_quiet("warn");
    rig_free(&r);
}
END_TEST

/* Opens per second, and connections to targets that don't answer */
START_TEST(limit_of_opens)
{
    VPConfig config = rig_config;
    static Rig r;
    int n = 0;
    Busy b;

    if (_i == 0) {
        config.max_opens = 10;
    } else {
        config.max_half_open = 10;
    }
    rig_new(&r, &config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    for (uint32_t i = 0; i < 30; i++) {
        peer_init(&r, i, "busy", 0);
    }
    while (peer_next(&r) != 0) {
        if (r.peer.pkt.type == VP_PKT_CONTROL) {
            ck_assert_int_eq(r.peer.data[0], VP_MSG_CONNECT_REFUSED);
            ck_assert_int_eq(r.peer.data[1], VP_REASON_LIMIT);
            n++;
        }
    }
    ck_assert_int_eq(n, 20);
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    box_run(r.loop, 500 * MS);
    for (uint32_t i = 100; i < 110; i++) {
        peer_init(&r, i, "busy", 0);
    }
    ck_assert_uint_eq(engine_counts(r.drv).connecting, _i == 0 ? 15 : 10);
    busy_no_more(&b);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* Of two services one has a dead target: it doesn't take what both may have. */
START_TEST(half_open_shared)
{
    VPConfig config = rig_config;
    int listener, fd;
    static Rig r;
    Busy b;

    config.max_half_open = 10;
    rig_new(&r, &config);
    peer_session(&r);
    busy_target(&b, &r, "busy");
    listener = rig_target(&r, "svc");
    for (uint32_t i = 0; i < 30; i++) {
        peer_init(&r, i, "busy", 0);
    }
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 8);
    peer_init(&r, 100, "svc", 0);
    fd = accept(listener, NULL, NULL);
    ck_assert_int_ge(fd, 0);
    busy_no_more(&b);
    close(fd);
    close(listener);
    close(b.listener);
    rig_free(&r);
}
END_TEST

/* Open and reset in a loop, while nothing can be sent: all is bounded. */
START_TEST(open_and_reset)
{
    static Rig r;
    size_t most;
    int listener;

    rig_new(&r, &rig_config);
    peer_session(&r);
    listener = rig_target(&r, "svc");
    box.write_fd = engine_link(r.drv).wfd;
    most = box.allocated + 300 * (sizeof(VPConn) + 64) + (5 << 20);
    for (uint32_t i = 0; i < 3000 && engine_up(r.drv); i++) {
        peer_init(&r, i, i % 2 ? "svc" : "none", 0);
        peer_msg(&r, VP_FLAG_CLIENT, i, VP_MSG_RESET, 0);
        close(accept(listener, NULL, NULL));
        ck_assert_uint_le(box.allocated, most);
        ck_assert_uint_le(engine_counts(r.drv).conns, 2 * rig_config.max_conns);
    }
    ck_assert_str_eq(engine_link(r.drv).state, "up");
    box.write_fd = 0;
    close(listener);
    rig_free(&r);
}
END_TEST

/* ---- any peer at all -------------------------------------------------- */

/*
 * Random packets for a few ids, legal or not.  No state machine goes wrong,
 * the counts are right, and after all that a new session works.
 */
START_TEST(random_peer)
{
    static uint8_t data[20000];
    static Rig r;
    int listener, fd[8], n = 0;

    for (int i = 0; i < _i; i++) {
        rnd(2);
    }
    rig_new(&r, &rig_config);
    r.tcp = _i % 2;
    peer_session(&r);
    listener = rig_target(&r, "svc");
    for (int step = 0; step < 1500; step++) {
        uint32_t id = rnd(4) + (rnd(2) ? 0 : VP_CONN_FIRST);
        int flags = rnd(2) ? VP_FLAG_CLIENT : 0;
        size_t len = rnd(4) ? rnd(50) : rnd(sizeof(data));
        int s;

        if (!engine_up(r.drv)) {
            box_run(r.loop, 2 * SECOND);
            r.peer.hello.my_epoch = 0;
            peer_session(&r);
        }
        switch (rnd(12)) {
        case 0:
        case 1:
        case 2:
            peer_init(&r, id, rnd(4) ? "svc" : "none", rnd(100000));
            break;
        case 3:
        case 4:
        case 5:
            peer_send(&r, flags ? VP_PKT_CLIENT : VP_PKT_SERVER, 0, id, data,
                      len);
            break;
        case 6:
            peer_credit(&r, flags, id, rnd(2) ? VP_MSG_WINDOW
                                              : VP_MSG_CONNECT_ACK,
                        rnd(200000));
            break;
        case 7:
            peer_msg(&r, flags, id, VP_MSG_CLOSE, 0);
            break;
        case 8:
            peer_msg(&r, flags, id, VP_MSG_RESET + (rnd(9) == 0), 0);
            break;
        case 9:
            if (n < 8) {
                fd[n++] = rig_client(&r, "x");
            }
            break;
        case 10:
            s = accept(listener, NULL, NULL);
            if (s >= 0 && n < 8) {
                fd_nonblock(s);
                fd[n++] = s;
            } else if (s >= 0) {
                close(s);
            }
            break;
        case 11:
            if (n > 0) {
                int k = (int)rnd((uint32_t)n);

                switch (rnd(4)) {
                case 0:
                    shutdown(fd[k], SHUT_WR);
                    break;
                case 1:
                    close(fd[k]);
                    fd[k] = fd[--n];
                    break;
                case 2:
                    send(fd[k], data, len, MSG_NOSIGNAL);
                    break;
                case 3:
                    recv(fd[k], data, sizeof(data), 0);
                    break;
                }
            }
            break;
        }
        box_settle(r.loop);
        if (engine_up(r.drv)) {
            peer_drain(&r);
            peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        }
        ck_assert_uint_le(engine_counts(r.drv).grown, BUDGET);
    }
    log_quiet("error");
    while (n > 0) {
        close(fd[--n]);
    }
    engine_forget(r.drv);
    vp_reset_all(r.drv);
    box_settle(r.loop);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 0);
    ck_assert_uint_eq(engine_counts(r.drv).announced, 0);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 0);
    ck_assert_uint_eq(engine_counts(r.drv).turns, 0);
    ck_assert_uint_eq(engine_counts(r.drv).grown, 0);
    close(listener);
    rig_free(&r);
}
END_TEST

/* Memory runs out at any moment: somebody is reset, nothing worse. */
START_TEST(memory_runs_out)
{
    static uint8_t data[12000];

    for (int left = 0; left < 25; left++) {
        static Rig r;
        int listener, client, target;

        rig_new(&r, &rig_config);
        r.tcp = true;
        peer_session(&r);
        listener = rig_target(&r, "svc");
        box_fail(CALL_ALLOC, ENOMEM, (unsigned)left, BOX_ALL);
        client = rig_client(&r, "svc");
        send(client, data, 1000, MSG_NOSIGNAL);
        box_settle(r.loop);
        if (r.peer.fd >= 0 && engine_link(r.drv).rfd >= 0) {
            peer_drain(&r);
            peer_init(&r, 1, "svc", 100000);
            peer_send(&r, VP_PKT_CLIENT, 0, 1, data, sizeof(data));
        }
        target = accept(listener, NULL, NULL);
        box_run(r.loop, 3 * SECOND);
        box.calls = 0;
        if (engine_link(r.drv).rfd < 0) {
            rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
        }
        r.peer.len = 0;
        box_run(r.loop, 3 * SECOND);
        while (recv(r.peer.fd, r.peer.in, sizeof(r.peer.in), 0) > 0) {
        }
        r.peer.hello.my_epoch = 0;
        peer_session(&r);
        peer_init(&r, 9, "none", 0);
        do {
            ck_assert_int_ne(peer_next(&r), 0);
        } while (r.peer.pkt.conn != 9);
        log_quiet("error");
        close(client);
        close(target);
        close(listener);
        rig_free(&r);
    }
}
END_TEST

/* ---- whose turn it is ------------------------------------------------- */

/*
 * Those who fill the channel get equal shares in the long run, though a turn
 * may take all that a socket holds; who was quiet goes first.
 */
START_TEST(fair_shares)
{
    enum { BULK = 4, ROUNDS = 1600 };
    static uint8_t data[200000];
    static Rig r;
    uint64_t got[BULK + 1] = { 0 };
    int client[BULK + 1], ahead = 0;
    bool pressed = false;

    rig_new(&r, &rig_config);
    r.peer.hello.window = UINT32_MAX;
    peer_session(&r);
    for (int i = 0; i <= BULK; i++) {
        client[i] = rig_client(&r, "bulk");
        peer_expect(&r, VP_CONN_FIRST + (uint32_t)i, VP_MSG_CONNECT_INIT);
    }
    box.write_fd = engine_link(r.drv).wfd; /* the channel is what is full */
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < BULK; i++) {
            send(client[i], data, sizeof(data), MSG_NOSIGNAL);
        }
        if (round % 20 == 10) {
            ck_assert(!pressed);
            fd_write(client[BULK], "k", 1);
            pressed = true;
            ahead = 0;
        }
        box.write_left = 200000;
        box_run(r.loop, MS);
        while (peer_next(&r) != 0) {
            uint32_t i = r.peer.pkt.conn - VP_CONN_FIRST;

            if (r.peer.pkt.type != VP_PKT_CLIENT) {
                continue;
            }
            got[i] += r.peer.pkt.bytes;
            if (i == BULK) {
                pressed = false;
            } else if (pressed && ++ahead > 0) {
                /* what was in the store already, and one turn */
                ck_assert_int_le(ahead, 40);
            }
        }
        r.peer.delay = (uint32_t)box.now - r.peer.pkt.time;
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    box.write_fd = 0;
    ck_assert_uint_eq(got[BULK], ROUNDS / 20);
    for (int i = 1; i < BULK; i++) {
        uint64_t apart = MAX(got[i], got[0]) - MIN(got[i], got[0]);

        ck_assert_uint_gt(got[i], 100000);
        /* a quantum, and what the last read of a turn goes beyond it */
        ck_assert_uint_le(apart, 8 * 65536 + got[0] / 8);
    }
    for (int i = 0; i <= BULK; i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* ---- listeners -------------------------------------------------------- */

/* knock() - a client at @addr; connect() is done by the system */
static int knock(const VPAddr *addr)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    ck_assert_int_eq(connect(fd, (const struct sockaddr *)&addr->ss,
                             addr->len), 0);
    fd_nonblock(fd);
    return fd;
}

START_TEST(listener)
{
    static Rig r;
    VPAddr addr;
    int fd, client[2];

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    fd = rig_listen(&r, "svc", &addr);
    client[0] = knock(&addr);
    box_wait(r.loop, engine_counts(r.drv).conns == 1);
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    vp_del_oforward(r.drv, 9999);
    ck_assert(engine_counts(r.drv).listens);
    vp_del_oforward(r.drv, fd);
    ck_assert(!engine_counts(r.drv).listens);
    client[1] = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(client[1], (struct sockaddr *)&addr.ss,
                             addr.len), -1);
    fd_write(client[0], "x", 1); /* this one goes on */
    box_wait(r.loop, peer_next(&r) == VP_PKT_CLIENT);
    close(client[0]);
    close(client[1]);
    rig_free(&r);
}
END_TEST

/*
 * Clients that don't say which service they want share a timer: each of them is
 * hung up on when its own time is over.
 */
START_TEST(callers_time)
{
    static Rig r;
    VPAddr addr;
    int client[3];

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    rig_listen(&r, VP_ANY_SERVICE, &addr);
    for (int i = 0; i < COUNT_OF(client); i++) {
        client[i] = knock(&addr);
        box_wait(r.loop, r.drv->forwards.ncallers == (size_t)i + 1);
        box_run(r.loop, 3 * SECOND);
    }
    for (int i = 0; i < COUNT_OF(client); i++) {
        /* the first one came 9 seconds ago */
        box_run(r.loop, VP_CALL_US - 9 * SECOND - SECOND / 2);
        ck_assert_uint_eq(r.drv->forwards.ncallers, 3u - (unsigned)i);
        box_run(r.loop, SECOND);
        ck_assert_uint_eq(r.drv->forwards.ncallers, 2u - (unsigned)i);
        box_run(r.loop, 3 * SECOND - SECOND - (VP_CALL_US - 9 * SECOND -
                                               SECOND / 2));
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* Who is on another machine and vanished without a word is noticed. */
START_TEST(tcp_peer_alive)
{
    VPAddr far = { .len = sizeof(struct sockaddr_in) };
    struct sockaddr_in *sin = (void *)&far.ss;
    int fd = socket(AF_INET, SOCK_STREAM, 0), alive = 0, idle = 0;
    socklen_t len = sizeof(int);

    sin->sin_family = AF_INET;
    sin->sin_addr.s_addr = htonl(0xc0000201); /* 192.0.2.1 */
    tcp_setup(fd, &far);
    ck_assert_int_eq(getsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &alive, &len),
                     0);
    ck_assert_int_eq(getsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, &len),
                     0);
    ck_assert(alive && idle == VP_KEEPALIVE_IDLE);
    close(fd);
}
END_TEST

/* has_reno() - may a socket choose it? not where qemu-user runs it */
static bool has_reno(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    bool has = setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4) == 0;

    close(fd);
    return has;
}

/* Whatever the system's choice is, nothing within the machine is paced. */
START_TEST(not_paced)
{
    static Rig r;
    VPAddr addr;
    int client, target;

    if (!has_reno()) {
        PASS_OVER("TCP_CONGESTION");
    }
    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    rig_listen(&r, "svc", &addr);
    client = knock(&addr);
    box_wait(r.loop, engine_counts(r.drv).conns == 1);
    target = rig_target(&r, "target");
    peer_init(&r, 1, "target", 1000);
    close(rig_accept(&r, target));
    for (int i = 0; i < 2; i++) {
        EngineConn c = rig_conn(&r, i == 0 ? VP_CONN_FIRST : 1, i == 0);
        char text[16] = "";
        socklen_t len = sizeof(text);

        ck_assert_int_eq(getsockopt(c.fd, IPPROTO_TCP, TCP_CONGESTION, text,
                                    &len), 0);
        ck_assert_str_eq(text, "reno");
    }
    close(client);
    close(target);
    rig_free(&r);
}
END_TEST

/* What the accepted socket needs it has from the listening one. */
START_TEST(accepted_ones_inherit)
{
#ifndef __linux__
    PASS_OVER("Linux");
#endif
    static const int wanted[][2] = {
        { SOL_SOCKET, SO_LINGER }, { SOL_SOCKET, SO_OOBINLINE },
        { IPPROTO_TCP, TCP_NODELAY },
    };
    static Rig r;
    VPAddr addr;
    unsigned long calls;
    EngineConn c;
    int client;

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    rig_listen(&r, "svc", &addr);
    calls = box.setsockopts;
    client = knock(&addr);
    box_wait(r.loop, engine_counts(r.drv).conns == 1);
    ck_assert_uint_eq(box.setsockopts, calls);
    c = rig_conn(&r, VP_CONN_FIRST, true);
    for (int i = 0; i < COUNT_OF(wanted); i++) {
        int value[2] = { 0 };
        socklen_t len = sizeof(value);

        ck_assert_int_eq(getsockopt(c.fd, wanted[i][0], wanted[i][1], value,
                                    &len), 0);
        ck_assert_int_eq(value[0], 1);
    }
    close(client);
    rig_free(&r);
}
END_TEST

/* No descriptor is left: one line, no spinning, and then it goes on. */
START_TEST(accept_starved)
{
    struct rlimit was, lim;
    static Rig r;
    VPAddr addr;
    unsigned long passes;
    int client[3];
    char line[80];

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    rig_listen(&r, "svc", &addr);
    for (int i = 0; i < 3; i++) {
        client[i] = knock(&addr);
    }
    getrlimit(RLIMIT_NOFILE, &was);
    lim = was;
    lim.rlim_cur = (rlim_t)client[2] + 1;
    setrlimit(RLIMIT_NOFILE, &lim);
    passes = box.passes;
    box_run(r.loop, 20 * SECOND);
    ck_assert_uint_lt(box.passes - passes, 20 * 5 * 4);
    snprintf(line, sizeof(line), "svc: cannot accept: %s", strerror(EMFILE));
    log_expect(line, 1);
    setrlimit(RLIMIT_NOFILE, &was);
    box_run(r.loop, SECOND);
    ck_assert_uint_eq(engine_counts(r.drv).conns, 3);
    /* again and again, a client at a time: that is no news */
    for (int i = 0; i < 30; i++) {
        close(client[i % 3]);
        client[i % 3] = knock(&addr);
        setrlimit(RLIMIT_NOFILE, &lim);
        box_run(r.loop, SECOND);
        setrlimit(RLIMIT_NOFILE, &was);
        box_run(r.loop, SECOND);
    }
    log_expect(line, 0);
    for (int i = 0; i < 3; i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* ---- what there is to know -------------------------------------------- */

static void note_conn(const VPConnInfo *info, void *opaque)
{
    *(VPConnInfo *)opaque = *info;
}

static void note_id(const VPConnInfo *info, void *opaque)
{
    uint32_t **at = opaque;

    *(*at)++ = info->id - VP_CONN_FIRST;
}

/* In portions, while some of those shown go and others come. */
START_TEST(portions)
{
    static Rig r;
    uint32_t seen[6], *at = seen;
    uint64_t after;
    int client[6];

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 5; i++) {
        client[i] = rig_client(&r, "c");
    }
    after = vp_conns(r.drv, 0, 2, note_id, &at);
    ck_assert_uint_ne(after, 0);
    vp_conn_reset(r.drv, VP_CONN_FIRST + 1, true);
    vp_conn_reset(r.drv, VP_CONN_FIRST + 2, true);
    box_settle(r.loop);
    after = vp_conns(r.drv, after, 1, note_id, &at);
    ck_assert_uint_ne(after, 0);
    client[5] = rig_client(&r, "c");
    ck_assert_uint_eq(vp_conns(r.drv, after, 9, note_id, &at), 0);
    ck_assert_int_eq(at - seen, 5);
    for (uint32_t i = 0; i < 5; i++) {
        ck_assert_uint_eq(seen[i], i < 2 ? i : i + 1);
    }
    for (int i = 0; i < 6; i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* account_of() - what there is to know of an account */
static VPAccountInfo account_of(const VPAccount *account)
{
    VPAccountInfo info;

    vp_account_info(account, &info);
    return info;
}

/* A forward has as many connections at once as its account allows. */
START_TEST(limit_of_account)
{
    const VPLimits limits = { .max_conns = 2 };
    VPAccount *account;
    static Rig r;
    int target;

    rig_new(&r, &rig_config);
    peer_session(&r);
    account = vp_account_new(r.drv, &limits);
    target = rig_target(&r, "svc");
    vp_iforward_account(r.drv, "svc", account);
    close(rig_target(&r, "other"));
    for (uint32_t id = 1; id <= 50; id++) {
        peer_init(&r, id, "svc", 0);
    }
    ck_assert_uint_eq(account_of(account).conns, 2);
    log_expect("svc: connection refused: there are as many connections as "
               "max= allows", 48);
    for (uint32_t id = 1; id <= 50; id++) {
        peer_expect(&r, id, id <= 2 ? VP_MSG_CONNECT_ACK
                                    : VP_MSG_CONNECT_REFUSED);
        ck_assert(id <= 2 || r.peer.data[1] == VP_REASON_LIMIT);
    }
    peer_init(&r, 60, "other", 0); /* whose target is gone */
    peer_expect(&r, 60, VP_MSG_CONNECT_REFUSED);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_REFUSED);
    peer_msg(&r, VP_FLAG_CLIENT, 1, VP_MSG_RESET, 0);
    peer_init(&r, 61, "svc", 0);
    peer_expect(&r, 61, VP_MSG_CONNECT_ACK);
    peer_init(&r, 62, "svc", 0);
    peer_expect(&r, 62, VP_MSG_CONNECT_REFUSED);
    ck_assert_uint_eq(account_of(account).counts.opened[0], 52);
    ck_assert_uint_eq(account_of(account).counts.refused[VP_REFUSED_LIMIT],
                      49);
    ck_assert_uint_eq(account_of(account).counts.reset[VP_RESET_PEER], 1);
    vp_del_iforward(r.drv, "svc"); /* the connections go on */
    vp_account_free(account);
    peer_send(&r, VP_PKT_CLIENT, 0, 61, "abc", 3);
    ck_assert_uint_eq(rig_conn(&r, 61, false).rx_taken, 3);
    close(target);
    rig_free(&r);
}
END_TEST

/* The same for clients here, of all listeners of a forward together, and for
 * those that have not said yet what they want. */
START_TEST(limit_of_listeners)
{
    const char *service = _i == 0 ? "svc" : VP_ANY_SERVICE;
    const VPLimits limits = { .max_conns = 3 };
    VPAccount *account;
    int client[6], fd[2];
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    account = vp_account_new(r.drv, &limits);
    for (int i = 0; i < 6; i += 3) {
        VPAddr addr;

        fd[i / 3] = rig_listen(&r, service, &addr);
        vp_oforward_account(r.drv, fd[i / 3], account);
        for (int k = i; k < i + 3; k++) {
            client[k] = socket(AF_UNIX, SOCK_STREAM, 0);
            ck_assert_int_eq(connect(client[k], (struct sockaddr *)&addr.ss,
                                     addr.len), 0);
            fd_nonblock(client[k]);
            box_settle(r.loop);
        }
    }
    for (int i = 0; i < 6; i++) {
        fd_wait(r.loop, client[i], i < 3 ? FD_OPEN : FD_EOF);
    }
    ck_assert_uint_eq(account_of(account).conns, 3);
    ck_assert_uint_eq(account_of(account).counts.refused[VP_REFUSED_LIMIT], 3);
    log_expect("connection refused: there are as many connections as max= "
               "allows", 3);
    if (_i == 1) {
        fd_write(client[0], "CONNECT a\nabc", 13);
        box_settle(r.loop);
        ck_assert_uint_eq(account_of(account).conns, 3);
    }
    for (int i = 0; i < 6; i++) {
        close(client[i]);
    }
    box_run(r.loop, 2 * VP_SWEEP_US);
    peer_drain(&r);
    if (_i == 1) {
        peer_msg(&r, 0, VP_CONN_FIRST, VP_MSG_CLOSE, 0);
        box_run(r.loop, 2 * VP_SWEEP_US);
        ck_assert_uint_eq(account_of(account).counts.opened[1], 1);
        ck_assert_uint_eq(account_of(account).conns, 0);
    }
    vp_del_oforward(r.drv, fd[0]);
    vp_del_oforward(r.drv, fd[1]);
    vp_account_free(account);
    rig_free(&r);
}
END_TEST

/* passes() - calls of select() in so many seconds in which nothing happens */
static unsigned long passes(Rig *r, uint64_t seconds)
{
    unsigned long before = box.passes;

    box_run(r->loop, seconds * SECOND);
    return box.passes - before;
}

/* ---- in pieces ---------------------------------------------------------- */

/*
 * Thousands of connections may end, or have to be looked at, at once: the other
 * channels have their turn between them.
 */
#define CROWD 200
#define CROWD_QUEUE 101         /* a listener's, with room for 100 */
#define CALLS_IN_ROW 80

typedef struct Crowd {
    Rig r;
    VPDriver *other;        /* another channel of the loop */
    VPAccount *account;     /* lets connections be idle for 600 s */
    int listener;
    int fd[CROWD];          /* ends of the targets */
} Crowd;

static void crowd_open(Crowd *c, bool accepts)
{
    static const VPConfig config = {
        .grace = 30, .max_conns = CROWD, .max_half_open = CROWD,
        .max_opens = 1000000,
    };
    const VPLimits limits = { .idle = 600 };

    rig_new(&c->r, &config);
    c->other = vp_new(c->r.loop, 8, &config, rig_lost, &c->r);
    c->listener = rig_target(&c->r, "svc");
    c->account = vp_account_new(c->r.drv, &limits);
    vp_iforward_account(c->r.drv, "svc", c->account);
    peer_session(&c->r);
    for (uint32_t i = 0; i < CROWD; i++) {
        peer_init(&c->r, i, "svc", 1 << 20);
        c->fd[i] = accepts ? rig_accept(&c->r, c->listener) : -1;
    }
}

static void crowd_close(Crowd *c)
{
    for (int i = 0; i < CROWD; i++) {
        close(c->fd[i]);
    }
    close(c->listener);
    vp_del_iforward(c->r.drv, "svc");
    vp_account_free(c->account);
    vp_free(c->other);
    rig_free(&c->r);
}

/* crowd_send() - a packet about each of them, all of which come at once */
static void crowd_send(Crowd *c, int type, const void *data, size_t len)
{
    static uint8_t buf[CROWD * (VP_PKT_HDR_LEN + 16)];
    size_t n = 0;

    for (uint32_t i = 0; i < CROWD; i++) {
        n += peer_put(&c->r.peer, buf + n, type, VP_FLAG_CLIENT, i, data, len);
    }
    peer_write(&c->r, buf, n);
}

static void crowd_breach(Crowd *c)
{
    peer_send(&c->r, 99, 0, 0, "x", 1);
}

static void crowd_resets(Crowd *c)
{
    static const uint8_t msg[] = { VP_MSG_RESET, VP_REASON_NONE };

    crowd_send(c, VP_PKT_CONTROL, msg, sizeof(msg));
}

/* Nothing waits for them, so all are over */
static void crowd_ending(Crowd *c)
{
    static const uint8_t msg[] = { VP_MSG_RESET, VP_REASON_ENDING };

    crowd_send(c, VP_PKT_CONTROL, msg, sizeof(msg));
}

/* Some bytes wait, and their time is over at once */
static void crowd_endings(Crowd *c)
{
    crowd_send(c, VP_PKT_CLIENT, "unread", 6);
    crowd_ending(c);
    box_run(c->r.loop, 2 * VP_END_US);
}

static void crowd_idle(Crowd *c)
{
    box_run(c->r.loop, 700 * SECOND);
}

/* Targets that have said all: their owners may go without a word */
static void crowd_swept(Crowd *c)
{
    for (int i = 0; i < CROWD; i++) {
        shutdown(c->fd[i], SHUT_WR);
    }
    box_run(c->r.loop, 5 * VP_SWEEP_US);
    ck_assert_uint_ge(box.polls, CROWD);
}

/* Nobody is left at the other side, and the targets talk and don't read */
static void crowd_drop(Crowd *c)
{
    static const uint8_t msg[] = { VP_MSG_RESET, VP_REASON_GONE };
    static uint8_t data[VP_WINDOW_INIT];

    for (uint32_t i = 0; i < CROWD; i++) {
        peer_send(&c->r, VP_PKT_CLIENT, 0, i, data, sizeof(data));
        peer_drain(&c->r);
        peer_send(&c->r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    crowd_send(c, VP_PKT_CONTROL, msg, sizeof(msg));
    ck_assert_uint_eq(engine_counts(c->r.drv).conns, CROWD);
    for (int i = 0; i < CROWD; i++) {
        fd_write(c->fd[i], data, 1000);
    }
    box_settle(c->r.loop);
    for (int i = 0; i < CROWD; i++) {
        int left = 0;

        ck_assert_int_eq(ioctl(c->fd[i], TIOCOUTQ, &left), 0);
        ck_assert_int_eq(left, 0);
    }
}

/* The queue of their target is full for as long as may be */
static void crowd_timeouts(Crowd *c)
{
    box_run(c->r.loop, 2 * VP_CONNECT_TIMEOUT);
}

static const struct {
    void (*run)(Crowd *c);
    size_t left;            /* connections that are there then */
    bool small;             /* the targets' sockets take little */
    bool waits;             /* the targets don't accept */
} crowds[] = {
    { crowd_breach, 0, false, false },
    { crowd_resets, 0, false, false },
    { crowd_ending, 0, false, false },
    { crowd_endings, 0, false, false },
    { crowd_idle, 0, false, false },
    { crowd_swept, CROWD, false, false },
    { crowd_drop, CROWD, true, false },
    { crowd_timeouts, CROWD_QUEUE, false, true },
    { crowd_breach, 0, false, true },
    { crowd_resets, 0, false, true },
};

START_TEST(in_pieces)
{
    static Crowd c;
    int tries = 0;

    box.small = crowds[_i].small;
    crowd_open(&c, !crowds[_i].waits);
    box.calls_row_max = 0;
    crowds[_i].run(&c);
    while (engine_counts(c.r.drv).conns > crowds[_i].left) {
        box_pause(&tries); /* the peer is still to be told */
        peer_drain(&c.r);
        peer_send(&c.r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    ck_assert_uint_le(box.calls_row_max, CALLS_IN_ROW);
    ck_assert_uint_eq(engine_counts(c.r.drv).conns, crowds[_i].left);
    crowd_close(&c);
}
END_TEST

/*
 * new_session() - have the peer begin one, up to its last HELLO, which goes to
 * @buf: with what is put behind it it is to come in one piece
 *
 * Returns the length of that HELLO.
 */
static size_t new_session(Rig *r, uint8_t *buf)
{
    const uint64_t token = 0x0ddba11;
    Peer *p = &r->peer;
    int tries = 0;
    size_t len;

    p->hello.my_epoch = p->hello.peer_epoch = p->hello.digest = 0;
    p->hello.expect = p->hello.base = p->hello.next = VP_SEQ_FIRST;
    peer_say(r, token, 0);
    while (p->heard.echo != token) {
        if (peer_next(r) == 0) {
            box_pause(&tries);
            box_run(r->loop, 10 * MS);
        }
    }
    len = peer_put_hello(p, buf, token, VP_HELLO_UP | VP_HELLO_CONNECTOR);
    peer_keys(p);
    peer_begin(p);
    return len;
}

static char told[1 << 16];

static bool tell(const VPEvent *e)
{
    size_t at = strlen(told);

    if (e->type == VP_EVENT_OPENED || e->type == VP_EVENT_ENDED) {
        snprintf(told + at, sizeof(told) - at, "%s %u %s/%s\n",
                 e->type == VP_EVENT_OPENED ? "opened" : "ended", e->conn->id,
                 e->conn->in, e->conn->out);
    }
    return true;
}

/*
 * What is left of a session isn't in the way of the next one: the peer may open
 * as many as ever at once, though a reload has lowered their number; the end of
 * a connection is told before its id is used anew, with what it was.
 */
START_TEST(crowd_of_before)
{
    static const bool yes = true;
    static Crowd c;
    static uint8_t buf[4096];
    const char *ended, *opened;
    uint8_t msg[VP_CONTROL_LEN_MAX];
    VPConfig config;
    size_t len;

    crowd_open(&c, true);
    config = c.r.drv->config;
    config.max_conns = CROWD / 10;
    vp_set_config(c.r.drv, &config);
    vp_set_events(c.r.loop, tell, &yes);
    told[0] = '\0';
    len = new_session(&c.r, buf);
    len += peer_put(&c.r.peer, buf + len, VP_PKT_CONTROL, VP_FLAG_CLIENT,
                    CROWD - 1, msg, msg_init(msg, "svc", 1000));
    peer_write(&c.r, buf, len);
    log_expect("breaks the protocol", 0);
    ck_assert_str_eq(engine_link(c.r.drv).state, "up");
    ended = strstr(told, "ended 199 OPEN/OPEN\n");
    opened = strstr(told, "opened 199 ");
    ck_assert_msg(ended != NULL && opened != NULL && ended < opened, "%s",
                  told);
    vp_set_events(c.r.loop, NULL, NULL);
    crowd_close(&c);
}
END_TEST

/* Nor do local clients find it full then. */
START_TEST(clients_of_before)
{
    static Rig r;
    static uint8_t buf[4096];
    int fd[100], newcomer[20];
    VPDriver *other;

    rig_new(&r, &rig_config);
    other = vp_new(r.loop, 8, &rig_config, rig_lost, &r);
    peer_session(&r);
    for (uint32_t i = 0; i < COUNT_OF(fd); i++) {
        fd[i] = rig_client(&r, "svc");
        peer_drain(&r);
        peer_credit(&r, 0, VP_CONN_FIRST + i, VP_MSG_CONNECT_ACK, 1000);
    }
    fd_write(r.peer.fd, buf, new_session(&r, buf));
    box_step(r.loop, 2);
    for (int i = 0; i < COUNT_OF(newcomer); i++) {
        newcomer[i] = rig_client(&r, "svc");
    }
    box_settle(r.loop);
    log_quiet("warn");
    for (int i = 0; i < COUNT_OF(newcomer); i++) {
        ck_assert_int_eq(fd_state(newcomer[i]), FD_OPEN);
        close(newcomer[i]);
    }
    for (int i = 0; i < COUNT_OF(fd); i++) {
        close(fd[i]);
    }
    vp_free(other);
    rig_free(&r);
}
END_TEST

/* Who moves no data for as long as its forward allows is reset, both ways. */
START_TEST(idle_too_long)
{
    const VPLimits limits = { .idle = 600 };
    VPAccount *account;
    unsigned long usual;
    int target, fd[3];
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    account = vp_account_new(r.drv, &limits);
    target = rig_target(&r, "svc");
    vp_iforward_account(r.drv, "svc", account);
    box_run(r.loop, 100 * SECOND);
    usual = passes(&r, 500);
    for (uint32_t id = 0; id < 3; id++) {
        peer_init(&r, id, "svc", 1000);
        fd[id] = rig_accept(&r, target);
    }
    peer_drain(&r);
    peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    box_run(r.loop, 90 * SECOND);
    ck_assert_uint_le(passes(&r, 500), usual + 2); /* nothing wakes it */
    peer_send(&r, VP_PKT_CLIENT, 0, 1, "abc", 3); /* at 590 s */
    fd_write(fd[2], "abcd", 4);
    box_run(r.loop, 11 * SECOND);
    ck_assert_int_eq(fd_state(fd[0]), FD_EOF);
    ck_assert_uint_eq(account_of(account).conns, 2);
    while (peer_next(&r) >= VP_PKT_HELLO) {
        continue; /* PINGs */
    }
    ck_assert_int_eq(r.peer.pkt.type, VP_PKT_SERVER);
    peer_expect(&r, 0, VP_MSG_RESET);
    ck_assert_int_eq(r.peer.data[1], VP_REASON_TIMEOUT);
    box_run(r.loop, 588 * SECOND); /* at 1189 s */
    ck_assert_uint_eq(account_of(account).conns, 2);
    box_run(r.loop, 2 * SECOND);
    ck_assert_uint_eq(account_of(account).conns, 0);
    ck_assert_uint_eq(account_of(account).counts.reset[VP_RESET_IDLE], 3);
    ck_assert_uint_eq(account_of(account).bytes[0], 3);
    ck_assert_uint_eq(account_of(account).bytes[1], 4);
    peer_drain(&r);
    peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    box_run(r.loop, 100 * SECOND);
    ck_assert_uint_le(passes(&r, 500), usual + 2);
    for (int i = 0; i < 3; i++) {
        close(fd[i]);
    }
    vp_del_iforward(r.drv, "svc");
    vp_account_free(account);
    close(target);
    rig_free(&r);
}
END_TEST

/* A client here, and one whose forward has another limit and is gone. */
START_TEST(idle_client)
{
    const VPLimits limits[2] = { { .idle = 7 }, { .idle = 3 } };
    VPAccount *account[2];
    int client[2], fd[2];
    static Rig r;

    rig_new(&r, &rig_config);
    r.tcp = true;
    peer_session(&r);
    for (int i = 0; i < 2; i++) {
        VPAddr addr;

        fd[i] = rig_listen(&r, "svc", &addr);
        account[i] = vp_account_new(r.drv, &limits[i]);
        vp_oforward_account(r.drv, fd[i], account[i]);
        client[i] = knock(&addr);
        box_wait(r.loop, account_of(account[i]).conns == 1);
        fd_nonblock(client[i]);
    }
    for (int i = 0; i < 2; i++) {
        vp_del_oforward(r.drv, fd[i]);
        vp_account_free(account[i]);
    }
    box_run(r.loop, 2500 * MS);
    ck_assert_int_eq(fd_state(client[1]), FD_OPEN);
    box_run(r.loop, SECOND);
    fd_wait(r.loop, client[1], ECONNRESET);
    ck_assert_int_eq(fd_state(client[0]), FD_OPEN);
    box_run(r.loop, 4 * SECOND);
    fd_wait(r.loop, client[0], ECONNRESET);
    close(client[0]);
    close(client[1]);
    rig_free(&r);
}
END_TEST

START_TEST(counted)
{
    static Rig r;
    VPChannelInfo info;
    int target, client, fd;

    rig_new(&r, &rig_config);
    peer_session(&r);
    target = rig_target(&r, "svc");
    peer_init(&r, 1, "none", 0);
    peer_init(&r, 2, "svc", 0);
    fd = accept(target, NULL, NULL);
    peer_msg(&r, VP_FLAG_CLIENT, 2, VP_MSG_RESET, 0);
    client = rig_client(&r, "c");
    peer_drain(&r);
    peer_msg(&r, 0, VP_CONN_FIRST, VP_MSG_CONNECT_REFUSED, VP_REASON_TIMEOUT);
    close(client);
    client = rig_client(&r, "c");
    peer_drain(&r);
    engine_forget(r.drv);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_eq(info.counts.opened[0], 2);
    ck_assert_uint_eq(info.counts.opened[1], 2);
    ck_assert_uint_eq(info.counts.refused[VP_REFUSED_UNKNOWN], 1);
    ck_assert_uint_eq(info.counts.refused[VP_REFUSED_TARGET], 1);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_PEER], 1);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_SESSION], 1);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_OWNER], 0);
    close(client);
    close(fd);
    close(target);
    rig_free(&r);
}
END_TEST

/* What the side that counts has done itself, and what it has no room for */
START_TEST(counted_here)
{
    static Rig r;
    VPConfig config = rig_config;
    VPChannelInfo info;
    int target, fds[2];

    rig_new(&r, &rig_config);
    peer_session(&r);
    target = rig_target(&r, "svc");
    for (uint32_t id = 1; id <= 2; id++) {
        peer_init(&r, id, "svc", 0);
        fds[id - 1] = rig_accept(&r, target);
    }
    ck_assert_int_eq(vp_conn_reset(r.drv, 1, false), 0);
    vp_refuse(r.drv);
    peer_init(&r, 3, "svc", 0);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_DAEMON], 1);
    ck_assert_uint_eq(info.counts.refused[VP_REFUSED_ENDING], 1);
    vp_reset_all(r.drv);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_DAEMON], 2);
    for (int i = 0; i < 2; i++) {
        close(fds[i]);
    }
    close(target);
    rig_free(&r);

    config.max_opens = 0;
    rig_new(&r, &config);
    peer_session(&r);
    peer_init(&r, 1, "svc", 0);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_eq(info.counts.refused[VP_REFUSED_LIMIT], 1);
    ck_assert_uint_eq(info.counts.refused[VP_REFUSED_UNKNOWN], 0);
    rig_free(&r);
}
END_TEST

START_TEST(information)
{
    static Play p;
    VPChannelInfo info;
    VPConnInfo conn = { 0 };
    char data[8];

    play_new(&p, _i, 1000);
    play_send(&p, "12345", 5);
    box_wait(p.r.loop, recv(p.fd, data, sizeof(data), 0) == 5);
    fd_write(p.fd, "123", 3);
    box_wait(p.r.loop, play_conn(&p).tx_count == 3);
    box_run(p.r.loop, SECOND);
    ck_assert_uint_eq(vp_conns(p.r.drv, 0, 2, note_conn, &conn), 0);
    ck_assert_uint_eq(conn.id, p.id);
    ck_assert(conn.client == p.client);
    ck_assert_str_eq(conn.service_id, "svc");
    ck_assert_str_eq(conn.in, "OPEN");
    ck_assert_str_eq(conn.out, "OPEN");
    ck_assert_uint_eq(conn.bytes[0], 5);
    ck_assert_uint_eq(conn.bytes[1], 3);
    ck_assert_uint_eq(conn.credit, 997);
    ck_assert_uint_ge(conn.idle, SECOND);
    ck_assert_uint_ge(conn.age, conn.idle);
    vp_channel_info(p.r.drv, &info);
    ck_assert_str_eq(info.state, "up");
    ck_assert_uint_eq(info.bytes[1], 3u + (p.client ? 26 : 9));
    ck_assert_uint_eq(info.packets[1], 2);
    ck_assert_uint_eq(info.packets[0], 2);
    ck_assert_uint_eq(info.conns, 1);
    ck_assert_uint_eq(info.attaches, 1);
    ck_assert_uint_eq(info.resyncs, 0);
    ck_assert_str_eq(info.last_error, "");
    ck_assert_uint_le(info.memory, info.memory_max);
    ck_assert_uint_le(info.memory, box.allocated);
    ck_assert(vp_busy(p.r.drv)); /* the peer has not acked */
    peer_drain(&p.r);
    peer_send(&p.r, VP_PKT_ACK, 0, 0, NULL, 0);
    ck_assert(!vp_busy(p.r.drv));
    ck_assert_int_eq(vp_conn_reset(p.r.drv, p.id, !p.client), -ENOENT);
    ck_assert_int_eq(vp_conn_reset(p.r.drv, p.id + 1, p.client), -ENOENT);
    ck_assert_int_eq(vp_conn_reset(p.r.drv, p.id, p.client), 0);
    ck_assert_int_eq(vp_conn_reset(p.r.drv, p.id, p.client), -ENOENT);
    vp_channel_info(p.r.drv, &info);
    ck_assert_uint_eq(info.counts.opened[p.client], 1);
    ck_assert_uint_eq(info.counts.opened[!p.client], 0);
    ck_assert_uint_eq(info.counts.reset[VP_RESET_DAEMON], 1);
    fd_wait(p.r.loop, p.fd, ECONNRESET);
    play_expect(&p, VP_MSG_RESET);
    play_over(&p);
    play_free(&p);
}
END_TEST

/* The memory that is asked for holds as many connections as is said. */
START_TEST(memory_formula)
{
    for (unsigned conns = 1; conns < 20000; conns *= 3) {
        size_t memory = VP_MEMORY_FIXED + conns * VP_MEMORY_CONN;

        ck_assert_uint_eq(vp_max_conns(memory), conns);
        ck_assert_uint_eq(vp_max_conns(memory - 1), conns - 1);
    }
    ck_assert_uint_eq(vp_max_conns(0), 0);
    ck_assert_uint_eq(vp_max_conns(VP_MEMORY_FIXED), 0);
    for (uint64_t memory = 1 << 20; memory < 1000000ull << 20; memory *= 2) {
        size_t conns = vp_max_conns(2 * memory);

        ck_assert_uint_ge(conns, vp_max_conns(memory));
        ck_assert_uint_ge(SIZE_MAX / VP_MEMORY_CONN, conns);
    }
}
END_TEST

/* What connections leave of the memory is for long ways, as far as it goes. */
START_TEST(memory_reached)
{
    VPConfig config = rig_config;
    VPChannelInfo info;
    size_t least, before;
    static Rig r;

    rig_new(&r, &config);
    vp_channel_info(r.drv, &info);
    before = least = info.memory_max;
    ck_assert_uint_eq(least,
                      VP_MEMORY_FIXED + config.max_conns * VP_MEMORY_CONN);
    for (config.memory = 1u << 20; config.memory < 1ull << 32;
         config.memory += config.memory / 4) {
        vp_set_config(r.drv, &config);
        vp_channel_info(r.drv, &info);
        ck_assert_uint_le(info.memory_max, MAX(config.memory, least));
        ck_assert_uint_ge(info.memory_max, before);
        before = info.memory_max;
    }
    ck_assert_uint_gt(before, VP_STORE_LEN_MAX +
                      VP_WINDOW_BUDGET(VP_STORE_LEN_MAX));
    config.memory = before;
    vp_set_config(r.drv, &config);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_eq(info.memory_max, before);
    config.memory = before - 1;
    vp_set_config(r.drv, &config);
    vp_channel_info(r.drv, &info);
    ck_assert_uint_lt(info.memory_max, before);
    ck_assert_uint_gt(info.memory_max, before / 2 - least);
    rig_free(&r);
}
END_TEST

START_TEST(addresses_as_text)
{
    VPAddr addr = { 0 };
    struct sockaddr_in *sin = (void *)&addr.ss;
    struct sockaddr_in6 *sin6 = (void *)&addr.ss;
    struct sockaddr *un = (void *)&addr.ss;
    char buf[100], tiny[6];

    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "a closed socket");
    sin->sin_family = AF_INET;
    sin->sin_port = htons(8080);
    sin->sin_addr.s_addr = htonl(0x7f000001);
    addr.len = sizeof(*sin);
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "127.0.0.1:8080");
    ck_assert_str_eq(vp_addr_str(&addr, tiny, sizeof(tiny)), "127.0");
    memset(&addr, 0, sizeof(addr));
    sin6->sin6_family = AF_INET6;
    sin6->sin6_port = htons(22);
    sin6->sin6_addr.s6_addr[15] = 1;
    addr.len = sizeof(*sin6);
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "[::1]:22");
    memset(&addr, 0, sizeof(addr));
    un->sa_family = AF_UNIX;
    addr.len = sizeof(un->sa_family);
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "a unix socket");
    memcpy(un->sa_data, "/a/b", 5);
    addr.len = (socklen_t)(sizeof(un->sa_family) + 5);
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "/a/b");
    addr.len--; /* the last byte needs no zero after it */
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)), "/a/b");
    memset(&addr, 0, sizeof(addr));
    un->sa_family = 200;
    addr.len = 16;
    ck_assert_str_eq(vp_addr_str(&addr, buf, sizeof(buf)),
                     "an unknown address");
}
END_TEST

START_TEST(local_addresses)
{
    static const struct {
        const char *ip;
        bool local;
    } table[] = {
        { "127.0.0.1", true },
        { "127.255.255.254", true },
        { "128.0.0.1", false },
        { "126.255.255.255", false },
        { "0.0.0.0", false },
        { "::1", true },
        { "::", false },
        { "::2", false },
        { "fe80::1", false },
        { "::ffff:127.0.0.2", true },
        { "::ffff:10.0.0.1", false },
        { "7f00::1", false },
    };
    VPAddr addr = { .ss.ss_family = AF_UNIX };

    ck_assert(vp_addr_is_local(&addr));
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct addrinfo hints = { .ai_flags = AI_NUMERICHOST }, *ai;

        ck_assert_int_eq(getaddrinfo(table[i].ip, NULL, &hints, &ai), 0);
        memcpy(&addr.ss, ai->ai_addr, ai->ai_addrlen);
        freeaddrinfo(ai);
        ck_assert_msg(vp_addr_is_local(&addr) == table[i].local, "%s",
                      table[i].ip);
    }
}
END_TEST

/*
 * A connection that the peer has forgotten, and whose last bytes are still
 * delivered here, takes none of the peer's room.
 */
START_TEST(limit_and_ending)
{
    uint32_t id = VP_CONN_FIRST;
    static Rig r;
    int client[2];

    rig_new(&r, &rig_config);
    r.peer.hello.max_conns = 1;
    peer_session(&r);
    client[0] = rig_client(&r, "svc");
    peer_expect(&r, id, VP_MSG_CONNECT_INIT);
    peer_send(&r, VP_PKT_SERVER, 0, id, "last", 4);
    peer_msg(&r, 0, id, VP_MSG_RESET, VP_REASON_ENDING);
    client[1] = rig_client(&r, "svc");
    box_settle(r.loop);
    log_quiet("warn");
    peer_expect(&r, id + 1, VP_MSG_CONNECT_INIT);
    ck_assert_uint_eq(engine_counts(r.drv).clients, 2);
    close(client[0]);
    close(client[1]);
    rig_free(&r);
}
END_TEST

/*
 * A target that takes no more is asked again soon, though another one, which
 * doesn't answer, is waited for without haste.
 */
START_TEST(busy_beside_mute)
{
    static Rig r;
    VPAddr addr;
    struct pollfd full = { .events = POLLIN };
    int filler[4], mute, fd;
    Busy b;

    rig_new(&r, &rig_config);
    peer_session(&r);
    mute = tcp_listen(&addr, 0);
    for (int i = 0; i < 4; i++) {
        filler[i] = socket(addr.ss.ss_family, SOCK_STREAM, 0);
        fd_nonblock(filler[i]);
        connect(filler[i], (struct sockaddr *)&addr.ss, addr.len);
    }
    full.fd = mute; /* until one has taken the only place */
    poll(&full, 1, -1);
    ck_assert_int_eq(vp_set_iforward(r.drv, "mute", &addr, 1), 0);
    busy_target(&b, &r, "busy");
    peer_init(&r, 1, "mute", 1000);
    box_run(r.loop, VP_CONNECT_RETRY + MS);
    peer_init(&r, 2, "busy", 1000);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 2);
    busy_no_more(&b);
    box_run(r.loop, 2 * VP_CONNECT_RETRY);
    fd = accept(b.listener, NULL, NULL);
    ck_assert_int_ge(fd, 0);
    ck_assert_uint_eq(engine_counts(r.drv).connecting, 1);
    close(fd);
    for (int i = 0; i < 4; i++) {
        close(filler[i]);
    }
    close(mute);
    close(b.listener);
    rig_free(&r);
}
END_TEST

static void leave_it(void *opaque, int fd, int events)
{
    (void)opaque;
    (void)fd;
    (void)events;
}

/*
 * Beside many others, while the loop is busy, the answer to what a socket was
 * given is seen at once.
 */
START_TEST(answer_is_seen)
{
    uint8_t buf[VP_PKT_HDR_LEN + 3];
    uint32_t id = VP_CONN_FIRST + 50;
    int client[100], busy[2];
    static Rig r;
    size_t len;

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 100; i++) {
        client[i] = rig_client(&r, "svc");
        peer_expect(&r, VP_CONN_FIRST + (uint32_t)i, VP_MSG_CONNECT_INIT);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    fd_pair(busy);
    ck_assert_int_eq(vp_watch(r.loop, busy[0], leave_it, NULL), 0);
    vp_watch_set(r.loop, busy[0], VP_READ);
    fd_write(busy[1], "x", 1); /* is never read */
    box_run(r.loop, 3 * SECOND);
    len = peer_put(&r.peer, buf, VP_PKT_SERVER, 0, id, "ask", 3);
    fd_write(r.peer.fd, buf, len);
    while (rig_conn(&r, id, true).rx_taken == 0) {
        box_step(r.loop, 1);
    }
    fd_write(client[50], "answer", 6);
    box_step(r.loop, 2);
    ck_assert_uint_eq(rig_conn(&r, id, true).tx_count, 6);
    vp_unwatch(r.loop, busy[0]);
    close(busy[0]);
    close(busy[1]);
    for (int i = 0; i < 100; i++) {
        close(client[i]);
    }
    rig_free(&r);
}
END_TEST

/* Lines at debug level that are left out are counted, and that is said. */
START_TEST(debug_flood)
{
    static Rig r;

    engine_log_level = VP_LOG_DEBUG;
    rig_new(&r, &rig_config);
    peer_session(&r);
    for (int i = 0; i < 50; i++) {
        close(rig_client(&r, "svc"));
    }
    box_settle(r.loop);
    ck_assert_int_le(log_count(": connection "), VP_LOG_LINES);
    log_expect("left out", 0);
    box_run(r.loop, VP_LOG_SPAN);
    close(rig_client(&r, "svc"));
    box_settle(r.loop);
    log_expect("lines like those were left out", 1);
    engine_log_level = VP_LOG_INFO;
    rig_free(&r);
}
END_TEST

/* However many lines connections make, what becomes of the channel is said. */
START_TEST(log_of_channel)
{
    static Rig r;

    rig_new(&r, &rig_config);
    peer_session(&r);
    for (uint32_t i = 0; i < VP_LOG_LINES + 10; i++) {
        peer_init(&r, i, "none", 0);
        peer_expect(&r, i, VP_MSG_CONNECT_REFUSED);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
    }
    log_expect("connection refused: unknown service", VP_LOG_LINES);
    rig_unplug(&r);
    log_expect("channel down", 1);
    rig_free(&r);
}
END_TEST

/* ---- diallers and listeners by themselves ------------------------------ */

static VPDialer *dialers[3];

/* dial_ended() - VPDialer.done(): all are freed by the first that is over */
static void dial_ended(void *opaque, int fd, int err)
{
    *(int *)opaque += 1;
    ck_assert_int_eq(fd, -1);
    ck_assert_int_eq(err, ETIMEDOUT);
    for (int i = 0; i < 3; i++) {
        vp_dialer_stop(dialers[i]);
        free(dialers[i]);
    }
}

static void dial_ignored(void *opaque, const VPAddr *addr, int err)
{
    (void)opaque;
    (void)addr;
    (void)err;
}

/* Diallers of one loop time out together, and the first frees them all. */
START_TEST(diallers_freed)
{
    VPLoop *loop = engine_loop_new();
    VPAddr addr;
    VPTarget target = { .addrs = NULL };
    int queue = unix_listen(&addr, 0), ended = 0;
    int filler = socket(AF_UNIX, SOCK_STREAM, 0);

    ck_assert_int_eq(connect(filler, (struct sockaddr *)&addr.ss, addr.len),
                     0);
    ck_assert_int_eq(vp_target_set(&target, loop, &addr, 1), 0);
    for (int i = 0; i < 3; i++) {
        dialers[i] = calloc(1, sizeof(*dialers[i]));
        ck_assert_ptr_nonnull(dialers[i]);
        dialers[i]->failed = dial_ignored;
        dialers[i]->done = dial_ended;
        dialers[i]->opaque = &ended;
        vp_dialer_start(dialers[i], loop, &target);
    }
    box_run(loop, 11 * SECOND);
    ck_assert_int_eq(ended, 1);
    ck_assert(engine_loop_empty(loop));
    vp_target_clear(&target);
    vp_loop_free(loop);
    close(filler);
    close(queue);
}
END_TEST

/* make_same() - VPDialer.made(): from the very port that it goes to */
static bool make_same(void *opaque, int fd, const VPAddr *addr)
{
    (void)opaque;
    ck_assert_int_eq(bind(fd, (const struct sockaddr *)&addr->ss, addr->len),
                     0);
    return true;
}

static void dial_refused(void *opaque, int fd, int err)
{
    *(int *)opaque += 1;
    ck_assert_int_eq(fd, -1);
    ck_assert_int_eq(err, ECONNREFUSED);
}

/* Where nobody listens, connect() can meet itself: nobody is there, then. */
START_TEST(meets_itself)
{
    int ended = 0, fd;
    VPDialer d = { .made = make_same, .failed = dial_ignored,
                   .done = dial_refused, .opaque = &ended };
    VPLoop *loop = engine_loop_new();
    VPTarget target = { .addrs = NULL };
    VPAddr addr;

    close(tcp_listen(&addr, 1));
    ck_assert_int_eq(vp_target_set(&target, loop, &addr, 1), 0);
    vp_dialer_start(&d, loop, &target);
    box_wait(loop, ended == 1);
    vp_target_clear(&target);
    vp_loop_free(loop);
    fd = socket(AF_INET, SOCK_STREAM, 0); /* nothing holds the port */
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&addr.ss, addr.len), 0);
    close(fd);
}
END_TEST

/* count_accepted() - VPListener.accepted() */
static void count_accepted(void *opaque, int fd, const VPAddr *peer)
{
    (void)peer;
    close(fd);
    ++*(int *)opaque;
}

/*
 * Whoever comes again and again to a channel's listener takes none of the time
 * that it rests (_i = 1); clients of other listeners come several in a row.
 */
START_TEST(listener_rests)
{
    VPLoop *loop = engine_loop_new();
    int accepted = 0, fd[VP_ACCEPT_BATCH];
    VPAddr addr;
    VPListener l = {
        .name = "l",
        .rest = _i == 1 ? VP_OFFER_REST : 0,
        .accepted = count_accepted,
        .opaque = &accepted,
    };

    ck_assert_int_eq(vp_listener_start(&l, loop, unix_listen(&addr, 100)), 0);
    for (int i = 0; i < VP_ACCEPT_BATCH; i++) {
        fd[i] = socket(AF_UNIX, SOCK_STREAM, 0);
        ck_assert_int_eq(connect(fd[i], (struct sockaddr *)&addr.ss,
                                 addr.len), 0);
    }
    box_step(loop, 1);
    ck_assert_int_eq(accepted, _i == 1 ? 1 : VP_ACCEPT_BATCH);
    box_run(loop, 2 * VP_ACCEPT_BATCH * VP_OFFER_REST);
    ck_assert_int_eq(accepted, VP_ACCEPT_BATCH);
    for (int i = 0; i < VP_ACCEPT_BATCH; i++) {
        close(fd[i]);
    }
    vp_listener_stop(&l);
    vp_loop_free(loop);
}
END_TEST

/* stop_listener() - VPListener.accepted(): one is enough */
static void stop_listener(void *opaque, int fd, const VPAddr *peer)
{
    (void)peer;
    close(fd);
    vp_listener_stop(opaque);
}

/* A listener may be stopped by whom it gives the first of several clients. */
START_TEST(listener_stopped)
{
    VPListener l = { .name = "l", .keeps_spare = true,
                     .accepted = stop_listener, .opaque = &l };
    VPLoop *loop = engine_loop_new();
    int client[3], fd;
    VPAddr addr;

    fd = unix_listen(&addr, 3);
    ck_assert_int_eq(vp_listener_start(&l, loop, fd), 0);
    for (int i = 0; i < 3; i++) {
        client[i] = socket(AF_UNIX, SOCK_STREAM, 0);
        ck_assert_int_eq(connect(client[i], (struct sockaddr *)&addr.ss,
                                 addr.len), 0);
    }
    box_settle(loop);
    ck_assert_int_eq(l.fd, -1);
    ck_assert_int_eq(l.spare, -1);
    ck_assert(engine_loop_empty(loop));
    vp_listener_stop(&l);
    for (int i = 0; i < 3; i++) {
        close(client[i]);
    }
    vp_loop_free(loop);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("conn");

    SUITE_ADD(s, transitions);
    SUITE_LOOP(s, half_close, 4);
    SUITE_LOOP(s, reset_by_local, 2);
    SUITE_LOOP(s, reset_by_peer, 4);
    SUITE_LOOP(s, reset_after_end, 2);
    SUITE_LOOP(s, reset_without_credit, 8);
    SUITE_LOOP(s, gone_after_end, 8);
    SUITE_LOOP(s, gone_without_credit, 4);
    SUITE_LOOP(s, unreadable, 2);
    SUITE_ROWS(s, peer_gone, peer_gone_rows);
    SUITE_LOOP(s, peer_gone_talker, 8);
    SUITE_ADD(s, peer_gone_talkers);
    SUITE_ADD(s, end_beside_many);
    SUITE_ROWS(s, refused, refusals);
    SUITE_LOOP(s, early, 2);
    SUITE_ROWS(s, introduced, introductions);
    SUITE_ADD(s, introduced_in_vain);
    SUITE_LOOP(s, early_end, 5);
    SUITE_LOOP(s, early_gone, 2);
    SUITE_ADD(s, mute_addresses);
    SUITE_ADD(s, crowd_waits);
    SUITE_ADD(s, addresses);
    SUITE_ADD(s, addresses_later);
    SUITE_ADD(s, target_refuses);
    SUITE_LOOP(s, credit_given, 4);
    SUITE_LOOP(s, credit_withheld, 2);
    SUITE_LOOP(s, credit_overrun, 4);
    SUITE_ADD(s, credit_budget);
    SUITE_LOOP(s, credit_shared, 2);
    SUITE_ADD(s, credit_halved);
    SUITE_ADD(s, credit_on_trial);
    SUITE_LOOP(s, credit_on_long_way, 3);
    SUITE_ADD(s, credit_config);
    SUITE_LOOP(s, credit_kept, 4);
    SUITE_LOOP(s, credit_of_broken, 4);
    SUITE_LOOP(s, malformed_control, 3 * COUNT_OF(malformed));
    SUITE_ADD(s, init_from_server);
    SUITE_ADD(s, service_ids);
    SUITE_ADD(s, late_packets);
    SUITE_ADD(s, both_directions);
    SUITE_ROWS(s, offences, offence_names);
    SUITE_LOOP(s, early_offences, 2);
    SUITE_ADD(s, id_used_again);
    SUITE_ADD(s, limit_of_peer);
    SUITE_LOOP(s, open_while_draining, 2);
    SUITE_LOOP(s, id_guessed, 6);
    SUITE_LOOP(s, limit_of_clients, 2);
    SUITE_LOOP(s, limit_of_opens, 2);
    SUITE_ADD(s, half_open_shared);
    SUITE_ADD(s, open_and_reset);
    SUITE_LOOP(s, random_peer, 20);
    SUITE_ADD(s, memory_runs_out);
    SUITE_ADD(s, fair_shares);
    SUITE_ADD(s, listener);
    SUITE_ADD(s, callers_time);
    SUITE_ADD(s, tcp_peer_alive);
    SUITE_ADD(s, not_paced);
    SUITE_ADD(s, accepted_ones_inherit);
    SUITE_ADD(s, accept_starved);
    SUITE_ADD(s, limit_of_account);
    SUITE_LOOP(s, limit_of_listeners, 2);
    SUITE_ROWS(s, in_pieces, crowds);
    SUITE_ADD(s, crowd_of_before);
    SUITE_ADD(s, clients_of_before);
    SUITE_ADD(s, idle_too_long);
    SUITE_ADD(s, idle_client);
    SUITE_ADD(s, counted);
    SUITE_ADD(s, counted_here);
    SUITE_ADD(s, portions);
    SUITE_LOOP(s, information, 2);
    SUITE_ADD(s, memory_formula);
    SUITE_ADD(s, memory_reached);
    SUITE_ADD(s, local_addresses);
    SUITE_ADD(s, limit_and_ending);
    SUITE_ADD(s, busy_beside_mute);
    SUITE_ADD(s, answer_is_seen);
    SUITE_ADD(s, debug_flood);
    SUITE_ADD(s, log_of_channel);
    SUITE_ADD(s, diallers_freed);
    SUITE_ADD(s, meets_itself);
    SUITE_ADD(s, listener_stopped);
    SUITE_LOOP(s, listener_rests, 2);
    SUITE_ADD(s, addresses_as_text);
    return suite_run(s);
}
