package keeper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/tun/netns"
)

// mender remembers what the TUN should be like. It belongs to one goroutine, except changed.
type mender struct {
	wanted netns.Wanted
	index  atomic.Int64  // wanted.Index for other goroutines
	news   chan struct{} // the TUN may have changed
	again  <-chan time.Time
	pace   netns.MendPace
	fault  string // what is wrong; "": nothing
	lost   bool   // the TUN is gone
}

func newMender() *mender { return &mender{news: make(chan struct{}, 1)} }

// use must be called with each TUN that is made.
func (m *mender) use(w netns.Wanted) {
	m.wanted, m.fault, m.lost = w, "", false
	m.index.Store(int64(w.Index))
}

// changed receives all changes in the namespace. It does not block.
func (m *mender) changed(c netns.Change) {
	if i := int(m.index.Load()); c.Lost || c.Link == i || c.AddrLink == i {
		m.check()
	}
}

func (m *mender) check() {
	select {
	case m.news <- struct{}{}:
	default:
	}
}

// watch restores what others change until end is called.
func (in *inside) watch() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	host := in.host
	ran.Go(func() { host.Run(ctx) })
	w, err := netns.NewWatch(in.log)
	if err != nil {
		in.log.Warn("cannot watch the addresses of the TUN device", "err", err)
		return func() { cancel(); ran.Wait() }
	}
	ran.Go(func() { w.Run(in.mend.changed) })
	in.mend.check() // for changes before the watch began
	return func() { cancel(); w.Close(); ran.Wait() }
}

// unwatch may be called twice, and without watch.
func (in *inside) unwatch() {
	if in.stop != nil {
		in.stop()
		in.stop = nil
	}
}

// tend checks the TUN and repairs it, unless that was done very recently; then it is checked again after a while. The
// filter lets nothing else out meanwhile.
func (in *inside) tend() {
	m := in.mend
	m.again = nil
	if in.stop == nil {
		return
	}
	faults, err := m.wanted.Faults()
	switch {
	case errors.Is(err, netns.ErrNoInterface): // attach asks for another TUN
		m.lost, m.fault = true, "the TUN device "+m.wanted.Name+" was deleted or moved"
		return
	case err != nil:
		in.log.Warn("cannot read the state of the TUN device", "err", err)
		return
	case len(faults) == 0:
		m.fault = ""
		return
	}
	what, at := strings.Join(faults, ", "), time.Now()
	m.fault = fmt.Sprintf(
		"another program changed the TUN device %s, and its traffic may fail until it is restored: it %s", m.wanted.Name, what)
	if wait := m.pace.Delay(at); wait > 0 {
		m.again = time.After(wait)
		return
	}
	ipv6, err := m.wanted.Mend()
	if err == nil && !ipv6 { // another program disabled IPv6, which is respected
		m.wanted.Addrs = only4(m.wanted.Addrs)
	}
	if err == nil {
		err = in.host.Steer()
	}
	m.pace.Mended(at)
	if err != nil {
		in.log.Warn("cannot restore the TUN device: trying again", "what", what, "err", err)
		m.again = time.After(m.pace.Delay(time.Now()))
		return
	}
	in.log.Warn("another program changed the TUN device: it is restored", "tun", m.wanted.Name, "what", what)
	m.check() // check the result
}

// only4 removes the IPv6 addresses, for a namespace without IPv6.
func only4(addrs []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(addrs), func(p netip.Prefix) bool { return p.Addr().Is6() })
}
