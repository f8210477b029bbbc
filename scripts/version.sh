#!/usr/bin/env bash
# version.sh: prints the version of these sources, in the form of semver.org, without a v.
#
# A commit that has a tag vX.Y.Z is X.Y.Z. Every other commit is a step toward the version at the top of CHANGELOG.md:
# X.Y.Z-dev.COMMITS+gREVISION, which sorts before X.Y.Z; .dirty stands behind it where files have changed. An archive
# without .git is X.Y.Z-dev. VIASOCKS_VERSION, if it is set, is printed as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -n ${VIASOCKS_VERSION:-} ]]; then
	echo "${VIASOCKS_VERSION#v}"
	exit
fi
next=$(sed -n 's/^## \[\{0,1\}\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' CHANGELOG.md | head -1)
[[ -n $next ]] || { echo "version: cannot tell the version: CHANGELOG.md has no heading like '## 1.2.3'" >&2; exit 1; }
if ! top=$(git rev-parse --show-toplevel 2>/dev/null) || [[ $top != "$PWD" ]]; then
	echo "$next-dev"
	exit
fi
dirty=
git diff-index --quiet HEAD -- 2>/dev/null || dirty=.dirty
if tag=$(git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null) && [[ -z $dirty ]]; then
	echo "${tag#v}"
	exit
fi
echo "$next-dev.$(git rev-list --count HEAD)+g$(git rev-parse --short=12 HEAD)$dirty"
