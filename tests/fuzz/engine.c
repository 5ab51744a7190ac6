/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c - the engine in a box: the targets "packet" and "engine"
 *
 * The engine is included here with some of its system calls replaced: time
 * stands still unless an input says otherwise, random numbers are no longer
 * random, memory is counted, and calls fail when told to.  Sockets are real.
 *
 * A fuzzer would never guess a packet's check, so an input isn't what goes
 * over the channel but a list of what to do, and whoever reads it makes the
 * packets: right ones, and ones that are wrong in the way the input says.
 * What is right is read out of the engine (the number it expects next, its
 * token, its keys), so that an input goes on making sense after a handshake.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "virtproxy.h"
#include "fuzz.h"

#include "tests/lib/boxed.h"
#include "tests/lib/bytes.h"
#include "tests/lib/log.h"
#include "tests/lib/peer.h"
#include "tests/lib/sock.h"

/* ---- a driver and its peer -------------------------------------------- */

#define APPS 12
#define SERVICES 4
#define MAX_CONNS 8
#define HELD 262144

typedef struct Rig {
    VPLoop *loop;
    VPDriver *drv;
    VPDriver *other;    /* a second one, which does nothing; or NULL */
    VPConfig config;
    Input in;
    int rd, wr;         /* our end of the channel; -1: closed */
    bool deaf;          /* the peer doesn't read */
    uint64_t token;     /* the last one it said */
    VPAddr oforward;
    int oforward_fd;
    int apps[APPS];     /* clients and targets; -1: none */
    unsigned next_app;
    unsigned holding;   /* what the peer says is held for so many ops more */
    uint8_t held[HELD];
    size_t held_len;
    uint32_t held_seqs; /* sequence numbers in it */
} Rig;

static const char *const services[SERVICES] = { "unix", "full", "tcp", "gone" };

/* The targets' listeners and addresses, made once: making them takes long. */
static int listeners[SERVICES];
static VPAddr addrs[SERVICES];
static uint8_t pattern[VP_PKT_LEN_MAX];

static void rig_lost(void *opaque, const char *reason, bool was_up)
{
    (void)opaque;
    (void)reason;
    (void)was_up;
}

static void world_new(void)
{
    static bool done;

    if (done) {
        return;
    }
    done = true;
    signal(SIGPIPE, SIG_IGN);
    listeners[0] = unix_listen(&addrs[0], 16);
    listeners[1] = unix_listen(&addrs[1], 0);
    listeners[2] = tcp_listen(&addrs[2], 16);
    listeners[3] = unix_listen(&addrs[3], 1);
    close(listeners[3]);
    bytes_fill(pattern, sizeof(pattern), 0, 0);
}

static void rig_unplug(Rig *r)
{
    if (r->wr >= 0 && r->wr != r->rd) {
        close(r->wr);
    }
    if (r->rd >= 0) {
        close(r->rd);
    }
    r->rd = r->wr = -1;
}

/* channel_new() - the engine's end in @fds, ours in the rig */
static void channel_new(Rig *r, bool pipes, int fds[2])
{
    int a[2], b[2];

    rig_unplug(r);
    if (pipes) {
        box_require(pipe(a) == 0 && pipe(b) == 0);
        r->rd = b[0];
        r->wr = a[1];
        fds[0] = a[0];
        fds[1] = b[1];
    } else {
        box_require(socketpair(AF_UNIX, SOCK_STREAM, 0, a) == 0);
        r->rd = r->wr = a[0];
        fds[0] = fds[1] = a[1];
    }
    fd_nonblock(r->rd);
    fd_nonblock(r->wr);
    fd_nonblock(fds[0]);
    fd_nonblock(fds[1]);
}

/* rig_plug() - a new channel, if the driver has none */
static void rig_plug(Rig *r, uint8_t how)
{
    int fds[2];

    if (engine_link(r->drv).rfd < 0) {
        channel_new(r, how & 1, fds);
        vp_attach(r->drv, fds[0], fds[1], (VPChannelKind)(how / 2 % 3),
                  (VPChannelRole)(how / 8 % 3));
    }
}

