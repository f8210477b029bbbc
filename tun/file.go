package tun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrBadFrame means that the kernel refused the frame or its Header as malformed. The frame is lost; the device keeps
// working.
var ErrBadFrame = errors.New("malformed frame")

const (
	offloadTSO = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	offloadUSO = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// fileDevice is a kernel TUN whose frames carry a header. It moves the frames through its own queues; the handle does
// the rest.
type fileDevice struct {
	q      *queues
	h      *handle
	name   string
	mtu    int
	off    Offload
	closed atomic.Bool
	rd     reader
	wr     sync.Pool     // of *writer
	parts  []*fileDevice // the parts that it was divided into; q is then nil
}

// FromFiles makes a Device of an open TUN. The files are its queues, as netns.OpenTUN returns them; they may come
// from another network namespace unless o.OnLink is set. FromFiles takes ownership of the files, even if it fails.
// The TUN must have been made with IFF_NO_PI; FromFiles finds out whether it has IFF_VNET_HDR. Without that header,
// and on kernels that lack an offload, Device.Offload returns less than Options.Offload requested.
func FromFiles(files []*os.File, o Options) (Device, error) {
	return fromFiles(files, o, len(files) == 1)
}

// fromFiles is FromFiles. With share, all files are queues for frames, and the handle shares one of them.
func fromFiles(files []*os.File, o Options, share bool) (Device, error) {
	fds, err := takeFiles(files)
	if err != nil {
		return nil, fmt.Errorf("cannot use the TUN device: %w", err)
	}
	name, vnet, err := probe(fds)
	if err != nil {
		closeAll(fds)
		return nil, fmt.Errorf("cannot use the TUN device: %w", err)
	}
	var d Device
	if vnet {
		d, err = newFileDevice(fds, name, o, share)
	} else {
		closeAll(fds[1:])
		d, err = newPlain(fds[0], name, o)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the TUN device %s: %w", name, err)
	}
	if o.Log != nil {
		off := d.Offload()
		o.Log.LogAttrs(
			context.Background(),
			slog.LevelDebug,
			"tun device",
			slog.String("name", name),
			slog.Int("mtu", o.MTU),
			slog.Int("files", len(fds)),
			slog.String(
				"offload",
				o.Offload.String(),
			),
			slog.Bool("vnet_hdr", vnet),
			slog.Bool("tso", off&TSO != 0),
			slog.Bool("uso", off&USO != 0),
		)
	}
	return d, nil
}

// newFileDevice takes ownership of fds, even if it fails. Without share, the first descriptor is for the handle alone.
// With share, the handle has a copy of it and leaves its frames alone.
func newFileDevice(fds []int, name string, o Options, share bool) (_ *fileDevice, err error) {
	own := fds[0]
	if !share {
		fds = fds[1:]
	} else if own, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		closeAll(fds)
		return nil, err
	}
	d := &fileDevice{name: name, mtu: o.MTU}
	if d.h, err = newHandle(own, o); err != nil {
		closeAll(fds)
		return nil, err
	}
	if !share {
		err = d.h.detach()
	}
	if err == nil {
		if d.off, err = negotiate(fds[0], o.Offload); err != nil {
			err = fmt.Errorf("cannot set its offloads: %w", err)
		}
	}
	if err != nil {
		closeAll(fds)
	} else {
		d.q, err = openQueues(fds)
	}
	if err != nil {
		d.h.close()
		return nil, err
	}
	d.init()
	return d, nil
}

// init prepares a device whose queues are open.
func (d *fileDevice) init() {
	d.rd.init(d.q)
	d.wr.New = func() any { return newWriter() }
}

// takeFiles duplicates the descriptors of the files and closes the files. The runtime's poller knows the files, and
// would report each frame a second time.
func takeFiles(files []*os.File) (fds []int, err error) {
	if len(files) == 0 {
		return nil, errors.New("it has no open queue")
	}
	for _, f := range files {
		if err == nil {
			var fd int
			if fd, err = dup(f); err == nil {
				fds = append(fds, fd)
			}
		}
		f.Close()
	}
	if err != nil {
		closeAll(fds)
	}
	return fds, err
}

// dup returns a non-blocking duplicate.
func dup(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(old uintptr) {
		if fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3); err != nil {
			return
		}
		if err = unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
		}
	})
	return fd, errors.Join(cerr, err)
}

