package socks

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// calmGroup is a group of servers that are never asked.
func calmGroup(t *testing.T, o GroupOptions) *Group {
	t.Helper()
	d, err := NewDialer(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	g, err := d.Group(l, []Server{mustServer(t, "socks5://192.0.2.1"), mustServer(t, "socks5://192.0.2.2")}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// attempt is a flow that has asked its first server.
func (g *Group) attempt(i int) *run {
	r := &run{g: g, ctx: context.Background(), dst: Addr{Name: fmt.Sprint("name", i), Port: 1}}
	if !g.beginCalm(&r.a, CmdConnect, sourceOf(r.ctx), r.dst) {
		g.mu.Lock()
		g.c.begin(&r.a, CmdConnect, sourceOf(r.ctx), r.dst)
		g.mu.Unlock()
	}
	var ok bool
	if r.server, ok = g.nextCalm(&r.a); !ok {
		g.mu.Lock()
		r.server, _ = g.c.next(&r.a, g.d.now())
		g.mu.Unlock()
	}
	return r
}

// TestCalmTakesNoLock: while all servers are well a flow passes though somebody holds the lock; after a fault it takes the lock
// until a success has cleared it.
func TestCalmTakesNoLock(t *testing.T) {
	g := calmGroup(t, GroupOptions{})
	passes := func() bool {
		done := make(chan struct{})
		g.mu.Lock()
		go func() { r := g.attempt(1); g.took(r, nil); close(done) }()
		wait := 20 * time.Second // a machine may stall for seconds
		if !g.calm.Load() {
			wait = 50 * time.Millisecond
		}
		select {
		case <-done:
			g.mu.Unlock()
			return true
		case <-time.After(wait):
			g.mu.Unlock()
			<-done
			return false
		}
	}
	if !passes() {
		t.Error("a flow waits for the lock of a calm group")
	}
	fault := &ServerError{Server: "s", Op: OpConnect, Err: ErrLate}
	g.took(g.attempt(2), fault)
	if passes() {
		t.Error("a success after a fault was not noted")
	}
	if !passes() {
		t.Error("the group is not calm again after a success")
	}
	g.took(g.attempt(3), ReplyAddrTypeNotSupported)
	if g.calm.Load() {
		t.Error("calm, though a server cannot carry names")
	}
}

// TestCalmAnswersCount: what was granted past the lock counts when others of the server are silent.
func TestCalmAnswersCount(t *testing.T) {
	for _, answers := range []bool{true, false} {
		g := calmGroup(t, GroupOptions{FailThreshold: 1})
		var quiet []*run
		for i := range fromSilentOn + 1 {
			quiet = append(quiet, g.attempt(i))
		}
		testkit.Pace(2 * time.Millisecond) // the answer is later than the requests
		if answers {
			g.took(g.attempt(99), nil)
		}
		for _, r := range quiet {
			g.took(r, ErrSilent)
		}
		if down := g.Servers()[0].Down; down == answers {
			t.Errorf("answers %v: down %v", answers, down)
		}
	}
}
