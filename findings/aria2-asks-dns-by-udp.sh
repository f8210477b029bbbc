#!/bin/bash
#
# Question: does aria2 ask its resolver by TCP if /etc/resolv.conf says "options use-vc"?
#
# Why it matters: the option (resolv.conf(5)) is how a host whose tunnel or proxy carries no UDP gets names. Programs that ask the
# C library, such as getent, get them then, and aria2 does not. --async-dns=false makes it use the C library, and with it the
# option.
#
# Seen with: aria2 1.36.0 with c-ares 1.18.1, which is what --async-dns, the default, uses. Explained by: set_options() of c-ares
# 1.18.1 knows ndots, retrans, retry and rotate, and ignores everything else.

. "$(dirname "$0")/lib.bash"

need python3 getent
space host
ip -n "$host" address add 192.0.2.1/32 dev lo
debs aria2=1.36.0-1 libaria2-0=1.36.0-1 libc-ares2=1.18.1-3
printf 'nameserver 192.0.2.1\noptions use-vc\n' >"$work/resolv.conf"

# A resolver that knows one address for each name, over UDP and TCP, and writes down how it was asked. Beside it is a web server.
cat >"$work/servers.py" <<'PY'
import http.server, socket, sys, threading
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("192.0.2.1", 53))
tcp = socket.create_server(("192.0.2.1", 53))
def answer(question, way):
    with open(sys.argv[1], "a") as f:
        f.write(way + "\n")
    is_a = question[-4:-2] == b"\0\1"
    a = question[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0" + question[12:]
    return a + (b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("192.0.2.1") if is_a else b"")
def serve(peer):
    with peer, peer.makefile("rwb") as f:
        while size := f.read(2):
            a = answer(f.read(int.from_bytes(size, "big")), "TCP")
            f.write(len(a).to_bytes(2, "big") + a)
            f.flush()
def accept():
    while True:
        threading.Thread(target=serve, args=tcp.accept()[:1], daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"file")
web = http.server.HTTPServer(("192.0.2.1", 80), Web)
threading.Thread(target=web.serve_forever, daemon=True).start()
while True:
    question, peer = udp.recvfrom(512)
    udp.sendto(answer(question, "UDP"), peer)
PY
start "$host" servers.log python3 "$work/servers.py" "$work/asked"
within 60 listening "$host" 80

# asked PROGRAM... runs a program with that resolv.conf and prints how it asked for a name.
asked() {
	: >"$work/asked"
	in_space "$host" bash -c 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"' - "$work/resolv.conf" "$@" \
		>"$work/program.log" 2>&1 || cannot "$1 fails: $(tail -n 3 "$work/program.log")"
	sort -u "$work/asked" | paste -sd' '
}
aria2() { asked "$work/root/usr/bin/aria2c" --no-conf --dir="$work" --out="$1" "${@:2}" "http://$1.example.com/"; }
control=$(asked getent ahostsv4 control.example.com)
[[ $control == TCP ]] || cannot "the C library asks by $control"
seen="$(aria2 one), with --async-dns=false $(aria2 two --async-dns=false)"

report version "aria2 1.36.0-1, c-ares 1.18.1-3"
report expected "TCP, as the C library does it for all other programs"
report seen "$seen"
conclude "$seen" "UDP, with --async-dns=false TCP"
