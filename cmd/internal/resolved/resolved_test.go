package resolved

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

var testServers = []netip.Addr{netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("2001:db8::53")}

// startTeller runs a Teller for a device; stop ends it and waits.
func startTeller(t *testing.T, address string, index int) (teller *Teller, log *harness.Log, stop func()) {
	t.Helper()
	log = &harness.Log{}
	teller = New(address, testServers, slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); teller.Run(ctx) }()
	if index != 0 {
		teller.Use(index)
	}
	stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(testkit.Patience):
			t.Fatal("it does not end")
		}
	}
	t.Cleanup(stop)
	return teller, log, stop
}

// TestWant: the settings are undone when they are no longer wanted, and set again when they are.
func TestWant(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7)
	teller := New(address, testServers, slog.New(slog.DiscardHandler))
	teller.Want(false)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); teller.Run(ctx) }()
	defer func() { cancel(); <-done }()
	teller.Use(7)
	teller.Want(false)
	for range 3 {
		teller.Want(true)
		testkit.Eventually(t, "told", func() bool { return teller.Told() && f.link(7).right() })
		teller.Want(false)
		testkit.Eventually(t, "taken back", func() bool { return !teller.Told() && f.link(7).empty() })
	}
}

// right reports whether a device has what a Teller tells.
func (l fakeLink) right() bool {
	return equal(l.Servers, toServers(testServers)) && len(l.Domains) == 1 && l.Domains[0] == domain{".", true} &&
		l.Words["SetLinkDNSSEC"] == "no" && l.Words["SetLinkDNSOverTLS"] == "no" && l.Words["SetLinkDefaultRoute"] == "true" &&
		l.Words["SetLinkLLMNR"] == "no" && l.Words["SetLinkMulticastDNS"] == "no"
}

func (l fakeLink) empty() bool {
	return len(l.Servers) == 0 && len(l.Domains) == 0 && len(l.Words) == 0
}

func TestTellAndTakeBack(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7, 8)
	teller, log, stop := startTeller(t, address, 7)
	testkit.Eventually(t, "told", teller.Told)
	if l := f.link(7); !l.right() {
		t.Errorf("device 7: %+v", l)
	}
	f.with(func() {
		if f.flushes == 0 {
			t.Error("old answers stay in its cache")
		}
	})
	// The TUN was made anew.
	teller.Use(8)
	testkit.Eventually(t, "told of device 8", func() bool { return f.link(8).right() })
	before := 0
	f.with(func() { before = f.flushes })
	stop()
	if l := f.link(8); !l.empty() {
		t.Errorf("after the stop: %+v", l)
	}
	f.with(func() {
		if f.flushes == before {
			t.Error("answers of ours stay in its cache after the stop")
		}
	})
	if teller.Told() {
		t.Error("told after the stop")
	}
	if strings.Contains(log.String(), "level=WARN") {
		t.Error(log)
	}
}

// TestTellEndsWhileLooking: what was told is taken back also when the end comes while it is looked at again.
func TestTellEndsWhileLooking(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7)
	teller := New(address, testServers, slog.New(slog.DiscardHandler))
	teller.Use(7)
	b, err := dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	var was told
	if err := teller.look(t.Context(), b, &was); err != nil || !f.link(7).right() {
		t.Fatalf("not told: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := teller.look(ended, b, &was); err == nil {
		t.Error("a look after the end succeeds")
	}
	teller.takeBack(b, was)
	if l := f.link(7); !l.empty() {
		t.Errorf("after the end: %+v", l)
	}
}

// TestTellRestarted: systemd-resolved comes later, is restarted, and the bus is restarted.
func TestTellRestarted(t *testing.T) {
	address, stopBus := startBus(t)
	teller, log, _ := startTeller(t, address, 7)
	f := startFake(t, address, 7)
	testkit.Eventually(t, "told when it came", teller.Told)
	f.stop()
	testkit.Eventually(t, "not told when it went", func() bool { return !teller.Told() })
	f = startFake(t, address, 7)
	testkit.Eventually(t, "told after a restart", func() bool { return teller.Told() && f.link(7).right() })
	stopBus()
	testkit.Eventually(t, "not told without a bus", func() bool { return !teller.Told() })
	if strings.Contains(log.String(), "level=WARN") {
		t.Error(log)
	}
}

// TestTellChanged: somebody else changes what was told.
func TestTellChanged(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7)
	teller, log, _ := startTeller(t, address, 7)
	testkit.Eventually(t, "told", teller.Told)
	f.with(func() { f.links[7].Servers = nil })
	teller.Use(7) // or half a minute later
	testkit.Eventually(t, "told again", func() bool { return f.link(7).right() })
	if !strings.Contains(log.String(), "somebody changed") {
		t.Error(log)
	}
}

