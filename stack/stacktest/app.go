package stacktest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/tun"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const nicID = 1

// App is a program together with its kernel. All methods may be called concurrently.
type App struct {
	dev   tun.Device
	ns    *stack.Stack
	link  *link
	addrs []netip.Addr
	done  chan struct{} // closed when the reader has ended

	mu     sync.Mutex
	dials  map[dialKey]chan unix.Errno // connects that an ICMP error can end
	taps   []*Capture
	fault  error // about the first frame that a kernel would have refused
	faults int
	closed bool

	deaf atomic.Bool
}

type dialKey struct{ src, dst netip.AddrPort }

// New makes an app with the addresses addrs and takes ownership of dev, even if it fails. The first address of each
// family is the source of unbound sockets.
func New(dev tun.Device, addrs ...netip.Addr) (*App, error) {
	a := &App{dev: dev, addrs: addrs, done: make(chan struct{}), dials: map[dialKey]chan unix.Errno{}}
	a.link = newLink(dev)
	a.ns = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := a.setUp(); err != nil {
		dev.Close()
		a.ns.Destroy()
		return nil, fmt.Errorf("cannot make the test app: %w", err)
	}
	go a.read()
	return a, nil
}

func (a *App) setUp() error {
	const large = 4 << 20 // a datagram of 65,507 bytes does not fit a buffer of 32 KiB
	for _, o := range []tcpip.SettableTransportProtocolOption{
		// These are the settings of a kernel on a TUN, and thus also of the stack under test: RACK has no lower limit
		// here.
		ptr(tcpip.TCPRecovery(0)), ptr(tcpip.TCPSACKEnabled(true)), ptr(tcpip.TCPModerateReceiveBufferOption(true)),
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 256 << 10, Max: large},
		&tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 256 << 10, Max: large},
	} {
		if err := a.ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("%T: %v", o, err)
		}
	}
	for _, o := range []any{
		tcpip.SendBufferSizeOption{Min: 4 << 10, Default: 1 << 20, Max: large},
		tcpip.ReceiveBufferSizeOption{Min: 4 << 10, Default: 1 << 20, Max: large},
	} {
		if err := a.ns.SetOption(o); err != nil {
			return fmt.Errorf("%T: %v", o, err)
		}
	}
	if err := a.ns.CreateNIC(nicID, a.link); err != nil {
		return errors.New(err.String())
	}
	for _, addr := range a.addrs {
		pa := tcpip.ProtocolAddress{Protocol: network(addr), AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix()}
		if err := a.ns.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("address %v: %v", addr, err)
		}
	}
	a.ns.SetRouteTable(
		[]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}},
	)
	return nil
}

func ptr[T any](v T) *T { return &v }

