#!/bin/bash
#
# Question: what does ss-local answer to UDP ASSOCIATE if it was started without UDP?
#
# Why it matters: a client learns from reply 7 that a proxy has no UDP, and can then fail at once or use TCP. ss-local has UDP
# only with -u, but it grants each UDP ASSOCIATE and names its own address and port, where no UDP socket is open. The datagrams
# are lost, and DNS over this proxy times out without a message.
#
# Seen with: shadowsocks-libev 3.3.5. Explained by: server_handshake() in src/local.c answers UDP ASSOCIATE with success, whatever
# the mode is. RFC 1928, section 6, has reply 7 for a command that is not supported.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
debs shadowsocks-libev=3.3.5+ds-10 libbloom1=1.6-6 libc-ares2=1.18.1-3 libcork16=1.0.0~rc3-3 libev4=1:4.33-1 \
	libcorkipset1=1.1.1+git20171111.6842a63-2 libjsonparser1.1=1.1.0-2 libmbedcrypto7=2.28.3-1 libpcre3=2:8.39-15 \
	libsodium23=1.0.18-1+deb12u1
common=(-s 203.0.113.1 -p 8388 -k finding -m aes-256-gcm)
start "$host" server.log "$work/root/usr/bin/ss-server" "${common[@]}" -u
start "$host" tcp.log "$work/root/usr/bin/ss-local" "${common[@]}" -b 203.0.113.1 -l 1080
start "$host" both.log "$work/root/usr/bin/ss-local" "${common[@]}" -b 203.0.113.1 -l 1081 -u
for port in 8388 1080 1081; do within 10 listening "$host" $port; done

# ask PORT prints the code of the reply to UDP ASSOCIATE, and what becomes of a datagram that is sent to the relay.
ask() {
	in_space "$host" python3 - "$1" <<'PY'
import errno, socket, sys
target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target.bind(("203.0.113.1", 7000))
target.settimeout(5)
control = socket.create_connection(("203.0.113.1", int(sys.argv[1])), timeout=20)
control.sendall(b"\x05\x01\x00")
assert control.recv(2) == b"\x05\x00"
control.sendall(b"\x05\x03\x00\x01" + bytes(6))
reply = control.recv(10)
print(reply[1], end=" ")
relay = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
relay.connect((socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:10], "big")))
relay.send(b"\x00\x00\x00\x01" + socket.inet_aton("203.0.113.1") + (7000).to_bytes(2, "big") + b"question")
try:
    target.recv(100)
    print("arrived")
except TimeoutError:
    print("refused" if relay.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED else "lost")
PY
}
both=$(ask 1081)
[[ $both == "0 arrived" ]] || cannot "with -u, UDP does not work: $both"
seen=$(ask 1080)

report version "shadowsocks-libev 3.3.5+ds-10"
report expected "reply 7 (command not supported) from ss-local without -u"
report seen "reply ${seen% *}, and a datagram to the relay that it names is ${seen#* } by the kernel; with -u: reply ${both/ /, }"
conclude "$seen" "0 refused"
