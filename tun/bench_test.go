package tun

import (
	"net"
	"net/netip"
	"testing"
)

// BenchmarkWrite writes frames that the kernel throws away after routing: what is left is our part and the copy.
func BenchmarkWrite(b *testing.B) {
	for _, c := range []struct {
		name    string
		payload int
	}{{"1452", 1452}, {"64K", 65000}} {
		b.Run(c.name, func(b *testing.B) {
			d := kernelTUN(b, true, OffloadFull)
			p := packet{
				src:     netip.AddrPortFrom(far4, 1),
				dst:     netip.AddrPortFrom(far4.Next(), 2),
				proto:   protoTCP,
				flags:   flagACK,
				payload: make([]byte, c.payload),
			}
			frame, l3, l4 := p.marshal(true)
			h := &Header{
				Flags:      NeedsCsum,
				GSOType:    GSOTCPv4,
				GSOSize:    1400,
				HdrLen:     uint16(l3 + l4),
				CsumStart:  uint16(l3),
				CsumOffset: 16,
			}
			parts := [][]byte{frame[:l3+l4], frame[l3+l4:]}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				if err := d.Write(h, parts); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRead reads what a socket sends; the send is a part of the time and is the same for both.
func BenchmarkRead(b *testing.B) {
	for _, wait := range []bool{false, true} {
		b.Run(map[bool]string{false: "look", true: "wait"}[wait], func(b *testing.B) {
			d := kernelTUN(b, true, OffloadFull)
			c, err := net.Dial("udp", netip.AddrPortFrom(far4, 9).String())
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			msg, buf, h := make([]byte, 1400), make([]byte, MaxFrame), new(Header)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(msg); err != nil {
					b.Fatal(err)
				}
				if _, err := d.Read(h, buf, wait); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
