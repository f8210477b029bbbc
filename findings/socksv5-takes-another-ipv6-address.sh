#!/bin/bash
#
# Question: which address does socksv5 connect to when it is asked for 2001:db8::102?
#
# Why it matters: a client cannot tell. Mostly it is told that the network cannot be reached, and takes that for the target's
# answer; where the other address exists, it speaks to another host.
#
# Seen with: socksv5 0.0.6. Explained by: lib/server.parser.js writes each byte of the address in hexadecimal without a leading
# zero, so that the bytes 20 01 become "201" in place of "2001". RFC 1928, section 5: the address is 16 octets.

. "$(dirname "$0")/lib.bash"

need node npm python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
npm install --prefix "$work/npm" --ignore-scripts --no-audit --no-fund socksv5@0.0.6 >"$work/npm.log" 2>&1 ||
	cannot "npm install failed: $(tail -n 1 "$work/npm.log")"
cat >"$work/npm/server.js" <<'JS'
const socksv5 = require('socksv5');
const server = socksv5.createServer((info, accept, deny) => { console.log('asked for', info.dstAddr); deny(); });
server.useAuth(socksv5.auth.None());
server.listen(1080, '203.0.113.1');
JS
start "$host" node.log node "$work/npm/server.js"
within 20 listening "$host" 1080
in_space "$host" python3 - <<'PY'
import socket
server = socket.create_connection(("203.0.113.1", 1080), timeout=20)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
server.sendall(b"\x05\x01\x00\x04" + socket.inet_pton(socket.AF_INET6, "2001:db8::102") + (80).to_bytes(2, "big"))
server.recv(10)
PY
within 5 grep -q 'asked for' "$work/node.log"
seen=$(sed -n 's/^asked for //p' "$work/node.log")

report version "socksv5 0.0.6, node $(node --version)"
report expected "2001:db8:0:0:0:0:0:102, however it is written"
report seen "$seen"
conclude "$seen" "201:db8:00:00:00:00:00:12"
