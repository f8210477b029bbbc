package conform

import (
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// TestNAT: each behaviour of RFC 4787 is told from the others.
func TestNAT(t *testing.T) {
	e := startFar(t)
	kinds := []NAT{EndpointIndependent, AddressDependent, PortDependent}
	for i := range kinds {
		t.Run(string(kinds[i]), func(t *testing.T) {
			t.Parallel()
			r := &rogue{mapping: kinds[i], filtering: kinds[(i+1)%3]}
			p := newProber(config(startRogue(t, r), e))
			check(t, "mapping", p.mapping(t.Context()), r.mapping)
			check(t, "filtering", p.filtering(t.Context()), r.filtering)
		})
	}
}

func TestLargest(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for datagrams that do not arrive")
	}
	e := startFar(t)
	for name, tt := range map[string]struct {
		r         *rogue
		size, cut int
	}{
		"whole":   {&rogue{}, 65497, 0},
		"dropped": {&rogue{most: 8192}, 8192, 0},
		"small":   {&rogue{most: 300}, 300, 0},
		"cut":     {&rogue{cut: 2038}, 2038, 2038},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProber(config(startRogue(t, tt.r), e))
			for _, up := range []bool{true, false} {
				size, cut := p.largest(t.Context(), up)
				check(t, "size", size, tt.size)
				check(t, "cut", cut, tt.cut)
			}
		})
	}
}

func TestFates(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for datagrams that do not arrive")
	}
	e := startFar(t)
	for _, fate := range []Fate{Survives, Ended, Mute, NewPort} {
		t.Run(string(fate), func(t *testing.T) {
			t.Parallel()
			p := newProber(config(startRogue(t, &rogue{fate: fate, outlives: fate == Survives}), e))
			check(t, "port 0", p.fates(t.Context(), p.zero())["port 0"], fate)
			check(t, "ends with TCP", p.endsWithTCP(t.Context(), p.zero()), fate != Survives)
		})
	}
}

// TestUDPAnswers: an association that is refused, mute, or at an address of no use is named.
func TestUDPAnswers(t *testing.T) {
	e := startFar(t)
	ask := func(t *testing.T, f sockstest.Fault) UDPReport {
		t.Helper()
		s := startSockstest(t, e, func(r sockstest.Request) sockstest.Fault {
			if r.Cmd == sockstest.CmdAssociate {
				return f
			}
			return sockstest.Fault{}
		})
		c := config(server(t, s.Addr().String()), e)
		c.Wait = time.Second
		p := newProber(c)
		p.udp(t.Context())
		return p.report.UDP
	}
	u := ask(t, sockstest.Reply(7))
	check(t, "associate", u.Associate.String(), "7")
	check(t, "works", u.Works, false)

	nobody := sockstest.Addr{IP: netip.MustParseAddr("127.0.0.1"), Port: e.Refused.Port()}
	u = ask(t, sockstest.Bound(nobody))
	check(t, "associate", u.Associate.Kind, Granted)
	check(t, "works", u.Works, false)

	u = ask(t, sockstest.Bound(sockstest.Addr{Name: "relay.example", Port: e.Refused.Port()}))
	check(t, "repaired", u.Repaired, true)
}
