/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_offer.c - what two sides tell each other beside the connections
 *
 * The services that a side offers, its program's version, where a client comes
 * from; and what becomes of messages that somebody doesn't know.
 */
#include "tests/lib/rig.h"

/* telling() - a rig that tells the peer, and is UP */
static void telling(Rig *r)
{
    VPConfig config = rig_config;

    config.program = "9.9";
    rig_new(r, &config);
}

/* tell() - have the peer name @names, which blanks part */
static void tell(Rig *r, int flags, const char *names)
{
    uint8_t msg[VP_PKT_DATA_LEN] = { VP_MSG_SERVICES, (uint8_t)flags };
    size_t len = 2;

    while (*names != '\0') {
        size_t n = strcspn(names, " ");

        msg[len] = (uint8_t)n;
        memcpy(msg + len + 1, names, n);
        len += 1 + n;
        names += n + strspn(names + n, " ");
    }
    peer_send(r, VP_PKT_CONTROL, 0, 0, msg, len);
}

/* told() - the next portion of the engine's list, as text that blanks part */
static const char *told(Rig *r, int *flags)
{
    static char text[VP_PKT_DATA_LEN];
    const Peer *p = &r->peer;
    size_t len = 0;

    peer_expect(r, 0, VP_MSG_SERVICES);
    *flags = p->data[1];
    ck_assert_uint_le(p->pkt.bytes, VP_TELL_LEN);
    for (size_t at = 2; at < p->pkt.bytes; at += 1u + p->data[at]) {
        ck_assert_uint_le(at + 1 + p->data[at], p->pkt.bytes);
        len += (size_t)sprintf(text + len, "%s%.*s", len > 0 ? " " : "",
                               p->data[at], p->data + at + 1);
    }
    text[len] = '\0';
    return text;
}

/* told_all() - it is told in one portion, and just this */
static void told_all(Rig *r, const char *names)
{
    int flags;

    ck_assert_str_eq(told(r, &flags), names);
    ck_assert_int_eq(flags, VP_SERVICES_BEGIN | VP_SERVICES_END);
    peer_quiet(r);
}

START_TEST(told_at_start)
{
    static Rig r;

    telling(&r);
    rig_target(&r, "ssh");
    rig_target(&r, "http");
    peer_session(&r);
    peer_expect(&r, 0, VP_MSG_PROGRAM);
    ck_assert_uint_eq(r.peer.pkt.bytes, 4);
    ck_assert_mem_eq(r.peer.data + 1, "9.9", 3);
    told_all(&r, "ssh http");
    /* a session that goes on knows it, another one doesn't */
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_drain(&r);
    peer_claim(&r.peer);
    ck_assert(peer_shake(&r));
    peer_quiet(&r);
    ck_assert_uint_eq(r.peer.expect, VP_SEQ_FIRST + 2);
    rig_unplug(&r);
    rig_plug(&r, VP_CHN_SOCKET, VP_ACCEPTED);
    peer_drain(&r);
    peer_session(&r);
    peer_expect(&r, 0, VP_MSG_PROGRAM);
    told_all(&r, "ssh http");
    rig_free(&r);
}
END_TEST

/* Changes of one pass are told at once. */
START_TEST(told_changes)
{
    static Rig r;

    telling(&r);
    peer_session(&r);
    peer_expect(&r, 0, VP_MSG_PROGRAM);
    told_all(&r, "");
    rig_target(&r, "a");
    rig_target(&r, "b");
    rig_target(&r, "c");
    told_all(&r, "a b c");
    vp_del_iforward(r.drv, "a");
    rig_target(&r, "d");
    vp_del_iforward(r.drv, "c");
    told_all(&r, "b d");
    rig_target(&r, "b"); /* another address */
    peer_quiet(&r);
    rig_free(&r);
}
END_TEST

