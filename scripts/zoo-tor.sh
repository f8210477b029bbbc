# shellcheck shell=bash
# zoo-tor.sh: tests viasocks in front of a real Tor, in a Tor network of its own. zoo.sh sources it, and it uses the variables
# and helpers of zoo.sh.
# shellcheck disable=SC2154,SC2086 # the variables are those of zoo.sh, and have no spaces
#
# The network is one of tests (TestingTorNetwork): three directory authorities that are relays too, an exit, an onion service, and
# the client whose SocksPort viasocks uses. They all run in the proxy's namespace, and talk on 127.0.0.1. The exit asks the
# resolver of the far end, where far.example has an address that the client's namespace cannot look up. The service leads to the
# web server of the far end.

tor_dir=
tor_wait=240 # s for the consensus, the first circuit, and the service's descriptor

# tor_key NAME makes the keys of a relay and appends its DirAuthority line.
tor_key() {
	local dir=$tor_dir/$1 fingerprint v3
	fingerprint=$(tor --quiet --ignore-missing-torrc -f "$dir/none" --DataDirectory "$dir" --ORPort 1 --list-fingerprint 2>/dev/null |
		sed -n 's/^[^ ]* //; s/ //g; $p')
	v3=$(sed -n 's/^fingerprint //p' "$dir/keys/authority_certificate")
	[[ ${#fingerprint} -eq 40 && ${#v3} -eq 40 ]] || return 1
	echo "DirAuthority $1 orport=$2 no-v2 v3ident=$v3 127.0.0.1:$3 $fingerprint" >>"$tor_dir/authorities"
}

# tor_config NAME writes what all have, with its own lines from standard input.
tor_config() {
	{
		cat <<-END
			TestingTorNetwork 1
			DataDirectory $tor_dir/$1
			Nickname $1
			Log notice file $tor_dir/$1/log
			ShutdownWaitLength 0
			AssumeReachable 1
			Address 127.0.0.1
			PathsNeededToBuildCircuits 0.25
			# Four relays are too few for its second layer of guards.
			VanguardsLiteEnabled 0
			TestingV3AuthInitialVotingInterval 20
			TestingV3AuthInitialVoteDelay 4
			TestingV3AuthInitialDistDelay 4
			V3AuthVotingInterval 20
			V3AuthVoteDelay 4
			V3AuthDistDelay 4
			TestingDirAuthVoteExit *
			TestingDirAuthVoteHSDir *
			TestingDirAuthVoteGuard *
			TestingDirAuthVoteGuardIsStrict 0
			TestingMinExitFlagThreshold 0
		END
		cat "$tor_dir/authorities" -
	} >"$tor_dir/$1/torrc"
}

# tor_network starts them all.
tor_network() {
	local n
	tor_dir=$T/tor
	mkdir -p "$tor_dir"
	: >"$tor_dir/authorities"
	for n in 1 2 3; do
		mkdir -p "$tor_dir/auth$n/keys"
		(cd "$tor_dir/auth$n/keys" && echo zoo | tor-gencert --create-identity-key -m 12 -a 127.0.0.1:700$n --passphrase-fd 0) \
			>"$T/build.log" 2>&1 || die "cannot make the keys of a Tor authority: $(tail -n 1 "$T/build.log")"
		tor_key auth$n 500$n 700$n || die "cannot make the keys of a Tor relay"
	done
	mkdir -p "$tor_dir/exit" "$tor_dir/service/onion" "$tor_dir/client"
	chmod -R go= "$tor_dir"
	for n in 1 2 3; do
		tor_config auth$n <<-END
			ORPort 127.0.0.1:500$n
			DirPort 127.0.0.1:700$n
			AuthoritativeDirectory 1
			V3AuthoritativeDirectory 1
			ContactInfo zoo
			ExitRelay 0
			ExitPolicy reject *:*
			SocksPort 0
		END
	done
	tor_config exit <<-END
		ORPort 127.0.0.1:5004
		ExitRelay 1
		ExitPolicy accept *:*
		ExitPolicyRejectPrivate 0
		ServerDNSResolvConfFile $T/resolv.conf
		ServerDNSDetectHijacking 0
		ServerDNSTestAddresses far.example
		SocksPort 0
	END
	tor_config service <<-END
		SocksPort 0
		HiddenServiceDir $tor_dir/service/onion
		HiddenServicePort 80 $far_1:7080
	END
	tor_config client <<-END
		SocksPort $at IsolateSOCKSAuth ExtendedErrors
		ClientRejectInternalAddresses 0
		ControlPort 127.0.0.1:9051
	END
	for n in auth1 auth2 auth3 exit service client; do run tor --quiet -f "$tor_dir/$n/torrc"; done
	for ((n = 0; n < tor_wait; n++)); do
		grep -qs "Bootstrapped 100%" "$tor_dir/client/log" && return 0
		sleep 1
	done
	tail -n 5 "$tor_dir"/*/log >&2
	return 1
}

# tor_control COMMAND asks the client.
tor_control() {
	printf 'AUTHENTICATE\r\n%s\r\nQUIT\r\n' "$1" | ip netns exec "$proxy" timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/9051; cat >&3; cat <&3'
}

# through_tor OPTIONS COMMAND...: OPTIONS stand behind the question mark of the URL.
through_tor() {
	nsenter --net="/run/netns/$client" "$T/viasocks" run --log-level error --proxy "socks5://$at?$1" \
		--dns "fake,tcp://$far_1" -- "${@:2}"
}

# tor_check WHAT WANT GOT prints a line, and counts what is not as it should be.
tor_check() {
	local verdict=ok
	[[ $2 == "$3" ]] || { verdict="BROKEN: $3, not $2"; tor_broken=$((tor_broken + 1)); }
	printf '%-60s %s\n' "$1" "$verdict"
}

# tor_tour is the whole of it.
tor_tour() {
	local n onion sum began
	tor_broken=0
	command -v tor tor-gencert >/dev/null || { echo "zoo: Tor: skipped: tor is not installed: scripts/deps.sh zoo" >&2; return; }
	[[ -x $T/viasocks ]] || go build -o "$T/viasocks" ./cmd/viasocks
	if [[ ! -e $T/www/small ]]; then
		mkdir -p "$T/www"
		head -c 65536 /dev/urandom >"$T/www/small"
		ip netns exec "$far" "$T/zoo" serve $far_1:7080 "$T/www" >"$T/www.log" 2>&1 &
		ends+=($!)
	fi
	sum=$(sha256sum <"$T/www/small")
	began=$SECONDS
	tor_network || die "the Tor network did not come up within $tor_wait s"
	echo "$(deb tor tor), a network of its own: up after $((SECONDS - began)) s"
	onion=$(cat "$tor_dir/service/onion/hostname")

	# The first circuits, and the descriptor of the service, come some time after the consensus.
	for n in far.example:7080 "$onion"; do
		local until=$((SECONDS + tor_wait / 2))
		while [[ $(through_tor tor curl -s --max-time 20 "http://$n/small" | sha256sum) != "$sum" ]] && ((SECONDS < until)); do
			sleep 3
		done
	done
	tor_check "a name that the exit resolves" "$sum" \
		"$(through_tor tor curl -s --max-time 60 http://far.example:7080/small | sha256sum)"
	tor_check "a name that does not exist: curl's exit code" 7 \
		"$(through_tor tor bash -c 'curl -s --max-time 60 http://none.example:7080/small; echo $?')"
	tor_check "an onion service" "$sum" "$(through_tor tor curl -s --max-time 60 "http://$onion/small" | sha256sum)"
	tor_check "an onion service that does not exist: what the program is told" "No route to host" \
		"$(through_tor tor bash -c "exec 3<>/dev/tcp/aaaaaa${onion:6}/80" 2>&1 | grep -o 'No route to host' | head -n 1)"
	tor_check "RESOLVE" "$far_1" "$(ip netns exec "$client" "$T/zoo" resolve "socks5://$at?tor" far.example)"
	# Two programs at once, one a copy of the other, and the circuits that their streams are on.
	cp "$(command -v bash)" "$T/other"
	through_tor "tor&isolate=program" bash -c \
		"exec 3<>/dev/tcp/far.example/7080; '$T/other' -c 'exec 3<>/dev/tcp/far.example/7080; sleep 6; :'; :" &
	sleep 4
	n=$(tor_control "GETINFO stream-status" | grep -o 'SUCCEEDED [0-9]*' | sort -u | wc -l)
	wait $!
	tor_check "isolate=program: two programs use two circuits" 2 "$n"
	stop_servers
	echo "zoo: $tor_broken of Tor's cases broken"
	((tor_broken == 0))
}
