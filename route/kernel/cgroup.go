package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupMount returns where cgroups of version 2 are mounted. On hosts with both versions it differs from the usual
// place.
func cgroupMount() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("cannot find the cgroup2 mount: %w", err)
	}
	return cgroupMountIn(b)
}

// cgroupMountIn finds the cgroup2 mount in the content of mountinfo.
func cgroupMountIn(mountinfo []byte) (string, error) {
	for line := range bytes.Lines(mountinfo) { // 36 35 98:0 /root /where options ... - cgroup2 source options
		before, after, ok := strings.Cut(string(line), " - ")
		f := strings.Fields(before)
		if ok && len(f) >= 5 && strings.HasPrefix(after, "cgroup2 ") {
			return strings.ReplaceAll(f[4], `\040`, " "), nil
		}
	}
	return "", errors.New("cannot choose by cgroup: no cgroup2 is mounted: run 'mount -t cgroup2 none /sys/fs/cgroup' first; " +
		"'ip netns exec' gives a program a /sys without it, and 'nsenter --net=/run/netns/NAME' does not")
}

// cgroup looks up a path below the mount. A group that existed before may be missing now: its service may be stopped,
// and then it contains no process.
func (c *Config) cgroup(path string) (cgroup, error) {
	cg, err := findCgroup(path)
	if err != nil {
		if known, ok := c.groups[path]; ok {
			return known, nil
		}
		return cg, err
	}
	if c.groups != nil {
		c.groups[path] = cg
	}
	return cg, nil
}

// madeAnew reports whether a control group that the filter knows has another inode now, because its service was
// restarted.
func (c *Config) madeAnew() bool {
	for path, known := range c.groups {
		if cg, err := findCgroup(path); err == nil && cg.id != known.id {
			return true
		}
	}
	return false
}

// findCgroup looks up a path below the mount.
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

// maxCgroups limits how many control groups CgroupPath examines.
const maxCgroups = 1 << 16

// CgroupPath finds the control group (version 2) whose directory has this inode. The path is relative to the mount,
// without a slash at either end. It is empty for the root and if there is no such group.
func CgroupPath(inode uint64) (string, error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", err
	}
	found, seen := "", 0
	err = filepath.WalkDir(mount, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // a group may end during the walk
		}
		if seen++; seen > maxCgroups {
			return filepath.SkipAll
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Ino == inode {
			found = strings.Trim(strings.TrimPrefix(path, mount), "/")
			return filepath.SkipAll
		}
		return nil
	})
	return found, err
}
