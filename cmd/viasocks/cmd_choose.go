package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdExclude = &command{
	name: "exclude", args: "[OPTION...] [--] PROGRAM [ARGUMENT...]", takes: config.ExcludeProgram,
	short: "run a program without the proxy while 'up' carries the host",
	about: `Run PROGRAM so that its traffic, and that of its children, leaves the host without the proxy, while 'viasocks up'
carries everything else. It runs as the calling user, in this terminal, and its exit status is given on. Only root may
do this unless 'up' has --members-exclude. To have it the other way round, see 'viasocks include'.`,
	run: func(c *command, args, env []string, _ streams) (int, error) {
		return choose(c, args, env, (*control.Client).Exclude)
	},
}

var cmdInclude = &command{
	name: "include", args: "[OPTION...] [--] PROGRAM [ARGUMENT...]", takes: config.IncludeProgram,
	short: "run a program through the proxy although 'up' would not carry it",
	about: `Run PROGRAM so that 'viasocks up' carries its traffic, and that of its children, through the proxy although the
options of 'up' exclude it, such as its user, or do not include it. Connected private networks are reached as --lan
says. It runs as the calling user, in this terminal, and its exit status is given on. Root and members of
--control-group may do this.`,
	run: func(c *command, args, env []string, _ streams) (int, error) {
		return choose(c, args, env, (*control.Client).Include)
	},
}

// choose becomes the program of args. It returns only if it fails.
func choose(c *command, args, env []string, way func(*control.Client) error) (int, error) {
	cfg, err := c.parse(args, env)
	if err != nil {
		return 0, err
	}
	path, err := control.Path(cfg.StateDir)
	if err != nil {
		return exitCannotRun, err
	}
	client := control.NewClient(path)
	defer client.Close()
	return daemon.Choose(func() error { return way(client) }, cfg.Program, env)
}
