package main

import (
	"fmt"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

var cmdCompletion = &command{
	name: "completion", args: "bash|zsh|fish",
	short: "print a completion script for a shell",
	about: `Print a script with which a shell completes the commands, the options and their values:

  source <(viasocks completion bash)       in ~/.bashrc
  source <(viasocks completion zsh)        in ~/.zshrc, after compinit
  viasocks completion fish >~/.config/fish/completions/viasocks.fish`,
}

func init() { cmdCompletion.run = runCompletion } // avoids an initialization cycle, because commands() names it

func runCompletion(c *command, args, _ []string, std streams) (int, error) {
	if len(args) == 1 && (args[0] == "-h" || args[0] == "--help") {
		return 0, config.ErrHelp
	}
	if len(args) != 1 {
		return 0, &config.UsageError{Msg: fmt.Sprintf("cannot complete: name one shell of %s", strings.Join(config.Shells, ", "))}
	}
	var known []config.Subcommand
	for _, about := range commands() {
		k := config.Subcommand{
			Name:    about.name,
			Short:   about.short,
			Takes:   about.takes,
			Program: about.takes.RunsProgram(),
		}
		switch about {
		case cmdCompletion:
			k.Words = config.Shells
		case cmdHelp:
			for _, other := range commands() {
				k.Words = append(k.Words, other.name)
			}
		}
		known = append(known, k)
	}
	return exitOK, config.WriteCompletion(std.out, args[0], known)
}
