/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_key.c - who has the key gets in, and nobody else; limits
 */
#include "tests/lib/rogue.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

static const char secret[] = "a key of more than sixteen bytes";

/* key_file() - with this text and mode; its path is good until the next */
static const char *key_file(const char *text, mode_t mode)
{
    static char path[PATH_LEN];

    file_path(path, "key");
    unlink(path);
    file_write(path, text, strlen(text));
    ck_assert_int_eq(chmod(path, mode), 0);
    return path;
}

static void key_set(Rogue *r, const char *text)
{
    r->key.len = strlen(text);
    memcpy(r->key.bytes, text, r->key.len);
}

/* Which key the daemon has and which the peer, and what the daemon says */
static const struct {
    const char *daemon;
    const char *peer;
    const char *says;       /* NULL: the channel is up */
} keys[] = {
    { secret, secret, NULL },
    { "", "", NULL },
    { "a key of more than sixteen bytes\r\n", secret, NULL },
    { secret, "a key of more than sixteen bytez", "different key" },
    { secret, "", "has no key" },
    { "", secret, "wants a key" },
};

START_TEST(handshake)
{
    static Rogue r;
    char where[PATH_LEN], option[TEXT_LEN] = "";
    Daemon *d;

    if (keys[_i].daemon[0] != '\0') {
        snprintf(option, sizeof(option), "-k %s",
                 key_file(keys[_i].daemon, 0600));
    }
    file_path(where, "channel");
    d = daemon_start("host", "-c unix-listen:%s:- -o out:127.0.0.1:0 %s",
                     where, option);
    daemon_wait(d, "oforward out: listening");
    rogue_new(&r, where);
    key_set(&r, keys[_i].peer);
    if (keys[_i].says == NULL) {
        ck_assert(rogue_shake(&r, WAIT_MS));
        daemon_wait(d, "channel up");
    } else {
        ck_assert(!rogue_shake(&r, 500));
        daemon_wait(d, "%s", keys[_i].says);
        ck_assert(!daemon_saw(d, "channel up"));
        ck_assert_int_le(daemon_count(d, "key"), 2);
    }
    rogue_hang_up(&r);
}
END_TEST

/* relay() - what one says goes to the other, for a while */
static void relay(int a, int b, int ms)
{
    int64_t end = now_ms() + ms;
    char buf[4096];

    while (now_ms() < end) {
        struct pollfd pfd[2] = {
            { .fd = a, .events = POLLIN }, { .fd = b, .events = POLLIN },
        };

        poll(pfd, 2, 20);
        for (int i = 0; i < 2; i++) {
            ssize_t n = recv(i == 0 ? a : b, buf, sizeof(buf), 0);

            if (n > 0 && send(i == 0 ? b : a, buf, (size_t)n,
                              MSG_NOSIGNAL) < 0) {
                return;
            }
        }
    }
}

/*
 * A proof that one channel of a daemon gives must not open another, be they
 * both listening ones (0) or one of each kind (1).
 */
START_TEST(reflection)
{
    char where[2][PATH_LEN];
    int fd[2], listener = -1;
    Daemon *d;

    file_path(where[0], "first");
    file_path(where[1], "second");
    if (_i == 1) {
        listener = listen_on(where[1], 1);
    }
    d = daemon_start("host", "-c unix-listen:%s:- -c unix-%s:%s:-:1 -k %s",
                     where[0], _i == 0 ? "listen" : "connect", where[1],
                     key_file(secret, 0600));
    daemon_wait(d, "ch0: channel unix-listen: listening");
    fd[0] = dial(where[0], false);
    if (_i == 0) {
        daemon_wait(d, "ch1: channel unix-listen: listening");
        fd[1] = dial(where[1], false);
    } else {
        fd[1] = accept_one(listener);
        set_nonblocking(fd[1]);
    }
    relay(fd[0], fd[1], 700);
    ck_assert(!daemon_saw(d, "channel up"));
    daemon_wait(d, "leads back to this daemon");
    /* nor must what a channel says be said to it again */
    for (int i = 0; i < 2; i++) {
        close(fd[i]);
    }
    fd[0] = dial(where[0], false);
    relay(fd[0], fd[0], 500);
    ck_assert(!daemon_saw(d, "channel up"));
    close(fd[0]);
}
END_TEST

