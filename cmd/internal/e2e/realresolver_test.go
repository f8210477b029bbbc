package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// askingSecurely is what programs of others get from a resolver inside TLS. Each line begins with what was asked.
const askingSecurely = `
say() { echo "$1: $(shift; "$@" 2>&1 | tr '\n' ' ')"; }
say udp dig +notcp +short +tries=1 +time=20 web.example
say tcp kdig +tcp +short +retry=0 +time=20 web.example
say mx dig +short +tries=1 +time=20 web.example MX
say none dig +tries=1 +time=20 +noall +comments none.example MX
say cut dig +short +tries=1 +time=20 +noedns +ignore many.example TXT
say again dig +short +tries=1 +time=20 +noedns many.example TXT
say edns dig +notcp +short +tries=1 +time=20 +bufsize=4096 many.example TXT
say flags dig +tries=1 +time=20 +noall +comments +bufsize=4096 +dnssec many.example TXT
`

// TestResolversInsideTLS: unbound is asked by DNS over TLS and over HTTPS through dante and microsocks, by its address and by its
// name, which the proxy resolves, and answers dig and kdig.
func TestResolversInsideTLS(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "unbound", "danted", "microsocks", "dig", "kdig")
	data := []string{"web.example. 60 A " + world4, "dns.example. 60 A " + world4, "web.example. 60 MX 10 mail.example."}
	for _, c := range []string{"a", "b", "c"} {
		data = append(data, `many.example. 60 TXT "`+strings.Repeat(c, 250)+`"`)
	}
	certificate := unbound(t, data...)
	const at = "127.0.0.1:1081"
	for name, start := range map[string]func(t *testing.T){
		"dante":      func(t *testing.T) { dante(t, at) },
		"microsocks": func(t *testing.T) { serve(t, at, "microsocks", "-i", "127.0.0.1", "-p", "1081") },
	} {
		t.Run(name, func(t *testing.T) {
			start(t)
			for _, mode := range []string{
				"tls://" + world4 + "#dns.example", "tls://dns.example", "https://" + world4 + "/dns-query#dns.example",
				"https://dns.example/dns-query", "fake,https://dns.example/dns-query",
				"tls://" + world4 + "#other.example,https://" + world4 +
					"/wrong#dns.example,tls://dns.example", // two that are of no use
			} {
				flags := []string{"--proxy", "socks5://" + at, "--dns", mode, "--dns-ca", certificate, "--log-level", "error"}
				// On a machine that stalls, a resolver may not be reached within the five seconds that it has.
				testkit.Tries(t, mode, func() error {
					return checkAskingSecurely(mode, run(t, flags, "bash", "-c", askingSecurely, "asking"))
				})
			}
			// An authority that nobody knows.
			for _, mode := range []string{"tls://dns.example", "https://dns.example/dns-query"} {
				flags := []string{"--proxy", "socks5://" + at, "--dns", mode, "--log-level", "warn"}
				testkit.Tries(t, mode+" with an unknown certificate", func() error {
					r := run(t, flags, "dig", "+tries=1", "+time=20", "web.example")
					if !strings.Contains(r.out, "SERVFAIL") || !strings.Contains(r.stderr, "unknown authority") {
						return fmt.Errorf("%s%s", r.out, r.stderr)
					}
					return nil
				})
			}
		})
	}
}

func checkAskingSecurely(mode string, r ran) error {
	said := map[string]string{}
	for line := range strings.Lines(r.out) {
		what, got, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[what] = strings.TrimSpace(got)
	}
	var wrong []string
	fail := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if !strings.HasPrefix(mode, "fake") && (said["udp"] != world4 || said["tcp"] != world4) {
		fail("the address is not %s", world4)
	}
	if said["mx"] != "10 mail.example." {
		fail("MX: %q", said["mx"])
	}
	if !strings.Contains(said["none"], "NXDOMAIN") {
		fail("a name that does not exist: %q", said["none"])
	}
	for what, want := range map[string]int{"cut": 1, "again": 3, "edns": 3} {
		if got := strings.Fields(said[what]); len(got) != want {
			fail("%s: %d records, want %d", what, len(got), want)
		}
	}
	// The resolver saw the DO bit: it says so in its own OPT record.
	if !strings.Contains(said["flags"], "EDNS: version: 0, flags: do") {
		fail("EDNS is lost: %q", said["flags"])
	}
	if wrong != nil {
		return fmt.Errorf("%s\n%s%s", strings.Join(wrong, "; "), r.out, r.stderr)
	}
	return nil
}

