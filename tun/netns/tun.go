package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const tunNode = "/dev/net/tun"

// TUNOptions are the options of OpenTUN.
type TUNOptions struct {
	Name    string // of the interface, or a template such as "tun%d"; empty: the kernel chooses
	MTU     int    // bytes; 0: unchanged
	VnetHdr bool   // frames carry a struct virtio_net_hdr
	Persist bool   // the interface stays when its files are closed
	Queues  int    // number of queues; 0 and 1: one, without IFF_MULTI_QUEUE
}

// errForeign means that an interface has more queues than we attached.
var errForeign = errors.New("another program has a queue of it")

// makeAttempts is how often a new interface is made if another program attaches a queue to it before it has an owner.
const makeAttempts = 5

// unowned is called when a new interface has no owner yet. Tests attach a queue at that moment.
var unowned = func(name string) {}

// OpenTUN opens /dev/net/tun and attaches it to an interface of the calling thread's network namespace: a new one, or
// an existing persistent one of that name, which gets one queue if it was made for one. There is one file for each
// queue. The files are non-blocking, the caller closes them, and they may be used from any namespace.
//
// The interface belongs to the effective user and group of the caller. Others then need CAP_NET_ADMIN to attach a
// queue, which would receive a share of the frames. Until the owner is set, anybody who can open /dev/net/tun may
// attach one. If that happens to a new interface, it is deleted and made again; an interface that existed before is
// refused.
func OpenTUN(o TUNOptions) (queues []*os.File, name string, err error) {
	for attempt := 1; ; attempt++ {
		fresh := !exists(o.Name)
		queues, name, err = openTUN(o)
		if err == nil {
			return queues, name, nil
		}
		if fresh && errors.Is(err, errForeign) {
			if derr := deleteLink(name); derr != nil {
				err = errors.Join(err, derr)
			} else if attempt < makeAttempts {
				CloseTUN(queues)
				continue
			}
		}
		CloseTUN(queues)
		return nil, "", err
	}
}

// openTUN is one attempt of OpenTUN. On error, too, it returns the files and the name that it got.
func openTUN(o TUNOptions) (queues []*os.File, name string, err error) {
	name = o.Name
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if o.VnetHdr {
		flags |= unix.IFF_VNET_HDR
	}
	if o.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for len(queues) < max(o.Queues, 1) {
		fd, attached, err := openQueue(name, flags)
		if errors.Is(err, unix.EINVAL) && o.Queues > 1 && len(queues) == 0 {
			o.Queues, flags = 1, flags&^unix.IFF_MULTI_QUEUE
			continue
		}
		if err != nil {
			return queues, name, err
		}
		name = attached
		// Only now that it is attached can it be polled: os.NewFile adds it to the runtime's poller.
		queues = append(queues, os.NewFile(uintptr(fd), tunNode))
		if len(queues) > 1 {
			continue
		}
		if err := takeOver(fd, name, o); err != nil {
			return queues, name, err
		}
		setQueueing(name, fd)
	}
	if o.MTU != 0 {
		if err := setMTU(name, o.MTU); err != nil {
			return queues, name, err
		}
	}
	return queues, name, nil
}

// takeOver makes the interface belong to us alone. fd is our first queue.
func takeOver(fd int, name string, o TUNOptions) error {
	unowned(name)
	if err := unshared(name, o); err != nil {
		return err
	}
	// Set the group as well: the interface may have had another one, whose members some kernels let in.
	for _, own := range []struct{ request, id int }{{unix.TUNSETOWNER, os.Geteuid()}, {unix.TUNSETGROUP, os.Getegid()}} {
		if err := unix.IoctlSetInt(fd, uint(own.request), own.id); err != nil {
			return fmt.Errorf("cannot restrict the TUN device %s to this user: %w", name, err)
		}
	}
	if err := unshared(name, o); err != nil { // from here on this cannot change
		return err
	}
	persist := 0 // also for an interface that existed before
	if o.Persist {
		persist = 1
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, persist); err != nil && o.Persist {
		return fmt.Errorf("cannot make the TUN device %s persistent: %w", name, err)
	}
	return nil
}

// unshared checks that our first queue is the only one.
func unshared(name string, o TUNOptions) error {
	if o.Queues < 2 {
		return nil // without IFF_MULTI_QUEUE the kernel itself refuses a second queue
	}
	n, err := queueCount(name)
	if err != nil {
		return fmt.Errorf("cannot find out who uses the TUN device %s: %w", name, err)
	}
	if n != 1 {
		return fmt.Errorf(
			"cannot use the TUN device %s: %w: choose another name, or remove it with 'ip link del %s'",
			name,
			errForeign,
			name,
		)
	}
	return nil
}

