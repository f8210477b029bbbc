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
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// engine is a container engine with an image and a store of its own, which both go with the test.
type engine struct {
	containers
	w       *world
	t       *testing.T
	name    string
	command []string // of its client, with the options that keep it away from the machine's own
	env     []string
	dir     string
	uid     uint32 // whose engine it is
	group   string // control group that all of its containers are in
	network []string
}

// containers is how an engine's containers are handled.
type containers interface {
	start(name string)
	inside(name string, args ...string) (string, error) // runs a program of busybox
	pid(name string) string                             // of the first process
	id(name string) string                              // another word for it, or its name
	stop(name string)
}

// engines are the ways to make one. `make zoo` installs them.
var engines = map[string]struct {
	needs []string
	make  func(*engine)
}{
	"podman":          {[]string{"podman", "conmon", "crun"}, (*engine).podman},
	"podman rootless": {[]string{"podman", "conmon", "crun", "slirp4netns", "newuidmap"}, (*engine).rootlessPodman},
	"docker":          {[]string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc", "iptables"}, (*engine).docker},
	"LXC":             {[]string{"lxc-start", "lxc-attach"}, (*engine).lxc},
	"systemd-nspawn":  {[]string{"systemd-nspawn", "nsenter", "pgrep"}, (*engine).nspawn},
	"containerd":      {[]string{"containerd", "ctr", "containerd-shim-runc-v2", "runc"}, (*engine).containerd},
	"Kubernetes": {[]string{"containerd", "ctr", "containerd-shim-runc-v2", "runc", cniPlugins + "/bridge", "crictl"},
		(*engine).kubernetes},
}

// engineImage is the name of an image that holds busybox alone.
const engineImage = "localhost/busybox:test"

// TestEngines: a container of a real engine is found by its name and by its id. Its programs reach the world through the proxy
// and nothing else leaves the host; `down` restores its network exactly; when the engine stops it, viasocks notices.
func TestEngines(t *testing.T) {
	for name, kind := range engines {
		t.Run(name, func(t *testing.T) {
			rootOfTheMachine(t)
			for _, program := range kind.needs {
				if _, err := exec.LookPath(program); err != nil {
					t.Skipf("cannot run an engine: %v ('make zoo' installs it)", err)
				}
			}
			testkit.CheckLeaks(t)
			w, rec, _ := boxWorld(t)
			w.webMirror()
			e := &engine{w: w, t: t, name: name, dir: storage(t)}
			e.group = controlGroups(t)
			kind.make(e)
			e.start("web")
			e.start("my-app-1")
			e.carries(rec)
			e.words()
			e.stops()
			e.namesOthers()
			for _, s := range rec.take() {
				t.Errorf("this left the host: %+v", s)
			}
		})
	}
}

// webMirror serves HTTP on port 8001 in the world, and answers everybody with his address.
func (w *world) webMirror() {
	w.t.Helper()
	serve(w.listen("world", ":8001"), func(c net.Conn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n"+c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String())
	})
}

// controlGroups mounts the control groups as engines expect them: version 1 alone where the machine has it, otherwise version 2
// alone. They refuse machines that have both. It returns a control group for the test, which goes with it.
func controlGroups(t *testing.T) string {
	t.Helper()
	const top = "/sys/fs/cgroup"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Skipf("cannot mount control groups: %v", err)
		}
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	must(err)
	var old []string
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(line, ":", 3); len(f) == 3 && f[1] != "" {
			old = append(old, f[1])
		}
	}
	kind := "tmpfs"
	if len(old) == 0 {
		kind = "cgroup2"
	}
	must(unix.Mount("none", top, kind, 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(top, unix.MNT_DETACH) })
	for _, controllers := range old {
		dir := filepath.Join(top, strings.TrimPrefix(controllers, "name="))
		must(os.Mkdir(dir, 0o755))
		must(unix.Mount("none", dir, "cgroup", 0, controllers))
	}
	group := fmt.Sprintf("viasocks-engines-%d", time.Now().UnixNano())
	t.Cleanup(func() {
		if !testkit.Until(testkit.Patience, func() bool { return removeGroups(top, group) }) {
			t.Errorf("the control groups %s are still in use", group)
		}
	})
	return "/" + group
}

