/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_wire.c - what a packet looks like, byte by byte, and what its check
 * catches
 *
 * The numbers in here are the protocol: a change of them is a change of
 * VP_VERSION.
 */
#include "tests/lib/rig.h"

#define SEED 0x0123456789abcdefull

static VPHeaderKey head_key;
static VPPayloadKey data_key;

/* keys_set() - make both keys of SEED; the setup of each test */
static void keys_set(void)
{
    header_key(&head_key, SEED);
    payload_key(&data_key, SEED);
}

/* data_check() - of a payload, with the key of SEED */
static uint64_t data_check(const uint8_t *p, size_t len)
{
    return wire_data_check(&data_key, p, len);
}

/* ---- the check -------------------------------------------------------- */

/* naive_sum() - of a block, as README has it, one byte at a time */
static uint64_t naive_sum(uint64_t seed, const uint8_t *p, size_t len)
{
    uint64_t sum = 0;

    for (size_t i = 0; 8 * i < len; i++) {
        uint64_t word = mix64(seed + (i + 1) * 0x9e3779b97f4a7c15);

        for (size_t j = 8 * i; j < 8 * i + 8 && j < len; j++) {
            word += (uint64_t)p[j] << (j % 8 * 8);
        }
        sum += (uint32_t)word * (word >> 32);
    }
    return sum;
}

static uint64_t naive_check(uint64_t seed, const uint8_t *p, size_t len)
{
    uint64_t x = len;

    for (size_t at = 0; at < len; at += 1024) {
        x = mix64(x + naive_sum(~seed, p + at, MIN(len - at, 1024)));
    }
    return x;
}

/* Contents that make every kind of carry: a flipped bit adds or takes away */
enum { ZEROS, ONES, MIXED, CONTENTS };

static void contents(uint8_t *p, size_t len, int which)
{
    bytes_fill(p, len, 1, 0);
    if (which != MIXED) {
        memset(p, which == ZEROS ? 0 : 0xff, len);
    }
}

static void flip(uint8_t *p, size_t bit)
{
    p[bit / 8] ^= (uint8_t)(1u << bit % 8);
}

START_TEST(check_reference)
{
    static const size_t far[] = {
        4095, 4096, 4097, 32727, 32728, 32729, 64511, 64512, 64513, 65487,
        65488, 65489, 65495, 65496, 65535,
    };
    static uint8_t p[65536];

    for (int which = 0; which < CONTENTS; which++) {
        contents(p, sizeof(p), which);
        for (size_t len = 0; len <= 2100; len++) {
            check_that(data_check(p, len) == naive_check(SEED, p, len),
                       "differs for %zu bytes", len);
        }
        for (int i = 0; i < COUNT_OF(far); i++) {
            ck_assert_uint_eq(data_check(p, far[i]),
                              naive_check(SEED, p, far[i]));
        }
    }
}
END_TEST

/* All ways to add do the same, whichever the processor makes us choose. */
START_TEST(check_ways)
{
    static uint8_t p[VP_CHECK_BLOCK + 32];

    for (int which = 0; which < CONTENTS; which++) {
        contents(p, sizeof(p), which);
        for (size_t len = 0; len <= VP_CHECK_BLOCK; len++) {
            const uint8_t *at = p + len % 32;
            uint64_t sum = sum_words(data_key.word, at, len);

            check_that(sum_block(data_key.word, at, len) == sum,
                       "the best way differs for %zu bytes", len);
#ifdef VP_VECTORS
            if (len % VP_SUM_STEP == 0) {
                ck_assert_uint_eq(sum_sse2(data_key.word, at, len), sum);
                ck_assert(!__builtin_cpu_supports("avx2") ||
                          sum_avx2(data_key.word, at, len) == sum);
            }
#endif
        }
    }
}
END_TEST

/* Of wire_vectors.py, which knows README alone */
START_TEST(check_pinned)
{
    static const struct {
        size_t len;
        uint64_t check;
    } pinned[] = {
        { 0, 0x0 },
        { 1, 0xc43a4634cedb52bb },
        { 4, 0x87f54528bc3cea35 },
        { 8, 0x526e78c2c7da63d9 },
        { 33, 0x9a164224de0cdacf },
        { 1000, 0xf6b7e407ded47aea },
        { 1024, 0xc8d8c8d153e17838 },
        { 1025, 0x2047d71651e8e584 },
        { 65496, 0xf0ead3e7f8d2555f },
    };
    static uint8_t p[65496];
    uint8_t header[VP_PKT_HDR_LEN];

    for (size_t i = 0; i < sizeof(p); i++) {
        p[i] = (uint8_t)(i * 7 + i / 256 + 1);
    }
    for (int i = 0; i < COUNT_OF(pinned); i++) {
        ck_assert_uint_eq(data_check(p, pinned[i].len), pinned[i].check);
    }
    memcpy(header + 8, p, sizeof(header) - 8);
    ck_assert_uint_eq(header_check(header, &head_key, 0xfedcba9876543210),
                      0x74982a88549fc501);
    ck_assert_uint_eq(wire_seed(1, 2, NULL), 0xef30b01c2974aeeb);
    header_key(&head_key, VP_MAGIC);
    ck_assert_mem_eq(&head_key, &hello_key, sizeof(hello_key));
}
END_TEST

START_TEST(check_alignment)
{
    static const size_t lens[] = { 1, 24, 31, 32, 33, 64, 1000, 65496 };
    static uint8_t room[65496 + 64];

    for (int i = 0; i < COUNT_OF(lens); i++) {
        for (size_t at = 0; at < 64; at++) {
            memset(room, 0xee, sizeof(room));
            bytes_fill(room + at, lens[i], 3, 0);
            ck_assert_uint_eq(data_check(room + at, lens[i]),
                              naive_check(SEED, room + at, lens[i]));
        }
    }
}
END_TEST

/* ---- damage ----------------------------------------------------------- */

START_TEST(damage_one_bit)
{
    static const size_t far[] = { 4096, 32728, 65495, 65496 };
    static uint8_t p[65496];

    for (int which = 0; which < CONTENTS; which++) {
        contents(p, sizeof(p), which);
        for (size_t len = 1; len <= 100; len++) {
            uint64_t check = data_check(p, len);

            for (size_t bit = 0; bit < 8 * len; bit++) {
                flip(p, bit);
                check_that(data_check(p, len) != check, "bit %zu of %zu bytes",
                           bit, len);
                flip(p, bit);
            }
        }
        for (int i = 0; i < COUNT_OF(far); i++) {
            uint64_t check = data_check(p, far[i]);

            for (int k = 0; k < 2000; k++) {
                size_t bit = rnd((uint32_t)(8 * far[i]));

                flip(p, bit);
                check_that(data_check(p, far[i]) != check,
                           "bit %zu of %zu bytes", bit, far[i]);
                flip(p, bit);
            }
        }
    }
}
END_TEST

