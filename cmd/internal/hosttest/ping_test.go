package hosttest

import (
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// pinged are destinations of ping in one family.
type pinged struct {
	there       string
	unreachable string // the proxy says so
	mute        string // the proxy says nothing
	lan         string // on the host's own network
	words       string // what ping says of an unreachable one
}

var pingedBoth = []pinged{
	{"203.0.113.7", "203.0.113.9", "203.0.113.10", lanRouter4, "Destination Host Unreachable"},
	{"2001:db8:f::7", "2001:db8:f::9", "2001:db8:f::a", lanRouter6, "Address unreachable"},
}

// pingPort is where `up` connects to for a ping.
const pingPort = 77

// pingWorld is a world with a proxy that does not reach all of it.
func pingWorld(t *testing.T) (*world, *recorder, *sockstest.Server) {
	t.Helper()
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip(err)
	}
	w := newWorld(t)
	serve(w.listen("world", ":77"), echo)
	if err := setProxyName(proxy4); err != nil {
		t.Fatal(err)
	}
	rec := newRecorder(w)
	proxy := w.proxy(proxy4 + ":1080")
	rec.known(proxy)
	proxy.SetFault(func(r sockstest.Request) sockstest.Fault {
		for _, p := range pingedBoth {
			switch r.Dst.IP.String() {
			case p.unreachable:
				return sockstest.Reply(4)
			case p.mute:
				return sockstest.Silence()
			}
		}
		return sockstest.Fault{}
	})
	return w, rec, proxy
}

// pings runs ping on the host, and checks how many answers it gets and what else it says.
func (w *world) pings(when, to, received, says string) {
	w.t.Helper()
	wait := "20"
	if received == "0" && says == "" {
		wait = "1"
	}
	out, _ := try("host", nil, "env", "LC_ALL=C", "ping", "-n", "-c", "2", "-i", "0.2", "-W", wait, to)
	if !strings.Contains(out, ", "+received+" received") || !strings.Contains(out, says) || strings.Contains(out, "DUP") ||
		says == "" && strings.Contains(out, "nreachable") {
		w.t.Errorf("%s: ping %s should have %s answers and say %q:\n%s", when, to, received, says, out)
	}
}

// nothingLeft checks that nothing left the host that should not.
func nothingLeft(t *testing.T, rec *recorder, when string) {
	t.Helper()
	for _, s := range rec.take() {
		t.Errorf("%s: this left the host: %v", when, s.what)
	}
}

// TestPingUp: under `up --ping`, ping gets an answer after a TCP connect through the proxy, none where the proxy reaches nothing,
// and its own packets stay on the host, also when viasocks was killed. Those to the host's own networks leave as always.
func TestPingUp(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, proxy := pingWorld(t)
	before := w.state()
	for _, p := range pingedBoth {
		w.pings("control", p.there, "2", "")
	}
	if rec.take() == nil {
		t.Fatal("control: the recorder does not see ping")
	}
	d := w.up("--proxy", proxyURL, "--ping", "77")
	rec.take()
	for _, p := range pingedBoth {
		w.pings("up", p.there, "2", "")
		w.asked(proxy, p.there)
		w.pings("up", p.unreachable, "0", p.words)
		w.asked(proxy, p.unreachable)
		w.pings("up", p.mute, "0", "")
		w.asked(proxy, p.mute)
	}
	nothingLeft(t, rec, "up")
	w.pingsLAN(rec, "up")
	d.kill()
	for _, p := range pingedBoth {
		out, _ := try("host", nil, "ping", "-n", "-c", "1", "-W", "1", p.there)
		if strings.Contains(out, ", 1 received") {
			t.Errorf("killed: ping %s gets an answer:\n%s", p.there, out)
		}
	}
	nothingLeft(t, rec, "killed")
	w.pingsLAN(rec, "killed")

	d = w.up("--proxy", proxyURL) // takes over, without --ping
	n := len(proxy.Requests())
	for _, p := range pingedBoth {
		w.pings("without --ping", p.there, "0", "")
	}
	if got := proxy.Requests()[n:]; len(got) > 0 {
		t.Errorf("without --ping, the proxy was asked for %v", got)
	}
	nothingLeft(t, rec, "without --ping")
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	w.same("after the stop", before, w.state())
	for _, p := range pingedBoth {
		w.pings("after the stop", p.there, "2", "")
	}
}

// asked checks that the proxy's last request is for the port at an address.
func (w *world) asked(proxy *sockstest.Server, at string) {
	w.t.Helper()
	all := proxy.Requests()
	if len(all) == 0 {
		w.t.Errorf("ping %s: the proxy was not asked", at)
	} else if last := all[len(all)-1].Dst; last.IP.String() != at || last.Port != pingPort {
		w.t.Errorf("ping %s: the proxy was asked for %v", at, last)
	}
}

// pingsLAN checks that echo requests to the host's own networks, and nothing else, leave it.
func (w *world) pingsLAN(rec *recorder, when string) {
	w.t.Helper()
	for _, p := range pingedBoth {
		w.pings(when, p.lan, "2", "")
		seen := rec.take()
		if len(seen) != 2 {
			w.t.Errorf("%s: ping %s: %d frames left the host, not 2", when, p.lan, len(seen))
		}
		for _, s := range seen {
			echo := s.what.proto == unix.IPPROTO_ICMP && s.what.icmp == 8 ||
				s.what.proto == unix.IPPROTO_ICMPV6 && s.what.icmp == 128
			if !echo || s.what.dst.String() != p.lan {
				w.t.Errorf("%s: ping %s: this left the host: %v", when, p.lan, s.what)
			}
		}
	}
}
