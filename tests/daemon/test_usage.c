/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_usage.c - the command line: what is refused, how, and what is not
 *
 * Wrong usage ends the daemon with status 2 and a message that names the
 * option and the text that was wrong with it.  What is right but can't be had,
 * a listener's address for example, ends it with status 1 and the reason.  Each
 * line of a table is a test of its own, in a fresh daemon.
 */
#define _XOPEN_SOURCE 700

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/lib/harness.h"

#define CHANNEL "unix-connect:/nonexistent/channel:-"
#define ID_32 "abcdefghijklmnopqrstuvwxyz012345"
#define X10 "xxxxxxxxxx"
#define X100 X10 X10 X10 X10 X10 X10 X10 X10 X10 X10
#define PATH_50 "/aaaaaaaaabbbbbbbbbcccccccccdddddddddeeeeeeeeefffff"
#define LONG_PATH PATH_50 PATH_50 PATH_50
#define NAMED_PATH PATH_50 PATH_50      /* as much of it as must be shown */

/* An option that must be refused */
typedef struct BadOption {
    const char *option;         /* as given */
    const char *argument;       /* NULL: none */
    const char *names;          /* must be in the message; NULL: argument */
    const char *why;            /* must be there, too, if not NULL */
} BadOption;

static const BadOption bad_options[] = {
    /* -c METHOD:ADDR:PORT[:CHANNEL_ID] */
    { "-c", "", "-c ''", "ADDR is missing" },
    { "-c", ":", NULL, NULL },
    { "-c", "unix-connect", NULL, "ADDR is missing" },
    { "-c", "unix-connect:", NULL, "PORT is missing" },
    { "-c", "unix-connect:/x", NULL, "PORT is missing" },
    { "-c", "unix-connect:/x:", NULL, "PORT is empty" },
    { "-c", "unix-connect::-", NULL, "ADDR is empty" },
    { "-c", "unix-connect:/x:5", NULL, "takes '-'" },
    { "-c", "unix-connect:/x:-:", NULL, "CHANNEL_ID ''" },
    { "-c", "unix-connect:/x:-:a", NULL, "CHANNEL_ID 'a'" },
    { "-c", "unix-connect:/x:-:-1", NULL, "CHANNEL_ID '-1'" },
    { "-c", "unix-connect:/x:-:1x", NULL, "CHANNEL_ID '1x'" },
    { "-c", "unix-connect:/x:-:99999999999999999999", NULL, "CHANNEL_ID" },
    { "-c", "unix-connect:/x:-:0:more", NULL, "'more' after the CHANNEL_ID" },
    { "-c", "unix-connect:" LONG_PATH ":-", NAMED_PATH, NULL },
    { "-c", "unix-listen:", NULL, NULL },
    { "-c", "unix-listen::-", NULL, NULL },
    { "-c", "unix-listen:/x:80", NULL, "takes '-'" },
    { "-c", "unix-listen:" LONG_PATH ":-", NAMED_PATH, NULL },
    { "--channel", ":/x:-", NULL, "unknown METHOD ''" },
    { "--channel", "unix:/x:-", NULL, NULL },
    { "--channel", "udp-connect:127.0.0.1:9000", NULL,
      "unknown METHOD 'udp-connect'" },
    { "--channel", "UNIX-CONNECT:/x:-", NULL, "unknown METHOD 'UNIX-CONNECT'" },
    { "-c", "tcp-connect:127.0.0.1", NULL, NULL },
    { "-c", "tcp-connect:127.0.0.1:", NULL, NULL },
    { "-c", "tcp-connect:127.0.0.1:-", NULL, "tcp-connect needs a PORT" },
    { "-c", "tcp-connect:127.0.0.1:0", NULL,
      "PORT '0' is not a number from 1" },
    { "-c", "tcp-connect:127.0.0.1:-1", NULL, "PORT '-1'" },
    { "-c", "tcp-connect:127.0.0.1:65536", NULL, "PORT '65536'" },
    { "-c", "tcp-connect:127.0.0.1:4294967376", NULL, NULL },
    { "-c", "tcp-connect:127.0.0.1:80x", NULL, "PORT '80x'" },
    { "-c", "tcp-connect:127.0.0.1: 80", NULL, NULL },
    { "-c", "tcp-connect:127.0.0.1:+80", NULL, "PORT '+80'" },
    { "-c", "tcp-connect::9000", NULL, NULL },
    { "-c", "tcp-connect:[::1:9000", NULL, "'[' without ']'" },
    { "-c", "tcp-connect:[::1]9000", NULL, "'9000' after ']'" },
    { "-c", "tcp-connect:[::1]", NULL, NULL },
    { "-c", "tcp-connect:[]:9000", NULL, NULL },
    { "-c", "tcp-listen:127.0.0.1:65536", NULL, "a number from 0 to 65535" },
    { "-c", "tcp-listen:[::1:9000", NULL, NULL },
    { "-c", "vsock-listen:x:5000", NULL, NULL },
    { "-c", "vsock-listen:any:0", NULL, NULL },
    { "-c", "vsock-listen:any:4294967295", NULL, NULL },
    { "-c", "vsock-connect:any:5000", NULL, NULL },
    { "-c", "vsock-connect:4294967295:5000", NULL, NULL },
    { "-c", "vsock-connect:1:-", NULL, "vsock-connect needs a PORT" },
    { "-c", "vsock-connect:1:http", NULL, NULL },
    { "-c", "virtserial-open:/dev/vport0p1", NULL, NULL },
    { "-c", "virtserial-open::-", NULL, NULL },
    { "-c", "virtserial-open:/dev/vport0p1:9600", NULL, "takes '-'" },
    { "-c", "isaserial-open:/dev/ttyS1", NULL, NULL },
    { "-c", "isaserial-open:/dev/ttyS1:", NULL, NULL },
    { "-c", "isaserial-open:/dev/ttyS1:0", NULL, "'0' is not a baud rate" },
    { "-c", "isaserial-open:/dev/ttyS1:-9600", NULL, NULL },
    { "-c", "isaserial-open:/dev/ttyS1:fast", NULL,
      "'fast' is not a baud rate" },
    { "-c", "isaserial-open:/dev/ttyS1:4000001", NULL,
      "'4000001' is not a baud rate" },
    { "-c", "isaserial-open::9600", NULL, NULL },
    { "-c", "tcp-connect:9000:80", NULL, "ADDR '9000' is neither a name" },
    { "-c", "tcp-listen:9000:80", NULL, "ADDR '9000' is neither a name" },
    { "-c", "tcp-listen:*:80", NULL, "[::] or 0.0.0.0 stands for all" },
    { "-c", "fd::-", NULL, NULL },
    { "-c", "fd:-:-", NULL, NULL },
    { "-c", "fd:-1:-", NULL,
      "'-1' is neither the number nor the name of a descriptor" },
    { "-c", "fd:3", NULL, NULL },
    { "-c", "fd:3:80", NULL, "takes '-'" },
    { "-c", "unix-connect:[]:-", "-c 'unix-connect:[]:-'", "ADDR is empty" },
    { "-c", "unix-connect:/p:-:1:", "/p:-:1:'", "'' after the CHANNEL_ID" },
    { "-c", "unix-connect:/p:-:65536", ":65536'", "a number from 0 to 65535" },
    { "-c", "tcp-connect:::1:80", ":::1:80'", "after the CHANNEL_ID" },
    { "-c", "unix-connectx:/p:-", "'unix-connectx:/p:-'", "unknown METHOD" },
    { "-c", "tcp-listen:h:-", "'tcp-listen:h:-'", "tcp-listen needs a PORT" },
    { "-c", "tcp-connect:h:0x50", ":h:0x50'", "PORT '0x50'" },
    { "-c", "tcp-connect:h:nonesuch", ":nonesuch'", "PORT 'nonesuch'" },
    { "-c", "fd:2147483648:-", "'fd:2147483648:-'", "neither the number" },
    { "-c", "isaserial-open:/d:4294976896", "76896'", "is not a baud rate" },
    { "-c", "unix-listen:" X100 "/1234567:-", "/1234567:-'", "108 bytes" },
    { "-c", "unix-connect:" X100 X10 ":-", "-c 'unix-connect:x", "110 bytes" },
    { "-c", NULL, "", NULL },

    /* -o SERVICE_ID:ADDR:PORT[:CHANNEL_ID] */
    { "-o", "", "", NULL },
    { "-o", "http", NULL, "ADDR is missing" },
    { "-o", "http:", NULL, NULL },
    { "-o", "http:127.0.0.1", NULL, NULL },
    { "-o", "http:127.0.0.1:", NULL, NULL },
    { "-o", "http::80", NULL, NULL },
    { "-o", "http::-", NULL, NULL },
    { "-o", ":127.0.0.1:80", NULL, "a SERVICE_ID is 1 to 32" },
    { "-o", "::", NULL, NULL },
    { "-o", "ht tp:127.0.0.1:80", NULL, "a SERVICE_ID is 1 to 32" },
    { "-o", ID_32 "6:127.0.0.1:80", ID_32 "6", NULL },
    { "-o", "http:127.0.0.1:65536", NULL, "PORT '65536'" },
    { "-o", "http:127.0.0.1:-1", NULL, NULL },
    { "-o", "http:127.0.0.1:8o", NULL, NULL },
    { "-o", "http:[::1:80", NULL, NULL },
    { "-o", "http:[::1]80", NULL, NULL },
    { "-o", "http:127.0.0.1:[0]", NULL, NULL },
    { "-o", "http:127.0.0.1:0:[0]", NULL, NULL },
    { "-c", "[unix-connect]:/x:-", NULL, NULL },
    { "-c", "fd:1024:-:3:4", NULL, NULL },
    { "-o", "http:127.0.0.1:80:", NULL, NULL },
    { "-o", "http:127.0.0.1:80:x", NULL, NULL },
    { "-o", "http:127.0.0.1:80:-1", NULL, NULL },
    { "-o", "http:127.0.0.1:80:0:0", NULL, NULL },
    { "-o", "http:127.0.0.1:0:7", NULL, "there is no channel 7" },
    { "-o", "http:fd:-1", NULL, "'-1' is neither the number nor the name" },
    { "-o", "http:fd:2147483648", NULL, "'2147483648' is neither" },
    { "-o", "http:fd:web,mode=0600", NULL, "for the file of a unix socket" },
    { "-m", "[/m", NULL, "'[' without ']'" },
    { "-W", "s", NULL, "ADDR is missing (expected SERVICE_ID:PATH:-)" },
    { "-m", "fd:", NULL, "'' is neither the number nor the name" },
    { "-m", "fd:mon,mode=0600", NULL, "for the file of a unix socket" },
    { "-o", "http:" LONG_PATH ":-", NAMED_PATH, NULL },
    { "--oforward", "ht\ttp:127.0.0.1:80", "", NULL },
    { "--oforward", "http\n:127.0.0.1:80", "", NULL },
    { "--oforward", "http\x7f:127.0.0.1:80", "", NULL },
    { "--oforward", "caf\xc3\xa9:127.0.0.1:80", "", NULL },
    { "--oforward", "\x1b[31mhttp:127.0.0.1:80", "", NULL },
    { "-o", "x:" X100 "/1234567:-", "-o 'x:xxx", "108 bytes" },
    { "-o", "127.0.0.1:9022:ssh", NULL, "ADDR '9022' is neither a name" },
    { "-o", "ssh:9022:22", NULL, "such as 127.0.0.1 or [::1]" },
    { "-o", "ssh:[0]:22", NULL, "ADDR '0' is neither a name" },
    { "-o", "ssh:*:9022", NULL, "ADDR '*' is neither a name" },
    { "-o", "ssh:[fe80::1]:22", NULL, "[fe80::1%eth0] for one is eth0's" },
    { "-o", "9022:127.0.0.1:22", NULL, "on port 22, for a service named" },
    { "-o", NULL, "", NULL },

    /* -i SERVICE_ID:ADDR:PORT[:CHANNEL_ID] */
    { "-i", "", "", NULL },
    { "-i", "http", NULL, NULL },
    { "-i", "http:127.0.0.1", NULL, "PORT is missing" },
    { "-i", "http:127.0.0.1:", NULL, NULL },
    { "-i", "http::80", NULL, NULL },
    { "-i", ":127.0.0.1:80", NULL, NULL },
    { "-i", ID_32 "6:127.0.0.1:80", ID_32 "6", NULL },
    { "-i", "http:127.0.0.1:65536", NULL, NULL },
    { "-i", "http:127.0.0.1:0", NULL,
      "PORT '0' is not a number from 1" },      /* nobody can connect to 0 */
    { "-i", "http:127.0.0.1:-80", NULL, NULL },
    { "-i", "http:[::1:80", NULL, NULL },
    { "-i", "http:127.0.0.1:80:", NULL, NULL },
    { "-i", "http:127.0.0.1:80:1", NULL, NULL },
    { "-i", "http:127.0.0.1:80:0:0", NULL, "'0' after the CHANNEL_ID" },
    { "-i", "http:" LONG_PATH ":-", NAMED_PATH, NULL },
    { "--iforward", "\x01:127.0.0.1:80", "", NULL },
    { "--iforward", "\xff\xfe:127.0.0.1:80", "", NULL },
    { "-i", "a\001b:h:1", "-i '", "it has a control character" },
    { "-i", "\303\274:h:1", "-i '", "a SERVICE_ID is 1 to 32" },
    { "-i", "abcdefghijklmnopqrstuvwxyz0123456:h:1", "-i 'abc", "1 to 32" },
    { "-i", "127.0.0.1:9022:ssh", NULL, "ADDR '9022' is neither a name" },
    { "-i", "x:/p:-,mode=0600", NULL, "mode is no property of -i" },
    { "-i", "x:h:1,proxy=v1", NULL, "proxy 'v1' is not 'v2'" },
    { "-i", "x:h:1,proxy=v2,proxy=v2", NULL, "proxy was given before" },
    { "-i", "x:h:1,max=0", NULL, "max '0' is not a number from 1 to" },
    { "-o", "x:h:1,max=1000001", NULL, "max '1000001' is not a number" },
    { "-o", "x:h:1,max=-1", NULL, "max '-1' is not a number" },
    { "-o", "x:h:1,max=1e3", NULL, "max '1e3' is not a number" },
    { "-o", "x:h:1,max", NULL, "',max' is no property" },
    { "-o", "x:h:1,idle=0", NULL, "idle '0' is not a number of seconds" },
    { "-i", "x:h:1,idle=10s", NULL, "idle '10s' is not a number of seconds" },
    { "-i", "x:h:1,idle=1,max=1,idle=2", NULL, "idle was given before" },
    { "-m", "/p,max=1", "-m '/p,max=1'", "max is no property of -m" },
    { "-c", "fd:3:-,idle=1", NULL, "idle is no property of -c" },
    { "-o", "x:h:1,proxy=v2", NULL, "proxy is no property of -o" },
    { "-c", "tcp-connect:h:1,proxy=v2", NULL, "proxy is no property of -c" },
    { "-o", "x:h:1,mode=0600", NULL, "for the file of a unix socket" },
    { "-o", "x:/p:-,mode=0800", NULL, "mode '0800' is not a mode" },
    { "-o", "x:/p:-,mode=01000", NULL, "mode '01000' is not a mode" },
    { "-o", "x:/p:-,mode=", NULL, "mode '' is not a mode" },
    { "-o", "x:/p:-,mode", NULL, "',mode' is no property" },
    { "-o", "x:/p:-,group=no-such", NULL, "group 'no-such' is not the name" },
    { "-o", "x:/p:-:0,,mode=0600", NULL, "',' is no property" },
    { "-o", "x:/p:-,mode=0600:0", NULL, "CHANNEL_ID" },
    { "-c", "unix-connect:/p:-,mode=0600", NULL, "a unix socket to listen on" },
    { "-c", "isaserial-open:/dev/pci-0:1:2.0-port0:9600", NULL,
      "an ADDR with colons stands in brackets" },
    { "-m", "/p,q", "-m '/p,q'", "',q' is no property" },
    { "-m", "[/p]q", "-m '[/p]q'", "'q' after ']'" },
    { "-m", "[]", "-m '[]'", "PATH is empty" },
    { "-m", ",mode=0600", "-m ',mode=0600'", "PATH is empty" },
    { "-i", "x:127.0.0.1:-", NULL, "'127.0.0.1' the path of a unix socket" },
    { "-i", "x:[::1]:-", NULL, "'::1' the path of a unix socket" },
    { "-i", NULL, "", NULL },

    /* the rest */
    { "--grace", "", "--grace ''", "a number from 0 to 1000000" },
    { "--grace", "-1", "--grace '-1'", "a number from 0" },
    { "--grace", "1e3", "--grace '1e3'", "a number from 0" },
    { "--grace", "1000001", "--grace '1000001'", "a number from 0" },
    { "--max-conns", "0", "--max-conns '0'", "a number from 1" },
    { "--max-memory", "15", "--max-memory '15'", "from 16" },
    { "--key", "", "--key ''", "expected a value" },
    { "--key", "/nonesuch", "--key '/nonesuch'", "No such file" },
    { "--key", "/dev/null", "--key '/dev/null'", "not a file" },
    { "--config", "/nonesuch", "--config '/nonesuch'", "No such file" },
    { "--grace", "soon", NULL, NULL },
    { "--grace", "1s", NULL, NULL },
    { "--grace", NULL, "", NULL },
    { "-c", " " CHANNEL ":1", NULL, NULL },
    { "-c", CHANNEL ":1 ", NULL, NULL },
    { "-c", "isaserial-open:/dev/tty\x7f:-:1", "/dev/tty?:-:1", NULL },
    { "-o", " http:127.0.0.1:80", NULL, NULL },
    { "-i", "http:/x\n/y:-", "'http:/x?/y:-'", NULL },
    { "-i", "http:/x:- ", NULL, NULL },
    { "--monitor", "/x\noforward s:127.0.0.1:0", "/x?oforward", NULL },
    { "--monitor", "/x ", "'/x '", NULL },
    { "--logfile", " /x", "' /x'", NULL },
    { "--pidfile", "/x\t", "'/x?'", NULL },
    { "--user", " nobody", "' nobody'", NULL },
    { "--key", "/x\r", "'/x?'", NULL },
    { "--config", "/x ", "'/x '", NULL },
    { "--no-such-option", NULL, "", NULL },
    { "-Z", NULL, "", NULL },
};

