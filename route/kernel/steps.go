package kernel

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// alias tells our TUN from others' of the same name.
const alias = "viasocks"

// Shut closes the host: the filter refuses everything but its exceptions, also what the TUN shall take, until Steer. What
// a dead daemon left is taken over. After an error the caller chooses: Open, or Close, which leaves the host as it is.
func (h *Host) Shut() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, err := h.look()
	if err != nil {
		return err
	}
	h.st.see(l)
	h.tellServed()
	h.st.guard = false
	h.st.wasZero = len(h.j.Sysctls) > 0 || readSysctl(srcValidMark) == "0"
	h.j.Done["filter"] = true
	if err := h.record(); err != nil {
		return err
	}
	if err := h.applyFilter(); err != nil {
		return err
	}
	h.shut = true
	if h.recovered { // what the dead one let past the proxy need not be what we do
		h.clearMarks(h.c.Marks.Direct)
	}
	if err := h.setSysctls(); err != nil {
		return err
	}
	return nil
}

// record writes the journal; what it speaks of may be done then.
func (h *Host) record() error {
	if err := step(); err != nil {
		return err
	}
	return h.j.write(h.path)
}

// recallSysctls asks our table where there is no journal.
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

// Steer adds routes and rules, and lets packets into the TUN, which must be up. After an error the caller chooses:
// Unsteer and Open, or Close, which leaves the host closed.
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

// reconcile makes rules, routes and, where it depends on devices, the filter what they should be.
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
	if len(h.families) < 2 { // IPv6 may have come as a module
		if _, err := listRules(h.nl, unix.AF_INET6); err == nil {
			h.families = []int{unix.AF_INET, unix.AF_INET6}
		}
	}
	var errs []error
	for _, f := range h.families { // routes first, so that nothing is refused in passing
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

// Unsteer takes away the rules and routes. The host is closed.
func (h *Host) Unsteer() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steered, h.st.guard = false, false
	_, err := h.removeSteering()
	return err
}

// Open takes away the TUN, what else was changed, the filter, and last the journal. The host is as it was.
func (h *Host) Open() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := h.restore(true)
	return err
}

// restore undoes all but rules and routes. tun: the device is ours.
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
			continue // somebody else has changed it since
		}
		if err := step(); err != nil {
			return removed, err
		}
		errs = append(errs, writeSysctl(s.Key, s.Old))
		removed = append(removed, "setting of "+s.Key)
	}
	h.clearMarks(0)
	if h.nf != nil {
		t, err := h.removeFilter()
		removed, errs = append(removed, t...), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return removed, err // the journal stays: Undo can be tried again
	}
	if err := step(); err != nil {
		return removed, err
	}
	return removed, removeFile(h.path)
}

func isTUN(k netlink.Link) bool { return k.Type() == "tuntap" || k.Type() == "tun" }
