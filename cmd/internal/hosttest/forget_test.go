package hosttest

import (
	"net"
	"os/exec"
	"strings"
	"testing"
)

// trackNothing keeps conntrack out of the host, as one without any stateful rule.
func (w *world) trackNothing() {
	w.t.Helper()
	w.run("host", nil, "nft", "flush", "ruleset")
}

// TestConntrackForgets: when somebody empties the kernel's table of connections while viasocks is up or dead, those from outside
// go on, in both families, whoever speaks first after that.
func TestConntrackForgets(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		forget  []string // arguments of conntrack(8)
		tracked bool     // without viasocks, too
	}{
		{"all", []string{"-F"}, true},
		{"all, and nothing else tracks", []string{"-F"}, false},
		{"one by one, IPv4", []string{"-D -p tcp --dport 22", "-D -p tcp --dport 2200"}, true},
		{"one by one, IPv6", []string{"-D -f ipv6 -p tcp --dport 22", "-D -f ipv6 -p tcp --dport 2200"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !apart(t) {
				return
			}
			if _, err := exec.LookPath("conntrack"); err != nil {
				t.Skipf("%v; scripts/deps.sh installs it", err)
			}
			w := newWorld(t)
			if !c.tracked {
				w.trackNothing()
			}
			w.hostServers()
			serve(w.listen("world", ":77"), echo)
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			w.proxy(proxy4 + ":1080")
			sessions := map[string]net.Conn{}
			open := func(when string) {
				t.Helper()
				for _, o := range outside {
					s, err := w.login(o.client, o.host)
					if err != nil {
						t.Fatalf("ssh opened %s, %s: %v", when, o.name, err)
					}
					sessions["opened "+when+", "+o.name] = s
				}
			}
			// Of these each side says its first word after the table was emptied.
			quiet := map[string]func(*world) error{}
			stayQuiet := func(when string, port uint16) {
				for _, o := range outside {
					quiet["quiet, opened "+when+", "+o.name+", the server speaks first"] = w.silentOn(
						port,
						o.client,
						o.host,
						1,
						false,
					)
					quiet["quiet, opened "+when+", "+o.name+", the client speaks first"] = w.silentOn(
						port+1,
						o.client,
						o.host,
						1,
						true,
					)
				}
			}
			open("before up")
			d := w.up("--proxy", proxyURL)
			open("while up")
			stayQuiet("while up", 2200)
			forget := func(when string) {
				t.Helper()
				for _, args := range c.forget {
					out, err := try("host", nil, append([]string{"conntrack"}, strings.Fields(args)...)...)
					if err != nil && !strings.Contains(out, "0 flow entries") {
						t.Fatalf("%s: %v", when, err)
					}
				}
				for name, s := range sessions {
					if err := lines(s); err != nil {
						t.Errorf("%s: ssh %s: %v", when, name, err)
						delete(sessions, name)
					}
				}
				for name, speak := range quiet {
					if err := speak(w); err != nil {
						t.Errorf("%s: %s: %v", when, name, err)
					}
					delete(quiet, name)
				}
			}
			forget("up")
			forget("up, once more")
			w.works("up", host4, host6, true)
			stayQuiet("while up, to be used after kill -9", 2210)
			d.kill()
			forget("killed")
			open("after kill -9")
			forget("killed, once more")
		})
	}
}
