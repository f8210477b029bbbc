package ftp

import (
	"errors"
	"io"
	"net/netip"
	"sync"

	"github.com/viasocks/viasocks/stack/flow"
)

// maxRead limits what is read of the program at a time, and so what is held of it.
const maxRead = 4 << 10

// Server provides the endpoints that FTP servers can reach. Each belongs to one control connection.
type Server interface {
	// Mine reports whether at is an endpoint of the program. One of another host passes unchanged, so that a program can
	// have two servers exchange a file.
	Mine(at netip.AddrPort) bool
	// Listen makes an endpoint at which the server reaches at. It calls bound once, with an invalid endpoint if that is
	// not possible, from any goroutine, perhaps before it returns.
	Listen(at netip.AddrPort, bound func(netip.AddrPort))
	// Close is called when the control connection is over.
	Close()
}

// Wrap returns req with the commands of its program rewritten by s.
func Wrap(req flow.StreamRequest, s Server) flow.StreamRequest { return &request{req, s} }

type request struct {
	flow.StreamRequest
	s Server
}

// Accept implements flow.StreamRequest.
func (r *request) Accept(l flow.Listener) { r.StreamRequest.Accept(&listener{l, r.s}) }

type listener struct {
	flow.Listener
	s Server
}

// Opened implements flow.Listener.
func (l *listener) Opened(app flow.Stream, err error) {
	if app != nil {
		app = &stream{Stream: app, l: l.Listener, server: l.s}
	}
	l.Listener.Opened(app, err)
}

// stream is the program's end of a control connection. Its methods belong to one goroutine, as those of any Stream.
type stream struct {
	flow.Stream
	l      flow.Listener
	server Server

	scan scanner
	out  []byte // ready for the server
	fin  bool   // the program's FIN was read after scan.in

	mu    sync.Mutex
	wait  *command // that waits for its endpoint
	known bool     // bound is the answer
	bound netip.AddrPort
}

// ReadTo implements flow.Stream.
func (s *stream) ReadTo(w io.Writer) (int, error) {
	if s.scan.blind && len(s.out) == 0 && len(s.scan.in) == 0 && !s.fin {
		return s.Stream.ReadTo(w)
	}
	s.fill()
	for len(s.out) == 0 && !s.waits() && !s.fin {
		n, err := s.Stream.ReadTo((*reader)(s))
		s.fin = errors.Is(err, io.EOF)
		if s.fill(); n == 0 && !s.fin {
			break
		}
	}
	if len(s.out) == 0 {
		return s.state()
	}
	n, _ := w.Write(s.out)
	if s.out = s.out[n:]; len(s.out) == 0 {
		s.out = nil
	}
	if n == 0 {
		return s.state()
	}
	return n, nil
}

// state is the result of ReadTo when nothing can be passed on: the end, a reset, or ErrAgain.
func (s *stream) state() (int, error) {
	if _, err := s.Stream.ReadTo(none{}); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	if s.fin && len(s.out) == 0 && len(s.scan.in) == 0 && !s.waits() {
		return 0, io.EOF
	}
	return 0, flow.ErrAgain
}

// waits reports whether a command waits for its endpoint.
func (s *stream) waits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wait != nil && !s.known
}

// fill moves what can be passed on to out.
func (s *stream) fill() {
	for {
		s.mu.Lock()
		c, known, bound := s.wait, s.known, s.bound
		if known {
			s.wait, s.known = nil, false
		}
		s.mu.Unlock()
		switch {
		case c != nil && !known:
			return
		case c != nil && bound.IsValid():
			s.out = append(s.out, c.with(bound)...)
		case c != nil:
			s.out = append(s.out, c.refused()...)
		}
		s.out, c = s.scan.next(s.out, func(c command) bool { return s.server.Mine(c.at) })
		if c == nil {
			break
		}
		s.mu.Lock()
		s.wait = c
		s.mu.Unlock()
		s.server.Listen(c.at, s.answer)
	}
	if s.fin {
		s.out = s.scan.flush(s.out)
	}
}

// answer takes the endpoint that the command waits for.
func (s *stream) answer(at netip.AddrPort) {
	s.mu.Lock()
	s.bound, s.known = at, true
	s.mu.Unlock()
	s.l.Ready(flow.Readable)
}

// Close implements flow.Stream.
func (s *stream) Close() error {
	s.server.Close()
	return s.Stream.Close()
}

// Queued returns how much the app's kernel has not acknowledged, if the stream knows it.
func (s *stream) Queued() int {
	if q, ok := s.Stream.(interface{ Queued() int }); ok {
		return q.Queued()
	}
	return 0
}

// reader takes what the program says, up to maxRead.
type reader stream

// Write implements io.Writer for Stream.ReadTo.
func (r *reader) Write(p []byte) (int, error) {
	n := max(min(len(p), maxRead-len(r.scan.in)), 0)
	r.scan.in = append(r.scan.in, p[:n]...)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// none takes nothing. It queries the state of a stream.
type none struct{}

func (none) Write([]byte) (int, error) { return 0, io.ErrShortWrite }
