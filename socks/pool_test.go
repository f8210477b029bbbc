package socks

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

func pooledIs(d *Dialer, n int) func() bool {
	return func() bool { s := d.Stats(); return s.Pooled == n && s.Pending == 0 }
}

// fetch connects to an echo, sees that the connection works in both directions, and closes it.
func fetch(t testing.TB, c *Client, to netip.AddrPort) {
	t.Helper()
	fd, err := connect(t, c, context.Background(), AddrFrom(to))
	if err != nil {
		t.Fatal(err)
	}
	n := conn(t, fd)
	defer n.Close()
	b := make([]byte, 9)
	if _, err := n.Write([]byte("you")); err != nil {
		t.Fatal(err)
	}
	for got := 0; got < len(b); {
		k, err := n.Read(b[got:])
		if err != nil {
			t.Fatal(err)
		}
		got += k
	}
	if string(b) != "hello you" {
		t.Fatalf("%q", b)
	}
}

// warm has c's pool hold n connections.
func warm(t testing.TB, c *Client, to netip.AddrPort, n int) {
	t.Helper()
	fetch(t, c, to)
	testkit.Eventually(t, "the pool is filled", pooledIs(c.d, n))
}

// TestPool: the pool is filled behind the first flow, the next one takes from it, and what it took is replaced.
func TestPool(t *testing.T) {
	for name, auth := range map[string]bool{"no login": false, "login": true} {
		t.Run(name, func(t *testing.T) {
			var opts []sockstest.Option
			if auth {
				opts = append(opts, sockstest.WithAuth("al", "geheim"))
			}
			d, c, srv := setup(t, Options{}, opts...)
			if auth {
				s, err := c.server.WithCredentials("al", "geheim")
				if err != nil {
					t.Fatal(err)
				}
				c = d.Client(s)
			}
			far := echo(t)
			d.Tune(Tuning{Pool: 5})
			warm(t, c, far, 5)
			if s := srv.Stats(); s.Accepted != 6 || s.Requests != 1 {
				t.Errorf("%+v", s)
			}
			for range 20 {
				fetch(t, c, far)
			}
			testkit.Eventually(t, "what was taken is replaced", pooledIs(d, 5))
			// Each flow has one request and each connection carries one: no request was lost or repeated.
			if s := srv.Stats(); s.Requests != 21 || s.Accepted != 26 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestPoolSaves: a flow that takes from the pool does not wait for the greeting.
func TestPoolSaves(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	const wait = 300 * time.Millisecond
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Fault{Delay: wait} })
	d.Tune(Tuning{Pool: 2})
	warm(t, c, far, 2)
	began := time.Now()
	fetch(t, c, far)
	if took := time.Since(began); took >= wait {
		t.Errorf("it took %v", took)
	}
}

// TestPoolDead: a connection that dies when its request comes is replaced, and the flow notices nothing.
func TestPoolDead(t *testing.T) {
	for name, fault := range map[string]sockstest.Fault{"RST": sockstest.EarlyReset(), "FIN": sockstest.EarlyClose()} {
		t.Run(name, func(t *testing.T) {
			d, c, srv := setup(t, Options{})
			far := echo(t)
			d.Tune(Tuning{Pool: 1})
			warm(t, c, far, 1)
			var asked atomic.Int32
			srv.SetFault(func(sockstest.Request) sockstest.Fault {
				if asked.Add(1) == 1 {
					return fault
				}
				return sockstest.Fault{}
			})
			fetch(t, c, far)
			if n := asked.Load(); n != 2 {
				t.Errorf("the server was asked %d times", n)
			}
		})
	}
}

// TestPoolEnded: a server that answers a refused target by FIN is asked once more, and then believed.
func TestPoolEnded(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 3})
	warm(t, c, far, 3)
	var asked atomic.Int32
	srv.SetFault(func(sockstest.Request) sockstest.Fault { asked.Add(1); return sockstest.EarlyClose() })
	if _, err := connect(t, c, context.Background(), AddrFrom(far)); !errors.Is(err, ErrEnded) {
		t.Error(err)
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the server was asked %d times", n)
	}
	// A refusal is an answer: the same request is not sent again.
	asked.Store(0)
	srv.SetFault(func(sockstest.Request) sockstest.Fault { asked.Add(1); return sockstest.Reply(5) })
	testkit.Eventually(t, "the pool is filled", pooledIs(d, 3))
	if _, err := connect(t, c, context.Background(), AddrFrom(far)); !errors.Is(err, ReplyRefused) {
		t.Error(err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestPoolClosedByServer: what the server closes goes at once, and is not asked for again before it is needed.
func TestPoolClosedByServer(t *testing.T) {
	d, c, srv := setup(t, Options{}, sockstest.WithIdleLimit(100*time.Millisecond))
	far := echo(t)
	d.Tune(Tuning{Pool: 3})
	warm(t, c, far, 3)
	testkit.Eventually(t, "the server has closed them", pooledIs(d, 0))
	had := srv.Stats().Accepted
	testkit.Never(t, 250*time.Millisecond, "a connection without a use", func() bool { return srv.Stats().Accepted != had })
	fetch(t, c, far)
	testkit.Eventually(t, "the pool is filled again", func() bool { return srv.Stats().Accepted >= had+4 })
}

// TestPoolIdle: without a use all are closed after the idle limit; while there are uses the old ones are replaced.
func TestPoolIdle(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 2, PoolAge: 50 * time.Millisecond, PoolIdle: time.Hour})
	warm(t, c, far, 2)
	testkit.Eventually(t, "the old ones are replaced", func() bool { return srv.Stats().Accepted > 8 })
	d.Tune(Tuning{Pool: 2, PoolIdle: 50 * time.Millisecond, PoolAge: 50 * time.Millisecond})
	testkit.Eventually(t, "the pool is empty", func() bool { return srv.Stats().Open == 0 && pooledIs(d, 0)() })
	fetch(t, c, far)
	d.Tune(Tuning{PoolIdle: 20 * time.Millisecond})
	testkit.Eventually(t, "the pool is off", pooledIs(d, 0))
	had := srv.Stats().Accepted
	fetch(t, c, far)
	testkit.Eventually(t, "it is quiet", pooledIs(d, 0))
	if n := srv.Stats().Accepted; n != had+1 {
		t.Errorf("%d connections for one flow", n-had)
	}
}

// TestPoolOfGroup: the end of a group and another network empty the pool. Connections in it that died are no fault.
func TestPoolOfGroup(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 3})
	g, err := d.Group(on(d), []Server{c.server}, GroupOptions{Name: "g"})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ask := func() {
		t.Helper()
		ch := make(chan error, 1)
		g.Connect(context.Background(), on(d), AddrFrom(far), func(s loop.Socket, err error) { s.Close(); ch <- err })
		if err := <-ch; err != nil {
			t.Error(err)
		}
	}
	ask()
	testkit.Eventually(t, "the pool is filled", pooledIs(d, 3))
	var asked atomic.Int32
	srv.SetFault(func(sockstest.Request) sockstest.Fault {
		if asked.Add(1)%2 == 1 {
			return sockstest.EarlyReset()
		}
		return sockstest.Fault{}
	})
	for range 5 {
		testkit.Eventually(t, "the pool is filled", pooledIs(d, 3))
		ask()
	}
	if s := g.Servers()[0]; s.Down || s.Why != nil {
		t.Errorf("%+v", s)
	}
	testkit.Eventually(t, "the pool is filled", pooledIs(d, 3))
	g.Renew()
	testkit.Eventually(t, "the pool is empty", pooledIs(d, 0))
	srv.SetFault(nil)
	ask()
	testkit.Eventually(t, "the pool is filled", pooledIs(d, 3))
	g.Close()
	testkit.Eventually(t, "the pool is empty", pooledIs(d, 0))
	ask()
	testkit.Eventually(t, "it is quiet", pooledIs(d, 0))
	testkit.Never(t, 20*time.Millisecond, "a group that is closed has a connection", func() bool { return d.Stats().Pooled != 0 })
}