/* Whole command lines that must be refused, beyond one bad option */
typedef struct BadLine {
    const char *args[8];
    const char *names[2];       /* must be in the message */
} BadLine;

static const BadLine bad_lines[] = {
    { { NULL }, { "no channel", "-c METHOD:ADDR:PORT" } },
    { { "-c", NULL }, { "'-c'", "expected a value after it" } },
    { { "-vqc", NULL }, { "'-c'", "expected a value after it" } },
    { { "--verbose", "-Zq", NULL }, { "'-Z'", "no such option" } },
    { { "--verbose", "-qZq", NULL }, { "'-Z'", "no such option" } },
    { { "--quiet=1", "-c", CHANNEL, NULL },
      { "'--quiet=1'", "expected no value" } },
    { { "left-over", "--nosuch", NULL },
      { "'left-over'", "expected an option" } },
    { { "-o", "http:127.0.0.1:0", NULL },
      { "no channel", "-c METHOD:ADDR:PORT" } },
    { { "-i", "x:h:1", "-m", "/x/m", NULL },
      { "-i 'x:h:1'", "there is no channel 0" } },
    { { "-c", CHANNEL, "-o", "x:h:1:1", NULL },
      { "-o 'x:h:1:1'", "there is no channel 1" } },
    { { "-c", CHANNEL ":1", "-i", "x:h:1", NULL },
      { "-i 'x:h:1'", "there is no channel 0" } },
    { { "-c", CHANNEL, "-i", "x:h:1", "-i", "x:g:2", NULL },
      { "-i 'x:g:2'", "SERVICE_ID already" } },
    { { "-c", CHANNEL, "-o", "x:h:1", "-o", "x:h:1", NULL },
      { "-o 'x:h:1'", "it is there already" } },
    { { "-c", CHANNEL, "--", "-v", NULL }, { "'-v'", "expected an option" } },
    { { "-c", CHANNEL, "-x", "quit", NULL }, { "-x 'quit'", "-m PATH" } },
    { { "-c", CHANNEL, "-c", "unix-connect:/other:-", NULL },
      { "-c 'unix-connect:/other:-'", "CHANNEL_ID already" } },
    { { "-c", CHANNEL ":5", "-c", "fd:9:-:5", NULL },
      { "-c 'fd:9:-:5'", "CHANNEL_ID already" } },
    { { "-c", CHANNEL ":5", "-o", "http:127.0.0.1:0", NULL },
      { "-o", "http:127.0.0.1:0" } },
    { { "-c", CHANNEL ":5", "-i", "http:127.0.0.1:80:0", NULL },
      { "-i", "http:127.0.0.1:80:0" } },
    { { "-c", CHANNEL, "left-over", NULL },
      { "'left-over'", "expected an option" } },
    { { "-c", CHANNEL, "-Z", NULL }, { "'-Z'", "there is no such option" } },
    { { "-c", CHANNEL, "--nosuch", NULL },
      { "'--nosuch'", "there is no such option" } },
    { { "-c", CHANNEL, "--verbose=1", NULL },
      { "'--verbose=1'", "expected no value" } },
    { { "-c", CHANNEL, "--grace", NULL },
      { "'--grace'", "expected a value after it" } },
    { { "-c", "isaserial-open:/dev/ttyS1:-", "-c",
        "isaserial-open:/dev/ttyS1:9600:1", NULL },
      { "isaserial-open:/dev/ttyS1:9600:1", "with this device" } },
    { { "-c", "virtserial-open:/dev/vport1p1:-", "-c",
        "virtserial-open:/dev/vport1p1:-:1", NULL },
      { "virtserial-open:/dev/vport1p1:-:1", "with this device" } },
    { { "-c", CHANNEL, "--grace", "5", "--grace", "6", NULL },
      { "--grace", "'6'" } },
    { { "-m", "/x/a", "--monitor=/x/b", NULL }, { "--monitor", "'/x/b'" } },
    { { "-c", CHANNEL, "-l", "/x/a", "-l", "/x/a", NULL },
      { "--logfile", "'/x/a'" } },
    { { "-C", "/dev/null", "-C", "/dev/null", NULL },
      { "--config", "'/dev/null'" } },
    { { "-c", CHANNEL, "-m", "/" ID_32 ID_32 ID_32 ID_32, NULL },
      { "-m '/" ID_32, "at most 107" } },
    { { "-m", "/x/a", "-x", "help", "-x", "quit", NULL },
      { "--execute", "'quit'" } },
};

