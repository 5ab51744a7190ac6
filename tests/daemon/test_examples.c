/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_examples.c - real programs over every kind of channel
 *
 * The two examples that came with the first proposal of qemu-vp, http and ssh
 * from the host to the guest, with wget, curl, ssh and sftp as users run them,
 * and the same from the guest to the host over the same channel at the same
 * time.  The http server is a small one of our own, so that it can check what
 * is uploaded; sshd is the real one, with keys and a configuration that are
 * made here and belong to the test alone.
 */
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/lib/channel.h"
#include "programs.h"
#include "traffic.h"

#define FILE_SIZE 3000000       /* of what is moved about */
#define UPLOAD_STREAM 99        /* pattern of the file that is uploaded */

/* --- http server -------------------------------------------------------- */

/* http_fail() - the request is answered with an error */
static void http_fail(FILE *out, const char *why)
{
    fprintf(out, "HTTP/1.1 500 %s\r\nContent-Length: 0\r\n\r\n", why);
    fflush(out);
    _exit(1);
}

static void http_get(FILE *out, const char *path)
{
    static unsigned char body[65536];
    unsigned long size, stream;

    if (sscanf(path, "/%lu/%lu", &size, &stream) != 2) {
        http_fail(out, "bad path");
    }
    fprintf(out, "HTTP/1.1 200 OK\r\nContent-Length: %lu\r\n"
            "Connection: close\r\n\r\n", size);
    for (unsigned long pos = 0; pos < size; pos += sizeof(body)) {
        size_t n = size - pos < sizeof(body) ? size - pos : sizeof(body);

        bytes_fill(body, n, stream, pos);
        fwrite(body, 1, n, out);
    }
    fflush(out);
}

/* http_put() - take a file and say whether it came whole */
static void http_put(FILE *in, FILE *out, unsigned long size)
{
    static unsigned char body[65536];

    for (unsigned long pos = 0; pos < size; pos += sizeof(body)) {
        size_t n = size - pos < sizeof(body) ? size - pos : sizeof(body);

        if (fread(body, 1, n, in) != n) {
            http_fail(out, "short body");
        }
        if (bytes_right(body, n, UPLOAD_STREAM, pos) != n) {
            http_fail(out, "wrong byte");
        }
    }
    fprintf(out, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
            "Connection: close\r\n\r\nwhole");
    fflush(out);
}

/* http_serve() - one request, in a process of its own */
static void http_serve(int fd)
{
    FILE *in = fdopen(fd, "r");
    FILE *out = fdopen(dup(fd), "w");
    char line[TEXT_LEN], method[16] = "", path[TEXT_LEN] = "";
    unsigned long size = 0;
    bool expects = false;

    if (!in || !out || !fgets(line, sizeof(line), in) ||
        sscanf(line, "%15s %511s", method, path) != 2) {
        _exit(1);
    }
    while (fgets(line, sizeof(line), in) && line[0] != '\r') {
        sscanf(line, "Content-Length: %lu", &size);
        expects = expects || strncmp(line, "Expect: 100", 11) == 0;
    }
    if (strcmp(method, "GET") == 0) {
        http_get(out, path);
    } else if (strcmp(method, "PUT") == 0) {
        if (expects) {
            fprintf(out, "HTTP/1.1 100 Continue\r\n\r\n");
            fflush(out);
        }
        http_put(in, out, size);
    } else {
        http_fail(out, "bad method");
    }
    _exit(0);
}

/* http_start() - an http server for pattern files; its address */
static void http_start(char *where)
{
    int listener = listen_any(where);
    pid_t pid = fork();

    ck_assert(pid >= 0);
    if (pid == 0) {
        child_fds(&listener, 1);
        signal(SIGCHLD, SIG_IGN);
        for (;;) {
            int fd = accept(listener, NULL, NULL);

            if (fd >= 0 && fork() == 0) {
                http_serve(fd);
            }
            close(fd);
        }
    }
    child_add(pid);
    close(listener);
}

/* --- the examples ------------------------------------------------------- */

/* check_file() - vp_dir/name must hold that pattern */
static void check_file(const char *name, uint64_t stream)
{
    static unsigned char data[FILE_SIZE + 1];
    char path[PATH_LEN];
    size_t len, right;
    FILE *f;

    file_path(path, name);
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s: %s", path, strerror(errno));
    len = fread(data, 1, sizeof(data), f);
    fclose(f);
    right = bytes_right(data, len, stream, 0);
    ck_assert_msg(right == len, "%s: wrong byte at %zu", name, right);
    ck_assert_msg(len == FILE_SIZE, "%s: %zu bytes", name, len);
}

