package hosttest

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
)

// heldConns is how many connections are open while the host changes hands.
const heldConns = 500

// heldFlows are connections that are in use all the time, and UDP sockets whose association must stay the same.
type heldFlows struct {
	w     *world
	conns []net.Conn
	socks []*net.UDPConn
	seen  []string // from where the far end sees each socket
	stop  chan struct{}
	ran   sync.WaitGroup
	trips atomic.Int64
	lost  atomic.Int64
	mu    sync.Mutex
	why   error
}

func (w *world) hold(n int) *heldFlows {
	w.t.Helper()
	h := &heldFlows{w: w, stop: make(chan struct{})}
	for i := range n {
		c, err := w.dial("host", netipAddrPort(fmt.Sprintf("203.0.113.%d", 1+i%200), 77))
		if err == nil {
			err = ping(c)
		}
		if err != nil {
			w.t.Fatalf("connection %d: %v", i, err)
		}
		w.t.Cleanup(func() { c.Close() })
		h.conns = append(h.conns, c)
	}
	for range 5 {
		s := w.packets("host", "0.0.0.0:0")
		h.socks = append(h.socks, s)
		h.seen = append(h.seen, w.seenFrom(s, "before"))
	}
	return h
}

// seenFrom asks the far end from where it sees the socket.
func (w *world) seenFrom(s *net.UDPConn, when string) (seen string) {
	w.t.Helper()
	b := make([]byte, 100)
	w.eventually(20*time.Second, when+": UDP is answered", func() bool {
		_, _ = s.WriteToUDPAddrPort([]byte("who am I"), netipAddrPort("203.0.113.9", 79))
		_ = s.SetReadDeadline(time.Now().Add(time.Second))
		n, _, err := s.ReadFrom(b)
		seen = string(b[:n])
		return err == nil
	})
	return seen
}

// use sends on all connections until unuse is called, with ten goroutines.
func (h *heldFlows) use() {
	const users = 10
	for u := range users {
		h.ran.Go(func() {
			for i := u; ; i += users {
				select {
				case <-h.stop:
					return
				default:
				}
				if err := ping(h.conns[i%len(h.conns)]); err != nil {
					h.lost.Add(1)
					h.mu.Lock()
					h.why = fmt.Errorf("connection %d: %w", i%len(h.conns), err)
					h.mu.Unlock()
					return
				}
				h.trips.Add(1)
			}
		})
	}
}

// unuse ends use and checks every connection and socket.
func (h *heldFlows) unuse() {
	h.w.t.Helper()
	close(h.stop)
	h.ran.Wait()
	lost := int(h.lost.Load())
	for i, c := range h.conns {
		if err := ping(c); err != nil {
			lost++
			h.why = fmt.Errorf("connection %d: %w", i, err)
		}
	}
	if lost > 0 {
		h.w.t.Errorf("%d of %d connections were lost: %v", lost, len(h.conns), h.why)
	}
	for i, s := range h.socks {
		if now := h.w.seenFrom(s, "afterwards"); now != h.seen[i] {
			h.w.t.Errorf("socket %d was seen from %s and is seen from %s", i, h.seen[i], now)
		}
	}
}

// farEnds starts what answers in the world: TCP echoes, and UDP tells from where it was asked.
func (w *world) farEnds() {
	w.t.Helper()
	serve(w.listen("world", ":77"), echo)
	w.farUDP()
}

func (w *world) farUDP() {
	w.t.Helper()
	answers := w.packets("world", "203.0.113.9:79")
	go func() {
		b := make([]byte, 2048)
		for _, from, err := answers.ReadFrom(b); err == nil; _, from, err = answers.ReadFrom(b) {
			_, _ = answers.WriteTo([]byte(from.String()), from)
		}
	}()
}

// takeOver starts a second viasocks that takes over from d, and waits until d carries only what it had.
func (w *world) takeOver(d *daemon, flags ...string) *daemon {
	w.t.Helper()
	next := w.up(append([]string{"--takeover"}, flags...)...)
	w.eventually(readyWithin, "the first viasocks to let go", func() bool {
		return strings.Contains(d.log.String(), "handed the host over")
	})
	return next
}

