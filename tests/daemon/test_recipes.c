/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_recipes.c - the README's recipes, each as it stands there
 *
 * recipes.sh says how.  A recipe for a program that this machine doesn't have,
 * an init for example, is passed over, and named.
 */
#define _XOPEN_SOURCE 700

#include <stdlib.h>
#include <string.h>

#include "tests/lib/harness.h"

static const char *const recipes[] = {
    "install", "install_services", "manual", "commands", "virtio", "serial",
    "fifos", "reconnect", "descriptor", "ssh", "ssh_dial", "apt", "guest_agent",
    "syslog", "nginx", "haproxy", "libvirt", "systemd", "systemd_socket",
    "systemd_guest", "udev", "sysv", "sysv_busybox", "openrc", "busybox",
    "logrotate", "wait",
};

START_TEST(recipe)
{
    const char *top = getenv("VP_TOP");
    char path[PATH_LEN], line[TEXT_LEN];
    FILE *f;

    command_wait(command_start(recipes[_i], "exec '%s/tests/daemon/recipes.sh' "
                               "%s %s/world", top ? top : ".", recipes[_i],
                               vp_dir));
    text_format(line, sizeof(line), "%s.log", recipes[_i]);
    file_path(path, line);
    f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof(line), f) != NULL) {
        if (strncmp(line, "passed over: ", strlen("passed over: ")) == 0) {
            fputs(line, stderr);
        }
    }
    fclose(f);
}
END_TEST

int main(void)
{
    Suite *s = harness_suite("recipes");

    SUITE_ROWS(s, recipe, recipes);
    return harness_run(s);
}
