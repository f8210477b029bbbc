package stack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// recDevice keeps what is written to it.
type recDevice struct {
	off    tun.Offload
	err    func(h *tun.Header) error // what Write returns, if not nil
	quiet  bool                      // count only
	frames []recFrame
	writes int
}

type recFrame struct {
	h tun.Header
	p []byte
}

func (d *recDevice) Name() string                                { return "rec" }
func (d *recDevice) MTU() int                                    { return 1500 }
func (d *recDevice) Offload() tun.Offload                        { return d.off }
func (d *recDevice) Read(*tun.Header, []byte, bool) (int, error) { return 0, os.ErrClosed }
func (d *recDevice) Close() error                                { return nil }
func (d *recDevice) Write(h *tun.Header, parts [][]byte) error {
	d.writes++
	if d.err != nil {
		if err := d.err(h); err != nil {
			return err
		}
	}
	if !d.quiet {
		d.frames = append(d.frames, recFrame{*h, bytes.Join(parts, nil)})
	}
	return nil
}

// recHandler keeps copies of what it is handed.
type recHandler struct {
	pkts    []flow.Packet
	caps    []int // of the payloads as they were lent
	bursts  int
	quiet   bool
	app     netip.AddrPort
	remote  netip.AddrPort
	streams int
}

func (h *recHandler) HandleStream(_ int, r flow.StreamRequest) {
	h.streams++
	r.Reject(flow.RefuseReset)
}
func (h *recHandler) HandlePackets(_ int, ps []flow.Packet) {
	h.bursts++
	if h.quiet {
		return
	}
	for _, p := range ps {
		h.caps = append(h.caps, cap(p.Payload))
		p.Payload, p.Head = bytes.Clone(p.Payload), bytes.Clone(p.Head)
		h.pkts = append(h.pkts, p)
	}
}
func (h *recHandler) HandleUnreachable(_ int, app, remote netip.AddrPort) {
	h.app, h.remote = app, remote
}

// udpStack is a Stack with nothing but what UDP needs.
func udpStack(off tun.Offload) (*Stack, *recDevice, *recHandler) {
	d, h := &recDevice{off: off}, &recHandler{}
	s := &Stack{handler: h}
	s.shards = []*shard{{Stack: s, dev: loneDevice{d}}}
	return s, d, h
}

func mod(p []byte, at int, v ...byte) []byte {
	p = bytes.Clone(p)
	copy(p[at:], v)
	return p
}

// sum4 fills in the header checksum again after a change.
func sum4(p []byte) []byte {
	ihl := int(p[0]&0xf) * 4
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ihl], 0))
	return p
}

