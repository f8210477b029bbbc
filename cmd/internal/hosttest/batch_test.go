package hosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// batcher sends several rtnetlink messages to the host's kernel with a single system call, so that nobody else can act
// between one message and the next.
type batcher struct {
	fd     int
	eth0   int
	handle *netlink.Handle // for all that needs no batch
}

func (w *world) batcher() *batcher {
	w.t.Helper()
	b := &batcher{}
	w.in("host", func() (err error) {
		b.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		b.eth0 = linkIndex("eth0")
		if err != nil {
			return err
		}
		b.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	w.t.Cleanup(b.handle.Close)
	w.t.Cleanup(func() { unix.Close(b.fd) })
	if err := unix.SetsockoptTimeval(b.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		w.t.Fatal(err)
	}
	if err := unix.SetsockoptInt(b.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1); err != nil {
		w.t.Fatal(err)
	}
	return b
}

// send sends the messages and returns an error that names each one that the kernel refused.
func (b *batcher) send(msgs ...*nl.NetlinkRequest) error {
	var out []byte
	number := map[uint32]int{}
	for i, m := range msgs {
		number[m.Seq] = i + 1
		out = append(out, m.Serialize()...)
	}
	if err := unix.Sendto(b.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("cannot send to the kernel: %w", err)
	}
	var errs []error
	in := make([]byte, 16<<10)
	for len(number) > 0 {
		n, _, err := unix.Recvfrom(b.fd, in, 0)
		if err != nil {
			return fmt.Errorf("cannot read the kernel's answer: %w", err)
		}
		replies, err := syscall.ParseNetlinkMessage(in[:n])
		if err != nil {
			return fmt.Errorf("cannot read the kernel's answer: %w", err)
		}
		for _, r := range replies {
			if r.Header.Type != unix.NLMSG_ERROR || len(r.Data) < 4 {
				continue
			}
			if code := int32(binary.NativeEndian.Uint32(r.Data)); code != 0 {
				errs = append(errs, fmt.Errorf("message %d of %d: %w", number[r.Header.Seq], len(msgs), unix.Errno(-code)))
			}
			delete(number, r.Header.Seq)
		}
	}
	return errors.Join(errs...)
}

func bytesOf(a netip.Addr) (family int, b []byte) {
	if a.Is4() {
		return unix.AF_INET, a.AsSlice()
	}
	return unix.AF_INET6, a.AsSlice()
}

// address adds an address such as 198.51.100.2/24 to eth0.
func (b *batcher) address(prefix string) *nl.NetlinkRequest {
	p := netip.MustParsePrefix(prefix)
	family, a := bytesOf(p.Addr())
	m := nl.NewNetlinkRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK)
	msg := nl.NewIfAddrmsg(family)
	msg.Prefixlen, msg.Index = uint8(p.Bits()), uint32(b.eth0)
	if family == unix.AF_INET6 {
		msg.Flags = unix.IFA_F_NODAD
	}
	m.AddData(msg)
	m.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a))
	m.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a))
	return m
}

// kernelRoute is a route by eth0. The zero value of each field leaves it out.
type kernelRoute struct {
	to     string // a network; empty: the default
	via    string
	src    string
	metric uint32
	onlink bool
	v6     bool
}

func (b *batcher) route(typ, flags int, r kernelRoute) *nl.NetlinkRequest {
	m := nl.NewNetlinkRequest(typ, flags|unix.NLM_F_ACK)
	msg := nl.NewRtMsg()
	if typ == unix.RTM_DELROUTE {
		msg = nl.NewRtDelMsg()
	}
	msg.Family = unix.AF_INET
	if r.v6 {
		msg.Family = unix.AF_INET6
	}
	if msg.Table = unix.RT_TABLE_MAIN; typ == unix.RTM_NEWROUTE && r.via == "" {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	if r.onlink {
		msg.Flags |= unix.RTNH_F_ONLINK
	}
	var attrs []*nl.RtAttr
	if r.to != "" {
		p := netip.MustParsePrefix(r.to)
		msg.Dst_len = uint8(p.Bits())
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_DST, p.Addr().AsSlice()))
	}
	if r.via != "" {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_GATEWAY, addr(r.via).AsSlice()))
	}
	if r.src != "" {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_PREFSRC, addr(r.src).AsSlice()))
	}
	if r.metric != 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(r.metric)))
	}
	attrs = append(attrs, nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(b.eth0))))
	m.AddData(msg)
	for _, a := range attrs {
		m.AddData(a)
	}
	return m
}

// addRoute is `ip route add`, replaceRoute `ip route replace`, delRoute `ip route del`.
func (b *batcher) addRoute(r kernelRoute) *nl.NetlinkRequest {
	return b.route(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r)
}

func (b *batcher) replaceRoute(r kernelRoute) *nl.NetlinkRequest {
	return b.route(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r)
}

func (b *batcher) delRoute(r kernelRoute) *nl.NetlinkRequest {
	return b.route(unix.RTM_DELROUTE, 0, r)
}

// bare takes the addresses and routes of eth0 away, except for link-local ones.
func (b *batcher) bare() error {
	var errs []error
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: b.eth0}}
	addrs, err := b.handle.AddrList(link, netlink.FAMILY_ALL)
	errs = append(errs, err)
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			errs = append(errs, b.handle.AddrDel(link, &a))
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := b.handle.RouteList(link, family)
		errs = append(errs, err)
		for _, r := range routes {
			if r.Protocol != unix.RTPROT_KERNEL {
				errs = append(errs, b.handle.RouteDel(&r))
			}
		}
	}
	return errors.Join(errs...)
}

// unplug takes the cable out of the host's eth0 and puts it in again after d.
func (w *world) unplug(d time.Duration, meanwhile func()) {
	w.t.Helper()
	w.ip("router", "link set host0 down")
	w.carrier(false)
	start := time.Now()
	if meanwhile != nil {
		meanwhile()
	}
	testkit.Pace(time.Until(start.Add(d)))
	w.ip("router", "link set host0 up")
	w.carrier(true)
}

// carrier waits until the host's eth0 has, or has not, a carrier.
func (w *world) carrier(want bool) {
	w.t.Helper()
	const running = unix.IFF_RUNNING
	w.quietly(30*time.Second, fmt.Sprintf("carrier %v", want), func() bool {
		flags := 0
		w.in("host", func() (err error) { flags, err = linkFlags("eth0"); return err })
		return flags&running != 0 == want
	})
}

// linkFlags is for a thread in the device's namespace.
func linkFlags(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr)
	return int(ifr.Uint16()), os.NewSyscallError("SIOCGIFFLAGS", err)
}

// quietly is eventually for what happens too often to be logged.
func (w *world) quietly(limit time.Duration, what string, ok func() bool) {
	w.t.Helper()
	if !testkit.Until(limit, ok) {
		w.t.Fatalf("not within %v: %s", limit, what)
	}
}

// TestBatch: the kernel takes an address and a default route by it in one batch, and says which message it refuses.
func TestBatch(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.ip("host", "addr flush dev eth0")
	b := w.batcher()
	if err := b.send(b.address(host4+"/24"), b.addRoute(kernelRoute{via: router4})); err != nil {
		t.Error(err)
	}
	if err := b.send(b.addRoute(kernelRoute{via: router4})); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second default route: %v, want EEXIST", err)
	}
	err := b.send(b.delRoute(kernelRoute{via: router4}), b.addRoute(kernelRoute{via: "192.0.2.77"}))
	if !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("a gateway that is not connected: %v, want ENETUNREACH", err)
	}
}