/* A burst: its first and its last bit are wrong, those between may be */
static uint32_t burst_mask(unsigned len, uint32_t between)
{
    uint32_t last = 1u << (len - 1);

    return 1u | last | (between & (last - 1));
}

/* burst() - bits in the order in which a serial line sends them */
static void burst(uint8_t *p, size_t bit, uint32_t mask)
{
    uint64_t bits = (uint64_t)mask << bit % 8;

    for (p += bit / 8; bits != 0; bits >>= 8) {
        *p++ ^= (uint8_t)bits;
    }
}

static void check_bursts(uint8_t *p, size_t len, size_t bit, int patterns)
{
    uint64_t check = data_check(p, len);

    for (unsigned n = 1; n <= 32 && bit + n <= 8 * len; n++) {
        for (int k = 0; k < (n > 2 ? patterns : 1); k++) {
            /* the dense, the sparse, and any */
            uint32_t mask = burst_mask(n, k == 0 ? ~0u : k == 1 ? 0
                                       : rnd(UINT32_MAX));

            burst(p, bit, mask);
            check_that(data_check(p, len) != check,
                       "burst %x at bit %zu of %zu bytes", mask, bit, len);
            burst(p, bit, mask);
        }
    }
}

START_TEST(damage_burst)
{
    static uint8_t p[65496];
    size_t len;

    contents(p, sizeof(p), _i);
    for (len = 1; len <= 40; len++) {
        for (size_t bit = 0; bit < 8 * len; bit++) {
            check_bursts(p, len, bit, 8);
        }
    }
    for (size_t bit = 0; bit < 8 * 100; bit++) {
        check_bursts(p, 100, bit, 60);
    }
    for (int k = 0; k < 100; k++) {
        check_bursts(p, sizeof(p), rnd(8 * sizeof(p) - 32), 2);
    }
}
END_TEST

START_TEST(damage_two_bits)
{
    static uint8_t p[65496];

    contents(p, sizeof(p), _i);
    for (size_t len = 1; len <= 65; len += len < 40 ? 1 : 25) {
        uint64_t check = data_check(p, len);

        for (size_t a = 0; a < 8 * len; a++) {
            flip(p, a);
            for (size_t b = 0; b < a; b++) {
                flip(p, b);
                check_that(data_check(p, len) != check,
                           "bits %zu and %zu of %zu bytes", a, b, len);
                flip(p, b);
            }
            flip(p, a);
        }
    }
    for (int k = 0; k < 5000; k++) {
        uint64_t check = data_check(p, sizeof(p));
        size_t a = rnd(8 * sizeof(p)), b = rnd(8 * sizeof(p));

        b ^= a == b;
        flip(p, a);
        flip(p, b);
        check_that(data_check(p, sizeof(p)) != check, "bits %zu and %zu", a, b);
        /* the next pair is looked for in what this one made */
    }
}
END_TEST

/*
 * Damage of a kind, with a new key each time; what the check doesn't find is
 * counted
 */
typedef struct Trial {
    uint8_t was[VP_PKT_DATA_LEN];
    uint8_t is[VP_PKT_DATA_LEN];
    size_t len;
    VPPayloadKey key;
    uint64_t check;   /* of "was" */
    uint64_t keys;    /* used so far */
    uint64_t damaged; /* times "is" differed */
    uint64_t passed;  /* times the check didn't */
} Trial;

/* trial_key() - to be called before each damage of t->is */
static void trial_key(Trial *t)
{
    payload_key(&t->key, mix64(++t->keys));
    t->check = wire_data_check(&t->key, t->was, t->len);
    memcpy(t->is, t->was, t->len);
}

static void trial_count(Trial *t)
{
    if (memcmp(t->is, t->was, t->len) != 0) {
        t->damaged++;
        t->passed += wire_data_check(&t->key, t->is, t->len) == t->check;
    }
}

/* trial_stride() - so many bytes from one change to the next: 1 to 8192 */
static size_t trial_stride(int which)
{
    size_t most = (size_t)1 << which / 2;

    return which % 2 == 0 ? most : 1 + rnd((uint32_t)most);
}

enum { STRIDES = 2 * 14 };

/* The same bit of 1 to 16 bytes that are equally far apart, as buses do it */
START_TEST(damage_flips)
{
    static Trial t;
    size_t flips = (size_t)_i + 1;

    for (int which = 0; which < CONTENTS; which++) {
        contents(t.was, sizeof(t.was), which);
        for (int i = 0; i < 40 * STRIDES; i++) {
            size_t stride = trial_stride(i % STRIDES), bit, at;

            t.len = 1 + rnd(VP_PKT_DATA_LEN);
            trial_key(&t);
            bit = rnd(8);
            at = rnd((uint32_t)MIN(t.len, stride));
            for (size_t n = 0; n < flips && at < t.len; n++) {
                flip(t.is, 8 * at + bit);
                at += stride;
            }
            trial_count(&t);
        }
    }
    ck_assert_uint_eq(t.passed, 0);
    ck_assert_uint_eq(t.damaged, 40 * STRIDES * CONTENTS);
}
END_TEST

/* A data line that is stuck, for a while or all the time */
START_TEST(damage_stuck)
{
    static Trial t;

    for (int which = 0; which < CONTENTS; which++) {
        contents(t.was, sizeof(t.was), which);
        for (int i = 0; i < 100 * STRIDES; i++) {
            size_t stride = trial_stride(i % STRIDES), begin, end;
            uint8_t bit = (uint8_t)(1u << rnd(8));
            bool high = rnd(2);

            t.len = 1 + rnd(VP_PKT_DATA_LEN);
            trial_key(&t);
            begin = rnd((uint32_t)t.len);
            end = i % 3 == 0 ? t.len : begin + rnd((uint32_t)(t.len - begin));
            for (size_t at = begin; at <= end && at < t.len; at += stride) {
                t.is[at] = (uint8_t)(high ? t.is[at] | bit
                                          : t.is[at] & ~bit);
            }
            trial_count(&t);
        }
    }
    ck_assert_uint_eq(t.passed, 0);
    ck_assert_uint_gt(t.damaged, 100 * STRIDES);
}
END_TEST

/* What becomes of a block of bytes */
enum { SWAPPED, ZEROED, SET, DOUBLED, SHIFTED, BLOCK_DAMAGES };

