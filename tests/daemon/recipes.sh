#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# recipes.sh - run a recipe of the README, word for word
#
# Usage: recipes.sh NAME DIR      NAME: a recipe_NAME below; DIR: to be made
#
# What is run comes out of the README and goes where that says. So it gets a
# world of its own: namespaces for processes, mounts and network, and a root
# directory in DIR with this machine's programs and its own /etc, /dev, /run and
# /usr/local, where "make install" puts qemu-vp. In it, no port and no path is
# taken, and nothing survives its process 1, which is this script.
#
# QEMU is played by a script of its name; guest and host are the same world, the
# ports of the one are FIFOs and ptys there. The guest's sshd, 127.0.0.1:22, is
# a service that sends back what it gets, but where it matters.
#
# A recipe for a program that this machine doesn't have is passed over, and so
# are all where there can be no such world.

set -eu

fail() { echo "recipes.sh: $*" >&2; exit 1; }
pass_over() { echo "passed over: recipe $recipe: needs $*"; exit 0; }
need() { command -v "$1" >/dev/null || pass_over "$1"; }

# ---- the README ----------------------------------------------------------

# block() - the indented lines after one that begins with $1 and, with $2, one
# that is that file's name
block() {
    awk -v head="$1" -v file="${2-}" '
        !found { found = index($0, head) == 1; next }
        file != "" && !named { named = $0 == "  " file; next }
        /^    / {
            for (; blank > 0; blank--) { print "" }
            print substr($0, 5)
            seen = 1
            next
        }
        /^$/ && seen { blank++; next }
        seen { exit }
    ' /README
}

# put() - the block after $1 into file $2, whose name is there; $3: named so
put() {
    mkdir -p "${2%/*}"
    block "$1" "${3-$2}" >/run/block
    [ -s /run/block ] || fail "the README has no $2 under '$1'"
    install -m 644 /run/block "$2"
}

# put_script() - the same, to be executed
put_script() { put "$@" && chmod 755 "$2"; }

# join() - each command on one line
join() { sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ta' -e '}'; }

# start() - start the commands under $1, those in the guest too
start() {
    block "$1" | join | sed 's/^\(guest\|host\): *//' >/run/commands
    [ -s /run/commands ] || fail "the README has no commands under '$1'"
    while read -r line; do
        eval "$line &"
    done </run/commands
}

# ---- what recipes have in common -----------------------------------------

# until_ok() - repeat a command until it succeeds
until_ok() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "never: $*"
        sleep 0.1
    done
}

not() { ! "$@"; }

# echoes() - the service behind port $1 of this host works
echoes() {
    [ "$(echo hello | socat -t 30 - "TCP:127.0.0.1:$1" 2>/dev/null)" = hello ]
}

# guest_service() - what echoes() talks to
guest_service() { socat TCP-LISTEN:22,reuseaddr,fork EXEC:cat & }

# guest() - QEMU and a guest in one
guest() {
    guest_service
    mkdir -p /run/vm1
    qemu-vp -q -c unix-listen:/run/vm1/vp.sock:- -i ssh:127.0.0.1:22 &
}

# channel_with() - the channel of 'A virtio-serial channel', with the guest's and
# the host's commands under $1 at its ends
channel_with() {
    block 'A virtio-serial channel' | join | sed '/^qemu-vp/d' >/run/commands
    block "$1" | sed -n 's/^\(host\|guest\): *//p' >>/run/commands
    while read -r line; do
        eval "$line &"
    done </run/commands
}

# config() - what the recipes for init have in their file
config() {
    mkdir -p "${1%/*}"
    echo channel unix-connect:/run/vm1/vp.sock:- >"$1"
    echo oforward ssh:127.0.0.1:9022 >>"$1"
}

# ports() - the kernel's names of virtio-serial ports, and such a port
ports() {
    mount -n -t tmpfs world /sys/class
    mkdir -p /sys/class/virtio-ports/vport0p1 /sys/class/virtio-ports/vport1p1
    echo other >/sys/class/virtio-ports/vport0p1/name
    echo qemu-vp.0 >/sys/class/virtio-ports/vport1p1/name
    mkfifo /dev/vport1p1.in /dev/vport1p1.out
}

