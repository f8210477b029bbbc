package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"time"
)

// dgram is a UDP socket to the target, directly or by the generator's own association.
type dgram struct {
	*net.UDPConn
	control *net.TCPConn // nil: directly
	head    []byte       // precedes each datagram
	relay   netip.AddrPort
}

func (l *loader) openUDP() (*dgram, error) {
	d := &dgram{}
	to := l.to()
	if l.proxy.IsValid() {
		c, bnd, err := l.request(cmdUDP, to)
		if err != nil {
			return nil, err
		}
		d.control = c
		d.head = d.headFor(to)
		ip, _ := netip.AddrFromSlice(bnd[:len(bnd)-2])
		to = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(bnd[len(bnd)-2:]))
	}
	u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	_ = u.SetReadBuffer(4 << 20)
	_ = u.SetWriteBuffer(4 << 20)
	d.UDPConn = u
	return d, nil
}

// headFor returns what precedes a datagram to an address.
func (d *dgram) headFor(to netip.AddrPort) []byte {
	if d.control == nil {
		return nil
	}
	return appendAddr([]byte{0, 0, 0}, to)
}

// Close also ends the association.
func (d *dgram) Close() (err error) {
	if d.UDPConn != nil {
		err = d.UDPConn.Close()
	}
	if d.control != nil {
		err = errors.Join(err, d.control.Close())
	}
	return err
}

// echoes does round trips of size bytes on each of n sockets. A lost datagram costs 200 ms and is repeated.
func (l *loader) echoes(n, size int) (result, error) {
	took := make([][]time.Duration, n)
	end := time.Now().Add(l.seconds)
	err := together(n, func(i int) error {
		d, err := l.openUDP()
		if err != nil {
			return err
		}
		defer d.Close()
		out := append([]byte{}, d.head...)
		out = append(out, dgramEcho)
		out = append(out, make([]byte, size-1)...)
		in := make([]byte, 65536)
		lost := 0
		for time.Now().Before(end) {
			start := time.Now()
			if _, err := d.Write(out); err != nil {
				return err
			}
			_ = d.SetReadDeadline(start.Add(200 * time.Millisecond))
			m, err := d.Read(in)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if lost++; lost > 50 {
					return fmt.Errorf("socket %d: over 50 datagrams lost", i)
				}
				continue
			}
			if err != nil {
				return err
			}
			if m != len(out) {
				return fmt.Errorf("an echo of %d bytes came back as %d", len(out), m)
			}
			took[i] = append(took[i], time.Since(start))
		}
		return nil
	})
	return rate(took, l.seconds, "rt/s"), err
}

// swarm is one socket that asks n peers repeatedly, with a window of 64 questions, like a DHT node. The result is
// answers per second, by true source.
func (l *loader) swarm(n int) (result, error) {
	d, err := l.openSwarm()
	if err != nil {
		return result{}, err
	}
	defer d.Close()
	w := swarm{l: l, d: d, n: n, out: append(append([]byte{}, d.head...), make([]byte, 100)...)}
	if err := w.askMany(); err != nil {
		return result{}, err
	}
	in := make([]byte, 65536)
	for end := time.Now().Add(l.seconds); time.Now().Before(end); {
		_ = d.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		m, from, err := d.ReadFromUDPAddrPort(in)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.lost++ // a window of questions, or part of it
			err = w.askMany()
		case err == nil:
			w.answered(in[:m], from)
			err = w.ask()
		}
		if err != nil {
			return result{}, err
		}
	}
	if w.wrong > 0 || w.lost > 20 {
		return result{}, fmt.Errorf("%d answers from elsewhere, %d stalls", w.wrong, w.lost)
	}
	return result{
		Value:   float64(w.answers) / l.seconds.Seconds(),
		Unit:    "rt/s",
		Work:    float64(w.answers),
		Seconds: l.seconds.Seconds(),
	}, nil
}

// swarm asks n ports of the target in turn, from one socket.
type swarm struct {
	l   *loader
	d   *dgram
	n   int
	out []byte // the question, behind a header if there is one

	asked, answers, lost, wrong int
}

func (w *swarm) ask() error {
	to := netip.AddrPortFrom(w.l.target.Addr(), w.l.target.Port()+1+uint16(w.asked%w.n))
	w.asked++
	if w.d.control != nil {
		binary.BigEndian.PutUint16(w.out[len(w.d.head)-2:], to.Port())
		to = w.d.relay
	}
	_, err := w.d.WriteToUDPAddrPort(w.out, to)
	return err
}

// askMany asks a window of questions.
func (w *swarm) askMany() error {
	for range 64 {
		if err := w.ask(); err != nil {
			return err
		}
	}
	return nil
}