/* rig_listen() - an oforward */
static void rig_listen(Rig *r)
{
    int fd = unix_listen(&r->oforward, 16);

    if (vp_set_oforward(r->drv, fd, "out") == 0) {
        r->oforward_fd = fd;
    }
}

static void rig_new(Rig *r, const uint8_t *data, size_t len)
{
    static const uint8_t key[] = "sixteen bytes and some more";
    uint8_t how;

    world_new();
    box_reset(true);
    log_clear();
    memset(r, 0, sizeof(*r));
    r->in = (Input){ data, len };
    r->rd = r->wr = r->oforward_fd = -1;
    for (int i = 0; i < APPS; i++) {
        r->apps[i] = -1;
    }
    how = in8(&r->in);
    r->config = (VPConfig){
        .grace = how & 1 ? 30 : 0,
        .max_conns = how & 2 ? 2 : MAX_CONNS,
        .max_half_open = how & 4 ? 1 : MAX_CONNS,
        .max_opens = how & 8 ? 3 : 1000,
        .program = how & 32 ? "fuzz" : NULL,
    };
    if (how & 16) {
        memcpy(r->config.key.bytes, key, sizeof(key));
        r->config.key.len = sizeof(key);
    }
    r->loop = engine_loop_new();
    r->drv = vp_new(r->loop, 3, &r->config, rig_lost, r);
    for (int i = 0; i < SERVICES; i++) {
        vp_set_iforward(r->drv, services[i], &addrs[i], 1);
    }
    vp_set_iforward(r->drv, "both", &addrs[2], 2);
    rig_listen(r);
    rig_plug(r, how >> 5);
}

/* rig_free() - nothing must be left */
static void rig_free(Rig *r)
{
    box.calls = 0;
    if (r->other != NULL) {
        vp_free(r->other);
    }
    vp_free(r->drv);
    box_require(engine_loop_empty(r->loop));
    vp_loop_free(r->loop);
    box_require(box.blocks == 0 && box.allocated == 0);
    rig_unplug(r);
    for (int i = 0; i < APPS; i++) {
        if (r->apps[i] >= 0) {
            close(r->apps[i]);
        }
    }
    for (int i = 0; i < SERVICES - 1; i++) {
        int fd;

        while ((fd = accept(listeners[i], NULL, NULL)) >= 0) {
            close(fd);
        }
    }
}

/* rig_check() - what must hold at any time between two passes */
static void rig_check(Rig *r)
{
    const char *wrong = engine_check(r->drv);
    EngineCounts n = engine_counts(r->drv);
    VPChannelInfo info;

    if (wrong != NULL) {
        box_failed(__FILE__, __LINE__, wrong);
    }
    /* of the peer's, as many as may be and as many again that are over */
    box_require(n.open <= MAX_CONNS && n.conns - n.clients <= 2 * MAX_CONNS);
    box_require(n.fds == engine_watched(r->loop));
    vp_channel_info(r->drv, &info);
    box_require(info.memory <= box.allocated);
}

/* ---- the peer --------------------------------------------------------- */

/* peer_read() - all there is, unless it is deaf */
static void peer_read(Rig *r)
{
    uint8_t buf[65536];

    for (int i = 0; i < 64 && !r->deaf && r->rd >= 0; i++) {
        ssize_t n = read(r->rd, buf, sizeof(buf));

        if (n <= 0) {
            break;
        }
        box_settle(r->loop);
    }
}

static void peer_write(Rig *r, const void *data, size_t len)
{
    const uint8_t *p = data;

    if (r->holding > 0 && len <= sizeof(r->held) - r->held_len) {
        memcpy(r->held + r->held_len, data, len);
        r->held_len += len;
        return;
    }

    for (int i = 0; i < 64 && len > 0 && r->wr >= 0; i++) {
        ssize_t n = write(r->wr, p, len);

        p += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
        box_settle(r->loop);
    }
}

