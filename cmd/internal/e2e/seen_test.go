package e2e

import (
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// TestSeen: a program under run opens connections as fast as it can, while flows --watch, a watcher that does not read,
// top, status and flows look on. No event is lost without being counted, memory is bounded, and what the watchers used
// is given back.
func TestSeen(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	l, dst := listenTCP(t, world4)
	go harness.AnswerByte(l)
	a := startApp(t, append(harness.SeenFlags, "--proxy", listenSOCKS(t).URL(), "--log-level", "warn")...)
	fd := a.socket(unix.AF_INET, unix.SOCK_STREAM)
	defer unix.Close(fd)
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ns)
	pid := a.cmd.Process.Pid
	(&harness.Seen{
		Command: func(args ...string) *exec.Cmd {
			return exec.Command(viasocks, append(args, "--pid", strconv.Itoa(pid))...)
		},
		Enter: func() error { return unix.Setns(ns, unix.CLONE_NEWNET) },
		To:    dst, PID: pid, For: 10 * time.Second,
	}).Check(t)
}
