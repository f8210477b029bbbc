package dns

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// maxZones limits Config.Zones. Each zone that asks through the upstream has a goroutine.
const maxZones = 64

// Zone is a name, and every name below it, that has its own servers.
type Zone struct {
	Suffix string // in the form of Pool's names: in lower case, without a dot at either end
	// Resolvers are asked through the upstream, as Config.Resolvers.
	Resolvers []Resolver
	// Direct are asked without the upstream if there are no Resolvers. If there are none either, the host's own
	// servers are asked.
	Direct []DirectServer
}

// String returns the zone in the form SUFFIX=SERVER[,SERVER...].
func (z Zone) String() string {
	var servers []string
	for _, r := range z.Resolvers {
		servers = append(servers, r.String())
	}
	for _, d := range z.Direct {
		servers = append(servers, d.String())
	}
	if len(servers) == 0 {
		servers = []string{"direct"}
	}
	return z.Suffix + "=" + strings.Join(servers, ",")
}

// asking is what asks servers: an exchange or a direct.
type asking interface {
	take(q *query) bool
	run(ctx context.Context)
}

// split tells who is asked for names that are not for the resolvers.
type split struct {
	zones map[string]asking      // by the name in the form of RFC 1035, section 3.1, in lower case
	host  *direct                // nil: the host has no servers that can be asked
	local func(name []byte) bool // nil: only names in zones are for host
	all   []asking               // without duplicates
}

// newSplit checks this part of the configuration.
func newSplit(cfg *Config, count *counters, finish func(q *query, resp []byte)) (split, error) {
	s := split{zones: make(map[string]asking), local: cfg.HostNames}
	if len(cfg.Zones) > maxZones {
		return s, fmt.Errorf("cannot answer DNS: %d zones have servers of their own, %d are possible", len(cfg.Zones), maxZones)
	}
	if cfg.HostServers != nil {
		s.host = newDirect(cfg, cfg.HostServers, count, finish)
		s.all = append(s.all, s.host)
	}
	if cfg.HostServers == nil && cfg.HostNames != nil {
		return s, errors.New("cannot answer DNS: names are for the host's servers, and there are none")
	}
	for _, z := range cfg.Zones {
		if !isHost([]byte(z.Suffix)) {
			return s, fmt.Errorf("cannot answer DNS: %q is not the name of a zone", z.Suffix)
		}
		var to asking
		switch {
		case len(z.Resolvers) > 0:
			if err := checkResolvers(z.Resolvers, cfg.Tor); err != nil {
				return s, err
			}
			own := *cfg
			own.Resolvers = z.Resolvers
			to = newExchange(&own, count, finish)
			s.all = append(s.all, to)
		case len(z.Direct) > 0:
			if len(z.Direct) > maxResolvers {
				return s, fmt.Errorf("cannot answer DNS: zone %s has more than %d servers", z.Suffix, maxResolvers)
			}
			to = newDirect(cfg, func() []DirectServer { return z.Direct }, count, finish)
			s.all = append(s.all, to)
		case s.host != nil:
			to = s.host
		default:
			return s, fmt.Errorf("cannot answer DNS: zone %s has no servers", z.Suffix)
		}
		s.zones[string(appendWire(nil, []byte(z.Suffix)))] = to
	}
	if cfg.DialDirect == nil {
		for _, a := range s.all {
			if _, ok := a.(*direct); ok {
				return s, errors.New("cannot answer DNS: no way to ask servers past the upstream is given")
			}
		}
	}
	return s, nil
}

// zone returns who is asked for the name of a question because of Zones, or nil. The longest suffix wins.
func (s *split) zone(msg []byte, q *question) asking {
	if len(s.zones) == 0 || q.end == 0 {
		return nil
	}
	var buf [maxName]byte
	name := buf[:0]
	for _, c := range msg[headerLen : q.end-4] { // length bytes are below 64 and thus not letters
		name = append(name, lower(c))
	}
	for off := 0; off < len(name)-1; off += 1 + int(name[off]) {
		if to := s.zones[string(name[off:])]; to != nil {
			return to
		}
	}
	return nil
}

// ofHost reports whether the host's servers are asked for the name of a question for a reason other than Zones.
func (s *split) ofHost(msg []byte, q *question) bool {
	if s.local == nil || q.end == 0 {
		return false
	}
	var buf [maxName]byte
	name, _, ok := appendHost(buf[:0], msg, headerLen)
	return ok && s.local(name)
}

// run runs all of them until ctx ends.
func (s *split) run(ctx context.Context) {
	var all sync.WaitGroup
	for _, a := range s.all {
		all.Go(func() { a.run(ctx) })
	}
	all.Wait()
}
