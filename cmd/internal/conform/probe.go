package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// Ends are the targets of a probe. Invalid ones are left out of the report.
type Ends struct {
	TCP  netip.AddrPort       // a FarEnd, over IPv4
	TCP6 netip.AddrPort       // the same over IPv6; its UDP port is the same
	UDP  [2][2]netip.AddrPort // its datagram sockets, by address and port
	Name string               // a name of TCP's address that the server can look up

	Refused     netip.AddrPort // a port, for TCP and UDP, on which nothing listens
	Unreachable netip.AddrPort // a host that a router reports to be unreachable
	Silent      netip.AddrPort // a host that never answers

	// Unsendable are destinations to which the server's host cannot send, by a word for the reason. Port 0 and a name
	// that does not exist are also tried.
	Unsendable map[string]netip.AddrPort
}

// Config is the configuration of a probe.
type Config struct {
	Server socks.Server
	Ends   Ends

	// Wait limits the wait for one answer; zero: 5 s. SilentWait is for the silent target; zero: 40 s.
	Wait, SilentWait time.Duration
	// UDPWait limits the wait for the answer to one datagram, which is sent up to three times; zero: 400 ms.
	UDPWait time.Duration
	// Token is that of a session with a public far end; empty: the far end is not public.
	Token string
	// Associate opens an association in another way than the probe's own. It returns a socket that is connected to
	// its relay, or nil, and a function that ends the association. If Associate is nil, the probe opens it itself.
	Associate func(ctx context.Context) (*net.UDPConn, func(), Answer)
	// Dial connects to the server, for tests and for transports other than TCP; nil: TCP to its host and port.
	Dial func(ctx context.Context) (net.Conn, error)
}

// prober is a running probe.
type prober struct {
	Config
	report *Report
	id     atomic.Uint64 // of datagrams and tokens
}

// Probe uses the server in every way that Report has a field for. It takes about 15 to 60 seconds, and returns early
// with a partial result when ctx ends. The error is that of ctx; faults of the server are in the report.
func Probe(ctx context.Context, c Config) (*Report, error) {
	p := newProber(c)
	if !p.reach(ctx) {
		return p.report, ctx.Err()
	}
	var silent sync.WaitGroup
	silent.Go(func() { p.report.Silent = p.try(ctx, socks.AddrFrom(p.Ends.Silent), p.SilentWait) })
	for _, step := range []func(context.Context){p.methods, p.targets, p.halfClose, p.resets, p.bind, p.udp, p.socks4} {
		if ctx.Err() == nil {
			step(ctx)
		}
	}
	silent.Wait()
	return p.report, ctx.Err()
}

func newProber(c Config) *prober {
	if c.Wait == 0 {
		c.Wait = 5 * time.Second
	}
	if c.SilentWait == 0 {
		c.SilentWait = 40 * time.Second
	}
	if c.UDPWait == 0 {
		c.UDPWait = 400 * time.Millisecond
	}
	if c.Dial == nil {
		at := net.JoinHostPort(c.Server.Host(), strconv.Itoa(int(c.Server.Port())))
		c.Dial = func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", at) }
	}
	p := &prober{Config: c, report: &Report{Server: c.Server.String(), Time: time.Now().UTC().Truncate(time.Second)}}
	p.id.Store(uint64(time.Now().UnixNano()))
	return p
}

// dial connects to the server. The connection ends after limit.
func (p *prober) dial(ctx context.Context, limit time.Duration) (net.Conn, error) {
	by := time.Now().Add(limit)
	ctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	c, err := p.Dial(ctx)
	if err == nil {
		c.SetDeadline(by)
	}
	return c, err
}

// reach reports whether the server accepts connections.
func (p *prober) reach(ctx context.Context) bool {
	c, err := p.dial(ctx, p.Wait)
	if err != nil {
		p.report.Error = err.Error()
		return false
	}
	c.Close()
	p.report.Reachable = true
	return true
}

