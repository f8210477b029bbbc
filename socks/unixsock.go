package socks

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// busyWait is the time between attempts to connect to a unix socket whose queue is full. The kernel does not report
// when there is room.
const busyWait = 20 * time.Millisecond

var errBusy = errors.New("the queue of the server's socket is full")

// openUnix connects to the server's unix socket. Options.PrepareSocket is not called for it, because its traffic does not
// leave the host.
func (p *dial) openUnix() (err error, ours bool) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err, true
	}
	p.fd = fd
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: p.c.server.path}); err { // a leading @ means abstract
	case nil, unix.EINTR:
	case unix.EAGAIN:
		return errBusy, false
	default:
		return err, false
	}
	return p.l.Watch(&p.Node, fd, loop.Stream), true
}
