package daemon

import (
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// handTo hands the host over to the process pid.
func (u *up) handTo(pid int) {
	u.taker = &taker{pid: pid}
	close(u.upgrades.handed)
}

// startSleeper starts a process that does nothing. The pidfd is the caller's.
func startSleeper(t *testing.T) (cmd *exec.Cmd, pidfd int) {
	t.Helper()
	cmd = exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, pidfd
}

// A new process that does not take over in time is killed, one that takes over is left alone. The end of viasocks ends the
// wait, and the new process unless that may have the host.
func TestAwaitHeir(t *testing.T) {
	for _, c := range []struct {
		what   string
		change func(*up)
		within time.Duration
		want   string // in the error; empty: none
		killed bool
	}{
		{"it hangs", func(*up) {}, 50 * time.Millisecond, "did not take over within 50ms and was killed", true},
		{"it takes over", func(u *up) { u.handTo(u.upgrades.heir) }, time.Minute, "", false},
		{"another one takes over", func(u *up) { u.handTo(1) }, time.Minute, "process 1 has taken the host over", true},
		{"viasocks ends", func(u *up) { u.upgrades.end() }, time.Minute, "has ended meanwhile", true},
		{
			"viasocks fails while it lets go", func(u *up) { u.taker = &taker{}; u.upgrades.end() }, time.Minute,
			"has ended meanwhile", false,
		},
	} {
		t.Run(c.what, func(t *testing.T) {
			testkit.CheckLeaks(t)
			cmd, pidfd := startSleeper(t)
			defer unix.Close(pidfd)
			u := &up{upgrades: newUpgrades()}
			defer u.upgrades.close()
			u.upgrades.heir = cmd.Process.Pid
			c.change(u)
			err := u.awaitHeir(cmd.Process.Pid, pidfd, c.within)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("it is %v", err)
			}
			if c.want != "" && u.upgrades.started() != 0 {
				t.Error("no other upgrade can be made")
			}
			if !c.killed {
				if err := cmd.Process.Kill(); err != nil {
					t.Errorf("the process has ended: %v", err)
				}
			}
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Errorf("the process has ended with %v", err)
			}
		})
	}
}