// withExt puts an extension header of kind behind the IPv6 header of p. body begins with the next header.
func withExt(p []byte, kind byte, body ...byte) []byte {
	q := append(bytes.Clone(p[:40]), body...)
	q = append(q, p[40:]...)
	q[6] = kind
	binary.BigEndian.PutUint16(q[4:], uint16(len(q)-40))
	return q
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// Datagrams to what cannot be a peer are handed over, so that they can be refused as a connection is.
func TestUDPToImpossible(t *testing.T) {
	for _, dst := range []netip.AddrPort{
		addr("240.0.0.1:53"), addr("0.1.2.3:53"), netip.AddrPortFrom(netip.AddrFrom16(far4.Addr().As16()), 53),
	} {
		src, gateway := app4, flow.Gateway4
		if dst.Addr().Is6() {
			src, gateway = app6, flow.Gateway6
		}
		s, _, h := udpStack(0)
		b := s.shards[0].newUDPBatch()
		b.addFrame(rawUDP(src, dst, []byte("x")), &tun.Header{})
		b.flush()
		if len(h.pkts) != 1 || h.pkts[0].Dst != dst {
			t.Errorf("to %v: %v", dst, h.pkts)
			continue
		}
		e, ok := appendUnreachable(nil, h.pkts[0].Head, flow.RefuseNet)
		from := e[12:16]
		if dst.Addr().Is6() {
			from = e[8:24]
		}
		if got, _ := netip.AddrFromSlice(from); !ok || got != gateway {
			t.Errorf("to %v: refused by %v (%v)", dst, got, ok)
		}
	}
}

var udpPay = []byte("d1:ad2:id20:abcdefghij0123456789e1:q4:ping")

// What becomes of a frame.
const (
	udpTaken   = 1
	udpDropped = 2
	udpOther   = 3 // not for us
)

type udpAdd struct {
	name  string
	frame []byte
	h     tun.Header
	want  int
	count string // the counter that a dropped one is in
}

// TestUDPAdd: which frames are taken as datagrams, and what their headers may say.
func TestUDPAdd(t *testing.T) {
	q4, q6 := rawUDP(app4, far4, udpPay), rawUDP(app6, far6, udpPay)
	var plain tun.Header
	needs := func(off int) tun.Header {
		return tun.Header{Flags: tun.NeedsCsum, CsumStart: uint16(off), CsumOffset: 6}
	}
	valid := tun.Header{Flags: tun.DataValid}
	for _, c := range []udpAdd{
		{"IPv4", q4, plain, udpTaken, ""},
		{"IPv6", q6, plain, udpTaken, ""},
		{"padded", append(bytes.Clone(q4), 1, 2, 3), plain, udpTaken, ""},
		{"IPv4 without a checksum", mod(q4, 26, 0, 0), plain, udpTaken, ""},
		{"IPv4 wrong checksum", mod(q4, 26, 1, 2), plain, udpDropped, "checksum"},
		{"IPv4 wrong header checksum", mod(q4, 10, 1, 2), plain, udpDropped, "checksum"},
		{"IPv4 wrong payload", mod(q4, 40, '#'), plain, udpDropped, "checksum"},
		{"IPv4 checksum to be filled in", mod(q4, 26, 1, 2), needs(20), udpTaken, ""},
		{"IPv4 checksum verified", mod(q4, 26, 1, 2), valid, udpTaken, ""},
		{"IPv4 checksum to be filled in elsewhere", mod(q4, 26, 1, 2), needs(28), udpDropped, "malformed"},
		{"IPv6 without a checksum", mod(q6, 46, 0, 0), plain, udpDropped, "checksum"},
		{"IPv6 wrong checksum", mod(q6, 46, 1, 2), plain, udpDropped, "checksum"},
		{"IPv6 checksum to be filled in", mod(q6, 46, 0, 0), needs(40), udpTaken, ""},
		{"IPv6 hop-by-hop", withExt(q6, 0, 17, 0, 1, 4, 0, 0, 0, 0), plain, udpTaken, ""},
		{"IPv6 two extensions", withExt(withExt(q6, 60, 17, 0, 1, 4, 0, 0, 0, 0), 0, 60, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
			0, 0), plain, udpTaken, ""},
		{"IPv6 hop-by-hop, to be filled in", mod(withExt(q6, 0, 17, 0, 1, 4, 0, 0, 0, 0), 54, 0, 0), needs(48), udpTaken, ""},
		{"IPv6 used route", withExt(q6, 43, 17, 0, 4, 0, 0, 0, 0, 0), plain, udpTaken, ""},
		{"IPv6 route", withExt(q6, 43, 17, 0, 4, 1, 0, 0, 0, 0), plain, udpOther, ""},
		{"IPv6 extension cut", withExt(q6, 0, 17, 99, 1, 4, 0, 0, 0, 0), plain, udpOther, ""},
		{"IPv6 fragment", withExt(q6, 44, 17, 0, 0, 1, 0, 0, 0, 1), plain, udpOther, ""},
		{"IPv4 first fragment", sum4(mod(q4, 6, 0x20)), plain, udpOther, ""},
		{"IPv4 last fragment", sum4(mod(q4, 6, 0, 9)), plain, udpOther, ""},
		{"IPv4 DF", sum4(mod(q4, 6, 0x40)), plain, udpTaken, ""},
		{"IPv4 options", sum4(append(append(mod(q4[:20], 0, 0x46, 0, 0, byte(len(q4)+4)), 1, 1, 1, 1), q4[20:]...)), plain,
			udpTaken,
			""},
		{"IPv4 TCP", sum4(mod(q4, 9, 6)), plain, udpOther, ""},
		{"IPv6 TCP", mod(q6, 6, 6), plain, udpOther, ""},
		{"IPv4 echo", sum4(mod(q4, 9, 1)), plain, udpOther, ""},
	} {
		t.Run(c.name, c.test)
	}
}

// TestUDPAddWrong: lengths, ports, super-frames and addresses that cannot be.
func TestUDPAddWrong(t *testing.T) {
	q4, q6 := rawUDP(app4, far4, udpPay), rawUDP(app6, far6, udpPay)
	var plain tun.Header
	for _, c := range []udpAdd{
		{"IPv4 length beyond", mod(q4, 2, 0xff), plain, udpOther, ""},
		{"IPv4 length below", mod(q4, 2, 0, 19), plain, udpOther, ""},
		{"IPv4 ihl 4", mod(q4, 0, 0x44), plain, udpOther, ""},
		{"IPv6 length beyond", mod(q6, 4, 0xff), plain, udpOther, ""},
		{"version 5", mod(q4, 0, 0x55), plain, udpOther, ""},
		{"empty", nil, plain, udpOther, ""},
		{"short", q4[:19], plain, udpOther, ""},
		{"IPv4 no UDP header", sum4(mod(q4, 2, 0, 27)), plain, udpDropped, "malformed"},
		{"UDP length below", mod(q4, 24, 0, 7), plain, udpDropped, "malformed"},
		{"UDP length beyond", mod(q4, 24, 0, 200), plain, udpDropped, "malformed"},
		{"IPv6 UDP length zero", mod(q6, 44, 0, 0), plain, udpDropped, "malformed"},
		{"to port 0", rawUDP(app4, addr("203.0.113.7:0"), udpPay), plain, udpDropped, "malformed"},
		{"from port 0", rawUDP(addr("10.0.0.2:0"), far4, udpPay), plain, udpDropped, "malformed"},
		{"TCP super-frame", q4, tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 6, GSOType: tun.GSOTCPv4, GSOSize: 9},
			udpDropped, "malformed"},
		{"super-frame of nothing", q4, tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 6, GSOType: tun.GSOUDPL4},
			udpDropped, "malformed"},
		{"super-frame without flags", q4, tun.Header{GSOType: tun.GSOUDPL4, GSOSize: 9}, udpDropped, "malformed"},
		{"LPD", rawUDP(app4, addr("239.192.152.143:6771"), udpPay), plain, udpDropped, "multicast"},
		{"LPD IPv6", rawUDP(app6, addr("[ff15::efc0:988f]:6771"), udpPay), plain, udpDropped, "multicast"},
		{"SSDP", rawUDP(app4, addr("239.255.255.250:1900"), udpPay), plain, udpDropped, "multicast"},
		{"mDNS", rawUDP(app4, addr("224.0.0.251:5353"), udpPay), plain, udpDropped, "multicast"},
		{"mDNS IPv6", rawUDP(app6, addr("[ff02::fb]:5353"), udpPay), plain, udpDropped, "multicast"},
		{"DHCP", rawUDP(addr("0.0.0.0:68"), addr("255.255.255.255:67"), udpPay), plain, udpDropped, "multicast"},
		{"to unspecified", rawUDP(app4, addr("0.0.0.0:53"), udpPay), plain, udpDropped, "address"},
		{"to unspecified IPv6", rawUDP(app6, addr("[::]:53"), udpPay), plain, udpDropped, "address"},
		{"to loopback", rawUDP(app4, addr("127.0.0.53:53"), udpPay), plain, udpDropped, "address"},
		{"to loopback IPv6", rawUDP(app6, addr("[::1]:53"), udpPay), plain, udpDropped, "address"},
		{"to link-local IPv6", rawUDP(app6, addr("[fe80::1]:53"), udpPay), plain, udpDropped, "address"},
		{"from unspecified", rawUDP(addr("0.0.0.0:99"), far4, udpPay), plain, udpDropped, "address"},
		{"from multicast", rawUDP(addr("[ff02::1]:99"), far6, udpPay), plain, udpDropped, "address"},
	} {
		t.Run(c.name, c.test)
	}
}

