package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// needNamed makes the place of named network namespaces this test's own, and one namespace in it.
func needNamed(t *testing.T, name string) {
	t.Helper()
	needWorld(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, for ip netns")
	}
	testkit.CheckLeaks(t)
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		t.Skip(err)
	}
	if err := syscall.Mount("tmpfs", "/run/netns", "tmpfs", 0, "size=64k"); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount("/run/netns", syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ip(t, "netns", "add", name)
	t.Cleanup(func() { ip(t, "netns", "del", name) })
}

func ip(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// stateOf is everything of a namespace that viasocks could have changed. The kernel gives lo another queueing discipline when it
// first comes up, and keeps that.
func stateOf(t *testing.T, name string) string {
	t.Helper()
	state := strings.ReplaceAll(ip(t, "-n", name, "-j", "addr"), `"noqueue"`, `"noop"`)
	for _, family := range []string{"-4", "-6"} {
		state += ip(t, family, "-n", name, "-j", "route", "show", "table", "all") + ip(t, family, "-n", name, "-j", "rule")
	}
	return state + ip(t, "netns", "exec", name, "sh", "-c",
		"grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/ipv4/ping_group_range "+
			"/proc/sys/net/ipv4/ip_unprivileged_port_start 2>/dev/null || true")
}

// changes tells how two states differ.
func changes(before, after string) string {
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	var b strings.Builder
	for _, line := range old {
		if !slices.Contains(now, line) {
			b.WriteString("\nbefore: " + line)
		}
	}
	for _, line := range now {
		if !slices.Contains(old, line) {
			b.WriteString("\nafter:  " + line)
		}
	}
	return "the namespace was changed:" + b.String()
}

// pidsIn lists the processes in a namespace.
func pidsIn(t *testing.T, name string) []string {
	t.Helper()
	return strings.Fields(ip(t, "netns", "pids", name))
}

// namedStates are the states in which a namespace may be found.
var namedStates = map[string]func(t *testing.T, name string){
	"new": func(*testing.T, string) {},
	"in use": func(t *testing.T, name string) {
		ip(t, "-n", name, "link", "set", "lo", "up")
		ip(t, "-n", name, "addr", "add", "192.0.2.7/32", "dev", "lo")
		ip(t, "-n", name, "-6", "addr", "add", "2001:db8::7/128", "dev", "lo")
		ip(t, "-n", name, "rule", "add", "from", "192.0.2.7", "lookup", "77", "pref", "99")
		testkit.Eventually(t, "the route to its own address", func() bool {
			return testkit.HasLocalRoutes(ip(t, "-n", name, "addr"), ip(t, "-n", name, "-6", "route", "show", "table", "all"))
		})
	},
}

// restorerName is argv[0] of the process that restores a named namespace.
const restorerName = "viasocks-restore"

// theRestorer returns that process.
func theRestorer(t *testing.T, viasocks int) (pid string) {
	t.Helper()
	list := childrenNamed(viasocks, restorerName)
	if len(list) != 1 {
		t.Fatalf("the processes that restore are %v", list)
	}
	return list[0]
}

// inNamedStates runs a test in the namespace blue, for each state that it may be in before.
func inNamedStates(t *testing.T, f func(t *testing.T, proxy, before string)) {
	for what, prepare := range namedStates {
		t.Run(what, func(t *testing.T) {
			needNamed(t, "blue")
			proxy := listenSOCKS(t)
			prepare(t, "blue")
			f(t, proxy.URL(), stateOf(t, "blue"))
		})
	}
}

// TestNamedNamespace: a program runs in a named namespace, which is as before when it has ended, also if the process
// that restores it was killed. It is refused to a second viasocks at the same time.
func TestNamedNamespace(t *testing.T) {
	if !apart(t) {
		return
	}
	inNamedStates(t, func(t *testing.T, proxy, before string) {
		// SIGTERM, which a service manager sends to all processes, does not keep it from its work.
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			cmd := exec.Command(viasocks, "run", "--proxy", proxy, "--log-level", "info", "--publish", "0:80",
				"--netns", "blue", "--", "sh", "-c", "ip -br link; exec sleep 60")
			var out strings.Builder
			cmd.Stdout = &out
			startPublished(t, cmd)
			second := exec.Command(viasocks, "run", "--proxy", proxy, "--netns", "blue", "--", "true")
			if got, err := output(second); err == nil || !strings.Contains(got, "another viasocks uses it") {
				t.Errorf("a second one: %v\n%s", err, got)
			}
			signalPID(t, theRestorer(t, cmd.Process.Pid), sig)
			_ = cmd.Process.Signal(syscall.SIGTERM)
			_ = cmd.Wait()
			if after := stateOf(t, "blue"); after != before {
				t.Error(changes(before, after))
			}
			if left := pidsIn(t, "blue"); len(left) > 0 {
				t.Errorf("processes are left: %v", left)
			}
		}
	})
}

