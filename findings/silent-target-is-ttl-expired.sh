#!/bin/bash
#
# Question: which reply does a SOCKS5 server give if the target never answers its SYN?
#
# Why it matters: a client that turns replies into the errors of connect() needs to know what reply 6 means. By its name it is
# an ICMP error that a router sent. In fact no ICMP packet came at all, and the honest error is a timeout of the target.
#
# Seen with: dante-server 1.4.2, microsocks 1.0.3. Explained by: RFC 1928, section 6, has no code for a timeout. dante turns
# ETIMEDOUT into reply 6 in errno2reply(), microsocks in connect_socks_target() of sockssrv.c.

. "$(dirname "$0")/lib.bash"

need python3 sysctl
space proxy
space client
ip -n "$proxy" link add eth0 type veth peer name eth0 netns "$client"
ip -n "$proxy" address add 203.0.113.1/24 dev eth0
ip -n "$client" address add 203.0.113.2/24 dev eth0
ip -n "$client" link set eth0 up
ip -n "$proxy" link set eth0 up
# Nobody has this link address, so a SYN to 203.0.113.9 is sent and never answered. One retransmission instead of six saves time.
ip -n "$proxy" neighbour add 203.0.113.9 lladdr 02:00:00:00:00:09 dev eth0
in_space "$proxy" sysctl -qw net.ipv4.tcp_syn_retries=1

debs dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32 microsocks=1.0.3-2
cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 203.0.113.1 port = 1080
external: eth0
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
CONF
start "$proxy" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf"
start "$proxy" microsocks.log "$work/root/usr/bin/microsocks" -i 203.0.113.1 -p 1081
within 10 listening "$proxy" 1080
within 10 listening "$proxy" 1081

# ask PORT TARGET prints the code of the server's reply to CONNECT.
ask() {
	in_space "$client" python3 - "$1" "$2" <<'PY'
import socket, sys
server = socket.create_connection(("203.0.113.1", int(sys.argv[1])), timeout=60)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
server.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(sys.argv[2]) + b"\x00\x51")
print(server.recv(4)[1])
PY
}
for port in 1080 1081; do
	[[ $(ask "$port" 203.0.113.2) == 5 ]] || cannot "a closed port of a live target does not get reply 5 (connection refused)"
done
dante=$(ask 1080 203.0.113.9)
microsocks=$(ask 1081 203.0.113.9)
packets=$(in_space "$proxy" cat /proc/net/snmp | awk '/^Icmp:/ && $2 ~ /[0-9]/ { print $2 }')

report version "dante-server 1.4.2+dfsg-7+b8, microsocks 1.0.3-2"
report expected "reply 1 (general failure) or 4 (host unreachable)"
report seen "dante: reply $dante, microsocks: reply $microsocks (6 is TTL expired); ICMP packets that the host received: $packets"
conclude "$dante $microsocks, $packets ICMP" "6 6, 0 ICMP"
