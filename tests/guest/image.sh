# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# image.sh - what a guest is made of (sourced)
#
# Nothing but Debian packages: a kernel, busybox and a few servers with their
# libraries are downloaded once and unpacked, never installed, into cache/.
# They make base.cpio; what is built from this tree makes a second, small
# archive, which the kernel unpacks over the first one. The packages on the
# host itself are those of need_host.
#
# APT=1 lets apt-get download the former and install the latter, which takes
# root. Without it nothing is: what is missing is named.
#
# GUEST_MACHINE is the guest's processor: x86_64, this host's own, if nothing is
# said, or aarch64 or s390x, whose packages and programs then are in a folder of
# the cache.

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

machine=${GUEST_MACHINE:-x86_64}
cache=$here/cache
cross=
emulate=
qemu_program=qemu-system-$machine
case $machine in
x86_64)
    arch=amd64
    loader=ld-linux-x86-64.so.2
    qemu_package=qemu-system-x86
    ;;
aarch64)
    arch=arm64
    loader=ld-linux-aarch64.so.1
    qemu_package=qemu-system-arm
    ;;
s390x)
    arch=s390x
    loader=ld64.so.1
    qemu_package=qemu-system-misc
    ;;
*) die "GUEST_MACHINE is '$machine': expected x86_64, aarch64 or s390x" ;;
esac
apt_options=()
if [ "$machine" != x86_64 ]; then
    cache=$cache/$machine
    cross=$machine-linux-gnu
    emulate=qemu-$machine-static
    apt_options=(-o "Dir::State=$cache/apt" -o "Dir::Cache=$cache/apt"
        -o Dir::State::status=/dev/null -o "APT::Architecture=$arch"
        -o "APT::Architectures=$arch" -o APT::Sandbox::User=root)
fi
root=$cache/root
probe=$here/cache/build/probe
guest_cc=${cross:+$cross-}gcc
[ -n "$cross" ] || guest_cc=${CC:-gcc}

# What the kernel may lack, in the order in which it can be loaded; vsock's
# modules by who wants them.
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev
    virtio_pci virtio_mmio virtio_console vsock
    vmw_vsock_virtio_transport_common vsock_loopback"

have() { command -v "$1" >/dev/null 2>&1; }

# need_host() - the programs the host needs
need_host() {
    need "$qemu_program:$qemu_package" qemu-img:qemu-utils \
        ssh:openssh-client rsync:rsync wget:wget "${CC:-gcc}:gcc" make:make
    if [ -n "$cross" ]; then
        need "$emulate:qemu-user-static" "$guest_cc:gcc-$cross"
        [ -e "/usr/$cross/lib/libc.a" ] || install_host "libc6-dev-$arch-cross"
    fi
    links_statically || install_host libc6-dev
    links_statically || die "${CC:-gcc} cannot link a static program"
}

links_statically() {
    echo 'int main(void) { return 0; }' | "${CC:-gcc}" -static -x c \
        -o "$cache/static" - 2>/dev/null
}

# need() - programs, each with the package that has it
need() {
    local pair missing=
    for pair; do
        have "${pair%:*}" || missing="$missing ${pair##*:}"
    done
    [ -z "$missing" ] || install_host $missing
}

may_apt() { [ "${APT-}" = 1 ]; }

# install_host() - packages on the host, where we may do that
install_host() {
    if may_apt && have apt-get && [ "$(id -u)" = 0 ]; then
        echo "Installing $*"
        apt_update
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
            --no-install-recommends "$@" >>"$cache/apt.log" 2>&1 ||
            die "cannot install $*, see $cache/apt.log"
    else
        die "needs $* (Debian's names); APT=1 installs that, as root"
    fi
}

# apt_update() - package lists, once per run and only where we may
apt_update() {
    [ "$(id -u)" = 0 ] && [ -z "$apt_updated" ] || return 0
    apt_updated=yes
    mkdir -p "$cache"/apt/{lists,archives}/partial
    { apt-get update -q && { [ -z "$cross" ] ||
        apt-get "${apt_options[@]}" update -q; }; } >>"$cache/apt.log" 2>&1 ||
        echo "apt-get update failed, trying what is known" >&2
}

