package dns

import (
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	maxDirect     = 128                     // concurrent questions, each with a goroutine
	directAttempt = 1500 * time.Millisecond // for one server, if there is time for another attempt
	directRounds  = 2                       // a datagram may be lost
	// bytes of a datagram; servers send at most 1232 or 4096 unless they are told otherwise
	directBuffer = 4096
)

// DirectServer is a server that is asked without the upstream: by UDP, and by TCP if the answer does not fit.
type DirectServer struct {
	Addr netip.AddrPort
	TCP  bool // by TCP only
}

// String returns the form used in the configuration.
func (d DirectServer) String() string {
	if d.TCP {
		return "direct:tcp://" + d.Addr.String()
	}
	return "direct:udp://" + d.Addr.String()
}

// direct asks servers without the upstream. It is for the few names that the user configures so: each question has a
// goroutine and, for UDP, a socket whose port the kernel chooses (RFC 5452, section 9.2).
type direct struct {
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	servers func() []DirectServer // in order; none: questions fail
	count   *counters
	finish  func(q *query, resp []byte) // as in exchange

	slots  chan struct{}
	ctx    context.Context
	cancel context.CancelFunc

	mu   sync.Mutex
	over bool
	wg   sync.WaitGroup
}

func newDirect(cfg *Config, servers func() []DirectServer, count *counters, finish func(q *query, resp []byte)) *direct {
	d := &direct{dial: cfg.DialDirect, servers: servers, count: count, finish: finish, slots: make(chan struct{}, maxDirect)}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

// take accepts q like exchange.take.
func (d *direct) take(q *query) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case d.slots <- struct{}{}:
	default:
		d.count.Dropped.Add(1)
		return false
	}
	if d.over {
		<-d.slots
		d.count.Dropped.Add(1)
		return false
	}
	d.wg.Go(func() {
		resp := d.ask(q)
		<-d.slots
		if resp != nil || d.ctx.Err() == nil {
			d.finish(q, resp)
		}
	})
	return true
}

// run waits for the end of ctx, and then for the open questions, which it ends without a reply.
func (d *direct) run(ctx context.Context) {
	<-ctx.Done()
	d.mu.Lock()
	d.over = true
	d.mu.Unlock()
	d.cancel()
	d.wg.Wait()
}

// ask asks one server after the other, all of them twice. It returns nil if none has answered. SERVFAIL and REFUSED
// are used only if there is no better answer.
func (d *direct) ask(q *query) (best []byte) {
	ctx, cancel := context.WithDeadline(d.ctx, q.deadline)
	defer cancel()
	servers := d.servers()
	for range directRounds {
		for _, s := range servers {
			resp := d.askOne(ctx, s, q)
			if resp == nil {
				continue
			}
			q.direct = s
			if rcode := binary.BigEndian.Uint16(resp[2:]) & 15; rcode != rcodeServer && rcode != rcodeRefuse {
				return resp
			}
			best = resp
		}
		if best != nil {
			break
		}
	}
	return best
}

// askOne returns the answer of one server, or nil.
func (d *direct) askOne(ctx context.Context, s DirectServer, q *query) []byte {
	ctx, cancel := context.WithTimeout(ctx, directAttempt)
	defer cancel()
	if ctx.Err() != nil {
		return nil
	}
	binary.BigEndian.PutUint16(q.msg(), uint16(rand.Uint32()))
	if s.TCP {
		return d.byTCP(ctx, s.Addr, q)
	}
	resp := d.byUDP(ctx, s.Addr, q)
	if resp != nil && (binary.BigEndian.Uint16(resp[2:])&flagTC != 0 || len(resp) == directBuffer) {
		if whole := d.byTCP(ctx, s.Addr, q); whole != nil {
			return whole
		}
	}
	return resp
}

// open connects to a server. The connection ends with ctx.
func (d *direct) open(ctx context.Context, network string, to netip.AddrPort) (c net.Conn, end func()) {
	c, err := d.dial(ctx, network, to.String())
	if err != nil {
		return nil, nil
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	return c, func() {
		stop()
		_ = c.Close()
	}
}

func (d *direct) byUDP(ctx context.Context, to netip.AddrPort, q *query) []byte {
	c, end := d.open(ctx, "udp", to)
	if c == nil {
		return nil
	}
	defer end()
	if _, err := c.Write(q.msg()); err != nil {
		return nil
	}
	buf := make([]byte, directBuffer)
	for {
		n, err := c.Read(buf)
		if err != nil { // also if nothing listens there
			return nil
		}
		if d.isAnswer(buf[:n], q) {
			return buf[:n]
		}
	}
}

func (d *direct) byTCP(ctx context.Context, to netip.AddrPort, q *query) []byte {
	c, end := d.open(ctx, "tcp", to)
	if c == nil {
		return nil
	}
	defer end()
	d.count.Connections.Add(1)
	if _, err := c.Write(q.wire); err != nil {
		return nil
	}
	var length [2]byte
	for {
		if _, err := io.ReadFull(c, length[:]); err != nil {
			return nil
		}
		buf := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(c, buf); err != nil {
			return nil
		}
		if d.isAnswer(buf, q) {
			return buf
		}
	}
}

func (d *direct) isAnswer(resp []byte, q *query) bool {
	if len(resp) >= headerLen && [2]byte(resp) == [2]byte(q.msg()) && matches(resp, q.msg(), q.q) {
		return true
	}
	d.count.Unmatched.Add(1)
	return false
}