// TestTellLate: it does not know the device at first.
func TestTellLate(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7)
	f.with(func() { f.links = map[int32]*fakeLink{} })
	teller, log, _ := startTeller(t, address, 7)
	testkit.Eventually(t, "a try", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.calls) > 0 })
	f.with(func() { f.links[7] = &fakeLink{Words: map[string]string{}} })
	testkit.Eventually(t, "told", teller.Told)
	if strings.Contains(log.String(), "level=WARN") {
		t.Error(log)
	}
}

func TestTellRefused(t *testing.T) {
	address, _ := startBus(t)
	for _, c := range []struct{ method, err, want string }{
		{"SetLinkDNS", service + ".LinkBusy", "Unmanaged=yes"},
		{"SetLinkDNSSEC", "org.freedesktop.DBus.Error.AccessDenied", "SetLinkDNSSEC is refused"},
		{"SetLinkDNSOverTLS", "org.freedesktop.DBus.Error.UnknownMethod", ""}, // an old version
	} {
		f := startFake(t, address, 7)
		f.with(func() { f.refuse[c.method] = c.err })
		teller, log, stop := startTeller(t, address, 7)
		if c.want == "" {
			testkit.Eventually(t, "told", teller.Told)
		} else {
			tries := func() (n int) {
				f.mu.Lock()
				defer f.mu.Unlock()
				for _, m := range f.calls {
					if m == c.method {
						n++
					}
				}
				return n
			}
			testkit.Eventually(t, "a second try", func() bool { return tries() > 1 })
			if s := log.String(); strings.Count(s, "level=WARN") != 1 || !strings.Contains(s, c.want) {
				t.Errorf("%s: %s", c.err, s)
			}
			if teller.Told() {
				t.Errorf("%s: told", c.err)
			}
		}
		stop()
		if l := f.link(7); !l.empty() {
			t.Errorf("%s: after the stop: %+v", c.err, l)
		}
		f.stop()
	}
}

// TestTellHangs: a bus and a systemd-resolved that do not answer hold nobody up for long.
func TestTellHangs(t *testing.T) {
	address, _ := startBus(t)
	f := startFake(t, address, 7)
	release := make(chan struct{})
	defer close(release)
	f.with(func() { f.hang["RevertLink"] = release })
	teller, log, stop := startTeller(t, address, 7)
	testkit.Eventually(t, "told", teller.Told)
	start := time.Now()
	stop()
	if took := time.Since(start); took < callTimeout/2 || took > callTimeout+2*time.Second {
		t.Errorf("the stop took %v", took)
	}
	if !strings.Contains(log.String(), "cannot undo") {
		t.Error(log)
	}

	socket := filepath.Join(t.TempDir(), "mute")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start = time.Now()
	if Running(t.Context(), "unix:path="+socket) {
		t.Error("it runs")
	}
	if took := time.Since(start); took < dialTimeout/2 || took > dialTimeout+2*time.Second {
		t.Errorf("a mute bus took %v", took)
	}
	_, log, stop = startTeller(t, "unix:path="+socket, 7)
	testkit.Settle(50*time.Millisecond, "it waits for the bus")
	start = time.Now()
	stop()
	if took := time.Since(start); took > time.Second {
		t.Errorf("the stop beside a mute bus took %v", took)
	}
	if log.String() != "" {
		t.Error(log)
	}
}

func TestNoBus(t *testing.T) {
	address := "unix:path=" + filepath.Join(t.TempDir(), "none")
	teller, log, stop := startTeller(t, address, 7)
	if done, err := Revert(t.Context(), address, 7, testServers); done || err != nil || Running(t.Context(), address) {
		t.Errorf("%v, %v", done, err)
	}
	stop()
	if teller.Told() || log.String() != "" {
		t.Error(log)
	}
}

// TestRevert is `down` after a crash.
func TestRevert(t *testing.T) {
	address, _ := startBus(t)
	if done, err := Revert(t.Context(), address, 7, testServers); done || err != nil {
		t.Errorf("without systemd-resolved: %v, %v", done, err)
	}
	f := startFake(t, address, 7, 8)
	if !Running(t.Context(), address) {
		t.Error("it does not run")
	}
	f.with(func() {
		f.links[7].Servers, f.links[7].Domains = toServers(testServers), everything
		f.links[8].Servers, f.links[8].Domains = toServers(testServers[:1]), everything
	})
	for _, c := range []struct {
		index int
		want  bool
	}{{7, true}, {7, false}, {8, false}, {9, false}} { // 8 is somebody else's, 9 is not there
		if done, err := Revert(t.Context(), address, c.index, testServers); done != c.want || err != nil {
			t.Errorf("device %d: %v, %v", c.index, done, err)
		}
	}
	if !f.link(7).empty() || f.link(8).empty() {
		t.Errorf("%+v %+v", f.link(7), f.link(8))
	}
}

func TestSystemBus(t *testing.T) {
	for env, want := range map[string]string{
		"": defaultBus, "unix:path=/x": "unix:path=/x", "tcp:host=192.0.2.1,port=1": defaultBus,
		"unixexec:path=/bin/sh": defaultBus,
	} {
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", env)
		if got := SystemBus(); got != want {
			t.Errorf("%q: %q", env, got)
		}
	}
}
