/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_other.c - a second implementation of the wire, against the daemon
 *
 * It was written from README's section THE WIRE and has no line of the engine
 * in it: what that section doesn't say, or says wrongly, fails here.  It sends
 * little, and waits for an answer each time.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "tests/lib/harness.h"

enum { HEADER = 40, HELLO_BYTES = 112, PROOF_AT = 80, KEPT = 64 };

enum { CONTROL = 1, CLIENT, SERVER, HELLO, ACK, PING };

enum { INIT = 1, CONNECTED, REFUSED, WINDOW, CLOSE, RESET };
enum { SERVICES = 128, PROGRAM };

enum { HELLO_UP = 1, HELLO_KEYED = 2, HELLO_CONNECTOR = 8, HELLO_BYE = 16 };

#define HELLO_SEED 0x71656d752d767031 /* "qemu-vp1" */
#define FIRST 0xfffffc18u

typedef struct Packet {
    int type;
    int flags;
    uint32_t conn;
    uint32_t seq;
    uint32_t ack;
    uint32_t time;
    size_t len;
    uint8_t data[65536];
} Packet;

/* What was sent, and may have to be sent again */
typedef struct Sent {
    int type;
    int flags;
    uint32_t conn;
    size_t len;
    uint8_t data[2048];
    uint64_t digest; /* of all packets up to this one */
} Sent;

typedef struct Hello {
    uint16_t newest, oldest;
    uint32_t flags, window, expect, base, next, max_conns;
    uint64_t token, echo, my_epoch, peer_epoch, digest;
} Hello;

typedef struct Other {
    char where[PATH_LEN];
    int fd;
    const char *secret;
    uint64_t token[2];  /* ours, theirs: of this handshake; 0: not heard */
    uint64_t epoch[2];  /* ours, theirs: of the session; 0: none */
    bool resumed;       /* the last handshake went on with a session */
    Hello claim;        /* what this handshake says of the session */
    uint32_t base;      /* number of the oldest packet that is not acked */
    uint32_t next;      /* number of the next packet */
    Sent sent[KEPT];    /* by number, modulo KEPT */
    uint64_t digest0;   /* of all packets before the first one */
    uint32_t expect;    /* number of the packet that comes next */
    uint64_t digest;    /* of all packets that came */
    uint32_t delay;     /* of the newest one */
    uint8_t in[1 << 17];
    size_t in_len;
    char offers[1000];  /* services that the daemon named, with blanks */
    char program[100];
} Other;

/* ---- numbers ------------------------------------------------------------ */

static void put(uint8_t *p, size_t bytes, uint64_t v)
{
    while (bytes-- > 0) {
        p[bytes] = (uint8_t)v;
        v >>= 8;
    }
}

static uint64_t get(const uint8_t *p, size_t bytes)
{
    uint64_t v = 0;

    for (size_t i = 0; i < bytes; i++) {
        v = v << 8 | p[i];
    }
    return v;
}

static uint64_t draw(void)
{
    static FILE *f;
    uint8_t bytes[8];

    f = f != NULL ? f : fopen("/dev/urandom", "r");
    ck_assert(f != NULL && fread(bytes, sizeof(bytes), 1, f) == 1);
    return get(bytes, 8) | 1;
}

static uint32_t clock_now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint32_t)((uint64_t)ts.tv_sec * 1000000 +
                      (uint64_t)ts.tv_nsec / 1000);
}

/* ---- HMAC-SHA-256 (RFC 6234, RFC 2104) ---------------------------------- */

