package dns

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// udpServer answers datagrams on loopback by what its function says; nil is no answer.
func udpServer(t *testing.T, answer func(query []byte) []byte) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		buf := make([]byte, 4096)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if b := answer(buf[:n]); b != nil {
				_, _ = c.WriteToUDPAddrPort(b, from)
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-over })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// one answers with one address.
func one(t *testing.T, n byte) func(q []byte) []byte {
	return func(q []byte) []byte {
		return respond(t, q, func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(m.Questions[0].Name.String(), 300, addr4(n)))
		})
	}
}

func dialDirect(ctx context.Context, network, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, address)
}

// answerOf is the last byte of the first address of an answer; 0: it has none.
func answerOf(t *testing.T, b []byte) byte {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	if len(m.Answers) == 0 {
		return 0
	}
	a, _ := m.Answers[0].Body.(*dnsmessage.AResource)
	return a.A[3]
}

// TestZones: the longest suffix decides who is asked, also where names have fake addresses; what a rule sends direct is asked of
// the host's servers, and what neither is about has a fake address.
func TestZones(t *testing.T) {
	testkit.CheckLeaks(t)
	def := newFakeResolver(t, one(t, 1))
	corp := newFakeResolver(t, one(t, 2))
	lab := udpServer(t, one(t, 3))
	host := udpServer(t, one(t, 4))
	cfg := Config{
		Resolvers: []Resolver{OverTCP(def.addr())},
		Zones: []Zone{
			{Suffix: "corp.example", Resolvers: []Resolver{OverTCP(corp.addr())}},
			{Suffix: "lab.corp.example", Direct: []DirectServer{{Addr: lab}}},
			{Suffix: "lan"},
			{Suffix: "10.in-addr.arpa", Resolvers: []Resolver{OverTCP(corp.addr())}},
		},
		HostServers: func() []DirectServer { return []DirectServer{{Addr: host}} },
		HostNames:   func(name []byte) bool { return strings.HasSuffix(string(name), "direct.example") },
		DialDirect:  dialDirect,
	}
	for _, fake := range []bool{false, true} {
		if fake {
			cfg.Fake = FakeConfig{Real: func(name []byte) bool { return string(name) == "real.example" }}
			cfg.Fake.Pool, _ = newTestPool(t, "198.18.0.0/15", time.Second)
		}
		s := start(t, cfg)
		for name, want := range map[string]byte{
			"corp.example.":         2,
			"www.CORP.example.":     2,
			"xcorp.example.":        1,
			"lab.corp.example.":     3,
			"a.b.lab.corp.example.": 3,
			"xlab.corp.example.":    2,
			"printer.lan.":          4,
			"lan.example.":          1,
			"www.direct.example.":   4,
			"real.example.":         1,
			"example.":              1,
			"1.2.10.in-addr.arpa.":  2,
		} {
			b := ask(t, s, makeQuestion(t, name, 0, nil))
			if got := answerOf(t, b); fake && want == 1 && name != "real.example." {
				if m := new(dnsmessage.Message); m.Unpack(b) != nil || m.Answers[0].Body.(*dnsmessage.AResource).A[0] != 198 {
					t.Errorf("%s has no fake address", name)
				}
			} else if got != want {
				t.Errorf("fake %v: %s was asked of %d, want %d", fake, name, got, want)
			}
		}
		if b := ask(t, s, makeQuestion(t, "localhost.", 0, nil)); b[7] != 1 || answerOf(t, b) != 1 || b[len(b)-4] != 127 {
			t.Errorf("localhost: %x", b)
		}
	}
}

