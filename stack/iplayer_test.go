package stack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// ipWork counts what an ipEndpoint leaves to gVisor's endpoint.
type ipWork struct {
	gstack.NetworkEndpoint
	gstack.AddressableEndpoint
	packets, lookups atomic.Int64
}

func (w *ipWork) HandlePacket(pkt *gstack.PacketBuffer) {
	w.packets.Add(1)
	w.NetworkEndpoint.HandlePacket(pkt)
}

func (w *ipWork) AcquireAssignedAddress(
	a tcpip.Address, temp bool, b gstack.PrimaryEndpointBehavior, readOnly bool,
) gstack.AddressEndpoint {
	w.lookups.Add(1)
	return w.AddressableEndpoint.AcquireAssignedAddress(a, temp, b, readOnly)
}

// holds reports whether gVisor's own table has an entry for a.
func (w *ipWork) holds(a netip.Addr) bool {
	return w.AddressableEndpoint.AcquireAssignedAddress(addrTo(a), false, gstack.NeverPrimaryEndpoint, true) != nil
}

// watchIP counts from here on. No frame may be under way.
func watchIP(t *testing.T, ns *gstack.Stack, proto tcpip.NetworkProtocolNumber) *ipWork {
	ep, err := ns.GetNetworkEndpoint(nicID, proto)
	if err != nil {
		t.Fatal(err)
	}
	e := ep.(*ipEndpoint)
	w := &ipWork{NetworkEndpoint: e.NetworkEndpoint, AddressableEndpoint: e.AddressableEndpoint}
	e.NetworkEndpoint, e.AddressableEndpoint = w, w
	return w
}

// What a packet costs does not depend on the number of peers: neither a new connection nor a segment asks gVisor's table of
// addresses, which stays empty.
func TestPeersCostNothing(t *testing.T) {
	for _, c := range []struct {
		proto tcpip.NetworkProtocolNumber
		app   netip.Addr
		peer  func(i byte) netip.Addr
	}{
		{ipv4.ProtocolNumber, appIP4, func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, i}) }},
		{ipv6.ProtocolNumber, appIP6, func(i byte) netip.Addr { return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: i}) }},
	} {
		t.Run(fmt.Sprintf("%#x", c.proto), func(t *testing.T) {
			p := newPair(t, offAll, Config{Shards: 1})
			w := watchIP(t, p.st.shards[0].engine.Load().ns, c.proto)
			const peers = 100
			var apps []*gonet.TCPConn
			var ups []*testConn
			for i := range byte(peers) {
				app, up := p.connect(netip.AddrPortFrom(c.peer(i+1), 80))
				apps, ups = append(apps, app), append(ups, up)
			}
			b := make([]byte, 1)
			for i := range apps {
				if _, err := apps[i].Write(b); err != nil {
					t.Fatal(err)
				}
				if _, err := ups[i].Read(b); err != nil {
					t.Fatal(err)
				}
				if w.holds(c.peer(byte(i + 1))) {
					t.Fatalf("gVisor's table holds the peer %v", c.peer(byte(i+1)))
				}
			}
			if w.holds(c.app) {
				t.Error("gVisor's table holds the program's address")
			}
			for i := range ups {
				ups[i].st.Close()
				if _, err := apps[i].Read(b); err == nil {
					t.Fatal("the app read from a connection that was closed")
				}
			}
			if packets, lookups := w.packets.Load(), w.lookups.Load(); packets != 0 || lookups != 0 {
				t.Errorf(
					"%d packets and %d lookups of addresses went to gVisor's endpoint, for %d connections and as many writes",
					packets,
					lookups,
					peers,
				)
			}
		})
	}
}

