package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/handover"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
)

// This is the part of the old process in `viasocks up --takeover`; package handover describes the conversation.

// reportEvery is how often the old process tells which of its flows have ended.
const reportEvery = 250 * time.Millisecond

// taker is another viasocks that is about to take the host over.
type taker struct {
	talk    *handover.Old
	pid     int
	sockets []*os.File // from which our frames come
	limit   time.Duration
}

// offerable returns why the host cannot be offered now, or nil. The caller holds u.mu.
func (u *up) offerable() error {
	switch {
	case u.plane == nil || u.host == nil || u.state != control.Ready:
		return fmt.Errorf("the viasocks that is up is %s, and only one that is ready hands over", u.state)
	case u.offered != 0:
		return fmt.Errorf("another takeover is under way: process %d takes the host over", u.offered)
	}
	return nil
}

// offerTo records that the host is offered to the process pid, or returns why it is not.
func (u *up) offerTo(pid int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	err := u.offerable()
	if err == nil {
		u.offered = pid
	}
	return err
}

// withdraw ends an offer that was not accepted because of err. The host stays ours.
func (u *up) withdraw(t *taker, err error) {
	closeFiles(t.sockets)
	if t.talk != nil {
		t.talk.Close()
	}
	u.mu.Lock()
	u.offered = 0
	u.mu.Unlock()
	u.log.Warn("the host was not taken over", "by", t.pid, "err", config.Redact(err.Error()))
}

// offerHost offers the host to the viasocks with process id pid at the other end of c, and passes it to live once it
// is sure. It runs on a goroutine of the control socket.
func (u *up) offerHost(c *net.UnixConn, pid int) {
	if err := u.offerTo(pid); err != nil {
		u.log.Warn("the host was not taken over", "by", pid, "err", err)
		_ = handover.Refuse(c, u.Version, err.Error()) // the other process may have ended
		return
	}
	t := &taker{pid: pid}
	err := u.makeOffer(c, t)
	if err == nil {
		timeout := time.NewTimer(stopTimeout)
		defer timeout.Stop()
		select {
		case u.takers <- t:
			return
		case <-timeout.C:
			err = errors.New("it is busy or about to end")
		}
	}
	u.withdraw(t, err)
}

// letGo asks the new process whether the host shall change hands now, and reports whether it has changed hands.
func (u *up) letGo(t *taker) bool {
	if err := t.talk.Go(); err != nil {
		u.withdraw(t, err)
		return false
	}
	u.taker = t
	u.teller.Leave()
	return true
}

// makeOffer offers the host and waits until the other process commits itself.
func (u *up) makeOffer(c *net.UnixConn, t *taker) error {
	p, h := u.running()
	files := handover.Files{Kernel: h.LockFile()}
	defer func() { files.Kernel = nil; files.Close() }() // the Host owns that lock
	var err error
	if files.Control, err = u.lock.Files(); err == nil {
		files.Queues, err = p.stack.Files()
	}
	if err != nil {
		c.Close()
		return err
	}
	k := kernelConfig(u.config(), u.log)
	k.OwnCgroup, k.OwnUID = ownership("/proc/self/cgroup")
	t.talk, err = handover.Give(c, handover.Offer{
		PID: os.Getpid(), Version: u.Version, Settings: takeoverSettings(u.first), Own: ownName(&k), Sources: p.stack.Sources(),
		Heir: u.upgrades.started(),
	}, files)
	if err != nil {
		return err
	}
	sockets, terms, err := t.talk.Commit(p.stack.Sources())
	if err != nil {
		return err
	}
	t.sockets, t.limit = sockets, terms.Limit
	return nil
}

