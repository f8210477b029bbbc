package socks_test

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/loop"
)

// SetTimeouts is for the next dial: with the 30 s of before the test would not see it end.
func TestSetTimeouts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := socks.NewDialer(socks.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	d.SetTimeouts(10*time.Second, 50*time.Millisecond)
	s, err := socks.ParseServer("socks5://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ev, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { _ = ev.Run(ctx); close(over) }()
	defer func() { cancel(); <-over }()
	done := make(chan error, 1)
	d.Client(s).Connect(ctx, ev, socks.Addr{Name: "example.org", Port: 80}, func(_ loop.Socket, err error) { done <- err })
	select {
	case err := <-done:
		if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want a timeout", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the timeout is what it was")
	}
}