/* What a good peer once said is of no use to who heard it. */
START_TEST(replay)
{
    char where[2][PATH_LEN], said[65536];
    Daemon *host, *guest;
    int listener, fd[2];
    size_t len = 0;
    int64_t end;

    file_path(where[0], "host");
    file_path(where[1], "wire");
    listener = listen_on(where[1], 1);
    host = daemon_start("host", "-c unix-listen:%s:- -k %s", where[0],
                        key_file(secret, 0600));
    daemon_wait(host, "listening");
    guest = daemon_start("guest", "-c unix-connect:%s:- -o x:127.0.0.1:0 "
                         "-k %s", where[1], key_file(secret, 0600));
    fd[0] = dial(where[0], false);
    fd[1] = accept_one(listener);
    set_nonblocking(fd[1]);
    for (end = now_ms() + WAIT_MS; now_ms() < end;) {
        ssize_t n;

        if (daemon_saw(host, "channel up") && daemon_saw(guest, "channel up")) {
            break;
        }
        n = recv(fd[1], said + len, sizeof(said) - len, 0);
        if (n > 0) {
            send_all(fd[0], said + len, (size_t)n);
            len += (size_t)n;
        }
        n = recv(fd[0], said + len, sizeof(said) - len, 0);
        if (n > 0) {
            send_all(fd[1], said + len, (size_t)n);
        }
        sleep_ms(2);
    }
    ck_assert(daemon_saw(host, "channel up"));
    close(fd[0]);
    close(fd[1]);
    daemon_wait(host, "channel down");
    daemon_mark(host);
    fd[0] = dial(where[0], false);
    send_all(fd[0], said, len);
    sleep_ms(500);
    ck_assert(!daemon_saw(host, "channel up"));
    close(fd[0]);
}
END_TEST

/* listening_host() - a daemon whose channel listens at vp_dir/channel */
static Daemon *listening_host(char *where, bool keyed)
{
    char option[TEXT_LEN] = "";
    Daemon *d;

    if (keyed) {
        text_format(option, sizeof(option), "-k %s", key_file(secret, 0600));
    }
    file_path(where, "channel");
    d = daemon_start("host", "-c unix-listen:%s:- -o out:127.0.0.1:0 %s",
                     where, option);
    daemon_wait(d, "out: listening");
    return d;
}

/*
 * Who has seen the handshake knows which session there is, but has no key,
 * or isn't where that was.  So whatever he says first on a connection of his
 * own, the peer that is there stays.
 */
static const struct {
    bool key;
    uint16_t flags;
    bool proved;            /* with the key, but over an old token */
} onlookers[] = {
    { true, 0, false },
    { true, VP_HELLO_BYE, false },
    { true, VP_HELLO_KEYED, false },
    { true, VP_HELLO_KEYED, true },
    { true, VP_HELLO_KEYED | VP_HELLO_BYE, true },
    { false, 0, false },
    { false, VP_HELLO_BYE, false },
};

START_TEST(onlooker)
{
    static Rogue r, other;
    char where[PATH_LEN];
    Daemon *d = listening_host(where, onlookers[_i].key);

    rogue_new(&r, where);
    if (onlookers[_i].key) {
        key_set(&r, secret);
    }
    ck_assert(rogue_shake(&r, WAIT_MS) && rogue_settle(&r, WAIT_MS));
    rogue_new(&other, where);
    other.peer.fd = dial(where, false);
    if (onlookers[_i].proved) {
        other.key = r.key;
    }
    other.flags = onlookers[_i].flags;
    other.token = random64();
    other.peer.heard.token = r.peer.heard.token;
    other.peer.hello.my_epoch = r.token;
    other.peer.hello.peer_epoch = r.peer.heard.token;
    rogue_hello(&other);
    ck_assert(rogue_flush(&other, WAIT_MS));
    rogue_wait(&other, 200, NULL);
    rogue_wait(&r, 20, NULL);
    ck_assert(r.up && rogue_settle(&r, WAIT_MS));
    rogue_hang_up(&other);
    ck_assert(rogue_settle(&r, WAIT_MS));
    ck_assert(!daemon_saw(d, "session ended|ends the session"));
    rogue_hang_up(&r);
}
END_TEST

