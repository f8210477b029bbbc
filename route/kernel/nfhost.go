package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

type tableID struct {
	fam  uint8
	name string
}

// errNoTables means that the kernel has no nf_tables, so there are no tables either.
var errNoTables = lackError(needTables)

func (h *Host) listTables() (out []tableID, err error) {
	if h.nf == nil {
		return nil, errNoTables
	}
	err = h.nf.dump(unix.NFT_MSG_GETTABLE, unix.NFPROTO_UNSPEC, nil, func(fam uint8, b []byte) {
		out = append(out, tableID{fam, cstring(attrs(b)[unix.NFTA_TABLE_NAME])})
	})
	if noTables(err) {
		return nil, errNoTables
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list nftables: %w", err)
	}
	return out, nil
}

// counter is a counter of a table.
type counter struct {
	table tableID
	Counter
}

func (h *Host) listCounters() (out []counter, err error) {
	if h.nf == nil {
		return nil, nil
	}
	err = h.nf.dump(unix.NFT_MSG_GETOBJ, unix.NFPROTO_UNSPEC, nil, func(fam uint8, b []byte) {
		a := attrs(b)
		d := attrs(a[unix.NFTA_OBJ_DATA])
		out = append(out, counter{tableID{fam, cstring(a[unix.NFTA_OBJ_TABLE])}, Counter{
			Reason: cstring(
				a[unix.NFTA_OBJ_NAME],
			), Packets: beU64(d[unix.NFTA_COUNTER_PACKETS]), Bytes: beU64(d[unix.NFTA_COUNTER_BYTES])}})
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list nftables counters: %w", err)
	}
	return out, nil
}

// isOurs recognizes a table by its counters.
func (h *Host) isOurs(t tableID) (bool, error) {
	cs, err := h.listCounters()
	return slices.ContainsFunc(cs, func(c counter) bool {
		return c.table == t && slices.Contains([]string{countBound, countARP, countFrame, signBridge}, c.Reason)
	}), err
}

// ourFamilies are the families that our tables may have.
var ourFamilies = []uint8{unix.NFPROTO_INET, unix.NFPROTO_ARP, unix.NFPROTO_BRIDGE, unix.NFPROTO_NETDEV}

// isSign reports whether a counter of ours is a sign instead of a count of refused packets.
func isSign(name string) bool { return name == wasZero || name == signBridge }

// ourTables returns those of our tables that exist.
func (h *Host) ourTables() (out []tableID, err error) {
	all, err := h.listTables()
	if errors.Is(err, errNoTables) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		if t.name != h.c.NFTable || !slices.Contains(ourFamilies, t.fam) {
			continue
		}
		ours, err := h.isOurs(t)
		if err != nil {
			return nil, err
		}
		if ours {
			out = append(out, t)
		}
	}
	return out, nil
}

// applyFilter replaces the existing tables of ours by those that h.st requires, in one batch, so that the host is
// never open.
func (h *Host) applyFilter() error {
	h.st.ends = h.lastEnds
	h.st.router = isRouter()
	for range 4 {
		old, err := h.ourTables()
		if err != nil {
			return err
		}
		h.keepCounters()
		h.st.arp, h.st.bridge = !h.noARP, !h.noBridge
		h.st.memory = h.remember(old)
		tables, err := h.c.tables(h.st)
		if err != nil {
			return err
		}
		msgs, at, err := replaceTables(old, tables, h.owned)
		if err != nil {
			return err
		}
		if err := step(); err != nil {
			return err
		}
		if err = h.nf.batch(msgs); err == nil {
			h.applied = slices.Clone(h.c.live)
		}
		var ne *nfError
		if err == nil || !errors.As(err, &ne) {
			return err
		}
		if err := h.adapt(err, ne.index, msgs, len(old), at); err != nil {
			return err
		}
	}
	return errors.New("cannot close the host: other programs keep changing nftables or devices")
}

// replaceTables returns the messages that delete the tables old and create the tables wanted. at is where each of these begins.
func replaceTables(old []tableID, wanted []*nfTable, flags uint32) (msgs []nfMsg, at []int, err error) {
	for _, t := range old {
		msgs = append(msgs, delTable(t.fam, t.name))
	}
	for _, t := range wanted {
		at = append(at, len(msgs))
		m, err := t.messages(flags)
		if err != nil {
			return nil, nil, err
		}
		msgs = append(msgs, m...)
	}
	return msgs, at, nil
}

