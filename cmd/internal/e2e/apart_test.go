package e2e

import (
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// apartAtOnce is how many tests may run apart at the same time. All of e2e used less than a quarter of one processor when its
// tests ran one after the other, with the race detector.
const apartAtOnce = 4

// apart runs the calling test beside others of its kind, in a world of its own: see harness.Apart.
func apart(t *testing.T) bool {
	t.Helper()
	return harness.Apart(t, envWhy, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS)
}

// eachApart is eachOffload with each of them apart.
func eachApart(t *testing.T, f func(t *testing.T, offload string)) {
	t.Parallel()
	eachOffload(t, func(t *testing.T, offload string) {
		if apart(t) {
			f(t, offload)
		}
	})
}