// A search for devices reaches a handler that asked for it, and other multicast does not.
func TestSSDP(t *testing.T) {
	s, _, h := udpStack(0)
	s.SetSSDP(true)
	b := s.shards[0].newUDPBatch()
	for _, frame := range [][]byte{
		rawUDP(app4, flow.SSDP, udpPay), rawUDP(app4, addr("239.255.255.250:1901"), udpPay),
		rawUDP(app4, addr("239.192.152.143:1900"), udpPay),
		rawUDP(addr("0.0.0.0:68"), flow.SSDP, udpPay),
	} {
		b.addFrame(frame, &tun.Header{})
	}
	b.flush()
	if len(h.pkts) != 1 || h.pkts[0].Dst != flow.SSDP || s.Stats().UDP.DroppedMulticast != 3 {
		t.Errorf("%v, %+v", h.pkts, s.Stats().UDP)
	}
}

func (c udpAdd) test(t *testing.T) {
	s, _, h := udpStack(0)
	b := s.shards[0].newUDPBatch()
	keep := bytes.Clone(c.frame)
	ok := b.addFrame(c.frame, &c.h)
	if len(h.pkts) != 0 {
		t.Fatal("handed over before flush")
	}
	b.flush()
	if !bytes.Equal(keep, c.frame) {
		t.Error("the frame was changed")
	}
	got := udpOther
	if ok && len(h.pkts) == 0 {
		got = udpDropped
	} else if ok {
		got = udpTaken
	}
	if got != c.want {
		t.Fatalf("got %d, want %d", got, c.want)
	}
	st := s.Stats().UDP
	counts := map[string]uint64{
		"checksum":  st.DroppedChecksum,
		"malformed": st.DroppedMalformed,
		"multicast": st.DroppedMulticast,
		"address":   st.DroppedAddress,
	}
	for name, n := range counts {
		want := uint64(0)
		if name == c.count {
			want = 1
		}
		if n != want {
			t.Errorf("%s counted %d, want %d", name, n, want)
		}
	}
	if got != udpTaken {
		return
	}
	p := h.pkts[0]
	src, dst := app4, far4
	if c.frame[0]>>4 == 6 {
		src, dst = app6, far6
	}
	if p.Src != src || p.Dst != dst || !bytes.Equal(p.Payload, udpPay) {
		t.Errorf("%v to %v: %q", p.Src, p.Dst, p.Payload)
	}
	if !bytes.HasPrefix(c.frame, p.Head) {
		t.Error("Head is not the frame's headers")
	}
	if _, ok := appendUnreachable(nil, p.Head, flow.RefusePort); !ok {
		t.Error("Head can't be quoted")
	}
	if st.In != 1 || st.InBytes != uint64(len(udpPay)) {
		t.Errorf("counted %d datagrams of %d bytes", st.In, st.InBytes)
	}
}

