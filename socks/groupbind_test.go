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
	if h := &g.c.servers[0]; !h.canDo(connect4, d.now()) || h.canDo(binds4, d.now()) || h.canDo(binds6, d.now()) {
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

// A server that knows BIND for IPv4 only is still asked for it after it has refused one for IPv6.
func TestBindKinds(t *testing.T) {
	v4, v6 := Addr{IP: netip.IPv4Unspecified()}, Addr{IP: netip.IPv6Unspecified()}
	for _, c := range []struct {
		asked      Addr
		reply      Reply
		has4, has6 bool
	}{
		{v6, ReplyAddrTypeNotSupported, true, false}, {v4, ReplyAddrTypeNotSupported, false, true},
		{v6, ReplyCommandNotSupported, false, false}, {v4, ReplyCommandNotSupported, false, false},
	} {
		var h health
		h.cannot(kindOf(CmdBind, c.asked), c.reply, 1)
		if has4, has6 := h.canDo(kindOf(CmdBind, v4), 2), h.canDo(kindOf(CmdBind, v6), 2); has4 != c.has4 || has6 != c.has6 {
			t.Errorf("after %v to %v: %v, %v", c.reply, c.asked, has4, has6)
		}
		if !h.canDo(connect6, 2) {
			t.Error("CONNECT is not asked")
		}
	}
}
