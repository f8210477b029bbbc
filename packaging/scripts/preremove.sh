#!/bin/sh
# Before the removal, while the program is still there: the host is restored, also one that is closed after a crash.
# Debian says "remove" or "upgrade", RPM the number of packages that stay, Alpine and Arch the version.
set -e

case "${1:-}" in
upgrade | deconfigure | failed-upgrade | [1-9]) exit 0 ;;
esac

if [ -d /run/systemd/system ]; then
	units=$(systemctl list-units --all --plain --no-legend 'viasocks.service' 'viasocks@*.service' 'viasocks-closed.service' |
		while read -r unit _; do echo "$unit"; done)
	for unit in $units viasocks.service viasocks-closed.service; do
		systemctl disable --now "$unit" >/dev/null 2>&1 || true
	done
fi

# Without the program nobody could undo this any more.
if [ -n "$(ls -A /run/viasocks 2>/dev/null)" ]; then
	/usr/bin/viasocks down || {
		echo "viasocks: the host is not restored, and the package stays: see what 'viasocks down' says" >&2
		exit 1
	}
fi
