package kernel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is the set of changes to the host. The order of calls is: New (examines the host and takes the lock, changes
// nothing); Shut (closes the filter); then the caller makes its TUN and starts its stack; Steer (rules and routes);
// Run (watches the host and renews the guard; the caller may report that it is ready); Unsteer; Open (removes the
// filter last); Close (releases the lock). Methods may be called from any goroutine, but New, Shut, Steer, Unsteer
// and Open must be called one after the other, in the network namespace that they change.
type Host struct {
	c         Config
	nl        routing
	nf        *nfSocket
	families  []int
	lock      *os.File
	path      string // of the journal
	events    *source
	nfEvents  *source
	inotify   *os.File // of control groups; nil: not available
	recovered bool

	mu        sync.Mutex // guards the fields below and all changes
	j         journal
	st        filterState
	shut      bool
	steered   bool
	closed    bool
	noARP     bool
	noBridge  bool
	tunNoIPv6 bool
	owned     uint32 // flags of our tables
	lastEnds  []Endpoint
	applied   []liveGroup        // as the filter knows h.c.live
	base      map[string]Counter // counts of tables that were replaced
	led       map[int]bool       // devices that lead or have led out, see look
	said      map[string]string
	warnings  map[string]string
}

// step is for tests: it makes the n-th change to the host fail.
var step = func() error { return nil }

// New examines the host and changes nothing. It fails if another program uses what the configuration needs. What a
// dead daemon left is taken over later. ErrRunning means that another daemon is running.
func New(c Config) (_ *Host, err error) {
	c, err = c.withDefaults()
	if err != nil {
		return nil, err
	}
	h, err := open(c)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if h.inotify, err = openInotify(); err != nil {
		h.say("inotify", "cannot watch control groups: they are looked at every few seconds", "why", err)
	}
	old, err := readJournal(h.path)
	if err != nil {
		h.c.Log.Warn("cannot read the journal of a dead daemon: its changes are found by their marks", "err", err)
	}
	h.j = journal{
		Version:  journalVersion,
		PID:      os.Getpid(),
		TUN:      c.TUN,
		Table:    c.Table,
		Priority: c.Priority,
		NFTable:  c.NFTable,
		Marks:    c.Marks,
		Done:     map[string]bool{},
	}
	if err := h.taken(); err != nil {
		return nil, err
	}
	if old != nil {
		h.j.Sysctls = old.Sysctls
		h.adoptPrograms(old)
		if err := h.inheritedFrom(old); err != nil {
			return nil, err
		}
	}
	if old != nil && h.recovered && (old.TUN != c.TUN || old.NFTable != c.NFTable || old.Table != c.Table) {
		return nil, fmt.Errorf("cannot take over from a dead viasocks that had TUN %s, table %d and nftables name %s: "+
			"use the same, or 'viasocks down' first", old.TUN, old.Table, old.NFTable)
	}
	h.recallSysctls()
	if err := h.keep(); err != nil {
		return nil, err
	}
	if err := h.watchEvents(); err != nil {
		return nil, err
	}
	return h, nil
}

// inheritedFrom looks for the tables of a dead daemon that used another name for them. A journal alone proves
// nothing: the kernel may give the number of an ended network namespace to a new one, which nobody has changed.
func (h *Host) inheritedFrom(old *journal) error {
	tables, err := h.listTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.name != old.NFTable || !slices.Contains(ourFamilies, t.fam) {
			continue
		}
		ours, err := h.isOurs(t)
		if err != nil {
			return err
		}
		h.recovered = h.recovered || ours
	}
	return nil
}

