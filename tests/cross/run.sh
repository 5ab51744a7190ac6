#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# run.sh - other processors, other C libraries, and POSIX alone
#
# Usage: tests/cross/run.sh [JOB]...       (make check-cross does them all)
#        tests/cross/run.sh --needs        name Debian's packages for that
#
#   posix    the program without anything beyond POSIX, under suites of whole
#            daemons; and built without each of these things, one at a time
#   flags    what configure makes of flags that not every compiler goes with
#   musl     the program with musl, static, under the same suites; unit suites
#   i386     unit and daemon suites with 32 bits, and the year 2040
#   s390x    unit suites, big endian, under qemu-user
#   interop  programs of other machines, under qemu-user, as the guest's
#
# All is built in build/cross/JOB. libcheck for other machines, and its source
# for musl, is downloaded, and unpacked in build/cross; it is not installed.

set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD
cross=$top/build/cross
jobs=('posix' 'flags' 'musl' 'i386' 's390x' 'interop')
# of each machine: Debian's triplet, and qemu-user's name
machines=('aarch64-linux-gnu aarch64' 'arm-linux-gnueabihf arm'
    'riscv64-linux-gnu riscv64' 's390x-linux-gnu s390x')
packages='gcc make check musl-tools python3-minimal qemu-user-static dpkg-dev
    gcc-i686-linux-gnu libc6-dev-i386-cross
    gcc-s390x-linux-gnu libc6-dev-s390x-cross
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    gcc-arm-linux-gnueabihf libc6-dev-armhf-cross
    gcc-riscv64-linux-gnu libc6-dev-riscv64-cross'

step() { printf '\n=== %s\n' "$*"; }

# build() - configure in directory build/cross/$1 with options $2..., and make
build() {
    local dir=$cross/$1
    shift
    step "${dir##*/}: ./configure $*"
    mkdir -p "$dir"
    (cd "$dir" && "$top/configure" CFLAGS=-Werror "$@" && make qemu-vp)
}

unit=(tests/unit/test_*.c)
unit=("${unit[@]/#/build/}")
unit=("${unit[@]/%.c/}")

# natively() - this machine's suites $2... , with the program of build/cross/$1
natively() {
    local program=$cross/$1/qemu-vp
    shift
    make all "$@"
    QEMU_VP=$program tests/check.sh "$@"
}

# lists() - apt's lists in directory $1, of its own, with options $2...; sets apt
lists() {
    local dir=$1
    shift
    mkdir -p "$dir"/{lists,archives}/partial
    apt=(apt-get -q -o "Dir::State=$dir" -o "Dir::Cache=$dir"
        -o Dir::State::status=/dev/null -o APT::Sandbox::User=root "$@")
    # one of several sources may fail, and not be needed
    "${apt[@]}" update || :
}

# libcheck() - unpack architecture $1's libcheck, for triplet $2; sets options
libcheck() {
    local apt dir=$cross/libcheck-$1 package lib
    if [ ! -d "$dir/usr" ]; then
        lists "$dir" -o "APT::Architecture=$1" -o "APT::Architectures=$1"
        (cd "$dir" && "${apt[@]}" download check libsubunit-dev)
        for package in "$dir"/*.deb; do
            dpkg -x "$package" "$dir"
        done
    fi
    lib=$dir/usr/lib/$2
    options=("CHECK_CFLAGS=-I$dir/usr/include"
        "CHECK_LIBS=$lib/libcheck.a $lib/libsubunit.a -pthread -lrt -lm")
}

# libcheck_musl() - build libcheck from Debian's source; sets options
libcheck_musl() {
    local apt list dir=$cross/libcheck-musl
    if [ ! -d "$dir/usr" ]; then
        rm -rf "$dir"
        mkdir -p "$dir/sources"
        # what has packages has their source
        for list in /etc/apt/sources.list{,.d/*.list}; do
            [ ! -f "$list" ] || sed -n 's/^deb /deb-src /p' "$list"
        done >"$dir/sources/those.list"
        for list in /etc/apt/sources.list.d/*.sources; do
            [ ! -f "$list" ] || sed 's/^Types:.*/Types: deb-src/' "$list" \
                >"$dir/sources/${list##*/}"
        done
        lists "$dir" -o Dir::Etc::sourcelist=/dev/null \
            -o "Dir::Etc::sourceparts=$dir/sources"
        (cd "$dir" && "${apt[@]}" source check && cd check-*/ &&
            ./configure CC=musl-gcc --prefix="$dir/usr" --disable-shared \
                --disable-subunit && make -C lib && make -C src install &&
            cp check_stdint.h "$dir/usr/include")
    fi
    options=("CHECK_CFLAGS=-I$dir/usr/include"
        "CHECK_LIBS=$dir/usr/lib/libcheck.a")
}

# ---- jobs ------------------------------------------------------------------

quick=(build/tests/daemon/test_{usage,connections})