/* Forwards that must be taken */
static const char *const good_forwards[][2] = {
    { "-o", ID_32 ":127.0.0.1:0" },
    { "-o", "a:[::1]:0" },
    { "-o", "a:127.0.0.1:0:0" },
    { "-o", "a-b_c.d/e:127.0.0.1:0" },
    { "-o", "[x:127.0.0.1:0" },
    { "-o", "9022:127.0.0.1:0" },
    { "-i", "9022:127.0.0.1:22" },
    { "-i", "a:./127.0.0.1:-" },
    { "-o", "a:127.1:0" },
    { "--oforward", "a:localhost:0" },
    { "-i", ID_32 ":127.0.0.1:80" },
    { "-i", "a:[::1]:80" },
    { "-i", "a:127.0.0.1:65535:0" },
    { "-i", "a:localhost:1" },
    { "-i", "a:/some/socket:-" },
    { "-i", "a:/some/socket:-:0" },
    { "--iforward", "a:127.0.0.1:80" },
    { "--grace", "0" },
    { "--grace", "86400" },
    { "-v", "-v" },
    { "-q", "-q" },
};

/* Channels that must be taken though nobody is there, and who that is */
static const char *const good_channels[][2] = {
    { "unix-connect:/nonexistent/channel:-:0", "/nonexistent/channel" },
    { "unix-connect:/nonexistent/channel:-:12", "/nonexistent/channel" },
    { "tcp-connect:127.0.0.1:1", "127.0.0.1:1" },
    { "tcp-connect:[::1]:1", "\\[::1\\]:1" },
    { "tcp-connect:[::1]:1:3", "\\[::1\\]:1" },
    { "tcp-connect:localhost:1", "localhost:1" },
    { "virtserial-open:/dev/virtio-ports/none:-", "/dev/virtio-ports/none" },
    { "isaserial-open:/dev/ttyNONE:-", "/dev/ttyNONE" },
    { "isaserial-open:/dev/ttyNONE:9600", "/dev/ttyNONE" },
    { "isaserial-open:/dev/ttyNONE:115200:4", "/dev/ttyNONE" },
};

