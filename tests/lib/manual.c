/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * manual.c - does the manual explain what a daemon logs?
 */
#include "tests/lib/manual.h"

#include <check.h>
#include <ctype.h>
#include <regex.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lib/harness.h"

#define MAX_TEXTS 256   /* log texts in the manual */
#define MAX_LINE  1024  /* bytes of a line that are looked at */
#define MAX_LINES 5000  /* lines of a log that are looked at: some are floods */
#define CUT_LEN   700   /* a text of more bytes may have been cut by the log */

static regex_t texts[MAX_TEXTS];
static size_t n_texts;

/* is_insert() - does a word of capitals, or a number N, begin at @p? */
static bool is_insert(const char *p)
{
    return (isupper((unsigned char)p[0]) && isupper((unsigned char)p[1])) ||
           (p[0] == 'N' && !isalnum((unsigned char)p[1]));
}

/* has_word() - has @text a word of the log's own, of four letters or more? */
static bool has_word(const char *text)
{
    int len = 0;

    for (; *text != '\0' && len < 4; text++) {
        len = islower((unsigned char)*text) ? len + 1 : 0;
    }
    return len == 4;
}

/* add_text() - a text of the manual becomes an expression */
static void add_text(const char *p)
{
    char expr[4 * MAX_LINE], *e = expr;

    ck_assert_msg(has_word(p), "README's DIAGNOSTICS matches all: %s", p);

    *e++ = '^';
    while (*p != '\0' && *p != '\n') {
        if (is_insert(p)) {
            e = stpcpy(e, ".*");
            while (isupper((unsigned char)*p) || *p == '_') {
                p++;
            }
        } else if (isalnum((unsigned char)*p) || *p == ' ') {
            *e++ = *p++;
        } else {
            *e++ = '[';
            *e++ = *p++;
            *e++ = ']';
        }
    }
    stpcpy(e, "$");
    ck_assert(n_texts < MAX_TEXTS);
    ck_assert_int_eq(regcomp(&texts[n_texts++], expr, REG_EXTENDED | REG_NOSUB),
                     0);
}

static void read_manual(void)
{
    const char *top = getenv("VP_TOP");
    char path[MAX_LINE], line[MAX_LINE];
    bool inside = false, steps = false;
    FILE *f;

    text_format(path, sizeof(path), "%s/README", top ? top : ".");
    f = fopen(path, "r");
    ck_assert_msg(f != NULL, "cannot read %s", path);
    while (fgets(line, sizeof(line), f)) {
        if (is_insert(line)) {
            inside = !strcmp(line, "DIAGNOSTICS\n");
        } else if (line[0] != ' ' || isdigit((unsigned char)line[1])) {
            steps = isdigit((unsigned char)line[line[0] == ' ']) ||
                    (steps && line[0] == '\n');
        } else if (inside && !steps && !strncmp(line, "    ", 4) && line[4] != ' ') {
            add_text(line + 4);
        }
    }
    fclose(f);
    ck_assert_msg(n_texts > 0, "README has no DIAGNOSTICS");
}

/* text_of() - the text of a line of the log; NULL if it needs no explanation */
static char *text_of(char *line)
{
    int day = 0, text = 0, channel = 0;
    char level[16];

    sscanf(line, "%*d-%*d-%*d %*d:%*d:%*f%n %15s %n", &day, level, &text);
    if (text == 0 || !strcmp(level, "debug") || !strcmp(level, "verbose")) {
        return NULL;
    }
    line += text;
    sscanf(line, "ch%*u: %n", &channel);
    line += channel;
    line[strcspn(line, "\n")] = '\0';
    return line;
}

static bool is_explained(const char *text)
{
    for (size_t i = 0; i < n_texts; i++) {
        if (regexec(&texts[i], text, 0, NULL, 0) == 0) {
            return true;
        }
    }
    return false;
}

void manual_check(const char *path)
{
    char line[MAX_LINE];
    FILE *f = fopen(path, "r");

    if (n_texts == 0) {
        read_manual();
    }
    for (int i = 0; f && i < MAX_LINES && fgets(line, sizeof(line), f); i++) {
        char *text = text_of(line);

        ck_assert_msg(!text || strlen(text) > CUT_LEN || is_explained(text),
                      "README's DIAGNOSTICS lacks: %s", text);
    }
    if (f) {
        fclose(f);
    }
}
