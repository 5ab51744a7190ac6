/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * test_replay.c - what the fuzzers found, once more
 *
 * corpus/TARGET has a few inputs that together reach most of the code, and
 * crashes/TARGET every input that ever found something wrong.  A target ends
 * the process where something is wrong; the name of the input it had comes
 * first.
 */
#include <dirent.h>
#include <stdio.h>
#include <string.h>

#include "tests/lib/suite.h"
#include "fuzz.h"

#define INPUT_MAX 65536

static const char *const target_names[] = { "packet", "engine", "text" };

static void replay_file(FuzzTarget *target, const char *path)
{
    static uint8_t data[INPUT_MAX];
    FILE *f = fopen(path, "rb");
    size_t len;

    ck_assert_msg(f != NULL, "cannot open %s", path);
    len = fread(data, 1, sizeof(data), f);
    fclose(f);
    printf("%s\n", path);
    fflush(stdout);
    target(data, len);
}

/* replay_dir() - every file in it; returns their number */
static int replay_dir(const char *dir, const char *name)
{
    const char *top = getenv("VP_TOP");
    char path[1024], file[2048];
    struct dirent *e;
    DIR *d;
    int n = 0;

    snprintf(path, sizeof(path), "%s/tests/fuzz/%s/%s",
             top != NULL ? top : ".", dir, name);
    d = opendir(path);
    while (d != NULL && (e = readdir(d)) != NULL) {
        if (e->d_name[0] != '.') {
            snprintf(file, sizeof(file), "%s/%s", path, e->d_name);
            replay_file(fuzz_target(name), file);
            n++;
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    return n;
}

START_TEST(replay)
{
    replay_file(fuzz_target(target_names[_i]), "/dev/null"); /* empty */
    ck_assert_int_gt(replay_dir("corpus", target_names[_i]), 10);
    replay_dir("crashes", target_names[_i]);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("replay");

    suite_set(300, NULL, NULL);
    SUITE_ROWS(s, replay, target_names);
    return suite_run(s);
}
