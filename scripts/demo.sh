#!/usr/bin/env bash
# demo.sh: the main job on real programs. An unchanged aria2, which knows no SOCKS, downloads by everything it speaks
# through a SOCKS proxy; a recorder on the proxy's side of the wire counts every packet that went anywhere else.
#
#   app                           proxy                         world
#   viasocks run -- aria2c …      dante-server                  nginx .80   vsftpd .21   openssh .22   dnsmasq .53
#       10.66.0.2 ── to-app (recorder) 10.66.0.1 │ 203.0.113.1 ── opentracker .69        aria2 seeders .91 .92
#
# The namespaces are those of lab.sh, under a prefix of this run's own. Usage: demo.sh (as root; `make demo` builds and
# installs first). All state lives in one temporary directory; only processes started here are ended; nothing of
# the host is changed, and whatever happens, the end of the script clears it all away. Exit status: 0 only when every
# hash was right, every server saw the proxy's address, no packet leaked, and the counter was shown to count.
#
# DEMO_SCALE (percent, default 100) makes the files but that for HTTP smaller or larger: aria2 opens its 16 connections
# only to what is large enough for them. DEMO_PATIENCE (default 1) is by how much every limit of time is stretched, for
# machines that are slow or stall. DEMO_KEEP=1 keeps the directory with the logs.
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

here=$(cd "$(dirname "$0")" && pwd)
VIASOCKS=${VIASOCKS:-$here/../bin/viasocks}
patience=${DEMO_PATIENCE:-1}
export LAB=viasocks-demo-$$
app=$LAB-app proxy=$LAB-proxy world=$LAB-world
proxy_in=10.66.0.1 proxy_out=203.0.113.1 proxy_out6=2001:db8:113::1 app_addr=10.66.0.2
ftp_addr=203.0.113.21 sftp_addr=203.0.113.22 dns_addr=203.0.113.53 tracker_addr=203.0.113.69 web_addr=203.0.113.80
seeder_addrs=(203.0.113.91 203.0.113.92)
poll_addr=203.0.113.2 # from here the demo itself asks the tracker
# dante's UDP relays get ports of this range alone, so that the recorder's whitelist is as narrow as it can be.
relay_ports=40000-44999
app_peer_port=51413 app_dht_port=51414 seeder_port=6881
proxy_url=socks5://$proxy_in:1080

T=           # the directory of this run
pids=()      # what start started
running=     # the download that is under way
failures=()  # what was wrong
rows=()      # the table at the end

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
die() { echo "demo: $*" >&2; exit 1; }
# wrong notes a failure; the demo goes on, so that all of them are seen, and ends non-zero.
wrong() { failures+=("$*"); printf 'WRONG: %s\n' "$*"; }

# clean_up ends our processes by their ids, then the namespaces with whatever is left in them, then the directory.
clean_up() {
	local status=$? pid left=30
	trap - EXIT
	trap '' INT TERM HUP
	# The download first, and politely: viasocks hands the signal on to the program, and ends with it.
	if [[ -n $running ]] && kill -TERM "$running" 2>/dev/null; then
		while kill -0 "$running" 2>/dev/null && ((left-- > 0)); do sleep 0.1; done
	fi
	for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
	"$here/lab.sh" down >/dev/null 2>&1 || { echo "demo: cannot take the namespaces $LAB-* down" >&2; status=1; }
	if [[ -n $T && ${DEMO_KEEP:-} ]]; then
		echo "demo: logs kept in $T"
	elif [[ -n $T ]]; then
		rm -rf -- "$T"
	fi
	exit "$status"
}

