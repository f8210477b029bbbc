package daemon

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/process"
)

// env is the daemon's process: its log, and what was changed about the process.
type env struct {
	log   *slog.Logger
	level slog.LevelVar
	out   *os.File // where the log goes
	file  *os.File // equals out if we must close it; nil: standard error

	decisions *os.File // nil: not wanted
	quiet     chan os.Signal
}

func newEnv(cfg *config.Config, stderr *os.File) (*env, error) {
	e := &env{quiet: make(chan os.Signal, 1)}
	e.out = stderr
	if cfg.LogFile != "" {
		f, err := openToAppend(cfg.LogFile)
		if err != nil {
			return nil, fmt.Errorf("cannot log to %s: %w", cfg.LogFile, err)
		}
		e.file, e.out = f, f
	}
	e.level.Set(cfg.LogLevel)
	e.logTo(e.out)
	// A log whose reader is gone must not end the network. The signal is caught instead of ignored, because the
	// program would inherit that.
	signal.Notify(e.quiet, syscall.SIGPIPE)
	process.Tune()
	return e, nil
}

func (e *env) logTo(w io.Writer) {
	e.log = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: &e.level}))
}

// queueLog makes log lines wait in a queue until end is called: a log that nobody reads must not block a whole host.
func (e *env) queueLog() (end func()) {
	q := process.NewLogQueue(e.out)
	e.logTo(q)
	return q.Close
}

func (e *env) close() {
	signal.Stop(e.quiet)
	if e.file != nil {
		e.file.Close()
	}
	if e.decisions != nil {
		e.decisions.Close()
	}
}

// openDecisions opens the file of --decisions. It does not wait for the reader of a pipe, neither now nor when the
// data plane ends.
func (e *env) openDecisions(cfg *config.Config) (err error) {
	if cfg.Decisions == "" {
		return nil
	}
	if e.decisions, err = openToAppend(cfg.Decisions); err != nil {
		return fmt.Errorf("cannot write decisions to %s: %w", cfg.Decisions, err)
	}
	return nil
}

// openToAppend opens a file, which it creates with mode 600, or a pipe that somebody reads. Its errors do not contain the name.
func openToAppend(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NONBLOCK, 0o600)
	if errors.Is(err, syscall.ENXIO) {
		return nil, errors.New("nobody reads from this pipe: start its reader first")
	}
	if err != nil {
		return nil, process.PlainPathError(err)
	}
	return f, nil
}

// decisionsTo returns the writer for the data plane's decisions, or nil.
func (e *env) decisionsTo() io.Writer {
	if e.decisions == nil {
		return nil
	}
	return e.decisions
}

// programEnv returns the program's environment. It leaves out variables that name a proxy, which would be wrong
// inside the namespace, and our own variables, which may contain a password.
func programEnv(environ []string, keepProxy bool) []string {
	out := []string{} // nil would mean our whole environment
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, "VIASOCKS_") || !keepProxy && strings.HasSuffix(strings.ToLower(name), "_proxy") {
			continue
		}
		out = append(out, e)
	}
	return out
}
