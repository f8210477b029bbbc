package main

import (
	"runtime/debug"
	"strings"
	"testing"
)

func TestVersion(t *testing.T) {
	got := result(t, viasocks("version"))
	if !strings.HasPrefix(got, "exit 0\n--- stdout\nviasocks ") || strings.Count(got, "\n") != 4 {
		t.Error(got)
	}
	if result(t, viasocks("--version")) != got {
		t.Error("--version differs")
	}
	info := &debug.BuildInfo{Settings: []debug.BuildSetting{
		{
			Key:   "vcs.revision",
			Value: "0123456789abcdef",
		}, {Key: "vcs.time", Value: "2026-11-22T00:00:00Z"}, {Key: "vcs.modified", Value: "true"},
	}}
	info.Main.Version = "v1.2.3"
	if v := version(info); !strings.HasPrefix(v, "viasocks v1.2.3 (0123456789ab, 2026-11-22T00:00:00Z, modified) go1.") {
		t.Error(v)
	}
	if v := version(&debug.BuildInfo{}); !strings.HasPrefix(v, "viasocks devel go1.") {
		t.Error(v)
	}
}
