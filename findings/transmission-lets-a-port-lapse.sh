#!/bin/bash
#
# Question: does Transmission renew a port before it lapses, if its gateway gives the port for a short time?
#
# Why it matters: RFC 6886, section 3.3, lets the gateway give a port for less time than was asked for, and has the client renew
# it when half of that time is over. If it does not, peers cannot reach it from the lapse on until it asks next, while its log
# says that the port is forwarded. A gateway that wants to be asked often must therefore keep a port for longer than it says.
#
# Seen with: transmission-daemon 3.00. Explained by: natpmp.c sets renew_time to half of the lifetime, but
# set_evtimer_from_status() in port-forwarding.c looks at it only every 20 minutes once a port is forwarded.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network

debs transmission-daemon=3.00-2.1+deb12u1 libnatpmp1=20150609-7.1+b2 libminiupnpc17=2.2.4-1+b1 libevent-2.1-7=2.1.12-stable-8 \
	natpmpc=20150609-7.1+b2

# A gateway that speaks NAT-PMP and gives each port for ten seconds.
start "$gateway" gateway.log /usr/bin/python3 -c '
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("10.66.0.1", 5351))
print("ready", flush=True)
while True:
    m, a = s.recvfrom(100)
    if m[:2] == b"\0\0":
        s.sendto(struct.pack(">BBHI4B", 0, 128, 0, 1, 203, 0, 113, 1), a)
    elif m[0] == 0:
        op, inner, outer, life = m[1], *struct.unpack(">HHI", m[4:12])
        s.sendto(struct.pack(">BBHIHHI", 0, 128 + op, 0, 1, inner, outer, min(life, 10)), a)
        print("request", inner, flush=True)
'
within 60 grep -q '^ready' "$work/gateway.log"
answer=$(in_space "$app" "$work/root/usr/bin/natpmpc" -a 6882 6882 tcp 3600)
[[ $answer == *"local port 6882 liftime 10"* ]] || cannot "natpmpc gets no port: $answer"

mkdir "$work/config"
cat >"$work/config/settings.json" <<'END'
{ "port-forwarding-enabled": true, "peer-port": 6881, "dht-enabled": false, "lpd-enabled": false, "utp-enabled": false,
  "rpc-enabled": false, "message-level": 3 }
END
start "$app" app.log env HOME="$work" "$work/root/usr/bin/transmission-daemon" --foreground --config-dir "$work/config"
within 60 grep -q 'forwarded successfully' "$work/app.log"
sleep 45
count=$(grep -c '^request 6881$' "$work/gateway.log")

report version "transmission-daemon 3.00-2.1+deb12u1"
report expected "a request about every five seconds, as the port lapses after ten"
report seen "requests within 45 s of the first answer: $count, the first one included"
conclude "$count" 1
