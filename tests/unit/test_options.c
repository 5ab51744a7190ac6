/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_options.c - what the command line may say, and what is said of it
 *
 * The program itself runs in a child process for each line of the tables:
 * with --dump-config it ends once everything has been read and checked.
 *
 * And what a pid file's path may be by the time that the file is locked.
 */
#include "virtproxy.c"

#include <fcntl.h>

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

/* netinet/tcp.h, which only the engine includes, has a state of this name */
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
    "-c virtserial-open:/dev/virtio-ports/x:-",
    "-c isaserial-open:/dev/ttyS0:-",
    "-c isaserial-open:/dev/ttyS0:115200",
    "-c isaserial-open:/dev/ttyS0:9600:7",
    "-c fd:0:-",
    "-c fd:3:-:1",
    "-c fd:2147483647:-",
    "--channel unix-connect:/p:-",
    "--channel=unix-connect:/p:-",
    "-cunix-connect:/p:-",
    "-c unix-connect:/p:- -c unix-connect:/p:-:1 -c unix-listen:/q:-:2",
    "-c fd:3:- -o http:127.0.0.1:8080 -i ssh:127.0.0.1:22",
    "-o http:127.0.0.1:8080 -i ssh:127.0.0.1:22 -c fd:3:-",
    "-c fd:3:- -o http:127.0.0.1:0",
    "-c fd:3:- -o http:[::1]:0:0",
    "-c fd:3:- -o a:/path:- -i b:/path:-",
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
    { "x:[::1]:1:2", 'i', UNIX_CONNECT, "x", "::1", "1", 2 },
    { "x:/p:-:3", 'i', UNIX_CONNECT, "x", "/p", NULL, 3 },
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

/* ---- bad -------------------------------------------------------------- */

