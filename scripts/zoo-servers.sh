# shellcheck shell=bash
# zoo-servers.sh: how each server of the zoo is had and started. Sourced by zoo.sh, whose variables and helpers (run, go_server,
# deb_version, lacks) it uses.
# shellcheck disable=SC2154,SC2034,SC2086 # the variables are those of zoo.sh, and have no spaces; it uses those of here
#
# get_NAME sees to the program, prints its version, and fails with a reason if it cannot be had. start_NAME starts it in the
# proxy's namespace, on $at (203.0.113.1:1080). A server that has a far half of its own has that on 127.0.0.1.

zoo=(dante microsocks openssh plink asyncssh ss-local v2ray trojan stunnel sing-box xray go-socks5 tailscale
	socksv5 pond simple-socks)

# deb PACKAGE PROGRAM prints the version of an installed Debian package.
deb() {
	command -v "$2" >/dev/null || lacks "$2 is not installed: scripts/deps.sh zoo"
	dpkg-query -W -f '${Version}' "$1"
}

# --- Debian ---------------------------------------------------------------------------------------------------------

get_dante() { deb dante-server danted; }
start_dante() {
	cat >"$T/danted.conf" <<-END
		logoutput: stderr
		internal: $proxy_in port = 1080
		external: eth1
		clientmethod: none
		socksmethod: none
		user.privileged: root
		user.unprivileged: nobody
		udp.connectdst: no
		client pass { from: 0/0 to: 0/0 }
		# As in Debian's example. Without the word error here, dante turns RST into FIN.
		socks pass { from: 0/0 to: 0/0 log: error }
	END
	run danted -f "$T/danted.conf" -p "$T/danted.pid"
}

get_microsocks() { deb microsocks microsocks; }
start_microsocks() { run microsocks -i $proxy_in -p 1080; }

# ssh_far starts the sshd that ssh, plink and asyncssh use: it makes the connections.
ssh_far() {
	mkdir -p /run/sshd
	[[ -e $T/key ]] || {
		ssh-keygen -q -t ed25519 -N '' -f "$T/host_key"
		ssh-keygen -q -t ed25519 -N '' -f "$T/key"
	}
	run /usr/sbin/sshd -D -e -f /dev/null -h "$T/host_key" -p 2222 -o ListenAddress=127.0.0.1 -o UsePAM=no -o PidFile=none \
		-o StrictModes=no -o AuthorizedKeysFile="$T/key.pub" -o PermitRootLogin=yes
	await 2222
}

get_openssh() { deb openssh-client ssh; }
start_openssh() {
	ssh_far
	run ssh -F /dev/null -N -D $at -p 2222 -i "$T/key" -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=no \
		-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR root@127.0.0.1
}

get_plink() { deb putty-tools plink; }
start_plink() {
	ssh_far
	[[ -e $T/key.ppk ]] || puttygen "$T/key" -o "$T/key.ppk" -O private
	local hostkey
	hostkey=$(ssh-keygen -l -f "$T/host_key.pub" | cut -d' ' -f2)
	# It takes connections from other hosts only if its settings say so; there is no option for it.
	mkdir -p "$T/putty/sessions"
	printf '%s\n' Protocol=ssh LocalPortAcceptAll=1 PortForwardings=4D$at= >"$T/putty/sessions/zoo"
	run env PUTTYDIR="$T/putty" plink -load zoo -ssh -N -batch -P 2222 -i "$T/key.ppk" -hostkey "$hostkey" root@127.0.0.1
}

get_asyncssh() {
	/usr/bin/python3 -c 'import asyncssh' 2>/dev/null || lacks "python3-asyncssh is not installed: scripts/deps.sh zoo"
	dpkg-query -W -f '${Version}' python3-asyncssh
}
start_asyncssh() {
	ssh_far
	cat >"$T/forward.py" <<-'END'
		import asyncio, sys, asyncssh
		async def main():
		    async with asyncssh.connect("127.0.0.1", 2222, username="root", client_keys=[sys.argv[1]], known_hosts=None,
		                                config=None) as c:
		        await (await c.forward_socks(sys.argv[2], 1080)).wait_closed()
		asyncio.run(main())
	END
	run /usr/bin/python3 "$T/forward.py" "$T/key" $proxy_in
}

get_ss-local() { deb shadowsocks-libev ss-local; }
start_ss-local() {
	run ss-server -u -s 127.0.0.1 -p 8388 -k zoo -m aes-256-gcm
	await 8388
	run ss-local -u -s 127.0.0.1 -p 8388 -k zoo -m aes-256-gcm -b $proxy_in -l 1080
}

# ray_conf: v2ray and xray share the form of their configuration.
ray_conf() {
	cat >"$T/ray.json" <<-END
		{"log": {"loglevel": "warning"},
		 "inbounds": [{"listen": "$proxy_in", "port": 1080, "protocol": "socks",
			"settings": {"auth": "noauth", "udp": true, "ip": "$proxy_in"}}],
		 "outbounds": [{"protocol": "freedom"}]}
	END
}

