package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Survey is what Steer would find on this host.
type Survey struct {
	// the error with which New would refuse: another program uses the mark, a table, a priority or a name; nil: none
	Conflict error
	Foreign  []ForeignRule // rules of other programs that come before ours
	Left     bool          // there are rules, routes or tables of ours, from a running daemon or one that was killed
	Unseen   error         // why the tables of nftables could not be read; nil: they were
	Strict   []string      // devices with rp_filter=1
}

// ForeignRule is an ip rule of another program.
type ForeignRule struct {
	Text   string // in the words of ip(8)
	Option string // the option that puts our rules before it; empty: none does
	All    bool   // it leads all packets, or all except those with one mark, past the TUN
}

// Look examines the host and changes nothing. It needs no privilege, takes no lock, and may be called while a daemon
// runs.
func Look(c Config) (s Survey, err error) {
	if c, err = c.withDefaults(); err != nil {
		return s, err
	}
	h := &Host{c: c, said: map[string]string{}, warnings: map[string]string{}}
	if h.nl, err = openRouting(); err != nil {
		return s, err
	}
	defer h.nl.Close()
	if h.families, err = h.listFamilies(); err != nil {
		return s, err
	}
	s.Conflict = h.takenRouting()
	if h.nf, s.Unseen = openNF(); s.Unseen == nil {
		defer h.nf.Close()
		_, s.Unseen = h.listTables()
	}
	if s.Conflict == nil && s.Unseen == nil {
		s.Conflict = h.takenTables()
	}
	s.Left = h.recovered
	for _, f := range h.families {
		rules, err := listRules(h.nl, f)
		if err != nil {
			return s, err
		}
		for i := range rules {
			if n := &rules[i]; n.Protocol != Protocol {
				if what, option, ahead := c.ahead(f, n); ahead {
					s.Foreign = append(s.Foreign, ForeignRule{what, option, h.takesAll(f, n)})
				}
			}
		}
	}
	s.Strict = strictReversePath(c.TUN)
	return s, nil
}

// takesAll reports whether n decides on all packets, except possibly those with one mark: it refuses them, or looks
// them up in a table that has a route for all or half of the addresses.
func (h *Host) takesAll(family int, n *netlink.Rule) bool {
	anyMark := n.Mark == 0 || n.Invert
	if n.Invert && n.Mark == 0 || !anyMark || n.Src != nil || n.Dst != nil || n.IifName != "" || n.OifName != "" ||
		n.UIDRange != nil ||
		n.IPProto != 0 || n.Sport != nil || n.Dport != nil || n.Tos != 0 || n.TunID != 0 || n.SuppressPrefixlen >= 0 ||
		n.Goto > 0 {
		return false
	}
	if n.Table == 0 {
		return true // prohibit, unreachable or blackhole
	}
	routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: n.Table}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool {
		if r.Type == unix.RTN_THROW {
			return false
		}
		if r.Dst == nil {
			return true
		}
		ones, _ := r.Dst.Mask.Size()
		return ones <= 1
	})
}

// Try closes a network namespace that it creates, and opens it again. It fails, with the error of Shut, if this
// kernel does not support the filter. The namespace ends with the call. Nothing on this host changes, except that the
// kernel may load modules of nftables. Try needs CAP_SYS_ADMIN and CAP_NET_ADMIN.
func Try(c Config) error {
	dir, err := os.MkdirTemp("", "viasocks-try-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c.Dir = dir
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and the namespace with it
		done <- tryHere(c)
	}()
	return <-done
}

func tryHere(c Config) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot make a network namespace: %w", err)
	}
	h, err := New(c)
	if err != nil {
		return err
	}
	return errors.Join(h.Shut(), h.Open(), h.Close())
}

// Steered reports what is missing for packets to reach the TUN device by the routing table; nil: nothing. It needs no privilege.
func Steered(tun string, table int) error {
	nl, err := openRouting()
	if err != nil {
		return err
	}
	defer nl.Close()
	k, err := nl.LinkByName(tun)
	switch {
	case err != nil:
		return fmt.Errorf("the TUN device %s is missing", tun)
	case k.Attrs().RawFlags&unix.IFF_UP == 0:
		return fmt.Errorf("the TUN device %s is down", tun)
	}
	rules, err := listRules(nl, unix.AF_INET)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Protocol == Protocol && r.Table == table }) {
		return errors.New("the ip rules that lead to the TUN device are missing")
	}
	routes, err := nl.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.LinkIndex == k.Attrs().Index }) {
		return fmt.Errorf("the route to the TUN device %s is missing", tun)
	}
	return nil
}
