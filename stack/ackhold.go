package stack

import (
	"bytes"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gVisor acknowledges each segment at once. In most cases the far end answers soon, or our FIN follows that of the app,
// and this segment carries the same acknowledgement. A frame with the ACK alone is then useless, but it costs a pass
// through the whole receive path of the app's kernel. The ACK of a short segment or of a FIN is therefore held until
// another segment of its connection replaces it, or until ackDelay has passed (RFC 9293, section 3.8.6.3). If a second
// short segment arrives meanwhile, its ACK is written at once.
//
// An app that has not set TCP_NODELAY and writes twice before it reads waits for the first ACK (Nagle). It is recognized by its
// second segment, which arrives as soon as a held ACK was written. For eagerTime after that, only the ACKs of FINs are held.

const (
	// ackDelay is how long an ACK waits at most. An app that writes twice before it reads, without TCP_NODELAY, loses this
	// time once in eagerTime, so it must be short. Answers from nearby come within it, and where they come later, exchanges
	// are few and an ACK costs little.
	ackDelay = 4 * time.Millisecond
	// eagerTime limits what an app that waits for ACKs loses: one ackDelay in this time.
	eagerTime = 10 * time.Second
	// nagleTime is the time after its ACK within which the second segment of such an app arrives.
	nagleTime = 5 * time.Millisecond
	// shortSegment is the largest amount of data in a segment whose ACK is held. Longer segments are part of a bulk
	// transfer, whose sender may wait for the ACK.
	shortSegment = 1200
	// ackSlots is the number of connections for which an ACK can be held at once. The slot depends on the connection.
	// If the slot is taken, its ACK is written to make room.
	ackSlots = 512
)

// ackHold contains the held ACKs of a shard. The frame reader decides whose ACKs may wait, and gVisor's goroutines
// deliver them. A nil ackHold holds none.
type ackHold struct {
	dev   tun.Part
	stats *counters
	base  time.Time
	timer *time.Timer
	armed atomic.Bool  // the timer is set
	eager atomic.Int64 // the time until which ACKs of data are not held, in ns since base
	slots [ackSlots]ackSlot
}

// ackSlot has room for one ACK. A connection is identified by a hash that is never 0.
type ackSlot struct {
	want atomic.Uint32 // the connection whose next ACK may wait
	held atomic.Uint32 // the connection whose ACK is held; written under mu
	late atomic.Uint32 // the connection whose ACK of data waited for ackDelay and was written at wrote
	fin  atomic.Bool   // want is for the ACK of a FIN
	end  atomic.Uint32 // the connection on which we sent our last FIN: no segment follows our ACK of the app's FIN

	mu    sync.Mutex // also held while the ACK is written, so that no later segment overtakes it
	due   int64      // in ns since base
	wrote atomic.Int64
	isFIN bool
	h     tun.Header
	n, ip int // lengths of the frame and of its IP header
	b     [ip6HeaderLen + longACK]byte
}

// longACK is the longest TCP header of an ACK that is held: the one with timestamps. An ACK with SACK blocks reports a
// loss and is not held.
const longACK = tcpHeaderLen + 12

func newACKHold(dev tun.Part, stats *counters) *ackHold {
	a := &ackHold{dev: dev, stats: stats, base: time.Now()}
	a.timer = time.AfterFunc(time.Hour, a.expire)
	a.timer.Stop()
	return a
}

func (a *ackHold) now() int64 { return int64(time.Since(a.base)) }

// slot returns the slot for the ACK of a connection.
func (a *ackHold) slot(hash uint32) *ackSlot { return &a.slots[hash>>23] }

// connHash returns the hash of a connection. far is the address of its far end.
func connHash(far []byte, appPort, farPort uint16) uint32 {
	x := uint64(binary.BigEndian.Uint32(far[len(far)-4:])) << 32
	if len(far) == 16 {
		x ^= binary.BigEndian.Uint64(far[:8]) * 0x9E3779B97F4A7C15
		x ^= uint64(binary.BigEndian.Uint32(far[8:]))
	}
	x ^= uint64(appPort)<<16 | uint64(farPort)
	x *= 0x9E3779B97F4A7C15 // the golden ratio spreads neighbours (Knuth, TAOCP 6.4)
	return uint32(x>>32) | 1
}

// saw notes a TCP segment of the app before gVisor receives it. b is the packet, tcp the offset of its TCP header, and
// data that of its data.
func (a *ackHold) saw(b []byte, tcp, data int) {
	if a == nil {
		return
	}
	flags := header.TCPFlags(b[tcp+13])
	n := len(b) - data
	fin := flags&header.TCPFlagFin != 0
	short := n > 0 && n <= shortSegment && flags&header.TCPFlagPsh != 0
	ends := flags&(header.TCPFlagSyn|header.TCPFlagRst) != 0
	if n > shortSegment || !fin && !short && !ends {
		return
	}
	far := b[16:20]
	if b[0]>>4 == 6 {
		far = b[24:40]
	}
	hash := connHash(far, binary.BigEndian.Uint16(b[tcp:]), binary.BigEndian.Uint16(b[tcp+2:]))
	s := a.slot(hash)
	switch {
	case ends: // an ACK of the previous connection would confuse the next one
		s.want.CompareAndSwap(hash, 0)
		s.end.CompareAndSwap(hash, 0)
		if s.held.Load() != 0 {
			s.mu.Lock()
			if s.held.Load() == hash {
				s.held.Store(0)
			}
			s.mu.Unlock()
		}
	case fin && s.end.Load() != hash || !fin && a.waits(s, hash):
		s.fin.Store(fin)
		s.want.Store(hash)
	default:
		s.want.CompareAndSwap(hash, 0)
	}
}

// waits reports whether an ACK of data may be held now. It also recognizes an app that has waited for an ACK.
func (a *ackHold) waits(s *ackSlot, hash uint32) bool {
	until := a.eager.Load()
	if s.late.Load() != hash && until == 0 {
		return true
	}
	now := a.now()
	if s.late.CompareAndSwap(hash, 0) && now-s.wrote.Load() < int64(nagleTime) {
		a.eager.Store(now + int64(eagerTime))
		return false
	}
	if now >= until {
		a.eager.CompareAndSwap(until, 0)
		return true
	}
	return false
}

// hold is called with each segment to the app before it is written. It reports whether the segment is held; if not, it
// discards a held ACK of the same connection. Locks of gVisor are held.
func (a *ackHold) hold(pkt *gstack.PacketBuffer, h *tun.Header) bool {
	if a == nil {
		return false
	}
	ip, t := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	var far []byte
	switch len(ip) {
	case ip4HeaderLen:
		far = ip[12:16]
	case ip6HeaderLen:
		far = ip[8:24]
	default:
		return false
	}
	if len(t) < tcpHeaderLen {
		return false
	}
	hash := connHash(far, binary.BigEndian.Uint16(t[2:]), binary.BigEndian.Uint16(t))
	s := a.slot(hash)
	if t[13]&byte(header.TCPFlagFin) != 0 {
		s.end.Store(hash)
	}
	alone := t[13] == byte(header.TCPFlagAck) && len(t) <= longACK && pkt.Data().Size() == 0
	wanted := alone && s.want.CompareAndSwap(hash, 0)
	if !wanted && s.held.Load() != hash {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held.Load() != 0 {
		if s.of(ip, t) {
			s.held.Store(0)
			return false // the second ACK, or another segment
		}
		if !wanted {
			return false
		}
		a.write(s)
	}
	s.h, s.ip, s.isFIN, s.due = *h, len(ip), s.fin.Load(), a.now()+int64(ackDelay)
	s.n = copy(s.b[:], ip)
	s.n += copy(s.b[s.n:], t)
	s.held.Store(hash)
	if !a.armed.Load() && a.armed.CompareAndSwap(false, true) {
		a.timer.Reset(ackDelay)
	}
	return true
}

// of reports whether the held ACK belongs to the connection of these headers.
func (s *ackSlot) of(ip, t []byte) bool {
	from, to := 12, 20
	if len(ip) == ip6HeaderLen {
		from, to = 8, 40
	}
	return s.ip == len(ip) && bytes.Equal(s.b[from:to], ip[from:to]) && bytes.Equal(s.b[s.ip:s.ip+4], t[:4])
}

// write writes the held ACK. s.mu is held.
func (a *ackHold) write(s *ackSlot) {
	err := a.dev.Write(&s.h, [][]byte{s.b[:s.n]})
	s.held.Store(0)
	if err != nil {
		a.stats.DroppedOut.Add(1)
		return
	}
	a.stats.FramesOut.Add(1)
	a.stats.BytesOut.Add(uint64(s.n))
}

// expire writes the ACKs that have been held for ackDelay. It runs on a goroutine of the runtime's timers.
func (a *ackHold) expire() {
	a.armed.Store(false)
	now := a.now()
	next := int64(0)
	for i := range a.slots {
		s := &a.slots[i]
		if s.held.Load() == 0 {
			continue
		}
		s.mu.Lock()
		if hash := s.held.Load(); hash != 0 {
			if s.due <= now {
				if !s.isFIN {
					s.wrote.Store(now)
					s.late.Store(hash)
				}
				a.write(s)
			} else if next == 0 || s.due < next {
				next = s.due
			}
		}
		s.mu.Unlock()
	}
	if next != 0 && a.armed.CompareAndSwap(false, true) {
		a.timer.Reset(time.Duration(next - now))
	}
}

// close discards all held ACKs.
func (a *ackHold) close() { a.timer.Stop() }
