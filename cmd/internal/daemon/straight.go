package daemon

import (
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/flow"
)

// straight returns the rules that the kernel applies in place of the data plane, by their positions. There are none if
// somebody wants to see each decision, or if a flow may get another destination by the name that it begins with, or in a
// namespace of others, whose kernel does not lead to where viasocks connects from.
func straight(cfg *config.Config) (at []int, all []kernel.Straight) {
	host := cfg.Command == config.Up || cfg.Command == config.Check
	if !host || cfg.Host.DirectCarry || cfg.Decisions != "" || cfg.SniffMode == "name" {
		return nil, nil
	}
	at, found := route.StraightRules(cfg.Rules, kernel.MaxStraight)
	for _, s := range found {
		proto := uint8(unix.IPPROTO_TCP)
		if s.Proto == flow.UDP {
			proto = unix.IPPROTO_UDP
		}
		all = append(all, kernel.Straight{Proto: proto, Net: s.Net, Ports: kernel.PortRange{First: s.Lo, Last: s.Hi}})
	}
	return at, all
}
