#!/usr/bin/env bash
# Builds every fuzz target and runs each for some seconds. Stops at the first input that breaks one, and prints it.
# Needs a C++ compiler and stable Rust; no cargo-fuzz, no nightly.
#
#   fuzz/run.sh [SECONDS] [TARGET...]        10 seconds each when nothing is said
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

SECONDS_EACH=${1:-10}
case "$SECONDS_EACH" in
'' | *[!0-9]*)
    printf 'usage: fuzz/run.sh [SECONDS] [TARGET...]\n' >&2
    exit 2
    ;;
esac
TARGETS=("${@:2}")
[ "${#TARGETS[@]}" -gt 0 ] || TARGETS=(frames envelope introduction statement texts image_configuration dns layer archive http)

# Coverage counters for libFuzzer, by stable flags of the compiler.
COVERAGE="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
HOST=$(rustc -vV | sed -n 's/^host: //p')

# With a target named, the flags are for the programs alone and not for build scripts.
RUSTFLAGS="$COVERAGE" CARGO_TARGET_DIR=target cargo build --quiet --release --locked --target "$HOST" \
    "${TARGETS[@]/#/--bin=}"

for target in "${TARGETS[@]}"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    log="artifacts/$target.log"
    if ! "target/$HOST/release/$target" "corpus/$target" "seeds/$target" -artifact_prefix="artifacts/$target/" \
        -max_total_time="$SECONDS_EACH" -timeout=10 -rss_limit_mb=1024 -max_len=16384 -print_final_stats=1 \
        >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        input=$(sed -n 's/.*Test unit written to \(.*\)$/\1/p' "$log" | tail -n 1)
        if [ -n "$input" ]; then
            printf '\n%s fails on fuzz/%s:\n' "$target" "$input" >&2
            od -A d -t x1z "$input" | head -n 64 >&2
        fi
        exit 1
    fi
    printf '%-20s %s runs, %s inputs kept\n' "$target" \
        "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" "$(find "corpus/$target" -type f | wc -l)"
done
