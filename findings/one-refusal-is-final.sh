#!/bin/bash
#
# Question: when does a BitTorrent client ask its gateway again, if the gateway has refused it a port for the moment?
#
# Why it matters: a gateway that has no connection yet, for instance right after the boot, refuses the port with "network
# failure". A minute later it would give the port, but nobody asks, and peers cannot connect to the client, unless somebody starts
# it again: Transmission never asks, and libtorrent only after two hours.
#
# Seen with: Transmission 3.00 by NAT-PMP (RFC 6886), and libtorrent-rasterbar 2.0.8 by PCP, whose refusals say for how long they
# hold (RFC 6887, section 7.4). Explained by: tr_natpmpPulse() of Transmission never leaves the state TR_NATPMP_ERR, though
# set_evtimer_from_status() has it called every minute to try again. natpmp::on_reply() of libtorrent plans the next attempt for
# two hours after any refusal.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network

debs transmission-daemon=3.00-2.1+deb12u1 libnatpmp1=20150609-7.1+b2 libminiupnpc17=2.2.4-1+b1 libevent-2.1-7=2.1.12-stable-8 \
	natpmpc=20150609-7.1+b2 python3-libtorrent=2.0.8-1+b1 libtorrent-rasterbar2.0=2.0.8-1+b1 \
	libboost-python1.74.0=1.74.0+ds1-21
export PYTHONPATH=$work/root/usr/lib/python3/dist-packages

# A gateway that speaks NAT-PMP and PCP. It refuses the first request for each port with "network failure", by PCP for five
# seconds, and grants all later ones.
start "$gateway" gateway.log /usr/bin/python3 -c '
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("10.66.0.1", 5351))
print("ready", flush=True)
known = set()
while True:
    m, a = s.recvfrom(1100)
    if m[:2] == b"\0\0":
        s.sendto(struct.pack(">BBHI4B", 0, 128, 0, 1, 203, 0, 113, 1), a)
    elif m[0] == 0 and m[1] == 2:
        inner, outer, life = struct.unpack(">HHI", m[4:12])
        if inner in known:
            s.sendto(struct.pack(">BBHIHHI", 0, 130, 0, 1, inner, outer, life), a)
        else:
            s.sendto(struct.pack(">BBHIHHI", 0, 130, 3, 1, inner, 0, 0), a)
        print("request", inner, flush=True)
        known.add(inner)
    elif m[0] == 2 and m[36] == 6:
        inner, life = struct.unpack(">H", m[40:42])[0], m[4:8]
        if inner in known:
            s.sendto(b"\2\x81\0\0" + life + b"\0\0\0\1" + bytes(12) + m[24:44] + bytes(10) + b"\xff\xff\xcb\0\x71\1", a)
        else:
            s.sendto(b"\2\x81\0\7" + b"\0\0\0\5" + b"\0\0\0\1" + bytes(12) + m[24:], a)
        print("request", inner, flush=True)
        known.add(inner)
'
within 60 grep -q '^ready' "$work/gateway.log"
ask() { in_space "$app" "$work/root/usr/bin/natpmpc" -a 6883 6883 tcp 3600 2>&1 || true; }
[[ $(ask) == *"network failure"* && $(ask) == *"Mapped public port 6883"* ]] ||
	cannot "natpmpc is not refused first and granted then"

mkdir "$work/config"
cat >"$work/config/settings.json" <<'END'
{ "port-forwarding-enabled": true, "peer-port": 6881, "dht-enabled": false, "lpd-enabled": false, "utp-enabled": false,
  "rpc-enabled": false, "message-level": 3 }
END
start "$app" transmission.log env HOME="$work" "$work/root/usr/bin/transmission-daemon" --foreground --config-dir "$work/config"
start "$app" libtorrent.log /usr/bin/python3 -c '
import time
import libtorrent as lt
s = lt.session({"listen_interfaces": "10.66.0.2:6882", "enable_natpmp": True, "enable_upnp": False, "enable_lsd": False,
    "enable_dht": False})
time.sleep(600)
'
within 60 grep -q '^request 6881' "$work/gateway.log"
within 60 grep -q '^request 6882' "$work/gateway.log"
sleep 75
transmission=$(grep -c '^request 6881$' "$work/gateway.log")
libtorrent=$(grep -c '^request 6882$' "$work/gateway.log")

report version "transmission-daemon 3.00-2.1+deb12u1, libtorrent-rasterbar 2.0.8-1+b1"
report expected "a second request soon, as the refusal was for the moment, by PCP for five seconds"
report seen "requests within 75 s: Transmission $transmission, libtorrent $libtorrent"
conclude "$transmission $libtorrent" "1 1"
