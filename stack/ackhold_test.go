package stack

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// bareConn is an open connection of an app that is made of segments.
type bareConn struct {
	*rawStack
	*testConn
	src, dst netip.AddrPort
	seq, ack uint32
}

const (
	flagsACK  = header.TCPFlagAck
	flagsData = header.TCPFlagAck | header.TCPFlagPsh
	flagsFIN  = header.TCPFlagAck | header.TCPFlagFin
)

// openBare opens a connection. The timer of the held ACKs is never set: a test calls expire.
func openBare(r *rawStack, src, dst netip.AddrPort) *bareConn {
	r.t.Helper()
	r.s.shards[0].acks.armed.Store(true)
	c := &bareConn{rawStack: r, testConn: newTestConn(), src: src, dst: dst, seq: 1000}
	c.say(header.TCPFlagSyn, "")
	c.seq++
	hdr := ip4HeaderLen
	if src.Addr().Is6() {
		hdr = ip6HeaderLen
	}
	c.ack = r.synAck(c.testConn, hdr).SequenceNumber() + 1
	c.say(flagsACK, "")
	must(r.t, c.opened())
	r.t.Cleanup(func() { c.st.Close() })
	return c
}

// say sends a segment of the app's.
func (c *bareConn) say(flags header.TCPFlags, data string) {
	c.rawStack.t.Helper()
	c.send(tun.Header{}, segment(c.src, c.dst, c.seq, c.ack, flags, nil, []byte(data)))
	c.seq += uint32(len(data))
	if flags&header.TCPFlagFin != 0 {
		c.seq++
	}
}

// hear takes the next segment to the app, which must have these flags and acknowledge all that was said.
func (c *bareConn) hear(flags header.TCPFlags) {
	t := c.rawStack.t
	t.Helper()
	_, b := c.recv(testkit.Patience)
	if b == nil {
		t.Fatal("no segment")
	}
	off := ip4HeaderLen
	if b[0]>>4 == 6 {
		off = ip6HeaderLen
	}
	h := header.TCP(b[off:])
	if h.Flags() != flags || h.AckNumber() != c.seq || h.DestinationPort() != c.src.Port() {
		t.Fatalf("a segment with flags %v to port %d acknowledges %d; want %v, %d, %d", h.Flags(), h.DestinationPort(),
			h.AckNumber(), flags, c.src.Port(), c.seq)
	}
	c.ack = h.SequenceNumber() + uint32(len(b)-off-int(h.DataOffset()))
	if flags&header.TCPFlagFin != 0 {
		c.ack++
	}
}

// waits waits until the ACK of all that was said is held.
func (c *bareConn) waits() {
	c.rawStack.t.Helper()
	acks := c.s.shards[0].acks
	testkit.Eventually(c.rawStack.t, "the ACK to be held", func() bool {
		for i := range acks.slots {
			s := &acks.slots[i]
			s.mu.Lock()
			b := s.b[:s.n]
			ok := s.held.Load() != 0 && header.TCP(b[s.ip:]).AckNumber() == c.seq &&
				header.TCP(b[s.ip:]).DestinationPort() == c.src.Port()
			s.mu.Unlock()
			if ok {
				return true
			}
		}
		return false
	})
}

// expire has the ACKs that wait written.
func (c *bareConn) expire() {
	acks := c.s.shards[0].acks
	for i := range acks.slots {
		acks.slots[i].mu.Lock()
		acks.slots[i].due = 0
		acks.slots[i].mu.Unlock()
	}
	acks.expire()
	acks.armed.Store(true)
}

var rawEnds = map[string][2]netip.AddrPort{
	"v4": {netip.AddrPortFrom(appIP4, 1234), srv4},
	"v6": {netip.AddrPortFrom(appIP6, 1234), srv6},
}

// TestACKRides: the ACK of a question goes with the answer, and that of the app's FIN with our FIN. No frame is written for
// either alone.
func TestACKRides(t *testing.T) {
	for name, ends := range rawEnds {
		t.Run(name, func(t *testing.T) {
			c := openBare(newRaw(t, Config{Shards: 1}), ends[0], ends[1])
			c.say(flagsData, "question")
			c.waits()
			mustRead(t, c.testConn, "question")
			if _, err := c.Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			c.hear(flagsData)
			c.say(flagsFIN, "")
			c.waits()
			must(t, c.st.CloseWrite())
			c.hear(flagsFIN)
			c.say(flagsACK, "")
			c.expire()
			c.quiet()
		})
	}
}

// TestACKNotDue: when the timer rings, an ACK that has not waited for long enough stays, and the timer is set for it.
func TestACKNotDue(t *testing.T) {
	c := openBare(newRaw(t, Config{Shards: 1}), rawEnds["v4"][0], rawEnds["v4"][1])
	c.say(flagsData, "x")
	c.waits()
	acks := c.s.shards[0].acks
	s := acks.slot(c.hash())
	s.mu.Lock()
	s.due = acks.now() + int64(time.Hour)
	s.mu.Unlock()
	acks.expire()
	c.waits()
	if !acks.armed.Load() {
		t.Error("the timer is not set")
	}
	c.quiet()
}