func network(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// source returns the app's first address of dst's family.
func (a *App) source(dst netip.Addr) (netip.Addr, error) {
	for _, addr := range a.addrs {
		if addr.Is4() == dst.Is4() {
			return addr, nil
		}
	}
	return netip.Addr{}, unix.ENETUNREACH
}

// Close kills the program: it resets every connection and closes everything, including the device. It returns an
// error about the first frame that a kernel would have refused, if there was one. It may be called twice.
func (a *App) Close() error {
	a.mu.Lock()
	was := a.closed
	a.closed = true
	a.mu.Unlock()
	if !was {
		a.ns.Close()
		a.dev.Close()
	}
	<-a.done
	if !was {
		a.ns.Wait()
		a.mu.Lock()
		taps := slices.Clone(a.taps)
		a.mu.Unlock()
		for _, c := range taps {
			c.Close()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fault != nil {
		return fmt.Errorf("cannot accept %d of the frames written to the app: %w", a.faults, a.fault)
	}
	return nil
}

// Inject writes a frame to the device as if the app's kernel had sent it, without any check. Only Capture sees
// answers to addresses that were not given to New.
func (a *App) Inject(f Frame) error { return a.dev.Write(&f.Header, [][]byte{f.Data}) }

// Deaf hides all frames from the app's kernel, but not from captures, until it is called with false. The app then
// behaves like a program whose host is gone.
func (a *App) Deaf(on bool) { a.deaf.Store(on) }

func (a *App) read() {
	defer close(a.done)
	var h tun.Header
	buf := make([]byte, tun.MaxFrame)
	for {
		n, err := a.dev.Read(&h, buf, true)
		switch {
		case errors.Is(err, tun.ErrAgain):
			continue
		case errors.Is(err, tun.ErrTooLong):
			a.bad(Frame{Header: h, Data: buf[:n]}, err)
			continue
		case err != nil:
			return
		}
		f := Frame{Header: h, Data: buf[:n]}
		a.capture(f)
		if a.deaf.Load() {
			continue
		}
		fs, err := receive(f)
		if err != nil {
			a.bad(f, err)
			continue
		}
		for _, f := range fs {
			if m, ok := f.ICMP(); ok {
				a.unreachable(m)
			}
			a.deliver(f)
		}
	}
}

// bad records a frame that a kernel would refuse.
func (a *App) bad(f Frame, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.faults++; a.fault == nil {
		a.fault = fmt.Errorf("%w: header %+v, %d bytes: %x", err, f.Header, len(f.Data), f.Data[:min(len(f.Data), 80)])
	}
}

func (a *App) deliver(f Frame) {
	proto := ipv4.ProtocolNumber
	if f.Data[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f.Data)}) // copies
	defer pkt.DecRef()
	a.link.deliver(proto, pkt)
}

// unreachable ends a connect as Linux does when it receives a destination unreachable that quotes the SYN.
func (a *App) unreachable(m ICMP) {
	errno, ok := unreachableErrno(m)
	if !ok {
		return
	}
	proto, src, dst, ok := m.quoted()
	if !ok || proto != protoTCP {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.dials[dialKey{src, dst}]; c != nil {
		select {
		case c <- errno:
		default:
		}
	}
}

// Capture contains the frames that the stack under test wrote from a certain moment on.
type Capture struct {
	a      *App
	filter func(Frame) bool
	mu     sync.Mutex
	frames []Frame
	more   chan struct{} // contains a token when frames have arrived
}

// Capture begins to record the frames for which filter returns true (nil: all). They are recorded as they were
// written, before any check. Close ends it, at the latest that of the App.
func (a *App) Capture(filter func(Frame) bool) *Capture {
	c := &Capture{a: a, filter: filter, more: make(chan struct{}, 1)}
	a.mu.Lock()
	a.taps = append(a.taps, c)
	a.mu.Unlock()
	return c
}

func (a *App) capture(f Frame) {
	a.mu.Lock()
	taps := a.taps
	a.mu.Unlock()
	for _, c := range taps {
		if c.filter == nil || c.filter(f) {
			c.mu.Lock()
			c.frames = append(c.frames, Frame{f.Header, slices.Clone(f.Data)})
			c.mu.Unlock()
			select {
			case c.more <- struct{}{}:
			default:
			}
		}
	}
}

// Next waits for the next frame and removes it. One goroutine at a time may call it.
func (c *Capture) Next(ctx context.Context) (Frame, error) {
	for {
		c.mu.Lock()
		if len(c.frames) > 0 {
			f := c.frames[0]
			c.frames = c.frames[1:]
			c.mu.Unlock()
			return f, nil
		}
		c.mu.Unlock()
		select {
		case <-c.more:
		case <-ctx.Done():
			return Frame{}, ctx.Err()
		}
	}
}

// Frames returns the frames that were captured and not yet removed by Next. It does not remove them.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.frames)
}

// Close ends the capture. Captured frames can still be read.
func (c *Capture) Close() {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	// Make a new slice, because the reader may be walking the old one.
	c.a.taps = slices.DeleteFunc(slices.Clone(c.a.taps), func(x *Capture) bool { return x == c })
}
