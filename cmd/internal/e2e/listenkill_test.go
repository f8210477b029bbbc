package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestListenKilledAtAnyInstant kills viasocks and its program at twelve instants after the start with --listen, and once while
// a peer is connected. Afterwards there are no processes, mounts and sockets of it, and dante listens for it no longer.
func TestListenKilledAtAnyInstant(t *testing.T) {
	const instants, step = 12, 25 * time.Millisecond
	url, port := binding(t), freePort(t)
	testkit.CheckLeaks(t)
	dir := t.TempDir()
	adoptAll(t)
	dante := children(os.Getpid())
	before := traces(t)
	start := func() (*exec.Cmd, chan struct{}) {
		cmd := startSleeper(t, dir, "--proxy", url, "--listen", fmt.Sprint(port), "--listen", "auto", "--on-port", "/bin/true")
		gone := make(chan struct{})
		go func() { _ = cmd.Wait(); close(gone) }()
		return cmd, gone
	}
	ended := func(cmd *exec.Cmd, gone chan struct{}, after string) {
		t.Helper()
		select {
		case <-gone:
		case <-time.After(testkit.Patience):
			_ = cmd.Process.Kill()
			t.Fatalf("viasocks did not end after %s", after)
		}
		reapAll(t, after, dante...)
		noTrace(t, before, after)
	}
	for _, victim := range []string{"viasocks", "sleep"} {
		for i := range instants {
			cmd, gone := start()
			<-time.After(time.Duration(i) * step)
			if victim == "viasocks" {
				_ = cmd.Process.Kill()
			} else if pid := awaitChild(t, cmd.Process.Pid, victim, gone); pid != "" {
				signalPID(t, pid, syscall.SIGKILL)
			}
			ended(cmd, gone, fmt.Sprintf("the death of %s at %v", victim, time.Duration(i)*step))
		}
	}
	cmd, gone := start()
	c := peer(t, fmt.Sprintf("%s:%d", world4, port)) // as soon as dante listens
	_ = cmd.Process.Kill()
	_ = c.SetDeadline(time.Now().Add(testkit.Patience))
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the peer reads %d bytes: %v", n, err)
	}
	ended(cmd, gone, "the death of viasocks with a peer")
}