// A SYN with an option or an extension header, and one in fragments, is a request like any other, and gVisor's endpoint, which
// reads it, keeps no address.
func TestRareSegments(t *testing.T) {
	for name, c := range rareSYNs() {
		t.Run(name, func(t *testing.T) {
			r := newRawOver(t, offAll, Config{Shards: 1})
			proto, src, dst := ipv4.ProtocolNumber, netip.AddrPortFrom(appIP4, 1234), srv4
			if c.frames[0][0]>>4 == 6 {
				proto, src, dst = ipv6.ProtocolNumber, netip.AddrPortFrom(appIP6, 1234), srv6
			}
			w := watchIP(t, r.s.shards[0].engine.Load().ns, proto)
			for _, f := range c.frames {
				r.send(tun.Header{}, f)
			}
			req := r.request()
			if f := req.Flow(); f.Src != src || f.Dst != dst {
				t.Errorf("a request of %v for %v", f.Src, f.Dst)
			}
			up := newTestConn()
			req.Accept(up)
			_, b := r.recv(testkit.Patience)
			if b == nil {
				t.Fatal("no SYN-ACK")
			}
			seg := header.TCP(b[ip4HeaderLen:])
			if proto == ipv6.ProtocolNumber {
				seg = b[ip6HeaderLen:]
			}
			if seg.Flags() != header.TCPFlagSyn|header.TCPFlagAck || seg.AckNumber() != 1001 {
				t.Errorf("flags %v, acknowledged %d", seg.Flags(), seg.AckNumber())
			}
			if n := w.packets.Load(); n != int64(len(c.frames)) {
				t.Errorf("gVisor's endpoint got %d packets of %d", n, len(c.frames))
			}
			if w.holds(src.Addr()) || w.holds(dst.Addr()) {
				t.Error("gVisor's table kept an address")
			}
			r.send(tun.Header{}, segment(src, dst, 1001, 0, header.TCPFlagRst, nil, nil))
			if up.opened() == nil {
				t.Error("the connection opened without an ACK")
			}
		})
	}
}

type rareSYN struct{ frames [][]byte }

// rareSYNs are SYNs of sequence number 1000 from port 1234 that have more than the IP header of a plain one.
func rareSYNs() map[string]rareSYN {
	syn4 := segment(netip.AddrPortFrom(appIP4, 1234), srv4, 1000, 0, header.TCPFlagSyn, nil, nil)
	syn6 := segment(netip.AddrPortFrom(appIP6, 1234), srv6, 1000, 0, header.TCPFlagSyn, nil, nil)
	sum4 := func(b []byte) []byte {
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		hdr := b[:int(b[0]&0xf)*4]
		hdr[10], hdr[11] = 0, 0
		binary.BigEndian.PutUint16(hdr[10:], ^checksum.Checksum(hdr, 0))
		return b
	}
	options := slices.Concat(syn4[:20], []byte{1, 1, 1, 0}, syn4[20:])
	options[0] = 0x46
	// The first fragment has 16 bytes of the TCP header, which ends in the second.
	first, second := slices.Clone(syn4[:36]), slices.Concat(syn4[:20], syn4[36:])
	first[6], first[7], second[6], second[7] = 0x20, 0, 0, 2
	part6 := func(from, to int, off uint16) []byte {
		b := slices.Concat(syn6[:40], []byte{protoTCP, 0, byte(off >> 8), byte(off), 0, 0, 0, 7}, syn6[40+from:40+to])
		b[6] = protoFragment
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		return b
	}
	return map[string]rareSYN{
		"an IPv4 option":      {[][]byte{sum4(options)}},
		"IPv4 fragments":      {[][]byte{sum4(first), sum4(second)}},
		"destination options": {[][]byte{withExt(syn6, protoDestOpts, protoTCP, 0, 1, 4, 0, 0, 0, 0)}},
		"IPv6 fragments":      {[][]byte{part6(0, 16, 1), part6(16, len(syn6)-40, 16)}},
	}
}

// ipRecorder is the transport layer, for FuzzIPLayer: it writes down what comes.
type ipRecorder struct {
	gstack.NetworkProtocol
	got *[]string
}

type ipRecorderUp struct {
	gstack.TransportDispatcher
	got *[]string
}

func (p ipRecorder) NewEndpoint(nic gstack.NetworkInterface, up gstack.TransportDispatcher) gstack.NetworkEndpoint {
	return p.NetworkProtocol.NewEndpoint(nic, ipRecorderUp{up, p.got})
}

