package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdDown = &command{
	name: "down", args: "[OPTION...]", takes: config.Down,
	short: "restore the host, whether viasocks is up or was killed; needs root",
	about: `Give the host back. A viasocks that is up is told to stop, and waited for. What one left behind that was killed is
undone by its journal, or where there is none by the marks of what is ours; nothing else is touched. Prints what it
removed. The options need to be given only if 'up' had others and the journal is lost. With --pid or --netns, a network
namespace that 'viasocks attach' steers is given back.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		if cfg.HasTarget() {
			return exitOK, daemon.Detach(cfg, env, std.out, std.err)
		}
		return exitOK, daemon.Down(cfg, env, std.out)
	},
}

var cmdClose = &command{
	name: "close", args: "[OPTION...]", takes: config.Up,
	short: "refuse what 'up' would carry, until up or down; needs root",
	about: `Close the host: what 'viasocks up' with these options would carry is refused, what it would let pass passes. It stays
so until 'viasocks up' or 'viasocks down'. Made for the boot, before there is a network: see viasocks-closed.service.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		return exitOK, daemon.Shut(cfg, std.err)
	},
}
