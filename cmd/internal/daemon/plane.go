package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// plane is the data plane: stack, router, relay loops and the SOCKS client over one TUN.
//
//	tun ─ stack ─ router ─ loops ─ dialer
//
// Each loop has one goroutine, and there are as many loops as the machine has cores; dials and relays run on them.
// Stack and router are divided into shards, each of which has its share of the loops.
//
// A part uses those to its right until its own Run has returned. Close therefore goes from left to right.
type plane struct {
	log    *slog.Logger
	dialer *socks.Dialer
	loops  []*relay.Loop
	router *route.Router
	stack  *stack.Stack
	dial   dialing
	mu     sync.Mutex // guards changes of ups, and readers on other goroutines
	ups    []upstream // that the router has
	gso    atomic.Pointer[gso]
	health healthChecks
	capturing
	listening

	programs *programs // of the flows, for those who list them

	poolFile string // file that keeps dial.pool; empty: none

	ran    sync.WaitGroup // stack, router, giveBack and followLoad
	pooled sync.WaitGroup // the writer of poolFile
	looped sync.WaitGroup
	failed chan error // the error of the first part that ended by itself
	once   sync.Once
	stop   context.CancelFunc // ends giveBack and followLoad; nil: not started

	stopPool context.CancelFunc // ends the writer of poolFile; nil: not started
}

// dialing tells how our own sockets are made, how the proxy's name is looked up, and where decisions are reported.
type dialing struct {
	prepare func(fd int) error // nil: sockets need nothing
	direct  func(fd int) error // the same for sockets that go past the proxy; nil: prepare
	resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	allowed *endpoints // nil: sockets may go anywhere
	// comesBack is for route.Config.ComesBack.
	comesBack func(flow.Flow) bool
	// decisions is for route.Config.Decisions.
	decisions io.Writer
	// pool contains the addresses that stand for names; nil: there are none, whatever --dns says. It outlives the
	// plane.
	pool *dns.Pool
	// absent remembers the upstreams that do not answer; nil: nobody asks for them.
	absent *absent
	// noIPv6 means that the programs have no IPv6.
	noIPv6 bool
}

// directly returns the function for sockets that go past the proxy; nil: none is needed.
func (d *dialing) directly() func(fd int) error {
	if d.direct == nil {
		return d.prepare
	}
	return d.direct
}

// upstream is one that the router has, and what it was made of.
type upstream struct {
	Config config.Upstream
	Route  route.Upstream
	client *client // nil: direct
}

// newPlane builds a plane and starts nothing. It takes ownership of dev, even on error.
func newPlane(cfg *config.Config, dev tun.Device, sockets flow.Sockets, dial dialing, log *slog.Logger) (_ *plane, err error) {
	p := &plane{log: log, failed: make(chan error, 1), dial: dial, poolFile: cfg.Fake.File}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.dialer, err = socks.NewDialer(socks.Options{
		PrepareSocket: dial.prepare, PrepareDirect: dial.direct, Resolve: dial.resolve, Log: log,
		CanBePeer: flow.CanBePeer,
	}); err != nil {
		dev.Close()
		return nil, err
	}
	for range runtime.GOMAXPROCS(0) {
		l, err := relay.NewLoop(relay.Config{Log: log})
		if err != nil {
			dev.Close()
			return nil, err
		}
		p.loops = append(p.loops, l)
	}
	policy, ups, err := p.policy(cfg)
	if err != nil {
		dev.Close()
		return nil, err
	}
	p.ups = ups
	p.programs = newPrograms(ownersOf(sockets))
	h := &handler{}
	if p.stack, err = stack.New(stack.Config{
		Device: dev, Handler: h, Sockets: sockets, Log: log, Shards: shardsFor(len(p.loops)),
	}); err != nil {
		return nil, err
	}
	if p.router, err = route.New(route.Config{
		Upstreams: policy.Upstreams, Rules: policy.Rules, Default: policy.Default, Resolvers: policy.Resolvers,
		ResolverCAs:     policy.ResolverCAs,
		RelayDNS:        policy.RelayDNS,
		ResolverDefault: policy.ResolverDefault, Guard: policy.Guard, Fake: policy.Fake,
		Split: policy.Split, HostDNS: hostDNS(cfg.Command == config.Up, dial.directly()),
		Loops: p.loops, Shards: p.stack.Shards(),
		Sockets: sockets, Owners: ownersOf(sockets), ComesBack: dial.comesBack, OwnPort: p.ownPort, Asks: asksOf(cfg),
		Decisions: dial.decisions,
		Pool:      dial.pool, NoFakeIPv6: cfg.Fake.IPv6 == "off" || cfg.Fake.IPv6 == "auto" && dial.noIPv6,
		Host:          hostServices(cfg, p.dialer, dial.noIPv6),
		LearnFakeIPv6: cfg.Fake.IPv6 == "auto",
		Log:           log,
	}); err != nil {
		return nil, err
	}
	h.Router = p.router
	p.set(cfg)
	p.router.Attach(p.stack.PacketWriter)
	return p, nil
}

