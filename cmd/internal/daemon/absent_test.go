package daemon

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// closed is the address of a server that is no more.
func closed(t *testing.T) string {
	t.Helper()
	s := listen(t)
	s.Close()
	return s.Addr().String()
}

// told returns the warnings of status if each upstream is as now says.
func told(a *absent, cfg *config.Config, now control.Upstream) []string {
	s := control.Status{}
	for _, u := range cfg.Upstreams {
		now.Name = u.Name
		s.Upstreams = append(s.Upstreams, now)
	}
	a.fill(&s, cfg)
	return s.Warnings
}

// The upstream of --proxy must answer, or one of all if there is none. The log and the status name another one that does
// not, once and until it works.
func TestProbeWithoutOthers(t *testing.T) {
	testkit.CheckLeaks(t)
	open, silent, login := listen(t), listen(t), listen(t, sockstest.WithAuth("al", "geheim"))
	silent.SetFaultAt(sockstest.AtGreeting, func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
	dead, gone := closed(t), closed(t)
	for _, tt := range []struct {
		args    string
		fault   string // of the probe; empty: none
		warning string // of the status; empty: none
	}{
		{"--proxy socks5://OPEN --upstream b=socks5://OPEN", "", ""},
		{"--proxy socks5://OPEN --upstream b=socks5://DEAD", "", "upstream b did not answer when it was last checked: cannot reach the proxy DEAD"},
		{"--proxy socks5://OPEN --upstream b=socks5://SILENT", "", "upstream b did not answer when it was last checked: cannot use the proxy SILENT"},
		{"--proxy socks5://OPEN --upstream b=socks5://LOGIN", "cannot log in to the proxy LOGIN", ""},
		{"--proxy socks5://DEAD --upstream b=socks5://OPEN", "cannot reach the proxy DEAD", ""},
		{"--proxy socks5://OPEN --allow tcp:203.0.113.1:443 --upstream b=socks5://DEAD", "", "cannot reach the proxy DEAD"},
		{"--proxy socks5://DEAD --allow tcp:203.0.113.1:443 --upstream b=socks5://OPEN", "cannot reach the proxy DEAD", ""},
		{"--upstream a=socks5://DEAD --upstream b=socks5://OPEN --rule via:b", "", "upstream a did not answer when it was last checked: "},
		{"--upstream a=socks5://DEAD --upstream b=socks5://GONE --rule via:b", "cannot reach the proxy DEAD", ""},
	} {
		names := strings.NewReplacer("OPEN", open.Addr().String(), "SILENT", silent.Addr().String(),
			"LOGIN", login.Addr().String(), "DEAD", dead, "GONE", gone)
		var args []string
		for _, a := range strings.Fields(tt.args) {
			args = append(args, names.Replace(strings.ReplaceAll(a, "via:", "via ")))
		}
		cfg := parse(t, args...)
		var log strings.Builder
		dial := dialing{absent: newAbsent(slog.New(slog.NewTextHandler(&log, nil)))}
		for range 2 {
			err := probe(context.Background(), cfg, dial)
			if (err == nil) != (tt.fault == "") || err != nil && !strings.Contains(err.Error(), names.Replace(tt.fault)) {
				t.Errorf("%s: got %v, want %q", tt.args, err, tt.fault)
			}
		}
		lines := told(dial.absent, cfg, control.Upstream{})
		if got := strings.Join(lines, "\n"); len(lines) > 1 || (got == "") != (tt.warning == "") ||
			!strings.Contains(got, names.Replace(tt.warning)) {
			t.Errorf("%s: the warnings are %q, want %q", tt.args, lines, tt.warning)
		}
		if n := strings.Count(log.String(), "an upstream does not answer"); n != len(lines) {
			t.Errorf("%s: the log says it %d times, want %d", tt.args, n, len(lines))
		}
	}
}

// The warning goes when the upstream works, by a check or by a flow, and when it is another one.
func TestAbsentReturns(t *testing.T) {
	cfg := parse(t, "--proxy", "socks5://192.0.2.1", "--upstream", "b=socks5://192.0.2.2")
	other := parse(t, "--proxy", "socks5://192.0.2.1", "--upstream", "b=socks5://192.0.2.3")
	b := cfg.Upstreams[1]
	a := newAbsent(slog.New(slog.DiscardHandler))
	for _, tt := range []struct {
		what string
		cfg  *config.Config
		now  control.Upstream
		want int
	}{
		{"it has carried nothing", cfg, control.Upstream{UDP: control.UpstreamNotTried}, 1},
		{"its UDP does not work", cfg, control.Upstream{UDP: control.UpstreamDown}, 1},
		{"it has granted a connection", cfg, control.Upstream{Granted: 1, UDP: control.UpstreamNotTried}, 0},
		{"its UDP works", cfg, control.Upstream{UDP: control.UpstreamOK}, 0},
		{"a reload has replaced it", other, control.Upstream{UDP: control.UpstreamNotTried}, 0},
	} {
		a.note(b, context.DeadlineExceeded)
		if got := told(a, tt.cfg, tt.now); len(got) != tt.want {
			t.Errorf("%s: %q", tt.what, got)
		}
	}
	a.note(b, nil)
	if got := told(a, cfg, control.Upstream{}); len(got) != 0 {
		t.Errorf("a check has found it again: %q", got)
	}
}
