package stack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/viasocks/viasocks/stack/flow"
)

var (
	app4 = netip.MustParseAddrPort("10.0.0.2:40000")
	far4 = netip.MustParseAddrPort("203.0.113.7:6881")
	app6 = netip.MustParseAddrPort("[fd00::2]:40000")
	far6 = netip.MustParseAddrPort("[2001:db8::7]:6881")
)

// rawUDP is a plain datagram with all checksums filled in. It shares nothing with the code under test but the sum.
func rawUDP(src, dst netip.AddrPort, payload []byte) []byte {
	n := 8 + len(payload)
	var ip []byte
	if src.Addr().Is4() {
		ip = make([]byte, 20, 20+n)
		ip[0], ip[8], ip[9] = 0x45, 64, 17
		binary.BigEndian.PutUint16(ip[2:], uint16(20+n))
		copy(ip[12:], src.Addr().AsSlice())
		copy(ip[16:], dst.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], ^checksum.Checksum(ip, 0))
	} else {
		ip = make([]byte, 40, 40+n)
		ip[0], ip[6], ip[7] = 0x60, 17, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(n))
		copy(ip[8:], src.Addr().AsSlice())
		copy(ip[24:], dst.Addr().AsSlice())
	}
	h := len(ip)
	ip = binary.BigEndian.AppendUint16(ip, src.Port())
	ip = binary.BigEndian.AppendUint16(ip, dst.Port())
	ip = binary.BigEndian.AppendUint16(ip, uint16(n))
	ip = append(ip, 0, 0)
	ip = append(ip, payload...)
	var pseudo []byte
	pseudo = append(pseudo, src.Addr().AsSlice()...)
	pseudo = append(pseudo, dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, 17, byte(n>>8), byte(n))
	sum := ^checksum.Checksum(ip[h:], checksum.Checksum(pseudo, 0))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(ip[h+6:], sum)
	return ip
}

// checkICMP verifies the lengths, checksums and addresses of an ICMP error and returns its type, code and quote.
func checkICMP(t *testing.T, p []byte, src, dst netip.Addr) (typ, code byte, quote []byte) {
	t.Helper()
	var body []byte
	var s, d netip.Addr
	if p[0]>>4 == 4 {
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || len(p) > 576 {
			t.Fatalf("total length %d of %d bytes", binary.BigEndian.Uint16(p[2:]), len(p))
		}
		if checksum.Checksum(p[:20], 0) != 0xffff {
			t.Fatal("header checksum is wrong")
		}
		if checksum.Checksum(p[20:], 0) != 0xffff {
			t.Fatal("ICMP checksum is wrong")
		}
		if p[9] != 1 {
			t.Fatal("not ICMP")
		}
		s, d, body = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[20:]
	} else {
		n := int(binary.BigEndian.Uint16(p[4:]))
		if n+40 != len(p) || len(p) > 1280 {
			t.Fatalf("payload length %d of %d bytes", n, len(p))
		}
		pseudo := append(append([]byte{}, p[8:40]...), 0, 0, p[4], p[5], 0, 0, 0, 58)
		if checksum.Checksum(p[40:], checksum.Checksum(pseudo, 0)) != 0xffff {
			t.Fatal("ICMPv6 checksum is wrong")
		}
		if p[6] != 58 {
			t.Fatal("not ICMPv6")
		}
		s, d, body = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:])), p[40:]
	}
	if s != src || d != dst {
		t.Fatalf("from %v to %v, want %v to %v", s, d, src, dst)
	}
	return body[0], body[1], body[8:]
}

func TestUnreachableCodes(t *testing.T) {
	q4, q6 := rawUDP(app4, far4, []byte("x")), rawUDP(app6, far6, []byte("x"))
	for _, c := range []struct {
		why            flow.Refusal
		t4, c4, t6, c6 byte
	}{
		{flow.RefuseReset, 3, 3, 1, 4},
		{flow.RefuseNet, 3, 0, 1, 0},
		{flow.RefuseHost, 3, 1, 1, 3},
		{flow.RefuseAdmin, 3, 13, 1, 1},
		{flow.RefusePort, 3, 3, 1, 4},
	} {
		p, ok := appendUnreachable(nil, q4, c.why)
		if !ok {
			t.Fatalf("%v: no answer over IPv4", c.why)
		}
		if typ, code, quote := checkICMP(t, p, far4.Addr(), app4.Addr()); typ != c.t4 || code != c.c4 || !bytes.Equal(quote, q4) {
			t.Errorf("%v: %d/%d quoting %x", c.why, typ, code, quote)
		}
		if p, ok = appendUnreachable(nil, q6, c.why); !ok {
			t.Fatalf("%v: no answer over IPv6", c.why)
		}
		if typ, code, quote := checkICMP(t, p, far6.Addr(), app6.Addr()); typ != c.t6 || code != c.c6 || !bytes.Equal(quote, q6) {
			t.Errorf("%v: IPv6 %d/%d quoting %x", c.why, typ, code, quote)
		}
	}
	for _, why := range []flow.Refusal{flow.RefuseSilent, 99} {
		if out, ok := appendUnreachable([]byte("pre"), q4, why); ok || string(out) != "pre" {
			t.Errorf("%v: answered", why)
		}
	}
}

