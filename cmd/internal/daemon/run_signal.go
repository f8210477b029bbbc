package daemon

import (
	"fmt"
	"log/slog"
	"strings"
	"syscall"
)

// tellSignal says that a signal ended the program of `run`, as the shell would if it were its parent: for it, viasocks has
// exited. It says nothing of signals by which users and pipes end programs, and nothing if sig is 0.
func tellSignal(log *slog.Logger, sig syscall.Signal, core bool) {
	switch sig {
	case 0, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT:
		return
	}
	var about []string
	if name := sig.String(); !strings.HasPrefix(name, "signal ") {
		about = append(about, name)
	}
	if core {
		about = append(about, "core dumped")
	}
	text := fmt.Sprintf("the program was ended by signal %d", int(sig))
	if len(about) > 0 {
		text += " (" + strings.Join(about, ", ") + ")"
	}
	log.Warn(text)
}
