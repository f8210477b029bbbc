#!/usr/bin/env bash
# bench.sh: viasocks beside the native SOCKS client, in one place and in one run.
#
#   app  ──veth──  proxy  ──veth──  world          scripts/lab.sh draws it; this is a lab of its own
#   load           SOCKS5 server    far end        all three are `bench` (cmd/internal/bench)
#
# Each round does each case natively (the generator speaks SOCKS5) and through the redirector (the generator is plain),
# one after the other, so that a drift of the machine hits both. The table has medians and the ratio to native.
#
# A case with slow: before it has 25 ms each way between app and proxy, one with lossy: a packet in a hundred lost. One with
# crowdN: or crowdNv6: before it is measured beside N addresses in use, and each of its connections goes to a new address.
# A case with direct: or carried: before it goes past the proxy. Natively no viasocks is there; through is `up` with a rule that
# lets the far end out directly, which the kernel does, or with carried: `--direct carry`. The CPU time of these is that of all:
# both ends, viasocks and the kernel's threads. Their ratios, with an interval, are a table of their own. Not part of all cases.
#
# With behind: the load is in a namespace behind the app, which is then a router: through is `up` there, and natively the
# SOCKS5 of the load is only forwarded. The CPU time is that of all, the SOCKS server included. Not part of all cases.
#
# The head of cmd/internal/bench/main.go lists the cases. What scan and churn measure of others meanwhile (a new connection,
# the download beside them) is a table of its own.
#
# A round of all cases takes 8 to 9 minutes on two cores with the default --time of 2s; the default is 3 rounds.
#
# Usage: bench.sh [--rounds N] [--time D] [--cases 'D1 U1 …'] [--against 'COMMAND'] [--instead 'COMMAND'] [--json FILE]
#                 [--flags 'VIASOCKS FLAGS']
#
#   --against measures a second viasocks too, in the same rounds: COMMAND is another build's path, or what takes the
#             arguments "run --proxy URL -- PROGRAM". Its figures, and their ratios to this build's, are a second table.
#   --instead runs another redirector's COMMAND (sh -c) in the app's namespace in place of viasocks; it must steer
#             203.0.113.0/24 by itself (for a crowd also 10.9.0.0/16 and 2001:db8:9::/112, for a scan
#             10.9.0.0/16 and 10.10.0.0/16), to the proxy socks5://10.66.0.1:1080, and stay in the foreground.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin

rounds=3 time=2s against='' instead='' json='' flags=''
cases='D1 D8 U1 U8 P1 P8 BD1 BD8 BU1 BU8 both conn ping1 ping16 pingbulk udp64 udp1200 udp500 peers2000 floodup flooddown pingflood idle2000 idle9500
slow:D1 slow:U1 slow:conn lossy:D1 lossy:U1 lossy:conn'
for n in 0 1000 4000 9000; do
	for v in '' v6; do cases+=" crowd$n$v:conn1 crowd$n$v:ping1 crowd$n$v:udpnew crowd$n$v:udp64"; done
done
cases+=' crowd0:D1 crowd9000:D1 crowd0:U1 crowd9000:U1 scan churn'
die() { echo "bench: $*" >&2; exit 1; }
while [[ $# -gt 0 ]]; do
	case $1 in --rounds | --time | --cases | --against | --instead | --json | --flags) [[ -n ${2-} ]] || { echo "bench: $1 needs a value: see $0 --help" >&2; exit 2; } ;; esac
	case $1 in
	--rounds) rounds=$2; shift 2 ;;
	--time) time=$2; shift 2 ;;
	--cases) cases=$2; shift 2 ;;
	--against) against=$2; shift 2 ;;
	--instead) instead=$2; shift 2 ;;
	--json) json=$2; shift 2 ;;
	--flags) flags=$2; shift 2 ;;
	-h | --help) sed -n '2,/^set -e/{/^set -e/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
	*) echo "bench: unknown option $1: see $0 --help" >&2; exit 2 ;;
	esac
done
[[ $time =~ ^[0-9.]+(ms|s|m)$ ]] || { echo "bench: --time takes a duration as 500ms or 2s, not $time" >&2; exit 2; }
[[ $EUID -eq 0 ]] || die "cannot make namespaces: not root; try: sudo $0"
[[ $rounds =~ ^[1-9][0-9]?$ ]] || { echo "bench: --rounds takes 1 to 99, not $rounds" >&2; exit 2; }

