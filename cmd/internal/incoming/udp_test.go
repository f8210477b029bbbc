package incoming

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/testkit"
)

// fakeKeeper keeps mappings that are reached where the test says.
type fakeKeeper struct {
	mu    sync.Mutex
	tells map[netip.AddrPort]func(route.Outer)
	told  []string
	first route.Outer // told at once about each
}

func (f *fakeKeeper) keep(app netip.AddrPort, _ string, tell func(route.Outer)) func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tells == nil {
		f.tells = map[netip.AddrPort]func(route.Outer){}
	}
	f.tells[app] = tell
	if first := f.first; first != (route.Outer{}) {
		go tell(first)
	}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.tells, app)
	}
}

func (f *fakeKeeper) tell(app netip.AddrPort, o route.Outer) {
	f.mu.Lock()
	tell := f.tells[app]
	f.mu.Unlock()
	tell(o)
}

func (f *fakeKeeper) kept() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.tells)
}

func (f *fakeKeeper) config(c *Config) {
	c.KeepUDP, c.App = f.keep, appAt
	c.Announce = func(s Spec, at, _ netip.AddrPort) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if s.Proto == portmap.UDP {
			f.told = append(f.told, s.String()+" "+at.String())
		}
	}
}

// A program that asks for a UDP port gets the outer endpoint that is found for it, and learns why there is none.
func TestMapperUDP(t *testing.T) {
	f := &fakeKeeper{}
	m, _ := start(t, &fakeServer{}, f.config)
	b := NewMapper(m, &Spec{})
	w := ask(portmap.UDP, 7000, 7000)
	want := func(what string, outer netip.AddrPort, state portmap.State) {
		t.Helper()
		if at, s := b.Map(w); at != outer || s != state {
			t.Errorf("%s: %v, %v, want %v, %v", what, at, s, outer, state)
		}
	}
	none := netip.AddrPort{}
	want("at first", none, portmap.Wait)
	want("again", none, portmap.Wait)
	for _, tt := range []struct {
		now   route.Outer
		outer netip.AddrPort
		state portmap.State
	}{
		{route.Outer{At: at(7777)}, at(7777), portmap.Works},
		{route.Outer{At: at(7777), Filter: route.FilterClosed}, at(7777), portmap.Works},
		{route.Outer{}, none, portmap.Wait},
		{route.Outer{At: at(7778)}, at(7778), portmap.Works},
		{route.Outer{Err: errors.New("lost")}, none, portmap.Failed},
		{route.Outer{Err: errors.New("no UDP"), Cannot: true}, none, portmap.Unsupported},
	} {
		f.tell(w.App, tt.now)
		want("told", tt.outer, tt.state)
		ports := m.Ports()
		if s := ports[len(ports)-1]; s.Proto != portmap.UDP || s.Outer != tt.now.At || s.Filter != tt.now.Filter ||
			(s.Why == "") != (tt.now.Err == nil) {
			t.Errorf("%+v, want %+v", s, tt.now)
		}
	}
	told := []string{"7000/udp=proxy 203.0.113.1:7777", "7000/udp=proxy invalid AddrPort", "7000/udp=proxy 203.0.113.1:7778",
		"7000/udp=proxy invalid AddrPort"}
	if !slices.Equal(f.told, told) {
		t.Errorf("announced: %q", f.told)
	}
	b.Unmap(portmap.UDP, w.App)
	if f.kept() != 0 {
		t.Error("the mapping is still kept")
	}
}

