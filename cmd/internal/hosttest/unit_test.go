package hosttest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// unitTree makes control groups as systemd does.
type unitTree struct {
	w    *world
	root string
	top  string // a slice of the test's own
	made []string
}

func newUnitTree(w *world) *unitTree {
	w.t.Helper()
	root, err := cgroup2()
	if err != nil {
		w.t.Skip(err)
	}
	u := &unitTree{w: w, root: root, top: fmt.Sprintf("viasockstest%d.slice", time.Now().UnixNano())}
	w.t.Cleanup(func() {
		for i := len(u.made) - 1; i >= 0; i-- {
			removeSoon(w.t, u.made[i])
		}
	})
	u.mkdir("")
	return u
}

func (u *unitTree) mkdir(path string) string {
	u.w.t.Helper()
	dir := filepath.Join(u.root, u.top, path)
	if err := os.Mkdir(dir, 0o755); err != nil {
		u.w.t.Skip("no control group can be made: ", err)
	}
	u.made = append(u.made, dir)
	return dir
}

// start runs an agent in a group, which it makes as systemd does just before.
func (u *unitTree) start(path string) *agent {
	u.w.t.Helper()
	d, err := os.Open(u.mkdir(path))
	if err != nil {
		u.w.t.Fatal(err)
	}
	defer d.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	a := &agent{fd: -1}
	if err := a.launch(u.w, cmd); err != nil {
		u.w.t.Fatal(err)
	}
	a.pid = cmd.Process.Pid
	return a
}

// stop ends an agent and its unit.
func (u *unitTree) stop(a *agent, path string) {
	a.quit()
	removeSoon(u.w.t, filepath.Join(u.root, u.top, path))
}

// TestExcludedUnit: a unit goes past the proxy when it is started after viasocks, when it is restarted, and when
// viasocks was killed; before the filter knows it, it is held like others. What only has its name goes through the proxy.
func TestExcludedUnit(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	o, est := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	u := newUnitTree(w)
	mine := excluded(named("another cgroup"))
	either := func(p *probe) way {
		if named("another cgroup")(p) {
			return whatever
		}
		return usual(p)
	}
	name := fmt.Sprintf("probe%d.service", time.Now().UnixNano())
	plain := est.agent.fd
	up := func() *daemon { return w.up("--proxy", proxyURL, "--exclude-unit", name) }
	d := up()
	o.mixed("the unit does not run", usual)
	for i, at := range []string{name, name, "deep.slice/" + name} {
		if i == 2 {
			u.mkdir("deep.slice")
		}
		var a *agent
		o.mixedDuring(fmt.Sprintf("start %d", i), either, func() {
			a = u.start(at)
			w.eventually(20*time.Second, "the status has the unit", func() bool {
				out, _ := w.command("status")
				return containsAll(out, "of unit "+name+", which runs", fmt.Sprintf("process %d", a.pid))
			})
			est.agent.fd = a.fd
		})
		o.mixed(fmt.Sprintf("runs %d", i), mine)
		if i == 1 {
			d.kill()
			o.mixed("killed", mine)
			d = up()
			o.mixed("taken over", mine)
		}
		o.g.forget()
		est.agent.fd = plain
		u.stop(a, at)
		o.mixed(fmt.Sprintf("ended %d", i), usual)
	}
	// Below a unit that is no slice, and in a slice of another kind: names that prove nothing.
	for _, parent := range []string{"container.scope", "other.service"} {
		u.mkdir(parent)
		a := u.start(parent + "/" + name)
		est.agent.fd = a.fd
		o.mixed("in "+parent, usual)
		est.agent.fd = plain
		a.quit()
	}
	d.kill()
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
}

// TestUnitGap: from the time when the control group of a unit is made, it takes the filter little time to know it.
func TestUnitGap(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	w := newWorld(t)
	who(w)
	w.proxy(proxy4 + ":1080")
	u := newUnitTree(w)
	unit := fmt.Sprintf("gap%d@", time.Now().UnixNano())
	w.up("--proxy", proxyURL, "--exclude-unit", unit+".service")
	var worst time.Duration
	for i := range 20 {
		name := fmt.Sprintf("%s%d.service", unit, i)
		start := time.Now()
		dir := u.mkdir(name)
		w.eventually(20*time.Second, "the filter has "+name, func() bool {
			out, _ := w.command("status") // the daemon lists what the filter has
			return containsAll(out, u.top+"/"+name)
		})
		worst = max(worst, time.Since(start))
		removeSoon(t, dir)
		w.eventually(20*time.Second, "the filter has forgotten "+name, func() bool {
			out, _ := w.command("status")
			return !containsAll(out, "/"+name)
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("the longest of 20 took %v, with the time that the status takes", worst)
}