/* run() - run a daemon that ends at once; its exit status */
static int run(Daemon **d, const char *const args[])
{
    const StartOptions none = { 0 };

    *d = daemon_start_args(&none, "usage", args);
    return daemon_exit(*d);
}

/* says() - whether its message has the text, which is no regex */
static bool says(const Daemon *d, const char *text)
{
    char *all = daemon_all(d);
    bool found = strstr(all, text) != NULL;

    free(all);
    return found;
}

/* names_option() - in short, in long, or as getopt_long() does */
static bool names_option(const Daemon *d, const char *option)
{
    static const char *const names[][3] = {
        { "-c", "--channel", "-- 'c'" },
        { "-o", "--oforward", "-- 'o'" },
        { "-i", "--iforward", "-- 'i'" },
    };

    for (int i = 0; i < COUNT_OF(names); i++) {
        if (strcmp(option, names[i][0]) == 0 ||
            strcmp(option, names[i][1]) == 0) {
            return says(d, names[i][0]) || says(d, names[i][1]) ||
                   says(d, names[i][2]);
        }
    }
    return says(d, option + strspn(option, "-"));
}

START_TEST(bad_option)
{
    const BadOption *bad = &bad_options[_i];
    bool is_channel = bad->option[1] == 'c' || bad->option[2] == 'c';
    const char *args[8];
    size_t n = 0;
    Daemon *d;
    int status;
    char *all;

    if (!is_channel) {
        args[n++] = "-c";
        args[n++] = CHANNEL;
    }
    args[n++] = bad->option;
    if (bad->argument) {
        args[n++] = bad->argument;
    }
    args[n] = NULL;
    status = run(&d, args);
    ck_assert_msg(status == 2, "%s '%s': exit status %d", bad->option,
                  bad->argument ? bad->argument : "", status);
    ck_assert_msg(names_option(d, bad->option),
                  "%s '%s': the message doesn't name the option",
                  bad->option, bad->argument ? bad->argument : "");
    ck_assert_msg(says(d, bad->names ? bad->names : bad->argument),
                  "%s '%s': the message doesn't name the text", bad->option,
                  bad->argument ? bad->argument : "");
    ck_assert_msg(!bad->why || says(d, bad->why), "%s '%s': no '%s' in the "
                  "message", bad->option, bad->argument ? bad->argument : "",
                  bad->why);
    all = daemon_all(d);
    for (const char *p = all; *p; p++) {
        ck_assert_msg(*p == '\n' || !iscntrl((unsigned char)*p),
                      "%#x in the message", (unsigned)*p);
    }
    free(all);
}
END_TEST

