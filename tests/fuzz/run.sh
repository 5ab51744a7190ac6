#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# run.sh - let the fuzzers run (make fuzz)
#
#   FUZZ_SECONDS  for each target (60)
#   FUZZ_TARGETS  which ones (packet engine text)
#   FUZZER        libfuzzer, which comes with clang, or afl: AFL++ (libfuzzer)
#   FUZZ_OUT      directory for all that is made (build/fuzz/FUZZER)
#
# All is built with the address and undefined-behaviour sanitizers. Inputs that
# reach something new stay there for the next run. The first one that ends a
# target ends the run, with status 1 and its name: once what it found is mended,
# it goes to tests/fuzz/crashes/TARGET, and make check replays it.
#
# What reaches lines that tests/fuzz/corpus doesn't is added to it by
#
#   FUZZ_TARGET=engine build/fuzz/libfuzzer/fuzz -set_cover_merge=1 \
#       -use_counters=0 tests/fuzz/corpus/engine build/fuzz/libfuzzer/engine

set -eu
cd "$(dirname "$0")/../.."
seconds=${FUZZ_SECONDS:-60}
targets=${FUZZ_TARGETS:-packet engine text}
fuzzer=${FUZZER:-libfuzzer}
out=${FUZZ_OUT:-build/fuzz/$fuzzer}
mkdir -p "$out"

case $fuzzer in
libfuzzer) cc=clang ;;
afl)
    cc=afl-clang-fast
    export AFL_USE_ASAN=1 AFL_USE_UBSAN=1 AFL_QUIET=1 ;;
*)
    echo "FUZZER '$fuzzer': expected libfuzzer or afl" >&2
    exit 2 ;;
esac
command -v $cc >/dev/null || {
    echo "There is no $cc: install clang and libclang-rt-dev, for afl afl++" \
        "(Debian's names)" >&2
    exit 1
}
sanitize=-fsanitize=fuzzer
[ "$cc" != clang ] || sanitize=-fsanitize=fuzzer,address,undefined
"$cc" -std=c11 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE -I. -g -O1 \
    -fno-omit-frame-pointer $sanitize -fno-sanitize-recover=all \
    -o "$out/fuzz" tests/fuzz/engine.c tests/fuzz/text.c \
    tests/fuzz/entry.c tests/lib/box.c tests/lib/bytes.c \
    tests/lib/log.c tests/lib/sock.c

# libfuzzer() - one target, all in this process
#
# The box ends a loop that spins. The timeout is for what hangs outside of it,
# and counts a pause of the machine as well.
libfuzzer() {
    "$out/fuzz" -max_total_time="$seconds" -max_len="$2" -len_control=0 \
        -timeout=3600 -print_final_stats=1 -artifact_prefix="$out/crash-$1-" \
        "$out/$1" "tests/fuzz/corpus/$1" 2>"$out/$1.log" || {
        tail -n 60 "$out/$1.log"
        return 1
    }
    grep -E '^(Done|stat::)' "$out/$1.log"
}

# afl() - the same with afl-fuzz, which goes on after a crash
afl() {
    AFL_NO_UI=1 AFL_SKIP_CPUFREQ=1 AFL_AUTORESUME=1 AFL_NO_AFFINITY=1 \
        AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES=1 \
        afl-fuzz -V "$seconds" -G "$2" -t 60000 -m none \
        -i "tests/fuzz/corpus/$1" -o "$out/$1" -- "$out/fuzz" \
        >"$out/$1.log" 2>&1 || { tail -n 60 "$out/$1.log"; return 1; }
    grep -E '^(execs_done|saved_|bitmap)' "$out/$1/default/fuzzer_stats"
    crashes=$(find "$out/$1/default/crashes" -name 'id*')
    [ -z "$crashes" ] || { printf '%s\n' "$crashes"; return 1; }
}

for target in $targets; do
    echo "=== $target, $seconds s with $fuzzer"
    mkdir -p "$out/$target"
    case $target in
    packet) max=1500 ;;
    engine) max=500 ;;
    *) max=2000 ;;
    esac
    FUZZ_TARGET=$target "$fuzzer" "$target" "$max"
done
