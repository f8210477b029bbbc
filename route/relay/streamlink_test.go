package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// frameCodec is a frame with a name's length in front, as UDP over TCP has: 0 IPv4 or 1 IPv6, address, port, length.
type frameCodec struct{}

var errTestFrame = errors.New("bad frame")

func (frameCodec) AppendHeader(b []byte, dst netip.AddrPort, size int) []byte {
	if !dst.IsValid() {
		return b
	}
	b = append(b, byte(dst.Addr().BitLen()/128))
	b = append(b, dst.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	return binary.BigEndian.AppendUint16(b, uint16(size))
}

func (frameCodec) ParseHeader(b []byte) (src netip.AddrPort, n, size int, err error) {
	switch {
	case b[0] == 2: // a source that is a name
		if len(b) < 3 {
			return src, 0, 0, nil
		}
		return src, 3, int(binary.BigEndian.Uint16(b[1:])), nil
	case b[0] == 3: // never long enough
		return src, 0, 0, nil
	case b[0] > 3:
		return src, 0, 0, errTestFrame
	}
	n = 1 + 4 + 12*int(b[0]) + 4
	if len(b) < n {
		return src, 0, 0, nil
	}
	a, _ := netip.AddrFromSlice(b[1 : n-4])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[n-4:])), n, int(binary.BigEndian.Uint16(b[n-2:])), nil
}

func frame(src string, payload []byte) []byte {
	return append(frameCodec{}.AppendHeader(nil, netip.MustParseAddrPort(src), len(payload)), payload...)
}

func openStreamLink(t testing.TB, l *Loop, sink func([]flow.Packet), closed func(error)) (*streamLink, *net.TCPConn) {
	t.Helper()
	fd, peer := tcpPair(t)
	k, err := l.OpenStreamPackets(loop.Unwatched(fd), frameCodec{}, 1<<14, sink, closed)
	if err != nil {
		t.Fatal(err)
	}
	peer.SetDeadline(time.Now().Add(testkit.Patience))
	return k.(*streamLink), peer
}

// readFrame reads a frame as the far end does.
func readFrame(t testing.TB, r io.Reader) (netip.AddrPort, []byte) {
	t.Helper()
	head := make([]byte, 9)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	if head[0] == 1 {
		head = append(head, make([]byte, 12)...)
		if _, err := io.ReadFull(r, head[9:]); err != nil {
			t.Fatal(err)
		}
	}
	dst, _, size, _ := frameCodec{}.ParseHeader(head)
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		t.Fatal(err)
	}
	return dst, payload
}

