package kernel

import (
	"errors"
	"fmt"
)

// Change applies those fields of c that changeable names and ignores the rest. The filter is replaced in one batch,
// then the rules; traffic that only one of the two lets pass is refused in between. After an error the host is as
// before.
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

// changeable copies the fields that may change while the host is steered.
func (c *Config) changeable(to Config) {
	c.LAN, c.CarryInbound, c.InboundPorts = to.LAN, to.CarryInbound, to.InboundPorts
	c.Exclude, c.Include, c.Direct, c.Strict = to.Exclude, to.Include, to.Direct, to.Strict
	c.Straight, c.Reserved, c.Units = to.Straight, to.Reserved, to.Units
	c.PortMap = to.PortMap
	c.Opens = c.Opens || to.Opens // connections that the TUN opened may still exist
}

// become sets what Change may set. It leaves other fields alone, because Run reads them without the lock.
func (h *Host) become(c Config) error {
	h.c.changeable(c)
	h.findUnits()
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
	h.clearMarks(h.c.Marks.Direct) // a flow that is still let out gets the mark again
	_, err = h.reconcile()
	return err
}

// KeepClosed withdraws FailOpen: the host stays closed even if nothing renews the guard.
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
