package sockstest

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stream is a connection of a client: TCP, a unix socket, or TLS.
type stream interface {
	net.Conn
	CloseWrite() error
}

// exchange is a request, and how it is answered in its protocol.
type exchange struct {
	Request
	reply func(code byte, bound Addr) []byte
}

// serve handles one connection of a client, from greeting to end. The first byte tells the protocol. The caller
// closes c, or the connection under TLS.
func (s *Server) serve(c stream) {
	c.SetDeadline(time.Now().Add(helloLimit))
	var version [1]byte
	if _, err := io.ReadFull(c, version[:]); err != nil {
		return
	}
	x := exchange{Request: Request{Time: time.Now(), Client: unmap(c.RemoteAddr())}}
	var ok bool
	switch v := version[0]; {
	case v == 5:
		ok = s.hear5(c, &x)
	case v == 4:
		ok = s.hear4(c, &x)
	case v >= 'A' && v <= 'Z':
		ok = s.hearHTTP(c, v, &x)
	}
	if !ok {
		return
	}
	x.Time = time.Now()
	s.logRequest(x.Request)
	c.SetDeadline(time.Time{})
	f := s.faultFor(AtRequest, x.Request)
	switch {
	case f.refuses():
		s.answer(c, f, x.reply(f.Reply, Addr{}))
	case x.Cmd == CmdConnect && s.uot && x.Dst.Name == uotName:
		s.overTCP(c, x, f)
	case x.Cmd == CmdConnect:
		s.connect(c, x, f)
	case x.Cmd == CmdBind:
		s.bind(c, x, f)
	case x.Cmd == CmdAssociate:
		s.associate(c, x.Request, f)
	case s.tor && (x.Cmd == CmdResolve || x.Cmd == CmdResolvePTR):
		s.torResolve(c, x, f)
	default:
		f.Reply = 7
		s.answer(c, f, x.reply(7, Addr{}))
	}
}

// hear5 reads a request of SOCKS5 after its first byte. It returns false if the connection is over.
func (s *Server) hear5(c stream, x *exchange) bool {
	if !s.greet(c, &x.Request) {
		return false
	}
	if s.idle > 0 {
		c.SetDeadline(time.Now().Add(s.idle))
	}
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil || head[0] != 5 {
		return false
	}
	c.SetDeadline(time.Now().Add(helloLimit))
	dst, err := readAddr(c, head[3])
	if err != nil {
		if errors.Is(err, errAddrType) {
			c.Write(reply(8, Addr{}))
		}
		return false
	}
	x.Cmd, x.Dst, x.reply = head[1], dst, reply
	return true
}

// greet chooses the method and checks the credentials. It returns false if the connection is over.
func (s *Server) greet(c stream, req *Request) bool {
	var b [512]byte
	if _, err := io.ReadFull(c, b[1:2]); err != nil {
		return false
	}
	methods := b[2 : 2+int(b[1])]
	if _, err := io.ReadFull(c, methods); err != nil {
		return false
	}
	if s.loses { // everything sent in one write has arrived by now
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		io.Copy(io.Discard, c)
		c.SetDeadline(time.Now().Add(helloLimit))
	}
	want := byte(0)
	if s.auth {
		want = 2
	}
	f := s.faultFor(AtGreeting, *req)
	if !slices.Contains(methods, want) {
		want, f.Reply = 0xff, 0xff
	}
	if !s.answer(c, f, []byte{5, want}) || f.refuses() {
		return false
	}
	if !s.auth {
		return true
	}
	if _, err := io.ReadFull(c, b[:2]); err != nil || b[0] != 1 {
		return false
	}
	user := make([]byte, b[1])
	if _, err := io.ReadFull(c, user); err != nil {
		return false
	}
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return false
	}
	pass := make([]byte, b[0])
	if _, err := io.ReadFull(c, pass); err != nil {
		return false
	}
	req.User = string(user)
	f = s.faultFor(AtAuth, *req)
	if req.User != s.user || string(pass) != s.pass {
		f.Reply = 1
	}
	return s.answer(c, f, []byte{1, f.Reply})
}

func (s *Server) connect(c stream, x exchange, f Fault) {
	ctx, cancel := context.WithTimeout(s.ctx, dialLimit)
	defer cancel()
	stop := watchGone(c, cancel)
	far, err := s.reach(ctx, x.Dst)
	stop()
	if err != nil {
		if ctx.Err() == context.Canceled {
			return // the client is gone, or the server is closed
		}
		f.Reply = replyFor(err)
		s.answer(c, f, x.reply(f.Reply, Addr{}))
		return
	}
	defer far.Close()
	bound := f.Bound
	if bound == nil {
		b := AddrFrom(unmap(far.LocalAddr()))
		bound = &b
	}
	if !s.answer(c, f, x.reply(0, *bound)) {
		return
	}
	s.relay(c, far)
}

// relay copies until both directions are over.
func (s *Server) relay(c stream, far net.Conn) {
	defer context.AfterFunc(s.ctx, func() { far.Close() })()
	a, aok := c.(*net.TCPConn)
	b, bok := far.(*net.TCPConn)
	if aok && bok {
		relayTCP(a, b)
		return
	}
	relayAny(c, far)
}

