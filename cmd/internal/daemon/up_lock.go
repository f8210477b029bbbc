package daemon

import (
	"errors"
	"net"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// lockPatience is how long takeHost waits for a holder of the lock that does not listen at the control socket: the guardian of
// --fail-open or a `down`, which undo what a killed viasocks has left, or a viasocks that has just stopped.
const lockPatience = 5 * time.Second

// claimPatience is how long takeHost waits for a holder with another lock file: one that is about to end, or one that is up
// with another state directory.
const claimPatience = time.Second

// takeHost takes the lock of the host. It waits for a holder that is about to end, and not for a viasocks that is up.
func takeHost(path string) (*control.Lock, error) {
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		lock, err := control.TakeHost(path)
		patience := lockPatience
		if errors.Is(err, control.ErrElsewhere) {
			patience = claimPatience
		}
		if !errors.Is(err, control.ErrLocked) || time.Since(start) > patience || answers(path) {
			return lock, err
		}
	}
}

// answers reports whether a viasocks listens at the control socket.
func answers(path string) bool {
	c, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	c.Close()
	return true
}
