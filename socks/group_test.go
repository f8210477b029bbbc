package socks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// fleet is a group over servers of sockstest.
type fleet struct {
	*Group
	t    testing.TB
	d    *Dialer
	srvs []*sockstest.Server
	dst  netip.AddrPort
}

// newFleet makes n servers, of which opts may change the options of each.
func newFleet(t testing.TB, n int, o GroupOptions, d Options) *fleet {
	t.Helper()
	dialer, _, first := setup(t, d, sockstest.WithRedirectsOnly())
	f := &fleet{t: t, d: dialer, dst: netip.MustParseAddrPort("203.0.113.1:80")}
	target := echo(t)
	var servers []Server
	for i := range n {
		s := first
		if i > 0 {
			var err error
			if s, err = sockstest.Listen("tcp", "127.0.0.1:0", sockstest.WithRedirectsOnly()); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
		}
		s.Redirect(f.dst, target)
		f.srvs = append(f.srvs, s)
		servers = append(servers, mustServer(t, s.URL()))
	}
	var err error
	o.Name = "g"
	if f.Group, err = dialer.Group(on(dialer), servers, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); f.Close() })
	return f
}

// connect makes a connection by the group and closes it.
func (f *fleet) connect() error {
	f.t.Helper()
	return connectGroup(f.t, f.Group, context.Background(), AddrFrom(f.dst))
}

func connectGroup(t testing.TB, g Connector, ctx context.Context, dst Addr) error {
	t.Helper()
	ch := make(chan dialed, 2)
	g.Connect(ctx, g.(*Group).l, dst, func(s loop.Socket, err error) { ch <- dialed{s.Release(), err} })
	select {
	case r := <-ch:
		if r.err == nil {
			unix.Close(r.fd)
		}
		return r.err
	case <-time.After(testkit.Patience):
		t.Fatal("done is not called")
		return nil
	}
}

func (f *fleet) requests() (n []int) {
	for _, s := range f.srvs {
		n = append(n, int(s.Stats().Requests))
	}
	return n
}

// restart puts server i back on its port.
func (f *fleet) restart(i int) {
	f.t.Helper()
	addr := f.srvs[i].Addr().String()
	s, err := sockstest.Listen("tcp", addr, sockstest.WithRedirectsOnly())
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { s.Close() })
	s.Redirect(f.dst, echo(f.t))
	f.srvs[i] = s
}

