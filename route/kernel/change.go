package kernel

import (
	"errors"
	"fmt"
)

// Change takes those fields of c that changeable names; the rest of c is not looked at. The filter is replaced in one batch,
// then the rules: what only one of them lets pass in between is refused. After an error it is as it was.
func (h *Host) Change(c Config) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed {
		return errors.New("cannot change an entry that does not exist")
	}
	next := h.c
	next.changeable(c)
	next, err := next.withDefaults()
	if err != nil {
		return err
	}
	old := h.c
	if err := h.become(next); err != nil {
		if back := h.become(old); back != nil {
			return fmt.Errorf("%w; and cannot go back: %w", err, back)
		}
		return err
	}
	return nil
}

// changeable sets what may change while the host is steered.
func (c *Config) changeable(to Config) {
	c.LAN, c.CarryInbound, c.InboundPorts = to.LAN, to.CarryInbound, to.InboundPorts
	c.Exclude, c.Include, c.Direct, c.Strict = to.Exclude, to.Include, to.Direct, to.Strict
}

// become sets what Change may set. Run looks at other fields without the lock: they stay untouched.
func (h *Host) become(c Config) error {
	h.c.changeable(c)
	l, err := h.look()
	if err != nil {
		return err
	}
	h.st.see(l)
	if err := h.keep(); err != nil {
		return err
	}
	h.tellServed()
	if err := h.applyFilter(); err != nil {
		return err
	}
	h.clearMarks(h.c.Marks.Direct) // whoever is still let out gets it anew
	_, err = h.reconcile()
	return err
}

// KeepClosed takes FailOpen back: the host is closed also when nobody renews the guard.
func (h *Host) KeepClosed() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.c.FailOpen || !h.shut || h.closed {
		return nil
	}
	h.c.FailOpen = false
	if err := h.applyFilter(); err != nil {
		return err
	}
	_, err := h.reconcile()
	return err
}
