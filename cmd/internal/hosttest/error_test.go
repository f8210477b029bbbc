package hosttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestUpErrors: what `up` can't do it says in one clear line, with exit code 1, and the host is as it was.
func TestUpErrors(t *testing.T) {
	if !apart(t) {
		return
	}
	x := upErrors{newWorld(t)}
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	x.w.proxy(proxy4 + ":1080")
	if os.Getuid() == 0 {
		x.noRoot()
	}
	x.noTUN()
	x.proxyInside()
	x.taken()
	x.beside()
}

type upErrors struct{ w *world }

// fails runs a command that must fail with one line, and leave no trace.
func (x upErrors) fails(what, want string, cmd *exec.Cmd) {
	x.w.t.Helper()
	before := x.w.state()
	var out []byte
	var err error
	x.w.in("host", func() error { out, err = cmd.CombinedOutput(); return nil })
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != "viasocks: "+want+"\n" {
		x.w.t.Errorf("%s: %v, and not one line but\n%swant\nviasocks: %s", what, err, out, want)
	}
	x.w.same(what, before, x.w.state())
}

// up is a `viasocks up` with some flags, or with the one that works.
func (x upErrors) up(flags ...string) *exec.Cmd {
	if len(flags) == 0 {
		flags = []string{"--proxy", proxyURL}
	}
	return exec.Command(viasocks, append([]string{"up", "--log-level", "error"}, flags...)...)
}

func (x upErrors) noRoot() {
	x.w.t.Helper()
	cmd := x.up()
	// The copy is where another user may run it.
	cmd.Path = filepath.Join("/run", "viasocks.test")
	b, err := os.ReadFile(viasocks)
	if err == nil {
		err = os.WriteFile(cmd.Path, b, 0o755)
	}
	if err != nil {
		x.w.t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	x.fails(
		"no root",
		"cannot steer the host: CAP_NET_ADMIN is missing: run it as root, or use 'viasocks run' for one program",
		cmd,
	)
	os.Remove(cmd.Path)
}

func (x upErrors) noTUN() {
	x.w.t.Helper()
	noTUN := x.up()
	noTUN.Args = append([]string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$@"`, "sh"}, noTUN.Args...)
	if path, err := exec.LookPath("unshare"); err != nil {
		x.w.t.Log("not tried: no /dev/net/tun: ", err)
	} else {
		noTUN.Path = path
		x.fails("no /dev/net/tun", "cannot open /dev/net/tun: no such file or directory: run 'modprobe tun'; "+
			"in a container give it the device (docker: --device /dev/net/tun)", noTUN)
	}
}

// proxyInside: the proxy's address is in a range that viasocks uses itself.
func (x upErrors) proxyInside() {
	x.w.t.Helper()
	x.fails(
		"the TUN's range",
		"cannot use the proxy socks5://198.18.0.1:1080: its address is inside 198.18.0.0/15, which viasocks uses itself",
		x.up("--proxy", "socks5://198.18.0.1"),
	)
	x.fails(
		"the TUN's range of IPv6",
		"cannot use the proxy socks5://[fd76:6961:736f:636b::5]:1080: its address is inside fd76:6961:736f:636b::/64, "+
			"which viasocks uses itself",
		x.up("--proxy", "socks5://[fd76:6961:736f:636b::5]"),
	)
	if err := setProxyName("198.19.1.2"); err != nil {
		x.w.t.Fatal(err)
	}
	x.fails(
		"a name in the TUN's range",
		"cannot use the proxy proxy.test:1080: its name stands for 198.19.1.2, inside 198.18.0.0/15, which viasocks uses itself",
		x.up(),
	)
	if err := setProxyName(proxy4); err != nil {
		x.w.t.Fatal(err)
	}
}

// taken: somebody else has what viasocks would use.
func (x upErrors) taken() {
	x.w.t.Helper()
	for _, taken := range []struct{ what, by, undo, want string }{
		{"table taken by a rule", "rule add from 10.9.9.9 lookup 30323", "rule del from 10.9.9.9 lookup 30323",
			"cannot use table 30323: an ip rule of another program leads to it: see 'ip rule', and choose another with --table"},
		{"table taken by a route", "route add 203.0.113.0/24 dev eth0 table 30323", "route flush table 30323",
			"cannot use table 30323: it has routes of another program: see 'ip route show table 30323', " +
				"and choose another with --table"},
		{"priority taken", "rule add from 10.9.9.9 lookup main pref 9005", "rule del pref 9005",
			"cannot use rule priorities 9000 to 9019: another program has 9005: see 'ip rule', " +
				"and choose others with --priority"},
		{"mark taken", "rule add fwmark 0x76000000/0xff000000 lookup main pref 100", "rule del pref 100",
			"cannot use mark 0x76000000/0xff000000: an ip rule of another program uses mark 0x76000000: see 'ip rule', " +
				"and choose another with --mark"},
		{"device taken", "link add viasocks0 type bridge", "link del viasocks0",
			"cannot use the name viasocks0 for the TUN device: there is a bridge of that name: choose another with --tun"},
	} {
		x.w.ip("host", taken.by)
		x.fails(taken.what, taken.want, x.up())
		x.w.ip("host", taken.undo)
	}
	x.w.nft("host", "add table inet viasocks")
	x.fails(
		"nftables name taken",
		"cannot use the nftables name viasocks: another program has a table inet viasocks: choose another with --nft-table",
		x.up(),
	)
	x.w.nft("host", "delete table inet viasocks")
}

// beside: what another boot has left is nobody's, and what another namespace has is its own.
func (x upErrors) beside() {
	x.w.t.Helper()
	before := x.w.state()
	var ns syscall.Stat_t
	x.w.in("host", func() error { return syscall.Stat("/proc/thread-self/ns/net", &ns) })
	old := fmt.Sprintf("/run/viasocks/host-%d-00000000-0000-4000-8000-000000000000.journal", ns.Ino)
	if err := os.MkdirAll(filepath.Dir(old), 0o755); err != nil {
		x.w.t.Fatal(err)
	}
	if err := os.WriteFile(old, []byte(`{"version":1,"tun":"other0","table":7,"nft_table":"other"}`), 0o600); err != nil {
		x.w.t.Fatal(err)
	}
	d := x.w.up("--proxy", proxyURL, "--exclude", "192.0.2.0/24")
	if s := d.log.String(); strings.Contains(s, "take over") || !strings.Contains(s, "is inside the excluded 192.0.2.0/24") {
		x.w.t.Errorf("beside another boot's journal:\n%s", s)
	}
	x.fails(
		"a second daemon",
		fmt.Sprintf("cannot start: another viasocks is up here (process %d): see 'viasocks status'", d.cmd.Process.Pid),
		x.up(),
	)
	if c, err := x.w.dial("host", netipAddrPort(proxy4, 1080)); err != nil {
		x.w.t.Errorf("an excluded proxy is not reached by programs: %v", err)
	} else {
		c.Close()
	}
	if err := d.stop(); err != nil {
		x.w.t.Error(err)
	}
	if b, err := os.ReadFile(old); err != nil || !strings.Contains(string(b), "other0") {
		x.w.t.Errorf("another boot's journal: %s, %v", b, err)
	}
	os.Remove(old)
	x.w.same("after all", before, x.w.state())
}