// childrenNamed lists the children of a process whose argv[0] is name.
func childrenNamed(pid int, name string) (list []string) {
	for _, child := range children(pid) {
		if b, _ := os.ReadFile("/proc/" + child + "/cmdline"); strings.HasPrefix(string(b), name+"\x00") {
			list = append(list, child)
		}
	}
	return list
}

func signalPID(t *testing.T, pid string, sig syscall.Signal) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err == nil {
		err = syscall.Kill(n, sig)
	}
	if err != nil {
		t.Error(err)
	}
}

// TestNamedNamespaceKilled: after kill -9 of viasocks at any instant the namespace becomes what it was.
func TestNamedNamespaceKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	const instants, step = 10, 12 * time.Millisecond
	for what, prepare := range namedStates {
		t.Run(what, func(t *testing.T) {
			needNamed(t, "blue")
			proxy := listenSOCKS(t)
			prepare(t, "blue")
			before := stateOf(t, "blue")
			for i := range instants {
				cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--publish", "0:80", "--netns", "blue", "--",
					"sleep", "60")
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				if i == instants-1 { // the last one is killed when all is there
					testkit.Eventually(t, "the program", func() bool { return len(childrenNamed(cmd.Process.Pid, "sleep")) == 1 })
				} else {
					<-time.After(time.Duration(i) * step)
				}
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
				testkit.Eventually(t, "the end of all processes but the program", func() bool {
					for _, pid := range pidsIn(t, "blue") {
						b, err := os.ReadFile("/proc/" + pid + "/cmdline")
						if err == nil && !strings.HasPrefix(string(b), "sleep\x00") && len(b) > 0 {
							return false
						}
					}
					return true
				})
				for _, pid := range pidsIn(t, "blue") { // without a network it goes on, as the manual says
					signalPID(t, pid, syscall.SIGKILL)
				}
				var after string
				if !waitFor(func() bool { after = stateOf(t, "blue"); return after == before }) {
					t.Fatalf("killed after %v: %s", time.Duration(i)*step, changes(before, after))
				}
			}
		})
	}
}

// waitFor is testkit.Eventually for a caller that has more to say.
func waitFor(ok func() bool) bool {
	for end := time.Now().Add(testkit.Patience); time.Now().Before(end); <-time.After(10 * time.Millisecond) {
		if ok() {
			return true
		}
	}
	return false
}

// TestNamedNamespaceRefused: what cannot be used safely is refused with a reason, and nothing of it is changed.
func TestNamedNamespaceRefused(t *testing.T) {
	needNamed(t, "blue")
	proxy := listenSOCKS(t)
	ip(t, "-n", "blue", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
	ip(t, "-n", "blue", "link", "set", "v0", "up")
	if err := os.WriteFile("/run/netns/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before := stateOf(t, "blue")
	for name, want := range map[string]string{
		"blue": `cannot use the network namespace "blue": it has the network device v0`,
		"none": `there is none: make it with 'ip netns add none'`,
		"file": "/run/netns/file is not one",
		"a/b":  "must be a name that 'ip netns list' shows",
	} {
		cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--netns", name, "--", "true")
		if got, err := output(cmd); err == nil || !strings.Contains(got, want) || strings.Count(got, "\n") != 1 {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
	if after := stateOf(t, "blue"); after != before {
		t.Error(changes(before, after))
	}
}

// TestRunAsUser: the program is the user, with its groups and variables and without capabilities. Only root can do this.
func TestRunAsUser(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		for given, want := range map[string]string{
			"nobody":      "65534 65534 65534\nnobody nobody /nonexistent none kept\nCapEff:\t0000000000000000\n",
			"65534:4":     "65534 4 4\nnobody nobody /nonexistent none kept\nCapEff:\t0000000000000000\n",
			"123456:4321": "123456 4321 4321\nnone none / none kept\nCapEff:\t0000000000000000\n",
			"123456":      "there is no user 123456: give its group as well",
			"nosuchuser":  `there is no user "nosuchuser"`,
			"nobody:nosu": `there is no group "nosu"`,
		} {
			script := `echo $(id -u) $(id -g) $(id -G); echo ${USER-none} ${LOGNAME-none} $HOME ${XDG_RUNTIME_DIR-none} $OTHER; grep CapEff /proc/self/status`
			cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--user", given, "--", "sh", "-c", script)
			cmd.Dir = "/"
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "OTHER=kept"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
			got, err := output(cmd)
			if strings.HasPrefix(want, "there") {
				if err == nil || !strings.Contains(got, want) {
					t.Errorf("--user %s: %v\n%s", given, err, got)
				}
				continue
			}
			if uid != 0 {
				want = fmt.Sprintf("viasocks: cannot run a program as user %s: only root can\n", strings.Fields(want)[0])
			}
			if got != want || (err == nil) != (uid == 0) {
				t.Errorf("--user %s: %v\n%swant\n%s", given, err, got, want)
			}
		}
	})
}
