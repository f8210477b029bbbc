package loop

import (
	"io"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// echo is a task that sends back what its socket receives.
func echo(t *testing.T, l *Loop, fd int) *fake {
	f := newFake(func(f *fake) bool {
		var buf [64]byte
		for f.Got&In != 0 {
			n, err := unix.Read(fd, buf[:])
			if err != nil || n == 0 {
				f.Got &^= In
				break
			}
			unix.Write(fd, buf[:n])
		}
		return false
	})
	do(t, l, func() {
		if err := l.Watch(&f.Node, fd, unix.EPOLLIN); err != nil {
			t.Error(err)
		}
	})
	return f
}

// answer waits for a byte.
func answer(fd int) error {
	var buf [1]byte
	for {
		n, err := unix.Read(fd, buf[:])
		switch {
		case err == unix.EINTR:
		case err == nil && n != 1:
			return io.ErrUnexpectedEOF
		default:
			return err
		}
	}
}

// TestMoreEventsThanOneQuestion: more sockets become readable at once than the poller tells of in one call, and none is
// forgotten, though the loop waits for new events afterwards.
func TestMoreEventsThanOneQuestion(t *testing.T) {
	l := running(t)
	const n = 2*maxEvents + 3
	var peers [n]int
	for i := range peers {
		a, b := socketPair(t)
		defer unix.Close(a)
		defer unix.Close(b)
		unix.SetNonblock(b, false)
		unix.SetsockoptTimeval(b, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(testkit.Patience.Seconds())})
		f := echo(t, l, a)
		defer do(t, l, func() { l.Forget(&f.Node) })
		peers[i] = b
	}
	do(t, l, func() { // the loop asks only when this is over
		for _, b := range peers {
			unix.Write(b, []byte("x"))
		}
	})
	for i, b := range peers {
		if err := answer(b); err != nil {
			t.Fatalf("socket %d has no answer: %v", i, err)
		}
	}
}

// TestNoEventIsLost: sockets that are written to at any moment, while other goroutines note nodes and wake the loop, are
// always answered. An event that came between the last question and the wait would be lost if it did not end the wait.
func TestNoEventIsLost(t *testing.T) {
	l := running(t)
	var wg sync.WaitGroup
	const rounds = 3000
	for range 3 {
		a, b := socketPair(t)
		defer unix.Close(a)
		defer unix.Close(b)
		unix.SetNonblock(b, false)
		unix.SetsockoptTimeval(b, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(testkit.Patience.Seconds())})
		f := echo(t, l, a)
		defer do(t, l, func() { l.Forget(&f.Node) })
		wg.Go(func() {
			for i := range rounds {
				unix.Write(b, []byte("x"))
				if err := answer(b); err != nil {
					t.Errorf("no answer in round %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		noted := newFake(func(f *fake) bool { f.Got = 0; return false })
		for range rounds {
			l.Note(&noted.Node, Own)
		}
	})
	wg.Wait()
}
