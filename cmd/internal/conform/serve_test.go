package conform

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
)

func servePublic(t *testing.T, at ...string) *FarEnd {
	t.Helper()
	var all []netip.AddrPort
	for _, a := range at {
		all = append(all, netip.MustParseAddrPort(a))
	}
	f, err := Serve(all...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// publicProber has a session with f, through a server that reaches every address of it.
func publicProber(t *testing.T, f *FarEnd) (Prober, *Session) {
	t.Helper()
	srv, err := sockstest.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	c := config(server(t, srv.Addr().String()), Ends{TCP: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), f.TCP().Port())})
	s, a, err := NewProber(c).Session(t.Context(), socks.AddrFrom(c.Ends.TCP), 3*time.Second)
	if s == nil {
		t.Fatal(a, err)
	}
	t.Cleanup(func() { s.Close() })
	c.Token = s.Token
	for i, ip := range []string{"127.0.0.1", "127.0.0.2"}[:s.Addresses] {
		for j := range 2 {
			c.Ends.UDP[i][j] = netip.AddrPortFrom(netip.MustParseAddr(ip), s.Ports[j])
		}
	}
	return NewProber(c), s
}

// A public far end serves a probe, with one address, two, and all of the host.
func TestServe(t *testing.T) {
	if testing.Short() {
		t.Skip("a whole probe of each far end takes seconds")
	}
	for name, tt := range map[string]struct {
		at        []string
		addresses int
		filtering NAT
	}{
		"one": {[]string{"127.0.0.1:0"}, 1, AddressDependent},
		"all": {[]string{"0.0.0.0:0"}, 1, AddressDependent},
		"two": {nil, 2, EndpointIndependent},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.at == nil { // with one port at both, which the kernel chooses
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				port := ln.Addr().(*net.TCPAddr).Port
				ln.Close()
				tt.at = []string{fmt.Sprint("127.0.0.1:", port), fmt.Sprint("127.0.0.2:", port)}
			}
			p, s := publicProber(t, servePublic(t, tt.at...))
			check(t, "addresses", s.Addresses, tt.addresses)
			check(t, "seen", s.Seen.Addr().String(), "127.0.0.1")
			check(t, "mapping", p.Mapping(t.Context()), EndpointIndependent)
			check(t, "filtering", p.Filtering(t.Context()), tt.filtering)
			up, down := p.Sizes(t.Context())
			check(t, "sizes", [2]int{up, down}, [2]int{65485, 65485})
			ok, source := p.Echo(t.Context(), socks.AddrFrom(p.p.Ends.UDP[0][0]))
			check(t, "echo", [2]bool{ok, source}, [2]bool{true, true})
			closed := netip.AddrPortFrom(p.p.Ends.TCP.Addr(), s.Closed)
			check(t, "closed port", p.Request(t.Context(), socks.AddrFrom(closed), time.Second).String(), "5")
			hup, hdown := p.HalfClose(t.Context())
			rup, rdown := p.Resets(t.Context())
			check(t, "FIN and RST", [4]Passage{hup, hdown, rup, rdown}, [4]Passage{Passed, Passed, Passed, Passed})
			if d, err := p.Trip(t.Context()); err != nil || d <= 0 || d > 3*time.Second {
				t.Errorf("trip: %v, %v", d, err)
			}
			if down, up := p.Speed(t.Context()); down < 1<<20 || up < 1<<20 {
				t.Errorf("speed: %v and %v", down, up)
			}
		})
	}
}

// ask sends a datagram to the far end from a socket of its own and gives the length of the answer; -1: none came.
func ask(t *testing.T, to netip.AddrPort, q question, size int) (answer int, cookie string) {
	t.Helper()
	u, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	return askBy(t, u, to, q, size)
}

func askBy(t *testing.T, u *net.UDPConn, to netip.AddrPort, q question, size int) (answer int, cookie string) {
	t.Helper()
	head := fmt.Sprintf("? 7 %d %d %d", q.from[0], q.from[1], q.size)
	if q.token != "" {
		head += " " + q.token + " " + q.cookie
	}
	if _, err := u.WriteToUDPAddrPort(fill(head+"\n", size), to); err != nil {
		t.Fatal(err)
	}
	u.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	b := make([]byte, maxUDP)
	n, err := u.Read(b)
	if err != nil {
		return -1, ""
	}
	e, _, _ := parseEcho(b[:n])
	if e == nil {
		t.Fatalf("%q", b[:n])
	}
	return n, e.cookie
}

