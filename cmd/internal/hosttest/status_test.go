package hosttest

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
)

// ask is a subcommand with --json.
func ask[T any](w *world, args ...string) (v T) {
	w.t.Helper()
	out, err := w.command(append(args, "--json")...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	if err != nil {
		w.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return v
}

// exchange sends n bytes of TCP and waits for their echo.
func exchange(c net.Conn, n int) error {
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write(make([]byte, n)); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, n))
	return err
}

const statusConfig = `proxy socks5://` + proxy4 + `
upstream other=socks5://` + proxyB4 + `
rule port 25 reject
rule dst 203.0.113.128/25 via other
exclude 198.51.100.77,203.0.113.16/28
exclude-uid 12345
exclude-port 9999
connect-timeout 5s
`

// TestStatus: what status and flows say is what is so.
func TestStatus(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.foreign()
	serve(w.listen("world", ":77"), echo)
	answers := w.packets("world", "203.0.113.9:79")
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := answers.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = answers.WriteTo(b[:n], from)
		}
	}()
	w.proxy(proxy4 + ":1080")
	x := statusTest{w: w, other: w.proxy(proxyB4 + ":1080")}
	w.configure(statusConfig)
	x.d = w.up("--config", configFile)
	x.saysHost()
	x.makeFlows()
	x.saysFlows()
	x.saysFigures()
	w.countRefused(x.s)
	x.oneDies()
	x.reload()
}

// statusTest is a host whose viasocks is asked, and the flows that it has.
type statusTest struct {
	w          *world
	d          *daemon
	other      *sockstest.Server
	s          control.Status
	f          control.Flows
	big, small net.Conn
	udp        net.PacketConn
}

func (x *statusTest) status() control.Status { return ask[control.Status](x.w, "status") }

var statusHost = control.Host{
	TUN: tunName, Table: 30323, Mark: "0x76000000/0xff000000",
	Steered: []string{"everything that is not named below"},
	Kept:    []string{"connections from outside"},
	Excluded: []string{
		"to 198.51.100.77",
		"to 203.0.113.16/28",
		"of user 12345",
		"to port 9999",
		"private networks that the host is connected to",
		"private network 172.20.0.0/24 by br0",
		"private network fd00:20::/64 by br0",
		"private network fe80::/64 by br0",
		"private network fe80::/64 by ctr0",
		"private network 10.77.0.0/24 by eth0",
		"private network fd77::/64 by eth0",
		"private network fe80::/64 by eth0",
	},
}

func (x *statusTest) saysHost() {
	x.w.t.Helper()
	x.s = x.status()
	s := x.s
	if s.State != control.Ready || s.PID != x.d.cmd.Process.Pid || s.ReadyAt == nil || s.ReadyAt.Before(s.Since) ||
		time.Since(s.Since) > time.Minute ||
		s.Config != configFile {
		x.w.t.Errorf("%+v", s)
	}
	if fmt.Sprint(s.Host.Steered, s.Host.Kept, s.Host.Excluded, s.Host.TUN, s.Host.Table, s.Host.Mark) !=
		fmt.Sprint(statusHost.Steered, statusHost.Kept, statusHost.Excluded, statusHost.TUN, statusHost.Table, statusHost.Mark) {
		x.w.t.Errorf("host: %+v, want %+v", s.Host, statusHost)
	}
	if !slices.ContainsFunc(s.Warnings, func(l string) bool { return strings.Contains(l, "comes before ours") }) {
		x.w.t.Errorf("no word of the ip rule of somebody else: %q", s.Warnings)
	}
}

// makeFlows makes one flow to each proxy, one of UDP, one that is refused by a rule, and one past the proxy.
func (x *statusTest) makeFlows() {
	x.w.t.Helper()
	x.big = x.w.mustDial("203.0.113.7", 77)
	x.small = x.w.mustDial("203.0.113.207", 77)
	if err := exchange(x.big, 70_000); err != nil {
		x.w.t.Fatal(err)
	}
	if err := exchange(x.small, 300); err != nil {
		x.w.t.Fatal(err)
	}
	x.udp = x.w.packets("host", ":0")
	b := make([]byte, 2048)
	for try := 0; ; try++ { // UDP may be lost
		if _, err := x.udp.WriteTo(make([]byte, 500),
			net.UDPAddrFromAddrPort(netip.MustParseAddrPort("203.0.113.9:79"))); err != nil {
			x.w.t.Fatal(err)
		}
		_ = x.udp.SetReadDeadline(time.Now().Add(2 * time.Second))
		if n, _, err := x.udp.ReadFrom(b); err == nil && n == 500 {
			break
		} else if try == 5 {
			x.w.t.Fatal(err)
		}
	}
	if _, err := x.w.dial("host", netipAddrPort("203.0.113.7", 25)); err == nil {
		x.w.t.Error("a connection that a rule rejects is made")
	}
	past := x.w.mustDial("203.0.113.17", 77)
	if err := exchange(past, 100); err != nil {
		x.w.t.Fatal(err)
	}
}

