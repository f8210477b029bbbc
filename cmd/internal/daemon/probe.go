package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks"
)

// probeTimeout bounds the look at one proxy at the start: who waits for longer than this thinks that we hang.
const probeTimeout = 10 * time.Second

// probe looks once at each proxy, all at a time: is it there, does it speak SOCKS5, does it take the credentials?
// Nothing is asked of it. The error is what the user should read.
func probe(ctx context.Context, cfg *config.Config, dial dialing) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	errs := make([]chan error, len(cfg.Upstreams))
	for i, u := range cfg.Upstreams {
		errs[i] = make(chan error, 1)
		go func() { errs[i] <- probeGroup(ctx, u, dial, cfg.ConnectTimeout) }()
	}
	var first error
	for _, c := range errs {
		if err := <-c; err != nil && first == nil {
			first = err
			cancel()
		}
	}
	if cause := context.Cause(ctx); first != nil && cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause // a signal
	}
	return first
}

// probeGroup looks at all servers of an upstream at a time. One that works is enough.
func probeGroup(ctx context.Context, u config.Upstream, dial dialing, connectTimeout time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all := u.Servers()
	type end struct {
		i   int
		err error
	}
	ends := make(chan end, len(all))
	for i, s := range all {
		go func() { ends <- end{i, probeServer(ctx, s, dial, connectTimeout)} }()
	}
	errs := make([]error, len(all))
	works := false
	for range all { // no look is left behind
		e := <-ends
		errs[e.i] = e.err
		if e.err == nil {
			works = true
			cancel()
		}
	}
	if works {
		return nil
	}
	return explain(all[0], errs[0])
}

func probeServer(ctx context.Context, s socks.Server, dial dialing, connectTimeout time.Duration) error {
	fail := func(op string, err error) error { return &socks.ServerError{Server: s.String(), Op: op, Err: err} }
	conn, op, err := reach(ctx, s, dial, connectTimeout)
	if err != nil {
		return fail(op, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	if c := s.TLSConfig(); c != nil {
		secure := tls.Client(conn, c)
		if err := secure.HandshakeContext(ctx); err != nil {
			return fail(socks.OpSecure, err)
		}
		conn = secure
	}
	h, err := socks.NewHandshake(s, socks.CmdConnect, socks.Addr{Name: "localhost", Port: 1}) // the request is not sent
	if err != nil {
		return err
	}
	// The greeting, and then the login if the server chose it. SOCKS4 and HTTP have neither.
	for !h.Requesting() {
		if err := write(conn, h); err != nil {
			return fail(socks.OpHandshake, err)
		}
		err := read(conn, h)
		if err != nil && h.LoggingIn() && s.HasCredentials() && !s.HasPassword() && !errors.Is(err, socks.ErrCredentials) {
			return fail(socks.OpAuthenticate, fmt.Errorf("%w: %w", socks.ErrNoPassword, err))
		}
		if errors.Is(err, socks.ErrCredentials) || errors.Is(err, socks.ErrMethod) {
			return fail(socks.OpAuthenticate, err)
		}
		if err != nil {
			return fail(socks.OpHandshake, err)
		}
	}
	return nil
}

// reach connects to a server, to one of its addresses or to its socket. op is what failed.
func reach(ctx context.Context, s socks.Server, dial dialing, timeout time.Duration) (conn net.Conn, op string, err error) {
	if path := s.Unix(); path != "" {
		conn, err = (&net.Dialer{Timeout: timeout}).DialContext(ctx, "unix", path)
		return conn, socks.OpConnect, err
	}
	resolve := dial.resolve
	if resolve == nil {
		resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return socks.LookupAddrs(ctx, net.DefaultResolver, host)
		}
	}
	addrs, err := resolve(ctx, s.Host()) // an address is its own answer
	if err == nil && len(addrs) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		return nil, socks.OpResolve, err
	}
	d := net.Dialer{Timeout: timeout, Control: rawControl(dial.control)}
	for _, a := range addrs {
		if conn, err = d.DialContext(ctx, "tcp", net.JoinHostPort(a.Unmap().String(), strconv.Itoa(int(s.Port())))); err == nil {
			break
		}
	}
	return conn, socks.OpConnect, err
}

