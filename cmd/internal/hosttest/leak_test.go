package hosttest

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// halves are the routes of a DHCP server (option 121) or a VPN that wants everything without touching the default.
var halves = []string{
	"0.0.0.0/1 via " + router4 + onlink, "128.0.0.0/1 via " + router4 + onlink,
	"::/1 via " + router6 + onlink, "8000::/1 via " + router6 + onlink,
}

// onlink keeps the kernel from asking our rules how the gateway is reached: TestRoutesOfOthers is about that.
const onlink = " dev eth0 onlink"

func (w *world) halves(verb string) {
	w.t.Helper()
	for _, r := range halves {
		w.ip("host", "route "+verb+" "+r)
	}
}

// foreign adds what others have on the host besides docker: a chain that re-marks.
func (w *world) foreign() {
	w.t.Helper()
	w.nft("host", foreignRules)
	for _, r := range foreignIPRules {
		w.ip("host", r)
	}
}

// notClosed says that the closed steering is not in this program, with the reason to skip.
func (w *world) notClosed() string {
	w.t.Helper()
	if out := w.run("host", nil, "nft", "list", "tables"); !strings.Contains(out, "viasocks") {
		return "viasocks up sets no filter yet"
	}
	return ""
}

// newLeak is a world with probes and a recorder, and the positive control done.
func newLeak(t *testing.T) (*observer, *established, *sockstest.Server) {
	w := newWorld(t)
	w.foreign()
	est := newEstablished(w)
	probes := allProbes(est)
	o := &observer{w: w, g: newGun(w, probes), rec: newRecorder(w)}
	o.rec.register(probes)
	t.Cleanup(func() { t.Logf("%s\n%s", t.Name(), o.table()) })
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	p := w.proxy(proxy4 + ":1080")
	o.rec.known(p)
	o.control("control: no viasocks")
	if t.Failed() {
		t.FailNow()
	}
	return o, est, p
}

const proxyURL = "socks5://" + proxyName + ":1080"

func TestLeak(t *testing.T) {
	if !apart(t) {
		return
	}
	o, est, p := newLeak(t)
	x := &leakRun{w: o.w, o: o, est: est, p: p}
	w := o.w
	w.halves("add")
	o.control("control: 0/1 and 128/1 in main")
	w.halves("del")

	w.configure("proxy " + proxyURL)
	o.starting("starting, from open", x.up)
	if why := w.notClosed(); why != "" {
		o.skip("everything else", why)
		t.Skip(why)
	}
	x.rules = w.ipRules()
	est.carry(w)
	o.closedFor("running", 2, 1200*time.Millisecond, nil)
	o.closed("0/1 and 128/1 in main", func() { w.halves("add") })
	for _, step := range []func(){x.reloads, x.proxyMoves, x.undone, x.killed, x.corrupted, x.stopped} {
		step()
	}
}

// leakRun is a viasocks whose host is looked at while things happen to it.
type leakRun struct {
	w     *world
	o     *observer
	est   *established
	p     *sockstest.Server
	d     *daemon
	rules string
}

func (x *leakRun) up() { x.d = x.w.up("--config", configFile) }

func (x *leakRun) reloads() {
	if has("reload") || strings.Contains(x.d.log.String(), "reload") || has("close") {
		x.o.closed("reload", func() { x.d.reload() })
		x.o.closed("reload of a file with a mistake", func() {
			x.w.configure("proxy nonsense")
			x.d.signal(syscall.SIGHUP)
			testkit.Settle(100*time.Millisecond, "it has read the file")
			x.w.configure("proxy " + proxyURL)
		})
		x.est.carry(x.w)
	} else {
		x.o.skip("reload", "viasocks up can't reload yet")
	}
}

// proxyMoves: the proxy goes, and comes back elsewhere.
func (x *leakRun) proxyMoves() {
	x.o.closedFor("proxy down", 2, 1200*time.Millisecond, func() { x.p.Close() })
	p2 := x.w.proxy(proxyB4 + ":1080")
	x.o.rec.known(p2)
	x.o.closed("proxy has another address", func() {
		if err := setProxyName(proxyB4); err != nil {
			x.w.t.Error(err)
		}
		x.w.eventually(time.Minute, "the proxy at its new address is asked", func() bool { return p2.Stats().Requests > 0 })
	})
	x.est.carry(x.w)
	if has("close") {
		p3 := x.w.proxy(proxy4 + ":1081")
		x.o.rec.known(p3)
		x.o.closed("proxy changed by reload", func() {
			x.w.configure("proxy socks5://" + proxy4 + ":1081")
			x.d.reload()
		})
		x.est.carry(x.w)
		if p3.Stats().Requests == 0 {
			x.w.t.Error("the new proxy is not asked")
		}
	}
}

