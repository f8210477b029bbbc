package route

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// callWriter remembers each call of WritePackets.
type callWriter struct{ calls [][]flow.Packet }

func (w *callWriter) WritePackets(pkts []flow.Packet) (int, error) {
	var call []flow.Packet
	for _, p := range pkts {
		call = append(call, clonePacket(p))
	}
	w.calls = append(w.calls, call)
	return len(pkts), nil
}

func (w *callWriter) Refuse(flow.Packet, flow.Refusal) {}

// runs is how many frames a writer makes of packets, if each takes those that have the same endpoints and length.
func runs(pkts []flow.Packet) int {
	n := 0
	for i, p := range pkts {
		if i == 0 || p.Src != pkts[i-1].Src || p.Dst != pkts[i-1].Dst || len(p.Payload) != len(pkts[i-1].Payload) {
			n++
		}
	}
	return n
}

// newBurstShard is the only shard of a Router with fake addresses, which writes to w. It does not run: nothing that is asked here
// needs an upstream.
func newBurstShard(t testing.TB, w flow.PacketWriter) *shard {
	t.Helper()
	pool, err := dns.NewPool(dns.PoolConfig{V4: flow.Pool4, V6: flow.Pool6, TTL: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	loop, err := relay.NewLoop(relay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Close() })
	r, err := New(Config{
		Upstreams: []Upstream{(&manualUpstream{}).upstream("p")}, Default: "p", Pool: pool, Fake: true,
		Rules:     []Rule{mustRule(t, "dst 203.0.113.0/24 drop")},
		Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))},
		Loops:     []*relay.Loop{loop},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Attach(func(int) flow.PacketWriter { return w })
	t.Cleanup(func() { r.Close() })
	return r.shards[0]
}

// questionOf is a question of DNS for the address of a name, from a port.
func questionOf(id, port uint16, name string) flow.Packet {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	b = append(b, 0, 0, 1, 0, 1)
	return flow.Packet{
		Src:     netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port),
		Dst:     netip.MustParseAddrPort("192.0.2.53:53"),
		Payload: b, Head: make([]byte, 28),
	}
}

// TestAnswersOfABurst: the answers to a burst of questions from several sockets are written by one call, those of one socket and
// one length side by side, each to the socket that asked. A datagram that is no question is not in their way.
func TestAnswersOfABurst(t *testing.T) {
	testkit.CheckLeaks(t)
	w := &callWriter{}
	s := newBurstShard(t, w)
	var pkts []flow.Packet
	for i := range uint16(60) {
		pkts = append(pkts, questionOf(i, 2000+i%5, fmt.Sprintf("n%d", i)))
	}
	other := flow.Packet{Src: pkts[0].Src, Dst: netip.MustParseAddrPort("203.0.113.1:99"), Head: make([]byte, 28)}
	pkts = slices.Insert(pkts, 20, other)
	s.handlePackets(pkts)
	if len(w.calls) != 1 || len(w.calls[0]) != 60 {
		t.Fatalf("%d calls; the first has %d answers", len(w.calls), len(w.calls[0]))
	}
	if n := runs(w.calls[0]); n != 10 {
		t.Errorf("%d runs for 5 sockets and names of 2 lengths", n)
	}
	for _, p := range w.calls[0] {
		id := binary.BigEndian.Uint16(p.Payload)
		q := questionOf(id, 2000+id%5, fmt.Sprintf("n%d", id))
		if p.Dst != q.Src || p.Src != q.Dst || !bytes.Equal(p.Payload[12:len(q.Payload)], q.Payload[12:]) || p.Payload[7] != 1 {
			t.Errorf("the answer %x from %v to %v", p.Payload, p.Src, p.Dst)
		}
	}
	// What comes next is written anew, and alone.
	w.calls = nil
	s.handlePackets(pkts[:1])
	if len(w.calls) != 1 || len(w.calls[0]) != 1 || !bytes.Equal(w.calls[0][0].Payload[:2], pkts[0].Payload[:2]) {
		t.Errorf("then %v", w.calls)
	}
	// A question that another goroutine hands in has no burst to wait for.
	w.calls = nil
	s.udp.mu.Lock()
	s.question(w, &pkts[1], 0)
	s.udp.mu.Unlock()
	if len(w.calls) != 1 {
		t.Errorf("%d calls for a question outside of a burst", len(w.calls))
	}
}