func (w *swarm) answered(b []byte, from netip.AddrPort) {
	if w.d.control != nil && len(b) >= len(w.d.head) {
		from = netip.AddrPortFrom(w.l.target.Addr(), binary.BigEndian.Uint16(b[len(w.d.head)-2:]))
	}
	if p, port := from.Port(), w.l.target.Port(); p <= port || p > port+uint16(w.n) {
		w.wrong++
	}
	w.answers++
}

// openSwarm is openUDP with an unconnected socket.
func (l *loader) openSwarm() (*dgram, error) {
	d, err := l.openUDP()
	if err != nil {
		return nil, err
	}
	d.relay = d.RemoteAddr().(*net.UDPAddr).AddrPort()
	d.UDPConn.Close() // not the association
	d.UDPConn, err = net.ListenUDP("udp", nil)
	if err != nil {
		d.UDPConn = nil
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

const floodSize = 1200

// floodUp sends as fast as possible. The result is what the far end counted.
func (l *loader) floodUp() (result, error) {
	d, err := l.openUDP()
	if err != nil {
		return result{}, err
	}
	defer d.Close()
	out := append(append([]byte{}, d.head...), make([]byte, floodSize)...)
	out[len(d.head)] = dgramSink
	end := time.Now().Add(l.seconds)
	for time.Now().Before(end) {
		for range 64 {
			_, _ = d.Write(out)
		}
	}
	time.Sleep(300 * time.Millisecond) // until what is queued has arrived
	n, err := l.count(d)
	return result{Value: n / l.seconds.Seconds(), Unit: "dgram/s", Work: n, Seconds: l.seconds.Seconds()}, err
}

// pingsBesideFlood lets twenty sockets ask 100 times a second each, while another process floods. A question without
// an answer after 200 ms is lost. The result is the number of answers, at most 2,000. They ask a peer's port, because
// the flood's own is busy.
func (l *loader) pingsBesideFlood() (result, error) {
	args := []string{"load", "--case", "floodup", "--time", (l.seconds + time.Second).String(), "--target", l.target.String()}
	if l.proxy.IsValid() {
		args = append(args, "--proxy", l.proxy.String())
	}
	flood := exec.Command("/proc/self/exe", args...)
	flood.Stderr = os.Stderr
	if err := flood.Start(); err != nil {
		return result{}, err
	}
	defer flood.Wait()
	time.Sleep(500 * time.Millisecond)
	peer := *l
	peer.target = netip.AddrPortFrom(l.target.Addr(), l.target.Port()+1)
	const sockets = 20
	took := make([][]time.Duration, sockets)
	end := time.Now().Add(l.seconds)
	err := together(sockets, func(i int) error {
		d, err := peer.openUDP()
		if err != nil {
			return err
		}
		defer d.Close()
		out, in := append([]byte{}, d.head...), make([]byte, 65536)
		out = append(out, make([]byte, 100)...)
		n := byte(0)
		for time.Now().Before(end) {
			start := time.Now()
			n++
			out[len(out)-1] = n
			if _, err := d.Write(out); err != nil {
				return err
			}
			_ = d.SetReadDeadline(start.Add(200 * time.Millisecond))
			for {
				m, err := d.Read(in)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err != nil {
					return err
				}
				if m == len(out) && in[m-1] == n {
					took[i] = append(took[i], time.Since(start))
					break
				}
			}
			time.Sleep(10*time.Millisecond - time.Since(start))
		}
		return nil
	})
	r := rate(took, l.seconds, "rt/s")
	r.Work = 0 // the cost of a round trip cannot be separated from that of the flood
	return r, err
}

func (l *loader) count(d *dgram) (float64, error) {
	in := make([]byte, 65536)
	for range 10 {
		if _, err := d.Write(append(append([]byte{}, d.head...), dgramCount)); err != nil {
			return 0, err
		}
		_ = d.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := d.Read(in); err == nil && n == len(d.head)+8 {
			return float64(binary.BigEndian.Uint64(in[len(d.head):n])), nil
		}
	}
	return 0, errors.New("the far end does not answer with its count")
}

// floodDown asks the far end to flood. The result is what arrives here.
func (l *loader) floodDown() (result, error) {
	d, err := l.openUDP()
	if err != nil {
		return result{}, err
	}
	defer d.Close()
	ask := append([]byte{}, d.head...)
	ask = append(ask, dgramFlood)
	ask = binary.BigEndian.AppendUint16(ask, floodSize)
	ask = binary.BigEndian.AppendUint16(ask, uint16(l.seconds.Milliseconds()))
	if _, err := d.Write(ask); err != nil {
		return result{}, err
	}
	in := make([]byte, 65536)
	var n float64
	_ = d.SetReadDeadline(time.Now().Add(l.seconds + 300*time.Millisecond))
	for {
		if _, err := d.Read(in); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
				break
			}
			return result{}, err
		}
		n++
	}
	return result{Value: n / l.seconds.Seconds(), Unit: "dgram/s", Work: n, Seconds: l.seconds.Seconds()}, nil
}
