#!/usr/bin/env bash
# lab.sh: three network namespaces in which viasocks can be tried by hand.
#
#      viasocks-app                  viasocks-proxy                  viasocks-world
#   ┌────────────────┐           ┌─────────────────────┐          ┌────────────────────┐
#   │ the program    │           │ the SOCKS server    │          │ the servers        │
#   │                │           │ forwards nothing    │          │                    │
#   │     to-proxy   ├───veth────┤ to-app     to-world ├───veth───┤ to-proxy           │
#   │ 10.66.0.2      │           │ 10.66.0.1           │          │ 203.0.113.2        │
#   │ fd00:66::2     │           │ fd00:66::1          │          │ 2001:db8:113::2    │
#   │                │           │         203.0.113.1 │          │ .21 .22 .53 .69    │
#   │                │           │     2001:db8:113::1 │          │ .80 .91 .92        │
#   └────────────────┘           └─────────────────────┘          └────────────────────┘
#
# The app's default routes, both families, lead to the proxy's namespace, which does not forward: what viasocks fails
# to carry arrives at to-app, where it can be counted, and gets no further. World has no way back to app: what
# arrives there came through a SOCKS server. Nothing here is joined to the host's own network; the veths are born
# inside the namespaces, so that the host never sees them.
#
# Usage: lab.sh up | down | status | shell app|proxy|world | exec app|proxy|world CMD...
#
# LAB names the prefix of the namespaces (default viasocks), so that two labs can stand beside each other.
set -euo pipefail

LAB=${LAB:-viasocks}
app=$LAB-app proxy=$LAB-proxy world=$LAB-world
# Each server of the world has an address of its own, so that addresses tell them apart in every log.
# The last byte, and the last group in IPv6: ftp 21, sftp 22, dns 53, tracker 69, web 80, seeders 91 and 92.
world_hosts=(2 21 22 53 69 80 91 92)

die() { echo "lab: $*" >&2; exit 1; }

# run echoes a command and runs it.
run() {
	printf '+ %s\n' "$*" >&2
	"$@"
}

need_root() {
	[[ $EUID -eq 0 ]] || die "cannot make namespaces: not root; try: sudo $0 $*"
	command -v ip >/dev/null || die "cannot make namespaces: no ip command; try: scripts/deps.sh test"
}

exists() { ip netns list 2>/dev/null | awk '{print $1}' | grep -qxF -- "$1"; }

# end_processes ends what runs in namespace $1, by pid: first asked, then made to. Nobody else's process lives there.
end_processes() {
	local pids left=20
	pids=$(ip netns pids "$1" 2>/dev/null) || return 0
	[[ -n $pids ]] || return 0
	# shellcheck disable=SC2086 # a list of numbers, one word each
	run kill -TERM $pids 2>/dev/null || true
	while [[ -n $(ip netns pids "$1" 2>/dev/null) ]] && ((left-- > 0)); do sleep 0.1; done
	pids=$(ip netns pids "$1" 2>/dev/null) || return 0
	# shellcheck disable=SC2086
	[[ -z $pids ]] || run kill -KILL $pids 2>/dev/null || true
}

# down removes the lab, whole or in part, whoever left it there; twice does no harm.
down() {
	local ns
	for ns in "$app" "$world" "$proxy"; do
		exists "$ns" || continue
		end_processes "$ns"
		run ip netns delete "$ns"
	done
}

# wait_up waits until the kernel has noticed that device $2 of namespace $1 has its carrier.
wait_up() {
	local left=300
	until ip -n "$1" -brief link show dev "$2" | awk '{exit $2 != "UP"}'; do
		((left-- > 0)) || die "cannot bring $2 of $1 up: no carrier after 30 s"
		sleep 0.1
	done
}

up() {
	local ns h
	# A lab that is there, or the ruin of one, goes first: up always ends in the same state.
	down
	trap 'echo "lab: cannot go up, taking it down again" >&2; down' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	for ns in "$app" "$proxy" "$world"; do
		run ip netns add "$ns"
		# Not one packet that nobody asked for: no router solicitation, no duplicate address detection to wait for.
		run ip netns exec "$ns" sysctl -qw \
			net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0 \
			net.ipv6.conf.default.accept_ra=0 net.ipv6.conf.default.accept_dad=0 \
			net.ipv6.conf.default.router_solicitations=0 \
			net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
		run ip -n "$ns" link set lo up
	done
	run ip -n "$app" link add to-proxy type veth peer name to-app netns "$proxy"
	run ip -n "$proxy" link add to-world type veth peer name to-proxy netns "$world"

	run ip -n "$app" address add 10.66.0.2/24 dev to-proxy
	run ip -n "$app" address add fd00:66::2/64 dev to-proxy nodad
	run ip -n "$proxy" address add 10.66.0.1/24 dev to-app
	run ip -n "$proxy" address add fd00:66::1/64 dev to-app nodad
	run ip -n "$proxy" address add 203.0.113.1/24 dev to-world
	run ip -n "$proxy" address add 2001:db8:113::1/64 dev to-world nodad
	for h in "${world_hosts[@]}"; do
		run ip -n "$world" address add "203.0.113.$h/24" dev to-proxy
		run ip -n "$world" address add "2001:db8:113::$h/64" dev to-proxy nodad
	done
	run ip -n "$app" link set to-proxy up
	run ip -n "$proxy" link set to-app up
	run ip -n "$proxy" link set to-world up
	run ip -n "$world" link set to-proxy up
	run ip -n "$app" route add default via 10.66.0.1
	run ip -n "$app" route add default via fd00:66::1
	wait_up "$app" to-proxy
	wait_up "$proxy" to-app
	wait_up "$proxy" to-world
	wait_up "$world" to-proxy
	trap - EXIT INT TERM HUP
}

status() {
	local ns found=1
	for ns in "$app" "$proxy" "$world"; do
		exists "$ns" || continue
		found=0
		echo "$ns"
		ip -n "$ns" -brief address | sed 's/^/  /'
		ip netns pids "$ns" | while read -r pid; do
			printf '  pid %s %s\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)"
		done
	done
	[[ $found -eq 0 ]] || echo "lab: down"
}

# namespace prints the full name of app, proxy or world.
namespace() {
	case ${1:-} in
	app | proxy | world) ;;
	*) die "which namespace? app, proxy or world" ;;
	esac
	exists "$LAB-$1" || die "cannot enter $LAB-$1: the lab is down; try: $0 up"
	echo "$LAB-$1"
}

usage() { sed -n 's/^# Usage: /usage: /p' "$0"; }

case ${1:-} in
up)
	need_root up
	up
	;;
down)
	need_root down
	down
	;;
status)
	need_root status
	status
	;;
shell)
	need_root "$@"
	ns=$(namespace "${2:-}")
	exec ip netns exec "$ns" env "PS1=${ns}# " "${SHELL:-/bin/bash}"
	;;
exec)
	need_root "$@"
	ns=$(namespace "${2:-}")
	shift 2
	[[ $# -gt 0 ]] || die "exec what? give a command"
	exec ip netns exec "$ns" "$@"
	;;
-h | --help | help) usage ;;
*)
	usage >&2
	exit 2
	;;
esac
