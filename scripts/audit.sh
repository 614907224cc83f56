#!/usr/bin/env bash
# What takes too long for every change: the dependencies against advisories and licences, bills of materials, two builds compared,
# mutation testing, long fuzzing. Tools that are missing are named with the command that installs them, and their part is skipped.
#
#   scripts/audit.sh                     every part
#   scripts/audit.sh PART...             some of: deny sbom reproducible mutants fuzz
#
#   FUZZ_SECONDS=600                     for each fuzz target
#   MUTANTS="trust proto compute"        whose mutants are made
#   ADVISORY_MAX_AGE=365                 days that the copy of the advisory database may be old
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib.sh

OUTPUT=$PWD/target/audit
PROGRAMS=(peerd peerctl peergate)

# has_tool SUBCOMMAND: whether cargo has it; says how to get it where not.
has_tool() {
    cargo "$1" --version >/dev/null 2>&1 && return 0
    say "skipped: cargo-$1 is not installed (cargo install --locked cargo-$1)"
    return 1
}

deny() {
    cargo build --quiet --release --locked -p xtask
    has_tool deny && cargo deny --locked check licenses bans sources
    check_advisories
}

# CycloneDX, one bill for the daemon with its command line, and one for the gateway.
sbom() {
    cargo build --quiet --release --locked -p xtask
    mkdir -p "$OUTPUT/sbom"
    local package
    for package in peer-node peer-gateway; do
        target/release/xtask sbom "$package" "$OUTPUT/sbom/$package.cdx.json"
    done
}

# build_in DIRECTORY: the programs from the committed sources, with nothing of the directory in them.
build_in() {
    local directory=$1 sysroot home=${CARGO_HOME:-$HOME/.cargo} moment
    moment=$(git log -1 --format=%ct)
    sysroot=$(rustc --print sysroot)
    rm -rf "$directory" && mkdir -p "$directory/source"
    git archive HEAD | tar -x -C "$directory/source"
    (
        cd "$directory/source"
        env CARGO_INCREMENTAL=0 CARGO_TARGET_DIR="$directory/target" SOURCE_DATE_EPOCH="$moment" \
            RUSTFLAGS="--remap-path-prefix=$directory/source=/source --remap-path-prefix=$home=/cargo --remap-path-prefix=$sysroot=/rust" \
            CFLAGS="-ffile-prefix-map=$directory/source=/source -ffile-prefix-map=$directory/target=/target -ffile-prefix-map=$home=/cargo" \
            cargo build --quiet --release --locked -p peer-node -p peer-gateway --bins
    )
    (cd "$directory/target/release" && sha256sum "${PROGRAMS[@]}")
}

reproducible() {
    local base one two
    base=$(mktemp -d)
    # Of different lengths, so that a path that is left inside moves what follows.
    one=$(build_in "$base/one")
    two=$(build_in "$base/another-directory")
    rm -rf "$base"
    printf '%s\n' "$one" | tee "$OUTPUT/digests"
    [ "$one" = "$two" ] || {
        printf '%s\n' "$two"
        fail "two builds of the same sources differ"
    }
    say "two builds in different directories are equal"
}

# mutate CRATE FILE...: at least nine of ten mutants must make a test fail or not compile.
mutate() {
    local crate=$1 file files=() caught missed timeout
    for file in "${@:2}"; do files+=(--file "crates/$crate/src/$file"); done
    rm -rf "$OUTPUT/mutants/$crate" && mkdir -p "$OUTPUT/mutants/$crate"
    # Exit status 2 and 3 are mutants that lived or took too long: those are counted below.
    cargo mutants --package "peer-$crate" "${files[@]}" --profile release --cargo-arg=--locked --cargo-test-arg=--lib --timeout 120 \
        --no-times --output "$OUTPUT/mutants/$crate" || [ $? -le 3 ]
    local out=$OUTPUT/mutants/$crate/mutants.out
    caught=$(wc -l <"$out/caught.txt") missed=$(wc -l <"$out/missed.txt") timeout=$(wc -l <"$out/timeout.txt")
    say "mutants of $crate: $((caught + timeout)) of $((caught + timeout + missed)) caught"
    cat "$out/missed.txt"
    [ $(((caught + timeout) * 10)) -ge $(((caught + timeout + missed) * 9)) ] || fail "fewer than nine of ten mutants of $crate are caught"
}

mutants() {
    has_tool mutants || return 0
    local crate
    for crate in ${MUTANTS:-proto trust compute}; do
        case "$crate" in
        # What is verified, what acts once and by whose right, what a container may do.
        proto) mutate proto envelope.rs identity.rs ;;
        trust) mutate trust replay.rs authorise.rs allowed.rs ;;
        compute) mutate compute profile.rs 'profile/*.rs' inspect.rs ;;
        *) fail "MUTANTS names $crate, which is none of: proto trust compute" ;;
        esac
    done
}

fuzz() { bash fuzz/run.sh "${FUZZ_SECONDS:-600}"; }

ALL=(deny sbom reproducible mutants fuzz)
for part in "$@"; do
    case " ${ALL[*]} " in *" $part "*) ;; *) fail "usage: scripts/audit.sh [PART...], of: ${ALL[*]}" ;; esac
done
need_build_packages
need_rust
mkdir -p "$OUTPUT"
[ $# -gt 0 ] || set -- "${ALL[@]}"
for part in "$@"; do
    heading "$part"
    "$part"
done
heading "audit: $* done"
