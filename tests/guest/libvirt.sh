# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# libvirt.sh - the recipe for libvirt, with a guest that it starts (sourced)
#
# This machine's libvirtd runs in namespaces of its own for mounts, processes and
# network: it neither sees nor changes what else there is, and nothing of it is
# left. The domain has the recipe's two channels, and one without <source>; each
# has a daemon on the host.

# start_libvirtd() - it finds one emulator and what it wants for networks, and does
# without what a container may lack: control groups, AppArmor or SELinux,
# systemd's machined. What goes without our channels may not go here
start_libvirtd() {
    local dir program
    "$(find_file busybox)" ip link set lo up || fail "no loopback of its own"
    for dir in /run /etc/libvirt /var/{lib,cache,log}/libvirt; do
        mkdir -p "$dir" && mount -n -t tmpfs -o mode=755 world "$dir" ||
            fail "no $dir of its own"
    done
    mkdir /run/bin /run/guest
    for program in "$qemu_program" nft iptables; do
        program=$(PATH=$PATH:/usr/sbin type -P $program) &&
            ln -s "$program" /run/bin/
    done
    # QEMU is not root here: this is where it finds what is the test's.
    mount -n --bind "$D" /run/guest
    chmod 755 /run/guest
    printf '%s\n' 'cgroup_controllers = [ ]' 'namespaces = [ ]' \
        'security_driver = "none"' 'stdio_handler = "file"' \
        >/etc/libvirt/qemu.conf
    printf '%s\n' 'auth_unix_ro = "none"' 'auth_unix_rw = "none"' \
        >/etc/libvirt/libvirtd.conf
    run libvirtd env PATH=/run/bin "$libvirtd"
    wait_for 120 virsh list ||
        pass_over "a libvirtd that runs: $(tail -n 3 "$D/libvirtd.out")"
    domain </dev/null >"$D/bare.xml"
    { virsh create --paused "$D/bare.xml" && virsh destroy vm1; } \
        >"$D/bare.out" 2>&1 ||
        pass_over "a libvirtd that starts a domain: $(tail -n 3 "$D/bare.out")"
}

# channels() - the recipe's as it stands, the same with the <source> for QEMU as
# the connecting side, and without one
channels() {
    local bind
    bind=$(recipe 'libvirt, the channel')
    echo "$bind"
    {
        echo "$bind" | sed '/<source/,$d'
        recipe 'libvirt with QEMU as' | grep '[<>]'
        echo "$bind" | sed '1,/<source/d'
    } | sed 's/vp.sock/connect.sock/; s/qemu-vp.0/qemu-vp.1/'
    echo "$bind" | sed '/<source/d; s/qemu-vp.0/qemu-vp.2/'
}

# domain() - one that boots our guest, with the channels of stdin
domain() {
    cat <<END
<domain type='qemu'>
  <name>vm1</name>
  <memory unit='MiB'>384</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/run/guest/kernel</kernel>
    <initrd>/run/guest/initrd</initrd>
    <cmdline>quiet panic=-1 console=ttyS0</cmdline>
  </os>
  <cpu mode='maximum'/>
  <devices>
    <emulator>$(type -P "$qemu_program")</emulator>
    <serial type='file'><source path='/run/guest/console.log'/></serial>
    <console type='file'>
      <source path='/run/guest/guest-daemon.log'/>
      <target type='virtio'/>
    </console>
    <channel type='unix'>
      <source mode='bind' path='/run/guest/ctl.sock'/>
      <target type='virtio' name='ctl'/>
    </channel>
$(cat)
    <memballoon model='none'/>
  </devices>
</domain>
END
}

# side() - the host's daemon for channel $2, under the name $1 and by command
# $3... if there is one
side() {
    local name=$1 channel=$2
    shift 2
    mkdir -p "$D/$name"
    # shellcheck disable=SC2016 # for the other shell
    run "$name" sh -c 'log=$1; shift; exec "$@" 2>>"$log"' - \
        "$D/$name/host-daemon.log" "$@" /run/guest/qemu-vp -c "$channel" \
        -o x:127.0.0.1:0 -i "y:$host_server"
}