// open opens the sockets and takes the lock.
func open(c Config) (_ *Host, err error) {
	c.groups = map[string]cgroup{}
	h := &Host{
		c:        c,
		base:     map[string]Counter{},
		led:      map[int]bool{},
		said:     map[string]string{},
		warnings: map[string]string{},
		owned:    tableOwner | tablePersist,
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	var lock string
	if h.path, lock, err = paths(c.Dir); err != nil {
		return nil, err
	}
	if h.lock, err = lockOf(c.Lock, lock); err != nil {
		return nil, err
	}
	if h.nl, err = openRouting(); err != nil {
		return nil, fmt.Errorf("cannot steer the host: no netlink socket: %w", err)
	}
	if h.nf, err = openNF(); noTables(err) {
		h.nf, err = nil, nil // there is nothing to undo, and New reports what is missing
	} else if err != nil {
		return nil, fmt.Errorf("cannot open a netfilter socket: %w", err)
	}
	h.families, err = h.listFamilies()
	h.lastEnds = c.Upstreams
	return h, err
}

// listFamilies returns the families for which the kernel has ip rules. IPv6 may be compiled out, disabled at boot
// (ipv6.disable=1), or loaded later as a module. Without ip rules, the filter refuses the family, because its tables
// cover both.
func (h *Host) listFamilies() ([]int, error) {
	var out []int
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		_, err := listRules(h.nl, f)
		lacks := errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
		switch {
		case err == nil:
			out = append(out, f)
		case !lacks:
			return nil, err
		case f == unix.AF_INET:
			return nil, errors.New(
				"cannot steer the host: this kernel has no ip rules: it must be built with CONFIG_IP_MULTIPLE_TABLES; " + orRun,
			)
		default:
			h.c.Log.Info("the kernel has no IPv6, or no IPv6 rules: IPv4 is steered, and IPv6 is refused")
		}
	}
	return out, nil
}

// routing is rtnetlink in the network namespace in which it was opened.
type routing interface {
	RuleList(family int) ([]netlink.Rule, error)
	RuleAdd(*netlink.Rule) error
	RuleDel(*netlink.Rule) error
	RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error)
	RouteGetWithOptions(to net.IP, o *netlink.RouteGetOptions) ([]netlink.Route, error)
	RouteReplace(*netlink.Route) error
	RouteDel(*netlink.Route) error
	LinkList() ([]netlink.Link, error)
	LinkByName(string) (netlink.Link, error)
	LinkSetAlias(netlink.Link, string) error
	LinkDel(netlink.Link) error
	AddrList(netlink.Link, int) ([]netlink.Addr, error)
	Close()
}

// openRouting is a variable so that tests can simulate a kernel that lacks something.
var openRouting = func() (routing, error) { return netlink.NewHandle(unix.NETLINK_ROUTE) }

// taken looks for what other programs already use.
func (h *Host) taken() error {
	if err := h.takenRouting(); err != nil {
		return err
	}
	return h.takenTables()
}

// takenRouting looks for it among devices, ip rules and kernel routes, which needs no privilege.
func (h *Host) takenRouting() error {
	c := &h.c
	if k, err := h.nl.LinkByName(c.TUN); err == nil && k.Type() != "tuntap" && k.Type() != "tun" {
		return fmt.Errorf(
			"cannot use the name %s for the TUN device: there is a %s of that name: choose another with --tun",
			c.TUN,
			k.Type(),
		)
	}
	for _, f := range h.families {
		rs, err := listRules(h.nl, f)
		if err != nil {
			return err
		}
		for _, r := range rs {
			switch {
			case r.Protocol == Protocol:
				h.recovered = true
			case r.Table == c.Table || r.Table == c.closedTable():
				return fmt.Errorf("cannot use table %d: an ip rule of another program leads to it: see 'ip rule', "+
					"and choose another with --table", r.Table)
			case r.Priority >= c.Priority && r.Priority <= c.Priority+lastRule:
				return fmt.Errorf(
					"cannot use rule priorities %d to %d: another program has %d: see 'ip rule', "+
						"and choose others with --priority",
					c.Priority,
					c.Priority+lastRule,
					r.Priority,
				)
			case r.Mark != 0 && (r.Mask == nil || *r.Mask&c.Marks.Mask != 0) && overlaps(r.Mark, r.Mask, c.Marks):
				return fmt.Errorf(
					"cannot use mark %#x/%#x: an ip rule of another program uses mark %#x: see 'ip rule', "+
						"and choose another with --mark",
					c.Marks.Own,
					c.Marks.Mask,
					r.Mark,
				)
			}
		}
		routes, err := h.listRoutes(f)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if (r.Table == c.Table || r.Table == c.closedTable()) && r.Protocol != Protocol {
				return fmt.Errorf("cannot use table %d: it has routes of another program: see 'ip route show table %[1]d', "+
					"and choose another with --table", r.Table)
			}
			h.recovered = h.recovered || r.Protocol == Protocol
		}
	}
	return nil
}

