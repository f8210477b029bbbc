package config

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// envPrefix begins the variable of each option. It is followed by the option's name in capitals, with _ for -. An
// option that may be given more than once may have variables ending in _1, _2 and so on. The variable of a secret
// option that ends in secretFile names a file whose first line is the value.
const (
	envPrefix  = "VIASOCKS_"
	secretFile = "_FILE"
)

// maxEnvValues limits the numbers after a variable. A longer list belongs in a file.
const maxEnvValues = 9999

// Variable returns the name of the option in the environment.
func (o *Option) Variable() string { return envPrefix + varName(o.Name) }

// envVar is a variable that stands for an option.
type envVar struct {
	opt    *Option
	number int    // its position among the values of the option
	file   bool   // the text is the path of a file that contains the value
	name   string // of the variable
	text   string
}

// readEnv reads the options of a command from the environment. A variable without a value counts as not set, because
// programs that start containers set those that the user left out.
func (c *Config) readEnv(env []string) (map[string][]value, error) {
	var vars []envVar
	seen := map[string]bool{}
	for _, e := range env {
		name, text, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, envPrefix) || text == "" || seen[name] {
			continue
		}
		seen[name] = true // the first one counts, as in the C library
		v := parseVariable(name)
		if v.opt == nil {
			c.unknownVars = append(c.unknownVars, name)
		} else if v.opt.takes(c.Command) {
			v.text = strings.Clone(text)
			vars = append(vars, v)
		}
	}
	slices.SortFunc(
		vars,
		func(a, b envVar) int { return cmp.Or(cmp.Compare(a.number, b.number), strings.Compare(a.name, b.name)) },
	)
	type place struct {
		option string
		number int
	}
	taken := map[place]string{}
	got := map[string][]value{}
	for _, v := range vars {
		at := place{v.opt.Name, v.number}
		if other := taken[at]; other != "" {
			return nil, usagef("cannot use both %s and %s: they are for the same option", other, v.name)
		}
		taken[at] = v.name
		val, err := c.envValue(v)
		if err != nil {
			return nil, err
		}
		got[v.opt.Name] = append(got[v.opt.Name], val)
	}
	return got, nil
}

// parseVariable returns the option that a variable stands for; its opt is nil if there is none.
func parseVariable(name string) envVar {
	v := envVar{name: name}
	if v.opt = optionOf(name); v.opt != nil {
		return v
	}
	if rest, ok := strings.CutSuffix(name, secretFile); ok {
		if v.opt, v.number = numbered(rest); v.opt != nil && v.opt.Secret {
			v.file = true
			return v
		}
	}
	v.opt, v.number = numbered(name)
	return v
}

// numbered finds the option of a variable that may end in a number, from 1 on and without leading zeros.
func numbered(name string) (*Option, int) {
	if o := optionOf(name); o != nil {
		return o, 0
	}
	i := strings.LastIndexByte(name, '_')
	if i < 0 {
		return nil, 0
	}
	n, err := strconv.Atoi(name[i+1:])
	if err != nil || n < 1 || n > maxEnvValues || strconv.Itoa(n) != name[i+1:] {
		return nil, 0
	}
	if o := optionOf(name[:i]); o != nil && o.Many {
		return o, n
	}
	return nil, 0
}

func optionOf(variable string) *Option {
	for i := range Options {
		if Options[i].Variable() == variable {
			return &Options[i]
		}
	}
	return nil
}

func (c *Config) envValue(v envVar) (value, error) {
	if !v.file {
		return value{v.opt.Name, v.text, v.name + "=" + quote(v.text)}, nil
	}
	line, err := c.readSecret(v.name+" file", v.text, maxLine)
	if err != nil {
		return value{}, err
	}
	return value{v.opt.Name, string(line), v.name + "=" + quote(v.text) + ": " + quote(string(line))}, nil
}

// readSecret reads the first line of a file with a secret of the user. kind describes it in messages.
func (c *Config) readSecret(kind, path string, limit int) ([]byte, error) {
	line, info, err := firstLine(kind, path, limit)
	if err != nil {
		return nil, err
	}
	c.warnOfReaders(kind, path, info)
	c.warnOfWriters(kind, path, info)
	return line, nil
}

// firstLine reads the first line of a file. An empty line is an error.
func firstLine(kind, path string, limit int) ([]byte, os.FileInfo, error) {
	b, info, err := readPath(path, int64(len(byteOrderMark)+limit+2))
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the %s %s: %w", kind, path, err)
	}
	line, _, _ := bytes.Cut(bytes.TrimPrefix(b, byteOrderMark), []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return nil, nil, fmt.Errorf("cannot use the %s %s: its first line is empty", kind, path)
	}
	if len(line) > limit {
		return nil, nil, fmt.Errorf("cannot use the %s %s: its first line is longer than %d bytes", kind, path, limit)
	}
	return line, info, nil
}

// warnOfVariables warns of variables that look like ours and stand for nothing, because a mistyped name would
// otherwise go unnoticed.
func (c *Config) warnOfVariables() {
	for _, name := range c.unknownVars {
		if !c.isPassword(name) {
			c.Warnings = append(c.Warnings, fmt.Sprintf("the variable %s stands for no option and is ignored", name))
		}
	}
	c.unknownVars = nil
}

// isPassword reports whether a variable contains the password of an upstream.
func (c *Config) isPassword(name string) bool {
	name = strings.TrimSuffix(name, secretFile)
	if name == passwordVar {
		return true
	}
	for i := range c.Upstreams {
		if name == passwordVar+"_"+varName(c.Upstreams[i].Name) {
			return true
		}
	}
	return false
}
