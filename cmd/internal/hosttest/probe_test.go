package hosttest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// shot sends what a probe sends; b has the canary. It does not block.
type shot func(g *gun, p *probe, b []byte) error

// class says what of a probe may leave the host.
type class uint8

const (
	never   class = iota // nothing, ever
	strict               // nothing with --strict; by design open without
	private              // unicast to the connected private network: open unless --lan refuse
	carried              // a connection of the time of viasocks: nothing even after the stop
)

// probe is one way to send something.
type probe struct {
	id     int
	name   string // the row; both families have the same
	v6     bool
	ns     string
	to     netip.AddrPort
	proto  uint8 // for the recorder, where there is no canary; 0: any
	class  class
	fire   shot
	old    bool // by something established before
	single bool // one frame for each shot, with a canary
}

func (p *probe) String() string {
	if p.v6 {
		return p.name + " (IPv6)"
	}
	return p.name + " (IPv4)"
}

// The mark of somebody else's chain, and the ports that it marks.
const (
	foreignMark = 0x51
	remarkPort  = 4051
)

// foreignRules re-route what is sent to remarkPort: as a VPN or a load balancer does, by a mark and an ip rule.
const foreignRules = `
table inet foreign {
	chain remark {
		type route hook output priority mangle; policy accept;
		meta l4proto { tcp, udp } th dport 4051 meta mark set 0x51
	}
}
`

var foreignIPRules = []string{"rule add fwmark 0x51 lookup main pref 4000", "-6 rule add fwmark 0x51 lookup main pref 4000"}

// ourMark is the default of --mark.
const ourMark = 0x76000000

// allProbes is the list; est are the endpoints of what was established before.
func allProbes(est *established) []*probe {
	l := probeList{est: est, next: 10}
	for _, add := range []func(){l.plain, l.services, l.many, l.raw, l.bound, l.others, l.container, l.allowed} {
		add()
	}
	return l.ps
}

type probeList struct {
	ps   []*probe
	est  *established
	next int // the last byte of the next probe's address in the world
}

