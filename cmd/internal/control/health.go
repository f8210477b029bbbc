package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Health tells whether traffic passes.
type Health struct {
	Healthy   bool             `json:"healthy"`
	Reason    string           `json:"reason,omitempty"` // why it does not pass
	Do        string           `json:"do,omitempty"`     // what to do about it
	Mode      string           `json:"mode,omitempty"`   // run, up or attach
	PID       int              `json:"pid,omitempty"`
	State     string           `json:"state,omitempty"`
	Upstreams []UpstreamHealth `json:"upstreams"`
}

// UpstreamHealth tells whether an upstream works: one of its servers was just reached and accepted the login.
type UpstreamHealth struct {
	Name  string `json:"name"`
	URL   string `json:"url"` // without the password
	Works bool   `json:"works"`
	Why   string `json:"why,omitempty"` // why it does not work
}

// HealthTime limits the whole check.
const HealthTime = 2 * time.Second

// healthPart limits the wait for one of several instances, and is the time that is reserved for the report.
const healthPart, healthRest = time.Second, 100 * time.Millisecond

// Health asks whether traffic passes.
func (c *Client) Health() (h Health, err error) { return h, c.ask("GET", "/v1/health", &h) }

func (s *Server) health(r *http.Request) (any, error) {
	h := s.o.Backend.Health(r.Context())
	if h.Upstreams == nil {
		h.Upstreams = []UpstreamHealth{}
	}
	return h, nil
}

// CheckHealth asks the instance with the process id pid whether traffic passes; or, for 0, the one that is up or the
// caller's only one of run. It takes at most HealthTime.
func CheckHealth(r Runtime, upPath string, pid int) Health {
	done := make(chan Health, 1)
	go func() { done <- checkHealth(r, upPath, pid) }()
	select {
	case h := <-done:
		return h
	case <-time.After(HealthTime - healthRest):
		return unhealthy(fmt.Errorf("viasocks does not answer within %v", HealthTime), "look at its log, and restart it")
	}
}

func unhealthy(err error, do string) Health {
	return Health{Reason: err.Error(), Do: do, Upstreams: []UpstreamHealth{}}
}

func checkHealth(r Runtime, upPath string, pid int) Health {
	c, err := chooseHealth(r, upPath, pid)
	if err != nil {
		const do = "see 'viasocks ps'" // an error may say so itself
		return unhealthy(errors.New(strings.TrimSuffix(err.Error(), ": "+do)), do)
	}
	defer c.Close()
	c.SetTimeout(HealthTime)
	h, err := c.Health()
	switch {
	case errors.Is(err, ErrNoDaemon):
		return unhealthy(errors.New("viasocks is not running here"), "start it: viasocks up, or viasocks run")
	case errors.Is(err, ErrOlder):
		older := errors.New("the running viasocks is of an older version, which does not say whether traffic passes")
		return unhealthy(older, "restart it")
	case err != nil:
		return unhealthy(err, "see 'viasocks status'")
	}
	return h
}

// chooseHealth returns a client for the chosen instance.
func chooseHealth(r Runtime, upPath string, pid int) (*Client, error) {
	if pid != 0 {
		return Find(r, upPath, pid)
	}
	up := NewClient(upPath)
	ctx, cancel := context.WithTimeout(context.Background(), healthPart)
	conn, err := up.dial(ctx)
	cancel()
	if err == nil {
		conn.Close()
		return up, nil
	}
	runs := OwnInstances(r)
	switch len(runs) {
	case 0:
		return up, nil // its error is the most useful one
	case 1:
		up.Close()
		return Find(r, upPath, runs[0].PID)
	}
	up.Close()
	return nil, fmt.Errorf("%d programs of yours run under 'viasocks run': choose one with --pid", len(runs))
}

// WriteHealth writes h as one line of text.
func WriteHealth(w io.Writer, h Health) error {
	line := "healthy"
	switch {
	case !h.Healthy:
		line = "not healthy: " + h.Reason
		if h.Do != "" {
			line += ": " + h.Do
		}
	case h.Mode == ModeRun:
		line += fmt.Sprintf(": process %d carries its program", h.PID)
	case h.Mode == ModeAttach:
		line += fmt.Sprintf(": process %d carries its namespace", h.PID)
	default:
		line += fmt.Sprintf(": process %d carries this host", h.PID)
	}
	for _, u := range h.Upstreams {
		if h.Healthy && u.Works {
			line += ", " + u.URL + " works"
			break
		}
	}
	_, err := fmt.Fprintln(w, Plain(line))
	return err
}
