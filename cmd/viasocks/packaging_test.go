package main

import (
	"regexp"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// Every line of the configuration that the packages install is a comment, and what the comments suggest is right.
func TestPackagedConfiguration(t *testing.T) {
	var suggested strings.Builder
	for line := range strings.Lines(manualPage(t, "../../packaging/viasocks.conf")) {
		if !strings.HasPrefix(line, "#") && line != "\n" {
			t.Errorf("the configuration sets something: %s", line)
		}
		if option, ok := strings.CutPrefix(line, "#"); ok && !strings.HasPrefix(option, " ") && option != "\n" {
			suggested.WriteString(option)
		}
	}
	text := regexp.MustCompile(`(?m)^control-group.*$`).ReplaceAllString(suggested.String(), "control-group 0")
	if n := strings.Count(text, "\n"); n < 8 {
		t.Errorf("only %d options were found", n)
	}
	parsesFile(t, strings.ReplaceAll(text, "/etc/viasocks/password", "/dev/null"))
}

// The packages have all pages of the manual, units and completions, because they are made by "make install".
func TestPackagesInstall(t *testing.T) {
	if build := manualPage(t, "../../packaging/build.sh"); !strings.Contains(build, "make install ") {
		t.Error("packaging/build.sh does not use make install")
	}
	makefile := manualPage(t, "../../Makefile")
	for _, file := range manualPages {
		if !regexp.MustCompile(`(?m)^MANUAL := .*` + regexp.QuoteMeta(file)).MatchString(makefile) {
			t.Errorf("make install does not install %s", file)
		}
	}
}

// The variables of the examples for containers stand for options, and their commands exist.
func TestPackagedExamples(t *testing.T) {
	known := map[string]bool{}
	for i := range config.Options {
		known[config.Options[i].Variable()] = true
	}
	for _, file := range []string{"compose.yaml", "kubernetes.yaml"} {
		text := manualPage(t, "../../packaging/examples/"+file)
		names := regexp.MustCompile(`VIASOCKS_[A-Z_0-9]+`).FindAllString(text, -1)
		for _, name := range names {
			if !known[name] {
				t.Errorf("%s: %s stands for no option", file, name)
			}
		}
		started := regexp.MustCompile(`viasocks, (\w+)\]`).FindAllStringSubmatch(text, -1)
		for _, m := range started {
			if lookup(m[1]) == nil {
				t.Errorf("%s: there is no command %s", file, m[1])
			}
		}
		if len(names) < 3 || len(started) == 0 {
			t.Errorf("%s: found %q and %q", file, names, started)
		}
	}
}
