package stack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// cutFrame takes a written frame apart as the kernel would: the checksum that is to be filled in is filled in, and a
// super-frame becomes its datagrams. Each is given as a whole IP packet to the fast path, which verifies everything.
func cutFrame(t *testing.T, f recFrame) []flow.Packet {
	t.Helper()
	p, off := bytes.Clone(f.p), 40
	if p[0]>>4 == 4 {
		off = 20
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || checksum.Checksum(p[:20], 0) != 0xffff || p[6] != 0 || p[7] != 0 {
			t.Fatalf("bad IPv4 header %x", p[:20])
		}
	} else if int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) {
		t.Fatalf("bad IPv6 header %x", p[:40])
	}
	if f.h.Flags == tun.NeedsCsum {
		if int(f.h.HdrLen) != off+8 || int(f.h.CsumStart) != off || f.h.CsumOffset != 6 {
			t.Fatalf("%+v", f.h)
		}
		// What is in the field is the sum of the pseudo-header, so the sum over it all is the datagram's.
		sum := ^checksum.Checksum(p[off:], 0)
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(p[off+6:], sum)
	} else if f.h != (tun.Header{}) {
		t.Fatalf("%+v", f.h)
	}
	s, _, h := udpStack(0)
	b := s.shards[0].newUDPBatch()
	// The sum over a super-frame is that of no datagram, but it proves the pseudo-header.
	if !b.addFrame(p, &tun.Header{}) {
		t.Fatal("not UDP")
	}
	b.flush()
	if len(h.pkts) != 1 {
		t.Fatalf("refused: %+v", s.Stats().UDP)
	}
	one := h.pkts[0]
	if f.h.GSOType == tun.GSONone {
		return h.pkts
	}
	if f.h.GSOType != tun.GSOUDPL4 || f.h.GSOSize == 0 {
		t.Fatalf("%+v", f.h)
	}
	var out []flow.Packet
	for rest := one.Payload; len(rest) > 0; {
		n := min(int(f.h.GSOSize), len(rest))
		out = append(out, flow.Packet{Src: one.Src, Dst: one.Dst, Payload: rest[:n]})
		rest = rest[n:]
	}
	return out
}

// fill makes n bytes that differ with n.
func fill(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*31 + n)
	}
	return b
}

func repeat(n, size int, src, dst netip.AddrPort) (ps []flow.Packet) {
	for range n {
		ps = append(ps, flow.Packet{Src: src, Dst: dst, Payload: fill(size)})
	}
	return ps
}

func TestUDPWrite(t *testing.T) {
	other := addr("198.51.100.9:1")
	cat := func(ps ...[]flow.Packet) (out []flow.Packet) {
		for _, p := range ps {
			out = append(out, p...)
		}
		return out
	}
	all := tun.VnetHdr | tun.TSO | tun.USO
	for _, c := range []struct {
		name   string
		off    tun.Offload
		ps     []flow.Packet
		frames int
		skip   int
	}{
		{"nothing", all, nil, 0, 0},
		{"one", all, repeat(1, 100, far4, app4), 1, 0},
		{"empty", all, repeat(3, 0, far4, app4), 3, 0},
		{"run", all, repeat(10, 1200, far4, app4), 1, 0},
		{"run IPv6", all, repeat(10, 1200, far6, app6), 1, 0},
		{"run without USO", tun.VnetHdr, repeat(10, 1200, far4, app4), 10, 0},
		{"run without headers", 0, repeat(10, 1201, far4, app4), 10, 0},
		{"run without headers IPv6", 0, repeat(10, 1201, far6, app6), 10, 0},
		{"shorter last", all, cat(repeat(3, 1200, far4, app4), repeat(1, 7, far4, app4)), 1, 0},
		{"shorter in the middle", all, cat(repeat(3, 1200, far4, app4), repeat(1, 7, far4, app4), repeat(2, 1200, far4, app4)), 2,
			0},
		{"empty in the middle", all, cat(repeat(3, 1200, far4, app4), repeat(1, 0, far4, app4), repeat(2, 1200, far4, app4)), 3,
			0},
		{"growing", all, cat(repeat(1, 10, far4, app4), repeat(1, 20, far4, app4), repeat(1, 30, far4, app4)), 3, 0},
		{"another source", all, cat(repeat(2, 10, far4, app4), repeat(2, 10, other, app4)), 2, 0},
		{"another port", all, cat(repeat(2, 10, far4, app4), repeat(2, 10, far4, netip.AddrPortFrom(app4.Addr(), 9))), 2, 0},
		{"too many for one", all, repeat(300, 8, far4, app4), 3, 0},
		{"too long for one", all, repeat(60, 1400, far4, app4), 2, 0},
		{"largest", all, repeat(1, 65507, far4, app4), 1, 0},
		{"largest without headers", 0, repeat(1, 65507, far4, app4), 1, 0},
		{"largest IPv6", all, repeat(2, 65527, far6, app6), 2, 0},
		{"too large", all, cat(repeat(1, 65508, far4, app4), repeat(1, 5, far4, app4)), 1, 1},
		{"too large IPv6", all, repeat(1, 65528, far6, app6), 0, 1},
		{"wrong family", all, cat(repeat(1, 5, far6, app4), repeat(1, 5, far4, app6), repeat(1, 5, far4, app4)), 1, 2},
		{"no source", all, repeat(1, 5, netip.AddrPort{}, app4), 0, 1},
		{"mapped", all, repeat(1, 5, netip.AddrPortFrom(netip.AddrFrom16(far4.Addr().As16()), 5), app6), 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) { checkUDPWrite(t, c.off, c.ps, c.frames, c.skip) })
	}
}

