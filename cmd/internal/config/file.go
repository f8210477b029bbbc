package config

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Limits of the configuration file. A list of rules may be long, but a megabyte means a wrong file name.
const (
	maxFile = 1 << 20
	maxLine = 4096
)

// readFile reads a configuration file. An option of another subcommand is only checked for existence and skipped, so
// that one file serves both run and up.
func (c *Config) readFile(path string) (map[string][]value, error) {
	b, info, err := readPath(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration file %s: %w", path, err)
	}
	c.warnOfWriters("configuration file", path, info)
	return parseFile(path, b, c.Command)
}

// parseFile reads one option from each line: its name, white space or an equals sign, its value. A # at the start of
// the line or after white space begins a comment.
func parseFile(path string, b []byte, cmd Command) (map[string][]value, error) {
	if len(b) > maxFile {
		return nil, usagef("cannot use %s: longer than %d bytes", path, maxFile)
	}
	b = bytes.TrimPrefix(b, byteOrderMark)
	got := map[string][]value{}
	for n := 1; len(b) > 0; n++ {
		var line []byte
		line, b, _ = bytes.Cut(b, []byte("\n"))
		v, err := parseLine(line)
		if err != nil {
			return nil, usagef("%s:%d: %v", path, n, err)
		}
		if v.name == "" {
			continue
		}
		o := find(v.name)
		if len(got[v.name]) > 0 && !o.Many {
			return nil, usagef("%s:%d: %s was given before", path, n, v.name)
		}
		if !o.takes(cmd) {
			continue
		}
		v.where = strings.TrimRight(fmt.Sprintf("%s:%d: %s %s", path, n, v.name, quote(v.text)), " ")
		if o.Arg == "" && v.text == "" {
			v.text = "true"
		}
		got[v.name] = append(got[v.name], v)
	}
	return got, nil
}

// parseLine returns a value without a name for an empty line.
func parseLine(line []byte) (value, error) {
	if len(line) > maxLine {
		return value{}, fmt.Errorf("the line is longer than %d bytes", maxLine)
	}
	if !utf8.Valid(line) {
		return value{}, fmt.Errorf("not UTF-8 text")
	}
	s := string(line)
	for i := range len(s) {
		if s[i] == '#' && (i == 0 || s[i-1] == ' ' || s[i-1] == '\t') {
			s = s[:i]
			break
		}
	}
	s = strings.Trim(s, " \t\r")
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return value{}, fmt.Errorf("there is a control character in the line")
	}
	if s == "" {
		return value{}, nil
	}
	end := strings.IndexAny(s, " \t=")
	if end < 0 {
		end = len(s)
	}
	name, text := s[:end], strings.TrimLeft(s[end:], " \t")
	if rest, ok := strings.CutPrefix(text, "="); ok {
		text = strings.TrimLeft(rest, " \t")
	}
	o := find(name)
	switch {
	case o == nil && strings.HasPrefix(name, "-"):
		return value{}, fmt.Errorf("%q: write the option without the dashes", Redact(name))
	case o == nil:
		return value{}, fmt.Errorf("unknown option %q%s", Redact(name), DidYouMean(name, "", optionNames(inFile)))
	case name == fileOption:
		return value{}, fmt.Errorf("a configuration file cannot include another one")
	case o.Arg != "" && text == "":
		return value{}, fmt.Errorf("%s needs a value: %s", name, o.Arg)
	}
	return value{name: name, text: text}, nil
}

// inFile reports whether an option can stand in a configuration file.
func inFile(o *Option) bool { return o.Name != fileOption }
