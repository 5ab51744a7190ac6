#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# elsewhere.sh - guests of other processors, and the QEMU of other Debians
#
# Usage: tests/guest/elsewhere.sh [JOB]...     (make check-machines does them all)
#
#   aarch64  a guest with virtio-mmio and a PL011
#   s390x    a big-endian guest with virtio-ccw
#   trixie   Debian 13, in a root directory of its own: its QEMU, its guest
#   sid      Debian's unstable, likewise
#   systemd  a Debian 13 that boots with it, and both units (systemd.sh)
#
# The example of the README, a daemon and QEMU that end and come back, and a
# migration; in Debian 13 libvirt as well.
# The first two take what run.sh takes, with GUEST_MACHINE; the others root, and
# mmdebstrap. APT=1 lets apt-get download and install, as in image.sh.

set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=(aarch64 s390x trixie sid systemd)
scenarios=(rfc-virtio reconnect-virtio migration-virtio)
packages=qemu-system-x86,qemu-utils,openssh-client,rsync,wget,gcc,libc6-dev,make
packages=$packages,xz-utils,zstd
missed=

step() { printf '\n=== %s\n' "$*"; }

# debian() - the scenarios, and $3..., in release $1 of Debian with packages $2
#
# It isn't our fault if unstable can't be installed just now: that is named. What
# the guests leave is in the directory for temporary files, of here as of there.
debian() {
    local new release=$1 include=$2
    shift 2
    command -v mmdebstrap >/dev/null || {
        echo "elsewhere.sh: needs mmdebstrap (Debian's name)" >&2
        return 1
    }
    [ "${APT-}" = 1 ] || {
        echo "elsewhere.sh: APT=1 lets it download Debian $release" >&2
        return 1
    }
    new=$(mktemp -d "${TMPDIR:-/tmp}/vp-$release.XXXXXX")
    # shellcheck disable=SC2064 # the directory as it is now
    trap "rm -rf --one-file-system '$new'" EXIT
    # A mirror may lag behind; that is no reason to go without.
    # What is mounted for that goes with it, however it ends.
    if ! unshare -m mmdebstrap --quiet --variant=minbase --include="$include" \
        --aptopt='Acquire::Check-Valid-Until "false"' "$release" \
        "$new/root"; then
        [ "$release" = sid ] || {
            echo "elsewhere.sh: cannot install Debian $release" >&2
            return 1
        }
        missed="$missed $release"
    else
        copy "$new/root/src"
        # what is mounted goes with the last process in there
        # shellcheck disable=SC2016 # for the other shell
        unshare -m --propagation private bash -e -c '
            mount --bind "$1" "$1"
            mount -t proc proc "$1/proc"
            mount --rbind /dev "$1/dev"
            mount --rbind /sys "$1/sys"
            mount --bind "${TMPDIR:-/tmp}" "$1/tmp"
            exec chroot "$1" env APT=1 TMPDIR=/tmp /src/tests/guest/run.sh \
                "${@:2}"' - "$new/root" "${scenarios[@]}" "$@"
    fi
    rm -rf --one-file-system "$new"
}

# copy() - this tree, without what was built, to directory $1
copy() {
    mkdir "$1"
    tar --exclude=./build --exclude=./qemu-vp --exclude=./config.mak \
        --exclude=./tests/guest/cache --exclude=./.git -c . | tar -C "$1" -x
}

[ $# -gt 0 ] || set -- "${jobs[@]}"
for job; do
    step "$job"
    case $job in
    aarch64) GUEST_MACHINE=$job tests/guest/run.sh rfc-isa "${scenarios[@]}" ;;
    # After a migration this guest answers nobody, by no port: QEMU 7.2's fault.
    s390x) GUEST_MACHINE=$job tests/guest/run.sh "${scenarios[@]:0:2}" ;;
    trixie) debian trixie \
        "$packages,libvirt-daemon-system,libvirt-clients,systemd,nftables" \
        libvirt-virtio ;;
    sid) debian sid "$packages" ;;
    systemd) tests/guest/systemd.sh ;;
    *) echo "elsewhere.sh: there is no job '$job', but ${jobs[*]}" >&2; exit 2 ;;
    esac
done
step "passed: $*${missed:+, but these could not be downloaded:$missed}"
