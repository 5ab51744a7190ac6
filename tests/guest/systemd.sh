#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# systemd.sh - the recipes for systemd, in a Debian 13 that boots with it
#
# What "make install-systemd" and "make install-systemd-guest" install, and what
# the README has beside that, is in the guest before it boots. The way in is the
# guest's unit: ssh, through the port that udev sees. The host's unit runs in
# there as well, where another qemu-vp stands for QEMU and its guest.
#
# Takes root and mmdebstrap; APT=1 lets it download the guest, see image.sh. Logs
# and the console stay in a directory that is named if something fails.

set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
top=$(cd "$here/../.." && pwd)
GUEST_MACHINE=x86_64
# shellcheck source=image.sh
. "$here/image.sh"
# shellcheck source=vm.sh
. "$here/vm.sh"

# make_system() - the guest's disk, its kernel and that one's initrd
make_system() {
    local root=$D/root file
    # What is mounted for that goes with it, however it ends.
    unshare -m mmdebstrap --quiet --variant=minbase \
        --include=systemd,systemd-sysv,udev,openssh-server \
        --include=linux-image-cloud-amd64 \
        --aptopt='Acquire::Check-Valid-Until "false"' trixie "$root" ||
        fail "cannot install Debian 13"
    cp "$top/README" "$guest_build/"
    (unset MAKEFLAGS MAKELEVEL MFLAGS VP_TOP QEMU_VP &&
        make -C "$guest_build" install-systemd install-systemd-guest \
            DESTDIR="$root") >"$D/install.log" || fail "make install-systemd"
    for file in /etc/tmpfiles.d/vm1.conf \
        /etc/systemd/system/qemu-vp@vm1.socket; do
        recipe "  $file" >"$root$file"
    done
    recipe 'INIT FILE' >"$root/etc/qemu-vp/vm1.conf"
    printf '%s\n' libvirt-qemu:x:900:900::/:/usr/sbin/nologin \
        vp:x:901:65534::/:/usr/sbin/nologin >>"$root/etc/passwd"
    echo libvirt-qemu:x:900: >>"$root/etc/group"
    ssh-keygen -q -t ed25519 -N '' -f "$D/id"
    install -D -m 600 "$D/id.pub" "$root/root/.ssh/authorized_keys"
    cp "$root"/boot/vmlinuz-* "$D/vmlinuz"
    cp "$root"/boot/initrd.img-* "$D/initrd"
    truncate -s 2G "$D/disk"
    mkfs.ext4 -q -d "$root" "$D/disk" || fail "no disk"
    rm -rf --one-file-system "$root"
}

boot_system() {
    vm=$D
    run qemu "$qemu_program" -accel tcg -M q35 -cpu max -m 512M -nodefaults \
        -no-user-config -display none -kernel "$D/vmlinuz" -initrd "$D/initrd" \
        -append "root=/dev/vda rw quiet console=ttyS0" \
        -drive "file=$D/disk,format=raw,if=virtio" \
        -chardev "file,id=console,path=$D/console.log" -serial chardev:console \
        -monitor "unix:$D/mon.sock,server=on,wait=off" \
        -device virtio-serial,id=vs0 \
        -chardev "socket,id=vp,path=$D/vp.sock,server=on,wait=off" \
        -device virtserialport,bus=vs0.0,id=vp,chardev=vp,name=qemu-vp.0 \
        -chardev "socket,id=way,path=$D/way.sock,server=on,wait=off" \
        -device virtserialport,bus=vs0.0,chardev=way,name=way
    run host "$vp" -c "unix-connect:$D/vp.sock:-" -o ssh:127.0.0.1:0 \
        -l "$D/host-daemon.log"
    log_start=0
    ssh=$(port ssh) || exit 1
}

# inside() - a command in the guest, by ssh through its unit
inside() {
    ssh -F none -i "$D/id" -o BatchMode=yes -o ConnectTimeout=60 \
        -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o LogLevel=ERROR -p "${ssh##*:}" root@127.0.0.1 "$@"
}

# come() - wait until the guest's unit runs, and isn't the run of before
come() {
    wait_for 400 comes_anew || fail "the guest's unit doesn't come"
}

comes_anew() {
    local id
    id=$(inside systemctl show -P InvocationID qemu-vp-guest) &&
        [ -n "$id" ] && [ "$id" != "${invocation-}" ] && invocation=$id
}

# second_way() - a way in that doesn't take the unit, in $way
second_way() {
    inside systemd-run -q qemu-vp -q -c virtserial-open:way:- \
        -i ssh:127.0.0.1:22 || fail "systemd-run"
    mkdir "$D/way"
    run way "$vp" -c "unix-connect:$D/way.sock:-" -o ssh:127.0.0.1:0 \
        -l "$D/way/host-daemon.log"
    way=$(D=$D/way port ssh) || exit 1
}

