package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

var cmdVersion = &command{
	name:  "version",
	short: "show the version",
	about: "Show the version, the revision it was built from, the Go that built it, and the version of gVisor.",
	run: func(c *command, args, _ []string, std streams) (int, error) {
		if err := noArgs(c, args); err != nil {
			return 0, err
		}
		_, err := fmt.Fprintln(std.out, version(buildInfo()))
		return exitOK, err
	},
}

// buildInfo returns what the build recorded in the program. It is never nil.
func buildInfo() *debug.BuildInfo {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info
	}
	return &debug.BuildInfo{}
}

// release and revision are set by the linker, see BUILDFLAGS in the Makefile. Without them the program was made by a
// plain go build, which notes a version of its own.
var release, revision string

// shortVersion is version without the name of the program and of its parts, as status shows it.
func shortVersion() string { return versionOf(buildInfo()) }

// version is one line: the version, the revision with its time if the build knew it, the platform, and the version of
// gVisor, which has the largest part in what the program does.
func version(info *debug.BuildInfo) string {
	v := "viasocks " + versionOf(info)
	for _, d := range info.Deps {
		if d.Path == "gvisor.dev/gvisor" {
			v += ", gVisor " + d.Version
		}
	}
	return v
}

func versionOf(info *debug.BuildInfo) string {
	v := cmp.Or(release, info.Main.Version)
	if v == "" || v == "(devel)" {
		v = "devel"
	}
	set := map[string]string{}
	for _, s := range info.Settings {
		set[s.Key] = s.Value
	}
	if rev := cmp.Or(revision, set["vcs.revision"]); rev != "" {
		v += " (" + rev[:min(12, len(rev))]
		if t := set["vcs.time"]; t != "" {
			v += ", " + t
		}
		if set["vcs.modified"] == "true" {
			v += ", modified"
		}
		v += ")"
	}
	return fmt.Sprintf("%s %s %s/%s", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
