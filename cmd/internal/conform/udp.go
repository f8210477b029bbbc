package conform

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// udpTries is how often a datagram is sent before the answer is given up.
const udpTries = 3

// association is an open UDP ASSOCIATE. close ends it.
type association struct {
	p       *prober
	control net.Conn     // nil: end is set
	end     func()       // from Config.Associate
	u       *net.UDPConn // connected to the relay
	buf     []byte
	cookie  string // from a public far end
}

// echo is an answer of the far end.
type echo struct {
	source  socks.Addr // in the header
	seen    netip.AddrPort
	cookie  string
	arrived int    // bytes of the question that arrived
	whole   bool   // question and answer arrived as they were sent
	payload []byte // of the answer; valid until the next exchange
}

// associate opens an association. If it is not granted, the result is nil.
func (p *prober) associate(ctx context.Context, zero netip.Addr) (*association, Answer, bool) {
	if p.Config.Associate != nil {
		u, end, a := p.Config.Associate(ctx)
		if u == nil {
			return nil, a, false
		}
		u.SetReadBuffer(1 << 20)
		return &association{p: p, end: end, u: u, buf: make([]byte, maxUDP)}, a, false
	}
	c, a, h := p.ask(ctx, p.Server, socks.CmdAssociate, socks.Addr{IP: zero}, p.Wait)
	if a.Kind != Granted {
		return nil, a, false
	}
	c.SetDeadline(time.Time{}) // from here on it is only polled
	bound := h.Bound()
	relay, repaired := bound.AddrPort(), false
	if !relay.IsValid() || relay.Addr().IsUnspecified() {
		host, err := netip.ParseAddrPort(c.RemoteAddr().String())
		if err != nil {
			c.Close()
			return nil, Answer{Kind: Failed, Error: "the reply names no relay that can be used"}, false
		}
		relay, repaired = netip.AddrPortFrom(host.Addr().Unmap(), bound.Port), true
	}
	u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		c.Close()
		return nil, Answer{Kind: Failed, Error: err.Error()}, false
	}
	u.SetReadBuffer(1 << 20)
	return &association{p: p, control: c, u: u, buf: make([]byte, maxUDP)}, a, repaired
}

func (a *association) close() {
	a.u.Close()
	if a.end != nil {
		a.end()
		return
	}
	a.control.Close()
}

