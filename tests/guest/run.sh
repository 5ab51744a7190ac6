#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# run.sh - qemu-vp in a real guest: scenarios by name, all without arguments
#
#   run.sh              all of them
#   run.sh NAME...      these; a name may be a pattern such as 'typing-*'
#   run.sh -l           list them
#
# GUEST_MACHINE=aarch64 or s390x: in a guest of that kind (see image.sh). There
# isa stands for aarch64's PL011; s390x has no such line.
#
# Needs no KVM and nothing but Debian's packages, which APT=1 allows it to
# download and install (see image.sh). Each scenario boots a guest of its own, is
# bounded in time and leaves both daemons' logs, the consoles and all output in a
# directory that is named at the end.

set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
top=$(cd "$here/../.." && pwd)
apt_updated=
# shellcheck source=image.sh
. "$here/image.sh"
# shellcheck source=vm.sh
. "$here/vm.sh"
# shellcheck source=scenarios.sh
. "$here/scenarios.sh"
# shellcheck source=libvirt.sh
. "$here/libvirt.sh"

# Seconds a scenario may take; on an idle machine it takes a tenth of them.
limit=${GUEST_LIMIT:-600}

# one() - a single scenario, in this process, everything of it in $D
one() {
    local name=$1
    D=$2
    vm=$D
    trap end_all EXIT
    trap 'exit 1' TERM INT
    channel "${name##*-}"
    declare -F "${name%-*}" >/dev/null || fail "there is no such scenario"
    "${name%-*}"
}

if [ "${1-}" = --one ]; then
    kernel=$cache/vmlinuz
    initrd=$4
    vp=$5
    one "$2" "$3"
    exit 0
fi

if [ "$machine" = s390x ]; then
    # shellcheck disable=SC2206 # names without blanks
    scenarios=(${scenarios[@]/*-isa/})
fi

if [ "${1-}" = -l ]; then
    printf '%s\n' "${scenarios[@]}"
    exit 0
fi

chosen=()
for pattern in "${@:-*}"; do
    found=
    for name in "${scenarios[@]}"; do
        # shellcheck disable=SC2254
        case $name in
        $pattern) chosen+=("$name") found=yes ;;
        esac
    done
    [ -n "$found" ] || die "no scenario '$pattern' (run.sh -l lists them)"
done

make_image
short_tmp
logs=$(mktemp -d "$TMPDIR/vp-guest.XXXXXX") || exit 1
# Copies, so that a build meanwhile changes nothing in mid-run.
cp "$initrd" "$logs/initrd"
cp "$vp" "$logs/qemu-vp"

passed=0
failed=0
passed_over=
for name in "${chosen[@]}"; do
    D=$logs/$name
    mkdir "$D"
    start=$SECONDS
    # Without this script, whatever ends it, no guest goes on.
    setpriv --pdeathsig TERM timeout -k 30 "$limit" "$here/run.sh" --one \
        "$name" "$D" "$logs/initrd" "$logs/qemu-vp" \
        >"$D/out" 2>"$D/reason" </dev/null &
    if wait $!; then
        echo "ok $name ($((SECONDS - start)) s)"
        passed=$((passed + 1))
    elif status=$? && [ $status = 77 ]; then
        echo "passed over: $name: $(cat "$D/reason")"
        passed_over="$passed_over $name"
    else
        [ $status = 124 ] && echo "took more than $limit s" >>"$D/reason"
        echo "FAIL $name ($((SECONDS - start)) s):" \
            "$(tail -n 3 "$D/reason" | tr '\n' ' ')"
        failed=$((failed + 1))
    fi
    [ -e "$D/notes" ] && cat "$D/notes"
done
rm -f "$logs"/{,*/}initrd "$logs"/*/kernel
echo "Logs and consoles: $logs"
echo "$passed passed, $failed failed, $SECONDS s in all" \
    "${passed_over:+(passed over:$passed_over)}"
[ "$failed" = 0 ]