# clear_stale takes away what a demo left that was killed outright: namespaces, with what runs in them, and directory
# carry its pid.
clear_stale() {
	local pid dir
	while read -r pid; do
		! alive "$pid" || continue
		LAB=viasocks-demo-$pid "$here/lab.sh" down >/dev/null 2>&1 || true
	done < <(ip netns list | sed -n 's/^viasocks-demo-\([0-9]*\)-[a-z]*\( .*\)\{0,1\}$/\1/p' | sort -u)
	for dir in "${TMPDIR:-/tmp}"/viasocks-demo.*.??????; do
		[[ -d $dir && ! -L $dir && -O $dir ]] || continue
		pid=${dir##*/viasocks-demo.}
		alive "${pid%.*}" || rm -rf -- "$dir"
	done
}

# alive tells whether a demo with this pid is running.
alive() { grep -qsF demo.sh "/proc/$1/cmdline"; }

in_ns() { ip netns exec "$@"; }

# start NAME NAMESPACE CMD... runs a server in the foreground of a pid namespace of its own: with the process noted in
# pids, all its children end too. Its output goes to NAME.log. The shell between is the namespace's init: vsftpd
# crashes when it is handed orphans that it doesn't know.
start() {
	local name=$1 ns=$2
	shift 2
	# shellcheck disable=SC2016 # expanded by the inner shell
	ip netns exec "$ns" unshare --fork --pid --kill-child -- bash -c '"$@" & wait $!' init "$@" \
		>"$T/$name.log" 2>&1 </dev/null &
	pids+=($!)
	disown $! # or bash would announce its end
}

# await WHAT SECONDS CMD... waits until CMD succeeds.
await() {
	local what=$1 deadline=$((SECONDS + $2 * patience))
	shift 2
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS >= deadline)); then
			tail -n 5 "$T"/*.log >&2 || true
			die "$what did not start"
		fi
		sleep 0.1
	done
}

# within SECONDS CMD... waits until CMD succeeds; its status is the last one's.
within() {
	local deadline=$((SECONDS + $1 * patience))
	shift
	until "$@"; do
		((SECONDS < deadline)) || return 1
		sleep 0.2
	done
}

# listening NAMESPACE t|u ADDR PORT
listening() { [[ -n $(in_ns "$1" ss -Hln"$2" src "$3:$4") ]]; }

# shellcheck source=scripts/demo-servers.sh
source "$here/demo-servers.sh"

# --- the recorder -------------------------------------------------------------------------------------------------

# Two witnesses on the proxy's side of the wire to app: nftables' counters at ingress, before anything could drop a packet,
# and tcpdump, which also tells what a leak was. Allowed are: app to the SOCKS port; app to the UDP relays; an ICMP error
# about a packet of the relay's, back to the relay; and what the link itself needs to find its neighbour, ARP and ND.
start_recorder() {
	in_ns "$proxy" nft -f - <<-END
		table netdev demo {
			counter socks_tcp {}
			counter socks_udp {}
			counter relay_icmp {}
			counter neighbour {}
			counter leak4 {}
			counter leak6 {}
			counter leak_other {}
			chain from_app {
				type filter hook ingress device "to-app" priority 0; policy accept;
				ether type arp counter name neighbour accept
				ip6 hoplimit { 1, 255 } icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, mld2-listener-report } counter name neighbour accept
				ip saddr $app_addr ip daddr $proxy_in tcp dport 1080 counter name socks_tcp accept
				ip saddr $app_addr ip daddr $proxy_in udp dport $relay_ports counter name socks_udp accept
				ip saddr $app_addr ip daddr $proxy_in icmp type destination-unreachable counter name relay_icmp accept
				ether type ip counter name leak4 accept
				ether type ip6 counter name leak6 accept
				counter name leak_other accept
			}
		}
	END
	start tcpdump "$proxy" tcpdump -i to-app -Q in -n -l --immediate-mode "not arp
		and not (icmp6 and (ip6[40] == 133 or ip6[40] == 135 or ip6[40] == 136) and ip6[7] == 255)
		and not (ip6[6] == 0 and ip6[40] == 58 and (ip6[48] == 131 or ip6[48] == 143) and ip6[7] == 1)
		and not (ip src $app_addr and ip dst $proxy_in and (tcp dst port 1080 or (udp and dst portrange $relay_ports)
			or (icmp and icmp[0] == 3)))"
	await "tcpdump" 10 grep -q '^listening on' "$T/tcpdump.log"
}

# counted NAME prints the packets of a counter.
counted() { in_ns "$proxy" nft list counter netdev demo "$1" | awk '$1 == "packets" {print $2}'; }
leaked() { echo $(($(counted leak4) + $(counted leak6) + $(counted leak_other))); }
witnessed() { grep -cE '^[0-9:.]+ (IP|IP6|ARP|0x|[0-9a-f:]+ >)' "$T/tcpdump.log" || true; }

# agree BEFORE tells whether both witnesses count the same, since tcpdump had seen BEFORE.
agree() { (($(leaked) == $(witnessed) - $1)); }

# positive_control goes without viasocks: TCP, UDP and ICMP errors' triggers, both families. The recorder must see all of it.
positive_control() {
	local four six all seen
	step "positive control: the same namespace without viasocks"
	say "app# aria2c http://$web_addr/http.bin   (and TCP to IPv6, UDP to 53, a DHT port, multicast)"
	in_ns "$app" timeout 4 aria2c --no-conf --dir="$T/got" --connect-timeout=2 --max-tries=1 --file-allocation=none \
		--show-console-readout=false "http://$web_addr/http.bin" >"$T/control.log" 2>&1 && wrong "aria2 reached the world without viasocks"
	in_ns "$app" curl -s --max-time 1 "http://[2001:db8:113::80]/" >/dev/null 2>&1 && wrong "curl reached the world without viasocks"
	# shellcheck disable=SC2016 # expanded by the inner shell
	in_ns "$app" bash -c 'for to in "$@"; do (echo >"/dev/udp/$to") 2>/dev/null || true; done' _ \
		$dns_addr/53 2001:db8:113::53/53 "${seeder_addrs[0]}/$seeder_port" 239.192.152.143/6771
	sleep 0.5
	within 10 agree 0 || true # tcpdump writes when it gets to it
	four=$(counted leak4) six=$(counted leak6) all=$(leaked) seen=$(witnessed)
	say "counted: $four packets of IPv4, $six of IPv6; tcpdump saw $seen of them"
	((four >= 4)) || wrong "the control's IPv4 packets were not counted: $four"
	((six >= 2)) || wrong "the control's IPv6 packets were not counted: $six"
	((seen == all)) || wrong "the two witnesses disagree: nft $all, tcpdump $seen"
	control="$four IPv4, $six IPv6"
	control_seen=$seen
	in_ns "$proxy" nft reset counters table netdev demo >/dev/null
}

# --- the cases ----------------------------------------------------------------------------------------------------

# Names travel to the proxy. For UDP they are looked up by a resolver of the world, through the proxy.
run_args=(--proxy "$proxy_url" --dns "fake,tcp://$dns_addr")

# download CASE FILE SECONDS ARGS... runs aria2 under viasocks and notes bytes, time and hash. With a torrent the time ends
# with the last byte, though aria2 seeds a little longer.
download() {
	local name=$1 file=$2 limit=$3 dir=$T/got/$1 began ended status=0 got=0 hash_ok=no before
	shift 3
	# Whatever hangs, the whole ends within five minutes.
	limit=$((limit * patience))
	((limit < 270 * patience - SECONDS)) || limit=$((SECONDS < 270 * patience - 5 ? 270 * patience - SECONDS : 5))
	mkdir -p "$dir"
	printf '#!/bin/sh\ndate +%%s.%%N >%q\n' "$dir.done" >"$dir.hook"
	chmod 755 "$dir.hook"
	say "app# viasocks run ${run_args[*]} -- aria2c ${*//$T/\$T}"
	before=$(leaked)
	began=$(date +%s.%N)
	in_ns "$app" timeout -k 5 "$limit" "$VIASOCKS" run "${run_args[@]}" -- \
		aria2c --no-conf --dir="$dir" --file-allocation=none --show-console-readout=false --summary-interval=0 \
		--max-tries=3 --retry-wait=1 --connect-timeout=15 --on-download-complete="$dir.hook" \
		--on-bt-download-complete="$dir.hook" "$@" >"$T/case-$name.log" 2>&1 </dev/null &
	# In the background, since bash hears no signal while it runs a program.
	running=$!
	wait "$running" || status=$?
	running=
	ended=$(cat "$dir.done" 2>/dev/null || date +%s.%N)
	[[ -f $dir/$file ]] && got=$(stat -c %s "$dir/$file")
	if [[ $status -ne 0 ]]; then
		wrong "$name: status $status"
		tail -n 15 "$T/case-$name.log" | sed 's/^/    /'
	fi
	if [[ -f $dir/$file && $(sha256sum <"$dir/$file") == "${sum[$file]} "* ]]; then
		hash_ok=ok
	else
		wrong "$name: the sha256 of what arrived ($got of ${size[$file]} bytes) is another"
	fi
	rm -f -- "$dir/$file"
	case_bytes=$got case_hash=$hash_ok case_leaked=$(($(leaked) - before))
	case_seconds=$(awk -v a="$began" -v b="$ended" 'BEGIN {printf "%.1f", b - a}')
}

