package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

func TestShardsFor(t *testing.T) {
	for procs, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 7: 3, 8: 4, 16: 8, 64: 8} {
		if n := shardsFor(procs); n != want {
			t.Errorf("%d processors: %d shards, want %d", procs, n, want)
		}
	}
}

// withShards has data planes divided into so many.
func withShards(t *testing.T, n int) {
	old := shardsFor
	shardsFor = func(int) int { return n }
	t.Cleanup(func() { shardsFor = old })
}

// listenBoth opens TCP and UDP sockets at one port of the loopback.
func listenBoth(t *testing.T) (net.Listener, net.PacketConn) {
	t.Helper()
	for try := 1; ; try++ {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.ListenPacket("udp4", l.Addr().String())
		if err == nil {
			return l, u
		}
		l.Close()
		if !errors.Is(err, syscall.EADDRINUSE) || try == 10 { // another process may have the UDP port
			t.Fatal(err)
		}
	}
}

// echoes starts a far end that echoes TCP and UDP at one port.
func echoes(t *testing.T) netip.AddrPort {
	t.Helper()
	l, u := listenBoth(t)
	var ended sync.WaitGroup
	ended.Go(func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			ended.Go(func() {
				defer c.Close()
				b := make([]byte, 64<<10) // not io.Copy, which keeps a pipe for the next time
				for n, err := c.Read(b); err == nil; n, err = c.Read(b) {
					c.Write(b[:n])
				}
			})
		}
	})
	ended.Go(func() {
		b := make([]byte, 64<<10)
		for n, from, err := u.ReadFrom(b); err == nil; n, from, err = u.ReadFrom(b) {
			u.WriteTo(b[:n], from)
		}
	})
	t.Cleanup(func() { l.Close(); u.Close(); ended.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestPlaneShards: connections and datagrams of many ports at once pass a data plane of several shards, also when the kernel
// forgets in between which queue is whose, and status knows the shards.
func TestPlaneShards(t *testing.T) {
	for _, n := range []int{2, 4} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			testkit.CheckLeaks(t)
			withShards(t, n)
			far := echoes(t)
			s, err := sockstest.Listen("tcp4", "127.0.0.1:0", sockstest.WithRedirectsOnly())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			dst := netip.MustParseAddrPort("203.0.113.9:80")
			s.Redirect(dst, far)
			device, theirs := tuntest.Pipe(1500, tun.VnetHdr|tun.TSO|tun.USO)
			app, err := stacktest.New(theirs, netip.MustParseAddr("198.18.0.1"))
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			p, err := newPlane(parse(t, "--proxy", s.URL()), device, nil, dialing{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			p.start()
			if p.stack.Shards() != n {
				t.Fatalf("%d shards", p.stack.Shards())
			}
			var all sync.WaitGroup
			for i := range 40 {
				all.Go(func() { shardTCP(t, app, dst, byte(i), theirs) })
				all.Go(func() { shardUDP(t, app, dst, byte(i), theirs) })
			}
			all.Wait()
			k, r := p.stack.Stats(), p.router.Stats()
			if k.HandedOver == 0 || k.DroppedHandover != 0 || r.Streams != 40 || r.Mappings != 40 {
				t.Errorf(
					"%d frames handed over, %d lost; %d streams, %d mappings",
					k.HandedOver,
					k.DroppedHandover,
					r.Streams,
					r.Mappings,
				)
			}
			t.Logf("%d of %d frames were handed over", k.HandedOver, k.FramesIn)
			stop(p, nil)
		})
	}
}

func shardTCP(t *testing.T, app *stacktest.App, dst netip.AddrPort, fill byte, dev *tuntest.Device) {
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	c, err := app.DialTCP(ctx, dst)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(testkit.Patience))
	data, got := bytes.Repeat([]byte{fill}, 50_000), make([]byte, 50_000)
	for range 3 {
		dev.Forget()
		if _, err := c.Write(data); err != nil {
			t.Error(err)
			return
		}
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
			t.Errorf("connection %d: %v", fill, err)
			return
		}
	}
}

func shardUDP(t *testing.T, app *stacktest.App, dst netip.AddrPort, fill byte, dev *tuntest.Device) {
	c, err := app.DialUDP(netip.AddrPort{}, dst)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	data, got := bytes.Repeat([]byte{fill}, 500), make([]byte, 1000)
	for range 20 {
		dev.Forget()
		for try := 0; ; try++ { // a datagram may be lost
			c.SetDeadline(time.Now().Add(testkit.Patience / 10))
			if _, err := c.Write(data); err != nil {
				t.Error(err)
				return
			}
			if n, err := c.Read(got); err == nil && bytes.Equal(got[:n], data) {
				break
			} else if try == 10 {
				t.Errorf("socket %d: %v", fill, err)
				return
			}
		}
	}
}
