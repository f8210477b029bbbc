#!/bin/bash
#
# Question: is a program that listens for changes of the routes told about all those that the kernel removes?
#
# Why it matters: a program that keeps a copy of the routes, or puts its own back when somebody removes them, listens to
# RTNLGRP_IPV4_ROUTE. IPv4 routes that go with their device or with their nexthop object go without RTM_DELROUTE, so that the
# copy shows routes that are not there. The same program is right about IPv6, and about IPv4 routes that go with an address.
#
# Seen with: Linux 6.18. Explained by: fib_table_flush() in net/ipv4/fib_trie.c removes the dead routes and sends a message only
# for those whose source address was removed. rtnetlink(7) does not tell. A listener needs the messages about links and nexthop
# objects, too.

. "$(dirname "$0")/lib.bash"

space host
ip -n "$host" link add eth0 type veth peer name eth1
ip -n "$host" link set eth1 up
ip -n "$host" link set eth0 up
ip -n "$host" address add 203.0.113.1/24 dev eth0
ip -n "$host" address add 203.0.113.2/32 dev eth0
ip -n "$host" address add 2001:db8::1/64 dev eth0 nodad
within 10 ip -n "$host" nexthop replace id 6 via 2001:db8::9 dev eth0
ip -n "$host" nexthop add id 4 via 203.0.113.9 dev eth0

# The routes are named after what they go with.
with_address=198.51.100.0/26 with_nexthop=198.51.100.64/26 with_link=198.51.100.128/26
with_nexthop6=2001:db8:1::/64 with_link6=2001:db8:2::/64
ip -n "$host" route add $with_address via 203.0.113.9 src 203.0.113.2
ip -n "$host" route add $with_nexthop nhid 4
ip -n "$host" route add $with_link via 203.0.113.9
ip -n "$host" route add $with_nexthop6 nhid 6
ip -n "$host" route add $with_link6 via 2001:db8::9

# Messages come in order: once the listener has printed a mark, it has printed everything before it.
start "$host" monitor.log ip monitor route
mark() {
	ip -n "$host" route add "$1" dev lo
	ip -n "$host" route del "$1" dev lo
	grep -q "^Deleted $1 " "$work/monitor.log"
}
within 10 mark 192.0.2.1
ip -n "$host" address del 203.0.113.2/32 dev eth0
ip -n "$host" nexthop del id 4
ip -n "$host" nexthop del id 6
ip -n "$host" link set eth0 down
within 10 mark 192.0.2.2

# told ROUTE prints whether the listener was told that this route has gone.
told() {
	[[ -z $(ip -n "$host" route show "$1") ]] || cannot "the route $1 is still there"
	if grep -q "^Deleted $1 " "$work/monitor.log"; then echo told; else echo silent; fi
}
[[ $(told $with_nexthop6) == told && $(told $with_link6) == told ]] || cannot "the listener was not told about IPv6 either"
address=$(told $with_address)
nexthop=$(told $with_nexthop)
link=$(told $with_link)

report version "Linux $(uname -r)"
report expected "the listener is told about each route that has gone, as it is in IPv6"
report seen "IPv4 routes that go with their source address: $address; with their nexthop object: $nexthop; with their link: $link"
conclude "$address $nexthop $link" "told silent silent"
