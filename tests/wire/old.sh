#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# old.sh - older versions, built from their tags, against this one
#
# A tag wire-N is the last commit whose newest protocol is N. For each one that
# this clone has, test_old drives the program built from it and this tree's
# against each other, both ways. What can't be done is named, and no failure.

set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD

tags=$(git tag -l 'wire-*' 2>/dev/null) || tags=
if [ -z "$tags" ]; then
    echo 'old.sh: passed over: no tag wire-N here (git fetch --tags)'
    exit 0
fi
work=$(mktemp -d /tmp/vp-old.XXXXXX)
trap 'rm -rf "$work"' EXIT
make qemu-vp build/tests/wire/test_old
for tag in $tags; do
    mkdir "$work/$tag"
    git archive "$tag" | tar -C "$work/$tag" -x
    (cd "$work/$tag" && ./configure && make qemu-vp) >"$work/log" 2>&1 ||
        { cat "$work/log"; exit 1; }
    echo "old.sh: $tag at one end, this tree at the other"
    VP_TOP=$top QEMU_VP=$top/qemu-vp QEMU_VP_OLD=$work/$tag/qemu-vp \
        tests/check.sh build/tests/wire/test_old
done
