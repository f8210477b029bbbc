package hosttest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// These engines have no images: their containers start from a directory.

// rootfs makes a directory with busybox and what a container mounts over.
func (e *engine) rootfs(name string) string {
	e.t.Helper()
	root := filepath.Join(e.dir, "roots", name)
	for _, dir := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			e.t.Fatal(err)
		}
	}
	e.w.run("", nil, "cp", busyboxPath, filepath.Join(root, "bin/busybox"))
	if err := os.WriteFile(filepath.Join(root, "etc/resolv.conf"), []byte("nameserver 203.0.113.53\n"), 0o644); err != nil {
		e.t.Fatal(err)
	}
	return root
}

// numbers are what distinguishes the addresses of containers, which their engines leave to others.
var numbers = map[string]int{"web": 4, "my-app-1": 5}

// must runs a program on the host.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	out, err := e.run(args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// lxcBox are containers of LXC, which have a device on the host's bridge.
type lxcBox struct{ *engine }

// lxc starts web with the control group of web-1, because another container that has its name runs at first.
func (e *engine) lxc() {
	e.t.Log("LXC ", e.must("lxc-start", "--version"))
	box := lxcBox{e}
	other := *e
	other.dir = filepath.Join(e.dir, "other")
	e.t.Cleanup(func() {
		_, _ = lxcBox{&other}.tool("lxc-stop", "web", "--kill")
		for name := range numbers {
			_, _ = box.tool("lxc-stop", name, "--kill")
		}
	})
	lxcBox{&other}.run("web", "lxc.net.0.type = empty\n")
	box.start("web")
	if _, err := (lxcBox{&other}).tool("lxc-stop", "web", "--kill"); err != nil {
		e.t.Error(err)
	}
	e.containers = box
}

func (e lxcBox) tool(name, container string, args ...string) (string, error) {
	return e.engine.run(append([]string{name, "--lxcpath", filepath.Join(e.dir, "lxc"), "--name", container}, args...)...)
}

// run starts a container with a network.
func (e lxcBox) run(name, network string) {
	e.t.Helper()
	config := filepath.Join(e.dir, "lxc", name, "config")
	text := "lxc.uts.name = " + name + "\nlxc.rootfs.path = dir:" + e.rootfs(name) + "\nlxc.cgroup.dir = " +
		strings.TrimPrefix(e.group, "/") + "\nlxc.apparmor.profile = unconfined\n" +
		"lxc.init.cmd = /bin/busybox sleep 1000\n" + network
	if err := os.MkdirAll(filepath.Dir(config), 0o755); err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
	log := filepath.Join(e.dir, "lxc.log")
	if _, err := e.tool("lxc-start", name, "--logfile", log); err != nil {
		why, _ := os.ReadFile(log)
		e.t.Fatalf("%v\n%s", err, why)
	}
}

func (e lxcBox) start(name string) {
	e.t.Helper()
	n := numbers[name]
	if _, err := e.tool("lxc-info", name, "--state"); err == nil {
		return // it runs since the engine was made
	}
	// LXC looks for a bridge in /sys, which is that of the machine here.
	e.run(name, fmt.Sprintf(`lxc.net.0.type = veth
lxc.net.0.veth.pair = lxc%[1]d
lxc.net.0.flags = up
lxc.net.0.ipv4.address = 172.20.0.%[1]d/24
lxc.net.0.ipv4.gateway = 172.20.0.1
lxc.net.0.ipv6.address = fd00:20::%[1]d/64
lxc.net.0.ipv6.gateway = fd00:20::1
`, n))
	e.w.ip("host", fmt.Sprintf("link set lxc%d master br0", n))
}

func (e lxcBox) inside(name string, args ...string) (string, error) {
	return e.tool("lxc-attach", name, append([]string{"--", busyboxPath}, args...)...)
}

