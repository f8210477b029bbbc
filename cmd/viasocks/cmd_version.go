package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

var cmdVersion = &command{
	name:  "version",
	short: "show the version",
	about: "Show the version, the revision it was built from, and what built it.",
	run: func(c *command, args, _ []string, std streams) (int, error) {
		if err := noArgs(c, args); err != nil {
			return 0, err
		}
		info, ok := debug.ReadBuildInfo()
		if !ok {
			info = &debug.BuildInfo{}
		}
		_, err := fmt.Fprintln(std.out, version(info))
		return exitOK, err
	},
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
