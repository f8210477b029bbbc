package control

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/stack/testkit"
)

var update = flag.Bool("update", false, "write the golden files")

type fake struct {
	confirmed, down atomic.Int32
	refuse          error
}

func (f *fake) backend() Backend {
	return Backend{
		Status: sample,
		Flows: func() []Flow {
			return []Flow{{ID: 1, Up: 5}, {ID: 2, Down: 7}, {ID: 3, Up: 3, Down: 4}}
		},
		Name: func(flows []Flow) {
			for i := range flows {
				flows[i].PID = int(10 * flows[i].ID)
			}
		},
		Confirm: func() error { f.confirmed.Add(1); return f.refuse },
		Down:    func() { f.down.Add(1) },
	}
}

func listen(t *testing.T, f *fake, group int) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control-1.sock")
	s, err := Listen(Options{Path: path, Group: group, Backend: f.backend(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, path
}

func TestServer(t *testing.T) {
	testkit.CheckLeaks(t)
	var f fake
	s, path := listen(t, &f, -1)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	c := NewClient(path)
	defer c.Close()
	got, err := c.Status()
	if err != nil || got.PID != 4711 || len(got.Upstreams) != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	flows, err := c.Flows(2)
	if err != nil || flows.Total != 3 || len(flows.Flows) != 2 || flows.Flows[0].ID != 2 || flows.Flows[1].ID != 3 ||
		flows.Flows[0].PID != 20 {
		t.Errorf("%+v, %v", flows, err)
	}
	if _, err := c.Flows(MaxFlows + 1); err == nil || !strings.Contains(err.Error(), "limit must be") {
		t.Error(err)
	}
	if err := c.Confirm(); err != nil || f.confirmed.Load() != 1 {
		t.Error(err)
	}
	f.refuse = errors.New("there is nothing to confirm")
	if err := c.Confirm(); err == nil || err.Error() != "cannot confirm: there is nothing to confirm" {
		t.Error(err)
	}
	if err := c.Down(); err != nil || f.down.Load() != 1 {
		t.Error(err)
	}
	s.Close()
	s.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Error("the socket is still there")
	}
	if _, err := c.Status(); !errors.Is(err, ErrNoDaemon) {
		t.Error(err)
	}
	if err := c.Wait(testkit.Patience); err != nil {
		t.Error(err)
	}
}

// What no client of ours sends.
func TestHostileRequests(t *testing.T) {
	testkit.CheckLeaks(t)
	var f fake
	_, path := listen(t, &f, -1)
	for _, tt := range []struct{ send, want string }{
		{"GET /v1/down HTTP/1.1\r\nHost: x\r\n\r\n", "405"},
		{"POST /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", "405"},
		{"GET /../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", "307"},
		{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
		{"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET /v1/flows?limit=-1 HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET /v1/flows?limit=1e9 HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 16<<10) + "\r\n\r\n", "431"},
		{"\x00\x01\x02\r\n\r\n", "400"},
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(testkit.Patience))
		io.WriteString(c, tt.send)
		b := make([]byte, 12)
		n, _ := io.ReadFull(c, b)
		if got := string(b[:n]); got != "HTTP/1.1 "+tt.want {
			t.Errorf("%.40q: got %q, want %s", tt.send, got, tt.want)
		}
		c.Close()
	}
	if f.down.Load() != 0 {
		t.Error("it was told to go down")
	}
}

// Connections that say nothing take their own places and nobody's time.
func TestBounds(t *testing.T) {
	testkit.CheckLeaks(t)
	var f fake
	s, path := listen(t, &f, -1)
	var silent []net.Conn
	for range maxConns {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	testkit.Eventually(t, "all to be connected", func() bool { return s.l.owners.Load() >= maxConns })
	one, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	one.SetDeadline(time.Now().Add(testkit.Patience))
	if _, err := one.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one too many: %v", err)
	}
	one.Close()
	for _, c := range silent {
		c.Close()
	}
	if !testkit.Until(testkit.Patience, func() bool {
		c := NewClient(path)
		defer c.Close()
		_, err = c.Status()
		return err == nil
	}) {
		t.Fatal(err)
	}
}

// Those who may only look take their own slots: with all of them held, root is answered, and stops it.
func TestLookersKeepNobodyOut(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: another user's connection is not tried")
	}
	var f fake
	s, path := listen(t, &f, group)
	for d := filepath.Dir(path); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	conns, errs := make(chan net.Conn), make(chan error)
	const many = 3 * maxConns
	for range many {
		go func() {
			c, err := dialAs(path, group, nil)
			if err != nil {
				errs <- err
				return
			}
			conns <- c
		}()
	}
	for range many {
		select {
		case c := <-conns:
			defer c.Close()
		case err := <-errs:
			t.Fatal(err)
		}
	}
	testkit.Eventually(t, "all to be connected", func() bool { return s.l.owners.Load()+s.l.others.Load() >= maxConns })
	c := NewClient(path)
	defer c.Close()
	for range maxConns {
		if _, err := c.Status(); err != nil {
			t.Fatalf("root is kept out: %v", err)
		}
	}
	if err := c.Confirm(); err != nil || f.confirmed.Load() != 1 {
		t.Error(err)
	}
	if err := c.Down(); err != nil || f.down.Load() != 1 {
		t.Error(err)
	}
}

// group is a group that may look at the control socket of the tests.
const group = 4321

// A group may look and not touch; others may nothing.
func TestPeers(t *testing.T) {
	for _, tt := range []struct {
		name        string
		p           privsock.Peer
		look, touch bool
	}{
		{"root", privsock.Peer{UID: 0, GID: 5}, true, true},
		{"own user", privsock.Peer{UID: uint32(os.Geteuid())}, true, true},
		{"somebody", privsock.Peer{UID: 65000, GID: 65000}, false, false},
		{"primary group", privsock.Peer{UID: 65000, GID: group}, true, false},
		{"supplementary group", privsock.Peer{UID: 65000, GID: 1, Groups: []uint32{7, group}}, true, false},
		{"unknown", privsock.Peer{UID: 0, Err: errors.New("x")}, false, false},
	} {
		if got := tt.p.Owner() || tt.p.In(group); got != tt.look {
			t.Errorf("%s: looks: %v", tt.name, got)
		}
		if got := tt.p.Owner(); got != tt.touch {
			t.Errorf("%s: touches: %v", tt.name, got)
		}
		if tt.p.In(-1) {
			t.Errorf("%s is in no group's group", tt.name)
		}
	}
}

// The control socket holds what TestPeers says, for connections of other users.
func TestPeersOfSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: another user's connection is not tried")
	}
	var f fake
	_, path := listen(t, &f, group)
	// The directories of the test are root's alone, and this is about the socket.
	for d := filepath.Dir(path); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	c := NewClient(path)
	defer c.Close()
	as := func(gid int, groups []int) (*http.Response, error) {
		done := make(chan struct{})
		var resp *http.Response
		var err error
		go func() {
			defer close(done)
			resp, err = askAs(path, gid, groups)
		}()
		<-done
		return resp, err
	}
	for _, tt := range []struct {
		gid    int
		groups []int
		status int
	}{{65534, nil, 0}, {group, nil, 200}, {65534, []int{group}, 200}} {
		resp, err := as(tt.gid, tt.groups)
		switch {
		case tt.status == 0 && errors.Is(err, syscall.EACCES):
		case err != nil || resp.StatusCode != tt.status:
			t.Errorf("%+v: %v, %v", tt, resp, err)
		default:
			resp.Body.Close()
		}
	}
	os.Chmod(path, 0o666) // somebody opened it wide: the credentials hold
	if resp, err := as(65534, nil); err != nil || resp.StatusCode != 403 {
		t.Errorf("%v, %v", resp, err)
	}
}

