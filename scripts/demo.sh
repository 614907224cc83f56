#!/usr/bin/env bash
# The main job on one machine: alice deploys an image onto bob's machine, and a visitor opens it through a gateway that nobody trusts.
# Every command is printed before it runs. Stays up until Ctrl-C.
#
#   scripts/demo.sh            shows it, prints the address, waits
#   scripts/demo.sh --check    asserts each step, tears everything down, exits non-zero at the first failure
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib.sh

CHECK=no
case "${1:-}" in
"") ;;
--check) CHECK=yes ;;
*) fail "usage: scripts/demo.sh [--check]" ;;
esac
COMMAND_SECONDS=120
GREETING="Hello from a friend's machine"
DEMO=""
DAEMONS=()
DEPLOYED=no
SUMMARY=""

# --- what the steps are made of -------------------------------------------------------------------------------------

step() {
    finish_step
    STEP=$*
    STEP_START=$EPOCHREALTIME
    heading "$STEP"
}

finish_step() {
    [ -n "${STEP:-}" ] || return 0
    local line
    line=$(printf '%7d ms  %s' "$(((${EPOCHREALTIME/[.,]/} - ${STEP_START/[.,]/}) / 1000))" "$STEP")
    SUMMARY+=$line$'\n'
    STEP=""
}

# shown WHO COMMAND...: prints the command as WHO would type it, then runs it as WHO.
shown() {
    printf '%s$ %s\n' "$1" "$(quoted "${@:2}")" >&2
    as_person "$@"
}

# as_person WHO COMMAND...: peerctl finds WHO's daemon by this variable.
as_person() { PEER_SOCKET="$DEMO/$1/run/peerd.sock" timeout --foreground "$COMMAND_SECONDS" "${@:2}"; }

quoted() {
    local word text=""
    for word in "$@"; do
        case "$word" in
        *[!A-Za-z0-9_./:=@%+,-]* | "") text+="'${word//\'/\'\\\'\'}' " ;;
        *) text+="$word " ;;
        esac
    done
    printf '%s' "${text% }"
}

# json_text FIELD: the last text of that name in the JSON on standard input.
json_text() { tr -d '\n' | grep -oE "\"$1\"[[:space:]]*:[[:space:]]*\"[^\"]*\"" | tail -n 1 | sed -E 's/^[^:]*:[[:space:]]*"(.*)"$/\1/'; }

# json_list FIELD: the texts of that list, one a line.
json_list() { tr -d '\n' | grep -oE "\"$1\"[[:space:]]*:[[:space:]]*\[[^]]*\]" | tail -n 1 | sed 's/^[^[]*//' | grep -oE '"[^"]*"' | tr -d '"'; }

# daemon NAME WHO COMMAND...: starts a program that stays, its log in a file, and remembers it for the end.
daemon() {
    local name=$1 who=$2
    shift 2
    printf '%s$ %s &\n' "$who" "$(quoted "$@")"
    # In a session of its own: Ctrl-C is for this script, which then ends everything in order.
    setsid "$@" >"$DEMO/$name.log" 2>&1 </dev/null &
    DAEMONS+=("$!")
    DAEMON=$!
}

# wait_for WHAT SECONDS COMMAND...: until the command succeeds; fails when the last daemon ended meanwhile.
wait_for() {
    local what=$1 end=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "waited in vain for $what"
        kill -0 "$DAEMON" 2>/dev/null || fail "the program ended while we waited for $what"
        sleep 0.05
    done
}

# expect WHAT TEXT FILE
expect() { grep -qF -- "$2" "$3" || fail "$1: expected to find '$2' in: $(head -c 2000 "$3")"; }

free_port() {
    local port
    for port in 8443 8444 8445 8446 8447 8448; do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            printf '%s' "$port"
            return 0
        fi
    done
    fail "the ports 8443 to 8448 are all in use"
}

visit() { curl --silent --show-error --max-time 20 --cacert "$DEMO/ca.pem" "$@"; }

# --- the end --------------------------------------------------------------------------------------------------------

