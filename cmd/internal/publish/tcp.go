package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// accept carries the connections that l accepts, until Close.
func (p *Publisher) accept(l net.Listener, s Spec) {
	p.close = append(p.close, func() { _ = l.Close() })
	p.wg.Go(func() {
		slots := make(chan struct{}, maxFlows)
		for {
			select {
			case slots <- struct{}{}: // otherwise connections wait in the kernel's backlog
			case <-p.ctx.Done():
				return
			}
			c, err := l.Accept()
			switch {
			case err == nil:
				p.wg.Go(func() {
					defer func() { <-slots }()
					p.carry(c.(stream), s)
				})
				continue
			case p.ctx.Err() != nil:
				return
			}
			<-slots
			p.cfg.Log.Warn("cannot accept a connection to a published port", "port", s.String(), "err", plain(err))
			select {
			case <-time.After(shortage):
			case <-p.ctx.Done():
			}
		}
	})
}

// stream is a *net.TCPConn or a *net.UnixConn.
type stream interface {
	net.Conn
	CloseWrite() error
}

// carry carries a connection from outside to the program.
func (p *Publisher) carry(out stream, s Spec) {
	defer out.Close()
	in, err := p.connect(s.Port)
	if err != nil {
		p.refused.Add(1)
		p.cfg.Log.Info(
			"a connection to a published port did not reach the program",
			"port",
			s.String(),
			"from",
			peer(out),
			"err",
			err,
		)
		reset(out)
		return
	}
	defer in.Close()
	p.connections.Add(1)
	p.open.Add(1)
	defer p.open.Add(-1)
	p.cfg.Log.Debug("a connection reached a published port", "port", s.String(), "from", peer(out))
	stop := afterFunc(p.ctx, func() { reset(out); reset(in) })
	defer stop()
	done := make(chan struct{})
	go func() { defer close(done); copyOneWay(in, out) }()
	copyOneWay(out, in)
	<-done
}

// copyOneWay copies until the end of from and passes the end on. If anything fails, both connections are reset, so that
// neither side takes a part of the data for all of it.
func copyOneWay(to, from stream) {
	_, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil && !errors.Is(err, syscall.ENOTCONN) {
		reset(to)
		reset(from)
	}
}

// reset ends a connection with RST. The other end of a unix socket sees ECONNRESET only if some of its data was not
// read.
func reset(c stream) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// connect tries the program's addresses in turn. An address on which nothing listens refuses at once.
func (p *Publisher) connect(port uint16) (stream, error) {
	var first error
	for _, t := range p.cfg.Targets {
		c, err := p.connectTo(t, port, unix.SOCK_STREAM)
		if err == nil {
			return c.(*net.TCPConn), nil
		}
		if first == nil {
			first = err
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EADDRNOTAVAIL) &&
			!errors.Is(err, syscall.EAFNOSUPPORT) {
			break
		}
	}
	if errors.Is(first, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("the program does not listen on port %d", port)
	}
	return nil, first
}

// connectTo connects a socket of this type to the program's port at t. With SOCK_DGRAM, that alone does not show whether the
// program listens there.
func (p *Publisher) connectTo(t Target, port uint16, typ int) (net.Conn, error) {
	f, err := p.socket(t, typ)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := startConnect(f, netip.AddrPortFrom(t.To, port)); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// socket creates a socket in the program's namespace and binds it to the source of t.
func (p *Publisher) socket(t Target, typ int) (*os.File, error) {
	domain := unix.AF_INET
	if t.To.Is6() {
		domain = unix.AF_INET6
	}
	fd, err := p.cfg.Sockets.Socket(domain, typ)
	if err != nil {
		return nil, err
	}
	// The kernel chooses the port when the destination is known, so that one source does not run out of ports.
	err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	if err == nil {
		err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(t.From, 0)))
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "published port"), nil
}

// startConnect connects f and waits for the outcome.
func startConnect(f *os.File, to netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if err := f.SetWriteDeadline(time.Now().Add(connectWait)); err != nil {
		return err
	}
	var failed error
	started := false
	err = raw.Write(func(fd uintptr) (done bool) {
		if !started {
			started = true
			failed = unix.Connect(int(fd), sockaddr(to))
			return failed != unix.EINPROGRESS
		}
		var errno int
		if errno, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); failed == nil && errno != 0 {
			failed = syscall.Errno(errno)
		}
		return true
	})
	if err != nil {
		return err
	}
	return failed
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// peer returns the address of the client, for the log.
func peer(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" {
		return a.String()
	}
	return "a unix socket"
}

// afterFunc is context.AfterFunc whose stop may be deferred.
func afterFunc(ctx context.Context, f func()) (stop func()) {
	s := context.AfterFunc(ctx, f)
	return func() { s() }
}
