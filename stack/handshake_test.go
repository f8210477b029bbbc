package stack

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// synAck accepts the next request and returns the SYN-ACK that follows.
func (r *rawStack) synAck(c *testConn, hdr int) header.TCP {
	r.t.Helper()
	r.request().Accept(c)
	for {
		_, b := r.recv(testkit.Patience)
		if b == nil {
			r.t.Fatal("no SYN-ACK")
		}
		if h := header.TCP(b[hdr:]); h.Flags() == header.TCPFlagSyn|header.TCPFlagAck {
			return h
		}
	}
}

// TestHandshakeNoGoroutines: handshakes that wait for the app's ACK have no goroutines, and all end with the stack.
func TestHandshakeNoGoroutines(t *testing.T) {
	const n = 200
	r := newRaw(t, Config{})
	before := runtime.NumGoroutine()
	var cs []*testConn
	for i := range n {
		r.send(tun.Header{}, segment(netip.AddrPortFrom(appIP4, uint16(1000+i)), srv4, 1000, 0, header.TCPFlagSyn, nil, nil))
		c := newTestConn()
		r.synAck(c, ip4HeaderLen)
		cs = append(cs, c)
	}
	if after := runtime.NumGoroutine(); after > before+5 {
		t.Errorf("%d goroutines before, %d with %d handshakes", before, after, n)
	}
	r.s.ResetAll()
	for _, c := range cs {
		if err := c.opened(); !errors.Is(err, ErrAppGone) {
			t.Fatalf("Opened: %v", err)
		}
	}
	if s := r.s.Stats(); s.Streams != 0 || s.AcceptFailed != n {
		t.Errorf("%d streams, %d not accepted", s.Streams, s.AcceptFailed)
	}
}

// TestHandshakeReset: a RST in the window ends a handshake; another one does not, nor does a SYN that comes again.
func TestHandshakeReset(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		src, dst, hdr := netip.AddrPortFrom(appIP4, 1234), srv4, ip4HeaderLen
		if v6 {
			src, dst, hdr = netip.AddrPortFrom(appIP6, 1234), srv6, ip6HeaderLen
		}
		for _, seq := range []uint32{1000, 1001, 1001 + 100, 1 << 31} {
			t.Run(fmt.Sprintf("v6=%v/%d", v6, seq), func(t *testing.T) {
				r := newRaw(t, Config{})
				r.send(tun.Header{}, segment(src, dst, 1000, 0, header.TCPFlagSyn, nil, nil))
				c := newTestConn()
				ack := r.synAck(c, hdr).SequenceNumber() + 1
				r.send(tun.Header{}, segment(src, dst, 1000, 0, header.TCPFlagSyn, nil, nil))
				r.recv(testkit.Patience) // an ACK: the SYN is before the window
				r.send(tun.Header{}, segment(src, dst, seq, 0, header.TCPFlagRst, nil, nil))
				if seq == 1001 || seq == 1101 {
					sent := time.Now()
					if err := c.opened(); !errors.Is(err, ErrAppGone) {
						t.Fatalf("Opened: %v", err)
					}
					if d := time.Since(sent); d > openTime/2 {
						t.Errorf("Opened came after %v", d)
					}
					if s := r.s.Stats(); s.AcceptFailed != 1 || s.Streams != 0 {
						t.Errorf("%d not accepted, %d streams", s.AcceptFailed, s.Streams)
					}
					return
				}
				testkit.Never(t, 2*lookAfter<<lookTimes, "the look ended the handshake", func() bool {
					return r.s.Stats().AcceptFailed != 0
				})
				r.send(tun.Header{}, segment(src, dst, 1001, ack, header.TCPFlagAck, nil, nil))
				must(t, c.opened())
				c.st.Close()
			})
		}
	}
}

