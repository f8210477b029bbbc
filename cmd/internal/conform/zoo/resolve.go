package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// resolve has a Tor resolve a name, and prints the address.
func resolve(ctx context.Context, url, name string) error {
	server, err := socks.ParseServer(url)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d, err := socks.NewDialer(socks.Options{})
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := loop.New()
	if err != nil {
		return err
	}
	over := make(chan error, 1)
	go func() { over <- l.Run(ctx) }()
	defer func() { _ = l.Close(); <-over }()
	type answer struct {
		a   netip.Addr
		err error
	}
	got := make(chan answer, 1)
	d.Client(server).Resolve(ctx, l, name, func(a netip.Addr, err error) { got <- answer{a, err} })
	select {
	case x := <-got:
		if x.err == nil {
			fmt.Println(x.a)
		}
		return x.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
