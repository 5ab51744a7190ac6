/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_monitor.c - daemons that are looked at and changed while they work
 *
 * Every command goes to daemons that carry connections: a background of some
 * that never end and whose every byte is checked.  Whatever a command does to
 * others, these must go on.
 */
#define _XOPEN_SOURCE 700

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <regex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "tests/lib/engine.h"
#include "monitor.h"
#include "names.h"
#include "talk.h"
#include "traffic.h"

#define KIB UINT64_C(1024)
#define MIB (1024 * KIB)
#define ID_32 "abcdefghijklmnopqrstuvwxyz012345"
#define CLIENTS_MAX 128         /* clients that a monitor has, at most */

/* Two daemons with monitors, a background, and a service t for the test */
typedef struct Scene {
    Daemon *daemon[2];          /* host, guest */
    char path[2][PATH_LEN];     /* of their monitors */
    int mon[2];                 /* clients in batch mode */
    char channel[PATH_LEN];     /* unix socket: the guest listens */
    Traffic traffic;
    char where[TEXT_LEN];       /* oforward t of the host */
    char target[TEXT_LEN];      /* what the guest connects it to */
    int listener;
} Scene;

/* flow() - let the background move some more */
static void flow(Scene *s)
{
    uint64_t goal = traffic_moved(&s->traffic) + 256 * KIB;
    int64_t end = now_ms() + WAIT_MS;

    while (traffic_moved(&s->traffic) < goal) {
        ck_assert_msg(now_ms() < end, "the background has stopped");
        traffic_run(&s->traffic, traffic_never, 5);
    }
    for (size_t i = 0; i < s->traffic.n_flows; i++) {
        for (int k = 0; k < 2; k++) {
            ck_assert_msg(s->traffic.flows[i].side[k].error == 0,
                          "the background suffers: %s",
                          strerror(s->traffic.flows[i].side[k].error));
        }
    }
}

/* scene_start() - host_more, guest_more: further options */
static void scene_start(Scene *s, const char *host_more,
                        const char *guest_more)
{
    memset(s, 0, sizeof(*s));
    file_path(s->path[0], "host.monitor");
    file_path(s->path[1], "guest.monitor");
    file_path(s->channel, "channel");
    traffic_init(&s->traffic);
    s->listener = listen_any(s->target);
    s->daemon[1] = daemon_start("guest", "-c unix-listen:%s:- -m %s -i s:%s "
                                "-i t:%s %s", s->channel, s->path[1],
                                traffic_listen(&s->traffic), s->target,
                                guest_more);
    s->daemon[0] = daemon_start("host", "-c unix-connect:%s:- -m %s "
                                "-o s:127.0.0.1:0 -o t:127.0.0.1:0 %s",
                                s->channel, s->path[0], host_more);
    daemon_up(s->daemon[0]);
    daemon_up(s->daemon[1]);
    text_format(s->where, sizeof(s->where), "%s",
                daemon_listens(s->daemon[0], "t"));
    s->mon[0] = monitor_batch(s->path[0]);
    s->mon[1] = monitor_batch(s->path[1]);
    s->traffic.hold = true;
    for (int i = 0; i < 3; i++) {
        traffic_add(&s->traffic, daemon_listens(s->daemon[0], "s"), 0,
                    FOREVER, i == 1 ? 1000 : FOREVER);
    }
    ck_assert(traffic_run(&s->traffic, traffic_paired, WAIT_MS));
    flow(s);
}

static void scene_end(Scene *s)
{
    flow(s);
    traffic_free(&s->traffic);
    close(s->mon[0]);
    close(s->mon[1]);
    close(s->listener);
}

/* name_of() - of a socket's own end or of its peer, ADDR:PORT */
static void name_of(int fd, bool peer, char *name)
{
    struct sockaddr_in in;
    socklen_t len = sizeof(in);

    ck_assert((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&in,
                                                 &len) == 0);
    text_format(name, TEXT_LEN, "%s:%d", inet_ntoa(in.sin_addr),
                ntohs(in.sin_port));
}

/* conn_line() - the only connection of a service in "info conns -k" */
static const char *conn_line(int mon, const char *service)
{
    const char *answer = monitor_ask(mon, "info conns -k"), *found = NULL;
    const char *line;

    for (size_t n = 0; (line = line_find(answer, "conn", n)); n++) {
        if (strcmp(value(line, "service"), service) == 0) {
            ck_assert_msg(found == NULL, "two connections of %s", service);
            found = line;
        }
    }
    ck_assert_msg(found != NULL, "no connection of %s in:\n%s", service,
                  answer);
    return found;
}

/* oforward_where() - where the host listens for a service */
static void oforward_where(int mon, const char *service, char *where)
{
    const char *answer = monitor_ask(mon, "info oforwards -k"), *line;

    for (size_t n = 0; (line = line_find(answer, "oforward", n)); n++) {
        if (strcmp(value(line, "service"), service) == 0) {
            text_format(where, TEXT_LEN, "%s", value(line, "listening"));
            return;
        }
    }
    ck_abort_msg("no oforward %s in:\n%s", service, answer);
}

/* --- what is shown ------------------------------------------------------ */

/* The words of each line, as the README lists them: programs rely on these. */
static const struct {
    const char *info;
    const char *keys;
} keys[] = {
    { "status", "status version pid age channels up forwards conns log" },
    { "channels", "channel id state spec session_us in_bytes out_bytes "
      "in_packets out_packets rtt_us rate in_flight limit resyncs reconnects "
      "last_error last_error_us protocol peer" },
    { "oforwards", "oforward channel service spec offered listening" },
    { "iforwards", "iforward channel service spec" },
    { "forwards", "forward channel kind service spec conns max_conns idle "
      "opened refused_unknown refused_target refused_limit "
      "refused_resources refused_ending refused_client reset_owner reset_peer "
      "reset_daemon reset_session reset_idle sent_bytes received_bytes" },
    { "services", "service channel service offered" },
    { "conns", "conn id service from to in out age_us idle_us sent_bytes "
      "received_bytes credit waiting" },
    { "stats", "stats channel conns max_conns memory max_memory "
      "kernel_memory opened_here opened_there refused_unknown refused_target "
      "refused_limit refused_resources refused_ending refused_client "
      "reset_owner reset_peer "
      "reset_daemon reset_session reset_idle" },
};

/* check_keys() - each line has the words, maybe more after them */
static void check_keys(const char *answer, const char *words)
{
    size_t lines = 0;

    for (const char *p = answer; *p; p = strchr(p, '\n') + 1) {
        const char *w = words, *at = p;

        while (*w) {
            size_t len = strcspn(w, " ");

            ck_assert_msg(strncmp(at, w, len) == 0 &&
                          at[len] == (w == words ? ' ' : '='),
                          "'%s' where '%.*s' is due in: %s", at, (int)len, w,
                          p);
            w += len + strspn(w + len, " ");
            at += strcspn(at, " \n");
            at += *w ? strspn(at, " ") : 0;
        }
        lines++;
    }
    ck_assert_msg(lines > 0, "no line for: %s", words);
}

/*
 * check_event_keys() - the same of an event that shows a row of "info WHAT -k",
 * and then perhaps more
 */
static void check_event_keys(const char *line, const char *event,
                             const char *what, const char *more)
{
    char words[TEXT_LEN] = "";

    for (int i = 0; i < COUNT_OF(keys); i++) {
        if (strcmp(keys[i].info, what) == 0) {
            text_format(words, sizeof(words), "%s%s%s", event,
                        strchr(keys[i].keys, ' '), more);
        }
    }
    check_keys(line, words);
}

/* readme() - its text with single blanks, for the caller to free */
static char *readme(void)
{
    const char *top = getenv("VP_TOP");
    char path[1100];
    size_t len;
    char *text;
    FILE *f;

    snprintf(path, sizeof(path), "%s/README", top ? top : ".");
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s: %s", path, strerror(errno));
    text = calloc(1, 200000);
    ck_assert_ptr_nonnull(text);
    len = fread(text, 1, 199999, f);
    fclose(f);
    for (size_t i = 0, n = 0; i <= len; i++) {
        text[n] = isspace((unsigned char)text[i]) ? ' ' : text[i];
        n += n == 0 || text[n] != ' ' || text[n - 1] != ' ';
    }
    return text;
}

START_TEST(documented_keys)
{
    char *text = readme();
    Scene s;

    scene_start(&s, "", "");
    for (int i = 0; i < COUNT_OF(keys); i++) {
        for (int k = 0; k < 2; k++) {
            bool other = strcmp(keys[i].info, k ? "oforwards" :
                                "iforwards") == 0 ||
                         (k && strcmp(keys[i].info, "services") == 0);

            if (!other) {
                flow(&s);
                check_keys(monitor_ask(s.mon[k], "info %s -k", keys[i].info),
                           keys[i].keys);
            }
        }
        ck_assert_msg(strstr(text, keys[i].keys) != NULL,
                      "not in the README: %s", keys[i].keys);
    }
    free(text);
    scene_end(&s);
}
END_TEST

/* A connection's figures, at both ends, beside what was sent over it. */
START_TEST(connection_figures)
{
    static unsigned char bulk[100000];
    char name[2][2][TEXT_LEN];
    const char *line[2];
    uint64_t idle;
    int fds[2];
    Scene s;

    scene_start(&s, "", "");
    through(s.where, s.listener, fds);
    send_all(fds[0], bulk, sizeof(bulk));
    recv_all(fds[1], bulk, sizeof(bulk));
    send_all(fds[1], bulk, 6789);
    recv_all(fds[0], bulk, 6789);
    flow(&s);
    for (int k = 0; k < 2; k++) {
        name_of(fds[k], k != 0, name[k][0]);
        name_of(fds[k], k == 0, name[k][1]);
        line[k] = strdup(conn_line(s.mon[k], "t"));
        ck_assert_str_eq(value(line[k], "from"), name[k][0]);
        ck_assert_str_eq(value(line[k], "to"), name[k][1]);
        ck_assert_str_eq(value(line[k], "in"), "OPEN");
        ck_assert_str_eq(value(line[k], "out"), "OPEN");
        ck_assert_uint_eq(number(line[k], "sent_bytes"), k ? 6789 : 100000);
        ck_assert_uint_eq(number(line[k], "received_bytes"),
                          k ? 100000 : 6789);
        ck_assert_uint_eq(number(line[k], "waiting"), 0);
        ck_assert_uint_ge(number(line[k], "credit"), 1);
        ck_assert_uint_ge(number(line[k], "age_us"), 1);
        ck_assert_uint_le(number(line[k], "idle_us"),
                          number(line[k], "age_us"));
    }
    ck_assert_str_eq(s.where, value(line[0], "to"));
    ck_assert_str_eq(s.target, value(line[1], "to"));
    idle = number(line[0], "idle_us");
    sleep_ms(100);
    ck_assert_uint_ge(number(conn_line(s.mon[0], "t"), "idle_us"),
                      idle + 90000);
    ck_assert_uint_lt(number(conn_line(s.mon[0], "t"), "idle_us"), 1000 *
                      (uint64_t)WAIT_MS);

    shutdown(fds[0], SHUT_WR);
    expect_eof(fds[1]);
    ck_assert_str_eq(value(conn_line(s.mon[0], "t"), "in"), "CLOSED");
    ck_assert_str_eq(value(conn_line(s.mon[0], "t"), "out"), "OPEN");
    ck_assert_str_eq(value(conn_line(s.mon[1], "t"), "out"), "CLOSED");
    ck_assert_str_eq(value(conn_line(s.mon[1], "t"), "in"), "OPEN");
    close(fds[0]);
    close(fds[1]);
    free((char *)line[0]);
    free((char *)line[1]);
    scene_end(&s);
}
END_TEST

/* A client that doesn't read: bytes wait at its side, credit ends opposite. */
START_TEST(waiting_figures)
{
    static unsigned char bulk[64 * 1024];
    int64_t end = now_ms() + WAIT_MS;
    uint64_t waiting, credit, sent, received, total = 0;
    ssize_t n;
    int fds[2];
    Scene s;

    scene_start(&s, "", "");
    through(s.where, s.listener, fds);
    set_nonblocking(fds[1]);
    do {
        ck_assert_msg(now_ms() < end, "nothing ever waits");
        while ((n = send(fds[1], bulk, sizeof(bulk), MSG_NOSIGNAL)) > 0) {
            total += (uint64_t)n;
        }
        flow(&s);
        waiting = number(conn_line(s.mon[0], "t"), "waiting");
        received = number(conn_line(s.mon[0], "t"), "received_bytes");
        credit = number(conn_line(s.mon[1], "t"), "credit");
        sent = number(conn_line(s.mon[1], "t"), "sent_bytes");
    } while (waiting == 0 || credit > 0 || sent != received + waiting);
    ck_assert_uint_le(sent, total);
    ck_assert_uint_ge(number(monitor_ask(s.mon[0], "info stats -k"),
                             "memory"), waiting);
    for (uint64_t left = total; left > 0; left -= (uint64_t)n) {
        n = recv(fds[0], bulk, sizeof(bulk), 0);
        ck_assert_msg(n > 0, "recv: %s", strerror(errno));
    }
    ck_assert_uint_eq(number(conn_line(s.mon[0], "t"), "received_bytes"),
                      total);
    ck_assert_uint_eq(number(conn_line(s.mon[0], "t"), "waiting"), 0);
    close(fds[0]);
    close(fds[1]);
    scene_end(&s);
}
END_TEST

