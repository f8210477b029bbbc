package stack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// rawConn is an open stream whose app the test is: it sees every segment.
type rawConn struct {
	*rawStack
	src, dst netip.AddrPort
	up       *testConn
	hdr      int    // of IP
	seq, ack uint32 // what it sends next, what it has of ours
	opts     []byte // of every segment: timestamps, if the SYN had them
}

// openRaw shakes hands with the options in the SYN.
func openRaw(t *testing.T, off tun.Offload, v6 bool, opts []byte) *rawConn {
	r := &rawConn{
		rawStack: newRawOver(t, off, Config{Shards: 1}),
		src:      netip.AddrPortFrom(appIP4, 1234),
		dst:      srv4,
		hdr:      ip4HeaderLen,
	}
	if v6 {
		r.src, r.dst, r.hdr = netip.AddrPortFrom(appIP6, 1234), srv6, ip6HeaderLen
	}
	r.send(tun.Header{}, segment(r.src, r.dst, 1000, 0, header.TCPFlagSyn, opts, nil))
	r.up = newTestConn()
	r.request().Accept(r.up)
	_, b := r.recv(testkit.Patience)
	if b == nil {
		t.Fatal("no SYN-ACK")
	}
	r.seq = 1001
	if bytes.Contains(opts, []byte{8, 10}) {
		r.opts = []byte{1, 1, 8, 10, 0, 0, 0, 2, 0, 0, 0, 0}
	}
	r.took(header.TCP(b[r.hdr:]), 1)
	r.say(tun.Header{}, header.TCPFlagAck, nil)
	must(t, r.up.opened())
	t.Cleanup(func() { r.up.st.Abort(); r.up.st.Close() })
	return r
}

// took notes that n bytes of a segment came.
func (r *rawConn) took(seg header.TCP, n int) {
	r.ack = seg.SequenceNumber() + uint32(n)
	if r.opts != nil {
		binary.BigEndian.PutUint32(r.opts[8:], header.ParseTCPOptions(seg.Options()).TSVal)
	}
}

// say sends a segment, from where it is.
func (r *rawConn) say(h tun.Header, flags header.TCPFlags, data []byte) {
	r.t.Helper()
	r.send(h, segment(r.src, r.dst, r.seq, r.ack, flags, r.opts, data))
}

// super is the header of a super-segment, as the kernel fills it in.
func (r *rawConn) super(mss uint16) tun.Header {
	h := tun.Header{
		Flags:      tun.NeedsCsum,
		GSOType:    tun.GSOTCPv4,
		GSOSize:    mss,
		HdrLen:     uint16(r.hdr + tcpHeaderLen),
		CsumStart:  uint16(r.hdr),
		CsumOffset: 16,
	}
	if r.hdr == ip6HeaderLen {
		h.GSOType = tun.GSOTCPv6
	}
	return h
}

// TestMSS: no segment is longer than what the app's SYN allows, less what its options take of each, nor than the device's
// MTU; whatever it says.
func TestMSS(t *testing.T) {
	mss := func(n uint16) []byte { return []byte{2, 4, byte(n >> 8), byte(n)} }
	stamps := []byte{8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1}
	for _, c := range []struct {
		name   string
		opts   []byte
		v4, v6 int
	}{
		{"none", nil, 536, 1220},
		{"536", mss(536), 536, 536},
		{"1220", mss(1220), 1220, 1220},
		{"1460 and timestamps", append(mss(1460), stamps...), 1448, 1428},
		{"536 and timestamps", append(mss(536), stamps...), 524, 524},
		{"88", mss(88), 88, 88},
		{"65535", mss(65535), 1460, 1440},
		{"0", mss(0), 1460, 1440}, // meaningless: any size that is sent is right, as long as it is sent
	} {
		for name, off := range offloads {
			for _, v6 := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/v6=%v", c.name, name, v6), func(t *testing.T) {
					limit := c.v4
					if v6 {
						limit = c.v6
					}
					checkMSS(t, openRaw(t, off, v6, c.opts), off, limit)
				})
			}
		}
	}
}