# row CASE SEEN_AS notes the last download's line of the table.
row() {
	local line
	line=$(printf '%-26s %10d %7s %8s  %-4s %-21s %6d' "$1" "$case_bytes" "$case_seconds" \
		"$(awk -v b="$case_bytes" -v s="$case_seconds" 'BEGIN {printf "%.1f", b / 1e6 / (s > 0 ? s : 0.1)}')" \
		"$case_hash" "$2" "$case_leaked")
	rows+=("$line")
	say "$case_bytes bytes in $case_seconds s, sha256 $case_hash, seen by the server as $2, leaked packets: $case_leaked"
	[[ $2 == "$proxy_out" || $2 == "$proxy_out:$app_peer_port" || $2 == "$proxy_out6" ]] || wrong "$1: the server saw $2, not the proxy's address"
	((case_leaked == 0)) || wrong "$1: $case_leaked packets left app for something else than the proxy"
}

# only prints the different lines of its input as one word.
only() { sort -u | paste -sd, -; }

# logged CMD... prints what CMD does, which reads a server's log: the line may come a little after the download's end.
logged() {
	local out
	out() { out=$("$@") && [[ -n $out ]]; }
	within 10 out "$@" || true
	printf '%s' "$out"
}

case_http() {
	step "HTTP, 16 connections, by name"
	local conns try
	# On a machine that stalls some connections may have the file before the last one is there: not each time.
	for try in 1 2 3; do
		download http http.bin 60 -x16 -s16 -k1M http://web.demo.test/http.bin
		within 5 http_conns || true
		conns=$(awk '{print $2}' "$T/nginx/access.log" | sort -u | wc -l)
		say "nginx counted $conns connections"
		((conns < 16 && try < 3)) || break
		: >"$T/nginx/access.log"
	done
	((conns >= 16)) || wrong "HTTP: $conns connections, not 16"
	row "HTTP, 16 connections" "$(awk '{print $1}' "$T/nginx/access.log" | only)"
}

