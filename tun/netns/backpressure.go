package netns

import (
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iffBackpressure is IFF_BACKPRESSURE of linux/if_tun.h, which x/sys does not have yet. Net-next has it since August 2026 (commit
// 485e38995cc3; Documentation/networking/tuntap.rst, 3.4).
//
// A frame that comes to a full queue of a TUN is lost. With this flag the kernel stops the queue before that and lets the
// interface's queueing discipline keep the frames, where they count against the buffer of the socket that sent them: a program
// that sends faster than we read waits, as at a network card, and loses nothing. It has no effect without a queueing discipline.
//
// The kernel's developers made it a flag because it can cost speed where many sockets send at once: eight threads of iperf3 fell
// from 13.5 to 9.1 Gbit/s on one of their machines.
const iffBackpressure = 0x0080

// driver is how the kernel's TUN driver is asked for the flag. Tests have another one.
var driver = struct {
	features func(fd int) (uint32, error)        // the flags that TUNSETIFF takes
	attach   func(fd int, ifr *unix.Ifreq) error // fd becomes a queue
	flags    func(fd int, ifr *unix.Ifreq) error // those of the interface that fd is a queue of
}{
	func(fd int) (uint32, error) { return unix.IoctlGetUint32(fd, unix.TUNGETFEATURES) },
	func(fd int, ifr *unix.Ifreq) error { return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr) },
	func(fd int, ifr *unix.Ifreq) error { return unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr) },
}

// offered is iffBackpressure if the kernel of fd, an open /dev/net/tun, has it, and 0 otherwise.
func offered(fd int) uint16 {
	features, err := driver.features(fd)
	if err != nil {
		return 0
	}
	return uint16(features & iffBackpressure)
}

// hasBackpressure reports whether the interface that fd is a queue of has the flag in force.
func hasBackpressure(fd int) bool {
	ifr, err := unix.NewIfreq("")
	return err == nil && driver.flags(fd, ifr) == nil && ifr.Uint16()&iffBackpressure != 0
}

// setQueueing gives the interface that fd is a queue of the queueing discipline that fits. Without backpressure that is none: the
// kernel never tells one to wait, so that what it would do is take time, and with IFF_MULTI_QUEUE memory for each of the 256
// queues there might be (4 MB of pfifo_fast). With backpressure it is the kernel's default (net.core.default_qdisc), for each
// queue by itself: with one for all of them a full queue would hold up the others. Best effort.
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
	// A persistent interface may have been left without one. The kernel makes the default one in its place.
	list, err := h.QdiscList(link)
	if err == nil && len(list) == 1 && list[0].Type() == none.Type() {
		_ = h.QdiscDel(list[0])
	}
}
