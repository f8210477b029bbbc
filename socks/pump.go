package socks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// pumpBuf is the largest content of a TLS record.
	pumpBuf = 16 << 10
	// pumpIdle is when an idle connection is first probed (RFC 1122, section 4.2.3.6). The owner of the other end
	// cannot enable keepalive, because it has no TCP socket.
	pumpIdle = 2 * time.Hour
)

// pump connects a TLS connection to a plain descriptor. It uses a socket pair, one end of which the receiver has, and
// two goroutines that move bytes between the other end and the TLS connection. It holds at most one buffer for each
// direction, besides what the two sockets hold.
//
//	relay <── socket pair ──> pump <── TLS over TCP ──> server
//
// A close_notify becomes FIN at the pair, and FIN at the pair becomes close_notify. Any other end of the connection,
// including a TCP FIN without close_notify, becomes a reset on both sides. The kernel resets a unix socket when its
// peer is closed with unread bytes; therefore one byte always stays unread at the pump's end: see take.
type pump struct {
	conn   *tls.Conn
	tcp    *net.TCPConn
	local  *net.UnixConn
	rc     syscall.RawConn // of local
	cancel context.CancelFunc

	cut  bool        // TCP's FIN was read; used by down, which reads
	fin  atomic.Bool // close_notify of the server was passed on
	once sync.Once
}

// tlsConfig returns the TLS configuration for s. Verification is always on.
func (s Server) tlsConfig() *tls.Config {
	host, _, _ := strings.Cut(s.host, "%") // a certificate has no zone
	c := &tls.Config{ServerName: host, ClientSessionCache: tls.NewLRUClientSessionCache(16)}
	if s.proto == protoHTTP {
		c.NextProtos = []string{"http/1.1"}
	}
	if s.ca != "" {
		c.RootCAs = x509.NewCertPool()
		c.RootCAs.AppendCertsFromPEM([]byte(s.ca))
	}
	return c
}

// secure puts TLS on the connected socket of p. Afterwards p.fd is one end of a socket pair.
func (p *dial) secure() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot make a socket pair: %w", err)
	}
	raw := p.l.HandOver(&p.Node, p.fd).Release()
	p.fd, p.Got = pair[0], 0
	u, err := newPump(raw, pair[1], p.c.tls)
	if err != nil {
		unix.Close(pair[0])
		p.fd = -1
		return fmt.Errorf("cannot use a socket pair: %w", err)
	}
	if _, err := unix.Write(pair[0], []byte{0}); err != nil { // the byte that stays unread
		u.reset()
		return fmt.Errorf("cannot write to a socket pair: %w", err)
	}
	if err := p.l.Watch(&p.Node, p.fd, loop.Stream); err != nil {
		u.reset()
		return fmt.Errorf("cannot watch a socket: %w", err)
	}
	var ctx context.Context
	ctx, u.cancel = context.WithTimeout(context.Background(), time.Duration(p.d.handshakeTimeout.Load()))
	p.pump = u
	go u.run(ctx, func(err error) { p.l.Post(func() { p.secured(u, err) }) })
	return nil
}

// secured handles the result of u's TLS handshake.
func (p *dial) secured(u *pump, err error) {
	switch {
	case p.pump != u || p.state != securing: // the dial was given up
	case err != nil:
		p.fault(OpSecure, err)
	default:
		p.state = shaking
		p.begun()
	}
}

// newPump takes ownership of both descriptors, even if it returns an error.
func newPump(raw, local int, c *tls.Config) (*pump, error) {
	tcp, err := fileConn(raw)
	if err != nil {
		unix.Close(local)
		return nil, err
	}
	pair, err := fileConn(local)
	if err != nil {
		tcp.Close()
		return nil, err
	}
	u := &pump{tcp: tcp.(*net.TCPConn), local: pair.(*net.UnixConn)}
	if u.rc, err = u.local.SyscallConn(); err != nil {
		u.reset()
		return nil, err
	}
	_ = u.tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: pumpIdle})
	u.conn = tls.Client((*pumpTCP)(u), c)
	return u, nil
}

func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() // net.FileConn makes a copy
	return net.FileConn(f)
}

// run makes the TLS connection within ctx, calls done, and then moves bytes until both directions are over.
func (u *pump) run(ctx context.Context, done func(error)) {
	err := u.conn.HandshakeContext(ctx)
	u.cancel()
	done(err)
	if err != nil {
		u.reset()
		return
	}
	var both sync.WaitGroup
	both.Go(u.up)
	u.down()
	both.Wait()
	u.once.Do(func() {
		_ = u.skip(1) // with this byte read, closing causes no reset
		_ = u.local.Close()
		_ = u.conn.Close()
	})
}

// pumpTCP is the TCP connection of a pump. It notes the FIN of TCP, because crypto/tls takes a FIN between two
// records for an orderly end.
type pumpTCP pump

