package daemon

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// tended is the TUN of an up, which others may set down, rename, or take addresses from. It belongs to the goroutine
// of live, except changed, linkChanged and fault.
type tended struct {
	dev    tun.Device
	wanted netns.Wanted
	index  atomic.Int64 // wanted.Index for other goroutines

	news  chan struct{}
	again <-chan time.Time // nil: the TUN is checked only after events
	pace  netns.MendPace

	mu    sync.Mutex
	broke string // what is wrong with the TUN; "": nothing
}

// changed reports that the TUN may have changed. It does not block.
func (t *tended) changed() {
	select {
	case t.news <- struct{}{}:
	default:
	}
}

// linkChanged receives all changes of the network.
func (t *tended) linkChanged(c netns.Change) {
	if i := int(t.index.Load()); c.Lost || c.Link == i || c.AddrLink == i {
		t.changed()
	}
}

// use must be called with each TUN that is opened.
func (t *tended) use(dev tun.Device, w netns.Wanted) {
	t.dev, t.wanted = dev, w
	t.index.Store(int64(w.Index))
	t.setFault("")
}

// fault returns what is wrong with the TUN now, or "".
func (t *tended) fault() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.broke
}

func (t *tended) setFault(s string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.broke = s
}

// watchTUN reports changes to u.tun until end is called.
func (u *up) watchTUN() (end func()) {
	w, err := netns.NewWatch(u.log)
	if err != nil {
		u.log.Warn("cannot watch the addresses of the TUN device", "err", err)
		return func() {}
	}
	var ran sync.WaitGroup
	ran.Go(func() { w.Run(u.tun.linkChanged) })
	u.tun.changed() // for changes before the watch began
	return func() { w.Close(); ran.Wait() }
}

// tend checks the TUN and repairs it, unless that was done very recently; then it is checked again after a while. The
// host is closed meanwhile, because the filter lets nothing else out.
func (u *up) tend() {
	t := &u.tun
	t.again = nil
	faults, err := t.wanted.Faults()
	switch {
	case errors.Is(err, netns.ErrNoInterface):
		// If it was deleted, the data plane ends by itself. A TUN that was moved to another namespace would continue
		// to work there.
		tun.Abandon(t.dev)
		u.plane.fail(fmt.Errorf("the TUN device %s is not in this network namespace any more", t.wanted.Name))
		return
	case err != nil:
		u.log.Warn("cannot read the state of the TUN device", "err", err)
		return
	case len(faults) == 0:
		t.setFault("")
		return
	}
	what := strings.Join(faults, ", ")
	wrong := fmt.Sprintf(
		"another program changed the TUN device %s, and its traffic may fail until it is restored: it %s",
		t.wanted.Name,
		what,
	)
	t.setFault(wrong)
	if wait := t.pace.Delay(time.Now()); wait > 0 {
		t.again = time.After(wait)
		return
	}
	ipv6, err := t.wanted.Mend()
	if err == nil && !ipv6 { // another program disabled IPv6, which is respected
		t.wanted.Addrs = only4(t.wanted.Addrs)
	}
	if err == nil {
		err = u.host.Steer()
	}
	t.pace.Mended(time.Now())
	if err != nil {
		t.setFault(wrong + "; " + err.Error())
		u.log.Warn("cannot restore the TUN device: trying again", "what", what, "err", err)
		t.again = time.After(t.pace.Delay(time.Now()))
		return
	}
	u.log.Warn("another program changed the TUN device: it is restored", "tun", t.wanted.Name, "what", what)
	t.changed() // check the result
}
