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

// A flow to an address without a known name may still reveal its name: in the ClientHello of TLS, or in the Host
// field of HTTP. The app sends these bytes only after its SYN was answered, which is before it is known whether the
// destination can be reached. For such a flow the result of connect() is not the truth, and a failed dial becomes a
// RST. Sniffing is therefore done only if the user wants it, on few ports, and where the name can make a difference.

// Sniff tells which TCP flows are held for their name.
type Sniff struct {
	Ports []uint16      // of the destination
	Wait  time.Duration // time for the first bytes, after the handshake with the app. 0: DefaultSniffWait
	// Names means that flows travel to the proxy by the name found, so all of them are held. Otherwise only rules see
	// the names, and a flow is held only if a rule may depend on its name.
	Names bool
}

// DefaultSniffWait is the delay for a program that waits for its server to speak first. A program that speaks first
// does so within its round-trip time to viasocks, which is on the same host.
const DefaultSniffWait = 300 * time.Millisecond

const (
	// maxSniffs is how many flows may be held at the same time. A SYN over the limit is forgotten and retransmitted
	// within a second.
	maxSniffs = 4096
	// maxSniffed limits the bytes that were read of flows and not yet passed on, as maxSniffs limits the flows.
	maxSniffed = 32 << 20
)

// sniffs are the flows that are held for their name.
type sniffs struct {
	cfg   atomic.Pointer[Sniff] // nil: no flow is held
	bytes atomic.Int64
	wg    sync.WaitGroup // one for each flow in now

	mu      sync.Mutex // never taken by a goroutine that holds a lock of the stack
	now     map[*sniff.Early]struct{}
	closing bool
}

// SetSniff sets which later flows are held for their name; nil: none. It may be called from any goroutine.
func (r *Router) SetSniff(s *Sniff) {
	if s != nil {
		c := *s
		if c.Wait == 0 {
			c.Wait = DefaultSniffWait
		}
		s = &c
	}
	r.tcp.sniffs.cfg.Store(s)
}

// sniffOrTake holds a flow for its name if that is wanted, and otherwise executes the verdict. q is what the verdict
// is based on. It may be called from any goroutine.
func (r *shard) sniffOrTake(req flow.StreamRequest, f flow.Flow, dest Dest, v *verdict, q *query) {
	if c := r.tcp.sniffs.cfg.Load(); c != nil {
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

// asksName reports whether a flow must be held for its name before its verdict v is final.
func (r *decider) asksName(c *Sniff, v *verdict, q *query) bool {
	if len(q.names) > 0 || v.kind == impossible || !slices.Contains(c.Ports, q.dst.Port()) {
		return false
	}
	return c.Names && v.carriesNames() || r.policy.Load().nameMatters(q, v)
}

// carriesNames reports whether v's upstream can use a name that was found.
func (v *verdict) carriesNames() bool { return v.kind == carry && v.up.name != DirectName && !v.up.own }

// askName answers the SYN and waits for the app's first bytes.
func (r *shard) askName(c *Sniff, req flow.StreamRequest, f flow.Flow, dest Dest) {
	t := &r.tcp.sniffs
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

// named handles the name that was found for a flow, or that there is none. It runs on a loop.
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

// travels reports whether a name that was found may replace the flow's address at the proxy. The names of RFC 6761,
// 6762, 7686 and the reverse zones have no meaning there, or mean the proxy itself, as a single label may.
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

// close resets the held flows and refuses new ones.
func (t *sniffs) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closing = true
	for e := range t.now {
		e.Abort()
	}
}

// withoutNames returns the rule without its conditions on names, or nil if it has none.
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

// nameMatters reports whether a verdict other than v, which is based on q, could be the right one if q had a name.
func (p *policy) nameMatters(q *query, v *verdict) bool {
	if p.nameless == nil {
		return false
	}
	for i, r := range p.nameless {
		mine := p.verdicts[i]
		if r != nil && r.matches(q) != no && (mine == v || mine.kind != v.kind || mine.up != v.up) {
			return true // mine == v: a name may invert it, and later rules are not examined
		}
		if mine == v {
			return false
		}
	}
	return false
}
