package netns

import (
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iffBackpressure is IFF_BACKPRESSURE of linux/if_tun.h, which x/sys does not have yet. It is in net-next since
// August 2026 (commit 485e38995cc3; Documentation/networking/tuntap.rst, 3.4).
//
// Normally a frame that arrives at a full queue of a TUN is lost. With this flag the kernel stops the queue before
// that and lets the interface's queueing discipline hold the frames, where they count against the buffer of the
// sending socket. A program that sends faster than we read then waits, as at a network card, and loses nothing. The
// flag has no effect without a queueing discipline.
//
// The kernel's developers made it a flag because it can cost speed when many sockets send at once: eight threads of
// iperf3 fell from 13.5 to 9.1 Gbit/s on one of their machines.
const iffBackpressure = 0x0080

// driver holds the calls to the kernel's TUN driver for this flag. Tests replace them.
var driver = struct {
	features func(fd int) (uint32, error)        // the flags that TUNSETIFF accepts
	attach   func(fd int, ifr *unix.Ifreq) error // makes fd a queue
	flags    func(fd int, ifr *unix.Ifreq) error // reads the flags of the interface that fd is a queue of
}{
	func(fd int) (uint32, error) { return unix.IoctlGetUint32(fd, unix.TUNGETFEATURES) },
	func(fd int, ifr *unix.Ifreq) error { return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr) },
	func(fd int, ifr *unix.Ifreq) error { return unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr) },
}

// offered returns iffBackpressure if the kernel supports it, and 0 otherwise. fd is an open /dev/net/tun.
func offered(fd int) uint16 {
	features, err := driver.features(fd)
	if err != nil {
		return 0
	}
	return uint16(features & iffBackpressure)
}

// hasBackpressure reports whether the flag is in force on the interface that fd is a queue of.
func hasBackpressure(fd int) bool {
	ifr, err := unix.NewIfreq("")
	return err == nil && driver.flags(fd, ifr) == nil && ifr.Uint16()&iffBackpressure != 0
}

// setQueueing gives the interface that fd is a queue of the right queueing discipline. Without backpressure that is
// none: the kernel never tells a discipline to wait, so it would only cost time and, with IFF_MULTI_QUEUE, memory for
// each of the 256 possible queues (4 MB with pfifo_fast). With backpressure it is the kernel's default
// (net.core.default_qdisc) for each queue separately; if all queues shared one, a full queue would block the others.
// Errors are ignored.
func setQueueing(name string, fd int) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return
	}
	root := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT}
	none := &netlink.GenericQdisc{QdiscAttrs: root, QdiscType: "noqueue"}
	if !hasBackpressure(fd) {
		_ = h.QdiscReplace(none)
		return
	}
	// A persistent interface may have been left without one. Deleting "noqueue" makes the kernel create the default.
	list, err := h.QdiscList(link)
	if err == nil && len(list) == 1 && list[0].Type() == none.Type() {
		_ = h.QdiscDel(list[0])
	}
}
