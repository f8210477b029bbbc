package route

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// hostRig runs a Router whose programs may reach the ports of the host that allows says. Fake addresses surround that of
// the host.
func hostRig(t *testing.T, allows func(uint16) bool, rules ...string) (*rig, *fakeUpstream) {
	t.Helper()
	d, err := socks.NewDialer(socks.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	pool, err := dns.NewPool(dns.PoolConfig{V4: flow.Pool4, V6: flow.Pool6, TTL: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	proxy := &fakeUpstream{name: "proxy"} // whatever reaches it panics
	return newRig(t, Config{
		Upstreams: []Upstream{proxy}, Default: "proxy", Rules: parseRules(t, rules...), Pool: pool,
		Host: &HostServices{Allows: allows, Dialer: d},
	}, nil), proxy
}

func parseRules(t *testing.T, text ...string) (all []Rule) {
	t.Helper()
	for _, s := range text {
		r, err := ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

// greeter is a service of the host at one loopback address that says where it is.
func greeter(t *testing.T, at string) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(at, "0"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			_, _ = io.WriteString(c, at)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func every(uint16) bool { return true }

// Both addresses of the host reach a service wherever it listens, first at the address of the same family.
func TestHostStreams(t *testing.T) {
	testkit.CheckLeaks(t)
	g, _ := hostRig(t, every)
	ports := map[string]uint16{"127.0.0.1": greeter(t, "127.0.0.1"), "::1": greeter(t, "::1")}
	for at, port := range ports {
		for i, to := range []netip.Addr{flow.Gateway4, flow.Gateway6} {
			q := newRequest(fmt.Sprintf("10.0.0.1:%d", 100+i), netip.AddrPortFrom(to, port).String())
			g.HandleStream(q)
			testkit.Eventually(t, "a greeting", func() bool {
				_, _, s := q.outcome()
				if s == nil {
					return false
				}
				text, end := s.received()
				return text == at && end
			})
			_, _, s := q.outcome()
			s.send("", true)
		}
	}
	testkit.Eventually(t, "the log of four flows", func() bool { return len(g.log.lines("host=host.viasocks.internal")) == 4 })
	for _, line := range g.log.lines("host=host.viasocks.internal") {
		if !strings.Contains(line, "upstream=host") || !strings.Contains(line, "rule=reach-host") {
			t.Error(line)
		}
	}
	i := slices.IndexFunc(g.UpstreamStats(), func(s UpstreamStats) bool { return s.Name == HostUpstream })
	if i < 0 || g.UpstreamStats()[i].Granted != 4 || g.UpstreamStats()[i].Down == 0 {
		t.Errorf("%+v", g.UpstreamStats())
	}
}

// What is not allowed, what a rule refuses, and what nobody serves is refused, and no upstream is asked.
func TestHostRefusals(t *testing.T) {
	testkit.CheckLeaks(t)
	port := greeter(t, "127.0.0.1")
	closed := freePort(t)
	to := func(p uint16) string { return netip.AddrPortFrom(flow.Gateway4, p).String() }
	for _, c := range []struct {
		what   string
		allows func(uint16) bool
		rules  []string
		dst    string
		want   flow.Refusal
		log    string
	}{
		{"a port that is not in the list", func(p uint16) bool {
			return p != port
		}, nil, to(port), flow.RefuseReset, "does not name this port"},
		{"a port on which nobody listens", every, nil, to(closed), flow.RefuseReset, "refused"},
		{"port 53", every, nil, to(53), flow.RefuseReset, "does not name this port"},
		{"a rule about the name", every, []string{"name host.viasocks.internal reject"}, to(port), flow.RefuseReset, "name host"},
		{"a rule about the address", every, []string{"dst 198.18.0.2 drop"}, to(port), flow.RefuseSilent, "dst 198"},
		{"another address of the TUN", every, nil, netip.AddrPortFrom(flow.Outside4, port).String(), flow.RefuseHost, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			g, _ := hostRig(t, c.allows, c.rules...)
			q := newRequest("10.0.0.1:100", c.dst)
			g.HandleStream(q)
			testkit.Eventually(t, "a refusal", func() bool {
				ok, why, _ := q.outcome()
				return !ok && len(why) == 1 && why[0] == c.want
			})
			testkit.Eventually(t, "the reason in the log", func() bool { return len(g.log.lines(c.log)) > 0 })
		})
	}
	g, _ := hostRig(t, every, "name .example.com via proxy", "dst 198.18.0.2 via proxy") // other rules do not matter
	q := newRequest("10.0.0.1:100", to(port))
	g.HandleStream(q)
	testkit.Eventually(t, "a connection", func() bool { ok, _, _ := q.outcome(); return ok })
}

// Without the option the address of the host is as unreachable as before.
func TestHostOff(t *testing.T) {
	testkit.CheckLeaks(t)
	g := newRig(t, Config{Upstreams: []Upstream{&fakeUpstream{name: "proxy"}}, Default: "proxy"}, nil)
	q := newRequest("10.0.0.1:100", netip.AddrPortFrom(flow.Gateway4, greeter(t, "127.0.0.1")).String())
	g.HandleStream(q)
	testkit.Eventually(t, "a refusal", func() bool { _, why, _ := q.outcome(); return len(why) == 1 && why[0] == flow.RefuseNet })
	g.send("10.0.0.1:100", netip.AddrPortFrom(flow.Gateway4, 9).String(), "x")
	testkit.Eventually(t, "a refusal of UDP", func() bool { return slices.Equal(g.w.refusals(), []flow.Refusal{flow.RefuseNet}) })
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// repeater is a UDP service of the host that answers with what it got and its own address.
func repeater(t *testing.T, at string, port uint16) (c net.PacketConn) {
	t.Helper()
	c, err := net.ListenPacket("udp", netip.AddrPortFrom(netip.MustParseAddr(at), port).String())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1<<16)
		for n, from, err := c.ReadFrom(b); err == nil; n, from, err = c.ReadFrom(b) {
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s at %s", b[:n], at), from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return c
}

// hears waits for an answer from src. What a loaded kernel reports late costs a datagram, as on any network.
func (g *rig) hears(t *testing.T, app, src, payload, want string) {
	t.Helper()
	testkit.Eventually(t, want+" from "+src, func() bool {
		for _, p := range g.w.packets() {
			if p.Src.String() == src && string(p.Payload) == want {
				return true
			}
		}
		g.send(app, src, payload)
		return false
	})
}

// Datagrams reach a service of either family by both addresses, answers come from the address that was asked, and a
// service that ends is noticed and found again elsewhere.
func TestHostDatagrams(t *testing.T) {
	testkit.CheckLeaks(t)
	g, _ := hostRig(t, every)
	four := repeater(t, "127.0.0.1", 0)
	port := four.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	by4, by6 := netip.AddrPortFrom(flow.Gateway4, port).String(), netip.AddrPortFrom(flow.Gateway6, port).String()
	g.hears(t, "10.0.0.1:100", by4, "one", "one at 127.0.0.1")
	g.hears(t, "[fd00::1]:100", by6, "one", "one at 127.0.0.1")
	four.Close()
	testkit.Eventually(t, "a refusal", func() bool {
		g.send("10.0.0.1:100", by4, "two")
		return slices.Contains(g.w.refusals(), flow.RefusePort)
	})
	repeater(t, "::1", port)
	g.hears(t, "10.0.0.1:100", by4, "three", "three at ::1")
	g.hears(t, "[fd00::1]:100", by6, "three", "three at ::1")
	for _, f := range g.Flows() {
		if f.Upstream != HostUpstream || f.Rule != "reach-host" {
			t.Errorf("%+v", f)
		}
	}
	if n := len(g.Flows()); n != 2 {
		t.Errorf("%d mappings", n)
	}
}

// A port that is not in the list is refused, and so is one on which nobody listens. Many ports share a few sockets.
func TestHostManyPorts(t *testing.T) {
	testkit.CheckLeaks(t)
	var open []uint16
	for range maxHostPorts + 10 {
		open = append(open, repeater(t, "127.0.0.1", 0).LocalAddr().(*net.UDPAddr).AddrPort().Port())
	}
	g, _ := hostRig(t, func(p uint16) bool { return slices.Contains(open, p) })
	for _, p := range open {
		g.hears(t, "10.0.0.1:100", netip.AddrPortFrom(flow.Gateway4, p).String(), "x", "x at 127.0.0.1")
	}
	g.mapping(100, func(m *mapping) {
		l := m.assocs[0].link.(*hostLink)
		l.mu.Lock()
		n := len(l.ports)
		l.mu.Unlock()
		if n > maxHostPorts {
			t.Errorf("%d sockets", n)
		}
		if s := l.Stats(); s.Sent < uint64(len(open)) || s.Received < uint64(len(open)) {
			t.Errorf("%+v", s)
		}
	})
	g.send("10.0.0.1:200", netip.AddrPortFrom(flow.Gateway4, 9).String(), "x")
	testkit.Eventually(t, "a refusal", func() bool { return slices.Contains(g.w.refusals(), flow.RefusePort) })
}
