package config

import "strings"

// checkTarget checks that a command about a network namespace names one.
func (c *Config) checkTarget() error {
	var given []string
	if c.PID != 0 {
		given = append(given, "--pid")
	}
	if c.NetNS != "" {
		given = append(given, "--netns")
	}
	switch {
	case c.Command == Attach && len(given) == 0:
		return usagef("cannot attach: no network namespace was given: name it with --pid PID or --netns NAME")
	case c.Command&(Attach|Down) != 0 && len(given) > 1:
		return usagef("cannot use %s together: each names a network namespace", strings.Join(given, " and "))
	}
	return nil
}

// HasTarget reports whether a network namespace was named.
func (c *Config) HasTarget() bool { return c.PID != 0 || c.NetNS != "" }
