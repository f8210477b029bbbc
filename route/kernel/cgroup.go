package kernel

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupMount is where cgroups of version 2 are mounted. Hosts with both versions have it elsewhere than others.
func cgroupMount() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("cannot find the cgroup2 mount: %w", err)
	}
	for line := range bytes.Lines(b) { // 36 35 98:0 /root /where options ... - cgroup2 source options
		before, after, ok := strings.Cut(string(line), " - ")
		f := strings.Fields(before)
		if ok && len(f) >= 5 && strings.HasPrefix(after, "cgroup2 ") {
			return strings.ReplaceAll(f[4], `\040`, " "), nil
		}
	}
	return "", fmt.Errorf("cannot choose by cgroup: no cgroup2 is mounted")
}

// findCgroup looks a path below the mount up.
func findCgroup(path string) (cgroup, error) {
	mount, err := cgroupMount()
	if err != nil {
		return cgroup{}, err
	}
	rel := strings.Trim(filepath.Clean("/"+path), "/")
	if rel == "" {
		return cgroup{}, fmt.Errorf("cannot choose by cgroup %q: that is all", path)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(mount, rel), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return cgroup{}, fmt.Errorf("cannot choose by cgroup %q: there is none below %s", path, mount)
	}
	return cgroup{path: rel, level: uint32(strings.Count(rel, "/") + 1), id: st.Ino}, nil
}
