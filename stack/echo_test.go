package stack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// echoFrame is an echo request with identifier 0x1234 and sequence number 0x0056.
func echoFrame(src, dst netip.Addr, payload []byte) []byte {
	icmp := append([]byte{8, 0, 0, 0, 0x12, 0x34, 0, 0x56}, payload...)
	var b []byte
	var sum uint16
	if src.Is4() {
		b = append(b, 0x45, 0x10, 0, 0, 0, 0, 0, 0, 64, protoICMP, 0, 0)
		binary.BigEndian.PutUint16(b[2:], uint16(ip4HeaderLen+len(icmp)))
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b, 0))
	} else {
		icmp[0] = 128
		b = append(b, 0x60, 0, 0, 0, byte(len(icmp)>>8), byte(len(icmp)), protoICMPv6, 64)
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		sum = pseudoSum(b[8:], protoICMPv6, len(icmp))
	}
	binary.BigEndian.PutUint16(icmp[2:], ^checksum.Checksum(icmp, sum))
	return append(b, icmp...)
}

// echoTestHandler answers as why says, and does not want requests to the address unwanted.
type echoTestHandler struct {
	testHandler
	why      flow.Refusal // RefuseSilent: a reply
	unwanted netip.Addr
	taken    atomic.Int32
}

func (h *echoTestHandler) HandleEcho(_ int, e flow.Echo) bool {
	h.taken.Add(1)
	switch {
	case e.Dst == h.unwanted:
		return false
	case h.why == flow.RefuseSilent:
		e.By.ReplyEcho(bytes.Clone(e.Packet))
	default:
		e.By.RefuseEcho(bytes.Clone(e.Packet), h.why)
	}
	return true
}

// withOptions inserts 8 bytes of IP options or a destination options header.
func withOptions(b []byte) []byte {
	if b[0]>>4 == 4 {
		b = bytes.Join([][]byte{b[:20], {1, 1, 1, 1, 1, 1, 1, 0}, b[20:]}, nil)
		b[0], b[10], b[11] = 0x47, 0, 0
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:28], 0))
		return b
	}
	b = bytes.Join([][]byte{b[:40], {protoICMPv6, 0, 1, 4, 0, 0, 0, 0}, b[40:]}, nil)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ip6HeaderLen))
	b[6] = protoDestOpts
	return b
}

// TestEchoReply: a reply has the request's identifier, sequence number and data, the addresses are exchanged, and the
// checksums are right, for each size and with options, which the reply leaves out.
func TestEchoReply(t *testing.T) {
	for _, dst := range []netip.Addr{srv4.Addr(), srv6.Addr()} {
		head := ip4HeaderLen
		if dst.Is6() {
			head = ip6HeaderLen
		}
		for _, size := range []int{0, 1, 56, 1400, 40000, 65535 - head - icmpHeaderLen - 8} {
			for _, options := range []bool{false, true} {
				t.Run(fmt.Sprint(dst, size, options), func(t *testing.T) { testEchoReply(t, dst, size, options) })
			}
		}
	}
}

func testEchoReply(t *testing.T, dst netip.Addr, size int, options bool) {
	src, head := appIP4, ip4HeaderLen
	if dst.Is6() {
		src, head = appIP6, ip6HeaderLen
	}
	payload := bytes.Repeat([]byte("viasocks"), size/8+1)[:size]
	q := echoFrame(src, dst, payload)
	if options {
		q = withOptions(q)
	}
	r := newRaw(t, Config{Handler: &echoTestHandler{why: flow.RefuseSilent}})
	r.send(tun.Header{}, q)
	_, b := r.recv(testkit.Patience)
	p, ok := parseIP(b)
	if !ok || p.off != head || p.end != len(b) || len(b) != head+icmpHeaderLen+size {
		t.Fatalf("a frame of %d bytes", len(b))
	}
	addrs, typ, sum := b[12:20], byte(0), uint16(0)
	if p.v6 {
		addrs, typ, sum = b[8:40], 129, pseudoSum(b[8:40], protoICMPv6, len(b)-head)
	} else if checksum.Checksum(b[:head], 0) != 0xffff {
		t.Error("the IP checksum is wrong")
	}
	icmp := b[head:]
	if !bytes.Equal(addrs, append(dst.AsSlice(), src.AsSlice()...)) || icmp[0] != typ || icmp[1] != 0 ||
		!bytes.Equal(icmp[4:8], []byte{0x12, 0x34, 0, 0x56}) || !bytes.Equal(icmp[8:], payload) {
		t.Errorf("% x", b[:head+icmpHeaderLen])
	}
	if checksum.Checksum(icmp, sum) != 0xffff {
		t.Error("the ICMP checksum is wrong")
	}
	if s := r.s.Stats(); s.DroppedICMP != 0 {
		t.Errorf("%d requests are counted as dropped", s.DroppedICMP)
	}
}

