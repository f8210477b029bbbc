package config

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// exists reports whether there is a file. It returns true for a file that cannot be examined, so that opening it
// reports the error.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !os.IsNotExist(err)
}

// byteOrderMark is what some editors write at the start of a text file. It is not part of the text.
var byteOrderMark = []byte("\ufeff")

// warnOfReaders warns if everybody can read a file with a secret.
func (c *Config) warnOfReaders(kind, path string, info os.FileInfo) {
	if info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("everybody can read the %s %s: chmod 600 it", kind, path))
	}
}

// warnOfWriters warns if users other than root and the caller can change a file or replace it, because they could
// decide where a whole host's traffic goes. kind describes the file in the message.
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
			c.Warnings = append(
				c.Warnings,
				fmt.Sprintf("%s can replace the %s %s: chown root and chmod go-w %s", who, kind, path, dir),
			)
		}
	}
}

// writers describes who besides root and the caller can write to the file of info; "": nobody. The group of the
// caller's process counts as the caller, because many systems give each user a private group.
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
