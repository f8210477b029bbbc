package target

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/tun/netns"
)

// fake is a host with the files that engines write.
type fake struct {
	*system
	t    *testing.T
	dir  string
	nets map[int]network
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{t: t, dir: t.TempDir(), nets: map[int]network{}}
	f.system = &system{
		proc: filepath.Join(f.dir, "proc"), machines: filepath.Join(f.dir, "machines"), euid: os.Getuid(),
		network: func(pid int) network {
			if n, ok := f.nets[pid]; ok {
				return n
			}
			return network{id: netns.ID{Ino: uint64(pid)}, owner: os.Getuid()} // each its own
		},
	}
	return f
}

func (f *fake) file(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// process adds one that was started at its number.
func (f *fake) process(pid, parent int, comm, cgroup string, args ...string) {
	f.t.Helper()
	p := fmt.Sprintf("proc/%d/", pid)
	f.file(p+"stat", fmt.Sprintf("%d (%s) S %d 1 1 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 %d 1 1\n", pid, comm, parent, pid))
	f.file(p+"cgroup", cgroup)
	f.file(p+"cmdline", strings.Join(args, "\x00")+"\x00")
}

// conmon adds a monitor as podman 4.3.1 starts it, and the container's first process.
func (f *fake) conmon(pid int, id, name, cgroup string) {
	f.t.Helper()
	f.process(pid, 1, "conmon", "0::/libpod_parent/conmon\n", "/usr/bin/conmon", "--api-version", "1", "-c", id, "-u", id,
		"-r", "/usr/bin/crun", "-b", "/var/lib/containers/storage/vfs-containers/"+id+"/userdata", "-p", "/run/pidfile",
		"-n", name, "--exit-dir", "/run/libpod/exits", "--full-attach", "-l", "k8s-file:/ctr.log", "--log-level", "warning",
		"--runtime-arg", "--log-format=json", "--exit-command", "/usr/bin/podman", "--exit-command-arg", "-n",
		"--exit-command-arg", "cleanup", "--exit-command-arg", id)
	f.process(pid+1, pid, "sleep", cgroup, "/bin/sleep", "1000")
}

// shim adds a containerd-shim as containerd 1.6.20 starts it, whose bundle is that of id.
func (f *fake) shim(pid int, namespace, id string) (bundles string) {
	f.t.Helper()
	f.process(pid, 1, "containerd-shim", "0::/\n", "/usr/bin/containerd-shim-runc-v2", "-namespace", namespace, "-id", id)
	bundles = "run/containerd/io.containerd.runtime.v2.task/" + namespace
	if err := os.MkdirAll(filepath.Join(f.dir, bundles, id), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(f.dir, bundles, id), filepath.Join(f.proc, strconv.Itoa(pid), "cwd")); err != nil {
		f.t.Fatal(err)
	}
	return bundles
}

// docker adds a container as docker 20.10.24 has it. Its directory of state is elsewhere than usual.
func (f *fake) docker(pid int, id, name string) {
	f.t.Helper()
	bundles := f.shim(pid, "moby", id)
	f.process(pid+1, pid, "sleep", "8:pids:/docker/"+id+"\n0::/\n", "/bin/sleep", "1000")
	data := filepath.Join(f.dir, "data/containers", id)
	f.file(bundles+"/"+id+"/config.json", fmt.Sprintf(`{"ociVersion":"1.0.2-dev","hostname":"h","mounts":[
		{"destination":"/proc","type":"proc","source":"proc"},
		{"destination":"/etc/resolv.conf","type":"bind","source":"%s/resolv.conf"}]}`, data))
	f.file("data/containers/"+id+"/config.v2.json", fmt.Sprintf(
		`{"StreamConfig":{},"State":{"Running":true,"Pid":%d},"ID":"%s","Name":"/%s"}`, pid+1, id, name))
}

// is checks which process stands for the container.
func (f *fake) is(want string, pid int) {
	f.t.Helper()
	if c, err := f.find(want); err != nil || c.first.pid != pid {
		f.t.Errorf("%s: %v, %v, not process %d", want, c, err, pid)
	}
}

// fails checks what the error says.
func (f *fake) fails(want string, says ...string) {
	f.t.Helper()
	c, err := f.find(want)
	for _, s := range says {
		if err == nil || !strings.Contains(err.Error(), s) {
			f.t.Errorf("%s: %v, %v; it should say %q", want, c, err, s)
		}
	}
}

// A container is found by a prefix of its id that no other has, and by its whole id or name.
func TestByID(t *testing.T) {
	f := newFake(t)
	f.process(30, 1, "a", "0::/system.slice/docker-"+one+".scope\n")
	f.process(7, 1, ") b (", "0::/system.slice/docker-"+one+".scope\n")
	f.process(8, 1, "c", "12:pids:/docker/"+two+"\n0::/\n")
	f.process(9, 1, "d", "0::/lxc.payload.a1\n")
	f.process(10, 1, "e", "malformed\n\n")
	f.process(11, 1, "f", "0::/docker/"+three+"\n")
	f.file("proc/12/stat", "12 malformed")
	for want, pid := range map[string]int{one: 7, two: 8, two[:63]: 8, "a1": 9, "0": 11} {
		f.is(want, pid)
	}
	f.fails("a1a", one+", "+two, "an id that begins so")
	f.fails("lxc", "no running container", "control groups of 6 processes", f.machines)
}

// The first process of a container is the one that was started first, whatever its number.
func TestFirstProcess(t *testing.T) {
	f := newFake(t)
	f.process(30, 1, "init", "0::/docker/"+one+"\n")
	f.process(7, 30, "later", "0::/docker/"+one+"\n")
	f.file("proc/7/stat", "7 (later) S 30 1 1 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 99 1 1\n")
	f.is(one, 30)
}

// podman's names are those of conmon, also where the container has no control group.
func TestPodman(t *testing.T) {
	f := newFake(t)
	f.conmon(20, one, "web", "0::/libpod_parent/libpod-"+one+"\n")
	f.conmon(30, two, "no-group", "0::/libpod_parent/conmon\n")
	f.process(31, 30, "sleep", "0::/\n") // as in --cgroups=disabled, where conmon has none either
	f.process(30, 1, "conmon", "0::/\n", "conmon", "--cid="+two, "--name=no-group")
	f.conmon(40, three, "k8s_nginx_web-7d9f_shop_0a1b2c3d_0", "0::/kubepods.slice/crio-"+three+".scope\n")
	for want, pid := range map[string]int{
		"web": 21, one[:63]: 21, "no-group": 31, two: 31, "nginx": 41, "web-7d9f": 41, "shop/web-7d9f": 41,
	} {
		f.is(want, pid)
	}
	f.fails("we", "no running container", "web, no-group")
}

// docker's names are in its own directory, wherever that is.
func TestDocker(t *testing.T) {
	f := newFake(t)
	f.docker(20, one, "web")
	f.docker(30, two, "my-app-1")
	for want, pid := range map[string]int{"web": 21, "my-app-1": 31, two: 31} {
		f.is(want, pid)
	}
	f.docker(40, three, "web")
	f.fails("web", "several have that name", "docker "+one+" (web)", "docker "+three+" (web)")
	f.is(three[:4], 41)
}

// State files that aren't what docker writes are not believed, and nothing waits for them.
func TestStateOfOthers(t *testing.T) {
	f := newFake(t)
	f.docker(20, one, "web")
	path := filepath.Join(f.dir, "data/containers", one, "config.v2.json")
	for name, spoil := range map[string]func() error{
		"another id":   func() error { return os.WriteFile(path, []byte(`{"ID":"`+two+`","Name":"/web"}`), 0o600) },
		"malformed":    func() error { return os.WriteFile(path, []byte(`{`), 0o600) },
		"too long":     func() error { return os.Truncate(path, maxState+1) },
		"a link":       func() error { return os.Symlink(filepath.Join(f.dir, "real"), path) },
		"a pipe":       func() error { return unix.Mkfifo(path, 0o600) },
		"a directory":  func() error { return os.Mkdir(path, 0o700) },
		"another user": func() error { return os.WriteFile(path, []byte(`{"ID":"`+one+`","Name":"/web"}`), 0o600) },
	} {
		f.file("real", `{"ID":"`+one+`","Name":"/web"}`)
		if name != "too long" {
			_ = os.Remove(path)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		f.missed = nil
		if name == "another user" {
			if os.Chown(path, 4711, 4711) != nil {
				continue // not root
			}
		}
		if c, err := f.find("web"); err == nil {
			t.Errorf("%s: %v", name, c)
		}
		f.is(one, 21)
		_ = os.Remove(path)
		f.file("data/containers/"+one+"/config.v2.json", `{"ID":"`+one+`","Name":"/web"}`)
		f.is("web", 21)
	}
}

// pod adds a pod as the CRI plugin of containerd 1.6.20 runs it, with one container beside the sandbox. Both are children of one
// shim, whose bundle is that of the sandbox. The annotations are those of the real files.
func (f *fake) pod(pid int, sandbox, container, name, pod, namespace string) {
	f.t.Helper()
	bundles := f.shim(pid, "k8s.io", sandbox)
	uid := fmt.Sprintf("0d5c4f3e-9f5e-4a1b-8c3d-%012d", pid)
	for i, id := range []string{sandbox, container} {
		groups := "8:pids:/kubepods/besteffort/pod" + uid + "/" + id + "\n0::/\n"
		f.process(pid+1+i, pid, "busybox", groups, "/bin/busybox", "sleep", "1000")
		f.nets[pid+1+i] = network{id: netns.ID{Ino: uint64(pid)}, owner: os.Getuid()}
		annotations := map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": sandbox,
			"io.kubernetes.cri.sandbox-name": pod, "io.kubernetes.cri.sandbox-namespace": namespace,
			"io.kubernetes.cri.sandbox-uid": uid}
		if id == container {
			annotations["io.kubernetes.cri.container-type"] = "container"
			annotations["io.kubernetes.cri.container-name"] = name
			annotations["io.kubernetes.cri.image-name"] = "localhost/busybox:test"
		}
		b, err := json.Marshal(map[string]any{"ociVersion": "1.0.2-dev", "annotations": annotations})
		if err != nil {
			f.t.Fatal(err)
		}
		f.file(bundles+"/"+id+"/config.json", string(b))
		f.file(bundles+"/"+id+"/init.pid", strconv.Itoa(pid+1+i))
	}
}

// The containers of a pod have one network, so that its name is that of each. An error names each pod once.
func TestKubernetes(t *testing.T) {
	f := newFake(t)
	id := func(pair string) string { return strings.Repeat(pair, 32) }
	f.pod(20, one, two, "nginx", "web-7d9f", "shop")
	f.pod(30, id("b2"), id("c3"), "app", "web-2b4c", "shop")
	for want, pid := range map[string]int{
		"nginx": 22, "web-7d9f": 21, "shop/web-7d9f": 21, one: 21, two: 22, two[:63]: 22,
		id("b2")[:13]: 31, id("c3")[:13]: 32, "app": 32,
	} {
		f.is(want, pid)
	}
	f.fails("we", "there are shop/web-7d9f, shop/web-2b4c")
	f.pod(40, id("d4"), id("e5"), "nginx", "web-8a1e", "shop")
	f.fails("nginx", "several have that name", "(nginx, web-7d9f, shop/web-7d9f)", "(nginx, web-8a1e, shop/web-8a1e)")
}

// nerdctl has the name among the annotations.
func TestNerdctl(t *testing.T) {
	f := newFake(t)
	bundles := f.shim(30, "default", three)
	f.process(31, 30, "sleep", "0::/default/"+three+"\n")
	f.file(bundles+"/"+three+"/config.json", `{"annotations":{"nerdctl/name":"bb"}}`)
	f.is("bb", 31)
}

// A machine of systemd-nspawn 252 is found by its name if its leader is in the unit of the machine.
func TestMachine(t *testing.T) {
	f := newFake(t)
	f.process(20, 1, "systemd", "0::/machine.slice/systemd-nspawn@web.service/payload/init.scope\n")
	text := "# This is private data. Do not parse.\nNAME=web\nSCOPE=systemd-nspawn@web.service\nSERVICE=systemd-nspawn\n" +
		"ROOT=/var/lib/machines/web\nID=57712edbe243467eaa4e062429cfc76e\nLEADER=20\nCLASS=container\n" +
		"REALTIME=1796034795102599\nMONOTONIC=2263046835\n"
	f.file("machines/web", text)
	f.is("web", 20)
	f.file("machines/web", strings.Replace(text, "LEADER=20", "LEADER=21", 1))
	f.fails("web", "no running container")
	f.file("machines/web", text)
	f.process(20, 1, "another", "0::/user.slice/systemd-nspawn@other.service\n") // the number was given to another process
	f.fails("web", "no running container")
}

// ctr's containers have the id that the caller gave, and the control group too; they are in a namespace of containerd 1.6.20.
// A process that `ctr task exec` starts is the shim's child as well.
func TestCtr(t *testing.T) {
	f := newFake(t)
	ctr := func(pid int, namespace, id, group string) {
		bundles := f.shim(pid, namespace, id)
		f.process(pid+1, pid, "busybox", "8:pids:"+group+"\n0::/\n", "/bin/busybox", "sleep", "1000")
		f.file(bundles+"/"+id+"/init.pid", strconv.Itoa(pid+1))
		f.file(bundles+"/"+id+"/config.json", `{"ociVersion":"1.0.2-dev","root":{"path":"rootfs"}}`)
	}
	ctr(20, "default", "web", "/default/web")
	f.process(22, 20, "busybox", "8:pids:/default/web\n0::/\n")
	f.process(19, 20, "busybox", "8:pids:/default/web\n0::/\n")
	ctr(30, "default", "my-app-1", "/anywhere")
	f.is("web", 21)
	f.is("default/web", 21)
	f.is("my-app-1", 31)
	f.fails("we", "no running container", "there are my-app-1, web")
	ctr(40, "other", "web", "/other/web")
	f.fails("web", "several have that name", "containerd default/web (web)", "containerd other/web (web)")
	f.is("other/web", 41)
	ctr(50, "default", one, "/default/group") // nerdctl with a control group of the user's
	f.is(one[:12], 51)
	if os.Chown(filepath.Join(f.proc, "30"), 4711, 4711) == nil { // root's tests only
		f.fails("my-app-1", "no running container")
	}
}

// The control group of a container of LXC 5.0.2 has its name, with a number if another one of that name runs. The title of the
// monitor has the name alone, or its arguments if it stays in the foreground.
func TestLXC(t *testing.T) {
	f := newFake(t)
	lxc := func(pid int, group string, args ...string) {
		f.process(pid, 1, "lxc-start", "8:pids:/lxc.monitor."+group+"\n0::/\n", args...)
		f.process(pid+1, pid, "busybox", "8:pids:/lxc.payload."+group+"\n0::/\n", "/bin/busybox", "sleep", "1000")
	}
	lxc(10, "web", "[lxc monitor] /var/lib/lxc web")
	f.is("web", 11)
	lxc(20, "web-1", "[lxc monitor] /srv/my lxc web")
	f.fails("web-1", "no running container")
	f.fails("web", "several have that name", "LXC lxc.payload.web (web), LXC lxc.payload.web-1 (web)")
	f.is("lxc.payload.web-1", 21)
	lxc(30, "web-1-1", "[lxc monitor] /var/lib/lxc web-1")
	f.is("web-1", 31)
	for name, args := range map[string][]string{
		"a": {"lxc-start", "-F", "-n", "a"}, "b": {"lxc-start", "-F", "--name=b"}, "c": {"lxc-start", "-nc", "-F"},
		"d": {"lxc-start", "-F", "d"}, "e-1": {"lxc-execute", "-n", "e-1", "--", "e"},
	} {
		lxc(100*int(name[0]), name+"-1", args...)
		f.is(name, 100*int(name[0])+1)
	}
	f.process(50, 1, "lxc-start", "8:pids:/own/monitor\n0::/\n", "[lxc monitor] /var/lib/lxc own")
	f.process(51, 50, "init", "8:pids:/own/payload\n0::/\n")
	f.is("own", 51)
	f.process(70, 60, "systemd", "0::/lxc.payload.incus_c1/init.scope\n") // the monitor cannot be seen
	f.is("incus_c1", 70)
}

// A machine of systemd-nspawn 252 that systemd-machined does not know has its name in the mounts of the first process alone.
func TestUnregisteredMachine(t *testing.T) {
	f := newFake(t)
	f.process(20, 1, "systemd-nspawn", "9:name=systemd:/supervisor\n0::/\n", "systemd-nspawn", "--register=no", "-D", "/srv/web")
	f.process(21, 20, "(sd-stubinit)", "9:name=systemd:/payload\n0::/\n")
	f.file("proc/21/mountinfo", "592 591 0:57 / /run rw - tmpfs tmpfs rw\n"+
		"594 592 0:57 /systemd/nspawn/propagate/web /run/host/incoming ro,relatime shared:61 - tmpfs none rw,mode=755\n")
	f.process(22, 21, "busybox", "9:name=systemd:/payload\n0::/\n")
	f.is("web", 21)
	f.file("machines/web", "NAME=web\nSCOPE=payload\nLEADER=21\n") // it is known both ways
	f.is("web", 21)
	f.process(20, 1, "systemd-nspawn", "9:name=systemd:/docker/"+one+"\n") // it is in a container
	f.file("machines/web", "")
	f.fails("web", "no running container")
}

// What another user makes up does not hide a container of the caller or of root, but is found if there is no other.
func TestOfOthers(t *testing.T) {
	f := newFake(t)
	other := network{id: netns.ID{Ino: 4}, owner: os.Getuid() + 1000}
	f.conmon(10, one, "web", "0::/libpod_parent/libpod-"+one+"\n")
	f.nets[11] = other
	f.is("web", 11)
	f.docker(20, one, "web")
	f.is("web", 21)
	f.is(one, 21)
	f.process(5, 1, "fake", "0::/user.slice/docker-"+one+".scope\n") // in viasocks' own network
	own := network{id: netns.ID{Ino: 9}, owner: os.Getuid(), own: true}
	f.nets[5] = own
	f.is(one, 21)
	f.nets[21] = own // --network host: the caller is told
	f.nets[11] = own
	if c, err := f.find("web"); err != nil || !c.own {
		t.Errorf("%v, %v", c, err)
	}
	// conmon's child must be where conmon says.
	f.conmon(30, two, "cheat", "0::/docker/"+three+"\n")
	f.fails("cheat", "no running container")
}

// A shim that another user started, or that runs in a container, is not believed.
func TestShimOfOthers(t *testing.T) {
	f := newFake(t)
	f.docker(20, one, "web")
	f.is("web", 21)
	f.file("proc/20/cgroup", "0::/docker/"+three+"\n")
	f.fails("web", "no running container")
	f.file("proc/20/cgroup", "0::/\n")
	f.is("web", 21)
	if os.Chown(filepath.Join(f.proc, "20"), 4711, 4711) == nil { // root's tests only
		f.fails("web", "no running container")
	}
}
