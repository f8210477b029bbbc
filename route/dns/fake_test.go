package dns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

func newFake(t testing.TB, change func(*FakeConfig)) *fake {
	t.Helper()
	p, _ := newTestPool(t, "198.18.0.0/15", 10*time.Second)
	c := FakeConfig{Pool: p}
	if change != nil {
		change(&c)
	}
	return &fake{pool: p, config: c}
}

// fakeAnswer is what f says to a question, in one line, and checks what holds for every answer.
func fakeAnswer(t testing.TB, f *fake, name string, typ dnsmessage.Type, edns int) string {
	t.Helper()
	msg := makeQuestion(t, name, edns, func(m *dnsmessage.Message) { m.Questions[0].Type = typ })
	q, v, _ := parseQuestion(msg)
	if v != accept {
		t.Fatalf("%s: the question is malformed", name)
	}
	out, o := f.answer([]byte("before"), msg, &q, false)
	if !bytes.HasPrefix(out, []byte("before")) {
		t.Fatalf("%s: what stood there before is gone", name)
	}
	if out = out[6:]; o == passed {
		if len(out) > 0 {
			t.Errorf("%s: passed on, with %x", name, out)
		}
		return "resolver"
	}
	if len(out) > minUDPSize {
		t.Errorf("%s: %d bytes", name, len(out))
	}
	var m dnsmessage.Message
	if err := m.Unpack(out); err != nil {
		t.Fatalf("%s: %x: %v", name, out, err)
	}
	if m.ID != 0x1234 || !m.Response || !m.RecursionDesired || !m.RecursionAvailable || m.Authoritative || m.Truncated {
		t.Errorf("%s: header %+v", name, m.Header)
	}
	if m.Questions[0].Name.String() != name || m.Questions[0].Type != typ {
		t.Errorf("%s: the question became %v", name, m.Questions[0])
	}
	if len(m.Additionals) == 1 != (edns > 0) {
		t.Errorf("%s: EDNS is %d, and the answer has %v", name, edns, m.Additionals)
	}
	s := strings.TrimPrefix(m.RCode.String(), "RCode")
	for _, r := range m.Answers {
		if r.Header.Name.String() != name || r.Header.Class != dnsmessage.ClassINET {
			t.Errorf("%s: record of %v", name, r.Header)
		}
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			s += fmt.Sprintf(" %v", netip.AddrFrom4(b.A))
		case *dnsmessage.AAAAResource:
			s += fmt.Sprintf(" %v", netip.AddrFrom16(b.AAAA))
		case *dnsmessage.PTRResource:
			s += " " + b.PTR.String()
		}
		s += fmt.Sprintf("/%d", r.Header.TTL)
	}
	if len(m.Authorities) > 0 {
		s += " SOA"
	}
	return s
}