apt_depends() {
    apt-cache "${apt_options[@]}" depends --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "$@"
}

# kernel_package() - the real name behind Debian's or Ubuntu's small kernel
kernel_package() {
    local meta
    for meta in "linux-image-cloud-$arch" linux-image-virtual \
        "linux-image-$arch"; do
        apt_depends "$meta" 2>/dev/null |
            sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
    done | head -n 1
}

# kernel_parts() - what else holds files of the kernel: Ubuntu's modules, and
# the kernel itself where Debian's image only signs what linux-binary has
kernel_parts() {
    local part
    for part in "linux-modules-${1#linux-image-}" $(apt_depends "$1" |
        sed -n 's/^ *Depends: \(linux-[bm][a-z]*-[0-9].*\)/\1/p'); do
        apt-cache "${apt_options[@]}" show "$part" >/dev/null 2>&1 && echo "$part"
    done | sort -u
}

# fetch() - download and unpack, once; a half-done job starts again
fetch() {
    local kernel parts wanted
    [ "$cache/fetched" -nt "$here/image.sh" ] && return
    may_apt || die "the guest is made of Debian packages, 150 MB in" \
        "tests/guest/cache; APT=1 lets apt-get download them"
    have apt-get && have dpkg || die "the guest is made of Debian packages:" \
        "it needs apt-get and dpkg, so Debian or Ubuntu"
    apt_update
    kernel=$(kernel_package)
    [ -n "$kernel" ] || die "apt-cache knows no kernel image (apt-get update?)"
    parts=$(kernel_parts "$kernel")
    wanted="busybox-static dropbear-bin openssh-sftp-server rsync
        qemu-guest-agent"
    wanted="$wanted $(apt_depends --recurse $wanted |
        grep -E '^(lib|zlib)' | grep -vE 'perl|:' | tr '\n' ' ')"
    rm -rf "$root" "$cache/debs"
    mkdir -p "$root" "$cache/debs"
    echo "Fetching $kernel and the packages of the guest"
    # apt's own user may not be let into the cache; that is but a warning.
    (cd "$cache/debs" && apt-get "${apt_options[@]}" download -q $kernel $parts $wanted) \
        >>"$cache/apt.log" 2>&1 || die "apt-get failed, see $cache/apt.log"
    # Newer packages unpack through links that older ones hold as directories.
    for wanted in "$cache"/debs/*.deb; do
        dpkg --fsys-tarfile "$wanted" |
            tar -x -C "$root" --keep-directory-symlink ||
            die "cannot unpack $wanted"
    done
    wanted=$(find_file 'vmlinuz*')
    [ -n "$wanted" ] || die "no kernel in $kernel and what it depends on"
    cp "$wanted" "$cache/vmlinuz" || die "cannot copy the kernel"
    # Init scripts have the names of what they start.
    rm -rf "$cache/debs" "$root/etc" "$root/usr/share"
    touch "$cache/fetched"
}

find_file() {
    find "$root" -name "$1" -type f | head -n 1
}

# add_file() - a file of the packages, wherever they have it, to a directory
add_file() {
    local file
    file=$(find_file "$1")
    [ -n "$file" ] || die "no $1 in the packages"
    cp -L "$file" "$2" || die "cannot copy $file"
}

# add_program() - a program and all it needs into the image
add_program() {
    local file lib
    add_file "$1" "$tree/bin/"
    file=$(find_file "$1")
    for lib in $($emulate "$(find_file $loader)" --library-path "$libpath" --list "$file" |
        sed -n 's/.* => \(.*\) (0x.*/\1/p'); do
        cp -L "$lib" "$tree/lib/" || die "cannot copy $lib"
    done
}

