package incoming

import (
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/testkit"
)

// sameWorld is a mapper for any port, with a proxy that gives every port of TCP.
type sameWorld struct {
	t      *testing.T
	f      *fakeKeeper
	server *fakeServer
	m      *Manager
	b      *Mapper
	came   chan delivered
}

func newSameWorld(t *testing.T) *sameWorld {
	f, s := &fakeKeeper{}, &fakeServer{}
	m, came := start(t, s, f.config)
	return &sameWorld{t, f, s, m, NewMapper(m, &Spec{}), came}
}

// udp makes the program ask for a UDP port, which gets an outer one.
func (s *sameWorld) udp(port, outer uint16) {
	s.t.Helper()
	s.b.Map(ask(portmap.UDP, port, port))
	s.f.tell(appAt(port), route.Outer{At: at(outer)})
}

// works waits until the request is answered with an outer port.
func (s *sameWorld) works(w portmap.Want, outer uint16) {
	s.t.Helper()
	testkit.Eventually(s.t, at(outer).String(), func() bool { got, _ := s.b.Map(w); return got == at(outer) })
}

// listens waits until the proxy listens for a port of the program at these outer ports and no others.
func (s *sameWorld) listens(port uint16, outer ...uint16) {
	s.t.Helper()
	var got []netip.AddrPort
	if !testkit.Until(testkit.Patience, func() bool {
		s.m.mu.Lock()
		defer s.m.mu.Unlock()
		got = nil
		p, all := s.m.find(port), true
		for w := range p.waiting {
			got = append(got, w.at)
		}
		for _, o := range outer {
			all = all && p.listens(o)
		}
		return all && len(got) == len(outer) && p.asking == 0
	}) {
		s.t.Fatalf("the proxy listens for port %d at %v, want %d", port, got, outer)
	}
}

// A program that asks for UDP first gets the same number for TCP, unless it wants a certain one.
func TestSameNumber(t *testing.T) {
	s := newSameWorld(t)
	same, renewed, fixed := ask(portmap.TCP, 7000, 7000), ask(portmap.TCP, 7001, 5000), ask(portmap.TCP, 7002, 7002)
	fixed.Fixed = true
	for port := uint16(7000); port < 7003; port++ {
		s.udp(port, port+900)
	}
	s.works(same, 7900)
	s.listens(7000, 7900)
	s.works(renewed, 5000)
	s.listens(7001, 5000, 7901)
	s.works(fixed, 7002)
	s.listens(7002, 7002, 7902)
}

// A port of TCP that a program has been told stays when UDP gets a port, and another one. The proxy listens at that of UDP, too.
func TestToldPortStays(t *testing.T) {
	s := newSameWorld(t)
	w := ask(portmap.TCP, 7000, 7000)
	s.works(w, 7000)
	s.listens(7000, 7000)
	for _, outer := range []uint16{7700, 7701} {
		s.udp(7000, outer)
		s.listens(7000, 7000, outer)
		s.works(w, 7000)
	}
	s.b.Unmap(portmap.UDP, appAt(7000))
	s.listens(7000, 7000)
	s.works(w, 7000)
}

// When a peer has come at one of both ports, the proxy still listens at the other one, and soon at the first one again.
func TestBothPortsStay(t *testing.T) {
	s := newSameWorld(t)
	w := ask(portmap.TCP, 7000, 7000)
	s.works(w, 7000)
	s.udp(7000, 7700)
	peer := netip.MustParseAddrPort("192.0.2.1:1")
	for _, outer := range []uint16{7000, 7700} {
		s.listens(7000, 7000, 7700)
		s.server.connect(t, at(outer), peer)
		d := <-s.came
		s.server.free(outer)
		d.ended(relay.Result{})
	}
	s.listens(7000, 7000, 7700)
	s.works(w, 7000)
}

// A port of UDP at which the proxy cannot listen by TCP does no harm.
func TestNotAlso(t *testing.T) {
	s := newSameWorld(t)
	s.server.mu.Lock()
	s.server.taken = map[uint16]bool{7700: true}
	s.server.mu.Unlock()
	w := ask(portmap.TCP, 7000, 7000)
	s.works(w, 7000)
	s.udp(7000, 7700)
	before := s.server.asked()
	testkit.Eventually(t, "questions for the port", func() bool { return s.server.asked() > before+2 })
	s.listens(7000, 7000)
	s.works(w, 7000)
}

// When the proxy gives another port than that of the user, the user's is asked for again. A program keeps what it was told.
func TestPortComesLater(t *testing.T) {
	s := newSameWorld(t)
	s.server.mu.Lock()
	s.server.taken = map[uint16]bool{6882: true, 7000: true}
	s.server.mu.Unlock()
	s.m.Add(Spec{Port: 6882}, 6882)
	s.listens(6882, 40001)
	w := ask(portmap.TCP, 7000, 7000)
	testkit.Eventually(t, "another port", func() bool { _, state := s.b.Map(w); return state == portmap.Works })
	told, _ := s.b.Map(w)
	s.server.free(6882)
	s.server.free(7000)
	testkit.Eventually(t, "the user's port", func() bool { return s.m.Outer(6882) == at(6882) })
	testkit.Never(t, 10*retryFirst, "another port than the program was told", func() bool {
		got, _ := s.b.Map(w)
		return got != told
	})
}
