package dns

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

// tlsWait limits a TLS handshake. A question that cannot wait so long tries another resolver meanwhile.
const tlsWait = 10 * time.Second

// link carries questions to one resolver. It posts what arrives, and its end, to exchange.msgs. Its methods are
// called only by exchange.run.
type link interface {
	resolver() *resolver
	send(q *query) bool // with its ID; does not block and keeps nothing of q; false: the resolver accepts nothing
	close()             // ends the link soon; may be called twice
	wait()              // until its goroutines have ended, after close
}

// dialed is the result of a dial: a TCP connection, and what was built on it.
type dialed struct {
	r    *resolver
	fd   int              // for kind TCP, or -1
	raw  net.Conn         // for the other kinds
	tls  *tls.Conn        // over raw
	http *http.ClientConn // over tls, for kind HTTPS
	err  error
}

// close closes a connection of which no link was made.
func (d *dialed) close() {
	if d.raw != nil {
		_ = d.raw.Close()
	}
	if d.http != nil {
		_ = d.http.Close()
	}
	if d.raw == nil && d.err == nil && d.fd >= 0 {
		_ = syscall.Close(d.fd)
	}
}

// link makes a link of a connection. It takes ownership of the connection, even on error.
func (d *dialed) link(x *exchange) (link, error) {
	switch d.r.Kind {
	case HTTPS:
		return newHTTPSLink(d, x), nil
	case Tor:
		return newTorLink(x, d.r), nil
	case TLS:
		return newConn(d.tls, d.raw, x, d.r), nil
	}
	if err := syscall.SetNonblock(d.fd, true); err != nil {
		_ = syscall.Close(d.fd)
		return nil, fmt.Errorf("cannot use the connection: %w", err)
	}
	// Questions are small and must not wait for more data. If this fails, they are only late.
	_ = syscall.SetsockoptInt(d.fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	f := os.NewFile(uintptr(d.fd), "resolver")
	return newConn(f, f, x, d.r), nil
}

// connect dials r and posts the result to dials.
func (x *exchange) connect(ctx context.Context, r *resolver) {
	if r.Kind == Tor {
		x.dials <- dialed{r: r, fd: -1}
		return
	}
	x.dial(ctx, r.Resolver, func(fd int, err error) {
		d := dialed{r: r, fd: fd, err: err}
		if err != nil || r.Kind == TCP {
			x.dials <- d
			return
		}
		go func() {
			if err := x.secure(ctx, &d); err != nil {
				d.close()
				d = dialed{r: r, fd: -1, err: err}
			}
			x.dials <- d
		}()
	})
}

// secure makes the TLS connection of d, and the HTTP client over it. On error the caller closes d.
func (x *exchange) secure(ctx context.Context, d *dialed) error {
	f := os.NewFile(uintptr(d.fd), "resolver")
	raw, err := net.FileConn(f) // a copy
	_ = f.Close()
	if err != nil {
		d.err = err // nothing is left to close
		return fmt.Errorf("cannot use the connection: %w", err)
	}
	d.raw = raw
	ctx, cancel := context.WithTimeout(ctx, tlsWait)
	defer cancel()
	c := x.tls.Clone()
	c.ServerName = d.r.serverName()
	if d.r.Kind == HTTPS {
		c.NextProtos = []string{"h2"}
	}
	d.tls = tls.Client(raw, c)
	if err := d.tls.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("the TLS handshake failed: %w", err)
	}
	if d.r.Kind == HTTPS {
		d.http, err = newHTTPClient(ctx, d.r.Resolver, d.tls)
	}
	return err
}

// newTLSConfig returns the TLS configuration for all resolvers. Verification is always on; without roots, the
// system's authorities are used.
func newTLSConfig(roots *x509.CertPool) *tls.Config {
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12,
		ClientSessionCache: tls.NewLRUClientSessionCache(maxResolvers)}
}
