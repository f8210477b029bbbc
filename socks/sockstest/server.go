package sockstest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a Server.
const (
	maxConns   = 32768            // control connections, including those of CONNECT; further ones are closed at once
	maxAssocs  = 8192             // associations; further ones get reply 1
	maxLog     = 65536            // requests kept in the log; older ones are dropped
	helloLimit = 30 * time.Second // for a client to send its request
	dialLimit  = 3 * time.Minute  // for a real dial; the kernel's own limit is slightly over two minutes
)

// Addr is a destination: a name or an address, and a port.
type Addr struct {
	Name string
	IP   netip.Addr
	Port uint16
}

// AddrFrom returns the Addr of an endpoint.
func AddrFrom(ap netip.AddrPort) Addr { return Addr{IP: ap.Addr(), Port: ap.Port()} }

// String returns host:port.
func (a Addr) String() string {
	host := a.Name
	if host == "" {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, fmt.Sprint(a.Port))
}

// Commands of RFC 1928.
const (
	CmdConnect   = 1
	CmdBind      = 2
	CmdAssociate = 3
)

// Request is one request as read by the server.
type Request struct {
	Time   time.Time
	Client netip.AddrPort // the other end of the control connection
	User   string         // empty without authentication
	Cmd    byte
	Dst    Addr
}

// Option changes a Server before it starts.
type Option func(*Server)

// WithAuth makes the server require this user and password.
func WithAuth(user, pass string) Option {
	return func(s *Server) { s.auth, s.user, s.pass = true, user, pass }
}

// WithDial sets a function that replaces a real dial for CONNECT; redirections are ignored. Errnos inside the error
// choose the reply. Resets are passed on only if the connection is a *net.TCPConn.
func WithDial(dial func(ctx context.Context, dst Addr) (net.Conn, error)) Option {
	return func(s *Server) { s.dial = dial }
}

// WithLostReads makes the server discard what arrived after a greeting before it was answered, as microsocks does.
func WithLostReads() Option { return func(s *Server) { s.loses = true } }

// WithIdleLimit makes the server close a connection whose request does not arrive within d of the greeting and the
// login.
func WithIdleLimit(d time.Duration) Option { return func(s *Server) { s.idle = d } }

// WithResolve sets the resolver for names, for TCP and UDP. The default is net.DefaultResolver.
func WithResolve(resolve func(name string) (netip.Addr, error)) Option {
	return func(s *Server) { s.resolve = resolve }
}

// WithRedirectsOnly makes the server reach only what Redirect names, so that a test with invented addresses sends no
// packet into the network: CONNECT gets reply 3, and datagrams are dropped.
func WithRedirectsOnly() Option { return func(s *Server) { s.redirectsOnly = true } }

// WithNetns creates the server's sockets in the network namespace of this file (/run/netns/NAME, /proc/PID/ns/net).
// It needs CAP_SYS_ADMIN.
func WithNetns(path string) Option { return func(s *Server) { s.netns = path } }

// Server is a SOCKS5 server. Its methods may be called from any goroutine.
type Server struct {
	auth          bool
	user, pass    string
	dial          func(ctx context.Context, dst Addr) (net.Conn, error)
	resolve       func(name string) (netip.Addr, error)
	redirectsOnly bool
	netns         string
	tls           *tls.Config
	tor           bool
	uot           bool
	loses         bool                  // discards what follows the first read
	idle          time.Duration         // for the request; zero: helloLimit
	names         map[netip.Addr]string // for RESOLVE_PTR

	ln     net.Listener
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	conns   map[net.Conn]struct{}
	assocs  map[*Association]struct{}
	redir   map[netip.AddrPort]netip.AddrPort // to the real endpoint
	unredir map[netip.AddrPort]netip.AddrPort // and back, for the sources of datagrams
	faults  [numStages]func(Request) Fault
	log     []Request

	n counters
}

type counters struct {
	open, assocsOpen                                             atomic.Int64
	accepted, requests, assocs, udpUp, udpDown, udpBad, udpNamed atomic.Uint64
}