// askingServers asks the server of the test, and whom the resolv.conf names. Each line begins with what was asked.
const askingServers = `
say() { echo "$1: $(shift; "$@" 2>&1 | tr '\n' ' ')"; }
say udp dig @203.0.113.1 +notcp +short +tries=1 +time=20 web.example
say tcp dig @203.0.113.1 +tcp +short +tries=1 +time=20 web.example
say tls kdig @203.0.113.1 +tls-ca="$1" +tls-hostname=dns.example +short +retry=0 +time=20 web.example
say https kdig @203.0.113.1 +https +tls-ca="$1" +tls-hostname=dns.example +short +retry=0 +time=20 web.example
say conf dig +notcp +short +tries=1 +time=20 web.example
`

// TestRelayAndOff: the server that a program asks is the one that answers, through a proxy with UDP and through one without; and
// port 53 as a port like others.
func TestRelayAndOff(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "unbound", "danted", "microsocks", "dig", "kdig")
	certificate := unbound(t, "web.example. 60 A "+world4)
	const at = "127.0.0.1:1081"
	for name, start := range map[string]func(t *testing.T){
		"dante":      func(t *testing.T) { dante(t, at) },
		"microsocks": func(t *testing.T) { serve(t, at, "microsocks", "-i", "127.0.0.1", "-p", "1081") },
	} {
		t.Run(name, func(t *testing.T) {
			start(t)
			for mode, want := range map[string]string{
				"relay,tcp://" + world4:  "udp tcp tls https conf",
				"relay,tcp://192.0.2.99": "udp tcp tls https", // a resolver that is not there, and is not asked
				"off":                    "udp tcp tls https conf",
			} {
				flags := []string{"--proxy", "socks5://" + at, "--dns", mode, "--log-level", "error"}
				r := run(t, flags, "bash", "-c", askingServers, "asking", certificate)
				said := map[string]string{}
				for line := range strings.Lines(r.out) {
					what, got, _ := strings.Cut(strings.TrimSpace(line), ": ")
					said[what] = strings.TrimSpace(got)
				}
				for _, what := range strings.Fields(want) {
					without := mode == "off" && name == "microsocks" && (what == "udp" || what == "conf")
					if (said[what] == world4) == without {
						t.Errorf("%s: %s says %q\n%s%s", mode, what, said[what], r.out, r.stderr)
					}
				}
			}
		})
	}
}

// TestTorResolves: a real Tor answers RESOLVE. It has no network here, and tells what it knows of its own: the name that its
// configuration maps to an address.
func TestTorResolves(t *testing.T) {
	needPrograms(t, "tor", "dig")
	const at = "127.0.0.1:1081"
	conf := fmt.Sprintf(`SocksPort %s
DataDirectory %s
DirAuthority nobody orport=9 v3ident=0000000000000000000000000000000000000001 192.0.2.1:9 0000000000000000000000000000000000000002
MapAddress mapped.example 192.0.2.7
Log notice stderr
`, at, t.TempDir())
	serve(t, at, "tor", "-f", writeFile(t, "torrc", conf), "--defaults-torrc", "/dev/null")
	flags := []string{"--proxy", "socks5://" + at + "?tor", "--dns", "tor", "--log-level", "error"}
	const script = `
say() { echo "$1: $(shift; "$@" 2>&1 | tr '\n' ' ')"; }
say a dig +short +tries=1 +time=20 mapped.example
say aaaa dig +short +tries=1 +time=20 mapped.example AAAA
say mx dig +tries=1 +time=20 +noall +comments mapped.example MX
`
	r := run(t, flags, "bash", "-c", script)
	if !strings.Contains(r.out, "a: 192.0.2.7 \n") || !strings.Contains(r.out, "aaaa: \n") ||
		!strings.Contains(r.out, "status: SERVFAIL") {
		t.Errorf("%s%s", r.out, r.stderr)
	}
}