func TestUDPSuperFrameIn(t *testing.T) {
	for _, c := range []struct{ total, size, want int }{
		{1000, 400, 3}, {1200, 400, 3}, {400, 400, 1}, {100, 400, 1}, {0, 400, 1}, {65000, 500, 130}, {60000, 1, 60000},
	} {
		for _, to := range []netip.AddrPort{far4, far6} {
			src, off := app4, 20
			if to == far6 {
				src, off = app6, 40
			}
			s, _, h := udpStack(tun.VnetHdr | tun.USO)
			b := s.shards[0].newUDPBatch()
			pay := make([]byte, c.total)
			for i := range pay {
				pay[i] = byte(i / 7)
			}
			ok := b.addFrame(
				rawUDP(src, to, pay),
				&tun.Header{
					Flags:      tun.NeedsCsum,
					CsumStart:  uint16(off),
					CsumOffset: 6,
					GSOType:    tun.GSOUDPL4,
					GSOSize:    uint16(c.size),
				},
			)
			b.flush()
			if !ok || len(h.pkts) != c.want {
				t.Fatalf("%d by %d: ok %v, %d datagrams, want %d", c.total, c.size, ok, len(h.pkts), c.want)
			}
			var got []byte
			for i, p := range h.pkts {
				if i < len(h.pkts)-1 && len(p.Payload) != c.size || p.Src != src || p.Dst != to || len(p.Head) != off+8 {
					t.Fatalf("datagram %d: %d bytes, %v to %v", i, len(p.Payload), p.Src, p.Dst)
				}
				if h.caps[i] != len(p.Payload) {
					t.Fatalf("datagram %d: an append would write over the next one", i)
				}
				got = append(got, p.Payload...)
			}
			if !bytes.Equal(got, pay) {
				t.Fatal("payload differs")
			}
			if st := s.Stats().UDP; st.In != uint64(c.want) || st.InSuper != 1 || st.InBytes != uint64(c.total) {
				t.Fatalf("%+v", st)
			}
		}
	}
}

