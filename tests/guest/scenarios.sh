# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# scenarios.sh - what a guest and its channel go through (sourced)
#
# A scenario is a function that leaves with fail or comes to its end; it is
# called in a process of its own with $kind, $host_channel, $guest_channel
# and sizes that suit the kind ($big, $mid, $small) set by channel(). Times
# are reported beside what is aimed at, and judged by bounds so wide that only
# a hang, a timer of the wrong order or a queue in the wrong place meets them.

scenarios=(
    rfc-virtio rfc-isa
    typing-virtio typing-isa
    deadlock-virtio deadlock-isa
    reboot-virtio reboot-isa
    restart-virtio restart-isa
    order-virtio order-isa
    pause-virtio pause-isa
    snapshot-virtio snapshot-isa
    reconnect-virtio reconnect-isa
    handover-virtio handover-isa
    hotplug-virtio
    migration-virtio migration-isa
    second-virtio second-isa
    libvirt-virtio
    idle-virtio idle-isa
    many-virtio many-isa
    vsock-virtio
    speed-virtio speed-isa
)

median() { printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"; }

# ratio() - a / b to two places
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }

# holds() - compare two numbers, whole or not
holds() { awk -v a="$1" -v b="$3" "BEGIN { exit !(a $2 b) }"; }

# goal() - report a figure and whether it is what is aimed at; fail where it
# isn't even within the limit
goal() {
    local what=$1 value=$2 op=$3 aim=$4 limit=$5 met=met
    holds "$value" "$op" "$aim" || met=missed
    note "$what: $value (aim $op $aim: $met)"
    holds "$value" "$op" "$limit" || fail "$what: $value is not $op $limit"
}

# took() - report how long the way back took; the aim is one second if nothing
# else is said, ten are said to be broken
took() {
    goal "$1: new connections work, after ms" "$took" '<=' "${2:-1000}" 10000
}

ssh_options=(-F none -o BatchMode=yes -o StrictHostKeyChecking=no
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR)

sum() { sha256sum "$1" | cut -d ' ' -f 1; }

same() {
    [ -n "$2" ] && [ "$2" = "$3" ] || fail "$1 arrived changed: $2, $3"
}

# start_httpd() - busybox's on some free port of the host, named in $web
start_httpd() {
    local try
    for try in 1 2 3 4 5 6 7 8; do
        web=127.0.0.1:$((20000 + (RANDOM + try) % 20000))
        run "httpd" $emulate "$(find_file busybox)" httpd -f -p "$web" -h "$1"
        sleep 0.2
        kill -0 "${pids[httpd]}" 2>/dev/null && return
    done
    fail "no free port for a web server"
}

