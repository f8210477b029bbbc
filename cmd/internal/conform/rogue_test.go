package conform

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/socks"
)

// rogue is a SOCKS server with the faults that sockstest does not have: those of the relay, of the NAT and of BIND.
type rogue struct {
	early    bool   // CONNECT is granted before the dial
	keepsFIN bool   // a FIN is not passed on; without it, one FIN ends both ways
	noPeer   bool   // the second reply of BIND has zeros
	deafBind bool   // BIND is granted, and nobody listens
	second   string // the bytes of the second reply of BIND, in place of a good one

	mapping, filtering NAT
	cut                int  // longer payloads are cut to this
	most               int  // longer payloads are dropped
	fate               Fate // after a datagram to port 0
	outlives           bool // the relay goes on after the control connection

	ln net.Listener
	wg sync.WaitGroup
	mu sync.Mutex
	cs []io.Closer
}

func startRogue(t *testing.T, r *rogue) socks.Server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.ln = ln
	r.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			r.own(c)
			r.wg.Go(func() { r.serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		r.mu.Lock()
		for _, c := range r.cs {
			c.Close()
		}
		r.mu.Unlock()
		r.wg.Wait()
	})
	return server(t, ln.Addr().String())
}

// own closes c when the test ends.
func (r *rogue) own(c io.Closer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cs = append(r.cs, c)
}

func (r *rogue) serve(c *net.TCPConn) {
	defer c.Close()
	b := make([]byte, 300)
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return
	}
	if b[0] == 4 {
		r.serve4(c, b)
		return
	}
	io.ReadFull(c, b[:b[1]])
	c.Write([]byte{5, 0})
	if _, err := io.ReadFull(c, b[:10]); err != nil || b[3] != 1 {
		return
	}
	dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[8:]))
	switch b[1] {
	case 1:
		r.connect(c, dst, reply5(0, dst), reply5(5, dst))
	case 2:
		r.bind(c)
	case 3:
		r.associate(c)
	}
}

func reply5(code byte, at netip.AddrPort) []byte {
	ip := at.Addr().As4()
	return binary.BigEndian.AppendUint16(append([]byte{5, code, 0, 1}, ip[:]...), at.Port())
}

// serve4 has read two bytes. A user is not expected.
func (r *rogue) serve4(c *net.TCPConn, b []byte) {
	if _, err := io.ReadFull(c, b[2:9]); err != nil {
		return
	}
	ip := [4]byte(b[4:8])
	if ip == [4]byte{0, 0, 0, 1} {
		readLine(io.LimitReader(c, int64(len("far.example\x00"))))
		ip = [4]byte{127, 0, 0, 1}
	}
	to := netip.AddrPortFrom(netip.AddrFrom4(ip), binary.BigEndian.Uint16(b[2:]))
	r.connect(c, to, []byte{0, 90, 0, 0, 0, 0, 0, 0}, []byte{0, 91, 0, 0, 0, 0, 0, 0})
}

func (r *rogue) connect(c *net.TCPConn, to netip.AddrPort, yes, no []byte) {
	if r.early {
		c.Write(yes)
	}
	far, err := net.Dial("tcp", to.String())
	if err != nil {
		if !r.early {
			c.Write(no)
		}
		return
	}
	r.own(far)
	if !r.early {
		c.Write(yes)
	}
	r.relay(c, far)
}

func (r *rogue) relay(a, b net.Conn) {
	var wg sync.WaitGroup
	one := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		if r.keepsFIN && err == nil {
			return
		}
		to.Close()
		from.Close()
	}
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
	if r.keepsFIN {
		io.Copy(io.Discard, a) // until the test ends
	}
	b.Close()
}

func (r *rogue) bind(c *net.TCPConn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return
	}
	r.own(ln)
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	if r.deafBind {
		ln.Close()
	}
	c.Write(reply5(0, at))
	far, err := ln.Accept()
	if err != nil {
		io.Copy(io.Discard, c)
		return
	}
	r.own(far)
	peer := far.RemoteAddr().(*net.TCPAddr).AddrPort()
	if r.noPeer {
		peer = netip.MustParseAddrPort("0.0.0.0:0")
	}
	if r.second != "" {
		io.WriteString(c, r.second)
		c.Close()
		return
	}
	c.Write(reply5(0, peer))
	r.relay(c, far)
}

// key is what destinations must have in common to share something.
func key(n NAT, at netip.AddrPort) netip.AddrPort {
	switch n {
	case AddressDependent:
		return netip.AddrPortFrom(at.Addr(), 0)
	case PortDependent:
		return at
	}
	return netip.AddrPort{}
}

func (r *rogue) associate(c *net.TCPConn) {
	relay, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return
	}
	r.own(relay)
	c.Write(reply5(0, relay.LocalAddr().(*net.UDPAddr).AddrPort()))
	r.wg.Go(func() { r.carry(c, relay) })
	io.Copy(io.Discard, c)
	if !r.outlives {
		relay.Close()
	}
}

// carry relays datagrams until the relay's socket is closed.
func (r *rogue) carry(c *net.TCPConn, relay *net.UDPConn) {
	out := map[netip.AddrPort]*net.UDPConn{}
	var mu sync.Mutex
	written := map[netip.AddrPort]bool{}
	defer func() {
		for _, u := range out {
			u.Close()
		}
	}()
	b := make([]byte, 65536)
	mute := false
	for {
		n, client, err := relay.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		src, head, err := socks.ParseUDPHeader(b[:n])
		to := src.AddrPort()
		if err != nil || !to.IsValid() || mute {
			continue
		}
		if to.Port() == 0 {
			switch r.fate {
			case Ended:
				c.Close()
			case Mute:
				mute = true
			case NewPort:
				for at, u := range out {
					u.Close()
					delete(out, at)
				}
			}
			continue
		}
		payload, ok := r.fit(b[head:n])
		if !ok {
			continue
		}
		u := out[key(r.mapping, to)]
		if u == nil {
			if u, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
				return
			}
			r.own(u)
			out[key(r.mapping, to)] = u
			r.wg.Go(func() { r.back(u, relay, client, &mu, written) })
		}
		mu.Lock()
		written[key(r.filtering, to)] = true
		mu.Unlock()
		u.WriteToUDPAddrPort(payload, to)
	}
}

// back relays what comes to u from those that the filter lets through.
func (r *rogue) back(u, relay *net.UDPConn, client netip.AddrPort, mu *sync.Mutex, written map[netip.AddrPort]bool) {
	b := make([]byte, 65536)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		mu.Lock()
		ok := written[key(r.filtering, from)]
		mu.Unlock()
		payload, fits := r.fit(b[:n])
		if ok && fits {
			relay.WriteToUDPAddrPort(append(socks.AppendUDPHeader(nil, socks.AddrFrom(from)), payload...), client)
		}
	}
}

func (r *rogue) fit(b []byte) ([]byte, bool) {
	if r.most > 0 && len(b) > r.most {
		return nil, false
	}
	if r.cut > 0 && len(b) > r.cut {
		return b[:r.cut], true
	}
	return b, true
}
