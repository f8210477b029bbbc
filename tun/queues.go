package tun

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// Queues is the recommended number of queues of a TUN: those for frames and the one that the handle detaches.
const Queues = frameQueues + 1

// frameQueues is the number of queues for frames (IFF_MULTI_QUEUE; Documentation/networking/tuntap.rst).
//
// A queue holds as many frames as the interface's txqueuelen, 500. Any frame that arrives at a full queue is lost,
// whatever its sender. The kernel chooses the queue by a hash of both endpoints; for a flow to which something was
// written, it takes the queue of that write (tun_flow_update in drivers/net/tun.c). A socket that sends more than can
// be read therefore fills one queue and loses its own datagrams. Another flow that shares this queue by chance is
// moved by the next answer that it gets (see toward). More queues would cost one descriptor each.
const frameQueues = 16

// queues are the open queues of one TUN. A poller guards them: their descriptors are used only under its Guard or in
// its Serve, and are closed when no user is left.
type queues struct {
	fds  []int
	bell int // an eventfd in the set that belongs to no queue; ringing it wakes the reader
	set  *loop.Poller
	base time.Time
	// until is the time up to which each queue counts as flooded, in ns since base; 0: it does not.
	until []atomic.Int64
	woke  atomic.Bool // a waiting read must return without a frame
	sources
}

// openQueues takes ownership of fds, even if it fails.
func openQueues(fds []int) (q *queues, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
		}
	}()
	set, err := loop.NewPoller()
	if err != nil {
		return nil, err
	}
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		set.Close()
		return nil, fmt.Errorf("cannot make an eventfd: %w", err)
	}
	q = &queues{
		fds:   fds,
		bell:  bell,
		base:  time.Now(),
		until: make([]atomic.Int64, len(fds)),
		set:   set,
	}
	q.over = make(chan struct{})
	err = set.Add(bell, unix.EPOLLIN|unix.EPOLLET, noQueue, 0)
	for i, fd := range fds {
		if err == nil {
			err = set.Add(fd, unix.EPOLLIN, int32(i), 0)
		}
	}
	if err != nil {
		q.set.Close()
		unix.Close(bell)
		return nil, fmt.Errorf("cannot poll: %w", err)
	}
	return q, nil
}

// close may be called once, from any goroutine. It ends a blocked read and waits for the users of the queues.
func (q *queues) close() error {
	err := q.set.Close()
	closeAll(q.fds)
	unix.Close(q.bell)
	close(q.over)
	if s := q.source.Load(); s != nil {
		unix.Close(s.fd)
	}
	return err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// noQueue is the number that stands for the bell.
const noQueue = -1

// ring makes the set readable again, so that the runtime's poller returns the reader together with everything else
// that is readable.
func (q *queues) ring() {
	one := uint64(1)
	_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(q.bell), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}

// floodTerm is how long a queue counts as flooded after a flood.
const floodTerm = time.Second

// flooded records that queue i is flooded. Only the reader calls it.
func (q *queues) flooded(i int) { q.until[i].Store(int64(time.Since(q.base) + floodTerm)) }

// calm reports whether queue i is not flooded. It may be called from any goroutine.
func (q *queues) calm(i int) bool {
	until := q.until[i].Load()
	if until == 0 {
		return true
	}
	if int64(time.Since(q.base)) < until {
		return false
	}
	q.until[i].CompareAndSwap(until, 0)
	return true
}

// toward chooses the queue for a frame to the app by the app's port. The kernel then uses the same queue for what the
// app sends to the source of the frame; thus all traffic of one socket that gets answers shares a queue. If that
// queue is flooded, there is a second choice, which differs from port to port, so that other sockets leave the queue
// of a flood. Frames without a port use the first queue.
func (q *queues) toward(parts [][]byte) int {
	if len(q.fds) == 1 {
		return 0
	}
	// Neighbouring ports are common. The golden ratio spreads them (Knuth, TAOCP 6.4).
	h := uint32(appPort(parts)) * 0x9E3779B1
	n := uint32(len(q.fds))
	i := int((h >> 16) % n)
	if !q.calm(i) {
		// This is never the first choice again.
		if j := (i + 1 + int((h>>8)%(n-1))) % int(n); q.calm(j) {
			return j
		}
	}
	return i
}

// appPort returns the destination port of a TCP or UDP frame, or 0.
func appPort(parts [][]byte) uint16 {
	if len(parts) == 0 || len(parts[0]) < 20 {
		return 0
	}
	p, proto, off := parts[0], byte(0), 0
	switch p[0] >> 4 {
	case 4:
		proto, off = p[9], int(p[0]&0xf)*4+2
		if p[6]&0x1f|p[7] != 0 { // not the first fragment
			return 0
		}
	case 6:
		proto, off = p[6], 42
	}
	if proto != unix.IPPROTO_TCP && proto != unix.IPPROTO_UDP {
		return 0
	}
	if off >= len(p) { // gVisor passes each header as its own part
		if off -= len(p); len(parts) < 2 {
			return 0
		}
		p = parts[1]
	}
	if off+2 > len(p) {
		return 0
	}
	return uint16(p[off])<<8 | uint16(p[off+1])
}
