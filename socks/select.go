package socks

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Select is how a group chooses the first server for a flow, and thereby the order of the others.
type Select uint8

// The values of Select.
const (
	Ordered    Select = iota // the first one that works, in the order given
	RoundRobin               // each flow begins with the next server
	Hash                     // by source and destination address: a pair keeps its server while that works
	Latched                  // the server that the last failover chose
)

var selectNames = [...]string{Ordered: "ordered", RoundRobin: "round-robin", Hash: "hash", Latched: "latched"}

func (s Select) String() string {
	if int(s) < len(selectNames) {
		return selectNames[s]
	}
	return fmt.Sprintf("Select(%d)", uint8(s))
}

// ParseSelect parses the text that String returns.
func ParseSelect(text string) (Select, error) {
	if i := slices.Index(selectNames[:], text); i >= 0 {
		return Select(i), nil
	}
	return 0, errors.New("must be ordered, round-robin, hash or latched")
}

// MaxServers limits the servers of a group.
const MaxServers = 16

// chooser decides which server of a group is asked next, and what its answer means. It does no I/O and has no clock.
// The caller holds a lock.
type chooser struct {
	opts    GroupOptions // with the defaults filled in
	names   []string     // of the servers, for errors
	servers []health
	rr      int // where the next flow of RoundRobin begins
	latched int
}

// attempt is a flow that is asking the servers of a group.
type attempt struct {
	kind   kind
	target uint64 // hash of source and destination
	order  [MaxServers]uint8
	at     int // index into order
	here   int // attempts at that server
	all    int // attempts in total
	began  time.Duration

	err     error // of the last failed attempt, unless an earlier one tells more
	unable  error // reply 7 or 8, or what the protocol of this server cannot express
	skipped bool  // a server was skipped because it is down
}

// begin orders the servers for a.
func (c *chooser) begin(a *attempt, cmd Command, src netip.Addr, dst Addr) {
	a.kind = kindOf(cmd, dst)
	n := len(c.servers)
	first := 0
	switch c.opts.Select {
	case RoundRobin:
		first = c.rr
		c.rr = (c.rr + 1) % n
	case Latched:
		first = c.latched
	}
	for i := range n {
		a.order[i] = uint8((first + i) % n)
	}
	a.target = targetHash(netip.Addr{}, dst)
	if c.opts.Select != Hash {
		return
	}
	pair := targetHash(src, dst)
	// The server with the highest mark for this pair comes first (rendezvous hashing). When a server is down, the
	// pairs of the others stay where they are.
	var marks [MaxServers]uint64
	for i := range n {
		marks[i] = mix(pair ^ mix(uint64(i)+1))
	}
	slices.SortFunc(a.order[:n], func(x, y uint8) int {
		if marks[x] > marks[y] {
			return -1
		}
		return 1
	})
}

// targetHash hashes the pair without its ports, so that everything that one program sends to one service is one pair.
// The hash is the same in each run of viasocks.
func targetHash(src netip.Addr, dst Addr) uint64 {
	const offset, prime = 0xcbf29ce484222325, 0x100000001b3 // FNV-1a
	h := uint64(offset)
	for i := range len(dst.Name) {
		h = (h ^ uint64(dst.Name[i])) * prime
	}
	if dst.Name == "" {
		h = addrHash(h, dst.IP)
	}
	if src.IsValid() {
		h = addrHash(h, src)
	}
	return mix(h)
}

func addrHash(h uint64, a netip.Addr) uint64 {
	b := a.As16()
	return mix(mix(h^binary.LittleEndian.Uint64(b[:])) ^ binary.LittleEndian.Uint64(b[8:]))
}

// mix is the finalizer of MurmurHash3: every bit of x affects every bit of the result.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// next returns the server for the next attempt of a, or false if there is none; failure tells why.
func (c *chooser) next(a *attempt, now time.Duration) (server int, ok bool) {
	for ; a.at < len(c.servers); a.at, a.here = a.at+1, 0 {
		if a.all >= c.opts.Attempts {
			return 0, false
		}
		i := int(a.order[a.at])
		h := &c.servers[i]
		// A single server is asked whatever its state is, because no other could do better.
		if len(c.servers) > 1 {
			if h.isDown {
				a.skipped = true
				continue
			}
			if !h.canDo(a.kind, now) {
				a.unable = cmpError(a.unable, unableReply(a.kind))
				continue
			}
		}
		a.all++
		a.here++
		a.began = now
		return i, true
	}
	return 0, false
}

func cmpError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func unableReply(k kind) Reply {
	if k == associates || k == binds4 {
		return ReplyCommandNotSupported
	}
	return ReplyAddrTypeNotSupported
}

