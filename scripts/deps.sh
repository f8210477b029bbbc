#!/usr/bin/env bash
# deps.sh: installs the Debian packages that `make test` and `make demo` need, on a machine with nothing but Go.
#
# Usage: deps.sh [test] [demo] [zoo] [bench] [formats] [packages] [lint]      (no group: test)
#
# When every program is there already, apt is not called and root is not needed. The services that Debian would
# start with some packages do not start: a policy-rc.d refuses them while apt runs, and units that came with
# a package of ours stay disabled, so that a reboot does not start them either.
set -euo pipefail
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# program:package, or =file:package where the package holds no program of its own.
declare -A groups=(
	# make and a C compiler: the race detector links with one. The rest: real peers and programs of the tests.
	[test]="make:make gcc:gcc =/usr/include/stdio.h:libc6-dev git:git =/etc/ssl/certs/ca-certificates.crt:ca-certificates
		ip:iproute2 sysctl:procps unshare:util-linux curl:curl
		aria2c:aria2 transmission-daemon:transmission-daemon danted:dante-server microsocks:microsocks tinyproxy:tinyproxy-bin stunnel4:stunnel4 nginx:nginx vsftpd:vsftpd sshd:openssh-server
		ssh:openssh-client ss-local:shadowsocks-libev
		natpmpc:natpmpc upnpc:miniupnpc qbittorrent-nox:qbittorrent-nox =/usr/lib/python3/dist-packages/libtorrent.egg-info:python3-libtorrent
		opentracker:opentracker mktorrent:mktorrent dnsmasq:dnsmasq-base
		musl-gcc:musl-tools nsupdate:bind9-dnsutils dig:bind9-dnsutils kdig:knot-dnsutils unbound:unbound tor:tor
		=/lib/systemd/systemd-networkd:systemd dhclient:isc-dhcp-client dhcpcd:dhcpcd-base NetworkManager:network-manager
		dbus-daemon:dbus conntrack:conntrack nft:nftables
		promtool:prometheus tshark:tshark
		ping:iputils-ping socat:socat setpriv:util-linux nsenter:util-linux ss:iproute2 crun:crun =/usr/share/doc/busybox-static:busybox-static"
	[demo]="make:make git:git =/etc/ssl/certs/ca-certificates.crt:ca-certificates
		ip:iproute2 sysctl:procps unshare:util-linux curl:curl nft:nftables tcpdump:tcpdump
		aria2c:aria2 danted:dante-server nginx:nginx vsftpd:vsftpd sshd:openssh-server
		opentracker:opentracker mktorrent:mktorrent dnsmasq:dnsmasq-base"
	# The SOCKS servers of scripts/zoo.sh that Debian has, and what runs the others; gcc and the rest of its line are for
	# TestRuntimes, podman and what follows it for TestEngines and TestMachined.
	[zoo]="git:git =/etc/ssl/certs/ca-certificates.crt:ca-certificates ip:iproute2 sysctl:procps ss:iproute2
		danted:dante-server microsocks:microsocks ssh:openssh-client sshd:openssh-server ss-local:shadowsocks-libev
		tor:tor tor-gencert:tor chromium:chromium nginx:nginx plink:putty-tools v2ray:v2ray trojan:trojan stunnel4:stunnel4 openssl:openssl dnsmasq:dnsmasq-base
		=/usr/lib/python3/dist-packages/asyncssh:python3-asyncssh node:nodejs npm:npm
		gcc:gcc musl-gcc:musl-tools python3:python3 java:default-jre-headless javac:default-jdk-headless
		aria2c:aria2 curl:curl nft:nftables nsenter:util-linux
		podman:podman conmon:conmon crun:crun =/usr/lib/podman/netavark:netavark slirp4netns:slirp4netns newuidmap:uidmap dockerd:docker.io containerd-shim-runc-v2:containerd
		runc:runc ctr:containerd =/usr/lib/cni/bridge:containernetworking-plugins lxc-start:lxc systemd-nspawn:systemd-container pgrep:procps dbus-daemon:dbus =/lib/systemd/systemd:systemd =/usr/share/doc/busybox-static:busybox-static"
	# What scripts/dnsbench.sh asks with, and whom.
	[bench]="ip:iproute2 sysctl:procps ss:iproute2 dnsperf:dnsperf openssl:openssl unbound:unbound dnsmasq:dnsmasq-base"
	# What packaging/formats-test.sh installs packages with, and what packaging/test.sh and image-test.sh need besides.
	[formats]="rpm:rpm pacman:pacman-package-manager bsdtar:libarchive-tools =/usr/share/doc/busybox-static:busybox-static python3:python3
		=/usr/lib/python3/dist-packages/yaml:python3-yaml apparmor_parser:apparmor"
	[packages]="lintian:lintian rpmlint:rpmlint crun:crun"
	[lint]="shellcheck:shellcheck"
)
# The units of the packages above.
declare -A units=([dante-server]=danted.service [nginx]=nginx.service [vsftpd]=vsftpd.service
	[openssh-server]="ssh.service ssh.socket" [opentracker]=opentracker.service [microsocks]=microsocks.service
	[unbound]=unbound.service [tor]="tor.service tor@default.service" [nftables]=nftables.service [shadowsocks-libev]=shadowsocks-libev.service [v2ray]=v2ray.service [trojan]=trojan.service [stunnel4]=stunnel4.service
	[network-manager]="NetworkManager.service NetworkManager-dispatcher.service NetworkManager-wait-online.service"
	[systemd]="systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service"
	[dbus]="dbus.service dbus.socket" [stunnel4]="stunnel4.service stunnel.target" [prometheus]=prometheus.service
	[docker.io]="docker.service docker.socket" [containerd]=containerd.service [lxc]="lxc.service lxc-net.service lxc-monitord.service" [systemd-container]=machines.target [podman]="podman.service podman.socket podman-auto-update.timer podman-restart.service"
	[apparmor]=apparmor.service [transmission-daemon]=transmission-daemon.service)