// checkUDPWrite writes datagrams, of which skip must be left out, and wants them in a number of frames.
func checkUDPWrite(t *testing.T, off tun.Offload, ps []flow.Packet, frames, skip int) {
	t.Helper()
	s, d, _ := udpStack(off)
	n, err := s.PacketWriter(0).WritePackets(ps)
	if err != nil || n != len(ps)-skip {
		t.Fatalf("wrote %d of %d: %v", n, len(ps), err)
	}
	if len(d.frames) != frames {
		t.Errorf("%d frames, want %d", len(d.frames), frames)
	}
	var got []flow.Packet
	for _, f := range d.frames {
		if len(f.p) > 65535+40 {
			t.Errorf("a frame of %d bytes", len(f.p))
		}
		got = append(got, cutFrame(t, f)...)
	}
	var want []flow.Packet
	bytesWant := 0
	for _, p := range ps {
		if limit, ok := addresses(&p); ok && len(p.Payload) <= limit {
			want = append(want, p)
			bytesWant += len(p.Payload)
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%d datagrams, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].Src != want[i].Src || got[i].Dst != want[i].Dst || !bytes.Equal(got[i].Payload, want[i].Payload) {
			t.Fatalf("datagram %d differs", i)
		}
	}
	st := s.Stats().UDP
	if int(st.Out) != n || int(st.OutBytes) != bytesWant || int(st.OutTooLong+st.OutAddress) != skip {
		t.Errorf("%+v", st)
	}
}

func TestUDPWriteID(t *testing.T) {
	s, d, _ := udpStack(tun.VnetHdr | tun.USO)
	w := s.PacketWriter(0)
	_, _ = w.WritePackets(repeat(5, 100, far4, app4))
	_, _ = w.WritePackets(repeat(1, 100, far4, app4))
	a, b := binary.BigEndian.Uint16(d.frames[0].p[4:]), binary.BigEndian.Uint16(d.frames[1].p[4:])
	if b-a != 5 {
		t.Fatalf("ID %d, then %d: each of 5 segments takes one", a, b)
	}
}

// A sum of zero is written as all ones: zero means that there is no checksum, which IPv6 forbids.
func TestUDPWriteZeroSum(t *testing.T) {
	for _, c := range []struct{ src, dst netip.AddrPort }{{far4, app4}, {far6, app6}} {
		// With this payload the sum over the datagram comes out as zero.
		p := rawUDP(c.src, c.dst, []byte{0, 0})
		payload := bytes.Clone(p[len(p)-4 : len(p)-2]) // the checksum of the one with zeros
		s, d, _ := udpStack(0)
		if _, err := s.PacketWriter(0).WritePackets([]flow.Packet{{Src: c.src, Dst: c.dst, Payload: payload}}); err != nil {
			t.Fatal(err)
		}
		f := d.frames[0].p
		if got := f[len(f)-4 : len(f)-2]; got[0] != 0xff || got[1] != 0xff {
			t.Errorf("%v: checksum %x", c.src, got)
		}
	}
}

func TestUDPWriteErrors(t *testing.T) {
	ps := repeat(3, 100, far4, app4)
	// A full device loses the frame and nothing else.
	s, d, _ := udpStack(tun.VnetHdr | tun.USO)
	d.err = func(*tun.Header) error { return tun.ErrAgain }
	w := s.PacketWriter(0)
	if n, err := w.WritePackets(ps); n != 0 || err != nil || s.Stats().UDP.OutFull != 3 {
		t.Fatalf("full: %d %v %+v", n, err, s.Stats().UDP)
	}
	d.err = nil
	if n, err := w.WritePackets(ps); n != 3 || err != nil {
		t.Fatalf("after full: %d %v", n, err)
	}
	for _, e := range []error{os.ErrClosed, &os.PathError{Op: "write", Err: unix.EBADFD}} {
		d.err = func(*tun.Header) error { return e }
		if n, err := w.WritePackets(ps); n != 0 || !errors.Is(err, e) {
			t.Fatalf("%v: %d %v", e, n, err)
		}
	}
	// A kernel that does not take the super-frame gets the datagrams one by one.
	s, d, _ = udpStack(tun.VnetHdr | tun.USO)
	d.err = func(h *tun.Header) error {
		if h.GSOType != 0 {
			return tun.ErrBadFrame
		}
		return nil
	}
	w = s.PacketWriter(0)
	for range 2 {
		if n, err := w.WritePackets(ps); n != 3 || err != nil {
			t.Fatalf("refused super-frame: %d %v", n, err)
		}
	}
	if d.writes != 1+6 {
		t.Fatalf("%d writes: the refusal must be remembered", d.writes)
	}
}