static uint32_t turn(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

/*
 * root() - 32 bits behind the point of the @n-th prime's square or cube root
 *
 * The constants of SHA-256 are made of these.
 */
static uint32_t root(int n, bool cube)
{
    uint64_t prime = 1, low = 0, high = (uint64_t)1 << 36;

    while (n >= 0) {
        bool is = true;

        prime++;
        for (uint64_t d = 2; d * d <= prime; d++) {
            is = is && prime % d != 0;
        }
        n -= is;
    }
    while (high - low > 1) { /* the root times 2^32, in whole numbers */
        uint64_t mid = (low + high) / 2;
        double x = (double)mid / 4294967296.0; /* 53 bits, of which 35 count */

        if (x * x * (cube ? x : 1) <= (double)prime) {
            low = mid;
        } else {
            high = mid;
        }
    }
    return (uint32_t)low;
}

static void sha256(const uint8_t *data, size_t len, uint8_t out[32])
{
    static uint32_t k[64], start[8];
    uint8_t text[4096] = { 0 };
    size_t total = (len + 9 + 63) / 64 * 64;
    uint32_t h[8];

    if (k[0] == 0) {
        for (int i = 0; i < 64; i++) {
            k[i] = root(i, true);
            start[i % 8] = root(i % 8, false);
        }
    }
    ck_assert_uint_le(total, sizeof(text));
    memcpy(text, data, len);
    text[len] = 0x80;
    put(text + total - 8, 8, 8 * len);
    memcpy(h, start, sizeof(h));
    for (size_t at = 0; at < total; at += 64) {
        uint32_t w[64], v[8];

        memcpy(v, h, sizeof(v));
        for (int i = 0; i < 64; i++) {
            uint32_t s0, s1, t;

            if (i < 16) {
                w[i] = (uint32_t)get(text + at + 4 * (size_t)i, 4);
            } else {
                s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
                s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
                w[i] = w[i - 16] + s0 + w[i - 7] + s1;
            }
            t = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) +
                ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            v[7] = t + (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) +
                   ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            v[3] += t;
            t = v[7]; /* turn all eight by one place */
            memmove(v + 1, v, 7 * sizeof(v[0]));
            v[0] = t;
        }
        for (int i = 0; i < 8; i++) {
            h[i] += v[i];
        }
    }
    for (size_t i = 0; i < 8; i++) {
        put(out + 4 * i, 4, h[i]);
    }
}

static void hmac(const char *secret, const uint8_t *data, size_t len,
                 uint8_t out[32])
{
    uint8_t text[2048];
    size_t secret_len = strlen(secret);

    ck_assert(secret_len <= 64 && len <= sizeof(text) - 64);
    for (int part = 0; part < 2; part++) {
        for (size_t i = 0; i < 64; i++) {
            text[i] = (uint8_t)((i < secret_len ? secret[i] : 0) ^
                                (part == 0 ? 0x36 : 0x5c));
        }
        memcpy(text + 64, part == 0 ? data : out, part == 0 ? len : 32);
        sha256(text, 64 + (part == 0 ? len : 32), out);
    }
}

/* ---- checks ------------------------------------------------------------- */

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9;
    x ^= x >> 27;
    x *= 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t plain_seed(uint64_t a, uint64_t b)
{
    return mix(mix(a) + b);
}

static uint64_t seed(const Other *o, uint64_t a, uint64_t b)
{
    uint8_t text[7 + 16] = "packets", out[32];

    if (o->secret == NULL) {
        return plain_seed(a, b);
    }
    put(text + 7, 8, a);
    put(text + 15, 8, b);
    hmac(o->secret, text, sizeof(text), out);
    return get(out, 8);
}

static uint64_t key_word(uint64_t s, uint64_t n)
{
    return mix(s + n * 0x9e3779b97f4a7c15);
}

static uint64_t sum(uint64_t s, const uint8_t *p, size_t len)
{
    uint64_t all = 0;

    for (size_t i = 0; 8 * i < len; i++) {
        uint64_t word = 0;

        for (size_t k = 8; k-- > 0;) {
            word = word << 8 | (8 * i + k < len ? p[8 * i + k] : 0);
        }
        word += key_word(s, i + 1);
        all += (word & 0xffffffff) * (word >> 32);
    }
    return all;
}

static uint64_t check(uint64_t s, uint64_t digest, const uint8_t *header)
{
    return key_word(s, 5) + digest + sum(s, header + 8, 32);
}

static uint64_t data_check(uint64_t s, const uint8_t *p, size_t len)
{
    uint64_t x = len;

    for (size_t at = 0; at < len; at += 1024) {
        x = mix(x + sum(~s, p + at, len - at < 1024 ? len - at : 1024));
    }
    return len > 0 ? x : 0;
}

static uint64_t digest_of(uint64_t before, uint64_t check_of_data, int type,
                          int flags, size_t len, uint32_t conn)
{
    uint8_t about[8] = { (uint8_t)(flags & 1), (uint8_t)type };

    put(about + 2, 2, len);
    put(about + 4, 4, conn);
    return mix(before ^ check_of_data) + get(about, 8);
}

/* sent_digest() - of all packets that we sent before @seq */
static uint64_t sent_digest(const Other *o, uint32_t seq)
{
    return seq == FIRST ? o->digest0 : o->sent[(seq - 1) % KEPT].digest;
}

