package route

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/sniff"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// A flow to an address of which no name is known can still say its name: in the ClientHello of TLS, or in the Host field of
// HTTP. The app sends these bytes only after its SYN was answered, which is before anybody knows whether the destination can
// be reached: what connect() says is not the truth for such a flow, and a dial that fails becomes a RST. So it is done only
// where the user wants it, on few ports, and where the name can change something.

// Sniff says which TCP flows are asked for their name.
type Sniff struct {
	Ports []uint16      // of the destination
	Wait  time.Duration // for the first bytes, after the handshake with the app. 0: DefaultSniffWait
	// Names has flows travel to the proxy by the name that they say, and so asks all of them. Else only rules see the names, and
	// a flow is asked if a rule can depend on its answer.
	Names bool
}

// DefaultSniffWait is how long a program that waits for its server's first word waits longer. A program that speaks first does
// so within its round-trip time to viasocks, which is on the same host.
const DefaultSniffWait = 300 * time.Millisecond

const (
	// maxSniffs is how many flows may be asked at a time. A SYN over it is forgotten and comes again in a second.
	maxSniffs = 4096
	// maxSniffed bounds the bytes that were read of flows and not yet passed on, as maxSniffs bounds the flows.
	maxSniffed = 32 << 20
)

// sniffs are the flows that were asked for their name and have not answered.
type sniffs struct {
	cfg   atomic.Pointer[Sniff] // nil: none is asked
	bytes atomic.Int64
	wg    sync.WaitGroup // one for each of now

	mu      sync.Mutex // none is taken by who holds a lock of the stack
	now     map[*sniff.Early]struct{}
	closing bool
}

// SetSniff has flows that begin from now on asked for their name; nil: none is. Any goroutine.
func (r *Router) SetSniff(s *Sniff) {
	if s != nil {
		c := *s
		if c.Wait == 0 {
			c.Wait = DefaultSniffWait
		}
		s = &c
	}
	r.sniffs.cfg.Store(s)
}

// sniffOrTake asks a flow for its name if that is wanted, or else does what the verdict says. q is what the verdict was taken
// on. Any goroutine.
func (r *shard) sniffOrTake(req flow.StreamRequest, f flow.Flow, dest Dest, v *verdict, q *query) {
	if c := r.sniffs.cfg.Load(); c != nil {
		if _, asked := req.(*sniff.Early); asked {
			if c.Names && v.carriesNames() && travels(dest.Sniffed) {
				dest.Name = dest.Sniffed
			}
		} else if r.asksName(c, v, q) {
			r.askName(c, req, f, dest)
			return
		}
	}
	r.takeStream(req, f, dest, v, q)
}

// asksName reports whether a flow must say its name before the verdict v on it holds.
func (r *Router) asksName(c *Sniff, v *verdict, q *query) bool {
	if len(q.names) > 0 || v.kind == impossible || !slices.Contains(c.Ports, q.dst.Port()) {
		return false
	}
	return c.Names && v.carriesNames() || r.policy.Load().nameMatters(q, v)
}

// carriesNames reports whether a name that a flow said is of use to the upstream of v.
func (v *verdict) carriesNames() bool { return v.kind == carry && v.up.name != DirectName && !v.up.own }

// askName answers the SYN and waits for the app's first bytes.
func (r *shard) askName(c *Sniff, req flow.StreamRequest, f flow.Flow, dest Dest) {
	t := &r.sniffs
	l := r.loops[f.ID%uint64(len(r.loops))]
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closing:
		r.turnAway(req, f, dest, verdictAsk, flow.RefuseReset, "refused", errClosing)
		return
	case len(t.now) >= maxSniffs || t.bytes.Load() >= maxSniffed:
		r.count.StreamsRefused.Add(1)
		r.count.SniffsFull.Add(1)
		req.Reject(flow.RefuseLater)
		return
	}
	if t.now == nil {
		t.now = make(map[*sniff.Early]struct{})
	}
	r.count.Sniffs.Add(1)
	t.wg.Add(1)
	e := sniff.Start(l.Loop, req, c.Wait, &t.bytes, func(e *sniff.Early, name string, err error) {
		defer t.wg.Done()
		t.mu.Lock()
		delete(t.now, e)
		t.mu.Unlock()
		r.named(e, f, dest, name, err)
	})
	t.now[e] = struct{}{}
}

// named takes the name that a flow said, or that it said none, on a loop.
func (r *shard) named(e *sniff.Early, f flow.Flow, dest Dest, name string, err error) {
	if err != nil {
		state := "cancelled"
		if errors.Is(err, loop.ErrClosed) {
			state, err = "aborted", errClosing
		}
		r.log.end(FlowInfo{Flow: f, Rule: noRule, State: state}, time.Since(f.Start), err)
		return
	}
	if name = plainName(name); name != "" && checkDomain(name, false) == nil && !isNumbers(name) {
		dest.Sniffed = name
		r.count.Sniffed.Add(1)
	}
	r.judge(e, f, dest)
}

// travels reports whether a name that a flow said may stand for its address at the proxy. The names of RFC 6761, 6762, 7686 and
// the reverse zones mean nothing there, or the proxy itself, as a single label may.
func travels(name string) bool {
	i := strings.LastIndexByte(name, '.')
	if i < 0 {
		return false
	}
	switch name[i+1:] {
	case "localhost", "local", "invalid", "onion", "arpa":
		return false
	}
	return true
}

// closeSniffs resets the flows that were asked and have not answered; new ones are refused.
func (r *Router) closeSniffs() {
	t := &r.sniffs
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closing = true
	for e := range t.now {
		e.Abort()
	}
}

// withoutNames is the rule without its conditions on names; nil: it has none.
func (r *Rule) withoutNames() *Rule {
	m := r.rest
	if m == nil || m.names == nil && (m.list == nil || len(m.list.names) == 0) {
		return nil
	}
	one, others := *r, *m
	others.kinds &^= ofName | ofList
	one.rest = &others
	return &one
}

// nameMatters reports whether another verdict than v, which was taken on q, could be the right one if q had a name.
func (p *policy) nameMatters(q *query, v *verdict) bool {
	if p.nameless == nil {
		return false
	}
	for i, r := range p.nameless {
		mine := p.verdicts[i]
		if r != nil && r.matches(q) != no && (mine == v || mine.kind != v.kind || mine.up != v.up) {
			return true // mine == v: a name may turn it, and what comes behind is not looked at
		}
		if mine == v {
			return false
		}
	}
	return false
}