// own gives each probe an address of its own in the world.
func (l *probeList) own(v6 bool, port uint16) netip.AddrPort {
	a := addr("203.0.113.0").As4()
	a[3] = byte(l.next)
	if v6 {
		b := addr("2001:db8:f::").As16()
		b[15] = byte(l.next)
		return netip.AddrPortFrom(netip.AddrFrom16(b), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(a), port)
}

func (l *probeList) add(p probe) {
	p.id = len(l.ps)
	if strings.Contains(p.name, "tcp") { // no canary in a SYN
		p.proto = unix.IPPROTO_TCP
	}
	if p.ns == "" {
		p.ns = "host"
	}
	l.ps = append(l.ps, &p)
}

// both adds a probe in both families, to a port of their own addresses.
func (l *probeList) both(name, ns string, port uint16, single bool, s shot) {
	for _, v6 := range []bool{false, true} {
		l.add(probe{name: name, ns: ns, v6: v6, to: l.own(v6, port), fire: s, single: single})
	}
	l.next++
}

// groupIn adds one to fixed destinations; an empty one is left out.
func (l *probeList) groupIn(ns, name string, c class, v4, v6 string, s shot) {
	for _, to := range []string{v4, v6} {
		if to != "" {
			ap := netip.MustParseAddrPort(to)
			l.add(probe{name: name, ns: ns, v6: ap.Addr().Is6(), to: ap, class: c, fire: s})
		}
	}
}

func (l *probeList) group(name string, c class, v4, v6 string, s shot) {
	l.groupIn("", name, c, v4, v6, s)
}

// icmpEcho is a ping by a socket of a type.
func icmpEcho(typ int, opts ...option) shot {
	s4 := rawType(typ, unix.IPPROTO_ICMP, []byte{8, 0, 0, 0, 0, 1, 0, 1}, opts...)
	s6 := rawType(typ, unix.IPPROTO_ICMPV6, []byte{128, 0, 0, 0, 0, 1, 0, 1}, opts...)
	return func(g *gun, p *probe, b []byte) error {
		if p.v6 {
			return s6(g, p, b)
		}
		return s4(g, p, b)
	}
}

// plain adds probes that speak to the world in the usual ways.
func (l *probeList) plain() {
	l.both("tcp", "", 80, false, tcp())
	l.both("udp", "", 4000, true, udp())
	l.both("udp, always one flow", "", 4000, true, udp(fromPort(5001)))
	l.both("udp, connected", "", 4000, true, udpConnected(nil))
	l.add(probe{name: "tcp, established before", to: l.est.tcp4, old: true, fire: l.est.write(l.est.conns4)})
	l.add(probe{name: "tcp, established before", v6: true, to: l.est.tcp6, old: true, fire: l.est.write(l.est.conns6)})
	l.add(probe{name: "udp, connected before", to: l.est.udp4, old: true, fire: l.est.write(l.est.socks4)})
	l.add(probe{name: "udp, connected before", v6: true, to: l.est.udp6, old: true, fire: l.est.write(l.est.socks6)})
}

// services adds probes that ask for names and the time.
func (l *probeList) services() {
	l.both("dns, off-link", "", 53, true, udp())
	l.both("dns by tcp, off-link", "", 53, false, tcp())
	l.group("dns, on-link", never, lanRouter4+":53", "["+lanRouter6+"]:53", udp())
	l.group("dns by tcp, on-link", never, lanRouter4+":53", "["+lanRouter6+"]:53", tcp())
	l.group("dns, public on-link", never, router4+":53", "["+router6+"]:53", udp())
	l.group("dns, link-local", never, "", "["+routerLL+"]:53", udp())
	l.both("dns, as resolved does", "", 53, true, udpConnected(noDevice, toDevice("eth0")))
	l.both("dns over tls", "", 853, false, tcp())
	l.both("ntp", "", 123, true, udp(fromPort(123)))
}

// many adds probes that speak to more than one.
func (l *probeList) many() {
	l.group("mdns", never, "224.0.0.251:5353", "[ff02::fb]:5353", udp(multicastBy, hops(255)))
	l.group("llmnr", never, "224.0.0.252:5355", "[ff02::1:3]:5355", udp(multicastBy))
	l.group("ssdp", never, "239.255.255.250:1900", "[ff02::c]:1900", udp(multicastBy))
	l.group("lpd", never, "239.192.152.143:6771", "[ff15::efc0:988f]:6771", udp(multicastBy))
	l.group("lpd, device unnamed", never, "239.192.152.143:6771", "[ff15::efc0:988f]:6771", udp())
	l.add(probe{name: "igmp report", to: netip.MustParseAddrPort("224.0.0.22:0"), proto: unix.IPPROTO_IGMP, fire: join})
	l.group("broadcast", never, "255.255.255.255:4000", "", udp(broadcast))
	l.group("broadcast, bound to device", never, "255.255.255.255:4000", "", udp(broadcast, toDevice("eth0")))
	l.group("broadcast, directed", never, "198.51.100.255:4000", "", udp(broadcast))
	l.group("broadcast, directed, private", never, "10.77.0.255:4000", "", udp(broadcast))
}

// raw adds probes that use other protocols than TCP and UDP, and fragments.
func (l *probeList) raw() {
	l.both("echo", "", 0, true, icmpEcho(unix.SOCK_DGRAM))
	l.both("echo, raw socket", "", 0, true, icmpEcho(unix.SOCK_RAW))
	l.both("echo, bound to device", "", 0, true, icmpEcho(unix.SOCK_RAW, toDevice("eth0")))
	l.both("raw, protocol 253", "", 0, true, raw(253, nil))
	l.both("raw, GRE", "", 0, true, raw(unix.IPPROTO_GRE, []byte{0, 0, 8, 0}))
	l.both("raw, SCTP", "", 0, true, raw(unix.IPPROTO_SCTP, []byte{0, 9, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0}))
	l.both("raw, ESP, bound to device", "", 0, true, raw(unix.IPPROTO_ESP, []byte{0, 0, 1, 1, 0, 0, 0, 1}, toDevice("eth0")))
	l.both("raw, own header", "", 4000, true, headerIncluded)
	l.both("fragments", "", 4000, false, udpSize(4000, mayFragment))
	l.both("fragments, bound to device", "", 4000, false, udpSize(4000, mayFragment, toDevice("eth0")))
}

// bound adds probes that name a device, an address or a neighbour.
func (l *probeList) bound() {
	l.both("tcp, bound to device", "", 80, false, tcp(toDevice("eth0")))
	l.both("udp, bound to device", "", 4000, true, udp(toDevice("eth0")))
	l.both("dns, bound to device", "", 53, true, udp(toDevice("eth0")))
	l.both("tcp, bound to address", "", 80, false, tcp(fromAddr(host4, host6, 0)))
	l.both("udp, bound to address", "", 4000, true, udp(fromAddr(host4, host6, 0)))
	l.both("udp, bound to private address", "", 4000, true, udp(fromAddr(hostLAN4, hostLAN6, 0)))
	l.both("tcp, IP_UNICAST_IF", "", 80, false, tcp(byIndex))
	l.both("udp, IP_UNICAST_IF", "", 4000, true, udp(byIndex))
	l.both("udp, IP_PKTINFO by device", "", 4000, true, udpByPacket)
	l.group("tcp, public on-link", never, router4+":4001", "["+router6+"]:4001", tcp())
	l.group("udp, public on-link", never, router4+":4000", "["+router6+"]:4000", udp())
	l.group("udp, MSG_DONTROUTE", never, router4+":4002", "["+router6+"]:4002", udpFlags(unix.MSG_DONTROUTE))
	l.add(probe{name: "udp, IPv4-mapped", to: l.own(false, 4000), fire: udpMapped, single: true})
	l.next++
}

// others adds probes that are of other users and control groups, or have marks.
func (l *probeList) others() {
	l.both("tcp, re-marked by others", "", remarkPort, false, tcp())
	l.both("udp, re-marked by others", "", remarkPort, true, udp())
	l.both("tcp, with our mark", "", 80, false, tcp(marked(ourMark)))
	l.both("udp, with our mark", "", 4000, true, udp(marked(ourMark)))
	l.both("tcp, another uid", "", 80, false, as(65534, tcp()))
	l.both("udp, another uid", "", 4000, true, as(65534, udp()))
	l.both("dns, another uid", "", 53, true, as(65534, udp()))
	// Who has the ports first may be somebody else than who has them next.
	l.group("udp, a flow of two users", never, "203.0.113.150:4000", "[2001:db8:f::96]:4000", udp(fromPort(5002)))
	l.group(
		"udp, another uid in a flow of two",
		never,
		"203.0.113.150:4000",
		"[2001:db8:f::96]:4000",
		as(65534, udp(fromPort(5002))),
	)
	l.both("tcp, another cgroup", "", 80, false, inCgroup(l.est.agent, unix.SOCK_STREAM))
	l.both("udp, another cgroup", "", 4000, true, inCgroup(l.est.agent, unix.SOCK_DGRAM))

	l.both("dns, another cgroup", "", 53, true, inCgroup(l.est.agent, unix.SOCK_DGRAM))
}

// container adds probes that come from a container.
func (l *probeList) container() {
	l.both("container: tcp", "ctr", 80, false, tcp())
	l.both("container: udp", "ctr", 4000, true, udp())
	l.both("container: udp, always one flow", "ctr", 4000, true, udp(fromPort(5001)))
	l.both("container: dns", "ctr", 53, true, udp())
	l.groupIn("ctr", "container: dns, on-link", never, lanRouter4+":53", "["+lanRouter6+"]:53", udp())
	l.add(probe{name: "container: tcp, established before", ns: "ctr", to: l.est.ctr4, old: true, fire: l.est.write(l.est.ctrs4)})
	l.add(probe{name: "container: tcp, established before", ns: "ctr", v6: true, to: l.est.ctr6, old: true,
		fire: l.est.write(l.est.ctrs6)})
	l.both("container: echo", "ctr", 0, true, icmpEcho(unix.SOCK_RAW))
	l.both("container: raw, protocol 253", "ctr", 0, true, raw(253, nil))
	l.both("container: fragments", "ctr", 4000, false, udpSize(4000, mayFragment))
}

// allowed adds probes that may leave the host, or are carried.
func (l *probeList) allowed() {
	l.group("private network, link-local", private, "", "["+routerLL+"]:4000", udp())
	l.group("private network", private, lanRouter4+":4000", "["+lanRouter6+"]:4000", udp())
	for _, v6 := range []bool{false, true} {
		l.add(probe{name: "AF_PACKET", v6: v6, to: l.own(v6, 4000), class: strict, fire: packetSocket, single: true})
	}
	l.add(probe{name: "tcp, carried", to: l.est.carried4, class: carried, fire: l.est.writeCarried})
	l.add(probe{name: "tcp, carried", v6: true, to: l.est.carried6, class: carried, fire: l.est.writeCarried})
}

// register tells the recorder whose frames are whose.
func (r *recorder) register(ps []*probe) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range ps {
		r.owners[endpoint{p.proto, p.to.Addr(), p.to.Port()}] = p.id
		if a := p.to.Addr(); netip.MustParsePrefix("203.0.113.0/24").Contains(a) ||
			netip.MustParsePrefix("2001:db8:f::/64").Contains(a) {
			r.owners[endpoint{addr: a}] = p.id
		}
	}
}

