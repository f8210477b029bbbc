package dns

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestOwnName: in every mode, the name of the host is answered at once and nobody else is asked, even if a judge refuses all
// names.
func TestOwnName(t *testing.T) {
	four, six := netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd00::2")
	asked := netip.MustParseAddrPort("192.0.2.53:53")
	pool, _ := newTestPool(t, "198.18.0.0/15", time.Minute)
	for _, own := range []OwnName{{"host.internal", four, six}, {"host.internal", four, netip.Addr{}}} {
		for _, mode := range []Config{{}, {Relay: true}, {Fake: FakeConfig{Pool: pool}}} {
			mode.Dial, mode.Resolvers, mode.Own = dialTCP, []Resolver{OverTCP(asked)}, own
			s, err := New(mode)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				name string
				typ  dnsmessage.Type
				want []netip.Addr
			}{
				{"host.internal.", dnsmessage.TypeA, []netip.Addr{four}},
				{"HOST.internal.", dnsmessage.TypeA, []netip.Addr{four}},
				{"host.internal.", dnsmessage.TypeAAAA, []netip.Addr{own.V6}},
				{"host.internal.", dnsmessage.TypeALL, []netip.Addr{four, own.V6}},
				{"host.internal.", dnsmessage.TypeHTTPS, nil},
			} {
				msg := makeQuestion(t, c.name, 0, func(m *dnsmessage.Message) { m.Questions[0].Type = c.typ })
				var got []netip.Addr
				answers := 0
				s.HandleJudged(msg, asked, func(string, bool) bool { return false }, func(b []byte) {
					answers++
					var m dnsmessage.Message
					if err := m.Unpack(b); err != nil || m.RCode != dnsmessage.RCodeSuccess {
						t.Errorf("%s %v: %v, %v", c.name, c.typ, m.RCode, err)
					}
					for _, r := range m.Answers {
						switch a := r.Body.(type) {
						case *dnsmessage.AResource:
							got = append(got, netip.AddrFrom4(a.A))
						case *dnsmessage.AAAAResource:
							got = append(got, netip.AddrFrom16(a.AAAA))
						}
					}
				})
				var want []netip.Addr
				for _, a := range c.want {
					if a.IsValid() {
						want = append(want, a)
					}
				}
				if answers != 1 || len(got) != len(want) || len(got) > 0 && got[0] != want[0] {
					t.Errorf("%s %v: %d answers, %v, want %v", c.name, c.typ, answers, got, want)
				}
			}
			if n := s.Stats().Own; n != 5 {
				t.Errorf("%d answers are counted", n)
			}
			update := makeQuestion(t, "host.internal.", 0, func(m *dnsmessage.Message) { m.OpCode = 5; m.Questions = nil })
			s.HandleJudged(update, asked, nil, func([]byte) { t.Error("an UPDATE without a question was answered") })
		}
	}
}
