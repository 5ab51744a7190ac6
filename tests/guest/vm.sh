# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# vm.sh - one guest, the two daemons and what runs beside them (sourced)
#
# A guest has both kinds of channel, a port for commands (probe's agent), one
# terminal for its daemon's log and the console. Everything of one scenario
# is in the directory $D; $vm is where the sockets of the QEMU are that has
# the guest just now. Whatever is started here is ended by end_all.

declare -A pids

# Where the guest's own names for the two ports are. What is called isa is the
# machine's own kind of serial line, if it has one for us.
declare -A device=([virtio]=/dev/virtio-ports/virtio [isa]=/dev/ttyS1)
[ "$machine" != aarch64 ] || device[isa]=/dev/ttyAMA0

fail() {
    echo "$*" >&2
    exit 1
}

# pass_over() - end a scenario that this machine can't have, for want of $*
pass_over() {
    echo "needs $*" >&2
    exit 77
}

# recipe() - the README's indented lines after one that begins with $1
recipe() {
    awk -v head="$1" '
        !found { found = index($0, head) == 1; next }
        /^    / { print substr($0, 5); seen = 1 }
        /^ ? ?[^ ]/ && seen { exit }
    ' "$top/README"
}

# note() - a line for the report
note() { echo "    $*" >>"$D/notes"; }

# short_tmp() - a TMPDIR that leaves room in the path of a socket
short_tmp() {
    TMPDIR=${TMPDIR:-/tmp}
    [ ${#TMPDIR} -lt 40 ] || TMPDIR=/tmp
}

now_ms() { echo $(($(date +%s%N) / 1000000)); }

# wait_for() - until a command succeeds, for at most so many seconds
wait_for() {
    local end=$(($(now_ms) + $1 * 1000))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$(now_ms)" -lt "$end" ] || return 1
        sleep 0.05
    done
}

# run() - a command in the background under a name, its output in NAME.out
run() {
    local name=$1
    shift
    "$@" >"$D/$name.out" 2>&1 </dev/null &
    pids[$name]=$!
}

# end() - end what run() started, with the given signal, and wait for it
end() {
    local pid=${pids[$1]-}
    [ -n "$pid" ] || return 0
    kill -"${2:-TERM}" "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    unset "pids[$1]"
}

# finish() - wait for what run() started to end by itself
finish() {
    local pid=${pids[$1]} end=$((SECONDS + ${2:-60}))
    while kill -0 "$pid" 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "$1 did not end within ${2:-60} s"
        sleep 0.05
    done
    wait "$pid"
    finish_status=$?
    unset "pids[$1]"
    return $finish_status
}

# end_all() - the daemons first, so that their logs show how they end
end_all() {
    local name
    end host
    for name in "${!pids[@]}"; do
        [ "$name" = qemu ] || end "$name" KILL
    done
    end qemu
}

# ---- the guest -----------------------------------------------------------

# qemu_command() - the array $qemu: a guest with its sockets in the directory
qemu_command() {
    local dir=$1 board processor=max bus lines
    shift
    mkdir -p "$dir"
    case $machine in
    x86_64)
        board=q35 bus=pci
        lines=(-serial chardev:console
            -device isa-serial,chardev=isa,index=1)
        ;;
    aarch64)
        # The board's one PL011 is the channel, so the console is a port.
        board=virt processor=cortex-a57 bus=device console=${console:-console=hvc1}
        lines=(-serial chardev:isa
            -device virtconsole,bus=vs0.0,chardev=console)
        ;;
    s390x)
        board=s390-ccw-virtio bus=ccw console=${console:-console=ttysclp0}
        lines=(-device sclpconsole,chardev=console)
        ;;
    esac
    qemu=("$qemu_program" -accel tcg -M "$board" -cpu "$processor" -m 384M
        -nodefaults -no-user-config -display none
        -kernel "$kernel" -initrd "$initrd"
        -append "quiet panic=-1 ${console:-console=ttyS0}"
        -chardev "file,id=console,path=$dir/console.log,append=on"
        -monitor "unix:$dir/mon.sock,server=on,wait=off"
        -device "virtio-serial-$bus,id=vs0"
        -chardev "file,id=log,path=$dir/guest-daemon.log,append=on"
        -device virtconsole,bus=vs0.0,chardev=log
        -chardev "socket,id=ctl,path=$dir/ctl.sock,server=on,wait=off"
        -device virtserialport,bus=vs0.0,id=ctl,chardev=ctl,name=ctl
        -chardev "${virtio_chardev:-socket,path=$dir/virtio.sock,server=on,wait=off},id=virtio"
        -device virtserialport,bus=vs0.0,id=virtio,chardev=virtio,name=virtio
        -chardev "${isa_chardev:-socket,path=$dir/isa.sock,server=on,wait=off},id=isa"
        "${lines[@]}" "$@")
}

