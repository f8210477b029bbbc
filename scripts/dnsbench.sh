#!/usr/bin/env bash
# dnsbench.sh: questions a second and how long an answer takes, through viasocks and directly, in one place and in one run.
#
#   app  ──veth──  proxy  ──veth──  world          scripts/lab.sh draws it; this is a lab of its own
#   dnsperf        SOCKS5 server    resolver       it has an A record for every name of "bench."
#
# Each round does each mode, one after the other, so that a drift of the machine hits all of them:
#
#   direct   dnsperf asks the resolver past viasocks; the proxy's namespace forwards for it
#   fake     the same under `viasocks run --dns fake,tcp://RESOLVER`
#   tcp      the same under `viasocks run --dns tcp://RESOLVER`: each question goes to the resolver through the proxy
#   tls      the same under `--dns tls://RESOLVER`, and https under `--dns https://RESOLVER/dns-query`: unbound serves both
#   relay    the same under `--dns relay`: questions and answers are datagrams of the proxy
#
# A mode is measured twice: with 100 questions in flight (--flight), for questions a second and for the CPU time that each process
# takes for one; and at 1,000 a second, for the latency. All names are different. The table has medians over the rounds, and each
# mode's rate divided by the direct one of the same round.
#
# The resolver is unbound with one thread, or with --server dnsmasq that. With --delay 5ms it is 5 ms away, each way.
#
# --names N asks for N different names once, in fake mode, and prints the resident memory of viasocks before and after.
# --connections makes connections by name and by address, for --time seconds each in each round, one after the other and from 64
# clients at once, and prints the CPU time of viasocks for each. A connection by name is to a new name each time: the program asks
# for its A and AAAA records first, as programs do.
#
# It needs root, and dnsperf, and unbound or dnsmasq: scripts/deps.sh bench.
#
# Usage: dnsbench.sh [--rounds N] [--time SECONDS] [--modes 'direct fake tcp tls https relay'] [--server unbound|dnsmasq]
#                    [--delay TIME] [--flight N] [--names N] [--connections] [--viasocks PATH]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin

rounds=3 time=3 modes='direct fake tcp' names='' connections='' viasocks='' resolver=unbound delay='' flight=100
die() { echo "dnsbench: $*" >&2; exit 1; }
while [[ $# -gt 0 ]]; do
	case $1 in
	--rounds | --time | --names | --flight) [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "$1 takes a number from 1 on, not '${2-}'" ;;
	esac
	case $1 in
	--rounds) rounds=$2; shift 2 ;;
	--time) time=$2; shift 2 ;;
	--modes) modes=${2?}; shift 2 ;;
	--names) names=$2; shift 2 ;;
	--connections) connections=yes; shift ;;
	--server) resolver=${2?}; shift 2 ;;
	--delay) delay=${2?}; shift 2 ;;
	--flight) flight=$2; shift 2 ;;
	--viasocks) viasocks=${2?}; shift 2 ;;
	-h | --help) sed -n '2,/^set -e/{/^set -e/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
	*) die "unknown option $1: see $0 --help" ;;
	esac
done
for mode in $modes; do
	[[ " direct fake tcp tls https relay " == *" $mode "* ]] || die "unknown mode $mode: see $0 --help"
done
((EUID == 0)) || die "cannot make namespaces: not root; try: sudo $0"
[[ $resolver == unbound || $resolver == dnsmasq ]] || die "--server is unbound or dnsmasq, not $resolver"
[[ $resolver == unbound || $modes != *tls* && $modes != *https* ]] || die "only unbound serves DNS over TLS and over HTTPS"
for p in dnsperf openssl "$resolver"; do command -v "$p" >/dev/null || die "$p is not installed: scripts/deps.sh bench"; done

export LAB=vsdns
dir=$(mktemp -d)
pids=()
clean() {
	local pid
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	wait "${pids[@]}" 2>/dev/null || true
	scripts/lab.sh down >/dev/null 2>&1 || true
	rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -z $viasocks ]]; then
	viasocks=$dir/viasocks
	CGO_ENABLED=0 go build -o "$viasocks" ./cmd/viasocks
fi
go build -o "$dir/bench" ./cmd/internal/bench
scripts/lab.sh up >"$dir/lab.log" 2>&1 || { cat "$dir/lab.log" >&2; exit 1; }
in_ns() { ip netns exec "$LAB-$1" "${@:2}"; }

server=203.0.113.53 proxy=10.66.0.1:1080 back=203.0.113.1
if [[ -n $delay ]]; then
	server=10.69.0.53 back=10.69.0.1
	"$dir/bench" link --name far --a "/run/netns/$LAB-proxy,$back/24" --b "/run/netns/$LAB-world,$server/24" --delay "$delay" \
		>"$dir/far.log" 2>&1 & pids+=($!)
	for _ in $(seq 50); do grep -q ready "$dir/far.log" && break; sleep 0.1; done
	grep -q ready "$dir/far.log" || { cat "$dir/far.log" >&2; die "no slow link"; }
