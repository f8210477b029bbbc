package socks

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A name without a server: each address is tried, what cannot be asked or found is EHOSTUNREACH, and a cancelled dial ends.
func TestDialDirectName(t *testing.T) {
	far, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	port := far.Addr().(*net.TCPAddr).AddrPort().Port()
	local := netip.MustParseAddr("127.0.0.1")
	d := newDialer(t, Options{
		CanBePeer: func(a netip.Addr) bool { return a != netip.MustParseAddr("127.0.0.9") },
		Resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			switch host {
			case "both.test":
				return []netip.Addr{netip.MustParseAddr("127.0.0.2"), local}, nil // nobody listens at the first
			case "ours.test":
				return []netip.Addr{netip.MustParseAddr("127.0.0.9")}, nil
			case "slow.test":
				<-ctx.Done()
			}
			return nil, errors.New("no such host")
		},
	})
	dial := func(ctx context.Context, name string) error {
		result := make(chan error, 1)
		d.DialDirectName(ctx, on(d), name, port, func(s loop.Socket, err error) { s.Close(); result <- err })
		select {
		case err := <-result:
			return err
		case <-time.After(testkit.Patience):
			t.Fatalf("%s: no end", name)
			return nil
		}
	}
	if err := dial(context.Background(), "both.test"); err != nil {
		t.Errorf("the second address is not tried: %v", err)
	}
	for _, name := range []string{"ours.test", "no.test"} {
		if err := dial(context.Background(), name); !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var call loop.Call
	time.AfterFunc(50*time.Millisecond, call.Cancel)
	if err := dial(&call, "slow.test"); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled look-up: %v", err)
	}
	d.names.Store(maxNameDials)
	if err := dial(context.Background(), "both.test"); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("too many: %v", err)
	}
}
