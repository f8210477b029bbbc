#!/bin/bash
#
# Question: by which interface does a DHCP client renew the lease of an interface?
#
# Why it matters: once the default route leads into a tunnel, the request to a server behind a relay goes into the tunnel, with
# the tunnel's address as its source, while the log of the client names the interface that it was started for. A network that
# checks source addresses drops it, and a filter that lets DHCP out of that interface never sees it. The lease is kept only if the
# client gets an answer to the broadcast that follows in the last eighth of its time (RFC 2131, section 4.4.5).
#
# Seen with: dhclient 4.4.3-P1 and dhcpcd 9.4.1. Explained by: the frames by which they broadcast are those of the interface. What
# they send to one server goes through a socket that is bound to no interface and no address: "Socket/fallback" of dhclient, and
# udp_wfd of dhcpcd, to which dhcp_sendudp() gives the destination alone.

. "$(dirname "$0")/lib.bash"

need python3
space server
space client
ip -n "$server" link add v0 type veth peer name v0 netns "$client"
ip -n "$server" link add v1 type veth peer name tunnel netns "$client"
ip -n "$server" address add 10.66.0.1/24 dev v0
ip -n "$server" address add 198.51.100.1/24 dev v1
ip -n "$server" address add 203.0.113.53/32 dev lo
ip -n "$server" link set v0 up
ip -n "$server" link set v1 up
ip -n "$client" link set v0 up
ip -n "$client" address add 198.51.100.2/24 dev tunnel
ip -n "$client" link set tunnel up
ip -n "$client" route add default via 198.51.100.1

debs isc-dhcp-client=4.4.3-P1-2 dhcpcd-base=9.4.1-24~deb12u5

# A server that has the identifier 203.0.113.53 and gives 10.66.0.2, as if through a relay: it is to be asked again after five
# seconds. It writes down each request that is not broadcast, with its source and the interface by which it came.
cat >"$work/server.py" <<'PY'
import select, socket, sys
def at(device):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    s.bind(("", 67))
    return s
near, other = at(b"v0"), at(b"v1")
print("ready", flush=True)
while True:
    for s in select.select([near, other], [], [])[0]:
        m, peer = s.recvfrom(2000)
        options, rest = {}, m[240:]
        while rest and rest[0] != 255:
            if rest[0] == 0:
                rest = rest[1:]
            else:
                options[rest[0]], rest = rest[2:2 + rest[1]], rest[2 + rest[1]:]
        kind, ciaddr = options[53][0], m[12:16]
        if kind not in (1, 3):
            continue
        a = b"\2" + m[1:3] + b"\0" + m[4:8] + bytes(2) + m[10:16] + socket.inet_aton("10.66.0.2") + bytes(8) + m[28:240]
        a += bytes([53, 1, 2 if kind == 1 else 5, 54, 4]) + socket.inet_aton("203.0.113.53")
        a += b"\x33\4\0\0\0\x78" + b"\x3a\4\0\0\0\5" + b"\x3b\4\0\0\0\x69" + b"\1\4\xff\xff\xff\0"
        a += b"\3\4" + socket.inet_aton("10.66.0.1") + b"\xff"
        near.sendto(a + bytes(max(0, 300 - len(a))), (socket.inet_ntoa(ciaddr) if any(ciaddr) else "255.255.255.255", 68))
        if any(ciaddr):
            print("renewal by", "v0" if s is near else "the tunnel", "from", peer[0], flush=True)
PY
cat >"$work/script" <<'END'
#!/bin/sh
[ -z "$new_ip_address" ] || ip address replace "$new_ip_address/24" dev "$interface"
END
chmod +x "$work/script"

# renewal COMMAND... runs a client, and stores how its first renewal came.
renewal() {
	ip -n "$client" address flush dev v0
	start "$server" server.log python3 "$work/server.py"
	within 60 grep -q '^ready' "$work/server.log"
	start "$client" client.log bash -c 'mount -t tmpfs none /run && mount -t tmpfs none /var/lib && exec "$@"' - "$@"
	within 60 grep -q '^renewal' "$work/server.log"
	kill -KILL "${children[0]}" $(ip netns pids "$client") # dhcpcd has been seen to go on after SIGTERM
	wait "${children[@]}" 2>/dev/null || true
	children=()
	by=$(sed -n 's/^renewal by //p' "$work/server.log" | head -n 1)
}
renewal "$work/root/sbin/dhclient" -4 -d -sf "$work/script" -lf "$work/leases" -pf "$work/pid" v0
dhclient=$by
grep -q '^DHCPREQUEST for 10.66.0.2 on v0 to 203.0.113.53' "$work/client.log" ||
	cannot "dhclient says: $(tail -n 3 "$work/client.log")"
renewal "$work/root/usr/sbin/dhcpcd" -4 -B -d -f /dev/null -c "$work/script" v0
dhcpcd=$by

report version "isc-dhcp-client 4.4.3-P1-2, dhcpcd 9.4.1-24~deb12u5, Linux $(uname -r)"
report expected "v0 from 10.66.0.2, as the lease is that of v0"
report seen "dhclient renews by $dhclient, dhcpcd by $dhcpcd"
conclude "$dhclient, $dhcpcd" "the tunnel from 198.51.100.2, the tunnel from 198.51.100.2"
