package route

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// Servers that grant UDP and have none, or end the connection instead of an answer: one warning, then port unreachable.
func TestUDPDeafServers(t *testing.T) {
	for _, tt := range []struct {
		name, says string
		fault      sockstest.Fault
	}{
		{"ss-local without -u", "no server listens", sockstest.Fault{DeafUDP: true}},
		{"simple-socks", "ends each association at once", sockstest.Fault{CloseUDP: true}},
		{"OpenSSH -D", "ends the connection when it is asked for UDP", sockstest.EarlyClose()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testkit.CheckLeaks(t)
			srv, _, client := newProxy(t, socks.Options{})
			srv.SetFault(func(sockstest.Request) sockstest.Fault { return tt.fault })
			g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, func(r *Router) {
				r.noUDP, r.retryFirst, r.sweepEvery, r.quickEnd = time.Hour, 10*time.Millisecond, 50*time.Millisecond, time.Minute
			})
			port := 5000
			testkit.Eventually(t, "refusals", func() bool {
				g.send(fmt.Sprintf("10.0.0.1:%d", port), "203.0.113.1:1000", "a")
				port++ // as with most programs: each question has its own socket, and is not repeated soon
				testkit.Pace(20 * time.Millisecond)
				return len(g.w.refusals()) > 0
			})
			before := srv.Stats().Requests
			for i := range 20 {
				g.send(fmt.Sprintf("10.0.0.1:%d", 6000+i), "203.0.113.1:1000", "a")
			}
			for _, why := range g.w.refusals() {
				if why != flow.RefusePort {
					t.Errorf("refused by %v, want port unreachable", why)
				}
			}
			if n := len(g.w.refusals()); n < 21 {
				t.Errorf("%d refusals", n)
			}
			if n := srv.Stats().Requests; n != before || n > 2*deafAfter {
				t.Errorf("the server was asked %d times, then %d", before, n)
			}
			testkit.Eventually(t, "the warning", func() bool { return len(g.log.lines("does not work for UDP")) == 1 })
			if w := g.log.lines(tt.says); len(w) == 0 || len(g.log.lines("works again")) != 0 {
				t.Errorf("the log says %q", g.log.lines("upstream"))
			}
			if up := g.Upstreams()[0]; up.TCPDown || !up.UDPDown {
				t.Errorf("status says %+v", up)
			}
		})
	}
}

// OpenSSH -D closes the connection for each target that refuses: that is the target's refusal, and nothing is wrong with TCP.
func TestStreamEndedByServer(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.EarlyClose() })
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	for range 5 {
		q := newRequest(appEnd, farEnd)
		g.HandleStream(q)
		if got := refusal(t, q); got != flow.RefuseReset {
			t.Errorf("%v", got)
		}
	}
	if w := g.log.lines("upstream does not work"); len(w) > 0 || g.Upstreams()[0].TCPDown {
		t.Errorf("%q, %+v", w, g.Upstreams())
	}
}

// sing-box and trojan end the association when one datagram cannot be sent. It is made again at once, what ended it is not sent
// again, and at least 280 of 300 echoes come beside twenty such datagrams, in whatever phase to the echoes they are sent: an echo
// that is on its way to or from a relay that ends is lost, as it would be without us. VIASOCKS_SLOW takes the minute that this
// is about; else it is a twentieth of that.
func TestUDPPoison(t *testing.T) {
	if testing.Short() {
		t.Skip("it echoes for some seconds in each phase")
	}
	for _, tt := range []struct {
		phase         string
		before, after bool // poison right before the echo, or right after it; neither: halfway between two
	}{{phase: "between"}, {phase: "before", before: true}, {phase: "after", after: true}} {
		t.Run(tt.phase, func(t *testing.T) { testUDPPoison(t, tt.before, tt.after) })
	}
}

func testUDPPoison(t *testing.T, before, after bool) {
	testkit.CheckLeaks(t)
	const echoes, poisonEvery = 300, 15
	every, want := 10*time.Millisecond, 180 // a busy machine may lose several echoes for each; a pause of a second loses 100
	if os.Getenv("VIASOCKS_SLOW") != "" {
		every, want = 200*time.Millisecond, 280
	}
	srv, _, client := newProxy(t, socks.Options{})
	var poisoned atomic.Int32
	srv.SetFault(func(sockstest.Request) sockstest.Fault {
		return sockstest.Fault{EndUDP: func(dst sockstest.Addr) bool {
			bad := dst.IP == netip.MustParseAddr("203.0.113.66")
			if bad {
				poisoned.Add(1)
			}
			return bad
		}}
	})
	echo := newFar(t, srv, "203.0.113.1:1000")
	go func() {
		b := make([]byte, 100)
		for n, from, err := echo.ReadFrom(b); err == nil; n, from, err = echo.ReadFrom(b) {
			_, _ = echo.WriteTo(b[:n], from)
		}
	}()
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range echoes {
		poison := func() {
			if i%poisonEvery == poisonEvery-1 {
				g.send("10.0.0.1:5000", "203.0.113.66:1000", "poison")
			}
		}
		if before {
			poison()
		}
		g.send("10.0.0.1:5000", "203.0.113.1:1000", fmt.Sprint(i))
		if after {
			poison()
		}
		testkit.Pace(every / 2)
		if !before && !after {
			poison()
		}
		<-tick.C
	}
	testkit.Until(2*time.Second, func() bool { return len(g.w.packets()) >= echoes }) // some may be lost
	n := len(g.w.packets())
	t.Logf("%d of %d echoes came beside %d datagrams that ended their association", n, echoes, poisoned.Load())
	if n < want {
		t.Errorf("%d echoes came, want %d", n, want)
	}
	if n := int(poisoned.Load()); n > echoes/poisonEvery {
		t.Errorf("a datagram that ended its association was sent again: %d times for %d", n, echoes/poisonEvery)
	}
	if n := len(g.log.lines("upstream does not work")); n > 0 || g.Stats().Refused > 0 {
		t.Errorf("%d warnings, %d refused", n, g.Stats().Refused)
	}
}

// returningUpstream says when a server is back.
type returningUpstream struct {
	*fakeUpstream
	up func()
}

func (u *returningUpstream) OnUp(f func()) { u.up = f }

// A server that works again is asked for associations at once, however long the next try is away, and also when it had said that
// it has no UDP.
func TestServerIsBack(t *testing.T) {
	for _, err := range []error{&socks.ServerError{Server: "p", Op: socks.OpConnect, Err: syscall.ECONNREFUSED},
		socks.ReplyCommandNotSupported} {
		t.Run(err.Error(), func(t *testing.T) {
			testkit.CheckLeaks(t)
			var asked atomic.Int32
			u := &returningUpstream{
				fakeUpstream: &fakeUpstream{
					name: "p",
					open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
						asked.Add(1)
						done(nil, err)
					},
				},
			}
			g := newRig(
				t,
				Config{Upstreams: []Upstream{u}, Default: "p"},
				func(r *Router) { r.retryFirst, r.retryMax = time.Hour, time.Hour },
			)
			g.send("10.0.0.1:5000", "203.0.113.1:1000", "a")
			testkit.Eventually(t, "the first try", func() bool { return asked.Load() == 1 })
			testkit.Eventually(t, "the end of the first try", func() bool { return g.Stats().Pending == 0 })
			u.up()
			testkit.Eventually(t, "the try of the server that is back", func() bool {
				g.send("10.0.0.1:5000", "203.0.113.1:1000", "b")
				return asked.Load() == 2
			})
		})
	}
}
