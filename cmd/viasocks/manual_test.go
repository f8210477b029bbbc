package main

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

var update = flag.Bool("update", false, "write the golden files and the manual's list of options")

const (
	optionsBegin = ".\\\" options begin\n"
	optionsEnd   = ".\\\" options end\n"
)

// manualPages are the files of the manual, by the name that other pages call them by.
var manualPages = map[string]string{"viasocks 1": "viasocks.1", "viasocks.conf 5": "viasocks.conf.5", "viasocks 7": "viasocks.7"}

func manualPage(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The manual's list of options is the table's, and every command has its text.
func TestManual(t *testing.T) {
	head, rest, ok := strings.Cut(manualPage(t, "viasocks.1"), optionsBegin)
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
}

// The options that the pages name exist.
func TestManualOptions(t *testing.T) {
	for _, file := range manualPages {
		for line := range strings.Lines(manualPage(t, file)) {
			name, named := strings.CutPrefix(line, ".Fl -")
			if _, example, ok := strings.Cut(line, " --"); ok {
				name, named = example, true
			}
			name, _, _ = strings.Cut(strings.TrimSpace(name), " ")
			name, _, _ = strings.Cut(name, "=")
			// The options of other programs stand as "Fl Fl name" or in their own commands.
			if named && name != "" && !isOption(name) && !ofAnotherProgram(line) {
				t.Errorf("%s names --%s, which does not exist: %s", file, name, line)
			}
		}
	}
}

// ofAnotherProgram tells the lines of the recipes that are commands for other programs.
func ofAnotherProgram(line string) bool {
	for _, program := range []string{"aria2c ", "systemctl ", "tailscale "} {
		if strings.Contains(line, program) {
			return true
		}
	}
	return false
}

// A reference leads to a section that exists: ".Sx SECTION" in the page itself, and ".Em SECTION" before "in" and ".Xr PAGE" in
// another page. Each page that is named exists.
func TestManualReferences(t *testing.T) {
	elsewhere := regexp.MustCompile(`(?m)^\.Em ([A-Z. ]+)\nin\n\.Xr (\S+ \d)`)
	ours := regexp.MustCompile(`(?m)^\.Xr (viasocks\S* \d)`)
	n := 0
	for name, file := range manualPages {
		text := manualPage(t, file)
		for line := range strings.Lines(text) {
			section, ok := strings.CutPrefix(line, ".Sx ")
			section = strings.TrimRight(section, " .,;:)\n")
			if ok && !hasSection(text, section) {
				t.Errorf("%s has no section %s", name, section)
			}
		}
		for _, m := range elsewhere.FindAllStringSubmatch(text, -1) {
			n++
			if other := manualPages[m[2]]; other == "" || !hasSection(manualPage(t, other), m[1]) {
				t.Errorf("%s refers to a section %s of %s, which does not exist", name, m[1], m[2])
			}
		}
		for _, m := range ours.FindAllStringSubmatch(text, -1) {
			if manualPages[m[1]] == "" {
				t.Errorf("%s refers to a page %s, which does not exist", name, m[1])
			}
		}
	}
	if n < 5 {
		t.Errorf("only %d references to other pages were found", n)
	}
}

func hasSection(text, name string) bool {
	return strings.Contains(text, "\n.Sh "+name+"\n") || strings.Contains(text, "\n.Ss "+name+"\n")
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
	for _, file := range manualPages {
		out, err := exec.Command(mandoc, "-T", "lint", "-W", "warning", file).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// The commands and the files that the pages show are right.
func TestManualExamples(t *testing.T) {
	for file, least := range map[string]int{"viasocks.1": 5, "viasocks.conf.5": 2, "viasocks.7": 19} {
		n := 0
		for _, part := range strings.Split(manualPage(t, file), ".Bd -literal -offset indent\n")[1:] {
			text, _, _ := strings.Cut(part, ".Ed")
			text = strings.NewReplacer(`\(aq`, "'", `\e`, `\`, "/etc/viasocks.password", "/dev/null",
				"/etc/viasocks/password", "/dev/null", "/usr/local/bin/tell-the-client", "/bin/sh").Replace(text)
			switch {
			case strings.HasPrefix(text, "proxy "):
				parsesFile(t, text)
			case strings.Contains(text, "viasocks "):
				parses(t, text)
			default:
				continue // a command of another program
			}
			n++
		}
		if n < least {
			t.Errorf("%s: only %d examples were found", file, n)
		}
	}
}

// parsesFile checks a configuration file.
func parsesFile(t *testing.T, text string) {
	t.Helper()
	path := t.TempDir() + "/conf"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := config.Parse(config.Check, []string{"--config", path}, nil)
	if err != nil && !strings.Contains(err.Error(), "first line is empty") {
		t.Errorf("%s\n%v", text, err)
	}
}

// parses checks the options of the command lines of viasocks in a piece of shell. Other programs are not started.
func parses(t *testing.T, text string) {
	t.Helper()
	// The shell splits the words: a zero byte ends each of them, and a one each command. It finds no other program.
	script := `viasocks() { printf '%s\0' "$@"; printf '\1'; }; systemctl() { :; }; SHELL=sh HOME=/tmp PATH=; ` + text
	out, err := exec.Command("/bin/sh", "-c", script).Output()
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	for _, line := range strings.Split(strings.TrimSuffix(string(out), "\x00\x01"), "\x00\x01") {
		parsesCommand(t, strings.Split(line, "\x00"))
	}
}

func parsesCommand(t *testing.T, args []string) {
	t.Helper()
	c := lookup(args[0])
	if c == nil {
		t.Errorf("%q: no such command", args)
		return
	}
	if c.takes == 0 {
		return
	}
	_, err := config.Parse(c.takes, args[1:], []string{"VIASOCKS_PROXY=socks5://h"})
	// A user of the examples is not on every host, and their passwords are empty here.
	if err != nil && !strings.Contains(err.Error(), "first line is empty") && !strings.Contains(err.Error(), "there is no user") {
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
