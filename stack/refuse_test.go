package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// segment builds a TCP segment with its checksums.
func segment(src, dst netip.AddrPort, seq, ack uint32, flags header.TCPFlags, opts, data []byte) []byte {
	n := tcpHeaderLen + len(opts) + len(data)
	var b []byte
	var t header.TCP
	if src.Addr().Is4() {
		b = make([]byte, ip4HeaderLen+n)
		ip := header.IPv4(b)
		ip.Encode(
			&header.IPv4Fields{
				TotalLength: uint16(len(b)),
				TTL:         64,
				Protocol:    protoTCP,
				SrcAddr:     addrTo(src.Addr()),
				DstAddr:     addrTo(dst.Addr()),
			},
		)
		ip.SetChecksum(^ip.CalculateChecksum())
		t = header.TCP(b[ip4HeaderLen:])
	} else {
		b = make([]byte, ip6HeaderLen+n)
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(n), TransportProtocol: protoTCP, HopLimit: 64,
			SrcAddr: addrTo(src.Addr()), DstAddr: addrTo(dst.Addr())})
		t = header.TCP(b[ip6HeaderLen:])
	}
	t.Encode(
		&header.TCPFields{
			SrcPort:    src.Port(),
			DstPort:    dst.Port(),
			SeqNum:     seq,
			AckNum:     ack,
			DataOffset: uint8(tcpHeaderLen + len(opts)),
			Flags:      flags,
			WindowSize: 65535,
		},
	)
	copy(t[tcpHeaderLen:], opts)
	copy(t[tcpHeaderLen+len(opts):], data)
	x := header.PseudoHeaderChecksum(protoTCP, addrTo(src.Addr()), addrTo(dst.Addr()), uint16(n))
	t.SetChecksum(^t.CalculateChecksum(checksum.Checksum(data, x)))
	return b
}

// rawStack is a running stack, and the device that stands for the app's kernel.
type rawStack struct {
	t    testing.TB
	s    *Stack
	dev  *tuntest.Device
	reqs chan flow.StreamRequest
}

func newRaw(t testing.TB, cfg Config) *rawStack { return newRawOver(t, offAll, cfg) }

func newRawOver(t testing.TB, off tun.Offload, cfg Config) *rawStack {
	testkit.CheckLeaks(t)
	a, b := tuntest.Pipe(1500, off)
	r := &rawStack{t: t, dev: b, reqs: make(chan flow.StreamRequest, 100)}
	cfg.Device = a
	if cfg.Handler == nil {
		cfg.Handler = &testHandler{ch: r.reqs}
	}
	if cfg.Sockets == nil {
		cfg.Sockets = new(fakeSockets) // the app is there, however long the test takes
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.s = s
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		b.Close()
	})
	return r
}

func (r *rawStack) send(h tun.Header, b []byte) {
	r.t.Helper()
	if err := r.dev.Write(&h, [][]byte{b}); err != nil {
		r.t.Fatal(err)
	}
}

// recv is the next frame, nil if none comes in time.
func (r *rawStack) recv(d time.Duration) (tun.Header, []byte) {
	b := make([]byte, tun.MaxFrame)
	var h tun.Header
	var got []byte
	testkit.Until(d, func() bool {
		n, err := r.dev.Read(&h, b, false)
		if err == nil {
			got = b[:n]
		} else if !errors.Is(err, tun.ErrAgain) {
			r.t.Fatal(err)
		}
		return err == nil
	})
	return h, got
}

func (r *rawStack) request() flow.StreamRequest {
	r.t.Helper()
	select {
	case q := <-r.reqs:
		return q
	case <-time.After(testkit.Patience):
		r.t.Fatal("no request")
		return nil
	}
}

// quiet: nothing comes, and nobody asked.
func (r *rawStack) quiet() {
	r.t.Helper()
	if _, b := r.recv(50 * time.Millisecond); b != nil {
		r.t.Fatalf("a frame came: % x", b)
	}
	if len(r.reqs) != 0 {
		r.t.Fatal("a request came")
	}
}

// refusalCase is what a program gets for a refusal.
type refusalCase struct {
	why            flow.Refusal
	typ4, code4    byte
	typ6, code6    byte
	reset, nothing bool
}