/* peer_release() - write what was held, in one go if the channel takes it */
static void peer_release(Rig *r)
{
    r->holding = 0;
    peer_write(r, r->held, r->held_len);
    r->held_len = r->held_seqs = 0;
}

/*
 * peer_packet() - the next one, its payload of @len bytes at @data
 * @wrong:  what not to get right
 */
enum {
    WRONG_SEQ = 1,
    WRONG_ACK = 2,
    WRONG_CHECK = 4,
    WRONG_DATA = 8,
    WRONG_LEN = 16,
    WRONG_CUT = 32,
    OLD_ACK = 64,
};

static void peer_packet(Rig *r, unsigned type, unsigned flags, uint32_t id,
                        const void *data, size_t len, unsigned wrong)
{
    static uint8_t buf[VP_PKT_HDR_LEN + UINT16_MAX];
    EngineLink l = engine_link(r->drv);
    uint32_t ack = wrong & OLD_ACK ? l.base : l.unsent;
    uint64_t digest = engine_digest(r->drv, ack);
    VPPacket pkt = {
        .type = (uint8_t)type,
        .flags = (uint8_t)flags,
        .bytes = (uint16_t)len,
        .conn = id,
        .seq = l.expect + r->held_seqs + !!(wrong & WRONG_SEQ),
        .ack = wrong & WRONG_ACK ? l.next + 1 : ack,
        .data_check = wire_data_check(l.rx_payload_key, data, len) +
                      !!(wrong & WRONG_DATA),
    };
    size_t total = VP_PKT_HDR_LEN + len;

    if (wrong & WRONG_LEN) {
        pkt.bytes = (uint16_t)(pkt.bytes + 1 + in8(&r->in));
    }
    if (wrong & WRONG_CUT) {
        total -= total * in8(&r->in) / 256;
    }
    if (len > 0) {
        memcpy(buf + VP_PKT_HDR_LEN, data, len);
    }
    wire_put(buf, &pkt, l.rx_key, digest + !!(wrong & WRONG_CHECK));
    r->held_seqs += r->holding > 0 && type < VP_PKT_HELLO;
    peer_write(r, buf, total);
}

/* peer_token() - one it has not said yet */
static uint64_t peer_token(Rig *r)
{
    r->token++;
    return mix64(r->token + 0xface);
}

/* hello_true() - what a peer that got everything would say */
static VPHello hello_true(Rig *r, uint64_t token)
{
    EngineLink l = engine_link(r->drv);

    return (VPHello){
        .version = VP_VERSION,
        .oldest = VP_VERSION_OLDEST,
        .flags = (r->config.key.len > 0 ? VP_HELLO_KEYED : 0u) |
                 (engine_up(r->drv) ? VP_HELLO_UP : 0u),
        .window = VP_WINDOW_INIT,
        .token = token,
        .echo = l.token[0],
        .my_epoch = l.epoch[1],
        .peer_epoch = l.epoch[0],
        .digest = engine_digest(r->drv, l.unsent),
        .expect = l.unsent,
        .base = l.expect,
        .next = l.expect,
        .max_conns = MAX_CONNS,
    };
}

static void peer_hello(Rig *r, const VPHello *h, bool proved)
{
    uint8_t buf[VP_PKT_HDR_LEN + VP_HELLO_LEN];
    VPKey other = r->config.key;

    other.bytes[0] ^= !proved;
    peer_write(r, buf, wire_put_hello(buf, h, other.len > 0 ? &other : NULL));
}

/* peer_shake() - hands, as a good peer does; with @fresh as a new one */
static void peer_shake(Rig *r, bool fresh)
{
    uint64_t token = peer_token(r);

    peer_release(r);
    rig_plug(r, 0);
    if (engine_link(r->drv).penalty_until > vp_loop_now(r->loop)) {
        box_run(r->loop, VP_PENALTY_US + 1);
    }
    for (int i = 0; i < 4; i++) { /* the last one says that we are up */
        VPHello h = hello_true(r, token);

        if (fresh) {
            h.my_epoch = h.peer_epoch = 0;
        }
        peer_hello(r, &h, true);
        peer_read(r);
    }
}

