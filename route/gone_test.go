package route

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

const (
	fastLook = 5 * time.Millisecond
	fastGone = 100 * time.Millisecond
)

func fast(r *Router) {
	r.sweepEvery, r.lookEvery, r.lookMost = fastLook, fastLook, fastLook
	r.goneAfter, r.streamsEvery = fastGone, fastLook
}

// A mapping ends soon after its socket, not with it; one that is opened again keeps the mapping; one that is there, or cannot
// be asked about, keeps it for as long as before.
func TestMappingEndsAfterSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	const stays, any4, any6, goes, back = "10.0.0.1:5000", "10.0.0.1:5001", "[fd00::1]:5002", "10.0.0.1:5003", "10.0.0.1:5004"
	sockets := &fakeSockets{}
	sockets.set(stays, "0.0.0.0:5001", "[::]:5002", goes, back)
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Sockets: sockets}, fast)
	var links []*fakeLink
	for i, src := range []string{stays, any4, any6, goes, back} {
		dst := "203.0.113.1:1000"
		if netip.MustParseAddrPort(src).Addr().Is6() {
			dst = "[2001:db8::1]:1000"
		}
		g.send(src, dst, "a")
		links = append(links, &fakeLink{})
		u.ask(t, i).done(links[i], nil)
	}
	looked := func(n int) {
		t.Helper()
		sockets.mu.Lock()
		from := sockets.lists
		sockets.mu.Unlock()
		testkit.Eventually(t, "looks at the sockets", func() bool {
			sockets.mu.Lock()
			defer sockets.mu.Unlock()
			return sockets.lists >= from+n
		})
	}
	looked(2)
	began := time.Now()
	sockets.set(stays, "0.0.0.0:5001", "[::]:5002")
	looked(2)
	sockets.set(stays, "0.0.0.0:5001", "[::]:5002", back)
	testkit.Eventually(t, "the mapping of the closed socket to end", func() bool { return g.Stats().MappingsNow == 4 })
	if after := time.Since(began); after < fastGone {
		t.Errorf("it ended after %v: a socket opened again at once would have lost it", after)
	}
	testkit.Eventually(t, "its link to be closed", links[3].isClosed)
	looked(int(2 * fastGone / fastLook))
	if s := g.Stats(); s.MappingsNow != 4 || s.MappingsGone != 1 || s.MappingsExpired != 0 {
		t.Errorf("%+v", s)
	}
	for _, i := range []int{0, 1, 2, 4} {
		if links[i].isClosed() {
			t.Errorf("link %d was closed", i)
		}
	}
}

// On a host that forwards, a socket that was never found may be a guest's: its mapping lives on. One that was found is gone.
func TestMappingOfGuest(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, refused := range []error{flow.ErrForwarded, errTired} {
		var u manualUpstream
		sockets := &fakeSockets{err: refused}
		sockets.set("10.0.0.1:5000")
		g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Sockets: sockets}, fast)
		for i, src := range []string{"10.0.0.1:5000", "10.0.0.7:5000"} {
			g.send(src, "203.0.113.1:1000", "a")
			u.ask(t, i).done(&fakeLink{}, nil)
		}
		testkit.Eventually(
			t,
			"a look at the sockets",
			func() bool { sockets.mu.Lock(); defer sockets.mu.Unlock(); return sockets.lists >= 2 },
		)
		sockets.set()
		sockets.mu.Lock()
		sockets.tired = refused == errTired
		sockets.mu.Unlock()
		want := 2
		if refused == flow.ErrForwarded {
			want = 1
		}
		testkit.Eventually(t, "the host's own mapping to end", func() bool { return g.Stats().MappingsNow == want })
		sockets.mu.Lock()
		from := sockets.lists
		sockets.mu.Unlock()
		testkit.Eventually(t, "more looks", func() bool {
			sockets.mu.Lock()
			defer sockets.mu.Unlock()
			return sockets.lists >= from+int(2*fastGone/fastLook)
		})
		if n := g.Stats().MappingsNow; n != want {
			t.Errorf("%v: %d mappings are left, not %d", refused, n, want)
		}
	}
}

