package netns

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const plainMount = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// isolateMounts keeps our mounts inside the namespace. It makes them slave instead of private: mounts and, more
// importantly, unmounts of the host must still reach the program's namespace, or a disk stays busy as long as the
// program runs.
func isolateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cannot make the program's mount namespace: %w", err)
	}
	return nil
}

// contains reports whether path is one of dirs or below one of them.
func contains(dirs []string, path string) bool {
	for _, d := range dirs {
		if path == d || strings.HasPrefix(path, d+"/") {
			return true
		}
	}
	return false
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644) // regardless of the umask
}

func isLink(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode().Type() == os.ModeSymlink
}

// bindContent mounts a file with this content over target, which is opened with flags; O_NOFOLLOW means a link
// itself. The file lives in a tmpfs that is mounted briefly over some directory, and afterwards only the bind mount
// holds it. Nothing is written to the host.
func bindContent(target string, flags int, content string) error {
	fd, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var scratch string
	for _, d := range []string{"/tmp", "/run", "/var", "/mnt", "/etc"} {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			scratch = d
			break
		}
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", plainMount, "size=256k,mode=0755"); err != nil {
		return err
	}
	defer unix.Unmount(scratch, unix.MNT_DETACH)
	src := filepath.Join(scratch, filepath.Base(target))
	if err := writeFile(src, content); err != nil {
		return err
	}
	return unix.Mount(src, fmt.Sprintf("/proc/self/fd/%d", fd), "", unix.MS_BIND, "")
}

// mountSysfs mounts a sysfs of this network namespace over /sys and restores the mounts below it (cgroups). Errors
// are ignored: without it, /sys/class/net shows the host's interfaces, but no packet can reach them.
func mountSysfs() {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	points := mountsBelow(f, "/sys")
	f.Close()
	fds := make([]int, len(points))
	for i, p := range points {
		fd, err := unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			fd = -1
		}
		fds[i] = fd
	}
	var st unix.Statfs_t
	flags := uintptr(plainMount)
	if unix.Statfs("/sys", &st) == nil && st.Flags&unix.ST_RDONLY != 0 {
		flags |= unix.MS_RDONLY
	}
	mounted := unix.Mount("sysfs", "/sys", "sysfs", flags, "") == nil
	for i, fd := range fds {
		if fd < 0 {
			continue
		}
		if mounted {
			unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), points[i], "", unix.MS_BIND|unix.MS_REC, "")
		}
		unix.Close(fd)
	}
}

// mountsBelow returns the topmost mount points below dir from a mountinfo (proc(5)).
func mountsBelow(r io.Reader, dir string) (points []string) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 5 {
			continue
		}
		p := unescape.Replace(f[4])
		if strings.HasPrefix(p, dir+"/") && !contains(points, p) {
			points = append(points, p)
		}
	}
	return points
}
