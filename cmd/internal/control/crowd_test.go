package control

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/testkit"
)

// Many programs that are excluded at a time wait for each other; what may not be asked twice says why it was not answered.
func TestCrowd(t *testing.T) {
	testkit.CheckLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	var excluded atomic.Int32
	exclude := func(Process) error { excluded.Add(1); return nil }
	b := Backend{Status: sample, Exclude: exclude}
	s, err := Listen(Options{Path: path, Group: -1, Log: slog.New(slog.DiscardHandler), Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var silent []net.Conn
	for range maxConns {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	testkit.Eventually(t, "all to be connected", func() bool { return s.l.owners.Load() >= maxConns })
	c := NewClient(path)
	defer c.Close()
	if err := c.Confirm(); err == nil || !strings.Contains(err.Error(), "too many ask it at once: try again") {
		t.Error(err)
	}
	done := make(chan error)
	go func() { done <- c.Exclude() }()
	testkit.Never(t, 200*time.Millisecond, "an answer although there is no place", func() bool { return excluded.Load() != 0 })
	for _, c := range silent {
		c.Close()
	}
	if err := <-done; err != nil || excluded.Load() != 1 {
		t.Errorf("%v, and %d were excluded", err, excluded.Load())
	}
}

// A host that a killed viasocks has left closed is not one without viasocks.
func TestLeftClosed(t *testing.T) {
	dir := t.TempDir()
	path, err := Path(dir)
	if err != nil {
		t.Fatal(err)
	}
	ask := func() string { c := NewClient(path); defer c.Close(); return c.Confirm().Error() }
	if got := ask(); got != ErrNoDaemon.Error() {
		t.Error(got)
	}
	journal, err := kernel.JournalPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(journal, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	const closed = "the host was left closed: 'viasocks up' carries it again, 'viasocks down' opens it"
	if got := ask(); !strings.Contains(got, closed) {
		t.Error(got)
	}
}

// A user with many sockets that do not answer cannot make root wait for each of them.
func TestSilentInstances(t *testing.T) {
	testkit.CheckLeaks(t)
	r := runtimeOf(t)
	d, err := r.create()
	if err != nil {
		t.Fatal(err)
	}
	d.unlock()
	defer d.close()
	const many = 10 * lookers
	for i := range many {
		l, err := net.Listen("unix", d.at(fmt.Sprintf("%s%d-a.sock", runPrefix, i+1)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	begun := time.Now()
	got := Instances(r, "")
	if took := time.Since(begun); took > many/lookers*lookTimeout/2 {
		t.Errorf("it took %v", took)
	}
	if len(got) < maxSilent || len(got) >= maxSilent+2*lookers || got[0].State != NoAnswer {
		t.Errorf("%d are listed", len(got))
	}
}