// ended reports whether the server has closed the control connection.
func (a *association) ended() bool {
	if a.control == nil {
		return false
	}
	a.control.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := a.control.Read(make([]byte, 64))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// exchange sends a question of size bytes to dst, up to tries times, for an answer of answerSize bytes from the far
// end's socket from. It returns nil if no answer came.
func (a *association) exchange(ctx context.Context, dst socks.Addr, from [2]int, size, answerSize, tries int) *echo {
	if a.p.Token != "" && from != [2]int{} && a.cookie == "" { // a public far end must first know that its answers arrive
		if a.exchange(ctx, dst, [2]int{}, 0, 0, tries) == nil {
			return nil
		}
	}
	id := a.p.id.Add(1)
	q := question{id: id, from: from, size: answerSize, token: a.p.Token, cookie: a.cookie}
	if q.token != "" { // no answer is longer than its question
		size = max(size, answerSize)
	}
	question := q.datagram(size)
	datagram := append(socks.AppendUDPHeader(nil, dst), question...)
	for range tries {
		if ctx.Err() != nil {
			return nil
		}
		a.u.Write(datagram) // an ICMP error about the previous one does not matter
		if e := a.await(id, question); e != nil {
			return e
		}
	}
	return nil
}

// await reads to the answer with this id.
func (a *association) await(id uint64, question []byte) *echo {
	by := time.Now().Add(a.p.UDPWait)
	a.u.SetReadDeadline(by)
	for time.Now().Before(by) {
		n, err := a.u.Read(a.buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil { // an ICMP error, possibly about an earlier datagram
			time.Sleep(10 * time.Millisecond)
			continue
		}
		source, head, err := socks.ParseUDPHeader(a.buf[:n])
		if err != nil {
			continue
		}
		e, got, sum := parseEcho(a.buf[head:n])
		if e == nil || got != id {
			continue
		}
		e.source = source
		a.cookie = e.cookie
		e.whole = e.arrived == len(question) && sum == crc32.ChecksumIEEE(question) && filled(e.payload)
		return e
	}
	return nil
}

// parseEcho parses an answer of the far end. It returns nil if payload is not one.
func parseEcho(payload []byte) (e *echo, id uint64, sum uint32) {
	line, _, _ := bytes.Cut(payload[:min(len(payload), farLine)], []byte{'\n'})
	var seen string
	e = &echo{payload: payload}
	if n, _ := fmt.Sscanf(string(line), "! %d %s %d %d %s", &id, &seen, &e.arrived, &sum, &e.cookie); n < 4 {
		return nil, 0, 0
	}
	e.seen, _ = netip.ParseAddrPort(seen)
	return e, id, sum
}

// small asks the far end's first socket for a small answer.
func (a *association) small(ctx context.Context) *echo {
	return a.exchange(ctx, socks.AddrFrom(a.p.Ends.UDP[0][0]), [2]int{}, 0, 0, udpTries)
}

// udp tests UDP ASSOCIATE.
func (p *prober) udp(ctx context.Context) {
	r := &p.report.UDP
	zero := netip.IPv4Unspecified()
	other := netip.IPv6Unspecified()
	if c, err := p.dial(ctx, p.Wait); err == nil {
		if at, err := netip.ParseAddrPort(c.RemoteAddr().String()); err == nil && at.Addr().Is6() && !at.Addr().Is4In6() {
			zero, other = other, zero
		}
		c.Close()
	}
	a, first, repaired := p.associate(ctx, zero)
	r.Associate, r.Repaired = first, repaired
	if a == nil {
		return
	}
	r.Relay = a.u.RemoteAddr().String()
	e := a.small(ctx)
	a.close()
	if e == nil {
		return
	}
	r.Works, r.TrueSource = true, e.source == socks.AddrFrom(p.Ends.UDP[0][0])
	if b, answer, _ := p.associate(ctx, other); b != nil {
		r.OtherFamily = answer
		b.close()
	} else {
		r.OtherFamily = answer
	}
	r.Mapping, r.Filtering = p.mapping(ctx), p.filtering(ctx)
	r.LargestUp, r.CutUp = p.largest(ctx, true)
	r.LargestDown, r.CutDown = p.largest(ctx, false)
	if p.Ends.Name != "" {
		r.Names, r.NameSource = p.byName(ctx, zero)
	}
	if p.Ends.TCP6.IsValid() {
		r.IPv6 = p.carries(ctx, zero, socks.AddrFrom(p.Ends.TCP6))
	}
	r.EndsWithTCP = p.endsWithTCP(ctx, zero)
	r.After = p.fates(ctx, zero)
}

// byName reports whether an association carries an exchange with a name, and whom the answer has as its source.
func (p *prober) byName(ctx context.Context, zero netip.Addr) (bool, Source) {
	a, _, _ := p.associate(ctx, zero)
	if a == nil {
		return false, ""
	}
	defer a.close()
	dst := socks.Addr{Name: p.Ends.Name, Port: p.Ends.UDP[0][0].Port()}
	switch e := a.exchange(ctx, dst, [2]int{}, 0, 0, udpTries); {
	case e == nil:
		return false, ""
	case e.source == socks.AddrFrom(p.Ends.UDP[0][0]):
		return true, SourceAddress
	case strings.EqualFold(e.source.Name, dst.Name) && e.source.Port == dst.Port:
		return true, SourceName
	}
	return true, SourceOther
}

// carries reports whether an association carries an exchange with dst.
func (p *prober) carries(ctx context.Context, zero netip.Addr, dst socks.Addr) bool {
	a, _, _ := p.associate(ctx, zero)
	if a == nil {
		return false
	}
	defer a.close()
	return a.exchange(ctx, dst, [2]int{}, 0, 0, udpTries) != nil
}

func (p *prober) endsWithTCP(ctx context.Context, zero netip.Addr) bool {
	a, _, _ := p.associate(ctx, zero)
	if a == nil {
		return false
	}
	defer a.close()
	if a.small(ctx) == nil {
		return false
	}
	a.control.Close()
	time.Sleep(settle)
	return a.small(ctx) == nil
}
