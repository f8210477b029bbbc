package hosttest

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// daemon is a `viasocks up` in the host namespace.
type daemon struct {
	t    testing.TB
	cmd  *exec.Cmd
	log  *harness.Log
	done chan error
	over bool

	started   time.Time
	startedIn time.Duration // until it was ready
}

// readyWithin is how long `up` may take.
const readyWithin = time.Minute

// launch starts `viasocks up` and does not wait.
func (w *world) launch(flags ...string) *daemon {
	w.t.Helper()
	d := &daemon{t: w.t, log: &harness.Log{}, done: make(chan error, 1)}
	d.cmd = exec.Command(viasocks, append([]string{"up", "--log-level", "info"}, flags...)...)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.started = time.Now()
	w.in("host", d.cmd.Start)
	go func() { d.done <- d.cmd.Wait() }()
	w.t.Cleanup(d.end)
	return d
}

// up starts `viasocks up` and waits until it is ready.
func (w *world) up(flags ...string) *daemon {
	w.t.Helper()
	d := w.launch(flags...)
	d.ready()
	return d
}

func (d *daemon) ready() {
	d.t.Helper()
	if !testkit.Until(readyWithin, func() bool {
		if strings.Contains(d.log.String(), "msg=ready") {
			return true
		}
		select {
		case err := <-d.done:
			d.over = true
			d.t.Fatalf("viasocks up did not start: %v\n%s", err, d.log)
		default:
		}
		return false
	}) {
		d.t.Fatalf("viasocks up is not ready after %v\n%s", readyWithin, d.log)
	}
	d.startedIn = time.Since(d.started)
}

// becomesReady waits for it to be ready or over.
func (d *daemon) becomesReady() bool {
	ready := false
	testkit.Until(readyWithin, func() bool {
		ready = strings.Contains(d.log.String(), "msg=ready")
		return ready || !d.alive()
	})
	return ready
}

// alive is whether it runs.
func (d *daemon) alive() bool {
	select {
	case err := <-d.done:
		d.t.Logf("viasocks up ended by itself: %v", err)
		d.over = true
	default:
	}
	return !d.over
}

// kill is kill -9.
func (d *daemon) kill() {
	if !d.over {
		_ = d.cmd.Process.Kill()
		d.wait()
	}
}

func (d *daemon) signal(s syscall.Signal) { _ = d.cmd.Process.Signal(s) }

// reload is SIGHUP, and waits until the log tells of it.
func (d *daemon) reload() {
	d.t.Helper()
	before := strings.Count(d.log.String(), "reload")
	d.signal(syscall.SIGHUP)
	told := func() bool { return strings.Count(d.log.String(), "reload") != before }
	testkit.Until(testkit.Patience, func() bool { return told() || !d.alive() })
	if !told() {
		d.t.Errorf("the log does not tell of the reload:\n%s", harness.Tail(quiet(d.log.String()), 20))
	}
}

// stop is SIGTERM, and gives how it ended.
func (d *daemon) stop() error {
	if d.over {
		return nil
	}
	d.signal(syscall.SIGTERM)
	return d.wait()
}

func (d *daemon) wait() error {
	select {
	case err := <-d.done:
		d.over = true
		return err
	case <-time.After(time.Minute):
		_ = d.cmd.Process.Kill()
		<-d.done
		d.over = true
		return fmt.Errorf("it did not end")
	}
}

func (d *daemon) end() {
	d.kill()
	if s := d.log.String(); strings.Contains(s, "DATA RACE") || strings.Contains(s, "panic:") {
		d.t.Errorf("viasocks crashed:\n%s", s)
	} else if d.t.Failed() {
		d.t.Logf("viasocks said:\n%s", harness.Tail(quiet(s), 40))
	}
}

// quiet leaves out the lines of single flows.
func quiet(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.Contains(line, " src=") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// command runs another subcommand in the host namespace.
func (w *world) command(args ...string) (string, error) {
	return try("host", nil, append([]string{viasocks}, args...)...)
}

// has is whether the program has a subcommand, or an option of one: what is not there yet is skipped.
func has(words ...string) bool {
	out, err := exec.Command(viasocks, append([]string{"help"}, words[:1]...)...).CombinedOutput()
	if err != nil {
		return false
	}
	for _, word := range words[1:] {
		if !strings.Contains(string(out), word) {
			return false
		}
	}
	return true
}

// proxy starts a SOCKS server on an address of the proxy namespace.
func (w *world) proxy(addr string) *sockstest.Server {
	w.t.Helper()
	s, err := sockstest.Listen("tcp", addr, sockstest.WithNetns("/run/netns/proxy"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	return s
}

// known tells the recorder that the host may talk to a proxy.
func (r *recorder) known(s *sockstest.Server) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.proxyTCP[s.Addr()] = true
	r.proxyUDP[s.Addr().Addr()] = true
}
