package daemon

import (
	"bytes"
	"log/slog"
	"strings"
	"syscall"
	"testing"
)

func TestTellSignal(t *testing.T) {
	for _, tt := range []struct {
		sig  syscall.Signal
		core bool
		want string
	}{
		{0, false, ""},
		{syscall.SIGINT, false, ""},
		{syscall.SIGTERM, false, ""},
		{syscall.SIGHUP, false, ""},
		{syscall.SIGPIPE, false, ""},
		{syscall.SIGQUIT, true, ""},
		{syscall.SIGSEGV, false, "signal 11 (segmentation fault)"},
		{syscall.SIGABRT, true, "signal 6 (aborted, core dumped)"},
		{syscall.SIGKILL, false, "signal 9 (killed)"},
		{40, false, "signal 40"},
	} {
		var b bytes.Buffer
		tellSignal(slog.New(slog.NewTextHandler(&b, nil)), tt.sig, tt.core)
		got := b.String()
		if tt.want == "" && got != "" ||
			tt.want != "" && !strings.Contains(got, `level=WARN msg="the program was ended by `+tt.want+"\"\n") {
			t.Errorf("%d: %q, want %q", tt.sig, got, tt.want)
		}
	}
}
