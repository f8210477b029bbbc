package main

import (
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

// TestRunEndedBySignal: run says what a shell would say of its program if a signal has ended that, and once.
func TestRunEndedBySignal(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	for _, tt := range []struct{ script, exit, says string }{
		{"ulimit -c 0; kill -SEGV $$", "139", "11 (segmentation fault)"},
		{"ulimit -c 0; kill -ABRT $$", "134", "6 (aborted)"},
		{"kill -KILL $$", "137", "9 (killed)"},
		{"kill -USR1 $$", "138", "10 (user defined signal 1)"},
		{"kill -USR1 $PPID; while :; do sleep 0.05; done", "138", ""}, // viasocks passes it on
		{"kill -TERM $$", "143", ""},
		{"kill -PIPE $$", "141", ""},
		{"exit 139", "139", ""},
	} {
		if signal.Ignored(syscall.SIGUSR1) && strings.Contains(tt.script, "USR1") ||
			signal.Ignored(syscall.SIGTERM) && strings.Contains(tt.script, "TERM") {
			continue // whoever runs the test has ignored it, and so will they
		}
		got := result(t, viasocks("run", "--proxy", s.URL(), "--", "sh", "-c", tt.script))
		if !strings.HasPrefix(got, "exit "+tt.exit+"\n--- stdout\n--- stderr\n") {
			t.Errorf("%s: got\n%swant exit status %s", tt.script, got, tt.exit)
		}
		said := strings.Count(got, "the program was ended by signal "+tt.says+`"`)
		if all := strings.Count(got, "ended by"); all != said || said != min(len(tt.says), 1) {
			t.Errorf("%s: says\n%swant %q, once", tt.script, got, tt.says)
		}
	}
}