/* block_damage() - to that of @size at @p; another one is at @other */
static void block_damage(uint8_t *p, uint8_t *other, size_t size, int how)
{
    size_t by = 1 + rnd((uint32_t)size / 2 + 1);

    switch (how) {
    case SWAPPED:
        for (size_t i = 0; i < size; i++) {
            uint8_t byte = p[i];

            p[i] = other[i];
            other[i] = byte;
        }
        break;
    case ZEROED:
    case SET:
        memset(p, how == ZEROED ? 0 : 0xff, size);
        break;
    case DOUBLED:
        memmove(p, other, size);
        break;
    case SHIFTED: /* the first bytes come twice */
        memmove(p + by, p, size - by);
        break;
    }
}

/* contents_alike() - each 32 bytes have the same words, in some order */
static void contents_alike(uint8_t *p, size_t len)
{
    contents(p, len, MIXED);
    for (size_t i = 32; i < len; i++) {
        p[i] = p[(i + 4 * mix64(i / 32)) % 32];
    }
}

START_TEST(damage_blocks)
{
    static Trial t;

    contents(t.was, sizeof(t.was), MIXED);
    for (size_t i = 0; i < 4000; i++) {
        size_t size = (size_t)16 << i % 9, blocks, a, b;
        uint8_t *at;

        if (i == 2000) {
            contents_alike(t.was, sizeof(t.was));
        }
        t.len = 2 * size + rnd((uint32_t)(VP_PKT_DATA_LEN - 2 * size));
        trial_key(&t);
        blocks = t.len / size;
        a = rnd((uint32_t)blocks - 1);
        b = a + 1;
        if (i % 2 == 0) { /* not the next one but any other */
            b = (b + rnd((uint32_t)blocks - 1)) % blocks;
        }
        at = t.is + i % 7 % (t.len % size + 1); /* aligned, or not */
        block_damage(at + a * size, at + b * size, size, _i);
        trial_count(&t);
    }
    ck_assert_uint_eq(t.passed, 0);
    ck_assert_uint_gt(t.damaged, 3800);
}
END_TEST

/*
 * One damaged word with 10^8 keys
 *
 * One key of 2^32 doesn't tell, so none of these should.  That the keys are as
 * good as any others is seen where the chance is larger: if a word grows by one
 * the product grows by its upper factor, the lower 16 bits of which are 0 with
 * one key of 2^16.
 */
START_TEST(damage_any_key)
{
    const char *stride = getenv("STRIDE");
    uint64_t keys = 100000000 / (stride != NULL ? strtoul(stride, NULL, 10)
                                                : 1);
    uint64_t passed = 0, nearly = 0, expected = keys >> 16;

    for (uint64_t i = 0; i < keys; i++) {
        uint64_t key = mix64(i + 1), x = 2 * i, damage = mix64(~i) | 1, sum;
        uint8_t p[8];

        memcpy(p, &x, sizeof(p));
        sum = sum_words(&key, p, sizeof(p));
        p[0] ^= 1;
        nearly += (uint16_t)(sum - sum_words(&key, p, sizeof(p))) == 0;
        passed += sum == sum_words(&key, p, sizeof(p));
        damage ^= x;
        memcpy(p, &damage, sizeof(p));
        passed += sum == sum_words(&key, p, sizeof(p));
    }
    ck_assert_uint_eq(passed, 0);
    /* five times the standard deviation is 5 * sqrt(expected) */
    ck_assert_uint_le((nearly - expected) * (nearly - expected),
                      25 * expected);
}
END_TEST

/* ---- headers ---------------------------------------------------------- */

START_TEST(header_layout)
{
    static const uint8_t layout[] = {
        0, 0, 0, 0, 0, 0, 0, 0,                         /* check, below */
        0x81, 0x72, 0x63, 0x54, 0x45, 0x36, 0x27, 0x18, /* data_check */
        0xa1, 0xb2,                                     /* type, flags */
        0xc3, 0xd4,                                     /* bytes */
        0x1e, 0x2d, 0x3c, 0x4b,                         /* conn */
        0x5a, 0x69, 0x78, 0x87,                         /* seq */
        0x96, 0xa5, 0xb4, 0xc3,                         /* ack */
        0xd2, 0xe1, 0xf0, 0x0f,                         /* time */
        0x1f, 0x2e, 0x3d, 0x4c,                         /* delay */
    };
    VPPacket pkt = {
        .type = 0xa1, .flags = 0xb2, .bytes = 0xc3d4, .conn = 0x1e2d3c4b,
        .seq = 0x5a697887, .ack = 0x96a5b4c3, .time = 0xd2e1f00f,
        .delay = 0x1f2e3d4c,
        .data_check = 0x8172635445362718,
    };
    uint64_t digest = 0xfedcba9876543210;
    uint64_t check = mix64(SEED + 5 * 0x9e3779b97f4a7c15) + digest +
                     naive_sum(SEED, layout + 8, 32);
    uint8_t p[64], big[8];

    ck_assert_int_eq(VP_PKT_HDR_LEN, 40);
    ck_assert_int_eq(sizeof(layout), 40);
    ck_assert_int_eq(VP_PKT_DATA_LEN, 65496);
    memset(p, 0xee, sizeof(p));
    wire_put(p, &pkt, &head_key, digest);
    ck_assert_mem_eq(p + 8, layout + 8, 32);
    for (int i = 0; i < 8; i++) {
        big[i] = (uint8_t)(check >> (56 - 8 * i));
    }
    ck_assert_mem_eq(p, big, 8);
    for (size_t i = 40; i < sizeof(p); i++) {
        ck_assert_int_eq(p[i], 0xee);
    }
}
END_TEST

static bool same(const VPPacket *a, const VPPacket *b)
{
    return a->type == b->type && a->flags == b->flags &&
           a->bytes == b->bytes && a->conn == b->conn && a->seq == b->seq &&
           a->ack == b->ack && a->time == b->time && a->delay == b->delay &&
           a->data_check == b->data_check;
}

START_TEST(header_fields)
{
    static const uint64_t values[] = {
        0, 1, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0x8000, VP_PKT_DATA_LEN,
        0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
        INT64_MAX, UINT64_MAX,
    };
    uint8_t p[VP_PKT_HDR_LEN];
    VPPacket got;

    for (int field = 0; field < 9; field++) {
        for (int i = 0; i < COUNT_OF(values); i++) {
            VPPacket pkt = {
                .type = field == 0 ? (uint8_t)values[i] : 0x11,
                .flags = field == 1 ? (uint8_t)values[i] : 0x22,
                .bytes = field == 2 ? (uint16_t)values[i] : 0x3333,
                .conn = field == 3 ? (uint32_t)values[i] : 0x44444444,
                .seq = field == 4 ? (uint32_t)values[i] : 0x55555555,
                .ack = field == 5 ? (uint32_t)values[i] : 0x66666666,
                .data_check = field == 6 ? values[i] : 0x7777777777777777,
                .time = field == 7 ? (uint32_t)values[i] : 0x88888888,
                .delay = field == 8 ? (uint32_t)values[i] : 0x99999999,
            };

            wire_put(p, &pkt, &head_key, 1);
            memset(&got, 0xee, sizeof(got));
            ck_assert(wire_get(p, &got, &head_key, 1));
            ck_assert(same(&pkt, &got));
            ck_assert(!wire_get(p, &got, &head_key, 2));
            ck_assert(!wire_get(p, &got, &hello_key, 1));
        }
    }
}
END_TEST