func TestFakeAnswers(t *testing.T) {
	const (
		a    = "Success 198.18.1.0/10"
		aaaa = "Success fd76:6961:736f:636b::100/10"
		no   = "NameError SOA"
		none = "Success SOA"
		svcb = dnsmessage.Type(typeSVCB)
		http = dnsmessage.Type(typeHTTPS)
	)
	f := newFake(t, func(c *FakeConfig) {
		c.Real = func(name []byte) bool { return hasSuffix(name, "real.example") }
	})
	for _, tt := range []struct {
		name string
		typ  dnsmessage.Type
		want string
	}{
		{"wWw.eXample.com.", dnsmessage.TypeA, a},
		{"www.example.COM.", dnsmessage.TypeAAAA, aaaa},
		{"www.example.com.", dnsmessage.TypeALL, a + " fd76:6961:736f:636b::100/10"},
		{"www.example.com.", http, none},
		{"www.example.com.", svcb, none},
		{"www.example.com.", dnsmessage.TypeMX, "resolver"},
		{"www.example.com.", dnsmessage.TypeTXT, "resolver"},
		{"_sip._udp.example.com.", dnsmessage.TypeSRV, "resolver"},
		{"0.1.18.198.in-addr.arpa.", dnsmessage.TypePTR, "Success www.example.com./10"},
		{"0.1.18.198.IN-ADDR.arpa.", dnsmessage.TypeTXT, none},
		{"0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.b.6.3.6.f.6.3.7.1.6.9.6.6.7.d.f.ip6.arpa.", dnsmessage.TypePTR,
			"Success www.example.com./10"},
		{"1.1.18.198.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"18.198.in-addr.arpa.", dnsmessage.TypeSOA, no},
		{"198.in-addr.arpa.", dnsmessage.TypeSOA, "resolver"},

		{"real.example.", dnsmessage.TypeA, "resolver"},
		{"a.Real.example.", dnsmessage.TypeAAAA, "resolver"},
		{"unreal.example.", dnsmessage.TypeHINFO, "resolver"},
		{".", dnsmessage.TypeNS, "resolver"},
		{"a b.example.", dnsmessage.TypeA, "resolver"},

		// RFC 6761, 6762, 7686, 8375, 9462.
		{"localhost.", dnsmessage.TypeA, "Success 127.0.0.1/3600"},
		{"a.LOCALHOST.", dnsmessage.TypeAAAA, "Success ::1/3600"},
		{"localhost.", dnsmessage.TypeMX, none},
		{"invalid.", dnsmessage.TypeA, no},
		{"printer.Local.", dnsmessage.TypeA, no},
		{"_http._tcp.local.", dnsmessage.TypePTR, no},
		{"hidden.ONION.", dnsmessage.TypeA, no},
		{"home.arpa.", dnsmessage.TypeSOA, none},
		{"nas.home.arpa.", dnsmessage.TypeA, no},
		{"_dns.resolver.arpa.", svcb, none},
		{"ipv4only.arpa.", dnsmessage.TypeAAAA, "resolver"},
		// RFC 6303.
		{"4.3.2.10.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"10.in-addr.arpa.", dnsmessage.TypeSOA, no},
		{"1.16.172.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"1.32.172.in-addr.arpa.", dnsmessage.TypePTR, "resolver"},
		{"172.in-addr.arpa.", dnsmessage.TypeSOA, "resolver"},
		{"1.168.192.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"1.0.0.127.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"c.f.ip6.arpa.", dnsmessage.TypeSOA, "resolver"},
		{"d.f.ip6.arpa.", dnsmessage.TypeSOA, no},
		{"8.e.f.ip6.arpa.", dnsmessage.TypeSOA, no},
		{"1." + strings.Repeat("0.", 31) + "ip6.arpa.", dnsmessage.TypePTR, no},
		{"2." + strings.Repeat("0.", 31) + "ip6.arpa.", dnsmessage.TypePTR, "resolver"},
		// What only looks like a reverse name.
		{"1.2.3.4.5.in-addr.arpa.", dnsmessage.TypePTR, "resolver"},
		{"0/25.2.0.198.in-addr.arpa.", dnsmessage.TypePTR, "resolver"},
		{"01.in-addr.arpa.", dnsmessage.TypePTR, "resolver"},
		// What stands below a reverse zone of a private network is in it.
		{"256.10.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"0/25.2.0.10.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"lb._dns-sd._udp.0.1.168.192.in-addr.arpa.", dnsmessage.TypePTR, no},
		{"gg.d.f.ip6.arpa.", dnsmessage.TypePTR, no},
		{"a.0.1.18.198.in-addr.arpa.", dnsmessage.TypePTR, no},
		// A label may hold any byte.
		{"A printer._ipp._tcp.local.", dnsmessage.TypeSRV, no},
		{"in-addr.arpa.", dnsmessage.TypeNS, "resolver"},
		{"arpa.", dnsmessage.TypeNS, "resolver"},
		// A proxy would take it for an address.
		{"127.0.0.1.", dnsmessage.TypeA, no},
		{"127.1.", dnsmessage.TypeAAAA, no},
		{"0x7f000001.", dnsmessage.TypeA, no},
	} {
		for _, edns := range []int{0, 1232} {
			if got := fakeAnswer(t, f, tt.name, tt.typ, edns); got != tt.want {
				t.Errorf("%s %v: %s, want %s", tt.name, tt.typ, got, tt.want)
			}
		}
	}
	if n := f.pool.Stats().Names; n != 1 {
		t.Errorf("%d names have an address, one was asked for", n)
	}
}

func TestFakeOptions(t *testing.T) {
	f := newFake(t, nil)
	if got := fakeAnswer(t, f, "intranet.", dnsmessage.TypeA, 0); got != "Success 198.18.1.0/10" {
		t.Error(got)
	}
	f = newFake(t, func(c *FakeConfig) {
		c.NoSingleLabels, c.Onion = true, func() bool { return true }
		c.IPv6 = func([]byte) bool { return false }
	})
	for _, tt := range []struct {
		name string
		typ  dnsmessage.Type
		want string
	}{
		{"intranet.", dnsmessage.TypeA, "NameError SOA"},
		{"hidden.onion.", dnsmessage.TypeA, "Success 198.18.1.0/10"},
		{"hidden.onion.", dnsmessage.TypeAAAA, "Success SOA"},
		{"hidden.onion.", dnsmessage.TypeALL, "Success 198.18.1.0/10"},
		{"hidden.onion.", dnsmessage.TypeTXT, "Success SOA"},
	} {
		if got := fakeAnswer(t, f, tt.name, tt.typ, 0); got != tt.want {
			t.Errorf("%s %v: %s, want %s", tt.name, tt.typ, got, tt.want)
		}
	}
}

func TestFakePoolIsFull(t *testing.T) {
	p, _ := newTestPool(t, "198.18.0.0/23", time.Minute)
	f := &fake{pool: p, config: FakeConfig{Pool: p}}
	for i := range 256 {
		if got := fakeAnswer(t, f, fmt.Sprintf("n%d.example.", i), dnsmessage.TypeA, 0); !strings.HasPrefix(got, "Success") {
			t.Fatal(got)
		}
	}
	if got := fakeAnswer(t, f, "more.example.", dnsmessage.TypeA, 0); got != "ServerFailure" {
		t.Error(got)
	}
}

// TestFakeClassAndVersion: other classes are for the resolver; a version of EDNS that is not 0 is told so.
func TestFakeClassAndVersion(t *testing.T) {
	f := newFake(t, nil)
	msg := makeQuestion(t, "a.example.", 0, func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS })
	q, _, _ := parseQuestion(msg)
	if out, o := f.answer(nil, msg, &q, false); o != passed || len(out) > 0 {
		t.Errorf("class CH: %x", out)
	}
	msg = makeQuestion(t, "a.example.", 1232, nil)
	msg[len(msg)-5] = 3 // the version
	q, _, _ = parseQuestion(msg)
	out, _ := f.answer(nil, msg, &q, false)
	var m dnsmessage.Message
	if err := m.Unpack(out); err != nil || len(m.Answers) > 0 || m.Additionals[0].Header.ExtendedRCode(m.RCode) != 16 {
		t.Errorf("%v %+v", err, m)
	}
}

func TestFakeAllocatesNothing(t *testing.T) {
	f := newFake(t, nil)
	buf := make([]byte, 0, maxFakeAnswer)
	for _, name := range []string{"www.example.com.", "0.1.18.198.in-addr.arpa.", "a.local."} {
		msg := makeQuestion(t, name, 1232, nil)
		q, _, _ := parseQuestion(msg)
		if n := testing.AllocsPerRun(100, func() { f.answer(buf, msg, &q, false) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if testing.AllocsPerRun(10, func() { parseQuestion(makeQ) }) > 0 {
		t.Error("parsing allocates")
	}
}

// TestFakeServer: what the pool answers makes no connection and needs no running server; what it does not goes to the resolver.
func TestFakeServer(t *testing.T) {
	testkit.CheckLeaks(t)
	resolver := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 1) })
	p, _ := newTestPool(t, "198.18.0.0/15", time.Minute)
	cfg := Config{Resolvers: []Resolver{OverTCP(resolver.addr())}, Dial: dialTCP, Fake: FakeConfig{Pool: p}}
	still, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	msg := makeQuestion(t, "www.example.com.", 1232, nil)
	if b := ask(t, still, msg); rcodeOf(t, b) != 0 || b[7] != 1 {
		t.Errorf("%x", b)
	}
	got := 0
	reply := func(b []byte) { got += len(b) }
	// the race detector drops what is pooled
	if n := testing.AllocsPerRun(100, func() { still.Handle(msg, netip.AddrPort{}, reply) }); n >= 1 {
		t.Errorf("%v allocations for a question", n)
	}
	s := start(t, cfg)
	ask(t, s, msg)
	if n := resolver.conns.Load(); n != 0 {
		t.Errorf("%d connections for an address", n)
	}
	mx := makeQuestion(t, "www.example.com.", 0, func(m *dnsmessage.Message) { m.Questions[0].Type = dnsmessage.TypeMX })
	if b := ask(t, s, mx); rcodeOf(t, b) != 0 || b[7] != 1 {
		t.Errorf("MX: %x", b)
	}
	if st := s.Stats(); st.Questions != 2 || st.Own != 1 || st.Answered != 1 || st.Connections != 1 {
		t.Errorf("%+v", st)
	}
}

// TestFakeServerFlood: 100,000 distinct names at once keep to the pool, and the names of before keep their addresses.
func TestFakeServerFlood(t *testing.T) {
	p, _ := newTestPool(t, "198.18.0.0/20", time.Minute)
	s, err := New(
		Config{Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))}, Dial: dialTCP, Fake: FakeConfig{Pool: p}},
	)
	if err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(ask(t, s, makeQuestion(t, "mine.example.", 0, nil)))
	ok, failed := 0, 0
	for i := range 100_000 {
		s.Handle(makeQuestion(t, fmt.Sprintf("n%d.example.", i), 0, nil), netip.AddrPort{}, func(b []byte) {
			if b[3]&15 == rcodeServer {
				failed++
			} else {
				ok++
			}
		})
	}
	if size := p.Stats().Size; ok != size-1 || failed != 100_000-ok {
		t.Errorf("%d answered and %d failed, with a pool of %d", ok, failed, size)
	}
	if after := ask(t, s, makeQuestion(t, "mine.example.", 0, nil)); !bytes.Equal(before, after) {
		t.Errorf("the answer was %x and became %x", before, after)
	}
	if st := s.Stats(); st.Failed != uint64(failed) {
		t.Errorf("%+v", st)
	}
}

