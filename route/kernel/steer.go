package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Options says what Steer shall do. The zero value of a field is an error but for Priority and Log.
type Options struct {
	TUN      string // name of the device that takes the packets; it is up and has its addresses
	Table    int    // number of a kernel routing table that nobody else uses
	Mark     uint32 // packets with this mark (under Mask) are ours and are left alone
	Mask     uint32
	Priority int          // of the first ip rule, the following four numbers are used too; 0: DefaultPriority
	Log      *slog.Logger // nil: none
}

// Steering is the change to the host, until Close: in each family a table T with a default route into the TUN, and the
// ip rules
//
//	P    fwmark M/MASK         goto P+4      our own packets
//	P+1  ipproto udp, dport 53 lookup T      names are asked of us, whoever was to be asked
//	P+1  ipproto tcp, dport 53 lookup T
//	P+2  to PREFIX             lookup main   one for each private network that the host is connected to
//	P+3  not fwmark M/MASK     lookup T
//	P+4  nop
//
// "not" turns a whole rule round, its other conditions too, so that it can't stand before dport or to: hence the goto.
// The private networks are rules and not throw routes in T, which has to answer for port 53 inside of them too. They
// follow the host's addresses.
type Steering struct {
	o        Options
	h        *netlink.Handle
	link     netlink.Link
	families []int
	undo     []func() error // in the order of doing

	mu   sync.Mutex
	lan  map[netip.Prefix]*netlink.Rule
	over bool // no more changes to lan

	watched chan struct{} // closed when the watcher has ended; nil: there is none
	events  *os.File
	once    sync.Once
	err     error
}

// Where the rules stand, counted from the first.
const (
	atMarked = iota
	atDNS
	atLAN
	atAll
	atEnd
)

// step is for tests: it fails the n-th change to the host.
var step = func() error { return nil }

// Steer sends all packets without the mark to the TUN, in both families, in the network namespace of the calling
// thread. Rules that a killed daemon left are removed first. After an error nothing of ours is left behind. The caller
// closes the Steering before the TUN goes.
func Steer(o Options) (_ *Steering, err error) {
	if o.TUN == "" || o.Table <= 0 || o.Mark == 0 || o.Mark&^o.Mask != 0 {
		return nil, errors.New("cannot steer the host: no device, table or mark, or the mask does not cover the mark")
	}
	if o.Priority == 0 {
		o.Priority = DefaultPriority
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot steer the host: no netlink socket: %w", err)
	}
	s := &Steering{o: o, h: h, lan: map[netip.Prefix]*netlink.Rule{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot steer the host: %w", errors.Join(err, s.Close()))
		}
	}()
	if s.link, err = h.LinkByName(o.TUN); err != nil {
		return nil, fmt.Errorf("no device %s: %w", o.TUN, err)
	}
	if s.families, err = s.listFamilies(); err != nil {
		return nil, err
	}
	if err := s.clean(); err != nil {
		return nil, err
	}
	// The routes first, then the rules from the last to the first, but for the one that takes everything, so that
	// nothing is steered in passing that shall not be.
	for _, f := range s.families {
		if err := s.addDefault(f); err != nil {
			return nil, err
		}
	}
	for _, f := range s.families {
		for _, r := range s.exceptions(f) {
			if err := s.addRule(r); err != nil {
				return nil, err
			}
		}
	}
	if err := s.watch(); err != nil {
		return nil, err
	}
	for _, f := range s.families {
		if err := s.addRule(s.everything(f)); err != nil {
			return nil, err
		}
	}
	warnReversePath(o.Log, o.TUN)
	return s, nil
}

