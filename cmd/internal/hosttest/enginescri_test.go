package hosttest

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// These engines run the pods of Kubernetes, whose kubelet is crictl here.

// pods are those of an engine with the Container Runtime Interface. Each has one container beside its sandbox.
type pods struct {
	*engine
	sandboxes, ids map[string]string // by the name of the container
}

// podNamespace is the namespace of Kubernetes that the pods are in.
const podNamespace = "shop"

// podOf is the name of the pod of a container.
func podOf(container string) string { return container + "-7d9f4c" }

// imageArchive writes an image as `docker save` does, which holds busybox alone, and sleeps.
func (e *engine) imageArchive() (path string) {
	e.t.Helper()
	busybox, err := os.ReadFile(busyboxPath)
	if err != nil {
		e.t.Fatal(err)
	}
	layer := tarOf(e.t, []archived{{"bin/busybox", 0o755, busybox}, {"etc/group", 0o644, nil}, {"tmp/empty", 0o644, nil}})
	config := map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Cmd": []string{busyboxPath, "sleep", "1000"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	}
	manifest := []map[string]any{{"Config": "config.json", "RepoTags": []string{engineImage}, "Layers": []string{"layer.tar"}}}
	path = filepath.Join(e.dir, "image.tar")
	all := tarOf(e.t, []archived{
		{"layer.tar", 0o644, layer}, {"config.json", 0o644, jsonOf(e.t, config)}, {"manifest.json", 0o644, jsonOf(e.t, manifest)},
	})
	if err := os.WriteFile(path, all, 0o644); err != nil {
		e.t.Fatal(err)
	}
	return path
}

// archived is a file in an archive.
type archived struct {
	name string
	mode int64
	text []byte
}

func tarOf(t *testing.T, files []archived) []byte {
	t.Helper()
	var b strings.Builder
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.text))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return []byte(b.String())
}

func jsonOf(t *testing.T, what any) []byte {
	t.Helper()
	b, err := json.Marshal(what)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// write writes a file below the engine's directory.
func (e *engine) write(name, text string) (path string) {
	e.t.Helper()
	path = filepath.Join(e.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
	return path
}

// cniPlugins is where Debian has the plugins of containernetworking-plugins.
const cniPlugins = "/usr/lib/cni"

// cni writes the configuration of a network on the host's bridge. It returns its directory.
func (e *engine) cni() (dir string) {
	e.t.Helper()
	file := e.write("cni/10-engine.conflist", fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "engine", "plugins": [
	{"type": "bridge", "bridge": "br0", "ipam": {"type": "host-local", "dataDir": %q,
		"ranges": [[{"subnet": "172.20.0.0/24", "rangeStart": "172.20.0.4", "gateway": "172.20.0.1"}],
			[{"subnet": "fd00:20::/64", "rangeStart": "fd00:20::4", "gateway": "fd00:20::1"}]],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}]}`, filepath.Join(e.dir, "addresses")))
	return filepath.Dir(file)
}

// kubernetes is containerd with its CRI plugin.
func (e *engine) kubernetes() {
	const socket = "/run/engine.sock"
	config := e.write("containerd.toml", fmt.Sprintf(`version = 2
root = %[1]q
state = "/run/engine"
[grpc]
address = %[2]q
[plugins."io.containerd.internal.v1.opt"]
path = %[1]q
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %[3]q
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = %[4]q
conf_dir = %[5]q
`, filepath.Join(e.dir, "data"), socket, engineImage, cniPlugins, e.cni()))
	e.daemon("containerd", "--config", config)
	e.w.eventually(time.Minute, "containerd answers", func() bool {
		_, err := e.run("ctr", "--address", socket, "version")
		return err == nil
	})
	e.t.Log(e.must("ctr", "--address", socket, "version"))
	e.must("ctr", "--address", socket, "--namespace", "k8s.io", "image", "import", "--snapshotter", "native", e.imageArchive())
	e.crictl(socket)
}

// crictl handles pods by the socket of an engine.
func (e *engine) crictl(socket string) {
	e.t.Helper()
	e.command = []string{"crictl", "--config", e.write("crictl.yaml", ""), "--runtime-endpoint", "unix://" + socket,
		"--image-endpoint", "unix://" + socket, "--timeout", "1m"}
	e.t.Log(e.do("--version"))
	e.w.eventually(time.Minute, "the network and the image are there", func() bool {
		info, err1 := e.try("info")
		_, err2 := e.try("inspecti", engineImage)
		return err1 == nil && err2 == nil && !strings.Contains(info, "NetworkPluginNotReady")
	})
	e.containers = pods{e, map[string]string{}, map[string]string{}}
	e.t.Cleanup(func() {
		if _, err := e.try("rmp", "--all", "--force"); err != nil {
			e.t.Error(err)
		}
	})
}

func (e pods) start(name string) {
	e.t.Helper()
	uid := fmt.Sprintf("0d5c4f3e-9f5e-4a1b-8c3d-%012d", len(e.ids))
	logs := filepath.Join(e.dir, "logs", podOf(name))
	pod := e.write(name+"/pod.json", string(jsonOf(e.t, map[string]any{
		"metadata":      map[string]any{"name": podOf(name), "namespace": podNamespace, "uid": uid},
		"hostname":      podOf(name),
		"log_directory": logs,
		"dns_config":    map[string]any{"servers": []string{"203.0.113.53"}},
		"labels": map[string]any{"io.kubernetes.pod.name": podOf(name), "io.kubernetes.pod.namespace": podNamespace,
			"io.kubernetes.pod.uid": uid},
		"linux": map[string]any{"cgroup_parent": e.group + "/kubepods/besteffort/pod" + uid},
	})))
	container := e.write(name+"/container.json", string(jsonOf(e.t, map[string]any{
		"metadata": map[string]any{"name": name},
		"image":    map[string]any{"image": engineImage},
		"log_path": name + ".log",
		"labels": map[string]any{"io.kubernetes.container.name": name, "io.kubernetes.pod.name": podOf(name),
			"io.kubernetes.pod.namespace": podNamespace, "io.kubernetes.pod.uid": uid},
		"linux": map[string]any{},
	})))
	e.sandboxes[name] = e.do("runp", pod)
	e.ids[name] = e.do("create", "--no-pull", e.sandboxes[name], container, pod)
	e.do("start", e.ids[name])
}

func (e pods) inside(name string, args ...string) (string, error) {
	return e.try(append([]string{"exec", "--sync", e.ids[name], busyboxPath}, args...)...)
}

func (e pods) pid(name string) string {
	e.t.Helper()
	return e.do("inspect", "--output", "go-template", "--template", "{{.info.pid}}", e.ids[name])
}

// id is what `crictl ps` shows.
func (e pods) id(name string) string { return e.ids[name][:13] }

func (e pods) words(name string) []string {
	return []string{e.sandboxes[name], e.sandboxes[name][:13], e.ids[name], podOf(name), podNamespace + "/" + podOf(name)}
}

func (e pods) stop(name string) { e.do("stopp", e.sandboxes[name]) }
