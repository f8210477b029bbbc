package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
)

var cmdVersion = &command{
	name:  "version",
	short: "show the version",
	about: "Show the version, the revision it was built from, and what built it.",
	run: func(c *command, args, _ []string, std streams) (int, error) {
		if err := noArgs(c, args); err != nil {
			return 0, err
		}
		_, err := fmt.Fprintln(std.out, version(buildInfo()))
		return exitOK, err
	},
}

// buildInfo is what the build noted in the program; never nil.
func buildInfo() *debug.BuildInfo {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info
	}
	return &debug.BuildInfo{}
}

// shortVersion is version without the name of the program, as status shows it.
func shortVersion() string {
	_, v, _ := strings.Cut(version(buildInfo()), " ")
	return v
}

// version is one line: the module's version, the revision with its time if the build knew it, and the platform.
func version(info *debug.BuildInfo) string {
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
	}
	set := map[string]string{}
	for _, s := range info.Settings {
		set[s.Key] = s.Value
	}
	if rev := set["vcs.revision"]; rev != "" {
		v += " (" + rev[:min(12, len(rev))]
		if t := set["vcs.time"]; t != "" {
			v += ", " + t
		}
		if set["vcs.modified"] == "true" {
			v += ", modified"
		}
		v += ")"
	}
	return fmt.Sprintf("viasocks %s %s %s/%s", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
