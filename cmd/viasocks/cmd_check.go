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
		if len(cfg.Import) > 0 {
			return exitOK, importSocks(cfg.Import, std)
		}
		for _, w := range cfg.Warnings {
			fmt.Fprintf(std.err, "viasocks: %s\n", control.Plain(w))
		}
		text := explain(cfg)
		if len(cfg.RuleFor) == 0 {
			text = summary(cfg)
		}
		_, err = fmt.Fprint(std.out, text)
		return exitOK, err
	},
}

// importSocks prints configuration lines for files of Traffic Server.
func importSocks(paths []string, std streams) error {
	lines, err := config.ImportSocks(paths)
	if err != nil {
		return err
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(std.out, control.Plain(l)); err != nil {
			return err
		}
	}
	return nil
}

// summary describes how the configuration was understood.
func summary(cfg *config.Config) string {
	var b strings.Builder
	line := func(format string, a ...any) { b.WriteString(control.Plain(fmt.Sprintf(format, a...)) + "\n") }
	for _, u := range cfg.Upstreams {
		for i, s := range u.Servers() {
			login, name := "", "upstream "+u.Name
			if s.HasCredentials() {
				login = ", with a user and a password"
			}
			if len(u.More) > 0 {
				name += fmt.Sprintf(", %s, server %d", u.Group.Select, i+1)
			}
			how := ""
			if u.Via != "" {
				how = ", reached via " + u.Via + " (TCP only)"
			}
			line("%s: %s%s%s", name, s, login, how)
		}
	}
	for i := range cfg.Rules {
		line("rule %d: %s", i+1, &cfg.Rules[i])
	}
	rest := "refused"
	if cfg.Default != "" {
		rest = "via " + cfg.Default
	}
	line("everything else: %s", rest)
	if cfg.Fake.On {
		line("dns: fake: names get addresses of %s and travel to the proxy; the resolvers are for other questions", cfg.Fake.Pool)
	}
	if cfg.DNSOff {
		line("dns: off: port 53 is a port like others")
	}
	if cfg.Relay {
		line(
			"dns: relay: questions go to the server that the program asks; " +
				"the resolvers are for those to an address that is nobody's",
		)
	}
	for _, r := range cfg.DNS {
		how := ""
		if cfg.ResolverDefault == route.DirectName {
			how = ", past every proxy unless a rule says otherwise"
		}
		line("dns: %s%s", r, how)
	}
	for _, z := range cfg.Split.Zones {
		line("dns for %s", z)
	}
	for _, l := range daemon.HostLines(cfg) {
		line("up: %s", l)
	}
	return b.String() + "ok\n"
}

// explain tells for each flow that the user asks about which rule decides.
func explain(cfg *config.Config) string {
	var b strings.Builder
	line := func(format string, a ...any) { b.WriteString(control.Plain(fmt.Sprintf(format, a...)) + "\n") }
	for _, f := range cfg.RuleFor {
		line("%s", f.Text)
		steps, decides, early := route.Explain(cfg.Rules, f.Flow)
		told := "verdict"
		for i, s := range steps {
			if s.Unknown {
				told = "verdict, as far as it is known"
			}
			line("  rule %d: %s: %s", i+1, &cfg.Rules[i], s.Why)
		}
		switch {
		case early != "":
			line("verdict: %s, before any rule", early)
		case decides >= 0:
			line("%s: rule %d decides: %s", told, decides+1, cfg.Rules[decides].Verdict())
		case cfg.Default != "":
			line("%s: no rule matches: via %s", told, cfg.Default)
		default:
			line("%s: no rule matches, and there is no default: it is refused", told)
		}
	}
	return b.String()
}
