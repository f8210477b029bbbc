package stack

import (
	"sync/atomic"

	"github.com/viasocks/viasocks/tun"
)

// Tap sees the frames that cross the device. toApp tells the direction. The parts of a frame are one after the other
// and are lent for the call. It is called by many goroutines on the path of the packets: it must neither block nor be slow.
type Tap func(h *tun.Header, parts [][]byte, toApp bool)

// tap is where the Tap is; no Tap costs one load for each frame.
type tap struct{ f atomic.Pointer[Tap] }

// SetTap has f called with each frame from now on, instead of the function before it; nil: none. A call of the function
// before may still be under way when SetTap returns. Any goroutine.
func (s *Stack) SetTap(f Tap) {
	if f == nil {
		s.tap.f.Store(nil)
		return
	}
	s.tap.f.Store(&f)
}

// saw shows a frame of the app to the Tap.
func (t *tap) saw(h *tun.Header, b []byte) {
	if f := t.f.Load(); f != nil {
		(*f)(h, [][]byte{b}, false)
	}
}

// write writes a frame to the device, and shows it to the Tap if the device took it.
func (s *shard) write(h *tun.Header, parts [][]byte) error {
	err := s.dev.Write(h, parts)
	if f := s.tap.f.Load(); f != nil && err == nil {
		(*f)(h, parts, true)
	}
	return err
}
