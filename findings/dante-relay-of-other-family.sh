#!/bin/bash
#
# Question: is the relay of dante's UDP ASSOCIATE at an address of the family by which the client has reached dante?
#
# Why it matters: a client that has only IPv6, and fills DST.ADDR with the usual zeros of an IPv4 request, gets a relay that it
# cannot reach. Its datagrams are lost, while dante has said that it succeeded. The zeros must be of the right family.
#
# Seen with: dante-server 1.4.2. Explained by: RFC 1928, section 6, says only that a client without an address sends zeros, and
# does not mention their family. dante chooses the family of the relay's socket by the address type of the request.

. "$(dirname "$0")/lib.bash"

need python3
space proxy
space client
ip -n "$proxy" link add eth0 type veth peer name eth0 netns "$client"
ip -n "$proxy" address add 203.0.113.1/24 dev eth0
ip -n "$proxy" address add 2001:db8::1/64 dev eth0 nodad
ip -n "$client" address add 2001:db8::2/64 dev eth0 nodad
ip -n "$client" link set eth0 up
ip -n "$proxy" link set eth0 up

debs dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32
cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 203.0.113.1 port = 1080
internal: 2001:db8::1 port = 1080
external: eth0
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
CONF
start "$proxy" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf"
within 10 listening "$proxy" 1080

# associate ATYP ZEROS prints the reply's code and the relay's address.
associate() {
	in_space "$client" python3 - "$1" "$2" <<'PY'
import socket, sys
server = socket.create_connection(("2001:db8::1", 1080), timeout=20)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
server.sendall(bytes([5, 3, 0, int(sys.argv[1])]) + bytes(int(sys.argv[2])) + b"\x00\x00")
reply = server.recv(300)
family, size = {1: (socket.AF_INET, 4), 4: (socket.AF_INET6, 16)}[reply[3]]
print(reply[1], socket.inet_ntop(family, reply[4:4 + size]))
PY
}
[[ $(associate 4 16) == "0 2001:db8::1" ]] || cannot "zeros of IPv6 do not get an IPv6 relay"
seen=$(associate 1 4)

report version "dante-server 1.4.2+dfsg-7+b8"
report expected "a client that came by IPv6 gets a relay at the address that it has connected to: 0 2001:db8::1"
report seen "reply and relay for zeros of IPv4: $seen"
conclude "$seen" "0 203.0.113.1"
