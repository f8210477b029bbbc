package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// testCodec is SOCKS's header for addresses: RFC 1928 section 7.
type testCodec struct{}

var errHeader = errors.New("bad header")

func (testCodec) AppendHeader(b []byte, dst netip.AddrPort) []byte {
	if !dst.IsValid() {
		return b
	}
	b = append(b, 0, 0, 0)
	if a := dst.Addr(); a.Is4() {
		v := a.As4()
		b = append(append(b, 1), v[:]...)
	} else {
		v := a.As16()
		b = append(append(b, 4), v[:]...)
	}
	return binary.BigEndian.AppendUint16(b, dst.Port())
}

func (testCodec) ParseHeader(b []byte) (netip.AddrPort, int, error) {
	if len(b) < 10 || b[2] != 0 {
		return netip.AddrPort{}, 0, errHeader
	}
	n := 10
	if b[3] == 4 {
		n = 22
	} else if b[3] != 1 {
		return netip.AddrPort{}, 0, errHeader
	}
	if len(b) < n {
		return netip.AddrPort{}, 0, errHeader
	}
	a, _ := netip.AddrFromSlice(b[4 : n-2])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[n-2:])), n, nil
}

// lyingCodec claims a header longer than the datagram.
type lyingCodec struct{ testCodec }

func (lyingCodec) ParseHeader(b []byte) (netip.AddrPort, int, error) {
	return netip.MustParseAddrPort("192.0.2.1:1"), len(b) + 1, nil
}

