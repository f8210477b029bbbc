package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/stack/testkit"
)

// The outcome of an upgrade arrives although the server has ended before it.
func TestUpgrade(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "control-1.sock")
	b := (&fake{}).backend()
	var s *Server
	refuse := errors.New("it is waiting")
	b.Upgrade = func() (int, error) {
		if refuse == nil {
			s.Close()
		}
		return 7, refuse
	}
	s, err := Listen(Options{Path: path, Group: -1, Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := NewClient(path)
	defer c.Close()
	if pid, err := c.Upgrade(); pid != 0 || err == nil || err.Error() != "cannot upgrade: it is waiting" {
		t.Errorf("%d, %v", pid, err)
	}
	refuse = nil
	if pid, err := c.Upgrade(); pid != 7 || err != nil {
		t.Errorf("%d, %v", pid, err)
	}
	if _, err := c.Upgrade(); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("without a viasocks: %v", err)
	}

	// One that does not know the request.
	older, path := listen(t, &fake{}, -1)
	defer older.Close()
	c2 := NewClient(path)
	defer c2.Close()
	if _, err := c2.Upgrade(); !errors.Is(err, ErrOlder) || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("an older one: %v", err)
	}
}

// A member of the control group can neither upgrade nor take over, and is told who may.
func TestUpgradeOfMembers(t *testing.T) {
	testkit.CheckLeaks(t)
	const group = 4321
	s, _ := listen(t, &fake{}, group)
	defer s.Close()
	member := context.WithValue(context.Background(), peerKey{}, privsock.Peer{UID: 65000, GID: group})
	for request, handle := range map[string]http.HandlerFunc{"upgrade": s.upgrade, "takeover": s.takeover} {
		w := httptest.NewRecorder()
		handle(w, httptest.NewRequestWithContext(member, "POST", "/v1/"+request, nil))
		if got := w.Body.String(); w.Code != http.StatusForbidden || got != "permission denied: only root may\n" {
			t.Errorf("%s: %d %q", request, w.Code, got)
		}
	}
}

// hijacked is an answer whose connection is c.
type hijacked struct {
	*httptest.ResponseRecorder
	c net.Conn
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) { return h.c, nil, nil }

// Nothing is done for a process that has ended before the answer, and the log says so.
func TestUpgradeOfTheDead(t *testing.T) {
	testkit.CheckLeaks(t)
	var log bytes.Buffer
	b := (&fake{}).backend()
	b.Upgrade = func() (int, error) { t.Error("it was upgraded"); return 0, nil }
	b.TakeOver = func(c *net.UnixConn, _ int) { c.Close(); t.Error("it was taken over") }
	s, err := Listen(Options{
		Path: filepath.Join(t.TempDir(), "control-1.sock"), Group: -1, Backend: b, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "dead"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	owner := context.WithValue(context.Background(), peerKey{}, privsock.Peer{UID: 0, PID: 99})
	for protocol, handle := range map[string]http.HandlerFunc{upgradeProtocol: s.upgrade, takeoverProtocol: s.takeover} {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client.Close()
		ours, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequestWithContext(owner, "POST", "/v1/"+protocol, nil)
		r.Header.Set("Upgrade", protocol)
		log.Reset()
		handle(hijacked{httptest.NewRecorder(), &conn{UnixConn: ours, slots: new(atomic.Int32)}}, r)
		if want := "the process that asked has ended"; !strings.Contains(log.String(), want) {
			t.Errorf("%s: the log says\n%s", protocol, log.String())
		}
	}
}
