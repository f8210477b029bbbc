package route

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

var (
	verdictResolve = &verdict{kind: resolve, rule: "dns"}

	errEvicted      = errors.New("too many mappings: this one was idle longest")
	errMappingsFull = errors.New("too many mappings, and all of them are in use (--max-mappings)")
	errUnreachable  = errors.New("the app's host says port unreachable")
)

// evictIdle is how long a mapping must be silent before a new one may replace it. Mappings with more recent traffic
// are in use, and a new one must wait.
const evictIdle = int64(5 * time.Second)

// handlePackets implements HandlePackets for one shard.
func (r *shard) handlePackets(pkts []flow.Packet) {
	if len(pkts) == 0 {
		return
	}
	t := &r.udp
	now := r.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.clos {
		r.count.Dropped.Add(uint64(len(pkts)))
		return
	}
	r.burst.open = true
	v := r.classify(&pkts[0], now)
	for i := 0; i < len(pkts); {
		var next *verdict
		j := i + 1
		for ; j < len(pkts); j++ {
			if next = v; pkts[j].Dst != pkts[j-1].Dst || t.deep != nil && pkts[j].Src != pkts[j-1].Src {
				next = r.classify(&pkts[j], now)
			}
			if next != v || pkts[j].Src != pkts[i].Src {
				break
			}
		}
		v.hit(r.index, uint64(j-i))
		r.run(r.readerW, v, pkts[i:j], now)
		i, v = j, next
	}
	r.burst.flush(r.readerW)
	r.burst.open = false
}

// classify returns the verdict on one datagram, from the cache if it is there.
func (r *shard) classify(p *flow.Packet, now int64) *verdict {
	if r.dns.Load() != nil && p.Dst.Port() == 53 && flow.OneHost(p.Dst.Addr()) {
		return verdictResolve
	}
	if r.cfg.Pool != nil && r.cfg.Pool.Contains(p.Dst.Addr()) && !r.host.isHost(p.Dst.Addr()) {
		return verdictNamed
	}
	if r.udp.deep != nil {
		return r.classifyDeep(p, now)
	}
	c := &r.udp.cache[r.udp.cache.slot(p.Dst)]
	if c.v != nil && c.dst == p.Dst {
		return c.v
	}
	c.dst, c.v = p.Dst, r.verdictOn(&query{proto: flow.UDP, src: p.Src, dst: p.Dst})
	return c.v
}

// run handles datagrams of one source and one verdict. w belongs to the calling goroutine.
func (r *shard) run(w flow.PacketWriter, v *verdict, pkts []flow.Packet, now int64) {
	switch v.kind {
	case resolve:
		for i := range pkts {
			r.question(w, &pkts[i], now)
		}
	case carry:
		if r.cfg.Pool != nil {
			r.addressed(pkts)
		}
		r.carry(w, v, pkts, now)
	case named:
		for i := range pkts {
			r.carryNamed(w, &pkts[i], now, now)
		}
	case reject:
		r.refuse(w, pkts, flow.RefusePort)
		r.logRejected(v, &pkts[0], now)
	case impossible:
		r.refuse(w, pkts, flow.RefuseNet)
	case await:
		r.hold(pkts, now)
	default:
		r.count.Dropped.Add(uint64(len(pkts)))
	}
}

func (r *shard) refuse(w flow.PacketWriter, pkts []flow.Packet, why flow.Refusal) {
	r.count.Refused.Add(uint64(len(pkts)))
	for i := range pkts {
		w.Refuse(pkts[i], why)
	}
}

// logRejected logs a datagram that no rule lets pass, at most once a second: a program may send them at any rate, and
// there is no flow whose end could be logged. The caller holds udp.mu.
func (r *shard) logRejected(v *verdict, p *flow.Packet, now int64) {
	if r.rejectLogged != 0 && now-r.rejectLogged < int64(time.Second) {
		return
	}
	r.rejectLogged = now
	i := info(r.ids.Add(1), flow.UDP, p.Src, p.Dst, time.Now())
	i.Rule, i.State = v.rule, "rejected"
	r.log.end(i, 0, r.whyRejected(v))
}

