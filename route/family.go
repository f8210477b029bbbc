package route

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

// A name travels to the proxy as a name, and the proxy chooses the address family. Two things can go wrong. A program
// that gets a fake IPv6 address believes that it can reach IPv6, and asks for IPv6 addresses that the proxy cannot
// reach. Names therefore have no fake IPv6 address while flows show that their upstream has no IPv6. Also, many
// servers try only one address of a name, most of them the IPv6 address and some the IPv4 address, and fail if that is
// dead. Such a flow is therefore tried again with an IPv4 address of the name, and if that is dead as well, with an
// IPv6 address, unless the upstream is known to have no IPv6.

const (
	// lackingAfter is how many different IPv6 addresses must be unreachable, with none reached within reachedFor, for
	// an upstream to count as without IPv6. This is remembered for lackingFor.
	lackingAfter = 3
	lackingFor   = 5 * time.Minute
	reachedFor   = 10 * time.Minute

	// secondWait limits the wait for the addresses of a name.
	secondWait = 3 * time.Second
	// secondLimit is when a flow is refused if its second try has no answer, counted from the beginning of the flow.
	secondLimit = socks.DefaultHandshakeTimeout
)

// ipv6Known is what flows to IPv6 addresses have shown about an upstream. Its methods may be called from any
// goroutine. Times are on the Router's clock.
type ipv6Known struct {
	reached atomic.Int64 // when an IPv6 address was last reached; 0: never
	lacking atomic.Int64 // until when there is no IPv6; 0: unknown

	mu     sync.Mutex
	failed []netip.Addr // fewer than lackingAfter
	since  int64        // time of the first in failed
}

// lacks reports whether the upstream is known not to reach IPv6.
func (k *ipv6Known) lacks(now int64) bool { return now < k.lacking.Load() }

// word is for status: "yes", "no", or empty if nothing is known.
func (k *ipv6Known) word(now int64) string {
	last := k.reached.Load()
	switch {
	case k.lacks(now):
		return "no"
	case last != 0 && now-last < int64(reachedFor):
		return "yes"
	}
	return ""
}

func (k *ipv6Known) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failed = nil
	k.reached.Store(0)
	k.lacking.Store(0)
}

