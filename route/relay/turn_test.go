package relay

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestTurn looks at single turns of a loop that does not run: each keeps to its budget and asks for another while there is
// more; a relay that waits for one side asks for none, or the loop would spin.
func TestTurn(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := startFlow(t, l)
	if up, down, again := singleTurn(t, l, f); up+down != 0 || again {
		t.Errorf("idle: %d, %d, again %v", up, down, again)
	}

	f.app.discard = true
	fd := int(f.fd)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	f.up.SetWriteBuffer(4 << 20)
	f.up.SetWriteDeadline(time.Now().Add(5 * time.Second))
	for range 4 {
		f.up.Write(make([]byte, chunk))
		testkit.Settle(time.Millisecond, "the kernel has moved it to the other end")
	}
	if n := unread(fd); n <= turnBytes {
		t.Skipf("the kernel holds only %d bytes", n)
	}
	if _, down, again := singleTurn(t, l, f); down != turnBytes || !again {
		t.Errorf("down: %d, again %v", down, again)
	}
	for unread(fd) > 0 { // the window opens as it is read
		singleTurn(t, l, f)
	}
	f.app.discard, f.app.room = false, 0
	f.up.Write([]byte("x"))
	if _, down, again := singleTurn(t, l, f); down != 0 || again {
		t.Errorf("app is full: %d, again %v", down, again)
	}

	f.app.send(make([]byte, 60000), make([]byte, 60000), make([]byte, 60000), make([]byte, 60000), make([]byte, 100))
	up, _, again := singleTurn(t, l, f)
	if up < turnBytes || up > turnBytes+60000 || !again {
		t.Errorf("up: %d, again %v", up, again)
	}
	f.app.send(make([]byte, 64<<20))
	for range 1000 {
		if _, _, again = singleTurn(t, l, f); !again {
			break
		}
	}
	if again || f.Got&sockOut != 0 {
		t.Error("the upstream does not read, and the relay asks for turns")
	}
	if again := f.Turn(); again {
		t.Error("and again")
	}
}

// singleTurn takes one turn, and returns how many bytes it moved, and whether it asks for another.
func singleTurn(t *testing.T, l *Loop, f *flowOf) (up, down int, again bool) {
	t.Helper()
	up0, down0 := f.Bytes()
	l.Enqueue(&f.Node)
	again, err := l.Step(false)
	if err != nil {
		t.Fatal(err)
	}
	up1, down1 := f.Bytes()
	return int(up1 - up0), int(down1 - down0), again
}

// TestGather: small slices go out together, in order, with a large one behind them in the same call.
func TestGather(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	w := &upWriter{buf: make([]byte, 0, gatherCap)}
	data := pattern(200000)
	s := newStream()
	for i, n := range []int{1, 1448, 1448, gatherBelow, 10, 20} {
		s.in = append(s.in, data[i*gatherBelow:i*gatherBelow+n])
	}
	w.start(pair[0])
	n, err := s.ReadTo(w)
	w.flush()
	if want := 1 + 2*1448 + gatherBelow + 30; n != want || err != nil || w.stopped() || len(w.buf) != 0 {
		t.Fatalf("took %d of %d, %v", n, want, err)
	}
	b := make([]byte, 1<<16)
	var calls []int
	for {
		k, e := recv(pair[1], b, 0)
		if e != 0 {
			break
		}
		calls = append(calls, k)
	}
	if len(calls) != 2 || calls[0] != 1+2*1448+gatherBelow || calls[1] != 30 {
		t.Errorf("messages of %v", calls)
	}
}

// TestResetMetWhileWriting: the app's RST comes behind its FIN, and the first to meet it is a turn that writes to the app. The
// FIN was read, so nobody would ask the stream again: the turn itself must know that there is nothing more to hand over.
func TestResetMetWhileWriting(t *testing.T) {
	testkit.CheckLeaks(t)
	l, err := NewLoop(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := startFlow(t, l)
	turns := func(what string, ok func() bool) {
		t.Helper()
		testkit.Eventually(t, what, func() bool {
			if ok() {
				return true
			}
			l.Enqueue(&f.Node)
			if _, err := l.Step(false); err != nil {
				t.Fatal(err)
			}
			return ok()
		})
	}
	f.app.sendFIN()
	turns("the FIN is passed on", func() bool { return f.upDone })
	f.app.mu.Lock()
	f.app.rst = true // and no hint of it yet
	f.app.mu.Unlock()
	if _, err := f.up.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	turns("the flow ends", func() bool { return f.over })
}