// The user decides which ports may be asked for; those of --listen PORT/udp are kept from the start, and stay.
func TestMapperUDPAllowed(t *testing.T) {
	f := &fakeKeeper{}
	m, _ := start(t, &fakeServer{}, f.config)
	m.Add(Spec{Port: 6882, Proto: portmap.TCP}, 6882)
	m.mu.Lock()
	m.keepListed(Spec{Port: 6883, Upstream: "proxy", Proto: portmap.UDP})
	m.mu.Unlock()
	b := NewMapper(m, nil)
	for port, want := range map[uint16]portmap.State{
		6881: portmap.Wait, 6882: portmap.Forbidden, 6883: portmap.Wait, 7000: portmap.Forbidden,
	} {
		if _, state := b.Map(ask(portmap.UDP, port, 0)); state != want {
			t.Errorf("port %d: %v, want %v", port, state, want)
		}
		b.Unmap(portmap.UDP, appAt(port))
	}
	if f.kept() != 1 {
		t.Errorf("%d mappings are kept, want that of the user", f.kept())
	}
	all := NewMapper(m, &Spec{})
	for i := range maxUDP - 1 {
		if _, state := all.Map(ask(portmap.UDP, uint16(8000+i), 0)); state != portmap.Wait {
			t.Errorf("port %d: %v", i, state)
		}
	}
	if _, state := all.Map(ask(portmap.UDP, 9000, 0)); state != portmap.Full {
		t.Errorf("over the limit: %v", state)
	}
	m.cfg.KeepUDP = nil
	if _, state := all.Map(ask(portmap.UDP, 9000, 0)); state != portmap.Unsupported {
		t.Errorf("without UDP: %v", state)
	}
}

// Where the proxy does not know BIND, its address is found by UDP; loopback is no address for peers.
func TestMapperAddressByUDP(t *testing.T) {
	f, s := &fakeKeeper{first: route.Outer{At: at(7700)}}, &fakeServer{err: socks.ReplyCommandNotSupported}
	m, _ := start(t, s, f.config)
	b := NewMapper(m, &Spec{})
	testkit.Eventually(t, "the address", func() bool {
		a, state := b.External()
		return state == portmap.Works && a == at(0).Addr()
	})
	if f.kept() != 0 {
		t.Error("the mapping that was only for the address is still kept")
	}
	f.first = route.Outer{At: netip.MustParseAddrPort("127.0.0.1:7700")}
	testkit.Eventually(t, "the port", func() bool {
		outer, state := b.Map(ask(portmap.UDP, 7000, 0))
		return state == portmap.Works && outer == at(7700)
	})
	other := NewMapper(m, &Spec{})
	f.first = route.Outer{Err: errors.New("no"), Cannot: true}
	m.Remove(6881)
	b.Unmap(portmap.UDP, appAt(7000))
	testkit.Eventually(t, "the refusal", func() bool { _, state := other.External(); return state == portmap.Unsupported })
}

// A reload keeps and ends ports of --listen PORT/udp, and ends those that programs are no longer allowed to ask for.
func TestSetUDP(t *testing.T) {
	f := &fakeKeeper{}
	m, _ := start(t, &fakeServer{}, f.config)
	b := NewMapper(m, &Spec{})
	b.Map(ask(portmap.UDP, 6881, 0)) // allowed by --listen 6881
	b.Map(ask(portmap.UDP, 7000, 0)) // allowed by --listen auto
	want := func(what string, want ...string) {
		t.Helper()
		var got []string
		for _, p := range m.Ports() {
			if p.Proto == portmap.UDP {
				got = append(got, p.String())
			}
		}
		if !slices.Equal(got, want) || f.kept() != len(want) {
			t.Errorf("%s: %q, want %q; %d mappings are kept", what, got, want, f.kept())
		}
	}
	want("before", "6881/udp=proxy", "7000/udp=proxy")
	udp := func(port uint16, upstream string) Spec {
		return Spec{Port: port, Upstream: upstream, Proto: portmap.UDP}
	}
	m.Set([]Spec{{Port: 6881}, udp(6882, ""), {}}, "proxy")
	want("added", "6881/udp=proxy", "6882/udp=proxy", "7000/udp=proxy")
	f.tell(appAt(6882), route.Outer{At: at(7777)})
	m.Set([]Spec{udp(6882, "proxy"), udp(7000, ""), {}}, "proxy")
	want("6881 is no longer allowed", "6882/udp=proxy", "7000/udp=proxy")
	if ports := m.Ports(); ports[0].Outer != at(7777) {
		t.Errorf("the port that stays was disturbed: %+v", ports)
	}
	b.Unmap(portmap.UDP, appAt(7000)) // it is a port of the user now
	m.Set([]Spec{udp(6882, ""), udp(7000, "proxy"), {}}, "other")
	want("another upstream", "6882/udp=other", "7000/udp=proxy")
	m.Set(nil, "other")
	want("none")
	told := []string{"6882/udp=proxy 203.0.113.1:7777", "6882/udp=proxy invalid AddrPort"}
	if !slices.Equal(f.told, told) {
		t.Errorf("announced: %q", f.told)
	}
}
