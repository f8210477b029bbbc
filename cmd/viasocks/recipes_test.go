package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// standIns replaces what an example names and a machine that builds viasocks does not have.
var standIns = strings.NewReplacer(
	"debian-transmission", "0", // a user
	"/usr/local/bin/tell-the-client", "/bin/sh",
	"$SHELL", "sh",
	"…", "...",
)

// TestRecipes has each command that the manual, README, the help and the files of the packages show accepted by the
// program: its subcommand exists, and its options, rules and configuration are right. Nothing is carried.
func TestRecipes(t *testing.T) {
	t.Parallel()
	least := map[string]int{"viasocks.1": 10, "viasocks.conf.5": 3, "viasocks.7": 22, "../../README.md": 8, "help": 2}
	texts := map[string][]string{}
	for _, file := range manualPages {
		texts[file] = manualExamples(manualPage(t, file))
	}
	for _, file := range []string{"../../README.md", "../../packaging/viasocks.conf"} {
		texts[file] = markdownExamples(manualPage(t, file))
	}
	for _, c := range commands() {
		for _, part := range strings.Split(c.about, "\n\n") {
			if strings.HasPrefix(part, "  ") {
				texts["help"] = append(texts["help"], part)
			}
		}
	}
	for file, blocks := range texts {
		n := 0
		for _, block := range blocks {
			n += tryExamples(t, file, block)
		}
		if n < least[file] {
			t.Errorf("%s: only %d examples were found", file, n)
		}
	}
}