// Stats is a snapshot of the counters.
type Stats struct {
	Open             int    // open connections of clients, including control connections of associations
	Accepted         uint64 // connections of clients accepted so far
	Requests         uint64 // requests read
	AssociationsOpen int    // associations now open
	Associations     uint64 // associations opened so far
	UDPUp, UDPDown   uint64 // datagrams relayed from and to clients
	UDPNamed         uint64 // datagrams of UDPUp that went to a name
	UDPDropped       uint64 // datagrams with a bad header, from other senders, or without a destination
}

// Listen starts a server. network is tcp, tcp4, tcp6 or unix.
func Listen(network, addr string, opts ...Option) (*Server, error) {
	s := &Server{
		conns: map[net.Conn]struct{}{}, assocs: map[*Association]struct{}{},
		redir: map[netip.AddrPort]netip.AddrPort{}, unredir: map[netip.AddrPort]netip.AddrPort{},
	}
	for _, o := range opts {
		o(s)
	}
	err := s.enter(func() (err error) {
		s.ln, err = net.Listen(network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.accept)
	return s, nil
}

// enter runs f, which creates sockets, on a thread in the server's network namespace.
func (s *Server) enter(f func() error) error {
	if s.netns == "" {
		return f()
	}
	to, err := os.Open(s.netns)
	if err != nil {
		return err
	}
	defer to.Close()
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer back.Close()
	if err := unix.Setns(int(to.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cannot enter %s: %w", s.netns, err)
	}
	err = f()
	if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread() // otherwise the thread stays locked and ends with its goroutine
	}
	return err
}

func (s *Server) accept() {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(5 * time.Millisecond) // out of descriptors: others will be closed
			continue
		}
		if !s.track(c) {
			c.Close()
			continue
		}
		s.n.accepted.Add(1)
		s.wg.Go(func() {
			defer s.untrack(c)
			if s.tls != nil {
				s.serve(tls.Server(c, s.tls))
				return
			}
			s.serve(c.(stream))
		})
	}
}

// track arranges that Close ends c. It returns false if the server is closed or full.
func (s *Server) track(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.n.open.Load() >= maxConns {
		return false
	}
	s.conns[c] = struct{}{}
	s.n.open.Add(1)
	return true
}

func (s *Server) untrack(c net.Conn) {
	c.Close()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.n.open.Add(-1)
}

// Addr returns where the server listens. It is invalid for a unix socket.
func (s *Server) Addr() netip.AddrPort {
	if _, ok := s.ln.Addr().(*net.UnixAddr); ok {
		return netip.AddrPort{}
	}
	ap := s.ln.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// URL returns socks5://host:port of the server, or socks5+unix://path, without credentials.
func (s *Server) URL() string {
	if a, ok := s.ln.Addr().(*net.UnixAddr); ok {
		return "socks5+unix://" + a.Name
	}
	return "socks5://" + s.Addr().String()
}

// Redirect makes the server use the endpoint to when it is asked for from, for TCP and UDP; what comes from to
// appears to come from from. A test can thus use documentation addresses and listen on loopback. A zero to ends the
// redirection.
func (s *Server) Redirect(from, to netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.redir[from]; ok {
		delete(s.unredir, old)
		delete(s.redir, from)
	}
	if to.IsValid() {
		s.redir[from], s.unredir[to] = to, from
	}
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	return Stats{
		Open: int(s.n.open.Load()), Accepted: s.n.accepted.Load(), Requests: s.n.requests.Load(),
		AssociationsOpen: int(s.n.assocsOpen.Load()), Associations: s.n.assocs.Load(),
		UDPUp: s.n.udpUp.Load(), UDPDown: s.n.udpDown.Load(), UDPDropped: s.n.udpBad.Load(), UDPNamed: s.n.udpNamed.Load(),
	}
}

// Requests returns the log of requests, oldest first, at most the last 65,536.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.log...)
}

func (s *Server) logRequest(r Request) {
	s.n.requests.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.log) >= maxLog {
		s.log = append(s.log[:0], s.log[maxLog/2:]...)
	}
	s.log = append(s.log, r)
}

// CutAll ends every connection of clients, by RST or by FIN, and thereby the associations. The server continues.
func (s *Server) CutAll(end End) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if end == RST {
			setLinger0(c)
		}
		c.Close()
	}
}

// Close stops listening, ends every connection and association and waits for the goroutines. It may be called twice.
func (s *Server) Close() error {
	err := s.ln.Close()
	s.mu.Lock()
	if s.closed {
		err = nil
	}
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	return err
}