/* Figures of a channel that works, of the daemon, and of its memory. */
START_TEST(channel_figures)
{
    const char *line, *error;
    uint64_t age, bytes[2], limit, moved;
    Scene s;

    scene_start(&s, "", "");
    for (int k = 0; k < 2; k++) {
        line = monitor_ask(s.mon[k], "info status -k");
        ck_assert_int_eq((int)number(line, "pid"), s.daemon[k]->pid);
        ck_assert_uint_eq(number(line, "channels"), 1);
        ck_assert_uint_eq(number(line, "up"), 1);
        ck_assert_uint_eq(number(line, "forwards"), 2);
        ck_assert_uint_eq(number(line, "conns"), 3);
        ck_assert_str_eq(value(line, "log"), "info");
        ck_assert_uint_lt(number(line, "age"), 2 * WAIT_MS / 1000);

        line = monitor_ask(s.mon[k], "info channels -k");
        ck_assert_uint_eq(line_count(line, "channel"), 1);
        ck_assert_uint_eq(number(line, "id"), 0);
        ck_assert_str_eq(value(line, "state"), "up");
        ck_assert(strstr(value(line, "spec"), s.channel) != NULL);
        ck_assert_uint_eq(number(line, "resyncs"), 0);
        ck_assert_uint_eq(number(line, "reconnects"), 0);
        /* the one that connects may have come too early */
        error = value(line, "last_error");
        ck_assert_msg(!*error || strstr(error, "No such file") ||
                      strstr(error, "refused"), "%s", error);
        ck_assert_uint_ge(number(line, "rtt_us"), 1);
        ck_assert_uint_ge(number(line, "rate"), 1000);
        limit = number(line, "limit");
        ck_assert_uint_ge(limit, 1);
        /* more than the limit, too, when that has just been lowered */
        ck_assert_uint_le(number(line, "in_flight"), 4 << 20);
        for (int i = 0; i < 2; i++) {
            bytes[i] = number(line, i ? "out_bytes" : "in_bytes");
        }
        /* acks have no payload, and go the way that has less to carry */
        ck_assert_uint_ge(bytes[0] + bytes[1],
                          20 * (number(line, "in_packets") +
                                number(line, "out_packets")));
        age = number(line, "session_us");
        ck_assert_uint_ge(age, 1);
        /*
         * Some flows go one way only, in sum both ways are used; and at first
         * what is received may have lain in the clients' sockets already.
         */
        moved = bytes[0] + bytes[1];
        for (int i = 0; i < 100 && moved < bytes[0] + bytes[1] + 256 * KIB;
             i++) {
            flow(&s);
            line = monitor_ask(s.mon[k], "info channels -k");
            moved = number(line, "in_bytes") + number(line, "out_bytes");
        }
        ck_assert_uint_ge(moved, bytes[0] + bytes[1] + 256 * KIB);
        ck_assert_uint_gt(number(line, "session_us"), age);

        line = monitor_ask(s.mon[k], "info stats -k");
        ck_assert_uint_eq(number(line, "conns"), 3);
        ck_assert_uint_ge(number(line, "max_conns"), 1000);
        ck_assert_uint_ge(number(line, "memory"), 1000);
        ck_assert_uint_le(number(line, "memory"), number(line, "max_memory"));
    }
    scene_end(&s);
}
END_TEST

/* account() - the line of a forward of that service in "info forwards" */
static const char *account(int mon, const char *kind, const char *service)
{
    const char *answer = monitor_ask(mon, "info forwards -k"), *line;
    size_t n = 0;

    do {
        line = line_find(answer, "forward", n++);
        ck_assert_msg(line != NULL, "no %s %s in:\n%s", kind, service, answer);
    } while (strcmp(value(line, "kind"), kind) != 0 ||
             strcmp(value(line, "service"), service) != 0);
    return line;
}

/* Forwards have limits and counts of their own: max= here, idle= there. */
START_TEST(forward_limits)
{
    char where[2][TEXT_LEN], target[TEXT_LEN], more[2 * TEXT_LEN];
    int listener = listen_any(target), fds[3][2];
    const char *line;
    Scene s;

    text_format(more, sizeof(more), "-v -i u:%s -i v:%s,idle=1,max=9", target,
                target);
    scene_start(&s, "-o u:127.0.0.1:0,max=2 -o v:127.0.0.1:0", more);
    oforward_where(s.mon[0], "u", where[0]);
    oforward_where(s.mon[0], "v", where[1]);
    through(where[0], listener, fds[0]);
    through(where[0], listener, fds[1]);
    send_all(fds[1][0], "abc", 3);
    recv_all(fds[1][1], more, 3);
    dial_reset(where[0]);
    daemon_wait(s.daemon[0], " warn ch0: u: connection refused: there are as "
                "many connections as max= allows$");
    line = account(s.mon[0], "oforward", "u");
    ck_assert_uint_eq(number(line, "conns"), 2);
    ck_assert_uint_eq(number(line, "max_conns"), 2);
    ck_assert_uint_eq(number(line, "idle"), 0);
    ck_assert_uint_eq(number(line, "opened"), 2);
    ck_assert_uint_eq(number(line, "refused_limit"), 1);
    ck_assert_uint_eq(number(line, "sent_bytes"), 3);
    line = account(s.mon[1], "iforward", "u");
    ck_assert_uint_eq(number(line, "received_bytes"), 3);
    through(where[1], listener, fds[2]);
    expect_reset(fds[2][0]);
    expect_reset(fds[2][1]);
    daemon_wait(s.daemon[1], " verbose ch0: v: connection .* idle for 1 s$");
    line = account(s.mon[1], "iforward", "v");
    ck_assert_uint_eq(number(line, "conns"), 0);
    ck_assert_uint_eq(number(line, "max_conns"), 9);
    ck_assert_uint_eq(number(line, "idle"), 1);
    ck_assert_uint_eq(number(line, "opened"), 1);
    ck_assert_uint_eq(number(line, "reset_idle"), 1);
    line = account(s.mon[0], "oforward", "v");
    ck_assert_uint_eq(number(line, "reset_peer"), 1);
    talk(fds[0]); /* these have no such limit */
    for (int i = 0; i < 6; i++) {
        close(fds[i / 2][i % 2]);
    }
    scene_end(&s);
}
END_TEST

/* wait_state() - until channel 0 has it; the line, as long as the answer */
static const char *wait_state(int mon, const char *state)
{
    int64_t end = now_ms() + WAIT_MS;
    const char *line;

    do {
        ck_assert_msg(now_ms() < end, "the channel is never %s", state);
        sleep_ms(10);
        line = monitor_ask(mon, "info channels -k");
    } while (strcmp(value(line, "state"), state) != 0);
    return line;
}

/* A channel that comes late, is cut, and is away: with connections open. */
START_TEST(channel_history)
{
    RelayEnd ends[2] = { { .kind = RELAY_LISTEN }, { .kind = RELAY_CONNECT } };
    char path[PATH_LEN], target[TEXT_LEN];
    int listener = listen_any(target), mon, fds[2];
    int64_t start, cut;
    const char *line;
    Daemon *host;
    Relay relay;

    file_path(ends[0].path, "near");
    file_path(ends[1].path, "far");
    file_path(path, "monitor");
    host = daemon_start("host", "-c unix-connect:%s:- -o s:127.0.0.1:0 -m %s",
                        ends[0].path, path);
    daemon_start("guest", "-c unix-listen:%s:- -i s:%s", ends[1].path, target);
    mon = monitor_batch(path);
    line = wait_state(mon, "down");
    ck_assert_uint_eq(number(line, "session_us"), 0);
    ck_assert_uint_eq(number(line, "reconnects"), 0);
    ck_assert_msg(strstr(value(line, "last_error"), "No such file"),
                  "nothing tells why the channel can't be opened: %s", line);

    relay_start(&relay, ends);
    line = wait_state(mon, "up");
    start = now_ms();
    ck_assert_uint_eq(number(line, "reconnects"), 0);
    fds[0] = dial(daemon_listens(host, "s"), true);
    fds[1] = accept_one(listener);
    talk(fds);
    cut = now_ms();
    relay_tell(&relay, RELAY_AWAY);
    line = wait_state(mon, "down");
    ck_assert_str_ne(value(line, "last_error"), "");
    ck_assert_uint_le(number(line, "last_error_us"),
                      (uint64_t)(now_ms() - cut + 2) * 1000);
    ck_assert_uint_ge(number(line, "session_us") + 1000000,
                      (uint64_t)(cut - start) * 1000);
    ck_assert_uint_eq(number(monitor_ask(mon, "info status -k"), "up"), 0);
    ck_assert_str_eq(value(conn_line(mon, "s"), "out"), "OPEN");
    relay_tell(&relay, RELAY_GO);
    line = wait_state(mon, "up");
    ck_assert_uint_eq(number(line, "reconnects"), 1);
    ck_assert_str_ne(value(line, "last_error"), "");
    talk(fds);
    close(fds[0]);
    close(fds[1]);
    close(listener);
    close(mon);
}
END_TEST

/* --- for people --------------------------------------------------------- */

/* ask_by_socat() - send lines to the monitor as the README says */
static const char *ask_by_socat(const Scene *s, const char *lines)
{
    static const char prompt[] = "(qemu-vp) ";
    static char answer[65536];
    char path[PATH_LEN];
    FILE *f;

    file_path(path, "socat.out");
    command_wait(command_start("socat", "printf '%s' | socat -t %d - "
                               "UNIX-CONNECT:%s > %s", lines, WAIT_MS / 1000,
                               s->path[0], path));
    f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    answer[fread(answer, 1, sizeof(answer) - 1, f)] = '\0';
    fclose(f);
    ck_assert_msg(strncmp(answer, prompt, sizeof(prompt) - 1) == 0,
                  "no prompt at first: %s", answer);
    return answer + sizeof(prompt) - 1;
}

/* reload_conf() - write the init file that a reload then reads */
static void reload_conf(const char *lines)
{
    char text[3 * TEXT_LEN];

    text_format(text, sizeof(text), "channel unix-listen:%s/c:-\n%s\n",
                vp_dir, lines);
    file_write("conf", text, strlen(text));
}

/* Who has it read again by the monitor is told how that ended. */
START_TEST(reload_says)
{
    char path[PATH_LEN], line[2 * TEXT_LEN], where[TEXT_LEN];
    int listener = listen_any(where), mon;

    ck_assert(chdir(vp_dir) == 0);
    file_path(path, "m");
    reload_conf("");
    daemon_start("host", "-C %s/conf -m %s", vp_dir, path);
    mon = monitor_batch(path);
    ck_assert_int_eq(execute(path, "reload"), 0);
    reload_conf("iforward new:127.0.0.1:1");
    ck_assert_int_eq(execute(path, "reload"), 0);
    ck_assert_int_eq(execute(path, "info iforwards"), 0);
    ck_assert(strstr(executed(1), "new") != NULL);

    reload_conf("nonsense");
    ck_assert_int_eq(execute(path, "reload"), 1);
    ck_assert_msg(strstr(executed(2), "nothing reloaded: ") != NULL,
                  "%s", executed(2));
    text_format(line, sizeof(line), "oforward s:%s", where);
    reload_conf(line);
    ck_assert_int_eq(execute(path, "reload"), 1);
    ck_assert_msg(strstr(executed(2), "not all of it") != NULL, "%s",
                  executed(2));
    text_format(line, sizeof(line), "logfile %s/none/log", vp_dir);
    reload_conf(line);
    ck_assert_int_eq(execute(path, "reload"), 1);
    ck_assert_msg(strstr(executed(2), "cannot open the log file") != NULL,
                  "%s", executed(2));
    reload_conf("");
    ck_assert(unlink(path) == 0 && mkdir(path, 0700) == 0);
    monitor_refuses(mon, "reload", "cannot listen");
    ck_assert(rmdir(path) == 0);
    monitor_ask(mon, "reload");
    ck_assert_int_eq(execute(path, "reload"), 0);
    close(listener);
    close(mon);
}
END_TEST

/* Of a forward that is changed, none counts who came through the old one. */
START_TEST(limit_of_changed)
{
    char path[PATH_LEN], target[TEXT_LEN], where[TEXT_LEN];
    int listener = listen_any(target), fds[2][2], mon;

    ck_assert(chdir(vp_dir) == 0);
    file_path(path, "m");
    reload_conf("oforward u:127.0.0.1:0,max=1");
    daemon_start("host", "-C %s/conf -m %s", vp_dir, path);
    daemon_start("guest", "-c unix-connect:%s/c:- -i u:%s", vp_dir,
                 target);
    mon = monitor_batch(path);
    oforward_where(mon, "u", where);
    through(where, listener, fds[0]);
    dial_reset(where);
    reload_conf("oforward u:127.0.0.1:0,max=1,idle=600");
    monitor_ask(mon, "reload");
    ck_assert_uint_eq(number(account(mon, "oforward", "u"), "conns"), 0);
    oforward_where(mon, "u", where);
    through(where, listener, fds[1]);
    ck_assert_uint_eq(number(account(mon, "oforward", "u"), "conns"), 1);
    dial_reset(where);
    talk(fds[0]);
    talk(fds[1]);
    for (int i = 0; i < 4; i++) {
        close(fds[i / 2][i % 2]);
    }
    close(listener);
    close(mon);
}
END_TEST

/* Nothing but socat: help on each command, answers, errors and prompts. */
START_TEST(by_socat)
{
    static const char *const commands[] = {
        "help", "info", "channel_add", "channel_del", "oforward_add",
        "oforward_del", "iforward_add", "iforward_del", "conn_reset",
        "reload", "log", "exit", "quit",
    };
    char head[TEXT_LEN];
    const char *answer;
    Scene s;

    scene_start(&s, "", "");
    answer = ask_by_socat(&s, "help\\n");
    for (int i = 0; i < COUNT_OF(commands); i++) {
        const char *line = line_find(answer, commands[i], 0);

        ck_assert_msg(line != NULL, "help doesn't know %s:\n%s", commands[i],
                      answer);
        text_format(head, sizeof(head), "%.*s", (int)strcspn(line, "\n"),
                    line);
        ck_assert_msg(strstr(head, " -- ") != NULL, "no words on %s: %s",
                      commands[i], head);
        ck_assert_msg(strstr(monitor_ask(s.mon[0], "help %s", commands[i]),
                             head) != NULL, "help %s", commands[i]);
        flow(&s);
    }
    answer = ask_by_socat(&s, "info status\\n\\n  info\\tstatus  \\r\\nwhat\\n"
                          "help what\\ninfo conns\\n");
    ck_assert_msg(strstr(answer, "channels: 1, of these up: 1"), "%s", answer);
    ck_assert_msg(strstr(answer, "error: 'what'"), "%s", answer);
    ck_assert_msg(strstr(answer, "(qemu-vp) "), "no prompt: %s", answer);
    ck_assert_msg(strstr(answer, "\nok\n") == NULL, "%s", answer);
    scene_end(&s);
}
END_TEST

