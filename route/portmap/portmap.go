package portmap

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// Port is the UDP port at which a gateway is asked.
const Port = 5351

const (
	// MaxLifetime is the longest time for which a port is given. It is short, because the port at the proxy may change,
	// and a program learns that when it asks again.
	MaxLifetime = 2 * time.Minute
	// keepMost is the longest time for which a port of NAT-PMP is kept if the program does not ask again. Transmission 3.00
	// asks for an hour, and again after 20 minutes, whatever lifetime it is told.
	keepMost = 30 * time.Minute
	// maxMappings limits the ports of one program.
	maxMappings = 32
	// maxClients limits the addresses from which ports are asked for.
	maxClients = 16
)

// Proto is an IP protocol number.
type Proto uint8

// The protocols whose ports can be asked for.
const (
	TCP Proto = 6
	UDP Proto = 17
)

// String returns the name of the protocol in lower case. The zero Proto counts as TCP.
func (p Proto) String() string {
	if p == UDP {
		return "udp"
	}
	return "tcp"
}

// State is what a Backend knows about a port.
type State uint8

// The values of State.
const (
	Wait        State = iota // not known yet: no answer is sent, and the program asks again
	Works                    // peers reach the program
	Failed                   // the proxy cannot be asked now
	Unsupported              // the proxy cannot do it
	Forbidden                // the user does not allow it
	Full                     // there are too many ports
)

// Want is a program's request for a port.
type Want struct {
	Proto Proto
	App   netip.AddrPort // the program's own endpoint
	Outer uint16         // the outer port that the program prefers; 0: any
	Fixed bool           // the program is not told when the outer port changes (UPnP)
}

// Backend makes ports. Its methods may be called with locks held, and must not block.
type Backend interface {
	// Map makes the program's port reachable from outside. It is called for each request; a repeated call has no effect.
	Map(w Want) (outer netip.AddrPort, s State)
	// Unmap ends what Map began.
	Unmap(p Proto, app netip.AddrPort)
	// External returns the address of the proxy toward peers.
	External() (netip.Addr, State)
}

// Server answers requests. Its methods may be called from any goroutine.
type Server struct {
	back              Backend
	start             time.Time
	uuid, description string // of UPnP

	mu    sync.Mutex
	count Counters[uint64]
	ports map[key]*mapping
}

// Counters count requests; see package count.
type Counters[T any] struct {
	Mapped    T `metric:"portmap_requests_total" label:"result=mapped" help:"Requests of programs for a port (NAT-PMP, PCP, UPnP)."`
	Refused   T `metric:"portmap_requests_total" label:"result=refused"`
	Malformed T `metric:"portmap_requests_total" label:"result=malformed"`
	Waiting   T `metric:"portmap_requests_total" label:"result=not_known_yet"`
}

type key struct {
	proto  Proto
	client netip.Addr
	port   uint16
	igd    bool // asked for by UPnP
}

func (k key) app() netip.AddrPort { return netip.AddrPortFrom(k.client, k.port) }

func (k key) want(outer uint16) Want {
	return Want{Proto: k.proto, App: k.app(), Outer: outer, Fixed: k.igd}
}

// mapping is a port that a program has.
type mapping struct {
	nonce  [12]byte // of PCP
	pcp    bool
	asked  time.Time // when the program asked last
	until  time.Time
	outer  netip.AddrPort
	filled bool
	text   string // of UPnP
}

// New returns a Server. now is when its epoch begins.
func New(b Backend, now time.Time) *Server {
	var id [16]byte
	_, _ = rand.Read(id[:])
	uuid := fmt.Sprintf("uuid:%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	return &Server{back: b, start: now, uuid: uuid, description: describe(uuid), ports: map[key]*mapping{}}
}

// Stats returns the counters. s may be nil.
func (s *Server) Stats() (c Counters[uint64]) {
	if s != nil {
		s.mu.Lock()
		c = s.count
		s.mu.Unlock()
	}
	return c
}

// Handle answers the request msg of a program at from. It returns nil if there is no answer.
func (s *Server) Handle(msg []byte, from netip.AddrPort, now time.Time) (reply []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
	switch {
	case len(msg) < 2 || msg[1]&0x80 != 0: // not a request; answering could go on for ever
		s.count.Malformed++
		return nil
	case msg[0] == 0:
		return s.natpmp(msg, from.Addr(), now)
	}
	return s.pcp(msg, from.Addr(), now)
}

// epoch returns the seconds since the start.
func (s *Server) epoch(now time.Time) uint32 { return uint32(now.Sub(s.start) / time.Second) }

// expire ends the ports for which nobody has asked again.
func (s *Server) expire(now time.Time) {
	for k, m := range s.ports {
		if now.After(m.until) {
			s.drop(k)
		}
	}
}

// Expire is to be called from time to time when no request comes.
func (s *Server) Expire(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
}

// drop ends a port, unless it was also asked for by the other protocol (UPnP beside NAT-PMP and PCP). All clients share a TCP
// port, so that it also stays while another client has it.
func (s *Server) drop(k key) {
	delete(s.ports, k)
	for other := range s.ports {
		if other.proto == k.proto && other.port == k.port && (k.proto == TCP || other.client == k.client) {
			return
		}
	}
	s.back.Unmap(k.proto, k.app())
}

// lifetime returns for how many seconds a port is given.
func lifetime(asked uint32) uint32 { return min(asked, uint32(MaxLifetime/time.Second)) }

// request gets a port for k, and keeps it for that many seconds.
func (s *Server) request(k key, suggested uint16, keep uint32, now time.Time) (*mapping, State) {
	m := s.ports[k]
	if m == nil {
		of, clients := 0, map[netip.Addr]bool{k.client: true}
		for other := range s.ports {
			clients[other.client] = true
			if other.client == k.client {
				of++
			}
		}
		if of >= maxMappings && !s.makeRoom(k.client, now) || len(clients) > maxClients {
			return nil, Full
		}
	}
	outer, state := s.back.Map(k.want(suggested))
	if state != Works && state != Wait {
		if m != nil {
			delete(s.ports, k)
		}
		return nil, state
	}
	if m == nil {
		m = &mapping{}
		s.ports[k] = m
	}
	// A port that is not known yet is kept for as long as the program may go on asking.
	m.asked = now
	m.until = now.Add(time.Duration(max(keep, 10)) * time.Second)
	m.outer, m.filled = outer, state == Works
	return m, state
}

// makeRoom ends the port of a client that was asked for longest ago, if that is longer than the lifetime that programs are told:
// a program that ends leaves its ports behind. It returns false if there is no such port.
func (s *Server) makeRoom(client netip.Addr, now time.Time) bool {
	var oldest *key
	for k, m := range s.ports {
		if k.client == client && now.Sub(m.asked) > MaxLifetime && (oldest == nil || m.asked.Before(s.ports[*oldest].asked)) {
			oldest = &k
		}
	}
	if oldest == nil {
		return false
	}
	s.drop(*oldest)
	return true
}

// answered counts the result of a request for a port.
func (s *Server) answered(state State) {
	switch state {
	case Works:
		s.count.Mapped++
	case Wait:
		s.count.Waiting++
	default:
		s.count.Refused++
	}
}
