package hosttest

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestProgramIsKilled: whichever is killed of viasocks and a program under `exclude` or `include`, and whenever, the control
// groups go, and so does what the filter knows of them. A program that outlives viasocks goes on after `down`.
func TestProgramIsKilled(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"exclude", "include"} {
		for victim, test := range map[string]func(*world, string){
			"the program": (*world).programKilled, "viasocks": (*world).daemonKilled,
		} {
			t.Run(how+", "+victim, func(t *testing.T) {
				if !apart(t) {
					return
				}
				rootOfTheMachine(t)
				testkit.CheckLeaks(t)
				w := newWorld(t)
				who(w)
				w.proxy(proxy4 + ":1080")
				test(w, how)
			})
		}
	}
}

// choose starts a program under `exclude` or `include`.
func (w *world) choose(how string) (cmd *exec.Cmd, end func()) {
	w.t.Helper()
	cmd = exec.Command(viasocks, how, "--", "sleep", "1000")
	log := &harness.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	w.in("host", cmd.Start)
	over := false
	end = func() {
		if !over {
			over = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if s := log.String(); s != "" {
				w.t.Logf("%s said: %s", how, s)
			}
		}
	}
	w.t.Cleanup(end)
	return cmd, end
}

// awaitProgram waits until a program runs in its group.
func (w *world) awaitProgram(cmd *exec.Cmd) {
	w.t.Helper()
	testkit.Eventually(w.t, "the program to run", func() bool { return w.runs(cmd.Process.Pid) })
}

// chooseTime is how long a program takes until it runs in its group.
func (w *world) chooseTime(how string) time.Duration {
	w.t.Helper()
	best := time.Hour
	for range 3 { // a machine that stalls spoils one
		start := time.Now()
		cmd, end := w.choose(how)
		w.awaitProgram(cmd)
		best = min(best, time.Since(start))
		end()
	}
	return best
}

// chooseUntil starts a program and waits until instant i of its life. A start may take longer than the measured one: half of the
// instants are after its end.
func (w *world) chooseUntil(i int, how string, life time.Duration) (when string, cmd *exec.Cmd, end func()) {
	w.t.Helper()
	cmd, end = w.choose(how)
	const half = killInstants / 2
	if i < half {
		after := life * time.Duration(i) / killInstants
		testkit.Pace(after)
		return fmt.Sprintf("killed %v after the start of the program", after), cmd, end
	}
	w.awaitProgram(cmd)
	after := life * time.Duration(i-half) / killInstants
	testkit.Pace(after)
	return fmt.Sprintf("killed when the program had run for %v", after), cmd, end
}

// runs reports whether a process is the program, in a group of its own.
func (w *world) runs(pid int) bool {
	w.t.Helper()
	name, err := exec.Command("ps", "-o", "comm=", "-p", fmt.Sprint(pid)).Output()
	return err == nil && strings.TrimSpace(string(name)) == "sleep" && strings.Contains(w.groupOf(pid), "/viasocks-")
}

// ruleset is all that the filter has.
func (w *world) ruleset() string { return w.run("host", nil, "nft", "-s", "list", "ruleset") }

// programKilled kills the program at instants of twice the time that it takes to run. Another one keeps running, so that the
// filter has a set all the time.
func (w *world) programKilled(how string) {
	w.t.Helper()
	d := w.up("--proxy", proxyURL)
	life := 2 * w.chooseTime(how)
	w.groupsGo("before")
	other, endOther := w.choose(how)
	w.awaitProgram(other)
	before := w.ruleset()
	inGroup := 0
	for i := range killInstants {
		when, _, end := w.chooseUntil(i, how, life)
		if len(w.programGroups()) > 1 {
			inGroup++
		}
		end()
		when = "the program was " + when
		w.eventually(testkit.Patience, when+": its group is gone", func() bool { return len(w.programGroups()) == 1 })
		var now string
		if !testkit.Until(testkit.Patience, func() bool { now = w.ruleset(); return now == before }) {
			w.t.Errorf("%s: the filter is not what it was:\n%s", when, diff(before, now))
		}
	}
	if inGroup < killInstants/3 {
		w.t.Errorf("the program had a group at %d of %d instants only: the test proves little", inGroup, killInstants)
	}
	endOther()
	w.groupsGo("after all")
	if err := d.stop(); err != nil {
		w.t.Errorf("viasocks ended with %v\n%s", err, d.log)
	}
}

// daemonKilled kills viasocks at such instants, and gives the host back by `down`.
func (w *world) daemonKilled(how string) {
	w.t.Helper()
	before, home := w.state(), w.groupOf(syscall.Getpid())
	d := w.up("--proxy", proxyURL)
	life := 2 * w.chooseTime(how)
	inGroup := 0
	for i := range killInstants {
		if d == nil {
			d = w.up("--proxy", proxyURL)
		}
		when, cmd, end := w.chooseUntil(i, how, life)
		d.kill()
		d = nil
		when = "viasocks was " + when
		ran := w.runs(cmd.Process.Pid)
		if ran {
			inGroup++
		}
		if out, err := w.command("down"); err != nil {
			w.t.Errorf("%s: down: %v\n%s", when, err, out)
		}
		if left := w.programGroups(); len(left) > 0 {
			w.t.Errorf("%s: left: %s", when, left)
		}
		w.same(when, before, w.state())
		if ran && (cmd.Process.Signal(syscall.Signal(0)) != nil || w.groupOf(cmd.Process.Pid) != home) {
			w.t.Errorf("%s: after down the program is in %s, not in %s", when, w.groupOf(cmd.Process.Pid), home)
		}
		end()
	}
	if inGroup < killInstants/4 {
		w.t.Errorf("the program had a group at %d of %d instants only: the test proves little", inGroup, killInstants)
	}
}