// TestTakeover: a second viasocks takes the host over under load. No connection is lost, no frame leaks, UDP sockets keep
// their address, new flows belong to the new process, and nothing is left in the end.
func TestTakeover(t *testing.T) {
	if !apart(t) {
		return
	}
	o, est, _ := newLeak(t)
	w := o.w
	w.farUDP()
	w.configure("proxy socks5://" + proxy4)
	before := w.ipRules()
	var first *daemon
	o.starting("starting", func() { first = w.up("--config", configFile) })
	est.carry(w)
	held := w.hold(heldConns)
	held.use()
	var second *daemon
	o.closed("takeover", func() { second = w.takeOver(first, "--config", configFile) })
	s := ask[control.Status](w, "status")
	if s.PID != second.cmd.Process.Pid || s.State != control.Ready || s.Before < heldConns {
		t.Errorf("the status is %+v", s)
	}
	if !first.alive() {
		t.Fatal("the first viasocks has ended")
	}
	held.unuse()
	t.Logf("%d round trips of %d connections, none lost, log: %s", held.trips.Load(), heldConns,
		lineOf(first.log.String(), "handed the host over"))
	c, err := w.dial("host", netipAddrPort("203.0.113.201", 77))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := ping(c); err != nil {
		t.Error(err)
	}
	if out, err := w.command("flows", "--json"); err != nil || !strings.Contains(out, "203.0.113.201") {
		t.Errorf("the new flow is not the new process's: %v\n%s", err, out)
	}
	o.closed("the first ends", func() {
		if err := first.stop(); err != nil {
			t.Errorf("the first ended with %v", err)
		}
	})
	w.eventually(time.Minute, "the status to forget it", func() bool { return ask[control.Status](w, "status").Before == 0 })
	if err := ping(c); err != nil {
		t.Errorf("after the end of the first: %v", err)
	}
	if err := second.stop(); err != nil {
		t.Error(err)
	}
	w.cleared(before)
}

// cleared checks that nothing of viasocks is left on the host.
func (w *world) cleared(rules string) {
	w.t.Helper()
	if after := w.ipRules(); after != rules {
		w.t.Errorf("the ip rules were\n%s\nand are\n%s", rules, after)
	}
	if out := w.run("host", nil, "nft", "list", "tables"); strings.Contains(out, "viasocks") {
		w.t.Errorf("tables are left:\n%s", out)
	}
	if out := w.run("host", nil, "ip", "link"); strings.Contains(out, tunName) {
		w.t.Errorf("the TUN is left:\n%s", out)
	}
}

