package doctor

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// besides lists programs that change a host's network, and how viasocks works beside them.
var besides = []struct {
	name    string
	devices []string // the program is recognized by these devices, or
	kind    string   // by devices of this kind, as the kernel names it, or
	comms   []string // by these names of processes
	found   string
	do      string // with the name of the device for each %s
}{
	{
		name: "docker", devices: []string{"docker0", "podman0", "cni0"}, comms: []string{"dockerd"},
		found: "Containers go through the proxy under 'viasocks up', as the host does.",
		do:    "--exclude-device %s lets them go their own way",
	},
	{
		name: "firewalld", comms: []string{"firewalld"},
		found: "It may reload its rules at any time: viasocks keeps its own in tables of their own, " +
			"and puts back what is flushed.",
	},
	{
		name: "NetworkManager", comms: []string{"NetworkManager"},
		found: "It leaves the TUN device alone, and its default routes are no longer used for what 'viasocks up' carries.",
	},
	{
		name: "systemd-resolved", comms: []string{"systemd-resolve"},
		found: "'viasocks up' tells it to ask viasocks for names; 'viasocks run' hides it from the program.",
	},
	{
		name: "tailscale", devices: []string{"tailscale0"}, comms: []string{"tailscaled"},
		found: "Under 'viasocks up' it must be left out, or it cannot reach its peers.",
		do:    "--exclude 100.64.0.0/10 --exclude fd7a:115c:a1e0::/48 --exclude-unit tailscaled.service",
	},
	{
		name: "WireGuard", kind: "wireguard",
		found: "Under 'viasocks up' its endpoint must be left out, or the tunnel would go through the proxy.",
		do:    "--exclude with the address of the endpoint",
	},
}

// sysNet has a folder for each network device.
const sysNet = "/sys/class/net"

// beside reports which of these programs run on the host.
func (h *host) beside(ctx context.Context) (all []Finding) {
	return besidesAmong(kinds(sysNet), processNames(ctx))
}

// besidesAmong returns findings for the programs that have one of these devices or processes.
func besidesAmong(devices map[string]string, comms map[string]bool) (all []Finding) {
	for _, p := range besides {
		device := ""
		for name, kind := range devices {
			if (slices.Contains(p.devices, name) || p.kind != "" && kind == p.kind) && (device == "" || name < device) {
				device = name
			}
		}
		if device == "" && !slices.ContainsFunc(p.comms, func(c string) bool { return comms[c] }) {
			continue
		}
		if device == "" && len(p.devices) > 0 {
			device = p.devices[0]
		}
		all = append(all, Finding{
			Check: p.name, Level: OK, Found: "It runs here. " + p.found, Do: strings.ReplaceAll(p.do, "%s", device),
		})
	}
	return all
}

// kinds returns the network devices and what kind each of them is, such as bridge or wireguard; "": an ordinary one.
func kinds(dir string) map[string]string {
	devices := map[string]string{}
	paths, _ := filepath.Glob(dir + "/*/uevent")
	for _, p := range paths {
		b, _ := os.ReadFile(p)
		kind := ""
		for line := range strings.Lines(string(b)) {
			if k, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVTYPE="); ok {
				kind = k
			}
		}
		devices[filepath.Base(filepath.Dir(p))] = kind
	}
	return devices
}

// processNames returns the names of all visible processes.
func processNames(ctx context.Context) map[string]bool {
	names := map[string]bool{}
	paths, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, p := range paths {
		if ctx.Err() != nil {
			break
		}
		if b, err := os.ReadFile(p); err == nil {
			names[strings.TrimSpace(string(b))] = true
		}
	}
	return names
}
