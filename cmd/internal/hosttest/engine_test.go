package hosttest

import (
	"crypto/rand"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// box is a container that crun runs, with the network, the control group and the mounts that an engine gives to it.
type box struct {
	w      *world
	id     string
	ns     string // name of its network namespace
	dir    string // of the bundle
	pid    int    // of its first process
	group  string // directory of its control group
	ended  bool
	v4, v6 string // v6 is empty without IPv6
}

// style is how an engine makes a container.
type style struct {
	scope   string // name of the control group, with %s for the id
	ownNet  bool   // the runtime makes the network namespace, as Docker has it; otherwise the engine does, as Podman has it
	noIPv6  bool   // IPv6 is disabled by sysctls, as Docker does where a network has none
	publish uint16 // port of the host that leads to port 80
}

// busyboxPath is a program without libraries, which is all that the containers hold.
const busyboxPath = "/bin/busybox"

// published is what the container's own server answers.
const published = "from the container\n"

// newBox makes a container on the host's bridge and starts it. It goes with the test.
func newBox(w *world, s style) *box {
	w.t.Helper()
	for _, program := range []string{"crun", busyboxPath, "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			w.t.Skipf("cannot run a container: %v", err)
		}
	}
	if f, err := elf.Open(busyboxPath); err != nil {
		w.t.Skip(err)
	} else if libs, err := f.ImportedLibraries(); f.Close() != nil || err != nil || len(libs) > 0 {
		w.t.Skipf("cannot run a container: %s needs the libraries %v: install busybox-static (%v)", busyboxPath, libs, err)
	}
	b := &box{w: w, id: randomID(w), ns: "box", v4: "172.20.0.3", v6: "fd00:20::3", dir: w.t.TempDir()}
	if s.noIPv6 {
		b.v6 = ""
	}
	if !s.ownNet {
		w.run("", nil, "ip", "netns", "add", b.ns)
	}
	b.bundle(s)
	w.t.Cleanup(b.remove)
	b.create()
	if s.ownNet {
		w.run("", nil, "ip", "netns", "attach", b.ns, strconv.Itoa(b.pid))
	}
	b.enclose(fmt.Sprintf(s.scope, b.id))
	b.connect(s)
	b.crun("start", b.id)
	w.eventually(time.Minute, "the published port answers", func() bool { return b.reach(s.publish) == nil })
	return b
}

func randomID(w *world) string {
	raw := make([]byte, 32)
	if _, err := rand.Read(raw); err != nil {
		w.t.Fatal(err)
	}
	return hex.EncodeToString(raw)
}