/* ---- packets ------------------------------------------------------------ */

/* send_packet() - @seq is its number, or that of the next one */
static void send_packet(Other *o, int type, int flags, uint32_t conn,
                        uint32_t seq, const uint8_t *data, size_t len)
{
    uint64_t s = seed(o, o->token[0], o->token[1]);
    uint8_t p[HEADER + 4096] = { 0 };

    if (len > 0) {
        memcpy(p + HEADER, data, len);
    }
    put(p + 8, 8, data_check(seed(o, o->epoch[0], o->epoch[1]), data, len));
    p[16] = (uint8_t)type;
    p[17] = (uint8_t)flags;
    put(p + 18, 2, len);
    put(p + 20, 4, conn);
    put(p + 24, 4, seq);
    put(p + 28, 4, o->expect);
    put(p + 32, 4, clock_now());
    put(p + 36, 4, o->delay);
    put(p, 8, check(s, o->digest, p));
    if (o->fd >= 0) {
        send_all(o->fd, p, HEADER + len);
    }
}

/* send_new() - a packet that is kept until it is acknowledged */
static void send_new(Other *o, int type, int flags, uint32_t conn,
                     const void *data, size_t len)
{
    Sent *s = &o->sent[o->next % KEPT];
    uint64_t c = data_check(seed(o, o->epoch[0], o->epoch[1]), data, len);

    ck_assert_uint_lt(o->next - o->base, KEPT);
    s->type = type;
    s->flags = flags;
    s->conn = conn;
    s->len = len;
    memcpy(s->data, data, len);
    s->digest = digest_of(sent_digest(o, o->next), c, type, flags, len, conn);
    send_packet(o, type, flags, conn, o->next++, data, len);
}

static void send_hello(Other *o, uint32_t flags)
{
    uint8_t p[HEADER + HELLO_BYTES] = { 0 }, *d = p + HEADER;
    uint8_t text[5 + PROOF_AT] = "hello";

    put(d, 2, 3);
    put(d + 2, 2, 3);
    put(d + 4, 4, flags | HELLO_CONNECTOR |
                  (o->secret != NULL ? HELLO_KEYED : 0u));
    put(d + 12, 4, 4096);
    put(d + 16, 8, o->token[0]);
    put(d + 24, 8, o->token[1]);
    put(d + 32, 8, o->claim.my_epoch);
    put(d + 40, 8, o->claim.peer_epoch);
    put(d + 48, 8, o->claim.digest);
    put(d + 56, 4, o->claim.expect);
    put(d + 60, 4, o->claim.base);
    put(d + 64, 4, o->claim.next);
    put(d + 68, 4, 10);
    put(d + 72, 8, draw());
    if (o->secret != NULL) {
        memcpy(text + 5, d, PROOF_AT);
        hmac(o->secret, text, sizeof(text), d + PROOF_AT);
    }
    put(p + 8, 8, data_check(plain_seed(HELLO_SEED, o->token[0]), d,
                             HELLO_BYTES));
    p[16] = HELLO;
    put(p + 18, 2, HELLO_BYTES);
    put(p, 8, check(HELLO_SEED, 0, p));
    send_all(o->fd, p, sizeof(p));
}

/* next_bytes() - have the next whole packet at the front of o->in */
static void next_bytes(Other *o)
{
    while (o->in_len < HEADER || o->in_len < HEADER + get(o->in + 18, 2)) {
        ssize_t n = recv(o->fd, o->in + o->in_len,
                         sizeof(o->in) - o->in_len, 0);

        ck_assert_msg(n > 0, "the daemon says nothing: %s",
                      n < 0 ? strerror(errno) : "end of data");
        o->in_len += (size_t)n;
    }
}

static void drop_bytes(Other *o)
{
    size_t len = HEADER + get(o->in + 18, 2);

    o->in_len -= len;
    memmove(o->in, o->in + len, o->in_len);
}