/* use_http() - start wget and curl through a forward, at once */
static size_t use_http(const char *who, const char *http, uint64_t stream,
                       pid_t pids[])
{
    char name[TEXT_LEN];
    size_t n = 0;

    text_format(name, sizeof(name), "%s-wget", who);
    pids[n++] = command_start(name,
        "wget --tries=1 -nv -O %s/%s.wget http://127.0.0.1:%d/%d/%d",
        vp_dir, who, port_of(http), FILE_SIZE, (int)stream);
    text_format(name, sizeof(name), "%s-curl", who);
    pids[n++] = command_start(name,
        "curl -sS -f -o %s/%s.curl http://127.0.0.1:%d/%d/%d && "
        "curl -sS -f -T %s/upload http://127.0.0.1:%d/ | grep -x whole",
        vp_dir, who, port_of(http), FILE_SIZE, (int)stream, vp_dir,
        port_of(http));
    return n;
}

/* use_ssh() - the same with ssh and sftp */
static size_t use_ssh(const char *who, const char *ssh, pid_t pids[])
{
    char name[TEXT_LEN];
    size_t n = 0;

    text_format(name, sizeof(name), "%s-ssh", who);
    pids[n++] = command_start(name,
        "ssh -F %s/ssh_config localhost -p %d 'echo to stderr >&2; cat' "
        "< %s/upload > %s/%s.ssh", vp_dir, port_of(ssh), vp_dir, vp_dir, who);
    text_format(name, sizeof(name), "%s-sftp", who);
    pids[n++] = command_start(name,
        "cd %s && printf 'put upload %s/%s.there\\nget %s/%s.there %s.back\\n'"
        " | sftp -q -F ssh_config -P %d -b - localhost", vp_dir, vp_dir, who,
        vp_dir, who, who, port_of(ssh));
    return n;
}

static void check_http(const char *who, uint64_t stream)
{
    char name[TEXT_LEN];

    text_format(name, sizeof(name), "%s.wget", who);
    check_file(name, stream);
    text_format(name, sizeof(name), "%s.curl", who);
    check_file(name, stream);
}

static void check_ssh(const char *who)
{
    static const char *const uploaded[] = { "ssh", "there", "back" };
    char name[TEXT_LEN];

    for (int i = 0; i < 3; i++) {
        text_format(name, sizeof(name), "%s.%s", who, uploaded[i]);
        check_file(name, UPLOAD_STREAM);
    }
}

/* Both examples, and both the other way round, over one channel at once. */
START_TEST(rfc_examples)
{
    static unsigned char upload[FILE_SIZE];
    char http[TEXT_LEN], ssh[TEXT_LEN] = "127.0.0.1:1", path[PATH_LEN];
    char options[2][4 * TEXT_LEN];
    ChannelKind kind = (ChannelKind)_i;
    const bool with_ssh = has_ssh();
    pid_t pids[16];
    size_t n;
    Pair pair;

    file_path(path, "upload");
    bytes_fill(upload, sizeof(upload), UPLOAD_STREAM, 0);
    file_write(path, upload, sizeof(upload));
    http_start(http);
    if (with_ssh) {
        sshd_start(ssh);
    }
    text_format(options[0], sizeof(options[0]),
                "-o http:127.0.0.1:0 -o ssh:127.0.0.1:0 "
                "-i back-http:%s -i back-ssh:%s", http, ssh);
    text_format(options[1], sizeof(options[1]),
                "-i http:%s -i ssh:%s -o back-http:127.0.0.1:0 "
                "-o back-ssh:127.0.0.1:0", http, ssh);
    pair_start(&pair, kind, options[0], options[1]);
    daemon_mark(pair.host);
    daemon_mark(pair.guest);
    n = use_http("host", daemon_listens(pair.host, "http"), 1, pids);
    n += use_http("guest", daemon_listens(pair.guest, "back-http"), 2,
                  pids + n);
    if (with_ssh) {
        n += use_ssh("host", daemon_listens(pair.host, "ssh"), pids + n);
        n += use_ssh("guest", daemon_listens(pair.guest, "back-ssh"),
                     pids + n);
    }
    while (n > 0) {
        command_wait(pids[--n]);
    }
    check_http("host", 1);
    check_http("guest", 2);
    if (with_ssh) {
        check_ssh("host");
        check_ssh("guest");
    }
    ck_assert_msg(daemon_count(pair.host, " (warn|error) ") == 0 &&
                  daemon_count(pair.guest, " (warn|error) ") == 0,
                  "warnings over a channel of kind %s",
                  channel_kind_name(kind));
    if (!with_ssh) {
        PASS_OVER(HAS_SSH " for its half with ssh");
    }
}
END_TEST

