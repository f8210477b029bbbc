package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// captureAt serves a backend that captures nothing, and counts how often it is asked.
func captureAt(t *testing.T, group int, asked *atomic.Int32) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "control-1.sock")
	s, err := Listen(Options{Path: path, Group: group, Log: slog.New(slog.DiscardHandler), Backend: Backend{
		Status: sample,
		Capture: func(_ context.Context, c Capture, w io.Writer) error {
			asked.Add(1)
			if c.Destination == "refused" {
				return errors.New("the destination is not a destination")
			}
			_, err := w.Write([]byte("\x0a\x0d\x0d\x0a"))
			return err
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return path
}

// TestHostileCaptures: malformed and huge numbers, texts that exceed the header and wrong methods are refused with one line,
// and a proper request is answered then.
func TestHostileCaptures(t *testing.T) {
	testkit.CheckLeaks(t)
	var asked atomic.Int32
	path := captureAt(t, -1, &asked)
	huge := strings.Repeat("9", 5000)
	for _, tt := range []struct {
		method, query, want string
	}{
		{"GET", "flow=-1", "400 flow must be a number"},
		{"GET", "flow=" + huge, "400 flow must be a number"},
		{"GET", "count=1e9", "400 count must be a number"},
		{"GET", "count=0x7f", "400 count must be a number"},
		{"GET", "count=-9223372036854775808", "400 count must be a number"},
		{"GET", "bytes=9223372036854775808", "400 bytes must be a number"},
		{"GET", "ms=-1", "400 ms must be a number"},
		{"GET", "ms=%00", "400 ms must be a number"},
		{"GET", "destination=refused", "409 the destination is not a destination"},
		{"GET", "program=" + strings.Repeat("x", 16<<10), "431 "},
		{"POST", "", "405 Method Not Allowed"},
		{"PUT", "count=1", "405 Method Not Allowed"},
	} {
		status, body := request(t, path, tt.method, "/v1/capture?"+tt.query)
		if got := status[:4] + strings.TrimSpace(body); !strings.HasPrefix(got, tt.want) ||
			strings.Count(got, "\n") != 0 || len(got) > 200 {
			t.Errorf("%s %.40s: got %.200q, want %s", tt.method, tt.query, got, tt.want)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("%d of the requests reached the backend, 1 should", n)
	}
	status, body := request(t, path, "GET", "/v1/capture?ms=9223372036854775807")
	if !strings.HasPrefix(status, "200 ") || len(body) != 4 {
		t.Errorf("then: %s %q", status, body)
	}
}

// request returns the status and the body of the answer.
func request(t *testing.T, path, method, what string) (status, body string) {
	t.Helper()
	tr := &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", path) },
		DisableKeepAlives: true,
	}
	u, err := url.Parse("http://x" + what)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: tr, Timeout: testkit.Patience}).Do(&http.Request{Method: method, URL: u,
		Header: http.Header{}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status, string(b)
}

// TestCapturePermissions: root and members of the group may capture. Somebody else is refused by the socket's mode and, where
// that was opened, by the credentials; the backend is not asked.
func TestCapturePermissions(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: another user's connection is not tried")
	}
	const group, nogroup = 4321, 65534
	var asked atomic.Int32
	path := captureAt(t, group, &asked)
	for d := filepath.Dir(path); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		gid    int
		groups []int
		want   string
		asked  int32
	}{
		{"somebody", nogroup, nil, "HTTP/1.1 403 Forbidden", 0},
		{"the group", group, nil, "HTTP/1.1 200 OK", 1},
		{"a supplementary group", nogroup, []int{group}, "HTTP/1.1 200 OK", 2},
	} {
		done := make(chan string)
		go func() { // on a thread of its own, which ends
			c, err := dialAs(path, tt.gid, tt.groups)
			if err != nil {
				done <- err.Error()
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testkit.Patience))
			_, _ = io.WriteString(c, "GET /v1/capture HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			b, _ := io.ReadAll(io.LimitReader(c, 1<<16))
			done <- string(b)
		}()
		if got := <-done; !strings.HasPrefix(got, tt.want) || asked.Load() != tt.asked {
			t.Errorf("%s: %q; the backend was asked %d times", tt.name, got, asked.Load())
		}
	}
	if err := os.Chmod(path, 0o660); err != nil {
		t.Fatal(err)
	}
	refused := make(chan error)
	go func() { _, err := dialAs(path, nogroup, nil); refused <- err }()
	if err := <-refused; !errors.Is(err, os.ErrPermission) {
		t.Errorf("somebody at the socket: %v", err)
	}
}
