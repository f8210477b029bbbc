package daemon

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

// absent remembers the upstreams that did not answer when they were last checked, although viasocks started without
// them: not every flow needs them. It outlives the plane. A nil *absent remembers nothing.
type absent struct {
	log *slog.Logger

	mu  sync.Mutex
	why map[string]missing // by the name of the upstream
}

// missing is an upstream as it was when it did not answer.
type missing struct {
	server string // its first server
	err    string
}

func newAbsent(log *slog.Logger) *absent { return &absent{log: log, why: map[string]missing{}} }

// note records the result of a check of an upstream that is not required; nil: it works.
func (a *absent) note(u config.Upstream, err error) {
	if err == nil {
		a.works(u.Name)
		return
	}
	if a == nil {
		return
	}
	m := missing{u.Server.String(), err.Error()}
	a.mu.Lock()
	known := a.why[u.Name] == m
	a.why[u.Name] = m
	a.mu.Unlock()
	if !known {
		a.log.Warn("an upstream does not answer; it is tried again for each flow that the rules send through it",
			"upstream", u.Name, "err", err)
	}
}

// works forgets that the upstream did not answer.
func (a *absent) works(name string) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.why, name)
}

// fill adds to the status what is known of the upstreams that have not answered and have carried nothing since.
func (a *absent) fill(s *control.Status, cfg *config.Config) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Warnings = slices.Clone(s.Warnings) // run lends us those of its configuration
	for _, u := range cfg.Upstreams {
		m, ok := a.why[u.Name]
		i := slices.IndexFunc(s.Upstreams, func(x control.Upstream) bool { return x.Name == u.Name })
		if !ok || m.server != u.Server.String() || i < 0 {
			continue
		}
		if s.Upstreams[i].Granted > 0 || s.Upstreams[i].UDP == control.UpstreamOK {
			continue
		}
		s.Upstreams[i].TCP = control.UpstreamDown
		w := fmt.Sprintf("the upstream %s did not answer when it was last checked: %s", u.Name, m.err)
		s.Warnings = append(s.Warnings, w)
	}
}