func (x *statusTest) saysFlows() {
	x.w.t.Helper()
	x.w.eventually(20*time.Second, "all bytes are counted", func() bool { // a relay counts what it has written
		x.f = ask[control.Flows](x.w, "flows")
		return len(x.f.Flows) == 3 && x.f.Flows[0].Down == 70_000 && x.f.Flows[2].Down == 300
	})
	if x.f.Total != 3 || len(x.f.Flows) != 3 {
		x.w.t.Fatalf("flows: %+v", x.f)
	}
	exe, err := os.Executable()
	if err != nil {
		x.w.t.Fatal(err)
	}
	for i, want := range []control.Flow{
		{Proto: "tcp", Src: x.big.LocalAddr().String(), Dst: "203.0.113.7:77", Upstream: "proxy", State: "open", Up: 70_000,
			Down: 70_000},
		{Proto: "udp", Dst: "203.0.113.9:79", Upstream: "proxy", State: "open", Up: 500, Down: 500},
		{Proto: "tcp", Src: x.small.LocalAddr().String(), Dst: "203.0.113.207:77", Upstream: "other", State: "open", Up: 300,
			Down: 300},
	} {
		got := x.f.Flows[i]
		if want.Proto == "udp" { // again when it was lost
			if got.Up < want.Up || got.Down < want.Down ||
				!strings.HasSuffix(got.Src, fmt.Sprintf(":%d", x.udp.LocalAddr().(*net.UDPAddr).Port)) {
				x.w.t.Errorf("flow %d: %+v", i, got)
			}
			want.Src, want.Up, want.Down = got.Src, got.Up, got.Down
		}
		if got.Start.Before(x.s.Since) || got.Start.After(time.Now()) || got.ID == 0 || got.Rule == "" {
			x.w.t.Errorf("flow %d: %+v", i, got)
		}
		want.ID, want.Start, want.Rule = got.ID, got.Start, got.Rule
		want.PID, want.Exe = os.Getpid(), exe
		if got != want {
			x.w.t.Errorf("flow %d: %+v, want %+v", i, got, want)
		}
	}
	if one := ask[control.Flows](x.w, "flows", "--limit", "1"); one.Total != 3 || len(one.Flows) != 1 ||
		one.Flows[0] != x.f.Flows[0] {
		x.w.t.Errorf("--limit 1: %+v", one)
	}
	text, err := x.w.command("flows")
	if err != nil || strings.Count(text, "\n") != 4 || !strings.Contains(text, "203.0.113.7:77") ||
		!strings.Contains(text, "68.4 KiB") {
		x.w.t.Errorf("flows: %v\n%s", err, text)
	}
}

func (x *statusTest) saysFigures() {
	x.w.t.Helper()
	x.s = x.status()
	s := x.s
	if s.TCP.Now != 2 || s.TCP.Pending != 0 || s.TCP.Total != 3 || s.TCP.Refused != 1 || s.UDP.Now != 1 || s.UDP.Total != 1 {
		x.w.t.Errorf("TCP %+v, UDP %+v", s.TCP, s.UDP)
	}
	if up := x.f.Flows[0].Up + x.f.Flows[1].Up + x.f.Flows[2].Up; s.Up != up || s.Down < 70_800 || s.Down > up {
		x.w.t.Errorf("bytes: %d up, %d down, want %d", s.Up, s.Down, up)
	}
	hits := map[string]uint64{}
	for _, r := range s.Rules {
		hits[r.Rule] = r.Hits
	}
	if hits["port 25 reject"] != 1 || hits["dst 203.0.113.128/25 via other"] != 1 || len(s.Rules) != 3 || s.Rules[2].Hits < 2 {
		x.w.t.Errorf("rules: %+v", s.Rules)
	}
	addresses := func(name string) []string {
		i := slices.IndexFunc(s.Upstreams, func(u control.Upstream) bool { return u.Name == name })
		udp := map[string]string{"proxy": "ok", "other": "not tried"}[name]
		if i < 0 || s.Upstreams[i].TCP != "ok" || s.Upstreams[i].UDP != udp {
			x.w.t.Errorf("%s: %+v", name, s.Upstreams)
			return nil
		}
		return s.Upstreams[i].Addresses
	}
	if a := addresses("proxy"); len(a) != 2 || !slices.Contains(a, proxy4+":1080/tcp") { // and the UDP relay
		x.w.t.Errorf("proxy: %q", a)
	}
	if a := addresses("other"); len(a) != 1 || a[0] != proxyB4+":1080/tcp" {
		x.w.t.Errorf("other: %q", a)
	}
}

