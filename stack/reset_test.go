package stack

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// states brings a connection into a state of our endpoint, from ESTABLISHED.
var states = map[string]struct {
	state tcp.EndpointState
	get   func(t *testing.T, app *gonet.TCPConn, up *testConn)
}{
	"ESTABLISHED": {tcp.StateEstablished, func(*testing.T, *gonet.TCPConn, *testConn) {}},
	"ESTABLISHED with unread data": {tcp.StateEstablished, func(t *testing.T, app *gonet.TCPConn, up *testConn) {
		if _, err := app.Write([]byte("unread")); err != nil {
			t.Fatal(err)
		}
		must(t, up.await(flow.Readable))
		testkit.Settle(20*time.Millisecond, "the ACK is at the app")
	}},
	"CLOSE_WAIT": {tcp.StateCloseWait, func(t *testing.T, app *gonet.TCPConn, up *testConn) {
		must(t, app.CloseWrite())
		if _, err := up.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("FIN was read as %v", err)
		}
	}},
	"FIN_WAIT_1": {tcp.StateFinWait1, func(t *testing.T, app *gonet.TCPConn, up *testConn) {
		fillUp(t, up)
		must(t, up.st.CloseWrite())
	}},
	"FIN_WAIT_2": {tcp.StateFinWait2, func(t *testing.T, app *gonet.TCPConn, up *testConn) {
		must(t, up.st.CloseWrite())
		if _, err := app.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("FIN was read as %v", err)
		}
	}},
	"LAST_ACK": {tcp.StateLastAck, func(t *testing.T, app *gonet.TCPConn, up *testConn) {
		must(t, app.CloseWrite())
		if _, err := up.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("FIN was read as %v", err)
		}
		fillUp(t, up)
		must(t, up.st.CloseWrite())
	}},
}

