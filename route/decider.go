package route

import (
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/stack/flow"
)

// decider makes the verdicts, by the policy in force and by what is known about a flow: its names and its owner.
type decider struct {
	base
	policy    atomic.Pointer[policy]
	host      *hostSide // nil: the host's services cannot be reached
	names     nameTable
	asker     *asker     // nil: owners cannot be found
	decisions *decisions // nil: not wanted

	// reload is held while the policy is replaced. It also guards the dns.Server of port53 against being replaced twice.
	reload sync.Mutex
}

// verdictOn returns the verdict on a destination as the app named it. What no proxy can carry is impossible, whatever
// the rules say; but a rule may send cloud metadata direct.
func (r *decider) verdictOn(q *query) *verdict {
	a := q.dst.Addr()
	if r.host.isHost(a) && q.dst.Port() != 0 {
		return r.host.verdictOn(r.policy.Load(), q)
	}
	if q.dst.Port() == 0 || !q.fake && (!flow.OneHost(a) || flow.IsOurs(a)) {
		return verdictImpossible
	}
	v := r.policy.Load().decide(q)
	if !q.fake && v.kind == carry && v.up.name != DirectName && !flow.CanBePeer(a) {
		return verdictImpossible
	}
	return v
}

// wantsNames reports whether answers of DNS must be remembered.
func (r *decider) wantsNames() bool {
	return r.decisions != nil || r.policy.Load().needs&(ofName|ofList) != 0
}

// queryOf returns what a verdict on a flow is based on, as far as it is known. Names are looked up only if they are
// needed.
func (r *decider) queryOf(f flow.Flow, dest Dest) query {
	q := query{proto: f.Proto, src: f.Src, dst: dest.Addr}
	switch {
	case dest.Name != "":
		q.names, q.fake = []string{plainName(dest.Name)}, true
	case dest.Sniffed != "":
		q.names = []string{dest.Sniffed}
	case r.wantsNames():
		q.names = r.names.of(dest.Addr.Addr(), r.now(), nil)
	}
	return q
}
