package hosttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// worldNets are where the probes go that need no network of the host's own.
const worldNets = "203.0.113.0/24,2001:db8:f::/64"

// chosenAgent is an agent that was started by `viasocks exclude` or `include`.
func chosenAgent(w *world, how string) *agent {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	a := &agent{fd: -1}
	cmd := exec.Command(viasocks, how, "--", self)
	cmd.Stderr = os.Stderr
	if err := a.launch(w, cmd); err != nil {
		w.t.Fatal(err)
	}
	a.pid = cmd.Process.Pid
	// An answer proves that it runs, and so is in its group.
	fd, err := a.socket(unix.AF_INET, unix.SOCK_DGRAM)
	if err != nil {
		w.t.Fatalf("viasocks %s does not run the program: %v", how, err)
	}
	unix.Close(fd)
	return a
}

// programGroups are the control groups for programs of the host namespace.
func (w *world) programGroups() (found []string) {
	w.t.Helper()
	root, err := cgroup2()
	if err != nil {
		w.t.Skip(err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/run/netns/host", &st); err != nil {
		w.t.Fatal(err)
	}
	_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), fmt.Sprintf("viasocks-%d-", st.Ino)) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// groupsGo waits until no control group for programs is left.
func (w *world) groupsGo(when string) {
	w.t.Helper()
	w.eventually(20*time.Second, when+": no control group is left", func() bool { return len(w.programGroups()) == 0 })
}

// TestExcludedProgram: what a program sends that runs under `viasocks exclude` leaves the host, and nothing else does,
// while viasocks runs, when it was killed, and when another one has taken over.
func TestExcludedProgram(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	o, est := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	chosen := excluded(named("another cgroup"))
	d := w.up("--proxy", proxyURL)
	o.mixed("up, no program yet", usual)
	a := chosenAgent(w, "exclude")
	plain := est.agent.fd
	est.agent.fd = a.fd
	o.mixed("up", chosen)
	w.statusHas("directly, without the proxy", fmt.Sprintf("process %d", a.pid))
	d.kill()
	o.mixed("killed", chosen)
	d = w.up("--proxy", proxyURL)
	o.mixed("taken over", chosen)
	w.statusHas("directly, without the proxy", fmt.Sprintf("process %d", a.pid))
	d = w.takeOver(d, "--proxy", proxyURL)
	o.mixed("taken over alive", chosen)
	w.statusHas("directly, without the proxy", fmt.Sprintf("process %d", a.pid))
	est.agent.fd = plain
	a.quit()
	w.groupsGo("the program has ended")
	o.mixed("the program has ended", usual)

	// One that still runs keeps running after `down`, in the group where it was.
	b := chosenAgent(w, "exclude")
	home := w.groupOf(os.Getpid())
	if got := w.groupOf(b.pid); filepath.Dir(got) != home {
		t.Errorf("the program is in %s, want below %s", got, home)
	}
	d.kill()
	if out, err := w.command("down"); err != nil || !strings.Contains(out, "control group") {
		t.Errorf("down: %v\n%s", err, out)
	}
	if left := w.programGroups(); len(left) > 0 {
		t.Errorf("after down there is %s", left)
	}
	if got := w.groupOf(b.pid); got != home {
		t.Errorf("after down the program is in %s, want %s", got, home)
	}
}

// TestIncludedProgram: nothing of a program under `viasocks include` leaves the host, although the options exclude where
// it goes, or do not include it.
func TestIncludedProgram(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	o, est := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	mine := named("another cgroup")
	for _, c := range []struct {
		name  string
		flags []string
		way   func(*probe) way
	}{
		{"excluded", []string{"--exclude", worldNets}, excluded(both(to(worldNets), not(mine)))},
		{"excluded by user", []string{"--exclude-uid", "0"}, func(p *probe) way {
			if mine(p) {
				return held
			}
			return whatever
		}},
		{"not included", []string{"--include-uid", "nobody"}, included(either(named("another uid"), mine))},
	} {
		plain := est.agent.fd
		d := w.up(append([]string{"--proxy", proxyURL}, c.flags...)...)
		a := chosenAgent(w, "include")
		est.agent.fd = a.fd
		o.mixed(c.name+", up", c.way)
		w.statusHas("through the proxy", fmt.Sprintf("process %d", a.pid))
		if got := w.ask(t, "include", somewhere4); got != proxy4 {
			t.Errorf("%s: an included program reaches %s from %q, want the proxy", c.name, somewhere4, got)
		}
		d.kill()
		o.mixed(c.name+", killed", c.way)
		est.agent.fd = plain
		a.quit()
		o.g.forget() // the next options may let out what this program's sockets still send
		if out, err := w.command("down"); err != nil {
			t.Fatalf("down: %v\n%s", err, out)
		}
		if left := w.programGroups(); len(left) > 0 {
			t.Errorf("%s: after down there is %s", c.name, left)
		}
	}
}