// TestPoolGone: the server is away. A flow fails as without a pool, and the pool does not knock all the time.
func TestPoolGone(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 4})
	warm(t, c, far, 4)
	srv.Close()
	testkit.Eventually(t, "the pool is empty", pooledIs(d, 0))
	var fault *ServerError
	if _, err := connect(t, c, context.Background(), AddrFrom(far)); !errors.As(err, &fault) || fault.Op != OpConnect {
		t.Error(err)
	}
}

// TestPoolOthers: SOCKS4 and HTTP, whose first message is the request, have a pool too; UDP and a Tor that isolates take none.
func TestPoolOthers(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 2})
	for _, scheme := range []string{"socks4", "socks4a", "http"} {
		o := d.Client(mustServer(t, scheme+"://"+srv.Addr().String()))
		had := srv.Stats().Requests
		warm(t, o, far, 2)
		fetch(t, o, far)
		testkit.Eventually(t, "the pool is filled", pooledIs(d, 2))
		if n := srv.Stats().Requests; n != had+2 {
			t.Errorf("%s: %d requests", scheme, n-had)
		}
		o.closePools()
		testkit.Eventually(t, "the pool is empty", pooledIs(d, 0))
	}
	if err := checkOf(t, d.Client(mustServer(t, "socks4://"+srv.Addr().String()))); err != nil {
		t.Error(err)
	}
	tor := d.Client(mustServer(t, srv.URL()+"?tor&isolate=destination"))
	a, err := associate(t, c, context.Background())
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	if n := d.Stats().Pooled; n != 0 {
		t.Errorf("%d connections are kept for UDP", n)
	}
	fetch(t, tor, far)
	if n := d.Stats(); n.Pooled != 0 || n.Pending != 0 {
		t.Errorf("a pool of logins that depend on the flow: %+v", n)
	}
}

func checkOf(t testing.TB, c *Client) error {
	ch := make(chan error, 1)
	c.Check(context.Background(), on(c.d), func(err error) { ch <- err })
	select {
	case err := <-ch:
		return err
	case <-time.After(testkit.Patience):
		t.Fatal("done is not called")
		return nil
	}
}

// TestPoolSpeaksEarly: a connection on which the server speaks before the request is not used.
func TestPoolSpeaksEarly(t *testing.T) {
	d, c, srv := setup(t, Options{})
	far := echo(t)
	d.Tune(Tuning{Pool: 1})
	var greeted atomic.Int32
	srv.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault {
		if greeted.Add(1) == 1 {
			return sockstest.Fault{Extra: []byte{5, 0, 0, 1, 127, 0, 0, 1, 0, 80}}
		}
		return sockstest.Fault{}
	})
	l := on(d)
	l.Post(func() {
		s := c.shelfOn(l)
		s.used = l.Now()
		s.fill(d.tuning.Load(), 1)
	})
	testkit.Eventually(t, "it is closed", func() bool { return greeted.Load() == 1 && pooledIs(d, 0)() })
	fetch(t, c, far)
}