// undone: others delete what is ours, and change the TUN.
func (x *leakRun) undone() {
	x.o.closed("our ip rules deleted", func() { x.w.deleteRules() })
	x.w.eventually(20*time.Second, "the ip rules are put back", func() bool { return x.w.ipRules() == x.rules })
	x.o.closed("table T flushed", func() { x.w.flushTable() })
	x.w.eventually(20*time.Second, "table T is put back", func() bool { return strings.Contains(x.w.tableT(), "default") })
	x.o.closed("nft flushed", func() { x.w.run("host", nil, "nft", "flush", "ruleset") })
	x.w.nft("host", dockerRules+foreignRules)
	x.o.closed("our nft tables deleted", func() { x.w.deleteTables() })
	x.w.eventually(20*time.Second, "the filter is put back", func() bool { return x.w.notClosed() == "" })
	x.est.carry(x.w)
	for _, c := range tunChanges {
		x.o.closedFor("TUN "+c.name, 2, 1200*time.Millisecond, func() { x.d.meanwhile(x.w, c.ip) })
		if !x.d.alive() {
			break
		}
		x.w.eventually(20*time.Second, "the TUN is as it was", func() bool {
			c, err := x.w.dial("host", x.est.carried4)
			if err == nil {
				c.Close() // an idle one would outlive its viasocks, and its keepalive come to the world after the stop
			}
			return err == nil
		})
	}
}

func (x *leakRun) killed() {
	x.d.kill()
	x.o.closedFor("killed", 2, 1200*time.Millisecond, nil)
	testkit.Pace(guard)
	x.o.closed("killed, guard lapsed", nil)
	x.o.closed("restart", x.up)
	if now := x.w.ipRules(); now != x.rules {
		x.w.t.Errorf("ip rules after the restart:\n%s\nbefore:\n%s", now, x.rules)
	}
	x.est.carry(x.w)

	took := x.d.startedIn
	for range 20 {
		x.d.kill()
		x.o.closed("kill -9 at 20 instants", func() {
			x.d = x.w.launch("--config", configFile)
			testkit.Pace(time.Duration(rand.Int64N(int64(took * 3 / 2))))
			x.d.kill()
		})
		x.o.merge()
	}
	x.o.closed("restart after 20 kills", x.up)
	if now := x.w.ipRules(); now != x.rules {
		x.w.t.Errorf("ip rules after 20 kills:\n%s\nbefore:\n%s", now, x.rules)
	}
}

// corrupted: the journal of one that was killed is not what it was.
func (x *leakRun) corrupted() {
	for _, c := range []struct {
		name    string
		corrupt func([]byte) []byte
	}{
		{"journal cut", func(b []byte) []byte { return b[:len(b)/2] }},
		{"journal garbage", func(b []byte) []byte { return []byte("\x00garbage\n{") }},
		{"journal gone", func([]byte) []byte { return nil }},
	} {
		x.d.kill()
		x.w.corruptJournal(c.corrupt)
		x.o.closed(c.name+", up", x.up)
	}
	x.est.carry(x.w)
}

func (x *leakRun) stopped() {
	x.o.stopping("stop", func() {
		if err := x.d.stop(); err != nil {
			x.w.t.Errorf("stop: %v", err)
		}
	})
	x.o.used = true
	x.o.control("control: after the stop")
	if !has("close") {
		x.o.skip("closed before start", "viasocks has no close yet")
		return
	}
	if out, err := x.w.command("close", "--config", configFile); err != nil {
		x.w.t.Errorf("close: %v\n%s", err, out)
	}
	x.o.rec.take()
	x.o.closedFor("closed before start", 2, 1200*time.Millisecond, nil)
	x.o.closed("starting, from closed", x.up)
	x.est.carry(x.w)
	x.o.closed("running again", nil)
}