die() { echo "deps: $*" >&2; exit 1; }

# missing prints the packages of the groups given of which the program isn't there.
missing() {
	local group entry what
	for group in "$@"; do
		for entry in ${groups[$group]}; do
			what=${entry%%:*}
			if [[ $what == =* ]]; then
				[[ -e ${what#=} ]] || echo "${entry#*:}"
			else
				command -v "$what" >/dev/null || echo "${entry#*:}"
			fi
		done
	done | sort -u
}

policy=/usr/sbin/policy-rc.d
policy_mark="# viasocks deps.sh: no service starts while packages are installed"
kept=$policy.before-viasocks
made_policy=

# deny_services puts a policy-rc.d in place that answers 101 (forbidden), unless the one that's there does so already.
deny_services() {
	if [[ -e $policy ]] && grep -qxF -- "$policy_mark" "$policy"; then
		: # left by a run that was killed: ours
	elif [[ -e $policy || -L $policy ]]; then
		local answer=0
		"$policy" nginx start >/dev/null 2>&1 || answer=$?
		[[ $answer -ne 101 ]] || return 0
		mv "$policy" "$kept"
	fi
	made_policy=yes
	printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" >"$policy"
	chmod 755 "$policy"
}

allow_services() {
	[[ -n $made_policy ]] || return 0
	rm -f "$policy"
	[[ ! -e $kept ]] || mv "$kept" "$policy"
}

apt_install() {
	apt-get -o DPkg::Lock::Timeout=300 -qq -y --no-install-recommends install "$@" </dev/null
}

install_packages() {
	command -v apt-get >/dev/null || die "cannot install $*: no apt-get here; install them by the means of this system"
	[[ $EUID -eq 0 ]] || die "cannot install $*: not root; try: sudo $0"
	export DEBIAN_FRONTEND=noninteractive
	trap allow_services EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	deny_services
	echo "deps: installing $*"
	# Without lists, or with lists older than the archive, the first try fails: then the lists are fetched.
	if ! apt_install "$@" >/dev/null 2>&1; then
		apt-get -o DPkg::Lock::Timeout=300 -qq update || die "cannot install $*: apt-get update failed"
		apt_install "$@" >/dev/null || die "cannot install $*: apt-get says why above"
	fi
	# What came in just now shall not start at the next boot either, under systemd or sysvinit.
	local package unit
	for package in "$@"; do
		for unit in ${units[$package]:-}; do
			if command -v systemctl >/dev/null; then
				systemctl --quiet disable "$unit" >/dev/null 2>&1 || true
			else
				# The helper answers maintainer scripts only; it is told that it is in one.
				DPKG_MAINTSCRIPT_PACKAGE=$package deb-systemd-helper disable "$unit" >/dev/null 2>&1 || true
				update-rc.d "${unit%.*}" disable >/dev/null 2>&1 || true
			fi
		done
	done
}

case ${1:-} in
-h | --help) sed -n 's/^# Usage: /usage: /p' "$0"; exit 0 ;;
esac
[[ $# -gt 0 ]] || set -- test
for group in "$@"; do
	[[ -n ${groups[$group]:-} ]] || die "unknown group $group; known: ${!groups[*]}"
done
mapfile -t packages < <(missing "$@")
[[ ${#packages[@]} -gt 0 ]] || exit 0
install_packages "${packages[@]}"
mapfile -t packages < <(missing "$@")
[[ ${#packages[@]} -eq 0 ]] || die "installed, yet still not found: ${packages[*]}"
