/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * hello.h - first words of a peer that is not ours
 *
 * The one thing here that needs to know the wire.
 */
#ifndef HELLO_H
#define HELLO_H

#include <stddef.h>

#define HELLO_ROOM 256

/*
 * hello_make() - a HELLO that checks
 *
 * @buf: HELLO_ROOM bytes
 * @newer: by how much its version is above ours
 *
 * Returns its length.
 */
size_t hello_make(unsigned char *buf, unsigned newer);

#endif