/* get_hello() - at the front of o->in; false if there is another packet */
static bool get_hello(Other *o, Hello *h)
{
    uint8_t *p = o->in, *d = p + HEADER, text[5 + 1024] = "hello", proof[32];
    size_t len = get(p + 18, 2), behind = PROOF_AT + 32;

    if (p[16] != HELLO || get(p, 8) != check(HELLO_SEED, 0, p)) {
        return false;
    }
    ck_assert(len >= HELLO_BYTES && len <= 1024);
    h->token = get(d + 16, 8);
    ck_assert_uint_eq(get(p + 8, 8),
                      data_check(plain_seed(HELLO_SEED, h->token), d, len));
    h->newest = (uint16_t)get(d, 2);
    h->oldest = (uint16_t)get(d + 2, 2);
    h->flags = (uint32_t)get(d + 4, 4);
    h->window = (uint32_t)get(d + 12, 4);
    h->echo = get(d + 24, 8);
    h->my_epoch = get(d + 32, 8);
    h->peer_epoch = get(d + 40, 8);
    h->digest = get(d + 48, 8);
    h->expect = (uint32_t)get(d + 56, 4);
    h->base = (uint32_t)get(d + 60, 4);
    h->next = (uint32_t)get(d + 64, 4);
    h->max_conns = (uint32_t)get(d + 68, 4);
    ck_assert(h->oldest <= 3 && h->newest >= 3 && h->token != 0);
    ck_assert_int_eq(!!(h->flags & HELLO_KEYED), o->secret != NULL);
    if (o->secret != NULL) {
        memcpy(text + 5, d, PROOF_AT);
        memcpy(text + 5 + PROOF_AT, d + behind, len - behind);
        hmac(o->secret, text, 5 + len - 32, proof);
        ck_assert_mem_eq(d + PROOF_AT, proof, 32);
    }
    return true;
}

/* ---- the handshake ------------------------------------------------------ */

/* claim() - a new token, and what this side holds now */
static void claim(Other *o)
{
    o->token[0] = draw();
    o->token[1] = 0;
    o->claim = (Hello){
        .my_epoch = o->epoch[0], .peer_epoch = o->epoch[1],
        .digest = o->digest, .expect = o->expect,
        .base = o->base, .next = o->next,
    };
}

/* agree() - it echoed our token: one session goes on, or another begins */
static void agree(Other *o, const Hello *h)
{
    o->resumed = o->epoch[0] != 0 && h->my_epoch == o->epoch[1] &&
                 h->peer_epoch == o->epoch[0];
    if (!o->resumed) {
        o->epoch[0] = o->token[0];
        o->epoch[1] = o->token[1];
        o->base = o->next = o->expect = FIRST;
        o->digest = o->digest0 = 0;
        o->delay = 0;
    } else {
        ck_assert(h->expect - o->base <= o->next - o->base);
        ck_assert_uint_eq(h->digest, sent_digest(o, h->expect));
        ck_assert(h->next - o->expect < KEPT && o->expect - h->base < KEPT);
        o->base = h->expect;
    }
    send_hello(o, HELLO_UP);
    for (uint32_t n = o->base; n != o->next; n++) {
        const Sent *s = &o->sent[n % KEPT];

        send_packet(o, s->type, s->flags, s->conn, n, s->data, s->len);
    }
}

/* heard() - a HELLO; true: with it the handshake is done */
static bool heard(Other *o, const Hello *h)
{
    bool news = h->token != o->token[1];

    ck_assert(!(h->flags & HELLO_BYE));
    o->token[1] = h->token;
    if (h->echo == o->token[0]) {
        agree(o, h);
        return true;
    }
    if (news) {
        send_hello(o, 0);
    }
    return false;
}

static void shake(Other *o)
{
    Hello h;

    claim(o);
    send_hello(o, 0);
    for (;;) {
        bool is_hello, done;

        next_bytes(o);
        is_hello = get_hello(o, &h);
        drop_bytes(o); /* what is none is from before */
        done = is_hello && heard(o, &h);
        if (done) {
            return;
        }
    }
}

static void meet(Other *o)
{
    o->fd = dial(o->where, true);
    o->in_len = 0;
    shake(o);
}

/* ---- receiving ---------------------------------------------------------- */

