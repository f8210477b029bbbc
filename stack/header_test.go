package stack

import "github.com/viasocks/viasocks/tun"

// inspectFrame is inspect of a frame.
func inspectFrame(h *tun.Header, b []byte) (disposition, int) {
	p, ok := parseIP(b)
	if !ok {
		return dropMalformed, 0
	}
	return inspect(h, b, &p)
}

// addFrame is add of a frame.
func (b *udpBatch) addFrame(frame []byte, h *tun.Header) bool {
	p, ok := parseIP(frame)
	return ok && b.add(frame, &p, h)
}

// lone is the only shard of a stack that does nothing.
func lone() *shard {
	s := &shard{Stack: new(Stack), dev: wakeCounter{new(int)}}
	s.shards = []*shard{s}
	return s
}

// loneDevice is a device as its only part.
type loneDevice struct{ tun.Device }

func (loneDevice) Wake() {}

// registered is how many endpoints gVisor has.
func registered(s *Stack) (n int) {
	for _, p := range s.shards {
		n += len(p.engine.Load().ns.RegisteredEndpoints())
	}
	return n
}