func TestUDPBurst(t *testing.T) {
	s, _, h := udpStack(0)
	b := s.shards[0].newUDPBatch()
	frame := rawUDP(app4, far4, []byte("x"))
	for !b.full() {
		b.addFrame(frame, &tun.Header{})
	}
	if h.bursts != 0 {
		t.Fatal("handed over before flush")
	}
	b.addFrame(frame, &tun.Header{}) // a reader that does not ask is safe too
	b.flush()
	b.flush()
	if h.bursts != 2 || len(h.pkts) != udpBurst+1 {
		t.Fatalf("%d bursts, %d datagrams", h.bursts, len(h.pkts))
	}
}

func TestUDPUnreachable(t *testing.T) {
	// The app's kernel answers a datagram far -> app, so the quote is of that one.
	i4, _ := appendUnreachable(nil, rawUDP(far4, app4, []byte("x")), flow.RefusePort)
	i6, _ := appendUnreachable(nil, rawUDP(far6, app6, []byte("x")), flow.RefusePort)
	host, _ := appendUnreachable(nil, rawUDP(far4, app4, []byte("x")), flow.RefuseHost)
	tcp, _ := appendUnreachable(nil, sum4(mod(rawUDP(far4, app4, make([]byte, 20)), 9, 6)), flow.RefusePort)
	for _, c := range []struct {
		name        string
		frame       []byte
		app, remote netip.AddrPort
		ok          bool
	}{
		{"IPv4", i4, app4, far4, true},
		{"IPv6", i6, app6, far6, true},
		{"host unreachable", host, netip.AddrPort{}, netip.AddrPort{}, false},
		{"about TCP", tcp, netip.AddrPort{}, netip.AddrPort{}, false},
		{"wrong checksum", mod(i4, 24, 1), netip.AddrPort{}, netip.AddrPort{}, false},
		{"wrong checksum IPv6", mod(i6, 44, 1), netip.AddrPort{}, netip.AddrPort{}, false},
		{"from a third host", sum4(mod(i4, 12, 10, 9, 9, 9)), netip.AddrPort{}, netip.AddrPort{}, false},
	} {
		s, _, h := udpStack(0)
		b := s.shards[0].newUDPBatch()
		if ok := b.addFrame(c.frame, &tun.Header{}); ok != c.ok || h.app != c.app || h.remote != c.remote {
			t.Errorf("%s: %v, app %v remote %v", c.name, ok, h.app, h.remote)
		}
		for n := range c.frame { // every length is safe
			b.addICMP(c.frame[:max(n, 40)], min(20, n), &tun.Header{Flags: tun.DataValid})
		}
	}
}

