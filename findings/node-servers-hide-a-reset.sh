#!/bin/bash
#
# Question: what does the client of a SOCKS server on Node.js get when the target resets the connection?
#
# Why it matters: a client waits for the rest of an answer that will never come, until its own timeout. No client can mend that,
# and no keepalive helps: the connection to the proxy is alive.
#
# Seen with: socksv5 0.0.6 and @pondwader/socks5-server 1.0.10. Explained by: they join the two sockets by pipe(), and stream.pipe
# of Node.js does not end its destination when its source fails, as the documents of readable.pipe() warn.

. "$(dirname "$0")/lib.bash"

need node npm python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
npm install --prefix "$work/npm" --ignore-scripts --no-audit --no-fund socksv5@0.0.6 @pondwader/socks5-server@1.0.10 \
	>"$work/npm.log" 2>&1 || cannot "npm install failed: $(tail -n 1 "$work/npm.log")"
cat >"$work/npm/servers.js" <<'JS'
const socksv5 = require('socksv5');
const first = socksv5.createServer((info, accept) => accept());
first.useAuth(socksv5.auth.None());
first.listen(1080, '203.0.113.1');
require('@pondwader/socks5-server').createServer().listen(1081, '203.0.113.1');
JS
start "$host" node.log node "$work/npm/servers.js"
within 20 listening "$host" 1080
within 20 listening "$host" 1081

# through PORT prints what the client gets within three seconds of the target's reset.
through() {
	in_space "$host" python3 - "$1" <<'PY'
import socket, struct, sys, time
target = socket.create_server(("203.0.113.1", 8000))
near = socket.create_connection(("203.0.113.1", int(sys.argv[1])), timeout=20)
near.sendall(b"\x05\x01\x00")
assert near.recv(2) == b"\x05\x00"
near.sendall(b"\x05\x01\x00\x01" + socket.inet_aton("203.0.113.1") + (8000).to_bytes(2, "big"))
assert near.recv(10)[1] == 0
far, _ = target.accept()
near.sendall(b"question"); assert far.recv(8)
far.sendall(b"answer"); assert near.recv(6)
time.sleep(0.2)
far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
far.close()
near.settimeout(3)
try:
    print("FIN" if near.recv(1) == b"" else "data")
except ConnectionResetError:
    print("RST")
except TimeoutError:
    print("nothing")
PY
}
seen="$(through 1080) $(through 1081)"

report version "socksv5 0.0.6, @pondwader/socks5-server 1.0.10, node $(node --version)"
report expected "RST RST, or at least FIN FIN"
report seen "$seen"
conclude "$seen" "nothing nothing"
