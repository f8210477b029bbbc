// Package atomicfile replaces files atomically. route/kernel has a copy of this for its journal, because it imports no
// package of ours.
package atomicfile

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Replace writes a file of the given mode, which replaces path when it is complete. A reader sees either the old content
// or the new one. If anything fails, path does not change, and nothing else is left behind.
func Replace(path string, mode os.FileMode, write func(io.Writer) error) error {
	return replace(path, mode, false, write)
}

// ReplaceOnDisk is Replace for a file that must survive a crash of the host: when it returns, the file is on the disk.
func ReplaceOnDisk(path string, mode os.FileMode, write func(io.Writer) error) error {
	if err := replace(path, mode, true, write); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Unfinished returns how the names of files begin that do not yet have the name path. Digits follow. A process that is
// killed while it writes leaves such a file behind.
func Unfinished(path string) string { return "." + filepath.Base(path) + "-" }

// RemoveUnfinished removes the files that killed writers of path left behind, unless they are younger than age: then another
// process may be writing them.
func RemoveUnfinished(path string, age time.Duration) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return
	}
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), Unfinished(path))
		if _, err := strconv.ParseUint(number, 10, 64); !ok || err != nil || !e.Type().IsRegular() {
			continue
		}
		if st, err := e.Info(); err == nil && time.Since(st.ModTime()) >= age {
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}

// mayReplace returns an error if path exists and is not a regular file. A rename would replace a device such as /dev/null, and
// a symbolic link instead of the file that it points to.
func mayReplace(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	why := ""
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		why = "it is a directory"
	case mode.Type() == fs.ModeSymlink:
		why = "it is a symbolic link"
	default:
		why = "it is not a regular file"
	}
	return &os.PathError{Op: "replace", Path: path, Err: errors.New(why)}
}

func replace(path string, mode os.FileMode, sync bool, write func(io.Writer) error) (err error) {
	if err := mayReplace(path); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), Unfinished(path)+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // it may be gone already
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil && sync {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
