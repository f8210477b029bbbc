#!/usr/bin/env bash
# zoo.sh: tests real SOCKS servers in three parts. The probe of cmd/internal/conform asks them what they do, and writes the
# manual's tables of servers. Then programs use each server through viasocks while it is killed, stopped, cut off, and comes
# back. At the end names go through a Tor, in a Tor network of its own (zoo-tor.sh), and those of a browser (zoo-browser.sh).
#
# Usage: zoo.sh [probe|front|tor|browser] [NAME...]  (no part: all; no name: all servers)
#
# It needs root, Debian 12 and Go, and takes some fifteen minutes, the first time more: servers are built from the Go module proxy
# and fetched from npm in the versions that zoo-servers.sh names, and kept under the user's cache directory. A server that cannot
# be had here is skipped, with the reason. Continuous integration does not run it.
#
# Three namespaces: the probe, the proxy, and the far end, on addresses of documentation. Behind the far end there are hosts that
# a router calls unreachable (192.0.2.1) and that never answer (192.0.2.2); to 192.0.2.3 the proxy has no route.
set -Eeuo pipefail
export PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin LC_ALL=C
cd "$(dirname "$0")/.."

die() { echo "zoo: $*" >&2; exit 1; }
lacks() { echo "$*" >&2; exit 2; } # of a get_ function, which runs in a subshell

proxy_in=203.0.113.1 at=203.0.113.1:1080
far_1=198.51.100.2 far_2=198.51.100.3 far_6=2001:db8:2::2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/viasocks-zoo

# shellcheck source=scripts/zoo-servers.sh
. scripts/zoo-servers.sh
front_dir=$cache/front
# shellcheck source=scripts/zoo-front.sh
. scripts/zoo-front.sh
# shellcheck source=scripts/zoo-tor.sh
. scripts/zoo-tor.sh

