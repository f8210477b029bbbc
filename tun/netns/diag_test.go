package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

var (
	setUp    sync.Once
	tunFile  *os.File // swallows what is sent to it
	tunIndex int
)

const tunAddr4, tunAddr6 = "10.98.0.1", "fd00:98::1"

// network sets lo and a TUN with default routes up, once: whatever goes to the TUN is never answered.
func network(t testing.TB) {
	t.Helper()
	if noNamespace != "" {
		t.Skip(noNamespace)
	}
	setUp.Do(func() {
		if err := linkUp("lo"); err != nil {
			t.Fatal(err)
		}
		f, name, err := OpenTUN(TUNOptions{Name: "vsn0"})
		if err != nil {
			t.Log(err)
			return
		}
		_, err = Configure(
			name,
			1500,
			[]netip.Prefix{netip.MustParsePrefix(tunAddr4 + "/32"), netip.MustParsePrefix(tunAddr6 + "/128")},
			true,
		)
		if err != nil {
			t.Fatal(err)
		}
		i, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		tunFile, tunIndex = f[0], i.Index
	})
	if tunFile == nil {
		t.Skip("no TUN device")
	}
}

func newTestDiag(t testing.TB) *Diag {
	network(t)
	d, err := OpenDiag()
	if err != nil {
		t.Fatal(err)
	}
	d.SetInterface(tunIndex)
	t.Cleanup(func() { d.Close() })
	return d
}

func expect(t *testing.T, d *Diag, what string, proto uint8, src, dst netip.AddrPort, want bool) {
	t.Helper()
	var got bool
	var err error
	testkit.Until(testkit.Patience, func() bool { // a FIN or RST may be on its way still
		got, err = d.Exists(proto, src, dst)
		return err != nil || got == want
	})
	if err != nil || got != want {
		t.Errorf("%s: %v, %v; want %v", what, got, err, want)
	}
}

func local(c net.Conn) netip.AddrPort  { return netip.MustParseAddrPort(c.LocalAddr().String()) }
func remote(c net.Conn) netip.AddrPort { return netip.MustParseAddrPort(c.RemoteAddr().String()) }

func TestDiagTCP(t *testing.T) {
	d := newTestDiag(t)
	for _, c := range []struct{ name, network, listen string }{
		{"v4", "tcp4", "127.0.0.1:0"}, {"v6", "tcp6", "[::1]:0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen(c.network, c.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			conn, err := net.Dial(c.network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			srv, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer srv.Close()
			src, dst := local(conn), remote(conn)
			expect(t, d, "connected", 6, src, dst, true)
			expect(t, d, "connected, the other end", 6, dst, src, true)
			expect(t, d, "another port", 6, src, netip.AddrPortFrom(dst.Addr(), dst.Port()^1), false)
			expect(t, d, "the listener, asked as a connection", 6, dst, netip.AddrPortFrom(dst.Addr(), 9), false)
			expect(t, d, "as UDP", 17, src, dst, false)
			srv.(*net.TCPConn).SetLinger(0)
			srv.Close()
			conn.Close()
			expect(t, d, "closed", 6, src, dst, false)
		})
	}
}

func TestDiagTimeWait(t *testing.T) {
	d := newTestDiag(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	srv, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	src, dst := local(conn), remote(conn)
	conn.Close()
	expect(t, d, "FIN_WAIT_2", 6, src, dst, true)
	srv.Close()
	expect(t, d, "TIME_WAIT", 6, src, dst, false)
}

// TestDiagSynSent has a connect() that nothing answers.
func TestDiagSynSent(t *testing.T) {
	d := newTestDiag(t)
	for i, far := range []string{"203.0.113.5:80", "[2001:db8::5]:80", "203.0.113.5:80", "203.0.113.5:81"} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		src := make(chan netip.AddrPort, 1)
		dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				var a unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{10, 98, 0, 1}}
				if i == 1 {
					a = &unix.SockaddrInet6{Addr: netip.MustParseAddr(tunAddr6).As16()}
				}
				if i == 3 {
					if err := unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "vsn0"); err != nil {
						t.Error(err)
					}
				}
				if err := unix.Bind(int(fd), a); err != nil {
					t.Error(err)
				}
				sa, _ := unix.Getsockname(int(fd))
				src <- addrPort(sa)
			})
		}}
		go func() {
			c, err := dialer.DialContext(ctx, "tcp", far)
			if err == nil {
				c.Close()
			}
			done <- err
		}()
		from, to := <-src, netip.MustParseAddrPort(far)
		expect(t, d, far+" in SYN_SENT", 6, from, to, true)
		if i == 3 {
			d.SetInterface(0)
			expect(t, d, "bound to the device, without its index", 6, from, to, false)
			d.SetInterface(tunIndex)
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("something answered")
		}
		expect(t, d, far+" given up", 6, from, to, false)
	}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// TestDiagDualStackTCP has an AF_INET6 socket that talks IPv4.
