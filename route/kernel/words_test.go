package kernel

import (
	"errors"
	"strings"
	"testing"
)

// A host without cgroup2, such as a shell of `ip netns exec`, is told what to do.
func TestNoCgroupMount(t *testing.T) {
	const other = "24 1 0:22 / /sys rw - sysfs none rw\n"
	if _, err := cgroupMountIn([]byte(other)); err == nil ||
		!strings.Contains(err.Error(), "run 'mount -t cgroup2 none /sys/fs/cgroup'") {
		t.Errorf("%v", err)
	}
	const line = "36 24 0:29 / /sys/fs/a\\040b rw,nosuid - cgroup2 none rw\n"
	if got, err := cgroupMountIn([]byte(other + line)); err != nil || got != "/sys/fs/a b" {
		t.Errorf("%q, %v", got, err)
	}
}

// What status shows of a line of the log is a sentence.
func TestWarning(t *testing.T) {
	for _, tt := range []struct {
		args []any
		want string
	}{
		{nil, "names are refused"},
		{[]any{"why", errors.New("cannot ask")}, "names are refused: cannot ask"},
		{[]any{"limit", 64, "err", errors.New("it is full")}, "names are refused (limit 64): it is full"},
		{[]any{"limit", 64, "first", "a"}, "names are refused (limit 64, first a)"},
	} {
		if got := warning("names are refused", tt.args); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}
