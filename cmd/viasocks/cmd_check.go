package main

import (
	"fmt"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

var cmdCheck = &command{
	name: "check", args: "[OPTION...]", takes: config.Check,
	short: "say whether the options and the file are right, and touch nothing",
	about: "Check the options, the file and the environment as run and up would, and touch nothing.",
	run: func(c *command, args, env []string, std streams) (int, error) {
		cfg, err := c.parse(args, env)
		if err != nil {
			return 0, err
		}
		for _, w := range cfg.Warnings {
			fmt.Fprintf(std.err, "viasocks: %s\n", w)
		}
		_, err = fmt.Fprint(std.out, summary(cfg))
		return exitOK, err
	},
}

// summary says how the configuration was understood.
func summary(cfg *config.Config) string {
	var b strings.Builder
	for _, u := range cfg.Upstreams {
		login := ""
		if u.Server.HasCredentials() {
			login = ", with a user and a password"
		}
		fmt.Fprintf(&b, "upstream %s: %s%s\n", u.Name, u.Server, login)
	}
	for i := range cfg.Rules {
		fmt.Fprintf(&b, "rule %d: %s\n", i+1, &cfg.Rules[i])
	}
	rest := "refused"
	if cfg.Default != "" {
		rest = "via " + cfg.Default
	}
	fmt.Fprintf(&b, "everything else: %s\n", rest)
	for _, r := range cfg.DNS {
		fmt.Fprintf(&b, "dns: tcp://%s\n", r)
	}
	for _, l := range daemon.HostLines(cfg) {
		fmt.Fprintf(&b, "up: %s\n", l)
	}
	return b.String() + "ok\n"
}
