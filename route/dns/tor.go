package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"time"
)

// torTTL is how long an answer of a Tor is valid. It says nothing about that.
const torTTL = time.Minute

// TorFunc has a Tor asked for an address of a name, or, if name is empty, for the name of ip. It returns at once and calls done
// exactly once, from any goroutine; done does not block. Cancelling ctx ends it.
type TorFunc func(ctx context.Context, name string, ip netip.Addr, done func(found netip.Addr, name string, err error))

var (
	// ErrNoName of a TorFunc: there is no such name.
	ErrNoName = errors.New("no such name")
	// ErrNoAnswer of a TorFunc: Tor works, and cannot tell.
	ErrNoAnswer = errors.New("no answer")
)

// torLink asks a Tor, which knows addresses of names and names of addresses. There is nothing to be opened or closed: each
// question is a request of its own, and a goroutine.
type torLink struct {
	x      *exchange
	of     *resolver
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newTorLink(x *exchange, of *resolver) *torLink {
	t := &torLink{x: x, of: of}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

func (t *torLink) resolver() *resolver { return t.of }
func (t *torLink) close()              { t.cancel() }
func (t *torLink) wait()               { t.wg.Wait() }

// torKnows reports whether a Tor can answer q.
func torKnows(msg []byte, q *question) bool {
	return q.isQuery() && q.end > 0 && binary.BigEndian.Uint16(msg[q.end-2:]) == classIN &&
		(q.qtype == typeA || q.qtype == typeAAAA || q.qtype == typePTR)
}

func (t *torLink) send(q *query) bool {
	msg, asked, deadline := append([]byte(nil), q.msg()...), q.q, q.deadline
	asked.id = binary.BigEndian.Uint16(msg)
	t.wg.Go(func() {
		ctx, cancel := context.WithDeadline(t.ctx, deadline)
		defer cancel()
		set, rcode, err := t.resolve(ctx, msg, &asked)
		if ctx.Err() != nil { // exchange.run knows
			return
		}
		m := message{link: t, err: err, only: true, id: asked.id}
		if err == nil {
			m = message{link: t, msg: appendReply(nil, msg, &asked, rcode, set)}
		}
		select {
		case t.x.msgs <- m:
		case <-t.ctx.Done():
		}
	})
	return true
}

// resolve finds what the answer holds. An error means that the Tor does not work.
func (t *torLink) resolve(ctx context.Context, msg []byte, q *question) (addressSet, uint16, error) {
	name, _, ok := appendHost(nil, msg, headerLen)
	if !ok {
		return negative, rcodeName, nil
	}
	host, of := string(name), netip.Addr{}
	if q.qtype == typePTR {
		p, ok := reversePrefix(name)
		if !ok || !p.IsSingleIP() {
			return negative, rcodeName, nil
		}
		host, of = "", p.Addr()
	}
	type result struct {
		ip   netip.Addr
		name string
		err  error
	}
	done := make(chan result, 1)
	t.x.tor(ctx, host, of, func(ip netip.Addr, name string, err error) { done <- result{ip.Unmap(), name, err} })
	var r result
	select {
	case r = <-done:
	case <-ctx.Done():
		return nothing, 0, ctx.Err()
	}
	switch {
	case errors.Is(r.err, ErrNoName):
		return negative, rcodeName, nil
	case errors.Is(r.err, ErrNoAnswer):
		return nothing, rcodeServer, nil
	case r.err != nil:
		return nothing, 0, r.err
	}
	return torSet(q.qtype, r.ip, r.name), 0, nil
}

// torSet is what an answer of a Tor is for a question of a type: it chooses the family of an address itself.
func torSet(qtype uint16, ip netip.Addr, name string) addressSet {
	set := addressSet{ttl: torTTL}
	switch qtype {
	case typeA:
		if set.v4 = ip; !ip.Is4() {
			return negative
		}
	case typeAAAA:
		if set.v6 = ip; !ip.Is6() {
			return negative
		}
	case typePTR:
		set.host = lowerName(name)
		if !isHost(set.host) {
			return negative
		}
	}
	return set
}

// lowerName is a name of somebody else's as isHost wants it.
func lowerName(name string) []byte {
	b := make([]byte, 0, len(name))
	for _, c := range []byte(name) {
		b = append(b, lower(c))
	}
	if n := len(b); n > 0 && b[n-1] == '.' {
		b = b[:n-1]
	}
	return b
}
