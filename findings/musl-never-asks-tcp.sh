#!/bin/bash
#
# Question: does a program with musl ask again over TCP when a DNS answer over UDP is empty and marked as truncated?
#
# Why it matters: RFC 2181, section 9, tells a client to ignore a truncated answer and to ask again over TCP. A server that relies
# on this, and sends only the header with the bit TC, makes every name with many addresses unknown to such a program. The server
# must send the records that fit instead.
#
# Seen with: musl 1.2.3 (Debian 12). Explained by: name_from_dns() in src/network/lookup_name.c uses each answer as it came, and
# src/network/res_msend.c of this version has no TCP. musl 1.2.4 added it.

. "$(dirname "$0")/lib.bash"

need python3 gcc
space host
debs musl=1.2.3-1 musl-dev=1.2.3-1
printf 'nameserver 127.0.0.1\n' >"$work/resolv.conf"

# The resolver answers over UDP with TC and no record, and over TCP with one address. It writes down how it was asked.
cat >"$work/resolver.py" <<'PY'
import socket, sys, threading
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 53))
tcp = socket.create_server(("127.0.0.1", 53))
def say(word):
    with open(sys.argv[1], "a") as f:
        f.write(word + "\n")
def serve_tcp():
    while True:
        peer, _ = tcp.accept()
        peer.settimeout(5)
        size = int.from_bytes(peer.recv(2), "big")
        question = peer.recv(size)
        say("tcp")
        is_a = question[-4:-2] == b"\0\1"
        answer = question[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0" + question[12:]
        if is_a:
            answer += b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("192.0.2.1")
        peer.sendall(len(answer).to_bytes(2, "big") + answer)
        peer.close()
threading.Thread(target=serve_tcp, daemon=True).start()
while True:
    question, peer = udp.recvfrom(512)
    say("udp")
    udp.sendto(question[:2] + b"\x83\x80\0\1\0\0\0\0\0\0" + question[12:], peer)
PY
start "$host" resolver.log python3 "$work/resolver.py" "$work/asked"
within 10 listening "$host" 53

cat >"$work/ask.c" <<'C'
#include <netdb.h>
#include <stdio.h>
int main(void)
{
	struct addrinfo *list, hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM};
	int code = getaddrinfo("many.example.com", "80", &hints, &list);
	puts(code ? gai_strerror(code) : "resolved");
	return 0;
}
C
libc=("$work"/root/usr/lib/*-linux-musl)
headers=("$work"/root/usr/include/*-linux-musl)
gcc -static -nostdinc -nostdlib -isystem "${headers[0]}" -o "$work/ask" "${libc[0]}"/{crt1,crti}.o "$work/ask.c" "${libc[0]}/libc.a" \
	-lgcc "${libc[0]}/crtn.o" >"$work/gcc.log" 2>&1 || cannot "the program was not built: $(tail -n 1 "$work/gcc.log")"
gcc -o "$work/ask-glibc" "$work/ask.c" >"$work/gcc.log" 2>&1 || cannot "the control was not built: $(tail -n 1 "$work/gcc.log")"

# asked PROGRAM prints what the program says, and whether it used TCP.
asked() {
	: >"$work/asked"
	local says
	says=$(in_space "$host" bash -c 'mount --bind "$1" /etc/resolv.conf && exec "$2"' - "$work/resolv.conf" "$1")
	grep -q udp "$work/asked" || cannot "no question came over UDP"
	if grep -q tcp "$work/asked"; then echo "$says, TCP"; else echo "$says, no TCP"; fi
}
[[ $(asked "$work/ask-glibc") == "resolved, TCP" ]] || cannot "glibc does not resolve the name either"
seen=$(asked "$work/ask")

report version "musl 1.2.3-1"
report expected "the name is resolved by a second question over TCP, as glibc does it"
report seen "$seen"
conclude "$seen" "Name does not resolve, no TCP"