func TestUnreachableQuote(t *testing.T) {
	long4, long6 := rawUDP(app4, far4, make([]byte, 1400)), rawUDP(app6, far6, make([]byte, 1400))
	p, ok := appendUnreachable([]byte("pre"), long4, flow.RefuseHost)
	if !ok || string(p[:3]) != "pre" || len(p)-3 != 576 {
		t.Fatalf("IPv4: ok %v, %d bytes", ok, len(p))
	}
	checkICMP(t, p[3:], far4.Addr(), app4.Addr())
	if p, ok = appendUnreachable(nil, long6, flow.RefuseHost); !ok || len(p) != 1280 {
		t.Fatalf("IPv6: ok %v, %d bytes", ok, len(p))
	}
	checkICMP(t, p, far6.Addr(), app6.Addr())
	// The least that can be answered: the headers and no payload.
	if _, ok := appendUnreachable(nil, long4[:28], flow.RefuseHost); !ok {
		t.Error("IPv4 headers alone are not answered")
	}
	if _, ok := appendUnreachable(nil, long6[:48], flow.RefuseHost); !ok {
		t.Error("IPv6 headers alone are not answered")
	}
}

func TestUnreachableForbidden(t *testing.T) {
	mod := func(p []byte, at int, v ...byte) []byte {
		p = bytes.Clone(p)
		copy(p[at:], v)
		return p
	}
	q4, q6 := rawUDP(app4, far4, []byte("payload")), rawUDP(app6, far6, []byte("payload"))
	ext := func(next byte, body ...byte) []byte { // q6 with one extension header
		p := append(bytes.Clone(q6[:40]), body...)
		p = append(p, q6[40:]...)
		p[6] = next
		return p
	}
	for name, c := range map[string]struct {
		quote []byte
		want  bool
	}{
		"empty":                       {nil, false},
		"version 5":                   {mod(q4, 0, 0x55), false},
		"short v4":                    {q4[:27], false},
		"short v6":                    {q6[:47], false},
		"ihl 4":                       {mod(q4, 0, 0x44), false},
		"ihl beyond":                  {mod(q4, 0, 0x4f), false},
		"first fragment":              {mod(q4, 6, 0x20), true},
		"later fragment":              {mod(q4, 6, 0, 1), false},
		"v4 from unspecified":         {mod(q4, 12, 0, 0, 0, 0), false},
		"v4 from loopback":            {mod(q4, 12, 127), false},
		"v4 from multicast":           {mod(q4, 12, 239, 192, 152, 143), false},
		"v4 from broadcast":           {mod(q4, 12, 255, 255, 255, 255), false},
		"v4 to multicast":             {mod(q4, 16, 239, 192, 152, 143), false},
		"v4 to broadcast":             {mod(q4, 16, 255, 255, 255, 255), false},
		"v4 icmp echo":                {mod(mod(q4, 9, 1), 20, 8), true},
		"v4 icmp unreachable":         {mod(mod(q4, 9, 1), 20, 3), false},
		"v4 icmp redirect":            {mod(mod(q4, 9, 1), 20, 5), false},
		"v6 from unspecified":         {mod(q6, 8, make([]byte, 16)...), false},
		"v6 from multicast":           {mod(q6, 8, 0xff, 0x15), false},
		"v6 to multicast":             {mod(q6, 24, 0xff, 0x15), false},
		"v6 icmp echo":                {mod(mod(q6, 6, 58), 40, 128), true},
		"v6 icmp error":               {mod(mod(q6, 6, 58), 40, 1), false},
		"v6 icmp redirect":            {mod(mod(q6, 6, 58), 40, 137), false},
		"v6 hop-by-hop":               {ext(0, 17, 0, 1, 4, 0, 0, 0, 0), true},
		"v6 hop-by-hop over an error": {mod(ext(0, 58, 0, 1, 4, 0, 0, 0, 0), 48, 1), false},
		"v6 first fragment":           {ext(44, 17, 0, 0, 1, 0, 0, 0, 1), true},
		"v6 later fragment":           {ext(44, 17, 0, 0, 8, 0, 0, 0, 1), false},
		"v6 extension beyond":         {ext(60, 17, 200, 1, 4, 0, 0, 0, 0), false},
		"v6 extension cut":            {ext(60, 17, 0, 1, 4, 0, 0, 0, 0)[:44], false},
	} {
		out, ok := appendUnreachable(nil, c.quote, flow.RefuseHost)
		if ok != c.want || !ok && len(out) != 0 {
			t.Errorf("%s: answered %v, want %v", name, ok, c.want)
		}
	}
}

func FuzzUnreachable(f *testing.F) {
	f.Add(rawUDP(app4, far4, []byte("x")), uint8(1))
	f.Add(rawUDP(app6, far6, []byte("x")), uint8(2))
	f.Add(rawUDP(app6, far6, make([]byte, 1400)), uint8(3))
	f.Add([]byte{0x4f, 19: 1, 60: 1}, uint8(4))
	f.Add([]byte{0x60, 6: 44, 39: 1, 48: 1}, uint8(4))
	f.Fuzz(func(t *testing.T, quote []byte, why uint8) {
		keep := bytes.Clone(quote)
		p, ok := appendUnreachable(nil, quote, flow.Refusal(why))
		if !bytes.Equal(quote, keep) {
			t.Fatal("the quote was changed")
		}
		if !ok {
			return
		}
		var src, dst netip.Addr
		if quote[0]>>4 == 4 {
			src, dst = netip.AddrFrom4([4]byte(quote[16:])), netip.AddrFrom4([4]byte(quote[12:]))
		} else {
			src, dst = netip.AddrFrom16([16]byte(quote[24:])), netip.AddrFrom16([16]byte(quote[8:]))
		}
		_, _, q := checkICMP(t, p, src, dst)
		if !bytes.HasPrefix(quote, q) || len(q) < 28 {
			t.Fatal("not a quote")
		}
		// What we wrote is an error: it must never be answered itself.
		if _, ok := appendUnreachable(nil, p, flow.RefuseHost); ok {
			t.Fatal("an error was answered with an error")
		}
	})
}