// adapt changes what the filter needs after the kernel has refused msgs[failed] with err, so that another attempt may
// succeed. The first old messages delete tables, and at is where each new table begins. If nothing can be changed, adapt
// returns the error for the user.
func (h *Host) adapt(err error, failed int, msgs []nfMsg, old int, at []int) error {
	switch {
	case slices.Contains(at, failed) && h.owned != 0 && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)):
		h.owned = 0 // Linux before 6.9: flushing everything removes ours too, and the watch restores it
	case h.st.bridge && failed >= old && failed < len(msgs) && msgs[failed].fam == unix.NFPROTO_BRIDGE:
		h.noBridge = true
		h.say("bridge", "the kernel cannot filter bridges: "+
			"guests on a bridge have no network while net.bridge.bridge-nf-call-iptables is 1", "why", err)
	case h.st.arp && failed >= old && failed < len(msgs) && msgs[failed].fam == unix.NFPROTO_ARP:
		h.noARP = true
		h.say(
			"arp",
			"the kernel can't filter ARP: neighbours learn that the TUN's address is here, and get no further",
			"why",
			err,
		)
	case errors.Is(err, unix.ENOENT) && failed < old: // it was deleted in between
	case errors.Is(err, unix.ENOENT) && failed >= 0 &&
		msgs[failed].fam == unix.NFPROTO_NETDEV && msgs[failed].op == unix.NFT_MSG_NEWCHAIN:
		// A device disappeared after we looked.
		l, err := h.look()
		if err != nil {
			return err
		}
		h.st.see(l)
	case lacking(msgs, failed, err) == needSocket && !h.st.noSocket:
		h.st.noSocket = true
		h.say("socket", "the kernel cannot tell whether anybody listens at a port: a datagram from outside that nobody "+
			"listens for may be answered by the program that opens the port next", "why", err)
	case lacking(msgs, failed, err) == needCgroupv2 && h.c.OwnCgroup != "" &&
		len(h.c.Exclude.Cgroups)+len(h.c.Include.Cgroups) == 0:
		h.c.OwnCgroup = "" // it is used only where the kernel supports it
		h.say(
			"own cgroup",
			"the kernel can't tell our sockets from others' by their cgroup: only by mark and destination",
			"why",
			err,
		)
	default:
		if n := lacking(msgs, failed, err); n != nil {
			return lackError(n)
		}
		return filterError(err)
	}
	return nil
}

// remember reads what the filter has recorded itself, for the filter that replaces it.
func (h *Host) remember(old []tableID) map[string][]nfElem {
	out := map[string][]nfElem{}
	if !slices.Contains(old, tableID{unix.NFPROTO_INET, h.c.NFTable}) {
		return out
	}
	for _, s := range h.c.memorySets() {
		keys, err := h.keysOf(s)
		if err != nil && !errors.Is(err, unix.ENOENT) { // a table of an older viasocks has no such set
			h.c.Log.Warn("cannot read the sets of the filter: their content is lost", "set", s.name, "err", err)
		}
		for _, k := range keys {
			out[s.name] = append(out[s.name], nfElem{key: k})
		}
	}
	return out
}

// keysOf reads what a set of the filter holds at present, at most as much as it may hold.
func (h *Host) keysOf(s *nfSet) (keys [][]byte, err error) {
	which := cat(attrString(unix.NFTA_SET_ELEM_LIST_TABLE, h.c.NFTable), attrString(unix.NFTA_SET_ELEM_LIST_SET, s.name))
	seen := map[string]bool{}
	err = h.nf.dump(unix.NFT_MSG_GETSETELEM, unix.NFPROTO_INET, which, func(_ uint8, b []byte) {
		eachAttr(attrs(b)[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, e []byte) {
			key := attrs(attrs(e)[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]
			if len(key) == int(s.keyLen) && !seen[string(key)] && (s.size == 0 || len(seen) < int(s.size)) {
				seen[string(key)] = true
				keys = append(keys, slices.Clone(key))
			}
		})
	})
	return keys, err
}

// guarded reports whether the filter of a viasocks that has died still lets packets into the TUN.
func (h *Host) guarded() bool {
	keys, err := h.keysOf(&nfSet{name: guardSet, keyLen: unix.IFNAMSIZ})
	return err == nil && slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, ifname(h.c.TUN)) })
}