// mustRead reads what the app has said.
func mustRead(t *testing.T, c *testConn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

// TestACKWaits: without an answer the ACK comes after ackDelay, and not before.
func TestACKWaits(t *testing.T) {
	c := openBare(newRaw(t, Config{Shards: 1}), rawEnds["v4"][0], rawEnds["v4"][1])
	c.s.shards[0].acks.armed.Store(false)
	for _, flags := range []header.TCPFlags{flagsData, flagsFIN} {
		sent := time.Now()
		c.say(flags, "x")
		c.hear(flagsACK)
		if d := time.Since(sent); d < ackDelay {
			t.Errorf("the ACK came after %v", d)
		}
	}
}

// TestACKWaitsShortly: an app that waits for the ACK of its first write before it sends its second one does not lose the 40 ms
// for which Linux delays an ACK. The shortest of several waits counts, because this machine may be busy.
func TestACKWaitsShortly(t *testing.T) {
	c := openBare(newRaw(t, Config{Shards: 1}), rawEnds["v4"][0], rawEnds["v4"][1])
	acks := c.s.shards[0].acks
	acks.armed.Store(false)
	shortest := time.Hour
	for range 10 {
		acks.eager.Store(0)
		acks.slot(c.hash()).late.Store(0)
		sent := time.Now()
		c.say(flagsData, "header")
		c.hear(flagsACK)
		shortest = min(shortest, time.Since(sent))
	}
	if shortest > 20*time.Millisecond {
		t.Errorf("an app waits %v for an ACK", shortest)
	}
}

// TestACKAtOnce: what the app may wait for is acknowledged without delay.
func TestACKAtOnce(t *testing.T) {
	r := newRaw(t, Config{Shards: 1})
	open := func(port uint16) *bareConn { return openBare(r, netip.AddrPortFrom(appIP4, port), srv4) }
	t.Run("second segment", func(t *testing.T) {
		c := open(1)
		c.say(flagsData, "one")
		c.waits()
		c.say(flagsData, "two")
		c.hear(flagsACK)
	})
	t.Run("bulk", func(t *testing.T) {
		c := open(2)
		c.say(flagsData, string(make([]byte, shortSegment+1)))
		c.hear(flagsACK)
	})
	t.Run("bulk and FIN", func(t *testing.T) {
		c := open(5)
		c.say(flagsData|flagsFIN, string(make([]byte, shortSegment+1)))
		c.hear(flagsACK)
	})
	t.Run("no push", func(t *testing.T) {
		c := open(3)
		c.say(flagsACK, "more follows")
		c.hear(flagsACK)
	})
	t.Run("last FIN", func(t *testing.T) {
		c := open(4)
		must(t, c.st.CloseWrite())
		c.hear(flagsFIN)
		c.say(flagsFIN, "")
		c.hear(flagsACK)
	})
}

// TestACKNagle: an app that waited for an ACK before it sent more loses ackDelay once, and then no app does, but for the ACKs of
// FINs, which nobody waits for.
func TestACKNagle(t *testing.T) {
	r := newRaw(t, Config{Shards: 1})
	c, other := openBare(r, netip.AddrPortFrom(appIP4, 1), srv4), openBare(r, netip.AddrPortFrom(appIP4, 2), srv4)
	acks := r.s.shards[0].acks
	c.say(flagsData, "header")
	c.waits()
	c.expire()
	c.hear(flagsACK)
	acks.slot(c.hash()).wrote.Store(acks.now()) // however slow this machine is
	c.say(flagsData, "body")
	c.hear(flagsACK)
	other.say(flagsData, "x")
	other.hear(flagsACK)
	other.say(flagsFIN, "")
	other.waits()
	acks.eager.Store(acks.now()) // eagerTime is over
	c.say(flagsData, "next")
	c.waits()
}

func (c *bareConn) hash() uint32 { return connHash(c.dst.Addr().AsSlice(), c.src.Port(), c.dst.Port()) }

// TestACKForgotten: the ACK of a connection that the app has reset is not written: it might meet the next connection of the same
// endpoints.
func TestACKForgotten(t *testing.T) {
	c := openBare(newRaw(t, Config{Shards: 1}), rawEnds["v4"][0], rawEnds["v4"][1])
	c.say(flagsData, "x")
	c.waits()
	c.say(header.TCPFlagRst|header.TCPFlagAck, "")
	must(t, c.await(flow.Hup))
	c.expire()
	c.quiet()
}

// TestACKSlotTaken: an ACK that needs the slot of another connection's has that one written.
func TestACKSlotTaken(t *testing.T) {
	r := newRaw(t, Config{Shards: 1})
	first := openBare(r, netip.AddrPortFrom(appIP4, 1000), srv4)
	acks := r.s.shards[0].acks
	port := uint16(1001)
	for acks.slot(connHash(srv4.Addr().AsSlice(), port, srv4.Port())) != acks.slot(first.hash()) {
		port++
	}
	second := openBare(r, netip.AddrPortFrom(appIP4, port), srv4)
	first.say(flagsData, "x")
	first.waits()
	second.say(flagsData, "y")
	first.hear(flagsACK)
	second.waits()
}