// exists reports whether there is an interface with that name. A template and the empty name mean a new one.
func exists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

func deleteLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("cannot delete the TUN device %s: %w", name, err)
	}
	return nil
}

// CloseTUN closes the files that OpenTUN returned.
func CloseTUN(queues []*os.File) {
	for _, f := range queues {
		f.Close()
	}
}

// openQueue attaches one more queue to the interface. If there is no interface with that name, this creates it.
func openQueue(name string, flags uint16) (fd int, attached string, err error) {
	fd, err = unix.Open(tunNode, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, "", openTUNError(err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return -1, "", fmt.Errorf("cannot name the TUN device %q: at most %d bytes", name, unix.IFNAMSIZ-1)
	}
	ifr.SetUint16(flags | offered(fd))
	if err := driver.attach(fd, ifr); err != nil {
		unix.Close(fd)
		return -1, "", attachError(name, err)
	}
	return fd, ifr.Name(), nil
}

// queueCount returns the number of queues of the interface, whichever process holds them. Detached queues count,
// because their holders can attach them again without any privilege.
func queueCount(name string) (int, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(link.Index)
	req.AddData(msg)
	answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return 0, err
	}
	if len(answers) == 0 || len(answers[0]) < unix.SizeofIfInfomsg {
		return 0, errors.New("the kernel's answer is too short")
	}
	data := answers[0][unix.SizeofIfInfomsg:]
	for _, attr := range []uint16{unix.IFLA_LINKINFO, unix.IFLA_INFO_DATA} {
		if data, err = attribute(data, attr); err != nil {
			return 0, err
		}
	}
	n := 0
	for _, attr := range []uint16{unix.IFLA_TUN_NUM_QUEUES, unix.IFLA_TUN_NUM_DISABLED_QUEUES} {
		value, err := attribute(data, attr)
		if err != nil {
			return 0, err
		}
		if len(value) < 4 {
			return 0, fmt.Errorf("the kernel's attribute %d is too short", attr)
		}
		n += int(binary.NativeEndian.Uint32(value))
	}
	return n, nil
}

// attribute returns the value of an attribute in data.
func attribute(data []byte, kind uint16) ([]byte, error) {
	attrs, err := nl.ParseRouteAttr(data)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type&^unix.NLA_F_NESTED == kind })
	if i < 0 {
		return nil, fmt.Errorf("the kernel's attribute %d is missing", kind)
	}
	return attrs[i].Value, nil
}

// CheckTUN reports whether OpenTUN can open its device node. It changes nothing.
func CheckTUN() error {
	fd, err := unix.Open(tunNode, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return openTUNError(err)
	}
	return unix.Close(fd)
}

func openTUNError(err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = ": run 'modprobe tun'; in a container give it the device (docker: --device /dev/net/tun)"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		hint = ": the kernel has no TUN driver: run 'modprobe tun'"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		hint = ": run as root, or let everyone open it ('chmod 0666 /dev/net/tun', as most systems have it)"
	}
	return fmt.Errorf("cannot open %s: %w%s", tunNode, err, hint)
}

func attachError(name string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EPERM):
		hint = ": CAP_NET_ADMIN is needed: run as root"
		if exists(name) {
			hint = ": it belongs to another user: run as root, or choose another name"
		}
	case errors.Is(err, unix.EBUSY):
		hint = ": another program uses it: choose another name"
	case errors.Is(err, unix.EINVAL):
		hint = ": the name is not valid, or an interface of that name is no TUN of this kind"
	case errors.Is(err, unix.ENOTTY):
		hint = ": " + tunNode + " is something else: it must be the character device 10, 200"
	}
	if name != "" {
		name = " " + name
	}
	return fmt.Errorf("cannot make the TUN device%s: %w%s", name, err, hint)
}

func setMTU(name string, mtu int) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot set the MTU of %s: %w", name, err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("cannot set the MTU of %s: %w", name, err)
	}
	ifr.SetUint32(uint32(mtu))
	if err := unix.IoctlIfreq(s, unix.SIOCSIFMTU, ifr); err != nil {
		return fmt.Errorf("cannot set the MTU of %s to %d: %w", name, mtu, err)
	}
	return nil
}