/* A line, and what of the message must be there: the text, the reason */
static const struct {
    const char *line;
    const char *names;
    const char *why;
} bad_lines[] = {
    { "", "no channel", "-c METHOD:ADDR:PORT" },
    { "-o x:h:1", "-o 'x:h:1'", "there is no channel 0" },
    { "-i x:h:1 -o y:h:1", "-i 'x:h:1'", "there is no channel 0" },
    { "-c fd:3:- -o x:h:1:1", "-o 'x:h:1:1'", "there is no channel 1" },
    { "-c fd:3:-:1 -i x:h:1", "-i 'x:h:1'", "there is no channel 0" },
    /* fields */
    { "-c ''", "-c ''", "ADDR is missing" },
    { "-c unix-connect", "-c 'unix-connect'", "ADDR is missing" },
    { "-c unix-connect:", "-c 'unix-connect:'", "PORT is missing" },
    { "-c unix-connect:/p", "-c 'unix-connect:/p'", "PORT is missing" },
    { "-c unix-connect:/p:", "-c 'unix-connect:/p:'", "PORT is empty" },
    { "-c unix-connect::-", "-c 'unix-connect::-'", "ADDR is empty" },
    { "-c unix-connect:[]:-", "-c 'unix-connect:[]:-'", "ADDR is empty" },
    { "-c :/p:-", "-c ':/p:-'", "unknown METHOD ''" },
    { "-c unix-connect:/p:-:", "'unix-connect:/p:-:'", "CHANNEL_ID ''" },
    { "-c unix-connect:/p:-:1:2", "/p:-:1:2'", "'2' after the CHANNEL_ID" },
    { "-c unix-connect:/p:-:1:", "/p:-:1:'", "'' after the CHANNEL_ID" },
    { "-c unix-connect:/p:-:x", "/p:-:x'", "CHANNEL_ID 'x'" },
    { "-c unix-connect:/p:-:-1", "/p:-:-1'", "CHANNEL_ID '-1'" },
    { "-c unix-connect:/p:-:1x", "/p:-:1x'", "CHANNEL_ID '1x'" },
    { "-c unix-connect:/p:-:65536", ":65536'", "a number from 0 to 65535" },
    { "-c unix-connect:/p:-:99999999999999999999", "99999'", "CHANNEL_ID" },
    { "-c tcp-connect:[::1:80", "[::1:80'", "'[' without ']'" },
    { "-c tcp-connect:[::1]80", "[::1]80'", "'80' after ']'" },
    { "-c tcp-connect:::1:80", ":::1:80'", "after the CHANNEL_ID" },
    { "-o x", "-o 'x'", "ADDR is missing" },
    { "-i x:h", "-i 'x:h'", "PORT is missing" },
    { "-i x:h:1:2:3", "-i 'x:h:1:2:3'", "'3' after the CHANNEL_ID" },
    /* methods and ports */
    { "-c tcp:h:1", "-c 'tcp:h:1'", "unknown METHOD 'tcp'" },
    { "-c TCP-CONNECT:h:1", "-c 'TCP-", "unknown METHOD 'TCP-CONNECT'" },
    { "-c unix-connectx:/p:-", "'unix-connectx:/p:-'", "unknown METHOD" },
    { "-c tcp-connect:h:-", "'tcp-connect:h:-'", "tcp-connect needs a PORT" },
    { "-c tcp-listen:h:-", "'tcp-listen:h:-'", "tcp-listen needs a PORT" },
    { "-c tcp-connect:h:0", ":h:0'", "PORT '0' is not a number from 1" },
    { "-c tcp-connect:h:65536", ":65536'", "PORT '65536'" },
    { "-c tcp-connect:h:-5", ":h:-5'", "PORT '-5'" },
    { "-c tcp-connect:h:+5", ":h:+5'", "PORT '+5'" },
    { "-c tcp-connect:h:5x", ":h:5x'", "PORT '5x'" },
    { "-c tcp-connect:h:0x50", ":h:0x50'", "PORT '0x50'" },
    { "-c tcp-connect:h:nonesuch", ":nonesuch'", "PORT 'nonesuch'" },
    { "-c tcp-listen:h:65536", ":65536'", "a number from 0 to 65535" },
    { "-c unix-connect:/p:1", "'unix-connect:/p:1'", "takes '-'" },
    { "-c unix-listen:/p:1", "'unix-listen:/p:1'", "takes '-'" },
    { "-c virtserial-open:/d:1", "'virtserial-open:/d:1'", "takes '-'" },
    { "-c fd:3:1", "'fd:3:1'", "takes '-'" },
    { "-c fd:x:-", "'fd:x:-'", "'x' is not the number of a descriptor" },
    { "-c fd:-1:-", "'fd:-1:-'", "'-1' is not the number" },
    { "-c fd:2147483648:-", "'fd:2147483648:-'", "is not the number" },
    { "-c isaserial-open:/d:0", "/d:0'", "'0' is not a baud rate" },
    { "-c isaserial-open:/d:9601", "/d:9601'", "'9601' is not a baud rate" },
    { "-c isaserial-open:/d:fast", "/d:fast'", "'fast' is not a baud rate" },
    { "-c isaserial-open:/d:4294976896", "76896'", "is not a baud rate" },
    { "-c unix-listen:" X100 "/1234567:-", "/1234567:-'", "108 bytes" },
    { "-c unix-connect:" X100 X10 ":-", "-c 'unix-connect:x", "110 bytes" },
    { "-i x:h:0", "-i 'x:h:0'", "PORT '0' is not a number from 1" },
    { "-o x:h:65536", "-o 'x:h:65536'", "PORT '65536'" },
    { "-o x:" X100 "/1234567:-", "-o 'x:xxx", "108 bytes" },
    /* service ids */
    { "-o :h:1", "-o ':h:1'", "a SERVICE_ID is 1 to 32" },
    { "-o a_b:h:1", "-o 'a b:h:1'", "a SERVICE_ID is 1 to 32" },
    { "-i a\001b:h:1", "-i '", "it has a control character" },
    { "-i \303\274:h:1", "-i '", "a SERVICE_ID is 1 to 32" },
    { "-i abcdefghijklmnopqrstuvwxyz0123456:h:1", "-i 'abc", "1 to 32" },
    /* the same twice */
    { "-c fd:3:- -c fd:4:-", "-c 'fd:4:-'", "CHANNEL_ID already" },
    { "-c fd:3:-:5 -c unix-listen:/p:-:5", "/p:-:5'", "CHANNEL_ID already" },
    { "-c fd:3:- -i x:h:1 -i x:g:2", "-i 'x:g:2'", "SERVICE_ID already" },
    { "-c fd:3:- -o x:h:1 -o x:h:1", "-o 'x:h:1'", "it is there already" },
    /* numbers and others */
    { "-c fd:3:- --grace ''", "--grace ''", "a number from 0 to 1000000" },
    { "-c fd:3:- --grace -5", "--grace '-5'", "a number from 0" },
    { "-c fd:3:- --grace 1e3", "--grace '1e3'", "a number from 0" },
    { "-c fd:3:- --grace 1000001", "--grace '1000001'", "a number from 0" },
    { "-c fd:3:- --max-conns 0", "--max-conns '0'", "a number from 1" },
    { "-c fd:3:- --max-memory 15", "--max-memory '15'", "from 16" },
    { "-c fd:3:- -k ''", "--key ''", "expected a value" },
    { "-c fd:3:- -k /nonesuch", "--key '/nonesuch'", "No such file" },
    { "-c fd:3:- -k /dev/null", "--key '/dev/null'", "not a file" },
    { "-c fd:3:- -C /nonesuch", "--config '/nonesuch'", "No such file" },
    { "-c fd:3:- stray", "'stray'", "expected an option" },
    { "-c fd:3:- -- -v", "'-v'", "expected an option" },
    { "-c fd:3:- -x quit", "-x 'quit'", "-m PATH" },
    { "-c", "'-c'", "expected a value after it" },
    { "-Z", "'-Z'", "expected an option" },
    { "--nonesuch", "'--nonesuch'", "expected an option" },
    { "--grace", "'--grace'", "expected a value after it" },
};

