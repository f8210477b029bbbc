package dns

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The answers to a reserved name: our own, an error, nothing, and what another server says.
const answerOwn, answerNo, answerNone, answerAsked = "own", "NXDOMAIN", "NODATA", "asked"

// siteKind is a way to have questions answered. asked is the server that the program has asked.
type siteKind struct {
	what      string
	resolvers []Resolver
	relay     bool
	pool      *Pool
	asked     netip.AddrPort
}

// answer asks for a name. The server does not run: what a resolver would have been asked is dropped, or stays with it.
func (k siteKind) answer(t *testing.T, name string, typ dnsmessage.Type) string {
	t.Helper()
	s, err := New(
		Config{Dial: dialTCP, Resolvers: k.resolvers, Relay: k.relay, Fake: FakeConfig{Pool: k.pool}, Tor: fakeTor},
	)
	if err != nil {
		t.Fatal(err)
	}
	got := answerAsked
	s.HandleRelayed(
		makeQuestion(t, name, 0, func(m *dnsmessage.Message) { m.Questions[0].Type = typ }),
		k.asked,
		nil,
		nil,
		func(b []byte) {
			switch {
			case rcodeOf(t, b) == dnsmessage.RCodeNameError:
				got = answerNo
			case b[7] == 0:
				got = answerNone
			default:
				got = answerOwn
			}
		},
		func() func([]byte) { return func([]byte) { t.Error("answered later") } },
	)
	return got
}

// TestReservedNames: in no mode is a public resolver asked for names that nobody in the world has. Resolvers with private
// addresses are asked for those of their site.
func TestReservedNames(t *testing.T) {
	const own, no, none, asked = answerOwn, answerNo, answerNone, answerAsked
	public, private := netip.MustParseAddrPort("192.0.2.53:53"), netip.MustParseAddrPort("10.0.0.53:53")
	pool, _ := newTestPool(t, "198.18.0.0/15", time.Minute)
	kinds := []siteKind{
		{what: "public", resolvers: []Resolver{OverTCP(public)}},
		{what: "private", resolvers: []Resolver{OverTCP(private)}},
		{what: "both", resolvers: []Resolver{OverTCP(private), OverTCP(public)}},
		{what: "by name", resolvers: []Resolver{{Kind: TLS, Name: "dns.example", Addr: netip.AddrPortFrom(netip.Addr{}, 853)}}},
		{what: "relay to a public one", resolvers: []Resolver{OverTCP(public)}, relay: true, asked: public},
		{what: "relay to nobody", resolvers: []Resolver{OverTCP(public)}, relay: true},
		{what: "fake, private", resolvers: []Resolver{OverTCP(private)}, pool: pool},
		{what: "fake, relay to a public one", resolvers: []Resolver{OverTCP(private)}, relay: true, pool: pool, asked: public},
		{what: "fake, relay to a private one", resolvers: []Resolver{OverTCP(public)}, relay: true, pool: pool, asked: private},
		{what: "Tor", resolvers: []Resolver{{Kind: Tor}}},
	}
	all := [10]string{asked, asked, asked, asked, asked, asked, asked, asked, asked, asked}
	// The columns are those of kinds.
	for _, tt := range []struct {
		name string
		typ  dnsmessage.Type
		want [10]string
	}{
		{"localhost.", dnsmessage.TypeA, [10]string{own, own, own, own, asked, own, own, own, own, own}},
		{"x.invalid.", dnsmessage.TypeA, [10]string{no, no, no, no, asked, no, no, no, no, no}},
		{"x.onion.", dnsmessage.TypeA, [10]string{no, no, no, no, asked, no, no, no, no, asked}},
		{"x.onion.", dnsmessage.TypeTXT, [10]string{no, no, no, no, asked, no, no, no, no, none}},
		{"a printer.local.", dnsmessage.TypeSRV, [10]string{no, asked, no, no, asked, no, asked, no, asked, no}},
		{"dc.LOCAL.", dnsmessage.TypeA, [10]string{no, asked, no, no, asked, no, asked, no, asked, no}},
		{"nas.home.arpa.", dnsmessage.TypeAAAA, [10]string{no, asked, no, no, asked, no, asked, no, asked, no}},
		{"1.2.0.10.in-addr.arpa.", dnsmessage.TypePTR, [10]string{no, asked, no, no, asked, no, asked, no, asked, no}},
		{"b._dns-sd._udp.2.0.10.in-addr.arpa.", dnsmessage.TypePTR, [10]string{no, asked, no, no, asked, no, asked, no, asked,
			no}},
		{"1.3.0.192.in-addr.arpa.", dnsmessage.TypePTR, all},
		{"example.", dnsmessage.TypeMX, all},
		{"1.1.18.198.in-addr.arpa.", dnsmessage.TypePTR, [10]string{asked, asked, asked, asked, asked, asked, no, no, no, asked}},
	} {
		for i, k := range kinds {
			got := k.answer(t, tt.name, tt.typ)
			if got != tt.want[i] {
				t.Errorf("%s: %s %v: %s, want %s", k.what, tt.name, tt.typ, got, tt.want[i])
			}
		}
	}
}
