#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# run.sh - how fast qemu-vp is, beside its peers, in one table
#
# Every measurement is made through each of these, in turn, for three rounds;
# the table has the medians, so a noisy moment spoils no line:
#
#   direct   the load generator's two ends, connected by loopback TCP
#   socat    a pair of `socat -b 262144`, a process per connection, over a unix
#            socket: the best plain relay; it multiplexes nothing
#   ssh -L   a multiplexer, if an sshd can be run here
#   yamux    another (yamux.go), for a stream each way, if it can be built here
#            (apt-get install golang-go golang-github-hashicorp-yamux-dev)
#   qemu-vp  near daemon - unix socket - far daemon
#
#   BENCH=quick       a short run: figures are rougher
#   BENCH_ONLY=NAME   one part: bulk both many trips conns idle stuck share
#                     lines growth writes checks instructions
#   QEMU_VP=PROGRAM   what to measure (default: the one built here); but for
#                     "checks", which builds its own two from the sources
#
# "down" is from far to near, as a download; "up" is the other way.  Figures of
# memory are of both daemons together.  The exit status tells whether all could
# be measured, and took no more instructions than recorded; whether each goal is
# met, the table tells.
set -u

here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"
parts="bulk both many trips conns idle stuck share lines growth writes checks \
instructions"
if [ "${BENCH:-}" = quick ]; then
    rounds=3 seconds=0.6 slow_seconds=10
else
    rounds=3 seconds=2 slow_seconds=30
fi

declare -A port pids value samples
met=0 missed=0 failed=0

# ---- the paths ------------------------------------------------------------

start_direct()
{
    port[direct]=$server pids[direct]=
}

start_socat()
{
    rm -f "$tmp/socat"
    background socat -b 262144 \
        "UNIX-LISTEN:$tmp/socat,fork,backlog=128" "TCP:127.0.0.1:$server"
    background socat -d -d -b 262144 \
        "TCP-LISTEN:0,bind=127.0.0.1,fork,backlog=128" \
        "UNIX-CONNECT:$tmp/socat"
    port[socat]=$(wait_for "$log" 'listening on .*:\([0-9]*\)') || return
    pids[socat]=${children[-1]},${children[-2]}
}

start_ssh()
{
    local p

    background "$sshd" -D -e -f "$tmp/sshd_config"
    wait_for "$log" '\(Server listening\)' >/dev/null || return
    p=$((20000 + RANDOM % 10000))
    background ssh -v -F none -N -i "$tmp/key" -p "$sshd_port" \
        -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o BatchMode=yes -o ExitOnForwardFailure=yes \
        -L "127.0.0.1:$p:127.0.0.1:$server" 127.0.0.1
    wait_for "$log" '\(Entering interactive session\)' >/dev/null || return
    port[ssh]=$p pids[ssh]=${children[-1]},${children[-2]}
}

start_yamux()
{
    rm -f "$tmp/stream"
    background "$tmp/yamux" far "$tmp/stream" "127.0.0.1:$server"
    while [ ! -S "$tmp/stream" ] && kill -0 "${children[-1]}" 2>/dev/null; do
        sleep 0.05
    done
    background "$tmp/yamux" near "$tmp/stream"
    port[yamux]=$(wait_for "$log" 'listening on .*:\([0-9]*\)') || return
    pids[yamux]=${children[-1]},${children[-2]}
}

# start_vp [RATE]: two daemons, over a line of so many bytes/s if given
start_vp()
{
    local path=$tmp/channel

    # shellcheck disable=SC2119 # no command, not this function's arguments
    start_far
    pids[vp]=${children[-1]}
    if [ "${1:-}" ]; then
        path=$tmp/line
        rm -f "$path"
        background "$tmp/line.run" "$1" "$path" "$tmp/channel"
        sleep 0.1
    fi
    start_near "$path" || return
    pids[vp]+=,${children[-1]} port[vp]=$entry
}

# start PATHS [RATE]: the server and those paths that can be had
start()
{
    local p

    start_server || exit 1
    paths=
    for p in $1; do
        case $p in
        socat) [ "$have_socat" ] || continue ;;
        ssh) [ "$sshd" ] || continue ;;
        yamux) [ -x "$tmp/yamux" ] || continue ;;
        esac
        if "start_$p" ${2:+"$2"}; then
            paths+=" $p"
        else
            failed=$((failed + 1))
        fi
    done
}

