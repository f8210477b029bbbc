package socks

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Limits and defaults of Tuning.
const (
	// MaxPool bounds the connections that wait in the pool of one server on one loop.
	MaxPool = 1024
	// DefaultPoolIdle is the idle limit of a pool.
	DefaultPoolIdle = 30 * time.Second
	// DefaultPoolAge is below the 30 s that dante gives a client to send its request.
	DefaultPoolAge = 25 * time.Second
)

// Tuning saves round trips to the servers. The zero value saves none. It changes nothing of what a server's answer means.
type Tuning struct {
	// Pool is how many connections that have finished greeting and login are kept ready for each server, on each loop that
	// dials it: MaxPool at most. Zero: none.
	Pool int
	// PoolIdle is after how long without a dial the connections of a pool are closed, and PoolAge how old one may become.
	// Zero: the defaults.
	PoolIdle, PoolAge time.Duration
	// Pipeline is whether greeting, login and request of a CONNECT are sent in one write.
	Pipeline Pipeline
	// FastOpen has the kernel put what is sent first into the SYN (RFC 7413), where it has a cookie of the server.
	FastOpen bool
}

// Tune changes how round trips are saved, for dials from now on. Any goroutine may call it.
func (d *Dialer) Tune(t Tuning) {
	t.Pool = min(max(t.Pool, 0), MaxPool)
	t.PoolIdle = cmp.Or(max(t.PoolIdle, 0), DefaultPoolIdle)
	t.PoolAge = cmp.Or(max(t.PoolAge, 0), DefaultPoolAge)
	d.tuning.Store(&t)
}

// Pipeline is when greeting, login and request are sent in one write, without waiting for the answers between
// them. RFC 1928 does not forbid it. Some servers lose what follows their first read.
type Pipeline uint8

// The ways to pipeline.
const (
	PipelineOff  Pipeline = iota // never
	PipelineAuto                 // where a connection beside the flows has shown that the server takes it
	PipelineOn                   // always
)

var pipelineNames = [...]string{PipelineOff: "off", PipelineAuto: "auto", PipelineOn: "on"}

func (p Pipeline) String() string {
	if int(p) < len(pipelineNames) {
		return pipelineNames[p]
	}
	return fmt.Sprintf("Pipeline(%d)", uint8(p))
}

// ParsePipeline reads what String writes.
func ParsePipeline(text string) (Pipeline, error) {
	if i := slices.Index(pipelineNames[:], text); i >= 0 {
		return Pipeline(i), nil
	}
	return 0, fmt.Errorf("must be %s, %s or %s", PipelineAuto, PipelineOn, PipelineOff)
}