// policy returns the policy for the router. Existing upstreams that are made of the same are kept.
func (p *plane) policy(cfg *config.Config) (_ route.Policy, ups []upstream, err error) {
	b := builder{d: p.dialer, l: p.loops[0].Loop, allowed: p.dial.allowed, want: cfg.Upstreams, have: p.ups}
	if ups, err = b.all(); err != nil {
		return route.Policy{}, nil, err
	}
	if hasDirect(cfg) {
		i := slices.IndexFunc(p.ups, func(have upstream) bool { return have.Config.Name == route.DirectName })
		if i >= 0 {
			ups = append(ups, p.ups[i])
		} else {
			ups = append(ups, upstream{config.Upstream{Name: route.DirectName}, route.NewDirect(p.dialer, p.dial.directly()),
				nil})
		}
	}
	pol := route.Policy{
		Rules: cfg.Rules, Default: cfg.Default, Resolvers: cfg.DNS, ResolverCAs: cfg.DNSRoots, RelayDNS: cfg.Relay,
		ResolverDefault: cfg.ResolverDefault, Guard: cfg.Guard, Fake: cfg.Fake.On, Split: cfg.Split,
	}
	for _, u := range ups {
		pol.Upstreams = append(pol.Upstreams, u.Route)
	}
	return pol, ups, nil
}

// reload applies other upstreams, rules, resolvers, timeouts and limits, or changes nothing. Timeouts and limits
// apply to what begins later.
func (p *plane) reload(cfg *config.Config) error {
	policy, ups, err := p.policy(cfg)
	if err != nil {
		return err
	}
	if err := p.router.Reload(policy); err != nil {
		closeGroups(ups, p.ups)
		return err
	}
	closeGroups(p.ups, ups)
	old := p.ups
	p.mu.Lock()
	p.ups = ups
	p.mu.Unlock()
	p.set(cfg)
	p.relisten(cfg, func(name string) bool { return clientOf(old, name) != clientOf(ups, name) })
	return nil
}

// set passes the timeouts and limits of cfg to every part. Both a new plane and a reload use it, so that they always
// agree. Zero means the default of the part.
func (p *plane) set(cfg *config.Config) {
	p.dialer.SetTimeouts(cfg.ConnectTimeout, cfg.HandshakeTimeout)
	t := cfg.Tuning
	t.Pool = (t.Pool + len(p.loops) - 1) / len(p.loops) // the Dialer's pool is for each loop
	p.dialer.Tune(t)
	for _, l := range p.loops {
		l.SetIdleTimeout(cfg.IdleTimeout)
	}
	p.router.SetUDP(cfg.UDPTimeout, cfg.MaxMappings)
	p.router.SetSniff(cfg.Sniff())
	p.router.SetActiveFTP(p.activeFTP(cfg))
	p.router.SetPing(cfg.PingPorts)
	p.router.SetSTUN(cfg.STUN)
	p.setGSO(cfg.UDPGSO)
	p.stack.SetSSDP(cfg.Gateway())
	p.stack.Set(stack.Limits{Pending: cfg.MaxPending, PendingPerDest: cfg.MaxPendingPerDest}, cfg.IdleTimeout)
}