START_TEST(bad_line)
{
    const BadLine *bad = &bad_lines[_i];
    Daemon *d;
    int status = run(&d, bad->args);

    ck_assert_msg(status == 2, "line %d: exit status %d", _i, status);
    for (int i = 0; i < 2; i++) {
        ck_assert_msg(says(d, bad->names[i]), "line %d: no '%s' in the message",
                      _i, bad->names[i]);
    }
}
END_TEST

START_TEST(good_forward)
{
    const char *const *option = good_forwards[_i];
    Daemon *d;

    if (strstr(option[1], "localhost") != NULL && !has_localhost()) {
        PASS_OVER(HAS_LOCALHOST);
    }
    if (strstr(option[1], "[::1]:0") != NULL && !has_ipv6()) {
        PASS_OVER(HAS_IPV6);
    }
    d = daemon_start("good", "-c " CHANNEL " -f %s/pid %s %s", vp_dir, option[0],
                     option[1]);
    /* The channel's state is worth an info line, which -q -q keeps away. */
    if (strcmp(option[0], "-q") != 0) {
        daemon_wait(d, "/nonexistent/channel");
    } else {
        file_wait("pid", "\n");          /* from then on it takes signals */
        sleep_ms(200);
        ck_assert_int_eq(daemon_count(d, "."), 0);
    }
    daemon_stop(d);
}
END_TEST

