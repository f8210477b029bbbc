#!/usr/bin/env bash
# image-test.sh: runs the container image as a sidecar, by crun and without an engine.
#
# A network namespace is that of the pod. The sidecar carries what a program in it sends; it is killed and started again from
# the image, with nothing left of its files, and stopped and started again. The program must reach the world through it again,
# and not one packet may leave without the proxy.
#
#   pod 198.51.100.2 ── eth0 ──── eth0 ── world 198.51.100.1: the proxy, port 1080; beyond it 203.0.113.80: HTTP
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "image-test: $*" >&2; exit 1; }
step() { echo "image-test: $*"; }
[[ $EUID -eq 0 ]] || die "cannot run a container: not root; try: sudo make image-test"
for program in crun microsocks socat curl nft unshare nsenter; do
	command -v "$program" >/dev/null || die "cannot test: $program is not installed"
done
if [[ -z ${IN_OWN_MOUNTS:-} ]]; then
	IN_OWN_MOUNTS=1 exec unshare --mount --propagation private "$0" "$@"
fi

# crun refuses machines that have both versions of control groups. It sees one here, and uses none.
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 viasocks-test /sys/fs/cgroup

work=$(mktemp -d)
mount -t tmpfs viasocks-test "$work"
name=viasocks-test-$$
pids=()
cleanup() {
	local status=$? p ns
	[[ $status -eq 0 || ! -s $work/log ]] || { echo "--- the log of viasocks" >&2; tail -20 "$work/log" >&2; }
	crun --root "$work/state" delete --force "$name" >/dev/null 2>&1 || true
	# Everything in both namespaces, and the loops of this script.
	local namespaces=" "
	for p in "${pids[@]}"; do
		ns=$(readlink "/proc/$p/ns/net") || continue
		[[ $ns == "$(readlink /proc/self/ns/net)" ]] || namespaces+="$ns " # never those of the machine
	done
	# shellcheck disable=SC2046
	kill $(jobs -p) 2>/dev/null || true
	disown -a
	for p in /proc/[0-9]*; do
		ns=$(readlink "$p/ns/net" 2>/dev/null) || continue
		[[ -z $ns || $namespaces != *" $ns "* ]] || kill -9 "${p#/proc/}" 2>/dev/null || true
	done
	umount -l "$work" || true
	rmdir "$work" || true
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

eventually() {
	local i
	for ((i = 0; i < 150; i++)); do
		if "$@" >/dev/null 2>&1; then return; fi
		sleep 0.1
	done
	die "this did not happen in time: $*"
}

step "the image is made twice, the same"
SOURCE_DATE_EPOCH=1790000000 packaging/image.sh "$work/one.tar" >/dev/null
SOURCE_DATE_EPOCH=1790000000 packaging/image.sh "$work/two.tar" >/dev/null
cmp "$work/one.tar" "$work/two.tar" || die "the images differ"

# unpack makes a bundle of the image, as an engine does for a new container.
mkdir "$work/layout"
tar x -C "$work/layout" -f "$work/one.tar"
blob() { sed -n 's/.*"digest": *"sha256:\([0-9a-f]*\)".*/\1/p' | head -1; }
manifest=$work/layout/blobs/sha256/$(tr -d ' \n' <"$work/layout/index.json" | grep -o 'sha256:[0-9a-f]*' | head -1 | cut -d: -f2)
config=$work/layout/blobs/sha256/$(tr -d ' \n' <"$manifest" | grep -o '"config":{[^}]*' | grep -o 'sha256:[0-9a-f]*' | cut -d: -f2)
layer=$work/layout/blobs/sha256/$(tr -d ' \n' <"$manifest" | grep -o '"layers":\[{[^]]*' | grep -o 'sha256:[0-9a-f]*' | cut -d: -f2)
grep -q '"Entrypoint":\["/usr/bin/viasocks"\],"Cmd"\|"Cmd":\["up","--wait"\]' "$config" || die "this is not the configuration: $(cat "$config")"

unshare --net sleep infinity & pids+=($!); world=$!
unshare --net sleep infinity & pids+=($!); pod=$!
for pid in $world $pod; do
	eventually eval "[[ \$(readlink /proc/self/ns/net) != \$(readlink /proc/$pid/ns/net) ]]"
done
in_world() { nsenter --net="/proc/$world/ns/net" "$@"; }
in_pod() { nsenter --net="/proc/$pod/ns/net" "$@"; }
in_pod ip link add eth0 type veth peer name eth0 netns "$world"
in_world sh -ec 'ip link set lo up; ip addr add 203.0.113.80/32 dev lo; ip addr add 203.0.113.81/32 dev lo
	ip addr add 198.51.100.1/24 dev eth0; ip link set eth0 up
	nft add table inet t
	nft add counter inet t leaks
	nft add chain inet t c "{ type filter hook prerouting priority -300; }"
	nft add rule inet t c iifname eth0 ip daddr 203.0.113.80 counter name leaks'
in_pod sh -ec 'ip link set lo up; ip addr add 198.51.100.2/24 dev eth0; ip link set eth0 up; ip route add default via 198.51.100.1'
cat >"$work/http" <<'HTTP'
#!/bin/bash
while read -r line && [[ $line != $'\r' ]]; do :; done
printf 'HTTP/1.0 200 OK\r\n\r\nhello\n'
HTTP
chmod 755 "$work/http"
in_world microsocks -i 198.51.100.1 -p 1080 -u alice -P geheim >/dev/null 2>&1 &
in_world socat TCP-LISTEN:80,fork,reuseaddr EXEC:"$work/http" 2>/dev/null &
leaks() { in_world nft list counter inet t leaks | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }
no_leak() { [[ $(leaks) -eq 0 ]] || die "$1: $(leaks) packets left the pod without the proxy"; }
reaches() { [[ $(in_pod curl -s -m 5 http://203.0.113.80/) == hello ]]; }

# start runs the sidecar in a container with nothing but the image's files, and the variables of the examples.
start() {
	crun --root "$work/state" delete --force "$name" >/dev/null 2>&1 || true
	rm -rf "$work/bundle"
	mkdir -p "$work/bundle/rootfs"
	tar x -z -C "$work/bundle/rootfs" -f "$layer" 2>/dev/null || tar x -C "$work/bundle/rootfs" -f "$layer"
	echo geheim >"$work/bundle/password"
	cat >"$work/bundle/config.json" <<-JSON
	{"ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": false},
	 "process": {"terminal": false, "cwd": "/", "args": ["/usr/bin/viasocks", "up", "--wait"], "user": {"uid": 0, "gid": 0},
	  "env": ["PATH=/usr/bin", "VIASOCKS_PROXY=socks5://alice@198.51.100.1:1080", "VIASOCKS_PASSWORD_FILE=/secrets/password",
	   "VIASOCKS_RULE_1=dst 203.0.113.81 port 80 reject", "VIASOCKS_RULE_2=dst 203.0.113.0/24 via proxy",
	   "VIASOCKS_STAY_CLOSED=true", "VIASOCKS_LOG_LEVEL=warn"],
	  "noNewPrivileges": true,
	  "capabilities": {"bounding": ["CAP_NET_ADMIN", "CAP_NET_RAW"], "effective": ["CAP_NET_ADMIN", "CAP_NET_RAW"],
	   "permitted": ["CAP_NET_ADMIN", "CAP_NET_RAW"]}},
	 "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
	  {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
	  {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
	  {"destination": "/secrets/password", "type": "bind", "source": "$work/bundle/password", "options": ["bind", "ro"]}],
	 "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/proc/$pod/ns/net"}],
	  "devices": [{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 384, "uid": 0, "gid": 0}]}}
	JSON
	crun --root "$work/state" --cgroup-manager=disabled run --bundle "$work/bundle" "$name" >>"$work/log" 2>&1 &
	eventually crun --root "$work/state" --cgroup-manager=disabled exec "$name" /usr/bin/viasocks status
}
gone() { ! crun --root "$work/state" state "$name" 2>/dev/null | grep -q '"status": "running"'; }

step "the sidecar carries the pod"
start
eventually reaches
eventually crun --root "$work/state" --cgroup-manager=disabled exec "$name" /usr/bin/viasocks health
no_leak "at the start"
refused=0
in_pod curl -s -m 5 http://203.0.113.81/ || refused=$?
[[ $refused -eq 7 ]] || die "VIASOCKS_RULE_1 refuses nothing: curl ended with $refused"
device=$(in_pod cat /sys/class/net/viasocks0/ifindex 2>/dev/null || in_pod ip -o link show viasocks0 | cut -d: -f1)
(while sleep 0.05; do in_pod curl -s -m 1 http://203.0.113.80/ >/dev/null || true; done) &

step "it is killed and started again, from the image alone"
crun --root "$work/state" kill "$name" KILL
eventually gone
eventually eval '! reaches'
start
eventually reaches
no_leak "killed"
[[ $(in_pod ip -o link show viasocks0 | cut -d: -f1) == "$device" ]] || die "it made another device, and did not take over the old one"

step "it is stopped and started again"
crun --root "$work/state" kill "$name" TERM
eventually gone
eventually eval '! reaches'
start
eventually reaches
no_leak "stopped"
step "passed"