// TestStreamLink: datagrams of mixed sizes and families cross whole and in order, both ways; an oversized one and one without a
// header are dropped and counted.
func TestStreamLink(t *testing.T) {
	l := newLoop(t)
	c := newCollector()
	k, peer := openStreamLink(t, l, c.sink, nil)
	defer k.Close()
	data := pattern(1 << 16)
	dsts := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:6881"), netip.MustParseAddrPort("[2001:db8::1]:53")}
	sizes := []int{0, 1, 1200, 9000, 1 << 14, 100}
	var ps []flow.Packet
	for i := range 300 {
		ps = append(ps, flow.Packet{Dst: dsts[i%2], Payload: data[i : i+sizes[i%len(sizes)]]})
	}
	bad := []flow.Packet{{Dst: dsts[0], Payload: data[:1<<14+1]}, {Payload: data[:5]}}
	for i := 0; i < len(ps); i += 10 {
		if n, err := k.Send(append(bad, ps[i:i+10]...)); n != 10 || err != nil {
			t.Fatalf("sent %d, %v, %+v", n, err, k.Stats())
		}
		for _, p := range ps[i : i+10] {
			dst, payload := readFrame(t, peer)
			if dst != p.Dst || !bytes.Equal(payload, p.Payload) {
				t.Fatalf("%d bytes to %v, want %d to %v", len(payload), dst, len(p.Payload), p.Dst)
			}
			if _, err := peer.Write(frame(dst.String(), payload)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, g := range c.wait(t, len(ps)) {
		if g.Src != ps[i].Dst || !bytes.Equal(g.Payload, ps[i].Payload) || g.Dst.IsValid() {
			t.Fatalf("back: datagram %d: %d bytes from %v", i, len(g.Payload), g.Src)
		}
	}
	if st := k.Stats(); st.Sent != 300 || st.Received != 300 || st.SentBytes != st.ReceivedBytes ||
		st.TooLarge != 30 || st.Unsendable != 30 || st.Full != 0 {
		t.Errorf("%+v", st)
	}
}

// TestStreamLinkDrip: frames that come in pieces of any length are whole; of a source that is a name nothing but the count comes.
func TestStreamLinkDrip(t *testing.T) {
	l := newLoop(t)
	data := pattern(1 << 16)
	var all []byte
	var want [][]byte
	for _, size := range []int{3, 0, 1, 300, 65535, 2, 9000} {
		all = append(all, frame("[2001:db8::9]:9", data[:size])...)
		want = append(want, data[:size])
		all = append(all, 2, 0, 2, 'x', 'y') // a name
	}
	for _, piece := range []int{1, 2, 7, 4096, 70000} {
		c := newCollector()
		k, peer := openStreamLink(t, l, c.sink, nil)
		at := all
		for i := 0; len(at) > 0; i++ {
			n := min(piece, len(at))
			if piece < 8 && len(at) < len(all)-400 && len(at) > 9000 { // the inside of the longest is sent at once
				n = min(60000, len(at)-9000)
			}
			if _, err := peer.Write(at[:n]); err != nil {
				t.Fatal(err)
			}
			at = at[n:]
			if i%16 == 0 {
				testkit.Pace(time.Millisecond)
			}
		}
		got := c.wait(t, len(want))
		for i := range want {
			if !bytes.Equal(got[i].Payload, want[i]) || got[i].Src.Port() != 9 {
				t.Errorf("pieces of %d: datagram %d has %d bytes from %v", piece, i, len(got[i].Payload), got[i].Src)
			}
		}
		if !testkit.Until(testkit.Patience, func() bool { return k.Stats().Malformed == 7 }) {
			t.Fatalf("%+v", k.Stats())
		}
		done := make(chan int)
		l.Post(func() { done <- cap(k.in) })
		if n := <-done; n != 0 {
			t.Errorf("a link with nothing to do keeps %d bytes", n)
		}
		k.Close()
	}
}

// TestStreamLinkEnds: a malformed frame, one whose header never ends, FIN and RST end the link and say why, once; what came
// before is delivered.
func TestStreamLinkEnds(t *testing.T) {
	l := newLoop(t)
	for name, tt := range map[string]struct {
		send []byte
		end  func(*net.TCPConn)
		want error
	}{
		"malformed":      {[]byte{9}, nil, errTestFrame},
		"endless":        {append([]byte{3}, make([]byte, 2000)...), nil, errFrame},
		"FIN":            {nil, func(c *net.TCPConn) { c.CloseWrite() }, io.EOF},
		"FIN in a frame": {frame("192.0.2.1:1", make([]byte, 50))[:30], func(c *net.TCPConn) { c.CloseWrite() }, io.EOF},
		"RST":            {nil, func(c *net.TCPConn) { testkit.Pace(20 * time.Millisecond); sendReset(c) }, unix.ECONNRESET},
	} {
		c := newCollector()
		told := make(chan error, 2)
		k, peer := openStreamLink(t, l, c.sink, func(err error) { told <- err })
		peer.Write(append(frame("192.0.2.1:1", []byte("before")), tt.send...))
		if got := c.wait(t, 1); string(got[0].Payload) != "before" {
			t.Errorf("%s: %q", name, got[0].Payload)
		}
		if tt.end != nil {
			tt.end(peer)
		}
		select {
		case err := <-told:
			if !errors.Is(err, tt.want) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(testkit.Patience):
			t.Fatalf("%s: not told", name)
		}
		if _, err := k.Send([]flow.Packet{{}}); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: Send: %v", name, err)
		}
		k.Close()
		if len(told) != 0 {
			t.Errorf("%s: told twice", name)
		}
	}
}

// TestStreamLinkFull: a far end that does not read costs a bounded queue; what does not fit is dropped and counted. When it reads
// again, whole frames come, in order, and then new ones.
func TestStreamLinkFull(t *testing.T) {
	l := newLoop(t)
	k, peer := openStreamLink(t, l, newCollector().sink, nil)
	defer k.Close()
	dst := netip.MustParseAddrPort("192.0.2.1:1")
	number, sent := uint32(0), []uint32{}
	for range 20000 {
		number++
		payload := binary.BigEndian.AppendUint32(make([]byte, 0, 1000), number)
		n, err := k.Send([]flow.Packet{{Dst: dst, Payload: payload[:1000]}})
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			sent = append(sent, number)
		}
	}
	st := k.Stats()
	k.mu.Lock()
	if len(k.out) == 0 || len(k.out) > streamQueue || cap(k.out) > 2*streamQueue {
		t.Errorf("%d bytes wait, room for %d", len(k.out), cap(k.out))
	}
	k.mu.Unlock()
	if st.Full == 0 || st.Full+st.Sent != 20000 || st.Sent != uint64(len(sent)) {
		t.Fatalf("%+v, %d taken", st, len(sent))
	}
	for i, want := range sent {
		if _, payload := readFrame(t, peer); binary.BigEndian.Uint32(payload) != want {
			t.Fatalf("frame %d has number %d, want %d", i, binary.BigEndian.Uint32(payload), want)
		}
	}
	if n, _ := k.Send([]flow.Packet{{Dst: dst, Payload: []byte("last")}}); n != 1 {
		t.Errorf("after the queue is empty: %+v", k.Stats())
	}
	if _, payload := readFrame(t, peer); string(payload) != "last" {
		t.Errorf("%q", payload)
	}
	k.mu.Lock()
	if cap(k.out) != 0 {
		t.Errorf("room for %d bytes is kept", cap(k.out))
	}
	k.mu.Unlock()
}

// TestStreamLinkClose: Close races with Send and with datagrams of the far end; closed is not told, and the loop's end closes
// what is left.
func TestStreamLinkClose(t *testing.T) {
	l := newLoop(t)
	for range 50 {
		k, peer := openStreamLink(t, l, func([]flow.Packet) {}, func(err error) { t.Errorf("closed: %v", err) })
		ended := make(chan error, 1)
		go func() {
			p := []flow.Packet{{Dst: netip.MustParseAddrPort("192.0.2.1:1"), Payload: []byte("x")}}
			for {
				if _, err := k.Send(p); err != nil {
					ended <- err
					return
				}
			}
		}()
		peer.Write(frame("192.0.2.1:1", []byte("y")))
		k.Close()
		k.Close()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		peer.Close()
	}
	l2, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	var told []error
	k, _ := openStreamLink(t, l2, func([]flow.Packet) {}, func(err error) { told = append(told, err) })
	l2.Close()
	k.Close()
	if len(told) != 1 || !errors.Is(told[0], ErrClosed) {
		t.Errorf("told %v", told)
	}
	fd, _ := tcpPair(t)
	if _, err := l2.OpenStreamPackets(loop.Unwatched(fd), frameCodec{}, 1, nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("OpenStreamPackets: %v", err)
	}
}
