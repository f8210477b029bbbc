package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// fakeResolver answers on loopback by what its function says: nil is no answer, an empty slice closes the connection.
type fakeResolver struct {
	l     net.Listener
	conns atomic.Int32
	ended atomic.Int32 // of conns
	wg    sync.WaitGroup
}

func newFakeResolver(t *testing.T, answer func(query []byte) []byte) *fakeResolver {
	t.Helper()
	return serveResolver(t, listen(t), answer)
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func serveResolver(t *testing.T, l net.Listener, answer func(query []byte) []byte) *fakeResolver {
	f := &fakeResolver{l: l}
	f.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.conns.Add(1)
			f.wg.Go(func() {
				defer f.ended.Add(1)
				defer c.Close()
				var mu sync.Mutex
				var lb [2]byte
				for {
					if _, err := io.ReadFull(c, lb[:]); err != nil {
						return
					}
					q := make([]byte, binary.BigEndian.Uint16(lb[:]))
					if _, err := io.ReadFull(c, q); err != nil {
						return
					}
					r := answer(q)
					if r == nil {
						continue
					}
					if len(r) == 0 {
						return
					}
					mu.Lock()
					_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(r))), r...))
					mu.Unlock()
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); f.wg.Wait() })
	return f
}

func (f *fakeResolver) addr() netip.AddrPort { return f.l.Addr().(*net.TCPAddr).AddrPort() }

func dialTCP(ctx context.Context, r Resolver, done func(int, error)) {
	go func() {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", r.host())
		if err != nil {
			done(-1, err)
			return
		}
		defer c.Close()
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			done(-1, err)
			return
		}
		defer f.Close()
		fd, err := syscall.Dup(int(f.Fd()))
		done(fd, err)
	}()
}

// start runs a Server until the end of the test.
func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	if cfg.Dial == nil {
		cfg.Dial = dialTCP
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = testkit.Patience
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
	return s
}

func ask(t *testing.T, s *Server, query []byte) []byte {
	t.Helper()
	return askAt(t, s, query, netip.AddrPort{})
}

func askAt(t *testing.T, s *Server, query []byte, asked netip.AddrPort) []byte {
	t.Helper()
	got := make(chan []byte, 1)
	s.Handle(query, asked, func(b []byte) { got <- append([]byte(nil), b...) })
	select {
	case b := <-got:
		return b
	case <-time.After(2 * testkit.Patience):
		t.Fatal("no reply")
		return nil
	}
}

func rcodeOf(t *testing.T, b []byte) dnsmessage.RCode {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	if m.ID != 0x1234 || !m.Response {
		t.Fatalf("not an answer to the question: %+v", m.Header)
	}
	return m.RCode
}

func TestPipelineOnOneConnection(t *testing.T) {
	testkit.CheckLeaks(t)
	var mu sync.Mutex
	ids := map[uint16]bool{}
	f := newFakeResolver(t, func(q []byte) []byte {
		mu.Lock()
		defer mu.Unlock()
		ids[binary.BigEndian.Uint16(q)] = true
		return makeAnswer(t, q, 1)
	})
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}})
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			name := fmt.Sprintf("n%d.example.", i)
			var m dnsmessage.Message
			if err := m.Unpack(ask(t, s, makeQuestion(t, name, 0, nil))); err != nil || m.ID != 0x1234 ||
				m.Questions[0].Name.String() != name ||
				len(m.Answers) != 1 {
				t.Errorf("%s: %v %+v", name, err, m)
			}
		})
	}
	wg.Wait()
	if n := f.conns.Load(); n != 1 {
		t.Errorf("%d connections for 100 questions", n)
	}
	if len(ids) < 95 {
		t.Errorf("only %d different IDs in 100 questions", len(ids))
	}
	if st := s.Stats(); st.Answered != 100 || st.Questions != 100 || st.Connections != 1 {
		t.Errorf("%+v", st)
	}
}

func TestGarbageFromTheApp(t *testing.T) {
	testkit.CheckLeaks(t)
	s := start(
		t,
		Config{
			Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("127.0.0.1:1"))},
			Dial: func(context.Context, Resolver, func(int, error)) {
				t.Error("garbage made a connection")
			},
		},
	)
	s.Handle([]byte("x"), netip.AddrPort{}, func([]byte) { t.Error("garbage was answered") })
	answerBit := makeQuestion(t, "a.", 0, func(m *dnsmessage.Message) { m.Response = true })
	s.Handle(answerBit, netip.AddrPort{}, func([]byte) { t.Error("an answer was answered") })
	if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "a.", 0, func(m *dnsmessage.Message) {
		m.OpCode = 6
	}))); rc != dnsmessage.RCodeNotImplemented {
		t.Error(rc)
	}
	two := makeQuestion(t, "a.", 0, func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions[0]) })
	if b := ask(t, s, two); b[3]&15 != rcodeFormat {
		t.Errorf("%x", b)
	}
}

