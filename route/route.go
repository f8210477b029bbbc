package route

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Config of a Router.
type Config struct {
	Upstreams []Upstream // their names must differ; the one named "direct" is what the verdict direct means
	Rules     []Rule     // the first that matches decides
	Default   string     // the upstream of flows that no rule matches; "": they are refused

	Loops   []*relay.Loop // at least one; run by the caller, until after the Router was closed
	Shards  int           // those of the stack: HandleStream and the like name one; they share the loops out. 0: one
	Sockets flow.Sockets  // nil: it can't be asked whether the app's sockets exist
	Owners  flow.Owners   // nil: it can't be asked whose the app's sockets are
	// Decisions gets one JSON object on a line for each verdict that is taken on a flow, from one goroutine. A writer that
	// is too slow loses lines and holds up nothing. nil: nobody wants them.
	Decisions io.Writer
	// ComesBack reports whether the socket that began a flow is a proxy's own, so that carrying it would never end: it is
	// refused. It is called for each new stream and each new mapping, on the frame reader. nil: no proxy's socket can.
	ComesBack func(flow.Flow) bool
	// Resolvers answer port 53, asked through the upstream that the rules give them. None: port 53 is a port like others.
	Resolvers []dns.Resolver
	// RelayDNS: questions go to the servers that the app asks, and to Resolvers only if nobody can have their address.
	RelayDNS bool
	// ResolverCAs are the certificates that resolvers inside TLS are verified by; nil: those that the system trusts.
	ResolverCAs *x509.CertPool
	// ResolverDefault is the upstream of connections to Resolvers that no rule matches; "": Default's.
	ResolverDefault string
	// Guard refuses questions of DNS for names that no rule can need, and all operations of DNS but questions: they would be
	// a way out past the rules.
	Guard bool
	// Split says which names are asked of other servers than Resolvers.
	Split Split
	// HostDNS asks servers past every upstream; its zero value: there is no way to. With Fake, names that the rules send direct are
	// asked of its Servers.
	HostDNS HostDNS
	// Pool has the fake addresses. A TCP flow to one travels as the name that it stands for. nil: there are none.
	Pool *dns.Pool
	// Fake: questions for addresses are answered with those of Pool, which must be there. Otherwise addresses that were given out
	// before go on standing for their names.
	Fake bool
	// NoFakeIPv6: names have no fake IPv6 address, only an IPv4 one.
	NoFakeIPv6 bool
	// LearnFakeIPv6: names have none while flows show that the upstream that carries them cannot reach IPv6.
	LearnFakeIPv6 bool
	// UDPTimeout is how long a mapping lives after the last datagram when its socket is gone. 0: DefaultUDPTimeout.
	UDPTimeout time.Duration
	Limits     Limits
	Log        *slog.Logger // nil: none
}

// Limits bound what the app can make us hold. Zero fields get the defaults.
type Limits struct {
	Flows        int // TCP flows, pending ones included; default 65,536, or what RLIMIT_NOFILE leaves
	Mappings     int // UDP mappings; default DefaultMappings, or what RLIMIT_NOFILE leaves
	Associations int // that may be pending at a time; default 256
}

// DefaultMappings is the most UDP mappings where enough files may be open.
const DefaultMappings = 8192

// openFiles is how many files may be open, as far as it matters here.
func openFiles() int {
	files := 1 << 20
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err == nil && rl.Cur < uint64(files) {
		files = int(rl.Cur)
	}
	return files
}

func defaultMappings(files int) int { return max(min(DefaultMappings, files/8), 16) }

// fill sets the defaults, but for Mappings, whose default SetUDP sets. A flow holds one descriptor, a mapping two (the control
// connection and the UDP socket): the mappings get a quarter of what there is, the flows three fifths, and the rest is for
// everything else.
func (l *Limits) fill() error {
	if l.Flows < 0 || l.Mappings < 0 || l.Associations < 0 {
		return errors.New("cannot use a limit below 0")
	}
	if l.Flows == 0 {
		l.Flows = min(65536, openFiles()*3/5)
	}
	if l.Associations == 0 {
		l.Associations = 256
	}
	return nil
}

var noAddr netip.AddrPort

