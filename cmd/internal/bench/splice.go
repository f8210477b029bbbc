package main

import (
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// pipe is what bytes pass through inside the kernel from socket to socket. Go's own io.Copy would work, but it holds
// a pipe in each direction of an idle connection: six descriptors for each, where the limit allows two.
type pipe struct{ r, w int }

const pipeSize = 1 << 20

var pipes = sync.Pool{New: func() any {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return (*pipe)(nil)
	}
	_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{p[0], p[1]}
}}

// spliceAll moves src to dst until FIN.
func spliceAll(dst, src *net.TCPConn) error {
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	const flags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
	for {
		var p *pipe
		var n int64
		var serr error
		err := from.Read(func(fd uintptr) bool {
			if p = pipes.Get().(*pipe); p == nil {
				serr = unix.EMFILE
				return true
			}
			n, serr = unix.Splice(int(fd), nil, p.w, nil, pipeSize, flags)
			if serr == unix.EAGAIN {
				pipes.Put(p)
				p = nil
				return false
			}
			return true
		})
		if err == nil {
			err = serr
		}
		for left := n; err == nil && left > 0; {
			err = to.Write(func(fd uintptr) bool {
				var m int64
				m, serr = unix.Splice(p.r, nil, int(fd), nil, int(left), flags)
				if serr == unix.EAGAIN {
					return false
				}
				left -= max(m, 0)
				return true
			})
			if err == nil {
				err = serr
			}
		}
		switch {
		case err != nil:
			if p != nil { // it may contain bytes
				unix.Close(p.r)
				unix.Close(p.w)
			}
			return err
		case n == 0:
			pipes.Put(p)
			return io.EOF
		}
		pipes.Put(p)
	}
}