# reconnect_1s() - a chardev's option to connect again after a second
#
# "reconnect" is gone since QEMU 10.2, "reconnect-ms" is there since 9.2.
reconnect_1s() {
    local version
    version=$("$qemu_program" --version | sed -n '1s/.*version //p')
    if printf '%s\n' 9.2 "${version%% *}" | sort -CV; then
        echo reconnect-ms=1000
    else
        echo reconnect=1
    fi
}

# start_vm() - QEMU with the given further arguments, not waited for
start_vm() {
    vm=$D
    qemu_command "$D" "$@"
    run qemu "${qemu[@]}"
}

# g() - a command in the guest, on one line; GT bounds it in seconds
g() { "$probe" ctl "$vm/ctl.sock" "${GT:-60}" "${*//$'\n'/ }"; }

# hmp() - a command for QEMU's monitor
hmp() { "$probe" hmp "$vm/mon.sock" "$*"; }

guest_is_up() {
    boot_id=$(GT=3 g cat /proc/sys/kernel/random/boot_id) &&
        [ "$boot_id" != "${old_boot_id-}" ]
}

# wait_guest() - until the guest answers, and is not the one of before
wait_guest() {
    local end=$((SECONDS + 400)) # a busy machine takes 25 s, or 100
    until guest_is_up 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "the guest did not come up in 400 s"
        kill -0 "${pids[qemu]}" 2>/dev/null ||
            fail "QEMU ended: $(tail -n 3 "$D/qemu.out")"
        sleep 0.05
    done
    old_boot_id=$boot_id
}

boot() {
    start_vm "$@"
    wait_guest
}

# reboot_guest() - without any warning to what runs in it
reboot_guest() {
    # The answer may be lost with the guest; the new boot is what counts.
    GT=3 g '(usleep 200000; reboot -f) &' 2>/dev/null
    wait_guest
}

# gbg() - a command in the guest's background, its output in /tmp/NAME.out
gbg() {
    local name=$1
    shift
    # A status that can be seen is a whole one.
    g "rm -f /tmp/$name.rc;" \
        "($*; echo \$? >/tmp/$name.part; mv /tmp/$name.part /tmp/$name.rc)" \
        ">/tmp/$name.out 2>&1 &"
}

# running() - what run() or gbg() started is still under way
running() {
    kill -0 "${pids[$1]-}" 2>/dev/null || fail "$1 ended too early"
}

grunning() {
    g "[ -e /tmp/$1.out ] && [ ! -e /tmp/$1.rc ]" ||
        fail "$1 ended too early in the guest"
}

# gfinish() - wait for what gbg() started; prints its output
gfinish() {
    wait_for "${2:-60}" g "[ -e /tmp/$1.rc ]" ||
        fail "$1 did not end in the guest within ${2:-60} s"
    g "cat /tmp/$1.out; exit \$(cat /tmp/$1.rc)"
}

# ---- the daemons ---------------------------------------------------------

# channel() - how the two daemons name a channel of the given kind
channel() {
    kind=$1
    host_channel=unix-connect:$D/$kind.sock:-
    case $kind in
    virtio)
        guest_channel=virtserial-open:virtio:-
        big=67108864 mid=33554432 small=2000000
        ;;
    isa)
        guest_channel=isaserial-open:${device[isa]}:-
        big=700000 mid=120000 small=20000
        ;;
    esac
}

# host_daemon() - start it with the channel and the given arguments
host_daemon() {
    run host sh -c 'log=$1; shift; exec "$@" 2>>"$log"' - \
        "$D/host-daemon.log" "$vp" -c "$host_channel" "$@"
}

guest_daemon() {
    g "start-vp -c $guest_channel $*" || fail "cannot start the guest's daemon"
}

# kill_guest_daemon() - with no time to say goodbye, stop_guest_daemon() - in
# peace; both wait until it has let go of its channel and listeners
kill_guest_daemon() {
    g "kill -${1:-KILL} \$(cat /run/vp.pid);
        while [ -e /proc/\$(cat /run/vp.pid) ]; do usleep 5000; done" ||
        fail "the guest's daemon does not end"
}

