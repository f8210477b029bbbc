package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"net"
	"sync"
	"time"
)

// The far end's protocol: one byte that names the work, then the work.
const (
	workDown = 'D' // then 8 bytes: how many bytes to send, followed by FIN
	workUp   = 'U' // reads to FIN, then sends 8 bytes: how many arrived
	workPing = 'P' // echoes 64-byte messages to FIN
	workOne  = 'C' // sends one byte and FIN, for the cost of a connection
	workKB   = 'K' // sends 1,024 bytes and FIN
)

const (
	chunk    = 256 << 10 // bytes in one read or write
	pingSize = 64
)

func worldMain(args []string) error {
	fs := flag.NewFlagSet("world", flag.ExitOnError)
	listen := fs.String("listen", "", "address and port, TCP and UDP")
	peers := fs.Int("peers", 0, "how many UDP sockets besides, on the ports that follow: a swarm")
	fs.Parse(args)
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket("udp", *listen)
	if err != nil {
		return err
	}
	go serveDatagrams(u.(*net.UDPConn))
	if err := serveCrowd(); err != nil {
		return err
	}
	first := u.LocalAddr().(*net.UDPAddr)
	for i := range min(max(*peers, 0), 10000) {
		p, err := net.ListenUDP("udp", &net.UDPAddr{IP: first.IP, Port: first.Port + 1 + i})
		if err != nil {
			return err
		}
		go echoDatagrams(p)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go serveWork(c.(*net.TCPConn))
	}
}

var zeros = make([]byte, chunk)

var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

func serveWork(c *net.TCPConn) {
	defer c.Close()
	var head [9]byte
	if _, err := io.ReadFull(c, head[:1]); err != nil {
		return
	}
	switch head[0] {
	case workDown:
		if _, err := io.ReadFull(c, head[1:]); err != nil {
			return
		}
		_ = sendZeros(c, binary.BigEndian.Uint64(head[1:]))
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	case workUp:
		n, err := drain(c)
		if err != nil {
			return
		}
		_, _ = c.Write(binary.BigEndian.AppendUint64(nil, n))
	case workPing:
		b := make([]byte, pingSize)
		for {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	case workOne:
		_, _ = c.Write([]byte{1})
	case workKB:
		_, _ = c.Write(zeros[:churnSize])
	}
}

func sendZeros(w io.Writer, n uint64) error {
	for n > 0 {
		m, err := w.Write(zeros[:min(n, chunk)])
		n -= uint64(m)
		if err != nil {
			return err
		}
	}
	return nil
}

// drain reads to FIN in large reads and discards the bytes.
func drain(r io.Reader) (n uint64, err error) {
	p := chunks.Get().(*[]byte)
	defer chunks.Put(p)
	for {
		m, err := r.Read(*p)
		n += uint64(m)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// Datagrams: the first byte names the work, as above. An echo is returned whole.
const (
	dgramEcho  = 'e' // sent back
	dgramSink  = 's' // counted
	dgramCount = 'c' // answered by 8 bytes: how many were counted since the last question
	dgramFlood = 'f' // then size (2 bytes) and milliseconds (2 bytes): a flood back for that time
)

func serveDatagrams(u *net.UDPConn) {
	_ = u.SetReadBuffer(8 << 20)
	_ = u.SetWriteBuffer(4 << 20)
	b := make([]byte, 65536)
	var sunk uint64
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if n == 0 {
			continue
		}
		switch b[0] {
		case dgramEcho:
			_, _ = u.WriteToUDPAddrPort(b[:n], from)
		case dgramSink:
			sunk++
		case dgramCount:
			_, _ = u.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, sunk), from)
			sunk = 0
		case dgramFlood:
			if n < 5 {
				continue
			}
			size := min(int(binary.BigEndian.Uint16(b[1:])), chunk)
			until := time.Now().Add(min(time.Duration(binary.BigEndian.Uint16(b[3:]))*time.Millisecond, 10*time.Second))
			go func() {
				for time.Now().Before(until) {
					for range 64 {
						_, _ = u.WriteToUDPAddrPort(zeros[:size], from)
					}
				}
			}()
		}
	}
}

// echoDatagrams is a peer of a swarm.
func echoDatagrams(u *net.UDPConn) {
	b := make([]byte, 2048)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = u.WriteToUDPAddrPort(b[:n], from)
	}
}
