#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# demo.sh - web pages and a shell from a guest that has no network
#
# QEMU with a virtio-serial port, a daemon on each side of it, then wget and
# ssh from the host. Every command is printed before it is run; those of the
# guest go through a second port, which has nothing to do with qemu-vp. The
# exit status is 0 if all came out as it went in. Nothing is left behind but
# the packages in cache/, which APT=1 allows it to download (see image.sh).

set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
top=$(cd "$here/../.." && pwd)
GUEST_MACHINE=x86_64
# shellcheck source=image.sh
. "$here/image.sh"
# shellcheck source=vm.sh
. "$here/vm.sh"

say() { printf '\n# %s\n' "$*"; }

# show() - a command as one could type it, options with their values in lines
# that fit
show() {
    local word line=$1 group=
    shift
    for word in "$@" -; do
        case $word in
        -*)
            if [ $((${#line} + ${#group})) -gt 76 ]; then
                printf '%s \\\n' "$line"
                line="   "
            fi
            line=$line$group
            group=
            ;;
        *[\;\ ]*) word="'$word'" ;;
        esac
        group="$group $word"
    done
    printf '%s\n' "$line"
}

# start() - a command of the host in the background, under a name
start() {
    local name=$1
    shift
    show 'host$' "$@" '&'
    run "$name" "$@"
}

host() {
    show 'host$' "$@"
    "$@" || fail "this command failed"
}

guest() {
    printf 'guest# %s\n' "$*"
    g "${*//\\$'\n'/ }" || fail "this command failed"
}

# What went wrong is in these, if it did.
end_demo() {
    local status=$? log
    end_all
    for log in host.out guest.log console.log qemu.out; do
        [ $status != 0 ] && [ -s "$D/$log" ] || continue
        printf '\nThe end of %s:\n' $log
        tail -n 20 "$D/$log"
    done >&2
    rm -rf "$D"
}

make_image
short_tmp
D=$(mktemp -d "$TMPDIR/vp-demo.XXXXXX") || exit 1
trap end_demo EXIT
trap 'exit 1' HUP INT TERM
cd "$D" || exit 1
mkdir bin
cp "$kernel" vmlinuz
cp "$initrd" initrd
cp "$vp" bin/
cp "$cache/id" key
PATH=$D/bin:$PATH
vm=.

say "A guest with a virtio-serial port named test2, and without a network:"
start qemu qemu-system-x86_64 -accel tcg -M q35 -cpu max -m 384M \
    -nodefaults -no-user-config -display none \
    -kernel vmlinuz -initrd initrd \
    -append "quiet panic=-1 console=ttyS0" -serial file:console.log \
    -device virtio-serial \
    -chardev socket,path=ctl.sock,server=on,wait=off,id=ctl \
    -device virtserialport,chardev=ctl,name=ctl \
    -chardev file,path=guest.log,id=log -device virtconsole,chardev=log \
    -chardev socket,path=test2.sock,server=on,wait=off,id=test2 \
    -device virtserialport,chardev=test2,name=test2
wait_guest

say "In the guest: a web server, an ssh server, and qemu-vp in front of them:"
guest 'head -c 30000000 /dev/urandom >/www/file'
guest 'echo "Hello from $(uname -sr), up for $(cut -d. -f1 /proc/uptime) s." \
    >/www/index.html'
guest 'dropbearkey -t ed25519 -f /etc/dropbear/key >/dev/null 2>&1'
guest 'httpd -p 127.0.0.1:80 -h /www'
guest 'dropbear -r /etc/dropbear/key -p 127.0.0.1:22'
guest 'qemu-vp -c virtserial-open:/dev/virtio-ports/test2:- \
    -i http:127.0.0.1:80 -i ssh:127.0.0.1:22 2>/dev/hvc0 &'

say "On the host: qemu-vp at the other end; its log names the ports it took:"
start host qemu-vp -c unix-connect:test2.sock:- \
    -o http:127.0.0.1:0 -o ssh:127.0.0.1:0
wait_for 30 grep -q 'channel up' host.out || fail "the channel does not come up"
http=$(sed -n 's/.*oforward http: listening on //p' host.out)
ssh=$(sed -n 's/.*oforward ssh: listening on //p' host.out)
grep 'listening on' host.out

say "A page and a file from the guest:"
host wget -q -t 1 -T 60 -O - "http://$http/"
host wget -q -t 1 -T 60 -O file "http://$http/file"
host sha256sum file
guest 'sha256sum /www/file' | tee sum
[ "$(sha256sum <file | cut -c 1-64)" = "$(grep -o '[0-9a-f]\{64\}' sum)" ] ||
    fail "the file arrived changed"

say "A command in the guest, by ssh:"
host ssh -F none -i key -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -p "${ssh##*:}" \
    root@127.0.0.1 'uname -a; free -m' </dev/null

say "What the daemons had to say:"
sed 's/^/host:  /' host.out
sed 's/^/guest: /' guest.log

say "All of it went through one virtio-serial port."