# qemu() - a script that plays QEMU: joins its chardev to the guest's device
qemu() {
    cat >/usr/local/bin/qemu-system-x86_64 <<'END'
#!/bin/sh
option() { printf '%s\n' "$1" | tr , '\n' | sed -n "s/^$2=//p"; }
for arg; do
    case $arg in
    socket,* | pipe,*) chardev=$arg ;;
    virtserialport,*)
        [ "$(cat /sys/class/virtio-ports/vport1p1/name)" = \
            "$(option "$arg" name)" ] || exit 1
        port=/dev/vport1p1
        device="OPEN:$port.out,rdonly!!OPEN:$port.in,wronly" ;;
    isa-serial,*)
        device=PTY,link=/dev/ttyS$(option "$arg" index),raw,echo=0,wait-slave ;;
    esac
done
path=$(option "$chardev" path)
case $chardev in
*fd=*) exec qemu-vp -c "fd:$(option "$chardev" fd):-" -i ssh:127.0.0.1:22 ;;
*server=on*) exec socat "UNIX-LISTEN:$path" "$device" ;;
pipe,*)
    until [ -p "$path.in" ] && [ -p "$path.out" ]; do sleep 0.1; done
    exec socat "OPEN:$path.in!!OPEN:$path.out" "$device" ;;
*reconnect-ms=*) exec socat "UNIX-CONNECT:$path,retry=300,interval=0.1" "$device" ;;
esac
END
    chmod 755 /usr/local/bin/qemu-system-x86_64
    mkdir -p /run/vm1
    ports
}

# check_init() - start, stop and the rest by an init script: "$@ start"
check_init() {
    guest
    config /etc/qemu-vp.conf
    not "$@" status || fail 'status before the start'
    "$@" start
    until_ok echoes 9022
    "$@" status
    pid=$(cat /run/qemu-vp.pid)

    echo oforward ssh:127.0.0.1:9023 >>/etc/qemu-vp.conf
    "$@" reload
    until_ok echoes 9023
    echoes 9022
    [ "$(cat /run/qemu-vp.pid)" = "$pid" ] || fail 'reload is no restart'

    "$@" restart
    until_ok echoes 9022
    not kill -0 "$pid" 2>/dev/null || fail 'it outlives restart'

    pid=$(cat /run/qemu-vp.pid)
    "$@" stop
    not kill -0 "$pid" 2>/dev/null || fail 'it outlives stop'
    not echoes 9022 || fail 'somebody serves after stop'
    not "$@" status || fail 'status after stop'
    [ ! -e /run/qemu-vp.pid ] || fail 'the pid file outlives stop'
    "$@" stop || fail 'stopping what is stopped is an error'
}

# check_crash() - what is left behind doesn't mislead an init script
check_crash() {
    config /etc/qemu-vp.conf
    "$@" start
    kill -9 "$(cat /run/qemu-vp.pid)"
    until_ok not "$@" status
    "$@" stop
    "$@" start
    kill -9 "$(cat /run/qemu-vp.pid)"
    until_ok not "$@" status
    "$@" restart
    until_ok echoes 9022
    echo 1 >/run/qemu-vp.pid            # another process by now
    not "$@" status || fail 'process 1 is taken for qemu-vp'
    "$@" stop
    not "$@" reload || fail 'another process is told to reload'
}

# ---- the recipes ---------------------------------------------------------

recipe_sysv() {
    put_script SysV: /etc/init.d/qemu-vp
    check_init /etc/init.d/qemu-vp
    not /etc/init.d/qemu-vp start-me 2>/dev/null || fail 'a wrong word is fine'
    /etc/init.d/qemu-vp start
    pid=$(cat /run/qemu-vp.pid)
    /etc/init.d/qemu-vp start || fail 'a second start is an error'
    [ "$(cat /run/qemu-vp.pid)" = "$pid" ] || fail 'started twice'
    /etc/init.d/qemu-vp stop
    check_crash /etc/init.d/qemu-vp
}

# The same by the shell of small guests
recipe_sysv_busybox() {
    put_script SysV: /etc/init.d/qemu-vp
    busybox sed -i '1s,.*,#!/run/sh,' /etc/init.d/qemu-vp
    ln -s "$(command -v busybox)" /run/sh
    check_init /etc/init.d/qemu-vp
    check_crash /etc/init.d/qemu-vp
}