// Thousands of mappings cost one question in each interval, and none for each of them.
func TestMappingsAskedTogether(t *testing.T) {
	testkit.CheckLeaks(t)
	u := &fakeUpstream{
		name: "p",
		open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
			done(&fakeLink{}, nil)
		},
	}
	sockets := &fakeSockets{}
	var all []string
	const n = 2000
	for i := range n {
		all = append(all, fmt.Sprintf("10.0.0.1:%d", 5000+i))
	}
	sockets.set(all...)
	g := newRig(t, Config{Upstreams: []Upstream{u}, Default: "p", Sockets: sockets, Limits: Limits{Mappings: 2 * n}}, fast)
	for _, src := range all {
		g.send(src, "203.0.113.1:1000", "a")
	}
	testkit.Eventually(t, "some looks", func() bool { sockets.mu.Lock(); defer sockets.mu.Unlock(); return sockets.lists >= 4 })
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	if sockets.asks > n {
		t.Errorf("%d single questions for %d mappings: more than the first one of each", sockets.asks, n)
	}
}

// The mappings of thousands of closed sockets end without a question for each of them, however many there are at a time.
func TestGoneAskedTogether(t *testing.T) {
	testkit.CheckLeaks(t)
	u := &fakeUpstream{
		name: "p",
		open: func(_ context.Context, _ func([]flow.Packet), done func(relay.PacketLink, error), _ func(error)) {
			done(&fakeLink{}, nil)
		},
	}
	sockets := &fakeSockets{}
	const n = 2000
	g := newRig(t, Config{Upstreams: []Upstream{u}, Default: "p", Sockets: sockets, Limits: Limits{Mappings: 2 * n}}, fast)
	for i := range n {
		g.send(fmt.Sprintf("10.0.0.1:%d", 5000+i), "203.0.113.1:1000", "a")
	}
	testkit.Eventually(t, "the mappings to end", func() bool { return g.Stats().MappingsNow == 0 })
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	if sockets.asks > n {
		t.Errorf("%d single questions for %d mappings: more than the first one of each", sockets.asks, n)
	}
	if s := g.Stats(); s.MappingsGone != n {
		t.Errorf("%+v", s)
	}
}

// silent is a far end that takes what it gets, and neither answers nor ends.
func silent(t testing.TB) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	over := make(chan struct{})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); <-over })
		}
	})
	t.Cleanup(func() { close(over); l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// A TCP flow whose app has closed its socket ends, a half-closed one of an app that lives does not.
func TestStreamOrphaned(t *testing.T) {
	testkit.CheckLeaks(t)
	far := silent(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort(farEnd), far)
	sockets := &fakeSockets{}
	const lives, dies, guest = "10.0.0.1:4000", "10.0.0.1:4001", "10.0.0.7:4002"
	sockets.set(lives, dies)
	sockets.err = flow.ErrForwarded
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Sockets: sockets}, fast)
	for _, src := range []string{lives, dies, guest} {
		q := newRequest(src, farEnd)
		g.HandleStream(q)
		var s *fakeStream
		testkit.Eventually(t, "the grant", func() bool { _, _, s = q.outcome(); return s != nil })
		s.send("hello", true) // and FIN: the far end neither answers nor closes
	}
	sockets.set(lives)
	testkit.Eventually(t, "the orphan to end", func() bool { return g.Stats().StreamsNow == 2 })
	testkit.Eventually(t, "its line", func() bool { return len(g.log.lines("state=orphaned")) == 1 })
	sockets.mu.Lock()
	from := sockets.asks
	sockets.mu.Unlock()
	testkit.Eventually(t, "many more looks", func() bool {
		sockets.mu.Lock()
		defer sockets.mu.Unlock()
		return sockets.asks > from+50
	})
	if s := g.Stats(); s.StreamsNow != 2 || s.Orphans != 1 {
		t.Errorf("%+v", s)
	}
	if line := g.log.lines("state=orphaned")[0]; !strings.Contains(line, dies) ||
		!strings.Contains(line, relay.ErrOrphan.Error()) {
		t.Errorf("%s", line)
	}
}
