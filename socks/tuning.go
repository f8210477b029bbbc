package socks

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Limits and defaults of Tuning.
const (
	// MaxPool limits the connections that wait in the pool of one server on one loop.
	MaxPool = 1024
	// DefaultPoolIdle is the idle limit of a pool.
	DefaultPoolIdle = 30 * time.Second
	// DefaultPoolAge is below the 30 s that dante gives a client to send its request.
	DefaultPoolAge = 25 * time.Second
)

// Tuning saves round trips to the servers. The zero value saves none. It does not change the meaning of a server's
// answer.
type Tuning struct {
	// Pool is how many connections with finished greeting and login are kept ready for each server, on each loop that
	// dials it; at most MaxPool. Zero: none.
	Pool int
	// PoolIdle is the time without a dial after which the connections of a pool are closed. PoolAge is how old a
	// connection may become. Zero: the defaults.
	PoolIdle, PoolAge time.Duration
	// Pipeline tells whether greeting, login and request of a CONNECT are sent in one write.
	Pipeline Pipeline
	// FastOpen lets the kernel send the first data with the SYN (RFC 7413) if it has a cookie of the server.
	FastOpen bool
}

// Tune sets the Tuning for later dials. It may be called from any goroutine.
func (d *Dialer) Tune(t Tuning) {
	t.Pool = min(max(t.Pool, 0), MaxPool)
	t.PoolIdle = cmp.Or(max(t.PoolIdle, 0), DefaultPoolIdle)
	t.PoolAge = cmp.Or(max(t.PoolAge, 0), DefaultPoolAge)
	d.tuning.Store(&t)
}

// Pipeline tells when greeting, login and request are sent in one write, without waiting for the answers between
// them. RFC 1928 does not forbid this, but some servers lose what follows their first read.
type Pipeline uint8

// The values of Pipeline.
const (
	PipelineOff  Pipeline = iota // never
	PipelineAuto                 // where a separate connection has shown that the server accepts it
	PipelineOn                   // always
)

var pipelineNames = [...]string{PipelineOff: "off", PipelineAuto: "auto", PipelineOn: "on"}

func (p Pipeline) String() string {
	if int(p) < len(pipelineNames) {
		return pipelineNames[p]
	}
	return fmt.Sprintf("Pipeline(%d)", uint8(p))
}

// ParsePipeline parses the text that String returns.
func ParsePipeline(text string) (Pipeline, error) {
	if i := slices.Index(pipelineNames[:], text); i >= 0 {
		return Pipeline(i), nil
	}
	return 0, fmt.Errorf("must be %s, %s or %s", PipelineAuto, PipelineOn, PipelineOff)
}
