#!/bin/bash
#
# Question: does a queue of a TUN device that was disabled by IFF_DETACH_QUEUE still carry frames?
#
# Why it matters: a program may keep a detached queue as a handle on the device, which gets no frames and so needs no reader. It
# must know that writing to it works: a handle that was passed on is not a harmless one.
#
# Seen with: Linux 6.18. Explained by: __tun_detach() in drivers/net/tun.c takes the queue out of the array from which the kernel
# chooses for outgoing frames, but leaves its pointer to the device, which is all that tun_chr_write_iter() asks for.
# Documentation/networking/tuntap.rst, section 3.3, calls such a queue disabled.

. "$(dirname "$0")/lib.bash"

need python3 sysctl
[[ -c /dev/net/tun ]] || cannot "there is no /dev/net/tun"
space host
seen=$(PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$(dirname "$0") in_space "$host" python3 - <<'PY'
import os
import queues as tun

queues, sock = tun.make(2)
os.write(queues[0], tun.frame(b"attached"))
assert sock.recv(100) == b"attached"
first = tun.leaves_by(queues, sock)
tun.switch(queues[first], tun.IFF_DETACH_QUEUE)
assert tun.leaves_by(queues, sock) != first  # the control: the queue is detached
try:
    os.write(queues[first], tun.frame(b"detached"))
    print("delivered" if sock.recv(100) == b"detached" else "other data")
except OSError as error:
    print(error)
PY
)

report version "Linux $(uname -r)"
report expected "a write to a disabled queue fails, or its frame is dropped"
report seen "the frame was: $seen"
conclude "$seen" delivered
