package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// makerName is argv[0] of the process that makes sockets for Sockets; argv[1] is the number of its own socket.
const makerName = "viasocks-sockets"

// makerTimeout limits one request, which takes the maker some microseconds.
const makerTimeout = 5 * time.Second

// Sockets creates sockets in the network namespace of a program. A socket belongs for its whole life to the namespace
// in which it was made, and a process with several threads cannot enter the user namespace of the program. Therefore a
// process of ours, the maker, stays inside: it has no capabilities, and it ends when its socket to us is closed or this
// process dies.
//
// All methods may be called concurrently.
type Sockets struct {
	mu   sync.Mutex
	conn *net.UnixConn // nil: closed
	pid  int
}

// Socket creates a non-blocking socket that is closed on exec; the caller owns it. domain is AF_INET or AF_INET6, typ
// is SOCK_STREAM or SOCK_DGRAM.
func (s *Sockets) Socket(domain, typ int) (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return -1, fmt.Errorf("cannot make a socket in the program's namespace: %w", net.ErrClosed)
	}
	fd, err = s.ask(domain, typ)
	if err != nil {
		return -1, fmt.Errorf("cannot make a socket in the program's namespace: %w", err)
	}
	return fd, nil
}

// ask sends one request and reads its answer: an errno, or zero and the socket.
func (s *Sockets) ask(domain, typ int) (int, error) {
	if err := s.conn.SetDeadline(time.Now().Add(makerTimeout)); err != nil {
		return -1, err
	}
	if _, err := s.conn.Write([]byte{byte(domain), byte(typ)}); err != nil {
		return -1, err
	}
	var errno [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := s.conn.ReadMsgUnix(errno[:], oob)
	switch {
	case err != nil:
		return -1, err
	case n == 0:
		return -1, errGone
	case errno[0] != 0:
		return -1, syscall.Errno(errno[0])
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return -1, errors.New("the answer holds no socket")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.New("the answer holds no socket")
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}

// Close ends the maker and waits for its end. The sockets that it made stay open. It may be called twice.
func (s *Sockets) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil
	}
	_ = s.conn.Close()
	s.conn = nil
	reap(s.pid)
	return nil
}

// reap ends a child. Nobody has waited for the child yet, so its pid cannot belong to another process.
func reap(pid int) {
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for {
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != syscall.EINTR {
			return
		}
	}
}

// socketsFromFile returns Sockets that use the socket from the helper. It closes f.
func socketsFromFile(f *os.File, pid int) (*Sockets, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		reap(pid)
		return nil, fmt.Errorf("cannot reach the maker of sockets: %w", err)
	}
	return &Sockets{conn: c.(*net.UnixConn), pid: pid}, nil
}

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
	env := []string{"GOMAXPROCS=1"}
	if dir, ok := os.LookupEnv("GOCOVERDIR"); ok {
		env = append(env, "GOCOVERDIR="+dir)
	}
	pid, _, err = syscall.StartProcess("/proc/self/exe", []string{makerName, "3"}, &syscall.ProcAttr{
		Dir: "/", Env: env, Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), uintptr(pair[1])},
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT, Setsid: true},
	})
	if err != nil {
		unix.Close(pair[0])
		return -1, 0, fmt.Errorf("cannot make sockets for the program: %w", err)
	}
	return pair[0], pid, nil
}

// makerMain is the maker. It ends when the other end of sock is closed.
func makerMain(sock int) (exit int) {
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

// childSocket returns the number of the socket with which a process of ours with this name was started.
func childSocket(name string) (sock int, ok bool) {
	if len(os.Args) != 2 || os.Args[0] != name {
		return -1, false
	}
	sock, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return -1, false
	}
	if domain, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return -1, false
	}
	unix.CloseOnExec(sock)
	return sock, true
}
