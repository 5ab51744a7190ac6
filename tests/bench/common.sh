# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# common.sh - what the scripts here share: a directory and processes that end
# with the script, and a pair of daemons.  `here` is set by who sources it.

vp=${QEMU_VP:-$here/../../qemu-vp}
children=()
log=
tmp=${TMPDIR:-/tmp}
[ ${#tmp} -lt 60 ] || tmp=/tmp  # the path of a socket is short
tmp=$(mktemp -d "$tmp/vp-bench.XXXXXX") || exit 1

stop_all()
{
    if [ ${#children[@]} -gt 0 ]; then
        kill "${children[@]}"
        wait "${children[@]}"
    fi 2>/dev/null
    children=()
}
trap 'stop_all; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM HUP

say()
{
    echo "${0##*/}: $*" >&2
}

# median NUMBER...
median()
{
    printf '%s\n' "$@" | sort -g |
        awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

# background COMMAND...: run it until stop_all; what it says goes to $log
background()
{
    log=$tmp/log.${#children[@]}
    : >"$log"
    "$@" >"$log" 2>&1 &
    children+=($!)
}

# wait_for FILE PATTERN: print the part of FILE in the pattern's brackets
wait_for()
{
    local i found

    for ((i = 0; i < 200; i++)); do
        found=$(sed -n "s/.*$2.*/\1/p" "$1" | head -n 1)
        if [ "$found" ]; then
            echo "$found"
            return 0
        fi
        kill -0 "${children[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    say "no sign of a start: $(cat "$1")"
    return 1
}

build_load()
{
    "${CC:-cc}" -O2 -o "$tmp/load" "$here/load.c" -lpthread
}

start_server()
{
    background "$tmp/load" serve
    server=$(wait_for "$log" 'listening on .*:\([0-9]*\)')
}

# start_far [COMMAND...], start_near PATH [COMMAND...]: the daemons, run by
# COMMAND if given; the near one's port is $entry
start_far()
{
    rm -f "$tmp/channel"
    background "$@" "$vp" -c "unix-listen:$tmp/channel:-" \
        -i "bench:127.0.0.1:$server"
    while [ ! -S "$tmp/channel" ] && kill -0 "${children[-1]}" 2>/dev/null; do
        sleep 0.05
    done
}

# shellcheck disable=SC2034 # entry is for who sources this
start_near()
{
    local path=$1

    shift
    background "$@" "$vp" -c "unix-connect:$path:-" -o bench:127.0.0.1:0
    entry=$(wait_for "$log" 'listening on 127.0.0.1:\([0-9]*\)') &&
        wait_for "$log" '\(channel up\)' >/dev/null
}
