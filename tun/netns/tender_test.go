package netns

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// maker returns the process id of the maker; 0: there is none.
func (s *Sockets) maker() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

// TestSpawnMakerReplaced kills the maker again and again while many ask for sockets. A request right after the first death gets
// its socket, and the sockets from before are not touched.
func TestSpawnMakerReplaced(t *testing.T) {
	testkit.CheckLeaks(t)
	var said bytes.Buffer
	spec := socketsSpec("sleep", "60")
	spec.Log = slog.New(slog.NewTextHandler(&said, nil))
	c := spawn(t, spec)
	defer c.Close()
	l := listenInside(t, c.Sockets, unix.AF_INET, "127.0.0.1")
	defer l.Close()
	seen := map[int]bool{}
	for i := range 3 {
		var pid int
		testkit.Eventually(t, "a maker", func() bool { pid = c.Sockets.maker(); return pid != 0 })
		if seen[pid] {
			t.Fatalf("%d is there after its death", pid)
		}
		seen[pid] = true
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				ask := func() error {
					fd, err := c.Sockets.Socket(unix.AF_INET6, unix.SOCK_DGRAM)
					if err == nil {
						err = unix.Close(fd)
					}
					return err
				}
				if err := ask(); err != nil && i == 0 {
					t.Errorf("after the first death: %v", err)
				} else if err != nil && !errors.Is(err, errOften) {
					t.Error(err)
				}
				testkit.Eventually(t, "a socket", func() bool { return ask() == nil })
			})
		}
		all.Wait()
	}
	from := netip.MustParseAddr("198.18.0.3")
	if got, _ := reach(t, c.Sockets, unix.AF_INET, from, netip.MustParseAddrPort(l.Addr().String()), l); got != "hello" {
		t.Errorf("the listener from before got %q", got)
	}
	last := c.Sockets.maker()
	c.Close()
	if err := syscall.Kill(last, 0); err != syscall.ESRCH {
		t.Errorf("the maker %d after the end: %v", last, err)
	}
	n := strings.Count(said.String(), `it is started again" how="signal 9 (killed)"`)
	if n != 3 || strings.Count(said.String(), "\n") != 3 {
		t.Errorf("three deaths, and the log says\n%s", &said)
	}
}

// TestSpawnMakerStopped: a maker that does not answer is replaced, and the one who asked gets a socket.
func TestSpawnMakerStopped(t *testing.T) {
	testkit.CheckLeaks(t)
	defer func(d time.Duration) { makerTimeout = d }(makerTimeout)
	makerTimeout = time.Second
	c := spawn(t, socketsSpec("sleep", "60"))
	defer c.Close()
	pid := c.Sockets.maker()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	fd, err := c.Sockets.Socket(unix.AF_INET, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if now := c.Sockets.maker(); now == pid {
		t.Error("it is the same maker")
	}
}

// TestSpawnMakerSilent: a new maker that does not answer in time is ended, and the error says so.
func TestSpawnMakerSilent(t *testing.T) {
	testkit.CheckLeaks(t)
	c := spawn(t, socketsSpec("sleep", "60"))
	defer c.Close()
	defer func(d time.Duration) { makerTimeout = d }(makerTimeout)
	makerTimeout = time.Nanosecond
	if _, _, err := c.Sockets.program.newMaker(); err == nil || err.Error() != "it did not answer within 1ns" {
		t.Error(err)
	}
}

// TestSocketsFromFile: if the file is no socket, the maker is left to the caller, who ends it once.
func TestSocketsFromFile(t *testing.T) {
	testkit.CheckLeaks(t)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	maker := exec.Command("sleep", "60")
	if err := maker.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = maker.Process.Kill(); _ = maker.Wait() }()
	if _, err := socketsFromFile(f, maker.Process.Pid, os.Getpid(), nil); err == nil {
		t.Error("a device is a socket")
	}
	if err := syscall.Kill(maker.Process.Pid, 0); err != nil {
		t.Errorf("the maker: %v", err)
	}
}

// TestSpawnMakerClosed closes at several instants after the death of the maker, so that another one is just being started.
func TestSpawnMakerClosed(t *testing.T) {
	testkit.CheckLeaks(t)
	for i := range 4 {
		c := spawn(t, socketsSpec("sleep", "60"))
		_ = syscall.Kill(c.Sockets.maker(), syscall.SIGKILL)
		testkit.Pace(time.Duration(i) * 5 * time.Millisecond)
		c.Close()
		if pid := c.Sockets.maker(); pid != 0 {
			t.Errorf("the maker %d is left", pid)
		}
	}
	var ws syscall.WaitStatus
	if pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); err != syscall.ECHILD {
		t.Errorf("there is still a child: %d, %v", pid, err)
	}
}

// TestTender: a process that cannot be started is tried again, and the log says so once for each reason.
func TestTender(t *testing.T) {
	testkit.CheckLeaks(t)
	var said bytes.Buffer
	ended, starts := make(chan string), 0
	tender := newTender("x", slog.New(slog.NewTextHandler(&said, nil)), func() string { return <-ended }, func() error {
		if starts++; starts < 3 {
			return os.ErrPermission
		}
		return nil
	})
	go tender.tend()
	ended <- "badly"
	ended <- "again" // it was started
	close(tender.stop)
	select {
	case <-tender.done:
	case ended <- "on demand":
		<-tender.done
	}
	if starts < 3 || strings.Count(said.String(), "permission denied") != 1 || !strings.Contains(said.String(), "how=badly") {
		t.Errorf("%d starts\n%s", starts, &said)
	}
}