/* A word of a table's line */
typedef struct Word {
    size_t start;
    size_t end;
} Word;

static size_t words_of(const char *line, Word words[], size_t room)
{
    size_t len = strcspn(line, "\n"), n = 0, at = strspn(line, " ");

    while (at < len && n < room) {
        words[n].start = at;
        at += strcspn(line + at, " \n");
        words[n++].end = at;
        at += strspn(line + at, " ");
    }
    return n;
}

/* slash_in() - where it is in a word; its length if it has none */
static size_t slash_in(const char *line, Word w)
{
    return strcspn(line + w.start, "/") < w.end - w.start
           ? w.start + strcspn(line + w.start, "/") : w.end;
}

/* check_table() - each line's words stand below the first line's */
static void check_table(const char *table, size_t columns, size_t lines)
{
    Word head[16], row[16];
    size_t n, seen = 0;

    n = words_of(table, head, 16);
    ck_assert_msg(n >= columns, "%zu columns, not %zu: %s", n, columns,
                  table);
    for (const char *p = strchr(table, '\n') + 1; *p;
         p = strchr(p, '\n') + 1) {
        if (strncmp(p, "     ", 5) == 0 && (isalpha((unsigned char)p[5]))) {
            continue;           /* more about the line before */
        }
        ck_assert_uint_ge(words_of(p, row, 16), columns);
        for (size_t i = 0; i < columns; i++) {
            ck_assert_msg(row[i].start == head[i].start ||
                          row[i].end == head[i].end ||
                          slash_in(p, row[i]) == slash_in(table, head[i]),
                          "column %zu doesn't line up:\n%s", i + 1, table);
        }
        seen++;
    }
    ck_assert_msg(seen == lines, "%zu lines, not %zu:\n%s", seen, lines,
                  table);
}

