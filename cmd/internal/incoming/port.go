package incoming

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// port is a port of the program and the BINDs that are made for it by one IP version. Everything is guarded by the
// manager's mu.
type port struct {
	m       *Manager
	spec    Spec
	ask     uint16 // the outer port that the server is asked for
	also    uint16 // the outer port of UDP, where the server is to listen, too; 0: none
	waiting map[*wait]struct{}
	asking  int // BINDs without their first answer
	outer   netip.AddrPort
	open    int
	used    map[uint16]int // the outer ports of open connections
	why     error
	said    string    // the error that was logged last; empty once the server has proved itself
	bogus   time.Time // when an impossible peer was logged last
	backoff time.Duration
	last    time.Time // when the last BIND began
	timer   *time.Timer
	ended   bool
	asked   bool // exists only because a program asked for it
	told    bool // that program has been told of ask

	// ask or also is with somebody else, or was with a connection that has ended: it is asked for again.
	lost      *time.Timer
	lostPause time.Duration

	// A BIND is for one IP version. six makes those for IPv6, once the server has shown that it knows BIND.
	six   *port // nil for IPv6 itself, and if the program has none
	four  *port // the port whose six this is; nil: this is for IPv4
	begun bool  // of six
}

// wait is a BIND to which the server listens.
type wait struct {
	at      netip.AddrPort
	since   time.Time // when the server said at
	cancel  context.CancelFunc
	only    uint16 // of use only at this outer port; 0: at any
	foreign bool   // at is of another IP version
	stale   bool   // it is made again
}

// after makes the next BIND after a pause.
func (p *port) after(pause time.Duration) {
	if p.ended || p.timer != nil {
		return
	}
	pause = max(pause, time.Until(p.last.Add(bindPause)))
	p.timer = time.AfterFunc(max(pause, 0), func() {
		p.m.mu.Lock()
		p.timer = nil
		start := !p.ended && p.open+len(p.waiting)+p.asking < MaxOpen && p.idle()
		p.m.mu.Unlock()
		if start {
			p.bind(0)
		}
	})
}

// bind makes a BIND. Only the outer port only is of use, unless it is 0. It must be called without the lock: the answer may
// come at once.
func (p *port) bind(only uint16) {
	m := p.m
	m.mu.Lock()
	if p.ended || m.over {
		m.mu.Unlock()
		return
	}
	p.asking++
	p.last = time.Now()
	ask := cmp.Or(only, p.ask)
	m.busy.Add(1)
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(m.ctx)
	w := &wait{cancel: cancel, only: only}
	b := m.cfg.Binder(p.spec.Upstream)
	if b == nil {
		p.done(w, -1, netip.AddrPort{}, errNoServer)
		return
	}
	// Only with a zero address does dante give the port that is asked for, and any peer may come.
	b.Bind(ctx, m.cfg.Loop, socks.Addr{IP: p.family(), Port: ask}, bindWait,
		func(at netip.AddrPort) { p.bound(w, at) },
		func(fd int, peer netip.AddrPort, err error) { p.done(w, fd, peer, err) })
}

