#!/bin/bash
#
# Question: what is left of a socket's state when connect() goes through proxychains-ng?
#
# Why it matters: programs set options before they connect: keepalive, a timeout, the source address, close-on-exec. With
# proxychains these are gone without an error, a child inherits the connection, and an epoll set in which the descriptor was
# registered never reports anything, so that the program waits for data that have long arrived.
#
# Seen with: proxychains-ng 4.16. Explained by: connect_proxy_chain() in src/core.c makes a connection to the proxy on a socket of
# its own and puts it in place of the program's by dup2(2), which closes that. An epoll set follows the open file, not the
# number: epoll(7). torsocks makes the connection on the program's own socket.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
ip -n "$host" address add 203.0.113.7/32 dev lo
debs libproxychains4=4.16-2 microsocks=1.0.3-2
start "$host" microsocks.log "$work/root/usr/bin/microsocks" -i 203.0.113.1 -p 1080
cat >"$work/target.py" <<'PY'
import socket
server = socket.create_server(("203.0.113.1", 8000))
peers = []
while True:
    peers.append(server.accept()[0])
    peers[-1].sendall(b"greeting")
PY
start "$host" target.log python3 "$work/target.py"
within 10 listening "$host" 1080
within 10 listening "$host" 8000
printf '%s\n' strict_chain quiet_mode '[ProxyList]' 'socks5 203.0.113.1 1080' >"$work/proxychains.conf"

# The client prints which of the things that it set before connect() are still there afterwards.
cat >"$work/client.py" <<'PY'
import fcntl, select, socket
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
sock.bind(("203.0.113.7", 0))
poll = select.epoll()
poll.register(sock, select.EPOLLIN)
sock.connect(("203.0.113.1", 8000))
assert select.select([sock], [], [], 10)[0], "no greeting"
kept = {
    "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1,
    "timeout": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000,
    "source": sock.getsockname()[0] == "203.0.113.7",
    "close-on-exec": fcntl.fcntl(sock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC != 0,
    "epoll": poll.poll(2) != [],
}
assert sock.recv(8) == b"greeting"
print("kept:", *[name for name in kept if kept[name]], "lost:", *[name for name in kept if not kept[name]])
PY
# The interpreter is started by its own path, so that no wrapper is preloaded.
python=$(python3 -c 'import sys; print(sys.executable)')
direct=$(in_space "$host" "$python" "$work/client.py")
[[ $direct == *"lost:" ]] || cannot "a direct connection loses something: $direct"
library=$(find "$work/root" -name 'libproxychains.so.4')
seen=$(in_space "$host" env PROXYCHAINS_CONF_FILE="$work/proxychains.conf" LD_PRELOAD="$library" "$python" "$work/client.py")

report version "proxychains-ng 4.16-2"
report expected "as without proxychains, $direct nothing"
report seen "$seen"
conclude "$seen" "kept: lost: keepalive timeout source close-on-exec epoll"
