package daemon

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks"
)

// marker returns a function that marks a socket.
func marker(mark uint32) func(fd int) error {
	return func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			return fmt.Errorf("cannot mark a socket: %w: CAP_NET_ADMIN is needed", err)
		}
		return nil
	}
}

// markedDialing makes sockets that the steering leaves alone: with mark, those to allowed endpoints, which are added
// before the sockets use them; with direct, those that may go anywhere.
func markedDialing(mark, direct uint32, allowed *endpoints) dialing {
	prepare := marker(mark)
	d := net.Dialer{Control: rawControl(prepare)}
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		address = beyondStub(address, "/run/systemd/resolve/resolv.conf")
		allowed.resolver(address)
		return d.DialContext(ctx, network, address)
	}}
	return dialing{
		prepare: prepare,
		direct:  marker(direct),
		allowed: allowed,
		resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			addrs, err := socks.LookupAddrs(ctx, r, host)
			if err == nil {
				addrs, err = notOurs(addrs)
			}
			if err == nil {
				allowed.resolved(host, addrs)
			}
			return addrs, err
		},
	}
}

// beyondStub returns the resolver that systemd-resolved asks if address is its stub. The stub asks from a socket
// without our mark, so the question would come back to us, who need the proxy to answer it.
func beyondStub(address, list string) string {
	if address != "127.0.0.53:53" && address != "127.0.0.54:53" {
		return address
	}
	b, err := os.ReadFile(list)
	if err != nil {
		return address
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil && !a.IsLoopback() {
				return netip.AddrPortFrom(a, 53).String()
			}
		}
	}
	return address
}

// rawControl converts prepare for package net.
func rawControl(prepare func(fd int) error) func(network, address string, c syscall.RawConn) error {
	if prepare == nil {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = prepare(int(fd)) }); cerr != nil {
			return cerr
		}
		return err
	}
}
