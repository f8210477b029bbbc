package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// Prober does single steps of a probe, for callers that cannot wait for a whole one. Steps may run concurrently.
type Prober struct{ p *prober }

// NewProber returns a Prober.
func NewProber(c Config) Prober { return Prober{newProber(c)} }

// Request asks for a connection to dst, and closes it if it is granted.
func (p Prober) Request(ctx context.Context, dst socks.Addr, limit time.Duration) Answer {
	c, a, _ := p.p.ask(ctx, p.p.Server, socks.CmdConnect, dst, limit)
	if c != nil {
		c.Close()
	}
	return a
}

// Reach asks for a connection to a far end at dst, and checks that it works.
func (p Prober) Reach(ctx context.Context, dst socks.Addr, limit time.Duration) Answer {
	return p.p.try(ctx, dst, limit)
}

// Open returns a connection to dst, or nil and why there is none. The connection ends after limit.
func (p Prober) Open(ctx context.Context, dst socks.Addr, limit time.Duration) (net.Conn, Answer) {
	c, a, _ := p.p.ask(ctx, p.p.Server, socks.CmdConnect, dst, limit)
	return c, a
}

// HalfClose tests what happens to a FIN in each direction.
func (p Prober) HalfClose(ctx context.Context) (up, down Passage) {
	return p.p.halfCloseUp(ctx), p.p.halfCloseDown(ctx)
}

// Resets tests what happens to a RST in each direction.
func (p Prober) Resets(ctx context.Context) (up, down Passage) {
	return p.p.resetUp(ctx), p.p.resetDown(ctx)
}

// Session is an open session with a public far end.
type Session struct {
	Token     string
	Ports     [2]uint16 // for UDP
	Closed    uint16    // a port that refuses TCP
	Addresses int       // number of addresses of the far end
	Seen      netip.AddrPort
	conn      net.Conn
}

// Close ends the session, after which its token is invalid. It may be called twice.
func (s *Session) Close() error { return s.conn.Close() }

// ErrNoFarEnd means that the peer is not a far end, or one that serves only tests.
var ErrNoFarEnd = errors.New("what answers there is no 'viasocks doctor --serve'")

// Session opens a session with the far end at dst. The caller closes it.
func (p Prober) Session(ctx context.Context, dst socks.Addr, limit time.Duration) (*Session, Answer, error) {
	c, a, _ := p.p.ask(ctx, p.p.Server, socks.CmdConnect, dst, limit)
	if a.Kind != Granted {
		return nil, a, nil
	}
	s := &Session{conn: c}
	c.SetDeadline(time.Now().Add(limit))
	err := hello(c)
	if err == nil {
		a.First = true
		if _, err = io.WriteString(c, "session\n"); err == nil {
			var line, seen string
			if line, err = readLine(c); err == nil {
				_, err = fmt.Sscanf(line, "%s %d %d %d %d %s", &s.Token, &s.Ports[0], &s.Ports[1], &s.Closed, &s.Addresses, &seen)
				s.Seen, _ = netip.ParseAddrPort(seen)
			}
		}
	}
	if err != nil || len(s.Token) > 64 {
		c.Close()
		if ending(err).Kind == Silence || ending(err).Kind == Reset {
			return nil, a, err
		}
		return nil, a, ErrNoFarEnd
	}
	c.SetDeadline(time.Now().Add(farLife))
	return s, a, nil
}

// Trip measures the time from a byte to its echo: the median of several.
func (p Prober) Trip(ctx context.Context) (time.Duration, error) {
	c, err := p.p.command(ctx, "echo")
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var all []time.Duration
	b := []byte{0}
	for range 7 {
		begun := time.Now()
		if _, err := c.Write(b); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return 0, err
		}
		all = append(all, time.Since(begun))
	}
	slices.Sort(all)
	return all[len(all)/2], nil
}

// speedTime is how long a speed is measured.
const speedTime = 1500 * time.Millisecond

// Speed measures bytes per second, through one connection at a time. Zero: nothing arrived.
func (p Prober) Speed(ctx context.Context) (down, up float64) { return p.pour(ctx), p.sink(ctx) }

func (p Prober) pour(ctx context.Context) float64 {
	c, err := p.p.command(ctx, "pour "+strconv.Itoa(pourMost))
	if err != nil {
		return 0
	}
	defer c.Close()
	buf := make([]byte, 64<<10)
	total, begun := 0, time.Now()
	c.SetReadDeadline(begun.Add(speedTime))
	for total < pourMost {
		n, err := c.Read(buf)
		if total += n; err != nil {
			break
		}
	}
	return float64(total) / time.Since(begun).Seconds()
}