/* Tables line up, whatever is in them: long names, high ids, big numbers. */
START_TEST(tables)
{
    static unsigned char bulk[100000];
    char path[PATH_LEN];
    int fds[3][2];
    Scene s;

    scene_start(&s, "", "");
    file_path(path, "another");
    monitor_ask(s.mon[0], "channel_add unix-connect:%s:-:65535", path);
    monitor_ask(s.mon[1], "channel_add unix-listen:%s:-:65535", path);
    file_path(path, "unix-service");
    monitor_ask(s.mon[0], "oforward_add " ID_32 ":%s:-:65535", path);
    monitor_ask(s.mon[0], "oforward_add x:127.0.0.1:0:65535");
    monitor_ask(s.mon[1], "iforward_add " ID_32 ":%s:65535", s.target);
    monitor_ask(s.mon[1], "iforward_add x:%s:65535", s.target);
    through(path, s.listener, fds[0]);
    through(s.where, s.listener, fds[1]);
    through(s.where, s.listener, fds[2]);
    for (int i = 0; i < 100; i++) {
        send_all(fds[0][i & 1], bulk, sizeof(bulk));
        recv_all(fds[0][!(i & 1)], bulk, sizeof(bulk));
    }
    flow(&s);
    shutdown(fds[1][0], SHUT_WR);
    expect_eof(fds[1][1]);
    shutdown(fds[2][1], SHUT_WR);
    expect_eof(fds[2][0]);
    for (int k = 0; k < 2; k++) {
        check_table(monitor_ask(s.mon[k], "info channels"), 10, 2);
        check_table(monitor_ask(s.mon[k], "info oforwards"), 4, k ? 0 : 4);
        check_table(monitor_ask(s.mon[k], "info iforwards"), 3, k ? 4 : 0);
        check_table(monitor_ask(s.mon[k], "info forwards"), 11, 4);
        check_table(monitor_ask(s.mon[k], "info services"), 3, k ? 0 : 4);
        check_table(monitor_ask(s.mon[k], "info conns"), 10, 6);
        check_table(monitor_ask(s.mon[k], "info stats"), 3, 2);
        ck_assert(strchr(monitor_ask(s.mon[k], "info status"), '\n'));
    }
    for (int i = 0; i < 3; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    scene_end(&s);
}
END_TEST

/* longest_line() - in a text */
static size_t longest_line(const char *text)
{
    size_t longest = 0;

    for (const char *p = text; *p; p = strchr(p, '\n') + 1) {
        size_t len = strcspn(p, "\n");

        longest = len > longest ? len : longest;
    }
    return longest;
}

/* Nothing is wider than it has to be, and what isn't known is no number. */
START_TEST(narrow_tables)
{
    char path[PATH_LEN];
    const char *line;
    Scene s;

    scene_start(&s, "", "");
    file_path(path, "another");
    monitor_ask(s.mon[0], "channel_add unix-connect:%s:-:65535", path);
    check_table(monitor_ask(s.mon[0], "info channels"), 10, 2);
    line = line_find(monitor_ask(s.mon[0], "info channels"), "65535", 0);
    ck_assert_ptr_nonnull(line);
    ck_assert_msg(strstr(line, " - "), "%s", line);
    line = monitor_ask(s.mon[0], "info channels");
    ck_assert_msg(strstr(line, "us") && !strstr(line, "0.000s"), "%s", line);
    ck_assert_uint_le(longest_line(monitor_ask(s.mon[0], "info conns")), 115);
    ck_assert_uint_le(longest_line(monitor_ask(s.mon[0], "info oforwards")),
                      40);
    scene_end(&s);
}
END_TEST

/* --- what is wrong ------------------------------------------------------ */

/* A command that must be refused */
typedef struct BadCommand {
    const char *command;        /* %s: an address that is taken */
    const char *names;          /* must be in the answer */
} BadCommand;

static const BadCommand bad_commands[] = {
    { "nonsense", "'nonsense'" },
    { "INFO status", "'INFO'" },
    { "info", "|forwards|" },
    { "info nothing", "'nothing': expected status|" },
    { "info oforward", "|forwards|services|conns|stats [-k] | config" },
    { "info conn", "'conn'" },
    { "info status -x", "-x" },
    { "info status -k -k", "-k -k" },
    { "info status k", "'k'" },
    { "info\tstatus\tk", "'k'" },
    { "info config -k", "'-k'" },
    { "help nonsense", "'nonsense'" },
    { "quit now", "'now'" },
    { "quit -k", "'-k'" },
    { "batch mode", "'mode'" },
    { "log", "error|warn|info|verbose|debug" },
    { "log loud", "'loud'" },
    { "log info debug", "'info debug'" },
    { "log 2", "'2'" },

    { "channel_add", "METHOD:ADDR:PORT" },
    { "channel_add x", "x" },
    { "channel_add :::::", ":::::" },
    { "channel_add unix-connect:/x:-", "already" },
    { "channel_add unix-connect:/x:-:0", "already" },
    { "channel_add unix-connect:/x:-:65536", "'65536'" },
    { "channel_add unix-connect:/x:-:1 and more", "'1 and more'" },
    { "channel_add unix-connect::-:1", "ADDR" },
    { "channel_add unix-connect:/x:5:1", "'5'" },
    { "channel_add udp-listen:127.0.0.1:5:1", "'udp-listen'" },
    { "channel_add unix-listen:/nonexistent/x:-:1", "No such file" },
    { "channel_add unix-listen:/dev/null:-:1", "not a socket" },
    { "channel_add tcp-listen:%s:1", "in use" },
    { "channel_add tcp-listen:192.0.2.1:5:1", "192.0.2.1" },
    { "channel_add isaserial-open:/x:7:1", "'7'" },
    { "channel_add fd:99:-:1", "99" },
    { "channel_add fd:x:-:1", "no descriptor of this name: LISTEN_FDS" },
    { "channel_del", "METHOD:ADDR:PORT" },
    { "channel_del 9", "'9'" },
    { "channel_del s", "'s'" },
    { "channel_del unix-connect:/x:-", "not there" },
    { "channel_del unix-connect:/x:-:7", "not there" },

    { "oforward_add", "SERVICE_ID:ADDR:PORT" },
    { "oforward_add s", "'s'" },
    { "oforward_add s:127.0.0.1", "PORT" },
    { "oforward_add s:127.0.0.1:0", "already" },
    { "oforward_add s:127.0.0.1:65536", "'65536'" },
    { "oforward_add s:127.0.0.1:80:1", "no such channel" },
    { "oforward_add s:%s", "in use" },
    { "oforward_add s:[::1:80", "']'" },
    { "oforward_add s:/nonexistent/x:-", "No such file" },
    { "oforward_add s:/dev/null:-", "not a socket" },
    { "oforward_add " ID_32 "6:127.0.0.1:0", "SERVICE_ID" },
    { "oforward_add a b:127.0.0.1:0", "SERVICE_ID" },
    { "oforward_add \xc3\xa4:127.0.0.1:0", "SERVICE_ID" },
    { "oforward_add :127.0.0.1:0", "SERVICE_ID" },
    { "oforward_del", "SERVICE_ID[:ADDR:PORT" },
    { "oforward_del nobody", "'nobody': there is none" },
    { "oforward_del there", "'there'" },
    { "oforward_del 0", "'0'" },
    { "oforward_del s:127.0.0.1:1", "not there" },
    { "oforward_del nobody:127.0.0.1:0", "not there" },
    { "oforward_del s:127.0.0.1:0:5", "not there" },

    { "iforward_add", "SERVICE_ID:ADDR:PORT" },
    { "iforward_add r", "'r'" },
    { "iforward_add r:127.0.0.1:0", "'0'" },
    { "iforward_add r:127.0.0.1:nonsense", "'nonsense'" },
    { "iforward_add there:127.0.0.1:80", "already" },
    { "iforward_add r:/x\a/y:-", "-i 'r:/x?/y:-': it has a control" },
    { "iforward_add r:127.0.0.1:80:1", "no such channel" },
    { "iforward_del", "SERVICE_ID[:ADDR:PORT" },
    { "iforward_del s", "'s'" },
    { "iforward_del there:127.0.0.1:80", "not there" },
    { "iforward_del r:127.0.0.1:80", "not there" },

    { "conn_reset", "ID" },
    { "conn_reset x", "'x'" },
    { "conn_reset 0", "'0'" },
    { "conn_reset 0o", "'0o'" },
    { "conn_reset o1", "'o1'" },
    { "conn_reset 0x1", "'0x1'" },
    { "conn_reset -1o1", "'-1o1'" },
    { "conn_reset 0o-1", "'0o-1'" },
    { "conn_reset 0o1 0o2", "'0o1 0o2'" },
    { "conn_reset +0o1", "'+0o1'" },
    { "conn_reset \v0o1", "'?0o1'" },
    { "conn_reset -18446744073709551616o1", "'-18446744073709551616o1'" },
    { "conn_reset 18446744073709551616o1", "'18446744073709551616o1'" },
    { "conn_reset 65536o1", "'65536o1'" },
    { "conn_reset 0", "'0'" },
    { "conn_reset 0o99999999999999999999", "'0o99999999999999999999'" },
    { "conn_reset 99999999999999999999o1", "'99999999999999999999o1'" },
    { "conn_reset 0i4000000000", "'0i4000000000'" },
    { "conn_reset 9o1", "'9o1'" },

    { "watch everything", "'everything': expected conns" },
    { "wait", "up|SERVICE_ID SECONDS" },
    { "wait up", "'': expected a number of seconds" },
    { "wait up soon", "'soon'" },
    { "wait up -1", "'-1'" },
    { "wait up 1.5", "'1.5'" },
    { "wait up 86401", "'86401': expected a number of seconds, 0 to 86400" },
    { "wait up 1 65536", "'65536': expected a CHANNEL_ID" },
    { "wait up 1 0 0", "'0 0'" },
    { "wait up 1 9", "no channel 9" },
    { "wait * 1", "'*': expected up or a SERVICE_ID" },
    { "wait a:b 1", "'a:b'" },
    { "wait nobody 0", "no service 'nobody'" },
};

/* Each says what was wrong, and all is as it was. */
START_TEST(bad_command)
{
    char command[TEXT_LEN], taken[TEXT_LEN];
    int holder = listen_any(taken), fds;
    char *before, *after;
    Scene s;

    scene_start(&s, "-i there:127.0.0.1:79", "");
    before = monitor_state(s.mon[0]);
    fds = daemon_fds(s.daemon[0]);
    for (int i = 0; i < COUNT_OF(bad_commands); i++) {
        const BadCommand *bad = &bad_commands[i];
        const char *gap = strstr(bad->command, "%s");

        text_format(command, sizeof(command), "%.*s%s%s",
                    gap ? (int)(gap - bad->command) : TEXT_LEN, bad->command,
                    gap ? taken : "", gap ? gap + 2 : "");
        monitor_refuses(s.mon[0], command, bad->names);
        after = monitor_state(s.mon[0]);
        ck_assert_msg(strcmp(before, after) == 0,
                      "'%s' changed this\n%s\nto this\n%s", command, before,
                      after);
        free(after);
        if (i % 10 == 0) {
            flow(&s);
        }
    }
    ck_assert_int_eq(daemon_fds(s.daemon[0]), fds);
    check_works(s.where, s.listener);
    free(before);
    close(holder);
    scene_end(&s);
}
END_TEST

/* A channel can't be made of what the daemon has opened for itself. */
START_TEST(own_descriptors)
{
    char command[TEXT_LEN], *before, *after;
    Scene s;

    for (int fd = 3; fd < 100; fd++) {
        fcntl(fd, F_SETFD, FD_CLOEXEC);         /* libcheck's, for example */
    }
    scene_start(&s, "", "");
    before = monitor_state(s.mon[0]);
    for (int fd = 3; fd < 40; fd++) {
        text_format(command, sizeof(command), "channel_add fd:%d:-:7", fd);
        monitor_refuses(s.mon[0], command, "fd:");
    }
    after = monitor_state(s.mon[0]);
    ck_assert_str_eq(before, after);
    check_works(s.where, s.listener);
    free(before);
    free(after);
    scene_end(&s);
}
END_TEST

/* --- changes ------------------------------------------------------------ */

/* Forwards come and go; the connections they made stay. */
START_TEST(change_forwards)
{
    char where[2][TEXT_LEN], path[PATH_LEN], more[TEXT_LEN];
    int before[2][2], after[2];
    Scene s;

    scene_start(&s, "", "");
    file_path(path, "service");
    monitor_ask(s.mon[0], "oforward_add u:%s:-", path);
    monitor_ask(s.mon[0], "oforward_add v:127.0.0.1:0");
    flow(&s);
    dial_reset(daemon_listens(s.daemon[0], "v"));
    monitor_ask(s.mon[1], "iforward_add six:[::1]:9");
    ck_assert_ptr_nonnull(strstr(monitor_ask(s.mon[1], "info iforwards"),
                                 " [::1]:9\n"));
    monitor_ask(s.mon[1], "iforward_del six:[::1]:9");
    monitor_ask(s.mon[1], "iforward_add v:%s", s.target);
    monitor_ask(s.mon[1], "iforward_add u:%s", s.target);
    oforward_where(s.mon[0], "v", where[0]);
    oforward_where(s.mon[0], "u", where[1]);
    ck_assert_str_eq(where[1], path);
    for (int i = 0; i < 2; i++) {
        through(where[i], s.listener, before[i]);
        talk(before[i]);
    }
    flow(&s);

    /* Deleted where the clients come in */
    monitor_ask(s.mon[0], "oforward_del v:127.0.0.1:0");
    monitor_ask(s.mon[0], "oforward_del u:%s:-:0", path);
    check_refused(where[0]);
    ck_assert_msg(access(path, F_OK) < 0, "%s is left", path);
    flow(&s);
    for (int i = 0; i < 2; i++) {
        talk(before[i]);
    }

    /* The same addresses can be taken again at once */
    text_format(more, sizeof(more), "oforward_add v:%s", where[0]);
    monitor_ask(s.mon[0], "%s", more);
    monitor_ask(s.mon[0], "oforward_add v:%s:-", path);
    check_works(where[0], s.listener);
    check_works(path, s.listener);

    /* Deleted where the targets are */
    through(path, s.listener, after);
    talk(after);
    monitor_ask(s.mon[1], "iforward_del v:%s", s.target);
    dial_reset(where[0]);
    daemon_wait(s.daemon[0], "v: connection from .* refused: ");
    flow(&s);
    talk(after);
    for (int i = 0; i < 2; i++) {
        talk(before[i]);
        close(before[i][0]);
        expect_eof(before[i][1]);
        close(before[i][1]);
    }
    monitor_ask(s.mon[1], "iforward_add v:%s", s.target);
    check_works(where[0], s.listener);
    close(after[0]);
    close(after[1]);
    ck_assert_int_eq(daemon_count(s.daemon[0], "monitor: .*v:127.0.0.1"), 3);
    scene_end(&s);
}
END_TEST

/* A name is enough where there is one of it; else all of them are named. */
START_TEST(change_by_name)
{
    Scene s;

    scene_start(&s, "-i s:127.0.0.1:9", "");
    monitor_ask(s.mon[0], "oforward_add twice:127.0.0.1:0");
    monitor_ask(s.mon[0], "oforward_add twice:127.0.0.2:0");
    monitor_refuses(s.mon[0], "oforward_del twice", "'twice': which of these: "
                    "twice:127.0.0.1:0 twice:127.0.0.2:0");
    monitor_ask(s.mon[0], "oforward_del twice:127.0.0.2:0");
    monitor_ask(s.mon[0], "oforward_del twice");
    monitor_ask(s.mon[0], "oforward_del s");
    ck_assert_uint_eq(line_count(monitor_ask(s.mon[0], "info oforwards -k"),
                                 "oforward"), 1);
    ck_assert_uint_eq(line_count(monitor_ask(s.mon[0], "info iforwards -k"),
                                 "iforward"), 1);
    monitor_ask(s.mon[0], "iforward_del s");
    monitor_ask(s.mon[0], "channel_add unix-connect:/x:-:77");
    monitor_ask(s.mon[0], "channel_del 77");
    monitor_ask(s.mon[0], "channel_del 0");
    ck_assert_str_eq(monitor_ask(s.mon[0], "info channels -k"), "");
    traffic_free(&s.traffic);
}
END_TEST

/* An iforward goes while a target has not answered yet: refused at once. */
START_TEST(delete_while_connecting)
{
    char mute[TEXT_LEN];
    int full = listen_on("127.0.0.1:0", 0), fds[16], n = 0, client;
    struct pollfd pfd = { .events = POLLOUT };
    int64_t start;
    Scene s;

    name_of(full, false, mute);
    do {
        ck_assert(n < 16);
        pfd.fd = fds[n++] = dial(mute, false);
    } while (poll(&pfd, 1, 300) == 1);
    scene_start(&s, "", "");
    monitor_ask(s.mon[1], "iforward_add mute:%s", mute);
    monitor_ask(s.mon[0], "oforward_add mute:127.0.0.1:0");
    start = now_ms();
    client = dial(daemon_listens(s.daemon[0], "mute"), true);
    send_all(client, "early", 5);
    while (number(monitor_ask(s.mon[0], "info stats -k"), "conns") < 4 ||
           number(monitor_ask(s.mon[1], "info stats -k"), "conns") < 4) {
        ck_assert(now_ms() < start + WAIT_MS);
        sleep_ms(5);
    }
    ck_assert_str_eq(value(conn_line(s.mon[1], "mute"), "in"), "WAIT");
    ck_assert_str_eq(value(conn_line(s.mon[1], "mute"), "to"), mute);
    monitor_ask(s.mon[1], "iforward_del mute:%s", mute);
    expect_reset(client);
    close(client);
    ck_assert_int_eq(daemon_count(s.daemon[1], "mute.*timed out"), 0);
    while (n > 0) {
        close(fds[--n]);
    }
    close(full);
    scene_end(&s);
}
END_TEST

/* channel_ends() - -c of both ends for a kind of channel that can be added */
static void channel_ends(Channel *c, int round)
{
    static const ChannelKind kinds[] = {
        CHANNEL_UNIX, CHANNEL_TCP, CHANNEL_VIRTSERIAL, CHANNEL_ISASERIAL,
    };
    char name[32];

    text_format(name, sizeof(name), "added%d", round);
    channel_make(c, kinds[round], name);
}

/*
 * A further channel of each kind comes, carries connections and goes, while
 * channel 0 is busy: its connections are reset at both ends, no others.
 */
START_TEST(change_channels)
{
    char where[TEXT_LEN], added[TEXT_LEN];
    const int id = _i + 10, which = _i % 2; /* who deletes it first */
    int fds[2][2], before[2];
    Channel c;
    Scene s;

    /* The channel's end is no reset: that would only come after the grace. */
    scene_start(&s, "--grace 1000", "--grace 1000");
    channel_ends(&c, _i);
    for (int k = 0; k < 2; k++) {
        before[k] = daemon_fds(s.daemon[k]);
        monitor_ask(s.mon[k], "channel_add %s:%d", c.option[k], id);
        flow(&s);
    }
    monitor_ask(s.mon[0], "oforward_add t:127.0.0.1:0:%d", id);
    monitor_ask(s.mon[1], "iforward_add t:%s:%d", s.target, id);
    text_format(added, sizeof(added), "ch%d: channel up: new session", id);
    daemon_wait(s.daemon[0], "%s", added);
    text_format(where, sizeof(where), "%s",
                value(line_find(monitor_ask(s.mon[0], "info oforwards -k"),
                                "oforward", 2), "listening"));
    for (int i = 0; i < 2; i++) {
        through(where, s.listener, fds[i]);
        talk(fds[i]);
    }
    shutdown(fds[1][0], SHUT_WR);
    expect_eof(fds[1][1]);
    flow(&s);
    monitor_ask(s.mon[which], "channel_del %s:%d", c.option[which], id);
    expect_reset(fds[0][0]);
    expect_reset(fds[0][1]);
    expect_reset(fds[1][0]);
    expect_broken(fds[1][1]);
    for (int i = 0; i < 2; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    flow(&s);
    monitor_ask(s.mon[!which], "channel_del %s:%d", c.option[!which], id);
    check_refused(where);
    for (int k = 0; k < 2; k++) {
        ck_assert_uint_eq(line_count(monitor_ask(s.mon[k],
                                                 "info channels -k"),
                                     "channel"), 1);
        /* a serial line is kept until the last words have gone out */
        for (int64_t end = now_ms() + WAIT_MS; now_ms() < end; sleep_ms(10)) {
            if (daemon_fds(s.daemon[k]) == before[k]) {
                break;
            }
        }
        ck_assert_int_eq(daemon_fds(s.daemon[k]), before[k]);
    }
    check_works(s.where, s.listener);
    scene_end(&s);
}
END_TEST

/* ask() - give a command whose answer will not come at once */
static void ask(int mon, const char *commands)
{
    send_all(mon, commands, strlen(commands));
}

/*
 * A name is looked up, which takes its time: all others are served meanwhile,
 * but those who wait for just that.
 */
START_TEST(slow_names)
{
    StartOptions o = { .setup = NAMES_SETUP };
    char target[TEXT_LEN], path[PATH_LEN], where[TEXT_LEN], *answer;
    int fds[2], mon[3], listener = listen_any(target), server;
    pid_t names;
    Daemon *d;

    server = names_server();
    if (server < 0) {
        PASS_OVER(MAY_SERVE_NAMES);
    }
    file_write("conf", "", 0);
    file_path(path, "monitor");
    daemon_start("guest", "-c unix-listen:%s/ch:- -i s:%s", vp_dir, target);
    d = daemon_start_with(&o, "host", "-c unix-connect:%s/ch:- -m %s -C conf "
                          "-o s:127.0.0.1:0", vp_dir, path);
    daemon_up(d);
    through(daemon_listens(d, "s"), listener, fds);
    for (int i = 0; i < 3; i++) {
        mon[i] = monitor_batch(path);
        monitor_ask(mon[i], "info status");
    }

    /* The monitor's next command waits for the one before */
    ask(mon[0], "oforward_add n:later.test:0\ninfo status -k\n");
    for (int i = 0; i < 20; i++) {
        talk(fds);
        monitor_ask(mon[1], "info channels");
    }
    names = names_answer(server);
    answer = monitor_answer(mon[0]);
    ck_assert_str_eq(answer, "ok\n");
    free(answer);
    answer = monitor_answer(mon[0]);
    ck_assert_ptr_nonnull(line_find(answer, "status", 0));
    free(answer);
    oforward_where(mon[1], "n", where);
    ck_assert(strncmp(where, "127.0.0.1:", 10) == 0);
    names_hang(names);

    /* Who asked has gone before it is known: the command was a whole one */
    ask(mon[2], "iforward_add gone:later.test:80\n");
    close(mon[2]);
    talk(fds);
    names = names_answer(server);
    daemon_wait(d, "monitor: added -i gone:later.test:80");
    names_hang(names);

    /* What a reload takes away again isn't waited for any more */
    file_write("conf", "oforward first:later.test:0\n", 28);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "info reloaded");
    talk(fds);
    file_write("conf", "oforward second:later.test:0\n", 29);
    kill(d->pid, SIGHUP);
    daemon_wait(d, "reload: removed -o first");
    talk(fds);
    names = names_answer(server);
    daemon_listens(d, "second");
    ck_assert_int_eq(daemon_count(d, "first: listening"), 0);

    /* Not there: no harm is done */
    monitor_refuses(mon[0], "iforward_add n:nowhere.test:80",
                    "cannot look up 'nowhere.test': ");
    monitor_refuses(mon[0], "channel_add tcp-listen:nowhere.test:0:7",
                    "cannot look up 'nowhere.test': ");
    names_hang(names);

    /* The end waits for no name, and says so */
    ask(mon[0], "iforward_add never:later.test:80\n");
    file_write("conf", "iforward e:later.test:1\n", 24);
    kill(d->pid, SIGHUP);
    talk(fds);
    daemon_stop(d);
    answer = monitor_answer(mon[0]);
    ck_assert_str_eq(answer, "error: the daemon is ending\n");
    free(answer);
    for (int i = 0; i < 2; i++) {
        close(mon[i]);
        close(fds[i]);
    }
    close(listener);
    close(server);
}
END_TEST

/* Changes by the hundred: nothing is left behind, nobody notices. */
START_TEST(many_changes)
{
    char path[PATH_LEN];
    int before[2];
    Scene s;

    scene_start(&s, "", "");
    file_path(path, "brief");
    for (int k = 0; k < 2; k++) {
        before[k] = daemon_fds(s.daemon[k]);
    }
    for (int round = 0; round < 100; round++) {
        int fds[2];

        monitor_ask(s.mon[1], "channel_add unix-listen:%s:-:1", path);
        monitor_ask(s.mon[0], "channel_add unix-connect:%s:-:1", path);
        monitor_ask(s.mon[0], "oforward_add r:127.0.0.1:0:1");
        monitor_ask(s.mon[1], "iforward_add r:%s:1", s.target);
        monitor_ask(s.mon[0], "oforward_add r%d:127.0.0.1:0", round);
        monitor_ask(s.mon[1], "iforward_add r%d:%s", round, s.target);
        if (round % 10 == 0) {
            through(value(line_find(monitor_ask(s.mon[0],
                "info oforwards -k"), "oforward", 2), "listening"),
                s.listener, fds);
            talk(fds);
            flow(&s);
        }
        monitor_ask(s.mon[0], "oforward_del r%d:127.0.0.1:0", round);
        monitor_ask(s.mon[1], "iforward_del r%d:%s", round, s.target);
        monitor_ask(s.mon[0], "channel_del unix-connect:%s:-:1", path);
        monitor_ask(s.mon[1], "channel_del unix-listen:%s:-:1", path);
        if (round % 10 == 0) {
            expect_reset(fds[0]);
            expect_reset(fds[1]);
            close(fds[0]);
            close(fds[1]);
        }
    }
    flow(&s);
    for (int k = 0; k < 2; k++) {
        ck_assert_int_eq(daemon_fds(s.daemon[k]), before[k]);
    }
    check_works(s.where, s.listener);
    scene_end(&s);
}
END_TEST

/* conn_reset, from either side: both ends get a reset, nobody else. */
START_TEST(conn_reset)
{
    char id[TEXT_LEN], again[2 * TEXT_LEN];
    int fds[2], other[2];
    Scene s;

    scene_start(&s, "", "");
    monitor_ask(s.mon[0], "oforward_add other:127.0.0.1:0");
    monitor_ask(s.mon[1], "iforward_add other:%s", s.target);
    through(daemon_listens(s.daemon[0], "other"), s.listener, other);
    through(s.where, s.listener, fds);
    talk(fds);
    talk(other);
    if (_i & 2) {               /* one that is half closed */
        shutdown(fds[_i & 1], SHUT_WR);
        expect_eof(fds[!(_i & 1)]);
    }
    text_format(id, sizeof(id), "%s", value(conn_line(s.mon[_i & 1], "t"),
                                            "id"));
    flow(&s);
    monitor_ask(s.mon[_i & 1], "conn_reset %s", id);
    for (int k = 0; k < 2; k++) {
        if (_i & 2 && k != (_i & 1)) {
            expect_broken(fds[k]);
        } else {
            expect_reset(fds[k]);
        }
    }
    flow(&s);
    text_format(again, sizeof(again), "conn_reset %s", id);
    monitor_refuses(s.mon[_i & 1], again, id);          /* it has gone */
    talk(other);
    for (int k = 0; k < 2; k++) {
        ck_assert_uint_eq(line_count(monitor_ask(s.mon[k], "info conns -k"),
                                     "conn"), 4);
        close(fds[k]);
        close(other[k]);
    }
    scene_end(&s);
}
END_TEST

/* What is logged can be changed while it runs. */
START_TEST(log_level)
{
    Daemon *d;
    Scene s;

    scene_start(&s, "", "");
    d = s.daemon[0];
    ck_assert_int_eq(daemon_count(d, " debug "), 0);
    monitor_ask(s.mon[0], "log debug");
    ck_assert_str_eq(value(monitor_ask(s.mon[0], "info\tstatus\t -k"), "log"),
                     "debug");
    ck_assert_ptr_nonnull(strstr(monitor_ask(s.mon[0], "info config"),
                                 "\nverbose\nverbose\n"));
    monitor_ask(s.mon[0], "channel_add unix-connect:%s:-:1", s.channel);
    daemon_wait(d, "^[0-9-]+ [0-9:.]+ debug ");
    monitor_ask(s.mon[0], "channel_del unix-connect:%s:-:1", s.channel);
    for (int i = 0; i < 2; i++) {
        monitor_ask(s.mon[0], i ? "log error" : "log warn");
        ck_assert_ptr_nonnull(strstr(monitor_ask(s.mon[0], "info config"), i ?
                                     "\nquiet\nquiet\n" : "\nquiet\n"));
        daemon_mark(d);
        check_works(s.where, s.listener);
        monitor_ask(s.mon[0], "oforward_add x:127.0.0.1:0");
        monitor_ask(s.mon[0], "oforward_del x:127.0.0.1:0");
        ck_assert_int_eq(daemon_count(d, "."), 0);
    }
    monitor_ask(s.mon[0], "log info");
    monitor_ask(s.mon[0], "oforward_add x:127.0.0.1:0");
    daemon_wait(d, "monitor: added -o x:127");
    ck_assert_int_eq(daemon_count(d, " debug "), 0);
    scene_end(&s);
}
END_TEST

/* The end by command: as by signal, and the answer still comes. */
START_TEST(quit)
{
    Scene s;

    scene_start(&s, "", "");
    traffic_free(&s.traffic);
    if (_i) {
        ck_assert_int_eq(execute(s.path[0], "quit"), 0);
    } else {
        monitor_ask(s.mon[0], "quit");
    }
    ck_assert_int_eq(daemon_exit(s.daemon[0]), 0);
    ck_assert_msg(access(s.path[0], F_OK) < 0, "%s is left", s.path[0]);
    daemon_wait(s.daemon[1], "channel down");
}
END_TEST

/* Who types is asked again, and isn't if he says something else then. */
START_TEST(quit_asks)
{
    static const char asked[] = "this ends the daemon";
    char got[sizeof(asked)] = "";
    int fd;
    Scene s;

    scene_start(&s, "", "");
    traffic_free(&s.traffic);
    for (int i = 0; i < 2; i++) {
        fd = dial(s.path[0], true);
        expect_bytes(fd, "(qemu-vp) ");
        send_all(fd, "quit\nlog info\nquit\nexit\n", 24);
        recv_all(fd, got, sizeof(got) - 1);
        ck_assert_str_eq(got, asked);
        while (recv(fd, got, sizeof(got) - 1, 0) > 0) {
        }
        close(fd);
        monitor_ask(s.mon[0], "info status");
    }
    fd = dial(s.path[0], true);
    send_all(fd, "quit\nquit\n", 10);
    ck_assert_int_eq(daemon_exit(s.daemon[0]), 0);
    close(fd);
}
END_TEST

/* --- clients that misbehave --------------------------------------------- */

/* A megabyte without a newline: said, and shown the door. */
START_TEST(endless_line)
{
    static char line[MIB];
    size_t sent = 0;
    char *answer;
    ssize_t n;
    int fd;
    Scene s;

    scene_start(&s, "", "");
    memset(line, _i ? '\0' : 'x', sizeof(line));
    fd = monitor_batch(s.path[0]);
    while (sent < sizeof(line) &&
           (n = send(fd, line + sent, sizeof(line) - sent,
                     MSG_NOSIGNAL)) > 0) {
        sent += (size_t)n;
    }
    ck_assert_msg(sent < sizeof(line), "all of it was taken");
    answer = monitor_answer(fd);
    ck_assert_msg(strstr(answer, "longer"), "%s", answer);
    free(answer);
    close(fd);
    flow(&s);
    monitor_ask(s.mon[0], "info status");
    scene_end(&s);
}
END_TEST

/* Half a command is none, whether its client waits or dies. */
START_TEST(half_command)
{
    static const char *const halves[] = {
        "quit", "oforward_add r:127.0.0.1:0", "log debug\nquit", "\0\0quit",
    };
    char *before, *after;
    int fds[COUNT_OF(halves)][2];
    Scene s;

    scene_start(&s, "", "");
    monitor_ask(s.mon[0], "log debug");
    before = monitor_state(s.mon[0]);
    for (int i = 0; i < COUNT_OF(halves); i++) {
        for (int k = 0; k < 2; k++) {
            fds[i][k] = monitor_batch(s.path[0]);
            send_all(fds[i][k], halves[i], strlen(halves[i]) + (i == 3 ? 6
                                                                : 0));
        }
        close(fds[i][0]);
        flow(&s);
    }
    for (int i = 0; i < COUNT_OF(halves); i++) {
        close(fds[i][1]);
        flow(&s);
    }
    after = monitor_state(s.mon[0]);
    ck_assert_str_eq(before, after);
    free(before);
    free(after);
    scene_end(&s);
}
END_TEST

/* What a client sent last is a command without a newline, too. */
START_TEST(last_line)
{
    char *answer;
    int fd;
    Scene s;

    scene_start(&s, "", "");
    for (int i = 0; i < 2; i++) {
        fd = monitor_batch(s.path[0]);
        send_all(fd, "nonsense\nlog warn", i ? 17 : 8);
        shutdown(fd, SHUT_WR);
        for (int k = 0; k <= i; k++) {
            answer = monitor_answer(fd);
            ck_assert_msg(strstr(answer, k ? "ok\n" : "error: 'nonsense'"),
                          "%s", answer);
            free(answer);
        }
        expect_eof(fd);
        close(fd);
    }
    ck_assert_str_eq(value(monitor_ask(s.mon[0], "info status -k"), "log"),
                     "warn");
    scene_end(&s);
}
END_TEST

/* "exit" ends this client, with what it sent after it, and nothing else. */
START_TEST(leave)
{
    char *answer;
    int fd;
    Scene s;

    scene_start(&s, "", "");
    fd = monitor_batch(s.path[0]);
    send_all(fd, "exit\nquit\n", 10);
    answer = monitor_answer(fd);
    ck_assert_str_eq(answer, "ok\n");
    free(answer);
    expect_eof(fd);
    close(fd);
    fd = dial(s.path[0], true);
    expect_bytes(fd, "(qemu-vp) ");
    send_all(fd, "log warn\nexit\nquit", 18);
    expect_bytes(fd, "(qemu-vp) ");
    expect_eof(fd);
    close(fd);
    flow(&s);
    ck_assert_int_eq(execute(s.path[0], "exit"), 0);
    monitor_ask(s.mon[0], "info status");
    scene_end(&s);
}
END_TEST

/* Byte by byte, or a thousand in one go: each is answered, in order. */
START_TEST(odd_pieces)
{
    static const char slowly[] = "info status -k\n";
    static char many[40 * 1000];
    size_t len = 0;
    char *answer;
    int fd;
    Scene s;

    scene_start(&s, "", "");
    for (const char *p = slowly; *p; p++) {
        flow(&s);
        send_all(s.mon[0], p, 1);
    }
    answer = monitor_answer(s.mon[0]);
    ck_assert(line_find(answer, "status", 0) != NULL);
    free(answer);
    for (int i = 0; i < 1000; i++) {
        len += (size_t)snprintf(many + len, sizeof(many) - len,
                                i % 3 ? "conn_reset 7o%d\n" : "help quit\n",
                                i);
    }
    fd = monitor_batch(s.path[0]);
    send_all(fd, many, len);
    for (int i = 0; i < 1000; ) {
        char expected[TEXT_LEN], got[TEXT_LEN];

        text_format(expected, sizeof(expected), i % 3 ?
                    "error: there is no connection '7o%d'\n" :
                    "quit -- end the daemon\nok\n", i);
        recv_all(fd, got, strlen(expected));
        got[strlen(expected)] = '\0';
        ck_assert_str_eq(got, expected);
        i++;
    }
    close(fd);
    scene_end(&s);
}
END_TEST

/* rss() - memory a process has, in KiB */
static long rss(pid_t pid)
{
    char path[64], line[256];
    long kib = -1;
    FILE *f;

    text_format(path, sizeof(path), "/proc/%d/status", (int)pid);
    f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    while (kib < 0 && fgets(line, sizeof(line), f)) {
        sscanf(line, "VmRSS: %ld", &kib);
    }
    fclose(f);
    return kib;
}

/* channel_cut() - the channel is removed while its connections are told */
static void channel_cut(Scene *s, const char *question)
{
    struct pollfd pfd = { .fd = monitor_batch(s->path[0]), .events = POLLIN };
    char *answer;

    send_all(pfd.fd, question, strlen(question));
    ck_assert_int_eq(poll(&pfd, 1, WAIT_MS), 1); /* the answer begins */
    monitor_ask(s->mon[0], "channel_del 0");
    answer = monitor_answer(pfd.fd);
    ck_assert_uint_ge(line_count(answer, "conn"), 1);
    ck_assert_ptr_nonnull(strstr(answer, "\nerror: a channel was removed "
                                 "meanwhile: ask again\n"));
    free(answer);
    close(pfd.fd);
}

/*
 * Clients that ask for 2,000 connections again and again and never read: they
 * are held up, nobody else is, and what is kept for them has a bound.  In the
 * end one of them reads it all, the others just die.
 */
START_TEST(deaf_client)
{
    enum { CONNS = 2000, BATCH = 100, DEAF = 8, TIMES = 20 };
    static const char question[] = "info conns -k\n";
    static int conns[2][CONNS];
    int deaf[DEAF], last[2];
    long before;
    Scene s;

    scene_start(&s, "", "");
    for (int i = 0; i < CONNS; i += BATCH) {
        for (int n = i; n < i + BATCH; n++) {
            conns[0][n] = dial(s.where, true);
        }
        for (int n = i; n < i + BATCH; n++) {
            conns[1][n] = accept_one(s.listener);
        }
    }
    through(s.where, s.listener, last);
    ck_assert_uint_eq(line_count(monitor_ask(s.mon[0], "info conns -k"),
                                 "conn"), CONNS + 4);
    before = rss(s.daemon[0]->pid);
    for (int i = 0; i < DEAF; i++) {
        deaf[i] = monitor_batch(s.path[0]);
        for (int n = 0; n < TIMES; n++) {
            send_all(deaf[i], question, sizeof(question) - 1);
        }
        flow(&s);
    }
    /* One answer has some 400 KB, all of them together 80 MB. */
    ck_assert_int_le(rss(s.daemon[0]->pid) - before, 30 * 1024);
    ck_assert_uint_eq(line_count(monitor_ask(s.mon[0], "info conns -k"),
                                 "conn"), CONNS + 4);
    ck_assert_int_eq(execute(s.path[0], "info status"), 0);
    talk(last);
    flow(&s);
    for (int i = 1; i < DEAF; i++) {
        close(deaf[i]);
    }
    for (int n = 0; n < TIMES; n++) {
        char *answer = monitor_answer(deaf[0]);

        ck_assert_uint_eq(line_count(answer, "conn"), CONNS + 4);
        free(answer);
    }
    close(deaf[0]);
    flow(&s);
    traffic_free(&s.traffic);
    channel_cut(&s, question);
    for (int i = 0; i < CONNS; i++) {
        close(conns[0][i]);
        close(conns[1][i]);
    }
    close(last[0]);
    close(last[1]);
    close(s.mon[0]);
    close(s.mon[1]);
    close(s.listener);
}
END_TEST

/* A deaf client, and one that hangs in mid-command, cost no CPU time. */
START_TEST(deaf_client_idle)
{
    static const char question[] = "help\n";
    struct pollfd pfd = { .events = POLLOUT };
    int half;
    Scene s;

    scene_start(&s, "", "");
    traffic_free(&s.traffic);
    half = monitor_batch(s.path[0]);
    send_all(half, "inf", 3);
    pfd.fd = monitor_batch(s.path[0]);
    set_nonblocking(pfd.fd);
    for (int n = 0; poll(&pfd, 1, 300) == 1 && n < 1000000; n++) {
        if (send(pfd.fd, question, sizeof(question) - 1, MSG_NOSIGNAL) < 0) {
            ck_assert(errno == EAGAIN);
        }
    }
    monitor_ask(s.mon[0], "info status");
    daemons_idle(s.daemon, 2);
    shutdown(half, SHUT_WR);
    shutdown(pfd.fd, SHUT_WR);
    daemons_idle(s.daemon, 2);
    monitor_ask(s.mon[0], "info status");
    close(half);
    close(pfd.fd);
    close(s.mon[0]);
    close(s.mon[1]);
}
END_TEST

/* 40 clients at once, some change things, some die: all get answers. */
START_TEST(many_clients)
{
    enum { CLIENTS = 40 };
    int fds[CLIENTS];
    Scene s;

    scene_start(&s, "", "");
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = monitor_batch(s.path[0]);
    }
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < CLIENTS; i++) {
            char command[TEXT_LEN];

            text_format(command, sizeof(command), i % 4 ? "info conns -k\n" :
                        round % 2 ? "oforward_del c%d:127.0.0.1:0\n" :
                        "oforward_add c%d:127.0.0.1:0\n", i);
            send_all(fds[i], command, strlen(command));
        }
        flow(&s);
        for (int i = CLIENTS - 1; i >= 0; i--) {
            char *answer = monitor_answer(fds[i]);

            ck_assert_msg(strcmp(answer + strlen(answer) - 3, "ok\n") == 0,
                          "client %d: %s", i, answer);
            ck_assert(i % 4 == 0 || line_count(answer, "conn") == 3);
            free(answer);
            if (i % 7 == round) {       /* dies in the middle of an answer */
                send_all(fds[i], "help\ninfo con", 13);
                close(fds[i]);
                fds[i] = monitor_batch(s.path[0]);
            }
        }
    }
    for (int i = 0; i < CLIENTS; i++) {
        close(fds[i]);
    }
    scene_end(&s);
}
END_TEST