part=
case ${1:-} in
-h | --help) sed -n 's/^# Usage: /usage: /p' "$0"; exit 0 ;;
probe | front | tor | browser) part=$1; shift ;;
esac
for name; do [[ " ${zoo[*]} " == *" $name "* ]] || die "unknown server $name; known: ${zoo[*]}"; done
all=yes # or some servers that were named
if (($#)); then
	all=
	mapfile -t front_servers < <(comm -12 <(printf '%s\n' "$@" | sort) <(printf '%s\n' "${front_servers[@]}" | sort))
	zoo=("$@")
fi
((EUID == 0)) || die "network namespaces need root"

T=$(mktemp -d)
client=zoo-client-$$ proxy=zoo-proxy-$$ far=zoo-far-$$
servers=() ends=()

stop_servers() {
	if ((${#servers[@]})); then
		kill "${servers[@]}" 2>/dev/null || true
		sleep 0.3
		kill -9 "${servers[@]}" 2>/dev/null || true
		wait "${servers[@]}" 2>/dev/null || true
	fi
	servers=()
}
clean() {
	local status=$?
	trap "" INT TERM HUP # timeout and make both pass on the signal
	set +e
	stop_servers
	kill "${ends[@]}" 2>/dev/null
	wait 2>/dev/null
	for name in "$client" "$proxy" "$far" "$spare"; do ip netns del "$name" 2>/dev/null; done
	rm -rf "$T"
	exit "$status"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# run COMMAND... starts a server in the proxy's namespace, with names from the far end.
run() {
	# shellcheck disable=SC2016 # expanded by the inner shell, which has its own mounts
	ip netns exec "$proxy" unshare --mount --propagation private sh -ec '
		mount --bind "$0/resolv.conf" /etc/resolv.conf
		mount --bind "$0/hosts" /etc/hosts
		exec "$@"' "$T" "$@" >>"$T/server.log" 2>&1 </dev/null &
	servers+=($!)
}

# await PORT waits until a socket of the proxy's namespace listens on it.
await() {
	local n
	for ((n = 0; n < 150; n++)); do
		[[ -z $(ip netns exec "$proxy" ss -Hltn "sport = :$1") ]] || return 0
		sleep 0.1
	done
	return 1
}

# go_server NAME MODULE VERSION [PACKAGE] builds $cache/NAME-VERSION: PACKAGE of the module, or the program on standard input.
go_server() {
	local name=$1 module=$2 version=$3 package=${4:-.} bin=$cache/$1-$3
	if [[ ! -x $bin ]]; then
		command -v go >/dev/null || lacks "go is not installed"
		rm -rf "$cache/$name.src"
		mkdir -p "$cache/$name.src"
		[[ $package != . ]] || cat >"$cache/$name.src/main.go"
		(
			cd "$cache/$name.src"
			export GOTOOLCHAIN=local GOFLAGS=-mod=mod CGO_ENABLED=0 GOWORK=off
			go mod init zoo
			if [[ $package == . ]]; then go get "$module@$version" && go mod tidy; else go get "$package@$version"; fi
			nice -n 15 go build -o "$bin" "$package"
		) >"$T/build.log" 2>&1 || lacks "cannot build $module@$version: $(tail -n 1 "$T/build.log")"
	fi
	echo "$version"
}

# npm_server PACKAGE VERSION fetches it into $cache/npm.
npm_server() {
	type node npm >/dev/null 2>&1 || lacks "node and npm are not installed: scripts/deps.sh zoo"
	if ! grep -qs "\"version\": \"$2\"" "$cache/npm/node_modules/$1/package.json"; then
		mkdir -p "$cache/npm"
		npm install --prefix "$cache/npm" --ignore-scripts --no-audit --no-fund "$1@$2" >"$T/build.log" 2>&1 ||
			lacks "cannot fetch $1@$2: $(tail -n 1 "$T/build.log")"
	fi
	echo "$2"
}

# node_server runs the module on standard input where it finds the packages of npm_server.
node_server() {
	local script=$cache/npm/server-$$.mjs
	cat >"$script"
	run node "$script"
	await 1080 || true
	rm -f "$script"
}

# --- the world ----------------------------------------------------------------------------------------------------

link() { # A B: a pair of devices between two namespaces, named eth0 in A and eth1 in B
	ip -n "$1" link add "$2" type veth peer name "$4" netns "$3"
	ip -n "$1" link set "$2" up
	ip -n "$3" link set "$4" up
}
address() { # NAMESPACE DEVICE ADDRESS...
	local a
	for a in "${@:3}"; do
		# shellcheck disable=SC2046 # a word or none
		ip -n "$1" address add "$a" dev "$2" $([[ $a != *:* ]] || echo nodad)
	done
}
make_world() {
	local name
	for name in "$client" "$proxy" "$far"; do
		ip netns add "$name" || die "the kernel refuses a network namespace"
		ip -n "$name" link set lo up
	done
	link "$client" eth0 "$proxy" eth0
	link "$proxy" eth1 "$far" eth0
	address "$client" eth0 203.0.113.2/24 2001:db8:1::2/64
	address "$proxy" eth0 $proxy_in/24 2001:db8:1::1/64
	address "$proxy" eth1 198.51.100.1/24 2001:db8:2::1/64
	address "$far" eth0 $far_1/24 $far_2/24 $far_6/64
	ip -n "$proxy" route add 192.0.2.0/24 via $far_1
	ip -n "$proxy" route add unreachable 192.0.2.3
	ip -n "$far" route add unreachable 192.0.2.1
	ip -n "$far" route add blackhole 192.0.2.2
	# The kernel gives a silent target up after 15 s, in place of two minutes.
	ip netns exec "$proxy" sysctl -qw net.ipv4.tcp_syn_retries=3
	ip netns exec "$far" sysctl -qw net.ipv4.ip_forward=1

	echo "nameserver $far_1" >"$T/resolv.conf"
	echo "127.0.0.1 localhost" >"$T/hosts"
	ip netns exec "$far" dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --pid-file= --user=nobody \
		--bind-interfaces --listen-address=$far_1 --host-record=far.example,$far_1 --local=/#/ >"$T/dns.log" 2>&1 &
	ends+=($!)
	ip netns exec "$far" "$T/zoo" far $far_1 $far_2 $far_6 >"$T/far.log" 2>&1 &
	ends+=($!)
}

# --- the tour -----------------------------------------------------------------------------------------------------

# visit NAME probes one server and keeps the result in $T/NAME.json.
visit() {
	local name=$1 version
	if ! version=$(get_"$name" 2>"$T/why"); then
		echo "zoo: $name: skipped: $(tail -n 1 "$T/why")" >&2
		skipped+=("$name")
		return
	fi
	: >"$T/server.log"
	if start_"$name" && await 1080 &&
		ip netns exec "$client" "$T/zoo" probe "socks5://$at" "$name" "$version" >"$T/$name.new"; then
		mv "$T/$name.new" "$T/$name.json"
		results+=("$T/$name.json")
	else
		echo "zoo: $name $version: no result; it said: $(tail -n 5 "$T/server.log")" >&2
		skipped+=("$name")
	fi
	stop_servers
}

# probe_tour NAME... probes the servers and writes the tables.
probe_tour() {
	local name table=cmd/internal/conform/servers.json
	results=() skipped=()
	for name; do visit "$name"; done
	((${#results[@]})) || die "no server gave a result"
	"$T/zoo" survey $table "${results[@]}" >"$T/servers.json"
	cp "$T/servers.json" $table
	go test ./cmd/viasocks -run TestManualServers -update >/dev/null
	echo "zoo: ${#results[@]} servers are in $table and in the manual${skipped:+; not there: ${skipped[*]}}"
}

mkdir -p "$cache"
go build -o "$T/zoo" ./cmd/internal/conform/zoo
command -v dnsmasq >/dev/null || die "dnsmasq is not installed: scripts/deps.sh zoo"
make_world
status=0
[[ $part == front || $part == tor || $part == browser ]] || probe_tour "${zoo[@]}"
[[ $part == probe || $part == tor || $part == browser || ${#front_servers[@]} -eq 0 ]] || front_tour "${front_servers[@]}" || status=1
[[ $part == probe || $part == front || $part == browser || -z $all ]] || tor_tour || status=1
if [[ -n $all && ($part == browser || -z $part) ]]; then
	[[ -x $T/viasocks ]] || go build -o "$T/viasocks" ./cmd/viasocks
	scripts/zoo-browser.sh "$T/viasocks" || status=1
fi
exit $status
