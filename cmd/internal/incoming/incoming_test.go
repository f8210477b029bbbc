package incoming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]Spec{
		"6881": {6881, "", 0}, "1/tcp": {1, "", portmap.TCP}, "auto": {0, "", 0}, "auto=far": {0, "far", 0},
		"65535=far": {65535, "far", 0}, "6881/udp=far": {6881, "far", portmap.UDP},
	} {
		if got, err := Parse(text); err != nil || got != want {
			t.Errorf("Parse(%q) = %v, %v", text, got, err)
		} else if got.String() != text {
			t.Errorf("Parse(%q).String() = %q", text, got)
		}
	}
	for _, text := range []string{"", "0", "65536", "-1", "6881/sctp", "6881=", "x", "6881/", "1.2.3.4:6881"} {
		if got, err := Parse(text); err == nil {
			t.Errorf("Parse(%q) = %v", text, got)
		}
	}
}

// fakeServer is a Binder that gives the asked port unless it is taken.
type fakeServer struct {
	mu    sync.Mutex
	asks  int
	asks6 int
	at6   netip.Addr // invalid: it has no IPv6
	taken map[uint16]bool
	next  uint16
	err   error
	binds []*fakeBind
}

type fakeBind struct {
	at   netip.AddrPort
	done func(fd int, peer netip.AddrPort, err error)
	once sync.Once
}

func (s *fakeServer) Bind(ctx context.Context, _ *loop.Loop, dst socks.Addr, _ time.Duration, bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error)) {
	s.mu.Lock()
	if dst.IP.Is6() {
		s.asks6++
		at := s.at6
		s.mu.Unlock()
		s.bind6(ctx, at, dst.Port, bound, done)
		return
	}
	s.asks++
	if s.err != nil {
		err := s.err
		s.mu.Unlock()
		done(-1, netip.AddrPort{}, err)
		return
	}
	port := dst.Port
	if s.taken[port] {
		s.next++
		port = 40000 + s.next
	}
	s.taken[port] = true
	b := &fakeBind{at: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), port), done: done}
	s.binds = append(s.binds, b)
	s.mu.Unlock()
	bound(b.at)
	context.AfterFunc(ctx, func() {
		b.once.Do(func() {
			s.mu.Lock()
			delete(s.taken, port)
			s.mu.Unlock()
			done(-1, netip.AddrPort{}, context.Canceled)
		})
	})
}

// bind6 listens at the asked port of at, for every BIND.
func (s *fakeServer) bind6(ctx context.Context, at netip.Addr, port uint16, bound func(netip.AddrPort),
	done func(fd int, peer netip.AddrPort, err error)) {
	if !at.IsValid() {
		done(-1, netip.AddrPort{}, socks.ReplyAddrTypeNotSupported)
		return
	}
	b := &fakeBind{at: netip.AddrPortFrom(at, port), done: done}
	s.mu.Lock()
	s.binds = append(s.binds, b)
	s.mu.Unlock()
	bound(b.at)
	context.AfterFunc(ctx, func() { b.once.Do(func() { done(-1, netip.AddrPort{}, context.Canceled) }) })
}

// connect lets a peer come to the last BIND that got at.
func (s *fakeServer) connect(t *testing.T, at, peer netip.AddrPort) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.binds) - 1; i >= 0; i-- {
		if b := s.binds[i]; b.at == at {
			p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(p[1])
			go b.once.Do(func() { b.done(p[0], peer, nil) })
			return
		}
	}
	t.Fatalf("nothing listens at %v", at)
}

func (s *fakeServer) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asks
}

func (s *fakeServer) free(port uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.taken, port)
}

type delivered struct {
	peer  netip.AddrPort
	ended func(relay.Result)
}

// start starts a Manager for port 6881 whose connections arrive at the channel.
func start(t *testing.T, s *fakeServer, o ...func(*Config)) (*Manager, chan delivered) {
	testkit.CheckLeaks(t)
	was := [...]time.Duration{retryFirst, retryUnable}
	retryFirst, retryUnable = 5*time.Millisecond, time.Hour
	t.Cleanup(func() { retryFirst, retryUnable = was[0], was[1] })
	s.taken = map[uint16]bool{}
	got := make(chan delivered, 10)
	cfg := Config{
		Default: "proxy", Binder: func(string) Binder { return s },
		CanBePeer: func(a netip.Addr) bool { return !a.IsLoopback() },
		Deliver: func(_ Spec, peer netip.AddrPort, sock loop.Socket, ended func(relay.Result)) error {
			sock.Close()
			got <- delivered{peer, ended}
			return nil
		},
	}
	for _, f := range o {
		f(&cfg)
	}
	m := Start(cfg, []Spec{{Port: 6881}})
	t.Cleanup(m.Close)
	return m, got
}

