package kernel

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// markChains know which flow a packet belongs to.
func (c *Config) markChains(t *nfTable, st filterState) error {
	m := c.Marks
	ours, err := c.ours()
	if err != nil {
		return err
	}
	own := t.chain(&nfChain{name: "own"})
	if len(ours) > 0 {
		own.add(append(slices.Clone(ours), goTo("own_to"))...)
		own = t.chain(&nfChain{name: "own_to"})
	}
	for _, v6 := range []bool{false, true} {
		v := "4"
		if v6 {
			v = "6"
		}
		own.add(ownEndpoint("own"+v, v6), setCtMark(m, m.Own))
		own.add(ownHost("own"+v+"any", v6), setCtMark(m, m.Own))
	}

	pre := t.chain(&nfChain{name: "prerouting", kind: "filter", hook: unix.NF_INET_PRE_ROUTING, prio: prioMangle})
	pre.add(metaMark(m, m.Bridged, true), setMetaMark(m, 0)) // of a bridge whose port leads back to this host
	pre.add(iif(c.TUN, true), ctNew(), setCtMark(m, m.Captured))
	if c.Strict { // tells what is carried for others from a raw frame
		pre.add(iif(c.TUN, true), setMetaMark(m, m.Captured))
	}
	pre.add(iif(c.TUN, true), back())
	pre.add(iif("lo", true), back())
	for _, a := range c.TUNAddrs {
		pre.add(daddr(netip.PrefixFrom(a, a.BitLen())), count(countLAN), drop())
	}
	dhcpLearn(pre)
	if c.keepsInbound() {
		c.serverPorts(t, pre)
	}
	// What comes in by an excluded device for this host is a connection from outside; the chain forwarded takes the rest.
	for _, d := range c.Exclude.Devices {
		pre.add(iif(d, true), ctDirection(true), ctMark(m, 0, true), setCtMark(m, m.Direct))
	}
	if c.keepsInbound() {
		c.inboundChains(t)
		fromOutside := [][]term{
			{ctDirection(false), ctMark(m, 0, true), daddrType("local", unix.RTN_LOCAL), jump("inbound")},
			{ctDirection(false), ctMark(m, m.Declined, true), daddrType("local", unix.RTN_LOCAL), jump("inbound")},
		}
		for _, r := range fromOutside {
			for _, from := range c.inboundBy() {
				pre.add(append(slices.Clone(from), r...)...)
			}
		}
		c.noteCame(t, pre)
		c.forwardedAnswers(t, pre)
		c.heardChain(t, st)
	}
	c.speakChains(t)
	c.forwardedChains(t, pre)
	for _, v := range c.passing() {
		pre.add(ctMark(m, v, true), setMetaMark(m, v))
	}

	out := t.chain(&nfChain{name: "mark_output", kind: "route", hook: unix.NF_INET_LOCAL_OUT, prio: prioMangle})
	out.add(oif("lo", true), back())
	out.add(metaMark(m, m.Own, true), ctMark(m, m.Own, false), jump("own"))
	out.add(metaMark(m, m.Own, true), back())
	// Whoever has a socket is asked anew: addresses and ports, or what is excluded, may be another's by now. The mark of
	// the flow is for those that have none, as in TIME_WAIT.
	anybody := skuid(UIDRange{0, ^uint32(0)}, true)
	if c.needDirect() {
		// The mark alone is anybody's who may set one. What is excluded gets it below.
		direct := t.chain(&nfChain{name: "direct"})
		if c.Direct {
			direct.add(append(slices.Clone(ours), setCtMark(m, m.Direct), back())...)
			direct.add(anybody, setCtMark(m, 0), setMetaMark(m, 0), back())
			direct.add(ctMark(m, m.Direct, true), back())
		}
		direct.add(setCtMark(m, 0), setMetaMark(m, 0))
		out.add(metaMark(m, m.Direct, true), jump("direct"))
		out.add(metaMark(m, m.Direct, false), ctMark(m, m.Direct, true), anybody, setCtMark(m, 0))
	}
	if !c.Include.empty() { // the same; an answer to what came out of the TUN stays what it is
		out.add(ctDirection(false), ctMark(m, m.Captured, true), anybody, setCtMark(m, 0))
	}
	if c.keepsInbound() {
		out.add(keptTuple("kept4", false, false), setCtMark(m, m.Inbound))
		out.add(keptTuple("kept6", true, false), setCtMark(m, m.Inbound))
	}
	if !c.CarryInbound {
		out.add(ctDirection(true), ctMark(m, 0, true), jump("answer"))
	}
	if c.keepsInbound() {
		c.recallCame(t, out)
		c.answerRules(t, out)
	}
	exclude, err := c.terms(c.Exclude, true)
	if err != nil {
		return err
	}
	for _, x := range exclude {
		out.add(x, setCtMark(m, m.Direct), setMetaMark(m, m.Direct))
	}
	if !c.Include.empty() {
		include, err := c.terms(c.Include, true)
		if err != nil {
			return err
		}
		// For when the flow has no socket any more that would tell.
		t.chain(&nfChain{name: "chosen"}).add(anybody, setCtMark(m, m.Captured))
		ch := t.chain(&nfChain{name: "choose"})
		for _, x := range include {
			ch.add(x, goTo("chosen"))
		}
		ch.add(setCtMark(m, m.Direct))
		out.add(ctMark(m, 0, true), jump("choose"))
		// What conntrack does not take for a packet of a flow has no mark but its own.
		bad := t.chain(&nfChain{name: "choose_untracked"})
		for _, x := range include {
			bad.add(x, back())
		}
		bad.add(setMetaMark(m, m.Direct))
		out.add(ctNone(), jump("choose_untracked"))
	}
	// With the mark of our own too: what the kernel says for a socket that is closed has none.
	for _, v := range c.passing() {
		out.add(ctMark(m, v, true), setMetaMark(m, v))
	}
	out.add(notProto(unix.IPPROTO_TCP), oif(c.TUN, true), metaMark(m, 0, true), jump("speak"))
	return nil
}

