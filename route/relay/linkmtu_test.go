package relay

import (
	"bytes"
	"net/netip"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// inNamespace calls f on a thread in a network namespace of its own, whose lo has the given MTU. The thread ends with it.
func inNamespace(t *testing.T, mtu int, f func()) {
	t.Helper()
	skip := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: nobody else may run in this namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = loUp(mtu)
		}
		if err == nil {
			f()
		}
		skip <- err
	}()
	if err := <-skip; err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
}

func loUp(mtu int) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	var r struct {
		name [16]byte
		val  int32
		_    [20]byte
	}
	copy(r.name[:], "lo")
	for _, c := range []struct {
		req uintptr
		val int32
	}{{unix.SIOCSIFMTU, int32(mtu)}, {unix.SIOCSIFFLAGS, unix.IFF_UP | unix.IFF_RUNNING}} {
		r.val = c.val
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(s), c.req, uintptr(unsafe.Pointer(&r))); e != 0 {
			return e
		}
	}
	return nil
}

// TestSegmentsOverMTU: the kernel refuses UDP_SEGMENT for datagrams that do not fit the path's MTU. They go one by one, in
// fragments, and it is not tried again for that size; smaller ones still go in runs.
func TestSegmentsOverMTU(t *testing.T) {
	l := newLoop(t)
	var srv, fd int
	var at netip.AddrPort
	inNamespace(t, 1500, func() {
		srv = udpSocket(t, unix.AF_INET, netip.AddrPort{})
		if err := unix.Bind(srv, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		sa, _ := unix.Getsockname(srv)
		at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
		fd = udpSocket(t, unix.AF_INET, at)
	})
	defer unix.Close(srv)
	k := openLink(t, l, fd, testCodec{}, func([]flow.Packet) {})
	data := pattern(5000)
	dst := netip.MustParseAddrPort("192.0.2.1:1")
	var ps []flow.Packet
	for i := range 12 {
		n := 3000
		if i%6 == 5 {
			n = 2000
		}
		ps = append(ps, flow.Packet{Dst: dst, Payload: data[i : i+n]})
	}
	for range 3 {
		ps = append(ps, flow.Packet{Dst: dst, Payload: data[:1000]})
	}
	for range 2 {
		if n, err := k.Send(ps); n != len(ps) || err != nil {
			t.Fatalf("sent %d, %v, %+v", n, err, k.Stats())
		}
		buf := make([]byte, 1<<16)
		for i, p := range ps {
			var n int
			var e unix.Errno
			testkit.Until(testkit.Patience, func() bool { n, e = recv(srv, buf, 0); return e != unix.EAGAIN })
			if e != 0 || !bytes.Equal(buf[10:n], p.Payload) {
				t.Fatalf("datagram %d: %d bytes, %v", i, n, e)
			}
		}
	}
	// 3,010 was refused first, then 2,010 with a shorter one behind it; 1,010 was not.
	if k.seg != 2009 {
		t.Errorf("runs are allowed up to %d bytes", k.seg)
	}
	if st := k.Stats(); st.Sent != uint64(2*len(ps)) || st.SentBytes != 2*(10*3000+2*2000+3*1000) {
		t.Errorf("%+v", st)
	}
}

// FuzzDeliver: whatever the kernel says of sizes and whatever the relay sends, what is handed over lies within the message.
func FuzzDeliver(f *testing.F) {
	f.Add([]byte{}, int32(0))
	f.Add([]byte{0, 0, 0, 1, 192, 0, 2, 1, 0, 53, 'x'}, int32(0))
	f.Add(bytes.Repeat([]byte{0, 0, 0, 1, 192, 0, 2, 1, 0, 53, 'x'}, 3), int32(11))
	f.Add(bytes.Repeat([]byte{0, 0, 0, 4}, 30), int32(-1))
	f.Add(make([]byte, 300), int32(1))
	b := newRecvBuffers()
	f.Fuzz(func(t *testing.T, d []byte, seg int32) {
		if len(d) > recvBuf {
			return
		}
		copy(b.data, d)
		b.msgs[0].Len = uint32(len(d))
		b.msgs[0].Hdr.SetControllen(ctlLen)
		c := (*unix.Cmsghdr)(unsafe.Pointer(&b.ctl[0][0]))
		c.Level, c.Type = unix.IPPROTO_UDP, unix.UDP_GRO
		*(*int32)(unsafe.Pointer(&b.ctl[0][unix.SizeofCmsghdr])) = seg
		total := 0
		k := &link{codec: testCodec{}, sink: func(ps []flow.Packet) {
			for _, p := range ps {
				total += len(p.Payload)
				if !p.Src.IsValid() {
					t.Error("no source")
				}
			}
		}}
		if n, size := k.deliver(b, 1); n == 0 || size != len(d) || total > len(d) {
			t.Errorf("%d datagrams of %d bytes from %d", n, total, size)
		}
		k.codec = nil
		b.names[0].Family = unix.AF_INET
		total = 0
		k.deliver(b, 1)
		if total != len(d) {
			t.Errorf("direct: %d of %d bytes", total, len(d))
		}
	})
}
