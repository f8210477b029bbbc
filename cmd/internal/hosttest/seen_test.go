package hosttest

import (
	"os/exec"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// TestSeen: the programs of a host under up open connections as fast as they can, while flows --watch, a watcher that
// does not read, top, status and flows look on. No event is lost without being counted, memory is bounded, and what the
// watchers used is given back.
func TestSeen(t *testing.T) {
	w := newWorld(t)
	const far = "203.0.113.80"
	l := w.listen("world", far+":80")
	go harness.AnswerByte(l)
	d := w.up(append(harness.SeenFlags, "--proxy", w.proxy(proxy4+":1080").URL())...)
	(&harness.Seen{
		Command: func(args ...string) *exec.Cmd {
			// nsenter, because the command is started from a thread outside the host's namespace.
			return exec.Command("nsenter", append([]string{"--net=/run/netns/host", viasocks}, args...)...)
		},
		Enter: func() error { return setns("host") },
		To:    netipAddrPort(far, 80), PID: d.cmd.Process.Pid, For: 10 * time.Second,
	}).Check(t)
}