func write(conn net.Conn, h socks.Handshake) error {
	for out := h.Output(); len(out) > 0; out = h.Output() {
		n, err := conn.Write(out)
		if err != nil {
			return err
		}
		h.Sent(n)
	}
	return nil
}

// read hands over one answer of the server.
func read(conn net.Conn, h socks.Handshake) error {
	for in := h.Input(); len(in) > 0; in = h.Input() {
		n, err := conn.Read(in)
		if n > 0 {
			if err := h.Received(n); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// proxyFault is why a proxy can't be used, in words for the user.
type proxyFault struct {
	error
	lasting bool // it does not pass by itself
}

func (e *proxyFault) Unwrap() error { return e.error }

// explain says what a fault of the proxy at the start means and what to do about it.
func explain(s socks.Server, err error) error {
	var fault *socks.ServerError
	var ours *ourAddress
	lasting := !errors.As(err, &fault) || errors.As(err, &ours)
	for _, wrong := range []error{socks.ErrCredentials, socks.ErrMethod, socks.ErrMalformed} {
		lasting = lasting || errors.Is(err, wrong)
	}
	return &proxyFault{inWords(s, err), lasting}
}

func inWords(s socks.Server, err error) error {
	where := s.Where()
	var fault *socks.ServerError
	if !errors.As(err, &fault) {
		return err
	}
	timeout := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		timeout = true
	}
	var errno syscall.Errno
	isErrno := errors.As(err, &errno)
	var lookup *net.DNSError
	var ours *ourAddress
	switch {
	case errors.As(err, &ours):
		return fmt.Errorf("cannot use the proxy %s: %w", where, ours)
	case fault.Op == socks.OpResolve && errors.As(err, &lookup):
		return fmt.Errorf("cannot find the proxy %s: %s: is the name right?", where, lookup.Err)
	case fault.Op == socks.OpResolve:
		return fmt.Errorf("cannot find the proxy %s: %w", where, fault.Err)
	case fault.Op == socks.OpConnect && errno == syscall.ECONNREFUSED:
		return fmt.Errorf("cannot reach the proxy %s: connection refused: is it running, and is this its port?", where)
	case fault.Op == socks.OpConnect && timeout:
		return fmt.Errorf("cannot reach the proxy %s: no answer: is the address right?", where)
	case fault.Op == socks.OpConnect && isErrno:
		return fmt.Errorf("cannot reach the proxy %s: %w", where, errno)
	case fault.Op == socks.OpConnect:
		return fmt.Errorf("cannot reach the proxy %s: %w", where, fault.Err)
	case fault.Op == socks.OpSecure && timeout:
		return fmt.Errorf("cannot use the proxy %s: it does not answer: does it speak TLS?", where)
	case fault.Op == socks.OpSecure && errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("cannot use the proxy %s: %w: give the authority's certificate with --proxy-ca FILE", where, fault.Err)
	case fault.Op == socks.OpSecure:
		return fmt.Errorf("cannot use the proxy %s by TLS: %w", where, fault.Err)
	case errors.Is(err, socks.ErrNoPassword):
		return fmt.Errorf("cannot log in to the proxy %s: it does not answer a user without a password: give one with --password-file FILE", where)
	case errors.Is(err, socks.ErrCredentials) && !s.HasPassword():
		return fmt.Errorf("cannot log in to the proxy %s: it refused the user, who has no password: give one with --password-file FILE", where)
	case errors.Is(err, socks.ErrCredentials):
		return fmt.Errorf("cannot log in to the proxy %s: it refused the user or the password", where)
	case errors.Is(err, socks.ErrMethod) && !s.HasCredentials():
		return fmt.Errorf("cannot log in to the proxy %s: it wants a login: use --proxy socks5://USER@%[1]s with --password-file FILE", where)
	case errors.Is(err, socks.ErrMethod):
		return fmt.Errorf("cannot log in to the proxy %s: it takes no user and password, and wants something else", where)
	case errors.Is(err, socks.ErrMalformed):
		return fmt.Errorf("cannot use the proxy %s: what answers there does not speak %s", where, s.Protocol())
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("cannot use the proxy %s: it closed the connection: does it speak %s, and to us?", where, s.Protocol())
	case timeout:
		return fmt.Errorf("cannot use the proxy %s: it does not answer: does it speak %s?", where, s.Protocol())
	}
	return fmt.Errorf("cannot use the proxy %s: %w", where, fault.Err)
}
