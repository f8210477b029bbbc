package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is one line of the generator's output.
type result struct {
	Case    string  `json:"case"`
	Value   float64 `json:"value"` // in Unit: the number that is compared with native
	Unit    string  `json:"unit"`
	P50us   float64 `json:"p50_us,omitempty"`
	P99us   float64 `json:"p99_us,omitempty"`
	Seconds float64 `json:"seconds"`
	Work    float64 `json:"work"`     // total bytes, connections, round trips or datagrams
	CPU     float64 `json:"cpu_s"`    // CPU seconds of the watched process during the case
	RSS     int64   `json:"rss"`      // bytes, of the watched process at the end
	PeakRSS int64   `json:"peak_rss"` // bytes, of the watched process so far

	Beside []figure `json:"beside,omitempty"` // other measurements made at the same time
	ownCPU bool     // CPU is already set, because not all of the watched process's belongs to the case
}

// figure is an additional measurement of a result.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value,omitempty"`
	Unit  string  `json:"unit,omitempty"`
	P50us float64 `json:"p50_us,omitempty"`
	P99us float64 `json:"p99_us,omitempty"`
}

// spread returns the distribution of durations.
func spread(name string, took []time.Duration) figure {
	f := figure{Name: name}
	f.P50us, f.P99us = percentiles(took)
	return f
}

type loader struct {
	proxy   netip.AddrPort // invalid: without a proxy
	target  netip.AddrPort
	seconds time.Duration
	watch   int               // process whose CPU time is recorded; 0: none
	also    []int             // processes whose CPU time is recorded, too
	crowd   *crowd            // not nil: target is not used, and each connection and socket has its own address
	peers   chan *net.TCPConn // not nil: connections that peers made, in place of new ones

	under string // not empty: each connection goes to its own name in this domain, and to target's port
}

// named is the number of names that connections went to.
var named atomic.Uint64

// cases are the cases by name. Each does a limited amount of work and reports it.
var cases = map[string]func(*loader) (result, error){
	"D1":        func(l *loader) (result, error) { return l.bulk(1, 0) },
	"D8":        func(l *loader) (result, error) { return l.bulk(8, 0) },
	"U1":        func(l *loader) (result, error) { return l.bulk(0, 1) },
	"U8":        func(l *loader) (result, error) { return l.bulk(0, 8) },
	"P1":        func(l *loader) (result, error) { return l.taken(1) },
	"P8":        func(l *loader) (result, error) { return l.taken(8) },
	"BD1":       func(l *loader) (result, error) { return l.fromPeers(1, 0) },
	"BD8":       func(l *loader) (result, error) { return l.fromPeers(8, 0) },
	"BU1":       func(l *loader) (result, error) { return l.fromPeers(0, 1) },
	"BU8":       func(l *loader) (result, error) { return l.fromPeers(0, 8) },
	"both":      func(l *loader) (result, error) { return l.bulk(1, 1) },
	"conn":      func(l *loader) (result, error) { return l.conns(64) },
	"conn1":     func(l *loader) (result, error) { return l.conns(1) },
	"ping1":     func(l *loader) (result, error) { return l.ping(1) },
	"ping16":    func(l *loader) (result, error) { return l.ping(16) },
	"pingbulk":  (*loader).pingBesideBulk,
	"udp64":     func(l *loader) (result, error) { return l.echoes(8, 64) },
	"udp1200":   func(l *loader) (result, error) { return l.echoes(8, 1200) },
	"udpnew":    (*loader).newSockets,
	"udp500":    func(l *loader) (result, error) { return l.echoes(500, 64) },
	"peers2000": func(l *loader) (result, error) { return l.swarm(2000) },
	"floodup":   (*loader).floodUp,
	"pingflood": (*loader).pingsBesideFlood,
	"flooddown": (*loader).floodDown,
	"idle2000":  func(l *loader) (result, error) { return l.idle(2000) },
	"idle9500":  func(l *loader) (result, error) { return l.idle(9500) },
	"scan":      (*loader).scan,
	"churn":     (*loader).churn,
}

func loadMain(args []string) error {
	fs := flag.NewFlagSet("load", flag.ExitOnError)
	name := fs.String("case", "", "what to do")
	label := fs.String("name", "", "what the result is called; none: the case")
	proxy := fs.String("proxy", "", "SOCKS5 server: work natively; none: plainly")
	target := fs.String("target", "", "the far end")
	seconds := fs.Duration("time", 3*time.Second, "how long, where the case is bounded by time")
	held := fs.Int(
		"crowd",
		-1,
		"how many addresses are in use meanwhile; each connection goes to a new one; -1: all go to the target",
	)
	v6 := fs.Bool("v6", false, "the crowd's addresses are those of IPv6")
	under := fs.String("under", "", "a domain: each connection goes to a name of its own under it")
	watch := fs.Int("watch", 0, "process whose CPU time and memory are noted; -1: the parent")
	also := fs.String("also", "", "processes whose CPU time is added, with commas; 0: this one")
	fs.Parse(args)
	run, ok := cases[*name]
	if !ok {
		return fmt.Errorf("no case %q: %v", *name, slices.Sorted(maps.Keys(cases)))
	}
	l := &loader{seconds: *seconds, under: *under}
	var err error
	if l.target, err = netip.ParseAddrPort(*target); err != nil {
		return err
	}
	if *proxy != "" {
		if l.proxy, err = netip.ParseAddrPort(*proxy); err != nil {
			return err
		}
	}
	if *watch < 0 {
		*watch = os.Getppid()
	}
	l.watch = *watch
	if l.also, err = processes(*also); err != nil {
		return err
	}
	if *held > crowdMost {
		return fmt.Errorf("cannot hold %d addresses: %d at most", *held, crowdMost)
	}
	if *held >= 0 {
		l.crowd = &crowd{v6: *v6}
		release, err := l.hold(*held, *name)
		if err != nil {
			return err
		}
		defer release()
	}
	r, err := l.measure(run)
	if err != nil {
		return fmt.Errorf("%s: %w", *name, err)
	}
	r.Case = cmp.Or(*label, *name)
	return json.NewEncoder(os.Stdout).Encode(r)
}

// measure runs a case, and notes the time, the CPU time and the memory that it took, as far as the case does not.
func (l *loader) measure(run func(*loader) (result, error)) (result, error) {
	before := l.cpu()
	start := time.Now()
	r, err := run(l)
	if err != nil {
		return r, err
	}
	if r.Seconds == 0 {
		r.Seconds = time.Since(start).Seconds()
	}
	if !r.ownCPU {
		r.CPU = l.cpu() - before
	}
	r.RSS, r.PeakRSS = memory(l.watch)
	return r, nil
}

// together runs n workers and joins their errors.
func together(n int, work func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = work(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// percentiles returns percentiles of durations in microseconds.
func percentiles(d []time.Duration) (p50, p99 float64) {
	if len(d) == 0 {
		return 0, 0
	}
	slices.Sort(d)
	at := func(q float64) float64 { return float64(d[min(len(d)-1, int(q*float64(len(d))))].Nanoseconds()) / 1000 }
	return at(0.50), at(0.99)
}