/* next_packet() - of those that are counted; others are dealt with */
static void next_packet(Other *o, Packet *pkt)
{
    for (;;) {
        uint64_t s, c;
        uint8_t *p = o->in;
        Hello h;

        next_bytes(o);
        if (get_hello(o, &h)) {
            drop_bytes(o);
            if (h.token != o->token[1] || h.echo != o->token[0]) {
                claim(o); /* a new handshake */
                if (!heard(o, &h)) {
                    shake(o);
                }
            }
            continue;
        }
        s = seed(o, o->token[1], o->token[0]);
        pkt->ack = (uint32_t)get(p + 28, 4);
        ck_assert(pkt->ack - o->base <= o->next - o->base);
        ck_assert_uint_eq(get(p, 8), check(s, sent_digest(o, pkt->ack), p));
        pkt->type = p[16];
        pkt->flags = p[17];
        pkt->len = get(p + 18, 2);
        pkt->conn = (uint32_t)get(p + 20, 4);
        pkt->seq = (uint32_t)get(p + 24, 4);
        pkt->time = (uint32_t)get(p + 32, 4);
        ck_assert_uint_eq(pkt->seq, o->expect);
        memcpy(pkt->data, p + HEADER, pkt->len);
        c = get(p + 8, 8);
        drop_bytes(o);
        s = seed(o, o->epoch[1], o->epoch[0]);
        ck_assert_uint_eq(c, data_check(s, pkt->data, pkt->len));
        o->base = pkt->ack;
        o->delay = clock_now() - pkt->time;
        if (pkt->type <= SERVER) {
            o->expect++;
            o->digest = digest_of(o->digest, c, pkt->type, pkt->flags,
                                  pkt->len, pkt->conn);
        } else {
            ck_assert(pkt->type == ACK || pkt->type == PING);
        }
        if (pkt->type != ACK) {
            send_packet(o, ACK, 0, 0, o->next, NULL, 0);
        }
        if (pkt->type <= SERVER) {
            return;
        }
    }
}

/* note_session() - a message about the session */
static void note_session(Other *o, const Packet *pkt)
{
    ck_assert_uint_eq(pkt->conn, 0);
    if (pkt->data[0] == PROGRAM) {
        snprintf(o->program, sizeof(o->program), "%.*s", (int)pkt->len - 1,
                 (const char *)pkt->data + 1);
    }
    if (pkt->data[0] != SERVICES) {
        return;
    }
    if (pkt->data[1] & 1) {
        o->offers[0] = '\0';
    }
    for (size_t at = 2; at < pkt->len; at += 1u + pkt->data[at]) {
        size_t used = strlen(o->offers);

        snprintf(o->offers + used, sizeof(o->offers) - used, "%.*s ",
                 pkt->data[at], (const char *)pkt->data + at + 1);
    }
}

/* expect() - the next packet about a connection; it is of @type */
static void expect(Other *o, Packet *pkt, int type, uint32_t conn)
{
    do {
        next_packet(o, pkt);
        if (pkt->type == CONTROL && pkt->data[0] >= SERVICES) {
            note_session(o, pkt);
        }
    } while (pkt->type == CONTROL &&
             (pkt->data[0] >= SERVICES || pkt->data[0] == WINDOW));
    ck_assert_msg(pkt->type == type && pkt->conn == conn,
                  "type %d, connection %u, first byte %d where %d of %u is due",
                  pkt->type, pkt->conn, pkt->data[0], type, conn);
}

static void expect_control(Other *o, Packet *pkt, uint32_t conn, int message)
{
    expect(o, pkt, CONTROL, conn);
    ck_assert_int_eq(pkt->data[0], message);
}

/* expect_data() - @len bytes, in however many packets */
static void expect_data(Other *o, int type, uint32_t conn, const void *data,
                        size_t len)
{
    static Packet pkt;
    size_t got = 0;

    while (got < len) {
        expect(o, &pkt, type, conn);
        ck_assert(pkt.len > 0 && got + pkt.len <= len);
        ck_assert_mem_eq(pkt.data, (const uint8_t *)data + got, pkt.len);
        got += pkt.len;
    }
}

/* ---- connections -------------------------------------------------------- */

/* open_conn() - we are the client's side of it */
static void open_conn(Other *o, uint32_t conn, const char *service)
{
    uint8_t msg[200] = { INIT };
    size_t len = strlen(service);

    put(msg + 1, 8, 1 << 20);
    msg[9] = (uint8_t)len;
    memcpy(msg + 10, service, len);
    memcpy(msg + 10 + len, "\4\300\0\2\7\300\0\2\10\1\2\0\26", 13);
    send_new(o, CONTROL, 1, conn, msg, 10 + len + 13);
}

static void control(Other *o, bool client, uint32_t conn, int message,
                    int reason)
{
    uint8_t msg[2] = { (uint8_t)message, (uint8_t)reason };

    send_new(o, CONTROL, client, conn, msg, message == CLOSE ? 1 : 2);
}