// manualExamples returns the literal blocks of a page, and the commands in its text, as the reader sees them.
func manualExamples(page string) (blocks []string) {
	plain := strings.NewReplacer(`\e`, `\`, `\(aq`, `'`, `\(dq`, `"`, `\-`, `-`, `\&`, ``)
	for _, part := range strings.Split(page, "\n.Bd -literal")[1:] {
		_, part, _ = strings.Cut(part, "\n")
		block, _, _ := strings.Cut(part, "\n.Ed")
		blocks = append(blocks, plain.Replace(block))
	}
	for _, m := range regexp.MustCompile(`(?m)^\.Ql (viasocks [a-z].*?)(?: [,.;)])*$`).FindAllStringSubmatch(page, -1) {
		blocks = append(blocks, plain.Replace(m[1]))
	}
	return blocks
}

// markdownExamples returns the fenced blocks, and the commands between backquotes.
func markdownExamples(text string) (blocks []string) {
	for i, part := range strings.Split(text, "\n```") {
		if _, block, ok := strings.Cut(part, "\n"); ok && i%2 == 1 {
			blocks = append(blocks, block)
			continue
		}
		for _, m := range regexp.MustCompile("`(viasocks [a-z][^`]*)`").FindAllStringSubmatch(part, -1) {
			blocks = append(blocks, m[1])
		}
	}
	for line := range strings.Lines(text) { // the comments of a configuration
		if command, ok := strings.CutPrefix(line, "#   "); ok {
			command, _, _ = strings.Cut(command, "   ")
			blocks = append(blocks, command)
		}
	}
	return blocks
}

var (
	ourCommand = regexp.MustCompile(`^(?:\$ )?(?:sudo )?(?:bin/)?viasocks ([a-z]+)\b(.*)$`)
	optionLine = regexp.MustCompile(`^([a-z][a-z-]*[a-z])(\s+\S.*)?$`)
	optionFlag = regexp.MustCompile(`^--[a-z]`)
)

// tryExamples tries what a block shows, and returns how many commands and configurations that were.
func tryExamples(t *testing.T, file, block string) (n int) {
	t.Helper()
	block = regexp.MustCompile(`\s*\\\n\s*`).ReplaceAllString(block, " ")
	conf, isConf, known := "", true, false
	var options []string // a block of nothing but options
	for line := range strings.Lines(block) {
		line = strings.TrimSpace(line)
		words, err := shellWords(standIns.Replace(line))
		switch m := ourCommand.FindStringSubmatch(line); {
		case m != nil && err != nil:
			t.Errorf("%s: %s: %v", file, line, err)
		case m != nil:
			i := 0
			for words[i] != m[1] {
				i++
			}
			tryCommand(t, file, m[1], words[i+1:])
			n, isConf = n+1, false
		case optionFlag.MatchString(line) && err == nil:
			options = append(options, words...)
			isConf = false
		case line == "" || strings.HasPrefix(line, "#"):
		case optionLine.MatchString(line):
			conf += line + "\n"
			known = known || isOption(strings.Fields(line)[0])
		default:
			isConf = false
		}
	}
	if len(options) > 0 && strings.HasPrefix(block, "--") {
		tryCommand(t, file, "check", options)
		n++
	}
	if isConf && known {
		path := filepath.Join(t.TempDir(), "conf")
		if err := os.WriteFile(path, []byte(placed(t, conf)), 0o600); err != nil {
			t.Fatal(err)
		}
		tryCommand(t, file, "check", []string{"--config", path})
		n++
	}
	return n
}

// tryCommand parses the options of a command. What run and up take is given to check, too.
func tryCommand(t *testing.T, file, name string, args []string) {
	t.Helper()
	c := lookup(name)
	if c == nil {
		t.Errorf("%s: there is no command %s", file, name)
		return
	}
	for i := range args {
		args[i] = placed(t, args[i])
	}
	env := []string{"HOME=/nonexistent"}
	if !slices.Contains(args, "--config") { // the environment has precedence over a file
		env = append(env, "VIASOCKS_PROXY=socks5://127.0.0.1:1080")
	}
	if n := len(args); n > 0 && args[n-1] == "--rule-for" {
		args = args[:n-1] // the option is mentioned, without an example
	}
	if len(args) == 0 || name == "help" || name == "completion" {
		return // the command is mentioned, or takes no options
	}
	cfg, err := config.Parse(c.takes, append([]string(nil), args...), env)
	if err != nil {
		t.Errorf("%s: viasocks %s %s: %v", file, name, strings.Join(args, " "), err)
		return
	}
	if len(cfg.Warnings) > 0 {
		t.Errorf("%s: viasocks %s %s: %q", file, name, strings.Join(args, " "), cfg.Warnings)
	}
	if name != "run" && name != "up" {
		return
	}
	cmd := viasocks("check")
	for _, arg := range args[:len(args)-len(cfg.Program)] {
		if arg != "--" {
			cmd.Args = append(cmd.Args, arg)
		}
	}
	cmd.Env = append(cmd.Env, env...)
	if got := result(t, cmd); !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, "\nok\n") {
		t.Errorf("%s: viasocks check %s: %s", file, strings.Join(cmd.Args[2:], " "), got)
	}
}

var inEtc = regexp.MustCompile(`/etc/viasocks[./][a-z.]+|^FILE$`)

// placed gives a placeholder a value, and puts files that do not exist on this machine in a directory of the test: those
// under /etc hold a password, or name a proxy.
func placed(t *testing.T, word string) string {
	t.Helper()
	if word == "PID" {
		return "1"
	}
	return inEtc.ReplaceAllStringFunc(word, func(path string) string {
		text := "secret\n"
		if strings.HasSuffix(path, ".conf") || path == "FILE" {
			text = "proxy socks5://127.0.0.1:1080\n"
		}
		to := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(to, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return to
	})
}

// shellWords returns the words of a line as the shell reads them, up to a comment, an explanation in another column, a pipe, or
// a second command.
func shellWords(line string) ([]string, error) {
	line = strings.TrimPrefix(line, "$ ")
	if end := regexp.MustCompile(`   |  #| [|>&;]`).FindStringIndex(line); end != nil {
		line = line[:end[0]]
	}
	out, err := exec.Command("sh", "-c", `printf '%s\n' `+line).Output()
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n"), err
}
