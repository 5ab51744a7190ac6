#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# check.sh - run libcheck programs and sum up: one after the other, but for
# simulations
#
# Usage: tests/check.sh PROGRAM...    (make check names them all)
#
# PROGRAM is build/tests/DIR/test_NAME, made from tests/DIR/test_NAME.c and the
# sources in DIR that aren't programs. It fails if it says so, hangs, or closes
# without "100%"; and so does the run if a START_TEST of those sources is not in
# a program's TAP log, that is, never ran. What a program says goes to
# PROGRAM.log and is shown if it failed. libcheck's closing lines come last.
#
# CHECK_TIMEOUT: seconds a program may take (1200)
# CK_RUN_CASE, CK_RUN_SUITE and libcheck's other variables do what they do
# everywhere.

cd "${VP_TOP:-$(dirname "$0")/..}" || exit 1
VP_TOP=$PWD
QEMU_VP=${QEMU_VP:-$PWD/qemu-vp}
UBSAN_OPTIONS=${UBSAN_OPTIONS-print_stacktrace=1}
export VP_TOP QEMU_VP UBSAN_OPTIONS
failed=0

fail() { printf '%s\n' "$*"; failed=1; }

# closing() - libcheck's closing line in the log of program $1
closing() { grep -Eo '[0-9]+%: Checks: .*' "$1.log" | tail -n 1; }

# never_ran() - the START_TESTs of source $1 that TAP logs $2... don't have
never_ran() {
    source=$1
    shift
    sed -n 's/^START_TEST *( *\([A-Za-z0-9_]*\).*/\1/p' "$source" |
    while read -r name; do
        grep -qs ":$name: " "$@" || printf ' %s' "$name"
    done
}

# run() - program $1, and say how it went
run() {
    start=$(date +%s)
    CK_TAP_LOG_FILE_NAME=$1.tap \
        timeout -k 10 "${CHECK_TIMEOUT:-1200}" "$1" >"$1.log" 2>&1
    status=$?
    seconds=$(($(date +%s) - start))
    case $status,$(closing "$1") in
    0,100%:*)
        echo "${1#build/}: ok, $seconds s" ;;
    *)
        echo "${1#build/}: FAILED, $seconds s, exit status $status"
        cat "$1.log"
        return 1 ;;
    esac
}

# reap() - wait for those that run side by side
reap() {
    for pid in $aside; do
        wait "$pid" || failed=1
    done
    aside=
}

rm -f build/tests/*/*.tap
aside=
for prog; do
    case $prog in
    */tests/chaos/*)
        # a world of their own, with its own time: nothing disturbs them
        run "$prog" &
        aside="$aside $!" ;;
    *)
        reap
        run "$prog" || failed=1 ;;
    esac
done
reap

if [ -z "$CK_RUN_CASE$CK_RUN_SUITE$CK_INCLUDE_TAGS$CK_EXCLUDE_TAGS" ]; then
    for dir in $(for prog; do dirname "$prog"; done | sort -u); do
        for source in "${dir#build/}"/*.c; do
            case $source in
            */test_*) logs=build/${source%.c}.tap ;;
            *) logs="$dir/*.tap" ;;
            esac
            # shellcheck disable=SC2086 # a pattern
            lost=$(never_ran "$source" $logs)
            [ -z "$lost" ] || fail "$source: never ran:$lost"
        done
    done
else
    echo 'Only some checks were chosen.'
fi

[ $# -gt 0 ] || fail 'There is nothing to run.'
for prog; do
    printf '%s\n' "${prog#build/}"
    closing "$prog"
done
exit $failed
