package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A scan tries many addresses, each once. One in eight is open, one in eight is silent, and the others refuse. Those
// that are open or refuse are addresses of a crowd, at the port where it answers or at one where it does not listen.
// scripts/bench.sh makes the far end drop packets to the networks of the silent ones.
var (
	silent4 = netip.MustParsePrefix("10.10.0.0/16")
	silent6 = netip.MustParsePrefix("2001:db8:a::/112")
)

const (
	scanCount    = 20000                  // attempts, each to a different address
	scanners     = 256                    // concurrent attempts
	scanPatience = 400 * time.Millisecond // after which an attempt is given up
	scanTimes    = 10                     // the scan ends after this many times --time, finished or not
	scanWrong    = 0.05                   // the share of attempts that may end differently than they should: open, but too late

	refusedPort = crowdPort - 1
)

// outcome is the result of an attempt.
type outcome int

const (
	isOpen outcome = iota
	isRefused
	isSilent
	isOther
)

// scanned returns the destination of attempt i, and its expected result.
func scanned(i int, v6 bool) (to netip.AddrPort, want outcome) {
	net4, net6, port := crowd4, crowd6, uint16(refusedPort)
	want = isRefused
	switch i % 8 {
	case 0:
		want, port = isOpen, crowdPort
	case 4:
		want, net4, net6 = isSilent, silent4, silent6
	}
	return netip.AddrPortFrom(nth(uint32(i), net4, net6, v6), port), want
}

// scan makes the attempts, with as many at a time as there are scanners. The result is how many ended in a second.
// Meanwhile it measures new connections and round trips on an open one, a hundred of each in a second, so that they
// cost little themselves.
func (l *loader) scan() (result, error) {
	v6 := l.crowd != nil && l.crowd.v6
	var next, made, wrong atomic.Int64
	var other atomic.Pointer[error] // the first that is none of the three outcomes
	stop := make(chan struct{})
	beside := make(chan figure, 2)
	errs := make(chan error, 2)
	for _, watch := range []func(<-chan struct{}) (figure, error){l.newBeside, l.pingBeside} {
		go func() {
			f, err := watch(stop)
			beside <- f
			errs <- err
		}()
	}
	start := time.Now()
	end := start.Add(scanTimes * l.seconds)
	_ = together(scanners, func(int) error {
		for time.Now().Before(end) {
			i := int(next.Add(1)) - 1
			if i >= scanCount {
				return nil
			}
			to, want := scanned(i, v6)
			got, err := l.attempt(to, scanPatience)
			made.Add(1)
			if got != want {
				wrong.Add(1)
			}
			if got == isOther {
				other.CompareAndSwap(nil, &err)
			}
		}
		return nil
	})
	seconds := time.Since(start).Seconds()
	close(stop)
	n := float64(made.Load())
	r := result{Value: n / seconds, Unit: "try/s", Work: n, Seconds: seconds}
	r.Beside = []figure{<-beside, <-beside, {Name: "attempts with a wrong outcome", Value: float64(wrong.Load())}}
	err := errors.Join(<-errs, <-errs)
	if float64(wrong.Load()) > scanWrong*n {
		err = errors.Join(err, fmt.Errorf("%d of %.0f attempts ended otherwise than they should", wrong.Load(), n))
		if e := other.Load(); e != nil {
			err = errors.Join(err, *e)
		}
	}
	return r, err
}

// attempt connects to an address within a time limit, and closes the connection at once.
func (l *loader) attempt(to netip.AddrPort, patience time.Duration) (outcome, error) {
	var c *net.TCPConn
	var err error
	if l.proxy.IsValid() {
		c, _, err = l.requestFor(cmdConnect, to, patience)
	} else {
		var d net.Conn
		if d, err = net.DialTimeout("tcp", to.String(), patience); err == nil {
			c = d.(*net.TCPConn)
		}
	}
	var late net.Error
	var reply socksReply
	switch {
	case err == nil:
		_ = c.SetLinger(0) // no TIME_WAIT: see holdTCP
		return isOpen, c.Close()
	case errors.Is(err, unix.ECONNREFUSED), errors.As(err, &reply) && reply == 5:
		return isRefused, nil
	case errors.As(err, &late) && late.Timeout():
		return isSilent, nil
	}
	return isOther, err
}

// besideEvery is the interval of additional measurements.
const besideEvery = 10 * time.Millisecond

// newBeside opens a connection at each step, reads one byte from it and closes it.
func (l *loader) newBeside(stop <-chan struct{}) (figure, error) {
	took, err := paced(stop, besideEvery, l.one)
	return spread("new connection", took), err
}

// pingBeside does one round trip at each step, on one connection.
func (l *loader) pingBeside(stop <-chan struct{}) (figure, error) {
	c, err := l.dial()
	if err != nil {
		return figure{}, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{workPing}); err != nil {
		return figure{}, err
	}
	b := make([]byte, pingSize)
	took, err := paced(stop, besideEvery, func() error {
		if _, err := c.Write(b); err != nil {
			return err
		}
		_, err := io.ReadFull(c, b)
		return err
	})
	return spread("round trip", took), err
}

// paced does the work at intervals, one after the other, until stop is closed. If it takes longer than a step, the
// next is delayed.
func paced(stop <-chan struct{}, every time.Duration, work func() error) (took []time.Duration, err error) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return took, nil
		case <-t.C:
		}
		start := time.Now()
		if err := work(); err != nil {
			return took, err
		}
		took = append(took, time.Since(start))
	}
}
