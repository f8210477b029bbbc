package route

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// dnsText asks for the TXT records of example.com, which no fake address can answer.
var dnsText = dnsQuestion[:len(dnsQuestion)-4] + "\x00\x10\x00\x01"

// relayedName is a case of TestRelayedToName.
type relayedName struct {
	relay bool
	name  string // that the asked address stands for; empty: none
	want  Dest   // zero: nobody is asked
}

// TestRelayedToName: with RelayDNS a question to a fake address is carried to the server that has the name, over TCP, whether
// the app asked by UDP or by TCP, and by the rules for the name. Every other question to the pool goes to the resolver.
func TestRelayedToName(t *testing.T) {
	res := netip.MustParseAddrPort("192.0.2.53:53")
	byName, toResolver := Dest{Addr: netip.AddrPortFrom(netip.Addr{}, 53), Name: "ns.example"}, Dest{Addr: res}
	for what, tt := range map[string]relayedName{
		"a name":           {true, "ns.example", byName},
		"a rejected name":  {true, "ns.bad.example", Dest{}},
		"no name":          {true, "", toResolver},
		"a name, no relay": {false, "ns.example", toResolver},
	} {
		t.Run(what, func(t *testing.T) { tt.check(t, res) })
	}
}

func (tt relayedName) check(t *testing.T, res netip.AddrPort) {
	testkit.CheckLeaks(t)
	s := newNameServers(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(s.tcp, s.tcp)
	pool, dialed := newPool(t), make(chan Dest, 4)
	g := newRig(t, Config{
		Upstreams: []Upstream{namedUpstream{NewSOCKS("p", client), s.tcp, dialed}}, Default: "p", Pool: pool, Fake: true,
		RelayDNS: tt.relay, Resolvers: []dns.Resolver{dns.OverTCP(res)}, Rules: []Rule{mustRule(t, "name .bad.example reject")},
	}, nil)
	v4, v6 := netip.MustParseAddr("198.18.0.9"), flow.Pool6.Addr().Next().Next()
	if tt.name != "" {
		v4, v6, _ = pool.Give([]byte(tt.name))
	}
	answer := func(q string) string {
		if tt.want == (Dest{}) {
			return q[:2] + "\x81\x02" + q[4:] // SERVFAIL
		}
		return q[:2] + "\x81\x80" + q[4:]
	}
	g.send("10.0.0.1:5000", at(v4, 53), dnsText)
	g.wantPacket(t, at(v4, 53), "10.0.0.1:5000", answer(dnsText))

	framed := func(q string) string { return string(binary.BigEndian.AppendUint16(nil, uint16(len(q)))) + q }
	other := strings.Replace(dnsText, "example", "exampl2", 1)
	q := newRequest(appEnd, at(v6, 53))
	g.HandleStream(q)
	app := opened(t, q)
	app.send(framed(other), true)
	testkit.Eventually(
		t,
		"the answer over TCP",
		func() bool { b, _ := app.received(); return b == framed(answer(other)) },
	)

	if n := s.byUDP.Load(); n > 0 {
		t.Errorf("%d questions went by UDP", n)
	}
	asked := len(dialed)
	for range asked {
		if d := <-dialed; d != tt.want {
			t.Errorf("asked was %+v, want %+v", d, tt.want)
		}
	}
	if (asked > 0) != (tt.want != Dest{}) {
		t.Errorf("%d servers were asked", asked)
	}
}
