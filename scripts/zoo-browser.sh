#!/usr/bin/env bash
# zoo-browser.sh: a headless Chromium under `viasocks run --dns fake` loads a page with scripts from twenty hosts,
# over HTTP and over HTTPS, through microsocks. Only microsocks can resolve the names. The test fails when a script did not run.
#
# It needs root. Everything is in a network namespace of its own, from which nothing leads out. scripts/zoo.sh runs it.
#
# Usage: zoo-browser.sh VIASOCKS
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
[[ $# -eq 1 ]] || { sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2; }
for p in chromium nginx dnsmasq microsocks openssl; do
	command -v "$p" >/dev/null || { echo "zoo: browser: skipped: $p is not installed: scripts/deps.sh zoo" >&2; exit 0; }
done
[[ -n ${ZOO_BROWSER_INSIDE:-} ]] || exec env ZOO_BROWSER_INSIDE=yes unshare --net --mount --propagation private bash "$0" "$1"

viasocks=$1 at=203.0.113.1 hosts=20
T=$(mktemp -d)
pids=()
clean() {
	kill "${pids[@]}" 2>/dev/null || true
	wait "${pids[@]}" 2>/dev/null || true
	rm -rf "$T"
}
trap clean EXIT
trap 'exit 143' INT TERM HUP

ip link set lo up
ip address add $at/32 dev lo
mkdir "$T/www" "$T/home"
chmod 755 "$T" "$T/www"
for ((i = 1; i <= hosts; i++)); do echo "document.title += ' ran$i';" >"$T/www/$i.js"; done
for scheme in http https; do
	{
		echo "<html><head><title>page</title></head><body>"
		for ((i = 1; i <= hosts; i++)); do echo "<script src=$scheme://h$i.many.example/$i.js></script>"; done
		echo "</body></html>"
	} >"$T/www/$scheme.html"
done
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$T/key.pem" -out "$T/cert.pem" -days 2 \
	-subj /CN=many.example -addext 'subjectAltName=DNS:*.many.example' 2>/dev/null
cat >"$T/nginx.conf" <<-END
	daemon off; master_process off; pid $T/pid; error_log stderr; events { }
	http {
		access_log off; types { text/html html; text/javascript js; }
		client_body_temp_path $T/b; proxy_temp_path $T/p; fastcgi_temp_path $T/f; uwsgi_temp_path $T/u; scgi_temp_path $T/s;
		server {
			listen $at:80; listen $at:443 ssl; ssl_certificate $T/cert.pem; ssl_certificate_key $T/key.pem; root $T/www;
		}
	}
END
nginx -c "$T/nginx.conf" -e stderr >"$T/nginx.log" 2>&1 & pids+=($!)
dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root --no-resolv --no-hosts --bind-interfaces --listen-address=$at \
	--pid-file= --address=/many.example/$at >"$T/dns.log" 2>&1 & pids+=($!)
echo "nameserver $at" >"$T/resolv.conf"
mount --bind "$T/resolv.conf" "$(readlink -f /etc/resolv.conf)"
microsocks -i 127.0.0.1 -p 1080 >"$T/proxy.log" 2>&1 & pids+=($!)
for ((i = 0; i < 50; i++)); do
	[[ $(ss -Hltn "sport = :80 or sport = :53 or sport = :1080" | wc -l) -lt 3 ]] || break
	sleep 0.1
done

status=0
for scheme in http https; do
	HOME=$T/home timeout 90 "$viasocks" run --log-level error --proxy socks5://127.0.0.1:1080 --dns "fake,tcp://$at" -- \
		chromium --headless=new --no-sandbox --disable-gpu --ignore-certificate-errors --user-data-dir="$T/profile" \
		--virtual-time-budget=20000 --dump-dom "$scheme://h1.many.example/$scheme.html" >"$T/$scheme.out" 2>"$T/$scheme.err" || true
	ran=$(sed -n 's:.*<title>\(.*\)</title>.*:\1:p' "$T/$scheme.out" | grep -o 'ran[0-9]*' | sort -u | wc -l)
	echo "$(chromium --version 2>/dev/null | head -n 1): $scheme: $ran of $hosts hosts"
	[[ $ran -eq $hosts ]] || { status=1; tail -n 5 "$T/$scheme.err" >&2; }
done
exit $status
