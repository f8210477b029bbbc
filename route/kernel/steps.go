package kernel

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// alias distinguishes our TUN from others with the same name.
const alias = "viasocks"

// Shut closes the host: until Steer, the filter refuses everything except its exceptions, including what the TUN will
// take. It takes over what a dead daemon left. With Config.Live, the TUN takes what it took before, and so it does right
// after a daemon has died: what programs send until Steer is then not refused, and they do not notice the restart. After
// an error the caller chooses between Open and Close, which leaves the host as it is.
func (h *Host) Shut() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, err := h.look()
	if err != nil {
		return err
	}
	h.st.see(l)
	h.findUnits()
	h.tellServed()
	h.st.guard = h.c.Live || h.recovered && h.guarded()
	if h.c.Live {
		if err := h.catchUp(); err != nil {
			return err
		}
	}
	if h.c.Kept, err = h.withoutOpened(h.c.Kept); err != nil {
		return err
	}
	if err := h.keep(); err != nil {
		return err
	}
	h.st.wasZero = len(h.j.Sysctls) > 0 || readSysctl(srcValidMark) == "0"
	h.j.Done["filter"] = true
	if err := h.record(); err != nil {
		return err
	}
	if err := h.applyFilter(); err != nil {
		return err
	}
	h.shut = true
	if h.recovered && !h.c.Live { // the dead daemon may have let more past the proxy than we do
		h.clearMarks(h.c.Marks.Direct)
	}
	if err := h.setSysctls(); err != nil {
		return err
	}
	return nil
}

// catchUp takes note of what the viasocks that carried the host until now has done since New. It is no change by others.
func (h *Host) catchUp() error {
	h.events.close()
	h.nfEvents.close()
	if err := h.watchEvents(); err != nil {
		return err
	}
	if old, err := readJournal(h.path); err == nil && old != nil {
		h.j.Groups = nil
		h.c.live = slices.DeleteFunc(h.c.live, func(g liveGroup) bool { return g.unit == "" })
		h.adoptPrograms(old)
	}
	return nil
}

// record writes the journal. What it lists may be done afterwards.
func (h *Host) record() error {
	if err := step(); err != nil {
		return err
	}
	return h.j.write(h.path)
}

// recallSysctls reads the former sysctls from our table if there is no journal.
func (h *Host) recallSysctls() {
	if len(h.j.Sysctls) > 0 {
		return
	}
	cs, err := h.listCounters()
	if err != nil {
		return
	}
	for _, c := range cs {
		if c.table.name == h.c.NFTable && c.Reason == wasZero {
			h.j.Sysctls = []sysctlChange{{srcValidMark, "0", "1"}}
		}
	}
}

func (h *Host) setSysctls() error {
	now := readSysctl(srcValidMark)
	if now == "1" || now == "" {
		return nil
	}
	known := false
	for _, s := range h.j.Sysctls {
		known = known || s.Key == srcValidMark
	}
	if !known {
		h.j.Sysctls = append(h.j.Sysctls, sysctlChange{srcValidMark, now, "1"})
		if err := h.record(); err != nil {
			return err
		}
	}
	if err := step(); err != nil {
		return err
	}
	if err := writeSysctl(srcValidMark, "1"); err != nil {
		if dev := strictReversePath(h.c.TUN); len(dev) > 0 {
			return fmt.Errorf("%w: with rp_filter=1 on %s the proxy's answers would be dropped: set it to 2", err, dev[0])
		}
		h.say("sysctl", "a setting can't be changed; it matters with rp_filter=1 only", "err", err)
	}
	return nil
}