/* accepted() - would the link take this packet, and for another one? */
static bool accepted(const uint8_t *p, const VPPacket *was)
{
    VPPacket pkt;

    if (!wire_get(p, &pkt, &head_key, 0)) {
        return false;
    }
    if (pkt.bytes != was->bytes) {
        return true;
    }
    if (pkt.bytes > 0) {
        return wire_data_ok(&pkt, p + VP_PKT_HDR_LEN, &data_key);
    }
    pkt.data_check = was->data_check; /* nobody looks at it without data */
    return !same(&pkt, was);
}

/* make_packet() - with a payload of @len; all that follows is rubbish */
static VPPacket make_packet(uint8_t *p, size_t len, uint32_t seq)
{
    VPPacket pkt = {
        .type = VP_PKT_CLIENT, .flags = VP_FLAG_ACK_NOW,
        .bytes = (uint16_t)len, .conn = VP_CONN_FIRST, .seq = seq, .ack = 17,
    };

    bytes_fill(p + VP_PKT_HDR_LEN, len, 5, 0);
    pkt.data_check = data_check(p + VP_PKT_HDR_LEN, len);
    wire_put(p, &pkt, &head_key, 0);
    return pkt;
}

static const size_t damaged_lens[] = { 0, 1, 3, 4, 8, 31, 32, 33 };

/* Header and payload together: one bit, two bits, a burst */
START_TEST(packet_damage)
{
    size_t len = damaged_lens[_i], bits = 8 * (VP_PKT_HDR_LEN + len);
    uint8_t p[VP_PKT_HDR_LEN + 64];
    VPPacket pkt;

    memset(p, 0x77, sizeof(p));
    pkt = make_packet(p, len, VP_SEQ_FIRST);
    ck_assert(len == 0 || accepted(p, &pkt));
    for (size_t a = 0; a < bits; a++) {
        flip(p, a);
        check_that(!accepted(p, &pkt), "bit %zu", a);
        for (size_t b = 0; b < a; b++) {
            flip(p, b);
            check_that(!accepted(p, &pkt), "bits %zu and %zu", a, b);
            flip(p, b);
        }
        flip(p, a);
        for (unsigned n = 3; n <= 32 && a + n <= bits; n++) {
            for (int k = 0; k < 20; k++) {
                uint32_t mask = burst_mask(n, k == 0 ? ~0u
                                           : rnd(UINT32_MAX));

                burst(p, a, mask);
                check_that(!accepted(p, &pkt), "burst %x at %zu", mask, a);
                burst(p, a, mask);
            }
        }
    }
}
END_TEST

/* Header and payload together: what becomes of blocks, in all positions */
START_TEST(packet_blocks)
{
    size_t total = VP_PKT_HDR_LEN + damaged_lens[_i];
    uint8_t p[VP_PKT_HDR_LEN + 64], was[sizeof(p)];
    VPPacket pkt;
    int tried = 0;

    memset(p, 0x77, sizeof(p));
    pkt = make_packet(p, damaged_lens[_i], VP_SEQ_FIRST);
    memcpy(was, p, sizeof(p));
    for (size_t size = 1; size < total; size++) {
        for (size_t at = 0; at + size <= total; at++) {
            for (size_t other = 0; other + size <= total; other++) {
                for (int how = 0; how < BLOCK_DAMAGES; how++) {
                    block_damage(p + at, p + other, size, how);
                    if (memcmp(p, was, sizeof(p)) != 0) {
                        check_that(!accepted(p, &pkt), "damage %d of %zu bytes "
                                   "at %zu and %zu", how, size, at, other);
                        memcpy(p, was, sizeof(p));
                        tried++;
                    }
                }
            }
        }
    }
    ck_assert_int_gt(tried, 10000);
}
END_TEST

/* ... and bits that are equally far apart: flipped, or stuck */
START_TEST(packet_strides)
{
    size_t bits = 8 * (VP_PKT_HDR_LEN + damaged_lens[_i]);
    uint8_t p[VP_PKT_HDR_LEN + 64], stuck[2][sizeof(p)];
    VPPacket pkt;

    memset(p, 0x77, sizeof(p));
    pkt = make_packet(p, damaged_lens[_i], VP_SEQ_FIRST);
    for (size_t stride = 1; stride < bits; stride++) {
        for (size_t begin = 0; begin < bits; begin++) {
            uint8_t flipped[sizeof(p)];

            memcpy(flipped, p, sizeof(p));
            memcpy(stuck[0], p, sizeof(p));
            memcpy(stuck[1], p, sizeof(p));
            for (size_t bit = begin; bit < bits; bit += stride) {
                uint8_t mask = (uint8_t)(1u << bit % 8);

                stuck[0][bit / 8] &= (uint8_t)~mask;
                stuck[1][bit / 8] |= mask;
                flipped[bit / 8] ^= mask;
                check_that(bit >= begin + 16 * stride ||
                           !accepted(flipped, &pkt), "bits from %zu to %zu, "
                           "%zu apart, flipped", begin, bit, stride);
            }
            for (int high = 0; high < 2; high++) {
                check_that(memcmp(stuck[high], p, sizeof(p)) == 0 ||
                           !accepted(stuck[high], &pkt), "bits from %zu on, "
                           "%zu apart, stuck at %d", begin, stride, high);
            }
        }
    }
}
END_TEST

/* The rest of a packet that breaks off is what follows on the channel */
START_TEST(packet_truncated)
{
    static const size_t lens[] = { 1, 2, 31, 32, 33, 100, 65496 };
    static uint8_t p[VP_PKT_LEN_MAX], next[VP_PKT_LEN_MAX];

    for (int i = 0; i < COUNT_OF(lens); i++) {
        size_t len = lens[i], total = VP_PKT_HDR_LEN + len;
        VPPacket pkt;

        for (size_t cut = 0; cut < total; cut += total > 200 ? 997 : 1) {
            pkt = make_packet(p, len, VP_SEQ_FIRST);
            make_packet(next, len, VP_SEQ_FIRST + 1);
            memcpy(p + cut, next, total - cut);
            check_that(cut == 0 || !accepted(p, &pkt),
                       "%zu bytes cut after %zu", len, cut);
        }
    }
}
END_TEST

