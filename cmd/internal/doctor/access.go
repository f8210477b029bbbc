package doctor

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
)

// Limits of the requests to a proxy.
const (
	reachTime  = 5 * time.Second // to reach it
	answerTime = 6 * time.Second // for its answer to a request
	maxServers = 4               // servers that are examined
)

// access knows how to reach the proxies.
type access struct {
	h       *host
	d       *socks.Dialer
	l       *loop.Loop
	ran     sync.WaitGroup
	prepare func(fd int) error // nil: sockets need no mark
	groups  []*socks.Group
	chains  map[string]*socks.Group // by upstream: the groups through which others are reached
}

func (h *host) newAccess() (*access, error) {
	a := &access{h: h, chains: map[string]*socks.Group{}, prepare: h.marker()}
	var err error
	if a.d, err = socks.NewDialer(socks.Options{
		PrepareSocket: a.prepare, Resolve: a.resolve, CanBePeer: flow.CanBePeer, ConnectTimeout: reachTime,
		HandshakeTimeout: answerTime,
	}); err != nil {
		return nil, err
	}
	if a.l, err = loop.New(); err != nil {
		a.d.Close()
		return nil, err
	}
	a.ran.Go(func() { _ = a.l.Run(context.Background()) })
	return a, nil
}

func (a *access) close() {
	for _, g := range a.groups {
		g.Close()
	}
	a.l.Close()
	a.ran.Wait()
	a.d.Close()
}

// marker returns a function that gives sockets the mark of the viasocks that is up. Without the mark, its rules would
// lead them back to viasocks. It is nil if no mark is needed.
func (h *host) marker() func(fd int) error {
	if h.up == nil || !h.root {
		return nil
	}
	text, _, _ := strings.Cut(h.up.Host.Mark, "/")
	mark, err := strconv.ParseUint(text, 0, 32)
	if err != nil {
		return nil
	}
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)) }
}

// resolve looks up a proxy. If a viasocks that is up uses this proxy, that viasocks is asked for the addresses, because
// a resolver would return a fake address.
func (a *access) resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	if a.h.up != nil {
		var out []netip.Addr
		for _, u := range a.h.up.Upstreams {
			if s, err := socks.ParseServer(u.URL); err != nil || s.Host() != name {
				continue
			}
			for _, text := range u.Addresses {
				text, _, _ := strings.Cut(text, "/")
				if at, err := netip.ParseAddrPort(text); err == nil {
					out = append(out, at.Addr())
				}
			}
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	return socks.LookupAddrs(ctx, net.DefaultResolver, name)
}

// proxy is one server that is examined.
type proxy struct {
	a      *access
	server socks.Server
	group  *socks.Group
	via    *socks.Group // nil: it is reached directly
	label  string
}

// proxies returns the servers of all upstreams that are examined. more is the number of those that are not.
func (a *access) proxies() (list []*proxy, more int, err error) {
	for _, u := range a.h.cfg.Upstreams {
		for _, s := range u.Servers() {
			if len(list) == maxServers {
				more++
				continue
			}
			p := &proxy{a: a, server: s, label: "proxy " + s.String()}
			if u.Name != config.DefaultUpstream {
				p.label += " (upstream " + u.Name + ")"
			}
			if u.Via != "" {
				if p.via, err = a.chain(u.Via); err != nil {
					return nil, 0, err
				}
				p.label += ", reached through " + u.Via
			}
			if p.group, err = a.group([]socks.Server{s}, u.Name, p.via); err != nil {
				return nil, 0, err
			}
			list = append(list, p)
		}
	}
	return list, more, nil
}

func (a *access) group(servers []socks.Server, name string, via *socks.Group) (*socks.Group, error) {
	o := socks.GroupOptions{Name: name}
	if via != nil {
		o.Via = via
	}
	g, err := a.d.Group(a.l, servers, o)
	if err == nil {
		a.groups = append(a.groups, g)
	}
	return g, err
}

// chain returns the group of an upstream through which others are reached. The configuration has no cycles.
func (a *access) chain(name string) (g *socks.Group, err error) {
	if g = a.chains[name]; g != nil {
		return g, nil
	}
	for _, u := range a.h.cfg.Upstreams {
		if u.Name != name {
			continue
		}
		var via *socks.Group
		if u.Via != "" {
			if via, err = a.chain(u.Via); err != nil {
				return nil, err
			}
		}
		if g, err = a.group(u.Servers(), name, via); err == nil {
			a.chains[name] = g
		}
		return g, err
	}
	return nil, fmt.Errorf("there is no upstream %s", name)
}

// check logs in without making a request.
func (p *proxy) check(ctx context.Context) error {
	done := make(chan error, 1)
	p.group.Check(ctx, p.a.l, func(errs []error) {
		if len(errs) > 0 {
			done <- errs[0]
			return
		}
		done <- nil
	})
	return <-done
}

// dial connects to the server, with TLS if the server uses it.
func (p *proxy) dial(ctx context.Context) (net.Conn, error) {
	c, err := p.carrier(ctx, nil)
	if err != nil {
		return nil, err
	}
	conf := p.server.TLSConfig()
	if conf == nil {
		return c, nil
	}
	t := tls.Client(c, conf)
	if err := t.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return t, nil
}

// direct reports whether the server is reached by TCP and not through another proxy.
func (p *proxy) direct() bool { return p.via == nil && p.server.Unix() == "" }

// carrier opens the connection below TLS. options, if given, are called with the socket before it is connected.
func (p *proxy) carrier(ctx context.Context, options func(fd int) error) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	switch {
	case p.via != nil:
		return p.chained(ctx)
	case p.server.Unix() != "":
		return new(net.Dialer).DialContext(ctx, "unix", p.server.Unix())
	}
	addrs, err := p.a.resolve(ctx, p.server.Host())
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			for _, f := range []func(int) error{p.a.prepare, options} {
				if f != nil && err == nil {
					err = f(int(fd))
				}
			}
		})
		return errors.Join(cerr, err)
	}}
	err = errors.New("it has no address")
	for i, a := range addrs {
		one, cancel := context.WithTimeout(ctx, reachTime/time.Duration(len(addrs)-i))
		var c net.Conn
		c, err = d.DialContext(one, "tcp", netip.AddrPortFrom(a, p.server.Port()).String())
		cancel()
		if err == nil {
			return c, nil
		}
	}
	return nil, err
}

