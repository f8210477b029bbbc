#!/bin/bash
#
# Question: what arrives of a datagram of 4,000 bytes that is sent through v2ray's SOCKS server?
#
# Why it matters: a datagram arrives whole or not at all; what is built on UDP relies on it and often has no length of its own. A
# DNS answer or a DHT message that was cut is taken for a malformed one, and nobody knows that the proxy did it.
#
# Seen with: v2ray 4.34.0. Explained by: a datagram is read into one buffer of 2,048 bytes (buf.Size in common/buf), and 10 of
# them are the header of RFC 1928, section 7. xray and trojan do the same at 8,192 bytes, sing-box at 16,384.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
debs v2ray=4.34.0+ds-1
cat >"$work/v2ray.json" <<'JSON'
{"inbounds": [{"listen": "203.0.113.1", "port": 1080, "protocol": "socks",
  "settings": {"auth": "noauth", "udp": true, "ip": "203.0.113.1"}}],
 "outbounds": [{"protocol": "freedom"}]}
JSON
start "$host" v2ray.log "$work/root/usr/bin/v2ray" -config "$work/v2ray.json"
within 10 listening "$host" 1080

# through SIZE prints how many bytes of a datagram of that size reach the target.
through() {
	in_space "$host" python3 - "$1" <<'PY'
import socket, sys
size = int(sys.argv[1])
control = socket.create_connection(("203.0.113.1", 1080), timeout=20)
control.sendall(b"\x05\x01\x00")
assert control.recv(2) == b"\x05\x00"
control.sendall(b"\x05\x03\x00\x01" + bytes(6))
reply = control.recv(10)
assert reply[1] == 0
target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target.bind(("203.0.113.1", 8000))
target.settimeout(2)
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
head = b"\x00\x00\x00\x01" + socket.inet_aton("203.0.113.1") + (8000).to_bytes(2, "big")
client.sendto(head + bytes(size), ("203.0.113.1", int.from_bytes(reply[8:10], "big")))
try:
    print(len(target.recv(65535)))
except TimeoutError:
    print("nothing")
PY
}
[[ $(through 1000) == 1000 ]] || cannot "a datagram of 1000 bytes does not arrive"
seen=$(through 4000)

report version "v2ray 4.34.0+ds-1"
report expected "4000 bytes, or nothing"
report seen "$seen bytes"
conclude "$seen" 2038
