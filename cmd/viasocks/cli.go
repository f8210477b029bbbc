package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
)

// Exit codes. After the start of its program, `run` returns the program's own.
const (
	exitOK      = 0
	exitNoStart = 1
	exitUsage   = 2
	exitDied    = 3
	exitEnded   = 4 // attach: the namespace is not used any more
	// exec returns this, as shells do, if it cannot run the program.
	exitCannotRun = 126
	manualNotice  = "Manual: viasocks(1) for every option, viasocks.conf(5) for the file and rules, viasocks(7) for recipes.\n"
)

// streams are files and not interfaces, because run passes them to the program.
type streams struct{ in, out, err *os.File }

// command is a subcommand. run gets the arguments after its name.
type command struct {
	name  string
	args  string // for the usage line
	short string // for the list of commands
	about string // for its own help
	takes config.Command
	run   func(c *command, args, env []string, std streams) (exit int, err error)
}

// commands returns the subcommands in the order of the help.
func commands() []*command {
	return []*command{
		cmdRun,
		cmdExec,
		cmdUp,
		cmdExclude,
		cmdInclude,
		cmdAttach,
		cmdDown,
		cmdConfirm,
		cmdUpgrade,
		cmdClose,
		cmdPs,
		cmdStatus,
		cmdFlows,
		cmdTop,
		cmdCapture,
		cmdDoctor,
		cmdHealth,
		cmdCheck,
		cmdCompletion,
		cmdVersion,
		cmdHelp,
	}
}

func lookup(name string) *command {
	for _, c := range commands() {
		if c.name == name {
			return c
		}
	}
	return nil
}

// otherWords are commands of other programs, and those of viasocks that do the same.
var otherWords = map[string]string{"start": "up", "stop": "down", "list": "ps"}

// noCommand says that there is no command of this name, and which one it may stand for.
func noCommand(name string) string {
	if meant, ok := otherWords[name]; ok {
		return fmt.Sprintf("cannot use %q: there is no such command (did you mean %s?)", name, meant)
	}
	var names []string
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return fmt.Sprintf("cannot use %q: there is no such command%s", config.Redact(name), config.DidYouMean(name, "", names))
}

// dispatch runs the subcommand of argv, prints its error on one line and returns the exit code.
func dispatch(argv, env []string, std streams) int {
	if len(argv) < 2 {
		_ = writeOverview(std.err)
		return exitUsage
	}
	name, args := argv[1], argv[2:]
	switch name {
	case "-h", "--help":
		name = "help"
	case "--version":
		name = "version"
	}
	c := lookup(name)
	if c == nil && strings.HasPrefix(name, "-") {
		const why = "a command comes before the options, as in 'viasocks run --proxy URL PROGRAM': see 'viasocks help'"
		fmt.Fprintf(std.err, "viasocks: cannot use %q: %s\n", config.Redact(name), why)
		return exitUsage
	}
	if c == nil {
		fmt.Fprintf(std.err, "viasocks: %s: see 'viasocks help'\n", noCommand(name))
		return exitUsage
	}
	exit, err := c.run(c, args, env, std)
	if errors.Is(err, config.ErrHelp) {
		exit, err = exitOK, writeHelp(std.out, c)
	}
	var wrote *fs.PathError
	if errors.As(err, &wrote) && wrote.Op == "write" && wrote.Path == std.out.Name() {
		err = fmt.Errorf("cannot write to %s: %w", wrote.Path, wrote.Err)
	}
	var usage *config.UsageError
	switch {
	case errors.As(err, &usage):
		hint := "viasocks help " + c.name
		if c == cmdHelp {
			hint = "viasocks help"
		}
		fmt.Fprintf(std.err, "viasocks: %s: see '%s'\n", printable(err), hint)
		return exitUsage
	case errors.Is(err, daemon.ErrDied):
		exit = exitDied
	case errors.Is(err, daemon.ErrNamespaceEnded):
		exit = exitEnded
	case err != nil && exit == exitOK:
		exit = exitNoStart
	}
	if err != nil {
		fmt.Fprintf(std.err, "viasocks: %s\n", printable(err))
	}
	return exit
}

// printable returns err as one line without passwords and without control characters.
func printable(err error) string { return control.Plain(config.Redact(err.Error())) }

// parse reads the options of a subcommand and wipes passwords from the process title.
func (c *command) parse(args, env []string) (*config.Config, error) {
	cfg, err := config.Parse(c.takes, args, env)
	if err == nil {
		config.WipeTitle(args[:len(args)-len(cfg.Program)])
	}
	return cfg, err
}

// noArgs checks that a command without arguments got none.
func noArgs(c *command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if args[0] == "-h" || args[0] == "--help" {
		return config.ErrHelp
	}
	return &config.UsageError{Msg: fmt.Sprintf("cannot use %q: %s takes no arguments", args[0], c.name)}
}
