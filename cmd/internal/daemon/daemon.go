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

// ErrDied: it had started, and then failed.
var ErrDied = errors.New("the data plane failed")

const (
	// stopTimeout bounds the orderly teardown. What takes longer is left to the kernel, which closes everything anyway.
	stopTimeout = 5 * time.Second
	// killAfter is how long a program has to end when its network has failed under it.
	killAfter = 5 * time.Second
	// How often, and how far apart, what became a connection while all were reset is reset too. Between two processes of
	// one host a handshake takes some microseconds.
	lateResets, lateReset = 3, 10 * time.Millisecond
)

// Addresses of the TUN. They are single addresses: no network beside them is lost, and there is no broadcast.
var (
	tunAddrs = []netip.Prefix{netip.PrefixFrom(flow.TUN4, 32), netip.PrefixFrom(flow.TUN6, 128)}
	// nameserver stands in the program's resolv.conf. Port 53 of whatever address is answered by route/dns.
	nameserver = flow.Gateway4
)

// nameservers are for the program's resolv.conf; none: it has the host's, and questions to it are carried like anything else.
func nameservers(cfg *config.Config) []netip.Addr {
	if cfg.DNSOff {
		return nil
	}
	return []netip.Addr{nameserver}
}

// stop ends p within stopTimeout; between is done when the app's flows have been reset.
func stop(p *plane, between func()) {
	p.refuse()
	if between != nil {
		// A handshake that was under way has become a connection only now. Were it not reset, its retransmissions would
		// go to the real peer once the host is open.
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

// warn logs what the configuration had to say.
func (e *env) warn(cfg *config.Config) {
	for _, w := range cfg.Warnings {
		e.log.Warn(w)
	}
}

// died is the error for a data plane that ended by itself.
func died(err error) error { return fmt.Errorf("%w: %w", ErrDied, err) }

// startContext ends when one of signals comes; its cause says so.
func startContext(signals <-chan os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		select {
		case s := <-signals:
			cancel(fmt.Errorf("stopped by a signal: %s", s))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// proxyName is the one of --proxy for the log.
func proxyName(cfg *config.Config) string {
	if len(cfg.Upstreams) == 0 || cfg.Upstreams[0].Name != config.DefaultUpstream {
		return "none"
	}
	return cfg.Upstreams[0].Server.String()
}