func at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), port)
}

var somePeer = netip.MustParseAddrPort("203.0.113.9:1234")

// Each peer leads to the next BIND, and the port that was asked for is used again when its peer has gone.
func TestPorts(t *testing.T) {
	s := &fakeServer{}
	m, got := start(t, s)
	testkit.Eventually(t, "the first BIND", func() bool { return m.Outer(6881) == at(6881) })
	s.connect(t, at(6881), somePeer)
	first := <-got
	if first.peer != somePeer {
		t.Errorf("the peer is %v", first.peer)
	}
	testkit.Eventually(t, "the second BIND", func() bool { return m.Outer(6881) == at(40001) })
	s.connect(t, at(40001), netip.MustParseAddrPort("[::ffff:203.0.113.9]:1235"))
	second := <-got
	if want := netip.MustParseAddrPort("203.0.113.9:1235"); second.peer != want {
		t.Errorf("the peer is %v, want %v", second.peer, want)
	}
	testkit.Eventually(t, "the third BIND", func() bool { return m.Outer(6881) == at(40002) })
	if m.Holds(at(6881)) || m.Holds(at(40001)) || !m.Holds(at(40002)) {
		t.Error("a port is held in spite of its peer, or the last one is not")
	}
	if p := m.Ports()[0]; p.Open != 2 || p.Waiting != 1 {
		t.Errorf("%+v", p)
	}
	first.ended(relay.Result{Err: relay.ErrAppGone})
	testkit.Eventually(t, "attempts to get the port back", func() bool { return s.asked() > 5 })
	s.free(6881)
	testkit.Eventually(t, "the first port", func() bool { return m.Outer(6881) == at(6881) })
	s.connect(t, at(6881), somePeer)
	<-got
	testkit.Eventually(t, "the port that still waits", func() bool { return m.Outer(6881) == at(40002) })
	if c := m.Stats(); c.Accepted != 3 || c.Refused != 1 || c.Bogus != 0 {
		t.Errorf("%+v", c)
	}
}

// A reload ends and begins BINDs only for ports that changed, and leaves those that programs asked for.
func TestSet(t *testing.T) {
	s := &fakeServer{}
	m, _ := start(t, s)
	b := NewMapper(m, &Spec{})
	b.Map(ask(portmap.TCP, 7000, 0))
	ports := func(want ...uint16) {
		t.Helper()
		testkit.Eventually(t, fmt.Sprint("the ports ", want), func() bool {
			all := m.Ports()
			for i, p := range all {
				if i >= len(want) || p.Port != want[i] || p.Outer.Port() != p.Port {
					return false
				}
			}
			return len(all) == len(want)
		})
	}
	ports(6881, 7000)
	m.Set([]Spec{{Port: 6881, Upstream: "proxy"}, {Port: 6882}, {}}, "proxy")
	ports(6881, 7000, 6882)
	if n := s.asked(); n != 3 {
		t.Errorf("%d BINDs were made, want 3", n)
	}
	m.Set([]Spec{{Port: 7000}}, "proxy")
	ports(7000)
	b.Unmap(portmap.TCP, appAt(7000)) // it is a port of the user now
	ports(7000)
	m.Set([]Spec{{Port: 7000}}, "other")
	testkit.Eventually(t, "the other upstream", func() bool { return m.Ports()[0].Upstream == "other" })
	m.Set(nil, "other")
	ports()
}