START_TEST(packet_lengths)
{
    static uint8_t p[VP_PKT_LEN_MAX + 64];
    VPPacket got;

    for (size_t len = 0; len <= VP_PKT_DATA_LEN;
         len += len > 300 && len < VP_PKT_DATA_LEN - 300 ? 211 : 1) {
        VPPacket pkt = make_packet(p, len, VP_SEQ_FIRST);
        size_t total = VP_PKT_HDR_LEN + len;

        p[total] ^= 0xff; /* what follows is none of it */
        ck_assert(wire_get(p, &got, &head_key, 0));
        ck_assert(same(&pkt, &got));
        ck_assert(wire_data_ok(&got, p + VP_PKT_HDR_LEN, &data_key));
        if (len > 0) {
            p[total - 1] ^= 1;
            ck_assert(!wire_data_ok(&got, p + VP_PKT_HDR_LEN, &data_key));
        }
    }
}
END_TEST

/* ---- HELLO ------------------------------------------------------------ */

static const VPHello full_hello = {
    .version = VP_VERSION, .oldest = VP_VERSION_OLDEST, .flags = 0x02030405,
    .features = 0x06070809, .window = 0x0a0b0c0d,
    .token = 0x1011121314151617, .echo = 0x2021222324252627,
    .my_epoch = 0x3031323334353637, .peer_epoch = 0x4041424344454647,
    .digest = 0x5051525354555657, .expect = 0x60616263, .base = 0x64656667,
    .next = 0x68696a6b, .max_conns = 0x6c6d6e6f,
    .instance = 0x7071727374757677,
};

static bool same_hello(const VPHello *a, const VPHello *b)
{
    return a->version == b->version && a->oldest == b->oldest &&
           a->flags == b->flags && a->features == b->features &&
           a->window == b->window && a->token == b->token &&
           a->echo == b->echo && a->my_epoch == b->my_epoch &&
           a->peer_epoch == b->peer_epoch && a->digest == b->digest &&
           a->expect == b->expect && a->base == b->base &&
           a->next == b->next && a->max_conns == b->max_conns &&
           a->instance == b->instance &&
           memcmp(a->proof, b->proof, sizeof(a->proof)) == 0;
}

START_TEST(hello_layout)
{
    static const uint8_t layout[VP_HELLO_LEN] = {
        0, 3, 0, 3, 0x02, 0x03, 0x04, 0x05,
        0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d,
        0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17,
        0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27,
        0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37,
        0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47,
        0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57,
        0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67,
        0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f,
        0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77,
    };
    uint8_t p[HELLO_TOTAL + 8];
    VPPacket pkt;

    memset(p, 0xee, sizeof(p));
    ck_assert_uint_eq(wire_put_hello(p, &full_hello, NULL), HELLO_TOTAL);
    ck_assert_mem_eq(p + VP_PKT_HDR_LEN, layout, sizeof(layout));
    ck_assert_int_eq(p[HELLO_TOTAL], 0xee);
    ck_assert_uint_eq(VP_MAGIC, 0x71656d752d767031); /* "qemu-vp1" */
    ck_assert(wire_get(p, &pkt, &hello_key, 0));
    ck_assert_int_eq(pkt.type, 4);
    ck_assert_int_eq(pkt.bytes, 112);
    ck_assert_int_eq(pkt.flags + pkt.conn + pkt.seq + pkt.ack, 0);
    ck_assert_int_eq(pkt.time + pkt.delay, 0);
    /* the payload's key has the token in it */
    ck_assert_uint_eq(pkt.data_check,
                      naive_check(mix64(mix64(VP_MAGIC) + full_hello.token),
                                  layout, sizeof(layout)));
}
END_TEST

START_TEST(hello_fields)
{
    static const uint64_t values[] = {
        0, 1, 0x8000, 0xffff, 0x80000000, 0xffffffff, 0x8000000000000000,
        UINT64_MAX,
    };
    uint8_t p[HELLO_TOTAL];
    VPHello got;

    for (int i = 0; i < COUNT_OF(values); i++) {
        for (int field = 0; field < 13; field++) {
            VPHello h = full_hello;
            uint64_t *wide[] = {
                &h.token, &h.echo, &h.my_epoch, &h.peer_epoch, &h.digest,
                &h.instance,
            };
            uint32_t *narrow[] = {
                &h.window, &h.expect, &h.base, &h.next, &h.max_conns,
                &h.flags, &h.features,
            };

            if (field < COUNT_OF(wide)) {
                *wide[field] = values[i];
            } else {
                *narrow[field - COUNT_OF(wide)] = (uint32_t)values[i];
            }
            wire_put_hello(p, &h, NULL);
            memset(&got, 0xee, sizeof(got));
            ck_assert_int_eq(wire_get_hello(p, sizeof(p), &got),
                             HELLO_TOTAL);
            ck_assert(same_hello(&h, &got));
        }
    }
}
END_TEST

/* Never an answer before it is all there, never a byte looked at beyond */
START_TEST(hello_truncated)
{
    uint8_t p[HELLO_TOTAL];
    VPHello got;

    wire_put_hello(p, &full_hello, NULL);
    for (size_t len = 0; len <= sizeof(p); len++) {
        uint8_t *part = malloc(len > 0 ? len : 1);

        memcpy(part, p, len);
        ck_assert_int_eq(wire_get_hello(part, len, &got),
                         len < sizeof(p) ? 0 : (int)HELLO_TOTAL);
        free(part);
    }
}
END_TEST

START_TEST(hello_damage)
{
    uint8_t p[HELLO_TOTAL];
    VPHello got;

    wire_put_hello(p, &full_hello, NULL);
    for (size_t a = 0; a < 8 * sizeof(p); a++) {
        flip(p, a);
        check_that(wire_get_hello(p, sizeof(p), &got) == -1, "bit %zu", a);
        for (size_t b = 0; b < a; b++) {
            flip(p, b);
            check_that(wire_get_hello(p, sizeof(p), &got) == -1,
                       "bits %zu and %zu", a, b);
            flip(p, b);
        }
        flip(p, a);
    }
}
END_TEST

/* put_hello_of() - one of @len bytes, of versions from @oldest to @newest */
static size_t put_hello_of(uint8_t *p, uint16_t oldest, uint16_t newest,
                           size_t len)
{
    VPPacket pkt = { .type = VP_PKT_HELLO, .bytes = (uint16_t)len };
    uint8_t *d = p + VP_PKT_HDR_LEN;

    wire_put_hello(p, &full_hello, NULL);
    for (size_t i = VP_HELLO_LEN; i < len; i++) {
        d[i] = (uint8_t)i;
    }
    put16(d, newest);
    put16(d + 2, oldest);
    pkt.data_check = hello_data_check(d, len);
    wire_put(p, &pkt, &hello_key, 0);
    return VP_PKT_HDR_LEN + len;
}

