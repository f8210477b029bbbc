package metrics

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/count"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestParseAddress(t *testing.T) {
	for text, want := range map[string]Address{
		"unix:/run/v.sock":  {Path: "/run/v.sock"},
		"unix:/run//v.sock": {Path: "/run/v.sock"},
		"9309":              {TCP: netip.MustParseAddrPort("127.0.0.1:9309")},
		"[::1]:9309":        {TCP: netip.MustParseAddrPort("[::1]:9309")},
		"0.0.0.0:9309":      {TCP: netip.MustParseAddrPort("0.0.0.0:9309")},
	} {
		got, err := ParseAddress(text)
		if got != want || err != nil {
			t.Errorf("%s: %v, %v", text, got, err)
		}
		if again, err := ParseAddress(got.String()); again != got || err != nil {
			t.Errorf("%s is written as %v", text, got)
		}
		if local := text != "0.0.0.0:9309"; got.Local() != local {
			t.Errorf("%s: local is %v", text, got.Local())
		}
	}
	for _, bad := range []string{"", "0", "65536", "-1", "unix:", "unix:v.sock", "unix:/" + strings.Repeat("v", 107),
		"localhost:1", "1.2.3.4:0", ":9309"} {
		if got, err := ParseAddress(bad); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}

// serve serves what each gives, and returns how to ask.
func serve(t *testing.T, at Address, source func() Source) (get func() (string, error)) {
	t.Helper()
	s, err := Listen(Options{Address: at, Source: source, Version: "1.2", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			if at.Path != "" {
				return d.DialContext(ctx, "unix", at.Path)
			}
			return d.DialContext(ctx, "tcp", at.TCP.String())
		},
	}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		s.Close()
		s.Close()
	})
	return func() (string, error) {
		r, err := client.Get("http://viasocks/metrics")
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if r.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", r.Status, b)
		}
		return string(b), err
	}
}

type table[T any] struct {
	Seen T                  `metric:"seen_total" label:"upstream=a.b-c_1,way=up" help:"What was seen."`
	Took count.Histogram[T] `metric:"took_seconds" help:"How long it took."`
}

func TestServe(t *testing.T) {
	testkit.CheckLeaks(t)
	at := Address{Path: filepath.Join(t.TempDir(), "m.sock")}
	var live table[atomic.Uint64]
	plane := new(int)
	source := func() Source {
		var s struct {
			table[uint64]
			Now int `metric:"now" help:"What there is."`
		}
		count.Add(&s.table, &live)
		s.Now = -3
		return Source{Of: plane, Each: func(f func(count.Metric)) { count.Each(s, f) }}
	}
	get := serve(t, at, source)
	live.Seen.Store(7)
	count.Observe(&live.Took, 3*time.Millisecond)
	wants := func(lines ...string) {
		t.Helper()
		text, err := get()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			if !strings.Contains("\n"+text, "\n"+l+"\n") {
				t.Errorf("there is no line %q in\n%s", l, text)
			}
		}
	}
	wants(
		"# HELP viasocks_seen_total What was seen.",
		"# TYPE viasocks_seen_total counter",
		`viasocks_seen_total{upstream="a.b-c_1",way="up"} 7`,
		"# TYPE viasocks_now gauge",
		"viasocks_now -3",
		"# TYPE viasocks_took_seconds histogram",
		`viasocks_took_seconds_bucket{le="0.002"} 0`,
		`viasocks_took_seconds_bucket{le="0.005"} 1`,
		`viasocks_took_seconds_bucket{le="+Inf"} 1`,
		"viasocks_took_seconds_sum 0.003",
		"viasocks_took_seconds_count 1",
	)
	text, _ := get()
	for _, name := range []string{"go_goroutines ", "process_resident_memory_bytes ", `viasocks_build_info{`} {
		if !strings.Contains(text, "\n"+name) {
			t.Errorf("there is no %s", name)
		}
	}
	// A flow that ended during the look is missing for a moment; another data plane begins anew.
	live.Seen.Store(2)
	wants(`viasocks_seen_total{upstream="a.b-c_1",way="up"} 7`)
	live.Seen.Store(9)
	wants(`viasocks_seen_total{upstream="a.b-c_1",way="up"} 9`)
	plane = new(int)
	live.Seen.Store(1)
	wants(`viasocks_seen_total{upstream="a.b-c_1",way="up"} 1`)
	checkText(t, text)
}

// checkText has promtool read the text, where it is installed.
func checkText(t *testing.T, text string) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("no promtool (Debian package prometheus): the text was not checked by it")
		return
	}
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

func TestUnixSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	at := Address{Path: filepath.Join(t.TempDir(), "m.sock")}
	none := func() Source { return Source{Each: func(func(count.Metric)) {}} }
	o := Options{Address: at, Source: none, Log: slog.New(slog.DiscardHandler)}

	// A socket that a killed process left is replaced.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: at.Path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	s, err := Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(at.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v, %v", info, err)
	}
	// One on which somebody listens is not.
	if other, err := Listen(o); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("two listen there: %v", err)
		other.Close()
	}
	s.Close()
	if _, err := os.Lstat(at.Path); !os.IsNotExist(err) {
		t.Errorf("it was left: %v", err)
	}
	// Another file is left alone.
	if err := os.WriteFile(at.Path, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(o); err == nil || !strings.Contains(err.Error(), "another file is there") {
		t.Errorf("a file was no obstacle: %v", err)
	}
	if b, _ := os.ReadFile(at.Path); string(b) != "mine" {
		t.Error("the file was changed")
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(at.Path), ".*"))
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestBounds: who connects and says nothing keeps nobody out for long, and headers have an end.
func TestBounds(t *testing.T) {
	testkit.CheckLeaks(t)
	at := Address{Path: filepath.Join(t.TempDir(), "m.sock")}
	get := serve(t, at, func() Source { return Source{Each: func(func(count.Metric)) {}} })
	dial := func() net.Conn {
		c, err := net.Dial("unix", at.Path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	var held []net.Conn
	for range maxConns {
		held = append(held, dial())
	}
	testkit.Eventually(t, "the end of a connection that is too many", func() bool {
		_, err := dial().Read(make([]byte, 1))
		return err == io.EOF
	})
	for _, c := range held {
		c.Close()
	}
	testkit.Eventually(t, "an answer", func() bool { _, err := get(); return err == nil })

	c := dial()
	fmt.Fprintf(c, "GET /metrics HTTP/1.1\r\nHost: v\r\nA: %s\r\n\r\n", strings.Repeat("a", 4*maxHeader))
	answer, _ := io.ReadAll(c)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 431 ") {
		t.Errorf("a long header: %.60q", answer)
	}
	c = dial()
	fmt.Fprintf(c, "GET /debug/pprof/ HTTP/1.0\r\n\r\n")
	if answer, _ = io.ReadAll(c); !strings.HasPrefix(string(answer), "HTTP/1.0 404 ") {
		t.Errorf("another path: %.60q", answer)
	}
}
