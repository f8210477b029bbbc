package route

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

type nullLink struct{ n int }

func (l *nullLink) Send(p []flow.Packet) (int, error) { l.n += len(p); return len(p), nil }
func (l *nullLink) Close() error                      { return nil }
func (l *nullLink) Stats() relay.LinkStats            { return relay.LinkStats{} }
func (l *nullLink) Overflowed() uint64                { return 0 }

type nullWriter struct{}

func (nullWriter) WritePackets(p []flow.Packet) (int, error) { return len(p), nil }
func (nullWriter) Refuse(flow.Packet, flow.Refusal)          {}

// BenchmarkHandlePackets is a burst of 64 datagrams, up: from one endpoint to one destination, from one to many as a DHT
// node sends, and from many endpoints.
func BenchmarkHandlePackets(b *testing.B) {
	for _, shape := range []struct {
		name       string
		srcs, dsts int
	}{{"one-to-one", 1, 1}, {"one-to-64", 1, 64}, {"64-to-64", 64, 64}, {"8192-to-64", 8192, 64}} {
		for _, rules := range []int{0, 20} {
			b.Run(fmt.Sprintf("%s/rules=%d", shape.name, rules), func(b *testing.B) {
				var u manualUpstream
				cfg := Config{
					Upstreams: []Upstream{u.upstream("p")},
					Default:   "p",
					Limits:    Limits{Mappings: 8192, Associations: 8192},
				}
				for i := range rules {
					cfg.Rules = append(cfg.Rules, mustRule(b, fmt.Sprintf("dst 10.%d.0.0/16 drop", i)))
				}
				g := newRig(b, cfg, nil)
				pkts := make([]flow.Packet, shape.srcs*64/min(shape.srcs, 64))
				for i := range pkts {
					src := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(1024+i%shape.srcs))
					dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % shape.dsts)}), 6881)
					pkts[i] = flow.Packet{Src: src, Dst: dst, Payload: make([]byte, 100), Head: make([]byte, 28)}
				}
				s := g.shards[0]
				s.handlePackets(pkts)
				link := &nullLink{}
				for i := range shape.srcs {
					u.ask(b, i).done(link, nil)
				}
				testkit.Eventually(b, "all links", func() bool { return g.Stats().Pending == 0 })
				b.ReportAllocs()
				at := 0
				for b.Loop() {
					s.handlePackets(pkts[at : at+64])
					if at += 64; at == len(pkts) {
						at = 0
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/datagram")
				s.udp.mu.Lock() // link is not locked
				defer s.udp.mu.Unlock()
			})
		}
	}
}

// BenchmarkDeliver is a burst of 64 datagrams, down.
func BenchmarkDeliver(b *testing.B) {
	r := &shard{Router: &Router{}}
	m := &mapping{s: r, src: netip.MustParseAddrPort("10.0.0.1:1")}
	a := &assoc{m: m}
	pkts := make([]flow.Packet, 64)
	for i := range pkts {
		pkts[i] = flow.Packet{Src: netip.MustParseAddrPort("203.0.113.1:1"), Payload: make([]byte, 100)}
	}
	b.ReportAllocs()
	for b.Loop() {
		r.deliver(a, nullWriter{}, pkts)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/datagram")
}
