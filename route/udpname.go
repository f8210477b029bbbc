package route

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/stack/flow"
)

// UDP to a fake address. If the server accepts names in the headers of datagrams, the datagrams go to the name. Otherwise
// they go to an address of the name, which is looked up by the resolvers through the upstream that the rules choose, or on
// this host if the verdict is direct. In all cases they use the mapping of the app's socket, whose outer port does not
// change, and the answers appear to come from the fake address. If an app also writes to the real address itself, it gets
// answers from the real address from then on, as it expects.
//
// While it is unknown whether a server accepts names, the first datagram to a name goes to the name, and the next ones
// wait. If nothing has come back after nameTrial and the resolvers know the address, the first datagram is sent again, to
// the address. It is the only datagram that is sent twice.
//
// Some servers answer from the name. Others answer from the address that they found for it, which is unknown to us. The
// first datagram from an unknown address with the right port, within nameWindow, therefore counts as the answer, unless a
// program has written to that address by itself. From then on datagrams go to that address, so that the server need not
// look up the name for each of them. Only one name at a time may be unanswered on each port of a mapping: the addresses of
// further ones are looked up by the resolvers, and if these know nothing, the datagrams wait for their turn.
//
// A stranger who knows the outer port of the mapping, and the port and the time of a question, can therefore answer in
// place of the name without forging a source address, and gets what the app sends next. If the name answers as well, within
// nameDoubt, both addresses count as strangers, unless the resolvers confirm one, and the address is not learned from
// answers any more. A stranger thus gets hold of a flow only while the name itself is silent. Programs that need to know
// who answers need a protocol that proves it, over UDP in any case. Such answers could also make it look as if a server
// accepted names: two names must answer before this is believed, or one whose address the resolvers confirm, and it is in
// doubt again when names do not answer any more.

const (
	maxBound = 1024 // fake destinations of one mapping

	// nameTrial is how long a name has time to answer before its address is tried.
	nameTrial = time.Second
	// nameWindow is how long after a datagram to a name a datagram from an unknown address may be the answer.
	nameWindow = 3 * time.Second
	// nameSilence is the time without an answer after which another way is tried.
	nameSilence = 3 * time.Second
	// nameDoubt is how long after an answer from an unknown address another such address makes both doubtful.
	nameDoubt = time.Second
	// trialAgain is the time between two checks whether the resolvers have answered.
	trialAgain = 100 * time.Millisecond
)

var verdictNamed = &verdict{kind: named, rule: "dns"}

// way is how datagrams reach a fake destination.
type way uint8

const (
	wayNone    way = iota // not decided
	wayName               // by its name
	wayLearned            // by the address that answered
	wayAsk                // by the address that the resolvers know
)

// namedDest is a fake destination of a mapping. All fields but the atomic ones are guarded by udp.mu.
type namedDest struct {
	fake   netip.AddrPort
	name   string
	lease  dns.Lease
	v      *verdict
	policy *policy // that v belongs to
	until  int64   // until when v is valid

	way   way
	up    *upstream        // that way belongs to
	real  netip.AddrPort   // of wayLearned
	since int64            // when the first datagram without an answer was sent
	waits int64            // how long a datagram from an unknown address may be the answer; 0: it may not
	link  relay.PacketLink // that knows the name
	tried bool             // something was sent to the name
	trial *trial
	// disputed: two unknown addresses have answered
	disputed bool
	heard    atomic.Int64 // when the last answer came
	watch    atomic.Bool  // the next answer tells something about the server
}

// trial is the first datagram to a name, which is sent again to its address if the name does not answer, with the datagrams
// that wait for the result.
type trial struct {
	first queuedFrom
	rest  []queuedFrom
	bytes int // of all
}

// namedLink is a PacketLink that can send to names.
type namedLink interface {
	Name(fake netip.AddrPort, name string) // datagrams for fake go to name from now on
	Server() string                        // to which it belongs
}