// checkMSS sends data to the app, and wants no more than limit bytes of it in each segment.
func checkMSS(t *testing.T, r *rawConn, off tun.Offload, limit int) {
	t.Helper()
	want := make([]byte, 150_000)
	rand.NewChaCha8([32]byte{1}).Read(want)
	go r.up.Write(want)
	var got []byte
	big := 0
	for len(got) < len(want) {
		h, b := r.recv(testkit.Patience)
		if b == nil {
			t.Fatalf("%d of %d bytes came", len(got), len(want))
		}
		seg := header.TCP(b[r.hdr:])
		hdr := r.hdr + int(seg.DataOffset())
		data := b[hdr:]
		if len(data) == 0 || seg.SequenceNumber() != r.ack { // sent again: the machine stalled
			continue
		}
		switch {
		case len(data) <= limit && h.GSOType == tun.GSONone:
		case h.GSOType != tun.GSONone && off&tun.TSO != 0:
			big++
			if h.GSOType != r.super(0).GSOType || int(h.GSOSize) > limit || h.GSOSize == 0 ||
				int(h.HdrLen) != hdr ||
				h.Flags&tun.NeedsCsum == 0 {
				t.Fatalf("header %+v of %d bytes, at most %d each", h, len(data), limit)
			}
		default:
			t.Fatalf("%d bytes in one segment, header %+v, at most %d", len(data), h, limit)
		}
		if off&tun.VnetHdr == 0 {
			sum := header.PseudoHeaderChecksum(protoTCP, addrTo(r.dst.Addr()), addrTo(r.src.Addr()), uint16(len(seg)))
			if checksum.Checksum(seg, sum) != 0xffff {
				t.Fatal("wrong checksum")
			}
		}
		got = append(got, data...)
		r.took(seg, len(data))
		r.say(tun.Header{}, header.TCPFlagAck, nil)
	}
	if !bytes.Equal(got, want) {
		t.Error("the bytes are not those that were sent")
	}
	if off&tun.TSO != 0 && big == 0 {
		t.Error("no super-segment")
	}
}

// TestEndInSuperSegment: FIN within a super-segment and RST directly behind one: all data before it is read first, and
// then the truth.
func TestEndInSuperSegment(t *testing.T) {
	data := make([]byte, 60_000)
	rand.NewChaCha8([32]byte{2}).Read(data)
	const ack, fin, rst = header.TCPFlagAck, header.TCPFlagFin, header.TCPFlagRst
	for _, c := range []struct {
		name string
		do   func(r *rawConn)
		want error
	}{
		{"FIN in it", func(r *rawConn) { r.say(r.super(1460), ack|fin, data) }, io.EOF},
		{"FIN in it, twice", func(r *rawConn) {
			r.say(r.super(1460), ack|fin, data)
			r.say(r.super(1460), ack|fin, data)
		}, io.EOF},
		{"FIN first, data behind it", func(r *rawConn) {
			r.seq += 20_000
			r.say(r.super(1460), ack|fin, data[20_000:])
			r.seq -= 20_000
			r.say(r.super(1460), ack, data[:25_000]) // and 5,000 bytes once more
		}, io.EOF},
		{"RST behind it", func(r *rawConn) {
			r.say(r.super(1460), ack, data)
			r.seq += uint32(len(data))
			r.say(tun.Header{}, rst|ack, nil)
		}, flow.ErrReset},
		{"RST without ACK behind it", func(r *rawConn) {
			r.say(r.super(1460), ack, data)
			r.seq += uint32(len(data))
			r.say(tun.Header{}, rst, nil)
		}, flow.ErrReset},
		{"RST behind the FIN in it", func(r *rawConn) {
			r.say(r.super(1460), ack|fin, data)
			r.seq += uint32(len(data)) + 1
			r.say(tun.Header{}, rst|ack, nil)
		}, flow.ErrReset},
		{"RST with data in a super-segment", func(r *rawConn) {
			r.say(r.super(1460), ack, data)
			r.seq += uint32(len(data))
			r.say(r.super(1460), rst|ack, data[:30_000])
		}, flow.ErrReset},
	} {
		for _, v6 := range []bool{false, true} {
			for _, late := range []bool{false, true} { // the reader comes before the end, or when all is over
				t.Run(fmt.Sprintf("%s/v6=%v/late=%v", c.name, v6, late), func(t *testing.T) {
					endsAfter(t, openRaw(t, offAll, v6, []byte{2, 4, 5, 0xb4}), c.do, late, data, c.want)
				})
			}
		}
	}
}

