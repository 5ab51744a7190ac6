/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_options.c - what the command line may say, and what is said of it
 *
 * The program itself runs in a child process for each line of the tables:
 * with --dump-config it ends once everything has been read and checked.
 *
 * And what a pid file's path may be by the time that the file is locked, and a
 * serial line's rate once it is set.
 */
#define _XOPEN_SOURCE 700

#include "virtproxy.c"

#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <stdlib.h>
#include <termios.h>

/* A file that somebody removes each time before it is locked, so often. */
static char removed[64];
static int removals;

static void fcntl_begins(void)
{
    if (removals > 0) {
        removals--;
        unlink(removed);
    }
}

#define fcntl(fd, ...) (fcntl_begins(), fcntl(fd, __VA_ARGS__))

/* A clock that shows what this libc's time_t can't hold. */
static bool no_date;

#define localtime_r(t, tm) (no_date ? NULL : localtime_r(t, tm))

/* A serial line's driver that takes 9600 baud only, and then has it all end. */
static bool slow_driver;

static int line_set(int fd, int when, const struct termios *settings)
{
    struct termios slow = *settings;

    if (!slow_driver) {
        return tcsetattr(fd, when, settings);
    }
    slow_driver = false;
    cfsetospeed(&slow, B9600);
    raise(SIGTERM);
    return tcsetattr(fd, when, &slow);
}

#define tcsetattr(fd, when, settings) line_set(fd, when, settings)

/* Services that few systems know: one begins with a digit, one has port 0. */
static struct servent *service_find(const char *name, const char *protocol)
{
    static struct servent odd;

    if (strcmp(name, "9p-test") != 0 && strcmp(name, "zero-test") != 0) {
        return getservbyname(name, protocol);
    }
    odd.s_port = name[0] == '9' ? htons(564) : 0;
    return &odd;
}

#define getservbyname(name, protocol) service_find(name, protocol)

/*
 * netinet/tcp.h, which only the engine includes, has a state of this name: in
 * some libraries an enumerator, in others a macro.
 */
#undef TCP_LISTEN
#define TCP_LISTEN METHOD_TCP_LISTEN
#define main qemu_vp_main
#include "qemu-vp.c"
#undef main

#include "tests/lib/suite.h"

#define MAX_ARGS 20

/* A path of @n characters, for tables */
#define X10 "xxxxxxxxxx"
#define X100 X10 X10 X10 X10 X10 X10 X10 X10 X10 X10

/* What a run of the program came to */
typedef struct Run {
    int status;
    char out[4096];
    char err[4096];
} Run;

static void slurp(int fd, char *buf, size_t size)
{
    size_t len = 0;
    ssize_t n;

    while ((n = read(fd, buf + len, size - 1 - len)) > 0) {
        len += (size_t)n;
    }
    buf[len] = '\0';
    close(fd);
}

/* run() - with blanks between the arguments of @line, '_' for a blank in one */
static Run run(const char *line)
{
    char copy[1024], *argv[MAX_ARGS + 1] = { copy };
    int argc = 0, out[2], err[2], status;
    Run r;
    pid_t pid;

    ck_assert_uint_lt((size_t)snprintf(copy, sizeof(copy), "qemu-vp %s",
                                       line), sizeof(copy));
    for (char *p = strtok(copy, " "); p != NULL; p = strtok(NULL, " ")) {
        ck_assert_int_lt(argc, MAX_ARGS);
        for (char *c = p; *c != '\0'; c++) {
            *c = *c == '_' ? ' ' : *c;
        }
        argv[argc++] = strcmp(p, "''") == 0 ? p + 2 : p;
    }
    argv[argc] = NULL;
    ck_assert_int_eq(pipe(out), 0);
    ck_assert_int_eq(pipe(err), 0);
    fflush(NULL);
    pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        alarm(20);
        dup2(out[1], STDOUT_FILENO);
        dup2(err[1], STDERR_FILENO);
        close(out[0]);
        close(out[1]);
        close(err[0]);
        close(err[1]);
        exit(qemu_vp_main(argc, argv));
    }
    close(out[1]);
    close(err[1]);
    slurp(out[0], r.out, sizeof(r.out));
    slurp(err[0], r.err, sizeof(r.err));
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFEXITED(status), "'%s' ended by signal %d:\n%s", line,
                  WTERMSIG(status), r.err);
    r.status = WEXITSTATUS(status);
    return r;
}