// probe checks that fds are usable queues of a single TUN. It returns the name of the interface and whether its
// frames carry a header.
func probe(fds []int) (name string, vnet bool, err error) {
	for i, fd := range fds {
		ifr, err := unix.NewIfreq("")
		if err != nil {
			return "", false, err
		}
		if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
			return "", false, fmt.Errorf("not attached to an interface: %w", err)
		}
		flags := ifr.Uint16()
		if flags&unix.IFF_TUN == 0 || flags&unix.IFF_NO_PI == 0 {
			return "", false, fmt.Errorf("interface %s must be a TUN with IFF_NO_PI", ifr.Name())
		}
		if i > 0 && ifr.Name() != name {
			return "", false, fmt.Errorf("%s and %s are two devices", name, ifr.Name())
		}
		name, vnet = ifr.Name(), flags&unix.IFF_VNET_HDR != 0
	}
	if !vnet {
		return name, false, nil
	}
	// Another program may have set the 12 bytes of vhost on a persistent interface.
	if err := unix.IoctlSetPointerInt(fds[0], unix.TUNSETVNETHDRSZ, HeaderLen); err != nil {
		return name, false, fmt.Errorf("cannot set the header's length: %w", err)
	}
	if err := unix.IoctlSetInt(fds[0], unix.TUNSETOFFLOAD, offloadTSO); err != nil {
		return name, false, fmt.Errorf("the kernel has no TCP offload (try --offload off): %w", err)
	}
	return name, true, nil
}

// negotiate limits the offloads to those that m allows. The handle has requested all of them; only another request
// shows whether the kernel has USO.
func negotiate(fd int, m Mode) (Offload, error) {
	switch {
	case m == OffloadOff:
		return VnetHdr, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0)
	case m == OffloadFull && unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadTSO|offloadUSO) == nil:
		return VnetHdr | TSO | USO, nil
	}
	return VnetHdr | TSO, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadTSO) // no USO before Linux 6.2
}

func (d *fileDevice) Name() string     { return d.name }
func (d *fileDevice) MTU() int         { return d.mtu }
func (d *fileDevice) Offload() Offload { return d.off }

func (d *fileDevice) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	var err error
	for _, p := range d.parts {
		err = errors.Join(err, p.Close())
	}
	if d.q != nil {
		err = d.q.close()
	}
	if d.h != nil { // otherwise it is a part
		err = errors.Join(err, d.h.close())
	}
	return err
}

// rawErr names the error of a Poller, which returns one only after it was closed.
func (d *fileDevice) rawErr(err error) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	return fmt.Errorf("cannot use the TUN device %s: %w", d.name, err)
}

func (d *fileDevice) Read(h *Header, b []byte, wait bool) (int, error) {
	r := &d.rd
	r.set(b)
	var err error
	if wait {
		_, err = d.q.set.Serve(r.tryWait) // nothing calls its Wake
	} else {
		err = d.q.set.Guard(r.try) // Guard takes no lock of the poller; a read that does not wait needs none
	}
	r.set(nil)
	if err != nil {
		return 0, d.rawErr(err)
	}
	switch r.errno {
	case 0:
	case unix.EAGAIN:
		return 0, ErrAgain
	default:
		return 0, d.readErr(r.errno)
	}
	n := r.n - HeaderLen
	if n < 0 {
		if r.source != nil {
			return 0, ErrLeft
		}
		return 0, fmt.Errorf("cannot read from the TUN device %s: a frame without its header", d.name)
	}
	*h = ParseHeader(r.hdr[:])
	if n > len(b) {
		return len(b), ErrTooLong
	}
	return n, nil
}

func (d *fileDevice) readErr(errno syscall.Errno) error {
	if errno == unix.EBADFD {
		return errDeleted("read from", d.name)
	}
	return fmt.Errorf("cannot read from the TUN device %s: %w", d.name, errno)
}

func (d *fileDevice) Write(h *Header, parts [][]byte) error {
	w := d.wr.Get().(*writer)
	err := w.set(h, parts)
	if err == nil {
		// Guard instead of Serve: it takes a reference to the file and no lock, so writers run in parallel.
		w.fd = d.q.fds[d.q.toward(parts)]
		if err = d.q.set.Guard(w.try); err != nil {
			err = d.rawErr(err)
		} else if w.errno != 0 {
			err = writeErr(d.name, w.errno)
		}
	}
	w.reset()
	d.wr.Put(w)
	return err
}

// errDeleted returns the error for a device whose interface was deleted.
func errDeleted(to, name string) error {
	return fmt.Errorf("cannot %s the TUN device %s: the interface was deleted: %w", to, name, unix.EBADFD)
}

func writeErr(name string, errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return ErrAgain
	case unix.EIO:
		// The interface is down. It may come up again; frames written meanwhile are lost, as on a full device.
		return ErrAgain
	case unix.EMSGSIZE:
		return ErrTooLong
	case unix.EINVAL:
		return ErrBadFrame
	case unix.EBADFD:
		return errDeleted("write to", name)
	}
	return fmt.Errorf("cannot write to the TUN device %s: %w", name, errno)
}