/* Every kind of channel with connections in both directions, byte by byte. */
START_TEST(both_directions)
{
    char options[2][4 * TEXT_LEN];
    const char *where[2];
    Traffic t;
    Pair pair;

    traffic_init(&t);
    text_format(options[0], sizeof(options[0]), "-o s:127.0.0.1:0 -i r:%s",
                traffic_listen(&t));
    text_format(options[1], sizeof(options[1]), "-o r:127.0.0.1:0 -i s:%s",
                traffic_listen(&t));
    pair_start(&pair, (ChannelKind)_i, options[0], options[1]);
    where[0] = daemon_listens(pair.guest, "r");
    where[1] = daemon_listens(pair.host, "s");
    for (uint64_t i = 0; i < 40; i++) {
        traffic_add(&t, where[i % 2], i % 2, i * 10007, 400000 - i * 9973);
    }
    ck_assert_msg(traffic_run(&t, traffic_done, 3 * WAIT_MS),
                  "hangs over a channel of kind %s",
                  channel_kind_name((ChannelKind)_i));
    traffic_free(&t);
}
END_TEST

/*
 * Four channels of one daemon to four others: each service arrives where its
 * CHANNEL_ID says, though all have the same name, and when some of the others
 * die, even one on a channel that can't be made again, the rest goes on.
 */
START_TEST(several_channels)
{
    static const ChannelKind kinds[] = { CHANNEL_UNIX, CHANNEL_TCP,
                                         CHANNEL_VIRTSERIAL, CHANNEL_FD };
    static const int ids[] = { 0, 7, 3, 12 };
    char options[8 * TEXT_LEN] = "", one[3 * TEXT_LEN], name[16], id[16];
    char regex[TEXT_LEN];
    const char *where[4];
    Channel channels[4];
    Daemon *hub, *others[4];
    Traffic t;

    traffic_init(&t);
    for (int i = 0; i < 4; i++) {
        text_format(name, sizeof(name), "channel%d", i);
        channel_make(&channels[i], kinds[i], name);
        text_format(id, sizeof(id), ":%d", ids[i]);
        id[ids[i] ? strlen(id) : 0] = '\0';     /* 0 need not be said */
        text_format(one, sizeof(one), "-c %s%s -o s%d:127.0.0.1:0%s "
                    "-o same:%s/s%d:-:%d ", channels[i].option[0], id, i, id,
                    vp_dir, i, ids[i]);
        ck_assert(strlen(options) + strlen(one) < sizeof(options));
        strcat(options, one);
    }
    hub = daemon_start_with(&channels[3].start[0], "hub", "%s", options);
    for (int i = 0; i < 4; i++) {
        const char *target = traffic_listen(&t);

        others[i] = daemon_start_with(&channels[i].start[1], "other",
                                      "-c %s -i s%d:%s -i same:%s",
                                      channels[i].option[1], i, target,
                                      target);
    }
    for (int i = 0; i < 2; i++) {
        close(channels[3].start[i].keep_fd);
    }
    for (int i = 0; i < 4; i++) {
        text_format(regex, sizeof(regex), "ch%d: channel up", ids[i]);
        daemon_wait(hub, "%s", regex);
        text_format(name, sizeof(name), "s%d", i);
        where[i] = daemon_listens(hub, name);
    }
    for (uint64_t i = 0; i < 40; i++) {
        char path[PATH_LEN];

        text_format(name, sizeof(name), "s%d", (int)i % 4);
        file_path(path, name);
        traffic_add(&t, i < 20 ? where[i % 4] : path, i % 4, i * 10007,
                    400000 - i * 9973);
    }
    ck_assert(traffic_run(&t, traffic_done, 3 * WAIT_MS));

    for (size_t i = 0; i < 4; i++) {
        traffic_add(&t, where[i], i, 4000000, 4000000);
    }
    ck_assert(traffic_run(&t, traffic_paired, WAIT_MS));
    daemon_kill(others[1]);
    daemon_kill(others[3]);
    t.flows[t.n_flows - 3].waived = true;
    t.flows[t.n_flows - 1].waived = true;
    ck_assert(traffic_run(&t, traffic_done, 3 * WAIT_MS));
    daemon_wait(hub, "ch7: channel down");
    daemon_wait(hub, "ch12: channel down");
    ck_assert_int_eq(daemon_count(hub, "channel down"), 2);
    traffic_free(&t);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("examples");

    SUITE_LOOP(s, rfc_examples, CHANNEL_KINDS);
    SUITE_LOOP(s, both_directions, CHANNEL_KINDS);
    SUITE_ADD(s, several_channels);
    return harness_run(s);
}
