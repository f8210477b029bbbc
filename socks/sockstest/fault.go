package sockstest

import (
	"crypto/tls"
	"io"
	"net"
	"time"
)

// Stage tells before which answer a fault happens.
type Stage uint8

// The three answers of a server.
const (
	AtGreeting Stage = iota // the choice of a method; of the Request, only Client and Time are known
	AtAuth                  // the status of user and password; User is known
	AtRequest               // the reply to the request
	numStages
)

// End tells what happens to the connection after a fault.
type End uint8

// The values of End.
const (
	FIN  End = iota // closed in order
	Hold            // kept open; what arrives is read and discarded
	RST             // reset
)

// Fault tells how the server misbehaves at one answer. The zero value means that it does not. The fields can be
// combined; the functions below return the usual faults.
type Fault struct {
	Reply    byte   // do nothing, answer with this REP (at AtAuth: this status), then End
	Raw      []byte // do nothing, send this instead of an answer, then End
	NoAnswer bool   // do and send nothing; End
	Cut      int    // send only this many bytes of the answer, then End
	End      End

	Delay time.Duration // wait before the answer
	Drip  time.Duration // wait before each byte of the answer
	Bound *Addr         // BND.ADDR and BND.PORT of the answer instead of the true ones
	Extra []byte        // sent together with the answer, in one write

	// For the datagrams of an association. Association.SetFault changes these later.
	DropUDP bool // in both directions
	// a datagram to such a destination is not sent and ends the association, as with sing-box and trojan
	EndUDP func(Addr) bool
	// datagrams to names are dropped; or answers to them have the name as their source, as with sing-box
	DropNames, AsName bool
	VaryUDP           bool         // each destination sees another source port, as with tailscale
	CloseUDP          bool         // the association ends as soon as it was granted, as with simple-socks
	DeafUDP           bool         // nothing listens on the relay's port, as with ss-local without -u
	Frag              byte         // FRAG of datagrams to the client
	BadUDP            bool         // headers to the client are truncated
	MangleTo          func([]byte) // any other change to datagrams for the client, on header and payload in place
}

// Reply answers with code (RFC 1928, section 6) and closes.
func Reply(code byte) Fault { return Fault{Reply: code} }

// Silence never answers and keeps the connection open.
func Silence() Fault { return Fault{NoAnswer: true, End: Hold} }

// EarlyClose closes instead of answering.
func EarlyClose() Fault { return Fault{NoAnswer: true, End: FIN} }

// EarlyReset resets instead of answering.
func EarlyReset() Fault { return Fault{NoAnswer: true, End: RST} }

// Garbage answers with bytes that are not SOCKS at all.
func Garbage() Fault {
	return Fault{Raw: []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")}
}

// BadVersion answers with SOCKS version 4.
func BadVersion() Fault { return Fault{Raw: []byte{4, 0, 0, 1, 127, 0, 0, 1, 0, 80}, End: Hold} }

// BadAddrType answers success with an ATYP that does not exist.
func BadAddrType() Fault { return Fault{Raw: []byte{5, 0, 0, 2, 127, 0, 0, 1, 0, 80}, End: Hold} }

// Drip sends the answer byte by byte with a pause before each, and then continues normally.
func Drip(pause time.Duration) Fault { return Fault{Drip: pause} }

// Half sends the first n bytes of the answer, and then end.
func Half(n int, end End) Fault { return Fault{Cut: n, End: end} }

// LongName grants the request with a name of 255 bytes as BND.ADDR.
func LongName() Fault {
	name := make([]byte, 255)
	for i := range name {
		name[i] = 'a' + byte(i%26)
	}
	return Bound(Addr{Name: string(name), Port: 80})
}

// Bound grants the request with another BND.ADDR and BND.PORT, for bad relay addresses.
func Bound(a Addr) Fault { return Fault{Bound: &a} }

// refuses reports whether the request must not be executed.
func (f *Fault) refuses() bool { return f.Reply != 0 || f.Raw != nil || f.NoAnswer }

// SetFault sets the function that decides, for each request, how the server misbehaves; nil: not at all. f is called
// on the connection's goroutine. It may be changed at any time and applies to requests read from then on.
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

// answer sends b according to f. It returns false if the connection is over.
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

// wait sleeps. It returns false if the server was closed.
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
