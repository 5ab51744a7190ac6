#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# instructions.sh - what the daemons' work costs in instructions
#
# Times differ from run to run and from machine to machine; instructions, as
# counted by callgrind, hardly do.  So a slow-down shows here that a noisy
# machine hides.  Each figure is the difference of a run of 2 n and one of n,
# divided by n: what starting up costs is in both and falls out.  How work falls
# into passes of the loop depends on who runs when.  On one processor each runs
# until it waits, so chance has little say (1 % for a connection, which takes
# 9,100 to 10,700 on two), and the median of three has less.
#
#   trip   64 bytes there and back: two packets through each daemon
#   conn   a connection made, 64 bytes there and back, closed
#   mib    a MiB of a bulk stream, from near to far; most of it is the check
#          of payloads, and takes three fifths as many with AVX2
#
# The figures are compared with those in instructions.txt: exit status 1 if
# one is more than 10 % above.  UPDATE=1 writes them there instead.
set -u

here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"
command -v valgrind >/dev/null ||
    { say 'needs valgrind (apt-get install valgrind)'; exit 1; }
cpu=$(taskset -cp $$ | sed 's/.*: //; s/[^0-9].*//')
taskset -cp "$cpu" $$ >/dev/null || exit 1
recorded=$here/instructions.txt
slower=0
mib=mib
grep -qw avx2 /proc/cpuinfo || mib=mib_without_avx2

# count KIND N: set near and far to the instructions of a run of N
count()
{
    local args side

    start_server || exit 1
    for side in far near; do
        set -- "$1" "$2" valgrind --tool=callgrind "--log-file=$tmp/$side" \
            "--callgrind-out-file=$tmp/out"
        case $side in
        far) start_far "${@:3}" ;;
        near) start_near "$tmp/channel" "${@:3}" || exit 1 ;;
        esac
    done
    case $1 in
    trip) args="run -s $server -r -n $2" ;;
    conn) args="conn -c 1 -n $2" ;;
    mib*) args="run -s $server -b up:1 -B $(($2 << 20))" ;;
    esac
    # shellcheck disable=SC2086 # arguments are many words
    timeout 120 "$tmp/load" $args -t "$entry" >/dev/null || exit 1
    stop_all
    near=$(sed -n 's/.*Collected : //p' "$tmp/near")
    far=$(sed -n 's/.*Collected : //p' "$tmp/far")
}

# compare NAME COUNT: against the recorded one
compare()
{
    awk -v name="$1" -v new="$2" '
        $1 == name { old = $2 }
        END {
            if (!old) {
                note = "not recorded"
            } else if (new > 1.1 * old) {
                note = "SLOWER"
            } else if (new < 0.9 * old) {
                note = "faster: record it with UPDATE=1"
            }
            printf "%-22s%9d%12s %s\n", name, new,
                old ? sprintf("%+.1f %%", 100 * (new / old - 1)) : "", note
            exit note == "SLOWER"
        }' "$recorded" || slower=1
}

build_load || exit 1
touch "$recorded"
if [ "${UPDATE:-}" ]; then
    echo "# instructions, see instructions.sh; $(uname -m), $("${CC:-cc}" \
        --version | head -n 1)" >"$tmp/new"
fi
for kind in trip:1000 conn:500 "$mib:32"; do
    n=${kind#*:} kind=${kind%:*}
    nears=() fars=()
    for _ in 1 2 3; do
        count "$kind" "$n"
        first_near=$near first_far=$far
        count "$kind" $((2 * n))
        nears+=($(((near - first_near) / n)))
        fars+=($(((far - first_far) / n)))
    done
    for figure in "near $(median "${nears[@]}")" "far $(median "${fars[@]}")"
    do
        if [ "${UPDATE:-}" ]; then
            echo "${kind}_$figure" | tee -a "$tmp/new"
        else
            compare "${kind}_${figure% *}" "${figure#* }"
        fi
    done
done
if [ "${UPDATE:-}" ]; then
    case $mib in
    mib) grep '^mib_without' "$recorded" ;;
    *) grep '^mib_[nf]' "$recorded" ;;
    esac >>"$tmp/new"
    mv "$tmp/new" "$recorded"
fi
exit $slower
