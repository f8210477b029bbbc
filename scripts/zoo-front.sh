# shellcheck shell=bash
# zoo-front.sh: viasocks in front of the servers of the zoo, which fail while programs work through it. Sourced by zoo.sh, whose
# variables and helpers it uses.
# shellcheck disable=SC2154,SC2034,SC2086 # the variables are those of zoo.sh, and have no spaces; it uses those of here
#
# The server that fails is the one of zoo.sh. Another of the same kind works in a namespace of its own, on 10.0.1.1, and two
# viasocks run beside each other: one has both servers as a group, one has only the server that fails. Through each of them go
# a download four times a second, whose hash is checked, and ten datagrams a second to the far end; through the group also an
# aria2, which has to end with the right hash.

front_servers=(dante microsocks openssh ss-local sing-box xray go-socks5 tailscale socksv5)
front_events=(killed stopped cut)
front_bound=20000 # ms for the failover, and for the recovery
front_down=3      # s: a server is away for so long at least
front_file=$front_dir/results.txt
spare=zoo-spare-$$ spare_in=10.0.1.1 pids=()

now() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# front_world adds the other server's namespace, and the web server of the far end.
front_world() {
	ip netns add "$spare"
	ip -n "$spare" link set lo up
	link "$client" eth1 "$spare" eth0
	link "$spare" eth1 "$far" eth1
	address "$client" eth1 10.0.1.2/24
	address "$spare" eth0 $spare_in/24
	address "$spare" eth1 10.0.2.1/24
	address "$far" eth1 10.0.2.2/24
	ip -n "$spare" route add 198.51.100.0/24 via 10.0.2.2
	ip netns exec "$spare" sysctl -qw net.ipv4.tcp_syn_retries=3
	mkdir -p "$T/www" "$T/spare"
	cp "$T/resolv.conf" "$T/hosts" "$T/spare"
	head -c 65536 /dev/urandom >"$T/www/small"
	head -c 4000000 /dev/urandom >"$T/www/large"
	small_sum=$(sha256sum <"$T/www/small") large_sum=$(sha256sum <"$T/www/large")
	ip netns exec "$far" "$T/zoo" serve $far_1:7080 "$T/www" >"$T/www.log" 2>&1 &
	ends+=($!)
}

# start_spare NAME starts a server of the kind in the other namespace: its start_ function sees other variables.
start_spare() {
	local proxy=$spare proxy_in=$spare_in at=$spare_in:1080 T=$T/spare
	start_"$1" && await 1080
}

# download FILE gets the small file once and adds a line: when it was asked for, when it ended, and how.
download() {
	local asked sum
	asked=$(now)
	sum=$(curl -s --max-time 10 http://$far_1:7080/small | sha256sum) || true
	if [[ $sum == "$small_sum" ]]; then sum=ok; else sum=failed; fi
	echo "$asked $(now) $sum" >>"$1"
}

# load KIND runs inside viasocks until $T/stop exists.
load() {
	local n=0 echo
	"$T/zoo" echo 600 100ms >"$T/$1.udp" 2>&1 &
	echo=$!
	while [[ ! -e $T/stop ]] && ((n++ < 240)); do
		download "$T/$1.tcp" &
		sleep 0.25
	done
	kill "$echo" 2>/dev/null || true
	wait
}

# front_run KIND OPTION... starts a viasocks with a load.
front_run() {
	local kind=$1
	: >"$T/$kind.tcp"
	: >"$T/$kind.udp"
	# A shell of its own, since viasocks starts a program and not a function.
	nsenter --net="/run/netns/$client" "$T/viasocks" run --log-file "$front_dir/$kind.log" "${@:2}" -- \
		bash -c "$(declare -f now download load); T=$T far_1=$far_1 small_sum='$small_sum'; load $kind" >"$T/$kind.out" 2>&1 &
	pids+=($!)
}

# first_ok FILE TIME: ms from TIME to the first download that was asked for later and ended well; nothing: there was none yet.
first_ok() { awk -v t="$2" '$1 >= t && $3 == "ok" && (!m || $2 < m) { m = $2 } END { if (m) print m - t }' "$1"; }
# first_end FILE TIME: the same for one that ended later, whenever it was asked for.
first_end() { awk -v t="$2" '$2 >= t && $3 == "ok" && (!m || $2 < m) { m = $2 } END { if (m) print m - t }' "$1"; }
# first_echo FILE TIME: the same for datagrams asked later.
first_echo() { awk -v t="$2" 'NF == 2 && $1 >= t && (!m || $2 < m) { m = $2 } END { if (m) print m - t }' "$1"; }

# wait_for MS COMMAND... prints what it printed as soon as that is something, or "-" after MS.
wait_for() {
	local until=$(($(now) + $1)) got
	while got=$("${@:2}"); [[ -z $got ]]; do
		(($(now) < until)) || { echo -; return; }
		sleep 0.1
	done
	echo "$got"
}

# befall EVENT: what is done to the server; mend EVENT NAME takes it back.
befall() {
	local all
	mapfile -t all < <(ip netns pids "$proxy")
	case $1 in
	killed)
		# The shell would tell of each of its children that was killed.
		{ kill -9 "${all[@]}"; wait "${all[@]}"; } 2>/dev/null || true
		mapfile -t servers < <(comm -23 <(printf '%s\n' "${servers[@]}" | sort) <(printf '%s\n' "${all[@]}" | sort))
		;;
	stopped) kill -STOP "${all[@]}" ;;
	cut) ip netns exec "$proxy" nft 'table inet zoo { chain input { type filter hook input priority 0; iifname eth0 drop; }; }' ;;
	esac
}
mend() {
	local all
	case $1 in
	killed)
		start_"$2"
		await 1080 || true
		;;
	stopped)
		mapfile -t all < <(ip netns pids "$proxy")
		kill -CONT "${all[@]}"
		;;
	cut) ip netns exec "$proxy" nft delete table inet zoo ;;
	esac
}

