package route

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// probeEvery is the interval of the probes that check whether a kept mapping still has its outer endpoint. They also
	// keep NATs and servers from forgetting an idle mapping.
	probeEvery = time.Minute
	// probeAgain is the pause after a probe that found nothing. After probeLost such probes in a row, the outer endpoint
	// counts as unknown.
	probeAgain = 10 * time.Second
	probeLost  = 3
	// maxKept limits the mappings that are kept.
	maxKept = 64
)

// Outer says where a kept mapping is reached from outside.
type Outer struct {
	At     netip.AddrPort // the outer endpoint; invalid: it is unknown
	Filter Filter
	Err    error // why At is unknown; nil: no probe has ended yet
	Cannot bool  // the server cannot give any port; the next probe will hardly find one
}

// Filter says who may send to an outer endpoint.
type Filter uint8

// The values of Filter.
const (
	FilterUnknown Filter = iota
	FilterOpen           // everybody: a datagram from an endpoint to which the mapping never sent has arrived
	FilterClosed         // only those to whom the mapping has sent: no such datagram has arrived
)

var (
	errFullOfKept = fmt.Errorf("more than %d UDP ports cannot be kept", maxKept)
	errKeptTwice  = errors.New("the port is kept already")
	errNoLink     = errors.New("the proxy grants no association at present")
	errNoUDP      = errors.New("the proxy has no UDP")
)

// keeping holds all kept mappings. Only the goroutine of Run uses it, except for stun.
type keeping struct {
	all  []*kept
	wg   sync.WaitGroup               // probes that run
	stun atomic.Pointer[[]socks.Addr] // see SetSTUN; any goroutine may use it
}

// SetSTUN sets the STUN servers that the next probes of kept mappings ask; see KeepUDP. Their answers are compared. Without
// servers, a probe asks the proxy to send to this host. SetSTUN may be called from any goroutine.
func (r *Router) SetSTUN(servers []socks.Addr) { r.keeping.stun.Store(&servers) }

// kept is the wish that the mapping of an app endpoint and its association exist.
type kept struct {
	*shard
	app      netip.AddrPort
	upstream string
	tell     func(Outer)

	// The fields below are guarded by udp.mu.

	over   bool
	outer  Outer            // what tell was called with last
	of     *assoc           // the association that is probed
	link   relay.PacketLink // its link when the probes began
	probe  *probe           // the probe that runs; nil: none
	next   int64            // when the next probe is due, on the Router's clock
	missed int              // how many probes in a row have found nothing
}

// KeepUDP makes the mapping of an app endpoint and its association with an upstream, and keeps both until end is called,
// whether or not the app sends anything. shard is the number of the stack's shard for the port of app; see stack.Stack.Home.
//
// tell is called whenever the outer endpoint of the mapping, or the reason why it is unknown, has changed. It is called with
// locks held: it must not block, and must not call the Router. KeepUDP and end may be called from any goroutine; end may be
// called twice. A call of tell that has begun may overlap the call of end.
func (r *Router) KeepUDP(shard int, app netip.AddrPort, upstream string, tell func(Outer)) (end func()) {
	k := &kept{shard: r.shards[shard], app: app, upstream: upstream, tell: tell}
	r.inbox.post(event{kind: evKeep, kept: k})
	return sync.OnceFunc(func() { r.inbox.post(event{kind: evUnkeep, kept: k}) })
}

// add begins to keep k, or tells why it cannot.
func (t *keeping) add(k *kept) {
	k.udp.mu.Lock()
	defer k.udp.mu.Unlock()
	switch {
	case k.udp.clos:
		return
	case len(t.all) >= maxKept:
		k.report(Outer{Err: errFullOfKept})
		return
	case slices.ContainsFunc(t.all, func(o *kept) bool { return o.app == k.app }):
		k.report(Outer{Err: errKeptTwice})
		return
	}
	t.all = append(t.all, k)
	k.look()
}

// remove keeps k no longer.
func (t *keeping) remove(k *kept) {
	k.udp.mu.Lock()
	defer k.udp.mu.Unlock()
	t.all = slices.DeleteFunc(t.all, func(o *kept) bool { return o == k })
	k.finish()
}

// look looks after all kept mappings.
func (t *keeping) look() {
	for _, k := range t.all {
		k.udp.mu.Lock()
		k.look()
		k.udp.mu.Unlock()
	}
}

// end keeps nothing any longer, and waits until the probes have ended.
func (t *keeping) end() {
	for _, k := range t.all {
		k.udp.mu.Lock()
		k.finish()
		k.udp.mu.Unlock()
	}
	t.all = nil
	t.wg.Wait()
}