# Find out whether an sshd of our own can run; it needs a key and a port.
prepare_ssh()
{
    sshd='' sshd_port=$((30000 + RANDOM % 2000))
    if ! command -v sshd ssh ssh-keygen >/dev/null || [ ! -d /run/sshd ]; then
        return
    fi
    ssh-keygen -q -t ed25519 -N '' -f "$tmp/key" </dev/null || return
    cat >"$tmp/sshd_config" <<END
ListenAddress 127.0.0.1:$sshd_port
HostKey $tmp/key
PidFile none
AuthorizedKeysFile $tmp/key.pub
StrictModes no
UsePAM no
MaxSessions 100
END
    if "$(command -v sshd)" -t -f "$tmp/sshd_config" 2>/dev/null; then
        sshd=$(command -v sshd)
    fi
}

build_yamux()
{
    local src=/usr/share/gocode # where Debian's package puts it

    if command -v go >/dev/null && [ -d $src/src/github.com/hashicorp/yamux ]
    then
        GOPATH=$src GO111MODULE=off GOCACHE=$tmp/go \
            go build -o "$tmp/yamux" "$here/yamux.go"
    fi
}

# ---- measuring ------------------------------------------------------------

# measure NAME ARGUMENTS [NAME ARGUMENTS]...: run load with these through
# all started paths, in turn; medians go to value[NAME/PATH/KEY]
measure()
{
    local round p name args out word key all=("$@")

    samples=()
    for ((round = 0; round < rounds; round++)); do
        set -- "${all[@]}"
        while [ $# -gt 0 ]; do
            name=$1 args=$2
            shift 2
            for p in $paths; do
                # shellcheck disable=SC2086 # arguments are many words
                out=$(timeout 300 "$tmp/load" ${args/run/run -s $server} \
                    -t "${port[$p]}" ${pids[$p]:+-p "${pids[$p]}"} \
                    2>"$tmp/error") || {
                    say "$name through $p failed: $(cat "$tmp/error")"
                    failed=$((failed + 1))
                    continue
                }
                for word in $out; do
                    samples[$name/$p/${word%%=*}]+=" ${word#*=}"
                done
                sleep 0.05
            done
        done
    done
    for key in "${!samples[@]}"; do
        # shellcheck disable=SC2086 # one word for each figure
        value[$key]=$(median ${samples[$key]})
    done
}

# ratio A B: A/B, or - where one is missing
ratio()
{
    awk -v a="${1:--}" -v b="${2:--}" 'BEGIN {
        if (a == "-" || b == "-" || b + 0 == 0) print "-"
        else printf "%.2f\n", a / b }'
}

# short V: a figure in 3 digits, or as many as its whole part needs
short()
{
    awk -v v="${1:--}" 'BEGIN {
        if (v == "-") print "-"
        else if (v >= 100) printf "%.0f\n", v
        else if (v >= 10) printf "%.1f\n", v
        else if (v >= 0.1 || v == 0) printf "%.2f\n", v
        else printf "%.4f\n", v }'
}

title()
{
    printf '%-39s%9s%9s%9s%9s %7s %7s  %s\n' "$1" direct socat 'ssh -L' \
        qemu-vp /socat /direct goal
}

# row LABEL NAME KEY [RELATION FACTOR OF TEXT]: a line of the table.  The goal:
# qemu-vp's figure is in RELATION (ge, le) to FACTOR times value[OF], or to
# FACTOR itself if OF is '-'.
row()
{
    local v=${value[$2/vp/$3]:-} goal='' verdict=''

    if [ $# -gt 3 ]; then
        goal=$7
        if [ "$6" = - ]; then
            verdict=$(ratio "$v" "$5")
        elif [ "${value[$6]:-}" ]; then
            verdict=$(awk -v v="${v:--}" -v f="$5" -v o="${value[$6]}" \
                'BEGIN { print (v == "-" ? "-" : v / (f * o)) }')
        else
            verdict=-
        fi
        case $(awk -v r="$verdict" -v rel="$4" 'BEGIN {
            print (r == "-" ? "-" : rel == "ge" ? r >= 1 : r <= 1) }') in
        1) verdict=met met=$((met + 1)) ;;
        0) verdict=MISSED missed=$((missed + 1)) ;;
        *) verdict='not measured' ;;
        esac
    fi
    printf '%-39s%9s%9s%9s%9s %7s %7s  %s\n' "$1" \
        "$(short "${value[$2/direct/$3]:-}")" \
        "$(short "${value[$2/socat/$3]:-}")" \
        "$(short "${value[$2/ssh/$3]:-}")" "$(short "$v")" \
        "$(ratio "$v" "${value[$2/socat/$3]:-}")" \
        "$(ratio "$v" "${value[$2/direct/$3]:-}")" \
        "${goal:+$goal: $verdict}"
}