START_TEST(good_channel)
{
    Daemon *d;

    if (strstr(good_channels[_i][0], "localhost") != NULL && !has_localhost()) {
        PASS_OVER(HAS_LOCALHOST);
    }
    d = daemon_start("good", "-c %s", good_channels[_i][0]);
    daemon_wait(d, "ch[0-9]+: channel [a-z-]+: %s: ", good_channels[_i][1]);
    daemon_stop(d);
}
END_TEST

/* A unix socket given as a long path that just fits must work. */
START_TEST(longest_path)
{
    char path[PATH_LEN];
    size_t dir = strlen(vp_dir);
    Daemon *d;

    memset(path, 'x', sizeof(path));
    memcpy(path, vp_dir, dir);
    path[dir] = '/';
    path[sizeof(path) - 1] = '\0';
    d = daemon_start("good", "-c " CHANNEL " -o a:%s:-", path);
    ck_assert_str_eq(daemon_listens(d, "a"), path);
    close(dial(path, true));
    daemon_stop(d);
}
END_TEST

START_TEST(help)
{
    const char *const words[] = {
        "-c", "--channel", "-o", "--oforward", "-i", "--iforward", "-v", "-q",
        "-V", "--version", "-h", "--help", "--grace", "unix-connect",
        "unix-listen", "tcp-connect", "tcp-listen", "virtserial-open",
        "isaserial-open", "fd",
    };
    const char *const args[] = { _i ? "--help" : "-h", NULL };
    Daemon *d;

    ck_assert_int_eq(run(&d, args), 0);
    for (int i = 0; i < COUNT_OF(words); i++) {
        ck_assert_msg(says(d, words[i]), "no %s in the help", words[i]);
    }
}
END_TEST

