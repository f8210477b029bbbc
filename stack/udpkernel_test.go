package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// What is assumed of the kernel, tried on it: a real TUN in a network namespace that the test makes, real sockets, and
// the whole Stack.

const inKernelTest = "VIASOCKS_STACK_KERNEL_TEST"

// reenter runs the test again in a network namespace of its own, without root in a user namespace as well. It returns
// true in there, and false outside once it is over.
func reenter(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inKernelTest) == t.Name() {
		// The runtime's poller has two file descriptors that stay: they must be there before leaks are counted.
		if r, w, err := os.Pipe(); err == nil {
			r.Close()
			w.Close()
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inKernelTest+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		t.Skipf("cannot make a network namespace: %v", err)
	case err != nil:
		t.Fatalf("in the namespace: %v\n%s", err, out)
	case bytes.Contains(out, []byte("\n--- SKIP: "+t.Name())):
		t.Skipf("in the namespace:\n%s", out)
	default:
		t.Logf("in the namespace:\n%s", out)
	}
	return false
}

// openTUN makes the TUN of the namespace that the test is in.
func openTUN(t *testing.T, mode tun.Mode) tun.Device {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("cannot open /dev/net/tun: %v", err)
	}
	ifr, err := unix.NewIfreq("vs%d")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		t.Skipf("cannot make a TUN device: %v", err)
	}
	name := ifr.Name()
	dev, err := tun.FromFiles([]*os.File{os.NewFile(uintptr(fd), "/dev/net/tun")}, tun.Options{MTU: 1500, Offload: mode})
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"link set lo up", "link set " + name + " up mtu 1500",
		"addr add " + app4.Addr().String() + "/32 dev " + name, "addr add " + app6.Addr().String() + "/128 dev " + name +
			" nodad",
		"route add default dev " + name, "-6 route add default dev " + name,
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			dev.Close()
			t.Skipf("cannot set up the TUN: ip %s: %v: %s", args, err, out)
		}
	}
	// The kernel makes the route to an IPv6 address of its own later, from a work queue, also without DAD: until then
	// what arrives for it is not local.
	testkit.Eventually(t, "the IPv6 address", func() bool {
		out, _ := exec.Command("ip", "-6", "route", "show", "table", "local").Output()
		return bytes.Contains(out, []byte("local "+app6.Addr().String()))
	})
	return dev
}

// kernelStack is a Stack of ours on a real TUN.
func kernelStack(t *testing.T, mode tun.Mode, f func(flow.PacketWriter, []flow.Packet)) (*Stack, *udpHandler) {
	t.Helper()
	testkit.CheckLeaks(t)
	dev := openTUN(t, mode)
	h := &udpHandler{f: f}
	s, err := New(Config{Device: dev, Handler: h})
	if err != nil {
		t.Fatal(err)
	}
	h.w = s.PacketWriter(0)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, h
}

// dialUDP is a connected socket that can hold a burst.
func dialUDP(t *testing.T, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetReadBuffer(4 << 20)
	_ = c.SetDeadline(time.Now().Add(2 * testkit.Patience))
	return c
}

func setOption(t *testing.T, c *net.UDPConn, level, opt, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, value) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
}

var kernelModes = []tun.Mode{tun.OffloadFull, tun.OffloadNoUSO, tun.OffloadOff}

// One frame of 65,507 bytes (65,527 over IPv6) is taken at MTU 1500 and delivered to a local socket; what the app
// sends in fragments comes whole.
func TestKernelUDPSizes(t *testing.T) {
	if !reenter(t) {
		return
	}
	for _, mode := range kernelModes {
		for _, to := range []netip.AddrPort{far4, far6} {
			t.Run(fmt.Sprintf("%v/%v", mode, to.Addr()), func(t *testing.T) {
				s, _ := kernelStack(t, mode, echoUDP)
				c := dialUDP(t, to)
				most := 65507
				if to == far6 {
					most = 65527
				}
				sizes := []int{0, 1, 1452, 1453, 1472, 1473, 1474, 2953, 9000, most}
				b := make([]byte, 1<<16)
				for _, n := range sizes {
					if _, err := c.Write(fill(n)); err != nil {
						t.Fatalf("%d: %v", n, err)
					}
					m, err := c.Read(b)
					if err != nil || !bytes.Equal(b[:m], fill(n)) {
						t.Fatalf("%d: %d bytes: %v; %+v", n, m, err, s.Stats().UDP)
					}
				}
				testkit.Eventually(t, "the counters", func() bool {
					st := s.Stats().UDP
					return st.In == uint64(len(sizes)) && st.Out == st.In && st.InReassembled >= 4
				})
			})
		}
	}
}

// A super-frame that we write arrives as its datagrams, and one that the app sends with UDP_SEGMENT is split here.
func TestKernelUDPSuperFrames(t *testing.T) {
	if !reenter(t) {
		return
	}
	for _, mode := range kernelModes {
		for _, to := range []netip.AddrPort{far4, far6} {
			t.Run(fmt.Sprintf("%v/%v", mode, to.Addr()), func(t *testing.T) {
				s, _ := kernelStack(t, mode, echoUDP)
				c := dialUDP(t, to)
				const size, count = 1200, 50
				setOption(t, c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) // Linux 4.18
				want := fill(size*count - 300)
				if _, err := c.Write(want); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 1<<16)
				for i := range count {
					n, err := c.Read(b)
					if err != nil {
						t.Fatalf("datagram %d: %v; %+v", i, err, s.Stats().UDP)
					}
					if part := want[i*size : min((i+1)*size, len(want))]; !bytes.Equal(b[:n], part) {
						t.Fatalf("datagram %d has %d bytes, want %d", i, n, len(part))
					}
				}
				testkit.Eventually(t, "the counters", func() bool { return s.Stats().UDP.Out == count })
				st := s.Stats().UDP
				if uso := s.dev.Offload()&tun.USO != 0; uso != (st.InSuper == 1) || uso != (st.OutSuper > 0) || st.In != count {
					t.Errorf("USO %v: %+v", uso, st)
				}
			})
		}
	}
}

