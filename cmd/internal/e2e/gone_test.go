package e2e

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A program closes its connections, and their far ends never do: they are given back as the kernel gives its own back, after
// tcp_fin_timeout. A program that half-closed its connection, and lives, keeps it.
func TestClosedConnectionsAreGivenBack(t *testing.T) {
	if !apart(t) {
		return
	}
	proxy := listenSOCKS(t)
	a := startAppWith(t, envFinTimeout+"=2", "--proxy", proxy.URL())
	for _, host := range []string{world4, world6} {
		l, dst := listenTCP(t, host)
		const closed, half = 20, 5
		before := a.fds()
		var far []net.Conn
		defer func() {
			for _, c := range far {
				c.Close()
			}
		}()
		open := func(n int) (all []*net.TCPConn) {
			for range n {
				c := a.tcp(dst)
				l.SetDeadline(time.Now().Add(testkit.Patience))
				f, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				far, all = append(far, f), append(all, c)
			}
			return all
		}
		halves := open(half) // they are first in far
		for _, c := range halves {
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range open(closed) {
			c.Close()
		}
		testkit.EventuallyIn(
			t,
			2*testkit.Patience,
			"the descriptors of the closed connections are given back",
			func() bool { return a.fds() <= before+half },
		)
		// The living ones have been half-closed for longer than the dead ones were.
		b := make([]byte, 8)
		for i, c := range halves {
			if _, err := far[i].Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(testkit.Patience))
			if n, err := c.Read(b); string(b[:n]) != "answer" {
				t.Errorf("%s: a half-closed connection got %q, %v", host, b[:n], err)
			}
			c.Close()
		}
		for _, c := range far {
			c.Close()
		}
		testkit.EventuallyIn(t, testkit.Patience, "all descriptors are given back", func() bool { return a.fds() <= before })
	}
}

// A UDP socket that is closed is given back some ten seconds later, one that is open stays.
func TestClosedUDPSocketsAreGivenBack(t *testing.T) {
	if !apart(t) {
		return
	}
	proxy := listenSOCKS(t)
	far, dst := farUDP(t, world4)
	a := startApp(t, "--proxy", proxy.URL(), "--udp-timeout", "1h")
	outer := func(c *net.UDPConn) netip.AddrPort {
		send(t, c, dst, "x")
		_, from := recv(t, far)
		return from
	}
	stays := a.udp(false)
	was := outer(stays)
	before := a.fds()
	for range 20 {
		c := a.udp(false)
		outer(c)
		c.Close()
	}
	if n := a.fds(); n < before+20 {
		t.Errorf("%d descriptors with 20 sockets more, %d before: were they given back at once?", n, before)
	}
	began := time.Now()
	testkit.EventuallyIn(t, 2*testkit.Patience, "the descriptors of closed sockets are given back", func() bool {
		return a.fds() <= before
	})
	t.Logf("after %v", time.Since(began).Round(time.Second))
	if now := outer(stays); now != was {
		t.Errorf("the open socket was at %v and is now at %v", was, now)
	}
}
