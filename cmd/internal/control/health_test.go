package control

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// upWith serves a backend as the viasocks that is up.
func upWith(t *testing.T, b Backend) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "up.sock")
	srv, err := Listen(Options{Path: path, Group: -1, Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return path
}

func TestCheckHealth(t *testing.T) {
	r := runtimeOf(t)
	said := Health{
		Healthy:   true,
		Mode:      ModeUp,
		PID:       7,
		State:     Ready,
		Upstreams: []UpstreamHealth{{Name: "proxy", URL: "socks5://h", Works: true}},
	}
	path := upWith(t, Backend{Health: func(context.Context) Health { return said }})
	h := CheckHealth(r, path, 0)
	var b bytes.Buffer
	if err := WriteHealth(&b, h); err != nil || b.String() != "healthy: process 7 carries this host, socks5://h works\n" {
		t.Errorf("%v %q", err, b.String())
	}
	said = Health{Reason: "it\x1b[31m is broken\n", Do: "mend it"}
	b.Reset()
	if h = CheckHealth(r, path, os.Getpid()); h.Healthy {
		t.Error("healthy")
	}
	if err := WriteHealth(&b, h); err != nil || b.String() != "not healthy: it?[31m is broken : mend it\n" {
		t.Errorf("%v %q", err, b.String())
	}
	for name, path := range map[string]string{
		"nobody is there":     filepath.Join(t.TempDir(), "none.sock"),
		"a child that is not": path + "/x",
	} {
		if h := CheckHealth(r, path, 0); h.Healthy || h.Reason == "" {
			t.Errorf("%s: %+v", name, h)
		}
	}
	if h := CheckHealth(r, path, 1); h.Healthy || !strings.Contains(h.Reason, "process id 1") ||
		strings.Count(h.Reason+h.Do, "see 'viasocks ps'") != 1 {
		t.Errorf("%+v", h)
	}
}

// A daemon of an older version does not know the question: what is printed says so, and what to do.
func TestCheckHealthOfOlderVersion(t *testing.T) {
	path := upWith(t, Backend{Status: sample})
	var b bytes.Buffer
	err := WriteHealth(&b, CheckHealth(runtimeOf(t), path, 0))
	if err != nil || b.String() != "not healthy: the running viasocks is of an older version, "+
		"which does not say whether traffic "+
		"passes: restart it\n" {
		t.Errorf("%v %q", err, b.String())
	}
	c := NewClient(path)
	defer c.Close()
	if _, err := c.Capture(t.Context(), Capture{}, &b); !errors.Is(err, ErrOlder) {
		t.Error(err)
	}
	if err := c.Watch(t.Context(), func(Event) error { return nil }); !errors.Is(err, ErrOlder) {
		t.Error(err)
	}
}

// A daemon that hangs is not healthy, and the answer comes in time.
func TestCheckHealthHangs(t *testing.T) {
	end := make(chan struct{})
	path := upWith(t, Backend{Health: func(context.Context) Health { <-end; return Health{Healthy: true} }})
	defer close(end)
	begun := time.Now()
	h := CheckHealth(runtimeOf(t), path, 0)
	if took := time.Since(begun); h.Healthy || took > HealthTime+500*time.Millisecond {
		t.Errorf("%+v after %v", h, took)
	}
}

// The only program under run is asked; of several one must be chosen.
func TestCheckHealthOfRun(t *testing.T) {
	r := runtimeOf(t)
	none := filepath.Join(t.TempDir(), "none.sock")
	serve := func() {
		s, err := ListenRun(r, Options{Backend: Backend{
			Status: runSample("aria2c"), Flows: func() []Flow { return nil },
			Health: func(context.Context) Health { return Health{Healthy: true, Mode: ModeRun, PID: os.Getpid()} },
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
	}
	if h := CheckHealth(r, none, 0); h.Healthy || h.Reason != "viasocks is not running here" || h.Do == "" {
		t.Errorf("%+v", h)
	}
	serve()
	if h := CheckHealth(r, none, 0); !h.Healthy || h.Mode != ModeRun {
		t.Errorf("%+v", h)
	}
}