recipe_openrc() {
    need openrc-run
    put_script OpenRC: /etc/init.d/qemu-vp
    # as booting would leave it
    for dir in daemons exclusive failed options scheduled started starting \
        stopping; do
        mkdir -p /run/openrc/$dir
    done
    mkdir -p /etc/insserv.conf.d
    touch /run/openrc/softlevel /etc/rc.conf /etc/insserv.conf
    check_init /etc/init.d/qemu-vp
}

# busybox init, as process 1 of a guest: it starts qemu-vp, and starts it again
recipe_busybox() {
    put 'busybox init:' /etc/inittab
    ports
    ln -s vport1p1.in /dev/host.out
    ln -s vport1p1.out /dev/host.in
    guest_service
    unshare -p -f --kill-child busybox init </dev/null &
    qemu-vp -c virtserial-open:/dev/host:- -o ssh:127.0.0.1:9022 &
    until_ok echoes 9022
    pid=$(pgrep -f '^/usr/local/bin/qemu-vp -c virtserial-open:qemu-vp.0')
    kill -9 "$pid"
    until_ok echoes 9022
    not kill -0 "$pid" 2>/dev/null || fail 'it outlives SIGKILL'
}

# exec_start() - the words of unit $1's ExecStart, for instance vm1; makes its
# RuntimeDirectory
exec_start() {
    mkdir -p "/run/$(sed -n 's/^RuntimeDirectory=//p' "$1")"
    sed -n -e 's/%i/vm1/g' -e 's/^ExecStart=//p' "$1"
}

# notices() - play systemd, and keep what it is told in /run/notices
notices() {
    socat -u UNIX-RECV:/run/notify OPEN:/run/notices,creat,append &
    until_ok [ -S /run/notify ]
}

# confined() - with the capabilities that $unit leaves, and no more
confined() {
    caps=-all
    # shellcheck disable=SC2013 # words
    for cap in $(sed -n 's/^CapabilityBoundingSet=//p' "$unit"); do
        caps=$caps,+$(echo "${cap#CAP_}" | tr '[:upper:]' '[:lower:]')
    done
    exec setpriv --no-new-privs --inh-caps=-all --bounding-set="$caps" "$@"
}

# What systemd has to say about the units, and ExecStart in its surroundings
recipe_systemd() {
    host=/etc/systemd/system/qemu-vp@.service
    put 'systemd, host;' $host
    put 'systemd, guest;' /etc/systemd/system/qemu-vp-guest.service
    config /etc/qemu-vp/vm1.conf
    if command -v systemd-analyze >/dev/null; then
        cp $host /run/qemu-vp@vm1.service
        for unit in /run/qemu-vp@vm1.service \
            /etc/systemd/system/qemu-vp-guest.service; do
            systemd-analyze verify --man=no $unit >/run/said 2>&1 ||
                { cat /run/said; fail "systemd refuses $unit"; }
            [ ! -s /run/said ] || { cat /run/said; fail "in $unit"; }
            # an exposure of 2.0 at most, of 10; systemd 250 is the first to tell
            systemd-analyze --help | grep -q -e --offline || continue
            systemd-analyze security --offline=true --threshold=20 --no-pager \
                $unit >/run/said 2>&1 || { cat /run/said; fail "$unit is open"; }
        done
        echo Nonsense=yes >>/run/qemu-vp@vm1.service
        systemd-analyze verify --man=no /run/qemu-vp@vm1.service 2>&1 |
            grep -q Nonsense || fail 'systemd says nothing about nonsense'
    fi

    # QEMU's socket belongs to another user
    guest
    until_ok [ -S /run/vm1/vp.sock ]
    [ -n "${VP_MAPPED-}" ] || chown 65534:65534 /run/vm1/vp.sock
    chmod 755 /run/vm1/vp.sock
    unit=$host
    notices
    # shellcheck disable=SC2046 # ExecStart is words
    NOTIFY_SOCKET=/run/notify confined $(exec_start $host) &
    MAINPID=$!
    until_ok grep -q READY=1 /run/notices
    until_ok echoes 9022
    echo oforward ssh:127.0.0.1:9023 >>/etc/qemu-vp/vm1.conf
    reload=$(sed -n -e 's/%i/vm1/g' -e 's/^ExecReload=//p' $host)
    eval "set -e; $reload"
    until_ok echoes 9023
    echo nonsense >>/etc/qemu-vp/vm1.conf
    not sh -ec "$reload" 2>/dev/null || fail 'a wrong init file is reloaded'
    sed -i '/^nonsense/d' /etc/qemu-vp/vm1.conf
    kill $MAINPID
    wait $MAINPID
    until_ok grep -q STOPPING=1 /run/notices

    # not there, as the README says
    if [ -z "${VP_MAPPED-}" ]; then
        echo user nobody >>/etc/qemu-vp/vm1.conf
        # shellcheck disable=SC2046 # ExecStart is words
        if (confined $(exec_start $host)) 2>/run/said; then
            fail 'user works in the unit'
        fi
        grep -q 'Operation not permitted' /run/said ||
            { cat /run/said; fail 'user is not what is wrong'; }
        sed -i 's/^CapabilityBoundingSet=/&CAP_SETUID CAP_SETGID CAP_CHOWN /' \
            $host
        echo oforward ssh:/run/ssh:-,mode=0660,group=daemon \
            >>/etc/qemu-vp/vm1.conf
        : >/run/notices
        chmod 777 /run/notify           # as systemd's
        # shellcheck disable=SC2046 # ExecStart is words
        NOTIFY_SOCKET=/run/notify confined $(exec_start $host) &
        until_ok grep -q READY=1 /run/notices
        [ "$(stat -c '%a %U %G' /run/ssh)" = '660 nobody daemon' ] ||
            fail 'the socket is not as it was asked for'
        kill $!
    fi
}

