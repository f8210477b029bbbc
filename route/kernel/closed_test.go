package kernel

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestClosed(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		// Without us each probe is seen.
		for _, p := range probes() {
			if !w.passes(true, p.send) {
				t.Errorf("positive control: %s was not seen", p.name)
			}
		}
		before := state(t)
		c := testConfig(t)
		c.Direct = true
		h, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Shut(); err != nil {
			t.Fatal(err)
		}
		w.mustBeClosed(t, "shut")
		tun := testTUN(t)
		if err := h.Steer(); err != nil {
			t.Fatal(err)
		}
		w.mustBeClosed(t, "steered")
		letsOut(t, w, h)
		tun.Close()
		ip(t, "link del viasocks0")
		w.mustBeClosed(t, "TUN deleted")
		ip(t, "route flush table 30323")
		w.mustBeClosed(t, "table flushed")
		// Nobody puts it back: the watch does not run.
		ip(t, "-4 rule flush protocol 118", "-6 rule flush protocol 118")
		w.mustBeClosed(t, "rules deleted")
		nft(t, "flush", "ruleset")
		w.mustBeClosed(t, "nft flushed")
		cs, err := h.Counters()
		if err != nil || len(cs) < 8 {
			t.Errorf("counters: %v, %v", cs, err)
		}
		for _, c := range cs {
			if c.Packets == 0 && (c.Reason == countBound || c.Reason == countDNS || c.Reason == countMulticast) {
				t.Errorf("%s: nothing was counted", c.Reason)
			}
		}
		down(t, h)
		checkRestored(t, before)
		if !w.passes(true, probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777}.send) {
			t.Error("not open again")
		}
	})
}

// letsOut wants what may leave a steered host to leave it: what is for the LAN, and what our own sockets send.
func letsOut(t *testing.T, w *world, h *Host) {
	t.Helper()
	for _, p := range []probe{
		{name: "lan", typ: unix.SOCK_DGRAM, dst: lan4, port: 9999},
		{name: "proxy", typ: unix.SOCK_STREAM, dst: "198.51.100.1", port: 1080, mark: 0x76000000},
		{name: "proxy6", typ: unix.SOCK_STREAM, dst: "2001:db8:1::1", port: 1080, mark: 0x76000000},
		{name: "direct", typ: unix.SOCK_DGRAM, dst: far4, port: 53, mark: 0x77000000},
	} {
		if strings.HasPrefix(p.name, "proxy") {
			ends := []Endpoint{{unix.IPPROTO_TCP, mustAddrPort("198.51.100.1:1080")}, {0, mustAddrPort("[2001:db8:1::1]:0")}}
			if err := h.SetUpstreams(ends); err != nil {
				t.Fatal(err)
			}
		}
		if !w.passes(true, p.send) {
			t.Errorf("%s did not pass", p.name)
		}
	}
	if err := h.SetUpstreams(nil); err != nil {
		t.Fatal(err)
	}
}

// The owner dies: the table stays, the guard lapses, and programs get errors.
func TestGuard(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConfig(t)
		c.Guard = time.Second
		h, tun := up(t, c)
		defer tun.Close()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { h.Run(ctx); close(done) }()
		testkit.Pace(1500 * time.Millisecond) // longer than the guard lasts without a renewal
		p := probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777}
		testkit.Eventually(t, "a guard that is renewed", func() bool { return p.send() == nil })
		cancel()
		<-done
		h.Close()                             // as a kill does
		testkit.Pace(1100 * time.Millisecond) // the guard ends
		if err := p.send(); err != unix.EPERM {
			t.Errorf("the daemon is dead: %v, want EPERM", err)
		}
		w.mustBeClosed(t, "dead")
		start := time.Now()
		h2, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if !h2.Recovered() {
			t.Error("nothing was found of the dead one")
		}
		if err := h2.Shut(); err != nil {
			t.Fatal(err)
		}
		if err := h2.Steer(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("reconciling took %v", took)
		}
		if err := p.send(); err != nil {
			t.Errorf("after the second start: %v", err)
		}
		if n := strings.Count(ip(t, "-4 rule"), "proto 118"); n != 10 {
			t.Errorf("%d rules of ours, want one set of 10", n)
		}
		down(t, h2)
	})
}
