package daemon

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// probeTimeout limits the check of one proxy at the start. A user who waits longer would think that viasocks hangs.
const probeTimeout = 10 * time.Second

// othersTimeout is how long the upstreams that are not required have after the required one has answered.
const othersTimeout = 3 * time.Second

// probe checks all proxies once, at the same time: whether each can be reached, speaks its protocol and accepts the
// credentials. It sends no request. The error is text for the user.
//
// The upstream of --proxy must work or, if there is none, at least one. Another one that does not answer is left to
// dial.absent, because it may come back and not every flow needs it. A fault that will not pass by itself, such as a
// wrong password, is an error whichever upstream has it.
func probe(ctx context.Context, cfg *config.Config, dial dialing) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	d, err := socks.NewDialer(socks.Options{
		PrepareSocket: dial.prepare, Resolve: dial.resolve, ConnectTimeout: cfg.ConnectTimeout, CanBePeer: flow.CanBePeer,
	})
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := loop.New()
	if err != nil {
		return err
	}
	var ran sync.WaitGroup
	ran.Go(func() { _ = l.Run(context.Background()) })
	defer ran.Wait()
	defer l.Close()
	b := builder{d: d, l: l, want: slices.Clone(cfg.Upstreams)}
	for i := range b.want {
		b.want[i].Group.Check = 0 // one check is enough
	}
	ups, err := b.all()
	if err != nil {
		return err
	}
	defer closeGroups(ups, nil)
	results := make(chan checked, len(ups)) // with a place for each, so that a late one blocks nobody
	for i, u := range ups {
		u.client.Check(ctx, l, func(errs []error) { results <- checked{i, errs} })
	}
	why, err := collect(ups, results)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) &&
		!errors.Is(cause, context.DeadlineExceeded) {
		return cause // a signal
	}
	if err == nil {
		for i, u := range ups {
			dial.absent.note(u.Config, why[i])
		}
	}
	return err
}

// checked is the result of the check of an upstream.
type checked struct {
	i    int     // the upstream
	errs []error // of each of its servers; nil: it works
}

// collect waits for the results of the checks. It returns why each upstream does not work, nil for those that do, and
// what makes it impossible to start; nil: nothing does.
func collect(ups []upstream, results <-chan checked) (why []error, err error) {
	required := slices.IndexFunc(ups, func(u upstream) bool { return u.Config.Name == config.DefaultUpstream })
	for _, u := range ups {
		silent := fmt.Errorf("cannot use the proxy %s: it has not answered within %v", u.Config.Server.Where(), othersTimeout)
		why = append(why, &proxyFault{error: silent})
	}
	var enough <-chan time.Time // fires when the others have had their time
	for left := len(ups); left > 0; left-- {
		select {
		case r := <-results:
			if why[r.i] = nil; r.errs != nil {
				why[r.i] = explain(ups[r.i].Config.Server, r.errs[0]) // the first server stands for all
			}
			if required == r.i && r.errs != nil {
				return why, why[r.i]
			}
			if r.errs == nil && (required < 0 || required == r.i) && enough == nil {
				enough = time.After(othersTimeout)
			}
		case <-enough:
			left = 1
		}
	}
	for _, err := range why {
		if err != nil && (enough == nil || !mayCome(err)) {
			return why, err
		}
	}
	return why, nil
}

// proxyFault is why a proxy cannot be used, in words for the user.
type proxyFault struct {
	error
	lasting bool // it will not pass by itself
}

func (e *proxyFault) Unwrap() error { return e.error }

// explain tells what a fault of the proxy at the start means and what to do about it.
func explain(s socks.Server, err error) error {
	var fault *socks.ServerError
	var ours *ourAddress
	lasting := !errors.As(err, &fault) || errors.As(err, &ours)
	for _, wrong := range []error{socks.ErrCredentials, socks.ErrMethod, socks.ErrMalformed} {
		lasting = lasting || errors.Is(err, wrong)
	}
	return &proxyFault{inWords(s, err), lasting}
}

// isTimeout reports whether err says that time was up.
func isTimeout(err error) bool {
	var netErr net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) ||
		errors.As(err, &netErr) && netErr.Timeout()
}

// inWords returns err as a sentence that names the server and, where that is known, what to do.
func inWords(s socks.Server, err error) error {
	var fault *socks.ServerError
	if !errors.As(err, &fault) {
		return err
	}
	switch fault.Op {
	case socks.OpResolve, socks.OpConnect, socks.OpSecure:
		return unreached(s.Where(), fault, err)
	}
	return refused(s, fault, err)
}

// unreached returns the sentence for an error before the SOCKS protocol has begun.
func unreached(where string, fault *socks.ServerError, err error) error {
	timeout := isTimeout(err)
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
	case fault.Op == socks.OpSecure && (errno == syscall.ECONNRESET || errors.Is(err, io.EOF)):
		return fmt.Errorf("cannot use the proxy %s: it has ended the connection: does it speak TLS?", where)
	case fault.Op == socks.OpSecure && errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("cannot use the proxy %s: %w: give the authority's certificate with --proxy-ca FILE", where, fault.Err)
	}
	return fmt.Errorf("cannot use TLS with the proxy %s: %w", where, fault.Err)
}

// refused returns the sentence for an error of the SOCKS protocol.
func refused(s socks.Server, fault *socks.ServerError, err error) error {
	where := s.Where()
	var ours *ourAddress
	switch {
	case errors.As(err, &ours):
		return fmt.Errorf("cannot use the proxy %s: %w", where, ours)
	case errors.Is(err, socks.ErrNoPassword):
		return fmt.Errorf(
			"cannot log in to the proxy %s: it does not answer a user without a password: give one with --password-file FILE",
			where,
		)
	case errors.Is(err, socks.ErrCredentials) && !s.HasPassword():
		return fmt.Errorf(
			"cannot log in to the proxy %s: it refused the user, who has no password: give one with --password-file FILE",
			where,
		)
	case errors.Is(err, socks.ErrCredentials):
		return fmt.Errorf("cannot log in to the proxy %s: it refused the user or the password", where)
	case errors.Is(err, socks.ErrMethod) && !s.HasCredentials():
		return fmt.Errorf(
			"cannot log in to the proxy %s: it wants a login: use --proxy socks5://USER@%[1]s with --password-file FILE",
			where,
		)
	case errors.Is(err, socks.ErrMethod):
		return fmt.Errorf("cannot log in to the proxy %s: it accepts neither a password nor an anonymous login", where)
	case errors.Is(err, socks.ErrMalformed):
		return fmt.Errorf("cannot use the proxy %s: what answers there does not speak %s", where, s.Protocol())
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf(
			"cannot use the proxy %s: it closed the connection: does it speak %s, and does it accept this host?",
			where,
			s.Protocol(),
		)
	case isTimeout(err):
		return fmt.Errorf("cannot use the proxy %s: it does not answer: does it speak %s?", where, s.Protocol())
	}
	return fmt.Errorf("cannot use the proxy %s: %w", where, fault.Err)
}
