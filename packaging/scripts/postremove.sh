#!/bin/sh
# After the removal. Debian says "remove", "purge" or "upgrade", RPM the number of packages that stay, Alpine and Arch the
# version.
set -e

case "${1:-}" in
upgrade | failed-upgrade | abort-* | disappear | [1-9]) exit 0 ;;
esac

profile=/etc/apparmor.d/viasocks
if [ -e "$profile" ]; then
	if command -v apparmor_parser >/dev/null 2>&1; then
		apparmor_parser -R "$profile" >/dev/null 2>&1 || true
	fi
	rm -f "$profile"
fi
rmdir /run/viasocks 2>/dev/null || true
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || true
fi
if [ "${1:-}" = purge ]; then
	rm -rf /var/log/viasocks
fi