/* A later version may say more, and first of all which ones it speaks */
START_TEST(hello_versions)
{
    uint8_t p[VP_PKT_HDR_LEN + 2048];
    VPHello got, none = { .version = 99, .oldest = 98 }, both = full_hello;
    size_t total;

    both.version = 99;
    for (size_t len = 0; len <= 1100; len++) {
        bool possible = len >= 24 && len <= 1024;

        total = put_hello_of(p, 98, 99, len);
        memset(&got, 0xee, sizeof(got));
        ck_assert_int_eq(wire_get_hello(p, total, &got),
                         possible ? (int)total : -1);
        ck_assert(!possible || same_hello(&got, &none));
        if (len > 0 && possible) {
            ck_assert_int_eq(wire_get_hello(p, total - 1, &got), 0);
        }
        total = put_hello_of(p, VP_VERSION, 99, len);
        possible &= len >= VP_HELLO_LEN;
        ck_assert_int_eq(wire_get_hello(p, total, &got),
                         possible ? (int)total : -1);
        ck_assert(!possible || same_hello(&got, &both));
    }
}
END_TEST

/* Both sides use the newest version that both speak, or say who is too old. */
START_TEST(hello_ranges)
{
    static const struct {
        int oldest, newest; /* of the peer's, from ours on */
        int used;           /* -1: none */
        const char *who;
    } rows[] = {
        { 0, 0, 0, NULL }, { 0, 1, 0, NULL }, { -2, 0, 0, NULL },
        { -2, 60000, 0, NULL },
        { 1, 1, -1, "speaks 4, this one 3; upgrade this one" },
        { 1, 9, -1, "speaks 4 to 12, this one 3; upgrade this one" },
        { -1, -1, -1, "speaks 2, this one 3; upgrade the other end" },
        { -3, -1, -1, "speaks 0 to 2, this one 3; upgrade the other end" },
        { 5, -3, -1, "speaks 8 to 0, this one 3; upgrade the other end" },
    };

    for (int i = 0; i < COUNT_OF(rows); i++) {
        VPHello h = {
            .version = (uint16_t)(VP_VERSION + rows[i].newest),
            .oldest = (uint16_t)(VP_VERSION + rows[i].oldest),
        };
        char text[128];

        ck_assert_uint_eq(hello_version(&h), rows[i].used < 0 ? 0u
                          : (unsigned)(VP_VERSION + rows[i].used));
        ck_assert(rows[i].who == NULL ||
                  strstr(hello_clash(&h, text, sizeof(text)), rows[i].who));
    }
}
END_TEST

/* Any other packet is no HELLO, whatever key it has */
START_TEST(hello_other_types)
{
    uint8_t p[HELLO_TOTAL];
    VPPacket pkt;
    VPHello got;

    wire_put_hello(p, &full_hello, NULL);
    ck_assert(wire_get(p, &pkt, &hello_key, 0));
    for (int type = 0; type < 256; type++) {
        pkt.type = (uint8_t)type;
        wire_put(p, &pkt, &hello_key, 0);
        ck_assert_int_eq(wire_get_hello(p, sizeof(p), &got),
                         type == VP_PKT_HELLO ? (int)HELLO_TOTAL : -1);
        wire_put(p, &pkt, &head_key, 0);
        ck_assert_int_eq(wire_get_hello(p, sizeof(p), &got), -1);
    }
}
END_TEST

/* ---- the key ---------------------------------------------------------- */

/* hex() - @len bytes as text; the same room is used again */
static const char *hex(const uint8_t *p, size_t len)
{
    static char text[2 * 64 + 1];

    for (size_t i = 0; i < len; i++) {
        snprintf(text + 2 * i, 3, "%02x", p[i]);
    }
    return text;
}

static const char *sha256_hex(const void *data, size_t len, size_t piece)
{
    const uint8_t *p = data;
    uint8_t out[SHA256_LEN];
    Sha256 s;

    sha256_start(&s);
    for (size_t at = 0; at < len; at += piece) {
        sha256_add(&s, p + at, MIN(piece, len - at));
    }
    sha256_end(&s, out);
    return hex(out, sizeof(out));
}

/* FIPS 180-4's examples, and lengths around a block's end, from elsewhere */
START_TEST(sha256)
{
    static const struct {
        size_t len;
        const char *hash;
    } pinned[] = {
        { 0, "e3b0c44298fc1c149afbf4c8996fb924"
               "27ae41e4649b934ca495991b7852b855" },
        { 1, "4bf5122f344554c53bde2ebb8cd2b7e3"
               "d1600ad631c385a5d7cce23c7785459a" },
        { 55, "16fa57a0a3423a715d594516339f3618"
               "9d6b5f93754a9714fef202616a9fabfe" },
        { 56, "c37b44e5f1b18554b36966f4f8e08bfb"
               "f3164c4b6c10374d12d89850892073c5" },
        { 57, "12b234922502022f755ab8550a3d4e20"
               "2ad39c81d961a4f59ec39d5fd83d15a7" },
        { 63, "bbba992d2c85af960fb2987a1fd05e0a"
               "a82a3db3c740dd8982a9e273b75e36a3" },
        { 64, "66bd4633ed6f71c4ecfa4763bf7ba1c8"
               "ec7612de9aa6c0578a7b675207c71e0b" },
        { 65, "9f7dc47107b750a1f3d35db5d9547f24"
               "ef40da5b731b9540d4f43710a154f6c9" },
        { 119, "a3ed307b730fa77c07531300c6e4a282"
               "330011d4d4caf6bb7b63ae05950f4b66" },
        { 120, "8e3b15d9fea7472655aa069620b7f8c2"
               "e55ee1499f763200a7515fe826e99d20" },
        { 121, "a8320d9736c8a5a7445c87c4d18c0da2"
               "fa8fb3b323ed8318c724a5b3e230f87b" },
        { 128, "e462c130fef8c97e34f7dc3ff3ad2f8b"
               "3533ab849af21c10531552a2852387a4" },
        { 1000, "39d3566b9a6c489bce1273002b94d358"
               "dbe4960e16089e10d406182772921a51" },
    };
    static uint8_t p[1000000];

    ck_assert_str_eq(sha256_hex("abc", 3, 3),
                     "ba7816bf8f01cfea414140de5dae2223"
                     "b00361a396177a9cb410ff61f20015ad");
    ck_assert_str_eq(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklm"
                                "nlmnomnopnopq", 56, 56),
                     "248d6a61d20638b8e5c026930c3e6039"
                     "a33ce45964ff2167f6ecedd419db06c1");
    ck_assert_str_eq(sha256_hex("abcdefghbcdefghicdefghijdefghijkefghijklfghijk"
                                "lmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmn"
                                "opqrsmnopqrstnopqrstu", 112, 112),
                     "cf5b16a778af8380036ce59e7b049237"
                     "0b249b11e8f07a51afac45037afee9d1");
    memset(p, 'a', sizeof(p));
    ck_assert_str_eq(sha256_hex(p, sizeof(p), 997),
                     "cdc76e5c9914fb9281a1c7e284d73e67"
                     "f1809a48a497200e046d39ccc7112cd0");
    for (size_t i = 0; i < 1000; i++) {
        p[i] = (uint8_t)(i * 7 + i / 256 + 1);
    }
    for (int i = 0; i < COUNT_OF(pinned); i++) {
        for (size_t piece = 1; piece < 130; piece += 43) {
            ck_assert_str_eq(sha256_hex(p, pinned[i].len, piece),
                             pinned[i].hash);
        }
    }
}
END_TEST

