package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// How often removed changes are restored: at once, but at most a few times a second if the removal is repeated.
const (
	putBackEvery = 250 * time.Millisecond
	settle       = 5 * time.Millisecond // events come in bursts
)

// The time after which an ended watch is started again: at first, and at most. It is a variable for tests.
var (
	watchAgain = time.Second
	watchMost  = 30 * time.Second
)

// subscribe is a variable so that tests can simulate a kernel that stops reporting.
var subscribe = func(proto int, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "netlink events")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		f.Close()
		return nil, err
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// source is a subscription to events, and what is needed to renew it.
type source struct {
	what   string // for messages
	proto  int
	groups []int

	mu     sync.Mutex
	f      *os.File // nil: there is no subscription now
	closed bool
}

// open subscribes, and replaces an existing subscription.
func (s *source) open() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f != nil {
		s.f.Close()
		s.f = nil
	}
	if s.closed {
		return os.ErrClosed
	}
	f, err := subscribe(s.proto, s.groups...)
	s.f = f
	return err
}

// file returns the file to read from, or nil.
func (s *source) file() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.f
}

// interrupt ends a read.
func (s *source) interrupt() {
	if f := s.file(); f != nil {
		_ = f.SetReadDeadline(time.Unix(1, 0))
	}
}

func (s *source) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.f != nil {
		s.f.Close()
	}
}

// watchEvents subscribes. The events wait in the sockets until Run.
func (h *Host) watchEvents() error {
	h.events = &source{what: "routes, rules and addresses", proto: unix.NETLINK_ROUTE, groups: []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE}}
	h.nfEvents = &source{what: "nftables", proto: unix.NETLINK_NETFILTER, groups: []int{unix.NFNLGRP_NFTABLES}}
	for _, s := range []*source{h.events, h.nfEvents} {
		if err := s.open(); err != nil {
			return fmt.Errorf("cannot watch the host: %w", err)
		}
	}
	return nil
}

// happened collects what has happened to the host.
type happened struct {
	any, defaultRoute, filter bool
	lost                      bool // events were lost: the filter may have been changed
	groups                    bool // of control groups, and nothing else
}

// Run restores what others remove, follows changes of addresses and devices, and renews the guard, until ctx ends. If
// the kernel stops reporting, Run subscribes again and checks everything meanwhile. It may be called once, and every
// thread of the process must be in the network namespace.
func (h *Host) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer func() { // ctx has ended: a goroutine that is subscribing sees this before it reads
		h.interruptEvents()
		wg.Wait()
	}()
	var mu sync.Mutex
	var news happened
	wake := make(chan struct{}, 1)
	tell := func(f func(*happened)) {
		mu.Lock()
		f(&news)
		mu.Unlock()
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	tell(func(n *happened) { n.any = true }) // what happened before
	wg.Go(func() { h.follow(ctx, h.events, func(b []byte) { tell(func(n *happened) { h.routeEvents(b, n) }) }) })
	wg.Go(func() { h.follow(ctx, h.nfEvents, func(b []byte) { tell(func(n *happened) { h.filterEvents(b, n) }) }) })
	wg.Go(func() { h.followGroups(ctx, func() { tell(func(n *happened) { n.groups = true }) }) })
	guard := time.NewTicker(h.c.Guard / 5)
	defer guard.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-guard.C:
			h.renew()
			continue
		case <-wake:
		}
		mu.Lock()
		groups := news.groups
		news.groups = false
		mu.Unlock()
		if groups {
			h.lookAtGroups()
		}
		time.Sleep(settle)
		mu.Lock()
		n := news
		news = happened{groups: news.groups}
		mu.Unlock()
		if n.groups = false; n == (happened{}) {
			continue
		}
		if n.defaultRoute && h.c.OnDefaultRoute != nil {
			h.c.OnDefaultRoute()
		}
		if h.putBack(n) {
			pause(ctx, putBackEvery)
		}
	}
}

// interruptEvents ends the reads of events.
func (h *Host) interruptEvents() {
	h.events.interrupt()
	h.nfEvents.interrupt()
	if h.inotify != nil {
		_ = h.inotify.SetReadDeadline(time.Unix(1, 0))
	}
}

