package loop

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestSocketCalls: the calls that the scheduler is not told of do what those of package unix do, and report errors alike.
func TestSocketCalls(t *testing.T) {
	a, b := socketPair(t)
	if err := SetOption(a, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1); err != nil {
		t.Error(err)
	}
	if v, err := unix.GetsockoptInt(a, unix.SOL_SOCKET, unix.SO_KEEPALIVE); err != nil || v != 1 {
		t.Errorf("the option is %d, %v", v, err)
	}
	if err := SetOption(a, unix.SOL_SOCKET, -1, 1); err != unix.ENOPROTOOPT {
		t.Errorf("an option that does not exist: %v", err)
	}
	if _, err := unix.Write(a, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := CloseWrite(a); err != nil {
		t.Error(err)
	}
	var buf [2]byte
	for _, want := range []int{1, 0} { // the FIN comes behind the data
		if n, err := unix.Read(b, buf[:]); n != want || err != nil {
			t.Errorf("read %d, %v; want %d", n, err, want)
		}
	}
	if _, err := unix.Write(b, []byte("y")); err != nil {
		t.Errorf("the other direction: %v", err)
	}
	for _, fd := range []int{a, b} {
		if err := Close(fd); err != nil {
			t.Error(err)
		}
	}
	if err := Close(a); err != unix.EBADF {
		t.Errorf("closed again: %v", err)
	}
	if err := CloseWrite(a); err != unix.EBADF {
		t.Errorf("shut down when closed: %v", err)
	}
}
