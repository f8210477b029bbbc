package route

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/viasocks/viasocks/route/relay"
)

type eventKind uint8

const (
	evOpen        eventKind = iota // an association is wanted
	evDone                         // OpenPackets called done
	evClosed                       // an open link failed
	evDiscard                      // a link is no longer wanted
	evBack                         // a server of the upstream works again
	evFar                          // the address of a name was found
	evLater                        // a datagram to a name is looked at again
	evTrialEnded                   // what waited for a trial is sent
	evTrial                        // a name had its time to answer
	evKeep                         // a mapping shall be kept from now on
	evUnkeep                       // a mapping need not be kept any longer
	evProbed                       // a probe has found something, or has ended
	evUnreachable                  // the app's kernel reports that the socket is gone
)

type event struct {
	kind  eventKind
	a     *assoc
	m     *mapping
	t     *try
	up    *upstream
	far   *farAnswer
	later *laterPacket
	dest  *namedDest
	trial *trial
	shard *shard
	kept  *kept
	found *probed
	link  relay.PacketLink
	err   error
}

// mailbox takes events from any goroutine without blocking. The number of mappings limits its length: there are a few
// events for each.
type mailbox struct {
	mu     sync.Mutex
	events []event
	wake   chan struct{}
}

func (b *mailbox) post(e event) {
	b.mu.Lock()
	b.events = append(b.events, e)
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take returns the waiting events. spare is the previous result of take, whose memory is reused.
func (b *mailbox) take(spare []event) []event {
	clear(spare)
	b.mu.Lock()
	defer b.mu.Unlock()
	events := b.events
	b.events = spare[:0]
	return events
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
	if r.port53.server.Load() != nil {
		r.port53.startFirst()
		defer r.port53.wait()
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
			r.gone.sweepSockets(r.shards)
			r.gone.sweepStreams(r.shards)
			r.sweepPorts()
			r.keeping.look()
		case <-r.inbox.wake:
			events = r.inbox.take(events)
			for _, e := range events {
				r.handle(e)
			}
		}
	}
	return r.teardown()
}

func (r *Router) teardown() error {
	r.endFlows()
	r.keeping.end()
	relays := make(chan struct{})
	go func() {
		r.echo.wg.Wait()
		r.tcp.sniffs.wg.Wait() // each may begin a stream
		for _, s := range r.shards {
			s.streams.wg.Wait()
		}
		close(relays)
	}()
	late := time.NewTimer(teardownWait)
	defer late.Stop()
	for r.assocs.opening > 0 || relays != nil {
		select {
		case <-relays:
			relays = nil
		case <-r.inbox.wake:
		case <-late.C:
			return fmt.Errorf(
				"cannot end all flows: %d dials and %d associations did not end in %v",
				len(r.snapshot()),
				r.assocs.opening,
				teardownWait,
			)
		}
		r.drain()
	}
	r.drain()
	return nil
}

func (r *Router) drain() {
	for _, e := range r.inbox.take(nil) {
		r.handle(e)
	}
}

// endFlows ends all flows and refuses new ones. Those of TCP take a moment.
func (r *Router) endFlows() {
	r.tcp.sniffs.close()
	r.echo.close()
	for _, s := range r.shards {
		s.streams.close()
	}
	for _, s := range r.shards {
		s.closeMappings()
	}
}

// handle does what would take the frame reader too long.
func (r *Router) handle(e event) {
	switch e.kind {
	case evOpen:
		r.gone.firstLook(e.a.m)
		e.a.m.s.open(e.a)
	case evDone:
		e.t.a.m.s.opened(e)
	case evClosed:
		if e.t != nil {
			e.t.a.m.s.closed(e)
		}
	case evFar:
		e.far.s.found(e.far)
	case evLater:
		e.later.s.carryLater(&e.later.q)
	case evTrialEnded:
		e.shard.afterTrial(e.trial)
	case evTrial:
		e.m.s.trialOver(e.m, e.dest)
	case evKeep:
		r.keeping.add(e.kept)
	case evUnkeep:
		r.keeping.remove(e.kept)
	case evProbed:
		e.kept.probed(e.found)
	case evUnreachable:
		e.m.s.unreachable(e.m)
	case evBack:
		for _, s := range r.shards {
			s.back(e.up)
		}
	case evDiscard:
		if e.t != nil {
			e.t.cancel()
		}
		if e.link != nil {
			r.assocs.closeLink(e.up, e.link)
		}
	}
}
