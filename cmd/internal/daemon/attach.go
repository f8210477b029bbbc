package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/keeper"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/cmd/internal/target"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// ErrNamespaceEnded means that the namespace has no users any more: its container has stopped.
var ErrNamespaceEnded = errors.New("nobody uses its network any more")

// AttachOptions are the arguments of Attach besides the configuration.
type AttachOptions struct {
	Environ []string
	Stderr  *os.File
	Version string
}

// attached is one run of `viasocks attach`.
type attached struct {
	AttachOptions
	*env
	cfg    *config.Config
	target target.Target
	keeper *keeper.Keeper
	dial   dialing
	notify *process.Notifier
	pulse  process.Pulse
	stop   context.CancelCauseFunc // with the reason as its cause
	since  time.Time
	builds rebuilds

	mu      sync.Mutex // guards the fields below, which status reads
	plane   *plane
	diag    *netns.Diag
	tun     keeper.Opened
	state   string
	broken  string // why there is no data plane; empty: there is one
	readyAt *time.Time
}

// Attach steers the network namespace that cfg names through the proxy, until SIGTERM, SIGINT, SIGHUP or `viasocks
// down`, and then undoes it. The sockets to the proxy are in the caller's own namespace. The error is ErrDied if it had
// been ready before; the namespace is then left closed. It is ErrNamespaceEnded when nobody uses the namespace any more.
//
// Nothing is changed before everything was parsed, the proxy was reached, and the lock shows that no other viasocks
// steers the namespace.
func Attach(cfg *config.Config, o AttachOptions) error {
	cfg = withStateDir(cfg, o.Environ)
	e, err := newEnv(cfg, o.Stderr)
	if err != nil {
		return err
	}
	defer e.close()
	defer e.queueLog()()
	e.warn(cfg)
	a := &attached{
		AttachOptions: o, env: e, cfg: cfg, state: control.Starting, since: time.Now(), builds: rebuilds{log: e.log},
	}
	if a.target, err = target.Find(cfg); err != nil {
		return err
	}
	defer a.target.Close()
	if err := netns.CheckTUN(); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	a.stop = stop
	defer a.listenSignals()()
	if a.dial, err = e.beforeRun(ctx, cfg); err != nil {
		return err
	}
	process.MoreFiles()
	a.notify = process.NewNotifier(o.Environ, e.log)
	defer a.notify.Close()
	return a.run(ctx)
}

// listenSignals lets signals stop it, until the function that it returns is called.
func (a *attached) listenSignals() (end func()) {
	return onSignals(func(s os.Signal) { a.stop(fmt.Errorf("stopped by a signal: %s", s)) },
		heeded(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)...)
}

// run starts everything in order, waits, and stops it in order.
func (a *attached) run(ctx context.Context) (err error) {
	if a.keeper, err = keeper.Start(a.target.Namespace, a.out); err != nil {
		return err
	}
	defer a.keeper.Close()
	id := a.target.ID()
	// From here on only the keeper and its files are in the namespace, and these do not count as users.
	a.target.Close()
	users := netns.NewUsers(id, a.keeper.PID())
	// From here on the namespace is changed. If this fails it is restored, or left closed if it was closed before.
	unserve, err := a.start(id)
	if err != nil {
		return a.giveUp(err)
	}
	defer unserve()
	failed := a.live(ctx, users)
	return a.end(ctx, failed)
}

// start closes the namespace, starts the data plane, steers, and serves the control sockets until end is called.
func (a *attached) start(id netns.ID) (end func(), err error) {
	if err := a.startPlane(); err != nil {
		return nil, err
	}
	if a.tun.Reset > 0 {
		a.log.Info("reset the connections that the dead viasocks had carried", "count", a.tun.Reset)
	}
	if err := a.keeper.Steer(); err != nil {
		return nil, err
	}
	return a.serve(control.PathIn(a.cfg.StateDir, id.Ino))
}

