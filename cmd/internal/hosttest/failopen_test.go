package hosttest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestFailOpen: --fail-open opens the host when viasocks is killed, and for nothing less.
func TestFailOpen(t *testing.T) {
	if !apart(t) {
		return
	}
	o, _ := newChoosing(t)
	w := o.w
	p := w.proxy(proxy4 + ":1080")
	o.rec.known(p)
	before := w.state()
	open := func(when string) {
		t.Helper()
		w.eventually(30*time.Second+guard, when+": the host is open", func() bool {
			got, err := w.askWho(somewhere4, 0)
			return err == nil && got == host4
		})
	}

	d := w.up("--proxy", proxyURL, "--fail-open")
	o.mixed("fail-open: up", usual)
	o.carries("fail-open: up", somewhere, 0)
	p.Close()
	o.mixed("fail-open: proxy down", usual)
	d.kill()
	open("killed")
	w.same("fail-open: killed", before, w.state())
	o.control("fail-open: killed")

	// The guardian is killed as well: the filter opens when nobody has renewed it for a while, and not before.
	o.rec.known(w.proxy(proxy4 + ":1080"))
	d = w.up("--proxy", proxyURL, "--fail-open")
	killGuardian(t, d.cmd.Process.Pid)
	d.kill()
	o.mixed("fail-open: all killed, guarded yet", usual)
	open("all killed")
	o.control("fail-open: all killed")
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	w.same("fail-open: all killed, and down", before, w.state())

	// Whoever stops it and wants it closed has it closed.
	d = w.up("--proxy", proxyURL, "--fail-open", "--stay-closed")
	if err := d.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	testkit.Pace(guard)
	o.mixed("fail-open, stay-closed: stopped", usual)
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	w.same("fail-open, stay-closed: down", before, w.state())
}

// killGuardian kills the process that a viasocks with --fail-open has started.
func killGuardian(t *testing.T, parent int) {
	t.Helper()
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range all {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		if len(f) < 2 || f[1] != strconv.Itoa(parent) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
	t.Error("there is no guardian")
}