// TestHandshakeEarlyReset: what the app sent before its RST is handed over, also when all comes at once.
func TestHandshakeEarlyReset(t *testing.T) {
	r := newRaw(t, Config{})
	for i := range 50 {
		src := netip.AddrPortFrom(appIP4, uint16(2000+i))
		r.send(tun.Header{}, segment(src, srv4, 1000, 0, header.TCPFlagSyn, nil, nil))
		c := newTestConn()
		ack := r.synAck(c, ip4HeaderLen).SequenceNumber() + 1
		r.send(tun.Header{}, segment(src, srv4, 1001, ack, header.TCPFlagAck, nil, nil))
		r.send(tun.Header{}, segment(src, srv4, 1001, ack, header.TCPFlagAck, nil, []byte("farewell")))
		r.send(tun.Header{}, segment(src, srv4, 1009, ack, header.TCPFlagRst|header.TCPFlagAck, nil, nil))
		must(t, c.opened())
		buf := make([]byte, 20)
		n, err := c.Read(buf)
		if string(buf[:n]) != "farewell" {
			t.Fatalf("%d: read %q, %v", i, buf[:n], err)
		}
		if _, err = c.Read(buf); !errors.Is(err, flow.ErrReset) {
			t.Fatalf("%d: then %v", i, err)
		}
		c.st.Close()
	}
}

// TestHandshakeLook: what the timer does for a handshake that a RST came for.
func TestHandshakeLook(t *testing.T) {
	for name, c := range map[string]struct {
		made  bool
		shake []shakeState // what gVisor says, the last one from then on
		ends  time.Duration
	}{
		"failed":                      {true, []shakeState{shakeFailed}, lookAfter},
		"gone":                        {true, []shakeState{shakeNone}, lookAfter},
		"not yet decided, then gone":  {true, []shakeState{shakeGoesOn, shakeGoesOn, shakeNone}, 7 * lookAfter},
		"not yet made, then failed":   {false, []shakeState{shakeNone, shakeNone, shakeFailed}, 7 * lookAfter},
		"never made":                  {false, []shakeState{shakeNone}, lookAfter<<(lookTimes+1) - lookAfter},
		"a RST that does not count":   {true, []shakeState{shakeGoesOn}, openTime},
		"open, and soon taken":        {true, []shakeState{shakeDone}, openTime},
		"not made, and then it hangs": {false, []shakeState{shakeNone, shakeGoesOn}, openTime},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newTableTest(t, Limits{}, nil)
				x.tab.shake = func(tuple) shakeState {
					s := c.shake[0]
					if len(c.shake) > 1 {
						c.shake = c.shake[1:]
					}
					return s
				}
				start := time.Now()
				var ended time.Duration
				x.tab.abort = func(k tuple) {
					if x.tab.take(k) != nil {
						ended = time.Since(start)
					}
				}
				x.syn(key1, 1).Accept(newTestConn())
				x.tab.disturbed(key1, 1<<20, c.made) // not of this connection
				x.tab.disturbed(key1, 2, c.made)
				testkit.Advance(2 * openTime)
				x.expect("ended", 0, 0, 0)
				if ended < c.ends || ended > c.ends+lookAfter {
					t.Errorf("ended after %v, not %v", ended, c.ends)
				}
				x.tab.close()
			})
		})
	}
}

// TestKeepalive: the first use of a stream sets the keepalive timer.
func TestKeepalive(t *testing.T) {
	for _, use := range []func(*testConn) error{
		func(c *testConn) error { _, err := c.st.ReadTo(&sliceWriter{b: make([]byte, 1)}); return err },
		func(c *testConn) error { _, err := c.Write([]byte("x")); return err },
	} {
		p := newPair(t, offAll, Config{KeepaliveIdle: 90 * time.Second})
		_, up := p.connect(srv4)
		if err := use(up); err != nil && !errors.Is(err, flow.ErrAgain) {
			t.Fatal(err)
		}
		ep := up.st.(*stream).ep
		var idle tcpip.KeepaliveIdleOption
		if err := ep.GetSockOpt(&idle); err != nil || time.Duration(idle) != 90*time.Second ||
			!ep.SocketOptions().GetKeepAlive() {
			t.Errorf("keepalive %v after %v, %v", ep.SocketOptions().GetKeepAlive(), time.Duration(idle), err)
		}
	}
}
