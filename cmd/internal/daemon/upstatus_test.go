package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route"
)

func TestShortageWarning(t *testing.T) {
	now := time.Now()
	s := route.Shortage{Times: 7, Last: now.Add(-3 * time.Second), Why: "cannot make a socket: too many open files"}
	if w := shortageWarning(s, now); !strings.Contains(w, "7 times") || !strings.Contains(w, "3s ago") || !strings.Contains(w, s.Why) {
		t.Errorf("%q", w)
	}
	if w := shortageWarning(s, now.Add(shortageShown)); w != "" {
		t.Errorf("long over: %q", w)
	}
	if w := shortageWarning(route.Shortage{}, now); w != "" {
		t.Errorf("never: %q", w)
	}
}
