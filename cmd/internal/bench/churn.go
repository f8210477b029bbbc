package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	churnRate   = 500  // connections a second
	churnAtOnce = 256  // concurrent connections: those that become due beyond it are left out
	churnSlices = 4    // the download alone, then with connections, and both once more
	churnSize   = 1024 // bytes that each connection gets
)

// churn opens connections of 1 KB each at a fixed rate beside one download. The result is how many there were in a
// second, which is the fixed rate unless they came too slowly. The use of the redirector's CPU time cannot be
// observed directly, so it is measured in slices with and without the connections: their share is what the bytes of
// the slice would not have cost without them. This includes that the bytes become more expensive, because the
// processor's caches and the batches are shared.
func (l *loader) churn() (result, error) {
	c, err := l.dial()
	if err != nil {
		return result{}, err
	}
	defer c.Close()
	var bytes atomic.Uint64
	end := make(chan struct{})
	bulk := make(chan error, 1)
	go func() { bulk <- downloadUntil(c, end, &bytes) }()
	time.Sleep(300 * time.Millisecond) // until it is in progress
	var alone, both slice
	var took []time.Duration
	for i := range churnSlices {
		s := slice{cpu: cpuSeconds(l.watch), bytes: float64(bytes.Load())}
		start := time.Now()
		if i%2 == 0 {
			time.Sleep(l.seconds / 2)
		} else {
			some, cerr := l.connectFor(l.seconds / 2)
			took = append(took, some...)
			err = errors.Join(err, cerr)
		}
		s = slice{time.Since(start).Seconds(), cpuSeconds(l.watch) - s.cpu, float64(bytes.Load()) - s.bytes}
		if i%2 == 0 {
			alone.add(s)
		} else {
			both.add(s)
		}
	}
	close(end)
	_ = c.SetReadDeadline(time.Now()) // the reader may be waiting
	err = errors.Join(err, <-bulk)
	n := float64(len(took))
	r := result{Value: n / both.seconds, Unit: "conn/s", Work: n, Seconds: both.seconds, CPU: both.over(alone), ownCPU: true}
	r.P50us, r.P99us = percentiles(took)
	r.Beside = []figure{
		{Name: "download beside it", Value: both.rate(), Unit: "Gbit/s"},
		{Name: "download alone", Value: alone.rate(), Unit: "Gbit/s"},
	}
	return r, err
}

// slice is a measurement over some time.
type slice struct{ seconds, cpu, bytes float64 }

func (s *slice) add(t slice) {
	s.seconds += t.seconds
	s.cpu += t.cpu
	s.bytes += t.bytes
}

// rate returns the rate of the bytes in Gbit/s.
func (s *slice) rate() float64 { return s.bytes * 8 / s.seconds / 1e9 }

// over returns the CPU time of s beyond what its bytes cost at the rate of alone.
func (s *slice) over(alone slice) float64 {
	if alone.bytes == 0 {
		return 0
	}
	return max(0, s.cpu-alone.cpu*s.bytes/alone.bytes)
}

// downloadUntil reads from a download, and counts, until end is closed and a read ends.
func downloadUntil(c *net.TCPConn, end <-chan struct{}, n *atomic.Uint64) error {
	// This is more than can arrive; the reader ends it.
	if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{workDown}, 1<<40)); err != nil {
		return err
	}
	p := chunks.Get().(*[]byte)
	defer chunks.Put(p)
	for {
		m, err := c.Read(*p)
		n.Add(uint64(m))
		select {
		case <-end:
			return c.SetLinger(0)
		default:
		}
		if err != nil {
			return fmt.Errorf("the download ended: %w", err)
		}
	}
}

// connectFor makes connections at the fixed rate, and returns how long each took from the moment when it was due. It
// returns when all of them have ended.
func (l *loader) connectFor(d time.Duration) (took []time.Duration, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	places := make(chan struct{}, churnAtOnce)
	start := time.Now()
	for i := range int(d.Seconds() * churnRate) {
		due := start.Add(time.Duration(i) * time.Second / churnRate)
		time.Sleep(time.Until(due))
		select {
		case places <- struct{}{}:
		default:
			continue
		}
		wg.Go(func() {
			cerr := l.kilobyte()
			late := time.Since(due)
			<-places
			mu.Lock()
			defer mu.Unlock()
			if cerr != nil {
				err = cerr // of the last one that failed
				return
			}
			took = append(took, late)
		})
	}
	wg.Wait()
	return took, err
}

// kilobyte makes one connection, from its SYN to the far end's FIN.
func (l *loader) kilobyte() error {
	c, err := l.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte{workKB}); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, c)
	if err == nil && n != churnSize {
		err = fmt.Errorf("%d bytes came in place of %d", n, churnSize)
	}
	return err
}