# The example of the README with its reverse, at the same time, and the other
# programs that people run through such a channel.
rfc() {
    local login copy line

    mkdir "$D/www"
    head -c "$big" /dev/urandom >"$D/www/file"
    start_httpd "$D/www"
    boot
    g "head -c $big /dev/urandom >/www/file &&
        start 127.0.0.1:80 httpd -f -p 127.0.0.1:80 -h /www &&
        dropbearkey -t ed25519 -f /etc/dropbear/key &&
        start 127.0.0.1:22 dropbear -F -s -r /etc/dropbear/key \
            -p 127.0.0.1:22 &&
        start /run/qga.sock qemu-ga -m unix-listen -p /run/qga.sock \
            -f /run/qga.pid -t /run" \
        >/dev/null || fail "the guest's servers do not start"
    log_start=0
    host_daemon -o http:127.0.0.1:0 -o ssh:127.0.0.1:0 \
        -o "qga:$D/qga.sock:-" -i "web:$web"
    guest_daemon -i http:127.0.0.1:80 -i ssh:127.0.0.1:22 \
        -i qga:/run/qga.sock:- -o web:127.0.0.1:8080
    wait_for 30 grep -q 'oforward web: listening' "$D/guest-daemon.log" ||
        fail "the guest's daemon does not listen"

    # Both at once: the guest's is under way when the host's begins. On isa the
    # file is small, as 64 MB would take seven minutes and more each time.
    gbg wget wget -q -O /tmp/file http://127.0.0.1:8080/file
    wait_for 20 g '[ -s /tmp/file ]' || fail "the guest's wget gets nothing"
    grunning wget
    wget -q -T 120 -t 1 -O "$D/file" "http://$(port http)/file" ||
        fail "wget of the guest's file failed"
    gfinish wget 120 || fail "the guest's wget failed"
    same "the guest's file" "$(sum "$D/file")" \
        "$(g 'sha256sum </www/file' | cut -d ' ' -f 1)"
    same "the host's file" "$(sum "$D/www/file")" \
        "$(g 'sha256sum </tmp/file' | cut -d ' ' -f 1)"
    rm "$D/file" "$D/www/file"

    login=$(port ssh)
    login="-i $cache/id -o Port=${login#*:}"
    [ "$(ssh "${ssh_options[@]}" $login root@127.0.0.1 'echo $((6 * 7))' \
        </dev/null)" = 42 ] || fail "ssh does not work"
    copy=$D/copy
    head -c "$small" /dev/urandom >"$copy"
    scp -q "${ssh_options[@]}" $login "$copy" root@127.0.0.1:/tmp/c1 &&
        scp -q "${ssh_options[@]}" $login root@127.0.0.1:/tmp/c1 \
            "$copy.1" || fail "scp failed"
    rsync -e "ssh ${ssh_options[*]} $login" "$copy" root@127.0.0.1:/tmp/c2 &&
        rsync -e "ssh ${ssh_options[*]} $login" root@127.0.0.1:/tmp/c2 \
            "$copy.2" || fail "rsync failed"
    same "scp's file" "$(sum "$copy")" "$(sum "$copy.1")"
    same "rsync's file" "$(sum "$copy")" "$(sum "$copy.2")"

    "$probe" line "$D/qga.sock" '{"execute":"guest-ping"}' |
        grep -q '"return": {}' || fail "the guest agent does not answer"
    "$probe" line "$D/qga.sock" '{"execute":"guest-info"}' |
        grep -q '"version"' || fail "the guest agent says nothing of itself"
    # The others have no clock of hardware, or not its driver.
    [ "$machine" = x86_64 ] || return 0
    g 'mkdir -p /sbin && ln -s /bin/hwclock /sbin/ && date -s 2001-01-01' \
        >/dev/null || fail "the guest's clock can't be set"
    line=$("$probe" line "$D/qga.sock" "$(recipe "The host's time" |
        sed -n "s/'\$(date +%s%N)'/$(date +%s%N)/; s/^echo '\(.*\)' |.*/\1/p")")
    grep -q '"return": {}' <<<"$line" || fail "guest-set-time: $line"
    line=$(($(g date +%s) - $(date +%s)))
    [ "${line#-}" -lt 600 ] || fail "the guest's clock is $line s off"
}

# typed() - report one round of typing; its median is below the given limit
typed() {
    [ "$(field outcome "$2")" = ok ] || fail "typing $1: $2"
    holds "$(field p50 "$2")" '<' "$3" || fail "typing $1 lags: $2"
    note "typing $1: $(field count "$2") bytes, round trip p50" \
        "$(field p50 "$2") ms, p99 $(field p99 "$2") ms," \
        "max $(field max "$2") ms"
}

# beside() - typing beside one bulk transfer, which is not starved meanwhile:
# a tenth of what the channel can do has to be left to it
beside() {
    local what=$1 line rcvd least=2000
    shift
    [ "$kind" = isa ] && least=4
    rcvd=$(told guest rcvd)
    rload bulk -r "$@" -t 300
    typed "$what" "$("$probe" type -n 1000 "$x")" 400
    running bulk
    rcvd=$(($(told guest rcvd) - rcvd))
    end bulk
    line=$(cat "$D/bulk.out")
    [ "$1" = -d ] && rcvd=$(field rcvd "$line")
    rcvd=$(ratio "$rcvd" "$(field ms "$line")")
    note "$what: $rcvd KB/s of bulk meanwhile"
    holds "$rcvd" '>' $least || fail "$what: only $rcvd KB/s of bulk"
}

