package hosttest

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// Ports of the host's servers.
const (
	sshPort       = 22
	udpPort       = 5300
	lanPort       = 8000 // of the router, on-link
	publishedPort = 8080 // on the host; 80 in the container
)

// hostServers are the servers of a host that is reached from outside.
func (w *world) hostServers() {
	w.t.Helper()
	// Like SSH: the server speaks first, and again every few milliseconds.
	serve(w.listen("host", fmt.Sprintf(":%d", sshPort)), func(c net.Conn) {
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(c, "line %d\n", i); err != nil {
				return
			}
			testkit.Pace(5 * time.Millisecond)
		}
	})
	c := w.packets("host", fmt.Sprintf(":%d", udpPort))
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], from)
		}
	}()
	serve(w.listen("router", fmt.Sprintf(":%d", lanPort)), echo)
	serve(w.listen("ctr", ":80"), func(c net.Conn) { fmt.Fprintln(c, "published"); _, _ = io.Copy(c, c) })
}

// from outside to the host, in both families.
var outside = []struct{ name, client, host string }{
	{"IPv4", client4, host4},
	{"IPv6", client6, host6},
}

// reachWithin is how long what is to be reached may take. It may not be reached where it is set shorter, by briefly.
var reachWithin = 20 * time.Second

func briefly(t *testing.T) {
	old := reachWithin
	reachWithin = 2 * time.Second
	t.Cleanup(func() { reachWithin = old })
}

// from dials from a certain address of the world.
func (w *world) from(client, host string, port uint16) (c net.Conn, err error) {
	err = in("world", func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr(client), 0)), Timeout: reachWithin}
		c, err = d.Dial("tcp", netip.AddrPortFrom(addr(host), port).String())
		return err
	})
	if err == nil {
		w.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// login is an SSH-like connection from outside: it is there when the server's lines come.
func (w *world) login(client, host string) (net.Conn, error) {
	c, err := w.from(client, host, sshPort)
	if err != nil {
		return nil, err
	}
	return c, lines(c)
}

// lines is whether what the server says now comes through: what was on its way is read before.
func lines(c net.Conn) error {
	b := make([]byte, 64<<10)
	end := time.Now().Add(50 * time.Millisecond)
	_ = c.SetReadDeadline(end)
	for {
		if _, err := c.Read(b); err != nil {
			break
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(reachWithin))
	_, err := c.Read(b)
	return err
}

// published uses the container's port from outside.
func (w *world) published(client, host string) (net.Conn, error) {
	c, err := w.from(client, host, publishedPort)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 10)
	_ = c.SetDeadline(time.Now().Add(reachWithin))
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	return c, ping(c)
}

// askUDP is whether a UDP server on a wildcard socket answers from the address that was asked.
func (w *world) askUDP(client, host string) error {
	var c net.Conn
	err := in("world", func() (err error) {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr(client), 0))}
		c, err = d.Dial("udp", netip.AddrPortFrom(addr(host), udpPort).String()) // connected: takes answers from there only
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	for end := time.Now().Add(reachWithin); time.Now().Before(end); {
		if _, err = c.Write([]byte("question")); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err = c.Read(make([]byte, 100)); err == nil {
			return nil
		}
	}
	return err
}

// reachable tries everything from outside, in both families.
func (w *world) reachable(when string) {
	w.t.Helper()
	for _, o := range outside {
		if _, err := w.login(o.client, o.host); err != nil {
			w.t.Errorf("%s: %s: ssh: %v", when, o.name, err)
		}
		if err := w.askUDP(o.client, o.host); err != nil {
			w.t.Errorf("%s: %s: udp server on a wildcard socket: %v", when, o.name, err)
		}
		if _, err := w.published(o.client, o.host); err != nil {
			w.t.Errorf("%s: %s: published container port: %v", when, o.name, err)
		}
	}
}

// inside tries what the host reaches past the proxy: its container and the connected private network.
func (w *world) inside(when string) {
	w.t.Helper()
	for _, to := range []string{ctr4, ctr6} {
		if c, err := w.dial("host", netipAddrPort(to, 80)); err != nil {
			w.t.Errorf("%s: from the host to its container %s: %v", when, to, err)
		} else {
			c.Close()
		}
	}
	for _, to := range []string{lanRouter4, lanRouter6} {
		if c, err := w.dial("host", netipAddrPort(to, lanPort)); err != nil {
			w.t.Errorf("%s: from the host to the private network, %s: %v", when, to, err)
		} else {
			c.Close()
		}
	}
}