// established are connections and connected sockets that are older than viasocks: one of each kind for each phase.
type established struct {
	tcp4, tcp6, udp4, udp6         netip.AddrPort
	conns4, conns6, socks4, socks6 []net.Conn
	ctr4, ctr6                     netip.AddrPort // from the container
	ctrs4, ctrs6                   []net.Conn
	agent                          *agent

	carried4, carried6 netip.AddrPort
	mu                 sync.Mutex
	carried            [2]net.Conn // made while viasocks was up
}

// generations is how many phases there may be with something established before.
const generations = 48

func newEstablished(w *world) *established {
	w.t.Helper()
	e := &established{
		tcp4: netip.MustParseAddrPort("203.0.113.8:7"), tcp6: netip.MustParseAddrPort("[2001:db8:f::8]:7"),
		carried4: netip.MustParseAddrPort("203.0.113.7:77"), carried6: netip.MustParseAddrPort("[2001:db8:f::7]:77"),
		ctr4: netip.MustParseAddrPort("203.0.113.6:7"), ctr6: netip.MustParseAddrPort("[2001:db8:f::6]:7"),
		udp4: netip.MustParseAddrPort("203.0.113.9:7"), udp6: netip.MustParseAddrPort("[2001:db8:f::9]:7"),
	}
	serve(w.listen("world", ":7"), drain)
	serve(w.listen("world", ":77"), echo)
	for range generations {
		for _, d := range []struct {
			ns, network string
			to          netip.AddrPort
			into        *[]net.Conn
		}{
			{"host", "tcp", e.tcp4, &e.conns4}, {"host", "tcp", e.tcp6, &e.conns6},
			{"host", "udp", e.udp4, &e.socks4}, {"host", "udp", e.udp6, &e.socks6},
			{"ctr", "tcp", e.ctr4, &e.ctrs4}, {"ctr", "tcp", e.ctr6, &e.ctrs6},
		} {
			w.in(d.ns, func() error {
				c, err := (&net.Dialer{KeepAlive: -1}).Dial(d.network, d.to.String())
				if err != nil {
					return err
				}
				w.t.Cleanup(func() { c.Close() })
				*d.into = append(*d.into, c)
				return nil
			})
		}
	}
	e.agent = startAgent(w)
	return e
}