fi
in_ns proxy sysctl -qw net.ipv4.ip_forward=1
ip -n "$LAB-world" route add 10.66.0.0/24 via $back
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=dnsbench \
	-addext "subjectAltName=IP:$server" -keyout "$dir/key.pem" -out "$dir/cert.pem" 2>"$dir/openssl.log" || { cat "$dir/openssl.log" >&2; die "no certificate"; }
cat >"$dir/unbound.conf" <<-END
	server:
	  interface: $server
	  interface: $server@853
	  interface: $server@443
	  tls-service-key: "$dir/key.pem"
	  tls-service-pem: "$dir/cert.pem"
	  https-port: 443
	  access-control: 0.0.0.0/0 allow
	  username: ""
	  chroot: ""
	  directory: "$dir"
	  pidfile: ""
	  use-syslog: no
	  do-daemonize: no
	  num-threads: 1
	  incoming-num-tcp: 100
	  outgoing-range: 16
	  so-rcvbuf: 0
	  local-zone: "bench." redirect
	  local-data: "bench. 60 A 203.0.113.2"
	remote-control:
	  control-enable: no
END
case $resolver in
unbound) serve=(unbound -d -c "$dir/unbound.conf") ;;
dnsmasq) serve=(dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --pid-file= --user=root
	--bind-interfaces --listen-address="$server" --address=/bench/203.0.113.2 --local-ttl=60 --dns-forward-max=1000) ;;
esac
ip netns exec "$LAB-world" "${serve[@]}" >"$dir/resolver.log" 2>&1 & pids+=($!)
export RESOLVER=$!
ip netns exec "$LAB-world" "$dir/bench" world --listen 203.0.113.2:9000 & pids+=($!)
ip netns exec "$LAB-proxy" "$dir/bench" socks --listen "$proxy" --names 203.0.113.2 & pids+=($!)
export PROXY=$!
for _ in $(seq 50); do
	[[ -z $(in_ns world ss -Hltn "sport = :53") || -z $(in_ns proxy ss -Hltn "sport = :1080") ]] || break
	sleep 0.1
done
[[ -n $(in_ns world ss -Hltn "sport = :53") ]] || { cat "$dir/resolver.log" >&2; die "$resolver does not serve"; }

# ask OUT COMMAND...: runs what asks, under viasocks or past it. OUT gets one line: the CPU and the KiB of memory of viasocks, if
# it is the parent, before and after it, and the CPU that the command, the resolver and the proxy used. CPU is in ticks of a
# hundredth of a second.
cat >"$dir/ask" <<-'END'
	#!/bin/bash
	ticks() { awk '{ print $14 + $15 }' "/proc/$1/stat"; } # of a process
	children() { awk '{ print $16 + $17 }' /proc/$$/stat; }
	usage() {
		[[ $(cat /proc/$PPID/comm) == viasocks ]] || { echo 0 0; return; }
		echo "$(ticks $PPID) $(awk '/^VmRSS/ { print $2 }' /proc/$PPID/status)"
	}
	out=$1
	shift
	others="$(ticks "$RESOLVER") $(ticks "$PROXY")"
	before=$(usage)
	own=$(children)
	"$@" >"$out.log" 2>&1 || { cat "$out.log" >&2; exit 1; }
	own=$(($(children) - own))
	after=$(usage)
	echo "$before $after $own $(ticks "$RESOLVER") $(ticks "$PROXY") $others" |
		awk '{ print $1, $2, $3, $4, $5, $6 - $8, $7 - $9 }' >"$out"
END
chmod +x "$dir/ask"

# through MODE COMMAND... runs it in the app's namespace.
through() {
	local dns=()
	case $1 in
	fake) dns=(--dns "fake,tcp://$server") ;;
	tcp) dns=(--dns "tcp://$server") ;;
	tls) dns=(--dns "tls://$server" --dns-ca "$dir/cert.pem") ;;
	https) dns=(--dns "https://$server/dns-query" --dns-ca "$dir/cert.pem") ;;
	relay) dns=(--dns relay) ;;
	direct)
		in_ns app "${@:2}"
		return
		;;
	esac
	in_ns app "$viasocks" run --log-level error --proxy "socks5://$proxy" "${dns[@]}" -- "${@:2}"
}

# perf MODE OUT OPTION... asks by dnsperf.
perf() {
	through "$1" "$dir/ask" "$2" dnsperf -s "$server" -d "$dir/names" "${@:3}"
	if ! grep -q "Queries lost: *0 " "$2.log"; then echo "dnsbench: $1: $(grep "Queries lost" "$2.log")" >&2; fi
}

median() { sort -g | awk '{ a[NR] = $1 } END { if (NR) printf "%.6g\n", (a[int((NR + 1) / 2)] + a[int(NR / 2) + 1]) / 2 }'; }

