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
export VERSION GOARCH SOURCE_DATE_EPOCH

umask 022
common=$folder/common
make install DESTDIR="$common" PREFIX=/usr STRIP='-s -w' >/dev/null
find "$common/usr/share/man" -type f -exec gzip -9n {} +
doc=$common/usr/share/doc/viasocks
install -D -m 644 -t "$doc" README.md
gzip -9nc CHANGELOG.md >"$doc/changelog.gz"
install -D -m 644 -t "$doc/examples" packaging/examples/* packaging/viasocks.conf \
	scripts/viasocks-dashboard.json scripts/viasocks-alerts.yml
chmod -R u=rwX,go=rX "$doc"
install -D -m 644 packaging/sysusers.conf "$common/usr/lib/sysusers.d/viasocks.conf"
install -D -m 644 packaging/apparmor "$common/usr/share/viasocks/apparmor"
install -D -m 600 packaging/viasocks.conf "$common/etc/viasocks/viasocks.conf"
# nfpm writes the times of these into some packages.
scripts=$folder/scripts
install -D -m 755 -t "$scripts" packaging/scripts/*.sh

# What only Debian has, or has somewhere else.
of_deb() {
	mkdir -p "$STAGE/usr/share/zsh/vendor-completions"
	mv "$STAGE/usr/share/zsh/site-functions/_viasocks" "$STAGE/usr/share/zsh/vendor-completions/"
	rmdir "$STAGE/usr/share/zsh/site-functions"
	install -m 644 packaging/copyright "$STAGE/usr/share/doc/viasocks/copyright"
	install -D -m 644 packaging/lintian-overrides "$STAGE/usr/share/lintian/overrides/viasocks"
	{
		echo "viasocks ($(sed 's/-/~/' <<<"$VERSION")-1) unstable; urgency=medium"
		printf '\n  * See changelog.gz.\n\n'
		echo " -- $MAINTAINER  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")"
	} | gzip -9nc >"$STAGE/usr/share/doc/viasocks/changelog.Debian.gz"
}

# contents lists the files of the package, and the folders that belong to it alone. rpm marks documentation as such, which an
# installation can leave out.
contents() {
	(cd "$STAGE" && find usr -type f -printf '%m %p\n' | LC_ALL=C sort -k2) | while read -r mode file; do
		local type=''
		[[ $packager != rpm || $file != usr/share/@(doc|man)/* ]] || type='type: doc, '
		printf '  - {%ssrc: "%s", dst: "/%s", file_info: {mode: 0%s}}\n' "$type" "$STAGE/$file" "$file" "$mode"
	done
	(cd "$STAGE" && find usr -type d -path '*/viasocks*' | LC_ALL=C sort) | while read -r file; do
		printf '  - {type: dir, dst: "/%s", file_info: {mode: 0755}}\n' "$file"
	done
}

summary='carries TCP and UDP of a host or a program through a SOCKS proxy'
text='viasocks carries every TCP connection and every UDP datagram of a Linux
host, or of one program, through a SOCKS5, SOCKS4 or HTTP proxy, without
changing the program. One program needs no root. The whole host stays
closed if the proxy or viasocks fails, and can be restored at any time.'

for packager in ${PACKAGERS:-deb rpm apk archlinux}; do
	STAGE=$folder/$packager
	export STAGE
	cp -a "$common" "$STAGE"
	schema=semver VERSION=$(scripts/version.sh)
	case $packager in
	# The first line is the summary.
	deb) description=$summary$'\n'$text ;;
	rpm) description=$text ;;
	# They have one line. Alpine knows no other words for what comes before a version, and no revisions; nfpm leaves out of
	# an Arch package what comes before a version, unless it stands in the version itself, which pacman compares as it should.
	apk) description=$summary VERSION=$(sed -E 's/-dev\.?([0-9]*).*/-pre\1/; s/\+.*//' <<<"$VERSION") ;;
	archlinux) description=$summary schema=none VERSION=$(sed -E 's/-dev\.?/dev/; s/\+.*//' <<<"$VERSION") ;;
	esac
	if [[ $packager == deb ]]; then
		of_deb
	else
		install -D -m 644 LICENSE "$STAGE/usr/share/licenses/viasocks/LICENSE"
	fi
	contents >"$folder/contents"
	find "$folder" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	sed -e "s|@SCHEMA@|$schema|; s|@MAINTAINER@|$MAINTAINER|; s|@SCRIPTS@|$scripts|" \
		-e "s|@DESCRIPTION@|${description//$'\n'/\\n  }|; /#@FILES@/r $folder/contents" packaging/nfpm.yaml >"$folder/nfpm.yaml"
	GOOS='' GOFLAGS='' go run "$nfpm" package --config "$folder/nfpm.yaml" --packager "$packager" --target "$out/"
done