# ---- the parts ------------------------------------------------------------

run_args="run -T $seconds"

part_bulk()
{
    start 'direct socat ssh vp'
    measure down "$run_args -b down:1" up "$run_args -b up:1"
    row '1 bulk stream down, MB/s' down down ge 1.3 down/socat/down \
        '>= 1.3 x socat'
    row '1 bulk stream up, MB/s' up up ge 1.3 up/socat/up '>= 1.3 x socat'
    row 'CPU seconds per GB, down' down cpu_per_gb \
        le 0.75 down/socat/cpu_per_gb '<= 0.75 x socat'
    row 'CPU seconds per GB, up' up cpu_per_gb le 0.75 up/socat/cpu_per_gb \
        '<= 0.75 x socat'
}

part_both()
{
    build_yamux
    start 'direct socat ssh yamux vp'
    measure both "$run_args -b down:1 -b up:1"
    row '1 stream each way at once, MB/s' both total \
        ge 1.3 both/yamux/total '>= 1.3 x yamux'
    printf '%-39s%36s\n' '   yamux' "$(short "${value[both/yamux/total]:-}")"
}

part_many()
{
    start 'direct socat ssh vp'
    measure many "$run_args -b down:16" many_up "$run_args -b up:16"
    row '16 streams down, MB/s' many down ge 1.15 many/socat/down \
        '>= 1.15 x socat'
    row '   slowest/fastest' many down_fair ge 0.9 - '>= 0.9'
    row '16 streams up, MB/s' many_up up ge 1.15 many_up/socat/up \
        '>= 1.15 x socat'
    row '   slowest/fastest' many_up up_fair ge 0.9 - '>= 0.9'
}

part_trips()
{
    start 'direct socat ssh vp'
    measure trip "$run_args -r" trip1 "$run_args -r -b down:1" \
        trip8 "$run_args -r -b down:8"
    row 'round trip of 64 B, idle, us p50' trip p50 le 0.7 trip/socat/p50 \
        '<= 0.7 x socat'
    row '   p99' trip p99
    row 'the same beside 1 bulk, us p50' trip1 p50
    row '   p99' trip1 p99 le 0.5 trip1/socat/p99 '<= 0.5 x socat'
    row 'the same beside 8 bulk, us p50' trip8 p50
    row '   p99' trip8 p99 le 0.2 trip8/socat/p99 '<= 0.2 x socat'
    row '   MB/s of these 8' trip8 total
}

part_conns()
{
    start 'direct socat ssh vp'
    measure conns "conn -T $seconds -c 16"
    row 'connect+64 B+64 B+close, 16 at once, /s' conns rate \
        ge 0.35 conns/direct/rate '>= 0.35 x direct'
}

part_idle()
{
    start 'direct vp'
    measure none "$run_args -r" 1000 "$run_args -r -i 1000"
    row 'round trip beside 1,000 idle, us p50' 1000 p50 \
        le 1.15 none/vp/p50 '<= 1.15 x its own idle'
    row 'KiB with 1,000 idle connections' 1000 rss le 8192 - '<= 8 MiB'
    stop_all
    start 'direct vp'
    measure none "$run_args -r" bulk "$run_args -b down:1" \
        10000 "$run_args -r -i 10000" \
        bulk_10000 "$run_args -i 10000 -b down:1"
    row '10,000 idle connections held' 10000 idle ge 10000 - 'held'
    row '   round trip beside them, us p50' 10000 p50 \
        le 1.5 none/vp/p50 '<= 1.5 x its own idle'
    row '   p99' 10000 p99 le 1.5 none/vp/p99 '<= 1.5 x its own idle'
    row '   bulk beside them, MB/s' bulk_10000 down \
        ge 0.9 bulk/vp/down '>= 0.9 of alone'
    row '   CPU seconds per GB' bulk_10000 cpu_per_gb \
        le 1.15 bulk/vp/cpu_per_gb '<= 1.15 of alone'
    row '   KiB' 10000 rss
}

