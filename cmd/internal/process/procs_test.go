package process

import "testing"

func TestProcsFor(t *testing.T) {
	for _, tt := range []struct {
		n, most int
		cores   float64
		want    int
	}{
		{1, 8, 0, 1}, {1, 8, 0.7, 1}, {1, 8, 0.9, 2}, {1, 1, 0.9, 1},
		{2, 8, 1.1, 2}, {2, 8, 0.7, 2}, {2, 8, 0.5, 1}, {2, 8, 1.7, 4},
		{4, 6, 3.9, 6}, {6, 6, 5.9, 6}, {6, 6, 1.0, 3}, {3, 6, 0.1, 2},
	} {
		if got := procsFor(tt.n, tt.most, tt.cores); got != tt.want {
			t.Errorf("%d of %d processors, %.1f in use: %d, want %d", tt.n, tt.most, tt.cores, got, tt.want)
		}
	}
	// No load makes it swing: what is right for n after a step up does not step down.
	for n := 1; n < 64; n *= 2 {
		if load := procsMore*float64(n) + 0.01; procsFor(2*n, 64, load) != 2*n {
			t.Errorf("a load of %.2f swings between %d and %d", load, n, 2*n)
		}
	}
}