// TestEchoRefused: an ICMP error quotes the request.
func TestEchoRefused(t *testing.T) {
	for _, tt := range []struct {
		why      flow.Refusal
		dst      netip.Addr
		typ, cod byte
	}{
		{flow.RefuseNet, srv4.Addr(), 3, 0}, {flow.RefuseHost, srv4.Addr(), 3, 1}, {flow.RefuseAdmin, srv4.Addr(), 3, 13},
		{flow.RefuseNet, srv6.Addr(), 1, 0}, {flow.RefuseHost, srv6.Addr(), 1, 3}, {flow.RefuseAdmin, srv6.Addr(), 1, 1},
	} {
		src, head := appIP4, ip4HeaderLen
		if tt.dst.Is6() {
			src, head = appIP6, ip6HeaderLen
		}
		t.Run(fmt.Sprint(tt.why, tt.dst), func(t *testing.T) {
			q := echoFrame(src, tt.dst, []byte("data"))
			r := newRaw(t, Config{Handler: &echoTestHandler{why: tt.why}})
			r.send(tun.Header{}, q)
			_, b := r.recv(testkit.Patience)
			if len(b) != head+icmpHeaderLen+len(q) || b[head] != tt.typ || b[head+1] != tt.cod ||
				!bytes.Equal(b[head+icmpHeaderLen:], q) {
				t.Errorf("% x", b)
			}
		})
	}
}

// TestEchoDropped: requests that cannot be answered truthfully do not reach the handler, and those that it does not want are
// dropped and counted.
func TestEchoDropped(t *testing.T) {
	icmp := func(s Stats) uint64 { return s.DroppedICMP }
	multicast := func(s Stats) uint64 { return s.DroppedMulticast }
	sum := func(s Stats) uint64 { return s.DroppedChecksum }
	bad := func(b []byte) []byte { b[len(b)-1]++; return b }
	fragment := echoFrame(appIP4, srv4.Addr(), make([]byte, 8))
	fragment[6], fragment[10], fragment[11] = 0x20, 0, 0
	binary.BigEndian.PutUint16(fragment[10:], ^checksum.Checksum(fragment[:20], 0))
	timestamp := echoFrame(appIP4, srv4.Addr(), make([]byte, 12))
	timestamp[20], timestamp[22], timestamp[23] = 13, 0, 0
	binary.BigEndian.PutUint16(timestamp[22:], ^checksum.Checksum(timestamp[20:], 0))
	for name, tt := range map[string]struct {
		b     []byte
		taken int32
		count func(Stats) uint64
	}{
		"unwanted":        {echoFrame(appIP4, other4, nil), 1, icmp},
		"fragment":        {fragment, 0, icmp},
		"timestamp":       {timestamp, 0, icmp},
		"checksum":        {bad(echoFrame(appIP4, srv4.Addr(), []byte("x"))), 0, sum},
		"checksum, IPv6":  {bad(echoFrame(appIP6, srv6.Addr(), []byte("x"))), 0, sum},
		"to link-local":   {echoFrame(appIP6, netip.MustParseAddr("fe80::1"), nil), 0, icmp},
		"to reserved":     {echoFrame(appIP4, netip.MustParseAddr("240.0.0.1"), nil), 0, icmp},
		"to all nodes":    {echoFrame(appIP6, netip.MustParseAddr("ff02::1"), nil), 0, icmp},
		"to multicast v4": {echoFrame(appIP4, netip.MustParseAddr("224.0.0.1"), nil), 0, multicast},
	} {
		t.Run(name, func(t *testing.T) {
			h := &echoTestHandler{why: flow.RefuseSilent, unwanted: other4}
			r := newRaw(t, Config{Handler: h})
			r.send(tun.Header{}, tt.b)
			testkit.Eventually(t, "the count", func() bool { return tt.count(r.s.Stats()) == 1 })
			r.quiet()
			if n := h.taken.Load(); n != tt.taken {
				t.Errorf("%d requests reached the handler", n)
			}
		})
	}
}

var other4 = netip.MustParseAddr("198.51.100.9")
