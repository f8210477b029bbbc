package harness

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// SeenFlags are options for the viasocks that is looked at: its proxy may take as long as the machine stalls.
var SeenFlags = []string{"--connect-timeout", "1m", "--handshake-timeout", "1m"}

// Seen looks at a viasocks under load: 64 clients open connections as fast as they can, while `flows --watch`, a watcher
// that does not read, `top`, `status` and `flows` look on.
type Seen struct {
	Command func(args ...string) *exec.Cmd // a command of viasocks about the one that is looked at
	Enter   func() error                   // brings the calling thread into the network of the program or host that is carried
	To      netip.AddrPort                 // answers one byte with one byte and closes the connection: see AnswerByte
	PID     int                            // the viasocks that is looked at
	For     time.Duration
}

const (
	seenClients = 64
	// seenLimit is how long a watcher may live, and seenPatience how long a connection may take, on a machine that stalls.
	seenLimit    = 3 * time.Minute
	seenPatience = time.Minute
	// seenMemory is how much memory viasocks and a watcher may have at most. What is unread is bounded at 1,024 events for each
	// watcher; without a bound, it would be some 100 MB after ten seconds.
	seenMemory = 64 << 20
)

// Check makes the load and looks on.
func (s *Seen) Check(t testing.TB) {
	t.Helper()
	s.connect(t) // what is made once is there
	before := files(t, s.PID)
	reader, late := s.watch(t), s.watch(t)
	top := s.top(t)
	s.began(t, reader, late)
	late.pause()
	made := s.load(t)
	t.Logf("%d connections in %v; %v", made, s.For, reader)

	// A connection is one flow with four events, or more flows if viasocks gave an attempt up before the program did.
	least := 4 * uint64(made)
	testkit.Eventually(t, fmt.Sprintf("%d events, seen or lost", least), func() bool { return reader.sum() >= least })
	if events, _ := reader.counts(); events < least/100 {
		t.Errorf("%d events were seen, of %d", events, least)
	}
	for _, p := range []struct {
		name string
		pid  int
	}{{"viasocks", s.PID}, {"flows --watch", reader.cmd.Process.Pid}, {"the watcher that does not read", late.cmd.Process.Pid}} {
		most := peak(t, p.pid)
		t.Logf("%s had %.1f MiB at most", p.name, float64(most)/(1<<20))
		if most > seenMemory && !Race {
			t.Errorf("%s had %d bytes", p.name, most)
		}
	}
	if screen := top.String(); !strings.Contains(screen, "FLOWS") {
		t.Errorf("top shows nothing: %q", Tail(screen, 20))
	}
	// The watcher that did not read gets the rest now, with a count of what is missing: no event is missing at one of the two
	// watchers without being counted. Or it was disconnected, and is told why.
	late.resume()
	testkit.Eventually(t, "the rest for the watcher that did not read", func() bool {
		return late.sum() == reader.sum() && late.sum() >= least || strings.Contains(late.log.String(), "was not read")
	})
	t.Logf("the watcher that did not read: %v; %s", late, &late.log)
	late.end()
	reader.end()
	top.end()
	testkit.Eventually(t, "what the watchers had to be closed", func() bool { return files(t, s.PID) <= before })
}