# build_base() - base.cpio: everything that doesn't come from this tree
build_base() {
    local tree=$cache/tree libpath module file
    [ "$cache/base.cpio" -nt "$cache/fetched" ] && return
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,lib,lib64,lib/modules,etc/dropbear,root/.ssh,run,tmp} \
        "$tree"/{dev,proc,sys,var/log,www,usr/lib/openssh}
    libpath=$(find "$root" -name 'lib*.so.*' -printf '%h\n' | sort -u |
        tr '\n' ':')
    add_file busybox "$tree/bin/"
    for file in dropbear dropbearkey rsync qemu-ga sftp-server; do
        add_program "$file"
    done
    mv "$tree/bin/sftp-server" "$tree/usr/lib/openssh/"
    ln -s openssh/sftp-server "$tree/usr/lib/sftp-server"
    add_file $loader "$tree/lib64/"
    cp "$tree/lib64/$loader" "$tree/lib/"
    for module in $modules; do
        file=$(find_file "$module.ko*")
        case $file in
        '') ;; # built in
        *.zst)
            need zstd:zstd
            zstd -dqc "$file" >"$tree/lib/modules/$module.ko"
            ;;
        *.xz)
            need xz:xz-utils
            xz -dc "$file" >"$tree/lib/modules/$module.ko"
            ;;
        *) cp "$file" "$tree/lib/modules/" ;;
        esac || die "cannot unpack $file"
    done
    echo 'root::0:0:root:/root:/bin/sh' >"$tree/etc/passwd"
    echo 'root:x:0:' >"$tree/etc/group"
    echo /bin/sh >"$tree/etc/shells"
    rm -f "$cache"/id "$cache"/id.pub
    ssh-keygen -q -t ed25519 -N '' -C guest-test -f "$cache/id"
    cp "$cache/id.pub" "$tree/root/.ssh/authorized_keys"
    chmod 700 "$tree/root" "$tree/root/.ssh"
    pack "$tree" >"$cache/base.part" || die "cannot pack $tree"
    mv "$cache/base.part" "$cache/base.cpio"
    rm -rf "$tree"
}

# pack() - a directory as an archive for the kernel, padded so that the next
# one can follow it
pack() {
    (cd "$1" && find . | $emulate "$(find_file busybox)" cpio -o -H newc -R 0:0 2>/dev/null)
}

# build_in() - qemu-vp and probe, linked statically in directory $1 of their own,
# by compiler $2 and with options $3... of configure
build_in() {
    local dir=$1 cc=$2
    shift 2
    mkdir -p "$dir"
    cp -p "$top"/{configure,Makefile,qemu-vp.c,virtproxy.c,virtproxy.h} "$dir/" ||
        die "cannot copy the source to $dir"
    (cd "$dir" && unset MAKEFLAGS MAKELEVEL MFLAGS VP_TOP QEMU_VP &&
        { [ config.mak -nt configure ] ||
            ./configure LDFLAGS=-static "$@"; } &&
        make qemu-vp) >"$dir.log" 2>&1 ||
        die "cannot build qemu-vp statically, see $dir.log"
    if [ "$here/probe.c" -nt "$dir/probe" ]; then
        "$cc" -std=c11 -D_XOPEN_SOURCE=700 -O2 -Wall -Wextra -static \
            -o "$dir/probe" "$here/probe.c" || die "cannot build probe"
    fi
}

# build() - both for the host, and for a guest that is another machine
build() {
    build_in "$here/cache/build" "${CC:-gcc}"
    vp=$here/cache/build/qemu-vp
    guest_build=$here/cache/build
    if [ -n "$cross" ]; then
        guest_build=$cache/build
        build_in "$guest_build" "$guest_cc" --host="$cross"
    fi
}

# make_image() - all of the above; afterwards $kernel and $initrd are there
make_image() {
    mkdir -p "$cache"
    exec 7>"$cache/lock"
    flock 7
    need_host
    fetch
    build_base
    build
    rm -rf "$cache/overlay"
    mkdir -p "$cache/overlay/bin"
    cp "$guest_build/qemu-vp" "$guest_build/probe" "$cache/overlay/bin/"
    cp "$here/guest-init" "$cache/overlay/init"
    chmod +x "$cache/overlay/init"
    { cat "$cache/base.cpio" && pack "$cache/overlay"; } >"$cache/initrd" ||
        die "cannot pack $cache/overlay"
    exec 7>&-
    kernel=$cache/vmlinuz
    initrd=$cache/initrd
}
