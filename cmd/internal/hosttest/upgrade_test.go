package hosttest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// upgradable starts a copy of the program, which the test can replace, and waits until it is ready. Its log is that of its
// heirs, too.
func (w *world) upgradable(flags ...string) (d *daemon, program string) {
	w.t.Helper()
	program = filepath.Join(w.t.TempDir(), "viasocks")
	w.install(program, viasocks)
	r, out, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	d = &daemon{t: w.t, log: &harness.Log{}, done: make(chan error, 1), started: time.Now()}
	read := make(chan struct{})
	go func() { defer close(read); io.Copy(d.log, r); r.Close() }()
	w.t.Cleanup(func() { <-read }) // all of them have ended
	d.cmd = exec.Command(program, append([]string{"up", "--log-level", "info"}, flags...)...)
	d.cmd.Stdout, d.cmd.Stderr = out, out
	w.in("host", d.cmd.Start)
	out.Close()
	go func() { d.done <- d.cmd.Wait() }()
	w.t.Cleanup(d.end)
	d.ready()
	return d, program
}

// install replaces the program at path as a package does.
func (w *world) install(path, from string) {
	w.t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o755)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// heir is the process that `viasocks upgrade` has started: our child, because it is the sibling of the old one.
func (w *world) heir(old *daemon, pid int) *daemon {
	w.t.Helper()
	p, err := os.FindProcess(pid)
	if err != nil {
		w.t.Fatal(err)
	}
	d := &daemon{t: w.t, log: old.log, done: make(chan error, 1), cmd: &exec.Cmd{Process: p}}
	go func() {
		state, err := p.Wait()
		if err == nil && !state.Success() {
			err = fmt.Errorf("it ended with %v", state)
		}
		d.done <- err
	}()
	w.t.Cleanup(d.end)
	return d
}

// upgrade runs `viasocks upgrade`.
func (w *world) upgrade(old *daemon) *daemon {
	w.t.Helper()
	out, err := w.command("upgrade")
	words := strings.Fields(out)
	if err != nil || len(words) < 2 {
		w.t.Fatalf("upgrade: %v: %s", err, out)
	}
	pid, err := strconv.Atoi(words[1])
	if err != nil {
		w.t.Fatalf("upgrade: %s", out)
	}
	return w.heir(old, pid)
}

// TestUpgrade: the viasocks that is up starts the program that is there now, which takes the host over. No connection is
// cut, and nothing leaves the host unproxied.
func TestUpgrade(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	rec := newRecorder(w)
	rec.known(w.proxy(proxy4 + ":1080"))
	rules := w.ipRules()
	w.configure("proxy socks5://" + proxy4)
	first, program := w.upgradable("--config", configFile)
	held := w.hold(50)
	held.use()
	rec.take()
	w.install(program, viasocks)
	second := w.upgrade(first)
	if s := ask[control.Status](w, "status"); s.PID != second.cmd.Process.Pid || s.Before < 50 {
		t.Errorf("the status is %+v", s)
	}
	second.signal(syscall.SIGUSR2) // again, while the first one still carries
	w.eventually(readyWithin, "the third to have the host", func() bool {
		return strings.Count(first.log.String(), "handed the host over") == 2
	})
	pid := ask[control.Status](w, "status").PID
	if pid == second.cmd.Process.Pid || !first.alive() || !second.alive() {
		t.Errorf("process %d has the host", pid)
	}
	third := w.heir(second, pid)
	held.unuse()
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	if err := third.stop(); err != nil {
		t.Error(err)
	}
	for _, d := range []*daemon{second, first} {
		if err := d.wait(); err != nil {
			t.Errorf("an old process ended with %v", err)
		}
	}
	w.cleared(rules)
}

