package tun

import (
	"errors"
	"os"
)

// ErrBadFrame: the kernel refused the frame or its Header as malformed. It is lost; the device works on.
var ErrBadFrame = errors.New("frame refused as malformed")

// FromFile makes a Device of an open TUN.
func FromFile(f *os.File, o Options) (Device, error) {
	f.Close()
	return nil, errors.New("not yet")
}