/* RFC 4231; one case truncates */
START_TEST(hmac)
{
    static const struct {
        uint8_t fill;    /* the key's bytes, or 0 */
        size_t key_len;
        const char *key; /* NULL with fill 0: 1, 2, 3... */
        uint8_t data_fill;
        size_t data_len;
        const char *data;
        const char *hmac;
    } cases[] = {
        { 0x0b, 20, NULL, 0, 8, "Hi There",
          "b0344c61d8db38535ca8afceaf0bf12b"
          "881dc200c9833da726e9376c2e32cff7" },
        { 0, 4, "Jefe", 0, 28, "what do ya want for nothing?",
          "5bdcc146bf60754e6a042426089575c7"
          "5a003f089d2739839dec58b964ec3843" },
        { 0xaa, 20, NULL, 0xdd, 50, NULL,
          "773ea91e36800e46854db8ebd09181a7"
          "2959098b3ef8c122d9635514ced565fe" },
        { 0, 25, NULL, 0xcd, 50, NULL,
          "82558a389a443c0ea4cc819899f2083a"
          "85f0faa3e578f8077a2e3ff46729665b" },
        { 0x0c, 20, NULL, 0, 20, "Test With Truncation",
          "a3b6167473100ee06e0c796c2955552b" },
        { 0xaa, 131, NULL, 0, 54,
          "Test Using Larger Than Block-Size Key - Hash Key First",
          "60e431591ee0b67f0d8a26aacbf5b77f"
          "8e0bc6213728c5140546040f0ee37f54" },
        { 0xaa, 131, NULL, 0, 152,
          "This is a test using a larger than block-size key and a larger "
          "than block-size data. The key needs to be hashed before being "
          "used by the HMAC algorithm.",
          "9b09ffa71b942fcb27635fbcd5b0e944"
          "bfdc63644f0713938a7f51535c3a35e2" },
    };

    for (int i = 0; i < COUNT_OF(cases); i++) {
        uint8_t key[200], data[200], out[SHA256_LEN];

        for (size_t n = 0; n < sizeof(key); n++) {
            key[n] = cases[i].fill != 0 ? cases[i].fill : (uint8_t)(n + 1);
        }
        memset(data, cases[i].data_fill, sizeof(data));
        if (cases[i].key != NULL) {
            memcpy(key, cases[i].key, cases[i].key_len);
        }
        if (cases[i].data != NULL) {
            memcpy(data, cases[i].data, cases[i].data_len);
        }
        hmac_sha256(key, cases[i].key_len, "", data, cases[i].data_len, out);
        ck_assert_str_eq(hex(out, strlen(cases[i].hmac) / 2), cases[i].hmac);
        /* in two pieces, as the engine has it, it is the same */
        if (cases[i].data != NULL) {
            memset(out, 0, sizeof(out));
            hmac_sha256(key, cases[i].key_len, cases[i].data, NULL, 0, out);
            ck_assert_str_eq(hex(out, strlen(cases[i].hmac) / 2),
                             cases[i].hmac);
        }
        if (i == 1) {
            hmac_sha256(key, 4, "what do ", data + 8, 20, out);
            ck_assert_str_eq(hex(out, sizeof(out)), cases[i].hmac);
        }
    }
}
END_TEST

static const VPKey test_key = { .bytes = "a secret of the test", .len = 20 };

START_TEST(keys_with_secret)
{
    const uint64_t a = 0x0102030405060708, b = 0x1112131415161718;
    VPKey other = test_key;

    ck_assert_uint_eq(wire_seed(a, b, &test_key), 0x1542a6098fb5633b);
    ck_assert_uint_ne(wire_seed(a, b, &test_key), wire_seed(a, b, NULL));
    ck_assert_uint_ne(wire_seed(a, b, &test_key), wire_seed(b, a, &test_key));
    other.bytes[0] ^= 1;
    ck_assert_uint_ne(wire_seed(a, b, &test_key), wire_seed(a, b, &other));
}
END_TEST

/* A HELLO is proved as a whole, and by one key. */
START_TEST(hello_proof)
{
    uint8_t p[HELLO_TOTAL], before[HELLO_TOTAL];
    VPKey other = test_key;
    VPHello h;

    wire_put_hello(before, &full_hello, NULL);
    wire_put_hello(p, &full_hello, &test_key);
    ck_assert_int_eq(wire_get_hello(p, sizeof(p), &h), HELLO_TOTAL);
    ck_assert_mem_eq(h.proof, p + HELLO_TOTAL - 32, 32);
    ck_assert_mem_eq(p + VP_PKT_HDR_LEN, before + VP_PKT_HDR_LEN,
                     VP_HELLO_PROOF_AT);
    ck_assert_str_eq(hex(h.proof, 32), "d42217689789e1d7a2f4cf8f87f31e01"
                     "5b31ddef1278acf90ad22a138035fc03");
    ck_assert(hello_proved(&h, p, &test_key));
    other.bytes[19] ^= 0x80;
    ck_assert(!hello_proved(&h, p, &other));
    other = test_key;
    other.len--;
    ck_assert(!hello_proved(&h, p, &other));
    for (size_t bit = 0; bit < 8 * VP_HELLO_PROOF_AT; bit++) {
        flip(p + VP_PKT_HDR_LEN, bit);
        ck_assert(!hello_proved(&h, p, &test_key));
        flip(p + VP_PKT_HDR_LEN, bit);
    }
    for (size_t bit = 0; bit < 8 * sizeof(h.proof); bit++) {
        flip(h.proof, bit);
        ck_assert(!hello_proved(&h, p, &test_key));
        flip(h.proof, bit);
    }
    /* none is not a proof */
    ck_assert_int_eq(wire_get_hello(before, sizeof(before), &h), HELLO_TOTAL);
    ck_assert(!hello_proved(&h, before, &test_key));
}
END_TEST

