package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// fromPeers is bulk on connections that peers made: 'bench push --serve' connects to the port that the SOCKS server opens by
// BIND. Natively the generator asks for BIND itself; otherwise viasocks does. The connections are there before the time begins.
func (l *loader) fromPeers(down, up int) (result, error) {
	var all []*net.TCPConn
	var err error
	if l.proxy.IsValid() {
		all, err = l.bound(down + up)
	} else {
		all, err = accepted(down + up)
	}
	defer closeReset(all)
	if err != nil {
		return result{}, err
	}
	l.peers = make(chan *net.TCPConn, len(all))
	for _, c := range all {
		l.peers <- c
	}
	before := cpuSeconds(l.watch)
	r, err := l.bulk(down, up)
	r.CPU, r.ownCPU = cpuSeconds(l.watch)-before, true
	return r, err
}

// bound asks the server n times to listen, one after the other at one port, and returns the connections of the peers.
func (l *loader) bound(n int) (all []*net.TCPConn, err error) {
	for range n {
		c, _, err := l.request(cmdBind, netip.AddrPortFrom(netip.IPv4Unspecified(), inPort))
		if err != nil {
			return all, err
		}
		all = append(all, c)
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := readReply(c); err != nil {
			return all, fmt.Errorf("no peer comes: is 'bench push' running?: %w", err)
		}
		_ = c.SetDeadline(time.Time{})
	}
	return all, nil
}

// readReply reads a reply of a SOCKS5 server and returns the bytes of BND.ADDR. The error is a socksReply if the server refuses.
func readReply(c io.Reader) ([]byte, error) {
	var b [22]byte
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return nil, err
	}
	n := 10
	if b[3] == 4 {
		n = 22
	}
	if _, err := io.ReadFull(c, b[4:n]); err != nil {
		return nil, err
	}
	if b[1] != 0 {
		return nil, socksReply(b[1])
	}
	return b[4:n], nil
}