/* Many are told in portions, and anew if they change before the end. */
START_TEST(told_in_portions)
{
    char name[VP_SERVICE_ID_LEN + 1], want[64];
    VPAddr addr = { .len = sizeof(sa_family_t), .ss.ss_family = AF_UNIX };
    int flags, n = 0, portions = 0;
    const char *text;
    static Rig r;

    telling(&r);
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof(name), "a-service-with-a-long-name-%05d", i);
        ck_assert_int_eq(vp_set_iforward(r.drv, name, &addr, 1), 0);
    }
    peer_session(&r);
    peer_expect(&r, 0, VP_MSG_PROGRAM);
    do {
        text = told(&r, &flags);
        peer_send(&r, VP_PKT_ACK, 0, 0, NULL, 0);
        if (portions == 3 && n > 0) {
            vp_del_iforward(r.drv, name); /* the last one */
        }
        if (flags & VP_SERVICES_BEGIN) {
            n = 0;
        }
        for (; sscanf(text, "%32s", name) == 1; n++) {
            snprintf(want, sizeof(want), "a-service-with-a-long-name-%05d", n);
            ck_assert_str_eq(name, want);
            text += strspn(text, " ") + strlen(name);
        }
        snprintf(name, sizeof(name), "a-service-with-a-long-name-%05d", 999);
        portions++;
        ck_assert_int_eq(!!(flags & VP_SERVICES_BEGIN), n <= VP_TELL_LEN / 33);
    } while (!(flags & VP_SERVICES_END));
    ck_assert_int_eq(n, 999);
    ck_assert_int_gt(portions, 30);
    rig_free(&r);
}
END_TEST

static void name_count(const char *service_id, void *opaque)
{
    ck_assert(vp_service_id_ok(service_id, strlen(service_id)));
    (*(size_t *)opaque)++;
}

/* names_known() - how many services of the peer's are known */
static size_t names_known(Rig *r)
{
    size_t n = 0;

    ck_assert_ptr_null(vp_services(r->drv, "", SIZE_MAX, name_count, &n));
    return n;
}

START_TEST(hears)
{
    VPPeerInfo info;
    static Rig r;

    telling(&r);
    vp_peer_info(r.drv, &info);
    ck_assert_uint_eq(info.version, 0);
    ck_assert_str_eq(info.program, "");
    ck_assert_int_eq(vp_offered(r.drv, "ssh"), VP_OFFER_UNKNOWN);
    peer_session(&r);
    peer_send(&r, VP_PKT_CONTROL, 0, 0, "\2011.2", 4);
    tell(&r, VP_SERVICES_BEGIN, "ssh http");
    ck_assert_int_eq(vp_offered(r.drv, "ssh"), VP_OFFERED);
    ck_assert_int_eq(vp_offered(r.drv, "db"), VP_OFFER_UNKNOWN);
    tell(&r, VP_SERVICES_END, "ftp ssh ftp");
    vp_peer_info(r.drv, &info);
    ck_assert_uint_eq(info.version, VP_VERSION);
    ck_assert_str_eq(info.program, "1.2");
    ck_assert_uint_eq(names_known(&r), 3);
    ck_assert_int_eq(vp_offered(r.drv, "ftp"), VP_OFFERED);
    ck_assert_int_eq(vp_offered(r.drv, "db"), VP_NOT_OFFERED);
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, "db");
    ck_assert_int_eq(vp_offered(r.drv, "ssh"), VP_NOT_OFFERED);
    ck_assert_int_eq(vp_offered(r.drv, "db"), VP_OFFERED);
    peer_session(&r); /* a peer that was started anew may be another one */
    vp_peer_info(r.drv, &info);
    ck_assert_str_eq(info.program, "");
    ck_assert_int_eq(vp_offered(r.drv, "db"), VP_OFFER_UNKNOWN);
    ck_assert_uint_eq(names_known(&r), 0);
    rig_free(&r);
}
END_TEST

/* A list without end takes no more memory than the formula says. */
START_TEST(hears_too_many)
{
    char names[40 * 100];
    VPChannelInfo before, after;
    static Rig r;

    telling(&r);
    peer_session(&r);
    vp_channel_info(r.drv, &before);
    for (int i = 0; i < 2 * VP_OFFER_MAX; i += 100) {
        size_t len = 0;

        for (int k = 0; k < 100; k++) {
            len += (size_t)sprintf(names + len, "%d ", i + k);
        }
        tell(&r, 0, names);
    }
    tell(&r, VP_SERVICES_END, "last");
    ck_assert_uint_eq(names_known(&r), VP_OFFER_MAX);
    vp_channel_info(r.drv, &after);
    ck_assert_uint_le(after.memory - before.memory,
                      VP_OFFER_MAX * sizeof(VPServiceId));
    ck_assert_int_eq(vp_offered(r.drv, "17"), VP_OFFERED);
    ck_assert_int_eq(vp_offered(r.drv, "last"), VP_OFFER_UNKNOWN);
    ck_assert_int_eq(engine_link(r.drv).epoch[0] != 0, true);
    rig_free(&r);
}
END_TEST

