package route

import (
	"errors"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Some servers grant UDP but do not carry it: ss-local without -u names a port on which nothing listens, simple-socks
// ends each association at once, and OpenSSH -D ends the connection instead of answering. As long as no datagram has
// come back, a few of these events are taken for "no UDP", so that programs get an error instead of silence.
var (
	errEndsRequests     = errors.New("it ends the connection when it is asked for UDP: it has none")
	errEndsAssociations = errors.New("it grants UDP and ends each association at once, and no answer has come")
	errNobodyListens    = errors.New("it grants UDP, but no server listens on the port that it names")
)

const (
	// deafAfter is how many consecutive associations must have ended, or datagrams met ICMP port unreachable, without
	// an answer. The datagrams may be those of several associations.
	deafAfter = 3
	// quickEnd is the longest life of an association that was ended "at once".
	quickEnd = time.Second
)

// refuseUDP refuses datagrams for a's upstream for a while, both waiting and new ones. The caller holds udp.mu.
func (r *shard) refuseUDP(a *assoc, why flow.Refusal, err error) {
	if a.m.gone.Load() || a.m.assocOf(a.up) != a {
		return
	}
	a.up.refuseWhy.Store(uint32(why))
	a.up.refuseUntil.Store(r.now() + int64(r.noUDP))
	a.up.failedUDP(r.Router, err)
	r.refuseQueue(a, why)
	a.m.drop(a)
	r.discard(a)
	if len(a.m.assocs) == 0 {
		r.endMapping(a.m, "refused", err)
	}
}

// failedUDP logs once that u does not work for UDP, until an answer comes.
func (u *upstream) failedUDP(r *Router, err error) {
	u.heard.Store(false)
	u.udp.failed(r, u, "UDP", err)
}

// heardUDP records that an answer came through u. It may be called from any goroutine.
func (u *upstream) heardUDP(r *Router) {
	u.heard.Store(true)
	u.deaf.Store(0)
	u.unreachable.Store(0)
	u.refuseUntil.Store(0)
	u.udp.works(r, u, "UDP")
}

// deafNow counts the ICMP errors that a's datagrams met, and reports whether its upstream should be taken for one without
// UDP: nothing was ever received from it, and its associations have met enough such errors together. A program seldom sends
// more than two datagrams from one socket, so each association alone would have met too few. The caller holds udp.mu.
func (a *assoc) deafNow() bool {
	if a.link == nil || a.up.heard.Load() || a.up.name == DirectName || a.up.own {
		return false
	}
	s := a.link.Stats()
	if s.Received > 0 || s.Unreachable == 0 {
		return false
	}
	all := a.up.unreachable.Add(s.Unreachable - a.unreachable)
	a.unreachable = s.Unreachable
	return all >= deafAfter
}
