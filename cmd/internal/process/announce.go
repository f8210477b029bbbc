package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/atomicfile"
)

// KeepReadyFD checks the descriptor of --ready-fd, and closes it in the program, which would otherwise keep it open. A
// negative one means that there is none.
func KeepReadyFD(fd int) error {
	if fd < 0 {
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return fmt.Errorf("cannot use --ready-fd %d: %w: it must be open, as in %[1]d>FILE", fd, err)
	}
	unix.CloseOnExec(fd)
	return nil
}

// leftoverAge is the age at which an unfinished file of --pid-file is one of a killed viasocks.
const leftoverAge = time.Minute

// Announce tells waiting processes that the program has its network: it writes the file of --pid-file and the line of
// --ready-fd. end removes the file.
func Announce(pidFile string, readyFD int) (end func(), err error) {
	end = func() {}
	if pidFile != "" {
		pid := strconv.Itoa(os.Getpid()) + "\n"
		atomicfile.RemoveUnfinished(pidFile, leftoverAge)
		write := func(w io.Writer) error { _, err := io.WriteString(w, pid); return err }
		if err := atomicfile.Replace(pidFile, 0o644, write); err != nil {
			return nil, fmt.Errorf("cannot write the process id to %s: %w", pidFile, PlainPathError(err))
		}
		end = func() {
			if b, err := os.ReadFile(pidFile); err == nil && string(b) == pid { // another process may have replaced the file
				_ = os.Remove(pidFile)
			}
		}
	}
	if readyFD >= 0 {
		f := os.NewFile(uintptr(readyFD), "ready-fd")
		_, err := f.WriteString("READY\n")
		if err = errors.Join(err, f.Close()); err != nil {
			end()
			return nil, fmt.Errorf("cannot write to --ready-fd %d: %w", readyFD, err)
		}
	}
	return end, nil
}

// PlainPathError returns the reason without the name of a temporary file.
func PlainPathError(err error) error {
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
