package hosttest

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A tear is what a container with CAP_NET_ADMIN does to its own network, again and again, while viasocks carries it.
type tear struct {
	name string
	do   func(*world) (done bool) // one round; done: something was removed
	kept bool                     // the kernel keeps it from being removed
	long bool                     // until attach waits before it tries again
	says string                   // in the log
}

// tears delete what steers the namespace, each by itself and all in turn.
var tears = []tear{
	{name: "the TUN is deleted", do: delTUN, long: true, says: "the data plane ended"},
	{name: "the TUN is set down", do: downTUN, says: "another program changed the TUN device"},
	{name: "the routes are deleted", do: delRoutes, says: "rules and routes were changed by another program"},
	{name: "the rules are deleted", do: delRules, says: "rules and routes were changed by another program"},
	{name: "the filter is deleted", do: delFilter, kept: true},
	{name: "all of this in turn", do: delAll, long: true, says: "the data plane ended"},
}

func delTUN(*world) bool {
	_, err := try("", nil, "ip", "-n", "ctr", "link", "del", tunName)
	return err == nil
}

func downTUN(*world) bool {
	_, err := try("", nil, "ip", "-n", "ctr", "link", "set", tunName, "down")
	return err == nil
}

func delRoutes(w *world) (done bool) {
	for _, table := range ourTable.FindAllStringSubmatch(w.ip("ctr", "-4 rule"), 1) {
		for _, family := range []string{"-4", "-6"} {
			_, err := try("", nil, "ip", "-n", "ctr", family, "route", "flush", "table", table[1])
			done = done || err == nil
		}
	}
	return done
}

var (
	ourTable = regexp.MustCompile(`lookup (\d+)`)
	ruleNo   = regexp.MustCompile(`(?m)^(\d+):`)
)

// delRules leaves the rules of the kernel, which are nobody's.
func delRules(w *world) (done bool) {
	for _, family := range []string{"-4", "-6"} {
		for _, no := range ruleNo.FindAllStringSubmatch(w.ip("ctr", family+" rule"), -1) {
			if no[1] == "0" || no[1] == "32766" || no[1] == "32767" {
				continue
			}
			_, err := try("", nil, "ip", "-n", "ctr", family, "rule", "del", "pref", no[1])
			done = done || err == nil
		}
	}
	return done
}

// delFilter reports whether one of the tables is gone.
func delFilter(w *world) bool {
	tables := w.run("ctr", nil, "nft", "list", "tables")
	for table := range strings.Lines(tables) {
		if f := strings.Fields(table); len(f) == 3 {
			_, _ = try("ctr", nil, "nft", "delete", "table", f[1], f[2])
		}
	}
	_, _ = try("ctr", nil, "nft", "flush", "ruleset")
	return w.run("ctr", nil, "nft", "list", "tables") != tables
}

func delAll(w *world) (done bool) {
	for _, do := range []func(*world) bool{delRules, delRoutes, delTUN} {
		done = do(w) || done
	}
	return done
}

// TestAttachTorn: a container that removes what steers its network, as fast as it can and for as long as it wants, lets
// nothing out, not even when viasocks can no longer make the TUN. viasocks says what was removed, restores it when the container
// lets it, and in the end everything is as it was.
func TestAttachTorn(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, _ := container(t)
	before, hostBefore := w.stateOf("ctr"), w.state()
	stop := w.shoot()
	w.eventually(20*time.Second, "control: the recorder sees what the container sends", func() bool { return rec.take() != nil })
	stop()
	for _, x := range tears {
		t.Run(x.name, func(t *testing.T) { x.test(t, w, rec) })
		w.restored(x.name+", detached", "ctr", before)
		w.equal(x.name+": the host", hostBefore, w.state())
		if err := w.outgoing("203.0.113.7"); err != nil {
			t.Errorf("%s, detached: %v", x.name, err)
		}
	}
}

// How long a container tears at its network, and at the most until attach waits.
const (
	tearing     = 3 * time.Second
	tearingMost = 20 * time.Second
)

func (x tear) test(t *testing.T, w *world, rec *recorder) {
	d := w.attach("--netns", "ctr")
	d.ready()
	rec.take()
	var stops []func()
	for range 4 {
		stops = append(stops, w.shoot())
	}
	rounds, removed := 0, 0
	waits := func() bool { return !x.long || strings.Contains(d.log.String(), "nothing is carried: trying again") }
	for begin := time.Now(); time.Since(begin) < tearing || !waits() && time.Since(begin) < tearingMost; rounds++ {
		if x.do(w) {
			removed++
		}
	}
	t.Logf("%d rounds, %d of them removed something", rounds, removed)
	if x.kept != (removed == 0) {
		t.Errorf("%d of %d rounds removed something", removed, rounds)
	}
	if delFilter(w) {
		t.Error("the filter is gone")
	}
	if !waits() {
		t.Log("the TUN was always made again")
	}
	if !d.alive() {
		t.Fatal("it has ended")
	}
	for _, stop := range stops {
		stop()
	}
	w.eventually(2*time.Minute, "what the container sends is carried again", func() bool {
		return w.outgoingWithin("203.0.113.7", time.Second) == nil
	})
	if !strings.Contains(d.log.String(), x.says) {
		t.Errorf("it does not say %q", x.says)
	}
	for i, s := range rec.take() {
		if t.Errorf("this left the host: %+v", s); i == 10 {
			break
		}
	}
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}
