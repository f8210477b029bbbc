package hosttest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestLocalStub: dnsmasq runs on the host as its resolver, and asks the router of the LAN. Programs still reach it, and while
// viasocks is up its own questions go to the resolver of --dns through the proxy, and none to the router.
func TestLocalStub(t *testing.T) {
	if !apart(t) {
		return
	}
	if _, err := exec.LookPath("dnsmasq"); err != nil {
		t.Skip("dnsmasq is not installed: scripts/deps.sh test")
	}
	w := newWorld(t)
	w.nameServer()
	proxy := w.proxy(proxy4 + ":1080")
	var router atomic.Int32
	u := w.packets("router", lanRouter4+":53")
	go func() {
		b := make([]byte, 4096)
		for n, from, err := u.ReadFrom(b); err == nil; n, from, err = u.ReadFrom(b) {
			router.Add(1)
			if a := answerDNS(b[:n]); a != nil {
				_, _ = u.WriteTo(a, from)
			}
		}
	}()
	w.start(
		"host",
		nil,
		nil,
		"dnsmasq",
		"--keep-in-foreground",
		"--conf-file=/dev/null",
		"--user=root",
		"--no-resolv",
		"--no-hosts",
		"--bind-interfaces",
		"--listen-address=127.0.0.1",
		"--pid-file=",
		"--cache-size=0",
		"--server="+lanRouter4,
	)
	n := 0
	ask := func(when string) {
		t.Helper()
		n++
		w.eventually(20*time.Second, when+" a question to 127.0.0.1 is answered", func() bool {
			out, _ := try("host", nil, "dig", "+tries=1", "+time=3", "@127.0.0.1", fmt.Sprintf("n%d.example", n), "TXT")
			return strings.Contains(out, "status: NOERROR")
		})
	}
	ask("before up")
	if router.Swap(0) == 0 {
		t.Error("the control: dnsmasq does not ask the router")
	}
	for _, mode := range []string{"tcp://" + dnsServer4, "fake,tcp://" + dnsServer4} {
		d := w.up("--proxy", "socks5://"+proxy4+":1080", "--dns", mode)
		before := len(proxy.Requests())
		ask("with --dns " + mode)
		for _, r := range proxy.Requests()[before:] {
			if to := net.JoinHostPort(r.Dst.IP.String(), fmt.Sprint(r.Dst.Port)); to != dnsServer4+":53" {
				t.Errorf("%s: the proxy was asked for %s", mode, to)
			}
		}
		if len(proxy.Requests()) == before {
			t.Errorf("%s: the proxy was not asked", mode)
		}
		if got := router.Load(); got != 0 {
			t.Errorf("%s: the router was asked %d times", mode, got)
		}
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	}
	ask("after up")
}

// resolve1 is a systemd-resolved on a bus of its own, as far as viasocks speaks to it.
type resolve1 struct {
	mu      sync.Mutex
	servers map[int32][]resolve1Server
	domains map[int32][]resolve1Domain
	flushes int
}

type resolve1Server struct {
	Family  int32
	Address []byte
}

type resolve1Domain struct {
	Name      string
	RouteOnly bool
}

// resolve1Link is the object of one device.
type resolve1Link struct {
	r *resolve1
	i int32
}

func (l resolve1Link) Get(_, name string) (dbus.Variant, *dbus.Error) {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	if name == "DNS" {
		return dbus.MakeVariant(append([]resolve1Server{}, l.r.servers[l.i]...)), nil
	}
	return dbus.MakeVariant(append([]resolve1Domain{}, l.r.domains[l.i]...)), nil
}

// startResolve1 runs a bus with a resolve1, and makes it the system bus of what is started from now on.
func startResolve1(t *testing.T) *resolve1 {
	t.Helper()
	dir := t.TempDir()
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd"><busconfig><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`,
		dir), 0o600); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t}
	w.start("host", nil, nil, "dbus-daemon", "--config-file="+conf, "--nofork")
	address := "unix:path=" + dir + "/bus"
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	var conn *dbus.Conn
	w.eventually(20*time.Second, "the bus is there", func() (ok bool) {
		var err error
		conn, err = dbus.Connect(address)
		return err == nil
	})
	t.Cleanup(func() { conn.Close() })
	r := &resolve1{servers: map[int32][]resolve1Server{}, domains: map[int32][]resolve1Domain{}}
	locked := func(f func()) *dbus.Error {
		r.mu.Lock()
		defer r.mu.Unlock()
		f()
		return nil
	}
	word := func(int32, string) *dbus.Error { return nil }
	err := conn.ExportMethodTable(map[string]any{
		"GetLink": func(i int32) (dbus.ObjectPath, *dbus.Error) {
			path := dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/resolve1/link/_%d", i))
			_ = conn.Export(resolve1Link{r, i}, path, "org.freedesktop.DBus.Properties")
			return path, nil
		},
		"SetLinkDNS":          func(i int32, s []resolve1Server) *dbus.Error { return locked(func() { r.servers[i] = s }) },
		"SetLinkDomains":      func(i int32, d []resolve1Domain) *dbus.Error { return locked(func() { r.domains[i] = d }) },
		"SetLinkDefaultRoute": func(int32, bool) *dbus.Error { return nil },
		"SetLinkLLMNR":        word, "SetLinkMulticastDNS": word, "SetLinkDNSOverTLS": word, "SetLinkDNSSEC": word,
		"RevertLink": func(i int32) *dbus.Error {
			return locked(func() { delete(r.servers, i); delete(r.domains, i) })
		},
		"FlushCaches": func() *dbus.Error { return locked(func() { r.flushes++ }) },
	}, "/org/freedesktop/resolve1", "org.freedesktop.resolve1.Manager")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.resolve1", 0); err != nil {
		t.Fatal(err)
	}
	return r
}

