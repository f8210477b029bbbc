package netns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// attachTo names the interface to which this process, an ordinary user's, is to attach a queue.
const attachTo = "VIASOCKS_TEST_ATTACH_TO"

// attachIfAsked attaches a queue, says how it went, and holds the queue until its standard input ends. A line there has it
// detached.
func attachIfAsked() {
	name := os.Getenv(attachTo)
	if name == "" {
		return
	}
	fd, _, err := openQueue(name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_MULTI_QUEUE)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("attached")
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadString('\n'); err != nil {
			os.Exit(0)
		}
		ifr, _ := unix.NewIfreq("")
		ifr.SetUint16(unix.IFF_DETACH_QUEUE)
		fmt.Println("detached", unix.IoctlIfreq(fd, unix.TUNSETQUEUE, ifr))
	}
}

// intruder is a process of an ordinary user that has tried to attach a queue.
type intruder struct {
	said string // "attached", or why not
	in   io.Closer
	tell func(line string) (answer string)
	cmd  *exec.Cmd
}

func intrude(t *testing.T, name string) *intruder {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), attachTo+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: asUser, Gid: asUser}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	line := func() string {
		s, _ := lines.ReadString('\n')
		return strings.TrimSpace(s)
	}
	i := &intruder{in: in, cmd: cmd, said: line()}
	i.tell = func(s string) string {
		io.WriteString(in, s+"\n")
		return line()
	}
	t.Cleanup(i.end)
	return i
}

func (i *intruder) end() {
	if i.cmd.ProcessState == nil {
		i.in.Close()
		i.cmd.Wait()
	}
}

// asRoot skips the test where there is no other user, or no TUN node that everyone may open.
func asRoot(t *testing.T) {
	t.Helper()
	if st, err := os.Stat(tunNode); os.Geteuid() != 0 || err != nil || st.Mode().Perm() != 0o666 {
		t.Skip("needs root and a TUN node for everyone: ", err)
	}
	if os.Getenv(inNamespace) == "" {
		t.Skip(noNamespace)
	}
	network(t)
}

// multiQueue is a persistent interface that has no owner, with one queue of ours.
func multiQueue(t *testing.T, name string) (fd int) {
	t.Helper()
	fd, _, err := openQueue(name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_MULTI_QUEUE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { deleteLink(name) })
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestOnlyTheOwnerAttaches: another user can't attach a queue, neither while we have ours nor when we left the interface.
func TestOnlyTheOwnerAttaches(t *testing.T) {
	asRoot(t)
	fds := testkit.CountFiles(t)
	unix.Close(multiQueue(t, "vso0"))
	if i := intrude(t, "vso0"); i.said != "attached" {
		t.Fatalf("the control, an interface without an owner: %s", i.said)
	} else {
		i.end()
	}
	for _, name := range []string{"vso1", "vso0"} { // new, and one that is taken over
		queues, _, err := OpenTUN(TUNOptions{Name: name, Persist: true, Queues: 3})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { deleteLink(name) })
		for _, open := range []bool{true, false} {
			if !open {
				CloseTUN(queues)
			}
			i := intrude(t, name)
			i.end()
			if !strings.Contains(i.said, "operation not permitted") {
				t.Errorf("%s, our queues open %v: %s", name, open, i.said)
			}
		}
	}
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

// TestForeignQueueOfNewInterface: somebody attaches a queue before a new interface has an owner.
func TestForeignQueueOfNewInterface(t *testing.T) {
	asRoot(t)
	for _, c := range []struct{ times, made int }{{1, 2}, {makeAttempts, makeAttempts}} {
		fds := testkit.CountFiles(t)
		made := 0
		var intruders []*intruder
		unowned = func(name string) {
			if made++; made > c.times {
				return
			}
			i := intrude(t, name)
			if i.said != "attached" {
				t.Error(i.said)
			}
			intruders = append(intruders, i)
		}
		queues, name, err := OpenTUN(TUNOptions{Name: "vsm0", Queues: 2})
		unowned = func(string) {}
		if made != c.made {
			t.Errorf("made %d times, want %d", made, c.made)
		}
		if c.times == makeAttempts {
			if !errors.Is(err, errForeign) {
				t.Errorf("somebody attaches again and again: %v", err)
			}
		} else if n, cerr := queueCount(name); err != nil || cerr != nil || n != 2 {
			t.Errorf("%d queues, %v, %v, want ours", n, cerr, err)
		}
		CloseTUN(queues)
		if exists("vsm0") {
			t.Error("the interface is still there")
		}
		for _, i := range intruders {
			i.end()
		}
		if n := testkit.CountFiles(t); n != fds {
			t.Errorf("%d open files, %d before", n, fds)
		}
	}
}

// TestForeignQueueOfOldInterface: an interface that was there is not taken over while somebody else has a queue, also one that
// is detached for now, and it is left as it was.
func TestForeignQueueOfOldInterface(t *testing.T) {
	asRoot(t)
	fds := testkit.CountFiles(t)
	unix.Close(multiQueue(t, "vsf0"))
	before, err := net.InterfaceByName("vsf0")
	if err != nil {
		t.Fatal(err)
	}
	i := intrude(t, "vsf0")
	if i.said != "attached" {
		t.Fatal(i.said)
	}
	for _, detached := range []bool{false, true} {
		if detached {
			if said := i.tell("detach"); said != "detached <nil>" {
				t.Fatal(said)
			}
		}
		queues, _, err := OpenTUN(TUNOptions{Name: "vsf0", Persist: true, Queues: 2})
		CloseTUN(queues)
		if !errors.Is(err, errForeign) || !strings.Contains(err.Error(), "ip link del vsf0") {
			t.Errorf("detached %v: %v", detached, err)
		}
		if after, err := net.InterfaceByName("vsf0"); err != nil || after.Index != before.Index {
			t.Errorf("detached %v: the interface is another one: %v", detached, err)
		}
	}
	i.end()
	queues, _, err := OpenTUN(TUNOptions{Name: "vsf0", Persist: true, Queues: 2})
	if err != nil {
		t.Errorf("when the other one is gone: %v", err)
	}
	CloseTUN(queues)
	if n := testkit.CountFiles(t); n != fds {
		t.Errorf("%d open files, %d before", n, fds)
	}
}

// TestProgramThatDropsRoot: what the program of Spawn starts as another user can't attach a queue to its TUN.
func TestProgramThatDropsRoot(t *testing.T) {
	asRoot(t)
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		argv []string
		want string
	}{
		{[]string{exe}, "attached"}, // the control: root
		{[]string{setpriv, "--reuid", fmt.Sprint(asUser), "--regid", fmt.Sprint(asUser), "--clear-groups", exe},
			"operation not permitted"},
	} {
		s := testSpec(c.argv...)
		s.TUN.Queues = 3
		s.Env = append(os.Environ(), attachTo+"="+s.TUN.Name)
		s.Stdin = null
		if out, _, err := run(t, s); !strings.Contains(out, c.want) || err != nil {
			t.Errorf("%q: %q, %v; want %q", c.argv, out, err, c.want)
		}
	}
}
