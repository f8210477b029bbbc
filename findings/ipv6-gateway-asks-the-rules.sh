#!/bin/bash
#
# Question: which device does an IPv6 default route get, and is it accepted at all, if it goes into a table of its own?
#
# Why it matters: a program that steers the host's packets into a TUN device by an ip rule also steers the look-up of
# other programs' gateways. A route that they put into another table then leads into the TUN device. A rule of type
# unreachable makes the kernel refuse that route, although it takes the same route into main.
#
# Seen with: Linux 6.18. Explained by: ip6_route_check_nh() in net/ipv6/route.c looks the gateway up in the table that the
# request names. Only main has the connected network, so for another table it continues with a look-up through all ip rules,
# and takes the device from its answer.

. "$(dirname "$0")/lib.bash"

space host
for name in lan tun; do
	ip -n "$host" link add ${name}0 type veth peer name ${name}1
	ip -n "$host" link set ${name}1 up
	ip -n "$host" link set ${name}0 up
done
ip -n "$host" address add 2001:db8:1::2/64 dev lan0 nodad
ip -n "$host" address add 2001:db8:2::2/64 dev tun0 nodad
ip -n "$host" -6 route add default dev tun0 table 88

# add ARGUMENT... adds a default route by the gateway on lan0's network, and prints the device that the route got.
add() {
	local message device
	if ! message=$(ip -n "$host" -6 route add default via 2001:db8:1::1 "$@" 2>&1); then
		[[ $message == *"No route to host"* ]] || cannot "unexpected message: $message"
		echo refused
		return
	fi
	device=$(ip -n "$host" -6 route show default "${@:(-2)}" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
	ip -n "$host" -6 route del default "${@:(-2)}"
	echo "$device"
}

[[ $(add table 77) == lan0 ]] || cannot "without an ip rule the route does not get lan0"

ip -n "$host" -6 rule add priority 100 lookup 88
steered=$(add table 77)
named=$(add dev lan0 table 77)
ip -n "$host" -6 rule del priority 100

ip -n "$host" -6 rule add priority 100 type unreachable
main=$(add dev lan0 table main)
other=$(add dev lan0 table 77)

report version "Linux $(uname -r)"
report expected "the gateway is on lan0's network, so the route always gets lan0"
report seen "with a rule that leads to a default route by tun0: $steered, or $named if the request names lan0"
report seen "with a rule of type unreachable, by a request that names lan0: in main $main, in another table $other"
conclude "$steered $named $main $other" "tun0 lan0 lan0 refused"
