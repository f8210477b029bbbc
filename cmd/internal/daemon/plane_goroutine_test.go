package daemon

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// ours counts the goroutines of the data plane: those of the app's stack, the proxy and this test are not.
func ours() (n int, stacks string) {
	b := make([]byte, 64<<20)
	all := strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n")
	var mine []string
	for _, g := range all {
		if strings.Contains(g, "/sockstest.") || strings.Contains(g, "/stacktest.") || strings.Contains(g, "testing.") ||
			strings.Contains(g, "daemon.TestPlaneGoroutines") {
			continue
		}
		mine = append(mine, g)
	}
	return len(mine), strings.Join(mine, "\n\n")
}

// present is an app whose sockets are there, however late its SYNs come.
type present struct{}

func (present) Exists(flow.Proto, netip.AddrPort, netip.AddrPort) (bool, error) { return true, nil }
func (present) Forwards() bool                                                  { return false }
func (present) BoundUDP(func(netip.AddrPort)) error                             { return nil }

// A thousand dials that wait for the proxy and a thousand connections that wait for nothing have no goroutine.
func TestPlaneGoroutines(t *testing.T) {
	testkit.CheckLeaks(t)
	const each, silent = 1000, 6881
	far, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	var kept []net.Conn
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for c, err := far.Accept(); err == nil; c, err = far.Accept() {
			kept = append(kept, c)
		}
	})
	s, app, p := overMemory(t, far.Addr().(*net.TCPAddr).AddrPort(), present{}, "--max-pending-per-destination", "2000")
	s.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Dst.Port == silent {
			return sockstest.Silence()
		}
		return sockstest.Fault{}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for range each {
		c, err := app.DialTCP(ctx, farTCP)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	before, _ := ours()
	pending, give := context.WithCancel(ctx)
	var dials sync.WaitGroup
	for range each {
		dials.Go(func() { _, _ = app.DialTCP(pending, netip.AddrPortFrom(farTCP.Addr(), silent)) })
	}
	testkit.Until(time.Minute, func() bool { return p.stack.Stats().Pending >= each })
	fewGoroutines(t, p, each, before)
	give()
	dials.Wait()
	stop(p, nil)
	far.Close()
	accepting.Wait()
	for _, c := range kept {
		c.Close()
	}
}

// fewGoroutines wants as many idle connections and pending dials, and not one goroutine for each.
func fewGoroutines(t *testing.T, p *plane, each int64, before int) {
	t.Helper()
	st := p.stack.Stats()
	var n int
	var stacks string
	testkit.Until(testkit.Patience, func() bool { // timers that fire just now have one for a moment
		n, stacks = ours()
		return n <= 40
	})
	t.Logf(
		"%d connections idle, %d dials pending: %d goroutines of the data plane, %d before the dials",
		st.Streams,
		st.Pending,
		n,
		before,
	)
	if st.Streams != each || st.Pending != each {
		t.Errorf("%d streams, %d pending", st.Streams, st.Pending)
	}
	if n > 40 {
		t.Errorf("some have a goroutine:\n%.4000s", stacks)
	}
}