// learn records the result of a dial to an IPv6 address, and reports whether it has just shown that there is no IPv6.
func (k *ipv6Known) learn(a netip.Addr, err error, now int64) (lacks bool) {
	if err == nil || errors.Is(err, socks.ReplyRefused) && !isServerFault(err) {
		k.reached.Store(now)
		k.lacking.Store(0)
		return false
	}
	if last := k.reached.Load(); !failedByFamily(err) || last != 0 && now-last < int64(reachedFor) {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if now-k.since > int64(reachedFor) {
		k.failed = nil
	}
	if len(k.failed) == 0 {
		k.since = now
	}
	if slices.Contains(k.failed, a) {
		return false
	}
	if k.failed = append(k.failed, a); len(k.failed) < lackingAfter {
		return false
	}
	k.failed = nil
	lacks = !k.lacks(now)
	k.lacking.Store(now + int64(lackingFor))
	return lacks
}

// failedByFamily reports whether err is what a server answers if it has no address of the right family for the
// target, or no route to it.
func failedByFamily(err error) bool {
	return !isServerFault(err) && (errors.Is(err, socks.ReplyNetUnreachable) || errors.Is(err, socks.ReplyHostUnreachable) ||
		errors.Is(err, socks.ReplyAddrTypeNotSupported))
}

// learnIPv6 records the result of the dial of s if it was to an IPv6 address.
func (s *stream) learnIPv6(err error) {
	a, named := s.dest.Addr.Addr(), s.dest.Name != ""
	if t := s.second.Load(); t != nil {
		a, named = t.to.Addr(), false
	}
	if named || !a.Is6() || a.Is4In6() {
		return
	}
	if s.v.up.ipv6.learn(a, err, s.r.now()) && s.r.cfg.LearnFakeIPv6 {
		s.r.log.post(slog.LevelInfo, "upstream cannot reach IPv6: its names have no IPv6 address for a while",
			slog.String("upstream", s.v.up.name), slog.Duration("for", lackingFor), slog.Any("err", err))
	}
}

// givesIPv6 reports whether a plain name has a fake IPv6 address.
func (r *decider) givesIPv6(name []byte) bool {
	return !r.cfg.NoFakeIPv6 && (!r.cfg.LearnFakeIPv6 || r.policy.Load().mayReachIPv6(name, r.now()))
}

// mayReachIPv6 reports whether an upstream that may carry flows to a plain name can reach IPv6, as far as is known.
func (p *policy) mayReachIPv6(name []byte, now int64) bool {
	if !slices.ContainsFunc(p.order, func(u *upstream) bool { return u.ipv6.lacks(now) }) {
		return true
	}
	can := func(v *verdict) bool { return v.kind == carry && !v.up.ipv6.lacks(now) }
	q := query{names: []string{string(name)}}
	for i := range p.rules {
		switch r := &p.rules[i]; {
		case !r.mayMean(&q):
		case can(p.verdicts[i]):
			return true
		case r.asksNameAlone():
			return false
		}
	}
	return can(p.otherwise)
}

// forgetLearned forgets what flows have shown about the upstreams.
func (p *policy) forgetLearned() {
	for _, u := range p.order {
		u.ipv6.forget()
		u.names.forget()
	}
}

// secondTry belongs to a flow to a name that the server could not reach. It waits for the addresses of the name. If the
// name has addresses of both families, the server may have failed because of one of them, and both are dialled: IPv4
// first, because most servers prefer IPv6.
type secondTry struct {
	s      *stream
	first  error       // the server's answer for the name
	timer  *time.Timer // ends the wait, and later the dial
	waited atomic.Bool // the wait is over
	any    bool        // the server accepts no names: one family is enough

	mu        sync.Mutex
	six, four netip.Addr
	unheard   int // number of outstanding answers

	// Used by the goroutine that dials: the address that is being dialled, and the next one.
	to, then netip.AddrPort
}

// tryAgain begins the second try of a flow whose dial ended with err, if it should have one. It returns false if err
// is final.
func (s *stream) tryAgain(err error) bool {
	d := s.r.port53.server.Load()
	if d == nil || s.second.Load() != nil || !failedByFamily(err) || !s.mayLookUp() {
		return false
	}
	t := &secondTry{s: s, first: err, unheard: 2, any: errors.Is(err, socks.ReplyAddrTypeNotSupported)}
	t.timer = time.AfterFunc(secondWait, t.late)
	s.second.Store(t)
	if s.call.Err() != nil { // the flow may have ended before t was visible
		t.timer.Reset(0)
	}
	for _, v6 := range []bool{true, false} {
		if !d.LookUp(s.dest.Name, v6, func(a netip.Addr, _ time.Duration) { t.heard(v6, a) }) {
			t.heard(v6, netip.Addr{})
		}
	}
	return true
}

// mayLookUp reports whether the resolvers may be asked for the name of s: a user of Tor wants no resolver to see the
// name, and some names are known only in the proxy's own network.
func (s *stream) mayLookUp() bool {
	up, pool := s.v.up, s.r.cfg.Pool
	if pool == nil || !pool.Contains(s.flow.Dst.Addr()) || up.own || up.name == DirectName || !travels(plainName(s.dest.Name)) {
		return false
	}
	if tor, ok := up.Upstream.(interface{ Tor() bool }); ok && tor.Tor() {
		return false
	}
	return time.Since(s.flow.Start) < secondLimit-secondWait
}

// heard records an address of the name, or that it has none.
func (t *secondTry) heard(v6 bool, a netip.Addr) {
	t.mu.Lock()
	if v6 {
		t.six = a
	} else {
		t.four = a
	}
	t.unheard--
	wait, four, six := t.unheard > 0, t.four, t.six
	t.mu.Unlock()
	if wait {
		return
	}
	to, then := t.candidates(four, six)
	switch {
	case !to.IsValid():
		t.giveUp()
	case !t.waited.Swap(true):
		t.s.r.count.SecondTries.Add(1)
		t.dial(to, then)
	}
}

// candidates returns the addresses to dial, in their order. An invalid one means that there is none.
func (t *secondTry) candidates(four, six netip.Addr) (first, second netip.AddrPort) {
	if !t.any && !(four.IsValid() && six.IsValid()) { // the server has tried the only family
		return
	}
	s, port := t.s, t.s.flow.Dst.Port()
	if to := netip.AddrPortFrom(four, port); s.mayGoTo(to) {
		first = to
	}
	if to := netip.AddrPortFrom(six, port); !s.v.up.ipv6.lacks(s.r.now()) && s.mayGoTo(to) {
		second = to
	}
	if !first.IsValid() {
		first, second = second, netip.AddrPort{}
	}
	return first, second
}

// mayGoTo reports whether the rules send a flow with this name to this address through the same upstream.
func (s *stream) mayGoTo(to netip.AddrPort) bool {
	if !to.IsValid() || s.r.cfg.Pool.Contains(to.Addr()) {
		return false
	}
	q := query{proto: flow.TCP, src: s.flow.Src, dst: to, names: []string{plainName(s.dest.Name)}, owner: s.owner}
	v := s.r.verdictOn(&q)
	return v.kind == carry && v.up == s.v.up
}

// dial dials to. If that cannot be reached either, another dials then.
func (t *secondTry) dial(to, then netip.AddrPort) {
	s := t.s
	t.to, t.then = to, then
	family := "IPv4"
	if to.Addr().Is6() {
		family = "IPv6"
	}
	s.r.log.post(slog.LevelDebug, "the server cannot reach a name: trying its "+family+" address", slog.Uint64("flow", s.flow.ID),
		slog.String("host", s.dest.Name), slog.String("address", to.String()), slog.Any("err", t.first))
	t.timer.Reset(max(secondLimit-time.Since(s.flow.Start), 0))
	dest := s.dest
	dest.Name, dest.Addr = "", to
	s.v.up.DialStream(&s.call, s.r.loops[s.loop], dest, s.dialed)
}

// late is called by the timer, even if the flow has ended.
func (t *secondTry) late() {
	if t.waited.Load() {
		t.s.call.Cancel()
		return
	}
	t.giveUp()
}

// giveUp refuses the flow without a second dial.
func (t *secondTry) giveUp() {
	if t.waited.Swap(true) {
		return
	}
	t.timer.Stop()
	t.s.refused(t.first)
	t.s.req = nil
}

// another dials the other address if err means that the first cannot be reached. It returns false if there is no other.
func (t *secondTry) another(err error) bool {
	if !t.then.IsValid() || !failedByFamily(err) || time.Since(t.s.flow.Start) >= secondLimit {
		return false
	}
	t.dial(t.then, netip.AddrPort{})
	return true
}

// over ends the second try and returns the error that decides what the app is told. If no family helped, that is the
// server's answer for the name.
func (t *secondTry) over(err error) error {
	t.timer.Stop()
	switch {
	case err == nil:
		t.s.r.count.SecondOpened.Add(1)
	case errors.Is(err, context.Canceled), failedByFamily(err):
		return t.first
	}
	return err
}