func TestRefusal(t *testing.T) {
	src4, src6 := netip.AddrPortFrom(appIP4, 1234), netip.AddrPortFrom(appIP6, 1234)
	for _, tt := range []refusalCase{
		{why: flow.RefuseReset, reset: true},
		{why: flow.RefusePort, reset: true},
		{why: flow.RefuseNet, typ4: 3, code4: 0, typ6: 1, code6: 0},
		{why: flow.RefuseHost, typ4: 3, code4: 1, typ6: 1, code6: 3},
		{why: flow.RefuseAdmin, typ4: 3, code4: 13, typ6: 1, code6: 1},
		{why: flow.RefuseSilent, nothing: true},
	} {
		for _, v6 := range []bool{false, true} {
			src, dst := src4, srv4
			if v6 {
				src, dst = src6, srv6
			}
			t.Run(tt.why.String()+"/"+dst.String(), func(t *testing.T) {
				// The answer is given again for 3 s, which a machine that stalls can miss, but not each time.
				for i := 1; ; i++ {
					began := time.Now()
					err := tt.try(t, src, dst)
					if err == nil {
						break
					}
					if i == 5 || time.Since(began) < 2*time.Second {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

// try refuses a SYN, and reads the answer to it twice.
func (tt refusalCase) try(t *testing.T, src, dst netip.AddrPort) error {
	t.Helper()
	r := newRaw(t, Config{})
	// With data, as TCP Fast Open has.
	syn := segment(src, dst, 1000, 0, header.TCPFlagSyn, []byte{2, 4, 5, 0xb4}, []byte("hello"))
	r.send(tun.Header{}, syn)
	req := r.request()
	if f := req.Flow(); f.Src != src || f.Dst != dst || f.Proto != flow.TCP || f.Start.IsZero() {
		return fmt.Errorf("flow %+v", f)
	}
	r.quiet()
	req.Reject(tt.why)
	req.Reject(flow.RefuseReset)
	req.Accept(newTestConn())
	for range 2 { // and again to the same SYN
		if tt.nothing {
			r.quiet()
			r.send(tun.Header{}, syn)
			continue
		}
		_, b := r.recv(5 * time.Second)
		if b == nil {
			return errors.New("no answer")
		}
		if err := tt.checkAnswer(b, syn, src, dst); err != nil {
			return err
		}
		r.send(tun.Header{}, syn)
	}
	testkit.Eventually(t, "the count", func() bool { return r.s.Stats().Refused == 1 })
	return nil
}

// checkAnswer checks the answer b to a SYN from src to dst.
func (tt refusalCase) checkAnswer(b, syn []byte, src, dst netip.AddrPort) error {
	hdr, typ, code := ip4HeaderLen, tt.typ4, tt.code4
	if src.Addr().Is6() {
		hdr, typ, code = ip6HeaderLen, tt.typ6, tt.code6
		ip := header.IPv6(b)
		if !ip.IsValid(len(b)) || ip.SourceAddress() != addrTo(dst.Addr()) ||
			ip.DestinationAddress() != addrTo(src.Addr()) {
			return fmt.Errorf("IPv6 header % x", b[:40])
		}
	} else {
		ip := header.IPv4(b)
		if !ip.IsValid(len(b)) || !ip.IsChecksumValid() || ip.SourceAddress() != addrTo(dst.Addr()) ||
			ip.DestinationAddress() != addrTo(src.Addr()) {
			return fmt.Errorf("IPv4 header % x", b[:20])
		}
	}
	if tt.reset {
		h := header.TCP(b[hdr:])
		if !h.IsChecksumValid(addrTo(dst.Addr()), addrTo(src.Addr()), 0, 0) {
			return errors.New("checksum")
		}
		if h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.AckNumber() != 1006 || h.SequenceNumber() != 0 ||
			h.SourcePort() != dst.Port() || h.DestinationPort() != src.Port() || len(b) != hdr+tcpHeaderLen {
			return fmt.Errorf("RST % x", b)
		}
		return nil
	}
	if b[hdr] != typ || b[hdr+1] != code {
		return fmt.Errorf("ICMP type %d code %d", b[hdr], b[hdr+1])
	}
	if q := b[hdr+8:]; len(q) < hdr+8 || string(q[:hdr+8]) != string(syn[:hdr+8]) {
		return fmt.Errorf("quote % x", q)
	}
	return nil
}

// A SYN that is to come again later gets no answer, and is a new request when it does.
func TestRefusalLater(t *testing.T) {
	r := newRaw(t, Config{})
	syn := segment(netip.AddrPortFrom(appIP4, 1234), srv4, 1000, 0, header.TCPFlagSyn, nil, nil)
	for range 3 {
		r.send(tun.Header{}, syn)
		r.request().Reject(flow.RefuseLater)
		r.quiet()
	}
}

// A connection to an address that no packet can come from is refused by the far end of the TUN, at once.
func TestRefusalOfImpossible(t *testing.T) {
	src4, src6 := netip.AddrPortFrom(appIP4, 1234), netip.AddrPortFrom(appIP6, 1234)
	for _, tt := range []struct {
		dst  string
		from netip.Addr
	}{
		{"0.1.2.3:80", flow.Gateway4},
		{"240.0.0.1:80", flow.Gateway4},
		{"[::ffff:203.0.113.7]:80", flow.Gateway6},
	} {
		t.Run(tt.dst, func(t *testing.T) {
			dst := netip.MustParseAddrPort(tt.dst)
			src := src4
			if dst.Addr().Is6() {
				src = src6
			}
			r := newRaw(t, Config{})
			syn := segment(src, dst, 1000, 0, header.TCPFlagSyn, nil, nil)
			r.send(tun.Header{}, syn)
			if dst.Addr().Is4() {
				r.request().Reject(flow.RefuseNet)
			}
			_, b := r.recv(testkit.Patience)
			if len(b) == 0 {
				t.Fatal("no answer")
			}
			var from, to tcpip.Address
			var icmp []byte
			if dst.Addr().Is4() {
				from, to, icmp = header.IPv4(b).SourceAddress(), header.IPv4(b).DestinationAddress(), b[ip4HeaderLen:]
			} else {
				from, to, icmp = header.IPv6(b).SourceAddress(), header.IPv6(b).DestinationAddress(), b[ip6HeaderLen:]
			}
			if from != addrTo(tt.from) || to != addrTo(src.Addr()) || icmp[1] != 0 || !bytes.Contains(icmp, syn) {
				t.Errorf("the answer % x", b)
			}
			// Only a SYN begins something that can be refused.
			if dst.Addr().Is6() {
				r.send(tun.Header{}, segment(src, dst, 1000, 1, header.TCPFlagAck, nil, nil))
				r.quiet()
			}
		})
	}
}

// TestSYN is what a SYN and what is like a SYN gets.
func TestSYN(t *testing.T) {
	src := netip.AddrPortFrom(appIP4, 1234)
	r := newRaw(t, Config{})
	r.send(tun.Header{}, segment(src, srv4, 1000, 0, header.TCPFlagSyn, nil, nil))
	first := r.request()
	cancelled := make(chan struct{})
	first.OnCancel(func() { close(cancelled) })
	r.send(tun.Header{}, segment(src, srv4, 1000, 0, header.TCPFlagSyn, nil, nil))
	r.quiet()
	testkit.Eventually(t, "the retransmission to be counted", func() bool { return r.s.Stats().Retransmits == 1 })
	// Another ISN replaces the first.
	r.send(tun.Header{}, segment(src, srv4, 5000, 0, header.TCPFlagSyn, nil, nil))
	second := r.request()
	<-cancelled
	c := newTestConn()
	first.Accept(c)
	if err := c.opened(); !errors.Is(err, ErrAppGone) {
		t.Fatalf("accept of the replaced one: %v", err)
	}
	// A RST cancels.
	cancelled2 := make(chan struct{})
	second.OnCancel(func() { close(cancelled2) })
	r.send(tun.Header{}, segment(src, srv4, 5001, 0, header.TCPFlagRst, nil, nil))
	<-cancelled2
	r.quiet()
	// A stray segment is answered with RST, a stray RST and SYN+FIN are not.
	r.send(tun.Header{}, segment(src, srv4, 1, 777, header.TCPFlagAck, nil, []byte("x")))
	if _, b := r.recv(testkit.Patience); b == nil || b[33]&byte(header.TCPFlagRst) == 0 ||
		binary.BigEndian.Uint32(b[24:]) != 777 {
		t.Fatalf("answer to a stray segment: % x", b)
	}
	r.send(tun.Header{}, segment(src, srv4, 1, 0, header.TCPFlagRst, nil, nil))
	r.send(tun.Header{}, segment(src, srv4, 1, 0, header.TCPFlagSyn|header.TCPFlagFin, nil, nil))
	// A wrong checksum, unless the header says that it is right or not yet there.
	bad := segment(src, srv4, 9, 0, header.TCPFlagSyn, nil, nil)
	bad[37] ^= 0xff
	r.send(tun.Header{}, bad)
	r.quiet()
	testkit.Eventually(t, "the wrong checksum to be counted", func() bool { return r.s.Stats().DroppedChecksum == 1 })
	r.send(tun.Header{Flags: tun.DataValid}, bad)
	r.request()
	bad[23]++ // the ISN
	r.send(tun.Header{Flags: tun.NeedsCsum, CsumStart: 20, CsumOffset: 16}, bad)
	r.request()
}

// TestHandshakeGone: the app's kernel answers the SYN-ACK with RST, since the program is gone.
func TestHandshakeGone(t *testing.T) {
	src := netip.AddrPortFrom(appIP4, 1234)
	r := newRaw(t, Config{})
	r.send(tun.Header{}, segment(src, srv4, 1000, 0, header.TCPFlagSyn, nil, nil))
	c := newTestConn()
	r.request().Accept(c)
	_, b := r.recv(testkit.Patience)
	if b == nil || header.TCP(b[20:]).Flags() != header.TCPFlagSyn|header.TCPFlagAck {
		t.Fatalf("SYN-ACK: % x", b)
	}
	if h := header.TCP(b[20:]); !h.IsChecksumValid(addrTo(srv4.Addr()), addrTo(src.Addr()), 0, 0) {
		t.Fatal("the SYN-ACK's checksum is not filled in")
	}
	r.send(tun.Header{}, segment(src, srv4, 1001, 0, header.TCPFlagRst, nil, nil))
	if err := c.opened(); !errors.Is(err, ErrAppGone) {
		t.Fatalf("Opened: %v", err)
	}
	// The tuple is free again.
	r.send(tun.Header{}, segment(src, srv4, 2000, 0, header.TCPFlagSyn, nil, nil))
	r.request()
}

func TestBudgetUnanswered(t *testing.T) {
	r := newRaw(t, Config{Limits: Limits{PendingPerDest: 1}})
	r.send(tun.Header{}, segment(netip.AddrPortFrom(appIP4, 1), srv4, 1, 0, header.TCPFlagSyn, nil, nil))
	req := r.request()
	over := segment(netip.AddrPortFrom(appIP4, 2), srv4, 1, 0, header.TCPFlagSyn, nil, nil)
	r.send(tun.Header{}, over)
	r.quiet()
	testkit.Eventually(t, "what is over the budget to be counted", func() bool { return r.s.Stats().OverDestBudget == 1 })
	req.Reject(flow.RefuseSilent)
	r.send(tun.Header{}, over)
	r.request()
}

// TestDataChecksum: a segment of an open stream is verified unless the frame's header says that it need not be.
func TestDataChecksum(t *testing.T) {
	for _, end := range []struct{ src, dst netip.AddrPort }{
		{netip.AddrPortFrom(appIP4, 1234), srv4}, {netip.AddrPortFrom(appIP6, 1234), srv6},
	} {
		hdr := ip4HeaderLen
		if end.src.Addr().Is6() {
			hdr = ip6HeaderLen
		}
		for _, size := range []int{10, 1400, 40 << 10} { // in one view, with headers split off, super-segment
			r := newRaw(t, Config{})
			r.send(
				tun.Header{Flags: tun.DataValid},
				segment(end.src, end.dst, 1000, 0, header.TCPFlagSyn, nil, nil),
			) // for this frame only
			c := newTestConn()
			r.request().Accept(c)
			_, b := r.recv(testkit.Patience)
			if b == nil {
				t.Fatal("no SYN-ACK")
			}
			iss := header.TCP(b[hdr:]).SequenceNumber()
			r.send(tun.Header{Flags: tun.DataValid}, segment(end.src, end.dst, 1001, iss+1, header.TCPFlagAck, nil, nil))
			must(t, c.opened())
			good := segment(end.src, end.dst, 1001, iss+1, header.TCPFlagAck, nil, make([]byte, size))
			bad := append([]byte(nil), good...)
			bad[len(bad)-1] = 1
			r.send(tun.Header{}, bad)
			testkit.Eventually(t, "the count", func() bool { return r.s.Stats().DroppedChecksum == 1 })
			if n, err := c.st.ReadTo(&sliceWriter{b: make([]byte, size)}); n != 0 || !errors.Is(err, flow.ErrAgain) {
				t.Fatalf("read %d, %v of a segment with a wrong checksum", n, err)
			}
			r.send(tun.Header{}, good)
			w := &sliceWriter{b: make([]byte, size)}
			testkit.Eventually(t, "the data", func() bool { c.st.ReadTo(w); return w.n == size })
			if s := r.s.Stats(); s.DroppedChecksum != 1 {
				t.Fatalf("%d wrong checksums", s.DroppedChecksum)
			}
			c.st.Abort()
			c.st.Close()
		}
	}
}
