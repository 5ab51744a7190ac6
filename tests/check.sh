#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# check.sh - run libcheck programs side by side, and sum up
#
# Usage: tests/check.sh PROGRAM...    (make check names them all)
#        tests/check.sh --needs       name what isn't installed, and fail
#
# PROGRAM is build/tests/DIR/test_NAME, made from tests/DIR/test_NAME.c, the
# sources in DIR that aren't programs, and tests/lib. It fails if it says so,
# hangs, or closes without "100%"; and so does the run if a START_TEST of those
# sources is not in a program's TAP log, that is, never ran. A line tells how
# each program ended. What one says goes to PROGRAM.log and is shown if it
# failed. Last come what was passed over, as the machine doesn't allow it, what
# failed, each with the command that runs it alone, and libcheck's closing line
# for all programs.
#
# CHECK_JOBS: programs at a time; most wait more than they compute (twice as
# many as there are processors)
# CHECK_TIMEOUT: seconds a program may take (1200)
# CK_RUN_CASE, CK_RUN_SUITE and libcheck's other variables do what they do
# everywhere.

cd "${VP_TOP:-$(dirname "$0")/..}" || exit 1
VP_TOP=$PWD
QEMU_VP=${QEMU_VP:-$PWD/qemu-vp}
UBSAN_OPTIONS=${UBSAN_OPTIONS-print_stacktrace=1}
export VP_TOP QEMU_VP UBSAN_OPTIONS

# what the whole-daemon suites run, and Debian's package of each
programs='xargs:findutils socat:socat wget:wget curl:curl busybox:busybox
    pgrep:procps unshare:util-linux setpriv:util-linux'

# those that take longest, which are started first
slowest='chaos/test_offsets rogue/test_rogue daemon/test_life chaos/test_flow
    daemon/test_init daemon/test_connections daemon/test_outage
    daemon/test_monitor fuzz/test_failure chaos/test_chaos chaos/test_session
    chaos/test_line'

# needs() - name the packages that are missing, in one line
needs() {
    missing=
    for entry in $programs; do
        PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin \
            command -v "${entry%:*}" >/dev/null && continue
        case "$missing " in
        *" ${entry#*:} "*) ;;
        *) missing="$missing ${entry#*:}" ;;
        esac
    done
    [ -z "$missing" ] ||
        { echo "The tests need:$missing (Debian's names)." >&2; return 1; }
}

# in_order() - programs $@, one a line, the slowest first
in_order() {
    for name in $slowest; do
        for prog; do
            [ "$prog" != "build/tests/$name" ] || echo "$prog"
        done
    done
    for prog; do
        case "
$slowest
" in
        *[[:space:]]"${prog#build/tests/}"[[:space:]]*) ;;
        *) echo "$prog" ;;
        esac
    done
}

# numbers() - "CHECKS FAILURES ERRORS" of libcheck's closing line of program $1
numbers() {
    sed -n '/^[0-9]*%: Checks: /{s/^[0-9]*%//;s/[^0-9]*\([0-9]*\)/\1 /g;p;}' \
        "$1.log" | tail -n 1
}

# run() - program $1, and say how it went, in one piece
run() {
    prog=$1
    start=$(date +%s)
    rm -f "$prog.tap"
    CK_TAP_LOG_FILE_NAME=$prog.tap \
        timeout -k 10 "${CHECK_TIMEOUT:-1200}" "$prog" >"$prog.log" 2>&1 &
    trap 'kill $!; exit 1' HUP INT TERM
    wait $!
    status=$?
    # shellcheck disable=SC2046 # three numbers
    set -- $(numbers "$prog")
    took="$(($(date +%s) - start)) s"
    if [ $status = 0 ] && [ "${2-x}${3-x}" = 00 ]; then
        said="${prog#build/tests/}: $1 passed, $took"
    else
        echo "$status" >"$prog.failed"
        said="${prog#build/tests/}: FAILED, exit status $status, $took
$(cat "$prog.log")"
    fi
    printf '%s\n' "$said"
}

# never_ran() - the START_TESTs of source $1 that TAP logs $2... don't have
never_ran() {
    source=$1
    shift
    sed -n 's/^START_TEST *( *\([A-Za-z0-9_]*\).*/\1/p' "$source" |
    while read -r name; do
        grep -qs ":$name: " "$@" || printf ' %s' "$name"
    done
}

# all_ran() - say which tests of programs $@ did not
all_ran() {
    for prog; do
        source=${prog#build/}.c
        lost=$(never_ran "$source" "$prog.tap")
        [ -z "$lost" ] || echo "$source: never ran:$lost"
    done
    for dir in $(for prog; do dirname "$prog"; done | sort -u); do
        # what a directory's programs share, if all of them are here
        for source in "${dir#build/}"/test_*.c; do
            case " $* " in
            *" build/${source%.c} "*) ;;
            *) continue 2 ;;
            esac
        done
        for source in "${dir#build/}"/*.c; do
            case $source in */test_*) continue ;; esac
            lost=$(never_ran "$source" "$dir"/*.tap)
            [ -z "$lost" ] || echo "$source: never ran:$lost"
        done
    done
}

# failures() - of programs $@, each with the command that runs it alone
failures() {
    for prog; do
        [ -e "$prog.failed" ] || continue
        sed -n 's/^not ok [0-9]* - [^:]*:\([^:]*\):\([^:]*\): .*/\2 \1/p' \
            "$prog.tap" 2>/dev/null | sort | uniq -c |
        while read -r count name tcase; do
            echo "${prog#build/tests/} $name, $count:" \
                "CK_RUN_CASE='$tcase' tests/check.sh $prog"
        done
        grep -qs '^not ok' "$prog.tap" ||
            echo "${prog#build/tests/}, status $(cat "$prog.failed"):" \
                "tests/check.sh $prog"
    done
}

# total() - libcheck's closing line, for programs $@ together
total() {
    for prog; do numbers "$prog"; done | awk '
        { checks += $1; failures += $2; errors += $3 }
        END {
            passed = checks - failures - errors
            printf "%d%%: Checks: %d, Failures: %d, Errors: %d\n",
                checks ? 100 * passed / checks : 0, checks, failures, errors
        }'
}

case ${1-} in
--needs) needs; exit ;;
--run) run "$2"; exit ;;
'') echo 'There is nothing to run.'; exit 1 ;;
esac

case " $* " in */tests/daemon/*) needs || exit 1 ;; esac
for prog; do
    [ -x "$prog" ] || { echo "There is no $prog."; exit 1; }
    rm -f "$prog.failed" "$prog.log" "$prog.tap"
done
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
in_order "$@" | xargs -n 1 -P "${CHECK_JOBS:-$((2 * jobs))}" \
    tests/check.sh --run || exit 1

passed_over=$(for prog; do
    sed -n "s,^passed over: ,${prog#build/tests/} ,p" "$prog.log"
done | sort -u)
[ -z "$passed_over" ] || printf '\nPassed over, %d:\n%s\n' \
    "$(printf '%s\n' "$passed_over" | wc -l)" "$passed_over"
failed=$(failures "$@")
if [ -z "$CK_RUN_CASE$CK_RUN_SUITE$CK_INCLUDE_TAGS$CK_EXCLUDE_TAGS" ]; then
    lost=$(all_ran "$@")
else
    lost=
    echo 'Only some checks were chosen.'
fi
[ -z "$failed$lost" ] || printf '\nFAILED:\n%s\n' "$failed${lost:+
$lost}"
echo
total "$@"
[ -z "$failed$lost" ]
