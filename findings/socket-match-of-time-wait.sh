#!/bin/bash
#
# Question: do the nftables matches for "this user" and "any other user" together see every packet that a host sends?
#
# Why it matters: a program that marks the packets of one user, so that they are routed apart from those of the others, sees
# packets that neither line matches: the answers of a connection in TIME_WAIT. They take the wrong way, and the other end repeats
# its FIN in vain. A connection mark, set while the connection had its socket, finds them.
#
# Seen with: Linux 6.18, nft 1.0.6. Explained by: a socket in TIME_WAIT is a struct inet_timewait_sock, which has no user
# and no control group. nft_meta_get_eval_skugid() in net/netfilter/nft_meta.c and nft_socket_eval() in
# net/netfilter/nft_socket.c then end the rule, whatever its operator is.

. "$(dirname "$0")/lib.bash"

need nft python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
in_space "$host" nft -f - <<'RULES' || cannot "nft refuses the rules"
table inet count {
	counter same {}
	counter other {}
	counter every {}
	chain output {
		type filter hook output priority 0
		ip saddr 203.0.113.1 tcp sport 7000 tcp flags & (syn | rst) == 0 jump answers
	}
	chain answers {
		counter name every
		meta skuid 0 counter name same
		meta skuid != 0 counter name other
	}
}
RULES

# The end that closes first keeps TIME_WAIT. Its last ACK, the answer to the FIN of the other end, has no full socket: that is
# why the other end waits until the first FIN has been answered. All others come from a socket of root.
in_space "$host" python3 - <<'PY'
import socket, time
server = socket.create_server(("203.0.113.1", 7000))
client = socket.create_connection(("203.0.113.1", 7000))
accepted, _ = server.accept()
accepted.close()
assert client.recv(1) == b""
time.sleep(0.3)
client.close()
time.sleep(0.3)
PY

count() { in_space "$host" nft list counter inet count "$1" | sed -n 's/.*packets \([0-9]*\) .*/\1/p'; }
all=$(count every) same=$(count same) other=$(count other)
((all > 0 && same > 0)) || cannot "the rules saw no packets ($all, $same)"

report version "Linux $(uname -r), $(nft --version | cut -d' ' -f1,2)"
report expected "each packet of the connection matches either 'meta skuid 0' or 'meta skuid != 0'"
report seen "of $all packets, $same matched the first and $other the second: $((all - same - other)) matched neither"
if ((all > same + other)); then neither=some; else neither=none; fi
conclude "$other match the second, $neither match neither" "0 match the second, some match neither"