/* ---- good ------------------------------------------------------------- */

static const char *const good[] = {
    "-c unix-connect:/p:-",
    "-c unix-listen:/p:-:0",
    "-c unix-listen:relative/path:-",
    "-c unix-connect:[/with:colons]:-",
    "-c tcp-connect:localhost:1",
    "-c tcp-connect:127.0.0.1:65535:65535",
    "-c tcp-connect:[::1]:5555",
    "-c tcp-connect:[::1]:5555:3",
    "-c tcp-connect:[fe80::1%lo]:5555",
    "-c tcp-listen:0.0.0.0:0",
    "-c tcp-listen:[::]:080",
#ifdef HAVE_VSOCK
    "-c vsock-connect:0:1",
    "-c vsock-connect:4294967294:4294967294:7",
    "-c vsock-listen:any:5000 -c vsock-listen:1:5000:1",
#endif
    "-c virtserial-open:/dev/virtio-ports/x:-",
    "-c isaserial-open:/dev/ttyS0:-",
    "-c isaserial-open:/dev/ttyS0:115200",
    "-c isaserial-open:/dev/ttyS0:9600:7",
    "-c fd:0:-",
    "-c fd:3:-:1",
    "-c fd:2147483647:-",
    "-c fd:channel.socket:-:2",
    "-c fd:3:- -o a:fd:web -o *:fd:4 -o b:fd:web.socket:0 -m fd:monitor",
    "-c fd:3:- -o a:fd:- -m [fd:path]",
    "--channel unix-connect:/p:-",
    "--channel=unix-connect:/p:-",
    "-cunix-connect:/p:-",
    "-c unix-connect:/p:- -c unix-connect:/p:-:1 -c unix-listen:/q:-:2",
    "-c fd:3:- -o http:127.0.0.1:8080 -i ssh:127.0.0.1:22",
    "-o http:127.0.0.1:8080 -i ssh:127.0.0.1:22 -c fd:3:-",
    "-c fd:3:- -o http:127.0.0.1:0",
    "-c fd:3:- -o http:[::1]:0:0",
    "-c fd:3:- -o a:/path:- -i b:/path:-",
    "-c fd:3:- -o 9022:9022:-",
    "-c fd:3:- -o x:h:1 -o x:h:2 -o y:h:1",
    "-c fd:3:- -o x:h:1 -i x:h:1",
    "-c fd:3:- -c fd:4:-:9 -i x:h:1 -i x:h:1:9 -o y:h:1:9",
    "-c fd:3:- -o abcdefghijklmnopqrstuvwxyz012345:h:1",
    "-c fd:3:- -o !\"#$%&'()*+,-./;<=>?@\\]^`{|}~:h:1",
    "-c fd:3:- -o x:" X100 "/123456:-",
    "-c fd:3:- -i x:" X100 "/123456:-",
    "-c unix-listen:" X100 "/123456:-",
    "-c fd:3:- --grace 0",
    "-c fd:3:- --grace 1000000 -v -v -v -q",
    "-c fd:3:- -qqqq",
    "-c fd:3:- --max-conns 1 --max-half-open 1 --max-opens 1",
    "-c fd:3:- --max-memory 16",
    "-m /tmp/monitor",
    "-m /tmp/monitor,mode=0660,group=0",
    "-m [/tmp/a,b],mode=7",
    "-c fd:3:- -o x:/a,b:-,mode=0,group=root",
    "-c tcp-connect:h:9p-test -o x:h:9p-test -o y:h:zero-test",
    "-c fd:3:- -o x:/a:-:0,group=65534",
    "-c fd:3:- -i x:h:1,proxy=v2 -i y:[::1]:1:0,idle=1000000,proxy=v2,max=1",
    "-c fd:3:- -o x:h:0,max=1000000 -o *:/a:-,idle=1,mode=0,max=2",
    "-c unix-listen:[/a:]b]:-,mode=777",
};

