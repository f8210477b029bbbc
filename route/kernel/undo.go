package kernel

import (
	"fmt"
	"os"
)

// Undo is `down` without a daemon. It works from the journal or, if that is missing or corrupt, from the names in c
// (TUN, NFTable, Priority, Marks, Dir; zero fields mean the defaults) and our protocol number, and removes only what
// is ours. ErrRunning means that the daemon is alive. removed contains a line for each thing that was removed.
func Undo(c Config) (removed []string, err error) {
	if c.TUN == "" {
		c.TUN = DefaultTUN
	}
	c, _ = c.withDefaults()
	h, err := open(c)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	j, err := readJournal(h.path)
	if err != nil {
		h.c.Log.Warn("our changes are found by their marks", "err", err)
		if _, serr := os.Stat(h.path); serr == nil {
			removed = append(removed, "journal that could not be read")
		}
	}
	corrupt := err != nil
	if j != nil {
		h.j = *j
		h.c.TUN, h.c.Table, h.c.Priority, h.c.NFTable, h.c.Marks = j.TUN, j.Table, j.Priority, j.NFTable, j.Marks
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if j == nil {
		h.recallSysctls()
	}
	lines, err := h.removeSteering()
	removed = append(removed, lines...)
	if err != nil {
		return removed, fmt.Errorf("cannot undo everything: %w", err)
	}
	tables, _ := h.ourTables()
	k, kerr := h.nl.LinkByName(h.c.TUN)
	ours := kerr == nil && (k.Attrs().Alias == alias || j != nil || corrupt && len(lines)+len(tables) > 0)
	lines, err = h.restore(ours)
	removed = append(removed, lines...)
	if err != nil {
		return removed, fmt.Errorf("cannot undo everything: %w", err)
	}
	return removed, nil
}

// LeftTUN returns the name of the TUN device that a killed daemon has left, from its journal or else from c.
func LeftTUN(c Config) string {
	if c.TUN == "" {
		c.TUN = DefaultTUN
	}
	c, _ = c.withDefaults()
	path, _, err := paths(c.Dir)
	if err != nil {
		return c.TUN
	}
	if j, err := readJournal(path); err == nil && j != nil {
		return j.TUN
	}
	return c.TUN
}
