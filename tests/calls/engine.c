/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * engine.c - the engine as it is; test_calls.c has the program
 */
#include "virtproxy.c"