START_TEST(good_lines)
{
    char line[512];
    Run r;

    snprintf(line, sizeof(line), "--dump-config %s", good[_i]);
    r = run(line);
    ck_assert_msg(r.status == 0 && r.err[0] == '\0', "'%s': %d, %s", line,
                  r.status, r.err);
}
END_TEST

/* What was read is what is in force, word for word. */
START_TEST(good_values)
{
    Run r = run("--dump-config -c tcp-connect:[::1]:5555:3 -o web:[::1]:80:3 "
                "-i sock:/a/b:-:3 --grace 77 --max-conns 12 "
                "--max-opens 34");

    ck_assert_int_eq(r.status, 0);
    ck_assert_msg(strstr(r.out, "channel tcp-connect:[::1]:5555:3\n") != NULL,
                  "%s", r.out);
    ck_assert_ptr_nonnull(strstr(r.out, "oforward web:[::1]:80:3\n"));
    ck_assert_ptr_nonnull(strstr(r.out, "iforward sock:/a/b:-:3\n"));
    ck_assert_ptr_nonnull(strstr(r.out, "grace 77\n"));
    ck_assert_ptr_nonnull(strstr(r.out, "max-conns 12\n"));
    ck_assert_ptr_nonnull(strstr(r.out, "max-opens 34\n"));
}
END_TEST

/* As many connections as there may be, where size_t has 32 bits, too. */
START_TEST(memory_beyond_size_t)
{
    static char *const args[] = {
        "qemu-vp", "-c", "fd:3:-", "--max-memory", "4096", NULL,
    };
    char *argv[COUNT_OF(args)];
    Settings s;
    Error err;

    memcpy(argv, args, sizeof(argv));
    ck_assert(settings_read(&s, COUNT_OF(args) - 1, argv, &err));
    ck_assert_uint_eq(s.config.max_conns, s.max_conns);
    settings_free(&s);
}
END_TEST

/* A line has no date rather than a wrong one. */
START_TEST(no_date_for_a_line)
{
    char line[64];
    int fds[2];

    ck_assert(pipe(fds) == 0);
    log_fd = fds[1];
    no_date = true;
    log_line(VP_LOG_ERROR, VP_NO_CHANNEL, "text");
    ck_assert(close(fds[1]) == 0);
    memset(line, 0, sizeof(line));
    ck_assert(read(fds[0], line, sizeof(line) - 1) > 0);
    ck_assert_str_eq(line, "(no date) error text\n");
}
END_TEST