// inState gives a connection in one of the states. A machine that stalls can spoil a try: what looked like an app's full
// buffer was one that it did not come to fill.
func inState(t *testing.T, name string) (*testPair, *gonet.TCPConn, *testConn) {
	t.Helper()
	for try := 1; ; try++ {
		p := newPair(t, offAll, Config{})
		app, up := p.connect(srv4)
		states[name].get(t, app, up)
		if testkit.Until(2*time.Second, func() bool { return up.state() == states[name].state }) {
			return p, app, up
		}
		if try == 10 {
			t.Fatalf("state %v", up.state())
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fillUp writes until the app's window is shut and our buffer full.
func fillUp(t testing.TB, up *testConn) (n int) {
	b := make([]byte, 64<<10)
	for deadline := time.Now().Add(testkit.Patience); time.Now().Before(deadline); {
		m, err := up.st.WriteFrom(strings.NewReader(string(b)))
		n += m
		if errors.Is(err, flow.ErrAgain) {
			testkit.Settle(50*time.Millisecond, "what is on its way to the app makes room here")
			if m, err = up.st.WriteFrom(strings.NewReader(string(b))); errors.Is(err, flow.ErrAgain) {
				return n
			}
			n += m
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("never full")
	return n
}

func (c *testConn) state() tcp.EndpointState {
	return tcp.EndpointState(c.st.(*stream).ep.State())
}

// abort resets every connection of the app.
func (a *testApp) abort() {
	for _, ep := range a.s.engine.Load().ns.RegisteredEndpoints() {
		ep.Abort()
	}
}

func TestAppResets(t *testing.T) {
	for name := range states {
		t.Run(name, func(t *testing.T) {
			p, _, up := inState(t, name)
			p.abort()
			must(t, up.await(flow.Hup))
			if name == "ESTABLISHED with unread data" {
				// A write tells at once; what came before the RST is still there to read.
				if _, err := up.st.WriteFrom(strings.NewReader("x")); !errors.Is(err, flow.ErrReset) {
					t.Fatalf("WriteFrom: %v", err)
				}
				b := make([]byte, 10)
				if n, err := up.Read(b); err != nil || string(b[:n]) != "unread" {
					t.Fatalf("read %q, %v", b[:n], err)
				}
			}
			for range 3 {
				if n, err := up.Read(make([]byte, 1)); n != 0 || !errors.Is(err, flow.ErrReset) {
					t.Fatalf("ReadTo: %d, %v", n, err)
				}
				if n, err := up.st.WriteFrom(strings.NewReader("x")); n != 0 || !errors.Is(err, flow.ErrReset) {
					t.Fatalf("WriteFrom: %d, %v", n, err)
				}
				if err := up.st.CloseWrite(); !errors.Is(err, flow.ErrReset) {
					t.Fatalf("CloseWrite: %v", err)
				}
			}
			if s := p.st.Stats(); s.AppResets != 1 || s.Aborted != 0 {
				t.Fatalf("%d resets by the app, %d by us", s.AppResets, s.Aborted)
			}
			up.st.Close()
			if s := p.st.Stats(); s.Aborted != 0 || s.Streams != 0 {
				t.Fatalf("%d aborted, %d streams", s.Aborted, s.Streams)
			}
		})
	}
}

// TestWriteSeesReset: a reset is seen also by who only writes, in the states that may write.
func TestWriteSeesReset(t *testing.T) {
	for _, name := range []string{"ESTABLISHED", "CLOSE_WAIT"} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, offAll, Config{})
			app, up := p.connect(srv4)
			states[name].get(t, app, up)
			p.abort()
			must(t, up.await(flow.Hup))
			if _, err := up.st.WriteFrom(strings.NewReader("x")); !errors.Is(err, flow.ErrReset) {
				t.Fatalf("WriteFrom: %v", err)
			}
			if _, err := up.st.ReadTo(io.Discard); !errors.Is(err, flow.ErrReset) {
				t.Fatalf("ReadTo after that: %v", err)
			}
		})
	}
}

func TestAbort(t *testing.T) {
	for name := range states {
		for _, how := range []string{"Abort", "Close", "ResetAll"} {
			t.Run(name+"/"+how, func(t *testing.T) {
				p, app, up := inState(t, name)
				switch how {
				case "Abort":
					up.st.Abort()
					up.st.Abort()
				case "Close":
					if name == "LAST_ACK" {
						t.Skip("both FINs: not an abort")
					}
					up.st.Close()
				case "ResetAll":
					p.st.ResetAll()
				}
				app.SetReadDeadline(time.Now().Add(testkit.Patience))
				var err error
				for err == nil {
					_, err = app.Read(make([]byte, 64<<10))
				}
				// gVisor, as the app, reads EOF first where it had one, and a RST in CLOSE_WAIT as EOF: there its
				// write tells.
				if name == "FIN_WAIT_2" && err == io.EOF {
					testkit.Until(testkit.Patience, func() bool { _, err = app.Write([]byte("x")); return err != nil })
				}
				var op *net.OpError
				if !errors.As(err, &op) || op.Timeout() {
					t.Fatalf("the app read %v", err)
				}
				if _, err := up.st.ReadTo(io.Discard); !errors.Is(err, flow.ErrReset) {
					t.Fatalf("ReadTo: %v", err)
				}
				up.st.Close()
				up.st.Close()
				if s := p.st.Stats(); s.Streams != 0 {
					t.Fatalf("%d streams", s.Streams)
				}
				testkit.Eventually(t, "the endpoint to go", func() bool { return registered(p.st) == 0 })
			})
		}
	}
}

// TestOrderlyClose: two FINs in either order, or at once, are no reset, and nothing stays behind.
func TestOrderlyClose(t *testing.T) {
	for _, first := range []string{"app", "upstream", "both"} {
		t.Run(first, func(t *testing.T) {
			p := newPair(t, offAll, Config{})
			app, up := p.connect(srv4)
			ended := func() bool { return up.state() == tcp.StateClose || up.state() == tcp.StateTimeWait }
			switch first {
			case "app":
				must(t, app.CloseWrite())
				readEOF(t, up)
				testkit.Never(t, 50*time.Millisecond, "the half-closed stream ended", ended)
				_, err := up.Write([]byte("late"))
				must(t, err)
				must(t, up.st.CloseWrite())
				must(t, up.st.CloseWrite())
			case "upstream":
				must(t, up.st.CloseWrite())
				if _, err := up.st.WriteFrom(strings.NewReader("x")); err == nil || errors.Is(err, flow.ErrReset) {
					t.Fatalf("write after FIN: %v", err)
				}
				testkit.Never(t, 50*time.Millisecond, "the half-closed stream ended", ended)
				_, err := app.Write([]byte("late"))
				must(t, err)
				b := make([]byte, 10)
				n, err := up.Read(b)
				if err != nil || string(b[:n]) != "late" {
					t.Fatalf("%q, %v", b[:n], err)
				}
				must(t, app.CloseWrite())
				readEOF(t, up)
			case "both":
				must(t, up.st.CloseWrite())
				must(t, app.CloseWrite())
				readEOF(t, up)
			}
			b, err := io.ReadAll(app)
			if err != nil || first == "app" && string(b) != "late" {
				t.Fatalf("the app read %q, %v", b, err)
			}
			testkit.Eventually(t, "TIME_WAIT, or the end", ended) // TIME_WAIT comes with a HUP
			readEOF(t, up)
			must(t, up.st.Close())
			testkit.Eventually(t, "the endpoint to go", func() bool { return registered(p.st) == 0 })
			if s := p.st.Stats(); s.AppResets != 0 || s.Aborted != 0 || s.Streams != 0 {
				t.Fatalf("%d resets by the app, %d by us, %d streams", s.AppResets, s.Aborted, s.Streams)
			}
		})
	}
}

func readEOF(t *testing.T, c *testConn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d, %v, not EOF", n, err)
	}
}