// reach dials what the client asked for.
func (s *Server) reach(ctx context.Context, dst Addr) (net.Conn, error) {
	if s.dial != nil {
		return s.dial(ctx, dst)
	}
	to, err := s.real(ctx, dst)
	if err != nil {
		return nil, err
	}
	return s.dialTCP(ctx, to)
}

// real returns the endpoint behind what a client named.
func (s *Server) real(ctx context.Context, dst Addr) (netip.AddrPort, error) {
	to := netip.AddrPortFrom(dst.IP, dst.Port)
	if dst.Name != "" {
		ip, err := s.lookup(ctx, dst.Name)
		if err != nil {
			return to, err
		}
		to = netip.AddrPortFrom(ip, dst.Port)
	}
	s.mu.Lock()
	redir, ok := s.redir[to]
	s.mu.Unlock()
	if ok {
		return redir, nil
	}
	if s.redirectsOnly {
		return to, unix.ENETUNREACH
	}
	return to, nil
}

func (s *Server) lookup(ctx context.Context, name string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(name); err == nil {
		return ip.Unmap(), nil
	}
	if s.resolve != nil {
		return s.resolve(name)
	}
	if s.redirectsOnly {
		return netip.Addr{}, unix.EHOSTUNREACH
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil || len(ips) == 0 {
		return netip.Addr{}, unix.EHOSTUNREACH
	}
	return ips[0].Unmap(), nil
}

// replyFor returns the REP that reports err to a client.
func replyFor(err error) byte {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return 5
	case errors.Is(err, unix.ENETUNREACH):
		return 3
	case errors.Is(err, unix.EHOSTUNREACH):
		return 4
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return 6
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return 2
	case errors.Is(err, unix.EAFNOSUPPORT):
		return 8
	}
	return 1
}

// watchGone calls gone if the client ends its connection while nothing reads it. stop ends the watch and waits for
// that.
func watchGone(c stream, gone func()) (stop func()) {
	done := make(chan struct{})
	var under net.Conn = c
	if t, ok := c.(*tls.Conn); ok {
		under = t.NetConn()
	}
	rc, err := under.(syscall.Conn).SyscallConn()
	if err != nil {
		gone()
		return func() {}
	}
	go func() {
		defer close(done)
		var over bool
		rc.Read(func(fd uintptr) bool {
			var b [1]byte
			n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			over = n == 0 && err == nil || err != nil && err != unix.EAGAIN && err != unix.EINTR
			return over
		})
		if over {
			gone()
		}
	}()
	return func() {
		under.SetReadDeadline(time.Unix(1, 0))
		<-done
		under.SetReadDeadline(time.Time{})
	}
}

var errAddrType = errors.New("unknown address type")

func readAddr(r io.Reader, atyp byte) (Addr, error) {
	var b [257]byte
	n := 0
	switch atyp {
	case 1:
		n = 4
	case 4:
		n = 16
	case 3:
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return Addr{}, err
		}
		n = int(b[0])
	default:
		return Addr{}, errAddrType
	}
	if _, err := io.ReadFull(r, b[:n+2]); err != nil {
		return Addr{}, err
	}
	a := Addr{Port: uint16(b[n])<<8 | uint16(b[n+1])}
	if atyp == 3 {
		a.Name = string(b[:n])
	} else {
		a.IP, _ = netip.AddrFromSlice(b[:n])
	}
	return a, nil
}

func appendAddr(b []byte, a Addr) []byte {
	switch {
	case a.Name != "":
		b = append(b, 3, byte(len(a.Name)))
		b = append(b, a.Name...)
	case a.IP.Is6() && !a.IP.Is4In6():
		b = append(append(b, 4), a.IP.AsSlice()...)
	case a.IP.IsValid():
		b = append(append(b, 1), a.IP.Unmap().AsSlice()...)
	default:
		b = append(b, 1, 0, 0, 0, 0)
	}
	return append(b, byte(a.Port>>8), byte(a.Port))
}

func reply(code byte, bound Addr) []byte {
	return appendAddr([]byte{5, code, 0}, bound)
}

func unmap(a net.Addr) netip.AddrPort {
	type addrPorter interface{ AddrPort() netip.AddrPort }
	if p, ok := a.(addrPorter); ok {
		ap := p.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// dialTCP is net.Dial with the socket created in the server's namespace; only the creation must happen there.
func (s *Server) dialTCP(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	domain, sa := sockaddr(to)
	var fd int
	err := s.enter(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close() // net.FileConn makes a copy
	if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
		return nil, err
	}
	unblock := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer unblock()
	if err := connected(f); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connected waits for a connect in progress.
func connected(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var soErr error
	err = rc.Write(func(fd uintptr) bool {
		e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || e != 0 {
			soErr = err
			if err == nil {
				soErr = syscall.Errno(e)
			}
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil
	})
	if err != nil {
		return err
	}
	return soErr
}

func sockaddr(ap netip.AddrPort) (domain int, sa unix.Sockaddr) {
	if ap.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	sa6 := &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	if z := ap.Addr().Zone(); z != "" {
		if i, err := net.InterfaceByName(z); err == nil {
			sa6.ZoneId = uint32(i.Index)
		}
	}
	return unix.AF_INET6, sa6
}
