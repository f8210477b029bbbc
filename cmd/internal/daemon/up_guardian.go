package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/route/kernel"
)

// guardian is a process of our own program that restores the host if we die without dismissing it. It makes fail-open
// work after kill -9, too. It waits for the end of a pipe, which the kernel closes whatever happens to us, and holds
// nothing else.
type guardian struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

const (
	guardianEnv = "VIASOCKS_GUARDIAN"
	farewell    = "farewell\n"
	// lockWait is how long the guardian waits for the lock of the dead daemon, which the kernel releases at the same
	// time.
	lockWait = 3 * time.Second
)

// will is the message to the guardian: the names by which to undo.
type will struct {
	TUN, NFTable    string
	StateDir        string
	Table, Priority int
	Mark, Mask      uint32
}

// startGuardian starts a guardian. Its messages go to stderr.
func startGuardian(cfg *config.Config, stderr *os.File) (*guardian, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = "viasocks-guardian"
	cmd.Env = []string{guardianEnv + "=1"}
	cmd.Dir = "/"
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // so that signals to our terminal's processes do not end it
	pipe, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("cannot start the guardian of fail-open: %w", err)
	}
	g := &guardian{cmd, pipe}
	if err := json.NewEncoder(pipe).Encode(will{cfg.TUN, cfg.Host.NFTable, cfg.StateDir, cfg.Table, cfg.Host.Priority, cfg.Mark,
		cfg.Mask}); err != nil {
		g.dismiss()
		return nil, fmt.Errorf("cannot start the guardian of fail-open: %w", err)
	}
	return g, nil
}

// dismiss ends the guardian: everything was undone, or shall stay. It does nothing if g is nil.
func (g *guardian) dismiss() {
	if g == nil {
		return
	}
	io.WriteString(g.pipe, farewell) // if the guardian is gone, it need not be dismissed
	g.pipe.Close()
	g.cmd.Wait()
}

// MainIfGuardian must be called at the start of main. In a guardian it does the guardian's work and does not return.
func MainIfGuardian() {
	if os.Getenv(guardianEnv) == "" {
		return
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	if err := guard(os.Stdin, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintf(os.Stderr, "viasocks: cannot restore the host: %s\n", control.Plain(err.Error()))
		os.Exit(1)
	}
	os.Exit(0)
}

// guard waits for the end of in, and then undoes unless it has read a farewell.
func guard(in io.Reader, log *slog.Logger) error {
	r := bufio.NewReaderSize(in, 4096)
	line, err := r.ReadSlice('\n')
	if err != nil {
		return nil // the daemon died before it had changed anything
	}
	var w will
	if err := json.Unmarshal(line, &w); err != nil {
		return err
	}
	if line, _ := r.ReadSlice('\n'); string(line) == farewell {
		return nil
	}
	path, err := control.Path(w.StateDir)
	if err != nil {
		return err
	}
	var lock *control.Lock
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		if lock, err = control.TakeHost(path); !errors.Is(err, control.ErrLocked) || time.Now().After(end) {
			break
		}
	}
	if errors.Is(err, control.ErrLocked) {
		return nil // another daemon is up and has taken over
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	_ = privsock.RemoveUnused(path) // the next daemon tries again
	lines, err := kernel.Undo(kernel.Config{
		TUN: w.TUN, Table: w.Table, Priority: w.Priority, NFTable: w.NFTable, Dir: w.StateDir,
		Marks: kernel.MarksFrom(w.Mark, w.Mask), FailOpen: true, Log: log,
	})
	if len(lines) > 0 {
		log.Warn("viasocks died: the host was restored (--fail-open)", "removed", len(lines))
	}
	return err
}