// TestLongBurst: more questions than a burst holds, and longer ones, are all answered once.
func TestLongBurst(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, tt := range []struct{ questions, labels int }{{1000, 0}, {300, 4}, {burstAnswers, 0}, {burstAnswers + 1, 0}} {
		w := &callWriter{}
		s := newBurstShard(t, w)
		var pkts []flow.Packet
		for i := range tt.questions {
			name := strings.Repeat(strings.Repeat("a", 50)+".", tt.labels) + fmt.Sprint("n", i)
			pkts = append(pkts, questionOf(uint16(i), uint16(2000+i%3), name))
		}
		s.handlePackets(pkts)
		seen := make(map[uint16]bool)
		for _, call := range w.calls {
			for _, p := range call {
				seen[binary.BigEndian.Uint16(p.Payload)] = true
			}
		}
		if got := slices.Concat(w.calls...); len(got) != tt.questions || len(seen) != tt.questions {
			t.Errorf("%d answers to %d of %d questions", len(got), len(seen), tt.questions)
		}
		if room := cap(s.burst.room); room > burstRoom {
			t.Errorf("%d bytes are kept for answers", room)
		}
		if most := tt.questions/20 + 1; len(w.calls) > most {
			t.Errorf("%d calls for %d questions", len(w.calls), tt.questions)
		}
	}
}

// TestAnswersKeepTheirOrder: the answers to one socket are written in the order of its questions, also where their lengths differ
// and the answers to other sockets come between them.
func TestAnswersKeepTheirOrder(t *testing.T) {
	testkit.CheckLeaks(t)
	w := &callWriter{}
	s := newBurstShard(t, w)
	var pkts []flow.Packet
	for i := range uint16(burstAnswers) {
		pkts = append(pkts, questionOf(i, 2000+i%3*burstSlots, strings.Repeat("a", 1+int(i*7%20))))
	}
	s.handlePackets(pkts)
	last, n := map[netip.AddrPort]int{}, 0
	for _, p := range slices.Concat(w.calls...) {
		id := int(binary.BigEndian.Uint16(p.Payload))
		if before, ok := last[p.Dst]; ok && id < before {
			t.Errorf("%v: the answer to question %d comes after that to %d", p.Dst, id, before)
		}
		last[p.Dst] = id
		n++
	}
	if n != burstAnswers || len(last) != 3 {
		t.Errorf("%d answers to %d sockets", n, len(last))
	}
}

// TestQuestionsAllocateNothing: a question for a name that has a fake address costs no memory, from the frame to the answer.
func TestQuestionsAllocateNothing(t *testing.T) {
	s := newBurstShard(t, nullWriter{})
	var pkts []flow.Packet
	for i := range uint16(burstAnswers) {
		pkts = append(pkts, questionOf(i, 2000+i%8, fmt.Sprintf("n%d", i)))
	}
	s.handlePackets(pkts)
	if n := testing.AllocsPerRun(100, func() { s.handlePackets(pkts) }); int(n) >= len(pkts)/2 {
		t.Errorf("%v allocations for %d questions", n, len(pkts))
	}
}

// BenchmarkQuestions is the cost of a question without the kernel.
func BenchmarkQuestions(b *testing.B) {
	s := newBurstShard(b, nullWriter{})
	var pkts []flow.Packet
	for i := range uint16(burstAnswers) {
		pkts = append(pkts, questionOf(i, 2000+i%8, fmt.Sprintf("n%d", i)))
	}
	b.ReportAllocs()
	for b.Loop() {
		s.handlePackets(pkts)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(pkts)), "ns/question")
}