START_TEST(refused)
{
    Run r = run(bad_lines[_i].line);

    ck_assert_msg(r.status == 2, "'%s' ended with %d:\n%s",
                  bad_lines[_i].line, r.status, r.err);
    ck_assert_msg(strstr(r.err, bad_lines[_i].names) != NULL &&
                  strstr(r.err, bad_lines[_i].why) != NULL,
                  "'%s': %s", bad_lines[_i].line, r.err);
    ck_assert_str_eq(r.out, "");
}
END_TEST

/* An error says what was expected, whatever is wrong with a spec. */
START_TEST(says_what_was_expected)
{
    static const char *const lines[][2] = {
        { "-c fd", "METHOD:ADDR:PORT[:CHANNEL_ID]" },
        { "-c fd:3:- -o x", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]" },
        { "-c fd:3:- -i x", "SERVICE_ID:ADDR:PORT[:CHANNEL_ID]" },
    };

    for (int i = 0; i < COUNT_OF(lines); i++) {
        ck_assert_ptr_nonnull(strstr(run(lines[i][0]).err, lines[i][1]));
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
        ck_assert(find_speed(text) == speeds[i].speed);
    }
    ck_assert(find_speed(NULL) == B115200);
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
        { "::ffff:1.2.3.4", "1", "[::ffff:1.2.3.4]:1" },
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
    SUITE_ROWS(s, fields, specs);
    SUITE_ROWS(s, refused, bad_lines);
    SUITE_ADD(s, says_what_was_expected);
    SUITE_ADD(s, numbers_read);
    SUITE_ADD(s, numeric_addresses);
    SUITE_ADD(s, help_and_version);
    SUITE_ADD(s, pid_file_removed);
    return suite_run(s);
}
