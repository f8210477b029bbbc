#!/bin/bash
#
# Question: may an ip rule match ports up to 65535?
#
# Why it matters: a program that excludes a range of ports up to the last one by an ip rule cannot start, and the kernel's
# message does not name the port.
#
# Seen with: Linux 6.18. Explained by: fib_rule_port_range_valid() in include/net/fib_rules.h, which requires an end below
# 0xffff.

. "$(dirname "$0")/lib.bash"

space host

# add tries to add a rule for a range of ports and prints what came of it.
add() {
	local message
	if message=$(ip -n "$host" rule add priority 100 ipproto tcp dport "$1" lookup main 2>&1); then
		ip -n "$host" rule del priority 100
		echo accepted
	elif [[ $message == *"Invalid"* ]]; then
		echo refused
	else
		cannot "unexpected message: $message"
	fi
}

below=$(add 1024-65534)
last=$(add 1024-65535)
alone=$(add 65535)

report version "Linux $(uname -r)"
report expected "a rule matches any range of ports, up to 65535"
report seen "up to 65534: $below; up to 65535: $last; 65535 alone: $alone"
conclude "$below $last $alone" "accepted refused refused"
