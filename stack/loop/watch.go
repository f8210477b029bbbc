package loop

import "golang.org/x/sys/unix"

// Stream is the events of a connected socket, for Watch.
const Stream = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP

// slot says who an epoll event is for. The generation guards against an event of a socket that was closed here while a
// process that was just forked still held it.
type slot struct {
	n   *Node
	gen uint32
}

// keepSlots is the longest table of slots that is kept when none is taken.
const keepSlots = 1000

// Watch registers fd for n, edge-triggered. It is unregistered by closing fd, after Forget.
func (l *Loop) Watch(n *Node, fd int, events uint32) error {
	var i int32
	if k := len(l.free); k > 0 {
		i = l.free[k-1]
		l.free = l.free[:k-1]
	} else {
		i = int32(len(l.slots))
		l.slots = append(l.slots, slot{})
	}
	l.gen++
	if err := l.poll.Add(fd, events|unix.EPOLLET, i, l.gen); err != nil {
		l.free = append(l.free, i)
		return err
	}
	l.slots[i] = slot{n, l.gen}
	n.slot = i
	return nil
}

// Forget ends what Watch began; the caller closes the descriptor at once.
func (l *Loop) Forget(n *Node) {
	if n.slot < 0 {
		return
	}
	l.freeSlot(n.slot)
	n.slot = -1
}

func (l *Loop) freeSlot(i int32) {
	l.slots[i].n = nil
	l.free = append(l.free, i)
	if len(l.free) == len(l.slots) && len(l.slots) > keepSlots {
		l.slots, l.free = nil, nil
	}
}

// Watched is how many sockets the loop watches. It belongs to the loop's goroutine.
func (l *Loop) Watched() int { return len(l.slots) - len(l.free) }

// Socket is a descriptor on its way to a new owner, with its registration if it has one. Whoever gets it, on the loop's
// goroutine, calls exactly one of Loop.Adopt, Release and Close before the turn is over.
type Socket struct {
	fd   int
	l    *Loop // nil: not registered
	slot int32
	got  uint32
}

// NoSocket stands beside an error.
var NoSocket = Socket{fd: -1}

// Unwatched is a Socket that no loop knows yet. It may be passed on and adopted from any goroutine.
func Unwatched(fd int) Socket { return Socket{fd: fd} }

// FD is the descriptor; -1: there is none.
func (s Socket) FD() int { return s.fd }

// Watched reports whether l watches s.
func (s Socket) Watched(l *Loop) bool { return s.l == l && l != nil }

// HandOver takes the socket fd, which is watched for n, away from n.
func (l *Loop) HandOver(n *Node, fd int) Socket {
	s := Socket{fd: fd, l: l, slot: n.slot, got: n.Got & (Hup | Err)}
	l.slots[n.slot].n = nil
	n.slot = -1
	return s
}

// Adopt gives n the registration of s, which the same loop watches. What is readable or writable already causes no new
// event, so In and Out are set; n gets no turn by that.
func (l *Loop) Adopt(n *Node, s Socket) {
	l.slots[s.slot].n = n
	n.slot = s.slot
	n.Got |= s.got | In | Out
}

// Release takes the descriptor out of the loop. The caller owns it.
func (s Socket) Release() (fd int) {
	if s.l != nil {
		s.l.poll.Remove(s.fd)
		s.l.freeSlot(s.slot)
	}
	return s.fd
}

// Close closes the descriptor, if there is one.
func (s Socket) Close() {
	if s.fd < 0 {
		return
	}
	if s.l != nil {
		s.l.freeSlot(s.slot)
	}
	_ = Close(s.fd)
}

// CloseReset is Close, but the peer sees a RST instead of a FIN.
func (s Socket) CloseReset() {
	if s.fd < 0 {
		return
	}
	if s.l != nil {
		s.l.freeSlot(s.slot)
	}
	CloseReset(s.fd)
}

// CloseReset closes fd, a TCP socket, so that the peer sees a RST.
func CloseReset(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	_ = Close(fd)
}

// eventBits translates epoll's events.
func eventBits(ev uint32) (b uint32) {
	if ev&unix.EPOLLIN != 0 {
		b |= In
	}
	if ev&unix.EPOLLOUT != 0 {
		b |= Out
	}
	if ev&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		b |= In | Hup
	}
	if ev&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		b |= Out | Err
	}
	return b
}