func udpServer(t testing.TB, network, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenPacket(network, addr)
	if err != nil {
		t.Skipf("cannot listen on %s: %v", addr, err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	c.(*net.UDPConn).SetReadBuffer(4 << 20)
	return c.(*net.UDPConn)
}

// udpSocket is a socket of the family, connected to to if that is valid.
func udpSocket(t testing.TB, family int, to netip.AddrPort) int {
	t.Helper()
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if to.IsValid() {
		if family == unix.AF_INET {
			err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
		} else {
			err = unix.Connect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func addrOf(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// collector is a sink that copies.
type collector struct {
	mu   sync.Mutex
	got  []flow.Packet
	news chan struct{}
}

func newCollector() *collector { return &collector{news: make(chan struct{}, 1)} }

func (c *collector) sink(ps []flow.Packet) {
	c.mu.Lock()
	for _, p := range ps {
		p.Payload = bytes.Clone(p.Payload)
		c.got = append(c.got, p)
	}
	c.mu.Unlock()
	select {
	case c.news <- struct{}{}:
	default:
	}
}

func (c *collector) wait(t testing.TB, n int) []flow.Packet {
	t.Helper()
	late := time.After(testkit.Patience)
	for {
		c.mu.Lock()
		got := c.got
		c.mu.Unlock()
		if len(got) >= n {
			return got
		}
		select {
		case <-c.news:
		case <-late:
			t.Fatalf("%d of %d datagrams came", len(got), n)
		}
	}
}

func openLink(t testing.TB, l *Loop, fd int, codec Codec, sink func([]flow.Packet)) *link {
	t.Helper()
	k, err := l.OpenPackets(fd, codec, sink, func(err error) {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return k.(*link)
}

// TestLinkThroughRelay: mixed sizes and families go out whole, each with its own header, in order; the echo comes back with
// its source. With the kernel's segmentation and without.
func TestLinkThroughRelay(t *testing.T) {
	sizes := []int{100, 100, 100, 50, 0, 1, 1, 1200, 1200, 1200, 1200, 1200, 9000, 9000, 100, 100}
	dsts := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:6881"), netip.MustParseAddrPort("[2001:db8::1]:53"),
		netip.MustParseAddrPort("192.0.2.2:1")}
	for _, seg := range []int{maxUDP4, 0, 1000} {
		l := newLoop(t)
		srv := udpServer(t, "udp4", "127.0.0.1:0")
		c := newCollector()
		k := openLink(t, l, udpSocket(t, unix.AF_INET, addrOf(srv)), testCodec{}, c.sink)
		k.seg = seg
		var ps []flow.Packet
		data := pattern(70000)
		for i := range 400 {
			n := sizes[i%len(sizes)]
			ps = append(ps, flow.Packet{Dst: dsts[i/7%len(dsts)], Payload: data[i : i+n]})
		}
		buf := make([]byte, 1<<16)
		for i := 0; i < len(ps); i += 80 {
			part := ps[i : i+80]
			if n, err := k.Send(part); n != len(part) || err != nil {
				t.Fatalf("seg %d: sent %d: %v", seg, n, err)
			}
			for j := range part {
				n, from, err := srv.ReadFromUDPAddrPort(buf)
				if err != nil {
					t.Fatal(err)
				}
				dst, h, err := testCodec{}.ParseHeader(buf[:n])
				if err != nil || dst != part[j].Dst || !bytes.Equal(buf[h:n], part[j].Payload) {
					t.Fatalf("seg %d: datagram %d: %d bytes to %v, %v", seg, i+j, n, dst, err)
				}
				srv.WriteToUDPAddrPort(buf[:n], from)
			}
			got := c.wait(t, i+80)
			for j := range part {
				if g := got[i+j]; g.Src != part[j].Dst || !bytes.Equal(g.Payload, part[j].Payload) || g.Dst.IsValid() {
					t.Fatalf("back: datagram %d: %d bytes from %v", i+j, len(g.Payload), g.Src)
				}
			}
		}
		st := k.Stats()
		if st.Sent != 400 || st.Received != 400 || st.SentBytes != st.ReceivedBytes ||
			st.Full+st.TooLarge+st.Unsendable+st.Malformed != 0 {
			t.Errorf("%+v", st)
		}
		if seg == 1000 && k.seg != 1000 || seg == maxUDP4 && k.seg != maxUDP4 {
			t.Errorf("UDP_SEGMENT was refused: %d", k.seg)
		}
	}
}

// TestGROIsSplit: one super-datagram from the far end arrives as its segments.
func TestGROIsSplit(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	c := newCollector()
	fd := udpSocket(t, unix.AF_INET, addrOf(srv))
	sa, _ := unix.Getsockname(fd)
	k := openLink(t, l, fd, testCodec{}, c.sink)
	src := netip.MustParseAddrPort("192.0.2.1:6881")
	var run []byte
	const segments, size = 40, 500
	for i := range segments {
		at := len(run)
		run = testCodec{}.AppendHeader(run, src)
		n := size
		if i == segments-1 {
			n = 77
		}
		for len(run) < at+n {
			run = append(run, byte(i))
		}
	}
	raw, _ := srv.SyscallConn()
	raw.Control(func(s uintptr) {
		oob := make([]byte, unix.CmsgSpace(2))
		h := unix.Cmsghdr{Level: unix.IPPROTO_UDP, Type: unix.UDP_SEGMENT}
		h.SetLen(unix.CmsgLen(2))
		binary.NativeEndian.PutUint64(oob, h.Len)
		binary.NativeEndian.PutUint32(oob[8:], uint32(h.Level))
		binary.NativeEndian.PutUint32(oob[12:], uint32(h.Type))
		binary.NativeEndian.PutUint16(oob[16:], size)
		if err := unix.Sendmsg(int(s), run, oob, sa, 0); err != nil {
			t.Fatal(err)
		}
	})
	for i, p := range c.wait(t, segments) {
		want := size - 10
		if i == segments-1 {
			want = 67
		}
		if p.Src != src || len(p.Payload) != want || p.Payload[0] != byte(i) {
			t.Errorf("segment %d: %d bytes from %v", i, len(p.Payload), p.Src)
		}
	}
	if st := k.Stats(); st.Received != segments {
		t.Errorf("%+v", st)
	}
}

// TestLinkSizes: DESIGN.md 6, to the byte.
func TestLinkSizes(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("[2001:db8::1]:1")
	for _, c := range []struct {
		network, addr string
		family        int
		dst           netip.AddrPort
		limit         int
	}{
		{"udp4", "127.0.0.1:0", unix.AF_INET, v4, 65497},
		{"udp4", "127.0.0.1:0", unix.AF_INET, v6, 65485},
		{"udp6", "[::1]:0", unix.AF_INET6, v4, 65517},
		{"udp6", "[::1]:0", unix.AF_INET6, v6, 65505},
	} {
		l := newLoop(t)
		srv := udpServer(t, c.network, c.addr)
		got := newCollector()
		k := openLink(t, l, udpSocket(t, c.family, addrOf(srv)), testCodec{}, got.sink)
		data := pattern(c.limit + 1)
		if n, _ := k.Send([]flow.Packet{{Dst: c.dst, Payload: data}, {Dst: c.dst, Payload: data[:c.limit]}}); n != 1 {
			t.Errorf("%v by %s: %d sent, %+v", c.dst, c.network, n, k.Stats())
			continue
		}
		buf := make([]byte, 1<<16)
		n, from, err := srv.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		srv.WriteToUDPAddrPort(buf[:n], from)
		if p := got.wait(t, 1)[0]; !bytes.Equal(p.Payload, data[:c.limit]) {
			t.Errorf("%d bytes came back", len(p.Payload))
		}
		if st := k.Stats(); st.TooLarge != 1 {
			t.Errorf("%+v", st)
		}
	}
}

// TestLinkDirect: without a codec, by a dual-stack socket, to several destinations; each answers for itself.
func TestLinkDirect(t *testing.T) {
	l := newLoop(t)
	a, b, c6 := udpServer(t, "udp4", "127.0.0.1:0"), udpServer(t, "udp4", "127.0.0.2:0"), udpServer(t, "udp6", "[::1]:0")
	srvs := []*net.UDPConn{a, b, c6}
	got := newCollector()
	fd := udpSocket(t, unix.AF_INET6, netip.AddrPort{})
	unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	k := openLink(t, l, fd, nil, got.sink)
	var ps []flow.Packet
	for i := range 60 {
		ps = append(ps, flow.Packet{Dst: addrOf(srvs[i/5%3]), Payload: bytes.Repeat([]byte{byte(i)}, 100)})
	}
	ps = append(ps, flow.Packet{Dst: addrOf(a)}) // an empty datagram is one too
	if n, err := k.Send(ps); n != len(ps) || err != nil {
		t.Fatalf("sent %d, %v, %+v", n, err, k.Stats())
	}
	buf := make([]byte, 1000)
	for i, p := range ps {
		s := srvs[i/5%3]
		n, from, err := s.ReadFromUDPAddrPort(buf)
		if err != nil || !bytes.Equal(buf[:n], p.Payload) {
			t.Fatalf("datagram %d: %d bytes, %v", i, n, err)
		}
		s.WriteToUDPAddrPort(buf[:n], from)
	}
	count := map[netip.AddrPort]int{}
	for _, p := range got.wait(t, len(ps)) {
		count[p.Src]++
		if len(p.Payload) > 0 && p.Src != ps[p.Payload[0]].Dst {
			t.Errorf("datagram %d came from %v", p.Payload[0], p.Src)
		}
	}
	if count[addrOf(a)] != 21 || count[addrOf(b)] != 20 || count[addrOf(c6)] != 20 {
		t.Errorf("sources: %v", count)
	}
}

// TestLinkDirectWrongFamily: an IPv4 socket cannot reach IPv6, and says so in a counter.
func TestLinkDirectWrongFamily(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	k := openLink(t, l, udpSocket(t, unix.AF_INET, netip.AddrPort{}), nil, newCollector().sink)
	n, err := k.Send([]flow.Packet{{Dst: netip.MustParseAddrPort("[::1]:9"), Payload: []byte("x")}, {},
		{Dst: addrOf(srv), Payload: []byte("x")}})
	if n != 1 || err != nil || k.Stats().Unsendable != 2 {
		t.Errorf("sent %d, %v, %+v", n, err, k.Stats())
	}
}

// TestLinkHostile: bad headers are dropped and counted, strangers are not heard, and what is good between them comes.
func TestLinkHostile(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	stranger := udpServer(t, "udp4", "127.0.0.1:0")
	c := newCollector()
	fd := udpSocket(t, unix.AF_INET, addrOf(srv))
	sa, _ := unix.Getsockname(fd)
	me := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(sa.(*unix.SockaddrInet4).Port))
	k := openLink(t, l, fd, testCodec{}, c.sink)
	good := append(testCodec{}.AppendHeader(nil, netip.MustParseAddrPort("192.0.2.1:1")), "good"...)
	stranger.WriteToUDPAddrPort(good, me)
	for _, d := range [][]byte{{}, {0}, make([]byte, 9), {0, 0, 1, 1, 1, 2, 3, 4, 5, 6}, {0, 0, 0, 9, 1, 2, 3, 4, 5, 6},
		{0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7}} {
		srv.WriteToUDPAddrPort(d, me)
	}
	srv.WriteToUDPAddrPort(good, me)
	if got := c.wait(t, 1); string(got[0].Payload) != "good" {
		t.Errorf("%q", got[0].Payload)
	}
	if st := k.Stats(); st.Malformed != 6 || st.Received != 1 {
		t.Errorf("%+v", st)
	}
	// A codec that claims more than there is.
	fd = udpSocket(t, unix.AF_INET, addrOf(srv))
	sa, _ = unix.Getsockname(fd)
	k = openLink(t, l, fd, lyingCodec{}, c.sink)
	srv.WriteToUDPAddrPort(good, netip.AddrPortFrom(me.Addr(), uint16(sa.(*unix.SockaddrInet4).Port)))
	if !testkit.Until(testkit.Patience, func() bool { return k.Stats().Malformed == 1 }) {
		t.Fatalf("%+v", k.Stats())
	}
}

// TestLinkICMP: the relay's port is closed for a while; the link goes on when it is back.
func TestLinkICMP(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	at := addrOf(srv)
	srv.Close()
	c := newCollector()
	k := openLink(t, l, udpSocket(t, unix.AF_INET, at), testCodec{}, c.sink)
	p := []flow.Packet{{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: []byte("x")}}
	for range 20 {
		k.Send(p)
	}
	if !testkit.Until(testkit.Patience, func() bool { return k.Stats().Unreachable != 0 }) {
		t.Fatalf("%+v", k.Stats())
	}
	testkit.Settle(10*time.Millisecond, "the ICMP errors of the others have come")
	srv = udpServer(t, "udp4", at.String())
	if n, err := k.Send(p); n != 1 || err != nil {
		t.Errorf("sent %d, %v", n, err)
	}
	buf := make([]byte, 100)
	n, from, err := srv.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	srv.WriteToUDPAddrPort(buf[:n], from)
	c.wait(t, 1)
}

// TestLinkFull: a full socket drops and counts, and does not block.
func TestLinkFull(t *testing.T) {
	l := newLoop(t)
	// A UDP socket over loopback is never full for long: what it sends is at once in the receiver. A unix socket is.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	k := openLink(t, l, pair[0], testCodec{}, newCollector().sink)
	k.seg = 0
	ps := make([]flow.Packet, 2000)
	for i := range ps {
		ps[i] = flow.Packet{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: make([]byte, 100)}
	}
	n, err := k.Send(ps)
	if st := k.Stats(); err != nil || n == 0 || n == len(ps) || st.Full != uint64(len(ps)-n) {
		t.Errorf("sent %d, %v, %+v", n, err, st)
	}
}

// TestLinkClose: Close races with Send and with datagrams; no call fails otherwise than by ErrClosed, and closed is not told.
func TestLinkClose(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	for range 50 {
		k, err := l.OpenPackets(udpSocket(t, unix.AF_INET, addrOf(srv)), testCodec{}, func([]flow.Packet) {},
			func(err error) { t.Errorf("closed: %v", err) })
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() {
			p := []flow.Packet{{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: []byte("x")}}
			for {
				if _, err := k.Send(p); err != nil {
					ended <- err
					return
				}
			}
		}()
		testkit.Settle(100*time.Microsecond, "the other goroutine sends")
		k.Close()
		k.Close()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
}

// TestLinkOfClosedLoop: the loop's end closes links and tells, once; a later OpenPackets fails and closes its socket.
func TestLinkOfClosedLoop(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	var told []error
	k, err := l.OpenPackets(udpSocket(t, unix.AF_INET, netip.AddrPort{}), nil, func([]flow.Packet) {},
		func(err error) { told = append(told, err) })
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	k.Close()
	if len(told) != 1 || !errors.Is(told[0], ErrClosed) {
		t.Errorf("told %v", told)
	}
	if _, err := k.Send([]flow.Packet{{}}); !errors.Is(err, ErrClosed) {
		t.Errorf("Send: %v", err)
	}
	if _, err := l.OpenPackets(udpSocket(t, unix.AF_INET, netip.AddrPort{}), nil, nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("OpenPackets: %v", err)
	}
}