// failure returns why a flow could not be carried when next has no server left.
func (a *attempt) failure(group string) error {
	switch {
	case a.unable != nil && a.kind != associates:
		return a.unable // the answer of a server that works tells more than that another one does not work
	case a.err != nil:
		return a.err
	case a.unable != nil && !a.skipped: // otherwise UDP may work when the skipped server is back
		return a.unable
	}
	return &ServerError{Server: group, Op: OpGroup, Err: ErrAllDown}
}

// outcome is the meaning of an attempt's result.
type outcome struct {
	again    bool // the flow continues: call next
	wentDown bool // the server went down
	cameUp   bool
	err      error // the flow's error, if it does not continue
}

// done interprets the result of an attempt of a at server; a nil err is success. The section GROUPS of the manual
// shows this table.
func (c *chooser) done(a *attempt, server int, err error, now time.Duration) (o outcome) {
	h := &c.servers[server]
	var fault *ServerError
	var reply Reply
	switch {
	case err == nil:
		// not because of a request that another server could not carry
		if c.opts.Select == Latched && (a.skipped || a.err != nil) {
			c.latched = server
		}
		h.noAnswers = 0
		return outcome{cameUp: h.success(now)}
	case errors.As(err, &fault):
		o.wentDown = h.fault(&c.opts, now, err)
		a.err = err
		// Only a connection that was not made may be tried again at the same server.
		if fault.Op != OpConnect && fault.Op != OpResolve || a.here >= c.opts.ServerAttempts {
			a.at, a.here = a.at+1, 0
		}
		o.again = true
	case errors.Is(err, ErrCannotExpress):
		a.unable = cmpError(a.unable, err)
		a.at, a.here = a.at+1, 0
		o.again = true
	case errors.As(err, &reply):
		h.heard(now)
		h.noAnswers = 0
		switch {
		case reply == ReplyCommandNotSupported || reply == ReplyAddrTypeNotSupported:
			h.cannot(a.kind, reply, now)
			a.unable = err
			o.again = true
		case a.kind == associates || a.kind.binds(): // no target could have answered; another server may have room
			a.err = err
			o.again = true
		}
		a.at, a.here = a.at+1, 0
	case errors.Is(err, ErrEnded):
		return c.ended(a, h, err, now)
	case errors.Is(err, ErrSilent):
		return c.silent(a, server, err, now)
	}
	o.err = err
	return o
}

// ended handles a server that closed the connection after the request. That is a refusal by the target, unless every
// request ends so.
func (c *chooser) ended(a *attempt, h *health, err error, now time.Duration) (o outcome) {
	a.at, a.here = a.at+1, 0
	if a.kind.binds() {
		a.err = err
		return outcome{again: true, err: err}
	}
	if a.kind == associates {
		if h.noAnswers++; h.noAnswers >= endedAssociate {
			h.cannot(associates, ReplyCommandNotSupported, now)
		}
		a.err = err
		return outcome{again: true, err: err}
	}
	if h.ended.add(a.target); h.ended.most(fromEndedOn) {
		err = &ServerError{Server: c.names[a.order[a.at-1]], Op: OpHandshake, Err: errAlwaysEnds}
		a.err = err
		return outcome{again: true, wentDown: h.fault(&c.opts, now, err), err: err}
	}
	return outcome{err: err}
}

// silent handles a request without an answer within the handshake timeout. The target is taken to be silent, unless
// the server answered no request in all that time and there is another server to ask.
func (c *chooser) silent(a *attempt, server int, err error, now time.Duration) outcome {
	h := &c.servers[server]
	if h.answered > a.began {
		return outcome{err: err}
	}
	if h.silent.add(a.target); h.silent.most(fromSilentOn) && c.othersUp(server) {
		return outcome{wentDown: h.fault(&c.opts, now, &ServerError{
			Server: c.names[server], Op: OpHandshake, Err: errAlwaysSilent,
		}), err: err}
	}
	return outcome{err: err}
}

func (c *chooser) othersUp(but int) bool {
	for i := range c.servers {
		if i != but && !c.servers[i].isDown {
			return true
		}
	}
	return false
}

// allDown reports whether no server is in use.
func (c *chooser) allDown() bool { return !c.othersUp(-1) }

type sourceKey struct{}

// WithSource adds the source of a flow to ctx, for Connect and Associate of a group that chooses by Hash.
func WithSource(ctx context.Context, src netip.Addr) context.Context {
	return context.WithValue(ctx, sourceKey{}, src)
}

func sourceOf(ctx context.Context) netip.Addr {
	a, _ := ctx.Value(sourceKey{}).(netip.Addr)
	return a
}