# Who isn't root is in the group of libvirt's sockets.
bind_side() {
    side "$1" "unix-connect:$2:-" \
        setpriv --reuid=nobody --regid=nogroup --groups=libvirt-qemu
}

connect_side() {
    side connect "$(recipe 'libvirt with QEMU as' |
        sed -n 's/^ *qemu-vp -c \([^ ]*\).*/\1/p' |
        sed 's/vp.sock/connect.sock/')"
}

# carries() - the channel of the host's daemon $1 is guest's number $2: new
# connections work, in both directions, and so do transfers
carries() {
    log_start=${3:-0}
    x=$(D=$D/$1 port x) || exit 1
    y=127.0.0.1:700$2
    works 60
    load -n 4 -u "$small" -d "$small" -m -t 120 >"$D/load.out" ||
        fail "$1: transfers failed: $(cat "$D/load.out")"
}

# again() - daemon $1, killed, begins anew by $3...
again() {
    local name=$1 number=$2 lines
    shift 2
    end "$name" KILL
    lines=$(grep -c "" "$D/$name/host-daemon.log")
    "$@"
    carries "$name" "$number" "$lines"
}

libvirt() {
    local libvirtd chosen

    libvirtd=$(PATH=$PATH:/usr/sbin type -P libvirtd) && type -P virsh \
        >/dev/null || pass_over libvirt-daemon-system and libvirt-clients
    type -P systemd-tmpfiles >/dev/null || pass_over systemd-tmpfiles
    if [ $$ != 1 ]; then
        unshare -m -n -p -f --mount-proc true 2>/dev/null || pass_over \
            'namespaces and mounts of its own (CAP_SYS_ADMIN)'
        exec unshare -m -n -p -f --mount-proc --kill-child "$here/run.sh" --one \
            "libvirt-$kind" "$D" "$initrd" "$vp"
    fi
    cp "$kernel" "$D/kernel"
    cp "$initrd" "$D/initrd"
    cp "$vp" "$D/qemu-vp"
    start_libvirtd
    recipe '  /etc/tmpfiles.d/vm1.conf' >/run/vm1.conf
    systemd-tmpfiles --create /run/vm1.conf
    run hostserver "$probe" serve 127.0.0.1:0
    wait_for 10 grep -q listening "$D/hostserver.out"
    host_server=$(sed -n 's/listening //p' "$D/hostserver.out")
    connect_side
    wait_for 20 [ -S /run/vm1/connect.sock ] || fail "nobody listens for QEMU"
    channels | domain >"$D/vm1.xml"
    virsh create "$D/vm1.xml" || fail "libvirt doesn't start the domain:" \
        "$(tail -n 3 "$D/libvirtd.out" /var/log/libvirt/qemu/vm1.log)"
    pids[qemu]=$(cat /run/libvirt/qemu/vm1.pid)
    vm=/run/guest
    wait_guest
    rm "$D/kernel" "$D/initrd"

    start_guest_server
    guest_channel="virtserial-open:qemu-vp.0:-:1
        -c virtserial-open:qemu-vp.1:-:2 -c virtserial-open:qemu-vp.2:-:3"
    guest_daemon "-i x:127.0.0.1:7000:"{1,2,3} \
        "-o y:127.0.0.1:700"{1:1,2:2,3:3}
    chosen=$(virsh dumpxml vm1 |
        sed -n "s/.*<source.* path='\([^']*qemu-vp.2\)'.*/\1/p")
    [ -S "$chosen" ] || fail "no path without <source>: '$chosen'"
    bind_side bind /run/vm1/vp.sock
    bind_side chosen "$chosen"
    carries bind 1
    carries connect 2
    carries chosen 3
    again bind 1 bind_side bind /run/vm1/vp.sock
    again connect 2 connect_side
    note "libvirt $("$libvirtd" --version | sed 's/.* //') with all three"
    no_strangers
}