# ended() - the guest's unit has ended in peace
ended() {
    [ "$(ssh=$way inside systemctl show -P ActiveState qemu-vp-guest)" = \
        inactive ]
}

guest_unit() {
    local line
    come
    second_way
    inside systemctl reload qemu-vp-guest || fail "the guest's unit: no reload"
    wait_for 60 inside 'journalctl -u qemu-vp-guest | grep reloaded' ||
        fail "the guest's unit is not reloaded"
    inside 'kill -9 $(systemctl show -P MainPID qemu-vp-guest)' 2>/dev/null
    come
    hmp device_del vp >/dev/null
    wait_for 200 ended || fail "the guest's unit outlives its port"
    line=$(hmp device_add \
        virtserialport,bus=vs0.0,id=vp,chardev=vp,name=qemu-vp.0)
    grep -qi error <<<"$line" && fail "device_add: $line"
    come
}

# host_unit() - a script of the guest; the words after "or" are what is wrong if
# it ends there
host_unit() {
    inside bash -s <<'END'
or() { what=$*; }
trap 'echo "host_unit: $what" >&2' ERR
set -eE
or 'no directory by tmpfiles.d'
[ "$(stat -c '%U %a' /run/vm1)" = 'libvirt-qemu 750' ]
systemd-run -q qemu-vp -q -i ssh:127.0.0.1:22 -i http:127.0.0.1:22 \
    -c unix-listen:/run/vm1/vp.sock:-,mode=0660,group=libvirt-qemu
conf=/etc/qemu-vp/vm1.conf
not() { ! "$@"; }
until_ok() {
    for _ in $(seq 600); do
        "$@" 2>/dev/null && return
        sleep 0.1
    done
    false
}
# an ssh server answers at port $1
answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1" && read -r -t 60 line <&3 &&
        [[ $line = SSH-2.0-* ]])
}
or 'it does not start'
systemctl enable -q --now qemu-vp@vm1
until_ok answers 9022
[ "$(stat -c '%U %a' /run/qemu-vp/vm1.monitor)" = 'root 600' ]
or 'reload'
echo oforward ssh:127.0.0.1:9023 >>$conf
systemctl reload qemu-vp@vm1
until_ok answers 9023
or 'reload of a wrong file is fine'
echo nonsense >>$conf
not systemctl reload qemu-vp@vm1 2>/dev/null
sed -i /nonsense/d $conf
answers 9022
or 'it does not come back'
pid=$(systemctl show -P MainPID qemu-vp@vm1)
kill -9 "$pid"
until_ok not kill -0 "$pid"
until_ok answers 9022
or 'not for another user'
mkdir /etc/systemd/system/qemu-vp@.service.d
printf '%s\n' '[Service]' User=vp SupplementaryGroups=libvirt-qemu \
    >/etc/systemd/system/qemu-vp@.service.d/user.conf
systemctl daemon-reload
systemctl restart qemu-vp@vm1
until_ok answers 9022
[ "$(stat -c %U /run/qemu-vp/vm1.monitor)" = vp ]
systemctl reload qemu-vp@vm1
or 'it does not stop'
systemctl stop qemu-vp@vm1
[ "$(systemctl show -P Result qemu-vp@vm1)" = success ]
or 'no socket of systemd'
echo oforward http:fd:http >>$conf
systemctl enable -q --now qemu-vp@vm1.socket
answers 80
systemctl -q is-active qemu-vp@vm1
systemctl stop qemu-vp@vm1.socket qemu-vp@vm1
or 'a usage error is tried again'
sed -i /fd:http/d $conf
echo nonsense >>$conf
not systemctl start qemu-vp@vm1 2>/dev/null
[ "$(systemctl show -P ActiveState qemu-vp@vm1)" = failed ]
[ "$(systemctl show -P ExecMainStatus qemu-vp@vm1)" = 2 ]
or 'systemd-analyze security'
systemd-analyze security --no-pager --threshold=20 qemu-vp@vm1 >/dev/null
systemd-analyze security --no-pager --threshold=20 qemu-vp-guest >/dev/null
END
}

# end_system() - the logs stay if it failed
end_system() {
    local status=$?
    end_all
    rm -rf --one-file-system "$D/root" "$D/disk"
    if [ $status = 0 ]; then
        rm -rf "$D"
    else
        tail -n 20 "$D"/{host-daemon,console}.log
        echo "Logs: $D"
    fi >&2
}

apt_updated=
may_apt || die "Debian 13 is the guest: APT=1 lets it be downloaded"
make_image
need mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs
short_tmp
D=$(mktemp -d "$TMPDIR/vp-systemd.XXXXXX") || exit 1
trap end_system EXIT
trap 'exit 1' HUP INT TERM
make_system
boot_system
guest_unit
host_unit || fail "the host's unit"
echo "ok systemd ($SECONDS s)"
