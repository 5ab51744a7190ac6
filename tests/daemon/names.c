/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * names.c - see names.h
 */
#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "names.h"

/* name_reply() - A of "later" is 127.0.0.1, nothing else is known (RFC 1035) */
static size_t name_reply(unsigned char *msg, size_t len, size_t room)
{
    static const unsigned char answer[] = {
        0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1,
    };
    size_t end = 12;

    while (end < len && msg[end] != 0) {
        end += msg[end] + 1u;
    }
    end += 5;                   /* the name's end, its type and class */
    ck_assert(end <= len && end + sizeof(answer) <= room);
    msg[2] |= 0x80;             /* a response */
    memset(msg + 6, 0, 6);      /* with a question alone */
    if (memcmp(msg + 12, "\5later", 6) != 0) {
        msg[3] |= 3;            /* NXDOMAIN */
    } else if (msg[end - 3] == 1) {
        msg[7] = 1;
        memcpy(msg + end, answer, sizeof(answer));
        end += sizeof(answer);
    }
    return end;
}

pid_t names_answer(int server)
{
    pid_t pid = fork();

    ck_assert(pid >= 0);
    while (pid == 0) {
        struct sockaddr_in from;
        socklen_t size = sizeof(from);
        unsigned char msg[1024];
        ssize_t n = recvfrom(server, msg, sizeof(msg) / 2, 0,
                             (struct sockaddr *)&from, &size);

        if (n > 12) {
            sendto(server, msg, name_reply(msg, (size_t)n, sizeof(msg)), 0,
                   (struct sockaddr *)&from, size);
        }
    }
    child_add(pid);
    return pid;
}

void names_hang(pid_t pid)
{
    kill(pid, SIGKILL);
    child_wait(pid);
}

int names_server(void)
{
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(53) };
    int fd;

    if (!may_mount() || access("/etc/resolv.conf", F_OK) < 0) {
        return -1;
    }
    ck_assert(chdir(vp_dir) == 0);
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    in.sin_addr.s_addr = htonl(0x7f000000 + ((uint32_t)getpid() & 0xffff) + 2);
    if (bind(fd, (struct sockaddr *)&in, sizeof(in)) < 0) {
        ck_assert_msg(errno == EACCES, "port 53: %s", strerror(errno));
        close(fd);
        return -1;
    }
    dprintf(open("resolv", O_WRONLY | O_CREAT | O_CLOEXEC, 0644),
            "nameserver %s\n", inet_ntoa(in.sin_addr));
    return fd;
}

/* loopback_set() - false if we may not */
static bool loopback_set(bool up)
{
    struct ifreq lo = { .ifr_name = "lo", .ifr_flags = up ? IFF_UP : 0 };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool done = ioctl(fd, SIOCSIFFLAGS, &lo) == 0;

    close(fd);
    return done;
}

void own_network_set(bool up)
{
    ck_assert(loopback_set(up));
}

/* Some systems let anybody have namespaces, but give him no rights in them. */
bool own_network(void)
{
    uid_t uid = geteuid();
    ssize_t written;
    char map[64];
    int fd;

    if (unshare(CLONE_NEWNET | (uid != 0 ? CLONE_NEWUSER : 0)) < 0) {
        return false;
    }
    if (uid != 0) {
        text_format(map, sizeof(map), "0 %u 1", (unsigned)uid);
        fd = open("/proc/self/uid_map", O_WRONLY | O_CLOEXEC);
        written = write(fd, map, strlen(map));
        close(fd);
        if (written < 0) {
            return false;
        }
    }
    return loopback_set(true);
}
