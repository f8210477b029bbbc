package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// keepReadyFD checks the descriptor of --ready-fd, and closes it in the program, which would otherwise keep it open.
func keepReadyFD(cfg *config.Config) error {
	if cfg.ReadyFD < 0 {
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(cfg.ReadyFD), unix.F_GETFD, 0); err != nil {
		return fmt.Errorf("cannot use --ready-fd %d: %w: it must be open, as in %[1]d>FILE", cfg.ReadyFD, err)
	}
	unix.CloseOnExec(cfg.ReadyFD)
	return nil
}

// announce tells waiting processes that the program has its network: it writes the file of --pid-file and the line of
// --ready-fd. end removes the file.
func announce(cfg *config.Config) (end func(), err error) {
	end = func() {}
	if cfg.PIDFile != "" {
		pid := strconv.Itoa(os.Getpid()) + "\n"
		if err := replaceFile(cfg.PIDFile, pid); err != nil {
			return nil, fmt.Errorf("cannot write the process id to %s: %w", cfg.PIDFile, err)
		}
		end = func() {
			if b, err := os.ReadFile(cfg.PIDFile); err == nil && string(b) == pid { // another process may have replaced the file
				_ = os.Remove(cfg.PIDFile)
			}
		}
	}
	if cfg.ReadyFD >= 0 {
		f := os.NewFile(uintptr(cfg.ReadyFD), "ready-fd")
		_, err := f.WriteString("READY\n")
		if err = errors.Join(err, f.Close()); err != nil {
			end()
			return nil, fmt.Errorf("cannot write to --ready-fd %d: %w", cfg.ReadyFD, err)
		}
	}
	return end, nil
}

// replaceFile replaces a file atomically: a reader sees either the old content or the new one.
func replaceFile(path, content string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return plainPathError(err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(content)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return plainPathError(err)
}

// plainPathError returns the reason without the name of a temporary file.
func plainPathError(err error) error {
	var path *os.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		return path.Err
	case errors.As(err, &link):
		return link.Err
	}
	return err
}