/* The proof also covers what a later version put behind it. */
START_TEST(hello_proof_longer)
{
    uint8_t p[VP_PKT_HDR_LEN + VP_HELLO_LEN_MAX];
    uint8_t *d = p + VP_PKT_HDR_LEN;
    VPHello h;

    for (size_t len = VP_HELLO_LEN + 1; len <= VP_HELLO_LEN_MAX; len += 57) {
        VPPacket pkt = { .type = VP_PKT_HELLO, .bytes = (uint16_t)len };

        wire_put_hello(p, &full_hello, NULL);
        for (size_t i = VP_HELLO_LEN; i < len; i++) {
            d[i] = (uint8_t)(3 * i);
        }
        wire_put(p, &pkt, &hello_key, 0);
        hello_prove(&test_key, d, len, h.proof);
        ck_assert(hello_proved(&h, p, &test_key));
        d[len - 1] ^= 1;
        ck_assert(!hello_proved(&h, p, &test_key));
    }
}
END_TEST

/* ---- numbers ---------------------------------------------------------- */

START_TEST(numbers)
{
    uint8_t p[8];

    put16(p, 0x0102);
    ck_assert_mem_eq(p, "\1\2", 2);
    ck_assert_uint_eq(get16(p), 0x0102);
    put32(p, 0xf1020304);
    ck_assert_mem_eq(p, "\xf1\2\3\4", 4);
    ck_assert_uint_eq(get32(p), 0xf1020304);
    put64(p, 0xf102030405060708);
    ck_assert_mem_eq(p, "\xf1\2\3\4\5\6\7\10", 8);
    ck_assert_uint_eq(get64(p), 0xf102030405060708);
}
END_TEST

START_TEST(sequence_numbers)
{
    static const uint32_t at[] = {
        0, 1, VP_SEQ_FIRST, 0x7fffffff, 0x80000000, UINT32_MAX,
    };

    for (int i = 0; i < COUNT_OF(at); i++) {
        ck_assert_int_eq(seq_diff(at[i], at[i]), 0);
        ck_assert_int_eq(seq_diff(at[i] + 1, at[i]), 1);
        ck_assert_int_eq(seq_diff(at[i] - 1, at[i]), -1);
        ck_assert_int_eq(seq_diff(at[i] + 2000, at[i]), 2000);
        ck_assert_int_eq(seq_diff(at[i] + INT32_MAX, at[i]), INT32_MAX);
        ck_assert_int_lt(seq_diff(at[i] + 0x80000001, at[i]), 0);
    }
    ck_assert_uint_eq(VP_SEQ_FIRST + 1000, 0);
    ck_assert_uint_eq(VP_CONN_FIRST + 100, 0);
}
END_TEST

START_TEST(keys)
{
    for (uint64_t i = 1; i < 1000; i++) {
        uint64_t a = mix64(i), b = mix64(i + 1000);

        ck_assert_uint_ne(wire_seed(a, b, NULL), wire_seed(b, a, NULL));
        ck_assert_uint_ne(wire_seed(a, b, NULL), wire_seed(a + 1, b, NULL));
        ck_assert_uint_ne(wire_seed(a, b, NULL), wire_seed(a, b + 1, NULL));
        ck_assert_uint_ne(wire_seed(a, b, NULL), VP_MAGIC);
        ck_assert_uint_ne(mix64(i), i);
    }
}
END_TEST

/* Two streams of packets have one digest only if they are the same */
START_TEST(digests)
{
    VPPacket pkt = {
        .type = VP_PKT_CLIENT, .bytes = 3, .conn = 9, .data_check = 1234,
    };
    VPPacket other[] = { pkt, pkt, pkt, pkt };
    VPPacket again = pkt;
    uint64_t one = digest_add(0, &pkt);

    other[0].type = VP_PKT_SERVER;
    other[1].bytes++;
    other[2].conn++;
    other[3].data_check++;
    for (int i = 0; i < COUNT_OF(other); i++) {
        ck_assert_uint_ne(digest_add(0, &other[i]), one);
        ck_assert_uint_ne(digest_add(one, &other[i]),
                          digest_add(digest_add(0, &other[i]), &pkt));
    }
    ck_assert_uint_eq(one, mix64(1234) + 0x0002000300000009);
    ck_assert_uint_ne(digest_add(one, &pkt), one);
    /* what changes when it is sent again */
    again.seq = 77;
    again.ack = 78;
    again.flags = VP_FLAG_ACK_NOW;
    ck_assert_uint_eq(digest_add(0, &again), one);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("wire");

    suite_set(60, keys_set, NULL);
    SUITE_ADD(s, check_reference);
    SUITE_ADD(s, check_ways);
    SUITE_ADD(s, check_pinned);
    SUITE_ADD(s, check_alignment);
    SUITE_ADD(s, damage_one_bit);
    SUITE_LOOP(s, damage_burst, CONTENTS);
    SUITE_LOOP(s, damage_two_bits, CONTENTS);
    SUITE_LOOP(s, damage_flips, 16);
    SUITE_ADD(s, damage_stuck);
    SUITE_LOOP(s, damage_blocks, BLOCK_DAMAGES);
    SUITE_ADD(s, damage_any_key);
    SUITE_ADD(s, header_layout);
    SUITE_ADD(s, header_fields);
    SUITE_ROWS(s, packet_damage, damaged_lens);
    SUITE_ROWS(s, packet_blocks, damaged_lens);
    SUITE_ROWS(s, packet_strides, damaged_lens);
    SUITE_ADD(s, packet_truncated);
    SUITE_ADD(s, packet_lengths);
    SUITE_ADD(s, hello_layout);
    SUITE_ADD(s, hello_fields);
    SUITE_ADD(s, hello_truncated);
    SUITE_ADD(s, hello_damage);
    SUITE_ADD(s, hello_versions);
    SUITE_ADD(s, hello_ranges);
    SUITE_ADD(s, hello_other_types);
    SUITE_ADD(s, sha256);
    SUITE_ADD(s, hmac);
    SUITE_ADD(s, keys_with_secret);
    SUITE_ADD(s, hello_proof);
    SUITE_ADD(s, hello_proof_longer);
    SUITE_ADD(s, numbers);
    SUITE_ADD(s, sequence_numbers);
    SUITE_ADD(s, keys);
    SUITE_ADD(s, digests);
    return suite_run(s);
}