static const struct {
    const char *text;
    char option;
    Method method;
    const char *service_id, *addr, *port;
    unsigned channel_id;
} specs[] = {
    { "unix-connect:/p:-", 'c', UNIX_CONNECT, NULL, "/p", NULL, 0 },
    { "unix-listen:[a:b]:-:7", 'c', UNIX_LISTEN, NULL, "a:b", NULL, 7 },
    { "tcp-connect:h:12", 'c', TCP_CONNECT, NULL, "h", "12", 0 },
    { "tcp-listen:[::]:0:65535", 'c', TCP_LISTEN, NULL, "::", "0", 65535 },
    { "virtserial-open:/d:-", 'c', VIRTSERIAL_OPEN, NULL, "/d", NULL, 0 },
    { "isaserial-open:/d:9600", 'c', ISASERIAL_OPEN, NULL, "/d", "9600", 0 },
    { "isaserial-open:/d:-:1", 'c', ISASERIAL_OPEN, NULL, "/d", NULL, 1 },
    { "fd:12:-", 'c', INHERITED_FD, NULL, "12", NULL, 0 },
    { "x:h:1", 'o', UNIX_CONNECT, "x", "h", "1", 0 },
    { "x:fd:web.socket:1", 'o', UNIX_CONNECT, "x", "web.socket", NULL, 1 },
    { "x:fd:-", 'o', UNIX_CONNECT, "x", "fd", NULL, 0 },
    { "x:fd:22", 'i', UNIX_CONNECT, "x", "fd", "22", 0 },
    { "x:fd.:22", 'o', UNIX_CONNECT, "x", "fd.", "22", 0 },
    { "fd:mon", 'm', UNIX_CONNECT, NULL, "mon", NULL, 0 },
    { "[fd:mon]", 'm', UNIX_CONNECT, NULL, "fd:mon", NULL, 0 },
#ifdef HAVE_VSOCK
    { "vsock-listen:any:80:3", 'c', VSOCK_LISTEN, NULL, "any", "80", 3 },
#endif
    { "x:[::1]:1:2", 'i', UNIX_CONNECT, "x", "::1", "1", 2 },
    { "x:/p:-:3", 'i', UNIX_CONNECT, "x", "/p", NULL, 3 },
    { "x:/p,q:-:3,mode=1", 'o', UNIX_CONNECT, "x", "/p,q", NULL, 3 },
    { "x:[/p]q]:-,mode=1", 'o', UNIX_CONNECT, "x", "/p]q", NULL, 0 },
    { "[/a,b],mode=1", 'm', UNIX_CONNECT, NULL, "/a,b", NULL, 0 },
};

