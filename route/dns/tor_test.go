package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// fakeTor knows some names.
func fakeTor(ctx context.Context, name string, ip netip.Addr, done func(netip.Addr, string, error)) {
	switch {
	case name == "a.example":
		done(netip.MustParseAddr("::ffff:192.0.2.1"), "", nil)
	case name == "six.example":
		done(netip.MustParseAddr("2001:db8::1"), "", nil)
	case ip == netip.MustParseAddr("192.0.3.1"),
		ip == netip.MustParseAddr("2001:db9::1"): // the reverse zones of examples are local
		done(netip.Addr{}, "Host.Example.", nil)
	case ip == netip.MustParseAddr("192.0.3.2"):
		done(netip.Addr{}, "not a host", nil)
	case name == "slow.example":
		context.AfterFunc(ctx, func() { done(netip.Addr{}, "", ctx.Err()) })
	case name == "cannot.example":
		done(netip.Addr{}, "", fmt.Errorf("reply 1: %w", ErrNoAnswer))
	case name == "broken.example":
		done(netip.Addr{}, "", errors.New("connection refused"))
	default:
		done(netip.Addr{}, "", ErrNoName)
	}
}

func TestTor(t *testing.T) {
	testkit.CheckLeaks(t)
	next := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 3) })
	const reverse6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.9.b.d.0.1.0.0.2.ip6.arpa."
	for _, tt := range []struct {
		name string
		typ  dnsmessage.Type
		want string // with a Tor alone
		next bool   // the resolver behind the Tor answers, if there is one
	}{
		{"A.example.", dnsmessage.TypeA, "RCodeSuccess 192.0.2.1", false},
		{"a.example.", dnsmessage.TypeAAAA, "RCodeSuccess", false},
		{"six.example.", dnsmessage.TypeAAAA, "RCodeSuccess 2001:db8::1", false},
		{"six.example.", dnsmessage.TypeA, "RCodeSuccess", false},
		{"1.3.0.192.in-addr.arpa.", dnsmessage.TypePTR, "RCodeSuccess host.example.", false},
		{reverse6, dnsmessage.TypePTR, "RCodeSuccess host.example.", false},
		{"2.3.0.192.in-addr.arpa.", dnsmessage.TypePTR, "RCodeSuccess", false},
		{"3.0.192.in-addr.arpa.", dnsmessage.TypePTR, "RCodeNameError", false},
		{"none.example.", dnsmessage.TypeA, "RCodeNameError", false},
		{"a b.example.", dnsmessage.TypeA, "RCodeNameError", false},
		{"cannot.example.", dnsmessage.TypeA, "RCodeServerFailure", true},
		{"a.example.", dnsmessage.TypeMX, "RCodeServerFailure", true},
		{"slow.example.", dnsmessage.TypeA, "RCodeServerFailure", true},
	} {
		for _, alone := range []bool{true, false} {
			cfg := Config{Resolvers: []Resolver{{Kind: Tor}}, Tor: fakeTor, Timeout: 2 * time.Second}
			if !alone {
				cfg.Resolvers = append(cfg.Resolvers, OverTCP(next.addr()))
			}
			s := start(t, cfg)
			var m dnsmessage.Message
			b := ask(t, s, makeQuestion(t, tt.name, 1232, func(m *dnsmessage.Message) { m.Questions[0].Type = tt.typ }))
			if err := m.Unpack(b); err != nil || m.ID != 0x1234 || !m.Response || m.Questions[0].Name.String() != tt.name {
				t.Fatalf("%s %v: %v, %+v", tt.name, tt.typ, err, m)
			}
			got := m.RCode.GoString()
			for _, a := range m.Answers {
				switch r := a.Body.(type) {
				case *dnsmessage.AResource:
					got += " " + netip.AddrFrom4(r.A).String()
				case *dnsmessage.AAAAResource:
					got += " " + netip.AddrFrom16(r.AAAA).String()
				case *dnsmessage.PTRResource:
					got += " " + r.PTR.String()
				}
			}
			got = strings.TrimPrefix(got, "dnsmessage.")
			if want := tt.want; (alone || !tt.next) && got != want || !alone && tt.next && len(m.Answers) != 3 {
				t.Errorf("%s %v, alone %v: %s, want %s", tt.name, tt.typ, alone, got, want)
			}
		}
	}
	if _, err := New(Config{Dial: dialTCP, Resolvers: []Resolver{{Kind: Tor}}}); err == nil {
		t.Error("a Tor that cannot be asked is taken")
	}
}

// TestTorFails: a Tor that does not work leaves the questions to the next resolver, and is left alone.
func TestTorFails(t *testing.T) {
	testkit.CheckLeaks(t)
	next := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 1) })
	var asked atomic.Int32
	s := start(t, Config{Resolvers: []Resolver{{Kind: Tor}, OverTCP(next.addr())},
		Tor: func(_ context.Context, _ string, _ netip.Addr, done func(netip.Addr, string, error)) {
			asked.Add(1)
			done(netip.Addr{}, "", errors.New("connection refused"))
		}})
	for range 5 {
		askMany(t, s, 1)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the Tor was asked %d times", n)
	}
}