func TestDiagDualStackTCP(t *testing.T) {
	d := newTestDiag(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	dst := netip.MustParseAddrPort(l.Addr().String())
	if err := unix.Connect(s, &unix.SockaddrInet6{Addr: dst.Addr().As16(), Port: int(dst.Port())}); err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(s)
	src := addrPort(sa)
	if !src.Addr().Is4In6() {
		t.Fatal(src)
	}
	expect(t, d, "dual stack, as mapped", 6, src, netip.AddrPortFrom(netip.AddrFrom16(dst.Addr().As16()), dst.Port()), true)
	expect(t, d, "dual stack", 6, netip.AddrPortFrom(src.Addr().Unmap(), src.Port()), dst, true)
}

func TestDiagUDP(t *testing.T) {
	d := newTestDiag(t)
	far4, far6 := netip.MustParseAddrPort("203.0.113.9:6881"), netip.MustParseAddrPort("[2001:db8::9]:6881")
	for _, c := range []struct {
		name    string
		network string
		laddr   string
		connect string // "": unconnected
		ask4    bool   // found as the IPv4 socket of the TUN's address
		ask6    bool
	}{
		{"bound v4", "udp4", tunAddr4, "", true, false},
		{"bound v6", "udp6", tunAddr6, "", false, true},
		{"wildcard v4", "udp4", "0.0.0.0", "", true, false},
		{"wildcard v6 only", "udp6", "::", "", false, true},
		{"dual stack wildcard", "udp", "", "", true, true},
		{"mapped v4 bound", "udp", "::ffff:" + tunAddr4, "", true, false},
		{"connected v4", "udp4", "", far4.String(), true, false},
		{"connected v6", "udp6", "", far6.String(), false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openUDP(t, c.network, c.laddr, c.connect)
			port := uint16(s.LocalAddr().(*net.UDPAddr).Port)
			src4 := netip.AddrPortFrom(netip.MustParseAddr(tunAddr4), port)
			src6 := netip.AddrPortFrom(netip.MustParseAddr(tunAddr6), port)
			for _, q := range []struct {
				src, dst netip.AddrPort
				want     bool
			}{{src4, far4, c.ask4}, {src6, far6, c.ask6}, {src4, netip.AddrPort{}, c.ask4}, {src6, netip.AddrPort{}, c.ask6}} {
				if q.src == src4 && !q.dst.IsValid() && c.name == "wildcard v6 only" {
					q.want = true // a dump does not tell IPV6_V6ONLY: it errs on the side of "there"
				}
				expect(t, d, fmt.Sprintf("%s from %s to %s", c.name, q.src, q.dst), 17, q.src, q.dst, q.want)
			}
			expect(t, d, "another port", 17, netip.AddrPortFrom(src4.Addr(), port^1), far4, false)
			if c.connect == far4.String() {
				expect(t, d, "connected elsewhere", 17, src4, netip.MustParseAddrPort("203.0.113.10:1"), false)
			}
			s.Close()
			for _, dst := range []netip.AddrPort{far4, {}} {
				expect(t, d, "closed", 17, src4, dst, false)
			}
			expect(t, d, "closed", 17, src6, netip.AddrPort{}, false)
		})
	}
}

// openUDP opens a socket at laddr, or at any address if it is empty, and connects it unless connect is empty.
func openUDP(t *testing.T, network, laddr, connect string) *net.UDPConn {
	t.Helper()
	var la *net.UDPAddr
	if laddr != "" {
		la = &net.UDPAddr{IP: net.ParseIP(laddr)}
	}
	var s *net.UDPConn
	var err error
	if connect != "" {
		s, err = net.DialUDP(network, la, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(connect)))
	} else {
		s, err = net.ListenUDP(network, la)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDiagBoundToDevice(t *testing.T) {
	d := newTestDiag(t)
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "vsn0")
		})
		return errors.Join(cerr, err)
	}}
	s, err := lc.ListenPacket(t.Context(), "udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	src := netip.AddrPortFrom(netip.MustParseAddr(tunAddr4), uint16(s.LocalAddr().(*net.UDPAddr).Port))
	expect(t, d, "bound to the TUN", 17, src, netip.MustParseAddrPort("203.0.113.1:1"), true)
}

