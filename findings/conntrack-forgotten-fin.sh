#!/bin/bash
#
# Question: what does conntrack call the next segment of a connection whose entry was flushed?
#
# Why it matters: conntrack picks up connections that it does not know, so a filter that lets "new" out seems to survive
# `conntrack -F`. That holds for connections that send data next. The FIN of one that is closed next is invalid, and so are its
# retransmissions: behind such a filter the other end may learn of the end only by a timeout.
#
# Seen with: Linux 6.18, nft 1.0.6, conntrack 1.4.7. Explained by: the table tcp_conntracks in
# net/netfilter/nf_conntrack_proto_tcp.c takes an ACK in state NONE as established and a FIN as invalid; tcp_new() refuses the
# latter. The description of nf_conntrack_tcp_loose in Documentation/networking/nf_conntrack-sysctl.rst makes no difference.

. "$(dirname "$0")/lib.bash"

need nft conntrack python3
space host
space peer
ip -n "$host" link add eth0 type veth peer name eth0 netns "$peer"
ip -n "$host" address add 203.0.113.1/24 dev eth0
ip -n "$peer" address add 203.0.113.2/24 dev eth0
ip -n "$peer" link set eth0 up
ip -n "$host" link set eth0 up
in_space "$host" nft -f - <<'RULES' || cannot "nft refuses the rules"
table inet count {
	counter data_picked {}
	counter data_invalid {}
	counter fin_picked {}
	counter fin_invalid {}
	chain output {
		type filter hook output priority 0
		tcp sport 7001 tcp flags & psh == psh ct state new,established counter name data_picked
		tcp sport 7001 tcp flags & psh == psh ct state invalid counter name data_invalid
		tcp sport 7002 tcp flags & fin == fin ct state new,established counter name fin_picked
		tcp sport 7002 tcp flags & fin == fin ct state invalid counter name fin_invalid
	}
}
RULES
[[ $(in_space "$host" sysctl -n net.netfilter.nf_conntrack_tcp_loose) == 1 ]] || cannot "picking up connections is off here"

# The server of the host sends a line on port 7001 and closes its connection on port 7002; in between, conntrack forgets both.
cat >"$work/server.py" <<'PY'
import socket, subprocess, time
servers = [socket.create_server(("203.0.113.1", port)) for port in (7001, 7002)]
speaks, closes = [server.accept()[0] for server in servers]
time.sleep(0.3)
subprocess.run(["conntrack", "-F"], check=True)
speaks.sendall(b"line")
closes.close()
time.sleep(2)
PY
start "$host" server.log python3 "$work/server.py"
within 10 listening "$host" 7001
within 10 listening "$host" 7002
in_space "$peer" python3 - <<'PY'
import socket
peers = [socket.create_connection(("203.0.113.1", port), timeout=10) for port in (7001, 7002)]
assert peers[0].recv(10) == b"line"
assert peers[1].recv(10) == b""
PY

count() { in_space "$host" nft list counter inet count "$1" | sed -n 's/.*packets \([0-9]*\) .*/\1/p'; }
state() {
	local picked invalid
	picked=$(count "$1_picked") invalid=$(count "$1_invalid")
	((picked + invalid > 0)) || cannot "the rules saw no segment of the kind $1"
	((picked > 0)) && echo picked up || echo invalid
}
data=$(state data) fin=$(state fin)

report version "Linux $(uname -r), $(conntrack --version | cut -d' ' -f1,2)"
report expected "both connections are picked up in the middle, as nf_conntrack_tcp_loose=1 says"
report seen "data: $data; FIN: $fin"
conclude "$data, $fin" "picked up, invalid"
