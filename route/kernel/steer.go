package kernel

import (
	"log/slog"
)

// Options says what Steer shall do. The zero value of a field is an error but for Priority and Log.
type Options struct {
	TUN      string // name of the device that takes the packets; it is up and has its addresses
	Table    int    // number of a kernel routing table that nobody else uses
	Mark     uint32 // packets with this mark (under Mask) are ours and are left alone
	Mask     uint32
	Priority int // of the first ip rule; 0: DefaultPriority
	Log      *slog.Logger
}

// Steering is the change to the host, until Close.
type Steering struct{}

// Steer sends all packets without the mark to the TUN, in both families, in the network namespace of the calling
// thread. After an error nothing is left behind.
func Steer(o Options) (*Steering, error) { return &Steering{}, nil }

// Close takes away what Steer added, and nothing else. It may be called twice.
func (s *Steering) Close() error { return nil }