func TestFailover(t *testing.T) {
	testkit.CheckLeaks(t)
	down := newFakeResolver(t, nil)
	down.l.Close()
	good := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 2) })
	silent := newFakeResolver(t, func(q []byte) []byte { return nil })
	refuser := newFakeResolver(t, func(q []byte) []byte { a := makeAnswer(t, q, 0); a[3] |= rcodeRefuse; return a })
	closer := newFakeResolver(t, func(q []byte) []byte { return []byte{} })
	liar := newFakeResolver(t, func(q []byte) []byte {
		a := makeAnswer(t, q, 1)
		a[13] ^= 1
		return a
	})
	garbage := newFakeResolver(t, func(q []byte) []byte { return []byte("garbage") })
	for _, tt := range []struct {
		name      string
		resolvers []*fakeResolver
		want      dnsmessage.RCode
		max       time.Duration
	}{
		{"down, good", []*fakeResolver{down, good}, 0, time.Second},
		{"closer, good", []*fakeResolver{closer, good}, 0, time.Second},
		{"silent, good", []*fakeResolver{silent, good}, 0, 1800 * time.Millisecond},
		{"liar, good", []*fakeResolver{liar, good}, 0, 1800 * time.Millisecond},
		{"garbage, good", []*fakeResolver{garbage, good}, 0, time.Second},
		{"refuser, good", []*fakeResolver{refuser, good}, 0, time.Second},
		{"refuser, down", []*fakeResolver{refuser, down}, dnsmessage.RCodeRefused, time.Second},
		{"down", []*fakeResolver{down}, dnsmessage.RCodeServerFailure, time.Second},
		{"silent", []*fakeResolver{silent}, dnsmessage.RCodeServerFailure, 2200 * time.Millisecond},
		{"down, closer, down", []*fakeResolver{down, closer, down}, dnsmessage.RCodeServerFailure, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// A machine that stalls just then can spoil a try, but not all of them.
			for try := 1; ; try++ {
				err := failover(t, tt.resolvers, tt.want, tt.max)
				if err == nil {
					break
				}
				t.Log(err)
				if try == 10 {
					t.Fatal("no try went well")
				}
			}
		})
	}
}

// failover asks a server of these resolvers, which must answer with want, within limit.
func failover(t *testing.T, resolvers []*fakeResolver, want dnsmessage.RCode, limit time.Duration) error {
	t.Helper()
	cfg := Config{Timeout: 2 * time.Second, Dial: dialTCP}
	for _, r := range resolvers {
		cfg.Resolvers = append(cfg.Resolvers, OverTCP(r.addr()))
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() { _ = s.Run(ctx); close(over) }()
	defer func() { cancel(); <-over }()
	begin := time.Now()
	if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "a.example.", 0, nil))); rc != want {
		return fmt.Errorf("got %v, want %v", rc, want)
	}
	if d := time.Since(begin); d > limit {
		return fmt.Errorf("it took %v", d)
	}
	if want == 0 { // and the good one is asked first from now on
		begin = time.Now()
		rcodeOf(t, ask(t, s, makeQuestion(t, "b.example.", 0, nil)))
		if d := time.Since(begin); d > 500*time.Millisecond {
			return fmt.Errorf("the second question took %v", d)
		}
	}
	return nil
}

func TestIdleClose(t *testing.T) {
	testkit.CheckLeaks(t)
	f := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 1) })
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, IdleClose: 200 * time.Millisecond})
	for i := range 2 {
		rcodeOf(t, ask(t, s, makeQuestion(t, "a.", 0, nil)))
		if !testkit.Until(testkit.Patience, func() bool { return f.ended.Load() == int32(i+1) }) {
			t.Fatalf("%d of %d connections ended", f.ended.Load(), f.conns.Load())
		}
	}
	if n := f.conns.Load(); n != 2 {
		t.Errorf("%d connections, want 2: an idle one is closed and made anew", n)
	}
}

// A resolver that closes idle connections loses no question.
func TestResolverCloses(t *testing.T) {
	testkit.CheckLeaks(t)
	var n atomic.Int32
	f := newFakeResolver(t, func(q []byte) []byte {
		if n.Add(1)%2 == 0 {
			return []byte{}
		}
		return makeAnswer(t, q, 1)
	})
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}})
	for range 6 {
		if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "a.", 0, nil))); rc != 0 {
			t.Fatal(rc)
		}
	}
}