// Steer adds routes and rules, and lets packets into the TUN, which must be up. After an error the caller chooses
// between Unsteer and Open, and Close, which leaves the host closed.
func (h *Host) Steer() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut {
		return errors.New("cannot steer the host: the filter is not closed")
	}
	k, err := h.nl.LinkByName(h.c.TUN)
	if err != nil {
		return fmt.Errorf("cannot steer the host: no device %s: %w", h.c.TUN, err)
	}
	h.j.Done["tun"], h.j.Done["routes"], h.j.Done["rules"] = true, true, true
	if err := h.record(); err != nil {
		return err
	}
	if err := h.nl.LinkSetAlias(k, alias); err != nil {
		h.c.Log.Debug("cannot set the alias of the TUN device", "err", err)
	}
	h.routeLocalnet()
	h.steered = true
	h.st.guard = true
	if _, err := h.reconcile(); err != nil {
		return fmt.Errorf("cannot steer the host: %w", err)
	}
	if err := h.refreshGuard(); err != nil {
		return fmt.Errorf("cannot steer the host: %w", err)
	}
	return nil
}

// Unguard tells the filter that nobody reads the TUN from now on, so that programs get an error at once. Without it, their
// packets are lost in the TUN until the guard has lapsed (Config.Guard).
func (h *Host) Unguard() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed {
		return nil
	}
	h.st.guard = false
	return h.refreshGuard()
}

// reconcile brings rules, routes and, where it depends on devices, the filter into the intended state.
func (h *Host) reconcile() (changed []string, err error) {
	l, err := h.look()
	if err != nil {
		return nil, err
	}
	if !equal(l.lan, h.st.lan) || !equal(l.near, h.st.near) || h.c.Strict && !equal(l.out, h.st.devices) ||
		isRouter() != h.st.router {
		h.st.see(l)
		h.tellServed()
		if err := h.applyFilter(); err != nil {
			return nil, err
		}
	}
	if !h.steered {
		return nil, nil
	}
	if len(h.families) < 2 { // IPv6 may have been loaded as a module
		if _, err := listRules(h.nl, unix.AF_INET6); err == nil {
			h.families = []int{unix.AF_INET, unix.AF_INET6}
		}
	}
	var errs []error
	for _, f := range h.families { // routes first, so that nothing is refused in between
		c, err := h.syncRoutes(f, l.mine)
		changed, errs = append(changed, c...), append(errs, err)
	}
	for _, f := range h.families {
		c, err := h.syncRules(f, l)
		changed, errs = append(changed, c...), append(errs, err)
	}
	return changed, errors.Join(errs...)
}

func equal[T comparable](a, b []T) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// Unsteer removes the rules and routes. Afterwards the host is closed.
func (h *Host) Unsteer() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steered, h.st.guard = false, false
	_, err := h.removeSteering()
	return err
}

// Open removes the TUN, undoes the other changes, and removes the filter and finally the journal. Afterwards the host
// is as it was before Shut.
func (h *Host) Open() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := h.restore(true)
	return err
}

// restore undoes everything except rules and routes. tun tells whether the device is ours.
func (h *Host) restore(tun bool) (removed []string, err error) {
	h.shut, h.steered = false, false
	var errs []error
	if k, err := h.nl.LinkByName(h.c.TUN); err == nil && tun && isTUN(k) {
		if err := step(); err != nil {
			return removed, err
		}
		if err := h.nl.LinkDel(k); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("cannot remove the TUN device: %w", err))
		} else {
			removed = append(removed, "TUN device "+h.c.TUN)
		}
	}
	for _, s := range h.j.Sysctls {
		if readSysctl(s.Key) != s.New {
			continue // another program has changed it since
		}
		if err := step(); err != nil {
			return removed, err
		}
		errs = append(errs, writeSysctl(s.Key, s.Old))
		removed = append(removed, "setting of "+s.Key)
	}
	groups, err := h.releasePrograms()
	removed, errs = append(removed, groups...), append(errs, err)
	if h.nf != nil {
		t, err := h.removeFilter()
		removed, errs = append(removed, t...), append(errs, err)
	}
	h.clearMarks(0) // not before: the filter would mark a flow again that goes on
	if err := errors.Join(errs...); err != nil {
		return removed, err // the journal stays, so that Undo can be tried again
	}
	if err := step(); err != nil {
		return removed, err
	}
	return removed, removeFile(h.path)
}

func isTUN(k netlink.Link) bool { return k.Type() == "tuntap" || k.Type() == "tun" }
