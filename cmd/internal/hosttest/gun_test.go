package hosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// gun fires probes, one each millisecond, each in its turn. Sockets are made on its thread, in the namespace and as the
// user that the probe wants.
type gun struct {
	w      *world
	probes []*probe
	eth0   int // index of the host's uplink
	ns     string
	nsFDs  map[string]int
	ring   []int // sockets that are open yet, so that retransmissions are seen
	at     int
	shots  uint32
	fired  []atomic.Int64 // by probe
	errs   []atomic.Pointer[error]
	phase  atomic.Int32 // chooses what was established before
	times  []time.Time  // of each shot, the first is number 1
	probed []int32      // and whose it was

	stop chan struct{}
	done chan struct{}
	err  error
}

// openFor is how many sockets stay open: at one each millisecond, longer than a SYN takes to be sent again.
const openFor = 1500

func newGun(w *world, probes []*probe) *gun {
	g := &gun{
		w:      w,
		probes: probes,
		nsFDs:  map[string]int{},
		fired:  make([]atomic.Int64, len(probes)),
		errs:   make([]atomic.Pointer[error], len(probes)),
	}
	for _, ns := range []string{"host", "ctr"} {
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			w.t.Fatal(err)
		}
		g.nsFDs[ns] = fd
	}
	w.in("host", func() error { g.eth0 = linkIndex("eth0"); return nil })
	g.ring = make([]int, openFor)
	for i := range g.ring {
		g.ring[i] = -1
	}
	w.t.Cleanup(func() {
		for _, fd := range append(g.ring, g.nsFDs["host"], g.nsFDs["ctr"]) {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	})
	return g
}

// start fires until halt. They come in pairs.
func (g *gun) start() {
	g.stop, g.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(g.done)
		runtime.LockOSThread() // never unlocked: the thread has been elsewhere
		g.ns = ""
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-g.stop:
				return
			case <-tick.C:
			}
			if err := g.fire(g.probes[i%len(g.probes)]); err != nil {
				g.err = err
				return
			}
		}
	}()
}

func (g *gun) halt() error {
	close(g.stop)
	<-g.done
	return g.err
}

// rounds waits until each probe was fired n times more.
func (g *gun) rounds(n int64) error {
	last := len(g.probes) - 1
	until := g.fired[last].Load() + n + 1
	if !testkit.Until(2*time.Minute, func() bool { return g.fired[last].Load() >= until }) {
		return fmt.Errorf("the probes hang: %w", g.err)
	}
	return nil
}

func (g *gun) fire(p *probe) error {
	if p.ns != g.ns {
		if err := unix.Setns(g.nsFDs[p.ns], unix.CLONE_NEWNET); err != nil {
			return err
		}
		g.ns = p.ns
	}
	g.shots++
	g.times, g.probed = append(g.times, time.Now()), append(g.probed, int32(p.id))
	err := p.fire(g, p, putCanary(p.id, g.shots))
	if errors.Is(err, unix.EINPROGRESS) {
		err = nil
	}
	g.errs[p.id].Store(&err)
	g.fired[p.id].Add(1)
	return nil
}

// lastError is what the program saw when the probe was fired last.
func (g *gun) lastError(p *probe) error {
	if e := g.errs[p.id].Load(); e != nil {
		return *e
	}
	return errors.New("never fired")
}

// keep closes a socket later.
func (g *gun) keep(fd int) {
	if old := g.ring[g.at]; old >= 0 {
		unix.Close(old)
	}
	g.ring[g.at] = fd
	g.at = (g.at + 1) % len(g.ring)
}

// forget closes all sockets, so that none of them sends a SYN again.
func (g *gun) forget() {
	for i, fd := range g.ring {
		if fd >= 0 {
			unix.Close(fd)
		}
		g.ring[i] = -1
	}
}