// startPlane has the keeper make the TUN, and starts a data plane over it.
func (a *attached) startPlane() error {
	made, queues, diag, err := a.keeper.Open(a.order())
	if err != nil {
		return err
	}
	dev, err := tun.FromFiles(queues, tun.Options{MTU: a.cfg.MTU, Offload: a.cfg.Offload, Log: a.log})
	if err != nil {
		diag.Close()
		return err
	}
	a.dial.noIPv6 = !made.IPv6
	p, err := newPlane(a.cfg, dev, diagSockets{diag, nil}, a.dial, a.log)
	if err != nil {
		diag.Close()
		return err
	}
	p.start()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plane, a.diag, a.tun = p, diag, made
	return nil
}

// order tells the keeper what to do.
func (a *attached) order() *keeper.Order {
	cfg := a.cfg
	o := &keeper.Order{
		Kernel:   attachedKernel(cfg),
		TUN:      netns.TUNOptions{Name: cfg.TUN, MTU: cfg.MTU, VnetHdr: true, Persist: true, Queues: tun.Queues},
		Addrs:    tunAddrs,
		LogLevel: cfg.LogLevel,
	}
	if cfg.Fake.On {
		o.Taken = cfg.Fake.Pools()
	}
	return o
}

// dockerDNS is the name server that Docker gives to containers. The daemon asks the world for them from the host.
var dockerDNS = netip.AddrFrom4([4]byte{127, 0, 0, 11})

// attachedKernel is kernelConfig for a namespace that none of our own sockets is in: nothing may leave it with the marks of
// such sockets.
func attachedKernel(cfg *config.Config) kernel.Config {
	k := kernelConfig(cfg, nil)
	k.Direct, k.FailOpen = false, false
	k.LocalDNS = dockerDNS
	if !cfg.DNSOff { // where port 53 is like other ports, nobody answers in place of Docker
		k.DNSServer = nameserver
	}
	return k
}

// stopPlane ends the data plane, if there is one. It calls between after the app's flows were reset.
func (a *attached) stopPlane(between func()) {
	a.mu.Lock()
	p, diag := a.plane, a.diag
	a.mu.Unlock()
	if p == nil {
		if between != nil {
			between()
		}
		return
	}
	stop(p, between)
	diag.Close()
}

// giveUp undoes a start that failed with err.
func (a *attached) giveUp(err error) error {
	back := "the namespace is as it was"
	var undo error
	a.stopPlane(func() {
		switch {
		case errors.Is(err, keeper.ErrTaken) || errors.Is(err, keeper.ErrGone):
			back = ""
		case a.tun.Recovered:
			back = "the namespace stays closed, as it was: 'viasocks down' with the same name opens it"
			undo = a.keeper.Leave()
		default:
			undo = a.keeper.Undo()
		}
	})
	switch {
	case undo != nil:
		return fmt.Errorf("%w; and cannot restore the namespace: %w", err, undo)
	case back != "":
		return fmt.Errorf("%w (%s)", err, back)
	}
	return err
}

// end stops everything in order. The namespace is restored, except after a failure.
func (a *attached) end(ctx context.Context, failed error) error {
	a.setState(control.Stopping)
	a.notify.Stopping()
	var err error
	switch {
	case failed == nil || errors.Is(failed, ErrNamespaceEnded):
		// The app's flows are reset first, because their retransmissions would go to the real peers once the rules are
		// removed.
		a.stopPlane(func() { err = a.keeper.Undo() })
	case errors.Is(failed, keeper.ErrGone):
		a.stopPlane(nil)
	default:
		a.stopPlane(func() { err = a.keeper.Leave() })
	}
	switch {
	case errors.Is(failed, ErrNamespaceEnded) && err == nil:
		return fmt.Errorf("the %s has ended: %w", a.target.Words, ErrNamespaceEnded)
	case failed != nil:
		a.log.Warn("the namespace stays closed: 'viasocks attach' takes over, 'viasocks down' with the same name opens it")
		return errors.Join(died(failed), err)
	case err != nil:
		return died(fmt.Errorf("cannot restore the namespace: %w: 'viasocks down' with the same name tries again", err))
	}
	return nil
}

// How often it is looked whether somebody uses the namespace, and at the keeper's state.
const (
	usersEvery = 500 * time.Millisecond
	lookEvery  = 5 * time.Second
)