/* ---- the tests ---------------------------------------------------------- */

static const char secret[] = "0123456789abcdef0123456789abcdef";

/* A daemon, its target, and the other implementation on its channel */
typedef struct Scene {
    Daemon *d;
    int listener;
    char where[TEXT_LEN]; /* of its oforward "back" */
    Other o;
} Scene;

static void scene_new(Scene *s, bool keyed)
{
    char target[TEXT_LEN], option[TEXT_LEN + PATH_LEN] = "", key[PATH_LEN];
    FILE *f;

    memset(s, 0, sizeof(*s));
    s->o.fd = -1;
    s->listener = listen_any(target);
    file_path(s->o.where, "channel");
    if (keyed) {
        file_path(key, "key");
        umask(077);
        f = fopen(key, "w");
        ck_assert(f != NULL && fputs(secret, f) >= 0 && fclose(f) == 0);
        text_format(option, sizeof(option), "-k %s", key);
        s->o.secret = secret;
    }
    s->d = daemon_start("host", "-v -c unix-listen:%s:- -i echo:%s "
                        "-i second:%s -o back:127.0.0.1:0 %s", s->o.where,
                        target, target, option);
    text_format(s->where, TEXT_LEN, "%s", daemon_listens(s->d, "back"));
    meet(&s->o);
    ck_assert(!s->o.resumed);
}

static void scene_end(Scene *s)
{
    close(s->o.fd);
    close(s->listener);
    daemon_kill(s->d); /* in order it would wait for the acks of its goodbye */
}

/* A connection from here, its data early, half-closed, answered, closed */
START_TEST(from_here)
{
    static Scene s;
    static Packet pkt;
    int fd;

    scene_new(&s, _i);
    open_conn(&s.o, 7, "echo");
    send_new(&s.o, CLIENT, 0, 7, "early", 5);
    fd = accept_one(s.listener);
    expect_control(&s.o, &pkt, 7, CONNECTED);
    ck_assert_uint_eq(pkt.len, 9);
    ck_assert_int_eq(pkt.flags & 1, 0);
    ck_assert_uint_ge(get(pkt.data + 1, 8), 4096);
    expect_bytes(fd, "early");
    control(&s.o, true, 7, CLOSE, 0);
    expect_eof(fd);
    send_all(fd, "the answer", 10);
    expect_data(&s.o, SERVER, 7, "the answer", 10);
    close(fd);
    expect_control(&s.o, &pkt, 7, CLOSE);
    ck_assert_str_eq(s.o.offers, "echo second ");
    ck_assert_ptr_nonnull(strchr(s.o.program, '.'));
    daemon_wait(s.d, "echo: connection 7 to .* for 192.0.2.7:258$");
    /* the id is free again */
    open_conn(&s.o, 7, "nobody");
    expect_control(&s.o, &pkt, 7, REFUSED);
    ck_assert_int_eq(pkt.data[1], 1);
    open_conn(&s.o, 7, "second");
    fd = accept_one(s.listener);
    expect_control(&s.o, &pkt, 7, CONNECTED);
    control(&s.o, true, 7, RESET, 0);
    expect_reset(fd);
    close(fd);
    scene_end(&s);
}
END_TEST

/* serve() - the daemon's client @fd is our service's; returns its id */
static uint32_t serve(Scene *s, int fd)
{
    struct sockaddr_in sin;
    socklen_t len = sizeof(sin);
    static Packet pkt;
    uint8_t want[13] = { 4, 127, 0, 0, 1, 127, 0, 0, 1 };

    do {
        next_packet(&s->o, &pkt);
    } while (pkt.data[0] >= SERVICES);
    ck_assert(pkt.type == CONTROL && pkt.data[0] == INIT);
    ck_assert_int_eq(pkt.flags & 1, 1);
    ck_assert(pkt.data[9] == 4 && memcmp(pkt.data + 10, "back", 4) == 0);
    ck_assert(getsockname(fd, (struct sockaddr *)&sin, &len) == 0);
    put(want + 9, 2, ntohs(sin.sin_port));
    put(want + 11, 2, (uint64_t)port_of(s->where));
    ck_assert_mem_eq(pkt.data + 14, want, sizeof(want));
    return pkt.conn;
}