// filterError adds a hint for other causes of a failure.
func filterError(err error) error {
	hint := ""
	if errors.Is(err, unix.EPERM) {
		hint = ": another program owns the table (is another viasocks up here?), or CAP_NET_ADMIN is missing"
	}
	return fmt.Errorf("cannot close the host: %w%s", err, hint)
}

// keepCounters saves the counts of tables that are about to be removed.
func (h *Host) keepCounters() {
	cs, err := h.listCounters()
	if err != nil {
		return
	}
	for _, c := range cs {
		if c.table.name == h.c.NFTable && h.shut && !isSign(c.Reason) {
			b := h.base[c.Reason]
			h.base[c.Reason] = Counter{c.Reason, b.Packets + c.Packets, b.Bytes + c.Bytes}
		}
	}
}

// Counter is the number of packets that the filter has refused for one reason.
type Counter struct {
	Reason         string
	Packets, Bytes uint64
}

// Counters returns the refused packets by reason, since the first Shut.
func (h *Host) Counters() ([]Counter, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	cs, err := h.listCounters()
	if err != nil {
		return nil, err
	}
	var out []Counter
	for _, c := range cs {
		if c.table.name == h.c.NFTable && !isSign(c.Reason) {
			b := h.base[c.Reason]
			out = append(out, Counter{c.Reason, b.Packets + c.Packets, b.Bytes + c.Bytes})
		}
	}
	slices.SortFunc(out, func(a, b Counter) int {
		if a.Reason < b.Reason {
			return -1
		}
		return 1
	})
	return out, nil
}

// refreshGuard renews the elements that show that there is a daemon.
func (h *Host) refreshGuard() error {
	elems := h.c.guardElems(h.st.guard)
	t := &nfTable{fam: unix.NFPROTO_INET, name: h.c.NFTable}
	msgs := append(
		[]nfMsg{flushSet(t.fam, t.name, guardSet)},
		elements(t, &nfSet{name: guardSet}, unix.NFT_MSG_NEWSETELEM, elems)...)
	return h.nf.batch(msgs)
}

// SetUpstreams replaces the endpoints that our own sockets may reach. They can be reached when it returns.
func (h *Host) SetUpstreams(ends []Endpoint) error {
	if len(ends) > maxEndpoints {
		return fmt.Errorf("cannot open the filter for %d upstream endpoints: at most %d", len(ends), maxEndpoints)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.lastEnds
	h.lastEnds = slices.Clone(ends)
	if !h.shut {
		return nil
	}
	t := &nfTable{fam: unix.NFPROTO_INET, name: h.c.NFTable}
	var msgs []nfMsg
	now := h.c.ownSets(h.lastEnds)
	for i, was := range h.c.ownSets(old) {
		msgs = append(msgs, elements(t, was, unix.NFT_MSG_DELSETELEM, minus(was.elems, now[i].elems))...)
		msgs = append(msgs, elements(t, was, unix.NFT_MSG_NEWSETELEM, minus(now[i].elems, was.elems))...)
	}
	if len(msgs) == 0 {
		return nil
	}
	if err := h.nf.batch(msgs); err != nil {
		return h.applyFilter() // another program changed it; the watch would do the same
	}
	h.st.ends = h.lastEnds
	return nil
}

func minus(a, b []nfElem) (out []nfElem) {
	in := map[string]bool{}
	for _, e := range b {
		in[string(e.key)] = true
	}
	for _, e := range a {
		if !in[string(e.key)] {
			out = append(out, e)
		}
	}
	return out
}

// removeFilter removes our tables.
func (h *Host) removeFilter() (removed []string, err error) {
	old, err := h.ourTables()
	if err != nil || len(old) == 0 {
		return nil, err
	}
	var msgs []nfMsg
	for _, t := range old {
		msgs = append(msgs, delTable(t.fam, t.name))
		removed = append(removed, "nftables table "+famNames[t.fam]+" "+t.name)
	}
	if err := step(); err != nil {
		return nil, err
	}
	if err := h.nf.batch(msgs); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("cannot remove the filter: %w", err)
	}
	return removed, nil
}
