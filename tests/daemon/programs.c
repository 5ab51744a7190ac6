/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * programs.c - see programs.h
 */
#define _XOPEN_SOURCE 700

#include <pwd.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "programs.h"

const char *program(const char *name)
{
    static const char *const dirs[] = { "/usr/sbin", "/usr/local/sbin",
                                        "/sbin" };
    static char result[TEXT_LEN];
    char path[8 * TEXT_LEN];
    char *save = NULL;

    text_format(path, sizeof(path), "%s", getenv("PATH"));
    for (char *dir = strtok_r(path, ":", &save); dir;
         dir = strtok_r(NULL, ":", &save)) {
        text_format(result, sizeof(result), "%s/%s", dir, name);
        if (access(result, X_OK) == 0) {
            return result;
        }
    }
    for (size_t i = 0; i < sizeof(dirs) / sizeof(dirs[0]); i++) {
        text_format(result, sizeof(result), "%s/%s", dirs[i], name);
        if (access(result, X_OK) == 0) {
            return result;
        }
    }
    return NULL;
}

bool has_ssh(void)
{
    return program("ssh") && program("ssh-keygen") && program("sftp") &&
           program("rsync") && program("sshd");
}

static void write_file(const char *name, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void write_file(const char *name, const char *fmt, ...)
{
    char path[PATH_LEN];
    va_list ap;
    FILE *f;

    file_path(path, name);
    f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    va_start(ap, fmt);
    vfprintf(f, fmt, ap);
    va_end(ap);
    ck_assert(fclose(f) == 0);
}

void sshd_start(char *where)
{
    const struct passwd *user = getpwuid(geteuid());
    int port = free_port();

    ck_assert_ptr_nonnull(user);
    command_wait(command_start("ssh-keygen",
        "cd %s && ssh-keygen -q -t ed25519 -N '' -f host_key && "
        "ssh-keygen -q -t ed25519 -N '' -f user_key && "
        "(printf 'vp-test '; cat host_key.pub) > known_hosts", vp_dir));
    write_file("sshd_config",
               "Port %d\nListenAddress 127.0.0.1\nHostKey %s/host_key\n"
               "AuthorizedKeysFile %s/user_key.pub\nPidFile none\n"
               "UsePAM no\nStrictModes no\nPasswordAuthentication no\n"
               "KbdInteractiveAuthentication no\n"
               "PermitRootLogin prohibit-password\nMaxStartups 50\n"
               "Subsystem sftp internal-sftp\n", port, vp_dir, vp_dir);
    write_file("ssh_config",
               "HostName 127.0.0.1\nUser %s\nIdentityFile %s/user_key\n"
               "IdentitiesOnly yes\n"
               "UserKnownHostsFile %s/known_hosts\nHostKeyAlias vp-test\n"
               "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
               "BatchMode yes\nControlPath none\n", user->pw_name, vp_dir,
               vp_dir);
    if (geteuid() == 0) {
        mkdir("/run/sshd", 0755);       /* where root's sshd locks itself in */
    }
    command_start("sshd", "exec %s -D -e -f %s/sshd_config",
                  program("sshd"), vp_dir);
    file_wait("sshd.log", "Server listening on 127.0.0.1");
    text_format(where, TEXT_LEN, "127.0.0.1:%d", port);
}
