#!/usr/bin/env bash
# formats-test.sh: installs, upgrades and removes the packages for Fedora, Alpine and Arch, and compares two builds.
#
# Usage: formats-test.sh     (as root; scripts/deps.sh formats installs what it needs)
#
# The machine is not touched: the packages go into an overlay over its root, in a mount and a network namespace of their own.
# Each is removed while this network is closed as after a crash, and must open it again. Debian has no apk: the package for
# Alpine is taken apart and checked as apk does, and its scripts run in busybox, which is the shell of Alpine.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "formats-test: $*" >&2; exit 1; }
step() { echo "formats-test: $*"; }
[[ $EUID -eq 0 ]] || die "cannot install a package: not root; try: sudo make packages-test"
for program in rpm pacman apparmor_parser bsdtar busybox nft unshare python3; do
	command -v "$program" >/dev/null || die "cannot test: $program is not installed; scripts/deps.sh formats installs it"
done
if [[ -z ${IN_OWN_MOUNTS:-} ]]; then
	IN_OWN_MOUNTS=1 exec unshare --mount --pid --fork --kill-child --mount-proc --propagation private "$0" "$@"
fi

skip() { echo "formats-test: skipped: $*"; exit 0; }
git ls-files >/dev/null 2>&1 || skip "the sources are not in a work tree of git"

work=$(mktemp -d)
mount -t tmpfs viasocks-test "$work" || skip "cannot mount a tmpfs"
mkdir -p "$work/can/upper" "$work/can/work" "$work/can/root"
if ! mount -t overlay overlay -o "lowerdir=/,upperdir=$work/can/upper,workdir=$work/can/work" "$work/can/root"; then
	umount "$work"
	rmdir "$work"
	skip "cannot mount an overlay over the root of this machine"
fi
umount "$work/can/root"
cleanup() {
	local status=$?
	[[ $status -eq 0 || ! -s $work/log ]] || tail -30 "$work/log" >&2
	umount -R "$work/root" 2>/dev/null || true
	umount -l "$work" || true
	rmdir "$work" || true
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# build FOLDER VERSION makes the packages from a copy of the sources, under the settings of the environment.
build() {
	mkdir -p "$work/$1"
	git ls-files -z | xargs -0 tar c | tar x -m -C "$work/$1"
	VIASOCKS_VERSION=$2 SOURCE_DATE_EPOCH=1790000000 "$work/$1/packaging/build.sh" >>"$work/log" 2>&1 || die "cannot build the packages"
}

step "two builds are identical: other folders, times, zones, languages, users, masks and flags of Go"
build one 98.0.0
(
	umask 077
	export TZ=Pacific/Kiritimati LC_ALL=C.UTF-8 USER=other LOGNAME=other HOME=$work/home GOFLAGS=-v GOPATH GOCACHE
	GOPATH=$(HOME=/root go env GOPATH) GOCACHE=$(HOME=/root go env GOCACHE)
	mkdir "$HOME"
	build a/much/longer/name 98.0.0
)
for package in "$work"/one/dist/*98.0.0*; do
	cmp "$package" "$work/a/much/longer/name/dist/${package##*/}" || die "the packages differ"
done
[[ $(find "$work/one/dist" -name '*98.0.0*' | wc -l) -eq 4 ]] || die "there are not four packages: $(ls "$work/one/dist")"
cmp "$work/one/bin/viasocks" "$work/a/much/longer/name/bin/viasocks" || die "the programs differ"
image() { SOURCE_DATE_EPOCH=1790000000 VIASOCKS_VERSION=98.0.0 "$work/$1/packaging/image.sh" "$work/$2" >>"$work/log" 2>&1; }
(umask 077; TZ=Pacific/Kiritimati image a/much/longer/name a.tar) || die "cannot make an image"
image one one.tar || die "cannot make an image"
cmp "$work/one.tar" "$work/a.tar" || die "the images differ"
PACKAGERS="rpm apk archlinux" build one 99.0.0

