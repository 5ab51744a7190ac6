#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# demo.sh - a web page through qemu-vp, on a machine without a virtual machine
#
# Two daemons joined by a unix socket stand for the two ends of a guest's
# channel: "far" is where the guest would be, with an HTTP server behind it;
# "near" is the host, where wget or curl fetches a page and a larger file.
# Each command is printed before it is run. The exit status is 0 if what came
# out is what went in. Nothing is left behind.

cd "${VP_TOP:-$(dirname "$0")/../..}" || exit 1

need() { printf 'The demo needs %s.\n' "$*" >&2; exit 1; }

[ -x ./qemu-vp ] || need './qemu-vp, which make builds'
command -v wget >/dev/null || command -v curl >/dev/null ||
    need 'wget or curl, packages of these names'
httpd=
! busybox --list 2>/dev/null | grep -qx httpd || httpd=busybox
[ -n "$httpd" ] || ! command -v python3 >/dev/null || httpd=python3
[ -n "$httpd" ] ||
    need 'an HTTP server: busybox or python3, packages of these names'

# A socket's path has about a hundred bytes.
dir=$(mktemp -d) || exit 1
[ ${#dir} -lt 90 ] || { rmdir "$dir"; dir=$(mktemp -d /tmp/vp.XXXXXX); } ||
    exit 1
pids=
no_proxy=127.0.0.1
export no_proxy

cleanup() {
    for pid in $pids; do
        kill "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

say() { printf '\n# %s\n' "$*"; }

die() {
    printf '\nThe demo failed: %s\n' "$*" >&2
    for log in "$dir"/*.log; do
        printf 'What %s said:\n' "$(basename "$log" .log)" >&2
        cat "$log" >&2
    done
    exit 1
}

# run() - print a command and run it
run() {
    printf '$ %s\n' "$*"
    "$@"
}

# start() - the same in the background, $1 being its name here: see $1.log
start() {
    log=$dir/$1.log
    shift
    printf '$ %s &\n' "$*"
    "$@" >"$log" 2>&1 &
    pids="$! $pids"
}

# await() - wait until command $1... succeeds, but not for more than 10 s
await() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || die "in vain for 10 s: $*"
        sleep 0.1
    done
}

# get() - fetch URL $1 into file $2
if command -v wget >/dev/null; then
    get() { run wget -q -t 1 -T 20 -O "$2" "$1"; }
else
    get() { run curl -fsS -m 20 -o "$2" "$1"; }
fi
if [ $httpd = busybox ]; then
    serve() { start server busybox httpd -f -p "127.0.0.1:$1" -h "$dir/www"; }
else
    serve() {
        start server python3 -m http.server -b 127.0.0.1 -d "$dir/www" "$1"
    }
fi

port_taken() { grep -qi 'address.* in use' "$dir/server.log"; }
server_decided() { port_taken || get "http://127.0.0.1:$port/" /dev/null; }

mkdir "$dir/www" || exit 1
echo 'Hello from the far side of the channel.' >"$dir/www/index.html"
head -c 33554432 /dev/urandom >"$dir/www/file"

say 'The far side: an HTTP server, and qemu-vp, which lets it be reached as "http".'
port=$((20000 + $$ % 10000))
serve $port
await server_decided
while port_taken; do
    port=$((port + 1))
    serve $port
    await server_decided
done
start far ./qemu-vp -c "unix-listen:$dir/channel:-" -i "http:127.0.0.1:$port"
await grep 'listening on' "$dir/far.log"

say 'The near side: qemu-vp at the other end of the channel, with a port for "http".'
start near ./qemu-vp -c "unix-connect:$dir/channel:-" -o http:127.0.0.1:0
await grep 'channel up' "$dir/near.log"
near=$(sed -n 's/.*oforward http: listening on //p' "$dir/near.log")

say 'A page through the channel:'
get "http://$near/" "$dir/page" || die 'the page did not come'
cat "$dir/page"
cmp "$dir/page" "$dir/www/index.html" || die 'the page is not the one there'

say '32 MiB of random bytes through it, and what they were:'
get "http://$near/file" "$dir/file" || die 'the file did not come'
run sha256sum "$dir/file" "$dir/www/file"
cmp "$dir/file" "$dir/www/file" || die 'what came out is not what went in'

say 'What the daemons had to say:'
sed 's/^/far:  /' "$dir/far.log"
sed 's/^/near: /' "$dir/near.log"

say 'The same bytes came out as went in. Cleaning up.'
