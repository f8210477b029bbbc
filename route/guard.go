package route

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// An egress guard that refuses a connection to a host but resolves every name is no guard, because the names that a
// program asks for can carry data out. With Config.Guard a question is answered only if a rule may need the answer.

// verdictNoName is the verdict on a question for a name that no rule may need.
var verdictNoName = &verdict{kind: reject, rule: noRule}

var errGuarded = errors.New("no rule needs this name (--allow)")

// needsName reports whether a flow to this name may be carried for some address, port, protocol and owner. A rule for
// networks needs no name, because the program can use the address. name is plain; it is empty if no rule can mean it.
func (p *policy) needsName(name string) bool {
	q := query{names: []string{name}}
	for i := range p.rules {
		r := &p.rules[i]
		if !r.mayMean(&q) {
			continue
		}
		if r.action == ActionVia {
			return true
		}
		if r.asksNameAlone() {
			return false // this rule refuses the flow, whatever else is known of it
		}
	}
	return p.otherwise.kind == carry
}

// mayMean reports whether the rule can match a flow to the name in q because of the name, or because it is for any
// host.
func (r *Rule) mayMean(q *query) bool {
	if r.prefixes != nil && !r.turned(ofDest) {
		return false
	}
	if r.rest == nil {
		return true
	}
	if r.rest.kinds&ofName != 0 && anyName(r.rest.names, q.names) == r.turned(ofName) {
		return false
	}
	return r.rest.kinds&ofList == 0 || r.rest.list.has(q) != r.turned(ofList)
}

// asksNameAlone reports whether the rule has only conditions on the name.
func (r *Rule) asksNameAlone() bool {
	const others = ofSource | ofOwner
	return r.proto == 0 && r.ports == nil && r.prefixes == nil &&
		(r.rest == nil || r.rest.kinds&others == 0 && (r.rest.kinds&ofList == 0 || !r.turned(ofList)))
}

// judgeOf returns the function that decides on the questions of one flow and writes the decisions, or nil if that is
// not needed. It may be called from any goroutine.
func (r *port53) judgeOf(f flow.Flow) dns.Judge {
	if !r.policy.Load().guard && r.decisions == nil {
		return nil
	}
	return func(name string, query bool) bool {
		v := verdictResolve
		if p := r.policy.Load(); p.guard && !(query && p.needsName(name)) {
			v = verdictNoName
			r.guarded.tell(r.log, f, name, r.now())
		}
		if r.decisions != nil {
			d := decision{at: time.Now(), flow: f, v: v}
			if name != "" {
				d.names = []string{name}
			}
			r.decisions.post(d)
		}
		return v == verdictResolve
	}
}

// guardLog logs refused questions, at most one line each second.
type guardLog struct{ last atomic.Int64 }

func (g *guardLog) tell(to *flowLog, f flow.Flow, name string, now int64) {
	last := g.last.Load()
	if last != 0 && now-last < int64(time.Second) || !g.last.CompareAndSwap(last, now) {
		return
	}
	to.post(
		slog.LevelInfo,
		"question of DNS refused",
		slog.String("name", name),
		slog.Any("src", f.Src),
		slog.Any("err", errGuarded),
	)
}
