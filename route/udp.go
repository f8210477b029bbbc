package route

import (
	"errors"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

var (
	verdictResolve = &verdict{kind: resolve, rule: "dns"}

	errEvicted      = errors.New("too many mappings: this one was idle longest")
	errMappingsFull = errors.New("too many mappings, and all of them are in use (--max-mappings)")
	errUnreachable  = errors.New("the app's host reports port unreachable")
)

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
	if r.port53.server.Load() != nil && p.Dst.Port() == 53 && flow.OneHost(p.Dst.Addr()) {
		return verdictResolve
	}
	if r.isPortMap(p.Dst) {
		return verdictPortMap
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
	case mapPort:
		for i := range pkts {
			r.answerPortMap(w, &pkts[i])
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
		r.inbox.post(event{kind: evOpen, a: a})
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

// deliver passes a burst from an upstream to the app, on the loop that w belongs to, whoever sent it: filtering is
// endpoint-independent.
func (r *shard) deliver(a *assoc, w flow.PacketWriter, pkts []flow.Packet) {
	m := a.m
	if m.gone.Load() {
		return
	}
	if p := a.probe.Load(); p != nil {
		if pkts = p.take(pkts); len(pkts) == 0 {
			return
		}
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