// methods asks only for the choice of a method.
func (p *prober) methods(ctx context.Context) {
	choice := func(greeting ...byte) int {
		c, err := p.dial(ctx, p.Wait)
		if err != nil {
			return -1
		}
		defer c.Close()
		var b [2]byte
		if _, err := c.Write(greeting); err != nil {
			return -1
		}
		if _, err := io.ReadFull(c, b[:]); err != nil || b[0] != 5 {
			return -1
		}
		return int(b[1])
	}
	p.report.MethodOfNone = choice(5, 1, 0)
	p.report.MethodOfBoth = choice(5, 2, 0, 2)
}

// ask makes a request of s on a new connection. Unless the answer is Granted, the connection and the handshake are
// nil; otherwise the caller closes the connection.
func (p *prober) ask(ctx context.Context, s socks.Server, cmd socks.Command, dst socks.Addr, limit time.Duration) (
	net.Conn, Answer, socks.Handshake) {
	c, err := p.dial(ctx, limit)
	if err != nil {
		return nil, Answer{Kind: Failed, Error: err.Error()}, nil
	}
	unblock := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	h, err := socks.NewHandshake(s, cmd, dst)
	if err != nil {
		c.Close()
		return nil, Answer{Kind: Failed, Error: err.Error()}, nil
	}
	reply, after, err := shake(c, h)
	a := answer(reply, err)
	a.After = after.Milliseconds()
	if a.Kind != Granted {
		if a.Kind != Refused && !h.Requested() && a.Kind != NoLogin {
			a.Error = "before the request: " + a.Error
		}
		c.Close()
		return nil, a, nil
	}
	a.Bound = h.Bound().String()
	return c, a, h
}

// shake runs the handshake, or the rest of it. It returns the bytes of the reply, the time since the request, and the
// error that ended it.
func shake(c net.Conn, h socks.Handshake) (reply []byte, after time.Duration, err error) {
	var asked time.Time
	for !h.Done() {
		if out := h.Output(); len(out) > 0 {
			n, err := c.Write(out)
			h.Sent(n)
			if err != nil {
				return nil, 0, err
			}
			asked = time.Now()
			continue
		}
		in := h.Input()
		n, readErr := c.Read(in)
		if h.Requested() {
			reply = append(reply, in[:n]...)
		}
		if err := h.Received(n); err != nil {
			return reply, time.Since(asked), err
		}
		if readErr != nil && !h.Done() {
			return reply, time.Since(asked), readErr
		}
	}
	return reply, time.Since(asked), nil
}

// granted4 is the CD of a SOCKS4 grant; refusals are higher.
const granted4 = 90

// answer describes what came instead of a grant.
func answer(reply []byte, err error) Answer {
	var code socks.Reply
	switch {
	case err == nil:
		return Answer{Kind: Granted}
	case errors.Is(err, socks.ErrMalformed):
		return Answer{Kind: Malformed, Error: err.Error()}
	case len(reply) >= 2 && reply[0] == 0 && reply[1] > granted4: // SOCKS4, which has its own codes
		return Answer{Kind: Refused, Code: int(reply[1])}
	case errors.As(err, &code):
		return Answer{Kind: Refused, Code: int(code), Short: len(reply) < 5}
	case errors.Is(err, socks.ErrMethod), errors.Is(err, socks.ErrCredentials):
		return Answer{Kind: NoLogin, Error: err.Error()}
	}
	a := ending(err)
	if len(reply) > 0 && a.Kind == Closed {
		a.Kind, a.Error = Malformed, fmt.Sprintf("FIN after % x", reply)
	}
	return a
}

// ending describes how a connection ended.
func ending(err error) Answer {
	kind := Failed
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		kind = Closed
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		kind = Reset
	case errors.Is(err, os.ErrDeadlineExceeded):
		kind = Silence
	}
	return Answer{Kind: kind, Error: err.Error()}
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)
}