// ours is whom a socket of ours belongs to. It asks for ours and not for others', since of a socket without a user, or
// of a group that lies higher, the kernel says nothing at all, and no expression matches.
func (c *Config) ours() (out []term, err error) {
	if c.OwnUID != nil {
		out = append(out, skuid(UIDRange{*c.OwnUID, *c.OwnUID}, true))
	}
	if c.OwnCgroup != "" {
		cg, err := c.cgroup(c.OwnCgroup)
		if err != nil {
			return nil, err
		}
		out = append(out, socketCgroup(cg, true))
	}
	return out, nil
}

// needDirect: something goes past the proxy by the mark Direct.
func (c *Config) needDirect() bool { return c.Direct || !c.Exclude.empty() || !c.Include.empty() }

// keepsInbound reports whether answers to connections from outside go back the way they came: of all of them, or with
// CarryInbound of those that come in by an excluded device.
func (c *Config) keepsInbound() bool { return !c.CarryInbound || len(c.Exclude.Devices) > 0 }

// inboundBy are the conditions, one of which holds for what may be from outside: none is needed, or with CarryInbound that
// it comes in by an excluded device.
func (c *Config) inboundBy() (out [][]term) {
	if !c.CarryInbound {
		return [][]term{nil}
	}
	for _, d := range c.Exclude.Devices {
		out = append(out, []term{iif(d, true)})
	}
	return out
}

// passing are the marks of what goes past the TUN.
func (c *Config) passing() []uint32 {
	out := []uint32{c.Marks.Own}
	if c.needDirect() {
		out = append(out, c.Marks.Direct)
	}
	if c.keepsInbound() {
		out = append(out, c.Marks.Inbound)
	}
	return out
}

// forwardedChains choose among what goes through this host. Answers are not asked, nor what is for the host itself: their
// destination is not the flow's.
func (c *Config) forwardedChains(t *nfTable, pre *nfChain) {
	m := c.Marks
	if c.Include.empty() && len(c.Exclude.Devices) == 0 {
		return
	}
	fwd := t.chain(&nfChain{name: "forwarded"})
	fwd.add(daddrType("local", unix.RTN_LOCAL), back())
	for _, d := range c.Exclude.Devices {
		fwd.add(iif(d, true), ctMark(m, 0, true), setCtMark(m, m.Direct))
	}
	if !c.Include.empty() {
		ch := t.chain(&nfChain{name: "choose_forward"})
		for _, x := range c.chosen(c.Include) {
			ch.add(x, back())
		}
		for _, d := range c.Include.Devices {
			ch.add(iif(d, true), back())
		}
		ch.add(setCtMark(m, m.Direct))
		fwd.add(ctMark(m, 0, true), jump("choose_forward"))
		if c.CarryInbound { // answers are asked as the rest
			pre.add(ctDirection(true), ctMark(m, 0, true), jump("choose_forward"))
		}
	}
	pre.add(ctDirection(false), jump("forwarded"))
}

// chosen are the conditions that hold for forwarded packets too.
func (c *Config) chosen(s Selection) (out []term) {
	for _, n := range s.Networks {
		out = append(out, daddr(n))
	}
	for _, r := range s.Ports {
		out = append(out, dport(unix.IPPROTO_TCP, r), dport(unix.IPPROTO_UDP, r))
	}
	return out
}

// terms are the conditions of a selection. Cgroups are known for local sockets only, and not behind routing.
func (c *Config) terms(s Selection, cgroups bool) (out []term, err error) {
	out = c.chosen(s)
	for _, u := range s.UIDs {
		out = append(out, skuid(u, true))
	}
	for _, d := range s.Devices {
		out = append(out, oif(d, true))
	}
	if cgroups {
		for _, path := range s.Cgroups {
			cg, err := c.cgroup(path)
			if err != nil {
				return nil, err
			}
			out = append(out, socketCgroup(cg, true))
		}
	}
	return out, nil
}
