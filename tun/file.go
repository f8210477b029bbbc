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
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// ErrBadFrame: the kernel refused the frame or its Header as malformed. It is lost; the device works on.
var ErrBadFrame = errors.New("frame refused as malformed")

const (
	offloadTSO = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	offloadUSO = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// fileDevice is a TUN of the kernel. The wireguard device below it negotiated the offloads and owns the file; its own
// Read and Write, which cut and merge super-segments, are not used.
type fileDevice struct {
	dev    wgtun.Device
	raw    syscall.RawConn // of dev's file; a cached fd number could be somebody else's after Close
	name   string
	mtu    int
	off    Offload
	closed atomic.Bool
	rd     reader
	wr     sync.Pool // of *writer
}

// FromFile makes a Device of an open TUN: one of netns.OpenTUN, or of another namespace, since only the file is used and
// never the interface's name. It takes ownership of f, also when it fails. The TUN must have been made with IFF_NO_PI;
// whether it has IFF_VNET_HDR is asked. Without it, and on kernels that lack an offload, Device.Offload says less than
// Options.Offload asked for.
func FromFile(f *os.File, o Options) (Device, error) {
	defer f.Close() // the device has a duplicate
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("cannot use the TUN device: %w", err)
	}
	var (
		fd   int
		vnet bool
	)
	cerr := raw.Control(func(old uintptr) {
		// All that the wireguard device will ask is asked here first: it leaves its file to a finalizer when it fails.
		if vnet, err = probe(int(old)); err == nil {
			fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3)
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("cannot use the TUN device: %w", err)
	}
	dev, name, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("cannot use the TUN device: %w", err)
	}
	d := &fileDevice{dev: dev, name: name, mtu: o.MTU}
	if d.raw, err = dev.File().SyscallConn(); err != nil {
		dev.Close()
		return nil, fmt.Errorf("cannot use the TUN device %s: %w", name, err)
	}
	if vnet {
		if d.off, err = negotiate(d.raw, o.Offload); err != nil {
			dev.Close()
			return nil, fmt.Errorf("cannot set the offloads of the TUN device %s: %w", name, err)
		}
	}
	d.rd.init(vnet)
	d.wr.New = func() any { return newWriter(vnet) }
	if o.Log != nil {
		o.Log.LogAttrs(context.Background(), slog.LevelDebug, "tun device", slog.String("name", name), slog.Int("mtu", o.MTU),
			slog.String("offload", o.Offload.String()), slog.Bool("vnet_hdr", vnet), slog.Bool("tso", d.off&TSO != 0), slog.Bool("uso", d.off&USO != 0))
	}
	return d, nil
}

// probe checks that fd is a TUN that can be used, and reports whether its frames carry a header.
func probe(fd int) (vnet bool, err error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return false, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return false, fmt.Errorf("not attached to an interface: %w", err)
	}
	flags := ifr.Uint16()
	if flags&unix.IFF_TUN == 0 || flags&unix.IFF_NO_PI == 0 {
		return false, fmt.Errorf("interface %s must be a TUN with IFF_NO_PI", ifr.Name())
	}
	if flags&unix.IFF_VNET_HDR == 0 {
		return false, nil
	}
	// Somebody may have asked for the 12 bytes of a vhost on a persistent interface.
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderLen); err != nil {
		return false, fmt.Errorf("cannot set the header's length: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadTSO); err != nil {
		return false, fmt.Errorf("the kernel has no TCP offload (try --offload off): %w", err)
	}
	return true, nil
}

// negotiate sets what m allows and the kernel has.
func negotiate(raw syscall.RawConn, m Mode) (off Offload, err error) {
	cerr := raw.Control(func(fd uintptr) {
		switch {
		case m == OffloadOff:
			off, err = VnetHdr, unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, 0)
		case m == OffloadFull && unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloadTSO|offloadUSO) == nil:
			off = VnetHdr | TSO | USO
		default: // no USO before Linux 6.2
			off, err = VnetHdr|TSO, unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloadTSO)
		}
	})
	return off, errors.Join(cerr, err)
}

func (d *fileDevice) Name() string     { return d.name }
func (d *fileDevice) MTU() int         { return d.mtu }
func (d *fileDevice) Offload() Offload { return d.off }

func (d *fileDevice) Close() error {
	d.closed.Store(true)
	return d.dev.Close() // closes once; wakes a blocked Read
}

// rawErr names the error of a RawConn: with the file open it has none to give.
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
		err = d.raw.Read(r.tryWait)
	} else {
		err = d.raw.Control(r.try) // no lock of the poller, which a look alone does not need
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
	n := r.n - r.hdrLen
	if n < 0 {
		return 0, fmt.Errorf("cannot read from the TUN device %s: a frame without its header", d.name)
	}
	*h = Header{}
	if r.hdrLen != 0 {
		*h = ParseHeader(r.hdr[:])
	}
	if n > len(b) {
		return len(b), ErrTooLong
	}
	return n, nil
}

func (d *fileDevice) readErr(errno syscall.Errno) error {
	if errno == unix.EBADFD {
		return fmt.Errorf("cannot read from the TUN device %s: the interface was deleted: %w", d.name, errno)
	}
	return fmt.Errorf("cannot read from the TUN device %s: %w", d.name, errno)
}

func (d *fileDevice) Write(h *Header, parts [][]byte) error {
	w := d.wr.Get().(*writer)
	err := w.set(h, parts)
	if err == nil {
		// Control and not RawConn.Write: this takes a reference to the file and no lock, so that writers run side by side.
		if err = d.raw.Control(w.try); err != nil {
			err = d.rawErr(err)
		} else if w.errno != 0 {
			err = d.writeErr(w.errno)
		}
	}
	w.reset()
	d.wr.Put(w)
	return err
}

func (d *fileDevice) writeErr(errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		return ErrAgain
	case unix.EIO:
		// The interface is set down. It may come up again, and what is written meanwhile is lost as on a full device.
		return ErrAgain
	case unix.EMSGSIZE:
		return ErrTooLong
	case unix.EINVAL:
		return ErrBadFrame
	case unix.EBADFD:
		return fmt.Errorf("cannot write to the TUN device %s: the interface was deleted: %w", d.name, errno)
	}
	return fmt.Errorf("cannot write to the TUN device %s: %w", d.name, errno)
}
