/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vp_log.c - what the engine calls; see log.h
 */
#include "log.h"

void vp_log(VPLogLevel level, int channel, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    log_add(level, channel, fmt, ap);
    va_end(ap);
}
