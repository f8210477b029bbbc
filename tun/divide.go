package tun

import (
	"errors"
	"fmt"
)

// Part is a share of a device: some of its queues. Read returns the frames that the kernel puts into these queues,
// and Write writes to one of them. In all other respects a part is a Device of its own. Each part has one reader, and
// different parts may be read at the same time.
//
// After a frame of a flow was written to a queue, the kernel sends that flow's frames to the same queue. It forgets
// this 3 to 4 s after the last write. The first frames of a flow, and those after a silence, therefore arrive at the
// part that the kernel's hash chooses.
type Part interface {
	Device

	// Wake makes a waiting Read return ErrAgain or, if none waits, the next Read that would wait. It may be called
	// from any goroutine.
	Wake()
}

// Divide splits a device into at most n parts, and at least one, each with its share of the queues. It may be called
// once, before the first Read. After that, d itself can only be closed, which closes all parts. A device that cannot
// be divided has one part. If Divide fails, it closes d.
func Divide(d Device, n int) ([]Part, error) {
	if n < 1 {
		return nil, errors.Join(fmt.Errorf("cannot divide the TUN device into %d parts", n), d.Close())
	}
	if d, ok := d.(interface{ Divide(n int) ([]Part, error) }); ok {
		return d.Divide(n)
	}
	return []Part{&whole{Device: d}}, nil
}

// whole is a device as its only part. No other part reads frames for it, so nothing ever needs to wake it.
type whole struct{ Device }

func (*whole) Wake() {}

// Divide implements the function of the same name.
func (d *fileDevice) Divide(n int) ([]Part, error) {
	fds, err := d.q.release()
	d.q = nil
	n = min(n, len(fds))
	var parts []*fileDevice
	for k := range n {
		share := fds[k*len(fds)/n : (k+1)*len(fds)/n]
		var q *queues
		if err == nil {
			q, err = openQueues(share)
		} else {
			closeAll(share)
		}
		if err == nil {
			p := &fileDevice{name: d.name, mtu: d.mtu, off: d.off, q: q}
			p.init()
			parts = append(parts, p)
		}
	}
	d.parts = parts
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot divide the TUN device %s: %w", d.name, err), d.Close())
	}
	all := make([]Part, len(parts))
	for i, p := range parts {
		all[i] = p
	}
	return all, nil
}

// Wake implements Part.
func (d *fileDevice) Wake() { d.q.wake() }

// release removes the descriptors from the poller and closes the poller.
func (q *queues) release() ([]int, error) {
	fds := q.fds
	q.fds = nil
	return fds, q.close()
}

// wake ends a waiting read. The reader checks woke after it has polled the set, so it notices either woke or the
// bell.
func (q *queues) wake() {
	q.woke.Store(true)
	_ = q.set.Guard(func(uintptr) { q.ring() }) // Guard keeps the bell from being closed meanwhile
}
