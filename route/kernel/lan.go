package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// private are the networks that no proxy can lead to, so that a host goes on talking to those of them that it is
// connected to: RFC 1918, RFC 3927, RFC 4193 and link-local. Nothing else is ever excepted: the prefix on a device is
// what a DHCP server or a router says, and any could say 0.0.0.0/1.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
}

// maxLAN bounds the rules for private networks: each is looked at for each route look-up of the host. A host with a
// bridge for each of its containers' networks has some tens.
const maxLAN = 128

// connected gives the private prefix that an address on a device stands for. One that is the host's alone (/32, /128)
// needs no rule: the kernel's local table comes first.
func connected(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	a = a.Unmap()
	if ones == a.BitLen() {
		return netip.Prefix{}, false
	}
	p, err := a.Prefix(ones)
	if err != nil {
		return netip.Prefix{}, false
	}
	return p, slices.ContainsFunc(private, func(q netip.Prefix) bool { return q.Bits() <= p.Bits() && q.Contains(p.Addr()) })
}

// wanted are the private networks that the host is connected to now, by devices other than the TUN.
func (s *Steering) wanted() (map[netip.Prefix]bool, error) {
	addrs, err := s.h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // interrupted: it changed meanwhile, an event follows
		return nil, fmt.Errorf("cannot list addresses: %w", err)
	}
	want := map[netip.Prefix]bool{}
	for _, a := range addrs {
		n := a.IPNet
		if a.Peer != nil {
			n = a.Peer // the network is the peer's, the address stands alone
		}
		p, ok := connected(n)
		if !ok || a.LinkIndex == s.link.Attrs().Index || want[p] {
			continue
		}
		if len(want) == maxLAN {
			s.o.Log.Warn("too many private networks: the rest goes through the proxy", "limit", maxLAN, "first_left_out", p)
			break
		}
		want[p] = true
	}
	return want, nil
}

// sync makes the rules for private networks what they should be.
func (s *Steering) sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil
	}
	want, err := s.wanted()
	if err != nil {
		return err
	}
	var errs []error
	for p, r := range s.lan {
		if !want[p] {
			errs = append(errs, s.delRule(r))
			delete(s.lan, p)
			s.o.Log.Info("no longer connected: goes through the proxy", "network", p)
		}
	}
	for p := range want {
		if s.lan[p] != nil {
			continue
		}
		family := unix.AF_INET
		if p.Addr().Is6() {
			family = unix.AF_INET6
		}
		r := s.rule(family, atLAN, unix.RT_TABLE_MAIN)
		r.Dst = &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		if err := s.insert(r); err != nil {
			errs = append(errs, err)
			continue
		}
		s.lan[p] = r
		s.o.Log.Info("connected private network: reached past the proxy", "network", p)
	}
	return errors.Join(errs...)
}

// watch adds the rules for private networks and starts the goroutine that keeps them.
func (s *Steering) watch() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot watch addresses: %w", err)
	}
	s.events = os.NewFile(uintptr(fd), "address events")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR}); err != nil {
		s.events.Close()
		return fmt.Errorf("cannot watch addresses: %w", err)
	}
	s.watched = make(chan struct{})
	err = s.sync() // after the subscription, so that no change is missed
	go func() {
		defer close(s.watched)
		buf := make([]byte, 64<<10)
		for {
			// What changed does not matter, nor that events were lost (ENOBUFS): the list is read again.
			if _, err := s.events.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			if err := s.sync(); err != nil {
				s.o.Log.Error("private networks may be unreachable", "err", err)
			}
		}
	}()
	return err
}

// warnReversePath: the kernel looks for the way back of what comes in without our mark, finds the TUN, and where
// rp_filter is strict drops the proxy's answers.
func warnReversePath(log *slog.Logger, tun string) {
	read := func(dev string) string {
		b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + dev + "/rp_filter")
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	dirs, _ := filepath.Glob("/proc/sys/net/ipv4/conf/*")
	all := read("all")
	for _, d := range dirs {
		switch dev := filepath.Base(d); dev {
		case "all", "default", "lo", tun:
		default:
			if max(all, read(dev)) == "1" { // the larger of both counts: Documentation/networking/ip-sysctl.rst
				log.Warn("strict reverse path filtering drops what the proxy answers: sysctl -w net.ipv4.conf."+dev+".rp_filter=2", "device", dev)
			}
		}
	}
}
