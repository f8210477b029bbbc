package socks

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// busyWait is the time between attempts at a unix socket whose queue is full: the kernel tells nobody when there is room.
const busyWait = 20 * time.Millisecond

var errBusy = errors.New("the queue of the server's socket is full")

// openUnix connects to the server's unix socket. Options.Control does not see it: nothing of it leaves the host.
func (p *dial) openUnix() (err error, ours bool) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err, true
	}
	p.fd = fd
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: p.c.server.path}); err { // an @ in front means abstract
	case nil, unix.EINTR:
	case unix.EAGAIN:
		return errBusy, false
	default:
		return err, false
	}
	return p.l.Watch(&p.Node, fd, loop.Stream), true
}