export LAB=vsbench
dir=$(mktemp -d)
pids=()
clean() {
	local pid
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	ip netns del "$LAB-behind" 2>/dev/null || true
	scripts/lab.sh down >/dev/null 2>&1 || true
	rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

go build -o "$dir/viasocks" ./cmd/viasocks
go build -o "$dir/bench" ./cmd/internal/bench
scripts/lab.sh up >"$dir/lab.log" 2>&1 || { cat "$dir/lab.log" >&2; exit 1; }
ulimit -n "$(ulimit -H -n)"

# The far end of a crowd answers at every address of two networks. A scan also tries two that never answer.
ip -n "$LAB-world" route add local 10.9.0.0/16 dev lo
ip -n "$LAB-world" route add local 2001:db8:9::/112 dev lo
ip -n "$LAB-world" route add blackhole 10.10.0.0/16
ip -n "$LAB-world" route add blackhole 2001:db8:a::/112
for net in 10.9.0.0/16 10.10.0.0/16; do ip -n "$LAB-proxy" route add "$net" via 203.0.113.2; done
for net in 2001:db8:9::/112 2001:db8:a::/112; do ip -n "$LAB-proxy" route add "$net" via 2001:db8:113::2; done

if [[ $cases =~ (direct|carried): ]]; then
	# The lab's proxy forwards nothing; here it is a router, too.
	ip netns exec "$LAB-proxy" sysctl -qw net.ipv4.ip_forward=1
	ip -n "$LAB-world" route add 10.66.0.0/24 via 203.0.113.1
fi

if [[ $cases == *behind:* ]]; then
	ip netns add "$LAB-behind"
	ip -n "$LAB-app" link add to-behind type veth peer name to-app netns "$LAB-behind"
	ip -n "$LAB-app" address add 10.69.0.1/24 dev to-behind
	ip -n "$LAB-behind" address add 10.69.0.2/24 dev to-app
	ip -n "$LAB-app" link set to-behind up
	ip -n "$LAB-behind" link set lo up
	ip -n "$LAB-behind" link set to-app up
	ip -n "$LAB-behind" route add default via 10.69.0.1
	ip -n "$LAB-proxy" route add 10.69.0.0/24 via 10.66.0.2
	ip netns exec "$LAB-app" sysctl -qw net.ipv4.ip_forward=1
fi

in_ns() { local ns=$1; shift; ip netns exec "$LAB-$ns" "$@"; }
target=203.0.113.2:9000 proxy=10.66.0.1:1080
# ip netns exec replaces itself, so these are the pids of the servers.
ip netns exec "$LAB-world" "$dir/bench" world --listen "$target" --peers 2000 & pids+=($!)
world=$!
ip netns exec "$LAB-proxy" "$dir/bench" socks --listen "$proxy" & pids+=($!)
socks=$!
declare -A proxy_of=([plain]=$proxy [slow]=10.67.0.1:1080 [lossy]=10.68.0.1:1080)
link() { # kind network flags…
	local kind=$1 net=$2
	shift 2
	[[ $cases == *"$kind:"* ]] || return 0
	"$dir/bench" link --name "$kind" --a "/run/netns/$LAB-app,$net.2/24" --b "/run/netns/$LAB-proxy,$net.1/24" "$@" >"$dir/$kind.log" 2>&1 & pids+=($!)
	for _ in $(seq 50); do grep -q ready "$dir/$kind.log" && break; sleep 0.1; done
	grep -q ready "$dir/$kind.log" || { cat "$dir/$kind.log" >&2; die "no $kind link"; }
	ip netns exec "$LAB-proxy" "$dir/bench" socks --listen "${proxy_of[$kind]}" & pids+=($!)
}
link slow 10.67.0 --delay 25ms
link lossy 10.68.0 --loss 1
for _ in $(seq 50); do
	in_ns app "$dir/bench" load --case conn1 --time 1ms --proxy "$proxy" --target "$target" >/dev/null 2>&1 && break
	sleep 0.1
done

if [[ -n $instead ]]; then
	ip netns exec "$LAB-app" sh -c "exec $instead" >"$dir/instead.log" 2>&1 & pids+=($!)
	watch=$!
	sleep 2
	kill -0 "$watch" 2>/dev/null || { cat "$dir/instead.log" >&2; die "the other redirector does not run"; }
fi

results=$dir/results
run_case() { # mode case round
	local status=0 push=
	# What connects to the program starts first, and tries until the program listens: P1 and P8 are published, the peers of
	# BD1 and its like are beyond the proxy.
	if [[ $2 =~ ^P([0-9]+)$ ]]; then
		[[ -z $instead ]] || return 0
		ip netns exec "$LAB-app" "$dir/bench" push --connections "${BASH_REMATCH[1]}" & push=$!
	elif [[ $2 =~ ^B[DU]([0-9]+)$ ]]; then
		[[ -z $instead ]] || return 0
		ip netns exec "$LAB-world" "$dir/bench" push --to 203.0.113.1:9100 --serve --connections "${BASH_REMATCH[1]}" & push=$!
	fi
	pids+=(${push:+"$push"})
	measure "$@" || status=$?
	[[ -z $push ]] || { kill "$push"; wait "$push" || true; }
	return "$status"
}
measure() { # mode case round
	local out kind=plain case=$2 proxy crowd=() publish=()
	case $case in P*) publish=(--publish 9100) ;; B[DU]*) publish=(--listen 9100) ;; esac
	if [[ $case == *:* ]]; then kind=${case%%:*} case=${case#*:}; fi
	if [[ $kind =~ ^crowd([0-9]+)(v6)?$ ]]; then
		crowd=(--crowd "${BASH_REMATCH[1]}")
		[[ -z ${BASH_REMATCH[2]} ]] || crowd+=(--v6)
		kind=plain
	fi
	if [[ $kind == direct || $kind == carried || $kind == behind ]]; then
		beside_up "$1" "$kind" "$case" "$3"
		return
	fi
	proxy=${proxy_of[$kind]}
	local load=("$dir/bench" load --case "$case" --name "$2" --time "$time" --target "$target" "${crowd[@]}")
	case $1 in
	native)
		# P1 and P8 need no proxy
		[[ $case == P* ]] || load+=(--proxy "$proxy")
		out=$(in_ns app "${load[@]}") || return 1
		;;
	through)
		if [[ -n $instead ]]; then
			out=$(in_ns app "${load[@]}" --watch "$watch") || return 1
		else
			# shellcheck disable=SC2086 # flags are words
			out=$(in_ns app "$dir/viasocks" run --proxy "socks5://$proxy" "${publish[@]}" $flags -- "${load[@]}" --watch -1) || return 1
		fi
		;;
	against)
		# shellcheck disable=SC2086 # the command and the flags are words
		out=$(in_ns app $against run --proxy "socks5://$proxy" "${publish[@]}" $flags -- "${load[@]}" --watch -1) || return 1
		;;
	esac
	echo "{\"mode\":\"$1\",\"round\":$3,${out#\{}" >>"$results"
}
# beside_up is measure for what goes past the proxy, and for what comes from behind the host.
beside_up() { # mode kind case round
	local up=0 status=0 load out from=app also=0,$world,$softirq
	[[ -z $instead ]] || return 0
	local upflags=(--rule "dst ${target%:*} direct")
	case $2 in
	carried) upflags+=(--direct carry) ;;
	behind) upflags=() from=behind also+=,$socks ;;
	esac
	if [[ $1 != native ]]; then
		: >"$dir/up.log"
		# shellcheck disable=SC2086 # the command and the flags are words
		ip netns exec "$LAB-app" ${up_of[$1]} up --state-dir "$dir/state" --proxy "socks5://${proxy_of[plain]}" "${upflags[@]}" \
			--log-level info $flags >"$dir/up.log" 2>&1 & up=$!
		pids+=("$up")
		until grep -q msg=ready "$dir/up.log"; do
			kill -0 "$up" 2>/dev/null || { cat "$dir/up.log" >&2; return 1; }
			sleep 0.05
		done
	fi
	load=("$dir/bench" load --case "$3" --name "$2:$3" --time "$time" --target "$target" --watch "$up" --also "$also")
	[[ $1 != native || $2 != behind ]] || load+=(--proxy "${proxy_of[plain]}")
	out=$(in_ns "$from" "${load[@]}") || status=$?
	if ((up)); then
		kill "$up"
		wait "$up" || true
	fi
	((status)) || echo "{\"mode\":\"$1\",\"round\":$4,${out#\{}" | tee -a "$dir/past" >>"$results"
	return "$status"
}
declare -A up_of=([through]=$dir/viasocks [against]=$against)
softirq=$(pgrep -d, '^ksoftirqd/')
failed=0
for ((round = 1; round <= rounds; round++)); do
	# What comes first in a round may find the machine in another state than what comes last: they take turns.
	modes=(native through ${against:+against})
	((round % 2)) || modes=(${against:+against} through native)
	for c in $cases; do
		for mode in "${modes[@]}"; do
			[[ -t 2 ]] && printf '\r\033[Kround %d of %d: %s %s' "$round" "$rounds" "$c" "$mode" >&2
			run_case "$mode" "$c" "$round" || { echo "bench: $c ($mode) failed in round $round" >&2; failed=1; }
		done
	done
done
[[ -t 2 ]] && printf '\r\033[K' >&2
[[ -s $results ]] || die "no case gave a result"
[[ -z $json ]] || cp "$results" "$json"
"$dir/bench" table <"$results"
[[ ! -s $dir/past ]] || "$dir/bench" modes --to native <"$dir/past"
exit "$failed"
