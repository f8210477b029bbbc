package netns

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// makerName is argv[0] of the process that makes sockets for Sockets; argv[1] is the number of its own socket.
const makerName = "viasocks-sockets"

// startMaker is called by the helper. The maker becomes a child of the helper's parent (CLONE_PARENT), because the
// helper is about to become the program, which does not expect a child that it did not start. It gets its own session,
// so that no signal of the terminal reaches it. The caller closes sock.
func startMaker() (sock, pid int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, 0, fmt.Errorf("cannot make sockets for the program: %w", err)
	}
	defer unix.Close(pair[1])
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		unix.Close(pair[0])
		return -1, 0, fmt.Errorf("cannot make sockets for the program: %w", err)
	}
	defer null.Close()
	pid, _, err = syscall.StartProcess("/proc/self/exe", []string{makerName, "3"}, &syscall.ProcAttr{
		Dir: "/", Env: ownEnv(), Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), uintptr(pair[1])},
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT, Setsid: true},
	})
	if err != nil {
		unix.Close(pair[0])
		return -1, 0, fmt.Errorf("cannot make sockets for the program: %w", err)
	}
	return pair[0], pid, nil
}

// ownEnv is the environment of our small processes.
func ownEnv() []string {
	env := []string{"GOMAXPROCS=1"}
	if dir, ok := os.LookupEnv("GOCOVERDIR"); ok { // an executable built with coverage writes a warning without it
		env = append(env, "GOCOVERDIR="+dir)
	}
	return env
}

// newMaker starts a maker from outside. It is a child of this process, as the first one is.
func (n *Namespace) newMaker() (_ *net.UnixConn, pid int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "maker"), os.NewFile(uintptr(pair[1]), "maker")
	defer theirs.Close()
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, 0, err
	}
	conn := c.(*net.UnixConn)
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer null.Close()
	said, stderr, err := os.Pipe() // what nsenter says
	if err != nil {
		return nil, 0, err
	}
	defer said.Close()
	p, err := n.Start([]string{makerName, "3"}, ownEnv(), []*os.File{null, null, stderr, theirs})
	stderr.Close()
	if err != nil {
		return nil, 0, err
	}
	pid = p.Pid
	_ = p.Release() // we wait for the number
	theirs.Close()
	fd, refused, err := askMaker(conn, unix.AF_INET, unix.SOCK_DGRAM)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		reap(pid)
		return nil, 0, fmt.Errorf("it did not answer within %v", makerTimeout)
	case err != nil:
		reap(pid)
		return nil, 0, fmt.Errorf("it has ended at once: %w%s", err, lastWords(said))
	case refused == 0:
		unix.Close(fd)
	}
	return conn, pid, nil
}

// lastWords returns the first line of what a process has said that has ended.
func lastWords(said *os.File) string {
	_ = said.SetReadDeadline(time.Now().Add(time.Second)) // a process that it has started may hold the other end
	b, _ := io.ReadAll(io.LimitReader(said, 200))
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	if line == "" {
		return ""
	}
	return ": " + strconv.QuoteToGraphic(line)
}

// becomeMaker is called at the start of main. A maker that was started from outside has other arguments, because nsenter(1)
// knows the executable by its descriptor only. It executes itself once more, and then has its own name and no descriptors of
// nsenter.
func becomeMaker() {
	if len(os.Args) != 3 || os.Args[1] != makerName {
		return
	}
	sock, err := strconv.Atoi(os.Args[2])
	if err != nil || !isSocket(sock) {
		return
	}
	_ = unix.Dup3(0, 2, 0) // the null device
	_ = unix.CloseRange(uint(sock)+1, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	_ = syscall.Exec("/proc/self/exe", []string{makerName, os.Args[2]}, os.Environ())
	os.Exit(1)
}

// makerMain is the maker. It ends when the other end of sock is closed.
func makerMain(sock int) (exit int) {
	// A service manager may end all our processes at once, and viasocks would start another maker just before it ends itself.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	runtime.LockOSThread() // the capabilities that are dropped are this thread's
	if err := dropCapabilities(); err != nil {
		return 1
	}
	// The program runs as the same user and must not be able to trace this process.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return 1
	}
	for {
		var b [2]byte
		n, err := fdReader(sock).Read(b[:])
		if err != nil {
			return 0
		}
		if err := answerMaker(sock, b[:n]); err != nil {
			return 1
		}
	}
}

// answerMaker answers one request.
func answerMaker(sock int, request []byte) error {
	errno, fd := unix.EINVAL, -1
	if len(request) == 2 {
		domain, typ := int(request[0]), int(request[1])
		if (domain == unix.AF_INET || domain == unix.AF_INET6) && (typ == unix.SOCK_STREAM || typ == unix.SOCK_DGRAM) {
			var err error
			fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			errno, _ = err.(syscall.Errno)
		}
	}
	var oob []byte
	if fd >= 0 {
		defer unix.Close(fd)
		errno, oob = 0, unix.UnixRights(fd)
	}
	for {
		err := unix.Sendmsg(sock, []byte{byte(errno)}, oob, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}
