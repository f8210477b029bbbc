package publish

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// packets is a program that answers datagrams with the address that they came from.
func packets(t *testing.T, at string) (port uint16) {
	t.Helper()
	c, err := net.ListenPacket("udp", net.JoinHostPort(at, "0"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 64<<10)
		for n, from, err := c.ReadFrom(b); err == nil; n, from, err = c.ReadFrom(b) {
			c.WriteTo(fmt.Appendf(nil, "%s %s", b[:n], from), from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// The program tells senders apart, and each gets its own answers, from the address that it asked. A program that listens at the
// second target alone gets the very first datagram, too.
func TestDatagrams(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, at := range []string{"127.0.0.3", "::1"} {
		p := start(t, Spec{UDP: true, Listen: netip.MustParseAddrPort("0.0.0.0:0"), Port: packets(t, at)})
		ports := map[string]bool{}
		for _, asked := range []string{"127.0.0.1", "127.0.0.2"} {
			to := netip.AddrPortFrom(netip.MustParseAddr(asked), p.Listening()[0].Listen.Port())
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to)) // connected: other sources are not taken
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for _, text := range []string{"one", "two"} {
				c.SetDeadline(time.Now().Add(testkit.Patience))
				c.Write([]byte(text))
				b := make([]byte, 100)
				n, err := c.Read(b)
				got, from, _ := strings.Cut(string(b[:n]), " ")
				if err != nil || got != text {
					t.Fatalf("%s, asked at %s: %q, %v", at, asked, b[:n], err)
				}
				ports[from] = true
			}
		}
		if len(ports) != 2 {
			t.Errorf("two senders were seen as %v", ports)
		}
		testkit.Eventually(t, "eight datagrams to be counted", func() bool { return p.Stats().Datagrams == 8 })
		if st := p.Stats(); st.Open != 2 || st.Dropped != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// There are so many senders at most. A further one takes the place of the one that was silent longest and has no answer, and
// gets none while the program answers all the others.
func TestManySenders(t *testing.T) {
	testkit.CheckLeaks(t)
	p := start(t)
	a := newSenders(p, nil, Spec{Port: 9})
	stop := afterFunc(p.ctx, a.end)
	defer stop()
	key := func(i int) senderKey { return senderKey{from: netip.AddrPortFrom(lo4, uint16(i))} }
	for i := range maxFlows {
		a.all[key(i)] = nil // has an answer, and no socket
	}
	if err := a.take([]byte("x"), key(maxFlows)); !errors.Is(err, errTooMany) {
		t.Error(err)
	}
	delete(a.all, key(0))
	delete(a.all, key(1))
	for _, i := range []int{0, 1, 0, maxFlows} { // 0 came first, but has sent since
		_ = a.take([]byte("x"), key(i)) // nobody listens, which may be seen at once
	}
	a.mu.Lock()
	if a.all[key(0)] == nil || a.all[key(1)] != nil || a.all[key(maxFlows)] == nil || len(a.all) != maxFlows {
		t.Errorf("there are %d senders: %v, %v, %v", len(a.all), a.all[key(0)], a.all[key(1)], a.all[key(maxFlows)])
	}
	a.mu.Unlock()
	p.Close()
}

// breaking makes sockets until it is broken, as if the process had too many open files then.
type breaking struct {
	here
	broken atomic.Bool
}

func (b *breaking) Socket(domain, typ int) (int, error) {
	if b.broken.Load() {
		return -1, unix.EMFILE
	}
	return b.here.Socket(domain, typ)
}

// A sender for which there is no socket takes nobody's place.
func TestSenderWithoutSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	p, sockets := start(t), &breaking{}
	p.cfg.Sockets = sockets
	a := newSenders(p, nil, Spec{Port: 9})
	stop := afterFunc(p.ctx, a.end)
	defer stop()
	key := func(i int) senderKey { return senderKey{from: netip.AddrPortFrom(lo4, uint16(i))} }
	for i := range maxFlows - 1 {
		a.all[key(i)] = nil // has an answer, and no socket
	}
	_ = a.take([]byte("x"), key(maxFlows)) // nobody listens, which may be seen at once
	sockets.broken.Store(true)
	if err := a.take([]byte("x"), key(maxFlows+1)); !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	a.mu.Lock()
	if a.all[key(maxFlows)] == nil || a.unanswered.Len() != 1 {
		t.Error("the sender that was there before has lost its place")
	}
	a.mu.Unlock()
	p.Close()
}

// narrow makes sockets that get one of two ports.
type narrow struct {
	here
	low uint32
}

func (n narrow) Socket(domain, typ int) (int, error) {
	fd, err := n.here.Socket(domain, typ)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, int((n.low+1)<<16|n.low))
	}
	return fd, err
}

// No socket of ours takes the port of the program, which may not be there yet.
func TestProgramsPortIsLeftToIt(t *testing.T) {
	testkit.CheckLeaks(t)
	const port = 40090 // IP_LOCAL_PORT_RANGE counts within that of the system
	p := &Publisher{cfg: Config{Sockets: narrow{low: port}, Datagrams: targets}}
	for range 16 {
		c, err := p.dialAside(targets[0], port)
		if errors.Is(err, unix.ENOPROTOOPT) {
			t.Skip("IP_LOCAL_PORT_RANGE needs Linux 6.3: ", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := c.LocalAddr().(*net.UDPAddr).Port; got != port+1 {
			t.Errorf("the socket has port %d", got)
		}
		c.Close()
	}
}
