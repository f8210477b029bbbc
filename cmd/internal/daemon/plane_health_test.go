package daemon

import (
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

func TestJudge(t *testing.T) {
	works := func(name string) control.UpstreamHealth { return control.UpstreamHealth{Name: name, Works: true} }
	fails := func(name string) control.UpstreamHealth {
		return control.UpstreamHealth{Name: name, Why: name + " is down"}
	}
	for name, tt := range map[string]struct {
		byDefault string
		all       []control.UpstreamHealth
		healthy   bool
		reason    string
	}{
		"no proxy at all":   {"", nil, true, ""},
		"the default works": {"proxy", []control.UpstreamHealth{fails("lab"), works("proxy")}, true, ""},
		"the default is down": {"proxy", []control.UpstreamHealth{fails("lab"), fails("proxy"), works("x")}, false,
			"proxy is down"},
		"no default, one works":          {"", []control.UpstreamHealth{fails("lab"), works("x")}, true, ""},
		"no default, all are down":       {"", []control.UpstreamHealth{fails("lab"), fails("x")}, false, "lab is down"},
		"the default is not a proxy yet": {"proxy", []control.UpstreamHealth{works("x")}, false, ""},
	} {
		if healthy, reason := judge(tt.byDefault, tt.all); healthy != tt.healthy || reason != tt.reason {
			t.Errorf("%s: %v %q", name, healthy, reason)
		}
	}
}