// Configure sets the MTU (0: unchanged) and the addresses of an interface of the calling thread's namespace, brings
// it up and, if asked, makes it the default route of each family for which it has an address. Existing settings are
// kept or replaced. If the namespace has no IPv6 (ipv6.disable=1, disable_ipv6, an MTU below 1280), only IPv4 is set
// up; nothing can leave by IPv6 then. Duplicate address detection and autoconfiguration are off, because nothing
// would answer.
//
// ipv6 reports whether all IPv6 addresses were set.
func Configure(name string, mtu int, addrs []netip.Prefix, defaultRoutes bool) (ipv6 bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("cannot configure %s: %w", name, err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return false, fmt.Errorf("cannot configure %s: %w", name, err)
	}
	if mtu != 0 {
		if err := h.LinkSetMTU(link, mtu); err != nil {
			return false, fmt.Errorf("cannot set the MTU of %s to %d: %w", name, mtu, err)
		}
	}
	// This must happen before the interface comes up: we would only drop its link-local address and router
	// solicitations.
	sysctl("net/ipv6/conf/"+name+"/addr_gen_mode", "1")
	sysctl("net/ipv6/conf/"+name+"/accept_ra", "0")
	sysctl("net/ipv6/conf/"+name+"/autoconf", "0")
	if err := h.LinkSetUp(link); err != nil {
		return false, fmt.Errorf("cannot bring %s up: %w", name, err)
	}
	if mtu == 0 {
		mtu = link.Attrs().MTU
	}
	has4, has6, no6, err := setAddrs(h, link, addrs, mtu < 1280) // RFC 8200, section 5
	if err != nil || !defaultRoutes {
		return has6 && !no6, err
	}
	if err := setDefaultRoutes(h, link, has4, has6); err != nil {
		return false, err
	}
	return has6 && !no6, nil
}

// setAddrs gives the interface its addresses. has4 and has6 report which families it has then, and no6 whether IPv6 addresses
// were left out, because the namespace has no IPv6.
func setAddrs(h *netlink.Handle, link netlink.Link, addrs []netip.Prefix, without6 bool) (has4, has6, no6 bool, err error) {
	name := link.Attrs().Name
	no6 = without6
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			if no6 {
				continue
			}
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(link, a); err != nil {
			if p.Addr().Is6() && isNoIPv6(err) {
				no6 = true
				continue
			}
			return has4, false, no6, fmt.Errorf("cannot give %s the address %s: %w", name, p, err)
		}
		if p.Addr().Is6() {
			awaitLocal(h, link, p.Addr())
		}
		has4 = has4 || p.Addr().Is4()
		has6 = has6 || p.Addr().Is6()
	}
	return has4, has6, no6, nil
}

// setDefaultRoutes makes the interface the default route of the families for which it has an address.
func setDefaultRoutes(h *netlink.Handle, link netlink.Link, has4, has6 bool) error {
	name := link.Attrs().Name
	for _, d := range []struct {
		has   bool
		dst   netip.Prefix
		scope netlink.Scope // as 'ip route' sets it for a route without a gateway
	}{
		{has4, netip.MustParsePrefix("0.0.0.0/0"), netlink.SCOPE_LINK},
		{has6, netip.MustParsePrefix("::/0"), netlink.SCOPE_UNIVERSE},
	} {
		if !d.has {
			continue
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(d.dst), Scope: d.scope}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("cannot make %s the default route %s: %w", name, d.dst, err)
		}
	}
	return nil
}

// linkUp brings up an interface of the calling thread's namespace.
func linkUp(name string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot bring %s up: %w", name, err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("cannot bring %s up: %w", name, err)
	}
	return nil
}

// awaitLocal waits until the kernel treats a as its own. The kernel adds an IPv6 address's local route from a work
// queue, a little after the address can be used as a source; packets that arrive in between are lost
// (Ip6InAddrErrors; seen by 3 % of the tests that answered at once). After five seconds it gives up waiting. It also
// stops if the address is gone, as when another program sets the interface down.
func awaitLocal(h *netlink.Handle, link netlink.Link, a netip.Addr) {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if r, err := h.RouteGet(a.AsSlice()); err == nil && len(r) > 0 && r[0].Type == unix.RTN_LOCAL {
			return
		}
		list, err := h.AddrList(link, unix.AF_INET6)
		if err == nil && !slices.ContainsFunc(list, func(have netlink.Addr) bool { return have.IP.Equal(a.AsSlice()) }) {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// isNoIPv6 distinguishes a namespace without IPv6 from a real failure: EACCES for disable_ipv6, EOPNOTSUPP or
// EAFNOSUPPORT for ipv6.disable=1.
func isNoIPv6(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// sysctl writes a value below /proc/sys, which shows the network namespace of the calling thread. Callers may ignore
// the error: the file may be missing (no IPv6) or read-only (containers).
func sysctl(key, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0)
}
