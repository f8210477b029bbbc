package socks

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

// maxUDPHeader is the length of the longest datagram header, which has a name of 255 bytes.
const maxUDPHeader = 3 + 2 + maxName + 2

func TestUDPHeader(t *testing.T) {
	tests := []struct {
		a Addr
		b string
	}{
		{Addr{IP: netip.MustParseAddr("192.0.2.1"), Port: 53}, "\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35"},
		{
			Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 6881},
			"\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x1a\xe1",
		},
		{Addr{Name: "a.example", Port: 1}, "\x00\x00\x00\x03\x09a.example\x00\x01"},
		{Addr{Name: strings.Repeat("x", 255), Port: 1}, "\x00\x00\x00\x03\xff" + strings.Repeat("x", 255) + "\x00\x01"},
	}
	for _, tt := range tests {
		b := AppendUDPHeader([]byte("before"), tt.a)
		if string(b) != "before"+tt.b {
			t.Errorf("%v: % x", tt.a, b)
		}
		a, n, err := ParseUDPHeader([]byte(tt.b + "payload"))
		if a != tt.a || n != len(tt.b) || err != nil {
			t.Errorf("%v: parsed %v, %d, %v", tt.a, a, n, err)
		}
		for i := range tt.b {
			if _, _, err := ParseUDPHeader([]byte(tt.b[:i])); !errors.Is(err, ErrUDPShort) {
				t.Errorf("%v cut to %d bytes: %v", tt.a, i, err)
			}
		}
		if len(tt.b) > maxUDPHeader {
			t.Errorf("maxUDPHeader is %d, and one has %d", maxUDPHeader, len(tt.b))
		}
	}
}

func TestUDPHeaderRefused(t *testing.T) {
	tests := []struct {
		b   string
		err error
	}{
		{"", ErrUDPShort},
		{"\x00\x00\x01\x01\xc0\x00\x02\x01\x00\x35", ErrUDPFragment},
		{"\x00\x00\x80\x01\xc0\x00\x02\x01\x00\x35", ErrUDPFragment},
		{"\x00\x01\x00\x01\xc0\x00\x02\x01\x00\x35", ErrUDPHeader},
		{"\x00\x00\x00\x02\xc0\x00\x02\x01\x00\x35", ErrUDPHeader},
		{"\x00\x00\x00\x03\x00\x00\x35abcdefgh", ErrUDPHeader},
	}
	for _, tt := range tests {
		if _, _, err := ParseUDPHeader([]byte(tt.b)); err != tt.err {
			t.Errorf("%q: %v, want %v", tt.b, err, tt.err)
		}
		if _, _, err := (UDPCodec{}).ParseHeader([]byte(tt.b)); err != tt.err {
			t.Errorf("%q: codec: %v, want %v", tt.b, err, tt.err)
		}
	}
	if _, _, err := (UDPCodec{}).ParseHeader([]byte("\x00\x00\x00\x03\x01a\x00\x35")); err != ErrUDPName {
		t.Errorf("a name as source: %v", err)
	}
	// A mapped source is the IPv4 endpoint that the app knows.
	src, n, err := (UDPCodec{}).ParseHeader(
		append([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff}, 192, 0, 2, 1, 0, 53),
	)
	if src.String() != "192.0.2.1:53" || n != 22 || err != nil {
		t.Errorf("mapped source: %v, %d, %v", src, n, err)
	}
}

func TestUDPHeaderAllocatesNothing(t *testing.T) {
	b := make([]byte, 0, 64)
	v4, v6 := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("[2001:db8::1]:53")
	var c UDPCodec
	if n := testing.AllocsPerRun(100, func() {
		for _, ap := range []netip.AddrPort{v4, v6} {
			h := c.AppendHeader(b, ap)
			if src, _, err := c.ParseHeader(h); src != ap || err != nil {
				t.Fatal(src, err)
			}
			h = AppendUDPHeader(b, AddrFrom(ap))
			if src, _, err := ParseUDPHeader(h); src.AddrPort() != ap || err != nil {
				t.Fatal(src, err)
			}
			c.ParseHeader(h[:5])
		}
		h := AppendUDPHeader(b, Addr{Name: "a.example", Port: 1})
		c.ParseHeader(h)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzUDPHeader: no panic, n within bounds, and what was parsed is written back to the same bytes, but for mapped
// addresses.
func FuzzUDPHeader(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\xc0\x00\x02\x01\x00\x35payload"))
	f.Add([]byte("\x00\x00\x00\x04aaaaaaaaaaaaaaaa\x00\x01x"))
	f.Add([]byte("\x00\x00\x00\x03\x09a.example\x00\x01"))
	f.Add([]byte("\x00\x00\x01\x01\xc0\x00\x02\x01\x00\x35"))
	f.Fuzz(func(t *testing.T, b []byte) {
		src, n, err := ParseUDPHeader(b)
		ap, m, cerr := UDPCodec{}.ParseHeader(b)
		if err != nil {
			if cerr != err {
				t.Fatalf("%v, the codec says %v", err, cerr)
			}
			return
		}
		if n < 4+1+1+2 || n > len(b) || n > maxUDPHeader {
			t.Fatalf("header of %d in %d bytes", n, len(b))
		}
		if src.Name != "" {
			if cerr != ErrUDPName {
				t.Fatalf("name: the codec says %v", cerr)
			}
		} else if ap != src.AddrPort() || m != n {
			t.Fatalf("%v, the codec says %v", src, ap)
		}
		if back := AppendUDPHeader(nil, src); !bytes.Equal(back, b[:n]) && !(src.IP.Is4() && b[3] == atypIPv6) {
			t.Fatalf("% x came back as % x", b[:n], back)
		}
	})
}

func BenchmarkUDPHeader(b *testing.B) {
	var c UDPCodec
	buf := make([]byte, 0, 64)
	ap := netip.MustParseAddrPort("192.0.2.1:53")
	b.ReportAllocs()
	for b.Loop() {
		h := c.AppendHeader(buf, ap)
		if _, _, err := c.ParseHeader(h); err != nil {
			b.Fatal(err)
		}
	}
}
