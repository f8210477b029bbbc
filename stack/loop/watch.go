package loop

import "golang.org/x/sys/unix"

// Stream is the set of epoll events of a connected socket, for Watch.
const Stream = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP

// slot tells which node an epoll event is for. The generation guards against an event of a socket that was closed
// here while a process that was just forked still held it.
type slot struct {
	n   *Node
	gen uint32
}

// keepSlots is the longest table of slots that is kept when none is in use.
const keepSlots = 1000

// Watch registers fd for n, edge-triggered. To unregister it, call Forget and close fd.
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

// Forget ends a Watch. The caller must close the descriptor at once.
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

// Watched returns how many sockets the loop watches. It belongs to the loop's goroutine.
func (l *Loop) Watched() int { return len(l.slots) - len(l.free) }

// Socket is a descriptor on its way to a new owner, together with its registration if it has one. The receiver must
// call exactly one of Loop.Adopt, Release and Close on the loop's goroutine before the turn is over.
type Socket struct {
	fd   int
	l    *Loop // nil: not registered
	slot int32
	got  uint32
}

// NoSocket is the Socket that accompanies an error.
var NoSocket = Socket{fd: -1}

// Unwatched returns a Socket that no loop watches. It may be passed on and adopted from any goroutine.
func Unwatched(fd int) Socket { return Socket{fd: fd} }

// FD returns the descriptor, or -1 if there is none.
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

// Adopt gives n the registration of s, which the same loop watches. A socket that is already readable or writable
// causes no new event, so Adopt sets In and Out. It does not give n a turn.
func (l *Loop) Adopt(n *Node, s Socket) {
	l.slots[s.slot].n = n
	n.slot = s.slot
	n.Got |= s.got | In | Out
}

// Release removes the descriptor from the loop. The caller owns it.
func (s Socket) Release() (fd int) {
	if s.l != nil {
		s.l.poll.Remove(s.fd)
		s.l.freeSlot(s.slot)
	}
	return s.fd
}

// Close closes the descriptor if there is one.
func (s Socket) Close() {
	if s.fd < 0 {
		return
	}
	if s.l != nil {
		s.l.freeSlot(s.slot)
	}
	_ = Close(s.fd)
}

// CloseReset is like Close, but the peer sees RST instead of FIN.
func (s Socket) CloseReset() {
	if s.fd < 0 {
		return
	}
	if s.l != nil {
		s.l.freeSlot(s.slot)
	}
	CloseReset(s.fd)
}

// CloseReset closes the TCP socket fd so that the peer sees RST.
func CloseReset(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	_ = Close(fd)
}

// eventBits translates the events of epoll.
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