// Close takes away what Steer added, and nothing else. It may be called twice and from any goroutine. What somebody
// else removed already is no error.
func (s *Steering) Close() error {
	s.once.Do(func() {
		if s.watched != nil {
			s.events.Close()
			<-s.watched
		}
		var errs []error
		for i := len(s.undo) - 1; i >= 0; i-- {
			errs = append(errs, s.undo[i]())
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.over = true
		for _, r := range s.lan {
			errs = append(errs, s.delRule(r))
		}
		s.h.Close()
		if err := errors.Join(errs...); err != nil {
			s.err = fmt.Errorf("cannot take back the steering: %w", err)
		}
	})
	return s.err
}

// listFamilies are those that the kernel has. IPv6 may be compiled out or switched off at boot.
func (s *Steering) listFamilies() ([]int, error) {
	_, err := s.h.RuleList(unix.AF_INET6)
	switch {
	case err == nil || errors.Is(err, netlink.ErrDumpInterrupted):
		return []int{unix.AF_INET, unix.AF_INET6}, nil
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		s.o.Log.Info("the kernel has no IPv6: only IPv4 is steered")
		return []int{unix.AF_INET}, nil
	}
	return nil, fmt.Errorf("cannot list ip rules: %w", err)
}

// addDefault adds the default route of a family to the table. A TUN that can't have IPv6 gets an unreachable route in
// its stead: IPv6 must not pass by the proxy because it is switched off on one device.
func (s *Steering) addDefault(family int) error {
	r := &netlink.Route{
		LinkIndex: s.link.Attrs().Index, Table: s.o.Table, Protocol: Protocol, Family: family,
		Scope: netlink.SCOPE_UNIVERSE, Dst: defaultNet(family),
	}
	if family == unix.AF_INET {
		r.Scope = netlink.SCOPE_LINK
	}
	err := step()
	if err == nil {
		err = s.h.RouteAdd(r)
	}
	if family == unix.AF_INET6 && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)) {
		s.o.Log.Info("the TUN device has no IPv6: IPv6 is refused", "why", err)
		r.LinkIndex, r.Type = 0, unix.RTN_UNREACHABLE
		err = s.h.RouteAdd(r)
	}
	if err != nil {
		return fmt.Errorf("cannot add the %s default route to table %d: %w", familyName(family), s.o.Table, err)
	}
	s.undo = append(s.undo, func() error {
		if err := s.h.RouteDel(r); err != nil && !gone(err) {
			return fmt.Errorf("cannot remove the %s default route of table %d: %w", familyName(family), s.o.Table, err)
		}
		return nil
	})
	return nil
}

// rule is the frame of all of ours.
func (s *Steering) rule(family, at, table int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Table, r.Priority, r.Protocol = family, table, s.o.Priority+at, Protocol
	return r
}

// exceptions are all rules that stay but the one that takes everything, in the order of adding.
func (s *Steering) exceptions(family int) []*netlink.Rule {
	end := s.rule(family, atEnd, 0)
	end.Type = nl.FR_ACT_NOP
	marked := s.rule(family, atMarked, 0)
	marked.Mark, marked.Mask, marked.Goto = s.o.Mark, &s.o.Mask, end.Priority
	rules := []*netlink.Rule{end, marked}
	for _, proto := range []int{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		r := s.rule(family, atDNS, s.o.Table)
		r.IPProto, r.Dport = proto, netlink.NewRulePortRange(53, 53)
		rules = append(rules, r)
	}
	return rules
}

// everything is the rule that steers.
func (s *Steering) everything(family int) *netlink.Rule {
	r := s.rule(family, atAll, s.o.Table)
	r.Mark, r.Mask, r.Invert = s.o.Mark, &s.o.Mask, true
	return r
}

func (s *Steering) addRule(r *netlink.Rule) error {
	if err := s.insert(r); err != nil {
		return err
	}
	s.undo = append(s.undo, func() error { return s.delRule(r) })
	return nil
}

func (s *Steering) insert(r *netlink.Rule) error {
	err := step()
	if err == nil {
		err = s.h.RuleAdd(r)
	}
	if err != nil {
		return fmt.Errorf("cannot add the %s rule %q: %w", familyName(r.Family), r, err)
	}
	return nil
}

func (s *Steering) delRule(r *netlink.Rule) error {
	if err := s.h.RuleDel(r); err != nil && !gone(err) {
		return fmt.Errorf("cannot remove the %s rule %q: %w", familyName(r.Family), r, err)
	}
	return nil
}

// gone: the kernel has no such rule or route, or took it away with its device.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV)
}

func familyName(f int) string {
	if f == unix.AF_INET6 {
		return "IPv6"
	}
	return "IPv4"
}

func defaultNet(family int) *net.IPNet {
	if family == unix.AF_INET6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}
