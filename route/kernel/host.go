package kernel

import "context"

// Host is the change to the host. The order is: New (looks, takes the lock, touches nothing), Shut (the filter is
// closed), then the caller makes its TUN and starts its stack, Steer (rules and routes), Run (watches and refreshes the
// guard; the caller may say ready), Unsteer, Open (the filter goes last), Close (the lock). Methods may be called from
// any goroutine of the network namespace, but New, Shut, Steer, Unsteer and Open one after the other.
type Host struct {
	c Config
}

// New looks at the host: what is taken already is an error, what a dead daemon left is taken over later. ErrRunning:
// another daemon is there. Nothing is changed.
func New(c Config) (*Host, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Host{c: c}, nil
}

// Recovered reports whether a dead daemon had left something behind.
func (h *Host) Recovered() bool { return false }

// Plan gives every line of ip(8) and nft(8) that would be done, in order. It may be called instead of Shut, too.
func (h *Host) Plan() []string { return nil }

// Shut closes the host: the filter refuses everything but its exceptions. Packets that our TUN shall take are refused
// too until Run.
func (h *Host) Shut() error { return nil }

// Steer adds routes and rules: from now on packets come to the TUN, which must be up.
func (h *Host) Steer() error { return nil }

// Run puts back what others remove, follows addresses and devices, and refreshes the guard, until ctx ends.
func (h *Host) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// SetUpstreams replaces the endpoints that our own sockets may reach.
func (h *Host) SetUpstreams([]Endpoint) error { return nil }

// Unsteer takes away the rules and routes. The host is closed.
func (h *Host) Unsteer() error { return nil }

// Open takes away the filter, the TUN and what else was changed, and the journal.
func (h *Host) Open() error { return nil }

// Close gives back the lock and leaves the host as it is. It may be called twice.
func (h *Host) Close() error { return nil }

// Warnings are what the administrator should know, such as foreign rules ahead of ours.
func (h *Host) Warnings() []string { return nil }

// Counter is what the filter has refused for one reason.
type Counter struct {
	Reason         string
	Packets, Bytes uint64
}

// Counters gives the refused packets by reason, since the first Shut.
func (h *Host) Counters() ([]Counter, error) { return nil, nil }

// Undo is `down` without a daemon: from the journal in dir ("": DefaultDir), and without one, or with a corrupt one, by
// what c names (zero fields: defaults), it removes what is ours and nothing else. ErrRunning: the daemon lives. It
// returns a line for each thing that it removed.
func Undo(c Config) ([]string, error) { return nil, nil }

// Established lists the TCP connections that came in from outside to a listener of this network namespace.
func Established() ([]Tuple, error) { return nil, nil }

const lastRule = 19
