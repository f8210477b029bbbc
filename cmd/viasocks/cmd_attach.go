package main

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdAttach = &command{
	name: "attach", args: "[OPTION...]", takes: config.Attach,
	short: "send a network namespace that exists, such as a container's, through the proxy",
	about: `Send what the programs in a network namespace send through the proxy, until SIGTERM, SIGINT or 'viasocks down' with
the same words, and then undo it. The namespace is that of a process (--pid), a container (--container) or a named one (--netns).
Connections from outside are answered directly, so that published ports work. The proxy is reached from the network in
which viasocks runs. If viasocks is killed the namespace stays closed until 'viasocks attach' or 'viasocks down'. Exit
status 4 when nobody uses the namespace any more. Needs root, or a namespace of the user's own, as rootless containers have.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		return exitOK, daemon.Attach(cfg, daemon.AttachOptions{Environ: env, Stderr: std.err, Version: shortVersion()})
	},
}