func TestUDPRefuse(t *testing.T) {
	s, d, h := udpStack(0)
	b := s.shards[0].newUDPBatch()
	for _, p := range [][]byte{rawUDP(app4, far4, []byte("x")), rawUDP(app6, far6, []byte("x"))} {
		b.addFrame(p, &tun.Header{})
	}
	b.flush()
	w := s.PacketWriter(0)
	for i, p := range h.pkts {
		w.Refuse(p, flow.RefuseReset)
		typ, code, quote := checkICMP(t, d.frames[i].p, p.Dst.Addr(), p.Src.Addr())
		if want := [2][2]byte{{3, 3}, {1, 4}}[i]; [2]byte{typ, code} != want || !bytes.Equal(quote, p.Head) {
			t.Errorf("%d/%d quoting %x", typ, code, quote)
		}
		if d.frames[i].h != (tun.Header{}) {
			t.Errorf("%+v", d.frames[i].h)
		}
	}
	w.Refuse(h.pkts[0], flow.RefuseSilent)
	w.Refuse(flow.Packet{Src: app4, Dst: far4}, flow.RefuseHost) // nothing to quote
	if st := s.Stats().UDP; len(d.frames) != 2 || st.Refused != 2 || st.RefusedMute != 1 {
		t.Errorf("%d frames, %+v", len(d.frames), st)
	}
}

// What the writer writes, the reader's fast path must read: for any sizes.
func FuzzUDPWrite(f *testing.F) {
	f.Add([]byte{10, 10, 10, 3}, true, uint8(7))
	f.Add([]byte{255, 255, 0, 255, 1}, false, uint8(7))
	f.Add([]byte{1, 2, 3}, false, uint8(0))
	f.Fuzz(func(t *testing.T, sizes []byte, v6 bool, off uint8) {
		src, dst := far4, app4
		if v6 {
			src, dst = far6, app6
		}
		var ps []flow.Packet
		for _, n := range sizes {
			ps = append(ps, flow.Packet{Src: src, Dst: dst, Payload: fill(int(n) * 257)})
		}
		s, d, _ := udpStack(tun.Offload(off))
		w := s.PacketWriter(0).(*packetWriter)
		n, err := w.WritePackets(ps)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range w.parts {
			if p != nil {
				t.Fatal("lent payload is kept")
			}
		}
		var got []flow.Packet
		for _, f := range d.frames {
			got = append(got, cutFrame(t, f)...)
		}
		if len(got) != n {
			t.Fatalf("%d datagrams, said %d", len(got), n)
		}
		for _, p := range ps {
			if limit, _ := addresses(&p); len(p.Payload) > limit {
				continue
			}
			if !bytes.Equal(got[0].Payload, p.Payload) {
				t.Fatal("differs")
			}
			got = got[1:]
		}
	})
}

func BenchmarkUDPWrite(b *testing.B) {
	for _, c := range []struct {
		name string
		off  tun.Offload
		ps   []flow.Packet
	}{
		{"200B", tun.VnetHdr, repeat(1, 200, far4, app4)},
		{"200B-sum", 0, repeat(1, 200, far4, app4)},
		{"super-45x1400", tun.VnetHdr | tun.USO, repeat(45, 1400, far4, app4)},
		{"super-45x1400-IPv6", tun.VnetHdr | tun.USO, repeat(45, 1400, far6, app6)},
	} {
		b.Run(c.name, func(b *testing.B) {
			s, d, _ := udpStack(c.off)
			d.quiet = true
			w := s.PacketWriter(0)
			b.ReportAllocs()
			for b.Loop() {
				if n, err := w.WritePackets(c.ps); n != len(c.ps) || err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
	b.Run("refuse", func(b *testing.B) {
		s, d, _ := udpStack(0)
		d.quiet = true
		w := s.PacketWriter(0)
		p := flow.Packet{Src: app4, Dst: far4, Head: rawUDP(app4, far4, nil)}
		b.ReportAllocs()
		for b.Loop() {
			w.Refuse(p, flow.RefusePort)
		}
	})
}