// removeGroups removes the control groups of a name, and those below them, which are empty when nobody is in them. An engine may
// make one below the control group that the test is in.
func removeGroups(top, name string) (gone bool) {
	gone = true
	var dirs []string
	_ = filepath.WalkDir(top, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() && strings.Contains(path+"/", "/"+name+"/") {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		_ = os.Remove(dir)
		if _, err := os.Stat(dir); err == nil {
			gone = false
		}
	}
	return gone
}

// storage is a directory in memory for an engine.
func storage(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "engine") // podman refuses paths of more than 50 characters for what runs
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// try runs the engine's client.
func (e *engine) try(args ...string) (string, error) {
	return e.run(append(slices.Clone(e.command), args...)...)
}

// run runs a program on the host. Its output is a file, because monitors keep a pipe open.
func (e *engine) run(args ...string) (string, error) {
	out, err := os.CreateTemp(e.dir, "output")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd := commandOf(exec.Command(args[0], args[1:]...), e.uid)
	cmd.Env = append(cmd.Env, e.env...)
	cmd.Stdout, cmd.Stderr = out, out
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err = in("host", cmd.Run)
	text, _ := os.ReadFile(out.Name())
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", e.name, strings.Join(args, " "), err, text)
	}
	return strings.TrimSpace(string(text)), err
}

func (e *engine) do(args ...string) string {
	e.t.Helper()
	out, err := e.try(args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// image imports busybox.
func (e *engine) image() {
	e.t.Helper()
	e.containers = oci{e}
	root := filepath.Join(e.t.TempDir(), "image")
	e.w.run("", nil, "mkdir", "-p", filepath.Join(root, "bin"), filepath.Join(root, "etc"), filepath.Join(root, "tmp"))
	e.w.run("", nil, "cp", busyboxPath, filepath.Join(root, "bin/busybox"))
	tar := filepath.Join(e.dir, "image.tar")
	e.w.run("", nil, "tar", "-C", root, "--owner=0", "--group=0", "-cf", tar, ".")
	e.do("import", tar, engineImage)
	e.t.Log(e.do("--version"))
}

// podmanAt is podman with all its state below directories of the test.
func (e *engine) podmanAt(run string) {
	e.t.Helper()
	e.ownRules()
	conf := filepath.Join(e.dir, "containers.conf")
	text := "[network]\nnetwork_backend = \"netavark\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n" +
		"runtime = \"crun\"\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
	e.env = append(e.env, "CONTAINERS_CONF="+conf)
	e.command = []string{"podman", "--root", filepath.Join(e.dir, "root"), "--runroot", filepath.Join(run, "containers"),
		"--tmpdir", filepath.Join(run, "libpod"), "--network-config-dir", filepath.Join(e.dir, "networks"),
		"--storage-driver", "vfs"}
	e.t.Cleanup(func() {
		if _, err := e.try("rm", "--all", "--force", "--time", "0"); err != nil {
			e.t.Error(err)
		}
	})
	e.image()
}

// podman of root keeps what it knows of images in /var/lib, wherever its store is.
func (e *engine) podman() {
	if err := unix.Mount("none", "/var/lib", "tmpfs", 0, "mode=755"); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = unix.Unmount("/var/lib", unix.MNT_DETACH) })
	e.network = []string{"--network", "bridge", "--cgroup-parent", e.group}
	e.podmanAt("/run")
}

// rootlessPodman is podman of a user who has one user id: what he needs for more is a matter of /etc/subuid.
func (e *engine) rootlessPodman() {
	openTUNToAll(e.t)
	e.uid = ordinary
	run := filepath.Join(e.dir, "run")
	for _, dir := range []string{run, e.dir} {
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chown(dir, ordinary, ordinary)); err != nil {
			e.t.Fatal(err)
		}
	}
	if err := os.Chmod(e.dir, 0o755); err != nil {
		e.t.Fatal(err)
	}
	e.env = []string{"HOME=" + e.dir, "TMPDIR=" + e.dir, "XDG_RUNTIME_DIR=" + run, "USER=nobody"}
	e.network = []string{"--network", "slirp4netns", "--cgroups", "disabled"}
	e.podmanAt(run)
}