func TestDiagConcurrentAndClosed(t *testing.T) {
	fds := testkit.CountFiles(t)
	d := newTestDiag(t)
	l, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	here := netip.MustParseAddrPort(l.LocalAddr().String())
	gone := netip.AddrPortFrom(here.Addr(), here.Port()^1)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				expect(t, d, "open", 17, here, netip.AddrPort{}, true)
				expect(t, d, "not there", 17, gone, here, false)
				expect(t, d, "not there", 6, here, gone, false)
			}
		})
	}
	wg.Wait()
	l.Close()
	if _, err := d.Exists(1, here, gone); err == nil {
		t.Error("ICMP can be asked for")
	}
	if _, err := d.Exists(6, netip.AddrPort{}, gone); err == nil {
		t.Error("nothing can be asked for")
	}
	d.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.Exists(17, here, gone); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

func TestDiagFromFile(t *testing.T) {
	network(t)
	fd, err := openDiagSocket()
	if err != nil {
		t.Fatal(err)
	}
	fds := testkit.CountFiles(t)
	d, err := DiagFromFile(os.NewFile(uintptr(fd), "diag"))
	if err != nil {
		t.Fatal(err)
	}
	expect(t, d, "nothing", 6, netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2"), false)
	d.Close()
	if n := testkit.CountFiles(t); n != fds-1 {
		t.Errorf("%d open files, want %d", n, fds-1)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DiagFromFile(null); err == nil {
		t.Error("/dev/null is taken")
	}
}

// FuzzDiagParse: whatever came in, parse stays inside it.
func FuzzDiagParse(f *testing.F) {
	msg := make([]byte, nlHdrLen+diagMsgLen)
	msg[0], msg[4], msg[8] = byte(len(msg)), sockByFam, 1
	f.Add(msg, true)
	f.Add(msg[:20], false)
	f.Add(append(msg, 20, 0, 0, 0, unix.NLMSG_DONE, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff), true)
	f.Fuzz(func(t *testing.T, b []byte, dump bool) {
		d := &Diag{seq: 1}
		d.parse(b, dump, func(m *diagMsg) bool { return m.src().Port() == 7 && m.dst().IsValid() && m.state() == 1 })
	})
}

func BenchmarkDiag(b *testing.B) {
	d := newTestDiag(b)
	l, err := net.ListenUDP("udp4", nil)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	src := netip.AddrPortFrom(netip.MustParseAddr(tunAddr4), uint16(l.LocalAddr().(*net.UDPAddr).Port))
	dst := netip.MustParseAddrPort("203.0.113.1:1")
	gone := netip.AddrPortFrom(src.Addr(), src.Port()^1)
	for _, c := range []struct {
		name     string
		proto    uint8
		src, dst netip.AddrPort
	}{{"udp", 17, src, dst}, {"udp gone", 17, gone, dst}, {"udp gone, any destination", 17, gone, netip.AddrPort{}},
		{"tcp gone", 6, src, dst}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := d.Exists(c.proto, c.src, c.dst); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestDiagBoundUDP(t *testing.T) {
	d := newTestDiag(t)
	open := map[netip.AddrPort]bool{}
	var conns []net.PacketConn
	for _, at := range [][2]string{{"udp4", "127.0.0.1:0"}, {"udp4", ":0"}, {"udp6", "[::1]:0"}, {"udp", "[::]:0"}} {
		c, err := net.ListenPacket(at[0], at[1])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		open[netip.MustParseAddrPort(c.LocalAddr().String())] = true
	}
	c, err := net.Dial("udp4", tunAddr4+":9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	open[local(c)] = true
	list := func() map[netip.AddrPort]bool {
		all := map[netip.AddrPort]bool{}
		if err := d.BoundUDP(func(at netip.AddrPort) { all[at] = true }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	all := list()
	for at := range open {
		if !all[at] {
			t.Errorf("%v is not in %v", at, all)
		}
	}
	gone := netip.MustParseAddrPort(conns[0].LocalAddr().String())
	conns[0].Close()
	if list()[gone] {
		t.Errorf("%v is listed after it was closed", gone)
	}
	d.Close()
	if err := d.BoundUDP(func(netip.AddrPort) {}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("asked when closed: %v", err)
	}
}
