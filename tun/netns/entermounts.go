package netns

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// mountsOf returns the files on which the network namespace with this inode is mounted, according to a file in the form
// of /proc/self/mountinfo (proc_pid_mountinfo(5)).
func mountsOf(mountinfo string, ino uint64) (paths []string) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return nil
	}
	defer f.Close()
	root := fmt.Sprintf("net:[%d]", ino)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && fields[3] == root {
			paths = append(paths, unescape(fields[4]))
		}
	}
	return paths
}

// unescape replaces \040 and the like, which stand for spaces, tabs, line feeds and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