func (c *pumpTCP) Read(b []byte) (int, error) {
	n, err := c.tcp.Read(b)
	if err == io.EOF {
		c.cut = true
	}
	return n, err
}

func (c *pumpTCP) Write(b []byte) (int, error)        { return c.tcp.Write(b) }
func (c *pumpTCP) Close() error                       { return c.tcp.Close() }
func (c *pumpTCP) LocalAddr() net.Addr                { return c.tcp.LocalAddr() }
func (c *pumpTCP) RemoteAddr() net.Addr               { return c.tcp.RemoteAddr() }
func (c *pumpTCP) SetDeadline(t time.Time) error      { return c.tcp.SetDeadline(t) }
func (c *pumpTCP) SetReadDeadline(t time.Time) error  { return c.tcp.SetReadDeadline(t) }
func (c *pumpTCP) SetWriteDeadline(t time.Time) error { return c.tcp.SetWriteDeadline(t) }

// reset ends both sides with RST, once.
func (u *pump) reset() {
	u.once.Do(func() {
		_ = u.tcp.SetLinger(0)
		_ = u.tcp.Close()
		_ = u.local.Close() // a byte is unread, so this resets the pair
	})
}

// down moves bytes from the server.
func (u *pump) down() {
	buf := make([]byte, pumpBuf)
	for {
		n, err := u.conn.Read(buf)
		if n > 0 {
			if _, werr := u.local.Write(buf[:n]); werr != nil {
				u.reset()
				return
			}
		}
		switch {
		case err == io.EOF && !u.cut:
			u.fin.Store(true)
			if u.local.CloseWrite() != nil {
				u.reset()
			}
			return
		case err != nil:
			u.reset()
			return
		}
	}
}

// up moves bytes to the server. It returns when the other end of the pair is closed.
func (u *pump) up() {
	buf := make([]byte, 1+pumpBuf)
	for {
		n, err := u.take(buf)
		if n > 0 {
			if _, err := u.conn.Write(buf[1 : 1+n]); err != nil {
				u.reset()
				return
			}
			continue
		}
		if err != io.EOF || u.hungUp() && !u.fin.Load() {
			u.reset()
			return
		}
		break
	}
	if u.conn.CloseWrite() != nil {
		u.reset()
		return
	}
	_ = u.rc.Read(func(fd uintptr) bool { return polled(fd, unix.POLLHUP) })
	if !u.fin.Load() { // our direction is not over, so the other end is closed
		u.reset() // the server's remaining bytes have no receiver
	}
}

// take waits for bytes from the pair and puts them into buf[1:]. It leaves the last byte unread, as the previous call
// left the byte that now comes first. The error is io.EOF if the other end sent FIN or is closed.
func (u *pump) take(buf []byte) (n int, err error) {
	werr := u.rc.Read(func(fd uintptr) bool {
		for {
			ended := polled(fd, unix.POLLRDHUP)
			n, _, err = unix.Recvfrom(int(fd), buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if err == unix.EINTR {
				continue
			}
			if err == nil && n <= 1 && !ended { // the byte that was left
				n = 0
				return false
			}
			return err != unix.EAGAIN
		}
	})
	if werr != nil {
		return 0, werr
	}
	if err != nil {
		return 0, err
	}
	if n <= 1 {
		return 0, io.EOF
	}
	n--
	return n, u.skip(n)
}

// skip reads n bytes that were already peeked at.
func (u *pump) skip(n int) (err error) {
	scratch := pumpScratch.Get().(*[]byte)
	defer pumpScratch.Put(scratch)
	_ = u.rc.Control(func(fd uintptr) {
		for n > 0 {
			got, rerr := unix.Read(int(fd), (*scratch)[:min(n, len(*scratch))])
			if rerr == unix.EINTR {
				continue
			}
			if rerr != nil || got == 0 {
				err = errors.Join(rerr, io.ErrUnexpectedEOF)
				return
			}
			n -= got
		}
	})
	return err
}

var pumpScratch = sync.Pool{New: func() any { b := make([]byte, pumpBuf); return &b }}

// hungUp reports whether the other end of the pair is fully closed, not only in its sending direction, or whether
// both directions are over.
func (u *pump) hungUp() (up bool) {
	if u.rc.Control(func(fd uintptr) { up = polled(fd, unix.POLLHUP) }) != nil {
		return true
	}
	return up
}

func polled(fd uintptr, events int16) bool {
	f := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		// A signal interrupts even a poll that does not wait, and the Go runtime sends signals to its own threads.
		if n, err := unix.Poll(f, 0); err != unix.EINTR {
			return err == nil && n > 0 && f[0].Revents&(events|unix.POLLHUP) != 0
		}
	}
}