http_conns() { (($(awk '{print $2}' "$T/nginx/access.log" | sort -u | wc -l) >= 16)); }

case_ftp() {
	step "FTP, passive"
	download ftp ftp.bin 45 ftp://ftp.demo.test/ftp.bin
	row "FTP" "$(logged ftp_clients)"
}

ftp_clients() { sed -n 's/.*OK DOWNLOAD: Client "\([^"]*\)".*/\1/p' "$T/vsftpd.out" | sed 's/^::ffff://' | only; }

case_sftp() {
	step "SFTP"
	# The password is this run's alone; --ftp-passwd is the only way by which aria2 takes one for SFTP, but for a file.
	(umask 077 && printf 'ftp-user=demo\nftp-passwd=%s\n' "$sftp_password" >"$T/sftp.conf")
	download sftp sftp.bin 45 --no-conf=false --conf-path="$T/sftp.conf" --ssh-host-key-md="sha-1=$sftp_key_sha1" \
		"sftp://sftp.demo.test$T/files/sftp.bin"
	row "SFTP" "$(logged sftp_clients)"
}

sftp_clients() { sed -n 's/^Accepted password for demo from \([^ ]*\) .*/\1/p' "$T/sshd.log" | only; }

bt_args=("--listen-port=$app_peer_port" "--dht-listen-port=$app_dht_port" --bt-enable-lpd=true "--bt-stop-timeout=$((40 * patience))")

# case_tracker NAME TITLE ARGS...: a torrent whose peers come from the tracker. aria2 seeds for three seconds (--seed-time
# is in minutes), with more patience for longer, during which the tracker's record is read.
case_tracker() {
	local name=$1 title=$2 poller recorded
	shift 2
	step "torrent, $title"
	(
		set +e
		while :; do
			tracker_peers "$name.bin" >>"$T/$name.peers"
			sleep 0.3
		done
	) 2>/dev/null &
	poller=$!
	pids+=("$poller")
	download "$name" "$name.bin" 60 "${bt_args[@]}" --seed-time="$(awk -v p="$patience" 'BEGIN {print (p > 1 ? 0.2 : 0.05)}')" "$@" "$T/$name.bin.torrent"
	kill -KILL "$poller" 2>/dev/null || true
	wait "$poller" 2>/dev/null || true
	recorded=$(grep -vE "^(${seeder_addrs[0]//./\\.}|${seeder_addrs[1]//./\\.}):" "$T/$name.peers" | only)
	say "the tracker recorded: ${recorded:-nobody}; the seeders: $(grep -E "^203\.0\.113\.9[12]:" "$T/$name.peers" | only)"
	row "torrent, $title" "${recorded:-nobody}"
}