// bundle writes the files of the container, and its configuration, which has the mounts and limits of Docker.
func (b *box) bundle(s style) {
	w := b.w
	w.t.Helper()
	program, err := os.ReadFile(busyboxPath)
	if err != nil {
		w.t.Fatal(err)
	}
	root := filepath.Join(b.dir, "rootfs")
	for name, text := range map[string][]byte{
		"bin/busybox": program, "etc/resolv.conf": []byte("nameserver 203.0.113.53\n"), "www/index.html": []byte(published),
		"proc/.keep": nil, "dev/.keep": nil, "sys/.keep": nil,
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(path, text, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	type object = map[string]any
	network := object{"type": "network"}
	if !s.ownNet {
		network["path"] = "/run/netns/" + b.ns
	}
	sysctls := object{}
	if s.noIPv6 {
		sysctls = object{"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1"}
	}
	caps := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN"}
	config, err := json.Marshal(object{
		"ociVersion": "1.0.2", "root": object{"path": "rootfs", "readonly": true},
		"process": object{
			"cwd": "/", "args": []string{busyboxPath, "httpd", "-f", "-p", "80", "-h", "/www"}, "user": object{"uid": 0, "gid": 0},
			"env": []string{"PATH=/bin"}, "noNewPrivileges": true,
			"capabilities": object{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc", "options": []string{"nosuid", "noexec", "nodev"}},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755"}},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		"linux": object{
			"namespaces":    []object{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, network},
			"sysctl":        sysctls,
			"maskedPaths":   []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
			"readonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), config, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// tryCrun runs crun. crun refuses machines that have both versions of control groups: it sees one here, and uses none,
// because the test makes the group.
func (b *box) tryCrun(args ...string) (string, error) {
	const script = `umount -R /sys/fs/cgroup 2>/dev/null
		mount -t cgroup2 none /sys/fs/cgroup && exec crun --root /run/crun --cgroup-manager=disabled "$@"`
	out, err := os.Create(filepath.Join(b.dir, "output")) // not a pipe, which the container would hold open
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", script, "crun"}, args...)...)
	cmd.Stdout, cmd.Stderr = out, out
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	if err = cmd.Start(); err == nil {
		err = cmd.Wait()
	}
	timer.Stop()
	text, _ := os.ReadFile(out.Name())
	if err != nil {
		err = fmt.Errorf("crun %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return string(text), err
}

func (b *box) crun(args ...string) string {
	b.w.t.Helper()
	out, err := b.tryCrun(args...)
	if err != nil {
		b.w.t.Fatal(err)
	}
	return out
}

// create has the runtime make the container, whose program does not run yet.
func (b *box) create() {
	b.w.t.Helper()
	b.crun("create", "--bundle", b.dir, b.id)
	var state struct{ PID int }
	if err := json.Unmarshal([]byte(b.crun("state", b.id)), &state); err != nil || state.PID == 0 {
		b.w.t.Fatalf("crun does not tell the container's process: %v", err)
	}
	b.pid = state.PID
}

// enclose puts the container into a control group with the engine's name.
func (b *box) enclose(name string) {
	b.w.t.Helper()
	top, err := cgroup2()
	if err != nil {
		b.w.t.Skip(err)
	}
	group := filepath.Join(top, name)
	if err := os.Mkdir(group, 0o755); err != nil {
		b.w.t.Skipf("cannot make a control group: %v", err)
	}
	b.group = group
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(b.pid)), 0o600); err != nil {
		b.w.t.Fatal(err)
	}
}

// connect gives the container a device on the bridge, and the host the rule of its published port.
func (b *box) connect(s style) {
	w := b.w
	w.t.Helper()
	w.ip("host", "link add box0 type veth peer name eth0 netns "+b.ns+"\nlink set box0 master br0\nlink set box0 up\n")
	w.ip(b.ns, "link set lo up\nlink set eth0 up\naddr add "+b.v4+"/24 dev eth0\nroute add default via 172.20.0.1\n")
	if b.v6 != "" {
		w.ip(b.ns, "addr add "+b.v6+"/64 dev eth0 nodad\n-6 route add default via fd00:20::1\n")
	}
	w.nft("host", fmt.Sprintf(`table ip engine {
		chain PREROUTING {
			type nat hook prerouting priority dstnat; policy accept;
			iifname != "br0" tcp dport %d counter dnat to %s:80
		}
	}`, s.publish, b.v4))
	w.settle()
	w.eventually(time.Minute, "the container's link carries", func() bool {
		s := w.ip(b.ns, "addr show up") + w.ip(b.ns, "-6 route show table all")
		return !strings.Contains(s, "tentative") && !strings.Contains(s, "LOWERLAYERDOWN") && !strings.Contains(s, "NO-CARRIER")
	})
}

// kill ends the container's program, and then removes what the engine removes when it notices.
func (b *box) kill() {
	if b.ended {
		return
	}
	b.ended = true
	if _, err := b.tryCrun("delete", "--force", b.id); err != nil && b.pid != 0 {
		b.w.t.Error(err)
	}
	if b.pid != 0 { // the test is the first process of its namespace, and gets the children of those that have ended
		_, _ = syscall.Wait4(b.pid, nil, 0, nil)
	}
	_, _ = try("", nil, "ip", "netns", "del", b.ns)
}

// remove removes all that newBox has made.
func (b *box) remove() {
	b.kill()
	if b.group != "" {
		b.w.eventually(time.Minute, "the control group is empty", func() bool {
			err := os.Remove(b.group)
			return err == nil || errors.Is(err, os.ErrNotExist)
		})
	}
}

// program runs a program of busybox in the container. It returns what the program writes.
func (b *box) program(args ...string) (string, error) {
	out, err := b.tryCrun(append([]string{"exec", b.id, busyboxPath}, args...)...)
	return strings.TrimSpace(out), err
}

// resolve asks the name server of the container for an IPv4 address.
func (b *box) resolve(name string) (netip.Addr, error) {
	out, err := b.program("nslookup", "-type=a", name)
	if err != nil {
		return netip.Addr{}, err
	}
	a, ok := lookedUp(out)
	if !ok {
		return a, fmt.Errorf("nslookup says %q", out)
	}
	return a, nil
}

// lookedUp is the address that nslookup of busybox prints.
func lookedUp(out string) (netip.Addr, bool) {
	at := strings.LastIndex(out, "Address: ") // the first one is that of the server
	if at < 0 {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(strings.TrimSpace(strings.TrimPrefix(out[at:], "Address: ")))
	return a, err == nil
}

// reach asks the published port from the world.
func (b *box) reach(port uint16) error {
	return in("world", func() error {
		c, err := (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: -1}).Dial("tcp", netipAddrPort(host4, port).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(c, "GET /index.html HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		all, err := io.ReadAll(c)
		if err == nil && !strings.HasSuffix(string(all), published) {
			err = fmt.Errorf("the published port answers %q", all)
		}
		return err
	})
}

// mirror serves TCP on port 8000 and UDP on port 9000 in the world, and answers everybody with his address.
func (w *world) mirror() {
	w.t.Helper()
	serve(w.listen("world", ":8000"), func(c net.Conn) {
		_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String())
	})
	for _, at := range []string{"203.0.113.7:9000", "[2001:db8:f::5]:9000"} {
		c := w.packets("world", at)
		go func() {
			b := make([]byte, 1500)
			for {
				_, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort([]byte(from.Addr().Unmap().String()), from)
			}
		}()
	}
}

// mirrorUDP asks for the address with which the datagrams of a namespace reach the world.
func (w *world) mirrorUDP(ns, to string) (from string, err error) {
	w.t.Helper()
	c := w.connected(ns, netipAddrPort(to, 9000).String())
	defer c.Close()
	b := make([]byte, 100)
	for range 5 { // a datagram may be lost
		if _, err = c.Write([]byte("who am I")); err != nil {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		var n int
		if n, err = c.Read(b); err == nil {
			return string(b[:n]), nil
		}
	}
	return "", err
}

// stateOfBox is stateOf, and what the host has for the container.
func (b *box) stateOfBox() map[string]string {
	s := b.w.stateOf(b.ns)
	maps.Copy(s, map[string]string{
		"ip -j route": b.w.run("", nil, "ip", "-n", b.ns, "-j", "route", "show", "table", "all"),
		"ip -j rule":  b.w.run("", nil, "ip", "-n", b.ns, "-j", "rule"),
	})
	return s
}
