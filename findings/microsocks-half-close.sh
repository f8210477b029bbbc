#!/bin/bash
#
# Question: does a download through microsocks go on after the client has closed its sending side?
#
# Why it matters: a program that marks the end of its request by a FIN, and then reads the answer, loses the answer. A SOCKS
# client that passes the FIN on as the program sent it is blamed for that, while one that delays the FIN hides it.
#
# Seen with: microsocks 1.0.3. Explained by: copyloop() in sockssrv.c returns when read() gives 0 on either side, and its caller
# then closes both sockets. RFC 9293, section 3.6, lets a connection be closed in one direction only.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
debs microsocks=1.0.3-2
start "$host" microsocks.log "$work/root/usr/bin/microsocks" -i 203.0.113.1 -p 1080
within 10 listening "$host" 1080

# The target answers after it has seen the end of the request.
cat >"$work/target.py" <<'PY'
import socket, time
server = socket.create_server(("203.0.113.1", 8000))
while True:
    peer, _ = server.accept()
    try:
        while peer.recv(4096):
            pass
        time.sleep(0.5)
        peer.sendall(bytes(10000))
    except OSError:
        pass
    peer.close()
PY
start "$host" target.log python3 "$work/target.py"
within 10 listening "$host" 8000

# fetch direct|socks prints how many bytes of the answer arrive.
fetch() {
	in_space "$host" python3 - "$1" <<'PY'
import socket, sys
if sys.argv[1] == "direct":
    peer = socket.create_connection(("203.0.113.1", 8000), timeout=20)
else:
    peer = socket.create_connection(("203.0.113.1", 1080), timeout=20)
    peer.sendall(b"\x05\x01\x00")
    assert peer.recv(2) == b"\x05\x00"
    peer.sendall(b"\x05\x01\x00\x01" + socket.inet_aton("203.0.113.1") + (8000).to_bytes(2, "big"))
    assert peer.recv(10)[1] == 0
peer.sendall(b"request")
peer.shutdown(socket.SHUT_WR)
total = 0
try:
    while part := peer.recv(65536):
        total += len(part)
except ConnectionResetError:
    pass
print(total)
PY
}
[[ $(fetch direct) == 10000 ]] || cannot "the target does not answer without a proxy"
seen=$(fetch socks)

report version "microsocks 1.0.3-2"
report expected "10000 bytes arrive after the client has closed its sending side, as they do without the proxy"
report seen "$seen bytes arrive"
conclude "$seen" 0
