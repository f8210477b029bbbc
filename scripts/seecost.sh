#!/usr/bin/env bash
# seecost.sh: what it costs viasocks to be looked at, in CPU time for each unit of work.
#
#   app  ──veth──  proxy  ──veth──  world          scripts/lab.sh draws it; this is a lab of its own
#   load           SOCKS5 server    far end        all three are `bench` (cmd/internal/bench)
#
# Each round does each case in each mode, and the order of the modes turns from round to round. Each run has a fresh viasocks:
#
#   off       nobody looks: no metrics, no watcher, no capture
#   before    the same with another build (--before PATH), for instance one from before these could be done
#   metrics   --metrics, read by curl once a second
#   watch     one reader of `flows --watch`
#   top       `top` in a terminal of 120x40
#   capture   `capture -`, without a limit, read as fast as it comes
#
# The table compares the CPU time of viasocks for each unit of work in each mode with that of off in the same round: the median of
# the ratios, and the interval in which it lies with 95 % probability. What the reader itself uses is not counted.
# The cases are those of bench.sh. Meaningful here are those in which a unit is always the same work: conn, ping1, udp64, D1, U1.
# With 11 rounds of 2 s on two shared cores the interval is 5 % wide to either side for conn and 3 % for udp64, but 15 % for ping1
# and D1. A smaller difference shows only in Go benchmarks of the packages, of two builds in turn.
#
# Usage: seecost.sh [--rounds N] [--time D] [--cases 'conn ping1 udp64 D1'] [--modes 'off metrics watch top capture']
#                   [--before PATH] [--json FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin

rounds=9 time=2s cases='conn ping1 udp64 D1' modes='off metrics watch top capture' before='' json=''
die() { echo "seecost: $*" >&2; exit 1; }
while [[ $# -gt 0 ]]; do
	case $1 in
	-h | --help) sed -n '2,/^set -e/{/^set -e/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
	--rounds | --time | --cases | --modes | --before | --json)
		[[ -n ${2-} ]] || { echo "seecost: $1 needs a value: see $0 --help" >&2; exit 2; }
		declare "${1#--}=$2"
		shift 2
		;;
	*) echo "seecost: unknown option $1: see $0 --help" >&2; exit 2 ;;
	esac
done
[[ $EUID -eq 0 ]] || die "cannot make namespaces: not root; try: sudo $0"
[[ $rounds =~ ^[1-9][0-9]?$ ]] || { echo "seecost: --rounds takes 1 to 99, not $rounds" >&2; exit 2; }
[[ -z $before || -x $before ]] || die "cannot run $before: no such program"
[[ -z $before ]] || modes="before $modes"

export LAB=vsseecost
dir=$(mktemp -d)
# A directory for control sockets that no other viasocks of this user is in.
export XDG_RUNTIME_DIR=$dir
pids=()
clean() {
	local pid
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	scripts/lab.sh down >/dev/null 2>&1 || true
	rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

CGO_ENABLED=0 go build -o "$dir/viasocks" ./cmd/viasocks
go build -o "$dir/bench" ./cmd/internal/bench
scripts/lab.sh up >"$dir/lab.log" 2>&1 || { cat "$dir/lab.log" >&2; exit 1; }
ulimit -n "$(ulimit -H -n)"
target=203.0.113.2:9000 proxy=10.66.0.1:1080
ip netns exec "$LAB-world" "$dir/bench" world --listen "$target" & pids+=($!)
ip netns exec "$LAB-proxy" "$dir/bench" socks --listen "$proxy" & pids+=($!)
reached=
for _ in $(seq 50); do
	if ip netns exec "$LAB-app" "$dir/bench" load --case conn1 --time 1ms --proxy "$proxy" --target "$target" >/dev/null 2>&1; then
		reached=1
		break
	fi
	sleep 0.1
done
[[ -n $reached ]] || die "the SOCKS server of the lab does not answer"

# look starts the reader of a mode, and ends when it is killed. It works from outside the lab's namespaces.
look() { # mode pid-of-viasocks
	case $1 in
	metrics) while curl -s --unix-socket "$dir/metrics" http://localhost/metrics >>"$dir/read"; do sleep 1; done ;;
	watch) exec "$dir/viasocks" flows --watch --pid "$2" >"$dir/read" ;;
	top) exec script -qfec "stty rows 40 cols 120; exec $dir/viasocks top --pid $2" /dev/null >"$dir/read" </dev/null ;;
	capture) exec "$dir/viasocks" capture --pid "$2" --count 1073741824 --bytes 1000000000000 --time 1h - >"$dir/read" ;;
	esac
}

results=$dir/results
run_case() { # mode case round
	local program=$dir/viasocks flags=() out pid looker='' status=0
	[[ $1 != before ]] || program=$before
	[[ $1 != metrics ]] || flags=(--metrics "unix:$dir/metrics")
	rm -f "$dir/go" "$dir/ready" "$dir/read" "$dir/out"
	# The load waits until the reader is there. It watches the CPU time of its parent.
	ip netns exec "$LAB-app" "$program" run --proxy "socks5://$proxy" "${flags[@]}" -- sh -c \
		'd=$1; shift; : >"$d/ready"; until [ -e "$d/go" ]; do sleep 0.02; done; exec "$@"' sh "$dir" \
		"$dir/bench" load --case "$2" --time "$time" --target "$target" --watch -1 >"$dir/out" & pid=$!
	until [[ -e $dir/ready ]]; do kill -0 "$pid" 2>/dev/null || break; sleep 0.02; done
	case $1 in
	off | before) ;;
	*)
		look "$1" "$pid" 2>"$dir/look.log" & looker=$!
		sleep 0.3
		;;
	esac
	: >"$dir/go"
	wait "$pid" || status=$?
	if [[ -n $looker ]]; then
		kill "$looker" 2>/dev/null || true
		wait "$looker" 2>/dev/null || true
		[[ -s $dir/read ]] || { echo "seecost: nobody saw anything: $(<"$dir/look.log")" >&2; status=1; }
	fi
	[[ $status -eq 0 ]] || return "$status"
	out=$(<"$dir/out")
	echo "{\"mode\":\"$1\",\"round\":$3,${out#\{}" >>"$results"
}

failed=0
read -ra turn <<<"$modes"
for ((round = 1; round <= rounds; round++)); do
	for c in $cases; do
		for mode in "${turn[@]}"; do
			[[ -t 2 ]] && printf '\r\033[Kround %d of %d: %s %s' "$round" "$rounds" "$c" "$mode" >&2
			run_case "$mode" "$c" "$round" || { echo "seecost: $c ($mode) failed in round $round" >&2; failed=1; }
		done
	done
	turn=("${turn[@]:1}" "${turn[0]}")
done
[[ -t 2 ]] && printf '\r\033[K' >&2
[[ -s $results ]] || die "no case gave a result"
[[ -z $json ]] || cp "$results" "$json"
"$dir/bench" modes --to off <"$results"
exit "$failed"
