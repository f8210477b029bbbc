package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// This file is about `viasocks upgrade` and SIGUSR2. The daemon starts the program that is on disk now, its heir, which takes
// the host over from it as `viasocks up --takeover` does.

// heirTimeout is how long the new process may take to get the host. It usually needs some seconds.
const heirTimeout = time.Minute

// upgrades is the state of an upgrade.
type upgrades struct {
	program string // the path from which we were started

	mu   sync.Mutex // guards heir, and is held while the new process is started
	heir int        // id of the new process; 0: none

	handed chan struct{}   // closed when the host is handed over; u.taker is set before
	over   context.Context // ends with the daemon
	end    context.CancelFunc
	ran    sync.WaitGroup // upgrades that wait for their new process
}

func newUpgrades() *upgrades {
	g := &upgrades{program: programPath(), handed: make(chan struct{})}
	g.over, g.end = context.WithCancel(context.Background())
	return g
}

// programPath returns the path by which this program was started. It may be a symbolic link, which an upgrade lets point to
// another file, so that it is not resolved.
func programPath() string {
	path, err := exec.LookPath(os.Args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		path, _ = os.Executable()
	}
	return path
}

// started returns the id of the process that was started to take over; 0: none.
func (g *upgrades) started() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.heir
}

// close ends the upgrade that waits, with its new process, and returns when both have ended. It is called while the lock of
// the host is still ours. Otherwise the new process could start as if no viasocks had been up.
func (g *upgrades) close() {
	g.mu.Lock()
	g.end()
	g.mu.Unlock()
	g.ran.Wait()
}

// upgrade starts the program that is on disk now and waits until the new process has the host. It returns the id of that
// process. After an error, this process still has the host, unless it ends. Any goroutine may call it.
func (u *up) upgrade() (pid int, err error) {
	pid, pidfd, err := u.beginUpgrade()
	if err == nil {
		defer u.upgrades.ran.Done()
		u.log.Info("started a new viasocks, which takes the host over", "program", u.upgrades.program, "pid", pid)
		err = u.awaitHeir(pid, pidfd, heirTimeout)
		unix.Close(pidfd)
	}
	if err != nil {
		err = errors.New(config.Redact(err.Error()))
		u.log.Warn("the upgrade has failed", "err", err)
		return 0, err
	}
	return pid, nil
}

// beginUpgrade starts the new process. If it returns no error, the caller closes pidfd and calls ran.Done.
func (u *up) beginUpgrade() (pid, pidfd int, err error) {
	g := u.upgrades
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.heir != 0 {
		return 0, 0, fmt.Errorf("another upgrade is under way: process %d is starting", g.heir)
	}
	u.mu.Lock()
	err = u.offerable()
	u.mu.Unlock()
	if err != nil {
		return 0, 0, err
	}
	if g.over.Err() != nil {
		return 0, 0, errors.New("the viasocks that is up is about to end")
	}
	if pid, pidfd, err = startHeir(g.program, u.Args, u.Environ, u.first.Host.Takeover); err != nil {
		return 0, 0, fmt.Errorf("cannot start %s: %w: process %d goes on", g.program, err, os.Getpid())
	}
	g.heir = pid
	g.ran.Add(1)
	return pid, pidfd, nil
}

// startHeir starts program with the arguments of `up`, and with --takeover if takes is false. The new process is our sibling
// and not our child, so that the service manager hears of its end at once. As our child it would be a zombie until we end, and
// systemd would warn that the main process of the service is not its child. The caller closes pidfd.
func startHeir(program string, args, environ []string, takes bool) (pid, pidfd int, err error) {
	if os.Getpid() == 1 {
		return 0, 0, errors.New("the first process of a container cannot be replaced: start the container again")
	}
	argv := []string{os.Args[0], "up"}
	if !takes {
		argv = append(argv, "--takeover")
	}
	argv = append(argv, args...)
	env := slices.DeleteFunc(slices.Clone(environ), func(e string) bool { return strings.HasPrefix(e, "WATCHDOG_PID=") })
	pid, _, err = syscall.StartProcess(program, argv, &syscall.ProcAttr{
		Env: env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT, PidFD: &pidfd},
	})
	if err == nil && pidfd < 0 { // the kernel has no pidfd, so that nothing would tell of the end of the process
		_ = syscall.Kill(pid, syscall.SIGKILL)
		err = errors.New("this kernel is too old: Linux 5.4 or later is needed; restart viasocks instead")
	}
	return pid, pidfd, err
}

// awaitHeir waits until the process pid has the host. It ends the process if that takes longer than within.
func (u *up) awaitHeir(pid, pidfd int, within time.Duration) (err error) {
	g := u.upgrades
	defer func() {
		if err != nil {
			g.mu.Lock()
			g.heir = 0
			g.mu.Unlock()
		}
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		awaitEnd(pidfd, g.over, g.handed)
	}()
	defer func() { <-ended }()
	limit := time.NewTimer(within)
	defer limit.Stop()
	select {
	case <-g.handed:
		return u.handedTo(pid, pidfd)
	case <-ended:
	case <-limit.C:
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		<-ended
		return fmt.Errorf("process %d did not take over within %v and was killed: process %d goes on", pid, within,
			os.Getpid())
	}
	select {
	case <-g.handed:
		return u.handedTo(pid, pidfd)
	default:
	}
	if g.over.Err() != nil {
		if u.taker == nil { // without us it would start by itself, although viasocks was told to stop
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		}
		return errors.New("viasocks has ended meanwhile: its log tells why")
	}
	u.awaitWithdrawal(pid)
	return fmt.Errorf("process %d has ended without taking over, and the log of viasocks tells why: process %d goes on", pid,
		os.Getpid())
}

// handedTo returns nil if it is the process that has the host now. If it is another one, which was started by hand meanwhile,
// handedTo ends the process, which would take the host over from that one.
func (u *up) handedTo(pid, pidfd int) error {
	if u.taker.pid == pid {
		return nil
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	return fmt.Errorf("process %d has taken the host over meanwhile", u.taker.pid)
}

// awaitWithdrawal waits until the offer to a process that has ended is withdrawn, for a second at most. It takes some
// milliseconds.
func (u *up) awaitWithdrawal(pid int) {
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		u.mu.Lock()
		offered := u.offered
		u.mu.Unlock()
		if offered != pid {
			return
		}
	}
}

// awaitEnd returns when the process of pidfd has ended, over has ended, or handed is closed.
func awaitEnd(pidfd int, over context.Context, handed <-chan struct{}) {
	for over.Err() == nil {
		select {
		case <-handed:
			return
		default:
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 50)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