static void name_append(const char *service_id, void *opaque)
{
    strcat(strcat(opaque, service_id), " ");
}

/* They are shown in portions, of a list that may change in between. */
START_TEST(shown_in_portions)
{
    char text[80] = "", last[VP_SERVICE_ID_LEN + 1];
    static Rig r;

    telling(&r);
    peer_session(&r);
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, "e c a b d");
    strcpy(last, vp_services(r.drv, "", 2, name_append, text));
    ck_assert_str_eq(text, "a b ");
    strcpy(last, vp_services(r.drv, last, 2, name_append, text));
    ck_assert_str_eq(text, "a b c d ");
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, "f e cc b aa");
    ck_assert_ptr_null(vp_services(r.drv, last, 2, name_append, text));
    ck_assert_str_eq(text, "a b c d e f ");
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, "a");
    ck_assert_ptr_null(vp_services(r.drv, last, 2, name_append, text));
    ck_assert_str_eq(text, "a b c d e f ");
    rig_free(&r);
}
END_TEST

/* What it costs to look something up in a new list is the peer's work. */
START_TEST(order_counts)
{
    char names[16 * 100];
    unsigned before;
    static Rig r;

    telling(&r);
    peer_session(&r);
    for (int i = 1000; i > 0; i -= 100) {
        size_t len = 0;

        for (int k = 0; k < 100; k++) {
            len += (size_t)sprintf(names + len, "%d ", i - k);
        }
        tell(&r, 0, names);
    }
    for (int i = 0; i < 2; i++) {
        tell(&r, VP_SERVICES_END, "");
        before = engine_work(r.drv);
        ck_assert_int_eq(vp_offered(r.drv, "17"), VP_OFFERED);
        ck_assert_uint_eq(engine_work(r.drv) - before,
                          i ? 0 : 1000 * VP_WORK_SORTED);
    }
    rig_free(&r);
}
END_TEST

