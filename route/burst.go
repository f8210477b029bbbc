package route

import "github.com/viasocks/viasocks/stack/flow"

const (
	// burstRoom is how many bytes of answers are collected before they are written. An answer with fake addresses has
	// about 100.
	burstRoom = 8 << 10
	// burstAnswers is how many answers are collected. The stack reads as many frames at once.
	burstAnswers = 64
	// burstSlots is how many sockets are distinguished.
	burstSlots = 64
)

// burst collects the answers to the questions of one burst of datagrams, so that those to one socket with equal
// length are written by one system call, as one super-frame: a write costs more than all other work for a question.
// It belongs to a shard and is used with udp.mu held.
type burst struct {
	open bool   // the shard is handling a burst, and flushes at its end
	room []byte // the payloads, one after the other; its array never moves
	pkts []flow.Packet

	slots  [burstAnswers]uint8 // of pkts
	sorted []flow.Packet
}

// take copies an answer, which flush will write. If it returns false, the answer must be written now.
func (b *burst) take(w flow.PacketWriter, p flow.Packet) bool {
	if !b.open {
		return false
	}
	if len(p.Payload) > burstRoom {
		b.flush(w) // the answers before it come first
		return false
	}
	if b.room == nil {
		b.room, b.pkts = make([]byte, 0, burstRoom), make([]flow.Packet, 0, burstAnswers)
		b.sorted = make([]flow.Packet, burstAnswers)
	}
	if len(b.room)+len(p.Payload) > burstRoom || len(b.pkts) == burstAnswers {
		b.flush(w)
	}
	at := len(b.room)
	b.room = append(b.room, p.Payload...)
	p.Payload = b.room[at:]
	b.slots[len(b.pkts)] = askerSlot(&p)
	b.pkts = append(b.pkts, p)
	return true
}

// askerSlot returns the same number for all answers to one socket. Answers to other sockets may have the same number; the
// runs are then more and shorter. The length has no part in it: answers to one socket keep their order.
func askerSlot(p *flow.Packet) uint8 { return uint8(p.Dst.Port() % burstSlots) }

// flush writes what was collected: the answers to one socket side by side, in the order in which they were taken.
func (b *burst) flush(w flow.PacketWriter) {
	n := len(b.pkts)
	if n == 0 {
		return
	}
	out := b.pkts
	if n > 2 {
		out = b.sort()
	}
	_, _ = w.WritePackets(out) // it counts what it could not write; an error means that the device is gone, and Run ends soon
	b.room, b.pkts = b.room[:0], b.pkts[:0]
}

// sort is a stable counting sort by slot: its time does not depend on what was asked.
func (b *burst) sort() []flow.Packet {
	var at [burstSlots + 1]uint16
	n := len(b.pkts)
	for _, s := range b.slots[:n] {
		at[s+1]++
	}
	for i := 1; i < len(at); i++ {
		at[i] += at[i-1]
	}
	for i, s := range b.slots[:n] {
		b.sorted[at[s]] = b.pkts[i]
		at[s]++
	}
	return b.sorted[:n]
}
