package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// journal contains what is needed to undo the changes. Each entry is on the disk before the change is made.
type journal struct {
	Version  int             `json:"version"`
	PID      int             `json:"pid"`
	TUN      string          `json:"tun"`
	Table    int             `json:"table"`
	Priority int             `json:"priority"`
	NFTable  string          `json:"nft_table"`
	Marks    Marks           `json:"marks"`
	Sysctls  []sysctlChange  `json:"sysctls,omitempty"`
	Done     map[string]bool `json:"done,omitempty"` // what may have been done: filter, routes, rules, tun
	Groups   []Group         `json:"groups,omitempty"`
}

type sysctlChange struct{ Key, Old, New string }

const journalVersion = 1

// paths returns names that contain the network namespace, because namespaces may share /run, and the boot, because
// the numbers of namespaces are reused.
func paths(dir string) (journal, lock string, err error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", "", fmt.Errorf("cannot identify the network namespace: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", fmt.Errorf("cannot identify the boot: %w", err)
	}
	base := filepath.Join(dir, fmt.Sprintf("host-%d-%s", st.Ino, strings.TrimSpace(string(boot))))
	return base + ".journal", base + ".lock", nil
}

// JournalPath returns the journal in dir for the caller's network namespace. If it is there and no process has its lock, the
// host was left closed.
func JournalPath(dir string) (string, error) {
	path, _, err := paths(dir)
	return path, err
}

// JournalsElsewhere returns the inodes of the network namespaces, except the caller's, that have a journal of this boot in dir.
// Some of them may have ended.
func JournalsElsewhere(dir string) (inodes []uint64) {
	own, err := JournalPath(dir)
	if err != nil {
		return nil
	}
	name := strings.SplitN(filepath.Base(own), "-", 3) // host, the inode, the boot
	all, _ := filepath.Glob(filepath.Join(dir, "host-*-"+name[2]))
	for _, path := range all {
		ino, err := strconv.ParseUint(strings.Split(filepath.Base(path), "-")[1], 10, 64)
		if err == nil && path != own {
			inodes = append(inodes, ino)
		}
	}
	return inodes
}

// takeLock creates dir if necessary.
func takeLock(path string) (*os.File, error) {
	for range 100 {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("cannot make the directory of the journal: %w", err)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cannot lock: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, ErrRunning
			}
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		mine, err := f.Stat()
		there, terr := os.Stat(path)
		if err == nil && terr == nil && os.SameFile(mine, there) {
			return f, nil
		}
		f.Close() // its holder removed it in the meantime, so this lock protects nothing
	}
	return nil, fmt.Errorf("cannot lock %s: it comes and goes", path)
}

// lockOf takes the lock at path, or a copy of the one that another viasocks has handed over. A lock of flock(2)
// belongs to the open file, so both hold it.
func lockOf(given *os.File, path string) (*os.File, error) {
	if given == nil {
		return takeLock(path)
	}
	mine, err := given.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot take over the lock: %w", err)
	}
	if there, err := os.Stat(path); err != nil || !os.SameFile(mine, there) {
		return nil, fmt.Errorf("cannot take over the lock: the other viasocks does not hold %s", path)
	}
	fd, err := unix.FcntlInt(given.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("cannot take over the lock: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// giveLock removes the file while the lock is still held, so that no two processes can hold it.
func giveLock(f *os.File) error {
	return errors.Join(os.Remove(f.Name()), f.Close())
}

// maxJournal limits what is read. Our journal has some hundred bytes.
const maxJournal = 1 << 20

// readJournal returns nil if there is no journal, and an error if it is corrupt.
func readJournal(path string) (*journal, error) {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil || st.Size() > maxJournal {
		return nil, errors.Join(errors.New("cannot read the journal "+path), err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the journal: %w", err)
	}
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, fmt.Errorf("cannot read the journal %s: %w", path, err)
	}
	if j.Version != journalVersion || j.TUN == "" || j.Table <= 0 || !nameRE.MatchString(j.NFTable) {
		return nil, fmt.Errorf("cannot read the journal %s: it is not complete", path)
	}
	for _, s := range j.Sysctls {
		if !knownSysctl(s.Key) {
			return nil, fmt.Errorf("cannot read the journal %s: it speaks of %q", path, s.Key)
		}
	}
	for _, g := range j.Groups {
		if g.Home != "" && !filepath.IsLocal(g.Home) {
			return nil, fmt.Errorf("cannot read the journal %s: it speaks of control group %q", path, g.Home)
		}
		if g.Path != filepath.Clean(g.Path) || strings.HasPrefix(g.Path, ".") || filepath.IsAbs(g.Path) ||
			!isProgramGroup("/"+g.Path) {
			return nil, fmt.Errorf("cannot read the journal %s: it speaks of control group %q", path, g.Path)
		}
	}
	return &j, nil
}

func (j *journal) write(path string) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if err := replaceFile(path, append(b, '\n')); err != nil {
		return fmt.Errorf("cannot write the journal: %w", err)
	}
	return nil
}

// replaceFile writes all of b or nothing. When it returns, the file is on the disk. It is a copy of what stack/atomicfile
// does, because this package imports none of ours.
func replaceFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	return syncDir(filepath.Dir(path))
}

// removeFile removes what replaceFile has written, and what it has left of files that it was killed before it could rename.
// Nobody else writes path meanwhile.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	dir := filepath.Dir(path)
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range all {
		number, ok := strings.CutPrefix(f.Name(), filepath.Base(path)+".")
		if _, err := strconv.ParseUint(number, 10, 64); !ok || err != nil {
			continue
		}
		if err := os.Remove(filepath.Join(dir, f.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// srcValidMark makes the kernel look up the reverse path of a packet with the mark that it got in prerouting. Without
// it, rp_filter=1 drops the answers that our own sockets and outside clients wait for.
const srcValidMark = "net/ipv4/conf/all/src_valid_mark"

// wasZero is the name of a counter in our table whose presence means that src_valid_mark was 0. If the journal is
// lost, it is the only record of this.
const wasZero = "was_src_valid_mark_0"

func knownSysctl(key string) bool { return key == srcValidMark }

func readSysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func writeSysctl(key, value string) error {
	if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
		return fmt.Errorf("cannot set %s: %w", strings.ReplaceAll(key, "/", "."), err)
	}
	return nil
}
