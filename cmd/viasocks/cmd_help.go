package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

var cmdHelp = &command{
	name: "help", args: "[COMMAND]",
	short: "show this, or the options of a command",
	about: "Show what there is, or the options of a command.",
}

func init() { cmdHelp.run = runHelp } // avoids an initialization cycle, because commands() names it

func runHelp(c *command, args, _ []string, std streams) (int, error) {
	if len(args) == 0 {
		return exitOK, writeOverview(std.out)
	}
	about := lookup(args[0])
	switch {
	case args[0] == "-h" || args[0] == "--help":
		return 0, config.ErrHelp
	case about == nil:
		return 0, &config.UsageError{Msg: noCommand(args[0])}
	case len(args) > 1:
		return 0, &config.UsageError{Msg: fmt.Sprintf("cannot use %q: help takes one command", args[1])}
	}
	return exitOK, writeHelp(std.out, about)
}

func writeOverview(out io.Writer) error {
	var w strings.Builder
	fmt.Fprint(&w, `viasocks carries the TCP and UDP of a program, or of the whole host, through a SOCKS5 proxy.

  viasocks run --proxy socks5://127.0.0.1:1080 -- curl https://example.org
  viasocks up  --proxy socks5://alice@10.0.0.1:1080 --password-file FILE

commands:
`)
	for _, c := range commands() {
		fmt.Fprintf(&w, "  %-10s %s\n", c.name, c.short)
	}
	fmt.Fprint(&w, "\n'viasocks help COMMAND' shows its options.\n"+manualNotice)
	_, err := io.WriteString(out, w.String())
	return err
}

func writeHelp(out io.Writer, c *command) error {
	var w strings.Builder
	fmt.Fprintf(&w, "usage: viasocks %s", c.name)
	if c.args != "" {
		fmt.Fprintf(&w, " %s", c.args)
	}
	fmt.Fprintf(&w, "\n\n%s\n", c.about)
	if c.takes != 0 {
		config.WriteHelp(&w, c.takes)
		fmt.Fprint(&w, manualNotice)
	}
	_, err := io.WriteString(out, w.String())
	return err
}
