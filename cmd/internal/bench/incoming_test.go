package main

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// bindAt asks for a BIND at a port of the loopback interface and returns where the server listens.
func bindAt(t *testing.T, l *loader, port uint16) (*net.TCPConn, netip.AddrPort) {
	t.Helper()
	c, bound, err := l.request(cmdBind, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(testkit.Patience))
	return c, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), binary.BigEndian.Uint16(bound[len(bound)-2:]))
}

// The server lets in one peer after the other at the same port, while those before are connected, and relays both ways.
func TestBind(t *testing.T) {
	l := &loader{proxy: listen(t, func(c *net.TCPConn) { defer c.Close(); _ = serveSOCKS(c, netip.Addr{}) })}
	var port uint16
	for range 3 {
		c, at := bindAt(t, l, port)
		if port != 0 && at.Port() != port {
			t.Fatalf("the server listens at %v, and was asked for port %d", at, port)
		}
		port = at.Port()
		d, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		over := make(chan struct{})
		go func() { serveWork(d.(*net.TCPConn)); close(over) }()
		t.Cleanup(func() { d.Close(); <-over })
		peer, err := readReply(c)
		if err != nil || binary.BigEndian.Uint16(peer[len(peer)-2:]) != d.LocalAddr().(*net.TCPAddr).AddrPort().Port() {
			t.Fatalf("the peer is %v, want %v: %v", peer, d.LocalAddr(), err)
		}
		got := make([]byte, pingSize)
		if _, err = c.Write(append([]byte{workPing}, got...)); err == nil {
			_, err = io.ReadFull(c, got)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A BIND ends with its client, so that the port is free for the next one.
func TestBindEndsWithItsClient(t *testing.T) {
	l := &loader{proxy: listen(t, func(c *net.TCPConn) { defer c.Close(); _ = serveSOCKS(c, netip.Addr{}) })}
	c, at := bindAt(t, l, 0)
	c.Close()
	testkit.Eventually(t, "the end of the listener", func() bool {
		in, err := net.Listen("tcp4", at.String())
		if err == nil {
			in.Close()
		}
		return err == nil
	})
}

// A case of bulk takes the connections that peers made, in place of new ones.
func TestFromPeers(t *testing.T) {
	at := listen(t, serveWork)
	l := &loader{seconds: 50 * time.Millisecond, peers: make(chan *net.TCPConn, 2)}
	for range 2 {
		c, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		l.peers <- c.(*net.TCPConn)
	}
	if r, err := l.bulk(1, 1); err != nil || r.Work == 0 || len(l.peers) != 0 {
		t.Errorf("%+v, %v, and %d are left", r, err, len(l.peers))
	}
}