/* Connections from there: half-closed by their client, refused, reset */
START_TEST(from_there)
{
    uint8_t credit[9] = { CONNECTED };
    static Scene s;
    static Packet pkt;
    uint32_t conn;
    int fd;

    scene_new(&s, _i);
    put(credit + 1, 8, 1 << 20);
    fd = dial(s.where, true);
    send_all(fd, "a question", 10);
    conn = serve(&s, fd);
    expect_data(&s.o, CLIENT, conn, "a question", 10);
    send_new(&s.o, CONTROL, 0, conn, credit, sizeof(credit));
    shutdown(fd, SHUT_WR);
    expect_control(&s.o, &pkt, conn, CLOSE);
    send_new(&s.o, SERVER, 0, conn, "said late", 9);
    expect_bytes(fd, "said late");
    control(&s.o, false, conn, CLOSE, 0);
    expect_eof(fd);
    close(fd);
    for (int how = REFUSED; how <= RESET; how += RESET - REFUSED) {
        fd = dial(s.where, true);
        conn = serve(&s, fd);
        if (how == RESET) {
            send_new(&s.o, CONTROL, 0, conn, credit, sizeof(credit));
        }
        control(&s.o, false, conn, how, 2);
        expect_reset(fd);
        close(fd);
    }
    daemon_wait(s.d, "back: connection from .* refused: .*by the target");
    scene_end(&s);
}
END_TEST

/* The channel is cut while bytes are on their way both ways, and comes back. */
START_TEST(cut)
{
    static uint8_t bulk[3000];
    static Scene s;
    static Packet pkt;
    uint8_t got[sizeof(bulk)];
    int fd, lost;

    scene_new(&s, _i);
    for (size_t i = 0; i < sizeof(bulk); i++) {
        bulk[i] = (uint8_t)(i * 7 + i / 256);
    }
    open_conn(&s.o, 9, "echo");
    fd = accept_one(s.listener);
    expect_control(&s.o, &pkt, 9, CONNECTED);
    for (int round = 0; round < 5; round++) {
        send_new(&s.o, CLIENT, 0, 9, bulk, 1000);
        send_all(fd, bulk, sizeof(bulk)); /* and we don't read it */
        lost = s.o.fd;
        if (round % 2 == 0) {
            recv_all(fd, got, 1000); /* the daemon has it */
        } else {
            s.o.fd = -1; /* this one is lost */
        }
        send_new(&s.o, CLIENT, 0, 9, bulk + 1000, 2000);
        close(lost);
        meet(&s.o);
        ck_assert(s.o.resumed);
        recv_all(fd, got, round % 2 == 0 ? 2000 : 3000);
        ck_assert_mem_eq(got, bulk + (round % 2 == 0 ? 1000 : 0),
                         round % 2 == 0 ? 2000 : 3000);
        expect_data(&s.o, SERVER, 9, bulk, sizeof(bulk));
    }
    control(&s.o, true, 9, CLOSE, 0);
    expect_eof(fd);
    close(fd);
    expect_control(&s.o, &pkt, 9, CLOSE);
    /* a peer that has forgotten the session: what was open is reset */
    open_conn(&s.o, 9, "echo");
    fd = accept_one(s.listener);
    expect_control(&s.o, &pkt, 9, CONNECTED);
    close(s.o.fd);
    s.o.epoch[0] = s.o.epoch[1] = 0;
    meet(&s.o);
    ck_assert(!s.o.resumed);
    expect_reset(fd);
    close(fd);
    scene_end(&s);
}
END_TEST

/* A damaged byte costs a handshake, and no more. */
START_TEST(damaged)
{
    static Scene s;
    static Packet pkt;
    int fd;

    scene_new(&s, _i);
    open_conn(&s.o, 3, "echo");
    fd = accept_one(s.listener);
    expect_control(&s.o, &pkt, 3, CONNECTED);
    send_all(s.o.fd, "x", 1);
    send_new(&s.o, CLIENT, 0, 3, "whole", 5);
    send_all(fd, "sound", 5);
    expect_data(&s.o, SERVER, 3, "sound", 5);
    ck_assert(s.o.resumed);
    expect_bytes(fd, "whole");
    close(fd);
    scene_end(&s);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("other");

    SUITE_LOOP(s, from_here, 2);
    SUITE_LOOP(s, from_there, 2);
    SUITE_LOOP(s, cut, 2);
    SUITE_LOOP(s, damaged, 2);
    return harness_run(s);
}
