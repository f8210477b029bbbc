package netns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	resolvConf = "/etc/resolv.conf"
	plainMount = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// resolverDirs have path sockets of the host's resolvers, which a network namespace does not cut: nss-resolve, nscd and
// avahi would answer from outside.
var resolverDirs = []string{"/run/systemd/resolve", "/run/nscd", "/var/run/nscd", "/run/avahi-daemon"}

// isolateMounts keeps our mounts inside. Slave and not private: what the host mounts and, more so, unmounts later must
// reach the program's namespace, or a disk stays busy for as long as the program runs.
func isolateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cannot make the program's mount namespace: %w", err)
	}
	return nil
}

// setResolver hides the host's resolvers and gives the program a resolv.conf with these servers. Without servers only
// the resolvers are hidden.
func setResolver(servers []netip.Addr) error {
	target, err := resolveLink(resolvConf)
	if err != nil {
		return fmt.Errorf("cannot set the program's resolver: %w", err)
	}
	content := resolvContent(servers, readSome(target)) // before a mask hides it
	var masked []string
	for _, d := range resolverDirs {
		real, err := filepath.EvalSymlinks(d)
		if err != nil || contains(masked, real) {
			continue
		}
		if err := unix.Mount("tmpfs", real, "tmpfs", plainMount, "size=64k,mode=0755"); err != nil {
			return fmt.Errorf("cannot hide %s from the program: %w", d, err)
		}
		masked = append(masked, real)
	}
	if len(servers) == 0 {
		return nil
	}
	if contains(masked, target) {
		err = writeFile(target, content)
	} else {
		err = bindContent(target, 0, content)
	}
	if errors.Is(err, unix.ENOENT) && isLink(resolvConf) {
		// It is a link to a file that does not exist, as when systemd-resolved does not run. The link itself is covered then:
		// the file can't be made without writing to the host.
		err = bindContent(resolvConf, unix.O_NOFOLLOW, content)
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot set the program's resolver: %s does not exist: make it, an empty file will do", target)
	}
	if err != nil {
		return fmt.Errorf("cannot set the program's resolver (%s): %w", target, err)
	}
	return nil
}

// contains reports whether path is one of dirs or below one.
func contains(dirs []string, path string) bool {
	for _, d := range dirs {
		if path == d || strings.HasPrefix(path, d+"/") {
			return true
		}
	}
	return false
}

// resolveLink follows path to the file that an open would reach or create: also if that does not exist.
func resolveLink(path string) (string, error) {
	for range 40 { // the kernel's own limit
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return path, nil // the error is told when it is opened
		}
		path = filepath.Join(dir, filepath.Base(path))
		link, err := os.Readlink(path)
		if err != nil {
			return path, nil // no link, or not there
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(dir, link)
		}
		path = link
	}
	return "", fmt.Errorf("%s: %w", path, unix.ELOOP)
}

// readSome reads a file of a sane size; a missing or unreadable one is empty.
func readSome(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return string(b)
}

// resolvContent is a resolv.conf with servers that keeps the search list and the options of old, so that short names mean
// what they meant; but not trust-ad, which speaks of a server that is not asked any more.
func resolvContent(servers []netip.Addr, old string) string {
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	for line := range strings.SplitSeq(old, "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "search", "domain":
			b.WriteString(strings.Join(f, " ") + "\n")
		case "options":
			var kept []string
			for _, o := range f {
				if o != "trust-ad" {
					kept = append(kept, o)
				}
			}
			if len(kept) > 1 {
				b.WriteString(strings.Join(kept, " ") + "\n")
			}
		}
	}
	return b.String()
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644) // whatever the umask
}

func isLink(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode().Type() == os.ModeSymlink
}

// bindContent mounts a file with this content over target, which is opened with flags: O_NOFOLLOW means a link itself. The
// file lives in a tmpfs that was mounted for a moment over some directory and is held by the bind mount alone afterwards:
// nothing is written to the host.
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
	if err := unix.Mount("tmpfs", scratch, "tmpfs", plainMount, "size=64k,mode=0755"); err != nil {
		return err
	}
	defer unix.Unmount(scratch, unix.MNT_DETACH)
	src := filepath.Join(scratch, "resolv.conf")
	if err := writeFile(src, content); err != nil {
		return err
	}
	return unix.Mount(src, fmt.Sprintf("/proc/self/fd/%d", fd), "", unix.MS_BIND, "")
}

// mountSysfs mounts a sysfs of this network namespace over /sys and puts what was mounted below it (cgroups) back. Best
// effort: without it /sys/class/net names the host's interfaces, which carries no packet anywhere.
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

// mountsBelow lists the topmost mount points below dir from a mountinfo (proc(5)).
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