# stop_daemons: the youngest first; each gets 15 seconds to end by itself.
stop_daemons() {
    local index process waited
    for ((index = ${#DAEMONS[@]} - 1; index >= 0; index--)); do
        process=${DAEMONS[index]}
        kill -TERM "$process" 2>/dev/null || continue
        waited=0
        while kill -0 "$process" 2>/dev/null; do
            if [ "$waited" -ge 150 ]; then
                say "the process $process does not end by itself; killing it"
                kill -KILL "$process" 2>/dev/null || true
                break
            fi
            sleep 0.1
            waited=$((waited + 1))
        done
        wait "$process" 2>/dev/null || true
    done
    DAEMONS=()
}

tear_down() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    set +e
    [ -z "${FOLLOWER:-}" ] || kill "$FOLLOWER" 2>/dev/null
    if [ "$status" -ne 0 ] && [ -n "$DEMO" ]; then
        local log
        for log in "$DEMO"/*.log; do
            [ -s "$log" ] && printf -- '--- last lines of %s\n' "$(basename "$log")" >&2 && tail -n 25 "$log" >&2
        done
    fi
    if [ "$DEPLOYED" = yes ]; then
        as_person alice peerctl stop hello >/dev/null 2>&1
        as_person alice peerctl rm hello >/dev/null 2>&1
    fi
    stop_daemons
    [ -z "$DEMO" ] || rm -rf "$DEMO"
    stop_engine
    [ "$status" -eq 0 ] || printf 'demo: failed%s\n' "${STEP:+ in the step: $STEP}" >&2
    exit "$status"
}

# --- the story ------------------------------------------------------------------------------------------------------

build() {
    need_build_packages
    need_packages curl=curl "/=ca-certificates"
    need_rust
    heading "build (the first time takes some minutes)"
    cargo build --release --locked -p peer-node -p peer-gateway -p xtask
    target/release/xtask examples
}

start_peers() {
    step "two people start their daemons; alice has no container engine"
    say "(the prompt says whose PEER_SOCKET is set: $DEMO/NAME/run/peerd.sock)"
    local who
    for who in alice bob; do
        mkdir -p "$DEMO/$who"
        local engine=()
        [ "$who" = bob ] || engine=(--engine none)
        daemon "$who" "$who" peerd --data-dir "$DEMO/$who" --socket "$DEMO/$who/run/peerd.sock" \
            --listen /ip4/127.0.0.1/tcp/0 ${engine[@]+"${engine[@]}"}
        wait_for "the socket of $who's daemon" 30 test -S "$DEMO/$who/run/peerd.sock"
        # The recovery phrase is shown once and is for paper; here it goes with everything else.
        shown "$who" peerctl init --name "$who" | tee "$DEMO/$who.init"
    done
}

join_peers() {
    step "bob invites alice; she joins with his ticket"
    local ticket
    ticket=$(shown bob peerctl invite --allow deploy --max-cpu 2 --max-memory 1g --max-containers 4)
    [ -n "$ticket" ] || fail "the invitation is empty"
    shown alice peerctl join "$ticket"
    shown alice peerctl peers list | tee "$DEMO/peers"
    expect "alice's list of peers" bob "$DEMO/peers"
    if [ "$CHECK" = yes ] && as_person alice peerctl join "$ticket" >/dev/null 2>&1; then
        fail "a ticket could be used twice"
    fi
}

start_gateway() {
    step "a gateway opens its door, and bob offers it what he exposes"
    local port address peer
    port=$(free_port)
    daemon gateway gateway peergate --domain peer.localhost --data-dir "$DEMO/gateway" --https-listen "127.0.0.1:$port" \
        --listen /ip4/127.0.0.1/tcp/0
    wait_for "the gateway" 30 gateway_ready
    address=$(gateway_info | json_list addresses | head -n 1)
    peer=$(gateway_info | json_text peer_id)
    case "$address" in */p2p/*) ;; *) address=$address/p2p/$peer ;; esac
    gateway_certificate >"$DEMO/ca.pem"
    shown gateway peergate allow "$(as_person bob peerctl whoami --json | json_text peer_id)" --data-dir "$DEMO/gateway"
    shown bob peerctl gateway add "$address"
}

gateway_info() { peergate info --data-dir "$DEMO/gateway" --json; }
gateway_ready() { [ -n "$(gateway_info | json_list addresses)" ] && grep -q /p2p/ "$DEMO/gateway.log"; }

# The certificate of the gateway's own development authority: as text in the answer, or the path of its file.
gateway_certificate() {
    local certificate
    certificate=$(gateway_info | json_text ca_certificate)
    if [ -f "$certificate" ]; then cat "$certificate"; else printf '%b' "$certificate"; fi
}

deploy() {
    step "alice makes an image of one static program: no engine, no registry"
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    shown alice xtask image --name hello:1 --binary "target/$host/release/peer-example-hello" --as /hello --expose 8080 \
        --output "$DEMO/hello.tar"
    step "alice deploys it onto bob"
    DEPLOYED=yes
    shown alice peerctl deploy "$DEMO/hello.tar" --peer bob --name hello --expose 8080 -e "GREETING=$GREETING" --json |
        tee "$DEMO/deploy"
    URL=$(json_text url <"$DEMO/deploy")
    case "$URL" in https://*) ;; *) fail "the deployment has no address: $(cat "$DEMO/deploy")" ;; esac
    shown alice peerctl ps | tee "$DEMO/ps"
    expect "alice's deployments" hello "$DEMO/ps"
}

open_page() {
    step "a visitor opens it through the gateway"
    printf 'visitor$ curl --cacert %s %s\n' "$DEMO/ca.pem" "$URL"
    visit --fail "$URL" | tee "$DEMO/page"
    expect "the page" "$GREETING" "$DEMO/page"
    [ "$CHECK" = yes ] || return 0
    visit --fail --data "a body that must arrive" "${URL%/}/echo" >"$DEMO/echo"
    expect "the echo of a request's body" "a body that must arrive" "$DEMO/echo"
    visit --fail "${URL%/}/headers" >"$DEMO/headers"
    tr '[:upper:]' '[:lower:]' <"$DEMO/headers" >"$DEMO/headers.lower"
    expect "the visitor's address" "x-forwarded-for: 127.0.0.1" "$DEMO/headers.lower"
    [ "$(visit --fail "${URL%/}/bytes/1000000" | wc -c)" -eq 1000000 ] || fail "a download of 1000000 bytes arrived cut"
}

follow_logs() {
    step "alice reads the log, and follows it while a visitor comes"
    shown alice peerctl logs hello --tail 5 | tee "$DEMO/logs"
    expect "the log" "GET / 200" "$DEMO/logs"
    printf 'alice$ peerctl logs -f hello &\n'
    PEER_SOCKET="$DEMO/alice/run/peerd.sock" setsid peerctl logs -f hello >"$DEMO/followed" 2>"$DEMO/follow.log" </dev/null &
    FOLLOWER=$!
    DAEMON=$FOLLOWER
    wait_for "the log's first lines" 10 grep -qF "GET / 200" "$DEMO/followed"
    visit --fail "${URL%/}/healthz?while-following"
    wait_for "the visit's line in the followed log" 10 grep -qF "GET /healthz 200" "$DEMO/followed"
    tail -n 1 "$DEMO/followed"
}

stop_and_look() {
    step "alice stops it; the very next request finds nothing"
    shown alice peerctl stop hello
    local status
    : >"$DEMO/after"
    printf 'visitor$ curl --cacert %s %s\n' "$DEMO/ca.pem" "$URL"
    status=$(visit --output "$DEMO/after" --write-out '%{http_code}' "$URL")
    say "status $status"
    case "$status" in 404 | 410 | 502) ;; *) fail "after the stop a visitor got the status $status" ;; esac
    ! grep -qF "$GREETING" "$DEMO/after" || fail "after the stop a visitor still got the page"
    # The follower's stream ends with its container.
    wait_for_end "$FOLLOWER" 15 || fail "the followed log did not end with its container"
    FOLLOWER=""
    shown alice peerctl rm hello
    DEPLOYED=no
    as_person alice peerctl ps --json >"$DEMO/ps"
    ! grep -qF '"hello"' "$DEMO/ps" || fail "the removed deployment is still listed: $(cat "$DEMO/ps")"
}

wait_for_end() {
    local end=$((SECONDS + $2))
    while kill -0 "$1" 2>/dev/null; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
    wait "$1" 2>/dev/null || true
}

wait_for_reader() {
    finish_step
    heading "it runs"
    say "open:  $URL"
    say "       (a browser warns, because the certificate's authority is the gateway's own: $DEMO/ca.pem)"
    say "as alice:  export PEER_SOCKET=$DEMO/alice/run/peerd.sock PATH=$PWD/target/release:\$PATH; peerctl ps"
    say "Ctrl-C stops it, shows that it is gone, and removes everything."
    local waiting=yes
    trap 'waiting=no' INT TERM
    while [ "$waiting" = yes ]; do sleep 0.5 || true; done
    trap 'exit 130' INT TERM
}

main() {
    if [ "${PEER_DEMO_BUILT:-}" != yes ]; then build; fi
    if [ "$(id -u)" -ne 0 ]; then
        root_prefix >/dev/null || fail "peerd starts as root; run this as root or install sudo"
        say "The rest runs with sudo, because peerd starts as root."
        exec sudo env "PATH=$PATH" "HOME=$HOME" PEER_DEMO_BUILT=yes bash "scripts/demo.sh" "$@"
    fi
    trap tear_down EXIT
    trap 'exit 130' INT TERM HUP
    heading "engine"
    ensure_engine
    DEMO=$(mktemp -d "${TMPDIR:-/tmp}/peer-demo.XXXXXX")
    PATH="$PWD/target/release:$PATH"
    unset PEER_SOCKET
    start_peers
    join_peers
    start_gateway
    deploy
    open_page
    follow_logs
    if [ "$CHECK" = no ]; then wait_for_reader; fi
    stop_and_look
    step "everything ends"
    stop_daemons
    finish_step
    heading "every step passed"
    printf '%s' "$SUMMARY"
}

main "$@"