func TestReachable(t *testing.T) {
	t.Parallel()
	for _, tracked := range []bool{true, false} {
		t.Run(fmt.Sprintf("tracked=%v", tracked), func(t *testing.T) {
			if !apart(t) {
				return
			}
			w := newWorld(t)
			if !tracked {
				w.trackNothing()
			}
			w.hostServers()
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			w.proxy(proxy4 + ":1080")
			sessions := map[string]net.Conn{}
			open := func(when string) {
				t.Helper()
				for _, o := range outside {
					c, err := w.login(o.client, o.host)
					if err != nil {
						t.Errorf("%s: %s: ssh: %v", when, o.name, err)
						continue
					}
					sessions["opened "+when+", "+o.name] = c
				}
			}
			alive := func(when string) {
				t.Helper()
				for name, c := range sessions {
					if err := lines(c); err != nil {
						t.Errorf("%s: ssh %s: %v", when, name, err)
						delete(sessions, name)
					}
				}
			}
			open("before up")
			if tracked {
				w.reachable("before up")
			}
			if t.Failed() {
				return
			}
			d := w.up("--proxy", proxyURL)
			if why := w.notClosed(); why != "" {
				t.Skip(why)
			}
			alive("while up")
			open("while up")
			check := func(when string) {
				t.Helper()
				alive(when)
				w.inside(when)
				if tracked {
					w.reachable(when)
				}
			}
			check("while up")
			d.kill()
			check("after kill -9")
			open("after kill -9")
			if tracked {
				testkit.Pace(guard)
				check("long after kill -9")
				w.errorsAtOnce("long after kill -9")
			}
			d = w.up("--proxy", proxyURL)
			check("after the restart")
			w.ip("host", "link del "+tunName)
			if d.alive() {
				testkit.Settle(300*time.Millisecond, "it has another TUN")
			}
			check("after the TUN was deleted")
			if err := d.stop(); err != nil {
				t.Logf("stop: %v", err)
			}
			w.command("down")
			check("after the stop")
		})
	}
}

// TestReachableStrictReversePath is the same where rp_filter is 1.
func TestReachableStrictReversePath(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.hostServers()
	w.sysctl("host", map[string]string{"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/eth0/rp_filter": "1"})
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	w.proxy(proxy4 + ":1080")
	serve(w.listen("world", ":77"), echo)
	before, err := w.login(client4, host4)
	if err != nil {
		t.Fatal(err)
	}
	d := w.launch("--proxy", proxyURL)
	if !d.becomesReady() {
		if !has("down") {
			t.Skip("viasocks up can't with rp_filter=1 yet")
		}
		t.Fatalf("viasocks up did not start:\n%s", d.log)
	}
	if why := w.notClosed(); why != "" {
		t.Skip(why)
	}
	carried := func(when string) {
		t.Helper()
		c, err := w.dial("host", netip.MustParseAddrPort("203.0.113.7:77"))
		if err == nil {
			err = ping(c)
		}
		if err != nil {
			t.Errorf("%s: not carried: %v", when, err)
		}
	}
	carried("while up")
	w.reachable("while up")
	if err := lines(before); err != nil {
		t.Errorf("ssh opened before up: %v", err)
	}
	d.kill()
	w.reachable("after kill -9")
	if err := lines(before); err != nil {
		t.Errorf("after kill -9: ssh opened before up: %v", err)
	}
}

// TestRulesOfReach takes rules away, one kind at a time, from a host whose daemon was killed, and expects what each is
// there for to fail: else the tests above would prove nothing.
func TestRulesOfReach(t *testing.T) {
	if !apart(t) {
		return
	}
	ssh := func(w *world) error { _, err := w.login(client4, host4); return err }
	published := func(w *world) error { _, err := w.published(client4, host4); return err }
	udp := func(w *world) error { return w.askUDP(client4, host4) }
	rule := func(chain, text string) func(*world) int {
		return func(w *world) int { return w.deleteNftRules(chain, regexp.MustCompile(text)) }
	}
	// Connections of before `up`, of which each is used once: what was said before would be known from that.
	silent := func(i int, clientFirst bool) func(*world) func(*world) error {
		return func(w *world) func(*world) error { return w.silent(outside[i].client, outside[i].host, 2, clientFirst) }
	}
	const inbound = "0x79000000" // the fourth mark of the default
	for _, tt := range []struct {
		name     string
		strictRP bool
		works    func(*world) error
		takeAway func(*world) int
		before   func(*world) func(*world) error // what has to be there before `up`; gives works
	}{
		{"inbound marked by connection", false, ssh, rule("", "ct direction original .* jump"), nil},
		{"answers marked in the output chain", false, ssh, rule("mark_output", "meta mark set .*"+inbound), nil},
		{"the mark restored in prerouting", false, published, rule("prerouting", "meta mark set .*"+inbound), nil},
		{"marked answers pass the filter", false, ssh, rule("", "meta mark "+inbound+".* accept"), nil},
		{"the ip rule of answers", false, ssh, func(w *world) (n int) {
			for _, f := range []string{"-4", "-6"} {
				if _, err := try("", nil, "ip", "-n", "host", f, "rule", "del", "fwmark", inbound+"/0xff000000"); err == nil {
					n++
				}
			}
			return n
		}, nil},
		{"the persistent TUN", false, ssh, func(w *world) int { w.ip("host", "link del "+tunName); return 1 }, nil},
		{"the source address of table T", false, udp, func(w *world) int {
			w.ip("host", "route replace default dev "+tunName+" table "+tableID+" proto 118 scope link")
			return 1
		}, nil},
		{"src_valid_mark", true, ssh, func(w *world) int {
			w.sysctl("host", map[string]string{"net/ipv4/conf/all/src_valid_mark": "0"})
			return 1
		}, nil},
		{"kept IPv4, the server speaks first", false, nil, rule("mark_output", "@kept4 "), silent(0, false)},
		{"kept IPv6, the server speaks first", false, nil, rule("mark_output", "@kept6 "), silent(1, false)},
		{"kept, the client speaks first", true, nil, rule("inbound", "@kept4 "), silent(0, true)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.hostServers()
			if tt.strictRP {
				w.sysctl("host", map[string]string{"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/eth0/rp_filter": "1"})
			}
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			w.proxy(proxy4 + ":1080")
			if tt.before != nil {
				tt.works = tt.before(w)
			}
			d := w.up("--proxy", proxyURL)
			if why := w.notClosed(); why != "" {
				t.Skip(why)
			}
			d.kill()
			if err := tt.works(w); err != nil {
				t.Fatalf("with its rule: %v", err)
			}
			if n := tt.takeAway(w); n == 0 {
				t.Fatalf("no such rule:\n%s\n%s", w.ipRules(), w.run("host", nil, "nft", "list", "table", "inet", "viasocks"))
			}
			briefly(t)
			if err := tt.works(w); err == nil {
				t.Error("it works without its rule as well")
			}
		})
	}
}

