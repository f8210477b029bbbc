package route

import (
	"fmt"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Incoming carries a connection that a peer made to a program by way of an upstream. req opens the program's side (see
// stack.Open), and s is the socket to the upstream, which no loop watches; Incoming takes ownership of both, also if it
// returns an error. rule says in the log and the list of flows why the connection came. ended is called once, with
// relay.ErrAppGone if the program refused the connection. It may be called from any goroutine and does not block.
func (r *Router) Incoming(req flow.StreamRequest, upstream, rule string, s loop.Socket, ended func(relay.Result)) error {
	up := r.policy.Load().upstream(upstream)
	f := req.Flow()
	f.ID = r.ids.Add(1)
	if f.Start.IsZero() {
		f.Start = time.Now()
	}
	shard := r.shards[int(f.Src.Port())%len(r.shards)]
	err := error(nil)
	st := &stream{r: shard, req: req, flow: f, dest: Dest{Addr: f.Dst}, loop: -1}
	if up == nil {
		err = fmt.Errorf("there is no upstream %s", upstream)
	} else {
		st.v = &verdict{kind: carry, up: up, rule: rule}
		err = shard.streams.add(st, &r.tcp.live, r.cfg.Limits.Flows)
	}
	if err != nil {
		s.CloseReset()
		req.Reject(flow.RefuseReset)
		return err
	}
	shard.count.Incoming.Add(1)
	st.loop = shard.pickLoop()
	st.event(FlowOpened)
	st.state.Store(open)
	rel := shard.loops[st.loop].Start(st.request(), s, func(res relay.Result) {
		st.relayed(res)
		ended(res)
	})
	st.relay.Store(rel)
	if shard.streams.closing.Load() || !r.policy.Load().has(up) { // an Abort may have come before the relay was visible
		rel.Abort()
	}
	return nil
}

// upstream returns the upstream of that name, or nil.
func (p *policy) upstream(name string) *upstream {
	for _, u := range p.order {
		if u.name == name {
			return u
		}
	}
	return nil
}
