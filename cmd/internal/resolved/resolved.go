package resolved

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lookAgain is the interval at which the settings of systemd-resolved are checked. retryMost is the longest wait
	// before a failed attempt is repeated.
	lookAgain, retryFirst, retryMost = 30 * time.Second, 200 * time.Millisecond, 30 * time.Second
	// revertTimeout limits how long undoing the settings may delay its caller.
	revertTimeout = 5 * time.Second
)

// Teller keeps the settings in systemd-resolved while Run runs. Its methods may be called from any goroutine.
type Teller struct {
	bus     string
	servers []server
	log     *slog.Logger
	news    chan struct{}
	leaves  atomic.Bool // another viasocks keeps the settings when Run ends

	mu    sync.Mutex
	index int    // of the device; 0: not known yet
	off   bool   // Want(false) was called
	done  bool   // systemd-resolved has the settings
	fault string // what was last logged
}

// New returns a Teller for the bus at an address (see SystemBus) and for the servers that systemd-resolved shall ask.
func New(bus string, servers []netip.Addr, log *slog.Logger) *Teller {
	return &Teller{bus: bus, servers: toServers(servers), log: log, news: make(chan struct{}, 1)}
}

// Leave makes Run leave the settings in place at its end, because another viasocks keeps them from then on.
func (t *Teller) Leave() { t.leaves.Store(true) }

// Use sets the device by its index. systemd-resolved forgets the settings for an earlier device when that is deleted.
func (t *Teller) Use(index int) {
	t.mu.Lock()
	t.index = index
	t.mu.Unlock()
	select {
	case t.news <- struct{}{}:
	default: // the next check is already due
	}
}

// Want sets whether systemd-resolved shall have the settings. A Teller wants it to until it is told otherwise.
func (t *Teller) Want(on bool) {
	t.mu.Lock()
	t.off = !on
	t.mu.Unlock()
	select {
	case t.news <- struct{}{}:
	default: // the next check is already due
	}
}

func (t *Teller) wanted() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.off
}

// Told reports whether systemd-resolved has the settings.
func (t *Teller) Told() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.done
}

// Run sets and maintains the settings, also after a restart of systemd-resolved or a change by others, until ctx
// ends. Then it undoes them and returns within a few seconds.
func (t *Teller) Run(ctx context.Context) {
	wait := retryFirst
	for ctx.Err() == nil {
		if !t.wanted() {
			select {
			case <-ctx.Done():
			case <-t.news:
			}
			continue
		}
		b, err := dial(ctx, t.bus)
		if err == nil {
			wait = retryFirst
			t.serve(ctx, b)
			b.close()
		} else {
			t.log.Debug("systemd-resolved is left as it is", "err", err)
		}
		if !t.wanted() {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
			wait = min(2*wait, retryMost)
		}
	}
}

// serve handles one connection to the bus, until it ends or the settings are no longer wanted.
func (t *Teller) serve(ctx context.Context, b *bus) {
	defer t.setDone(false)
	var told told
	wait := retryFirst
	for {
		if !t.wanted() {
			t.takeBack(b, told)
			return
		}
		again := lookAgain
		switch err := t.look(ctx, b, &told); {
		case err == nil:
			wait = retryFirst
		case ctx.Err() == nil:
			t.failed(err)
			again, wait = wait, min(2*wait, retryMost)
		}
		select {
		case <-ctx.Done():
			if !t.leaves.Load() {
				t.takeBack(b, told)
			}
			return
		case <-b.conn.Context().Done():
			return
		case <-b.owner:
		case <-t.news:
		case <-time.After(again):
		}
	}
}

// told records which process has the settings for which device.
type told struct {
	owner string
	index int
}

// look sets what systemd-resolved lacks.
func (t *Teller) look(ctx context.Context, b *bus, before *told) error {
	t.mu.Lock()
	now := told{index: t.index}
	t.mu.Unlock()
	if now.index == 0 {
		return nil
	}
	var err error
	if now.owner, err = b.runs(ctx); err != nil {
		t.setDone(false)
		if errors.Is(err, errAbsent) {
			*before = told{} // the settings ended with it; after any other error it still has them
			t.log.Debug("systemd-resolved is left as it is", "err", err)
			return nil // NameOwnerChanged will report its return
		}
		return err
	}
	if now == *before && t.Told() {
		right, err := b.told(ctx, now.index, t.servers)
		if err != nil || right {
			return err
		}
		t.log.Warn("somebody changed the name servers of the TUN device in systemd-resolved: they are set again")
	}
	*before = now // some of it may be done
	if err := b.tell(ctx, now.index, t.servers); err != nil {
		t.setDone(false)
		return err
	}
	t.setDone(true)
	t.log.Info("systemd-resolved asks viasocks for names")
	return nil
}

// takeBack undoes the settings.
func (t *Teller) takeBack(b *bus, was told) {
	if was.owner == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), revertTimeout)
	defer cancel()
	if err := b.revert(ctx, was.index); err != nil {
		t.log.Warn("cannot undo the settings in systemd-resolved: it drops them when the TUN device is deleted", "err", err)
	}
}

func (t *Teller) setDone(done bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done = done
	if done {
		t.fault = ""
	}
}

// failed logs err, but not again while it stays the same.
func (t *Teller) failed(err error) {
	t.mu.Lock()
	same := t.fault == err.Error()
	t.fault = err.Error()
	t.mu.Unlock()
	switch {
	case same:
	case wentAway(err):
		t.log.Debug("systemd-resolved went away", "err", err)
	case isError(err, service+".NoSuchLink"):
		// It learns of the device through netlink, a moment later than we do.
		t.log.Debug("systemd-resolved does not know the TUN device yet", "err", err)
	case isError(err, service+".LinkBusy"):
		t.log.Warn("cannot make systemd-resolved ask viasocks: systemd-networkd manages the TUN device: "+
			"give it a .network file with Unmanaged=yes", "err", err)
	default:
		t.log.Warn("cannot make systemd-resolved ask viasocks: names that it looks up may fail", "err", err)
	}
}

// Running reports whether systemd-resolved runs and can be configured.
func Running(ctx context.Context, address string) bool {
	b, err := dial(ctx, address)
	if err != nil {
		return false
	}
	defer b.close()
	_, err = b.runs(ctx)
	return err == nil
}

// Revert undoes the settings of a dead process for the device if all names are asked of these servers there. It
// reports whether it did.
func Revert(ctx context.Context, address string, index int, servers []netip.Addr) (bool, error) {
	b, err := dial(ctx, address)
	if err != nil {
		return false, nil // there are no settings
	}
	defer b.close()
	if _, err := b.runs(ctx); err != nil {
		return false, nil
	}
	told, err := b.told(ctx, index, toServers(servers))
	if err != nil || !told {
		if isError(err, service+".NoSuchLink") {
			err = nil
		}
		return false, err
	}
	return true, b.revert(ctx, index)
}