func (g *gun) socket(v6 bool, typ, proto int) (int, error) {
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	return unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

// sockaddr is with the uplink for link-local addresses.
func (g *gun) sockaddr(ap netip.AddrPort) unix.Sockaddr {
	sa := sockaddr(ap)
	if a, ok := sa.(*unix.SockaddrInet6); ok && ap.Addr().IsLinkLocalUnicast() {
		a.ZoneId = uint32(g.eth0)
	}
	return sa
}

// option changes a socket before it is used.
type option func(g *gun, p *probe, fd int) error

func (p *probe) apply(g *gun, fd int, opts []option) error {
	for _, o := range opts {
		if err := o(g, p, fd); err != nil {
			return err
		}
	}
	return nil
}

// udp sends one datagram.
func udp(opts ...option) shot { return udpSize(0, opts...) }

// udpSize sends one datagram of so many bytes, with the canary all over it so that each fragment has one.
func udpSize(size int, opts ...option) shot {
	return func(g *gun, p *probe, b []byte) error {
		fd, err := g.socket(p.v6, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		g.keep(fd)
		if err := p.apply(g, fd, opts); err != nil {
			return err
		}
		for unit := b; len(b) < size; {
			b = append(b, unit...)
		}
		return unix.Sendto(fd, b, 0, g.sockaddr(p.to))
	}
}

// udpConnected sends by connect and write; between them then may change the socket.
func udpConnected(then option, opts ...option) shot {
	return func(g *gun, p *probe, b []byte) error {
		fd, err := g.socket(p.v6, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		g.keep(fd)
		if err := p.apply(g, fd, opts); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(p.to)); err != nil {
			return err
		}
		if then != nil {
			if err := then(g, p, fd); err != nil {
				return err
			}
		}
		_, err = unix.Write(fd, b)
		return err
	}
}

// tcp connects.
func tcp(opts ...option) shot {
	return func(g *gun, p *probe, _ []byte) error {
		fd, err := g.socket(p.v6, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		g.keep(fd)
		if err := p.apply(g, fd, opts); err != nil {
			return err
		}
		return unix.Connect(fd, sockaddr(p.to))
	}
}

// raw sends body (the canary follows) by a raw socket of this protocol.
func raw(proto int, body []byte, opts ...option) shot {
	return rawType(unix.SOCK_RAW, proto, body, opts...)
}

func rawType(typ, proto int, body []byte, opts ...option) shot {
	return func(g *gun, p *probe, b []byte) error {
		fd, err := g.socket(p.v6, typ, proto)
		if err != nil {
			return err
		}
		g.keep(fd)
		if err := p.apply(g, fd, opts); err != nil {
			return err
		}
		b = append(append([]byte(nil), body...), b...)
		if proto == unix.IPPROTO_ICMP { // conntrack looks at it
			binary.BigEndian.PutUint16(b[2:], ^sum(b))
		}
		return unix.Sendto(fd, b, 0, sockaddr(netip.AddrPortFrom(p.to.Addr(), 0)))
	}
}

// udpFlags sends one datagram with flags of sendto.
func udpFlags(flags int) shot {
	return func(g *gun, p *probe, b []byte) error {
		fd, err := g.socket(p.v6, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		g.keep(fd)
		return unix.Sendto(fd, b, flags, sockaddr(p.to))
	}
}

// udpByPacket names the device in each packet's control message.
func udpByPacket(g *gun, p *probe, b []byte) error {
	fd, err := g.socket(p.v6, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	g.keep(fd)
	oob := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(g.eth0)})
	if p.v6 {
		oob = unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: uint32(g.eth0)})
	}
	return unix.Sendmsg(fd, b, oob, sockaddr(p.to), 0)
}

// udpMapped sends to an IPv4 address by a socket of IPv6.
func udpMapped(g *gun, p *probe, b []byte) error {
	fd, err := g.socket(true, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	g.keep(fd)
	return unix.Sendto(fd, b, 0, sockaddr(netip.AddrPortFrom(netip.AddrFrom16(p.to.Addr().As16()), p.to.Port())))
}

// errUnavailable is of probes that need root.
var errUnavailable = errors.New("not to be had here")

// as runs a shot as another user. Sockets belong to the user for files of the thread that makes them.
func as(uid int, s shot) shot {
	return func(g *gun, p *probe, b []byte) error {
		setfsuid := func(uid int) { _, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0) }
		setfsuid(uid)
		defer setfsuid(0)
		if now, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0); int(now) != uid {
			return fmt.Errorf("%w: another user", errUnavailable)
		}
		return s(g, p, b)
	}
}