// sink sends, and the far end reports how much arrived. This also works with a server that does not pass a half-close.
func (p Prober) sink(ctx context.Context) float64 {
	token := p.p.token()
	c, err := p.p.command(ctx, "record "+token)
	if err != nil {
		return 0
	}
	defer c.Close()
	buf := make([]byte, 64<<10)
	begun := time.Now()
	c.SetWriteDeadline(begun.Add(speedTime))
	for sent := 0; sent < pourMost; {
		n, err := c.Write(buf)
		if sent += n; err != nil {
			break
		}
	}
	c.Close()
	_, n := p.p.result(ctx, token)
	return float64(n) / time.Since(begun).Seconds()
}

// Association asks for an association and ends it.
func (p Prober) Association(ctx context.Context) Answer {
	a, answer, _ := p.p.associate(ctx, p.p.zero())
	if a != nil {
		a.close()
	}
	return answer
}

// Mapping tests the mapping behaviour of RFC 5780. With a far end of one address, the best result is
// "endpoint-independent" as seen at two ports; that of Filtering is then "address-dependent".
func (p Prober) Mapping(ctx context.Context) NAT { return p.p.mapping(ctx) }

// Filtering tests the filtering behaviour: see Mapping.
func (p Prober) Filtering(ctx context.Context) NAT { return p.p.filtering(ctx) }

// Echo sends a datagram to dst through a new association. ok means that an answer came, and trueSource that its
// header names dst.
func (p Prober) Echo(ctx context.Context, dst socks.Addr) (ok, trueSource bool) {
	a, _, _ := p.p.associate(ctx, p.p.zero())
	if a == nil {
		return false, false
	}
	defer a.close()
	e := a.exchange(ctx, dst, [2]int{}, 0, 0, udpTries)
	return e != nil, e != nil && e.source == dst
}

// datagramSizes are the sizes that Sizes tries: the largest possible, those that servers' buffers and path MTUs
// usually let pass, and the minimum for QUIC.
var datagramSizes = []int{65485, 60000, 32768, 16384, 9000, 8192, 4096, 2048, 1472, 1400, 1252, 1200, 1000, 512}

// Sizes finds the largest of these payloads that arrives whole at the far end, and the largest that comes back. Zero:
// none does.
func (p Prober) Sizes(ctx context.Context) (up, down int) {
	up = p.sizes(ctx, datagramSizes, false)
	return up, p.sizes(ctx, slices.DeleteFunc(slices.Clone(datagramSizes), func(n int) bool { return n > up }), true)
}

// sizePause is the time between two sizes: a server that gets many large datagrams at once loses the last ones.
const sizePause = 25 * time.Millisecond

// sizes sends all sizes, the largest first, twice, and reads the answers meanwhile.
func (p Prober) sizes(ctx context.Context, sizes []int, back bool) (most int) {
	a, _, _ := p.p.associate(ctx, p.p.zero())
	if a == nil {
		return 0
	}
	defer a.close()
	of := map[uint64]int{}
	head := socks.AppendUDPHeader(nil, socks.AddrFrom(p.p.Ends.UDP[0][0]))
	for range 2 {
		for _, n := range sizes {
			if n <= most {
				continue
			}
			q := question{id: p.p.id.Add(1), token: p.p.Token}
			if back {
				q.size = n
			}
			of[q.id] = n
			a.u.Write(append(slices.Clone(head), q.datagram(n)...))
			most = max(most, a.largestAnswer(ctx, of, back, sizePause))
		}
		most = max(most, a.largestAnswer(ctx, of, back, 2*p.p.UDPWait))
	}
	return most
}

// largestAnswer reads answers for a while. It returns the largest size of a question in of that arrived whole and, for
// back, whose answer arrived whole as well.
func (a *association) largestAnswer(ctx context.Context, of map[uint64]int, back bool, wait time.Duration) (most int) {
	a.u.SetReadDeadline(time.Now().Add(wait))
	for ctx.Err() == nil {
		n, err := a.u.Read(a.buf)
		if isTimeout(err) {
			break
		}
		if err != nil {
			time.Sleep(time.Millisecond) // an ICMP error, which concerns only one datagram
			continue
		}
		_, skip, err := socks.ParseUDPHeader(a.buf[:n])
		if err != nil {
			continue
		}
		e, id, _ := parseEcho(a.buf[skip:n])
		if e != nil && e.arrived == of[id] && (!back || len(e.payload) == of[id]) && filled(e.payload) {
			most = max(most, of[id])
		}
	}
	return most
}
