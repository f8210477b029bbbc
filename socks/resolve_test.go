package socks

import (
	"context"
	"errors"
	"net"
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

// names is a resolver whose answer can be changed.
type names struct {
	mu    sync.Mutex
	ips   []netip.Addr
	err   error
	asked atomic.Int32
}

func (n *names) set(err error, ips ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err, n.ips = err, nil
	for _, ip := range ips {
		n.ips = append(n.ips, netip.MustParseAddr(ip))
	}
}

func (n *names) resolve(_ context.Context, host string) ([]netip.Addr, error) {
	n.asked.Add(1)
	if host != "proxy.example" {
		return nil, errors.New("asked for " + host)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ips, n.err
}

// setupNamed gives a client of proxy.example, which is at 127.0.0.2 with the server's port when the resolver says so.
func setupNamed(t *testing.T, o Options) (*names, *Client, *sockstest.Server) {
	n := new(names)
	o.Resolve = n.resolve
	d, _, srv := setup(t, o, sockstest.WithRedirectsOnly())
	srv.Redirect(testDst.AddrPort(), echo(t))
	s := mustServer(t, "socks5://proxy.example:"+netPort(srv.Addr()))
	return n, d.Client(s), srv
}

func netPort(ap netip.AddrPort) string {
	_, port, _ := net.SplitHostPort(ap.String())
	return port
}

func mustConnect(t *testing.T, c *Client) {
	t.Helper()
	fd, err := connect(t, c, context.Background(), testDst)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
}

func TestServerByName(t *testing.T) {
	n, c, _ := setupNamed(t, Options{})
	// The first addresses refuse; the one that works is remembered, and the name is not asked again.
	n.set(nil, "0.0.0.0", "127.0.0.9", "::ffff:127.0.0.8", "127.0.0.1")
	mustConnect(t, c)
	mustConnect(t, c)
	if n.asked.Load() != 1 {
		t.Errorf("asked %d times", n.asked.Load())
	}
	if got := c.names.good.Load().addrs[0].Addr().String(); got != "127.0.0.1" {
		t.Errorf("%v is tried first", got)
	}
}

func TestServerMoves(t *testing.T) {
	n, c, _ := setupNamed(t, Options{})
	n.set(nil, "127.0.0.1")
	mustConnect(t, c)
	// The good answer becomes useless: within the same dial the name is asked again.
	c.names.mu.Lock()
	c.names.good.Store(&answer{addrs: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.9"), c.server.port)}})
	c.names.asked = time.Time{}
	c.names.mu.Unlock()
	mustConnect(t, c)
	if n.asked.Load() != 2 {
		t.Errorf("asked %d times", n.asked.Load())
	}
}

func TestLastGoodAnswerIsKept(t *testing.T) {
	n, c, srv := setupNamed(t, Options{})
	n.set(nil, "127.0.0.1")
	mustConnect(t, c)
	n.set(errors.New("the resolver is down"))
	at := srv.Addr().String()
	srv.Close()
	_, err := connect(t, c, context.Background(), testDst)
	var se *ServerError
	if !errors.As(err, &se) || se.Op != OpConnect || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("both are down: %v", err)
	}
	again, err := sockstest.Listen("tcp", at, sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	again.Redirect(testDst.AddrPort(), echo(t))
	mustConnect(t, c)
	// The old answer was good after all: no dial asks again.
	asked := n.asked.Load()
	testkit.Pace(lookAgain)
	mustConnect(t, c)
	if now := n.asked.Load(); now != asked {
		t.Errorf("asked %d times, then %d", asked, now)
	}
}

func TestNoSuchServer(t *testing.T) {
	n, c, _ := setupNamed(t, Options{})
	for _, cause := range []error{errors.New("no such host"), nil} {
		n.set(cause)
		_, err := connect(t, c, context.Background(), testDst)
		var se *ServerError
		if !errors.As(err, &se) || se.Op != OpResolve {
			t.Errorf("%v", err)
		}
		testkit.Pace(10 * time.Millisecond) // the second dial is later than the first answer
	}
}

// TestSilentResolver: the look-up ends with the dial's time, or with its context, and Close ends it too.
func TestSilentResolver(t *testing.T) {
	block := func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	d := newDialer(t, Options{ConnectTimeout: 100 * time.Millisecond, Resolve: block})
	c := d.Client(mustServer(t, "socks5://proxy.example"))
	_, err := connect(t, c, context.Background(), testDst)
	var se *ServerError
	if !errors.As(err, &se) || se.Op != OpResolve ||
		!(errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)) {
		t.Errorf("%v", err)
	}
	// Here the dial has time enough.
	d = newDialer(t, Options{Resolve: block})
	c = d.Client(c.Server())
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := connect(t, c, ctx, testDst); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, &se) {
		t.Errorf("%v", err)
	}
	ch := make(chan error, 1)
	c.Connect(context.Background(), on(d), testDst, func(_ loop.Socket, err error) { ch <- err })
	end(d)
	if err := <-ch; err != ErrClosed {
		t.Error(err)
	}
}

// TestConnectTimeout: a server that does not answer SYNs (its backlog is full) costs the connect timeout, or a share of
// it when there is another address.
func TestConnectTimeout(t *testing.T) {
	full, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(full)
	n, c, srv := setupNamed(t, Options{ConnectTimeout: 300 * time.Millisecond})
	if err := unix.Bind(full, &unix.SockaddrInet4{Port: int(srv.Addr().Port()), Addr: [4]byte{127, 0, 0, 3}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(full, 0); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if nc, err := net.DialTimeout("tcp", "127.0.0.3:"+netPort(srv.Addr()), 50*time.Millisecond); err == nil {
			defer nc.Close()
		}
	}
	n.set(nil, "127.0.0.3")
	// A machine that stalls just then can make a try late, but not all of them.
	for try := 1; ; try++ {
		began := time.Now()
		_, err = connect(t, c, context.Background(), testDst)
		took := time.Since(began)
		var se *ServerError
		if !errors.As(err, &se) || se.Op != OpConnect || !errors.Is(err, os.ErrDeadlineExceeded) || took < 300*time.Millisecond {
			t.Fatalf("%v after %v", err, took)
		}
		if took <= 600*time.Millisecond {
			break
		}
		if try == 20 {
			t.Fatalf("took %v", took)
		}
	}
}
