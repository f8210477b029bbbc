package kernel

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Straight is traffic of this host that a rule lets out past every proxy: the kernel takes it, so that it never reaches
// the TUN.
type Straight struct {
	Proto uint8        // IPPROTO_TCP, IPPROTO_UDP
	Net   netip.Prefix // by destination; not valid: any
	Ports PortRange    // by destination; 0-65535: any
}

// MaxStraight limits Config.Straight, because each entry is checked for each packet and route look-up.
const MaxStraight = 64

func (s Straight) anyPort() bool { return s.Ports.First == 0 && s.Ports.Last == 65535 }

// terms returns the conditions of a rule of nftables.
func (s Straight) terms() (out []term) {
	if s.Net.IsValid() {
		out = append(out, daddr(s.Net))
	}
	if s.anyPort() {
		return append(out, isProto(s.Proto))
	}
	return append(out, dport(s.Proto, s.Ports))
}

// rule returns the condition of an ip rule, for packets of this host. ok is false if no ip rule can match the port.
func (s Straight) rule() (r rule, ok bool) {
	r, ok = rule{iif: "lo", proto: int(s.Proto)}, true
	if s.Net.IsValid() {
		r.to = s.Net.Masked()
	}
	if !s.anyPort() {
		r.dport, ok = s.Ports.forRule()
	}
	return r, ok
}

// reserved returns the networks that lead into the TUN although a rule may let out their ports.
func (c *Config) reserved() (out []netip.Prefix) {
	if len(c.Straight) == 0 {
		return nil
	}
	for _, n := range c.Reserved {
		out = append(out, n.Masked())
	}
	return out
}

// straightRules returns the ip rules for Straight. end is the target for what is let out. They choose the source address
// of a connection; without them the kernel would look at the TUN's route for it.
func (c *Config) straightRules(family, end int) (out []rule) {
	if len(c.Straight) > 0 {
		out = append(out, rule{mark: c.Marks.Captured, mask: c.Marks.Mask, table: c.Table})
	}
	for _, s := range c.Straight {
		if !s.Net.IsValid() || familyOf(s.Net.Addr()) == family {
			if r, ok := s.rule(); ok {
				r.jump = end
				out = append(out, r)
			}
		}
	}
	return out
}

// straightChain adds the chain that marks what is let out. Names, multicast and private networks stay what they are:
// Reserved, port 53, and what the option LAN decides about.
func (c *Config) straightChain(t *nfTable, st filterState, out *nfChain) {
	if len(c.Straight) == 0 {
		return
	}
	m := c.Marks
	ch := t.chain(&nfChain{name: "straight"})
	for _, p := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		ch.add(dport(p, PortRange{53, 53}), back())
	}
	for _, n := range c.Reserved {
		ch.add(daddr(n), back())
	}
	for _, n := range st.lan {
		ch.add(daddr(n.prefix), back())
	}
	ch.add(daddrType("multicast", unix.RTN_MULTICAST), back())
	ch.add(daddrType("broadcast", unix.RTN_BROADCAST), back())
	for _, s := range c.Straight {
		ch.add(append(slices.Clone(s.terms()), setCtMark(m, m.Direct), setMetaMark(m, m.Direct), back())...)
	}
	// What belongs to a flow of the TUN stays there, although an ip rule may have led it past already.
	stay := t.chain(&nfChain{name: "stay"})
	stay.add(setMetaMark(m, m.Captured))
	stay.add(notProto(unix.IPPROTO_TCP), jump("speak"))
	out.add(ctMark(m, m.Captured, true), metaMark(m, 0, true), jump(stay.name))
	out.add(ctMark(m, 0, true), jump(ch.name))
	out.add(ctNone(), jump(ch.name))
}
