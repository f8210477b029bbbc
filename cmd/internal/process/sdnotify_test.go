package process

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// notifySocket is systemd's end.
func notifySocket(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func heard(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 4096)
	c.SetReadDeadline(time.Now().Add(testkit.Patience))
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// testGuard checks that the watchdog hears of n while look returns, and of nothing while look hangs.
func testGuard(t *testing.T, n *Notifier, c *net.UnixConn) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	looks := 0
	hang := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.Guard(ctx, func() {
			if looks++; looks == 3 {
				<-hang
			}
		})
	}()
	for range 2 {
		if got := heard(t, c); got != "WATCHDOG=1" {
			t.Errorf("%q", got)
		}
	}
	// What hangs is not well: nothing is said.
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := c.Read(make([]byte, 64)); err == nil {
		t.Errorf("%d bytes while it hangs", n)
	}
	close(hang)
	if got := heard(t, c); got != "WATCHDOG=1" {
		t.Errorf("%q", got)
	}
	cancel()
	<-done
}

func TestNotify(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@viasocks-test-%d", os.Getpid())} {
		c := notifySocket(t, name)
		n := NewNotifier(
			[]string{"NOTIFY_SOCKET=" + name, "WATCHDOG_USEC=30000", fmt.Sprintf("WATCHDOG_PID=%d", os.Getpid())},
			slog.New(slog.DiscardHandler),
		)
		n.Ready("carries\nall")
		if got := heard(t, c); got != "READY=1\nSTATUS=carries all" {
			t.Errorf("%q", got)
		}
		n.Reloading()
		if got := heard(t, c); !strings.HasPrefix(got, "RELOADING=1\nMONOTONIC_USEC=") {
			t.Errorf("%q", got)
		}
		n.Waiting("waits\x1b", 40*time.Second)
		if got := heard(t, c); got != "STATUS=waits?\nEXTEND_TIMEOUT_USEC=80000000" {
			t.Errorf("%q", got)
		}
		n.Repeat()
		if got := heard(t, c); got != "STATUS=waits?\nEXTEND_TIMEOUT_USEC=80000000" {
			t.Errorf("repeated: %q", got)
		}
		n.Hand(77)
		if got := heard(t, c); got != "MAINPID=77\nWATCHDOG=1" {
			t.Errorf("%q", got)
		}
		n.Stopping()
		if got := heard(t, c); got != "STOPPING=1\nSTATUS=stopping" {
			t.Errorf("%q", got)
		}

		testGuard(t, n, c)
		n.Close()
		n.Ready("after the end") // no panic, no noise
	}
}

func TestNobodyToNotify(t *testing.T) {
	for _, env := range [][]string{nil, {"NOTIFY_SOCKET="}, {"NOTIFY_SOCKET=relative"},
		{"NOTIFY_SOCKET=/does/not/exist", "WATCHDOG_USEC=1000"}} {
		var log strings.Builder
		n := NewNotifier(env, slog.New(slog.NewTextHandler(&log, nil)))
		n.Ready("x")
		n.Guard(context.Background(), func() { t.Error("looked") }) // returns
		n.Close()
		if told := strings.Count(log.String(), "\n"); told > 1 || len(env) > 0 && env[0] != "NOTIFY_SOCKET=" && told != 1 {
			t.Errorf("%q: %s", env, &log)
		}
	}
	path := filepath.Join(t.TempDir(), "notify")
	notifySocket(t, path)
	for _, env := range []string{"WATCHDOG_PID=1", "WATCHDOG_USEC=-1", "WATCHDOG_USEC=x", "WATCHDOG_USEC=99999999999999999"} {
		n := NewNotifier([]string{"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=1000", env}, slog.New(slog.DiscardHandler))
		if n.watchdog != 0 {
			t.Errorf("%s: watchdog %v", env, n.watchdog)
		}
		n.Close()
	}
}