# The socket unit's settings, played by systemd-socket-activate; the daemon has
# no capability at all
recipe_systemd_socket() {
    need systemd-socket-activate
    unit=/etc/systemd/system/qemu-vp@vm1.socket
    put 'systemd as the one' $unit
    put 'systemd, host;' /etc/systemd/system/qemu-vp@.service
    if command -v systemd-analyze >/dev/null; then
        systemd-analyze verify --man=no $unit >/run/said 2>&1 ||
            { cat /run/said; fail "systemd refuses $unit"; }
        [ ! -s /run/said ] || { cat /run/said; fail "in $unit"; }
    fi
    guest_service
    mkdir -p /run/vm1
    qemu-vp -q -c unix-listen:/run/vm1/vp.sock:- -i http:127.0.0.1:22 &
    until_ok [ -S /run/vm1/vp.sock ]
    config /etc/qemu-vp/vm1.conf
    sed -n 's/.*"\(oforward http:[^"]*\)".*/\1/p' /README >>/etc/qemu-vp/vm1.conf
    # shellcheck disable=SC2046 # ExecStart is words
    systemd-socket-activate -l "$(sed -n 's/^ListenStream=//p' $unit)" \
        --fdname="$(sed -n 's/^FileDescriptorName=//p' $unit)" \
        setpriv --no-new-privs --inh-caps=-all --bounding-set=-all \
        $(exec_start /etc/systemd/system/qemu-vp@.service) >/run/said 2>&1 &
    until_ok grep -q ' as 3' /run/said
    echoes 80 || { cat /run/said; fail 'who starts it is not served'; }
    echoes 80
    grep -q 'oforward http: listening on 127.0.0.1:80' /run/said ||
        { cat /run/said; fail 'it is another that listens'; }
}

# The guest's unit, beside a host that has QEMU's socket
recipe_systemd_guest() {
    unit=/etc/systemd/system/qemu-vp-guest.service
    put 'systemd, guest;' $unit
    qemu
    guest_service
    start 'A virtio-serial channel'
    notices
    # shellcheck disable=SC2046 # ExecStart is words
    NOTIFY_SOCKET=/run/notify confined $(exec_start $unit) &
    MAINPID=$!
    until_ok grep -q READY=1 /run/notices
    until_ok echoes 9022
    kill $MAINPID
    wait $MAINPID
    until_ok grep -q STOPPING=1 /run/notices
}

