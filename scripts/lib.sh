# Sourced by the scripts beside it and by .ci/run: talk to the reader, install Debian packages, find or start Docker Engine.
# Nothing here stops or changes an engine that it did not start itself.
# shellcheck shell=bash

ENGINE_SOCKET=${ENGINE_SOCKET:-/var/run/docker.sock}
ENGINE_WAIT_SECONDS=60
ENGINE_STARTED_PID=""

say() { printf '%s\n' "$*"; }
heading() { printf '\n== %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The command prefix that gives root's rights, or nothing when we have them. Fails where neither is possible.
root_prefix() {
    if [ "$(id -u)" -eq 0 ]; then
        return 0
    fi
    if command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        printf 'sudo'
        return 0
    fi
    return 1
}

# as_root COMMAND...
as_root() {
    local prefix
    prefix=$(root_prefix) || fail "this needs root or sudo: $*"
    ${prefix:+"$prefix"} "$@"
}

package_installed() {
    [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]
}

# need_packages COMMAND=PACKAGE...: installs each Debian package whose command is missing. '/=PACKAGE' asks for a package without a command.
need_packages() {
    local wanted=() pair program package
    for pair in "$@"; do
        program=${pair%%=*}
        package=${pair#*=}
        if [ "$program" = / ]; then
            package_installed "$package" || wanted+=("$package")
        elif ! PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null 2>&1; then
            wanted+=("$package")
        fi
    done
    [ "${#wanted[@]}" -gt 0 ] || return 0
    say "These Debian packages are missing and will be installed: ${wanted[*]}"
    command -v apt-get >/dev/null 2>&1 || fail "no apt-get here; install by hand what these hold, then run this again: ${wanted[*]}"
    root_prefix >/dev/null || fail "not root and no sudo; run this, then try again: apt-get update && apt-get install -y --no-install-recommends ${wanted[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null || say "apt-get update failed; trying with the lists that are there"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" </dev/null >/dev/null ||
        fail "apt-get could not install: ${wanted[*]}"
}

need_rust() {
    command -v cargo >/dev/null 2>&1 || PATH="$HOME/.cargo/bin:$PATH"
    command -v cargo >/dev/null 2>&1 || fail "no cargo found; install Rust 1.91 or newer (https://rustup.rs), then run this again"
    export PATH
}

# What building takes beside Rust: a C compiler and linker (bundled SQLite and the TLS library's core are C and assembly).
need_build_packages() { need_packages cc=gcc "/=libc6-dev" git=git; }

engine_answers() {
    curl --silent --fail --max-time 5 --unix-socket "$ENGINE_SOCKET" http://localhost/_ping >/dev/null 2>&1
}

wait_for_engine() {
    local process=${1:-} waited=0
    while [ "$waited" -lt "$ENGINE_WAIT_SECONDS" ]; do
        engine_answers && return 0
        if [ -n "$process" ] && ! kill -0 "$process" 2>/dev/null; then
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
    return 1
}

# start_engine_process LOG FLAG...: dockerd in the background, in a session of its own so that Ctrl-C at the script spares it.
start_engine_process() {
    local log=$1
    shift
    say "starting: dockerd $* (log: $log)"
    setsid dockerd "$@" >>"$log" 2>&1 </dev/null &
    ENGINE_STARTED_PID=$!
    if wait_for_engine "$ENGINE_STARTED_PID"; then
        return 0
    fi
    stop_engine
    return 1
}

# A pid file left by an engine that was killed keeps the next one from starting; it goes only when no dockerd runs at all.
remove_stale_engine_pid() {
    if [ -f /var/run/docker.pid ] && ! pgrep -x dockerd >/dev/null; then
        rm -f /var/run/docker.pid
    fi
}

# Starts dockerd directly, for machines without a service supervisor. Where the firewall cannot be programmed (no netfilter in the kernel)
# it starts again without: our containers have no network of Docker's at all.
start_engine_directly() {
    local log=$1
    [ "$(id -u)" -eq 0 ] || fail "Docker Engine does not run; start it (for example: sudo service docker start), then run this again"
    remove_stale_engine_pid
    : >"$log"
    start_engine_process "$log" && return 0
    # Without the bridge, dockerd would remove a bridge that belongs to another engine: never beside one.
    if ! pgrep -x dockerd >/dev/null && grep -qiE 'iptables|nf_tables|bridge' "$log"; then
        remove_stale_engine_pid
        start_engine_process "$log" --iptables=false --ip6tables=false && return 0
        if [ ! -e /sys/class/net/docker0 ]; then
            remove_stale_engine_pid
            start_engine_process "$log" --iptables=false --ip6tables=false --bridge=none && return 0
        fi
    fi
    return 1
}

# Finds the Docker Engine on $ENGINE_SOCKET, or installs and starts one. Safe to call again.
ensure_engine() {
    local log=${ENGINE_LOG:-${TMPDIR:-/tmp}/peer-compute-dockerd.log}
    need_packages curl=curl "/=ca-certificates" pgrep=procps
    engine_answers && return 0
    if [ -S "$ENGINE_SOCKET" ] && [ "$(id -u)" -ne 0 ] && [ ! -w "$ENGINE_SOCKET" ]; then
        fail "$ENGINE_SOCKET may not be opened by this user; join the group docker or run this as root"
    fi
    need_packages dockerd=docker.io iptables=iptables
    engine_answers && return 0
    if [ "$ENGINE_SOCKET" != /var/run/docker.sock ]; then
        fail "no Docker Engine answers on $ENGINE_SOCKET; start that one, or unset ENGINE_SOCKET"
    fi
    PATH="$PATH:/usr/sbin:/sbin"
    if [ -d /run/systemd/system ]; then
        say "starting: systemctl start docker"
        as_root systemctl start docker || true
        wait_for_engine && return 0
    elif pgrep -x dockerd >/dev/null; then
        say "dockerd is starting; waiting for it"
        wait_for_engine && return 0
    else
        start_engine_directly "$log" && return 0
    fi
    [ ! -s "$log" ] || { say "last lines of $log:" >&2 && tail -n 20 "$log" >&2; }
    fail "no Docker Engine answers on $ENGINE_SOCKET after $ENGINE_WAIT_SECONDS seconds"
}

# Stops the engine only if this very shell started it.
stop_engine() {
    [ -n "$ENGINE_STARTED_PID" ] || return 0
    local waited=0
    kill "$ENGINE_STARTED_PID" 2>/dev/null || true
    while kill -0 "$ENGINE_STARTED_PID" 2>/dev/null && [ "$waited" -lt 20 ]; do
        sleep 1
        waited=$((waited + 1))
    done
    ENGINE_STARTED_PID=""
}

# Compares what is built with the copy of the RustSec advisory database that stands beside the repository, and with the list of
# versions that the database lacks. Nothing is fetched; what is missing is said.
ADVISORY_SNAPSHOT=../shared/advisory-db.tar.gz
ADVISORY_MAX_AGE=${ADVISORY_MAX_AGE:-365}
check_advisories() {
    # The name under which cargo-deny looks for its own clone of the database.
    local parent=$PWD/target/advisories copy newest
    copy=$parent/advisory-db-3157b0e258782691
    if [ ! -f "$ADVISORY_SNAPSHOT" ]; then
        say "skipped: no copy of the RustSec advisory database at $ADVISORY_SNAPSHOT; only the list of floors is compared"
        target/release/xtask advisories
        return
    fi
    rm -rf "$parent" && mkdir -p "$parent"
    tar -xzf "$ADVISORY_SNAPSHOT" -C "$parent" && mv "$parent/advisory-db" "$copy"
    newest=$(grep -rhoE '^date = "[0-9-]+"' "$copy/crates" | cut -d '"' -f 2 | sort | tail -n 1)
    say "advisory database: newest advisory of $newest, $((($(date +%s) - $(date -d "$newest" +%s)) / 86400)) days old (at most $ADVISORY_MAX_AGE)"
    target/release/xtask advisories "$copy"
    if ! cargo deny --version >/dev/null 2>&1; then
        say "skipped: cargo-deny is not installed (cargo install --locked cargo-deny)"
        return
    fi
    # The tool wants a git repository with a date. Whether a version was withdrawn only the registry could tell, which is not asked.
    (
        cd "$copy"
        export GIT_AUTHOR_DATE="$newest 12:00:00 +0000" GIT_COMMITTER_DATE="$newest 12:00:00 +0000"
        git init --quiet --initial-branch=main
        git add --all
        git -c user.name=copy -c user.email=copy@localhost -c commit.gpgsign=false commit --quiet --message "Copy of $newest"
        git rev-parse HEAD >.git/FETCH_HEAD
        touch -d "$newest 12:00:00 UTC" .git/FETCH_HEAD
    )
    sed -e "s|^\[advisories\]|[advisories]\ndb-path = \"$parent\"\nmaximum-db-staleness = \"P${ADVISORY_MAX_AGE}D\"|" \
        -e 's|^yanked = .*|yanked = "allow"|' deny.toml >"$parent/deny.toml"
    cargo deny --offline --locked --config "$parent/deny.toml" check advisories
}