// question passes a datagram to port 53 to route/dns. The answer comes from the address that was asked. The caller
// holds udp.mu.
func (r *shard) question(w flow.PacketWriter, p *flow.Packet, at int64) {
	src, dst := p.Src, p.Dst
	asked := dst
	if !flow.CanBePeer(dst.Addr()) {
		asked = noAddr
	}
	judge := r.judgeOf(flow.Flow{Proto: flow.UDP, Src: src, Dst: dst})
	d := r.dns.Load()
	var relay func() bool
	if d.Relays() {
		relay = func() bool { return r.relayQuestion(w, p, at) }
	}
	now := func(b []byte) { r.replyNow(w, flow.Packet{Src: dst, Dst: src, Payload: b}) }
	d.HandleRelayed(p.Payload, asked, judge, relay, now, func() func([]byte) {
		return func(b []byte) { r.replyLater(flow.Packet{Src: dst, Dst: src, Payload: b}) }
	})
}

// replyNow writes an answer that was known at once, on the goroutine that handed in the question. The frame reader writes it at
// the end of its burst. The caller holds udp.mu.
func (r *shard) replyNow(w flow.PacketWriter, p flow.Packet) {
	r.learn(p.Payload)
	if !r.burst.take(w, p) {
		one := [1]flow.Packet{p}
		_, _ = w.WritePackets(one[:])
	}
}

// replyLater writes an answer, from any goroutine.
func (r *shard) replyLater(p flow.Packet) {
	r.learn(p.Payload)
	r.dnsMu.Lock()
	defer r.dnsMu.Unlock()
	r.dnsPkt[0] = p
	_, _ = r.dnsW.WritePackets(r.dnsPkt[:])
	r.dnsPkt[0].Payload = nil
}

// learn remembers the names of the addresses in an answer before the program knows them.
func (r *shard) learn(answer []byte) {
	if r.wantsNames() {
		r.names.learn(answer, r.now())
	}
}

// relaysQuestions reports whether DNS questions go to the servers that the app asks.
func (r *Router) relaysQuestions() bool {
	d := r.dns.Load()
	return d != nil && d.Relays()
}

// relayQuestion carries a question to the server that the app asked, like any datagram. It returns false if the
// question must be asked over TCP, because the upstream has no UDP, or because rules use names: then an answer counts
// only if it was seen to belong to a question. The caller holds udp.mu.
func (r *shard) relayQuestion(w flow.PacketWriter, p *flow.Packet, now int64) bool {
	if r.wantsNames() {
		return false
	}
	v := r.policy.Load().decideRelayed(p.Dst)
	if v.kind != carry {
		return false
	}
	if a := r.udp.bySrc[p.Src].assocOf(v.up); a == nil || a.link == nil {
		if _, refused := v.up.refused(now); refused {
			return false
		}
	}
	pkts := [1]flow.Packet{*p}
	r.carry(w, v, pkts[:], now)
	return true
}

func (r *shard) carry(w flow.PacketWriter, v *verdict, pkts []flow.Packet, now int64) {
	t := &r.udp
	m := t.bySrc[pkts[0].Src]
	// An open association continues to work, whatever the server answers to others.
	if a := m.assocOf(v.up); a == nil || a.link == nil {
		if why, refused := v.up.refused(now); refused {
			r.refuse(w, pkts, why)
			return
		}
	}
	if m == nil {
		if m = r.newMapping(v, &pkts[0], "", now); m == nil {
			r.count.Dropped.Add(uint64(len(pkts)))
			return
		}
	}
	t.touch(m)
	m.lastUp = now
	a := m.assocOf(v.up)
	if a == nil {
		a = &assoc{m: m, up: v.up, loop: r.pickLoop()}
		m.assocs = append(m.assocs, a)
		r.ctl.post(event{kind: evOpen, a: a})
	}
	bytes := uint64(0)
	for i := range pkts {
		bytes += uint64(len(pkts[i].Payload))
		m.oneShot = m.oneShot && oneShotPort(pkts[i].Dst.Port())
	}
	m.upPkts += uint64(len(pkts))
	m.upBytes += bytes
	switch {
	case a.link != nil:
		if _, err := a.link.Send(pkts); err != nil { // it has counted what it could not send
			r.unsent(w, a.try, err)
		}
	case a.failures >= refuseAfter:
		r.refuse(w, pkts, flow.RefuseNet)
	default:
		for i := range pkts {
			if lost := t.push(a, &pkts[i], now); lost > 0 {
				r.count.QueueFull.Add(uint64(lost))
			}
		}
	}
}