# The rule, as udev reads it; and as it acts, on a device that is here
recipe_udev() {
    need udevadm
    rule=/etc/udev/rules.d/90-qemu-vp.rules
    put 'systemd, guest;' $rule
    if udevadm verify --help >/dev/null 2>&1; then
        udevadm verify $rule
    fi
    null=/sys/devices/virtual/mem/null
    udevadm test $null >/run/said 2>&1 || :
    grep -q "Reading rules file: $rule" /run/said || { cat /run/said; fail; }
    not grep "$rule:" /run/said || fail 'udev complains about the rule'
    sed -i 's/"virtio-ports"/"mem"/; s/ATTR{name}=="[^"]*"/KERNEL=="null"/' \
        $rule
    udevadm test $null 2>/dev/null >/run/said || :
    grep -q '^ *SYSTEMD_WANTS=qemu-vp-guest.service$' /run/said ||
        { cat /run/said; fail 'the rule starts nothing'; }
    grep -q '^ *TAGS=.*:systemd:' /run/said || fail 'systemd is not told'
}

recipe_virtio() {
    qemu
    guest_service
    start 'A virtio-serial channel'
    start Guest:
    until_ok echoes 9022
}

recipe_serial() {
    qemu
    guest_service
    start 'A serial line'
    until_ok echoes 9022
}

recipe_fifos() {
    qemu
    guest_service
    start 'FIFOs instead of a socket'
    until_ok echoes 9022
}

recipe_reconnect() {
    qemu
    guest_service
    start 'QEMU as the connecting side'
    start Guest:
    until_ok echoes 9022
}

# A descriptor that both inherit: ends on both sides when QEMU does
recipe_descriptor() {
    qemu
    guest_service
    start 'A descriptor that both inherit'
    socat=$!
    until_ok echoes 9022
    kill "$(pgrep -f '^qemu-vp -c fd:0:- -i')"
    wait $socat || :
    until_ok not pgrep -f '^qemu-vp' >/dev/null
}

# ssh_start() - a real sshd in the guest, of the host key that name $1 goes by
ssh_start() {
    [ -z "${VP_MAPPED-}" ] || pass_over root, for sshd
    need ssh
    PATH=$PATH:/usr/sbin:/sbin need sshd
    mkdir -p /root/.ssh
    chmod -R go= /root
    ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
    cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
    sed -i 's/^root:[^:]*/root:x/' /etc/passwd
    echo root:x:1:0:99999:7::: >/etc/shadow     # not locked
    mkdir -p /etc/ssh /run/sshd
    ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/host_key
    echo "$1 $(cat /etc/ssh/host_key.pub)" >/root/.ssh/known_hosts
    printf '%s\n' 'ListenAddress 127.0.0.1:22' 'HostKey /etc/ssh/host_key' \
        'UsePAM no' 'PidFile none' 'PermitRootLogin prohibit-password' \
        >/etc/ssh/sshd_config
    "$(PATH=$PATH:/usr/sbin:/sbin command -v sshd)" -D -e &
    qemu
}

# ssh_works() - a command's output and status come from host $1
ssh_works() {
    until_ok ssh -o BatchMode=yes "$1" true
    status=0
    said=$(echo hello | ssh -o BatchMode=yes "$1" 'cat; exit 3') || status=$?
    [ "$said $status" = 'hello 3' ] || fail 'not what the guest says'
}

recipe_ssh() {
    ssh_start vm1
    put 'ssh to the guest by name' /root/.ssh/config ''
    start 'A virtio-serial channel'
    start Guest:
    ssh_works vm1
}

# guest_goes() - and comes again; is that seen?
guest_goes() {
    kill "$(pgrep -f '^qemu-vp -q -c unix-listen')"
    until_ok not pgrep -f '^qemu-vp -q -c unix-listen' >/dev/null
    guest
    sh /run/waiting
    grep -q 'vm1 is gone: reason=' /run/seen
}

# Both commands for a script, and the loop
recipe_wait() {
    mkdir -p /run/qemu-vp
    printf '#!/bin/sh\necho "$@" >/run/ssh\n' >/usr/local/bin/ssh
    chmod 755 /usr/local/bin/ssh
    block 'In a script, wait for a guest' >/run/script
    sed '/-x watch/,$d' /run/script >/run/waiting
    sed -n '/-x watch/,$p' /run/script >/run/watching
    qemu-vp -c unix-connect:/run/vm1/vp.sock:- \
            -m /run/qemu-vp/vm1.monitor &
    until_ok test -S /run/qemu-vp/vm1.monitor
    sh /run/waiting &
    waiting=$!
    sh /run/watching >/run/seen &
    guest
    wait "$waiting" || fail "the script ends with $?"
    [ "$(cat /run/ssh)" = "vm1 uptime" ] || fail "no ssh"
    until_ok guest_goes
}

