package socks

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

const (
	// proofTime is how long a server may take to answer the request of a proof, which is refused on the server's own
	// host.
	proofTime = 5 * time.Second
	// proofAgain is the minimum time between two proofs.
	proofAgain = time.Minute
)

// nobody is a destination for requests that are never sent, or that must not reach a service: port 1 is tcpmux.
var nobody = Addr{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: 1}

// pipelining records whether a server accepts greeting, login and request in one write.
type pipelining struct {
	takes     atomic.Bool
	asking    atomic.Bool
	notBefore atomic.Int64 // earliest time of the next proof, on the Dialer's clock
}

// pipes reports whether p sends all messages in one write.
func (p *dial) pipes() bool {
	if p.c.server.proto != protoSOCKS5 || p.cmd != CmdConnect || p.assocDone != nil || p.probing {
		return false
	}
	switch p.d.tuning.Load().Pipeline {
	case PipelineOn:
		return true
	case PipelineAuto:
		if p.proving || p.c.pipe.takes.Load() {
			return true
		}
		p.c.provePipelining(p.l)
	}
	return p.proving
}

// provePipelining sends the server a request for nobody, with all messages in one write, on a separate connection. An
// answer to the request proves that the server has read past the greeting. Silence, or an end without an answer,
// suggests that it has not. If the server is not reached, nothing is learned.
func (c *Client) provePipelining(l *loop.Loop) {
	now := c.d.now()
	if int64(now) < c.pipe.notBefore.Load() || !c.pipe.asking.CompareAndSwap(false, true) {
		return
	}
	c.pipe.notBefore.Store(int64(now + proofAgain))
	done := func(s loop.Socket, err error) {
		s.Close()
		if takes, told := pipelineProof(err); told && c.pipe.takes.Swap(takes) != takes {
			c.d.log.Debug("SOCKS server and pipelining", "server", c.server.String(), "takes", takes, "err", err)
		}
		c.pipe.asking.Store(false)
	}
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: context.Background(), cmd: CmdConnect, dst: nobody, proving: true, done: done})
}

// pipelineProof interprets the result of a proof. told is false if nothing was learned.
func pipelineProof(err error) (takes, told bool) {
	var r Reply
	var fault *ServerError
	switch {
	case err == nil, errors.As(err, &r):
		return true, true
	case errors.Is(err, ErrSilent), errors.Is(err, ErrEnded):
		return false, true
	case errors.As(err, &fault):
		return false, (fault.Op == OpHandshake || fault.Op == OpAuthenticate) && !errors.Is(err, os.ErrDeadlineExceeded)
	}
	return false, false
}

// doubt repeats the proof if a dial that sent everything in one write ended as if its request had been lost.
func (p *dial) doubt(err error) {
	if !p.piped || p.proving || p.d.tuning.Load().Pipeline != PipelineAuto {
		return
	}
	var fault *ServerError
	if errors.Is(err, ErrSilent) || errors.As(err, &fault) && (fault.Op == OpHandshake || fault.Op == OpAuthenticate) {
		p.c.provePipelining(p.l)
	}
}

// pipeline merges all messages of a handshake that has just started into one: greeting, login and request. Because
// the login follows at once, no other method is offered with it.
func (h *socks5) pipeline() {
	h.whole = true
	if h.login != nil {
		h.buf = h.appendLogin(append(h.buf[:0], version, 1, methodUser))
	}
	h.buf = h.appendRequest(h.buf)
}
