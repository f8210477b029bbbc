#!/bin/bash
#
# Question: does dante pass on a connection that was reset as a reset?
#
# Why it matters: a program takes a FIN for the end of the data. A download that was reset in the middle looks complete when the
# proxy turns the reset into a FIN. With dante, a word about the log decides that.
#
# Seen with: dante-server 1.4.2. A rule that lets a connection pass has a list of what is logged; with "error" or "disconnect" in
# it the other side is reset, without them it gets a FIN. sockd.conf(5) says of "log" only what is written to the log. RFC 9293,
# section 3.5.3, tells the user of a connection that was reset.

. "$(dirname "$0")/lib.bash"

need python3
debs dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32

# after LOG prints what the client gets, and what the target gets, when the other of them resets the connection.
after() {
	space host
	ip -n "$host" address add 203.0.113.1/32 dev lo
	cat >"$work/danted.conf" <<CONF
logoutput: $work/danted.log
internal: 203.0.113.1 port = 1080
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 $1 }
CONF
	start "$host" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf" -p "$work/danted.pid"
	within 10 listening "$host" 1080
	in_space "$host" python3 - <<'PY' >"$work/seen"
import socket, struct
target = socket.create_server(("203.0.113.1", 8000))
def pair():
    near = socket.create_connection(("203.0.113.1", 1080), timeout=20)
    near.sendall(b"\x05\x01\x00")
    assert near.recv(2) == b"\x05\x00"
    near.sendall(b"\x05\x01\x00\x01" + socket.inet_aton("203.0.113.1") + (8000).to_bytes(2, "big"))
    assert near.recv(10)[1] == 0
    far, _ = target.accept()
    far.settimeout(20)
    near.sendall(b"question"); assert far.recv(8)
    far.sendall(b"answer"); assert near.recv(6)
    return near, far
def reset(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
def end(s):
    try:
        return "FIN" if s.recv(1) == b"" else "data"
    except ConnectionResetError:
        return "RST"
near, far = pair()
reset(far)
client = end(near)
near, far = pair()
reset(near)
print(client, end(far))
PY
	kill "${children[@]}"
	wait "${children[@]}" 2>/dev/null || true
	children=()
	ip netns del "$host"
	spaces=()
	cat "$work/seen"
}
after "" >"$work/quiet"
after "log: error" >"$work/logged"
seen="$(cat "$work/quiet"), $(cat "$work/logged")"

report version "dante-server 1.4.2+dfsg-7+b8"
report expected "both sides see the other's reset, whatever is logged: RST RST, RST RST"
report seen "without a log: $(cat "$work/quiet"); with \"log: error\": $(cat "$work/logged")"
conclude "$seen" "FIN FIN, RST RST"