case_dht() {
	step "trackerless magnet, DHT alone"
	download dht dht.bin 90 "${bt_args[@]}" --seed-time=0 --enable-dht=true --dht-file-path="$T/got/dht.dat" \
		--dht-entry-point=node.demo.test:$seeder_port "magnet:?xt=urn:btih:${hash[dht.bin]}"
	row "magnet, DHT alone" "$(logged dht_clients)"
}

dht_clients() { sed -n 's/^[^ ]* IP6\{0,1\} \(.*\)\.[0-9]* > .*/\1/p' "$T/dht-seen.log" | only; }

# truth: connect() fails as it would have failed directly. curl prints its errno.
truth() {
	local url want said
	step "the truth about failures"
	for url in "http://$web_addr:81/|Connection refused" "http://203.0.113.250/|No route to host"; do
		want=${url#*|} url=${url%|*}
		said=$(in_ns "$app" timeout $((30 * patience)) "$VIASOCKS" run "${run_args[@]}" -- curl -sSv --max-time $((20 * patience)) "$url" 2>&1 || true)
		said=$(sed -n 's/^\* \(.* failed: .*\)/\1/p' <<<"$said" | tail -n 1)
		say "app# viasocks run … -- curl $url"
		say "$said"
		[[ $said == *"$want" ]] || wrong "curl $url: expected \"$want\", got: ${said:-nothing}"
	done
}

verdict() {
	local all seen line
	sleep 0.5
	within 10 agree "$control_seen" || true
	all=$(leaked) seen=$(($(witnessed) - control_seen))
	step "result"
	printf '%-26s %10s %7s %8s  %-4s %-21s %6s\n' case bytes seconds MB/s hash 'seen by server as' leaked
	for line in "${rows[@]}"; do say "$line"; done
	say ""
	say "packets from app to the SOCKS port: $(counted socks_tcp); to its UDP relays: $(counted socks_udp); ICMP errors to the relays: $(counted relay_icmp); ARP and ND: $(counted neighbour)"
	say "packets from app to anything else: $all (tcpdump: $seen); positive control without viasocks: $control"
	(($(counted socks_tcp) > 0 && $(counted socks_udp) > 0)) || wrong "not by the proxy: no packet went to its SOCKS port, or none to its UDP relays"
	((all == 0 && seen == 0)) || {
		wrong "leaked packets: $all counted, $seen seen"
		tail -n "$((seen < 20 ? seen : 20))" "$T/tcpdump.log"
	}
	if grep -qF "$app_addr:" "$T"/*.peers; then wrong "the tracker was told app's own address"; fi
	[[ ${#rows[@]} -eq 6 ]] || wrong "${#rows[@]} of 6 cases ran"
	say "$SECONDS s in all"
	if [[ ${#failures[@]} -gt 0 ]]; then
		say ""
		say "demo: FAILED:"
		printf '  %s\n' "${failures[@]}"
		exit 1
	fi
	say "demo: passed"
}

main() {
	local tool
	[[ $EUID -eq 0 ]] || die "cannot make namespaces: not root; try: sudo make demo"
	[[ -x $VIASOCKS ]] || die "cannot find $VIASOCKS; try: make build"
	for tool in ip nft tcpdump aria2c danted nginx vsftpd sshd opentracker mktorrent dnsmasq curl perl ss unshare; do
		command -v "$tool" >/dev/null || die "cannot find $tool; try: scripts/deps.sh demo"
	done
	trap clean_up EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	T=$(mktemp -d "${TMPDIR:-/tmp}/viasocks-demo.$$.XXXXXX")
	chmod 711 "$T" # the servers drop root, and must reach their files
	clear_stale

	step "files, namespaces and servers"
	make_files
	"$here/lab.sh" up >"$T/lab.log" 2>&1 || { cat "$T/lab.log" >&2; die "cannot make the namespaces"; }
	make_users
	start_dns
	start_web
	start_ftp
	start_sftp
	start_tracker
	start_seeders
	start_proxy
	start_recorder
	say "proxy: dante-server at $proxy_url; world: nginx, vsftpd, openssh, opentracker, dnsmasq, two aria2 seeders; ready after $SECONDS s"

	positive_control
	await "the seeders' announcing" 30 seeders_announced
	case_http
	case_ftp
	case_sftp
	case_tracker http-tracker "HTTP tracker" --enable-dht=false
	# aria2 asks UDP trackers from its DHT socket: without DHT it does not ask them at all. Here it gets no way into it.
	case_tracker udp-tracker "UDP tracker" --enable-dht=true --dht-file-path="$T/got/udp-tracker.dht"
	case_dht
	truth
	verdict
}

main "$@"
