package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A crowd is many addresses that are in use while a case is measured, each by an idle connection or a UDP flow. All
// of them are a single far end, which answers at every address of two networks that scripts/bench.sh routes to it, on
// a separate port.
var (
	crowd4 = netip.MustParsePrefix("10.9.0.0/16")
	crowd6 = netip.MustParsePrefix("2001:db8:9::/112")
)

const (
	crowdPort    = 8999
	crowdMost    = 20000 // addresses held
	crowdSockets = 2000  // UDP sockets that use them: the SOCKS server needs three descriptors for each
)

// crowd provides a new address for each connection and socket.
type crowd struct {
	v6   bool
	next atomic.Uint32
}

// to returns the destination of the next connection or socket.
func (l *loader) to() netip.AddrPort {
	if l.crowd == nil {
		return l.target
	}
	return netip.AddrPortFrom(nth(l.crowd.next.Add(1), crowd4, crowd6, l.crowd.v6), crowdPort)
}

// nth returns address i of one of two networks, both of 16 bits. The first 256 and the last are left out: the numbers
// wrap before the network does.
func nth(i uint32, net4, net6 netip.Prefix, v6 bool) netip.Addr {
	i = 256 + i%(1<<16-512)
	if v6 {
		a := net6.Addr().As16()
		a[14], a[15] = byte(i>>8), byte(i)
		return netip.AddrFrom16(a)
	}
	a := net4.Addr().As4()
	a[2], a[3] = byte(i>>8), byte(i)
	return netip.AddrFrom4(a)
}

// hold uses n addresses for the case: by TCP, or by UDP if the case is one of UDP. release ends that.
func (l *loader) hold(n int, name string) (release func(), err error) {
	var held []io.Closer
	release = func() {
		for _, c := range held {
			c.Close()
		}
	}
	if strings.HasPrefix(name, "udp") {
		held, err = l.holdUDP(n)
	} else {
		held, err = l.holdTCP(n)
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("cannot hold %d addresses: %w", n, err)
	}
	if n > 0 {
		time.Sleep(time.Second) // until the work of opening is done
	}
	return release, nil
}

const holders = 32 // at once

func (l *loader) holdTCP(n int) ([]io.Closer, error) {
	made := make(chan io.Closer, n)
	err := together(holders, func(i int) error {
		for ; i < n; i += holders {
			c, err := l.dial()
			if err != nil {
				return err
			}
			made <- c
			// They end by RST. In TIME_WAIT they would keep their ports for a minute, and with twice 9,000 used ports
			// the kernel searches so long for a free one that a connection costs six times as much.
			if err := c.SetLinger(0); err != nil {
				return err
			}
			if _, err := c.Write([]byte{workPing}); err != nil {
				return err
			}
		}
		return nil
	})
	return drained(made), err
}

func (l *loader) holdUDP(n int) ([]io.Closer, error) {
	made := make(chan io.Closer, crowdSockets)
	err := together(holders, func(i int) error {
		for ; i < min(n, crowdSockets); i += holders {
			d, err := l.openSwarm()
			if err != nil {
				return err
			}
			made <- d
			for left := n/crowdSockets + 1; left > 0; left-- {
				if err := d.askOnce(l.to()); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return drained(made), err
}

func drained(made chan io.Closer) (held []io.Closer) {
	close(made)
	for c := range made {
		held = append(held, c)
	}
	return held
}

// newSockets is conns for UDP: each socket asks one address once.
func (l *loader) newSockets() (result, error) {
	var took []time.Duration
	end := time.Now().Add(l.seconds)
	for time.Now().Before(end) {
		start := time.Now()
		d, err := l.openSwarm()
		if err != nil {
			return result{}, err
		}
		err = d.askOnce(l.to())
		d.Close()
		if err != nil {
			return result{}, err
		}
		took = append(took, time.Since(start))
	}
	return rate([][]time.Duration{took}, l.seconds, "sock/s"), nil
}

// askOnce waits for one answer, and repeats the question a few times.
func (d *dgram) askOnce(to netip.AddrPort) error {
	out := append(d.headFor(to), dgramEcho)
	if d.control != nil {
		to = d.relay
	}
	in := make([]byte, 64)
	for range 10 {
		if _, err := d.WriteToUDPAddrPort(out, to); err != nil {
			return err
		}
		_ = d.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := d.Read(in); err == nil && n == len(out) {
			return nil
		}
	}
	return fmt.Errorf("%v does not answer", to)
}

// serveCrowd is the far end of a crowd. It answers from the address that was asked.
func serveCrowd() error {
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), crowdPort)
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		l.Close()
		return err
	}
	raw, err := u.SyscallConn()
	if err == nil {
		var opts error
		err = raw.Control(func(fd uintptr) {
			opts = cmp.Or(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1))
		})
		err = errors.Join(err, opts)
	}
	if err != nil {
		l.Close()
		u.Close()
		return err
	}
	go echoFromAsked(u)
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go serveWork(c)
		}
	}()
	return nil
}

func echoFromAsked(u *net.UDPConn) {
	_ = u.SetReadBuffer(8 << 20)
	b, oob := make([]byte, 2048), make([]byte, 128)
	for {
		n, m, _, from, err := u.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		_, _, _ = u.WriteMsgUDPAddrPort(b[:n], oob[:m], from)
	}
}
