package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

var cmdHealth = &command{
	name: "health", args: "[OPTION...]", takes: config.Health,
	short: "say whether traffic passes, for containers and monitors",
	about: `Say in one line whether traffic passes: the data plane lives, the host is steered, and the proxy can be reached and
lets viasocks in. Exit status 0 if it does, 1 if not; it takes two seconds at most. Asked is the viasocks that is up,
or else your only program under 'viasocks run'; --pid names another.

  viasocks health && echo fine
  HEALTHCHECK --interval=30s --timeout=3s CMD ["viasocks", "health"]      (in a Containerfile)`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		path, err := control.Path(cfg.StateDir)
		if err != nil {
			return 0, err
		}
		h := control.CheckHealth(control.RuntimeOf(env), path, cfg.PID)
		if cfg.JSON {
			err = control.WriteJSON(std.out, h)
		} else {
			err = control.WriteHealth(std.out, h)
		}
		if !h.Healthy {
			return exitNoStart, err
		}
		return exitOK, err
	},
}
