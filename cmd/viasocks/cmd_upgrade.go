package main

import (
	"fmt"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

var cmdUpgrade = &command{
	name: "upgrade", args: "[OPTION...]", takes: config.Upgrade,
	short: "let the program that is installed now take the host over, without a cut; needs root",
	about: `Tell the viasocks that is up to start the program that is installed now, with the arguments of its own start and
inside its service. The new process takes the host over as with 'viasocks up --takeover': no connection is cut, the host is
open at no time, and the old process carries its flows until they end or --takeover-limit is over. If the new one cannot
start, the old one goes on, and the exit status is 1. Nothing is downloaded. SIGUSR2 to the viasocks that is up does the
same.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		return ask(c, args, env, func(_ *config.Config, client *control.Client) error {
			pid, err := client.Upgrade()
			if err == nil {
				_, err = fmt.Fprintf(std.out, "process %d carries the host now\n", pid)
			}
			return err
		})
	},
}
