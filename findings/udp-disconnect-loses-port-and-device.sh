#!/bin/bash
#
# Question: what does a UDP socket lose, besides its peer, when connect() with AF_UNSPEC dissolves the association?
#
# Why it matters: a program binds to port 0, asks for the port that it got, and tells it to others: a tracker, a DHT, a SOCKS
# server. If it then connects the socket and disconnects it again, for instance to learn its source address, the port is gone:
# datagrams to it are refused, and the next one leaves from another port. A port that bind() was given by its number stays, so
# that a test with a fixed port shows nothing. The device of SO_BINDTODEVICE is gone in any case.
#
# Seen with: Linux 6.18. Explained by: __udp_disconnect() in net/ipv4/udp.c clears the device, and gives the port back unless
# SOCK_BINDPORT_LOCK is set, which __inet_bind() in net/ipv4/af_inet.c sets only if the caller of bind() named a port. connect(2)
# says of AF_UNSPEC only that the association is dissolved.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
ip -n "$host" address add 2001:db8::1/128 dev lo
seen=$(in_space "$host" python3 - <<'PY'
import ctypes, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def disconnect(sock):
    nobody = socket.AF_UNSPEC.to_bytes(2, sys.byteorder) + bytes(26)
    if libc.connect(sock.fileno(), nobody, len(nobody)):
        raise OSError(ctypes.get_errno(), "connect with AF_UNSPEC")

def reachable(family, address, port):
    """Tells whether a socket takes what is sent to this port. If not, the kernel answers that it is unreachable."""
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.connect((address, port))
        sender.send(b"")
        return sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

def device(sock):
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()

for family, address in (socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"):
    for asked in 5000, 0:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        sock.bind((address, asked))
        port = sock.getsockname()[1]
        assert reachable(family, address, port)
        sock.connect((address, 9))
        assert sock.getsockname()[1] == port and device(sock) == "lo"
        disconnect(sock)
        host, now = sock.getsockname()[:2]
        assert host == address, "the address is gone, too"
        kept = now == port and reachable(family, address, port)
        lost = now == 0 and not reachable(family, address, port)
        print(f"port {asked}", "kept," if kept else "lost," if lost else "unclear,", end=" ")
        print("device", "kept" if device(sock) == "lo" else "lost", end="; ")
PY
)
seen=${seen%; }

report version "Linux $(uname -r)"
report expected "the socket is as bind() and SO_BINDTODEVICE have left it: everything kept, with port 5000 and with port 0"
report seen "in IPv4, then in IPv6: $seen"
each="port 5000 kept, device lost; port 0 lost, device lost"
conclude "$seen" "$each; $each"
