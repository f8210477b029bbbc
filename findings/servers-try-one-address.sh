#!/bin/bash
#
# Question: which of a name's addresses does a SOCKS server try?
#
# Why it matters: a client that gives the name to the server (socks5h, or fake DNS) cannot try the other addresses itself: it does
# not know them. Without a proxy it would have done so, and users say that a site works only without it.
#
# Seen with: microsocks 1.0.3, armon/go-socks5 of 2 September 2016, dante 1.4.2. Explained by: microsocks connects to the first
# address that getaddrinfo() gives (sockssrv.c), and go-socks5 asks ResolveIPAddr() for one (resolver.go). dante tries
# one after the other, but not an IPv4 address after an IPv6 address. RFC 1928 says nothing about a name with several addresses.

. "$(dirname "$0")/lib.bash"

need python3
space host
for address in 203.0.113.1 203.0.113.7 2001:db8::7; do ip -n "$host" address add $address dev lo; done
debs microsocks=1.0.3-2 dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32
go_program github.com/armon/go-socks5@v0.0.0-20160902184237-e75332964ef5 golang.org/x/net@v0.62.0 <<'GO'
package main

import (
	"log"

	"github.com/armon/go-socks5"
)

func main() {
	server, err := socks5.New(&socks5.Config{})
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(server.ListenAndServe("tcp", "203.0.113.1:1081"))
}
GO

# Nobody listens at 203.0.113.7 and 2001:db8::7. The servers find the names in a file hosts of the namespace, which ip-netns(8)
# binds over that of the system.
mkdir -p "/etc/netns/$host"
printf '%s\n' "203.0.113.1 good-first.example" "203.0.113.7 good-first.example" "203.0.113.7 bad-first.example" \
	"203.0.113.1 bad-first.example" "2001:db8::7 bad-ipv6.example" "203.0.113.1 bad-ipv6.example" >"/etc/netns/$host/hosts"
printf 'hosts: files\n' >"/etc/netns/$host/nsswitch.conf"
: >"/etc/netns/$host/gai.conf"

cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 203.0.113.1 port = 1082
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
CONF
start "$host" microsocks.log "$work/root/usr/bin/microsocks" -i 203.0.113.1 -p 1080
start "$host" go.log "$work/program"
start "$host" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf" -p "$work/danted.pid"
start "$host" target.log python3 -c 'import socket
server = socket.create_server(("203.0.113.1", 8000))
while True:
    server.accept()[0].close()'
for port in 1080 1081 1082 8000; do within 10 listening "$host" $port; done

# ask PORT NAME prints the code of the server's reply to CONNECT.
ask() {
	in_space "$host" python3 - "$1" "$2" <<'PY'
import socket, sys
server = socket.create_connection(("203.0.113.1", int(sys.argv[1])), timeout=30)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
name = sys.argv[2].encode()
server.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + (8000).to_bytes(2, "big"))
print(server.recv(4)[1])
PY
}
# The control: a client without a proxy reaches all three names.
for name in good-first bad-first bad-ipv6; do
	in_space "$host" python3 -c 'import socket, sys
socket.create_connection((sys.argv[1], 8000), timeout=10)' $name.example || cannot "a client without a proxy does not reach $name"
done
for port in 1080 1081 1082; do
	[[ $(ask $port good-first.example) == 0 ]] || cannot "a server does not reach the first of two addresses"
done
microsocks=$(ask 1080 bad-first.example)
gosocks=$(ask 1081 bad-first.example)
dante=$(ask 1082 bad-first.example)
dante6=$(ask 1082 bad-ipv6.example)

report version "microsocks 1.0.3-2, armon/go-socks5 v0.0.0-20160902184237-e75332964ef5, dante-server 1.4.2+dfsg-7+b8"
report expected "reply 0: the first address refuses and the second does not, and a client without a proxy gets through"
report seen "microsocks: reply $microsocks, go-socks5: $gosocks, dante: $dante, and $dante6 if the first address is of IPv6"
conclude "$microsocks $gosocks $dante $dante6" "5 5 0 5"
