package route

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// next is the next event of w.
func next(t *testing.T, w *Watcher) Event {
	t.Helper()
	select {
	case e := <-w.Events():
		return e
	case <-time.After(testkit.Patience):
		t.Fatal("no event came")
		panic("not reached")
	}
}

func TestStreamEvents(t *testing.T) {
	testkit.CheckLeaks(t)
	far := echo(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(netip.MustParseAddrPort(farEnd), far)
	reject, err := ParseRule("port 25 reject")
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", Rules: []Rule{reject}}, nil)
	w := g.Watch(16)
	defer w.Close()
	q := newRequest(appEnd, farEnd)
	g.HandleStream(q)
	opened, dialled, established := next(t, w), next(t, w), next(t, w)
	if opened.Kind != FlowOpened || dialled.Kind != FlowDialled || established.Kind != FlowEstablished {
		t.Errorf("%v, %v, %v", opened.Kind, dialled.Kind, established.Kind)
	}
	if f := opened.Flow; f.Proto != flow.TCP || f.Dst.String() != farEnd || f.Src.String() != appEnd || f.Upstream != "p" ||
		f.ID == 0 {
		t.Errorf("%+v", f)
	}
	var s *fakeStream
	testkit.Eventually(t, "the grant", func() bool { _, _, s = q.outcome(); return s != nil })
	s.send("hello", true)
	if e := next(t, w); e.Kind != FlowClosed || e.Flow.ID != opened.Flow.ID || e.Flow.Up != 5 || e.Flow.Down != 5 ||
		e.Flow.State != "closed" || e.Err != nil {
		t.Errorf("%+v", e)
	}
	g.HandleStream(newRequest(appEnd, "203.0.113.1:25"))
	if e := next(t, w); e.Kind != FlowClosed || e.Flow.State != "rejected" || e.Flow.Rule != "port 25 reject" {
		t.Errorf("%+v", e)
	}
}

// A mapping is opened, its association established, and both end.
func TestMappingEvents(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	_ = srv
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p"}, nil)
	w := g.Watch(16)
	defer w.Close()
	g.HandlePackets([]flow.Packet{{
		Src: netip.MustParseAddrPort(appEnd), Dst: netip.MustParseAddrPort("203.0.113.1:6881"), Payload: []byte("hello"),
	}})
	if e := next(t, w); e.Kind != FlowOpened || e.Flow.Proto != flow.UDP || e.Flow.Dst.String() != "203.0.113.1:6881" {
		t.Errorf("%+v", e)
	}
	if e := next(t, w); e.Kind != FlowEstablished || e.Flow.State != "open" || e.Flow.Up != 5 {
		t.Errorf("%+v", e)
	}
	g.Close()
	if e := next(t, w); e.Kind != FlowClosed || e.Flow.Up != 5 {
		t.Errorf("%+v", e)
	}
	select {
	case <-w.Over():
	case <-time.After(testkit.Patience):
		t.Error("the watcher is not told of the end")
	}
}

// A watcher that does not read loses events and is told how many; others lose none, and no flow waits.
func TestSlowWatcher(t *testing.T) {
	testkit.CheckLeaks(t)
	reject, err := ParseRule("dst 0.0.0.0/0 reject")
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t, Config{Rules: []Rule{reject}}, nil)
	slow, fast := g.Watch(3), g.Watch(100)
	defer fast.Close()
	for range 10 {
		g.HandleStream(newRequest(appEnd, farEnd))
	}
	for range 10 {
		next(t, fast)
	}
	if lost := fast.Lost(); lost != 0 {
		t.Errorf("the one who reads has lost %d", lost)
	}
	if n, lost := len(slow.Events()), slow.Lost(); n != 3 || lost != 7 {
		t.Errorf("the one who does not has %d and has lost %d", n, lost)
	}
	if lost := slow.Lost(); lost != 0 {
		t.Errorf("and %d once more", lost)
	}
	slow.Close()
	slow.Close()
	g.HandleStream(newRequest(appEnd, farEnd))
	next(t, fast)
	if n := len(slow.Events()); n != 3 {
		t.Errorf("a watcher that was closed has %d", n)
	}
	fast.Close()
	if g.watched.any() {
		t.Error("somebody still watches")
	}
	if FlowClosed.String() != "closed" || !strings.HasPrefix(FlowOpened.String(), "open") {
		t.Error("the kinds have other names")
	}
}

// What an event costs where nobody watches.
func TestEventsCostNothing(t *testing.T) {
	s := &stream{r: &shard{Router: &Router{}}, v: &verdict{up: &upstream{}}}
	m := &mapping{s: s.r, rule: s.v}
	if n := testing.AllocsPerRun(100, func() { s.event(FlowOpened); m.event(FlowOpened); s.request() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