START_TEST(version)
{
    const char *const args[] = { _i ? "--version" : "-V", NULL };
    Daemon *d;

    ck_assert_int_eq(run(&d, args), 0);
    ck_assert(daemon_saw(d, "qemu-vp [0-9]+\\.[0-9]+, protocol [0-9]"));
}
END_TEST

/*
 * expect_taken() - a listener's address that can't be had: status 1
 * @why:  ERE of what is said beside the address; NULL: anything
 */
static void expect_taken(const char *args, const char *where, const char *why)
{
    Daemon *d = daemon_start("taken", "%s", args);
    int status = daemon_exit(d);

    ck_assert_msg(status == 1, "%s: exit status %d", args, status);
    ck_assert_msg(says(d, where), "%s: address not named", args);
    ck_assert_msg(why == NULL || daemon_saw(d, why), "%s: no '%s'", args, why);
}

START_TEST(address_in_use)
{
    char where[TEXT_LEN], args[2 * TEXT_LEN], path[PATH_LEN];
    int fd = listen_any(where);

    text_format(args, sizeof(args), "-c " CHANNEL " -o http:%s", where);
    expect_taken(args, where, IN_USE);
    text_format(args, sizeof(args), "-c tcp-listen:%s", where);
    expect_taken(args, where, IN_USE);
    close(fd);

    file_path(path, "live");
    fd = listen_on(path, 5);
    text_format(args, sizeof(args), "-c " CHANNEL " -o http:%s:-", path);
    expect_taken(args, path, IN_USE);
    text_format(args, sizeof(args), "-c unix-listen:%s:-", path);
    expect_taken(args, path, IN_USE);
    set_nonblocking(fd);
    ck_assert_msg(accept(fd, NULL, NULL) < 0 && errno == EAGAIN,
                  "who listens at %s got a connection", path);
    close(dial(path, true));            /* it is still there */
    close(fd);
}
END_TEST

static const char *const listens[][2] = {
    { "-c " CHANNEL " -o http:", ":-" }, { "-c unix-listen:", ":-" },
    { "-m ", "" },
};

/* A socket that is bound, and doesn't listen yet, is no stale one. */
START_TEST(address_bound)
{
    char path[PATH_LEN], args[2 * TEXT_LEN];
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    file_path(path, "bound");
    text_format(un.sun_path, sizeof(un.sun_path), "%s", path);
    ck_assert(bind(fd, (struct sockaddr *)&un, sizeof(un)) == 0);
    text_format(args, sizeof(args), "%s%s%s", listens[_i][0], path,
                listens[_i][1]);
    expect_taken(args, path, IN_USE);
    ck_assert(access(path, F_OK) == 0);
    close(fd);
}
END_TEST

/*
 * Of two that start over one stale socket, the second one looks at it only
 * once the first one has removed it.
 */
START_TEST(stale_twice)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    int lock = open(vp_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int stale = socket(AF_UNIX, SOCK_STREAM, 0), fd;
    char path[PATH_LEN];
    Daemon *d;

    file_path(path, "stale");
    text_format(un.sun_path, sizeof(un.sun_path), "%s", path);
    ck_assert(bind(stale, (struct sockaddr *)&un, sizeof(un)) == 0);
    close(stale);
    ck_assert(flock(lock, LOCK_EX) == 0);
    d = daemon_start("second", "-m %s", path);
    sleep_ms(200);
    ck_assert(unlink(path) == 0);
    fd = listen_on(path, 5);
    close(lock);
    ck_assert_int_eq(daemon_exit(d), 1);
    ck_assert(daemon_saw(d, IN_USE));
    close(dial(path, true));
    close(fd);
}
END_TEST

