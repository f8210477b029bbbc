package route

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A datagram of an open association allocates nothing, up or down; neither does the verdict on a destination.
func TestDatagramsAllocateNothing(t *testing.T) {
	var u manualUpstream
	cfg := Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p"}
	for i := range 20 {
		cfg.Rules = append(cfg.Rules, mustRule(t, fmt.Sprintf("dst 10.%d.0.0/16 port 1-1000 drop", i)))
	}
	g := newRig(t, cfg, nil)
	pkts := make([]flow.Packet, 64)
	for i := range pkts {
		src := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(1024+i%8))
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 32)}), 6881)
		pkts[i] = flow.Packet{Src: src, Dst: dst, Payload: make([]byte, 100), Head: make([]byte, 28)}
	}
	g.shards[0].handlePackets(pkts)
	link := &nullLink{}
	for i := range 8 {
		u.ask(t, i).done(link, nil)
	}
	testkit.Eventually(t, "all links", func() bool { return g.Stats().Pending == 0 })
	// others of the process may allocate meanwhile
	if n := testing.AllocsPerRun(100, func() { g.shards[0].handlePackets(pkts) }); n >= 1 {
		t.Errorf("%v allocations for a burst up", n)
	}
	s := g.shards[0]
	s.udp.mu.Lock()
	if link.n < 100*len(pkts) {
		t.Errorf("%d datagrams were sent", link.n)
	}
	a := s.udp.newest.assocs[0]
	s.udp.mu.Unlock()
	down := []flow.Packet{{Src: pkts[0].Dst, Payload: make([]byte, 100)}, {Src: pkts[1].Dst, Payload: make([]byte, 100)}}
	if n := testing.AllocsPerRun(100, func() { s.deliver(a, nullWriter{}, down) }); n >= 1 {
		t.Errorf("%v allocations for a burst down", n)
	}
	p := g.policy.Load()
	if n := testing.AllocsPerRun(100, func() {
		for i := range pkts {
			p.decide(&query{proto: flow.UDP, dst: pkts[i].Dst})
			p.decide(&query{proto: flow.TCP, dst: pkts[i].Dst})
		}
	}); n >= 1 {
		t.Errorf("%v allocations for a verdict", n)
	}
}
