package daemon

import (
	"errors"
	"net"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// lockPatience is how long a lock may be held by a process that answers nobody: the guardian of --fail-open that undoes what
// a killed viasocks has left, a `down` that does so, or a viasocks that has just stopped.
const lockPatience = 5 * time.Second

// claimPatience is the same for a process whose lock file is gone already: it is about to end, or it is up with another state
// directory.
const claimPatience = time.Second

// takeHost takes the lock of the host. It waits for a holder that is about to end, but not for a viasocks that is up.
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
