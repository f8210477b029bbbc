package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// Level is the severity of a Finding.
type Level string

// The levels.
const (
	OK        Level = "ok"
	Warning   Level = "warning"    // something does not work, or works less well
	Fault     Level = "fault"      // run, up, or every connection through the proxy fails
	NotTested Level = "not tested" // Do says what would test it
)

// Finding is the result of a check, in sentences for people.
type Finding struct {
	Part  string `json:"part"`  // what was examined: "this host", or "proxy" and its URL
	Check string `json:"check"` // a short name
	Level Level  `json:"level"`
	Found string `json:"found"`           // what was seen
	Means string `json:"means,omitempty"` // the consequences, and for which program
	Do    string `json:"do,omitempty"`    // the command or option that helps
}

// Report contains all findings.
type Report struct {
	Findings  []Finding `json:"findings"`
	Faults    int       `json:"faults"`
	Warnings  int       `json:"warnings"`
	NotTested int       `json:"not_tested"`
	Seconds   float64   `json:"seconds"`
}

// Options of Examine.
type Options struct {
	Config  *config.Config
	Environ []string
}

// Limit is the maximum duration of an examination.
const Limit = 20 * time.Second

const thisHost = "this host"

// check is one test. It returns its findings in order, and returns when ctx ends.
type check struct {
	part, name string
	limit      time.Duration
	run        func(ctx context.Context) []Finding
}

// late is the time that a check has, after its deadline, to return what it has found.
const late = 300 * time.Millisecond

// Examine tests the host and the proxies of the configuration. It takes Limit at most.
func Examine(ctx context.Context, o Options) *Report {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, Limit-2*late)
	defer cancel()
	h := newHost(o)
	checks := h.checks()
	proxies, end := h.proxyChecks()
	defer end()
	r := &Report{Findings: runAll(ctx, append(checks, proxies...))}
	for _, f := range r.Findings {
		switch f.Level {
		case Fault:
			r.Faults++
		case Warning:
			r.Warnings++
		case NotTested:
			r.NotTested++
		}
	}
	r.Seconds = time.Since(begun).Round(10 * time.Millisecond).Seconds()
	return r
}

// runAll runs the checks concurrently and returns their findings in the order of the checks. A check that does not
// return in time is abandoned.
func runAll(ctx context.Context, checks []check) (all []Finding) {
	found := make([]chan []Finding, len(checks))
	for i, c := range checks {
		found[i] = make(chan []Finding, 1)
		go func() {
			ctx, cancel := context.WithTimeout(ctx, c.limit)
			defer cancel()
			found[i] <- c.run(ctx)
		}()
	}
	for i, c := range checks {
		wait, cancel := context.WithTimeout(ctx, c.limit)
		select {
		case fs := <-found[i]:
			all = append(all, c.named(fs)...)
		case <-wait.Done():
			select {
			case fs := <-found[i]:
				all = append(all, c.named(fs)...)
			case <-time.After(late):
				all = append(all, c.named([]Finding{{Level: NotTested,
					Found: fmt.Sprintf("It took longer than %v.", c.limit)}})...)
			}
		}
		cancel()
	}
	return all
}

func (c check) named(fs []Finding) []Finding {
	for i := range fs {
		fs[i].Part = c.part
		if fs[i].Check == "" {
			fs[i].Check = c.name
		}
	}
	return fs
}

// together runs the parts of a check concurrently and returns their findings in the order of the parts.
func together(parts ...func() []Finding) (all []Finding) {
	found := make([][]Finding, len(parts))
	var ran sync.WaitGroup
	for i, part := range parts {
		ran.Go(func() { found[i] = part() })
	}
	ran.Wait()
	for _, fs := range found {
		all = append(all, fs...)
	}
	return all
}