/* However many have come and hang, there is room for one who asks. */
START_TEST(crowd)
{
    enum { CROWD = 600 };
    static int fds[CROWD];
    int before;
    Scene s;

    scene_start(&s, "", "");
    before = daemon_fds(s.daemon[0]);
    for (int i = 0; i < CROWD; i++) {
        fds[i] = dial(s.path[0], true);
        if (i % 20 == 0) {
            flow(&s);
        }
    }
    ck_assert_int_eq(execute(s.path[0], "info status -k"), 0);
    ck_assert_uint_eq(number(executed(1), "channels"), 1);
    ck_assert_int_le(daemon_fds(s.daemon[0]), before + CLIENTS_MAX);
    for (int i = 0; i < CROWD; i++) {
        close(fds[i]);
    }
    for (int64_t end = now_ms() + WAIT_MS;
         daemon_fds(s.daemon[0]) > before;) {
        ck_assert_msg(now_ms() < end, "clients that left keep descriptors");
        flow(&s);
    }
    close(s.mon[0]);
    s.mon[0] = monitor_batch(s.path[0]);
    scene_end(&s);
}
END_TEST

/* However few descriptors are left, one who asks is answered. */
START_TEST(starved)
{
    StartOptions o = { .nofile = 40 };
    char path[PATH_LEN], where[TEXT_LEN];
    int fds[60], mon;
    Daemon *d;

    file_path(path, "monitor");
    d = daemon_start_with(&o, "host", "-c unix-listen:%s/channel:- -m %s "
                          "-o s:127.0.0.1:0", vp_dir, path);
    text_format(where, sizeof(where), "%s", daemon_listens(d, "s"));
    for (int i = 0; i < COUNT_OF(fds); i++) {
        fds[i] = dial(where, true);
    }
    daemon_wait(d, "s: connection refused: .*descriptors");
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(execute(path, "info status -k"), 0);
        ck_assert_uint_ge(number(executed(1), "conn_fds"), 10);
        ck_assert_uint_ge(number(executed(1), "kept_fds"), 3);
        ck_assert_uint_eq(number(executed(1), "max_fds"), 40);
    }
    mon = monitor_batch(path); /* one who stays goes when another comes */
    monitor_ask(mon, "info status");
    ck_assert_int_eq(execute(path, "info status"), 0);
    expect_eof(mon);
    close(mon);
    daemons_idle(&d, 1);
    ck_assert_int_eq(daemon_count(d, "cannot accept"), 0);
    /* fewer than are open */
    command_wait(command_start("prlimit", "prlimit --pid %d --nofile=15:15",
                               (int)d->pid));
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(execute(path, "info status"), 0);
    }
    for (int i = 0; i < COUNT_OF(fds); i++) {
        close(fds[i]);
    }
    ck_assert_int_eq(execute(path, "info status"), 0);
}
END_TEST

