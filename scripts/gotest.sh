#!/usr/bin/env bash
# gotest.sh FLAG... -- PACKAGE...: runs go test, and gives at most three failed tests a second try.
#
# The tests run many real programs, the kernel and hundreds of timers on a machine that may be slow and busy, and some of those
# programs fail now and then by themselves. A failed test is run once more, after everything else. Each test that passes only
# then is named at the end, with the output of its failure above: it has a fault that wants mending. These get no second try:
# data races, panics and tests that hang; a package that fails without naming a test, or that is killed or exits before its last
# test; four failed tests or more.
set -euo pipefail

go=${GO:-go} flags=()
while (($#)) && [[ $1 != -- ]]; do flags+=("$1"); shift; done
(($# > 1)) || { echo "usage: gotest.sh FLAG... -- PACKAGE..." >&2; exit 2; }
shift

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$go" test "${flags[@]}" "$@" 2>&1 | tee "$log" || status=$?
((status)) || exit 0

if grep -qE 'WARNING: DATA RACE|(^|[[:space:]])(panic|fatal error|SIG[A-Z]+): |\[(build|setup) failed\]' "$log"; then exit "$status"; fi
# A package's output ends with its result, and before that with FAIL or PASS alone if all its tests have run. Each line here is a
# package and its failed tests, or none if the others may not have run: PACKAGE TEST|TEST.
mapfile -t failed < <(awk '
	/^--- FAIL: / { tests = tests (tests ? "|" : "") $3 }
	$1 == "FAIL" && NF > 1 { print $2, all_ran ? tests : ""; tests = "" }
	$1 == "ok" { tests = "" }
	{ all_ran = $0 == "FAIL" || $0 == "PASS" }' "$log")
count=0
for line in "${failed[@]}"; do
	read -r package tests <<<"$line"
	[[ -n $tests ]] || exit "$status"
	names=${tests//[^|]/}
	((count += ${#names} + 1))
done
((count >= 1 && count <= 3)) || exit "$status"

for line in "${failed[@]}"; do
	read -r package tests <<<"$line"
	echo "second try: $package ${tests//|/ }"
	"$go" test "${flags[@]}" -run "^($tests)\$" "$package"
done
for line in "${failed[@]}"; do echo "passed only at the second try: $line"; done