// endsAfter has the app do something, and wants the reader to get the data and then an error.
func endsAfter(t *testing.T, r *rawConn, do func(*rawConn), late bool, data []byte, want error) {
	t.Helper()
	said := make(chan struct{})
	defer func() { <-said }()
	if late {
		do(r)
		close(said)
		testkit.Eventually(t, "the end to be seen", func() bool { return r.up.state() != tcp.StateEstablished })
	} else {
		go func() { defer close(said); do(r) }()
	}
	got, err := make([]byte, 0, len(data)), error(nil)
	for b := make([]byte, 10_000); err == nil; {
		var n int
		n, err = r.up.Read(b)
		got = append(got, b[:n]...)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes were read before the end", len(got), len(data))
	}
	// Behind a FIN the RST may come later than the reader.
	testkit.Until(testkit.Patience, func() bool {
		if errors.Is(err, io.EOF) && want != io.EOF {
			_, err = r.up.Read(make([]byte, 1))
		}
		return errors.Is(err, want) || !errors.Is(err, io.EOF)
	})
	if !errors.Is(err, want) {
		t.Errorf("the end is %v, want %v", err, want)
	}
}

// TestPersist: a window that stays shut is probed for as long as it takes, and the stream goes on when it opens. Time is
// compressed: where the probes are 2 minutes apart in life, it is 20 ms here; their number is that of an hour and more.
func TestPersist(t *testing.T) {
	want := make([]byte, 24<<20)
	rand.NewChaCha8([32]byte{3}).Read(want)
	for _, name := range []string{"full", "off"} {
		off := offloads[name]
		for _, down := range []bool{true, false} {
			for _, small := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/down=%v/small=%v", name, down, small), func(t *testing.T) {
					size := len(want)
					if off&tun.TSO == 0 || small {
						size /= 8 // it takes long without super-segments
					}
					persists(t, pairOfShortTimes(t, off, small), down, want[:size])
				})
			}
		}
	}
}

// pairOfShortTimes is a pair whose timers are short, and whose receive buffers are if that is asked for.
func pairOfShortTimes(t *testing.T, off tun.Offload, small bool) *testPair {
	t.Helper()
	p := newPair(t, off, Config{Shards: 1})
	low, high := tcpip.TCPMinRTOOption(5*time.Millisecond), tcpip.TCPMaxRTOOption(20*time.Millisecond)
	options := []tcpip.SettableTransportProtocolOption{&low, &high}
	if small {
		options = append(options, &tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: 16 << 10, Max: 16 << 10})
	}
	for _, ns := range []*gstack.Stack{p.st.shards[0].engine.Load().ns, p.testApp.s.engine.Load().ns} {
		for _, o := range options {
			if err := ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
				t.Fatal(err)
			}
		}
	}
	return p
}

// persists sends data one way, and reads it only after many probes of the window.
func persists(t *testing.T, p *testPair, down bool, want []byte) {
	t.Helper()
	const probes = 50 // more than any limit of retransmissions
	app, up := p.connect(srv4)
	var from io.Writer = up
	var to io.Reader = app
	if !down {
		from, to = app, up
	}
	// Window probes are those of gVisor: one byte that was acknowledged already.
	var seen atomic.Int64
	p.dev.Tap(func(_ tun.Header, b []byte) bool {
		if !down && len(b) == int(b[0]&15)*4+int(b[int(b[0]&15)*4+12]>>4)*4+1 {
			seen.Add(1)
		}
		if down && binary.BigEndian.Uint16(b[int(b[0]&15)*4+14:]) == 0 { // the answer to each: window 0
			seen.Add(1)
		}
		return true
	})
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(from, struct{ io.Reader }{bytes.NewReader(want)})
		wrote <- err
	}()
	testkit.Eventually(t, "the probes", func() bool { return seen.Load() >= probes })
	select {
	case err := <-wrote:
		t.Fatalf("%d bytes went nowhere: %v", len(want), err)
	default:
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(to, got); err != nil {
		t.Fatal(err)
	}
	must(t, <-wrote)
	if !bytes.Equal(got, want) {
		t.Error("the bytes are not those that were sent")
	}
}
