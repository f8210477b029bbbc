package hosttest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// way is what becomes of a probe.
type way uint8

const (
	held     way = iota // nothing of it leaves the host
	loose               // it leaves as if there were no viasocks
	whatever            // not this test's concern
)

// choice is one way to start `up`, and what becomes of each probe then, while it runs and when it was killed.
type choice struct {
	name  string
	flags []string
	way   func(*probe) way
	// An address that is carried and one that is reached directly, of both families; empty: none.
	carried, direct []string
	uid             int // whose connections are carried
}

const (
	somewhere4, somewhere6 = "203.0.113.201", "2001:db8:f::c9" // in no selection but that of all
	chosen4, chosen6       = "203.0.113.50", "2001:db8:f::32"  // in chosen
	chosenNets             = "203.0.113.0/26,2001:db8:f::/122" // where some forty probes go
	whoPort                = 81
)

var (
	somewhere = []string{somewhere4, somewhere6}
	chosen    = []string{chosen4, chosen6}
)

// to is whether a probe goes to one of the networks.
func to(nets string) func(*probe) bool {
	var ps []netip.Prefix
	for s := range strings.SplitSeq(nets, ",") {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return func(p *probe) bool {
		return slices.ContainsFunc(ps, func(n netip.Prefix) bool { return n.Contains(p.to.Addr()) })
	}
}

func toPorts(ports ...uint16) func(*probe) bool {
	return func(p *probe) bool { return slices.Contains(ports, p.to.Port()) }
}

func named(part string) func(*probe) bool {
	return func(p *probe) bool { return strings.Contains(p.name, part) }
}

func inNS(ns string) func(*probe) bool { return func(p *probe) bool { return p.ns == ns } }

// byEth0 leave by the uplink whatever our rules say: their program names it, or the kernel leads them there before it asks.
func byEth0(p *probe) bool {
	switch p.name {
	case "dns, link-local", "mdns", "llmnr", "ssdp", "lpd", "igmp report", "udp, IP_UNICAST_IF", "udp, IP_PKTINFO by device",
		"broadcast, directed", "broadcast, directed, private":
		return true
	case "lpd, device unnamed":
		return p.v6
	case "udp, MSG_DONTROUTE": // to a neighbour, whose device is the only one that it can be
		return !p.v6
	}
	return strings.Contains(p.name, "bound to device")
}

// ledByOthers are sent there by rules of others: after viasocks has looked, but before its filter does.
func ledByOthers(p *probe) bool {
	return strings.Contains(p.name, "re-marked by others") || strings.Contains(p.name, "with our mark")
}

// usual is what is open by design without --strict.
func usual(p *probe) way {
	switch p.class {
	case strict, private:
		return loose
	}
	return held
}

// excluded lets out what f names, besides the usual.
func excluded(f func(*probe) bool) func(*probe) way {
	return func(p *probe) way {
		if f(p) {
			return loose
		}
		return usual(p)
	}
}

// included holds what f names and nothing else.
func included(f func(*probe) bool) func(*probe) way {
	return func(p *probe) way {
		switch {
		case p.class == strict:
			return loose
		case f(p):
			return held
		case strings.Contains(p.name, "with our mark"): // that of viasocks' own sockets, which go to proxies only
			return whatever
		}
		return loose
	}
}

func both(a, b func(*probe) bool) func(*probe) bool {
	return func(p *probe) bool { return a(p) && b(p) }
}
func either(a, b func(*probe) bool) func(*probe) bool {
	return func(p *probe) bool { return a(p) || b(p) }
}
func not(a func(*probe) bool) func(*probe) bool { return func(p *probe) bool { return !a(p) } }

func choices(cgroup string) []choice {
	const worlds = "203.0.113.0/24,2001:db8:f::/64"
	all := []choice{
		{"exclude", []string{"--exclude", chosenNets}, excluded(to(chosenNets)), somewhere, chosen, 0},
		{"exclude-uid", []string{"--exclude-uid", "60000-65534"}, excluded(named("another uid")), somewhere, nil, 0},
		{
			"exclude-port",
			[]string{"--exclude-port", "123,853-860", "--exclude-port", "6771"},
			excluded(toPorts(123, 853, 6771)),
			somewhere,
			nil,
			0,
		},
		{"exclude-device eth0", []string{"--exclude-device", "eth0"}, excluded(either(byEth0, ledByOthers)), somewhere, nil, 0},
		{"exclude-device br0", []string{"--exclude-device", "br0"}, excluded(inNS("ctr")), somewhere, nil, 0},
		{"include", []string{"--include", chosenNets}, included(to(chosenNets)), chosen, somewhere, 0},
		{"include-uid", []string{"--include-uid", "nobody"}, included(named("another uid")), somewhere, somewhere, 65534},
		{"include-port", []string{"--include-port", "123,800-860,6771"}, included(toPorts(123, 853, 6771)), nil, somewhere, 0},
		{"include-device eth0", []string{"--include-device", "eth0"}, included(byEth0), nil, somewhere, 0},
		{"include-device br0", []string{"--include-device", "br0"}, included(inNS("ctr")), nil, somewhere, 0},
		{
			"include but for exclude",
			[]string{"--include", worlds, "--exclude", chosenNets},
			included(both(to(worlds), not(to(chosenNets)))),
			somewhere,
			chosen,
			0,
		},
		{"lan carry", []string{"--lan", "carry"}, func(p *probe) way {
			if p.class == private {
				return held
			}
			return usual(p)
		}, somewhere, nil, 0},
		{"lan refuse", []string{"--lan", "refuse"}, func(p *probe) way {
			if p.class == private {
				return held
			}
			return usual(p)
		}, somewhere, nil, 0},
		{"lan direct", []string{"--lan", "direct"}, usual, somewhere, nil, 0},
	}
	if cgroup != "" {
		all = append(all,
			choice{"exclude-cgroup", []string{"--exclude-cgroup", cgroup}, excluded(named("another cgroup")), somewhere, nil, 0},
			choice{"include-cgroup", []string{"--include-cgroup", cgroup}, included(named("another cgroup")), nil, somewhere, 0})
	}
	return all
}

// newChoosing is a world with probes and a recorder, and the positive control done.
func newChoosing(t *testing.T) (*observer, *established) {
	w := newWorld(t)
	w.foreign()
	w.hostServers()
	serveWho(w)
	est := newEstablished(w)
	var probes []*probe
	for _, p := range allProbes(est) {
		if !p.old && p.class != carried { // what was there before is TestLeak's
			p.id = len(probes)
			probes = append(probes, p)
		}
	}
	o := &observer{w: w, g: newGun(w, probes), rec: newRecorder(w)}
	o.rec.register(probes)
	t.Cleanup(func() { t.Logf("%s\n%s", t.Name(), o.table()) })
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	o.control("control: no viasocks")
	if t.Failed() {
		t.FailNow()
	}
	return o, est
}

// serveWho says where a connection came from.
func serveWho(w *world) {
	w.t.Helper()
	serve(w.listen("world", fmt.Sprintf(":%d", whoPort)), func(c net.Conn) {
		fmt.Fprintln(c, c.RemoteAddr())
		drain(c) // who asks ends it: the last packets are then of nobody's socket
	})
}

// TestChoices: what is excluded, or not included, leaves the host as if there were no viasocks, in each of the ways in
// which a host sends; of all the rest nothing does, also after kill -9.
func TestChoices(t *testing.T) {
	if !apart(t) {
		return
	}
	o, est := newChoosing(t)
	w := o.w
	o.rec.known(w.proxy(proxy4 + ":1080"))
	for i, c := range choices(est.agent.cgroup) {
		d := w.up(append([]string{"--proxy", proxyURL}, c.flags...)...)
		o.mixed(c.name+", up", c.way)
		o.carries(c.name+", up", c.carried, c.uid)
		w.direct(c.name+", up", c.direct)
		d.kill()
		o.mixed(c.name+", killed", c.way)
		w.direct(c.name+", killed", c.direct)
		if i%3 == 0 { // else the next one takes over
			if out, err := w.command("down"); err != nil {
				t.Fatalf("down: %v\n%s", err, out)
			}
		}
		if t.Failed() {
			t.Logf("with %v", c.flags)
		}
	}
	if out, err := w.command("down"); err != nil {
		t.Fatalf("down: %v\n%s", err, out)
	}
	o.control("control: after all")
}

// mixed is a phase in which what f lets loose must be seen, and of the rest nothing.
func (o *observer) mixed(name string, f func(*probe) way) {
	o.w.t.Helper()
	o.mixedDuring(name, f, nil)
}

// mixedDuring has event happen in the phase.
func (o *observer) mixedDuring(name string, f func(*probe) way, event func()) {
	o.w.t.Helper()
	o.rec.take()
	c, seen := o.fire(name, 2, 0, event)
	frames := map[int]int{}
	var leaks []sighting
	for _, s := range seen {
		if s.probe >= 0 && s.probe < len(o.g.probes) {
			frames[s.probe]++
			if w := f(o.g.probes[s.probe]); w != held {
				c.allowed[o.row(s.probe)]++
				continue
			}
		} else if s.what.dport == whoPort { // the end of what goes has asked directly
			continue
		}
		leaks = append(leaks, s)
	}
	o.judge(c, leaks)
	for _, p := range o.g.probes {
		if f(p) == loose && frames[p.id] == 0 && !errors.Is(o.g.lastError(p), errUnavailable) {
			o.w.t.Errorf("phase %q: %v does not leave the host (the program saw: %v)", name, p, o.g.lastError(p))
		}
	}
}

// carries asks at each address where it is asked from: by the proxy. Nothing of it leaves the host itself, up to the last
// packet.
func (o *observer) carries(when string, addrs []string, uid int) {
	o.w.t.Helper()
	for _, a := range addrs {
		o.rec.take()
		got, err := o.w.askWho(a, uid)
		if errors.Is(err, errUnavailable) {
			continue
		}
		if err != nil || got != proxy4 && got != proxy6 {
			o.w.t.Errorf("%s: %s was reached from %q (%v), want the proxy", when, a, got, err)
		}
		testkit.Settle(20*time.Millisecond, "what leaves has left")
		for _, s := range o.rec.take() {
			if s.what.dst == addr(a) {
				o.w.t.Errorf("%s: of a connection that is carried there left the host: %v", when, s.what)
			}
		}
	}
}

// direct is the same for what is not carried.
func (w *world) direct(when string, addrs []string) {
	w.t.Helper()
	for _, a := range addrs {
		want := host4
		if addr(a).Is6() {
			want = host6
		}
		if got, err := w.askWho(a, 0); err != nil || got != want {
			w.t.Errorf("%s: %s was reached from %q (%v), want %s", when, a, got, err, want)
		}
	}
}

// askWho asks as a user.
func (w *world) askWho(a string, uid int) (from string, err error) {
	err = in("host", func() error {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0); errno != 0 {
			return errno
		}
		if now, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0); int(now) != uid {
			return fmt.Errorf("%w: another user", errUnavailable)
		}
		c, err := net.DialTimeout("tcp", netipAddrPort(a, whoPort).String(), 20*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := fmt.Fscanln(c, &from); err != nil {
			return err
		}
		ap, err := netip.ParseAddrPort(from)
		from = ap.Addr().Unmap().String()
		return err
	})
	return from, err
}
