package netns

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The time until a failed watch is started again: at first, and at most.
const (
	watchAgain = time.Second
	watchMost  = 30 * time.Second
)

// Change describes a change in a network namespace.
type Change struct {
	Link         int          // index of an interface that changed, appeared or disappeared; 0: none
	Addr         netip.Prefix // an address that appeared or disappeared; invalid: none
	AddrLink     int          // index of the interface that has or had Addr
	DefaultRoute bool         // a default route of the main table appeared or disappeared
	Lost         bool         // the kernel had more events than there was room for: anything may have changed
}

// Watch reports changes in the network namespace of the thread that made it. An address whose lifetime was renewed,
// as router advertisements do every few minutes, has not changed.
type Watch struct {
	log *slog.Logger

	mu     sync.Mutex
	sock   *nl.NetlinkSocket // nil: there is none now
	closed chan struct{}

	addrs map[address]bool // the current addresses
}

type address struct {
	link int
	addr netip.Prefix
}

// NewWatch subscribes. Changes from now on are kept until Run. Every thread of the process must be in the namespace
// if Run is to start again after a failure.
func NewWatch(log *slog.Logger) (*Watch, error) {
	w := &Watch{log: log, closed: make(chan struct{})}
	if err := w.open(); err != nil {
		return nil, fmt.Errorf("cannot watch the network: %w", err)
	}
	return w, nil
}

// open subscribes instead of the previous subscription and lists the addresses.
func (w *Watch) open() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sock != nil {
		w.sock.Close()
		w.sock = nil
	}
	if w.isClosed() {
		return os.ErrClosed
	}
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return err
	}
	if err := w.learn(); err != nil {
		sock.Close()
		return err
	}
	w.sock = sock
	return nil
}

// learn lists the current addresses.
func (w *Watch) learn() error {
	list, err := netlink.AddrList(nil, unix.AF_UNSPEC)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	w.addrs = map[address]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			ones, _ := a.Mask.Size()
			w.addrs[address{a.LinkIndex, netip.PrefixFrom(ip.Unmap(), ones)}] = true
		}
	}
	return nil
}

// Run calls got for each change until Close. After a failure the watch starts again, and got is told that changes
// were lost.
func (w *Watch) Run(got func(Change)) {
	for pause := watchAgain; ; pause = min(2*pause, watchMost) {
		began := time.Now()
		err := w.receive(got)
		if w.isClosed() {
			return
		}
		w.log.Warn("lost the netlink subscription: it is made again", "err", err)
		if time.Since(began) > watchMost {
			pause = watchAgain
		}
		again := time.NewTimer(pause)
		select {
		case <-again.C:
		case <-w.closed:
			again.Stop()
			return
		}
		if err := w.open(); err != nil {
			continue
		}
		got(Change{Lost: true})
	}
}

func (w *Watch) isClosed() bool {
	select {
	case <-w.closed:
		return true
	default:
		return false
	}
}

// receive returns when the socket fails or is closed.
func (w *Watch) receive(got func(Change)) error {
	w.mu.Lock()
	sock := w.sock
	w.mu.Unlock()
	if sock == nil {
		return errors.New("there is no subscription")
	}
	for {
		msgs, _, err := sock.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			if err = w.learn(); err == nil {
				got(Change{Lost: true})
				continue
			}
		}
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if c, ok := w.change(m.Header.Type, m.Data); ok {
				got(c)
			}
		}
	}
}

// change decodes a message. ok is false if it is not of interest.
func (w *Watch) change(kind uint16, data []byte) (c Change, ok bool) {
	switch kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(data) < unix.SizeofIfInfomsg {
			return c, false
		}
		c.Link = int(nl.DeserializeIfInfomsg(data).Index)
		return c, true
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(data) < unix.SizeofRtMsg {
			return c, false
		}
		r := nl.DeserializeRtMsg(data)
		c.DefaultRoute = r.Dst_len == 0 && r.Table == unix.RT_TABLE_MAIN
		return c, c.DefaultRoute
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, ok := parseAddress(data)
		if !ok || w.addrs[a] == (kind == unix.RTM_NEWADDR) {
			return c, false
		}
		if kind == unix.RTM_NEWADDR {
			w.addrs[a] = true
		} else {
			delete(w.addrs, a)
		}
		return Change{Addr: a.addr, AddrLink: a.link}, true
	}
	return c, false
}

func parseAddress(data []byte) (a address, ok bool) {
	if len(data) < unix.SizeofIfAddrmsg {
		return a, false
	}
	msg := nl.DeserializeIfAddrmsg(data)
	attrs, err := nl.ParseRouteAttr(data[unix.SizeofIfAddrmsg:])
	if err != nil {
		return a, false
	}
	var ip netip.Addr
	for _, attr := range attrs {
		// IFA_LOCAL, if present, is the address itself; IFA_ADDRESS is then that of the peer.
		if attr.Attr.Type == unix.IFA_LOCAL || attr.Attr.Type == unix.IFA_ADDRESS && !ip.IsValid() {
			ip, _ = netip.AddrFromSlice(attr.Value)
		}
	}
	a = address{int(msg.Index), netip.PrefixFrom(ip, int(msg.Prefixlen))}
	return a, a.addr.IsValid()
}

// Close ends Run. It may be called twice.
func (w *Watch) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.isClosed() {
		close(w.closed)
	}
	if w.sock != nil {
		w.sock.Close()
		w.sock = nil
	}
}
