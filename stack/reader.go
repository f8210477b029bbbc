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
	// viewSize is the size of gVisor's largest pooled buffer. No frame is longer: a TUN's MTU is at most 65535, a
	// super-segment 65536.
	viewSize = buffer.MaxChunkSize
	// handOn is the length from which on a view is passed to gVisor as it is. gVisor counts memory by content, so
	// this limits the real memory of a window of 1 MiB to twice that. Shorter frames are copied into a view of their
	// size.
	handOn = 32 << 10
	// splitFrom is the length from which on the headers get a view of their own. gVisor clones the view with the
	// headers while it parses them; that view should not contain the payload.
	splitFrom = 512
	// arenaSize is the space for a burst of datagrams, in addition to room for the longest frame.
	arenaSize = 128 << 10
	// burst limits how many frames are read between two flushes of datagrams.
	burst = 64
	// bigMemory is for how many frames after the last big one the next frame is expected to be big.
	bigMemory = 32
)

// frameReader is the state of the single goroutine that reads frames.
//
// A frame is read either into a view, which gVisor can take as it is, or into the arena, where datagrams lie next to
// each other until the burst is flushed. The choice is a guess from the previous frames; a wrong guess costs a copy.
type frameReader struct {
	s     *shard
	udp   *udpBatch
	view  *buffer.View
	arena []byte
	used  int      // bytes of arena in use
	spare []handed // what the inbox gets next
	calm  int      // number of frames since the last big one
	held  int      // number of frames since the first datagram of the batch; 0: none is held
}

func newFrameReader(s *shard) *frameReader {
	return &frameReader{s: s, udp: s.newUDPBatch(), arena: make([]byte, arenaSize+tun.MaxFrame), calm: bigMemory}
}

// run reads frames until the device ends.
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
		// Ask without waiting only if datagrams wait to be flushed.
		n, err := r.s.dev.Read(&h, b, r.held == 0)
		switch {
		case err == nil:
			if e := r.s.elsewhere.Load(); e != nil && e.take(&h, b[:n]) {
				continue
			}
			r.s.stats.FramesIn.Add(1)
			r.s.stats.BytesIn.Add(uint64(n))
			r.s.tap.saw(&h, b[:n])
			at := inArena
			if inView {
				at = inTheView
			}
			r.take(&h, b[:n], at)
		case errors.Is(err, tun.ErrAgain):
			r.flush()
		case errors.Is(err, tun.ErrTooLong):
			r.s.stats.FramesIn.Add(1)
			r.s.stats.DroppedMalformed.Add(1)
		default:
			r.flush()
			return err
		}
	}
}

// buf returns the buffer for the next frame.
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

// empty handles the frames that other shards' readers have read for this one.
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

// place tells where a frame is stored.
type place uint8

const (
	inArena   place = iota // at the end of the used part of the arena
	inTheView              // in a view that gVisor can take
	inInbox                // valid only until take returns
)

// take handles one frame.
func (r *frameReader) take(h *tun.Header, b []byte, at place) {
	if r.calm < bigMemory {
		r.calm++
	}
	p, ok := parseIP(b)
	if !ok {
		r.s.stats.DroppedMalformed.Add(1)
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

// judge drops a frame or passes it to gVisor.
func (r *frameReader) judge(h *tun.Header, b []byte, p *packet, at place) {
	v, hdr := inspect(h, b, p)
	switch v {
	case toGVisor:
		r.deliver(h, b, p, hdr, at)
	case refuse:
		r.s.answer(b[:hdr], flow.RefuseNet)
	case dropMalformed:
		r.s.stats.DroppedMalformed.Add(1)
	case dropICMP:
		if !r.s.takeEcho(h, b, p) {
			r.s.stats.DroppedICMP.Add(1)
		}
	case dropMulticast:
		r.s.stats.DroppedMulticast.Add(1)
	case dropProto:
		r.s.stats.DroppedProto.Add(1)
	}
}

// takeUDP offers a frame to the batch. A frame in the arena stays there until the flush; any other is copied there
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

// deliver passes a frame to gVisor as one packet of any length. hdr is the result of inspect.
func (r *frameReader) deliver(h *tun.Header, b []byte, p *packet, hdr int, at place) {
	if hdr != 0 {
		r.s.acks.saw(b[:p.end], p.off, hdr)
	}
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

// fullView returns a view of b without spare capacity, so that data appended to its Buffer goes elsewhere.
func fullView(b []byte) *buffer.View {
	v := buffer.NewView(len(b))
	n := v.Capacity()
	v.Grow(n)
	copy(v.AsSlice()[n-len(b):], b)
	v.TrimFront(n - len(b))
	return v
}
