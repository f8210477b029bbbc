package main

import (
	"slices"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdUp = &command{
	name: "up", args: "[OPTION...]", takes: config.Up,
	short: "send the whole host through the proxy until stopped; needs root",
	about: `Send what the whole host sends through the proxy, until SIGTERM, SIGINT or 'viasocks down', and then undo it. Private
networks that the host is connected to are reached directly, and connections from outside (SSH) are answered directly.
If viasocks is killed the host stays closed until 'viasocks up' or 'viasocks down'. SIGHUP reads the configuration file
again. Over SSH, try it with --confirm 60s first.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		// The arguments are needed again at a reload, but the originals are about to lose their passwords.
		again := slices.Clone(args)
		for i := range again {
			again[i] = strings.Clone(again[i])
		}
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		if cfg.Host.DryRun {
			return exitOK, daemon.DryRun(cfg, std.out, std.err)
		}
		return exitOK, daemon.Up(cfg, daemon.UpOptions{
			Again: func() (*config.Config, error) { return cfg.Again(again, env) },
			Args:  again, Environ: env, Stderr: std.err, Version: shortVersion(),
		})
	},
}
