package hosttest

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/handover"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/testkit"
)

// instants are how many takeovers are disturbed.
const instants = 20

// instant returns how long after its start the takeover with number i is disturbed, of which the first are the closest: from
// 5 to 280 ms, or on a busy machine to half as long again as took. A takeover needs 40 ms on an idle machine.
func instant(i int, took time.Duration) time.Duration {
	const last = (instants - 1) * (instants + 9)
	return 5*time.Millisecond + max(275*time.Millisecond, took*3/2)*time.Duration(i*(i+10))/last
}

// takeoverTime is how long an undisturbed takeover takes.
func (w *world) takeoverTime(flags ...string) time.Duration {
	w.t.Helper()
	first := w.up(flags...)
	second := w.takeOver(first, flags...)
	for _, d := range []*daemon{second, first} {
		if err := d.stop(); err != nil {
			w.t.Error(err)
		}
	}
	w.t.Logf("a takeover takes %v", second.startedIn)
	return second.startedIn
}

// TestTakeoverKilled: whichever of the two processes is killed at whatever instant, nothing leaves the host unproxied, the
// other one says truly whether the host is closed, and `down` restores it.
func TestTakeoverKilled(t *testing.T) {
	t.Parallel()
	for _, victim := range []string{"old", "new"} {
		t.Run(victim, func(t *testing.T) {
			if apart(t) {
				testTakeoverKilled(t, victim)
			}
		})
	}
}

func testTakeoverKilled(t *testing.T, victim string) {
	w := newWorld(t)
	w.farEnds()
	rec := newRecorder(w)
	rec.known(w.proxy(proxy4 + ":1080"))
	rules := w.ipRules()
	flags := []string{"--proxy", "socks5://" + proxy4}
	outcomes := map[string]int{}
	took := w.takeoverTime(flags...)
	for i := range instants {
		first := w.up(flags...)
		held := w.hold(5)
		rec.take()
		second := w.launch(append(flags, "--takeover")...)
		testkit.Pace(instant(i, took))
		killed, other := first, second
		if victim == "new" {
			killed, other = second, first
		}
		killed.kill()
		outcomes[victim+" killed: "+w.afterKill(other)]++
		for _, c := range held.conns {
			_, _ = c.Write([]byte("this wants to leave"))
			c.Close()
		}
		for _, s := range rec.take() {
			t.Errorf("%s killed after %v: this left the host: %+v", victim, instant(i, took), s)
		}
		if out, err := w.command("down"); err != nil {
			t.Errorf("down: %v\n%s", err, out)
		}
		first.kill()
		second.kill()
		w.cleared(rules)
	}
	t.Logf("%v", outcomes)
}

// afterKill waits until d is up or has ended, and checks that what it says of the host is true.
func (w *world) afterKill(d *daemon) (outcome string) {
	w.t.Helper()
	says := func(what string) bool { return strings.Contains(d.log.String(), what) }
	ended := false
	w.eventually(testkit.Patience, "the one that is left to carry or to end", func() bool {
		ended = !d.alive()
		// An old one that was asked for the host needs a moment to notice that nobody takes it.
		keeps := !says("/v1/takeover") || says("the host was not taken over") || says("the process that asked has ended")
		return ended || keeps && w.carried()
	})
	if !ended {
		return "the other one is up"
	}
	if w.carried() {
		w.t.Errorf("it has ended, and the host is carried:\n%s", d.log)
	}
	if !says("stays closed") && !says("nothing was changed") && !says("cannot take over") && !says("cannot ask viasocks") {
		w.t.Errorf("it does not say how the host is:\n%s", d.log)
	}
	return "the host is closed"
}

// carried reports whether a new connection comes through.
func (w *world) carried() bool {
	var c net.Conn
	err := in("host", func() (err error) {
		c, err = net.DialTimeout("tcp", "203.0.113.5:77", time.Second) // a closed host may be silent
		return err
	})
	if err != nil {
		return false
	}
	defer c.Close()
	return ping(c) == nil
}

// TestTakeoverDown: `viasocks down` at any instant of a takeover ends both processes and restores the host.
func TestTakeoverDown(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	rules := w.ipRules()
	flags := []string{"--proxy", "socks5://" + proxy4}
	took := w.takeoverTime(flags...)
	for i := range instants {
		first := w.up(flags...)
		held := w.hold(5)
		second := w.launch(append(flags, "--takeover")...)
		testkit.Pace(instant(i, took))
		if out, err := w.command("down"); err != nil {
			t.Errorf("after %v: down: %v\n%s", instant(i, took), err, out)
		}
		w.eventually(testkit.Patience, "both to end", func() bool { return !first.alive() && !second.alive() })
		for _, c := range held.conns {
			c.Close()
		}
		w.cleared(rules)
	}
}

// TestTakeoverTwice: while one viasocks takes the host over, another one is refused at once, and disturbs nothing.
func TestTakeoverTwice(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	flags := []string{"--proxy", "socks5://" + proxy4}
	first := w.up(flags...)
	held := w.hold(20)
	held.use()
	var c *net.UnixConn
	w.in("host", func() error {
		path, err := control.Path(kernel.DefaultDir)
		if err == nil {
			c, err = control.TakeOver(path)
		}
		return err
	})
	slow, err := handover.Take(c)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	for _, command := range [][]string{append([]string{"up", "--takeover"}, flags...), {"upgrade"}} {
		out, err := w.command(command...)
		if want := fmt.Sprintf("another takeover is under way: process %d takes the host over", syscall.Getpid()); err == nil ||
			!strings.Contains(out, want) {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("they were refused after %v", took)
	}
	slow.Files.Close()
	slow.End()
	w.eventually(testkit.Patience, "the offer to be withdrawn", func() bool {
		return strings.Contains(first.log.String(), "the new viasocks did not take the host")
	})
	second := w.takeOver(first, flags...)
	held.unuse()
	if err := second.stop(); err != nil {
		t.Error(err)
	}
}

// TestUpAfterKill: `up` right after kill -9 of a viasocks with --fail-open waits for the guardian, which undoes what was left.
func TestUpAfterKill(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.farEnds()
	w.proxy(proxy4 + ":1080")
	rules := w.ipRules()
	flags := []string{"--proxy", "socks5://" + proxy4, "--fail-open"}
	d := w.up(flags...)
	for _, after := range []time.Duration{0, 0, 5, 10, 20, 30, 50, 80} {
		d.kill()
		testkit.Pace(after * time.Millisecond)
		d = w.up(flags...)
		if !w.carried() {
			t.Error("it is up, and does not carry")
		}
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	w.cleared(rules)
}
