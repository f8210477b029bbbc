#!/bin/bash
#
# Question: how long is a SOCKS5 reply that refuses a request?
#
# Why it matters: RFC 1928 gives all replies one form, of ten bytes with an IPv4 address. A client that first reads the four
# bytes up to the address type waits for bytes that never come, and reports a truncated answer instead of "refused".
#
# Seen with: socksv5 0.0.6 and @pondwader/socks5-server 1.0.10. Explained by: the error paths of lib/server.js of socksv5
# (errbuf, BUF_REP_CMDUNSUPP) write the version and the code only, and so does the check of the command in dist/index.js of the
# other package, which answers a refused target in full. RFC 1928, section 6.

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

# ask PORT COMMAND TARGET_PORT prints what the server sends after the request within two seconds, in hexadecimal.
ask() {
	in_space "$host" python3 - "$@" <<'PY'
import socket, sys
port, command, target = map(int, sys.argv[1:])
server = socket.create_connection(("203.0.113.1", port), timeout=20)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
server.sendall(bytes([5, command, 0, 1]) + socket.inet_aton("203.0.113.1") + target.to_bytes(2, "big"))
server.settimeout(2)
reply = b""
try:
    while len(reply) < 10 and (part := server.recv(10 - len(reply))):
        reply += part
except TimeoutError:
    pass
print(reply.hex())
PY
}
connect=1 associate=3
for grant in "$(ask 1080 $connect 1081)" "$(ask 1081 $connect 1080)"; do
	[[ $grant == 05000001???????????? ]] || cannot "a server does not grant in ten bytes: $grant"
done
refused=$(ask 1080 $connect 9)
first=$(ask 1080 $associate 0)
second=$(ask 1081 $associate 0)

report version "socksv5 0.0.6, @pondwader/socks5-server 1.0.10, node $(node --version)"
report expected "ten bytes: 05, the code, 00, and an address, for example 05 05 00 01 00 00 00 00 00 00"
report seen "socksv5: $refused if the target refuses, $first to UDP ASSOCIATE; @pondwader/socks5-server: $second to UDP ASSOCIATE"
conclude "$refused $first $second" "0505 0507 0507"
