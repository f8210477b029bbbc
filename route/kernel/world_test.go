package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// world is the namespace at the other end of eth0, with a recorder on its end of the link.
type world struct {
	do   chan func()
	tid  int
	mu   sync.Mutex
	seen map[string]int // "proto dst" of frames with a payload for somewhere
	fd   int
}

const (
	far4, far6 = "203.0.113.9", "2001:db8:9::9"
	lan4       = "10.1.1.1"
)

// newWorld moves eth0p away and gives it the far end's addresses.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := newWorldless(t)
	ip(t, fmt.Sprintf("link set eth0p netns %d", w.tid), "addr add 10.1.1.2/24 dev eth0", "addr add fe80::2/64 dev eth0 nodad")
	w.in(func() {
		ip(
			t,
			"link set lo up",
			"link set eth0p addrgenmode none up",
			"addr add 198.51.100.1/24 dev eth0p",
			"addr add 10.1.1.1/24 dev eth0p",
			"addr add 2001:db8:1::1/64 dev eth0p nodad",
			"addr add fe80::1/64 dev eth0p nodad",
			"addr add "+far4+"/32 dev lo",
			"addr add "+far6+"/128 dev lo nodad",
			"route add 192.168.7.0/24 via 198.51.100.2",
			"route add 198.18.0.1/32 via 198.51.100.2",
		)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			t.Error(err)
			return
		}
		w.fd = fd
		k, _ := net.InterfaceByName("eth0p")
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: k.Index}); err != nil {
			t.Error(err)
		}
	})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, 20)
			select {
			case <-stop:
				return
			default:
			}
			w.mu.Lock()
			w.drain()
			w.mu.Unlock()
		}
	})
	w.onEnd(t, func() { close(stop); wg.Wait(); unix.Close(w.fd) })
	settled(t)
	return w
}

var ends = map[*testing.T][]func(){}

// onEnd runs before the leak checks of inNamespace.
func (w *world) onEnd(t *testing.T, f func()) { ends[t] = append(ends[t], f) }

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (w *world) in(f func()) {
	done := make(chan struct{})
	w.do <- func() { defer close(done); f() }
	<-done
}

// drain notes what has arrived. The caller holds mu.
func (w *world) drain() {
	buf := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING {
			w.note(buf[:n])
		}
	}
}

// note counts a frame. The caller holds mu.
func (w *world) note(b []byte) {
	if len(b) < 20 {
		return
	}
	var dst netip.Addr
	proto := b[9]
	switch b[0] >> 4 {
	case 4:
		dst, _ = netip.AddrFromSlice(b[16:20])
	case 6:
		if len(b) < 40 {
			return
		}
		dst, _ = netip.AddrFromSlice(b[24:40])
		if proto = b[6]; proto == unix.IPPROTO_ICMPV6 && b[40] >= 133 && b[40] <= 136 || proto == 0 {
			return
		}
	default:
		return // ARP
	}
	w.seen[fmt.Sprintf("%d %s", proto, dst)]++
}

// passes sends until something is seen, or with want false once. A stall of the machine may cost a packet.
func (w *world) passes(want bool, send func() error) bool {
	w.take()
	for range 10 {
		_ = send()
		for range 30 {
			if len(w.take()) > 0 {
				return true
			}
			if !want {
				return false
			}
		}
	}
	return false
}

// take gives what was seen, and forgets it. It reads what waits in the recorder's socket itself: on a busy machine the
// recorder's own turn may come after the next probe, which would then be blamed for a frame of before.
func (w *world) take() map[string]int {
	testkit.Settle(30*time.Millisecond, "what left has arrived")
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drain()
	s := w.seen
	w.seen = map[string]int{}
	return s
}

// probe is one try to get out; bind is a device or empty.
type probe struct {
	name  string
	typ   int
	dst   string
	port  uint16
	bind  string
	mark  uint32
	sport int
	src   netip.AddrPort
	group string // directory of the cgroup that the socket is of; "": the test's
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// send gives what connect() or sendto() said, within 1.5 s.
func (p probe) send() error {
	family := unix.AF_INET
	dst := netip.MustParseAddr(p.dst)
	if dst.Is6() {
		family = unix.AF_INET6
	}
	fd, err := socketIn(p.group, family, p.typ)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if p.bind != "" {
		if err := unix.BindToDevice(fd, p.bind); err != nil {
			return err
		}
	}
	if p.mark != 0 {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(p.mark))
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 1, Usec: 500000})
	if p.sport != 0 {
		any := netip.IPv4Unspecified()
		if dst.Is6() {
			any = netip.IPv6Unspecified()
		}
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, uint16(p.sport)))); err != nil {
			return err
		}
	}
	sa := sockaddr(netip.AddrPortFrom(dst, p.port))
	if p.typ == unix.SOCK_STREAM {
		if p.src.IsValid() {
			if err := unix.Bind(fd, sockaddr(p.src)); err != nil {
				return err
			}
		}
		_ = unix.SetNonblock(fd, true)
		if err := unix.Connect(fd, sa); err != unix.EINPROGRESS {
			return err
		}
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 500); n == 0 {
			return unix.ETIMEDOUT
		}
		errno, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if errno == 0 {
			return nil
		}
		return unix.Errno(errno)
	}
	return unix.Sendto(fd, []byte("canary"), 0, sa)
}

