/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * harness.c - the suites of tests/daemon have it: see tests/daemon/harness.h
 */
#include "tests/daemon/harness.c"
