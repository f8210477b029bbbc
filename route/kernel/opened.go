package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// This file is about connections that the data plane opens out of the TUN to programs of this host, on behalf of peers
// beyond a proxy (Config.Opens). Nothing may let their answers out past the TUN: no exclusion, no private network, and
// not that the program's socket looks as if it had been called from outside. The peer would learn the host's address.
//
// The answers get the mark Returned, which leads into the TUN before any other rule. The connections are also recorded
// in the sets opened4 and opened6, this host's end first, because they may outlive the daemon: the next one must not
// take them for connections from outside (see Config.Kept).

const (
	// openedFor is how long a silent connection is remembered. Each segment from the peer renews it.
	openedFor  = 5 * 24 * time.Hour
	openedSize = 1 << 16
)

// portMap is the port at which programs ask their gateway to map a port. The host's router must not be asked: it would
// open a port of the host's own address.
func (c *Config) portMap() PortRange { return PortRange{c.PortMap, c.PortMap} }

// openedSets returns the sets of connections that came out of the TUN.
func openedSets() (sets []*nfSet) {
	for _, v6 := range []bool{false, true} {
		k := tupleKeys[v6]
		sets = append(sets, &nfSet{name: openedSet(v6), keyText: k.text, keyType: k.keyType, keyLen: k.keyLn,
			dynamic: true, size: openedSize, keep: openedFor})
	}
	return sets
}

func openedSet(v6 bool) string {
	if v6 {
		return "opened6"
	}
	return "opened4"
}

// openedIn adds the rules that record what comes out of the TUN to a listener. The mark is for rp_filter, which looks up
// the way back with it.
func (c *Config) openedIn(t *nfTable, pre *nfChain) {
	if !c.Opens {
		return
	}
	in := t.chain(&nfChain{name: "opened_in"})
	in.add(setMetaMark(c.Marks, c.Marks.Returned))
	for _, v6 := range []bool{false, true} {
		in.add(changeTuple(openedSet(v6), v6, true, unix.NFT_DYNSET_OP_UPDATE))
	}
	pre.add(iif(c.TUN, true), isProto(unix.IPPROTO_TCP), ctDirection(false), daddrType("local", unix.RTN_LOCAL),
		jump(in.name))
}

// openedOut adds the rule that leads the answers back. It must come before every rule that lets something out.
func (c *Config) openedOut(out *nfChain) {
	if c.Opens {
		out.add(isProto(unix.IPPROTO_TCP), ctDirection(true), ctMark(c.Marks, c.Marks.Captured, true),
			setMetaMark(c.Marks, c.Marks.Returned), back())
	}
}

// openedRule returns the rule for them: into the TUN, or refused if there is none.
func (c *Config) openedRule() rule {
	return rule{iif: "lo", mark: c.Marks.Returned, mask: c.Marks.Mask, jump: c.Priority + atAll}
}

// Inner returns this host's address for a connection out of the TUN that comes from peer: the one from which answers to
// wildcard sockets leave. It may be called from any goroutine.
func (h *Host) Inner(peer netip.Addr) (netip.Addr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fail := func(err error) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("cannot open a connection from %v to this host: %w", peer, err)
	}
	if h.closed || !h.steered {
		return fail(errors.New("the host is not steered"))
	}
	tun, err := h.nl.LinkByName(h.c.TUN)
	if err != nil {
		return fail(err)
	}
	rs, err := h.nl.RouteGetWithOptions(peer.AsSlice(), &netlink.RouteGetOptions{Mark: h.c.Marks.Returned})
	if err != nil {
		return fail(err)
	}
	if len(rs) == 0 || rs[0].Type != unix.RTN_UNICAST || rs[0].LinkIndex != tun.Attrs().Index { // the host's own address
		return fail(errors.New("its answers would not come back to the TUN device"))
	}
	a, ok := netip.AddrFromSlice(rs[0].Src)
	if a = a.Unmap(); !ok || a.Is4() != peer.Is4() {
		return fail(errors.New("the host has no address for it"))
	}
	return a, nil
}

// withoutOpened removes from connections those that came out of the TUN. The caller holds h.mu.
func (h *Host) withoutOpened(all []Tuple) ([]Tuple, error) {
	old, err := h.ourTables()
	if err != nil {
		return nil, err
	}
	memory, opened := h.remember(old), map[string]bool{}
	for _, v6 := range []bool{false, true} {
		for _, e := range memory[openedSet(v6)] {
			opened[string(e.key)] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(t Tuple) bool {
		set4, set6 := tupleSets([]Tuple{t}, t.Out)
		return slices.ContainsFunc(append(set4, set6...), func(e nfElem) bool { return opened[string(e.key)] })
	}), nil
}
