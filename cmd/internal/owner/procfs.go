package owner

import (
	"bytes"
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// The open files of other users' processes are visible only with CAP_SYS_PTRACE. Without it, these processes are
// skipped.

// Holders lists the processes that have the socket with this inode open.
func Holders(inode uint32) (pids []string) {
	for _, pid := range processes() {
		if HasSocket(pid, inode) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Descendants adds to pids their children, and the children of these.
func Descendants(pids []string) []string {
	children := map[string][]string{}
	for _, pid := range processes() {
		if p := Parent(pid); p != "" {
			children[p] = append(children[p], pid)
		}
	}
	out := slices.Clone(pids)
	for i := 0; i < len(out); i++ {
		for _, c := range children[out[i]] {
			if !slices.Contains(out, c) {
				out = append(out, c)
			}
		}
	}
	return out
}

// processes lists all process ids.
func processes() []string {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	return slices.DeleteFunc(names, func(name string) bool {
		_, err := strconv.Atoi(name)
		return err != nil
	})
}

// lightFirst returns processes in the order in which their files are looked at: those with the fewest first, because one with
// thousands of them takes longer than many a connection lives. Among equals the newest come first, since those that make
// connections are hardly ever the oldest. pids are in the order of /proc, ascending.
func lightFirst(pids []string, files func(pid string) int64) []string {
	slices.Reverse(pids)
	sizes := make(map[string]int64, len(pids))
	for _, pid := range pids {
		sizes[pid] = files(pid)
	}
	slices.SortStableFunc(pids, func(a, b string) int { return cmp.Compare(sizes[a], sizes[b]) })
	return pids
}

// openFiles returns the number of files that a process has open, which is the size of its directory of them since Linux 6.2. It
// is 0 before that, and if the process is not ours to see.
func openFiles(pid string) int64 {
	info, err := os.Stat(filepath.Join("/proc", pid, "fd"))
	if err != nil {
		return 0
	}
	return info.Size()
}

// Parent returns the id of a process's parent; "": the process has ended.
func Parent(pid string) string {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return ""
	}
	// proc_pid_stat(5): the name in parentheses may contain anything; state and parent follow it.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 2 {
		return ""
	}
	return string(f[1])
}

// ExeOf returns the executable of a process; "": we may not see it.
func ExeOf(pid string) string {
	exe, _ := os.Readlink(filepath.Join("/proc", pid, "exe"))
	return exe
}

// HasSocket reports whether a process has the socket with this inode open.
func HasSocket(pid string, inode uint32) (has bool) {
	sockets(pid, func(other uint32) bool {
		has = other == inode
		return !has
	})
	return has
}