/* ---- what an input can say -------------------------------------------- */

static uint32_t in_id(Input *in)
{
    uint8_t b = in8(in);

    return b < 128 ? b % 16 : VP_CONN_FIRST + b % 16;
}

static uint64_t in_count(Input *in)
{
    static const uint64_t count[] = {
        0, 1, VP_WINDOW_INIT - 1, VP_WINDOW_INIT, VP_WINDOW_INIT + 1,
        1u << 20, UINT32_MAX, 1ull << 32, INT64_MAX, UINT64_MAX,
    };
    uint8_t b = in8(in);

    return b < 10 ? count[b] : (uint64_t)b << b % 57;
}

static size_t in_len(Input *in)
{
    static const uint16_t len[] = {
        0, 1, 31, 32, 33, 736, 4096, 16383, 16384, 16385, 32728, 65495,
        VP_PKT_DATA_LEN,
    };
    uint8_t b = in8(in);

    return b < 13 ? len[b] : b;
}

/* do_packet() - any, mostly in the right form */
static void do_packet(Rig *r)
{
    uint8_t type = in8(&r->in), flags = in8(&r->in), wrong = in8(&r->in);
    uint32_t id = in_id(&r->in);
    size_t len = in_len(&r->in);

    peer_packet(r, type % 16 < 8 ? type % 8 : type, flags, id,
                pattern + (id & 255), MIN(len, sizeof(pattern) - 256), wrong);
}

static void do_data(Rig *r)
{
    uint8_t how = in8(&r->in);
    uint32_t id = in_id(&r->in);
    EngineConn c = engine_conn(r->drv, id, how & 1);
    size_t len = in_len(&r->in);

    if (how & 2 && c.there) { /* all of its credit, or one more */
        len = (size_t)(c.rx_limit - c.rx_count) + !!(how & 4);
    }
    peer_packet(r, how & 1 ? VP_PKT_SERVER : VP_PKT_CLIENT, VP_FLAG_ACK_NOW,
                id, pattern, MIN(len, (size_t)VP_PKT_DATA_LEN), how & 64);
}

static void do_control(Rig *r)
{
    uint8_t msg[64], how = in8(&r->in), which = in8(&r->in);
    uint32_t id = in_id(&r->in);
    size_t len = 1;

    memset(msg, 0x20 + which, sizeof(msg));
    msg[0] = how & 7;
    switch (msg[0]) {
    case VP_MSG_CONNECT_INIT:
        put64(msg + 1, in_count(&r->in));
        msg[9] = which < 8 ? (uint8_t)strlen(services[which % SERVICES])
                           : which % 40;
        if (which < 8) {
            memcpy(msg + 10, services[which % SERVICES], msg[9]);
        }
        len = 10u + msg[9];
        break;
    case VP_MSG_CONNECT_ACK:
    case VP_MSG_WINDOW:
        put64(msg + 1, in_count(&r->in));
        len = 9;
        break;
    case VP_MSG_CONNECT_REFUSED:
    case VP_MSG_RESET:
        msg[1] = which;
        len = 2;
        break;
    case 7: /* one about the session, known or not */
        msg[0] = (uint8_t)(VP_MSG_OPTIONAL + which % 3);
        msg[1] = which / 4;
        len = 2;
        for (int i = 0; i < which / 16 % 4; i++) {
            const char *name = services[in8(&r->in) % SERVICES];

            msg[len] = (uint8_t)strlen(name);
            memcpy(msg + len + 1, name, msg[len]);
            len += 1u + msg[len];
        }
        break;
    }
    if (how & 32) {
        len = in8(&r->in) % sizeof(msg);
    }
    peer_packet(r, VP_PKT_CONTROL, how & 16 ? 0 : VP_FLAG_CLIENT, id, msg,
                len, how & 64);
}

