package kernel

import (
	"fmt"
	"os"
)

// Undo is `down` without a daemon: from the journal, and without one, or with a corrupt one, by what is named in c (TUN,
// NFTable, Priority, Marks, Dir; zero fields: defaults) and by our protocol number, it removes what is ours and nothing
// else. ErrRunning: the daemon lives. It returns a line for each thing that it removed.
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

// LeftTUN is the name of the TUN device that a daemon which was killed has left: by its journal, or else the one of c.
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
