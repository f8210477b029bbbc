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

// Config is the configuration of a Router.
type Config struct {
	Upstreams []Upstream // their names must differ; the one named "direct" is that of the verdict direct
	Rules     []Rule     // the first one that matches decides
	Default   string     // upstream of flows that no rule matches; "": they are refused

	Loops   []*relay.Loop // at least one; the caller runs them until after the Router was closed
	Shards  int           // those of the stack, which HandleStream and others name; they share the loops. 0: one
	Sockets flow.Sockets  // nil: the app's sockets cannot be queried
	Owners  flow.Owners   // nil: the owners of the app's sockets cannot be found
	// Decisions gets one JSON object on a line for each verdict on a flow, from one goroutine. If the writer is too
	// slow, lines are lost and nothing is delayed. nil: not wanted.
	Decisions io.Writer
	// ComesBack reports whether the socket that began a flow belongs to a proxy, so that carrying it would never end;
	// the flow is then refused. It is called for each new stream and each new mapping, on the frame reader. nil: this
	// cannot happen.
	ComesBack func(flow.Flow) bool
	// Resolvers answer port 53. They are asked through the upstream that the rules choose. Empty: port 53 is a port
	// like others.
	Resolvers []dns.Resolver
	// RelayDNS means that questions go to the servers that the app asks, and to Resolvers only if those addresses
	// cannot be real.
	RelayDNS bool
	// ResolverCAs are the certificates by which resolvers inside TLS are verified; nil: the system's authorities.
	ResolverCAs *x509.CertPool
	// ResolverDefault is the upstream for connections to Resolvers that no rule matches; "": that of Default.
	ResolverDefault string
	// Guard refuses DNS questions for names that no rule may need, and all DNS operations except questions, because
	// they would be a way out past the rules.
	Guard bool
	// Split tells which names are looked up at other servers than Resolvers.
	Split Split
	// HostDNS asks servers past every upstream; with its zero value that is not possible. With Fake, names that the
	// rules send direct are looked up at its Servers.
	HostDNS HostDNS
	// Pool contains the fake addresses. A TCP flow to one of them travels as the name that it stands for. nil: there
	// are none.
	Pool *dns.Pool
	// Fake means that questions for addresses are answered from Pool, which must not be nil. Otherwise addresses that
	// were given out before still stand for their names.
	Fake bool
	// NoFakeIPv6 means that names have only a fake IPv4 address.
	NoFakeIPv6 bool
	// LearnFakeIPv6 means that names have no fake IPv6 address while flows show that the upstream that carries them
	// cannot reach IPv6.
	LearnFakeIPv6 bool
	// Host tells which services of the host may be reached; nil: none.
	Host *HostServices
	// UDPTimeout is how long a mapping lives after its last datagram if its socket is gone. 0: DefaultUDPTimeout.
	UDPTimeout time.Duration
	Limits     Limits
	Log        *slog.Logger // nil: none
}

// Limits limit the resources that the app can make us hold. Zero means the default.
type Limits struct {
	Flows        int // TCP flows, including pending ones; default 65,536, or what RLIMIT_NOFILE allows
	Mappings     int // UDP mappings; default DefaultMappings, or what RLIMIT_NOFILE allows
	Associations int // that may be pending at the same time; default 256
}

// DefaultMappings is the limit of UDP mappings if enough files may be open.
const DefaultMappings = 8192

// openFiles returns how many files may be open, up to a large number.
func openFiles() int {
	files := 1 << 20
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err == nil && rl.Cur < uint64(files) {
		files = int(rl.Cur)
	}
	return files
}

func defaultMappings(files int) int { return max(min(DefaultMappings, files/8), 16) }

// fill sets the defaults, except that of Mappings, which SetUDP sets. A flow holds one descriptor, a mapping two (the
// control connection and the UDP socket). The mappings get a quarter of the descriptors, the flows three fifths, and
// the rest is for everything else.
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
// goroutine, except HandleStream and HandlePackets, which belong to the frame reader of the shard that they name.
type Router struct {
	cfg    Config
	policy atomic.Pointer[policy]
	dns    atomic.Pointer[dns.Server] // nil: port 53 is a port like others
	answer *verdict                   // for TCP to port 53, if Pool is set
	host   *hostSide                  // nil: the host's services cannot be reached
	log    *flowLog
	epoch  time.Time
	ids    atomic.Uint64
	flows  atomic.Int64 // TCP flows of all shards
	mapped atomic.Int64 // mappings of all shards

	ctx    context.Context // of everything that is pending
	cancel context.CancelFunc
	ran    atomic.Bool
	over   chan struct{} // closed when Run has returned

	watched watchers // they get events

	shards  []*shard
	ctl     mailbox
	control control
	guarded guardLog

	names     nameTable
	sniffs    sniffs
	asker     *asker     // nil: owners cannot be found
	decisions *decisions // nil: not wanted

	reload      sync.Mutex // guards the next six fields, and is held while the policy is replaced
	resolvers   []dns.Resolver
	resolverCAs *x509.CertPool
	relayDNS    bool
	dnsStop     context.CancelFunc   // ends the running dns.Server
	dnsPast     dns.Counters[uint64] // of earlier servers
	dnsRuns     sync.WaitGroup

	shortage shortage

	// Constants, except in tests.
	retryFirst, retryMax, livedLong, quickEnd, noUDP, sweepEvery, lookEvery, goneAfter, streamsEvery time.Duration
	nameTrial, nameDoubt, nameWindow, nameSilence                                                    time.Duration
}

// New checks the configuration. It runs and opens nothing; Run does.
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
		nameTrial: nameTrial, nameDoubt: nameDoubt, nameWindow: nameWindow, nameSilence: nameSilence,
	}
	if err := r.makeShards(); err != nil {
		return nil, err
	}
	r.policy.Store(p)
	r.watchUpstreams(p)
	r.answer, r.host = newAnswers(r), newHostSide(cfg.Host)
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

// now returns the time on the Router's clock: nanoseconds since it was made, never 0.
func (r *Router) now() int64 { return int64(time.Since(r.epoch)) + 1 }

// dialResolver dials for route/dns, by the rules like any flow, or by ResolverDefault if none matches.
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

// resolverDest returns the destination of a resolver, by name only if its address is unknown.
func resolverDest(to dns.Resolver) Dest {
	if to.Addr.Addr().IsValid() {
		return Dest{Addr: to.Addr}
	}
	return Dest{Addr: to.Addr, Name: to.Name}
}

// teardownWait limits the wait for the relays' ends at the end of Run. They come at once, unless a loop does not run.
const teardownWait = 5 * time.Second

// Run does the Router's own work until ctx ends or Close is called. Then it refuses new flows, resets existing ones,
// closes the mappings, waits for all of that and returns nil. The loops must run until Run has returned. It may be
// called once.
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
			r.reload.Lock() // a Reload in progress may start one more; later ones see that it is over
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

// endFlows ends all flows and refuses new ones. Those of TCP take a moment.
func (r *Router) endFlows() {
	r.closeSniffs()
	for _, s := range r.shards {
		s.streams.close()
	}
	for _, s := range r.shards {
		s.closeMappings()
	}
}

// closeMappings ends all mappings and refuses new ones.
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
