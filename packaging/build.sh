#!/usr/bin/env bash
# build.sh: makes the packages for Debian, Fedora, Alpine and Arch in a folder.
#
# Usage: build.sh [FOLDER]      (dist; only some kinds: PACKAGERS="deb rpm")
#
# The same sources give the same bytes: files have the time of the last commit (SOURCE_DATE_EPOCH, if it is set).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin

# v2.46 and later need modules that the proxy of Go does not serve.
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.0
out=${1:-dist}
mkdir -p "$out"

VERSION=$(scripts/version.sh)
GOARCH=${GOARCH:-$(go env GOARCH)}
MAINTAINER=${MAINTAINER:-The viasocks authors <viasocks@users.noreply.github.com>}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
STAGE=$folder/stage ZSH=$folder/_viasocks
mkdir "$STAGE"
export VERSION GOARCH MAINTAINER SOURCE_DATE_EPOCH STAGE ZSH

umask 022
make install DESTDIR="$STAGE" PREFIX=/usr STRIP='-s -w' >/dev/null
# Debian has a folder of its own for this.
mv "$STAGE/usr/share/zsh/site-functions/_viasocks" "$ZSH"
rm -r "$STAGE/usr/share/zsh"
find "$STAGE/usr/share/man" -type f -exec gzip -9n {} +

doc=$STAGE/usr/share/doc/viasocks
install -D -m 644 -t "$doc" README.md
gzip -9nc CHANGELOG.md >"$doc/changelog.gz"
debian=$(date -u -R -d "@$SOURCE_DATE_EPOCH")
{
	echo "viasocks ($(sed 's/-/~/' <<<"$VERSION")-1) unstable; urgency=medium"
	printf '\n  * See changelog.gz.\n\n'
	echo " -- $MAINTAINER  $debian"
} | gzip -9nc >"$doc/changelog.Debian.gz"
install -d -m 755 "$doc/examples"
[[ ! -d packaging/examples ]] || cp -r packaging/examples/. "$doc/examples/"
install -m 644 packaging/viasocks.conf "$doc/examples/viasocks.conf"
install -m 644 scripts/viasocks-dashboard.json scripts/viasocks-alerts.yml "$doc/examples/"
chmod -R u=rwX,go=rX "$doc"
install -D -m 644 packaging/sysusers.conf "$STAGE/usr/lib/sysusers.d/viasocks.conf"
install -D -m 644 packaging/apparmor "$STAGE/usr/share/viasocks/apparmor"
find "$folder" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

for packager in ${PACKAGERS:-deb rpm apk archlinux}; do
	# Alpine knows no other words for what comes before a version, and no revisions.
	[[ $packager != apk ]] || VERSION=$(sed -E 's/-dev\.?([0-9]*).*/-pre\1/; s/\+.*//' <<<"$VERSION")
	[[ $packager != archlinux ]] || VERSION=$(scripts/version.sh)
	GOOS='' GOFLAGS='' go run "$nfpm" package --config packaging/nfpm.yaml --packager "$packager" --target "$out/"
done
