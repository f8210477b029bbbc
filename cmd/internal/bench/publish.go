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

// The port of the program in the cases of connections that come to it, and where scripts/bench.sh publishes it.
const (
	inPort      = 9100
	publishedAt = "127.0.0.1:9100"
)

// pushMain is the other side of the cases of connections that come to the program, until a signal: each connection is made again
// when it ends. It sends as much as is taken, or serves the program as the far end does.
func pushMain(args []string) error {
	fs := flag.NewFlagSet("push", flag.ExitOnError)
	to := fs.String("to", publishedAt, "where to send")
	n := fs.Int("connections", 1, "how many at a time")
	serve := fs.Bool("serve", false, "do the work that the program asks for, in place of sending")
	fs.Parse(args)
	work := sendOn
	if *serve {
		work = serveWork
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	over := make(chan struct{})
	var wg sync.WaitGroup
	for range *n {
		wg.Go(func() { push(*to, work, over) })
	}
	<-end
	close(over)
	wg.Wait()
	return nil
}

// sendOn sends until the connection ends.
func sendOn(c *net.TCPConn) {
	for err := error(nil); err == nil; {
		_, err = c.Write(zeros)
	}
}

// push does the work on one connection after the other. Until the program listens, each is refused or reset.
func push(to string, work func(*net.TCPConn), over <-chan struct{}) {
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
			work(c.(*net.TCPConn))
			close(stop)
		}
		select {
		case <-over:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// accepted returns the first n connections to the program's port.
func accepted(n int) (all []*net.TCPConn, err error) {
	in, err := net.Listen("tcp4", fmt.Sprintf(":%d", inPort))
	if err != nil {
		return nil, err
	}
	defer in.Close()
	_ = in.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
	for range n {
		c, err := in.Accept()
		if err != nil {
			return all, fmt.Errorf("nobody connects to port %d: is 'bench push' running?: %w", inPort, err)
		}
		all = append(all, c.(*net.TCPConn))
	}
	return all, nil
}

// taken receives what push sends on n connections until the time is over.
func (l *loader) taken(n int) (result, error) {
	all, err := accepted(n)
	defer closeReset(all)
	if err != nil {
		return result{}, err
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

// closeReset closes connections by RST, so that nothing waits for what nobody read.
func closeReset(all []*net.TCPConn) {
	for _, c := range all {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}
