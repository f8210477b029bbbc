package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"

	"github.com/spf13/pflag"
)

// ErrHelp means that --help was given; the caller prints the help.
var ErrHelp = pflag.ErrHelp

// UsageError is a mistake in the flags or in the file, as opposed to a failed operation.
type UsageError struct{ Msg string }

func (e *UsageError) Error() string { return e.Msg }

func usagef(format string, a ...any) error { return &UsageError{fmt.Sprintf(format, a...)} }

// value is the value given for an option, and its place.
type value struct {
	name, text string
	where      string // "--mtu 9" or "FILE:3: mtu 9", without secrets
}

func (v value) err(format string, a ...any) error {
	return usagef("cannot use %s: %s", Redact(v.where), Redact(fmt.Sprintf(format, a...)))
}

// given implements pflag.Value. It only collects values. They are checked later, where an error can be reported
// without showing a password.
type given struct {
	opt  *Option
	into map[string][]value
}

func (g given) Set(s string) error {
	v := value{g.opt.Name, strings.Clone(s), "--" + g.opt.Name + " " + quote(s)}
	if g.opt.Arg == "" {
		v.where = "--" + g.opt.Name + "=" + s
	}
	if g.opt.Many {
		g.into[v.name] = append(g.into[v.name], v)
	} else {
		g.into[v.name] = []value{v}
	}
	return nil
}
func (g given) String() string   { return "" }
func (g given) Type() string     { return g.opt.Arg }
func (g given) IsBoolFlag() bool { return g.opt.Arg == "" }

// Again parses everything again for a daemon that was started with c. The new Config is what the daemon will do:
// options that a reload does not change have the values of c, and NeedRestart names those that would differ.
func (c *Config) Again(args, env []string) (*Config, error) { return parse(c.Command, args, env, c) }

// Parse parses the arguments of a subcommand, the file that they name, and the environment (in the form of
// os.Environ), and checks everything. It touches nothing except the named files. The error is ErrHelp, a *UsageError,
// or the failure.
func Parse(cmd Command, args, env []string) (*Config, error) { return parse(cmd, args, env, nil) }

// parse is Parse. running is the configuration with which a daemon was started, or nil.
func parse(cmd Command, args, env []string, running *Config) (*Config, error) {
	flags, words, err := parseFlags(cmd, args)
	if err != nil {
		return nil, err
	}
	c := blank()
	c.Command, c.Program = cmd, words
	if cmd == Exec {
		if err := c.takeInstance(); err != nil {
			return nil, err
		}
	}
	if cmd.RunsProgram() && (len(c.Program) == 0 || c.Program[0] == "") {
		return nil, usagef("cannot %s: no program was given", commandName(cmd))
	}
	var behind []string
	if cmd == Doctor || cmd == Capture {
		behind, c.Program = c.Program, nil
	}
	if !cmd.RunsProgram() && len(c.Program) > 0 {
		return nil, usagef("cannot use %q: unexpected argument", c.Program[0])
	}

	fromEnv, err := c.readEnv(env)
	if err != nil {
		return nil, err
	}
	file := map[string][]value{}
	if v := firstGiven(flags[fileOption], fromEnv[fileOption]); v != nil {
		c.File = v[0].text
		if file, err = c.readFile(c.File); err != nil {
			return nil, err
		}
	}
	given := func(option string) []value { return firstGiven(flags[option], fromEnv[option], file[option]) }
	if err := c.build(given, env, running); err != nil {
		return nil, err
	}
	if cmd == Doctor {
		if err := c.setServeAt(behind); err != nil {
			return nil, err
		}
	}
	if cmd == Capture {
		if err := c.setCaptureFile(behind); err != nil {
			return nil, err
		}
	}
	c.warnOfVariables()
	return c, nil
}

