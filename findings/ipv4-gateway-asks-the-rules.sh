#!/bin/bash
#
# Question: may a default route be added on a host whose ip rules end in "unreachable"?
#
# Why it matters: a program that closes a host by such a rule makes DHCP clients fail, because they add a default route
# with a gateway after that. A table with an unreachable route closes the host as well and does not disturb them.
#
# Seen with: Linux 6.18. Explained by: fib_check_nh_v4_gw() in net/ipv4/fib_semantics.c looks the gateway up as if a packet
# went there, through all ip rules, even if the request names the device. It asks for a route of scope link or narrower.
# fib_table_lookup() in net/ipv4/fib_trie.c passes over an unreachable route of scope global for that reason, before it
# looks at the type of the route. A rule has no scope, so it answers at once.

. "$(dirname "$0")/lib.bash"

space host
ip -n "$host" link add lan0 type veth peer name lan1
ip -n "$host" address add 203.0.113.2/24 dev lan0
ip -n "$host" link set lan1 up
ip -n "$host" link set lan0 up

# add tries to add the default route and prints what came of it.
add() {
	local message
	if message=$(ip -n "$host" route add default via 203.0.113.1 dev lan0 2>&1); then
		ip -n "$host" route del default
		echo accepted
	elif [[ $message == *"invalid gateway"* ]]; then
		echo refused
	else
		cannot "unexpected message: $message"
	fi
}

[[ $(add) == accepted ]] || cannot "the kernel refuses the route even without a rule"

ip -n "$host" rule add priority 100 type unreachable
rule=$(add)
ip -n "$host" rule del priority 100

ip -n "$host" rule add priority 100 lookup 77
ip -n "$host" route add unreachable default table 77
global=$(add)
ip -n "$host" route del unreachable default table 77
ip -n "$host" route add unreachable default scope link table 77
link=$(add)

report version "Linux $(uname -r)"
report expected "the route names its device and its gateway is on that device's own network, so no ip rule matters"
report seen "with an unreachable rule: $rule; with an unreachable route of scope global: $global, of scope link: $link"
conclude "$rule $global $link" "refused accepted refused"
