package daemon

import (
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// TestInstanceNamed: a viasocks that does not answer in time is not taken for one that is not there.
func TestInstanceNamed(t *testing.T) {
	there := control.Instance{PID: 41, Mode: control.ModeRun, Name: "first", Inside: 1, State: control.Ready}
	host := control.Instance{PID: 42, Mode: control.ModeUp, State: control.Ready}
	silent := control.Instance{PID: 43, Mode: control.ModeRun, State: control.NoAnswer}
	// The process id of an instance in another process namespace is 0 here.
	unseen := control.Instance{Mode: control.ModeRun, Name: "other", Inside: 1, State: control.Ready}
	for _, tt := range []struct {
		want string
		all  []control.Instance
		says string
	}{
		{"first", []control.Instance{host}, "none of your own programs has this name"},
		{"42", []control.Instance{host, there}, "none of your own programs has this name"},
		{"43", []control.Instance{there, silent}, "it does not answer"},
		{"second", []control.Instance{there, silent}, "none of your own programs that answer has this name"},
		{"second", []control.Instance{{Mode: control.ModeRun, State: control.NoAnswer}}, "none of your own programs that answer"},
		{"first", []control.Instance{there, there, silent}, "several have this name"},
		{"second", []control.Instance{unseen}, "none of your own programs has this name"},
		{"0", []control.Instance{unseen}, "none of your own programs has this name"},
		{"first", []control.Instance{there, unseen}, "its program has ended"},
		{"other", []control.Instance{there, unseen}, "it is in another process namespace"}, // the parent of process 1 is 0, too
		{"41", []control.Instance{silent, there}, "its program has ended"},                 // process 1 is no child of 41
	} {
		if _, err := instanceNamed(tt.want, tt.all); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s in %+v: %v, want %s", tt.want, tt.all, err, tt.says)
		}
	}
}
