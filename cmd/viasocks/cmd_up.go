package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdUp = &command{
	name: "up", args: "[OPTION...]", takes: config.Up,
	short: "send the whole host through the proxy until interrupted; needs root",
	about: `Send what the whole host sends through the proxy, except to private networks that it is connected to, until
SIGTERM or SIGINT, and then undo it. This form does not protect against leaks after a kill -9, cuts connections that
come from outside (SSH from another network!), and lets sockets bound to a device pass: see LIMITATIONS in viasocks(1).`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		return exitOK, daemon.Up(cfg, std.err)
	},
}
