package tun

import (
	"errors"
	"fmt"
)

// Part is a share of a device: some of its queues. Read returns the frames that the kernel puts into these queues, and Write
// writes by one of them. A part is a Device of its own in all else. Each part has one reader, and different parts may be read at
// the same time.
//
// What is written by a queue has the kernel send that flow's frames to the same queue from then on. The entry is forgotten 3 to
// 4 s after the last write. So the first frames of a flow, and those after a silence, come to whatever part the kernel's hash
// chooses.
type Part interface {
	Device

	// Wake makes a Read that waits return ErrAgain, or else the next one that would wait. Any goroutine.
	Wake()
}

// Divide makes at most n parts of a device, each with its share of the queues, and at least one. It is called once, before the
// first Read. From then on d itself is there only to be closed, which closes all parts. A device that cannot be divided has one
// part. When Divide fails, d is closed.
func Divide(d Device, n int) ([]Part, error) {
	if n < 1 {
		return nil, errors.Join(fmt.Errorf("cannot divide the TUN device into %d parts", n), d.Close())
	}
	if d, ok := d.(interface{ Divide(n int) ([]Part, error) }); ok {
		return d.Divide(n)
	}
	return []Part{&whole{Device: d}}, nil
}

// whole is a device as its only part. Nobody has a frame for it that it did not read itself, so nobody wakes it.
type whole struct{ Device }

func (*whole) Wake() {}

// Divide is what the function of this name calls.
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

// Wake is that of Part.
func (d *fileDevice) Wake() { d.q.wake() }

// release takes the descriptors out of the set, and ends it.
func (q *queues) release() ([]int, error) {
	fds := q.fds
	q.fds = nil
	return fds, q.close()
}

// wake ends a read that waits. The reader looks at woke after it has asked the set, so that it finds the one or the other.
func (q *queues) wake() {
	q.woke.Store(true)
	_ = q.set.Guard(func(uintptr) { q.ring() }) // so that the bell is not closed meanwhile
}
