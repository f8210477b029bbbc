package stack

import (
	"sync"

	"github.com/viasocks/viasocks/tun"
)

// The kernel chooses the queue of a frame and does not know about shards. A frame for another shard, by the app's
// port, is copied into that shard's inbox in order of arrival; that shard's reader takes it from there before it
// reads its own queues again. This happens to the first frames of a flow and to those after a silence: what the shard
// writes moves the flow to its own queues.

// inboxFrames and inboxBytes limit what waits in an inbox, as the kernel's queue is limited to 500 frames. A flow's
// first segments are small; a super-segment comes this way only after a silence.
const (
	inboxFrames = 512
	inboxBytes  = 4 << 20
)

// inbox contains the frames that other shards' readers have read for this one.
type inbox struct {
	mu     sync.Mutex
	frames []handed
	bytes  int
}

// handed is a frame in a pooled buffer.
type handed struct {
	h   tun.Header
	buf *[]byte
}

// frameBufs are the pools of buffers for frames that are handed over: one for the size of a packet and one for that
// of a super-segment.
var frameBufs = [2]sync.Pool{
	{New: func() any { b := make([]byte, 0, smallFrame); return &b }},
	{New: func() any { b := make([]byte, 0, tun.MaxFrame); return &b }},
}

const smallFrame = 2048

// frameBuf returns the pool for frames of n bytes.
func frameBuf(n int) *sync.Pool {
	if n <= smallFrame {
		return &frameBufs[0]
	}
	return &frameBufs[1]
}

// hand passes a frame, given in parts, to another shard. If the inbox is full, the frame is dropped and counted.
func (s *shard) hand(to *shard, h *tun.Header, parts ...[]byte) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	x := &to.inbox
	x.mu.Lock()
	if len(x.frames) >= inboxFrames || x.bytes+n > inboxBytes || n > tun.MaxFrame {
		x.mu.Unlock()
		s.stats.DroppedHandover.Add(1)
		return
	}
	buf := frameBuf(n).Get().(*[]byte)
	*buf = (*buf)[:0]
	for _, p := range parts {
		*buf = append(*buf, p...)
	}
	x.frames = append(x.frames, handed{*h, buf})
	x.bytes += n
	first := len(x.frames) == 1
	x.mu.Unlock()
	s.stats.HandedOver.Add(1)
	if first { // otherwise the reader was already woken
		to.dev.Wake()
	}
}

// take returns the waiting frames and leaves empty in their place.
func (x *inbox) take(empty []handed) []handed {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.frames) == 0 {
		return nil
	}
	fs := x.frames
	x.frames, x.bytes = empty[:0], 0
	return fs
}
