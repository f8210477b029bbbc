package sockstest

import (
	"crypto/tls"
	"io"
	"net"
	"time"
)

// Stage says before which answer a fault happens.
type Stage uint8

// The three answers of a server.
const (
	AtGreeting Stage = iota // the choice of a method; of the Request only Client and Time are known
	AtAuth                  // the status of user and password; User is known
	AtRequest               // the reply to the request
	numStages
)

// End is what happens to the connection after a fault.
type End uint8

// The ends.
const (
	FIN  End = iota // closed in order
	Hold            // kept open, what comes is read and thrown away
	RST             // reset
)

// Fault is how the server misbehaves with one answer. The zero value: it does not. The fields can be combined; the
// functions below are the usual ones.
type Fault struct {
	Reply    byte   // nothing is done, and this is the REP of the answer (at AtAuth the status); then End
	Raw      []byte // nothing is done, and this is sent in place of an answer; then End
	NoAnswer bool   // nothing is done or sent; End
	Cut      int    // only so many bytes of the answer are sent; then End
	End      End

	Delay time.Duration // waited before the answer
	Drip  time.Duration // waited before each byte of the answer
	Bound *Addr         // BND.ADDR and BND.PORT of the answer in place of the true ones
	Extra []byte        // sent together with the answer, in one write

	// For the datagrams of an association. Association.SetFault changes these while it lives.
	DropUDP  bool            // neither way
	EndUDP   func(Addr) bool // a datagram to such a destination is not sent and ends the association, as sing-box and trojan do
	CloseUDP bool            // the association ends as soon as it was granted, as simple-socks does
	DeafUDP  bool            // nobody listens on the relay's port, as with ss-local without -u
	Frag     byte            // FRAG of those toward the client
	BadUDP   bool            // headers toward the client are cut short
	MangleTo func([]byte)    // whatever else toward the client, on header and payload in place
}

// Reply answers with code, RFC 1928 section 6, and closes.
func Reply(code byte) Fault { return Fault{Reply: code} }

// Silence never answers and keeps the connection.
func Silence() Fault { return Fault{NoAnswer: true, End: Hold} }

// EarlyClose closes in place of an answer.
func EarlyClose() Fault { return Fault{NoAnswer: true, End: FIN} }

// EarlyReset resets in place of an answer.
func EarlyReset() Fault { return Fault{NoAnswer: true, End: RST} }

// Garbage answers with bytes that are no SOCKS at all.
func Garbage() Fault {
	return Fault{Raw: []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")}
}

// BadVersion answers with SOCKS version 4.
func BadVersion() Fault { return Fault{Raw: []byte{4, 0, 0, 1, 127, 0, 0, 1, 0, 80}, End: Hold} }

// BadAddrType answers success with an ATYP that does not exist.
func BadAddrType() Fault { return Fault{Raw: []byte{5, 0, 0, 2, 127, 0, 0, 1, 0, 80}, End: Hold} }

// Drip sends the answer byte by byte with a pause before each; then it goes on as it should.
func Drip(pause time.Duration) Fault { return Fault{Drip: pause} }

// Half sends the first n bytes of the answer, then end.
func Half(n int, end End) Fault { return Fault{Cut: n, End: end} }

// LongName grants, with a name of 255 bytes as BND.ADDR.
func LongName() Fault {
	name := make([]byte, 255)
	for i := range name {
		name[i] = 'a' + byte(i%26)
	}
	return Bound(Addr{Name: string(name), Port: 80})
}

// Bound grants with another BND.ADDR and BND.PORT: the bad relay addresses.
func Bound(a Addr) Fault { return Fault{Bound: &a} }

// refuses reports whether nothing is to be done.
func (f *Fault) refuses() bool { return f.Reply != 0 || f.Raw != nil || f.NoAnswer }

// SetFault sets what decides, for each request, how the server misbehaves; nil: not at all. f is called on the
// connection's goroutine. It may be changed at any time and holds for requests read from then on.
func (s *Server) SetFault(f func(Request) Fault) { s.SetFaultAt(AtRequest, f) }

// SetFaultAt is SetFault for another stage.
func (s *Server) SetFaultAt(stage Stage, f func(Request) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[stage] = f
}

func (s *Server) faultFor(stage Stage, r Request) Fault {
	s.mu.Lock()
	f := s.faults[stage]
	s.mu.Unlock()
	if f == nil {
		return Fault{}
	}
	return f(r)
}

// answer sends b as f says. False: that was all, the connection is over.
func (s *Server) answer(c stream, f Fault, b []byte) bool {
	if f.Delay > 0 && !s.wait(f.Delay) {
		return false
	}
	over := f.refuses()
	switch {
	case f.NoAnswer:
		b = nil
	case f.Raw != nil:
		b = f.Raw
	}
	if f.Cut > 0 && f.Cut < len(b) {
		b, over = b[:f.Cut], true
	}
	b = append(b[:len(b):len(b)], f.Extra...)
	if f.Drip > 0 {
		for i := range b {
			if !s.wait(f.Drip) {
				return false
			}
			if _, err := c.Write(b[i : i+1]); err != nil {
				return false
			}
		}
	} else if _, err := c.Write(b); err != nil {
		return false
	}
	if !over {
		return true
	}
	s.end(c, f.End)
	return false
}

// end ends the connection; the caller closes it.
func (s *Server) end(c stream, e End) {
	switch e {
	case RST:
		setLinger0(c)
		if t, ok := c.(*tls.Conn); ok {
			t.NetConn().Close() // without close_notify
		}
	case Hold:
		c.SetDeadline(time.Time{})
		io.Copy(io.Discard, c)
	case FIN:
		// Closing with unread bytes would send RST.
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		io.Copy(io.Discard, c)
	}
}

// wait sleeps. False: the server was closed.
func (s *Server) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

func setLinger0(c net.Conn) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
}