// live runs from the time when the namespace is steered to the end. The error is that of what ended by itself.
func (a *attached) live(ctx context.Context, users *netns.Users) error {
	guard, unguard := context.WithCancel(context.Background())
	var guards sync.WaitGroup
	defer guards.Wait()
	defer unguard()
	network := newSettling()
	guards.Go(func() { a.notify.Guard(guard, a.look) })
	guards.Go(func() { a.pulse.Run(guard, func() { a.look(); a.keeper.Beat() }, network.changed) })
	guards.Go(func() { a.watchKeeper(guard) })
	defer followNetwork(network, a.log)()
	used := time.NewTicker(usersEvery)
	defer used.Stop()
	a.ready()
	for {
		select {
		case <-ctx.Done():
			a.log.Info("stopping", "why", context.Cause(ctx))
			return nil
		case <-a.keeper.Ended():
			return keeper.ErrGone
		case err := <-a.plane.failed:
			if err := a.rebuild(ctx, err); err != nil {
				return err
			}
		case <-used.C:
			if !users.Any() {
				return ErrNamespaceEnded
			}
		case <-network.news:
			network.noted()
		case <-network.due:
			a.plane.networkChanged(network)
		}
	}
}

// rebuildPause is how long attach waits when a data plane cannot be built, or was built too often.
const rebuildPause = 5 * time.Second

// rebuild replaces a data plane that ended with the error why. The namespace stays closed meanwhile. It does not give up:
// what ended the data plane may be a program in the namespace, which could delete the filter if no keeper owned it.
func (a *attached) rebuild(ctx context.Context, why error) error {
	for {
		err := a.builds.again(why, func() error {
			a.stopPlane(nil)
			if err := a.startPlane(); err != nil {
				return err
			}
			return a.keeper.Steer()
		})
		a.setBroken(err)
		if err == nil || errors.Is(err, keeper.ErrGone) {
			return err
		}
		a.log.Error("the namespace stays closed, and nothing is carried: trying again", "in", rebuildPause, "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-a.keeper.Ended():
			return keeper.ErrGone
		case <-time.After(rebuildPause):
		}
	}
}

// setBroken notes for status that there is no data plane, or with nil that there is one.
func (a *attached) setBroken(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = ""
	if err != nil {
		a.broken = err.Error()
	}
}

// look takes the locks that every flow takes. It returns only if the data plane is alive.
func (a *attached) look() { a.running().router.Stats() }

// watchKeeper ends the data plane when the TUN was deleted or moved to another namespace, where it would go on.
func (a *attached) watchKeeper(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s, err := a.keeper.Look(); err == nil && s.Lost {
			a.running().fail(errors.New(s.Fault))
		}
	}
}

func (a *attached) ready() {
	now := time.Now()
	a.mu.Lock()
	a.readyAt, a.state = &now, control.Ready
	a.mu.Unlock()
	a.log.Info("ready", "tun", a.tun.Name, "proxy", proxyName(a.cfg), "namespace", a.target.Words)
	if !a.tun.IPv6 {
		a.log.Info("the namespace has no IPv6: its programs have IPv4 only")
	}
	a.notify.Ready("carries the " + a.target.Words + " through " + proxyName(a.cfg))
}

func (a *attached) setState(s string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state = s
}

func (a *attached) running() *plane {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.plane
}

// tunName is for other goroutines than that of live, which replaces the TUN.
func (a *attached) tunName() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.tun.Name
}

// withStateDir gives a caller without root, who cannot write to the usual directory, one of his own.
func withStateDir(cfg *config.Config, environ []string) *config.Config {
	uid := os.Geteuid()
	if uid == 0 || cfg.StateDir != kernel.DefaultDir {
		return cfg
	}
	own := *cfg
	own.StateDir = "/tmp/viasocks-attach-" + strconv.Itoa(uid)
	if dir := control.RuntimeOf(environ).Dir(); dir != "" {
		own.StateDir = filepath.Join(dir, "viasocks-attach")
	}
	return &own
}
