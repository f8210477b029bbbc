package tun

import (
	"fmt"
	"log/slog"
)

// Mode is how much of the kernel's offloads is asked for. Less is for old kernels and for tests.
type Mode uint8

const (
	OffloadFull  Mode = iota // checksums, TCP super-segments and UDP super-frames, as far as the kernel has them
	OffloadNoUSO             // checksums and TCP super-segments
	OffloadOff               // none: each frame is one packet with its checksums filled in
)

var modeNames = [...]string{"full", "nouso", "off"}

// String is the word of the offload flag: full, nouso, off.
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

// Options are the choices of FromFiles.
type Options struct {
	MTU     int          // of the interface, bytes. It is set with OnLink, and otherwise only reported
	Offload Mode         // full unless set
	Log     *slog.Logger // nil: nothing is logged

	// OnLink is called when the link may have gone up or down or may have another MTU, until Close. It must not block or close
	// the device. The interface must be in the network namespace of the thread that calls FromFiles. nil: nothing is watched.
	OnLink func()
}