static const struct {
    size_t len;
    const char *msg;
    const char *wrong; /* NULL: it is ignored */
} messages[] = {
    { 1, "\200", "malformed SERVICES" },
    { 2, "\200\0", NULL },
    { 3, "\200\3\0", "malformed SERVICES" },
    { 3, "\200\3\1", "malformed SERVICES" },
    { 5, "\200\3\3ab", "malformed SERVICES" },
    { 4, "\200\3\1 ", "malformed SERVICES" },
    { 4, "\200\3\1:", "malformed SERVICES" },
    { 4, "\200\3\1\33", "malformed SERVICES" },
    { 4, "\200\3\1\377", "malformed SERVICES" },
    { 37, "\200\3\41aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "malformed SERVICES" },
    { 35, "\200\3\40aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", NULL },
    { 4, "\200\377\1x", NULL }, /* flags of a later version */
    { 1, "\201", NULL },
    { 2, "\201\n", "malformed PROGRAM" },
    { 3, "\201a\377", "malformed PROGRAM" },
    { 66, "\201aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
      "malformed PROGRAM" },
    { 65, "\201aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
      NULL },
    { 1, "\202", NULL },
    { 3, "\377\0\377", NULL },
    { 1, "\177", "unknown control message" },
};

/* Optional messages that aren't known are ignored; bad ones are a breach. */
START_TEST(message)
{
    static Rig r;

    telling(&r);
    peer_session(&r);
    peer_send(&r, VP_PKT_CONTROL, 0, 0, messages[_i].msg, messages[_i].len);
    if (messages[_i].wrong != NULL) {
        log_expect(messages[_i].wrong, 1);
        ck_assert(!engine_has_session(r.drv));
    } else {
        log_expect("breaks the protocol", 0);
        ck_assert(engine_has_session(r.drv));
        peer_send(&r, VP_PKT_PING, 0, 0, NULL, 0);
        ck_assert_int_eq(peer_drain(&r), VP_PKT_ACK);
    }
    rig_free(&r);
}
END_TEST

/* oforward() - one that listens somewhere */
static void oforward(Rig *r, const char *service)
{
    VPAddr addr;

    rig_listen(r, service, &addr);
}

static const struct {
    const char *offered;
    const char *asked;
    const char *meant; /* "": nothing is near; NULL: it is offered */
} typos[] = {
    { "ssh http", "ssh", NULL },
    { "ssh http", "htpp", "http" },
    { "ssh http", "shs", "ssh" },
    { "ssh http", "sh", "ssh" },
    { "ssh http", "sssh", "ssh" },
    { "ssh http https", "htps", "https" },
    { "ssh http", "ftp", "" },
    { "ssh http", "x", "" },
    { "s h", "x", "" },
    { "", "ssh", "" },
    { "postgres-main postgresql-main", "postgresmain", "postgres-main" },
    { "abcdefghijklmnopqrstuvwxyzabcdef", "abcdefghijklmnopqrstuvwxyzabcdeg",
      "abcdefghijklmnopqrstuvwxyzabcdef" },
};

/* What isn't offered is said once, with the name that may be meant. */
START_TEST(typo)
{
    const char *meant = typos[_i].meant;
    char line[200];
    static Rig r;

    telling(&r);
    oforward(&r, typos[_i].asked);
    peer_session(&r);
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, typos[_i].offered);
    log_expect("no such service", 0);
    box_run(r.loop, VP_OFFER_US + MS);
    snprintf(line, sizeof(line), "oforward %s: the other side offers no such "
             "service%s%s%s\n", typos[_i].asked,
             meant != NULL && meant[0] ? "; is '" : "",
             meant != NULL ? meant : "",
             meant != NULL && meant[0] ? "' meant?" : "");
    ck_assert_msg(log_count(line) == (meant != NULL), "%s\n%s", line,
                  log_text());
    log_clear();
    for (int i = 0; i < 2; i++) {
        peer_session(&r);
        tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, typos[_i].offered);
        box_run(r.loop, 2 * VP_OFFER_US);
    }
    log_expect("such service", 0);
    tell(&r, 0, typos[_i].asked);
    tell(&r, VP_SERVICES_END, "");
    box_run(r.loop, 2 * VP_OFFER_US);
    log_expect("offers it now", meant != NULL);
    rig_free(&r);
}
END_TEST

/* An oforward that comes later is looked at as well. */
START_TEST(typo_later)
{
    static Rig r;

    telling(&r);
    peer_session(&r);
    tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, "ssh");
    box_run(r.loop, 2 * VP_OFFER_US);
    oforward(&r, "shs");
    box_run(r.loop, 2 * VP_OFFER_US);
    log_expect("oforward shs: the other side offers no such service", 1);
    rig_free(&r);
}
END_TEST

/* A list that goes back and forth: no line, as it never stands for long. */
START_TEST(flapping)
{
    static Rig r;

    telling(&r);
    for (int i = 0; i < 40; i++) {
        char name[16];

        snprintf(name, sizeof(name), "s%d", i);
        oforward(&r, name);
    }
    peer_session(&r);
    for (int i = 0; i < 3000; i++) {
        tell(&r, VP_SERVICES_BEGIN | VP_SERVICES_END, i % 2 ? "s1 s2" : "s3");
    }
    log_expect("the other side offers", 0);
    box_run(r.loop, 2 * VP_OFFER_US);
    ck_assert_int_eq(log_count("the other side offers"), VP_OFFER_LINES);
    log_expect("so it is with 34 more oforwards", 1);
    rig_free(&r);
}
END_TEST

/* ---- where a client comes from ------------------------------------------ */

/* CONNECT_INIT has the client's address and the one it connected to. */
START_TEST(origin_told)
{
    struct sockaddr_in ours = { 0 }, theirs = { 0 };
    socklen_t len = sizeof(ours);
    uint8_t want[1 + 2 * (4 + 2)] = {
        VP_ORIGIN_IPV4, 127, 0, 0, 1, 127, 0, 0, 1,
    };
    static Rig r;
    int client;

    rig_new(&r, &rig_config);
    r.tcp = _i == 0;
    peer_session(&r);
    client = rig_client(&r, "s");
    peer_expect(&r, VP_CONN_FIRST, VP_MSG_CONNECT_INIT);
    if (_i == 0) {
        getsockname(client, (struct sockaddr *)&ours, &len);
        getpeername(client, (struct sockaddr *)&theirs, &len);
        put16(want + 9, ntohs(ours.sin_port));
        put16(want + 11, ntohs(theirs.sin_port));
    } else {
        want[0] = VP_ORIGIN_UNIX;
    }
    len = _i == 0 ? sizeof(want) : 1;
    ck_assert_uint_eq(r.peer.pkt.bytes, 11 + len);
    ck_assert_mem_eq(r.peer.data + 11, want, len);
    close(client);
    rig_free(&r);
}
END_TEST