// of is what the device has: "198.18.0.2 ." if viasocks set it, "" if nothing is set; and how often caches were emptied.
func (r *resolve1) of(index int) (set string, flushes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.servers[int32(index)] {
		set += net.IP(s.Address).String()
	}
	for _, d := range r.domains[int32(index)] {
		if d.RouteOnly {
			set += " " + d.Name
		}
	}
	return set, r.flushes
}

// TestSystemdResolved: up tells systemd-resolved of the TUN, also of one that was made anew; a stop takes it back, and after
// kill -9 down does.
func TestSystemdResolved(t *testing.T) {
	if !apart(t) {
		return
	}
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("dbus-daemon is not installed: scripts/deps.sh test")
	}
	w := newWorld(t)
	w.proxy(proxy4 + ":1080")
	r := startResolve1(t)
	tun := func() (index int) {
		_ = in("host", func() error { index = linkIndex(tunName); return nil })
		return index
	}
	const want = "198.18.0.2 ."
	told := func(when string) int {
		t.Helper()
		w.eventually(30*time.Second, when+" systemd-resolved is told", func() bool { set, _ := r.of(tun()); return set == want })
		return tun()
	}
	flags := []string{"--proxy", "socks5://" + proxy4 + ":1080"}

	for option, want := range map[string]bool{"auto": true, "off": false} {
		out, err := w.command(append([]string{"up", "--dry-run", "--resolved", option}, flags...)...)
		if err != nil || strings.Contains(out, "resolvectl dns "+tunName+" 198.18.0.2") != want {
			t.Errorf("--dry-run --resolved %s: %v\n%s", option, err, out)
		}
	}
	d := w.up(flags...)
	index := told("after the start")
	w.eventually(30*time.Second, "status says so", func() bool { // viasocks has yet to take the answer of systemd-resolved
		out, err := w.command("status")
		return err == nil && strings.Contains(out, "systemd-resolved asks viasocks")
	})
	w.ip("host", "link del "+tunName)
	w.eventually(30*time.Second, "the TUN is made anew", func() bool { i := tun(); return i != 0 && i != index })
	index = told("after the TUN was deleted")
	_, flushes := r.of(index)
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	if set, n := r.of(index); set != "" || n == flushes {
		t.Errorf("after the stop: %q, caches emptied %d times, %d before", set, n, flushes)
	}

	d = w.up(flags...)
	index = told("after another start")
	d.kill()
	out, err := w.command("down")
	if set, _ := r.of(index); err != nil || set != "" ||
		!strings.Contains(out, "name servers of "+tunName+" in systemd-resolved") {
		t.Errorf("down after kill -9: %v, %q\n%s", err, set, out)
	}

	// A reload changes it both ways.
	line := "proxy socks5://" + proxy4 + ":1080\n"
	w.configure(line)
	d = w.up("--config", configFile)
	told("after a start with a file")
	for _, quiet := range []string{"resolved off", "dns relay"} {
		w.configure(line + quiet + "\n")
		d.reload()
		w.eventually(
			30*time.Second,
			"what was told is taken back after "+quiet,
			func() bool { set, _ := r.of(tun()); return set == "" },
		)
		if out, err := w.command("status"); err != nil || strings.Contains(out, "next start only") {
			t.Errorf("status after %s: %v\n%s", quiet, err, out)
		}
		w.configure(line)
		d.reload()
		told("after " + quiet + " was taken out")
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	for _, quiet := range [][]string{{"--resolved", "off"}, {"--dns", "relay"}, {"--dns", "off"}} {
		d = w.up(append(flags, quiet...)...)
		testkit.Never(t, 300*time.Millisecond, fmt.Sprintf("systemd-resolved was told with %q", quiet), func() bool {
			set, _ := r.of(tun())
			return set != ""
		})
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	}
}