// connect makes one connection, in the network of the program.
func (s *Seen) connect(t testing.TB) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := s.Enter()
		if err == nil {
			err = askByte(s.To)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// hold calls f while a connection is open.
func (s *Seen) hold(t testing.TB, f func()) {
	t.Helper()
	var c net.Conn
	made := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := s.Enter()
		if err == nil {
			c, err = net.DialTimeout("tcp", s.To.String(), seenPatience)
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f()
}

// load opens connections for a time, and looks at status and flows meanwhile. It returns how many connections there were; none
// may fail.
func (s *Seen) load(t testing.TB) int {
	t.Helper()
	var made atomic.Int64
	var all sync.WaitGroup
	var failed atomic.Pointer[error]
	end := time.Now().Add(s.For)
	for range seenClients {
		all.Go(func() {
			runtime.LockOSThread()
			err := s.Enter()
			for err == nil && time.Now().Before(end) {
				if err = askByte(s.To); err == nil {
					made.Add(1)
				}
			}
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	pace := time.NewTicker(100 * time.Millisecond)
	defer pace.Stop()
	for asked := 0; time.Now().Before(end); asked++ {
		<-pace.C
		what := []string{"status", "flows"}[asked%2]
		started := time.Now()
		out, err := s.Command(what, "--json").Output()
		if err != nil || !json.Valid(out) {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
		if took := time.Since(started); took > seenPatience {
			t.Errorf("%s took %v", what, took)
		}
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		t.Errorf("a connection failed after %d: %v", made.Load(), *err)
	}
	return int(made.Load())
}

// askByte makes a connection for one byte and its answer. The other side closes first.
func askByte(to netip.AddrPort) error {
	c, err := net.DialTimeout("tcp", to.String(), seenPatience)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(seenPatience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{'x'}); err != nil {
		return err
	}
	if b, err := io.ReadAll(c); err != nil || len(b) != 1 {
		return fmt.Errorf("%d bytes came back: %w", len(b), err)
	}
	return nil
}

// AnswerByte serves connections for askByte until l is closed.
func AnswerByte(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(seenPatience))
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err == nil {
				_, _ = c.Write(b[:])
			}
		}()
	}
}

// seenBy is a `flows --watch --json` that is read.
type seenBy struct {
	cmd    *exec.Cmd
	read   sync.WaitGroup
	events atomic.Uint64
	lost   atomic.Uint64
	bad    atomic.Pointer[string]
	log    Log           // standard error
	reads  sync.Mutex    // held while it must not read
	paused bool          // by pause; used by the test's goroutine alone
	latest atomic.Uint64 // the flow that had an event last
	after  atomic.Uint64 // flows after this one count
}

func (s *Seen) watch(t testing.TB) *seenBy {
	t.Helper()
	w := &seenBy{cmd: s.Command("flows", "--watch", "--json")}
	w.after.Store(math.MaxUint64) // until began
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.cmd.Stderr = &w.log
	start(t, w.cmd)
	w.read.Go(func() {
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e struct {
				Event string
				Lost  uint64
				ID    uint64
			}
			w.reads.Lock() // not while it is paused
			switch err := json.Unmarshal(lines.Bytes(), &e); {
			case err != nil:
				text := lines.Text()
				w.bad.Store(&text)
			case e.Event == "lost":
				w.lost.Add(e.Lost)
			default:
				w.latest.Store(e.ID)
				if e.ID > w.after.Load() {
					w.events.Add(1)
				}
			}
			w.reads.Unlock()
		}
	})
	t.Cleanup(func() {
		w.resume()
		w.end()
		if text := w.bad.Load(); text != nil {
			t.Errorf("a line is not JSON: %s", *text)
		}
	})
	return w
}

// began waits until all watches have begun. From then on, each new flow has all its events; those of older flows do not count.
func (s *Seen) began(t testing.TB, all ...*seenBy) {
	t.Helper()
	for _, w := range all {
		testkit.Eventually(t, "the first event", func() bool {
			s.connect(t)
			return w.latest.Load() > 0
		})
	}
	type flow struct{ ID uint64 }
	var last struct{ Flows []flow }
	s.hold(t, func() {
		out, err := s.Command("flows", "--json").Output()
		if err == nil {
			err = json.Unmarshal(out, &last)
		}
		if err != nil || len(last.Flows) == 0 {
			t.Fatalf("flows does not show the connection that is open: %v: %s", err, out)
		}
	})
	for _, w := range all {
		w.after.Store(slices.MaxFunc(last.Flows, func(a, b flow) int { return cmp.Compare(a.ID, b.ID) }).ID)
	}
}

// pause makes it read nothing until resume.
func (w *seenBy) pause() {
	w.reads.Lock()
	w.paused = true
}

// resume may be called twice.
func (w *seenBy) resume() {
	if w.paused {
		w.paused = false
		w.reads.Unlock()
	}
}

func (w *seenBy) counts() (events, lost uint64) { return w.events.Load(), w.lost.Load() }

// sum is how many events there were for it: those that it saw, and those that were counted as lost.
func (w *seenBy) sum() uint64 {
	events, lost := w.counts()
	return events + lost
}

func (w *seenBy) String() string {
	events, lost := w.counts()
	return fmt.Sprintf("%d events seen, %d lost", events, lost)
}

// end terminates it. It may be called twice. SIGINT would be ignored where the tests run in the background of a shell script.
func (w *seenBy) end() {
	_ = w.cmd.Process.Signal(unix.SIGTERM)
	w.read.Wait()
	_ = w.cmd.Wait()
}

// screen is a program in a terminal.
type screen struct {
	Log
	cmd  *exec.Cmd
	pty  *os.File
	read sync.WaitGroup
}

// top runs `top` in a terminal of 80 columns and 24 lines.
func (s *Seen) top(t testing.TB) *screen {
	t.Helper()
	pty, tty, err := terminal(24, 80)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	p := &screen{cmd: s.Command("top"), pty: pty}
	p.cmd.Env = append(p.cmd.Environ(), "TERM=xterm-256color")
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, tty, tty
	start(t, p.cmd)
	p.read.Go(func() { _, _ = io.Copy(p, pty) })
	t.Cleanup(p.end)
	return p
}

// end closes the terminal, and with it the program must end. It may be called twice.
func (p *screen) end() {
	_ = p.pty.Close()
	_ = p.cmd.Wait()
	p.read.Wait()
}

// terminal opens a new pseudo-terminal. The caller closes both sides.
func terminal(rows, cols uint16) (pty, tty *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot open a terminal: %w", err)
	}
	pty = os.NewFile(uintptr(fd), "/dev/ptmx") // its reads end when it is closed
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		pty.Close()
		return nil, nil, err
	}
	return pty, tty, nil
}

// start starts cmd, and ends it with the test. It is killed after seenLimit, so that nothing waits for it in vain.
func start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(seenLimit, func() {
		t.Errorf("%v did not end within %v", cmd, seenLimit)
		_ = cmd.Process.Kill()
	})
	t.Cleanup(func() {
		late.Stop()
		_ = cmd.Process.Kill()
	})
}

// files counts the open descriptors of a process.
func files(t testing.TB, pid int) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// peak returns the most memory that a process has had resident, in bytes.
func peak(t testing.TB, pid int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if _, err := fmt.Sscanf(string(line), "VmHWM: %d kB", &n); err == nil {
			return n << 10
		}
	}
	t.Fatalf("no VmHWM of process %d", pid)
	return 0
}