// handOver lets go of the host, and carries the flows that exist until they end. It takes the place of end.
func (u *up) handOver(ctx context.Context) error {
	t := u.taker
	defer t.talk.Close()
	endAlive := u.stillAlive()
	u.setState(control.Leaving)
	u.serving.end()
	u.plane.unlisten() // so that the new process can have the same ports at the proxy
	u.host.unwatch()
	u.allowed.attach(func([]endpoint) error { return nil }) // see below
	if err := u.host.HandOver(); err != nil {
		u.log.Warn("cannot let go of the host in order", "err", err)
	}
	u.plane.savePool()
	names, err := givePool(u.dial.pool)
	if err != nil {
		u.log.Warn("cannot hand over the names of fake addresses: programs may have to ask again", "err", err)
	} else if names != nil {
		defer names.Close()
	}
	err = u.plane.stack.Redirect(t.sockets)
	keys := u.keys()
	flows := handover.FlowsOf(keys)
	if err == nil {
		err = t.talk.Taken(handover.Taken{Flows: flows, Proxies: endpointsTo(u.allowed.everything())}, names)
	}
	endAlive()
	if err != nil {
		u.stopPlane(nil)
		return died(fmt.Errorf("%w; the host stays closed: 'viasocks up' takes over, 'viasocks down' opens it", err))
	}
	u.notify.Hand(t.pid)
	close(u.upgrades.handed)
	u.log.Info("handed the host over", "to", t.pid, "flows", flows.Len(), "limit", t.limit)
	left := u.drain(ctx, t, keys)
	u.before.finish(u.log)
	u.stopPlane(nil)
	u.sayGoodbye(t, left)
	return nil
}

// sayGoodbye tells the new process which flows have ended with us. If the new process has ended before, nobody carries the
// host, and sayGoodbye logs that.
func (u *up) sayGoodbye(t *taker, left []stack.Key) {
	_, err := t.talk.Left(handover.Left{Ended: handover.FlowsOf(left)})
	if err == nil {
		return
	}
	host := "the host stays closed: 'viasocks up' takes over, 'viasocks down' opens it"
	if u.first.Host.FailOpen {
		host = "the host is opened, as --fail-open says"
	}
	u.log.Warn("the viasocks that took over has ended: "+host, "flows", len(left), "err", err)
}

// stillAlive feeds the watchdog of systemd until end is called. Once the service has another main process, systemd ignores
// what we send.
func (u *up) stillAlive() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	ran.Go(func() { u.notify.Guard(ctx, u.look) })
	return func() { cancel(); ran.Wait() }
}

// keys returns all flows of the data plane, and those of the viasocks from which it has taken over.
func (u *up) keys() []stack.Key {
	keys := u.plane.stack.TCPKeys()
	for _, src := range u.plane.router.UDPSources() {
		keys = append(keys, stack.Key{Proto: flow.UDP, Src: src})
	}
	return append(keys, u.before.keys()...)
}

// drain waits until no flow is left, and tells the new process which have ended. The end of ctx or of the new process,
// and the limit, end it earlier. It returns the flows that are left.
func (u *up) drain(ctx context.Context, t *taker, had []stack.Key) []stack.Key {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	limit := time.NewTimer(t.limit)
	defer limit.Stop()
	var left atomic.Int64
	left.Store(int64(len(had)))
	u.allowed.attach(func(all []endpoint) error { // the new process's filter must let our sockets out
		_, err := t.talk.Left(handover.Left{Now: int(left.Load()), Proxies: endpointsTo(all)})
		return err
	})
	for len(had) > 0 {
		select {
		case <-ctx.Done():
			u.log.Info("stopping", "why", context.Cause(ctx), "flows", len(had))
			return had
		case <-limit.C:
			u.log.Info("the flows that are left are reset: the limit is over", "flows", len(had), "limit", t.limit)
			return had
		case err := <-u.plane.failed:
			u.log.Warn("the flows that are left are lost", "flows", len(had), "err", err)
			return had
		case <-tick.C:
		}
		now := u.keys()
		ended := without(had, now)
		had = now
		left.Store(int64(len(now)))
		switch stop, err := t.talk.Left(handover.Left{Ended: handover.FlowsOf(ended), Now: len(now)}); {
		case err != nil:
			return had // sayGoodbye tells why
		case stop:
			u.log.Info("the flows that are left are reset: the viasocks that took over stops", "flows", len(had))
			return had
		}
	}
	return nil
}

// without returns what is in a and not in b.
func without(a, b []stack.Key) (out []stack.Key) {
	in := make(map[stack.Key]bool, len(b))
	for _, k := range b {
		in[k] = true
	}
	for _, k := range a {
		if !in[k] {
			out = append(out, k)
		}
	}
	return out
}