// TestCloseDelivers: what was written before both FINs reaches an app that reads later than Close.
func TestCloseDelivers(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	must(t, app.CloseWrite())
	readEOF(t, up)
	n := fillUp(t, up)
	must(t, up.st.CloseWrite())
	must(t, up.st.Close())
	if m, err := io.Copy(io.Discard, app); err != nil || m != int64(n) {
		t.Fatalf("%d of %d bytes, %v", m, n, err)
	}
	app.Close()
	testkit.Eventually(t, "the endpoint to go", func() bool { return registered(p.st) == 0 })
}

// TestQueued: what the app has not taken is known, so that a RST from the upstream can wait for it.
func TestQueued(t *testing.T) {
	p := newPair(t, offAll, Config{})
	app, up := p.connect(srv4)
	queued := up.st.(interface{ Queued() int }).Queued
	if n := queued(); n != 0 {
		t.Fatalf("%d of nothing", n)
	}
	n := fillUp(t, up)
	q := queued()
	if q <= 0 || q > n {
		t.Fatalf("%d queued of %d written", q, n)
	}
	got, b := 0, make([]byte, 32<<10)
	for last := q; last > 0; {
		m, err := app.Read(b)
		must(t, err)
		got += m
		now := queued()
		if now > last {
			t.Fatalf("%d queued, %d before", now, last)
		}
		last = now
		if n-got <= 0 && last > 0 {
			testkit.Eventually(t, "the last acknowledgement", func() bool { last = queued(); return last == 0 })
		}
	}
	// Now the RST overtakes nothing: all is in the app's kernel.
	up.st.Abort()
	for {
		m, err := app.Read(b)
		got += m
		if err != nil {
			break
		}
	}
	if got != n {
		t.Fatalf("the app got %d of %d bytes", got, n)
	}
	if m := queued(); m != 0 {
		t.Fatalf("%d queued after Abort", m)
	}
}
