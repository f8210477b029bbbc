package stack

import (
	"errors"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// viewSize is gVisor's largest pooled buffer. A frame can't be longer: a TUN's MTU ends at 65535, a super-segment at
	// 65536.
	viewSize = buffer.MaxChunkSize
	// handOn is the length from which a view is handed on as it is. gVisor counts memory by content: so what a window of
	// 1 MiB really holds is bounded to twice that. Shorter frames are copied into a view of their size.
	handOn = 32 << 10
	// splitFrom is the length from which headers get a view of their own. gVisor clones the view that holds the headers
	// while it parses them: that must not be the payload's.
	splitFrom = 512
	// arenaSize is what a burst of datagrams is collected in, besides room for the longest frame.
	arenaSize = 128 << 10
	// burst bounds how many frames are read between two flushes of datagrams.
	burst = 64
	// bigMemory is how many frames after the last big one the next is still guessed to be big.
	bigMemory = 32
)

// frameReader is the state of the one goroutine that reads frames.
//
// A frame is read either into a view, which gVisor can take as it is, or into the arena, where datagrams lie side by
// side until the burst is flushed. Which it will be is guessed from the frames before: a wrong guess costs a copy.
type frameReader struct {
	s     *shard
	udp   *udpBatch
	view  *buffer.View
	arena []byte
	used  int      // of arena
	spare []handed // what the inbox gets next
	calm  int      // frames since the last big one
	held  int      // frames since the first datagram of the batch, 0: none is held
}

func newFrameReader(s *shard) *frameReader {
	return &frameReader{s: s, udp: s.newUDPBatch(), arena: make([]byte, arenaSize+tun.MaxFrame), calm: bigMemory}
}

// run reads until the device ends.
func (r *frameReader) run() error {
	defer func() {
		if r.view != nil {
			r.view.Release()
		}
	}()
	var h tun.Header
	for {
		r.empty()
		b, inView := r.buf()
		// Only datagrams that wait for their flush are a reason to ask whether there is more before waiting for it.
		n, err := r.s.dev.Read(&h, b, r.held == 0)
		switch {
		case err == nil:
			r.s.stats.framesIn.Add(1)
			r.s.stats.bytesIn.Add(uint64(n))
			at := inArena
			if inView {
				at = inTheView
			}
			r.take(&h, b[:n], at)
		case errors.Is(err, tun.ErrAgain):
			r.flush()
		case errors.Is(err, tun.ErrTooLong):
			r.s.stats.framesIn.Add(1)
			r.s.stats.droppedMalformed.Add(1)
		default:
			r.flush()
			return err
		}
	}
}

// buf is where the next frame is read.
func (r *frameReader) buf() (b []byte, inView bool) {
	if r.calm >= bigMemory {
		if len(r.arena)-r.used < tun.MaxFrame {
			r.flush()
		}
		return r.arena[r.used:], false
	}
	if r.view == nil {
		r.view = buffer.NewViewSize(viewSize)
	}
	return r.view.AsSlice(), true
}

func (r *frameReader) flush() {
	if r.held != 0 {
		r.udp.flush()
		r.held = 0
	}
	r.used = 0
}

// empty takes what other shards' readers have read for this one.
func (r *frameReader) empty() {
	fs := r.s.inbox.take(r.spare)
	if fs == nil {
		return
	}
	for i := range fs {
		f := &fs[i]
		r.take(&f.h, *f.buf, inInbox)
		frameBuf(cap(*f.buf)).Put(f.buf)
		*f = handed{}
	}
	r.spare = fs
}

// place is where a frame lies.
type place uint8

const (
	inArena   place = iota // at the end of what is used of it
	inTheView              // gVisor can have it
	inInbox                // only until take returns
)

// take handles one frame.
func (r *frameReader) take(h *tun.Header, b []byte, at place) {
	if r.calm < bigMemory {
		r.calm++
	}
	p, ok := parseIP(b)
	if !ok {
		r.s.stats.droppedMalformed.Add(1)
	} else if to := r.s.homeOf(b, &p); to != r.s {
		r.s.hand(to, h, b)
	} else if p.proto == protoTCP || !r.takeUDP(h, b, &p, at) {
		r.judge(h, b, &p, at)
	}
	if r.held != 0 {
		if r.held++; r.held > burst {
			r.flush()
		}
	}
}

// judge drops a frame or gives it to gVisor.
func (r *frameReader) judge(h *tun.Header, b []byte, p *packet, at place) {
	v, hdr := inspect(h, b, p)
	switch v {
	case toGVisor:
		r.deliver(h, b, p, hdr, at)
	case refuse:
		r.s.answer(b[:hdr], flow.RefuseNet)
	case dropMalformed:
		r.s.stats.droppedMalformed.Add(1)
	case dropICMP:
		r.s.stats.droppedICMP.Add(1)
	case dropMulticast:
		r.s.stats.droppedMulticast.Add(1)
	case dropProto:
		r.s.stats.droppedProto.Add(1)
	}
}

// takeUDP offers a frame to the batch. What lies in the arena stays there until the flush; what lies elsewhere goes there
// first.
func (r *frameReader) takeUDP(h *tun.Header, b []byte, p *packet, at place) bool {
	if at != inArena {
		if len(r.arena)-r.used < len(b) {
			r.flush()
		}
		copy(r.arena[r.used:], b)
		b = r.arena[r.used:][:len(b)]
	}
	if !r.udp.add(b, p, h) {
		return false
	}
	r.used += len(b)
	r.held = max(r.held, 1)
	if r.udp.full() {
		r.flush()
	}
	return true
}

// deliver gives a frame to gVisor as one packet, however long it is. hdr is that of inspect.
func (r *frameReader) deliver(h *tun.Header, b []byte, p *packet, hdr int, at place) {
	big := len(b) > handOn
	if big {
		r.calm = 0
	}
	var payload buffer.Buffer
	split := 0
	if hdr != 0 && len(b) >= splitFrom {
		split = hdr
		payload = buffer.MakeWithView(fullView(b[:hdr]))
	}
	if big && at == inTheView {
		v := r.view
		r.view = nil
		v.CapLength(len(b))
		v.TrimFront(split)
		_ = payload.Append(v)
	} else {
		_ = payload.Append(buffer.NewViewWithData(b[split:]))
	}
	pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: payload})
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	r.s.feeding.Lock()
	l := r.s.engine.Load().link
	if v := h.Flags&(tun.NeedsCsum|tun.DataValid) != 0; v != l.verified.Load() {
		l.verified.Store(v)
	}
	l.plain = p.plainEnd(hdr)
	l.disp.DeliverNetworkPacket(proto, pkt)
	r.s.feeding.Unlock()
	pkt.DecRef()
}

// fullView is a view of b that ends where its memory ends, so that what is appended to its Buffer stays apart.
func fullView(b []byte) *buffer.View {
	v := buffer.NewView(len(b))
	n := v.Capacity()
	v.Grow(n)
	copy(v.AsSlice()[n-len(b):], b)
	v.TrimFront(n - len(b))
	return v
}
