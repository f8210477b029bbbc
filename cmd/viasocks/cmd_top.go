package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/top"
)

var cmdTop = &command{
	name: "top", args: "[OPTION...]", takes: config.Top,
	short: "watch upstreams, flows and their rates in the terminal",
	about: `Show what viasocks carries as it happens: its upstreams with their health and latency, and its flows with program,
destination, state, rate and age. The viasocks that is up in this network namespace is shown, or that of your program under
'viasocks run' if it is the only one and no --state-dir is given; --pid chooses one of several. Keys: s sorts, / filters,
p pauses, ? helps, q quits.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		client, err := clientOf(cfg, env)
		if err != nil {
			return 0, err
		}
		defer func() { client.Close() }()
		if cfg.PID == 0 {
			if _, err := client.Status(); errors.Is(err, control.ErrNoDaemon) {
				if cfg.Given("state-dir") {
					return 0, noneThere(cfg, err)
				}
				only, err := onlyInstance(cfg, env)
				if err != nil {
					return 0, err
				}
				client.Close()
				client = only
			}
		}
		return exitOK, top.Run(client, top.Terminal{In: std.in, Out: std.out, Environ: env})
	},
}

// onlyInstance returns a client of the caller's only program under `run`. If there is none, or more than one, it returns an
// error.
func onlyInstance(cfg *config.Config, env []string) (*control.Client, error) {
	runtime := control.RuntimeOf(env)
	path, err := control.Path(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	all := control.OwnInstances(runtime)
	switch len(all) {
	case 0:
		return nil, errors.New("cannot ask viasocks: it is not up here, and none of your programs is under 'viasocks run'")
	case 1:
		return control.Find(runtime, path, all[0].PID)
	}
	var pids []string
	for _, i := range all[:min(len(all), 5)] {
		pids = append(pids, fmt.Sprintf("%d (%s)", i.PID, i.Program))
	}
	return nil, fmt.Errorf(
		"cannot choose among %d programs under 'viasocks run': give --pid: %s; 'viasocks ps' lists them",
		len(all),
		strings.Join(pids, ", "),
	)
}
