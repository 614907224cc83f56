#!/usr/bin/env bash
# Builds and tests everything, on a Debian machine with Rust and nothing else. Installs what is missing (it says what), and starts
# Docker Engine where none answers.
#
#   scripts/test.sh            all of it
#   scripts/test.sh --quick    without the lints, which check-build everything a second time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib.sh

LINT=yes
case "${1:-}" in
"") ;;
--quick) LINT=no ;;
*) fail "usage: scripts/test.sh [--quick]" ;;
esac
trap stop_engine EXIT

TIMES=""
# step NAME COMMAND...: runs it and remembers how long it took. The first failure ends everything.
step() {
    local name=$1 start=$SECONDS
    shift
    heading "$name"
    "$@" || fail "$name failed"
    TIMES+=$(printf '%6d s  %s' "$((SECONDS - start))" "$name")$'\n'
}

packages() { need_build_packages && need_packages ip=iproute2 nsenter=util-linux nft=nftables gdb=gdb mkfs.btrfs=btrfs-progs useradd=passwd systemd-analyze=systemd faketime=faketime; }

lint() {
    cargo clippy --release --workspace --all-targets --locked -- -D warnings &&
        RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --quiet --release --workspace --no-deps --locked
}

# Tests enter network namespaces and speak to the engine, which only root may; cargo itself stays with the user.
test_runner() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        local host
        host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
        env "CARGO_TARGET_${host}_RUNNER=sudo -E" "$@"
    fi
}

run_tests() {
    if cargo nextest --version >/dev/null 2>&1; then
        local profile=default
        [ -z "${CI:-}" ] || profile=ci
        test_runner cargo nextest run --release --workspace --locked --profile "$profile"
    else
        say "cargo-nextest is not installed (cargo install --locked cargo-nextest); using cargo test"
        # Without groups of tests, one at a time is what keeps those apart that share the engine.
        test_runner cargo test --release --workspace --locked --all-targets -- --test-threads=1
    fi
}

deny() {
    if cargo deny --version >/dev/null 2>&1; then
        cargo deny --locked check licenses bans sources
    else
        say "skipped: cargo-deny is not installed (cargo install --locked cargo-deny)"
    fi
}

# Every parser of foreign bytes gets random and mutated input for a few seconds.
fuzz() {
    if [ -f fuzz/Cargo.toml ]; then
        bash fuzz/run.sh "${FUZZ_SECONDS:-10}"
    else
        say "skipped: there are no fuzz targets"
    fi
}

step "packages" packages
need_rust
step "engine" ensure_engine
step "format" cargo fmt --all --check
step "build" cargo build --release --workspace --locked
step "examples" target/release/xtask examples
step "tidy" target/release/xtask tidy
step "advisories" check_advisories
step "licences and sources" deny
if [ "$LINT" = yes ]; then step "lint" lint; fi
step "fuzz" fuzz
step "documentation tests" cargo test --doc --release --workspace --locked
step "tests" run_tests

heading "all passed"
printf '%s' "$TIMES"