/*
 * Of many connections each is shown once, on a line of its own, and one with a
 * heading for people; what is asked meanwhile and next is answered.
 */
START_TEST(many_conns)
{
    enum { MANY = 300 };
    int fds[MANY], lines = 0;
    const char *answer;
    Scene s;

    scene_start(&s, "", "");
    for (int i = 0; i < MANY; i++) {
        fds[i] = dial(s.where, true);
    }
    for (int i = 0; i < MANY; i++) {
        close(accept_one(s.listener));
    }
    answer = monitor_ask(s.mon[0], "info conns -k");
    ck_assert_uint_ge(line_count(answer, "conn"), MANY);
    ck_assert_int_eq(execute(s.path[0], "info conns"), 0);
    for (const char *at = executed(1); *at != '\0'; at++) {
        lines += *at == '\n';
    }
    ck_assert_uint_eq((unsigned)lines,
                      1 + number(monitor_ask(s.mon[0], "info stats -k"),
                                 "conns"));
    for (int i = 0; i < MANY; i++) {
        close(fds[i]);
    }
    scene_end(&s);
}
END_TEST

/*
 * Many forwards are told in portions, too: a client that has yet to take them
 * isn't told of one that is removed meanwhile, nor of one that is added, whose
 * channel it may not know.  One who leaves in the middle costs nothing.  So are
 * the services that they are to the other side, of which it keeps a part.
 */
START_TEST(many_forwards)
{
    enum { MANY = 9000, KNOWN = 4096, LINE = 80 };
    static const struct {
        const char *command, *last;
    } rows[] = {
        { "info config\n", "\niforward service-8999-xxxxxxxxxxxxx:" },
        { "info iforwards -k\n", "service=service-8999-xxxxxxxxxxxxx " },
        { "info forwards -k\n", "service=service-8999-xxxxxxxxxxxxx " },
        { "info iforwards\n", " service-8999-xxxxxxxxxxxxx " },
    };
    static char config[MANY * LINE];
    char init[PATH_LEN], path[PATH_LEN], link[PATH_LEN];
    int deaf[COUNT_OF(rows)], gone, mon;
    size_t len = 0, known = 0;
    char *answer;

    file_path(init, "init");
    file_path(path, "monitor");
    for (int i = 0; i < MANY; i++) {
        len += (size_t)snprintf(config + len, LINE, "iforward service-%04d-"
                                "xxxxxxxxxxxxx:127.0.0.1:80\n", i);
    }
    file_write(init, config, len);
    file_path(link, "channel");
    daemon_start("host", "-q -m %s -c unix-listen:%s:- -C %s", path, link,
                 init);
    gone = monitor_batch(path);
    for (int i = 0; i < COUNT_OF(rows); i++) {
        struct pollfd pfd = { .events = POLLIN };

        deaf[i] = pfd.fd = monitor_batch(path);
        send_all(deaf[i], rows[i].command, strlen(rows[i].command));
        ck_assert_int_eq(poll(&pfd, 1, WAIT_MS), 1); /* the answer begins */
    }
    send_all(gone, rows[1].command, strlen(rows[1].command));
    close(gone);
    mon = monitor_batch(path);
    monitor_ask(mon, "iforward_del service-8999-xxxxxxxxxxxxx");
    monitor_ask(mon, "channel_add unix-listen:%s.7:-:7", link);
    monitor_ask(mon, "iforward_add added:127.0.0.1:80:7");
    for (int i = 0; i < COUNT_OF(rows); i++) {
        answer = monitor_answer(deaf[i]);
        ck_assert_ptr_nonnull(strstr(answer, "service-8998-xxxxxxxxxxxxx"));
        ck_assert_msg(strstr(answer, rows[i].last) == NULL, "%s has it",
                      rows[i].command);
        ck_assert_msg(strstr(answer, "added") == NULL, "%s has more",
                      rows[i].command);
        free(answer);
        close(deaf[i]);
    }
    ck_assert_uint_eq(line_count(monitor_ask(mon, "info iforwards -k"),
                                 "iforward"), MANY);
    close(mon);

    file_path(path, "there");
    daemon_start("guest", "-q -m %s -c unix-connect:%s:-", path, link);
    mon = monitor_batch(path);
    for (int64_t end = now_ms() + WAIT_MS; now_ms() < end; sleep_ms(10)) {
        known = line_count(monitor_ask(mon, "info services -k"), "service");
        if (known == KNOWN) {
            break;
        }
    }
    ck_assert_uint_eq(known, KNOWN);
    close(mon);
}
END_TEST

/*
 * A daemon that serves doesn't wait for a folder that another one has locked.
 * On a busy machine an answer may take long all the same, so one that is soon
 * is enough; who waits takes a second each time.
 */
START_TEST(folder_locked)
{
    int lock = open(vp_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), mon;
    char path[PATH_LEN], stale[PATH_LEN];
    int64_t took = WAIT_MS;

    file_path(path, "monitor");
    file_path(stale, "stale");
    daemon_start("host", "-m %s -c unix-connect:/nonexistent:-", path);
    mon = monitor_batch(path);
    ck_assert(flock(lock, LOCK_EX) == 0);
    for (int i = 0; i < 10 && took > 500; i++) {
        int64_t since;

        close(listen_on(stale, 5)); /* nobody answers there any more */
        since = now_ms();
        monitor_ask(mon, "oforward_add s:%s:-", stale);
        took = now_ms() - since;
        monitor_ask(mon, "oforward_del s");
    }
    ck_assert_int_le(took, 500);
    close(mon);
    close(lock);
}
END_TEST

/* Why a peer of another version is refused is there when it has gone. */
START_TEST(other_version)
{
    unsigned char hello[ENGINE_HELLO_ROOM];
    char path[2][PATH_LEN];
    int listener, fd;
    Daemon *d;

    file_path(path[0], "monitor");
    file_path(path[1], "channel");
    listener = listen_on(path[1], 5);
    d = daemon_start("host", "-m %s -c unix-connect:%s:-", path[0], path[1]);
    for (int i = 0; i < 2; i++) {
        fd = accept_one(listener);
        send_all(fd, hello, engine_hello(hello, 1));
        daemon_wait(d, "the other end speaks 4, this one 3; upgrade this one");
        close(fd);
    }
    fd = accept_one(listener); /* so the one before is lost */
    ck_assert_int_eq(execute(path[0], "info channels -k"), 0);
    ck_assert_ptr_nonnull(strstr(executed(1), "%20upgrade%20this%20one"));
    ck_assert_int_eq(daemon_count(d, "no common version"), 1);
    close(fd);
    close(listener);
}
END_TEST

/* --- watching and waiting ----------------------------------------------- */

/* monitor_says() - a client in batch mode that has said that */
static int monitor_says(const char *path, const char *lines)
{
    int fd = monitor_batch(path);

    send_all(fd, lines, strlen(lines));
    return fd;
}

/* next_line() - of a client's answer; good until the next call */
static const char *next_line(int fd)
{
    static char line[8192];
    size_t len = 0;

    do {
        ck_assert(len + 1 < sizeof(line));
        recv_all(fd, line + len, 1);
    } while (line[len++] != '\n');
    line[len] = '\0';
    return line;
}

/* check_event() - it has the form, and the keys, that the README promises */
static void check_event(const char *line)
{
    static const char form[] =
        "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[.][0-9]{3}Z "
        "([0-9]+|-) [a-z_]+( [a-z_]+=[!-~]*)*\n$";
    static char *text;
    char words[TEXT_LEN] = "";
    const char *at = strchr(line, ' ') + 1;
    size_t len = 0;
    regex_t re;

    ck_assert(regcomp(&re, form, REG_EXTENDED | REG_NOSUB) == 0);
    ck_assert_msg(regexec(&re, line, 0, NULL, 0) == 0, "%s", line);
    regfree(&re);
    text = text ? text : readme();
    at += strcspn(at, " ") + 1;
    if (strncmp(at, "channel ", 8) == 0) {
        check_event_keys(at, "channel", "channels", "");
        return;
    } else if (strncmp(at, "opened ", 7) == 0) {
        check_event_keys(at, "opened", "conns", "");
        return;
    } else if (strncmp(at, "ended ", 6) == 0) {
        check_event_keys(at, "ended", "conns", " reason");
        return;
    }
    for (; *at != '\0'; at += strcspn(at, " \n") + 1) {
        text_format(words + len, sizeof(words) - len, " %.*s",
                    (int)strcspn(at, "= \n"), at);
        len += strlen(words + len);
    }
    ck_assert_msg(strstr(text, words) != NULL, "not in the README:%s", words);
}

