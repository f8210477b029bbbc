package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/stack/flow"
)

// ErrDied means that viasocks had started and then failed.
var ErrDied = errors.New("the data plane failed")

const (
	// stopTimeout limits the orderly teardown. What takes longer is left to the kernel, which closes everything
	// anyway.
	stopTimeout = 5 * time.Second
	// killAfter is how long a program has to end after its network has failed.
	killAfter = 5 * time.Second
	// How often, and at which interval, connections are reset that were completed while all were being reset. Between
	// two processes of one host a handshake takes some microseconds.
	lateResets, lateReset = 3, 10 * time.Millisecond
)

// The addresses of the TUN. They are single addresses, so they hide no other network, and there is no broadcast
// address.
var (
	tunAddrs = []netip.Prefix{netip.PrefixFrom(flow.TUN4, 32), netip.PrefixFrom(flow.TUN6, 128)}
	// nameserver is written to the program's resolv.conf. route/dns answers port 53 of any address.
	nameserver = flow.Gateway4
)

// nameservers returns the servers for the program's resolv.conf. If there are none, the program keeps the host's, and
// its questions are carried like other traffic.
func nameservers(cfg *config.Config) []netip.Addr {
	if cfg.DNSOff {
		return nil
	}
	return []netip.Addr{nameserver}
}

// stop ends p within stopTimeout. It calls between after the app's flows have been reset.
func stop(p *plane, between func()) {
	p.refuse()
	if between != nil {
		// A handshake that was in progress has completed only now. If the connection were not reset, its
		// retransmissions would go to the real peer once the host is open.
		for range lateResets {
			time.Sleep(lateReset)
			p.refuse()
		}
		between()
	}
	done := make(chan struct{})
	go func() { defer close(done); p.Close() }()
	select {
	case <-done:
	case <-time.After(stopTimeout):
		p.log.Error("cannot stop in order: it took too long", "limit", stopTimeout)
	}
}

// warn logs the warnings of the configuration.
func (e *env) warn(cfg *config.Config) {
	for _, w := range cfg.Warnings {
		e.log.Warn(w)
	}
}

// died returns the error for a data plane that ended by itself.
func died(err error) error { return fmt.Errorf("%w: %w", ErrDied, err) }

// startContext returns a context that ends when one of signals arrives. Its cause names the signal. cancel ends it, too, and
// returns an error if a signal has arrived: then the caller must end, because nobody else hears of this signal.
func startContext(signals <-chan os.Signal) (_ context.Context, cancel func() error) {
	ctx, end := context.WithCancelCause(context.Background())
	over := make(chan struct{})
	var stopped error
	take := func(s os.Signal) { stopped = fmt.Errorf("stopped by a signal: %s", s) }
	go func() {
		defer close(over)
		select {
		case s := <-signals:
			take(s)
			end(stopped)
		case <-ctx.Done():
		}
	}()
	return ctx, func() error {
		end(nil)
		<-over
		select {
		case s := <-signals: // it came at the same moment
			take(s)
		default:
		}
		return stopped
	}
}

// proxyName returns the proxy of --proxy, for the log.
func proxyName(cfg *config.Config) string {
	if len(cfg.Upstreams) == 0 || cfg.Upstreams[0].Name != config.DefaultUpstream {
		return "none"
	}
	return cfg.Upstreams[0].Server.String()
}