failed_since() { awk -v t="$2" '$1 >= t && $3 == "failed"' "$1" | wc -l; }

# front_event NAME EVENT prints one line of results and counts broken bounds.
front_event() {
	local name=$1 event=$2 gone back over back_tcp over_udp=none back_udp=none aria=ok verdict=ok udp=
	local timeouts=(--connect-timeout 2s --handshake-timeout 3s)
	rm -rf "$T/stop" "$T/aria"
	pids=()
	front_run group "${timeouts[@]}" --rule 'via g' \
		--upstream "g=socks5://$at,socks5://$spare_in:1080 connect-timeout=2s handshake-timeout=3s retry-after=1s"
	front_run single "${timeouts[@]}" --proxy "socks5://$at"
	nsenter --net="/run/netns/$client" "$T/viasocks" run "${timeouts[@]}" --rule 'via g' --log-level error \
		--upstream "g=socks5://$at,socks5://$spare_in:1080 connect-timeout=2s handshake-timeout=3s retry-after=1s" -- \
		timeout 60 aria2c -q --no-conf --max-tries=0 --retry-wait=1 --timeout=3 --connect-timeout=10 --max-download-limit=800K \
		--checksum="sha-256=${large_sum%% *}" -d "$T/aria" http://$far_1:7080/large >"$T/aria.out" 2>&1 &
	local aria_pid=$!
	wait_for $front_bound first_ok "$T/group.tcp" 0 >/dev/null
	wait_for $front_bound first_ok "$T/single.tcp" 0 >/dev/null
	udp=$(wait_for 1500 first_echo "$T/single.udp" 0)

	befall "$event"
	gone=$(now)
	over=$(wait_for $front_bound first_ok "$T/group.tcp" "$gone")
	[[ $udp == - ]] || over_udp=$(wait_for $((front_bound + gone - $(now))) first_echo "$T/group.udp" "$gone")
	sleep $front_down
	back=$(now)
	mend "$event" "$name"
	back_tcp=$(wait_for $front_bound first_end "$T/single.tcp" "$back")
	[[ $udp == - ]] || back_udp=$(wait_for $((front_bound + back - $(now))) first_echo "$T/single.udp" "$back")
	wait "$aria_pid" || aria=failed
	touch "$T/stop"
	wait "${pids[@]}" || true

	if [[ " $over $back_tcp $over_udp $back_udp $aria " == *" - "* || $aria == failed ]]; then
		verdict=BROKEN
		front_broken=$((front_broken + 1))
		cp "$T/aria.out" "$front_dir/$name-$event.aria"
		for kind in group single; do cp "$front_dir/$kind.log" "$front_dir/$name-$event-$kind.log"; done
	fi
	rm -f "$front_dir"/{group,single}.log
	printf '%-11s %-8s %9s %9s %9s %9s %9s %9s  %-6s %s\n' "$name" "$event" "$(failed_since "$T/group.tcp" "$gone")" "$over" \
		"$over_udp" "$(failed_since "$T/single.tcp" "$gone")" "$back_tcp" "$back_udp" "$aria" "$verdict" | tee -a "$front_file"
}

# front NAME lets one server fail in each way.
front() {
	local name=$1 version event
	if ! version=$(get_"$name" 2>"$T/why"); then
		echo "zoo: $name: skipped: $(tail -n 1 "$T/why")" >&2
		return
	fi
	: >"$T/server.log"
	: >"$T/spare/server.log"
	if start_spare "$name" && start_"$name" && await 1080; then
		for event in "${front_events[@]}"; do front_event "$name" "$event"; done
	else
		echo "zoo: $name $version does not start: $(tail -n 5 "$T/server.log")" >&2
		front_broken=$((front_broken + 1))
	fi
	stop_servers
}

# poison is the sing-box row: a server that closes the association whenever one datagram cannot be sent. 300 echoes in 60 s.
poison() {
	local version line
	version=$(get_sing-box 2>"$T/why") || { echo "zoo: sing-box: skipped: $(tail -n 1 "$T/why")" >&2; return; }
	: >"$T/server.log"
	start_sing-box && await 1080
	line=$(nsenter --net="/run/netns/$client" "$T/viasocks" run --proxy "socks5://$at" -- \
		"$T/zoo" echo 300 200ms 192.0.2.3:7000 3s | tail -n 1)
	stop_servers
	echo "sing-box $version: $line (bound: 280)" | tee -a "$front_file"
	((${line%% *} >= 280)) || front_broken=$((front_broken + 1))
}

# front_tour NAME... is the whole of it. It fails when a bound is broken.
front_tour() {
	local name
	front_broken=0
	mkdir -p "$front_dir"
	go build -o "$T/viasocks" ./cmd/viasocks
	front_world
	{
		echo "viasocks $("$T/viasocks" version | head -n 1), $(date -u +%F): downloads that failed, and ms to the first that went well"
		echo "                     ---- group of two servers ---- ------ one server ---------"
		printf '%-11s %-8s %9s %9s %9s %9s %9s %9s  %-6s %s\n' server event failed failover "by UDP" failed recovery "by UDP" aria2 ""
	} | tee "$front_file"
	for name; do front "$name"; done
	[[ " $* " != *" sing-box "* ]] || poison
	echo "zoo: $front_broken bounds broken; the lines are in $front_file"
	((front_broken == 0))
}