START_TEST(address_not_here)
{
    /* 192.0.2.1 is for documentation: no machine has it; nothing is sent */
    Daemon *d = daemon_start("later", "-c " CHANNEL " -o http:192.0.2.1:8080 "
                             "-o plain:127.0.0.1:0");

    daemon_listens(d, "plain");
    ck_assert(daemon_saw(d, "oforward http:192.0.2.1:8080: cannot listen on "
                         "192.0.2.1:8080: " NOT_HERE ": trying again"));
    daemon_stop(d);
    expect_taken("-c " CHANNEL " -o http:/nonexistent/dir/socket:-",
                 "/nonexistent/dir/socket", "No such file");
    expect_taken("-c unix-listen:/nonexistent/dir/socket:-",
                 "/nonexistent/dir/socket", "No such file");
}
END_TEST

/* What is in the way but is no socket is not ours to remove. */
START_TEST(not_a_socket)
{
    char path[PATH_LEN], args[2 * TEXT_LEN];
    struct stat st;

    file_path(path, "file");
    file_write(path, "mine", 4);
    text_format(args, sizeof(args), "-c " CHANNEL " -o http:%s:-", path);
    expect_taken(args, path, NULL);
    text_format(args, sizeof(args), "-c unix-listen:%s:-", path);
    expect_taken(args, path, NULL);
    ck_assert(stat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == 4);

    file_path(path, "dir");
    ck_assert(mkdir(path, 0700) == 0);
    text_format(args, sizeof(args), "-c " CHANNEL " -o http:%s:-", path);
    expect_taken(args, path, NULL);
    text_format(args, sizeof(args), "-c unix-listen:%s:-", path);
    expect_taken(args, path, NULL);
    ck_assert(stat(path, &st) == 0 && S_ISDIR(st.st_mode));
}
END_TEST

/* One listener that can't be bound: the others leave nothing behind. */
START_TEST(nothing_left)
{
    char where[TEXT_LEN], path[PATH_LEN], args[3 * TEXT_LEN];
    int fd = listen_any(where);

    file_path(path, "socket");
    text_format(args, sizeof(args), "-c " CHANNEL " -o a:%s:- -o b:%s", path,
                where);
    expect_taken(args, where, IN_USE);
    ck_assert_msg(access(path, F_OK) < 0, "%s was left", path);
    close(fd);
}
END_TEST

/* A descriptor that isn't open, or is no channel, is named. */
START_TEST(bad_descriptor)
{
    char option[32];
    Daemon *d = daemon_start("fd", "-c fd:777:-");
    StartOptions o = { 0 };

    ck_assert_int_ne(daemon_exit(d), 0);
    ck_assert(says(d, "777"));
    ck_assert(says(d, "not open"));
    d = daemon_start("fd", "-c fd:1024:-");
    ck_assert_int_ne(daemon_exit(d), 0);
    ck_assert(says(d, "below 1024"));

    o.keep_fd = open("/etc/passwd", O_RDONLY | O_CLOEXEC);
    text_format(option, sizeof(option), "fd:%d:-", o.keep_fd);
    d = daemon_start_with(&o, "fd", "-c %s", option);
    ck_assert_int_ne(daemon_exit(d), 0);
    ck_assert(says(d, option));
    close(o.keep_fd);
}
END_TEST

/* One that is of no use can't be opened again: it ends the daemon at once. */
START_TEST(dead_descriptor)
{
    StartOptions o = { 0 };
    int pair[2];
    Daemon *d;

    if (_i) {
        o.keep_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    } else {
        ck_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        close(pair[1]);
        o.keep_fd = pair[0];
    }
    d = daemon_start_with(&o, "fd", "-c fd:%d:- -o s:127.0.0.1:0", o.keep_fd);
    ck_assert_int_ne(daemon_exit(d), 0);
    ck_assert(daemon_saw(d, _i ? "descriptor [0-9]+: it is not open for "
                         "reading and writing" : "descriptor"));
    close(o.keep_fd);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("usage");

    SUITE_ROWS(s, bad_option, bad_options);
    SUITE_ROWS(s, bad_line, bad_lines);
    SUITE_ROWS(s, good_forward, good_forwards);
    SUITE_ROWS(s, good_channel, good_channels);
    SUITE_ADD(s, longest_path);
    SUITE_LOOP(s, help, 2);
    SUITE_LOOP(s, version, 2);
    SUITE_ADD(s, address_in_use);
    SUITE_ROWS(s, address_bound, listens);
    SUITE_ADD(s, stale_twice);
    SUITE_ADD(s, address_not_here);
    SUITE_ADD(s, not_a_socket);
    SUITE_ADD(s, nothing_left);
    SUITE_ADD(s, bad_descriptor);
    SUITE_LOOP(s, dead_descriptor, 2);
    return harness_run(s);
}