// TestDirect: a server past the upstream that is silent, refuses, is not there, answers something else or cuts its answer.
func TestDirect(t *testing.T) {
	testkit.CheckLeaks(t)
	silent := udpServer(t, func([]byte) []byte { return nil })
	refuses := udpServer(t, func(q []byte) []byte {
		return respond(t, q, func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeRefused })
	})
	works := udpServer(t, one(t, 7))
	var asked atomic.Int32
	lossy := udpServer(t, func(q []byte) []byte {
		if asked.Add(1) == 1 {
			return nil
		}
		return one(t, 8)(q)
	})
	forged := udpServer(t, func(q []byte) []byte { b := one(t, 9)(q); b[1]++; return b })
	tcp := newFakeResolver(t, func(q []byte) []byte {
		return respond(t, q, func(m *dnsmessage.Message) {
			for range 100 {
				m.Answers = append(m.Answers, record(m.Questions[0].Name.String(), 0, addr4(6)))
			}
		})
	})
	nobody := netip.MustParseAddrPort("127.0.0.1:9")
	for _, tt := range []struct {
		what    string
		servers []DirectServer
		rcode   dnsmessage.RCode
		n       byte
	}{
		{"works", []DirectServer{{Addr: works}}, 0, 7},
		{"nobody, works", []DirectServer{{Addr: nobody}, {Addr: works}}, 0, 7},
		{"silent, works", []DirectServer{{Addr: silent}, {Addr: works}}, 0, 7},
		{"refuses, works", []DirectServer{{Addr: refuses}, {Addr: works}}, 0, 7},
		{"forged, works", []DirectServer{{Addr: forged}, {Addr: works}}, 0, 7},
		{"refuses", []DirectServer{{Addr: refuses}}, dnsmessage.RCodeRefused, 0},
		{"lossy", []DirectServer{{Addr: lossy}}, 0, 8},
		{"nobody", []DirectServer{{Addr: nobody}, {Addr: nobody, TCP: true}}, dnsmessage.RCodeServerFailure, 0},
		{"none", nil, dnsmessage.RCodeServerFailure, 0},
		{"TCP", []DirectServer{{Addr: tcp.addr(), TCP: true}}, 0, 6},
	} {
		t.Run(tt.what, func(t *testing.T) {
			s := start(t, Config{
				Resolvers: []Resolver{OverTCP(nobody)}, Timeout: 4 * time.Second, DialDirect: dialDirect,
				Zones: []Zone{{Suffix: "a"}}, HostServers: func() []DirectServer { return tt.servers },
			})
			b := ask(t, s, makeQuestion(t, "a.", 0, nil))
			if rc := rcodeOf(t, b); rc != tt.rcode || answerOf(t, b) != tt.n {
				t.Errorf("%v, from %d", rc, answerOf(t, b))
			}
		})
	}
}

// TestDirectWhole: what does not fit a datagram comes by TCP, of the same server.
func TestDirectWhole(t *testing.T) {
	testkit.CheckLeaks(t)
	tcp := newFakeResolver(t, func(q []byte) []byte {
		return respond(t, q, func(m *dnsmessage.Message) {
			for range 100 {
				m.Answers = append(m.Answers, record(m.Questions[0].Name.String(), 300, addr4(6)))
			}
		})
	})
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.addr()))
	if err != nil {
		t.Skip("the port is taken:", err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		buf := make([]byte, 4096)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(respond(t, buf[:n], func(m *dnsmessage.Message) { m.Truncated = true }), from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-over })
	s := start(t, Config{
		Resolvers: []Resolver{OverTCP(tcp.addr())}, DialDirect: dialDirect,
		Zones: []Zone{{Suffix: "a", Direct: []DirectServer{{Addr: tcp.addr()}}}},
	})
	got := make(chan int, 1)
	s.Ask(makeQuestion(t, "a.", 0, nil), func(b []byte) {
		var m dnsmessage.Message
		_ = m.Unpack(b)
		got <- len(m.Answers)
	})
	if n := <-got; n != 100 {
		t.Errorf("%d answers", n)
	}
}

// TestDirectBound: no more than maxDirect questions have a goroutine, and the end of Run ends them.
func TestDirectBound(t *testing.T) {
	testkit.CheckLeaks(t)
	silent := udpServer(t, func([]byte) []byte { return nil })
	s := start(t, Config{
		Resolvers: []Resolver{
			OverTCP(silent),
		}, DialDirect: dialDirect, Zones: []Zone{{Suffix: "a", Direct: []DirectServer{{Addr: silent}}}},
	})
	for i := range maxDirect + 10 {
		s.Handle(makeQuestionFast("x"+string(rune('a'+i%26))+string(rune('a'+i/26))+".a"), netip.AddrPort{}, func([]byte) {})
	}
	if n := s.Stats().Dropped; n != 10 {
		t.Errorf("%d were dropped, want 10", n)
	}
}

func TestZoneErrors(t *testing.T) {
	ok := Config{Dial: dialTCP, Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))}}
	for name, change := range map[string]func(*Config){
		"no name":        func(c *Config) { c.Zones = []Zone{{Resolvers: c.Resolvers}} },
		"no host":        func(c *Config) { c.Zones = []Zone{{Suffix: "a"}} },
		"no dial":        func(c *Config) { c.Zones = []Zone{{Suffix: "a", Direct: []DirectServer{{}}}} },
		"too many":       func(c *Config) { c.Zones = make([]Zone, maxZones+1) },
		"too many there": func(c *Config) { c.Zones = []Zone{{Suffix: "a", Direct: make([]DirectServer, maxResolvers+1)}} },
		"host names":     func(c *Config) { c.HostNames = func([]byte) bool { return true } },
	} {
		cfg := ok
		if change(&cfg); name != "no dial" && name != "host names" {
			cfg.DialDirect = dialDirect
		}
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