/* The peer itself may come anew, before the daemon has seen it leave. */
START_TEST(takes_over)
{
    static Rogue r, again;
    char where[PATH_LEN];

    listening_host(where, _i == 1);
    rogue_new(&r, where);
    rogue_new(&again, where);
    if (_i == 1) {
        key_set(&r, secret);
        key_set(&again, secret);
    }
    ck_assert(rogue_shake(&r, WAIT_MS) && rogue_settle(&r, WAIT_MS));
    again.peer.hello.my_epoch = r.token;
    again.peer.hello.peer_epoch = r.peer.heard.token;
    ck_assert(rogue_shake(&again, WAIT_MS) && rogue_settle(&again, WAIT_MS));
    rogue_wait(&r, 500, NULL);
    ck_assert_int_lt(r.peer.fd, 0);
    rogue_hang_up(&again);
}
END_TEST

static const struct {
    const char *text;
    mode_t mode;
    const char *says;
} files[] = {
    { "a key of more than sixteen bytes", 0640, "others can read" },
    { "a key of more than sixteen bytes", 0604, "others can read" },
    { "a key of more than sixteen bytes", 0620, "others can read" },
    { "short", 0600, "at least 16" },
    { "", 0600, "at least 16" },
};

START_TEST(key_files)
{
    Daemon *d;

    d = daemon_start("host", "-c unix-listen:%s/c:- -k %s", vp_dir,
                     key_file(files[_i].text, files[_i].mode));
    ck_assert_int_eq(daemon_exit(d), 2);
    ck_assert(daemon_saw(d, "--key"));
    ck_assert(daemon_saw(d, files[_i].says));
}
END_TEST

/* key_fill() - a text of so many bytes, good until the next */
static char *key_fill(int len, const char *end)
{
    static char text[VP_PKT_HDR_LEN + sizeof(((VPKey *)NULL)->bytes)];

    memset(text, 'k', (size_t)len);
    snprintf(text + len, sizeof(text) - (size_t)len, "%s", end);
    return text;
}

/* How many bytes a key may have, which a newline at its end isn't one of */
static const struct {
    int len;
    const char *end;
    const char *says;       /* NULL: it is a key */
} lengths[] = {
    { 15, "", "at least 16" },
    { 15, "\n", "at least 16" },
    { 16, "", NULL },
    { 16, "\n", NULL },
    { 1023, "", NULL },
    { 1023, "\n", NULL },
    { 1023, "\r\n", NULL },
    { 1024, "", "at most 1023" },
    { 1024, "\n", "at most 1023" },
};

START_TEST(key_lengths)
{
    static Rogue r;
    char where[PATH_LEN];
    Daemon *d;

    file_path(where, "channel");
    d = daemon_start("host", "-c unix-listen:%s:- -k %s", where,
                     key_file(key_fill(lengths[_i].len, lengths[_i].end),
                              0600));
    if (lengths[_i].says != NULL) {
        ck_assert_int_eq(daemon_exit(d), 2);
        ck_assert(daemon_saw(d, "--key"));
        ck_assert(daemon_saw(d, lengths[_i].says));
        return;
    }
    daemon_wait(d, "listening");
    rogue_new(&r, where);
    key_set(&r, key_fill(lengths[_i].len, ""));
    ck_assert(rogue_shake(&r, WAIT_MS));
    rogue_hang_up(&r);
}
END_TEST

/* Who owns the key file could put another key into it. */
START_TEST(key_file_owner)
{
    const char *path = key_file(secret, 0600);
    Daemon *d;

    if (geteuid() != 0) {
        PASS_OVER("root, who can give a file away");
    }
    ck_assert_int_eq(chown(path, 65534, 65534), 0);
    d = daemon_start("host", "-c unix-listen:%s/c:- -k %s", vp_dir, path);
    ck_assert_int_eq(daemon_exit(d), 2);
    ck_assert(daemon_saw(d, "--key .*belongs to another user"));
}
END_TEST