part_stuck()
{
    start 'direct socat vp'
    measure alone "$run_args -b down:1" stuck "$run_args -b down:1 -k 8"
    row 'download beside 8 stuck readers, MB/s' stuck down \
        ge 0.95 alone/vp/down '>= 0.95 of undisturbed'
    row '   KiB at the peak' stuck peak le 16384 - '<= 16 MiB'
}

part_share()
{
    start 'direct socat vp'
    measure join1 'run -T 5 -b down:1 -j 0.1' join8 'run -T 5 -b down:8 -j 0.1'
    row 'stream joins 1, seconds to its share' join1 joined le 1 - '<= 1 s'
    row 'stream joins 8, seconds to its share' join8 joined le 1 - '<= 1 s'
}

# on_line RATE NAME ARGUMENTS: measure with a line and daemons of their own,
# so that nothing of the measurement before is still on the line
on_line()
{
    start vp "$1"
    measure "$2$1" "run $3"
    stop_all
}

# line RATE NAME SECONDS LIMIT: what a line of RATE bytes/s does to typing.
# LIMIT is of the echo beside bulk, in us.
line()
{
    local least
    local long="-W 2 -T $3" rounds=1

    least=$(awk -v r="$1" 'BEGIN { print 0.85 * r / 1e6 }')
    on_line "$1" idle '-r -T 1'
    on_line "$1" echo "$long -r -b up:1"
    on_line "$1" two "$long -b up:2"
    on_line "$1" join '-W 2 -T 9 -b up:1 -j 0.5'
    on_line "$1" same "$long -r -b up:16"
    on_line "$1" typing "$long -r -b down:16"
    on_line "$1" against "$long -b down:16 -b up:1"
    row "$2: echo, idle, us p50" "idle$1" p50
    row '   beside bulk the same way, us p99' "echo$1" p99 le "$4" - \
        "<= $(($4 / 1000)) ms"
    row '   that bulk, MB/s' "echo$1" up ge "$least" - '>= 85 % of the line'
    row '   2 bulk, slowest/fastest' "two$1" up_fair ge 0.9 - '>= 0.9'
    row '   stream joins 1, s to its share' "join$1" joined le 1 - '<= 1 s'
    row '   beside 16 bulk the same way, us p50' "same$1" p50
    row '   p99' "same$1" p99
    row '   typing, one way, idle, us p50' "idle$1" up_p50
    row '   typing against 16 bulk, us p50' "typing$1" up_p50 \
        le 2 "idle$1/vp/up_p50" '<= 2 x idle'
    row '   bulk against 16 bulk, MB/s' "against$1" up ge "$least" - \
        '>= 85 % of the line'
}

part_lines()
{
    line 11520 '115200 baud' "$slow_seconds" 250000
    line 1000000 '1 MB/s' 5 40000
    line 100000000 '100 MB/s' 3 5000
}

part_growth()
{
    local n paths_of rounds=1

    for n in 1 10 100 1000 10000; do
        paths_of='direct socat vp'
        if [ $n -gt 100 ]; then     # a socat pair would need 2 n processes
            paths_of='direct vp'
        fi
        start "$paths_of"
        measure "idle_$n" "$run_args -r -i $n" \
            "idle_bulk_$n" "$run_args -i $n -b down:1" \
            "active_$n" "run -W 2 -T $seconds -b down:$n" \
            "active_trip_$n" "run -r -W 2 -T $seconds -b down:$n"
        stop_all
    done
    for n in 1 10 100 1000 10000; do
        row "$n active: MB/s" "active_$n" down
        row "   CPU seconds per GB" "active_$n" cpu_per_gb
        row "   KiB at the peak" "active_$n" peak
        row "   round trip beside them, us p50" "active_trip_$n" p50
        row "$n idle: round trip, us p50" "idle_$n" p50
        row "   KiB" "idle_$n" rss
        row "   bulk beside them, MB/s" "idle_bulk_$n" down
        row "   CPU seconds per GB" "idle_bulk_$n" cpu_per_gb
    done
}

