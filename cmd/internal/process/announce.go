package process

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("cannot use --ready-fd %d: %w: it must be open, as in %[1]d>FILE", fd, err)
	}
	// What a caller opens for us is kept over exec. A descriptor that is not is one of the Go runtime: closing it would
	// end viasocks.
	if own, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || own&unix.FD_CLOEXEC != 0 {
		return fmt.Errorf("cannot use --ready-fd %d: %w: it must be open, as in %[1]d>FILE", fd, unix.EBADF)
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return fmt.Errorf("cannot use --ready-fd %d: it is open only for reading: open it for writing, as in %[1]d>FILE", fd)
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
			return nil, fmt.Errorf("cannot write the process id to %s: %w%s", pidFile, PlainPathError(err), hint(err))
		}
		end = func() {
			if holds(pidFile, pid) { // another process may have replaced the file
				_ = os.Remove(pidFile)
			}
		}
	}
	if readyFD >= 0 {
		f := os.NewFile(uintptr(readyFD), "ready-fd")
		_, err := f.WriteString("READY\n")
		if err = errors.Join(err, f.Close()); err != nil {
			end()
			return nil, fmt.Errorf("cannot write to --ready-fd %d: %w", readyFD, PlainPathError(err))
		}
	}
	return end, nil
}

// hint says what to do about a --pid-file that cannot be written.
func hint(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ": make its directory"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return ": choose a directory that you may write to"
	}
	return ": choose another file"
}

// holds reports whether path is a regular file whose whole content is text. It never blocks, whatever else path is.
func holds(path, text string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(len(text))+1))
	return err == nil && string(b) == text
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
