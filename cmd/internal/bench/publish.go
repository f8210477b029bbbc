package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// publishedAt is where the program of the cases P1 and P8 listens, and where scripts/bench.sh publishes it.
const publishedAt = "127.0.0.1:9100"

// pushMain is the other side of P1 and P8, until a signal: connections that send as much as is taken, each made again when
// it ends.
func pushMain(args []string) error {
	fs := flag.NewFlagSet("push", flag.ExitOnError)
	to := fs.String("to", publishedAt, "where to send")
	n := fs.Int("connections", 1, "how many at a time")
	fs.Parse(args)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	over := make(chan struct{})
	var wg sync.WaitGroup
	for range *n {
		wg.Go(func() { push(*to, over) })
	}
	<-end
	close(over)
	wg.Wait()
	return nil
}

// push sends on one connection after the other. Until the program listens, each is refused or reset.
func push(to string, over <-chan struct{}) {
	for {
		if c, err := net.DialTimeout("tcp", to, time.Second); err == nil {
			stop := make(chan struct{})
			go func() {
				select {
				case <-over:
				case <-stop:
				}
				c.Close()
			}()
			for err == nil {
				_, err = c.Write(zeros)
			}
			close(stop)
		}
		select {
		case <-over:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// taken receives what push sends on n connections until the time is over.
func (l *loader) taken(n int) (result, error) {
	in, err := net.Listen("tcp", publishedAt)
	if err != nil {
		return result{}, err
	}
	defer in.Close()
	_ = in.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
	var all []*net.TCPConn
	defer func() {
		for _, c := range all {
			_ = c.SetLinger(0)
			_ = c.Close()
		}
	}()
	for range n {
		c, err := in.Accept()
		if err != nil {
			return result{}, fmt.Errorf("nobody connects to %s: is 'bench push' running?: %w", publishedAt, err)
		}
		all = append(all, c.(*net.TCPConn))
	}
	var total atomic.Uint64
	before, start := cpuSeconds(l.watch), time.Now()
	end := start.Add(l.seconds)
	err = together(n, func(i int) error {
		p := chunks.Get().(*[]byte)
		defer chunks.Put(p)
		_ = all[i].SetReadDeadline(end)
		for {
			m, err := all[i].Read(*p)
			total.Add(uint64(m))
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				return nil
			case err != nil:
				return fmt.Errorf("a connection to the published port ended: %w", err)
			}
		}
	})
	seconds, work := time.Since(start).Seconds(), float64(total.Load())
	return result{Value: work * 8 / seconds / 1e9, Unit: "Gbit/s", Work: work, Seconds: seconds,
		CPU: cpuSeconds(l.watch) - before, ownCPU: true}, err
}
