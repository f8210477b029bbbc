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

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// program is a program of others that runs in a namespace of the world until the test ends.
type program struct {
	name string
	log  harness.Log
	cmd  *exec.Cmd
	done chan struct{}
	told bool // to stop
}

// state says how the program has ended, or that it runs.
func (p *program) state() string {
	select {
	case <-p.done:
		return p.cmd.ProcessState.String()
	default:
		return "it runs"
	}
}

// crashed names a program that has ended by itself and with an error, or a signal.
func (w *world) crashed() string {
	for _, p := range w.programs {
		if s := p.state(); !p.told && s != "it runs" && s != "exit status 0" {
			return p.name + " has ended: " + s
		}
	}
	return ""
}

// start runs a program in a namespace; before, if it is not nil, prepares the thread that starts it.
func (w *world) start(ns string, before func() error, env []string, args ...string) *program {
	w.t.Helper()
	p := &program{name: filepath.Base(args[0]), done: make(chan struct{})}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = time.Second
	w.in(ns, func() error {
		if before != nil {
			if err := before(); err != nil {
				return fmt.Errorf("cannot prepare %s: %w", p.name, err)
			}
		}
		return p.cmd.Start()
	})
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	w.programs = append(w.programs, p)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("%s (%s) said:\n%s", p.name, p.state(), harness.Tail(p.log.String(), 120))
		}
		p.stop()
	})
	return p
}

// stop ends the program, with what it has started in its process group, and waits for its end.
func (p *program) stop() {
	p.told = true
	signal := func(s syscall.Signal) { _ = syscall.Kill(-p.cmd.Process.Pid, s) }
	signal(syscall.SIGTERM)
	defer signal(syscall.SIGKILL)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		signal(syscall.SIGKILL)
		<-p.done
	}
}

// subnet is what the DHCP server and the router advertise on the host's link.
type subnet struct {
	router4, router6 string
	from, to         string // addresses to lease
	prefix6          string
}

var (
	firstSubnet  = subnet{router4, router6, "198.51.100.50", "198.51.100.99", "2001:db8:1::"}
	secondSubnet = subnet{otherRouter4, otherRouter6, "10.88.0.50", "10.88.0.99", "2001:db8:3::"}
)

// The times of a lease. The server cannot lease for less than two minutes.
const renewAfter, rebindAfter = 6 * time.Second, 12 * time.Second

// dhcpServer starts dnsmasq on the router, with router advertisements beside.
func (w *world) dhcpServer(s subnet) *program {
	w.t.Helper()
	seconds := func(d time.Duration) string { return fmt.Sprint(int(d.Seconds())) }
	return w.start(
		"router",
		nil,
		nil,
		"dnsmasq",
		"--keep-in-foreground",
		"--conf-file=/dev/null",
		"--port=0",
		"--interface=host0",
		"--user=root",
		"--pid-file=",
		"--dhcp-leasefile=/run/dnsmasq.leases",
		"--log-facility=-",
		"--no-ping",
		"--dhcp-authoritative",
		"--dhcp-range="+s.from+","+s.to+",2m",
		"--dhcp-option=option:router,"+s.router4,
		"--dhcp-option=option:T1,"+seconds(renewAfter),
		"--dhcp-option=option:T2,"+seconds(rebindAfter),
		"--enable-ra",
		"--dhcp-range="+s.prefix6+",ra-only,64,10m",
		"--ra-param=host0,4,600",
	)
}

// acknowledged is how many leases the server has given or renewed.
func (p *program) acknowledged() int { return strings.Count(p.log.String(), "DHCPACK(") }

// house gives the calling thread, which is in the host's namespace, what a machine of its own would have: /etc, /run, /var,
// the files of the kernel and a host name that a program may change without the real machine taking notice. /sys can only
// be read, as in a container: that tells networkd, NetworkManager and dhcpcd that there is no udev. The files are written
// there; a name that ends in a slash is a directory.
func house(files map[string]string) func() error {
	return func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("cannot unshare the mounts: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("cannot make the mounts private: %w", err)
		}
		if err := unix.Mount("tmpfs", "/mnt", "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("cannot mount a tmpfs: %w", err)
		}
		if out, err := exec.Command("cp", "-a", "/etc", "/mnt/etc").CombinedOutput(); err != nil {
			return fmt.Errorf("cannot copy /etc: %w: %s", err, out)
		}
		for _, dir := range []string{"/etc/resolv.conf", "/etc/hosts"} { // mount points
			for unix.Unmount(dir, unix.MNT_DETACH) == nil {
			}
		}
		if err := unix.Mount("/mnt/etc", "/etc", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot mount an /etc: %w", err)
		}
		for _, dir := range []string{"/run", "/var/lib", "/sys"} {
			kind, flags, data := "tmpfs", uintptr(0), "mode=755"
			if dir == "/sys" {
				kind, flags, data = "sysfs", unix.MS_RDONLY, ""
			}
			if err := unix.Mount(kind, dir, kind, flags, data); err != nil {
				return fmt.Errorf("cannot mount a %s: %w", dir, err)
			}
		}
		if err := os.Symlink("/etc/machine-id", "/run/machine-id"); err != nil {
			return err
		}
		for path, text := range files {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			if strings.HasSuffix(path, "/") {
				continue
			}
			mode := os.FileMode(0o644)
			if path == networkManagerConnection {
				mode = 0o600
			}
			if err := os.WriteFile(path, []byte(text), mode); err != nil {
				return err
			}
		}
		return nil
	}
}

// TestHouse: what a program in a house does to the machine stays there.
func TestHouse(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	rootOfTheMachine(t)
	p := w.start("host", house(map[string]string{"/etc/a/b": "text"}), nil, "sh", "-ec", `
echo x >/etc/viasocks-test-house
echo y >/var/lib/viasocks-test-house
hostname house
hostname
ls /sys/class/net
! touch /sys/x 2>/dev/null
cat /etc/a/b
`)
	<-p.done
	if got, want := strings.Join(strings.Fields(p.log.String()), " "), "house br0 ctr0 eth0 lo text"; got != want {
		t.Errorf("in the house: %s, want %s", got, want)
	}
	for _, f := range []string{"/etc/viasocks-test-house", "/var/lib/viasocks-test-house", "/etc/a/b"} {
		if _, err := os.Stat(f); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there outside of the house: %v", f, err)
		}
	}
	if name, _ := os.Hostname(); name == "house" {
		t.Error("the machine has another name")
	}
}