func (e lxcBox) pid(name string) string {
	e.t.Helper()
	out, err := e.tool("lxc-info", name, "--pid", "--no-humanize")
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// id is the name of the control group.
func (e lxcBox) id(name string) string { return "lxc.payload." + name + "-1" }

func (e lxcBox) stop(name string) {
	e.t.Helper()
	if _, err := e.tool("lxc-stop", name, "--kill"); err != nil {
		e.t.Fatal(err)
	}
}

// machines are those of a systemd-nspawn without systemd, which are registered nowhere.
type machines struct {
	*engine
	running map[string]*program
}

func (e *engine) nspawn() {
	e.t.Log(e.must("systemd-nspawn", "--version"))
	e.containers = machines{e, map[string]*program{}}
}

// enter runs a program in a control group, of each hierarchy that lets it.
const enter = `for top in /sys/fs/cgroup /sys/fs/cgroup/*; do
	[ -e $top/cgroup.procs ] && mkdir -p $top$0 && echo 0 >$top$0/cgroup.procs
done 2>/dev/null
exec "$@"`

func (e machines) start(name string) {
	e.t.Helper()
	e.running[name] = e.w.start("host", nil, nil, "sh", "-c", enter, e.group+"/"+name, "systemd-nspawn", "--register=no",
		"--keep-unit", "--quiet", "--network-bridge=br0", "--resolv-conf=off", "--timezone=off", "--machine="+name,
		"--directory="+e.rootfs(name),
		busyboxPath, "sleep", "1000")
	e.w.eventually(time.Minute, "the machine runs", func() bool {
		pid, err := e.child(name)
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		return err == nil && string(comm) == "busybox\n"
	})
	e.must("ip", "netns", "attach", name, e.pid(name))
	e.w.ip(name, fmt.Sprintf("link set lo up\nlink set host0 up\naddr add 172.20.0.%[1]d/24 dev host0\n"+
		"route add default via 172.20.0.1\naddr add fd00:20::%[1]d/64 dev host0\n"+
		"-6 route add default via fd00:20::1\n", numbers[name]))
	e.must("ip", "netns", "del", name) // the name would keep the namespace
}

func (e machines) child(name string) (string, error) {
	return e.run("pgrep", "--parent", fmt.Sprint(e.running[name].cmd.Process.Pid))
}

func (e machines) inside(name string, args ...string) (string, error) {
	return e.run(append([]string{"nsenter", "--target", e.pid(name), "--mount", "--uts", "--ipc", "--net", "--pid", "--root",
		"--wd",
		busyboxPath}, args...)...)
}

func (e machines) pid(name string) string {
	e.t.Helper()
	pid, err := e.child(name)
	if err != nil {
		e.t.Fatal(err)
	}
	return pid
}

func (e machines) id(name string) string { return name } // there is nothing else

func (e machines) stop(name string) { e.running[name].stop() }

// tasks are containers of containerd that its client ctr starts. Their networks are made as CNI does it.
type tasks struct{ *engine }

func (e *engine) containerd() {
	const socket = "/run/engine.sock"
	config := e.write("containerd.toml", fmt.Sprintf(`version = 2
root = %[1]q
state = "/run/engine"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = %[2]q
[plugins."io.containerd.internal.v1.opt"]
path = %[1]q
`, filepath.Join(e.dir, "data"), socket))
	e.daemon("containerd", "--config", config)
	e.command = []string{"ctr", "--address", socket, "--namespace", strings.TrimPrefix(e.group, "/")}
	e.w.eventually(time.Minute, "containerd answers", func() bool { _, err := e.try("version"); return err == nil })
	e.t.Log(e.do("version"))
	e.containers = tasks{e}
	e.t.Cleanup(func() {
		for name := range numbers {
			_, _ = e.try("task", "delete", "--force", name)
			_, _ = e.try("container", "delete", name)
			_, _ = e.run("ip", "netns", "del", name)
		}
	})
}

func (e tasks) start(name string) {
	e.t.Helper()
	n := numbers[name]
	e.must("ip", "netns", "add", name)
	e.w.ip("host", fmt.Sprintf("link add task%[2]d type veth peer name eth0 netns %[1]s\n"+
		"link set task%[2]d master br0\nlink set task%[2]d up\n", name, n))
	e.w.ip(name, fmt.Sprintf("link set lo up\nlink set eth0 up\naddr add 172.20.0.%[1]d/24 dev eth0\n"+
		"route add default via 172.20.0.1\naddr add fd00:20::%[1]d/64 dev eth0\n-6 route add default via fd00:20::1\n", n))
	e.do("run", "--detach", "--with-ns", "network:/run/netns/"+name, "--rootfs", e.rootfs(name), name, busyboxPath,
		"sleep", "1000")
}

func (e tasks) inside(name string, args ...string) (string, error) {
	return e.try(append([]string{"task", "exec", "--exec-id", fmt.Sprint(time.Now().UnixNano()), name, busyboxPath}, args...)...)
}

func (e tasks) pid(name string) string {
	e.t.Helper()
	for line := range strings.Lines(e.do("task", "list")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return f[1]
		}
	}
	e.t.Fatalf("ctr does not list %s", name)
	return ""
}

func (e tasks) id(name string) string { return strings.TrimPrefix(e.group, "/") + "/" + name }

func (e tasks) stop(name string) {
	e.t.Helper()
	e.do("task", "kill", "--signal", "SIGKILL", name)
	e.must("ip", "netns", "del", name)
}
