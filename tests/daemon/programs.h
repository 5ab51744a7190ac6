/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * programs.h - other people's programs that talk through the daemons
 */
#ifndef PROGRAMS_H
#define PROGRAMS_H

#include "tests/lib/harness.h"

/* program() - where it is, or NULL */
const char *program(const char *name);

/* has_ssh() - are there ssh, sftp, rsync and an sshd? HAS_SSH names them */
bool has_ssh(void);
#define HAS_SSH "openssh-client, openssh-server and rsync"

/*
 * sshd_start() - a private sshd for whoever runs this test
 *
 * Its clients find all they need in the file ssh_config.  The host key goes by
 * a name of its own, since one key has two addresses here.
 *
 * @where: its address, TEXT_LEN bytes
 */
void sshd_start(char *where);

#endif
