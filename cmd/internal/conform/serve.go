package conform

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPort is where a public far end listens; its second UDP port is the next one.
const DefaultPort = 7780

// Limits of a public far end, which anybody may find.
const (
	publicConns     = 128             // open connections
	publicPerClient = 24              // of one address
	sessionAsks     = 2000            // datagrams answered for one session
	sessionBytes    = 8 << 20         // and the total bytes of these answers
	pourMost        = 64 << 20        // bytes that one connection may request
	pourTime        = 2 * time.Second // and for how long they are sent
	pourStore       = 512 << 20       // bytes that all connections together may request at once,
	pourRate        = 8 << 20         // and how many become available each second
)

// guard makes a far end safe for a public address. A client that asks by UDP needs the token of a session, which is
// an open TCP connection, and gets no answer that is longer than the question. An answer comes from a socket other
// than the one that was asked only if the question has the cookie of its source, which the plain answer contains.
// Such answers therefore go only to hosts that have received a plain one.
type guard struct {
	key [32]byte // for the cookies

	mu       sync.Mutex
	sessions map[string]*session
	clients  map[netip.Addr]int
	store    float64 // bytes that may be sent by pour
	filled   time.Time
}

type session struct{ asks, bytes int }

func newGuard() *guard {
	g := &guard{sessions: map[string]*session{}, clients: map[netip.Addr]int{}, store: pourStore, filled: time.Now()}
	rand.Read(g.key[:])
	return g
}

// enter takes a place for a connection from a; leave releases it.
func (g *guard) enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.clients[a] >= publicPerClient {
		return false
	}
	g.clients[a]++
	return true
}

func (g *guard) leave(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.clients[a]--; g.clients[a] <= 0 {
		delete(g.clients, a)
	}
}

// open begins a session and returns its token.
func (g *guard) open() string {
	token := rand.Text()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sessions[token] = &session{}
	return token
}

func (g *guard) close(token string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.sessions, token)
}

// allows reports whether the session of token may have an answer of size bytes.
func (g *guard) allows(token string, size int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sessions[token]
	if s == nil || s.asks >= sessionAsks || s.bytes+size > sessionBytes {
		return false
	}
	s.asks++
	s.bytes += size
	return true
}

// cookie returns a proof that its holder receives what is sent to from.
func (g *guard) cookie(from netip.AddrPort) string {
	m := hmac.New(sha256.New, g.key[:])
	b, _ := from.MarshalBinary()
	m.Write(b)
	return hex.EncodeToString(m.Sum(nil)[:8])
}

// pour returns how many of n bytes may be sent.
func (g *guard) pour(n int) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	g.store = min(pourStore, g.store+now.Sub(g.filled).Seconds()*pourRate)
	g.filled = now
	n = min(n, int(g.store))
	g.store -= float64(n)
	return n
}

// publicSocket is one datagram socket of a public far end.
type publicSocket struct {
	u      *net.UDPConn
	wild   bool                // bound to all addresses of the host: the kernel reports the address asked with each datagram
	others [2][2]*publicSocket // by address and port, itself first; nil: does not exist
}

// Serve starts a far end for a public address: see guard. It has at most two addresses of each family. The zero
// addresses stand for all addresses at one port. If a port is 0, the kernel chooses it.
func Serve(at ...netip.AddrPort) (*FarEnd, error) {
	f := &FarEnd{slots: make(chan struct{}, publicConns), records: map[string]string{}, guard: newGuard(), closed: -1}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	var sockets []*publicSocket
	for _, a := range at {
		own, err := f.listenPublic(a, sockets)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("cannot listen at %v: %w", a, err)
		}
		sockets = append(sockets, own...)
	}
	if err := f.bindClosed(); err != nil {
		f.Close()
		return nil, err
	}
	for _, ln := range f.tcp {
		f.wg.Go(func() { f.accept(ln) })
	}
	for _, s := range sockets {
		f.wg.Go(func() { f.answerPublic(s) })
	}
	return f, nil
}

