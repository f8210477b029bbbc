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

// How often what others remove is put back: at once, but not more than a few times a second if they go on.
const (
	putBackEvery = 250 * time.Millisecond
	settle       = 5 * time.Millisecond // events come in bursts
)

func subscribe(proto int, groups ...int) (*os.File, error) {
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

// watchEvents subscribes; the events wait in the sockets until Run.
func (h *Host) watchEvents() (err error) {
	h.events, err = subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err == nil {
		h.nfEvents, err = subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		return fmt.Errorf("cannot watch the host: %w", err)
	}
	return nil
}

// what happened to the host.
type happened struct {
	any, defaultRoute, filter bool
}

// Run puts back what others remove, follows addresses and devices, and refreshes the guard, until ctx ends. It is to be
// called once.
func (h *Host) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_ = h.events.SetReadDeadline(past)
		_ = h.nfEvents.SetReadDeadline(past)
	})
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
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
	wg.Go(func() { readEvents(h.events, func(b []byte) { tell(func(n *happened) { h.routeEvents(b, n) }) }) })
	wg.Go(func() { readEvents(h.nfEvents, func(b []byte) { tell(func(n *happened) { h.filterEvents(b, n) }) }) })
	guard := time.NewTicker(h.c.Guard / 5)
	defer guard.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-guard.C:
			h.renew()
			continue
		case <-wake:
		}
		time.Sleep(settle)
		mu.Lock()
		n := news
		news = happened{}
		mu.Unlock()
		if n == (happened{}) {
			continue
		}
		if n.defaultRoute && h.c.OnDefaultRoute != nil {
			h.c.OnDefaultRoute()
		}
		if h.putBack(n) {
			pause := time.NewTimer(putBackEvery)
			select {
			case <-pause.C:
			case <-ctx.Done():
				pause.Stop()
			}
		}
	}
}

// readEvents calls f for each batch of messages; nil: some were lost.
func readEvents(f *os.File, got func([]byte)) {
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			got(nil)
		case err != nil:
			return
		default:
			got(buf[:n])
		}
	}
}

// routeEvents notes what is of interest. Our own changes come by too: they change nothing a second time.
func (h *Host) routeEvents(b []byte, n *happened) {
	n.any = true
	eachMessage(b, func(m unix.NlMsghdr, data []byte) bool {
		if (m.Type == unix.RTM_NEWROUTE || m.Type == unix.RTM_DELROUTE) && len(data) >= unix.SizeofRtMsg {
			r := nl.DeserializeRtMsg(data)
			n.defaultRoute = n.defaultRoute || r.Dst_len == 0 && r.Table == unix.RT_TABLE_MAIN
		}
		return true
	})
}

// filterEvents notes that somebody else changed a table of ours.
func (h *Host) filterEvents(b []byte, n *happened) {
	if b == nil {
		n.filter = true
	}
	eachMessage(b, func(m unix.NlMsghdr, data []byte) bool {
		if m.Type>>8 == unix.NFNL_SUBSYS_NFTABLES && m.Type&0xff != unix.NFT_MSG_NEWGEN && m.Pid != 0 && m.Pid != h.nf.pid && len(data) > 4 {
			n.filter = n.filter || cstring(attrs(data[4:])[1]) == h.c.NFTable // the table's name is 1 for all kinds
		}
		return true
	})
}

// putBack reports whether something had to be put back.
func (h *Host) putBack(n happened) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed {
		return false
	}
	put := false
	if n.filter {
		h.c.Log.Warn("somebody changed our nftables table: it is put back", "table", h.c.NFTable)
		put = true
		if err := h.applyFilter(); err != nil {
			h.c.Log.Error("the filter could not be put back", "err", err)
		}
	}
	changed, err := h.reconcile()
	if err != nil {
		h.c.Log.Error("rules and routes could not be put back: what they would lead to the proxy is refused", "err", err)
		return true
	}
	if len(changed) > 0 {
		put = true
		h.c.Log.Warn("rules and routes are put right", "what", strings.Join(changed, "; "))
	}
	return put
}

// renew refreshes the guard if the data plane lives.
func (h *Host) renew() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shut || h.closed || h.c.Alive != nil && !h.c.Alive() {
		return
	}
	if err := h.refreshGuard(); err != nil {
		h.c.Log.Warn("the guard could not be renewed: the filter is set anew", "err", err)
		if err := h.applyFilter(); err != nil {
			h.c.Log.Error("the filter could not be put back", "err", err)
		}
	}
}
