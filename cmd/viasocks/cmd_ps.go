package main

import (
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

var cmdPs = &command{
	name: "ps", args: "[OPTION...]", takes: config.Ps,
	short: "list the programs under 'run', and the viasocks that is up",
	about: `List the instances of viasocks that you may ask: the programs under 'viasocks run' of your own, for root those of all
users, and the viasocks that is up in this network namespace. Their process ids are for --pid of status and flows.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		path, err := control.Path(cfg.StateDir)
		if err != nil {
			return 0, err
		}
		all := control.Instances(control.RuntimeOf(env), path)
		if cfg.JSON {
			return exitOK, control.WriteJSON(std.out, all)
		}
		return exitOK, control.WriteInstances(std.out, all, time.Now())
	},
}
