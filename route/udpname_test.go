package route

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// zoneResolver answers A over TCP from a table, where AAAA stand as "AAAA NAME", and counts the questions.
func zoneResolver(t *testing.T, srv *sockstest.Server, zone map[string]string) (at netip.AddrPort, asked *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	asked = new(atomic.Int64)
	serve := func(c net.Conn) {
		defer c.Close()
		for {
			var n uint16
			if binary.Read(c, binary.BigEndian, &n) != nil {
				return
			}
			q := make([]byte, n)
			if _, err := io.ReadFull(c, q); err != nil {
				return
			}
			asked.Add(1)
			var labels []string
			for at := 12; q[at] != 0; at += 1 + int(q[at]) {
				labels = append(labels, string(q[at+1:at+1+int(q[at])]))
			}
			q[2], q[3] = 0x81, 0x80
			name, typ := strings.Join(labels, "."), q[len(q)-3]
			if typ == 28 {
				name = "AAAA " + name
			}
			if a, ok := zone[name]; ok {
				q[7] = 1
				ip := netip.MustParseAddr(a).AsSlice()
				q = append(append(q, 0xC0, 12, 0, typ, 0, 1, 0, 0, 0, 60, 0, byte(len(ip))), ip...)
			}
			_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...))
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	at = netip.MustParseAddrPort("192.0.2.53:53")
	srv.Redirect(at, l.Addr().(*net.TCPAddr).AddrPort())
	return at, asked
}

// TestUDPByName: datagrams to a fake address reach the real one, asked for once, and the answers come from the fake one. A
// second name of the same socket has the same outer port. Who writes to the real address too hears from the real address.
func TestUDPByName(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	one, two := newFar(t, srv, "203.0.113.1:1000"), newFar(t, srv, "203.0.113.2:1000")
	stranger := newFar(t, srv, "203.0.113.9:1000")
	res, asked := zoneResolver(t, srv, map[string]string{
		"one.example": "203.0.113.1", "two.example": "203.0.113.2", "bad.example": "203.0.113.1", "ours.example": "198.18.0.1",
	})
	pool := newPool(t)
	g := newRig(t, Config{
		Upstreams: []Upstream{
			NewSOCKS("p", client),
		}, Default: "p", Pool: pool, Fake: true, Resolvers: []dns.Resolver{dns.OverTCP(res)},
		Rules: []Rule{mustRule(t, "name bad.example reject")},
	}, nil)
	const app = "10.0.0.1:5000"
	fake1, fake2 := giveFake(t, pool, "one.example"), giveFake(t, pool, "two.example")
	g.send(app, fake1, "a1", "a2")
	got, ext := one.read()
	if second, _ := one.read(); got != "a1" || second != "a2" {
		t.Errorf("got %q and %q", got, second)
	}
	g.send(app, fake2, "b1")
	if got, from := two.read(); got != "b1" || from.String() != ext.String() {
		t.Errorf("the second name got %q from %v, the first from %v", got, from, ext)
	}
	g.send(app, fake1, "a3")
	if got, _ := one.read(); got != "a3" || asked.Load() != 2 {
		t.Errorf("got %q; %d questions for two names", got, asked.Load())
	}
	one.write(ext, "from one")
	two.write(ext, "from two")
	stranger.write(ext, "from a stranger")
	g.wantPacket(t, fake1, app, "from one")
	g.wantPacket(t, fake2, app, "from two")
	g.wantPacket(t, "203.0.113.9:1000", app, "from a stranger")

	if all := g.Flows(); len(all) != 1 || all[0].Host != "one.example" || all[0].Dst.String() != fake1 {
		t.Errorf("the flows are %+v", all)
	}
	seesRealAddress(t, g, one, ext, fake1)

	for i := range 600 { // more names than there are addresses
		pool.Give([]byte{'n', byte('a' + i/26/26), byte('a' + i/26%26), byte('a' + i%26)})
	}
	if held := pool.Stats().Held; held != 2 {
		t.Errorf("%d addresses are held by the mapping", held)
	}
	refusesNames(t, g, pool)
	g.HandleUnreachable(netip.MustParseAddrPort(app))
	testkit.Eventually(t, "the release", func() bool { return pool.Stats().Held == 0 })
}

// giveFake gives a name an address of the pool, and returns an endpoint of it.
func giveFake(t *testing.T, pool *dns.Pool, name string) string {
	t.Helper()
	a, _, ok := pool.Give([]byte(name))
	if !ok {
		t.Fatal("the pool is empty")
	}
	return at(a, 1000)
}

// seesRealAddress writes to the real address of one, from a socket that knows nothing else, and from one that has written to
// its fake address, too. The answers come from the real address.
func seesRealAddress(t *testing.T, g *rig, one *far, ext net.Addr, fake string) {
	t.Helper()
	const app, other, dst = "10.0.0.1:5000", "10.0.0.1:5001", "203.0.113.1:1000"
	g.send(other, dst, "c1")
	_, ext2 := one.read()
	one.write(ext2, "to the other")
	g.wantPacket(t, dst, other, "to the other")

	g.send(app, dst, "plain")
	_, _ = one.read()
	one.write(ext, "truly from one")
	g.wantPacket(t, dst, app, "truly from one")
	g.send(app, fake, "a4")
	_, _ = one.read()
	one.write(ext, "still from one")
	g.wantPacket(t, dst, app, "still from one")
}

// refusesNames writes to names that no datagram can be carried to.
func refusesNames(t *testing.T, g *rig, pool *dns.Pool) {
	t.Helper()
	for name, want := range map[string]flow.Refusal{
		"bad.example": flow.RefusePort, "none.example": flow.RefuseHost, "ours.example": flow.RefuseHost,
	} {
		before := len(g.w.refusals())
		g.send("10.0.0.1:5002", giveFake(t, pool, name), "x")
		testkit.Eventually(t, "the refusal of "+name, func() bool { return len(g.w.refusals()) > before })
		if why := g.w.refusals()[before]; why != want {
			t.Errorf("%s is refused by %v, want %v", name, why, want)
		}
	}
}

// TestUDPByNameDirect: a name that a rule sends direct is looked up on this host, and no resolver is asked.
func TestUDPByNameDirect(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	res, asked := zoneResolver(t, srv, nil)
	pool := newPool(t)
	looked := make(chan string, 4)
	direct := &lookingUpstream{fakeUpstream{name: DirectName}, looked}
	g := newRig(t, Config{
		Upstreams: []Upstream{
			NewSOCKS("p", client),
			direct,
		}, Default: "p", Pool: pool, Fake: true, Resolvers: []dns.Resolver{dns.OverTCP(res)},
		Rules: []Rule{mustRule(t, "name lan.example direct")},
	}, nil)
	a, _, _ := pool.Give([]byte("lan.example"))
	g.send("10.0.0.1:5000", at(a, 7), "x")
	if name := <-looked; name != "lan.example" || asked.Load() != 0 {
		t.Errorf("looked up %q, and %d questions went to the resolver", name, asked.Load())
	}
	testkit.Eventually(t, "the refusal", func() bool { return len(g.w.refusals()) == 1 })
}

// lookingUpstream finds no name.
type lookingUpstream struct {
	fakeUpstream
	looked chan string
}

func (u *lookingUpstream) LookUp(_ context.Context, name string, done func([]netip.Addr, error)) {
	u.looked <- name
	done(nil, io.EOF)
}