static bool same_text(const char *a, const char *b)
{
    return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

START_TEST(fields)
{
    Error err;
    Spec spec;

    ck_assert(spec_parse(&spec, specs[_i].option, specs[_i].text, &err));
    ck_assert_str_eq(spec.text, specs[_i].text);
    ck_assert_int_eq(spec.option, specs[_i].option);
    ck_assert(spec.option != 'c' || spec.method == specs[_i].method);
    ck_assert(same_text(spec.service_id, specs[_i].service_id));
    ck_assert(same_text(spec.addr, specs[_i].addr));
    ck_assert(same_text(spec.port, specs[_i].port));
    ck_assert_uint_eq(spec.channel_id, specs[_i].channel_id);
    spec_free(&spec);
}
END_TEST

/* An error says what was expected, whatever is wrong with a spec. */
START_TEST(says_what_was_expected)
{
    static const char *const lines[][2] = {
        { "-c fd", "METHOD:ADDR:PORT[:CHANNEL_ID]" },
        { "-c fd:3:- -o x", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]" },
        { "-c fd:3:- -i x", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]" },
        { "-c fd:3:- -i x:h:zero-test", "'zero-test' is the service with" },
        { "-c tcp-connect:h:9q", "'9q' is neither a number nor a known" },
    };

    for (int i = 0; i < COUNT_OF(lines); i++) {
        Run r = run(lines[i][0]);

        ck_assert_ptr_nonnull(strstr(r.err, lines[i][1]));
        ck_assert_str_eq(r.out, "");
    }
}
END_TEST

/* ---- numbers ---------------------------------------------------------- */

START_TEST(numbers_read)
{
    static const struct {
        const char *text;
        bool good;
        unsigned long value;
    } texts[] = {
        { "0", true, 0 }, { "1", true, 1 }, { "100", true, 100 },
        { "0100", true, 100 }, { "101", false, 0 }, { "", false, 0 },
        { " 1", false, 0 }, { "1 ", false, 0 }, { "-1", false, 0 },
        { "+1", false, 0 }, { "0x1", false, 0 }, { "1.0", false, 0 },
        { "18446744073709551617", false, 0 },
    };
    unsigned long value;

    for (int i = 0; i < COUNT_OF(texts); i++) {
        ck_assert_msg(parse_number(texts[i].text, 0, 100, &value) ==
                      texts[i].good, "'%s'", texts[i].text);
        ck_assert(!texts[i].good || value == texts[i].value);
    }
    ck_assert(!parse_number("4", 5, 9, &value));
    ck_assert(parse_number("5", 5, 9, &value));
    for (size_t i = 0; i < COUNT(speeds); i++) {
        char text[20];

        snprintf(text, sizeof(text), "%u", speeds[i].baud);
        ck_assert_uint_eq(port_baud(text), speeds[i].baud);
    }
    ck_assert_uint_eq(port_baud(NULL), 115200);
}
END_TEST

/* ---- serial lines ----------------------------------------------------- */

/* All rates that the system has a name for, and the name back. */
START_TEST(rates)
{
    static const struct {
        const char *text;
        speed_t speed;
    } known[] = {
        { "50", B50 }, { "134", B134 }, { "300", B300 }, { "600", B600 },
        { "1800", B1800 }, { "230400", B230400 },
#ifdef __linux__
        { "500000", B500000 }, { "576000", B576000 }, { "1152000", B1152000 },
        { "1500000", B1500000 }, { "2000000", B2000000 },
        { "2500000", B2500000 }, { "3000000", B3000000 },
        { "3500000", B3500000 }, { "4000000", B4000000 },
#endif
    };

    for (int i = 0; i < COUNT_OF(known); i++) {
        ck_assert_msg(baud_speed(port_baud(known[i].text)) == known[i].speed,
                      "%s", known[i].text);
    }
    for (size_t i = 0; i < COUNT(speeds); i++) {
        ck_assert_uint_eq(speed_baud(speeds[i].speed), speeds[i].baud);
    }
    ck_assert_uint_eq(speed_baud(B0), 0);
}
END_TEST

/*
 * A rate without a name is set, is set again when somebody has changed it, and
 * one that was there before is put back.
 */
START_TEST(rates_without_name)
{
#ifdef LINUX_RATES
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    struct termios was;
    LinuxTermios any;
    Tty *tty = NULL;
    int line;

    ck_assert(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    line = open(ptsname(master), O_RDWR | O_NOCTTY);
    ck_assert(line >= 0 && tcgetattr(line, &was) == 0);
    if (ioctl(line, LINUX_TCGETS2, &any) < 0) {
        PASS_OVER("a system that has such rates");
    }
    ck_assert_uint_eq(port_baud("250000"), 250000);
    ck_assert(tty_set(line, &was, 128000) == 0);
    ck_assert_uint_eq(tty_baud(line), 128000);
    ck_assert_int_eq(tty_take(line, 250000, &tty), 0);
    ck_assert_uint_eq(tty_baud(line), 250000);
    ck_assert(!tty_restore(tty));
    ck_assert(tty_set(line, &tty->set, 9600 * 7) == 0);
    ck_assert(tty_restore(tty));
    ck_assert_uint_eq(tty_baud(line), 250000);
    ck_assert(tcsetattr(line, TCSANOW, &was) == 0);
    ck_assert(tty_restore(tty));
    ck_assert_uint_eq(tty_baud(line), 250000);
    tty_close(tty);
    ck_assert_uint_eq(tty_baud(line), 128000);
    close(line);
    close(master);
#else
    ck_assert_uint_eq(port_baud("250000"), 0);
#endif
}
END_TEST

/* A rate that the driver doesn't take is said, with the one it has. */
START_TEST(rate_refused)
{
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    char line[100];
    Run r;

    ck_assert(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    for (int i = 0; i < 2; i++) {
        slow_driver = true;
        snprintf(line, sizeof(line), "-c isaserial-open:%s:%s",
                 ptsname(master), i == 0 ? "115200" : "9600");
        r = run(line);
        ck_assert_int_eq(r.status, 0);
        ck_assert_msg((strstr(r.err, "doesn't take 115200 baud, it runs at "
                              "9600 baud\n") != NULL) == (i == 0) &&
                      (strstr(r.err, "take") != NULL) == (i == 0), "%s",
                      r.err);
    }
    close(master);
}
END_TEST

/* ---- addresses -------------------------------------------------------- */

/* What is written without a name needs no name server, and reads back. */
START_TEST(numeric_addresses)
{
    static const char *const texts[][3] = {
        { "127.0.0.1", "80", "127.0.0.1:80" },
        { "0.0.0.0", "0", "0.0.0.0:0" },
        { "::1", "65535", "[::1]:65535" },
        { "2001:db8::7", "22", "[2001:db8::7]:22" },
        { "::ffff:1.2.3.4", "1", "1.2.3.4:1" },
    };
    VPAddr addrs[MAX_ADDRS];
    char text[100];

    for (int i = 0; i < COUNT_OF(texts); i++) {
        ck_assert_int_eq(addr_lookup(texts[i][0], texts[i][1], AI_NUMERICHOST,
                                     addrs), 1);
        ck_assert_str_eq(vp_addr_str(&addrs[0], text, sizeof(text)),
                         texts[i][2]);
    }
    ck_assert_int_lt(addr_lookup("localhost", "1", AI_NUMERICHOST, addrs), 0);
    ck_assert_int_lt(addr_lookup("1.2.3.4.5", "1", AI_NUMERICHOST, addrs), 0);
    addr_unix("/a/path", &addrs[0]);
    ck_assert_str_eq(vp_addr_str(&addrs[0], text, sizeof(text)), "/a/path");
    addr_unix(X100 "/123456", &addrs[0]);
    ck_assert_uint_le(addrs[0].len, sizeof(struct sockaddr_un));
}
END_TEST

/* ---- help ------------------------------------------------------------- */

START_TEST(help_and_version)
{
    Run r = run("-h");

    ck_assert_int_eq(r.status, 0);
    ck_assert_str_eq(r.err, "");
    for (const Option *o = options; o < options + OPTIONS; o++) {
        ck_assert_msg(strstr(r.out, o->name) != NULL, "no --%s", o->name);
    }
    for (size_t m = 0; m < COUNT(method_name); m++) {
        ck_assert_msg(strstr(r.out, method_name[m]) != NULL, "no %s",
                      method_name[m]);
    }
    for (const char *p = r.out; *p != '\0'; p += strcspn(p, "\n") + 1) {
        ck_assert_msg(strcspn(p, "\n") <= 80, "too long: %.80s", p);
    }
    r = run("--version");
    ck_assert_int_eq(r.status, 0);
    ck_assert_int_eq(strncmp(r.out, "qemu-vp ", 8), 0);
}
END_TEST

/* ---- pid file --------------------------------------------------------- */

/* Who locks what its last owner has just removed tries again, for a while. */
START_TEST(pid_file_removed)
{
    char dir[] = "/tmp/vp-unit.XXXXXX", text[32] = "";
    Error err;
    FILE *f;

    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(removed, sizeof(removed), "%s/pid", dir);
    removals = 1000;
    ck_assert(!pidfile_take(removed, &err));
    ck_assert_ptr_nonnull(strstr(err.text, "others replace it"));
    removals = 3;
    ck_assert(pidfile_take(removed, &err));
    ck_assert_int_eq(removals, 0);
    f = fopen(removed, "r");
    ck_assert_ptr_nonnull(f);
    ck_assert_ptr_nonnull(fgets(text, sizeof(text), f));
    fclose(f);
    ck_assert_int_eq(atoi(text), getpid());
    ck_assert(unlink(removed) == 0 && rmdir(dir) == 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("options");

    SUITE_ROWS(s, good_lines, good);
    SUITE_ADD(s, good_values);
    SUITE_ADD(s, memory_beyond_size_t);
    SUITE_ADD(s, no_date_for_a_line);
    SUITE_ROWS(s, fields, specs);
    SUITE_ADD(s, says_what_was_expected);
    SUITE_ADD(s, numbers_read);
    SUITE_ADD(s, rates);
    SUITE_ADD(s, rates_without_name);
    SUITE_ADD(s, rate_refused);
    SUITE_ADD(s, numeric_addresses);
    SUITE_ADD(s, help_and_version);
    SUITE_ADD(s, pid_file_removed);
    return suite_run(s);
}
