package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdExec = &command{
	name: "exec", args: "NAME|PID [--] PROGRAM [ARGUMENT...]", takes: config.Exec,
	short: "run another program in the network of one under 'run'",
	about: `Run PROGRAM in the namespaces of a program of yours that is under 'viasocks run': it has the same network and the same
name servers. NAME is that of --name, PID the process id that 'viasocks ps' shows. The program's exit status is given on. It is
left alone when the first program ends, and has no network then. nsenter (util-linux) must be installed.`,
	run: func(c *command, args, env []string, _ streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		all := control.OwnInstances(control.RuntimeOf(env))
		return daemon.Exec(cfg.Instance, cfg.Program, all, env)
	},
}