# The same through the guest's own socket: passed to ssh, and by a pipe; and as
# systemd 256 does it, which leaves the line "OK NUMBER" to ssh
recipe_ssh_dial() {
    ssh_start vm1.vm
    mkdir -p /run/qemu-vp
    channel_with 'or to any of a family'
    start Guest:
    block 'or to any of a family' | sed '1,/^$/d' >/root/.ssh/config
    ssh_works vm1.vm
    sed -i -e 's/ -F / /' -e /ProxyUseFdpass/d /root/.ssh/config
    ssh_works vm1.vm
    # shellcheck disable=SC2016 # $1 is the script's
    printf '%s\n' '#!/bin/sh' '{ echo CONNECT ssh; cat; } |' \
        'socat -t 30 - "UNIX:/run/qemu-vp/$1"' >/usr/local/bin/proxy
    chmod 755 /usr/local/bin/proxy
    sed -i 's/ProxyCommand .*/ProxyCommand proxy %h/' /root/.ssh/config
    ssh_works vm1.vm
}

# web() - the host and the guest of the web servers' recipes
web() {
    qemu
    qemu-system-x86_64 -device virtserialport,name=qemu-vp.0 -chardev \
        socket,path=/run/vm1/vp.sock,server=on &
    start 'A web server in the guest'
}

# named() - a client from 127.0.0.7 is in the web server's log, file $1
named() {
    until_ok sh -c 'printf "GET / HTTP/1.0\\r\\n\\r\\n" |
        socat -t 30 - TCP:127.0.0.1:9080,bind=127.0.0.7 2>/dev/null |
        grep -q "200 OK"'
    until_ok grep -q "^127\.0\.0\.7[: ]" "$1"
    not grep -v '^127\.0\.0\.7[: ]' "$1"
}

recipe_nginx() {
    need nginx
    web
    mkdir -p /run/nginx
    put nginx: /run/nginx/server ''
    sed -i s,/var/www/html,/run/nginx, /run/nginx/server
    echo hello >/run/nginx/index.html
    {
        echo 'user root root; pid /run/nginx/pid; events { }'
        echo 'http { access_log /run/nginx/log;'
        for name in client_body proxy fastcgi uwsgi scgi; do
            echo "${name}_temp_path /run/nginx/$name;"
        done
        echo 'include /run/nginx/server; }'
    } >/run/nginx/conf
    nginx -e stderr -c /run/nginx/conf -g 'daemon off; master_process off;' &
    named /run/nginx/log
}

recipe_haproxy() {
    need haproxy
    web
    put haproxy: /run/frontend ''
    {
        printf '%s\n' global '    log stdout format raw local0' defaults \
            '    log global' '    option tcplog' '    timeout client 30s' \
            '    timeout server 30s' '    timeout connect 30s'
        cat /run/frontend
        printf '%s\n' 'backend servers' '    mode http' \
            '    http-request return status 200'
    } >/run/haproxy.cfg
    haproxy -db -f /run/haproxy.cfg >/run/haproxy.log &
    named /run/haproxy.log
}

# What apt would ask is a service that sends back what it gets
recipe_apt() {
    socat TCP-LISTEN:3142,bind=127.0.0.2,reuseaddr,fork EXEC:cat &
    mkdir -p /etc/apt/apt.conf.d
    # there is one loopback here for host and guest
    sed -i 's/-i apt:127.0.0.1:/-i apt:127.0.0.2:/' /README
    qemu
    channel_with 'apt in the guest'
    until_ok echoes 3142
    until_ok [ -s /etc/apt/apt.conf.d/90proxy ]
    if command -v apt-config >/dev/null; then
        [ "$(apt-config -c /etc/apt/apt.conf.d/90proxy dump \
            Acquire::http::Proxy)" = \
            'Acquire::http::Proxy "http://127.0.0.1:3142";' ]
    fi
}

recipe_guest_agent() {
    need qemu-ga
    mkdir -p /var /run/qemu-vp
    [ -e /var/run ] || ln -s /run /var/run
    qemu
    channel_with "QEMU's guest agent"
    block "QEMU's guest agent" |
        sed -n 's/^echo.*/& 2>\&1 | grep -q return/p' >/run/ask
    [ -s /run/ask ]
    until_ok sh /run/ask
    pkill -x qemu-ga
}