// askAs asks for the status on a thread with other credentials, and lets the thread end.
func askAs(path string, gid int, groups []int) (*http.Response, error) {
	conn, err := dialAs(path, gid, groups)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableKeepAlives: true,
	}
	resp, err := (&http.Client{Transport: t, Timeout: testkit.Patience}).Get("http://x/v1/status")
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	return resp, err
}

func TestStaleSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "control-1.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close() // a daemon was killed
	if _, err := NewClient(path).Status(); !errors.Is(err, ErrNoDaemon) {
		t.Error(err)
	}
	s, err := Listen(Options{Path: path, Group: -1})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(Options{Path: path, Group: -1}); err == nil || !strings.Contains(err.Error(), "another file is there") {
		t.Error(err)
	}
	os.Chmod(dir, 0o777)
	if _, err := TakeLock(path); err == nil || !strings.Contains(err.Error(), "root's alone") {
		t.Error(err)
	}
}

func TestLock(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "control-1.sock")
	if Locked(path) {
		t.Error("locked by nobody")
	}
	l, err := TakeLock(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = TakeLock(path)
	if want := fmt.Sprintf("cannot start: another viasocks is up here (process %d): see 'viasocks status'",
		os.Getpid()); err == nil ||
		err.Error() != want ||
		!errors.Is(err, ErrLocked) {
		t.Error(err)
	}
	if !Locked(path) {
		t.Error("not locked")
	}
	c := NewClient(path)
	if _, err := c.Status(); err == nil || !strings.Contains(err.Error(), "starting or stopping") {
		t.Error(err)
	}
	if err := c.Wait(50 * time.Millisecond); err == nil {
		t.Error("it did not wait")
	}
	l.Close()
	if Locked(path) {
		t.Error("still locked")
	}
	if l, err = TakeLock(path); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// However often it is taken, given back and removed, only one has it.
func TestLockOfMany(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "control-1.sock")
	var have, most atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				l, err := TakeLock(path)
				if errors.Is(err, ErrLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				most.Store(max(most.Load(), have.Add(1)))
				have.Add(-1)
				l.Close()
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d had it at once", most.Load())
	}
}

func TestPath(t *testing.T) {
	p, err := Path("/run/viasocks")
	if err != nil || !strings.HasPrefix(p, "/run/viasocks/control-4") || !strings.HasSuffix(p, ".sock") {
		t.Errorf("%s, %v", p, err)
	}
}

// A server that is none of ours.
func TestClientBounds(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, answer := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[1,2]", "nonsense\r\n\r\n",
		"HTTP/1.1 500 x\r\nContent-Length: 2\r\n\r\nno"} {
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			c.Read(make([]byte, 4096))
			io.WriteString(c, answer)
		}()
		c := NewClient(path)
		if _, err := c.Status(); err == nil || !strings.HasPrefix(err.Error(), "cannot ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", answer, err)
		}
		c.Close()
	}
}

// The words of the JSON are for programs: they stay.
func TestJSON(t *testing.T) {
	b, err := json.MarshalIndent(sample(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "status.json", string(b)+"\n")
}
