package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdRun = &command{
	name: "run", args: "[OPTION...] [--] PROGRAM [ARGUMENT...]", takes: config.Run,
	short: "run one program through the proxy; needs no root",
	about: `Run PROGRAM in a network namespace of its own, from which everything goes through the proxy. It keeps its user,
terminal, files and arguments; its exit status is given on. Needs no root where user namespaces are allowed.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		return daemon.Run(cfg, daemon.RunOptions{
			Environ: env, Stdin: std.in, Stdout: std.out, Stderr: std.err, Version: shortVersion(),
		})
	},
}
