package netns

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// makerTimeout limits one request, which takes the maker some microseconds. It is a variable for tests.
var makerTimeout = 5 * time.Second

// Sockets creates sockets in the network namespace of a program. A socket belongs for its whole life to the namespace
// in which it was made, and a process with several threads cannot enter the user namespace of the program. Therefore a
// process of ours, the maker, stays inside: it has no capabilities, and it ends when its socket to us is closed or this
// process dies. If the maker ends before that, another one is started. The sockets that it has made do not depend on it.
//
// All methods may be called concurrently.
type Sockets struct {
	program *Namespace // where another maker is started
	absent  error      // why program is nil, and no other maker can be started
	tender  *tender

	mu       sync.Mutex
	changed  *sync.Cond
	conn     *net.UnixConn // to the maker; nil: there is none
	pid      int           // of the maker until it is reaped, then 0
	starting bool          // there will be a maker soon
	why      error         // why there is no maker, if none is being started
	closed   bool
}

// Socket creates a non-blocking socket that is closed on exec; the caller owns it. domain is AF_INET or AF_INET6, typ
// is SOCK_STREAM or SOCK_DGRAM.
func (s *Sockets) Socket(domain, typ int) (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range 2 { // the maker may have ended since the last request, and then there is another one soon
		if err = s.await(); err != nil {
			break
		}
		var refused syscall.Errno
		if fd, refused, err = askMaker(s.conn, domain, typ); err == nil {
			if refused == 0 {
				return fd, nil
			}
			err = refused
			break
		}
		s.lose()
	}
	return -1, fmt.Errorf("cannot make a socket in the program's namespace: %w", err)
}

// await returns when there is a maker, or an error if there will be none soon. s.mu is held.
func (s *Sockets) await() error {
	for s.starting && !s.closed {
		s.changed.Wait()
	}
	switch {
	case s.closed:
		return net.ErrClosed
	case s.conn == nil:
		return s.why
	}
	return nil
}

// lose ends a maker that has ended or does not answer. The tender starts another one. s.mu is held.
func (s *Sockets) lose() {
	if s.conn == nil {
		return
	}
	_ = s.conn.Close()
	s.conn, s.starting = nil, true
	s.kill()
}

// kill ends the maker even if it is stopped. s.mu is held.
func (s *Sockets) kill() {
	if s.pid != 0 { // nobody has waited for it yet, so the number cannot belong to another process
		_ = syscall.Kill(s.pid, syscall.SIGKILL)
	}
}

// errOften is why there is no maker for a moment.
var errOften = errors.New("the process " + makerName + " was ended again and again: another one is started in a moment")

// wait waits for the end of the maker.
func (s *Sockets) wait() (how string) {
	awaitEnd(s.pid) // which only the tender changes
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose()
	how = describe(reaped(s.pid))
	s.pid = 0
	if s.tender.pace.Delay(time.Now()) > 0 {
		s.give(nil, 0, errOften)
	}
	return how
}

// start starts another maker.
func (s *Sockets) start() error {
	s.mu.Lock()
	s.starting = true
	s.mu.Unlock()
	conn, pid, err := s.make()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.give(conn, pid, err)
	if s.closed {
		s.kill()
	}
	return err
}

// give tells those who wait that there is a maker, or why there is none. s.mu is held.
func (s *Sockets) give(conn *net.UnixConn, pid int, why error) {
	s.conn, s.pid, s.why, s.starting = conn, pid, why, false
	s.changed.Broadcast()
}

func (s *Sockets) make() (*net.UnixConn, int, error) {
	if s.program == nil {
		return nil, 0, s.absent
	}
	return s.program.newMaker()
}

// Close ends the maker and waits for its end. The sockets that it made stay open. It may be called twice.
func (s *Sockets) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.tender.stop)
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.kill()
	s.changed.Broadcast()
	s.mu.Unlock()
	<-s.tender.done
	if s.program != nil {
		s.program.Close()
	}
	return nil
}

// socketsFromFile returns Sockets that use the socket from the helper, whose maker is inside the namespaces of the process
// program. It closes f. After an error the maker is still the caller's.
func socketsFromFile(f *os.File, maker, program int, log *slog.Logger) (*Sockets, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the maker of sockets: %w", err)
	}
	s := &Sockets{conn: c.(*net.UnixConn), pid: maker}
	s.changed = sync.NewCond(&s.mu)
	s.program, s.absent = openProgram(program)
	s.tender = newTender(makerName, log, s.wait, s.start)
	go s.tender.tend()
	return s, nil
}

// askMaker sends one request and reads its answer: an errno, or zero and the socket. After an error the maker is of no use
// any more.
func askMaker(conn *net.UnixConn, domain, typ int) (fd int, refused syscall.Errno, err error) {
	if err := conn.SetDeadline(time.Now().Add(makerTimeout)); err != nil {
		return -1, 0, err
	}
	if _, err := conn.Write([]byte{byte(domain), byte(typ)}); err != nil {
		return -1, 0, err
	}
	var errno [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(errno[:], oob)
	switch {
	case err != nil:
		return -1, 0, err
	case n == 0:
		return -1, 0, errGone
	case errno[0] != 0:
		return -1, syscall.Errno(errno[0]), nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return -1, 0, errors.New("the answer holds no socket")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, 0, errors.New("the answer holds no socket")
	}
	unix.CloseOnExec(fds[0])
	return fds[0], 0, nil
}

// reap ends a child. Nobody has waited for the child yet, so its pid cannot belong to another process.
func reap(pid int) {
	_ = syscall.Kill(pid, syscall.SIGKILL)
	_, _ = reaped(pid)
}
