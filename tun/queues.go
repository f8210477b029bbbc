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

// Queues is how many queues a TUN is best opened with: one for each of the frames' queues, and the one that the handle detaches.
const Queues = frameQueues + 1

// frameQueues is how many queues the frames have (IFF_MULTI_QUEUE; Documentation/networking/tuntap.rst).
//
// A queue holds the interface's txqueuelen of frames, 500, and what comes to a full one is lost, whoever sent it. The kernel
// chooses the queue by a hash of both endpoints, or, for flows that something was written to, takes the queue that this was
// written to (tun_flow_update in drivers/net/tun.c). So a socket that sends more than can be read fills one queue, and loses its
// own datagrams; whoever was in that queue by chance is moved by the next answer that it gets (see toward). More queues would
// cost a descriptor each.
const frameQueues = 16

// queues is the open queues of one TUN behind a poller, which guards them all: their descriptors are used only under its
// Guard or in its Serve, and closed when nobody is there any more.
type queues struct {
	fds  []int
	bell int // an eventfd in the set, which is of no queue: ringing it wakes the reader
	set  *loop.Poller
	base time.Time
	// until is how long each queue is taken for flooded, in ns since base; 0: it is not.
	until []atomic.Int64
	woke  atomic.Bool // a read that waits is to return without a frame
}

// openQueues takes ownership of fds, also when it fails.
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

// close may be called once, from any goroutine. It ends a blocked read and waits for those who use a queue.
func (q *queues) close() error {
	err := q.set.Close()
	closeAll(q.fds)
	unix.Close(q.bell)
	return err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// noQueue is the bell's number.
const noQueue = -1

// ring makes the set readable once more, so that the runtime's poller returns the reader with all else that is readable.
func (q *queues) ring() {
	one := uint64(1)
	_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(q.bell), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}

// floodTerm is for how long a queue that was flooded is taken for flooded still.
const floodTerm = time.Second

// flooded notes that queue i is. The reader's.
func (q *queues) flooded(i int) { q.until[i].Store(int64(time.Since(q.base) + floodTerm)) }

// calm reports whether queue i is not flooded. Any goroutine.
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

// toward chooses the queue for a frame to the app, by the app's port: what the app sends to where the frame came from comes by
// the same queue then, and all that one socket sends and gets answers to. If that queue is flooded there is a second choice,
// another for each port: whoever shares a queue with a flood gets out of it. Frames without a port have the first queue.
func (q *queues) toward(parts [][]byte) int {
	if len(q.fds) == 1 {
		return 0
	}
	// Neighbouring ports are the rule: the golden ratio spreads them (Knuth, TAOCP 6.4).
	h := uint32(appPort(parts)) * 0x9E3779B1
	n := uint32(len(q.fds))
	i := int((h >> 16) % n)
	if !q.calm(i) {
		// Never the first choice again.
		if j := (i + 1 + int((h>>8)%(n-1))) % int(n); q.calm(j) {
			return j
		}
	}
	return i
}

// appPort is the destination port of a TCP or UDP frame, or 0.
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
	if off >= len(p) { // gVisor gives each header by itself
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
