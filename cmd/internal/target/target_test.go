package target

import (
	"os"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// What cannot be found, or may not be used, says what to do next.
func TestFindFails(t *testing.T) {
	for _, tt := range []struct {
		cfg  config.Config
		says string
	}{
		{config.Config{NetNS: "no-such-namespace"},
			"cannot use the network namespace no-such-namespace: there is none: 'ip netns list' shows those that there are"},
		{config.Config{PID: 4194304}, "cannot use the process 4194304: there is none"},
		{config.Config{PID: os.Getpid()}, "it is in the network namespace of viasocks itself: use 'viasocks up' and 'down'"},
	} {
		_, err := Find(&tt.cfg)
		if err == nil || !strings.HasSuffix(err.Error(), tt.says) {
			t.Errorf("%v, want %q", err, tt.says)
		}
	}
	if _, err := open("/proc/self/ns/net", "network namespace blue"); err == nil ||
		!strings.Contains(err.Error(), "blue: it is the network namespace of viasocks itself") {
		t.Error(err)
	}
	if got := refusedTo(0); strings.Contains(got, "as root") {
		t.Errorf("root is told to be root: %s", got)
	}
	if got := refusedTo(1000); !strings.Contains(got, "run viasocks as root, or as that user") {
		t.Error(got)
	}
}