// namesUpstream is an Upstream whose links may implement namedLink.
type namesUpstream interface{ NamesUDP() bool }

// namesUDP reports whether the protocol of u has room for names in the headers of datagrams.
func (u *upstream) namesUDP() bool {
	n, ok := u.Upstream.(namesUpstream)
	return ok && n.NamesUDP()
}

// isTor reports whether a server of u is a Tor. No resolver may see the names that it carries.
func (u *upstream) isTor() bool {
	t, ok := u.Upstream.(interface{ Tor() bool })
	return ok && t.Tor()
}

// taking returns what is known about the server of a, or if a is not open, about the server of the latest association.
func (u *upstream) taking(a *assoc) *nameTaking {
	if a != nil && a.names != nil {
		return a.names
	}
	if t := u.names.last.Load(); t != nil {
		return t
	}
	return u.names.of("")
}

// carryNamed sends a datagram to a fake address, refuses it, or keeps it until it is known how to send it. The datagram
// arrived at at. udp.mu is held.
func (r *shard) carryNamed(w flow.PacketWriter, p *flow.Packet, now, at int64) {
	m := r.udp.bySrc[p.Src]
	one := []flow.Packet{*p}
	d := m.namedTo(p.Dst)
	if d == nil {
		name, ok := r.cfg.Pool.AppendName(nil, p.Dst.Addr())
		if !ok || p.Dst.Port() == 0 {
			r.refuse(w, one, flow.RefuseHost)
			return
		}
		d = &namedDest{fake: p.Dst, name: string(name)}
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
	switch way := r.wayOf(m, d, now); way {
	case wayLearned:
		r.carryTo(w, m, d, p, d.real, now)
	case wayName:
		r.carryByName(w, m, d, p, now, at)
	default:
		r.carryAsked(w, m, d, p, now, at)
	}
}

// wayOf decides how a datagram to d goes. udp.mu is held.
func (r *shard) wayOf(m *mapping, d *namedDest, now int64) way {
	up := d.v.up
	if d.up != up {
		r.endTrial(d)
		d.up, d.way, d.since, d.tried = up, wayNone, 0, false
	}
	heard := d.heard.Load()
	silent := d.since != 0 && heard < d.since && now-d.since > int64(r.nameSilence)
	if d.since == 0 || heard >= d.since || silent {
		d.since = now
	}
	if !up.namesUDP() {
		return wayAsk
	}
	known := up.taking(m.assocOf(up)).load(now)
	switch {
	case up.isTor():
		return wayName
	case known == takesEnd, d.disputed:
		return wayAsk
	case known == takesNone && (d.way == wayNone || d.way == wayName && d.trial == nil && heard == 0):
		d.way = wayAsk
	case d.way == wayNone:
		d.way = wayName
	case silent && d.way == wayLearned:
		d.way = wayName
	case silent && d.way == wayName && known == takesNames: // the resolvers may know it when the server does not
		d.way = wayAsk
	case silent && d.way == wayAsk && known == takesNames:
		d.way = wayName
	}
	return d.way
}

// carryTo sends a datagram to an address of the name that d stands for. udp.mu is held.
func (r *shard) carryTo(w flow.PacketWriter, m *mapping, d *namedDest, p *flow.Packet, real netip.AddrPort, now int64) {
	far := real.Addr()
	one := [1]flow.Packet{*p}
	if !flow.OneHost(far) || flow.IsOurs(far) || r.cfg.Pool.Contains(far) || d.v.up.name != DirectName && !flow.CanBePeer(far) {
		r.refuse(w, one[:], flow.RefuseHost)
		return
	}
	if m = r.bound(m, d, p, now); m == nil {
		r.count.Dropped.Add(1)
		return
	}
	m.bind(d, real)
	one[0].Dst = real
	r.carry(w, d.v, one[:], now)
}

// carryAsked sends a datagram to the address that the resolvers know, or by name if they know none. udp.mu is held.
func (r *shard) carryAsked(w flow.PacketWriter, m *mapping, d *namedDest, p *flow.Packet, now, at int64) {
	f, state := r.farOf(d, now)
	switch {
	case state == farKnown:
		r.carryTo(w, m, d, p, netip.AddrPortFrom(f.addr, p.Dst.Port()), now)
	case state == farAsked:
		r.holdFar(f, p, at)
	case state == farFull:
		r.count.Dropped.Add(1)
	case d.mayBeNamed(m, now):
		r.carryByName(w, m, d, p, now, at)
	default:
		r.refuse(w, []flow.Packet{*p}, flow.RefuseHost)
	}
}

// mayBeNamed reports whether a server may take the name that d stands for. m may be nil.
func (d *namedDest) mayBeNamed(m *mapping, now int64) bool {
	if !d.v.up.namesUDP() {
		return false
	}
	known := d.v.up.taking(m.assocOf(d.v.up)).load(now)
	return known == takingUnknown || known == takesNames
}

// carryByName sends a datagram to the name that d stands for, or keeps it until it is its turn. udp.mu is held.
func (r *shard) carryByName(w flow.PacketWriter, m *mapping, d *namedDest, p *flow.Packet, now, at int64) {
	t := d.v.up.taking(m.assocOf(d.v.up))
	asName := t.asName.Load()
	if !asName && m != nil {
		if o := m.waiting(p.Dst.Port(), now); o != nil && o != d {
			r.carryBeside(w, m, d, p, now, at)
			return
		}
	}
	if m = r.bound(m, d, p, now); m == nil {
		r.count.Dropped.Add(1)
		return
	}
	if d.trial != nil {
		r.holdTrial(d, p, at)
		return
	}
	a := m.assocOf(d.v.up)
	if a != nil && a.link != nil && !d.nameOn(a.link) {
		r.count.Dropped.Add(1)
		return
	}
	if !d.tried {
		d.tried = true
		d.watch.Store(true)
		t.sent()
		if t.load(now) == takingUnknown && !d.v.up.isTor() {
			r.tryName(m, d, p, now)
		}
	}
	m.bind(d, d.fake)
	if !asName && !d.disputed {
		m.await(d, now+int64(r.nameWindow))
	}
	r.carry(w, d.v, []flow.Packet{*p}, now)
	if a = m.assocOf(d.v.up); a != nil {
		a.namedAt, a.namedTo = now, d.name
	}
}

// carryBeside is carryByName while another name is unanswered on the same port. udp.mu is held.
func (r *shard) carryBeside(w flow.PacketWriter, m *mapping, d *namedDest, p *flow.Packet, now, at int64) {
	if d.v.up.isTor() {
		r.later(p, at)
		return
	}
	switch f, state := r.farOf(d, now); state {
	case farKnown:
		r.carryTo(w, m, d, p, netip.AddrPortFrom(f.addr, p.Dst.Port()), now)
	case farAsked:
		r.holdFar(f, p, at)
	default:
		r.later(p, at)
	}
}

// nameOn tells a link d's name. It returns false if the link cannot send to names.
func (d *namedDest) nameOn(l relay.PacketLink) bool {
	if d.link == l {
		return true
	}
	n, ok := l.(namedLink)
	if ok {
		n.Name(d.fake, d.name)
		d.link = l
	}
	return ok
}

// nameAll tells a's link, which was just opened, all names for which datagrams of m may be queued. udp.mu is held.
func (m *mapping) nameAll(a *assoc) {
	n, ok := a.link.(namedLink)
	if !ok {
		a.names = nil
		return
	}
	a.names = a.up.names.of(n.Server())
	for _, d := range m.named {
		if d.up == a.up && d.tried {
			d.nameOn(a.link)
		}
	}
}

// bound returns m, or a new mapping, with d as one of its destinations, or nil if there is no room. udp.mu is held.
func (r *shard) bound(m *mapping, d *namedDest, p *flow.Packet, now int64) *mapping {
	if m == nil {
		if m = r.newMapping(d.v, p, d.name, now); m == nil {
			return nil
		}
	}
	if m.namedTo(d.fake) == nil {
		if len(m.named) >= maxBound {
			return nil
		}
		name, lease, _ := r.cfg.Pool.Hold(d.fake.Addr())
		if name != d.name { // it went to another name just now
			lease.Release()
			return nil
		}
		d.lease = lease
		if m.named == nil {
			m.named = make(map[netip.AddrPort]*namedDest)
		}
		m.named[d.fake] = d
	}
	return m
}

// namedTo returns m's fake destination, or nil; m may be nil.
func (m *mapping) namedTo(fake netip.AddrPort) *namedDest {
	if m == nil {
		return nil
	}
	return m.named[fake]
}

// tryName begins a trial: p is sent again to its address if the name does not answer. udp.mu is held.
func (r *shard) tryName(m *mapping, d *namedDest, p *flow.Packet, now int64) {
	if _, state := r.farOf(d, now); state == farNone || state == farFull {
		return
	}
	n := len(p.Head) + len(p.Payload)
	if !r.udp.far.room(n, r.share(heldAll)) {
		return
	}
	d.trial = &trial{first: copyOf(p, now), bytes: n}
	r.trialIn(m, d, r.nameTrial)
}

// holdTrial keeps a datagram, which arrived at at, until d's trial is over. udp.mu is held.
func (r *shard) holdTrial(d *namedDest, p *flow.Packet, at int64) {
	t, n := d.trial, len(p.Head)+len(p.Payload)
	if len(t.rest) >= queueLen || t.bytes+n > queueBytes || !r.udp.far.room(n, r.share(heldAll)) {
		r.count.QueueFull.Add(1)
		return
	}
	t.rest = append(t.rest, copyOf(p, at))
	t.bytes += n
}

func (r *shard) trialIn(m *mapping, d *namedDest, in time.Duration) {
	time.AfterFunc(in, func() { r.inbox.post(event{kind: evTrial, m: m, dest: d}) })
}

// trialOver is called when the name has had its time.
func (r *shard) trialOver(m *mapping, d *namedDest) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	if d.trial == nil || m.gone.Load() {
		return
	}
	now := r.now()
	if d.v == nil || d.v.kind != carry || d.v.up != d.up || d.heard.Load() != 0 ||
		d.up.taking(m.assocOf(d.up)).load(now) == takesNames {
		r.endTrial(d)
		return
	}
	switch f, state := r.farOf(d, now); {
	case state == farKnown:
		m.unwait(d) // from here on an unknown address belongs to a stranger
		d.way, d.since = wayAsk, now
		d.watch.Store(true)
		p := d.trial.first.packet(m.src)
		r.carryTo(r.runW, m, d, &p, netip.AddrPortFrom(f.addr, d.fake.Port()), now)
		r.endTrial(d)
	case state == farAsked && now-d.trial.first.at <= int64(queueAge):
		r.trialIn(m, d, trialAgain)
	default:
		r.endTrial(d)
	}
}

// endTrial ends d's trial. Run then sends what waits for it. udp.mu is held.
func (r *shard) endTrial(d *namedDest) {
	t := d.trial
	if t == nil {
		return
	}
	d.trial = nil
	r.udp.far.held -= t.bytes
	if len(t.rest) > 0 {
		r.inbox.post(event{kind: evTrialEnded, trial: t, shard: r})
	}
}

// afterTrial sends what waited for a trial.
func (r *shard) afterTrial(t *trial) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	now := r.now()
	for i := range t.rest {
		q := &t.rest[i]
		if r.udp.clos || r.udp.bySrc[q.src] == nil || now-q.at > int64(queueAge) {
			r.count.Dropped.Add(1)
			continue
		}
		p := q.packet(q.src)
		r.carryNamed(r.runW, &p, now, q.at)
	}
}