// Router takes flows from the stack, as its Handler, and has them carried. Its methods may be called from any
// goroutine, but for HandleStream and HandlePackets, which are the frame reader's of the shard that they name.
type Router struct {
	cfg    Config
	policy atomic.Pointer[policy]
	dns    atomic.Pointer[dns.Server] // nil: port 53 is a port like others
	answer *verdict                   // on TCP to port 53, where Pool is set
	log    *flowLog
	epoch  time.Time
	ids    atomic.Uint64
	flows  atomic.Int64 // TCP flows of all shards
	mapped atomic.Int64 // mappings of all shards

	ctx    context.Context // of everything that is pending
	cancel context.CancelFunc
	ran    atomic.Bool
	over   chan struct{} // Run has returned

	shards  []*shard
	ctl     mailbox
	control control
	guarded guardLog

	names     nameTable
	sniffs    sniffs
	asker     *asker     // nil: nobody can be asked
	decisions *decisions // nil: nobody wants them

	reload      sync.Mutex // over the next six, and while the policy is replaced
	resolvers   []dns.Resolver
	resolverCAs *x509.CertPool
	relayDNS    bool
	dnsStop     context.CancelFunc   // of the dns.Server that runs
	dnsPast     dns.Counters[uint64] // of those that ran before
	dnsRuns     sync.WaitGroup

	links    relay.LinkCounters[atomic.Uint64]
	shortage shortage

	// Constants but in tests.
	retryFirst, retryMax, livedLong, quickEnd, noUDP, sweepEvery, lookEvery, goneAfter, streamsEvery time.Duration
}