part_writes()
{
    local size sizes='1 16 256 4096 65536 1048576' args=()

    start 'direct socat vp'
    for size in $sizes; do
        args+=("write_$size" "run -T $seconds -b up:1:$size"
            "write_trip_$size" "run -r -T $seconds -b up:1:$size")
    done
    measure "${args[@]}"
    for size in $sizes; do
        row "1 stream in writes of $size B, MB/s" "write_$size" up
        row "   CPU seconds per GB" "write_$size" cpu_per_gb
        row "   KiB at the peak" "write_$size" peak
        row "   round trip beside it, us p50" "write_trip_$size" p50
    done
}

# build_checks: the program as $tmp/with, and as $tmp/without a check of any
# payload, which is that of no bytes then
build_checks()
{
    local name top=$here/../..
    local begun='    uint64_t check = len;'

    cp "$top"/virtproxy.[ch] "$top/qemu-vp.c" "$tmp" &&
        mv "$tmp/virtproxy.c" "$tmp/with.c" &&
        sed "s/^$begun/    uint64_t check = len = 0;/" \
            "$tmp/with.c" >"$tmp/without.c" || return
    if [ "$(diff "$tmp/with.c" "$tmp/without.c" | grep -c '^>')" != 1 ]; then
        say 'virtproxy.c has other words now where it begins a check'
        return 1
    fi
    for name in with without; do
        "${CC:-cc}" -std=c11 -O2 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE \
            -D_FILE_OFFSET_BITS=64 -o "$tmp/$name" "$tmp/qemu-vp.c" \
            "$tmp/$name.c" || return
    done
}

# What the check of payloads costs: both programs in turn, many times, as the
# difference is small; the ratio is the median of each turn's
part_checks()
{
    local way name key vp rounds=11

    if ! build_checks; then
        failed=$((failed + 1))
        return
    fi
    start ''
    for name in with without; do
        vp=$tmp/$name
        if ! start_vp ''; then
            failed=$((failed + 1))
            return
        fi
        port[$name]=${port[vp]} pids[$name]=${pids[vp]}
    done
    paths='with without'
    measure checks_down "$run_args -b down:1" checks_up "$run_args -b up:1"
    for way in down up; do
        for key in $way cpu_per_gb; do
            for name in $paths; do
                value[$name/vp/$key]=${value[checks_$way/$name/$key]:-}
            done
        done
        # shellcheck disable=SC2046,SC2086 # one word for each round
        value[checks/vp/ratio]=$(median $(
            paste <(printf '%s\n' ${samples[checks_$way/with/$way]:-}) \
                <(printf '%s\n' ${samples[checks_$way/without/$way]:-}) |
                awk '{ print $1 / $2 }'))
        row "1 bulk stream $way, MB/s" with $way
        row '   without checks of payloads' without $way
        row '   with/without' checks ratio ge 0.95 - '>= 0.95'
        row 'CPU seconds per GB' with cpu_per_gb
        row '   without checks of payloads' without cpu_per_gb
    done
}

# What doesn't differ from run to run: instructions, and how they compare with
# those recorded
part_instructions()
{
    if command -v valgrind >/dev/null; then
        "$here/instructions.sh" || failed=$((failed + 1))
    else
        say 'no valgrind to count instructions (apt-get install valgrind)'
    fi
}

# ---- all of it ------------------------------------------------------------

case " $parts " in
*" ${BENCH_ONLY:-bulk} "*) ;;
*)
    say "BENCH_ONLY=$BENCH_ONLY is none of: $parts"
    exit 2
    ;;
esac
build_load && "${CC:-cc}" -O2 -o "$tmp/line.run" "$here/line.c" || exit 1
ulimit -n 32768 2>/dev/null || ulimit -n "$(ulimit -Hn)"
have_socat=$(command -v socat)
if [ ! "$have_socat" ]; then
    say 'no socat to compare with (apt-get install socat)'
fi
prepare_ssh

title "$(uname -m), $(nproc) CPUs, load $(cut -d' ' -f1 /proc/loadavg)"
for part in ${BENCH_ONLY:-$parts}; do
    "part_$part"
    stop_all
done
printf '%s goals met, %s missed' "$met" "$missed"
[ "$failed" = 0 ] || printf ', %s runs failed' "$failed"
printf '\n'
[ "$failed" = 0 ]