func FuzzUDPAdd(f *testing.F) {
	f.Add(rawUDP(app4, far4, []byte("x")), uint8(0), uint8(0), uint16(0), uint16(0))
	f.Add(rawUDP(app6, far6, []byte("x")), uint8(1), uint8(0), uint16(0), uint16(40))
	f.Add(rawUDP(app4, far4, make([]byte, 300)), uint8(1), uint8(5), uint16(1), uint16(20))
	f.Add(withExt(rawUDP(app6, far6, []byte("x")), 0, 17, 0, 1, 4, 0, 0, 0, 0), uint8(0), uint8(0), uint16(0), uint16(0))
	icmp, _ := appendUnreachable(nil, rawUDP(far6, app6, []byte("x")), flow.RefusePort)
	f.Add(icmp, uint8(0), uint8(0), uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, frame []byte, flags, gso uint8, size, start uint16) {
		s, _, h := udpStack(0)
		b := s.shards[0].newUDPBatch()
		ok := b.addFrame(frame, &tun.Header{Flags: flags, GSOType: gso, GSOSize: size, CsumStart: start, CsumOffset: 6})
		b.flush()
		st := s.Stats().UDP
		dropped := st.DroppedAddress + st.DroppedChecksum + st.DroppedMalformed + st.DroppedMulticast
		if !ok && (len(h.pkts) > 0 || dropped > 0) {
			t.Fatal("taken, and given to gVisor as well")
		}
		if ok && (len(h.pkts) > 0) == (dropped+st.Unreachable > 0) {
			t.Fatalf("%d datagrams, %d dropped", len(h.pkts), dropped)
		}
		for _, p := range h.pkts {
			if len(p.Head) < 28 || !p.Src.Addr().IsValid() || p.Dst.Port() == 0 || p.Dst.Addr().IsMulticast() ||
				p.Dst.Addr().IsLoopback() {
				t.Fatalf("%+v", p)
			}
		}
	})
}

func BenchmarkUDPAdd(b *testing.B) {
	for _, c := range []struct {
		name   string
		size   int
		h      tun.Header
		frames int
	}{
		{"200B", 200, tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 6}, 64},
		{"200B verify", 200, tun.Header{}, 64},
		{"super 45x1400", 45 * 1400, tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 6, GSOType: tun.GSOUDPL4,
			GSOSize: 1400}, 1},
	} {
		b.Run(strings.ReplaceAll(c.name, " ", "-"), func(b *testing.B) {
			s, _, h := udpStack(0)
			h.quiet = true
			batch := s.shards[0].newUDPBatch()
			frame := rawUDP(app4, far4, make([]byte, c.size))
			b.ReportAllocs()
			b.SetBytes(int64(c.size))
			for i := 0; b.Loop(); i++ {
				if !batch.addFrame(frame, &c.h) {
					b.Fatal("not taken")
				}
				if i%c.frames == 0 {
					batch.flush()
				}
			}
			if s.Stats().UDP.DroppedChecksum != 0 {
				b.Fatal("dropped")
			}
		})
	}
}

// The way of a datagram costs no allocation, in or out.
func TestUDPAllocatesNothing(t *testing.T) {
	s, d, h := udpStack(tun.VnetHdr | tun.TSO | tun.USO)
	d.quiet, h.quiet = true, true
	b := s.shards[0].newUDPBatch()
	w := s.PacketWriter(0)
	one, six := rawUDP(app4, far4, make([]byte, 200)), rawUDP(app6, far6, make([]byte, 9000))
	super := tun.Header{Flags: tun.NeedsCsum, CsumStart: 40, CsumOffset: 6, GSOType: tun.GSOUDPL4, GSOSize: 100}
	out := append(repeat(20, 1200, far4, app4), repeat(3, 65527, far6, app6)...)
	refused := flow.Packet{Src: app4, Dst: far4, Head: one[:28]}
	if n := testing.AllocsPerRun(100, func() {
		b.addFrame(one, &tun.Header{})
		b.addFrame(six, &super)
		b.flush()
		_, _ = w.WritePackets(out)
		w.Refuse(refused, flow.RefusePort)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if st := s.Stats().UDP; st.In < 9000 || st.Out < 2300 || st.Refused < 100 {
		t.Errorf("%+v", st)
	}
}
