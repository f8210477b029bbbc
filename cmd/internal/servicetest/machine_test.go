package servicetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

const (
	host4, world4 = "198.51.100.2", "198.51.100.1"
	far4          = "203.0.113.80"
	farName       = "far.example"
	proxyURL      = "socks5://" + world4 + ":1080"
)

// boot starts systemd in the namespaces of the shell that runs it. Its arguments are the folder for the overlay, the
// root of the repository and the viasocks under test.
//
// As the first process, systemd would raise limits of the whole kernel below /proc/sys: only those of its network can
// be written.
const boot = `
top=$1 repository=$2 viasocks=$3
mount --make-rprivate /
mount -t tmpfs servicetest "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
cp "$viasocks" "$top/viasocks"
cd "$top/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
	IFS=: read -r name major minor <<<"$node"
	mknod -m 666 "dev/$name" c "$major" "$minor"
done
mkdir dev/net dev/pts dev/shm
mknod -m 600 dev/net/tun c 10 200
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
rm -rf etc/systemd/system etc/viasocks etc/resolv.conf usr/local/lib/systemd/system
mkdir -p etc/systemd/system run/systemd/system etc/viasocks usr/local/bin usr/local/lib/systemd/system
: >etc/machine-id
echo nameserver 198.51.100.1 >etc/resolv.conf
mv "$top/viasocks" usr/local/bin/viasocks
chmod 755 usr/local/bin/viasocks
cp "$repository"/scripts/*.service usr/local/lib/systemd/system/
cp "$repository/packaging/sysusers.conf" usr/lib/sysusers.d/viasocks.conf
printf '[Unit]\nDescription=Nothing but the units of the test\nDefaultDependencies=no\n' >run/systemd/system/test.target
printf '[Unit]\nDescription=The network of the test is up\n' | tee run/systemd/system/network{,-pre,-online}.target >/dev/null
mkdir old
pivot_root . old
umount -l old
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	/lib/systemd/systemd --unit=test.target --log-target=null --show-status=0
`

// machine is a systemd with a network.
type machine struct {
	t   *testing.T
	pid int // of systemd
}

// newMachine boots a machine whose viasocks.conf has these lines, after that of the proxy.
func newMachine(t *testing.T, options ...string) *machine {
	t.Helper()
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
	testkit.CheckLeaks(t)
	m := &machine{t: t}
	m.world()
	m.boot()
	m.must("/bin/sh", "-ec", "ip link set lo up; ip addr add "+host4+
		"/24 dev eth0; ip link set eth0 up; ip route add default via "+world4)
	m.must("/usr/bin/systemd-sysusers", "viasocks.conf")
	m.configure("viasocks", options...)
	m.dropIn("viasocks", "StandardOutput=append:/run/viasocks.log", "StandardError=append:/run/viasocks.log")
	return m
}

// world makes the network namespace that holds the proxy, the far end, and the count of what passes the proxy by.
func (m *machine) world() {
	m.t.Helper()
	for _, l := range []string{
		"ip netns add world", "ip -n world link set lo up", "ip -n world addr add " + far4 + "/32 dev lo",
		"ip -n world link add eth0 type veth peer name machine", "ip -n world addr add " + world4 + "/24 dev eth0",
		"ip -n world link set eth0 up", "ip netns exec world nft 'add table inet t; add counter inet t leaks; " +
			"add chain inet t c { type filter hook prerouting priority -300; }; " +
			"add rule inet t c iifname eth0 ip daddr " + far4 + " counter name leaks'",
	} {
		if out, err := exec.Command("/bin/sh", "-c", l).CombinedOutput(); err != nil {
			m.t.Fatalf("%s: %v: %s", l, err, out)
		}
		if strings.HasPrefix(l, "ip netns add") {
			m.t.Cleanup(func() { exec.Command("ip", "netns", "del", "world").Run() })
		}
	}
	s, err := sockstest.Listen("tcp4", world4+":1080", sockstest.WithNetns(worldNetns),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name == farName {
				return netip.MustParseAddr(far4), nil
			}
			return netip.Addr{}, errors.New("no such name")
		}))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { s.Close() })
	ln := m.listenInWorld(far4 + ":80")
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "hello\n")
		if r.URL.Path == "/slow" { // until the test has seen the flow
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	})}
	go web.Serve(ln)
	m.t.Cleanup(func() { web.Close() })
	m.echo(m.listenInWorld(far4 + ":7"))
}

// echo sends back what it gets.
func (m *machine) echo(ln net.Listener) {
	m.t.Cleanup(func() { ln.Close() })
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			go func() { io.Copy(c, c); c.Close() }() // ends with the proxy
		}
	}()
}

func (m *machine) listenInWorld(addr string) net.Listener {
	m.t.Helper()
	type result struct {
		ln  net.Listener
		err error
	}
	got := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		fd, err := unix.Open(worldNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		r := result{err: err}
		if err == nil {
			r.ln, r.err = net.Listen("tcp4", addr)
		}
		got <- r
	}()
	r := <-got
	if r.err != nil {
		m.t.Fatal(r.err)
	}
	return r.ln
}

