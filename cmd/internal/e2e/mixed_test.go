package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// mixedTime is how long each of TestMixed's modes lasts: a minute and more is for when the data plane was changed.
var mixedTime = flag.Duration("mixed", 4*time.Second, "how long TestMixed stresses each offload mode")

// What a connection of TestMixed does. The app says it in a header, so that both ends know.
const (
	mixBothWays = iota // bulk both ways at once, FINs behind the last bytes
	mixUp              // bulk up, an answer after the FIN
	mixDown            // bulk down after the app's FIN
	mixTiny            // writes of 1 to 100 bytes, both ways
	mixStall           // the reader begins late, with a small buffer: zero window; both ways
	mixAppRST          // the app resets in the middle
	mixFarRST          // the far end resets in the middle
	mixKinds
)

var mixNames = [mixKinds]string{"both ways", "up", "down", "tiny writes", "stalled", "reset by the app", "reset by the far end"}

// mixPlan is a connection's header: what is done, with how many bytes, from which seed.
type mixPlan struct {
	Kind uint32
	Size uint32
	Seed uint64
}

const mixPlanLen = 16

func (p mixPlan) header() []byte {
	b := binary.BigEndian.AppendUint32(nil, p.Kind)
	b = binary.BigEndian.AppendUint32(b, p.Size)
	return binary.BigEndian.AppendUint64(b, p.Seed)
}

func (p mixPlan) String() string {
	return fmt.Sprintf("%s, %d bytes, seed %d", mixNames[p.Kind], p.Size, p.Seed)
}

// mixBytes is a stream that both ends can make: way 0 goes up, 1 down.
func mixBytes(p mixPlan, way byte) io.Reader {
	seed := [32]byte{8: way}
	binary.BigEndian.PutUint64(seed[:], p.Seed)
	return io.LimitReader(rand.NewChaCha8(seed), int64(p.Size))
}

// mixSend writes the stream in pieces of up to most bytes.
func mixSend(c *net.TCPConn, p mixPlan, way byte, most int) error {
	src, r := mixBytes(p, way), rand.New(rand.NewPCG(p.Seed, 0))
	b := make([]byte, most)
	for done := 0; ; {
		n, err := src.Read(b[:1+r.IntN(most)])
		if err != nil {
			return nil
		}
		if _, err := c.Write(b[:n]); err != nil {
			return fmt.Errorf("write, after %d bytes: %w", done, err)
		}
		done += n
	}
}

// mixReceive reads until the end, and holds every byte to what was sent. The error is that of the read; nil is EOF.
func mixReceive(c *net.TCPConn, p mixPlan, way byte) (got int, err error) {
	src := mixBytes(p, way)
	b, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if n > 0 {
			m, _ := io.ReadFull(src, want[:n])
			if m < n || !bytes.Equal(b[:n], want[:n]) {
				return got, fmt.Errorf("bytes %d to %d are not those that were sent", got, got+n)
			}
			got += n
		}
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

func mixAll(c *net.TCPConn, p mixPlan, way byte) error {
	got, err := mixReceive(c, p, way)
	if err == nil && got != int(p.Size) {
		err = errors.New("FIN in the middle")
	}
	if err != nil {
		return fmt.Errorf("read, after %d of %d bytes: %w", got, p.Size, err)
	}
	return nil
}

// mixEnd is one end's part. mine is the way that it sends.
func mixEnd(c *net.TCPConn, p mixPlan, app bool) error {
	mine, theirs := byte(0), byte(1)
	if !app {
		mine, theirs = 1, 0
	}
	most := 256 << 10
	send := func() error {
		err := mixSend(c, p, mine, most)
		return errors.Join(err, c.CloseWrite())
	}
	both := func(begin func()) error {
		sent := make(chan error, 1)
		go func() { sent <- send() }()
		begin()
		err := mixAll(c, p, theirs)
		return errors.Join(err, <-sent)
	}
	switch p.Kind {
	case mixTiny:
		most = 100
		return both(func() {})
	case mixBothWays:
		return both(func() {})
	case mixStall:
		return both(func() { testkit.Pace(time.Duration(100+p.Seed%1500) * time.Millisecond) })
	case mixUp, mixDown:
		if app == (p.Kind == mixUp) { // the bulk, and then the other's own
			if !app {
				if _, err := io.Copy(io.Discard, c); err != nil {
					return err
				}
			}
			if err := send(); err != nil || !app {
				return err
			}
			b, err := io.ReadAll(c)
			if err != nil || string(b) != "answer" {
				return fmt.Errorf("the answer: %q, %w", b, err)
			}
			return nil
		}
		if app {
			if err := c.CloseWrite(); err != nil {
				return err
			}
			return mixAll(c, p, theirs)
		}
		if err := mixAll(c, p, theirs); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "answer"); err != nil {
			return err
		}
		return c.CloseWrite()
	case mixAppRST, mixFarRST:
		if app == (p.Kind == mixAppRST) {
			err := mixSend(c, p, mine, most)
			if p.Seed%2 == 0 {
				testkit.Pace(time.Duration(p.Seed%20) * time.Millisecond)
			}
			reset(c)
			return err
		}
		// What comes before the RST is a part of the stream, and then there is the RST, never a FIN.
		if got, err := mixReceive(c, p, theirs); !errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("ended with %v after %d bytes, not with ECONNRESET", err, got)
		}
		return nil
	}
	return errors.New("no such kind")
}

