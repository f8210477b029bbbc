#!/bin/bash
#
# Question: does libtorrent repeat a request for a port by NAT-PMP that was lost?
#
# Why it matters: datagrams get lost, and RFC 6886, section 3.1, has the client repeat its request after 250 ms. If it does not,
# the program has no port. A gateway that needs time to find a port must therefore not leave the first request without an answer:
# no second one comes.
#
# Seen with: libtorrent-rasterbar 2.0.8, which qBittorrent and Deluge use. Explained by: natpmp::on_reply() cancels the timer
# that repeats the request whenever a datagram comes from the gateway. libtorrent asks for the address of the gateway right after
# the port, so that the answer about the address cancels the repetition of the request for the port.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network

debs python3-libtorrent=2.0.8-1+b1 libtorrent-rasterbar2.0=2.0.8-1+b1 libboost-python1.74.0=1.74.0+ds1-21
export PYTHONPATH=$work/root/usr/lib/python3/dist-packages

# A gateway that speaks NAT-PMP and no PCP. It gives every port that is asked for, but treats the first request as lost. With the
# argument "silent" it says nothing about its address either.
cat >"$work/gateway.py" <<'PY'
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("10.66.0.1", 5351))
print("ready", flush=True)
seen = 0
while True:
    m, a = s.recvfrom(100)
    if m[0] != 0:
        s.sendto(struct.pack(">BBHI", 0, m[1] | 128, 1, 1), a)  # PCP: unsupported version
    elif m[1] == 0:
        if sys.argv[1] != "silent":
            s.sendto(struct.pack(">BBHI4B", 0, 128, 0, 1, 203, 0, 113, 1), a)
            print("address", flush=True)
    elif m[1] == 2:
        inner, outer, life = struct.unpack(">HHI", m[4:12])
        if life == 0:  # the end of the program
            continue
        seen += 1
        print("request", seen, flush=True)
        if seen > 1:
            s.sendto(struct.pack(">BBHIHHI", 0, 130, 0, 1, inner, outer, life), a)
PY
cat >"$work/app.py" <<'PY'
import time
import libtorrent as lt
s = lt.session({"listen_interfaces": "10.66.0.2:6881", "enable_natpmp": True, "enable_upnp": False, "enable_lsd": False,
    "enable_dht": False})
time.sleep(600)
PY

# requests WORD SECONDS prints how many requests for the TCP port come within SECONDS after the first one.
requests() {
	start "$gateway" gateway.log /usr/bin/python3 "$work/gateway.py" "$1"
	within 60 grep -q '^ready' "$work/gateway.log"
	start "$app" app.log /usr/bin/python3 "$work/app.py"
	within 60 grep -q '^request' "$work/gateway.log"
	sleep "$2"
	kill "${children[@]}"
	wait "${children[@]}" || true
	children=()
	count=$(grep -c '^request' "$work/gateway.log" || true)
}
requests silent 10
((count >= 2)) || cannot "libtorrent repeats no request at all"
requests answers 15
grep -q '^address' "$work/gateway.log" || cannot "libtorrent did not ask for the address"

report version "libtorrent-rasterbar 2.0.8-1+b1"
report expected "the request is repeated after 250 ms, and the port is given then"
report seen "requests within 15 s: $count"
conclude "$count" 1
