package stack

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// TestDropped: what the stack must not answer, and what it counts it as.
func TestDropped(t *testing.T) {
	for name, tt := range droppedCases() {
		t.Run(name, func(t *testing.T) {
			r := newRaw(t, Config{})
			if r.dev.Write(&tt.h, [][]byte{tt.b}) != nil { // the pipe refuses it as the kernel would: not the stack's case
				newFrameReader(r.s.shards[0]).take(&tt.h, tt.b, inArena)
			}
			testkit.Eventually(t, "the count", func() bool { return tt.count(r.s.Stats()) == 1 })
			r.quiet()
		})
	}
}

// droppedCase is a frame, and the count that it must be in.
type droppedCase struct {
	h     tun.Header
	b     []byte
	count func(Stats) uint64
}

func droppedCases() map[string]droppedCase {
	echo4 := append(segment(netip.AddrPortFrom(appIP4, 1), srv4, 0, 0, 0, nil, nil)[:20], 8, 0, 0xf7, 0xff, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(echo4[2:], 28)
	echo4[9] = protoICMP
	frag4 := append([]byte(nil), echo4...)
	frag4[6] = 0x20
	fix := func(b []byte) []byte {
		header.IPv4(b).SetChecksum(0)
		header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
		return b
	}
	echo6 := append(segment(netip.AddrPortFrom(appIP6, 1), srv6, 0, 0, 0, nil, nil)[:40], 128, 0, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(echo6[4:], 8)
	echo6[6] = protoICMPv6
	// The same behind a destination options header, and in a fragment.
	ext6 := append(append([]byte(nil), echo6[:40]...), protoICMPv6, 0, 1, 4, 0, 0, 0, 0)
	ext6 = append(ext6, echo6[40:]...)
	binary.BigEndian.PutUint16(ext6[4:], 16)
	ext6[6] = protoDestOpts
	frag6 := append([]byte(nil), ext6...)
	frag6[6], frag6[42], frag6[43] = protoFragment, 0, 1
	gre := append([]byte(nil), echo4...)
	gre[9] = 47
	icmp := func(s Stats) uint64 { return s.DroppedICMP }
	multi := func(s Stats) uint64 { return s.DroppedMulticast }
	mal := func(s Stats) uint64 { return s.DroppedMalformed }
	noGSO, udpGSO := tun.Header{GSOType: 3, GSOSize: 1, Flags: tun.NeedsCsum},
		tun.Header{GSOType: tun.GSOUDPL4, GSOSize: 1, Flags: tun.NeedsCsum}
	return map[string]droppedCase{
		"echo":                {b: fix(echo4), count: icmp},
		"echo in fragments":   {b: fix(frag4), count: icmp},
		"IPv6 echo":           {b: echo6, count: icmp},
		"IPv6 echo, options":  {b: ext6, count: icmp},
		"IPv6 echo, fragment": {b: frag6, count: icmp},
		"GRE":                 {b: fix(gre), count: func(s Stats) uint64 { return s.DroppedProto }},
		"SYN to multicast":    {b: synTo("239.1.2.3:80"), count: multi},
		"SYN to broadcast":    {b: synTo("255.255.255.255:80"), count: multi},
		"SYN to nobody":       {b: synTo("0.0.0.0:80"), count: multi},
		"SYN to ff02::1":      {b: synTo("[ff02::1]:80"), count: multi},
		"SYN to port 0":       {b: synTo("203.0.113.7:0"), count: mal},
		"short":               {b: synTo("203.0.113.7:80")[:30], count: mal},
		"GSO of nothing":      {h: noGSO, b: synTo("203.0.113.7:80"), count: mal},
		"UDP GSO of TCP":      {h: udpGSO, b: synTo("203.0.113.7:80"), count: mal},
	}
}

// synTo is the app's SYN to an endpoint.
func synTo(dst string) []byte {
	d := netip.MustParseAddrPort(dst)
	s := netip.AddrPortFrom(appIP4, 1)
	if d.Addr().Is6() {
		s = netip.AddrPortFrom(appIP6, 1)
	}
	return segment(s, d, 1, 0, header.TCPFlagSyn, nil, nil)
}