func probes() (out []probe) {
	for _, bind := range []string{"", "eth0"} {
		for _, dst := range []string{far4, far6} {
			for typ, name := range map[int]string{unix.SOCK_STREAM: "tcp", unix.SOCK_DGRAM: "udp"} {
				for _, port := range []uint16{7777, 53} {
					out = append(
						out,
						probe{
							name: fmt.Sprintf("%s %s %d %q", name, dst, port, bind),
							typ:  typ,
							dst:  dst,
							port: port,
							bind: bind,
						},
					)
				}
			}
		}
	}
	for _, dst := range []string{"198.51.100.1", "198.51.100.255", "255.255.255.255", "239.192.152.143", "2001:db8:1::1",
		"ff15::efc0:988f"} {
		out = append(out, probe{name: "udp " + dst, typ: unix.SOCK_DGRAM, dst: dst, port: 6771, bind: "eth0"})
	}
	out = append(
		out,
		probe{name: "dns on-link", typ: unix.SOCK_DGRAM, dst: lan4, port: 53},
		probe{name: "dns on-link, bound", typ: unix.SOCK_DGRAM, dst: lan4, port: 53, bind: "eth0"},
		probe{name: "our mark elsewhere", typ: unix.SOCK_DGRAM, dst: far4, port: 7777, mark: 0x76000000},
		probe{name: "mark of inbound", typ: unix.SOCK_DGRAM, dst: far4, port: 7777, mark: 0x79000000},
	)
	return out
}

// mustBeClosed sends all probes.
func (w *world) mustBeClosed(t *testing.T, when string) {
	t.Helper()
	w.take()
	for _, p := range probes() {
		var err error
		var took time.Duration
		for range 5 { // the machine may have been the slow one
			start := time.Now()
			err = p.send()
			if took = time.Since(start); took < 300*time.Millisecond || when == "steered" {
				break
			}
		}
		if p.typ == unix.SOCK_STREAM && when != "steered" && (err == nil || took > 300*time.Millisecond) {
			t.Errorf("%s: %s: %v after %v", when, p.name, err, took)
		}
	}
	if s := w.take(); len(s) > 0 {
		t.Errorf("%s: left the host: %v", when, s)
	}
}

// tcpServer answers each connection with "hello" and then echoes.
func tcpServer(t *testing.T, network, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = c.Write([]byte("hello"))
				b := make([]byte, 100)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					_, _ = c.Write(b[:n])
				}
			}()
		}
	}()
	return l
}

// talk says something and wants it back.
func talk(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(testkit.Patience))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err == nil && string(b[:n]) != "ping" {
		err = fmt.Errorf("got %q", b[:n])
	}
	return err
}

func hello(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(testkit.Patience))
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err == nil && string(b[:n]) != "hello" {
		err = fmt.Errorf("got %q", b[:n])
	}
	return err
}

func mustAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// newWorldless is a namespace without a link, and without a recorder.
func newWorldless(t *testing.T) *world {
	w := &world{do: make(chan func()), seen: map[string]int{}}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		w.tid = unix.Gettid()
		ready <- err
		for f := range w.do {
			f()
		}
		ready <- nil
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	w.onEnd(t, func() { close(w.do); <-ready })
	return w
}

// listenUDP opens a socket of the world.
func (w *world) listenUDP(t *testing.T, network string, addr netip.AddrPort) (conn *net.UDPConn) {
	t.Helper()
	var err error
	w.in(func() { conn, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(addr)) })
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// newContainer is a namespace at 172.17.0.2 behind the bridge docker0 of the host, which forwards what comes from there.
func newContainer(t *testing.T) *world {
	t.Helper()
	k := newWorldless(t)
	ip(
		t,
		"link add docker0 type bridge",
		"link set docker0 addrgenmode none up",
		"link add vc type veth peer name ceth",
		"link set vc addrgenmode none master docker0 up",
		"link set ceth netns "+k.pid(),
		"addr add 172.17.0.1/16 dev docker0",
	)
	k.in(func() {
		ip(
			t,
			"link set lo up",
			"link set ceth addrgenmode none up",
			"addr add 172.17.0.2/16 dev ceth",
			"route add default via 172.17.0.1",
		)
	})
	setSysctls(t, "1", "net/ipv4/ip_forward")
	return k
}

// speaksFromFar has the world's connections to the host come from the far end's addresses, which are not on-link.
func (w *world) speaksFromFar(t *testing.T) {
	t.Helper()
	w.in(func() {
		ip(t, "route replace 198.51.100.2/32 dev eth0p src "+far4, "-6 route replace 2001:db8:1::2/128 dev eth0p src "+far6)
	})
}

// isAnyone gives the world all addresses of the far networks.
func (w *world) isAnyone(t *testing.T) {
	t.Helper()
	w.in(func() {
		ip(
			t,
			"route replace local 203.0.113.0/24 dev lo",
			"-6 route replace local 2001:db8:9::/64 dev lo",
			"route add default via 198.51.100.2",
			"-6 route add default via 2001:db8:1::2",
		)
	})
}

func (w *world) pid() string { return fmt.Sprint(w.tid) }
