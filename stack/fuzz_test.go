package stack

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// FuzzReader throws arbitrary headers and frames at the frame reader: nothing may panic, and every frame is either
// counted as dropped or handed on. Requests are answered in turn with each thing that can be done to them.
func FuzzReader(f *testing.F) {
	seedFrames(f)
	seedUDP(f)
	dev, far := tuntest.Pipe(1500, offAll)
	n, frames := 0, 0
	var now []byte // the frame under test
	s, err := New(Config{Device: dev, Limits: Limits{Pending: 100}, Handler: &fuzzHandler{packets: func(ps []flow.Packet) {
		checkPackets(ps, now)
	}, testHandler: testHandler{f: func(r flow.StreamRequest) {
		_ = r.Flow()
		n++
		switch why := n % 8; why {
		case 7: // left pending
		case 6:
			c := newTestConn()
			r.Accept(c)
		default:
			r.Reject(flow.Refusal(why))
		}
	}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	buf := make([]byte, tun.MaxFrame)
	r := newFrameReader(s.shards[0])
	f.Fuzz(func(t *testing.T, hb, frame []byte, inView bool) {
		if len(hb) < tun.HeaderLen || len(frame) > viewSize {
			return
		}
		h := tun.ParseHeader(hb)
		b, at := frame, inArena
		if inView {
			at = inTheView
			if r.view == nil {
				r.view = buffer.NewViewSize(viewSize)
			}
			b = r.view.AsSlice()[:copy(r.view.AsSlice(), frame)]
		} else {
			b = r.arena[:copy(r.arena, frame)]
		}
		now = b
		r.take(&h, b, at)
		r.flush()
		if frames++; frames%(1<<16) == 0 { // nothing piles up: views, requests, goroutines
			if held, g := heapBytes(), runtime.NumGoroutine(); held > 64<<20 || g > 1000 {
				t.Fatalf("%d bytes of heap and %d goroutines after %d frames", held, g, frames)
			}
		}
		for { // what was answered must be packets
			m, err := far.Read(&h, buf, false)
			if err != nil {
				break
			}
			if v, _ := inspectFrame(&h, buf[:m]); v == dropMalformed || v == dropProto {
				t.Fatalf("the stack wrote % x", buf[:m])
			}
		}
	})
}

// checkPackets panics if datagrams are not those of a frame.
func checkPackets(ps []flow.Packet, now []byte) {
	bytes := 0
	for _, p := range ps {
		bytes += len(p.Payload)
		if len(p.Head) < ip4HeaderLen+udpHeaderLen || !p.Src.IsValid() || !p.Dst.IsValid() || p.Src.Port() == 0 ||
			p.Dst.Port() == 0 ||
			cap(p.Payload) != len(p.Payload) {
			panic(fmt.Sprintf("%+v of % x", p, now))
		}
	}
	if bytes > len(now) && len(ps) > 1 { // one alone may be of fragments that came before
		panic(fmt.Sprintf("%d bytes in %d datagrams of % x", bytes, len(ps), now))
	}
}

func frameHeader(h tun.Header) []byte {
	b := make([]byte, tun.HeaderLen)
	h.Put(b)
	return b
}

func seedFrames(f *testing.F) {
	s4, s6 := netip.AddrPortFrom(appIP4, 1), netip.AddrPortFrom(appIP6, 1)
	syn4 := segment(
		s4,
		srv4,
		1,
		0,
		header.TCPFlagSyn,
		[]byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7},
		nil,
	)
	syn6 := segment(s6, srv6, 1, 0, header.TCPFlagSyn, nil, nil)
	f.Add(frameHeader(tun.Header{}), syn4, false)
	f.Add(frameHeader(tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 16}), syn4, true)
	f.Add(frameHeader(tun.Header{Flags: tun.NeedsCsum, CsumStart: 65535, CsumOffset: 65535}), syn4, false)
	f.Add(frameHeader(tun.Header{Flags: tun.DataValid, GSOType: tun.GSOTCPv6, GSOSize: 1, HdrLen: 65535}), syn6, true)
	f.Add(frameHeader(tun.Header{GSOType: tun.GSOUDPL4 | tun.GSOECN, GSOSize: 1}), syn6, false)
	f.Add(frameHeader(tun.Header{}), segment(s4, srv4, 1, 1, header.TCPFlagRst, nil, nil), false)
	f.Add(frameHeader(tun.Header{}), segment(s6, srv6, 1, 1, header.TCPFlagAck, nil, make([]byte, 700)), true)
	ext := append([]byte(nil), syn6[:40]...)
	ext[6] = protoHopByHop
	f.Add(
		frameHeader(tun.Header{}),
		append(append(ext, protoFragment, 0, 1, 4, 0, 0, 0, 0, protoTCP, 0, 0, 1, 0, 0, 0, 9), syn6[40:]...),
		false,
	)
	f.Add(frameHeader(tun.Header{}), []byte{0x45}, false)
	f.Add(frameHeader(tun.Header{}), []byte{}, true)
}

func seedUDP(f *testing.F) {
	s4, s6 := netip.AddrPortFrom(appIP4, 1), netip.AddrPortFrom(appIP6, 1)
	// Super-frames of UDP, whole and with each thing wrong that a header can say.
	for _, from := range []netip.AddrPort{s4, s6} {
		to, off := srv4, ip4HeaderLen
		if from == s6 {
			to, off = srv6, ip6HeaderLen
		}
		d := stacktest.Datagram{Src: from, Dst: to, Payload: make([]byte, 3001)}.SuperFrame(1000)
		for _, change := range []func(*tun.Header){
			func(*tun.Header) {},
			func(h *tun.Header) { h.GSOSize = 0 },
			func(h *tun.Header) { h.GSOSize = 65535 },
			func(h *tun.Header) { h.GSOSize = 1 },
			func(h *tun.Header) { h.HdrLen = uint16(len(d.Data)) + 1 },
			func(h *tun.Header) { h.HdrLen = 0 },
			func(h *tun.Header) { h.CsumStart = uint16(len(d.Data)) },
			func(h *tun.Header) { h.CsumStart, h.CsumOffset = uint16(off)+8, 6 },
			func(h *tun.Header) { h.Flags = 0 },
			func(h *tun.Header) { h.GSOType = tun.GSOTCPv4 },
		} {
			h := d.Header
			change(&h)
			f.Add(frameHeader(h), d.Data, false)
			f.Add(frameHeader(h), d.Data, true)
		}
		f.Add(frameHeader(d.Header), d.Data[:off+9], false)
	}
	// Extension headers of IPv6, cut everywhere.
	for _, next := range []byte{protoHopByHop, protoDestOpts, protoRouting, protoFragment} {
		u := stacktest.Datagram{Src: s6, Dst: srv6, Payload: []byte("x")}.Frame().Data
		p := withExt(u, next, protoUDP, 0, 1, 4, 0, 0, 0, 0)
		for _, n := range []int{40, 41, 47, 48, len(p) - 1, len(p)} {
			q := append([]byte(nil), p[:n]...)
			binary.BigEndian.PutUint16(q[4:], uint16(n-40))
			f.Add(frameHeader(tun.Header{}), q, n%2 == 0)
		}
	}
}

// fuzzHandler looks at the datagrams too.
type fuzzHandler struct {
	testHandler
	packets func([]flow.Packet)
}

func (h *fuzzHandler) HandlePackets(_ int, ps []flow.Packet) { h.packets(ps) }

// BenchmarkReader takes frames as they come from the device: no allocation for a frame.
func BenchmarkReader(b *testing.B) {
	s4 := netip.AddrPortFrom(appIP4, 1)
	for name, n := range map[string]int{"ack": 0, "1448": 1448, "60K": 60 << 10} {
		b.Run(name, func(b *testing.B) {
			dev, _ := tuntest.Pipe(1500, offAll)
			s, err := New(Config{Device: dev, Handler: new(testHandler)})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			r := newFrameReader(s.shards[0])
			frame := segment(s4, srv4, 1, 1, header.TCPFlagRst, nil, make([]byte, n)) // RST: nobody answers
			h := tun.Header{Flags: tun.DataValid}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				if n > handOn {
					if r.view == nil {
						r.view = buffer.NewViewSize(viewSize)
					}
					copy(r.view.AsSlice(), frame[:100])
					r.take(&h, r.view.AsSlice()[:len(frame)], inTheView)
				} else {
					r.take(&h, frame, inArena)
				}
			}
		})
	}
}
