package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// WriteHelp writes the option section of a subcommand's help, or nothing if it has no options.
func WriteHelp(w io.Writer, cmd Command) {
	const column = 38
	if !slices.ContainsFunc(Options, func(o Option) bool { return o.Cmds&cmd != 0 }) {
		fmt.Fprintln(w)
		return
	}
	fmt.Fprint(w, "\noptions:\n")
	for _, o := range Options {
		if o.Cmds&cmd == 0 {
			continue
		}
		left := "  --" + o.Name
		if o.Arg != "" {
			left += " " + o.Arg
		}
		if len(left) > column-2 {
			fmt.Fprintf(w, "%s\n", left)
			left = ""
		}
		fmt.Fprintf(w, "%-*s%s", column, left, o.helpFor(cmd))
		if o.Default != "" {
			fmt.Fprintf(w, " [%s]", o.Default)
		}
		if o.Many {
			fmt.Fprint(w, ", repeatable")
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
	if find(fileOption).Cmds&cmd != 0 {
		fmt.Fprintln(w, "Each option is also a variable (VIASOCKS_PROXY for --proxy) and a line of the file of --config.")
	} else {
		fmt.Fprintln(w, "Each option is also a variable (VIASOCKS_STATE_DIR for --state-dir).")
	}
}

// helpFor returns the line of the help of a command.
func (o *Option) helpFor(cmd Command) string {
	if cmd&(Attach|Down) != 0 && o.Steered != "" {
		return o.Steered
	}
	return o.Help
}

// commands returns the names of the commands in cmd for .Cm. check appears only alone, because it takes what the
// others take.
func commands(cmd Command) string {
	if cmd == Check {
		return "check"
	}
	var names []string
	for _, c := range commandNames {
		if cmd&c.cmd != 0 {
			names = append(names, c.name)
		}
	}
	return strings.Join(names, " , ")
}

// WriteMan writes the list of all options for the manual, in mdoc, with a subsection for each group.
func WriteMan(w io.Writer) {
	for _, g := range optionGroups {
		fmt.Fprintf(w, ".Ss %s\n.Bl -tag -width Ds\n", g.title)
		for _, o := range g.options {
			o.writeMan(w)
		}
		fmt.Fprintln(w, ".El")
	}
}

func (o *Option) writeMan(w io.Writer) {
	fmt.Fprintf(w, ".It Fl -%s", o.Name)
	if o.Arg != "" {
		fmt.Fprintf(w, " Ar %s", o.Arg)
	}
	fmt.Fprintf(w, "\n%s\n", o.Man)
	if o.Cmds&all != all {
		fmt.Fprintln(w, "Only for\n.Cm "+commands(o.Cmds)+" .")
	}
	if o.Many {
		fmt.Fprintln(w, "May be given more than once.")
	}
	if !o.Live && o.Cmds&Up != 0 && o.set != nil {
		fmt.Fprintln(w, "A reload does not change it.")
	}
	if o.Default != "" {
		fmt.Fprintf(w, "The default is\n.Li %s .\n", strings.ReplaceAll(o.Default, `\`, `\e`))
	}
}