// finish ends k. Its mapping ends later, as any other does. The caller holds udp.mu.
func (k *kept) finish() {
	if k.over {
		return
	}
	k.over = true
	k.lose()
	if m := k.udp.bySrc[k.app]; m != nil && m.kept == k {
		m.kept, m.lastUp = nil, k.now()
	}
}

// lookKept looks after m if it is kept. It is called when an association of m has opened or ended. The caller holds udp.mu.
func (r *shard) lookKept(m *mapping) {
	if m.kept != nil {
		m.kept.look()
	}
}

// look makes the mapping and the association if they are missing, and starts a probe when one is due. It is called about
// once a second, and when an association has opened or ended. The caller holds udp.mu.
func (k *kept) look() {
	if k.over || k.udp.clos {
		return
	}
	now := k.now()
	up := k.policy.Load().upstream(k.upstream)
	if up == nil {
		k.lose()
		k.report(Outer{Err: fmt.Errorf("there is no upstream %s", k.upstream)})
		return
	}
	a, err := k.assoc(up, now)
	switch {
	case err != nil:
		k.lose()
		k.report(Outer{Err: err, Cannot: err == errNoUDP})
	case a.link == nil:
		k.lose()
		o := Outer{}
		if a.failures > 0 {
			o.Err = errNoLink
		}
		k.report(o)
	case a.link != k.link:
		k.lose()
		k.of, k.link, k.missed = a, a.link, 0
		k.report(Outer{})
		k.begin()
	case k.probe == nil && now >= k.next:
		k.begin()
	}
}

// assoc returns the association of the mapping with up. It makes the mapping and the association if they do not exist. The
// caller holds udp.mu.
func (k *kept) assoc(up *upstream, now int64) (*assoc, error) {
	m := k.udp.bySrc[k.app]
	if a := m.assocOf(up); a != nil {
		m.kept = k
		return a, nil
	}
	if _, refused := up.refused(now); refused {
		return nil, errNoUDP
	}
	if m == nil {
		anywhere := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		v := &verdict{up: up, rule: fmt.Sprintf("listen %d/udp", k.app.Port())}
		if m = k.newMapping(v, &flow.Packet{Src: k.app, Dst: anywhere}, "", now); m == nil {
			return nil, errMappingsFull
		}
		m.lastUp = now
	}
	m.kept = k
	a := &assoc{m: m, up: up, loop: k.pickLoop()}
	m.assocs = append(m.assocs, a)
	k.inbox.post(event{kind: evOpen, a: a})
	return a, nil
}

// lose ends the probe, because its association has ended or is no longer wanted. The caller holds udp.mu.
func (k *kept) lose() {
	k.endProbe()
	k.of, k.link = nil, nil
}

// endProbe ends the probe. For probeLinger, answers that come late still do not reach the app. The caller holds udp.mu.
func (k *kept) endProbe() {
	if p := k.probe; p != nil {
		k.probe = nil
		p.cancel()
		time.AfterFunc(k.probeLinger, func() { p.of.probe.CompareAndSwap(p, nil) })
	}
}

// report calls tell with o, unless it was called with the same before. The caller holds udp.mu.
func (k *kept) report(o Outer) {
	same := o.At == k.outer.At && o.Filter == k.outer.Filter && (o.Err == nil) == (k.outer.Err == nil) &&
		(o.Err == nil || o.Err.Error() == k.outer.Err.Error())
	if !same {
		k.outer = o
		k.tell(o)
	}
}

// begin starts a probe. The caller holds udp.mu.
func (k *kept) begin() {
	if k.ctx.Err() != nil {
		return
	}
	p := newProbe(k)
	k.probe = p
	k.of.probe.Store(p)
	k.keeping.wg.Go(func() {
		p.run(func(o Outer, over bool) { k.inbox.post(event{kind: evProbed, kept: k, found: &probed{p, o, over}}) })
	})
}

// probed is what a probe has found.
type probed struct {
	p     *probe
	outer Outer
	over  bool // the probe has ended
}

// probed handles what a probe has found. An endpoint that was known stays so until probeLost probes have found nothing.
func (k *kept) probed(f *probed) {
	k.udp.mu.Lock()
	defer k.udp.mu.Unlock()
	if k.probe != f.p {
		return
	}
	now, o := k.now(), f.outer
	pause := k.probeEvery
	if o.Err != nil && !o.Cannot {
		k.missed++
		pause = k.probeAgain
		if k.outer.At.IsValid() && k.missed < probeLost {
			o = k.outer
		}
	} else {
		k.missed = 0
	}
	if o.At == k.outer.At && o.Filter == FilterUnknown {
		o.Filter = k.outer.Filter
	}
	k.report(o)
	if f.over {
		k.endProbe()
		k.next = now + int64(pause)
	}
}