// The event table with real connections: how often the first server and the second are asked for three flows, and how these end.
func TestGroupEvents(t *testing.T) {
	all := func(stage sockstest.Stage, f sockstest.Fault) func(*sockstest.Server) {
		return func(s *sockstest.Server) {
			s.SetFaultAt(stage, func(sockstest.Request) sockstest.Fault { return f })
		}
	}
	is := func(want error) func(error) bool { return func(err error) bool { return errors.Is(err, want) } }
	for _, tt := range []struct {
		name  string
		first func(*sockstest.Server)
		want  func(error) bool // of each flow
		moved bool             // the flows are carried by the second
		down  bool
		asked int // the first server, for three flows; -1: it counts no requests
	}{
		{"refused", func(s *sockstest.Server) { s.Close() }, is(nil), true, true, -1},
		{"EOF at the greeting", all(sockstest.AtGreeting, sockstest.EarlyClose()), is(nil), true, true, 0},
		{"reset at the greeting", all(sockstest.AtGreeting, sockstest.EarlyReset()), is(nil), true, true, 0},
		{"garbage at the greeting", all(sockstest.AtGreeting, sockstest.Garbage()), is(nil), true, true, 0},
		{"silence at the greeting", all(sockstest.AtGreeting, sockstest.Silence()), is(nil), true, true, 0},
		{"method 0xFF", all(sockstest.AtGreeting, sockstest.Fault{Raw: []byte{5, 0xff}}), is(nil), true, true, 0},
		{"garbage for an answer", all(sockstest.AtRequest, sockstest.Garbage()), is(nil), true, true, 2},
		{"reset for an answer", all(sockstest.AtRequest, sockstest.EarlyReset()), is(nil), true, true, 2},
		{"reply 1", all(sockstest.AtRequest, sockstest.Reply(1)), is(Reply(1)), false, false, 3},
		{"reply 2", all(sockstest.AtRequest, sockstest.Reply(2)), is(Reply(2)), false, false, 3},
		{"reply 5", all(sockstest.AtRequest, sockstest.Reply(5)), is(Reply(5)), false, false, 3},
		{"reply 6", all(sockstest.AtRequest, sockstest.Reply(6)), is(Reply(6)), false, false, 3},
		{"FIN for an answer", all(sockstest.AtRequest, sockstest.EarlyClose()), is(ErrEnded), false, false, 3},
		{"reply 7", all(sockstest.AtRequest, sockstest.Reply(7)), is(nil), true, false, 1},
		{"reply 8", all(sockstest.AtRequest, sockstest.Reply(8)), is(nil), true, false, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFleet(t, 2, GroupOptions{ConnectTimeout: 500 * time.Millisecond}, Options{})
			tt.first(f.srvs[0])
			for range 3 {
				if err := f.connect(); !tt.want(err) {
					t.Errorf("%v", err)
				}
			}
			n := f.requests()
			if tt.asked >= 0 && n[0] != tt.asked {
				t.Errorf("the first server was asked %d times, want %d", n[0], tt.asked)
			}
			if want := map[bool]int{true: 3, false: 0}[tt.moved]; n[1] != want {
				t.Errorf("the second server was asked %d times, want %d", n[1], want)
			}
			if s := f.Servers(); s[0].Down != tt.down || s[1].Down {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A server that is down gets one trial after RetryAfter, whatever the load, and is used again when it passes.
func TestGroupOneTrial(t *testing.T) {
	if testing.Short() {
		t.Skip("a server is tried again after two seconds")
	}
	f := newFleet(t, 2, GroupOptions{RetryAfter: 2 * time.Second}, Options{})
	var greeted atomic.Int32
	broken := sockstest.EarlyClose()
	f.srvs[0].SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { greeted.Add(1); return broken })
	for range 2 {
		if err := f.connect(); err != nil {
			t.Fatal(err)
		}
	}
	if !f.Servers()[0].Down {
		t.Fatal("it is not down")
	}
	began := time.Now()
	load := func(until time.Duration) {
		for time.Since(began) < until {
			if err := f.connect(); err != nil {
				t.Fatal(err)
			}
		}
	}
	load(1500 * time.Millisecond)
	if n := greeted.Load(); n != 2 {
		t.Errorf("%d connections before the trial, want 2", n)
	}
	load(3500 * time.Millisecond)
	if n := greeted.Load(); n != 3 {
		t.Errorf("%d connections after the trial, want 3", n)
	}
	f.srvs[0].SetFaultAt(sockstest.AtGreeting, nil)
	testkit.Eventually(t, "the first server to be used again", func() bool { return !f.Servers()[0].Down })
	before := f.requests()[0]
	if f.connect(); f.requests()[0] != before+1 {
		t.Error("it is up and not used")
	}
}

// When all are down flows are refused at once, and the group works within three seconds of a server's return.
func TestGroupAllDown(t *testing.T) {
	f := newFleet(t, 3, GroupOptions{RetryAfter: time.Hour}, Options{})
	for _, s := range f.srvs {
		s.Close()
	}
	for range 2 {
		if err := f.connect(); err == nil {
			t.Fatal("nobody is there")
		}
	}
	begin := time.Now()
	for range 100 {
		var fault *ServerError
		if err := f.connect(); !errors.Is(err, ErrAllDown) || !errors.As(err, &fault) {
			t.Fatal(err)
		}
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("a hundred refusals took %v", d)
	}
	f.restart(1)
	begin = time.Now()
	testkit.Eventually(t, "the group", func() bool { return f.connect() == nil })
	took := time.Since(begin)
	t.Logf("works %v after the return", took)
	if took > 3*time.Second {
		t.Errorf("works %v after the return", took)
	}
}

// One server alone is asked whatever is known of it.
func TestGroupOfOne(t *testing.T) {
	f := newFleet(t, 1, GroupOptions{RetryAfter: time.Hour}, Options{})
	f.srvs[0].Close()
	for range 5 {
		if err := f.connect(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	}
	if !f.Servers()[0].Down {
		t.Error("status says that it works")
	}
	f.restart(0)
	if err := f.connect(); err != nil || f.Servers()[0].Down {
		t.Errorf("%v, %+v", err, f.Servers())
	}
}

// An association moves when its server dies, also when TCP alone has seen that, or nothing but a look.
func TestGroupAssociationsMove(t *testing.T) {
	t.Run("killed", func(t *testing.T) {
		f := newFleet(t, 2, GroupOptions{}, Options{})
		a, ended := f.openAssociation()
		f.isAssociatedWith(0)
		f.srvs[0].Close()
		f.awaitEnd(ended)
		a.Close()
		b, _ := f.openAssociation()
		f.isAssociatedWith(1)
		b.Close()
		testkit.Eventually(t, "it to be forgotten", func() bool { return f.Servers()[1].Associations == 0 })
	})
	for _, tcp := range []bool{true, false} {
		t.Run(fmt.Sprintf("silent, TCP sees it %v", tcp), func(t *testing.T) {
			o := GroupOptions{ConnectTimeout: 300 * time.Millisecond}
			if !tcp {
				o.Check = 100 * time.Millisecond
			}
			f := newFleet(t, 2, o, Options{})
			a, ended := f.openAssociation()
			f.srvs[0].SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
			for range 2 {
				if err := f.connect(); tcp && err != nil {
					t.Error(err)
				}
			}
			f.awaitEnd(ended)
			a.Close()
			b, _ := f.openAssociation()
			f.isAssociatedWith(1)
			b.Close()
		})
	}
}

// associate makes an association by the group, nil if that fails.
func (f *fleet) associate() *Association {
	f.t.Helper()
	ch := make(chan *Association, 1)
	f.Associate(context.Background(), f.l, func(a *Association, err error) {
		if err != nil {
			f.t.Error(err)
		}
		ch <- a
	})
	return <-ch
}

// openAssociation makes an association, and reports when it has ended.
func (f *fleet) openAssociation() (*Association, <-chan error) {
	f.t.Helper()
	a := f.associate()
	ended := make(chan error, 1)
	a.OnClose(func(err error) { ended <- err })
	return a, ended
}

// awaitEnd wants an association with a dead server to end.
func (f *fleet) awaitEnd(ended <-chan error) {
	f.t.Helper()
	select {
	case <-ended:
	case <-time.After(testkit.Patience):
		f.t.Fatal("the association stays at a dead server")
	}
}

// isAssociatedWith wants the one association to be with one of two servers.
func (f *fleet) isAssociatedWith(server int) {
	f.t.Helper()
	if s := f.Servers(); s[server].Associations != 1 || s[1-server].Associations != 0 {
		f.t.Errorf("%+v", s)
	}
}

// One server has no UDP, another has: associations go there, and the first is not asked again.
func TestGroupAssociateElsewhere(t *testing.T) {
	for _, fault := range []sockstest.Fault{sockstest.Reply(7), sockstest.Reply(1), sockstest.EarlyClose()} {
		f := newFleet(t, 2, GroupOptions{}, Options{})
		f.srvs[0].SetFault(func(sockstest.Request) sockstest.Fault { return fault })
		for range 10 {
			if a := f.associate(); a != nil {
				a.Close()
			}
		}
		n := f.requests()
		want := map[byte]int{7: 1, 1: 10, 0: endedAssociate}[fault.Reply]
		if n[0] != want || n[1] != 10 || f.Servers()[0].Down {
			t.Errorf("%+v: asked %v, want %d; %+v", fault, n, want, f.Servers())
		}
	}
}

func TestCheck(t *testing.T) {
	d, c, srv := setup(t, Options{ConnectTimeout: 300 * time.Millisecond}, sockstest.WithAuth("alice", "secret"))
	check := func(c *Client) error {
		ch := make(chan error, 2)
		c.Check(context.Background(), on(c.d), func(err error) { ch <- err })
		select {
		case err := <-ch:
			return err
		case <-time.After(testkit.Patience):
			t.Fatal("done is not called")
			return nil
		}
	}
	s, err := c.Server().WithCredentials("alice", "secret")
	if err != nil {
		t.Fatal(err)
	}
	right := d.Client(s)
	if err := check(right); err != nil {
		t.Error(err)
	}
	if err := check(c); !errors.Is(err, ErrMethod) {
		t.Error(err)
	}
	if s, err = s.WithCredentials("alice", "wrong"); err != nil {
		t.Fatal(err)
	}
	if err := check(d.Client(s)); !errors.Is(err, ErrCredentials) {
		t.Error(err)
	}
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	begin := time.Now()
	if err := check(right); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > DefaultHandshakeTimeout/2 {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	if n := srv.Stats().Requests; n != 0 {
		t.Errorf("%d requests were made", n)
	}
}

// A chain: the second server is reached through the first, by its name, and no datagrams go that way.
func TestChain(t *testing.T) {
	d, c, first := setup(t, Options{}, sockstest.WithRedirectsOnly(),
		sockstest.WithResolve(func(string) (netip.Addr, error) { return netip.MustParseAddr("198.51.100.7"), nil }))
	second, err := sockstest.Listen("tcp", "127.0.0.1:0", sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	first.Redirect(netip.MustParseAddrPort("198.51.100.7:1080"), second.Addr())
	dst := netip.MustParseAddrPort("203.0.113.1:80")
	second.Redirect(dst, echo(t))
	inner, err := d.Group(on(d), []Server{c.Server()}, GroupOptions{Name: "inner"})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	outer, err := d.Group(on(d), []Server{mustServer(t, "socks5://far.test")}, GroupOptions{Name: "outer", Via: inner})
	if err != nil {
		t.Fatal(err)
	}
	defer outer.Close()
	if err := connectGroup(t, outer, context.Background(), AddrFrom(dst)); err != nil {
		t.Fatal(err)
	}
	if r := first.Requests(); len(r) != 1 || r[0].Dst.Name != "far.test" || r[0].Dst.Port != 1080 {
		t.Errorf("the first server was asked %+v", r)
	}
	if err := connectGroup(t, outer, context.Background(), Addr{IP: netip.MustParseAddr("203.0.113.9"), Port: 1}); !errors.Is(
		err,
		ReplyNetUnreachable,
	) {
		t.Errorf("the second server's word: %v", err)
	}
	ch := make(chan error, 1)
	outer.Associate(context.Background(), on(d), func(a *Association, err error) { ch <- err })
	if err := <-ch; !errors.Is(err, ReplyCommandNotSupported) {
		t.Errorf("an association: %v", err)
	}
	first.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(5) })
	var fault *ServerError
	if err := connectGroup(t, outer, context.Background(), AddrFrom(dst)); !errors.As(err, &fault) ||
		fault.Server != "socks5://far.test:1080" {
		t.Errorf("the second server is not there: %v", err)
	}
	first.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := connectGroup(t, outer, ctx, AddrFrom(dst)); !errors.Is(err, context.Canceled) {
		t.Errorf("a dial that is not wanted any more: %v", err)
	}
}

// Many flows at once while servers come and go: each is answered once, and nothing is left.
func TestGroupRace(t *testing.T) {
	f := newFleet(t, 3, GroupOptions{Select: RoundRobin, RetryAfter: 50 * time.Millisecond, Check: 20 * time.Millisecond},
		Options{})
	var flip atomic.Int32
	for i, s := range f.srvs {
		s.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault {
			if int(flip.Add(1))/64%4 == i {
				return sockstest.EarlyClose()
			}
			return sockstest.Fault{}
		})
	}
	var wg sync.WaitGroup
	var ok atomic.Int32
	for range 8 {
		wg.Go(func() {
			for range 60 {
				ch := make(chan dialed, 2)
				f.Connect(context.Background(), f.l, AddrFrom(f.dst), func(s loop.Socket, err error) {
					ch <- dialed{s.Release(), err}
				})
				if r := <-ch; r.err == nil {
					ok.Add(1)
					unix.Close(r.fd)
				} else {
					testkit.Pace(5 * time.Millisecond) // all of them may be down for a moment
				}
				f.Servers()
				f.Renew()
			}
		})
	}
	wg.Wait()
	if n := ok.Load(); n < 100 {
		t.Errorf("%d of 480 flows were carried", n)
	}
}

// The families race: when the first address is silent the other one carries after a quarter of a second, and the next dial begins
// with what worked.
func TestHappyEyeballs(t *testing.T) {
	_, c, srv := setup(t, Options{}, sockstest.WithRedirectsOnly())
	dst := netip.MustParseAddrPort("203.0.113.1:80")
	srv.Redirect(dst, echo(t))
	silent := netip.MustParseAddr("127.0.0.2")
	fillQueue(t, netip.AddrPortFrom(silent, c.Server().Port()))
	addrs := []netip.Addr{silent, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	var lookups atomic.Int32
	d := newDialer(t, Options{Resolve: func(context.Context, string) ([]netip.Addr, error) { lookups.Add(1); return addrs, nil }})
	n := d.Client(mustServer(t, fmt.Sprintf("socks5://name.test:%d", c.Server().Port())))
	for try, limit := range []time.Duration{2 * time.Second, 200 * time.Millisecond} {
		begin := time.Now()
		fd, err := connect(t, n, context.Background(), AddrFrom(dst))
		took := time.Since(begin)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		if took > limit || try == 0 && took < stagger {
			t.Errorf("dial %d took %v", try, took)
		}
	}
	if lookups.Load() != 1 {
		t.Errorf("%d look-ups", lookups.Load())
	}
	// The network changes: the name is asked for anew, and the last good answer stays when nobody answers.
	addrs = nil
	n.Renew()
	fd, err := connect(t, n, context.Background(), AddrFrom(dst))
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if lookups.Load() != 2 {
		t.Errorf("%d look-ups after the network changed", lookups.Load())
	}
}

// fillQueue makes at an endpoint that takes no connection and refuses none: its queue is full.
func fillQueue(t testing.TB, at netip.AddrPort) {
	t.Helper()
	domain, sa := unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	ln, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(ln) })
	if err := errors.Join(unix.Bind(ln, sa), unix.Listen(ln, 0)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		_ = unix.Connect(fd, sa)
	}
}

func TestByTurns(t *testing.T) {
	var in, want []netip.AddrPort
	for _, s := range []string{"[2001:db8::1]:1", "[2001:db8::2]:1", "[2001:db8::3]:1", "192.0.2.1:1", "192.0.2.2:1"} {
		in = append(in, netip.MustParseAddrPort(s))
	}
	for _, i := range []int{0, 3, 1, 4, 2} {
		want = append(want, in[i])
	}
	if got := byTurns(in); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
}