// newMapping makes a mapping, and makes room for it if necessary; nil: there is no room. host is the name of its first destination,
// if that is known.
func (r *shard) newMapping(v *verdict, p *flow.Packet, host string, now int64) *mapping {
	t := &r.udp
	if p.Src.Port() == 0 || !flow.OneHost(p.Src.Addr()) {
		return nil
	}
	if r.cfg.ComesBack != nil && r.cfg.ComesBack(flow.Flow{Proto: flow.UDP, Src: p.Src, Dst: p.Dst}) {
		return nil
	}
	if r.mapped.Add(1) > int64(t.most) && !r.makeRoom(now) {
		r.mapped.Add(-1)
		r.count.MappingsFull.Add(1)
		r.short(errMappingsFull)
		return nil
	}
	m := &mapping{s: r, src: p.Src, id: r.ids.Add(1), start: time.Now(), first: p.Dst, rule: v, host: host, oneShot: true}
	t.add(m)
	m.event(FlowOpened)
	r.count.Mappings.Add(1)
	return m
}

// makeRoom ends the mapping with the longest idle time, in whatever shard it is, except shards that are busy at the
// moment. It skips mappings that only receive, a few at a time. The caller holds udp.mu.
func (r *shard) makeRoom(now int64) bool {
	held := []*shard{r}
	for _, s := range r.shards {
		if s != r && s.udp.mu.TryLock() {
			held = append(held, s)
			defer s.udp.mu.Unlock()
		}
	}
	for range 16 {
		s := slices.MinFunc(held, func(a, b *shard) int { return cmp.Compare(a.udp.idleSince(), b.udp.idleSince()) })
		m := s.udp.oldest
		if m == nil || now-m.lastUp < evictIdle {
			return false
		}
		if now-m.lastDown.Load() >= evictIdle || m.lastDown.Load() == 0 {
			s.count.MappingsEvicted.Add(1)
			s.endMapping(m, "evicted", errEvicted)
			return true
		}
		m.lastUp = m.lastDown.Load()
		s.udp.touch(m)
	}
	return false
}

// askGone is the minimum time between two checks of the socket of an endpoint whose kernel reports port unreachable.
const askGone = int64(time.Second)

// handleUnreachable implements HandleUnreachable for one shard.
func (r *shard) handleUnreachable(endpoint netip.AddrPort) {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	m := r.udp.bySrc[endpoint]
	switch now := r.now(); {
	case m == nil:
	case r.cfg.Sockets == nil:
		r.endMapping(m, "unreachable", errUnreachable)
	case now >= m.askedGone+askGone || m.askedGone == 0:
		m.askedGone = now
		r.ctl.post(event{kind: evUnreachable, m: m})
	}
}

// endMapping removes m from the table at once and leaves what may take longer to Run. The caller holds udp.mu.
func (r *shard) endMapping(m *mapping, state string, err error) {
	i := m.info()
	i.State = state
	r.udp.remove(m)
	r.mapped.Add(-1)
	for _, a := range m.assocs {
		r.discard(a)
	}
	m.assocs = nil
	for _, d := range m.named {
		r.endTrial(d)
		d.lease.Release()
	}
	r.count.Ended.Add(1)
	r.count.Up.Add(i.Up)
	r.count.Down.Add(i.Down)
	r.log.end(i, time.Since(m.start), err)
	r.watched.send(FlowClosed, i, err)
}

// discard ends an association whose mapping is gone or no longer needs it. The caller holds udp.mu.
func (r *shard) discard(a *assoc) {
	r.load[a.loop].Add(-1)
	if lost := r.udp.take(a); len(lost) > 0 {
		r.count.Dropped.Add(uint64(len(lost)))
	}
	if a.try != nil && a.link == nil {
		r.udp.dialing--
	}
	r.ctl.post(event{kind: evDiscard, up: a.up, link: a.link, t: a.try})
	a.link, a.try = nil, nil
}

// deliver passes a burst from an upstream to the app, on the loop that w belongs to, whoever sent it: filtering is
// endpoint-independent.
func (r *shard) deliver(a *assoc, w flow.PacketWriter, pkts []flow.Packet) {
	m := a.m
	if m.gone.Load() {
		return
	}
	bytes := uint64(0)
	now := r.now()
	named := m.back.Load() != nil
	for i := range pkts {
		pkts[i].Dst = m.src
		if named {
			pkts[i].Src = r.fakeOf(m, a, pkts[i].Src, now)
		}
		bytes += uint64(len(pkts[i].Payload))
	}
	m.lastDown.Store(now)
	m.downPkts.Add(uint64(len(pkts)))
	m.downBytes.Add(bytes)
	// it counts what it could not write; an error means that the device is gone, and Run ends soon
	_, _ = w.WritePackets(pkts)
}
