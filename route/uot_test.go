package route

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// has reports whether a datagram came that reads want. It waits as long as wait for one that does not.
func (f *far) has(want string, wait time.Duration) bool {
	b := make([]byte, 65536)
	for {
		_ = f.SetReadDeadline(time.Now().Add(wait))
		n, _, err := f.ReadFrom(b)
		if err != nil {
			return false
		}
		if string(b[:n]) == want {
			return true
		}
	}
}

// TestUDPOverTCP: mapping, filtering and sources are the same as by UDP ASSOCIATE, which is never asked for. A connection that
// the server ends, or that speaks nonsense, is made again, and the app does not notice.
func TestUDPOverTCP(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, d, _ := newProxy(t, socks.Options{}, sockstest.WithUDPOverTCP())
	s, err := socks.ParseServer(srv.URL() + "?udp=over-tcp")
	if err != nil {
		t.Fatal(err)
	}
	one, two := newFar(t, srv, "203.0.113.1:1000"), newFar(t, srv, "[2001:db8::2]:2000")
	stranger := newFar(t, srv, "198.51.100.9:9")
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", d.Client(s))}, Default: "p"}, nil)
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a1", "a2", "")
	_, ext := one.read()
	for _, want := range []string{"a2", ""} {
		if got, from := one.read(); got != want || from.String() != ext.String() {
			t.Fatalf("got %q from %v, want %q from %v", got, from, want, ext)
		}
	}
	g.send("10.0.0.1:5000", "[2001:db8::2]:2000", "b1")
	if got, from := two.read(); got != "b1" || from.String() != ext.String() {
		t.Errorf("the second destination got %q from %v, the first from %v", got, from, ext)
	}
	one.write(ext, "from one")
	stranger.write(ext, "from a stranger")
	g.wantPacket(t, "203.0.113.1:1000", "10.0.0.1:5000", "from one")
	g.wantPacket(t, "198.51.100.9:9", "10.0.0.1:5000", "from a stranger")

	for round, meddle := range []func(*sockstest.Association){
		func(a *sockstest.Association) { a.Cut(sockstest.FIN) },
		func(a *sockstest.Association) { a.Cut(sockstest.RST) },
		func(a *sockstest.Association) { _ = a.SendRaw([]byte("\xffnonsense")) },
		func(*sockstest.Association) { badSources(t, srv, g) },
	} {
		all, ok := srv.WaitAssociations(1, 20*time.Second)
		if !ok {
			t.Fatalf("%d connections", len(all))
		}
		meddle(all[0])
		want := "again" + strings.Repeat("!", round)
		testkit.Eventually(t, want, func() bool { // what is on its way meanwhile may be lost
			g.send("10.0.0.1:5000", "203.0.113.1:1000", want)
			return one.has(want, 20*time.Millisecond)
		})
	}
	for _, p := range g.w.packets() {
		if string(p.Payload) == "bad" {
			t.Errorf("a datagram from %v", p.Src)
		}
	}
	for _, r := range srv.Requests() {
		if r.Cmd != sockstest.CmdConnect {
			t.Errorf("asked for %+v", r)
		}
	}
	if n := len(g.log.lines("does not work for UDP")); n != 0 {
		t.Errorf("%d warnings", n)
	}
}

// badSources has the server send from sources that cannot be, which are dropped and counted, until a datagram from a good one
// has come: the link goes on. The connection of the round before may still be there: so all connections send, again and again.
func badSources(t *testing.T, srv *sockstest.Server, g *rig) {
	t.Helper()
	testkit.Eventually(t, "good", func() bool {
		for _, a := range srv.Associations() {
			_ = a.Send(sockstest.Addr{Name: "a.example", Port: 1}, []byte("bad"))
			_ = a.Send(sockstest.Addr{IP: netip.MustParseAddr("203.0.113.1")}, []byte("bad"))
			_ = a.Send(sockstest.Addr{IP: netip.MustParseAddr("203.0.113.1"), Port: 1000}, []byte("good"))
		}
		for _, p := range g.w.packets() {
			if string(p.Payload) == "good" {
				return p.Src.String() == "203.0.113.1:1000" && p.Dst.String() == "10.0.0.1:5000"
			}
		}
		return false
	})
}

// TestUDPOverTCPRefused: a server that does not know the name has no UDP, and is not asked for an association instead.
func TestUDPOverTCPRefused(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, d, _ := newProxy(t, socks.Options{})
	s, err := socks.ParseServer(srv.URL() + "?udp=over-tcp")
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", d.Client(s))}, Default: "p"},
		func(r *Router) { r.noUDP = time.Hour })
	g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
	testkit.Eventually(t, "a refusal", func() bool { return len(g.w.refusals()) == 1 })
	if all := srv.Requests(); len(all) != 1 || all[0].Cmd != sockstest.CmdConnect {
		t.Errorf("asked %+v", all)
	}
	testkit.Eventually(t, "the reason in the log", func() bool { return len(g.log.lines("does not work for UDP")) > 0 })
	if lines := g.log.lines("does not work for UDP"); len(lines) != 1 || !strings.Contains(lines[0], "it takes no UDP over TCP") {
		t.Errorf("%q", lines)
	}
}