posix() {
    local flags='-U_DEFAULT_SOURCE -D_POSIX_C_SOURCE=200809L -U__linux__'
    local name source one=$cross/posix/one.h
    flags="$flags -UHAVE_CLOSEFROM -UHAVE_GETRANDOM -UHAVE_MALLOC_TRIM"
    flags="$flags -UHAVE_VSOCK"
    build posix CPPFLAGS="$flags -include tests/cross/posix.h"
    # not test_usage, which needs locks of folders in one of its tests
    natively posix build/tests/daemon/test_{connections,life}

    step 'a channel over vsock, and qemu-vp says that it has none'
    if "$cross/posix/qemu-vp" -c vsock-connect:1:5000 --dump-config \
        2>"$cross/posix/said"; then
        echo 'it takes the channel'
        return 1
    fi
    grep 'built without vsock' "$cross/posix/said"

    step without each of these things
    for name in $(sed -n 's/^#undef //p' tests/cross/posix.h) \
        HAVE_CLOSEFROM HAVE_GETRANDOM HAVE_INITGROUPS HAVE_MALLOC_TRIM \
        HAVE_VSOCK __linux__; do
        sed "/^#undef /{/ $name\$/!d}" tests/cross/posix.h >"$one"
        for source in virtproxy.c qemu-vp.c; do
            # a state of TCP in it has the name of one of the program's methods
            [ $source = virtproxy.c ] || sed -i /tcp.h/d "$one"
            (cd "$cross/posix" &&
                gcc -std=c11 -Wall -Wextra -Werror -D_DEFAULT_SOURCE \
                    -DHAVE_CLOSEFROM -DHAVE_GETRANDOM -DHAVE_INITGROUPS \
                    -DHAVE_MALLOC_TRIM -DHAVE_VSOCK -U"$name" -include one.h \
                    -fsyntax-only "$source")
        done
        echo "without $name: both sources are taken"
    done
}

flags() {
    build flags --host=i686-linux-gnu LDFLAGS=-static-pie \
        CPPFLAGS=-D_TIME_BITS=64
    step 'a program without an interpreter'
    if readelf -l "$cross/flags/qemu-vp" | grep INTERP; then return 1; fi
    step 'musl-gcc makes a dynamic program of -static-pie, and configure says so'
    if (cd "$cross/flags" && "$top/configure" CC=musl-gcc LDFLAGS=-static-pie \
        >said 2>&1); then
        return 1
    fi
    grep -A 1 'makes a dynamic program' "$cross/flags/said"
}

musl() {
    local options dir=$cross/musl
    libcheck_musl
    build musl CC=musl-gcc LDFLAGS=-static "${options[@]}"
    natively musl "${quick[@]}"
    (cd "$dir" && make "${unit[@]}" &&
        VP_TOP=$dir tests/check.sh "${unit[@]}")
}

i386() {
    local options dir=$cross/i386 daemon
    libcheck i386 i386-linux-gnu
    build i386 --host=i686-linux-gnu LDFLAGS=-static "${options[@]}"
    (cd "$dir" && make "${unit[@]}" &&
        VP_TOP=$dir tests/check.sh "${unit[@]}")
    natively i386 "${quick[@]}"

    step 'a file and a socket of 2040'
    echo 'a key of at least 16 bytes' >"$dir/key"
    chmod 600 "$dir/key"
    rm -f "$dir/socket" "$dir/log"
    python3 -c 'import socket, sys
socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$dir/socket"
    touch -d 2040-01-01 "$dir/key" "$dir/socket"
    (cd "$dir" && exec ./qemu-vp -c unix-listen:socket:- -k key -f pid \
        -l log) &
    daemon=$!
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        grep -q 'listening on socket' "$dir/log" 2>/dev/null && break
        sleep 0.5
    done
    kill "$daemon"
    wait "$daemon"
    grep -H 'listening on socket' "$dir/log"
}

s390x() {
    local options dir=$cross/s390x suite failed=
    libcheck s390x s390x-linux-gnu
    build s390x --host=s390x-linux-gnu LDFLAGS=-static "${options[@]}"
    (cd "$dir" && make "${unit[@]}")
    for suite in "${unit[@]}"; do
        step "$suite"
        (cd "$dir" && CK_TIMEOUT_MULTIPLIER=10 VP_TOP=$dir \
            qemu-s390x-static "$suite") 2>&1 | tee "$dir/$suite.log" ||
            failed="$failed $dir/$suite.log"
    done
    if [ -n "$failed" ]; then
        # shellcheck disable=SC2086 # a list
        grep ':[EF]:' $failed || :
        echo "failed:$failed"
        return 1
    fi
}

interop() {
    local machine triplet processor dir
    make all build/tests/daemon/test_connections
    for machine in "${machines[@]}"; do
        read -r triplet processor <<<"$machine"
        dir=$cross/$triplet
        build "$triplet" --host="$triplet" LDFLAGS=-static
        printf '#!/bin/sh\n: >%q\nexec qemu-%s-static %q "$@"\n' \
            "$dir/used" "$processor" "$dir/qemu-vp" >"$dir/guest"
        chmod 755 "$dir/guest"
        rm -f "$dir/used"
        QEMU_VP_GUEST=$dir/guest CK_RUN_CASE=interop \
            tests/check.sh build/tests/daemon/test_connections
        [ -e "$dir/used" ] || { echo "$dir/guest was not used"; return 1; }
    done
}

# ---- all of it -------------------------------------------------------------

if [ "${1-}" = --needs ]; then
    # shellcheck disable=SC2086 # one line of them
    echo $packages
    exit
fi
[ $# -gt 0 ] || set -- "${jobs[@]}"
for job; do
    case " ${jobs[*]} " in
    *" $job "*) "$job" ;;
    *) echo "run.sh: there is no job '$job', but ${jobs[*]}" >&2; exit 2 ;;
    esac
done
step "passed: $*"