// silent opens n connections from outside to a server that says nothing unasked. The function that it gives uses one of
// them, for the first time.
func (w *world) silent(client, host string, n int, clientFirst bool) func(*world) error {
	w.t.Helper()
	return w.silentOn(2200, client, host, n, clientFirst)
}

// silentOn is silent with another port.
func (w *world) silentOn(port uint16, client, host string, n int, clientFirst bool) func(*world) error {
	w.t.Helper()
	l := w.listen("host", netipAddrPort(host, port).String())
	var pairs [][2]net.Conn // who speaks, who listens
	for range n {
		out, err := w.from(client, host, port)
		if err != nil {
			w.t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { in.Close() })
		if clientFirst {
			pairs = append(pairs, [2]net.Conn{out, in})
		} else {
			pairs = append(pairs, [2]net.Conn{in, out})
		}
	}
	limit := 10 * time.Second
	return func(*world) error {
		from, to := pairs[0][0], pairs[0][1]
		pairs = pairs[1:]
		defer func() { limit = 2 * time.Second }() // the second time nothing is to come
		if _, err := from.Write([]byte("word")); err != nil {
			return err
		}
		_ = to.SetReadDeadline(time.Now().Add(limit))
		_, err := to.Read(make([]byte, 10))
		return err
	}
}

// TestInboundCarry: with --inbound carry nothing is kept, so that the tests above are about --inbound keep.
func TestInboundCarry(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.hostServers()
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	w.proxy(proxy4 + ":1080")
	var before []net.Conn
	for _, o := range outside {
		c, err := w.login(o.client, o.host)
		if err != nil {
			t.Fatal(err)
		}
		before = append(before, c)
	}
	w.up("--proxy", proxyURL, "--inbound", "carry")
	briefly(t)
	var tries sync.WaitGroup
	for i, o := range outside {
		for what, try := range map[string]func() error{
			"ssh opened before up": func() error { return lines(before[i]) },
			"ssh opened while up":  func() error { _, err := w.login(o.client, o.host); return err },
			"a UDP server":         func() error { return w.askUDP(o.client, o.host) },
			"a published port":     func() error { _, err := w.published(o.client, o.host); return err },
		} {
			tries.Go(func() {
				if try() == nil {
					t.Errorf("%s: %s works", o.name, what)
				}
			})
		}
	}
	tries.Wait()
	w.inside("inbound carry")
}

var (
	nftTable = regexp.MustCompile(`^table (\w+) (\S+) \{`)
	nftChain = regexp.MustCompile(`^\tchain (\S+) \{`)
	nftLine  = regexp.MustCompile(`# handle (\d+)$`)
)

// deleteNftRules deletes the nft rules of ours in a chain ("" is any) that match.
func (w *world) deleteNftRules(in string, rules *regexp.Regexp) (n int) {
	w.t.Helper()
	var table, chain string
	for line := range strings.Lines(w.run("host", nil, "nft", "-a", "list", "ruleset")) {
		line = strings.TrimRight(line, "\n")
		if m := nftTable.FindStringSubmatch(line); m != nil {
			table = m[1] + " " + m[2]
		} else if m := nftChain.FindStringSubmatch(line); m != nil {
			chain = m[1]
		} else if m := nftLine.FindStringSubmatch(line); m != nil && strings.HasPrefix(table, "inet viasocks") &&
			(in == "" || in == chain) && rules.MatchString(line) {
			w.nft("host", fmt.Sprintf("delete rule %s %s handle %s\n", table, chain, m[1]))
			n++
		}
	}
	return n
}
