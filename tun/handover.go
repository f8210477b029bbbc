package tun

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A process can hand its device over to another one. Both then hold the same queues. The new process reads them all;
// the old one keeps writing to them and reads, from one socket for each of its parts, the frames that the new process
// leaves to it. No queue is attached or detached meanwhile, so no frame is lost.

// errNoHandover is the error for devices whose frames do not pass through queues of ours.
var errNoHandover = errors.New("cannot hand over the TUN device: its frames have no offload header")

// Files returns copies of the queues for frames of d for another process, which passes them to Adopt. The caller closes them.
func Files(d Device) (files []*os.File, err error) {
	fd, ok := d.(*fileDevice)
	if !ok {
		return nil, errNoHandover
	}
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			files, err = nil, fmt.Errorf("cannot hand over the TUN device %s: %w", fd.name, err)
		}
	}()
	add := func(fd int) error {
		c, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err == nil {
			files = append(files, os.NewFile(uintptr(c), "/dev/net/tun"))
		}
		return err
	}
	for _, p := range fd.held() {
		var aerr error
		err := p.q.set.Guard(func(uintptr) {
			for _, q := range p.q.fds {
				aerr = errors.Join(aerr, add(q))
			}
		})
		if err = errors.Join(err, aerr); err != nil {
			return files, err
		}
	}
	return files, nil
}

// held returns the devices that hold the queues: the parts or, before the division, d itself.
func (d *fileDevice) held() []*fileDevice {
	if len(d.parts) > 0 {
		return d.parts
	}
	return []*fileDevice{d}
}

// Adopt makes a Device of queues that another process got from Files. It takes ownership of the files, even if it
// fails. The other process must call Redirect before the new device is read.
func Adopt(files []*os.File, o Options) (Device, error) {
	// A queue of its own for the handle would be attached for a moment, and the kernel would send frames to it.
	return fromFiles(files, o, true)
}

// Sources returns how many sockets Redirect needs: one for each part of d.
func Sources(d Device) int {
	if d, ok := d.(*fileDevice); ok {
		return len(d.held())
	}
	return 0
}

// Redirect makes the parts of d read frames from sockets instead of the queues. It takes ownership of the sockets,
// even if it fails. Each is a unix socket of type SOCK_SEQPACKET, of which a record is a frame after its Header. The
// device must be divided and have readers. Redirect returns after the last frame of the queues was handled, so every
// later frame is left to the other process. When the other end of a socket is closed, Read returns ErrLeft.
func Redirect(d Device, sockets []*os.File) (err error) {
	fd, ok := d.(*fileDevice)
	if !ok {
		err = errNoHandover
	} else if n := len(fd.parts); n == 0 || n != len(sockets) {
		err = fmt.Errorf("cannot redirect the %d parts of the TUN device %s to %d sockets", n, fd.name, len(sockets))
	}
	if err != nil {
		for _, s := range sockets {
			s.Close()
		}
		return err
	}
	fds, err := takeFiles(sockets)
	if err != nil {
		return fmt.Errorf("cannot redirect the TUN device %s: %w", fd.name, err)
	}
	var waits []*source
	for i, p := range fd.parts {
		s := &source{fd: fds[i], begun: make(chan struct{}), over: p.q.over}
		if !p.q.source.CompareAndSwap(nil, s) {
			closeAll(fds[i:])
			return fmt.Errorf("cannot redirect the TUN device %s twice", fd.name)
		}
		p.q.wake()
		waits = append(waits, s)
	}
	for _, s := range waits {
		select {
		case <-s.begun:
		case <-s.over:
			return fmt.Errorf("cannot redirect the TUN device %s: %w", fd.name, os.ErrClosed)
		}
	}
	return nil
}

// ErrLeft means that the process that had taken the device over has ended, so no more frames come.
var ErrLeft = errors.New("the process that took over the TUN device has ended")

// source is a socket that a reader is to read instead of its queues.
type source struct {
	fd    int // owned by the queues
	begun chan struct{}
	over  <-chan struct{}
}

// sources is the state of queues that concerns sources.
type sources struct {
	source atomic.Pointer[source] // nil: the queues are read
	over   chan struct{}          // closed when the queues are
}

// redirect makes the reader read the source, if there is one. The reader calls it between two turns.
func (r *reader) redirect() {
	s := r.q.source.Load()
	if s == nil || r.source != nil {
		return
	}
	for _, fd := range r.q.fds {
		r.q.set.Remove(fd)
	}
	// If it cannot be added, no frame comes, as from a process that hangs; the other process's limit ends that.
	_ = r.q.set.Add(s.fd, unix.EPOLLIN, 0, 0)
	r.source, r.from = s, []int{s.fd}
	r.turns = make([]turns, 1)
	r.events, r.at, r.cur, r.guess = nil, 0, 0, false
	close(s.begun)
}
