# shellcheck shell=bash
# demo-servers.sh: what demo.sh downloads, and the proxy and the servers of its world. Sourced by demo.sh, whose variables and
# helpers (start, await, listening, in_ns, die) it uses.
# shellcheck disable=SC2154,SC2034,SC2086 # the variables are demo.sh's, and none holds a blank

# --- what is downloaded -------------------------------------------------------------------------------------------

# payload FILE MIB [PERCENT] makes a file that can't be compressed or mistaken, and notes its sha256 and size.
declare -A sum size
payload() {
	local mib=$(($2 * ${3:-100} / 100))
	((mib > 0)) || mib=1
	head -c $((mib << 20)) /dev/urandom >"$T/files/$1"
	size[$1]=$((mib << 20))
	sum[$1]=$(sha256sum <"$T/files/$1")
	sum[$1]=${sum[$1]%% *}
}

declare -A hash # name of a torrent: its info hash
torrent() {
	local name=$1
	shift
	mktorrent -l 20 "$@" -o "$T/$name.torrent" "$T/files/$name" >"$T/mktorrent.log" 2>&1 || die "cannot make the torrent $name: $(tail -n 1 "$T/mktorrent.log")"
	hash[$name]=$(aria2c --no-conf -S "$T/$name.torrent" | sed -n 's/^Info Hash: //p')
	[[ ${hash[$name]} =~ ^[0-9a-f]{40}$ ]] || die "cannot make the torrent $name: no info hash"
}

make_files() {
	mkdir -p "$T/files" "$T/got"
	payload http.bin 256
	local file
	for file in ftp sftp http-tracker udp-tracker dht; do payload $file.bin 64 "${DEMO_SCALE:-100}"; done
	# By name, so that the tracker's name is looked up through the proxy too.
	torrent http-tracker.bin -a http://tracker.demo.test:6969/announce
	torrent udp-tracker.bin -a udp://tracker.demo.test:6969/announce
	torrent dht.bin
	chmod -R a+rX "$T/files"
}

# --- the proxy ----------------------------------------------------------------------------------------------------

start_proxy() {
	cat >"$T/danted.conf" <<-END
		logoutput: $T/danted.out
		internal: $proxy_in port = 1080
		external: to-world
		clientmethod: none
		socksmethod: none
		user.privileged: root
		user.unprivileged: nobody
		# A DHT node hears from endpoints that it never wrote to: the relay must not connect its socket to the first one.
		udp.connectdst: no
		client pass { from: 0/0 to: 0/0 }
		# dante ends its lists of words at the end of a line.
		socks pass {
			from: 0/0 to: 0/0
			command: connect
			log: error connect
		}
		socks pass {
			from: 0/0 to: 0/0
			command: udpassociate
			udp.portrange: $relay_ports
			log: error
		}
		socks pass {
			from: 0/0 to: 0/0
			command: udpreply
			log: error
		}
	END
	# It resolves the names itself, by a resolver of the world, which stands in a resolv.conf of its own.
	echo "nameserver $dns_addr" >"$T/resolv.conf"
	# shellcheck disable=SC2016 # expanded by the inner shell
	start danted "$proxy" unshare --mount --propagation private bash -ec '
		mount --bind "$0/resolv.conf" "$(readlink -f /etc/resolv.conf)"
		exec danted -f "$0/danted.conf" -p "$0/danted.pid"' "$T"
	await "dante-server" 10 listening "$proxy" t $proxy_in 1080
}

# --- the world ----------------------------------------------------------------------------------------------------

start_dns() {
	start dnsmasq "$world" dnsmasq --keep-in-foreground --log-facility=- --conf-file=/dev/null --no-resolv --no-hosts \
		--pid-file= --user=nobody --bind-interfaces --listen-address=$dns_addr --log-queries \
		--host-record="web.demo.test,$web_addr,2001:db8:113::80" --host-record="ftp.demo.test,$ftp_addr" \
		--host-record="sftp.demo.test,$sftp_addr" --host-record="tracker.demo.test,$tracker_addr" \
		--host-record="node.demo.test,${seeder_addrs[0]}"
	await "dnsmasq" 10 listening "$world" t $dns_addr 53
}