// TestUpgradeFails: a program that cannot start, or that does not take the configuration, leaves the old process as it was.
func TestUpgradeFails(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	rules := w.ipRules()
	w.configure("proxy socks5://" + proxy4)
	first, program := w.upgradable("--config", configFile)
	held := w.hold(20)
	held.use()
	installed := w.installed()
	script := func(text string, mode os.FileMode) func() {
		return func() {
			if err := os.Remove(program); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(program, []byte("#!/bin/sh\n"+text+"\n"), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		what      string
		before    func()
		want, log string
	}{
		{"not executable", script("exit 0", 0o600), "permission denied", "the upgrade has failed"},
		{"a crash", script("kill -SEGV $$", 0o700), "has ended without taking over", "the upgrade has failed"},
		{"another mark", func() {
			w.install(program, viasocks)
			w.configure("proxy socks5://" + proxy4 + "\nmark 0x12000000/0xff000000")
		}, "has ended without taking over", `--mark (it is`},
		{"a mistake", func() { w.configure("no-such-option") }, "has ended without taking over", "no-such-option"},
	} {
		c.before()
		out, err := w.command("upgrade")
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v\n%s", c.what, err, out)
		}
		w.eventually(
			testkit.Patience,
			"the log to tell of "+c.what,
			func() bool { return strings.Contains(first.log.String(), c.log) },
		)
		if s := ask[control.Status](w, "status"); s.PID != first.cmd.Process.Pid || s.State != control.Ready {
			t.Errorf("%s: the status is %+v", c.what, s)
		}
	}
	if after := w.installed(); fmt.Sprint(after) != fmt.Sprint(installed) {
		t.Errorf("the host was %v and is %v", installed, after)
	}
	w.twoAtOnce(first, program, script)
	held.unuse()
	if err := first.stop(); err != nil {
		t.Error(err)
	}
	w.cleared(rules)
}

// TestUpgradeDown: `viasocks down` ends a new process that has not taken over yet, which would otherwise start in its own right.
func TestUpgradeDown(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	rules := w.ipRules()
	first, program := w.upgradable("--proxy", "socks5://"+proxy4)
	pidFile, never := program+".pid", program+".fifo" // that nobody writes to
	if err := syscall.Mkfifo(never, 0o600); err != nil {
		t.Fatal(err)
	}
	slow := "#!/bin/sh\necho $$ >" + pidFile + ".new; mv " + pidFile + ".new " + pidFile + "; read _ <" + never + "; exec " +
		viasocks + ` "$@"`
	if err := os.WriteFile(program+".new", []byte(slow+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(program+".new", program); err != nil {
		t.Fatal(err)
	}
	upgraded := make(chan string, 1)
	go func() { out, _ := w.command("upgrade"); upgraded <- out }()
	var pid int
	w.eventually(testkit.Patience, "the new process to start", func() bool {
		b, err := os.ReadFile(pidFile)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	second := w.heir(first, pid)
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	if err := second.wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the new process has ended with %v", err)
	}
	if out := <-upgraded; !strings.Contains(out, "has ended meanwhile") {
		t.Errorf("upgrade: %s", out)
	}
	w.cleared(rules)
}

// twoAtOnce checks that a second upgrade fails at once while a first one is under way.
func (w *world) twoAtOnce(d *daemon, program string, script func(string, os.FileMode) func()) {
	w.t.Helper()
	pidFile := program + ".pid"
	script("echo $$ >"+pidFile+".new; mv "+pidFile+".new "+pidFile+"; exec sleep 300", 0o700)()
	first := make(chan string, 1)
	go func() { out, _ := w.command("upgrade"); first <- out }()
	var pid int
	w.eventually(testkit.Patience, "the new process to start", func() bool {
		b, err := os.ReadFile(pidFile)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	start := time.Now()
	out, err := w.command("upgrade")
	if err == nil || !strings.Contains(out, fmt.Sprintf("another upgrade is under way: process %d", pid)) {
		w.t.Errorf("the second: %v: %s", err, out)
	}
	if took := time.Since(start); took > 10*time.Second {
		w.t.Errorf("the second failed after %v", took)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	if out := <-first; !strings.Contains(out, "has ended without taking over") {
		w.t.Errorf("the first: %s", out)
	}
	if !d.alive() {
		w.t.Error("the old process has ended")
	}
}
