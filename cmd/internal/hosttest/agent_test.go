package hosttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// agent is a process in another cgroup that opens sockets for the test. A socket belongs to the cgroup in which it was
// opened, whoever holds it.
type agent struct {
	fd     int
	cgroup string // its path below the mount
	pid    int    // of one that chosenAgent has started
	why    error  // why there is none
	quit   func() // ends it, and waits for it
}

// agentMain opens sockets in the process's namespace and cgroup until its standard input ends.
func agentMain() int {
	for {
		var b [2]byte
		if n, err := unix.Read(3, b[:]); n != len(b) || err != nil {
			return 0
		}
		fd, err := unix.Socket(int(b[0]), int(b[1])|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 1
		}
		if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
			return 1
		}
		unix.Close(fd)
	}
}

// cgroup2 is where the version 2 hierarchy is mounted.
func cgroup2() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("cgroup2 is not mounted")
}

func startAgent(w *world) *agent {
	w.t.Helper()
	a := &agent{fd: -1}
	if a.why = a.start(w); a.why != nil {
		a.why = fmt.Errorf("%w: another cgroup: %w", errUnavailable, a.why)
		w.t.Log(a.why)
	}
	return a
}

func (a *agent) start(w *world) error {
	root, err := cgroup2()
	if err != nil {
		return err
	}
	dir := filepath.Join(root, fmt.Sprintf("viasocks-hosttest-%d-%d", os.Getppid(), time.Now().UnixNano()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	w.t.Cleanup(func() { removeSoon(w.t, dir) })
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	a.cgroup = filepath.Base(dir)
	return a.launch(w, cmd)
}

// launch starts cmd, which is or becomes an agent, in the host namespace.
func (a *agent) launch(w *world, cmd *exec.Cmd) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "agent")
	defer theirs.Close()
	cmd.Env = append(os.Environ(), envAgent+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	if err := in("host", cmd.Start); err != nil {
		unix.Close(pair[0])
		return err
	}
	a.fd = pair[0]
	fd := a.fd
	a.quit = sync.OnceFunc(func() {
		unix.Close(fd)
		_ = cmd.Wait()
	})
	w.t.Cleanup(a.quit)
	return nil
}

// removeSoon removes a cgroup when its last process is gone.
func removeSoon(t testing.TB, dir string) {
	var err error
	if !testkit.Until(testkit.Patience, func() bool {
		err = os.Remove(dir)
		return err == nil || errors.Is(err, os.ErrNotExist)
	}) {
		t.Errorf("cannot remove the cgroup: %v", err)
	}
}

func (a *agent) socket(family, typ int) (int, error) {
	if a.why != nil {
		return -1, a.why
	}
	if _, err := unix.Write(a.fd, []byte{byte(family), byte(typ)}); err != nil {
		return -1, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	var b [1]byte
	_, n, _, _, err := unix.Recvmsg(a.fd, b[:], oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	return harness.Descriptor(oob[:n])
}

// inCgroup sends or connects by a socket of the agent.
func inCgroup(a *agent, typ int) shot {
	return func(g *gun, p *probe, b []byte) error {
		family := unix.AF_INET
		if p.v6 {
			family = unix.AF_INET6
		}
		fd, err := a.socket(family, typ)
		if err != nil {
			return err
		}
		g.keep(fd)
		if typ == unix.SOCK_STREAM {
			return unix.Connect(fd, sockaddr(p.to))
		}
		return unix.Sendto(fd, b, 0, sockaddr(p.to))
	}
}
