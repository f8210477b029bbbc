#!/bin/bash
#
# Question: does aria2 announce itself to a UDP tracker when DHT is off?
#
# Why it matters: --enable-dht=false is a common setting for private torrents. Somebody who tests a proxy or a tunnel with
# such a torrent sees no UDP at all, and looks for the fault in the tunnel.
#
# Seen with: aria2 1.36.0. Explained by: DefaultBtAnnounce and DHTSetup share one UDP connection, which only the set-up of DHT
# makes; without it each udp:// address of a tracker counts as one that has failed.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 192.0.2.1/32 dev lo
debs aria2=1.36.0-1 libaria2-0=1.36.0-1

# The tracker counts the datagrams that come to it, and answers the requests to connect (BEP 15).
cat >"$work/tracker.py" <<'PY'
import socket, sys
tracker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tracker.bind(("192.0.2.1", 6969))
while True:
    request, peer = tracker.recvfrom(2048)
    with open(sys.argv[1], "a") as f:
        f.write("datagram\n")
    if len(request) >= 16 and request[8:12] == b"\0\0\0\0":
        tracker.sendto(b"\0\0\0\0" + request[12:16] + b"connect!", peer)
    else:
        tracker.sendto(b"\0\0\0\1" + request[12:16] + bytes(3) + b"\x3c" + bytes(8), peer)
PY
start "$host" tracker.log python3 "$work/tracker.py" "$work/seen"
python3 - "$work/file.torrent" <<'PY'
import hashlib, sys
pieces = hashlib.sha1(bytes(16384)).digest()
info = b"d6:lengthi16384e4:name4:file12:piece lengthi16384e6:pieces20:" + pieces + b"e"
url = b"udp://192.0.2.1:6969/announce"
open(sys.argv[1], "wb").write(b"d8:announce%d:%s4:info%se" % (len(url), url, info))
PY

# announced on|off tells whether a datagram came to the tracker within eight seconds.
announced() {
	: >"$work/seen"
	local dht=false
	[[ $1 == off ]] || dht=true
	in_space "$host" timeout 8 "$work/root/usr/bin/aria2c" --no-conf --enable-dht=$dht --dht-file-path="$work/dht.dat" \
		--bt-enable-lpd=false --dir="$work/download" --allow-overwrite=true "$work/file.torrent" >"$work/aria2.log" 2>&1 || true
	if [[ -s $work/seen ]]; then echo announced; else echo silent; fi
}
[[ $(announced on) == announced ]] || cannot "aria2 does not announce itself with DHT either: $(tail -n 3 "$work/aria2.log")"
seen=$(announced off)

report version "aria2 1.36.0-1"
report expected "UDP trackers (BEP 15) are asked whether or not DHT (BEP 5) is on, as HTTP trackers are"
report seen "with --enable-dht=false: $seen"
conclude "$seen" silent
