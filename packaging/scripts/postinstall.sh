#!/bin/sh
# After the installation or an upgrade. The first argument differs: Debian says "configure" and the version before, RPM the
# number of packages that there are now, Alpine and Arch the new version.
set -e

case "${1:-}" in
abort-*) exit 0 ;;
esac

# The group of the option control-group.
if command -v systemd-sysusers >/dev/null 2>&1; then
	systemd-sysusers viasocks.conf || true
elif ! getent group viasocks >/dev/null; then
	groupadd -r viasocks 2>/dev/null || addgroup -S viasocks 2>/dev/null || true
fi

# Where AppArmor keeps user namespaces from ordinary programs, 'viasocks run' needs a profile. Older versions of AppArmor
# do not know what stands in it, and do not need it.
profile=/etc/apparmor.d/viasocks
if [ -e "${VIASOCKS_SYS:-}/proc/sys/kernel/apparmor_restrict_unprivileged_userns" ] && [ -d /etc/apparmor.d ]; then
	[ -e "$profile" ] || install -m 644 /usr/share/viasocks/apparmor "$profile"
	if command -v apparmor_parser >/dev/null 2>&1; then
		apparmor_parser -r -T -W "$profile" ||
			echo "viasocks: AppArmor did not take $profile: 'viasocks run' needs root" >&2
	fi
fi

[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true

# An upgrade while the host is carried: the viasocks that is up starts the new version, which takes the host over without
# cutting a connection. One that does not know this, or whose configuration has other marks or another device now, is killed:
# a stop would open the host for a moment, but after SIGKILL it stays closed, and systemd starts the new version a second
# later. Connections from outside and those without the proxy go on. If the new version does not take the configuration, the
# old one stays, because the host would be closed for good.
systemctl list-units --plain --no-legend --state=active 'viasocks.service' 'viasocks@*.service' 2>/dev/null |
	while read -r unit _; do
		name=${unit%.service}
		file=/etc/viasocks/${name#viasocks@}.conf
		if /usr/bin/viasocks upgrade --config "$file" </dev/null >/dev/null; then
			echo "viasocks: $unit goes on with the new version, and no connection was cut"
		elif /usr/bin/viasocks check --config "$file" </dev/null >/dev/null; then
			echo "viasocks: $unit is restarted; the host stays closed meanwhile"
			systemctl kill --kill-who=main --signal=SIGKILL "$unit" || true
		else
			echo "viasocks: $unit goes on with the version before: correct $file, then run 'viasocks upgrade'" >&2
		fi
	done