unshare --net sleep infinity & host=$!
until [[ $(readlink /proc/self/ns/net) != $(readlink "/proc/$host/ns/net") ]]; do sleep 0.1; done
in_host() { nsenter --net="/proc/$host/ns/net" "$@"; }
in_host ip link set lo up
# fresh makes the root of a machine on which viasocks is not installed.
fresh() {
	umount -R "$work/root" 2>/dev/null || true
	rm -rf "$work/upper" "$work/work"
	mkdir -p "$work/upper" "$work/work" "$work/root"
	mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root" ||
		die "cannot mount an overlay over the root of this machine"
	for d in proc sys dev; do mount --rbind "/$d" "$work/root/$d"; done
	for d in run tmp; do mount -t tmpfs "viasocks-$d" "$work/root/$d"; done
	# This machine may have viasocks itself.
	rm -rf "$work/root/usr/share/"{,doc/,licenses/,lintian/overrides/}viasocks "$work/root/"{etc/viasocks,usr/bin/viasocks} \
		"$work/root/usr/share/man/man"?/viasocks* "$work/root/usr/lib/"{systemd/system,sysusers.d}/viasocks* \
		"$work/root/usr/share/"{bash-completion/completions/viasocks,fish/vendor_completions.d/viasocks.fish} \
		"$work/root/usr/share/zsh/site-functions/_viasocks"
	in_root groupdel viasocks 2>/dev/null || true
	cp "$work"/one/dist/* "$work/root/tmp"
}
in_root() { in_host chroot "$work/root" "$@"; }
quietly() { in_root "$@" >>"$work/log" 2>&1 || die "$* failed"; }
closed() { [[ $(in_host nft list tables) == *viasocks* ]]; }

# installed VERSION checks what is there after an installation or an upgrade.
installed() {
	in_root viasocks version | grep "^viasocks $1 " >/dev/null || die "this is not version $1: $(in_root viasocks version)"
	in_root getent group viasocks >/dev/null || die "there is no group viasocks"
	[[ $(in_root stat -c '%a %U' /etc/viasocks/viasocks.conf) == '600 root' ]] || die "others can read the configuration"
	[[ $(in_root stat -c '%a %U' /usr/bin /usr/bin/viasocks | tr '\n' ' ') == '755 root 755 root ' ]] || die "the modes are wrong"
	local f
	for f in man/man1/viasocks.1.gz man/man5/viasocks.conf.5.gz man/man7/viasocks.7.gz licenses/viasocks/LICENSE \
		bash-completion/completions/viasocks fish/vendor_completions.d/viasocks.fish zsh/site-functions/_viasocks; do
		in_root test -s "/usr/share/$f" || die "there is no $f"
	done
	grep -q '^ExecStart=/usr/bin/viasocks' "$work/root/usr/lib/systemd/system/viasocks.service" || die "the unit starts something else"
}
# used closes the network of this test, as a crash does, after a change to the configuration.
used() {
	echo 'proxy socks5://198.51.100.1:1080' >>"$work/root/etc/viasocks/viasocks.conf"
	quietly viasocks close --config /etc/viasocks/viasocks.conf
	closed || die "the network is not closed"
}
# upgraded checks that the upgrade has left the network closed, and the configuration as it was.
upgraded() {
	installed 99.0.0
	closed || die "the upgrade opened the network"
	grep -q '^proxy socks5://198.51.100.1:1080' "$work/root/etc/viasocks/viasocks.conf" || die "the configuration is gone"
}
removed() {
	! closed || die "the network is still closed, and nothing there can open it"
	[[ $(in_host ip rule) != *'proto 118'* ]] || die "ip rules are left"
	local left
	left=$(cd "$work/root" && ls -d usr/bin/viasocks usr/share/doc/viasocks usr/share/viasocks usr/share/licenses/viasocks \
		usr/share/man/man?/viasocks* usr/lib/systemd/system/viasocks* usr/lib/sysusers.d/viasocks* 2>/dev/null || true)
	[[ -z $left ]] || die "this is left: $left"
}

step "rpm: installed, upgraded while the host is closed, erased"
fresh
quietly rpm -K --nosignature "/tmp/viasocks-98.0.0-1.$(uname -m).rpm"
# The database of this machine has no packages of RPM: nothing in it provides /bin/sh.
quietly rpm -U --nodeps "/tmp/viasocks-98.0.0-1.$(uname -m).rpm"
installed 98.0.0
in_root rpm -V --nodeps viasocks || die "rpm finds other files than it installed"
in_root rpm -qc viasocks | grep -x /etc/viasocks/viasocks.conf >/dev/null || die "rpm does not know the configuration"
in_root rpm -qd viasocks | grep /man1/viasocks.1 >/dev/null || die "rpm does not know the manual"
used
quietly rpm -U --nodeps "/tmp/viasocks-99.0.0-1.$(uname -m).rpm"
upgraded
quietly rpm -e viasocks
removed
in_root test -e /etc/viasocks/viasocks.conf.rpmsave || die "rpm did not save the configuration"
if command -v rpmlint >/dev/null; then
	# In the overlay, because rpmlint unpacks it with cpio, which takes the absolute names of the package at their word.
	# The releaser signs it; the 0600 is on purpose; nfpm writes neither a changelog nor the classes of files.
	errors=$(in_root rpmlint "/tmp/viasocks-98.0.0-1.$(uname -m).rpm" 2>/dev/null | grep ' E: ' |
		grep -vE 'no-signature|non-readable|no-changelogname-tag|no-binary' || true)
	[[ -z $errors ]] || die "rpmlint found errors: $errors"
fi

step "Arch: installed, upgraded while the host is closed, removed"
fresh
arch() { quietly pacman --noconfirm --dbpath /tmp/pacman --cachedir /tmp --logfile /tmp/log --hookdir /nonexistent --config /dev/null "$@"; }
mkdir -p "$work/root/tmp/pacman"
ln -sf bash "$work/root/usr/bin/sh" # as on Arch: nfpm writes functions that only bash understands
arch -U "/tmp/viasocks-98.0.0-1-$(uname -m).pkg.tar.zst"
installed 98.0.0
in_root pacman --dbpath /tmp/pacman --config /dev/null -Qkk viasocks >>"$work/log" 2>&1 || die "pacman finds other files than it installed"
used
arch -U "/tmp/viasocks-99.0.0-1-$(uname -m).pkg.tar.zst"
upgraded
arch -R viasocks
removed
in_root test -e /etc/viasocks/viasocks.conf.pacsave || die "pacman did not save the configuration"

step "Alpine: the parts of the package are as apk wants them; installed, upgraded while the host is closed, removed"
cat >"$work/apk.py" <<'PY'
# Takes a package for Alpine apart: a segment of gzip with the control files, and one with the data.
import hashlib, io, sys, tarfile, zlib
raw, segments = open(sys.argv[1], 'rb').read(), []
while raw:
    z = zlib.decompressobj(31)
    text = z.decompress(raw) + z.flush()
    segments.append((raw[:len(raw) - len(z.unused_data)], text))
    raw = z.unused_data
assert len(segments) == 2, f'{len(segments)} segments, of which none is a signature'
control = tarfile.open(fileobj=io.BytesIO(segments[0][1]))
info = {}
for line in control.extractfile('.PKGINFO').read().decode().splitlines():
    if line and not line.startswith('#'):
        key, equals, value = line.partition(' = ')
        assert equals and value, f'this is no line of .PKGINFO: {line!r}'
        info[key] = value
for key in 'pkgname', 'pkgver', 'pkgdesc', 'url', 'size', 'arch', 'license', 'datahash':
    assert info.get(key), f'.PKGINFO has no {key}'
assert info['datahash'] == hashlib.sha256(segments[1][0]).hexdigest(), 'the hash of the data is wrong'
assert all(m.mtime in (0, 1790000000) for m in control), 'the scripts have times of their own'
data = tarfile.open(fileobj=io.BytesIO(segments[1][1]))
for m in data:
    assert m.name and not m.name.startswith(('/', '.')) and m.uid == m.gid == 0, m.name
    if m.isfile():
        want = m.pax_headers['APK-TOOLS.checksum.SHA1']
        assert want == hashlib.sha1(data.extractfile(m).read()).hexdigest(), f'the checksum of {m.name} is wrong'
control.extractall(sys.argv[2]); data.extractall(sys.argv[3])
PY
fresh
apk() {
	python3 "$work/apk.py" "$work/one/dist/viasocks_$1-r1_$(uname -m).apk" "$work/root/tmp/$1" "$2" 2>>"$work/log" ||
		die "apk would refuse the package: $(tail -1 "$work/log")"
}
apk 98.0.0 "$work/root"
quietly busybox sh "/tmp/98.0.0/.post-install" 98.0.0-r1
installed 98.0.0
used
# apk leaves a changed configuration where it is.
apk 99.0.0 "$work/99"
rm -r "$work/99/etc"
cp -a "$work/99/." "$work/root/"
quietly busybox sh /tmp/99.0.0/.post-upgrade 99.0.0-r1 98.0.0-r1
upgraded
quietly busybox sh /tmp/99.0.0/.pre-deinstall 99.0.0-r1
(cd "$work/99" && find . ! -type d -printf '%P\0') | (cd "$work/root" && xargs -0 rm)
rm -r "$work/root/usr/share/"{viasocks,doc/viasocks,licenses/viasocks}
quietly busybox sh /tmp/99.0.0/.post-deinstall 99.0.0-r1
removed
step "the examples of sidecars: viasocks takes each variable and each command"
cat >"$work/examples.py" <<'PY'
# Checks the containers with viasocks in the YAML files that are its arguments, after the program.
import subprocess, sys, tempfile, yaml
def of_compose(document):
    for c in document['services'].values():
        assert all(s in document['secrets'] for s in c.get('secrets', [])), c
        if c['image'] == 'viasocks':
            yield (c['environment'], [c['healthcheck']['test'][1:]], c['cap_drop'], c['cap_add'],
                ['/run/secrets/' + s for s in c['secrets']])
def of_pod(document):
    volumes = {v['name'] for v in document['spec']['volumes']}
    for c in document['spec']['initContainers']:
        assert all(m['name'] in volumes for m in c['volumeMounts']), c
        may = c['securityContext']['capabilities']
        yield ({e['name']: e['value'] for e in c['env']},
            [c[p]['exec']['command'] for p in ('startupProbe', 'readinessProbe', 'livenessProbe')], may['drop'], may['add'],
            [m['mountPath'] + '/password' for m in c['volumeMounts'] if m['name'] == 'password'])
program, containers = sys.argv[1], 0
with tempfile.NamedTemporaryFile('w') as password:
    password.write('secret\n')
    password.flush()
    for path in sys.argv[2:]:
        for document in yaml.safe_load_all(open(path)):
            for env, commands, drop, add, files in (of_compose if 'services' in document else of_pod)(document):
                containers += 1
                assert drop == ['ALL'] and sorted(add) == ['NET_ADMIN', 'NET_RAW'], (path, drop, add)
                assert env['VIASOCKS_PASSWORD_FILE'] in files, (path, files)
                env = dict(env, VIASOCKS_PASSWORD_FILE=password.name)
                # What stands for no option is said, and not refused.
                done = subprocess.run([program, 'check'], env=env, capture_output=True, text=True)
                assert done.returncode == 0 and not done.stderr, (path, done)
                for command in commands:
                    assert command[0] == 'viasocks', command
                    subprocess.run([program, *command[1:], '--help'], check=True, capture_output=True)
assert containers == 2, containers
PY
python3 "$work/examples.py" "$work/one/bin/viasocks" packaging/examples/{compose,kubernetes}.yaml || die "an example is wrong"

step "AppArmor takes the profile"
# Version 3 knows neither what version 4 restricts nor how to allow it; the rest is the same.
profile=packaging/apparmor
if [[ ! -e /etc/apparmor.d/abi/4.0 ]]; then
	profile=$work/profile
	sed 's|abi/4.0|abi/3.0|; /^  userns,$/d' packaging/apparmor >"$profile"
fi
apparmor_parser --skip-kernel-load --skip-cache "$profile" || die "apparmor_parser refuses the profile"
step "passed"