func (u ipRecorderUp) DeliverTransportPacket(
	proto tcpip.TransportProtocolNumber, pkt *gstack.PacketBuffer,
) gstack.TransportPacketDisposition {
	*u.got = append(*u.got, fmt.Sprintf("NIC %d, %#x/%d/%d, IP % x, transport % x, data % x",
		pkt.NICID, pkt.NetworkProtocolNumber, proto, pkt.TransportProtocolNumber,
		pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice(), pkt.Data().AsRange().ToSlice()))
	return gstack.TransportPacketHandled
}

// recordedIP is a stack whose IP layer is made by wrap. deliver gives it a frame and returns what the transport layer got.
func recordedIP(
	f *testing.F, wrap func(gstack.NetworkProtocolFactory) gstack.NetworkProtocolFactory,
) (deliver func(b []byte, verified bool) []string) {
	var got []string
	record := func(p gstack.NetworkProtocolFactory) gstack.NetworkProtocolFactory {
		return func(s *gstack.Stack) gstack.NetworkProtocol { return ipRecorder{wrap(p)(s), &got} }
	}
	dev, _ := tuntest.Pipe(1500, offAll)
	l := newLink(&shard{dev: dev})
	ns := gstack.New(gstack.Options{
		NetworkProtocols:   []gstack.NetworkProtocolFactory{record(ipv4.NewProtocol), record(ipv6.NewProtocol)},
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := configure(ns, l); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { dev.Close(); ns.Destroy() })
	return func(b []byte, verified bool) []string {
		got = nil
		proto := header.IPv4ProtocolNumber
		if b[0]>>4 == 6 {
			proto = header.IPv6ProtocolNumber
		}
		pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: buffer.MakeWithData(slices.Clone(b))})
		defer pkt.DecRef()
		l.verified.Store(verified)
		l.disp.DeliverNetworkPacket(proto, pkt)
		return got
	}
}

// FuzzIPLayer: of every frame that the frame reader lets through, the transport layer gets the same from our IP layer as
// from gVisor's.
func FuzzIPLayer(f *testing.F) {
	s4, s6 := netip.AddrPortFrom(appIP4, 1), netip.AddrPortFrom(appIP6, 1)
	opts := []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7}
	for _, b := range [][]byte{
		segment(s4, srv4, 1, 0, header.TCPFlagSyn, opts, nil),
		segment(s6, srv6, 1, 0, header.TCPFlagSyn, opts, nil),
		segment(s4, srv4, 1, 1, header.TCPFlagAck, nil, make([]byte, 100)),
		segment(s6, srv6, 1, 1, header.TCPFlagAck, nil, make([]byte, 100)),
	} {
		for _, verified := range []bool{false, true} {
			f.Add(b, verified)
			f.Add(append(slices.Clone(b), 1, 2, 3), verified) // the frame is longer than the packet
			for i := range min(len(b), 60) {                  // each byte of the headers
				for _, x := range []byte{1, 0x20, 0x80, 0xff} {
					c := slices.Clone(b)
					c[i] ^= x
					f.Add(c, verified)
				}
			}
		}
	}
	for _, c := range rareSYNs() {
		for _, b := range c.frames {
			f.Add(b, false)
		}
	}
	l := newLink(lone())
	ours := recordedIP(f, l.overIP)
	theirs := recordedIP(f, func(p gstack.NetworkProtocolFactory) gstack.NetworkProtocolFactory { return p })
	f.Fuzz(func(t *testing.T, b []byte, verified bool) {
		if len(b) > tun.MaxFrame {
			return
		}
		v, hdr := inspectFrame(&tun.Header{}, b)
		if v != toGVisor {
			return
		}
		p, _ := parseIP(b)
		l.plain = p.plainEnd(hdr)
		if got, want := ours(b, verified), theirs(b, verified); !slices.Equal(got, want) {
			t.Errorf("of % x the transport layer got\n%q, and from gVisor's IP\n%q", b, got, want)
		}
	})
}

// writeCase is a segment that the transport layer sends.
type writeCase struct {
	name string
	size int
	gso  bool
	p    gstack.NetworkHeaderParams
}

