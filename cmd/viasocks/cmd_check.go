package main

import (
	"fmt"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/route"
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
			fmt.Fprintf(std.err, "viasocks: %s\n", control.Plain(w))
		}
		_, err = fmt.Fprint(std.out, summary(cfg))
		return exitOK, err
	},
}

// summary says how the configuration was understood.
func summary(cfg *config.Config) string {
	var b strings.Builder
	line := func(format string, a ...any) { b.WriteString(control.Plain(fmt.Sprintf(format, a...)) + "\n") }
	for _, u := range cfg.Upstreams {
		login := ""
		if u.Server.HasCredentials() {
			login = ", with a user and a password"
		}
		line("upstream %s: %s%s", u.Name, u.Server, login)
	}
	for i := range cfg.Rules {
		line("rule %d: %s", i+1, &cfg.Rules[i])
	}
	rest := "refused"
	if cfg.Default != "" {
		rest = "via " + cfg.Default
	}
	line("everything else: %s", rest)
	for _, r := range cfg.DNS {
		how := ""
		if cfg.ResolverDefault == route.DirectName {
			how = ", past every proxy unless a rule says otherwise"
		}
		line("dns: tcp://%s%s", r, how)
	}
	for _, l := range daemon.HostLines(cfg) {
		line("up: %s", l)
	}
	return b.String() + "ok\n"
}
