package stack

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// exchange says something on c, and ends it in order.
func exchange(c *gonet.TCPConn) error {
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("got %q", b)
	}
	return err
}

// TestRenew: after many streams, and with none, gVisor's stack is another one, and nobody can tell.
func TestRenew(t *testing.T) {
	const n = remake + 1
	e := newEcho()
	defer e.stop()
	p := newPair(t, offAll, Config{Shards: 1, Handler: e, Limits: Limits{PendingPerDest: n}})
	first := p.st.shards[0].engine.Load()
	var cs []*gonet.TCPConn
	for i := range n {
		cs = append(cs, p.mustDial(netip.AddrPortFrom(srv4.Addr(), uint16(i+1))))
	}
	testkit.Eventually(t, "the handshakes to end", func() bool { return p.st.Stats().Streams == n })
	if p.st.Renew() {
		t.Fatal("renewed under open streams")
	}
	for _, c := range cs[1:] {
		if err := exchange(c); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Eventually(t, "all but one to end", func() bool { return len(first.ns.RegisteredEndpoints()) == 1 })
	if p.st.Renew() {
		t.Fatal("renewed under an open stream")
	}
	if err := exchange(cs[0]); err != nil {
		t.Fatal(err)
	}
	first.ns.Stats().TCP.ChecksumErrors.Increment()
	testkit.Eventually(t, "the renewal", p.st.Renew)
	if p.st.shards[0].engine.Load() == first || p.st.Renew() {
		t.Fatal("not renewed, or again for nothing")
	}
	if s := p.st.Stats(); s.DroppedChecksum != 1 || s.Accepted != n || s.AppResets != 0 || s.Aborted != 0 {
		t.Errorf("counters: %+v", s)
	}
	for _, dst := range []netip.AddrPort{srv4, srv6} {
		if err := exchange(p.mustDial(dst)); err != nil {
			t.Error(dst, err)
		}
	}
}

// TestRenewAmidst: renewals while connections come and go break none of them.
func TestRenewAmidst(t *testing.T) {
	e := newEcho()
	defer e.stop()
	p := newPair(t, offAll, Config{Shards: 1, Handler: e})
	var stop atomic.Bool
	var renewals atomic.Int64
	var wg, work sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			p.st.shards[0].engine.Load().peak.Store(remake + 1)
			if p.st.Renew() {
				renewals.Add(1)
			}
		}
	})
	for d := range 2 {
		work.Go(func() {
			end := time.Now().Add(testkit.Patience)
			for i := 0; (i < 100 || renewals.Load() < 20) && i < 30000 && time.Now().Before(end); i++ {
				testkit.Pace(time.Duration(i%4) * 250 * time.Microsecond) // so that there is none now and then
				ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
				c, err := p.dial(ctx, netip.AddrPortFrom(srv4.Addr(), uint16(d<<15+i+1)))
				cancel()
				if err == nil {
					err = exchange(c)
				}
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
			}
		})
	}
	work.Wait()
	stop.Store(true)
	wg.Wait()
	s := p.st.Stats()
	if s.AppResets != 0 || s.Aborted != 0 || s.AcceptFailed != 0 {
		t.Errorf("%d reset by the app, %d by us, %d not accepted", s.AppResets, s.Aborted, s.AcceptFailed)
	}
	t.Logf("%d renewals; %d SYNs and %d segments were sent again", renewals.Load(), s.Retransmits, s.TCPRetransmits)
	if renewals.Load() == 0 {
		t.Error("no renewal")
	}
}

// TestRenewAtTheEnd: a renewal while the stack ends leaves nothing behind.
func TestRenewAtTheEnd(t *testing.T) {
	testkit.CheckLeaks(t)
	for range 50 {
		dev, far := tuntest.Pipe(1500, offAll)
		defer far.Close()
		s, err := New(Config{Device: dev, Handler: &testHandler{}, Shards: 1})
		if err != nil {
			t.Fatal(err)
		}
		begun, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			for i := range 10 {
				s.shards[0].engine.Load().peak.Store(remake + 1)
				s.Renew()
				if i == 2 {
					close(begun)
				}
			}
		}()
		<-begun
		s.Close()
		<-ended
	}
}
