package target

import (
	"strings"
	"testing"
)

var (
	one   = strings.Repeat("a1", 32)
	two   = strings.Repeat("a1", 31) + "b2"
	three = strings.Repeat("0f", 32)
)

// The control groups are those of docker 26, podman 4 and 5, cri-o, containerd and LXC 5, with systemd and without, and with
// both versions of control groups.
func TestContainerOf(t *testing.T) {
	pod := "kubepods-burstable-pod7d1a1b4e_0d5c_4f3e_9f5e_0a1b2c3d4e5f.slice"
	for path, want := range map[string]string{
		"/system.slice/docker-" + one + ".scope":                                                      one,
		"/docker/" + one:                                                                              one,
		"/docker/" + one + "/init":                                                                    one,
		"/system.slice/web.service/libpod-payload-" + one:                                             one, // podman run --cgroups=split, as Quadlet has it
		"/system.slice/web.service/runtime":                                                           "",
		"/docker/" + one + "/docker/" + two:                                                           two, // inside another one
		"/machine.slice/libpod-" + one + ".scope/container":                                           one,
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + one + ".scope":           one,
		"/libpod_parent/libpod-" + one:                                                                one,
		"/kubepods.slice/kubepods-burstable.slice/" + pod + "/cri-containerd-" + one + ".scope":       one,
		"/kubepods.slice/kubepods-burstable.slice/" + pod + "/crio-" + one + ".scope":                 one,
		"/kubepods/burstable/pod7d1a1b4e-0d5c-4f3e-9f5e-0a1b2c3d4e5f/" + one:                          one,
		"/system.slice/containerd.service/kubepods-burstable-pod7d1a1b4e.slice:cri-containerd:" + one: one,
		"/lxc.payload.web": "lxc.payload.web",
		"/lxc.payload.web-2/system.slice/nginx.service": "lxc.payload.web-2",
		"/lxc.payload.": "",
		"/machine.slice/libpod-conmon-" + one + ".scope": "", // the monitor is on the host
		"/system.slice/crio-conmon-" + one + ".scope":    "",
		"/": "",
		"/user.slice/user-1000.slice/session-2.scope":             "",
		"/system.slice/docker.service":                            "",
		"/system.slice/docker-" + one[:60] + ".scope":             "",
		"/lxc.monitor.web":                                        "",
		"/system.slice/docker-" + strings.ToUpper(one) + ".scope": "",
	} {
		if got := containerOf(path); got != want {
			t.Errorf("%s: %q, not %q", path, got, want)
		}
	}
}
