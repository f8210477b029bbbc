#!/bin/bash
#
# Question: which port does Transmission announce in the DHT, if its gateway has given it another one?
#
# Why it matters: peers that come from the DHT then knock at a port that belongs to nobody, while those that come from a tracker
# find the right one. The manual therefore asks for the same number at the proxy ("Transmission and qBittorrent" in viasocks(7)).
#
# Seen with: transmission-daemon 3.00. It searches the DHT once it knows nine nodes, which takes a minute here.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network

debs transmission-daemon=3.00-2.1+deb12u1 libnatpmp1=20150609-7.1+b2 libminiupnpc17=2.2.4-1+b1 libevent-2.1-7=2.1.12-stable-8

# A gateway that speaks NAT-PMP (RFC 6886) and gives 50001 for TCP, and ten nodes of the DHT (BEP 5), which know nobody else.
start "$gateway" gateway.log /usr/bin/python3 -c '
import select, socket, struct
def bound(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("10.66.0.1", port))
    return s
gateway = bound(5351)
nodes = {bound(7000 + i): bytes([i * 16]) * 20 for i in range(10)}
def field(m, name, size):
    at = m.find(b"%d:%s" % (len(name), name))
    return m[at:].split(b":", 2)[2][:size] if at >= 0 else b""
print("ready", flush=True)
while True:
    for s in select.select([gateway, *nodes], [], [])[0]:
        m, a = s.recvfrom(2000)
        if s is not gateway:
            tail = m[m.rfind(b"1:t") + 3:]
            size, rest = tail.split(b":", 1)
            tid = b"1:t" + size + b":" + rest[:int(size)]
            if b"13:announce_peer" in m:
                print("port", m.split(b"4:porti", 1)[1].split(b"e", 1)[0].decode(), flush=True)
            if b"1:y1:q" in m:
                s.sendto(b"d1:rd2:id20:" + nodes[s] + b"5:nodes0:5:token4:abcde" + tid + b"1:y1:re", a)
        elif m[:2] == b"\0\0":
            s.sendto(struct.pack(">BBHI4B", 0, 128, 0, 1, 203, 0, 113, 1), a)
        elif m[0] == 0:
            _, op, _, inner, _, life = struct.unpack(">BBHHHI", m[:12])
            s.sendto(struct.pack(">BBHIHHI", 0, 128 + op, 0, 1, inner, 50001, life), a)
'
within 30 grep -q '^ready' "$work/gateway.log"

mkdir "$work/config" "$work/watch" "$work/data"
/usr/bin/python3 - "$work" <<'END'
import hashlib, json, struct, sys
work = sys.argv[1]
data = bytes(65536)
open(work + "/data/file", "wb").write(data)
info = b"d6:lengthi65536e4:name4:file12:piece lengthi65536e6:pieces20:" + hashlib.sha1(data).digest() + b"e"
open(work + "/it.torrent", "wb").write(b"d4:info" + info + b"e")
nodes = b"".join(bytes([10, 66, 0, 1]) + struct.pack(">H", 7000 + i) for i in range(10))
open(work + "/config/dht.dat", "wb").write(b"d2:id20:" + b"i" * 20 + b"5:nodes60:" + nodes + b"e")
json.dump({"port-forwarding-enabled": True, "peer-port": 6881, "dht-enabled": True, "lpd-enabled": False, "utp-enabled": False,
    "rpc-enabled": False, "watch-dir": work + "/watch", "watch-dir-enabled": True, "download-dir": work + "/data",
    "incomplete-dir-enabled": False, "message-level": 3}, open(work + "/config/settings.json", "w"))
END
start "$app" app.log env HOME="$work" "$work/root/usr/bin/transmission-daemon" --foreground --config-dir "$work/config"
within 60 grep -q 'forwarded successfully' "$work/app.log"
mv "$work/it.torrent" "$work/watch/"
within 180 grep -q '^port' "$work/gateway.log"

seen=$(awk '/^port/ { print $2; exit }' "$work/gateway.log")
report version "transmission-daemon 3.00-2.1+deb12u1"
report expected "the port that its gateway has given: 50001"
report seen "$seen"
conclude "$seen" 6881
