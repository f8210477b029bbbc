package publish

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Maker makes sockets in the program's namespace; netns.Sockets is one. Socket may be called concurrently.
type Maker interface {
	// Socket returns a non-blocking socket; the caller owns it.
	Socket(domain, typ int) (fd int, err error)
}

const (
	maxFlows    = 1024                   // connections of one published port, and senders of datagrams
	connectWait = 10 * time.Second       // for the program to accept; only a full backlog takes long
	shortage    = 100 * time.Millisecond // between two attempts if the host has no descriptors left
)

// Config is the configuration of Start.
type Config struct {
	Specs   []Spec
	Sockets Maker
	Targets []Target // where the program may listen, in the order in which they are tried
	// Datagrams are the targets of UDP, in the order in which they are tried. An answer counts only if it comes from the
	// target. A program that listens at all addresses usually lets the kernel choose the source of its answers, so that the
	// first targets should be those from which the kernel answers.
	Datagrams []Target
	Log       *slog.Logger
}

// Target is an address of the program's namespace, and the address that the program sees as the source.
type Target struct{ To, From netip.Addr }

// Stats are counters since the start, except for Open.
type Stats struct {
	Connections int64 `json:"connections"` // TCP connections that reached the program
	Refused     int64 `json:"refused"`     // TCP connections that did not
	Open        int64 `json:"open"`        // connections and senders of datagrams now
	Datagrams   int64 `json:"datagrams"`   // carried, in both directions
	Dropped     int64 `json:"dropped"`     // datagrams that were not carried
}

// Publisher listens on behalf of a program. Close ends it.
type Publisher struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	at     []Spec
	close  []func()

	connections, refused, open, datagrams, dropped atomic.Int64
}

// Start listens at every Spec. Nothing listens if an error is returned.
func Start(cfg Config) (*Publisher, error) {
	p := &Publisher{cfg: cfg}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	for _, s := range cfg.Specs {
		if err := p.listen(s); err != nil {
			p.Close()
			return nil, err
		}
	}
	return p, nil
}

// Listening returns the Specs with the ports that the kernel chose.
func (p *Publisher) Listening() []Spec { return p.at }

// Stats may be called from any goroutine.
func (p *Publisher) Stats() Stats {
	return Stats{p.connections.Load(), p.refused.Load(), p.open.Load(), p.datagrams.Load(), p.dropped.Load()}
}

// Close stops listening, resets open connections, removes the unix sockets and waits until everything has ended. It may
// be called twice.
func (p *Publisher) Close() {
	p.cancel()
	for _, f := range p.close {
		f()
	}
	p.close = nil
	p.wg.Wait()
}

func (p *Publisher) listen(s Spec) (err error) {
	var lc net.ListenConfig
	switch {
	case s.Path != "":
		err = p.listenUnix(s)
	case s.UDP:
		var c net.PacketConn
		if s.Listen.Addr().IsUnspecified() {
			lc.Control = askDestination
		}
		if c, err = lc.ListenPacket(p.ctx, network("udp", s.Listen), s.Listen.String()); err == nil {
			s.Listen = c.LocalAddr().(*net.UDPAddr).AddrPort()
			p.close = append(p.close, func() { _ = c.Close() })
			p.wg.Go(func() { p.serveUDP(c.(*net.UDPConn), s) })
		}
	default:
		var l net.Listener
		if l, err = lc.Listen(p.ctx, network("tcp", s.Listen), s.Listen.String()); err == nil {
			s.Listen = l.Addr().(*net.TCPAddr).AddrPort()
			p.accept(l, s)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w%s", s, plain(err), s.hint(err))
	}
	p.at = append(p.at, s)
	return nil
}

// listenUnix replaces a socket on which nobody listens any more, but no other file.
func (p *Publisher) listenUnix(s Spec) error {
	if err := privsock.RemoveStale(s.Path); err != nil {
		return err
	}
	l, err := privsock.Listen(s.Path, -1)
	if err != nil {
		return err
	}
	p.accept(l, s)
	return nil
}

// network is "tcp4" for "tcp" and an IPv4 address, so that 0.0.0.0 does not mean IPv6 as well.
func network(name string, at netip.AddrPort) string {
	if at.Addr().Is4() {
		return name + "4"
	}
	return name + "6"
}

// plain returns the reason without the address, which is already in the message.
func plain(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// privileged is the first port that does not need root, unless the host's settings say otherwise.
const privileged = 1024

// hint tells what to do about an error.
func (s Spec) hint(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && s.Path != "":
		return ": choose another path, or end the program that listens there"
	case errors.Is(err, syscall.EADDRINUSE):
		return ": choose another port, as in --publish 8081:8080"
	case errors.Is(err, syscall.ENOENT):
		return ": make its directory"
	case s.Path != "" && (errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EROFS)):
		return ": choose a directory that you may write to"
	case errors.Is(err, syscall.EACCES) && s.Listen.Port() < privileged:
		return fmt.Sprintf(": publish it at a port from 1024 on, as in --publish %d:%d, or run "+
			"'sysctl -w net.ipv4.ip_unprivileged_port_start=%d' as root", 8000+s.Listen.Port(), s.Port, s.Listen.Port())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return ": the host does not have this address"
	}
	return ""
}
