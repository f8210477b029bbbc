package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Runtime tells where the control sockets of `viasocks run` are: in one directory for each user, where each instance
// has its own socket. Only the user can access the directory.
type Runtime struct {
	XDG string // XDG_RUNTIME_DIR; empty: not set
	Run string // contains the runtime directories of all users, by user number
	Tmp string // used if the user has no runtime directory
	UID int
}

// RuntimeOf returns the Runtime of the calling user with the environment environ.
func RuntimeOf(environ []string) Runtime {
	r := Runtime{Run: "/run/user", Tmp: "/tmp", UID: os.Geteuid()}
	for _, e := range environ {
		if v, ok := strings.CutPrefix(e, "XDG_RUNTIME_DIR="); ok {
			r.XDG = v
		}
	}
	return r
}

// runDirName is the name of the directory below a runtime directory. Below Tmp, the user's number follows.
const runDirName = "viasocks"

func (r Runtime) inTmp(uid int) string { return filepath.Join(r.Tmp, runDirName+"-"+strconv.Itoa(uid)) }

// candidates returns the possible directories of the user, the best first. It leaves out those whose parent does not
// exist or could be changed by other users.
func (r Runtime) candidates() (paths []string) {
	for _, parent := range []string{r.XDG, filepath.Join(r.Run, strconv.Itoa(r.UID))} {
		if filepath.IsAbs(parent) && privsock.IsOwnDir(parent, r.UID) {
			paths = append(paths, filepath.Join(parent, runDirName))
		}
	}
	return append(paths, r.inTmp(r.UID))
}

// Dir returns the user's runtime directory, or "" if there is none that only the user can change.
func (r Runtime) Dir() string {
	if dir := filepath.Dir(r.candidates()[0]); dir != r.Tmp {
		return dir
	}
	return ""
}

// create opens the first directory that can be used, creates it if it does not exist, and locks it.
func (r Runtime) create() (*runDir, error) {
	var errs []error
	for _, path := range r.candidates() {
		for try := 0; ; try++ {
			err := unix.Mkdir(path, 0o700)
			if err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("cannot make %s: %w", path, err))
				break
			}
			d, err := openRunDir(path, r.UID)
			if err == nil {
				if err = d.lock(); err == nil && d.removed() {
					err = unix.ENOENT
				}
				if err == nil {
					return d, nil
				}
				d.close()
			}
			if errors.Is(err, unix.ENOENT) && try < 10 { // its last user has just removed it
				continue
			}
			errs = append(errs, err)
			break
		}
	}
	return nil, errors.Join(errs...)
}

// place is where the directory of a user can be.
type place struct {
	path string
	uid  int
}

func (r Runtime) ownPlaces() (places []place) {
	for _, path := range r.candidates() {
		places = append(places, place{path, r.UID})
	}
	return places
}

// own opens the directories of the user that exist. Unsafe directories are left out.
func (r Runtime) own() []*runDir { return openPlaces(r.ownPlaces()) }

// existing is own, for root with those of all users.
func (r Runtime) existing() []*runDir {
	places := r.ownPlaces()
	if r.UID == 0 {
		users, _ := filepath.Glob(filepath.Join(r.Run, "*", runDirName))
		temps, _ := filepath.Glob(filepath.Join(r.Tmp, runDirName+"-*"))
		for _, path := range append(users, temps...) {
			owner := filepath.Base(filepath.Dir(path))
			if filepath.Dir(path) == r.Tmp {
				owner = strings.TrimPrefix(filepath.Base(path), runDirName+"-")
			}
			if uid, err := strconv.ParseUint(owner, 10, 31); err == nil {
				places = append(places, place{path, int(uid)})
			}
		}
	}
	return openPlaces(places)
}

func openPlaces(places []place) (dirs []*runDir) {
	seen := map[[2]uint64]bool{}
	for _, p := range places[:min(len(places), maxRunDirs)] {
		d, err := openRunDir(p.path, p.uid)
		if err != nil {
			continue
		}
		if seen[d.id] {
			d.close()
			continue
		}
		seen[d.id] = true
		dirs = append(dirs, d)
	}
	return dirs
}

// Limits of what is listed, because other users could create any number.
const (
	maxRunDirs    = 256
	maxRunSockets = 1024 // of one directory
)

// runDir is an open directory with sockets. After opening, only its descriptor is used, so that it cannot be replaced
// and the length of its path does not matter.
type runDir struct {
	f    *os.File
	path string
	uid  int
	id   [2]uint64 // device and inode
}

// openRunDir opens the directory of the user uid. It refuses one that others can access.
func openRunDir(path string, uid int) (*runDir, error) {
	f, err := privsock.OpenDir(path, uid)
	if err != nil {
		return nil, err
	}
	d := &runDir{f: f, path: path, uid: uid}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd(), &st); err != nil {
		d.close()
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	d.id = [2]uint64{st.Dev, st.Ino}
	return d, nil
}

func (d *runDir) close() { d.f.Close() }

func (d *runDir) fd() int { return int(d.f.Fd()) }

// at returns a path for a file in the directory that is short enough for the address of a unix socket.
func (d *runDir) at(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", d.fd(), name) }

// lockWait limits the wait for other instances of the same user, which hold the lock only briefly.
const lockWait = 2 * time.Second

// lock locks the directory until unlock or close. The lock covers the time between the creation of a socket and its
// first answer, during which it looks like that of a dead instance.
func (d *runDir) lock() error {
	for end := time.Now().Add(lockWait); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(d.fd(), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || errors.Is(err, unix.EINTR) {
			if err == nil {
				return nil
			}
			continue
		}
		if time.Now().After(end) {
			return fmt.Errorf("cannot lock %s: %w", d.path, err)
		}
	}
}

func (d *runDir) unlock() { _ = unix.Flock(d.fd(), unix.LOCK_UN) }

// removed reports whether the directory was unlinked.
func (d *runDir) removed() bool {
	var st unix.Stat_t
	return unix.Fstat(d.fd(), &st) != nil || st.Nlink == 0
}

// sockets returns the names of the sockets that belong to the user.
func (d *runDir) sockets() (names []string) {
	if _, err := d.f.Seek(0, 0); err != nil {
		return nil
	}
	all, _ := d.f.Readdirnames(maxRunSockets)
	for _, name := range all {
		var st unix.Stat_t
		if strings.HasPrefix(name, runPrefix) && strings.HasSuffix(name, ".sock") &&
			unix.Fstatat(d.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			st.Mode&unix.S_IFMT == unix.S_IFSOCK && int(st.Uid) == d.uid {
			names = append(names, name)
		}
	}
	return names
}

// reap removes the sockets of killed instances. The caller holds the lock of the directory.
func (d *runDir) reap() {
	for _, name := range d.sockets() {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return
		}
		if errors.Is(unix.Connect(fd, &unix.SockaddrUnix{Name: d.at(name)}), unix.ECONNREFUSED) {
			_ = unix.Unlinkat(d.fd(), name, 0)
		}
		unix.Close(fd)
	}
}

// remove removes a socket and, with the last one, the directory. It closes the descriptor.
func (d *runDir) remove(name string) {
	defer d.close()
	locked := d.lock() == nil
	_ = unix.Unlinkat(d.fd(), name, 0)
	if locked {
		_ = unix.Rmdir(d.path) // fails while it contains others
	}
}