# Every byte is answered before the next one is sent: none may wait for
# company, whatever else is under way.
typing() {
    local login

    boot
    g 'dropbearkey -t ed25519 -f /etc/dropbear/key >/dev/null &&
        start 127.0.0.1:22 dropbear -F -s -r /etc/dropbear/key
            -p 127.0.0.1:22' || fail "the guest's server does not start"
    start_servers
    start_host -o ssh:127.0.0.1:0
    start_guest -i ssh:127.0.0.1:22
    works
    typed "idle" "$("$probe" type -n 1000 "$x")" 35
    login=$(port ssh)
    typed "idle, ssh with a terminal" "$("$probe" type -n 200 -x \
        "ssh -tt ${ssh_options[*]} -i $cache/id -p ${login#*:} \
        root@127.0.0.1 'stty raw -echo; echo ready; exec cat'")" 100
    beside "beside bulk to the guest" -u 1000000000000
    beside "beside bulk from the guest" -d 1000000000000
}

# held() - what the host's daemon says of the two connections whose clients
# read nothing, but for the time that passes
held() {
    "$vp" -m "$D/monitor" -x 'info conns -k' |
        grep 'service=unix .*_bytes=[1-9].*_bytes=[1-9]' |
        sed 's/age_us=[^ ]* idle_us=[^ ]* //'
}

# wait_stuck() - until nothing of them moves, with some of the bytes to come
wait_stuck() {
    local before=- now='' end=$((SECONDS + 100)) most
    until [ "$(wc -l <<<"$now")" = 2 ] && [ "$now" = "$before" ]; do
        [ $SECONDS -lt $end ] || fail "who reads nothing gets on: $now"
        sleep 2
        before=$now
        now=$(held)
    done
    most=$(grep -o '_bytes=[0-9]*' <<<"$now" | cut -d = -f 2 | sort -n |
        tail -n 1)
    [ "$most" -lt "$1" ] || fail "who reads nothing got all: $now"
    echo "$now" >"$D/stuck"
}

# The two daemons, QEMU and the clients wait for each other in a ring when one
# of them waits at all. Clients on both sides read nothing while bulk data
# goes both ways and ends, and only then read on. They use unix sockets, where
# the kernel holds little for them.
deadlock() {
    local line stuck=$mid

    [ "$kind" = isa ] && stuck=500000
    boot
    start_servers
    start_host -m "$D/monitor" -o "unix:$D/unix.sock:-" \
        -i "unix:$host_server"
    start_guest -o unix:/tmp/unix.sock:- -i unix:127.0.0.1:7000
    works
    run stuck "$probe" load -h -u 20000 -d "$stuck" -t 300 "$D/unix.sock"
    gbg stuck "sh -c 'echo \$\$ >/tmp/stuck.pid;
        exec probe load -h -u 20000 -d $stuck -t 300 /tmp/unix.sock'"
    wait_stuck "$stuck"
    rload bulk -n 2 -u "$mid" -d "$mid" -t 200
    gbg bulk probe load -n 2 -u "$mid" -d "$mid" -t 200 $y
    sleep 0.5
    GT=30 g true || fail "the guest does not answer"
    hmp info status | grep -q running || fail "the monitor does not answer"
    line=$("$probe" type -n 20 "$x")
    typed "beside clients that read nothing" "$line" 1000
    load -n 5 -u 5000 -d 5000 -t 60 || fail "other connections do not work"
    finish bulk 200 || fail "bulk: $(cat "$D/bulk.out")"
    line=$(gfinish bulk 200) || fail "bulk in the guest: $line"
    [ "$(held)" = "$(cat "$D/stuck")" ] ||
        fail "who read nothing was not stuck: $(cat "$D/stuck"); $(held)"
    kill -USR1 "${pids[stuck]}" && g 'kill -USR1 $(cat /tmp/stuck.pid)' ||
        fail "the clients that read nothing have gone"
    finish stuck 200 || fail "clients that read late: $(cat "$D/stuck.out")"
    line=$(gfinish stuck 200) || fail "in the guest, reading late: $line"
    no_strangers
}

# traffic() - transfers both ways that do not end by themselves, under way
traffic() {
    local side
    for side in host guest; do
        resets["$side"]=$(told "$side" reset)
    done
    rload traffic -w -n 4 -a -u 1000000000 -d 1000000000 -t 250
    gbg traffic probe load -w -n 2 -a -u 1000000000 -d 1000000000 -t 250 $y
    wait_for 30 grep way "$D/traffic.out" && wait_for 30 g grep way \
        /tmp/traffic.out || fail "the transfers do not get under way"
    sleep 0.$((RANDOM % 8 + 2))
}

# Nothing tells the host's side of a reboot; the old connections must be
# reset all the same, and what is left of them must reach nobody.
reboot() {
    local round worst=0 times=

    boot
    start_servers
    start_host
    start_guest
    works
    for round in 1 2 3 4 5 6 7 8 9 10; do
        traffic
        reboot_guest
        start_guest_server
        start_guest
        since=$(now_ms)
        works
        times="$times $took"
        [ "$took" -gt "$worst" ] && worst=$took
        finish traffic 60
        all_reset "host's clients, round $round" "$(cat "$D/traffic.out")" 4
        server_saw host 2
        no_strangers
    done
    took=$(median $times)
    [ "$took" -le 1000 ] ||
        fail "guest rebooted: new connections work after $took ms (${times# })"
    took=$worst
    took "guest rebooted ten times (${times# } ms), the longest"
}

# Each of the three ends without a word and comes again.
restart() {
    local line

    boot
    start_pair

    traffic
    kill_guest_daemon
    start_guest
    since=$(now_ms)
    works
    took "guest's daemon killed and restarted"
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    line=$(gfinish traffic)
    all_reset "guest's clients" "$line" 2
    server_saw host 2
    server_saw guest 4
    no_strangers

    traffic
    end host KILL
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    start_host
    since=$(now_ms)
    works
    took "host's daemon killed and restarted"
    line=$(gfinish traffic)
    all_reset "guest's clients" "$line" 2
    server_saw host 2
    server_saw guest 4
    no_strangers

    traffic
    end qemu KILL
    start_vm
    wait_guest
    start_guest_server
    start_guest
    since=$(now_ms)
    works
    took "QEMU killed and restarted"
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    server_saw host 2
    no_strangers
}

# Whoever comes first waits, and whatever was on the line before is ignored.
order() {
    local noise

    run hostserver "$probe" serve 127.0.0.1:0
    wait_for 10 grep -q listening "$D/hostserver.out"
    host_server=$(sed -n 's/listening //p' "$D/hostserver.out")
    start_host
    # Boot messages on the serial line, with our daemon already listening.
    [ "$kind" = isa ] && console="console=ttyS1 debug"
    boot
    if [ "$kind" = isa ]; then
        g 'grep -q ttyS1 /proc/consoles' || fail "ttyS1 is no console"
    fi
    start_guest_server
    start_guest
    since=$(now_ms)
    works
    took "host's daemon before QEMU"

    end host
    stop_guest_daemon
    start_guest
    sleep 3
    start_host
    since=$(now_ms)
    works
    took "guest's daemon before the host's"
    stop_guest_daemon

    # Somebody else was on the line: a login shell, or an echo.
    if [ "$kind" = isa ]; then
        # -I: a packet may hold the byte that ends a terminal's input.
        g 'stty -F /dev/ttyS1 sane;
            setsid sh -iI </dev/ttyS1 >/dev/ttyS1 2>&1 & echo $! >/tmp/pid'
    else
        g "cat <>${device[virtio]} 1>&0 & echo \$! >/tmp/pid"
    fi
    sleep 2
    g 'kill -KILL $(cat /tmp/pid)' || fail "nobody else was on the channel"
    start_guest
    since=$(now_ms)
    works
    took "a shell or an echo on the channel before"
    stop_guest_daemon

    noise="head -c 5000 /dev/urandom >${device[$kind]}"
    g "$noise" || fail "no noise on the channel"
    start_guest
    since=$(now_ms)
    works
    took "noise on the channel before"
    no_strangers
}

# A stopped guest is silent and takes nothing, but it is not dead.
pause() {
    local line

    boot
    start_servers
    start_host --grace 5
    start_guest --grace 5
    works
    run typing "$probe" type -n 100 -g 50 "$x"
    rload bulk -n 3 -u "$mid" -d "$mid" -t 250
    gbg bulk probe load -n 3 -u "$mid" -d "$mid" -t 250 $y
    sleep 0.5
    grunning bulk
    hmp stop >/dev/null
    hmp info status | grep -q paused || fail "the guest is not paused"
    sleep 2
    rload late -u 1000 -d 1000 -t 100
    sleep 20
    running typing
    running bulk
    running late
    hmp cont >/dev/null
    hmp info status | grep -q running || fail "the guest is not continued"
    finish late 60 || fail "connected during the pause: $(cat "$D/late.out")"
    finish typing 120 || fail "typing: $(cat "$D/typing.out")"
    finish bulk 250 || fail "bulk: $(cat "$D/bulk.out")"
    line=$(gfinish bulk 250) || fail "bulk in the guest: $line"
    no_strangers
}

# The guest is thrown back in time under open connections.
snapshot() {
    local line

    qemu-img create -q -f qcow2 "$D/disk" 1G
    boot -drive "if=none,id=disk,file=$D/disk,format=qcow2"
    start_pair
    traffic
    run typing "$probe" type -n 100000 -g 10 "$x"
    sleep 1
    line=$(hmp savevm before)
    grep -qi error <<<"$line" && fail "savevm: $line"
    sleep 2
    line=$(hmp loadvm before)
    grep -qi error <<<"$line" && fail "loadvm: $line"
    since=$(now_ms)
    works
    took "snapshot loaded"
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    finish typing 60
    [ "$(field outcome "$(cat "$D/typing.out")")" = reset ] ||
        fail "typing: $(cat "$D/typing.out")"
    line=$(gfinish traffic)
    all_reset "guest's clients" "$line" 2
    server_saw host 2
    server_saw guest 5
    rm "$D/disk"
    no_strangers
}

# QEMU is the client of the chardev and comes back when we do: it looks once a
# second.
reconnect() {
    local line

    host_channel=unix-listen:$D/$kind.sock:-
    line=socket,path=$D/$kind.sock,server=off,$(reconnect_1s)
    [ "$kind" = isa ] && isa_chardev=$line || virtio_chardev=$line
    boot
    start_servers
    start_guest
    start_host
    since=$(now_ms)
    works
    took "QEMU as the client, daemon started" 2000
    traffic
    end host KILL
    start_host
    since=$(now_ms)
    works
    took "daemon killed and restarted" 2000
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    line=$(gfinish traffic)
    all_reset "guest's clients" "$line" 2
    server_saw host 2
    server_saw guest 4
    no_strangers
}

# QEMU and the daemon inherit the two ends of a socketpair.
handover() {
    local name line

    [ "$kind" = isa ] && isa_chardev=socket,fd=8 || virtio_chardev=socket,fd=8
    run hostserver "$probe" serve 127.0.0.1:0
    wait_for 10 grep -q listening "$D/hostserver.out"
    host_server=$(sed -n 's/listening //p' "$D/hostserver.out")
    vm=$D
    qemu_command "$D"
    log_start=0
    # One shell has both as its children, and takes them with it.
    run qemu "$probe" pair "
        $(printf '%q ' "${qemu[@]}") 9>&- & qemu=\$!
        $(printf '%q ' "$vp" -c fd:9:- -o x:127.0.0.1:0 \
            -i "y:$host_server") 8>&- 2>>$D/host-daemon.log & daemon=\$!
        exec 8>&- 9>&-
        trap 'kill \$daemon \$qemu; wait' TERM
        wait; wait"
    x=$(port x) || exit 1
    wait_guest
    start_guest_server
    start_guest
    since=$(now_ms)
    works
    took "descriptor handed to both"
    load -n 10 -u "$mid" -d "$mid" -m -t 120 || fail "transfers failed"
    line=$(g probe load -n 10 -u "$mid" -d "$mid" -m -t 120 $y) ||
        fail "transfers of the guest failed: $line"
    no_strangers
}

# typed_on() - typing without end, begun by run(), has gone on until now
typed_on() {
    local line
    running typing
    end typing
    line=$(cat "$D/typing.out")
    [ "$(field outcome "$line")" = ok ] || fail "typing: $line"
    note "typing went on: $line"
}

# The port is taken out and put back under load: both daemons live on, and so
# do the connections.
hotplug() {
    local line

    boot
    start_pair
    run typing "$probe" type -n 1000000 -g 20 "$x"
    rload bulk -n 3 -u "$big" -d "$big" -t 200
    gbg bulk probe load -n 3 -u "$big" -d "$big" -t 200 $y
    for _ in 1 2 3; do
        sleep 0.5
        running typing
        running bulk
        grunning bulk
        hmp device_del virtio >/dev/null
        wait_for 20 g "[ ! -e ${device[virtio]} ]" ||
            fail "the port does not go"
        g name-ports
        sleep 1
        line=$(hmp device_add \
            virtserialport,bus=vs0.0,id=virtio,chardev=virtio,name=virtio)
        grep -qi error <<<"$line" && fail "device_add: $line"
        wait_for 20 g "name-ports; [ -e ${device[virtio]} ]" ||
            fail "the port does not come back"
    done
    since=$(now_ms)
    works
    took "port plugged in again"
    typed_on
    finish bulk 200 || fail "bulk: $(cat "$D/bulk.out")"
    line=$(gfinish bulk 200) || fail "bulk in the guest: $line"
    no_strangers
}

# start_target() - a second QEMU that waits for the guest of the first one
start_target() {
    local name=$kind.sock
    qemu_command "$D/2" -incoming "unix:$D/incoming.sock"
    run target "${qemu[@]}"
    wait_for 20 [ -S "$D/2/$name" ] || fail "no second QEMU"
    wait_for 20 [ -S "$D/incoming.sock" ] || fail "no second QEMU"
}

# migrate() - the guest moves to the second QEMU; the first one is silent
migrate() {
    hmp migrate_set_parameter max-bandwidth 10G >/dev/null
    hmp migrate -d "unix:$D/incoming.sock" >/dev/null
    wait_for 100 eval 'hmp info migrate | grep -qi "status:\s*completed"' ||
        fail "migration: $(hmp info migrate)"
    vm=$D/2
    wait_for 20 eval 'hmp info status | grep -q running' ||
        fail "the guest does not run after the migration"
}

# The host's daemon is given a link for a path, which is moved to the new
# socket: connections that are open survive.
migration() {
    local line

    ln -s "$kind.sock" "$D/channel"
    host_channel=unix-connect:$D/channel:-
    boot
    start_pair
    start_target
    run typing "$probe" type -n 1000000 -g 20 "$x"
    rload bulk -n 3 -u "$mid" -d "$mid" -t 250
    gbg bulk probe load -n 3 -u "$mid" -d "$mid" -t 250 $y
    sleep 0.5
    migrate
    running typing
    running bulk
    grunning bulk
    ln -sfn "2/$kind.sock" "$D/channel"
    end qemu
    pids[qemu]=${pids[target]}
    unset "pids[target]"
    since=$(now_ms)
    works
    took "guest migrated, daemon follows the link"
    finish bulk 250 || fail "bulk: $(cat "$D/bulk.out")"
    line=$(gfinish bulk 250) || fail "bulk in the guest: $line"
    typed_on
    no_strangers
    note "all connections survived the migration"
}

# The same with a second channel that is there before the migration: what is
# new goes through that one, what was open is reset.
second() {
    local line

    boot
    start_servers
    start_target
    start_host --grace 1 -c "unix-connect:$D/2/$kind.sock:-:1" \
        -o z:127.0.0.1:0:1 -i "z:$host_server:1"
    start_guest -i z:127.0.0.1:7000 -o z:127.0.0.1:7002
    works
    traffic
    migrate
    end qemu
    pids[qemu]=${pids[target]}
    unset "pids[target]"
    y=127.0.0.1:7002
    x=$(port z) || exit 1
    since=$(now_ms)
    works
    took "guest migrated, second channel"
    finish traffic 60
    all_reset "host's clients" "$(cat "$D/traffic.out")" 4
    line=$(gfinish traffic)
    all_reset "guest's clients" "$line" 2
    server_saw host 2
    server_saw guest 4
    no_strangers
}

# lazy() - a daemon with nothing to do costs next to nothing: $1 says why,
# the others on which side
lazy() {
    local why=$1 side ms windows good
    shift
    for side; do
        # A guest's clock also counts what other programs take from the host:
        # there one of three windows may be spoilt.
        [ "$side" = guest ] && windows="1 2 3" good=-2 || windows=1 good=-1
        for _ in $windows; do
            if [ "$side" = guest ]; then
                ms=$(g 'probe cpu $(cat /run/vp.pid) 5')
            else
                ms=$("$probe" cpu "${pids[host]}" 5)
            fi || fail "$why: the $side's daemon has gone"
            note "$why: $ms ms of processor time in 5 s on the $side"
            [ "${ms%.*}" -lt 20 ] && good=$((good + 1))
            [ $good = 0 ] && break
        done
        [ $good = 0 ] || fail "$why: the $side's daemon is busy: $ms ms in 5 s"
    done
}

idle() {
    run hostserver "$probe" serve 127.0.0.1:0
    wait_for 10 grep -q listening "$D/hostserver.out"
    host_server=$(sed -n 's/listening //p' "$D/hostserver.out")
    start_host
    lazy "no QEMU" host
    boot
    sleep 1
    lazy "no daemon in the guest" host
    end host
    start_guest_server
    start_guest
    sleep 1
    lazy "no daemon on the host" guest
    start_host
    works
    lazy "both, nothing to do" host guest
    end host KILL
    sleep 1
    lazy "the host's killed" guest
    start_host
    works
    kill_guest_daemon
    lazy "the guest's killed" host
}

# vsock_load() - checked connections through both daemons of vsock()
vsock_load() { g probe load "$@" 127.0.0.1:7100 >"$D/load.out"; }

# vsock_said() - the log of one of them has that
vsock_said() {
    wait_for 30 grep -q "$1" "$D/guest-daemon.log" ||
        fail "never logged: $1"
}

# vsock_kill() - one of them, with no time to say goodbye; waits until it has let
# go of its sockets
vsock_kill() {
    g "kill -KILL \$(cat /run/$1.pid);
        while [ -e /proc/\$(cat /run/$1.pid) ]; do usleep 5000; done" ||
        fail "the $1 does not end"
}

# Both daemons in the guest, over the kernel's own vsock, whose modules, where it
# isn't built in, come only after both have begun to wait for it; then either of
# them is killed.
vsock() {
    local listener connector module
    listener='start-vp -c vsock-listen:any:5000 -i x:127.0.0.1:7000;
        cp /run/vp.pid /run/listener.pid'
    connector='start-vp -c vsock-connect:1:5000 -o x:127.0.0.1:7100;
        cp /run/vp.pid /run/connector.pid'

    boot
    start_guest_server
    g "$listener"
    g "$connector"
    if g '[ -e /lib/modules/vsock.ko ]'; then
        vsock_said 'cannot listen on vsock:any:5000: .*: trying again'
        vsock_said 'channel vsock-connect: 1:5000: .*: trying again'
    fi
    for module in vsock vmw_vsock_virtio_transport_common vsock_loopback; do
        g "[ ! -e /lib/modules/$module.ko ] || insmod /lib/modules/$module.ko" ||
            fail "$module can't be loaded"
    done
    vsock_said 'channel vsock-listen: listening on vsock:any:5000'
    vsock_said 'whoever reaches vsock:any:5000 is the other end'
    wait_for 30 vsock_load -t 5 -u 500 -d 500 || fail "vsock does not work"
    vsock_load -n 8 -t 60 -u "$small" -d "$small" -m ||
        fail "transfers failed: $(cat "$D/load.out")"

    vsock_kill listener
    g "$listener"
    wait_for 30 vsock_load -t 5 -u 500 -d 500 ||
        fail "the listening side does not come back"
    vsock_kill connector
    g "$connector"
    wait_for 30 vsock_load -t 5 -u 500 -d 500 ||
        fail "the connecting side does not come back"
    g '[ -e /tmp/server.log ] && ! grep BAD /tmp/server.log' ||
        fail "the server got wrong bytes"
}

many() {
    local line up=1000000 down=1000000

    [ "$kind" = isa ] && up=4000 down=12000
    boot
    start_pair
    load -n 200 -m -u $up -d $down -t 200 >"$D/many.out" ||
        fail "from the host: $(cat "$D/many.out")"
    note "200 from the host: $(cat "$D/many.out")"
    line=$(GT=220 g probe load -n 200 -m -u $down -d $up -t 200 $y) ||
        fail "from the guest: $line"
    note "200 from the guest: $line"
    no_strangers
}

# measured() - one round over what $x leads to now: rates and round trip
measured() {
    local line
    line=$(load -r -u $up -t 100) || fail "$1, to the guest: $line"
    to[$1]="${to[$1]-} $(field kbps "$line")"
    line=$(load -r -d $down -t 100) || fail "$1, from the guest: $line"
    from[$1]="${from[$1]-} $(field kbps "$line")"
    line=$("$probe" type -n 300 "$x")
    [ "$(field outcome "$line")" = ok ] || fail "$1, typing: $line"
    trip[$1]="${trip[$1]-} $(field p50 "$line")"
}

# on_relay() - what measured() does, a plain relay in the guest for each
# connection
on_relay() {
    local what
    x=$D/$kind.sock
    for what in "load -r -u $up -t 100:to" "load -r -d $down -t 100:from" \
        "type -n 300:trip"; do
        relay=$(g probe relay "${device[$kind]}" 127.0.0.1:7000) ||
            fail "no relay"
        line=$("$probe" ${what%:*} "$x") || fail "relay, $what: $line"
        case $what in
        *:to) to[relay]="${to[relay]-} $(field kbps "$line")" ;;
        *:from) from[relay]="${from[relay]-} $(field kbps "$line")" ;;
        *:trip) trip[relay]="${trip[relay]-} $(field p50 "$line")" ;;
        esac
        g "kill -KILL -$relay 2>/dev/null; sleep 0.2"
    done
}

