package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// dial connects to the target, directly or by the generator's own SOCKS5 handshake, or takes the connection of a peer.
func (l *loader) dial() (*net.TCPConn, error) {
	if l.peers != nil {
		return <-l.peers, nil
	}
	if !l.proxy.IsValid() {
		to := l.to().String()
		if l.under != "" {
			to = fmt.Sprintf("host-%d.%s:%d", named.Add(1), l.under, l.target.Port())
		}
		c, err := net.DialTimeout("tcp", to, 20*time.Second)
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	}
	c, _, err := l.request(cmdConnect, l.to())
	return c, err
}

// socksReply is a refusal of a SOCKS5 server.
type socksReply byte

func (r socksReply) Error() string { return fmt.Sprintf("the SOCKS server answers %d", byte(r)) }

// request does a handshake with the SOCKS5 server and returns the bytes of BND.ADDR.
func (l *loader) request(cmd byte, to netip.AddrPort) (*net.TCPConn, []byte, error) {
	return l.requestFor(cmd, to, 20*time.Second)
}

// requestFor is request with a time limit. The error is a socksReply if the server refuses.
func (l *loader) requestFor(cmd byte, to netip.AddrPort, patience time.Duration) (*net.TCPConn, []byte, error) {
	end := time.Now().Add(patience)
	d, err := net.DialTimeout("tcp", l.proxy.String(), patience)
	if err != nil {
		return nil, nil, err
	}
	c := d.(*net.TCPConn)
	_ = c.SetDeadline(end)
	var b [2]byte
	if _, err = c.Write([]byte{5, 1, 0}); err == nil {
		_, err = io.ReadFull(c, b[:])
	}
	var bound []byte
	if err == nil {
		if _, err = c.Write(appendAddr([]byte{5, cmd, 0}, to)); err == nil {
			bound, err = readReply(c)
		}
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	_ = c.SetDeadline(time.Time{})
	return c, bound, nil
}

// appendAddr appends an address in the form of SOCKS5.
func appendAddr(b []byte, a netip.AddrPort) []byte {
	kind := byte(1)
	if a.Addr().Is6() {
		kind = 4
	}
	b = append(append(b, kind), a.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// bulk moves bytes over down and up concurrent connections until the time is over.
func (l *loader) bulk(down, up int) (result, error) {
	var total atomic.Uint64
	end := time.Now().Add(l.seconds)
	err := together(down+up, func(i int) error {
		c, err := l.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		if i < down {
			n, err := l.download(c, end)
			total.Add(n)
			return err
		}
		n, err := l.upload(c, end)
		total.Add(n)
		return err
	})
	seconds := l.seconds.Seconds()
	if late := time.Since(end); late > 0 {
		seconds += late.Seconds() // what was in transit at the end counts with its time
	}
	n := float64(total.Load())
	return result{Value: n * 8 / seconds / 1e9, Unit: "Gbit/s", Work: n, Seconds: seconds}, err
}

func (l *loader) download(c *net.TCPConn, end time.Time) (n uint64, err error) {
	// This is more than can arrive; the reader ends it.
	if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{workDown}, 1<<40)); err != nil {
		return 0, err
	}
	p := chunks.Get().(*[]byte)
	defer chunks.Put(p)
	for time.Now().Before(end) {
		m, err := c.Read(*p)
		n += uint64(m)
		if err != nil {
			return n, fmt.Errorf("the download ended: %w", err)
		}
	}
	return n, c.SetLinger(0)
}

func (l *loader) upload(c *net.TCPConn, end time.Time) (uint64, error) {
	if _, err := c.Write([]byte{workUp}); err != nil {
		return 0, err
	}
	for time.Now().Before(end) {
		if _, err := c.Write(zeros); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	// Only what arrived counts.
	var b [8]byte
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, fmt.Errorf("cannot read the count: %w", err)
	}
	return binary.BigEndian.Uint64(b[:]), nil
}

// conns opens connections one after the other in each of clients, reads one byte from each and closes it.
func (l *loader) conns(clients int) (result, error) {
	took := make([][]time.Duration, clients)
	end := time.Now().Add(l.seconds)
	err := together(clients, func(i int) error {
		for time.Now().Before(end) {
			start := time.Now()
			if err := l.one(); err != nil {
				return err
			}
			took[i] = append(took[i], time.Since(start))
		}
		return nil
	})
	return rate(took, l.seconds, "conn/s"), err
}

// one opens a connection, receives one byte and closes it.
func (l *loader) one() error {
	c, err := l.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	var b [1]byte
	if _, err = c.Write([]byte{workOne}); err == nil {
		_, err = io.ReadFull(c, b[:])
	}
	return err
}

func rate(took [][]time.Duration, over time.Duration, unit string) result {
	var all []time.Duration
	for _, t := range took {
		all = append(all, t...)
	}
	r := result{Value: float64(len(all)) / over.Seconds(), Unit: unit, Work: float64(len(all)), Seconds: over.Seconds()}
	r.P50us, r.P99us = percentiles(all)
	return r
}

// ping does 64-byte round trips on each of n connections.
func (l *loader) ping(n int) (result, error) {
	took := make([][]time.Duration, n)
	end := time.Now().Add(l.seconds)
	err := together(n, func(i int) error {
		c, err := l.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte{workPing}); err != nil {
			return err
		}
		b := make([]byte, pingSize)
		for time.Now().Before(end) {
			start := time.Now()
			if _, err := c.Write(b); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
			took[i] = append(took[i], time.Since(start))
		}
		return nil
	})
	return rate(took, l.seconds, "rt/s"), err
}

// pingBesideBulk measures the latency of one connection beside eight downloads.
func (l *loader) pingBesideBulk() (result, error) {
	var r result
	bulk := make(chan error, 1)
	go func() {
		_, err := (&loader{proxy: l.proxy, target: l.target, seconds: l.seconds + time.Second, crowd: l.crowd}).bulk(8, 0)
		bulk <- err
	}()
	time.Sleep(500 * time.Millisecond) // until the eight are in progress
	r, err := l.ping(1)
	return r, errors.Join(err, <-bulk)
}

// idle opens n connections that do nothing and holds them for a while. The result is the watched process's memory.
func (l *loader) idle(n int) (result, error) {
	held := make([]*net.TCPConn, n)
	const dialers = 32
	err := together(dialers, func(d int) error {
		for i := d; i < n; i += dialers {
			c, err := l.dial()
			if err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
			held[i] = c
			if _, err := c.Write([]byte{workPing}); err != nil {
				return err
			}
		}
		return nil
	})
	time.Sleep(l.seconds)
	for _, c := range held {
		if c != nil {
			defer c.Close()
		}
	}
	return result{Value: float64(n), Unit: "conns", Work: float64(n)}, err
}
