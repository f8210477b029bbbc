package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

var cmdStatus = &command{
	name: "status", args: "[OPTION...]", takes: config.Status,
	short: "show how the viasocks that is up, or one of 'run', is doing",
	about: `Show how the viasocks that is up in this network namespace is doing: its proxies and whether they work, what it
carries, what it did to the host, and what it refused. Exit status 1 if none is up. With --pid, show it of a program
under 'viasocks run': 'viasocks ps' lists them.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		return ask(c, args, env, func(cfg *config.Config, client *control.Client) error {
			s, err := client.Status()
			if err != nil {
				return err
			}
			if cfg.JSON {
				return control.WriteJSON(std.out, s)
			}
			return control.WriteStatus(std.out, s, time.Now())
		})
	},
}

var cmdFlows = &command{
	name: "flows", args: "[OPTION...]", takes: config.Flows,
	short: "list what the viasocks that is up, or one of 'run', carries",
	about: `List the TCP connections and UDP mappings that the viasocks that is up in this network namespace carries, those that
moved most bytes first. Of a mapping the first destination is shown. With --watch, print a line whenever something
happens to a flow, until interrupted. With --pid, list those of a program under
'viasocks run': 'viasocks ps' lists them.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		return ask(c, args, env, func(cfg *config.Config, client *control.Client) error {
			if cfg.Watch {
				return watch(client, std.out, cfg.JSON)
			}
			f, err := client.Flows(cfg.Limit)
			if err != nil {
				return err
			}
			if cfg.JSON {
				return control.WriteJSON(std.out, f)
			}
			return control.WriteFlows(std.out, f, time.Now())
		})
	},
}

var cmdConfirm = &command{
	name: "confirm", args: "[OPTION...]", takes: config.Confirm,
	short: "keep what 'up --confirm' would undo",
	about: "Keep what 'viasocks up --confirm TIME' would undo otherwise.",
	run: func(c *command, args, env []string, _ streams) (int, error) {
		return ask(c, args, env, func(_ *config.Config, client *control.Client) error { return client.Confirm() })
	},
}

// watch prints events until viasocks ends, which is an error, or nobody reads.
func watch(client *control.Client, out *os.File, asJSON bool) error {
	return client.Watch(context.Background(), func(e control.Event) error {
		if asJSON {
			return control.WriteJSONLine(out, e)
		}
		return control.WriteEvent(out, e)
	})
}

// ask parses the options and passes f a client of the viasocks that they select.
func ask(c *command, args, env []string, f func(*config.Config, *control.Client) error) (int, error) {
	cfg, err := c.parse(args, env)
	if err != nil {
		return 0, err
	}
	client, err := clientOf(cfg, env)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	return exitOK, noneThere(cfg, f(cfg, client))
}

// noneThere replaces the error that no viasocks is up here, if the user has said in which state directory to look.
func noneThere(cfg *config.Config, err error) error {
	if cfg.PID != 0 || !cfg.Given("state-dir") || !errors.Is(err, control.ErrNoDaemon) {
		return err
	}
	return fmt.Errorf(
		"cannot ask viasocks: none is up in this network namespace with --state-dir %s: give the directory that it was "+
			"started with; 'viasocks ps' lists programs under 'viasocks run'",
		cfg.StateDir,
	)
}

// clientOf returns a client of the viasocks that --pid selects, or of the daemon in this namespace.
func clientOf(cfg *config.Config, env []string) (*control.Client, error) {
	path, err := control.Path(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	if cfg.PID != 0 {
		return control.Find(control.RuntimeOf(env), path, cfg.PID)
	}
	return control.NewClient(path), nil
}
