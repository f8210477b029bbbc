# What the scripts of this folder share. This file is no finding: each script reads it in its first line of code.
#
# The exit status of a script is 0 (the surprise is still there), 1 (something else was seen) or 2 (it cannot run here).
# A step that fails unexpectedly ends with 2, never with 1.

set -Eeuo pipefail
export PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin LC_ALL=C

work=$(mktemp -d)
spaces=() children=()

cannot() {
	printf 'cannot run here: %s\n' "$*" >&2
	exit 2
}

clean() {
	local status=$?
	trap - ERR
	set +e
	local name
	if ((${#children[@]})); then
		kill "${children[@]}" 2>/dev/null
		for _ in {1..30}; do
			kill -0 "${children[@]}" 2>/dev/null || break
			sleep 0.1
		done
	fi
	# Not every program ends its helpers, or itself, when it is told to.
	for name in "${spaces[@]}"; do kill -KILL $(ip netns pids "$name") 2>/dev/null; done
	((${#children[@]} == 0)) || wait "${children[@]}" 2>/dev/null
	for name in "${spaces[@]}"; do
		ip netns del "$name" 2>/dev/null
		rm -rf "/etc/netns/$name"
	done
	chmod -R u+w "$work"
	rm -rf "$work"
	exit "$status"
}

trap 'cannot "line $LINENO failed: $BASH_COMMAND"' ERR
trap clean EXIT
trap 'exit 2' INT TERM

# need PROGRAM... ends the script unless all of them are installed.
need() {
	local program
	for program; do command -v "$program" >/dev/null || cannot "$program is not installed"; done
}

# space VARIABLE makes a network namespace, with its loopback device up, and stores its name in VARIABLE. At the end the namespace
# goes, and with it the folder /etc/netns/NAME, whose files ip-netns(8) binds over those of the system.
space() {
	((EUID == 0)) || cannot "network namespaces need root"
	need ip
	local -n name=$1
	name=finding-$$-$1
	ip netns add "$name" || cannot "the kernel refuses a network namespace"
	spaces+=("$name")
	ip -n "$name" link set lo up
}

# home_network makes the namespaces $gateway (10.66.0.1) and $app (10.66.0.2, with its default route to the gateway), joined by v0.
home_network() {
	space gateway
	space app
	ip -n "$gateway" link add v0 type veth peer name v0 netns "$app"
	ip -n "$gateway" address add 10.66.0.1/24 dev v0
	ip -n "$gateway" link set v0 up
	ip -n "$app" address add 10.66.0.2/24 dev v0
	ip -n "$app" link set v0 up
	ip -n "$app" route add default via 10.66.0.1
}

# in_space NAME COMMAND... runs a command in a namespace; start NAME LOG COMMAND... runs it in the background.
in_space() { ip netns exec "$@"; }
start() {
	ip netns exec "$1" "${@:3}" >"$work/$2" 2>&1 &
	children+=($!)
}

# within SECONDS COMMAND... repeats a command until it succeeds.
within() {
	local end=$((SECONDS + $1))
	until "${@:2}" >/dev/null 2>&1; do
		((SECONDS < end)) || cannot "this did not succeed within $1 s: ${*:2}"
		sleep 0.1
	done
}

# listening NAME PORT tells whether a TCP socket listens on PORT in the namespace.
listening() { [[ $(ip netns exec "$1" ss -Hltn "sport = :$2") ]]; }

# debs NAME=VERSION... unpacks Debian packages below $work/root, without installing them.
debs() {
	need apt-get dpkg
	(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$@") >"$work/apt.log" 2>&1 ||
		cannot "apt-get download failed: $(tail -n 1 "$work/apt.log")"
	local file
	for file in "$work"/*.deb; do dpkg -x "$file" "$work/root"; done
	local folder missing
	for folder in "$work"/root/{,usr/}lib/*-linux-gnu; do
		[[ ! -d $folder ]] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
	done
	missing=$({ find "$work"/root/usr/*bin -type f -exec ldd {} + 2>/dev/null || true; } |
		sed -n 's/^[[:space:]]*\(.*\) => not found/\1/p' | sort -u)
	[[ -z $missing ]] || cannot "the packages need libraries that are not installed: ${missing//$'\n'/ }"
}

# go_program MODULE@VERSION... builds $work/program from the Go source on standard input.
go_program() {
	need go
	mkdir "$work/go"
	cat >"$work/go/main.go"
	(
		cd "$work/go"
		export GOTOOLCHAIN=local GOFLAGS=-mod=mod CGO_ENABLED=0 GOWORK=off
		go mod init finding
		(($# == 0)) || go get "$@"
		go build -o "$work/program" .
	) >"$work/go.log" 2>&1 || cannot "the Go program was not built: $(tail -n 1 "$work/go.log")"
}

# report WHAT TEXT prints one line of the account.
report() { printf '%-9s %s\n' "$1:" "$2"; }

# conclude SEEN SURPRISE compares what was observed with the surprise, both in the same short notation, and ends the script.
conclude() {
	if [[ $1 == "$2" ]]; then
		echo "The surprise is still there."
		exit 0
	fi
	printf 'This has changed. Observed now: %s. The surprise was: %s.\n' "$1" "$2"
	exit 1
}