start_web() {
	mkdir -p "$T/nginx"
	cat >"$T/nginx.conf" <<-END
		daemon off;
		user nobody nogroup;
		worker_processes 1;
		pid $T/nginx/pid;
		error_log stderr warn;
		events { worker_connections 256; }
		http {
			log_format demo '\$remote_addr \$connection \$status \$body_bytes_sent';
			access_log $T/nginx/access.log demo;
			client_body_temp_path $T/nginx/body;
			proxy_temp_path $T/nginx/proxy;
			fastcgi_temp_path $T/nginx/fastcgi;
			uwsgi_temp_path $T/nginx/uwsgi;
			scgi_temp_path $T/nginx/scgi;
			sendfile on;
			server {
				listen $web_addr:80;
				listen [2001:db8:113::80]:80;
				root $T/files;
			}
		}
	END
	start nginx "$world" nginx -e stderr -c "$T/nginx.conf"
	await "nginx" 10 listening "$world" t $web_addr 80
}

# make_users writes the users of the FTP and SFTP servers: with_users runs a program in a mount namespace in which these files
# are the host's passwd and shadow, so that neither the host's users nor its passwords are touched or needed.
make_users() {
	local salt
	sftp_password=$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
	salt=$(od -An -N6 -tx1 /dev/urandom | tr -d ' \n')
	{
		echo "root:x:0:0:root:/:/usr/sbin/nologin"
		echo "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin"
		echo "sshd:x:61233:65534::/run/sshd:/usr/sbin/nologin"
		echo "demo:x:61234:65534::$T/files:/bin/sh"
	} >"$T/passwd"
	(
		umask 077
		# shellcheck disable=SC2016 # the dollars are perl's
		printf 'root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\ndemo:%s:19000:0:99999:7:::\n' \
			"$(PW=$sftp_password SALT=$salt perl -e 'print crypt($ENV{PW}, "\$6\$$ENV{SALT}\$")')" >"$T/shadow"
	)
	# shellcheck disable=SC2016 # expanded by the inner shell, which has its own mounts
	with_users=(unshare --mount --propagation private bash -ec '
		mount --bind "$0/passwd" /etc/passwd
		mount --bind "$0/shadow" /etc/shadow
		mount -t tmpfs -o mode=755 tmpfs /run
		mkdir -m 755 /run/sshd
		exec "$@"' "$T")
}

start_ftp() {
	mkdir -p "$T/empty"
	cat >"$T/vsftpd.conf" <<-END
		listen=YES
		listen_ipv6=NO
		listen_address=$ftp_addr
		background=NO
		anonymous_enable=YES
		local_enable=NO
		ftp_username=demo
		nopriv_user=nobody
		anon_root=$T/files
		no_anon_password=YES
		secure_chroot_dir=$T/empty
		seccomp_sandbox=NO
		xferlog_enable=YES
		vsftpd_log_file=$T/vsftpd.out
	END
	start vsftpd "$world" "${with_users[@]}" vsftpd "$T/vsftpd.conf"
	await "vsftpd" 10 listening "$world" t $ftp_addr 21
}

start_sftp() {
	# RSA: libssh2 of Debian 12 is built on libgcrypt and reads no other key that a new server still has.
	ssh-keygen -q -t rsa -b 2048 -N '' -f "$T/hostkey"
	sftp_key_sha1=$(awk '{print $2}' "$T/hostkey.pub" | base64 -d | sha1sum)
	sftp_key_sha1=${sftp_key_sha1%% *}
	cat >"$T/sshd_config" <<-END
		ListenAddress $sftp_addr
		HostKey $T/hostkey
		PidFile none
		UsePAM no
		AllowUsers demo
		PasswordAuthentication yes
		Subsystem sftp internal-sftp
		ForceCommand internal-sftp
		HostKeyAlgorithms rsa-sha2-512,rsa-sha2-256,ssh-rsa
	END
	start sshd "$world" "${with_users[@]}" /usr/sbin/sshd -D -e -f "$T/sshd_config"
	await "sshd" 10 listening "$world" t $sftp_addr 22
}

start_tracker() {
	# Debian's opentracker serves only what its whitelist names, and answers rightly only from an exact address.
	mkdir -p "$T/tracker"
	printf '%s\n' "${hash[http-tracker.bin]}" "${hash[udp-tracker.bin]}" >"$T/tracker/whitelist"
	cat >"$T/opentracker.conf" <<-END
		listen.tcp_udp $tracker_addr:6969
		access.whitelist /whitelist
		tracker.rootdir $T/tracker
		tracker.user nobody
	END
	chmod -R a+rX "$T/tracker"
	start opentracker "$world" opentracker -f "$T/opentracker.conf"
	await "opentracker" 10 listening "$world" t $tracker_addr 6969
}

# start_seeders runs aria2 twice as a seeder and DHT node; each enters the DHT by the other.
start_seeders() {
	local i addr other
	for i in 0 1; do
		addr=${seeder_addrs[i]} other=${seeder_addrs[1 - i]}
		mkdir -p "$T/seeder$i"
		# In a closed network a node must be told its address (--bt-external-ip), or it never announces itself; and
		# unverified seeding must be asked for three times over, or aria2 hashes everything first.
		start "seeder$i" "$world" aria2c --no-conf --dir="$T/files" --interface="$addr" --bt-external-ip="$addr" \
			--async-dns-server=$dns_addr --disable-ipv6=true --listen-port=$seeder_port --enable-dht=true \
			--dht-listen-port=$seeder_port --dht-listen-addr="$addr" --dht-entry-point="$other:$seeder_port" \
			--dht-file-path="$T/seeder$i/dht.dat" --check-integrity=true --bt-hash-check-seed=true \
			--bt-seed-unverified=true --seed-ratio=0 --seed-time=60 --max-concurrent-downloads=9 \
			--bt-tracker-interval=10 --file-allocation=none --show-console-readout=false --summary-interval=0 \
			"$T/http-tracker.bin.torrent" "$T/udp-tracker.bin.torrent" "$T/dht.bin.torrent"
	done
	# Who writes to the seeders' DHT nodes: aria2 tells it only among all else, at 70 MB of log a minute.
	start dht-seen "$world" tcpdump -i to-proxy -Q in -n -l --immediate-mode "udp dst port $seeder_port"
	for addr in "${seeder_addrs[@]}"; do
		await "the seeder at $addr" 20 listening "$world" t "$addr" $seeder_port
		await "the DHT node at $addr" 20 listening "$world" u "$addr" $seeder_port
	done
}

# tracker_peers NAME prints what the tracker holds as the peers of a torrent, but the demo's own asking.
tracker_peers() {
	local escaped
	# shellcheck disable=SC2001 # a pattern with & is sed's
	escaped=$(sed 's/../%&/g' <<<"${hash[$1]}")
	in_ns "$world" curl -sf --max-time 2 --interface $poll_addr \
		"http://$tracker_addr:6969/announce?info_hash=$escaped&peer_id=-DEMO00-000000000000&port=9&uploaded=0&downloaded=0&left=1&compact=1&numwant=100" |
		perl -0777 -ne 'if (/5:peers(\d+):/s) { my $p = substr($_, $+[0], $1);
			while ($p =~ /(.{4})(.{2})/gs) { print join(".", unpack("C4", $1)), ":", unpack("n", $2), "\n" } }' |
		grep -v "^$poll_addr:" | sort -u
}

seeders_announced() {
	local name peers addr
	for name in http-tracker.bin udp-tracker.bin; do
		peers=$(tracker_peers $name)
		for addr in "${seeder_addrs[@]}"; do grep -qF "$addr:" <<<"$peers" || return 1; done
	done
}
