package route

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// wholeProxy says that its address is known.
type wholeProxy struct{ portmap.Backend }

func (wholeProxy) External() (netip.Addr, portmap.State) {
	return netip.MustParseAddr("203.0.113.1"), portmap.Works
}

const search = "M-SEARCH * HTTP/1.1\r\nST: ssdp:all\r\nMAN: \"ssdp:discover\"\r\n\r\n"

// A search by multicast, and one to the gateway itself, is answered from the gateway, and goes to no upstream.
func TestSearch(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, nil)
	const app = "198.18.0.1:5000"
	g.send(app, flow.SSDP.String(), search) // nobody answers yet
	t.Cleanup(g.ServePorts(portmap.New(wholeProxy{}, time.Now())))
	g.send(app, flow.SSDP.String(), search, "NOTIFY * HTTP/1.1\r\n\r\n")
	g.send(app, gatewayWeb.String(), search)
	got := g.w.packets()
	if len(got) != 2 {
		t.Fatalf("%d answers", len(got))
	}
	for _, p := range got {
		if p.Src != gatewayWeb || p.Dst.String() != app || !strings.Contains(string(p.Payload), "http://198.18.0.2:1900/") {
			t.Errorf("%v to %v: %s", p.Src, p.Dst, p.Payload)
		}
	}
	if len(g.w.refusals()) != 0 || u.count() != 0 {
		t.Errorf("%v, %d associations", g.w.refusals(), u.count())
	}
}

// The gateway answers HTTP to a few connections, and its end closes them.
func TestGatewayWeb(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}, nil)
	end := g.ServePorts(portmap.New(wholeProxy{}, time.Now()))
	var all []*fakeRequest
	for i := range maxUPnP + 1 {
		q := newRequest(netip.AddrPortFrom(flow.TUN4, uint16(40000+i)).String(), gatewayWeb.String())
		g.HandleStream(q)
		all = append(all, q)
	}
	for i, q := range all {
		testkit.Eventually(t, "the outcome", func() bool {
			accepted, rejected, s := q.outcome()
			return accepted && s != nil && i < maxUPnP || len(rejected) == 1 && rejected[0] == flow.RefuseReset && i == maxUPnP
		})
	}
	_, _, s := all[0].outcome()
	s.send("GET /rootDesc.xml HTTP/1.1\r\nHost: 198.18.0.2:1900\r\n\r\n", false)
	testkit.Eventually(t, "the description", func() bool {
		got, _ := s.received()
		return strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") && strings.HasSuffix(got, "</root>")
	})
	end()
	end()
	for _, q := range all[:maxUPnP] {
		_, _, s := q.outcome()
		testkit.Eventually(t, "the end", func() bool { _, fin := s.received(); return fin || s.isAborted() })
	}
	late := newRequest("198.18.0.1:50000", gatewayWeb.String())
	g.HandleStream(late)
	testkit.Eventually(t, "the end of a late one", func() bool {
		_, rejected, s := late.outcome()
		if s == nil {
			return len(rejected) > 0
		}
		_, fin := s.received()
		return fin || s.isAborted()
	})
}

// Who may not ask for ports does not reach the gateway by TCP either: a container has the address of the TUN device, and would
// open a port of the host.
func TestGatewayWebAsks(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	host := netip.MustParseAddr("192.0.2.1")
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p",
		Asks: func(a netip.Addr) bool { return a == host }}, nil)
	t.Cleanup(g.ServePorts(portmap.New(wholeProxy{}, time.Now())))
	other := newRequest("198.18.0.1:40000", gatewayWeb.String())
	g.HandleStream(other)
	if accepted, rejected, _ := other.outcome(); accepted || len(rejected) != 1 || rejected[0] != flow.RefuseReset {
		t.Errorf("a container is accepted: %v, and refused by %v", accepted, rejected)
	}
	q := newRequest("192.0.2.1:40000", gatewayWeb.String())
	g.HandleStream(q)
	testkit.Eventually(t, "the gateway", func() bool { accepted, _, s := q.outcome(); return accepted && s != nil })
	_, _, s := q.outcome()
	s.Abort()
}

func (s *fakeStream) isAborted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aborted
}

// A program that connects to where it is itself reached is refused, and no upstream is asked.
func TestOwnPort(t *testing.T) {
	testkit.CheckLeaks(t)
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, _ Dest, done func(int, error)) {
		done(-1, socks.ReplyHostUnreachable)
	}}
	own := netip.MustParseAddrPort("203.0.113.1:6881")
	g := newRig(t, Config{Upstreams: []Upstream{up}, Default: "p",
		OwnPort: func(at netip.AddrPort) bool { return at == own }}, nil)
	q, other := newRequest("198.18.0.1:40000", own.String()), newRequest("198.18.0.1:40000", "203.0.113.1:6882")
	g.HandleStream(q)
	if _, rejected, _ := q.outcome(); len(rejected) != 1 || rejected[0] != flow.RefuseReset {
		t.Errorf("it is answered by %v", rejected)
	}
	g.HandleStream(other)
	if _, rejected, _ := other.outcome(); len(rejected) != 1 || rejected[0] == flow.RefuseReset {
		t.Errorf("another port is answered by %v", rejected)
	}
}
