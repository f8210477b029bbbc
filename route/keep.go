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
	// probeEvery is how often it is checked that a kept mapping still has its outer endpoint. It also keeps the state of
	// NATs and servers that forget what is idle.
	probeEvery = time.Minute
	// probeAgain is the pause after a probe that found nothing. After probeLost of them in a row, what was found before
	// no longer counts.
	probeAgain = 10 * time.Second
	probeLost  = 3
	// maxKept limits the mappings that are kept.
	maxKept = 64
)

// Outer tells where a kept mapping is reached from outside.
type Outer struct {
	At     netip.AddrPort // invalid: this is not known
	Filter Filter
	Err    error // why it is not known; nil: not known yet
	Cannot bool  // the server is not able to do it
}

// Filter tells who may send to an outer endpoint.
type Filter uint8

// The values of Filter.
const (
	FilterUnknown Filter = iota
	FilterOpen           // everybody: a datagram of a stranger has arrived
	FilterClosed         // only those to whom the mapping has sent, as it seems
)

var (
	errFullOfKept = fmt.Errorf("more than %d ports of UDP", maxKept)
	errKeptTwice  = errors.New("the port is kept already")
	errNoLink     = errors.New("the proxy gives no association now")
	errNoUDP      = errors.New("the proxy has no UDP")
)

// keeping is all kept mappings. It belongs to Run.
type keeping struct {
	all  []*kept
	wg   sync.WaitGroup               // probes
	stun atomic.Pointer[[]socks.Addr] // see SetSTUN; any goroutine
}

// SetSTUN sets the servers that the next probes of kept mappings ask; see KeepUDP. The answers of two are compared. None: the
// proxy is asked to send to this host. It may be called from any goroutine.
func (r *Router) SetSTUN(servers []socks.Addr) { r.keeping.stun.Store(&servers) }

// kept is a mapping that exists, with its association, until it is no longer wanted. The fields below are guarded by
// udp.mu.
type kept struct {
	*shard
	app      netip.AddrPort
	upstream string
	tell     func(Outer)

	over   bool
	outer  Outer            // what was told last
	link   relay.PacketLink // to which the probes belong
	probe  *probe           // that runs
	next   int64            // when the next one is due, on the Router's clock
	missed int              // probes in a row that have found nothing
	of     *assoc           // which has link
}

// KeepUDP makes the mapping of an app endpoint and its association with an upstream at once, and keeps them until end is
// called, whether or not the app has sent anything. shard is the stack's for the port of app. tell is told whenever it becomes
// known, or is no longer true, where the mapping is reached from outside. It must not block, and must not call the Router.
func (r *Router) KeepUDP(shard int, app netip.AddrPort, upstream string, tell func(Outer)) (end func()) {
	k := &kept{shard: r.shards[shard], app: app, upstream: upstream, tell: tell}
	r.inbox.post(event{kind: evKeep, kept: k})
	return sync.OnceFunc(func() { r.inbox.post(event{kind: evUnkeep, kept: k}) })
}

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

// end ends everything, and waits for the probes.
func (t *keeping) end() {
	for _, k := range t.all {
		k.udp.mu.Lock()
		k.finish()
		k.udp.mu.Unlock()
	}
	t.all = nil
	t.wg.Wait()
}

// finish ends k. From now on its mapping is one like others. The caller holds udp.mu.
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

// lookKept looks after m if it is kept, because something has happened to an association. The caller holds udp.mu.
func (r *shard) lookKept(m *mapping) {
	if m.kept != nil {
		m.kept.look()
	}
}

// look makes what is missing, and probes what is due. It is called about once a second, and when an association opens or
// ends. The caller holds udp.mu.
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

// assoc returns the association of the mapping. It makes both if they do not exist.
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

// lose ends the probe, because its association is gone or no longer wanted.
func (k *kept) lose() {
	k.endProbe()
	k.of, k.link = nil, nil
}

// endProbe ends the probe. Its late answers are kept from the app for a while.
func (k *kept) endProbe() {
	if p := k.probe; p != nil {
		k.probe = nil
		p.cancel()
		time.AfterFunc(k.probeLinger, func() { p.of.probe.CompareAndSwap(p, nil) })
	}
}

// report tells o unless it was told already.
func (k *kept) report(o Outer) {
	same := o.At == k.outer.At && o.Filter == k.outer.Filter && (o.Err == nil) == (k.outer.Err == nil) &&
		(o.Err == nil || o.Err.Error() == k.outer.Err.Error())
	if !same {
		k.outer = o
		k.tell(o)
	}
}

// begin starts a probe.
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
	over  bool // it has ended
}

// probed handles what a probe has found.
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
