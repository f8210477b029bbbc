package route

import (
	"context"
	"crypto/rand"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

const (
	// A probe asks each question at most probeTries times. The first pause is probeFirst, and each further one is twice as
	// long as the one before.
	probeFirst = 250 * time.Millisecond
	probeTries = 4
	// probeLinger is how long after the end of a probe its late answers still do not reach the app.
	probeLinger = 10 * time.Second
	// besideAsks is the number of sockets of this host to which the proxy is asked to send.
	besideAsks = 2
)

var (
	errVaries     = errors.New("the proxy uses another port for each destination, so that no port can be given to others")
	errNAT        = errors.New("a NAT is between this host and the proxy: name STUN servers with --stun")
	errSilent     = errors.New("no datagram of the proxy has arrived at this host: name STUN servers with --stun")
	errNoSTUN     = errors.New("no STUN server of --stun has answered through the proxy")
	errNoSTUNName = errors.New("no name of a STUN server of --stun can be looked up")
	errNotUs      = errors.New("the upstream is not a SOCKS server: name STUN servers with --stun")
)

// besideLink is a PacketLink whose server can be asked to send to this host; see socks.Association.
type besideLink interface {
	Beside(n int) (all []*net.UDPConn, reachable bool, err error)
	Listen() (*net.UDPConn, error)
	Relay() netip.AddrPort
}

// probe finds out where an association is reached from outside. It sends questions over the association itself, to STUN
// servers or to sockets of this host, whose receivers see the outer endpoint. Then it sends a datagram to that endpoint as a
// stranger, to see whether it arrives. Only the probe's goroutine and the loop of the association use it.
type probe struct {
	k        *kept
	of       *assoc
	link     relay.PacketLink
	ctx      context.Context
	cancel   context.CancelFunc
	stun     []socks.Addr // the STUN servers that are asked; none: sockets of this host are used
	ids      []stunID     // the questions
	stranger stunID       // the content of the stranger's datagram

	mu   sync.Mutex
	seen []netip.AddrPort // by question: the endpoint from which its receiver got it
	let  bool             // the stranger's datagram has arrived
	wake chan struct{}    // seen or let has changed
}

// newProbe returns a probe of k's association. The caller holds udp.mu.
func newProbe(k *kept) *probe {
	p := &probe{k: k, of: k.of, link: k.link, wake: make(chan struct{}, 1)}
	if servers := k.keeping.stun.Load(); servers != nil {
		p.stun = *servers
	}
	p.ctx, p.cancel = context.WithCancel(k.ctx)
	_, _ = rand.Read(p.stranger[:])
	for range max(len(p.stun), besideAsks) {
		p.ids = append(p.ids, newStunID())
	}
	p.seen = make([]netip.AddrPort, len(p.ids))
	return p
}

// take returns pkts without the datagrams that are for the probe. It reorders pkts. The loop of the association calls it.
func (p *probe) take(pkts []flow.Packet) []flow.Packet {
	n := 0
	for i := range pkts {
		if p.mine(pkts[i].Payload) {
			continue
		}
		pkts[n], pkts[i] = pkts[i], pkts[n]
		n++
	}
	return pkts[:n]
}

// mine reports whether a datagram is for the probe, and notes what it says.
func (p *probe) mine(b []byte) bool {
	if len(b) == len(p.stranger) && stunID(b) == p.stranger {
		p.note(func() { p.let = true })
		return true
	}
	for i := range p.stun {
		if p.ids[i].answers(b) {
			if at := parseStun(b); flow.OneHost(at.Addr()) {
				p.note(func() { p.seen[i] = at })
			}
			return true
		}
	}
	return false
}

// note calls f with the lock held, and wakes the goroutine of the probe.
func (p *probe) note(f func()) {
	p.mu.Lock()
	f()
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run makes the probe. It calls tell when the outer endpoint is known, and again when the filter is known. In the last call,
// over is true.
func (p *probe) run(tell func(o Outer, over bool)) {
	b, _ := p.link.(besideLink)
	var err error
	switch {
	case len(p.stun) > 0:
		err = p.askSTUN()
	case b == nil:
		err = errNotUs
	default:
		err = p.askBeside(b)
	}
	o := p.outer(err)
	// The stranger's datagram shows this host's own address to whoever receives it. An endpoint that a STUN server has told
	// may belong to somebody else, so the datagram goes only to the proxy's own address.
	if !o.At.IsValid() || b == nil || !p.k.mayProbe(o.At.Addr()) ||
		len(p.stun) > 0 && b.Relay().Addr() != o.At.Addr() {
		tell(o, true)
		return
	}
	tell(o, false)
	o.Filter = p.filter(b, o.At)
	tell(o, true)
}

// outer returns what the answers say. err is the reason if there is no answer.
func (p *probe) outer(err error) (o Outer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.seen {
		switch {
		case !at.IsValid():
		case o.At.IsValid() && o.At != at:
			return Outer{Err: errVaries, Cannot: true}
		default:
			o.At = at
		}
	}
	if !o.At.IsValid() {
		o.Err = err
		o.Cannot = err == errNAT || err == errNotUs
	}
	return o
}

// ask sends n questions until each is answered. It returns silent if some question has no answer in the end.
func (p *probe) ask(n int, silent error, send func(i int)) error {
	pause := p.k.probeFirst
	for range probeTries {
		for i := range n {
			if !p.answered(i) {
				send(i)
			}
		}
		if p.wait(pause, func() bool { return p.answeredAll(n) }) {
			return nil
		}
		pause *= 2
	}
	return silent
}

func (p *probe) answered(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[i].IsValid()
}

func (p *probe) answeredAll(n int) bool {
	for i := range n {
		if !p.answered(i) {
			return false
		}
	}
	return true
}

// wait waits until done returns true, for at most d. It returns what done returns then, or false if the probe was cancelled.
func (p *probe) wait(d time.Duration, done func() bool) bool {
	late := time.NewTimer(d)
	defer late.Stop()
	for !done() {
		select {
		case <-p.wake:
		case <-late.C:
			return done()
		case <-p.ctx.Done():
			return false
		}
	}
	return true
}

// send sends a datagram over the association, unless the association has another link now.
func (p *probe) send(to netip.AddrPort, payload []byte) {
	p.k.udp.mu.Lock()
	defer p.k.udp.mu.Unlock()
	if p.of.link == p.link && p.ctx.Err() == nil {
		one := [1]flow.Packet{{Src: p.k.app, Dst: to, Payload: payload}}
		_, _ = p.link.Send(one[:]) // a lost question is repeated
	}
}

// askSTUN asks the STUN servers.
func (p *probe) askSTUN() error {
	servers := p.stun
	at := make([]netip.AddrPort, len(servers))
	for i, s := range servers {
		if at[i] = s.AddrPort(); s.Name != "" {
			at[i] = netip.AddrPortFrom(p.lookUp(s.Name), s.Port)
		}
	}
	silent := errNoSTUNName
	for _, to := range at {
		if to.Addr().IsValid() {
			silent = errNoSTUN
		}
	}
	return p.ask(len(servers), silent, func(i int) {
		if at[i].Addr().IsValid() {
			p.send(at[i], p.ids[i].request())
		}
	})
}

// lookUp returns the IPv4 address of a name. It is invalid if the name cannot be looked up.
func (p *probe) lookUp(name string) (at netip.Addr) {
	d := p.k.port53.server.Load()
	found := make(chan netip.Addr, 1)
	if d == nil || !d.LookUp(name, false, func(a netip.Addr, _ time.Duration) { found <- a }) {
		return at
	}
	late := time.NewTimer(farWait)
	defer late.Stop()
	select {
	case at = <-found:
	case <-late.C:
	case <-p.ctx.Done():
	}
	return at
}

// askBeside asks the proxy to send to sockets of this host.
func (p *probe) askBeside(b besideLink) error {
	conns, reachable, err := b.Beside(besideAsks)
	for _, c := range conns {
		defer c.Close()
	}
	if err == nil && !reachable {
		err = errNAT
	}
	if err != nil {
		return err
	}
	var readers sync.WaitGroup
	to := make([]netip.AddrPort, len(conns))
	for i, c := range conns {
		to[i] = c.LocalAddr().(*net.UDPAddr).AddrPort()
		readers.Go(func() { p.read(i, c) })
	}
	err = p.ask(len(conns), errSilent, func(i int) { p.send(to[i], p.ids[i][:]) })
	for _, c := range conns {
		_ = c.SetReadDeadline(time.Now())
	}
	readers.Wait()
	return err
}

// read waits at c for the datagram with question i, which only the proxy can send.
func (p *probe) read(i int, c *net.UDPConn) {
	var b [len(p.ids[0]) + 1]byte
	for {
		n, from, err := c.ReadFromUDPAddrPort(b[:])
		switch {
		case errors.Is(err, net.ErrClosed) || isTimeout(err):
			return
		case err != nil: // an ICMP error
		case n == len(p.ids[i]) && stunID(b[:n]) == p.ids[i]:
			p.note(func() { p.seen[i] = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) })
			return
		}
	}
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// filter finds out who may send to the outer endpoint. It sends from a socket to which the association has never sent.
func (p *probe) filter(b besideLink, at netip.AddrPort) Filter {
	c, err := b.Listen()
	if err != nil {
		return FilterUnknown
	}
	defer c.Close()
	pause, sent := p.k.probeFirst, false
	for range probeTries - 1 { // a datagram may be lost
		_, err := c.WriteToUDPAddrPort(p.stranger[:], at)
		sent = sent || err == nil
		if p.wait(pause, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.let }) {
			return FilterOpen
		}
	}
	if p.ctx.Err() != nil || !sent { // a firewall of this host may refuse datagrams to any port but the relay's
		return FilterUnknown
	}
	return FilterClosed
}
