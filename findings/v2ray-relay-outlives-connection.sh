#!/bin/bash
#
# Question: does v2ray's UDP relay stop when the client has closed the connection that asked for it?
#
# Why it matters: the connection is the only thing that tells who may use a relay, and for how long. Here datagrams are carried
# without one, so that its end says nothing about UDP; a client that ends an association has not closed what it opened.
#
# Seen with: v2ray 4.34.0. Explained by: the server has one UDP socket for all clients, at the port of the TCP one, and keeps no
# list of associations. RFC 1928, section 7: an association terminates when its TCP connection does. xray and ss-local do so too.

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

seen=$(in_space "$host" python3 - <<'PY'
import socket, time
control = socket.create_connection(("203.0.113.1", 1080), timeout=20)
control.sendall(b"\x05\x01\x00")
assert control.recv(2) == b"\x05\x00"
control.sendall(b"\x05\x03\x00\x01" + bytes(6))
reply = control.recv(10)
assert reply[1] == 0
relay = ("203.0.113.1", int.from_bytes(reply[8:10], "big"))
target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target.bind(("203.0.113.1", 8000))
target.settimeout(2)
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
head = b"\x00\x00\x00\x01" + socket.inet_aton("203.0.113.1") + (8000).to_bytes(2, "big")
def carried():
    client.sendto(head + b"hello", relay)
    try:
        return target.recv(100) == b"hello"
    except TimeoutError:
        return False
assert carried()
control.close()
time.sleep(1)
print("carried" if carried() else "not carried")
PY
)

report version "v2ray 4.34.0+ds-1"
report expected "not carried: the association ended with its connection"
report seen "$seen, one second after the connection was closed"
conclude "$seen" carried
