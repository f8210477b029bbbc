package hosttest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// ordinary is the uid and gid of a user without privileges.
const ordinary = 65534

// commandOf makes cmd that of an ordinary user, who has no variables but a PATH.
func commandOf(cmd *exec.Cmd, uid uint32) *exec.Cmd {
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return cmd
}

// alone starts a program that has nothing but a loopback device, and gives its network namespace a name for the test.
func (w *world) alone(uid uint32, unshare ...string) (pid int, end func()) {
	w.t.Helper()
	program := commandOf(
		exec.Command("unshare", append(unshare, "sh", "-c", "ip link set lo up; echo up; exec sleep 1000")...),
		uid,
	)
	out, err := program.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	w.in("host", program.Start)
	over := false
	end = func() {
		if !over {
			over = true
			_ = program.Process.Kill()
			_ = program.Wait()
			_, _ = try("", nil, "ip", "netns", "del", "alone")
		}
	}
	w.t.Cleanup(end)
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		w.t.Skipf("cannot unshare %v as uid %d: %v", unshare, uid, err)
	}
	w.run("", nil, "ip", "netns", "attach", "alone", strconv.Itoa(program.Process.Pid))
	return program.Process.Pid, end
}

// mirrorTCP asks for the address with which the connections of a namespace reach the world.
func mirrorTCP(ns, to string) (from string, err error) {
	err = in(ns, func() error {
		c, err := (&net.Dialer{Timeout: 20 * time.Second, KeepAlive: -1}).Dial("tcp", netipAddrPort(to, 8000).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		all, err := io.ReadAll(c)
		from = string(all)
		return err
	})
	return from, err
}

// goesAlone checks that a namespace without any other network reaches the world through the proxy.
func (w *world) goesAlone() {
	w.t.Helper()
	for to, want := range map[string]string{"203.0.113.7": proxy4, "2001:db8:f::5": proxy6} {
		if got, err := mirrorTCP("alone", to); err != nil || got != want {
			w.t.Errorf("TCP to %s came from %q, not %s: %v", to, got, want, err)
		}
		if got, err := w.mirrorUDP("alone", to); err != nil || got != want {
			w.t.Errorf("UDP to %s came from %q, not %s: %v", to, got, want, err)
		}
	}
	addrs, err := w.nameFrom("alone", "203.0.113.53:53", "name.example")
	if err != nil || len(addrs) != 1 || !netip.MustParsePrefix("198.18.0.0/15").Contains(addr(addrs[0])) {
		w.t.Errorf("name.example has the addresses %v: %v", addrs, err)
		return
	}
	if got, err := mirrorTCP("alone", addrs[0]); err != nil || got != proxy4 {
		w.t.Errorf("TCP to a name came from %q, not %s: %v", got, proxy4, err)
	}
}

// unreachable checks that a namespace without any other network does not reach the world.
func (w *world) unreachable(when string) {
	w.t.Helper()
	for _, to := range []string{"203.0.113.7", "2001:db8:f::5"} {
		if from, err := mirrorTCP("alone", to); err == nil {
			w.t.Errorf("%s: TCP to %s arrived from %q", when, to, from)
		}
	}
}

// TestAttachPrivateNetwork: a process with nothing but a loopback device, as a service with PrivateNetwork=yes has it, reaches
// the world through the proxy while it is attached to, and nothing afterwards.
func TestAttachPrivateNetwork(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, _ := boxWorld(t)
	pid, _ := w.alone(0, "--net")
	w.unreachable("control")
	before := w.stateOf("alone")
	d := w.attach("--pid", fmt.Sprint(pid))
	d.ready()
	w.goesAlone()
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	if out, err := w.command("down", "--pid", fmt.Sprint(pid)); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	if err := d.wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	w.restored("detached", "alone", before)
	w.unreachable("detached")
}

// openTUNToAll puts a /dev/net/tun that everybody may open over the host's, in the tests' own mount namespace, as
// distributions have it.
func openTUNToAll(t *testing.T) {
	t.Helper()
	node := filepath.Join(t.TempDir(), "tun")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Skipf("cannot make a device node: %v", err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot bind it: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/dev/net/tun", unix.MNT_DETACH) })
}

// asOrdinary starts a subcommand of viasocks in the host namespace as an ordinary user.
func (w *world) asOrdinary(args ...string) *daemon {
	w.t.Helper()
	d := &daemon{t: w.t, log: &harness.Log{}, done: make(chan error, 1)}
	d.cmd = commandOf(exec.Command(viasocks, args...), ordinary)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.started = time.Now()
	w.in("host", d.cmd.Start)
	go func() { d.done <- d.cmd.Wait() }()
	w.t.Cleanup(d.end)
	return d
}

// TestAttachRootless: an ordinary user attaches to the namespace of his own rootless container, restores it by `down`, also
// after kill -9, and cannot attach to root's.
func TestAttachRootless(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	openTUNToAll(t)
	w, rec, _ := boxWorld(t)
	pid, end := w.alone(ordinary, "--user", "--map-root-user", "--net")
	w.unreachable("control")
	before := w.stateOf("alone")
	attach := []string{"attach", "--proxy", "socks5://" + proxy4 + ":1080", "--pid", fmt.Sprint(pid)}
	down := func(when string) {
		t.Helper()
		d := w.asOrdinary("down", "--pid", fmt.Sprint(pid))
		if err := d.wait(); err != nil {
			t.Errorf("%s: down: %v\n%s", when, err, d.log)
		}
		w.restored(when, "alone", before)
		w.unreachable(when)
	}
	d := w.asOrdinary(attach...)
	d.ready()
	w.goesAlone()
	down("detached")
	if err := d.wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	d = w.asOrdinary(attach...)
	d.ready()
	d.kill()
	w.keeperGone()
	w.unreachable("killed")
	down("killed and restored")
	d = w.asOrdinary(attach...)
	d.ready()
	end()
	err := d.wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("its process has ended, and viasocks ended with %v, not 4\n%s", err, d.log)
	}
	left, _ := filepath.Glob("/tmp/viasocks-attach-" + strconv.Itoa(ordinary) + "/*")
	if len(left) > 0 {
		t.Errorf("these files are left: %s", left)
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	d = w.asOrdinary("attach", "--proxy", "socks5://"+proxy4+":1080", "--netns", "ctr")
	if err := d.wait(); err == nil || !strings.Contains(d.log.String(), "run it as root") {
		t.Errorf("to a namespace of root: %v\n%s", err, d.log)
	}
}
