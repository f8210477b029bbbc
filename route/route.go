package route

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/stack/flow"
)

// Router takes flows from the stack, as its Handler, and has them carried. Its methods may be called from any
// goroutine, except HandleStream and HandlePackets, which belong to the frame reader of the shard that they name.
type Router struct {
	decider // the policy, and the verdicts by it
	port53  port53
	tcp     allStreams
	echo    echoes
	assocs  associations
	gone    goneSearch
	keeping keeping
	shards  []*shard                       // each with its streams and mappings
	inbox   mailbox                        // of Run
	portmap atomic.Pointer[portmap.Server] // answers programs that ask for ports; nil: nobody does
	upnp    atomic.Pointer[upnp]           // the gateway's web server, with portmap

	ran  atomic.Bool
	over chan struct{} // closed when Run has returned
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
	r := &Router{over: make(chan struct{})}
	r.cfg, r.log, r.epoch, r.times = cfg, newFlowLog(cfg.Log), time.Now(), defaultTimes()
	r.echo.wait, r.mayProbe = echoWait, flow.OneHost
	r.port53.decider, r.assocs.base, r.gone.base = &r.decider, &r.base, &r.base
	if err := r.makeShards(); err != nil {
		return nil, err
	}
	r.policy.Store(p)
	r.watchUpstreams(p)
	r.host = newHostSide(cfg.Host)
	r.asker, r.decisions = newAsker(cfg.Owners), newDecisions(cfg.Decisions, r.log)
	for _, s := range r.shards {
		s.udp.deep = r.deepFor(p)
	}
	r.SetUDP(cfg.UDPTimeout, cfg.Limits.Mappings)
	r.inbox.wake = make(chan struct{}, 1)
	if err := r.port53.init(p); err != nil {
		return nil, err
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
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

// Attach sets the function that makes writers to the apps of one shard, one for each goroutine that needs one. It
// must be called once, before Run and the first packet.
func (r *Router) Attach(writer func(shard int) flow.PacketWriter) {
	for i, s := range r.shards {
		s.readerW, s.runW, s.dnsW, s.askW = writer(i), writer(i), writer(i), writer(i)
		for j := range s.loopW {
			s.loopW[j] = writer(i)
		}
	}
}

// HandleStream implements stack.Handler. It makes the verdict and lets the upstream dial. It does not block.
func (r *Router) HandleStream(shard int, req flow.StreamRequest) { r.shards[shard].handleStream(req) }

// HandlePackets implements stack.Handler for a burst of datagrams of the apps of one shard. A run with one source and
// one upstream is sent by one call of its link. Nothing here blocks, and nothing is allocated for a datagram of an
// open association.
func (r *Router) HandlePackets(shard int, pkts []flow.Packet) { r.shards[shard].handlePackets(pkts) }

// HandleUnreachable implements stack.UnreachableHandler. It ends the mapping of an app endpoint whose kernel answered
// a datagram with ICMP port unreachable, because its socket is gone. A connected socket refuses datagrams of other
// senders in the same way, and these must not end its mapping; therefore Run checks the socket first if it can be
// queried. HandleUnreachable does not block.
func (r *Router) HandleUnreachable(shard int, app, _ netip.AddrPort) {
	r.shards[shard].handleUnreachable(app)
}

// SetUDP changes UDPTimeout and Limits.Mappings. As in Config, zero means the default. Mappings over a lower limit
// end when new ones come. New also uses it.
func (r *Router) SetUDP(timeout time.Duration, mappings int) {
	if mappings == 0 {
		mappings = defaultMappings(openFiles())
	}
	for _, s := range r.shards {
		s.udp.mu.Lock()
		s.udp.live(timeout)
		s.udp.most = mappings
		s.udp.mu.Unlock()
	}
}