/* do_open() - a connection, without ceremony */
static void do_open(Rig *r)
{
    uint8_t msg[VP_CONTROL_LEN_MAX], which = in8(&r->in);
    const char *service = which % 8 < SERVICES ? services[which % 8] : "both";
    uint32_t id = in_id(&r->in);

    peer_packet(r, VP_PKT_CONTROL, VP_FLAG_CLIENT, id, msg,
                msg_init(msg, service, 1u << 20), 0);
}

static void do_raw(Rig *r)
{
    size_t len = in8(&r->in);

    len = MIN(len, r->in.left);
    peer_write(r, r->in.at, len);
    r->in.at += len;
    r->in.left -= len;
}

static uint32_t in_delta(Input *in)
{
    uint8_t b = in8(in);

    return b < 240 ? (uint32_t)(int8_t)(b - 120) : (uint32_t)b << 24;
}

static void do_hello(Rig *r)
{
    uint8_t how = in8(&r->in), what = in8(&r->in);
    VPHello h = hello_true(r, how & 1 ? peer_token(r)
                                      : mix64(r->token + 0xface));

    if (how & 2) {
        h.echo = how & 4 ? 0 : h.echo + 1;
    }
    if (how & 8) {
        h.my_epoch = how & 16 ? 0 : engine_link(r->drv).epoch[1];
        h.peer_epoch = how & 32 ? 0 : engine_link(r->drv).epoch[0];
    }
    if (how & 64) {
        h.expect += in_delta(&r->in);
        h.base += in_delta(&r->in);
        h.next += in_delta(&r->in);
    }
    if (what & 1) {
        h.flags ^= in8(&r->in);
    }
    if (what & 2) {
        h.version = in8(&r->in);
        h.oldest = h.version > 127 ? in8(&r->in) : h.oldest;
    }
    if (what & 4) {
        h.window = (uint32_t)in_count(&r->in);
        h.max_conns = in8(&r->in);
    }
    if (what & 8) {
        h.token = what & 16 ? engine_link(r->drv).token[0] : 0;
    }
    h.digest += !!(what & 32);
    peer_hello(r, &h, !(what & 64));
}

static int *in_app(Rig *r)
{
    return &r->apps[in8(&r->in) % APPS];
}

static void app_add(Rig *r, int fd)
{
    int *app = &r->apps[r->next_app++ % APPS];

    if (*app >= 0) {
        close(*app);
    }
    *app = fd;
    fd_nonblock(fd);
}

static void do_client(Rig *r)
{
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    box_require(fd >= 0);
    fd_nonblock(fd);
    if (r->oforward_fd >= 0 &&
        connect(fd, (struct sockaddr *)&r->oforward.ss,
                r->oforward.len) == 0) {
        app_add(r, fd);
    } else {
        close(fd);
    }
}

static void do_accept(Rig *r)
{
    uint8_t which = in8(&r->in) % (SERVICES - 1);
    int fd = accept(listeners[which], NULL, NULL);

    if (fd >= 0) {
        app_add(r, fd);
    }
}

static void do_app_write(Rig *r)
{
    int fd = *in_app(r);
    size_t len = in_len(&r->in);

    if (fd >= 0 && send(fd, pattern, len, MSG_NOSIGNAL) < 0) {
        return; /* it takes no more, or the engine reset it */
    }
}

/* do_pump() - one that sends a lot, and a peer that acks it in time */
static void do_pump(Rig *r)
{
    int fd = *in_app(r);
    uint8_t how = in8(&r->in);

    for (int i = 0; i < how % 16 && fd >= 0; i++) {
        if (send(fd, pattern, sizeof(pattern), MSG_NOSIGNAL) < 0) {
            break;
        }
        box_run(r->loop, how & 16 ? 5 * MS : 300);
        peer_read(r);
        peer_packet(r, VP_PKT_ACK, 0, 0, NULL, 0, 0);
    }
}