func echo(c net.Conn) { _, _ = io.Copy(c, c) }

// ping sends some bytes and waits for their echo.
func ping(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	defer c.SetDeadline(time.Time{})
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != "ping" {
		return fmt.Errorf("the echo is %q", b)
	}
	return nil
}

func drain(c net.Conn) {
	b := make([]byte, 4096)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

func (e *established) write(conns []net.Conn) shot {
	return func(g *gun, _ *probe, b []byte) error {
		return writeNow(conns[int(g.phase.Load())%len(conns)], b)
	}
}

// writeNow is not Write, which would wait for room when nothing is acknowledged.
func writeNow(c net.Conn, b []byte) error {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var werr error
	if err := raw.Control(func(fd uintptr) { _, werr = unix.Write(int(fd), b) }); err != nil {
		return err
	}
	return werr
}

// carry makes the connections of the class carried anew, and says whether they get their echo.
func (e *established) carry(w *world) {
	w.t.Helper()
	for i, to := range []netip.AddrPort{e.carried4, e.carried6} {
		c, err := w.dial("host", to)
		if err != nil {
			w.t.Errorf("viasocks does not carry: %v", err)
			continue
		}
		if err := ping(c); err != nil {
			w.t.Errorf("viasocks does not carry to %v: %v", to, err)
		}
		e.mu.Lock()
		old := e.carried[i]
		e.carried[i] = c
		e.mu.Unlock()
		if old != nil { // one of a killed viasocks would be idle, and its keepalive would come to the world after the stop
			old.Close()
		}
	}
}

func (e *established) writeCarried(_ *gun, p *probe, b []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.carried[0]
	if p.v6 {
		c = e.carried[1]
	}
	if c == nil {
		return errors.New("none yet")
	}
	return writeNow(c, b)
}
