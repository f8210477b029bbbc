package tun

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// handle is the wireguard device of a TUN. It owns the interface's name, MTU, offload negotiation and lifetime, and
// it reports changes of the link. The frames do not pass through it, because its Read and Write would cut each
// super-segment into packets and merge them again. It therefore holds a queue that is detached from the interface, to
// which the kernel sends no frames.
type handle struct {
	dev     wgtun.Device
	drained chan struct{} // closed when the last event was read
}

// newHandle makes the wireguard device of fd and takes ownership of fd, even if it fails. fd must be attached to the
// interface: the device reads its name and sets its offloads. With onLink, the link is watched from the calling
// thread's network namespace, which must be that of the interface.
func newHandle(fd int, o Options) (*handle, error) {
	h := &handle{drained: make(chan struct{})}
	if o.OnLink == nil {
		dev, _, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
		if err != nil {
			return nil, err // its finalizer closes the file
		}
		h.dev = dev
	} else {
		file := os.NewFile(uintptr(fd), "/dev/net/tun")
		dev, err := wgtun.CreateTUNFromFile(file, o.MTU)
		if err != nil {
			file.Close()
			return nil, err
		}
		h.dev = dev
	}
	go h.drain(o.OnLink)
	return h, nil
}

// drain reads the events until the device is closed; otherwise the device's goroutines would wait for a reader. The
// content of an event is not passed on, because the library reports a link that went down as a change of its MTU:
// findings/wireguard-tun-never-says-down.sh demonstrates and explains this. The library also writes zero bytes to the
// queue every second, which has no effect.
func (h *handle) drain(onLink func()) {
	defer close(h.drained)
	for range h.dev.Events() {
		if onLink != nil {
			onLink()
		}
	}
}

// detach removes the handle's queue from those that the interface sends to. In all other respects it stays a queue of
// the interface.
func (h *handle) detach() error {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_DETACH_QUEUE)
	if err := h.control(func(fd int) error { return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, ifr) }); err != nil {
		return fmt.Errorf("cannot detach a queue: %w", err)
	}
	return nil
}

// Abandon lets the interface end with the device, even one made to persist (netns.TUNOptions.Persist). The device
// keeps working.
func Abandon(d Device) {
	var h *handle
	switch d := d.(type) {
	case *fileDevice:
		h = d.h
	case *plainDevice:
		h = d.h
	default:
		return
	}
	_ = h.control(func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0) }) // fails if the interface is gone
}

// control calls f with the handle's descriptor and keeps it open meanwhile.
func (h *handle) control(f func(fd int) error) error {
	raw, err := h.dev.File().SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

// close returns when no more events can come.
func (h *handle) close() error {
	err := h.dev.Close()
	<-h.drained
	return err
}
