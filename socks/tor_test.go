package socks

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestTorResolve(t *testing.T) {
	ip := netip.MustParseAddr("203.0.113.9")
	d, plain, srv := setup(t, Options{}, sockstest.WithTor(map[netip.Addr]string{ip: "host.example"}),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name == "host.example" {
				return ip, nil
			}
			return netip.Addr{}, errors.New("no such name")
		}))
	c := d.Client(mustServer(t, srv.URL()+"?tor"))
	type answer struct {
		ip   netip.Addr
		name string
		err  error
	}
	ask := func(c *Client, name string, of netip.Addr) answer {
		ch := make(chan answer, 2)
		if name != "" {
			c.Resolve(context.Background(), on(c.d), name, func(ip netip.Addr, err error) { ch <- answer{ip: ip, err: err} })
		} else {
			c.ResolvePTR(context.Background(), on(c.d), of, func(name string, err error) { ch <- answer{name: name, err: err} })
		}
		select {
		case a := <-ch:
			return a
		case <-time.After(testkit.Patience):
			t.Fatal("done is not called")
			return answer{}
		}
	}
	if a := ask(c, "host.example", ip); a.err != nil || a.ip != ip {
		t.Errorf("RESOLVE: %+v", a)
	}
	if a := ask(c, "", ip); a.err != nil || a.name != "host.example" {
		t.Errorf("RESOLVE_PTR: %+v", a)
	}
	if a := ask(c, "other.example", ip); !errors.Is(a.err, ReplyHostUnreachable) {
		t.Errorf("no such name: %+v", a)
	}
	if a := ask(plain, "host.example", ip); !errors.Is(a.err, ErrCannotExpress) {
		t.Errorf("not Tor: %+v", a)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.LongName() })
	if a := ask(c, "host.example", ip); !errors.Is(a.err, ErrMalformed) || a.ip.IsValid() {
		t.Errorf("a name for an address: %+v", a)
	}
	srv.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(0xf0) })
	if _, err := connect(t, c, context.Background(), Addr{Name: "x.onion", Port: 80}); !errors.Is(err, ReplyOnionNotFound) ||
		!strings.Contains(err.Error(), "F0 (onion service descriptor not found)") {
		t.Errorf("%v", err)
	}
}

func TestReplyPlain(t *testing.T) {
	for r, want := range map[Reply]Reply{
		0: 0, 1: 1, 5: 5, 8: 8, 0x20: 0x20, 0xf0: 4, 0xf1: 4, 0xf2: 4, 0xf3: 4, 0xf4: 2, 0xf5: 2, 0xf6: 4, 0xf7: 4, 0xf8: 0xf8,
	} {
		if got := r.Plain(); got != want {
			t.Errorf("%d: %d, want %d", r, got, want)
		}
	}
}

// Dials share user and password, and so a circuit, as isolate says.
func TestIsolate(t *testing.T) {
	_, _, srv := setup(t, Options{})
	a, b := Addr{Name: "a.example", Port: 80}, Addr{Name: "b.example", Port: 80}
	a443 := Addr{Name: "a.example", Port: 443}
	of := func(query, program string, dst Addr) string {
		p := dial{c: &Client{server: mustServer(t, srv.URL()+query)}, ctx: WithIsolation(context.Background(), program), dst: dst}
		l := p.loginFor()
		if l == nil {
			return ""
		}
		if strings.Contains(l.pass, "example") || len(l.pass) != 32 {
			t.Errorf("password %q", l.pass)
		}
		return l.user + ":" + l.pass
	}
	if of("?tor", "x", a) != "" || of("?tor&isolate=none", "x", a) != "" {
		t.Error("a login without isolation")
	}
	if q := "?tor&isolate=destination"; of(q, "x", a) == of(q, "x", b) || of(q, "x", a) != of(q, "y", a443) {
		t.Error("isolate=destination")
	}
	if q := "?tor&isolate=program"; of(q, "x", a) == of(q, "y", a) || of(q, "x", a) != of(q, "x", b) {
		t.Error("isolate=program")
	}
	for _, bad := range []string{
		"socks5://h?hunter2", "socks5://h?tor=1", "socks5://h?isolate=hunter2&tor", "socks5://h?isolate=destination",
		"socks5://h?tor&tor",
		"socks5://al:x@h?tor&isolate=program", "socks4a://h?tor", "http://h?tor", "socks5://h?%zz", "socks5://h?tor;hunter2",
		"socks5+unix:///s?hunter2",
	} {
		if s, err := ParseServer(bad); err == nil {
			t.Errorf("%s is taken as %v", bad, s)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
	}
	if s, err := ParseServer("socks5+unix:///run/tor/socks?tor&isolate=destination"); err != nil || !s.options.tor {
		t.Errorf("%v", err)
	}
}

// A group asks the servers that are Tors, and the next of them when one does not work.
func TestTorResolveByGroup(t *testing.T) {
	ip := netip.MustParseAddr("203.0.113.9")
	d, _, srv := setup(t, Options{}, sockstest.WithTor(map[netip.Addr]string{ip: "host.example"}),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name != "host.example" {
				return netip.Addr{}, errors.New("no such name")
			}
			return ip, nil
		}))
	plain, dead := mustServer(t, srv.URL()), mustServer(t, "socks5://127.0.0.1:1?tor")
	type answer struct {
		ip   netip.Addr
		name string
		err  error
	}
	ask := func(servers []Server, name string) answer {
		t.Helper()
		g, err := d.Group(on(d), servers, GroupOptions{Name: "g"})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		ch := make(chan answer, 4)
		if name != "" {
			g.Resolve(context.Background(), on(d), name, func(ip netip.Addr, err error) { ch <- answer{ip: ip, err: err} })
		} else {
			g.ResolvePTR(context.Background(), on(d), ip, func(name string, err error) { ch <- answer{name: name, err: err} })
		}
		select {
		case a := <-ch:
			return a
		case <-time.After(testkit.Patience):
			t.Fatal("done is not called")
			return answer{}
		}
	}
	tor := mustServer(t, srv.URL()+"?tor")
	for _, servers := range [][]Server{{tor}, {plain, dead, tor}} {
		if a := ask(servers, "host.example"); a.err != nil || a.ip != ip {
			t.Errorf("RESOLVE: %+v", a)
		}
		if a := ask(servers, ""); a.err != nil || a.name != "host.example" {
			t.Errorf("RESOLVE_PTR: %+v", a)
		}
		if a := ask(servers, "other.example"); !errors.Is(a.err, ReplyHostUnreachable) {
			t.Errorf("no such name: %+v", a)
		}
	}
	if a := ask([]Server{plain}, "host.example"); !errors.Is(a.err, ErrCannotExpress) {
		t.Errorf("no Tor: %+v", a)
	}
	if a := ask([]Server{dead, plain}, "host.example"); a.err == nil || errors.Is(a.err, ErrCannotExpress) {
		t.Errorf("a dead Tor: %+v", a)
	}
}
