package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// scrape asks for the metrics on a unix socket.
func scrape(path string) (string, error) {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}
	resp, err := (&http.Client{Transport: t, Timeout: testkit.Patience}).Get("http://viasocks/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return string(b), err
}

// files are the names in a directory.
func files(t *testing.T, dir string) (names string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		names += f.Name() + " "
	}
	return names
}

// wantMetrics scrapes the metrics.
func wantMetrics(t *testing.T, when, socket string) {
	t.Helper()
	text, err := scrape(socket)
	for _, want := range []string{"# TYPE viasocks_", "viasocks_build_info{"} {
		if err != nil || !strings.Contains(text, want) {
			t.Errorf("%s: no %q: %v\n%.2000s", when, want, err, text)
		}
	}
}

// The metrics of up can be scraped. Their socket is removed at the end, and after kill -9 by down and by the next up, whether
// that has metrics or not.
func TestMetricsOfUp(t *testing.T) {
	testkit.CheckLeaks(t)
	h := newHost(t)
	before := h.state()
	state, dir := filepath.Join(t.TempDir(), "state"), t.TempDir()
	socket := filepath.Join(dir, "metrics.sock")
	up := func(args ...string) *upProc {
		t.Helper()
		return h.up(append([]string{"--proxy", h.proxy, "--state-dir", state}, args...)...)
	}
	kill := func(p *upProc) {
		t.Helper()
		p.cmd.Process.Kill()
		p.wait()
		if _, err := os.Lstat(socket); err != nil {
			t.Fatalf("the socket that must be removed is not there: %v", err)
		}
	}
	p := up("--metrics", "unix:"+socket)
	wantMetrics(t, "up", socket)
	if info, err := os.Lstat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %v, %v", info.Mode(), err)
	}
	kill(p)
	if got := h.result("down", "--state-dir", state); !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, socket) {
		t.Errorf("down does not name the socket: %s", got)
	}
	if left := files(t, dir); left != "" {
		t.Errorf("after kill -9 and down there is %s", left)
	}
	h.same("kill -9, down", before)

	kill(up("--metrics", "unix:"+socket))
	p = up("--metrics", "unix:"+socket)
	wantMetrics(t, "up after kill -9", socket)
	kill(p)
	p = up()
	if left := files(t, dir); left != "" {
		t.Errorf("up without metrics leaves %s", left)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
	p = up("--metrics", "unix:"+socket)
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
	if left := files(t, dir); left != "" {
		t.Errorf("after the end there is %s", left)
	}
	for name := range strings.FieldsSeq(files(t, state)) {
		if !strings.HasSuffix(name, ".lock") {
			t.Errorf("%s is left in the state directory", name)
		}
	}
	h.same("the end", before)
}

// capture of up writes the packets of a program of the host, with the outcome of its connection.
func TestCaptureOfUp(t *testing.T) {
	testkit.CheckLeaks(t)
	h := newHost(t)
	before := h.state()
	p := h.up("--proxy", h.proxy)
	file := filepath.Join(t.TempDir(), "c.pcapng")
	c := h.viasocks("capture", "--destination", "203.0.113.9:80", file)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill() })
	testkit.Eventually(t, "the file to begin", func() bool { info, err := os.Stat(file); return err == nil && info.Size() > 0 })
	testkit.Eventually(t, "the comment on a refused connection", func() bool {
		for _, to := range []string{"203.0.113.9:80", "203.0.113.10:81"} {
			d := h.in(exec.Command(self(t), "-test.run=^TestDialer$"))
			d.Env = append(os.Environ(), "TEST_DIAL="+to)
			_ = d.Run()
		}
		testkit.Pace(150 * time.Millisecond) // packets wait for 100 ms until they are written
		b, err := os.ReadFile(file)
		return err == nil && bytes.Contains(b, []byte("refused"))
	})
	_ = c.Process.Signal(syscall.SIGINT)
	if err := c.Wait(); err != nil || !strings.HasSuffix(stderr.String(), " packets\n") {
		t.Errorf("%v: %s", err, &stderr)
	}
	syn := false
	for _, packet := range dissected(t, file) {
		if strings.HasPrefix(packet, "81\t") {
			t.Errorf("a packet to another destination: %q", packet)
		}
		// On a slow machine the SYN is written before the flow is known; then the ICMP error, which quotes it, has the comment.
		syn = syn || strings.HasPrefix(packet, "80\t") && strings.Contains(packet, "S") &&
			strings.Contains(packet, ": tcp to 203.0.113.9:80") && strings.Contains(packet, "upstream proxy, rule default, ")
	}
	if !syn {
		t.Errorf("neither a SYN nor an ICMP error has a comment:\n%s", strings.Join(dissected(t, file), "\n"))
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.ends(0)
	h.same("the end", before)
}
