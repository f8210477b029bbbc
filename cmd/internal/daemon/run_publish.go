package daemon

import (
	"log/slog"
	"net/netip"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/publish"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// outsideAddrs returns the addresses of the program's lo that connections to published ports have as their source.
// There are none if nothing is published.
func outsideAddrs(cfg *config.Config) []netip.Prefix {
	if len(cfg.Publish) == 0 {
		return nil
	}
	return []netip.Prefix{netip.PrefixFrom(flow.Outside4, 32), netip.PrefixFrom(flow.Outside6, 128)}
}

// targets are the addresses at which the program may listen. Loopback comes first, because it also reaches programs
// that listen at all addresses.
var targets = []publish.Target{
	{To: netip.AddrFrom4([4]byte{127, 0, 0, 1}), From: flow.Outside4},
	{To: netip.IPv6Loopback(), From: flow.Outside6},
	{To: flow.TUN4, From: flow.Outside4},
	{To: flow.TUN6, From: flow.Outside6},
}

// datagramTargets are the addresses at which a program may receive datagrams. A program that listens at all of its addresses
// is reached at 198.18.0.3, because the kernel then sends its answers to 198.18.0.3 from that same address. The same holds
// for IPv6.
var datagramTargets = append([]publish.Target{
	{To: flow.Outside4, From: flow.Outside4},
	{To: flow.Outside6, From: flow.Outside6},
}, targets...)

// startPublishing makes the program's ports reachable. It returns nil if there are none; otherwise the caller closes the
// Publisher.
func startPublishing(cfg *config.Config, child *netns.Child, log *slog.Logger) (*publish.Publisher, error) {
	if len(cfg.Publish) == 0 {
		return nil, nil
	}
	p, err := publish.Start(publish.Config{
		Specs: cfg.Publish, Sockets: child.Sockets, Targets: targets, Datagrams: datagramTargets, Log: log,
	})
	if err != nil {
		return nil, err
	}
	for _, s := range p.Listening() {
		log.Info("published a port of the program", "port", s.String())
	}
	return p, nil
}

// fillPublished adds the counters of p, which may be nil, to status.
func fillPublished(s *control.Status, p *publish.Publisher) {
	if p == nil {
		return
	}
	s.Published = &control.Published{Stats: p.Stats()}
	for _, at := range p.Listening() {
		s.Published.Ports = append(s.Published.Ports, at.String())
	}
}