func TestBounds(t *testing.T) {
	testkit.CheckLeaks(t)
	// When the questions take longer than a question's time, the first are over before the last come: then once more.
	for try := 1; !bounds(t); try++ {
		if try == 20 {
			t.Fatal("this machine is too slow")
		}
	}
}

func bounds(t *testing.T) (inTime bool) {
	t.Helper()
	const timeout = 300 * time.Millisecond
	dials := make(chan func(int, error), 1)
	s := start(t, Config{Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("127.0.0.1:1"))}, InFlight: 8, Timeout: timeout,
		Dial: func(ctx context.Context, _ Resolver, done func(int, error)) {
			context.AfterFunc(ctx, func() { done(-1, ctx.Err()) })
			dials <- done
		}})
	var failed atomic.Int32
	begin := time.Now()
	for i := range 1000 {
		s.Handle(makeQuestion(t, fmt.Sprintf("a%d.", i), 0, nil), netip.AddrPort{}, func(b []byte) { failed.Add(1) })
	}
	if time.Since(begin) >= timeout {
		return false
	}
	var st Stats
	if !testkit.Until(testkit.Patience, func() bool {
		st = s.Stats()
		return st.Failed+st.Dropped == 1000 && uint64(failed.Load()) == st.Failed
	}) {
		t.Fatalf("%+v, %d answers", st, failed.Load())
	}
	if n := failed.Load(); n != 8 || len(dials) != 1 {
		t.Errorf("%d answers and %d dials, want SERVFAIL for the 8 that were taken, and one dial", n, len(dials))
	}
	return true
}

func TestNewErrors(t *testing.T) {
	a := netip.MustParseAddrPort("192.0.2.1:53")
	for _, cfg := range []Config{
		{Resolvers: []Resolver{OverTCP(a)}},
		{Dial: dialTCP},
		{Dial: dialTCP, Resolvers: []Resolver{{}}},
		{Dial: dialTCP, Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("0.0.0.0:53"))}},
		{Dial: dialTCP, Resolvers: []Resolver{OverTCP(a)}, Timeout: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}

// TestOtherOpcodes: an UPDATE goes to the server that the app asked, a QUERY to the resolver.
func TestOtherOpcodes(t *testing.T) {
	testkit.CheckLeaks(t)
	resolver := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 1) })
	var updates atomic.Int32
	master := newFakeResolver(t, func(q []byte) []byte {
		if q[2]&0x78 != 5<<3 {
			t.Errorf("the master got %x", q)
		}
		updates.Add(1)
		r := append([]byte(nil), q[:headerLen]...) // RFC 2136 3.8: the sections may be left out
		r[2] |= 0x80
		clear(r[4:])
		return r
	})
	s := start(t, Config{Resolvers: []Resolver{OverTCP(resolver.addr())}})
	update := makeUpdate(100)
	got := askAt(t, s, update, master.addr())
	if len(got) != headerLen || got[0] != 0x12 || got[1] != 0x34 || got[2] != 0x80|5<<3 || got[3] != 0 {
		t.Errorf("the UPDATE was answered %x", got)
	}
	if rcode := rcodeOf(t, askAt(t, s, makeQuestion(t, "a.", 0, nil), master.addr())); rcode != 0 {
		t.Errorf("the QUERY was answered %v", rcode)
	}
	// The address in resolv.conf is nobody's: the first resolver is asked.
	if got := askAt(t, s, update, netip.AddrPort{}); got[2]&0xF8 != 0x80|5<<3 {
		t.Errorf("the UPDATE to nobody was answered %x", got)
	}
	if u, c := updates.Load(), resolver.conns.Load(); u != 1 || c != 1 {
		t.Errorf("%d updates at the master and %d connections to the resolver", u, c)
	}
}

// TestAskedServersAreBounded: a program can name any number of servers; beyond maxAsked they fail at once.
func TestAskedServersAreBounded(t *testing.T) {
	testkit.CheckLeaks(t)
	s := start(t, Config{
		Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))},
		Dial: func(ctx context.Context, r Resolver, done func(int, error)) {
			go func() { <-ctx.Done(); done(-1, ctx.Err()) }() // silent servers
		},
	})
	for i := range maxAsked {
		s.Handle(makeUpdate(1), netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(2 + i)}), 53), func([]byte) {})
	}
	if got := askAt(t, s, makeUpdate(1), netip.MustParseAddrPort("198.51.100.1:53")); got[3]&15 != rcodeServer {
		t.Errorf("one more server: %x", got)
	}
}