// A public far end sends nothing to who has no session, no more than it got, and from another socket only to who can receive.
func TestServeGuards(t *testing.T) {
	f := servePublic(t, "127.0.0.1:0")
	_, s := publicProber(t, f)
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.Ports[0])
	for name, q := range map[string]question{
		"no token": {}, "a token of nobody": {token: "AAAAAAAAAAAAAAAAAAAAAAAAAA"},
		"another socket, no cookie":  {token: s.Token, from: [2]int{0, 1}},
		"a socket that is not there": {token: s.Token, from: [2]int{1, 1}},
		"a cookie of nobody":         {token: s.Token, from: [2]int{0, 1}, cookie: "0011223344556677"},
	} {
		if n, _ := ask(t, to, q, 400); n >= 0 {
			t.Errorf("%s: an answer of %d bytes", name, n)
		}
	}
	for _, size := range []int{60, 100, 150, 1000} {
		n, _ := ask(t, to, question{token: s.Token, size: 60000}, size)
		asked := max(size, len(fmt.Sprintf("? 7 0 0 60000 %s \n", s.Token)))
		if n > asked || size >= minQuestion && n != asked {
			t.Errorf("%d bytes for %d", n, asked)
		}
	}
	_, cookie := ask(t, to, question{token: s.Token}, 400)
	if n, _ := ask(t, to, question{token: s.Token, from: [2]int{0, 1}, cookie: cookie}, 400); n >= 0 {
		t.Error("the cookie of another source was taken")
	}
	u, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	_, cookie = askBy(t, u, to, question{token: s.Token}, 400)
	if n, _ := askBy(t, u, to, question{token: s.Token, from: [2]int{0, 1}, cookie: cookie}, 400); n < 0 {
		t.Error("the cookie of the source was not taken")
	}
	s.Close()
	for end := time.Now().Add(5 * time.Second); ; {
		if n, _ := ask(t, to, question{token: s.Token}, 400); n < 0 {
			break
		} else if time.Now().After(end) {
			t.Fatal("the token outlives its session")
		}
	}
}

// The answers of a session have an end.
func TestServeLimits(t *testing.T) {
	g := newGuard()
	token := g.open()
	n := 0
	for g.allows(token, 100) {
		n++
	}
	check(t, "answers", n, sessionAsks)
	token = g.open()
	for n = 0; g.allows(token, 64<<10); n++ {
	}
	check(t, "bytes", n, sessionBytes/(64<<10))
	got := 0
	for range 2 * pourStore / pourMost {
		got += g.pour(pourMost)
	}
	if got < pourStore || got > pourStore+5*pourRate {
		t.Errorf("%d bytes may be poured at once", got)
	}
	f := servePublic(t, "127.0.0.1:0")
	open := 0
	for range publicPerClient + 5 {
		c, err := net.Dial("tcp", f.TCP().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if hello(c) == nil {
			open++
		}
	}
	check(t, "connections of one address", open, publicPerClient)
	if err := f.Close(); err != nil || f.Close() != nil {
		t.Error("cannot be closed twice")
	}
}

// What anybody may send to a public far end does not end it, and dial is not served.
func TestServeHostile(t *testing.T) {
	f := servePublic(t, "127.0.0.1:0")
	for _, line := range []string{"dial 22\n", "pour -5\n", "pour x\n", "\n", strings.Repeat("x", 4096), "session\nsession\n"} {
		c, err := net.Dial("tcp", f.TCP().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(2 * time.Second))
		if err := hello(c); err != nil {
			t.Fatal(err)
		}
		c.Write([]byte(line))
		closeWrite(c)
		b := new(bytes.Buffer)
		b.ReadFrom(c)
		if b.Len() > farLine {
			t.Errorf("%q: %d bytes", line, b.Len())
		}
		c.Close()
	}
	_, s := publicProber(t, f)
	if s.Token == "" {
		t.Error("no session")
	}
}
