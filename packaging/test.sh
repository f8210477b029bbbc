#!/usr/bin/env bash
# test.sh: builds the Debian package twice and lives with it: installs, uses, upgrades, removes and purges it.
#
# Nothing of this touches the machine: the package goes into an overlay over the root, in a mount namespace of its own, and
# the traffic into two network namespaces:
#
#   host 198.51.100.2 ── eth0 ──── eth0 ── world 198.51.100.1: the proxy, port 1080; beyond it 203.0.113.80: echo and HTTP
#
# The world counts packets that the host sends to 203.0.113.80 without the proxy.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "packages-test: $*" >&2; exit 1; }
[[ $EUID -eq 0 ]] || die "cannot install a package: not root; try: sudo make packages-test"
for program in dpkg microsocks socat curl nft unshare nsenter python3; do
	command -v "$program" >/dev/null || die "cannot test: $program is not installed; scripts/deps.sh test installs it"
done
if [[ -z ${IN_OWN_MOUNTS:-} ]]; then
	IN_OWN_MOUNTS=1 exec unshare --mount --propagation private "$0" "$@"
fi

work=$(mktemp -d)
mount -t tmpfs viasocks-test "$work"
pids=()
cleanup() {
	local status=$? p ns
	[[ $status -eq 0 || ! -s $work/up.log ]] || { echo "--- the log of viasocks" >&2; tail -30 "$work/up.log" >&2; }
	[[ $status -eq 0 || ! -s $work/root/tmp/up.log ]] || tail -30 "$work/root/tmp/up.log" >&2
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
	umount -R "$work/root" 2>/dev/null || true
	umount -l "$work" || true
	rmdir "$work" || true
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

step() { echo "packages-test: $*"; }

# eventually repeats a command until it succeeds, for 15 seconds.
eventually() {
	local i
	for ((i = 0; i < 150; i++)); do
		if "$@" >/dev/null 2>&1; then return; fi
		sleep 0.1
	done
	die "this did not happen in time: $*"
}

step "two builds in two folders are identical"
for folder in one a/much/longer/name; do
	mkdir -p "$work/$folder"
	git ls-files -z | xargs -0 tar c | tar x -C "$work/$folder"
	VIASOCKS_VERSION=98.0.0 SOURCE_DATE_EPOCH=1790000000 PACKAGERS=deb "$work/$folder/packaging/build.sh" >/dev/null
done
old=$work/one/dist/viasocks_98.0.0-1_$(dpkg --print-architecture).deb
cmp "$old" "$work/a/much/longer/name/dist/${old##*/}" || die "the packages differ"
VIASOCKS_VERSION=99.0.0 SOURCE_DATE_EPOCH=1790000000 PACKAGERS=deb "$work/one/packaging/build.sh" >/dev/null
new=${old/98.0.0/99.0.0}
if command -v lintian >/dev/null; then
	step "lintian finds no errors"
	lintian --allow-root --fail-on error "$old" >"$work/lintian" || { cat "$work/lintian"; die "lintian found errors"; }
fi

mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root" ||
	die "cannot mount an overlay over the root of this machine"
for d in proc sys dev; do mount --rbind "/$d" "$work/root/$d"; done
for d in run tmp; do mount -t tmpfs "viasocks-$d" "$work/root/$d"; done
mkdir "$work/root/run/lock"
mkdir "$work/debs" && cp "$old" "$new" "$work/root/tmp"
old=/tmp/${old##*/} new=/tmp/${new##*/}

unshare --net sleep infinity & pids+=($!); world=$!
unshare --net sleep infinity & pids+=($!); host=$!
for pid in $world $host; do
	eventually eval "[[ \$(readlink /proc/self/ns/net) != \$(readlink /proc/$pid/ns/net) ]]"
done
in_world() { nsenter --net="/proc/$world/ns/net" "$@"; }
in_host() { nsenter --net="/proc/$host/ns/net" chroot "$work/root" "$@"; }
in_host ip link add eth0 type veth peer name eth0 netns "$world"
in_world sh -ec 'ip link set lo up; ip addr add 203.0.113.80/32 dev lo; ip addr add 198.51.100.1/24 dev eth0; ip link set eth0 up
	nft add table inet t
	nft add counter inet t leaks
	nft add chain inet t c "{ type filter hook prerouting priority -300; }"
	nft add rule inet t c iifname eth0 ip daddr 203.0.113.80 counter name leaks'
in_host sh -ec 'ip link set lo up; ip addr add 198.51.100.2/24 dev eth0; ip link set eth0 up; ip route add default via 198.51.100.1'
in_world microsocks -i 198.51.100.1 -p 1080 >/dev/null 2>&1 &
in_world socat TCP-LISTEN:7,fork,reuseaddr EXEC:cat &
cat >"$work/http" <<'HTTP'
#!/bin/bash
while read -r line && [[ $line != $'\r' ]]; do :; done
printf 'HTTP/1.0 200 OK\r\n\r\nhello\n'
HTTP
chmod 755 "$work/http"
in_world socat TCP-LISTEN:80,fork,reuseaddr EXEC:"$work/http" 2>/dev/null &
in_host socat TCP-LISTEN:22,fork,reuseaddr EXEC:cat &

leaks() { in_world nft list counter inet t leaks | sed -n 's/.*packets \([0-9]*\).*/\1/p'; }
no_leak() { [[ $(leaks) -eq 0 ]] || die "$1: $(leaks) packets left the host without the proxy"; }
reaches() { [[ $(in_host curl -s -m 5 http://203.0.113.80/) == hello ]]; }
# keep opens a connection of a namespace and writes to $work/NAME what comes back, a line every 0.1 s.
keep() {
	local name=$1 where=$2 to=$3
	(while sleep 0.1; do echo x; done) | "$where" socat - "TCP:$to" >"$work/$name" 2>/dev/null &
}
# survives checks that a connection of keep still carries.
survives() {
	local before
	before=$(stat -c %s "$work/$1")
	eventually eval "[[ \$(stat -c %s '$work/$1') -gt $((before + 4)) ]]"
}
up_pid() { pgrep --newest --ns "$host" --nslist net -f '^/usr/bin/viasocks up'; }
up() {
	in_host /usr/bin/viasocks up --wait --config /etc/viasocks/viasocks.conf --log-level warn >>"$work/up.log" 2>&1 &
	eventually in_host viasocks status
	eventually reaches
}
packages() {
	in_host env PATH="$PATH" DEBIAN_FRONTEND=noninteractive dpkg "$@" >>"$work/dpkg.log" 2>&1 && return
	tail -20 "$work/dpkg.log"
	die "dpkg $* failed"
}
untouched() {
	! in_host sh -c 'ip rule; ip -6 rule' | grep -q 'proto 118' && [[ -z $(in_host nft list ruleset) ]]
}

step "it is installed"
packages -i "$old"
in_host viasocks version | grep -q '^viasocks 98.0.0 ' || die "this is not the version: $(in_host viasocks version)"
for page in 'viasocks.1' 'viasocks.conf.5' 'viasocks.7'; do
	in_host test -s "/usr/share/man/man${page##*.}/$page.gz" || die "there is no page $page"
done
in_host getent group viasocks >/dev/null || die "there is no group viasocks"
[[ $(in_host stat -c %a /etc/viasocks/viasocks.conf) == 600 ]] || die "others can read the configuration"
untouched || die "the installation touched the network"
(in_host viasocks check --config /etc/viasocks/viasocks.conf || true) 2>&1 | grep -q 'no proxy was given' ||
	die "the empty configuration is taken"
echo 'proxy socks5://198.51.100.1:1080' >>"$work/root/etc/viasocks/viasocks.conf"

step "it is used"
up
keep carried in_host 203.0.113.80:7
keep inbound in_world 198.51.100.2:22
# From here on something always tries to leave.
(while sleep 0.05; do in_host curl -s -m 1 http://203.0.113.80/ >/dev/null || true; done) &
survives carried
survives inbound
no_leak "in use"

step "it is upgraded while up, without a service manager: everything goes on"
packages -i "$new"
in_host viasocks version | grep -q '^viasocks 99' || die "this is not the new version"
in_host viasocks status | grep -q '98\.0\.0' || die "the old version does not run any more"
survives carried
survives inbound
no_leak "upgraded"

step "the service is upgraded: no connection is cut, and nothing leaves without the proxy"
packages -i "$old" # the version that is up
mkdir -p "$work/root/run/systemd/system"
cat >"$work/root/usr/local/sbin/systemctl" <<'FAKE'
#!/bin/bash
# Does what systemd does with viasocks.service, which has Restart=on-failure and RestartSec=1s.
echo "$*" >>/tmp/systemctl.log
all=$(pgrep --ns $$ --nslist net -f '^/usr/bin/viasocks up')
main=$(pgrep --newest --ns $$ --nslist net -f '^/usr/bin/viasocks up')
case "$*" in
*list-units*) [[ -z $main ]] || echo "viasocks.service loaded active running" ;;
*kill*SIGKILL*viasocks.service)
	kill -9 "$main"
	kill $all 2>/dev/null
	(sleep 1; /usr/bin/viasocks down --after-service --config /etc/viasocks/viasocks.conf
	exec /usr/bin/viasocks up --wait --config /etc/viasocks/viasocks.conf) </dev/null >>/tmp/up.log 2>&1 & ;;
*disable*--now*viasocks.service)
	[[ -z $all ]] || kill $all
	for pid in $all; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done ;;
esac
FAKE
chmod 755 "$work/root/usr/local/sbin/systemctl"
cp packaging/hold.py "$work/root/tmp"
in_host python3 /tmp/hold.py 203.0.113.80 7 50 /tmp/held 2>"$work/held.log" &
# held checks what has become of the connections.
held() { [[ $(cut -d' ' -f1,2 "$work/root/tmp/held") == "$1 $2" ]]; }
turns() { cut -d' ' -f3 "$work/root/tmp/held"; }
eventually held 50 0
packages -i "$new"
in_host viasocks status | grep -q '99\.0\.0' || die "the new version has not taken over"
! grep -q SIGKILL "$work/root/tmp/systemctl.log" || die "the service was restarted"
before=$(turns)
eventually eval "[[ \$(turns) -gt $((before + 200)) ]]"
held 50 0 || die "connections were cut: $(cat "$work/root/tmp/held")"
survives carried
survives inbound
reaches || die "the far end cannot be reached"
no_leak "the service upgraded"

step "a version that does not take the configuration stays out"
conf=$work/root/etc/viasocks/viasocks.conf
cp "$conf" "$work/conf"
echo 'no-such-option' >>"$conf"
packages -i "$old"
grep -q "goes on with the version before" "$work/dpkg.log" || die "nothing was said"
in_host viasocks status | grep -q '99\.0\.0' || die "the version that was up is not up any more"
held 50 0 || die "connections were cut: $(cat "$work/root/tmp/held")"
cp "$work/conf" "$conf"

step "where the new version cannot take over, the host stays closed until it is up"
echo 'mtu 1400' >>"$conf"
packages -i "$old"
grep -q SIGKILL "$work/root/tmp/systemctl.log" || die "the service was not restarted"
eventually eval "in_host viasocks status | grep -q '98\.0\.0'"
eventually reaches
survives inbound
no_leak "the service restarted"

step "it is removed while up: the host is restored"
packages -r viasocks
untouched || die "the host is not restored: $(in_host ip rule; in_host nft list ruleset)"
eventually eval '[[ $(leaks) -gt 0 ]]' # what tries to leave all the time leaves directly again
survives inbound
in_host test -e /etc/viasocks/viasocks.conf || die "the configuration was removed"
in_host test ! -e /usr/bin/viasocks || die "the program was not removed"

step "it is removed after a crash: the host is restored"
rm -r "$work/root/run/systemd"
packages -i "$old"
up
kill -9 "$(up_pid)"
eventually eval '! reaches'
! untouched || die "the crash opened the host"
packages -r viasocks
untouched || die "the host is not restored after a crash"
eventually reaches

step "where AppArmor restricts user namespaces it gets a profile, and it is purged"
mkdir -p "$work/root/tmp/sys/proc/sys/kernel" "$work/root/etc/apparmor.d"
echo 1 >"$work/root/tmp/sys/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
printf '#!/bin/sh\necho "$*" >>/tmp/parser.log\n' >"$work/root/usr/local/sbin/apparmor_parser"
chmod 755 "$work/root/usr/local/sbin/apparmor_parser"
VIASOCKS_SYS=/tmp/sys packages -i "$old"
in_host grep -q userns, /etc/apparmor.d/viasocks || die "there is no profile"
in_host grep -q -- '-r .*/etc/apparmor.d/viasocks' /tmp/parser.log || die "the profile was not loaded"
packages -P viasocks
in_host grep -q -- '-R /etc/apparmor.d/viasocks' /tmp/parser.log || die "the profile was not unloaded"
rm "$work/root/usr/local/sbin/"{apparmor_parser,systemctl}
left=$(cd "$work/root" && ls -d etc/viasocks usr/bin/viasocks etc/apparmor.d/viasocks usr/share/doc/viasocks usr/share/viasocks \
	usr/share/man/man?/viasocks* usr/lib/systemd/system/viasocks* var/log/viasocks 2>/dev/null || true)
[[ -z $left ]] || die "this is left after the purge: $left"
step "passed"
