package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Subcommand is what a completion script must know about a subcommand.
type Subcommand struct {
	Name, Short string
	Takes       Command // 0: none of the options in Options
	Program     bool    // a program and its arguments follow the options
	Words       []string
}

// Shells are the shells that WriteCompletion supports.
var Shells = []string{"bash", "zsh", "fish"}

// WriteCompletion writes a script with which a shell completes subcommands, options and the values of options. shell
// is one of Shells.
func WriteCompletion(w io.Writer, shell string, commands []Subcommand) error {
	var b strings.Builder
	switch shell {
	case "bash":
		bashCompletion(&b, commands)
	case "zsh":
		zshCompletion(&b, commands)
	case "fish":
		fishCompletion(&b, commands)
	default:
		return usagef("cannot complete for %q: the shell must be %s", shell, strings.Join(Shells, ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// valueKind tells how the value of an option is completed.
type valueKind uint8

const (
	noValue valueKind = iota
	anyValue
	fileValue
	dirValue
	userValue
	groupValue
	wordValue
)

// values tells how the value of an option is completed, and which words it can be.
func (o *Option) values() (valueKind, []string) {
	switch {
	case o.Arg == "":
		return noValue, nil
	case o.Arg == "LEVEL":
		return wordValue, []string{"debug", "info", "warn", "error"}
	case strings.Contains(o.Arg, "|") && o.Arg == strings.ToLower(o.Arg):
		return wordValue, strings.Split(o.Arg, "|")
	case strings.HasSuffix(o.Arg, "FILE"):
		return fileValue, nil
	case o.Arg == "DIR":
		return dirValue, nil
	case strings.HasPrefix(o.Arg, "USER|"):
		return userValue, nil
	case o.Arg == "GROUP":
		return groupValue, nil
	}
	return anyValue, nil
}

// optionsOf returns the options of a subcommand, and help, which every subcommand has.
func optionsOf(c Subcommand) []Option {
	var list []Option
	for _, o := range Options {
		if o.takes(c.Takes) {
			list = append(list, o)
		}
	}
	return append(list, Option{Name: "help", Help: "show the options"})
}

func bashCompletion(b *strings.Builder, commands []Subcommand) {
	fmt.Fprint(b, `# bash completion for viasocks, written by "viasocks completion bash".
_viasocks() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} i
	if [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
	if [[ $cur == = ]]; then cur=; prev=${COMP_WORDS[COMP_CWORD-1]}; [[ $prev != = ]] || prev=${COMP_WORDS[COMP_CWORD-2]}; fi
	COMPREPLY=()
	if ((COMP_CWORD == 1)); then
`)
	names := make([]string, 0, len(commands))
	for _, c := range commands {
		names = append(names, c.Name)
	}
	fmt.Fprintf(b, "\t\tCOMPREPLY=($(compgen -W '%s' -- \"$cur\"))\n\t\treturn\n\tfi\n", strings.Join(names, " "))
	fmt.Fprint(b, "\tlocal options takes=' '\n\tcase ${COMP_WORDS[1]} in\n")
	for _, c := range commands {
		var all, takes []string
		for _, o := range optionsOf(c) {
			all = append(all, "--"+o.Name)
			if o.Arg != "" {
				takes = append(takes, "--"+o.Name)
			}
		}
		fmt.Fprintf(b, "\t%s) options='%s' takes=' %s '", c.Name, strings.Join(append(all, c.Words...), " "),
			strings.Join(takes, " "))
		if c.Program {
			fmt.Fprint(b, "; _viasocks_program && return")
		}
		fmt.Fprint(b, " ;;\n")
	}
	fmt.Fprint(b, "\t*) return ;;\n\tesac\n\tcase $prev in\n")
	bashValues(b)
	fmt.Fprint(b, `	esac
	[[ $takes == *" $prev "* ]] || COMPREPLY=($(compgen -W "$options" -- "$cur"))
}
# _viasocks_program completes the program of run and its arguments, and fails before them.
_viasocks_program() {
	for ((i = 2; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		--) ((i++)); break ;;
		--*) if [[ $takes == *" ${COMP_WORDS[i]} "* ]]; then ((i++)); [[ ${COMP_WORDS[i]} != = ]] || ((i++)); fi ;;
		*) break ;;
		esac
	done
	if ((i > COMP_CWORD)); then return 1; fi
	if ((i < COMP_CWORD)); then
		COMPREPLY=($(compgen -f -- "$cur"))
	elif [[ $cur == -* && ${COMP_WORDS[i-1]} != -- ]]; then
		return 1
	else
		COMPREPLY=($(compgen -c -- "$cur"))
	fi
}
complete -o filenames -F _viasocks viasocks
`)
}

// bashValues writes how the values of options are completed.
func bashValues(b *strings.Builder) {
	byValue := map[string][]string{}
	var order []string
	for _, o := range Options {
		reply := ""
		switch kind, words := o.values(); kind {
		case wordValue:
			reply = "compgen -W '" + strings.Join(words, " ") + "'"
		case fileValue:
			reply = "compgen -f"
		case dirValue:
			reply = "compgen -d"
		case userValue:
			reply = "compgen -u"
		case groupValue:
			reply = "compgen -g"
		default:
			continue
		}
		if byValue[reply] == nil {
			order = append(order, reply)
		}
		byValue[reply] = append(byValue[reply], "--"+o.Name)
	}
	for _, reply := range order {
		fmt.Fprintf(b, "\t%s) COMPREPLY=($(%s -- \"$cur\")); return ;;\n", strings.Join(slices.Compact(byValue[reply]), "|"),
			reply)
	}
}

func zshCompletion(b *strings.Builder, commands []Subcommand) {
	quote := strings.NewReplacer("'", `'\''`, "[", `\[`, "]", `\]`, ":", `\:`)
	fmt.Fprint(b, `#compdef viasocks
# zsh completion for viasocks, written by "viasocks completion zsh".
_viasocks() {
	local -a commands
	commands=(
`)
	for _, c := range commands {
		fmt.Fprintf(b, "\t\t'%s:%s'\n", c.Name, quote.Replace(c.Short))
	}
	fmt.Fprint(b, `	)
	if ((CURRENT == 2)); then
		_describe command commands
		return
	fi
	local command=$words[2]
	shift words
	((CURRENT--))
	case $command in
`)
	for _, c := range commands {
		fmt.Fprintf(b, "\t%s)\n\t\t_arguments -S", c.Name)
		for _, o := range optionsOf(c) {
			fmt.Fprintf(b, " \\\n\t\t\t'%s'", zshOption(&o, c.Takes, quote))
		}
		switch {
		case c.Program:
			fmt.Fprint(b, " \\\n\t\t\t'*::program:_normal'")
		case len(c.Words) > 0:
			fmt.Fprintf(b, " \\\n\t\t\t':%s:(%s)'", c.Name, strings.Join(c.Words, " "))
		}
		fmt.Fprint(b, "\n\t\t;;\n")
	}
	fmt.Fprint(b, `	esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _viasocks "$@"; else compdef _viasocks viasocks; fi
`)
}

// zshOption returns an argument of _arguments for an option.
func zshOption(o *Option, cmd Command, quote *strings.Replacer) string {
	many, equals, spec := "", "=", ":"+o.Name+":"
	if o.Many {
		many = "*"
	}
	switch kind, words := o.values(); kind {
	case noValue:
		equals, spec = "", ""
	case wordValue:
		spec += "(" + strings.Join(words, " ") + ")"
	case fileValue:
		spec += "_files"
	case dirValue:
		spec += "_directories"
	case userValue:
		spec += "_users"
	case groupValue:
		spec += "_groups"
	default:
		spec = ":" + quote.Replace(o.Arg) + ": "
	}
	return many + "--" + o.Name + equals + "[" + quote.Replace(o.helpFor(cmd)) + "]" + spec
}

func fishCompletion(b *strings.Builder, commands []Subcommand) {
	quote := strings.NewReplacer(`\`, `\\`, "'", `\'`)
	fmt.Fprint(b, "# fish completion for viasocks, written by \"viasocks completion fish\".\ncomplete -c viasocks -f\n")
	for _, c := range commands {
		fmt.Fprintf(b, "complete -c viasocks -n __fish_use_subcommand -a %s -d '%s'\n", c.Name, quote.Replace(c.Short))
	}
	for _, c := range commands {
		within := "complete -c viasocks -n '__fish_seen_subcommand_from " + c.Name + "'"
		for _, o := range optionsOf(c) {
			value := ""
			switch kind, words := o.values(); kind {
			case noValue:
			case wordValue:
				value = " -x -a '" + strings.Join(words, " ") + "'"
			case fileValue:
				value = " -r -F"
			case dirValue:
				value = " -x -a '(__fish_complete_directories)'"
			case userValue:
				value = " -x -a '(__fish_complete_users)'"
			case groupValue:
				value = " -x -a '(__fish_complete_groups)'"
			default:
				value = " -x"
			}
			fmt.Fprintf(b, "%s -l %s -d '%s'%s\n", within, o.Name, quote.Replace(o.helpFor(c.Takes)), value)
		}
		switch {
		case c.Program:
			fmt.Fprintf(b, "%s -a '(__fish_complete_subcommand)'\n", within)
		case len(c.Words) > 0:
			fmt.Fprintf(b, "%s -a '%s'\n", within, strings.Join(c.Words, " "))
		}
	}
}