var makeQ = append(binary.BigEndian.AppendUint16(nil, 1), "\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01"...)

func FuzzFake(f *testing.F) {
	f.Add(makeQuestion(f, "www.example.com.", 1232, nil))
	f.Add(
		makeQuestion(f, "0.1.18.198.in-addr.arpa.", 0, func(m *dnsmessage.Message) { m.Questions[0].Type = dnsmessage.TypePTR }),
	)
	f.Add(makeQuestion(f, "0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.b.6.3.6.f.6.3.7.1.6.9.6.6.7.d.f.ip6.arpa.", 0, nil))
	f.Add(makeQuestion(f, strings.Repeat(strings.Repeat("a", 63)+".", 3)+strings.Repeat("b", 61)+".", 0, nil))
	fk := newFake(f, nil)
	fk.pool.Give([]byte(strings.Repeat("a.", 126) + "a"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, v, _ := parseQuestion(msg)
		if v != accept || !q.isQuery() {
			return
		}
		out, o := fk.answer(nil, msg, &q, false)
		if o == passed {
			return
		}
		if len(out) > minUDPSize+maxName || len(out) > maxFakeAnswer {
			t.Fatalf("%d bytes to %x", len(out), msg)
		}
		if !bytes.Equal(out[headerLen:q.end], msg[headerLen:q.end]) {
			t.Fatalf("the question of %x became %x", msg, out)
		}
		var m dnsmessage.Message
		if err := m.Unpack(out); err != nil && !strings.Contains(err.Error(), "name") {
			t.Fatalf("%x became %x: %v", msg, out, err)
		}
		if !matches(out, msg, q) {
			t.Fatalf("%x is no answer to %x", out, msg)
		}
	})
}

func BenchmarkFake(b *testing.B) {
	f := newFake(b, nil)
	buf := make([]byte, 0, maxFakeAnswer)
	msg := makeQuestion(b, "www.example.com.", 1232, nil)
	b.ReportAllocs()
	for b.Loop() {
		q, _, _ := parseQuestion(msg)
		f.answer(buf, msg, &q, false)
	}
}