// listenPublic listens for TCP, and for UDP at two ports. before are the sockets of the other addresses.
func (f *FarEnd) listenPublic(a netip.AddrPort, before []*publicSocket) ([]*publicSocket, error) {
	fam := "4"
	if a.Addr().Is6() {
		fam = "6"
	}
	ln, err := net.ListenTCP("tcp"+fam, net.TCPAddrFromAddrPort(a))
	if err != nil {
		return nil, err
	}
	f.tcp = append(f.tcp, ln)
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	second := uint16(0) // chosen by the kernel
	if a.Port() != 0 {
		second = port + 1
	}
	var pair []*publicSocket
	for i, p := range []uint16{port, second} {
		u, err := net.ListenUDP("udp"+fam, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.Addr(), p)))
		if err != nil {
			return nil, err
		}
		u.SetReadBuffer(1 << 20)
		f.all = append(f.all, u)
		f.ports[i] = u.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		s := &publicSocket{u: u, wild: a.Addr().IsUnspecified()}
		if s.wild {
			if err := tellAddress(u, fam); err != nil {
				return nil, err
			}
		}
		pair = append(pair, s)
	}
	for i, s := range pair {
		s.others[0] = [2]*publicSocket{s, pair[1-i]}
	}
	for i, b := range before { // of the same family: each is the other's other address
		if s := pair[i%2]; b.u.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Is4() == a.Addr().Is4() && i/2 == len(before)/2-1 {
			s.others[1] = [2]*publicSocket{b, b.others[0][1]}
			b.others[1] = [2]*publicSocket{s, pair[1-i%2]}
			f.addresses = 2
		}
	}
	return pair, nil
}

// tellAddress makes the kernel report with each datagram to which address it was sent.
func tellAddress(u *net.UDPConn, fam string) error {
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	level, name := unix.IPPROTO_IP, unix.IP_PKTINFO
	if fam == "6" {
		level, name = unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), level, name, 1) }); err != nil {
		return err
	}
	return serr
}

// bindClosed reserves a TCP port on which nothing listens: it refuses connections as long as the far end lives.
func (f *FarEnd) bindClosed() error {
	a := f.TCP().Addr()
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: a.Unmap().As4()})
	if a.Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f.closed = fd
	if err := unix.Bind(fd, sa); err != nil {
		return err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		f.closedPort = uint16(n.Port)
	case *unix.SockaddrInet6:
		f.closedPort = uint16(n.Port)
	}
	return nil
}

// answerPublic answers the datagrams of s that guard allows.
func (f *FarEnd) answerPublic(s *publicSocket) {
	buf, oob := make([]byte, maxUDP), make([]byte, 128)
	for {
		n, m, _, from, err := s.u.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error about a client that went away
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		q, ok := parseQuestion(buf[:n])
		if !ok || q.token == "" {
			continue
		}
		cookie := f.guard.cookie(from)
		out := s.others[q.from[0]][q.from[1]]
		if out == nil || out != s && q.cookie != cookie {
			continue
		}
		answer := q.answer(from, buf[:n], min(q.size, n), cookie)
		if len(answer) > n || !f.guard.allows(q.token, len(answer)) {
			continue
		}
		source := oob[:m]
		if !s.wild || !out.wild {
			source = nil
		}
		out.u.WriteMsgUDPAddrPort(answer, anyDevice(source), from)
	}
}

// anyDevice turns a control message with the address of a received datagram into one that sets the source of a sent
// one. The routes decide on the device.
func anyDevice(oob []byte) []byte {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return nil
	}
	data := msgs[0].Data
	switch {
	case msgs[0].Header.Level == unix.IPPROTO_IP && len(data) >= unix.SizeofInet4Pktinfo:
		copy(data[:4], make([]byte, 4))
	case msgs[0].Header.Level == unix.IPPROTO_IPV6 && len(data) >= unix.SizeofInet6Pktinfo:
		copy(data[16:20], make([]byte, 4))
	}
	return oob
}

// serveSession sends what a probe needs to know, and keeps the token for its datagrams until the connection ends.
func (f *FarEnd) serveSession(c *net.TCPConn) {
	if f.guard == nil {
		return
	}
	token := f.guard.open()
	defer f.guard.close(token)
	fmt.Fprintf(c, "%s %d %d %d %d %v\n", token, f.ports[0], f.ports[1], f.closedPort, max(f.addresses, 1), c.RemoteAddr())
	io.Copy(io.Discard, io.LimitReader(c, 1024))
}

// servePour sends bytes for as long as it may.
func (f *FarEnd) servePour(c *net.TCPConn, n int) {
	if f.guard == nil {
		return
	}
	n = f.guard.pour(min(max(n, 0), pourMost))
	c.SetWriteDeadline(time.Now().Add(pourTime))
	block := make([]byte, 64<<10)
	for n > 0 {
		m, err := c.Write(block[:min(n, len(block))])
		if n -= m; err != nil {
			break
		}
	}
	f.guard.pour(-n) // returned
}
