package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"time"
)

// torTTL is how long an answer of a Tor is valid. The answer itself contains no TTL.
const torTTL = time.Minute

// TorFunc asks a Tor for an address of a name or, if name is empty, for the name of ip. It returns at once and calls
// done exactly once, from any goroutine; done must not block. Cancelling ctx ends the request.
type TorFunc func(ctx context.Context, name string, ip netip.Addr, done func(found netip.Addr, name string, err error))

var (
	// ErrNoName means that there is no such name. A TorFunc returns it.
	ErrNoName = errors.New("no such name")
	// ErrNoAnswer means that the Tor works but does not know. A TorFunc returns it.
	ErrNoAnswer = errors.New("no answer")
)

// torLink asks a Tor, which knows addresses of names and names of addresses. There is nothing to open or close: each
// question is a separate request with a goroutine.
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

// resolve finds the content of an answer. An error means that the Tor does not work.
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

// torSet returns the content of an answer for a question of a type. The Tor itself chooses the family of an address.
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

// lowerName converts a name from another source to the form that isHost accepts.
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