// chained connects through another proxy.
func (p *proxy) chained(ctx context.Context) (net.Conn, error) {
	type end struct {
		fd  int
		err error
	}
	dst := socks.Addr{Name: p.server.Host(), Port: p.server.Port()}
	if ip, err := netip.ParseAddr(dst.Name); err == nil {
		dst.Name, dst.IP = "", ip
	}
	done := make(chan end, 1)
	p.via.Connect(ctx, p.a.l, dst, func(s loop.Socket, err error) {
		if err != nil {
			done <- end{-1, err}
			return
		}
		done <- end{s.Release(), nil}
	})
	e := <-done
	if e.err != nil {
		return nil, e.err
	}
	f := os.NewFile(uintptr(e.fd), "proxy")
	defer f.Close()
	return net.FileConn(f)
}

// associate opens an association as viasocks does, and repairs the address of the relay if it is unusable.
func (p *proxy) associate(ctx context.Context) (*net.UDPConn, func(), conform.Answer) {
	type end struct {
		a   *socks.Association
		err error
	}
	done := make(chan end, 1)
	p.group.Associate(ctx, p.a.l, func(a *socks.Association, err error) { done <- end{a, err} })
	e := <-done
	if e.err != nil {
		return nil, nil, answerOf(e.err)
	}
	if e.a.OverTCP() {
		e.a.Close()
		return nil, nil, conform.Answer{Kind: conform.Granted}
	}
	fail := func(err error) (*net.UDPConn, func(), conform.Answer) {
		e.a.Close()
		return nil, nil, conform.Answer{Kind: conform.Failed, Error: err.Error()}
	}
	fd, err := e.a.Dial()
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), "relay")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return fail(err)
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		c.Close()
		return fail(errors.New("the socket to the relay is of another kind"))
	}
	return u, func() { e.a.Close() }, conform.Answer{Kind: conform.Granted, Bound: e.a.Relay().String()}
}

// answerOf returns the result of a request as an Answer.
func answerOf(err error) conform.Answer {
	a := conform.Answer{Kind: conform.Failed, Error: err.Error()}
	var code socks.Reply
	switch {
	case errors.As(err, &code):
		a.Kind, a.Code = conform.Refused, int(code)
	case errors.Is(err, socks.ErrEnded):
		a.Kind = conform.Closed
	case errors.Is(err, socks.ErrSilent), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		a.Kind = conform.Silence
	}
	return a
}

// prober returns a Prober for the server.
func (p *proxy) prober(ends conform.Ends, token string) conform.Prober {
	return conform.NewProber(conform.Config{
		Server: p.server, Ends: ends, Token: token, Wait: 4 * time.Second, Dial: p.dial, Associate: p.associate,
	})
}
