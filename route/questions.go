package route

import (
	"net/netip"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/flow"
)

// question passes a datagram to port 53 to route/dns. The answer comes from the address that was asked. The caller
// holds udp.mu.
func (r *shard) question(w flow.PacketWriter, p *flow.Packet, at int64) {
	src, dst := p.Src, p.Dst
	judge := r.port53.judgeOf(flow.Flow{Proto: flow.UDP, Src: src, Dst: dst})
	d := r.port53.server.Load()
	asked := serverAsked(d, dst)
	var relay func() bool
	if d.Relays() {
		relay = func() bool { return r.relayQuestion(w, p, at) }
	}
	now := func(b []byte) { r.replyNow(w, flow.Packet{Src: dst, Dst: src, Payload: b}) }
	d.HandleRelayed(p.Payload, asked, judge, relay, now, func() func([]byte) {
		return func(b []byte) { r.replyLater(flow.Packet{Src: dst, Dst: src, Payload: b}) }
	})
}

// serverAsked returns the server that a question to dst is for: dst, or noAddr if no server can be there.
func serverAsked(d *dns.Server, dst netip.AddrPort) netip.AddrPort {
	if flow.CanBePeer(dst.Addr()) || d.StandsForName(dst.Addr()) {
		return dst
	}
	return noAddr
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