static void do_app_read(Rig *r)
{
    uint8_t buf[65536];
    int fd = *in_app(r);

    if (fd >= 0 && recv(fd, buf, in_len(&r->in), 0) < 0) {
        return;
    }
}

static void do_app_end(Rig *r)
{
    struct linger reset = { 1, 0 };
    int *app = in_app(r);
    uint8_t how = in8(&r->in) % 4;

    if (*app < 0) {
        return;
    }
    if (how == 0) {
        shutdown(*app, SHUT_WR);
        return;
    }
    if (how == 1) {
        shutdown(*app, SHUT_RD);
        return;
    }
    if (how == 2) {
        setsockopt(*app, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    }
    close(*app);
    *app = -1;
}

static void do_time(Rig *r)
{
    static const uint64_t us[] = {
        100, MS, 11 * MS, 50 * MS, 310 * MS, SECOND, 5 * SECOND, 31 * SECOND,
    };

    box_run(r->loop, us[in8(&r->in) % 8]);
}

static void do_channel(Rig *r)
{
    uint8_t how = in8(&r->in);
    char path[32];

    switch (how % 5) {
    case 0:
        rig_unplug(r);
        box_settle(r->loop);
        break;
    case 1: /* only what we say ends */
        if (r->wr >= 0 && r->wr == r->rd) {
            shutdown(r->wr, SHUT_WR);
        } else if (r->wr >= 0) {
            close(r->wr);
            r->wr = -1;
        }
        box_settle(r->loop);
        break;
    case 2: /* a pipe that is written again */
        if (r->wr < 0 && r->rd >= 0 && engine_link(r->drv).rfd >= 0) {
            snprintf(path, sizeof(path), "/proc/self/fd/%d",
                     engine_link(r->drv).rfd);
            r->wr = open(path, O_WRONLY | O_NONBLOCK);
        }
        break;
    default:
        rig_plug(r, how / 5);
        break;
    }
}

/* do_offer() - a further peer, which says hello or something else */
static void do_offer(Rig *r)
{
    uint8_t how = in8(&r->in), buf[VP_PKT_HDR_LEN + VP_HELLO_LEN] = { how };
    int fds[2];
    static Rig other; /* it has no more than a channel */
    VPHello h = hello_true(r, peer_token(r));

    other.loop = r->loop;
    other.rd = other.wr = -1;
    channel_new(&other, false, fds);
    vp_offer(r->drv, fds[0], VP_ACCEPTED);
    h.echo = how & 32 ? h.echo : engine_counts(r->drv).candidate_token;
    if (how & 1) {
        h.my_epoch = 0;
    }
    if (how & 2) {
        h.version++;
    }
    wire_put_hello(buf, &h, r->config.key.len > 0 ? &r->config.key : NULL);
    buf[3] ^= !!(how & 4);
    peer_write(&other, buf, how & 8 ? how / 2u : sizeof(buf));
    if (how & 64) { /* the present peer has time to answer, or not to */
        box_run(r->loop, 4 * SECOND);
    }
    if (how & 16) {
        rig_unplug(r);
        r->rd = r->wr = other.rd;
    } else {
        rig_unplug(&other);
    }
}

static void do_settings(Rig *r)
{
    uint8_t how = in8(&r->in);
    VPConfig *c = &r->config;

    switch (how % 8) {
    case 0:
        c->max_conns = 1 + how % 7;
        break;
    case 1:
        c->key.len = c->key.len > 0 ? 0 : 20;
        break;
    case 2:
        c->grace = how % 3;
        break;
    case 3:
        vp_del_iforward(r->drv, services[how / 8 % SERVICES]);
        break;
    case 4:
        vp_set_iforward(r->drv, "later", &addrs[how / 8 % SERVICES], 1);
        break;
    case 5:
        vp_conn_reset(r->drv, in_id(&r->in), how & 8);
        break;
    case 6:
        if (r->oforward_fd >= 0) {
            vp_del_oforward(r->drv, r->oforward_fd);
            r->oforward_fd = -1;
        } else {
            rig_listen(r);
        }
        break;
    case 7:
        if (how & 8) {
            vp_reset_all(r->drv);
        }
        break;
    }
    vp_set_config(r->drv, c);
}

static void do_fail(Rig *r)
{
    static const int errors[] = {
        0, ENOMEM, EMFILE, EINTR, EAGAIN, ECONNRESET, EPIPE, EIO,
    };

    box.calls = in8(&r->in) & 127;
    box.after = in8(&r->in);
    box.fails = 1 + in8(&r->in) % 32;
    box.err = errors[in8(&r->in) % 8];
    if (box.err == 0) {
        box.calls &= CALL_READ | CALL_WRITE; /* these can be short */
    }
}

static void count_conn(const VPConnInfo *info, void *opaque)
{
    size_t *n = opaque;

    *n += info->in[0] != '\0' && info->out[0] != '\0';
}

static void do_info(Rig *r)
{
    VPChannelInfo info;
    size_t n = 0;

    vp_channel_info(r->drv, &info);
    vp_conns(r->drv, 0, SIZE_MAX, count_conn, &n);
    box_require(n <= info.conns);
    vp_busy(r->drv);
}

static void do_shake(Rig *r)
{
    peer_shake(r, in8(&r->in) & 1);
}

static void do_deaf(Rig *r)
{
    r->deaf = !r->deaf;
}

static void do_small(Rig *r)
{
    (void)r;
    box.small = !box.small;
}

/* do_hold() - what the peer says in the next ops comes all at once */
static void do_hold(Rig *r)
{
    r->holding = 1 + in8(&r->in) % 64;
}

/* do_other() - beside another channel a peer gets less done in a pass */
static void do_other(Rig *r)
{
    if (r->other == NULL) {
        r->other = vp_new(r->loop, 4, &r->config, rig_lost, NULL);
    } else {
        vp_free(r->other);
        r->other = NULL;
    }
}

static void (*const ops[])(Rig *) = {
    do_open, do_data, do_control, do_packet, do_client, do_accept,
    do_app_write, do_app_read, do_app_end, do_time, do_shake, do_hello,
    do_deaf, do_channel, do_fail, do_settings, do_offer, do_raw, do_info,
    do_pump, do_small, do_hold, do_other,
};

void fuzz_engine(const uint8_t *data, size_t len)
{
    static Rig r;

    rig_new(&r, data, len);
    peer_shake(&r, true);
    for (int i = 0; i < 100 && r.in.left > 0; i++) {
        ops[in8(&r.in) % (sizeof(ops) / sizeof(ops[0]))](&r);
        if (r.holding > 0 && --r.holding == 0) {
            peer_release(&r);
        }
        box_settle(r.loop);
        peer_read(&r);
        rig_check(&r);
    }
    rig_free(&r);
}

/* ---- the parser ------------------------------------------------------- */

/* A driver that is up, and takes bytes without a channel. */
typedef struct Parser {
    VPLoop *loop;
    VPDriver *drv;
    int fd;
} Parser;

static void parser_new(Parser *p, bool up)
{
    static const VPConfig config = {
        .grace = 30, .max_conns = 4, .max_half_open = 4, .max_opens = 1000,
    };
    int fds[2];

    box_require(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    fd_nonblock(fds[0]);
    p->fd = fds[1];
    p->loop = engine_loop_new();
    p->drv = vp_new(p->loop, 1, &config, rig_lost, NULL);
    box_require(vp_attach(p->drv, fds[0], fds[0], VP_CHN_SOCKET,
                           VP_OPENED) == 0);
    engine_greet(p->drv, 0x1111, up ? 0x2222 : 0);
}

static void parser_free(Parser *p)
{
    vp_free(p->drv);
    vp_loop_free(p->loop);
    close(p->fd);
}

/* headers_mend() - give what looks like packets checks that are right */
static void headers_mend(uint8_t *p, size_t len, const EngineLink *l)
{
    uint32_t seq = VP_SEQ_FIRST;

    while (len >= VP_PKT_HDR_LEN) {
        bool hello = p[16] == VP_PKT_HELLO;
        VPPacket pkt = {
            .type = p[16],
            .flags = p[17],
            .bytes = get16(p + 18) & (p[0] & 1 ? 0xffff : 0x7f),
            .conn = get32(p + 20),
            .seq = p[0] & 2 ? get32(p + 24) : seq,
            .ack = p[0] & 4 ? get32(p + 28) : VP_SEQ_FIRST,
            .time = get32(p + 32),
            .delay = get32(p + 36),
            .data_check = get64(p + 8),
        };
        size_t total = VP_PKT_HDR_LEN + pkt.bytes;

        if (!(p[0] & 8) && len >= total) {
            pkt.data_check = hello && pkt.bytes >= VP_HELLO_TOKEN_AT + 8
                ? hello_data_check(p + VP_PKT_HDR_LEN, pkt.bytes)
                : wire_data_check(l->rx_payload_key, p + VP_PKT_HDR_LEN,
                                  pkt.bytes);
        }
        seq += pkt.type >= VP_PKT_CONTROL && pkt.type <= VP_PKT_SERVER;
        if (!(p[0] & 16)) {
            wire_put(p, &pkt, hello ? &hello_key : l->rx_key, 0);
        }
        p += MIN(total, len);
        len -= MIN(total, len);
    }
}

/* headers_round() - what was read is what would have been written */
static void headers_round(const uint8_t *p, size_t len, const VPHeaderKey *key)
{
    uint8_t again[VP_PKT_HDR_LEN + VP_HELLO_LEN];
    VPPacket pkt;
    VPHello h;
    int n;

    if (len >= VP_PKT_HDR_LEN && wire_get(p, &pkt, key, 0)) {
        wire_put(again, &pkt, key, 0);
        box_require(memcmp(again, p, VP_PKT_HDR_LEN) == 0);
    }
    n = wire_get_hello(p, len, &h);
    box_require(n <= (int)len && n <= VP_PKT_HDR_LEN + VP_HELLO_LEN_MAX);
    if (n > 0 && hello_version(&h) != 0) {
        wire_put_hello(again, &h, NULL);
        box_require(memcmp(again + VP_PKT_HDR_LEN, p + VP_PKT_HDR_LEN,
                            VP_HELLO_PROOF_AT) == 0);
    }
}

/*
 * fuzz_packet() - the same bytes in one piece and in small ones
 *
 * Where they are cut must make no difference to what is understood.
 */
void fuzz_packet(const uint8_t *data, size_t len)
{
    static uint8_t stream[VP_RX_LEN_MIN / 2];
    uint8_t how = len > 0 ? data[0] : 0;
    size_t step = (size_t)(how >> 3) + 1;
    Parser whole, pieces;
    EngineLink a, b;

    world_new();
    box_reset(true);
    log_clear();
    parser_new(&whole, how & 1);
    parser_new(&pieces, how & 1);
    a = engine_link(whole.drv);
    len = len > 0 ? MIN(len - 1, sizeof(stream)) : 0;
    memcpy(stream, data + 1, len);
    if (how & 2) {
        headers_mend(stream, len, &a);
    }
    headers_round(stream, len, a.rx_key);
    box_require(engine_take(whole.drv, stream, len));
    for (size_t at = 0; at < len; at += step) {
        box_require(engine_take(pieces.drv, stream + at,
                                 MIN(step, len - at)));
    }
    a = engine_link(whole.drv);
    b = engine_link(pieces.drv);
    box_require(strcmp(a.state, b.state) == 0 && a.expect == b.expect &&
                 a.rx_digest == b.rx_digest && a.heard == b.heard &&
                 a.base == b.base);
    parser_free(&whole);
    parser_free(&pieces);
    box_require(box.blocks == 0);
}
