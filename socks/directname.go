package socks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
)

// maxNameDials limits the concurrent look-ups of names without a server. Each look-up has a goroutine.
const maxNameDials = 256

// DialDirectName connects to a name without a server. Options.Resolve looks the name up, and its addresses are tried
// one after the other. done is called as by DialDirect and gets the same errors. A name without addresses, or one
// that the resolver does not answer for, gives EHOSTUNREACH; too many concurrent look-ups give EAGAIN.
func (d *Dialer) DialDirectName(
	ctx context.Context,
	l *loop.Loop,
	name string,
	port uint16,
	done func(s loop.Socket, err error),
) {
	d.LookUpDirect(ctx, name, func(addrs []netip.Addr, err error) {
		if err != nil {
			done(loop.NoSocket, err)
			return
		}
		d.dialInTurn(ctx, l, addrs, port, done)
	})
}

// LookUpDirect looks up a name by Options.Resolve and returns at once. done is called exactly once, possibly before
// LookUpDirect returns, and must not block. It gets at least one address, or an error like those of DialDirectName.
func (d *Dialer) LookUpDirect(ctx context.Context, name string, done func([]netip.Addr, error)) {
	d.mu.Lock()
	switch {
	case d.closed.Load():
		d.mu.Unlock()
		done(nil, ErrClosed)
		return
	case d.names.Add(1) > maxNameDials:
		d.names.Add(-1)
		d.mu.Unlock()
		done(nil, fmt.Errorf("cannot look up %s: %w", name, unix.EAGAIN))
		return
	}
	defer d.mu.Unlock()
	d.lookups.Go(func() {
		addrs, err := d.lookUpDirect(ctx, name)
		d.names.Add(-1)
		done(addrs, err)
	})
}

// lookUpDirect returns the addresses of a name. It ends at the connect timeout, or when ctx or the Dialer ends.
func (d *Dialer) lookUpDirect(ctx context.Context, name string) ([]netip.Addr, error) {
	within, cancel := context.WithTimeout(d.ctx, time.Duration(d.connectTimeout.Load()))
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	defer stop()
	found, err := d.opts.Resolve(within, name)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("cannot look up %s: %w", name, errors.Join(err, unix.EHOSTUNREACH))
	}
	var addrs []netip.Addr
	for _, a := range found {
		if a = a.Unmap(); d.opts.CanBePeer(a) && len(addrs) < maxAddrs {
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("cannot look up %s: %w: %w", name, errNoAddrs, unix.EHOSTUNREACH)
	}
	return addrs, nil
}

// dialInTurn tries each address until one answers. The error is that of the last address.
func (d *Dialer) dialInTurn(
	ctx context.Context,
	l *loop.Loop,
	addrs []netip.Addr,
	port uint16,
	done func(s loop.Socket, err error),
) {
	d.DialDirect(ctx, l, netip.AddrPortFrom(addrs[0], port), func(s loop.Socket, err error) {
		if err != nil && len(addrs) > 1 && ctx.Err() == nil {
			d.dialInTurn(ctx, l, addrs[1:], port, done)
			return
		}
		done(s, err)
	})
}