# cost N: microseconds of CPU for each of N questions, of viasocks, dnsperf, the resolver and the proxy.
cost() {
	local who ticks=('$3 - $1' '$5' '$6' '$7') i=0
	for who in viasocks dnsperf resolver proxy; do
		awk -v n="$1" "{ printf \"%.2f\\n\", (${ticks[i++]}) * 1e4 / n }" "$dir/fast" >>"$dir/$mode.$who"
	done
}

rates() {
	local round mode n who
	seq 1 100000 | sed 's/.*/host-&.bench A/' >"$dir/names.fake"  # more do not fit into the pool
	seq 1 1000000 | sed 's/.*/host-&.bench A/' >"$dir/names.real" # no answer may come from the cache of viasocks
	for ((round = 1; round <= rounds; round++)); do
		for mode in $modes; do
			cp "$dir/names.$([[ $mode == fake ]] && echo fake || echo real)" "$dir/names"
			perf "$mode" "$dir/fast" -c 8 -q "$flight" -l "$time"
			awk '/Queries per second/ { print $4 }' "$dir/fast.log" >>"$dir/$mode.rate"
			n=$(awk '/Queries completed/ { print $3 }' "$dir/fast.log")
			cost "$n"
			perf "$mode" "$dir/slow" -c 1 -q 100 -Q 1000 -l "$time" -v
			awk '$1 == ">" { print $NF * 1e6 }' "$dir/slow.log" | sort -g >"$dir/slow.us"
			awk '{ a[NR] = $1 } END { print a[int(NR / 2) + 1] }' "$dir/slow.us" >>"$dir/$mode.p50"
			awk '{ a[NR] = $1 } END { print a[int(NR * 0.99) + 1] }' "$dir/slow.us" >>"$dir/$mode.p99"
		done
	done
	printf '%-8s %12s %7s  %-42s %8s %8s\n' '' '' '' 'CPU us for a question' '' ''
	printf '%-8s %12s %7s %9s %9s %9s %9s %9s %9s\n' mode 'questions/s' ratio viasocks dnsperf resolver proxy 'p50 us' 'p99 us'
	for mode in $modes; do
		paste "$dir/$mode.rate" "$dir/direct.rate" 2>/dev/null | awk '{ print $2 ? $1 / $2 : 0 }' >"$dir/ratio"
		printf '%-8s %12.0f %7.2f' "$mode" "$(median <"$dir/$mode.rate")" "$(median <"$dir/ratio")"
		for who in viasocks dnsperf resolver proxy; do printf ' %9.1f' "$(median <"$dir/$mode.$who")"; done
		printf ' %9.0f %9.0f\n' "$(median <"$dir/$mode.p50")" "$(median <"$dir/$mode.p99")"
	done
}

memory() {
	seq 1 "$names" | sed 's/.*/host-&.some-longer-name.bench A/' >"$dir/names"
	perf fake "$dir/all" -c 8 -q 100 -n 1
	awk -v n="$(awk '/Queries completed/ { print $3 }' "$dir/all.log")" \
		'{ printf "%d names: %.1f MB before, %.1f MB after, %.1f MB more\n", n, $2 / 1024, $4 / 1024, ($4 - $2) / 1024 }' "$dir/all"
}

field() { sed "s/.*\"$1\":\([0-9.e+-]*\).*/\1/"; } # NAME: of one line of JSON

# by_name: the median cost of connections by name, by address, and the ratio of each round.
by_name() {
	local round kind what under cost
	for ((round = 1; round <= rounds; round++)); do
		for kind in conn1 conn; do
			for what in address name; do
				under=()
				[[ $what == address ]] || under=(--under bench)
				through fake "$dir/bench" load --case $kind --time "${time}s" --target 203.0.113.2:9000 "${under[@]}" --watch -1 \
					>"$dir/load"
				cost=$(paste <(field cpu_s <"$dir/load") <(field work <"$dir/load") | awk '{ print $1 * 1e6 / $2 }')
				echo "$cost" >>"$dir/$kind.$what"
				field p50_us <"$dir/load" >>"$dir/$kind.$what.p50"
			done
			paste "$dir/$kind.name" "$dir/$kind.address" | tail -n 1 | awk '{ print $1 / $2 }' >>"$dir/$kind.ratio"
		done
	done
	printf '%-34s %12s %12s %8s\n' 'CPU us of viasocks, a connection' 'by address' 'by name' ratio
	for kind in conn1 conn; do
		what="one after the other"
		[[ $kind == conn1 ]] || what="of 64 clients"
		printf '%-34s %12.0f %12.0f %8.2f\n' "$what" "$(median <"$dir/$kind.address")" "$(median <"$dir/$kind.name")" \
			"$(median <"$dir/$kind.ratio")"
	done
}

if [[ -n $names ]]; then memory; fi
if [[ -n $connections ]]; then by_name; fi
[[ -n $names || -n $connections ]] || rates
