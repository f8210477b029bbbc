package target

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// readSome reads a file of at most limit bytes; a longer one is an error. It does not follow a symbolic link, and does not
// wait for the other end of a pipe.
func readSome(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, limit)
}

// readAll reads a file of at most limit bytes; a longer one is an error.
func readAll(f *os.File, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", f.Name(), limit)
	}
	return b, err
}

// readState reads a state file of an engine. It accepts only a regular file that belongs to root or to the caller, because any
// other user could write anything there.
func (s *system) readState(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	i, err := f.Stat()
	if err != nil {
		return nil, err
	}
	st, ok := i.Sys().(*syscall.Stat_t)
	switch {
	case !i.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case !ok || !s.trusts(int(st.Uid)):
		return nil, fmt.Errorf("%s belongs to another user", path)
	}
	return readAll(f, limit)
}

// trusts reports whether what a user says of containers is believed.
func (s *system) trusts(uid int) bool { return uid == 0 || uid == s.euid }