// mixFar serves the far ends.
func mixFar(l *net.TCPListener, failed func(error)) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(2 * time.Minute))
			h := make([]byte, mixPlanLen)
			if n, err := io.ReadFull(c, h); err != nil {
				// An app that resets at once may leave nothing but the RST.
				if !errors.Is(err, syscall.ECONNRESET) {
					failed(fmt.Errorf("far end: header: %d bytes, %w", n, err))
				}
				return
			}
			p := mixPlan{binary.BigEndian.Uint32(h), binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint64(h[8:])}
			if err := mixEnd(c, p, false); err != nil {
				failed(fmt.Errorf("far end: %v: %w", p, err))
			}
		}()
	}
}

func mixApp(a *app, dst netip.AddrPort, p mixPlan) error {
	fd, _, err := a.tryConnect(dst)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	f := os.NewFile(uintptr(fd), "app")
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return err
	}
	c := nc.(*net.TCPConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	if p.Kind == mixStall && p.Seed%2 == 0 {
		c.SetReadBuffer(16 << 10)
	}
	if _, err := c.Write(p.header()); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return mixEnd(c, p, true)
}

// mixUDP sends datagrams to an echo and holds every answer to what was sent and to whom. Losses are no fault.
func mixUDP(app *net.UDPConn, far netip.AddrPort, seed uint64, end time.Time) (sent, answered int, err error) {
	r := rand.New(rand.NewPCG(seed, 2))
	b, got := make([]byte, 3000), make([]byte, 65536)
	for time.Now().Before(end) {
		open := make(map[uint32][]byte)
		for range 1 + r.IntN(16) {
			n := 8 + r.IntN(1400)
			if r.IntN(8) == 0 {
				n = 1460 + r.IntN(1500)
			}
			id := r.Uint32()
			binary.BigEndian.PutUint32(b, id)
			for i := 4; i < n; i++ {
				b[i] = byte(id) + byte(i)
			}
			if _, err := app.WriteToUDPAddrPort(b[:n], far); err != nil {
				return sent, answered, err
			}
			open[id] = bytes.Clone(b[:n])
			sent++
		}
		app.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		for len(open) > 0 {
			n, from, err := app.ReadFromUDPAddrPort(got)
			if err != nil {
				break
			}
			if n < 4 || netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != far {
				return sent, answered, fmt.Errorf("%d bytes from %v", n, from)
			}
			want, ok := open[binary.BigEndian.Uint32(got)]
			if !ok { // late
				continue
			}
			if !bytes.Equal(want, got[:n]) {
				return sent, answered, fmt.Errorf("%d bytes came back for %d", n, len(want))
			}
			answered++
			delete(open, binary.BigEndian.Uint32(got))
		}
	}
	return sent, answered, nil
}

// TestMixed does everything at once and holds every byte to what was sent: bulk both ways, half-close, tiny writes, readers
// that stall, resets in the middle, datagrams. -mixed=60s makes it a stress test.
func TestMixed(t *testing.T) { eachOffload(t, testMixed) }

func testMixed(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload, "--log-level", "warn")
	var failures atomic.Int64
	failed := func(err error) {
		if failures.Add(1) < 20 {
			t.Error(err)
		}
	}
	end := time.Now().Add(*mixedTime)
	var wg sync.WaitGroup
	var done [mixKinds]atomic.Int64
	var sent, answered atomic.Int64
	for _, host := range []string{world4, world6} {
		l, dst := listenTCP(t, host)
		go mixFar(l, failed)
		for w := range 6 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), uint64(len(host))))
				for time.Now().Before(end) && failures.Load() == 0 {
					p := mixPlan{Kind: uint32(r.IntN(mixKinds)), Size: uint32(r.IntN(1 << 20)), Seed: r.Uint64()}
					switch {
					case p.Kind == mixTiny:
						p.Size = uint32(r.IntN(20_000))
					case r.IntN(4) == 0:
						p.Size *= 8
					case r.IntN(4) == 0:
						p.Size = uint32(r.IntN(3000))
					}
					if err := mixApp(a, dst, p); err != nil {
						failed(fmt.Errorf("app: %v: %w", p, err))
					}
					done[p.Kind].Add(1)
				}
			})
		}
		far, addr := farUDP(t, host)
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := far.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				far.WriteToUDPAddrPort(b[:n], from)
			}
		}()
		for w := range 2 {
			app := a.udp(host == world6)
			wg.Go(func() {
				s, n, err := mixUDP(app, addr, uint64(w), end)
				sent.Add(int64(s))
				answered.Add(int64(n))
				if err != nil {
					failed(fmt.Errorf("UDP: %w", err))
				}
			})
		}
	}
	wg.Wait()
	var b strings.Builder
	for k := range done {
		fmt.Fprintf(&b, "%s %d, ", mixNames[k], done[k].Load())
	}
	t.Logf("%sdatagrams %d, answered %d; %d failures", &b, sent.Load(), answered.Load(), failures.Load())
	if answered.Load() == 0 {
		t.Error("no datagram was answered")
	}
	testkit.EventuallyIn(t, 30*time.Second, "every connection to the server ends", func() bool {
		s := proxy.Stats()
		return s.Open-s.AssociationsOpen <= 0
	})
}
