#!/bin/bash
#
# Question: what is the source of a UDP answer if the question was sent to a name through v2ray's SOCKS server?
#
# Why it matters: a datagram may be sent to a name (RFC 1928, section 7), which the server resolves. The header of an answer tells
# where it came from. A client needs that address: DHT and trackers compare it, and one socket may ask several hosts. v2ray
# puts the name there again, so that the client never learns the address, and a client that reads only addresses drops each
# answer. dante puts the address there, as most people expect of something that came from the network.
#
# Seen with: v2ray 4.34.0 and dante 1.4.2. Explained by: v2ray's SOCKS inbound writes each answer with the destination of the
# request (proxy/socks/server.go, handleUDPPayload); xray, sing-box and Tailscale do the same.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
ip -n "$host" address add 203.0.113.9/32 dev lo
debs v2ray=4.34.0+ds-1 dante-server=1.4.2+dfsg-7+b8

# The servers find the name in the file hosts of the namespace, which ip-netns(8) binds over that of the system.
mkdir -p "/etc/netns/$host"
echo "203.0.113.9 echo.example" >"/etc/netns/$host/hosts"
echo "hosts: files" >"/etc/netns/$host/nsswitch.conf"

cat >"$work/v2ray.json" <<'JSON'
{"inbounds": [{"listen": "203.0.113.1", "port": 1080, "protocol": "socks",
  "settings": {"auth": "noauth", "udp": true, "ip": "203.0.113.1"}}],
 "dns": {"hosts": {"echo.example": "203.0.113.9"}},
 "outbounds": [{"protocol": "freedom", "settings": {"domainStrategy": "UseIP"}}]}
JSON
start "$host" v2ray.log "$work/root/usr/bin/v2ray" -config "$work/v2ray.json"
cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 203.0.113.1 port = 1081
external: 203.0.113.1
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: udpassociate }
socks pass { from: 0/0 to: 0/0 command: udpreply }
CONF
start "$host" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf"
within 10 listening "$host" 1080
within 10 listening "$host" 1081

# source_of PORT prints the kind of the source of the answer: address, name, or nothing.
source_of() {
	in_space "$host" python3 - "$1" <<'PY'
import socket, sys
control = socket.create_connection(("203.0.113.1", int(sys.argv[1])), timeout=20)
control.sendall(b"\x05\x01\x00")
assert control.recv(2) == b"\x05\x00"
control.sendall(b"\x05\x03\x00\x01" + bytes(6))
reply = control.recv(10)
assert reply[1] == 0
target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target.bind(("203.0.113.9", 8000))
target.settimeout(5)
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(5)
name = b"echo.example"
head = b"\x00\x00\x00\x03" + bytes([len(name)]) + name + (8000).to_bytes(2, "big")
client.sendto(head + b"question", ("203.0.113.1", int.from_bytes(reply[8:10], "big")))
try:
    question, peer = target.recvfrom(100)
    target.sendto(b"answer", peer)
    answer = client.recv(1000)
    print({1: "address", 3: "name", 4: "address"}.get(answer[3], answer[3]))
except TimeoutError:
    print("nothing")
PY
}
dante=$(source_of 1081)
v2ray=$(source_of 1080)

report version "v2ray 4.34.0+ds-1, dante 1.4.2+dfsg-7+b8"
report expected "both name the address that the answer came from"
report seen "v2ray: $v2ray; dante: $dante"
conclude "$v2ray $dante" "name address"