// TestWritePacket: of every segment that the transport layer sends, the device gets the same from our IP layer as from gVisor's,
// but for the IPv4 ID of what may be cut, which is random.
func TestWritePacket(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, c := range []writeCase{
			{"a segment", 100, false, gstack.NetworkHeaderParams{TTL: 64, DF: true}},
			{"TOS, and no DF", 0, false, gstack.NetworkHeaderParams{TTL: 7, TOS: 0x48}},
			{"a super-segment", 60_000, true, gstack.NetworkHeaderParams{TTL: 64, DF: true}},
			{"the longest", 65535 - 20 - 20, true, gstack.NetworkHeaderParams{TTL: 64, DF: true}},
			{"too long", 65535 - 10, true, gstack.NetworkHeaderParams{TTL: 64, DF: true}},
			{"longer than the MTU", 3000, false, gstack.NetworkHeaderParams{TTL: 64}},
		} {
			t.Run(fmt.Sprintf("v6=%v/%s", v6, c.name), func(t *testing.T) { c.writtenAlike(t, v6) })
		}
	}
}

// writtenAlike writes the segment by our IP layer and by gVisor's.
func (c writeCase) writtenAlike(t *testing.T, v6 bool) {
	p := newPair(t, offAll, Config{Shards: 1})
	e := p.st.shards[0].engine.Load()
	proto, local, remote := ipv4.ProtocolNumber, srv4.Addr(), appIP4
	if v6 {
		proto, local, remote = ipv6.ProtocolNumber, srv6.Addr(), appIP6
	}
	ep, _ := e.ns.GetNetworkEndpoint(nicID, proto)
	r, err := e.ns.FindRoute(nicID, addrTo(local), addrTo(remote), proto, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	var got [2][][]byte
	var errs [2]tcpip.Error
	k := 0
	p.st.dev.(*tuntest.Device).Tap(func(h tun.Header, b []byte) bool {
		got[k] = append(got[k], append(fmt.Appendf(nil, "%+v", h), b...))
		return false
	})
	c.p.Protocol = header.TCPProtocolNumber
	for i, ep := range []gstack.NetworkEndpoint{ep, ep.(*ipEndpoint).NetworkEndpoint} {
		k = i
		pkt := c.packet(v6)
		errs[i] = ep.WritePacket(r, c.p, pkt)
		pkt.DecRef()
	}
	if fmt.Sprint(errs[0]) != fmt.Sprint(errs[1]) || len(got[0]) != len(got[1]) {
		t.Fatalf("%d frames and %v; gVisor's: %d and %v", len(got[0]), errs[0], len(got[1]), errs[1])
	}
	if len(got[0]) == 0 && errs[0] == nil && c.gso { // the link takes no fragments
		t.Fatal("nothing was written")
	}
	for i := range got[0] {
		a, b := got[0][i], got[1][i]
		if !v6 && !c.p.DF { // the ID, and the checksum with it
			at := bytes.IndexByte(a, '}') + 1
			for _, j := range []int{4, 5, 10, 11} {
				a[at+j], b[at+j] = 0, 0
			}
		} else if v6 && len(got[0]) > 1 { // the ID in the fragment header
			at := bytes.IndexByte(a, '}') + 1 + 44
			copy(a[at:at+4], b[at:at+4])
		}
		if !bytes.Equal(a, b) {
			t.Errorf("frame %d: %q, gVisor's: %q", i, a[:min(len(a), 100)], b[:min(len(b), 100)])
		}
	}
}

// packet is the segment as the transport layer hands it over.
func (c writeCase) packet(v6 bool) *gstack.PacketBuffer {
	pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{
		ReserveHeaderBytes: 60, Payload: buffer.MakeWithData(make([]byte, c.size)),
	})
	tcpH := header.TCP(pkt.TransportHeader().Push(tcpHeaderLen))
	tcpH.Encode(
		&header.TCPFields{
			SrcPort:    80,
			DstPort:    1234,
			SeqNum:     7,
			DataOffset: tcpHeaderLen,
			Flags:      header.TCPFlagAck,
		},
	)
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	if c.gso {
		pkt.GSOOptions = gstack.GSO{
			Type:       gstack.GSOTCPv4,
			NeedsCsum:  true,
			CsumOffset: 16,
			MSS:        1448,
			L3HdrLen:   20,
		}
		if v6 {
			pkt.GSOOptions.Type, pkt.GSOOptions.L3HdrLen = gstack.GSOTCPv6, 40
		}
	}
	return pkt
}
