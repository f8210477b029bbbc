package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// envFlood makes a process of this test a flooder: where to. The socket is its descriptor 3.
const envFlood = "E2E_FLOOD"

// floodMain sends 1,200 bytes as often as the kernel takes them, until its standard input ends or a minute is over. It
// is a process of its own, so that the others in this test do not wait for its turns in the Go scheduler.
func floodMain(to string) int {
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	done := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(done)
	}()
	b := make([]byte, 1200)
	sa := sockaddr(dst)
	sent := 0
	for end := time.Now().Add(time.Minute); time.Now().Before(end); sent++ {
		select {
		case <-done:
			fmt.Println(sent)
			return 0
		default:
		}
		if err := unix.Sendto(3, b, 0, sa); err != nil && err != unix.ENOBUFS && err != unix.EAGAIN {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 1
}

// flood starts a flooder with the socket c. end ends it and returns how many datagrams it sent.
func flood(t *testing.T, c *net.UDPConn, dst netip.AddrPort) (end func() int) {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envFlood+"="+dst.String())
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end = func() (sent int) {
		if ended {
			return 0
		}
		ended = true
		in.Close()
		fmt.Fscan(out, &sent)
		if err := cmd.Wait(); err != nil {
			t.Error("the flooder:", err)
		}
		return sent
	}
	t.Cleanup(func() { end() })
	return end
}