// docker starts a dockerd, which starts a containerd.
func (e *engine) docker() {
	e.ownRules()
	const socket = "unix:///run/engine.sock"
	config := filepath.Join(e.dir, "daemon.json")
	if err := os.WriteFile(config, []byte("{}"), 0o644); err != nil {
		e.t.Fatal(err)
	}
	e.daemon("dockerd", "--config-file", config, "--data-root", filepath.Join(e.dir, "data"), "--exec-root",
		"/run/engine", "--pidfile", "/run/engine.pid", "--host", socket, "--storage-driver", "vfs", "--cgroup-parent", e.group)
	e.command = []string{"/usr/bin/docker", "--host", socket} // the one that came with dockerd
	e.env = []string{"HOME=" + e.dir}
	e.w.eventually(time.Minute, "dockerd answers", func() bool { _, err := e.try("version"); return err == nil })
	e.t.Cleanup(func() { _, _ = e.try("rm", "--force", "web", "my-app-1") })
	e.image()
}

// daemon starts the daemon of an engine, which is ended with the test.
func (e *engine) daemon(name string, args ...string) {
	e.t.Helper()
	log := &harness.Log{}
	daemon := exec.Command(name, args...)
	daemon.Stdout, daemon.Stderr = log, log
	e.w.in("host", daemon.Start)
	e.t.Cleanup(func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(time.Minute, func() { _ = daemon.Process.Kill() })
		_ = daemon.Wait()
		timer.Stop()
		if e.t.Failed() {
			e.t.Logf("%s said:\n%s", name, harness.Tail(log.String(), 30))
		}
	})
}

// ownRules removes the rules of the bridge: this engine makes the like by iptables.
func (e *engine) ownRules() {
	e.t.Helper()
	e.w.nft("host", "delete table ip nat\ndelete table ip6 nat\n")
}

// oci are the containers of podman and docker.
type oci struct{ *engine }

func (e oci) start(name string) {
	e.t.Helper()
	args := append([]string{"run", "--detach", "--name", name, "--dns", "203.0.113.53"}, e.network...)
	e.do(append(args, engineImage, busyboxPath, "sleep", "1000")...)
}

func (e oci) inside(name string, args ...string) (string, error) {
	return e.try(append([]string{"exec", name, busyboxPath}, args...)...)
}

func (e oci) pid(name string) string { return e.do("inspect", "--format", "{{.State.Pid}}", name) }

func (e oci) id(name string) string { return e.do("inspect", "--format", "{{.Id}}", name)[:12] }

func (e oci) stop(name string) { e.do("stop", "--time", "0", name) }

// fetch asks a web server of the world for the caller's address, from a container, and gives up after 20 s.
func (e *engine) fetch(container, at string) (string, error) {
	return e.inside(container, "timeout", "20", busyboxPath, "wget", "-q", "-O", "-", "http://"+at+":8001/")
}

// fetches checks with which address a program in the container reaches a web server of the world.
func (e *engine) fetches(when, at, want string) {
	e.t.Helper()
	if got, err := e.fetch("web", at); err != nil || got != want {
		e.t.Errorf("%s: %s is reached from %q, not %s: %v", when, at, got, want, err)
	}
}

// resolves returns the address that a program in the container gets for a name.
func (e *engine) resolves(name string) netip.Addr {
	e.t.Helper()
	out, err := e.inside("web", "nslookup", "-type=a", name)
	a, ok := lookedUp(out)
	if err != nil || !ok {
		e.t.Errorf("nslookup: %v\n%s", err, out)
	}
	return a
}

// attach is that of root, or of the user whose engine it is.
func (e *engine) attach(container string) *daemon {
	e.t.Helper()
	var d *daemon
	if e.uid == 0 {
		d = e.w.attach("--container", container)
	} else {
		d = e.w.asOrdinary("attach", "--proxy", "socks5://"+proxy4+":1080", "--container", container)
	}
	d.ready()
	return d
}