// After a change of the network the BINDs that wait are made again, and those that failed are tried at once.
func TestRenew(t *testing.T) {
	s := &fakeServer{}
	m, got := start(t, s)
	testkit.Eventually(t, "the first BIND", func() bool { return m.Outer(6881) == at(6881) })
	m.Renew(func(up string) bool { return up != "proxy" })
	if n := s.asked(); n != 1 {
		t.Errorf("%d BINDs", n)
	}
	all := func(string) bool { return true }
	m.Renew(all)
	testkit.Eventually(t, "the second BIND", func() bool { return s.asked() >= 2 && m.Ports()[0].Waiting == 1 })
	testkit.Eventually(t, "its end", func() bool { return m.Outer(6881).IsValid() })
	s.connect(t, m.Outer(6881), somePeer)
	<-got
	s.mu.Lock()
	s.err = socks.ReplyCommandNotSupported
	s.mu.Unlock()
	m.Renew(all)
	testkit.Eventually(t, "the reason", func() bool { return m.Ports()[0].Why != "" })
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	m.Renew(all)
	testkit.Eventually(t, "another BIND", func() bool { return m.Outer(6881).IsValid() })
}

// A server that accepts connections from nowhere gets no program, and no flood of BINDs.
func TestBogusPeers(t *testing.T) {
	s := &fakeServer{}
	log := &countLog{}
	m, got := start(t, s, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	began := time.Now()
	for i, peer := range []string{"127.0.0.1:5", "203.0.113.9:0", "[::1]:7", "[fe80::1]:8"} {
		var last netip.AddrPort
		testkit.Eventually(t, "a BIND", func() bool { last = m.Outer(6881); return last.IsValid() && s.asked() == i+1 })
		testkit.Eventually(t, "its wait", func() bool { return m.Ports()[0].Waiting == 1 })
		last = m.Outer(6881)
		s.free(last.Port())
		s.connect(t, last, netip.MustParseAddrPort(peer))
		testkit.Eventually(t, "the count", func() bool { return m.Stats().Bogus == uint64(i+1) })
	}
	if took := time.Since(began); took < 2*bindPause {
		t.Errorf("three BINDs within %v", took)
	}
	if n := log.count("impossible peer"); n != 1 {
		t.Errorf("they were logged %d times", n)
	}
	select {
	case d := <-got:
		t.Errorf("the program got %v", d.peer)
	default:
	}
}

// A server that can't listen is asked again after a long time and named once; any other error is retried soon.
func TestRefusals(t *testing.T) {
	s := &fakeServer{err: errors.New("out of memory")}
	log := &countLog{}
	m, _ := start(t, s, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	testkit.Eventually(t, "more attempts", func() bool { return s.asked() > 3 })
	s.mu.Lock()
	s.err = socks.ReplyCommandNotSupported
	s.mu.Unlock()
	testkit.Eventually(t, "the reason", func() bool { return strings.Contains(m.Ports()[0].Why, "not supported") })
	n := s.asked()
	if got := log.count("memory"); got != 1 {
		t.Errorf("the first error was logged %d times", got)
	}
	if got := log.count("not supported"); got != 1 {
		t.Errorf("the refusal was logged %d times", got)
	}
	m.Remove(6881)
	if len(m.Ports()) != 0 || s.asked() != n {
		t.Error("the port is still there")
	}
}

// A server that listens and then fails is asked less and less often, and named once.
func TestFailsLater(t *testing.T) {
	s, log := &fakeServer{}, &countLog{}
	m, _ := start(t, s, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	began := time.Now()
	for i := range 6 {
		testkit.Eventually(t, "a BIND", func() bool { return m.Ports()[0].Waiting == 1 && s.asked() == i+1 })
		s.free(6881)
		s.mu.Lock()
		b := s.binds[i]
		s.mu.Unlock()
		b.once.Do(func() { b.done(-1, netip.AddrPort{}, errors.New("the connection is gone")) })
	}
	if took, least := time.Since(began), (1+2+4+8+16)*retryFirst; took < least {
		t.Errorf("six BINDs within %v, want %v or more", took, least)
	}
	if n := log.count("connection is gone"); n != 1 {
		t.Errorf("the failure was logged %d times", n)
	}
}

type countLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *countLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *countLog) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), what)
}

// Over the limit of connections no BIND is made.
func TestMaxOpen(t *testing.T) {
	s := &fakeServer{}
	m, got := start(t, s)
	m.mu.Lock()
	m.find(6881).open = MaxOpen - 1
	m.mu.Unlock()
	testkit.Eventually(t, "the first BIND", func() bool { return m.Outer(6881).IsValid() })
	s.connect(t, at(6881), somePeer)
	last := <-got
	testkit.Eventually(t, "the limit", func() bool { return m.Ports()[0].Open == MaxOpen })
	m.mu.Lock()
	pending := m.find(6881).timer != nil
	m.mu.Unlock()
	if pending {
		testkit.Eventually(t, "the end of the pause", func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.find(6881).timer == nil
		})
	}
	if n := s.asked(); n != 1 {
		t.Errorf("%d BINDs", n)
	}
	last.ended(relay.Result{})
	testkit.Eventually(t, "the next BIND", func() bool { return s.asked() > 1 })
}

