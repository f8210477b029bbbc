#!/bin/bash
#
# Question: which port does libtorrent announce in the DHT, if its gateway has given it different ones for TCP and UDP?
#
# Why it matters: with a gateway that cannot give the same number for both, peers that come from the DHT by TCP knock at a port that
# belongs to nobody. The manual says that they come by uTP then ("Transmission and qBittorrent" in viasocks(7)).
#
# Seen with: libtorrent-rasterbar 2.0.8, uTP switched off, so that the announcement has a port and no implied_port (BEP 5). Trackers
# are told the port of TCP.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network
ip -n "$gateway" address add 203.0.113.1/32 dev lo

debs python3-libtorrent=2.0.8-1+b1 libtorrent-rasterbar2.0=2.0.8-1+b1 libboost-python1.74.0=1.74.0+ds1-21
export PYTHONPATH=$work/root/usr/lib/python3/dist-packages
head -c 65536 /dev/zero >"$work/file"

# A gateway that speaks NAT-PMP (RFC 6886) and gives 50001 for TCP and 50002 for UDP.
start "$gateway" natpmp.log /usr/bin/python3 -c '
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("10.66.0.1", 5351))
print("ready", flush=True)
while True:
    m, a = s.recvfrom(100)
    if m[:2] == b"\0\0":
        s.sendto(struct.pack(">BBHI4B", 0, 128, 0, 1, 203, 0, 113, 1), a)
    elif m[0] == 0:
        _, op, _, inner, _, life = struct.unpack(">BBHHHI", m[:12])
        s.sendto(struct.pack(">BBHIHHI", 0, 128 + op, 0, 1, inner, {2: 50001, 1: 50002}[op], life), a)
    else:
        s.sendto(struct.pack(">BBHI", 0, m[1] | 128, 1, 1), a)  # PCP: unsupported version
'

node='
import sys
import libtorrent as lt
common = {"enable_lsd": False, "enable_upnp": False, "enable_natpmp": False, "dht_bootstrap_nodes": "",
    "dht_restrict_routing_ips": False, "dht_restrict_search_ips": False, "dht_ignore_dark_internet": False,
    "alert_mask": lt.alert.category_t.all_categories}
'
# A node of the DHT that prints the port of who announces itself.
start "$gateway" node.log /usr/bin/python3 -c "$node"'
s = lt.session({**common, "listen_interfaces": "10.66.0.1:7777"})
print("ready", flush=True)
while True:
    s.wait_for_alert(1000)
    for a in s.pop_alerts():
        if isinstance(a, lt.dht_announce_alert):
            print("port", a.port, flush=True)
'
# Without an answer at once, libtorrent gives up the gateway.
within 30 grep -q '^ready' "$work/natpmp.log"
within 30 grep -q '^ready' "$work/node.log"
start "$app" app.log /usr/bin/python3 -c "$node"'
s = lt.session({**common, "listen_interfaces": "10.66.0.2:6881", "enable_natpmp": True, "enable_incoming_utp": False,
    "enable_outgoing_utp": False})
mapped = 0
while mapped < 2:
    s.wait_for_alert(1000)
    mapped += sum(isinstance(a, lt.portmap_alert) for a in s.pop_alerts())
s.add_dht_node(("10.66.0.1", 7777))
files = lt.file_storage()
files.add_file("file", 65536)
t = lt.create_torrent(files)
lt.set_piece_hashes(t, sys.argv[1])
p = lt.add_torrent_params()
p.ti = lt.torrent_info(lt.bencode(t.generate()))
p.save_path = sys.argv[1]
s.add_torrent(p)
while True:
    s.wait_for_alert(1000)
    for a in s.pop_alerts():
        print(a.what(), a.message(), flush=True)
' "$work"
within 60 grep -q '^port' "$work/node.log"

seen=$(awk '/^port/ { print $2; exit }' "$work/node.log")
report version "libtorrent-rasterbar 2.0.8-1+b1"
report expected "the port that its gateway has given for TCP: 50001"
report seen "$seen"
conclude "$seen" 50002