// carries attaches to the container by its name, and detaches.
func (e *engine) carries(rec *recorder) {
	t, w := e.t, e.w
	t.Helper()
	e.fetches("control", "203.0.113.7", host4)
	if rec.take() == nil {
		t.Fatal("control: the recorder does not see what the container sends")
	}
	w.run("", nil, "ip", "netns", "attach", "engine", e.pid("web"))
	forget := func() { _, _ = try("", nil, "ip", "netns", "del", "engine") }
	t.Cleanup(forget)
	w.eventually(time.Minute, "the container's addresses are no longer tentative", func() bool {
		return !strings.Contains(w.ip("engine", "addr show"), "tentative")
	})
	before, hostBefore := w.stateOf("engine"), w.state()
	d := e.attach("web")
	rec.take()
	e.fetches("attached", "203.0.113.7", proxy4)
	if a := e.resolves("name.example"); !netip.MustParsePrefix("198.18.0.0/15").Contains(a) {
		t.Errorf("name.example has the address %v", a)
	} else {
		e.fetches("by the address of a name", a.String(), proxy4)
		e.fetches("by a name", "name.example", proxy4)
	}
	if out, err := w.command("ps"); e.uid == 0 && (err != nil || !strings.Contains(out, "container web")) {
		t.Errorf("ps: %v\n%s", err, out)
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	if from, err := e.fetch("my-app-1", "203.0.113.7"); err != nil || from != host4 {
		t.Errorf("the other container reaches the world from %q: %v", from, err)
	}
	rec.take() // of the other one
	w.equal("the host, while its container is attached to", hostBefore, w.state())
	e.down("web", d)
	w.restored("detached", "engine", before)
	e.fetches("detached", "203.0.113.7", host4)
	rec.take()
	forget() // the name would keep the namespace
}

// down ends a viasocks by the name of its container.
func (e *engine) down(container string, d *daemon) {
	e.t.Helper()
	var err error
	var out string
	if e.uid == 0 {
		out, err = e.w.command("down", "--container", container)
	} else {
		by := e.w.asOrdinary("down", "--container", container)
		err = by.wait()
		out = by.log.String()
	}
	if err != nil {
		e.t.Errorf("down: %v\n%s", err, out)
	}
	if err := d.wait(); err != nil {
		e.t.Errorf("it ended with %v\n%s", err, d.log)
	}
}

// words attaches by each other word that the engine has for the container. The last of them is what errors call it.
func (e *engine) words() {
	e.t.Helper()
	more, ok := e.containers.(interface{ words(name string) []string })
	if !ok {
		return
	}
	for _, word := range more.words("web") {
		d := e.attach(word)
		e.fetches("attached to "+word, "203.0.113.7", proxy4)
		e.down(word, d)
	}
}

// stops attaches by the id, and has the engine stop the container.
func (e *engine) stops() {
	e.t.Helper()
	files, _ := try("", nil, "ls", "/run/viasocks")
	d := e.attach(e.id("web"))
	e.fetches("attached by the id", "203.0.113.7", proxy4)
	e.stop("web")
	err := d.wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 {
		e.t.Errorf("the container has stopped, and viasocks ended with %v, not 4\n%s", err, d.log)
	}
	if left, _ := try("", nil, "ls", "/run/viasocks"); left != files {
		e.t.Errorf("these files were there before:\n%sand these afterwards:\n%s", files, left)
	}
}

// namesOthers: what does not run is not found, and the error lists what does.
func (e *engine) namesOthers() {
	e.t.Helper()
	listed := "my-app-1"
	if more, ok := e.containers.(interface{ words(name string) []string }); ok {
		all := more.words(listed)
		listed = all[len(all)-1] + "\n" // the pod, once
	}
	d := e.w.attach("--container", "web")
	if err := d.wait(); err == nil || !strings.Contains(d.log.String(), "there are "+listed) {
		e.t.Errorf("to a container that has stopped: %v\n%s", err, d.log)
	}
}
