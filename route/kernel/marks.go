package kernel

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// markChains adds the chains that determine which flow a packet belongs to, and mark it.
func (c *Config) markChains(t *nfTable, st filterState) error {
	ours, err := c.ours()
	if err != nil {
		return err
	}
	c.ownChains(t, ours)
	c.incomingMarks(t, st)
	return c.outgoingMarks(t, st, ours)
}

// ownChains adds the chain that marks the flows of our own sockets. ours are the conditions that identify these.
func (c *Config) ownChains(t *nfTable, ours []term) {
	m := c.Marks
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
}

// incomingMarks adds the prerouting chain, which marks packets from devices, and the chains that it uses.
func (c *Config) incomingMarks(t *nfTable, st filterState) {
	m := c.Marks
	pre := t.chain(&nfChain{name: "prerouting", kind: "filter", hook: unix.NF_INET_PRE_ROUTING, prio: prioMangle})
	pre.add(metaMark(m, m.Bridged, true), setMetaMark(m, 0)) // of a bridge whose port leads back to this host
	pre.add(iif(c.TUN, true), ctNew(), setCtMark(m, m.Captured))
	if c.Strict { // distinguishes what is carried for others from a raw frame
		pre.add(iif(c.TUN, true), setMetaMark(m, m.Captured))
	}
	c.openedIn(t, pre)
	pre.add(iif(c.TUN, true), back())
	pre.add(iif("lo", true), back())
	for _, a := range c.TUNAddrs {
		pre.add(daddr(netip.PrefixFrom(a, a.BitLen())), count(countLAN), drop())
	}
	dhcpLearn(pre)
	if c.keepsInbound() {
		c.serverPorts(t, pre)
	}
	// What arrives on an excluded device for this host is a connection from outside. The chain forwarded handles the
	// rest.
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
}

// outgoingMarks adds the output chain, which marks packets of this host, and the chains that it uses.
func (c *Config) outgoingMarks(t *nfTable, st filterState, ours []term) error {
	m := c.Marks
	out := t.chain(&nfChain{name: "mark_output", kind: "route", hook: unix.NF_INET_LOCAL_OUT, prio: prioMangle})
	out.add(oif("lo", true), back())
	c.openedOut(out)
	c.dhcpReroute(t, out, st)
	out.add(metaMark(m, m.Own, true), ctMark(m, m.Own, false), jump("own"))
	out.add(metaMark(m, m.Own, true), back())
	// Re-evaluate every packet that has a socket: address, port, owner or the exclusions may have changed. The mark
	// of the flow is for packets without a socket, as in TIME_WAIT.
	if c.needDirect() {
		c.directChain(t, out, ours)
	}
	if !c.Include.empty() { // the same; an answer to what came out of the TUN stays what it is
		out.add(ctDirection(false), ctMark(m, m.Captured, true), anybody(), setCtMark(m, 0))
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
	c.excludeMarks(t, out, exclude)
	c.straightChain(t, st, out)
	if !c.Include.empty() {
		if err := c.includeChains(t, out); err != nil {
			return err
		}
	}
	// This includes our own mark: packets that the kernel sends for a closed socket have none.
	for _, v := range c.passing() {
		out.add(ctMark(m, v, true), setMetaMark(m, v))
	}
	out.add(notProto(unix.IPPROTO_TCP), oif(c.TUN, true), metaMark(m, 0, true), jump("speak"))
	return nil
}

// anybody matches packets that have a socket, of whatever user.
func anybody() term { return skuid(UIDRange{0, ^uint32(0)}, true) }

// directChain evaluates packets with the mark Direct again. The mark alone proves nothing: any program that may set marks
// can set it. Excluded traffic gets it later.
func (c *Config) directChain(t *nfTable, out *nfChain, ours []term) {
	m := c.Marks
	direct := t.chain(&nfChain{name: "direct"})
	if c.Direct {
		direct.add(append(slices.Clone(ours), setCtMark(m, m.Direct), back())...)
		direct.add(anybody(), setCtMark(m, 0), setMetaMark(m, 0), back())
		direct.add(ctMark(m, m.Direct, true), back())
	}
	direct.add(setCtMark(m, 0), setMetaMark(m, 0))
	out.add(metaMark(m, m.Direct, true), jump("direct"))
	out.add(metaMark(m, m.Direct, false), ctMark(m, m.Direct, true), anybody(), setCtMark(m, 0))
}

// includeChains adds the chains that let everything pass directly except what Include selects.
func (c *Config) includeChains(t *nfTable, out *nfChain) error {
	m := c.Marks
	include, err := c.terms(c.Include, true)
	if err != nil {
		return err
	}
	include = append(include, c.liveTerms(IncludeProgram)...)
	// This is for the time when the flow no longer has a socket.
	t.chain(&nfChain{name: "chosen"}).add(anybody(), setCtMark(m, m.Captured))
	ch := t.chain(&nfChain{name: "choose"})
	for _, x := range include {
		ch.add(x, goTo("chosen"))
	}
	ch.add(setCtMark(m, m.Direct))
	out.add(ctMark(m, 0, true), jump("choose"))
	// A packet that conntrack assigns to no flow has only its own mark.
	bad := t.chain(&nfChain{name: "choose_untracked"})
	for _, x := range include {
		bad.add(x, back())
	}
	bad.add(setMetaMark(m, m.Direct))
	out.add(ctNone(), jump("choose_untracked"))
	return nil
}

// ours returns the conditions that identify our sockets. It tests for ours and not for those of others, because the
// kernel gives no answer for a socket without a user, or for a group at a higher level, and then no expression
// matches.
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

// needDirect reports whether some traffic goes past the proxy by the mark Direct.
func (c *Config) needDirect() bool {
	return c.Direct || !c.Exclude.empty() || !c.Include.empty() || c.hasLive(ExcludeProgram) || len(c.Units) > 0
}

// keepsInbound reports whether answers to connections from outside go back the way they came: all of them or, with
// CarryInbound, those of connections that come in on an excluded device.
func (c *Config) keepsInbound() bool { return !c.CarryInbound || len(c.Exclude.Devices) > 0 }

// inboundBy returns alternative conditions for traffic that may be from outside: none is needed or, with
// CarryInbound, it must come in on an excluded device.
func (c *Config) inboundBy() (out [][]term) {
	if !c.CarryInbound {
		return [][]term{nil}
	}
	for _, d := range c.Exclude.Devices {
		out = append(out, []term{iif(d, true)})
	}
	return out
}

// passing returns the marks of traffic that goes past the TUN.
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

// forwardedChains adds the chains that select among forwarded traffic. Answers are not evaluated, nor is traffic to
// the host itself, because their destination is not that of the flow.
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
		if c.CarryInbound { // answers are evaluated like the rest
			pre.add(ctDirection(true), ctMark(m, 0, true), jump("choose_forward"))
		}
	}
	pre.add(ctDirection(false), jump("forwarded"))
}

// chosen returns the conditions that also work for forwarded packets.
func (c *Config) chosen(s Selection) (out []term) {
	for _, n := range s.Networks {
		out = append(out, daddr(n))
	}
	for _, r := range s.Ports {
		out = append(out, dport(unix.IPPROTO_TCP, r), dport(unix.IPPROTO_UDP, r))
	}
	return out
}

// terms returns the conditions of a selection. Cgroups are known only for local sockets, and not after routing.
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
