package route

import (
	"context"
	"maps"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// UDP to a fake address. Hardly any server accepts names in UDP headers, so the name is looked up: by the resolvers
// through the upstream that the rules choose, or on this host if the verdict is direct. Datagrams go to the real
// address on the mapping of their socket, whose outer port does not change, and datagrams from that address are
// delivered as coming from the fake one. If an app also writes to the real address itself, it gets answers from the
// real address from then on, as it expects.

const (
	maxFar   = 4096             // names that are being looked up, or whose address is stored
	maxBound = 1024             // fake destinations of one mapping
	farWait  = 6 * time.Second  // route/dns has answered by then, or never
	farMin   = 10 * time.Second // the minimum time for which an address, or the lack of one, is valid
	farMax   = time.Hour
)

var verdictNamed = &verdict{kind: named, rule: "dns"}

// farKey identifies a look-up.
type farKey struct {
	name       string
	v6, direct bool // direct: by this host's own resolver
}

// farAddr is the result of a look-up. It is guarded by udp.mu.
type farAddr struct {
	addr  netip.Addr // invalid: it has none
	until int64      // on the Router's clock; 0: never answered
	asked int64      // when the pending look-up began; 0: none is pending
	items []queuedFrom
	bytes int
}

// queuedFrom is a datagram that waits for an address.
type queuedFrom struct {
	queued
	src netip.AddrPort
}

// farTable contains the results for all names.
type farTable struct {
	byKey map[farKey]*farAddr
	held  int // bytes
}

// namedDest is a fake destination of a mapping.
type namedDest struct {
	name   string
	lease  dns.Lease
	v      *verdict
	policy *policy // that v belongs to
	until  int64   // until when v is valid
}

// farAnswer is the answer to a look-up.
type farAnswer struct {
	s    *shard
	key  farKey
	addr netip.Addr
	ttl  time.Duration
}

// carryNamed sends a datagram to a fake address, refuses it, or holds it until the address is known. The caller holds
// udp.mu.
func (r *shard) carryNamed(w flow.PacketWriter, p *flow.Packet, now int64) {
	m := r.udp.bySrc[p.Src]
	one := []flow.Packet{*p}
	d := m.namedTo(p.Dst)
	if d == nil {
		name, ok := r.cfg.Pool.AppendName(nil, p.Dst.Addr())
		if !ok || p.Dst.Port() == 0 {
			r.refuse(w, one, flow.RefuseHost)
			return
		}
		d = &namedDest{name: string(name)}
	}
	if pol := r.policy.Load(); d.v == nil || d.policy != pol || now >= d.until {
		q := query{proto: flow.UDP, src: p.Src, dst: p.Dst, names: []string{d.name}, fake: true}
		v := r.decideUDP(&q, p, now)
		if v != d.v && v != verdictAsk {
			r.decisions.post(decision{time.Now(), flow.Flow{Proto: flow.UDP, Src: p.Src, Dst: p.Dst}, q.names, v, q.owner})
		}
		d.v, d.policy, d.until = v, pol, now+deepAge
	}
	d.v.hit(r.index, 1)
	if d.v.kind != carry {
		r.run(w, d.v, one, now)
		if d.v == verdictAsk {
			d.v = nil
		}
		return
	}
	if why, refused := d.v.up.refused(now); refused && m.assocOf(d.v.up) == nil {
		r.refuse(w, one, why)
		return
	}
	far, known := r.farOf(w, d, p, now)
	if !known {
		return
	}
	if !flow.OneHost(far) || flow.IsOurs(far) || r.cfg.Pool.Contains(far) || d.v.up.name != DirectName && !flow.CanBePeer(far) {
		r.refuse(w, one, flow.RefuseHost)
		return
	}
	if m = r.bound(m, d, p, netip.AddrPortFrom(far, p.Dst.Port()), now); m == nil {
		r.count.Dropped.Add(1)
		return
	}
	one[0].Dst = netip.AddrPortFrom(far, p.Dst.Port())
	r.carry(w, d.v, one, now)
}

// bound returns m, or a new mapping, with the fake destination of p bound to real; nil: there is no room. The caller
// holds udp.mu.
func (r *shard) bound(m *mapping, d *namedDest, p *flow.Packet, real netip.AddrPort, now int64) *mapping {
	if m == nil {
		if m = r.newMapping(d.v, p, d.name, now); m == nil {
			return nil
		}
	}
	if m.namedTo(p.Dst) == nil {
		if len(m.named) >= maxBound {
			return nil
		}
		name, lease, _ := r.cfg.Pool.Hold(p.Dst.Addr())
		if name != d.name { // the address was given to another name just now
			lease.Release()
			return nil
		}
		d.lease = lease
		if m.named == nil {
			m.named = make(map[netip.AddrPort]*namedDest)
		}
		m.named[p.Dst] = d
	}
	m.bind(p.Dst, real)
	return m
}

// namedTo returns m's fake destination, or nil; m may be nil.
func (m *mapping) namedTo(fake netip.AddrPort) *namedDest {
	if m == nil {
		return nil
	}
	return m.named[fake]
}

// bind makes datagrams from real arrive as from fake. The last fake destination of a real address wins. The loops
// read the table without a lock, so it is replaced at each change.
func (m *mapping) bind(fake, real netip.AddrPort) {
	if _, itself := m.itself[real]; itself {
		return
	}
	next := make(map[netip.AddrPort]netip.AddrPort)
	if have := m.back.Load(); have != nil {
		if (*have)[real] == fake {
			return
		}
		maps.Copy(next, *have)
	}
	if len(next) >= 2*maxBound { // names whose addresses change all the time
		clear(next)
	}
	next[real] = fake
	m.back.Store(&next)
}

// addressed records that the app itself writes to these addresses: if they were bound, they no longer are. The caller
// holds udp.mu.
func (r *shard) addressed(pkts []flow.Packet) {
	m := r.udp.bySrc[pkts[0].Src]
	if m == nil || m.back.Load() == nil {
		return
	}
	for i := range pkts {
		real, have := pkts[i].Dst, *m.back.Load()
		if _, ok := have[real]; !ok {
			continue
		}
		if m.itself == nil || len(m.itself) >= maxBound {
			m.itself = make(map[netip.AddrPort]struct{})
		}
		m.itself[real] = struct{}{}
		next := maps.Clone(have)
		delete(next, real)
		m.back.Store(&next)
	}
}

// farOf returns the address of the name that d stands for. known is false if the datagram waits for it, or was
// refused because there is none. The caller holds udp.mu.
func (r *shard) farOf(w flow.PacketWriter, d *namedDest, p *flow.Packet, now int64) (far netip.Addr, known bool) {
	t := &r.udp.far
	k := farKey{d.name, p.Dst.Addr().Is6(), d.v.up.name == DirectName}
	f := t.byKey[k]
	if f == nil {
		if t.byKey == nil {
			t.byKey = make(map[farKey]*farAddr)
		}
		if len(t.byKey) >= maxFar && !t.makeRoom(now) {
			r.count.Dropped.Add(1)
			return far, false
		}
		f = &farAddr{}
		t.byKey[k] = f
	}
	if now >= f.until && (f.asked == 0 || now-f.asked > int64(farWait)) {
		if f.asked = 0; r.lookUp(k, d.v.up) {
			f.asked = now
		}
	}
	switch {
	case f.addr.IsValid(): // a new answer may be on its way meanwhile
		return f.addr, true
	case f.asked == 0:
		r.refuse(w, []flow.Packet{*p}, flow.RefuseHost)
		return far, false
	}
	n := len(p.Head) + len(p.Payload)
	if len(f.items) >= queueLen || f.bytes+n > queueBytes || t.held+n > r.share(heldAll) {
		r.count.QueueFull.Add(1)
		return far, false
	}
	buf := append(append(make([]byte, 0, n), p.Head...), p.Payload...)
	f.items = append(f.items, queuedFrom{queued{p.Dst, buf, len(p.Head), now}, p.Src})
	f.bytes += n
	t.held += n
	return far, false
}

// makeRoom drops expired results, and reports whether there were any.
func (t *farTable) makeRoom(now int64) bool {
	for k, f := range t.byKey {
		if now >= f.until && (f.asked == 0 || now-f.asked > int64(farWait)) {
			t.held -= f.bytes
			delete(t.byKey, k)
		}
	}
	return len(t.byKey) < maxFar
}

// lookUp asks for an address. Its answer arrives as an event. It returns false if nobody can be asked.
func (r *shard) lookUp(k farKey, up *upstream) bool {
	answer := func(a netip.Addr, ttl time.Duration) {
		r.ctl.post(event{kind: evFar, far: &farAnswer{r, k, a, ttl}})
	}
	if !k.direct {
		d := r.dns.Load()
		return d != nil && d.LookUp(k.name, k.v6, answer)
	}
	direct, ok := up.Upstream.(interface {
		LookUp(ctx context.Context, name string, done func([]netip.Addr, error))
	})
	if !ok {
		return false
	}
	direct.LookUp(r.ctx, k.name, func(all []netip.Addr, _ error) {
		for _, a := range all {
			if a.Is6() == k.v6 {
				answer(a, time.Minute)
				return
			}
		}
		answer(netip.Addr{}, 0)
	})
	return true
}

// found stores an answer, and sends what waited for it.
func (r *shard) found(a *farAnswer) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	t := &r.udp.far
	f := t.byKey[a.key]
	if f == nil {
		return
	}
	now := r.now()
	f.asked, f.until = 0, now+int64(min(max(a.ttl, farMin), farMax))
	f.addr = a.addr
	items := f.items
	t.held -= f.bytes
	f.items, f.bytes = nil, 0
	for i := range items {
		if r.udp.clos || now-items[i].at > int64(queueAge) {
			r.count.Dropped.Add(1)
			continue
		}
		p := items[i].packet(items[i].src)
		r.carryNamed(r.ctlW, &p, now)
	}
}
