#!/usr/bin/env bash
# image.sh: makes a container image from scratch, without an engine: an archive of an OCI image layout.
#
# Usage: image.sh [FILE]      (dist/viasocks-image.tar)
#
#   podman load -i FILE        or: docker load -i FILE        or: skopeo copy oci-archive:FILE docker://REGISTRY/viasocks
#
# The image holds the program and the certificates of this machine's authorities, which proxies inside TLS need.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin

out=${1:-dist/viasocks-image.tar}
mkdir -p "$(dirname "$out")"
out=$(realpath "$out")
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

umask 022
make build STRIP='-s -w' >/dev/null
install -D -m 755 bin/viasocks "$folder/usr/bin/viasocks"
# The control socket and the journal are in /run.
mkdir -p "$folder/run" "$folder/etc/viasocks"
mkdir -m 1777 "$folder/tmp"
certificates=/etc/ssl/certs/ca-certificates.crt
if [[ -e $certificates ]]; then
	install -D -m 644 "$certificates" "$folder$certificates"
else
	echo "image: there is no $certificates: proxies inside TLS need --proxy-ca" >&2
fi
(cd packaging/image && GOFLAGS='' CGO_ENABLED=0 go run . -root "$folder" -out "$out" -version "$(../../scripts/version.sh)")
echo "image: $out"
