package main

import (
	"context"
	"fmt"
	"os/signal"
	"syscall"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/doctor"
)

var cmdDoctor = &command{
	name: "doctor", args: "[OPTION...] | --serve [ADDRESS:PORT...]", takes: config.Doctor,
	short: "find out why it does not work, and what mends it",
	about: `Look at this host and at the proxy, and say for each thing whether it works, what that means for programs, and which
command or option mends it. Takes 20 seconds at most and changes nothing. Exit status 1 if there is a fault.

  viasocks doctor                                          this host, and the proxy of VIASOCKS_PROXY
  viasocks doctor --proxy socks5://10.0.0.1:1080           this host and a proxy
  sudo viasocks doctor --config /etc/viasocks/viasocks.conf
                                                           what 'viasocks up' needs, too

Speed, UDP and some other things need a far end: a host of yours that the proxy can reach.

  viasocks doctor --serve                                  there, until stopped
  viasocks doctor --proxy socks5://10.0.0.1:1080 --peer vps.example.org

No other host is contacted. All options of run and up may be given, too, so that what they would do is examined.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		if cfg.Serve {
			return exitOK, doctor.Serve(ctx, cfg, std.out)
		}
		for _, w := range cfg.Warnings {
			fmt.Fprintf(std.err, "viasocks: %s\n", control.Plain(w))
		}
		r := doctor.Examine(ctx, doctor.Options{Config: cfg, Environ: env})
		if ctx.Err() != nil {
			return exitNoStart, nil
		}
		if cfg.JSON {
			err = control.WriteJSON(std.out, r)
		} else {
			err = doctor.WriteText(std.out, r)
		}
		if r.Faults > 0 {
			return exitNoStart, err
		}
		return exitOK, err
	},
}
