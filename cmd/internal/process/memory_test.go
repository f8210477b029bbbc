package process

import "testing"

// A burst's garbage is collected when it is over, also that of its last flows, and a host that works is left alone.
func TestWorthIt(t *testing.T) {
	const kb, mb = 1 << 10, 1 << 20
	for _, c := range []struct {
		what                  string
		live, lately, garbage uint64
		want                  bool
	}{
		{"nothing happened", 4 * mb, 0, 0, false},
		{"a little, and then nothing", 4 * mb, 0, 100 * kb, false},
		{"the last of a burst", 4 * mb, 10 * kb, 50 * flowBytes, true},
		{"after a burst", 4 * mb, 1 * mb, 3 * mb, true},
		{"at work", 4 * mb, 3 * mb, 30 * mb, false},
		{"much lives, little is garbage", 80 * mb, 1 * mb, 3 * mb, false},
		{"much lives, little is garbage, and it is calm", 80 * mb, 0, 1 * mb, false},
		{"much lives, much is garbage", 80 * mb, 1 * mb, 20 * mb, true},
	} {
		if got := worthIt(heapState{live: c.live}, c.lately, c.garbage); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}
