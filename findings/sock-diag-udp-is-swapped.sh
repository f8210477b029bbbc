#!/bin/bash
#
# Question: how is one UDP socket asked for by sock_diag, without a dump of all?
#
# Why it matters: a program that asks whether the socket of a flow still exists gets "no such entry" for each UDP socket if it
# asks as it does for TCP, and then ends flows that are alive.
#
# Seen with: Linux 6.18. Explained by: udp_dump_one(), later udp_diag_dump_one(), in net/ipv4/udp_diag.c passes idiag_src to the
# look-up as the sender of a received datagram, so that it is the remote end. inet_diag_find_one_icsk() in
# net/ipv4/inet_diag.c, for TCP, takes it as the local end, and so do all answers of both. sock_diag(7) does not tell them apart.

. "$(dirname "$0")/lib.bash"

need python3
space host
ip -n "$host" address add 203.0.113.1/32 dev lo
seen=$(in_space "$host" python3 - <<'PY'
import os, socket, struct

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, NLMSG_ERROR = 4, 20, 1, 2

def ask(protocol, local, remote):
    """Asks for exactly one socket and returns its inode number, or None."""
    def address(end):
        return socket.inet_aton(end[0]) + bytes(12)
    request = struct.pack("=BBBxI", socket.AF_INET, protocol, 0, 0xFFFFFFFF)
    request += struct.pack("!HH", local[1], remote[1]) + address(local) + address(remote)
    request += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG)
    netlink.settimeout(5)
    netlink.send(struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + request)
    answer = netlink.recv(8192)
    kind = struct.unpack_from("=H", answer, 4)[0]
    if kind == NLMSG_ERROR:
        return None
    return struct.unpack_from("=I", answer, 16 + 68)[0]  # idiag_inode

def pair(kind):
    if kind == socket.SOCK_STREAM:
        server = socket.create_server(("203.0.113.1", 7000))
        return socket.create_connection(("203.0.113.1", 7000)), server
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("203.0.113.1", 0))
    sock.connect(("203.0.113.1", 9))
    return sock, None

for name, kind, protocol in ("tcp", socket.SOCK_STREAM, 6), ("udp", socket.SOCK_DGRAM, 17):
    sock, _keep = pair(kind)
    inode = os.fstat(sock.fileno()).st_ino
    local, remote = sock.getsockname(), sock.getpeername()
    natural = "found" if ask(protocol, local, remote) == inode else "missing"
    swapped = "found" if ask(protocol, remote, local) == inode else "missing"
    print(f"{name} {natural} {swapped}", end="; ")
PY
)
[[ $seen == "tcp found missing; "* ]] || cannot "TCP is not as it should be: $seen"
[[ $seen != *"udp missing missing"* ]] || cannot "this kernel has no sock_diag for UDP"

report version "Linux $(uname -r)"
report expected "idiag_src is the local end, as for TCP: found in the natural order, missing in the other"
report seen "natural order, then source and destination swapped: ${seen%; }"
conclude "${seen%; }" "tcp found missing; udp missing found"