get_v2ray() { deb v2ray v2ray; }
start_v2ray() { ray_conf; run v2ray -config "$T/ray.json"; }

# certificate makes what the TLS of trojan and stunnel wants.
certificate() {
	[[ -e $T/cert.pem ]] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
		-subj /CN=proxy.example -addext subjectAltName=DNS:proxy.example -keyout "$T/cert.key" -out "$T/cert.pem" 2>/dev/null
}

get_trojan() { deb trojan trojan; }
start_trojan() {
	certificate
	cat >"$T/trojan-server.json" <<-END
		{"run_type": "server", "local_addr": "127.0.0.1", "local_port": 8443, "remote_addr": "127.0.0.1", "remote_port": 80,
		 "password": ["zoo"], "log_level": 2, "ssl": {"cert": "$T/cert.pem", "key": "$T/cert.key"}}
	END
	cat >"$T/trojan-client.json" <<-END
		{"run_type": "client", "local_addr": "$proxy_in", "local_port": 1080, "remote_addr": "127.0.0.1", "remote_port": 8443,
		 "password": ["zoo"], "log_level": 2, "ssl": {"verify": false, "verify_hostname": false, "cert": "", "sni": "proxy.example"}}
	END
	run trojan -c "$T/trojan-server.json"
	await 8443
	run trojan -c "$T/trojan-client.json"
}

get_stunnel() { deb stunnel4 stunnel4; }
start_stunnel() {
	certificate
	cat >"$T/stunnel-server.conf" <<-END
		foreground = yes
		pid =
		[socks]
		protocol = socks
		accept = 127.0.0.1:8443
		cert = $T/cert.pem
		key = $T/cert.key
	END
	cat >"$T/stunnel-client.conf" <<-END
		foreground = yes
		pid =
		[socks]
		client = yes
		accept = $at
		connect = 127.0.0.1:8443
	END
	run stunnel4 "$T/stunnel-server.conf"
	await 8443
	run stunnel4 "$T/stunnel-client.conf"
}

# --- the Go module proxy --------------------------------------------------------------------------------------------

get_sing-box() { go_server sing-box github.com/sagernet/sing-box v1.14.1 github.com/sagernet/sing-box/cmd/sing-box; }
start_sing-box() {
	cat >"$T/sing-box.json" <<-END
		{"log": {"level": "warn"},
		 "dns": {"servers": [{"type": "local", "tag": "local"}]},
		 "inbounds": [{"type": "socks", "listen": "$proxy_in", "listen_port": 1080}],
		 "outbounds": [{"type": "direct", "tag": "direct"}],
		 "route": {"default_domain_resolver": "local"}}
	END
	run "$cache/sing-box-v1.14.1" run -c "$T/sing-box.json"
}

get_xray() { go_server xray github.com/xtls/xray-core v1.260327.0 github.com/xtls/xray-core/main; }
start_xray() { ray_conf; run "$cache/xray-v1.260327.0" run -config "$T/ray.json"; }

get_go-socks5() {
	go_server go-socks5 github.com/armon/go-socks5 v0.0.0-20160902184237-e75332964ef5 <<-'END'
		package main

		import (
			"log"
			"os"

			"github.com/armon/go-socks5"
		)

		func main() {
			s, err := socks5.New(new(socks5.Config))
			if err == nil {
				err = s.ListenAndServe("tcp", os.Args[1])
			}
			log.Fatal(err)
		}
	END
}
start_go-socks5() { run "$cache/go-socks5-v0.0.0-20160902184237-e75332964ef5" $at; }

get_tailscale() {
	go_server tailscale tailscale.com v1.98.10 <<-'END'
		package main

		import (
			"log"
			"net"
			"os"

			"tailscale.com/net/socks5"
		)

		func main() {
			ln, err := net.Listen("tcp", os.Args[1])
			if err == nil {
				err = (&socks5.Server{Logf: log.Printf}).Serve(ln)
			}
			log.Fatal(err)
		}
	END
}
start_tailscale() { run "$cache/tailscale-v1.98.10" $at; }

# --- npm --------------------------------------------------------------------------------------------------------------

get_socksv5() { npm_server socksv5 0.0.6; }
start_socksv5() {
	node_server <<-END
		import socks from 'socksv5';
		socks.createServer((info, accept) => accept()).useAuth(socks.auth.None()).listen(1080, '$proxy_in');
	END
}

get_pond() { npm_server @pondwader/socks5-server 1.0.10; }
start_pond() {
	node_server <<-END
		import pond from '@pondwader/socks5-server';
		pond.createServer().listen(1080, '$proxy_in');
	END
}

get_simple-socks() { npm_server simple-socks 3.6.0; }
start_simple-socks() {
	node_server <<-END
		import socks from 'simple-socks';
		socks.createServer().listen(1080, '$proxy_in');
	END
}