/* expect_event() - skip what comes before the event "CHANNEL_ID EVENT" */
static const char *expect_event(int fd, const char *words)
{
    size_t len = strlen(words);
    const char *line, *at;

    do {
        line = next_line(fd);
        check_event(line);
        at = strchr(line, ' ') + 1;
    } while (strncmp(at, words, len) != 0 || !isspace((unsigned char)at[len]));
    return line;
}

/* expect_value() - that the event's key has that value */
static void expect_value(const char *line, const char *key, const char *text)
{
    ck_assert_msg(strcmp(value(line, key), text) == 0, "no %s=%s: %s", key,
                  text, line);
}

/* expect_end() - of the watched daemon: what comes last */
static void expect_end(int fd)
{
    expect_event(fd, "- end");
    ck_assert_str_eq(next_line(fd), "ok\n");
    expect_eof(fd);
    close(fd);
}

/* Each event, once it happens, at those who want to know of it. */
START_TEST(watch_events)
{
    RelayEnd ends[2] = { { .kind = RELAY_LISTEN }, { .kind = RELAY_CONNECT } };
    char path[2][PATH_LEN], target[TEXT_LEN], name[TEXT_LEN], none[TEXT_LEN];
    int listener = listen_any(target), mon, host, guest, plain, fds[2], fd;
    const char *line;
    Daemon *d[2];
    Relay relay;

    file_path(ends[0].path, "near");
    file_path(ends[1].path, "far");
    file_path(path[0], "host.monitor");
    file_path(path[1], "guest.monitor");
    d[0] = daemon_start("host", "-c unix-connect:%s:- -o s:127.0.0.1:0 "
                        "-o none:127.0.0.1:0 -m %s", ends[0].path, path[0]);
    d[1] = daemon_start("guest", "-c unix-listen:%s:- -i s:%s -m %s",
                        ends[1].path, target, path[1]);
    mon = monitor_batch(path[0]);
    host = monitor_says(path[0], "watch conns\n");
    plain = monitor_says(path[0], "watch\n");
    guest = monitor_says(path[1], "watch conns\n");
    expect_value(expect_event(plain, "0 channel"), "state", "down");
    expect_value(expect_event(guest, "0 channel"), "id", "0");

    relay_start(&relay, ends);
    expect_value(expect_event(plain, "0 up"), "session", "new");
    expect_value(expect_event(plain, "0 services"), "count", "1");
    expect_event(guest, "0 up");
    expect_value(expect_event(guest, "0 services"), "count", "0");

    through(daemon_listens(d[0], "s"), listener, fds);
    talk(fds);
    name_of(fds[0], false, name);
    line = expect_event(host, "0 opened");
    expect_value(line, "service", "s");
    expect_value(line, "from", name);
    expect_value(expect_event(guest, "0 opened"), "to", target);
    close(fds[0]);
    expect_eof(fds[1]);
    close(fds[1]);
    line = expect_event(host, "0 ended");
    expect_value(line, "service", "s");
    ck_assert_str_ne(value(line, "reason"), "");
    ck_assert_uint_ge(number(line, "sent_bytes"), 1);
    expect_event(guest, "0 ended");

    text_format(none, sizeof(none), "%s", daemon_listens(d[0], "none"));
    fd = dial(none, true);
    name_of(fd, false, name);
    expect_reset(fd);
    close(fd);
    line = expect_event(plain, "0 refused");
    expect_value(line, "service", "none");
    expect_value(line, "client", "here");
    expect_value(line, "from", name);
    expect_value(line, "reason", "unknown service");
    line = expect_event(guest, "0 refused");
    expect_value(line, "client", "there");
    expect_value(line, "reason", "unknown service");

    monitor_ask(mon, "oforward_add n%%s:127.0.0.1:0");
    line = expect_event(plain, "0 oforward_add");
    expect_value(line, "service", "n%s");
    expect_value(line, "spec", "n%s:127.0.0.1:0");
    monitor_ask(mon, "oforward_del n%%s");
    expect_value(expect_event(plain, "0 oforward_del"), "service", "n%s");
    monitor_ask(mon, "channel_add unix-connect:/nonexistent:-:7");
    expect_event(plain, "7 channel_add");
    monitor_ask(mon, "iforward_add x:127.0.0.1:1:7");
    expect_event(plain, "7 iforward_add");
    monitor_ask(mon, "channel_del 7");
    expect_value(expect_event(plain, "7 channel_del"), "spec",
                 "unix-connect:/nonexistent:-:7");
    expect_value(expect_event(plain, "7 iforward_del"), "service", "x");

    relay_tell(&relay, RELAY_CUT);
    ck_assert_str_ne(value(expect_event(plain, "0 down"), "reason"), "");
    expect_value(expect_event(plain, "0 up"), "session", "resumed");

    send_all(guest, "info status -k\n", 15);   /* ends watching */
    do {
        line = next_line(guest);
    } while (strcmp(line, "ok\n") != 0);
    ck_assert(line_find(next_line(guest), "status", 0) != NULL);
    ck_assert_str_eq(next_line(guest), "ok\n");
    send_all(guest, "watch\n", 6);
    expect_event(guest, "0 channel");
    monitor_ask(mon, "quit");
    ck_assert_str_ne(value(expect_event(guest, "0 over"), "reason"), "");
    do {
        line = next_line(plain);
        ck_assert_msg(strstr(line, " opened ") == NULL &&
                      strstr(line, " ended ") == NULL, "%s", line);
    } while (strstr(line, " - end\n") == NULL);
    ck_assert_str_eq(next_line(plain), "ok\n");
    expect_end(host);
    ck_assert_int_eq(daemon_exit(d[0]), 0);
    daemon_stop(d[1]);
    expect_end(guest);
    close(plain);
    close(mon);
    close(listener);
}
END_TEST

/* -x: lines come as things happen, and its end is the daemon's. */
START_TEST(watch_executes)
{
    char path[2][PATH_LEN], text[TEXT_LEN];
    pid_t client;
    Daemon *d;

    for (int killed = 0; killed < 2; killed++) {
        text_format(text, sizeof(text), "monitor%d", killed);
        file_path(path[0], text);
        file_path(path[1], "nobody");
        d = daemon_start("host", "-m %s -c unix-connect:%s:-", path[0],
                         path[1]);
        close(monitor_dial(path[0]));
        text_format(text, sizeof(text), "client%d", killed);
        client = command_start(text, "%s '%s' -m %s -x watch",
                               killed ? "!" : "", vp_program, path[0]);
        text_format(text, sizeof(text), "client%d.log", killed);
        file_wait(text, " 0 channel id=0 ");
        ck_assert_int_eq(execute(path[0], "oforward_add s:127.0.0.1:0"), 0);
        file_wait(text, " 0 oforward_add service=s ");
        if (killed) {
            daemon_kill(d);
            command_wait(client);
            file_wait(text, "no answer");
        } else {
            daemon_stop(d);
            command_wait(client);
            file_wait(text, " - end\n");
        }
    }
}
END_TEST

/* One who doesn't read is told how many lines he has missed, once he does. */
START_TEST(watch_missed)
{
    enum { BATCH = 50, BATCHES = 80 };
    char path[PATH_LEN], lines[BATCH * 200];
    size_t len = 0, events = 0, gaps = 0, bytes = 0;
    int mon, deaf;
    Daemon *d;

    file_path(path, "monitor");
    d = daemon_start("host", "-q -m %s -c unix-connect:%s/nobody:-", path,
                     vp_dir);
    deaf = monitor_says(path, "watch\n");
    expect_event(deaf, "0 channel");
    mon = monitor_batch(path);
    for (int i = 0; i < BATCH; i++) {
        text_format(lines + len, sizeof(lines) - len,
                    "iforward_add x:/%0100d:-\niforward_del x\n", i);
        len += strlen(lines + len);
    }
    for (int i = 0; i < BATCHES; i++) {
        send_all(mon, lines, len);
        for (int n = 0; n < 2 * BATCH; n++) {
            expect_bytes(mon, "ok\n");
        }
    }
    while (events < 2 * BATCH * BATCHES) {
        const char *line = next_line(deaf);

        check_event(line);
        bytes += strlen(line);
        if (strstr(line, " - missed ") == NULL) {
            events++;
            continue;
        }
        events += number(line, "lines");
        ck_assert_int_eq((int)gaps++, 0);
        /* what the kernel holds, and the daemon; of a megabyte and a half */
        ck_assert_uint_le(bytes, 900 * KIB);
    }
    ck_assert_uint_eq(events, 2 * BATCH * BATCHES);
    ck_assert_uint_eq(gaps, 1);
    monitor_ask(mon, "iforward_add y:127.0.0.1:1");
    ck_assert(strstr(next_line(deaf), " 0 iforward_add service=y ") != NULL);
    daemon_stop(d);
    expect_end(deaf);
    close(mon);
}
END_TEST

/* wait_start() - have "-x 'wait WHAT'" wait in the background */
static pid_t wait_start(const char *path, const char *name, const char *what)
{
    return command_start(name, "exec '%s' -m %s -x 'wait %s'", vp_program,
                         path, what);
}

/* clients_wait() - until the daemon has that many descriptors */
static void clients_wait(const Daemon *d, int fds)
{
    int64_t end = now_ms() + WAIT_MS;

    while (daemon_fds(d) != fds) {
        ck_assert_msg(now_ms() < end, "%d descriptors, not %d",
                      daemon_fds(d), fds);
        sleep_ms(10);
    }
}

/* "wait" ends when it is there, when the time is over, or never can be. */
START_TEST(waits)
{
    static const char endless[4096];
    char path[2][PATH_LEN], channel[PATH_LEN];
    int before, raw, gone;
    pid_t up, service;
    int64_t start;
    Daemon *d, *guest;

    file_path(channel, "channel");
    file_path(path[0], "host.monitor");
    file_path(path[1], "guest.monitor");
    d = daemon_start("host", "-m %s -c unix-connect:%s:-", path[0], channel);
    close(monitor_dial(path[0]));
    ck_assert_int_eq(execute(path[0], "wait up 0"), 1);
    start = now_ms();
    ck_assert_int_eq(execute(path[0], "wait up 1"), 1);
    ck_assert_int_ge(now_ms() - start, 1000);
    ck_assert_msg(strstr(executed(2), "channel 0 is not up: ") &&
                  strstr(executed(2), "No such file"), "%s", executed(2));
    ck_assert_int_eq(execute(path[0], "wait up 60 7"), 1);
    ck_assert_msg(strstr(executed(2), "no channel 7"), "%s", executed(2));

    /* its client reads up to the end: those before have gone by then, too */
    ck_assert_int_eq(execute(path[0], "info status"), 0);
    before = daemon_fds(d);
    up = wait_start(path[0], "up", "up 60");
    service = wait_start(path[0], "service", "s 60 0");
    raw = monitor_says(path[0], "wait up 60\ninfo status -k\n");
    shutdown(raw, SHUT_WR);
    gone = monitor_says(path[0], "wait up 60\n");
    clients_wait(d, before + 4);
    close(gone);
    clients_wait(d, before + 3);
    guest = daemon_start("guest", "-m %s -c unix-listen:%s:- -i s:127.0.0.1:1",
                         path[1], channel);
    command_wait(up);
    command_wait(service);
    ck_assert_str_eq(next_line(raw), "ok\n");
    ck_assert(line_find(next_line(raw), "status", 0) != NULL);
    ck_assert_str_eq(next_line(raw), "ok\n");
    expect_eof(raw);
    close(raw);
    clients_wait(d, before + 1);        /* the channel's */

    ck_assert_int_eq(execute(path[0], "wait up 0"), 0);
    ck_assert_int_eq(execute(path[0], "wait s 0"), 0);
    ck_assert_str_eq(executed(1), "");
    ck_assert_int_eq(execute(path[0], "wait late 1"), 1);
    ck_assert_msg(strstr(executed(2), "channel 0 offers no service 'late'"),
                  "%s", executed(2));
    service = wait_start(path[0], "late", "late 60");
    clients_wait(d, before + 2);
    ck_assert_int_eq(execute(path[1], "iforward_add late:127.0.0.1:1"), 0);
    command_wait(service);

    raw = monitor_says(path[0], "wait nobody 60\n");
    send_all(raw, endless, sizeof(endless));
    gone = monitor_says(path[0], "wait nobody 60\n");
    send_all(gone, endless, sizeof(endless));
    clients_wait(d, before + 3);
    close(gone);
    clients_wait(d, before + 2);
    ck_assert_int_eq(execute(path[0], "channel_del 0"), 0);
    ck_assert_str_eq(next_line(raw), "error: there is no channel 0\n");
    ck_assert(strstr(next_line(raw), "longer than") != NULL);
    close(raw);
    raw = monitor_says(path[1], "wait nobody 60\n");
    monitor_ask(gone = monitor_batch(path[1]), "info status");
    daemon_stop(guest);
    ck_assert_str_eq(next_line(raw), "error: the daemon is ending\n");
    expect_eof(raw);
    close(raw);
    close(gone);
}
END_TEST

/* A reload that changes the channel's line is no end of waiting for it. */
START_TEST(wait_reload)
{
    char file[PATH_LEN], path[PATH_LEN], text[TEXT_LEN];
    int raw;
    Daemon *d;

    file_path(file, "conf");
    file_path(path, "monitor");
    text_format(text, sizeof(text), "channel unix-connect:%s/a:-\n", vp_dir);
    file_write(file, text, strlen(text));
    d = daemon_start("host", "-C %s -m %s", file, path);
    raw = monitor_says(path, "wait up 60\nwatch\n");
    ck_assert_int_eq(execute(path, "info status"), 0);
    text_format(text, sizeof(text), "channel unix-connect:%s/b:-\n", vp_dir);
    file_write(file, text, strlen(text));
    kill(d->pid, SIGHUP);
    daemon_wait(d, "reloaded");
    daemon_start("guest", "-c unix-listen:%s/b:-", vp_dir);
    ck_assert_str_eq(next_line(raw), "ok\n");
    expect_value(expect_event(raw, "0 channel"), "state", "up");
    text_format(text, sizeof(text), "channel unix-connect:%s/c:-\n", vp_dir);
    file_write(file, text, strlen(text));
    kill(d->pid, SIGHUP);
    expect_event(raw, "0 channel_del");
    text[strlen(text) - 1] = '\0';
    expect_value(expect_event(raw, "0 channel_add"), "spec",
                 text + strlen("channel "));
    close(raw);
}
END_TEST

