package route

import (
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Limits of the queue of one association while it is being opened. A program rarely sends 64 datagrams in its first
// burst; the bytes allow two of the largest size.
const (
	queueLen   = 64
	queueBytes = 128 << 10
	queueAge   = 5 * time.Second // the app has asked again since
	queuedAll  = 16 << 20        // bytes of all queues together; each shard has its share
)

// queued is a copy of a datagram: headers, then payload.
type queued struct {
	dst  netip.AddrPort
	buf  []byte
	head int
	at   int64
}

func (q *queued) packet(src netip.AddrPort) flow.Packet {
	return flow.Packet{Src: src, Dst: q.dst, Head: q.buf[:q.head:q.head], Payload: q.buf[q.head:]}
}

type queue struct {
	items []queued
	bytes int
}

// push copies a datagram to a's queue. If there is no room, it drops the oldest ones: their senders ask again, and
// wait for the newest. It returns how many were lost.
func (t *mappings) push(a *assoc, p *flow.Packet, now int64) (lost int) {
	q := &a.queue
	n := len(p.Head) + len(p.Payload)
	for len(q.items) > 0 && (len(q.items) >= queueLen || q.bytes+n > queueBytes) {
		t.pop(q)
		lost++
	}
	if q.bytes+n > queueBytes || t.queued+n > t.room {
		return lost + 1
	}
	buf := make([]byte, 0, n)
	buf = append(append(buf, p.Head...), p.Payload...)
	q.items = append(q.items, queued{p.Dst, buf, len(p.Head), now})
	q.bytes += n
	t.queued += n
	return lost
}

func (t *mappings) pop(q *queue) {
	n := len(q.items[0].buf)
	q.bytes -= n
	t.queued -= n
	q.items[0] = queued{}
	q.items = q.items[1:]
}

// take empties a's queue and returns its content.
func (t *mappings) take(a *assoc) []queued {
	items := a.queue.items
	t.queued -= a.queue.bytes
	a.queue = queue{}
	return items
}