// The longest super-frame: maxSegments datagrams. More than the kernel's own senders make are taken on receipt, too,
// but what we write stays within their bound.
func TestKernelUDPManySegments(t *testing.T) {
	if !reenter(t) {
		return
	}
	s, _ := kernelStack(t, tun.OffloadFull, func(w flow.PacketWriter, ps []flow.Packet) {
		_, _ = w.WritePackets(repeat(300, 100, ps[0].Dst, ps[0].Src))
	})
	if s.dev.Offload()&tun.USO == 0 {
		t.Skip("the kernel has no USO (Linux 6.2)")
	}
	c := dialUDP(t, far4)
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 200)
	for i := range 300 {
		if n, err := c.Read(b); err != nil || n != 100 {
			t.Fatalf("datagram %d: %d bytes: %v", i, n, err)
		}
	}
	testkit.Eventually(t, "the counters", func() bool { return s.Stats().UDP.OutSuper == 3 })
}

// Each refusal as the errno of a connected socket.
func TestKernelUDPRefused(t *testing.T) {
	if !reenter(t) {
		return
	}
	for _, c := range []struct {
		why    flow.Refusal
		v4, v6 unix.Errno
	}{
		{flow.RefuseReset, unix.ECONNREFUSED, unix.ECONNREFUSED},
		{flow.RefusePort, unix.ECONNREFUSED, unix.ECONNREFUSED},
		// Net and host unreachable are no hard errors for UDP; IP_RECVERR asks for them all the same.
		{flow.RefuseNet, unix.ENETUNREACH, unix.ENETUNREACH},
		{flow.RefuseHost, unix.EHOSTUNREACH, unix.EHOSTUNREACH},
		{flow.RefuseAdmin, unix.EHOSTUNREACH, unix.EACCES},
	} {
		for _, to := range []netip.AddrPort{far4, far6} {
			for _, n := range []int{10, 5000} { // whole, and in fragments
				t.Run(fmt.Sprintf("%v/%v/%d", c.why, to.Addr(), n), func(t *testing.T) {
					s, _ := kernelStack(
						t,
						tun.OffloadFull,
						func(w flow.PacketWriter, ps []flow.Packet) { w.Refuse(ps[0], c.why) },
					)
					conn := dialUDP(t, to)
					level, opt, want := unix.IPPROTO_IP, unix.IP_RECVERR, c.v4
					if to == far6 {
						level, opt, want = unix.IPPROTO_IPV6, unix.IPV6_RECVERR, c.v6
					}
					setOption(t, conn, level, opt, 1)
					if _, err := conn.Write(fill(n)); err != nil {
						t.Fatal(err)
					}
					if _, err := conn.Read(make([]byte, 10)); !errors.Is(err, want) {
						t.Errorf("%v, want %v; %+v", err, want, s.Stats().UDP)
					}
				})
			}
		}
	}
}

// Multicast and broadcast of a real socket come to nobody; a stranger's datagram has its true source; a closed socket is
// told by the kernel.
func TestKernelUDPRules(t *testing.T) {
	if !reenter(t) {
		return
	}
	stranger := addr("198.51.100.77:4444")
	hold := make(chan struct{}, 1)
	s, h := kernelStack(t, tun.OffloadFull, func(w flow.PacketWriter, ps []flow.Packet) {
		for _, p := range ps {
			if p.Dst != far4 {
				t.Errorf("handed on: %v", p.Dst)
			}
			<-hold
			_, _ = w.WritePackets([]flow.Packet{{Src: stranger, Dst: p.Src, Payload: []byte("hello")}})
		}
	})
	c, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	setOption(t, c, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	for _, to := range []string{"239.192.152.143:6771", "255.255.255.255:6771", "224.0.0.251:5353", "239.255.255.250:1900"} {
		if _, err := c.WriteToUDPAddrPort(fill(3000), addr(to)); err != nil { // fragments as well
			t.Fatalf("%s: %v", to, err)
		}
		if _, err := c.WriteToUDPAddrPort([]byte("x"), addr(to)); err != nil {
			t.Fatalf("%s: %v", to, err)
		}
	}
	if _, err := c.WriteToUDPAddrPort([]byte("x"), far4); err != nil {
		t.Fatal(err)
	}
	hold <- struct{}{}
	_ = c.SetDeadline(time.Now().Add(2 * testkit.Patience))
	b := make([]byte, 100)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "hello" || from != stranger {
		t.Fatalf("%q from %v: %v", b[:n], from, err)
	}
	if st := s.Stats().UDP; st.DroppedMulticast < 4 || st.In != 1 {
		t.Errorf("%+v", st)
	}
	if _, err := c.WriteToUDPAddrPort([]byte("x"), far4); err != nil {
		t.Fatal(err)
	}
	app := netip.AddrPortFrom(app4.Addr(), c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	testkit.Eventually(t, "the datagram", func() bool { return s.Stats().UDP.In == 2 })
	c.Close()
	hold <- struct{}{}
	testkit.Eventually(t, "port unreachable", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return slices.Equal(h.gone, []netip.AddrPort{app, stranger})
	})
}