// oneDies: one proxy dies, is down then, and the other is not.
func (x *statusTest) oneDies() {
	x.w.t.Helper()
	_ = x.small.Close()
	x.w.eventually(30*time.Second, "the flow that was closed is gone", func() bool {
		return ask[control.Flows](x.w, "flows").Total == 2
	})
	x.other.Close()
	health := ""
	x.w.eventually(time.Minute, "the dead proxy is down", func() bool {
		if c, err := x.w.dial("host", netipAddrPort("203.0.113.207", 77)); err == nil {
			c.Close()
		}
		health = ""
		for _, u := range x.status().Upstreams {
			health += u.Name + " " + u.TCP + ", "
		}
		return health == "proxy ok, other down, "
	})
	text, err := x.w.command("status")
	if err != nil || !strings.Contains(text, "TCP down") || !strings.Contains(text, "TCP ok") {
		x.w.t.Errorf("status: %v, %s\n%s", err, health, text)
	}
}

// reload: it is told, and what it could not take.
func (x *statusTest) reload() {
	x.w.t.Helper()
	x.w.configure(statusConfig + "mtu 1400\nexclude-port 7777\nmax-mappings 1\n")
	x.d.reload()
	s := x.status()
	if s.Reloaded == nil || !slices.Contains(s.Host.Excluded, "to port 7777") ||
		!slices.ContainsFunc(s.Warnings, func(l string) bool { return strings.Contains(l, "next start only: mtu") }) {
		x.w.t.Errorf("after the reload: %v, %q, %q", s.Reloaded, s.Host.Excluded, s.Warnings)
	}
	if _, err := x.w.packets("host", ":0").WriteTo([]byte("another"),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("203.0.113.9:79"))); err != nil {
		x.w.t.Error(err)
	}
	x.w.eventually(30*time.Second, "there is room for one mapping only", func() bool {
		s := x.status()
		return s.UDP.Now == 1 &&
			(s.UDP.Total > 1 || slices.ContainsFunc(s.Dropped, func(c control.Counter) bool {
				return strings.Contains(c.What, "want of room")
			}))
	})
}

func (w *world) mustDial(to string, port uint16) net.Conn {
	w.t.Helper()
	c, err := w.dial("host", netipAddrPort(to, port))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// countRefused sends what the filter refuses, so many of each kind, and expects status to say so.
func (w *world) countRefused(before control.Status) {
	w.t.Helper()
	count := func(s control.Status, name string) uint64 {
		i := slices.IndexFunc(s.Host.Refused, func(c control.Counter) bool { return c.Name == name })
		if i < 0 {
			return 0
		}
		if s.Host.Refused[i].What == "" || s.Host.Refused[i].What == name {
			w.t.Errorf("%s is not explained", name)
		}
		return s.Host.Refused[i].Packets
	}
	kinds := []struct {
		name string
		to   string
		n    int
		more bool // others may send such as well
	}{
		{"refused_output", "203.0.113.7:4000", 5, true},
		{"refused_dns", "203.0.113.7:53", 3, false},
		{"refused_multicast", "224.0.0.251:5353", 4, true},
	}
	for _, k := range kinds {
		for range k.n {
			w.in("host", func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.BindToDevice(fd, "eth0"); err != nil {
					return err
				}
				if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(netip.MustParseAddrPort(k.to))); err != unix.EPERM {
					return fmt.Errorf("sent to %s: %v, want EPERM", k.to, err)
				}
				return nil
			})
		}
	}
	w.ip("router", "route replace 198.18.0.1/32 via "+hostLAN4+" dev host0")
	w.refuses("router", "198.18.0.1")
	after := ask[control.Status](w, "status")
	for _, k := range append(kinds, kinds[0]) {
		if n := count(after, k.name) - count(before, k.name); n != uint64(k.n) && (!k.more || n < uint64(k.n)) {
			w.t.Errorf("%s: %d packets, want %d", k.name, n, k.n)
		}
	}
	if count(after, "refused_lan_to_tun") == 0 {
		w.t.Error("what came from outside to the TUN's address is not counted")
	}
}
