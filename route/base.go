package route

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"
)

// base is what all parts of a Router use: its configuration, its clock, its log and its end.
type base struct {
	cfg      Config
	log      *flowLog
	epoch    time.Time
	ids      atomic.Uint64
	ctx      context.Context // of everything that is pending
	cancel   context.CancelFunc
	watched  watchers // they get events
	shortage shortage
	mayProbe func(netip.Addr) bool // whether a datagram may be sent to an outer endpoint at this address; see probe.filter
	times
}

// times are constants, except in tests.
type times struct {
	retryFirst, retryMax, livedLong, quickEnd, noUDP time.Duration // of associations
	sweepEvery, lookEvery, lookMost                  time.Duration // of the search for what is over
	goneAfter, streamsEvery                          time.Duration // of the same
	probeFirst, probeEvery, probeAgain, probeLinger  time.Duration // of the probes of kept mappings
	nameTrial, nameDoubt, nameWindow, nameSilence    time.Duration // of names in datagrams
}

func defaultTimes() times {
	return times{
		retryFirst: retryFirst, retryMax: retryMax, livedLong: livedLong, quickEnd: quickEnd, noUDP: noUDP,
		sweepEvery: sweepEvery, lookEvery: lookEvery, lookMost: lookMost, goneAfter: goneAfter, streamsEvery: streamsEvery,
		probeFirst: probeFirst, probeEvery: probeEvery, probeAgain: probeAgain, probeLinger: probeLinger,
		nameTrial: nameTrial, nameDoubt: nameDoubt, nameWindow: nameWindow, nameSilence: nameSilence,
	}
}

var noAddr netip.AddrPort

// now returns the time on the Router's clock: nanoseconds since it was made, never 0.
func (b *base) now() int64 { return int64(time.Since(b.epoch)) + 1 }