# syslog_comes() - a line of a program in the guest is in the host's file
syslog_comes() {
    echo '<13>Nov 28 09:00:00 vm1 app: hello' |
        socat - UNIX-SENDTO:/run/guest.log && grep -q 'app: hello' /run/log
}

# There is one loopback here for host and guest: the host's rsyslog has another
# address of it
recipe_syslog() {
    need rsyslogd
    sed -i -e 's/-i syslog:127.0.0.1:/-i syslog:127.0.0.2:/' \
        -e '/imtcp/s/address="127.0.0.1"/address="127.0.0.2"/' /README
    put "The guest's syslog" /etc/rsyslog.d/10-guests.conf
    put "The guest's syslog" /etc/rsyslog.d/90-host.conf
    {
        echo 'module(load="imuxsock" SysSock.Name="/run/guest.log")'
        cat /etc/rsyslog.d/90-host.conf
    } >/run/guest.conf
    {
        cat /etc/rsyslog.d/10-guests.conf
        echo '*.* /run/log'
    } >/run/host.conf
    qemu
    channel_with "The guest's syslog"
    rsyslogd -n -i /run/host.pid -f /run/host.conf &
    rsyslogd -n -i /run/guest.pid -f /run/guest.conf &
    until_ok syslog_comes
}

recipe_logrotate() {
    need logrotate
    put 'Log rotation' /etc/logrotate.d/qemu-vp
    config /etc/qemu-vp.conf
    mkdir -p /var/log
    qemu-vp -C /etc/qemu-vp.conf -d -l /var/log/qemu-vp.log -f /run/qemu-vp.pid
    grep -q 'listening on' /var/log/qemu-vp.log
    for _ in 1 2; do
        logrotate -f -s /run/logrotate.state /etc/logrotate.d/qemu-vp
        until_ok grep -q reloaded /var/log/qemu-vp.log
        not grep 'listening on' /var/log/qemu-vp.log
    done
    gzip -dc /var/log/qemu-vp.log.2.gz | grep -q 'listening on'
}

recipe_libvirt() {
    need xmllint
    block 'libvirt, the channel' >/run/channel.xml
    [ -s /run/channel.xml ] || fail 'the README has no XML'
    xmllint --noout /run/channel.xml
    [ "$(xmllint --xpath 'string(/channel/source/@path)' /run/channel.xml)" = \
        /run/vm1/vp.sock ]
}

# Each command of the README is one that qemu-vp takes
recipe_commands() {
    count=0
    join </README | sed -n -e 's/^    //' -e 's/^\(guest\|host\): *//' \
        -e 's/^ExecStart=.usr.local.bin.//' -e 's/%i/vm1/' \
        -e '/^qemu-vp -[a-z-]/p' >/run/commands
    config /etc/qemu-vp/vm1.conf
    echo libvirt-qemu:x:900: >>/etc/group       # as libvirt makes it
    while read -r command options; do
        case $options in *' -x '*) continue ;; esac
        (set -f; eval "$command $options --dump-config") >/run/said 2>&1 ||
            { cat /run/said; fail "qemu-vp $options"; }
        count=$((count + 1))
    done </run/commands
    [ $count -ge 8 ] || fail "found only $count commands"
}

# make install put it here; and nothing is left after make uninstall
recipe_install() {
    cmp /README /usr/local/share/doc/qemu-vp/README
    [ "$(stat -c %a /usr/local/bin/qemu-vp)" = 755 ]
    /usr/local/bin/qemu-vp -V | grep -q '^qemu-vp '
    [ "$(cd /stage && find . -type f | sort)" = "$(printf '%s\n' \
        ./opt/vp/bin/qemu-vp ./opt/vp/share/doc/qemu-vp/README \
        ./opt/vp/share/man/man8/qemu-vp.8)" ]
    [ -z "$(find /unstaged -type f)" ]
    grep -q '^ check, test ' /listed || fail 'make help lists no targets'
    grep -q '^rm -rf build qemu-vp$' /cleaning
    grep -q 'no nobody-has-this-gcc' /refused ||
        fail 'configure makes do without the compiler that it is to use'
    grep -q '^rm -rf config.mak' /cleaning
}