# qemu-vp, a plain relay in the guest (both in front of the same server) and
# that server on the port itself, in turns, so that the machine's moods meet
# them all.
speed() {
    local -A to from trip
    local up=33554432 down=134217728 relay server line bulk_alone bulk_ms

    [ "$kind" = isa ] && up=100000 down=300000
    boot
    start_servers
    for _ in 1 2 3; do
        start_host
        start_guest
        works
        measured vp
        stop_guest_daemon
        end host
        on_relay
        server=$(g probe serve -b /tmp/plain.log "${device[$kind]}") ||
            fail "no server on the port"
        measured port
        g "kill -KILL $server; sleep 0.2"
    done
    for line in "${!to[@]}"; do
        to[$line]=$(median ${to[$line]}) from[$line]=$(median ${from[$line]})
        trip[$line]=$(median ${trip[$line]})
        note "$line: ${to[$line]} KB/s to the guest," \
            "${from[$line]} KB/s from it, round trip ${trip[$line]} ms"
    done
    line=0.8
    [ "$kind" = isa ] && line=0.9
    goal "to the guest, of the plain loop" \
        "$(ratio "${to[vp]}" "${to[relay]}")" '>=' $line 0.2
    goal "from the guest, of the plain loop" \
        "$(ratio "${from[vp]}" "${from[relay]}")" '>=' $line 0.2
    # Most of the first is the way through one more program in a guest whose
    # processor is emulated, as the second shows.
    goal "round trip, of the plain port's" \
        "$(ratio "${trip[vp]}" "${trip[port]}")" '<=' 1.5 40
    goal "round trip, of the plain loop's" \
        "$(ratio "${trip[vp]}" "${trip[relay]}")" '<=' 1.5 15

    # A byte behind a bulk transfer, and what that does to the transfer.
    [ "$kind" = isa ] && up=400000 || up=$((up * 4))
    server=$(g probe serve -b /tmp/plain.log "${device[$kind]}")
    line=$("$probe" type -f -n 10 "$D/$kind.sock")
    note "a byte behind bulk on the plain port: p50 $(field p50 "$line") ms," \
        "max $(field max "$line") ms"
    g "kill -KILL $server; sleep 0.2"
    start_host
    start_guest
    works
    line=$(load -r -u $up -t 200) || fail "bulk: $line"
    bulk_alone=$(field ms "$line")
    run typing "$probe" type -n 1000000 "$x"
    line=$(load -r -u $up -t 200) || fail "bulk: $line"
    bulk_ms=$(field ms "$line")
    end typing
    line=$(cat "$D/typing.out")
    typed "beside bulk to the guest" "$line" 400
    [ "$kind" = isa ] &&
        goal "a byte behind bulk, p99 in ms" "$(field p99 "$line")" '<=' 60 600
    goal "bulk rate kept beside typing" \
        "$(ratio "$bulk_alone" "$bulk_ms")" '>=' 0.85 0.25
    no_strangers
}