#define FOUR "\300\0\2\7" "\12\0\0\1"
#define SIX "\40\1\15\270\0\0\0\0\0\0\0\0\0\0\0\1"

static const struct {
    size_t len;
    const char *origin;
    const char *said;
} origins[] = {
    { 0, "", "" },
    { 1, "\0", "" },
    { 5, "\0abcd", "" },
    { 1, "\1", " for a unix socket" },
    { 9, "\1 and more", " for a unix socket" },
    { 13, "\4" FOUR "\234\100\0\26", " for 192.0.2.7:40000" },
    { 20, "\4" FOUR "\234\100\0\26and more", " for 192.0.2.7:40000" },
    { 12, "\4" FOUR "\234\100\0", "" },
    { 37, "\6" SIX SIX "\234\100\0\26", " for [2001:db8::1]:40000" },
    { 36, "\6" SIX SIX "\234\100\0", "" },
    { 9, "\2abcdefgh", "" },
};

/* The log names the client on the target's side, as far as it is known. */
START_TEST(origin_heard)
{
    uint8_t msg[200];
    char line[100];
    static Rig r;
    size_t len;
    int fd;

    engine_log_level = VP_LOG_VERBOSE;
    rig_new(&r, &rig_config);
    peer_session(&r);
    fd = rig_target(&r, "s");
    len = msg_init(msg, "s", 1000);
    memcpy(msg + len, origins[_i].origin, origins[_i].len);
    peer_send(&r, VP_PKT_CONTROL, VP_FLAG_CLIENT, 5, msg,
              len + origins[_i].len);
    close(rig_accept(&r, fd));
    snprintf(line, sizeof(line), "%s\n", origins[_i].said);
    ck_assert_msg(log_count("s: connection 5 to ") == 1 &&
                  log_count(" for ") == (origins[_i].said[0] != '\0') &&
                  log_count(line) >= 1, "%s", log_text());
    close(fd);
    rig_free(&r);
}
END_TEST

/* A client that came through a listener for both families */
START_TEST(origin_mapped)
{
    VPAddr from = { .len = sizeof(struct sockaddr_in6) }, to;
    struct sockaddr_in6 *in6 = (void *)&from.ss;
    uint8_t p[VP_ORIGIN_LEN_MAX];

    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(7);
    memcpy(&in6->sin6_addr, "\0\0\0\0\0\0\0\0\0\0\377\377\300\0\2\7", 16);
    to = from;
    ck_assert_uint_eq(origin_put(p, &from, &to), 13);
    ck_assert_mem_eq(p, "\4\300\0\2\7\300\0\2\7\0\7\0\7", 13);
    memcpy(&in6->sin6_addr, SIX, 16);
    ck_assert_uint_eq(origin_put(p, &from, &from), VP_ORIGIN_LEN_MAX);
    ck_assert_mem_eq(p, "\6" SIX SIX "\0\7\0\7", VP_ORIGIN_LEN_MAX);
    ck_assert_uint_eq(origin_put(p, &from, &to), 1); /* that can't be */
    ck_assert_int_eq(p[0], VP_ORIGIN_UNKNOWN);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("offer");

    suite_set(60, NULL, NULL);
    SUITE_ADD(s, told_at_start);
    SUITE_ADD(s, told_changes);
    SUITE_ADD(s, told_in_portions);
    SUITE_ADD(s, hears);
    SUITE_ADD(s, hears_too_many);
    SUITE_ADD(s, shown_in_portions);
    SUITE_ADD(s, order_counts);
    SUITE_ROWS(s, message, messages);
    SUITE_ROWS(s, typo, typos);
    SUITE_ADD(s, typo_later);
    SUITE_ADD(s, flapping);
    SUITE_LOOP(s, origin_told, 2);
    SUITE_ROWS(s, origin_heard, origins);
    SUITE_ADD(s, origin_mapped);
    return suite_run(s);
}
