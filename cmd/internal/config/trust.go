package config

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// exists reports whether there is a file; what cannot be looked at is one, so that the error is told.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !os.IsNotExist(err)
}

// byteOrderMark is what some editors begin a file of text with. It is no part of the text.
var byteOrderMark = []byte("\ufeff")

// warnOfReaders warns when everybody can read a file that holds a secret.
func (c *Config) warnOfReaders(kind, path string, info os.FileInfo) {
	if info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("everybody can read the %s %s: chmod 600 it", kind, path))
	}
}

// warnOfWriters warns when somebody else than root and the caller can change what a file says, or put another one in its place:
// who can do so decides where a whole host's traffic goes. kind is what it is, for the message.
func (c *Config) warnOfWriters(kind, path string, info os.FileInfo) {
	if !info.Mode().IsRegular() {
		return // a pipe, /dev/null
	}
	if who := writers(info); who != "" {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s can change the %s %s: chown root and chmod go-w it", who, kind, path))
		return
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return
	}
	dir := filepath.Dir(real)
	if info, err := os.Stat(dir); err == nil && info.Mode()&os.ModeSticky == 0 {
		if who := writers(info); who != "" {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s can replace the %s %s: chown root and chmod go-w %s", who, kind, path, dir))
		}
	}
}

// writers says who besides root and the caller can write what info is about; "": nobody. A group that the caller acts for, as
// where each user has a group of their own, is the caller.
func writers(info os.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	mode := info.Mode().Perm()
	switch {
	case mode&0o002 != 0:
		return "everybody"
	case !ok:
		return ""
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Sprintf("user %d", st.Uid)
	case mode&0o020 != 0 && st.Gid != 0 && int(st.Gid) != os.Getegid():
		return fmt.Sprintf("group %d", st.Gid)
	}
	return ""
}