// TestChosenProgramIsItself: exit status and signals are those of the program, its children follow it, and what runs
// inside another chosen program counts for itself.
func TestChosenProgramIsItself(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	w := newWorld(t)
	who(w)
	w.proxy(proxy4 + ":1080")
	w.up("--proxy", proxyURL)
	for _, c := range []struct{ script, from string }{
		{"exclude", host4},
		{`exclude sh -c '"$@"; exit' -`, host4}, // by a child
		{"include", proxy4},
		{"exclude " + viasocks + " include", proxy4},
		{"include " + viasocks + " exclude", host4},
		{"exclude " + viasocks + " exclude", host4},
	} {
		if got := w.ask(t, c.script, somewhere4); got != c.from {
			t.Errorf("viasocks %s: %s is reached from %q, want %s", c.script, somewhere4, got, c.from)
		}
	}
	var exit *exec.ExitError
	if _, err := w.command("exclude", "sh", "-c", "exit 7"); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit 7 gave %v", err)
	}
	if _, err := w.command("exclude", "sh", "-c", "kill -TERM $$"); !errors.As(err, &exit) ||
		exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("SIGTERM gave %v", err)
	}
	if _, err := w.command("exclude", "no-such-program"); !errors.As(err, &exit) || exit.ExitCode() != 127 ||
		!strings.Contains(err.Error(), "not found") {
		t.Errorf("no program gave %v", err)
	}
	w.groupsGo("all have ended")
}

// TestWhoMayChoose: root may; members of the control group may include and, only if `up` says so, exclude.
func TestWhoMayChoose(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	w := newWorld(t)
	who(w)
	w.proxy(proxy4 + ":1080")
	const group = 4711
	for _, members := range []bool{false, true} {
		flags := []string{"--proxy", proxyURL, "--control-group", fmt.Sprint(group)}
		if members {
			flags = append(flags, "--members-exclude")
		}
		d := w.up(flags...)
		for _, c := range []struct {
			how    string
			member bool
			may    bool
		}{
			{"exclude", false, false}, {"include", false, false}, {"exclude", true, members}, {"include", true, true},
		} {
			cred := &syscall.Credential{Uid: 65534, Gid: 65534}
			if c.member {
				cred.Groups = []uint32{group}
			}
			out, err := w.as(cred, c.how, "sh", "-c", "id -u")
			if got := err == nil && strings.TrimSpace(out) == "65534"; got != c.may {
				t.Errorf("members %v, member %v: %s: %v, want %v: %s", members, c.member, c.how, err, c.may, out)
			} else if !c.may && !strings.Contains(out, "permission denied") {
				t.Errorf("members %v, member %v: %s says %s", members, c.member, c.how, out)
			}
		}
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	}
	if left := w.programGroups(); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
}

// TestChoosingIsKilled: whenever viasocks or the program is killed, no group is left after `down`, and nothing leaves
// the host that is not the program's.
func TestChoosingIsKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	rootOfTheMachine(t)
	o, _ := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	const instants = 20
	before := w.state()
	for i := range instants {
		d := w.up("--proxy", proxyURL)
		// The probes are of no chosen program.
		o.mixedDuring(fmt.Sprintf("instant %d", i), usual, func() {
			var programs []*exec.Cmd
			for range 3 {
				cmd := exec.Command(viasocks, "exclude", "sleep", "60")
				w.in("host", cmd.Start)
				t.Cleanup(func() { _ = cmd.Process.Kill() })
				programs = append(programs, cmd)
			}
			testkit.Pace(time.Duration(i) * 2 * time.Millisecond) // to the instant
			kill := func(i int) {
				_ = programs[i].Process.Kill()
				_ = programs[i].Wait()
			}
			kill(0)
			if i%2 == 0 {
				d.kill()
			}
			kill(1)
			if i%4 < 2 { // another one takes over
				d.kill()
				d = w.up("--proxy", proxyURL)
			}
			if i%8 < 4 { // otherwise it still runs at the time of `down`
				kill(2)
			}
		})
		d.kill()
		if out, err := w.command("down"); err != nil {
			t.Errorf("instant %d: down: %v\n%s", i, err, out)
		}
		if left := w.programGroups(); len(left) > 0 {
			t.Errorf("instant %d: left: %s", i, left)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	w.same("after all", before, w.state())
}

// who answers connections with where they came from.
func who(w *world) {
	w.t.Helper()
	serveWho(w)
	if err := setProxyName(proxy4); err != nil {
		w.t.Fatal(err)
	}
}

// ask has a program under `viasocks how` ask where its connection came from. how may have more words of a shell.
func (w *world) ask(t *testing.T, how, at string) string {
	t.Helper()
	script := fmt.Sprintf("exec 3<>/dev/tcp/%s/%d; IFS=: read -r from port <&3; echo $from", at, whoPort)
	file := filepath.Join(t.TempDir(), "ask")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := try("host", nil, "sh", "-c", "exec "+viasocks+" "+how+" bash "+file)
	if err != nil {
		t.Errorf("viasocks %s: %v", how, err)
	}
	return strings.TrimSpace(out)
}

// as runs another subcommand in the host namespace, as another user.
func (w *world) as(c *syscall.Credential, args ...string) (string, error) {
	w.t.Helper()
	cmd := exec.Command(viasocks, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c}
	var out []byte
	err := in("host", func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	return string(out), err
}

// statusHas checks that a line of a section of the status has some words.
func (w *world) statusHas(section, words string) {
	w.t.Helper()
	out, err := w.command("status")
	if err != nil {
		w.t.Error(err)
		return
	}
	_, rest, ok := strings.Cut(out, section)
	if end := strings.Index(rest, "\n  "+"packets"); end >= 0 {
		rest = rest[:end]
	}
	if !ok || !strings.Contains(rest, words) {
		w.t.Errorf("the status does not say %q below %q:\n%s", words, section, out)
	}
}

// groupOf is the control group of a process.
func (w *world) groupOf(pid int) string {
	w.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	w.t.Fatalf("process %d has no group: %s", pid, b)
	return ""
}

func containsAll(s string, words ...string) bool {
	for _, x := range words {
		if !strings.Contains(s, x) {
			return false
		}
	}
	return true
}