// family returns the zero address of the IP version.
func (p *port) family() netip.Addr {
	if p.four != nil {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// beginSix makes the first BIND for IPv6.
func (p *port) beginSix() {
	if p.six != nil && !p.six.begun {
		p.six.begun = true
		p.six.after(0)
	}
}

// closeReset closes the connection of a peer so that it sees RST.
func closeReset(fd int) { loop.CloseReset(fd) }

var (
	errNoServer = errors.New("the upstream is no SOCKS server")
	errFamily   = errors.New("the proxy listens at an IPv4 address when it is asked for an IPv6 one")
)

// bound handles the first answer: the server listens at at.
func (p *port) bound(w *wait, at netip.AddrPort) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	w.at, w.since = at, time.Now()
	if p.four != nil && !at.Addr().Unmap().Is6() {
		w.foreign = true
		w.cancel()
		return
	}
	p.beginSix()
	if p.ended || w.only != 0 && (at.Port() != w.only || w.only != p.ask && w.only != p.also) {
		w.cancel()
		return
	}
	p.asking--
	p.waiting[w] = struct{}{}
	p.m.held.Store(at, w)
	p.why = nil
	if at.Port() == p.ask || len(p.missing()) == 0 {
		p.lostPause = 0
	}
	p.announce()
	p.lostLater()
	if w.only != 0 { // while it was asked for, no other BIND began
		p.after(0)
	}
}

// waits returns where the server listens: by the port that was asked for if the server has it, and by the outer port of UDP.
func (p *port) waits() (own, also netip.AddrPort) {
	for w := range p.waiting {
		switch port := w.at.Port(); {
		case port == p.ask:
			own = w.at
		case port == p.also:
			also = w.at
		case !own.IsValid():
			own = w.at
		}
	}
	return own, also
}

// idle reports whether nothing listens but, perhaps, what listens at the outer port of UDP.
func (p *port) idle() bool {
	own, _ := p.waits()
	return !own.IsValid() && p.asking == 0
}

// announce tells where the port can be reached.
func (p *port) announce() {
	best, also := p.waits()
	if !best.IsValid() {
		best = also
	}
	if best == p.outer {
		return
	}
	p.outer = best
	four := p
	if p.four != nil {
		four = p.four
	}
	var best6 netip.AddrPort
	if four.six != nil {
		best6 = four.six.outer
	}
	if best.IsValid() {
		p.m.cfg.Log.Info("peers can connect to the program", "port", p.spec.Port, "at", best, "upstream", p.spec.Upstream)
	}
	if p.m.cfg.Announce != nil {
		p.m.cfg.Announce(p.spec, four.outer, best6)
	}
}

// done handles the second answer, or the end of a BIND.
func (p *port) done(w *wait, fd int, peer netip.AddrPort, err error) {
	m := p.m
	defer m.busy.Done()
	defer w.cancel()
	m.mu.Lock()
	if _, ok := p.waiting[w]; ok {
		delete(p.waiting, w)
		m.held.CompareAndDelete(w.at, w)
	} else {
		p.asking--
	}
	if err != nil {
		p.failed(w, err)
		m.mu.Unlock()
		return
	}
	if p.ended || !p.possible(peer) {
		closeReset(fd)
		p.after(0)
		m.mu.Unlock()
		return
	}
	p.said, p.backoff = "", 0
	p.open++
	p.used[w.at.Port()]++
	m.count.Accepted.Add(1)
	if own, _ := p.waits(); own.IsValid() {
		p.announce() // by the other one; without one, what was announced stays until the next BIND
	}
	p.after(0)
	m.mu.Unlock()
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	m.busy.Go(func() {
		if err := m.cfg.Deliver(p.spec, peer, loop.Unwatched(fd), func(r relay.Result) { p.over(w, r) }); err != nil {
			m.cfg.Log.Warn("cannot carry the connection of a peer", "port", p.spec.Port, "peer", peer, "err", err)
			p.over(w, relay.Result{})
		}
	})
}

// possible reports whether peer can be one. A link-local address would need a zone, which SOCKS does not have.
func (p *port) possible(peer netip.AddrPort) bool {
	a := peer.Addr().Unmap()
	if peer.Port() != 0 && p.m.cfg.CanBePeer(a) && !(a.Is6() && a.IsLinkLocalUnicast()) {
		return true
	}
	p.m.count.Bogus.Add(1)
	if time.Since(p.bogus) > retryMost {
		p.bogus = time.Now()
		p.m.cfg.Log.Warn("the proxy accepted a connection from an impossible peer", "port", p.spec.Port, "peer", peer)
	}
	return false
}

// failed handles a BIND that ended without a peer.
func (p *port) failed(w *wait, err error) {
	m := p.m
	if p.ended || m.over {
		return
	}
	switch {
	case w.stale: // what was announced stays until the next BIND
		p.after(0)
		return
	case w.foreign:
		err = errFamily
	case w.only != 0 && (len(p.waiting) > 0 || w.at.IsValid() && errors.Is(err, context.Canceled)):
		p.lostLater()
		p.after(0)
		return
	}
	p.announceGone()
	if errors.Is(err, socks.ErrNoPeer) {
		p.after(0)
		return
	}
	m.count.Failed.Add(1)
	if w.at.IsValid() && time.Since(w.since) > settled {
		p.said, p.backoff = "", 0
	}
	p.backoff = min(max(2*p.backoff, retryFirst), retryMost)
	level := slog.LevelWarn
	var reply socks.Reply
	answered := errors.As(err, &reply)
	switch {
	case answered && reply == socks.ReplyCommandNotSupported || err == errNoServer:
		p.backoff = retryUnable
	case p.four != nil && (answered || err == errFamily): // many proxies have no IPv6
		p.backoff, level = retryUnable, slog.LevelDebug
	case reply == socks.ReplyAddrTypeNotSupported: // it may have IPv6 alone
		p.backoff = retryUnable
		p.beginSix()
	}
	if p.said != err.Error() {
		p.said = err.Error()
		m.cfg.Log.Log(m.ctx, level, "peers can't connect to the program: the proxy does not listen for it", "port", p.spec.Port,
			"upstream", p.spec.Upstream, "err", err, "again", p.backoff)
	}
	p.why = err
	p.after(p.backoff)
}

// announceGone announces that nothing listens any more, if that is so. After a peer has come, what was announced stays
// until the next BIND says where it listens.
func (p *port) announceGone() {
	if own, _ := p.waits(); !own.IsValid() && p.outer.IsValid() {
		p.announce()
	}
}

// over handles the end of a peer's connection.
func (p *port) over(w *wait, r relay.Result) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.open--
	if p.used[w.at.Port()]--; p.used[w.at.Port()] == 0 {
		delete(p.used, w.at.Port())
	}
	if errors.Is(r.Err, relay.ErrAppGone) {
		p.m.count.Refused.Add(1)
	}
	if p.idle() {
		p.after(0)
	}
	if w.at.Port() == p.ask || w.at.Port() == p.also {
		if p.lost != nil && p.lost.Stop() { // it has waited for what has just happened
			p.lost = nil
		}
		p.lostPause = 0
		p.lostLater()
	}
}

// renew makes the BINDs of the port again, at once even if the last one failed. The caller holds mu.
func (p *port) renew() {
	if p.six != nil && p.six.begun {
		p.six.renew()
	}
	for w := range p.waiting {
		w.stale = true
		w.cancel()
	}
	p.backoff = 0
	if p.timer != nil && p.timer.Stop() {
		p.timer = nil
		p.after(0)
	}
}

// end ends the BINDs of the port.
func (p *port) end() {
	p.ended = true
	if p.six != nil {
		p.six.end()
	}
	for _, t := range []*time.Timer{p.timer, p.lost} {
		if t != nil {
			t.Stop()
		}
	}
	for w := range p.waiting {
		w.cancel()
	}
}
