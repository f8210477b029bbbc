package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A group asks the next server if one does not know BIND, and this says nothing against the first one's CONNECT.
func TestGroupBind(t *testing.T) {
	d, _, first := setup(t, Options{})
	second, err := sockstest.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.Close() })
	l := on(d)
	g, err := d.Group(l, []Server{mustServer(t, first.URL()), mustServer(t, second.URL())}, GroupOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	ask := func() (netip.AddrPort, chan bindResult) {
		at, done := make(chan netip.AddrPort, 1), make(chan bindResult, 1)
		g.Bind(context.Background(), l, Addr{IP: netip.IPv4Unspecified()}, time.Minute, func(a netip.AddrPort) { at <- a },
			func(fd int, peer netip.AddrPort, err error) { done <- bindResult{fd, peer, err} })
		select {
		case a := <-at:
			return a, done
		case r := <-done:
			done <- r
		case <-time.After(testkit.Patience):
			t.Fatal("neither bound nor done")
		}
		return netip.AddrPort{}, done
	}
	first.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Cmd == sockstest.CmdBind {
			return sockstest.Reply(7)
		}
		return sockstest.Fault{}
	})
	at, done := ask()
	peer, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	r := wait(t, done)
	if r.err != nil || r.peer.String() != peer.LocalAddr().String() {
		t.Fatalf("%+v", r)
	}
	conn(t, r.fd).Close()
	g.mu.Lock()
	if h := &g.c.servers[0]; !h.canDo(connect4, d.now()) || h.canDo(binds, d.now()) {
		t.Error("reply 7 to BIND was remembered for the wrong command")
	}
	g.mu.Unlock()
	for _, s := range []*sockstest.Server{first, second} {
		s.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(7) })
	}
	if _, done := ask(); !errors.Is(wait(t, done).err, ReplyCommandNotSupported) {
		t.Error("no server knows BIND, and the error is another one")
	}
}
