#!/bin/bash
#
# Question: at which port does dante listen for BIND, and for how many peers?
#
# Why it matters: a program announces one port, at which many peers shall find it. A client that asks for that port can have it
# only in turns, and only if it names no address: else every port that it announces is forgotten with the next BIND.
#
# Seen with: dante-server 1.4.2. RFC 1928, section 4, gives DST.ADDR and DST.PORT of BIND another sense: they name the server
# from which the connection is expected. It says nothing of the port that the proxy chooses. One BIND is for one connection.

. "$(dirname "$0")/lib.bash"

need python3
space proxy
ip -n "$proxy" address add 203.0.113.1/32 dev lo

debs dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32
cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 127.0.0.1 port = 1080
external: 203.0.113.1
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: connect bind udpassociate }
socks pass { from: 0/0 to: 0/0 command: bindreply udpreply }
CONF
start "$proxy" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf"
within 10 listening "$proxy" 1080

# Prints what becomes of the port that is asked for: with the address 0.0.0.0; a second time while the first BIND waits; with
# the address of a peer. Then what a second peer at the first BIND's port finds.
seen=$(in_space "$proxy" python3 - <<'PY'
import socket, struct

def bind(host, port):
    s = socket.create_connection(("127.0.0.1", 1080), timeout=20)
    s.sendall(b"\x05\x01\x00")
    assert s.recv(2) == b"\x05\x00"
    s.sendall(b"\x05\x02\x00\x01" + socket.inet_aton(host) + struct.pack(">H", port))
    reply = s.recv(300)
    assert reply[1] == 0, reply
    return s, struct.unpack(">H", reply[8:10])[0]

def word(port):
    return "kept" if port == asked else "another"

asked = 40001
first, at = bind("0.0.0.0", asked)
second, other = bind("0.0.0.0", asked)
words = [word(at), word(other)]
asked = 40002
named, chosen = bind("203.0.113.1", asked)
words.append(word(chosen))
peer = socket.create_connection(("203.0.113.1", at), timeout=20)
assert first.recv(300)[1] == 0
try:
    # It may get into the queue before the socket is closed, and is reset then.
    end = socket.create_connection(("203.0.113.1", at), timeout=20).recv(1)
    words.append("closed" if end == b"" else "served")
except (ConnectionRefusedError, ConnectionResetError):
    words.append("refused")
except TimeoutError:
    words.append("waiting")
print(*words)
PY
)

report version "dante-server 1.4.2+dfsg-7+b8"
report expected "the port that was asked for, or an error, and one that goes on listening: kept refused kept waiting"
report seen "0.0.0.0, a second time, an address, a second peer: $seen"
conclude "$seen" "kept another another refused"