func lineOf(log, what string) string {
	for line := range strings.Lines(log) {
		if strings.Contains(line, what) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// TestTakeoverFails: a new viasocks that cannot take over changes nothing, and the old one carries on. If the new one is
// killed afterwards, the old one ends, and the host is closed.
func TestTakeoverFails(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	rules := w.ipRules()
	flags := []string{"--proxy", "socks5://" + proxy4}
	first := w.up(flags...)
	held := w.hold(20)
	held.use()
	installed := w.installed()
	for what, flags := range map[string][]string{
		"another mark": {"--proxy", "socks5://" + proxy4, "--mark", "0x12000000/0xff000000"},
		"fail-open":    {"--proxy", "socks5://" + proxy4, "--fail-open"},
	} {
		out, err := w.command(append([]string{"up", "--takeover"}, flags...)...)
		if err == nil || !strings.Contains(out, "must be the same") {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
	if s := ask[control.Status](w, "status"); s.PID != first.cmd.Process.Pid || s.State != control.Ready {
		t.Errorf("the status is %+v", s)
	}
	if after := w.installed(); fmt.Sprint(after) != fmt.Sprint(installed) {
		t.Errorf("the host was %v and is %v", installed, after)
	}
	second := w.takeOver(first, flags...)
	third := w.takeOver(second, flags...) // from one that has just taken over itself
	held.unuse()
	c, err := w.dial("host", netipAddrPort("203.0.113.5", 77))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	third.kill()
	w.eventually(time.Minute, "the second to notice", func() bool { return !second.alive() })
	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	w.cleared(rules)
}

// TestTakeoverEnds: the old process ends with its last flow, or when --takeover-limit is over; what is left then is
// reset.
func TestTakeoverEnds(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	flags := []string{"--proxy", "socks5://" + proxy4}
	first := w.up(flags...)
	held := w.hold(5)
	second := w.takeOver(first, append(flags, "--takeover-limit", "1s")...)
	if err := first.wait(); err != nil {
		t.Errorf("the first ended with %v", err)
	}
	for _, c := range held.conns {
		if err := ping(c); err == nil {
			t.Error("a connection is still open")
		}
	}
	c, err := w.dial("host", netip.AddrPortFrom(addr("203.0.113.5"), 77))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	third := w.takeOver(second, flags...)
	if err := ping(c); err != nil {
		t.Error(err)
	}
	for _, s := range held.socks {
		s.Close()
	}
	c.Close()
	if err := second.wait(); err != nil { // some ten seconds after the sockets
		t.Errorf("the second ended with %v", err)
	}
	// To systemd, a service whose process has handed over has ended.
	out, err := try("host", nil, "env", "SERVICE_RESULT=signal", viasocks, "down", "--after-service", "--fail-open")
	if err != nil || !strings.Contains(out, "nothing is undone") || !third.alive() {
		t.Errorf("the end of the service has undone it: %v\n%s", err, out)
	}
	if err := third.stop(); err != nil {
		t.Error(err)
	}
	// Without a viasocks that is up, it is an ordinary start.
	alone := w.up(append(flags, "--takeover")...)
	if err := alone.stop(); err != nil {
		t.Error(err)
	}
}

// TestTakeoverStops: when the new viasocks stops and opens the host, the connections that the old one carries are reset
// first: their retransmissions would go to the real peers.
func TestTakeoverStops(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	rec := newRecorder(w)
	rec.known(w.proxy(proxy4 + ":1080"))
	flags := []string{"--proxy", "socks5://" + proxy4}
	rules := w.ipRules()
	first := w.up(flags...)
	held := w.hold(50)
	second := w.takeOver(first, flags...)
	held.use()
	rec.take()
	if err := second.stop(); err != nil {
		t.Error(err)
	}
	if err := first.wait(); err != nil {
		t.Errorf("the first ended with %v", err)
	}
	close(held.stop)
	held.ran.Wait()
	for i, c := range held.conns {
		if err := ping(c); err == nil {
			t.Errorf("connection %d is still open", i)
		}
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	w.cleared(rules)
}

// TestTakeoverKeepsNames: an address that stands for a name does so after a takeover, too, and no other name gets it.
func TestTakeoverKeepsNames(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.webServer()
	w.answerNames("router", lanRouter4+":53", addr("203.0.113.8"))
	meanings := map[string]netip.Addr{"one.example": addr("203.0.113.11"), "two.example": addr("203.0.113.12")}
	proxy, err := sockstest.Listen("tcp", proxy4+":1080", sockstest.WithNetns("/run/netns/proxy"),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			a, ok := meanings[name]
			if !ok {
				return a, fmt.Errorf("the proxy is asked for %s", name)
			}
			return a, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	fakeOf := func(name string) string {
		t.Helper()
		out, err := try("host", nil, "getent", "ahostsv4", name)
		word, _, _ := strings.Cut(out, " ")
		if err != nil || !strings.HasPrefix(word, "198.1") {
			t.Fatalf("%s is %q: %v", name, out, err)
		}
		return word
	}
	flags := []string{"--proxy", "socks5://" + proxy4, "--dns", "fake"}
	first := w.up(flags...)
	one := fakeOf("one.example")
	second := w.takeOver(first, flags...)
	if two := fakeOf("two.example"); two == one {
		t.Errorf("%s stands for two names", one)
	}
	out, err := try("host", nil, "curl", "-4", "-sS", "--max-time", "20", "http://"+one+"/")
	if err != nil || strings.TrimSpace(out) != "203.0.113.11" {
		t.Errorf("the address of one.example leads to %q: %v", out, err)
	}
	if err := second.stop(); err != nil {
		t.Error(err)
	}
}