// The hook gets the endpoint in its environment and no argument; it is killed with its children when it takes too long.
func TestHook(t *testing.T) {
	testkit.CheckLeaks(t)
	was := hookTime
	hookTime = 300 * time.Millisecond
	t.Cleanup(func() { hookTime = was })
	dir := t.TempDir()
	out, path, log := filepath.Join(dir, "out"), filepath.Join(dir, "hook"), &countLog{}
	script := fmt.Sprintf("#!/bin/sh\necho \"$#,$A,$VIASOCKS_LISTEN_PORT,$VIASOCKS_OUTER_ADDRESS,"+
		"$VIASOCKS_OUTER_PORT$VIASOCKS_OUTER_ADDRESS6$VIASOCKS_OUTER_PORT6\" >>%s\n"+
		"test -n \"$VIASOCKS_OUTER_PORT\" || sleep 600\n", out)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	h := NewHook(path, []string{"PATH=" + os.Getenv("PATH"), "A=; x"}, slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(h.Close)
	said := func(want string) {
		testkit.Eventually(t, want, func() bool {
			b, _ := os.ReadFile(out)
			return strings.HasSuffix(string(b), want)
		})
	}
	h.Announce(Spec{Port: 6881}, at(6881), netip.AddrPort{})
	said("0,; x,6881,203.0.113.1,6881\n")
	h.Announce(Spec{Port: 6881}, netip.AddrPort{}, netip.AddrPort{})
	said("0,; x,6881,,\n")
	h.Announce(Spec{Port: 6881}, at(5), at6(7)) // waits for the end of the one that sleeps
	said("0,; x,6881,203.0.113.1,52001:db8::17\n")
	if log.count("took longer") != 1 {
		t.Errorf("the log says %s", log.b.String())
	}
}

func at6(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), port)
}

// TestIPv6: a server with IPv6 gets a second BIND, for the program's own port, and its peers reach the program. One that has
// none, or listens at an IPv4 address instead, is not asked again soon, and IPv4 works nevertheless.
func TestIPv6(t *testing.T) {
	for name, c := range map[string]struct {
		server     *fakeServer
		want, why6 string
		why4       bool
	}{
		"both":    {&fakeServer{at6: at6(0).Addr()}, "203.0.113.1:7001 [2001:db8::1]:6881", "", false},
		"none":    {&fakeServer{}, "203.0.113.1:7001 invalid AddrPort", "address type not supported", false},
		"foreign": {&fakeServer{at6: at(0).Addr()}, "203.0.113.1:7001 invalid AddrPort", "listens at an IPv4 address", false},
		"alone": {
			&fakeServer{at6: at6(0).Addr(), err: socks.ReplyAddrTypeNotSupported},
			"invalid AddrPort [2001:db8::1]:6881", "", true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var told string
			m, got := start(t, c.server, func(cfg *Config) {
				cfg.Announce = func(_ Spec, at, at6 netip.AddrPort) {
					mu.Lock()
					told = fmt.Sprint(at, at6)
					mu.Unlock()
				}
			})
			m.Remove(6881)
			m.Add(Spec{Port: 6881}, 7001)
			var s Status
			testkit.Eventually(t, c.want, func() bool {
				s = m.Ports()[0]
				return fmt.Sprint(s.Outer, s.Outer6) == c.want && strings.Contains(s.Why6, c.why6) && (s.Why != "") == c.why4
			})
			mu.Lock()
			if told != c.want {
				t.Errorf("told: %s", told)
			}
			mu.Unlock()
			if s.Outer6.IsValid() {
				if !m.Holds(at6(6881)) || m.Holds(at6(7001)) {
					t.Error("Holds is wrong")
				}
				c.server.connect(t, at6(6881), at6(5))
				if d := <-got; d.peer != at6(5) {
					t.Errorf("the peer is %v", d.peer)
				}
			}
		})
	}
}
