package daemon

import (
	"log/slog"
	"strings"
	"testing"
)

// What ends the guardian without work. The rest is tried on a host: see TestFailOpen of cmd/viasocks.
func TestGuardianWithoutWork(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, in := range []string{"", "half a will", `{"TUN":"viasocks0"}` + "\n" + farewell} {
		if err := guard(strings.NewReader(in), log); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, in := range []string{"nonsense\n", "[]\n"} {
		if err := guard(strings.NewReader(in), log); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
	(*guardian)(nil).dismiss()
}
