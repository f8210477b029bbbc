package netns

import (
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tender starts a process of ours again when it ends before it should. Its pace is that of repairs of the TUN: at once if
// the process has lived for a while, then more and more slowly.
type tender struct {
	name  string // of the process
	log   *slog.Logger
	wait  func() (how string) // waits for the end of the process, and tells how it has ended
	start func() error        // starts it again
	stop  chan struct{}       // closed: what ends is not started again
	done  chan struct{}       // closed when tend has returned
	pace  MendPace
}

// newTender returns a tender of a process that runs. The caller runs tend.
func newTender(name string, log *slog.Logger, wait func() string, start func() error) *tender {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &tender{name: name, log: log, wait: wait, start: start, stop: make(chan struct{}), done: make(chan struct{})}
}

// tend returns when the process is not wanted any more and has ended.
func (t *tender) tend() {
	defer close(t.done)
	for {
		how := t.wait()
		if t.stops(0) {
			return
		}
		t.log.Warn("the process "+t.name+" has ended unexpectedly: it is started again", "how", how)
		if !t.startAgain() {
			return
		}
	}
}

// startAgain tries until the process runs. It returns false if the process is not wanted any more.
func (t *tender) startAgain() bool {
	for said := ""; ; {
		if t.stops(t.pace.Delay(time.Now())) {
			return false
		}
		t.pace.Mended(time.Now())
		err := t.start()
		if err == nil {
			return true
		}
		if err.Error() != said {
			said = err.Error()
			t.log.Warn("cannot start the process "+t.name+" again: this is tried until it works", "err", err)
		}
	}
}

// stops waits and reports whether the process is not wanted any more.
func (t *tender) stops(after time.Duration) bool {
	select { // with no time to wait, both are ready
	case <-t.stop:
		return true
	default:
	}
	wait := time.NewTimer(after)
	defer wait.Stop()
	select {
	case <-t.stop:
		return true
	case <-wait.C:
		return false
	}
}

// awaitEnd waits for the end of a child, whose number stays its own until reaped is called.
func awaitEnd(pid int) {
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			return
		}
	}
}

// reaped waits for the end of a child and returns its status. The number of the child is then free for others.
func reaped(pid int) (ws syscall.WaitStatus, err error) {
	for {
		if _, err = syscall.Wait4(pid, &ws, 0, nil); err != syscall.EINTR {
			return ws, err
		}
	}
}

// describe tells how a child has ended.
func describe(ws syscall.WaitStatus, err error) string {
	switch {
	case err != nil:
		return err.Error()
	case ws.Signaled():
		return fmt.Sprintf("signal %d (%v)", int(ws.Signal()), ws.Signal())
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}
