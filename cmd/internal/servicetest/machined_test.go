package servicetest

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// nested makes the directory of a machine of systemd-nspawn, which holds busybox.
const nested = `root=/var/lib/machines/$0
mkdir -p $root/usr/bin $root/etc $root/proc $root/sys $root/dev $root/tmp $root/run $root/var $root/root
ln -s usr/bin $root/bin
ln -s usr/bin $root/sbin
cp /bin/busybox $root/usr/bin/
echo ID=busybox >$root/etc/os-release
echo nameserver 203.0.113.53 >$root/etc/resolv.conf`

// TestMachined: a machine of systemd-nspawn that the real systemd-machined knows is found by its name, whether it has a scope
// of its own or the unit that started it. Its programs reach the world through the proxy, and `down` gives its network back.
func TestMachined(t *testing.T) {
	for _, program := range []string{"/lib/systemd/systemd-machined", "/usr/bin/systemd-nspawn", "/usr/bin/dbus-daemon",
		"/bin/busybox"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%v ('make zoo' installs it)", err)
		}
	}
	m := newMachine(t)
	m.systemctl("start", "dbus.service", "systemd-machined.service")
	for name, how := range map[string][]string{"scope": nil, "unit": {"--keep-unit"}} {
		t.Run(name, func(t *testing.T) {
			m := &machine{t: t, pid: m.pid}
			m.must("/bin/sh", "-ec", nested, name)
			run := append([]string{"/usr/bin/systemd-run", "--unit=start-" + name, "--property=Delegate=yes",
				"/usr/bin/systemd-nspawn",
				"--private-network", "--console=pipe", "--resolv-conf=off", "--timezone=off", "--machine=" + name}, how...)
			m.must(append(run, "/bin/busybox", "sleep", "1000")...)
			var leader string
			testkit.Eventually(t, "systemd-machined knows the machine", func() bool {
				out, err := m.run("/usr/bin/machinectl", "show", "--value", "--property=Leader", name)
				leader = strings.TrimSpace(out)
				comm, _ := m.run("/bin/cat", "/proc/"+leader+"/comm")
				return err == nil && comm == "busybox\n"
			})
			inside := []string{"/usr/bin/nsenter", "--target", leader, "--net", "--mount", "--root", "--wd", "/bin/busybox"}
			before := m.must(append(inside, "ip", "addr")...)
			m.must("/usr/bin/systemd-run", "--unit=attach-"+name, "--service-type=notify", "/usr/local/bin/viasocks", "attach",
				"--proxy", proxyURL, "--container", name)
			if got := m.must(append(inside, "wget", "-q", "-O", "-", "http://"+farName+"/")...); got != "hello\n" {
				t.Errorf("attached: the far end answers %q", got)
			}
			m.must("/usr/local/bin/viasocks", "down", "--container", name)
			if after := m.must(append(inside, "ip", "addr")...); after != before {
				t.Errorf("detached: the network was\n%s\nand is\n%s", before, after)
			}
			m.noLeak()
			m.must("/usr/bin/machinectl", "terminate", name)
		})
	}
}
