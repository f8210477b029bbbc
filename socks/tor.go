package socks

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/viasocks/viasocks/stack/loop"
)

// The commands of Tor's extensions to SOCKS5 (its specification "socks-extensions").
const (
	CmdResolve    Command = 0xf0
	CmdResolvePTR Command = 0xf1
)

// The replies of Tor's extensions, which it gives if its SocksPort has the flag ExtendedErrors.
const (
	ReplyOnionNotFound       Reply = 0xf0
	ReplyOnionInvalid        Reply = 0xf1
	ReplyOnionIntroduction   Reply = 0xf2
	ReplyOnionRendezvous     Reply = 0xf3
	ReplyOnionNoAuth         Reply = 0xf4
	ReplyOnionWrongAuth      Reply = 0xf5
	ReplyOnionBadAddress     Reply = 0xf6
	ReplyOnionIntroductionTO Reply = 0xf7
)

var torReplies = [...]string{
	"onion service descriptor not found", "onion service descriptor invalid", "onion service introduction failed",
	"onion service rendezvous failed", "onion service wants client authorization",
	"onion service refuses the client authorization",
	"invalid onion address", "onion service introduction timed out",
}

// Plain returns the reply of RFC 1928 that is nearest to r, for programs that know only errnos.
func (r Reply) Plain() Reply {
	switch r {
	case ReplyOnionNoAuth, ReplyOnionWrongAuth:
		return ReplyNotAllowed
	case ReplyOnionNotFound,
		ReplyOnionInvalid,
		ReplyOnionIntroduction,
		ReplyOnionRendezvous,
		ReplyOnionBadAddress,
		ReplyOnionIntroductionTO:
		return ReplyHostUnreachable
	}
	return r
}

var errNotTor = errors.New("the server's URL does not say tor")

// Resolve asks a Tor for an address of name. done is called once, on the event loop or, if the Dialer is closed, on
// another goroutine; its errors are those of Connect. A server is asked only if its URL says tor.
func (c *Client) Resolve(ctx context.Context, l *loop.Loop, name string, done func(netip.Addr, error)) {
	c.torAsk(ctx, l, CmdResolve, Addr{Name: name}, func(a Addr, err error) {
		if err == nil && (a.Name != "" || !a.IP.IsValid()) {
			err = &ServerError{Server: c.server.String(), Op: OpHandshake, Err: fmt.Errorf("%w: no address", ErrMalformed)}
		}
		if err != nil {
			a.IP = netip.Addr{}
		}
		done(a.IP, err)
	})
}

// ResolvePTR asks a Tor for the name of ip. Otherwise it is like Resolve.
func (c *Client) ResolvePTR(ctx context.Context, l *loop.Loop, ip netip.Addr, done func(name string, err error)) {
	c.torAsk(ctx, l, CmdResolvePTR, Addr{IP: ip}, func(a Addr, err error) {
		if err == nil && a.Name == "" {
			err = &ServerError{Server: c.server.String(), Op: OpHandshake, Err: fmt.Errorf("%w: no name", ErrMalformed)}
		}
		done(a.Name, err)
	})
}

// Resolve asks those servers of the group that are Tors, in their order, until one gives an answer, which may be a
// Reply.
func (g *Group) Resolve(ctx context.Context, l *loop.Loop, name string, done func(netip.Addr, error)) {
	g.askTors(0, func(err error) { done(netip.Addr{}, err) }, func(c *Client, next func(error)) {
		c.Resolve(ctx, l, name, func(ip netip.Addr, err error) {
			if failedItself(err) && ctx.Err() == nil {
				next(err)
				return
			}
			done(ip, err)
		})
	})
}

// ResolvePTR is Resolve for the name of ip.
func (g *Group) ResolvePTR(ctx context.Context, l *loop.Loop, ip netip.Addr, done func(name string, err error)) {
	g.askTors(0, func(err error) { done("", err) }, func(c *Client, next func(error)) {
		c.ResolvePTR(ctx, l, ip, func(name string, err error) {
			if failedItself(err) && ctx.Err() == nil {
				next(err)
				return
			}
			done(name, err)
		})
	})
}

// failedItself reports whether err says nothing about the name or address that was asked for.
func failedItself(err error) bool {
	var reply Reply
	return err != nil && !errors.As(err, &reply)
}

// askTors calls ask with the first Tor at index i or later; if that one fails, next continues with the one after it.
// If there is no Tor, it calls failed.
func (g *Group) askTors(i int, failed func(error), ask func(c *Client, next func(error))) {
	for ; i < len(g.clients); i++ {
		if g.clients[i].Tor() {
			ask(g.clients[i], func(err error) {
				g.askTors(i+1, func(error) { failed(err) }, ask)
			})
			return
		}
	}
	failed(fmt.Errorf("cannot resolve by %s: %w: %w", g.c.opts.Name, ErrCannotExpress, errNotTor))
}

func (c *Client) torAsk(ctx context.Context, l *loop.Loop, cmd Command, what Addr, done func(Addr, error)) {
	failed := func(err error) { done(Addr{}, err) }
	if !c.server.options.tor {
		go failed(fmt.Errorf("cannot resolve by %v: %w: %w", c.server, ErrCannotExpress, errNotTor))
		return
	}
	c.d.start(&dial{d: c.d, l: l, c: c, ctx: ctx, cmd: cmd, dst: what, failed: failed, granting: func(p *dial) {
		found := p.hs.Bound()
		p.drop()
		p.leave()
		done(found, nil)
	}})
}

type isolationKey struct{}

// WithIsolation returns a context for the dials of one program: with isolate=program they share no circuit of Tor
// with those of another key.
func WithIsolation(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, isolationKey{}, key)
}

// Tor reports whether the server's URL says that it is a Tor.
func (c *Client) Tor() bool { return c.server.Tor() }

// Tor reports whether the URL says that it is a Tor.
func (s Server) Tor() bool { return s.options.tor }

// ByProgram reports whether WithIsolation matters to the server.
func (c *Client) ByProgram() bool { return c.server.options.isolate == isolateProgram }

// isolationSecret makes the user names of this process differ from those of others, and hides the key.
var isolationSecret = sync.OnceValue(func() []byte {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return b
})

// loginFor returns the user and password of a dial. Tor gives streams with different ones different circuits
// (IsolateSOCKSAuth).
func (p *dial) loginFor() *login {
	s := &p.c.server
	key := ""
	switch s.options.isolate {
	case isolateNone:
		return s.login
	case isolateDestination:
		key = p.dst.Name
		if key == "" {
			key = p.dst.IP.String()
		}
	case isolateProgram:
		key, _ = p.ctx.Value(isolationKey{}).(string)
	}
	h := hmac.New(sha256.New, isolationSecret())
	h.Write([]byte(key))
	return newLogin("viasocks", hex.EncodeToString(h.Sum(nil)[:16]))
}
