#!/bin/bash
#
# Question: by which queue of a TUN device do the frames of a flow leave?
#
# Why it matters: a program that reads queues in several threads, and writes its answers to whichever queue is at hand, moves
# flows between its own threads, and frames of one flow may overtake each other. Answers belong into the queue that the
# question came from, or all into one that is read last.
#
# Seen with: Linux 6.18. Explained by: tun_get_user() in drivers/net/tun.c calls tun_flow_update() for each frame that is written:
# it records the queue under a hash that is the same in both directions. tun_automq_select_queue() takes the recorded queue
# before it takes one by the hash alone. Documentation/networking/tuntap.rst describes the queues and does not mention it.

. "$(dirname "$0")/lib.bash"

need python3 sysctl
[[ -c /dev/net/tun ]] || cannot "there is no /dev/net/tun"
space host
seen=$(PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$(dirname "$0") in_space "$host" python3 - <<'PY'
import os
import queues as tun

queues, sock = tun.make(4)
first = tun.leaves_by(queues, sock)
assert tun.leaves_by(queues, sock) == first  # the control: without a write the flow stays
for step in 1, 2:
    other = (first + step) % 4
    os.write(queues[other], tun.frame(b"in"))
    assert sock.recv(100) == b"in"
    print("moved" if tun.leaves_by(queues, sock) == other else "stayed", end=" ")
PY
)

report version "Linux $(uname -r)"
report expected "the kernel chooses a queue by the flow's hash and keeps it: what is written where does not matter"
report seen "after a frame of the flow was written to a second queue, then to a third one, the flow: ${seen% }"
conclude "${seen% }" "moved moved"
