package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoInterface means that the calling thread's namespace has no interface with that index: it was deleted, or moved
// to another namespace.
var ErrNoInterface = errors.New("the interface no longer exists")

// Wanted is the intended state of an interface of the calling thread's namespace. The index identifies the interface,
// because others can change the name.
type Wanted struct {
	Index int
	Name  string
	MTU   int
	Addrs []netip.Prefix
}

// Faults lists the ways in which the interface differs from its intended state. Each fault is the rest of a sentence
// about the interface.
func (w Wanted) Faults() (faults []string, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot look at %s: %w", w.Name, err)
	}
	defer h.Close()
	link, err := w.find(h)
	if err != nil {
		return nil, err
	}
	a := link.Attrs()
	if a.Name != w.Name {
		faults = append(faults, "has the name "+a.Name)
	}
	if a.RawFlags&unix.IFF_UP == 0 {
		faults = append(faults, "is down")
	}
	if a.MTU != w.MTU {
		faults = append(faults, fmt.Sprintf("has an MTU of %d", a.MTU))
	}
	list, err := h.AddrList(link, unix.AF_UNSPEC)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("cannot look at the addresses of %s: %w", w.Name, err)
	}
	for _, want := range w.Addrs {
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IPNet.String() == want.String() }) {
			faults = append(faults, "lacks the address "+want.Addr().String())
		}
	}
	return faults, nil
}

func (w Wanted) find(h *netlink.Handle) (netlink.Link, error) {
	link, err := h.LinkByIndex(w.Index)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing), errors.Is(err, unix.ENODEV):
		return nil, ErrNoInterface
	case err != nil:
		return nil, fmt.Errorf("cannot look at %s: %w", w.Name, err)
	}
	return link, nil
}

// Mend restores the name of the interface and configures it again, without default routes. ipv6 is as in Configure.
func (w Wanted) Mend() (ipv6 bool, err error) {
	if err := w.rename(); err != nil {
		return false, err
	}
	return Configure(w.Name, w.MTU, w.Addrs, false)
}

func (w Wanted) rename() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot give the TUN device its name %s again: %w", w.Name, err)
	}
	defer h.Close()
	link, err := w.find(h)
	if err != nil || link.Attrs().Name == w.Name {
		return err
	}
	err = h.LinkSetName(link, w.Name)
	if errors.Is(err, unix.EBUSY) { // before Linux 6.2 the interface must be down for that
		if err = h.LinkSetDown(link); err == nil {
			err = h.LinkSetName(link, w.Name)
		}
	}
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: another interface has it now: rename or delete that one", err)
	}
	if err != nil {
		return fmt.Errorf("cannot give the TUN device %s its name %s again: %w", link.Attrs().Name, w.Name, err)
	}
	return nil
}