// configFile is what viasocks reads, and reads again.
const configFile = "/run/viasocks-test.conf"

func (w *world) configure(lines string) {
	w.t.Helper()
	if err := os.WriteFile(configFile, []byte(lines+"\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// TestLeakStrict: with --strict neither raw frames nor the private network get out.
func TestLeakStrict(t *testing.T) {
	if !apart(t) {
		return
	}
	o, _, _ := newLeak(t)
	w := o.w
	if !has("up", "--strict") {
		o.skip("everything", "viasocks up has no --strict yet")
		t.Skip("viasocks up has no --strict yet")
	}
	d := w.up("--proxy", proxyURL, "--strict")
	if why := w.notClosed(); why != "" {
		t.Skip(why)
	}
	o.strict, o.noLAN = true, true
	o.rec.take()
	o.closedFor("strict: running", 2, 1200*time.Millisecond, nil)
	o.closed("strict: nft flushed", func() { w.run("host", nil, "nft", "flush", "ruleset") })
	o.closed("strict: TUN deleted", func() { w.ip("host", "link del "+tunName) })
	d.kill()
	o.closed("strict: killed", nil)
	o.closed("strict: restart", func() { d = w.up("--proxy", proxyURL, "--strict") })
}

const (
	tunName  = "viasocks0"
	tableID  = "30323"
	closedID = "30324" // the table behind it
)

var ourRule = regexp.MustCompile(`(?m)^(\d+):.* proto (118|viasocks)`)

// ipRules are the ip rules of both families.
func (w *world) ipRules() string {
	w.t.Helper()
	return w.ip("host", "-d rule") + "# IPv6\n" + w.ip("host", "-6 -d rule")
}

func (w *world) tableT() string {
	w.t.Helper()
	return w.ip("host", "-4 route show table "+tableID) + w.ip("host", "-6 route show table "+tableID)
}

// deleteRules is somebody who deletes our ip rules, each by its number.
func (w *world) deleteRules() {
	w.t.Helper()
	n := 0
	for _, family := range []string{"-4", "-6"} {
		for _, m := range ourRule.FindAllStringSubmatch(w.ip("host", family+" -d rule"), -1) {
			if _, err := try("", nil, "ip", "-n", "host", family, "rule", "del", "pref", m[1]); err == nil {
				n++
			}
		}
	}
	if n < 4 {
		w.t.Errorf("only %d rules of ours were there to be deleted", n)
	}
}

func (w *world) flushTable() {
	w.t.Helper()
	w.ip("host", "-4 route flush table "+tableID+"\n-6 route flush table "+tableID)
}

// deleteTables is somebody who deletes our nft tables. A table with an owner can't be, and that is as well.
func (w *world) deleteTables() {
	w.t.Helper()
	for line := range strings.Lines(w.run("host", nil, "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) >= 3 && strings.Contains(f[2], "viasocks") {
			if _, err := try("host", nil, "nft", "delete", "table", f[1], f[2]); err != nil {
				w.t.Logf("delete table: %v", err)
			}
		}
	}
}

// corruptJournal rewrites every file of the journal; nil removes it.
func (w *world) corruptJournal(f func([]byte) []byte) {
	w.t.Helper()
	n := 0
	err := filepath.WalkDir("/run/viasocks", func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil || len(b) == 0 {
			return err
		}
		n++
		if b = f(b); b == nil {
			return os.Remove(path)
		}
		return os.WriteFile(path, b, 0o600)
	})
	if err != nil {
		w.t.Errorf("cannot corrupt the journal: %v", err)
	}
	if n == 0 {
		w.t.Error("there is no journal in /run/viasocks")
	}
}

func (w *world) eventually(limit time.Duration, what string, ok func() bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	crashed, well := "", false
	testkit.Until(limit, func() bool {
		if well = ok(); !well {
			crashed = w.crashed()
		}
		return well || crashed != ""
	})
	if !well {
		w.t.Errorf("not within %v: %s", min(limit, time.Since(start)), what)
		if crashed != "" {
			w.t.Error(crashed)
		}
		return limit
	}
	if d := time.Since(start); d > time.Millisecond {
		w.t.Logf("%s: after %v", what, d.Round(time.Millisecond))
	}
	return time.Since(start)
}