// pause waits, but not beyond the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// follow calls got for each batch of messages until ctx ends. A nil batch means that some may have been lost.
func (h *Host) follow(ctx context.Context, s *source, got func([]byte)) {
	pause := watchAgain
	for ctx.Err() == nil {
		began := time.Now()
		err := readEvents(s.file(), got)
		if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
			return
		}
		h.unwatched(s, err)
		if time.Since(began) > watchMost {
			pause = watchAgain
		}
		for err != nil {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
			pause = min(2*pause, watchMost)
			if err = s.open(); errors.Is(err, os.ErrClosed) {
				return
			}
			got(nil)
		}
		h.unwatched(s, nil)
	}
}

// unwatched reports that the watch has ended or, if err is nil, that it is back.
func (h *Host) unwatched(s *source, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := "watch " + s.what
	if err == nil {
		h.c.Log.Info("the netlink subscription is back", "what", s.what)
		delete(h.warnings, key)
		delete(h.said, key)
		return
	}
	h.say(key, "lost the netlink subscription for "+s.what+": polling until it is back", "why", err)
}

// readEvents calls got for each batch of messages until a read fails. A nil batch means that some were lost.
func readEvents(f *os.File, got func([]byte)) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			got(nil)
		case err != nil:
			return err
		default:
			got(buf[:n])
		}
	}
}

// routeEvents records what is of interest. Our own changes are reported too, but cause no second change.
func (h *Host) routeEvents(b []byte, n *happened) {
	n.any = true
	if b == nil {
		n.defaultRoute = true
	}
	eachMessage(b, func(m unix.NlMsghdr, data []byte) bool {
		if (m.Type == unix.RTM_NEWROUTE || m.Type == unix.RTM_DELROUTE) && len(data) >= unix.SizeofRtMsg {
			r := nl.DeserializeRtMsg(data)
			n.defaultRoute = n.defaultRoute || r.Dst_len == 0 && r.Table == unix.RT_TABLE_MAIN
		}
		return true
	})
}

// filterEvents records that another program changed a table of ours.
func (h *Host) filterEvents(b []byte, n *happened) {
	if b == nil {
		n.lost = true
	}
	eachMessage(b, func(m unix.NlMsghdr, data []byte) bool {
		if m.Type>>8 == unix.NFNL_SUBSYS_NFTABLES && m.Type&0xff != unix.NFT_MSG_NEWGEN && m.Pid != 0 && m.Pid != h.nf.pid &&
			len(data) > 4 {
			// attribute 1 is the table's name for all kinds of objects
			n.filter = n.filter || cstring(attrs(data[4:])[1]) == h.c.NFTable
		}
		return true
	})
}

// putBack restores what was removed or changed, and reports whether anything was.
func (h *Host) putBack(n happened) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed {
		return false
	}
	put := n.filter || n.lost
	if n.filter {
		h.c.Log.Warn("another program changed our nftables table: it is restored", "table", h.c.NFTable)
	}
	if put {
		if err := h.applyFilter(); err != nil {
			h.c.Log.Error("cannot restore the filter", "err", err)
		}
	}
	changed, err := h.reconcile()
	if err != nil {
		h.c.Log.Error("cannot restore rules and routes: the traffic that they would steer is refused", "err", err)
		return true
	}
	if len(changed) > 0 {
		put = true
		h.c.Log.Warn("rules and routes were changed by another program: they are restored", "what", strings.Join(changed, "; "))
	}
	return put
}

// renew renews the guard if the data plane is alive.
func (h *Host) renew() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed || h.c.Alive != nil && !h.c.Alive() {
		return
	}
	h.sweepPrograms()
	h.followUnits()
	if h.c.madeAnew() {
		h.c.Log.Info("a service has a new control group: the filter was updated")
		if err := h.applyFilter(); err != nil {
			h.c.Log.Error("cannot add the new control group of a restarted service to the filter", "err", err)
		}
	}
	if err := h.refreshGuard(); err != nil {
		h.c.Log.Warn("cannot renew the guard: the filter is set again", "err", err)
		if err := h.applyFilter(); err != nil {
			h.c.Log.Error("cannot restore the filter", "err", err)
		}
	}
}
