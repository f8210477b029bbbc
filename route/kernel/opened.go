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
// beyond a proxy (Config.Opens). Their answers must go back into the TUN, because an answer on another way would show the
// peer the host's address. This also holds if the peer's network or the program is excluded, and although the program's
// socket looks like that of a connection from outside.
//
// The answers get the mark Returned, which leads them into the TUN before any exclusion. The connections may outlive the
// daemon. They are therefore recorded in the sets opened4 and opened6, this host's end first, so that the next daemon does
// not take them for connections from outside (see Config.Kept).

const (
	// openedFor is how long a connection is remembered after the last segment from its peer.
	openedFor  = 5 * 24 * time.Hour
	openedSize = 1 << 16
)

// portMap is the UDP port of the gateway that programs ask to map a port. Requests must not reach the host's router, which
// would open a port of the host's own address.
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

// openedIn adds the rules that mark and record what comes out of the TUN for a listener of this host. The mark is for
// rp_filter, whose look-up of the way back uses it.
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

// openedOut adds the rule that leads the answers back into the TUN. It must come before every rule that leads anything past
// the TUN.
func (c *Config) openedOut(out *nfChain) {
	if c.Opens {
		out.add(isProto(unix.IPPROTO_TCP), ctDirection(true), ctMark(c.Marks, c.Marks.Captured, true),
			setMetaMark(c.Marks, c.Marks.Returned), back())
	}
}

// openedRule returns the ip rule for the answers: they go into the TUN, and are refused if it is gone.
func (c *Config) openedRule() rule {
	return rule{iif: "lo", mark: c.Marks.Returned, mask: c.Marks.Mask, jump: c.Priority + atAll}
}

// Inner returns this host's address for a connection out of the TUN that comes from peer. Answers of sockets that are bound
// to no address leave from it. It fails while the host is not steered, and for a peer with an address of this host. It may be
// called from any goroutine, and asks the kernel.
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
	if len(rs) == 0 || rs[0].Type != unix.RTN_UNICAST || rs[0].LinkIndex != tun.Attrs().Index { // such as an address of this host
		return fail(errors.New("its answers would not come back to the TUN device"))
	}
	a, ok := netip.AddrFromSlice(rs[0].Src)
	if a = a.Unmap(); !ok || a.Is4() != peer.Is4() {
		return fail(errors.New("the host has no address for it"))
	}
	return a, nil
}

// withoutOpened returns all without the connections that came out of the TUN. The caller holds h.mu.
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
