package tun

import (
	"fmt"
	"log/slog"
)

// Mode tells how much of the kernel's offloads to request. Less than full is for old kernels and for tests.
type Mode uint8

const (
	OffloadFull  Mode = iota // checksums, TCP super-segments and UDP super-frames, as far as the kernel supports them
	OffloadNoUSO             // checksums and TCP super-segments
	OffloadOff               // none: each frame is one packet with its checksums filled in
)

var modeNames = [...]string{"full", "nouso", "off"}

// String returns the value of the offload option: full, nouso or off.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// ParseMode is the inverse of String.
func ParseMode(s string) (Mode, error) {
	for i, name := range modeNames {
		if s == name {
			return Mode(i), nil
		}
	}
	return 0, fmt.Errorf("cannot use offload %q: it is one of full, nouso, off", s)
}

// Options are the options of FromFiles.
type Options struct {
	MTU     int          // of the interface, in bytes; it is set if OnLink is set, and otherwise only reported
	Offload Mode         // full unless set
	Log     *slog.Logger // nil: nothing is logged

	// OnLink is called when the link may have gone up or down or may have another MTU, until Close. It must not block
	// or close the device. The interface must be in the network namespace of the thread that calls FromFiles. If it
	// is nil, nothing is watched.
	OnLink func()
}
