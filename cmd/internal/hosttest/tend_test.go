package hosttest

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// tunChanges are what others may do to the TUN.
var tunChanges = []struct{ name, ip string }{
	{"deleted", "link del " + tunName},
	{"down", "link set " + tunName + " down"},
	{"renamed", "link set " + tunName + " down\nlink set " + tunName + " name other0"},
	{"renamed and up again", "link set " + tunName + " down\nlink set " + tunName + " name other0\nlink set other0 up"},
	{"without addresses", "addr flush dev " + tunName},
	{"with another MTU", "link set " + tunName + " mtu 1400"},
	{"moved to another namespace", "link set " + tunName + " netns ctr"},
}

// meanwhile runs lines of ip(8) in the host namespace while the daemon is stopped, so that it can't put right the first of them
// before the next.
func (d *daemon) meanwhile(w *world, batch string) {
	w.t.Helper()
	d.signal(syscall.SIGSTOP)
	defer d.signal(syscall.SIGCONT)
	w.ip("host", batch)
}

// carries waits until connections of both families are carried.
func (w *world) carries(when string) {
	w.t.Helper()
	for _, to := range []string{"203.0.113.7", "2001:db8:f::7"} {
		w.eventually(20*time.Second, when+": "+to+" is reached", func() bool {
			c, err := w.dial("host", netipAddrPort(to, 77))
			if err != nil {
				return false
			}
			defer c.Close()
			return exchange(c, 100) == nil
		})
	}
}

// TestTUNChanged: up puts the TUN right when others change it, with what it carries, and leaves nothing of it anywhere.
func TestTUNChanged(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t)
	w.carries("at first")
	before := w.ip("host", "-d addr show dev "+tunName)
	mtu := func() bool { return strings.Contains(w.ip("host", "link show dev "+tunName), " mtu 1500 ") }
	for _, c := range tunChanges {
		kept := w.mustDial("203.0.113.7", 77)
		if err := exchange(kept, 1000); err != nil {
			t.Fatal(err)
		}
		d.meanwhile(w, c.ip)
		if c.name == "deleted" || c.name == "moved to another namespace" {
			kept.Close() // another data plane knows nothing of it
		} else if err := exchange(kept, 1000); err != nil {
			t.Errorf("%s: a connection that was open: %v", c.name, err)
		}
		w.carries(c.name)
		w.eventually(20*time.Second, c.name+": the MTU and the state are as they were", func() bool {
			return mtu() && ask[control.Status](w, "status").State == control.Ready
		})
		if !d.alive() {
			t.Fatal("viasocks ended")
		}
	}
	after := w.ip("host", "-d addr show dev "+tunName)
	for _, want := range []string{"numqueues 16", "inet 198.18.0.1/32", "inet6 fd76:6961:736f:636b::1/128"} {
		if !strings.Contains(after, want) {
			t.Errorf("no %q:\n%s\nat first:\n%s", want, after, before)
		}
	}
	w.eventually(
		20*time.Second,
		"the TUN that was moved is gone",
		func() bool { return !strings.Contains(w.ip("ctr", "link show"), tunName) },
	)
}

// TestTUNNameTaken: what can't be put right is told by status for as long as it lasts, and tried again.
func TestTUNNameTaken(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t)
	d.meanwhile(w, "link set "+tunName+" down\nlink set "+tunName+" name other0\nlink add "+tunName+" type bridge")
	var s control.Status
	w.eventually(20*time.Second, "status tells of it", func() bool {
		s = ask[control.Status](w, "status")
		return s.State == control.Impaired
	})
	if len(s.Warnings) == 0 || !strings.Contains(s.Warnings[0], "has the name other0") ||
		!strings.Contains(s.Warnings[0], "until it is restored") {
		t.Errorf("warnings: %q", s.Warnings)
	}
	w.errorsAtOnce("without its TUN")
	w.ip("host", "link del "+tunName)
	w.carries("the name is free again")
	if s := ask[control.Status](w, "status"); s.State != control.Ready ||
		strings.Contains(strings.Join(s.Warnings, "\n"), "is restored") {
		t.Errorf("%s, %q", s.State, s.Warnings)
	}
}

// TestTUNChangedAgainAndAgain: who sets the TUN down all the time is not fought in a tight loop.
func TestTUNChangedAgainAndAgain(t *testing.T) {
	if !apart(t) {
		return
	}
	w, d := closedUp(t)
	impaired := false
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		w.ip("host", "link set "+tunName+" down")
		impaired = impaired || ask[control.Status](w, "status").State == control.Impaired
	}
	if !impaired {
		t.Error("status never said so")
	}
	// At 0, 0.25, 0.75, 1.75 and 3.75 s.
	tries := strings.Count(
		d.log.String(),
		"device: it is restored",
	) + strings.Count(
		d.log.String(),
		"cannot restore the TUN device",
	)
	if tries < 2 || tries > 6 {
		t.Errorf("tried %d times", tries)
	}
	w.carries("when it has ended")
}