// takenTables looks for it among the tables of nftables.
func (h *Host) takenTables() error {
	c := &h.c
	tables, err := h.listTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.name != c.NFTable {
			continue
		}
		if !slices.Contains(ourFamilies, t.fam) {
			continue
		}
		ours, err := h.isOurs(t)
		if err != nil {
			return err
		}
		if !ours {
			return fmt.Errorf(
				"cannot use the nftables name %s: another program has a table %s %[1]s: choose another with --nft-table",
				c.NFTable,
				famNames[t.fam],
			)
		}
		h.recovered = true
	}
	return nil
}

// overlaps reports whether a packet with one of our marks would match mark under mask.
func overlaps(mark uint32, mask *uint32, m Marks) bool {
	k := ^uint32(0)
	if mask != nil {
		k = *mask
	}
	for _, v := range []uint32{m.Own, m.Direct, m.Inbound, m.Returned} {
		if v&k == mark&m.Mask&k && mark&^m.Mask == 0 {
			return true
		}
	}
	return false
}

// Recovered reports whether a dead daemon had left something behind.
func (h *Host) Recovered() bool { return h.recovered }

// Close releases the lock and leaves the host as it is. It may be called twice.
func (h *Host) Close() error { return h.leave(giveLock) }

// LockFile returns the lock for another viasocks, which passes it to New in Config.Lock. The Host still owns it.
func (h *Host) LockFile() *os.File { return h.lock }

// HandOver leaves the host to another viasocks, which has the lock as well and whose Config is Live. It is called
// instead of Close, after Run has ended. Until the other one has called Shut, the filter stays as it is, and nothing
// restores it.
func (h *Host) HandOver() error { return h.leave((*os.File).Close) }

// leave closes everything and leaves the host as it is. end ends our use of the lock.
func (h *Host) leave(end func(*os.File) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	for _, s := range []*source{h.events, h.nfEvents} {
		if s != nil {
			s.close()
		}
	}
	if h.inotify != nil {
		h.inotify.Close()
	}
	if h.nl != nil {
		h.nl.Close()
	}
	var err error
	if h.nf != nil {
		err = h.nf.Close()
	}
	if h.lock != nil {
		err = errors.Join(err, end(h.lock))
	}
	return err
}

// say logs repeated findings only when they change.
func (h *Host) say(key, msg string, args ...any) {
	text := fmt.Sprint(append([]any{msg}, args...)...)
	if h.said[key] == text {
		return
	}
	h.said[key] = text
	h.c.Log.Warn(msg, args...)
	h.warnings[key] = warning(msg, args)
}

// warning returns what is logged as one sentence, with the arguments in parentheses and the reason after a colon.
func warning(msg string, args []any) string {
	why, rest := "", ""
	for i := 0; i+1 < len(args); i += 2 {
		if name := fmt.Sprint(args[i]); name == "err" || name == "why" {
			why = fmt.Sprint(": ", args[i+1])
		} else {
			rest += fmt.Sprintf(", %s %v", name, args[i+1])
		}
	}
	if rest != "" {
		rest = " (" + rest[2:] + ")"
	}
	return msg + rest + why
}

// Warnings returns what the administrator should know, such as foreign rules ahead of ours.
func (h *Host) Warnings() (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.warnings {
		out = append(out, w)
	}
	slices.Sort(out)
	return out
}
