package hosttest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// firewalldRules are shaped as firewalld's are: a table with an owner-like layout, zones, sets, and an output chain.
const firewalldRules = `
table inet firewalld {
	set trusted {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.0/24 }
	}
	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
	}
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		tcp dport { 22, 8080 } accept
		udp dport 5300 accept
		meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "br0" accept
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10; policy accept;
		oifname "lo" accept
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96 } reject with icmpv6 addr-unreachable
	}
}
`

// wgQuickRules are what wg-quick does for AllowedIPs = 0.0.0.0/0, but with a bridge for a device: its mark, its table, its rules.
const wgQuickRules = `
table ip wg-quick-wg0 {
	chain preraw {
		type filter hook prerouting priority raw; policy accept;
		iifname != "wg0" ip daddr 10.200.0.2 fib saddr type != local drop
	}
	chain premangle {
		type filter hook prerouting priority mangle; policy accept;
		meta l4proto udp meta mark set ct mark
	}
	chain postmangle {
		type filter hook postrouting priority mangle; policy accept;
		meta l4proto udp meta mark 0x0000ca6c ct mark set meta mark
	}
}
`

var wgQuickIP = `
link add wg0 type bridge
addr add 10.200.0.2/32 dev wg0
link set wg0 up
route add 10.200.0.0/24 dev wg0 table 51820
rule add not fwmark 51820 to 10.200.0.0/24 lookup 51820
rule add lookup main suppress_prefixlength 0
`

// state is everything that must come back.
func (w *world) state() map[string]string {
	w.t.Helper()
	s := map[string]string{
		"ip rule":                    w.ip("host", "rule"),
		"ip -6 rule":                 w.ip("host", "-6 rule"),
		"ip route show table all":    sorted(w.ip("host", "-4 route show table all")),
		"ip -6 route show table all": sorted(expires.ReplaceAllString(w.ip("host", "-6 route show table all"), "")),
		"nft -s list ruleset":        w.run("host", nil, "nft", "-s", "list", "ruleset"),
		"ip link":                    links.ReplaceAllString(w.ip("host", "-o link"), "$1"),
		"ip addr":                    w.ip("host", "-br addr"),
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		w.t.Error(err)
	}
	s["resolv.conf"] = string(b)
	w.in("host", func() error { s["sysctl"] = sysctls(); return nil })
	return s
}

var (
	expires = regexp.MustCompile(` expires \d+sec`)
	links   = regexp.MustCompile(`(?m)^\d+: ([^:@]+).*$`) // names: numbers and flags of a device of others are not ours
)

func sorted(s string) string {
	l := strings.Split(s, "\n")
	slices.Sort(l)
	return strings.Join(l, "\n")
}

// sysctls are all of net/ that can be read and do not count something, in the thread's namespace.
func sysctls() string {
	var b strings.Builder
	_ = filepath.WalkDir("/proc/sys/net", func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(path, "_count") || strings.HasSuffix(path, "/flush") ||
			strings.Contains(path, "stable_secret") {
			return nil
		}
		if v, err := os.ReadFile(path); err == nil {
			fmt.Fprintf(&b, "%s = %s", strings.TrimPrefix(path, "/proc/sys/net/"), v)
		}
		return nil
	})
	return b.String()
}

// same compares two states and tells the lines that differ. The kernel takes away a little after an address what came with it.
func (w *world) same(when string, before, after map[string]string) {
	w.t.Helper()
	if !maps.Equal(before, after) {
		testkit.Until(testkit.Patience, func() bool { after = w.state(); return maps.Equal(before, after) })
	}
	w.equal(when, before, after)
}

// equal compares two descriptions of the host as they are.
func (w *world) equal(when string, before, after map[string]string) {
	w.t.Helper()
	for what, b := range before {
		if a := after[what]; a != b {
			w.t.Errorf("%s: %s is not what it was:\n%s", when, what, diff(b, a))
		}
	}
}

// diff are the lines that only one of them has.
func diff(before, after string) string {
	b, a := strings.Split(before, "\n"), strings.Split(after, "\n")
	var out strings.Builder
	for _, d := range []struct {
		sign    string
		in, not []string
	}{{"-", b, a}, {"+", a, b}} {
		for _, l := range d.in {
			if !slices.Contains(d.not, l) {
				fmt.Fprintf(&out, "\t%s %s\n", d.sign, l)
			}
		}
	}
	if out.Len() == 0 {
		return "\tanother order\n"
	}
	return out.String()
}

// neighbours are rule sets of others.
var neighbours = []struct {
	name, nft, ip string
}{
	{"alone", "flush ruleset", ""},
	{"docker", "", ""}, // the world has its rules
	{"firewalld", firewalldRules, ""},
	{"wg-quick", wgQuickRules, wgQuickIP},
}

func TestRestored(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, n := range neighbours {
		t.Run(n.name, func(t *testing.T) {
			w := newWorld(t)
			if n.nft != "" {
				w.nft("host", n.nft)
			}
			w.ip("host", n.ip)
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			w.proxy(proxy4 + ":1080")
			serve(w.listen("world", ":77"), echo)
			before := w.state()
			files, _ := filepath.Glob("/run/viasocks/*")

			use := func(d *daemon) {
				t.Helper()
				for _, to := range []string{"203.0.113.7", "2001:db8:f::7"} {
					c, err := w.dial("host", netipAddrPort(to, 77))
					if err == nil {
						err = ping(c)
					}
					if err != nil {
						t.Errorf("not carried to %s: %v", to, err)
					}
				}
			}
			d := w.up("--proxy", proxyURL)
			use(d)
			if err := d.stop(); err != nil {
				t.Errorf("stop: %v", err)
			}
			w.same("after the stop", before, w.state())
			if !has("down") {
				t.Skip("the rest: viasocks has no down yet")
			}

			d = w.up("--proxy", proxyURL)
			use(d)
			if out, err := w.command("down"); err != nil {
				t.Errorf("down while it runs: %v\n%s", err, out)
			}
			_ = d.wait()
			w.same("after down while it ran", before, w.state())

			d = w.up("--proxy", proxyURL)
			use(d)
			d.kill()
			if out, err := w.command("down"); err != nil {
				t.Errorf("down after kill -9: %v\n%s", err, out)
			}
			w.same("after kill -9 and down", before, w.state())

			for _, c := range []struct {
				name    string
				corrupt func([]byte) []byte
			}{
				{"garbage in", func([]byte) []byte { return []byte("garbage") }},
				{"without", func([]byte) []byte { return nil }},
			} {
				d = w.up("--proxy", proxyURL)
				d.kill()
				w.corruptJournal(c.corrupt)
				if out, err := w.command("down"); err != nil {
					t.Errorf("down with %s the journal: %v\n%s", c.name, err, out)
				}
				w.same("after kill -9 and down with "+c.name+" the journal", before, w.state())
			}
			left, _ := filepath.Glob("/run/viasocks/*")
			for _, f := range left {
				if !slices.Contains(files, f) {
					t.Errorf("left behind: %s", f)
				}
			}
		})
	}
}
