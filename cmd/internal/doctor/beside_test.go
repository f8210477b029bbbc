package doctor

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// play runs a program that does nothing under the name of another one, until the test ends.
func play(t *testing.T, name string) {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	from, err := os.Open(sleep)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	path := filepath.Join(t.TempDir(), name)
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "600")
	testkit.Eventually(t, name+" to start", func() bool { // a fork elsewhere may still have it open for writing
		return cmd.Process != nil || cmd.Start() == nil
	})
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

// dockerRules are what docker has in nftables by the iptables of today, for its bridge.
const dockerRules = `
table ip filter {
	chain DOCKER { }
	chain DOCKER-USER { return; }
	chain DOCKER-ISOLATION-STAGE-1 { iifname "docker0" oifname != "docker0" jump DOCKER-ISOLATION-STAGE-2; return; }
	chain DOCKER-ISOLATION-STAGE-2 { oifname "docker0" drop; return; }
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		jump DOCKER-USER
		jump DOCKER-ISOLATION-STAGE-1
		oifname "docker0" ct state related,established accept
		oifname "docker0" jump DOCKER
		iifname "docker0" oifname != "docker0" accept
		iifname "docker0" oifname "docker0" accept
	}
}
table ip nat {
	chain DOCKER { iifname "docker0" return; }
	chain PREROUTING { type nat hook prerouting priority dstnat; fib daddr type local jump DOCKER; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }
}`

// firewalldRules are those of firewalld 1.3.3 that see packets: what it starts with, for the zone public.
const firewalldRules = `
table inet firewalld {
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		tcp dport 22 accept
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24 } reject with icmpv6 addr-unreachable
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10;
		ct state { established, related } accept
		oifname "lo" accept
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24 } reject with icmpv6 addr-unreachable
	}
}`

// Programs that change the network too are named, with what they mean for viasocks. With their rules, nothing is at fault.
func TestBeside(t *testing.T) {
	needWorld(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	r := examine(t)
	for _, f := range r.Findings {
		if slices.Contains([]string{"docker", "firewalld", "NetworkManager", "systemd-resolved"}, f.Check) {
			t.Errorf("%s does not run here: %+v", f.Check, f)
		}
	}
	sh(t, "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up")
	t.Cleanup(func() { sh(t, "ip link del docker0; nft flush ruleset") })
	for _, rules := range []string{dockerRules, firewalldRules} {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	}
	for _, name := range []string{"firewalld", "NetworkManager", "systemd-resolved"} {
		play(t, name)
	}
	r = examine(t, "--proxy", "socks5://"+proxyAt(t, nil).Addr().String())
	r.is(t, "docker", OK, "It runs here", "go through the proxy", "--exclude-device docker0")
	r.is(t, "firewalld", OK, "reload", "puts back")
	r.is(t, "NetworkManager", OK, "leaves the TUN device alone")
	r.is(t, "systemd-resolved", OK, "ask viasocks for names")
	r.is(t, "viasocks up", OK)
	r.onlyFaults(t)
}

func TestBesideByDevice(t *testing.T) {
	dir := t.TempDir()
	for name, uevent := range map[string]string{
		"home": "DEVTYPE=wireguard\nINTERFACE=home\nIFINDEX=7\n", "eth0": "INTERFACE=eth0\nIFINDEX=2\n",
		"podman0": "DEVTYPE=bridge\nINTERFACE=podman0\n", "tailscale0": "INTERFACE=tailscale0\n",
	} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "uevent"), []byte(uevent), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, f := range besidesAmong(kinds(dir), nil) {
		got = append(got, f.Check+": "+f.Do)
	}
	want := []string{
		"docker: --exclude-device podman0 lets them go their own way",
		"tailscale: --exclude 100.64.0.0/10 --exclude fd7a:115c:a1e0::/48 --exclude-unit tailscaled.service",
		"WireGuard: --exclude with the address of the endpoint",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q; want %q", got, want)
	}
}