static const char *const no_keys[] = { "/nonexistent/key", "/", "/dev/zero" };

START_TEST(key_file_missing)
{
    Daemon *d = daemon_start("host", "-c unix-listen:%s/c:- -k %s", vp_dir,
                             no_keys[_i]);

    ck_assert_int_eq(daemon_exit(d), 2);
    ck_assert(daemon_saw(d, "--key '/"));
}
END_TEST

static const struct {
    const char *host;
    bool key, warns;
} warnings[] = {
    { "0.0.0.0", false, true }, { "0.0.0.0", true, false },
    { "127.0.0.1", false, false },
};

/* A warning where anybody can reach the port, and only there */
START_TEST(key_warning)
{
    const char *key = key_file(secret, 0600);
    Daemon *d = daemon_start("host", "-c tcp-listen:%s:%d %s %s",
                             warnings[_i].host, free_port(),
                             warnings[_i].key ? "-k" : "-v",
                             warnings[_i].key ? key : "-v");

    daemon_wait(d, "listening");
    sleep_ms(50);
    ck_assert_int_eq(daemon_saw(d, "warn ch0: .*-k keeps"), warnings[_i].warns);
}
END_TEST

/* Options that limit the peer, and how many of 40 opens that lets through */
static const struct {
    const char *options;
    const char *service;
    int most;
    int a_second;   /* so many more */
    int unanswered; /* of those let through */
} limits[] = {
    { "--max-conns 7", "deaf", 7, 0, 0 },
    { "--max-half-open 5", "full", 5, 0, 5 },
    { "--max-opens 9", "deaf", 9, 9, 0 },
    { "--max-half-open 5", "deaf", 40, 0, 0 },
};

/* answered() - wait for the answers to @n opens but those that get none */
static void answered(Rogue *r, int n)
{
    int64_t end = now_ms() + WAIT_MS;

    while (r->up && (int)(r->refused + r->acked) < n && now_ms() < end) {
        rogue_settle(r, WAIT_MS);
    }
    ck_assert_int_ge((int)(r->refused + r->acked), n);
}

START_TEST(limit)
{
    static Rogue r;
    char where[PATH_LEN], full[PATH_LEN], deaf[TEXT_LEN];
    int64_t start;
    Daemon *d;
    int fd, fds, most;

    file_path(where, "channel");
    file_path(full, "full");
    fd = listen_on(full, 0);
    dial(full, false);
    listen_any(deaf);
    d = daemon_start("host", "-c unix-listen:%s:- -i deaf:%s -i full:%s:- %s",
                     where, deaf, full, limits[_i].options);
    daemon_wait(d, "listening");
    rogue_new(&r, where);
    ck_assert(rogue_shake(&r, WAIT_MS));
    fds = daemon_fds(d);
    start = now_ms();
    for (int i = 0; i < 40; i++) {
        rogue_init(&r, (uint32_t)i, limits[_i].service, 0);
        if (i % 5 == 4) { /* so many may be under way unanswered */
            answered(&r, i + 1 - limits[_i].unanswered);
        }
    }
    most = limits[_i].most +
           limits[_i].a_second * (int)(now_ms() - start + 999) / 1000;
    ck_assert_int_ge((int)r.refused, 40 - most);
    ck_assert_int_le(daemon_fds(d), fds + most);
    ck_assert_uint_eq(r.sessions, 1);
    close(fd);
    rogue_hang_up(&r);
}
END_TEST

int main(void)
{
    Suite *suite = harness_suite("key");

    SUITE_ROWS(suite, handshake, keys);
    SUITE_LOOP(suite, reflection, 2);
    SUITE_ADD(suite, replay);
    SUITE_ROWS(suite, onlooker, onlookers);
    SUITE_LOOP(suite, takes_over, 2);
    SUITE_ROWS(suite, key_files, files);
    SUITE_ROWS(suite, key_lengths, lengths);
    SUITE_ADD(suite, key_file_owner);
    SUITE_ROWS(suite, key_file_missing, no_keys);
    SUITE_ROWS(suite, key_warning, warnings);
    SUITE_ROWS(suite, limit, limits);
    return harness_run(suite);
}
