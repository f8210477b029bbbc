#!/bin/bash
#
# Question: which SOCKS5 reply does `ssh -D` give if the target refuses the connection?
#
# Why it matters: a client sees the same as if the server had died in the middle of a request. It must not take the server for
# broken and try another one: the end of the connection after a complete request is this server's way to say "refused".
#
# Seen with: OpenSSH 9.2p1. Explained by: channel_decode_socks5() in channels.c writes the reply for success into the output
# buffer before the channel is open, and channel_input_open_failure() closes a channel that could not be opened without
# writing any. RFC 1928, section 6, asks for a reply before the connection is closed.

. "$(dirname "$0")/lib.bash"

need python3
id sshd >/dev/null 2>&1 || cannot "sshd needs the user sshd for its separation of privileges"
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
debs openssh-server=1:9.2p1-2+deb12u10 openssh-client=1:9.2p1-2+deb12u10 libwrap0=7.6.q-32
mkdir -p /run/sshd
"$work/root/usr/bin/ssh-keygen" -q -t ed25519 -N '' -f "$work/host_key"
"$work/root/usr/bin/ssh-keygen" -q -t ed25519 -N '' -f "$work/key"
cp "$work/key.pub" "$work/authorized"
start "$host" sshd.log "$work/root/usr/sbin/sshd" -D -e -f /dev/null -h "$work/host_key" -p 2222 -o ListenAddress=203.0.113.1 \
	-o UsePAM=no -o PidFile=none -o StrictModes=no -o AuthorizedKeysFile="$work/authorized" -o PermitRootLogin=yes
within 10 listening "$host" 2222
start "$host" ssh.log "$work/root/usr/bin/ssh" -F /dev/null -N -D 203.0.113.1:1080 -p 2222 -i "$work/key" -o IdentitiesOnly=yes \
	-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@203.0.113.1
within 20 listening "$host" 1080

# ask PORT prints the reply to CONNECT, in hexadecimal, and how the connection ended.
ask() {
	in_space "$host" python3 - "$1" <<'PY'
import socket, sys
server = socket.create_connection(("203.0.113.1", 1080), timeout=20)
server.sendall(b"\x05\x01\x00")
assert server.recv(2) == b"\x05\x00"
server.sendall(b"\x05\x01\x00\x01" + socket.inet_aton("203.0.113.1") + int(sys.argv[1]).to_bytes(2, "big"))
try:
    print(server.recv(10)[:4].hex() or "FIN without a reply")
except ConnectionResetError:
    print("RST without a reply")
PY
}
[[ $(ask 2222) == 05000001 ]] || cannot "ssh does not grant a connection to a port that listens"
seen=$(ask 9)

report version "OpenSSH 1:9.2p1-2+deb12u10"
report expected "reply 5 (connection refused), 05050001, as dante and microsocks give"
report seen "$seen"
conclude "$seen" "FIN without a reply"
