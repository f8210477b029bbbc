#!/usr/bin/env python3
"""hold.py: holds connections to a server that sends back what it gets, for the tests of an upgrade.

Usage: hold.py ADDRESS PORT NUMBER FILE

It writes a byte on each connection again and again, and reads it back. FILE has three numbers: the connections that are
open, those that were cut, and the bytes that came back.
"""
import os
import socket
import sys
import time

address, port, number, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
connections = [socket.create_connection((address, port), 20) for _ in range(number)]
lost = trips = 0
while True:
    for c in list(connections):
        try:
            c.sendall(b"x")
            if c.recv(1) != b"x":
                raise OSError("closed by the other end")
            trips += 1
        except OSError as e:
            print("lost:", e, file=sys.stderr, flush=True)
            connections.remove(c)
            lost += 1
    with open(file + ".new", "w") as f:
        f.write(f"{len(connections)} {lost} {trips}\n")
    os.rename(file + ".new", file)
    time.sleep(0.02)
