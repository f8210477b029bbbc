package netns

import (
	"errors"
	"net/netip"
	"os"
)

// TUNOptions are the choices of OpenTUN.
type TUNOptions struct {
	Name    string // of the interface, a template such as "tun%d", or empty: the kernel's choice
	MTU     int    // bytes; 0: as it is
	VnetHdr bool   // frames carry a struct virtio_net_hdr
	Persist bool   // the interface stays when its file is closed
}

// OpenTUN opens the device.
func OpenTUN(o TUNOptions) (f *os.File, name string, err error) {
	return nil, "", errors.New("not yet")
}

// Configure brings the interface up.
func Configure(name string, mtu int, addrs []netip.Prefix, defaultRoutes bool) error {
	return errors.New("not yet")
}