/* Those who wait and watch cost no CPU time, and keep nobody out. */
START_TEST(waiting_crowd)
{
    enum { CROWD = 140 };
    static char full[5000];
    int fds[CROWD], before;
    char path[PATH_LEN];
    Daemon *d;

    file_path(path, "monitor");
    d = daemon_start("host", "-m %s -c unix-listen:%s/channel:-", path,
                     vp_dir);
    close(monitor_dial(path));
    memset(full, 'x', sizeof(full));
    before = daemon_fds(d);
    for (int i = 0; i < CROWD; i++) {
        fds[i] = monitor_says(path, i % 2 ? "watch conns\n" : "wait up 60\n");
        if (i % 3 == 0) {
            shutdown(fds[i], SHUT_WR);
        } else if (i % 4 == 0) {
            send_all(fds[i], full, sizeof(full));
        }
    }
    ck_assert_int_eq(execute(path, "info status -k"), 0);
    ck_assert_uint_eq(number(executed(1), "channels"), 1);
    /* one may be of epoll, which watches many */
    ck_assert_int_le(daemon_fds(d), before + CLIENTS_MAX + 1);
    daemons_idle(&d, 1);
    for (int i = 0; i < CROWD; i++) {
        close(fds[i]);
    }
    for (int64_t end = now_ms() + WAIT_MS; daemon_fds(d) > before + 1;) {
        ck_assert_msg(now_ms() < end, "clients that left keep descriptors");
        sleep_ms(10);
    }
    ck_assert_int_eq(execute(path, "info status"), 0);
}
END_TEST

/* --- the client --------------------------------------------------------- */

/*
 * -x ends though the daemon has stopped; a reload may take as long as that.
 * The other end's "wait" says that it is silent, and not what was wrong before;
 * who watches there is told, and one who waits gets on once it answers.
 */
START_TEST(unanswered)
{
    char path[PATH_LEN], slow[PATH_LEN], end[PATH_LEN], channel[PATH_LEN];
    char text[TEXT_LEN];
    pid_t client, reload;
    int64_t start;
    int listener, fd, mon, watcher, waiter;
    Daemon *d;

    file_path(channel, "channel");
    file_path(end, "end");
    daemon_start("end", "-m %s -c unix-connect:%s:-", end, channel);
    mon = monitor_batch(end);
    ck_assert_str_ne(value(wait_state(mon, "down"), "last_error"), "");
    file_path(slow, "slow");
    listener = listen_on(slow, 1);
    reload = command_start("reload", "'%s' -m %s -x reload", vp_program, slow);
    fd = accept_one(listener);
    send_all(fd, "(qemu-vp) ", 10);
    expect_bytes(fd, "batch\nreload\n");
    file_path(path, "monitor");
    d = daemon_start("host", "-m %s", path);
    close(monitor_dial(path));
    daemon_wait(d, "the monitor can add one");
    text_format(text, sizeof(text), "channel_add unix-listen:%s:-", channel);
    ck_assert_int_eq(execute(path, text), 0);
    ck_assert_str_ne(value(wait_state(mon, "up"), "last_error"), "");
    watcher = monitor_says(end, "watch\n");
    expect_event(watcher, "0 channel");
    kill(d->pid, SIGSTOP);
    start = now_ms();
    client = command_start("wait", "! '%s' -m %s -x 'wait up 1'", vp_program,
                           path);
    ck_assert_int_eq(execute(path, "info status"), 1);
    ck_assert_int_lt(now_ms() - start, 19000);  /* 10 s are promised */
    sleep_ms(1000);
    send_all(fd, "ok\n", 3);
    command_wait(reload);
    command_wait(client);
    file_wait("wait.log", "doesn't answer");
    ck_assert_msg(strstr(executed(2), "doesn't answer") != NULL, "%s",
                  executed(2));
    wait_state(mon, "silent");
    expect_event(watcher, "0 silent");
    ck_assert_int_eq(execute(end, "wait up 0"), 1);
    ck_assert_msg(strstr(executed(2), "channel 0 is silent") != NULL, "%s",
                  executed(2));
    waiter = monitor_says(end, "wait up 60\n");
    kill(d->pid, SIGCONT);
    ck_assert_str_eq(next_line(waiter), "ok\n");
    expect_event(watcher, "0 answers");
    ck_assert_int_eq(execute(path, "info status"), 0);
    close(watcher);
    close(waiter);
    close(fd);
    close(listener);
    close(mon);
}
END_TEST

/* -x: what is answered is printed, the status is the command's. */
START_TEST(executes)
{
    char path[PATH_LEN];
    Scene s;

    scene_start(&s, "", "");
    ck_assert_int_eq(execute(s.path[0], "info conns -k"), 0);
    ck_assert_uint_eq(line_count(executed(1), "conn"), 3);
    ck_assert_msg(strstr(executed(1), "ok\n") == NULL &&
                  strstr(executed(1), "(qemu-vp)") == NULL, "%s", executed(1));
    ck_assert_str_eq(executed(2), "");
    flow(&s);
    ck_assert_int_eq(execute(s.path[0], "oforward_add x:127.0.0.1:0"), 0);
    ck_assert_str_eq(executed(1), "");
    check_refused("127.0.0.1:1");
    ck_assert_int_eq(execute(s.path[0], "oforward_add x:127.0.0.1:0"), 1);
    ck_assert_msg(strstr(executed(2), "already"), "%s", executed(2));
    ck_assert_str_eq(executed(1), "");
    ck_assert_int_eq(execute(s.path[0], "nonsense"), 1);
    ck_assert_msg(strstr(executed(2), "'nonsense'"), "%s", executed(2));
    ck_assert_int_eq(execute(s.path[0], "oforward_del x:127.0.0.1:0"), 0);
    ck_assert_int_eq(execute(s.path[0], "batch"), 0);
    ck_assert_str_eq(executed(1), "");
    ck_assert_str_eq(executed(2), "");
    ck_assert_int_eq(execute(s.path[0], "info status\nquit"), 2);
    ck_assert_msg(strstr(executed(2), "-x 'info status?quit'"), "%s",
                  executed(2));
    ck_assert_int_eq(execute("fd:monitor", "info status"), 2);
    ck_assert_msg(strstr(executed(2), "needs the path"), "%s", executed(2));
    file_path(path, "nobody");
    ck_assert_int_eq(execute(path, "info status"), 1);
    ck_assert_msg(strstr(executed(2), path) &&
                  strstr(executed(2), "No such file"), "%s", executed(2));
    ck_assert_int_eq(execute(s.channel, "info status"), 1);
    scene_end(&s);
}
END_TEST

/* Only its owner can use it, and one that somebody serves is not taken. */
START_TEST(monitor_socket)
{
    char path[PATH_LEN];
    struct stat st;
    Daemon *second;
    mode_t mask = umask(0);
    Scene s;

    scene_start(&s, "", "");
    umask(mask);
    for (int k = 0; k < 2; k++) {
        ck_assert(stat(s.path[k], &st) == 0);
        ck_assert_int_eq(st.st_mode & 0777, 0600);
    }
    second = daemon_start("second", "-m %s", s.path[0]);
    ck_assert_int_eq(daemon_exit(second), 1);
    ck_assert(daemon_saw(second, "host.monitor.*in use; -x COMMAND"));
    file_path(path, "file");
    file_write(path, "text", 4);
    second = daemon_start("third", "-m %s", path);
    ck_assert_int_eq(daemon_exit(second), 1);
    ck_assert(daemon_saw(second, "/file.*not a socket"));
    ck_assert(access(path, F_OK) == 0);
    ck_assert_int_eq(execute(s.path[0], "info status"), 0);
    daemon_kill(s.daemon[1]);           /* its socket's file stays */
    second = daemon_start("fourth", "-m %s", s.path[1]);
    close(monitor_batch(s.path[1]));
    daemon_stop(second);
    ck_assert_msg(access(s.path[1], F_OK) < 0, "%s is left", s.path[1]);
    traffic_free(&s.traffic);
}
END_TEST

/* Abstract names, which are Linux's, stand wherever a path may. */
START_TEST(abstract_names)
{
    char name[5][40], prefix[24];
    int listener, status;
    Daemon *a;
    pid_t pid;

    text_format(prefix, sizeof(prefix), "@vp-test-%ld", (long)getpid());
    for (int i = 0; i < 5; i++) {
        text_format(name[i], sizeof(name[i]), "%s-%d", prefix, i);
    }
#ifndef __linux__
    PASS_OVER("Linux");
#endif
    ck_assert(chdir(vp_dir) == 0);
    listener = listen_on(name[0], 5);
    a = daemon_start("a", "-c unix-listen:%s:- -i s:%s:- -m %s", name[1],
                     name[0], name[2]);
    daemon_wait(a, "listening on %s$", name[1]);
    daemon_wait(a, " warn ch0: whoever reaches %s is the other end", name[1]);
    daemon_start("b", "-c unix-connect:%s:- -o s:%s:- -m %s", name[1], name[3],
                 name[4]);
    close(monitor_batch(name[4]));
    check_works(name[3], listener);
    ck_assert_int_eq(execute(name[4], "info oforwards -k"), 0);
    ck_assert_str_eq(value(executed(1), "listening"), name[3]);
    for (int i = 0; i < 5; i++) {
        ck_assert_msg(access(name[i], F_OK) < 0, "%s has a file", name[i]);
    }
    if (geteuid() != 0) {
        PASS_OVER("root");
    }
    pid = fork();                       /* a stranger gets no prompt */
    ck_assert(pid >= 0);
    if (pid == 0) {
        char c;

        _exit(setuid(65534) == 0 && read(dial(name[2], true), &c, 1) == 0);
    }
    child_add(pid);
    status = child_wait(pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    close(listener);
}
END_TEST

/* With a monitor alone it starts: all else can come later. */
START_TEST(from_nothing)
{
    char path[2][PATH_LEN], channel[PATH_LEN], target[TEXT_LEN];
    int mon[2], fds[2], listener = listen_any(target);

    file_path(channel, "channel");
    for (int k = 0; k < 2; k++) {
        file_path(path[k], k ? "b" : "a");
        Daemon *d = daemon_start(k ? "b" : "a", "-m %s", path[k]);

        daemon_wait(d, "no channel yet: .* -m %s -x COMMAND", path[k]);
        mon[k] = monitor_batch(path[k]);
        ck_assert_uint_eq(number(monitor_ask(mon[k], "info status -k"),
                                 "channels"), 0);
        monitor_ask(mon[k], "channel_add %s:%s:-:3", k ? "unix-connect" :
                    "unix-listen", channel);
    }
    monitor_ask(mon[0], "oforward_add s:127.0.0.1:0:3");
    monitor_ask(mon[1], "iforward_add s:%s:3", target);
    fds[0] = dial(value(monitor_ask(mon[0], "info oforwards -k"),
                        "listening"), true);
    fds[1] = accept_one(listener);
    talk(fds);
    for (int k = 0; k < 2; k++) {
        close(fds[k]);
        close(mon[k]);
    }
    close(listener);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("monitor");

    SUITE_ADD(s, documented_keys);
    SUITE_ADD(s, connection_figures);
    SUITE_ADD(s, waiting_figures);
    SUITE_ADD(s, channel_figures);
    SUITE_ADD(s, forward_limits);
    SUITE_ADD(s, channel_history);
    SUITE_ADD(s, reload_says);
    SUITE_ADD(s, limit_of_changed);
    SUITE_ADD(s, by_socat);
    SUITE_ADD(s, tables);
    SUITE_ADD(s, narrow_tables);
    SUITE_ADD(s, bad_command);
    SUITE_ADD(s, own_descriptors);
    SUITE_ADD(s, change_forwards);
    SUITE_ADD(s, change_by_name);
    SUITE_ADD(s, delete_while_connecting);
    SUITE_LOOP(s, change_channels, 4);
    SUITE_ADD(s, slow_names);
    SUITE_ADD(s, many_changes);
    SUITE_LOOP(s, conn_reset, 4);
    SUITE_ADD(s, log_level);
    SUITE_LOOP(s, quit, 2);
    SUITE_LOOP(s, endless_line, 2);
    SUITE_ADD(s, quit_asks);
    SUITE_ADD(s, half_command);
    SUITE_ADD(s, last_line);
    SUITE_ADD(s, leave);
    SUITE_ADD(s, odd_pieces);
    SUITE_ADD(s, deaf_client);
    SUITE_ADD(s, deaf_client_idle);
    SUITE_ADD(s, many_clients);
    SUITE_ADD(s, crowd);
    SUITE_ADD(s, starved);
    SUITE_ADD(s, many_conns);
    SUITE_ADD(s, many_forwards);
    SUITE_ADD(s, folder_locked);
    SUITE_ADD(s, watch_events);
    SUITE_ADD(s, watch_executes);
    SUITE_ADD(s, watch_missed);
    SUITE_ADD(s, waits);
    SUITE_ADD(s, wait_reload);
    SUITE_ADD(s, waiting_crowd);
    SUITE_ADD(s, executes);
    SUITE_ADD(s, other_version);
    SUITE_ADD(s, unanswered);
    SUITE_ADD(s, monitor_socket);
    SUITE_ADD(s, abstract_names);
    SUITE_ADD(s, from_nothing);
    return harness_run(s);
}
