package e2e

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
)

// TestShortNames: what a program gets with a name without a dot, such as that of "ping intranet", in fake mode.
func TestShortNames(t *testing.T) {
	needPrograms(t, "getent")
	proxy := listenSOCKS(t)
	for _, tt := range []struct {
		flags string
		want  string // the name that the address stands for; empty: there is none
	}{
		{"--dns-search corp.example,other.example", "intranet.corp.example"},
		{"--dns-search .", "intranet"},
		{"--dns-search . --dns-single-labels off", ""},
		{"--dns-single-labels off --dns-search corp.example", "intranet.corp.example"},
	} {
		r := run(t, append([]string{"--proxy", proxy.URL(), "--dns", noResolver}, strings.Fields(tt.flags)...),
			"sh", "-c", "a=$(getent ahostsv4 intranet | head -1 | cut -d' ' -f1); [ -z \"$a\" ] || getent hosts $a")
		f := strings.Fields(r.out)
		if tt.want == "" && len(f) != 0 || tt.want != "" && (len(f) != 2 || f[1] != tt.want) {
			t.Errorf("%s: %q, want %s", tt.flags, f, tt.want)
		}
	}
}

// splitDNSCases are the cases of TestSplitDNS.
var splitDNSCases = []string{
	"--keep-in-foreground",
	"--conf-file=/dev/null",
	"--user=root",
	"--no-resolv",
	"--no-hosts",
	"--bind-interfaces",
	"--listen-address=" + other4,
	"--pid-file=",
	"--local-ttl=60",
	"--address=/www.corp.example/192.0.2.9",
}

// TestSplitDNS: dnsmasq serves a zone of its own beside the public server. Each name is asked of the server that the options
// name, by the way that they name, in fake mode and without; what no option is about stays with the proxy.
func TestSplitDNS(t *testing.T) {
	needPrograms(t, "nginx", "dnsmasq", "curl", "dig")
	nginx(t, world4+":8080")
	asked := filepath.Join(t.TempDir(), "asked")
	dnsmasq(t, "--address=/corp.example/192.0.2.1", "--address=/real.example/192.0.2.3", "--address=/direct.example/"+world4,
		"--address=/tcp.example/192.0.2.4", "--log-queries", "--log-facility="+asked)
	zone := splitDNSCases
	for i := range 12 {
		zone = append(zone, fmt.Sprintf("--txt-record=big.corp.example,%d-%s", i, strings.Repeat("x", 150)))
	}
	serve(t, other4+":53", "dnsmasq", zone...)
	const script = `for n in www.corp.example real.example www.direct.example tcp.example; do dig +short $n; done
dig +short +bufsize=512 big.corp.example TXT | wc -l; curl -s -m 10 http://www.direct.example:8080`
	for _, tt := range []struct {
		server, dns string
		byProxy     bool
	}{
		{"tcp://" + other4, "fake,tcp://" + world4, true},
		{"direct:udp://" + other4, "fake,tcp://" + world4, false},
		{"direct:tcp://" + other4, "tcp://" + world4, false},
		{"tcp://" + other4, "tcp://" + world4, true},
	} {
		t.Run(strings.NewReplacer("://", "", ".", "").Replace(tt.dns+" "+tt.server), func(t *testing.T) {
			proxy := listenSOCKS(t)
			fake := strings.HasPrefix(tt.dns, "fake")
			r := run(
				t,
				[]string{"--proxy", proxy.URL(), "--dns", tt.dns, "--dns-for", "corp.example=" + tt.server, "--dns-exclude",
					".real.example", "--rule", "name .direct.example direct"},
				"sh",
				"-c",
				script,
			)
			got := strings.Split(strings.TrimSpace(r.out), "\n")
			if len(got) != 6 {
				t.Fatalf("%q, %s", r.out, r.stderr)
			}
			for i, want := range []string{"192.0.2.9", "192.0.2.3", world4, "192.0.2.4", "12", strings.TrimPrefix(served, "0 ")} {
				if fake && i == 3 {
					if a, err := netip.ParseAddr(got[i]); err != nil || !netip.MustParsePrefix("198.18.0.0/15").Contains(a) {
						t.Errorf("line %d is %q", i, got[i])
					}
				} else if got[i] != want {
					t.Errorf("line %d is %q, want %q", i, got[i], want)
				}
			}
			toZone, web := 0, 0
			for _, q := range proxy.Requests() {
				if strings.HasPrefix(q.Dst.String(), other4+":53") {
					toZone++
				}
				if q.Dst.Port == 8080 {
					web++
				}
			}
			if (toZone > 0) != tt.byProxy || web > 0 {
				t.Errorf("the proxy was asked %d times for the zone's server, and %d times for what is direct", toZone, web)
			}
		})
	}
}
