package daemon

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestShortageWarning(t *testing.T) {
	now := time.Now()
	s := route.Shortage{Times: 7, Last: now.Add(-3 * time.Second), Why: "cannot make a socket: too many open files"}
	if w := shortageWarning(s, now); !strings.Contains(w, "7 times") || !strings.Contains(w, "3s ago") ||
		!strings.Contains(w, s.Why) {
		t.Errorf("%q", w)
	}
	if w := shortageWarning(s, now.Add(shortageShown)); w != "" {
		t.Errorf("long over: %q", w)
	}
	if w := shortageWarning(route.Shortage{}, now); w != "" {
		t.Errorf("never: %q", w)
	}
}

// onKernel has the daemon run on a kernel of that release.
func onKernel(t *testing.T, release string) {
	old := kernelRelease
	kernelRelease = func() string { return release }
	t.Cleanup(func() { kernelRelease = old })
}

// TestStatusOfGSO: status says what is in force and why, at the start and after each reload.
func TestStatusOfGSO(t *testing.T) {
	testkit.CheckLeaks(t)
	onKernel(t, "7.1.4-arch1-1")
	u, write, _ := newUp(t, "proxy socks5://192.0.2.1\n")
	check := func(when, gso, why string) {
		t.Helper()
		if s := u.status().UDP; s.GSO != gso || !strings.Contains(s.GSOReason, why) {
			t.Errorf("%s: %q, %q", when, s.GSO, s.GSOReason)
		}
	}
	check("at the start", "off", "7.1.4-arch1-1 spoils")
	for _, c := range []struct{ file, gso, why string }{
		{"udp-gso on", "on", "as --udp-gso says"}, {"udp-gso auto", "off", "7.1.4-arch1-1 spoils"},
		{"udp-gso off", "off", "as --udp-gso says"}, {"", "off", "7.1.4-arch1-1 spoils"},
	} {
		write("proxy socks5://192.0.2.1\n" + c.file + "\n")
		u.reload()
		check("with "+c.file, c.gso, c.why)
	}
	onKernel(t, "6.18.44")
	u.reload()
	check("on another kernel", "on", "6.18.44 has no known fault")
}

// TestLogOfGSO: the log says it once when nobody chose it, and again when it changes.
func TestLogOfGSO(t *testing.T) {
	onKernel(t, "7.0.2-6-pve")
	var log strings.Builder
	p := &plane{log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelInfo}))}
	for i, c := range []struct {
		mode  relay.GSO
		lines int
	}{{relay.GSOAuto, 1}, {relay.GSOAuto, 1}, {relay.GSOOn, 1}, {relay.GSOOff, 1}, {relay.GSOAuto, 2}} {
		p.setGSO(c.mode)
		if n := strings.Count(log.String(), "7.0.2-6-pve spoils"); n != c.lines || strings.Count(log.String(), "\n") != n {
			t.Errorf("step %d: %d lines:\n%s", i, n, &log)
		}
	}
}