# What make installs for an init system is the recipe, with the program's place
recipe_install_services() {
    for service in systemd systemd-guest sysv openrc; do
        case $service in
        systemd) set -- /etc/systemd/system/qemu-vp@.service 'systemd, host;' ;;
        systemd-guest) set -- /etc/systemd/system/qemu-vp-guest.service \
            'systemd, guest;' ;;
        sysv) set -- /etc/init.d/qemu-vp SysV: ;;
        openrc) set -- /etc/init.d/qemu-vp OpenRC: ;;
        esac
        put "$2" "/recipe$1" "$1"
        sed 's,/usr/local/bin/,/opt/vp/bin/,' "/recipe$1" |
            cmp - "/stage-$service$1"
    done
    [ -x /stage-sysv/etc/init.d/qemu-vp ]
    [ -s /stage-systemd-guest/etc/udev/rules.d/90-qemu-vp.rules ]
}

words() { tr -s ' ' '\n' | grep .; }

# The manual page is right, and has the README's words, all of them, in order
recipe_manual() {
    need mandoc
    page=/usr/local/share/man/man8/qemu-vp.8
    mandoc -T lint -W warning $page
    mandoc -T ascii $page | sed -e "s/.$(printf '\010')//g" -e '1d;$d' |
        words >/run/page
    words </README | diff - /run/page
}

# ---- the world -----------------------------------------------------------

# made() - make with these words, as if by a user
made() { env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL make -s -C "$VP_TOP" "$@"; }

# installed() - make $3, staged in $1, for PREFIX $2
installed() { made "$3" DESTDIR="$1" PREFIX="$2"; }

# world_make() - in $root for recipe $1; this process is alone in its namespaces
world_make() {
    mkdir -p "$root"
    cd "$root"
    mkdir proc sys dev run tmp etc root
    for name in /bin /sbin /lib* /usr; do
        if [ -L "$name" ]; then
            cp -P "$name" .
        elif [ -d "$name" ]; then
            mkdir ".$name"
            mount --rbind "$name" ".$name"
        fi
    done
    for name in passwd group hosts mandoc.conf services nsswitch.conf ld.so.cache rc.conf \
        alternatives; do
        [ ! -e "/etc/$name" ] || cp -RP "/etc/$name" etc
    done
    for name in dev run tmp usr/local; do
        # not sticky: who doesn't own /dev/null could write there by no O_CREAT
        mount -t tmpfs -o mode=755 world $name
    done
    for name in null zero full random urandom; do
        touch dev/$name
        mount --bind /dev/$name dev/$name
    done
    mkdir dev/pts
    mount -t devpts -o newinstance,ptmxmode=0666 world dev/pts
    ln -s pts/ptmx dev/ptmx
    mount --rbind /sys sys
    mount -t proc world proc
    busybox ip link set lo up 2>/dev/null || busybox ifconfig lo up
    cp "$VP_TOP/README" "$0" .
    installed "$root" /usr/local install
    cp "${QEMU_VP:-$VP_TOP/qemu-vp}" usr/local/bin/qemu-vp
    if [ "$1" = install_services ]; then
        for service in systemd systemd-guest sysv openrc; do
            installed "$root/stage-$service" /opt/vp "install-$service"
        done
    fi
    if [ "$1" = install ]; then
        installed "$root/stage" /opt/vp install
        installed "$root/unstaged" /opt/vp install
        installed "$root/unstaged" /opt/vp uninstall
        made help >listed
        made -n distclean >cleaning
        mkdir elsewhere
        (cd elsewhere && "$VP_TOP/configure" --host=nobody-has-this) \
            >refused 2>&1 || :
    fi
}

case $1 in
--inside)
    recipe=$2
    root=$3
    world_make "$2"
    exec env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        chroot "$root" sh "/${0##*/}" --run "$2" ;;
--run)
    recipe=$2
    cd /
    "recipe_$2"
    echo "recipe $2: works" ;;
*)
    recipe=$1
    [ "$(id -u)" = 0 ] || export VP_MAPPED=-r
    # shellcheck disable=SC2086 # an option or none
    unshare ${VP_MAPPED-} -m -p -f -n mount -n -t tmpfs world /tmp ||
        pass_over namespaces and mounts of its own \
            '(CAP_SYS_ADMIN or user namespaces)'
    # shellcheck disable=SC2086 # an option or none
    exec unshare ${VP_MAPPED-} -m -p -f -n --kill-child sh "$0" --inside "$1" \
        "$2" ;;
esac
