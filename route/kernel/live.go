package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// typeCgroup is the type number of nft(8) for control groups.
const typeCgroup = 46

// liveGroup is a control group that joins the filter and leaves it while the host is steered. Each depth has a set,
// because the expression that loads a packet's group needs the depth. Changing a set's elements is all that is needed
// when a group comes or goes, except for the first one of a depth.
type liveGroup struct {
	cgroup
	choice Choice
	unit   string // the unit of systemd to which it belongs; "": it was made for a program
}

func liveSetName(c Choice, level uint32) string { return fmt.Sprintf("%sd%d", c, level) }

// liveSets returns a set for each choice and depth that occurs.
func (c *Config) liveSets() (out []*nfSet) {
	for _, l := range c.live {
		name := liveSetName(l.choice, l.level)
		at := slices.IndexFunc(out, func(s *nfSet) bool { return s.name == name })
		if at < 0 {
			at = len(out)
			out = append(out, &nfSet{name: name, keyText: "cgroupsv2", keyType: typeCgroup, keyLen: 8})
		}
		key := binary.NativeEndian.AppendUint64(nil, l.id)
		out[at].elems = append(out[at].elems, nfElem{key: key, text: fmt.Sprintf("%q", l.path)})
	}
	return out
}

// liveTerms returns the conditions for the groups of a choice.
func (c *Config) liveTerms(choice Choice) (out []term) {
	var levels []uint32
	for _, l := range c.live {
		if l.choice == choice && !slices.Contains(levels, l.level) {
			levels = append(levels, l.level)
		}
	}
	for _, level := range levels {
		out = append(out, lookup(liveSetName(choice, level), fmt.Sprintf("socket cgroupv2 level %d", level), nil,
			&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: level, Register: 8}))
	}
	return out
}

func (c *Config) hasLive(choice Choice) bool {
	return slices.ContainsFunc(c.live, func(l liveGroup) bool { return l.choice == choice })
}

// outranks reports whether a program is included that an ip rule or the chain pass may take for excluded.
func (c *Config) outranks() bool { return c.hasLive(IncludeProgram) && !c.Exclude.empty() }

// excludeMarks adds the rules for excluded traffic to out. A program that is included meets none of them: its packets
// have the mark Captured, which leads them past the ip rules and the part of the chain pass that let excluded traffic
// out. They may have been routed past the TUN before, so the chain speak is told of them here.
func (c *Config) excludeMarks(t *nfTable, out *nfChain, exclude []term) {
	m := c.Marks
	ch := out
	if included := c.liveTerms(IncludeProgram); len(included) > 0 {
		ch = t.chain(&nfChain{name: "excluded"})
		in := t.chain(&nfChain{name: "included"})
		for _, x := range included {
			ch.add(x, goTo(in.name))
		}
		if c.outranks() {
			in.add(ctMark(m, m.Inbound, true), back())
			in.add(setMetaMark(m, m.Captured))
			in.add(notProto(unix.IPPROTO_TCP), jump("speak"))
		}
		out.add(jump(ch.name))
	}
	for _, x := range append(exclude, c.liveTerms(ExcludeProgram)...) {
		ch.add(x, setCtMark(m, m.Direct), setMetaMark(m, m.Direct))
	}
}

// passExcluded adds to the chain pass what is excluded.
func (c *Config) passExcluded(t *nfTable, pass *nfChain) {
	exclude, _ := c.terms(c.Exclude, false)
	if c.outranks() {
		ch := t.chain(&nfChain{name: "pass_excluded"})
		ch.add(metaMark(c.Marks, c.Marks.Captured, true), back())
		pass.add(jump(ch.name))
		pass = ch
	}
	for _, x := range exclude {
		pass.add(x, accept())
	}
}

// syncLive brings the filter and the ip rules up to date with h.c.live. The caller holds h.mu.
func (h *Host) syncLive() error {
	if !h.shut || h.closed {
		return nil
	}
	was := Config{live: h.applied}
	before, now := was.liveSets(), h.c.liveSets()
	same := func(a, b *nfSet) bool { return a.name == b.name }
	if !slices.EqualFunc(sorted(before), sorted(now), same) {
		if err := h.applyFilter(); err != nil {
			return err
		}
		_, err := h.reconcile()
		return err
	}
	t := &nfTable{fam: unix.NFPROTO_INET, name: h.c.NFTable}
	var msgs []nfMsg
	for i, s := range before {
		msgs = append(msgs, elements(t, s, unix.NFT_MSG_DELSETELEM, minus(s.elems, now[i].elems))...)
		msgs = append(msgs, elements(t, s, unix.NFT_MSG_NEWSETELEM, minus(now[i].elems, s.elems))...)
	}
	if len(msgs) == 0 {
		return nil
	}
	if err := h.nf.batch(msgs); err != nil {
		return h.applyFilter() // another program changed it; the watch would do the same
	}
	h.applied = slices.Clone(h.c.live)
	return nil
}

func sorted(sets []*nfSet) []*nfSet {
	slices.SortFunc(sets, func(a, b *nfSet) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return sets
}