// gso tells whether datagrams go to the proxy with UDP_SEGMENT, and why.
type gso struct {
	on  bool
	why string
}

// String returns the word of the option.
func (g *gso) String() string {
	if g.on {
		return relay.GSOOn.String()
	}
	return relay.GSOOff.String()
}

// kernelRelease returns the release of the running kernel. It is a variable for tests.
var kernelRelease = relay.KernelRelease

// setGSO applies mode on this kernel, also to open links. It logs a change.
func (p *plane) setGSO(mode relay.GSO) {
	g := &gso{}
	g.on, g.why = mode.Decide(kernelRelease())
	for _, l := range p.loops {
		l.SetGSO(g.on)
	}
	if old := p.gso.Swap(g); old != nil && *old == *g {
		return
	}
	level := slog.LevelDebug
	if !g.on && mode == relay.GSOAuto {
		level = slog.LevelInfo // it costs speed, and the user did not choose it
	}
	p.log.Log(context.Background(), level, "UDP segmentation toward the proxy", "udp_gso", g.String(), "why", g.why)
}

// renew looks up the servers again, and makes again what lives long and would not notice that the network has
// changed. TCP flows are not touched: they survive if the old route still works.
func (p *plane) renew() {
	for _, u := range p.ups {
		if u.client != nil {
			u.client.Renew()
		}
	}
	p.router.Renew()
	if m := p.manager(); m != nil {
		m.Renew(func(string) bool { return true })
	}
}

// fail ends the daemon with err, unless it is already ending.
func (p *plane) fail(err error) {
	select {
	case p.failed <- err:
	default:
	}
}

// handler is the router, which is made after the stack, because it has as many shards. The stack calls it only when
// it runs.
type handler struct{ *route.Router }

var (
	_ stack.Handler            = (*handler)(nil)
	_ stack.UnreachableHandler = (*handler)(nil)
	_ stack.EchoHandler        = (*handler)(nil)
)

// start runs all parts. A part that ends before Close was called is reported on failed.
func (p *plane) start() {
	run := func(wg *sync.WaitGroup, f func(context.Context) error, what string) {
		wg.Go(func() {
			err := f(context.Background())
			if err == nil {
				err = errors.New("the " + what + " ended")
			}
			p.fail(err)
		})
	}
	for _, l := range p.loops {
		run(&p.looped, l.Run, "relay loop")
	}
	run(&p.ran, p.router.Run, "router")
	run(&p.ran, p.stack.Run, "stack")
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.ran.Go(func() { process.GiveBack(ctx, p.router.Ended, p.stack.Renew, p.log) })
	p.ran.Go(func() { process.FollowLoad(ctx) })
	saving, stopPool := context.WithCancel(context.Background()) // not ctx, which the goroutines above read
	p.stopPool = stopPool
	if p.dial.pool != nil && p.poolFile != "" {
		p.pooled.Go(func() { p.dial.pool.KeepFile(saving, p.poolFile, p.log) })
	}
}

// savePool saves the pool a last time, and leaves its file to another process.
func (p *plane) savePool() {
	p.stopPool()
	p.pooled.Wait()
}

// refuse resets the app's flows, and new ones from now on.
func (p *plane) refuse() { p.stack.ResetAll() }

// Close ends all parts in order, frees everything, and waits for that. It may be called twice, and after a failed
// newPlane.
func (p *plane) Close() {
	p.once.Do(func() {
		p.unlisten()
		if p.router != nil {
			p.router.Close() // while the stack still sends its resets
		}
		if p.stack != nil {
			p.stack.Close()
		}
		if p.stop != nil {
			p.stop()
			p.stopPool()
		}
		p.ran.Wait()
		p.pooled.Wait()
		for _, l := range p.loops {
			l.Close()
		}
		p.looped.Wait()
		closeGroups(p.ups, nil)
		if p.dialer != nil {
			p.dialer.Close()
		}
	})
}

// servers returns the servers of an upstream with their health, or nil for direct.
func (p *plane) servers(name string) []socks.ServerStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.ups {
		if u.Config.Name == name && u.client != nil {
			return u.client.Servers()
		}
	}
	return nil
}
