package route

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// dnsQuestion asks for the address of example.com.
const dnsQuestion = "\x00\x4d\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01"

// nameServers listen at one port for UDP and TCP. The answer is the question with QR and, if it came by TCP, RA set.
type nameServers struct {
	udp, tcp       netip.AddrPort
	byUDP, byTCP   atomic.Int32
	viaUDP, viaTCP string // the answers to dnsQuestion
}

func newNameServers(t *testing.T) *nameServers {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); u.Close() })
	s := &nameServers{udp: u.LocalAddr().(*net.UDPAddr).AddrPort(), tcp: l.Addr().(*net.TCPAddr).AddrPort(),
		viaUDP: dnsQuestion[:2] + "\x81" + dnsQuestion[3:], viaTCP: dnsQuestion[:2] + "\x81\x80" + dnsQuestion[4:]}
	go func() {
		b := make([]byte, 1024)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			s.byUDP.Add(1)
			b[2] |= 0x80
			_, _ = u.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var length uint16
				for binary.Read(c, binary.BigEndian, &length) == nil {
					b := make([]byte, length)
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					s.byTCP.Add(1)
					b[2], b[3] = b[2]|0x80, b[3]|0x80
					_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, length), b...))
				}
			}()
		}
	}()
	return s
}

// relayedQuestion is a case of TestRelayedQuestions.
type relayedQuestion struct {
	udp   bool
	rules []string
	byUDP bool
}

// TestRelayedQuestions: with RelayDNS a question goes to the very server that the program asked, by UDP where the upstream has it
// and by TCP where not, and to the resolver where nobody can have the address.
func TestRelayedQuestions(t *testing.T) {
	for name, tt := range map[string]relayedQuestion{
		"UDP":         {udp: true, byUDP: true},
		"no UDP":      {},
		"names":       {udp: true, rules: []string{"name example.org reject"}},
		"a rule":      {udp: true, rules: []string{"proto udp reject"}}, // which leaves TCP
		"a rule, via": {udp: true, rules: []string{"proto udp via p", "reject"}, byUDP: true},
	} {
		t.Run(name, tt.check)
	}
}

func (tt relayedQuestion) check(t *testing.T) {
	asked, res := netip.MustParseAddrPort("192.0.2.7:53"), netip.MustParseAddrPort("192.0.2.53:53")
	nobody := netip.AddrPortFrom(flow.Gateway4, 53)
	testkit.CheckLeaks(t)
	s, far := newNameServers(t), newNameServers(t)
	srv, _, client := newProxy(t, socks.Options{})
	srv.Redirect(asked, s.udp)
	if !tt.udp {
		srv.SetFault(func(q sockstest.Request) sockstest.Fault {
			if q.Cmd == sockstest.CmdAssociate {
				return sockstest.Fault{Reply: byte(socks.ReplyCommandNotSupported)}
			}
			return sockstest.Fault{}
		})
	}
	if !tt.byUDP {
		srv.Redirect(asked, s.tcp)
	}
	srv.Redirect(res, far.tcp)
	g := newRig(t, Config{
		Upstreams: []Upstream{NewSOCKS("p", client)},
		Default:   "p",
		Resolvers: []dns.Resolver{dns.OverTCP(res)},
		RelayDNS:  true,
		Rules:     parseRules(t, tt.rules...),
	}, nil)
	want, relayed := s.viaTCP, uint64(0)
	if tt.byUDP {
		want, relayed = s.viaUDP, 2
	} else if !tt.udp {
		relayed = 1 // the first one finds out
	}
	for id, src := range []string{"10.0.0.1:5000", "10.0.0.1:5001"} {
		id := "\x00" + string(rune(id))
		g.send(src, asked.String(), id+dnsQuestion[2:])
		g.wantPacket(t, asked.String(), src, id+want[2:])
	}
	if got := g.Stats().DNS.Relayed; got != relayed || (s.byUDP.Load() > 0) != tt.byUDP ||
		far.byTCP.Load()+far.byUDP.Load() > 0 {
		t.Errorf(
			"%d were relayed; %d by UDP, %d by TCP, %d to the resolver",
			got,
			s.byUDP.Load(),
			s.byTCP.Load(),
			far.byTCP.Load(),
		)
	}
	if len(tt.rules) > 1 { // which also keeps TCP from the resolver
		return
	}
	g.send("10.0.0.1:5002", nobody.String(), strings.Replace(dnsQuestion, "example", "exampl2", 1))
	g.wantPacket(t, nobody.String(), "10.0.0.1:5002", strings.Replace(s.viaTCP, "example", "exampl2", 1))
	if far.byTCP.Load() != 1 {
		t.Errorf("the resolver was asked %d times", far.byTCP.Load())
	}
}

// TestRelayedStreams: TCP to port 53 goes to the server that was asked, by the rules, and to the resolver if that is nobody.
func TestRelayedStreams(t *testing.T) {
	testkit.CheckLeaks(t)
	srv, _, client := newProxy(t, socks.Options{})
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", client)}, Default: "p", RelayDNS: true,
		Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))}}, nil)
	for _, dst := range []string{"192.0.2.7:53", netip.AddrPortFrom(flow.Gateway4, 53).String()} {
		g.HandleStream(newRequest(appEnd, dst))
	}
	testkit.Eventually(t, "two requests", func() bool { return srv.Stats().Requests == 2 })
	got := map[string]bool{}
	for _, r := range srv.Requests() {
		got[netip.AddrPortFrom(r.Dst.IP, r.Dst.Port).String()] = true
	}
	if !got["192.0.2.7:53"] || !got["192.0.2.53:53"] {
		t.Errorf("asked for %v", got)
	}
}
