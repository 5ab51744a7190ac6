/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * posix.h - take away what the system's headers have beyond POSIX
 *
 * tests/cross/run.sh has it included before all else where it builds the
 * program, so that this shows to do without.  There -U_DEFAULT_SOURCE and
 * -D_POSIX_C_SOURCE=200809L take away functions, and the rates of serial lines.
 * The macros that are left are undefined here, after the headers that have
 * them, which are not read twice.
 */
#ifndef POSIX_H
#define POSIX_H

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <syslog.h>
#include <termios.h>

#undef CRTSCTS
#undef IPV6_V6ONLY
#undef LOCK_EX
#undef TCP_CONGESTION
#undef TCP_KEEPCNT
#undef TCP_KEEPIDLE
#undef TCP_KEEPINTVL
#undef TIOCEXCL
#undef TIOCNXCL
#undef TIOCOUTQ
#undef _PATH_LOG

#endif
