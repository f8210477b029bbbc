package sockstest

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// Addr is a destination: a name or an address, and a port.
type Addr struct {
	Name string
	IP   netip.Addr
	Port uint16
}

// Request is one request as the server read it.
type Request struct {
	Time   time.Time
	Client netip.AddrPort // the control connection's other end
	User   string
	Cmd    byte // CmdConnect, CmdAssociate
	Dst    Addr
}

// Fault is how the server misbehaves. The zero value: it does not.
type Fault struct {
	Reply  byte          // REP to answer with, nothing is dialled
	Silent bool          // never answer, keep the connection
	Delay  time.Duration // wait before the answer
}

// Option changes a Server.
type Option func(*Server)

// WithAuth asks for user and password.
func WithAuth(user, pass string) Option { return func(s *Server) {} }

// WithDial is used in place of a real dial.
func WithDial(func(ctx context.Context, dst Addr) (net.Conn, error)) Option {
	return func(s *Server) {}
}

// Server is a SOCKS5 server.
type Server struct{ ln net.Listener }

// Stats are counters.
type Stats struct {
	Open             int    // control connections now open, those of CONNECTs included
	Accepted         uint64 // connections ever accepted
	Requests         uint64 // requests read
	AssociationsOpen int    // associations now open
	Associations     uint64 // associations ever opened
}

// Listen starts a server. network is tcp, tcp4 or tcp6.
func Listen(network, addr string, opts ...Option) (*Server, error) {
	ln, err := net.Listen(network, addr)
	if err != nil {
		return nil, err
	}
	return &Server{ln: ln}, nil
}

// Addr is where the server listens.
func (s *Server) Addr() netip.AddrPort { return s.ln.Addr().(*net.TCPAddr).AddrPort() }

// URL is socks5://host:port of the server.
func (s *Server) URL() string { return "socks5://" + s.Addr().String() }

// Redirect: who asks for the endpoint from is connected to the endpoint to, by TCP and UDP; datagrams from to come from from.
func (s *Server) Redirect(from, to netip.AddrPort) {}

// SetFault sets what decides about faults of requests; nil: none.
func (s *Server) SetFault(func(Request) Fault) {}

// Stats is a snapshot.
func (s *Server) Stats() Stats { return Stats{} }

// Requests is the log, oldest first.
func (s *Server) Requests() []Request { return nil }

// Close ends everything and waits.
func (s *Server) Close() error { return s.ln.Close() }
