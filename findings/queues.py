"""A TUN device with several queues and a UDP socket on it, for the scripts about queues. This file is no finding."""
import fcntl
import os
import select
import socket
import struct
import subprocess

TUNSETIFF, TUNSETQUEUE = 0x400454CA, 0x400454D9
IFF_TUN, IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_NO_PI = 0x1, 0x100, 0x200, 0x400, 0x1000
HERE, THERE = ("203.0.113.1", 5000), ("203.0.113.9", 6000)


def attach():
    """Opens one more queue of the interface tun0."""
    queue = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(queue, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE))
    return queue


def switch(queue, flag):
    fcntl.ioctl(queue, TUNSETQUEUE, struct.pack("16sH22x", b"", flag))


def make(number):
    """Makes tun0, up and with the address HERE, and returns its queues and a socket that is bound to HERE."""
    queues = [attach() for _ in range(number)]
    subprocess.run(["sysctl", "-qw", "net.ipv6.conf.tun0.disable_ipv6=1"], check=True)
    subprocess.run(["ip", "address", "add", HERE[0] + "/24", "dev", "tun0"], check=True)
    subprocess.run(["ip", "link", "set", "tun0", "up"], check=True)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(HERE)
    sock.settimeout(2)
    return queues, sock


def leaves_by(queues, sock):
    """Sends a datagram from HERE to THERE and returns the number of the queue by which it leaves."""
    sock.sendto(b"out", THERE)
    while True:
        ready, _, _ = select.select(queues, [], [], 2)
        if not ready:
            raise SystemExit("the datagram did not leave by any queue")
        for queue in ready:
            frame = os.read(queue, 2048)
            if frame[16:20] == socket.inet_aton(THERE[0]) and frame[9] == socket.IPPROTO_UDP:
                return queues.index(queue)


def frame(payload):
    """Returns a valid IPv4 packet with a datagram from THERE to HERE (a UDP checksum of 0 means none)."""
    udp = struct.pack("!HHHH", THERE[1], HERE[1], 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0,
                       socket.inet_aton(THERE[0]), socket.inet_aton(HERE[0]))
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + udp