// parseFlags returns the options of the command line and the words behind them.
func parseFlags(cmd Command, args []string) (flags map[string][]value, words []string, err error) {
	flags = map[string][]value{}
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.Usage = func() {}
	// The program's own flags begin after the first word that is not ours.
	set.SetInterspersed(!cmd.RunsProgram())
	for i := range Options {
		o := &Options[i]
		if !o.takes(cmd) {
			continue
		}
		f := set.VarPF(given{o, flags}, o.Name, "", "")
		if o.Arg == "" {
			f.NoOptDefVal = "true"
		}
	}
	if err := set.Parse(args); errors.Is(err, pflag.ErrHelp) {
		return nil, nil, ErrHelp
	} else if err != nil {
		return nil, nil, &UsageError{Redact(mistyped(cmd, err))}
	}
	return flags, set.Args(), nil
}

// mistyped says what is wrong with a flag that pflag does not understand.
func mistyped(cmd Command, err error) string {
	var unknown *pflag.NotExistError
	var empty *pflag.ValueRequiredError
	switch {
	case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() != "":
		return fmt.Sprintf("cannot use -%s: options begin with two hyphens", unknown.GetSpecifiedShortnames())
	case errors.As(err, &unknown):
		name := unknown.GetSpecifiedName()
		takes := func(o *Option) bool { return o.takes(cmd) }
		why := "there is no such option" + DidYouMean(name, "--", optionNames(takes))
		if find(name) != nil {
			why = "this command does not take it"
		}
		return fmt.Sprintf("cannot use --%s: %s", name, why)
	case errors.As(err, &empty):
		name := empty.GetSpecifiedName()
		return fmt.Sprintf("cannot use --%s: its value is missing, as in --%[1]s %s", name, find(name).Arg)
	}
	return "cannot use the options: " + err.Error()
}

// firstGiven returns the first of the places that has values.
func firstGiven(places ...[]value) []value {
	for _, vs := range places {
		if vs != nil {
			return vs
		}
	}
	return nil
}

// build sets each option to the given value, or to its default. With running, options that a reload does not change
// are taken from there.
func (c *Config) build(given func(option string) []value, env []string, running *Config) error {
	c.kept, c.given = map[string][]value{}, map[string]bool{}
	for i := range Options {
		o := &Options[i]
		if !o.takes(c.Command) {
			continue
		}
		vs := given(o.Name)
		c.given[o.Name] = vs != nil
		if vs == nil && o.Default != "" && !o.Soft {
			vs = []value{{o.Name, o.Default, "--" + o.Name + " " + o.Default}}
		}
		if !o.Live && running != nil {
			was := running.kept[o.Name]
			same, err := o.same(vs, was)
			if err != nil {
				return err
			}
			if !same {
				c.NeedRestart = append(c.NeedRestart, o.Name)
			}
			vs = was
		}
		if !o.Live {
			c.kept[o.Name] = vs
		}
		if err := o.apply(c, vs); err != nil {
			return err
		}
	}
	return c.finish(env)
}

// Given reports whether the user gave a value to an option, by a flag, in the environment or in the file.
func (c *Config) Given(option string) bool { return c.given[option] }

// apply sets an option of c to the given values.
func (o *Option) apply(c *Config, vs []value) error {
	for _, v := range vs {
		if o.set == nil {
			continue
		}
		if err := o.set(c, v); err != nil {
			return err
		}
	}
	return nil
}

// same reports whether two ways of giving an option mean the same, however they are written. An error is about a.
func (o *Option) same(a, b []value) (bool, error) {
	x, y := blank(), blank()
	if err := o.apply(x, a); err != nil {
		return false, err
	}
	return o.apply(y, b) == nil && reflect.DeepEqual(x, y), nil
}

// blank returns a Config before any option was applied.
func blank() *Config { return &Config{Host: Host{ControlGroup: -1}} }

func readPath(path string, limit int64) ([]byte, os.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, errors.Unwrap(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		return nil, nil, errors.New("it is a directory")
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, nil, err
	}
	return b, info, nil
}