stop_guest_daemon() { kill_guest_daemon TERM; }

# port() - where the host's daemon listens for a service; it may be that the
# daemon has only just been started, so the log's last word is waited for
port() {
    local line
    for _ in $(seq 200); do
        line=$(tail -n +"$((log_start + 1))" "$D/host-daemon.log" \
            2>/dev/null | grep "oforward $1: listening on" | tail -n 1)
        [ -n "$line" ] && echo "${line##* }" && return
        sleep 0.05
    done
    fail "the host's daemon does not listen for $1"
}

# The usual arrangement: a checking server on each side. The host reaches the
# guest's as $x, the guest the host's as $y.
y=127.0.0.1:7001

start_servers() {
    start_guest_server
    [ -n "${pids[hostserver]-}" ] || {
        run hostserver "$probe" serve 127.0.0.1:0
        wait_for 10 grep -q listening "$D/hostserver.out"
    }
    host_server=$(sed -n 's/listening //p' "$D/hostserver.out")
}

start_guest_server() {
    g probe serve -b /tmp/server.log 127.0.0.1:7000 >/dev/null ||
        fail "cannot start the guest's server"
}

start_host() {
    log_start=$(grep -c "" "$D/host-daemon.log" 2>/dev/null)
    host_daemon -o x:127.0.0.1:0 -i "y:$host_server" "$@"
    x=$(port x) || exit 1
}

start_guest() { guest_daemon -i x:127.0.0.1:7000 -o y:$y "$@"; }

start_pair() {
    start_servers
    start_host
    start_guest
    works
}

# load() - checked connections to the guest's server, see probe load
load() { "$probe" load "$@" "$x"; }

# rload() - the same in the background, under a name as run() has it
rload() {
    local name=$1
    shift
    run "$name" "$probe" load "$@" "$x"
}

# try() - one connection from host to guest, what came of it in tries.out
try() { "$probe" load -t 1 -u 500 -d 500 "$x" >>"$D/tries.out" 2>&1; }

# works() - new connections are carried in both directions; says in $took how
# many milliseconds after $since (or the call) that was so
works() {
    local start=${since:-$(now_ms)}
    wait_for "${1:-30}" try ||
        fail "no connection from host to guest works after ${1:-30} s"
    g "probe load -t 20 -u 500 -d 500 $y" >/dev/null ||
        fail "connections from guest to host do not work"
    took=$(($(now_ms) - start))
    unset since
}

# field() - a figure of probe's output
field() { sed -n "s/.*\<$1=\([^ ]*\).*/\1/p" <<<"$2"; }

# all_reset() - the clients whose connections had to be reset saw just that,
# in the midst of their transfers
all_reset() {
    local line=$2
    [ "$(field reset "$line")" = "$3" ] && [ "$(field rcvd "$line")" -gt 0 ] ||
        fail "$1: expected reset=$3 after some bytes, got: $line"
}

# told() - a figure of the host's or the guest's server, see probe tell
told() {
    local line
    case $1 in
    host) line=$("$probe" tell "$host_server") ;;
    guest) line=$(g probe tell 127.0.0.1:7000) ;;
    esac || fail "the $1's server does not answer"
    field "$2" "$line"
}

# What $(told SIDE reset) was before the connections that are to be reset.
declare -A resets

# server_saw() - soon it has no connection open, and so many were reset; those
# of clients that came early and lost their patience may be among them
server_saw() {
    local reset
    wait_for 20 nothing_open "$1" ||
        fail "$1's server: $(told "$1" open) connections are left over"
    reset=$(($(told "$1" reset) - ${resets[$1]}))
    [ $reset -ge "$2" ] ||
        fail "$1's server: expected $2 connections reset, got $reset"
}

nothing_open() { [ "$(told "$1" open)" = 0 ]; }

# no_strangers() - no server has seen a byte that was not meant for it, nor has
# a client that came before all was ready again
no_strangers() {
    local bad
    bad=$(grep -h BAD "$D"/hostserver.out) && fail "host's server: $bad"
    bad=$(g '[ -e /tmp/server.log ] && ! grep BAD /tmp/server.log') ||
        fail "guest's server: $bad"
    bad=$(grep -E 'BAD|eof=[1-9]' "$D/tries.out") &&
        fail "a client that came early: $bad"
    return 0
}