// New checks the configuration. Nothing runs, and nothing is opened, until Run.
func New(cfg Config) (*Router, error) {
	if len(cfg.Loops) == 0 {
		return nil, errors.New("cannot carry flows: no relay loop is given")
	}
	p, err := newPolicy(cfg, nil)
	if err != nil {
		return nil, err
	}
	if err := cfg.Limits.fill(); err != nil {
		return nil, err
	}
	if cfg.UDPTimeout < 0 {
		return nil, errors.New("cannot use a UDP timeout below 0")
	}
	r := &Router{
		cfg: cfg, log: newFlowLog(cfg.Log), epoch: time.Now(),
		over:       make(chan struct{}),
		retryFirst: retryFirst, retryMax: retryMax, livedLong: livedLong, quickEnd: quickEnd, noUDP: noUDP, sweepEvery: sweepEvery,
		lookEvery: lookEvery, goneAfter: goneAfter, streamsEvery: streamsEvery,
	}
	if err := r.makeShards(); err != nil {
		return nil, err
	}
	r.policy.Store(p)
	r.watchUpstreams(p)
	r.answer = newAnswers(r)
	r.asker, r.decisions = newAsker(cfg.Owners), newDecisions(cfg.Decisions, r.log)
	for _, s := range r.shards {
		s.udp.deep = r.deepFor(p)
	}
	r.SetUDP(cfg.UDPTimeout, cfg.Limits.Mappings)
	r.ctl.wake = make(chan struct{}, 1)
	if len(cfg.Resolvers) > 0 {
		d, err := r.newDNS(p, cfg.Resolvers, cfg.ResolverCAs, cfg.RelayDNS, &cfg.Split)
		if err != nil {
			return nil, err
		}
		r.dns.Store(d)
		r.resolvers, r.resolverCAs, r.relayDNS = cfg.Resolvers, cfg.ResolverCAs, cfg.RelayDNS
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// now is the Router's clock: nanoseconds since it was made, never 0.
func (r *Router) now() int64 { return int64(time.Since(r.epoch)) + 1 }

// dialResolver dials for route/dns: by the rules, as any flow, and by ResolverDefault where none matches.
func (r *Router) dialResolver(ctx context.Context, to dns.Resolver, done func(fd int, err error)) {
	v := r.policy.Load().decideResolver(to)
	if v.kind != carry {
		done(-1, fmt.Errorf("rule %q refuses it", v.rule))
		return
	}
	v.up.DialStream(ctx, r.cfg.Loops[0], resolverDest(to), func(s loop.Socket, err error) {
		if err != nil && isShortage(err) {
			r.short(err)
		}
		done(s.Release(), err)
	})
}

// askTor asks the upstream of resolvers, which must be a Tor, for route/dns.
func (r *Router) askTor(ctx context.Context, name string, ip netip.Addr, done func(netip.Addr, string, error)) {
	v := r.policy.Load().decideResolver(dns.Resolver{Kind: dns.Tor})
	if v.kind != carry {
		done(netip.Addr{}, "", fmt.Errorf("rule %q refuses it", v.rule))
		return
	}
	tor, ok := v.up.Upstream.(torUpstream)
	if !ok {
		done(netip.Addr{}, "", fmt.Errorf("the upstream %s is no Tor", v.up.name))
		return
	}
	tor.AskTor(ctx, r.cfg.Loops[0], name, ip, func(found netip.Addr, of string, err error) {
		var reply socks.Reply
		switch {
		case errors.Is(err, socks.ReplyHostUnreachable):
			err = dns.ErrNoName
		case errors.As(err, &reply):
			err = fmt.Errorf("%w: %w", dns.ErrNoAnswer, err)
		}
		done(found, of, err)
	})
}

// resolverDest is where a resolver is: its name only where its address is not known.
func resolverDest(to dns.Resolver) Dest {
	if to.Addr.Addr().IsValid() {
		return Dest{Addr: to.Addr}
	}
	return Dest{Addr: to.Addr, Name: to.Name}
}

// teardownWait bounds the wait for the relays' ends at the end of Run: they come at once, unless a loop does not run.
const teardownWait = 5 * time.Second

// Run does the Router's own work until ctx ends or Close is called, then refuses new flows, resets those there are, closes
// the mappings, waits for all of it and returns nil. The loops must run until Run has returned. It may be called once.
func (r *Router) Run(ctx context.Context) error {
	if r.ran.Swap(true) {
		return errors.New("cannot run a router twice")
	}
	defer close(r.over)
	defer r.cancel()
	if r.shards[0].readerW == nil {
		return errors.New("cannot run a router without writers: Attach comes first")
	}
	r.log.start()
	defer r.log.close()
	r.decisions.start()
	defer r.decisions.end()
	if r.asker != nil {
		r.asker.wg.Go(func() { r.runAsker(r.ctx) })
		defer r.asker.wg.Wait()
	}
	stop := context.AfterFunc(ctx, r.cancel)
	defer stop()
	if r.dns.Load() != nil {
		r.startFirstDNS()
		defer func() {
			r.reload.Lock() // a Reload that is under way may start one more, later ones see that it is over
			defer r.reload.Unlock()
			r.dnsRuns.Wait()
		}()
	}
	sweep := time.NewTicker(r.sweepEvery)
	defer sweep.Stop()
	var events []event
	for r.ctx.Err() == nil {
		select {
		case <-r.ctx.Done():
		case <-sweep.C:
			for _, s := range r.shards {
				s.sweep()
			}
			r.sweepSockets()
			r.sweepStreams()
		case <-r.ctl.wake:
			events = r.ctl.take(events)
			for _, e := range events {
				r.handle(e)
			}
		}
	}
	return r.teardown()
}

func (r *Router) teardown() error {
	r.endFlows()
	relays := make(chan struct{})
	go func() {
		r.sniffs.wg.Wait() // each may begin a stream
		for _, s := range r.shards {
			s.streams.wg.Wait()
		}
		close(relays)
	}()
	late := time.NewTimer(teardownWait)
	defer late.Stop()
	for r.control.opening > 0 || relays != nil {
		select {
		case <-relays:
			relays = nil
		case <-r.ctl.wake:
		case <-late.C:
			return fmt.Errorf(
				"cannot end all flows: %d dials and %d associations did not end in %v",
				len(r.snapshot()),
				r.control.opening,
				teardownWait,
			)
		}
		r.drain()
	}
	r.drain()
	return nil
}

func (r *Router) drain() {
	for _, e := range r.ctl.take(nil) {
		r.handle(e)
	}
}

// endFlows ends all flows and refuses new ones from here on. Those of TCP take a moment.
func (r *Router) endFlows() {
	r.closeSniffs()
	for _, s := range r.shards {
		s.streams.close()
	}
	for _, s := range r.shards {
		s.closeMappings()
	}
}

// closeMappings ends all mappings; new ones are refused from here on.
func (r *shard) closeMappings() {
	r.udp.mu.Lock()
	defer r.udp.mu.Unlock()
	r.udp.clos = true
	for len(r.udp.all) > 0 {
		r.endMapping(r.udp.all[len(r.udp.all)-1], "closed", nil)
	}
}

// Close ends Run and waits for it. It may be called twice and from any goroutine.
func (r *Router) Close() error {
	r.cancel()
	if r.ran.Load() {
		<-r.over
		return nil
	}
	r.endFlows()
	return nil
}
