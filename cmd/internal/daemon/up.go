package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/cmd/internal/resolved"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun/netns"
)

// UpOptions are the arguments of Up besides the configuration.
type UpOptions struct {
	Again   func() (*config.Config, error) // reads the configuration again
	Args    []string                       // the arguments after `up`, for `viasocks upgrade`
	Environ []string
	Stderr  *os.File
	Version string
}

// up is one run of `viasocks up`.
type up struct {
	UpOptions
	*env
	first   *config.Config // the initial configuration: the device, the marks and the like do not change
	notify  *process.Notifier
	allowed *endpoints
	dial    dialing
	diag    *netns.Diag
	pulse   process.Pulse
	stop    context.CancelCauseFunc // with the reason as its cause
	hup     chan struct{}           // requests to read the configuration again
	network *settling               // the route to the proxy may have changed
	tun     tended
	loops   *loopGuard
	teller  *resolved.Teller
	confirm chan struct{}
	rebuilt []time.Time
	path    string        // of the control socket
	lock    *control.Lock // of the host
	serving serving
	takers  chan *taker  // those who take the host over, once they are sure
	taker   *taker       // who has taken it over; nil: nobody
	before  *predecessor // from whom we take it over; nil: nobody

	upgrades *upgrades

	mu        sync.Mutex // guards the fields below, which status reads
	plane     *plane
	host      *host
	cfg       *config.Config
	state     string
	waiting   error // why we wait for the proxy; nil: we do not
	since     time.Time
	readyAt   *time.Time
	confirmBy *time.Time
	reloaded  *time.Time
	warnings  []string
	theirs    int // flows of the viasocks from which the host was taken over
	offered   int // id of the process to which the host is offered; 0: none
}

var (
	errDown        = errors.New("stopped by 'viasocks down'")
	errUnconfirmed = errors.New("not confirmed in time by 'viasocks confirm': all changes were undone")
)

// Up steers the whole host through the proxy until SIGTERM, SIGINT or `viasocks down`, and then undoes it. The error
// is ErrDied if it had been ready before; the host is then left closed, unless the configuration says otherwise.
//
// Nothing is changed before everything was parsed and the lock shows that no other daemon is alive.
func Up(cfg *config.Config, o UpOptions) error {
	e, err := newEnv(cfg, o.Stderr)
	if err != nil {
		return err
	}
	defer e.close()
	defer e.queueLog()()
	e.warn(cfg)
	path, lock, before, err := alone(cfg)
	if err != nil {
		return err
	}
	defer before.end()
	if err := e.openDecisions(cfg); err != nil {
		lock.Close()
		return err
	}
	process.MoreFiles()

	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	u := &up{
		UpOptions: o, env: e, first: cfg, cfg: cfg, state: control.Starting, since: time.Now(),
		stop: stop, hup: make(chan struct{}, 1), network: newSettling(), tun: tended{news: make(chan struct{}, 1)},
		loops: newLoopGuard(), confirm: make(chan struct{}, 1),
		path: path, lock: lock, before: before, takers: make(chan *taker), upgrades: newUpgrades(),
	}
	defer u.giveLock()
	defer u.upgrades.close()
	u.teller = resolved.New(resolved.SystemBus(), []netip.Addr{nameserver}, e.log)
	u.teller.Want(tellsResolved(cfg))
	u.notify = process.NewNotifier(o.Environ, e.log)
	defer u.notify.Close()
	defer u.listenSignals()()
	defer u.serving.end()
	if before == nil { // otherwise the other viasocks still answers there
		if err := u.serve(); err != nil {
			return err
		}
	}
	return u.run(ctx)
}

// giveLock ends our use of the lock.
func (u *up) giveLock() {
	if u.taker != nil || u.before.holds() {
		u.lock.Leave() // another viasocks holds it
		return
	}
	u.lock.Close()
}

// leaveHost releases what h holds, unless another viasocks holds it, too.
func (u *up) leaveHost(h *host) {
	if u.taker != nil || u.before.holds() {
		h.HandOver()
		return
	}
	h.Close()
}

// serving is what others can ask, until end is called.
type serving struct{ ends []func() }

// serve begins to answer at the control socket, and to serve metrics.
func (u *up) serve() error {
	srv, err := control.Listen(control.Options{
		Path: u.path, Group: u.first.Host.ControlGroup, Members: u.first.Host.MembersExclude, Backend: u.backend(), Log: u.log,
	})
	if err != nil {
		return err
	}
	u.serving.ends = append(u.serving.ends, func() { srv.Close() })
	endMetrics, err := u.serveMetrics(u.path)
	if err != nil {
		return err
	}
	u.serving.ends = append(u.serving.ends, endMetrics)
	return nil
}