// boot starts systemd and waits until it takes orders.
func (m *machine) boot() {
	m.t.Helper()
	repository, err := filepath.Abs("../../..")
	if err != nil {
		m.t.Fatal(err)
	}
	group, err := os.MkdirTemp(groups, "viasocks-servicetest-")
	if err != nil {
		m.t.Skipf("cannot make a control group: %v", err)
	}
	m.t.Cleanup(func() { removeGroup(m.t, group) })
	log, err := os.Create(filepath.Join(m.t.TempDir(), "boot.log"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("/bin/bash", "-ec", `echo 0 >"$0/cgroup.procs"; exec unshare --cgroup /bin/bash -ec "$@"`, group,
		boot, "boot", m.t.TempDir(), repository, viasocks)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID |
		syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	m.t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	m.pid = cmd.Process.Pid
	if out, err := exec.Command("ip", "-n", "world", "link", "set", "machine", "name", "eth0", "netns",
		fmt.Sprint(m.pid)).CombinedOutput(); err != nil {
		m.t.Fatalf("ip link: %v: %s", err, out)
	}
	testkit.Eventually(m.t, "systemd to start", func() bool {
		select {
		case <-ended:
			b, _ := os.ReadFile(log.Name())
			m.t.Skipf("systemd cannot start here as in a container: %s", b)
		default:
		}
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", m.pid))
		if filepath.Base(exe) != "systemd" {
			return false
		}
		out, _ := m.run("/usr/bin/systemctl", "is-system-running")
		return strings.TrimSpace(out) == "running"
	})
	m.t.Cleanup(func() {
		if m.t.Failed() {
			status, _ := m.run("/usr/bin/systemctl", "status", "--no-pager", "--lines=0", "viasocks*")
			log, _ := m.run("/bin/cat", "/run/viasocks.log")
			m.t.Logf("%s\n%s", status, log)
		}
	})
}

// removeGroup removes the control group of a machine that has ended.
func removeGroup(t *testing.T, group string) {
	testkit.Eventually(t, "the control group of the machine to be empty", func() bool {
		var all []string
		filepath.WalkDir(group, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for i := len(all) - 1; i >= 0; i-- {
			if err := os.Remove(all[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
				return false
			}
		}
		return true
	})
}

// run runs a program in the machine, beside the services.
func (m *machine) run(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/usr/bin/nsenter", append([]string{"--target", fmt.Sprint(m.pid),
		"--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--"}, argv...)...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER="}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must runs a program that has to succeed, and returns its output.
func (m *machine) must(argv ...string) string {
	m.t.Helper()
	out, err := m.run(argv...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

func (m *machine) systemctl(args ...string) {
	m.t.Helper()
	m.must(append([]string{"/usr/bin/systemctl"}, args...)...)
}

// property returns a property of a unit, as systemd sees it.
func (m *machine) property(unit, name string) string {
	m.t.Helper()
	return strings.TrimSpace(m.must("/usr/bin/systemctl", "show", "--value", "--property="+name, unit))
}

// write creates a file in the machine.
func (m *machine) write(path, text string) {
	m.t.Helper()
	m.must("/bin/sh", "-ec", `mkdir -p "$(dirname "$0")"; printf %s "$1" >"$0"; chmod 600 "$0"`, path, text)
}

func (m *machine) configure(name string, options ...string) {
	m.t.Helper()
	lines := append([]string{"proxy " + proxyURL}, options...)
	m.write("/etc/viasocks/"+name+".conf", strings.Join(lines, "\n")+"\n")
}

// dropIn adds lines to the section Service of a unit.
func (m *machine) dropIn(unit string, lines ...string) {
	m.t.Helper()
	name := regexp.MustCompile(`\W`).ReplaceAllString(lines[0], "")
	m.write("/etc/systemd/system/"+unit+".service.d/"+name+".conf", "[Service]\n"+strings.Join(lines, "\n")+"\n")
	m.systemctl("daemon-reload")
}

// reaches reports whether an ordinary user of the machine gets an answer from the far end.
func (m *machine) reaches(host string) bool {
	out, _ := m.run("/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
		"/usr/bin/curl", "-s", "-m", "3", "http://"+host+"/")
	return out == "hello\n"
}

// leaks returns how many packets have left for the far end without the proxy.
func (m *machine) leaks() string {
	m.t.Helper()
	out, err := exec.Command("ip", "netns", "exec", "world", "nft", "list", "counter", "inet", "t", "leaks").Output()
	found := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(string(out))
	if err != nil || found == nil {
		m.t.Fatalf("cannot read the counter: %v: %s", err, out)
	}
	return found[1]
}

func (m *machine) noLeak() {
	m.t.Helper()
	if n := m.leaks(); n != "0" {
		m.t.Fatalf("%s packets left the machine without the proxy", n)
	}
}

// changes returns what viasocks has changed in the machine's network.
func (m *machine) changes() string {
	m.t.Helper()
	out := m.must("/bin/sh", "-c", "ip rule; ip -6 rule; nft list ruleset; ip -o link")
	var ours []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "proto 118") || strings.Contains(line, "viasocks") {
			ours = append(ours, line)
		}
	}
	return strings.Join(ours, "")
}
