package main

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

var update = flag.Bool("update", false, "write the golden files and the manual's list of options")

const (
	optionsBegin = ".\\\" options begin\n"
	optionsEnd   = ".\\\" options end\n"
)

// The manual's list of options is the table's.
func TestManual(t *testing.T) {
	b, err := os.ReadFile("viasocks.1")
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), optionsBegin)
	list, tail, ok2 := strings.Cut(rest, optionsEnd)
	if !ok || !ok2 {
		t.Fatal("the marks of the list of options are not there")
	}
	var want bytes.Buffer
	config.WriteMan(&want)
	if *update {
		err := os.WriteFile("viasocks.1", []byte(head+optionsBegin+want.String()+optionsEnd+tail), 0o644)
		if err != nil {
			t.Fatal(err)
		}
	} else if list != want.String() {
		t.Error("the manual's list of options is not the program's: go test ./cmd/viasocks -run Manual -update")
	}
	for _, c := range commands() {
		if !strings.Contains(head, ".Cm "+c.name+"\n") {
			t.Errorf("the manual has no command %s", c.name)
		}
	}
	// The other way round: a flag that stands elsewhere in the manual exists.
	for _, line := range strings.Split(head+tail, "\n") {
		if name, ok := strings.CutPrefix(line, ".Fl -"); ok {
			name, _, _ = strings.Cut(name, " ")
			if name != "" && !isOption(name) {
				t.Errorf("the manual names --%s, which does not exist", name)
			}
		}
		if i := strings.Index(line, " --"); i >= 0 {
			name, _, _ := strings.Cut(line[i+3:], " ")
			if name != "" && !isOption(name) {
				t.Errorf("an example has --%s, which does not exist", name)
			}
		}
	}
}

func isOption(name string) bool {
	for _, o := range config.Options {
		if o.Name == name {
			return true
		}
	}
	return false
}

func TestManualLint(t *testing.T) {
	mandoc, err := exec.LookPath("mandoc")
	if err != nil {
		t.Skip("mandoc is not installed")
	}
	out, err := exec.Command(mandoc, "-T", "lint", "-W", "warning", "viasocks.1").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// The file of the manual's EXAMPLES is right, and so are its commands.
func TestManualExamples(t *testing.T) {
	b, err := os.ReadFile("viasocks.1")
	if err != nil {
		t.Fatal(err)
	}
	_, examples, _ := strings.Cut(string(b), ".Sh EXAMPLES\n")
	examples, _, _ = strings.Cut(examples, "\n.Sh ")
	n := 0
	for _, part := range strings.Split(examples, ".Bd -literal -offset indent\n")[1:] {
		text, _, _ := strings.Cut(part, ".Ed")
		text = strings.NewReplacer(`\(aq`, "'", `\e`, `\`, "/etc/viasocks.password", "/dev/null").Replace(text)
		if rest, ok := strings.CutPrefix(text, "proxy "); ok {
			path := t.TempDir() + "/conf"
			if err := os.WriteFile(path, []byte("proxy "+rest), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := config.Parse(config.Run, []string{"--config", path, "true"}, nil); err != nil {
				t.Errorf("%s\n%v", text, err)
			}
			n++
			continue
		}
		parses(t, text)
		n++
	}
	if n < 5 {
		t.Errorf("only %d examples were found", n)
	}
}

// parses checks the options of a command line that begins with viasocks.
func parses(t *testing.T, text string) {
	t.Helper()
	// The shell splits the words: each command becomes a line of them.
	script := `viasocks() { printf '%s\0' "$@"; echo; }; SHELL=sh; ` + text
	out, err := exec.Command("sh", "-c", script).Output()
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	args := strings.Split(strings.TrimSuffix(string(out), "\x00\n"), "\x00")
	c := lookup(args[0])
	if c == nil {
		t.Errorf("%q: no such command", args)
		return
	}
	if c.takes == 0 {
		return
	}
	_, err = config.Parse(c.takes, args[1:], []string{"VIASOCKS_PROXY=socks5://h"})
	if err != nil && !strings.Contains(err.Error(), "first line is empty") {
		t.Errorf("%q: %v", args, err)
	}
}

// The commands that README shows are there: targets of the Makefile, and options of viasocks.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range strings.Split(string(readme), "```sh\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		for line := range strings.Lines(block) {
			line = strings.TrimPrefix(strings.TrimSpace(line), "sudo ")
			line, _, _ = strings.Cut(line, " # ")
			if target, ok := strings.CutPrefix(line, "make "); ok {
				if target = strings.TrimSpace(target); !strings.Contains(string(makefile), "\n"+target+":") {
					t.Errorf("make has no target %q", target)
				}
			} else if strings.HasPrefix(line, "bin/viasocks ") {
				parses(t, strings.TrimPrefix(line, "bin/"))
			} else if line != "" {
				t.Errorf("what is %q?", line)
			}
			n++
		}
	}
	if n < 6 {
		t.Errorf("only %d commands were found", n)
	}
}