// end stops in the opposite order. It may be called twice.
func (s *serving) end() {
	for len(s.ends) > 0 {
		last := len(s.ends) - 1
		s.ends[last]()
		s.ends = s.ends[:last]
	}
}

// listenSignals handles signals until the function that it returns is called.
func (u *up) listenSignals() (end func()) {
	signals := make(chan os.Signal, 4)
	heed := []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR2, syscall.SIGHUP}
	if u.first.File == "" && signal.Ignored(syscall.SIGHUP) { // nohup: the terminal may close
		heed = heed[:3]
	}
	signal.Notify(signals, heed...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range signals {
			if s == syscall.SIGUSR2 {
				go u.upgrade() // the log tells how it went
				continue
			}
			// without a file there is nothing to read again, so the terminal was closed
			if s != syscall.SIGHUP || u.first.File == "" {
				u.stop(fmt.Errorf("stopped by a signal: %s", s))
				continue
			}
			select {
			case u.hup <- struct{}{}:
			default: // one is already waiting
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		<-done
	}
}

// run starts everything in order, waits, and stops it in order.
func (u *up) run(ctx context.Context) (err error) {
	cfg := u.first
	u.allowed = newEndpoints(u.log)
	u.allowed.configure(cfg.Upstreams)
	u.dial = markedDialing(cfg.Mark, kernel.MarksFrom(cfg.Mark, cfg.Mask).Direct, u.allowed)
	u.dial.comesBack, u.dial.decisions, u.dial.absent = u.loops.comesBack, u.decisionsTo(), newAbsent(u.log)
	if u.dial.pool, err = newPool(cfg, u.log); err != nil {
		return err
	}
	u.dial.noIPv6 = !hostHasIPv6()
	if err := u.checkProxies(cfg); err != nil {
		return err
	}
	if err := poolIsFree(cfg, net.InterfaceAddrs); err != nil {
		return err
	}
	cfg = u.excludeLocal(cfg)
	u.mu.Lock()
	u.first, u.cfg = cfg, cfg
	u.mu.Unlock()
	h, err := newHost(cfg, u.pulse.Fresh, u.network.changed, u.before, u.log)
	if err != nil {
		return err
	}
	defer u.leaveHost(h)
	// If the filter of a dead daemon is still there, it may not know this proxy. A proxy that we wait for must be
	// checked with our filter in place.
	if !h.Recovered() && !cfg.Host.Wait && u.before == nil {
		if err := probe(ctx, cfg, u.dial); err != nil {
			return err
		}
	}
	if cfg.Host.FailOpen {
		g, err := startGuardian(cfg, u.Stderr)
		if err != nil {
			return err
		}
		defer g.dismiss()
	}
	// From here on the host is changed: on failure it is restored, or left closed if it was closed before.
	start := u.start
	if u.before != nil {
		start = u.takeOver
	}
	if err := start(ctx, h); err != nil {
		return u.giveUp(h, err)
	}
	failed := u.live(ctx)
	if u.taker != nil {
		return u.handOver(ctx)
	}
	return u.end(ctx, failed)
}

// start closes the host, starts the data plane and steers.
func (u *up) start(ctx context.Context, h *host) error {
	cfg := u.first
	if err := h.setEndpoints(u.allowed.list()); err != nil {
		return err
	}
	if err := h.Shut(); err != nil {
		return err
	}
	u.allowed.attach(h.setEndpoints)
	if h.Recovered() {
		switch n, err := h.ResetStale(); {
		case err != nil:
			u.log.Warn("cannot look for connections of the dead viasocks", "err", err)
		case n > 0:
			u.log.Info("reset the connections that the dead viasocks had carried", "count", n)
		}
	}
	if err := u.startPlane(cfg); err != nil {
		return err
	}
	if err := u.steer(h); err != nil {
		return err
	}
	u.listen()
	// Check again with the rules in place. If they cut off the proxy, the host is better restored at once.
	err := probe(ctx, cfg, u.dial)
	switch {
	case err == nil:
	case cfg.Host.Wait && ctx.Err() != nil: // live ends in order
		u.mu.Lock()
		u.waiting = err
		u.mu.Unlock()
	case cfg.Host.Wait && mayCome(err):
		u.waitFor(err)
	case ctx.Err() == nil && !h.Recovered() && !cfg.Host.Wait:
		return fmt.Errorf("the rules cut the proxy off: %w", err)
	default:
		return err
	}
	return nil
}

// steer steers the host, whose filter is in place, and watches it from then on.
func (u *up) steer(h *host) error {
	u.mu.Lock()
	u.host = h
	u.mu.Unlock()
	if err := h.Steer(); err != nil {
		return err
	}
	u.pulse.Beat(u.look)
	h.watch()
	return nil
}

// look takes the locks that every flow takes. It returns only if the data plane is alive.
func (u *up) look() {
	p, _ := u.running()
	p.router.Stats()
}

// giveUp undoes a start that failed with err.
func (u *up) giveUp(h *host, err error) error {
	h.unwatch()
	back := "the host is as it was"
	var undo error
	if u.before.holds() {
		return fmt.Errorf("%w (nothing was changed: 'viasocks status' tells of the one that is up)", err)
	}
	if h.Recovered() {
		back = "the host stays closed, as it was: 'viasocks down' opens it"
	}
	u.stopPlane(func() {
		if !h.Recovered() {
			undo = errors.Join(h.Unsteer(), h.Open())
		} else if err := h.Unguard(); err != nil {
			u.log.Warn("programs may have to wait before they get an error", "err", err)
		}
	})
	if undo != nil {
		return fmt.Errorf("%w; and cannot restore the host: %w", err, undo)
	}
	return fmt.Errorf("%w (%s)", err, back)
}

// end stops everything in order, and leaves the host open or closed according to the configuration.
func (u *up) end(ctx context.Context, failed error) error {
	cfg, cause := u.first, context.Cause(ctx)
	u.setState(control.Stopping)
	u.notify.Stopping()
	open := cfg.Host.FailOpen
	if failed == nil {
		open = !u.config().Host.StayClosed || errors.Is(cause, errDown) || errors.Is(cause, errUnconfirmed)
	}
	u.host.unwatch()
	u.before.finish(u.log)
	var err error
	u.stopPlane(func() {
		if open {
			// The app's flows are reset first, because their retransmissions would go to the real peers once the
			// rules are removed.
			err = errors.Join(u.host.Unsteer(), u.host.Open())
		}
	})
	if !open {
		if kerr := u.host.KeepClosed(); kerr != nil {
			err = errors.Join(err, fmt.Errorf("--fail-open may open the host: %w", kerr))
		}
		u.leaveTUN(failed)
		if uerr := u.host.Unguard(); uerr != nil {
			u.log.Warn("programs may have to wait before they get an error", "err", uerr)
		}
		u.log.Warn("the host stays closed: 'viasocks up' takes over, 'viasocks down' opens it")
	}
	switch {
	case failed != nil:
		return errors.Join(died(failed), err)
	case err != nil:
		return died(err)
	case errors.Is(cause, errUnconfirmed):
		return errUnconfirmed
	}
	return nil
}

// live runs from the time when the host is steered to the end. The error is that of a data plane that ended by
// itself.
func (u *up) live(ctx context.Context) error {
	unconfirmed, end := u.awaitConfirm()
	defer end()
	guard, unguard := context.WithCancel(context.Background())
	var guards sync.WaitGroup
	defer guards.Wait()
	defer unguard()
	guards.Go(func() { u.notify.Guard(guard, u.look) })
	guards.Go(func() { u.pulse.Run(guard, u.look, u.network.changed) })
	guards.Go(func() { u.loops.run(guard) })
	guards.Go(func() { u.teller.Run(guard) }) // undoes the settings at its end
	defer u.watchTUN()()
	waiter := u.newWaiter(guard, &guards)
	defer waiter.close()
	if u.waitsFor() == nil {
		u.ready()
	}
	for {
		select {
		case <-ctx.Done():
			u.log.Info("stopping", "why", context.Cause(ctx))
			return nil
		case err := <-u.plane.failed:
			if err := u.rebuild(err); err != nil {
				return err
			}
		case t := <-u.takers:
			if u.letGo(t) {
				return nil
			}
		case <-unconfirmed:
			u.stop(errUnconfirmed)
		case <-u.confirm:
			unconfirmed = nil
			u.settle()
			u.log.Info("confirmed: the changes stay")
		case <-u.hup:
			u.reload()
			waiter.changed()
		case <-waiter.again.C:
			waiter.try()
		case err := <-waiter.tried:
			if waiter.found(err) {
				u.plane.renew() // what could not be reached is tried again
				u.ready()
			}
		case p := <-u.loops.seen:
			u.stopLoop(p)
		case <-u.network.news:
			u.network.noted()
		case <-u.network.due:
			u.plane.networkChanged(u.network)
			waiter.changed()
		case <-u.tun.news:
			u.tend()
		case <-u.tun.again:
			u.tend()
		}
	}
}

func (u *up) setState(s string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = s
}
