package daemon

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// env is what surrounds the daemon: its log, and what it changed about its own process.
type env struct {
	log   *slog.Logger
	level slog.LevelVar
	out   *os.File // of the log
	file  *os.File // is out, if it is ours to close; nil: standard error

	decisions *os.File // nil: nobody wants them
	quiet     chan os.Signal
}

func newEnv(cfg *config.Config, stderr *os.File) (*env, error) {
	e := &env{quiet: make(chan os.Signal, 1)}
	e.out = stderr
	if cfg.LogFile != "" {
		f, err := os.OpenFile(cfg.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cannot log to %s: %w", cfg.LogFile, err.(*os.PathError).Err)
		}
		e.file, e.out = f, f
	}
	e.level.Set(cfg.LogLevel)
	e.logTo(e.out)
	// A log that nobody reads any more must not take the network with it. Caught and not ignored: the program would
	// inherit that.
	signal.Notify(e.quiet, syscall.SIGPIPE)
	tuneMemory()
	return e, nil
}

func (e *env) logTo(w io.Writer) {
	e.log = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: &e.level}))
}

// queueLog lets lines wait for whoever reads them, until end: a log that nobody reads must not hold up a whole host.
func (e *env) queueLog() (end func()) {
	q := newLogQueue(e.out)
	e.logTo(q)
	return q.close
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

// openDecisions opens the file of --decisions. It does not wait for the reader of a pipe: not here, and not when the data
// plane ends.
func (e *env) openDecisions(cfg *config.Config) (err error) {
	if cfg.Decisions == "" {
		return nil
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND | syscall.O_NONBLOCK
	if e.decisions, err = os.OpenFile(cfg.Decisions, flags, 0o600); err != nil {
		return fmt.Errorf("cannot write decisions to %s: %w", cfg.Decisions, err.(*os.PathError).Err)
	}
	return nil
}

// decisionsTo is where the data plane writes them; nil: nowhere.
func (e *env) decisionsTo() io.Writer {
	if e.decisions == nil {
		return nil
	}
	return e.decisions
}

// tuneMemory trades memory for time: most of ours are buffers that live as long as a connection, and a collection
// walks them all. Measured: 10 to 20 % of the CPU. The limit makes the collector work more again when the trade
// would become dear. The user's own GOGC and GOMEMLIMIT win.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if total := memory(); total > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(total / 4)
	}
}

// memory is what there is, in bytes: the machine's, or the control group's if that is less; 0: can't be told.
func memory() int64 {
	var total int64
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kb int64
		if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kb); err == nil {
			total = kb << 10
		}
	}
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		if _, path, ok := strings.Cut(strings.TrimSpace(string(b)), "0::"); ok {
			path, _, _ = strings.Cut(path, "\n")
			if b, err := os.ReadFile("/sys/fs/cgroup" + path + "/memory.max"); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && (total == 0 || n < total) {
					total = n
				}
			}
		}
	}
	return total
}

// programEnv is the program's environment: without variables that name a proxy, which inside its namespace would
// mean somebody else's idea of the way out, and without ours, which may hold a password.
func programEnv(environ []string, keepProxy bool) []string {
	out := []string{} // not nil, which would mean all of ours
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, "VIASOCKS_") || !keepProxy && strings.HasSuffix(strings.ToLower(name), "_proxy") {
			continue
		}
		out = append(out, e)
	}
	return out
}
